"""Ways beside LAP to condition the DiT on a VLM, those that UniFusion (arXiv 2510.12789) compares LAP with.

  last    the last tapped state of each token, through a trainable adaptor, is a condition token
  kv      keys and values for each block of the DiT, made of the state of the VLM's layer at that depth
  hidden  the first state of each token is the condition token; before each block that of its depth is added to it
  text    the VLM's token embeddings (tap 0) of text alone, read by a bidirectional encoder that trains with the DiT

Each has as many trainable blocks between VLM and DiT as LAP and refiner together, attending over the tokens in both
directions, after a norm of each tap; `matched` gives all ways the same number of parameters there. Sizes are those of a
LAPConfig. With fewer taps than blocks of the DiT, consecutive blocks read one tap. Of `kv` and `hidden` the trainable
blocks run on each tap. The keys and values are made of the VLM's hidden states after the trainable blocks, by
projections of their own; the paper's figure shows neither.
"""

import dataclasses
import math
from typing import TYPE_CHECKING

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax import sharding
from unifusion_jax.errors import UserError
from unifusion_jax.models import lap, layers
from unifusion_jax.models.dit import DiT, DiTConfig, HiddenStates, KeyValues
from unifusion_jax.models.lap import Block, LAP, LAPConfig, valid
from unifusion_jax.models.layers import constant, einsum, RESIDUAL, rms_norm, weight

if TYPE_CHECKING:
  from unifusion_jax.models.unifusion import UniFusionConfig

ROPE_THETA = 1e4  # of the text encoder's positions


class Adaptor(nnx.Module):
  """States of several taps [b s l e], each normalised and read by the same blocks over the tokens -> [b s l e]."""

  def __init__(self, config: LAPConfig, taps: int, *, rngs: nnx.Rngs):
    c = self.config = dataclasses.replace(config)
    self.tap_norm = constant(0.0, (taps, c.width))
    self.blocks = layers.stack(Block, c.depth + c.refiner_depth, c, rngs=rngs)
    self.norm = constant(0.0, (c.width,))

  def __call__(self, hidden: jax.Array, mask: jax.Array, angles: jax.Array | None = None) -> jax.Array:
    """Masked tokens change no other token, whatever is in their states; angles [b s k/2] as in `layers.rope`."""
    c, (b, s, l, e) = self.config, hidden.shape
    rows = lambda x: jnp.reshape(jnp.moveaxis(x, 2, 1), (b * l, s, *x.shape[3:]), out_sharding=RESIDUAL)
    each = lambda x: rows(jnp.broadcast_to(x[:, :, None], (b, s, l, *x.shape[2:])))
    x = rows(rms_norm(hidden, self.tap_norm, c.eps, 1.0))
    segments, angles = each(mask.astype(bool)), None if angles is None else each(angles)
    step = lambda x, block: (block(x, segments, angles), None)
    x = layers.whole(layers.scan(step, layers.split(x), self.blocks, remat=c.remat, unroll=True)[0])
    return jnp.moveaxis(jnp.reshape(rms_norm(x, self.norm, c.eps, 1.0), (b, l, s, e), out_sharding=RESIDUAL), 1, 2)


class LastState(nnx.Module):
  """Tapped hidden states [b s l e] -> condition tokens [b s d], of the last tap alone."""

  def __init__(self, config: LAPConfig, dit: DiTConfig, *, rngs: nnx.Rngs):
    self.config, d = dataclasses.replace(config), dit.width
    self.adaptor = Adaptor(config, 1, rngs=rngs)
    self.w1 = weight(rngs, (config.width, d), ('fsdp', 'tp'), contract=1)
    self.b1 = constant(0.0, (d,))
    self.w2 = weight(rngs, (d, d), ('tp', 'fsdp'), contract=1)
    self.b2 = constant(0.0, (d,))

  def __call__(self, hidden: jax.Array, mask: jax.Array, image: jax.Array | None = None) -> jax.Array:
    """hidden [b s l e], mask [b s] (True: a token to use) -> [b s d]; which tokens are an image's is nothing to it."""
    del image
    return self._tokens(valid(hidden, mask, self.config)[:, :, -1:], mask)

  def _tokens(self, state: jax.Array, mask: jax.Array, angles: jax.Array | None = None) -> jax.Array:
    """State [b s 1 e] -> [b s d]."""
    x = self.adaptor(state, mask, angles)[:, :, 0]
    x = jax.nn.gelu(einsum('bse,ed->bsd', x, self.w1) + self.b1[...].astype(x.dtype), approximate=True)
    return einsum('bsd,dm->bsm', x, self.w2, RESIDUAL) + self.b2[...].astype(x.dtype)


class TextEncoder(LastState):
  """Tapped hidden states [b s l e] -> condition tokens [b s d], of the embeddings (the first tap) of text alone.

  What it is given of image tokens changes nothing; `visible` masks them for the DiT.
  """

  def __call__(self, hidden: jax.Array, mask: jax.Array, image: jax.Array | None = None) -> jax.Array:
    """As of `LastState`; image [b s] is needed."""
    mask = visible('text', mask, image)
    positions = jnp.cumsum(mask, axis=1, dtype=jnp.int32)  # of the tokens in use, wherever padding lies
    angles = layers.rope_angles(positions, self.config.width // self.config.heads, ROPE_THETA)
    return self._tokens(valid(hidden, mask, self.config)[:, :, :1], mask, angles)


class KeyValueProjection(nnx.Module):
  """Keys and values of one block of the DiT."""

  def __init__(self, config: LAPConfig, dit: DiTConfig, *, rngs: nnx.Rngs):
    self.eps, shape = dit.eps, (config.width, dit.kv_heads, dit.head_dim)
    self.wk = weight(rngs, shape, ('fsdp', 'tp', None), contract=1)
    self.wv = weight(rngs, shape, ('fsdp', 'tp', None), contract=1)
    self.k_norm = constant(0.0, (dit.head_dim,))

  def __call__(self, x: jax.Array) -> KeyValues:
    """[b s e] -> [b s g k] each. The keys are normalised as the DiT's own are, and have no position."""
    keys = rms_norm(einsum('bse,egk->bsgk', x, self.wk), self.k_norm, self.eps, 1.0)
    return KeyValues(keys, einsum('bse,egk->bsgk', x, self.wv))


class HiddenStateProjection(nnx.Module):
  """What is added before one block of the DiT."""

  def __init__(self, config: LAPConfig, dit: DiTConfig, *, rngs: nnx.Rngs):
    self.w = weight(rngs, (config.width, dit.width), ('fsdp', 'tp'), contract=1)

  def __call__(self, x: jax.Array) -> HiddenStates:
    """[b s e] -> [b s d]."""
    return HiddenStates(einsum('bse,ed->bsd', x, self.w))


class Layerwise(nnx.Module):
  """Tapped hidden states [b s l e] -> a condition for each block of the DiT: KeyValues or HiddenStates."""

  def __init__(self, projection: type[nnx.Module], config: LAPConfig, dit: DiTConfig, *, rngs: nnx.Rngs):
    self.config = dataclasses.replace(config)
    self.adaptor = Adaptor(config, config.taps, rngs=rngs)
    self.projections = layers.stack(projection, dit.depth, config, dit, rngs=rngs)

  def __call__(self, hidden: jax.Array, mask: jax.Array, image: jax.Array | None = None) -> KeyValues | HiddenStates:
    """hidden [b s l e], mask [b s] (True: a token to use); which tokens are an image's is nothing to it."""
    del image
    states = self.adaptor(valid(hidden, mask, self.config), mask)
    blocks = len(jax.tree.leaves(self.projections)[0])

    def step(_, layer):
      projection, tap = layer
      return None, projection(jax.lax.dynamic_index_in_dim(states, tap, axis=2, keepdims=False))

    _, each = layers.scan(step, None, (self.projections, jnp.array(taps_of_blocks(blocks, self.config.taps))),
                          unroll=True)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), each)


def taps_of_blocks(blocks: int, taps: int) -> np.ndarray:
  """The tap that each block of a DiT reads, first to last: int32 [blocks]."""
  return (np.arange(blocks) * taps // blocks).astype(np.int32)


WAYS = ('lap', 'last', 'kv', 'hidden', 'text')  # values of UniFusionConfig.fusion


def make(config: 'UniFusionConfig', *, rngs: nnx.Rngs):
  """The module between VLM and DiT: `module(hidden [b s l e], mask [b s], image [b s]) -> dit.Condition`."""
  match config.fusion:
    case 'lap':
      return LAP(config.lap, config.dit.width, rngs=rngs)
    case 'last':
      return LastState(config.lap, config.dit, rngs=rngs)
    case 'kv':
      return Layerwise(KeyValueProjection, config.lap, config.dit, rngs=rngs)
    case 'hidden':
      return Layerwise(HiddenStateProjection, config.lap, config.dit, rngs=rngs)
    case 'text':
      return TextEncoder(config.lap, config.dit, rngs=rngs)
  raise ValueError(f'fusion={config.fusion!r} is none of {WAYS}')


def visible(way: str, mask: jax.Array, image: jax.Array | None) -> jax.Array:
  """The mask [b s] of the tokens that condition the DiT: all in use, with the text encoder those of text alone."""
  if way != 'text':
    return mask
  if image is None:
    raise ValueError("fusion='text' conditions on text alone: give `image`, which tokens are an image's")
  return mask & ~image


def taps_read(config: 'UniFusionConfig') -> int:
  """The number of states of a token that the blocks between VLM and DiT read."""
  return 1 if config.fusion in ('last', 'text') else config.lap.taps


def problems(config: 'UniFusionConfig', prefix: str) -> list[str]:
  """Settings of the way that cannot be, a sentence each."""
  way, c = config.fusion, config.lap
  if way not in WAYS:
    return [f'{prefix}fusion={way!r} must be one of {", ".join(map(repr, WAYS))}']
  wrong = [f"{prefix}lap.{name}={getattr(c, name)} is a variant of {prefix}fusion='lap', not of {way!r}: leave it out"
           for name in ('tap_norm', 'separate') if way != 'lap' and getattr(c, name)]
  if way == 'text' and c.width // c.heads % 2:
    wrong.append(f'{prefix}lap.heads={c.heads} of {prefix}lap.width={c.width} are of {c.width // c.heads} dims each, '
                 f"which must be an even number for the positions of {prefix}fusion='text'")
  return wrong


def parameters(config: 'UniFusionConfig') -> dict[str, int]:
  """Numbers of parameters, the VLM's not among them: `fusion` between VLM and DiT, `dit`, and `total`."""
  whole, none = sharding.abstract_mesh(sharding.MeshConfig(1, 1, 1), 1), jax.sharding.AbstractMesh((), ())
  with jax.sharding.use_abstract_mesh(none), jax.sharding.use_abstract_mesh(whole):  # whatever mesh is in context
    shapes = jax.eval_shape(lambda: (make(config, rngs=nnx.Rngs(0)), DiT(config.dit, rngs=nnx.Rngs(0))))
  between, dit = (sum(math.prod(x.shape) for x in jax.tree.leaves(part)) for part in shapes)
  return dict(fusion=between, dit=dit, total=between + dit)


def matched(config: 'UniFusionConfig', to: 'UniFusionConfig') -> 'UniFusionConfig':
  """A configuration with as many parameters between VLM and DiT as `to` has, within 1%, by the width of its MLPs.

  That width is a multiple of as large a power of two, up to 128, as that allows. UserError where none does.
  """
  with_mlp = lambda mlp: dataclasses.replace(config, lap=dataclasses.replace(config.lap, mlp=mlp))
  goal = parameters(to)['fusion']
  one, two = (parameters(with_mlp(mlp))['fusion'] for mlp in (1, 2))
  each = two - one  # parameters for every hidden unit; 0 without blocks
  for unit in (128, 64, 32, 16, 8, 4, 2, 1):
    mlp = unit * round((1 + (goal - one) / each) / unit) if each else 0
    if mlp > 0 and abs(one + (mlp - 1) * each - goal) <= 0.01 * goal:
      return with_mlp(mlp)
  raise UserError(f'fusion={config.fusion!r} with {config.lap.depth + config.lap.refiner_depth} blocks between VLM and '
                  f'DiT has {one:,} parameters there with MLPs of one hidden unit, and cannot have about {goal:,} with '
                  'others: change lap.depth or lap.refiner_depth')


RULES = (
    (r'fusion\.adaptor\.tap_norm\.weight', 'fusion/adaptor/tap_norm', 'l e -> l e'),
    *lap.block_rules(r'fusion\.adaptor\.blocks', 'fusion/adaptor/blocks'),
    (r'fusion\.adaptor\.norm\.weight', 'fusion/adaptor/norm', 'e -> e'),
    (r'fusion\.linear_1\.weight', 'fusion/w1', 'd e -> e d'),
    (r'fusion\.linear_1\.bias', 'fusion/b1', 'd -> d'),
    (r'fusion\.linear_2\.weight', 'fusion/w2', 'm d -> d m'),
    (r'fusion\.linear_2\.bias', 'fusion/b2', 'd -> d'),
    (r'fusion\.projections\.(\d+)\.to_k\.weight', 'fusion/projections/wk', '(g k) e -> e g k'),
    (r'fusion\.projections\.(\d+)\.to_v\.weight', 'fusion/projections/wv', '(g k) e -> e g k'),
    (r'fusion\.projections\.(\d+)\.norm_k\.weight', 'fusion/projections/k_norm', 'k -> k'),
    (r'fusion\.projections\.(\d+)\.weight', 'fusion/projections/w', 'd e -> e d'),
)
