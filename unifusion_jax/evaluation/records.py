"""Evaluation of records of one's own: flow-matching loss, VQAScore, and samples beside their targets."""

import dataclasses
import pathlib

import numpy as np

from unifusion_jax import pipeline, ranges, sharding
from unifusion_jax.data import imaging, loader
from unifusion_jax.evaluation import flow_loss, vqascore
from unifusion_jax.evaluation import images as metrics
from unifusion_jax.fields import Path
from unifusion_jax.request import requests_of

CELL = 192  # pixels of an image on a sheet
SHOWN = 12  # rows of a sheet


@dataclasses.dataclass
class RecordsEvaluation:
  """Evaluation on the first records of `data.held_out`, or without one of `data.path`."""
  examples: int = 200
  batch_size: int = 32
  lpips: Path | None = None  # folder with the weights of LPIPS; None: it is not measured

  report = 'eval'

  def problems(self, config) -> list[str]:
    """Settings that cannot work, a sentence each."""
    del config
    return ranges.problems(self, 'eval.', examples=ranges.Range(1, 10 ** 6), batch_size=ranges.Range(1, 10 ** 6))

  def run(self, config, params, folder: pathlib.Path) -> dict:
    """The report; sheets of images go into `folder`."""
    pipe = config.objective.pipeline(config, params, config.objective.frozen(config))
    return evaluate(pipe, config, folder)


def evaluate(pipe: pipeline.UniFusionPipeline, config, folder: pathlib.Path, score=None) -> dict:
  """Measures the first `config.eval.examples` records of each source of `loader.held_out`.

  The report has for a list, or for each task of a prepared folder, `origin` and
    flow_loss: `flow_loss.summary`.
    fallback_rate: share of samples whose rewrite could not be used.
    vqascore, vqascore_truth: the VLM's mean probability that a sample, and a target, shows its caption; for VLMs that
      read images.
    similarity: `images.summary` of the samples beside the targets.
    what `score(records, samples)` returns, if it is given.
  """
  lpips = metrics.Lpips(config.eval.lpips) if config.eval.lpips else None  # before anything slow
  sources, trained = loader.held_out(config.data)
  settings = pipe.settings
  report = dict(steps=settings.steps, guidance=settings.guidance, eta=settings.eta)
  measures = {}
  for name, source in sources.items():
    measured, records, samples = _measure(pipe, source, config.eval, lpips)
    measures[name] = origin(source, trained, len(records), config.eval.examples) | measured
    if score:
      measures[name] |= score(records, samples)
    with sharding.together('write images'):
      if sharding.is_main_process():
        _write_sheets(folder, name.replace('/', '_'), records, samples)
  return report | (measures if len(measures) > 1 else next(iter(measures.values())))


def origin(source, trained: bool, examples: int, wanted: int) -> dict:
  """What was measured: the file and its number of records, how many of the `wanted` ones, whether training reads them.

  left_out counts broken records and those with too long a text.
  """
  report = dict(file=source.name, records=len(source), examples=examples,
                left_out=min(wanted, len(source)) - examples, held_out=not trained)
  if trained:
    report['note'] = ('training with this data.path reads these records: for figures of unseen ones name a list with '
                      'data.held_out')
  return report


def _measure(pipe: pipeline.UniFusionPipeline, source, settings, lpips: metrics.Lpips | None
             ) -> tuple[dict, list[dict], list[pipeline.Sample]]:
  """(figures, records with small references, their samples)."""
  losses, records, samples, measures = [], [], [], []
  for batch in flow_loss.batches(source, pipe.prompt_encoder, settings.examples, settings.batch_size,
                                 pipe.reference_unit):
    losses.append(flow_loss.losses(pipe, batch))
    requests = [dataclasses.replace(request, seed=number)
                for number, request in zip(batch.numbers, requests_of(batch.records))]
    _, rows = next(sharding.batched(requests, batch.rows))
    generated = pipe.generate(rows, *batch.records[0]['target'].shape[:2])[:len(requests)]
    measures.append(metrics.measures(*(np.stack(images) for images in (
        [sample.image for sample in generated], [record['target'] for record in batch.records])), lpips))
    samples += generated
    records += [dict(record, references=[imaging.shrunk(imaging.read(image), CELL)
                                         for image in record['references']])
                for record in batch.records]  # photographs of any size
  report = dict(flow_loss=flow_loss.summary(np.concatenate(losses)),
                fallback_rate=round(float(np.mean([bool(sample.warning) for sample in samples])), 4))
  similarity = {name: np.concatenate([part[name] for part in measures]) for name in measures[0]}
  encoder = pipe.prompt_encoder.with_tiles(pipe.settings.tiles)
  if encoder.image_processor.max_tokens:  # a VLM that reads images
    captions = [record['caption'] for record in records]
    sampled, targets = [sample.image for sample in samples], [imaging.read(record['target']) for record in records]
    for suffix, images in (('', sampled), ('_truth', targets)):
      scores = vqascore.scores(pipe.frozen.vlm, encoder, images, captions, settings.batch_size)
      report[f'vqascore{suffix}'] = round(float(np.mean(scores)), 4)
    similarity['embedding_distance'] = metrics.embedding_distance(pipe.frozen.vlm, encoder, sampled, targets,
                                                                  settings.batch_size)
  return report | dict(similarity=metrics.summary(similarity)), records, samples


def _write_sheets(folder: pathlib.Path, name: str, records: list[dict], samples: list[pipeline.Sample]) -> None:
  """A sheet of the first records with each number of references."""
  for count in sorted({len(record['references']) for record in records}):
    shown = [i for i, record in enumerate(records) if len(record['references']) == count][:SHOWN]
    imaging.write_png(folder / f'{name}_references_{count}.png',
                      sheet([records[i] for i in shown], [samples[i] for i in shown]))


def sheet(records: list[dict], samples: list[pipeline.Sample]) -> np.ndarray:
  """Grid of references with the request, samples with their rewrite, and targets; uint8 [y x 3]."""
  rows, captions = [], []
  for record, request, sample in zip(records, requests_of(records), samples):
    references = [imaging.read(image) for image in record['references']]
    rows.append([*references, sample.image, imaging.read(record['target'])])
    asked = [*([''] * (len(references) - 1)), request.instruction] if references else []
    captions.append([*asked, sample.rewrite, record['caption'] if references else request.instruction])
  titles = [*['reference'] * (len(rows[0]) - 2), 'sample', 'target']
  return imaging.grid(rows, captions, titles if len({len(row) for row in rows}) == 1 else None, cell=CELL)
