"""One run at a time writes a folder; a dead one is followed, a living one or one out of sight is not disturbed.

Of several that start at once, here and in a bucket: test_bucket.py.
"""

import errno
import json
import os
import subprocess
import sys
import threading

import pytest

from unifusion_jax.errors import UserError
from unifusion_jax.training import lock

OWNER = '''
import fcntl, os, sys
from unifusion_jax.training import lock
import pathlib
held = lock.held(pathlib.Path(sys.argv[1]))
held.__enter__()
print('held', flush=True)
sys.stdin.read()
'''


def owner_of(path) -> dict:
  return json.loads(path.read_text())


def test_the_second_is_refused_until_the_first_ends(tmp_path):
  path = tmp_path / 'run' / 'train.lock'
  with lock.held(path):
    assert owner_of(path)['pid'] == os.getpid()
    with pytest.raises(UserError, match=rf'run is in use by process {os.getpid()} on .* since 20.*: wait'):
      with lock.held(path):
        pytest.fail('two hold one lock')
    assert owner_of(path)['pid'] == os.getpid()
  assert path.read_text() == ''
  with lock.held(path):
    pass


def test_a_killed_owner_is_followed_and_that_is_said(tmp_path, caplog):
  path = tmp_path / 'train.lock'
  with subprocess.Popen([sys.executable, '-c', OWNER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                        text=True, env=os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path))) as owner:
    assert owner.stdout.readline() == 'held\n'
    with pytest.raises(UserError, match=f'process {owner.pid} on'):
      with lock.held(path):
        pass
    owner.kill()
  assert owner_of(path)['pid'] == owner.pid
  with lock.held(path):
    assert f'process {owner.pid} on' in caplog.text and 'ended without a word' in caplog.text


@pytest.fixture
def hasty(monkeypatch):
  monkeypatch.setattr(lock, 'BEAT', 0.05)
  monkeypatch.setattr(lock, 'PATIENCE', 0.5)


def test_a_lock_of_another_host_is_kept_while_its_owner_gives_signs_of_life(tmp_path, hasty, caplog):
  path = tmp_path / 'train.lock'
  with lock.held(path):
    mine = owner_of(path)
  elsewhere, ended = mine | dict(host='elsewhere', boot='other'), threading.Event()

  def live():
    while not ended.wait(0.05):
      elsewhere['beat'] += 1
      path.write_text(json.dumps(elsewhere))

  path.write_text(json.dumps(elsewhere))
  owner = threading.Thread(target=live)
  owner.start()
  with pytest.raises(UserError, match=r'on elsewhere since .*, as train.lock there says: wait'):
    with lock.held(path):
      pass
  ended.set()
  owner.join()
  with lock.held(path):  # dead by now
    assert 'on elsewhere' in caplog.text and 'ended without a word' in caplog.text
    assert owner_of(path)['host'] == mine['host']
  path.write_text(json.dumps(mine | dict(host='container', pid=1)))  # of this host, by another name
  with lock.held(path):
    pass


def test_an_owner_gives_signs_of_life(tmp_path, hasty):
  path, seen = tmp_path / 'train.lock', set()
  with lock.held(path):
    while len(seen) < 3:
      seen.add(owner_of(path)['beat'])
  assert path.read_text() == '' and 'lock' not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize('change, held', [
    ({}, False), (dict(start=['1']), True), (dict(boot='earlier'), True), (dict(pid=2 ** 22 + 1), True),
    (dict(host='elsewhere'), True)])
def test_without_locks_of_the_file_system_the_named_process_decides(tmp_path, hasty, monkeypatch, change, held):
  """A number that another process has by now is no sign of life."""
  path = tmp_path / 'train.lock'
  with lock.held(path):
    mine = owner_of(path)

  def flock(*arguments):
    raise OSError(errno.ENOSYS, 'not here')

  monkeypatch.setattr('fcntl.flock', flock)
  path.write_text(json.dumps(mine | change))
  if held:
    with lock.held(path):
      assert owner_of(path)['pid'] == os.getpid()
  else:
    with pytest.raises(UserError, match='is in use by process'):
      with lock.held(path):
        pass


@pytest.mark.parametrize('text', ['', '{"pid": 1', '[]', '\0\0\0', '{}'])
def test_a_torn_text_locks_nothing(tmp_path, text):
  (tmp_path / 'train.lock').write_text(text)
  with lock.held(tmp_path / 'train.lock'):
    assert owner_of(tmp_path / 'train.lock')['pid'] == os.getpid()


def test_what_cannot_be_written_is_no_lock(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(OSError):
    with lock.held(tmp_path / 'file' / 'train.lock'):
      pass
