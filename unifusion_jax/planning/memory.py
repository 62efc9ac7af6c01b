"""Bytes of a program's weights: in one layer, on a host that loads them; and bytes in words."""

import math

from flax import nnx
import jax

from unifusion_jax.models.layers import contracted


def size(number: float) -> str:
  """Bytes in GiB, or in MiB or KiB where they are few."""
  for unit, scale in (('GiB', 2 ** 30), ('MiB', 2 ** 20)):
    if number >= scale / 10:
      return f'{number / scale:.2f} {unit}' if number < 100 * scale else f'{number / scale:.1f} {unit}'
  return f'{number / 2 ** 10:.1f} KiB'


def largest_layer(tree) -> int:
  """Parameters in the largest layer of all stacks of layers; 0 where there are none."""
  return max((size for module in jax.tree.leaves(tree, is_leaf=_is_module) if _is_module(module)
              for size in _layers(module)), default=0)


def _is_module(node) -> bool:
  return isinstance(node, nnx.Module)


def _layers(module: nnx.Module):
  """Parameters in a layer of each stack within a module."""
  params = jax.tree.leaves(module, is_leaf=lambda node: isinstance(node, nnx.Variable))
  matrices = [param for param in params if contracted(param) is not None]
  shapes = [jax.tree.leaves(param)[0].shape for param in params]
  if matrices and all(param.ndim > -min(contracted(param)) for param in matrices) and len(
      {shape[:1] for shape in shapes}) == 1:
    yield sum(map(math.prod, shapes)) // shapes[0][0]
    return
  for child in jax.tree.leaves(vars(module), is_leaf=_is_module):
    if _is_module(child):
      yield from _layers(child)


def largest_tensor(tree: tuple) -> tuple[str, int]:
  """(name, bytes) of the largest tensor of several models, as checkpoints have it: one layer of a stacked leaf."""
  sizes = {}
  for path, param in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, nnx.Variable)):
    leaf, axes = jax.tree.leaves(param)[0], contracted(param)
    layers = leaf.shape[0] if axes is not None and leaf.ndim > -min(axes) else 1
    name = jax.tree_util.keystr(path[1:], simple=True, separator='.')  # without its number in `tree`
    sizes[name] = math.prod(leaf.shape) * leaf.dtype.itemsize // layers
  return max(sizes.items(), key=lambda item: item[1])
