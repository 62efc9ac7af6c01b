"""Demands of a sentence on an image, in the judge's terms (GenEval's way: count, colour, place, binding)."""

import dataclasses

from unifusion_jax.scenes.world import Background

PAIRWISE = ('left of', 'right of', 'above', 'below')
RELATIONS = (*PAIRWISE, 'between')  # of an object to another, or to two


@dataclasses.dataclass(frozen=True)
class Wanted:
  """One demanded object; an attribute that is None is free."""
  shape: str | None = None
  colour: str | None = None
  size: str | None = None
  fill: str | None = None
  place: str | None = None


@dataclasses.dataclass(frozen=True)
class Constraints:
  objects: tuple[Wanted, ...]
  background: Background | None = None  # None: any
  exact_count: bool = True  # False: more objects than the wanted ones are fine
  relations: tuple[tuple, ...] = ()  # (i, relation, j): objects[i] is left of / ... objects[j]; (i, 'between', j, k)
