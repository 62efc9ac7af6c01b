"""Records of a benchmark: a prompt with its categories, questions and images, whatever its set's files look like."""

from collections.abc import Callable, Sequence
import dataclasses
import re

import numpy as np

from unifusion_jax.errors import clipped, UserError

_NAME = re.compile(r'\w[\w.\- ]*')  # of a file or folder, here and on every scorer's machine


@dataclasses.dataclass(frozen=True)
class Question:
  """A question about the image of a prompt.

  Attributes:
    answer: the right one: 'yes', a number as a word, or another word.
    category: '' for none.
    broad: the category that holds it, '' for none.
    parents: indices, in the record, of the questions that must be answered rightly for this one to count.
  """
  text: str
  answer: str = 'yes'
  category: str = ''
  parents: tuple[int, ...] = ()
  broad: str = ''

  @property
  def all_categories(self) -> tuple[str, ...]:
    """Its category and the one that holds it, where there are."""
    return tuple(filter(None, (self.category, self.broad)))


@dataclasses.dataclass(frozen=True)
class Record:
  """A prompt of a set.

  Attributes:
    id: its name in the set, unique there.
    prompt: what is asked for; with references an instruction.
    place: file and line, for messages.
    caption: what the image is to show; '' where an edit has no such text.
    references: paths or encoded bytes, in the order shown.
    target: the true image, a path, encoded bytes or pixels; None where there is none.
    folder: of its file in layouts with folders.
    line: its own line of the set's file, for scorers that want it back.
    exact: says of an image uint8 [y x 3] whether it is right, where that can be known.
  """
  id: str
  prompt: str
  place: str
  categories: tuple[str, ...] = ()
  questions: tuple[Question, ...] = ()
  caption: str = ''
  references: tuple = ()
  target: str | bytes | np.ndarray | None = None
  folder: str = ''
  line: dict | None = None
  exact: Callable[[np.ndarray], bool] | None = None

  @property
  def all_categories(self) -> tuple[str, ...]:
    """Its categories, and then those of its questions."""
    asked = (category for question in self.questions for category in question.all_categories)
    return tuple(dict.fromkeys((*self.categories, *asked)))


def checked(records: Sequence[Record]) -> list[Record]:
  """The records; UserError, with file and line, for one that cannot be used."""
  places = {}
  for record in records:
    if not record.prompt.strip():
      raise UserError(f'{record.place}: its prompt is empty: take the whole file of the set')
    for name in (record.id, *record.folder.split('/')[:bool(record.folder)]):
      if not _NAME.fullmatch(name):
        raise UserError(f'{record.place}: {clipped(name, 80)!r} cannot name a file: letters, digits, dots, dashes, '
                        'blanks and underscores can')
    if record.id in places:
      raise UserError(f'{record.place}: the name {record.id!r} is taken by {places[record.id]}: each prompt wants one '
                      'of its own')
    places[record.id] = record.place
    if missing := [parent for question in record.questions for parent in question.parents
                   if not 0 <= parent < len(record.questions)]:
      raise UserError(f'{record.place}: a question of {record.id!r} depends on question {missing[0] + 1}, which is not '
                      'there')
  return list(records)


def with_parents(questions: Sequence[Question], right: np.ndarray) -> np.ndarray:
  """Whether each question counts, bool [q ...]: answered rightly, and so are those that it depends on.

  Of questions that depend on each other in a circle, as some of OneIG do, all count or none.

  right: bool [q ...].
  """
  counts = np.array(right, bool)
  for _ in questions:  # as often as a chain of parents can be long
    counts = np.stack([counts[i] & np.all([counts[parent] for parent in question.parents], axis=0)
                       for i, question in enumerate(questions)])
  return counts
