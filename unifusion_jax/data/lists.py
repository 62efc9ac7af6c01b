"""Lists of records in a user's own file: JSON lines, and Parquet as public sets have it.

A list has
  len(rows), and rows[i] and iter(rows): raw rows. OSError or UserError where the list itself cannot be read.
  rows.parse(raw) -> the row, checked: {'references': [image], 'instruction': str, 'target': image, 'caption': str}, an
    image being a path or encoded bytes. UserError for what is wrong with this row.
  rows.where(i) -> its place, for messages.
"""

import collections
from collections.abc import Iterator
import contextlib
import json
import pathlib
import threading

import numpy as np

from unifusion_jax.data import storage
from unifusion_jax.errors import clipped, UserError

COLUMNS = ('references', 'instruction', 'target', 'caption')
SUFFIXES = ('.jsonl', '.parquet')
CACHE = 2 ** 30  # bytes of row groups that a process keeps of a Parquet file
_BLANK = b'\xef\xbb\xbf \t\r\n'  # the bytes of a UTF-8 BOM, and spaces


def load(path: pathlib.Path) -> 'Lines | Table':
  """The list in a file. UserError where it is neither of the two, or cannot be read."""
  if not path.is_file():
    raise UserError(f'{path} is not there (or is no file): give a .jsonl or .parquet file')
  if path.suffix.lower() not in SUFFIXES:
    raise UserError(f'{path} is neither .jsonl nor .parquet: give a list of records in one of the two')
  rows = Lines(path) if path.suffix.lower() == '.jsonl' else Table(path)
  if not len(rows):
    raise UserError(f'{path} has no records: give one line (or row) for each example')
  return rows


def checked(row) -> dict:
  """A row's columns, and no others; UserError where it lacks one, or has one that cannot be meant."""
  if not isinstance(row, dict):
    raise UserError(f'it is a {type(row).__name__}: wanted an object with {", ".join(COLUMNS)}')
  missing = [name for name in COLUMNS if name not in row]
  if missing:
    raise UserError(f'it has no {", ".join(missing)}: every record wants {", ".join(COLUMNS)}')
  instruction = '' if row['instruction'] is None else _text(row['instruction'], 'instruction')
  caption, references = _text(row['caption'], 'caption'), [] if row['references'] is None else row['references']
  if not isinstance(references, list):
    raise UserError(f'references is {_shown(references)}, wanted a list of paths (empty for none)')
  references = [_image(reference, f'reference {number}') for number, reference in enumerate(references, 1)]
  target = _image(row['target'], 'target')
  if not caption.strip():
    raise UserError('the caption is empty: write what the target shows')
  if references and not instruction.strip():
    raise UserError('there are references but no instruction: write what to do with them')
  return dict(references=references, instruction=instruction, target=target, caption=caption)


def _text(text, name: str) -> str:
  if not isinstance(text, str):
    raise UserError(f'{name} is {_shown(text)}, wanted text')
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(f'{name} holds half of a surrogate pair, {text[error.start]!r} at {error.start}, which is no '
                    'character: write it anew') from error
  return text


def _image(image, name: str) -> str | bytes:
  """A path or encoded bytes; public sets have both in a struct, the bytes first."""
  if isinstance(image, dict):
    image = image.get('path') if image.get('bytes') is None else image['bytes']
  if not isinstance(image, (str, bytes)):
    raise UserError(f'{name} is {_shown(image)}, wanted a path')
  if not image:
    raise UserError(f'{name} is empty, wanted a path')
  return image


def image_file(folder, image: str | bytes) -> str | bytes:
  """An image of a list in `folder` for `imaging`: bytes, an address or a path, which may have Windows' backslashes."""
  if isinstance(image, bytes):
    return image
  path = storage.join(folder, image)
  if '\\' in image and not storage.exists(path):
    return storage.join(folder, image.replace('\\', '/'))
  return path


def _shown(value) -> str:
  """A value for a message; of what may be long, only the type."""
  return clipped(repr(value), 80) if value is None or isinstance(value, (str, int, float)) else type(value).__name__


class Lines:
  """Rows of a JSON-lines file; memory holds only their offsets and line numbers, sixteen bytes a row."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    with path.open('rb') as file:
      start = file.read(4)
      if b'\0' in start or start.startswith((b'\xff\xfe', b'\xfe\xff')):
        raise UserError(f'{path} is in UTF-16, UTF-32 or no text (its first bytes are {start.hex(" ")}): save it '
                        'as UTF-8')
      file.seek(0)
      places = [(offset, number) for offset, number, _ in numbered_lines(file)]
    self._offsets, self._numbers = np.array(places, np.int64).reshape(-1, 2).T

  def __len__(self) -> int:
    return len(self._offsets)

  def __getitem__(self, i: int) -> bytes:
    with self._path.open('rb') as file:
      file.seek(self._offsets[i])
      return file.readline()

  def __iter__(self) -> Iterator[bytes]:
    with self._path.open('rb') as file:
      yield from (line for _, _, line in numbered_lines(file))

  def parse(self, raw: bytes) -> dict:
    try:
      row = json.loads(raw.decode('utf-8-sig'))
    except (ValueError, RecursionError, MemoryError) as error:
      raise UserError(f'it is not JSON ({clipped(error, 150) or type(error).__name__})') from error
    return checked(row)

  def where(self, i: int) -> str:
    return f'{self._path} line {self._numbers[i]}'


def numbered_lines(file, first: int = 1) -> Iterator[tuple[int, int, bytes]]:
  """(offset, number, line) of each line that is not blank; the first line of the open file is counted as `first`."""
  offset = 0
  for number, line in enumerate(file, first):
    if line.strip(_BLANK):
      yield offset, number, line
    offset += len(line)


class Table:
  """Rows of a Parquet file: a raw row is (a part of the table, its number there).

  Row groups are read when they are needed, and the last ones kept, as many as `CACHE` allows.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    with self._reading('is not a Parquet file that can be read', 'replace it'):
      file = self._open()
      metadata, names = file.metadata, file.schema_arrow.names
      rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
      if min(rows, default=0) < 0:
        raise ValueError('a row group of less than no rows')
    missing = [name for name in COLUMNS if name not in names]
    if missing:
      raise UserError(f'{path} has no column {", ".join(missing)}: it wants {", ".join(COLUMNS)}')
    self._starts = np.cumsum([0, *rows])
    self._groups, self._lock = collections.OrderedDict(), threading.Lock()

  def _open(self):
    import pyarrow.parquet
    return pyarrow.parquet.ParquetFile(self._path)

  def __getstate__(self) -> dict:  # for worker processes: without what was read
    return dict(self.__dict__, _groups=collections.OrderedDict(), _lock=None)

  def __setstate__(self, state: dict) -> None:
    self.__dict__.update(state, _lock=threading.Lock())

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, i: int) -> tuple:
    group = int(np.searchsorted(self._starts, i, 'right')) - 1
    with self._lock:
      if group not in self._groups:
        with self._reading():
          self._groups[group] = self._open().read_row_group(group, list(COLUMNS))
        while len(self._groups) > 1 and sum(table.nbytes for table in self._groups.values()) > CACHE:
          self._groups.popitem(last=False)
      self._groups.move_to_end(group)
      return self._groups[group], i - int(self._starts[group])

  def __iter__(self) -> Iterator[tuple]:
    with self._reading():
      for part in self._open().iter_batches(256, columns=list(COLUMNS)):
        yield from ((part, i) for i in range(part.num_rows))

  @contextlib.contextmanager
  def _reading(self, fault: str = 'cannot be read', advice: str = 'replace it, or write it in smaller row groups'):
    """Arrow's errors, of many types, as a UserError."""
    import pyarrow  # here, as the import takes a while
    try:
      yield
    except (OSError, ValueError, pyarrow.ArrowException) as error:
      raise UserError(f'{self._path} {fault} ({clipped(error)}): {advice}') from error

  def parse(self, raw: tuple) -> dict:
    part, i = raw
    try:
      row = {name: part[name][i].as_py() for name in COLUMNS}
    except ValueError as error:
      raise UserError(f'it is not what the file says it is ({clipped(error, 150)})') from error
    return checked(row)

  def where(self, i: int) -> str:
    return f'{self._path} row {i + 1}'
