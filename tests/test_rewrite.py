"""Offline rewriting: every request once, nothing lost by an interruption, and training reads the ids back."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from unifusion_jax import config, sharding, verifi
from unifusion_jax.commands import rewrite
from unifusion_jax.data import convert, imaging, loader, rewrites, transforms
from unifusion_jax.data.config import Task
from unifusion_jax.errors import BrokenRecord
from unifusion_jax.models import text_generation
from unifusion_jax.scenes import builder
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
    data = dataclasses.replace(recipe().data, path=str(listed), tasks=(Task('edit'),), rewrites=rewrites)
    return recipe(data=data, rewrite=rewrite.RewriteConfig(batch_size=4, **changes))
  return make


def echo(config, workdir, wrapped=lambda source: source):
  """Rewrites the requests of a Config with a VLM that writes the request back -> the requests that it was asked."""
  requests, chat = [], verifi.Chat(config.vlm)

  def generate(input_ids, attention_mask, tiles, *, max_new, stop_ids, temperature, top_p, key):
    ids, lengths = np.zeros((len(input_ids), max_new), np.int32), []
    for row, (tokens, valid) in enumerate(zip(np.asarray(input_ids), np.asarray(attention_mask))):
      prompt = chat.tokenizer.decode(tokens[valid])
      text = prompt.split('user\n')[-1].split('</img>')[-1].split('<|im_end|>')[0].strip()
      requests.append(text)
      more = '' if key is None else f' {int(np.asarray(jax.random.key_data(key))[row, -1]) % 97}'
      written = [*chat.text_ids(text + more), *stop_ids]
      written = {'silent': [*stop_ids], 'endless': list(chat.text_ids('red ' * max_new))[:max_new]}.get(text, written)
      ids[row, :len(written)] = written
      lengths.append(len(written))
    return text_generation.Generated(sharding.shard(ids), sharding.shard(np.array(lengths)), None, None, None)

  mixture = loader.mix(dataclasses.replace(config.data, rewrites=None))
  rewrite.write(config, [wrapped(source) for source, _ in mixture], workdir / 'rewrites', generate)
  return set(requests)


def test_the_vlm_rewrites_what_training_reads(recipe, tmp_path):
  """The embedded VLM rewrites prepared scenes: most rewrites equal the caption of their record."""
  builder.write(tmp_path, 'edit', 'train', 9)
  data = dataclasses.replace(recipe().data, path=str(tmp_path), tasks=(Task('edit'),), max_prompt_tokens=132,
                             max_rewrite_tokens=52)
  made = recipe(vlm=str(config.ASSETS / 'vlm'), data=data, rewrite=rewrite.RewriteConfig(batch_size=4))
  rewrite.run(made, tmp_path)
  made.data = dataclasses.replace(data, rewrites=str(tmp_path / 'rewrites'))
  rewrite.check(made)
  chat, ((source, _),) = verifi.Chat(made.vlm), loader.mix(made.data)
  records = [source[i] for i in range(len(source))]
  right = [[chat.read(ids) for ids in record['rewrites']] == [record['caption']] for record in records]
  assert len(right) == 9 and sum(right) >= 6


def test_every_request_is_written_once_and_read_in_training(asks, tmp_path, capsys):
  assert echo(asks(), tmp_path) == {*ASKED, 'a red circle'}
  folder = tmp_path / 'rewrites'
  lines = [json.loads(line) for line in (folder / 'rewrites-00000.jsonl').read_text().splitlines()]
  assert len(lines) == len({line['key'] for line in lines}) == 6  # one of seven asks the same of the same image
  assert sorted(sum((line['texts'] for line in lines), [])) == sorted({*ASKED[:4], 'a red circle'})
  report = capsys.readouterr().out
  assert '4 rewrites' in report and '2 left out that were empty, had no end or did not fit' in report

  made = asks(rewrites=str(folder))
  chat = transforms.prompt_encoder(made).chat
  (source, _), = loader.mix(made.data)
  for i, text in enumerate((*ASKED[:4], 'a red circle')):
    record = source[i if i < 4 else 6]
    assert [chat.read(ids) for ids in record['rewrites']] == [text]
  assert source[4]['rewrites'] == source[5]['rewrites'] == []
  transform = transforms.GenerationExample(transforms.prompt_encoder(made), cond_dropout=0.0, image_dropout=0.0)
  for i, text in ((1, 'make it green'), (4, 'endless')):  # a request without a rewrite is kept itself
    example = transform(source[i], np.random.default_rng(0))
    kept = example['input_ids'][example['cond_index'][example['cond_mask']]]
    assert chat.read(kept[16:]) == text
  batches = loader.batches(loader.mix(made.data), transform, 8)
  assert next(batches)['input_ids'].shape[0] == 8
  batches.close()


def test_shards_are_rewritten_as_the_list_they_were_made_of(asks, tmp_path, listed):
  shards = tmp_path / 'shards'
  convert.convert([str(listed)], convert.Settings(str(shards), 2, convert.COLUMNS))
  made = asks()
  echo(made, tmp_path / 'list')
  made.data = dataclasses.replace(made.data, path=str(shards))
  assert echo(made, tmp_path / 'shards_run') == {*ASKED, 'a red circle'}
  ours, theirs = (sorted((tmp_path / name / 'rewrites' / 'rewrites-00000.jsonl').read_text().splitlines())
                  for name in ('shards_run', 'list'))
  assert ours == theirs


def test_an_interrupted_run_goes_on(asks, tmp_path):
  echo(asks(), tmp_path / 'whole')
  echo(asks(), tmp_path / 'cut')
  path = tmp_path / 'cut' / 'rewrites' / 'rewrites-00000.jsonl'
  whole = path.read_bytes()
  lines = whole.splitlines(keepends=True)
  path.write_bytes(b''.join(lines[:2]) + lines[2][:20])  # killed in the middle of a line
  asked_again = echo(asks(), tmp_path / 'cut')
  assert len(asked_again) == 4 and sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())
  assert not echo(asks(), tmp_path / 'cut')  # nothing is left to do


def test_several_rewrites_differ_and_do_not_depend_on_the_run(asks, tmp_path):
  hot = asks(count=3, temperature=1.0)
  tables = []
  for name in ('one', 'two'):
    echo(hot, tmp_path / name)
    (source, _), = loader.mix(asks(rewrites=str(tmp_path / name / 'rewrites')).data)
    tables.append([source[i]['rewrites'] for i in range(len(source))])
  assert tables[0] == tables[1]
  assert all(len(set(map(tuple, ids))) == 3 for ids in tables[0] if ids) and any(tables[0])


def test_a_request_that_is_too_long_is_passed_over(asks, tmp_path, listed, capsys):
  long = dict(references=['0.png'], instruction='red ' * 200, target='1.png', caption='a caption')
  listed.write_text(json.dumps(long) + '\n' + listed.read_text())
  assert echo(asks(), tmp_path) == {*ASKED, 'a red circle'}
  report = capsys.readouterr().out
  assert '4 rewrites' in report and '1 broken records passed over' in report


def texts(workdir) -> list[str]:
  lines = (workdir / 'rewrites' / 'rewrites-00000.jsonl').read_text().splitlines()
  return sum((json.loads(line)['texts'] for line in lines), [])


def test_a_rewrite_that_does_not_fit_beside_its_request_is_left_out(asks, tmp_path, listed):
  request = ('make it blue ' * 12).strip()
  listed.write_text(json.dumps(dict(references=['0.png'], instruction=request, target='1.png', caption='x')) + '\n')
  for prompt, written in ((60, []), (112, [request])):
    made = asks()
    made.data.max_prompt_tokens, made.data.max_rewrite_tokens = prompt, 44
    echo(made, tmp_path / str(prompt))
    assert texts(tmp_path / str(prompt)) == written


class WithTask:
  """Another source, whose records say of what task they are, as those of scenes do."""

  def __init__(self, source):
    self._source, self.name, self.bucket = source, source.name, source.bucket

  def __len__(self):
    return len(self._source)

  def __getitem__(self, i):
    record = self._source[i]
    return dict(record, task=record['kind'])


def test_a_rewrite_is_held_to_the_budget_of_its_task(asks, tmp_path, listed):
  made = asks()
  made.data.tasks = (Task('edit', rewrite=2), Task('t2i', rewrite=30))
  echo(made, tmp_path, WithTask)
  assert texts(tmp_path) == ['a red circle']  # of the prompt; the edits' rewrites are longer than 2 tokens
  rows = [dict(json.loads(line), task='edit') for line in listed.read_text().splitlines()]
  listed.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  echo(made, tmp_path / 'own')
  assert len(texts(tmp_path / 'own')) == 4  # a column of the user's own means nothing


@pytest.mark.parametrize('damage', ['{"key": "a", "ids": [[1, 2', 'null', '[]', '{"key": "a"}', '{"key": 1, "ids": []}',
                                    '{"key": "a", "ids": [["x"]]}', '{"key": "a", "ids": [[-1]]}', '[' * 100_000])
def test_a_damaged_line_is_named(tmp_path, damage):
  path = tmp_path / 'rewrites-00000.jsonl'
  path.write_text(f'{json.dumps(dict(key="good", ids=[[1, 2], []], texts=[]))}\n{damage}\n{{"interrupted": ')
  with pytest.raises(ValueError, match='rewrites-00000.jsonl line 2 is damaged') as error:
    rewrites.Table(tmp_path)
  assert len(str(error.value)) < 500
  path.write_text(path.read_text().splitlines()[0] + '\n')
  assert rewrites.Table(tmp_path)['good'] == [[1, 2], []]


def test_a_vlm_trained_further_is_another_one(tmp_path):
  shutil.copytree(config.ASSETS / 'vlm', tmp_path / 'vlm')
  before = hub.fingerprint(tmp_path / 'vlm')
  assert before == hub.fingerprint(config.ASSETS / 'vlm')
  tensors = safetensors.numpy.load_file(tmp_path / 'vlm' / 'model.safetensors')
  safetensors.numpy.save_file({name: x * 2 for name, x in tensors.items()}, tmp_path / 'vlm' / 'model.safetensors')
  assert before != hub.fingerprint(tmp_path / 'vlm')
  (tmp_path / 'vlm' / 'tokenizer.json').rename(tmp_path / 'vlm' / 'tokenizer.model')  # as InternLM2's folders have it
  assert hub.fingerprint(tmp_path / 'vlm')


def test_other_settings_are_refused(asks, tmp_path):
  echo(asks(), tmp_path)
  with pytest.raises(ValueError, match="system: .* there, 'Sing.' now"):
    echo(dataclasses.replace(asks(), system='Sing.'), tmp_path)
  with pytest.raises(ValueError, match='system: '):
    rewrite.check(dataclasses.replace(asks(rewrites=str(tmp_path / 'rewrites')), system='Sing.'))
  rewrite.check(asks(rewrites=str(tmp_path / 'rewrites'), count=2, temperature=1.0))  # how many is no matter now
  with pytest.raises(ValueError, match='holds no settings.json'):
    rewrite.check(asks(rewrites=str(tmp_path)))


def test_a_request_without_a_rewrite_is_a_broken_record(asks, tmp_path, listed):
  echo(asks(), tmp_path)
  (tmp_path / 'rewrites' / 'rewrites-00000.jsonl').write_text(
      (tmp_path / 'rewrites' / 'rewrites-00000.jsonl').read_text().splitlines(keepends=True)[0])
  (source, _), = loader.mix(asks(rewrites=str(tmp_path / 'rewrites')).data)
  rewritten = 0
  for i in range(len(source)):
    try:
      rewritten += 'rewrites' in source[i]
    except BrokenRecord as error:
      assert 'has no rewrite' in str(error)
  assert 1 <= rewritten <= 2


@pytest.mark.parametrize('changes, words', [
    (dict(count=2), 'rewrite.count=2 wants rewrite.temperature above 0'), (dict(count=0), 'rewrite.count=0'),
    (dict(temperature=-1.0), 'rewrite.temperature=-1.0'), (dict(top_p=0.0), 'rewrite.top_p=0.0'),
    (dict(batch_size=6), 'rewrite.batch_size=6 must be a multiple of the 4'), (dict(path='scenes'), 'scenes.builder')])
def test_settings_that_cannot_work(changes, words):
  path = changes.pop('path', 'own.jsonl')
  wrong, = rewrite.RewriteConfig(**changes).problems(path=path, shards=4)
  assert words in wrong


def test_it_stops_before_anything_is_loaded(recipe, tmp_path):
  with pytest.raises(ValueError, match='(?s)cannot be rewritten:.*scenes.builder.*rewrite.count=0'):
    rewrite.run(recipe(vlm='nowhere', rewrite=rewrite.RewriteConfig(count=0)), tmp_path)
  assert not list(tmp_path.iterdir())
