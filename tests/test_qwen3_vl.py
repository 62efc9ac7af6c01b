"""Qwen3-VL against transformers' own classes (model, generation), and its invariants."""

import dataclasses
import json
import shutil

from flax import nnx
import jax
from jax import P
import jax.numpy as jnp
import numpy as np
import pytest
from test_internvl import one_device, relative
import torch
import transformers

from unifusion_jax import sharding
from unifusion_jax.models import attention, qwen3_vl
from unifusion_jax.models.qwen3_vl import PackedImages, Qwen3VL
from unifusion_jax.models.text_generation import generate
from unifusion_jax.sharding import BATCH
from unifusion_jax.weights import safetensors_io

IMAGE, PATCH = 60, 4
MIXED = ([(4, 6), (2, 2)], [], [(6, 4)], [(2, 10)])  # rows and columns of patches of each example's images
HIDDEN = jax.jit(Qwen3VL.hidden, static_argnums=3)
VARIANTS = {
    'three': dict(text=dict(num_key_value_heads=2, head_dim=24, tie_word_embeddings=True), sections=[6, 3, 3],
                  vision=dict(num_position_embeddings=25, deepstack_visual_indexes=[0, 1, 2])),
    'one': dict(text=dict(num_key_value_heads=4, head_dim=16), sections=[4, 2, 2],
                vision=dict(num_position_embeddings=16, deepstack_visual_indexes=[1])),
}


def torch_model(variant: str = 'three'):
  """A random Qwen3-VL of transformers whose every parameter matters."""
  v = VARIANTS[variant]
  config = transformers.Qwen3VLConfig(
      vision_config=dict(hidden_size=32, depth=3, num_heads=2, intermediate_size=48, patch_size=PATCH,
                         out_hidden_size=48, **v['vision']),
      text_config=dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, vocab_size=64,
                       max_position_embeddings=256, rope_parameters=dict(
                           rope_type='default', rope_theta=1e4, mrope_section=v['sections'], mrope_interleaved=True),
                       **v['text']),
      image_token_id=IMAGE, video_token_id=61, tie_word_embeddings='tie_word_embeddings' in v['text'])
  torch.manual_seed(0)
  model = transformers.Qwen3VLForConditionalGeneration(config).eval()
  with torch.no_grad():
    for p in model.parameters():
      p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 1 else 0.15) + (1.0 if p.ndim == 1 else 0.0))
  return model


def batch(grids_of=MIXED, room=40, most=3):
  """(tokens, valid, images) with images of those grids in each example, right padded, as sharded arrays."""
  rng = np.random.default_rng(0)
  b = len(grids_of)
  tokens, valid = np.zeros((b, 26), np.int32), np.zeros((b, 26), bool)
  patches = rng.standard_normal((b, room, 6 * PATCH ** 2)).astype(np.float32)
  grids = np.zeros((b, most, 2), np.int32)
  for row, shapes in enumerate(grids_of):
    ids = list(rng.integers(1, IMAGE, 3))
    for i, (y, x) in enumerate(shapes):
      ids += [IMAGE] * (y * x // 4) + list(rng.integers(1, IMAGE, 1 + row % 2))
      grids[row, i] = y, x
    ids += list(rng.integers(1, IMAGE, 2 + row))
    tokens[row, :len(ids)], valid[row, :len(ids)] = ids, True
  return jax.device_put((tokens, valid, PackedImages(patches, grids)), P(BATCH))


def torch_inputs(tokens, valid, images):
  tokens, valid, patches, grids = (np.array(x) for x in (tokens, valid, *images))
  inputs = dict(input_ids=torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(valid).long())
  used = [patches[row, :grids[row].prod(-1).sum()] for row in range(len(tokens))]
  grids = [(1, y, x) for row in grids for y, x in row if y]
  if grids:
    inputs |= dict(pixel_values=torch.from_numpy(np.concatenate(used)), image_grid_thw=torch.tensor(grids),
                   mm_token_type_ids=torch.from_numpy((tokens == IMAGE) & valid).int())
  return inputs


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('vlm')
  torch_model().save_pretrained(folder)
  return folder


@pytest.mark.slow
@pytest.mark.parametrize('variant', VARIANTS)
def test_parity(variant, tmp_path):
  model = torch_model(variant)
  model.save_pretrained(tmp_path / 'theirs')
  vlm = qwen3_vl.load(tmp_path / 'theirs', jnp.float32)
  tokens, valid, images = batch()
  with torch.no_grad():
    theirs = model(**torch_inputs(tokens, valid, images), output_hidden_states=True)
  hidden = HIDDEN(vlm, tokens, valid, (0, 1, 2, 3), images)
  for tap in range(4):
    assert relative(hidden[:, :, tap], theirs.hidden_states[tap], valid) < 1e-5, tap
  logits = jax.jit(Qwen3VL.logits)(vlm, tokens, valid, images)
  assert relative(logits, theirs.logits, valid) < 1e-5

  qwen3_vl.save(vlm, tmp_path / 'ours')
  again = transformers.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / 'ours').eval()
  with torch.no_grad():
    logits = again(**torch_inputs(tokens, valid, images)).logits
  assert torch.equal(logits, theirs.logits)
  ours, theirs = (json.loads((tmp_path / which / 'config.json').read_text()) for which in ('ours', 'theirs'))
  assert qwen3_vl.Qwen3VLConfig.from_json(ours) == qwen3_vl.Qwen3VLConfig.from_json(theirs)


def test_parity_text_only(folder):
  """Without images at all, and with an array of images that is empty."""
  tokens, valid, images = batch(([], [], [], []))
  with torch.no_grad():
    theirs = torch_model()(**torch_inputs(tokens, valid, images), output_hidden_states=True)
  vlm = qwen3_vl.load(folder, jnp.float32)
  for tiles in (None, images):
    hidden = HIDDEN(vlm, tokens, valid, (0, 1, 2, 3), tiles)
    for tap in range(4):
      assert relative(hidden[:, :, tap], theirs.hidden_states[tap], valid) < 1e-5, tap


@pytest.mark.parametrize('levels', [(True, True), (True, False), (False, True), (False, False)])
def test_a_class_without_a_head(folder, levels, tmp_path):
  """Qwen3VLModel, as in the text_encoder of Krea 2: no `model.` before the names, and no head."""
  torch_model().model.save_pretrained(tmp_path)
  described = json.loads((tmp_path / 'config.json').read_text())
  described['tie_word_embeddings'], described['text_config']['tie_word_embeddings'] = levels
  (tmp_path / 'config.json').write_text(json.dumps(described))
  assert 'language_model.embed_tokens.weight' in safetensors_io.read(tmp_path)
  if not any(levels):
    with pytest.raises(ValueError, match='saved from a class without a head'):
      qwen3_vl.load(tmp_path)
    return
  base, whole = qwen3_vl.load(tmp_path), qwen3_vl.load(folder)
  assert base.config == whole.config
  for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(whole)):
    np.testing.assert_array_equal(a, b)


def test_a_missing_head_is_tied_only_where_no_config_denies_it(folder, tmp_path):
  shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
  described = json.loads((tmp_path / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(described | dict(tie_word_embeddings=False)))
  with pytest.raises(ValueError, match='missing: lm_head.weight, for our decoder/head'):
    qwen3_vl.load(tmp_path)


def test_greedy_writes_what_transformers_writes(folder):
  tokens, valid, images = batch()
  vlm = qwen3_vl.load(folder, jnp.float32)
  out = generate(vlm, tokens, valid, images, max_new=64, stop_ids=(), taps=(1, 4))
  model = torch_model()
  for row in range(len(tokens)):
    n = int(np.asarray(valid)[row].sum())
    one = [np.asarray(x)[row:row + 1] for x in (tokens, valid, *images)]
    with torch.no_grad():
      theirs = model.generate(**torch_inputs(one[0][:, :n], one[1][:, :n], one[2:]), max_new_tokens=64,
                              do_sample=False, eos_token_id=None, pad_token_id=0)
    np.testing.assert_array_equal(np.asarray(out.ids)[row], theirs[0, n:].numpy(), err_msg=f'example {row}')
  np.testing.assert_allclose(out.prompt_hidden, HIDDEN(vlm, tokens, valid, (1, 4), images), rtol=1e-4, atol=1e-4)
  # The states while writing are those of one pass over the whole
  lengths, written = np.asarray(valid).sum(1), np.asarray(out.ids)
  whole = np.pad(np.asarray(tokens), ((0, 0), (0, 64)))
  for row, n in enumerate(lengths):
    whole[row, n:n + 64] = written[row]
  # A word of these that is the image's id would be taken for an image
  assert not (written == IMAGE).any()
  known = np.arange(whole.shape[1]) < lengths[:, None] + 64
  forced = np.asarray(HIDDEN(vlm, *jax.device_put((whole, known), P(BATCH)), (1, 4), images))
  for row, n in enumerate(lengths):
    np.testing.assert_allclose(np.asarray(out.hidden)[row], forced[row, n:n + 64], rtol=1e-4,
                               atol=1e-4 * np.abs(forced).max())


def test_one_device_equals_eight(folder):
  tokens, valid, images = batch()
  sharded = HIDDEN(qwen3_vl.load(folder, jnp.float32), tokens, valid, (1, 4), images)
  with one_device():
    inputs = jax.tree.map(np.asarray, (tokens, valid, images))
    alone = HIDDEN(qwen3_vl.load(folder, jnp.float32), *inputs[:2], (1, 4), inputs[2])
  np.testing.assert_allclose(sharded, alone, rtol=1e-4, atol=1e-4)


def test_padding_changes_nothing(folder):
  """Neither what stands on padded places, nor patches of no image, nor which side the padding is on."""
  vlm = qwen3_vl.load(folder, jnp.float32)
  tokens, valid, images = jax.tree.map(np.asarray, batch())
  lengths = valid.sum(1)
  spoiled = images.patches.copy()
  for row in range(len(tokens)):
    spoiled[row, images.grids[row].prod(-1).sum():] = 1e6
  noise = np.where(valid, tokens, IMAGE).astype(np.int32)
  left = [np.stack([np.roll(x[row], x.shape[1] - n) for row, n in enumerate(lengths)]) for x in (tokens, valid)]
  one, two, three = (np.asarray(HIDDEN(vlm, *jax.device_put((a, b), P(BATCH)), (1, 4),
                                       jax.device_put(PackedImages(c, images.grids), P(BATCH))))
                     for a, b, c in ((tokens, valid, images.patches), (noise, valid, spoiled),
                                     (*left, images.patches)))
  np.testing.assert_array_equal(one[valid], two[valid])
  np.testing.assert_allclose(one[valid], three[left[1]], rtol=1e-4, atol=1e-4)


def test_patches_in_blocks_see_the_same(folder, monkeypatch):
  """In three blocks of 14 patches, the last one padded, and in one of all 40."""
  vlm = qwen3_vl.load(folder, jnp.float32)
  _, _, images = batch()
  dense = jax.jit(lambda vlm, *x: vlm.vision(*x))(vlm, *images)
  monkeypatch.setattr(attention, 'LOGITS', 4 * 16 * 40 * 2)  # of one row and two heads a device
  blocks = jax.jit(lambda vlm, *x: vlm.vision(*x))(vlm, *images)
  assert blocks.sharding == dense.sharding
  np.testing.assert_allclose(blocks, dense, rtol=1e-5, atol=1e-5)
  jaxpr = jax.make_jaxpr(lambda vlm, *x: vlm.vision(*x))(vlm, *images)
  assert '40,40' not in str(jaxpr) and '14,40' in str(jaxpr)


def test_uint8_patches_are_normalised_on_the_device_as_on_the_host(folder):
  """Channel by channel, each of which a patch has in one piece, by the config's own mean and standard deviation."""
  vlm = qwen3_vl.load(folder, jnp.float32)
  mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
  vlm.config = dataclasses.replace(vlm.config, vision=dataclasses.replace(vlm.config.vision, mean=mean, std=std))
  _, _, images = batch()
  pixels = np.random.default_rng(0).integers(0, 256, (4, 40, 3, 2 * PATCH ** 2), np.uint8)
  host = (pixels.astype(np.float32) / 255 - np.float32(mean)[:, None]) / np.float32(std)[:, None]
  features = jax.jit(Qwen3VL.image_features)
  ours, wanted = (np.asarray(features(vlm, PackedImages(jax.device_put(x.reshape(4, 40, -1), P(BATCH)),
                                                        images.grids)).features) for x in (pixels, host))
  used = np.arange(10) < (np.asarray(images.grids).prod(-1).sum(1) // 4)[:, None]
  np.testing.assert_allclose(ours[used], wanted[used], rtol=1e-4, atol=1e-4)


def test_missing_images_are_not_silent(folder):
  """More image tokens than images give NaN, in that example alone; images that no token asks for are unused."""
  vlm = qwen3_vl.load(folder, jnp.float32)
  tokens, valid, images = batch()
  grids = np.array(images.grids)
  grids[0, 1] = 0
  one_short = tokens, valid, PackedImages(images.patches, jax.device_put(grids, P(BATCH)))
  too_large = batch([*MIXED[:2], [(6, 8)], MIXED[3]])  # 48 patches where there is room for 40
  for inputs, bad in ((one_short, [True, False, False, False]), (too_large, [False, False, True, False])):
    hidden = np.asarray(HIDDEN(vlm, *inputs[:2], (1, 4), inputs[2]))
    np.testing.assert_array_equal(np.isnan(hidden).any(axis=(1, 2, 3)), bad)
  with pytest.raises(ValueError, match='multiple of 4'):
    vlm.image_features(PackedImages(images.patches[:, :18], images.grids))


def test_gradients_have_the_parameters_types(folder):
  vlm = qwen3_vl.load(folder, jnp.float32)
  grads = jax.eval_shape(jax.grad(lambda vlm, *x: jnp.mean(vlm.logits(*x) ** 2)), vlm, *batch())
  for (path, grad), leaf in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(vlm)):
    assert jax.typeof(grad) == jax.typeof(leaf), path


@pytest.mark.parametrize('part,change,said', [
    ('vision_config', dict(hidden_act='gelu'), "hidden_act='gelu'"),
    ('vision_config', dict(deepstack_visual_indexes=[]), 'deepstack_visual_indexes'),
    ('vision_config', dict(num_position_embeddings=24), 'no square'),
    ('text_config', dict(model_type='qwen3_vl_moe_text'), 'qwen3_vl_moe_text')])
def test_config_errors(folder, part, change, said):
  config = json.loads((folder / 'config.json').read_text())
  with pytest.raises(ValueError, match=said):
    qwen3_vl.Qwen3VLConfig.from_json(config | {part: config[part] | change})


@pytest.mark.parametrize('mesh', [None])  # instead of the eight devices
@pytest.mark.parametrize('name,billions', [
    ('Qwen3-VL-2B-Instruct', 2.127), ('Qwen3-VL-4B-Instruct', 4.438), ('Qwen3-VL-8B-Instruct', 8.767)])
def test_presets_type_check_at_full_size(mesh, name, billions):
  """Every public size has the published number of parameters and runs, abstractly, on 256 chips."""
  config = qwen3_vl.PRESETS[name]
  mesh = sharding.abstract_mesh(sharding.MeshConfig(data=1, fsdp=64, tp=4), 256)
  with jax.sharding.use_abstract_mesh(mesh):
    vlm = jax.eval_shape(lambda: Qwen3VL(config, jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(vlm)) == pytest.approx(billions * 1e9, rel=0.001)
    rows = jax.NamedSharding(mesh, P(BATCH))
    tokens, valid, patches, grids = (jax.ShapeDtypeStruct((256, *shape), dtype, sharding=rows) for shape, dtype in (
        ((700,), jnp.int32), ((700,), bool), ((1600, 1536), jnp.float32), ((3, 2), jnp.int32)))
    taps = (2, 5, 26)
    images = PackedImages(patches, grids)
    hidden = jax.eval_shape(lambda *x: Qwen3VL.hidden(*x[:3], taps, x[3]), vlm, tokens, valid, images)
    logits = jax.eval_shape(Qwen3VL.logits, vlm, tokens, valid, images)
  assert hidden.shape == (256, 700, 3, config.text.width) and hidden.sharding.spec[0] == BATCH
  assert hidden.dtype == jnp.bfloat16 and logits.shape == (256, 700, config.text.vocab)
  assert qwen3_vl.Qwen3VLConfig.from_json(config.to_json()) == config
