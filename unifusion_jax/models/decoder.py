"""The causal language model behind every VLM here: Llama 3, Qwen2, Qwen3 and InternLM2 are configurations of it.

Pre-norm blocks with RMSNorm, grouped-query attention under RoPE (half-split pairs) and SwiGLU. Qwen2 has biases on q, k
and v; Qwen3 normalises q and k per head; Llama 3.1 stretches the low rotary frequencies (`rope_type` llama3).
A tap k is the residual stream after k blocks, as in `hidden_states[k]` of transformers, except that the last one is
never final-normed; tap 0 is the embeddings.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import NamedTuple

from flax import nnx
import jax
from jax import P
import jax.numpy as jnp
import numpy as np

from unifusion_jax.errors import UserError
from unifusion_jax.models import sizes
from unifusion_jax.models.attention import attention
from unifusion_jax.models.layers import (
  constant,
  einsum,
  einsum_in_place,
  heads_axis,
  RESIDUAL,
  rms_norm,
  rope,
  rows_axes,
  scan_taps,
  stack,
  stream,
  SwiGLU,
  weight,
  whole,
)
from unifusion_jax.ranges import Range
from unifusion_jax.sharding import BATCH


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Sizes and variant of the decoder; `from_json` reads the text config of a transformers checkpoint."""
  model_type: str = 'qwen2'  # llama (which is InternLM2 too) | qwen2 | qwen3
  vocab: int = 1024
  width: int = 192
  depth: int = 6
  heads: int = 6
  kv_heads: int = 2
  head_dim: int = 32
  hidden: int = 512
  eps: float = 1e-6
  theta: float = 1e6
  max_positions: int = 32768
  llama3: tuple = ()  # (factor, low_freq_factor, high_freq_factor, original_max_position_embeddings), or empty
  tied: bool = False  # the head is the embedding table

  @classmethod
  def from_json(cls, text: dict) -> 'DecoderConfig':
    """From a transformers text config, of version 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

    Raises UserError for settings that are not supported.
    """
    kind = text.get('model_type')
    if kind not in ('llama', 'qwen2', 'qwen3', 'internlm2'):
      raise UserError(f'the text model is {kind!r}; this decoder is one of llama, qwen2, qwen3, internlm2')
    if kind == 'internlm2':
      kind = 'llama'  # the same mathematics under other names (internvl.py maps them)
    wrong = [f'{key}={text[key]!r}' for key in ('attention_bias', 'mlp_bias', 'bias', 'use_sliding_window')
             if text.get(key)]
    if text.get('hidden_act', 'silu') != 'silu':
      wrong.append(f'hidden_act={text["hidden_act"]!r}')
    rotary = {'rope_theta': text.get('rope_theta', 10000.0), **(text.get('rope_scaling') or {}),
              **(text.get('rope_parameters') or {})}
    rope_type = rotary.get('rope_type', rotary.get('type', 'default'))
    # 'dynamic' leaves positions below max_position_embeddings alone, and `angles` refuses the others
    if rope_type not in ('default', 'dynamic', 'llama3'):
      wrong.append(f'rope_type={rope_type!r}')
    if rotary.get('partial_rotary_factor', 1.0) != 1.0:
      wrong.append(f'partial_rotary_factor={rotary["partial_rotary_factor"]}')
    if wrong:
      raise UserError(f'this decoder does not support {", ".join(wrong)} of the {kind} text config')
    heads = text['num_attention_heads']
    limit = text.get('max_position_embeddings', 32768)
    # transformers' own default, which does not follow from the width
    head_dim = text.get('head_dim') or (128 if kind == 'qwen3' else text['hidden_size'] // heads)
    llama3 = ()
    if rope_type == 'llama3':
      llama3 = (rotary['factor'], rotary['low_freq_factor'], rotary['high_freq_factor'],
                rotary.get('original_max_position_embeddings', limit))
    return cls(
        model_type=kind, vocab=text['vocab_size'], width=text['hidden_size'], depth=text['num_hidden_layers'],
        heads=heads, kv_heads=text.get('num_key_value_heads') or heads,
        head_dim=head_dim, hidden=text['intermediate_size'],
        eps=text.get('rms_norm_eps', 1e-6), theta=rotary['rope_theta'], max_positions=limit, llama3=llama3,
        tied=text.get('tie_word_embeddings', False))

  def problems(self, prefix: str = 'text.') -> list[str]:
    """Sizes that cannot be, a sentence each."""
    positive = Range(above=0, most=1e12)
    wrong = sizes.problems(self, prefix, theta=positive, max_positions=Range(1, 10 ** 9), llama3=positive)
    if not wrong and (self.heads % self.kv_heads or self.head_dim % 2):
      wrong.append(f'{prefix}kv_heads={self.kv_heads} must divide {prefix}heads={self.heads}, and {prefix}head_dim='
                   f'{self.head_dim} be even')
    return wrong

  def undivided(self, mesh: Mapping[str, int], prefix: str = 'text.') -> list[str]:
    """Sizes that a mesh does not divide, a sentence each; heads that it does not divide are repeated."""
    return sizes.undivided(self, prefix, mesh, fsdp=('width',), tp=('hidden',))

  def to_json(self) -> dict:
    """The text config that transformers (5.x, and 4.x through the top-level `rope_theta`) reads back."""
    text = {
        'model_type': self.model_type, 'vocab_size': self.vocab, 'hidden_size': self.width,
        'num_hidden_layers': self.depth, 'num_attention_heads': self.heads, 'num_key_value_heads': self.kv_heads,
        'head_dim': self.head_dim, 'intermediate_size': self.hidden, 'rms_norm_eps': self.eps,
        'max_position_embeddings': self.max_positions, 'hidden_act': 'silu', 'tie_word_embeddings': self.tied,
        'rope_theta': self.theta, 'rope_parameters': {'rope_type': 'default', 'rope_theta': self.theta}}
    if self.llama3:
      factor, low, high, original = self.llama3
      text['rope_parameters'] = text['rope_scaling'] = {
          'rope_type': 'llama3', 'rope_theta': self.theta, 'factor': factor, 'low_freq_factor': low,
          'high_freq_factor': high, 'original_max_position_embeddings': original}
    return text


def tied_head(config_json: dict, head: bool, base: bool = False) -> bool:
  """Whether the LM head is the embedding table: the file has no `head`, and no level of config.json denies tying.

  The levels of a config.json may disagree about tying (two keys, defaults that changed), and a head in the file
  overrides them. A `base` class never writes a head: there, one level that confirms tying is enough.
  """
  levels = (config_json, *(config_json.get(key) or {} for key in ('text_config', 'llm_config')))
  tied = [level.get('tie_word_embeddings') for level in levels]
  return not head and (False not in tied or base and True in tied)


def resolve_lm_head(tensors: dict, config_json: dict, folder) -> tuple[dict, bool]:
  """(tensors under the names of the class with a head, `tied_head`); a base class (LlamaModel) omits `model.`."""
  base = not {'embed_tokens.weight', 'language_model.embed_tokens.weight'}.isdisjoint(tensors)
  head = 'lm_head.weight' in tensors
  tied = tied_head(config_json, head, base)
  if base and not head and not tied:
    raise UserError(f'{folder} was saved from a class without a head, and its config.json says that the head is not '
                    'the embedding table (tie_word_embeddings): give the folder of the whole model, with lm_head')
  if base:
    tensors = {name if name == 'lm_head.weight' else f'model.{name}': tensor for name, tensor in tensors.items()}
  return tensors, tied


class Cache(NamedTuple):
  """Keys (rotated) and values of every layer, [layers b slots g k] each."""
  k: jax.Array
  v: jax.Array


class Prompt(NamedTuple):
  """A batch of prompts as the decoder reads it."""
  x: jax.Array  # [b s d] embeddings, images in place
  angles: jax.Array  # [b s k/2]
  attention_mask: jax.Array  # [b s] False on padding
  length: jax.Array  # [b] RoPE position of the next token
  deepstack: jax.Array | None = None  # [n b s d] added to the outputs of the first n blocks (Qwen3-VL)


class Block(nnx.Module):
  """One pre-norm block: x += attention(norm x); x += swiglu(norm x)."""

  def __init__(self, config: DecoderConfig, dtype=jnp.float32, *, rngs: nnx.Rngs):
    d, h, g, k = config.width, config.heads, config.kv_heads, config.head_dim
    self.eps = config.eps
    axis = heads_axis(h, g)
    self.norm1 = constant(1.0, (d,), dtype=dtype)
    self.wq = weight(rngs, (d, h, k), ('fsdp', axis, None), contract=1, dtype=dtype)
    self.wk = weight(rngs, (d, g, k), ('fsdp', axis, None), contract=1, dtype=dtype)
    self.wv = weight(rngs, (d, g, k), ('fsdp', axis, None), contract=1, dtype=dtype)
    self.wo = weight(rngs, (h, k, d), (axis, None, 'fsdp'), contract=2, dtype=dtype)
    biased, normed = config.model_type == 'qwen2', config.model_type == 'qwen3'
    self.bq = constant(0.0, (h, k), (axis, None), dtype) if biased else None
    self.bk = constant(0.0, (g, k), (axis, None), dtype) if biased else None
    self.bv = constant(0.0, (g, k), (axis, None), dtype) if biased else None
    self.q_norm = constant(1.0, (k,), dtype=dtype) if normed else None
    self.k_norm = constant(1.0, (k,), dtype=dtype) if normed else None
    self.norm2 = constant(1.0, (d,), dtype=dtype)
    self.mlp = SwiGLU(d, config.hidden, dtype, rngs=rngs)

  def qkv(self, x: jax.Array, angles: jax.Array):
    """x [b s d] -> rotated q [b s h k], rotated k and v [b s g k]."""
    x = whole(rms_norm(x, self.norm1, self.eps))
    q, k, v = (einsum('bsd,dhk->bshk', x, w) for w in (self.wq, self.wk, self.wv))
    if self.bq is not None:
      q, k, v = q + self.bq[...].astype(x.dtype), k + self.bk[...].astype(x.dtype), v + self.bv[...].astype(x.dtype)
    if self.q_norm is not None:
      q, k = rms_norm(q, self.q_norm, self.eps), rms_norm(k, self.k_norm, self.eps)
    return rope(q, angles), rope(k, angles), v

  def output(self, x: jax.Array, attended: jax.Array) -> jax.Array:
    """Block output [b s d] from its input x [b s d] and the attention result [b s h k]."""
    x = x + einsum('bshk,hkd->bsd', attended, self.wo, stream(x))
    return x + self.mlp(rms_norm(x, self.norm2, self.eps))


class Decoder(nnx.Module):
  """The decoder; it computes in the dtype of its input embeddings."""

  def __init__(self, config: DecoderConfig, dtype=jnp.float32, *, rngs: nnx.Rngs):
    if config.heads % config.kv_heads:
      raise UserError(f'{config.heads} query heads cannot share {config.kv_heads} key/value heads: '
                      'the second must divide the first')
    self.config = config
    # Split over the width alone: public vocabulary sizes (151674, 92553) are not divisible by mesh axes
    self.embedding = weight(rngs, (config.vocab, config.width), (None, 'fsdp'), contract=None, dtype=dtype,
                            std=config.width ** -0.5)
    self.blocks = stack(Block, config.depth, config, dtype, rngs=rngs)
    self.norm = constant(1.0, (config.width,), dtype=dtype)
    self.head = None if config.tied else weight(
        rngs, (config.width, config.vocab), (rows_axes(config.width), None), contract=1, dtype=dtype)

  def embed(self, input_ids: jax.Array) -> jax.Array:
    """Token ids [b s] -> embeddings [b s d]."""
    # Each device looks up its columns of the table for all of its fsdp group's tokens, then the group swaps columns for
    # examples: the activations travel, not the table.
    input_ids = jax.sharding.reshard(input_ids, P('data'))
    return jax.sharding.reshard(self.embedding[...].at[input_ids].get(out_sharding=P('data', None, 'fsdp')), RESIDUAL)

  def angles(self, positions: jax.Array) -> jax.Array:
    """Rotation angles [b s k/2], f32, of positions [b s]."""
    config = self.config
    if positions.shape[-1] > config.max_positions:
      raise UserError(f'{positions.shape[-1]} positions are more than the {config.max_positions} this model was '
                      'trained for: shorten the sequence')
    frequencies = config.theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    if config.llama3:
      factor, low, high, original = config.llama3
      unscaled = np.clip((original * frequencies / (2 * math.pi) - low) / (high - low), 0, 1)
      frequencies = frequencies * (unscaled + (1 - unscaled) / factor)
    return positions.astype(jnp.float32)[..., None] * frequencies.astype(np.float32)

  def cache(self, batch: int, slots: int) -> Cache:
    """An empty cache of `slots` slots per example, in the parameters' dtype."""
    c = self.config
    zeros = jnp.zeros((c.depth, batch, slots, c.kv_heads, c.head_dim), self.embedding.dtype,
                      out_sharding=P(None, BATCH, None, heads_axis(c.heads, c.kv_heads)))
    return Cache(zeros, zeros)

  def __call__(self, x: jax.Array, angles: jax.Array, attention_mask: jax.Array, *, taps: tuple[int, ...] = (),
               depth: int | None = None, cache: Cache | None = None, start: jax.Array | int = 0,
               deepstack: jax.Array | None = None, keep: jax.Array | None = None):
    """Runs the first `depth` blocks (None: all) -> (x [b s d], tapped [b s l d] or None, cache).

    Args:
      x, angles: embeddings [b s d] of consecutive tokens, and their rotation angles [b s k/2].
      attention_mask: [b t], False on padding; t = s, or with a cache its first t slots, this call's among them. A token
        attends to the tokens up to itself.
      taps: increasing block counts, none above `depth`.
      cache: this call's keys and values go to its slots start .. start + s.
      deepstack: [n b s d]; addend i is added to the output of block i after that output is tapped.
      keep: [b q], the tokens whose tapped states are kept: [b q l d]. None: all.
    """
    segments = attention_mask.astype(bool)
    from_the_start = isinstance(start, int) and start == 0 and segments.shape[1] == x.shape[1]
    q_segments = segments if from_the_start else jax.lax.dynamic_slice_in_dim(segments, start, x.shape[1], axis=1)

    def block(x, layer, index, cache):
      q, k, v = layer.qkv(x, angles)
      if cache is not None:
        at = (index, 0, start, 0, 0)
        cache = Cache(*(jax.lax.dynamic_update_slice(old, new[None], at) for old, new in zip(cache, (k, v))))
        k, v = (jax.lax.dynamic_index_in_dim(a, index, keepdims=False)[:, :segments.shape[1]] for a in cache)
      y = attention(q, k, v, q_segments=q_segments, kv_segments=segments, causal=True, q_offset=start)
      return layer.output(x, y), cache

    def add(x, index):
      addend = jax.lax.dynamic_index_in_dim(deepstack, jnp.minimum(index, len(deepstack) - 1), keepdims=False)
      return x + jax.sharding.reshard(jnp.where(index < len(deepstack), addend, 0).astype(x.dtype), stream(x))

    return scan_taps(block, x, self.blocks, tuple(taps), depth, carry=cache, after=None if deepstack is None else add,
                     keep=keep)

  def final(self, x: jax.Array) -> jax.Array:
    """The final norm: last block's output [b s d] -> [b s d]."""
    return rms_norm(x, self.norm, self.config.eps)

  def logits(self, x: jax.Array) -> jax.Array:
    """Last block's output at any chosen positions [b s d] -> next-token logits [b s v], f32."""
    x = self.final(x)
    matrix, axes = (self.embedding, 'vd') if self.head is None else (self.head, 'dv')
    if x.shape[1] == 1:  # of one token at a time, as in generation, where gathering the vocabulary would take longest
      return einsum_in_place(f'bd,{axes}->bv', x[:, 0], matrix)[:, None].astype(jnp.float32)
    return einsum(f'bsd,{axes}->bsv', x, matrix).astype(jnp.float32)


def positions_of(attention_mask: jax.Array) -> jax.Array:
  """RoPE positions [b s] that count the tokens of a mask [b s], whichever side the padding is on."""
  return jnp.maximum(jnp.cumsum(attention_mask, axis=1, dtype=jnp.int32) - 1, 0)


def last_valid(x: jax.Array, attention_mask: jax.Array) -> jax.Array:
  """The state of each row's last token [b 1 d]: states x [b s d], mask [b s] with padding on either side."""
  s = x.shape[1]
  ends = s - 1 - jnp.argmax(attention_mask[:, ::-1], axis=1)
  # A sum over one-hot weights: a gather would have to name its sharding
  return jnp.sum(jnp.where((jnp.arange(s) == ends[:, None])[..., None], x, 0), axis=1, keepdims=True)


# Methods of every model over this decoder; each model has its own `prompt(input_ids, attention_mask, images)`:


def hidden(vlm, input_ids: jax.Array, attention_mask: jax.Array, taps: tuple[int, ...], images=None,
           keep: jax.Array | None = None) -> jax.Array:
  """Tapped states [b s l e]: tap k after k blocks, 0 the embeddings, never final-normed. Later blocks do not run.

  With `keep` [b q] those of the chosen tokens alone: [b q l e].

  As in `hidden_states` of transformers, a block's output is tapped before its deepstack feature is added.
  """
  prompt = vlm.prompt(input_ids, attention_mask, images)
  return vlm.decoder(prompt.x, prompt.angles, prompt.attention_mask, taps=taps, depth=max(taps),
                     deepstack=prompt.deepstack, keep=keep)[1]


def last(vlm, input_ids: jax.Array, attention_mask: jax.Array, images=None) -> jax.Array:
  """The last block's output [b s e], which `decoder.logits` takes at any chosen positions."""
  prompt = vlm.prompt(input_ids, attention_mask, images)
  return vlm.decoder(prompt.x, prompt.angles, prompt.attention_mask, deepstack=prompt.deepstack)[0]


def logits(vlm, input_ids: jax.Array, attention_mask: jax.Array, images=None) -> jax.Array:
  """Next-token logits [b s v], f32."""
  return vlm.decoder.logits(last(vlm, input_ids, attention_mask, images))
