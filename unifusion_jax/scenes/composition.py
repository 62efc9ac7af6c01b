"""Random scenes, and free positions for one more object."""

import bisect
from collections.abc import Callable, Sequence
import functools

import numpy as np

from unifusion_jax.scenes import world
from unifusion_jax.scenes.world import Background, Object, Scene

COUNT_WEIGHTS = (0.3, 0.3, 0.25, 0.15)  # of one, two, three and four objects
KIND_WEIGHTS = (0.5, 0.25, 0.25)  # of BACKGROUND_KINDS
# Lengths as fractions of the square root of the canvas area (2.5 and 1 pixels at 64 px).
GAP, MARGIN = 2.5 / 64, 1 / 64
BORDER = 0.012  # fraction of the canvas, free of centres on both sides of a border between places
TRIES = 40  # positions tried before an object counts as not fitting
STANDS_OUT = 75  # least RGB distance of an object from its background and from every blend of its two colours
# The wider world: share of backgrounds beyond the six colours, weights of their kinds and of their colours (else 1).
WIDE_SHARE, WIDE_KIND_WEIGHTS = 0.7, (0.7, 0.15, 0.15)
_WIDE_ODDS = {'white': 9, 'black': 4, 'light grey': 3, 'grey': 2}
_SHAPES, _COLOURS, _SIZES = world.SHAPES, tuple(world.COLOURS), tuple(world.SIZES)
_GROUNDS, _WIDE_GROUNDS = tuple(world.BACKGROUND_COLOURS), tuple(world.WIDE_BACKGROUND_COLOURS)
_WIDE_GROUND_WEIGHTS = tuple(_WIDE_ODDS.get(name, 1) for name in _WIDE_GROUNDS)


@functools.cache
def _cumulative(weights: tuple[float, ...]) -> list[float]:
  total = np.cumsum(weights)
  return (total / total[-1]).tolist()


def weighted(rng: np.random.Generator, options: Sequence, weights: tuple[float, ...]):
  """One of the options, by weight: the same draw as `rng.choice(options, p=weights)`, faster."""
  return options[bisect.bisect_right(_cumulative(weights), rng.random())]


def pick(rng: np.random.Generator, options: Sequence):
  """One of the options, with equal weights."""
  return options[rng.integers(len(options))]


@functools.cache
def _sides(aspect: str) -> tuple[float, float]:
  """Canvas (width, height) in units of the square root of its area."""
  w, h = world.ASPECTS[aspect]
  return (w / h) ** 0.5, (h / w) ** 0.5


def _clear(x: float, y: float, size: str, others: Sequence[Object], aspect: str) -> bool:
  """Whether an object at (x, y) keeps GAP from all others, by the circles that enclose them."""
  w, h = _sides(aspect)
  own = world.SIZES[size] + GAP
  for o in others:
    dx, dy = (x - o.x) * w, (y - o.y) * h
    if dx * dx + dy * dy < (own + world.SIZES[o.size]) ** 2:
      return False
  return True


@functools.cache
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
    # Positions are rounded to four decimals, so a centre at the end of its interval may lie beyond it by half a unit.
    inside = all(any(low - 1e-4 <= v <= high + 1e-4 for low, high in thirds)
                 for v, thirds in zip((obj.x, obj.y), _ranges(obj.size, aspect)))
    if not inside or not _clear(obj.x, obj.y, obj.size, objects[:i], aspect):
      return False
  return True


def place_object(rng: np.random.Generator, shape: str, colour: str, size: str, fill: str, others: Sequence[Object],
                 aspect: str, place: str | None = None) -> Object | None:
  """The object at a random free position, in the given place or in any; None after TRIES failed tries.

  Places are drawn evenly, so corners get their share although large objects have few positions there.
  """
  columns, rows = _ranges(size, aspect)
  for _ in range(TRIES):
    index = rng.integers(9) if place is None else world.PLACES.index(place)
    (x0, x1), (y0, y1) = columns[index % 3], rows[index // 3]
    if x0 > x1 or y0 > y1:
      continue
    x, y = round(x0 + (x1 - x0) * rng.random(), 4), round(y0 + (y1 - y0) * rng.random(), 4)
    if _clear(x, y, size, others, aspect):
      return Object(shape, colour, size, fill, x, y)
  return None


@functools.cache
def stands_out(colour: str, background: Background) -> bool:
  """Whether a colour is at least STANDS_OUT from the background's colours and from all blends of the two."""
  ends = [np.array(world.WIDE_BACKGROUND_COLOURS[name], float) for name in background.colours]
  first, step, own = ends[0], ends[-1] - ends[0], np.array(world.COLOURS[colour], float)
  along = float(np.clip((own - first) @ step / max(step @ step, 1.0), 0, 1))
  return bool(np.linalg.norm(own - first - along * step) >= STANDS_OUT)


def visible(scene: Scene) -> bool:
  """Whether every object stands out from the background; from the six background colours all do."""
  return all(stands_out(o.colour, scene.background) for o in scene.objects)


def random_background(rng: np.random.Generator, wide: bool = False) -> Background:
  """A background of the six colours; wide: mostly of any colours from which enough objects stand out."""
  if wide and rng.random() < WIDE_SHARE:
    return _wide_background(rng)
  kind = weighted(rng, world.BACKGROUND_KINDS, KIND_WEIGHTS)
  chosen = rng.choice(len(_GROUNDS), 1 if kind == 'plain' else 2, replace=False)
  return Background(kind, tuple(_GROUNDS[k] for k in chosen))


def _wide_background(rng: np.random.Generator) -> Background:
  kind = weighted(rng, world.BACKGROUND_KINDS, WIDE_KIND_WEIGHTS)
  while True:
    first, second = (weighted(rng, _WIDE_GROUNDS, _WIDE_GROUND_WEIGHTS) for _ in range(2))
    background = Background(kind, (first,) if kind == 'plain' else (first, second))
    if kind == 'plain' or (first != second and _usable(background)):
      return background


@functools.cache
def _usable(background: Background) -> bool:
  """Whether the two colours differ clearly and at least half of the object colours stand out from them."""
  first, second = (np.array(world.WIDE_BACKGROUND_COLOURS[name], float) for name in background.colours)
  apart = np.linalg.norm(first - second) >= STANDS_OUT
  return bool(apart and sum(stands_out(colour, background) for colour in _COLOURS) >= len(_COLOURS) // 2)


def random_scene(rng: np.random.Generator, objects: int | tuple[int, int] = (1, 4), aspect: str = 'square',
                 allowed: Callable[[Object], bool] = lambda obj: True, wide: bool = False) -> Scene:
  """A scene of so many objects, a number or a least and a most.

  allowed: whether an object may occur, before it has a position. wide: on a background of any colour.
  """
  low, high = (objects, objects) if isinstance(objects, int) else objects
  count = low + weighted(rng, range(high - low + 1), COUNT_WEIGHTS[low - 1:high])
  background = random_background(rng, wide=True) if wide else None
  while True:
    unplaced = []
    while len(unplaced) < count:
      obj = Object(pick(rng, _SHAPES), pick(rng, _COLOURS), pick(rng, _SIZES), pick(rng, world.FILLS), 0.5, 0.5)
      if allowed(obj) and (background is None or stands_out(obj.colour, background)):
        unplaced.append(obj)
    placed = []
    # The largest first: fewer scenes are thrown away, and sizes stay mixed.
    for obj in sorted(unplaced, key=lambda o: -world.SIZES[o.size]):
      obj = place_object(rng, obj.shape, obj.colour, obj.size, obj.fill, placed, aspect)
      if obj is None:
        break
      placed.append(obj)
    if len(placed) == count:
      order = rng.permutation(count)
      return Scene(tuple(placed[i] for i in order), background or random_background(rng), aspect)
