"""Prompts for an image, with exactly the content of their constraints, in four styles.

'plain' is the canonical sentence; 'paraphrase' has many other templates; 'heldout' has templates of its own with the
same words, for tests only; 'knowledge' names facts in place of colours, shapes and numbers. The canonical sentence
`language.describe(constraints)` is the right rewrite of each.
"""

import functools
import re

import numpy as np

from unifusion_jax.errors import UserError
from unifusion_jax.scenes import words
from unifusion_jax.scenes.composition import pick
from unifusion_jax.scenes.constraints import Constraints, Wanted
from unifusion_jax.scenes.language import describe, grouped, in_canonical_order
from unifusion_jax.scenes.world import Background

STYLES = ('plain', 'paraphrase', 'knowledge', 'heldout')

# A part in brackets is dropped if its slot is empty; '@' becomes the article or the number.
THINGS = {
    'paraphrase': (
        '@ [{size} ][{fill} ][{colour} ]{noun}[ {place}]',
        '@ [{size} ][{fill} ][{colour} ]{noun}[ {place}]',
        '@ [{size} ][{colour} ]{noun} {filled}[ {place}]',
        '@ [{size} ][{fill} ]{noun} in {colour}[ {place}]',
        '@ {noun} ({colour}[, {fill}][, {size}])[ {place}]',
        '{place} @ [{size} ][{fill} ][{colour} ]{noun}',
        '{place}: @ [{size} ][{fill} ][{colour} ]{noun}',
        '{place} @ [{size} ]{noun}[ {filled}] in {colour}',
        '@ [{fill} ][{size} ][{colour} ]{noun}[ {place}]',
        '@ [{colour} ][{fill} ]{noun}[ ({size})][ {place}]',
        '@ [{size} ][{colour} ]{noun}[ {place}][, {filled}]',
        '@ [{colour} ]{noun}[, {size}][, {fill}][, {place}]',
        '@ {noun}, {colour}[, {filled}][, {size}][, {place}]',
        '@ {noun}, {colour}[ and {fill}][ ({size})][, {place}]',
        '@ [{fill} ]{noun}[ {place}], {colour}[, {size}]',
        '@ [{fill} ][{colour} ]{noun}[, {size} in size][, {place}]',
        '@ [{fill} ]{noun}[ {place}], coloured {colour}[, {size}]',
        '@ [{size} ][{fill} ]{noun} with the colour {colour}[ {place}]',
        '@ [{size} ]{noun}[, {filled}], of the colour {colour}[, {place}]',
        '{place} I want @ [{size} ][{fill} ][{colour} ]{noun}',
        '{place} there is @ [{size} ][{fill} ]{noun} in {colour}'),
    'heldout': (
        '@ [{fill} ][{colour} ]{noun} of {size} size[ {place}]',
        '@ [{fill} ]{noun} coloured {colour}[ ({size})][ {place}]',
        '@ [{size} ]{noun}[ {place}] in {colour}[, {filled}]',
        '{place} there should be @ [{size} ][{colour} ]{noun}[ {filled}]',
        '@ [{size} ][{fill} ]{noun} in the colour {colour}[ {place}]'),
    'counted': ('@ [{size} ][{fill} ][{colour} ]{noun}',),
    'colour fact': (
        '@ [{size} ][{fill} ]{noun} in the colour of {fact}[, {place}]',
        '@ [{size} ][{fill} ]{noun} the colour of {fact}[, {place}]',
        '@ [{size} ][{fill} ]{hued}-coloured {noun}[ {place}]'),
    'shape fact': (
        '@ [{size} ][{fill} ][{colour} ]shape {form}[, {place}]',
        '@ [{size} ][{colour} ]shape {form}, {filled}[, {place}]'),
    'both facts': (
        '@ [{size} ][{fill} ]shape {form} in the colour of {fact}[, {place}]',
        '@ [{size} ][{fill} ]{hued}-coloured shape {form}[, {place}]')}
FRAMES = {
    'paraphrase': (
        '{things}', '{things}', 'draw {things}', 'a picture of {things}', 'I want {things}', 'show me {things}',
        'please draw {things}', 'paint {things}', 'an image with {things}', 'make a picture with {things}',
        'can you draw {things}?', 'give me {things}', 'I need {things}', 'let me see {things}', '{things}, please',
        'could you paint {things}?', 'the image has {things}', 'make {things}', 'a drawing of {things}',
        'now I want {things}', 'there should be {things}', 'an image that shows {things}', 'the picture: {things}',
        'I would like {things}', 'what I want: {things}', 'get me {things}', '{things}, nothing else',
        'now draw me {things}', 'the drawing should show {things}'),
    'heldout': (
        'now {things}', 'I would like to see {things}', 'a drawing that shows {things}',
        'could I get an image of {things}?', 'what I need is {things}', 'the picture should have {things}',
        'make me {things}, nothing else')}
GROUNDS = {
    'paraphrase': (
        '{things}, on {ground}', '{things} on {ground}', '{things}, with {ground}', 'on {ground}: {things}',
        '{things}; behind them {ground}', '{things}, all on {ground}', 'in front of {ground}: {things}',
        '{things}; and {ground}', 'with {ground}: {things}', '{ground} behind {things}', '{things}, drawn on {ground}',
        '{things} in front of {ground}', 'on top of {ground}: {things}'),
    'heldout': ('{things}, all in front of {ground}', '{things}, drawn on top of {ground}', 'with {ground}, {things}')}
_STARTS = ('{things}', 'now {things}', 'draw {things}')  # frames in which a place may come first
COUNTED = {2: ('two', '2', 'a pair of'), 3: ('three', '3'), 4: ('four', '4')}
_SLOT, _OPTIONAL = re.compile(r'{(\w+)}'), re.compile(r'\[([^\[\]]*)\]')


@functools.lru_cache(maxsize=None)
def _needs(template: str) -> frozenset[str]:
  """The slots outside brackets, which must not be empty."""
  return frozenset(_SLOT.findall(_OPTIONAL.sub('', template)))


def fill_in(template: str, slots: dict[str, str]) -> str:
  """The template with its slots filled; bracketed parts with an empty slot are dropped."""
  text = _OPTIONAL.sub(lambda part: part[1] if slots[_SLOT.search(part[1])[1]] else '', template)
  return text.format(**slots).replace('-sized size', ' size')


def _slots(rng: np.random.Generator, wanted: Wanted, count: int, facts: str) -> dict[str, str]:
  """Words by slot; '' for attributes that are not given, and for facts that `facts` does not ask for."""
  noun = pick(rng, words.SHAPES[wanted.shape]) if wanted.shape else 'shape'
  slots = {
      'size': pick(rng, words.SIZES[wanted.size]) if wanted.size else '',
      'fill': pick(rng, words.FILLS_BEFORE[wanted.fill]) if wanted.fill else '',
      'filled': pick(rng, words.FILLS_AFTER[wanted.fill]) if wanted.fill else '',
      'colour': pick(rng, words.COLOURS[wanted.colour]) if wanted.colour else '',
      'place': pick(rng, words.PLACES[wanted.place]) if wanted.place else '',
      'noun': noun if count == 1 else words.plural(noun), 'fact': '', 'hued': '', 'form': ''}
  if facts in ('colour fact', 'both facts'):
    slots['fact'] = pick(rng, words.COLOUR_FACTS[wanted.colour])
    hues = words.COLOUR_FACTS_BEFORE[wanted.colour]
    slots['hued'] = pick(rng, hues) if hues else ''
  if facts in ('shape fact', 'both facts'):
    slots['form'] = pick(rng, words.SHAPE_FACTS[wanted.shape])
  return slots


def thing(rng: np.random.Generator, wanted: Wanted, count: int = 1, kind: str = 'paraphrase', first: bool = False,
          commas: bool = True, number: str | None = None) -> str:
  """A noun phrase for `count` such objects; `kind` is a key of THINGS.

  first: no leading place. commas: whether commas are allowed. number: the word to count with.
  """
  slots = _slots(rng, wanted, count, kind)
  given = {k for k, v in slots.items() if v}
  # Every template has a slot for the size, but some need a place, a size or a fill, and some have no slot for a fill.
  options = [t for t in THINGS[kind] if _needs(t) <= given and ('fill' not in given or 'fill' in t)
             and not (first and t.startswith('{place}'))]
  while ',' in (text := fill_in(pick(rng, options or THINGS['paraphrase'][:1]), slots)) and not commas:
    pass
  if count > 1:
    if kind in ('shape fact', 'both facts'):
      text = text.replace('shape', 'shapes', 1)
    return text.replace('@', number or pick(rng, COUNTED[count]))
  before, at, after = text.partition('@ ')
  return before + words.article(after)


def ground(rng: np.random.Generator, background: Background) -> str:
  return pick(rng, words.BACKGROUNDS[background.kind]).format(*background.colours).replace('a orange', 'an orange')


def _listed(rng: np.random.Generator, things: list[str], related: bool, loose: bool) -> str:
  """The things as one list, without a word that two of them would seem to share.

  related: the first thing holds a relation, which the others have no part in. loose: some have a place, others none.
  """
  if related or any(',' in t for t in things):
    return pick(rng, ('; ', '; also ' if related else '; and ')).join(things)
  if loose or rng.random() < 0.3:
    return ', '.join(things)
  if rng.random() < 0.2:
    return ' and '.join(things)
  return ' and '.join([', '.join(things[:-1]), things[-1]] if len(things) > 1 else things)


def _kind(rng: np.random.Generator, wanted: Wanted, style: str, must: bool) -> str:
  if style != 'knowledge':
    return style
  options = ['colour fact'] * bool(wanted.colour) + ['shape fact'] * bool(wanted.shape)
  options += ['both facts'] * (len(options) == 2) + ['paraphrase'] * (not must)
  return pick(rng, options or ['paraphrase'])


def prompt(constraints: Constraints, rng: np.random.Generator, style: str = 'paraphrase') -> str:
  """A prompt with the constraints and nothing else.

  The order of the objects is kept, unless their places are all given and all different and so determine it.
  """
  if style not in STYLES:
    raise UserError(f'there is no prompt style {style!r}: choose one of {", ".join(STYLES)}')
  if style == 'plain':
    return describe(constraints)
  constraints = in_canonical_order(constraints)
  places = [w.place for w in constraints.objects]
  groups = grouped(constraints)
  settled = all(places) and len(set(places)) == len(groups) and not constraints.relations
  if settled and rng.random() < 0.5:
    groups = [groups[k] for k in rng.permutation(len(groups))]
  frame = pick(rng, FRAMES['heldout' if style == 'heldout' else 'paraphrase'])
  joints = {}  # text before an object: its relation to those before it
  for _, relation, *others in constraints.relations:
    joints.update(zip(others, (f' {pick(rng, words.RELATIONS[relation])} ', ' and ')))
  first_related = {i for i, *_ in constraints.relations}
  factual = rng.integers(len(groups))  # the group that must name a fact
  things, at = [], 0
  for k, (wanted, count) in enumerate(groups):
    related = at in joints or at in first_related
    if style == 'knowledge' and count > 1 and not wanted.place and rng.random() < 0.6:
      head = thing(rng, wanted, count, 'counted', number='as many')
      text = f'{head} as {pick(rng, words.COUNT_FACTS[count])}'
    else:
      text = thing(rng, wanted, count, _kind(rng, wanted, style, k == factual),
                   first=not things and frame not in _STARTS, commas=not related)
    if at in joints:
      things[-1] += joints[at] + text
    else:
      things.append(text)
    at += count
  text = _listed(rng, things, bool(joints), loose=any(places) and not all(places))
  if constraints.background:
    option = pick(rng, GROUNDS['heldout' if style == 'heldout' else 'paraphrase'])
    # 'On a mint background: ...' is a sentence of its own.
    if not option.startswith('{things}'):
      frame = '{things}'
    text = option.format(things=text, ground=ground(rng, constraints.background))
  text = frame.format(things=text)
  if rng.random() < 0.3:
    text = text[0].upper() + text[1:] + ('' if text.endswith('?') else '.')
  return text
