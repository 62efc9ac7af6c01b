"""Questions about an image with short, certain answers, to train the VLM for chat and for VQAScore."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from unifusion_jax.evaluation import vqascore
from unifusion_jax.scenes import splits, words
from unifusion_jax.scenes.composition import pick, random_background, weighted
from unifusion_jax.scenes.constraints import Constraints, PAIRWISE, Wanted
from unifusion_jax.scenes.language import (
  background_phrase,
  clear_relations,
  clearly,
  clearly_between,
  constraints_of,
  describe,
  plural,
)
from unifusion_jax.scenes.pointing import phrase, random_pointer
from unifusion_jax.scenes.world import BACKGROUND_KINDS, COLOURS, FILLS, Object, PLACES, Scene, SHAPES, SIZES

# (share in tests, share in training) of each kind. Training has five kinds of its own: four with longer answers
# ('which' object is meant, 'what' has an attribute, what is 'beside' an object, what is 'wrong' in a description), and
# 'has', a single attribute with yes or no. A yes alone teaches too little about finding the objects of questions.
_SHARES = {
    'which': (0.0, 0.20), 'what': (0.0, 0.11), 'wrong': (0.0, 0.15), 'beside': (0.0, 0.09), 'has': (0.0, 0.03),
    'shows': (0.25, 0.14), 'exists': (0.13, 0.05), 'relation': (0.09, 0.10), 'compare': (0.06, 0.06),
    'count': (0.11, 0.02),
    'colour': (0.09, 0.01), 'shape': (0.08, 0.01), 'size': (0.04, 0.005), 'fill': (0.04, 0.005), 'where': (0.06, 0.01),
    'background': (0.05, 0.01)}
QUESTION_KINDS = tuple(_SHARES)
QUESTION_WEIGHTS, TRAIN_WEIGHTS = zip(*_SHARES.values())
NUMBERS = ('zero', 'one', 'two', 'three', 'four')
VALUES = {'shape': SHAPES, 'colour': tuple(COLOURS), 'size': tuple(SIZES), 'fill': FILLS, 'place': PLACES}


class Question(NamedTuple):
  text: str
  answer: str
  kind: str


def _satisfied(wanted: Wanted, obj: Object) -> bool:
  return all(getattr(wanted, a) in (None, getattr(obj, a)) for a in VALUES)


def holds(constraints: Constraints, scene: Scene) -> bool:
  """Whether the scene has exactly the wanted objects and the background, and every relation holds clearly."""
  if len(constraints.objects) != len(scene.objects) or constraints.background not in (None, scene.background):
    return False

  def assign(chosen: tuple[int, ...]) -> bool:
    if len(chosen) == len(scene.objects):
      return all(clearly(r, *(scene.objects[chosen[k]] for k in (i, *others)))
                 for i, r, *others in constraints.relations)
    return any(assign(chosen + (k,)) for k, obj in enumerate(scene.objects)
               if k not in chosen and _satisfied(constraints.objects[len(chosen)], obj))

  return assign(())


def _ok(wanted: Wanted, split: str) -> bool:
  """Whether texts of the split may name the object."""
  return None in (wanted.shape, wanted.colour, wanted.fill) or splits.allowed(split)(wanted)


def _spoilt(rng: np.random.Generator, wanted: Wanted, split: str) -> Wanted | None:
  """The object with one attribute changed; None if the split does not allow it."""
  name = pick(rng, [a for a in VALUES if getattr(wanted, a)])
  value = pick(rng, [v for v in VALUES[name] if v != getattr(wanted, name)])
  spoilt = dataclasses.replace(wanted, **{name: value})
  return spoilt if _ok(spoilt, split) else None


def _claim(rng, scene, split) -> tuple[Constraints, str] | None:
  """(description, correction): a description that is true, or wrong in one thing; '' corrects a true one."""
  may_relate = splits.relation_allowed(split)
  constraints = constraints_of(scene, rng, relation_allowed=may_relate)
  if rng.random() < 0.5:
    return constraints, ''
  objects = constraints.objects
  part = lambda *chosen: describe(Constraints(tuple(objects[k] for k in chosen)))
  draw = rng.random()
  if constraints.background and draw < 0.2:
    wrong = dataclasses.replace(constraints, background=random_background(rng))
    right = background_phrase(constraints.background)
  elif constraints.relations and draw < 0.6:
    (i, old, j, *more), = constraints.relations
    related = tuple(objects[k] for k in (i, j, *more))
    right = describe(Constraints(related, relations=((0, old, *range(1, len(related))),)))
    if more:  # another of the three is claimed to be in the middle
      wrong = dataclasses.replace(constraints, objects=(objects[1], objects[0], *objects[2:]))
      return None if holds(wrong, scene) else (wrong, right)
    new = {'left of': 'right of', 'right of': 'left of', 'above': 'below', 'below': 'above'}[old]
    if not may_relate(objects[i].shape, new, objects[j].shape):
      return None
    wrong = dataclasses.replace(constraints, relations=((i, new, j),))
  elif len(objects) > 1 and not constraints.relations and draw < 0.4:
    # Colours (or shapes) of two objects exchanged: the binding is wrong, the words are the same.
    i, j = (int(k) for k in rng.permutation(len(objects))[:2])
    name = pick(rng, ('colour', 'shape'))
    a, b = (dataclasses.replace(objects[k], **{name: getattr(objects[m], name)}) for k, m in ((i, j), (j, i)))
    if not (_ok(a, split) and _ok(b, split)):
      return None
    right = part(*sorted((i, j)))
    wrong = dataclasses.replace(constraints, objects=tuple(
        a if k == i else b if k == j else w for k, w in enumerate(objects)))
  elif not constraints.relations and draw < 0.55 and len(objects) > 1:
    k = int(rng.integers(len(objects)))
    wrong, right = dataclasses.replace(constraints, objects=objects[:k] + objects[k + 1:]), part(k)
  else:
    k = int(rng.integers(len(objects)))
    spoilt = _spoilt(rng, objects[k], split)
    if not spoilt:
      return None
    wrong, right = dataclasses.replace(constraints, objects=objects[:k] + (spoilt,) + objects[k + 1:]), part(k)
    if not all(may_relate(wrong.objects[i].shape, r, wrong.objects[j].shape) for i, r, j, *_ in wrong.relations):
      return None
  return None if holds(wrong, scene) else (wrong, right)


def _shows(rng, scene, split):
  """Whether a description is true."""
  claim = _claim(rng, scene, split)
  return claim and (vqascore.QUESTION.format(describe(claim[0])), 'no' if claim[1] else 'yes')


def _wrong(rng, scene, split):
  """The correction of a description; 'nothing' if it is true."""
  claim = _claim(rng, scene, split)
  templates = ('what is wrong here: {}?', 'the picture shows {}: what is wrong?',
               'what should be different in this: {}?')
  return claim and (pick(rng, templates).format(describe(claim[0])), claim[1] or 'nothing')


def _fully(objects) -> str:
  """A full description of objects, in reading order; 'nothing' for none."""
  wanted = tuple(Wanted(o.shape, o.colour, o.size, o.fill, o.place) for o in objects)
  return describe(Constraints(wanted)) if wanted else 'nothing'


def _which(rng, scene, split):
  """A description of the object pointed at."""
  i = int(rng.integers(len(scene.objects)))
  pointer = random_pointer(rng, scene, i, split)
  templates = ('which is {}?', 'describe {}', 'what does {} look like?')
  return pointer and (pick(rng, templates).format(phrase(rng, pointer)), _fully([scene.objects[i]]))


def _beside(rng, scene, split):
  """A description of everything on one side of an object."""
  j = int(rng.integers(len(scene.objects)))
  others = [o for k, o in enumerate(scene.objects) if k != j]
  relation = pick(rng, PAIRWISE)
  truths = [clearly(relation, o, scene.objects[j]) for o in others]
  anchor = random_pointer(rng, scene, j, split, relations=False)
  there = [o for o, truth in zip(others, truths) if truth]
  if not others or None in truths or not anchor or len(there) > 2 or not there and rng.random() < 0.6:
    return None
  if not all(splits.relation_allowed(split)(o.shape, relation, scene.objects[j].shape) for o in others):
    return None
  templates = ('what is {} {}?', 'which shapes are {} {}?')
  return pick(rng, templates).format(pick(rng, words.RELATIONS[relation]), phrase(rng, anchor)), _fully(there)


def _one_attribute(rng, scene, truth):
  """(name, value) of an attribute or place that some object has (truth) or none has; None if there is no such value."""
  name = pick(rng, list(VALUES))
  here = {getattr(o, name) for o in scene.objects}
  values = [v for v in VALUES[name] if (v in here) == truth]
  return (name, pick(rng, values)) if values else None


def _what(rng, scene, split):
  """A description of everything with one attribute."""
  attribute = _one_attribute(rng, scene, truth=rng.random() < 0.85)
  if not attribute:
    return None
  name, value = attribute
  matching = [o for o in scene.objects if getattr(o, name) == value]
  if len(matching) > 2:
    return None
  templates = {'place': ('what is at the {}?', 'which shape is at the {}?'),
               'shape': ('which {} are there?', 'what {} can you see?')}
  named = plural(value) if name == 'shape' else value
  text = pick(rng, templates.get(name, ('what is {}?', 'which shapes are {}?'))).format(named)
  return text, _fully(matching)


def _has(rng, scene, split):
  """Whether any object has one attribute."""
  truth = rng.random() < 0.5
  attribute = _one_attribute(rng, scene, truth)
  if not attribute:
    return None
  name, value = attribute
  if name == 'place':
    templates = ('is anything at the {}?', 'is there a shape at the {}?')
  elif name == 'shape':
    templates, value = ('are there any {}?', 'can you see any {}?'), plural(value)
  else:
    templates = ('is anything {}?', 'are there any {} shapes?')
  return pick(rng, templates).format(value), 'yes' if truth else 'no'


def _exists(rng, scene, split):
  """Whether an object is there; a missing one differs from one of the scene in one attribute."""
  obj = pick(rng, scene.objects)
  values = {a: getattr(obj, a) for a in VALUES if rng.random() < (0.8 if a in ('shape', 'colour') else 0.25)}
  if not values:
    return None
  wanted = Wanted(**values)
  truth = rng.random() < 0.5
  if not truth:
    wanted = _spoilt(rng, wanted, split)
    if not wanted or any(_satisfied(wanted, o) for o in scene.objects):
      return None
  named = describe(Constraints((wanted,)))
  templates = ('is there {} in the picture?', 'can you see {}?', 'does the picture contain {}?', 'is there {}?')
  return pick(rng, templates).format(named), 'yes' if truth else 'no'


def _relation(rng, scene, split):
  if len(scene.objects) < 2:
    return None
  middles = clearly_between(scene.objects)
  if middles and rng.random() < 0.5:
    return _between(rng, scene, split, pick(rng, middles))
  i, j = (int(k) for k in rng.permutation(len(scene.objects))[:2])
  a, b = scene.objects[i], scene.objects[j]
  # Only about relations that hold clearly, or whose opposite does
  truth = rng.random() < 0.5
  options = [r for r in (clear_relations(a, b) if truth else clear_relations(b, a))
             if splits.relation_allowed(split)(a.shape, r, b.shape)]
  first, second = (random_pointer(rng, scene, k, split, relations=False, positions=False) for k in (i, j))
  if not (options and first and second):
    return None
  relation = pick(rng, words.RELATIONS[pick(rng, options)])
  return f'is {phrase(rng, first)} {relation} {phrase(rng, second)}?', 'yes' if truth else 'no'


def _between(rng, scene, split, chosen):
  """Whether one of three objects is between the others; of those chosen the first is."""
  truth = rng.random() < 0.5
  middle, *ends = chosen if truth else (chosen[1], chosen[0], chosen[2])
  ends = [int(k) for k in rng.permutation(ends)]
  named = [random_pointer(rng, scene, k, split, relations=False, positions=False) for k in (middle, *ends)]
  if not all(named):
    return None
  first, second, third = (phrase(rng, pointer) for pointer in named)
  return f'is {first} {pick(rng, words.RELATIONS["between"])} {second} and {third}?', 'yes' if truth else 'no'


def _kinds_of_things(rng, scene) -> tuple[str, int]:
  """(plural, number): a class such as 'red shapes' or 'circles', likely to be in the scene, and its size."""
  name = pick(rng, ('shape', 'colour', 'fill', 'size'))
  value = pick(rng, [getattr(o, name) for o in scene.objects] + [pick(rng, VALUES[name])])
  count = sum(getattr(o, name) == value for o in scene.objects)
  return plural(value) if name == 'shape' else f'{value} shapes', count


def _compare(rng, scene, split):
  (first, n), (second, m) = _kinds_of_things(rng, scene), _kinds_of_things(rng, scene)
  if first == second:
    return None
  if n == m or rng.random() < 0.15:
    if n == m and rng.random() < 0.6:
      return f'are there more {first} than {second}?', 'no'
    return f'are there as many {first} as {second}?', 'yes' if n == m else 'no'
  truth = rng.random() < 0.6
  if (n > m) != truth:
    first, second = second, first
  return f'are there more {first} than {second}?', 'yes' if truth else 'no'


def _count(rng, scene, split):
  if rng.random() < 0.35:
    return pick(rng, ('how many shapes are there?', 'how many objects does the picture have?')), \
        NUMBERS[len(scene.objects)]
  things, count = _kinds_of_things(rng, scene)
  return pick(rng, ('how many {} are there?', 'how many {} are in the picture?')).format(things), NUMBERS[count]


def _attribute(rng, scene, split, name, templates):
  """An attribute of an object whose pointer does not name it."""
  i = int(rng.integers(len(scene.objects)))
  for _ in range(5):
    pointer = random_pointer(rng, scene, i, split)
    if pointer and not getattr(pointer, name):
      named = phrase(rng, pointer)
      # Not 'what shape is the shape ...'
      return (pick(rng, templates).format(named.replace('shape', 'object') if name == 'shape' else named),
              getattr(scene.objects[i], name))
  return None


def _colour(rng, scene, split):
  return _attribute(rng, scene, split, 'colour', ('what colour is {}?', 'which colour does {} have?'))


def _shape(rng, scene, split):
  return _attribute(rng, scene, split, 'shape', ('what shape is {}?', 'which shape does {} have?'))


def _size(rng, scene, split):
  return _attribute(rng, scene, split, 'size', ('what size is {}?', 'how big is {}: small, medium or large?'))


def _fill(rng, scene, split):
  return _attribute(rng, scene, split, 'fill', ('is {} solid, striped or outlined?', 'which fill does {} have?'))


def _where(rng, scene, split):
  i = int(rng.integers(len(scene.objects)))
  pointer = random_pointer(rng, scene, i, split, relations=False, positions=False)
  if not pointer:
    return None
  return f'where is {phrase(rng, pointer)}?', f'at the {scene.objects[i].place}'


def _background(rng, scene, split):
  if rng.random() < 0.5:
    return pick(rng, ('what is the background?', 'what background does the picture have?')), \
        background_phrase(scene.background)
  kind = scene.background.kind if rng.random() < 0.4 else pick(rng, BACKGROUND_KINDS)
  named = {'plain': 'plain', 'gradient': 'a gradient', 'checkered': 'checkered'}[kind]
  return f'is the background {named}?', 'yes' if kind == scene.background.kind else 'no'


_ASK: dict[str, Any] = {
    'which': _which, 'what': _what, 'wrong': _wrong, 'beside': _beside, 'has': _has, 'shows': _shows,
    'exists': _exists, 'relation': _relation, 'compare': _compare, 'count': _count, 'colour': _colour, 'shape': _shape,
    'size': _size, 'fill': _fill, 'where': _where, 'background': _background}


def random_question(rng: np.random.Generator, scene: Scene, kind: str | None = None, split: str = 'train') -> Question:
  """A question about the scene with its answer. kind: taken if the scene allows it (None: any kind)."""
  weights = TRAIN_WEIGHTS if split == 'train' else QUESTION_WEIGHTS
  for _ in range(12):
    chosen = kind or weighted(rng, QUESTION_KINDS, weights)
    if question := _ASK[chosen](rng, scene, split):
      return Question(*question, chosen)
  return Question(*_count(rng, scene, split), 'count')
