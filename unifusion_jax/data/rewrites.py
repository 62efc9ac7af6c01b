"""What the VLM wrote offline (`rewrite.py`), beside the records of a source that it was written for."""

import hashlib
import json
import pathlib

import numpy as np

from unifusion_jax.data.sources import BrokenRecord
from unifusion_jax.errors import UserError

SETTINGS = 'settings.json'


def key(record: dict) -> str:
  """What a request is known by: its text and the pixels of its references."""
  digest = hashlib.sha256((record['instruction'] or record['caption']).encode())
  for reference in record['references']:
    digest.update(repr(reference.shape).encode() + np.ascontiguousarray(reference).tobytes())
  return digest.hexdigest()[:32]


class Rewritten:
  """Another source, each record with its `rewrites`: the ids that the VLM wrote, a list for each rewrite."""

  def __init__(self, source, table: 'Table'):
    self.name = f'{source.name}, rewritten'
    self._source = source
    self._table = table
    if hasattr(source, 'buckets'):
      self.buckets = source.buckets

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int) -> dict:
    record = self._source[i]
    try:
      return dict(record, rewrites=self._table[key(record)])
    except KeyError:
      raise BrokenRecord(f'{self._source.name} record {i} has no rewrite in {self._table.folder}: run '
                                 '--mode=rewrite over this data') from None

  def bucket(self, i: int):
    return self._source.bucket(i)


class Table:
  """The rewrites of a folder by key, read when asked for: a key takes a few dozen bytes of memory."""

  def __init__(self, folder):
    self.folder = pathlib.Path(folder)
    self._places = {}
    for path in sorted(self.folder.glob('rewrites-*.jsonl')):
      at = 0
      with path.open('rb') as file:
        for line in file:
          if line.endswith(b'\n'):
            self._places[json.loads(line)['key']] = path, at
          at += len(line)
    if not self._places:
      raise UserError(f'{folder} holds no rewrites: write them with --mode=rewrite')

  def __len__(self) -> int:
    return len(self._places)

  def __getitem__(self, name: str) -> list[list[int]]:
    path, at = self._places[name]
    with path.open('rb') as file:
      file.seek(at)
      return json.loads(file.readline())['ids']
