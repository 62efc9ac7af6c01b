"""The decoder alone: Llama 3.1's rotary scaling, taps, what is not computed, the cache, deepstack, the last state."""

import dataclasses
import functools

from flax import nnx
import jax
from jax import P
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from unifusion_jax.models import internvl
from unifusion_jax.models.decoder import Decoder, DecoderConfig, last_valid, positions_of
from unifusion_jax.sharding import BATCH
from unifusion_jax.weights import convert

SMALL = DecoderConfig(vocab=64, width=32, depth=4, heads=4, kv_heads=2, head_dim=8, hidden=48)


def batch(b=4, s=10):
  tokens = np.random.default_rng(0).integers(0, 64, (b, s)).astype(np.int32)
  return jax.device_put((tokens, np.arange(s) < np.array([[s], [s - 1], [s - 4], [1]])), P(BATCH))


@functools.partial(jax.jit, static_argnames=('taps', 'depth'))
def run(decoder, tokens, valid, **options):
  return decoder(decoder.embed(tokens), decoder.angles(positions_of(valid)), valid, **options)


def test_llama3_rope_scaling():
  """A plain Llama of transformers whose rotary frequencies fall below, within and above the stretched band."""
  config = transformers.LlamaConfig(
      hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48,
      vocab_size=64, rope_parameters=dict(rope_type='llama3', rope_theta=10000.0, factor=8.0, low_freq_factor=1.0,
                                          high_freq_factor=4.0, original_max_position_embeddings=64))
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(config).eval()
  with torch.no_grad():
    for p in model.parameters():
      p.copy_(torch.randn_like(p) * 0.3 + (p.ndim == 1))
  ours = DecoderConfig.from_json(config.to_dict())
  assert DecoderConfig.from_json(ours.to_json()) == ours and ours.llama3 == (8.0, 1.0, 4.0, 64)
  rules = [(torch_name.replace(r'language_model\.', '', 1), path.removeprefix('decoder/'), pattern)
           for torch_name, path, pattern in internvl.RULES if path.startswith('decoder/')]
  tensors = {name: x.numpy() for name, x in model.state_dict().items()}
  decoder = convert.load(lambda: Decoder(ours, rngs=nnx.Rngs(0)), tensors, rules, {'h': 2, 'g': 1, 'k': 16})
  tokens, valid = batch(s=40)
  with torch.no_grad():
    theirs = model(input_ids=torch.tensor(np.asarray(tokens)).long(),
                   attention_mask=torch.tensor(np.asarray(valid)).long()).logits.numpy()
  logits = np.asarray(decoder.logits(run(decoder, tokens, valid)[0]))
  assert np.abs(logits - theirs)[np.asarray(valid)].max() < 1e-5 * np.abs(theirs).max()


def test_taps_of_unrolled_layers(unrolled):
  test_taps()


def test_taps():
  decoder = Decoder(SMALL, rngs=nnx.Rngs(0))
  tokens, valid = batch()
  last, every, _ = run(decoder, tokens, valid, taps=(0, 1, 2, 3, 4))
  np.testing.assert_array_equal(last, every[:, :, 4])
  for taps, depth in (((1, 3), None), ((0, 2), 2)):
    x, tapped, _ = run(decoder, tokens, valid, taps=taps, depth=depth)
    np.testing.assert_allclose(tapped, every[:, :, np.array(taps)], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(x, every[:, :, 4 if depth is None else depth], rtol=1e-5, atol=1e-6)
  # A cotangent on one tap reaches the blocks before it and no other
  grads = jax.jit(jax.grad(lambda decoder: run(decoder, tokens, valid, taps=(2, 3))[1][:, :, 0].sum()))(decoder)
  reached = np.abs(np.asarray(grads.blocks.wv)).reshape(4, -1).max(axis=1) > 0
  np.testing.assert_array_equal(reached, [True, True, False, False])
  for taps, depth in (((2, 1), None), ((1, 3), 2), ((5,), None), ((), 5)):
    with pytest.raises(ValueError, match='taps must increase'):
      run(decoder, tokens, valid, taps=taps, depth=depth)


def test_blocks_after_the_last_tap_are_not_computed(unrolled):
  decoder = Decoder(SMALL, rngs=nnx.Rngs(0))

  def flops(depth):
    lowered = jax.jit(lambda decoder, *batch: run(decoder, *batch, taps=(depth,), depth=depth)[1]).lower(
        decoder, *batch())
    return lowered.compile().cost_analysis()['flops']

  one, two, four = flops(1), flops(2), flops(4)
  assert four - one == pytest.approx(3 * (two - one), rel=0.02) and two - one > 0.5 * one


def test_taps_keep_no_other_layer_alive():
  """The memory beside arguments and results does not grow with the blocks between two taps."""
  def bytes_of(depth):
    decoder = Decoder(dataclasses.replace(SMALL, depth=depth), rngs=nnx.Rngs(0))
    lowered = jax.jit(lambda decoder, *batch: run(decoder, *batch, taps=(1, depth))[1]).lower(decoder, *batch())
    return lowered.compile().memory_analysis().temp_size_in_bytes

  few, many = bytes_of(3), bytes_of(24)
  assert many < 1.1 * few


def test_cache_in_pieces():
  """Three calls over one cache give what one call without gives."""
  decoder = Decoder(SMALL, rngs=nnx.Rngs(0))
  tokens, _ = batch()
  valid = jnp.full_like(tokens, True, dtype=bool)
  whole, tapped, _ = run(decoder, tokens, valid, taps=(1, 4))
  x, angles = decoder.embed(tokens), decoder.angles(positions_of(valid))
  cache = decoder.cache(len(tokens), tokens.shape[1] + 3)
  for start, stop in ((0, 6), (6, 7), (7, 10)):
    out, taps, cache = jax.jit(Decoder.__call__, static_argnames='taps')(
        decoder, x[:, start:stop], angles[:, start:stop], valid[:, :stop], taps=(1, 4), cache=cache, start=start)
    np.testing.assert_allclose(out, whole[:, start:stop], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(taps, tapped[:, start:stop], rtol=1e-4, atol=1e-5)


def test_deepstack():
  """Addend i joins the output of block i, as running the blocks one by one and adding between them does.

  Taps are the outputs themselves, before the addition, as in transformers.
  """
  decoder = Decoder(SMALL, rngs=nnx.Rngs(0))
  tokens, valid = batch()
  deepstack = jax.device_put(np.random.default_rng(1).standard_normal((2, *tokens.shape, 32)).astype(np.float32),
                             P(None, BATCH))
  _, tapped, _ = run(decoder, tokens, valid, taps=(0, 1, 2, 3, 4), deepstack=deepstack)
  angles = decoder.angles(positions_of(valid))
  x = decoder.embed(tokens)
  one = Decoder(dataclasses.replace(SMALL, depth=1), rngs=nnx.Rngs(0))
  np.testing.assert_allclose(x, tapped[:, :, 0], rtol=1e-4, atol=1e-5)
  for i in range(4):
    one.blocks = jax.tree.map(lambda leaf: leaf[i:i + 1], decoder.blocks)
    x = jax.jit(Decoder.__call__)(one, x, angles, valid)[0]
    np.testing.assert_allclose(x, tapped[:, :, i + 1], rtol=1e-4, atol=1e-5)
    x = x + deepstack[i] if i < 2 else x


def test_the_last_state_of_rows_padded_on_either_side():
  x = np.random.default_rng(0).standard_normal((4, 6, 3), np.float32)
  valid = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1], [1, 0, 0, 0, 0, 0]], bool)
  spoiled = np.where(valid[..., None], x, np.nan)
  ends = last_valid(*jax.device_put((spoiled, valid), P(BATCH)))
  np.testing.assert_array_equal(ends[:, 0], x[np.arange(4), [5, 1, 5, 0]])


def test_config_errors():
  text = SMALL.to_json()
  for change, said in ((dict(model_type='gpt2'), 'gpt2'), (dict(attention_bias=True), 'attention_bias=True'),
                       (dict(rope_parameters=dict(rope_type='yarn', rope_theta=1.0)), "rope_type='yarn'"),
                       (dict(hidden_act='gelu'), "hidden_act='gelu'")):
    with pytest.raises(ValueError, match=said):
      DecoderConfig.from_json(text | change)
  with pytest.raises(ValueError, match='7 query heads'):
    Decoder(dataclasses.replace(SMALL, heads=7), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='32769 positions'):
    Decoder(SMALL, rngs=nnx.Rngs(0)).angles(jnp.zeros((1, 32769)))
