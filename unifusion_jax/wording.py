"""Words of requests and rewrites: phrases with a meaning, and the things that they describe, for `remarks`.

No grammar is parsed. A text becomes a list of items: colours, shapes, counts, other words. Items in one run before a
shape describe it; what else a request says is read off the words around.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
from typing import Any

from unifusion_jax.errors import UserError

FILE = 'remarks.json'  # of a VLM's folder: the fields of a Vocabulary
ENGLISH = pathlib.Path(__file__).parent / 'assets' / 'english.json'
ATTRIBUTES = ('colour', 'size', 'fill')
NUMBERS = {word: n for n, word in enumerate(
    'one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen '
    'eighteen nineteen twenty'.split(), 1)}
SEVERAL = {2: ('a pair of', 'a couple of'), 3: ('a trio of',), 6: ('half a dozen',), 12: ('a dozen',),
           24: ('two dozen',), 100: ('a hundred', 'one hundred'), 1000: ('a thousand', 'one thousand')}
INDEFINITE = {'a', 'an', 'another', 'some'}
DEFINITE = set('the this that these those its my his her their your our both all'.split())
FUNCTION = INDEFINITE | DEFINITE | set(NUMBERS) | set(
    'and or but with without no not in on at of to from by for as into onto over under above below behind beside near '
    'between than then so if where which who whose while when is are be was were becomes become has have having it '
    'they them there here i me we you he she us please pls now just only also too very instead should would could can '
    'will must do does like up down out off more most each every other ones any'.split())
IMAGES = {'picture', 'image', 'photo', 'pictures', 'images', 'canvas', 'format', 'version'}
# After 'no' and 'without': idioms, and things that a rewrite may well name
_IDIOMS = set('one other more less longer matter doubt problem need idea way change changes edits background further '
              'additional extra particular such name end hurry reason fear words exception'.split())
_SCOPE_ENDS = {'but', 'and', 'with', 'on', 'in', 'at', 'just', 'only', 'except', 'instead'}  # of a negation
_NOT_COUNTED = set('number no version part chapter level size age aged route page row column grade class picture '
                   'image photo figure f'.split())  # before a number that counts nothing
_VERBS = ('add change color colour delete draw drop erase exchange flip give include insert keep make mirror move '
          'paint place put recolor recolour remove replace resize set swap take turn write').replace(' ', '|')
_CLAUSES = re.compile(rf'(?:[,;.]|\band\b|\bthen\b)\s+(?=(?:then |also |please |now )*(?:{_VERBS})\b)')
_REMOVAL = re.compile(r'\b(?:remov\w*|delet\w*|eras\w*|take (?:away|out)|get\b.*\b(?:rid|out)|leave out|gone|'
                      r'disappears?|without|except|everything but|drop|lose|away|clear|minus|has to go|hide|crop)\b')
_BECOMING = {'with', 'into', 'to', '->', 'add', 'plus', '+', 'insert', 'include', 'be', 'become', 'becomes'}
_OLD = {'swap', 'exchange', 'replace', 'from', 'not', 'where', 'than', 'instead of', 'in place of', 'rather than'}
_MOVING = re.compile(r'\b(?:move|put|place|shift|drag|bring|take|go|goes)\b')
_COPULAS = set('should be is to becomes become get go in now colour the of but :'.split())
_GOING = set('should be is to now has go gone removed disappear disappears away out please pls . ! ?'.split())
QUOTES = re.compile(r'(?<!\w)"([^"]+)"(?!\w)|(?<!\w)\'([^\']{2,}?)\'(?!\w)')
_TOKENS = re.compile(r'\d+(?:[.,:/x]\d+)*[^\W_]*|[^\W_]+|->|[.,;:!?()|+&/]')


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """Phrases that stand for values.

  Attributes:
    kinds: {kind: {value: phrases}}. Kinds are 'colour' and 'shape', in a closed vocabulary also 'size', 'fill', 'place'
      and 'count'. The shape '' is any shape.
    shades: {value: words} that count as a value's name in a rewrite, but not in a request.
    words: of a closed vocabulary, other words that the VLM was trained on.
    most: objects that an image of this VLM has at most; 0: any number.
  """
  kinds: dict[str, dict[str, list[str]]]
  shades: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  words: frozenset[str] = frozenset()
  most: int = 0

  @classmethod
  @functools.cache
  def of(cls, folder: str | os.PathLike = '') -> 'Vocabulary':
    """That of the VLM in a folder: its remarks.json, or plain English."""
    path = pathlib.Path(folder) / FILE
    path = path if folder and path.exists() else ENGLISH
    try:
      raw = json.loads(path.read_text())
      return cls(raw['kinds'], raw['shades'], frozenset(raw['words']), raw['most'])
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(f'{path} must hold the words of a VLM as {ENGLISH} has them: mend or remove it ({error!r})'
                      ) from error

  @property
  def closed(self) -> bool:
    """Whether the VLM knows these words alone."""
    return bool(self.words)

  @functools.cached_property
  def phrases(self) -> dict[str, list]:
    """{first word: [(words, kind, values)]}, the longest first."""
    return _by_first_word(self.kinds, {})

  @functools.cached_property
  def written_phrases(self) -> dict[str, list]:
    """The same with shades, for rewrites."""
    return _by_first_word(self.kinds, self.shades)

  @functools.cached_property
  def known(self) -> frozenset[str]:
    """Words of a closed vocabulary: its own and the first of each phrase."""
    return self.words | set(self.phrases)


def _by_first_word(kinds: dict, shades: dict) -> dict[str, list]:
  meanings = {}
  for kind, table in kinds.items():
    for value, phrases in table.items():
      for phrase in (*phrases, *shades.get(value, ())):
        for form in (phrase, plural(phrase)) if kind == 'shape' else (phrase,):
          meanings.setdefault((tuple(split(form)), kind), set()).add(value)
  by_first = {}
  for (words, kind), values in sorted(meanings.items(), key=lambda item: -len(item[0][0])):
    by_first.setdefault(words[0], []).append((words, kind, frozenset(values)))
  return by_first


def plural(noun: str) -> str:
  return noun + ('es' if noun.endswith(('s', 'x', 'sh', 'ch')) else 's')


def plain(text: str) -> str:
  """The text in lower case, with straight quotes, one spelling and 'not' as a word."""
  text = text.translate(str.maketrans('“”„«»‘’‚', '"""""\'\'\'')).lower()
  text = re.sub(r"n't\b", ' not', text)
  return text.replace('centre', 'center').replace('gray', 'grey').replace('color', 'colour')


def split(text: str) -> list[str]:
  """Words and punctuation; a number in a compound ('two-storey') counts nothing and becomes 'x'."""
  text = re.sub(rf'\b(?:\d+|{"|".join(NUMBERS)}|\w+ty)-(?=\w)', 'x', plain(text))
  return _TOKENS.findall(re.sub(r'(?<=\w)-(?=\w)', ' ', text))


@dataclasses.dataclass(frozen=True)
class Item:
  """A word or phrase: of kind 'word', 'stop' (punctuation), 'count' or one of the vocabulary's."""
  kind: str
  values: frozenset  # of a count: its number
  text: str

  @property
  def number(self) -> int | None:
    return next(iter(self.values)) if self.kind == 'count' else None


_SEVERAL = _by_first_word({'count': SEVERAL}, {})


def read(text: str, phrases: dict[str, list]) -> list[Item]:
  """The items of a text, by the longest phrases that match."""
  words, items, at = split(text), [], 0
  while at < len(words):
    word, length = words[at], 1
    for phrase, kind, values in (*phrases.get(word, ()), *_SEVERAL.get(word, ())):
      if tuple(words[at:at + len(phrase)]) == phrase:
        length = len(phrase)
        items.append(Item(kind, frozenset(map(int, values)) if kind == 'count' else values, ' '.join(phrase)))
        break
    else:
      number = NUMBERS.get(word) or (int(word) if word.isdecimal() and len(word) < 6 else None)
      before = items[-1].text if items else ''
      if number and before not in _NOT_COUNTED and not (word == 'one' and before in DEFINITE):
        items.append(Item('count', frozenset([number]), word))
      else:
        items.append(Item('word' if word[0].isalnum() or word in ('+', '->') else 'stop', frozenset(), word))
    at += length
  return items


@dataclasses.dataclass(frozen=True)
class Thing:
  """A shape with the attributes named right before it, and the indices of its first and last item."""
  shape: frozenset
  attributes: dict[str, frozenset]
  count: int | None
  marker: str  # the determiner: 'definite', 'indefinite' or ''
  text: str
  start: int
  end: int

  def fits(self, wanted: 'Thing') -> bool:
    """Whether it is of the wanted shape and has all wanted attributes."""
    return (('' in wanted.shape or bool(self.shape & wanted.shape)) and
            all(self.attributes.get(kind, frozenset()) & values for kind, values in wanted.attributes.items()))

  def having(self, *items: Item) -> 'Thing':
    """The thing with further attributes, or others in place of its own."""
    return dataclasses.replace(self, attributes=self.attributes | {item.kind: item.values for item in items},
                               text=' '.join([self.text, *(item.text for item in items)]))


class Clause:
  """A text or a part of it, read.

  Attributes:
    items: its words and phrases.
    things: its shapes.
    markers: the determiner of the run that each item stands in, as of `Thing`.
    negated: {index of an item: the negation that rules it out}.
  """

  def __init__(self, text: str, items: list[Item], edit: bool = False):
    self.text, self.items, self.edit = text, items, edit
    self.things, self.markers = self._things()
    self.negated = self._negated()
    self.removes = edit and bool(_REMOVAL.search(text))

  @classmethod
  def of(cls, request: str, phrases: dict[str, list], edit: bool) -> list['Clause']:
    """The clauses of a request, one for each change that an edit asks for; quoted words are no items."""
    texts = _CLAUSES.split(plain(request)) if edit else [plain(request)]
    return [cls(text, read(QUOTES.sub(' ', text), phrases), edit) for text in texts if text.strip()]

  def _next(self, i: int) -> Item:
    return self.items[i + 1] if i + 1 < len(self.items) else Item('stop', frozenset(), '')

  def _things(self) -> tuple[list[Thing], list[str]]:
    things, markers, attributes, count, marker, start = [], [], {}, None, '', 0
    for i, item in enumerate(self.items):
      markers.append(marker)
      if item.kind == 'shape':
        if self._next(i).text.startswith('as '):  # 'as many stars as a bicycle has wheels'
          count = self._next(i).number
        text = ' '.join(part.text for part in self.items[start:i + 1] if part.text not in INDEFINITE | {'the'})
        things.append(Thing(item.values, attributes, count, marker, text, start, i))
      if item.kind in ATTRIBUTES:
        attributes = {**attributes, item.kind: item.values}
      elif item.kind == 'count' or item.text in INDEFINITE | DEFINITE:
        attributes, start, count = {}, i, item.number
        marker = 'definite' if item.text in DEFINITE else 'indefinite'
      else:
        attributes, count, marker, start = {}, None, '', i + 1
    return things, markers

  def _negated(self) -> dict[int, str]:
    negated, negation = {}, ''
    for i, item in enumerate(self.items):
      following = self._next(i)
      gerund = item.text != 'no' and following.kind == 'word' and following.text.endswith('ing')  # 'without moving'
      if item.text in ('no', 'without', 'not', 'neither', 'nor') and not gerund and following.text not in _IDIOMS:
        negation = item.text
      elif item.kind == 'stop' or item.text in _SCOPE_ENDS:
        negation = ''
      elif negation:
        negated[i] = negation
        negation = '' if item.kind == 'shape' else negation
    return negated

  def wanted(self) -> tuple[list[Thing], list[int]]:
    """(things, indices of further attributes and places) that the rewrite has to name.

    Of an edit: things with an indefinite article, a number or a word like 'into' before them, and attributes that no
    noun follows ('make the red circle blue'). The rest says what is meant, or goes away.
    """
    inside = {i for thing in self.things for i in range(thing.start, thing.end + 1)} | set(self.negated)
    loose = [i for i, item in enumerate(self.items) if item.kind in (*ATTRIBUTES, 'place') and i not in inside]
    things = [thing for thing in self.things if thing.end not in self.negated]
    if not self.edit:
      return things, loose
    if self.removes:
      return [], []
    old = self._old()
    if {item.text for item in self.items} & IMAGES:
      things = [thing for thing in things if thing.text != 'square']  # 'use a square canvas'
    things = [thing for thing in things if thing.end not in old and (
        thing.marker == 'indefinite' or thing.marker == '' and self._becomes(thing.start))]
    return things, [i for i in loose if i not in old and self._predicate(i)]

  def _becomes(self, start: int) -> bool:
    before = self.items[start - 1].text if start else ''
    return before in _BECOMING or before == 'for' and bool(re.search('swap|exchange', self.text))

  def _old(self) -> set[int]:
    """Indices after 'instead of' and the like, up to what takes its place."""
    old = set()
    for i, item in enumerate(self.items):
      shown = item.text == 'with' and i and self.items[i - 1].text in IMAGES  # 'the picture with two stars'
      if shown or {item.text, f'{item.text} {self._next(i).text}'} & _OLD or item.text == 'in' and (
          [part.text for part in self.items[i + 1:i + 3]] == ['place', 'of']):
        old.add(i)
      elif i - 1 in old and item.kind != 'stop' and item.text not in _BECOMING and (
          item.text not in INDEFINITE or self.items[i - 1].text in ('of', 'with', *_OLD)):
        old.add(i)
    return old

  def _predicate(self, i: int) -> bool:
    if self.items[i].kind == 'place':
      return (bool(_MOVING.search(self.text)) and i == len(self.items) - 1 and
              sum(item.kind == 'place' for item in self.items) == 1)
    if self.markers[i] == 'definite':
      return False
    following = self._next(i)
    ends = following.kind not in ('word', 'count', *ATTRIBUTES) or following.text in FUNCTION
    relative = [item.text for item in self.items[max(0, i - 2):i]] in (['that', 'is'], ['that', 'are'], ['which', 'is'])
    return (ends or self.markers[i] == 'indefinite') and not relative

  def bound(self) -> list[Thing]:
    """Things with what stands apart from them: places in a strict order, and the new attribute of an edit's object."""
    wanted, loose = self.wanted()
    if not self.edit:
      return self._placed(wanted)
    if len(self.things) == 1 and len(loose) == 1 and not wanted:
      thing, i = self.things[0], loose[0]
      between = {item.text for item in self.items[thing.end + 1:i]}
      if thing.marker == 'definite' and thing.end < i and between <= _COPULAS | _BECOMING:
        return [thing.having(self.items[i])]
    return wanted

  def _placed(self, wanted: list[Thing]) -> list[Thing]:
    """The things with their places, where all places follow their things or all precede them."""
    order: list[tuple[int, Any]] = sorted([(thing.end, thing) for thing in wanted] + [
        (i, item) for i, item in enumerate(self.items) if item.kind == 'place'], key=lambda pair: pair[0])
    parts = [part for _, part in order]
    firsts, seconds = parts[::2], parts[1::2]
    if len(firsts) == len(seconds):
      for things, places in ((firsts, seconds), (seconds, firsts)):
        if all(isinstance(t, Thing) for t in things) and all(isinstance(p, Item) for p in places):
          return [thing.having(place) for thing, place in zip(things, places)]
    return wanted

  def removed(self) -> list[Thing]:
    """Things that must not be in the rewrite: 'no circle', and of an edit 'remove the red circle'."""
    things = []
    for thing in self.things:
      after = self.items[thing.end + 1:]
      ends = not after or after[0].kind == 'stop'
      if self.negated.get(thing.end) in ('no', 'without') and (ends or not self.edit):
        things.append(thing)
      elif self.removes and len(self.things) == 1 and thing.marker == 'definite' and (
          {item.text for item in after} <= _GOING and ('' not in thing.shape or thing.attributes)):
        things.append(thing)
    return things
