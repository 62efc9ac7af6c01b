"""A user's own lists: what is read, what is found broken at the start, and what a broken record does to a run."""

import itertools
import json

import numpy as np
from PIL import Image
import pyarrow
import pyarrow.parquet
import pytest

from unifusion_jax.data import loader, sources
from unifusion_jax.data.loader import DataConfig, Task
from unifusion_jax.errors import BrokenRecord


def take(iterator, count):
  return list(itertools.islice(iterator, count))


def numbers(batches, key='i'):
  return np.concatenate([batch[key] for batch in batches])


def folder(path, kind='jsonl', count=12, changes=None):
  """A folder of small images with a list of them; `changes` is laid over the records by number."""
  (path / 'p').mkdir(exist_ok=True)
  rows = []
  for i in range(count):
    size = ((40, 40), (50, 30), (60, 90))[i % 3]
    Image.new('RGB', size, (20 * i, 0, 0)).save(path / 'p' / f'{i}.png')
    row = {'references': [f'p/{i - 1}.png'] if i % 2 else [], 'instruction': 'make it redder' if i % 2 else '',
           'target': f'p/{i}.png', 'caption': f'red {i}', 'tags': ['red'], 'where': f'shelf {i}'}
    rows.append({**row, **(changes or {}).get(i, {})})
  if kind == 'jsonl':
    (path / 'list.jsonl').write_text('\n'.join(json.dumps(row) for row in rows) + '\n\n')
    return path / 'list.jsonl'
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path / 'list.parquet')
  return path / 'list.parquet'


BUCKETS = ((16, 16), (12, 20), (24, 16))


@pytest.mark.parametrize('kind', ['jsonl', 'parquet'])
def test_folder(tmp_path, kind):
  source = sources.FolderSource(folder(tmp_path, kind), BUCKETS)
  assert len(source) == 12 and not source.problems
  assert [source.bucket(i) for i in range(3)] == [(16, 16, 0), (12, 20, 1), (24, 16, 0)]
  record = source[7]
  assert record['target'].shape == (12, 20, 3) and tuple(record['target'][0, 0]) == (140, 0, 0)
  reference, = record['references']
  assert reference.shape == (40, 40, 3) and tuple(reference[0, 0]) == (120, 0, 0)
  assert (record['caption'], record['instruction'], record['kind']) == ('red 7', 'make it redder', 'edit')
  assert record.keys() == {'references', 'instruction', 'target', 'caption', 'kind'}  # other columns mean nothing
  assert source[6]['kind'] == 't2i' and source[6]['references'] == []

  def small(record, rng):
    return {'target': record['target'], 'references': np.int32(len(record['references']))}
  shapes = {(b['target'].shape, *b['references']) for b in take(loader.batches([(source, 1)], small, 2), 24)}
  assert shapes == {((2, h, w, 3), r, r) for h, w in BUCKETS for r in (0, 1)}


def test_own_images_asked_for_again_alone(tmp_path):
  data = DataConfig(path=str(folder(tmp_path, 'jsonl')), tasks=(Task('reconstruct', 0.5),))
  (source, weight), = loader.mix(data)
  assert weight == 0.5 and source[0]['instruction'] == 'draw this picture again'


@pytest.mark.parametrize('kind', ['jsonl', 'parquet'])
def test_folder_with_broken_records(tmp_path, kind):
  changes = {2: {'target': 'p/gone.png'}, 4: {'caption': '  '}, 7: {'instruction': ''}, 9: {'target': 'p/text.png'},
             11: {'references': ['p/cut.png']}}
  (tmp_path / 'p').mkdir()
  (tmp_path / 'p' / 'text.png').write_text('no image')
  (tmp_path / 'p' / 'cut.png').write_bytes(b'\x89PNG\r\n\x1a\n')
  listed = folder(tmp_path, kind, changes=changes)
  with pytest.raises(ValueError, match='4 of 12 records .*gone.png is not there.*caption is empty.*no instruction'):
    sources.FolderSource(listed, BUCKETS)
  source = sources.FolderSource(listed, BUCKETS, share=0.5)
  assert len(source.problems) == 4 and ('line 3' if kind == 'jsonl' else 'row 3') in source.problems[0]
  assert [i for i in range(12) if source.bucket(i) is None] == [2, 4, 7, 9]
  with pytest.raises(BrokenRecord, match='cut.png'):  # references are not looked at before they are needed
    source[11]

  def which(record, rng):
    return {'i': np.int32(int(record['caption'].split()[1]))}
  seen = take(loader.batches([(source, 1)], which, 1), 14)
  assert set(numbers(seen)) == {0, 1, 3, 5, 6, 8, 10}
  assert numbers(seen, 'skipped').sum() > 0


@pytest.mark.parametrize('line, words', [
    ('{"references": [', 'line 3: it is not JSON'), ('[1, 2]', 'line 3: it is a list'),
    ('\xff', 'line 3: it is not JSON'),
    ('{"references": [], "target": "a.png", "caption": "a"}', 'line 3: it has no instruction'),
    ('{"references": "a.png", "instruction": "", "target": "a.png", "caption": "a"}', 'line 3: references is'),
    ('{"references": [], "instruction": "", "target": null, "caption": "a"}', 'line 3: target is None')])
def test_folder_with_malformed_lines(tmp_path, line, words):
  listed = folder(tmp_path, count=2)
  listed.write_bytes(listed.read_bytes().rstrip() + b'\n' + line.encode('latin-1') + b'\n')
  with pytest.raises(ValueError, match=words):
    sources.FolderSource(listed, BUCKETS)
  source = sources.FolderSource(listed, BUCKETS, share=0.5)
  assert [source.bucket(i) is None for i in range(3)] == [False, False, True] and len(source.problems) == 1
  with pytest.raises(BrokenRecord, match=words):
    source[2]


def test_folder_refused(tmp_path):
  refused = (('a.csv', 'x', 'neither'), ('b.jsonl', '\n', 'no records'), ('c.parquet', 'x', 'not a Parquet'))
  for name, text, words in refused:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
      sources.FolderSource(tmp_path / name)
  with pytest.raises(ValueError, match='not there'):
    sources.FolderSource(tmp_path / 'gone.jsonl')
  pyarrow.parquet.write_table(pyarrow.table({'target': ['a.png'], 'caption': ['a']}), tmp_path / 'd.parquet')
  with pytest.raises(ValueError, match='no column references, instruction'):
    sources.FolderSource(tmp_path / 'd.parquet')


def test_own_images_are_cut_to_the_aspects_that_are_asked_for(tmp_path):
  data = DataConfig(path=str(folder(tmp_path)), aspects=('4:3', '2:3'), size=64, unit=8)
  (source, _), = loader.mix(data)
  assert {source.bucket(i)[:2] for i in range(12)} == {(48, 64), (72, 48)} == {x['target'].shape[:2] for x in source}
