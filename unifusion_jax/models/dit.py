"""The single-stream diffusion transformer of Krea 2; other sizes are other configurations of it.

Condition tokens and image patches are one sequence [cond | image]. The time is projected once into six modulation
vectors that all blocks share; each block adds a table of its own. Rotary positions are (frame, y, x): all zero for
condition tokens, frame zero for images.

Clean latents of reference images may follow, [cond | image | references], as the community's editing LoRAs have them
(ostris/ComfyUI-Krea2-Ostris-Edit): frames 1, 2, ..., modulated from time 0 (data), and never read out.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import NamedTuple

import einops
from flax import nnx
import jax
import jax.numpy as jnp

from unifusion_jax.errors import UserError
from unifusion_jax.models import layers, sizes
from unifusion_jax.models.layers import constant, einsum, einsum_in_place, RESIDUAL, rms_norm, weight
from unifusion_jax.ranges import Range


@dataclasses.dataclass(unsafe_hash=True)
class DiTConfig:
  """Sizes; the defaults are Krea 2's."""
  channels: int = 16  # c, of the latents
  patch: int = 2
  depth: int = 28
  heads: int = 48
  kv_heads: int = 12
  head_dim: int = 128
  mlp: int = 16384
  time_dim: int = 256
  rope_axes: tuple[int, int, int] = (32, 48, 48)  # of head_dim, for frame, y, x
  rope_theta: float = 1000.0
  eps: float = 1e-5
  remat: bool = False

  @property
  def width(self) -> int:
    return self.heads * self.head_dim

  def problems(self, prefix: str = 'dit.') -> list[str]:
    """Sizes that cannot be, a sentence each."""
    wrong = sizes.problems(self, prefix, channels=Range(1, 10 ** 4), time_dim=Range(2, 10 ** 5),
                           rope_axes=Range(0, 10 ** 4), rope_theta=Range(above=0, most=1e12))
    if not wrong and self.width not in sizes.LIMITS['width']:
      wrong.append(f'{prefix}heads={self.heads} x {prefix}head_dim={self.head_dim} make a width of {self.width:,}, '
                   f'which must be {sizes.LIMITS["width"]}')
    if not wrong and (sum(self.rope_axes) != self.head_dim or any(axis % 2 for axis in self.rope_axes)):
      wrong.append(f'{prefix}rope_axes={self.rope_axes} must be three even numbers that add up to {prefix}head_dim='
                   f'{self.head_dim}')
    if not wrong and self.heads % self.kv_heads:
      wrong.append(f'{prefix}kv_heads={self.kv_heads} must divide {prefix}heads={self.heads}')
    return wrong

  def undivided(self, mesh: Mapping[str, int], prefix: str = 'dit.') -> list[str]:
    """Sizes that a mesh does not divide, a sentence each."""
    return sizes.undivided(self, prefix, mesh, fsdp=('width', 'time_dim'), tp=('heads', 'kv_heads', 'mlp'))


class References(NamedTuple):
  """Clean latents of n reference images, each on a canvas as large as the image; a pytree with the batch first."""
  latents: jax.Array  # [b n y x c]
  mask: jax.Array     # [b n rows columns] bool, the patches that a reference covers
  bias: jax.Array | None = None  # [b n] f32, the logarithm of how often each counts in attention; None: once


class HiddenStates(NamedTuple):
  """A condition that enters block by block: state n of a token is added to its place in the stream before block n."""
  states: jax.Array  # [b s n d], the first of which is the token itself


class KeyValues(NamedTuple):
  """A condition outside the stream: keys and values of its tokens for each of n blocks."""
  keys: jax.Array    # [b s n g k]
  values: jax.Array  # [b s n g k]


Condition = jax.Array | HiddenStates | KeyValues  # an array: tokens [b s d] at the head of the stream


class Block(nnx.Module):
  """x += gate * attention(modulate(norm(x))); the same with SwiGLU."""

  def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
    c = config
    self.eps = c.eps
    self.table = constant(0.0, (6, c.width))
    self.norm1 = constant(0.0, (c.width,))
    self.attn = layers.GatedAttention(c.width, c.heads, c.kv_heads, c.head_dim, c.eps, rngs=rngs)
    self.norm2 = constant(0.0, (c.width,))
    self.mlp = layers.SwiGLU(c.width, c.mlp, rngs=rngs)

  def __call__(self, x: jax.Array, modulation: jax.Array, segments: jax.Array, angles: jax.Array,
               key_bias: jax.Array | None = None, clean: tuple[jax.Array, jax.Array] | None = None,
               context: tuple[jax.Array, jax.Array, jax.Array] | None = None) -> jax.Array:
    """x [b s d], modulation [b m d] f32 with m of 6, segments and key_bias [b s], angles [s k/2] -> [b s d].

    clean: (modulation, which tokens take it [s 1] bool) of the tokens at time 0.
    context: as of `layers.GatedAttention`.
    """
    slots = (modulation + self.table[...].astype(jnp.float32))[:, :, None]
    slots = [slots[:, m] for m in range(6)]
    if clean is not None:  # chosen where they are used, so [b s d] of them need not be in memory
      others = (clean[0] + self.table[...].astype(jnp.float32))[:, :, None]
      slots = [jnp.where(clean[1], others[:, m], slot) for m, slot in enumerate(slots)]
    scale1, shift1, gate1, scale2, shift2, gate2 = slots
    y = self.attn(modulate(x, self.norm1, scale1, shift1, self.eps), segments, angles, key_bias, context)
    x = x + (gate1 * y).astype(x.dtype)
    y = self.mlp(modulate(x, self.norm2, scale2, shift2, self.eps))
    return x + (gate2 * y).astype(x.dtype)


class DiT(nnx.Module):
  """Noised latents [b y x c] and condition tokens [b s d] -> velocity [b y x c]."""

  def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
    if sum(config.rope_axes) != config.head_dim or any(a % 2 for a in config.rope_axes):
      raise UserError(f'rope_axes {config.rope_axes} must be three even numbers that add up to the head dim '
                      f'{config.head_dim}')
    if config.heads % config.kv_heads:
      raise UserError(f'{config.heads} heads cannot share {config.kv_heads} key/value heads evenly: '
                      'kv_heads must divide heads')
    c = self.config = dataclasses.replace(config)
    d, p = c.width, c.channels * c.patch ** 2
    self.image_w = weight(rngs, (p, d), (None, 'fsdp'), contract=1, int8=False)
    self.image_b = constant(0.0, (d,))
    self.time_w1 = weight(rngs, (c.time_dim, d), ('fsdp', 'tp'), contract=1, int8=False)
    self.time_b1 = constant(0.0, (d,))
    self.time_w2 = weight(rngs, (d, d), ('tp', 'fsdp'), contract=1, int8=False)
    self.time_b2 = constant(0.0, (d,))
    # Zero modulation and a zero last layer: training starts from blocks that are the identity and velocity 0.
    self.mod_w = constant(0.0, (d, 6, d), ('fsdp', None, 'tp'))
    self.mod_b = constant(0.0, (6, d))
    self.blocks = layers.stack(Block, c.depth, c, rngs=rngs)
    self.norm = constant(0.0, (d,))
    self.table = constant(0.0, (2, d))
    self.final_w = constant(0.0, (d, p), ('fsdp', None))
    self.final_b = constant(0.0, (p,))

  def __call__(self, z: jax.Array, t: jax.Array, cond: Condition, mask: jax.Array, bias: jax.Array | None = None,
               references: References | None = None, *, tap: int | None = None):
    """z [b y x c], t [b] f32 in [0, 1], cond of s tokens in the compute dtype, mask [b s] -> [b y x c] f32.

    bias: [b s] f32, the logarithm of how often each condition token counts in attention; None where all count once.
    references: patches that they do not cover change nothing.
    With `tap`: (velocity, states [b y x d] of the image patches after `tap` blocks).
    """
    c = self.config
    b, height, width, channels = z.shape
    if channels != c.channels or height % c.patch or width % c.patch:
      raise UserError(f'latents [{height} {width} {channels}] must have {c.channels} channels and sides that are '
                      f'multiples of the patch {c.patch}')
    rows, columns = height // c.patch, width // c.patch
    outside = isinstance(cond, KeyValues)
    head = 0 if outside else mask.shape[1]  # condition tokens of the stream
    frames, end = 1, head + rows * columns
    if references is not None:  # canvas under canvas, whose patches follow one another
      frames += references.latents.shape[1]
      z = jnp.concatenate([z[:, None], references.latents], axis=1).reshape(b, frames * height, width, channels)
    dtype, layerwise = jax.tree.leaves(cond)[0].dtype, None
    x = einsum('bsp,pd->bsd', patchify(z, c.patch).astype(dtype), self.image_w, RESIDUAL)
    x = x + self.image_b[...].astype(dtype)
    if isinstance(cond, jax.Array):
      x = jnp.concatenate([cond, x], axis=1)
    else:
      x = jnp.pad(x, ((0, 0), (head, 0), (0, 0)))
      layerwise = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 2, 0), cond)
    segments = jnp.pad(mask.astype(bool), ((0, 0), (0, rows * columns)), constant_values=True)
    angles = self._angles(head, rows, columns, frames)
    key_bias = None if bias is None else jnp.pad(bias, ((0, 0), (0, rows * columns)))
    time, modulation = self._time(t)
    clean = None
    if references is not None:
      clean = self._time(jnp.zeros_like(t))[1], (jnp.arange(x.shape[1]) >= end)[:, None]
      if key_bias is not None or references.bias is not None:
        before = jnp.zeros_like(segments, jnp.float32) if key_bias is None else key_bias
        each = 0.0 if references.bias is None else references.bias[:, :, None, None]
        each = jnp.where(references.mask, each, 0.0)
        key_bias = jnp.concatenate([before, each.reshape(b, -1)], axis=1)
      segments = jnp.concatenate([segments, references.mask.reshape(b, -1)], axis=1)

    own = segments[:, mask.shape[1]:] if outside else segments

    def block(x, layer, *_):
      block, each = layer
      context = (*each, segments[:, :mask.shape[1]]) if outside else None
      if isinstance(each, HiddenStates):
        added = jnp.pad(each.states, ((0, 0), (0, x.shape[1] - head), (0, 0)))
        x = x + jax.sharding.reshard(added, jax.typeof(x).sharding.spec)
      return block(x, modulation, own, angles, key_bias, clean, context), None

    taps = () if tap is None else (tap,)
    x, tapped, _ = layers.scan_taps(block, x, (self.blocks, layerwise), taps, remat=c.remat, unroll=True)
    scale, shift = (time[:, None] + self.table[m].astype(jnp.float32) for m in range(2))
    x = modulate(x[:, head:end], self.norm, scale, shift, c.eps)
    x = einsum('bsd,dp->bsp', x, self.final_w, RESIDUAL).astype(jnp.float32) + self.final_b[...].astype(jnp.float32)
    velocity = unpatchify(x, c.patch, rows, columns)
    if tap is None:
      return velocity
    return velocity, tapped[:, head:end, 0].reshape(b, rows, columns, -1, out_sharding=RESIDUAL)

  def _time(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Embeddings [b d] of times [b], and the modulation [b m d] that all blocks share; f32."""
    time = layers.sinusoid(t * 1000, self.config.time_dim)
    time = jax.nn.gelu(einsum_in_place('bd,df->bf', time, self.time_w1) + self.time_b1[...], approximate=True)
    time = einsum_in_place('bf,fd->bd', time, self.time_w2) + self.time_b2[...]
    return time, einsum_in_place('bd,dmf->bmf', jax.nn.gelu(time, approximate=True), self.mod_w) + self.mod_b[...]

  def _angles(self, text: int, rows: int, columns: int, frames: int) -> jax.Array:
    """Rotation angles [s k/2] of `text` condition tokens at 0, then of the patches of each frame row by row."""
    c = self.config
    y, x = jnp.repeat(jnp.arange(rows), columns), jnp.tile(jnp.arange(columns), rows)
    angles = [jnp.concatenate([layers.rope_angles(position, dim, c.rope_theta) for position, dim in zip(
        (jnp.full_like(y, frame), y, x), c.rope_axes)], axis=-1) for frame in range(frames)]
    return jnp.pad(jnp.concatenate(angles), ((text, 0), (0, 0)))


def modulate(x: jax.Array, norm: nnx.Param, scale: jax.Array, shift: jax.Array, eps: float) -> jax.Array:
  """(1 + scale) (1 + norm) x / rms(x) + shift; f32 within.

  x [b s d], norm [d]; scale and shift [b 1 d], or [b s d] where tokens differ in their times.
  """
  factor = (1 + scale) * (1 + norm[...].astype(jnp.float32))  # one factor, one sum over tokens in its gradient
  return (factor * rms_norm(x.astype(jnp.float32), eps=eps) + shift).astype(x.dtype)


def patchify(z: jax.Array, patch: int) -> jax.Array:
  """[b y x c] -> [b s p], rows first, each patch channel-major (c, y, x) as in Krea 2."""
  cut = functools.partial(einops.rearrange, pattern='b (y i) (x j) c -> b (y x) (c i j)', i=patch, j=patch)
  return jax.sharding.auto_axes(cut, out_sharding=RESIDUAL)(z)  # pyrefly: ignore[bad-return]


def unpatchify(x: jax.Array, patch: int, rows: int, columns: int) -> jax.Array:
  """The inverse of `patchify` for an image of rows x columns patches."""
  join = functools.partial(einops.rearrange, pattern='b (y x) (c i j) -> b (y i) (x j) c',
                           y=rows, x=columns, i=patch, j=patch)
  return jax.sharding.auto_axes(join, out_sharding=RESIDUAL)(x)  # pyrefly: ignore[bad-return]


# diffusers' Krea2Transformer2DModel. It rotates neighbouring channels of a head, we rotate halves (contiguous, so
# cheaper): query and key channels are reordered once here and attention cannot tell.
RULES = (
    (r'img_in\.weight', 'dit/image_w', 'd p -> p d'),
    (r'img_in\.bias', 'dit/image_b', 'd -> d'),
    (r'time_embed\.linear_1\.weight', 'dit/time_w1', 'd t -> t d'),
    (r'time_embed\.linear_1\.bias', 'dit/time_b1', 'd -> d'),
    (r'time_embed\.linear_2\.weight', 'dit/time_w2', 'm d -> d m'),
    (r'time_embed\.linear_2\.bias', 'dit/time_b2', 'd -> d'),
    (r'time_mod_proj\.weight', 'dit/mod_w', '(m f) d -> d m f'),
    (r'time_mod_proj\.bias', 'dit/mod_b', '(m d) -> m d'),
    (r'transformer_blocks\.(\d+)\.scale_shift_table', 'dit/blocks/table', 'm d -> m d'),
    (r'transformer_blocks\.(\d+)\.norm1\.weight', 'dit/blocks/norm1', 'd -> d'),
    (r'transformer_blocks\.(\d+)\.norm2\.weight', 'dit/blocks/norm2', 'd -> d'),
    (r'transformer_blocks\.(\d+)\.attn\.to_q\.weight', 'dit/blocks/attn/wq', '(h k two) d -> d h (two k)'),
    (r'transformer_blocks\.(\d+)\.attn\.to_k\.weight', 'dit/blocks/attn/wk', '(g k two) d -> d g (two k)'),
    (r'transformer_blocks\.(\d+)\.attn\.to_v\.weight', 'dit/blocks/attn/wv', '(g k) d -> d g k'),
    (r'transformer_blocks\.(\d+)\.attn\.to_gate\.weight', 'dit/blocks/attn/gate', '(h k) d -> d h k'),
    (r'transformer_blocks\.(\d+)\.attn\.to_out\.0\.weight', 'dit/blocks/attn/wo', 'd (h k) -> h k d'),
    (r'transformer_blocks\.(\d+)\.attn\.norm_q\.weight', 'dit/blocks/attn/q_norm', '(k two) -> (two k)'),
    (r'transformer_blocks\.(\d+)\.attn\.norm_k\.weight', 'dit/blocks/attn/k_norm', '(k two) -> (two k)'),
    (r'transformer_blocks\.(\d+)\.ff\.gate\.weight', 'dit/blocks/mlp/gate', 'f d -> d f'),
    (r'transformer_blocks\.(\d+)\.ff\.up\.weight', 'dit/blocks/mlp/up', 'f d -> d f'),
    (r'transformer_blocks\.(\d+)\.ff\.down\.weight', 'dit/blocks/mlp/down', 'd f -> f d'),
    (r'final_layer\.norm\.weight', 'dit/norm', 'd -> d'),
    (r'final_layer\.scale_shift_table', 'dit/table', 'm d -> m d'),
    (r'final_layer\.linear\.weight', 'dit/final_w', 'p d -> d p'),
    (r'final_layer\.linear\.bias', 'dit/final_b', 'p -> p'),
)
