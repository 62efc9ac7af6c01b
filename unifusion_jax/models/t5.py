"""The encoder of T5 v1.1 and Flan-T5 (arXiv 2002.05202, 2210.11416): text only, bidirectional.

Follows `T5EncoderModel` of transformers. Pre-norm blocks with RMSNorm, attention without scaling whose logits get a
learned bias for each bucket of token distances, the same in all blocks, and a gated GELU. No other positions.
"""

from collections.abc import Mapping
import dataclasses
import math
import pathlib

from flax import nnx
import jax
from jax import P
import jax.numpy as jnp
import numpy as np

from unifusion_jax import json_file
from unifusion_jax.errors import UserError
from unifusion_jax.models import sizes
from unifusion_jax.models.attention import MASKED
from unifusion_jax.models.layers import (
  constant,
  einsum,
  heads_axis,
  RESIDUAL,
  rms_norm,
  scan_taps,
  stack,
  stream,
  weight,
  whole,
)
from unifusion_jax.ranges import Range
from unifusion_jax.weights import convert, safetensors_io


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Sizes of the encoder; PRESETS at the end of this file has public ones."""
  vocab: int = 32128
  width: int = 768
  depth: int = 12
  heads: int = 12
  head_dim: int = 64
  hidden: int = 2048
  buckets: int = 32
  max_distance: int = 128  # tokens farther apart than this are all in one bucket
  eps: float = 1e-6

  def problems(self) -> list[str]:
    """Sizes that cannot be, a sentence each."""
    return sizes.problems(self, '', buckets=Range(2, 10 ** 4), max_distance=Range(1, 10 ** 6))

  def undivided(self, mesh: Mapping[str, int]) -> list[str]:
    """Sizes that a mesh does not divide, a sentence each; heads that it does not divide are repeated."""
    return sizes.undivided(self, '', mesh, fsdp=('width',), tp=('hidden',))

  @classmethod
  def from_json(cls, config: dict) -> 'T5Config':
    """From the config.json of a transformers checkpoint; UserError for settings that are not supported."""
    if config.get('model_type') != 't5':
      raise UserError(f'the model is {config.get("model_type")!r}; this encoder is t5')
    if config.get('feed_forward_proj') != 'gated-gelu':
      raise UserError(f'feed_forward_proj is {config.get("feed_forward_proj", "relu")!r}, as in the first T5; this '
                      'encoder is that of T5 v1.1 and Flan-T5, with gated-gelu')
    return cls(vocab=config['vocab_size'], width=config['d_model'], depth=config['num_layers'],
               heads=config['num_heads'], head_dim=config['d_kv'], hidden=config['d_ff'],
               buckets=config.get('relative_attention_num_buckets', 32),
               max_distance=config.get('relative_attention_max_distance', 128),
               eps=config.get('layer_norm_epsilon', 1e-6))

  def to_json(self) -> dict:
    """The config.json of a transformers checkpoint of the encoder alone."""
    return {'architectures': ['T5EncoderModel'], 'model_type': 't5', 'dtype': 'float32', 'vocab_size': self.vocab,
            'd_model': self.width, 'num_layers': self.depth, 'num_heads': self.heads, 'd_kv': self.head_dim,
            'd_ff': self.hidden, 'relative_attention_num_buckets': self.buckets,
            'relative_attention_max_distance': self.max_distance, 'layer_norm_epsilon': self.eps,
            'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False}


def bucket_of(distance: np.ndarray, buckets: int, max_distance: int) -> np.ndarray:
  """The bucket of key position minus query position: exact when near, logarithmic up to max_distance, by sign."""
  half = buckets // 2
  exact = half // 2
  far = np.abs(distance)
  octaves = np.log(np.maximum(far, exact).astype(np.float32) / exact) / np.float32(math.log(max_distance / exact))
  coarse = np.minimum(exact + (octaves * (half - exact)).astype(np.int32), half - 1)
  return np.where(far < exact, far, coarse) + half * (distance > 0)


class Block(nnx.Module):
  """x += attention(norm x); x += w_out(gelu(gate norm x) * up norm x)."""

  def __init__(self, config: T5Config, dtype=jnp.float32, *, rngs: nnx.Rngs):
    d, h, k, f = config.width, config.heads, config.head_dim, config.hidden
    self.eps = config.eps
    axis = heads_axis(h, h)
    self.norm1 = constant(1.0, (d,), dtype=dtype)
    # Logits are not scaled by k^-0.5 here: the weight starts smaller instead
    self.wq = weight(rngs, (d, h, k), ('fsdp', axis, None), contract=1, dtype=dtype, std=(d * k) ** -0.5)
    self.wk = weight(rngs, (d, h, k), ('fsdp', axis, None), contract=1, dtype=dtype)
    self.wv = weight(rngs, (d, h, k), ('fsdp', axis, None), contract=1, dtype=dtype)
    self.wo = weight(rngs, (h, k, d), (axis, None, 'fsdp'), contract=2, dtype=dtype)
    self.norm2 = constant(1.0, (d,), dtype=dtype)
    self.gate = weight(rngs, (d, f), ('fsdp', 'tp'), contract=1, dtype=dtype)
    self.up = weight(rngs, (d, f), ('fsdp', 'tp'), contract=1, dtype=dtype)
    self.down = weight(rngs, (f, d), ('tp', 'fsdp'), contract=1, dtype=dtype)

  def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array) -> jax.Array:
    """[b s d] -> [b s d]; bias [h s s] f32 joins the logits, mask [b 1 1 s] is False on padding."""
    out, y = stream(x), whole(rms_norm(x, self.norm1, self.eps))
    q, k, v = (einsum('bsd,dhk->bshk', y, w) for w in (self.wq, self.wk, self.wv))
    # Not `attention.attention`: its kernels know no bias, and T5 reads texts of some hundred tokens, never images
    logits = jnp.einsum('bqhk,bshk->bhqs', q, k, preferred_element_type=jnp.float32) + bias
    weights = jax.nn.softmax(jnp.where(mask, logits, MASKED), axis=-1)
    y = jnp.einsum('bhqs,bshk->bqhk', weights.astype(v.dtype), v)
    x = x + einsum('bshk,hkd->bsd', y, self.wo, out)
    y = whole(rms_norm(x, self.norm2, self.eps))
    y = jax.nn.gelu(einsum('bsd,df->bsf', y, self.gate), approximate=True) * einsum('bsd,df->bsf', y, self.up)
    return x + einsum('bsf,fd->bsd', y, self.down, out)


class T5Encoder(nnx.Module):
  """The encoder; input_ids [b s] int32, attention_mask [b s] (False on padding)."""

  def __init__(self, config: T5Config, dtype=jnp.float32, *, rngs: nnx.Rngs):
    self.config = config
    self.embedding = weight(rngs, (config.vocab, config.width), (None, 'fsdp'), contract=None, dtype=dtype, std=1.0)
    axis = heads_axis(config.heads, config.heads)
    self.bias = weight(rngs, (config.buckets, config.heads), (None, axis), contract=None, dtype=dtype,
                       std=config.width ** -0.5)
    self.blocks = stack(Block, config.depth, config, dtype, rngs=rngs)
    self.norm = constant(1.0, (config.width,), dtype=dtype)

  def hidden(self, input_ids: jax.Array, attention_mask: jax.Array, taps: tuple[int, ...],
             images: None = None, keep: jax.Array | None = None) -> jax.Array:
    """Tapped states [b s l d]: tap k after k blocks, 0 the embeddings, never final-normed. Later blocks do not run.

    With `keep` [b q] those of the chosen tokens alone: [b q l d].
    """
    if images is not None:
      raise UserError('T5 reads text alone: give it no images')
    config = self.config
    input_ids, attention_mask = jax.sharding.reshard((input_ids, attention_mask), RESIDUAL)
    # Looked up by columns, as in decoder.py
    x = self.embedding[...].at[jax.sharding.reshard(input_ids, P('data'))].get(out_sharding=P('data', None, 'fsdp'))
    x = jax.sharding.reshard(x, RESIDUAL)
    index = np.arange(input_ids.shape[1])
    buckets = bucket_of(index - index[:, None], config.buckets, config.max_distance)
    heads = P(None, None, heads_axis(config.heads, config.heads))
    bias = self.bias[...].at[buckets].get(out_sharding=heads).transpose(2, 0, 1).astype(jnp.float32)
    mask = attention_mask[:, None, None]
    return scan_taps(lambda x, block, *_: (block(x, bias, mask), None), x, self.blocks, tuple(taps), max(taps),  # pyrefly: ignore[bad-return]
                     keep=keep)[1]

  def last(self, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
    """Final-normed output [b s d] of the encoder: the input of T5's decoder and of models conditioned on T5."""
    x = self.hidden(input_ids, attention_mask, (self.config.depth,))[:, :, 0]
    return rms_norm(x, self.norm, self.config.eps)


def axis_sizes(config: T5Config) -> dict[str, int]:
  """The sizes behind the letters of the rules."""
  return {'h': config.heads, 'k': config.head_dim}


def load(folder, dtype=jnp.bfloat16, on_leaf=None) -> T5Encoder:
  """From a checkpoint folder (config.json and safetensors) of the encoder or of the whole T5, sharded over the mesh.

  `on_leaf`: see `convert.load`.
  """
  folder = pathlib.Path(folder)
  config = T5Config.from_json(json_file.read(folder / 'config.json'))
  tensors = safetensors_io.read(folder)
  # The table has two names; files hold either or both
  if 'encoder.embed_tokens.weight' in tensors:
    table = tensors.pop('encoder.embed_tokens.weight')
    tensors.setdefault('shared.weight', table)
  return convert.load(lambda: T5Encoder(config, dtype, rngs=nnx.Rngs(0)), tensors, RULES, axis_sizes(config), dtype,
                      ignore=(r'decoder\..*', r'lm_head\.weight'), on_leaf=on_leaf)


def save(model: T5Encoder, folder) -> None:
  """Writes the folder that transformers' T5EncoderModel loads; all processes call it together."""
  convert.save(model, RULES, axis_sizes(model.config), folder, model.config.to_json())


_ATTENTION = r'encoder\.block\.(\d+)\.layer\.0\.'
_MLP = r'encoder\.block\.(\d+)\.layer\.1\.'

RULES = (
    (r'shared\.weight', 'embedding', 'v d -> v d'),
    (r'encoder\.final_layer_norm\.weight', 'norm', 'd -> d'),
    (r'encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight', 'bias', 'n h -> n h'),
    (_ATTENTION + r'layer_norm\.weight', 'blocks/norm1', 'd -> d'),
    (_ATTENTION + r'SelfAttention\.q\.weight', 'blocks/wq', '(h k) d -> d h k'),
    (_ATTENTION + r'SelfAttention\.k\.weight', 'blocks/wk', '(h k) d -> d h k'),
    (_ATTENTION + r'SelfAttention\.v\.weight', 'blocks/wv', '(h k) d -> d h k'),
    (_ATTENTION + r'SelfAttention\.o\.weight', 'blocks/wo', 'd (h k) -> h k d'),
    (_MLP + r'layer_norm\.weight', 'blocks/norm2', 'd -> d'),
    (_MLP + r'DenseReluDense\.wi_0\.weight', 'blocks/gate', 'f d -> d f'),
    (_MLP + r'DenseReluDense\.wi_1\.weight', 'blocks/up', 'f d -> d f'),
    (_MLP + r'DenseReluDense\.wo\.weight', 'blocks/down', 'd f -> f d'),
)

# For planning without a checkpoint; `load` goes by the checkpoint's own config.json
PRESETS = {
    'flan-t5-base': T5Config(),
    'flan-t5-xxl': T5Config(width=4096, depth=24, heads=64, hidden=10240),
}
