"""Edits of one image: source scene, instruction, and the target scene that these two determine.

Everything that the instruction does not name stays as it was. Targets fit on their canvas, and every pointer of an
instruction is unambiguous.
"""

import dataclasses

import numpy as np

from unifusion_jax.scenes import casual, splits, words
from unifusion_jax.scenes.composition import fits, pick, place_object, random_background, visible, weighted
from unifusion_jax.scenes.constraints import Wanted
from unifusion_jax.scenes.pointing import phrase, random_pointer
from unifusion_jax.scenes.prompts import ground, thing
from unifusion_jax.scenes.world import ASPECTS, COLOURS, FILLS, PLACES, Scene, SHAPES, SIZES

EDIT_KINDS = ('recolour', 'resize', 'move', 'add', 'remove', 'replace', 'refill', 'background', 'swap', 'mirror',
              'aspect')
EDIT_WEIGHTS = (0.14, 0.09, 0.13, 0.12, 0.10, 0.12, 0.09, 0.09, 0.06, 0.03, 0.03)
TRIES = 8

# {it}: the object pointed at. The second row of each kind is for tests only; its words occur in training, in other
# templates. casual.py has the instructions of the wider world.
INSTRUCTIONS = {
    'recolour': (
        ('make {it} {colour}', 'paint {it} {colour}', 'change the colour of {it} to {colour}', 'turn {it} {colour}',
         '{it} should be {colour}', 'recolour {it}: {colour}', 'give {it} a new colour, namely {colour}',
         'please make {it} {colour}', 'I want {it} to be {colour}', '{it} becomes {colour}', 'let {it} be {colour}',
         'the colour of {it} should be {colour}', 'I would like to see {it} in {colour}', 'keep {it}, but {colour}',
         'can you make {it} {colour}?', 'I want {it} to become {colour}', 'could you paint {it} {colour}?',
         'now {it} is {colour}'),
        ('I would like {it} to be {colour}', 'let {it} become {colour}', 'the new colour of {it} is {colour}')),
    'resize': (
        ('make {it} {size}', 'change the size of {it} to {size}', '{it} should be {size}', 'resize {it} to {size}',
         'please make {it} {size}', 'draw {it} {size} instead', 'I want {it} to be {size}', '{it} becomes {size}',
         'let {it} be {size}', 'the size of {it} should be {size}', 'I would like to see {it} {size}',
         'keep {it}, but {size}', 'can you make {it} {size}?', 'give {it} a new size, namely {size}',
         'now {it} is {size}'),
        ('I would like {it} to be {size}', 'let {it} become {size}', 'the new size of {it} is {size}')),
    'move': (
        ('move {it} {to}', 'put {it} {place}', 'place {it} {place}', '{it} should be {place}',
         'please move {it} {to}', 'shift {it} {to}', 'change the position of {it}: it should be {place}',
         'I want {it} to be {place}', '{it} goes {to}', 'let {it} be {place}', 'take {it} {to}',
         'I would like to see {it} {place}', 'can you move {it} {to}?', 'could you put {it} {place}?',
         '{it} should go {to}', 'now {it} is {place}'),
        ('I would like {it} to be {place}', 'let {it} go {to}', 'take {it} and put it {place}')),
    'add': (
        ('add {new}', 'put {new} into the picture', 'draw {new} as well', 'there should also be {new}',
         'please add {new}', 'include {new}', 'add one more thing: {new}', 'I want to see {new} as well',
         'let me see {new} too', '{new} is missing', 'and {new} too', 'I would like to have {new} in the picture',
         'can you add {new}?', 'could you draw {new} too?', 'let the picture have {new} too',
         'what I want to add is {new}', 'there is {new} as well'),
        ('I would like to see {new} too', 'let there be {new} as well', 'what is missing is {new}')),
    'remove': (
        ('remove {it}', 'delete {it}', 'take away {it}', 'erase {it}', 'get rid of {it}', 'please remove {it}',
         'the same picture without {it}', 'leave out {it}', 'I want {it} to be removed', '{it} should be gone',
         '{it} should disappear', 'make {it} disappear', 'keep everything except {it}', 'draw everything but {it}',
         'draw the picture without {it}', 'I would like to see everything without {it}', 'can you remove {it}?',
         'could you take away {it}?', 'let {it} be removed', 'now {it} is gone'),
        ('I would like {it} to be gone', 'let {it} disappear', 'draw everything except {it}')),
    'replace': (
        ('replace {it} with {new}', 'turn {it} into {new}', 'change {it} into {new}', '{it} should be {new} instead',
         'swap {it} for {new}', 'please replace {it} with {new}', 'draw {new} in place of {it}',
         'I want {it} to be {new}', '{it} becomes {new}', 'let {it} be {new}', 'instead of {it} draw {new}',
         'put {new} instead of {it}', 'where {it} is there should be {new}', 'I would like {new} in place of {it}',
         'can you turn {it} into {new}?', 'I want {it} to become {new}', 'make {it} {new}', 'now {it} is {new}'),
        ('I would like {it} to be {new}', 'let {it} become {new}', 'instead of {it} there should be {new}')),
    'refill': (
        ('make {it} {fill}', 'change {it} to {fill}', '{it} should be {fill}', 'please make {it} {fill}',
         'draw {it} {fill}', 'keep {it}, but {fill}', 'I want {it} to be {fill}', '{it} becomes {fill}',
         'let {it} be {fill}', 'I would like to see {it} {fill}', 'can you make {it} {fill}?', 'turn {it} {fill}',
         'now {it} is {fill}'),
        ('I would like {it} to be {fill}', 'let {it} become {fill}')),
    'background': (
        ('put everything on {ground}', 'replace the background with {ground}', 'change the background to {ground}',
         'give the picture {ground}', 'use {ground} instead', 'the same shapes, but on {ground}',
         'the picture should have {ground}', 'please use {ground}', 'I want {ground}', 'let the picture have {ground}',
         'draw {ground} behind the shapes', 'set the shapes on {ground}', 'put it all on {ground}',
         'I would like to see this on {ground}', 'there should be {ground}', 'can you use {ground}?',
         'now there is {ground}'),
        ('I would like to have {ground}', 'let there be {ground} behind the shapes', 'set it all on {ground}')),
    'swap': (
        ('swap {it} and {other}', 'exchange {it} and {other}', 'let {it} and {other} trade places',
         'swap the places of {it} and {other}', 'please swap {it} and {other}',
         'put {it} where {other} is and {other} where {it} is', '{it} and {other} change places',
         'I want {it} and {other} to trade places', '{it} should be where {other} is, and the other way round',
         'I would like to see {it} in the place of {other}, and the other way round', 'can you swap {it} and {other}?',
         '{it} goes where {other} is, and {other} where {it} is'),
        ('I would like {it} and {other} to change places', '{it} goes to the place of {other}, and the other way '
         'round')),
    'mirror': (
        ('mirror the picture from left to right', 'flip the picture horizontally', 'flip left and right',
         'show the mirror image', 'mirror everything, left becomes right',
         'please flip the picture from left to right', 'show this in a mirror', 'I want to see the mirror image',
         'what is left should be right, and the other way round', 'I would like to see left and right flipped',
         'let the picture be flipped horizontally', 'the sides of the picture change places'),
        ('I would like to see this in a mirror', 'let left and right change sides')),
    'aspect': (
        ('make the picture {aspect}', 'change the canvas to {aspect}', 'use {a_aspect} canvas',
         'show this in {a_aspect} format', 'please make the picture {aspect}', 'the picture should be {aspect}',
         'I want this to be {aspect}', 'the canvas becomes {aspect}', 'draw {a_aspect} version of the picture',
         'let the picture be {aspect}', 'I would like to see this on {a_aspect} canvas'),
        ('I would like {a_aspect} version of this', 'let the canvas become {aspect}'))}
TURNS = {  # further templates of 'refill', by the new fill
    'solid': ('fill {it} in completely', 'fill {it} with solid colour'),
    'striped': ('give {it} stripes', 'fill {it} with stripes'),
    'outlined': ('leave only the outline of {it}', 'draw only the outline of {it}')}
CANVASES = {'square': ('square',), 'wide': ('wide', 'landscape'), 'tall': ('tall', 'portrait')}


@dataclasses.dataclass(frozen=True)
class Edit:
  kind: str
  source: Scene
  instruction: str
  target: Scene


def _with(scene: Scene, i: int, **changes) -> Scene:
  changed = dataclasses.replace(scene.objects[i], **changes)
  return dataclasses.replace(scene, objects=scene.objects[:i] + (changed,) + scene.objects[i + 1:])


def _other(rng: np.random.Generator, options, old: str) -> str:
  return pick(rng, [o for o in options if o != old])


def _free_place(rng: np.random.Generator, scene: Scene) -> str | None:
  """A place without objects, so that the caption's order is determined."""
  free = [p for p in PLACES if all(o.place != p for o in scene.objects)]
  return pick(rng, free) if free else None


def _to(place_phrase: str) -> str:
  """'at the top left' -> 'to the top left'; 'halfway down the left side' -> 'to halfway down the left side'."""
  first, _, rest = place_phrase.partition(' ')
  return f'to {rest}' if first in ('at', 'in') else f'to {place_phrase}'


def _colour_words(rng: np.random.Generator, colour: str) -> str:
  """The colour by name, or at times by a thing of that colour."""
  if rng.random() < 0.15:
    return f'the colour of {pick(rng, words.COLOUR_FACTS[colour])}'
  return pick(rng, words.COLOURS[colour])


def _size_words(rng: np.random.Generator, old: str, new: str) -> str:
  if old == 'medium' and rng.random() < 0.4:
    return 'bigger' if new == 'large' else 'smaller'
  return pick(rng, words.SIZES[new])


def _shape_words(rng: np.random.Generator, shape: str, colour: str | None) -> str:
  kind = 'shape fact' if rng.random() < 0.15 else 'paraphrase'
  return thing(rng, Wanted(shape, colour), kind=kind, first=True, commas=False)


def _whole(rng: np.random.Generator, kind: str, source: Scene, aspect: str | None, wide: bool):
  """A change of the whole image: (target, slots)."""
  if kind == 'background':
    new = random_background(rng, wide)
    return dataclasses.replace(source, background=new), {'ground': ground(rng, new)}
  if kind == 'mirror':
    flipped = tuple(dataclasses.replace(o, x=round(1 - o.x, 4)) for o in source.objects)
    return dataclasses.replace(source, objects=flipped), {}
  aspect = aspect or _other(rng, tuple(ASPECTS), source.aspect)
  canvas = pick(rng, CANVASES[aspect])
  return dataclasses.replace(source, aspect=aspect), {'aspect': canvas, 'a_aspect': words.article(canvas)}


def _addition(rng: np.random.Generator, source: Scene, split: str, shape: str | None):
  """One more object in a free place: (target, slots), or None if there is none."""
  place = _free_place(rng, source)
  shapes = [shape] if shape else [s for s in SHAPES if splits.edit_allowed(split)('add', s)]
  attributes = (pick(rng, shapes), pick(rng, tuple(COLOURS)), pick(rng, tuple(SIZES)), pick(rng, FILLS))
  new = len(source.objects) < 4 and place and place_object(rng, *attributes, source.objects, source.aspect, place)
  if not new:
    return None
  kind = 'paraphrase' if rng.random() < 0.8 else pick(rng, ('colour fact', 'shape fact', 'both facts'))
  wanted = Wanted(*attributes, place)
  slots = {'new': thing(rng, wanted, kind=kind, first=True), 'addition': wanted}
  return dataclasses.replace(source, objects=source.objects + (new,)), slots


def _change(rng: np.random.Generator, kind: str, source: Scene, i: int, split: str):
  """A change of object i, or of it and another one: (target, slots), or None if it is impossible."""
  obj = source.objects[i]
  if kind == 'recolour':
    colour = _other(rng, tuple(COLOURS), obj.colour)
    return _with(source, i, colour=colour), {'colour': _colour_words(rng, colour)}
  if kind == 'resize':
    size = _other(rng, tuple(SIZES), obj.size)
    return _with(source, i, size=size), {'size': _size_words(rng, obj.size, size)}
  if kind == 'refill':
    fill = _other(rng, FILLS, obj.fill)
    return _with(source, i, fill=fill), {'fill': pick(rng, words.FILLS_BEFORE[fill]), 'new fill': fill}
  if kind == 'replace':
    shape = _other(rng, SHAPES, obj.shape)
    colour = _other(rng, tuple(COLOURS), obj.colour) if rng.random() < 0.3 else None
    target = _with(source, i, shape=shape, colour=colour or obj.colour)
    return target, {'new': _shape_words(rng, shape, colour), 'addition': Wanted(shape, colour)}
  if kind == 'move':
    place = _free_place(rng, source)
    others = source.objects[:i] + source.objects[i + 1:]
    new = place and place_object(rng, obj.shape, obj.colour, obj.size, obj.fill, others, source.aspect, place)
    words_of_place = place and pick(rng, words.PLACES[place])
    slots = new and {'place': words_of_place, 'to': _to(words_of_place)}
    return (_with(source, i, x=new.x, y=new.y), slots) if new else None
  if len(source.objects) < 2:
    return None
  if kind == 'remove':
    return dataclasses.replace(source, objects=source.objects[:i] + source.objects[i + 1:]), {}
  j = pick(rng, [j for j in range(len(source.objects)) if j != i])
  other = source.objects[j]
  alike = dataclasses.replace(obj, x=other.x, y=other.y) == other
  if alike or other.place == obj.place or not splits.edit_allowed(split)('swap', other.shape):
    return None
  pointer = random_pointer(rng, source, j, split, relations=False)
  if not pointer:
    return None
  swapped = _with(_with(source, i, x=other.x, y=other.y), j, x=obj.x, y=obj.y)
  return swapped, {'other': phrase(rng, pointer), 'second': pointer}


def _propose(rng: np.random.Generator, kind: str, source: Scene, split: str, style: str, shape: str | None,
             aspect: str | None, wide: bool) -> Edit | None:
  pointer = None
  if kind == 'add':
    proposal = _addition(rng, source, split, shape)
  elif kind in ('background', 'mirror', 'aspect'):
    proposal = _whole(rng, kind, source, aspect, wide)
  else:
    able = [i for i, o in enumerate(source.objects)
            if splits.edit_allowed(split)(kind, o.shape) and shape in (None, o.shape)]
    i = pick(rng, able) if able else None
    proposal = _change(rng, kind, source, i, split) if able else None
    # 'Swap the star left of the ring and the heart' is ambiguous.
    pointer = proposal and random_pointer(rng, source, i, split, relations=kind != 'swap')
    if not pointer:
      return None
    proposal[1]['it'] = phrase(rng, pointer)
  if not proposal:
    return None
  target, slots = proposal
  if (target == source or not all(map(splits.allowed(split), target.objects)) or
      not fits(target.objects, target.aspect) or not visible(target)):
    return None
  if style == 'casual':
    return Edit(kind, source, _casual(rng, kind, source, target, slots, pointer), target)
  templates = INSTRUCTIONS[kind][int(style == 'heldout')]
  if kind == 'refill' and style != 'heldout' and rng.random() < 0.35:
    templates = TURNS[slots['new fill']]
  if kind == 'move' and pointer and (pointer.place or pointer.relation):
    # In 'put the star above the ring ...' the relation would sound like the destination.
    templates = [t for t in templates if '{it} {place}' not in t]
  instruction = pick(rng, templates).format(**slots)
  if rng.random() < 0.25:
    instruction = instruction[0].upper() + instruction[1:] + ('' if instruction.endswith('?') else '.')
  return Edit(kind, source, instruction, target)


def _casual(rng: np.random.Generator, kind: str, source: Scene, target: Scene, slots: dict, pointer) -> str:
  values = {**slots, 'it': pointer}
  if kind in ('add', 'replace'):
    values['new'] = slots['addition']
  elif kind == 'swap':
    values['other'] = slots['second']
  elif kind == 'background':
    values['ground'] = target.background
  elif kind == 'aspect':
    values['aspect'] = pick(rng, casual.CANVASES[target.aspect])
  return casual.slips(rng, casual.instruction(rng, kind, values, alone=len(source.objects) == 1))


def random_edit(rng: np.random.Generator, source: Scene, kind: str | None = None, style: str = 'paraphrase',
                split: str = 'train', shape: str | None = None, aspect: str | None = None,
                wide: bool = False) -> Edit | None:
  """A random edit of the source, or None after TRIES failed tries.

  split: its objects, relations and pairs of edit and shape may occur. shape: of the object to edit (or to add).
  aspect: the new canvas of an 'aspect' edit. style: 'paraphrase', 'heldout' (instructions for tests only) or 'casual'.
  wide: new backgrounds may be of any colour.
  """
  kind = kind or weighted(rng, EDIT_KINDS, EDIT_WEIGHTS)
  for _ in range(TRIES):
    if edit := _propose(rng, kind, source, split, style, shape, aspect, wide):
      return edit
  return None
