"""Writing offline: every request once, nothing lost by an interruption, and training reads the ids that were written."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from unifusion_jax import config, jobs, sharding, verifi
from unifusion_jax.commands import rewrite
from unifusion_jax.data import imaging, loader, mix, rewrites, sources
from unifusion_jax.models import text_generation
from unifusion_jax.weights import hub

ASKED = ('make it blue', 'make it green', 'make it blue', 'remove it', 'endless', 'silent')


@pytest.fixture
def listed(tmp_path):
  """A list of edits of one image, one of them twice, and a text prompt."""
  folder = tmp_path / 'own'
  for i in range(2):
    noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    imaging.write_png(folder / f'{i}.png', noise)
  rows = [dict(references=['0.png'], instruction=text, target='1.png', caption='a caption') for text in ASKED]
  rows.append(dict(references=[], instruction='', target='0.png', caption='a red circle'))
  (folder / 'list.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return folder / 'list.jsonl'


@pytest.fixture
def asks(recipe, listed):
  """`asks(changes)` -> a Config over that list."""
  def make(rewrites=None, **changes):
    data = dataclasses.replace(recipe().data, path=str(listed), tasks=('edit',), max_prompt_tokens=(112,), rewrites=rewrites)
    return recipe(data=data, rewrite=rewrite.RewriteConfig(batch_size=4, **changes))
  return make


@pytest.fixture
def echo(monkeypatch, recipe):
  """`echo(config, workdir, mesh)` rewrites with a VLM that writes the request back -> the requests that it was asked."""
  asked, folder = [], recipe().vlm

  def made(vlm, tokens, valid, tiles, *, max_new, stop_ids, temperature, top_p, key):
    chat = verifi.Chat(folder)
    out, lengths = np.zeros((len(tokens), max_new), np.int32), []
    for row, (ids, real) in enumerate(zip(np.asarray(tokens), np.asarray(valid))):
      text = chat.tokenizer.decode(ids[real]).split('user\n')[-1].split('</img>')[-1].split('<|im_end|>')[0].strip()
      asked.append(text)
      more = '' if key is None else f' {int(np.asarray(jax.random.key_data(key))[row, -1]) % 97}'
      written = [*chat.text_ids(text + more), *stop_ids]
      written = {'silent': [*stop_ids], 'endless': list(chat.text_ids('red ' * max_new))[:max_new]}.get(text, written)
      out[row, :len(written)] = written
      lengths.append(len(written))
    return text_generation.Generated(sharding.shard(out), sharding.shard(np.array(lengths)), None, None, None)

  def run(config, workdir, mesh):
    asked.clear()
    jobs.build(config).rewrite(workdir, mesh)
    return set(asked)

  monkeypatch.setattr(rewrite.generate, 'generate', made)
  monkeypatch.setattr(jobs.Generation, 'load_vlm', lambda self: None)
  return run


def test_every_request_is_written_once_and_read_in_training(asks, echo, mesh, tmp_path, capsys):
  assert echo(asks(), tmp_path, mesh) == {*ASKED, 'a red circle'}
  folder = tmp_path / 'rewrites'
  lines = [json.loads(line) for line in (folder / 'rewrites-00000.jsonl').read_text().splitlines()]
  assert len(lines) == len({line['key'] for line in lines}) == 6  # one of seven asks the same of the same image
  assert sorted(sum((line['texts'] for line in lines), [])) == sorted({*ASKED[:4], 'a red circle'})
  said = capsys.readouterr().out
  assert '4 rewrites' in said and '2 without words, end or room left out' in said

  made = asks(rewrites=str(folder))
  chat = jobs.transforms.prompt_encoder(made).chat
  (source, _), = mix.mix(made.data)
  for i, text in enumerate((*ASKED[:4], 'a red circle')):
    record = source[i if i < 4 else 6]
    assert [chat.read(ids) for ids in record['rewrites']] == [text]
  assert source[4]['rewrites'] == source[5]['rewrites'] == []
  _, transform = jobs.build(made).data()
  transform = dataclasses.replace(transform, cond_dropout=0.0, image_dropout=0.0, text_dropout=0.0)
  for i, text in ((1, 'make it green'), (4, 'endless')):  # a request without a rewrite is kept itself
    example = transform(source[i], np.random.default_rng(0))
    kept = example['input_ids'][example['cond_index'][example['cond_mask']]]
    assert chat.read(kept[16:]) == text
  batches = loader.batches(mix.mix(made.data), transform, 8)
  assert next(batches)['input_ids'].shape[0] == 8
  batches.close()


def test_an_interrupted_run_goes_on(asks, echo, mesh, tmp_path):
  echo(asks(), tmp_path / 'whole', mesh)
  echo(asks(), tmp_path / 'cut', mesh)
  path = tmp_path / 'cut' / 'rewrites' / 'rewrites-00000.jsonl'
  whole = path.read_bytes()
  lines = whole.splitlines(keepends=True)
  path.write_bytes(b''.join(lines[:2]) + lines[2][:20])  # killed in the middle of a line
  left = echo(asks(), tmp_path / 'cut', mesh)
  assert len(left) == 4 and sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())
  assert not echo(asks(), tmp_path / 'cut', mesh)  # nothing is left to do


def test_several_rewrites_differ_and_do_not_depend_on_the_run(asks, echo, mesh, tmp_path):
  hot = asks(count=3, temperature=1.0)
  tables = []
  for name in ('one', 'two'):
    echo(hot, tmp_path / name, mesh)
    table = rewrites.Table(tmp_path / name / 'rewrites')
    tables.append({key: table[key] for key in table._places})
  assert tables[0] == tables[1]
  assert all(len(set(map(tuple, ids))) == 3 for ids in tables[0].values() if ids) and any(tables[0].values())


def test_a_request_that_is_too_long_is_passed_over(asks, echo, mesh, tmp_path, listed, capsys):
  long = dict(references=['0.png'], instruction='red ' * 200, target='1.png', caption='a caption')
  listed.write_text(json.dumps(long) + '\n' + listed.read_text())
  assert echo(asks(), tmp_path, mesh) == {*ASKED, 'a red circle'}
  assert '4 rewrites' in (said := capsys.readouterr().out) and '1 broken records passed over' in said


def test_a_rewrite_that_finds_no_room_in_training_is_left_out(asks, echo, mesh, tmp_path, listed):
  """The request and what was written stand in one prompt."""
  request = 'make it blue ' * 12
  listed.write_text(json.dumps(dict(references=['0.png'], instruction=request.strip(), target='1.png', caption='x')) + '\n')
  rooms = {}
  for text in (60, 112):
    made = asks()
    made.data.max_prompt_tokens = (text,)
    made.data.max_rewrite_tokens = (44,)
    echo(made, tmp_path / str(text), mesh)
    rooms[text], = (json.loads(line)['texts'] for line in (tmp_path / str(text) / 'rewrites' / 'rewrites-00000.jsonl').open())
  assert rooms == {60: [], 112: [request.strip()]}


def test_a_rewrite_is_held_to_the_room_of_its_task(asks, echo, mesh, tmp_path, monkeypatch):
  made = asks()
  made.data = dataclasses.replace(made.data, tasks=('edit', 't2i'), weights=(0.5, 0.5), max_prompt_tokens=(112, 112), max_rewrite_tokens=(2, 30))
  records = mix.mix(dataclasses.replace(made.data, rewrites=None))[0][0]
  monkeypatch.setattr(type(records), '__getitem__', _with_task(type(records).__getitem__))
  echo(made, tmp_path, mesh)
  texts = [json.loads(line)['texts'] for line in (tmp_path / 'rewrites' / 'rewrites-00000.jsonl').open()]
  assert sum(texts, []) == ['a red circle']  # of the prompt; the edits' answers are longer than 2 tokens


def _with_task(read):
  def record(self, i):
    found = read(self, i)
    return dict(found, task=found['kind'])
  return record


def test_a_vlm_trained_further_is_another_one(tmp_path):
  shutil.copytree(config.ASSETS / 'vlm', tmp_path / 'vlm')
  before = hub.fingerprint(tmp_path / 'vlm')
  assert before == hub.fingerprint(config.ASSETS / 'vlm')
  tensors = safetensors.numpy.load_file(tmp_path / 'vlm' / 'model.safetensors')
  safetensors.numpy.save_file({name: x * 2 for name, x in tensors.items()}, tmp_path / 'vlm' / 'model.safetensors')
  assert before != hub.fingerprint(tmp_path / 'vlm')
  (tmp_path / 'vlm' / 'tokenizer.json').rename(tmp_path / 'vlm' / 'tokenizer.model')  # as InternLM2's folders have it
  assert hub.fingerprint(tmp_path / 'vlm')


def test_other_settings_are_refused(asks, echo, mesh, tmp_path):
  echo(asks(), tmp_path, mesh)
  with pytest.raises(ValueError, match="system: .* there, 'Sing.' now"):
    echo(dataclasses.replace(asks(), system='Sing.'), tmp_path, mesh)
  with pytest.raises(ValueError, match='system: '):
    jobs.build(dataclasses.replace(asks(rewrites=str(tmp_path / 'rewrites')), system='Sing.')).data()
  jobs.build(asks(rewrites=str(tmp_path / 'rewrites'), count=2, temperature=1.0)).data()  # how many is no matter now
  with pytest.raises(ValueError, match='holds no settings.json'):
    jobs.build(asks(rewrites=str(tmp_path))).data()


def test_a_request_without_a_rewrite_is_a_broken_record(asks, echo, mesh, tmp_path, listed):
  echo(asks(), tmp_path, mesh)
  (tmp_path / 'rewrites' / 'rewrites-00000.jsonl').write_text(
      (tmp_path / 'rewrites' / 'rewrites-00000.jsonl').read_text().splitlines(keepends=True)[0])
  (source, _), = mix.mix(asks(rewrites=str(tmp_path / 'rewrites')).data)
  found = 0
  for i in range(len(source)):
    try:
      found += bool(source[i])
    except sources.BrokenRecord as error:
      assert 'has no rewrite' in str(error)
  assert 1 <= found <= 2


@pytest.mark.parametrize('changes, said', [
    (dict(count=2), 'rewrite.temperature above 0'), (dict(temperature=-1.0), 'rewrite.temperature=-1.0'),
    (dict(top_p=0.0), 'rewrite.top_p=0.0')])
def test_errors(asks, mesh, tmp_path, changes, said):
  with pytest.raises(ValueError, match=said):
    rewrite.write(asks(**changes), None, [], tmp_path, mesh)


def test_scenes_have_no_end(recipe, mesh, tmp_path):
  with pytest.raises(ValueError, match='data.scenes.builder'):
    rewrite.write(recipe(), None, [], tmp_path, mesh)
  with pytest.raises(ValueError, match='rewritten for a DiT'):
    jobs.Writing(None).rewrite(tmp_path, mesh)
