"""Judge: reads an image into a scene by analysis through synthesis, without a neural network, and scores it.

The background is the best fit of all that can be rendered, in the six colours or in all (`wide`). The pixels that
differ from it form connected pieces. Each piece is compared with every shape, size, fill and colour, centred on its
centre of mass, and read as the one with the least squared difference. Images of all sizes are read at 64 px.
"""

from collections.abc import Iterator
import dataclasses
import functools
import itertools
import math
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage, optimize

from unifusion_jax.errors import UserError
from unifusion_jax.scenes import render, world
from unifusion_jax.scenes.constraints import Constraints
from unifusion_jax.scenes.language import ASIDE, on_the_way
from unifusion_jax.scenes.world import Background, Object, Scene

SIZE = 64
# A piece is an object if its template explains at least this share of its squared difference from the background.
# Blur costs thin lines the most. Of 2000 rendered objects none scores below 0.93, and with noise of 6 levels and a blur
# of 0.6 pixels 1 in 2000 scores below these shares; of halves of objects, blobs, ellipses and polygons 94 to 98% do.
MATCH = {'solid': 0.92, 'striped': 0.88, 'outlined': 0.84}
FOREGROUND = 28.0  # RGB distance from the background at which a pixel is foreground
CONTRAST = 0.3  # and its least share of the largest distance nearby, to part objects whose blurred edges touch
SPECK = 12  # pixels; smaller pieces are ignored
BACKGROUND_ERROR = 25.0  # largest root mean square RGB distance from the best background
SMOOTH = 0.5  # pixels; blur against noise in the foreground
BLUR = 1.0  # pixels; blur of both sides of a comparison, so that the image's own blur matters less
PLACE_SLACK = 0.03  # fraction of the canvas by which a centre may lie beyond the border of its place
NEAR = 0.1  # fraction of the canvas within which an object counts as unmoved
WINDOW = 42  # pixels; room for a large object around its centre of mass
LIKELY_COLOURS, FINALISTS = 4, 6

TEMPLATES = tuple(itertools.product(world.SHAPES, world.SIZES, world.FILLS))
ATTRIBUTES = ('shape', 'colour', 'size', 'fill')
COLOURS = np.array(list(world.COLOURS.values()), np.float32)


@functools.cache
def backgrounds(wide: bool = False) -> tuple[Background, ...]:
  """All backgrounds that an image is compared with."""
  names = world.WIDE_BACKGROUND_COLOURS if wide else world.BACKGROUND_COLOURS
  return tuple([Background('plain', (name,)) for name in names] +
               [Background(kind, pair) for kind in ('gradient', 'checkered')
                for pair in itertools.permutations(names, 2)])


@dataclasses.dataclass(frozen=True)
class Reading:
  scene: Scene  # objects in reading order
  scores: tuple[float, ...]  # share that each object's template explains, in the order of scene.objects
  rejected: int  # number of pieces that resemble no object
  background_error: float  # root mean square RGB distance of the pixels without objects

  @property
  def background(self) -> Background | None:
    """The background, or None if the image resembles none."""
    return self.scene.background if self.background_error <= BACKGROUND_ERROR else None


def _blur(images: np.ndarray, sigma: float, axes) -> np.ndarray:
  return ndimage.gaussian_filter(images, sigma, axes=axes, mode='constant', truncate=3.5)


def _drawn(background: Background, width: int, height: int) -> np.ndarray:
  colours = [world.WIDE_BACKGROUND_COLOURS[name] for name in background.colours]
  return render.background(background.kind, colours, width, height)


@functools.lru_cache(maxsize=6)
def _candidates(width: int, height: int, wide: bool) -> np.ndarray:
  """Every third pixel of every background, f32 [background y x 3]."""
  return np.stack([_drawn(b, width, height)[1::3, 1::3] for b in backgrounds(wide)])


@functools.lru_cache(maxsize=2)
def _templates(side: float) -> tuple[np.ndarray, np.ndarray]:
  """Blurred coverages with the centre of mass in the middle of the window, and the objects' centres.

  Returns f32 [template phase_y phase_x WINDOW * WINDOW] and centres f32 [template 2] (x, y) in pixels relative to the
  centre of mass, rounded to a phase.
  """
  phases = render.PHASES
  bank = np.zeros((len(TEMPLATES), phases, phases, WINDOW, WINDOW), np.float32)
  centres = np.zeros((len(TEMPLATES), 2), np.float32)
  for i, (shape, size, fill) in enumerate(TEMPLATES):
    radius = world.SIZES[size] * side
    share = render.coverage(shape, fill, radius, side, 0, 0)
    mass = ndimage.center_of_mass(share)
    to_centre = [round((len(share) / 2 - 0.5 - mass[axis]) * phases) for axis in (1, 0)]
    centres[i] = np.array(to_centre) / phases
    for row, column in np.ndindex(phases, phases):
      x, y = to_centre[0] + column, to_centre[1] + row
      share = render.coverage(shape, fill, radius, side, x % phases, y % phases)
      left, top = (WINDOW // 2 + v // phases - len(share) // 2 for v in (x, y))
      bank[i, row, column, top:top + len(share), left:left + len(share)] = share
  bank = _blur(bank, BLUR, (3, 4))
  return bank.reshape(len(TEMPLATES), phases, phases, -1), centres


def _soften(ground: np.ndarray, image: np.ndarray) -> np.ndarray:
  """The checkerboard with blends of its two colours where a blurred image has them, f32 [y x 3]."""
  low, high = (f(ground, (3, 3, 1)) for f in (ndimage.minimum_filter, ndimage.maximum_filter))
  one, two = ground, low + high - ground
  step = two - one
  t = ((image - one) * step).sum(-1) / np.maximum((step ** 2).sum(-1), 1)
  blend = one + np.clip(t, 0, 1)[..., None] * step
  blended = ((image - blend) ** 2).sum(-1) < FOREGROUND ** 2
  return np.where(blended[..., None], blend, ground)


def _pieces(distance: np.ndarray) -> tuple[np.ndarray, int]:
  """Connected pieces of the foreground: labels i32 [y x], 0 for background, and their number."""
  seeds = (distance > FOREGROUND) & (distance > CONTRAST * ndimage.maximum_filter(distance, 5))
  labels, count = ndimage.label(seeds, np.ones((3, 3)))
  boxes = ndimage.find_objects(labels)
  areas = np.bincount(labels.ravel(), minlength=count + 1)
  owner = np.arange(count + 1)
  # A piece within the box of a larger one is part of it: the inner circle of a ring, a stripe.
  for i, j in itertools.permutations(range(count), 2):
    within = all(a.start >= b.start and a.stop <= b.stop for a, b in zip(boxes[i], boxes[j]))
    if within and (areas[i + 1], i) < (areas[j + 1], j):
      owner[i + 1] = j + 1
  while (owner[owner] != owner).any():
    owner = owner[owner]
  areas = np.bincount(owner, areas, count + 1)
  number = np.zeros(count + 1, np.int32)
  kept = [i for i in range(1, count + 1) if owner[i] == i and areas[i] >= SPECK]
  number[kept] = np.arange(len(kept)) + 1
  labels = number[owner][labels]
  # Pixels on a piece's blurred edge belong to the piece nearest to them.
  distances: Any = ndimage.distance_transform_edt(labels == 0, return_indices=True)
  reach, nearest = distances
  return np.where(reach <= 2.5, labels[tuple(nearest)], 0), len(kept)


def _left_over(difference: np.ndarray, ground: np.ndarray, obj: Object) -> float:
  """Squared difference that remains after the object, blurred like the piece, is subtracted."""
  height, width = ground.shape[:2]
  drawn = ground.copy()
  render.paint(drawn, *render.placed(obj, width, height), np.array(world.COLOURS[obj.colour], np.float32))
  return float(((difference - _blur(drawn - ground, BLUR, (0, 1))) ** 2).sum())


def _match(difference: np.ndarray, ground: np.ndarray, side: float, harsh: bool) -> tuple[float, Object, float, float]:
  """The object that best explains a piece's difference from the background, both f32 [y x 3].

  Blurred coverage times contrast approximates the blurred product of the two, which is exact on smooth backgrounds. On
  a `harsh` background the finalists are compared by the product itself.

  Returns the explained share of the squared difference, the object without its place, and its centre in pixels.
  """
  difference = _blur(difference, BLUR, (0, 1))
  # Coverage by colour: the difference's component along the colour's contrast to the background
  contrasts = COLOURS[:, None, None] - ground
  strength = (contrasts ** 2).sum(-1)
  along = np.einsum('yxk,cyxk->cyx', difference, contrasts)
  coverage = np.clip(along / np.maximum(strength, 1.0), 0, 1)  # 0 where the background has that very colour
  unlike = (coverage * (coverage * strength - 2 * along)).sum((1, 2))
  colours = unlike.argsort()[:LIKELY_COLOURS]

  total = float((difference ** 2).sum())
  pad = ((0, 0), (WINDOW, WINDOW), (WINDOW, WINDOW))
  strength = np.pad(strength[colours], pad, mode='edge')
  along = np.pad(along, pad)[colours]
  bank, centres = _templates(side)
  phases = render.PHASES

  def left_over(template, k, x, y):
    """Squared difference that remains with the centre of mass at (x, y), in phases; template may be a slice."""
    top, left = y // phases + WINDOW // 2, x // phases + WINDOW // 2
    here = (k, slice(top, top + WINDOW), slice(left, left + WINDOW))
    share = bank[template, y % phases, x % phases]
    return total + (share ** 2) @ strength[here].ravel() - 2 * (share @ along[here].ravel())

  starts, candidates = [], []
  for k, colour in enumerate(colours):
    mass_y, mass_x = ndimage.center_of_mass(coverage[colour] + 1e-9)
    x, y = (math.floor((v + 0.5) * phases + 0.5) for v in (mass_x, mass_y))
    starts.append((x, y))
    candidates += [(r, int(t), k) for t, r in enumerate(left_over(slice(None), k, x, y))]
  best = (math.inf,)
  for _, template, k in sorted(candidates)[:FINALISTS]:
    x, y = starts[k]
    best = min(best, *((left_over(template, k, x + dx, y + dy), template, k, x + dx, y + dy)
                       for dx in (-1, 0, 1) for dy in (-1, 0, 1)))

  def placed(template, k, x, y):
    centre_x, centre_y = np.array((x, y)) / phases + centres[template]
    shape, size, fill = TEMPLATES[template]
    return Object(shape, list(world.COLOURS)[colours[k]], size, fill, float(centre_x), float(centre_y))

  def at_canvas(obj):
    return dataclasses.replace(obj, x=obj.x / ground.shape[1], y=obj.y / ground.shape[0])

  remainder, *placement = best
  obj = placed(*placement)
  if harsh:
    finalists = [obj, *(placed(t, k, *starts[k]) for _, t, k in sorted(candidates)[:FINALISTS])]
    remainder, index = min((_left_over(difference, ground, at_canvas(o)), i) for i, o in enumerate(finalists))
    obj = finalists[index]
  return float(1 - remainder / max(total, 1e-6)), dataclasses.replace(obj, x=0, y=0), obj.x, obj.y


def read(image: np.ndarray, wide: bool = False) -> Reading:
  """The reading of an image uint8 [y x 3] of any size; wide: backgrounds of any colour, not of the six alone."""
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
    raise UserError(f'the judge reads images as uint8 [y x 3] and got {image.dtype} {list(image.shape)}: '
                    'convert the image to 8-bit RGB first')
  proportion = image.shape[1] / image.shape[0]
  aspect = min(world.ASPECTS, key=lambda a: abs(math.log(proportion * world.ASPECTS[a][1] / world.ASPECTS[a][0])))
  width, height = world.canvas(aspect, SIZE)
  if image.shape[:2] != (height, width):
    image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))
  image = image.astype(np.float32)

  squares = ((_candidates(width, height, wide) - image[1::3, 1::3]) ** 2).sum(-1)
  background = backgrounds(wide)[np.minimum(squares, 35.0 ** 2).mean((1, 2)).argmin()]
  ground = _drawn(background, width, height)
  if background.kind == 'checkered':
    ground = _soften(ground, image)
  difference = image - ground
  distance = np.sqrt((_blur(difference, SMOOTH, (0, 1)) ** 2).sum(-1))
  labels, count = _pieces(distance)
  bare = labels == 0
  error = float(np.sqrt((distance[bare] ** 2).mean())) if bare.any() else math.inf

  scored = []
  harsh = wide and background.kind == 'checkered'
  for i in range(1, count + 1):
    piece = np.where((labels == i)[..., None], difference, 0)
    score, obj, x, y = _match(piece, ground, (width * height) ** 0.5, harsh)
    if score >= MATCH[obj.fill]:
      x, y = (round(min(max(v, 0), n) / n, 4) for v, n in ((x, width), (y, height)))
      scored.append((dataclasses.replace(obj, x=x, y=y), score))
  order = Scene(tuple(o for o, _ in scored), background, aspect).in_reading_order()
  scores = dict(scored)
  return Reading(Scene(order, background, aspect), tuple(scores[o] for o in order), count - len(scored), error)


def _distance(a: Object, b: Object) -> float:
  return math.hypot(a.x - b.x, a.y - b.y)


def _alike(a: Object, b: Object, attributes=ATTRIBUTES) -> bool:
  return all(getattr(a, k) == getattr(b, k) for k in attributes)


def _in_place(obj: Object, place: str) -> bool:
  """Whether the centre lies in the place, or at most PLACE_SLACK beyond its border."""
  row, column = divmod(world.PLACES.index(place), 3)
  return all(i / 3 - PLACE_SLACK <= v <= (i + 1) / 3 + PLACE_SLACK for v, i in ((obj.x, column), (obj.y, row)))


def _assignments(fitting: list[list[int]], taken: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
  """All choices of one number from each list without a number twice."""
  if len(taken) == len(fitting):
    yield taken
    return
  for i in fitting[len(taken)]:
    if i not in taken:
      yield from _assignments(fitting, taken + (i,))


def exact(reading: Reading, scene: Scene) -> bool:
  """Whether the image shows exactly this scene: all attributes, the nine places, the background, nothing else."""
  read_objects = reading.scene.objects
  fitting = [[i for i, r in enumerate(read_objects) if _alike(r, o) and _in_place(r, o.place)] for o in scene.objects]
  return (not reading.rejected and len(read_objects) == len(scene.objects) and reading.scene.aspect == scene.aspect and
          reading.background == scene.background and any(True for _ in _assignments(fitting)))


def _holds(relation: str, a: Object, *others: Object) -> bool:
  if relation == 'between':
    way, aside = on_the_way(a, *others)
    return 0 < way < 1 and aside <= 2 * ASIDE
  b, = others
  return {'left of': a.x < b.x, 'right of': a.x > b.x, 'above': a.y < b.y, 'below': a.y > b.y}[relation]


def check(reading: Reading, constraints: Constraints) -> dict[str, bool]:
  """{kind: met} for every kind of constraint that is present, as in GenEval, and 'all'.

  object: the shapes are there. count: as many objects (or at least as many, if the count is not exact). colour, size,
  fill, place: the shapes are there and each has it. relation: it holds between objects of the wanted shapes and
  colours. background. all: one choice of objects meets every constraint at once.
  """
  wanted, objects = constraints.objects, reading.scene.objects

  def met(kinds, relations=()) -> bool:
    def fits(obj, want):
      return all(
          _in_place(obj, want.place) if kind == 'place' else getattr(obj, kind) == getattr(want, kind)
          for kind in kinds if getattr(want, kind) is not None)

    fitting = [[i for i, obj in enumerate(objects) if fits(obj, want)] for want in wanted]
    return any(all(_holds(relation, *(objects[chosen[k]] for k in (i, *others))) for i, relation, *others in relations)
               for chosen in _assignments(fitting))

  surplus = len(objects) + reading.rejected - len(wanted)
  result = {'count': surplus == 0 if constraints.exact_count else surplus >= 0}
  if any(want.shape for want in wanted):
    result['object'] = met(('shape',))
  for kind in ('colour', 'size', 'fill', 'place'):
    if any(getattr(want, kind) for want in wanted):
      result[kind] = met(('shape', kind))
  if constraints.relations:
    result['relation'] = met(('shape', 'colour'), constraints.relations)
  if constraints.background:
    result['background'] = reading.background == constraints.background
  together = met(ATTRIBUTES + ('place',), constraints.relations)
  result['all'] = together and result['count'] and result.get('background', True)
  return result


def _pair(ours: tuple[Object, ...], theirs: tuple[Object, ...]) -> dict[int, Object]:
  """{index in ours: object of theirs}: the best assignment by attributes and position."""
  cost = [[sum(getattr(a, k) != getattr(b, k) for k in ATTRIBUTES) + _distance(a, b) for b in theirs] for a in ours]
  rows, columns = optimize.linear_sum_assignment(np.reshape(cost, (len(ours), len(theirs))))
  return {int(i): theirs[j] for i, j in zip(rows, columns)}


def check_edit(reading: Reading, source: Scene, target: Scene) -> dict[str, bool]:
  """Verdict on the image of an edit.

  asked: the differences between source and target are in the image (moved and added objects in or near their new
  place, removed ones gone). kept: everything that source and target share is in the image, within NEAR of its position.
  all: both, and nothing else is there.
  """
  before_of = _pair(target.objects, source.objects)
  read_as = _pair(target.objects, reading.scene.objects)
  asked = kept = True
  for i, obj in enumerate(target.objects):
    old, new = before_of.get(i), read_as.get(i)
    changed = [k for k in ATTRIBUTES if old is None or getattr(old, k) != getattr(obj, k)]
    unchanged = [k for k in ATTRIBUTES if k not in changed]
    moved = old is None or _distance(old, obj) > 1e-3
    if new is None:
      asked &= not changed and not moved
      kept &= old is None
      continue
    arrived = ((_in_place(new, obj.place) or _distance(new, obj) <= NEAR) and
               (old is None or _distance(new, obj) < _distance(new, old)))
    asked &= _alike(new, obj, changed) and (arrived or not moved)
    kept &= _alike(new, obj, unchanged) and (moved or _distance(new, obj) <= NEAR)

  gone = [o for o in source.objects if not any(o is b for b in before_of.values())]
  extra = [o for o in reading.scene.objects if not any(o is r for r in read_as.values())]
  asked &= not any(_distance(o, e) <= NEAR for o in gone for e in extra)
  for before, after, now in ((source.background, target.background, reading.background),
                             (source.aspect, target.aspect, reading.scene.aspect)):
    if before == after:
      kept &= now == after
    else:
      asked &= now == after
  return {'asked': asked, 'kept': kept, 'all': asked and kept and not extra and not reading.rejected}
