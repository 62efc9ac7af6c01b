"""Scores of a set's images: probability of yes, questions, measures beside a true image, and the truth where known.

  vqascore     the judge's probability that the image shows the prompt.
  questions    share of the questions that are answered rightly, a question counting only with those it depends on.
  questions_soft, questions_geometric   arithmetic and geometric mean of the probabilities of the right answers
               (Soft-TIFA of GenEval 2, arXiv 2512.16853), which know no dependencies.
  images       the metrics that are given, beside the true image, and of an edit beside its first reference.
  exact        of records that can tell (scenes), and how often the judge agrees.
"""

from collections.abc import Callable, Mapping, Sequence
import pathlib
from typing import NamedTuple

import numpy as np

from unifusion_jax import sharding
from unifusion_jax.data import imaging
from unifusion_jax.errors import UserError
from unifusion_jax.evaluation.benchmarks import generation, judging, tables
from unifusion_jax.evaluation.benchmarks.records import Record, with_parents
from unifusion_jax.evaluation.benchmarks.sets import Set

SCORES = ('vqascore', 'questions', 'images', 'exact')
TO_REFERENCE = '_to_reference'  # ends the names of metrics beside the first reference
PROMPTS = 16  # whose images are in memory at a time
LOWER_IS_BETTER = ('lpips', 'embedding_distance')
# By name, of images uint8 [n y x 3] beside true ones of the same size: [n]
Metrics = Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]


class Scored(NamedTuple):
  """What a set's images came to.

  Attributes:
    tables: reports of `tables.report`.
    prompts: of each prompt, in order, {measure: score of each image}.
    notes: what the tables do not say of themselves, a sentence each: questions without an answer, prompts without some
      measure.
    agreement: share of images on which the judge and the exact word agree; None where there is none.
    judged: whether a judge was asked.
  """
  tables: list[dict]
  prompts: list[dict]
  notes: list[str]
  agreement: float | None
  judged: bool


def score(benchmark: Set, records: Sequence[Record], images: int, workdir: pathlib.Path, wanted: Sequence[str],
          metrics: Metrics, load: Callable[[], judging.Judge]) -> Scored:
  """Scores all images of the records; nothing is left out.

  wanted: of SCORES.  load: the judge, called where one is wanted.

  Raises:
    UserError: for images that are not there, and where nothing that is wanted can be measured.
  """
  outputs = [benchmark.layout(record, images) for record in records]
  _check_there(workdir, records, outputs)
  asked = dict(vqascore=lambda record: True, questions=lambda record: record.questions, images=_beside)
  judge = load() if any(name in wanted and any(map(of, records)) for name, of in asked.items()) else None
  if judge:
    metrics = {**metrics, 'embedding_distance': judge.distances}
  prompts: list[dict] = []
  by_category: list[dict] = []  # of each prompt {(measure, category): (score of each image, number of questions)}
  answered = []
  for start in range(0, len(records), PROMPTS):
    part = records[start:start + PROMPTS]
    made = [generation.read(workdir, each) for each in outputs[start:start + PROMPTS]]
    flat = [(record, image) for record, own in zip(part, made) for image in own]
    whole = [{} for _ in part]
    split = [{} for _ in part]
    if judge and 'vqascore' in wanted:
      shown = judge.shown(*zip(*flat)).reshape(len(part), images)
      for scores, values in zip(whole, shown):
        scores['vqascore'] = values.tolist()
    if judge and 'questions' in wanted:
      answers = iter(judge.answer(*zip(*flat)))
      for record, scores, categories in zip(part, whole, split):
        each = [next(answers) for _ in range(images)]
        if record.questions:
          answered += [answer.answered for answer in each]
          _of_questions(record, each, scores, categories)
    for record, own, scores in zip(part, made, whole):
      if 'images' in wanted:
        scores |= _of_images(record, own, metrics)
      if 'exact' in wanted and record.exact:
        scores['exact'] = [float(record.exact(image)) for image in own]
    prompts += whole
    by_category += split
  measures = list(dict.fromkeys(name for scores in prompts for name in scores))
  if not measures:
    raise UserError(f'nothing of benchmark.scores={",".join(wanted)} can be measured on this set')
  summaries = {*benchmark.summaries, *(question.broad for record in records for question in record.questions)} - {''}
  reports = [tables.report(_measure(name, records, prompts, by_category), summaries) for name in measures]
  counts = {name: sum(name in scores for scores in prompts) for name in measures}
  notes = [f'{", ".join(name for name in measures if counts[name] == count)}: {count} of {len(prompts)} prompts have '
           'what it wants' for count in sorted(set(counts.values())) if count < len(prompts)]
  if answered:
    each = np.concatenate(answered)
    notes += [f'{np.sum(~each)} of {len(each)} questions were given none of their options as an answer, and count as '
              'wrong'] * bool(np.any(~each))
  return Scored(reports, prompts, notes, _agreement(prompts), judge is not None)


def _check_there(workdir: pathlib.Path, records: Sequence[Record], outputs: Sequence[Sequence]) -> None:
  with sharding.together('find the images'):
    if sharding.is_main_process():
      absent = [(record, output.path) for record, each in zip(records, outputs) for output in each
                if not (workdir / generation.IMAGES / output.path).is_file()]
      if absent:
        prompts = len({record.id for record, _ in absent})
        raise UserError(f'{prompts} of {len(records)} prompts have not all their images in {workdir}: the first that '
                        f'misses is {generation.IMAGES}/{absent[0][1]}. Make them with --config.benchmark.stage=all, '
                        'or score a part by its name (benchmark.only, benchmark.examples)')


def _of_questions(record: Record, answers: Sequence[judging.Answer], scores: dict, categories: dict) -> None:
  """Adds the measures of the questions of a prompt, of each image."""
  counts = with_parents(record.questions, np.stack([answer.right for answer in answers], axis=1))
  soft = np.stack([answer.probability for answer in answers], axis=1).astype(np.float64)
  scores['questions'] = counts.mean(axis=0).tolist()
  scores['questions_soft'] = soft.mean(axis=0).tolist()
  with np.errstate(divide='ignore'):
    scores['questions_geometric'] = np.exp(np.log(soft).mean(axis=0)).tolist()
  for category in dict.fromkeys(each for question in record.questions for each in question.all_categories):
    chosen = [i for i, question in enumerate(record.questions) if category in question.all_categories]
    categories['questions', category] = counts[chosen].mean(axis=0).tolist(), len(chosen)
    categories['questions_soft', category] = soft[chosen].mean(axis=0).tolist(), len(chosen)


def _of_images(record: Record, images: Sequence[np.ndarray], metrics: Metrics) -> dict[str, list[float]]:
  """Each metric of each image beside the true one and beside the first reference, those scaled to its size."""
  height, width = images[0].shape[:2]
  scores = {}
  for suffix, truth in _beside(record).items():
    others = np.stack([imaging.resize_cover(imaging.read(truth), width, height)] * len(images))
    scores |= {f'{name}{suffix}': np.asarray(of(np.stack(images), others)).tolist() for name, of in metrics.items()}
  return scores


def _beside(record: Record) -> dict:
  """{end of the metrics' names: the image that an image of the record is measured beside}."""
  found = {'': record.target} if record.target is not None else {}
  return found | ({TO_REFERENCE: record.references[0]} if record.references else {})


def _measure(name: str, records: Sequence[Record], prompts: list[dict], by_category: list[dict]) -> tables.Scores:
  """A measure by category: those of its questions where it has any, else those of the prompts."""
  values = {record.id: scores[name] for record, scores in zip(records, prompts) if name in scores}
  categories: dict[str, dict] = {}
  counts: dict[str, dict] = {}
  for record, split in zip(records, by_category):
    for (measure, category), (score, count) in split.items():
      if measure == name:
        categories.setdefault(category, {})[record.id] = score
        counts.setdefault(category, {})[record.id] = count
  if not categories:
    for record in records:
      for category in record.categories:
        if record.id in values:
          categories.setdefault(category, {})[record.id] = values[record.id]
  return tables.Scores(name, values, categories, counts, name.removesuffix(TO_REFERENCE) not in LOWER_IS_BETTER)


def _agreement(prompts: Sequence[dict]) -> float | None:
  """Share of images where the judge's probability of yes is on the side of the exact word."""
  pairs = [(judged >= 0.5, exact == 1) for scores in prompts if 'exact' in scores and 'vqascore' in scores
           for judged, exact in zip(scores['vqascore'], scores['exact'])]
  return round(float(np.mean([judged == exact for judged, exact in pairs])), 4) if pairs else None
