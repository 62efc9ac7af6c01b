"""From sources to stacked numpy batches, with grain: bucket, shuffle, shard by process, map, batch, mix.

A batch holds one bucket of one source only, so its arrays have one shape. Every process draws the same sequence of
buckets and takes its own rows of each batch. Batch k is a pure function of the arguments and k, whatever the number
of threads, workers and processes, and the saved state is k.
"""

from collections.abc import Callable, Sequence
import dataclasses
import hashlib

from absl import flags, logging
import grain
import numpy as np

from unifusion_jax.data.sources import BrokenRecord
from unifusion_jax.errors import UserError

# transform(record, rng) -> the arrays of one example
Transform = Callable[[dict, np.random.Generator], dict]
ENDLESS = 2 ** 50  # examples; grain's own endless repeat overflows at one row a process
TRIES = 100  # records of one bucket tried in a row before the run stops


def batches(mix: Sequence[tuple[object, float]], transform: Transform, batch_size: int, seed: int = 0,
            process_index: int = 0, process_count: int = 1, threads: int = 2, workers: int = 0,
            shuffle: bool = True) -> 'Batches':
  """Endless batches of a weighted mix of sources.

  mix: (source, weight) pairs; a source's examples make up weight / sum of weights of all examples.
  batch_size: of all processes together; each gets batch_size / process_count rows.
  threads: batches made at a time in this process. workers: more processes that make batches instead (0 for none).
  Each example carries 'skipped', how many broken records were passed over for it (see `check_skipped`).
  Everything must be picklable when workers > 0. ValueError for sizes that do not divide and for empty sources.
  """
  local = _local_size(batch_size, process_count)
  datasets, weights, made_of = [], [], []
  for source, weight in mix:
    if weight <= 0:
      raise UserError(f'{source.name} has weight {weight}: a source in the mix wants a weight above 0')
    for bucket, (share, indices) in sorted(_buckets(source).items()):
      made_of.append((weight, bucket, len(indices)))  # not the name: a folder may have moved
      weights.append(weight * share)
      positions = grain.MapDataset.range(len(indices)).seed(_seed(seed, len(datasets)))
      positions = positions.shuffle() if shuffle else positions
      # The rng of an example comes from its place in the global order, hence the slice after the map.
      drawn = positions.repeat(ENDLESS // len(indices)).random_map(_Draw(source, indices, transform))
      datasets.append(drawn[process_index::process_count].batch(local))
  if not datasets:
    raise UserError('the mix has no sources: give at least one (source, weight)')
  mixed = grain.MapDataset.mix(datasets, weights)
  made_of = hashlib.sha256(repr((made_of, batch_size, seed, shuffle)).encode()).hexdigest()[:16]
  return Batches(mixed, made_of, threads, workers)


def ordered(source, transform: Transform, batch_size: int, limit: int | None = None, seed: int = 0,
            process_index: int = 0, process_count: int = 1, threads: int = 2) -> 'Batches':
  """The first `limit` examples (all for None) once, bucket by bucket in their order, for evaluation.

  Each example carries 'index', its place in the source, and 'weight' f32: 0 for what fills the last batch of a bucket
  up and for the stand-in of a broken record, 1 otherwise.
  """
  local = _local_size(batch_size, process_count)
  if limit is None and len(source) > 10_000_000:
    raise UserError(f'{source.name} has {len(source)} examples, too many to go through: give a limit')
  indices = range(len(source) if limit is None else min(limit, len(source)))
  datasets = []
  for bucket, members in sorted(_groups(source, indices).items()):
    padded = np.resize(members, -(-len(members) // batch_size) * batch_size)
    plan = [(position, float(position < len(members))) for position in range(len(padded))]
    drawn = grain.MapDataset.source(plan).seed(_seed(seed, len(datasets)))
    drawn = drawn.random_map(_DrawOrdered(_Draw(source, padded, transform)))
    datasets.append(drawn[process_index::process_count].batch(local))
  made_of = hashlib.sha256(repr((len(indices), batch_size, seed)).encode()).hexdigest()[:16]
  return Batches(grain.MapDataset.concatenate(datasets), made_of, threads, workers=0)


class Batches(grain.DatasetIterator):
  """Iterates over a MapDataset of batches; its state is the number of the next one, whoever makes it.

  grain's own states hold one entry a worker, so they could not be restored with another number of workers.
  """

  def __init__(self, dataset: grain.MapDataset, made_of: str, threads: int, workers: int):
    super().__init__()
    self._dataset, self._made_of, self._threads, self._workers = dataset, made_of, threads, workers
    self._next, self._iterator = 0, None

  def __len__(self) -> int:
    return len(self._dataset)

  def __next__(self) -> dict:
    if self._next >= len(self._dataset):
      raise StopIteration
    if self._iterator is None:
      self._iterator = iter(self._reader())
    batch = next(self._iterator)
    self._next += 1
    return batch

  def get_state(self) -> dict:
    return {'next_batch': self._next, 'made_of': self._made_of}

  def set_state(self, state: dict) -> None:
    """Goes on at a saved state. ValueError when it was saved with other sources, weights, batch size or seed."""
    if state['made_of'] != self._made_of:
      raise UserError(f'the saved position in the data (batch {state["next_batch"]}) was made with other sources, '
                       'weights, batch size or seed: use those again, or start a new run from the saved weights')
    self.close()
    self._next = state['next_batch']

  def close(self) -> None:
    if self._iterator is not None:
      self._iterator.close()
      self._iterator = None

  def _reader(self) -> grain.IterDataset:
    rest = self._dataset[self._next:]
    options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=2 * self._threads)
    if not self._workers:
      return rest.to_iter_dataset(options)
    if not flags.FLAGS.is_parsed():  # grain reads flags of its own, which a notebook or a test never parses
      flags.FLAGS.mark_as_parsed()
    within = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return rest.to_iter_dataset(within).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2))


@dataclasses.dataclass
class _Draw:
  """Position in a bucket -> the example there, or the next one of the bucket that is not broken."""

  source: object
  indices: Sequence[int]
  transform: Transform

  def __call__(self, position: int, rng: np.random.Generator) -> dict:
    reasons = []
    for skipped in range(min(TRIES, len(self.indices))):
      i = int(self.indices[(position + skipped) % len(self.indices)])
      try:
        example = self.transform(self.source[i], rng)
      except BrokenRecord as error:
        logging.log_first_n(logging.WARNING, 'passed over %s', 10, error)
        reasons.append(str(error))
        continue
      return {**example, 'skipped': np.int32(skipped)}
    raise UserError(f'{self.source.name}: {len(reasons)} records in a row cannot be used: mend or replace them. '
                     'The first are: ' + '; '.join(reasons[:3]))


@dataclasses.dataclass
class _DrawOrdered:
  """(position, weight) -> the example with 'index' and 'weight'."""

  draw: _Draw

  def __call__(self, place: tuple[int, float], rng: np.random.Generator) -> dict:
    position, weight = place
    example = self.draw(position, rng)
    weight = 0.0 if example['skipped'] else weight
    return {**example, 'index': np.int32(self.draw.indices[position]), 'weight': np.float32(weight)}


def check_skipped(seen: int, skipped: int, share: float = 0.01, mix: Sequence[tuple[object, float]] = ()) -> None:
  """ValueError when more than `share` of the records read so far were broken, with the first few of `mix` named.

  seen: examples so far; skipped: the sum of their 'skipped'. The first thousand examples may miss share x 1000.
  """
  if skipped <= share * max(seen, 1000):
    return
  reasons = []
  for source, _ in mix:
    for i in range(min(len(source), 1000)):
      if len(reasons) == 3:
        break
      try:
        source[i]
      except BrokenRecord as error:
        reasons.append(str(error))
  raise UserError(f'{skipped} broken records were passed over for {seen} examples, more than the allowed share of '
                   f'{share:g}: mend the data or allow more. ' + ('The first are: ' + '; '.join(reasons) if reasons else
                                                                  'The log names them ("passed over").'))


def _buckets(source) -> dict[tuple, tuple[float, Sequence[int]]]:
  """Bucket -> (its share of the examples, which they are)."""
  if hasattr(source, 'buckets'):
    return source.buckets()
  groups = _groups(source, range(len(source)))
  usable = sum(len(indices) for indices in groups.values())
  return {bucket: (len(indices) / usable, indices) for bucket, indices in groups.items()}


def _groups(source, indices) -> dict[tuple, np.ndarray]:
  """Bucket -> which of the indices are in it. ValueError when none is in any."""
  groups: dict[tuple, list[int]] = {}
  for i in indices:
    bucket = source.bucket(i)
    if bucket is not None:
      groups.setdefault(bucket, []).append(i)
  if not groups:
    raise UserError(f'{source.name} has no usable records among {len(indices)}: give it some')
  return {bucket: np.array(members, np.int64) for bucket, members in groups.items()}


def _local_size(batch_size: int, process_count: int) -> int:
  if batch_size < 1 or batch_size % process_count:
    raise UserError(f'batch_size={batch_size} does not divide among {process_count} processes: '
                     'choose a multiple of their number')
  return batch_size // process_count


def _seed(seed: int, number: int) -> int:
  """A 32-bit seed for one of the datasets of a run."""
  return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
