"""Writing against transformers' generate, and its states against one teacher-forced pass."""

import functools

import jax
from jax import P
import jax.numpy as jnp
import numpy as np
import pytest
from test_internvl import batch, one_device, torch_inputs, torch_model
import torch

from unifusion_jax.models import internvl
from unifusion_jax.models.text_generation import generate, keep_top
from unifusion_jax.sharding import BATCH

TAPS = (0, 1, 3)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('vlm')
  torch_model('qwen2', attention_bias=True).save_pretrained(folder)
  return folder


@pytest.mark.slow
@pytest.mark.parametrize('text', ['qwen2', 'qwen3', 'llama', 'internlm2, a key for each query'])
def test_greedy_writes_what_transformers_writes(text, tmp_path):
  model = torch_model(text, attention_bias=True)
  model.save_pretrained(tmp_path)
  vlm, (tokens, valid, tiles) = internvl.load(tmp_path, jnp.float32), batch()
  out = generate(vlm, tokens, valid, tiles, max_new=64, stop_ids=())
  assert (np.asarray(out.lengths) == 64).all() and out.hidden is None and out.prompt_hidden is None
  # On which side the padding stands is no matter
  left = [np.stack([np.roll(x[row], x.shape[1] - n) for row, n in enumerate(np.asarray(valid).sum(1))])
          for x in (np.asarray(tokens), np.asarray(valid))]
  rolled = generate(vlm, *jax.device_put(left, P(BATCH)), tiles, max_new=64, stop_ids=())
  np.testing.assert_array_equal(rolled.ids, out.ids)
  tokens, valid, tiles, ours, logprobs = (np.asarray(x) for x in (tokens, valid, tiles, out.ids, out.logprobs))
  for row in range(len(tokens)):
    n = valid[row].sum()
    inputs = torch_inputs(tokens[row:row + 1, :n], valid[row:row + 1, :n], tiles[row:row + 1])
    with torch.no_grad():
      theirs = model.generate(**inputs, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0,
                              output_logits=True, return_dict_in_generate=True)
    np.testing.assert_array_equal(ours[row], theirs.sequences[0, n:].numpy(), err_msg=f'example {row}')
    wanted = [torch.log_softmax(scores[0], -1).max() for scores in theirs.logits]
    np.testing.assert_allclose(logprobs[row], wanted, atol=1e-4)


def test_states_equal_one_teacher_forced_pass(folder):
  vlm = internvl.load(folder, jnp.float32)
  tokens, valid, tiles = batch()
  out = generate(vlm, tokens, valid, tiles, max_new=9, stop_ids=(), taps=TAPS)
  whole = np.zeros((len(tokens), tokens.shape[1] + 9), np.int32)
  lengths = np.asarray(valid).sum(1)
  for row, n in enumerate(lengths):
    whole[row, :n], whole[row, n:n + 9] = np.asarray(tokens)[row, :n], np.asarray(out.ids)[row]
  known = np.arange(whole.shape[1]) < lengths[:, None] + 9
  forced = jax.jit(internvl.InternVL.hidden, static_argnums=3)(
      vlm, jax.device_put(whole, P(BATCH)), jax.device_put(known, P(BATCH)), TAPS, tiles)
  forced, prompt, written = (np.asarray(x) for x in (forced, out.prompt_hidden, out.hidden))
  scale = np.abs(forced).max()
  for row, n in enumerate(lengths):
    assert np.abs(prompt[row, :n] - forced[row, :n]).max() < 1e-5 * scale
    assert np.abs(written[row] - forced[row, n:n + 9]).max() < 1e-5 * scale


def test_stops(folder):
  """Each example ends with its own first stop token, and ending early changes nothing that was written before."""
  vlm = internvl.load(folder, jnp.float32)
  prompt = batch()
  free = generate(vlm, *prompt, max_new=12, stop_ids=(), taps=TAPS)
  tokens = np.asarray(free.ids)
  stops = (int(tokens[0, 2]), int(tokens[1, 4]))
  out = generate(vlm, *prompt, max_new=12, stop_ids=stops, taps=TAPS)
  lengths = np.asarray(out.lengths)
  for row in range(len(tokens)):
    n = next((i + 1 for i, token in enumerate(tokens[row]) if token in stops), 12)
    assert lengths[row] == n
    for ours, whole in ((out.ids, free.ids), (out.logprobs, free.logprobs), (out.hidden, free.hidden)):
      ours, whole = np.asarray(ours)[row], np.asarray(whole)[row]
      np.testing.assert_allclose(ours[:n], whole[:n], rtol=1e-5, atol=1e-5)
      assert not ours[n:].any()
  assert lengths[0] == 3


def test_padding_and_other_examples_change_nothing(folder):
  vlm = internvl.load(folder, jnp.float32)
  tokens, valid, tiles = (np.asarray(x) for x in batch())
  wider = np.pad(tokens, ((0, 0), (0, 5)), constant_values=7), np.pad(valid, ((0, 0), (0, 5)))
  wider = *wider, np.pad(tiles, ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0)), constant_values=np.nan)
  write = functools.partial(generate, vlm, max_new=8, stop_ids=())
  one = write(*jax.device_put((tokens, valid, tiles), P(BATCH)))
  two = write(*jax.device_put(tuple(x[::-1] for x in wider), P(BATCH)))
  np.testing.assert_array_equal(one.ids, np.asarray(two.ids)[::-1])


def test_sampling(folder):
  vlm = internvl.load(folder, jnp.float32)
  prompt = batch()
  write = functools.partial(generate, vlm, *prompt, max_new=8, stop_ids=())
  greedy = np.asarray(write().ids)
  # A nucleus too small for two tokens is greedy; the same key draws the same, another one does not
  np.testing.assert_array_equal(write(temperature=1.0, top_p=1e-6, key=jax.random.key(0)).ids, greedy)
  hot = functools.partial(write, temperature=3.0)
  np.testing.assert_array_equal(hot(key=jax.random.key(1)).ids, hot(key=jax.random.key(1)).ids)
  assert (np.asarray(hot(key=jax.random.key(1)).ids) != np.asarray(hot(key=jax.random.key(2)).ids)).any()
  with one_device():
    alone = generate(internvl.load(folder, jnp.float32), *(np.asarray(x) for x in prompt),
                     max_new=8, stop_ids=(), temperature=3.0, key=jax.random.key(1))
  np.testing.assert_array_equal(alone.ids, hot(key=jax.random.key(1)).ids)


def test_nucleus():
  probabilities = jnp.asarray([[0.1, 0.5, 0.3, 0.1], [0.97, 0.01, 0.01, 0.01]])
  for top_p, kept in ((0.4, [1, 1]), (0.6, [2, 1]), (0.85, [4, 1]), (1.0, [4, 4])):
    out = keep_top(jnp.log(probabilities), jnp.float32(top_p))
    np.testing.assert_array_equal(jnp.isfinite(out).sum(axis=1), kept, err_msg=str(top_p))


@pytest.mark.parametrize('wrong,said', [
    (dict(temperature=1.0), 'random key'), (dict(top_p=0.0), 'top_p'), (dict(max_new=0), 'at least 1'),
    (dict(max_new=300), '256 positions')])
def test_errors(folder, wrong, said):
  with pytest.raises(ValueError, match=said):
    generate(internvl.load(folder, jnp.float32), *batch(), **(dict(max_new=4, stop_ids=()) | wrong))
