"""Text generation with a VLM: one prefill, then one token at a time over a static cache, in a single program.

VERIFI needs both the ids and their tapped states, so every generated token, the stop token included, is fed once and
its states are kept. `generate` compiles once for each shape (batch, prompt length, max_new): pad prompts
to a few lengths.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from unifusion_jax.errors import UserError
from unifusion_jax.models.decoder import last_valid
from unifusion_jax.models.layers import RESIDUAL


class Generated(NamedTuple):
  """Generated text; slots from `lengths` on hold 0. Arrays [b n ...] with n = max_new."""
  ids: jax.Array  # [b n] int32
  lengths: jax.Array  # [b] int32, the stop token counted
  logprobs: jax.Array  # [b n] f32, of each generated token at temperature 1 over the whole vocabulary
  prompt_hidden: jax.Array | None  # [b s l e] tapped states of the prompt, or those to `keep`; None without taps
  hidden: jax.Array | None  # [b n l e] tapped states of the generated tokens


def generate(vlm, input_ids: jax.Array, attention_mask: jax.Array, images=None, *, max_new: int,
             stop_ids: tuple[int, ...], taps: tuple[int, ...] = (), keep: jax.Array | None = None,
             temperature: float = 0.0, top_p: float = 1.0, key: jax.Array | None = None) -> Generated:
  """Continues prompts [b s] (padding where `attention_mask` is False) by up to `max_new` tokens, each to a stop id.

  temperature 0 takes the most probable token; above 0 one is sampled by `key` from the smallest set of tokens whose
  probability at that temperature reaches `top_p`. `key` is one key, or one for each row [b], whose text then
  depends on its own key alone. `keep` [b q]: the tokens of the prompt whose tapped states are kept; None: all. Other
  arguments as in `vlm.prompt`.
  """
  if max_new < 1:
    raise UserError(f'max_new is {max_new}; it must be at least 1')
  limit = vlm.decoder.config.max_positions
  if input_ids.shape[1] + max_new > limit:
    raise UserError(f'a prompt of {input_ids.shape[1]} tokens and {max_new} new ones are more than the {limit} '
                    'positions this model was trained for: shorten either')
  if temperature < 0 or not 0 < top_p <= 1:
    raise UserError(f'temperature {temperature} must be 0 or more, and top_p {top_p} above 0 and at most 1')
  sampling = None
  if temperature > 0:
    if key is None:
      raise UserError('sampling at a temperature above 0 needs a random key: pass key=jax.random.key(seed)')
    keys = jax.random.split(key, len(input_ids)) if key.ndim == 0 else key
    sampling = jnp.float32(temperature), jnp.float32(top_p), jax.sharding.reshard(keys, RESIDUAL)
  return _generate(vlm, input_ids, attention_mask, images, sampling, keep, max_new, tuple(stop_ids), tuple(taps))


@functools.partial(jax.jit, static_argnums=(6, 7, 8))
def _generate(vlm, input_ids, attention_mask, images, sampling, keep, max_new: int, stop_ids, taps) -> Generated:
  b, s = input_ids.shape
  decoder = vlm.decoder
  prompt = vlm.prompt(input_ids, attention_mask, images)
  cache = decoder.cache(b, s + max_new)
  x, prompt_hidden, cache = decoder(prompt.x, prompt.angles, prompt.attention_mask, taps=taps, cache=cache,
                                    deepstack=prompt.deepstack, keep=keep)
  x = last_valid(x, prompt.attention_mask)
  # Slots that are not yet written lie after every query, which causality hides
  slots_mask = jnp.pad(prompt.attention_mask, ((0, 0), (0, max_new)), constant_values=True)

  def choose(x, i):
    """Last states [b 1 d] -> token i [b] and its log-probability [b]."""
    logits = jax.nn.log_softmax(decoder.logits(x)[:, 0])
    if sampling is None:
      chosen = jnp.argmax(logits, axis=-1)
    else:
      keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(sampling[2], i)
      chosen = jax.vmap(jax.random.categorical)(keys, keep_top(logits / sampling[0], sampling[1]))
    picked = jnp.arange(logits.shape[-1]) == chosen[:, None]
    return chosen.astype(jnp.int32), jnp.sum(jnp.where(picked, logits, 0), axis=-1)

  def write(state):
    i, (token, logprob), done, cache, out = state
    running = ~done

    def put(slots, values):
      values = jnp.where(running.reshape(-1, *[1] * (values.ndim - 1)), values, 0)
      return jax.lax.dynamic_update_index_in_dim(slots, values.astype(slots.dtype), i, 1)

    x, tapped, cache = decoder(decoder.embed(token[:, None]), decoder.angles((prompt.length + i)[:, None]), slots_mask,
                               taps=taps, cache=cache, start=s + i)
    out = Generated(put(out.ids, token), out.lengths + running, put(out.logprobs, logprob), None,
                    None if tapped is None else put(out.hidden, tapped[:, 0]))
    done = done | functools.reduce(jnp.logical_or, [token == stop for stop in stop_ids], jnp.zeros_like(done))
    return i + 1, choose(x, i + 1), done, cache, out

  empty = functools.partial(jnp.zeros, out_sharding=RESIDUAL)
  out = Generated(empty((b, max_new), jnp.int32), empty((b,), jnp.int32), empty((b, max_new), jnp.float32), None,
                  empty((b, max_new, len(taps), x.shape[-1]), x.dtype) if taps else None)
  state = (jnp.int32(0), choose(x, 0), empty((b,), bool), cache, out)
  *_, out = jax.lax.while_loop(lambda state: (state[0] < max_new) & ~jnp.all(state[2]), write, state)
  return out._replace(prompt_hidden=prompt_hidden)


def keep_top(logits: jax.Array, top_p: jax.Array) -> jax.Array:
  """Logits [b v] with -inf outside the smallest set of tokens whose probability reaches top_p."""
  ordered = jnp.sort(jax.nn.softmax(logits), axis=-1, descending=True)
  # A token is kept while those above it have not reached top_p; the first always is
  kept = jnp.cumsum(ordered, axis=-1) - ordered < top_p
  threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(jax.nn.softmax(logits) >= threshold, logits, -jnp.inf)
