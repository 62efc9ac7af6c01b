"""Files of public benchmarks: the schema of each set, malformed ones, checksums, and the layouts that scorers take."""

import dataclasses
import hashlib
import json

from benchmark_sets import ASKED, DPG, lay, lines, ONEIG, png, read
import pyarrow as pa
import pyarrow.parquet
import pytest

from unifusion_jax.commands import benchmark
from unifusion_jax.data import imaging
from unifusion_jax.errors import UserError
from unifusion_jax.evaluation.benchmarks.files import git_id
from unifusion_jax.evaluation.benchmarks.records import Question
from unifusion_jax.evaluation.benchmarks.sets import SETS

COMMIT = 'c' * 40


def test_geneval(tmp_path):
  one, two = read('geneval', lay(tmp_path, 'geneval'))
  assert (one.id, one.prompt, one.categories) == ('00000', 'a red circle', ('single_object',))
  assert two.line == dict(tag='counting', include=[{'class': 'star', 'count': 2}], prompt='two stars')
  assert two.place.endswith('evaluation_metadata.jsonl line 2') and two.caption == two.prompt


def test_geneval2(tmp_path):
  (one,) = read('geneval2', lay(tmp_path, 'geneval2'))
  assert one.categories == ('3 atoms',) and one.questions == (
      Question('How many stars are there?', 'two', 'count'), Question('Are the stars red?', 'yes', 'attribute'))


def test_dpg(tmp_path):
  one, two = read('dpg', lay(tmp_path, 'dpg'))
  assert (one.id, two.id, one.prompt) == ('7', 'COCOval1', 'a red circle, and a star')
  assert [(q.category, q.broad, q.parents) for q in one.questions] == [
      ('entity - whole', 'entity', ()), ('attribute - color', 'attribute', (0,)),
      ('relation - spatial', 'relation', (0, 1))]


def test_genai(tmp_path):
  found = read('genai', lay(tmp_path, 'genai'))
  assert [(record.id, record.categories) for record in found] == [
      ('00000', ('basic', 'attribute')), ('00001', ('counting', 'advanced', 'attribute')), ('00002', ())]


def test_oneig(tmp_path):
  anime, sign = read('oneig', lay(tmp_path, 'oneig'))
  assert (anime.id, anime.folder, anime.prompt) == ('anime_000', 'anime', 'a girl, smiling')
  assert [q.parents for q in anime.questions] == [(), (0,)] and sign.questions == ()
  (tmp_path / 'OneIG-Bench-ZH.csv').write_text('category,id,prompt_cn,class\nText_Rendering,001,招牌,\n')
  (chinese,) = read('oneig', tmp_path, 'zh')
  assert (chinese.id, chinese.prompt) == ('text_001', '招牌')


def test_imgedit(tmp_path):
  (one,) = read('imgedit', lay(tmp_path, 'imgedit'))
  assert one.references == (str(tmp_path / 'animal/1.png'),) and one.categories == ('adjust',) and not one.caption
  (tmp_path / 'animal').rename(tmp_path / 'elsewhere')
  with pytest.raises(UserError, match="basic_edit.json '1082': .*animal/1.png is not there.*benchmark.references"):
    read('imgedit', tmp_path)


@pytest.mark.parametrize('suffix', ['parquet', 'arrow'])
def test_gedit(tmp_path, suffix):
  image = dict(bytes=png(), path=None)
  rows = [dict(task_type='style_change', key=f'{i}a', instruction='make it snow', instruction_language=each,
               input_image=image, input_image_raw=dict(bytes=png(size=(96, 64)), path=None), Intersection_exist=i == 0)
          for i, each in enumerate(('en', 'cn', 'en'))]
  table = pa.Table.from_pylist(rows)
  path = tmp_path / 'data' / f'train-00000-of-00001.{suffix}'
  path.parent.mkdir()
  if suffix == 'parquet':
    pyarrow.parquet.write_table(table, path)
  else:
    with pa.OSFile(str(path), 'wb') as file, pa.ipc.new_stream(file, table.schema) as writer:
      writer.write_table(table)
  one, two = read('gedit', tmp_path)
  assert one.categories == ('style_change', 'intersection') and two.categories == ('style_change',)
  assert one.folder == 'fullset/style_change/en' and imaging.read_size(one.references[0]) == (64, 96)
  assert [record.id for record in read('gedit', tmp_path, 'zh')] == ['1a']
  for images, prefixes in ((1, ['']), (2, ['0/', '1/'])):
    files = [SETS['gedit'].beside(one, output) for output in SETS['gedit'].layout(one, images)]
    assert [list(each) for each in files] == [[f'{prefix}fullset/style_change/en/0a_SRCIMG.png'] for prefix in prefixes]
    assert all(imaging.read_size(content) == (64, 64) for each in files for content in each.values())


def test_own(tmp_path):
  one, two = read('own', lay(tmp_path, 'own'))
  assert one.id == 'one' and one.questions[1] == Question('how many?', 'one', 'count', (0,))
  assert two.id == '00001' and two.target == str(tmp_path / 'b.png') and two.caption == 'a blue square'
  assert read('own', tmp_path / 'prompts.jsonl') == [one, two]


def test_a_file_itself(tmp_path):
  """Whatever its name, and whatever lies beside it; other files of its set are those beside it."""
  for name, file in (('genai', 'genai_image.json'), ('oneig', 'OneIG-Bench.csv'), ('dpg', 'dpg_bench/dpg_bench.csv')):
    folder = lay(tmp_path / name, name)
    whole = read(name, folder)
    assert [record.id for record in read(name, folder / file)] == [record.id for record in whole]
    renamed = (folder / file).with_stem('mine')
    (folder / file).rename(renamed)
    assert [record.questions for record in read(name, renamed)] == [record.questions for record in whole]
  lay(tmp_path, 'own')
  (tmp_path / 'hard.jsonl').write_text(lines(dict(prompt='x', references=['a.png'])))
  (hard,) = read('own', tmp_path / 'hard.jsonl')
  assert hard.prompt == 'x' and hard.references == (str(tmp_path / 'a.png'),)
  (tmp_path / 'genai' / 'genai_skills.json').unlink()
  with pytest.raises(UserError, match='genai has no genai_skills.json'):
    read('genai', tmp_path / 'genai' / 'mine.json')


@pytest.mark.parametrize('name, file, content, sentence', [
    ('geneval', 'evaluation_metadata.jsonl', '{"tag": "x", "prompt": "y"}\n{"tag": ', 'line 2 is no JSON'),
    ('geneval', 'evaluation_metadata.jsonl', '{"prompt": "y"}\n', "line 1 has no 'tag'"),
    ('geneval', 'evaluation_metadata.jsonl', '{"tag": "x", "prompt": 3}\n', 'line 1: prompt is a int, wanted text'),
    ('geneval', 'evaluation_metadata.jsonl', '[1]\n', 'line 1 must be an object'),
    ('geneval', 'evaluation_metadata.jsonl', '', 'is empty'),
    ('geneval2', 'geneval2_data.jsonl', lines(dict(prompt='x', atom_count=3, vqa_list=[['a', 'b']], skills=[])),
     'line 1 has a value of the wrong kind'),
    ('dpg', 'dpg_bench.csv', DPG.replace(',dependency', ',needs'), 'line 1 has no column dependency'),
    ('dpg', 'dpg_bench.csv', DPG.replace('"1, 2"', '9'), r'line 4: it depends on proposition 9'),
    ('dpg', 'dpg_bench.csv', DPG.replace(',2,1,', ',1,1,'), 'line 3: proposition 1 of .7. is there twice'),
    ('dpg', 'dpg_bench.csv', DPG.encode()[:120] + b'\xff\n', 'line 2 holds the byte 0xff'),
    ('dpg', 'dpg_bench.csv', DPG.replace('COCOval1', '../7'), "line 5: '../7' cannot name a file"),
    ('genai', 'genai_skills.json', '{"counting": [9]}', "'counting': prompt 00009 is not in"),
    ('genai', 'genai_image.json', '[]', 'must hold an object'),
    ('oneig', 'OneIG-Bench.csv', ONEIG.replace('Text_', 'Test_'), "line 3: the category 'Test_Rendering'"),
    ('oneig', 'anime.json', json.dumps({'001': ASKED['000']}), "anime.json '000' has no '000'"),
    ('own', 'prompts.jsonl', '{"prompt": "x", "caption": "y", "tag": 1}\n', "line 1: there is no column 'tag'"),
    ('own', 'prompts.jsonl', '{"prompt": "x", "id": "a"}\n{"prompt": "y", "id": "a"}\n',
     "line 2: the name 'a' is taken by .* line 1"),
    ('own', 'prompts.jsonl', '{"prompt": "x", "references": ["none.png"]}\n', 'line 1: .*none.png is not there'),
    ('own', 'prompts.jsonl', '{"prompt": " "}\n', 'line 1: its prompt is empty'),
    ('own', 'prompts.jsonl', lines(dict(prompt='x', questions=[dict(question='a?', parents=[2])])),
     "line 1: a question of '00000' depends on question 2"),
    ('own', 'prompts.jsonl', '{"prompt": "x", "category": ""}\n', 'line 1: a category is empty'),
    ('own', 'prompts.jsonl', '{"prompt": "x", "category": ["a", 3]}\n', 'line 1: category is a int, wanted text'),
    ('own', 'prompts.jsonl', '{"prompt": "x", "category": 3}\n', 'line 1: category is a int, wanted a list'),
    ('own', 'prompts.jsonl', '{"prompt": "x", "caption": 3}\n', 'line 1: caption is a int, wanted text'),
    ('own', 'prompts.jsonl', '{"prompt": "x", "questions": "a?"}\n', 'line 1: questions is a str, wanted a list'),
    ('own', 'prompts.jsonl', lines(dict(prompt='x', questions=[dict(question='a?', category=' ')])),
     'line 1: a category is empty'),
    ('own', 'prompts.jsonl', lines(dict(prompt='x', questions=[dict(question='a?', anwser='no')])),
     "line 1: a question: there is no column 'anwser': there are answer, category, parents, question"),
])
def test_a_malformed_file_is_named_with_its_line(tmp_path, name, file, content, sentence):
  with pytest.raises(UserError, match=sentence) as error:
    read(name, lay(tmp_path, name, **{file: content}))
  assert file in str(error.value) and '\n' not in str(error.value)


def test_checksums(tmp_path):
  """Known ones are kept to; another edition is pinned by the user, and unknown files are noted."""
  folder = lay(tmp_path, 'geneval')
  settings = benchmark.BenchmarkSettings('geneval', str(folder))
  with pytest.raises(UserError, match='benchmark.sha256=evaluation_metadata.jsonl=') as error:
    benchmark.read(settings)
  digest = str(error.value).rpartition('=')[2]
  files, found = benchmark.read(dataclasses.replace(settings, sha256=(f'evaluation_metadata.jsonl={digest}',)))
  assert len(found) == 2 and files.digests == {'evaluation_metadata.jsonl': digest}
  with pytest.raises(UserError, match='names other.jsonl, and of this set evaluation_metadata.jsonl are read'):
    benchmark.read(dataclasses.replace(settings, sha256=(f'evaluation_metadata.jsonl={digest}', f'other.jsonl={digest}'
                                                         )))
  assert not files.published
  files, _ = benchmark.read(benchmark.BenchmarkSettings('genai', str(lay(tmp_path, 'genai'))))
  assert [len(digest) for digest in files.digests.values()] == [64, 64] and not files.published


def test_a_file_is_known_by_the_id_of_git(tmp_path, monkeypatch):
  """As `git hash-object` gives it: of DPG's table that alone is known."""
  folder = lay(tmp_path, 'dpg')
  settings = benchmark.BenchmarkSettings('dpg', str(folder))
  with pytest.raises(UserError, match="has git's id 98457fc9901943f51ff9a30367250fc292533bed"):
    benchmark.read(settings)
  content = (folder / 'dpg_bench' / 'dpg_bench.csv').read_bytes()
  assert git_id(b'what is up, doc?') == 'bd9dbf5aae1a3862dd1526723246b20206e5fc37'  # the example of git's own book
  monkeypatch.setitem(SETS['dpg'].known, 'dpg_bench.csv', git_id(content))
  files, _ = benchmark.read(settings)
  assert files.published == {'dpg_bench.csv'} and files.digests['dpg_bench.csv'] == hashlib.sha256(content).hexdigest()


def test_a_set_by_its_id(tmp_path, monkeypatch):
  """As huggingface_hub keeps a dataset; the commit is in the name."""
  from huggingface_hub import constants
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
  root = tmp_path / 'hub' / 'datasets--BaiqiL--GenAI-Bench-1600'
  lay(root / 'snapshots' / COMMIT, 'genai')
  (root / 'refs').mkdir()
  (root / 'refs' / 'main').write_text(COMMIT)
  files, found = benchmark.read(benchmark.BenchmarkSettings('genai'))
  assert files.name == f'BaiqiL/GenAI-Bench-1600@{COMMIT}' and len(found) == 3
  with pytest.raises(UserError, match='stepfun-ai/GEdit-Bench: .*not in the cache'):
    benchmark.read(benchmark.BenchmarkSettings('gedit'))
  with pytest.raises(UserError, match='the files of dpg are wanted: give their folder.*ELLA'):
    benchmark.read(benchmark.BenchmarkSettings('dpg'))


# Layouts


@pytest.mark.parametrize('name, images, wanted', [
    ('geneval', 2, ['00000/samples/00000.png', '00000/samples/00001.png', '00001/samples/00000.png',
                    '00001/samples/00001.png']),
    ('geneval2', 1, ['00000.png']), ('dpg', 4, ['7.png', 'COCOval1.png']),
    ('genai', 1, ['00000.jpeg', '00001.jpeg', '00002.jpeg']),
    ('oneig', 4, ['anime/model/000.webp', 'text/model/000.webp']),
    ('imgedit', 1, ['1082.png']), ('imgedit', 2, ['0/1082.png', '1/1082.png']), ('own', 1, ['one.png', '00001.png'])])
def test_layouts(tmp_path, name, images, wanted):
  found = read(name, lay(tmp_path, name))
  assert [output.path for record in found for output in SETS[name].layout(record, images)] == wanted
