"""InternVL against transformers' own class, in both directions, and its invariants."""

import dataclasses
import json

from flax import nnx
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
from unifusion_jax.weights import safetensors_io

IMAGE, TILE, TILE_TOKENS = 60, 32, 4
TEXTS = {
    'qwen2': dict(model_type='qwen2', num_key_value_heads=2),
    'qwen3': dict(model_type='qwen3', num_key_value_heads=4, head_dim=24),
    'qwen2, a key for each query': dict(model_type='qwen2', num_key_value_heads=4),
    'qwen3, shared keys': dict(model_type='qwen3', num_key_value_heads=2, head_dim=16),
    'internlm2': dict(model_type='llama', num_key_value_heads=2, rope_theta=1e6),
    'internlm2, a key for each query': dict(model_type='llama', num_key_value_heads=4, rope_theta=1e6),
    'llama': dict(model_type='llama', num_key_value_heads=2, rope_parameters=dict(
        rope_type='llama3', rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16)),
}


def torch_model(text: str, seed: int = 0, tied: bool = False, **vision):
  """A random InternVL of transformers whose every parameter matters."""
  config = transformers.InternVLConfig(
      vision_config=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                         image_size=[TILE, TILE], patch_size=[8, 8]) | vision,
      text_config=dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, vocab_size=64,
                       max_position_embeddings=256, tie_word_embeddings=tied, **TEXTS[text]),
      image_token_id=IMAGE, image_seq_length=TILE_TOKENS, tie_word_embeddings=tied)
  torch.manual_seed(seed)
  model = transformers.InternVLForConditionalGeneration(config).eval()
  with torch.no_grad():
    for p in model.parameters():
      p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 1 else 0.15) + (1.0 if p.ndim == 1 else 0.0))
  return model


def batch(tiles_of=(2, 0, 1, 3), seed=0):
  """(tokens, valid, tiles) with that many images in each example, right padded, as sharded arrays."""
  rng = np.random.default_rng(seed)
  length = 6 + max(tiles_of) * TILE_TOKENS
  tokens, valid = np.zeros((len(tiles_of), length), np.int32), np.zeros((len(tiles_of), length), bool)
  for row, n in enumerate(tiles_of):
    ids = list(rng.integers(1, IMAGE, 3))
    for _ in range(n):
      ids += [IMAGE] * TILE_TOKENS
    ids += list(rng.integers(1, IMAGE, 1 + row % 3))
    tokens[row, :len(ids)], valid[row, :len(ids)] = ids, True
  tiles = rng.standard_normal((len(tiles_of), max(1, *tiles_of), TILE, TILE, 3)).astype(np.float32)
  return [jax.device_put(x, P(BATCH)) for x in (tokens, valid, tiles)]


def one_device():
  return jax.set_mesh(jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1]))


def torch_inputs(tokens, valid, tiles):
  tokens, valid, tiles = (np.array(x) for x in (tokens, valid, tiles))
  used = [tile for row, ids in enumerate(tokens) for tile in tiles[row, :(ids == IMAGE).sum() // TILE_TOKENS]]
  inputs = dict(input_ids=torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(valid).long())
  if used:
    inputs['pixel_values'] = torch.from_numpy(np.stack(used)).permute(0, 3, 1, 2)
  return inputs


def relative(ours, theirs, valid):
  ours, theirs, valid = np.asarray(ours), theirs.detach().float().numpy(), np.asarray(valid)
  return np.abs(ours - theirs)[valid].max() / np.abs(theirs[valid]).max()


@pytest.mark.parametrize('text,vision', [
    ('qwen2', dict(attention_bias=True)), ('qwen3', dict(use_qk_norm=True)),
    ('llama', dict(norm_type='rms_norm', attention_bias=True, use_qk_norm=True)),
    ('qwen2, a key for each query', dict(attention_bias=True, num_attention_heads=4)),
    ('qwen3, shared keys', dict(hidden_size=48, num_hidden_layers=3, intermediate_size=40))])
def test_parity(text, vision, tmp_path):
  model = torch_model(text, tied=text == 'qwen3', **vision)
  model.save_pretrained(tmp_path / 'theirs')
  vlm = internvl.load(tmp_path / 'theirs', jnp.float32)
  tokens, valid, tiles = batch()
  with torch.no_grad():
    theirs = model(**torch_inputs(tokens, valid, tiles), output_hidden_states=True)
  hidden = jax.jit(internvl.InternVL.hidden, static_argnums=3)(vlm, tokens, valid, (0, 1, 2, 3), tiles)
  for tap in range(4):
    assert relative(hidden[:, :, tap], theirs.hidden_states[tap], valid) < 1e-5, tap
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


def test_parity_text_only(folder):
  """Without images at all, the padding on the left."""
  tokens, valid, _ = (np.asarray(x) for x in batch((0, 0, 0, 0)))
  lengths = valid.sum(1)
  tokens, valid = (np.stack([np.roll(x[row], x.shape[1] - n) for row, n in enumerate(lengths)])
                   for x in (tokens, valid))
  positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
  with torch.no_grad():
    theirs = torch_model('qwen2', attention_bias=True)(
        input_ids=torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(valid).long(),
        position_ids=torch.from_numpy(positions), output_hidden_states=True)
  vlm = internvl.load(folder, jnp.float32)
  hidden = jax.jit(internvl.InternVL.hidden, static_argnums=3)(
      vlm, *jax.device_put((tokens, valid), P(BATCH)), (0, 1, 2, 3))
  for tap in range(4):
    assert relative(hidden[:, :, tap], theirs.hidden_states[tap], valid) < 1e-5, tap


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


def test_frozen_bfloat16(folder):
  """The default dtype of `load`: everything in bfloat16, near the f32 states."""
  tokens, valid, tiles = batch()
  hidden = jax.jit(internvl.InternVL.hidden, static_argnums=3)
  exact = np.asarray(hidden(internvl.load(folder, jnp.float32), tokens, valid, (1, 4), tiles))[np.asarray(valid)]
  vlm = internvl.load(folder)
  half = hidden(vlm, tokens, valid, (1, 4), tiles)
  assert half.dtype == jnp.bfloat16 and all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(vlm))
  half = np.asarray(half.astype(jnp.float32))[np.asarray(valid)]
  assert np.linalg.norm(half - exact) < 0.05 * np.linalg.norm(exact)


def test_padding_changes_nothing(folder):
  """Neither what stands on padded places, nor tiles that no token asks for, nor which side the padding is on."""
  vlm = internvl.load(folder, jnp.float32)
  tokens, valid, tiles = (np.asarray(x) for x in batch())
  lengths = valid.sum(1)
  hidden = jax.jit(internvl.InternVL.hidden, static_argnums=3)
  noise = np.where(valid, tokens, IMAGE).astype(np.int32)
  spoiled = tiles.copy()
  for row in range(len(tokens)):
    spoiled[row, (tokens[row] == IMAGE).sum() // TILE_TOKENS:] = 1e6
  left = [np.stack([np.roll(x[row], x.shape[1] - n) for row, n in enumerate(lengths)]) for x in (tokens, valid)]
  one, two, three = (np.asarray(hidden(vlm, *jax.device_put((a, b), P(BATCH)), (1, 4), jax.device_put(c, P(BATCH))))
                     for a, b, c in ((tokens, valid, tiles), (noise, valid, spoiled), (*left, tiles)))
  np.testing.assert_array_equal(one[valid], two[valid])
  np.testing.assert_allclose(one[valid], three[left[1]], rtol=1e-4, atol=1e-5)


def test_uint8_tiles_are_normalised_on_the_device_as_on_the_host(folder):
  """By the config's own mean and standard deviation; the processor of transformers is the host."""
  vlm = internvl.load(folder, jnp.float32)
  vlm.config = dataclasses.replace(vlm.config, vision=dataclasses.replace(
      vlm.config.vision, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4)))
  pixels = np.random.default_rng(0).integers(0, 256, (4, 2, TILE, TILE, 3), np.uint8)
  host = transformers.image_transforms.normalize(pixels / np.float32(255), (0.1, 0.5, 0.9), (0.2, 0.3, 0.4),
                                                 input_data_format='channels_last').astype(np.float32)
  features = jax.jit(internvl.InternVL.image_features)
  ours, wanted = (np.asarray(features(vlm, jax.device_put(x, P(BATCH)))) for x in (pixels, host))
  np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)
  # and within a prompt, where both are taken
  tokens, valid, _ = batch((2, 0, 1, 2))
  ours, wanted = (np.asarray(jax.jit(internvl.InternVL.last)(vlm, tokens, valid, jax.device_put(x, P(BATCH))))
                  for x in (pixels, host))
  np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4)


def test_missing_tiles_are_not_silent(folder):
  tokens, valid, tiles = batch((2, 0, 1, 2))
  logits = jax.jit(internvl.InternVL.logits)(internvl.load(folder, jnp.float32), tokens, valid, tiles[:, :1])
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


def original_layout(model, folder, internlm2=False):
  """Writes a transformers model in OpenGVLab's layout, fusing by the formulas of their modeling files."""
  text, vision = model.config.text_config, model.config.vision_config
  heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
  names = {
      'model.multi_modal_projector.layer_norm.': 'mlp1.0.', 'model.multi_modal_projector.linear_1.': 'mlp1.1.',
      'model.multi_modal_projector.linear_2.': 'mlp1.3.', 'model.vision_tower.embeddings.cls_token':
      'vision_model.embeddings.class_embedding', 'model.vision_tower.embeddings.position_embeddings':
      'vision_model.embeddings.position_embedding', 'model.vision_tower.embeddings.patch_embeddings.projection.':
      'vision_model.embeddings.patch_embedding.', 'model.vision_tower.encoder.layer.': 'vision_model.encoder.layers.',
      '.lambda_': '.ls', '.layernorm_before.': '.norm1.', '.layernorm_after.': '.norm2.', '.attention.': '.attn.',
      '.projection_layer.': '.proj.', 'lm_head.': 'language_model.lm_head.', 'model.language_model.':
      'language_model.model.'}
  if internlm2:
    names |= {'.embed_tokens.': '.tok_embeddings.', 'language_model.lm_head.': 'language_model.output.',
              '.input_layernorm.': '.attention_norm.', '.post_attention_layernorm.': '.ffn_norm.', '.mlp.gate_proj.':
              '.feed_forward.w1.', '.mlp.up_proj.': '.feed_forward.w3.', '.mlp.down_proj.': '.feed_forward.w2.',
              '.self_attn.o_proj.': '.attention.wo.'}
  tensors = {}
  for name, x in model.state_dict().items():
    for theirs, original in names.items():
      name = name.replace(theirs, original)
    tensors[name] = x.numpy()
  for name in list(tensors):
    if '.attn.q_proj.' in name:
      parts = [tensors.pop(name.replace('.q_proj.', f'.{part}_proj.')) for part in 'qkv']
      tensors[name.replace('.q_proj.', '.qkv.')] = np.concatenate(parts)
    if '.self_attn.q_proj.' in name and internlm2:
      q, k, v = (tensors.pop(name.replace('.q_proj.', f'.{part}_proj.')) for part in 'qkv')
      grouped = [q.reshape(kv_heads, heads // kv_heads, -1, q.shape[1])]
      grouped += [x.reshape(kv_heads, 1, -1, q.shape[1]) for x in (k, v)]
      fused = np.concatenate(grouped, 1).reshape(-1, q.shape[1])
      tensors[name.replace('.self_attn.q_proj.', '.attention.wqkv.')] = fused
  if internlm2:
    tensors['language_model.model.layers.0.attention.rotary_emb.inv_freq'] = np.ones(6, np.float32)
  safetensors_io.write(folder / 'model.safetensors', tensors)
  llm = text.to_dict() | ({'model_type': 'internlm2', 'bias': False} if internlm2 else {})
  vit = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=TILE,
             patch_size=8, hidden_act='gelu', layer_norm_eps=1e-6, qkv_bias=vision.attention_bias,
             qk_normalization=vision.use_qk_norm, norm_type=vision.norm_type)
  (folder / 'config.json').write_text(json.dumps(dict(
      model_type='internvl_chat', llm_config=llm, vision_config=vit, downsample_ratio=0.5, select_layer=-1,
      ps_version='v2', force_image_size=TILE, use_backbone_lora=0, use_llm_lora=0)))
  (folder / 'added_tokens.json').write_text(json.dumps({'<img>': IMAGE - 1, '<IMG_CONTEXT>': IMAGE}))


@pytest.mark.parametrize('text,internlm2,vision', [
    ('qwen2', False, dict(attention_bias=True)), ('qwen3', False, dict(norm_type='rms_norm', use_qk_norm=True)),
    ('internlm2', True, dict(attention_bias=True)),
    ('internlm2, a key for each query', True, dict(attention_bias=True))])
def test_original_layout(text, internlm2, vision, tmp_path):
  model = torch_model(text, **vision)
  original_layout(model, tmp_path, internlm2)
  vlm = internvl.load(tmp_path, jnp.float32)
  tokens, valid, tiles = batch()
  with torch.no_grad():
    theirs = model(**torch_inputs(tokens, valid, tiles), output_hidden_states=True)
  hidden = jax.jit(internvl.InternVL.hidden, static_argnums=3)(vlm, tokens, valid, (0, 1, 2, 3), tiles)
  for tap in range(4):
    assert relative(hidden[:, :, tap], theirs.hidden_states[tap], valid) < 1e-5, tap
  theirs = theirs.logits
  assert relative(jax.jit(internvl.InternVL.logits)(vlm, tokens, valid, tiles), theirs, valid) < 1e-5
  # and from there to the layout that transformers reads
  internvl.save(vlm, tmp_path / 'hf')
  again = transformers.InternVLForConditionalGeneration.from_pretrained(tmp_path / 'hf').eval()
  with torch.no_grad():
    assert relative(again(**torch_inputs(tokens, valid, tiles)).logits, theirs, valid) < 1e-6


@pytest.mark.parametrize('level', [None, 'text_config'])
def test_a_missing_head_is_tied_only_where_no_config_denies_it(level, tmp_path):
  torch_model('qwen3', tied=True).save_pretrained(tmp_path)
  assert internvl.load(tmp_path).config.text.tied
  config = json.loads((tmp_path / 'config.json').read_text())
  (config[level] if level else config)['tie_word_embeddings'] = False
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match='missing: language_model.lm_head.weight, for our decoder/head'):
    internvl.load(tmp_path)


def test_an_original_without_its_head(tmp_path):
  original_layout(torch_model('internlm2', attention_bias=True), tmp_path, internlm2=True)
  tensors = {name: tensor[:] for name, tensor in safetensors_io.read(tmp_path).items()}
  del tensors['language_model.output.weight']
  safetensors_io.write(tmp_path / 'model.safetensors', tensors)
  with pytest.raises(ValueError, match='missing: language_model.output.weight'):
    internvl.load(tmp_path)


def test_original_layout_errors(tmp_path):
  original_layout(torch_model('qwen2'), tmp_path)
  config = json.loads((tmp_path / 'config.json').read_text())
  for change, said in ((dict(ps_version='v1'), "ps_version='v1'"), (dict(select_layer=-4), 'vision_feature_layer=-4'),
                       (dict(force_image_size=64), 'force_image_size=64')):
    (tmp_path / 'config.json').write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=said):
      internvl.load(tmp_path)
  (tmp_path / 'added_tokens.json').unlink()
  with pytest.raises(ValueError, match='<IMG_CONTEXT>'):
    internvl.load(tmp_path)
  (tmp_path / 'tokenizer.json').write_text(json.dumps(dict(added_tokens=[dict(id=7, content='<IMG_CONTEXT>')])))
  assert internvl.image_token(tmp_path) == 7


@pytest.mark.parametrize('mesh', [None])  # instead of the eight devices
@pytest.mark.parametrize('name,billions', [
    ('InternVL2_5-1B', 0.938), ('InternVL2_5-2B', 2.21), ('InternVL2_5-4B', 3.71), ('InternVL2_5-8B', 8.08),
    ('InternVL3-1B', 0.938), ('InternVL3-2B', 2.09), ('InternVL3-8B', 7.94), ('InternVL3-14B', 15.1),
    ('InternVL3_5-1B', 1.06), ('InternVL3_5-2B', 2.35), ('InternVL3_5-4B', 4.73), ('InternVL3_5-8B', 8.53),
    ('InternVL3_5-14B', 15.1), ('InternVL3_5-38B', 38.4)])
def test_presets_type_check_at_full_size(mesh, name, billions):
  """Every public size has the published number of parameters and runs, abstractly, on 256 chips."""
  config = internvl.PRESETS[name]
  mesh = sharding.abstract_mesh(sharding.MeshConfig(data=1, fsdp=64, tp=4), 256)
  with jax.sharding.use_abstract_mesh(mesh):
    vlm = jax.eval_shape(lambda: internvl.InternVL(config, jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(vlm)) == pytest.approx(billions * 1e9, rel=0.01)
    rows = jax.NamedSharding(mesh, P(BATCH))
    tokens, valid, tiles = (jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for shape, dtype in (
        ((256, 700), jnp.int32), ((256, 700), bool), ((256, 2, 448, 448, 3), jnp.float32)))
    taps = tuple(range(4, config.text.depth, 6))
    hidden = jax.eval_shape(lambda *x: internvl.InternVL.hidden(*x[:3], taps, x[3]), vlm, tokens, valid, tiles)
    logits = jax.eval_shape(internvl.InternVL.logits, vlm, tokens, valid, tiles)
  assert hidden.shape == (256, 700, len(taps), config.text.width) and hidden.sharding.spec[0] == BATCH
  assert logits.shape == (256, 700, config.text.vocab) and config.tile_tokens == 256
