"""int8 weights for frozen encoders: symmetric, one scale for each output channel.

A quantised matrix is an `Int8` in the place of its Param. `layers.einsum` multiplies with it: the integers are exact in
bfloat16, so only the scale, which is applied to the product, is new. Embeddings, norms, biases and patch projections
stay as they are. With `activations`, what a matrix is multiplied with becomes int8 too (one scale for each token), and
the product runs in integers: faster where the device has them (TPU, recent GPUs), and less exact.

Why not qwix: at 0.1.8 its einsum gives `out_sharding` to the product before its axes are put in order, so under
explicit sharding the batch's axes land on another dimension, and its providers leave `out_sharding` out.
"""

import dataclasses
import functools

from flax import nnx
import jax
from jax import P
import jax.numpy as jnp

from unifusion_jax.errors import UserError

# The matrices by name: the axes that their products contract, then those of their output channels. A stacked matrix
# has a layer axis before them.
MATRICES = {'wq': ('d', 'hk'), 'wk': ('d', 'gk'), 'wv': ('d', 'gk'), 'wo': ('hk', 'd'),
            'gate': ('d', 'f'), 'up': ('d', 'f'), 'down': ('f', 'd'), 'w1': ('d', 'f'), 'w2': ('f', 'd'),
            'head': ('d', 'v')}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
  """A matrix as int8 times a scale; both may have a leading layer axis."""
  values: jax.Array  # int8, in the shape and sharding of the matrix
  scale: jax.Array   # f32, 1 on every contracted axis, whole on every device (conflicts with no product's sharding)
  activations: bool = dataclasses.field(default=False, metadata=dict(static=True))

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape

  def times(self, equation: str, x: jax.Array, out: P | None) -> jax.Array:
    """The einsum of x and this matrix, in x's dtype; arguments as `layers.einsum`."""
    letters, result = equation.split('->')
    of_x, of_w = letters.split(',')
    if any(n != 1 and letter not in result for n, letter in zip(self.scale.shape, of_w)):
      raise UserError(f'{equation} contracts an axis that this matrix {self.shape} has scales {self.scale.shape} for: '
                       'quantize.MATRICES has its axes wrong')
    scale = _aligned(self.scale, of_w, result)
    if not self.activations:
      y = jnp.einsum(equation, x, self.values.astype(x.dtype), out_sharding=out)
      return (y.astype(jnp.float32) * scale).astype(x.dtype)
    rounded, of_tokens = _rounded(x, tuple(i for i, letter in enumerate(of_x) if letter not in result))
    y = jnp.einsum(equation, rounded, self.values, preferred_element_type=jnp.int32, out_sharding=out)
    return (y.astype(jnp.float32) * _aligned(of_tokens, of_x, result) * scale).astype(x.dtype)


nnx.register_data_type(Int8)


def quantize(model, activations: bool = False):
  """The model with its matrices as `Int8`; ValueError when it has none of MATRICES.

  Matrix by matrix: called on a model that nothing else refers to, as in `quantize(internvl.load(folder))`, it frees
  each before it looks at the next. `load` never holds the whole model at all.
  """
  paths, tree = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_param)
  del model
  names = [jax.tree_util.keystr(path[-1:], simple=True) for path, _ in paths]
  leaves = [leaf for _, leaf in paths]
  del paths
  made = 0
  for i, name in enumerate(names):
    if name in MATRICES and _is_param(leaves[i]):
      leaves[i] = _int8(name, leaves[i][...], activations)
      made += 1
  if not made:
    raise UserError(f'nothing to quantise: this model has no {", ".join(MATRICES)} in floating point')
  return jax.tree.unflatten(tree, leaves)


def load(read, activations: bool = False):
  """`quantize(read(None))`, each matrix as soon as it is filled; `read(each)`: a load with `each` of `convert.load`."""
  def each(path, leaf):
    name = path.split('/')[-1]
    return _int8(name, leaf, activations) if name in MATRICES else leaf

  def bare(param):
    inside = jax.tree.leaves(param, is_leaf=_is_int8)
    return inside[0] if len(inside) == 1 and _is_int8(inside[0]) else param

  return jax.tree.map(bare, read(each), is_leaf=_is_param)


def size(model) -> int:
  """Bytes of a model, or of an `eval_shape` of one, over all devices."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))


def _is_param(leaf) -> bool:
  return isinstance(leaf, nnx.Param)


def _is_int8(leaf) -> bool:
  return isinstance(leaf, Int8)


def _int8(name: str, matrix: jax.Array, activations: bool) -> Int8:
  contracted, kept = (len(axes) for axes in MATRICES[name])
  return jax.block_until_ready(Int8(*_matrix(matrix, contracted, kept), activations))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _matrix(w: jax.Array, contracted: int, kept: int):
  """(int8, scale) of a matrix whose last axes are `contracted` + `kept`."""
  first = w.ndim - contracted - kept
  values, scale = _rounded(w, tuple(range(first, first + contracted)))
  return values, jax.sharding.reshard(scale, P())


def _rounded(x: jax.Array, axes: tuple[int, ...]):
  """(int8, f32 scale of size 1 on `axes`) whose product is x."""
  x = x.astype(jnp.float32)
  peak = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
  scale = jnp.where(peak > 0, peak / 127, 1.0)
  return jnp.round(x / scale).astype(jnp.int8), scale


def _aligned(scale: jax.Array, letters: str, result: str) -> jax.Array:
  """A scale with axes `letters` as it broadcasts over `result`."""
  scale = jnp.squeeze(scale, [i for i, letter in enumerate(letters) if letter not in result])
  kept = [letter for letter in letters if letter in result]
  scale = jnp.transpose(scale, sorted(range(len(kept)), key=lambda i: result.index(kept[i])))
  return jnp.expand_dims(scale, [i for i, letter in enumerate(result) if letter not in kept])
