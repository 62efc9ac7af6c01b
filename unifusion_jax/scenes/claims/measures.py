"""Measurements of a pipeline on square test scenes, example by example, so that arms are compared on the same ones.

Each measure(pipe, size, seed, settings, ...) -> {value: list with an entry for each example}; None where an example has
no such value, in every arm alike. `size` is of experiments.py; seed: of the noise, the same for every arm.
"""

from collections.abc import Callable, Mapping
import functools
import itertools
from typing import Any

import numpy as np

from unifusion_jax import pipeline, sharding
from unifusion_jax.data import transforms
from unifusion_jax.evaluation import flow_loss, images, vqascore
from unifusion_jax.scenes import examples, judge, language, multi, render, world
from unifusion_jax.scenes.evaluation import generation

SIDE = 64          # pixels of images
BATCH = 50         # images sampled at a time
STRIDE = 1_000_003  # between the noise of two seeds
STYLES = {'plain': 'plain', 'heldout': 'phrasings never trained on', 'knowledge': 'knowledge'}
DECIDED = (0.7, 0.9)  # times of the flow loss, where the text decides (docs/training.md)
LEAST = 0.1        # share of an image that must stay for its pixels to be compared


def prompts(pipe, size, seed: int, settings: Mapping[str, Any], loss: bool = False) -> dict[str, list]:
  """Verdicts on images of one or two and of three or four objects; with `loss` the flow loss on their captions too."""
  values, losses = {}, []
  for objects in ((1, 2), (3, 4)):
    records = _records('t2i', size, objects)
    group = f'{objects[0]}-{objects[1]}'
    values |= {f'{group}/{name}': each for name, each in _drawn(pipe, records, seed, settings).items()}
    losses += _flow_losses(pipe, records) if loss else []
  return values | (dict(loss=losses) if loss else {})


def styles(pipe, size, seed: int, settings: Mapping[str, Any]) -> dict[str, list]:
  """Verdicts on images of one or two objects by the style of the prompt."""
  values = {}
  for style in STYLES:
    records = _records('t2i', size, (1, 2), lambda record, style=style: record['style'] == style)
    values |= {f'{style}/{name}': each for name, each in _drawn(pipe, records, seed, settings).items()}
  return values


def edits(pipe, size, seed: int, settings: Mapping[str, Any], larger: int = 1) -> dict[str, list]:
  """Verdicts on edits, and PSNR and SSIM beside the true image where it is the reference's own pixels.

  larger: side of the references shown, relative to the images'. What an edit changes does not count: in SSIM it is
  filled in with the truth.
  """
  records = _records('edit', size, (1, 4), larger=larger)
  samples = _sampled(pipe, records, seed, settings)
  values = {name: [] for name in ('all', 'asked', 'kept', 'written', 'psnr', 'ssim')}
  for record, sample in zip(records, samples):
    source, target = (world.Scene.from_json(text) for text in (record['source'][0], record['scene']))
    verdict = judge.check_edit(judge.read(sample.image), source, target)
    for name in ('all', 'asked', 'kept'):
      values[name].append(bool(verdict[name]))
    values['written'].append(sample.rewrite == record['caption'])
    stays = _stays(source, record['target'])
    psnr = ssim = None
    if np.mean(stays) >= LEAST:
      error = np.mean((sample.image[stays].astype(np.float32) - record['target'][stays]) ** 2)
      psnr = float(10 * np.log10(images.MOST ** 2 / max(error, 1e-3)))
      ssim = float(images.ssim(np.where(stays[..., None], sample.image, record['target']), record['target']))
    values['psnr'].append(psnr)
    values['ssim'].append(ssim)
  return {f'edit/{name}': each for name, each in values.items()}


def reconstruct(pipe, size, seed: int, settings: Mapping[str, Any], larger: int = 1, rewrite: str | None = None
                ) -> dict[str, list]:
  """Errors of references generated again, at their smaller size; rewrite: '' conditions on the image tokens alone."""
  records = [dict(record, rewrite=rewrite) for record in _records('reconstruct', size, (1, 4), larger=larger)]
  drawn = np.stack([sample.image for sample in _sampled(pipe, records, seed, settings)])
  truth = np.stack([record['target'] for record in records])
  distances = images.embedding_distance(pipe.vlm, pipe.prompt_encoder.with_tiles(1), drawn, truth, BATCH)
  return dict(
      exact=[judge.exact(judge.read(image), world.Scene.from_json(record['scene']))
             for image, record in zip(drawn, records)],
      rmse=np.sqrt(np.mean((drawn.astype(np.float32) - truth) ** 2, axis=(1, 2, 3))).tolist(),
      dissimilarity=(1 - images.ssim(drawn, truth)).tolist(), distance=distances.tolist())


def several(pipe, size, seed: int, settings: Mapping[str, Any], truth: bool = False) -> dict[str, list]:
  """Exact images and texts of requests with two and three references.

  Two are named by what they show; of three, requests without a number are one in two hundred, so all are taken.
  truth: with the true description in place of what the VLM writes.
  """
  ordinals = [number for numbers in multi.ORDINALS for number in numbers]
  by_content = lambda record: not any(number in record['instruction'] for number in ordinals)
  values = {}
  for count, wanted in ((2, by_content), (3, _any)):
    records = _records('multi', size, (1, 4), wanted, references=count)
    asked = [dict(record, rewrite=record['caption'] if truth else None) for record in records]
    samples = _sampled(pipe, asked, seed, settings)
    values[f'{count}/all'] = [judge.exact(judge.read(sample.image), world.Scene.from_json(record['scene']))
                              for record, sample in zip(records, samples)]
    values[f'{count}/written'] = [sample.rewrite == record['caption'] for record, sample in zip(records, samples)]
  return values


def _any(record: dict) -> bool:
  del record
  return True


def _records(task: str, size, objects: tuple[int, int], wanted: Callable[[dict], bool] = _any, larger: int = 1,
             references: int | None = None) -> list[dict]:
  """The first wanted examples of the split test whose target is square; other shapes would be compiled anew.

  wanted: of a record without images. references: their number, None for any.
  """
  make = functools.partial(examples.example, task, 'test', objects=objects)
  square = (i for i in itertools.count() if examples.aspect(task, 'test', i) == 'square')
  counted = (i for i in square if references in (None, examples.references(task, 'test', i)))
  chosen = (i for i in counted if wanted(make(i, images=False)))
  return [make(i, reference_size=SIDE * larger) for i in itertools.islice(chosen, size.examples)]


def _sampled(pipe, records: list[dict], seed: int, settings: Mapping[str, Any]) -> list[pipeline.Sample]:
  return generation.generate(pipe, records, min(BATCH, len(records)), STRIDE * seed, pipe.settings.changed(**settings))


def _drawn(pipe, records: list[dict], seed: int, settings: Mapping[str, Any]) -> dict[str, list]:
  """Of prompts: whether all constraints are met, the share that is, the VLM's score and whether its text is exact."""
  samples = _sampled(pipe, records, seed, settings)
  verdicts = [judge.check(judge.read(sample.image), language.constraints_from_json(record['constraints']))
              for record, sample in zip(records, samples)]
  values = dict(all=[bool(verdict['all']) for verdict in verdicts],
                share=[float(np.mean([met for name, met in verdict.items() if name != 'all'])) for verdict in verdicts],
                written=[sample.rewrite == record['caption'] for record, sample in zip(records, samples)])
  encoder = pipe.prompt_encoder.with_tiles(1)
  if encoder.image_processor.max_tokens:  # a VLM that reads images
    values['vqascore'] = vqascore.scores(pipe.vlm, encoder, [sample.image for sample in samples],
                                         [record['caption'] for record in records], BATCH).tolist()
  return values


def _flow_losses(pipe, records: list[dict]) -> list[float]:
  """The flow loss of each record's target under its caption, its mean over DECIDED times."""
  transform = transforms.GenerationExample(pipe.prompt_encoder, cond_dropout=0.0, image_dropout=0.0)
  arrays = [transform(record, np.random.default_rng(0)) for record in records]
  numbered, rows = list(enumerate(arrays)), sharding.padded_batch(min(BATCH, len(records)))
  losses = np.concatenate([
      flow_loss.losses(pipe, flow_loss.Batch([i for i, _ in part], (), [row for _, row in part], rows))
      for part, _ in sharding.batched(numbered, rows)])
  return np.mean(losses[:, np.isin(flow_loss.TIMES, DECIDED)], axis=1).tolist()


def _stays(source: world.Scene, target: np.ndarray) -> np.ndarray:
  """Where the true image has the reference's own pixels, bool [y x]; nowhere if they differ in shape."""
  before = render.render(source)
  if before.shape != target.shape:
    return np.zeros(target.shape[:2], bool)
  return np.all(before == target, axis=-1)
