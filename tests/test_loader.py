"""Sources and the loader: same seed same batches, exact resume, disjoint processes, pure buckets, broken records."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from unifusion_jax.data import buckets, loader, sources
from unifusion_jax.data.config import DataConfig, Task
from unifusion_jax.errors import BrokenRecord, UserError
from unifusion_jax.scenes import builder, world
from unifusion_jax.scenes.sources import SceneSource


class Numbers:
  """Example i is an image of colour i; every third one is wide."""

  def __init__(self, length, name='numbers', broken=()):
    self.name, self.length, self.broken = name, length, frozenset(broken)

  def __len__(self):
    return self.length

  def bucket(self, i):
    return (4, 8, 0) if i % 3 == 0 else (4, 4, 1)

  def __getitem__(self, i):
    if i in self.broken:
      raise BrokenRecord(f'{self.name} record {i} is broken')
    height, width, _ = self.bucket(i)
    return {'target': np.full((height, width, 3), i % 251, np.uint8), 'i': i, 'name': self.name}


def draw(record, rng):
  return {'target': record['target'], 'i': np.int32(record['i']), 'other': np.bool_(record['name'] == 'other'),
          'random': np.float32(rng.random())}


def take(iterator, count):
  return list(itertools.islice(iterator, count))


def assert_same(ours, theirs):
  assert len(ours) == len(theirs)
  for a, b in zip(ours, theirs):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def numbers(batches, key='i'):
  return np.concatenate([batch[key] for batch in batches])


def test_same_seed_same_batches():
  def run(seed):
    return take(loader.batches([(Numbers(50), 1)], draw, 4, seed), 20)
  assert_same(run(3), run(3))
  assert (numbers(run(3)) != numbers(run(4))).any()
  assert len(set(numbers(run(3), 'random'))) == 80  # every example has randomness of its own


def test_resume_continues_exactly():
  def fresh(workers=0):
    return loader.batches([(Numbers(50), 1), (Numbers(20, 'other'), 2)], draw, 4, seed=1, workers=workers)
  straight = take(fresh(), 12)
  first = fresh()
  take(first, 5)
  state = json.loads(json.dumps(first.get_state()))
  take(first, 2)
  resumed = fresh()
  resumed.set_state(state)
  assert_same(take(resumed, 7), straight[5:])
  resumed.set_state(state)  # back again, on an iterator that has read ahead
  assert_same(take(resumed, 7), straight[5:])
  by_workers = fresh(workers=2)  # the state does not depend on who makes the batches
  by_workers.set_state(state)
  assert_same([{k: np.array(v) for k, v in batch.items()} for batch in take(by_workers, 7)], straight[5:])
  assert by_workers.get_state() == {**state, 'next_batch': 12}
  by_workers.close()


def test_state_of_other_data_is_refused():
  state = loader.batches([(Numbers(50), 1)], draw, 4, seed=1).get_state()
  for other, size, seed in (([(Numbers(51), 1)], 4, 1), ([(Numbers(50), 1)], 8, 1), ([(Numbers(50), 1)], 4, 2)):
    with pytest.raises(ValueError, match='other sources'):
      loader.batches(other, draw, size, seed).set_state(state)


def test_orbax_saves_and_restores_the_iterator(tmp_path):
  from orbax.checkpoint import v1 as ocp
  def fresh():
    return loader.batches([(Numbers(50), 1)], draw, 4, seed=1)
  first = fresh()
  take(first, 3)
  with ocp.training.Checkpointer(tmp_path / 'run') as checkpointer:
    checkpointer.save_checkpointables(3, {'data': first})
    resumed = fresh()
    checkpointer.load_checkpointables(3, {'data': resumed})
  assert_same(take(resumed, 4), take(first, 4))


def test_an_epoch_has_no_duplicates():
  wide, square = 12, 24
  drawn = numbers(take(loader.batches([(Numbers(36), 1)], draw, 4, seed=5), 18))
  for members in (drawn[drawn % 3 == 0], drawn[drawn % 3 != 0]):
    count = wide if len(members) < 36 else square
    first, second = members[:count], members[count:2 * count]
    assert sorted(first) == sorted(second) == sorted(set(members))
    assert (first != second).any()  # shuffled anew


def test_processes_share_each_batch():
  mix = [(Numbers(50), 1), (Numbers(20, 'other'), 1)]
  whole = take(loader.batches(mix, draw, 8, seed=2), 10)
  for shares in ([[0, 1], [2, 3], [4, 5], [6, 7]], [[0, 1, 4, 5], [2, 3, 6, 7]], [range(8)]):
    parts = [take(loader.batches(mix, draw, 8, seed=2, rows=rows), 10) for rows in shares]
    for k, batch in enumerate(whole):
      for rows, part in zip(shares, parts):
        assert_same([part[k]], [{name: x[list(rows)] for name, x in batch.items()}])


def test_numbers_tell_the_examples_of_a_batch_apart():
  """They count the examples of a bucket of a source, whatever the batches, and go with the example."""
  batches = take(loader.batches([(Numbers(50), 1)], draw, 8, seed=2), 12)
  for shape in {batch['target'].shape for batch in batches}:
    counted = numbers([batch for batch in batches if batch['target'].shape == shape], 'number')
    assert counted.dtype == np.uint32
    np.testing.assert_array_equal(counted, np.arange(len(counted)))


def test_batches_are_pure_and_shares_are_kept():
  seen = take(loader.batches([(Numbers(90), 1), (Numbers(30, 'other'), 3)], draw, 2, seed=0), 400)
  for batch in seen:
    assert len(set(batch['other'])) == 1 and len(set(batch['i'] % 3 == 0)) == 1
    assert batch['target'].shape[1:] == ((4, 8, 3) if batch['i'][0] % 3 == 0 else (4, 4, 3))
  assert abs(numbers(seen, 'other').mean() - 0.75) < 0.02
  assert abs((numbers(seen) % 3 == 0).mean() - 1 / 3) < 0.02


def test_broken_records_are_passed_over_and_counted():
  def batches():
    return loader.batches([(Numbers(60, broken=(3, 6, 10)), 1)], draw, 4, seed=1)
  def run():
    return take(batches(), 15)
  seen = run()
  assert_same(seen, run())
  assert not set(numbers(seen)) & {3, 6, 10}
  skipped = int(numbers(seen, 'skipped').sum())
  assert skipped == 4  # one epoch: 3 -> 6 -> 9 passes over two, 6 -> 9 and 10 -> 11 over one each
  feed = loader.Feed(batches(), share=0.004)  # the first thousand examples may miss 0.004 x 1000
  bare = take(feed, 15)
  assert_same(bare, [{name: x for name, x in batch.items() if name != 'skipped'} for batch in seen])
  assert (feed.seen, feed.skipped) == (60, 4)
  with pytest.raises(ValueError, match='^5 broken records were passed over for .* data.skipped=0.004 allows'):
    take(feed, 15)
  with pytest.raises(ValueError, match='^1 broken records'):
    take(loader.Feed(batches(), share=0.0), 15)


def test_a_feed_goes_on_where_its_batches_would():
  def fresh():
    return loader.Feed(loader.batches([(Numbers(50), 1)], draw, 4, seed=1))
  first = fresh()
  take(first, 5)
  resumed = fresh()
  resumed.set_state(json.loads(json.dumps(first.get_state())))
  assert_same(take(resumed, 4), take(first, 4))
  assert first.get_state() == resumed.get_state()


def test_nothing_but_broken_records_stops_at_once():
  iterator = loader.batches([(Numbers(60, broken=range(60)), 1)], draw, 4)
  with pytest.raises(ValueError, match='20 records in a row .*is broken|40 records in a row .*is broken'):
    next(iterator)


@pytest.mark.parametrize('error', [KeyError('a fault of the program'), OSError(24, 'Too many open files'),
                                   UserError('a setting')])
def test_what_is_no_records_fault_stops_the_run(error):
  """An error of every record is the program's and keeps its traceback; a setting's and the machine's stop at once."""
  def faulty(record, rng):
    raise error
  with pytest.raises(type(error)) as raised:
    next(loader.batches([(Numbers(60), 1)], faulty, 4))
  assert raised.value is error and raised.traceback[-1].name == 'faulty'


@pytest.mark.parametrize('error', [TypeError('odd'), RecursionError('deep'), MemoryError(), AttributeError('encode')])
def test_a_record_is_broken_whatever_it_raises(error, caplog):
  def odd(record, rng):
    if record['i'] == 7:
      raise error
    return draw(record, rng)
  seen = take(loader.batches([(Numbers(60), 1)], odd, 4, seed=1), 15)
  assert 7 not in numbers(seen) and numbers(seen, 'skipped').sum() == 1
  assert f'passed over numbers record 7: {type(error).__name__}' in caplog.text


def test_a_canvas_with_fewer_records_than_a_batch_is_named(caplog):
  class Uneven(Numbers):
    def bucket(self, i):
      return (4, 8, 0) if i < 2 else (4, 4, 1)
  loader.batches([(Numbers(60), 1), (Uneven(5), 1)], draw, 4)  # even, or as a whole too few
  assert not caplog.text
  loader.batches([(Uneven(60), 1)], draw, 4)
  assert 'fewer records than its 4: 2 of 8x4 with 0 references. They repeat' in caplog.text


def test_refused_arguments():
  with pytest.raises(ValueError, match='weight 0'):
    loader.batches([(Numbers(60), 0)], draw, 4)
  with pytest.raises(ValueError, match='no usable records among 0'):
    loader.batches([(Numbers(0), 1)], draw, 4)
  with pytest.raises(ValueError, match='no sources'):
    loader.batches([], draw, 4)


def test_scenes():
  source = SceneSource('edit', 'train', size=32)
  record = source[5]
  assert (*record['target'].shape[:2], len(record['references'])) == source.bucket(5)
  assert record['task'] == 'edit' and record['references'][0].dtype == np.uint8

  def which(record, rng):
    return {'target': record['target'], 'references': np.int32(len(record['references']))}
  seen = take(loader.batches([(source, 2), (SceneSource('t2i', 'train', 32), 1)], which, 2, seed=3), 24)
  assert {batch['target'].shape for batch in seen} == {(2, 32, 32, 3), (2, 24, 40, 3), (2, 40, 24, 3)}
  assert 14 <= sum(batch['references'][0] for batch in seen) <= 18


def test_scenes_of_a_bucket_are_all_different():
  source = SceneSource('t2i', 'test', size=32, length=256 * 40)
  buckets = source.buckets()
  assert sum(share for share, _ in buckets.values()) == pytest.approx(1)
  for bucket, (_, indices) in buckets.items():
    found = [indices[k] for k in range(len(indices))]
    assert len(set(found)) == 40 and all(source.bucket(i) == bucket for i in found)


@pytest.mark.parametrize('task', ['edit', 'edit/1-2'])
def test_builder_round_trip(task, tmp_path):
  builder.write(tmp_path, task, 'test', 6, size=32)
  drawn, read = SceneSource(task, 'test', 32), sources.ArrayRecordSource(tmp_path, task, 'test')
  assert len(read) == 6
  for i in range(6):
    ours, theirs = drawn[i], read[i]
    assert read.bucket(i) == drawn.bucket(i) and ours.keys() == theirs.keys()
    for name, value in ours.items():
      np.testing.assert_array_equal(theirs[name], value)
  assert 'tensorflow' not in sys.modules
  (_, weight), = loader.mix(DataConfig(path=str(tmp_path), tasks=(Task(task, 0.3),)), split='test')
  assert weight == 0.3

  def small(record, rng):
    return {'target': record['target']}
  alone, by_worker = (take(loader.batches([(read, 1)], small, 2, workers=workers), 2) for workers in (0, 1))
  assert alone[0]['target'].shape[0] == 2
  assert_same([{k: np.array(v) for k, v in batch.items()} for batch in by_worker], alone)
  with pytest.raises(ValueError, match='there already'):
    builder.write(tmp_path, task, 'test', 6)
  with pytest.raises(ValueError, match='builder --out=.* --task=t2i'):
    sources.ArrayRecordSource(tmp_path, 't2i', 'test')
  with pytest.raises(ValueError, match='no images'):
    builder.write(tmp_path, 'caption', 'test', 6)


MIX = (Task('edit/1-2', 0.2, prompt=88, rewrite=40), Task('edit/3-4', 0.4), Task('t2i', 0.3), Task('reconstruct', 0.1))


@pytest.mark.parametrize('only, wanted', [
    ('', [('edit/1-2', 0.2), ('edit/3-4', 0.4), ('t2i', 0.3), ('reconstruct', 0.1)]),
    ('edit', [('edit/1-2', 0.2), ('edit/3-4', 0.4)]), ('edit/3-4', [('edit/3-4', 0.4)]),
    ('t2i=0.5,edit=0.9', [('edit/1-2', 0.3), ('edit/3-4', 0.6), ('t2i', 0.5)]),
    ('t2i, edit/1-2 = 2', [('edit/1-2', 2.0), ('t2i', 0.3)])])
def test_some_of_the_tasks(only, wanted):
  data = DataConfig(tasks=MIX, only=only)
  mixture = loader.mix(data)
  assert [task.name for task in data.chosen] == [name for name, _ in wanted]
  assert [weight for _, weight in mixture] == pytest.approx([weight for _, weight in wanted])
  assert [source[0]['task'] for source, _ in mixture] == [name for name, _ in wanted]
  # Budgets, and so the shapes of a model's batches, do not depend on the choice
  assert data.budgets == (('edit/1-2', 88, 40), ('edit/3-4', 128, 52), ('t2i', 128, 52), ('reconstruct', 128, 52))
  assert data.budget == (128, 52)


@pytest.mark.parametrize('only, words', [
    ('edits', "no task 'edits' here; there are edit/1-2, edit/3-4, t2i, reconstruct"), ('edit,', "no task '' here"),
    ('edit=much', "the weight 'much' of 'edit'"), ('edit=-1', "the weight '-1' of 'edit'"),
    ('edit=nan', "the weight 'nan' of 'edit'")])
def test_tasks_that_there_are_not(only, words):
  with pytest.raises(ValueError, match=words):
    DataConfig(tasks=MIX, only=only).chosen


def problems(**changes):
  return DataConfig(**changes).problems(kinds=('t2i', 'edit'), unit=8, shards=4)


@pytest.mark.parametrize('changes, words', [
    (dict(batch_size=6), 'data.batch_size=6 must be a multiple of 4'),
    (dict(tasks=()), 'at least one task'), (dict(tasks=(Task('t2i'), Task('t2i', 2.0))), 'each of them once'),
    (dict(tasks=(Task('multi'),)), "trains on t2i, edit, not on 'multi'"),
    (dict(tasks=(Task('t2i', 0.0),)), "data.tasks['t2i'].weight=0.0 must be above 0"),
    (dict(tasks=(Task('t2i', prompt=0),)), "data.tasks['t2i'].prompt=0 must be"),
    (dict(max_rewrite_tokens=0), 'data.max_rewrite_tokens=0 must be between 1 and'),
    (dict(tasks=(Task('edit/2'),)), 'as in edit/1-2'), (dict(tasks=(Task('edit/1-1'),)), 'as in edit/1-2'),
    (dict(tasks=(Task('edit/2-5'),)), 'as in edit/1-2'), (dict(tasks=(Task('edit/'),)), 'as in edit/1-2'),
    (dict(tiles=()), 'data.tiles=()'), (dict(workers=-1), 'data.workers=-1'), (dict(skipped=2.0), 'data.skipped=2.0'),
    (dict(size=50), 'must be multiples of 8 pixels'), (dict(size=48), 'sides of [36, 48, 60]'),
    (dict(size=0), 'data.size=0'), (dict(aspects=('4:3',)), 'scenes are drawn in 1:1, 5:3, 3:5: name some'),
    (dict(only='edit'), "no task 'edit' here"), (dict(path='own.jsonl', aspects=('wide',)), "the aspect 'wide'"),
    (dict(path='own.jsonl', aspects=()), 'must name at least one'), (dict(path='own.jsonl', size=0), 'data.size=0'),
    (dict(path='own.jsonl', unit=12), 'data.unit=12 must be a multiple of the 8 pixels'),
    (dict(path='own.jsonl', size=15), 'raise the size')])
def test_settings_that_cannot_work(changes, words):
  wrong, = problems(**changes)
  assert words in wrong


def test_settings_that_can():
  assert not problems() and not problems(path='own.jsonl', aspects=('16:9', '9:16'), size=1024)
  assert not problems(tasks=(Task('edit/1-4'), Task('t2i/3-3')), only='edit=0.3')


@pytest.mark.parametrize('size, unit', [(64, 8), (64, 16), (256, 16), (512, 16), (1024, 16)])
def test_the_canvases_of_the_embedded_world(size, unit):
  """The default aspects are those that scenes are drawn in, at every size of the recipes."""
  assert buckets.canvases(DataConfig.aspects, size, unit) == tuple(
      world.canvas(aspect, size)[::-1] for aspect in world.ASPECTS)


@pytest.mark.parametrize('size, unit', [(1024, 16), (512, 16), (256, 16), (1024, 64)])
def test_canvases_keep_the_aspect_and_the_number_of_pixels(size, unit):
  for aspect in ('16:9', '9:16', '4:3', '3:2', '21:9', '1:2'):
    (height, width), = buckets.canvases((aspect,), size, unit)
    across, down = map(int, aspect.split(':'))
    assert height % unit == width % unit == 0 and 0.7 * size ** 2 <= height * width <= size ** 2
    assert abs(np.log(width / height * down / across)) < 1.5 * unit / min(height, width)
    assert buckets.nearest(((7, 7), (height, width)), 10 * down, 10 * across) == 1


def test_loading_no_prepared_data_imports_none_of_its_libraries():
  """Seconds of every start."""
  program = ('import sys; import unifusion_jax.data.loader; '
             'print([name for name in ("tensorflow_datasets", "pyarrow", "tensorflow") if name in sys.modules])')
  assert subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True).stdout == '[]\n'


def test_scenes_of_some_aspects_alone():
  """Every batch has the canvas that is asked for, and the examples are those of all canvases that have it."""
  square = [source for source, _ in loader.mix(DataConfig(tasks=(Task('edit'),), aspects=('1:1',)))]
  whole = [source for source, _ in loader.mix(DataConfig(tasks=(Task('edit'),)))]
  shares = square[0].buckets()
  assert {bucket[:2] for bucket in shares} == {(64, 64)}
  assert sum(share for share, _ in shares.values()) == pytest.approx(1)
  of_whole = {bucket: indices for bucket, (_, indices) in whole[0].buckets().items()}
  assert len(of_whole) > len(shares)
  for bucket, (_, indices) in shares.items():
    assert [indices[k] for k in range(3)] == [of_whole[bucket][k] for k in range(3)]
