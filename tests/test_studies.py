"""Previews, and the studies of generation: each measures what it says."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from test_pipeline import SQUARE
from test_scenes_wide import meeting

from unifusion_jax import config, pipeline
from unifusion_jax.commands import sample
from unifusion_jax.data import imaging
from unifusion_jax.pipeline import UniFusionPipeline
from unifusion_jax.scenes import examples, language, render, world
from unifusion_jax.scenes.evaluation import agreement, by_hand, generation, handwritten, noise_levels, verifi_study
from unifusion_jax.scenes.evaluation import settings as evaluation

pytestmark = pytest.mark.slow


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


def test_the_study_of_agreement(tiny, recipe, tmp_path):
  """The embedded VLM tells true images from others; of empty ones nothing that is asked for is true."""

  @dataclasses.dataclass
  class Empty:
    settings: config.SampleConfig
    prompt_encoder: object
    frozen: object

    def generate(self, requests, height, width, settings):
      ground = np.full((height, width, 3), world.BACKGROUND_COLOURS['cream'], np.uint8)
      return [pipeline.Sample(ground, '') for _ in requests]

  made = recipe(eval=evaluation.GenerationEvaluation(study='agreement', examples=6, batch_size=16))
  with jax.set_mesh(tiny.mesh):
    report = agreement.evaluate(Empty(tiny.settings, tiny.prompt_encoder, tiny.frozen), made, tmp_path)
  score = report['true_and_mismatched']['vqascore']
  assert score['n'] == 12 and score['yes'] == 0.5 and score['auc']['value'] > 0.9 and score['accuracy']['value'] > 0.8
  assert {'count', 'how_many', 'colour'} < report['generated'].keys()
  for kind, figures in report['generated'].items():
    assert figures['auc'] is None and (figures['yes'] == 0 or kind == 'background')


def test_questions_about_single_things():
  text = 'a small red circle left of a star, on a cream and mint checkered background'
  asked = list(agreement.questions_about(language.parse(text)))
  assert [(kind, question) for kind, question, *_ in asked] == [
      ('vqascore', f'does this picture show {text}?'), ('count', 'does this picture show two shapes?'),
      ('how_many', 'how many shapes are there?'), ('object', 'is there a circle?'),
      ('colour', 'is there a red circle?'), ('size', 'is there a small circle?'), ('object', 'is there a star?'),
      ('relation', 'is the red circle left of the star?'), ('background', 'is the background checkered?')]
  assert [answer for _, _, answer, *_ in asked] == ['yes', 'yes', 'two'] + ['yes'] * 6


def test_auc_and_threshold():
  rng = np.random.default_rng(0)
  values = np.stack([rng.integers(0, 9, 60) / 8, rng.random(60) < 0.4], axis=1)
  values[:, 0] += values[:, 1] / 4
  wins = [(a > b) + (a == b) / 2 for a in values[values[:, 1] == 1, 0] for b in values[values[:, 1] == 0, 0]]
  np.testing.assert_allclose(agreement.auc(values), np.mean(wins))
  rates = [np.mean((values[:, 0] > t) == values[:, 1]) for t in np.linspace(0, 2, 401)]
  assert np.mean((values[:, 0] > agreement.best_threshold(values)) == values[:, 1]) == max(rates)
  answers = [agreement.Asked('colour', i // 2, *value) for i, value in enumerate(values)]
  figures = agreement.agreement(answers, answers)
  assert figures['accuracy']['value'] == pytest.approx(max(rates), abs=1e-4)
  assert figures['auc']['low'] < figures['auc']['value'] < figures['auc']['high']
  assert agreement.agreement(answers, [])['accuracy'] is None
  assert agreement.agreement(answers[:3], answers)['auc'] is None
