"""int8 weights for frozen models: symmetric, one scale for each output channel, with outliers spread out first.

An `Int8` takes the place of a matrix's Param, and `layers.einsum` multiplies with it: the integers are exact in
bfloat16, and the scale is applied to the product. Trained models have input channels of 30 times the size of the
others, which leave the others (of a token) and their rows (of a matrix) a few levels of the 255. So a matrix is first
divided by the size of its rows, and its input multiplied by it (SmoothQuant, arXiv 2211.10438, but by the weights
alone), then both are rotated by a Hadamard matrix in blocks of channels, which leaves the product as it is (QuaRot,
arXiv 2404.00456).

The matrices are the Params whose `layers.weight` names contracted dims and not `int8=False`: attention, MLPs,
projectors, heads. Embeddings, norms, biases, convolutions and the input layers of pixels, latents and times stay as
they are. With `activations`, the input of a matrix is rounded to int8 too (one scale for each token), and the product
runs in integers: faster where the device has them (TPU, recent GPUs), and less exact.

Why not qwix: at 0.1.8 its einsum gives `out_sharding` to the product before its axes are put in order, so under
explicit sharding the batch's axes land on another dimension, and its providers leave `out_sharding` out.
"""

import dataclasses
import functools
import math

from flax import nnx
import jax
from jax import P
import jax.numpy as jnp
import scipy.linalg

from unifusion_jax.errors import UserError
from unifusion_jax.models.layers import contracted
from unifusion_jax.sharding import BATCH, WEIGHTS

BLOCK = 128  # channels that are rotated together, or the largest power of two that divides their number
SMALLEST = -8  # log2 of the least size of a row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
  """A matrix as int8 times a scale, rotated, times the size of its rows; all may have a leading layer axis."""
  values: jax.Array  # int8, in the shape and sharding of the matrix
  scale: jax.Array   # f32, of size 1 on every contracted axis, replicated (conflicts with no product's sharding)
  rows: jax.Array    # f32 powers of two, of size 1 on every other axis, replicated
  axis: int = dataclasses.field(metadata=dict(static=True))  # the rotated one, a negative number
  activations: bool = dataclasses.field(default=False, metadata=dict(static=True))

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape

  def dense(self) -> jax.Array:
    """The matrix that this one stands for, f32."""
    return _rotated(self.values * self.scale, self.axis) * self.rows

  def times(self, equation: str, x: jax.Array, out: P | None) -> jax.Array:
    """The einsum of x and this matrix, in x's dtype; arguments as `layers.einsum`."""
    operands, result = equation.split('->')
    x_axes, w_axes = operands.split(',')
    if any(n != 1 and letter not in result for n, letter in zip(self.scale.shape, w_axes)):
      raise ValueError(f'{equation} contracts an axis that this matrix {self.shape} has scales {self.scale.shape} for: '
                       'its `weight` names other dims as contracted')
    scale = _aligned(self.scale, w_axes, result)
    # Gathered over the axes of the batch as int8: left to the compiler, it is cast first and travels at twice the bytes
    values = jax.sharding.reshard(self.values, P(*(None if axis in (*BATCH, WEIGHTS) else axis
                                                   for axis in jax.typeof(self.values).sharding.spec)))
    rotated = _rotated(x * _aligned(self.rows, w_axes, x_axes).astype(x.dtype), x_axes.index(w_axes[self.axis]))
    if not self.activations:
      y = jnp.einsum(equation, rotated.astype(x.dtype), values.astype(x.dtype), out_sharding=out)
      return (y.astype(jnp.float32) * scale).astype(x.dtype)
    rounded, x_scale = _rounded(rotated, tuple(i for i, letter in enumerate(x_axes) if letter not in result))
    y = jnp.einsum(equation, rounded, values, preferred_element_type=jnp.int32, out_sharding=out)
    return (y.astype(jnp.float32) * _aligned(x_scale, x_axes, result) * scale).astype(x.dtype)


nnx.register_data_type(Int8)


def quantize(model, activations: bool = False):
  """The model with its matrices as `Int8`; UserError when it has none in floating point.

  It works matrix by matrix and frees each one before the next, if nothing else refers to the model, as in
  `quantize(internvl.load(folder))`. `load` never holds the whole model at all.
  """
  leaves, structure = jax.tree.flatten(model, is_leaf=_is_param)
  del model
  if not any(map(_is_matrix, leaves)):
    raise UserError('nothing to quantise: this model has no matrix in floating point')
  for i in range(len(leaves)):
    leaves[i] = _quantized(leaves[i], activations)
  return jax.tree.unflatten(structure, leaves)


def load(read, quantized: str):
  """A model with each matrix quantised as soon as it is read, each layer of a stacked one.

  read: `read(on_leaf=None)` loads it, as `convert.load` does.
  quantized: '' for none, 'int8' for int8 weights, 'w8a8' for int8 activations as well.
  """
  return read(lambda param, path, layer: _quantized(param, quantized == 'w8a8')) if quantized else read()


def size(model) -> int:
  """Bytes of a model, or of an `eval_shape` of one, over all devices."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))


def _is_param(leaf) -> bool:
  return isinstance(leaf, nnx.Param)


def _is_matrix(leaf) -> bool:
  return contracted(leaf) is not None and leaf.get_metadata()['int8']


def _quantized(leaf, activations: bool):
  """The Int8 of a matrix; any other leaf unchanged."""
  if not _is_matrix(leaf):
    return leaf
  axes = contracted(leaf)
  return jax.block_until_ready(Int8(*_matrix(leaf[...], axes), max(axes), activations))


@functools.partial(jax.jit, static_argnums=1)
def _matrix(w: jax.Array, axes: tuple[int, ...]):
  """(int8, scale, rows) of a matrix, contracted over `axes`."""
  if w.ndim > -min(axes):  # layer by layer: a rotation may gather the axis
    return jax.lax.map(lambda layer: _matrix(layer, axes), w)
  spec, w = jax.typeof(w).sharding.spec, w.astype(jnp.float32)
  peak = jnp.max(jnp.abs(w), axis=axes, keepdims=True)
  rows = jnp.max(jnp.abs(w) / jnp.where(peak > 0, peak, 1.0), axis=tuple(range(max(axes) + 1, 0)), keepdims=True)
  exponent = jnp.clip(jnp.round(jnp.log2(rows)), SMALLEST, 0).astype(jnp.int32)
  rows = jax.sharding.reshard(jnp.ldexp(jnp.ones_like(rows), exponent), P())  # powers of two, exact in every dtype
  values, scale = _rounded(_rotated(w / rows, max(axes)), axes)
  return jax.sharding.reshard(values, spec), jax.sharding.reshard(scale, P()), rows


def _rotated(x: jax.Array, axis: int) -> jax.Array:
  """x times a Hadamard matrix on each block of channels of an axis, f32; twice makes x again."""
  size = math.gcd(x.shape[axis], BLOCK)
  x = jnp.moveaxis(x, axis, -1)
  spec = tuple(jax.typeof(x).sharding.spec)
  spec += (None,) * (x.ndim - len(spec))
  mesh = jax.sharding.get_abstract_mesh()
  names = spec[-1] if isinstance(spec[-1], tuple) else (spec[-1],) if spec[-1] else ()
  split = x.shape[-1] // size % math.prod(mesh.shape[name] for name in names) != 0
  within = P(*spec[:-1], None if split else spec[-1])  # no block may lie on two devices
  blocks = jnp.reshape(jax.sharding.reshard(x, within), (*x.shape[:-1], -1, size), out_sharding=P(*within, None))
  y = jnp.einsum('...i,ij->...j', blocks, scipy.linalg.hadamard(size).astype(x.dtype),
                 precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32) * size ** -0.5
  y = jax.sharding.reshard(jnp.reshape(y, x.shape, out_sharding=within), P(*spec))
  return jnp.moveaxis(y, -1, axis)


def _rounded(x: jax.Array, axes: tuple[int, ...]):
  """x as (int8 values, f32 scale of size 1 on `axes`)."""
  x = x.astype(jnp.float32)
  peak = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
  scale = jnp.where(peak > 0, peak / 127, 1.0)
  return jnp.round(x / scale).astype(jnp.int8), scale


def _aligned(scale: jax.Array, letters: str, result: str) -> jax.Array:
  """A scale with axes `letters`, in the shape that broadcasts over `result`."""
  scale = jnp.squeeze(scale, [i for i, letter in enumerate(letters) if letter not in result])
  shared = [letter for letter in letters if letter in result]
  scale = jnp.transpose(scale, sorted(range(len(shared)), key=lambda i: result.index(shared[i])))
  return jnp.expand_dims(scale, [i for i, letter in enumerate(result) if letter not in shared])
