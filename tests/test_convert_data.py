"""Conversion to ArrayRecord shards: every layout gives the same records, whoever makes them; training reads them."""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import pickle
import subprocess
import sys
import tarfile

import numpy as np
from PIL import Image
import pyarrow
import pyarrow.parquet
import pytest

from unifusion_jax.data import convert, imaging, lists, loader, shards, sources
from unifusion_jax.data.config import DataConfig, Task
from unifusion_jax.errors import UserError

BUCKETS = ((16, 16), (12, 20), (24, 16))
SIZES = ((40, 40), (50, 30), (60, 90))  # width, height


def png(i: int) -> bytes:
  return imaging.png_bytes(np.full((*SIZES[i % 3][::-1], 3), (20 * i, 0, 0), np.uint8))


def images(path, count=12):
  for i in range(count):
    (path / f'{i:02d}.png').write_bytes(png(i))
    (path / f'{i:02d}.txt').write_text(f'red {i}\n')


def as_folder(path):
  (path / 'in' / 'more').mkdir(parents=True)
  images(path / 'in', 12)
  return [str(path / 'in')]


def as_jsonl(path):
  images(path)
  rows = [dict(image=f'{i:02d}.png', text=f'red {i}', other=[i]) for i in range(12)]
  for name, part in (('a.jsonl', rows[:5]), ('b.jsonl', rows[5:])):
    (path / name).write_text('\n'.join(json.dumps(row) for row in part) + '\n\n')
  return [str(path / '*.jsonl')]


def as_parquet(path):
  struct = pyarrow.struct([('bytes', pyarrow.binary()), ('path', pyarrow.string())])
  table = pyarrow.table(dict(image=pyarrow.array([dict(bytes=png(i), path='x.png') for i in range(12)], struct),
                             text=[f'red {i}' for i in range(12)], embedding=[[1.0]] * 12))
  pyarrow.parquet.write_table(table.slice(0, 7), path / 'a.parquet', row_group_size=3)
  pyarrow.parquet.write_table(table.slice(7), path / 'b.parquet', row_group_size=3)
  return [str(path / 'a.parquet'), str(path / 'b.parquet')]


def add(file, name, data):
  info = tarfile.TarInfo(name)
  info.size = len(data)
  file.addfile(info, io.BytesIO(data))


def as_tar(path):
  for name, numbers in (('0.tar', range(5)), ('1.tar.gz', range(5, 12))):
    with tarfile.open(path / name, 'w:gz' if name.endswith('gz') else 'w') as file:
      for i in numbers:
        add(file, f'./x/{i:05d}.png', png(i))
        add(file, f'./x/{i:05d}.json', json.dumps(dict(caption=f'red {i}', key=i)).encode())
  return [str(path / '0.tar'), str(path / '1.tar.gz')]


def settings(output, **changes):
  columns = changes.pop('columns', {})
  return convert.Settings(str(output), changes.pop('count', 3), convert.COLUMNS | columns, **changes)


def contents(folder) -> dict[str, str]:
  return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sorted(os.listdir(folder))}


@pytest.mark.parametrize('layout', [as_folder, as_jsonl, as_parquet, as_tar])
def test_every_layout(tmp_path, layout):
  made = settings(tmp_path / 'out', count=2 if layout is as_tar else 3)
  reports = convert.convert(layout(tmp_path), made)
  assert sum(report['records'] for report in reports.values()) == 12 and len(reports) == made.count
  source = sources.FolderSource(tmp_path / 'out', BUCKETS)
  records = [source[i] for i in range(12)]
  assert [record['caption'].strip() for record in records] == [f'red {i}' for i in range(12)] and not source.problems
  for i, record in enumerate(records):
    assert record.keys() == {'references', 'instruction', 'target', 'caption', 'kind'} and record['kind'] == 't2i'
    assert record['target'].shape == (*BUCKETS[i % 3], 3) and tuple(record['target'][0, 0]) == (20 * i, 0, 0)
    assert source.bucket(i) == (*BUCKETS[i % 3], 0)
  assert 'train with --config.data.path=' in convert.summary(made, reports)


def edits(path):
  """Edits, of which two are broken."""
  images(path)
  rows = [dict(before=f'{i - 1:02d}.png', after=f'{i:02d}.png', ask='make it redder', shown=f'red {i}')
          for i in range(1, 12)]
  rows[4]['after'], rows[7]['shown'] = 'gone.png', ' '
  (path / 'edits.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return [str(path / 'edits.jsonl')]


EDITS = dict(references=('before',), target=('after',), instruction=('ask',), caption=('shown',))


def test_edits_under_names_of_their_own_and_broken_records(tmp_path):
  inputs = edits(tmp_path)
  made = settings(tmp_path / 'out', columns=EDITS)
  reports = convert.convert(inputs, made)
  text = convert.summary(made, reports)
  assert '9 records, 2 broken ones left out' in text and 'edits.jsonl line 5: ' in text and 'gone.png is not' in text
  assert 'edits.jsonl line 8: the caption is empty' in text
  source = sources.FolderSource(tmp_path / 'out', BUCKETS)
  assert len(source) == 9 and [record['caption'] for record in source][4] == 'red 6'
  record = source[8]
  assert record['kind'] == 'edit' and record['references'][0].shape == (30, 50, 3)
  assert record['instruction'] == 'make it redder' and source.bucket(8) == (24, 16, 1)
  with pytest.raises(ValueError, match='^1 of the first 2 records .*--skipped.*gone.png'):
    convert.convert(inputs, settings(tmp_path / 'strict', columns=EDITS, skipped=0.0))
  assert not list((tmp_path / 'strict').glob('00001*.json'))
  with pytest.raises(ValueError, match='it has no target or image.*for the target: its columns are after, ask, before'):
    convert.convert(inputs, settings(tmp_path / 'strict2', skipped=0.0))


def test_the_same_shards_whoever_makes_them(tmp_path):
  inputs = as_parquet(tmp_path)
  made = settings(tmp_path / 'one', count=4)
  convert.convert(inputs, made)
  whole = contents(tmp_path / 'one')
  assert len(whole) == 9  # two files each, and dataset.json
  for machine in ((0, 2), (1, 2)):
    reports = convert.convert(inputs, settings(tmp_path / 'two', count=4), machine=machine)
    assert len(reports) == 2 * (machine[0] + 1)
    assert ('2 shards are left' in convert.summary(settings(tmp_path / 'two'), reports)) == (machine == (0, 2))
  assert contents(tmp_path / 'two') == whole

  # An interruption: one shard whole without its JSON, one half written
  (tmp_path / 'two' / '00002-of-00004.json').unlink()
  (tmp_path / 'two' / '00001-of-00004.json').unlink()
  os.rename(tmp_path / 'two' / '00001-of-00004.arrayrecord', tmp_path / 'two' / '.00001-of-00004.arrayrecord.partial')
  with pytest.raises(ValueError, match='two has 2 of 4 shards; the first that is missing is 00001-of-00004: run the'):
    sources.FolderSource(tmp_path / 'two', BUCKETS)
  kept = (tmp_path / 'two' / '00000-of-00004.arrayrecord').stat().st_mtime_ns
  convert.convert(inputs, settings(tmp_path / 'two', count=4))
  assert contents(tmp_path / 'two') == whole
  assert (tmp_path / 'two' / '00000-of-00004.arrayrecord').stat().st_mtime_ns == kept
  with pytest.raises(ValueError, match='two was begun with other pixels: give another --output'):
    convert.convert(inputs, settings(tmp_path / 'two', count=4, pixels=100))
  with pytest.raises(ValueError, match='two was begun with other inputs, shards'):
    convert.convert(inputs[:1], settings(tmp_path / 'two', count=5))


def stored(folder) -> list[dict]:
  rows = shards.Shards(folder)
  return [rows.parse(raw) for raw in rows]


def test_images_are_scaled_down_and_encoded_as_asked(tmp_path):
  inputs = as_folder(tmp_path)
  convert.convert(inputs, settings(tmp_path / 'kept', count=1))
  assert [row['target'] for row in stored(tmp_path / 'kept')] == [png(i) for i in range(12)]  # byte for byte
  convert.convert(inputs, settings(tmp_path / 'small', count=1, pixels=1600, format='webp', quality=80))
  kinds = [Image.open(io.BytesIO(row['target'])) for row in stored(tmp_path / 'small')]
  assert [image.format for image in kinds[:3]] == ['PNG', 'PNG', 'WEBP']
  assert [image.size for image in kinds[:3]] == [(40, 40), (50, 30), (32, 48)]
  assert [image.size[::-1] for image in kinds] == [(y, x) for y, x, _ in shards.Shards(tmp_path / 'small').shapes]
  convert.convert(inputs, settings(tmp_path / 'all', count=1, reencode=True))
  assert {Image.open(io.BytesIO(row['target'])).format for row in stored(tmp_path / 'all')} == {'JPEG'}


def test_training_reads_shards_as_it_reads_the_list(tmp_path):
  listed, = edits(tmp_path)
  rows = [json.loads(line) for line in open(listed)]
  ours = [dict(references=[row['before']], instruction=row['ask'], target=row['after'], caption=row['shown'])
          for row in rows if row['after'] != 'gone.png' and row['shown'].strip()]
  (tmp_path / 'list.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in ours))
  convert.convert([str(tmp_path / 'list.jsonl')], settings(tmp_path / 'out'))

  def arrays(record, rng):
    return dict(target=record['target'], tiles=np.int32(record['tiles']), random=np.float32(rng.random()))

  def batches(path):
    data = DataConfig(path=str(path), size=32, unit=4, tasks=(Task('edit'), Task('reconstruct', 0.5)), tiles=(1, 2))
    mixture = pickle.loads(pickle.dumps(loader.mix(data)))  # to a worker process
    return data, itertools.islice(loader.batches(mixture, arrays, 2, seed=3), 12)

  (data, of_shards), (_, of_list) = batches(tmp_path / 'out'), batches(tmp_path / 'list.jsonl')
  for ours, theirs in zip(of_shards, of_list, strict=True):
    for name in ours:
      np.testing.assert_array_equal(ours[name], theirs[name])
  named, trained = loader.held_out(data)
  assert list(named) == ['out'] and trained
  held = dataclasses.replace(data, path='scenes', held_out=str(tmp_path / 'out'))
  assert not loader.held_out(held)[1] and not any('held_out' in each for each in held.problems(
      kinds=('edit', 'reconstruct'), unit=4, shards=2))
  assert [record['caption'] for record in loader.preview_records(held, 2)] == ['red 1', 'red 4']  # of one shape
  assert 'is the file of data.path' in dataclasses.replace(held, path=held.held_out).problems(
      kinds=('edit', 'reconstruct'), unit=4, shards=2)[0]


def test_a_list_in_use_is_not_read_again(tmp_path, monkeypatch):
  listed = as_jsonl(tmp_path)
  convert.convert(listed, settings(tmp_path / 'out'))
  loads, load = [], shards.Shards
  monkeypatch.setattr(shards, 'Shards', type('Counted', (load,), dict(__init__=lambda self, path: (
      loads.append(path), load.__init__(self, path))[1])))
  data = DataConfig(path=str(tmp_path / 'out'))
  first = loader.mix(data)
  assert loader.mix(data)[0][0] is first[0][0] and len(loads) == 1
  loader.mix(dataclasses.replace(data, size=32))
  assert len(loads) == 2


def test_what_cannot_be_converted_is_one_sentence(tmp_path):
  images(tmp_path)
  (tmp_path / 'x.parquet').write_text('x')
  (tmp_path / 'x.tar').write_bytes(b'x' * 600)
  (tmp_path / 'x.csv').write_text('x')
  (tmp_path / 'empty').mkdir()
  for patterns, words in ((['x.parquet'], 'not a Parquet file'), (['*.csv'], 'is no .parquet, .jsonl, .tar and no'),
                          (['gone/*'], 'names no file'), (['gone'], 'gone is not there'), (['empty'], 'has no images'),
                          (['x.tar', '.'], 'mixes folder, tar'), (['x.tar'], 'x.tar is no tar file, damaged or cut')):
    with pytest.raises(UserError, match=words):
      convert.convert([str(tmp_path / pattern) for pattern in patterns], settings(tmp_path / 'out'))
  (tmp_path / '03.txt').unlink()
  reports = convert.convert([str(tmp_path)], settings(tmp_path / 'out2', count=1))
  assert reports[0]['broken'] == 1 and 'no 03.txt with its caption' in reports[0]['reasons'][0]
  (tmp_path / 'out2' / '00000-of-00001.arrayrecord').write_bytes(b'x' * 100)
  with pytest.raises(ValueError, match='00000-of-00001.arrayrecord record 0 cannot be read .*remove it'):
    sources.FolderSource(tmp_path / 'out2', BUCKETS)
  for text in ('4/4', 'a/b', '1', '-1/3'):
    with pytest.raises(UserError, match='must be NUMBER/COUNT'):
      convert.machine_number(text)


@pytest.fixture
def files(buckets):
  """The file system of gs://bucket."""
  import gcsfs
  return gcsfs.GCSFileSystem()


@pytest.mark.parametrize('layout', [as_folder, as_jsonl, as_parquet, as_tar])
def test_buckets(tmp_path, files, layout):
  """From a bucket to a bucket, as from disk to disk, and training from there."""
  inputs, name = layout(tmp_path), layout.__name__
  convert.convert(inputs, settings(tmp_path / 'out', count=2))
  files.put(str(tmp_path), f'bucket/{name}', recursive=True)
  there = [f'gs://bucket/{name}{path.removeprefix(str(tmp_path))}' for path in inputs]
  reports = convert.convert(there, settings(f'gs://bucket/{name}-out', count=2))
  assert {number: report['records'] for number, report in reports.items()} and len(reports) == 2
  for number in range(2):
    file = f'{shards.name(number, 2)}.arrayrecord'
    assert files.cat_file(f'bucket/{name}-out/{file}') == (tmp_path / 'out' / file).read_bytes()
  if layout is not as_jsonl:
    return
  near, (far, _) = sources.FolderSource(tmp_path / 'out', ((64, 64),)), loader.mix(DataConfig(
      path=f'gs://bucket/{name}-out', aspects=('1:1',)))[0]
  assert len(far) == 12
  for i in range(12):
    np.testing.assert_array_equal(far[i]['target'], near[i]['target'])
  feed = loader.batches([(far, 1)], lambda record, rng: dict(target=record['target']), 4)
  assert next(feed)['target'].shape == (4, 64, 64, 3)
  with pytest.raises(ValueError, match='holds no dataset.json: of addresses'):
    loader.mix(DataConfig(path='gs://bucket/nothing'))


def test_a_list_of_images_in_a_bucket(tmp_path, files):
  for i in range(3):
    files.pipe_file(f'bucket/own/{i}.png', png(i))
  rows = [dict(references=[], instruction='', target=f'gs://bucket/own/{i}.png', caption=f'red {i}') for i in range(4)]
  (tmp_path / 'list.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  source = sources.FolderSource(tmp_path / 'list.jsonl', BUCKETS, share=0.5)
  assert len(source.problems) == 1 and 'gs://bucket/own/3.png is not there' in source.problems[0]
  assert [source.bucket(i) for i in range(4)] == [*((*bucket, 0) for bucket in BUCKETS), None]
  assert tuple(source[2]['target'][0, 0]) == (40, 0, 0)


def test_other_addresses(tmp_path):
  """What ArrayRecord does not read is converted to all the same, and refused by training."""
  reports = convert.convert(as_folder(tmp_path), settings('memory://out', count=1))
  assert reports[0]['records'] == 12
  with pytest.raises(ValueError, match='ArrayRecord reads folders and gs:// addresses: mount the bucket, or copy'):
    loader.mix(DataConfig(path='memory://out'))
  with pytest.raises(ValueError, match='cannot be opened .*: give a path, or an address'):
    convert.convert(['nowhere://x'], settings(tmp_path / 'out'))
  assert lists.image_file('s3://bucket/folder', 'a/b.png') == 's3://bucket/folder/a/b.png'


def test_the_command(tmp_path):
  inputs = edits(tmp_path)
  named = [f'--{name}={",".join(theirs)}' for name, theirs in EDITS.items()]
  command = [sys.executable, '-m', 'unifusion_jax.data.convert', f'--input={inputs[0]}', f'--output={tmp_path / "out"}',
             '--records=5', '--workers=1', *named]
  out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
  assert '0 of 3 shards are there, 3 are made here' in out and '3 of 3 shards, 9 records, 2 broken' in out
  failed = subprocess.run([*command[:-5], '--machine=2/2'], capture_output=True, text=True)
  assert failed.returncode == 1 and failed.stderr.startswith('error: --machine=2/2 must be NUMBER/COUNT, as in 0/4')
