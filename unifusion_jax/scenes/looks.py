"""Looks: a scene as different people would draw and photograph it.

Strokes, tilts, wobbly contours, inks and papers (`Look`) belong to the drawing, so an edited image keeps them. Light,
blur, noise and JPEG (`Camera`) belong to the photograph, so only references have them, never a target. The scene's
caption is true of every look: a colour is nearest to its own name, an outline leaves a hole, and no square is tilted
into a diamond.
"""

import dataclasses
import functools
import io
import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from unifusion_jax.scenes import render, world
from unifusion_jax.scenes.composition import pick, stands_out
from unifusion_jax.scenes.world import Background, Object, Scene

EDGE = 4  # pieces of a straight edge, so that a wobble can bend it
FINE = 4  # drawn pixels per pixel, along each side
# Largest tilt in degrees that keeps the shape recognisable; a circle and a ring have none.
TILTS = {'square': 14, 'triangle': 180, 'star': 180, 'heart': 35, 'cross': 14, 'crescent': 180, 'diamond': 14,
         'hexagon': 180, 'circle': 0, 'ring': 0}
# Largest distance of an inner point from the contour, as a share of the radius: strokes stay below half of it. A circle
# has more, but with so wide a stroke it would look like a ring.
DEPTHS = {'circle': 0.7, 'square': 0.7, 'triangle': 0.5, 'star': 0.5, 'heart': 0.6, 'cross': 0.4, 'ring': 0.3,
          'crescent': 0.4, 'diamond': 0.7, 'hexagon': 0.86}
STROKE = 2.7  # widest stroke, relative to that of scenes/render.py
SCALE = 0.06  # largest relative deviation of a radius; sizes are a quarter apart
CONTRAST = 60.0  # least RGB distance of an ink from the paper and from all blends of its two colours
# Further colours of the same names, from paint programs and style sheets where these agree.
INKS = {
    'red': ((255, 0, 0), (200, 0, 0), (178, 34, 34)), 'orange': ((255, 165, 0), (255, 140, 0)),
    'yellow': ((255, 255, 0), (255, 235, 60)),
    'green': ((0, 128, 0), (0, 255, 0), (50, 205, 50), (34, 139, 34), (76, 175, 80)),
    'cyan': ((0, 255, 255), (64, 224, 208)), 'blue': ((0, 0, 255), (30, 60, 160), (30, 120, 240)),
    'purple': ((128, 0, 128), (148, 0, 211), (156, 39, 176)),
    'pink': ((255, 105, 180), (255, 192, 203), (255, 20, 147)), 'brown': ((139, 69, 19), (101, 67, 33)),
    'white': ((245, 245, 245),), 'grey': ((128, 128, 128), (90, 90, 90)), 'black': ((0, 0, 0), (35, 35, 35))}
PAPERS = {
    'cream': ((255, 250, 208), (245, 235, 200)), 'mint': ((190, 245, 200),), 'sky': ((135, 206, 235),),
    'sand': ((194, 178, 128),), 'light grey': ((211, 211, 211), (192, 192, 192)),
    'white': ((250, 250, 250), (240, 240, 238), (235, 235, 230))}
VARIANTS = 64  # colours of each name
NEAR, MARGIN = 13.0, 7.0  # largest Lab distance from the own name, and least further distance from any other


@dataclasses.dataclass(frozen=True)
class Hand:
  """Drawing of one object: tilt and stripe direction in degrees, sizes relative to those of scenes/render.py."""
  tilt: float = 0.0
  scale: float = 1.0
  stroke: float = 1.0
  stripes: float = 0.0
  period: float = 1.0
  wobble: float = 0.0  # largest displacement of the contour, relative to the radius
  waves: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)  # phases of the displacement
  flipped: bool = False


@dataclasses.dataclass(frozen=True)
class Camera:
  """Effects of a photograph of a drawing; lengths are in pixels at 64 px."""
  light: tuple[float, float] = (0.0, 0.0)  # relative brightness of the right and the lower edge, beyond the middle's
  blur: float = 0.0
  noise: float = 0.0  # standard deviation, in levels of 0 to 255
  jpeg: int = 0  # quality; 0 for none
  seed: int = 0  # of the noise


@dataclasses.dataclass(frozen=True)
class Look:
  paper: tuple[tuple[int, int, int], ...] = ()  # RGB of each background colour; () for the defaults
  inks: tuple[tuple[str, tuple[int, int, int]], ...] = ()  # RGB by colour; the others are the defaults
  hands: tuple[Hand, ...] = ()  # of each object; () for scenes/render.py
  camera: Camera = Camera()

  def after(self, source: Scene, target: Scene) -> 'Look':
    """The look of an edit's target: old objects keep their look, new ones have the default look; no camera.

    source: the scene of this look. Its objects keep their order in `target`, where one may be missing or one more may
    be at the end.
    """
    hands = list(self.hands)
    if hands and len(target.objects) < len(source.objects):
      del hands[next(k for k, o in enumerate(source.objects) if o not in target.objects)]
    mirrored = len(source.objects) == len(target.objects) and any(
        o.x != 0.5 for o in source.objects) and all(
            (round(1 - a.x, 4), a.y) == (b.x, b.y) for a, b in zip(source.objects, target.objects))
    for k, obj in enumerate(target.objects if hands else ()):
      if k == len(hands):
        hands.append(Hand())
      elif len(target.objects) == len(source.objects) and obj.shape != source.objects[k].shape:
        hands[k] = dataclasses.replace(hands[k], tilt=0.0)
      elif mirrored:
        hands[k] = dataclasses.replace(hands[k], flipped=not hands[k].flipped)
    if source.background == target.background:
      return Look(self.paper, self.inks, tuple(hands))
    paper = _usual_paper(target.background)
    return Look((), tuple((name, rgb) for name, rgb in self.inks if _apart(rgb, paper)), tuple(hands))


def _usual_paper(background: Background) -> tuple[tuple[int, int, int], ...]:
  return tuple(world.WIDE_BACKGROUND_COLOURS[name] for name in background.colours)


def _lab(rgb) -> np.ndarray:
  """sRGB in 0..255 [... 3] as CIELAB."""
  linear = np.asarray(rgb, float) / 255
  linear = np.where(linear > 0.04045, ((linear + 0.055) / 1.055) ** 2.4, linear / 12.92)
  xyz = linear @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
  xyz = np.cbrt(np.maximum(xyz / (0.9505, 1.0, 1.089), 0.00886))
  x, y, z = np.moveaxis(xyz, -1, 0)
  return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


@functools.cache
def variants(name: str, papers: bool) -> tuple[tuple[int, int, int], ...]:
  """VARIANTS colours of a name, the same in every call, that no other name of objects (or backgrounds) fits."""
  palette = world.WIDE_BACKGROUND_COLOURS if papers else world.COLOURS
  also = INKS | PAPERS if papers else INKS
  known = {other: np.array([rgb, *also.get(other, ())], float) for other, rgb in palette.items()}
  labs = {other: _lab(rgbs) for other, rgbs in known.items()}
  rng = np.random.default_rng(len(palette) * 100 + list(palette).index(name))
  colours = []
  while len(colours) < VARIANTS:
    rgb = np.clip(known[name][rng.integers(len(known[name]))] + rng.normal(0, 9, 3), 0, 255).astype(int)
    distance = {other: np.linalg.norm(_lab(rgb) - lab, axis=-1).min() for other, lab in labs.items()}
    own = distance.pop(name)
    if own > NEAR or min(distance.values()) < own + MARGIN:
      continue
    if papers and not all(_apart(world.COLOURS[c], (rgb,)) for c in world.COLOURS
                          if stands_out(c, Background('plain', (name,)))):
      continue  # an object of some default colour would not stand out
    colours.append(tuple(int(v) for v in rgb))
  return tuple(colours)


def _apart(ink, paper) -> bool:
  """Whether an ink is at least CONTRAST from the paper's one or two colours and their blends."""
  first, step = paper[0], [b - a for a, b in zip(paper[0], paper[-1])]
  offset = [a - b for a, b in zip(ink, first)]
  along = sum(a * b for a, b in zip(offset, step)) / max(sum(s * s for s in step), 1)
  along = min(max(along, 0.0), 1.0)
  return sum((o - along * s) ** 2 for o, s in zip(offset, step)) >= CONTRAST ** 2


def _random_hand(rng: np.random.Generator, obj: Object) -> Hand:
  tilt, scale, stroke, stripes, period, wobble, *waves = (float(v) for v in rng.random(10))
  tilted = TILTS[obj.shape] * (2 * tilt - 1) * (1.0 if obj.shape == 'crescent' or tilt < 0.7 else 0.2)
  return Hand(
      tilted, 1 + SCALE * (2 * scale - 1), 0.8 * (STROKE / 0.8) ** stroke,
      0.0 if stripes < 0.4 else 90.0 if stripes < 0.6 else 45.0 if stripes < 0.8 else -45.0, 0.85 + 0.5 * period,
      max(0.0, 0.08 * wobble - 0.02), tuple(2 * math.pi * w for w in waves))


def _random_camera(rng: np.random.Generator) -> Camera:
  lit, x, y, soft, blur, grainy, noise, packed, quality = (float(v) for v in rng.random(9))
  return Camera(
      (0.16 * (x - 0.5), 0.08 * (y - 0.5)) if lit < 0.3 else (0.0, 0.0), 0.3 + 0.5 * blur if soft < 0.35 else 0.0,
      1 + 4 * noise if grainy < 0.4 else 0.0, int(40 + 52 * quality) if packed < 0.4 else 0, int(rng.integers(2 ** 31)))


def random_look(rng: np.random.Generator, scene: Scene) -> Look:
  """A random look for the scene; hands, colours and camera are each at times the defaults."""
  by_hand, coloured, photographed = rng.random(3)
  paper, inks, hands, camera = (), (), (), Camera()
  if by_hand < 0.7:
    hands = tuple(_random_hand(rng, obj) for obj in scene.objects)
  if coloured < 0.75:
    paper = tuple(pick(rng, variants(name, True)) for name in scene.background.colours)
    for name in dict.fromkeys(o.colour for o in scene.objects):
      ink = pick(rng, variants(name, False))
      if _apart(ink, paper):
        inks += ((name, ink),)
    if any(name not in dict(inks) and not _apart(world.COLOURS[name], paper) for name in
           (o.colour for o in scene.objects)):
      paper = ()  # an object would not stand out from the blends of this gradient
      inks = tuple((name, rgb) for name, rgb in inks if _apart(rgb, _usual_paper(scene.background)))
  if photographed < 0.6:
    camera = _random_camera(rng)
  return Look(paper, inks, hands, camera)


def _arc(x: float, y: float, radius: float, start: float, end: float, count: int) -> np.ndarray:
  angles = np.radians(np.linspace(start, end, count, endpoint=abs(end - start) < 359))
  return np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], -1)


@functools.cache
def _contours(shape: str) -> tuple[np.ndarray, ...]:
  """Closed contours [p 2] of a shape of radius 1, the second a hole. Straight edges are in EDGE pieces."""
  if shape in ('circle', 'ring'):
    outer = _arc(0, 0, 1, 0, 360, 40)
    return (outer, _arc(0, 0, render.RING_HOLE, 0, 360, 20)) if shape == 'ring' else (outer,)
  if shape == 'crescent':
    # The unit disc without the disc of radius 0.74 around (0, -0.62); they cross at y = -0.6748.
    y, x = -0.6748, (1 - 0.6748 ** 2) ** 0.5
    a, b = math.degrees(math.atan2(y, x)), math.degrees(math.atan2(y + 0.62, x))
    return np.concatenate([_arc(0, 0, 1, a, 180 - a, 30), _arc(0, -0.62, 0.74, 180 - b, b, 20)[1:-1]]),
  corners = np.array(render.POLYGONS[shape])
  if shape == 'heart':
    return corners[::3],
  steps = (np.arange(EDGE) / EDGE)[:, None]
  following = np.roll(corners, -1, 0)
  return np.concatenate([a + steps * (b - a) for a, b in zip(corners, following)]),


def _turned(points: np.ndarray, hand: Hand) -> np.ndarray:
  a, b, c, d = hand.waves
  if hand.wobble:
    x, y = points[:, 0], points[:, 1]
    points = points + hand.wobble * np.stack(
        [np.sin(2.2 * y + a) + 0.5 * np.sin(4.1 * x + b), np.sin(2.3 * x + c) + 0.5 * np.sin(3.9 * y + d)], -1) / 1.5
  angle = math.radians(hand.tilt)
  turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
  points = points @ turn
  return points * (-1, 1) if hand.flipped else points


@functools.lru_cache(maxsize=16)  # an edit's target repeats most objects of its reference
def _coverage(obj: Object, hand: Hand, radius: float, side: float, x: float, y: float) -> np.ndarray:
  """The object's coverage of each pixel, f32 [n n]; its centre is (x, y) pixels right of and below n / 2."""
  half = math.ceil(radius * (1 + hand.wobble)) + 2
  n = 2 * half * FINE
  radius *= hand.scale
  centre = np.array([half + x, half + y]) * FINE - 0.5
  contours = [[tuple(p) for p in (centre + radius * FINE * _turned(points, hand)).tolist()]
              for points in _contours(obj.shape)]
  inside = Image.new('L', (n, n))
  pen = ImageDraw.Draw(inside)
  for ink, points in zip((255, 0), contours):
    pen.polygon(points, fill=ink)
  if obj.fill != 'solid':
    outlined = obj.fill == 'outlined'
    usual = (render.OUTLINE if outlined else render.RIM) * side
    width = min(hand.stroke * usual, max(usual, (0.5 if outlined else 0.3) * DEPTHS[obj.shape] * radius))
    marked = Image.new('L', (n, n))
    pen = ImageDraw.Draw(marked)
    reach = max(1, round(width * FINE))
    for points in contours:
      pen.line(points + points[:1], fill=255, width=2 * reach)
    # Pillow's lines leave a notch where a contour turns outward.
    for x, y in contours[0][::EDGE] if obj.shape in ('star', 'cross') else contours[0][:1]:
      pen.ellipse([x - reach, y - reach, x + reach, y + reach], fill=255)
    if not outlined:
      period = render.PERIOD * side * FINE * hand.period
      angle = math.radians(hand.tilt + hand.stripes) * (-1 if hand.flipped else 1)
      along, across = np.array([math.cos(angle), math.sin(angle)]) * n, np.array([-math.sin(angle), math.cos(angle)])
      for k in range(-int(n / period / 2) - 1, int(n / period / 2) + 2):
        middle = centre + k * period * across
        pen.line([*(middle - along), *(middle + along)], fill=255, width=max(1, round(period / 2)))
    inside = ImageChops.darker(inside, marked)
  share = np.asarray(inside.reduce(FINE), np.float32) * (1 / 255)
  share.flags.writeable = False
  return share


def _photographed(image: np.ndarray, camera: Camera, side: float) -> np.ndarray:
  """The photograph uint8 [y x 3] of a drawing f32 [y x 3] in 0..255."""
  if any(camera.light):
    rows, columns = (np.linspace(-1, 1, n, dtype=np.float32) for n in image.shape[:2])
    image = image * (1 + camera.light[1] * rows[:, None] + camera.light[0] * columns)[..., None]
  if camera.noise:
    grain = np.random.default_rng(camera.seed).standard_normal(image.shape, np.float32)
    image = image + camera.noise * grain
  pixels = np.clip(image + 0.5, 0, 255).astype(np.uint8)
  if not camera.blur and not camera.jpeg:
    return pixels
  pil_image = Image.fromarray(pixels)
  if camera.blur:
    pil_image = pil_image.filter(ImageFilter.GaussianBlur(camera.blur * side / 64))
  if camera.jpeg:
    file = io.BytesIO()
    pil_image.save(file, 'JPEG', quality=camera.jpeg)
    pil_image = Image.open(file)
  return np.asarray(pil_image)


def draw(scene: Scene, look: Look, size: int = 64) -> np.ndarray:
  """The scene in a look, uint8 [y x 3] of the size of `render.render`."""
  width, height = world.canvas(scene.aspect, size)
  side = (width * height) ** 0.5
  image = render.background(scene.background.kind, look.paper or _usual_paper(scene.background), width, height)
  inks = dict(look.inks)
  for k, obj in enumerate(scene.objects):
    if look.hands:
      column, row = obj.x * width, obj.y * height
      x, y = math.floor(column), math.floor(row)
      share = _coverage(obj, look.hands[k], world.SIZES[obj.size] * side, side, column - x, row - y)
      left, top = x - len(share) // 2, y - len(share) // 2
    else:
      share, left, top = render.placed(obj, width, height)
    ink = inks.get(obj.colour, world.COLOURS[obj.colour])
    render.paint(image, share, left, top, np.array(ink, np.float32))
  return _photographed(image, look.camera, side)
