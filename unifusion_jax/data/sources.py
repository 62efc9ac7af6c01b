"""Random-access sources of raw records: scenes drawn on the fly, a user's own folder, prepared TFDS folders.

A source has a `name`, `len(source)`, `source[i]` -> record, and `source.bucket(i)` -> (height, width, number of
references), the shape of example i without reading all of it, None where it is already known that record i cannot be
used. Where walking through all of them would take too long it also has `buckets()`, see SceneSource.

A record is {'references': [uint8 [y x 3]], 'instruction': str, 'target': uint8 [height width 3], 'caption': str,
'kind': str, ...}: the image wanted, its full caption, and what was asked for, given the references.
"""

import collections
from collections.abc import Sequence
import concurrent.futures
import dataclasses
import itertools
import json
import math
import pathlib
from typing import ClassVar

from absl import logging
import numpy as np

from unifusion_jax.data import imaging
from unifusion_jax.errors import UserError
from unifusion_jax.scenes import examples, world

COLUMNS = ('references', 'instruction', 'target', 'caption')


class BrokenRecord(UserError):
  """One record that cannot be used. The pipeline passes over it and counts it; any other error stops the run."""


class SceneSource:
  """Examples of the embedded world, drawn when asked for: example i is a pure function of (task, split, seed, i).

  A task may name how many objects its scenes start with, as in 'edit/1-2'.
  """

  def __init__(self, task: str, split: str, size: int = 64, seed: int = 0, length: int = 2 ** 30):
    self.name = f'scenes {task} {split} {size} px, seed {seed}'
    self._named = task
    task, _, objects = task.partition('/')
    self._objects = tuple(int(n) for n in objects.split('-')) if objects else (1, 4)
    self._task, self._split, self._size, self._seed, self._length = task, split, size, seed, length

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, i: int) -> dict:
    record = examples.example(self._task, self._split, int(i), self._seed, self._size, self._objects)
    return {**record, 'task': self._named}

  def bucket(self, i: int) -> tuple[int, int, int]:
    width, height = world.canvas(examples.aspect(self._task, self._split, int(i), self._seed), self._size)
    return height, width, examples.references(self._task, self._split, int(i), self._seed)

  def buckets(self) -> dict[tuple[int, int, int], tuple[float, Sequence[int]]]:
    """Bucket -> (its share of the examples, the indices of its examples), without walking through all of them."""
    sample = [self.bucket(i) for i in range(min(self._length, 500))]
    counts = collections.Counter(sample)
    return {bucket: (count / len(sample), _Drawn(self, bucket)) for bucket, count in counts.items()}


@dataclasses.dataclass
class _Drawn:
  """The indices of one bucket of a SceneSource: the k-th is the first such index from k x BLOCK on.

  So any of them is found in a few steps, and no two are the same: a bucket that is rarer than one in BLOCK examples
  would be missing from the sample that named it.
  """

  source: SceneSource
  bucket: tuple[int, int, int]
  BLOCK: ClassVar[int] = 256

  def __len__(self) -> int:
    return max(1, len(self.source) // self.BLOCK)

  def __getitem__(self, k: int) -> int:
    return next(i for i in itertools.count(k * self.BLOCK) if self.source.bucket(i) == self.bucket)


class ArrayRecordSource:
  """Scenes that `scenes/builder.py` wrote below `folder`, read without TensorFlow."""

  def __init__(self, folder, task: str, split: str):
    path = pathlib.Path(folder) / 'scenes' / f'{task.replace("/", "_")}_{split}' / '1.0.0'
    if not (path / 'dataset_info.json').is_file():
      raise UserError(f'{path} is not there: write it with python -m unifusion_jax.scenes.builder '
                       f'--out={folder} --task={task} --split={split}')
    self.name = str(path)
    import tensorflow_datasets as tfds  # a second that other sources need not spend
    builder = tfds.builder_from_directory(path)
    self._shapes = np.array(builder.info.metadata['shapes'], np.int32)
    self._records = builder.as_data_source(split)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, i: int) -> dict:
    return {name: _text(value) for name, value in self._records[int(i)].items()}

  def bucket(self, i: int) -> tuple[int, int, int]:
    return tuple(int(n) for n in self._shapes[i])


def _text(value):
  """bytes as str, also in lists."""
  if isinstance(value, bytes):
    return value.decode()
  return [_text(v) for v in value] if isinstance(value, list) else value


class FolderSource:
  """A user's own images, listed in a .jsonl or .parquet file with the columns of COLUMNS.

  `references` is a list of paths and `target` one path, relative to the file; `kind`, `tags` and any other column are
  kept in the record. Targets are scaled to cover the nearest in aspect of `buckets`, (height, width) each, and cut at
  the centre. Records that cannot be used (a malformed line, a missing or undecodable target, an empty caption,
  references without an instruction) are found in one pass over the headers at the start and listed in `problems`; more
  than `share` of them is a ValueError.
  """

  def __init__(self, path, buckets=((512, 512),), share: float = 0.01, threads: int = 16):
    path = pathlib.Path(path)
    self.name = str(path)
    self.problems: list[str] = []
    self._folder = path.parent
    self._buckets = tuple((int(height), int(width)) for height, width in buckets)
    if not path.is_file():
      raise UserError(f'{path} is not there (or is no file): give a .jsonl or .parquet file')
    if path.suffix not in ('.jsonl', '.parquet'):
      raise UserError(f'{path} is neither .jsonl nor .parquet: give a list of records in one of the two')
    self._rows = _Lines(path) if path.suffix == '.jsonl' else _Table(path)
    if not len(self._rows):
      raise UserError(f'{path} has no records: give one line (or row) for each example')
    self._shapes = self._survey(threads)
    if len(self.problems) > share * len(self):
      raise UserError(f'{path}: {len(self.problems)} of {len(self)} records cannot be used, more than the allowed '
                       f'share of {share:g}: mend the list or allow more. '
                       f'The first are: {"; ".join(self.problems[:3])}')
    if self.problems:
      logging.warning('%s: %d of %d records cannot be used and are left out; the first: %s', path, len(self.problems), len(self),
                      '; '.join(self.problems[:3]))

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, i: int) -> dict:
    try:
      row = self._rows[int(i)]
      _check_text(row)
      references = [imaging.read(self._folder / path) for path in row['references']]
      target = imaging.read(self._folder / row['target'])
    except ValueError as error:
      raise BrokenRecord(f'{self._rows.where(i)}: {error}') from error
    height, width = self._nearest(*target.shape[:2])
    return {'kind': 'edit' if references else 't2i', **row, 'references': references,
            'target': imaging.resize_cover(target, width, height)}

  def bucket(self, i: int) -> tuple[int, int, int] | None:
    which, references = self._shapes[i]
    return None if which < 0 else (*self._buckets[which], int(references))

  def _nearest(self, height: int, width: int) -> tuple[int, int]:
    return min(self._buckets, key=lambda bucket: abs(math.log(bucket[1] / bucket[0]) - math.log(width / height)))

  def _survey(self, threads: int) -> np.ndarray:
    """[n 2] i32: which bucket (-1: none, the record is broken) and how many references. Fills `problems`."""
    shapes = np.full((len(self), 2), -1, np.int32)
    reasons: dict[int, str] = {}
    wanted: dict[str, list[int]] = {}
    for i in range(len(self)):
      try:
        row = self._rows[i]
        shapes[i, 1] = len(row['references'])
        wanted.setdefault(row['target'], []).append(i)
        _check_text(row)
      except ValueError as error:
        reasons[i] = str(error)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
      for found, rows in zip(pool.map(self._bucket_of, wanted), wanted.values()):
        for i in rows:
          if isinstance(found, str):
            reasons.setdefault(i, found)
          elif i not in reasons:
            shapes[i, 0] = found
    self.problems = [f'{self._rows.where(i)}: {reasons[i]}' for i in sorted(reasons)]
    return shapes

  def _bucket_of(self, target: str) -> int | str:
    """The index of the bucket of one image, or why it has none."""
    try:
      return self._buckets.index(self._nearest(*imaging.read_size(self._folder / target)))
    except ValueError as error:
      return str(error)


def _check_text(row: dict) -> None:
  if not row['caption'].strip():
    raise UserError('the caption is empty: write what the target shows')
  if row['references'] and not row['instruction'].strip():
    raise UserError('there are references but no instruction: write what is to be done with them')


def _check_row(row) -> dict:
  """The row when it has the columns in their types; ValueError where it does not."""
  if not isinstance(row, dict):
    raise UserError(f'it is a {type(row).__name__}: wanted an object with {", ".join(COLUMNS)}')
  missing = [name for name in COLUMNS if name not in row]
  if missing:
    raise UserError(f'it has no {", ".join(missing)}: every record wants {", ".join(COLUMNS)}')
  for name in ('instruction', 'target', 'caption'):
    if not isinstance(row[name], str):
      raise UserError(f'{name} is {row[name]!r}, wanted text')
  if not isinstance(row['references'], list) or not all(isinstance(path, str) for path in row['references']):
    raise UserError(f'references is {row["references"]!r}, wanted a list of paths (empty for none)')
  return row


class _Lines:
  """The rows of a JSON-lines file, found by their offsets, so that a long list takes eight bytes a row."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    offsets, numbers, at = [], [], 0
    with path.open('rb') as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          offsets.append(at)
          numbers.append(number)
        at += len(line)
    self._offsets, self._numbers = np.array(offsets, np.int64), np.array(numbers, np.int64)

  def __len__(self) -> int:
    return len(self._offsets)

  def __getitem__(self, i: int) -> dict:
    with self._path.open('rb') as file:
      file.seek(self._offsets[i])
      line = file.readline()
    try:
      row = json.loads(line.decode('utf-8-sig'))
    except ValueError as error:
      raise UserError(f'it is not JSON ({error})') from error
    return _check_row(row)

  def where(self, i: int) -> str:
    return f'{self._path} line {self._numbers[i]}'


class _Table:
  """The rows of a Parquet file, held as columns."""

  def __init__(self, path: pathlib.Path):
    import pyarrow.parquet  # a slow import that other sources need not
    self._path = path
    try:
      self._table = pyarrow.parquet.read_table(path)
    except (OSError, ValueError) as error:
      raise UserError(f'{path} is not a Parquet file that can be read ({error}): replace it') from error
    missing = [name for name in COLUMNS if name not in self._table.column_names]
    if missing:
      raise UserError(f'{path} has no column {", ".join(missing)}: it wants {", ".join(COLUMNS)}')

  def __len__(self) -> int:
    return self._table.num_rows

  def __getitem__(self, i: int) -> dict:
    return _check_row({name: self._table[name][i].as_py() for name in self._table.column_names})

  def where(self, i: int) -> str:
    return f'{self._path} row {i + 1}'
