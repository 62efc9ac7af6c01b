"""InternVL against transformers' own class, in both directions, and its invariants."""

import json

import jax
from jax import P
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from unifusion_jax import sharding
from unifusion_jax.models import internvl
from unifusion_jax.sharding import BATCH

PICTURE, TILE, TILE_TOKENS = 60, 32, 4
TEXTS = {
    'qwen2': dict(model_type='qwen2', num_key_value_heads=2),
    'qwen3': dict(model_type='qwen3', num_key_value_heads=4, head_dim=24),
    'llama': dict(model_type='llama', num_key_value_heads=2, rope_parameters=dict(
        rope_type='llama3', rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16)),
}


def torch_model(text: str, seed: int = 0, tied: bool = False, **vision):
  """A random InternVL of transformers whose every parameter matters."""
  config = transformers.InternVLConfig(
      vision_config=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                         image_size=[TILE, TILE], patch_size=[8, 8], **vision),
      text_config=dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, vocab_size=64,
                       max_position_embeddings=256, tie_word_embeddings=tied, **TEXTS[text]),
      image_token_id=PICTURE, image_seq_length=TILE_TOKENS, tie_word_embeddings=tied)
  torch.manual_seed(seed)
  model = transformers.InternVLForConditionalGeneration(config).eval()
  with torch.no_grad():
    for p in model.parameters():
      p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 1 else 0.15) + (1.0 if p.ndim == 1 else 0.0))
  return model


def batch(tiles_of=(2, 0, 1, 3), seed=0):
  """(tokens, valid, tiles) with that many pictures in each example, right padded, as sharded arrays."""
  rng = np.random.default_rng(seed)
  length = 6 + max(tiles_of) * TILE_TOKENS
  tokens, valid = np.zeros((len(tiles_of), length), np.int32), np.zeros((len(tiles_of), length), bool)
  for row, n in enumerate(tiles_of):
    ids = list(rng.integers(1, PICTURE, 3))
    for _ in range(n):
      ids += [PICTURE] * TILE_TOKENS
    ids += list(rng.integers(1, PICTURE, 1 + row % 3))
    tokens[row, :len(ids)], valid[row, :len(ids)] = ids, True
  tiles = rng.standard_normal((len(tiles_of), max(1, *tiles_of), TILE, TILE, 3)).astype(np.float32)
  return [jax.device_put(x, P(BATCH)) for x in (tokens, valid, tiles)]


def one_device():
  return jax.set_mesh(jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1]))


def torch_inputs(tokens, valid, tiles):
  tokens, valid, tiles = (np.array(x) for x in (tokens, valid, tiles))
  used = [tile for row, ids in enumerate(tokens) for tile in tiles[row, :(ids == PICTURE).sum() // TILE_TOKENS]]
  inputs = dict(input_ids=torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(valid).long())
  if used:
    inputs['pixel_values'] = torch.from_numpy(np.stack(used)).permute(0, 3, 1, 2)
  return inputs


def relative(ours, theirs, valid):
  ours, theirs, valid = np.asarray(ours), theirs.detach().float().numpy(), np.asarray(valid)
  return np.abs(ours - theirs)[valid].max() / np.abs(theirs[valid]).max()


@pytest.mark.parametrize('text,vision', [
    ('qwen2', dict(attention_bias=True)), ('qwen3', dict(use_qk_norm=True)),
    ('llama', dict(norm_type='rms_norm', attention_bias=True, use_qk_norm=True))])
def test_parity(text, vision, tmp_path):
  model = torch_model(text, tied=text == 'qwen3', **vision)
  model.save_pretrained(tmp_path / 'theirs')
  vlm = internvl.load(tmp_path / 'theirs', jnp.float32, unroll=text == 'llama')
  tokens, valid, tiles = batch()
  with torch.no_grad():
    theirs = model(**torch_inputs(tokens, valid, tiles), output_hidden_states=True)
  hidden = jax.jit(internvl.InternVL.hidden, static_argnums=3)(vlm, tokens, valid, (0, 1, 3), tiles)
  for i, tap in enumerate((0, 1, 3)):
    assert relative(hidden[:, :, i], theirs.hidden_states[tap], valid) < 1e-5, tap
  logits = jax.jit(internvl.InternVL.logits)(vlm, tokens, valid, tiles)
  assert relative(logits, theirs.logits, valid) < 1e-5

  internvl.save(vlm, tmp_path / 'ours')
  again = transformers.InternVLForConditionalGeneration.from_pretrained(tmp_path / 'ours').eval()
  with torch.no_grad():
    logits = again(**torch_inputs(tokens, valid, tiles)).logits
  assert torch.equal(logits, theirs.logits)
  ours = json.loads((tmp_path / 'ours' / 'config.json').read_text())
  assert internvl.InternVLConfig.from_json(ours) == internvl.InternVLConfig.from_json(
      json.loads((tmp_path / 'theirs' / 'config.json').read_text()))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('vlm')
  torch_model('qwen2', attention_bias=True).save_pretrained(folder)
  return folder


def test_one_device_equals_eight(folder):
  tokens, valid, tiles = batch()
  taps = (0, 2, 4)
  hidden = jax.jit(internvl.InternVL.hidden, static_argnums=3)
  sharded = hidden(internvl.load(folder, jnp.float32), tokens, valid, taps, tiles)
  with one_device():
    inputs = [np.asarray(x) for x in (tokens, valid, tiles)]
    alone = hidden(internvl.load(folder, jnp.float32), *inputs[:2], taps, inputs[2])
  np.testing.assert_allclose(sharded, alone, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing(folder):
  """Neither what stands on padded places, nor tiles that no token asks for, nor which side the padding is on."""
  vlm = internvl.load(folder, jnp.float32)
  tokens, valid, tiles = (np.asarray(x) for x in batch())
  lengths = valid.sum(1)
  hidden = jax.jit(internvl.InternVL.hidden, static_argnums=3)
  noise = np.where(valid, tokens, PICTURE).astype(np.int32)
  spoiled = tiles.copy()
  for row in range(len(tokens)):
    spoiled[row, (tokens[row] == PICTURE).sum() // TILE_TOKENS:] = 1e6
  left = [np.stack([np.roll(x[row], x.shape[1] - n) for row, n in enumerate(lengths)]) for x in (tokens, valid)]
  one, two, three = (np.asarray(hidden(vlm, *jax.device_put((a, b), P(BATCH)), (1, 4), jax.device_put(c, P(BATCH))))
                     for a, b, c in ((tokens, valid, tiles), (noise, valid, spoiled), (*left, tiles)))
  np.testing.assert_array_equal(one[valid], two[valid])
  np.testing.assert_allclose(one[valid], three[left[1]], rtol=1e-4, atol=1e-5)


def test_missing_tiles_are_not_silent(folder):
  tokens, valid, tiles = batch((2, 0, 1, 2))
  logits = internvl.load(folder, jnp.float32).logits(tokens, valid, tiles[:, :1])
  bad = np.isnan(np.asarray(logits)).any(axis=(1, 2))
  np.testing.assert_array_equal(bad, [True, False, False, True])


def test_gradients_reach_every_parameter(folder):
  vlm = internvl.load(folder, jnp.float32)
  tokens, valid, tiles = batch()
  grads = jax.jit(jax.grad(lambda vlm: jnp.mean(jax.nn.log_softmax(vlm.logits(tokens, valid, tiles)) ** 2)))(vlm)
  for (path, grad), leaf in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(vlm)):
    assert jax.typeof(grad) == jax.typeof(leaf), path
    if 'bk' not in jax.tree_util.keystr(path):  # softmax does not see what is added to all keys alike
      assert np.abs(np.asarray(grad)).reshape(len(grad), -1).max() > 1e-9, path


@pytest.mark.parametrize('key,value,said', [
    ('vision_feature_layer', -2, 'vision_feature_layer=-2'), ('projector_hidden_act', 'relu', 'projector_hidden_act'),
    ('text_config', dict(model_type='gemma'), "'gemma'")])
def test_config_errors(folder, key, value, said):
  config = json.loads((folder / 'config.json').read_text())
  with pytest.raises(ValueError, match=said):
    internvl.InternVLConfig.from_json(config | {key: value})
