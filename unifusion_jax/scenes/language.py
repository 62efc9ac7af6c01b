"""Canonical language of scenes: one sentence for each scene or partial description.

    caption   = item {", " item} [", " background]
    item      = objects [relation objects | "between" objects "and" objects]
    objects   = ("a" | "an" | "two" | "three" | "four") [size] [fill] [colour] shape ["at the" place]
    background = "on a cream background" | "on a background fading from cream to mint"
               | "on a cream and mint checkered background"

Captions and rewrites are in this language, and `parse` reads it back. Requests are in prompts.py and casual.py.
"""

from collections.abc import Sequence
import dataclasses
import itertools
import json
import math
import re

import numpy as np

from unifusion_jax.errors import UserError
from unifusion_jax.scenes.constraints import Constraints, PAIRWISE, RELATIONS, Wanted
from unifusion_jax.scenes.words import article, plural
from unifusion_jax.scenes.world import (
  Background,
  COLOURS,
  FILLS,
  Object,
  PLACES,
  Scene,
  SHAPES,
  SIZES,
  WIDE_BACKGROUND_COLOURS,
)

COUNTS = {2: 'two', 3: 'three', 4: 'four'}
# Objects closer than this along an axis (a fraction of the canvas) are in no relation along it in any text; the judge
# may be more generous.
CLEAR = 0.15
# An object is 'between' two others in the middle half of the line that joins them, at most this far from the line.
ASIDE = 0.12


def _objects_phrase(wanted: Wanted, count: int) -> str:
  noun = wanted.shape or 'shape'
  words = [w for w in (wanted.size, wanted.fill, wanted.colour) if w]
  if count == 1:
    phrase = article(' '.join(words + [noun]))
  else:
    phrase = ' '.join([COUNTS[count]] + words + [plural(noun)])
  return f'{phrase} at the {wanted.place}' if wanted.place else phrase


def background_phrase(background: Background) -> str:
  """The background as a noun phrase, as in 'a cream background'."""
  if background.kind == 'plain':
    return f'{article(background.colours[0])} background'
  first, second = background.colours
  if background.kind == 'gradient':
    return f'a background fading from {first} to {second}'
  return f'{article(first)} and {second} checkered background'


def in_canonical_order(constraints: Constraints) -> Constraints:
  """The objects row by row if all have places and none a relation; otherwise in the given order."""
  if constraints.relations or not all(w.place for w in constraints.objects):
    return constraints
  ordered = sorted(constraints.objects, key=lambda w: PLACES.index(w.place))
  return dataclasses.replace(constraints, objects=tuple(ordered))


def grouped(constraints: Constraints) -> list[tuple[Wanted, int]]:
  """(object, number) for runs of equal objects, as in 'two red circles'; objects in a relation stay single."""
  related = {k for i, _, *others in constraints.relations for k in (i, *others)}
  groups = []
  for i, wanted in enumerate(constraints.objects):
    if groups and groups[-1][0] == wanted and not {i - 1, i} & related and groups[-1][1] < max(COUNTS):
      groups[-1] = (wanted, groups[-1][1] + 1)
    else:
      groups.append((wanted, 1))
  return groups


def describe(constraints: Constraints) -> str:
  """The canonical sentence of the constraints; an exact count is implied.

  A relation must join neighbours in the order given, each object in at most one: (i, relation, i + 1), or
  (i, 'between', i + 1, i + 2).
  """
  joints = {}  # text before an object
  related = set()
  for i, relation, *others in constraints.relations:
    joined = {i, *others}
    if others != list(range(i + 1, i + 2 + (relation == 'between'))) or joined & related:
      raise UserError(f'the relation {(i, relation, *others)} has no words: relations must join neighbours, '
                      "each object in at most one, (i, relation, i + 1) or (i, 'between', i + 1, i + 2): "
                      'reorder the objects')
    related |= joined
    joints.update(zip(others, (f' {relation} ', ' and ')))
  constraints = in_canonical_order(constraints)
  sentence, at = '', 0
  for wanted, count in grouped(constraints):
    sentence += ('' if at == 0 else joints.get(at, ', ')) + _objects_phrase(wanted, count)
    at += count
  return f'{sentence}, on {background_phrase(constraints.background)}' if constraints.background else sentence


def full_description(scene: Scene) -> Constraints:
  """Constraints with every attribute of every object, in reading order, and the background."""
  return Constraints(
      tuple(Wanted(o.shape, o.colour, o.size, o.fill, o.place) for o in scene.in_reading_order()), scene.background)


def caption(scene: Scene) -> str:
  """The full caption of a scene in the canonical language."""
  return describe(full_description(scene))


def _any(words) -> str:
  return '|'.join(sorted(words, key=len, reverse=True))


_OBJECTS = re.compile(
    rf'(?:(a|an|{_any(COUNTS.values())}) )(?:({_any(SIZES)}) )?(?:({_any(FILLS)}) )?(?:({_any(COLOURS)}) )?'
    rf'({_any(list(SHAPES) + ["shape"] + [plural(s) for s in SHAPES] + ["shapes"])})(?: at the ({_any(PLACES)}))?')
_GROUNDS = _any(WIDE_BACKGROUND_COLOURS)
_BACKGROUNDS = {
    'plain': re.compile(rf'on an? ({_GROUNDS}) background'),
    'gradient': re.compile(rf'on a background fading from ({_GROUNDS}) to ({_GROUNDS})'),
    'checkered': re.compile(rf'on an? ({_GROUNDS}) and ({_GROUNDS}) checkered background')}
_RELATION = re.compile(rf' ({_any(RELATIONS)}) (?=(?:a|an) )')
_SINGULAR = {plural(s): s for s in SHAPES} | {s: s for s in SHAPES} | {'shapes': None, 'shape': None}
_NUMBER = {word: n for n, word in COUNTS.items()} | {'a': 1, 'an': 1}


def _parse_background(text: str) -> Background | None:
  for kind, pattern in _BACKGROUNDS.items():
    if match := pattern.fullmatch(text):
      background = Background(kind, match.groups())
      return background if f'on {background_phrase(background)}' == text else None
  return None


def _parse_objects(text: str) -> list[Wanted] | None:
  match = _OBJECTS.fullmatch(text)
  if not match:
    return None
  number, size, fill, colour, noun, place = match.groups()
  wanted = Wanted(_SINGULAR[noun], colour, size, fill, place)
  count = _NUMBER[number]
  return [wanted] * count if _objects_phrase(wanted, count) == text else None


def parse(text: str) -> Constraints | None:
  """The inverse of `describe`, also for objects out of canonical order; None for anything else."""
  items = text.split(', ')
  background = _parse_background(items[-1])
  if background:
    items = items[:-1]
  objects, relations = [], []
  for item in items:
    first, *related = _RELATION.split(item)
    parts = [first]
    if related:
      relation, rest = related[0], related[1:]
      parts += rest[0].split(' and ') if relation == 'between' else rest
      if len(parts) != 2 + (relation == 'between'):
        return None
      relations.append((len(objects), relation, *range(len(objects) + 1, len(objects) + len(parts))))
    for part in parts:
      wanted = _parse_objects(part)
      if not wanted or (related and len(wanted) > 1):
        return None
      objects += wanted
  return Constraints(tuple(objects), background, relations=tuple(relations)) if objects else None


_FIELDS = tuple(field.name for field in dataclasses.fields(Wanted))


def constraints_to_json(constraints: Constraints) -> str:
  background = constraints.background
  return json.dumps({
      'objects': [{name: getattr(w, name) for name in _FIELDS} for w in constraints.objects],
      'background': background and {'kind': background.kind, 'colours': background.colours},
      'exact_count': constraints.exact_count, 'relations': constraints.relations})


def constraints_from_json(text: str) -> Constraints:
  raw = json.loads(text)
  background = raw['background'] and Background(raw['background']['kind'], tuple(raw['background']['colours']))
  return Constraints(tuple(Wanted(**w) for w in raw['objects']), background, raw['exact_count'],
                     tuple(map(tuple, raw['relations'])))


def on_the_way(a: Object, b: Object, c: Object) -> tuple[float, float]:
  """(way, aside): the position of a between b (0) and c (1), and its distance from the line, in canvases."""
  x, y = c.x - b.x, c.y - b.y
  length = max(math.hypot(x, y), 1e-6)
  return (((a.x - b.x) * x + (a.y - b.y) * y) / length ** 2, abs((a.x - b.x) * y - (a.y - b.y) * x) / length)


def clearly(relation: str, a: Object, *others: Object) -> bool | None:
  """Whether a is in the relation to the other object (to both, for 'between'); None for a close call."""
  if relation == 'between':
    way, aside = on_the_way(a, *others)
    if abs(way - 0.5) <= 0.25 and aside <= ASIDE:
      return True
    return False if abs(way - 0.5) > 0.5 or aside > 3 * ASIDE else None
  b, = others
  lead = {'left of': b.x - a.x, 'right of': a.x - b.x, 'above': b.y - a.y, 'below': a.y - b.y}[relation]
  return True if lead > CLEAR else False if lead <= 0 else None


def clear_relations(a: Object, b: Object) -> list[str]:
  """The pairwise relations of a to b that hold clearly."""
  return [relation for relation in PAIRWISE if clearly(relation, a, b)]


def clearly_between(objects: Sequence[Object]) -> list[tuple[int, int, int]]:
  """All (i, j, k) with objects[i] clearly between objects[j] and objects[k], j < k."""
  return [(i, j, k) for i in range(len(objects)) for j, k in itertools.combinations(range(len(objects)), 2)
          if i not in (j, k) and clearly('between', objects[i], objects[j], objects[k])]


def constraints_of(scene: Scene, rng: np.random.Generator, *, full: float = 0.4, relation: float = 0.1,
                   fills: bool = False, relation_allowed=lambda subject, relation, object: True) -> Constraints:
  """A random partial description of a scene. All objects are named, each at least by shape and colour.

  full: share of full descriptions. relation: share with two (or three) objects related instead of placed.
  fills: always name the fill. relation_allowed(shape, relation, shape): whether a relation may be named.
  """
  if rng.random() < full:
    return full_description(scene)
  objects = list(scene.in_reading_order())
  background = scene.background if rng.random() < 0.5 else None
  # Chance that size, fill and place are named, for all objects of this sentence: 0, 0.5 or 1.
  sized, filled, placed = (0.5 * int(k) for k in rng.integers(3, size=3))

  def described(o: Object, placed: float) -> Wanted:
    size, fill, place = rng.random(3)
    return Wanted(o.shape, o.colour, o.size if size < sized else None,
                  o.fill if fills or fill < filled else None, o.place if place < placed else None)

  if len(objects) > 1 and rng.random() < relation:
    middles = clearly_between(objects)
    if middles and rng.random() < 0.5:
      chosen, options = middles[rng.integers(len(middles))], ['between']
    else:
      chosen = tuple(int(k) for k in rng.permutation(len(objects))[:2])
      a, b = (objects[k] for k in chosen)
      options = [r for r in clear_relations(a, b) if relation_allowed(a.shape, r, b.shape)]
    related = [described(objects[k], 0) for k in chosen]
    if options and all(w != related[0] for w in related[1:]):
      rest = tuple(described(o, 0) for k, o in enumerate(objects) if k not in chosen)
      return Constraints((*related, *rest), background,
                         relations=((0, options[rng.integers(len(options))], *range(1, len(chosen))),))
  wanted = [described(o, placed) for o in objects]
  # Equal objects side by side, so that they can be counted
  return Constraints(tuple(sorted(wanted, key=wanted.index)), background)
