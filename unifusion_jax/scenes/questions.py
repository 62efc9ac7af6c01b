"""Questions about an image with short, certain answers: to train the VLM, and to let it judge images (VQAScore)."""

import dataclasses
from typing import NamedTuple

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

# How often each kind is asked: in tests, and in training. Training also has kinds that no test has, answered at length:
# which object is meant, what has one attribute, what stands where, what is wrong in a description; and single
# attributes with yes or no ('has'). A yes alone teaches too little to find what longer questions are about.
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
  """Whether the scene has exactly the wanted objects, the background, and every relation clearly."""
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
  """Whether the wanted object may be spoken of."""
  return None in (wanted.shape, wanted.colour, wanted.fill) or splits.allowed(split)(wanted)


def _spoilt(rng: np.random.Generator, wanted: Wanted, split: str) -> Wanted | None:
  """The same with one of its attributes changed."""
  name = pick(rng, [a for a in VALUES if getattr(wanted, a)])
  value = pick(rng, [v for v in VALUES[name] if v != getattr(wanted, name)])
  spoilt = dataclasses.replace(wanted, **{name: value})
  return spoilt if _ok(spoilt, split) else None


def _claim(rng, scene, split) -> tuple[Constraints, str] | None:
  """A whole description, true or with one thing wrong, and the words that should stand there ('' if it is true)."""
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
    if more:  # another of the three is said to be in the middle
      wrong = dataclasses.replace(constraints, objects=(objects[1], objects[0], *objects[2:]))
      return None if holds(wrong, scene) else (wrong, right)
    new = {'left of': 'right of', 'right of': 'left of', 'above': 'below', 'below': 'above'}[old]
    if not may_relate(objects[i].shape, new, objects[j].shape):
      return None
    wrong = dataclasses.replace(constraints, relations=((i, new, j),))
  elif len(objects) > 1 and not constraints.relations and draw < 0.4:
    # The colours (or shapes) of two objects exchanged: the binding is wrong, the words are the same.
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
  """What a description should have said instead, if anything."""
  claim = _claim(rng, scene, split)
  templates = ('what is wrong here: {}?', 'the picture shows {}: what is wrong?',
               'what should be different in this: {}?')
  return claim and (pick(rng, templates).format(describe(claim[0])), claim[1] or 'nothing')


def _fully(objects) -> str:
  """All that can be said of objects, in reading order; 'nothing' of none."""
  wanted = tuple(Wanted(o.shape, o.colour, o.size, o.fill, o.place) for o in objects)
  return describe(Constraints(wanted)) if wanted else 'nothing'


def _which(rng, scene, split):
  """The object that is pointed at, described."""
  i = int(rng.integers(len(scene.objects)))
  pointer = random_pointer(rng, scene, i, split)
  templates = ('which is {}?', 'describe {}', 'what does {} look like?')
  return pointer and (pick(rng, templates).format(phrase(rng, pointer)), _fully([scene.objects[i]]))


def _beside(rng, scene, split):
  """Everything on one side of an object, described."""
  j = int(rng.integers(len(scene.objects)))
  others = [o for k, o in enumerate(scene.objects) if k != j]
  relation = pick(rng, PAIRWISE)
  truths = [clearly(relation, o, scene.objects[j]) for o in others]
  anchor = random_pointer(rng, scene, j, split, relations=False)
  found = [o for o, truth in zip(others, truths) if truth]
  if not others or None in truths or not anchor or len(found) > 2 or not found and rng.random() < 0.6:
    return None
  if not all(splits.relation_allowed(split)(o.shape, relation, scene.objects[j].shape) for o in others):
    return None
  templates = ('what is {} {}?', 'which shapes are {} {}?')
  return pick(rng, templates).format(pick(rng, words.RELATIONS[relation]), phrase(rng, anchor)), _fully(found)


def _one_attribute(rng, scene, truth):
  """An attribute (or place) and a value of it that some object has, or none: (name, value), or None."""
  name = pick(rng, list(VALUES))
  here = {getattr(o, name) for o in scene.objects}
  values = [v for v in VALUES[name] if (v in here) == truth]
  return (name, pick(rng, values)) if values else None


def _what(rng, scene, split):
  """Everything that has one attribute, described."""
  found = _one_attribute(rng, scene, truth=rng.random() < 0.85)
  if not found:
    return None
  name, value = found
  matching = [o for o in scene.objects if getattr(o, name) == value]
  if len(matching) > 2:
    return None
  templates = {'place': ('what is at the {}?', 'which shape is at the {}?'),
               'shape': ('which {} are there?', 'what {} can you see?')}
  named = plural(value) if name == 'shape' else value
  asked = pick(rng, templates.get(name, ('what is {}?', 'which shapes are {}?'))).format(named)
  return asked, _fully(matching)


def _has(rng, scene, split):
  """One attribute, seen somewhere or nowhere."""
  truth = rng.random() < 0.5
  found = _one_attribute(rng, scene, truth)
  if not found:
    return None
  name, value = found
  if name == 'place':
    templates = ('is anything at the {}?', 'is there a shape at the {}?')
  elif name == 'shape':
    templates, value = ('are there any {}?', 'can you see any {}?'), plural(value)
  else:
    templates = ('is anything {}?', 'are there any {} shapes?')
  return pick(rng, templates).format(value), 'yes' if truth else 'no'


def _exists(rng, scene, split):
  """One object, there or not; the false ones differ from a true one in one attribute."""
  obj = pick(rng, scene.objects)
  said = {a: getattr(obj, a) for a in VALUES if rng.random() < (0.8 if a in ('shape', 'colour') else 0.25)}
  if not said:
    return None
  wanted = Wanted(**said)
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
  # What is neither clearly so nor clearly the opposite is not asked.
  truth = rng.random() < 0.5
  options = [r for r in (clear_relations(a, b) if truth else clear_relations(b, a))
             if splits.relation_allowed(split)(a.shape, r, b.shape)]
  first, second = (random_pointer(rng, scene, k, split, relations=False, positions=False) for k in (i, j))
  if not (options and first and second):
    return None
  relation = pick(rng, words.RELATIONS[pick(rng, options)])
  return f'is {phrase(rng, first)} {relation} {phrase(rng, second)}?', 'yes' if truth else 'no'


def _between(rng, scene, split, chosen):
  """Whether one of three stands between the two others: the first of those chosen does."""
  truth = rng.random() < 0.5
  middle, *ends = chosen if truth else (chosen[1], chosen[0], chosen[2])
  ends = [int(k) for k in rng.permutation(ends)]
  named = [random_pointer(rng, scene, k, split, relations=False, positions=False) for k in (middle, *ends)]
  if not all(named):
    return None
  first, second, third = (phrase(rng, pointer) for pointer in named)
  return f'is {first} {pick(rng, words.RELATIONS["between"])} {second} and {third}?', 'yes' if truth else 'no'


def _kinds_of_things(rng, scene) -> tuple[str, int]:
  """A plural such as 'red shapes', 'circles', 'striped shapes', likely to be in the scene, and how many there are."""
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
  """The attribute of an object that is pointed at without it."""
  i = int(rng.integers(len(scene.objects)))
  for _ in range(5):
    pointer = random_pointer(rng, scene, i, split)
    if pointer and not getattr(pointer, name):
      named = phrase(rng, pointer)
      # 'What shape is the shape ...' would be odd.
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
  asked = {'plain': 'plain', 'gradient': 'a gradient', 'checkered': 'checkered'}[kind]
  return f'is the background {asked}?', 'yes' if kind == scene.background.kind else 'no'


_ASK = {'which': _which, 'what': _what, 'wrong': _wrong, 'beside': _beside, 'has': _has, 'shows': _shows,
        'exists': _exists, 'relation': _relation, 'compare': _compare, 'count': _count, 'colour': _colour,
        'shape': _shape, 'size': _size, 'fill': _fill, 'where': _where, 'background': _background}


def random_question(rng: np.random.Generator, scene: Scene, kind: str | None = None, split: str = 'train') -> Question:
  """A question about the scene with its answer. kind: asked for if the scene allows it (None: any)."""
  weights = TRAIN_WEIGHTS if split == 'train' else QUESTION_WEIGHTS
  for _ in range(12):
    asked = kind or weighted(rng, QUESTION_KINDS, weights)
    if found := _ASK[asked](rng, scene, split):
      return Question(*found, asked)
  return Question(*_count(rng, scene, split), 'count')
