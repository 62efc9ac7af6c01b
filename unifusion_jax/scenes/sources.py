"""Source of the embedded world's records (data/sources.py), and its checks of a recipe's DataConfig."""

import collections
import dataclasses
import itertools
import math
from typing import Any, ClassVar

from unifusion_jax.data import sources
from unifusion_jax.scenes import examples, world

ASPECTS = {f'{width}:{height}': name for name, (width, height) in world.ASPECTS.items()}  # as in data.aspects


def problems(data, unit: int) -> list[str]:
  """Settings of a DataConfig that scenes cannot meet, a sentence each; canvas sides are multiples of `unit` pixels."""
  wrong = []
  sides = sorted({side for aspect in world.ASPECTS for side in world.canvas(aspect, data.size)})
  if data.size < 1 or any(side % unit for side in sides):
    wrong.append(f'data.size={data.size} makes canvases with sides of {sides}, which must be multiples of {unit} '
                 'pixels (a latent patch): take a multiple of 64')
  if not data.aspects or not set(data.aspects) <= set(ASPECTS):
    wrong.append(f'data.aspects={data.aspects}: scenes are drawn in {", ".join(ASPECTS)}: name some of these')
  for task in data.tasks:
    name, slash, objects = task.name.partition('/')
    least, dash, most = objects.partition('-')
    if slash and not (dash and least.isdigit() and most.isdigit() and 1 <= int(least) <= int(most) <= 4
                      and int(most) > 1):
      wrong.append(f'data.tasks: {task.name!r} must name how many objects its scenes start with as in {name}/1-2, from '
                   '1 to 4 and not 1 alone')
  return wrong


def mix(data, split: str, seed: int) -> list[tuple[Any, float]]:
  """(source, weight) for each task and each number of tiles of a DataConfig.

  In the wider world references are larger by the root of the number of tiles, so that more tiles show more detail.
  """
  wide = data.path == 'scenes/wide'
  weighted = []
  for task in data.chosen:
    for tiles in data.tiles:
      source = SceneSource(task.name, split, data.size, seed, wide=wide, magnified=math.isqrt(tiles) if wide else 1,
                           aspects=tuple(ASPECTS[aspect] for aspect in data.aspects))
      if len(data.tiles) > 1:
        source = sources.InTiles(source, tiles)
      weighted.append((source, task.weight / len(data.tiles)))
  return weighted


class SceneSource:
  """Examples of the embedded world, made on access: example i is a pure function of (task, split, seed, i).

  A task may limit the objects that its scenes start with, as in 'edit/1-2'. wide: train is of the wider world.
  magnified: size of the references relative to `size`. aspects: of the targets, names in world.ASPECTS; `buckets` has
  no others.
  """

  def __init__(self, task: str, split: str, size: int = 64, seed: int = 0, length: int = 2 ** 30, *,
               wide: bool = False, magnified: int = 1, aspects: tuple[str, ...] = tuple(world.ASPECTS)):
    self.name = f'scenes{"/wide" if wide else ""} {task} {split} {size} px, seed {seed}'
    self._canvases = {world.canvas(aspect, size)[::-1] for aspect in aspects}
    self._wide, self._reference_size = wide, size * magnified
    self._named = task
    task, _, objects = task.partition('/')
    self._objects = tuple(int(n) for n in objects.split('-')) if objects else (1, 4)
    self._task, self._split, self._size, self._seed, self._length = task, split, size, seed, length

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, i: int) -> dict:
    record = examples.example(self._task, self._split, int(i), self._seed, self._size, self._objects,
                              wide=self._wide, reference_size=self._reference_size)
    return {**record, 'task': self._named}

  def bucket(self, i: int) -> tuple[int, int, int]:
    width, height = world.canvas(examples.aspect(self._task, self._split, int(i), self._seed), self._size)
    return height, width, examples.references(self._task, self._split, int(i), self._seed)

  def buckets(self) -> dict[tuple[int, int, int], tuple[float, '_Indices']]:
    """Bucket -> (its share of the examples, the indices of its examples), without walking through all of them."""
    sample = [self.bucket(i) for i in range(min(self._length, 500))]
    sample = [bucket for bucket in sample if bucket[:2] in self._canvases]
    counts = collections.Counter(sample)
    return {bucket: (count / len(sample), _Indices(self, bucket)) for bucket, count in counts.items()}


@dataclasses.dataclass
class _Indices:
  """Indices of one bucket of a SceneSource: the k-th is the first such index from k * BLOCK on.

  Each is found in a few steps. No two are equal unless a block has no example of the bucket, and a bucket as rare as
  that is hardly in the sample of `buckets`.
  """

  source: SceneSource
  bucket: tuple[int, int, int]
  BLOCK: ClassVar[int] = 256

  def __len__(self) -> int:
    return max(1, len(self.source) // self.BLOCK)

  def __getitem__(self, k: int) -> int:
    return next(i for i in itertools.count(k * self.BLOCK) if self.source.bucket(i) == self.bucket)
