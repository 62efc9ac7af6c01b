"""Folders of a user's own records in ArrayRecord files, as data/convert.py writes them.

  dataset.json                  {"format", "shards", "made_of"}: how many shards there are, and what they were made of
  00003-of-00064.arrayrecord    records: msgpack maps of lists.COLUMNS, whose images are encoded bytes
  00003-of-00064.json           {"records", "broken", "reasons", "shapes"}, written last: with it the shard is whole

`shapes` has height and width of the target and the number of references of each record, so that nothing is read for
the buckets: int32 [records 3], little-endian, zlib, base64. Height and width are those after the EXIF turn.

Folders lie on this machine, or on a mount, or at gs:// addresses: ArrayRecord itself reads the byte ranges of a record
there, with Google's application default credentials.
"""

import base64
from collections.abc import Iterator
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import tempfile
import zlib

import msgpack
import numpy as np

from unifusion_jax.data import lists, storage
from unifusion_jax.errors import clipped, UserError

ABOUT = 'dataset.json'
FORMAT = 1
OPTIONS = 'group_size:1,uncompressed'  # one record to a read; images are compressed already
READERS = 32  # small files that are read at a time


def is_there(folder) -> bool:
  """Whether a path or address is such a folder."""
  return storage.exists(storage.join(folder, ABOUT))


def name(number: int, count: int) -> str:
  """The name of a shard's files without their suffix."""
  return f'{number:05d}-of-{count:05d}'


def about(folder) -> dict:
  """dataset.json; UserError where it cannot be read."""
  made = _json(storage.join(folder, ABOUT))
  if made.get('format') != FORMAT or not isinstance(made.get('shards'), int):
    raise UserError(f'{folder}/{ABOUT} is of format {made.get("format")!r} and this program reads {FORMAT}: '
                    'convert the data again')
  return made


def begin(folder, count: int, made_of: dict) -> None:
  """Makes a folder for `count` shards, or checks that the one there was made of the same: UserError if not."""
  if not storage.is_address(folder):
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
  new = dict(format=FORMAT, shards=count, made_of=made_of)
  if not is_there(folder):
    return storage.write(storage.join(folder, ABOUT), json.dumps(new, indent=1).encode())
  old = about(folder)
  others = [key for key in made_of if old.get('made_of', {}).get(key) != made_of[key]]
  if old['shards'] != count:
    others.append('shards')
  if others:
    raise UserError(f'{folder} was begun with other {", ".join(others)}: give another --output, or remove that folder')


def whole(folder, count: int) -> dict[int, dict]:
  """{number: its JSON} of the shards that are whole."""
  files, root = storage.filesystem(folder)
  there = {path.rpartition('/')[2] for path in files.ls(root, detail=False)}
  numbers = [number for number in range(count) if f'{name(number, count)}.json' in there]
  with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
    reports = pool.map(lambda number: _json(storage.join(folder, f'{name(number, count)}.json')), numbers)
    return dict(zip(numbers, reports))


def write(folder, number: int, count: int, rows: Iterator[tuple[dict, tuple]], report: dict) -> dict:
  """Writes a shard, whole or not at all.

  rows: (row, (height, width, references)) of each record; images are encoded bytes.
  report: what else its JSON says, once all rows are read.  Returns that JSON.
  """
  from array_record.python import array_record_module
  path, shapes = storage.join(folder, name(number, count)), []
  with tempfile.TemporaryDirectory() as temporary:
    there = storage.is_address(folder)
    local = pathlib.Path(temporary) / 'shard' if there else storage.partial_name(f'{path}.arrayrecord')
    writer = array_record_module.ArrayRecordWriter(str(local), OPTIONS)
    for row, shape in rows:
      writer.write(msgpack.packb({column: row[column] for column in lists.COLUMNS}))
      shapes.append(shape)
    writer.close()
    if there:
      files, remote = storage.filesystem(f'{path}.arrayrecord')
      files.put_file(str(local), remote)
    else:
      os.replace(local, f'{path}.arrayrecord')
  report = dict(records=len(shapes), **report, shapes=_encoded(shapes))
  storage.write(f'{path}.json', json.dumps(report).encode())
  return report


class Shards:
  """A list of records (see lists.py) whose raw rows are the bytes of ArrayRecord files; `shapes` is int32 [records 3].

  UserError where shards are missing.
  """

  def __init__(self, folder):
    self._folder = str(folder).rstrip('/')
    count = about(self._folder)['shards']
    if storage.is_address(folder) and not self._folder.startswith('gs://'):
      raise UserError(f'{folder}: ArrayRecord reads folders and gs:// addresses: mount the bucket, or copy the folder '
                      'to this machine')
    reports = whole(self._folder, count)
    if missing := [number for number in range(count) if number not in reports]:
      raise UserError(f'{folder} has {len(reports)} of {count} shards; the first that is missing is '
                      f'{name(missing[0], count)}: run the same conversion again, it does what is left')
    files = [_File(storage.join(self._folder, f'{name(number, count)}.arrayrecord'), report['records'])
             for number, report in sorted(reports.items()) if report['records']]
    if not files:
      raise UserError(f'{folder} has no records in its {count} shards')
    import grain
    self._files = [file.filename for file in files]
    self._starts = np.cumsum([0, *(file.take for file in files)])
    self._shapes = [report['shapes'] for _, report in sorted(reports.items())]
    self._records = grain.sources.ArrayRecordDataSource(files)

  @property
  def shapes(self) -> np.ndarray:
    """Height and width of the target and number of references of each record."""
    shapes = np.concatenate([_decoded(text) for text in self._shapes])
    if len(shapes) != len(self):
      raise UserError(f'{self._folder} has shapes of {len(shapes)} records for {len(self)}: convert the data again')
    return shapes

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, i: int) -> bytes:
    try:
      return self._records[i]
    except Exception as error:  # of many types: what it raises is ArrayRecord's choice
      raise UserError(f'{self.where(i)} cannot be read ({clipped(error)}): if the file is damaged, remove it and its '
                      '.json and run the same conversion again') from error

  def __iter__(self) -> Iterator[bytes]:
    return (self[i] for i in range(len(self)))

  def parse(self, raw: bytes) -> dict:
    try:
      row = msgpack.unpackb(raw)
    except Exception as error:  # of many types
      raise UserError(f'it is no msgpack ({clipped(error, 150) or type(error).__name__})') from error
    return lists.checked(row)

  def where(self, i: int) -> str:
    shard = int(np.searchsorted(self._starts, i, 'right')) - 1
    return f'{self._files[shard]} record {i - int(self._starts[shard])}'


@dataclasses.dataclass(frozen=True)
class _File:
  """A shard in the words of array_record's FileInstruction, which spares it from opening each file for its length."""
  filename: str
  take: int
  skip: int = 0

  @property
  def examples_in_shard(self) -> int:
    return self.take


def _encoded(shapes: list[tuple]) -> str:
  return base64.b64encode(zlib.compress(np.array(shapes, '<i4').tobytes())).decode()


def _decoded(text: str) -> np.ndarray:
  return np.frombuffer(zlib.decompress(base64.b64decode(text)), '<i4').reshape(-1, 3)


def _json(path: str) -> dict:
  """The object in a JSON file; UserError where there is none."""
  try:
    value = json.loads(storage.read(path))
  except FileNotFoundError as error:
    raise UserError(f'{path} is not there: give a folder that unifusion_jax.data.convert wrote') from error
  except ValueError as error:
    raise UserError(f'{path} is no JSON ({clipped(error, 100)}): remove it and run the conversion again') from error
  if not isinstance(value, dict):
    raise UserError(f'{path} holds a {type(value).__name__}, no object: remove it, and run the same conversion again')
  return value
