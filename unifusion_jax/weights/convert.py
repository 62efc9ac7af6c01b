r"""Public checkpoints (safetensors) to sharded modules and back, by one table of rules per model, read both ways.

A rule is (torch name, our path, pattern) or (torch name, our path, pattern, part):

  torch name  a regex of plain text and `(\d+)` groups: r'model\.layers\.(\d+)\.mlp\.up_proj\.weight'
  our path    'blocks/mlp/up'. `\1` is what group 1 matched; a group that the path does not use is the layer of a
              stacked leaf, the leading axis of ours that patterns leave out
  pattern     einops, from torch's layout to ours: 'o i y x -> y x i o', '(h k) d -> d h k', 'd 1 1 -> d'
  part        for a torch tensor that holds several leaves: one letter of its layout and where this leaf lies on it.
              {'n': 0} of '(n h k) d -> d h k' is the q of a fused qkv; {'r': slice(0, -2)} of '(g r k) d -> d (g r) k'
              are InternLM2's queries, {'r': -2} its keys. The parts of a tensor must make it up exactly.

The sizes of letters come from our leaf's shape, then from `dims` (which is needed for parts and for our fused axes).
Rules that no leaf of a module asks for are simply not used, so one table serves every configuration of a model.
"""

import concurrent.futures
import dataclasses
import json
import math
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from unifusion_jax.errors import UserError

DTYPES = {'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16,
          'F8_E4M3': ml_dtypes.float8_e4m3fn, 'F8_E5M2': ml_dtypes.float8_e5m2, 'BOOL': np.bool_,
          'I64': np.int64, 'I32': np.int32, 'I16': np.int16, 'I8': np.int8,
          'U64': np.uint64, 'U32': np.uint32, 'U16': np.uint16, 'U8': np.uint8}
BLOCK = 2 ** 26  # bytes of a tensor that are read and rearranged at a time
SQUARE = 128  # of a matrix that is transposed: its rows and columns stay in cache
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')


class Tensor:
  """One tensor of an open safetensors file; indexing reads that slice and nothing else."""

  def __init__(self, file, name: str):
    self._slice = file.get_slice(name)
    self.shape = tuple(self._slice.get_shape())
    self.dtype = np.dtype(DTYPES[self._slice.get_dtype()])

  def __getitem__(self, index) -> np.ndarray:
    return np.asarray(self._slice[index])


def read(path) -> dict[str, Tensor]:
  """The tensors of a .safetensors file, or of a folder that holds one or an index of several. Reads headers only."""
  path = pathlib.Path(path)
  if not path.exists():
    raise UserError(f'{path}: no such file or folder; download the checkpoint first and give its local path')
  files = sorted(path.iterdir()) if path.is_dir() else [path]
  indexes = [f for f in files if f.name.endswith('.safetensors.index.json')]
  singles = [f for f in files if f.suffix == '.safetensors']
  if not indexes and not singles:
    pickles = [f.name for f in files if f.suffix in PICKLES]
    if pickles:
      raise UserError(f'{path}: {", ".join(pickles)} is a pickle, and reading a pickle runs any code that its author '
                       'put there; convert it to safetensors in a place you trust, or take a safetensors release')
    raise UserError(f'{path}: found no .safetensors file')
  if len(indexes) > 1 or not indexes and len(singles) > 1:
    names = [f.name for f in indexes or singles]
    raise UserError(f'{path}: several checkpoints in one folder ({", ".join(names)}); give the path of one file')
  if not indexes:
    return _read_file(singles[0])
  index = json.loads(indexes[0].read_text())['weight_map']
  tensors, problems = {}, []
  for name in sorted(set(index.values())):
    if not (path / name).exists():
      problems.append(f'{name} is not in the folder')
      continue
    shard = _read_file(path / name)
    # An index may also promise the second name of a tensor, which the shards hold under its first
    promised = {tensor for tensor, file in index.items() if file == name}
    problems += [f'{tensor} in {name} is not in the index, or is in it under another file'
                 for tensor in sorted(shard.keys() - promised)]
    tensors |= shard
  if problems:
    raise UserError(f'{indexes[0]} does not match its files; download the checkpoint again:\n  '
                     + '\n  '.join(problems))
  return tensors


def _read_file(path: pathlib.Path) -> dict[str, Tensor]:
  try:
    file = safetensors.safe_open(path, framework='np')
    return {name: Tensor(file, name) for name in file.keys()}
  except safetensors.SafetensorError as e:
    raise UserError(f'{path} ({path.stat().st_size} bytes) is truncated or is no safetensors file ({e}); '
                     'download it again') from e


def write(path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None):
  """Writes one .safetensors file, whole or not at all. `format: pt` is added because transformers asks for it."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(path.name + '.part')
  # Contiguous first: safetensors writes the memory of a transposed view in the wrong order without a word.
  tensors = {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in tensors.items()}
  safetensors.numpy.save_file(tensors, part, metadata={'format': 'pt'} | (metadata or {}))
  os.replace(part, path)


def load(make, tensors, rules, dims: dict[str, int], dtype=None, ignore: tuple[str, ...] = (), each=None):
  """The module that `make()` would build, filled from `tensors` (name -> anything with shape, dtype and slicing).

  `make` only runs abstractly. Leaves get the sharding that it gives them on the mesh in context, and `dtype` (for
  floating leaves) or the one it gives them. Each process reads the slices of its own devices, a layer at a time and
  BLOCK bytes of it after another: beside the devices, the host holds less than twice the largest torch tensor.
  `ignore`: regexes of torch names that are not wanted. `each(path, leaf)`: what takes a leaf's place, asked as soon as
  the leaf is filled. ValueError lists every missing, unused, misshapen or doubly used tensor; nothing is half filled.
  """
  abstract = jax.eval_shape(make)
  leaves, sources, problems = _plan(abstract, rules, dims)
  wanted = {source.name: path for path in sources for source in sources[path]}
  unused = [name for name in tensors if name not in wanted and not any(re.fullmatch(r, name) for r in ignore)]
  problems += [f'missing: {name}, for our {wanted[name]}' for name in sorted(wanted.keys() - set(tensors))]
  problems += [f'unused: {name} {tuple(tensors[name].shape)}, which no leaf of the model asks for' for name in unused]
  for path in sources:
    for source in sources[path]:
      if source.name in tensors:
        problems += source.complaints(tensors[source.name], path, leaves[path])
  _refuse(problems, 'the checkpoint does not fit the model')
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    raise UserError('convert.load needs to know the devices: call it under `with jax.set_mesh(mesh)`')

  def fill(path, leaf):
    spec = leaf.sharding.spec if leaf.sharding is not None else jax.P()
    kind = dtype if dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
    if sources[path][0].layer is None:
      return _array(sources[path][0], tensors, leaf.shape, kind, jax.NamedSharding(mesh, spec), {}).astype(kind)
    stacked = jnp.zeros(leaf.shape, kind, device=jax.NamedSharding(mesh, spec))
    layer, buffers = jax.NamedSharding(mesh, jax.P(*spec[1:])), {}
    for source in sources[path]:
      new = _array(source, tensors, leaf.shape[1:], kind, layer, buffers)
      stacked = jax.block_until_ready(_set_layer(stacked, new, source.layer))
    return stacked

  each = each or (lambda path, leaf: leaf)
  filled = [each(path, fill(path, leaf)) for path, leaf in leaves.items()]
  return jax.tree.unflatten(jax.tree.structure(abstract), filled)


def export(module, rules, dims: dict[str, int]) -> dict[str, np.ndarray]:
  """The inverse of `load`: torch's tensors by torch's names, in the dtype of our leaves."""
  leaves, sources, problems = _plan(module, rules, dims)
  _refuse(problems, 'the rules do not fit the model')
  tensors = {}
  for path, leaf in leaves.items():
    if not leaf.is_fully_addressable:
      leaf = jax.sharding.reshard(leaf, jax.P())
    whole = np.asarray(leaf)
    for source in sources[path]:
      source.export(whole if source.layer is None else whole[source.layer], tensors)
  return tensors


@jax.jit(donate_argnums=0)
def _set_layer(stacked, layer, i):
  return jax.lax.dynamic_update_index_in_dim(stacked, layer.astype(stacked.dtype), i, 0)


def _array(source, tensors, shape, dtype, sharding, buffers) -> jax.Array:
  """A leaf, or a layer of one. Replicas share one read, into `buffers`, which the next layer reads into again.

  It is of `dtype`, or of the file's own where that is narrower: the device widens it, so that the host need not.
  """
  tensor = tensors[source.name]
  dtype = min(np.dtype(dtype), np.dtype(tensor.dtype), key=lambda kind: kind.itemsize)

  def slab(index):
    index = tuple(slice(*i.indices(n)[:2]) for i, n in zip(index, shape))
    key = dtype, *((i.start, i.stop) for i in index)
    if key not in filled:
      filled[key] = buffers[key] if key in buffers else np.empty([i.stop - i.start for i in index], dtype)
      buffers[key] = filled[key]
      for block in source.blocks(index, dtype.itemsize):
        place = tuple(slice(b.start - i.start, b.stop - i.start) for b, i in zip(block, index))
        _rearrange(filled[key][(..., *place)], source.read(tensor, block))  # a view, of a scalar too
    return filled[key]

  filled = {}
  parts = [jax.device_put(slab(index), device, may_alias=False)
           for device, index in sharding.addressable_devices_indices_map(shape).items()]
  return jax.make_array_from_single_device_arrays(shape, sharding, parts, dtype=dtype)


def _rearrange(out: np.ndarray, x: np.ndarray):
  """out[...] = x, where neighbours in the memory of x are none in that of out: in squares, by all cores."""
  near = min(range(x.ndim), key=lambda i: x.strides[i], default=-1)  # the axis along which x lies in memory
  last = x.ndim - 1
  if near == last or x.size < SQUARE ** 2:
    out[...] = x
    return
  if out.dtype == x.dtype and x.dtype.itemsize == 2:  # numpy moves integers faster than bfloat16
    out, x = out.view(np.uint16), x.view(np.uint16)

  def columns(start):
    for row in range(0, x.shape[near], SQUARE):
      square = [slice(None)] * x.ndim
      square[near], square[last] = slice(row, row + SQUARE), slice(start, start + SQUARE)
      out[tuple(square)] = x[tuple(square)]

  with concurrent.futures.ThreadPoolExecutor() as pool:
    list(pool.map(columns, range(0, x.shape[last], SQUARE)))


def _refuse(problems: list[str], headline: str):
  if problems:
    raise UserError(f'{headline} ({len(problems)} problems):\n  ' + '\n  '.join(problems))


def _plan(module, rules, dims):
  """({path: leaf}, {path: its sources, layer by layer}, problems) of a module or its eval_shape."""
  leaves = {jax.tree_util.keystr(key, simple=True, separator='/').removesuffix('/value'): leaf
            for key, leaf in jax.tree_util.tree_leaves_with_path(module)}
  templates = [Template(*rule) for rule in rules]
  sources, problems, readers = {}, [], {}
  for path, leaf in leaves.items():
    matches = [(t, groups) for t in templates if (groups := t.match(path)) is not None]
    if len(matches) != 1:
      found = ' and '.join(t.name for t, _ in matches)
      problems.append(f'duplicate: {path} is filled by several rules: {found}' if found else
                      f'no rule: {path} {tuple(leaf.shape)} is a leaf of the model that no rule fills')
      continue
    template, groups = matches[0]
    try:
      sources[path] = template.sources(groups, leaf.shape, dims)
    except ValueError as e:
      problems.append(f'rule {template.name} -> {path} {tuple(leaf.shape)}: {e}')
      continue
    for source in sources[path]:
      readers.setdefault(source.name, []).append((path, source.layout))
  for name, users in readers.items():
    taken = sorted(i for _, layout in users for i in layout.taken())
    if taken != list(range(users[0][1].parts())):
      paths = ', '.join(path for path, _ in users)
      problems.append(f'parts: {name} must be used once and whole, but its rules use parts {taken} of '
                      f'{users[0][1].parts()} (for {paths})')
  return leaves, sources, problems


@dataclasses.dataclass
class Template:
  """One rule."""
  name: str
  path: str
  pattern: str
  part: dict = dataclasses.field(default_factory=dict)

  def match(self, path: str) -> dict[int, str] | None:
    """{group number: text} if this rule fills the leaf at `path`."""
    pieces = re.split(r'\\(\d)', self.path)
    regex = ''.join(rf'(?P<g{p}>\d+)' if i % 2 else re.escape(p) for i, p in enumerate(pieces))
    found = re.fullmatch(regex, path)
    return found and {int(g[1:]): text for g, text in found.groupdict().items()}

  def sources(self, groups: dict[int, str], shape, dims) -> list['Source']:
    """Where a leaf of that shape comes from: one source, or one for each layer."""
    literals = [text.replace(r'\.', '.') for text in self.name.split(r'(\d+)')]
    layer = set(range(1, len(literals))) - groups.keys()
    if len(layer) > 1 or any(re.search(r'[][\\(){}|*+?^$]', text) for text in literals):
      raise UserError(r'a torch name is plain text with \. and (\d+), and all groups but one must be in our path')

    def name(layer_text):
      texts = [groups.get(g, layer_text) for g in range(1, len(literals))]
      return literals[0] + ''.join(text + literal for text, literal in zip(texts, literals[1:]))

    if not layer:
      return [Source(name(''), None, Layout.of(self.pattern, self.part, shape, dims))]
    layout = Layout.of(self.pattern, self.part, shape[1:], dims)
    return [Source(name(str(i)), i, layout) for i in range(shape[0])]


@dataclasses.dataclass
class Layout:
  """How one torch tensor and one leaf (without its layer axis) share the same numbers.

  torch, ours: the letters of each axis. sizes: of every letter, in torch. span: where ours lies on a letter of torch.
  """
  torch: list[list[str]]
  ours: list[list[str]]
  sizes: dict[str, int]
  span: dict[str, tuple[int, int]]

  @classmethod
  def of(cls, pattern: str, part: dict, shape, dims: dict[str, int]) -> 'Layout':
    torch, ours = [[(fused or single).split() if (fused or single) != '1' else []
                    for fused, single in re.findall(r'\(([^)]*)\)|([^\s()]+)', side)] for side in pattern.split('->')]
    flat_torch, flat_ours = sum(torch, []), sum(ours, [])
    dropped = {letter for letter, where in part.items() if isinstance(where, int)}
    if sorted(flat_torch) != sorted(flat_ours + list(dropped)) or len(set(flat_torch)) != len(flat_torch):
      raise UserError(f'the two sides of {pattern!r} do not have the same letters (part {part})')
    if len(ours) != len(shape):
      raise UserError(f'{pattern!r} makes {len(ours)} axes')
    if len(part) > 1 or any(isinstance(w, slice) and w.step not in (None, 1) for w in part.values()):
      raise UserError(f'part {part} must be one letter and one place or one unbroken slice')
    sizes = {axis[0]: n for axis, n in zip(ours, shape) if len(axis) == 1 and axis[0] not in part}
    sizes |= {letter: dims[letter] for letter in flat_torch if letter not in sizes and letter in dims}
    span = {}
    for letter, where in part.items():
      if letter not in sizes:
        raise UserError(f'{pattern!r} needs the size of {letter} in dims, which has {dims}')
      start, stop, _ = (where if isinstance(where, slice) else slice(where, where + 1 or None)).indices(sizes[letter])
      span[letter] = (start, stop)
    for axis, n in zip(ours, shape):
      unknown = [letter for letter in axis if letter not in sizes]
      if len(unknown) > 1:
        raise UserError(f'{pattern!r} needs the size of one of {unknown} in dims, which has {dims}')
      known = math.prod(span[a][1] - span[a][0] if a in span else sizes[a] for a in axis if a in sizes)
      if unknown and known and n % known == 0:
        sizes[unknown[0]] = n // known
      elif unknown or known != n:
        raise UserError(f'an axis of {n} does not split as ({" ".join(axis)}) of {pattern!r} with {sizes} {part}')
    return cls(torch, ours, sizes, {a: span.get(a, (0, sizes[a])) for a in flat_torch})

  def parts(self) -> int:
    """Into how many pieces the torch tensor is divided among leaves (1: it is not)."""
    return math.prod(self.sizes[a] for a in self.divided())

  def taken(self) -> list[int]:
    """Which of those pieces are ours."""
    return list(range(*self.span[self.divided()[0]])) if self.divided() else [0]

  def divided(self) -> list[str]:
    return [a for a, (start, stop) in self.span.items() if stop - start != self.sizes[a]]

  def torch_shape(self) -> tuple[int, ...]:
    return tuple(math.prod(self.sizes[a] for a in axis) for axis in self.torch)

  def width(self, letter: str) -> int:
    return self.span[letter][1] - self.span[letter][0]

  def order(self) -> list[str]:
    """Our letters, then those that the part fixes to one place."""
    flat = sum(self.ours, [])
    return flat + [a for axis in self.torch for a in axis if a not in flat]


@dataclasses.dataclass
class Source:
  """The torch tensor behind one leaf, or behind one layer of a stacked leaf."""
  name: str
  layer: int | None
  layout: Layout

  def complaints(self, tensor, path: str, leaf) -> list[str]:
    """What is wrong with that tensor for this leaf."""
    wanted = self.layout.torch_shape()
    if tuple(tensor.shape) != wanted:
      return [f'misshapen: {self.name} is {tuple(tensor.shape)} in torch and must be {wanted} '
              f'for our {path} {tuple(leaf.shape)}']
    if jnp.issubdtype(tensor.dtype, jnp.floating) != jnp.issubdtype(leaf.dtype, jnp.floating):
      return [f'dtype: {self.name} is {tensor.dtype} in torch and {leaf.dtype} in our {path}: quantised weights '
              'must be written back to floating point first']
    return []

  def blocks(self, index: tuple[slice, ...], itemsize: int):
    """`index` of our leaf (or layer) in pieces of about BLOCK bytes, along the axis that torch's rows lie on."""
    if not index:
      return [index]
    rows = self.layout.torch[0][0] if self.layout.torch[0] else None
    axis = next((i for i, letters in enumerate(self.layout.ours) if letters[:1] == [rows]), 0)
    whole = index[axis]
    size = math.prod(i.stop - i.start for i in index) * itemsize
    length = max(1, (whole.stop - whole.start) * BLOCK // max(size, 1))
    return [(*index[:axis], slice(start, min(start + length, whole.stop)), *index[axis + 1:])
            for start in range(whole.start, whole.stop, length)]

  def read(self, tensor, index: tuple[slice, ...]) -> np.ndarray:
    """Our leaf (or layer) at `index`, from the smallest box of the torch tensor around it."""
    layout = self.layout
    need, inside = dict(layout.span), []  # of each letter, in torch; and of each of our axes, within what was read
    for axis, want in zip(layout.ours, index):
      if not axis:
        inside.append(want)
        continue
      inner = math.prod(layout.width(a) for a in axis[1:])
      start, stop = want.start // inner, -(-want.stop // inner)
      first = layout.span[axis[0]][0]
      need[axis[0]] = (first + start, first + stop)
      inside.append(slice(want.start - start * inner, want.stop - start * inner))
    box, pick, widths = [], [], []
    for axis in layout.torch:
      low, high, narrow = 0, 0, True  # once a letter spans more than one place, those after it are read whole
      for a in axis:
        start, stop = need[a] if narrow else (0, layout.sizes[a])
        low, high = low * layout.sizes[a] + start, high * layout.sizes[a] + stop - 1
        widths.append(stop - start)
        pick.append(slice(need[a][0] - start, need[a][1] - start))
        narrow = narrow and stop - start == 1
      box.append(slice(low, high + 1))
    x = np.asarray(tensor[tuple(box)]).reshape(widths)[tuple(pick)]
    flat = sum(layout.torch, [])
    x = x.transpose([flat.index(a) for a in layout.order()])
    sizes = dict(zip(layout.order(), x.shape))
    return x.reshape([math.prod(sizes[a] for a in axis) for axis in layout.ours])[tuple(inside)]

  def export(self, x: np.ndarray, tensors: dict[str, np.ndarray]):
    """Writes our leaf (or layer) into the torch tensor that it came from."""
    layout = self.layout
    flat = sum(layout.torch, [])
    x = x.reshape([layout.width(a) for a in layout.order()])
    x = x.transpose([layout.order().index(a) for a in flat])
    if not layout.divided():
      tensors[self.name] = x.reshape(layout.torch_shape())
      return
    whole = tensors.setdefault(self.name, np.empty(layout.torch_shape(), x.dtype))
    whole.reshape([layout.sizes[a] for a in flat])[tuple(slice(*layout.span[a]) for a in flat)] = x
