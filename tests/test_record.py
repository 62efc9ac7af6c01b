"""What may change of a run that goes on: where its files lie and how its books are kept, not what it trains."""

import copy
import dataclasses
import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from unifusion_jax import config
from unifusion_jax.errors import UserError
from unifusion_jax.scenes import vlm
from unifusion_jax.training import record, step
from unifusion_jax.weights import hub, safetensors_io


@pytest.fixture
def run(recipe, tmp_path):
  """`run(**changes)` claims a workdir for a recipe that has made a checkpoint of step 2 there, and returns both."""
  def make(**changes):
    made = recipe(**changes)
    made.data = dataclasses.replace(made.data)
    record.claim(made, tmp_path / 'run')
    (tmp_path / 'run' / 'checkpoints' / '2').mkdir(parents=True)
    return made, tmp_path / 'run'
  return make


def changed(made, **values):
  """A copy of a configuration with other values by dotted name, dots as __."""
  made = copy.deepcopy(made)
  for name, value in values.items():
    *groups, last = name.split('__')
    holder = made
    for group in groups:
      holder = getattr(holder, group)
    setattr(holder, last, value)
  return made


def moved(folder: str, there) -> str:
  shutil.copytree(folder, there)
  return str(there)


def other_weights(folder: pathlib.Path) -> None:
  """One value in one tensor of a folder changes, and nothing at the ends of its files."""
  path, = folder.glob('*.safetensors')
  tensors = {name: np.array(tensor[...]) for name, tensor in safetensors_io.read(path).items()}
  name = sorted(tensors)[len(tensors) // 2]
  tensors[name] = tensors[name] + 1
  safetensors_io.write(path, tensors)


def test_a_file_is_known_by_all_of_its_tensors(tmp_path):
  """Not by the last one alone, which may be as long as what `hub.fingerprint` reads."""
  path, tensors = tmp_path / 'style.safetensors', {name: np.zeros(2 ** 19, np.float32) for name in 'ab'}
  safetensors_io.write(path, tensors)
  before = record.fingerprint(path)
  safetensors_io.write(path, tensors | dict(a=tensors['a'] + 1))
  after = record.fingerprint(path)
  assert before != after and before[:16] == after[:16] == hub.fingerprint(path)


def test_another_config_in_the_same_workdir_is_refused(recipe, tmp_path):
  other = recipe()
  other.optim.learning_rate = 5.0
  record.claim(other, tmp_path)
  # As long as nothing was trained, a start with other settings leaves nothing behind
  assert record.claim(recipe(), tmp_path) is None
  (tmp_path / 'checkpoints' / '2').mkdir(parents=True)
  assert record.claim(recipe(), tmp_path) == dict(steps=4, minutes=0.0)
  with pytest.raises(UserError, match='optim.learning_rate: 0.01 there, 5.0 now'):
    record.claim(other, tmp_path)
  assert not list(tmp_path.glob('*.part'))


FREE = ('devices', 'mesh', 'vlm_cache', 'train', 'sample', 'rewrite', 'plan', 'demo', 'inspect', 'eval', 'recipe',
        'data.workers', 'data.skipped', 'data.held_out', 'optim.accumulate', 'model.dit.remat', 'model.lap.remat')
ELSEWHERE = ('vlm', 'vae', 'init', 'data.path', 'data.rewrites', 'train.steps', 'train.minutes')


def leaves(settings: dict, prefix: str = ''):
  for name, value in settings.items():
    yield from leaves(value, f'{prefix}{name}.') if isinstance(value, dict) else [f'{prefix}{name}']


def test_every_setting_of_the_tree_is_bookkeeping_or_may_not_change(run):
  made, workdir = run()
  path = workdir / 'config.json'
  settings, refused = json.loads(path.read_text()), set()
  names = set(leaves({name: value for name, value in settings.items() if name != 'files'})) - set(ELSEWHERE)
  for name in names:
    there = copy.deepcopy(settings)
    *groups, last = name.split('.')
    holder = there
    for group in groups:
      holder = holder[group]
    holder[last] = 'another'
    path.write_text(json.dumps(there))
    try:
      record.claim(made, workdir)
    except UserError as error:
      assert f"{name}: 'another' there" in str(error)
      refused.add(name)
  free = {name for name in names if any(name == other or name.startswith(f'{other}.') for other in FREE)}
  assert names - refused == free and len(refused) > 40


def test_a_setting_younger_than_the_run_has_its_default(run):
  made, workdir = run()
  path = workdir / 'config.json'
  settings = json.loads(path.read_text())
  del settings['data']['unit'], settings['objective']['shift'], settings['vlm_quantized'], settings['train']['minutes']
  path.write_text(json.dumps(settings))
  assert record.claim(made, workdir) == dict(steps=4, minutes=0.0)
  path.write_text(json.dumps(settings))
  with pytest.raises(UserError, match=r'objective.shift: 1.0 there, 3.0 now$'):
    record.claim(changed(made, objective__shift=3.0), workdir)


def test_a_run_may_become_longer_and_shorter_but_not_undone(run):
  made, workdir = run()
  assert record.claim(changed(made, train__steps=9), workdir)['steps'] == 4
  assert record.claim(changed(made, train__steps=2), workdir)['steps'] == 9
  with pytest.raises(UserError, match=r'train.steps=1 is less than the 2 steps'):
    record.claim(changed(made, train__steps=1), workdir)
  assert record.claim(changed(made, train__steps=1, train__minutes=1.0), workdir)['steps'] == 2


def test_minutes_are_those_that_the_checkpoint_counts_in(run):
  """A new budget under which nothing was saved yet is no measure of the old checkpoint's progress."""
  made, workdir = run()
  plan = lambda minutes: record.claim(changed(made, train__minutes=minutes), workdir)['minutes']
  assert [plan(10.0), plan(20.0), plan(40.0), plan(40.0)] == [0, 0, 0, 0]
  (workdir / 'checkpoints' / '3').mkdir()
  assert [plan(40.0), plan(20.0), plan(10.0)] == [40, 40, 40]
  (workdir / 'checkpoints' / '4').mkdir()
  assert plan(10.0) == 10


def test_another_spelling_of_the_same_weights_is_the_same(run, tmp_path, monkeypatch):
  made, workdir = run()
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', str(tmp_path))
  there = moved(made.vlm, tmp_path / 'mount' / 'vlm')
  (tmp_path / 'link').symlink_to(there)
  for name in (there, 'mount/vlm', './mount/../mount/vlm', 'link', os.path.relpath(made.vlm), '~/mount/vlm'):
    again = changed(made, vlm=name)
    record.pin(again, workdir, 'vlm', 'vae')
    record.check_same_model(again, workdir)
    record.claim(again, workdir)
  other_weights(pathlib.Path(there))
  for name in (there, 'link'):
    for compare in (record.check_same_model, record.claim):
      with pytest.raises(UserError, match="vlm: '.*' there, '.*' now, whose files are others"):
        compare(changed(made, vlm=name), workdir)


def test_a_run_is_sampled_as_it_was_trained(recipe, run):
  _, workdir = run()
  other = recipe(optim=step.OptimConfig(learning_rate=5.0))
  other.model.dit.remat = True
  record.check_same_model(other, workdir)  # how it was trained, and how it is computed, are no matter now
  for changes, text in ((dict(taps=(0, 2)), 'taps: .* there'), (dict(vlm=str(config.ASSETS / 'vlm')), 'vlm: .* there')):
    with pytest.raises(UserError, match=text):
      record.check_same_model(recipe(**changes), workdir)


def test_the_fingerprint_of_an_earlier_version_is_half_of_it(run):
  made, workdir = run()
  path = workdir / 'config.json'
  settings = json.loads(path.read_text())
  settings['files'] = {name: settings['files'][name][:16] for name in ('vlm', 'vae')}
  path.write_text(json.dumps(settings))
  record.check_same_model(made, workdir)
  record.claim(made, workdir)
  with pytest.raises(UserError, match='vae'):
    record.check_same_model(changed(made, vae=str(config.ASSETS / 'vae')), workdir)


def test_weights_to_start_from_are_no_matter_once_started(run, recipe, tmp_path):
  init = moved(recipe().vae, tmp_path / 'init')
  made, workdir = run(init=init)
  away = moved(init, tmp_path / 'away')
  for now in (None, away, 'nowhere/now'):
    again = changed(made, init=now)
    record.claim(again, workdir)
    assert again.init == init and json.loads((workdir / 'config.json').read_text())['init'] == init
  shutil.rmtree(init)
  record.claim(changed(made, init=init), workdir)
  other_weights(pathlib.Path(away))
  with pytest.raises(UserError, match="init: '.*init' there, '.*away' now, whose files are others"):
    record.claim(changed(made, init=away), workdir)


def test_weights_to_start_from_come_too_late(run, recipe):
  made, workdir = run()
  with pytest.raises(UserError, match='init: None there, .* now; a run goes on from its own checkpoint'):
    record.claim(changed(made, init=recipe().vae), workdir)


def test_a_list_may_move_and_be_mended_in_its_place(run, tmp_path, recipe):
  (tmp_path / 'list.jsonl').write_text('{"caption": "one"}\n')
  (tmp_path / 'rewrites').mkdir()
  (tmp_path / 'rewrites' / 'rewrites-00000.jsonl').write_text('{}\n')
  data = dict(path=str(tmp_path / 'list.jsonl'), rewrites=str(tmp_path / 'rewrites'))
  made, workdir = run(data=dataclasses.replace(recipe().data, **data))
  (tmp_path / 'list.jsonl').write_text('{"caption": "two"}\n')
  record.claim(made, workdir)
  shutil.copy(tmp_path / 'list.jsonl', tmp_path / 'moved.jsonl')
  shutil.copytree(tmp_path / 'rewrites', tmp_path / 'other')
  (tmp_path / 'other' / 'rewrite.lock').write_text('')
  record.claim(changed(made, data__path=str(tmp_path / 'moved.jsonl'), data__rewrites=str(tmp_path / 'other')), workdir)
  record.claim(made, workdir)
  (tmp_path / 'moved.jsonl').write_text('{"caption": "six"}\n')
  (tmp_path / 'other' / 'rewrites-00000.jsonl').write_text('{ }\n')
  for name, value in (('path', 'moved.jsonl'), ('rewrites', 'other')):
    with pytest.raises(UserError, match=f'data.{name}: .* there, .*{value}. now, whose files are others'):
      record.claim(changed(made, **{f'data__{name}': str(tmp_path / value)}), workdir)
  for changes in (dict(data__path='scenes'), dict(data__rewrites=None)):
    with pytest.raises(UserError, match='data.* there, .* now'):
      record.claim(changed(made, **changes), workdir)


def test_a_vlm_in_training_keeps_its_tokenizer(tmp_path, recipe, qwen):
  made = recipe(objective=vlm.VLMObjective(), vlm=moved(str(config.ASSETS / 'vlm'), tmp_path / 'vlm'))
  record.claim(made, tmp_path / 'run')
  (tmp_path / 'run' / 'checkpoints' / '2').mkdir(parents=True)
  other_weights(tmp_path / 'vlm')  # weights that this objective does not read
  record.claim(changed(made, vlm=moved(made.vlm, tmp_path / 'moved'), vae='elsewhere'), tmp_path / 'run')
  with pytest.raises(UserError, match='vlm: .* whose files are others'):
    record.claim(changed(made, vlm=str(qwen)), tmp_path / 'run')


@pytest.mark.parametrize('content', [b'', b'{"seed": 1', b'[]', b'\xff\xfe', b'\0' * 9, b'[' * 10 ** 5])
def test_a_damaged_record_is_named(run, content):
  made, workdir = run()
  (workdir / 'config.json').write_bytes(content)
  for ask in (record.claim, record.check_same_model, lambda *arguments: record.pin(*arguments, 'vlm')):
    with pytest.raises(UserError, match=rf'^{workdir}/config.json, the record of the run, is damaged'):
      ask(made, workdir)
  (workdir / 'config.json').unlink()
  record.claim(made, workdir)


def test_two_that_write_one_name_do_not_take_each_others_file(recipe, tmp_path, monkeypatch):
  """The second begins and ends between the first one's writing and renaming."""
  rename = os.replace

  def late(*paths):
    monkeypatch.setattr(os, 'replace', rename)
    record.write(recipe(seed=2), tmp_path, 'config_sample.json')
    rename(*paths)

  monkeypatch.setattr(os, 'replace', late)
  record.write(recipe(seed=1), tmp_path, 'config_sample.json')
  assert json.loads((tmp_path / 'config_sample.json').read_text())['seed'] == 1
  assert [path.name for path in tmp_path.iterdir()] == ['config_sample.json']
