"""Tables of the rewrites that commands/rewrite.py wrote offline, by request."""

from collections.abc import Iterator
import hashlib
import json
import pathlib

import numpy as np

from unifusion_jax import bucket
from unifusion_jax.errors import clipped, UserError

SETTINGS = 'settings.json'


def local(folder: str) -> pathlib.Path:
  """The folder of rewrites that a setting names; of one in a bucket a copy here."""
  if not bucket.is_address(folder):
    return pathlib.Path(folder)
  return bucket.fetched(folder, [name for name in bucket.names(folder) if name.endswith(('.jsonl', SETTINGS))])


def key(record: dict) -> str:
  """The key of a request: a digest of its text and the pixels of its references."""
  digest = hashlib.sha256((record['instruction'] or record['caption']).encode())
  for reference in record['references']:
    digest.update(repr(reference.shape).encode() + np.ascontiguousarray(reference).tobytes())
  return digest.hexdigest()[:32]


def lines(path: pathlib.Path) -> Iterator[tuple[int, dict]]:
  """(offset, line) of each whole line of a file of rewrites; a last one without an end was interrupted.

  UserError naming file and line for one that is damaged.
  """
  offset = 0
  with path.open('rb') as file:
    for number, line in enumerate(file, 1):
      if line.endswith(b'\n'):
        yield offset, _line(line, f'{path} line {number}')
      offset += len(line)


def _line(line: bytes, place: str) -> dict:
  try:
    row = json.loads(line)
    ids = [int(i) for written in row['ids'] for i in written]
    if isinstance(row['key'], str) and all(0 <= i < 2 ** 31 for i in ids):
      return row
    reason = 'its key or ids are of another kind'
  except (ValueError, TypeError, KeyError, RecursionError) as error:
    reason = f'{type(error).__name__}: {clipped(error, 100)}'
  raise UserError(f'{place} is damaged ({reason}): remove the line, and run --mode=rewrite again')


class Table:
  """Rewrites of a folder by key, a list of token ids each; memory holds only the offsets of their lines."""

  def __init__(self, folder):
    self.folder = local(folder)
    self._places = {line['key']: (path, offset) for path in sorted(self.folder.glob('rewrites-*.jsonl'))
                    for offset, line in lines(path)}
    if not self._places:
      raise UserError(f'{folder} holds no rewrites: write them with --mode=rewrite')

  def __len__(self) -> int:
    return len(self._places)

  def __getitem__(self, name: str) -> list[list[int]]:
    path, offset = self._places[name]
    with path.open('rb') as file:
      file.seek(offset)
      return _line(file.readline(), f'{path} at byte {offset}')['ids']
