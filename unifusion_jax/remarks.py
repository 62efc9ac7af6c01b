"""Remarks on rewrites: what a request asks for and the text that the VLM wrote in its place does not say.

`remark` reads colours, shapes, counts, negations and quoted words off an English request and looks for each in the
rewrite. It rather misses something than complains of a rewrite that is right: a shade or a synonym will do, and of an
edit only what is to become is looked for ('blue' of 'make the red circle blue').

The words come from a `wording.Vocabulary`: plain English, or the remarks.json in the folder of a VLM that knows a small
language only. Such a language is closed: sizes, fills, places and which attribute belongs to which object are checked
as well, and words that the VLM has never seen are named.
"""

from collections.abc import Iterator
import difflib
import re

from unifusion_jax import wording
from unifusion_jax.wording import ATTRIBUTES, Clause, DEFINITE, FUNCTION, INDEFINITE, Item, Thing, Vocabulary

LARGEST = 20  # counts above are written in too many ways to be looked for
LISTED = 4    # things up to this number may be listed one by one
_BEFORE_QUOTE = {'to', 'with', 'into', 'say', 'read', 'write', 'add', 'insert', 'be'}  # of words that an edit adds
_NEGATIONS = set('no without not non never neither nor free devoid lacking lacks absent absence missing empty bare '
                 'gone removed instead rather except excluding avoid avoiding nothing none nowhere cannot'.split())
_UNITS = set('am days degrees feet hours inches metres meters miles minutes months oclock percent pixels points pounds '
             'seconds times weeks years dollars euros lines sides corners stories storeys decades centuries'.split())
_SINGULARS = dict(people='person', men='man', women='woman', children='child', mice='mouse', geese='goose',
                  teeth='tooth', wolves='wolf', leaves='leaf', knives='knife', shelves='shelf')


def remark(request: str, written: str, references: int = 0, vocabulary: Vocabulary | None = None) -> str:
  """What the request asks for and the rewrite does not say, as a short text; '' for nothing.

  Args:
    request: the user's text.
    written: what the VLM wrote.
    references: the number of images shown; with any, the request is an edit.
    vocabulary: None: plain English.
  """
  vocabulary = vocabulary or Vocabulary.of()
  have = Clause(written, wording.read(written, vocabulary.written_phrases))
  missing, surplus, unknown = [], [], []
  for clause in Clause.of(request, vocabulary.phrases, bool(references)):
    missing += _missing_quotes(clause, request, written)
    if vocabulary.closed:
      things = list(_missing_things(clause, have, vocabulary))
      missing += things + [text for text in _missing_attributes(clause, have) if not any(text in t for t in things)]
      surplus += [thing.text for thing in clause.removed() if any(other.fits(thing) for other in _objects(have))]
      unknown += _unknown(clause, vocabulary)
    else:
      missing += [*_missing_words(clause, have, request), *_missing_counts(clause, have)]
      surplus += _surplus_nouns(clause, written)
  parts = (('asked for and not written: ', missing), ('not wanted and written: ', surplus),
           ('unknown to this VLM: ', unknown))
  return '; '.join(head + ', '.join(dict.fromkeys(listed)) for head, listed in parts if listed)


def _spaced(text: str) -> str:
  """The words alone, each between spaces."""
  return ' '.join(['', *(word for word in wording.split(text) if word[0].isalnum()), ''])


def _missing_quotes(clause: Clause, request: str, written: str) -> Iterator[str]:
  have = _spaced(written)
  for match in wording.QUOTES.finditer(clause.text):
    quoted, before = match[1] or match[2], wording.split(clause.text[:match.start()][-40:])[-1:]
    added = not clause.edit or not clause.removes and bool(set(before) & _BEFORE_QUOTE)
    if added and _spaced(quoted) not in have:
      start = request.lower().find(quoted)
      yield f'"{request[start:start + len(quoted)] if start >= 0 else quoted}"'


# A closed vocabulary


def _objects(have: Clause) -> list[Thing]:
  """Things of a rewrite with their places, which follow them."""
  return [thing.having(*[item for item in have.items[thing.end + 1:thing.end + 2] if item.kind == 'place'])
          for thing in have.things]


def _missing_things(clause: Clause, have: Clause, vocabulary: Vocabulary) -> Iterator[str]:
  wanted, objects = clause.bound(), _objects(have)
  # 'a star and two blue ones': more of a shape than its own phrase says
  alone = not clause.edit and not {item.text for item in clause.items} & {
      'one', 'ones', 'other', 'another', 'each', 'more'}
  for thing in wanted:
    count, number = thing.count or 1, sum(other.count or 1 for other in objects if other.fits(thing))
    alike = sum(bool(other.shape & thing.shape) or '' in other.shape for other in wanted)
    if number < count or alone and alike == 1 and number > count > 1:
      limit = f', and an image of this VLM has at most {vocabulary.most} objects' if count > vocabulary.most > 0 else ''
      yield thing.text + (f' ({number} written{limit})' if count > 1 else '')


def _missing_attributes(clause: Clause, have: Clause) -> Iterator[str]:
  """Attributes apart from their things; the colour of a background has to be that of the background."""
  behind = max((thing.end for thing in have.things), default=-1)
  for i in clause.wanted()[1]:
    item, ground = clause.items[i], [part.text for part in clause.items[i + 1:i + 2]] in (['background'], ['backdrop'])
    if not any(item.kind == other.kind and item.values & other.values
               for other in have.items[behind + 1 if ground else 0:]):
      yield f'{item.text} background' if ground else item.text


def _unknown(clause: Clause, vocabulary: Vocabulary) -> list[str]:
  """Words that the VLM was never trained on, where they are half of the clause or no shape is named beside them."""
  items = [item for item in clause.items if item.kind not in ('stop', 'count') and item.text not in FUNCTION
           and not item.text[0].isdigit()]
  unknown = [item.text for item in items if item.kind == 'word' and item.text not in vocabulary.words and
             not (len(item.text) > 3 and difflib.get_close_matches(item.text, vocabulary.known, 1, 0.82))]
  return unknown if 2 * len(unknown) >= len(items) or not clause.edit and not clause.things else []


# Plain English


def _missing_words(clause: Clause, have: Clause, request: str) -> Iterator[str]:
  things, loose = clause.wanted()
  indices = [i for thing in things if thing.marker or thing.attributes for i in range(thing.start, thing.end + 1)
             if clause.items[max(0, thing.start - 1)].text != 'like'] + loose
  # Within a sentence a capital begins a name: 'the White House'
  names = {word.lower() for word in re.findall(r'(?<=[a-z,] )[A-Z][a-z]+', request)}
  for item in (clause.items[i] for i in sorted(indices)):
    if item.kind in (*ATTRIBUTES, 'shape') and item.text not in names and not any(
        item.kind == other.kind and item.values & other.values for other in have.items):
      yield item.text


def _singular(word: str) -> str:
  """A word without the ending of a plural: equal for both numbers of a noun, if not always a word."""
  if word in _SINGULARS:
    return _SINGULARS[word]
  if word.endswith('ies') and len(word) > 4:
    return word[:-3] + 'y'
  if word.endswith(('sses', 'xes', 'shes', 'ches')):
    return word[:-2]
  return word[:-1] if word.endswith('s') and not word.endswith(('ss', 'us', 'is')) and len(word) > 3 else word


def _counted(items: list[Item]) -> Iterator[tuple[int | None, str, str]]:
  """(count, noun in the singular, phrase) for each count with a plural at most four words after it."""
  for i, item in enumerate(items):
    part = [other.text for other in items[max(0, i - 2):i]] == ['of', 'the']  # 'one of the three'
    for j in range(i + 1, min(i + 5, len(items))) if item.kind == 'count' and not part else ():
      word = items[j].text.split()[-1]
      if items[j].kind in ('stop', 'count') or word in FUNCTION or word in _UNITS:
        break
      if _singular(word) != word or word in ('sheep', 'fish', 'deer'):
        yield item.number, _singular(word), ' '.join(part.text for part in items[i:j + 1])
        break


def _missing_counts(clause: Clause, have: Clause) -> Iterator[str]:
  """'7 circles' where no seven is written; up to LISTED only where another number of the same noun is."""
  if clause.edit:  # 'add two birds' to those that are there
    return
  numbers = [item.number for item in have.items if item.kind == 'count']
  nouns, counted = [_singular(item.text) for item in have.items], list(_counted(have.items))
  for count, noun, text in _counted(clause.items):
    if not 1 < count <= LARGEST or count in (*numbers, sum(numbers)):
      continue
    others = [number for number, other, _ in counted if other == noun]
    if nouns.count(noun) == 1 and not others:
      before = {item.text for item in have.items[max(0, nouns.index(noun) - 3):nouns.index(noun)]}
      others = [1] * (have.items[nouns.index(noun)].text == noun and bool(before & {'a', 'an', 'single', 'lone'}))
    if others or count > LISTED:
      yield text + (f' ({others[0]} written)' if len(others) == 1 else '')


def _surplus_nouns(clause: Clause, written: str) -> Iterator[str]:
  """'no X' and 'without X' where a sentence of the rewrite has X and no negation."""
  sentences = [wording.split(sentence) for sentence in re.split(r'[.;!?]', written)]
  sentences = [[_singular(word) for word in words] for words in sentences if not set(words) & _NEGATIONS]
  for i, item in enumerate(clause.items):
    if item.text not in ('no', 'without') or i + 1 not in clause.negated:
      continue
    end = i + 1
    while end in clause.negated and clause.items[end].text not in FUNCTION - INDEFINITE - DEFINITE:
      end += 1
    phrase = [word for part in clause.items[i + 1:end] for word in part.text.split()
              if word not in INDEFINITE | DEFINITE]
    ends = end == len(clause.items) or clause.items[end].kind == 'stop'
    if not 0 < len(phrase) <= 3 or clause.edit and not (ends and item.text == 'no'):
      continue
    nouns = [_singular(word) for word in phrase]
    if any(words[k:k + len(nouns)] == nouns for words in sentences for k in range(len(words))):
      yield ' '.join(phrase)
