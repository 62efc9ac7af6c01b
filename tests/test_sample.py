"""From requests to pictures: the single pass and the teacher-forced one agree, answers do not depend on their batch."""

import dataclasses
import json

import jax
import numpy as np
from PIL import Image
import pytest

from unifusion_jax import config
from unifusion_jax import jobs
from unifusion_jax import requests
from unifusion_jax import sample
from unifusion_jax.data import images
from unifusion_jax.data.scenes import examples
from unifusion_jax.eval import generation as eval_generation


@pytest.fixture(scope='module')
def sampler(recipe):
  """A random model whose final layer is not zero, so that its condition matters."""
  from unifusion_jax import sharding
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tp=2))):
    job = jobs.build(recipe())
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jax.device_put(rng.normal(0, 0.2, x.shape).astype(np.float32), x.sharding),
                          job.init_params())
    return job.sampler(params, job.load_frozen())


REFERENCES = [examples.example('edit', 'test', i)['references'][0] for i in range(4)]


def asked(count=4, **changes):
  return [dataclasses.replace(sample.Request('make it blue', (REFERENCES[i],), i), **changes) for i in range(count)]


def test_written_tokens_condition_as_they_were_computed(sampler, monkeypatch):
  """A VLM that writes a known text gives the velocity of a teacher-forced pass over that text."""
  text = 'a small red circle'
  ids = [*sampler.layout.chat.text_ids(text), *sampler.layout.chat.stop_ids]
  monkeypatch.setattr(sample.generate, 'generate', _dictated(ids))
  single, mask, written = sampler._condition(asked())
  forced, forced_mask, _ = sampler._condition(asked(rewrite=text))
  assert written == [text] * 4
  for row in range(4):
    np.testing.assert_allclose(np.asarray(single)[row][np.asarray(mask)[row]],
                               np.asarray(forced)[row][np.asarray(forced_mask)[row]], atol=2e-4, rtol=2e-3)


def _dictated(ids):
  """`generate` whose choices are given: the prompt is prolonged by them, and the states are those of feeding them."""
  from unifusion_jax import generate
  from unifusion_jax.eval.reconstruction import put

  def made(vlm, tokens, valid, tiles, *, max_new, stop_ids, taps):
    tokens, valid = np.asarray(tokens), np.asarray(valid)
    lengths = valid.sum(1)
    longer = np.pad(tokens, ((0, 0), (0, len(ids))))
    more = np.pad(valid, ((0, 0), (0, len(ids))))
    for row, n in enumerate(lengths):
      longer[row, n:n + len(ids)], more[row, n:n + len(ids)] = ids, True
    hidden = np.asarray(vlm.hidden(put(longer), put(more), taps, tiles))
    out = np.zeros((len(tokens), max_new, *hidden.shape[2:]), hidden.dtype)
    for row, n in enumerate(lengths):
      out[row, :len(ids)] = hidden[row, n:n + len(ids)]
    written = np.zeros((len(tokens), max_new), np.int32)
    written[:, :len(ids)] = ids
    return generate.Generated(put(written), put(np.full(len(tokens), len(ids))), None,
                              put(hidden[:, :tokens.shape[1]]), put(out))
  return made


def test_answers_do_not_depend_on_their_batch(sampler):
  together = sampler(asked(4), 64, 64)
  alone = sampler(asked(1), 64, 64)
  assert together[0].written == alone[0].written
  difference = np.abs(together[0].picture.astype(int) - alone[0].picture)
  assert difference.max() <= 1


def test_seed_text_and_reference_matter(sampler):
  base = sampler(asked(1, rewrite='a red circle'), 64, 64)[0].picture
  for change in (dict(seed=9), dict(rewrite='a blue star'), dict(references=(REFERENCES[1],))):
    request = dataclasses.replace(asked(1, rewrite='a red circle')[0], **change)
    assert (sampler([request], 64, 64)[0].picture != base).any()


def test_guidance_of_one_needs_no_null(sampler, monkeypatch):
  plain = dataclasses.replace(sampler, settings=dataclasses.replace(sampler.settings, guidance=1.0))
  near = dataclasses.replace(sampler, settings=dataclasses.replace(sampler.settings, guidance=1.0001))
  a, b = plain(asked(1, rewrite='x'), 64, 64)[0].picture, near(asked(1, rewrite='x'), 64, 64)[0].picture
  assert np.abs(a.astype(int) - b).max() <= 1


def test_without_verifi_the_request_is_the_text(sampler):
  raw = dataclasses.replace(sampler, settings=dataclasses.replace(sampler.settings, verifi=False))
  assert raw.write(asked(4)) == ['make it blue'] * 4


@pytest.mark.parametrize('height, width', [(48, 80), (80, 48)])
def test_other_shapes(sampler, height, width):
  assert sampler([sample.Request('a red circle')], height, width)[0].picture.shape == (height, width, 3)


def test_sizes_that_cannot_be(sampler):
  with pytest.raises(ValueError, match='multiples of 8'):
    sampler(asked(1), 60, 64)
  with pytest.raises(ValueError, match='equally many picture tokens'):
    sampler([*asked(1), sample.Request('a red circle')], 64, 64)
  with pytest.raises(ValueError, match='does not fit'):
    sampler(asked(1, instruction='red ' * 200), 64, 64)


def test_requests_from_the_command_line(tmp_path):
  path = tmp_path / 'wide.png'
  Image.new('RGB', (100, 60), 'red').save(path)
  settings = config.SampleConfig(prompt='make it blue\n\nmake it green', references=(str(path),), num_images=2, seed=5)
  made = requests.from_config(settings, 64)
  assert [(r.instruction, r.seed, h, w) for r, h, w in made] == [
      ('make it blue', 5, 48, 80), ('make it blue', 6, 48, 80), ('make it green', 7, 48, 80), ('make it green', 8, 48, 80)]
  (tmp_path / 'prompts.txt').write_text('one\ntwo\n')
  settings = config.SampleConfig(prompt=f'@{tmp_path}/prompts.txt', width=96, height=32)
  assert [(r.instruction, h, w) for r, h, w in requests.from_config(settings, 64)] == [('one', 32, 96), ('two', 32, 96)]
  with pytest.raises(ValueError, match='nothing to draw'):
    requests.from_config(config.SampleConfig(), 64)
  (tmp_path / 'broken.png').write_bytes(b'no picture')
  with pytest.raises(ValueError, match='broken.png'):
    requests.from_config(config.SampleConfig(prompt='x', references=(str(tmp_path / 'broken.png'),)), 64)


def test_answers_are_files_that_say_what_made_them(sampler, tmp_path, capsys):
  settings = dataclasses.replace(sampler.settings, prompt='a red circle', num_images=2)
  requests.answer(sampler, requests.from_config(settings, 64), settings, tmp_path)
  picture = Image.open(tmp_path / '001.png')
  assert picture.size == (64, 64) and picture.text['prompt'] == 'a red circle' and picture.text['seed'] == '1'
  assert json.loads(picture.text['settings'])['steps'] == settings.steps and 'written' in picture.text
  assert (tmp_path / 'grid.png').exists() and 'asked:   a red circle' in capsys.readouterr().out


def test_preview_and_evaluation(sampler, recipe, tmp_path, mesh):
  made = recipe()
  job = jobs.build(made)
  job.preview(sampler.model, sampler.frozen, tmp_path, 7)
  assert images.read(tmp_path / 'samples' / '0000007.png').shape[2] == 3
  report = eval_generation.evaluate(sampler, made, tmp_path / 'eval')
  for name in ('test_t2i_1-2', 'test_t2i_3-4', 'heldout_t2i_1-2', 'heldout_t2i_3-4'):
    assert 0 <= report[name]['all'] <= 1 and (tmp_path / 'eval' / f'{name}.png').exists()


def test_the_score_of_perfect_answers_is_one():
  for task in ('t2i', 'edit'):
    records = [examples.example(task, 'test', i) for i in range(20)]
    perfect = [sample.Result(r['target'], r['caption']) for r in records]
    report = eval_generation.score(records, perfect)
    assert report['all'] == 1.0 and report['written_exact'] == 1.0
  copies = [sample.Result(r['references'][0], '') for r in records]
  report = eval_generation.score(records, copies)
  assert report['all'] == 0.0 and report['kept'] > 0.9
