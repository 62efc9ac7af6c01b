"""The judge: it reads an image back into a scene by analysis through synthesis, with no neural network, and scores it.

The background is the best of all that can be drawn: of the six colours, or of all (`wide`). What differs from it falls
into connected pieces; each piece is compared with every shape, size and fill in every colour, laid with its centre of
mass on the piece's, and takes the one that leaves the least squared difference. Images are read at 64 px whatever their
size.
"""

from collections.abc import Iterator
import dataclasses
import functools
import itertools
import math

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
# Blur costs thin lines the most. Of 2000 drawn objects none scores below 0.93; with noise of 6 levels and a blur of 0.6
# pixels 1 in 2000 scores below these. So do 94 to 98 in 100 halves of objects, random blobs, ellipses and polygons.
MATCH = {'solid': 0.92, 'striped': 0.88, 'outlined': 0.84}
FOREGROUND = 28.0  # RGB distance from the background at which a pixel is foreground
CONTRAST = 0.3  # and the share of the largest distance nearby, which parts objects whose blurred edges touch
SPECK = 12  # pixels; smaller pieces are overlooked
BACKGROUND_ERROR = 25.0  # largest root mean square RGB distance at which a background counts as itself
SMOOTH = 0.5  # pixels; blur that keeps noise from being foreground
BLUR = 1.0  # pixels; of both sides of a comparison, so that a little more or less blur in the image matters less
PLACE_SLACK = 0.03  # fraction of the canvas by which a centre may lie beyond the border of its place
NEAR = 0.1  # fraction of the canvas within which an object counts as still being where it was
WINDOW = 42  # pixels; room for a large object around its centre of mass
LIKELY_COLOURS, FINALISTS = 4, 6

TEMPLATES = tuple(itertools.product(world.SHAPES, world.SIZES, world.FILLS))
ATTRIBUTES = ('shape', 'colour', 'size', 'fill')
COLOURS = np.array(list(world.COLOURS.values()), np.float32)


@functools.cache
def backgrounds(wide: bool = False) -> tuple[Background, ...]:
  """All backgrounds that are looked for."""
  names = world.WIDE_BACKGROUND_COLOURS if wide else world.BACKGROUND_COLOURS
  return tuple([Background('plain', (name,)) for name in names] +
               [Background(kind, pair) for kind in ('gradient', 'checkered')
                for pair in itertools.permutations(names, 2)])


@dataclasses.dataclass(frozen=True)
class Reading:
  scene: Scene  # objects in reading order
  scores: tuple[float, ...]  # the share each object's template explains, in the order of scene.objects
  rejected: int  # pieces that resemble no object
  background_error: float  # root mean square RGB distance of the pixels without objects

  @property
  def background(self) -> Background | None:
    """The background, or None if the image's resembles none."""
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
  """Blurred coverages with their centre of mass in the window's middle, and where their own centre lies.

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
  """The checkerboard with the blends of its two colours that a blurred image has along the edges, f32 [y x 3]."""
  low, high = (f(ground, (3, 3, 1)) for f in (ndimage.minimum_filter, ndimage.maximum_filter))
  one, two = ground, low + high - ground
  step = two - one
  t = ((image - one) * step).sum(-1) / np.maximum((step ** 2).sum(-1), 1)
  blend = one + np.clip(t, 0, 1)[..., None] * step
  blended = ((image - blend) ** 2).sum(-1) < FOREGROUND ** 2
  return np.where(blended[..., None], blend, ground)


def _pieces(distance: np.ndarray) -> tuple[np.ndarray, int]:
  """Parts the foreground into pieces: labels i32 [y x], 0 for background, and how many there are."""
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
  reach, nearest = ndimage.distance_transform_edt(labels == 0, return_indices=True)
  return np.where(reach <= 2.5, labels[tuple(nearest)], 0), len(kept)


def _left_over(difference: np.ndarray, ground: np.ndarray, obj: Object) -> float:
  """Squared difference that the object leaves, when its own is blurred like the piece's."""
  height, width = ground.shape[:2]
  drawn = ground.copy()
  render.paint(drawn, *render.placed(obj, width, height), np.array(world.COLOURS[obj.colour], np.float32))
  return float(((difference - _blur(drawn - ground, BLUR, (0, 1))) ** 2).sum())


def _match(difference: np.ndarray, ground: np.ndarray, side: float, harsh: bool) -> tuple[float, Object, float, float]:
  """The object that best explains a piece's difference from the background, both f32 [y x 3].

  Blurred coverage times contrast stands for the blurred product of the two, which is so where the background is smooth
  or its two colours are alike. On a `harsh` one the finalists are compared by the product itself.

  Returns the explained share of the squared difference, the object without its place, and its centre in pixels.
  """
  difference = _blur(difference, BLUR, (0, 1))
  # If the piece has a colour, its coverage is its difference's part along that colour's contrast to the background.
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

  remains, *chosen = best
  obj = placed(*chosen)
  if harsh:
    finalists = [obj, *(placed(t, k, *starts[k]) for _, t, k in sorted(candidates)[:FINALISTS])]
    remains, which = min((_left_over(difference, ground, at_canvas(o)), i) for i, o in enumerate(finalists))
    obj = finalists[which]
  return float(1 - remains / max(total, 1e-6)), dataclasses.replace(obj, x=0, y=0), obj.x, obj.y


def read(image: np.ndarray, wide: bool = False) -> Reading:
  """Reads an image, uint8 [y x 3] of any size; its proportions tell the aspect. wide: on a background of any colour."""
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
    raise UserError(f'The judge reads images as uint8 [y x 3] and got {image.dtype} {list(image.shape)}; '
                     'convert the image to 8-bit RGB first.')
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

  found = []
  harsh = wide and background.kind == 'checkered'
  for i in range(1, count + 1):
    piece = np.where((labels == i)[..., None], difference, 0)
    score, obj, x, y = _match(piece, ground, (width * height) ** 0.5, harsh)
    if score >= MATCH[obj.fill]:
      x, y = (round(min(max(v, 0), n) / n, 4) for v, n in ((x, width), (y, height)))
      found.append((dataclasses.replace(obj, x=x, y=y), score))
  order = Scene(tuple(o for o, _ in found), background, aspect).in_reading_order()
  scores = dict(found)
  return Reading(Scene(order, background, aspect), tuple(scores[o] for o in order), count - len(found), error)


def _distance(a: Object, b: Object) -> float:
  return math.hypot(a.x - b.x, a.y - b.y)


def _alike(a: Object, b: Object, attributes=ATTRIBUTES) -> bool:
  return all(getattr(a, k) == getattr(b, k) for k in attributes)


def _in_place(obj: Object, place: str) -> bool:
  """Whether the centre lies in the place or hardly beyond its border."""
  row, column = divmod(world.PLACES.index(place), 3)
  return all(i / 3 - PLACE_SLACK <= v <= (i + 1) / 3 + PLACE_SLACK for v, i in ((obj.x, column), (obj.y, row)))


def _assignments(fitting: list[list[int]], taken: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
  """All ways to choose one of each list's numbers without choosing any number twice."""
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
  """Which of the demands the image meets, as GenEval asks them; only the kinds that are demanded, and 'all'.

  object: the shapes are there. count: no more and no fewer objects (or at least as many, if the count is not exact).
  colour, size, fill, place: the shapes are there and each has it. relation: it holds between objects of the demanded
  shapes and colours. background. all: one choice of objects meets every demand at once.
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
  """For each of our objects (by number) the one of theirs it is, by attributes and position; as many as can be."""
  cost = [[sum(getattr(a, k) != getattr(b, k) for k in ATTRIBUTES) + _distance(a, b) for b in theirs] for a in ours]
  rows, columns = optimize.linear_sum_assignment(np.reshape(cost, (len(ours), len(theirs))))
  return {int(i): theirs[j] for i, j in zip(rows, columns)}


def check_edit(reading: Reading, source: Scene, target: Scene) -> dict[str, bool]:
  """Judges the image of an edit by what source and target differ in and what they share.

  asked: what differs is in the image as in the target (moved and added objects in or near their new place, removed
  ones gone). kept: the rest is as it was, within NEAR of its position. all: both, and nothing else is there.
  """
  was = _pair(target.objects, source.objects)
  found = _pair(target.objects, reading.scene.objects)
  asked = kept = True
  for i, obj in enumerate(target.objects):
    old, new = was.get(i), found.get(i)
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

  gone = [o for o in source.objects if not any(o is w for w in was.values())]
  extra = [o for o in reading.scene.objects if not any(o is f for f in found.values())]
  asked &= not any(_distance(o, e) <= NEAR for o in gone for e in extra)
  for before, after, now in ((source.background, target.background, reading.background),
                             (source.aspect, target.aspect, reading.scene.aspect)):
    if before == after:
      kept &= now == after
    else:
      asked &= now == after
  return {'asked': asked, 'kept': kept, 'all': asked and kept and not extra and not reading.rejected}
