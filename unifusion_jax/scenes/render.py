"""Renderer of scenes: Pillow draws each shape FINE times as fine, and the mean over a pixel is its coverage.

Every shape is left-right symmetric, so the mirror image of a scene is the image of the mirrored scene.
"""

import functools
import math

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from unifusion_jax.errors import UserError
from unifusion_jax.scenes import world
from unifusion_jax.scenes.world import Background, Object, Scene

FINE = 8  # drawn pixels per pixel, along each side
PHASES = 4  # sub-pixel positions per pixel, along each side
# Widths of outline and rim and period of stripes, relative to the square root of the canvas area.
OUTLINE, RIM, PERIOD = 1.7 / 64, 1.2 / 64, 4.6 / 64
RING_HOLE = 0.4  # inner radius of a ring, relative to the outer one


def _polygon(radii, start: float) -> list[tuple[float, float]]:
  """Corners at even angles from `start` (degrees; 0 is right, -90 is up), with the radii in turn."""
  angles = np.radians(start + 360 / len(radii) * np.arange(len(radii)))
  return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles)]


def _heart() -> list[tuple[float, float]]:
  t = np.linspace(0, 2 * np.pi, 120, endpoint=False)
  x = 16 * np.sin(t) ** 3
  y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
  return list(zip(x / 17, y / 17))


_ARM = 0.34  # half the width of a cross's arm; its corners lie on the circle
_TIP = (1 - _ARM ** 2) ** 0.5
POLYGONS = {
    'square': _polygon([1] * 4, -45), 'triangle': _polygon([1] * 3, -90), 'diamond': _polygon([1] * 4, -90),
    'hexagon': _polygon([1] * 6, 0), 'star': _polygon([1, 0.53] * 5, -90), 'heart': _heart(),
    'cross': [(s * x, u * y) for s, u, corners in (
        (1, 1, ((_TIP, _ARM), (_ARM, _ARM), (_ARM, _TIP))), (-1, 1, ((_ARM, _TIP), (_ARM, _ARM), (_TIP, _ARM))),
        (-1, -1, ((_TIP, _ARM), (_ARM, _ARM), (_ARM, _TIP))), (1, -1, ((_ARM, _TIP), (_ARM, _ARM), (_TIP, _ARM))))
              for x, y in corners]}


def _silhouette(shape: str, radius: float) -> np.ndarray:
  """The filled shape, centred, bool [n n] with n even and a margin of one drawn pixel."""
  half = math.ceil(radius) + 1
  image = Image.new('1', (2 * half, 2 * half))
  draw = ImageDraw.Draw(image)

  def disc(x, y, r, ink):
    draw.ellipse([half + x - r - 0.5, half + y - r - 0.5, half + x + r - 0.5, half + y + r - 0.5], fill=ink)

  if shape in POLYGONS:
    draw.polygon([(half + radius * x - 0.5, half + radius * y - 0.5) for x, y in POLYGONS[shape]], fill=1)
  else:
    disc(0, 0, radius, 1)
    if shape == 'ring':
      disc(0, 0, RING_HOLE * radius, 0)
    elif shape == 'crescent':
      disc(0, -0.62 * radius, 0.74 * radius, 0)
  inside = np.asarray(image)
  return inside | inside[:, ::-1]  # Pillow's polygons lean to one side by a drawn pixel


@functools.lru_cache(maxsize=512)
def _fine(shape: str, fill: str, radius: float, side: float) -> np.ndarray:
  """The mask of the object's colour, bool [n n], FINE times as fine as the image; radius and side are in pixels."""
  inside = _silhouette(shape, radius * FINE)
  if fill == 'solid':
    return inside
  depth = ndimage.distance_transform_edt(inside)
  unit = side * FINE
  if fill == 'outlined':
    return inside & (depth <= OUTLINE * unit)
  rows = np.arange(len(inside)) + 0.5 - len(inside) / 2
  stripe = np.abs((rows / (PERIOD * unit) + 0.5) % 1 - 0.5) < 0.25
  return inside & (stripe[:, None] | (depth <= RIM * unit))


@functools.lru_cache(maxsize=8192)
def coverage(shape: str, fill: str, radius: float, side: float, phase_x: int, phase_y: int) -> np.ndarray:
  """The object's coverage of each pixel, f32 [n n] in [0, 1]; its centre is phase / PHASES right of and below n / 2.

  `radius` is the object's and `side` the square root of the canvas area, both in pixels.
  """
  mask = _fine(shape, fill, radius, side)
  half = math.ceil(len(mask) / 2 / FINE) + 1
  fine = np.zeros((2 * half * FINE, 2 * half * FINE), np.uint8)
  y, x = (half * FINE - len(mask) // 2 + p * FINE // PHASES for p in (phase_y, phase_x))
  fine[y:y + len(mask), x:x + len(mask)] = mask
  rows = fine.reshape(2 * half, FINE, 2 * half * FINE).sum(1, dtype=np.uint8)
  share = rows.reshape(2 * half, 2 * half, FINE).sum(2, dtype=np.uint8).astype(np.float32) / FINE ** 2
  share.flags.writeable = False
  return share


def placed(obj: Object, width: int, height: int) -> tuple[np.ndarray, int, int]:
  """The object's coverage f32 [n n] on a canvas, and the column and row of its first pixel."""
  side = (width * height) ** 0.5
  column, row = (math.floor(v * n * PHASES + 0.5) for v, n in ((obj.x, width), (obj.y, height)))
  share = coverage(obj.shape, obj.fill, world.SIZES[obj.size] * side, side, column % PHASES, row % PHASES)
  return share, column // PHASES - len(share) // 2, row // PHASES - len(share) // 2


def paint(image: np.ndarray, share: np.ndarray, left: int, top: int, ink: np.ndarray) -> None:
  """Blends ink f32 [3] into the image f32 [y x 3] in place; `share` f32 [n n] is its weight from (left, top) on."""
  y0, x0 = max(top, 0), max(left, 0)
  part = image[y0:top + len(share), x0:left + len(share)]
  share = share[y0 - top:y0 - top + part.shape[0], x0 - left:x0 - left + part.shape[1], None]
  part += share * (ink - part)


def background(kind: str, colours, width: int, height: int) -> np.ndarray:
  """The background alone, f32 [y x 3] in 0..255; colours are RGB triples."""
  image = np.empty((height, width, 3), np.float32)
  if kind == 'plain':
    image[:] = colours[0]
  elif kind == 'gradient':
    t = ((np.arange(height) + 0.5) / height)[:, None, None]
    image[:] = (1 - t) * np.array(colours[0]) + t * np.array(colours[1])
  else:
    square = min(width, height) // 4
    odd = (np.arange(height)[:, None] // square + np.arange(width) // square) % 2
    image[:] = np.array(colours, np.float32)[odd]
  return image


@functools.lru_cache(maxsize=1024)
def _ground(ground: Background, width: int, height: int) -> np.ndarray:
  image = background(ground.kind, [world.WIDE_BACKGROUND_COLOURS[name] for name in ground.colours], width, height)
  image.flags.writeable = False
  return image


_INKS = {name: np.array(rgb, np.float32) for name, rgb in world.COLOURS.items()}


def render(scene: Scene, size: int = 64) -> np.ndarray:
  """The scene as an image, uint8 [y x 3], of about size^2 pixels (see world.canvas); size is a multiple of 16."""
  if size % 16:
    raise UserError(f'an image of size {size} has no whole checkerboard squares: choose a multiple of 16')
  width, height = world.canvas(scene.aspect, size)
  image = _ground(scene.background, width, height).copy()
  for obj in scene.objects:
    paint(image, *placed(obj, width, height), _INKS[obj.colour])
  return (image + 0.5).astype(np.uint8)
