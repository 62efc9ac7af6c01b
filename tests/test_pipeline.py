"""From requests to images: writing and reading agree, rows do not depend on their batch, parts make up the whole."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from test_scenes_wide import meeting

from unifusion_jax import conditioning, config, description, pipeline, prompting, sharding, verifi
from unifusion_jax.commands import sample
from unifusion_jax.data import imaging, transforms
from unifusion_jax.errors import UserError
from unifusion_jax.models import causal_lm, decoder, text_generation, unifusion
from unifusion_jax.pipeline import UniFusionPipeline
from unifusion_jax.request import Request
from unifusion_jax.scenes import examples, judge, language, render, world
from unifusion_jax.scenes.evaluation import by_hand, generation, handwritten, noise_levels, verifi_study
from unifusion_jax.scenes.evaluation import settings as evaluation
from unifusion_jax.weights import autoencoders, encoders

SQUARE = [e for e in (examples.example('edit', 'test', i) for i in range(40)) if e['target'].shape == (64, 64, 3)]
REFERENCES = [e['references'][0] for e in SQUARE[:4]]


@pytest.fixture(scope='module')
def pipe(recipe):
  """Random models, sharded over all axes; what their VLM writes has no end."""
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tp=2))):
    return random_pipe(recipe())


@pytest.fixture(scope='module')
def tiny():
  """The embedded models, whose VLM writes what fits. Five heads of LAP leave no tp."""
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=4, fsdp=2))):
    return UniFusionPipeline.from_pretrained('tiny')


def random_pipe(settings):
  """A pipeline of random weights, none of them zero, so that the condition matters."""
  rng = np.random.default_rng(0)
  model = jax.jit(lambda: unifusion.UniFusion(settings.model, rngs=nnx.Rngs(0)))()
  model = jax.tree.map(lambda x: jax.device_put(rng.normal(0, 0.2, x.shape).astype(np.float32), x.sharding), model)
  frozen = conditioning.Frozen(encoders.load(settings.vlm, np.float32), autoencoders.load(settings.vae), settings.taps)
  return UniFusionPipeline(model, frozen, transforms.prompt_encoder(settings), settings.sample, settings.data.size)


def requests(count=4, **changes):
  return [dataclasses.replace(Request('make it blue', (REFERENCES[i],), i), **changes) for i in range(count)]


def tokens(encoded):
  """The tokens of each row that condition the DiT."""
  return [np.asarray(c)[np.asarray(m)] for c, m in zip(encoded.conditioning.tokens, encoded.conditioning.mask)]


def same(a, b):
  assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1


# Conditioning


def test_written_text_conditions_as_one_pass_over_it_does(tiny):
  """States kept while the VLM writes, over its cache, against one teacher-forced pass over the same text."""
  edits = [Request(e['instruction'], tuple(e['references']), i) for i, e in enumerate(SQUARE[:8])]
  written = tiny.encode(edits)
  read = tiny.encode([dataclasses.replace(r, rewrite=text) for r, text in zip(edits, written.rewrites)])
  assert written.warnings == read.warnings == [''] * 8 and written.rewrites == read.rewrites
  assert len(set(written.rewrites)) == 8
  for a, b in zip(tokens(written), tokens(read)):
    np.testing.assert_allclose(a, b, atol=2e-3 * np.abs(b).max())
  other = tiny.encode([dataclasses.replace(edits[0], rewrite=written.rewrites[1])])
  assert np.abs(tokens(other)[0][:16] - tokens(read)[0][:16]).max() > 1e-2 * np.abs(tokens(read)[0]).max()


def test_a_reference_of_strength_two_is_its_condition_tokens_twice(pipe):
  """In every step; one of strength 0 is not there."""
  settings = pipe.settings.changed(guidance=1.0, tiles=1)
  asked = [dataclasses.replace(r, references=r.references * 2, rewrite='a blue circle') for r in requests()]
  once, twice, without = (pipe.encode(asked, settings.changed(strengths=strengths)).conditioning
                          for strengths in ((1.0, 1.0), (1.0, 2.0), (1.0, 0.0)))
  images = pipe.prompt_encoder.image_processor.max_tokens
  assert once.bias is None and not np.array(without.mask)[:, images:2 * images].any()
  np.testing.assert_array_equal(np.array(without.mask).sum(1), np.array(once.mask).sum(1) - images)
  more = jax.tree.map(lambda x: sharding.shard(np.concatenate(
      [np.asarray(x), np.asarray(x)[:, images:2 * images]], axis=1)), conditioning.Conditioning(*once[:2]))
  noise, times = pipe.noise(range(4), 64, 64), pipe.times(64, 64, steps=2, shift=1.0)
  one, two, doubled = (np.asarray(pipe.denoise(c, noise, times, guidance=1.0, eta=0.0)) for c in (once, twice, more))
  np.testing.assert_allclose(two, doubled, atol=1e-4 * np.abs(two).max())
  assert np.abs(two - one).max() > 1e-3 * np.abs(two).max()
  for strengths, problem in (((1.0,), 'give one for each'), ((-1.0, 1.0), 'between 0 and 100')):
    with pytest.raises(UserError, match=problem):
      pipe('make it blue', images=REFERENCES[:2], strengths=strengths)


def test_a_precise_edit_changes_the_region_alone(tiny, tmp_path):
  edit = SQUARE[0]
  reference, mask = edit['references'][0], np.zeros((64, 64), np.uint8)
  mask[8:40, 24:64] = 255
  imaging.write_png(tmp_path / 'mask.png', mask)
  imaging.write_png(tmp_path / 'all.png', mask * 0 + 255)
  run = lambda **settings: tiny(edit['instruction'], images=reference, num_images=2, **settings).arrays
  precise, free, white = run(precise=str(tmp_path / 'mask.png')), run(), run(precise=str(tmp_path / 'all.png'))
  for a, b, c in zip(precise, free, white):
    np.testing.assert_array_equal(a[mask == 0], reference[mask == 0])
    np.testing.assert_array_equal(b, c)
    assert np.abs(a.astype(int) - reference)[mask > 0].max() > 60 and (b != reference)[mask == 0].any()
  for changes, problem in ((dict(precise=str(tmp_path / 'none.png')), 'is not there'),
                           (dict(precise=str(tmp_path / 'mask.png'), images=REFERENCES[0][:48]), 'as large as it'),
                           (dict(precise=str(tmp_path / 'mask.png'), images=None), 'there is none')):
    with pytest.raises(UserError, match=problem):
      tiny('make it blue', **dict(images=reference) | changes)


def test_only_the_rows_whose_rewrite_is_no_use_fall_back(tiny):
  """With room for short rewrites alone, long ones find no end: those rows are what they are without VERIFI, alone."""
  edits = [Request(e['instruction'], tuple(e['references']), i) for i, e in enumerate(SQUARE[:8])]
  whole, chat = tiny.encode(edits), tiny.prompt_encoder.chat
  lengths = [len(chat.text_ids(text)) + 1 for text in whole.rewrites]
  room = int(np.median(lengths))
  narrow = dataclasses.replace(tiny.prompt_encoder, max_rewrite=room)
  short = UniFusionPipeline(tiny.model, tiny.frozen, narrow, tiny.settings)
  encoded = short.encode(edits)
  failed = [i for i, length in enumerate(lengths) if length > room]
  assert 0 < len(failed) < 8 and [i for i, text in enumerate(encoded.warnings) if text] == failed
  assert f'no end within {room} tokens' in encoded.warnings[failed[0]]
  raw = tiny.settings.changed(verifi=False)
  for i, row in enumerate(tokens(encoded)):
    wanted = tiny.encode([edits[i]], raw) if i in failed else None
    assert encoded.rewrites[i] == (edits[i].instruction if i in failed else whole.rewrites[i])
    np.testing.assert_allclose(row, tokens(wanted)[0] if wanted else tokens(whole)[i], atol=2e-3 * np.abs(row).max())


def test_rewrites_that_are_no_use_are_told_from_others(tiny):
  chat = tiny.prompt_encoder.chat
  stop, good = chat.stop_ids[0], chat.text_ids('a red circle')
  blank = chat.text_ids(' \n\n ')
  rows = [[*good, stop, 0, 0], [stop, 0, 0, 0], [*good, *good], [*good, chat.image_id, stop], [*blank, stop],
          [*blank, *good, stop]]
  lengths = [len(good) + 1, 1, 2 * len(good), len(good) + 2, len(blank) + 1, len(blank) + len(good) + 1]
  ids = np.zeros((6, max(lengths)), int)
  for row, values in zip(ids, rows):
    row[:len(values)] = values
  texts, failures = prompting.read_rewrites(chat, ids, np.array(lengths))
  assert texts[:2] == ['a red circle', ''] and set(failures) == {1, 2, 3, 4} and texts[5] == 'a red circle'
  assert 'wrote nothing' in failures[1] and 'no end within' in failures[2] and 'image token' in failures[3]
  assert 'wrote nothing' in failures[4]
  valid = conditioning.is_valid_generation(jnp.array(ids), jnp.array(lengths), chat.stop_ids, chat.image_id,
                                           chat.blank_ids)
  assert valid.tolist() == [i not in failures for i in range(len(rows))]  # in training, on the device


def test_each_way_of_asking_in_one_batch(tiny):
  """Given text, the VLM's own, with images, several and none: each row is what it would be alone."""
  mixture = [requests(1, rewrite='a red circle')[0], requests(1)[0], Request('a red circle', seed=3),
             Request('make it blue', (REFERENCES[0], REFERENCES[1]), 4)]
  together = tiny.encode(mixture)
  for row, request in enumerate(mixture):
    alone = tiny.encode([request])
    assert alone.rewrites[0] == together.rewrites[row] and alone.warnings[0] == together.warnings[row]
    a, b = tokens(alone)[0], tokens(together)[row]
    assert len(a) == len(b)
    np.testing.assert_allclose(a, b, atol=2e-3 * np.abs(a).max())


def test_without_verifi_the_request_itself_conditions_as_in_training(pipe):
  encoded = pipe.encode(requests(4), pipe.settings.changed(verifi=False))
  words = len(pipe.prompt_encoder.chat.text_ids('make it blue'))
  assert encoded.rewrites == ['make it blue'] * 4 and [len(t) for t in tokens(encoded)] == [16 + words + 1] * 4
  record = dict(SQUARE[0], instruction='make it blue')
  transform = transforms.GenerationExample(pipe.prompt_encoder, cond_dropout=0, image_dropout=0, instruction_prob=1)
  example = transform(record, np.random.default_rng(0))
  batch = sharding.shard({name: np.stack([x] * 8) for name, x in example.items()})
  hidden = pipe.frozen.vlm.hidden(batch['input_ids'], batch['attention_mask'], pipe.frozen.taps, batch['tiles'],
                                  batch['cond_index'])
  trained = pipe.model.condition(hidden, batch['cond_mask'])
  np.testing.assert_allclose(np.asarray(trained)[0][example['cond_mask']], tokens(encoded)[0], atol=1e-4, rtol=1e-3)


def test_a_long_request_without_verifi_needs_no_shorter_rewrite(pipe):
  """Longer than the room for rewrites: it still conditions whole, alone and beside a short one."""
  raw = pipe.settings.changed(verifi=False)
  long = Request('red ' * (pipe.prompt_encoder.max_rewrite + 5))
  words = len(pipe.prompt_encoder.chat.text_ids(long.instruction))
  alone, beside = tokens(pipe.encode([long], raw))[0], tokens(pipe.encode([*requests(1), long], raw))[1]
  assert len(alone) == words + 1 > pipe.prompt_encoder.max_rewrite
  np.testing.assert_allclose(alone, beside, atol=1e-4, rtol=1e-3)


def test_without_image_tokens_only_the_text_conditions(pipe):
  without = pipe.settings.changed(image_tokens=False)
  alone, whole = (tokens(pipe.encode(requests(4, rewrite='x'), s))[0] for s in (without, pipe.settings))
  assert len(whole) - len(alone) == 16
  words = len(pipe.prompt_encoder.chat.text_ids('make it blue'))
  assert len(tokens(pipe.encode(requests(4), without.changed(verifi=False)))[0]) == words + 1


def test_the_system_prompt_can_be_swapped(pipe):
  """By name or by text, longer than training's too."""
  given = requests(4, rewrite='x')
  by_name = tokens(pipe.encode(given, pipe.settings.changed(system='faithful')))[0]
  by_text = tokens(pipe.encode(given, pipe.settings.changed(system=verifi.SYSTEM['faithful'])))[0]
  np.testing.assert_array_equal(by_name, by_text)
  assert np.abs(by_name - tokens(pipe.encode(given))[0]).max() > 1e-3


def test_more_tiles_and_stitched_references(pipe):
  wide = np.random.default_rng(0).integers(0, 256, (64, 128, 3)).astype(np.uint8)
  given = Request('make it blue', (wide,), rewrite='x')
  one, several = (tokens(pipe.encode([given], pipe.settings.changed(tiles=n)))[0] for n in (1, 2))
  assert len(several) - len(one) == 2 * 16  # two tiles and the thumbnail in place of one tile
  pair = (REFERENCES[0], REFERENCES[1])
  stitched = tokens(pipe.encode([Request('make it blue', pair, rewrite='x')], pipe.settings.changed(stitch=True)))[0]
  by_hand = tokens(pipe.encode([Request('make it blue', (imaging.stitch(pair),), rewrite='x')]))[0]
  np.testing.assert_array_equal(stitched, by_hand)


def test_three_references_are_shown_as_they_are(pipe):
  """Shapes are those of four; what is padded leaves no trace."""
  three = Request('make it blue', tuple(REFERENCES[:3]), rewrite='x')
  four = dataclasses.replace(three, references=tuple(REFERENCES))
  alone, beside = tokens(pipe.encode([three]))[0], tokens(pipe.encode([three, four]))[0]
  assert len(alone) == 3 * 16 + len(pipe.prompt_encoder.chat.text_ids('x')) + 1
  np.testing.assert_allclose(alone, beside, atol=1e-4, rtol=1e-3)


def test_sampled_rewrites_follow_the_seed_and_not_the_noise(tiny):
  hot = tiny.settings.changed(temperature=2.0)
  asked = [Request('a circle', seed=seed) for seed in range(8)]
  first = tiny.encode(asked, hot).rewrites
  assert first == tiny.encode(asked[::-1], hot).rewrites[::-1] and len(set(first)) > 4
  # The keys that renew noise between steps are the seeds' own: text sampled with these would share their stream
  encoder = tiny.prompt_encoder
  rows = [verifi.arrays(encoder.chat.spans('a circle'), encoder.lengths(0)[0], 1, ())] * 8
  with jax.set_mesh(tiny.mesh):
    batch = sharding.shard(prompting.stacked(rows))
    words = np.asarray(jax.random.key_data(jax.vmap(jax.random.key)(np.arange(8))))
    keys = jax.random.wrap_key_data(sharding.shard(words))
    ids, lengths, *_ = text_generation.generate(
        tiny.frozen.vlm, batch['input_ids'], batch['attention_mask'], max_new=encoder.max_rewrite,
        stop_ids=encoder.chat.stop_ids, taps=tiny.frozen.taps, temperature=2.0, key=keys)
  shared, _ = prompting.read_rewrites(encoder.chat, np.asarray(ids), np.asarray(lengths))
  assert sum(a == b for a, b in zip(first, shared)) < 4


def test_qwen3_vl_conditions_in_the_same_way(recipe, qwen):
  """Images of two sizes and no image in one batch."""
  pipe = random_pipe(recipe(vlm=str(qwen)))
  small = np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)
  text = 'a small red circle'
  mixture = [*requests(2), dataclasses.replace(requests(1)[0], references=(small,)), Request('make it blue')]
  mixture = [dataclasses.replace(request, rewrite=text) for request in mixture]
  rows, words = tokens(pipe.encode(mixture)), len(pipe.prompt_encoder.chat.text_ids(text)) + 1
  assert [len(row) - words for row in rows] == [16, 16, 6, 0]
  for row, request in zip(rows, mixture):
    np.testing.assert_allclose(row, tokens(pipe.encode([request]))[0], atol=2e-4, rtol=2e-3)
  assert np.abs(rows[0][:6] - rows[2][:6]).max() > 1e-3
  assert pipe.generate(requests(1, rewrite=text), 64, 64)[0].image.shape == (64, 64, 3)


def test_a_language_model_conditions_on_text_alone(recipe, tmp_path):
  for name in ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'):
    shutil.copyfile(config.ASSETS / 'vlm' / name, tmp_path / name)
  sizes = decoder.DecoderConfig('llama', vocab=1024, width=32, depth=2, heads=2, kv_heads=2, head_dim=16, hidden=48,
                                max_positions=512)
  causal_lm.save(causal_lm.TextModel(causal_lm.TextConfig(sizes), rngs=nnx.Rngs(4)), tmp_path)
  pipe = random_pipe(recipe(vlm=str(tmp_path)))
  encoded = pipe.encode([Request('x', rewrite='a red circle')])
  assert len(tokens(encoded)[0]) == len(pipe.prompt_encoder.chat.text_ids('a red circle')) + 1
  with pytest.raises(UserError, match='reads text alone'):
    pipe.encode(requests(1))


# Guidance


def test_the_null_condition_is_the_empty_text_and_computed_once(pipe):
  null = pipe.null()
  assert null.mask.shape == (1, 1) and pipe.null() is null
  np.testing.assert_allclose(null.tokens[0], tokens(pipe.encode([Request('', rewrite='')]))[0], atol=1e-4, rtol=1e-3)


def test_guidance_of_one_computes_no_null(pipe):
  """A model whose token budget has no room for the null prompt: it works as long as nobody asks for that."""
  encoder = pipe.prompt_encoder.with_tiles(4)  # the room of four tiles that a small image leaves is there for its text
  spans = encoder.chat.spans('', (), '', encoder.system)
  narrow = dataclasses.replace(encoder, max_prompt=sum(len(span.ids) for span in spans) - 1)
  cramped = UniFusionPipeline(pipe.model, pipe.frozen, narrow, pipe.settings)
  one = cramped.generate(requests(1, rewrite='x'), 64, 64, settings=pipe.settings.changed(guidance=1.0))[0].image
  with pytest.raises(UserError, match='does not fit'):
    cramped.generate(requests(1, rewrite='x'), 64, 64, settings=pipe.settings.changed(guidance=1.5))
  near = pipe.generate(requests(1, rewrite='x'), 64, 64, settings=pipe.settings.changed(guidance=1.0001))[0].image
  same(one, near)


# Sampling


@pytest.mark.parametrize('eta', [0.0, 1.0])
def test_answers_do_not_depend_on_their_batch(pipe, eta):
  s = pipe.settings.changed(eta=eta)
  together, alone = pipe.generate(requests(4), 64, 64, settings=s), pipe.generate(requests(1), 64, 64, settings=s)
  assert together[0].rewrite == alone[0].rewrite
  same(together[0].image, alone[0].image)


def test_seed_text_and_reference_matter(pipe):
  base = pipe.generate(requests(1, rewrite='a red circle'), 64, 64)[0].image
  for change in (dict(seed=9), dict(rewrite='a blue star'), dict(references=(REFERENCES[1],))):
    request = dataclasses.replace(requests(1, rewrite='a red circle')[0], **change)
    assert (pipe.generate([request], 64, 64)[0].image != base).any()


def test_renewed_noise_follows_the_seed(pipe):
  three = [Request('make it red', (REFERENCES[0],), seed, 'a red circle') for seed in (1, 2, 1)]
  calm, lively = (pipe.generate(three, 64, 64, settings=pipe.settings.changed(eta=eta)) for eta in (0.0, 1.0))
  assert (lively[0].image != calm[0].image).any() and (lively[0].image != lively[1].image).any()
  np.testing.assert_array_equal(lively[0].image, lively[2].image)


@pytest.mark.parametrize('eta', [0.0, 0.8])
def test_part_after_part_is_the_whole_way(pipe, eta):
  encoded, seeds = pipe.encode(requests(2, rewrite='x')), [0, 1]
  noise, times = pipe.noise(seeds, 64, 64), pipe.times(64, 64, steps=4)
  ways = dict(guidance=2.0, eta=eta, seeds=seeds)
  whole = pipe.denoise(encoded.conditioning, noise, times, **ways)
  half = pipe.denoise(encoded.conditioning, noise, times[:2], **ways)
  parts = pipe.denoise(encoded.conditioning, half, times[1:], first=1, **ways)
  np.testing.assert_allclose(parts, whole, atol=1e-4)
  forgotten = pipe.denoise(encoded.conditioning, half, times[1:], **ways)
  assert (np.abs(np.asarray(forgotten) - np.asarray(whole)).max() > 1e-2) == (eta > 0)
  calls = []
  s = pipe.settings.changed(steps=4, eta=eta, guidance=2.0)
  shown = pipe.generate(requests(2, rewrite='x'), 64, 64, settings=s, callback=lambda *step: calls.append(step))
  assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
  for image, sampled in zip(pipe.decode(whole), shown):
    same(image, sampled.image)
  if eta:
    with pytest.raises(UserError, match='give seeds='):
      pipe.denoise(encoded.conditioning, noise, times, eta=eta)


@pytest.mark.parametrize('eta', [0.0, 1.0])
def test_sampling_on_from_images(pipe, eta):
  """From time 1 they leave no trace; from 0 the autoencoder gives them back; between, something of both."""
  s = pipe.settings.changed(eta=eta)
  images = [np.random.default_rng(0).integers(0, 256, (8, 8, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)] * 3
  plain = pipe.generate(requests(3, rewrite='x'), 64, 64, settings=s)
  back = {t: pipe.generate(requests(3, rewrite='x'), 64, 64, settings=s, init_images=images, start=t)
          for t in (1.0, 0.5, 0.0)}
  x = sharding.shard(np.stack(images * 3)[:8].astype(np.float32) / 127.5 - 1)
  decoded = np.clip((np.asarray(pipe.frozen.vae.decode(pipe.frozen.vae.encode(x)))[0] + 1) * 127.5, 0, 255)
  assert len(back[0.0]) == 3
  for i in range(3):
    same(back[1.0][i].image, plain[i].image)
    np.testing.assert_allclose(back[0.0][i].image, decoded, atol=1)
    assert np.abs(back[0.5][i].image.astype(int) - decoded).mean() > 1


@pytest.mark.parametrize('height, width', [(48, 80), (80, 48)])
def test_other_shapes(pipe, height, width):
  assert pipe.generate([Request('a red circle', rewrite='x')], height, width)[0].image.shape == (height, width, 3)


def test_sizes_and_texts_that_cannot_be(pipe):
  with pytest.raises(UserError, match='multiples of 8'):
    pipe.generate(requests(1), 60, 64)
  with pytest.raises(UserError, match='does not fit'):
    pipe.generate(requests(1, instruction='red ' * 200), 64, 64)


# The call


def test_a_scene_is_edited_as_asked(tiny):
  """The shipped model on a scene: the judge reads a circle that was red and is blue, and the star as it was."""
  circle = world.Object('circle', 'red', 'medium', 'solid', 0.3, 0.3)
  star = world.Object('star', 'green', 'medium', 'solid', 0.7, 0.7)
  scene = world.Scene((circle, star), world.Background('plain', ('mint',)))
  result = tiny('make the circle blue', images=render.render(scene, 64), num_images=4, steps=12)
  assert len(result.images) == 4 and result.warnings == [''] * 4
  wanted = dataclasses.replace(scene, objects=(dataclasses.replace(circle, colour='blue'), star))
  verdicts = [judge.check_edit(judge.read(image), scene, wanted) for image in result.arrays]
  assert sum(verdict['asked'] for verdict in verdicts) >= 3, (verdicts, result.rewrites)


def test_paths_arrays_and_pillow_images_are_one(pipe, tmp_path):
  Image.fromarray(REFERENCES[0]).save(tmp_path / 'image.png')
  ways = [tmp_path / 'image.png', str(tmp_path / 'image.png'), REFERENCES[0], Image.fromarray(REFERENCES[0]),
          [REFERENCES[0]], Image.fromarray(REFERENCES[0]).convert('RGBA')]
  results = [pipe('make it blue', images=images, rewrite='x') for images in ways]
  for result in results:
    np.testing.assert_array_equal(result.arrays[0], results[0].arrays[0])
  assert (results[0].arrays[0] != pipe('make it blue', rewrite='x').arrays[0]).any()


def test_several_prompts_and_images_of_each(pipe):
  calls = []
  result = pipe(['a red circle', 'a blue star'], num_images=3, seed=5, rewrite='x', batch_size=4, steps=1, eta=None,
                callback=lambda *step: calls.append(step))
  assert [m['seed'] for m in result.metadata] == [5, 6, 7, 8, 9, 10] and calls == [(1, 2), (2, 2)]
  assert [m['prompt'] for m in result.metadata] == ['a red circle'] * 3 + ['a blue star'] * 3
  assert result.metadata[0]['settings']['steps'] == 1 and result.metadata[0]['settings']['width'] == 64
  assert result.rewrites == ['x'] * 6 and result.images[0].size == (64, 64)
  one = pipe.generate([Request('a blue star', seed=9, rewrite='x')], 64, 64, settings=pipe.settings.changed(steps=1))
  same(result.arrays[4], one[0].image)


def test_sizes_follow_the_first_reference(pipe):
  wide = np.zeros((30, 50, 3), np.uint8)
  sizes = [pipe('x', rewrite='x', steps=1, guidance=1.0, **ways).images[0].size
           for ways in (dict(), dict(images=wide), dict(images=wide, height=80), dict(width=32, height=48))]
  assert sizes == [(64, 64), (80, 48), (136, 80), (32, 48)]


@pytest.mark.parametrize('ways, message', [
    (dict(prompt=''), 'nothing to generate'), (dict(prompt=[]), 'nothing to generate'),
    (dict(prompt=['x', ' ']), 'prompt 2 is empty'), (dict(prompt=['x', 3]), 'list of texts'),
    (dict(guidence=2.0), "did you mean 'guidance'"),
    (dict(references='photo.png'), "no argument 'references'"), (dict(weights='x'), "no argument 'weights'"),
    (dict(steps=0), 'steps=0 must be between 1 and'), (dict(steps=2.5), 'steps=2.5 must be a whole number'),
    (dict(guidance='high'), 'must be a number'), (dict(verifi=1), 'must be True or False'),
    (dict(method='rk4'), "must be 'euler' or 'heun'"), (dict(method='heun', eta=0.5), 'between Euler steps'),
    (dict(num_images=0), 'num_images=0'), (dict(guidance=float('nan')), 'guidance=nan must be'),
    (dict(width=60), 'width=60 must be a multiple'),
    (dict(images='gone.png'), 'gone.png is not there'), (dict(images=np.zeros((4, 4), np.float32)), 'image array'),
    (dict(system='faithfull', rewrite='x'), "did you mean 'faithful'"), (dict(top_p=0.0), 'top_p=0.0'),
    (dict(eta=2), 'eta=2')])
def test_arguments_that_cannot_be(pipe, ways, message):
  with pytest.raises(UserError, match=re.escape(message)):
    pipe(**dict(prompt='x', rewrite='x') | ways if 'prompt' not in ways else ways)


# Loading


def run(code: str, folder: pathlib.Path) -> str:
  """What a fresh process in another folder prints."""
  root = str(pathlib.Path(__file__).parent.parent)
  environment = dict(os.environ, PYTHONPATH=root, JAX_PLATFORMS='cpu', JAX_COMPILATION_CACHE_DIR=f'{root}/.cache/jax',
                     JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0.5')
  done = subprocess.run([sys.executable, '-c', code], cwd=folder, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_the_import_is_light(tmp_path):
  slow = ('tensorflow_datasets', 'pyarrow', 'orbax', 'transformers', 'grain')
  assert run('from unifusion_jax import UniFusionPipeline\nimport sys\n'
             f'print([name for name in {slow} if name in sys.modules])', tmp_path) == '[]\n'
  with pytest.raises(ImportError):
    from unifusion_jax import Pipeline  # noqa: F401


def test_it_works_from_any_folder_without_a_mesh(tmp_path):
  code = ('from unifusion_jax import UniFusionPipeline\n'
          "pipe = UniFusionPipeline.from_pretrained('tiny')\n"
          "result = pipe('a red circle', rewrite='a red circle', steps=1, guidance=1.0)\n"
          'print(pipe.mesh.axis_names, result.images[0].size)')
  assert run(code, tmp_path) == "('data', 'fsdp', 'tp') (64, 64)\n"


def folder(tmp_path, **changes):
  """The shipped model's folder without its weights, with other entries in unifusion.json; None takes one out."""
  shutil.copy(config.ASSETS / 'edit' / 'config.json', tmp_path)
  values = json.loads((config.ASSETS / 'edit' / 'unifusion.json').read_text()) | changes
  values = {name: value for name, value in values.items() if value is not None}
  (tmp_path / 'unifusion.json').write_text(json.dumps(values))
  return tmp_path


@pytest.mark.parametrize('changes, message', [
    (dict(vlm=None, size=None), 'vlm is missing; size is missing'), (dict(colour='red'), 'colour is not known'),
    (dict(taps=[2, 4]), 'must be 3 increasing layer'), (dict(taps=[2, 6, 4]), 'must be 3 increasing layer'),
    (dict(taps=[2, 4, 60]), 'has 6 layers of width 160'), (dict(taps=7), 'taps=7 must be a list'),
    (dict(sample=dict(stepps=3)), "did you mean 'steps'"), (dict(sample=dict(steps=0)), 'steps=0 must be'),
    (dict(vlm='../nowhere'), 'has its vlm in ../nowhere, which is not there')])
def test_descriptions_that_cannot_be(tmp_path, changes, message):
  with pytest.raises(UserError, match=re.escape(message)):
    UniFusionPipeline.from_pretrained(folder(tmp_path, **changes))


def test_parts_that_do_not_fit(tmp_path, recipe, qwen):
  with pytest.raises(UserError, match='has no unifusion.json'):
    UniFusionPipeline.from_pretrained(config.ASSETS / 'vlm')
  with pytest.raises(UserError, match='of width 32, but .* pools layers .* of width 160'):
    UniFusionPipeline.from_pretrained(folder(tmp_path), vlm=str(qwen))
  with pytest.raises(UserError, match='has 4 latent channels and .* wants 16'):
    UniFusionPipeline.from_pretrained(folder(tmp_path), vae=recipe().vae)
  with pytest.raises(UserError, match='no such folder'):
    UniFusionPipeline.from_pretrained('small')
  with pytest.raises(UserError, match="dtype='half'"):
    UniFusionPipeline.from_pretrained(dtype='half')


def test_an_export_is_a_pipeline(recipe, pipe, tmp_path):
  """Saved beside its parts, described, moved and loaded: the same images."""
  settings = recipe()
  shutil.copytree(settings.vlm, tmp_path / 'run' / 'vlm')
  settings = dataclasses.replace(settings, vlm=str(tmp_path / 'run' / 'vlm'))
  unifusion.save(pipe.model, tmp_path / 'run' / 'export')
  description.save(tmp_path / 'run' / 'export', settings)
  (tmp_path / 'run').rename(tmp_path / 'moved')
  loaded = UniFusionPipeline.from_pretrained(tmp_path / 'moved' / 'export')
  assert loaded.settings.settings() == settings.sample.settings() and loaded.size == 64
  np.testing.assert_array_equal(loaded('make it blue', images=REFERENCES[0], rewrite='x').arrays[0],
                                pipe('make it blue', images=REFERENCES[0], rewrite='x').arrays[0])


# Previews and evaluation


def with_settings(pipe, **changes):
  return UniFusionPipeline(pipe.model, pipe.frozen, pipe.prompt_encoder, dataclasses.replace(pipe.settings, **changes))


def test_preview_and_evaluation(pipe, recipe, tmp_path):
  assert sample.preview_grid(pipe, SQUARE[:2]).shape[2] == 3
  report = generation.evaluate(pipe, recipe(), tmp_path)
  for name in ('test_t2i_1-2', 'test_t2i_3-4', 'heldout_t2i_1-2', 'heldout_t2i_3-4'):
    assert report[name]['fallback_rate'] == 1 and 0 < report[name]['vqascore'] < 1
    assert (tmp_path / f'{name}.png').exists()


def test_the_study_of_noise_levels(tiny, recipe, tmp_path):
  """At t = 0 true images stay as they are, also with new noise between steps; at t = 1 they do not."""
  settings = recipe(eval=evaluation.GenerationEvaluation(study='noise_levels', split='train', examples=3, batch_size=4))
  report = noise_levels.evaluate(with_settings(tiny, steps=2, eta=1.0), settings, tmp_path)
  assert report['examples'] == 3 and report['0.0']['all'] == 1.0 and report['1.0']['all'] < 1.0
  assert imaging.read(tmp_path / 'times.png').shape[1] > 8 * 128


def test_the_study_of_requests_by_hand(recipe, tmp_path):
  """Right images and texts are measured as right; of edits, whose drawings the judge cannot read, the text is."""
  truths = {record['instruction']: record for record in (*handwritten.prompts('t2i'), *handwritten.edits(64))}

  @dataclasses.dataclass
  class Perfect:
    settings: config.SampleConfig

    def generate(self, requests, height, width, settings):
      records = [truths[request.instruction] for request in requests]
      images = [record['target'] if record['references'] else render.render(
          meeting(language.parse(record['caption']), np.random.default_rng(len(record['instruction']))), 64)
          for record in records]
      return [pipeline.Sample(image, record['caption']) for image, record in zip(images, records)]

  settings = recipe(eval=evaluation.GenerationEvaluation(study='by_hand', batch_size=20))
  report = by_hand.evaluate(Perfect(config.SampleConfig()), settings, tmp_path)
  assert report['prompts']['examples'] == 40 and report['prompts']['written_exact'] == report['prompts']['all'] == 1
  assert report['edits'] == dict(examples=15, written_exact=1.0, fallback_rate=0.0)


def test_the_study_of_verifi(recipe, tmp_path):
  """Each way of asking is asked in that way, on examples of its kind."""
  asked = []

  @dataclasses.dataclass
  class Recorder:
    settings: config.SampleConfig

    def generate(self, requests, height, width, settings):
      asked.extend((settings, request) for request in requests)
      noise = np.random.default_rng(settings.tiles).integers(0, 256, (height, width, 3)).astype(np.uint8)
      return [pipeline.Sample(noise, request.instruction) for request in requests]

  made = recipe(eval=evaluation.GenerationEvaluation(examples=3, batch_size=4, seeds=2))
  report = verifi_study.evaluate(Recorder(config.SampleConfig()), made, tmp_path)
  assert set(report['edits']) == {'both', 'written', 'images', 'raw'} and set(report['references']) == {'2', '3'}
  assert report['edits']['both']['all'] == dict(mean=0.0, least=0.0, most=0.0)
  assert 0 <= report['references']['2']['copy'] <= 1
  assert report['tiles']['1'] != report['tiles']['9'] and 0 < report['tiles']['1']['mean'] < 255
  ways = {(s.verifi, s.image_tokens, s.system, s.tiles, s.stitch, r.rewrite, len(r.references)) for s, r in asked}
  assert ways == {
      *((on, True, None, 0, False, None, n) for on in (True, False) for n in (0, 1)),
      (True, False, None, 0, False, None, 1), (True, True, None, 0, False, '', 1),
      *((True, True, 'answer', 0, False, None, n) for n in (0, 1)),
      *((True, True, None, 0, False, None, n) for n in (2, 3)), *((True, True, None, n, True, None, n) for n in (2, 3)),
      *((True, True, None, n, False, None, 1) for n in (1, 4, 9))}
  several = [request.instruction for _, request in asked if len(request.references) > 1]
  assert several and not any(re.search(r'(picture|image) (one|two|three|[123])|(first|second|third) ', text)
                             for text in several)
  wide = [request.references[0].shape for settings, request in asked if settings.tiles in (1, 4, 9)]
  assert min(min(shape[:2]) for shape in wide) >= 100  # large enough for tiles to matter
  for name in ('prompts_plain', 'edits', 'system_t2i', 'references_3', 'tiles'):
    assert imaging.read(tmp_path / f'{name}.png').shape[1] > 300


def test_the_score_of_perfect_answers_is_one():
  for task in ('t2i', 'edit'):
    records = [examples.example(task, 'test', i) for i in range(20)]
    report = generation.score(records, [pipeline.Sample(r['target'], r['caption']) for r in records])
    assert report['all'] == 1.0 and report['written_exact'] == 1.0
  report = generation.score(records, [pipeline.Sample(r['references'][0], '') for r in records])
  assert report['all'] == 0.0 and report['kept'] > 0.9
