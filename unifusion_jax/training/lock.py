"""Locks of folders that one run at a time may write: WORKDIR/train.lock, WORKDIR/rewrites/rewrite.lock.

The lock is the kernel's (`flock`), so it ends with its owner, however that ends: no process number is trusted that
another process may have by now, and of two that take over a dead owner's lock one gets it. The text of the file says
who the owner is, with a number that the owner raises as long as it lives. Where other hosts' locks are not seen, as on
many shared file systems, that number alone keeps them out; where a file system knows no locks at all, the number and
the process that the text names. The file stays behind, empty.
"""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import json
import os
import pathlib
import platform
import threading
import time

from absl import logging

from unifusion_jax import sharding
from unifusion_jax.errors import UserError

BEAT = 15.0      # seconds between two signs of life of an owner
PATIENCE = 60.0  # seconds without one after which an owner on another host is taken for dead
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextlib.contextmanager
def held(path: pathlib.Path) -> Iterator[None]:
  """Holds the lock file `path` for all processes of a run, which call this together; the first one locks.

  A lock whose owner is dead is taken over, with a warning; of an owner on another host that takes `PATIENCE` seconds to
  know. UserError on all processes where the lock is another run's.
  """
  file = None
  try:
    with sharding.together('lock the folder'):
      file = _taken(path) if sharding.is_main_process() else None
    with contextlib.nullcontext() if file is None else _beating(file):
      yield
  finally:
    if file is not None:
      with contextlib.suppress(OSError):
        os.ftruncate(file, 0)
      os.close(file)


def _taken(path: pathlib.Path) -> int:
  """The descriptor of the locked file, which names this process now."""
  path.parent.mkdir(parents=True, exist_ok=True)
  file, here = os.open(path, os.O_RDWR | os.O_CREAT, 0o644), _process(os.getpid())
  try:
    locked = _lock(file, path)
    owner = _owner(file)
    same_host = owner.get('host') == here['host']
    if locked:
      gone = same_host or owner.get('boot') == here['boot'] != ''  # a container of this host has another name
    else:
      gone = same_host and any(owner.get(name) != value for name, value in _process(owner.get('pid')).items())
    if owner and not gone and (same_host or _beats(path, file, owner)):
      raise UserError(f'{path.parent} is in use by {_name(owner)}, as {path.name} there says: wait for its end, stop '
                      'it, or give another --workdir')
    if owner:
      logging.warning('%s: %s ended without a word, and this run takes its place', path.parent, _name(owner))
    _write(file, here | dict(since=time.strftime('%Y-%m-%d %H:%M:%S %z'), beat=0))
    return file
  except BaseException:
    os.close(file)
    raise


def _beats(path: pathlib.Path, file: int, owner: dict) -> bool:
  """Whether the owner of a lock gives a sign of life."""
  logging.warning('%s is in use by %s, or was left behind: waiting up to %.0f s for a sign of life', path.parent,
                  _name(owner), PATIENCE)
  end = time.monotonic() + PATIENCE
  while time.monotonic() < end:
    time.sleep(min(1.0, PATIENCE / 10))
    if _owner(file) != owner:
      return True
  return False


@contextlib.contextmanager
def _beating(file: int) -> Iterator[None]:
  """Raises the number in the lock every `BEAT` seconds."""
  owner, ended = _owner(file), threading.Event()

  def beat():
    number = 0
    while not ended.wait(BEAT):
      number += 1
      with contextlib.suppress(OSError):  # the next one may get through
        _write(file, owner | dict(beat=number))

  thread = threading.Thread(target=beat, name='lock', daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()


def _write(file: int, owner: dict) -> None:
  text = json.dumps(owner).encode() + b'\n'
  os.pwrite(file, text, 0)
  os.ftruncate(file, len(text))


def _lock(file: int, path: pathlib.Path) -> bool:
  """Locks the file; False where the file system has no locks. UserError when another process holds it."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except (BlockingIOError, PermissionError):  # the latter from some network file systems
    raise UserError(f'{path.parent} is in use by {_name(_owner(file))}: wait for its end, stop it, or give another '
                    '--workdir') from None
  except OSError as error:
    if error.errno not in _NO_LOCKS:
      raise
    return False
  return True


def _process(pid: int) -> dict:
  """A process of this host. No other has the same four, not even one that gets its number later."""
  return dict(host=platform.node(), boot=_text('/proc/sys/kernel/random/boot_id').strip(), pid=pid,
              start=_text(f'/proc/{pid}/stat').rpartition(')')[2].split()[19:20])  # in ticks since the boot


def _owner(file: int) -> dict:
  """The text of a lock file; empty when no one holds it, or where its owner has not written it yet."""
  try:
    owner = json.loads(os.pread(file, 4096, 0) or b'{}')
  except ValueError:
    owner = {}
  return owner if isinstance(owner, dict) else {}


def _name(owner: dict) -> str:
  return (f'process {owner["pid"]} on {owner.get("host")} since {owner.get("since")}' if 'pid' in owner
          else 'another process')


def _text(path: str) -> str:
  try:
    return pathlib.Path(path).read_text()
  except OSError:
    return ''
