"""Prompts of the test split as a benchmark of one's own, with questions, and the judge's exact word on each image."""

import functools
import itertools

import numpy as np

from unifusion_jax.evaluation.benchmarks.records import Question, Record
from unifusion_jax.scenes import examples, judge
from unifusion_jax.scenes.constraints import Constraints
from unifusion_jax.scenes.language import constraints_from_json, describe
from unifusion_jax.scenes.questions import NUMBERS

PROMPTS = 200  # half of them of one or two objects, half of three or four
_GROUNDS = {'plain': 'plain', 'gradient': 'a gradient', 'checkered': 'checkered'}


def records() -> list[Record]:
  """The first prompts of the test split; a prompt of few objects and one of many in turn."""
  made = []
  for i, objects in itertools.product(range(PROMPTS // 2), ((1, 2), (3, 4))):
    example = examples.example('t2i', 'test', i, objects=objects, images=False)
    constraints = constraints_from_json(example['constraints'])
    made.append(Record(f'{len(made):05}', example['instruction'], f'scenes t2i test {i}',
                       (f'{objects[0]}-{objects[1]} objects',), questions(constraints), example['caption'],
                       exact=functools.partial(_is_right, constraints)))
  return made


def _is_right(constraints: Constraints, image: np.ndarray) -> bool:
  return judge.check(judge.read(image), constraints)['all']


def questions(constraints: Constraints) -> tuple[Question, ...]:
  """Whether each object is there, how many there are, how they stand to each other, and the kind of background."""
  named = [describe(Constraints((wanted,))) for wanted in constraints.objects]
  made = [Question(f'is there {name} in the picture?', category='object') for name in named]
  if constraints.exact_count:
    made.append(Question('how many shapes are there?', NUMBERS[len(named)], 'count'))
  for i, relation, *others in constraints.relations:
    first, *rest = (f'the {named[k].partition(" ")[2]}' for k in (i, *others))
    made.append(Question(f'is {first} {relation} {" and ".join(rest)}?', category='relation', parents=(i, *others)))
  if constraints.background:
    made.append(Question(f'is the background {_GROUNDS[constraints.background.kind]}?', category='background'))
  return tuple(made)
