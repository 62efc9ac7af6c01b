"""Names to folders: local ones, and hub ids from a cache laid out here, offline as in every test."""

import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from unifusion_jax.errors import UserError
from unifusion_jax.weights import hub, lora_files, safetensors_io

COMMIT, OLDER = 'a' * 40, 'b' * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """`cache(id, files, commit, ref)` puts a snapshot where huggingface_hub looks; files are {name: bytes}."""
  from huggingface_hub import constants
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))

  def lay(repository, files, commit=COMMIT, ref='main'):
    root = tmp_path / 'hub' / f'models--{repository.replace("/", "--")}'
    for name, content in files.items():
      path = root / 'snapshots' / commit / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(content)
    (root / 'refs').mkdir(parents=True, exist_ok=True)
    (root / 'refs' / ref).write_text(commit)
    return root / 'snapshots' / commit
  return lay


def weights(tmp_path, value: float) -> bytes:
  safetensors_io.write(tmp_path / 'x.safetensors', {'w': np.full(3, value, np.float32)})
  return (tmp_path / 'x.safetensors').read_bytes()


def test_local_folder_and_hub_id_are_equals(cache, tmp_path):
  snapshot = cache('owner/model', {'config.json': b'{}', 'model.safetensors': weights(tmp_path, 1.0)})
  by_id = hub.resolve('owner/model')
  assert by_id == snapshot and hub.resolve(str(snapshot)) == snapshot and hub.resolve(snapshot) == snapshot
  np.testing.assert_array_equal(safetensors_io.read(by_id)['w'][:], np.ones(3, np.float32))


def test_revision_is_pinned(cache, tmp_path):
  new = cache('owner/model', {'model.safetensors': weights(tmp_path, 1.0)})
  old = cache('owner/model', {'model.safetensors': weights(tmp_path, 2.0)}, OLDER, 'v1')
  assert hub.resolve('owner/model') == hub.resolve(f'owner/model@{COMMIT}') == new
  assert hub.resolve('owner/model@v1') == hub.resolve(f'owner/model@{OLDER}') == old
  with pytest.raises(ValueError, match='owner/model at v2: .*not in the cache'):
    hub.resolve('owner/model@v2')


def test_a_pinned_name_stays_where_it_was(cache, tmp_path):
  """What main writes into a run's config: the same files when the branch has moved, and another fingerprint then."""
  old = cache('owner/model', {'config.json': b'{}', 'model.safetensors': weights(tmp_path, 1.0)}, OLDER)
  pinned = hub.pin('owner/model')
  assert pinned == hub.Pinned(f'owner/model@{OLDER}', old, OLDER)
  moved = cache('owner/model', {'config.json': b'{}', 'model.safetensors': weights(tmp_path, 2.0)})
  assert hub.pin('owner/model') == hub.Pinned(f'owner/model@{COMMIT}', moved, COMMIT)
  assert hub.pin(pinned.name) == pinned and hub.resolve(pinned.name) == old
  assert hub.fingerprint(pinned.folder) != hub.fingerprint(moved)
  snapshot = cache('owner/pipeline', {'vae/model.safetensors': weights(tmp_path, 1.0)})
  assert hub.pin('owner/pipeline/vae').name == f'owner/pipeline/vae@{COMMIT}'
  assert hub.pin('owner/pipeline/vae').folder == snapshot / 'vae'
  assert hub.pin(snapshot / 'vae') == hub.Pinned(str(snapshot / 'vae'), snapshot / 'vae', '')


PROGRAM = '''
import os, sys
import jax
jax.config.update('jax_platforms', 'cpu')
jax.distributed.initialize(f'localhost:{sys.argv[1]}', 2, int(sys.argv[2]))
from unifusion_jax.errors import UserError
from unifusion_jax.weights import hub

print(hub.pin('owner/model').commit[0], hub.pin(sys.argv[3]).commit == '')
for name in ('owner/first', 'owner/second', 'owner/neither'):
  try:
    hub.pin(name)
    print('resolved')
  except UserError as error:
    print('not in the cache' in str(error), 'process 0' in str(error), 'process 1' in str(error))
'''


def test_two_processes_take_one_commit_and_fail_together(cache, tmp_path):
  """Each has a cache of its own here: main moved in the second's, and each misses a repository that the other has."""
  files = {'model.safetensors': weights(tmp_path, 1.0)}
  for commit in (COMMIT, OLDER):
    cache('owner/model', files, commit)
  cache('owner/first', files)
  shutil.copytree(tmp_path / 'hub', tmp_path / 'other')
  (tmp_path / 'other' / 'models--owner--model' / 'refs' / 'main').write_text(COMMIT)
  (tmp_path / 'other' / 'models--owner--first').rename(tmp_path / 'other' / 'models--owner--second')
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  running = [subprocess.Popen(
      [sys.executable, '-c', PROGRAM, str(port), str(i), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      text=True, env=os.environ | dict(HF_HUB_CACHE=str(tmp_path / name))) for i, name in enumerate(('hub', 'other'))]
  outputs = [process.communicate(timeout=120) for process in running]
  assert [[line for line in out.splitlines() if '[Gloo]' not in line] for out, _ in outputs] == [
      ['b True', 'False False True', 'True False False', 'True False False'],
      ['b True', 'True False False', 'False True False', 'False True False']], outputs


def test_subfolder(cache, tmp_path):
  snapshot = cache('owner/pipeline', {'model_index.json': b'{}', 'vae/model.safetensors': weights(tmp_path, 1.0)})
  assert hub.resolve('owner/pipeline/vae@main') == snapshot / 'vae'
  with pytest.raises(ValueError, match='no such subfolder'):
    hub.resolve('owner/pipeline/text_encoder')
  with pytest.raises(ValueError, match='has no .safetensors'):
    hub.resolve('owner/pipeline')


def test_one_file_by_its_name(cache, tmp_path):
  """Of a hub or here, where files are wanted; variants of weights count as files of their own."""
  names = ('style.safetensors', 'style_v1.0.safetensors', 'more/other.safetensors')
  snapshot = cache('owner/styles', {name: weights(tmp_path, 1.0) for name in names})
  for name in names:
    assert hub.pin(f'owner/styles/{name}', files=True) == hub.Pinned(
        f'owner/styles/{name}@{COMMIT}', snapshot / name, COMMIT)
    assert hub.pin(snapshot / name, files=True).folder == snapshot / name
  assert hub.pin(f'owner/styles/{names[0]}@main', files=True).folder == snapshot / names[0]
  for name, text in (('owner/styles/none.safetensors', 'has no file none.safetensors'),
                     ('none.safetensors', 'no such folder or file')):
    with pytest.raises(UserError, match=text):
      hub.pin(name, files=True)
  with pytest.raises(UserError, match='is a file: give the folder'):
    hub.pin(snapshot / names[0])
  with pytest.raises(UserError, match='owner/styles holds 2 files'):
    lora_files.read('owner/styles', None)


def test_pickles_are_refused_with_the_reason(cache):
  snapshot = cache('owner/pickled', {'config.json': b'{}', 'pytorch_model.bin': b'\x80'})
  with pytest.raises(ValueError, match='owner/pickled has no .safetensors file .it holds pytorch_model.bin.*any code'):
    hub.resolve('owner/pickled')
  assert hub.resolve('owner/pickled', weights=False) == snapshot


def test_only_data_is_asked_for(monkeypatch, tmp_path):
  """No code, no pickle, nothing of other folders; weights only where they are wanted."""
  import huggingface_hub
  from huggingface_hub.utils import filter_repo_objects
  files = ['config.json', 'model-1.safetensors', 'model.safetensors.index.json', 'tokenizer.json', 'tokenizer.model',
           'chat_template.jinja', 'merges.txt', 'modeling_x.py', 'pytorch_model.bin', 'model.onnx', 'README.md',
           'model.fp16.safetensors', 'model.fp16-1-of-1.safetensors', 'model-1-of-1.fp16.safetensors',
           'consolidated.safetensors', 'original/consolidated.safetensors', 'only/model.fp16.safetensors',
           'vae/config.json', 'vae/model.safetensors', 'vae/more/x.json']
  fetched = []

  def download(repository, revision, allow_patterns, ignore_patterns, repo_type):
    assert repo_type == 'model'
    fetched.append(list(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)))
    for name in fetched[-1]:
      (tmp_path / name).parent.mkdir(exist_ok=True)
      (tmp_path / name).touch()
    return str(tmp_path)
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  hub.resolve('owner/model')
  hub.resolve('owner/model', weights=False)
  hub.resolve('owner/model/vae')
  hub.resolve('owner/model/only')
  hub.pin('owner/model/model.fp16.safetensors', files=True)
  hub.pin('owner/model', variants=())
  texts = [f for f in files[:7] if not f.endswith('.safetensors')]
  assert fetched.pop() == files[:7] + [f for f in files if '.fp16' in f and '/' not in f] + ['consolidated.safetensors']
  assert sorted(fetched.pop()) == sorted([*texts, 'model.fp16.safetensors'])
  assert fetched == [files[:7], texts,
                     ['vae/config.json', 'vae/model.safetensors'], [], ['only/model.fp16.safetensors']]


@pytest.mark.parametrize('name,message', [
    ('owner/absent', 'no such local folder.*not in the cache'), ('nothing', 'no such folder, and no hub id'),
    ('/nowhere/at/all', 'no such folder'), ('./a/b', 'no such folder'), ('https://x.y/owner/model', 'no hub id'),
    ('InternVL2.5-8B', 'InternVL2.5-8B: its name on the hub is OpenGVLab/InternVL2_5-8B: give that one'),
    ('OpenGVLab/InternVL3.5-1B-HF@main', 'is OpenGVLab/InternVL3_5-1B-HF@main: give'),
    ('me/InternVL2.5-8B', 'not in the cache')])
def test_names_that_are_nothing(cache, name, message):
  with pytest.raises(ValueError, match=message):
    hub.resolve(name)


def test_a_file_is_no_folder(tmp_path):
  (tmp_path / 'model.safetensors').touch()
  with pytest.raises(ValueError, match='is a file: give the folder'):
    hub.resolve(tmp_path / 'model.safetensors')
