"""Conditions of requests: writing and reading agree, rows do not depend on their batch, fall-backs are told."""

import dataclasses
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pipeline import random_pipe, REFERENCES, requests, SQUARE, tokens

from unifusion_jax import conditioning, config, prompting, sharding, verifi
from unifusion_jax.data import imaging, transforms
from unifusion_jax.errors import UserError
from unifusion_jax.models import causal_lm, decoder, text_generation
from unifusion_jax.pipeline import UniFusionPipeline
from unifusion_jax.request import Request


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
  text = 'a green ring and a red star, a heart'
  hot = tiny.settings.changed(temperature=2.5)
  asked = [Request(text, seed=seed) for seed in range(8)]
  first = tiny.encode(asked, hot).rewrites
  assert first == tiny.encode(asked[::-1], hot).rewrites[::-1] and len(set(first)) > 4
  # The keys that renew noise between steps are the seeds' own: text sampled with these would share their stream
  encoder = tiny.prompt_encoder
  rows = [verifi.arrays(encoder.chat.spans(text), encoder.lengths(0)[0], 1, ())] * 8
  with jax.set_mesh(tiny.mesh):
    batch = sharding.shard(prompting.stacked(rows))
    words = np.asarray(jax.random.key_data(jax.vmap(jax.random.key)(np.arange(8))))
    keys = jax.random.wrap_key_data(sharding.shard(words))
    ids, lengths, *_ = text_generation.generate(
        tiny.frozen.vlm, batch['input_ids'], batch['attention_mask'], max_new=encoder.max_rewrite,
        stop_ids=encoder.chat.stop_ids, taps=tiny.frozen.taps, temperature=2.5, key=keys)
  shared, _ = prompting.read_rewrites(encoder.chat, np.asarray(ids), np.asarray(lengths))
  assert sum(a == b for a, b in zip(first, shared)) < 4


@pytest.mark.slow
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
