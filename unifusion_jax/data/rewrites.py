"""Tables of the rewrites that commands/rewrite.py wrote offline, by request."""

import hashlib
import json
import pathlib

import numpy as np

from unifusion_jax.errors import UserError

SETTINGS = 'settings.json'


def key(record: dict) -> str:
  """The key of a request: a digest of its text and the pixels of its references."""
  digest = hashlib.sha256((record['instruction'] or record['caption']).encode())
  for reference in record['references']:
    digest.update(repr(reference.shape).encode() + np.ascontiguousarray(reference).tobytes())
  return digest.hexdigest()[:32]


class Table:
  """Rewrites of a folder by key, a list of token ids each; memory holds only the offsets of their lines."""

  def __init__(self, folder):
    self.folder = pathlib.Path(folder)
    self._places = {}
    for path in sorted(self.folder.glob('rewrites-*.jsonl')):
      offset = 0
      with path.open('rb') as file:
        for line in file:
          if line.endswith(b'\n'):
            self._places[json.loads(line)['key']] = path, offset
          offset += len(line)
    if not self._places:
      raise UserError(f'{folder} holds no rewrites: write them with --mode=rewrite')

  def __len__(self) -> int:
    return len(self._places)

  def __getitem__(self, name: str) -> list[list[int]]:
    path, offset = self._places[name]
    with path.open('rb') as file:
      file.seek(offset)
      return json.loads(file.readline())['ids']
