"""Agreement of a VLM as a judge with the exact one: VQAScore, and questions about single attributes.

  python -m unifusion_jax.main --config=configs/edit.py --mode=eval --config.eval.study=agreement \
      --config.eval.examples=60 --config.eval.batch_size=20 --workdir=runs/agreement

Each question has a probability of its answer, by the VLM, and a truth, by `judge.check` on the same image.
"""

from collections.abc import Iterator
import pathlib
from typing import NamedTuple

import numpy as np
from scipy import stats

from unifusion_jax import pipeline
from unifusion_jax.errors import UserError
from unifusion_jax.evaluation import statistics, vqascore
from unifusion_jax.scenes import examples, judge, language, questions, words
from unifusion_jax.scenes.constraints import Constraints, PAIRWISE, Wanted
from unifusion_jax.scenes.evaluation import generation

SEED = 2 ** 31 - 1  # of the examples of `train` that thresholds are chosen on: no run trains with it
LEAST = 5  # answers of yes and of no that an AUC is given for
GROUNDS = {'plain': 'plain', 'gradient': 'a gradient', 'checkered': 'checkered'}


class Asked(NamedTuple):
  """Answers about one image: the VLM's probability of `answer`, and whether it is right."""
  kind: str
  image: int
  probability: float
  truth: bool


def evaluate(pipe: pipeline.UniFusionPipeline, config, folder: pathlib.Path) -> dict:
  """The report on `config.eval.examples` examples of the split, of the recipe's tasks in turn, on square canvases.

  generated: of the images that the model makes of their requests.
  true_and_mismatched: of their true images, and of those with the questions of the example before.
  Each has, by kind of question, n and yes (answers, and the share that is true by the exact judge), auc with its
  interval (None where there are fewer than LEAST of either), and accuracy with its interval at `threshold`, which is
  the best one on as many examples of the split train. Intervals resample images with all their questions.

  Kinds: vqascore, the whole description; count, object, colour, size, fill, place, relation and background, yes or no
  about one of them; how_many, the probability of the right number's word.
  """
  del folder
  encoder = pipe.prompt_encoder.with_tiles(pipe.settings.tiles)
  if not encoder.image_processor.max_tokens:
    raise UserError('eval.study=agreement asks the VLM about images, and this one reads none')
  tuned, measured = (_asked(pipe, encoder, config, split, seed)
                     for split, seed in (('train', SEED), (config.eval.split, 0)))
  report = dict(examples=config.eval.examples, split=config.eval.split, steps=pipe.settings.steps)
  for case, answers in measured.items():
    kinds = dict.fromkeys(answer.kind for answer in answers)
    report[case] = {kind: agreement(*([answer for answer in part if answer.kind == kind]
                                      for part in (answers, tuned[case]))) for kind in kinds}
  return report


def agreement(answers: list[Asked], tuned: list[Asked]) -> dict:
  """Figures of one kind of question, the threshold chosen on `tuned`; None where that has none."""
  values = np.array([(answer.probability, answer.truth) for answer in answers])
  images, truths = [answer.image for answer in answers], values[:, 1]
  report = dict(n=len(answers), yes=round(float(truths.mean()), 4), auc=None)
  if LEAST <= truths.sum() <= len(truths) - LEAST:
    report['auc'] = _with_interval(auc(values), *statistics.bootstrap(values, auc, images))
  if not tuned:
    return report | dict(threshold=None, accuracy=None)
  threshold = best_threshold(np.array([(answer.probability, answer.truth) for answer in tuned]))
  right = (values[:, 0] > threshold) == truths
  return report | dict(threshold=round(threshold, 4),
                       accuracy=_with_interval(right.mean(), *statistics.bootstrap(right, groups=images)))


def auc(values: np.ndarray) -> float:
  """Area under the ROC curve of values [n 2], (score, truth): how often a true one scores higher; 0.5 without both."""
  truths = values[:, 1] > 0
  positives, negatives = truths.sum(), (~truths).sum()
  if not (positives and negatives):
    return 0.5
  ranks = stats.rankdata(values[:, 0])
  return float((ranks[truths].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def best_threshold(values: np.ndarray) -> float:
  """The score above which to say yes, of values [n 2]: the middle between two scores, or 0 or 1, of most right."""
  scores = np.unique(values[:, 0])
  options = np.concatenate([[0.0], (scores[1:] + scores[:-1]) / 2, [1.0]])
  right = ((values[:, 0] > options[:, None]) == values[:, 1]).mean(axis=1)
  best = np.flatnonzero(right == right.max())
  return float(options[best[len(best) // 2]])


def questions_about(constraints: Constraints) -> Iterator[tuple[str, str, str, Constraints, str]]:
  """(kind, question, answer, constraints, their kind in `judge.check`) of each single thing that a description says."""
  one = lambda wanted: Constraints((wanted,), exact_count=False)
  yield 'vqascore', vqascore.QUESTION.format(language.describe(constraints)), 'yes', constraints, 'all'
  count = Constraints((Wanted(),) * len(constraints.objects))
  yield 'count', vqascore.QUESTION.format(language.describe(count)), 'yes', count, 'count'
  yield 'how_many', 'how many shapes are there?', questions.NUMBERS[len(constraints.objects)], count, 'count'
  for wanted in dict.fromkeys(constraints.objects):
    parts = [('object', Wanted(wanted.shape))] if wanted.shape else []
    parts += [(kind, Wanted(wanted.shape, **{kind: getattr(wanted, kind)}))
              for kind in ('colour', 'size', 'fill', 'place') if getattr(wanted, kind)]
    for kind, part in parts:
      yield kind, f'is there {language.describe(Constraints((part,)))}?', 'yes', one(part), kind
  for i, relation, *others in constraints.relations:
    if relation in PAIRWISE:
      a, b = (Wanted(wanted.shape, wanted.colour) for wanted in (constraints.objects[k] for k in (i, *others)))
      related = Constraints((a, b), exact_count=False, relations=((0, relation, 1),))
      yield 'relation', f'is {_the(a)} {words.RELATIONS[relation][0]} {_the(b)}?', 'yes', related, 'relation'
  if constraints.background:
    ground = Constraints((), constraints.background, exact_count=False)
    yield 'background', f'is the background {GROUNDS[constraints.background.kind]}?', 'yes', ground, 'background'


def _the(wanted: Wanted) -> str:
  return ' '.join(['the', *filter(None, (wanted.colour, wanted.shape or 'shape'))])


def _asked(pipe: pipeline.UniFusionPipeline, encoder, config, split: str, seed: int) -> dict[str, list[Asked]]:
  """{case: answers} on examples of a split."""
  records = _records(config, split, seed)
  constraints = [language.constraints_from_json(record['constraints']) for record in records]
  samples = generation.generate(pipe, records, config.eval.batch_size)
  made, true = [sample.image for sample in samples], [record['target'] for record in records]
  pairs = dict(generated=list(zip(made, constraints)),
               true_and_mismatched=[*zip(true, constraints), *zip(true[1:] + true[:1], constraints)])
  return {case: _answers(pipe, encoder, config, each) for case, each in pairs.items()}


def _records(config, split: str, seed: int) -> list[dict]:
  tasks = list(dict.fromkeys(task.name.partition('/')[0] for task in config.data.chosen))
  records, i = [], 0
  while len(records) < config.eval.examples:
    task = tasks[len(records) % len(tasks)]
    if examples.aspect(task, split, i, seed) == 'square':
      records.append(examples.example(task, split, i, seed, config.data.size))
    i += 1
  return records


def _answers(pipe: pipeline.UniFusionPipeline, encoder, config, pairs: list[tuple[np.ndarray, Constraints]]
             ) -> list[Asked]:
  rows = []
  for number, (image, constraints) in enumerate(pairs):
    reading = judge.read(image)
    for kind, question, answer, part, checked in questions_about(constraints):
      truth = judge.check(reading, part)[checked]
      if part.background and kind == 'background':  # of which the question names the kind alone
        truth = reading.background is not None and reading.background.kind == part.background.kind
      rows.append((kind, number, truth, image, question, answer))
  kinds, numbers, truths, images, asked, answers = zip(*rows)
  probabilities = vqascore.probabilities(pipe.frozen.vlm, encoder, images, asked, answers, config.eval.batch_size)
  return [Asked(*each) for each in zip(kinds, numbers, map(float, probabilities), map(bool, truths))]


def _with_interval(value: float, low: float, high: float) -> dict[str, float]:
  """The value, and its interval where it has one: a single image has none."""
  interval = {} if np.isnan(low) else dict(low=low, high=high)
  return {name: round(float(each), 4) for name, each in dict(value=value, **interval).items()}
