"""Casual requests: prompts and instructions as people type them, for training in the wider world.

No articles, commas in place of verbs, coordination ('one red and one blue star'), pronouns ('a blue one'), counts ('two
yellow circles with a star between them'), size, place or background first, other spellings, a slip now and then.
A prompt has exactly its constraints, and no wording is ambiguous: 'a small red star and a blue one' would leave the
size of the second open, so a 'one' has the same attributes as the noun before it.

examples.py skips the requests of scenes/evaluation/handwritten.py.
"""

import dataclasses
import functools
import re
from typing import Any

import numpy as np

from unifusion_jax.scenes import splits, words
from unifusion_jax.scenes.composition import fits, pick, place_object, visible, weighted
from unifusion_jax.scenes.constraints import Constraints, PAIRWISE, Wanted
from unifusion_jax.scenes.language import (
  clear_relations,
  clearly,
  constraints_of,
  grouped,
  in_canonical_order,
)
from unifusion_jax.scenes.pointing import Pointer
from unifusion_jax.scenes.world import Background, Object, Scene

_SPOKEN = {
    'size': {k: 2 * v + words.MORE_SIZES[k] for k, v in words.SIZES.items()},
    'fill': {k: 2 * v + words.MORE_FILLS[k] for k, v in words.FILLS_BEFORE.items()},
    'colour': {k: 3 * v + words.MORE_COLOURS.get(k, ()) for k, v in words.COLOURS.items()},
    'shape': {k: 2 * v[:1] + v + words.MORE_SHAPES.get(k, ()) for k, v in words.SHAPES.items()},
    'place': {k: v + 2 * words.MORE_PLACES[k] for k, v in words.PLACES.items()}}
ATTRIBUTES = ('size', 'fill', 'colour')
NUMBERS = {2: ('two', '2', 'a couple of'), 3: ('three', '3'), 4: ('four', '4')}
FRAMES = (*['{}'] * 12, 'draw {}', 'picture of {}', 'just {}', 'only {}', '{} please', '{} pls', 'can i have {}',
          'i want {}', 'show {}', 'image: {}', 'give me {}', 'a drawing of {}', 'paint {}', "let's have {}")
# Sides of two related objects, first and second, and templates.
SIDES = {'left of': ('left', 'right'), 'right of': ('right', 'left'),
         'above': ('top', 'bottom'), 'below': ('bottom', 'top')}
BESIDE = ('{a} {one}, {b} {two}', '{one} {a}, {two} {b}', '{one}: {a}, {two}: {b}',
          '{a} on the {one}, {b} on the {two}', 'on the {one} {a}, on the {two} {b}',
          '{a} on the {one} and {b} on the {two}', 'on the {one}: {a}; {two}: {b}',
          '{a} on the {one} side, {b} on the {two} side', '{one} side {a}, {two} side {b}', '{a} ({one}), {b} ({two})')
OVER = ('{one}: {a}, {two}: {b}', '{a} at the {one}, {b} at the {two}', 'at the {one} {a}, at the {two} {b}',
        '{a} at the {one} and {b} at the {two}', 'at the {one}: {a}; {two}: {b}', '{a} ({one}), {b} ({two})')
RELATIVE = {
    'left of': ('to its left', 'on its left', 'left of it'),
    'right of': ('to its right', 'on its right', 'right of it'),
    'above': ('above it', 'over it', 'higher up'), 'below': ('below it', 'under it', 'underneath')}
PRECEDED = ('{b} with {a} {it}', '{b}, {it} {a}', '{b} and {a} {it}', '{b} and {it} {a}', '{rel} {b}: {a}',
            '{rel} {b} {a}', '{b}, and {it} {a}', '{rel} {b} is {a}', '{b}. {it}: {a}')
MIDDLE_ALIKE = (
    '{m} between two {ends}', 'two {ends} with {m} between them', 'two {ends} and {m} in between',
    'between two {ends} {m}', 'between two {ends}: {m}', '{m} in between two {ends}', '{m}, between two {ends}',
    '2 {ends}, {m} between them', 'two {ends}, between them {m}', '{m} with {end} on each side',
    'two {ends} and between them {m}')
MIDDLE = ('{m} between {b} and {c}', 'between {b} and {c}: {m}', 'between {b} and {c} {m}',
          '{b} and {c} with {m} between them', '{b} and {c}, {m} in between', '{b}, {c}, and between them {m}',
          '{b} and {c} and {m} between the two')
# Places of two objects that leave room between them.
ENDS = (('middle left', 'middle right'), ('top left', 'bottom right'), ('bottom left', 'top right'),
        ('top center', 'bottom center'), ('top left', 'top right'), ('bottom left', 'bottom right'),
        ('top left', 'bottom left'), ('top right', 'bottom right'))
COORDINATED = {
    2: ('one {x} and one {y} {noun}', 'a {x} and a {y} {noun}', 'one {x} {noun} and one {y} one',
        'a {x} {noun} and a {y} one', '{x} {noun} and {y} one', 'two {nouns}, one {x} and one {y}',
        'two {nouns}, one {x}, the other {y}', 'two {nouns}: one {x}, one {y}', 'two {nouns}: a {x} one and a {y} one',
        'a {x} {noun}, a {y} one', '{x} {noun}, {y} {noun}', '2 {nouns}, one {x} one {y}', 'one {x} {noun}, one {y}',
        'a {x} one and a {y} one, both {nouns}', 'two {nouns}, the first {x}, the second {y}',
        '{nouns}: one {x} and one {y}', 'one {noun} {x}, one {y}'),
    3: ('three {nouns}: one {x}, one {y}, one {z}', 'one {x}, one {y} and one {z} {noun}',
        'a {x}, a {y} and a {z} {noun}', '3 {nouns}, one {x}, one {y} and one {z}',
        'a {x} {noun}, a {y} one and a {z} one', '{x} {noun}, {y} {noun}, {z} {noun}')}
SHARED = ('{list}, {all} {x}', '{all} {x}: {list}', 'only {x} shapes: {list}', '{list} ({all} {x})',
          '{x} shapes: {list}', 'everything {x}: {list}')
GROUND_LAST = ('{things} on {g}', '{things}, {g}', '{things}, on {g}', '{things}. background: {b}', '{things} ({g})',
               '{things} with {g}', '{things}, background {b}', '{things}; {g}')
GROUND_FIRST = ('on {g}, {things}', '{g}: {things}', '{g}, {things}', 'background {b}, {things}',
                'background: {b}. {things}', '{g} with {things}', 'on {g}: {things}')
# Backgrounds with and without the word 'background'; the bare ones follow 'on' or 'background'.
GROUNDS = {
    'plain': ('a {0} background', '{0} background', 'a plain {0} background', '{0} backdrop'),
    'gradient': ('a gradient from {0} to {1}', '{0} to {1} gradient', 'a background going from {0} to {1}',
                 'background fading from {0} to {1}'),
    'checkered': ('a {0} and {1} checkerboard', '{0} and {1} checkered background', 'a {0}/{1} checkered background',
                  'checkerboard of {0} and {1}')}
BARE = {'plain': ('{0}', 'plain {0}'), 'gradient': ('{0} fading to {1}', 'gradient from {0} to {1}'),
        'checkered': ('{0} and {1} checkered', 'checkered {0} and {1}')}

# {it}: the object pointed at.
INSTRUCTIONS = {
    'recolour': ('make {it} {colour}', '{it} {colour}', '{it}: {colour}', '{it} in {colour} please',
                 'recolour {it} {colour}', 'colour {it} {colour}', 'change {it} to {colour}', '{it} to {colour}',
                 'can {it} be {colour}?', 'paint {it} {colour}', '{colour} for {it}', "{it}'s colour: {colour}",
                 'turn {it} {colour}'),
    'resize': ('make {it} {size}', '{it}: {size}', '{it} {size} please', '{it} should get {size}',
               'can {it} be {size}?', 'size of {it}: {size}', '{it} to {size}', '{size} please: {it}',
               'change {it} to {size}'),
    'move': ('move {it} {to}', '{it} {to}', 'put {it} {place}', '{it}: {to}', 'shift {it} {to}', 'drag {it} {to}',
             'could {it} go {to}?', 'bring {it} {to}', 'new place of {it}: {place}'),
    'add': ('add {new}', 'plus {new}', 'also {new}', 'and {new}', '{new} too', 'add {new} please', 'draw {new} too',
            'put in {new}', 'one more: {new}', 'additionally {new}', 'throw in {new}', '+ {new}'),
    'remove': ('remove {it}', 'delete {it}', 'no {bare}', 'without {it}', 'drop {it}', 'erase {it} please', 'lose {it}',
               '{it} away', 'take out {it}', 'get rid of {it}', '{it} has to go', 'clear {it} away', 'minus {it}'),
    'replace': ('replace {it} with {new}', '{new} instead of {it}', 'swap {it} for {new}', 'turn {it} into {new}',
                '{it} to {new}', 'make {it} into {new}', '{it} -> {new}', '{new} where {it} is',
                '{new} in place of {it}', 'change {it} to {new}', 'exchange {it} for {new}'),
    'refill': ('make {it} {fill}', '{it} {fill}', '{it}: {fill}', 'can {it} be {fill}?', 'change {it} to {fill}',
               '{it} {fill} please', '{it} should look {fill}', 'draw {it} {fill}'),
    'background': ('{ground}', '{ground} please', 'make the background {bare ground}', 'background: {bare ground}',
                   'background to {bare ground}', 'change background to {bare ground}', 'put it on {ground}',
                   'on {ground}', 'everything on {ground}', 'new background: {bare ground}', 'use {ground}',
                   'same but on {ground}', 'background {bare ground}', 'with {ground}'),
    'swap': ('swap {it} and {other}', 'switch {it} and {other}', '{it} and {other} switch places',
             'exchange {it} with {other}', '{it} where {other} is and the other way round', 'swap {it} with {other}',
             'trade places: {it} and {other}'),
    'mirror': ('mirror it', 'flip it', 'mirrored', 'flip horizontally', 'mirror image please', 'flip left right',
               'mirror this', 'swap left and right', 'flipped horizontally please', 'mirror left to right'),
    'aspect': ('{aspect}', '{aspect} format', 'as {aspect}', '{aspect} please', 'make the canvas {aspect}',
               'canvas: {aspect}', '{aspect} picture', 'change format to {aspect}', 'in {aspect} format please',
               '{aspect} canvas')}
TURNS = {'solid': ('fill in {it}', 'fill {it}', 'colour in {it}'),
         'striped': ('stripes on {it}', 'add stripes to {it}', 'put stripes on {it}'),
         'outlined': ('only the outline of {it}', 'just the outline of {it}', 'make {it} an outline')}
GROW = {'bigger': ('enlarge {it}', 'grow {it}', '{it} up a size'), 'smaller': ('shrink {it}', '{it} down a size')}
CANVASES = {'square': ('square',), 'wide': ('landscape', 'widescreen'), 'tall': ('portrait', 'upright')}
TYPOS, CAPITALS = 0.05, 0.04  # share of texts with a misspelt word, and of short ones all in capitals
SHORT = 32  # letters at most


def _word(rng: np.random.Generator, name: str, value: str) -> str:
  return pick(rng, _SPOKEN[name][value])


def _noun(rng: np.random.Generator, wanted, count: int = 1) -> str:
  noun = _word(rng, 'shape', wanted.shape) if wanted.shape else 'shape'
  return noun if count == 1 else words.plural(noun)


def _thing(rng: np.random.Generator, wanted: Wanted, count: int = 1, article: str = 'a', commas: bool = False,
           noun: str | None = None) -> str:
  """A noun phrase for `count` such objects; article: 'a', 'one' or ''. commas: adjectives and place may have some."""
  noun = noun or _noun(rng, wanted, count)
  given = [name for name in ATTRIBUTES if getattr(wanted, name)]
  before, after = given, []
  draw = rng.random()
  if draw < 0.25 and len(given) > 1:
    before = [given[k] for k in rng.permutation(len(given))]
  elif draw < 0.37 and given:
    last = pick(rng, given)
    before, after = [name for name in given if name != last], [last]
  adjectives = [_word(rng, name, getattr(wanted, name)) for name in before]
  comma = commas and len(before) > 1 and rng.random() < 0.2
  text = ' '.join([*[(', ' if comma else ' ').join(adjectives)] * bool(before), noun])
  for name in after:
    value = getattr(wanted, name)
    if name == 'colour':
      text += f' in {pick(rng, words.COLOURS[value])}'
    elif name == 'fill' and rng.random() < 0.6:
      text += f' {pick(rng, words.FILLS_AFTER[value])}'
    else:
      text += f' ({_word(rng, name, value)})'
  if count > 1:
    text = f'{pick(rng, NUMBERS[count])} {text}'
  elif article:
    text = words.article(text) if article == 'a' else f'one {text}'
  if not wanted.place:
    return text
  place = _word(rng, 'place', wanted.place)
  draw = rng.random()
  if draw < 0.25:
    return f'{place} {text}' if place.startswith(('at', 'in', 'on', 'half')) or article else f'{place}: {text}'
  return f'{text}, {place}' if commas and draw < 0.4 else f'{text} {place}'


def _article(rng: np.random.Generator) -> str:
  return weighted(rng, ('', 'a', 'one'), (0.5, 0.38, 0.12))


def _wanted(obj: Object, attributes: tuple[str, ...]) -> Wanted:
  return Wanted(obj.shape, **{name: getattr(obj, name) for name in attributes})


def _named_attributes(rng: np.random.Generator) -> tuple[str, ...]:
  """The attributes to name, the same for every object."""
  size, fill, colour = rng.random(3)
  return tuple(name for name, draw, share in (('size', size, 0.3), ('fill', fill, 0.25), ('colour', colour, 0.88))
               if draw < share)


@dataclasses.dataclass(frozen=True)
class Phrasing:
  """A casual prompt, its constraints, and the scene that meets them."""
  scene: Scene
  text: str
  objects: tuple[Wanted, ...]
  relations: tuple[tuple, ...] = ()


def _with_rest(rng: np.random.Generator, phrasing: Phrasing, others) -> Phrasing:
  """The phrasing with the rest of the scene's objects named after it."""
  article, attributes, text = pick(rng, ('a', 'one')), _named_attributes(rng), phrasing.text
  more = [_wanted(o, attributes) for o in others]
  for wanted in more:
    text += pick(rng, ('; ', '; also ', '; and ')) + _thing(rng, wanted, article=article)
  return dataclasses.replace(phrasing, text=text, objects=phrasing.objects + tuple(more))


def _listed(rng: np.random.Generator, scene: Scene) -> Phrasing:
  """Any description, as a list of its things."""
  constraints = in_canonical_order(constraints_of(scene, rng, full=0.15, relation=0.2,
                                                  relation_allowed=splits.relation_allowed('train')))
  if rng.random() < 0.12:  # no colours
    constraints = dataclasses.replace(constraints, objects=tuple(
        sorted((dataclasses.replace(w, colour=None) for w in constraints.objects), key=str))) \
        if not constraints.relations and not all(w.place for w in constraints.objects) else constraints
  groups = grouped(constraints)
  places = [w.place for w in constraints.objects]
  if all(places) and len(set(places)) == len(groups) and not constraints.relations and rng.random() < 0.5:
    groups = [groups[k] for k in rng.permutation(len(groups))]
  article = _article(rng)
  joints = {}
  for _, relation, *others in constraints.relations:
    joints.update(zip(others, (f' {pick(rng, words.RELATIONS[relation])} ', ' and ')))
  things, at = [], 0
  for wanted, count in groups:
    text = _thing(rng, wanted, count, article, commas=len(groups) == 1)
    if at in joints:
      things[-1] += joints[at] + text
    else:
      things.append(text)
    at += count
  if len(constraints.objects) == 1 and rng.random() < 0.15:  # tags
    wanted, = constraints.objects
    tags = [_word(rng, name, getattr(wanted, name)) for name in ATTRIBUTES if getattr(wanted, name)]
    tags.insert(int(rng.integers(len(tags) + 1)), _noun(rng, wanted))
    things = [pick(rng, (', ', ' | ', '. ')).join(tags + ([_word(rng, 'place', wanted.place)] if wanted.place else []))]
  named = [[name for name in ATTRIBUTES if getattr(w, name)] for w, _ in groups]
  alike = all(names == named[0] for names in named) and not any(places) and not constraints.relations
  if constraints.relations:
    text = pick(rng, ('; ', '; also ')).join(things)
  elif alike and rng.random() < 0.6:
    text = pick(rng, (' and ', ' & ')).join([', '.join(things[:-1]), things[-1]] if len(things) > 1 else things)
  else:
    text = pick(rng, (', ', ', ', '; ', ' + ')).join(things)
  return Phrasing(scene, text, constraints.objects, constraints.relations)


def _with(scene: Scene, changes: dict[int, dict]) -> Scene:
  return dataclasses.replace(scene, objects=tuple(
      dataclasses.replace(o, **changes.get(k, {})) for k, o in enumerate(scene.objects)))


def _pair(rng: np.random.Generator, scene: Scene):
  """(i, relation, j) of two objects in a clear relation, or None."""
  if len(scene.objects) < 2:
    return None
  i, j = (int(k) for k in rng.permutation(len(scene.objects))[:2])
  options = clear_relations(scene.objects[i], scene.objects[j])
  return (i, pick(rng, options), j) if options else None


def _one(rng: np.random.Generator, wanted: Wanted) -> str:
  """'a blue one' after 'a red star': the same attributes, with other values."""
  adjectives = [_word(rng, name, getattr(wanted, name)) for name in ATTRIBUTES if getattr(wanted, name)]
  return words.article(' '.join([*adjectives, 'one']))


def _two(rng: np.random.Generator, scene: Scene, i: int, j: int) -> tuple[Scene, Wanted, Wanted, str, str]:
  """(scene, first, second, their phrases) for two objects, the second perhaps as 'one'."""
  attributes = _named_attributes(rng)
  first, second = scene.objects[i], scene.objects[j]
  pronoun = (bool(attributes) and rng.random() < 0.35 and
             all(getattr(first, name) != getattr(second, name) for name in attributes))
  if pronoun or rng.random() < 0.15:
    scene = _with(scene, {j: {'shape': first.shape}})
    second = scene.objects[j]
  a, b = _wanted(first, attributes), _wanted(second, attributes)
  article = _article(rng)
  phrase = _thing(rng, a, article=article)
  return scene, a, b, phrase, _one(rng, b) if pronoun else _thing(rng, b, article=article)


def _others(scene: Scene, *taken: int) -> list[Object]:
  return [o for k, o in enumerate(scene.objects) if k not in taken]


def _sided(rng: np.random.Generator, scene: Scene) -> Phrasing | None:
  """'red circle left, blue circle right': the first is left of the second."""
  pair = _pair(rng, scene)
  if not pair:
    return None
  i, relation, j = pair
  scene, a, b, first, second = _two(rng, scene, i, j)
  one, two = SIDES[relation]
  template = pick(rng, BESIDE if relation in PAIRWISE[:2] else OVER)
  text = template.format(a=first, b=second, one=one, two=two)
  return _with_rest(rng, Phrasing(scene, text, (a, b), ((0, relation, 1),)), _others(scene, i, j))


def _preceded(rng: np.random.Generator, scene: Scene) -> Phrasing | None:
  """'a star, to its left a heart': the second is in the relation to the first."""
  pair = _pair(rng, scene)
  if not pair:
    return None
  i, relation, j = pair
  scene, b, a, second, first = _two(rng, scene, j, i)
  template = pick(rng, PRECEDED)
  if '{rel}' in template and ' one' in first[-4:]:
    template = PRECEDED[0]  # a pronoun cannot come before its noun
  text = template.format(a=first, b=second, it=pick(rng, RELATIVE[relation]), rel=pick(rng, words.RELATIONS[relation]))
  return _with_rest(rng, Phrasing(scene, text, (a, b), ((0, relation, 1),)), _others(scene, i, j))


def _with_middle(rng: np.random.Generator, scene: Scene) -> tuple[Scene, tuple[int, int, int]] | None:
  """The scene with its objects moved so that one is clearly between two others: (scene, (middle, end, end))."""
  if len(scene.objects) < 3:
    return None
  m, i, j, *others = (int(k) for k in rng.permutation(len(scene.objects)))
  middle, *ends = (dataclasses.replace(scene.objects[k], size=pick(rng, ('small', 'small', 'medium')))
                   for k in (m, i, j))
  for _ in range(6):
    placed = []
    for obj, place in zip(ends, pick(rng, ENDS)):
      placed.append(place_object(rng, obj.shape, obj.colour, obj.size, obj.fill, placed, scene.aspect, place))
      if placed[-1] is None:
        break
    else:
      a, b = placed
      x, y = (round(float((p + q) / 2 + 0.06 * (rng.random() - 0.5)), 4) for p, q in ((a.x, b.x), (a.y, b.y)))
      placed.append(dataclasses.replace(middle, x=x, y=y))
      for o in (scene.objects[k] for k in others):
        more = place_object(rng, o.shape, o.colour, 'small', o.fill, placed, scene.aspect)
        placed += [more] if more else []
      if len(placed) == len(scene.objects) and fits(placed, scene.aspect) and clearly('between', placed[2], a, b):
        return dataclasses.replace(scene, objects=tuple(placed)), (2, 0, 1)
  return None


def _between(rng: np.random.Generator, scene: Scene) -> Phrasing | None:
  """'two yellow circles with a star between them'."""
  arranged = _with_middle(rng, scene)
  if not arranged:
    return None
  scene, (m, i, j) = arranged
  attributes = _named_attributes(rng)
  alike = rng.random() < 0.6
  if alike:
    first = scene.objects[i]
    scene = _with(scene, {j: dict(shape=first.shape, colour=first.colour, fill=first.fill, size=first.size)
                          if 'size' in attributes else dict(shape=first.shape, colour=first.colour, fill=first.fill)})
  wanted = tuple(_wanted(scene.objects[k], attributes) for k in (m, i, j))
  article = _article(rng)
  middle = _thing(rng, wanted[0], article=article)
  if alike:
    bare = _thing(rng, wanted[1], article='', noun=(noun := _noun(rng, wanted[1])))
    ends = _before(rng, wanted[1], words.plural(noun))
    text = pick(rng, MIDDLE_ALIKE).format(m=middle, ends=ends, end=words.article(bare))
  else:
    text = pick(rng, MIDDLE).format(m=middle, b=_thing(rng, wanted[1], article=article),
                                    c=_thing(rng, wanted[2], article=article))
  if wanted[0] in wanted[1:]:
    return None
  return _with_rest(rng, Phrasing(scene, text, wanted, ((0, 'between', 1, 2),)), _others(scene, m, i, j))


def _before(rng: np.random.Generator, wanted: Wanted, noun: str) -> str:
  """The noun with all attributes before it."""
  return ' '.join([*(_word(rng, n, getattr(wanted, n)) for n in ATTRIBUTES if getattr(wanted, n)), noun])


def _coordinated(rng: np.random.Generator, scene: Scene) -> Phrasing | None:
  """'one red and one blue star': objects that differ in one attribute."""
  count = len(scene.objects)
  if count < 2:
    return None
  count = min(count, 2 if rng.random() < 0.7 else 3)
  name = weighted(rng, ('colour', 'fill', 'size'), (0.6, 0.2, 0.2))
  values = [getattr(o, name) for o in scene.objects[:count]]
  if len(set(values)) < count:
    return None
  first = scene.objects[0]
  common = pick(rng, [n for n in ATTRIBUTES if n != name]) if rng.random() < 0.3 else None
  shared = {'shape': first.shape} | ({common: getattr(first, common)} if common else {})
  scene = _with(scene, {k: shared for k in range(count)})
  noun = _noun(rng, first)
  nouns = words.plural(noun)
  template = pick(rng, COORDINATED[count])
  spoken = [_word(rng, name, v) for v in values]
  if common:
    word = _word(rng, common, shared[common])
    if '{nouns}' in template:
      nouns = f'{word} {nouns}'
    else:
      spoken = [f'{word} {v}' for v in spoken]
  text = template.format(noun=noun, nouns=nouns, **dict(zip('xyz', spoken)))
  text = re.sub(r'\ba (?=[aeiou])', 'an ', text)
  wanted = tuple(Wanted(first.shape, **{name: v, **({common: shared[common]} if common else {})}) for v in values)
  return _with_rest(rng, Phrasing(scene, text, wanted), scene.objects[count:])


def _shared(rng: np.random.Generator, scene: Scene) -> Phrasing | None:
  """'a circle and a star, both red'."""
  if len(scene.objects) < 2:
    return None
  name = weighted(rng, ('colour', 'fill', 'size'), (0.6, 0.2, 0.2))
  value = getattr(scene.objects[0], name)
  if name != 'size':  # another size might not fit at the object's position
    scene = _with(scene, {k: {name: value} for k in range(len(scene.objects))})
  elif any(o.size != value for o in scene.objects):
    return None
  wanted = sorted((Wanted(o.shape, **{name: value}) for o in scene.objects), key=lambda w: w.shape)
  article = _article(rng)
  groups = grouped(Constraints(tuple(wanted)))
  if len(groups) < 2:
    return None
  things = [_thing(rng, Wanted(w.shape), n, article) for w, n in groups]
  listed = ' and '.join([', '.join(things[:-1]), things[-1]])
  everything = 'both' if len(wanted) == 2 else 'all'
  text = pick(rng, SHARED).format(list=listed, all=everything, x=_word(rng, name, value))
  return Phrasing(scene, text, tuple(wanted))


# Share of tries of each form; the later ones often do not suit the scene.
_FORMS = {_listed: 0.32, _sided: 0.13, _preceded: 0.1, _between: 0.15, _coordinated: 0.22, _shared: 0.08}


def request(rng: np.random.Generator, scene: Scene) -> tuple[Scene, Constraints, str] | None:
  """(scene, constraints, text): a scene like the given one and a prompt; None if the form does not suit the scene."""
  form = weighted(rng, tuple(_FORMS), tuple(_FORMS.values()))
  phrasing = form(rng, scene)
  if not phrasing:
    return None
  background = phrasing.scene.background if rng.random() < 0.5 else None
  constraints = Constraints(phrasing.objects, background, relations=phrasing.relations)
  allowed = splits.allowed('train')
  if (splits.constraints_are_heldout(constraints) or not visible(phrasing.scene) or
      not fits(phrasing.scene.objects, scene.aspect) or not all(allowed(o) for o in phrasing.scene.objects)):
    return None
  text = phrasing.text
  if background and rng.random() < 0.5:
    text = _grounded(rng, text, background)
  else:
    text = pick(rng, FRAMES).format(text)
    if background:
      bare = pick(rng, BARE[background.kind]).format(*background.colours)
      full = pick(rng, GROUNDS[background.kind]).format(*background.colours)
      text = pick(rng, GROUND_LAST).format(things=text, g=full, b=bare)
  return phrasing.scene, constraints, re.sub(r'\ba (?=orange)', 'an ', text)


def _grounded(rng: np.random.Generator, text: str, background: Background) -> str:
  """The text with the background first, or last after 'on'."""
  bare = pick(rng, BARE[background.kind]).format(*background.colours)
  if rng.random() < 0.3:
    return f'{text} on {bare}'
  full = pick(rng, GROUNDS[background.kind]).format(*background.colours)
  options = GROUND_FIRST
  if re.match(r'(an?|one|two|2|three|3) ', text):  # 'on sky striped rings' would be a striped sky
    options += ('on {g} {things}', 'on {b} {things}', 'on {g} there is {things}')
  return pick(rng, options).format(things=text, g=full, b=bare)


def pointed(rng: np.random.Generator, pointer: Pointer, article: str = 'the') -> str:
  """The pointer as a noun phrase, perhaps without article; 'the red one' if it has no shape."""
  noun = _noun(rng, pointer) if pointer.shape else pick(rng, ('one', 'thing', 'shape', 'object'))
  if not pointer.shape and not article:
    noun = 'shape'
  before = [pointer.extreme, *(_word(rng, n, getattr(pointer, n)) for n in ATTRIBUTES if getattr(pointer, n))]
  text = ' '.join([article, *(w for w in before if w), noun]).strip()
  if pointer.place:
    text += f' {pick(rng, words.PLACES[pointer.place])}'
  if pointer.relation:
    text += f' {pick(rng, words.RELATIONS[pointer.relation])} {pointed(rng, pointer.anchor, article)}'
    text += f' and {pointed(rng, pointer.second, article)}' if pointer.second else ''
  return text


def instruction(rng: np.random.Generator, kind: str, slots: dict[str, Any], alone: bool) -> str:
  """An instruction of a kind of edit.

  slots: those of edits.py, with pointers and constraints in place of phrases. alone: the scene has one object, so 'it'
  is clear.
  """
  article = 'the' if rng.random() < 0.55 else ''
  spoken = {}
  for name, value in slots.items():
    if isinstance(value, Pointer):
      spoken[name] = 'it' if alone and rng.random() < 0.5 else pointed(rng, value, article)
    elif isinstance(value, Wanted):
      spoken[name] = _thing(rng, value, article='a' if article else '')
    elif isinstance(value, Background):
      spoken[name] = pick(rng, GROUNDS[value.kind]).format(*value.colours)
      spoken['bare ground'] = pick(rng, BARE[value.kind]).format(*value.colours)
    else:
      spoken[name] = value
  options = INSTRUCTIONS[kind]
  if kind == 'refill' and rng.random() < 0.4:
    options = TURNS[slots['new fill']]
  if slots.get('size') in GROW:
    options += GROW[slots['size']]
  pointer = slots.get('it')
  if kind == 'remove':
    spoken['bare'] = pointed(rng, pointer, '')
  if kind == 'move' and pointer and (pointer.place or pointer.relation):
    options = [t for t in options if '{it} {place}' not in t]
  if pointer and (pointer.place or pointer.relation or spoken['it'] == 'it'):
    # 'The star above the ring red' is ambiguous, and 'it red' is odd
    options = [t for t in options if not re.match(r'{it} {(colour|size|fill|to)}', t) and "'s" not in t]
  return re.sub(r'\ba (?=orange)', 'an ', pick(rng, options).format(**spoken))


@functools.cache
def vocabulary() -> frozenset[str]:
  """Every word with a meaning: no slip may turn one into another."""
  tables = (*_SPOKEN.values(), words.RELATIONS, words.BACKGROUNDS, words.FILLS_AFTER)
  return frozenset(w for table in tables for phrases in table.values() for phrase in phrases for w in phrase.split())


def slips(rng: np.random.Generator, text: str) -> str:
  """The text as typed: other spellings, capitals and punctuation, and at times a misspelt word."""
  spelling, centre, wrong, case, end = rng.random(5)
  if spelling < 0.4:
    text = text.replace('colour', 'color').replace('grey', 'gray')
  if centre < 0.25:
    text = text.replace('center', 'centre')
  if wrong < TYPOS:
    text = _misspelt(rng, text)
  # The embedded VLM's tokenizer spells capitals letter by letter, so only short texts have many.
  if case < CAPITALS and len(text) <= SHORT:
    text = text.upper()
  elif 0.4 < case < 0.44 and len(text) <= 2 * SHORT:
    text = ' '.join(w[:1].upper() + w[1:] for w in text.split(' '))
  elif case < 0.4:
    text = text[0].upper() + text[1:]
  if text[-1] not in '?.!':
    text += '.' if end < 0.25 else '!' if end < 0.32 else '...' if end < 0.34 else ' .' if end < 0.35 else ''
  elif text[-1] == '?' and end < 0.4:
    text = text[:-1]
  return text


def _misspelt(rng: np.random.Generator, text: str) -> str:
  """One long word with two letters exchanged, one left out or one doubled."""
  matches = list(re.finditer(r'[a-z]{5,}', text))
  if not matches:
    return text
  match = pick(rng, matches)
  word, k, how = match[0], int(rng.integers(1, len(match[0]) - 1)), rng.integers(3)
  if how == 0:
    wrong = word[:k] + word[k + 1] + word[k] + word[k + 2:]
  else:
    wrong = word[:k] + word[k + 1:] if how == 1 else word[:k] + word[k] + word[k:]
  return text if wrong in vocabulary() else text[:match.start()] + wrong + text[match.end():]
