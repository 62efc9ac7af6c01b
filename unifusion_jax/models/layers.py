"""Layers shared by all models.

Axis letters, used in every einsum and docstring of the project:
  b batch   s tokens   q query tokens   l tapped VLM layers   e VLM width   d DiT (or any model) width
  h query heads   g key/value heads   k head dim   f MLP hidden   v vocabulary   c latent channels   p patch vector
  y x spatial   r tiles   m modulation slots   n diffusion steps

Modules hold Params only and are plain pytrees. A parameter's sharding is an argument of `weight`, beside its shape.
"""

import functools
import math

from absl import logging
from flax import nnx
import jax
from jax import P
import jax.numpy as jnp
import numpy as np

from unifusion_jax.errors import UserError
from unifusion_jax.models.attention import attention
from unifusion_jax.sharding import BATCH, is_main_process, WEIGHTS

RESIDUAL = P(BATCH)  # activations [b ...]: batch sharded, the rest whole
UNROLL: bool | None = None  # whether all layers are unrolled; None: as each `scan` says and the devices are


def weight(rngs: nnx.Rngs, shape, spec, contract: int | None, dtype=jnp.float32, std: float | None = None,
           int8: bool = True) -> nnx.Param:
  """A Param from N(0, std^2), sharded as `spec` (one mesh axis, or None, for each dim of `shape`).

  Args:
    contract: number of leading dims that `einsum` sums over; None for tables, vectors and convolution kernels, which
      no `einsum` takes. Muon, int8 and adapters go by this.
    std: None: (product of the contracted sizes) ** -0.5, which keeps the scale of the input.
    int8: False for the few matrices that are never rounded: those applied to pixels, latents and times.
  """
  if contract is None and std is None or contract is not None and not 0 < contract < len(shape):
    raise ValueError(f'a weight {shape} cannot contract {contract} of its dims: name from 1 to {len(shape) - 1} of '
                     'them, or None and a std')
  std = math.prod(shape[:contract]) ** -0.5 if std is None else std
  value = nnx.initializers.normal(std)(rngs.params(), shape, dtype, out_sharding=P(*spec))
  # Counted from the end, an axis is the same in one layer and in a stack of them
  axes = contract and tuple(range(-len(shape), contract - len(shape)))
  return nnx.Param(value, contract=axes, int8=axes is not None and int8)


def contracted(param) -> tuple[int, ...] | None:
  """Contracted axes of a Param as negative numbers, before the axes of the output; None: it is no matrix."""
  return param.get_metadata().get('contract') if isinstance(param, nnx.Param) else None


def cast(module, dtype):
  """A module with its floating-point parameters in another dtype, for mixed-precision training."""
  return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, module)


def constant(value: float, shape, spec=(), dtype=jnp.float32) -> nnx.Param:
  """A vector or bias, initialised to one value."""
  return nnx.Param(jnp.full(shape, value, dtype, out_sharding=P(*spec)))


def heads_axis(heads: int, kv_heads: int) -> str | None:
  """The mesh axis of attention heads: tp if it divides both counts, else None (each tp device then computes all)."""
  tp = jax.sharding.get_abstract_mesh().shape['tp']
  if heads % tp or kv_heads % tp:
    _warn_of_repeated_heads(heads, kv_heads, tp)
    return None
  return 'tp'


def rows_axes(width: int) -> tuple[str, ...] | str | None:
  """The mesh axes of a weight that tp does not split otherwise, over its dim of `width`: the most that divide it."""
  mesh = jax.sharding.get_abstract_mesh().shape
  sizes = {WEIGHTS: mesh['fsdp'] * mesh['tp'], 'fsdp': mesh['fsdp'], 'tp': mesh['tp']}
  axes = max((axes for axes, size in sizes.items() if width % size == 0), key=sizes.get, default=None)
  if axes is None or sizes[axes] == 1 < sizes[WEIGHTS]:
    _warn_of_whole_weights(width, sizes[WEIGHTS])
    return None
  return axes


@functools.cache
def _warn_of_whole_weights(width: int, devices: int) -> None:
  if is_main_process():
    logging.warning('neither mesh.fsdp nor mesh.tp divides a width of %d: each of the %d devices holds all weights of '
                    'that width', width, devices)


@functools.cache  # one warning for each combination
def _warn_of_repeated_heads(heads: int, kv_heads: int, tp: int) -> None:
  if is_main_process():
    divides = max(n for n in range(1, tp + 1) if tp % n == heads % n == kv_heads % n == 0)
    logging.warning('mesh.tp=%d does not divide %d heads over %d key/value heads: that attention is computed whole on '
                    'each of the %d devices; mesh.tp=%d divides them', tp, heads, kv_heads, tp, divides)


def rows_of(x: jax.Array) -> P:
  """The sharding of activations [b ...] by their rows alone, as x has them."""
  return P(jax.typeof(x).sharding.spec[0])


def stream(x: jax.Array) -> P:
  """The sharding of activations x [b s d] between blocks: by rows, and where tp divides the sequence over tp too.

  So norms, sums and what remat keeps are a tp-th on each device; `whole` comes before a product that tp splits, and
  `einsum(..., stream(x))` after it.
  """
  tp = jax.sharding.get_abstract_mesh().shape.get('tp', 1)
  return P(BATCH, 'tp') if tp > 1 and x.shape[1] % tp == 0 and rows_of(x) == RESIDUAL else rows_of(x)


def split(x: jax.Array) -> jax.Array:
  """Activations [b s d] as they lie between blocks."""
  return jax.sharding.reshard(x, stream(x))


def whole(x: jax.Array) -> jax.Array:
  """Activations [b s d] with every sequence whole."""
  return jax.sharding.reshard(x, rows_of(x))


def einsum(equation: str, x: jax.Array, w, out: P | None = None) -> jax.Array:
  """x times a parameter, in x's dtype. `out` is the sharding of the result, needed where it is ambiguous.

  A weight that is no plain array (`quantize.Int8`) answers `times(equation, x, out)` itself.
  """
  return w.times(equation, x, out) if hasattr(w, 'times') else _product(equation, out, w.dtype, x, w[...])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(equation, out, dtype, x, w):
  return _product_forward(equation, out, dtype, x, w)[0]


def _product_forward(equation, out, dtype, x, w):
  del dtype
  w = w.astype(x.dtype)  # saved like this, so that with remat one gather over fsdp serves both products of the backward
  return jnp.einsum(equation, x, w, out_sharding=out), (x, w)


def _product_backward(equation, out, dtype, saved, gradient):
  # As autodiff would, but with x first in the product for w. Autodiff puts the gradient first, and XLA for CPU then
  # transposes it together with all the elementwise work before it, which takes longer than the product itself.
  # The gradient of w is f32 whatever the compute dtype: it is a sum over all tokens and devices, and bfloat16 keeps
  # only 8 bits of each partial sum. The price: its reduction over fsdp moves twice the bytes.
  x, w = saved
  if out is not None and len(out) > 1:  # over the sequence, by `stream`: tp splits other axes of these products
    gradient = whole(gradient)
  operands, result = equation.split('->')
  x_axes, w_axes = operands.split(',')
  spec = lambda array: jax.typeof(array).sharding.spec
  return (jnp.einsum(f'{result},{w_axes}->{x_axes}', gradient, w, out_sharding=spec(x)),
          jnp.einsum(f'{x_axes},{result}->{w_axes}', x, gradient, out_sharding=spec(w),
                     preferred_element_type=jnp.float32).astype(dtype))


_product.defvjp(_product_forward, _product_backward)


def einsum_in_place(equation: str, x: jax.Array, w) -> jax.Array:
  """`einsum` of vectors x [b d], one for each example, with a matrix that stays where it is.

  Each device multiplies all examples of its fsdp group by its rows of the matrix. So vectors and results travel, which
  are thousands of times smaller than the matrix, and its gradient needs no sum over the group. A weight that is no
  plain array is gathered as ever.
  """
  if hasattr(w, 'times'):
    return einsum(equation, x, w, RESIDUAL)
  operands, result = equation.split('->')
  x_axes, w_axes = operands.split(',')
  spec = dict(zip(w_axes, jax.typeof(w[...]).sharding.spec))
  x = jax.sharding.reshard(x, P('data', spec[x_axes[1]]))
  return jax.sharding.reshard(einsum(equation, x, w, P('data', *(spec[axis] for axis in result[1:]))), RESIDUAL)


def stack(cls, depth: int, *args, rngs: nnx.Rngs):
  """`depth` modules of one class as one module; each leaf has a leading layer axis."""
  return jax.vmap(lambda key: cls(*args, rngs=nnx.Rngs(key)))(jax.random.split(rngs.params(), depth))


def scan(block, x, layers, *, remat: bool = False, unroll: bool = False):
  """Runs `block(x, layer) -> (x, y)` over stacked layers; returns (x, stacked y).

  `unroll`: on a CPU, put the layers into the program one after another. That pays where their weights are trained: the
  DiT's gradient takes a tenth less. Frozen layers are scanned: unrolled, a decode step copies every layer's weights
  and takes half as long again, and prompts gain nothing. Elsewhere than on a CPU all are scanned, which compiles many
  times faster and runs as fast (benchmarks/README.md).
  """
  device = jax.sharding.get_abstract_mesh().abstract_device  # None for a mesh of absent devices
  unroll = unroll and device is not None and device.platform == 'cpu' if UNROLL is None else UNROLL
  return jax.lax.scan(jax.checkpoint(block) if remat else block, x, layers, unroll=unroll)


def scan_taps(block, x, layers, taps: tuple[int, ...] = (), depth: int | None = None, *, carry=None, after=None,
              keep: jax.Array | None = None, remat: bool = False, unroll: bool = False):
  """Runs the first `depth` stacked layers (None: all) -> (x [b s d], x after `taps` layers [b s l d] or None, carry).

  Between layers x lies as `split` has it.

  Args:
    block: `block(x, layer, index, carry) -> (x, carry)`; `carry` is any other state that goes from layer to layer.
    taps: increasing numbers of layers in 0 .. depth; 0 is the input x. Untapped states are not kept.
    after: `after(x, index) -> x`, applied to the output of a layer after it is tapped.
    keep: [b q], the tokens whose tapped states are kept: [b q l d], the others' never exist. None: all.
    remat, unroll: as in `scan`.
  """
  total = len(jax.tree.leaves(layers)[0])
  depth = total if depth is None else depth
  if not 0 <= depth <= total or list(taps) != sorted(set(taps) & set(range(depth + 1))):
    raise UserError(f'taps {taps} within the first {depth} layers: taps must increase and lie in 0 .. {depth}, and '
                    f'this model has {total} layers')
  # Every layer writes into the slot of the next tap, so the tapped layer writes there last; layers after the last tap
  # share one more slot, dropped at the end.
  slots = np.searchsorted(taps, np.arange(1, depth + 1))

  def kept(x):
    return x if keep is None else jnp.take_along_axis(whole(x), keep[:, :, None], axis=1)

  x, tapped = split(x), None
  if taps:
    first = kept(x)
    tapped = jnp.broadcast_to(first[:, :, None], (*first.shape[:2], max([len(taps), *(slots + 1)]), x.shape[2]))

  def step(state, inputs):
    x, tapped, carry = state
    index, slot, layer = inputs
    if layer is None:
      layer = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), layers)
    x, carry = block(x, layer, index, carry)
    if taps:
      tapped = jax.lax.dynamic_update_index_in_dim(tapped, kept(x), slot, 2)
    return (x if after is None else after(x, index), tapped, carry), None

  # A scan over part of the stack would copy that part first; indexing the whole copies one layer at a time. For
  # gradients it is the other way round, and training runs every layer.
  inputs = jnp.arange(depth), jnp.asarray(slots, jnp.int32), layers if depth == total else None
  (x, tapped, carry), _ = scan(step, (x, tapped, carry), inputs, remat=remat, unroll=unroll)
  return whole(x), whole(tapped[:, :, :len(taps)]) if taps else None, carry


def rms_norm(x: jax.Array, scale=None, eps: float = 1e-6, offset: float = 0.0) -> jax.Array:
  """x / rms(x) * (offset + scale) over the last axis; statistics and scale in f32, result in x's dtype."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  if scale is not None:
    y = y * (offset + scale[...].astype(jnp.float32))
  return y.astype(x.dtype)


def layer_norm(x: jax.Array, scale, bias, eps: float = 1e-6) -> jax.Array:
  """(x - mean) / std * scale + bias over the last axis, in f32; result in x's dtype."""
  y = x.astype(jnp.float32)
  y = y - jnp.mean(y, axis=-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  return (y * scale[...].astype(jnp.float32) + bias[...].astype(jnp.float32)).astype(x.dtype)


def normalise(pixels: jax.Array, mean, std) -> jax.Array:
  """uint8 pixels -> (pixels / 255 - mean) / std in f32, over the last axis; floats are normalised already and stay."""
  if pixels.dtype != jnp.uint8:
    return pixels
  return (pixels.astype(jnp.float32) / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def rope_angles(positions: jax.Array, dim: int, theta: float) -> jax.Array:
  """Rotation angles [... dim/2] in f32 for integer or real positions [...]."""
  frequencies = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
  return positions.astype(jnp.float32)[..., None] * frequencies


def rope(x: jax.Array, angles: jax.Array) -> jax.Array:
  """Rotates the pairs (i, i + k/2) of x [b s h k] by angles [b s k/2] (or [s k/2]) in f32, as in Llama."""
  cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
  y = x.astype(jnp.float32)
  a, b = jnp.split(y, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


class SwiGLU(nnx.Module):
  """down(silu(gate x) * up x)."""

  def __init__(self, width: int, hidden: int, dtype=jnp.float32, *, rngs: nnx.Rngs):
    self.gate = weight(rngs, (width, hidden), ('fsdp', 'tp'), contract=1, dtype=dtype)
    self.up = weight(rngs, (width, hidden), ('fsdp', 'tp'), contract=1, dtype=dtype)
    self.down = weight(rngs, (hidden, width), ('tp', 'fsdp'), contract=1, dtype=dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    """[b s d] -> [b s d] as `stream` has it."""
    y = whole(x)
    hidden = jax.nn.silu(einsum('bsd,df->bsf', y, self.gate)) * einsum('bsd,df->bsf', y, self.up)
    return einsum('bsf,fd->bsd', hidden, self.down, stream(x))


class GatedAttention(nnx.Module):
  """Grouped-query attention with QK-norm and a sigmoid gate on its output, without biases (Krea 2).

  The two norms are zero-centred: they multiply by 1 + scale.
  """

  def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int, eps: float, *, rngs: nnx.Rngs):
    self.eps = eps
    self.wq = weight(rngs, (width, heads, head_dim), ('fsdp', 'tp', None), contract=1)
    self.wk = weight(rngs, (width, kv_heads, head_dim), ('fsdp', 'tp', None), contract=1)
    self.wv = weight(rngs, (width, kv_heads, head_dim), ('fsdp', 'tp', None), contract=1)
    self.gate = weight(rngs, (width, heads, head_dim), ('fsdp', 'tp', None), contract=1)
    self.wo = weight(rngs, (heads, head_dim, width), ('tp', None, 'fsdp'), contract=2)
    self.q_norm = constant(0.0, (head_dim,))
    self.k_norm = constant(0.0, (head_dim,))

  def __call__(self, x: jax.Array, segments: jax.Array | None = None, angles: jax.Array | None = None,
               key_bias: jax.Array | None = None, context: tuple[jax.Array, jax.Array, jax.Array] | None = None
               ) -> jax.Array:
    """[b s d] -> [b s d] as `stream` has it; segments and key_bias [b s] as in `attention`, angles as in `rope`.

    context: (keys [b c g k], values, segments [b c]) of c more tokens, which are read before x's own and have no
      queries; `key_bias` then begins with theirs.
    """
    out, x = stream(x), whole(x)
    q = rms_norm(einsum('bsd,dhk->bshk', x, self.wq), self.q_norm, self.eps, 1.0)
    k = rms_norm(einsum('bsd,dgk->bsgk', x, self.wk), self.k_norm, self.eps, 1.0)
    v = einsum('bsd,dgk->bsgk', x, self.wv)
    if angles is not None:
      q, k = rope(q, angles), rope(k, angles)
    gate = jax.nn.sigmoid(einsum('bsd,dhk->bshk', x, self.gate))
    kv_segments = segments
    if context is not None:
      k, v, kv_segments = (jnp.concatenate([jax.sharding.reshard(more, jax.typeof(own).sharding.spec), own], axis=1)
                           for more, own in zip(context, (k, v, segments), strict=True))
    y = attention(q, k, v, q_segments=segments, kv_segments=kv_segments, key_bias=key_bias)
    return einsum('bshk,hkd->bsd', y * gate, self.wo, out)


def sinusoid(t: jax.Array, dim: int, period: float = 1e4) -> jax.Array:
  """[b] -> [b dim], cosines then sines, in f32."""
  frequencies = jnp.exp(-math.log(period) * jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))
  angles = t.astype(jnp.float32)[:, None] * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
