"""Scenes of the embedded world as data: one to four objects on a background.

Positions are fractions of the canvas and sizes are fractions of the square root of its area, so a scene is independent
of the canvas's resolution and shape.
"""

import dataclasses
import json

SHAPES = ('circle', 'square', 'triangle', 'star', 'heart', 'cross', 'ring', 'crescent', 'diamond', 'hexagon')
COLOURS = {
    'red': (220, 40, 40), 'orange': (245, 125, 10), 'yellow': (250, 215, 0), 'green': (40, 150, 60),
    'cyan': (40, 210, 220), 'blue': (40, 70, 210), 'purple': (130, 50, 170), 'pink': (250, 115, 180),
    'brown': (125, 65, 20), 'white': (255, 255, 255), 'grey': (100, 100, 100), 'black': (15, 15, 15)}
# Radius as a fraction of the square root of the canvas area: 8.0, 10.7 and 14.1 pixels at 64 px.
SIZES = {'small': 0.125, 'medium': 0.167, 'large': 0.22}
FILLS = ('solid', 'striped', 'outlined')
COLUMNS, ROWS = ('left', 'center', 'right'), ('top', 'middle', 'bottom')
PLACES = ('top left', 'top center', 'top right', 'middle left', 'center', 'middle right',
          'bottom left', 'bottom center', 'bottom right')
# Muted and light, so that every object colour stands out from every background and every blend of two.
BACKGROUND_COLOURS = {
    'cream': (240, 222, 180), 'mint': (175, 225, 180), 'lavender': (208, 180, 235), 'sky': (155, 205, 240),
    'sand': (205, 180, 140), 'slate': (130, 148, 172)}
# The six above, the only ones in test and heldout, and those of the wider world. These include the object colours, so
# not every object stands out from every background: see composition.stands_out.
WIDE_BACKGROUND_COLOURS = BACKGROUND_COLOURS | {'light grey': (200, 200, 200)} | COLOURS
BACKGROUND_KINDS = ('plain', 'gradient', 'checkered')
ASPECTS = {'square': (1, 1), 'wide': (5, 3), 'tall': (3, 5)}


@dataclasses.dataclass(frozen=True)
class Object:
  shape: str
  colour: str
  size: str
  fill: str
  x: float  # centre, as a fraction of the canvas width
  y: float  # centre, as a fraction of the canvas height

  @property
  def place(self) -> str:
    """The place, one of nine, that holds the centre."""
    return PLACES[3 * min(int(3 * self.y), 2) + min(int(3 * self.x), 2)]


_FIELDS = tuple(field.name for field in dataclasses.fields(Object))


@dataclasses.dataclass(frozen=True)
class Background:
  kind: str
  colours: tuple[str, ...]  # one for plain; two for gradient (top, bottom) and checkered


@dataclasses.dataclass(frozen=True)
class Scene:
  objects: tuple[Object, ...]
  background: Background
  aspect: str = 'square'

  def to_json(self) -> str:
    objects = [{name: getattr(o, name) for name in _FIELDS} for o in self.objects]
    background = {'kind': self.background.kind, 'colours': self.background.colours}
    return json.dumps({'objects': objects, 'background': background, 'aspect': self.aspect})

  @classmethod
  def from_json(cls, text: str) -> 'Scene':
    raw = json.loads(text)
    background = Background(raw['background']['kind'], tuple(raw['background']['colours']))
    return cls(tuple(Object(**o) for o in raw['objects']), background, raw['aspect'])

  def in_reading_order(self) -> tuple[Object, ...]:
    """Objects by place (row by row), then from left to right, then from top to bottom."""
    return tuple(sorted(self.objects, key=lambda o: (PLACES.index(o.place), round(o.x, 4), round(o.y, 4))))


def canvas(aspect: str, size: int) -> tuple[int, int]:
  """(width, height) in pixels of a canvas with about size^2 pixels, both multiples of size / 4.

  At size 64: square 64x64, wide 80x48, tall 48x80.
  """
  w, h = ASPECTS[aspect]
  unit = size // 4
  if w == h:
    return size, size
  return w * unit, h * unit


def radius(size: str, aspect: str = 'square') -> tuple[float, float]:
  """An object's radius as fractions of (canvas width, canvas height)."""
  w, h = ASPECTS[aspect]
  side = (w * h) ** 0.5
  return SIZES[size] * side / w, SIZES[size] * side / h
