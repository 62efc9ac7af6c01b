"""Modules from public checkpoints and back, by one table of rules per model (`rules.py`) that is read both ways."""

import concurrent.futures
import json
import os
import pathlib
import re
import shutil
from typing import Iterator

from flax import nnx
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from unifusion_jax import sharding
from unifusion_jax.errors import UserError
from unifusion_jax.weights import rules as engine
from unifusion_jax.weights import safetensors_io

SQUARE = 128  # side of a block in a transposing copy: its rows and columns stay in cache
SHARD = 4 * 10 ** 9  # bytes of a file; larger checkpoints are split


def load(make, tensors, rules, axis_sizes: dict[str, int], dtype=None, ignore: tuple[str, ...] = (), on_leaf=None):
  """The module of `make()`, filled from a checkpoint and sharded over the mesh in context.

  `make` only runs abstractly, and leaves keep its shardings. Each process reads the slices of its own
  devices, a layer at a time and `rules.BLOCK` bytes of it after another: beside the devices, the host holds less than
  twice the largest torch tensor.

  Args:
    make: `make() -> module`, or any tree of arrays.
    tensors: torch name -> anything with shape, dtype and slicing.
    dtype: of floating leaves; None: the one that `make` gives them.
    ignore: regexes of torch names that are skipped.
    on_leaf: `on_leaf(param, path, layer) -> leaf` replaces a Param as soon as it is filled (`quantize.load`). A stacked
      one is replaced layer by layer; for others `layer` is None.

  Raises:
    UserError: lists every missing, unused, misshapen or doubly used tensor, before any leaf is filled; names the
      tensors that hold NaN or infinite numbers.
  """
  params, structure, leaves, sources = _checked(make, tensors, rules, axis_sizes, ignore)
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    raise UserError('convert.load needs to know the devices: call it under `with jax.set_mesh(mesh)`')

  def fill(path, param, leaf):
    spec = leaf.sharding.spec if leaf.sharding is not None else jax.P()
    kind = dtype if dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
    if not sources[path]:  # a stack of no layers
      return jax.tree.map(lambda x: jnp.zeros(x.shape, kind, device=jax.NamedSharding(mesh, spec)), param)
    alone = sources[path][0].layer is None
    shape, where = (leaf.shape, spec) if alone else (leaf.shape[1:], jax.P(*spec[1:]))
    stacked, buffers = None, {}
    for source in sources[path]:
      array = _array(source, tensors, shape, kind, jax.NamedSharding(mesh, where), buffers, infinite).astype(kind)
      new = on_leaf(jax.tree.unflatten(jax.tree.structure(param), [array]), path, source.layer)
      del array
      if alone:
        return new
      if stacked is None:
        stacked = jax.tree.map(lambda x: jnp.zeros((leaf.shape[0], *x.shape), x.dtype, device=jax.NamedSharding(
            mesh, jax.P((*spec, None)[0], *x.sharding.spec))), new)
      stacked = jax.block_until_ready(jax.tree.map(lambda x, y: _set_layer(x, y, source.layer), stacked, new))
    return stacked

  infinite = set()  # names of tensors
  on_leaf = on_leaf or (lambda param, path, layer: param)
  filled = [fill(path, param, leaves[path]) for path, param in params.items()]
  names = sorted({source.name for path in sources for source in sources[path]})
  _check_finite(names, infinite, tensors, dtype)
  return jax.tree.unflatten(structure, filled)


def shapes(make, tensors, rules, axis_sizes: dict[str, int], ignore: tuple[str, ...] = ()):
  """The module of `make()` in shapes alone, when a checkpoint fits it; UserError as of `load`, but for its numbers."""
  _checked(make, tensors, rules, axis_sizes, ignore)
  return jax.eval_shape(make)


def _checked(make, tensors, rules, axis_sizes, ignore):
  """(params by path, structure of the module, shapes by path, sources by path); reads the tensors' shapes alone."""
  params, structure = _flatten(jax.eval_shape(make))
  leaves = {path: _value(param) for path, param in params.items()}
  sources, problems = engine.sources(leaves, rules, axis_sizes)
  wanted = {source.name: path for path in sources for source in sources[path]}
  unused = [name for name in tensors if name not in wanted and not any(re.fullmatch(r, name) for r in ignore)]
  problems += [f'missing: {name}, for our {wanted[name]}' for name in sorted(wanted.keys() - set(tensors))]
  problems += [f'unused: {name} {tuple(tensors[name].shape)}, which no leaf of the model uses' for name in unused]
  for path in sources:
    for source in sources[path]:
      if source.name in tensors:
        problems += source.problems(tensors[source.name], path, leaves[path])
  if problems:
    raise UserError(_listed('the checkpoint does not fit the model', problems))
  return params, structure, leaves, sources


def export(module, rules, axis_sizes: dict[str, int]) -> Iterator[tuple[str, np.ndarray | None]]:
  """The inverse of `load`, one torch tensor at a time: (torch name, array in the dtype of our leaf).

  All processes go through it together, since a leaf may lie on devices of several; only the first one gets arrays.
  """
  leaves, tensors = _torch_tensors(module, rules, axis_sizes)
  for name, parts in tensors.items():
    yield name, _assembled(leaves, parts)


def save(module, rules, axis_sizes: dict[str, int], folder, config_json: dict, stem: str = 'model',
         shard: int = SHARD) -> None:
  """Writes config.json and the weights into `folder`: all processes call it together, the first one writes.

  Files are `stem`.safetensors, or several of `shard` bytes with an index. The host holds one of them at a time, the
  devices one whole layer of one leaf. The files come into the folder when all are written: a save that fails leaves it
  as it was, and one that is cut off in that last moment leaves a folder that `safetensors_io.read` refuses.
  """
  leaves, tensors = _torch_tensors(module, rules, axis_sizes)
  sizes = {name: int(np.prod(parts[0][1].layout.torch_shape())) * leaves[parts[0][0]].dtype.itemsize
           for name, parts in tensors.items()}
  files = safetensors_io.shards(sizes, stem, shard)
  folder = pathlib.Path(folder)
  existed, new = folder.exists(), folder / f'.{stem}.part'
  writes = sharding.is_main_process()
  try:
    for file, names in files.items():
      arrays = {name: _assembled(leaves, tensors[name]) for name in names}
      with sharding.together(f'write {new / file}'):
        if writes:
          safetensors_io.write(new / file, arrays)
      del arrays
    with sharding.together(f'write {folder}'):  # the others may read the folder next
      if writes:
        index = f'{stem}.safetensors.index.json'
        if len(files) > 1:
          (new / index).write_text(safetensors_io.index(files, sum(sizes.values())))
        (new / 'config.json').write_text(json.dumps(config_json, indent=2) + '\n')
        for pattern in (index, f'{stem}.safetensors', f'{stem}-*-of-*.safetensors'):
          for stale in folder.glob(pattern):
            stale.unlink()
        for path in sorted(new.iterdir(), key=lambda path: path.suffix == '.json'):  # the index comes last
          os.replace(path, folder / path.name)
  finally:
    if writes:
      shutil.rmtree(new, ignore_errors=True)
      if not existed and folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def _flatten(module):
  """({path: Param, or array where there is none}, structure)."""
  paths, structure = jax.tree.flatten_with_path(module, is_leaf=lambda x: isinstance(x, nnx.Variable))
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in paths}, structure


def _value(param):
  return jax.tree.leaves(param)[0]


def _listed(headline: str, problems: list[str]) -> str:
  return f'{headline} ({len(problems)} problems):\n  ' + '\n  '.join(problems)


def _torch_tensors(module, rules, axis_sizes):
  """({path: leaf}, {torch name: [(path, source), ...] that make it up})."""
  leaves = {path: _value(param) for path, param in _flatten(module)[0].items()}
  sources, problems = engine.sources(leaves, rules, axis_sizes)
  if problems:
    raise ValueError(_listed('the rules do not fit the model', problems))
  tensors = {}
  for path in sources:
    for source in sources[path]:
      tensors.setdefault(source.name, []).append((path, source))
  return leaves, tensors


def _assembled(leaves, parts) -> np.ndarray | None:
  """A torch tensor on the first process, None on the others."""
  tensor = None
  for path, source in parts:
    # Copied unless it is a layer: a jax.Array keeps its numpy value in host memory for as long as it lives
    x = jnp.copy(leaves[path]) if source.layer is None else _layer(leaves[path], source.layer)
    if not x.is_fully_addressable:
      x = jax.sharding.reshard(x, jax.P())
    if sharding.is_main_process():
      tensor = np.empty(source.layout.torch_shape(), x.dtype) if tensor is None else tensor
      _rearrange(source.place(tensor), source.to_torch(np.asarray(x)))
  return tensor


@jax.jit(donate_argnums=0)
def _set_layer(stacked, layer, i):
  return jax.lax.dynamic_update_index_in_dim(stacked, layer.astype(stacked.dtype), i, 0)


@jax.jit
def _layer(stacked, i):
  return jax.lax.dynamic_index_in_dim(stacked, i, 0, keepdims=False)


def _check_finite(names: list[str], infinite: set[str], tensors, dtype) -> None:
  """UserError if any process met NaN or infinite numbers in its slices of the tensors `names`."""
  flags = np.array([name in infinite for name in names])
  if jax.process_count() > 1:
    flags = multihost_utils.process_allgather(flags).any(0)
  found = [name for name, flag in zip(names, flags) if flag]
  if found:
    place = getattr(tensors[found[0]], 'path', 'the checkpoint')
    kind = jnp.dtype(dtype).name if dtype else 'their dtype'
    raise UserError(f'{place}: {", ".join(found[:3])}{f" and {len(found) - 3} more" * (len(found) > 3)} hold NaN, '
                    f'infinite numbers, or numbers too large for {kind}: download it again, or take another checkpoint')


def _is_finite(x: np.ndarray) -> bool:
  if x.dtype.itemsize != 2 or x.dtype.kind in 'iub':
    return bool(np.isfinite(x).all())
  # The bits without the sign, because numpy is faster with integers than with half precision
  return bool(np.max(x.view(np.uint16) & 0x7fff, initial=0) < np.array(np.inf, x.dtype).view(np.uint16))


def _array(source, tensors, shape, dtype, sharding, buffers, infinite: set[str]) -> jax.Array:
  """A leaf, or a layer of one. Replicas share one read, into `buffers`, which the next layer reuses.

  Its dtype is `dtype`, or the file's own where that is narrower: the device widens it, not the host. A tensor with NaN
  or infinite numbers among them is put into `infinite`.
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
        part = filled[key][(..., *place)]  # a view, of a scalar too
        _rearrange(part, source.read(tensor, block))
        if not _is_finite(part):
          infinite.add(source.name)
    return filled[key]

  filled = {}
  parts = [jax.device_put(slab(index), device, may_alias=False)
           for device, index in sharding.addressable_devices_indices_map(shape).items()]
  return jax.make_array_from_single_device_arrays(shape, sharding, parts, dtype=dtype)


@np.errstate(over='ignore')  # `_is_finite` finds what is too large for the dtype of `out`
def _rearrange(out: np.ndarray, x: np.ndarray):
  """out[...] = x for a transposed x: a cache-blocked copy on all cores."""
  near = min(range(x.ndim), key=lambda i: x.strides[i], default=-1)  # the axis along which x lies in memory
  last = x.ndim - 1
  if near == last or x.size < SQUARE ** 2:
    out[...] = x
    return
  if out.dtype == x.dtype and x.dtype.itemsize == 2:  # numpy moves integers faster than bfloat16
    out, x = out.view(np.uint16), x.view(np.uint16)

  @np.errstate(over='ignore')  # of each thread
  def columns(start):
    for row in range(0, x.shape[near], SQUARE):
      square = [slice(None)] * x.ndim
      square[near], square[last] = slice(row, row + SQUARE), slice(start, start + SQUARE)
      out[tuple(square)] = x[tuple(square)]

  with concurrent.futures.ThreadPoolExecutor() as pool:
    list(pool.map(columns, range(0, x.shape[last], SQUARE)))
