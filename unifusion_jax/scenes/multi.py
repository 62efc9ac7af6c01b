"""Examples with two or three references: for evaluation and for the VLM's training, never for the DiT's.

References and target share one canvas shape. An object taken from a reference keeps its position unless the instruction
names a place.
"""

import dataclasses

import numpy as np

from unifusion_jax.scenes import casual, splits, words
from unifusion_jax.scenes.composition import fits, pick, place_object, random_scene, visible
from unifusion_jax.scenes.language import COUNTS
from unifusion_jax.scenes.pointing import matches, phrase, random_pointer
from unifusion_jax.scenes.world import Background, Object, PLACES, Scene

MULTI_KINDS = {2: ('insert', 'insert at', 'exchange', 'colours', 'ground'), 3: ('collage', 'insert two', 'restyle')}
WIDE_KINDS = {2: (*MULTI_KINDS[2], 'choose', 'merge'), 3: (*MULTI_KINDS[3], 'choose')}
ORDINALS = (('the first picture', 'picture one', 'picture 1', 'the first image'),
             ('the second picture', 'picture two', 'picture 2', 'the second image'),
             ('the third picture', 'picture three', 'picture 3', 'the third image'))
_INSTRUCTIONS = {
    'insert': ('put {a} into {base}', 'add {a} to {base}', 'copy {a} to the same place in {base}'),
    'insert at': ('put {a} into {base}, {place}', 'in {base}, add {a}, namely {place}',
                  'add {a} to {base}: it goes {place}'),
    'exchange': ('in {base}, replace {b} with {a}', 'draw {base} again, but with {a} in place of {b}'),
    'colours': ('the shapes of {p} in the colour of the shapes of {q}',
                'paint all shapes of {p} in the colour that those of {q} have',
                'draw {p} with its shapes in the colour of those of {q}'),
    'ground': ('put the shapes of {p} on the background of {q}', '{p} with the background of {q}',
               'give {p} the background of {q}'),
    'collage': ('{a} and {b} on the background of {r}', 'put {a} and {b} on the background of {r}, nothing else'),
    'insert two': ('put {a} and {b} into {base}', 'add both {a} and {b} to {base}'),
    'restyle': ('the shape of {p} in the colour of the shapes of {q} on the background of {r}',
                'draw the shape of {p}, coloured like the shapes of {q}, with the background of {r}')}

# For training in the wider world.
_MORE_ORDINALS = (('image 1', 'the 1st picture', 'the first image'), ('image 2', 'the 2nd picture', 'the second image'),
                  ('image 3', 'the 3rd picture', 'the third image'))
_MORE_INSTRUCTIONS = {
    'insert': ('take {a} and put it into {base}', 'paste {a} into {base}', '{base} plus {a}', 'copy {a} over to {base}',
               '{a} into {base}', 'draw {base} with {a} in it'),
    'insert at': ('{base} with {a} {place}', 'paste {a} into {base}, {place}', '{a} into {base}: {place}'),
    'exchange': ('{base}, but with {a} instead of {b}', 'in {base}, {a} in place of {b}',
                 'in {base}, swap {b} for {a}'),
    'colours': ('{p}, but coloured like the shapes of {q}', 'recolour {p}: the colour of {q}',
                'give the shapes of {p} the colour that {q} has'),
    'ground': ('{p}, background from {q}', 'use the background of {q} for {p}', '{p} on the background of {q}',
               'the shapes from {p}, the background from {q}', 'background of {q}, shapes of {p}'),
    'collage': ('only {a} and {b}, background of {r}', 'background of {r} with {a} and {b}',
                'take {a} and {b}, use the background of {r}'),
    'insert two': ('copy {a} and {b} into {base}', '{base} plus {a} and {b}', 'paste {a} and {b} into {base}'),
    'restyle': ('shape from {p}, colour from {q}, background from {r}',
                'background of {r}, shape of {p}, colour of {q}'),
    'choose': ('draw {p} again', 'just {p}', 'copy {p}', '{p}, unchanged', 'show {p}', 'I want {p}'),
    'merge': ('put all shapes of {p} into {base}', 'everything from {p} added to {base}',
              'add the shapes of {p} to {base}', 'the shapes of both pictures on the background of {base}')}


@dataclasses.dataclass(frozen=True)
class Multi:
  references: tuple[Scene, ...]
  instruction: str
  target: Scene
  kind: str


def _by_content(rng: np.random.Generator, scenes, k: int) -> str | None:
  """A name by content that fits no other image, as in 'the picture with the star'; None if there is none."""
  others = [o for m, s in enumerate(scenes) if m != k for o in s.objects]
  obj = pick(rng, scenes[k].objects)
  draw, count = rng.random(), len(scenes[k].objects)
  if draw < 0.2 and count > 1 and all(len(s.objects) != count for m, s in enumerate(scenes) if m != k):
    return f'the picture with {COUNTS[count]} shapes'
  colour = obj.colour if draw > 0.5 else None
  alike = [o for o in (*others, *scenes[k].objects) if o.shape == obj.shape and colour in (None, o.colour)]
  return f'the picture with the {f"{colour} " if colour else ""}{obj.shape}' if len(alike) == 1 else None


def _image(rng: np.random.Generator, scenes, k: int, wide: bool) -> str:
  """A name for an image: its number, or its background if that is unique; wide: or its content."""
  if wide and rng.random() < 0.35 and (named := _by_content(rng, scenes, k)):
    return named
  background = scenes[k].background
  kinds = [s.background.kind for s in scenes]
  if rng.random() < 0.35 and kinds.count(background.kind) == 1:
    if background.kind == 'checkered':
      return 'the checkered picture'
    if background.kind == 'gradient':
      return 'the picture with the gradient'
    return f'the picture with the {background.colours[0]} background'
  return pick(rng, ORDINALS[k] + _MORE_ORDINALS[k] if wide else ORDINALS[k])


def _object(rng: np.random.Generator, scenes, k: int, i: int, split: str, alone: bool, wide: bool) -> str | None:
  """A name for object i of image k; alone: perhaps without the image, if no other has a matching object."""
  pointer = random_pointer(rng, scenes[k], i, split, relations=rng.random() < 0.3)
  if not pointer:
    return None
  by_attributes = not (pointer.place or pointer.extreme or pointer.relation)
  elsewhere = any(matches(pointer, o) for m, s in enumerate(scenes) if m != k for o in s.objects)
  if alone and by_attributes and not elsewhere and rng.random() < 0.4:
    return phrase(rng, pointer)
  return f'{phrase(rng, pointer)} {pick(rng, ("of", "from"))} {_image(rng, scenes, k, wide)}'


def _one_colour(rng: np.random.Generator, scene: Scene) -> Scene:
  colour = pick(rng, scene.objects).colour
  return dataclasses.replace(scene, objects=tuple(dataclasses.replace(o, colour=colour) for o in scene.objects))


def _with_ground(scene: Scene, background: Background) -> Scene:
  return dataclasses.replace(scene, background=background)


def _added(scene: Scene, *new: Object) -> Scene | None:
  """The scene with more objects, each in a place of its own."""
  objects = scene.objects + new
  places = [o.place for o in objects]
  if len(objects) > 4 or any(places.count(o.place) > 1 for o in new) or not fits(objects, scene.aspect):
    return None
  return dataclasses.replace(scene, objects=objects)


def _propose(rng: np.random.Generator, kind: str, scenes: list[Scene], order: list[int], split: str, wide: bool):
  """(target, slots), or None if the scenes do not allow the kind; `order` gives each scene its role."""
  p, q = order[:2]
  first, second = scenes[p], scenes[q]
  i = int(rng.integers(len(first.objects)))
  obj = first.objects[i]
  slots = {'p': _image(rng, scenes, p, wide), 'q': _image(rng, scenes, q, wide),
           'base': _image(rng, scenes, order[-1], wide), 'r': _image(rng, scenes, order[-1], wide),
           # In 'the star and the ring of image 2' both would seem to be of image 2
           'a': _object(rng, scenes, p, i, split, alone=kind not in ('collage', 'insert two'), wide=wide)}
  if kind == 'insert':
    target = _added(second, obj)
  elif kind == 'insert at':
    place = pick(rng, PLACES)
    new = place_object(rng, obj.shape, obj.colour, obj.size, obj.fill, second.objects, second.aspect, place)
    target = new and _added(second, new)
    slots['place'] = pick(rng, words.PLACES[place])
  elif kind == 'exchange':
    j = int(rng.integers(len(second.objects)))
    old = second.objects[j]
    new = dataclasses.replace(obj, x=old.x, y=old.y)
    target = dataclasses.replace(second, objects=second.objects[:j] + (new,) + second.objects[j + 1:])
    pointer = random_pointer(rng, second, j, split)
    slots['b'] = pointer and phrase(rng, pointer)
  elif kind == 'colours':
    colour = second.objects[0].colour
    target = dataclasses.replace(first, objects=tuple(dataclasses.replace(o, colour=colour) for o in first.objects))
  elif kind == 'choose':
    target = first
  elif kind == 'merge':
    target = _added(second, *first.objects)
  elif kind == 'ground':
    target = _with_ground(first, second.background)
  elif kind == 'restyle':
    target = _with_ground(dataclasses.replace(
        first, objects=(dataclasses.replace(obj, colour=second.objects[0].colour),)), scenes[order[2]].background)
  else:
    third = scenes[order[2]]
    j = int(rng.integers(len(second.objects)))
    slots['b'] = _object(rng, scenes, q, j, split, alone=False, wide=wide)
    base = third if kind == 'insert two' else dataclasses.replace(third, objects=())
    target = _added(base, obj, second.objects[j])
  return target and (target, slots)


def random_multi(rng: np.random.Generator, count: int = 2, split: str = 'train', aspect: str = 'square',
                 kind: str | None = None, wide: bool = False) -> Multi:
  """An example with `count` references, of the given kind or of any kind with so many."""
  kind = kind or pick(rng, (WIDE_KINDS if wide else MULTI_KINDS)[count])
  allowed = splits.allowed(split)
  while True:
    references = [random_scene(rng, int(rng.integers(1, 4)), aspect, allowed, wide) for _ in range(count)]
    order = [int(k) for k in rng.permutation(count)]
    if kind in ('colours', 'restyle'):
      references[order[1]] = _one_colour(rng, references[order[1]])
    if kind == 'restyle' and len(references[order[0]].objects) > 1:
      references[order[0]] = dataclasses.replace(references[order[0]], objects=references[order[0]].objects[:1])
    proposal = _propose(rng, kind, references, order, split, wide)
    if not proposal:
      continue
    target, slots = proposal
    instruction = pick(rng, _INSTRUCTIONS.get(kind, ()) + _MORE_INSTRUCTIONS[kind] if wide else _INSTRUCTIONS[kind])
    if any(slots[name] is None for name in ('a', 'b') if f'{{{name}}}' in instruction):
      continue
    if ((target in references) != (kind == 'choose') or not fits(target.objects, aspect) or
        not all(visible(scene) and all(map(allowed, scene.objects)) for scene in (*references, target))):
      continue
    text = instruction.format(**slots)
    return Multi(tuple(references), casual.slips(rng, text) if wide else text, target, kind)
