"""Random-access sources of raw records: a user's own list of images, prepared TFDS folders, and sources around others.

A source has
  name, len(source).
  source[i] -> record; BrokenRecord where it cannot be used.
  bucket(i) -> (height, width, number of references) of example i without reading all of it; None for a record that is
    known to be broken.
  shapes() -> the buckets of all examples at once, int32 [examples 3], -1 for broken ones; only where it is quicker.
  buckets() -> {bucket: (its share of the examples, the indices of its examples)}, only in sources too long to walk
    through.
  where(i) -> the place of example i for messages, its file and line; only in sources of files.

A record is {'references': [uint8 [y x 3]], 'instruction': str, 'target': uint8 [height width 3], 'caption': str,
'kind': str}: reference images, request, target image and its full caption. `task`, `tiles` and `rewrites` are settings:
only the sources of scenes, `InTiles` and `Rewritten` add them, never a column of a user's own.
"""

import collections
from collections.abc import Iterator
import concurrent.futures
import pathlib
import traceback
from typing import Any

from absl import logging
import numpy as np

from unifusion_jax.data import buckets as bucketing
from unifusion_jax.data import imaging, lists, rewrites, shards, storage
from unifusion_jax.errors import BrokenRecord, clipped, UserError

READ_AHEAD = 64  # records of a list that are read whole at the start
BLOCK = 2 ** 16  # paths of a list that are looked at together


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
    self._records: Any = builder.as_data_source(split)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, i: int) -> dict:
    try:
      return {name: _text(value) for name, value in self._records[int(i)].items()}
    except Exception as error:  # of many types: what decodes it is TFDS's choice
      raise BrokenRecord(f'{where(self, i)}: {reason(error)}') from error

  def bucket(self, i: int) -> tuple[int, int, int]:
    height, width, references = map(int, self._shapes[i])
    return height, width, references


def _text(value):
  """bytes as str, also in lists."""
  if isinstance(value, bytes):
    return value.decode()
  return [_text(v) for v in value] if isinstance(value, list) else value


def where(source, i: int) -> str:
  """The place of example i of a source, for messages."""
  return source.where(i) if hasattr(source, 'where') else f'{source.name} record {i}'


def reason(error: Exception) -> str:
  """What is wrong with a record, for messages. An OSError is the machine's or the list's fault and raised again."""
  if isinstance(error, UserError):
    return clipped(error, 400)
  if isinstance(error, OSError):
    raise error
  logging.log_first_n(logging.WARNING, 'a record failed in a way that was not foreseen:\n%s', 3,
                      ''.join(traceback.format_exception(error)))
  return clipped(f'{type(error).__name__}: {error}', 400)


def shapes_of(source) -> np.ndarray:
  """The buckets of all examples of a source, int32 [examples 3], -1 for broken ones."""
  if hasattr(source, 'shapes'):
    return source.shapes()
  buckets = (source.bucket(i) or (-1, -1, -1) for i in range(len(source)))
  return np.fromiter(buckets, np.dtype((np.int32, 3)), len(source))


def by_bucket(source) -> dict[tuple[int, int, int], np.ndarray]:
  """{bucket: the indices of its examples}, both in order, without the examples that are known to be broken."""
  shapes = shapes_of(source)
  height, width, references = shapes.T.astype(np.int64)
  order = np.argsort((height << 42) + (width << 21) + references, kind='stable')
  order = order[height[order] >= 0]
  ends = np.flatnonzero(np.diff(shapes[order], axis=0).any(axis=1)) + 1
  return {tuple(shapes[members[0]].tolist()): members for members in np.split(order, ends) if len(members)}


class FolderSource:
  """A user's own images, with the columns of lists.COLUMNS: listed in a .jsonl or .parquet file, or in shards.

  `references` is a list of images and `target` one image: a path, relative to the file, an address (storage.py), or
  the encoded bytes in a Parquet file and in shards. A target is scaled to cover the bucket (height, width) nearest in
  aspect, and cut at the centre.

  A finite read-ahead at the start lists broken records in `problems`: all rows with the headers of their targets and
  whether their references are there, and READ_AHEAD records whole; of shards, the latter alone. More than `share` of
  them is a UserError.
  """

  def __init__(self, path, buckets=((512, 512),), share: float = 0.01, threads: int = 16):
    self.name = str(path)
    self._folder = storage.parent(path)
    self._buckets = tuple((int(height), int(width)) for height, width in buckets)
    self._rows = shards.Shards(path) if shards.is_there(path) else lists.load(pathlib.Path(path))
    self._shapes = np.full((len(self), 2), -1, np.int32)  # bucket (-1: broken), number of references
    reasons = self._survey(threads)
    self.problems = [f'{self.where(i)}: {reasons[i]}' for i in sorted(reasons)]
    if len(self.problems) > share * len(self):
      raise UserError(f'{path}: {len(self.problems)} of {len(self)} records cannot be used, more than the allowed '
                      f'share of {share:g}: mend the list or allow more (data.skipped). '
                      f'The first are: {"; ".join(self.problems[:3])}')
    if self.problems:
      logging.warning('%s: %d of %d records cannot be used and are left out; the first: %s', path, len(self.problems),
                      len(self), '; '.join(self.problems[:3]))

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, i: int) -> dict:
    raw = self._rows[int(i)]  # an error here is the list's
    try:
      return self._record(raw, *self._shapes[i])
    except Exception as error:
      raise BrokenRecord(f'{self.where(i)}: {reason(error)}') from error

  def _record(self, raw, bucket: int, count: int) -> dict:
    row = self._rows.parse(raw)
    references = [imaging.read(self._file(reference)) for reference in row['references']]
    target = imaging.read(self._file(row['target']))
    if bucket < 0 or len(references) != count:
      raise UserError('it is another record than at the start: start again to use it')
    target = imaging.resize_cover(target, *self._buckets[bucket][::-1])
    return dict(row, references=references, target=target, kind='edit' if references else 't2i')

  def bucket(self, i: int) -> tuple[int, int, int] | None:
    bucket, references = self._shapes[i]
    return None if bucket < 0 else (*self._buckets[bucket], int(references))

  def where(self, i: int) -> str:
    return self._rows.where(i)

  def shapes(self) -> np.ndarray:
    broken = self._shapes[:, :1] < 0
    sizes = np.array(self._buckets, np.int32)[self._shapes[:, 0]]
    return np.where(broken, -1, np.concatenate([sizes, self._shapes[:, 1:]], axis=1))

  def _file(self, image: str | bytes) -> str | bytes:
    return lists.image_file(self._folder, image)

  def _survey(self, threads: int) -> dict[int, str]:
    """Fills `_shapes` -> why records are broken, by their number."""
    if isinstance(self._rows, shards.Shards):
      shapes = self._rows.shapes
      sizes, size_of = np.unique(shapes[:, :2], axis=0, return_inverse=True)
      nearest = np.array([bucketing.nearest(self._buckets, *size) for size in sizes.tolist()])
      self._shapes[:, 0], self._shapes[:, 1] = nearest[size_of.ravel()], shapes[:, 2]
      ahead, reasons = [self._rows[i] for i in range(min(READ_AHEAD, len(self)))], {}
    else:
      ahead, reasons = self._survey_list(threads)
    sound = [i for i in range(len(ahead)) if i not in reasons]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # each holds whole images
      results = pool.map(_caught(lambda i: self._record(ahead[i], *self._shapes[i]) and None), sound)
      reasons.update({i: reason(result) for i, result in zip(sound, results) if isinstance(result, Exception)})
    self._shapes[list(reasons), 0] = -1
    return reasons

  def _survey_list(self, threads: int) -> tuple[list, dict[int, str]]:
    """Fills `_shapes` from all rows of a list -> (its first raw rows, why records are broken, by their number)."""
    ahead, reasons = [], {}
    targets, references = collections.defaultdict(list), collections.defaultdict(list)  # rows by path

    def look(pool, function, inputs: dict) -> Iterator[tuple[object, list[int]]]:
      """(function(input), its rows), but where it fails: that is noted for the rows."""
      for result, rows in zip(pool.map(_caught(function), inputs), inputs.values()):
        if isinstance(result, Exception):
          reasons.update((i, reason(result)) for i in rows if i not in reasons)
        else:
          yield result, rows

    def look_at_files(pool) -> None:
      for nearest, rows in look(pool, self._nearest, targets):
        self._shapes[rows, 0] = nearest
      for _ in look(pool, lambda path: imaging.check_file(self._file(path)), references):
        pass
      targets.clear()
      references.clear()

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
      for i, raw in enumerate(self._rows):
        try:
          row = self._rows.parse(raw)
          self._shapes[i, 1] = len(row['references'])
          if isinstance(row['target'], bytes):
            self._shapes[i, 0] = self._nearest(row['target'])
          else:
            targets[row['target']].append(i)
          for reference in row['references']:
            if isinstance(reference, str):
              references[reference].append(i)
        except Exception as error:
          reasons[i] = reason(error)
        ahead += [raw] * (i < READ_AHEAD)
        if len(targets) + len(references) > BLOCK:
          look_at_files(pool)
      look_at_files(pool)
    return ahead, reasons

  def _nearest(self, target: str | bytes) -> int:
    """The index of the bucket nearest to a target in aspect."""
    return bucketing.nearest(self._buckets, *imaging.read_size(self._file(target)))


def _caught(function):
  """`function`, returning the exceptions that it raises."""
  def caught(x):
    try:
      return function(x)
    except Exception as error:
      return error
  return caught


def _forward(source, inner) -> None:
  """Gives a source the bound methods of another one that only some have, which it does not change."""
  for name in ('buckets', 'shapes'):
    if hasattr(inner, name):
      setattr(source, name, getattr(inner, name))


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

  def shapes(self) -> np.ndarray:
    shapes = shapes_of(self._source)
    return np.where(shapes < 0, -1, shapes * (1, 1, 0) + (0, 0, 1)).astype(np.int32)

  def where(self, i: int) -> str:
    return where(self._source, i)


class InTiles:
  """Another source, with its references cut into at most `tiles` tiles."""

  def __init__(self, source, tiles: int):
    self.name = f'{source.name} in {tiles} tiles'
    self._source, self._tiles = source, tiles
    _forward(self, source)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int) -> dict:
    return dict(self._source[i], tiles=self._tiles)

  def bucket(self, i: int):
    return self._source.bucket(i)

  def where(self, i: int) -> str:
    return where(self._source, i)


class Rewritten:
  """Another source, with the rewrites of each record under `rewrites`, a list of token ids each."""

  def __init__(self, source, table: rewrites.Table):
    self.name = f'{source.name}, rewritten'
    self._source, self._table = source, table
    _forward(self, source)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int) -> dict:
    record = self._source[i]
    try:
      return dict(record, rewrites=self._table[rewrites.key(record)])
    except KeyError:
      raise BrokenRecord(f'{self.where(i)}: it has no rewrite in {self._table.folder}: run --mode=rewrite over this '
                         'data') from None

  def bucket(self, i: int):
    return self._source.bucket(i)

  def where(self, i: int) -> str:
    return where(self._source, i)
