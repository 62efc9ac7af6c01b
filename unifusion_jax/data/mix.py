"""Which sources a run reads, from its configuration."""

import pathlib

from unifusion_jax.data import imaging, rewrites, sources
from unifusion_jax.errors import UserError
from unifusion_jax.scenes import world


def mix(data, split: str = 'train', seed: int = 0) -> list[tuple[object, float]]:
  """(source, weight) for each of `data.tasks`; `data` is a config.DataConfig.

  Your own images are all one source, whatever the tasks, but for 'reconstruct', which asks for the targets back.
  With several numbers of tiles each of these comes once for each number.
  """
  made = _mix(data, split, seed)
  if data.rewrites:
    table = rewrites.Table(data.rewrites)
    made = [(rewrites.Rewritten(source, table), weight) for source, weight in made]
  if len(data.tiles) == 1:
    return made
  return [(InTiles(source, tiles), weight / len(data.tiles)) for source, weight in made for tiles in data.tiles]


def _mix(data, split: str, seed: int):
  if data.path == 'scenes':
    return [(sources.SceneSource(task, split, data.size, seed), weight) for task, weight in zip(data.tasks, data.weights)]
  path = pathlib.Path(data.path)
  if path.suffix in ('.jsonl', '.parquet'):
    buckets = tuple(world.canvas(aspect, data.size)[::-1] for aspect in world.ASPECTS)
    own = sources.FolderSource(path, buckets, data.skipped)
    asked = {task: weight for task, weight in zip(data.tasks, data.weights)}
    again = asked.pop('reconstruct', 0.0)
    weighted = [(own, sum(asked.values())), (Reconstruct(own), again)]
    return [(source, weight) for source, weight in weighted if weight]
  if path.is_dir():
    return [(sources.ArrayRecordSource(path, task, split), weight) for task, weight in zip(data.tasks, data.weights)]
  raise UserError(f"data.path={data.path!r} is neither 'scenes' nor a .jsonl or .parquet file nor a folder that "
                          'unifusion_jax.scenes.builder wrote')


class Reconstruct:
  """Images of another source, each asked for again: the target is its own reference."""

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
  """Another source, whose references the VLM is shown in at most so many tiles."""

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
