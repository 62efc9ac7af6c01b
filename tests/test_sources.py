"""A user's own lists: what is read, what is found broken at the start, and what a broken record does to a run."""

import itertools
import json
import pickle

import numpy as np
from PIL import Image
import pyarrow
import pyarrow.parquet
import pytest

from unifusion_jax.data import lists, loader, sources
from unifusion_jax.data.config import DataConfig, Task
from unifusion_jax.errors import BrokenRecord, UserError


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
  with pytest.raises(ValueError, match='5 of 12 records .*gone.png is not there.*caption is empty.*no instruction'):
    sources.FolderSource(listed, BUCKETS)
  source = sources.FolderSource(listed, BUCKETS, share=0.5)
  assert len(source.problems) == 5 and ('line 3' if kind == 'jsonl' else 'row 3') in source.problems[0]
  assert [i for i in range(12) if source.bucket(i) is None] == [2, 4, 7, 9, 11]
  with pytest.raises(BrokenRecord, match='cut.png'):
    source[11]
  (tmp_path / 'p' / '6.png').unlink()
  seen = take(loader.batches([(source, 1)], which, 1), 14)
  assert set(numbers(seen)) == {0, 1, 3, 5, 8, 10}
  assert numbers(seen, 'skipped').sum() > 0


def which(record, rng):
  return {'i': np.int32(int(record['caption'].split()[1]))}


ODD = [
    ({'caption': 'a \ud83d smile'}, 'caption holds half of a surrogate pair'), ({'caption': None}, 'caption is None'),
    ({'caption': {'text': 'a' * 10 ** 6}}, 'caption is dict, wanted text'), ({'caption': 7}, 'caption is 7'),
    ({'references': ['p/0.png'], 'instruction': '\udcff'}, 'instruction holds half'),
    ({'target': 'n' * 256 + '.png'}, 'cannot be a file .File name too long'),
    ({'target': 'p/\0.png'}, 'cannot be a file .*null'), ({'target': 'p/\ud83d.png'}, 'cannot be a file .*surrogates'),
    ({'target': 'p'}, 'a folder or a device'), ({'target': 'loop.png'}, 'cannot be a file .*symbolic links'),
    ({'target': 'p/0.png/1.png'}, 'Not a directory'), ({'target': ''}, 'target is empty'),
    ({'target': 'hollow.png'}, 'hollow.png is empty'), ({'target': {'bytes': None, 'path': None}}, 'target is None'),
    ({'references': ['p/gone.png'], 'instruction': 'x'}, 'gone.png is not there'),
    ({'references': ['n' * 300], 'instruction': 'x'}, 'File name too long'),
    ({'references': [None], 'instruction': 'x'}, 'reference 1 is None'), ({'references': 'p/0.png'}, 'references is'),
    ('[' * 100_000, 'it is not JSON .*recursion'), ('{"a": ' * 100_000, 'it is not JSON .*recursion'),
    ('9' * 5000, 'it is not JSON'), ('"x"', 'it is a str'), ('\0' * 40, 'it is not JSON'), ('null', 'it is a NoneType')]


def test_whatever_a_record_holds_it_is_found_at_the_start_and_named(tmp_path):
  listed = folder(tmp_path, count=4)
  (tmp_path / 'hollow.png').write_bytes(b'')
  (tmp_path / 'loop.png').symlink_to('loop.png')
  good = dict(references=[], instruction='', target='p/0.png', caption='red 0')
  lines = [odd if isinstance(odd, str) else json.dumps(good | odd) for odd, _ in ODD]
  listed.write_text(listed.read_text().rstrip() + '\n' + '\n'.join(lines) + '\n')
  source = sources.FolderSource(listed, BUCKETS, share=0.9)
  assert len(source.problems) == len(ODD)
  for number, (problem, (odd, words)) in enumerate(zip(source.problems, ODD), 5):
    assert f'list.jsonl line {number}: ' in problem and len(problem) < 700, problem
    problem.encode()
    with pytest.raises(BrokenRecord, match=f'line {number}: .*{words}'):
      source[number - 1]
  assert set(numbers(take(loader.batches([(source, 1)], which, 1), 8))) == {0, 1, 2, 3}


@pytest.mark.parametrize('kind', ['jsonl', 'parquet'])
def test_columns_of_a_users_own_mean_nothing(tmp_path, kind):
  own = dict(rewrites='some letters', tiles='terracotta', task=['colour'], kind='mine', skipped=5, more=[1])
  bare = sources.FolderSource(folder(tmp_path, kind), BUCKETS)[7]
  source = sources.FolderSource(folder(tmp_path, kind, changes={i: own for i in range(12)}), BUCKETS)
  assert source[7].keys() == bare.keys() and source[7]['kind'] == bare['kind'] == 'edit'
  assert sources.InTiles(source, 3)[7]['tiles'] == 3


def test_the_transform_names_the_line_too(tmp_path, caplog):
  """A record that the transform cannot use, in whatever way, is passed over and counted."""
  def fussy(record, rng):
    if record['caption'] == 'red 3':
      raise TypeError('TextEncodeInput must be Union')
    if record['caption'] == 'red 6':
      raise BrokenRecord('a prompt of 459 tokens')
    return which(record, rng)
  source = sources.FolderSource(folder(tmp_path), BUCKETS)
  seen = take(loader.batches([(source, 1)], fussy, 1, seed=3), 24)
  assert set(numbers(seen)) == set(range(12)) - {3, 6} and numbers(seen, 'skipped').sum() >= 2
  assert 'list.jsonl line 4: TypeError: TextEncodeInput' in caplog.text
  assert 'list.jsonl line 7: a prompt of 459 tokens' in caplog.text


def test_a_canvas_whose_only_record_is_broken_does_not_stop_the_run(tmp_path):
  def fussy(record, rng):
    if record['target'].shape == (12, 20, 3):
      raise BrokenRecord('too wide')
    return which(record, rng)
  source = sources.FolderSource(folder(tmp_path, count=3), BUCKETS)
  assert set(numbers(take(loader.batches([(source, 1)], fussy, 1), 6))) == {0, 2}


def test_a_list_that_is_gone_stops_the_run(tmp_path):
  listed = folder(tmp_path)
  source = sources.FolderSource(listed, BUCKETS)
  listed.unlink()
  with pytest.raises(FileNotFoundError, match='list.jsonl'):
    next(loader.batches([(source, 1)], which, 1))


def test_lists_as_windows_writes_them(tmp_path):
  listed = folder(tmp_path, count=3, changes={1: {'target': 'p\\1.png', 'references': ['p\\0.png']}})
  listed.write_bytes(b'\xef\xbb\xbf\r\n' + listed.read_bytes().replace(b'\n', b'\r\n'))
  source = sources.FolderSource(listed, BUCKETS)
  assert [record['caption'] for record in source] == ['red 0', 'red 1', 'red 2'] and not source.problems
  assert source.where(0).endswith('line 2')
  for encoding in ('utf-16', 'utf-16-le', 'utf-32'):
    (tmp_path / 'wide.jsonl').write_bytes(listed.read_bytes().decode('utf-8-sig').strip().encode(encoding))
    with pytest.raises(ValueError, match='wide.jsonl is in UTF-16.*save it as UTF-8'):
      sources.FolderSource(tmp_path / 'wide.jsonl', BUCKETS)


def public(path, **options):
  """A Parquet file as public sets have it: structs of bytes and path, of which either may be null."""
  def image(bytes_of=None, path=None):
    return {'bytes': bytes_of, 'path': path}
  listed = folder(path)
  data = [(path / 'p' / f'{i}.png').read_bytes() for i in range(12)]
  struct = pyarrow.struct([('bytes', pyarrow.binary()), ('path', pyarrow.string())])
  rows = [json.loads(line) for line in listed.read_text().splitlines() if line]
  target = [image(data[i], 'a name of no file.png') if i % 3 else image(path=f'p/{i}.png') for i in range(12)]
  references = [[image(data[i - 1])] if row['references'] else None for i, row in enumerate(rows)]
  columns = dict(
      target=pyarrow.array(target, struct), references=pyarrow.array(references, pyarrow.list_(struct)),
      caption=pyarrow.array([row['caption'] for row in rows]).dictionary_encode(),
      instruction=pyarrow.array([row['instruction'] or None for row in rows], pyarrow.large_string()),
      embedding=pyarrow.array([[1.0]] * 12))
  pyarrow.parquet.write_table(pyarrow.table(columns), path / 'public.parquet', **options)
  return listed, path / 'public.parquet'


@pytest.mark.parametrize('rows', [5, 100])
def test_parquet_with_images_inside(tmp_path, monkeypatch, rows):
  monkeypatch.setattr(lists, 'CACHE', 1)  # one row group at a time
  listed, inside = public(tmp_path, row_group_size=rows)
  ours, theirs = (sources.FolderSource(path, BUCKETS) for path in (inside, listed))
  ours[0]
  ours = pickle.loads(pickle.dumps(ours))  # to a worker process
  assert not ours.problems and len(ours) == 12
  for i in (*range(12), 3, 11, 0):
    record, same = ours[i], theirs[i]
    assert ours.bucket(i) == theirs.bucket(i) and record.keys() == same.keys()
    for name, value in same.items():
      np.testing.assert_array_equal(record[name], value)


def test_a_damaged_parquet_file_is_one_sentence(tmp_path):
  listed = folder(tmp_path, 'parquet')
  data, rng = listed.read_bytes(), np.random.default_rng(0)
  for _ in range(100):
    changed = bytearray(data)
    changed[rng.integers(len(data) - 1500, len(data))] = rng.integers(256)
    listed.write_bytes(changed)
    try:
      sources.FolderSource(listed, BUCKETS, share=1.0)
    except UserError as error:
      assert len(str(error)) < 1500


def test_no_message_holds_an_image(tmp_path):
  good, text = (tmp_path / 'good.png'), b'\x89PNG no image at all' * 10_000
  Image.new('RGB', (40, 40)).save(good)
  rows = [dict(references=[], instruction='', target=good.read_bytes(), caption='x') for _ in range(6)]
  rows[1]['target'], rows[2]['references'], rows[3]['caption'], rows[4]['target'] = text, [text], None, None
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'a.parquet')
  with pytest.raises(ValueError, match='row 2: an image of 200000 bytes is .*row 3: .*row 4: caption is None') as error:
    sources.FolderSource(tmp_path / 'a.parquet', BUCKETS)
  assert len(str(error.value)) < 1500
  captions = pyarrow.table(dict(references=[[]], instruction=[''], target=['good.png'], caption=[text]))
  pyarrow.parquet.write_table(captions, tmp_path / 'b.parquet')
  with pytest.raises(ValueError, match='caption is bytes, wanted text$'):
    sources.FolderSource(tmp_path / 'b.parquet', BUCKETS)


def test_text_of_another_encoding_in_parquet_is_one_broken_record(tmp_path):
  listed = folder(tmp_path, 'parquet')
  table = pyarrow.parquet.read_table(listed)
  captions = pyarrow.array([*(f'red {i}'.encode() for i in range(11)), b'caf\xe9']).view(pyarrow.string())
  pyarrow.parquet.write_table(table.set_column(table.column_names.index('caption'), 'caption', captions), listed)
  source = sources.FolderSource(listed, BUCKETS, share=0.5)
  assert len(source.problems) == 1 and 'row 12: it is not what the file says it is' in source.problems[0]


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
  (tmp_path / 'shards').mkdir()
  (tmp_path / 'shards' / '00000.tar').write_bytes(b'')
  with pytest.raises(ValueError, match='data.path=.*shards.* is a folder with files of .tar'):
    loader.mix(DataConfig(path=str(tmp_path / 'shards')))
  pyarrow.parquet.write_table(pyarrow.table({'target': ['a.png'], 'caption': ['a']}), tmp_path / 'd.parquet')
  with pytest.raises(ValueError, match='no column references, instruction'):
    sources.FolderSource(tmp_path / 'd.parquet')


def test_own_images_are_cut_to_the_aspects_that_are_asked_for(tmp_path):
  data = DataConfig(path=str(folder(tmp_path)), aspects=('4:3', '2:3'), size=64, unit=8)
  (source, _), = loader.mix(data)
  assert {source.bucket(i)[:2] for i in range(12)} == {(48, 64), (72, 48)} == {x['target'].shape[:2] for x in source}
