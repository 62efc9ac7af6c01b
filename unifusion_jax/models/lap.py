"""Layerwise attention pooling: hidden states of several VLM layers become condition tokens of the DiT.

UniFusion (arXiv 2510.12789): every token is a batch row whose sequence is its tapped layers; two transformer blocks
attend over the layers, a linear map of the layer axis to one collapses them, and a bidirectional refiner over the
tokens undoes the position bias of causal attention. The blocks are those of Krea 2, whose `text_fusion` and `txt_in`
are one configuration of this module.
"""

from collections.abc import Mapping
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from unifusion_jax.errors import UserError
from unifusion_jax.models import layers, sizes
from unifusion_jax.models.layers import constant, einsum, RESIDUAL, rms_norm, weight
from unifusion_jax.ranges import Range

HIDDEN = 2 ** 28  # bytes of hidden units on a device; more tokens are pooled in parts, and each gathers the weights


@dataclasses.dataclass(unsafe_hash=True)
class LAPConfig:
  """Sizes; the defaults are Krea 2's for Qwen3-VL-4B."""
  width: int = 2560  # e
  taps: int = 12  # l
  depth: int = 2
  refiner_depth: int = 2
  heads: int = 20
  kv_heads: int = 20
  mlp: int = 6912
  eps: float = 1e-5
  remat: bool = False
  tap_norm: bool = False  # each tap is RMS-normalised before pooling, with scales of its own
  separate: bool = False  # image tokens are pooled by blocks and weights of their own; the refiner is one

  def problems(self, prefix: str = 'lap.') -> list[str]:
    """Sizes that cannot be, a sentence each."""
    wrong = sizes.problems(self, prefix, taps=Range(1, 1000), depth=Range(0, 1000), refiner_depth=Range(0, 1000))
    if not wrong and (self.width % self.heads or self.heads % self.kv_heads):
      wrong.append(f'{prefix}heads={self.heads} must divide {prefix}width={self.width}, and {prefix}kv_heads='
                   f'{self.kv_heads} the heads')
    return wrong

  def undivided(self, mesh: Mapping[str, int], prefix: str = 'lap.') -> list[str]:
    """Sizes that a mesh does not divide, a sentence each."""
    return sizes.undivided(self, prefix, mesh, fsdp=('width',), tp=('heads', 'kv_heads', 'mlp'))


class Block(nnx.Module):
  """x += attention(norm(x)); x += swiglu(norm(x)), without time, and without positions where no angles are given."""

  def __init__(self, config: LAPConfig, *, rngs: nnx.Rngs):
    c = config
    self.eps = c.eps
    self.norm1 = constant(0.0, (c.width,))
    self.attn = layers.GatedAttention(c.width, c.heads, c.kv_heads, c.width // c.heads, c.eps, rngs=rngs)
    self.norm2 = constant(0.0, (c.width,))
    self.mlp = layers.SwiGLU(c.width, c.mlp, rngs=rngs)

  def __call__(self, x: jax.Array, segments: jax.Array | None = None, angles: jax.Array | None = None) -> jax.Array:
    x = x + self.attn(rms_norm(x, self.norm1, self.eps, 1.0), segments, angles)
    return x + self.mlp(rms_norm(x, self.norm2, self.eps, 1.0))


class LAP(nnx.Module):
  """Tapped hidden states [b s l e] -> condition tokens [b s d]."""

  def __init__(self, config: LAPConfig, width: int, *, rngs: nnx.Rngs):
    if config.width % config.heads:
      raise UserError(f'LAP width {config.width} is not a multiple of its {config.heads} heads: change one of them')
    c = self.config = dataclasses.replace(config)
    self.blocks = layers.stack(Block, c.depth, c, rngs=rngs)
    self.pool = constant(1 / c.taps, (c.taps,))
    self.refiner = layers.stack(Block, c.refiner_depth, c, rngs=rngs)
    self.norm = constant(0.0, (c.width,))
    self.w1 = weight(rngs, (c.width, width), ('fsdp', 'tp'), contract=1)
    self.b1 = constant(0.0, (width,))
    self.w2 = weight(rngs, (width, width), ('tp', 'fsdp'), contract=1)
    self.b2 = constant(0.0, (width,))
    if c.tap_norm:
      self.tap_norm = constant(0.0, (c.taps, c.width))
    if c.separate:
      self.image_blocks = layers.stack(Block, c.depth, c, rngs=rngs)
      self.image_pool = constant(1 / c.taps, (c.taps,))

  def __call__(self, hidden: jax.Array, mask: jax.Array, image: jax.Array | None = None) -> jax.Array:
    """hidden [b s l e], mask [b s] (True: a token to use) -> [b s d]. Masked tokens change no other token.

    image: [b s], which tokens are an image's; only where LAP is `separate`.
    """
    c, x = self.config, valid(hidden, mask, self.config)
    if c.tap_norm:
      x = rms_norm(x, self.tap_norm, c.eps, 1.0)
    pooled = self._pooled(x, self.blocks, self.pool)
    if c.separate:
      if image is None:
        raise ValueError('a LAP with separate=True pools image tokens apart: give it `image`, which tokens these are')
      pooled = jnp.where(image[:, :, None], self._pooled(x, self.image_blocks, self.image_pool), pooled)
    x = self._run(pooled, self.refiner, mask.astype(bool))
    x = rms_norm(x, self.norm, c.eps, 1.0)
    x = jax.nn.gelu(einsum('bse,ed->bsd', x, self.w1) + self.b1[...].astype(x.dtype), approximate=True)
    return einsum('bsd,dm->bsm', x, self.w2, RESIDUAL) + self.b2[...].astype(x.dtype)

  def _pooled(self, hidden: jax.Array, blocks, weights: nnx.Param) -> jax.Array:
    """[b s l e] -> [b s e], token by token; many tokens in parts, one after another."""
    c = self.config
    b, s, l, e = hidden.shape
    rows = jax.typeof(hidden).sharding.shard_shape(hidden.shape)[0]
    parts = parts_of(rows * s, c, hidden.dtype.itemsize)
    size = -(-s // parts)

    def pool(x):
      b, s, l, e = x.shape
      x = self._run(x.reshape(b * s, l, e, out_sharding=RESIDUAL), blocks)
      return einsum('bsle,l->bse', x.reshape(b, s, l, e, out_sharding=RESIDUAL), weights)

    if parts == 1:
      return pool(hidden)
    hidden = jnp.pad(hidden, ((0, 0), (0, parts * size - s), (0, 0), (0, 0)))
    hidden = jnp.moveaxis(hidden.reshape(b, parts, size, l, e), 1, 0)
    return jnp.moveaxis(jax.lax.map(pool, hidden), 0, 1).reshape(b, parts * size, e)[:, :s]

  def _run(self, x: jax.Array, blocks, segments: jax.Array | None = None) -> jax.Array:
    step = lambda x, block: (block(x, segments), None)
    return layers.whole(layers.scan(step, layers.split(x), blocks, remat=self.config.remat, unroll=True)[0])


def valid(hidden: jax.Array, mask: jax.Array, config: LAPConfig) -> jax.Array:
  """Hidden states [b s l e] with zeros for masked tokens; UserError where taps or width are not the model's."""
  taps, width = hidden.shape[2:]
  if (taps, width) != (config.taps, config.width):
    raise UserError(f'hidden states have {taps} taps of width {width} but this model pools {config.taps} of width '
                    f"{config.width}: set the config's taps and width to those of the vision-language model")
  # Padding may hold anything, infinities too, which would pass through a mask as 0 * inf.
  return jnp.where(mask[:, :, None, None], hidden, jnp.zeros((), hidden.dtype))


def parts_of(tokens: int, config: LAPConfig, itemsize: int) -> int:
  """The number of parts in which a device pools its tokens, which have `itemsize` bytes a number."""
  return max(1, -(-tokens * config.taps * config.mlp * itemsize // HIDDEN))


def block_rules(torch: str, ours: str):
  """Rules of a stack of `Block`s."""
  return (
      (rf'{torch}\.(\d+)\.norm1\.weight', f'{ours}/norm1', 'e -> e'),
      (rf'{torch}\.(\d+)\.norm2\.weight', f'{ours}/norm2', 'e -> e'),
      (rf'{torch}\.(\d+)\.attn\.to_q\.weight', f'{ours}/attn/wq', '(h k) e -> e h k'),
      (rf'{torch}\.(\d+)\.attn\.to_k\.weight', f'{ours}/attn/wk', '(g k) e -> e g k'),
      (rf'{torch}\.(\d+)\.attn\.to_v\.weight', f'{ours}/attn/wv', '(g k) e -> e g k'),
      (rf'{torch}\.(\d+)\.attn\.to_gate\.weight', f'{ours}/attn/gate', '(h k) e -> e h k'),
      (rf'{torch}\.(\d+)\.attn\.to_out\.0\.weight', f'{ours}/attn/wo', 'e (h k) -> h k e'),
      (rf'{torch}\.(\d+)\.attn\.norm_q\.weight', f'{ours}/attn/q_norm', 'k -> k'),
      (rf'{torch}\.(\d+)\.attn\.norm_k\.weight', f'{ours}/attn/k_norm', 'k -> k'),
      (rf'{torch}\.(\d+)\.ff\.gate\.weight', f'{ours}/mlp/gate', 'f e -> e f'),
      (rf'{torch}\.(\d+)\.ff\.up\.weight', f'{ours}/mlp/up', 'f e -> e f'),
      (rf'{torch}\.(\d+)\.ff\.down\.weight', f'{ours}/mlp/down', 'e f -> f e'),
  )


# diffusers' Krea2Transformer2DModel. Its norms are zero-centred as ours are.
RULES = (
    *block_rules(r'text_fusion\.layerwise_blocks', 'lap/blocks'),
    (r'text_fusion\.projector\.weight', 'lap/pool', '1 l -> l'),
    *block_rules(r'text_fusion\.refiner_blocks', 'lap/refiner'),
    (r'txt_in\.norm\.weight', 'lap/norm', 'e -> e'),
    (r'txt_in\.linear_1\.weight', 'lap/w1', 'd e -> e d'),
    (r'txt_in\.linear_1\.bias', 'lap/b1', 'd -> d'),
    (r'txt_in\.linear_2\.weight', 'lap/w2', 'm d -> d m'),
    (r'txt_in\.linear_2\.bias', 'lap/b2', 'd -> d'),
)

# Variants that Krea's files do not know
VARIANT_RULES = (
    (r'text_fusion\.tap_norm\.weight', 'lap/tap_norm', 'l e -> l e'),
    *block_rules(r'text_fusion\.image_layerwise_blocks', 'lap/image_blocks'),
    (r'text_fusion\.image_projector\.weight', 'lap/image_pool', '1 l -> l'),
)
