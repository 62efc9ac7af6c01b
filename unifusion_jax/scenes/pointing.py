"""Pointers: unambiguous references to one object of an image, by attribute, place or relation."""

import dataclasses

import numpy as np

from unifusion_jax.scenes import splits, words
from unifusion_jax.scenes.composition import pick
from unifusion_jax.scenes.constraints import PAIRWISE
from unifusion_jax.scenes.language import clearly, clearly_between
from unifusion_jax.scenes.world import Object, Scene

EXTREMES = {'leftmost': ('x', 1), 'rightmost': ('x', -1), 'topmost': ('y', 1), 'bottommost': ('y', -1)}
NEAR = 0.08  # fraction of the canvas by which an extreme must lead


@dataclasses.dataclass(frozen=True)
class Pointer:
  """Attributes of the object; None for those that are not named."""
  shape: str | None = None
  colour: str | None = None
  size: str | None = None
  fill: str | None = None
  place: str | None = None
  extreme: str | None = None  # a key of EXTREMES, among the objects with the attributes above
  relation: str | None = None  # one of constraints.RELATIONS ...
  anchor: 'Pointer | None' = None  # ... to this other object
  second: 'Pointer | None' = None  # ... and, for 'between', to this one too


def matches(pointer: Pointer, obj: Object) -> bool:
  """Whether the object has the named attributes and place."""
  return all(getattr(pointer, a) in (None, getattr(obj, a)) for a in ('shape', 'colour', 'size', 'fill', 'place'))


def resolve(pointer: Pointer, scene: Scene) -> tuple[int, ...]:
  """Indices of the objects that the pointer may mean: one if it is unambiguous, none if it is unclear.

  A close call of a relation or an extreme makes the whole pointer unclear.
  """
  indices = [i for i, obj in enumerate(scene.objects) if matches(pointer, obj)]
  if pointer.extreme and len(indices) > 1:
    axis, sign = EXTREMES[pointer.extreme]
    indices.sort(key=lambda i: sign * getattr(scene.objects[i], axis))
    first, second = (sign * getattr(scene.objects[i], axis) for i in indices[:2])
    if second - first < NEAR:
      return ()
    indices = indices[:1]
  if pointer.relation:
    anchors = [resolve(anchor, scene) for anchor in (pointer.anchor, pointer.second) if anchor]
    if any(len(meant) != 1 for meant in anchors) or len(set(anchors)) < len(anchors):
      return ()
    others = [scene.objects[i] for i, in anchors]
    holds = {i: clearly(pointer.relation, scene.objects[i], *others) for i in indices if (i,) not in anchors}
    if None in holds.values():
      return ()
    indices = [i for i, truth in holds.items() if truth]
  return tuple(indices)


def _random_attributes(rng: np.random.Generator, scene: Scene, i: int, more: bool) -> Pointer:
  """Attributes in random order until they single the object out, and sometimes one more; the shape is likely first."""
  names = [('colour', 'size', 'fill')[k] for k in rng.permutation(3)]
  names.insert(0 if rng.random() < 0.7 else 1, 'shape')
  attributes = {}
  for name in names + ['place']:
    if len(resolve(Pointer(**attributes), scene)) == 1 and attributes:
      if not more:
        break
      more = False
    if name != 'place' or len(resolve(Pointer(**attributes), scene)) > 1:
      attributes[name] = getattr(scene.objects[i], name)
  return Pointer(**attributes)


def random_pointer(rng: np.random.Generator, scene: Scene, i: int, split: str = 'train',
                   relations: bool = True, positions: bool = True) -> Pointer | None:
  """A random unambiguous pointer at object i; None if the scene has too many like objects.

  relations: whether it may name other objects. positions: whether it may name the place or an extreme.
  """
  obj = scene.objects[i]
  may_relate = splits.relation_allowed(split)
  for _ in range(6):
    draw = rng.random()
    if draw < 0.6:
      pointer = _random_attributes(rng, scene, i, more=rng.random() < 0.25)
      if pointer.place and not positions:
        continue
    elif draw < 0.75 and positions:
      pointer = Pointer(shape=obj.shape if rng.random() < 0.2 else None, place=obj.place)
    elif draw < 0.87 and positions:
      attributes = {name: getattr(obj, name) for name in ('shape', 'colour') if rng.random() < 0.5}
      pointer = Pointer(**attributes, extreme=pick(rng, tuple(EXTREMES)))
      if len(scene.objects) < 2 or len(resolve(dataclasses.replace(pointer, extreme=None), scene)) < 2:
        continue  # 'the leftmost star' of a single star is odd
    elif relations and len(scene.objects) > 1:
      ends = [pair for middle, *pair in clearly_between(scene.objects) if middle == i]
      if ends and rng.random() < 0.5:
        relation, others = 'between', [int(j) for j in rng.permutation(pick(rng, ends))]
      else:
        relation, others = pick(rng, PAIRWISE), [int(rng.integers(len(scene.objects)))]
      if i in others or not may_relate(obj.shape, relation, scene.objects[others[0]].shape):
        continue
      pointer = Pointer(obj.shape if rng.random() < 0.7 else None, None, None, None, None, None, relation,
                        *(_random_attributes(rng, scene, j, more=False) for j in others))
    else:
      continue
    if resolve(pointer, scene) == (i,):
      return pointer
  pointer = Pointer(obj.shape, obj.colour, obj.size, obj.fill, obj.place if positions else None)
  return pointer if resolve(pointer, scene) == (i,) else None


def phrase(rng: np.random.Generator, pointer: Pointer, which: str = '') -> str:
  """The pointer as a noun phrase: 'the little red star above the circle'. `which`: a word right after 'the'."""
  noun = pick(rng, words.SHAPES[pointer.shape]) if pointer.shape else pick(rng, ('shape', 'object'))
  before = [which, pointer.extreme,
            pointer.size and pick(rng, words.SIZES[pointer.size]),
            pointer.fill and pick(rng, words.FILLS_BEFORE[pointer.fill]),
            pointer.colour and pick(rng, words.COLOURS[pointer.colour])]
  text = ' '.join(['the', *(w for w in before if w), noun])
  if pointer.place:
    text += f' {pick(rng, words.PLACES[pointer.place])}'
  if pointer.relation:
    text += f' {pick(rng, words.RELATIONS[pointer.relation])} {phrase(rng, pointer.anchor)}'
    text += f' and {phrase(rng, pointer.second)}' if pointer.second else ''
  return text
