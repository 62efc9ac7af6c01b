"""Labels of image tokens: the objects and background that each one covers, for the embedded VLM's training heads.

An image is a grid of tiles (columns, rows), followed by a thumbnail if there are several (`data.imaging.tiles`). Tiles
and their tokens go row by row. So each token is a cell of the canvas.
"""

from collections.abc import Sequence
import functools

import numpy as np

from unifusion_jax.scenes import world
from unifusion_jax.scenes.world import Scene

ATTRIBUTES = (('shape', world.SHAPES), ('colour', tuple(world.COLOURS)), ('size', tuple(world.SIZES)),
              ('fill', world.FILLS))
BACKGROUNDS = tuple(world.WIDE_BACKGROUND_COLOURS)
COLUMNS = 10
Grid = tuple[int, int]


@functools.cache
def cells(side: int, grid: Grid = (1, 1)) -> np.ndarray:
  """Cells of the tokens, f32 [s 4]: centre and extent (x, y, width, height) as fractions of the canvas."""
  def tile(left: float, top: float, width: float, height: float) -> np.ndarray:
    steps = (np.arange(side) + 0.5) / side
    y, x = np.meshgrid(top + steps * height, left + steps * width, indexing='ij')
    return np.stack([x, y, np.full_like(x, width / side), np.full_like(x, height / side)], -1).reshape(-1, 4)

  columns, rows = grid
  tiles = [tile(c / columns, r / rows, 1 / columns, 1 / rows) for r in range(rows) for c in range(columns)]
  return np.concatenate(tiles + [tile(0, 0, 1, 1)] * (len(tiles) > 1)).astype(np.float32)


def nearest_objects(scene: Scene, side: int, grid: Grid = (1, 1)) -> np.ndarray:
  """Index of the object that each token shows, i64 [s]: the nearest that touches its cell, -1 for none."""
  x, y, width, height = cells(side, grid).T
  which, best = np.full(len(x), -1), np.full(len(x), np.inf)
  for i, o in enumerate(scene.objects):
    rx, ry = world.radius(o.size, scene.aspect)
    dx, dy = np.abs(o.x - x), np.abs(o.y - y)
    # Distance from the cell to the centre of the object, in its radii: below 1 they touch.
    touches = np.hypot(np.maximum(dx - width / 2, 0) / rx, np.maximum(dy - height / 2, 0) / ry) < 1
    distance = np.hypot(dx / rx, dy / ry)
    nearest = touches & (distance < best)
    which, best = np.where(nearest, i, which), np.where(nearest, distance, best)
  return which


def dense_attributes(scene: Scene, side: int, grid: Grid = (1, 1)) -> np.ndarray:
  """Labels of each token, f32 [s COLUMNS].

  Columns: covered (0 or 1); index of shape, colour, size and fill of the object shown; its centre relative to the
  token's (x, y, in cells); background kind; its upper and its lower colour, indices of BACKGROUNDS.
  """
  x, y, width, height = cells(side, grid).T
  background = scene.background
  out = np.zeros((len(x), COLUMNS), np.float32)
  out[:, 7] = world.BACKGROUND_KINDS.index(background.kind)
  out[:, 8], out[:, 9] = (BACKGROUNDS.index(background.colours[k]) for k in (0, -1))
  which = nearest_objects(scene, side, grid)
  for i, o in enumerate(scene.objects):
    own = which == i
    out[own, :5] = [1.0, *(values.index(getattr(o, name)) for name, values in ATTRIBUTES)]
    out[own, 5], out[own, 6] = (o.x - x[own]) / width[own], (o.y - y[own]) / height[own]
  return out


def grounding(source: Scene, target: Scene, side: int, grid: Grid = (1, 1)) -> np.ndarray:
  """Whether each token shows an object that an edit changes, bool [s]."""
  changed = [o not in target.objects for o in source.objects]
  return np.array([*changed, False])[nearest_objects(source, side, grid)]  # -1, no object, is the last entry


def taken(sources: Sequence[Scene], target: Scene, grids: Sequence[Grid], side: int) -> np.ndarray:
  """Whether each token of several images shows what the target takes from it, bool [s of all].

  That is an object which the target has, perhaps in another place or colour, or between objects the background.
  """
  def alike(one: world.Object, other: world.Object) -> bool:
    same = [getattr(one, name) == getattr(other, name) for name in ('shape', 'size', 'fill')]
    return all(same) and (one.colour == other.colour or (one.x, one.y) == (other.x, other.y))
  marks = []
  for source, grid in zip(sources, grids, strict=True):
    objects = [any(alike(o, other) for other in target.objects) for o in source.objects]
    marks.append(np.array([*objects, source.background == target.background])[nearest_objects(source, side, grid)])
  return np.concatenate(marks)


def all_dense_attributes(scenes: Sequence[Scene], grids: Sequence[Grid], side: int, length: int) -> np.ndarray:
  """Dense attributes of all images of an example, one after another, f32 [length COLUMNS]; padding is -1."""
  out = np.full((length, COLUMNS), -1.0, np.float32)
  rows = np.concatenate([dense_attributes(scene, side, grid) for scene, grid in zip(scenes, grids, strict=True)])
  out[:len(rows)] = rows
  return out
