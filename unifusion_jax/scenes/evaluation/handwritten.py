"""Handwritten requests and drawings, out of the distribution that the embedded models train on.

PROMPTS and EDITS were written by hand, many of them after failures of the first shipped models; DRAWINGS have papers,
pens and tilts of their own, without scenes/render.py and scenes/looks.py. Nothing here is trained on: examples.py skips
every request for which `is_kept` holds, whatever its spelling.

`prompts()`, `drawings()` and `edits()` return records as `examples.example` does, for `answers` of language.py and
`score` of generation.py; the judge should read their images with `wide=True`.
"""

import dataclasses
import functools
import math
import re

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from unifusion_jax.scenes import language, world

# (prompt, its exact description)
PROMPTS = (
    ('red circle left, blue circle right', 'a red circle left of a blue circle'),
    ('a star between two yellow circles', 'a star between a yellow circle and a yellow circle'),
    ('between two yellow circles, a red star', 'a red star between a yellow circle and a yellow circle'),
    ('two black crosses and a ring between them', 'a ring between a black cross and a black cross'),
    ('one red and one blue star', 'a red star, a blue star'),
    ('a solid heart and an outlined one', 'a solid heart, an outlined heart'),
    ('a green triangle and a purple one', 'a green triangle, a purple triangle'),
    ('small: a red circle', 'a small red circle'),
    ('on a mint background, a small yellow star', 'a small yellow star, on a mint background'),
    ('white background, black heart', 'a black heart, on a white background'),
    ('red square on white', 'a red square, on a white background'),
    ('black background with three white stars', 'three white stars, on a black background'),
    ('blue star above, red circle below', 'a blue star above a red circle'),
    ('a pink heart, and under it a green cross', 'a green cross below a pink heart'),
    ('circle', 'a circle'),
    ('two hearts', 'two hearts'),
    ('three small purple diamonds', 'three small purple diamonds'),
    ('4 red triangles', 'four red triangles'),
    ('large orange hexagon, striped', 'a large striped orange hexagon'),
    ('striped and large: an orange hexagon', 'a large striped orange hexagon'),
    ('yellow crescent top right', 'a yellow crescent at the top right'),
    ('top right: yellow crescent, bottom left: blue star',
     'a yellow crescent at the top right, a blue star at the bottom left'),
    ('A BIG GREEN SQUARE', 'a large green square'),
    ('gray ring in the centre', 'a grey ring at the center'),
    ('a circle and a square, both blue', 'a blue circle, a blue square'),
    ('two stars, one big and one small', 'a large star, a small star'),
    ('two red circles, one of them striped, the other outlined', 'a striped red circle, an outlined red circle'),
    ('a cross to the right of a triangle', 'a cross right of a triangle'),
    ('orange circle and, to its left, a black square', 'a black square left of an orange circle'),
    ('a tiny brown square in the middle of a white page', 'a small brown square at the center, on a white background'),
    ('pink and white checkers, a black crescent on top', 'a black crescent, on a pink and white checkered background'),
    ('night sky: a yellow crescent on black', 'a yellow crescent, on a black background'),
    ('red, green and blue circles', 'a red circle, a green circle, a blue circle'),
    ('just an outlined diamond please!!', 'an outlined diamond'),
    ('i need a green heart in the lower left corner thx', 'a green heart at the bottom left'),
    ('hollow cyan triangle, cream background', 'an outlined cyan triangle, on a cream background'),
    ('one ring and one cross, the ring is red', 'a red ring, a cross'),
    ('there is a cross. it is large and purple.', 'a large purple cross'),
    ('background: grey. one white circle.', 'a white circle, on a grey background'),
    ('a blue hexagon with a yellow star on its left', 'a yellow star left of a blue hexagon'),
)

_INK = {'red': (230, 20, 30), 'blue': (20, 40, 200), 'black': (20, 20, 25), 'green': (10, 130, 40),
        'orange': (250, 140, 0), 'yellow': (255, 225, 30), 'purple': (110, 30, 150), 'pink': (255, 90, 170),
        'brown': (110, 60, 25), 'white': (250, 250, 245), 'cyan': (0, 200, 215), 'grey': (110, 110, 115)}


@dataclasses.dataclass(frozen=True)
class Mark:
  """One object of a drawing: centre and radius as fractions of a square canvas, tilt in degrees, pen in radii."""
  shape: str
  colour: str
  fill: str
  x: float
  y: float
  radius: float
  tilt: float = 0.0
  pen: float = 0.34

  @property
  def size(self) -> str:
    """The size by name that is nearest to the radius."""
    return min(world.SIZES, key=lambda name: abs(world.SIZES[name] - self.radius))


@dataclasses.dataclass(frozen=True)
class Drawing:
  """Marks on paper: the paper's name and colour, blur and grain of the photograph."""
  paper: str
  colour: tuple[int, int, int]
  marks: tuple[Mark, ...]
  blur: float = 0.0
  grain: float = 0.0

  def scene(self) -> world.Scene:
    objects = tuple(world.Object(m.shape, m.colour, m.size, m.fill, m.x, m.y) for m in self.marks)
    return world.Scene(objects, world.Background('plain', (self.paper,)))


DRAWINGS = (
    Drawing('white', (252, 252, 250), (Mark('circle', 'red', 'outlined', 0.5, 0.5, 0.22),)),
    Drawing('white', (255, 255, 255), (Mark('square', 'blue', 'outlined', 0.22, 0.25, 0.16, 6),
                                       Mark('star', 'black', 'solid', 0.76, 0.74, 0.17, 12))),
    Drawing('black', (12, 12, 14), (Mark('crescent', 'yellow', 'solid', 0.72, 0.26, 0.21, 60),)),
    Drawing('black', (0, 0, 0), (Mark('star', 'white', 'outlined', 0.25, 0.5, 0.17, 20),
                                 Mark('heart', 'pink', 'solid', 0.75, 0.5, 0.16))),
    Drawing('white', (246, 244, 240), (Mark('crescent', 'orange', 'outlined', 0.26, 0.26, 0.21, 90, 0.26),
                                       Mark('crescent', 'purple', 'solid', 0.75, 0.75, 0.16, -75)), 0.7, 3),
    Drawing('light grey', (205, 205, 203), (Mark('triangle', 'green', 'outlined', 0.5, 0.26, 0.17, 8),
                                            Mark('circle', 'black', 'outlined', 0.5, 0.78, 0.13, 0, 0.4)), 0.5, 4),
    Drawing('white', (250, 250, 250), (Mark('hexagon', 'brown', 'outlined', 0.78, 0.24, 0.17, 15),
                                       Mark('cross', 'red', 'solid', 0.22, 0.78, 0.16, -8))),
    Drawing('grey', (112, 112, 112), (Mark('diamond', 'yellow', 'solid', 0.5, 0.5, 0.22, 5),), 0.6, 5),
    Drawing('white', (255, 255, 255), (Mark('heart', 'red', 'outlined', 0.5, 0.22, 0.17, -12, 0.32),
                                       Mark('heart', 'red', 'solid', 0.5, 0.75, 0.13, 15))),
    Drawing('cream', (247, 236, 205), (Mark('star', 'blue', 'outlined', 0.74, 0.26, 0.21, 30, 0.22),)),
    Drawing('white', (240, 240, 236), (Mark('ring', 'green', 'solid', 0.25, 0.25, 0.17),
                                       Mark('circle', 'green', 'outlined', 0.75, 0.75, 0.17, 0, 0.24)), 0.8, 2),
    Drawing('red', (215, 35, 40), (Mark('cross', 'white', 'solid', 0.5, 0.5, 0.22, 3),)),
    Drawing('blue', (35, 60, 200), (Mark('star', 'yellow', 'solid', 0.25, 0.75, 0.17, 10),
                                    Mark('circle', 'white', 'outlined', 0.75, 0.25, 0.17, 0, 0.32))),
    Drawing('white', (253, 253, 253), (Mark('square', 'black', 'solid', 0.22, 0.22, 0.13, -10),
                                       Mark('square', 'red', 'outlined', 0.76, 0.22, 0.13, 10, 0.35),
                                       Mark('triangle', 'blue', 'solid', 0.5, 0.76, 0.17, -20))),
    Drawing('black', (30, 28, 30), (Mark('hexagon', 'cyan', 'outlined', 0.26, 0.74, 0.21, 20, 0.29),), 0.7, 4),
    Drawing('green', (40, 150, 60), (Mark('heart', 'white', 'solid', 0.78, 0.78, 0.13, 10),
                                     Mark('triangle', 'yellow', 'outlined', 0.25, 0.26, 0.17, 170, 0.29))),
    Drawing('white', (248, 248, 244), (Mark('diamond', 'purple', 'outlined', 0.25, 0.5, 0.17, -8, 0.38),
                                       Mark('diamond', 'orange', 'solid', 0.76, 0.5, 0.16, 6)), 0.4, 3),
    Drawing('light grey', (198, 200, 202), (Mark('cross', 'black', 'outlined', 0.5, 0.5, 0.21, 9, 0.22),), 0.6, 3),
    Drawing('white', (255, 255, 255), (Mark('crescent', 'blue', 'solid', 0.5, 0.76, 0.17, 180),
                                       Mark('star', 'orange', 'solid', 0.5, 0.22, 0.13, 25))),
    Drawing('sand', (200, 176, 132), (Mark('circle', 'brown', 'outlined', 0.76, 0.76, 0.17, 0, 0.32),
                                      Mark('square', 'white', 'solid', 0.24, 0.24, 0.16, 12)), 0.5, 4),
)

# (index of the drawing, instruction, change: a new paper, or {index of a mark: new fields, None to remove it})
EDITS = (
    (0, 'make it blue', {0: dict(colour='blue')}),
    (0, 'fill it with solid color', {0: dict(fill='solid')}),
    (1, 'get the star out of here', {1: None}),
    (1, 'the square should be green instead', {0: dict(colour='green')}),
    (2, 'i want the moon red', {0: dict(colour='red')}),
    (3, 'star smaller', {0: dict(radius=0.125)}),
    (4, 'the purple crescent becomes a purple heart', {1: dict(shape='heart', tilt=0.0)}),
    (5, 'delete the black circle, keep the triangle', {1: None}),
    (6, 'put this on a black background', 'black'),
    (7, 'a white background please, rest the same', 'white'),
    (9, 'fill the star, no outline', {0: dict(fill='solid')}),
    (12, 'white circle should be black', {1: dict(colour='black')}),
    (13, 'remove the red one', {1: None}),
    (16, 'recolor both? no, only the left one: red', {0: dict(colour='red')}),
    (19, 'exchange the square for a star', {1: dict(shape='star')}),
)


def _points(mark: Mark, size: int) -> np.ndarray:
  """The contour of the mark in pixels, [p 2]."""
  corners = {'triangle': 3, 'square': 4, 'diamond': 4, 'hexagon': 6}
  if mark.shape in corners:
    count = corners[mark.shape]
    start = -math.pi / 4 if mark.shape == 'square' else 0.0 if mark.shape == 'hexagon' else -math.pi / 2
    angles = start + 2 * math.pi * np.arange(count) / count
    points = np.stack([np.cos(angles), np.sin(angles)], -1)
  elif mark.shape == 'star':
    angles = -math.pi / 2 + math.pi * np.arange(10) / 5
    points = np.stack([np.cos(angles), np.sin(angles)], -1) * np.where(np.arange(10) % 2, 0.48, 1.0)[:, None]
  elif mark.shape == 'cross':
    a, b = 0.33, 0.94
    points = np.array([(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a),
                       (-a, -a)])
  elif mark.shape == 'heart':
    t = 2 * math.pi * np.arange(80) / 80
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 17
    points = np.stack([np.sin(t) ** 3, y], -1)
  elif mark.shape == 'crescent':
    out, back = np.radians(np.linspace(-40, 220, 60)), np.radians(np.linspace(200, -20, 40))
    points = np.concatenate([np.stack([np.cos(out), np.sin(out)], -1),
                             np.stack([0.8 * np.cos(back), -0.52 + 0.74 * np.sin(back)], -1)])
  else:
    t = 2 * math.pi * np.arange(80) / 80
    points = np.stack([np.cos(t), np.sin(t)], -1)
  angle = math.radians(mark.tilt)
  turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
  return (points @ turn * mark.radius + (mark.x, mark.y)) * size


def draw(drawing: Drawing, size: int = 256) -> np.ndarray:
  """The drawing as an image, uint8 [size size 3]."""
  fine = 2 * size
  image = Image.new('RGB', (fine, fine), drawing.colour)
  pen = ImageDraw.Draw(image)
  for mark in drawing.marks:
    points = [tuple(p) for p in _points(mark, fine)]
    ink, width = _INK[mark.colour], round(mark.pen * mark.radius * fine)
    if mark.fill == 'solid':
      pen.polygon(points, fill=ink)
      if mark.shape == 'ring':
        x, y, hole = mark.x * fine, mark.y * fine, 0.42 * mark.radius * fine
        pen.ellipse([x - hole, y - hole, x + hole, y + hole], fill=drawing.colour)
    else:
      pen.line(points + points[:2], fill=ink, width=width, joint='curve')
  image = image.resize((size, size), Image.Resampling.BOX)
  if drawing.blur:
    image = image.filter(ImageFilter.GaussianBlur(drawing.blur * size / 64))
  pixels = np.asarray(image, np.float32)
  if drawing.grain:
    pixels = pixels + np.random.default_rng(len(drawing.marks)).normal(0, drawing.grain, pixels.shape)
  return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def _changed(drawing: Drawing, change) -> Drawing:
  if isinstance(change, str):
    return dataclasses.replace(drawing, paper=change, colour=world.WIDE_BACKGROUND_COLOURS[change])
  marks = tuple(dataclasses.replace(mark, **change.get(k, {})) for k, mark in enumerate(drawing.marks)
                if change.get(k, {}) is not None)
  return dataclasses.replace(drawing, marks=marks)


def _record(task: str, instruction: str, caption: str, **more) -> dict:
  return {'task': task, 'references': [], 'instruction': instruction, 'caption': caption, 'target': None,
          'kind': 'handwritten', 'style': 'handwritten', 'source': [], 'scene': '',
          'constraints': language.constraints_to_json(language.parse(caption)), **more}


def prompts(task: str = 'rewrite') -> list[dict]:
  """Records of the prompts; task: 'rewrite' to measure the VLM's text, 't2i' to measure images."""
  return [_record(task, text, description) for text, description in PROMPTS]


def drawings(size: int = 256) -> list[dict]:
  """Records of the drawings, to be described."""
  return [_record('caption', 'describe the picture', language.caption(d.scene()), references=[draw(d, size)],
                  source=[d.scene().to_json()]) for d in DRAWINGS]


def edits(size: int = 256) -> list[dict]:
  """Records of the instructions, each with its edited drawing as target."""
  records = []
  for index, text, change in EDITS:
    before, after = DRAWINGS[index], _changed(DRAWINGS[index], change)
    records.append(_record('edit', text, language.caption(after.scene()), references=[draw(before, size)],
                           target=draw(after, size), source=[before.scene().to_json()], scene=after.scene().to_json()))
  return records


def _plain(text: str) -> str:
  """The text without capitals, punctuation and spelling variants."""
  text = text.lower().replace('gray', 'grey').replace('color', 'colour').replace('centre', 'center')
  return ' '.join(re.findall(r'[a-z0-9]+', text))


@functools.cache
def _kept() -> frozenset[str]:
  return frozenset(map(_plain, [text for text, _ in PROMPTS] + [text for _, text, _ in EDITS]))


def is_kept(text: str) -> bool:
  """Whether a request is one of these, in any spelling, and so kept out of training."""
  return _plain(text) in _kept()
