"""Bytes of a program's arguments and weights: read, in one layer, on a host that loads them; and bytes in words."""

import math

from flax import nnx
import jax
from jax.extend import core

from unifusion_jax import sharding
from unifusion_jax.models.layers import contracted
from unifusion_jax.weights.quantize import Int8


def size(number: float) -> str:
  """Bytes in GiB, or in MiB or KiB where they are few."""
  for unit, scale in (('GiB', 2 ** 30), ('MiB', 2 ** 20)):
    if number >= scale / 10:
      return f'{number / scale:.2f} {unit}' if number < 100 * scale else f'{number / scale:.1f} {unit}'
  return f'{number / 2 ** 10:.1f} KiB'


def read(arguments: tuple, jaxpr: core.Jaxpr) -> tuple[int, int]:
  """(bytes on one device of the arguments that a program reads, of those that it does not); jaxpr: the program's own.

  The compiler is given the first alone: the DiT is no argument of encoding, nor the encoder of images of decoding.
  """
  leaves, reads = jax.tree.leaves(arguments), _reads(jaxpr)
  each = [sharding.shard_bytes(leaf) for leaf in leaves]
  known = sum(size for size, is_read in zip(each, reads, strict=True) if is_read)
  return known, sum(each) - known


def _reads(jaxpr: core.Jaxpr) -> list[bool]:
  """Whether each input of a program is read, or passed on, in it or in the functions that it calls."""
  seen = set(map(id, jaxpr.outvars))
  for eqn in jaxpr.eqns:
    inner = eqn.params['jaxpr'].jaxpr if eqn.primitive.name in ('jit', 'pjit') else None
    reads = _reads(inner) if inner else [True] * len(eqn.invars)
    seen.update(id(var) for var, is_read in zip(eqn.invars, reads) if is_read)
  return [id(var) in seen for var in jaxpr.invars]


def largest_layer(tree) -> int:
  """Parameters in the largest layer of all stacks of layers; 0 where there are none."""
  return max((size for module in jax.tree.leaves(tree, is_leaf=_is_module) if _is_module(module)
              for size in _layers(module)), default=0)


def _is_module(node) -> bool:
  return isinstance(node, nnx.Module)


def _is_param(node) -> bool:
  return isinstance(node, (nnx.Variable, Int8))


def _depth(param) -> int | None:
  """Layers in a matrix that is a stack of them; None for one that is none, and for what is no matrix."""
  if isinstance(param, Int8):  # with a scale for each layer, but of size 1 on the axes that are contracted
    return param.shape[0] if param.scale.shape[0] == param.shape[0] else None
  axes = contracted(param)
  return None if axes is None or param.ndim <= -min(axes) else jax.tree.leaves(param)[0].shape[0]


def _shape(param) -> tuple[int, ...]:
  return jax.tree.leaves(param)[0].shape  # of an Int8 that of its integers


def _layers(module: nnx.Module):
  """Parameters in a layer of each stack within a module."""
  params = jax.tree.leaves(module, is_leaf=_is_param)
  shapes = [_shape(param) for param in params]
  matrices = [param for param in params if isinstance(param, Int8) or contracted(param) is not None]
  if matrices and all(_depth(param) for param in matrices) and len({shape[:1] for shape in shapes}) == 1:
    yield sum(map(math.prod, shapes)) // shapes[0][0]
    return
  for child in jax.tree.leaves(vars(module), is_leaf=_is_module):
    if _is_module(child):
      yield from _layers(child)


def largest_tensor(tree: tuple) -> tuple[str, int]:
  """(name, bytes) of the largest tensor of several models, as checkpoints have it: one layer of a stacked leaf.

  What is int8 here is read in bfloat16.
  """
  sizes = {}
  for path, param in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_param):
    item = 2 if isinstance(param, Int8) else jax.tree.leaves(param)[0].dtype.itemsize
    name = jax.tree_util.keystr(path[1:], simple=True, separator='.')  # without its number in `tree`
    sizes[name] = math.prod(_shape(param)) * item // (_depth(param) or 1)
  return max(sizes.items(), key=lambda item: item[1])
