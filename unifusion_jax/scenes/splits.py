"""Splits: train, test, and 'heldout' with the compositions that no model may train on.

Test differs from train by its seeds and half of its phrasing. The held-out compositions occur nowhere in train or test,
be it a source, a target, a prompt, a question or a caption. Every example of 'heldout' has at least one of them: an
object (shape, colour, fill), a spoken relation, or a kind of edit on a kind of shape.
"""

from collections.abc import Callable
import dataclasses

import numpy as np

from unifusion_jax.scenes.constraints import Constraints
from unifusion_jax.scenes.language import clear_relations
from unifusion_jax.scenes.world import Object, Scene

SPLITS = {'train': 0, 'test': 1, 'heldout': 2}  # the seed of the split, so it never changes

# Every shape two or three times, every colour twice, every fill at least seven times.
HELDOUT_OBJECTS = (
    ('circle', 'orange', 'striped'), ('circle', 'purple', 'outlined'), ('square', 'pink', 'solid'),
    ('square', 'green', 'striped'), ('triangle', 'blue', 'outlined'), ('triangle', 'white', 'solid'),
    ('triangle', 'yellow', 'striped'), ('star', 'cyan', 'solid'), ('star', 'brown', 'outlined'),
    ('heart', 'green', 'outlined'), ('heart', 'black', 'striped'), ('heart', 'blue', 'solid'),
    ('cross', 'yellow', 'outlined'), ('cross', 'grey', 'striped'), ('ring', 'purple', 'solid'),
    ('ring', 'orange', 'outlined'), ('ring', 'red', 'striped'), ('crescent', 'pink', 'striped'),
    ('crescent', 'black', 'outlined'), ('diamond', 'brown', 'solid'), ('diamond', 'cyan', 'striped'),
    ('hexagon', 'red', 'outlined'), ('hexagon', 'white', 'striped'), ('hexagon', 'grey', 'solid'))
_OBJECTS = frozenset(HELDOUT_OBJECTS)

_OPPOSITE = {'left of': 'right of', 'right of': 'left of', 'above': 'below', 'below': 'above'}
_RELATIONS_ONE_WAY = (
    ('heart', 'above', 'star'), ('circle', 'left of', 'square'), ('ring', 'below', 'cross'),
    ('triangle', 'right of', 'diamond'), ('crescent', 'above', 'hexagon'), ('star', 'left of', 'circle'))
HELDOUT_RELATIONS = frozenset(_RELATIONS_ONE_WAY) | {(b, _OPPOSITE[r], a) for a, r, b in _RELATIONS_ONE_WAY}

# (kind of edit, shape of the object pointed at; for 'add', of the new one)
HELDOUT_EDITS = frozenset({
    ('recolour', 'hexagon'), ('resize', 'ring'), ('move', 'heart'), ('remove', 'cross'), ('replace', 'crescent'),
    ('refill', 'star'), ('add', 'diamond'), ('swap', 'triangle')})


def allowed(split: str) -> Callable[[Object], bool]:
  """A predicate: whether an object of this shape, colour and fill may occur in the split."""
  if split == 'heldout':
    return lambda obj: True
  return lambda obj: (obj.shape, obj.colour, obj.fill) not in _OBJECTS


def relation_allowed(split: str) -> Callable[[str, str, str], bool]:
  """A predicate on (shape, relation, shape): whether texts of the split may name the relation."""
  if split == 'heldout':
    return lambda subject, relation, other: True
  return lambda subject, relation, other: (subject, relation, other) not in HELDOUT_RELATIONS


def edit_allowed(split: str) -> Callable[[str, str], bool]:
  """A predicate on (kind of edit, shape): whether the pair may occur in the split."""
  if split == 'heldout':
    return lambda kind, shape: True
  return lambda kind, shape: (kind, shape) not in HELDOUT_EDITS


def scene_is_heldout(scene: Scene) -> bool:
  return any((o.shape, o.colour, o.fill) in _OBJECTS for o in scene.objects)


def constraints_are_heldout(constraints: Constraints) -> bool:
  """Whether a description names a held-out object or relation."""
  objects = constraints.objects
  return (any((w.shape, w.colour, w.fill) in _OBJECTS for w in objects) or
          any((objects[i].shape, r, objects[j].shape) in HELDOUT_RELATIONS for i, r, j, *_ in constraints.relations))


def with_heldout_object(rng: np.random.Generator, scene: Scene) -> Scene:
  """The scene with one object replaced by a held-out one of the same size and position."""
  shape, colour, fill = HELDOUT_OBJECTS[rng.integers(len(HELDOUT_OBJECTS))]
  k = int(rng.integers(len(scene.objects)))
  new = dataclasses.replace(scene.objects[k], shape=shape, colour=colour, fill=fill)
  return dataclasses.replace(scene, objects=scene.objects[:k] + (new,) + scene.objects[k + 1:])


def with_heldout_relation(rng: np.random.Generator, scene: Scene) -> Scene:
  """The scene, of two objects or more, with a held-out relation between two of them if their positions allow one."""
  i, j = (int(k) for k in rng.permutation(len(scene.objects))[:2])
  objects = list(scene.objects)
  clear = clear_relations(objects[i], objects[j])
  options = sorted(relation for relation in HELDOUT_RELATIONS if relation[1] in clear)
  if options:
    first, _, second = options[rng.integers(len(options))]
    objects[i] = dataclasses.replace(objects[i], shape=first)
    objects[j] = dataclasses.replace(objects[j], shape=second)
  return dataclasses.replace(scene, objects=tuple(objects))
