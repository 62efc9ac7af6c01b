"""Random-access sources of raw records: a user's own list of images, prepared TFDS folders, and sources around others.

A source has
  name, len(source).
  source[i] -> record; BrokenRecord where it cannot be used.
  bucket(i) -> (height, width, number of references) of example i without reading all of it; None for a record that is
    known to be broken.
  buckets() -> {bucket: (its share of the examples, the indices of its examples)}, only in sources too long to walk
    through.

A record is {'references': [uint8 [y x 3]], 'instruction': str, 'target': uint8 [height width 3], 'caption': str,
'kind': str, ...}: reference images, request, target image and its full caption.
"""

import concurrent.futures
import json
import pathlib

from absl import logging
import numpy as np

from unifusion_jax.data import buckets as bucketing
from unifusion_jax.data import imaging, rewrites
from unifusion_jax.errors import BrokenRecord, UserError

COLUMNS = ('references', 'instruction', 'target', 'caption')


class NoDataset(UserError):
  """A prepared folder that has no dataset of a task and split."""


class ArrayRecordSource:
  """A prepared TFDS dataset in ArrayRecord files, DIR/DATASET/TASK_SPLIT/VERSION, read without TensorFlow.

  Its features are those of a record; its metadata has `shapes`, the bucket of each example (see scenes/builder.py).
  """

  def __init__(self, folder, task: str, split: str):
    name = f'{task.replace("/", "_")}_{split}'
    infos = sorted(pathlib.Path(folder).glob(f'*/{name}/*/dataset_info.json'))
    if not infos:
      raise NoDataset(f'{folder} has no dataset {name}/VERSION/dataset_info.json: write it, for scenes with '
                      f'python -m unifusion_jax.scenes.builder --out={folder} --task={task} --split={split}')
    import tensorflow_datasets as tfds  # here, as the import takes half a second
    self.name = str(infos[-1].parent)
    builder = tfds.builder_from_directory(infos[-1].parent)
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
  kept in the record. A target is scaled to cover the bucket (height, width) nearest in aspect, and cut at the centre.
  Broken records (a malformed line, a missing or undecodable target, an empty caption, references without an
  instruction) are listed in `problems` by one pass over the headers at the start; more than `share` of them is a
  UserError.
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
      logging.warning('%s: %d of %d records cannot be used and are left out; the first: %s', path, len(self.problems),
                      len(self), '; '.join(self.problems[:3]))

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
    height, width = self._buckets[bucketing.nearest(self._buckets, *target.shape[:2])]
    return {'kind': 'edit' if references else 't2i', **row, 'references': references,
            'target': imaging.resize_cover(target, width, height)}

  def bucket(self, i: int) -> tuple[int, int, int] | None:
    which, references = self._shapes[i]
    return None if which < 0 else (*self._buckets[which], int(references))

  def _survey(self, threads: int) -> np.ndarray:
    """[n 2] i32: index of the bucket (-1 for a broken record) and number of references. Fills `problems`."""
    shapes = np.full((len(self), 2), -1, np.int32)
    reasons: dict[int, str] = {}
    rows_of: dict[str, list[int]] = {}  # by target
    for i in range(len(self)):
      try:
        row = self._rows[i]
        shapes[i, 1] = len(row['references'])
        rows_of.setdefault(row['target'], []).append(i)
        _check_text(row)
      except ValueError as error:
        reasons[i] = str(error)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
      for bucket, rows in zip(pool.map(self._bucket_of, rows_of), rows_of.values()):
        for i in rows:
          if isinstance(bucket, str):
            reasons.setdefault(i, bucket)
          elif i not in reasons:
            shapes[i, 0] = bucket
    self.problems = [f'{self._rows.where(i)}: {reasons[i]}' for i in sorted(reasons)]
    return shapes

  def _bucket_of(self, target: str) -> int | str:
    """The bucket index of a target, or the reason that it has none."""
    try:
      return bucketing.nearest(self._buckets, *imaging.read_size(self._folder / target))
    except ValueError as error:
      return str(error)


def _check_text(row: dict) -> None:
  if not row['caption'].strip():
    raise UserError('the caption is empty: write what the target shows')
  if row['references'] and not row['instruction'].strip():
    raise UserError('there are references but no instruction: write what to do with them')


def _check_row(row) -> dict:
  """The row, if it has all columns with their types; UserError otherwise."""
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
  """Rows of a JSON-lines file; memory holds only their offsets and line numbers, sixteen bytes a row."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    offsets, numbers, offset = [], [], 0
    with path.open('rb') as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          offsets.append(offset)
          numbers.append(number)
        offset += len(line)
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
  """Rows of a Parquet file, held in memory as columns."""

  def __init__(self, path: pathlib.Path):
    import pyarrow.parquet
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


class Reconstruct:
  """Another source, with each target as its own reference."""

  def __init__(self, source):
    self.name = f'{source.name}, reconstructed'
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int) -> dict:
    record = self._source[i]
    return dict(record, references=[imaging.read(record['target'])], instruction='draw this picture again',
                kind='reconstruct')

  def bucket(self, i: int):
    bucket = self._source.bucket(i)
    return None if bucket is None else (*bucket[:2], 1)


class InTiles:
  """Another source, with its references cut into at most `tiles` tiles."""

  def __init__(self, source, tiles: int):
    self.name = f'{source.name} in {tiles} tiles'
    self._source, self._tiles = source, tiles
    if hasattr(source, 'buckets'):
      self.buckets = source.buckets

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int) -> dict:
    return dict(self._source[i], tiles=self._tiles)

  def bucket(self, i: int):
    return self._source.bucket(i)


class Rewritten:
  """Another source, with the rewrites of each record under `rewrites`, a list of token ids each."""

  def __init__(self, source, table: rewrites.Table):
    self.name = f'{source.name}, rewritten'
    self._source, self._table = source, table
    if hasattr(source, 'buckets'):
      self.buckets = source.buckets

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int) -> dict:
    record = self._source[i]
    try:
      return dict(record, rewrites=self._table[rewrites.key(record)])
    except KeyError:
      raise BrokenRecord(f'{self._source.name} record {i} has no rewrite in {self._table.folder}: run --mode=rewrite '
                         'over this data') from None

  def bucket(self, i: int):
    return self._source.bucket(i)
