"""Krea 2 from its public files, against Krea2Pipeline of diffusers: whole images, prompts, native files, gradients."""

import dataclasses
import json
import shutil
import types

import diffusers
from diffusers.loaders import single_file_utils
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from unifusion_jax import command_line, conditioning, flow, parts, prompting, sharding, verifi
from unifusion_jax.commands import sample
from unifusion_jax.data import imaging, transforms
from unifusion_jax.errors import UserError
from unifusion_jax.models import unifusion
from unifusion_jax.pipeline import UniFusionPipeline
from unifusion_jax.planning import programs
from unifusion_jax.request import Request
from unifusion_jax.weights import convert, safetensors_io

TEMPLATE, SUFFIX = ''.join(verifi.LAYOUTS['krea2'].prefix), verifi.LAYOUTS['krea2'].suffix
LONG = 'a big red circle over a small green star, left of the blue square'
TAPS = [0, 1, 3]


def save_tokenizer(folder):
  """A byte-level tokenizer like Qwen's, whose words are those of Krea's template."""
  special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|image_pad|>', '<|vision_end|>']
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  words = tokenizers.Regex(r'[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+')
  split = tokenizers.pre_tokenizers.Split(words, 'isolated')
  byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.train_from_iterator([TEMPLATE, SUFFIX], tokenizers.trainers.BpeTrainer(
      vocab_size=600, special_tokens=special, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False))
  fast = transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizer, eos_token='<|im_end|>', pad_token='<|endoftext|>',
      additional_special_tokens=special[1:2] + special[3:])
  fast.save_pretrained(folder)
  return fast


def shaken(model, scale=0.2):
  """The model with noise on its parameters, so that each of them matters."""
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(scale * torch.randn(parameter.shape))
  return model.eval()


@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
  """(a small random Krea2Pipeline of diffusers, its folder)."""
  torch.manual_seed(0)
  folder = tmp_path_factory.mktemp('krea')
  tokenizer = save_tokenizer(folder / 'tokenizer')
  encoder = transformers.Qwen3VLModel(transformers.Qwen3VLConfig(
      vision_config=dict(hidden_size=16, depth=2, num_heads=2, intermediate_size=32, patch_size=8, out_hidden_size=32,
                         num_position_embeddings=16, deepstack_visual_indexes=[0]),
      text_config=dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                       intermediate_size=48, vocab_size=640, max_position_embeddings=2048, tie_word_embeddings=True,
                       rope_parameters=dict(rope_type='default', rope_theta=1e4, mrope_section=[4, 2, 2],
                                            mrope_interleaved=True)),
      image_token_id=tokenizer.convert_tokens_to_ids('<|image_pad|>'), tie_word_embeddings=True))
  transformer = diffusers.Krea2Transformer2DModel(
      in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=4, num_key_value_heads=2,
      intermediate_size=48, timestep_embed_dim=16, axes_dims_rope=(4, 6, 6), text_hidden_dim=32, num_text_layers=3,
      text_num_attention_heads=4, text_num_key_value_heads=2, text_intermediate_size=48)
  vae = diffusers.AutoencoderKLQwenImage(
      base_dim=8, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=1, temperal_downsample=[False, True, True],
      latents_mean=[-0.7, 0.1, 0.9, 1.5], latents_std=[2.8, 1.4, 0.6, 1.1])
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
      use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=6400)
  pipe = diffusers.Krea2Pipeline(scheduler, vae.eval(), shaken(encoder), tokenizer, shaken(transformer), TAPS)
  pipe.set_progress_bar_config(disable=True)
  pipe.save_pretrained(folder)
  pixels = dict(patch_size=8, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
                size=dict(shortest_edge=1024, longest_edge=1024))
  (folder / 'text_encoder' / 'preprocessor_config.json').write_text(json.dumps(pixels))
  return pipe, folder


def two_devices():
  return sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=2), jax.devices()[:2])


@pytest.fixture(autouse=True)
def mesh():
  """Two devices, for there are many programs to compile; other tests divide the same models further."""
  with jax.set_mesh(two_devices()):
    yield


@pytest.fixture(scope='module')
def ours(theirs):
  with jax.set_mesh(two_devices()):
    return UniFusionPipeline.from_pretrained(theirs[1])


def changed(folder, tmp_path, part, **values):
  """A copy of a folder with other values in one JSON file, without those of None."""
  shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
  path = tmp_path / part
  there = json.loads(path.read_text()) | values
  path.write_text(json.dumps({name: value for name, value in there.items() if value is not None}))
  return tmp_path


def their_images(theirs, ours, prompts, height, width, seeds, **arguments):
  """uint8 [b y x 3] of diffusers' pipeline from the noise of our seeds."""
  pipe = theirs[0]
  noise = torch.tensor(np.asarray(ours.noise(seeds, height, width))[:len(prompts)]).permute(0, 3, 1, 2)
  packed = pipe._pack_latents(noise, *noise.shape)
  return pipe(prompts, height=height, width=width, latents=packed, output_type='np', **arguments).images


def assert_same(images, theirs):
  theirs = np.round(theirs * 255).astype(int)
  assert np.abs(np.stack(images).astype(int) - theirs).max() <= 1 and theirs.std() > 5


# Whole images


def test_tokens_are_as_many_as_qwens(theirs):
  """The tokenizer of this test has the numbers of tokens that Krea's template has with Qwen's."""
  assert len(theirs[0].tokenizer(TEMPLATE).input_ids) == 34 and len(theirs[0].tokenizer(SUFFIX).input_ids) == 5


@pytest.mark.slow
@pytest.mark.parametrize('height, width', [(64, 64), (32, 96)])
def test_raw_with_guidance_is_krea2s(theirs, ours, height, width):
  """By the same arguments; unlike lengths in one batch, and a negative prompt. Our guidance is theirs + 1."""
  prompts, seeds, negative = [LONG, 'a star'], [3, 4], 'the background, blurred'
  ask = dict(num_inference_steps=4, guidance_scale=3.5, negative_prompt=negative)
  wanted = their_images(theirs, ours, prompts, height, width, seeds, **ask)
  assert (ours.settings.guidance, ours.settings.shift, ours.settings.verifi) == (4.5, 0, False)
  made = ours(prompts, height=height, width=width, generator=torch.Generator().manual_seed(3), **ask)
  assert (made.metadata[1]['seed'], made.metadata[1]['settings']['guidance']) == (4, 4.5)
  assert_same(made.arrays, wanted)
  assert made.rewrites == prompts and not any(made.warnings)
  if height == width:
    plain = ours.generate([Request(LONG, seed=3)] * 2, height, width, settings=ours.settings.changed(steps=4))
    assert np.abs(plain[0].image.astype(int) - made.arrays[0]).max() > 3
    assert_same([plain[0].image], their_images(theirs, ours, [LONG], height, width, [3], num_inference_steps=4,
                                               guidance_scale=3.5))


def test_turbo_from_the_command_line_is_krea2s(theirs, ours, tmp_path):
  folder = changed(theirs[1], tmp_path / 'turbo', 'model_index.json', is_distilled=True)
  config = command_line.read(f'sample:{folder}', [
      'dtype=float32', f'sample.prompt={LONG}', 'sample.seed=7', 'sample.width=64', 'sample.height=64'])
  settings = command_line.read('sample:krea2_turbo').sample.settings()
  assert UniFusionPipeline.load(parts.locate(folder)).settings.settings() == config.sample.settings() == settings
  sample.run(config, tmp_path / 'run')
  theirs[0].register_to_config(is_distilled=True)
  wanted = their_images(theirs, ours, [LONG], 64, 64, [7], num_inference_steps=8, guidance_scale=0.0)
  theirs[0].register_to_config(is_distilled=False)
  assert_same([imaging.read(tmp_path / 'run' / 'images' / '000.png')], wanted)


def test_each_row_is_what_it_is_alone(ours):
  prompts = [LONG, 'a star', LONG * 3]
  together = ours.encode([Request(prompt) for prompt in prompts]).conditioning
  for row, prompt in enumerate(prompts):
    alone = ours.encode([Request(prompt)]).conditioning
    a, b = (np.asarray(c.tokens)[i][np.asarray(c.mask)[i]] for c, i in ((together, row), (alone, 0)))
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


def test_seeds_share_the_conditions(ours, monkeypatch):
  """One reading of the prompt and one of the empty text for three batches."""
  read, calls = conditioning.read, []
  monkeypatch.setattr(conditioning, 'read', lambda *args, **kwargs: calls.append(1) or read(*args, **kwargs))
  several = ours('a star, of its own', num_images=3, batch_size=1, steps=4, height=64, width=64)
  assert len(calls) <= 2 and len({image.tobytes() for image in several.arrays}) == 3
  ours('a star, of its own', seed=2, batch_size=1, steps=4, height=64, width=64)
  assert len(calls) <= 2


def test_bfloat16_agrees_and_angles_stay_f32(ours):
  """On a strip so long that rounded angles would turn its far end by another angle."""
  rng = np.random.default_rng(0)
  z = rng.standard_normal((8, 2, 500, 4), np.float32)
  tokens, mask = rng.standard_normal((8, 4, 64), np.float32), np.ones((8, 4), bool)
  model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), ours.model)
  model.dtype = 'bfloat16'
  exact, rounded = (np.asarray(jax.jit(lambda m, z, t, c, k: m.velocity(z, t, c, k))(m, *sharding.shard((
      z, np.full(8, 0.5, np.float32), tokens, mask)))) for m in (ours.model, model))
  error = np.linalg.norm(rounded - exact, axis=(1, 3)) / np.linalg.norm(exact, axis=(1, 3))  # along the strip
  print(f'relative difference of bfloat16: {error.mean():.4f}')
  assert error.mean() < 0.03 and error[:, -50:].mean() < 1.3 * error[:, :50].mean()


# Prompts


@pytest.mark.parametrize('prompt', ['', 'a star', '\n\n of', ' the ☃ é\r\n', LONG * 12, 'user\n'])
@pytest.mark.parametrize('length', [24, 512])
def test_prompts_are_the_pipelines(theirs, ours, prompt, length):
  """Ids, the tokens that condition, positions and truncation."""
  seen = {}
  class Encoder:
    def __call__(self, input_ids, attention_mask, position_ids, output_hidden_states):
      seen.update(ids=input_ids[0][attention_mask[0]], positions=position_ids[0][0][attention_mask[0]])
      return types.SimpleNamespace(hidden_states=[torch.zeros(*input_ids.shape, 1)] * 4)
  fake = types.SimpleNamespace(**{name: getattr(theirs[0], name) for name in (
      'tokenizer', 'text_encoder_select_layers', 'prompt_template_encode_start_idx', 'prompt_template_encode_prefix',
      'prompt_template_encode_suffix', 'prompt_template_encode_num_suffix_tokens')}, text_encoder=Encoder())
  _, mask = diffusers.Krea2Pipeline.get_text_hidden_states(fake, prompt, length, torch.device('cpu'))
  encoder = dataclasses.replace(ours.prompt_encoder, layout=dataclasses.replace(
      ours.prompt_encoder.layout, max_sequence_length=length))
  prompts = prompting.Prompts.of(encoder, [Request(prompt)], ours.settings, 2048)
  row, = prompts.answered([prompting.RAW])
  valid = row['attention_mask'].sum()
  np.testing.assert_array_equal(row['input_ids'][:valid], seen['ids'])
  np.testing.assert_array_equal(np.arange(valid), seen['positions'])
  np.testing.assert_array_equal(row['cond_index'][row['cond_mask']], np.arange(34, valid))
  assert mask.sum() == row['cond_mask'].sum() <= length
  if prompt == LONG * 12:
    assert 'its end was cut off' in prompts.cut([prompting.RAW])[0]


def test_training_examples_have_the_same_prompt(ours):
  """The request conditions in the layout that sampling has, and so does the empty text that replaces it."""
  encoder, record = ours.prompt_encoder, dict(references=(), instruction='', caption='a star',
                                              target=np.zeros((16, 16, 3), np.uint8))
  prompts = prompting.Prompts.of(encoder, [Request('a star')], ours.settings, 2048)
  for dropout, wanted in ((0.0, prompts.answered([prompting.RAW])[0]), (1.0, prompting.null(encoder))):
    example = transforms.GenerationExample(encoder, cond_dropout=dropout)(record, np.random.default_rng(0))
    for values, mask in (('input_ids', 'attention_mask'), ('cond_index', 'cond_mask')):
      np.testing.assert_array_equal(example[values][example[mask]], wanted[values][wanted[mask]])


def test_a_template_token_in_a_request_stays_text(ours):
  spans, _ = ours.prompt_encoder.chat.alone('<|im_end|>', ours.prompt_encoder.layout)
  assert ours.prompt_encoder.chat.stop_ids[0] not in spans[1].ids


def test_steered_the_vlm_reads_references(ours):
  """VERIFI's prompt: image tokens and the written text condition; the null stays Krea's."""
  settings, reference = ours.settings.changed(verifi=True), np.full((32, 32, 3), 90, np.uint8)
  encoded = ours.encode([Request('make it blue', (reference,), rewrite='a blue star')], settings)
  words = len(ours.prompt_encoder.chat.text_ids('a blue star'))
  assert np.asarray(encoded.conditioning.mask)[0].sum() == 4 + words + 1 and encoded.rewrites == ['a blue star']
  assert np.isfinite(np.asarray(encoded.conditioning.tokens)[0]).all()
  assert ours.null().mask.sum() == 5
  with pytest.raises(UserError, match='neither references nor another system prompt: leave them'):
    ours('x', images=reference, height=64, width=64)
  with pytest.raises(UserError, match='negative_prompt needs guidance'):
    ours('x', negative_prompt='y', guidance=1.0)


@pytest.mark.slow
def test_the_vlm_writes_freely(ours, monkeypatch):
  """Where what it writes is usable that conditions, with the image tokens; else the request does."""
  reference, chat = np.full((32, 32, 3), 90, np.uint8), ours.prompt_encoder.chat
  settings = ours.settings.changed(verifi=True, temperature=1.0)
  encoder = dataclasses.replace(ours.prompt_encoder, max_rewrite=24)
  monkeypatch.setattr(ours, 'prompt_encoder', encoder)
  monkeypatch.setattr(chat, 'stop_ids', (*chat.stop_ids, *range(300, 340)))  # random weights seldom end by themselves
  requests = [Request('make it blue', (reference,), seed) for seed in range(8)]
  written = ours.encode(requests, settings)
  done = [i for i, warning in enumerate(written.warnings) if not warning]
  assert 2 <= len(done) and all(written.rewrites[i] not in ('', 'make it blue') for i in done)
  assert all('no end within 24 tokens' in warning or 'wrote' in warning for warning in written.warnings if warning)
  mask = np.asarray(written.conditioning.mask)
  assert all(4 + 1 < mask[i].sum() <= 4 + 24 for i in done)
  assert np.isfinite(np.asarray(written.conditioning.tokens)).all()
  again = ours.encode(requests, settings)
  assert again.rewrites == written.rewrites
  assert all(written.rewrites[i] == 'make it blue' for i in set(range(8)) - {*done})


# Files


def test_native_files_are_read(theirs, ours, tmp_path):
  """As diffusers' own conversion understands them, with ComfyUI's prefix too; a file takes the place of a folder."""
  native = dict(convert.export(ours.model, unifusion.NATIVE_RULES, unifusion.AXIS_SIZES))
  assert native['blocks.1.mod.lin'].shape == (6 * 64,) and native['last.modulation.lin'].shape == (2, 64)
  converted = single_file_utils.convert_krea2_transformer_checkpoint_to_diffusers(
      {name: torch.tensor(x) for name, x in native.items()})
  state = theirs[0].transformer.state_dict()
  assert converted.keys() == state.keys()
  assert all(torch.equal(converted[name], x) for name, x in state.items())
  shutil.copytree(theirs[1], tmp_path / 'pipe', ignore=shutil.ignore_patterns('diffusion_pytorch_model*'))
  shutil.copytree(theirs[1] / 'vae', tmp_path / 'pipe' / 'vae', dirs_exist_ok=True)
  for prefix in ('', unifusion.PREFIX):
    safetensors_io.write(tmp_path / 'raw.safetensors', {prefix + name: x for name, x in native.items()} | {
        f'{prefix}last.up.weight': np.zeros(3, np.float32)})
    located = parts.locate(tmp_path / 'pipe', transformer=str(tmp_path / 'raw.safetensors'))
    model = unifusion.load(located.transformer.folder, dataclasses.replace(located.config, dtype='float32'))
    jax.tree.map(np.testing.assert_array_equal, model, ours.model)
  del native['txtfusion.projector.weight']
  safetensors_io.write(tmp_path / 'raw.safetensors', native)
  with pytest.raises(UserError, match='missing: txtfusion.projector.weight, for our lap/pool'):
    unifusion.load(tmp_path / 'raw.safetensors', located.config)


@pytest.mark.parametrize('part, values, message', [
    ('text_encoder/config.json', dict(model_type='qwen3', text_config=None, **{name: 32 for name in (
        'hidden_size', 'intermediate_size', 'vocab_size')}, num_hidden_layers=4, num_attention_heads=2),
     'is no Qwen3-VL, and Krea 2 was trained with the states of Qwen3-VL-4B-Instruct'),
    ('model_index.json', dict(text_encoder_select_layers=[2, 5, 35]), 'layers of width 32, but .*: give Qwen3-VL-4B'),
    ('model_index.json', dict(text_encoder_select_layers=[2, 3]), 'must be 3 increasing layer numbers'),
    ('model_index.json', dict(_class_name='FluxPipeline'), 'is of a FluxPipeline: .* only Krea2Pipeline'),
    ('scheduler/scheduler_config.json', dict(use_dynamic_shifting=False, shift_terminal=0.1),
     'use_dynamic_shifting=False, shift_terminal=0.1 is no schedule of Krea 2')])
def test_parts_that_are_not_krea2s(theirs, tmp_path, part, values, message):
  with pytest.raises(UserError, match=message):
    parts.locate(changed(theirs[1], tmp_path, part, **values))


def test_training_refuses_another_encoder():
  config = command_line.read('configs/edit_lora.py:krea2', ['vlm=unifusion_jax/assets/tiny/vlm'])
  with pytest.raises(UserError, match='assets/tiny/vlm is no Qwen3-VL, and Krea 2 was trained'):
    conditioning.Frozen.load(config)


def test_the_shift_is_the_schedulers(theirs, ours, tmp_path):
  located = parts.locate(changed(theirs[1], tmp_path, 'scheduler/scheduler_config.json', max_shift=2.0))
  assert located.resolution_shift == ((256, 0.5), (6400, 2.0)) and ours.resolution_shift == flow.KREA2_SHIFT
  assert (located.unit, located.described.taps, located.config.dit.patch) == (16, tuple(TAPS), 2)


# Gradients


def test_gradients_are_the_transformers(theirs, ours):
  """Of all parameters and of the inputs, in f32."""
  rng = np.random.default_rng(1)
  normal = lambda *shape: rng.standard_normal(shape, np.float32)
  z, hidden, weight, t = normal(8, 4, 6, 4), normal(8, 5, 3, 32), normal(8, 4, 6, 4), rng.random(8, np.float32)
  mask = np.arange(5) < np.resize([5, 2, 4], 8)[:, None]

  def loss(model, z, hidden, mask, t, weight):
    return jnp.sum(weight * model.velocity(z, t, model.condition(hidden, mask), mask))
  grads, z_grad, hidden_grad = jax.jit(jax.grad(loss, (0, 1, 2)))(
      ours.model, *sharding.shard((z, hidden, mask, t, weight)))

  pipe = theirs[0]
  inputs = [torch.tensor(x, requires_grad=True) for x in (z, hidden)]
  pack = lambda x: pipe._pack_latents(x.permute(0, 3, 1, 2).contiguous(), 8, 4, 4, 6)
  pipe.transformer.requires_grad_(True).zero_grad()
  out = pipe.transformer(pack(inputs[0]), inputs[1], torch.tensor(t), pipe.prepare_position_ids(5, 2, 3, 'cpu'),
                         torch.tensor(mask), return_dict=False)[0]
  (out * pack(torch.tensor(weight))).sum().backward()

  def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
  wanted = dict(pipe.transformer.named_parameters())
  there = dict(convert.export(grads, unifusion.RULES, unifusion.AXIS_SIZES))
  assert there.keys() == wanted.keys()
  for name, x in there.items():
    close(x, wanted[name].grad.numpy())
  close(z_grad, inputs[0].grad.numpy())
  close(hidden_grad, inputs[1].grad.numpy())


def test_plans_read_no_weights_and_lay_prompts_out_alike(theirs, ours, tmp_path):
  """From a folder that holds configurations and a tokenizer alone."""
  folder = shutil.copytree(theirs[1], tmp_path / 'krea', ignore=shutil.ignore_patterns('*.safetensors'))
  config = sample.PipelineConfig(weights=str(folder), dtype='float32', sample=ours.settings)
  with jax.sharding.use_abstract_mesh(sharding.abstract_mesh(config.mesh, 2)):
    program = programs.of('encode', config, requests=2)
  requests = [Request('red ' * 600, place='prompt')] * 2
  prompts = prompting.Prompts.of(ours.prompt_encoder, requests, ours.settings, 2048)
  rows = prompting.stacked(prompts.answered([prompting.RAW] * 2))
  model, vlm, input_ids, attention_mask, cond_index, cond_mask, images = program.arguments
  planned = dict(input_ids=input_ids, attention_mask=attention_mask, cond_index=cond_index, cond_mask=cond_mask)
  assert {name: (x.shape, x.dtype) for name, x in planned.items()} == {
      name: (rows[name].shape, rows[name].dtype) for name in planned} and images is None
  facts = lambda tree: [(x.shape, x.dtype, x.sharding.spec) for x in jax.tree.leaves(tree)]
  assert facts((model, vlm, *program.beside)) == facts((ours.model, ours.frozen.vlm, ours.frozen.vae))
