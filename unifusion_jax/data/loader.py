"""Batches of a run's data as numpy arrays, with grain.

Bucket, shuffle, share out over processes, map, batch, mix. A batch holds one bucket of one source only, so its arrays
have one shape. Every process draws the same sequence of buckets and takes its own rows of each batch. Batch k is a pure
function of the arguments and k, whatever the number of threads, workers and processes, and the saved state is k.

  data = loader.batches(loader.mix(config.data, seed=config.seed), transform, config.data.batch_size, config.seed)
  feed = loader.Feed(data, config.data.skipped)
  batch = next(feed)                    # numpy arrays [b / processes ...]
"""

import collections
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import hashlib
import itertools
import pathlib
import signal
from typing import Any
import weakref

from absl import flags, logging
import grain
import jax
import numpy as np

from unifusion_jax import sharding
from unifusion_jax.data import rewrites, shards, sources, storage
from unifusion_jax.data.config import DataConfig, is_list, SCENES, scenes_sources
from unifusion_jax.errors import BrokenRecord, UserError

# transform(record, rng) -> the arrays of one example
Transform = Callable[[dict, np.random.Generator], dict]
ENDLESS = 2 ** 50  # examples; grain's own endless repeat overflows at one row a process
TRIES = 100  # records of one bucket tried in a row before the run stops
NAMED = 1000  # broken records that the log names
GRACE = 60  # seconds that a worker goes on after SIGTERM
THREADS = 2  # batches prepared at a time in a process without workers


def mix(data: DataConfig, split: str = 'train', seed: int = 0) -> list[tuple[Any, float]]:
  """(source, weight) pairs for `batches`.

  Scenes and prepared folders have a source for each task. A user's own images are one source for all tasks but
  'reconstruct', and a second one for that. With several numbers of tiles each source comes once for each number.
  """
  path, tasks = pathlib.Path(data.path), data.chosen
  if data.path in SCENES:
    weighted = scenes_sources().mix(data, split, seed)
  else:
    if is_list(data.path):
      own = _own_images(data)
      reconstructed = sum(task.weight for task in tasks if task.name == 'reconstruct')
      requested = sum(task.weight for task in tasks if task.name != 'reconstruct')
      pairs = (own, requested), (sources.Reconstruct(own), reconstructed)
      weighted = [(source, weight) for source, weight in pairs if weight]
    elif storage.is_address(data.path):
      raise UserError(f'data.path={data.path!r} holds no {shards.ABOUT}: of addresses, folders that '
                      'unifusion_jax.data.convert wrote can be trained on, no other')
    elif path.is_dir():
      kinds = sorted({file.suffix for file in itertools.islice(path.iterdir(), 1000)} - {''})
      if kinds and not any(path.glob('*/*/*/dataset_info.json')):
        raise UserError(f'data.path={data.path!r} is a folder with files of {", ".join(kinds[:5])}, not one of '
                        'unifusion_jax.scenes.builder: give a .jsonl or .parquet file that lists its images, or '
                        'convert it (python -m unifusion_jax.data.convert)')
      weighted = [(sources.ArrayRecordSource(path, task.name, split), task.weight) for task in tasks]
    else:
      raise UserError(f"data.path={data.path!r} is neither 'scenes' or 'scenes/wide' nor a .jsonl or .parquet file nor "
                      'a folder of unifusion_jax.data.convert or unifusion_jax.scenes.builder: give one of these')
    if len(data.tiles) > 1:
      weighted = [(sources.InTiles(source, tiles), weight / len(data.tiles)) for source, weight in weighted
                  for tiles in data.tiles]
  if data.rewrites:
    table = rewrites.Table(data.rewrites)
    weighted = [(sources.Rewritten(source, table), weight) for source, weight in weighted]
  return weighted


def _own_images(data: DataConfig) -> sources.FolderSource:
  """The source of a user's own images. One that is still in use is taken again, unless its file has changed."""
  path = pathlib.Path(data.path)
  changed = path.stat().st_mtime_ns if path.exists() else None
  key = data.path, changed, data.canvases, data.skipped
  source = _IN_USE.get(key)
  if source is None:
    source = _IN_USE[key] = sources.FolderSource(data.path, data.canvases, data.skipped)
  return source


_IN_USE: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def batches(mixture: Sequence[tuple[Any, float]], transform: Transform, batch_size: int, seed: int = 0,
            rows: Sequence[int] | None = None, workers: int = 0) -> 'Batches':
  """Endless batches of a weighted mix of sources.

  mixture: (source, weight) pairs, as from `mix`; a source's examples make up weight / sum of weights of all examples.
  batch_size: of all processes together.  rows: those of this process (`sharding.rows`); None: all.
  workers: processes that make batches instead of threads of this one (0 for none).
  Each example carries its 'number', which no other of its batch has, and 'skipped', the number of broken records passed
  over for it (see `Feed`).
  Everything must be picklable when workers > 0. UserError for empty sources.
  """
  rows = range(batch_size) if rows is None else rows
  datasets, weights, facts, sparse = [], [], [], {}
  for source, weight in mixture:
    if weight <= 0:
      raise UserError(f'{source.name} has weight {weight}: a source in the mix needs a weight above 0')
    buckets = _buckets(source, transform)
    mean = sum(len(indices) for _, indices in buckets.values()) / len(buckets)
    for bucket, (share, indices) in sorted(buckets.items()):
      if len(indices) < batch_size <= mean:
        sparse[bucket] = len(indices)
      facts.append((weight, bucket, len(indices)))  # not the name: a folder may have moved
      weights.append(weight * share)
      positions = grain.MapDataset.range(len(indices)).seed(_seed(seed, len(datasets))).shuffle()
      # The rng of an example comes from its number in the order of all processes, hence the choice after the map.
      examples = positions.repeat(ENDLESS // len(indices)).random_map(_Draw(source, indices, transform))
      numbers = grain.MapDataset.range(len(examples) // batch_size * len(rows))
      datasets.append(numbers.map(_Chosen(examples, batch_size, rows)).batch(len(rows)))
  if not datasets:
    raise UserError('the mix has no sources: give at least one (source, weight)')
  if sparse:
    logging.warning(
        'a batch is of one canvas, and some have fewer records than its %d: %s. They repeat within a batch, and each '
        'canvas is a program to compile: leave their aspects out (data.aspects)', batch_size, ', '.join(
            f'{count} of {width}x{height} with {references} references'
            for (height, width, references), count in sorted(sparse.items())))
  fingerprint = hashlib.sha256(repr((facts, batch_size, seed)).encode()).hexdigest()[:16]
  owned = rows if jax.process_count() == 1 else sharding.own_rows(batch_size)
  counted = np.array([row in owned for row in rows])
  return Batches(grain.MapDataset.mix(datasets, weights), fingerprint, workers, counted)


def batch_spec(example: dict, batch_size: int) -> dict:
  """The shapes of the batches of one bucket, from those that a transform's `spec` gives of one example."""
  return sharding.batch_spec(example | dict(number=jax.ShapeDtypeStruct((), np.uint32)), batch_size)


def held_out(data: DataConfig) -> tuple[dict[str, Any], bool]:
  """({name: source}, whether training reads them) of the records to measure and to preview.

  Those of `data.held_out`, or else the test split of scenes or of a prepared folder; if there is none, those of
  training. A list is one source, named as its file; scenes and prepared folders have one for each task.
  """
  data = dataclasses.replace(data, path=data.measured, rewrites=None, tiles=(max(data.tiles),))
  try:
    mixture, trained = mix(data, split='test'), is_list(data.path) and not data.held_out
  except sources.NoDataset:
    mixture, trained = mix(data), True
  names = [pathlib.Path(data.path).stem] if is_list(data.path) else [task.name for task in data.chosen]
  return {name: source for name, (source, _) in zip(names, mixture)}, trained


def first_records(source, count: int, size: int, transform=lambda record: record) -> Iterator[tuple[list[tuple], int]]:
  """([(index, transform(record)), ...], rows) of the first `count` records of a source, `size` of one bucket at a time.

  `rows`, the same for every batch of a bucket, is the number to fill them up to, so that a bucket has one shape. Broken
  records, also those that `transform` finds broken, are left out.
  """
  groups: dict[tuple, list[int]] = collections.defaultdict(list)
  for i in range(min(count, len(source))):
    if (bucket := source.bucket(i)) is not None:
      groups[bucket].append(i)
  for members in groups.values():
    rows = sharding.padded_batch(min(size, len(members)))
    for part, _ in sharding.batched(members, min(size, len(members))):
      yield [(i, record) for i in part if (record := _sound(source, i, transform)) is not None], rows


def _sound(source, i: int, transform=lambda record: record):
  try:
    return transform(source[i])
  except Exception as error:
    _pass_over(source, i, error)
    return None


def preview_records(data: DataConfig, count: int, wanted=lambda record: True) -> list[dict]:
  """Records of the first task that share one shape; training reads them only where there are no others."""
  named, trained = held_out(dataclasses.replace(data, only=data.chosen[0].name))
  source, *_ = named.values()
  if trained:
    logging.warning('previews show records that training reads, of %s: name others with data.held_out', source.name)
  records, shape = [], None
  for i in range(len(source)):
    bucket = source.bucket(i)
    if len(records) == count:
      break
    if bucket is None or shape not in (None, bucket):
      continue  # not decoded
    record = _sound(source, i)
    if record is not None and wanted(record):
      shape = bucket
      records.append(record)
  return records


class Batches(grain.DatasetIterator):
  """Iterator over a MapDataset of batches; its state is the number of the next batch.

  grain's own states have an entry for each worker, so they cannot be restored with another number of workers.

  counted: [rows] which rows of this process are its own to count, those that no process before it holds.
  """

  def __init__(self, dataset: grain.MapDataset, fingerprint: str, workers: int, counted: np.ndarray):
    super().__init__()
    self.counted = counted
    self._dataset, self._fingerprint, self._workers = dataset, fingerprint, workers
    self._next: int = 0
    self._iterator: Any = None

  def __next__(self) -> dict:
    if self._iterator is None:
      self._iterator = iter(self._reader())
    batch = next(self._iterator)
    self._next += 1
    return batch

  def get_state(self) -> dict:
    return {'next_batch': self._next, 'made_of': self._fingerprint}

  def set_state(self, state: dict) -> None:
    """Goes on at a saved state. UserError when it was saved with other sources, weights, batch size or seed."""
    if state['made_of'] != self._fingerprint:
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
    if not self._workers:
      return rest.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=2 * THREADS))
    if not flags.FLAGS.is_parsed():  # grain reads flags of its own, which a notebook or a test never parses
      flags.FLAGS.mark_as_parsed()
    within = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return rest.to_iter_dataset(within).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2),
        worker_init_fn=_outlast_signals)


def _outlast_signals(worker: int, workers: int) -> None:
  """Signals that the whole group gets are the main process's, which finishes its step and ends its workers."""
  del worker, workers
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


class Feed(grain.DatasetIterator):
  """Iterator over a run's `Batches`, without 'skipped': an error on one process is raised on all of them.

  Every process raises in the same call if the batch of one raises, or if more than `share` of the examples of all
  processes are broken; a row that several processes hold is counted once. With several processes each batch is read
  one call early, and its facts are exchanged on the devices behind the steps under way, so the host is never more than
  two steps ahead. The mesh must be in context.

  Attributes:
    seen: examples of all processes so far.  skipped: broken records passed over for them.
  """

  def __init__(self, batches: Batches, share: float = 0.01):
    super().__init__()
    self._batches, self._share = batches, share
    self.seen = self.skipped = 0
    self._ahead = None

  def __next__(self) -> dict:
    here, self._ahead = self._ahead or self._read(), None
    facts = sharding.local(here.facts)
    failed = [i for i, (failure, *_) in enumerate(facts) if failure]
    if here.error is not None:
      raise here.error
    if failed:
      raise UserError(f'process {", ".join(map(str, failed))} of {len(facts)} could not read its data and says why: '
                      'all stop')
    _, seen, skipped = np.sum(facts, axis=0)
    self.seen, self.skipped = self.seen + int(seen), self.skipped + int(skipped)
    if self.skipped > self._share * max(self.seen, 1000):
      raise UserError(f'{self.skipped} broken records were passed over for {self.seen} examples, more than '
                      f'data.skipped={self._share:g} allows: mend the data or allow more. The log names the first '
                      '("passed over")')
    if jax.process_count() > 1:
      self._ahead = self._read()
    return here.batch

  def get_state(self) -> dict:
    return self._ahead.state if self._ahead else self._batches.get_state()

  def set_state(self, state: dict) -> None:
    self._batches.set_state(state)
    self._ahead = None

  def close(self) -> None:
    self._batches.close()

  def _read(self) -> '_Read':
    state, batch, error, skipped = self._batches.get_state(), None, None, np.zeros(0)
    try:
      batch = dict(next(self._batches))
      skipped = batch.pop('skipped')[self._batches.counted]
    except Exception as problem:  # raised as soon as the other processes know
      error = problem
    facts = sharding.tell_all(np.array([error is not None, len(skipped), np.sum(skipped)], np.int32))
    return _Read(batch, error, state, facts)


@dataclasses.dataclass
class _Read:
  """A batch or the error in its place, the state before it, and (failed, examples, skipped) of all processes."""
  batch: Any
  error: Exception | None
  state: dict
  facts: jax.Array


@dataclasses.dataclass
class _Chosen:
  """Number of an example in the order of this process -> the example, with its number in that of all processes."""

  examples: Any  # grain.MapDataset
  batch_size: int
  rows: Sequence[int]

  def __call__(self, i: int) -> dict:
    batch, row = divmod(i, len(self.rows))
    number = batch * self.batch_size + self.rows[row]
    return {**self.examples[number], 'number': np.uint32(number % 2 ** 32)}


@dataclasses.dataclass
class _Draw:
  """Position in a bucket -> the example there, or the next of the bucket that is not broken.

  A record is broken whatever it raises. What it cannot have caused stops the run: a UserError is a setting's, an
  OSError the list's or the machine's, and an error of `TRIES` records in a row the program's.
  """

  source: Any
  indices: Sequence[int]
  transform: Transform

  def __call__(self, position: int, rng: np.random.Generator) -> dict:
    example, reasons, unforeseen = self._first(position, rng)
    if example is not None:
      return example
    if unforeseen is not None:  # whatever the record: the program is wrong
      raise unforeseen
    raise UserError(f'{self.source.name}: {len(reasons)} records in a row cannot be used: mend or replace them. '
                    'The first are: ' + '; '.join(reasons[:3]))

  def can_draw(self) -> bool:
    """Whether one of the first `TRIES` records can be used; errors that are no record's fault come up in drawing."""
    try:
      return self._first(0, np.random.default_rng(0))[0] is not None
    except Exception:
      return True

  def _first(self, position: int, rng: np.random.Generator) -> tuple[dict | None, list[str], Exception | None]:
    """(the first example that can be used, why records before it cannot, an error of theirs that was not foreseen)."""
    reasons, unforeseen = [], None
    for skipped in range(min(TRIES, len(self.indices))):
      i = int(self.indices[(position + skipped) % len(self.indices)])
      try:
        return {**self.transform(self.source[i], rng), 'skipped': np.int32(skipped)}, reasons, unforeseen
      except Exception as error:
        reasons.append(_pass_over(self.source, i, error))
        unforeseen = unforeseen if isinstance(error, BrokenRecord) else error
    return None, reasons, unforeseen


def _pass_over(source, i: int, error: Exception) -> str:
  """The reason to pass over a record, with its place, logged once. Raises an `error` of a setting, list or machine."""
  if isinstance(error, UserError) and not isinstance(error, BrokenRecord):
    raise error
  place, reason = sources.where(source, i), sources.reason(error)
  reason = reason if reason.startswith(place) else f'{place}: {reason}'
  if reason not in _NAMED and len(_NAMED) < NAMED:
    _NAMED.add(reason)
    logging.warning('passed over %s', reason)
  return reason


_NAMED: set[str] = set()  # reasons in the log of this process


def _buckets(source, transform: Transform) -> dict[tuple, tuple[float, Any]]:
  """Bucket -> (its share of the examples, their indices). UserError when there are none.

  A small bucket without a record that can be used would stop a run later: it is left out.
  """
  if hasattr(source, 'buckets'):
    return source.buckets()
  groups = sources.by_bucket(source)
  if not groups:
    raise UserError(f'{source.name} has no usable records among {len(source)}: give it some')
  usable = {bucket: indices for bucket, indices in groups.items()
            if len(indices) > TRIES or _Draw(source, indices, transform).can_draw()}
  for height, width, references in groups.keys() - usable.keys() if usable else ():
    logging.warning('%s: no record for a canvas of %dx%d with %d references can be used: the canvas is left out',
                    source.name, width, height, references)
  groups = usable or groups
  count = sum(len(indices) for indices in groups.values())
  return {bucket: (len(indices) / count, indices) for bucket, indices in groups.items()}


def _seed(seed: int, number: int) -> int:
  """A 32-bit seed for one of the datasets of a run."""
  return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
