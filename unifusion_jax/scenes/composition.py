"""Drawing random scenes, and finding room for one more object."""

from collections.abc import Callable, Sequence

import numpy as np

from unifusion_jax.scenes import world
from unifusion_jax.scenes.world import Background, Object, Scene

COUNT_WEIGHTS = (0.3, 0.3, 0.25, 0.15)  # of one, two, three and four objects
KIND_WEIGHTS = (0.5, 0.25, 0.25)  # of BACKGROUND_KINDS
# Lengths as fractions of the square root of the canvas area (2.5 and 1 pixels at 64 px).
GAP, MARGIN = 2.5 / 64, 1 / 64
BORDER = 0.012  # fraction of the canvas kept free on both sides of a border between two places
TRIES = 40  # positions tried before an object is said not to fit


def _sides(aspect: str) -> tuple[float, float]:
  """Canvas (width, height) in units of the square root of its area."""
  w, h = world.ASPECTS[aspect]
  return (w / h) ** 0.5, (h / w) ** 0.5


def _clear(obj: Object, others: Sequence[Object], aspect: str) -> bool:
  """Whether obj keeps its distance from all others; every shape lies within the circle of its radius."""
  w, h = _sides(aspect)
  return all(np.hypot((obj.x - o.x) * w, (obj.y - o.y) * h) >=
             world.SIZES[obj.size] + world.SIZES[o.size] + GAP for o in others)


def _ranges(size: str, aspect: str) -> list[list[tuple[float, float]]]:
  """For x and for y: the interval of allowed centres in each third of the canvas (possibly empty)."""
  both = []
  for radius, side in zip(world.radius(size, aspect), _sides(aspect)):
    margin = MARGIN / side
    low, high = radius + margin, 1 - radius - margin
    both.append([(max(low, i / 3 + (i > 0) * BORDER), min(high, (i + 1) / 3 - (i < 2) * BORDER)) for i in range(3)])
  return both


def fits(objects: Sequence[Object], aspect: str) -> bool:
  """Whether all objects lie inside the canvas, apart from one another and clear of the borders between places."""
  for i, obj in enumerate(objects):
    # Positions carry four decimals, so a centre at the end of its interval may be off by half of the last one.
    inside = all(any(low - 1e-4 <= v <= high + 1e-4 for low, high in thirds)
                 for v, thirds in zip((obj.x, obj.y), _ranges(obj.size, aspect)))
    if not inside or not _clear(obj, objects[:i], aspect):
      return False
  return True


def place_object(rng: np.random.Generator, shape: str, colour: str, size: str, fill: str, others: Sequence[Object],
                 aspect: str, place: str | None = None) -> Object | None:
  """The object at a random free position, in the given place or in any; None if none was found in TRIES tries.

  Places are drawn evenly, which gives corners their share although large objects have little room there.
  """
  columns, rows = _ranges(size, aspect)
  for _ in range(TRIES):
    index = rng.integers(9) if place is None else world.PLACES.index(place)
    (x0, x1), (y0, y1) = columns[index % 3], rows[index // 3]
    if x0 > x1 or y0 > y1:
      continue
    obj = Object(shape, colour, size, fill, round(rng.uniform(x0, x1), 4), round(rng.uniform(y0, y1), 4))
    if _clear(obj, others, aspect):
      return obj
  return None


def random_background(rng: np.random.Generator) -> Background:
  kind = str(rng.choice(world.BACKGROUND_KINDS, p=KIND_WEIGHTS))
  colours = rng.choice(list(world.BACKGROUND_COLOURS), 1 if kind == 'plain' else 2, replace=False)
  return Background(kind, tuple(str(c) for c in colours))


def random_scene(rng: np.random.Generator, objects: int | tuple[int, int] = (1, 4), aspect: str = 'square',
                 allowed: Callable[[Object], bool] = lambda obj: True) -> Scene:
  """A scene of that many objects, or of between two numbers of them. `allowed` judges an object by its attributes, before its position is settled."""
  low, high = (objects, objects) if isinstance(objects, int) else objects
  weights = np.array(COUNT_WEIGHTS[low - 1:high])
  count = low + int(rng.choice(len(weights), p=weights / weights.sum()))
  colours = list(world.COLOURS)
  while True:
    drawn = []
    while len(drawn) < count:
      obj = Object(*(str(rng.choice(v)) for v in (world.SHAPES, colours, list(world.SIZES), world.FILLS)), 0.5, 0.5)
      if allowed(obj):
        drawn.append(obj)
    placed = []
    # The largest first: they find room more often, so fewer scenes are thrown away and sizes stay mixed.
    for obj in sorted(drawn, key=lambda o: -world.SIZES[o.size]):
      obj = place_object(rng, obj.shape, obj.colour, obj.size, obj.fill, placed, aspect)
      if obj is None:
        break
      placed.append(obj)
    if len(placed) == count:
      return Scene(tuple(placed[i] for i in rng.permutation(count)), random_background(rng), aspect)
