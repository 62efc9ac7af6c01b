"""Constraints that a sentence puts on an image, as in GenEval: count, colour, place, binding."""

import dataclasses

from unifusion_jax.scenes.world import Background

PAIRWISE = ('left of', 'right of', 'above', 'below')
RELATIONS = (*PAIRWISE, 'between')  # of an object to one other, 'between' to two


@dataclasses.dataclass(frozen=True)
class Wanted:
  """A wanted object; None leaves an attribute open."""
  shape: str | None = None
  colour: str | None = None
  size: str | None = None
  fill: str | None = None
  place: str | None = None


@dataclasses.dataclass(frozen=True)
class Constraints:
  objects: tuple[Wanted, ...]
  background: Background | None = None  # None: any
  exact_count: bool = True  # False: further objects are fine
  relations: tuple[tuple, ...] = ()  # (i, relation, j): objects[i] is left of / ... objects[j]; (i, 'between', j, k)
