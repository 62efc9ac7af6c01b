"""What a compiled program does on one device: operations, bytes of memory and of links, collectives, largest tensors.

All are sums over the optimised HLO, each instruction times the number of times that it runs (`hlo.Program`).
"""

import collections
import dataclasses
import math
import re

import numpy as np

from unifusion_jax.planning import hlo

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute', 'ragged-all-to-all',
               'collective-broadcast')
# Products that a kernel of splash attention makes for each pair of a query and a key, by a word of its name
ATTENTION = {'fwd': 2, 'dkv': 4, 'dq': 3}
_NO_BYTES = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call',
             'after-all', 'partition-id', 'replica-id', 'opt-barrier', 'iota', 'domain'}
_NO_CALLS = ('AllocateBuffer', 'ConcatBitcast', 'PrepareAsync', 'AssumeGatherIndicesInBound', 'Sharding')


@dataclasses.dataclass(frozen=True)
class Tensor:
  """An array in the device's memory: an argument, or what an instruction writes."""
  bytes: int
  shape: str
  source: str  # as `hlo.Program.source`; of an argument its name


@dataclasses.dataclass(frozen=True)
class Collective:
  """Equal collectives of one place of the code."""
  kind: str
  count: int       # in one call of the program
  bytes: int       # of one: what it gathers, or what it reduces
  link_bytes: int  # of one: what each device sends, in a ring
  shape: str
  source: str


@dataclasses.dataclass(frozen=True)
class Work:
  flops: float      # of products and convolutions
  attention: float  # of those, in fused attention kernels, counted from shapes
  hbm_bytes: int    # read and written by all instructions outside of fusions
  collectives: tuple[Collective, ...]
  tensors: tuple[Tensor, ...]  # the largest, the largest first

  @property
  def link_bytes(self) -> int:
    return sum(each.count * each.link_bytes for each in self.collectives)


def of(text: str, devices: int, tensors: int = 5) -> Work:
  """The work of a program's optimised HLO (`compiled.as_text()`) on one of its devices."""
  program = hlo.Program(text)
  flops = attention = 0.0
  hbm_bytes, gathered, written, channels = 0, collections.Counter(), {}, set()
  for name, instruction, times in program.executed():
    computation = program.computations[name]
    flops += times * _flops(computation, instruction)
    attention += times * _attention(computation, instruction)
    kind, channel = _kind(program, name, instruction), instruction.number('channel_id')
    if kind and channel not in channels:  # on TPUs several fusions may carry parts of one
      channels |= {channel} - {0}
      moved = _moved(computation, instruction, kind)
      link = int(moved * _share(kind, _group(instruction, devices)))
      gathered[kind, moved, link, _shapes(instruction), program.source(instruction)] += times
    if name not in program.fused:
      hbm_bytes += times * _traffic(program, computation, instruction)
      argument = instruction.opcode == 'parameter' and name == program.entry
      if argument or instruction.opcode not in _NO_BYTES and not instruction.opcode.endswith('-done'):
        for array in instruction.outputs:
          if array.space == 0:
            tensor = Tensor(array.bytes, str(array), _source(program, computation, instruction))
            written[tensor.shape, tensor.source] = tensor
  collected = [Collective(kind, count, moved, link, shape, source)
               for (kind, moved, link, shape, source), count in gathered.items()]
  return Work(flops + attention, attention, hbm_bytes,
              tuple(sorted(collected, key=lambda each: -each.count * each.link_bytes)),
              tuple(sorted(written.values(), key=lambda tensor: -tensor.bytes)[:tensors]))


def _source(program: hlo.Program, computation: hlo.Computation, instruction: hlo.Instruction, depth: int = 4) -> str:
  """Where an array comes from: a line, or the name of an argument; of a copy, what it copies."""
  if instruction.opcode == 'parameter':
    return instruction.text('op_name')
  inner = (other for names in instruction.called.values() for name in names
           for other in reversed(program.computations.get(name, {}).values()))
  if found := program.source(instruction) or next(filter(None, map(program.source, inner)), ''):
    return found
  copied = [computation[name] for name in instruction.operands if name in computation]
  return _source(program, computation, copied[0], depth - 1) if copied and depth else ''


def _flops(computation: hlo.Computation, instruction: hlo.Instruction) -> float:
  """2 for each multiplication of a product or convolution; a product that XLA turned into a sum counts nothing."""
  if instruction.opcode not in ('dot', 'convolution'):
    return 0.0
  left, right = (computation[name].outputs[0].dims for name in instruction.operands[:2])
  (out,) = instruction.outputs
  if instruction.opcode == 'dot':
    return 2.0 * math.prod(out.dims) * math.prod(left[i] for i in instruction.numbers('lhs_contracting_dims'))
  inputs, kernel, result = re.findall(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.attributes)[0]
  pairs = 1
  for at, (size, stride, low, spread, step) in enumerate(_window(instruction, sum(c.isdigit() for c in kernel))):
    place = str(at)
    pairs *= _valid(left[inputs.index(place)], size, out.dims[result.index(place)], stride, low, spread, step)
  groups = instruction.number('feature_group_count', 1) * instruction.number('batch_group_count', 1)
  return 2.0 * pairs * left[inputs.index('b')] * left[inputs.index('f')] * right[kernel.index('o')] / groups


def _window(instruction: hlo.Instruction, axes: int):
  """(size, stride, padding before, dilation of the input, dilation of the kernel) of each axis of a convolution."""
  match = re.search(r'window=\{([^}]*)\}', instruction.attributes)
  given = dict(part.split('=') for part in match.group(1).split()) if match else {}
  field = lambda name, default: given[name].split('x') if name in given else [default] * axes
  lows = [part.partition('_')[0] for part in field('pad', '0_0')]
  return [tuple(map(int, numbers)) for numbers in zip(
      field('size', '1'), field('stride', '1'), lows, field('lhs_dilate', '1'), field('rhs_dilate', '1'))]


def _valid(length: int, size: int, out: int, stride: int, low: int, spread: int, step: int) -> int:
  """Pairs of an output's and a kernel's position on one axis that meet an element of the input."""
  at = np.arange(out)[:, None] * stride + np.arange(size) * step - low
  return int(np.sum((at >= 0) & (at < (length - 1) * spread + 1) & (at % spread == 0)))


def _attention(computation: hlo.Computation, instruction: hlo.Instruction) -> float:
  """Operations of a kernel of fused attention, from the shapes of its first operands: q [.. h s k], k [.. g t k].

  All pairs of queries and keys are counted, those that causality or segments leave out too.
  """
  if instruction.opcode != 'custom-call' or 'tpu_custom_call' not in instruction.attributes:
    return 0.0
  name = f'{instruction.name} {instruction.text("op_name")}'
  products = next((count for word, count in ATTENTION.items() if re.search(rf'(splash|flash)\w*_{word}', name)), 0)
  wide = [array.dims for operand in instruction.operands if operand in computation
          for array in computation[operand].outputs if len(array.dims) >= 3 and not array.dtype.startswith(('s', 'u'))]
  if not products or len(wide) < 2:
    return 0.0
  (*rows, queries, dim), keys = wide[0], wide[1][-2]
  return 2.0 * products * math.prod(rows) * queries * keys * dim


def _kind(program: hlo.Program, name: str, instruction: hlo.Instruction) -> str:
  """The kind of a collective; '' for any other instruction."""
  kind = instruction.opcode.removesuffix('-start')
  if kind not in COLLECTIVES:
    return ''
  # TPUs have no instruction for this: a fusion of that name, which slices what it reduces
  return 'reduce-scatter' if kind == 'all-reduce' and 'all-reduce-scatter' in name else kind


def _moved(computation: hlo.Computation, instruction: hlo.Instruction, kind: str) -> int:
  operands = sum(_dense(array) for name in instruction.operands if name in computation
                 for array in computation[name].outputs)
  if kind != 'all-gather':
    return operands
  outputs = instruction.outputs  # of a start: operands, results, and what else it holds
  sizes = [_dense(array) for array in outputs]
  return sum(sizes) - (operands if instruction.opcode.endswith('-start') else 0)


def _share(kind: str, devices: int) -> float:
  """What a device sends of a collective's bytes, in a ring of a number of devices."""
  if kind == 'collective-permute':
    return 1.0
  return (2 if kind == 'all-reduce' else 1) * (devices - 1) / devices


def _group(instruction: hlo.Instruction, devices: int) -> int:
  """Devices that a collective joins."""
  text = instruction.attributes
  if match := re.search(r'replica_groups=\{\{([\d,]+)\}', text):
    return len(match.group(1).split(','))
  if match := re.search(r'replica_groups=\[\d+,(\d+)\]', text):
    return int(match.group(1))
  if match := re.search(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}', text):
    sizes = {axis: int(size) for axis, size in re.findall(r"'?([\w.]+)'?=(\d+)", match.group(1))}
    return math.prod(sizes.get(axis, 1) for axis in re.findall(r"'?([\w.]+)'?", match.group(2)))
  return devices


def _traffic(program: hlo.Program, computation: hlo.Computation, instruction: hlo.Instruction) -> int:
  """Bytes of main memory that an instruction outside of fusions reads and writes."""
  opcode = instruction.opcode
  if (opcode in _NO_BYTES or opcode.endswith('-done') or opcode == 'custom-call'
      and any(target in instruction.text('custom_call_target') for target in _NO_CALLS)):
    return 0
  arrays = [[a for a in computation[name].outputs] if name in computation else [] for name in instruction.operands]
  if opcode == 'fusion':
    (inner,) = instruction.called['calls']
    reads = sum(_read(program, inner, i, array) for i, operand in enumerate(arrays) for array in operand)
    return reads + _written(program, inner, instruction)
  if opcode == 'dynamic-update-slice':
    return 2 * _main(arrays[1])
  if opcode in ('dynamic-slice', 'slice', 'gather'):
    return 2 * _main(instruction.outputs)
  outputs = instruction.outputs[:1] if opcode in ('copy-start', 'slice-start') else instruction.outputs
  return sum(map(_main, arrays)) + _main(outputs)


def _read(program: hlo.Program, name: str, number: int, array: hlo.Array) -> int:
  """Bytes that a fused computation reads of its parameter: of one that it only slices, the slices."""
  if array.space:
    return 0
  computation = program.computations[name]
  parameter = next((i.name for i in computation.values() if i.opcode == 'parameter' and i.arguments == str(number)), '')
  total = 0
  for user in (i for i in computation.values() if parameter in i.operands):
    at = user.operands.index(parameter)
    if user.opcode in ('dynamic-slice', 'slice', 'gather') and at == 0:
      total += _dense(user.outputs[0])
    elif user.opcode == 'fusion':
      total += _read(program, user.called['calls'][0], at, array)
    elif user.opcode in ('dynamic-update-slice', *COLLECTIVES) and not at or user.root and user.opcode == 'tuple':
      continue  # updated in place, on its way over the links, or handed on
    else:
      return array.bytes
  return min(total, array.bytes)


def _written(program: hlo.Program, name: str, instruction: hlo.Instruction) -> int:
  """Bytes that a fusion writes: of an array that it updates in place, the update."""
  computation = program.computations[name]
  root = hlo.root_of(computation)
  while root.opcode in ('bitcast', 'copy') and root.operands[0] in computation:
    root = computation[root.operands[0]]
  if root.opcode == 'dynamic-update-slice' and root.operands[1] in computation:
    return 0 if instruction.outputs[0].space else _dense(computation[root.operands[1]].outputs[0])
  if root.opcode == 'tuple' and len(root.operands) == len(instruction.outputs):
    return _main(array for array, part in zip(instruction.outputs, root.operands)
                 if computation[part].opcode not in ('parameter', *COLLECTIVES))
  return _main(instruction.outputs)


def _main(arrays) -> int:
  return sum(array.bytes for array in arrays if array.space == 0)


def _dense(array: hlo.Array) -> int:
  """Bytes of an array without padding."""
  return dataclasses.replace(array, layout='').bytes


def _shapes(instruction: hlo.Instruction) -> str:
  shapes = [str(array) for array in instruction.outputs if array.dims]
  return shapes[-1] if shapes else ''
