"""Workdirs, weights and rewrites in buckets: what is written here is there, and what is there is read as if here."""

import contextlib
import dataclasses
import json
import pathlib
import sys
import tempfile
import threading

from absl import flags
from etils import epath
import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
import pytest

from unifusion_jax import bucket, command_line, description, main, metadata, sharding
from unifusion_jax.commands import train
from unifusion_jax.data import rewrites
from unifusion_jax.errors import UserError
from unifusion_jax.training import checkpoint, lock, record
from unifusion_jax.weights import hub, safetensors_io


@pytest.fixture
def there(buckets, request):
  """An empty folder in the bucket, as an epath.Path."""
  return epath.Path(f'gs://bucket/{request.node.name.partition("[")[0]}')


@pytest.fixture(params=['gs', 'file'])
def anywhere(request, tmp_path):
  """Folders in a bucket and on a disk, by their addresses."""
  if request.param == 'file':
    return tmp_path / 'there', f'file://{tmp_path}/there'
  folder = request.getfixturevalue('there')
  return folder, str(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  (tmp_path / 'local').mkdir()
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'local'))
  monkeypatch.setattr(lock, 'MOMENT', 0.1)


def texts(folder) -> dict[str, str]:
  """{name: text} of the files in a folder and in its folders."""
  found = {}
  for path in folder.iterdir() if folder.exists() else ():
    if path.is_dir():
      found |= {f'{path.name}/{name}': text for name, text in texts(path).items()}
    else:
      found[path.name] = path.read_text()
  return found


def test_files_come_and_go_as_in_the_workdir(anywhere):
  folder, url = anywhere
  with bucket.mirrored(url) as workdir:
    (workdir / 'metrics.jsonl').write_text('1\n')
    (workdir / 'samples' / 'deep').mkdir(parents=True)
    (workdir / 'samples' / 'deep' / '1.png').write_text('image')
    (workdir / 'empty').touch()
    for name in ('config.json.part', '.000.png.1a2b', 'train.lock'):
      (workdir / name).write_text('not yet')
    (workdir / 'export').mkdir()
    (workdir / 'export' / 'model').write_text('weights')
    bucket.flush(workdir / 'samples')
    first = {'metrics.jsonl': '1\n', 'samples/deep/1.png': 'image', 'empty': ''}
    assert texts(folder) == first
    with (workdir / 'metrics.jsonl').open('a') as file:
      file.write('2\n')
    (workdir / 'config.json.part').rename(workdir / 'config.json')
    (workdir / 'samples' / 'deep' / '1.png').unlink()
    bucket.flush(workdir)
    second = {'metrics.jsonl': '1\n2\n', 'config.json': 'not yet', 'empty': ''}
    assert texts(folder) == second
  assert not workdir.exists()
  assert texts(folder) == second | {'export/model': 'weights'}
  (folder / 'checkpoints' / '5').mkdir(parents=True)
  (folder / 'checkpoints' / '5' / 'state').write_text('whole')
  with bucket.mirrored(url + '/') as workdir:
    assert texts(workdir) == second
    assert bucket.address(workdir / 'checkpoints' / '5' / 'state') == folder / 'checkpoints' / '5' / 'state'
    (workdir / 'empty').unlink()
  assert texts(folder) == {'metrics.jsonl': '1\n2\n', 'config.json': 'not yet', 'export/model': 'weights',
                           'checkpoints/5/state': 'whole'}


def test_what_two_change_beside_each_other_stays(there):
  with bucket.mirrored(str(there)) as one, bucket.mirrored(str(there)) as two:
    (one / 'metrics.jsonl').write_text('train')
    (two / 'images').mkdir()
    (two / 'images' / '000.png').write_text('sample')
  assert texts(there) == {'metrics.jsonl': 'train', 'images/000.png': 'sample'}


def waited(condition) -> None:
  """Until a condition holds."""
  event = threading.Event()
  for _ in range(500):
    if condition():
      return
    event.wait(0.02)
  pytest.fail('in vain')


def test_a_copy_that_fails_is_tried_again(buckets, there, monkeypatch, caplog):
  monkeypatch.setattr(bucket, 'SECONDS', 0.02)
  monkeypatch.setattr(bucket, '_SHARE', 1)
  with bucket.mirrored(str(there)) as workdir:
    buckets.refusing = True
    (workdir / 'metrics.jsonl').write_text('1\n')
    waited(lambda: 'cannot be copied there now' in caplog.text)
    buckets.refusing = False
    waited(lambda: texts(there) == {'metrics.jsonl': '1\n'})
  assert caplog.text.count('cannot be copied') == 1
  assert 'bucket' not in {thread.name for thread in threading.enumerate()}


def test_what_cannot_be_copied_at_the_end_is_said_and_kept(buckets, there, caplog):
  try:
    with pytest.raises(UserError, match='could not all be copied there .this account may not') as error:
      with bucket.mirrored(str(there)) as workdir:
        buckets.refusing = True
        (workdir / 'metrics.jsonl').write_text('1\n')
    assert str(workdir) in str(error.value) and (workdir / 'metrics.jsonl').read_text() == '1\n'
    buckets.refusing = False
    with pytest.raises(KeyError, match='first'):  # its error is not hidden
      with bucket.mirrored(str(there)) as workdir:
        buckets.refusing = True
        (workdir / 'more').touch()
        raise KeyError('first')
    assert f'it is in {workdir}' in caplog.text
  finally:
    buckets.refusing = False


@pytest.mark.parametrize('url, refusing, sentence', [
    ('gs://absent/run', False, 'gs://absent/run: there is no such bucket'),
    ('gs://bucket/run', True, 'gs://bucket/run: this account may not'),
    ('gs://', False, 'must be gs://BUCKET/FOLDER'), ('s3://bucket/run', False, 'must be gs://BUCKET/FOLDER')])
def test_a_bucket_that_cannot_be_used_says_so_at_the_start(buckets, url, refusing, sentence, monkeypatch):
  monkeypatch.setattr(buckets, 'refusing', refusing)
  with pytest.raises(UserError, match=sentence):
    with bucket.mirrored(url):
      pytest.fail('opened')


def test_without_gcsfs_the_package_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'gcsfs', None)
  monkeypatch.delitem(sys.modules['fsspec.registry']._registry, 'gs', raising=False)
  with pytest.raises(UserError, match='pip install gcsfs'):
    bucket.names('gs://bucket/model')


@pytest.fixture
def locked(there, monkeypatch):
  """The path of a lock in a mirrored workdir, and the object that it is."""
  monkeypatch.setattr(lock, 'BEAT', 0.05)
  monkeypatch.setattr(lock, 'PATIENCE', 0.6)
  with bucket.mirrored(str(there)) as workdir:
    yield workdir / 'train.lock', there / 'train.lock'


def test_a_lock_is_an_object_for_as_long_as_it_is_held(locked):
  path, place = locked
  with lock.held(path):
    with pytest.raises(UserError, match=r'gs://bucket/.* is in use by process .*, as train.lock there says'):
      with lock.held(path):
        pytest.fail('two hold one lock')
    beats = set()
    waited(lambda: beats.add(json.loads(place.read_text())['beat']) or len(beats) > 2)
    (path.parent / 'last').touch()
  assert not path.exists() and texts(place.parent) == {'last': ''}  # what the next one reads is there


@pytest.mark.parametrize('change, waits', [
    (dict(start=['1']), False), (dict(pid=2 ** 22 + 1), False), (dict(boot='earlier'), True),
    (dict(host='elsewhere'), True)])
def test_the_lock_of_a_dead_owner_is_taken_over(locked, change, waits, caplog):
  path, place = locked
  with lock.held(path):
    mine = json.loads(place.read_text())
  place.write_text(json.dumps(mine | change | dict(mark='other')))
  with lock.held(path):
    assert 'ended without a word' in caplog.text and ('waiting up to' in caplog.text) == waits
    assert json.loads(place.read_text())['pid'] == mine['pid']


def test_a_living_owner_elsewhere_keeps_it_and_one_that_was_taken_over_ends(locked, monkeypatch, capsys):
  path, place = locked
  ended = threading.Event()
  monkeypatch.setattr(lock.os, '_exit', lambda code: ended.set())
  with lock.held(path):
    other = json.loads(place.read_text()) | dict(host='elsewhere', mark='other')
    waited(lambda: place.write_text(json.dumps(other)) and ended.is_set())
  assert 'was taken over by process' in capsys.readouterr().err
  assert json.loads(place.read_text())['host'] == 'elsewhere'  # not removed with the lock that was lost
  ended.clear()

  def live():
    while not ended.wait(0.02):
      other['beat'] += 1
      place.write_text(json.dumps(other))

  owner = threading.Thread(target=live)
  owner.start()
  with pytest.raises(UserError, match='is in use by process .* on elsewhere'):
    with lock.held(path):
      pytest.fail('taken from the living')
  ended.set()
  owner.join()


@pytest.mark.parametrize('place, takers', [('bucket', 2), ('disk', 8)])
def test_of_several_that_start_at_the_same_moment_one_goes_on(request, tmp_path, place, takers):
  """On a disk also where a dead owner has left its lock."""
  path = request.getfixturevalue('locked')[0] if place == 'bucket' else tmp_path / 'train.lock'
  if place == 'disk':
    with lock.held(path):
      dead = path.read_text()
    path.write_text(dead)
  start, done, results = threading.Barrier(takers), threading.Barrier(takers), []

  def take():
    start.wait()
    with contextlib.ExitStack() as opened:
      try:
        opened.enter_context(lock.held(path))
        results.append('held')
      except UserError:
        results.append('refused')
      done.wait()

  threads = [threading.Thread(target=take) for _ in range(takers)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(results) == ['held'] + ['refused'] * (takers - 1)


RECIPE = '''
from unifusion_jax import config, sharding
from unifusion_jax.data.config import Task
from unifusion_jax.models import vae
from unifusion_jax.scenes import autoencoder


def get_config():
  return config.Config(
      objective=autoencoder.AutoencoderObjective(kl=1.0), mesh=sharding.MeshConfig(data=2, fsdp=2, tp=2),
      model=vae.VAEConfig(block_out_channels=(8,), layers_per_block=1, latent_channels=4, norm_num_groups=4,
                          mid_block_add_attention=False, scaling_factor=1.0),
      data=config.DataConfig(tasks=(Task('t2i/1-2'),), batch_size=8),
      train=config.TrainConfig(steps=3, log_every=1, save_every=1, keep=3, preview_every=0))
'''


@pytest.fixture
def run_recipe(run, tmp_path):
  """`run_recipe(arguments)`: main in this process, with the recipe above."""
  (tmp_path / 'recipe.py').write_text(RECIPE)
  return lambda *arguments: run(f'--config={tmp_path}/recipe.py', *arguments)


@pytest.mark.slow
def test_a_run_in_a_bucket_is_a_run(run_recipe, there, mesh, tmp_path, capfd, caplog):
  """Trained, damaged, gone on with bit for bit, exported, and started from."""
  made = command_line.read(f'{tmp_path}/recipe.py')
  with bucket.mirrored(str(there)) as workdir:
    whole = train.run(made, workdir)
    assert not (workdir / 'checkpoints').exists() and not (there / 'train.lock').exists()
  assert f'checkpoint: {there}/checkpoints' in capfd.readouterr().out
  for path in (there / 'checkpoints' / '3' / 'state').iterdir():
    path.rmtree() if path.is_dir() else path.unlink()
  (there / 'checkpoints' / '9' / 'state').mkdir(parents=True)
  (there / 'checkpoints' / '9' / 'state' / 'torn').write_text('of a save that was cut off')
  run_recipe(f'--workdir={there}')
  assert 'is damaged' in caplog.text and (there / 'checkpoints' / '3.damaged').exists()
  assert not (there / 'checkpoints' / '9').exists()
  lines = (there / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines] == [1, 2, 3]
  run_recipe(f'--workdir={there}', '--mode=export')
  assert json.loads((there / 'config_export.json').read_text())['train']['steps'] == 3
  with bucket.mirrored(str(there)) as workdir, checkpoint.Checkpoints(workdir) as checkpoints:
    data = train.batches(made)
    state = checkpoints.restore(jax.eval_shape(lambda: whole), data, mesh)
    data.close()
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
    np.testing.assert_array_equal(sharding.gather(a), sharding.gather(b))
  loaded = made.objective.load(made, str(hub.resolve(f'{there}/export')))
  for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(whole.ema), strict=True):
    np.testing.assert_array_equal(sharding.gather(a), sharding.gather(b))
  config = dataclasses.replace(made, init=f'{there}/export')
  record.claim(config, tmp_path / 'next')
  assert config.init.startswith(str(tmp_path / 'cache'))
  assert json.loads((tmp_path / 'next' / 'config.json').read_text())['init'] == f'{there}/export'


def weights(path, value: float) -> bytes:
  safetensors_io.write(path / 'x.safetensors', {'w': np.full(3, value, np.float32)})
  return (path / 'x.safetensors').read_bytes()


def test_weights_are_fetched_once_and_anew_where_they_changed(there, tmp_path, monkeypatch):
  """As from the hub: of all files only those that are data, and of several precisions the plain one."""
  for name in ('config.json', 'tokenizer.json', 'model.fp16.safetensors', 'code.py', 'pytorch_model.bin', 'vae/x.json'):
    (there / name).write_text('{}')
  (there / 'model.safetensors').write_bytes(weights(tmp_path, 1.0))
  pinned = hub.pin(str(there))
  assert (pinned.name, pinned.commit) == (str(there), '') and pinned.folder.is_relative_to(tmp_path / 'cache')
  assert sorted(path.name for path in pinned.folder.iterdir()) == ['config.json', 'model.safetensors', 'tokenizer.json']
  assert metadata.weights(str(there)) == dict(name=str(there), fingerprint=hub.fingerprint(pinned.folder))
  texts_alone = hub.resolve(str(there), weights=False)
  assert sorted(path.name for path in texts_alone.iterdir()) == ['config.json', 'tokenizer.json']
  with monkeypatch.context() as offline:
    offline.setattr('gcsfs.GCSFileSystem.get', None)
    assert hub.resolve(str(there)) == pinned.folder
  (there / 'model.safetensors').write_bytes(weights(tmp_path, 2.0))
  changed = hub.resolve(str(there))
  assert changed != pinned.folder
  np.testing.assert_array_equal(safetensors_io.read(changed)['w'][:], np.full(3, 2, np.float32))
  (there / 'model.safetensors').unlink()
  assert (hub.resolve(str(there)) / 'model.fp16.safetensors').exists()
  (there / 'model.fp16.safetensors').unlink()
  with pytest.raises(UserError, match='has no .safetensors file .it holds pytorch_model.bin'):
    hub.resolve(str(there))
  with pytest.raises(UserError, match='no such folder in the bucket'):
    hub.resolve(f'{there}/absent')
  assert description.part_of('vae', '../vae', f'{there}/transformer', tmp_path) == f'{there}/vae'


def test_a_run_keeps_the_addresses_it_was_given(there, tmp_path):
  """Its record is that of the same files on a disk."""
  here = command_line.read('t2i', ['init=', f'data.rewrites={tmp_path}/rewrites'])
  for part in ('vlm', 'vae'):
    for path in pathlib.Path(getattr(here, part)).iterdir():
      (there / part / path.name).write_bytes(path.read_bytes())
  line = json.dumps(dict(key='k', ids=[[5, 6]], texts=['t'])) + '\n'
  (tmp_path / 'rewrites').mkdir()
  for folder in (tmp_path, there):
    (folder / 'rewrites' / 'rewrites-00000.jsonl').write_text(line)
  assert rewrites.Table(f'{there}/rewrites')['k'] == [[5, 6]]
  made = command_line.read('t2i', ['init=', *(f'{name}={there}/{name}' for name in ('vlm', 'vae')),
                                   f'data.rewrites={there}/rewrites'])
  records = []
  for config in (here, made, made):  # the last one goes on
    record.pin(config, tmp_path / 'run', 'vlm', 'vae')
    record.claim(config, tmp_path / 'run')
    records.append(json.loads((tmp_path / 'run' / 'config.json').read_text()))
  assert records[0]['files'] == records[1]['files'] and set(records[1]['files']) == {'vlm', 'vae', 'data.rewrites'}
  assert [records[1][part] for part in ('vlm', 'vae')] == [f'{there}/vlm', f'{there}/vae']
  assert records[1]['data']['rewrites'] == f'{there}/rewrites' and records[2] == records[1]
  assert pathlib.Path(made.vlm).is_dir() and pathlib.Path(made.vae).is_dir()


def test_settings_of_local_folders_take_no_address():
  made = command_line.read('edit', ['vlm_cache=gs://bucket/cache', 'train.executables=gs://bucket/programs'])
  assert [problem.partition('=')[0] for problem in made.problems(8)] == ['vlm_cache', 'train.executables']


def test_compiled_programs_are_kept_in_a_bucket(there, monkeypatch):
  before = {name: getattr(jax.config, name) for name in (
      'jax_compilation_cache_dir', 'jax_persistent_cache_enable_xla_caches',
      'jax_persistent_cache_min_compile_time_secs', 'jax_hlo_source_file_canonicalization_regex')}

  def compile_one(argv):
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    compilation_cache.reset_cache()
    jax.jit(lambda x: 3 * x)(np.ones(2))

  monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '8')
  monkeypatch.setattr(main, 'main', compile_one)
  try:
    command_line.parse(['main', f'--compilation_cache={there}'])
    main.start([])
  finally:
    flags.FLAGS.unparse_flags()
    flags.FLAGS['compilation_cache'].unparse()
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
  assert any(path.name.endswith('-cache') for path in there.iterdir())
