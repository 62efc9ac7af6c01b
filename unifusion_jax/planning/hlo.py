"""The text of a compiled program's optimised HLO, parsed: computations, instructions, and how often each one runs.

XLA's own `cost_analysis` counts the body of a loop once. Here each computation has the number of times that it runs,
loops multiplied by their trip counts, so that sums over instructions (`work.py`) are sums over what is executed.
"""

import dataclasses
import functools
import math
import pathlib
import re

PACKAGE = pathlib.Path(__file__).parent.parent
_ARRAY = re.compile(r'(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?')
_CLOSES = re.compile(r'\}(, execution_thread=.*)?$')  # the line after a computation's last
_NAME = re.compile(r'%([\w.\-]+)')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = (.*)')
_CALLED = re.compile(r'(calls|to_apply|condition|body|branch_computations|true_computation|false_computation|'
                     r'called_computations|async_wrapped)=(\{[^}]*\}|%[\w.\-]+)')


@dataclasses.dataclass(frozen=True)
class Array:
  """An array's type: one of the outputs of an instruction."""
  dtype: str
  dims: tuple[int, ...]
  layout: str = ''

  @property
  def space(self) -> int:
    """The memory it lies in: 0 is the device's main memory, others are on the chip."""
    match = re.search(r'S\((\d+)\)', self.layout)
    return int(match.group(1)) if match else 0

  @property
  def bytes(self) -> int:
    """Bytes in memory, with the padding of its tiles."""
    dims, order = list(self.dims), [int(i) for i in self.layout.partition(':')[0].split(',') if i.isdigit()]
    if tile := re.search(r'T\(([\d,]+)\)', self.layout):
      for axis, size in zip(order, reversed([int(n) for n in tile.group(1).split(',')])):
        dims[axis] = -(-dims[axis] // size) * size
    return math.ceil(math.prod(dims) * _bits(self.dtype) / 8)

  def __str__(self) -> str:
    return f'{self.dtype}[{",".join(map(str, self.dims))}]'


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of the program. `arguments` is the text in its parentheses, `attributes` the text after them."""
  name: str
  opcode: str
  outputs: tuple[Array, ...]
  arguments: str
  attributes: str
  root: bool

  @functools.cached_property
  def operands(self) -> tuple[str, ...]:
    return tuple(_NAME.findall(self.arguments))

  @functools.cached_property
  def called(self) -> dict[str, list[str]]:
    """Names of the computations that it runs, by role: calls, to_apply, condition, body, ..."""
    return {role: _NAME.findall(names) for role, names in _CALLED.findall(self.attributes)}

  def number(self, name: str, default: int = 0) -> int:
    """An attribute of one whole number, as in index=3."""
    match = re.search(rf'\b{name}=(\d+)', self.attributes)
    return int(match.group(1)) if match else default

  def numbers(self, name: str) -> tuple[int, ...]:
    """An attribute of several, as in dimensions={0,1}."""
    match = re.search(rf'\b{name}=\{{([\d,]*)\}}', self.attributes)
    return tuple(int(n) for n in match.group(1).split(',') if n) if match else ()

  def text(self, name: str) -> str:
    match = re.search(rf'\b{name}="?([^",}} ]+)', self.attributes)
    return match.group(1).replace('\\', '') if match else ''


Computation = dict[str, Instruction]  # by name, in their order


class Program:
  """A module of HLO.

  Attributes:
    computations: by name.
    entry: name of the one that is the program.
    times: how often each computation runs in one call of the program.
    fused: names of those inside fusions, whose arrays lie in no memory.
  """

  def __init__(self, text: str):
    self.computations, self.entry, self._tables = {}, '', {}
    inside = table = None
    for line in _joined(text.splitlines()):
      if inside is not None:
        if _CLOSES.match(line):
          inside = None
        elif instruction := _instruction(line):
          inside[instruction.name] = instruction
      elif line in ('FileNames', 'FunctionNames', 'FileLocations', 'StackFrames'):
        table = self._tables.setdefault(line, {})
      elif table is not None and line[:1].isdigit():
        number, _, entry = line.partition(' ')
        table[int(number)] = entry
      elif line.endswith('{') and (match := re.match(r'(ENTRY )?%?([\w.\-]+) \(', line)):
        table, inside = None, self.computations.setdefault(match.group(2), {})
        self.entry = match.group(2) if match.group(1) else self.entry
    self._callers, self.fused = {}, set()
    self.times = self._count()

  def _count(self) -> dict[str, int]:
    times = dict.fromkeys(self.computations, 0)
    times[self.entry] = 1
    for name in reversed(self.computations):  # a computation is printed after all that it calls
      for instruction in self.computations[name].values():
        for role, called in instruction.called.items():
          for other in called:
            if other in times:
              self._callers.setdefault(other, (name, instruction))
              if instruction.opcode == 'fusion' or name in self.fused:
                self.fused.add(other)
              trips = self.trips(instruction) if role in ('body', 'condition') else 1
              times[other] += times[name] * trips
    return times

  def executed(self):
    """(computation's name, instruction, times) of every instruction that runs."""
    for name, computation in self.computations.items():
      if self.times[name]:
        for instruction in computation.values():
          yield name, instruction, self.times[name]

  def trips(self, loop: Instruction) -> int:
    """Trip count of a while loop; where it ends by what it computes, the most that its counter allows; else 1."""
    if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes):
      return int(known.group(1))
    (condition,), (body,) = loop.called['condition'], loop.called['body']
    found = [trips for trips in self._counters(condition, body) if trips]
    return min(found, default=1)

  def _counters(self, condition: str, body: str):
    """Trip counts by each comparison of a counter with a limit in a condition, or in what the condition calls."""
    for instruction in self.computations[condition].values():
      for other in (name for names in instruction.called.values() for name in names):
        if other in self.computations:
          self._callers.setdefault(other, (condition, instruction))
          yield from self._counters(other, body)
      if instruction.opcode == 'compare' and 'direction=LT' in instruction.attributes:
        counter, limit = instruction.operands
        start, end = self._constant(condition, counter), self._constant(condition, limit)
        if end is not None and start != end:
          yield max(1, -(-(end - (start or 0)) // self._stride(body, self._element_of(condition, counter))))

  def _constant(self, name: str, operand: str, index: int | None = None) -> int | None:
    """The whole number that an operand holds when its computation is entered; `index` of a tuple."""
    instruction = self.computations[name].get(operand)
    if instruction is None:
      return None
    match instruction.opcode:
      case 'constant':
        return int(instruction.arguments) if re.fullmatch(r'-?\d+', instruction.arguments) else None
      case 'get-tuple-element':
        return self._constant(name, instruction.operands[0], instruction.number('index'))
      case 'tuple':
        return self._constant(name, instruction.operands[index])
      case 'copy' | 'convert' | 'bitcast' | 'reshape' | 'while' | 'opt-barrier':
        return self._constant(name, instruction.operands[0], index)
      case 'parameter' if name in self._callers:
        caller, call = self._callers[name]
        at = int(instruction.arguments) if call.opcode != 'while' else 0
        return self._constant(caller, call.operands[at], index)
    return None

  def _element_of(self, name: str, operand: str) -> int | None:
    """The element of the loop's state that an operand of its condition is."""
    instruction = self.computations[name].get(operand)
    if instruction is None:
      return None
    if instruction.opcode == 'get-tuple-element':
      return instruction.number('index')
    if instruction.opcode == 'parameter' and name in self._callers and self._callers[name][1].opcode != 'while':
      caller, call = self._callers[name]
      return self._element_of(caller, call.operands[int(instruction.arguments)])
    return self._element_of(name, instruction.operands[0]) if instruction.opcode in ('copy', 'bitcast') else None

  def _stride(self, body: str, index: int | None) -> int:
    """What a loop's body adds to its counter."""
    root = root_of(self.computations[body])
    if index is None or root.opcode != 'tuple':
      return 1
    step = self.computations[body].get(root.operands[index])
    while step is not None and step.opcode in ('copy', 'bitcast'):
      step = self.computations[body].get(step.operands[0])
    if step is None or step.opcode != 'add':
      return 1
    strides = [self.computations[body][name] for name in step.operands if name in self.computations[body]]
    constants = [int(x.arguments) for x in strides if x.opcode == 'constant' and x.arguments.isdigit()]
    return max(1, *constants) if constants else 1

  def source(self, instruction: Instruction) -> str:
    """Where our code asks for an instruction: 'models/layers.py:140 < models/dit.py:88', or a file outside; ''."""
    if match := re.search(r'source_file="([^"]*)" source_line=(\d+)', instruction.attributes):
      return places([(match.group(1), int(match.group(2)))])
    return places(self._stack(instruction.number('stack_frame_id')))

  def _stack(self, frame: int) -> list[tuple[str, int]]:
    """(file, line) of a frame and of its callers."""
    frames, stack = self._tables.get('StackFrames', {}), []
    field = lambda name, text: int(re.findall(rf'{name}=(\d+)', text)[0])
    parent = lambda number: field('parent_frame_id', frames[number])
    first = parent(1) if 1 in frames else 0  # numbers of parents are printed from 0 or from 1
    while frame in frames and len(stack) < 100:
      location = self._tables['FileLocations'][field('file_location_id', frames[frame])]
      file, line = (field(name, location) for name in ('file_name_id', 'line'))
      stack.append((self._tables['FileNames'][file].strip('"'), line))
      frame = parent(frame) - first
    return stack


def _joined(lines: list[str]):
  """Lines of a module, with an instruction's on one: attributes of a kernel may hold line breaks."""
  inside, waiting = False, ''
  for line in lines:
    if inside and not line.startswith('  ') and not _CLOSES.match(line):
      waiting += line
      continue
    if waiting:
      yield waiting
    inside = not _CLOSES.match(line) if inside else line.endswith('{')
    waiting = line
  yield waiting


def root_of(computation: Computation) -> Instruction:
  """The instruction whose value a computation returns."""
  return next(instruction for instruction in computation.values() if instruction.root)


def places(stack: list[tuple[str, int]]) -> str:
  """The innermost line of our code of (file, line)s, the innermost first, and its caller outside of layers.py.

  Without a line of ours the innermost one that is of no library.
  """
  named = [f'{path}:{line}' for file, line in stack if (path := _within_package(file))]
  if not named:
    return next((f'{pathlib.Path(file).name}:{line}' for file, line in stack if 'site-packages' not in file), '')
  inner = [name for name in named if not name.startswith(('models/layers.py', 'models/attention.py'))]
  return named[0] if not inner or inner[0] == named[0] else f'{named[0]} < {inner[0]}'


def _within_package(file: str) -> pathlib.Path | None:
  """The path in this package of a source, which is given whole or from the package on (`executables.SOURCES`)."""
  path = pathlib.Path(file)
  root = PACKAGE if path.is_absolute() else pathlib.Path(PACKAGE.name)
  return path.relative_to(root) if path.is_relative_to(root) else None


def _instruction(line: str) -> Instruction | None:
  match = _INSTRUCTION.match(line)
  if not match:
    return None
  root, name, rest = match.groups()
  kind, rest = _outputs(rest)
  opcode, _, rest = rest.partition('(')
  end = _closing(rest, 1)
  return Instruction(name, opcode.strip(), kind, rest[:end], rest[end + 1:], bool(root))


def _outputs(text: str) -> tuple[tuple[Array, ...], str]:
  """(arrays of a type, the text after it)."""
  end = _closing(text[1:], 1) + 2 if text.startswith('(') else text.index(' ')
  arrays = tuple(Array(dtype, tuple(int(n.lstrip('<=')) for n in dims.split(',') if n), layout or '')
                 for dtype, dims, layout in _ARRAY.findall(text[:end]))
  return arrays, text[end:]


def _closing(text: str, depth: int) -> int:
  """Index of the parenthesis that closes `depth` open ones."""
  for match in re.finditer(r'[()]', text):
    depth += 1 if match.group() == '(' else -1
    if not depth:
      return match.start()
  return len(text)


def _bits(dtype: str) -> int:
  if dtype in ('token', 'opaque'):
    return 0
  match = re.search(r'\d+', dtype)
  return int(match.group()) if match else 8
