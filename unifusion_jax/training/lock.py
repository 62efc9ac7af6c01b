"""Locks of folders that one run at a time may write: WORKDIR/train.lock, WORKDIR/rewrites/rewrite.lock.

The lock is the kernel's (`flock`), so it ends with its owner, however that ends: no process number is trusted that
another process may have by now, and of two that take over a dead owner's lock one gets it. The text of the file says
who the owner is, with a number that the owner raises as long as it lives. Where other hosts' locks are not seen, as on
many shared file systems, that number alone keeps them out; where a file system knows no locks at all, as in a bucket,
the number and the process that the text names. The file stays behind, empty; the object in a bucket does not.
"""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import json
import os
import pathlib
import platform
import sys
import threading
import time
import uuid

from absl import logging
from etils import epath
import fsspec

from unifusion_jax import bucket, sharding
from unifusion_jax.errors import UserError

BEAT = 15.0      # seconds between two signs of life of an owner
PATIENCE = 60.0  # seconds without one after which an owner on another host is taken for dead
MOMENT = 1.0     # seconds in which two that take a lock in a bucket see each other
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextlib.contextmanager
def held(path: pathlib.Path) -> Iterator[None]:
  """Holds the lock file `path` for all processes of a run, which call this together; the first one locks.

  A lock whose owner is dead is taken over, with a warning; of an owner on another host that takes `PATIENCE` seconds to
  know. UserError on all processes where the lock is another run's.
  """
  lock = None
  try:
    with sharding.together('lock the folder'), bucket.sentences(bucket.address(path)):
      lock = _taken(path) if sharding.is_main_process() else None
    with contextlib.nullcontext() if lock is None else _beating(lock):
      yield
  finally:
    if lock is not None:
      with contextlib.suppress(UserError):  # the next owner finds all; what cannot be copied now is tried again
        bucket.flush(path)
      lock.release()


def _taken(path: pathlib.Path) -> '_File | _Object':
  """The lock, which names this process now."""
  place = bucket.address(path)
  lock, here = _Object(place) if bucket.is_address(place) else _File(place), _process(os.getpid())
  try:
    locked = lock.lock()
    owner = lock.read()
    same_host, same_boot = owner.get('host') == here['host'], owner.get('boot') == here['boot'] != ''
    if locked:
      gone = same_host or same_boot  # a container of this host has another name
    else:
      gone = same_host and same_boot and any(
          owner.get(name) != value for name, value in _process(owner.get('pid')).items())
    if owner and not gone and (same_host and same_boot or _beats(lock, owner)):
      raise UserError(f'{place.parent} is in use by {_name(owner)}, as {place.name} there says: wait for its end, stop '
                      'it, or give another --workdir')
    if owner:
      logging.warning('%s: %s ended without a word, and this run takes its place', place.parent, _name(owner))
    lock.take(here | dict(since=time.strftime('%Y-%m-%d %H:%M:%S %z'), beat=0), free=not owner)
    return lock
  except BaseException:
    lock.close()
    raise


def _beats(lock: '_File | _Object', owner: dict) -> bool:
  """Whether the owner of a lock gives a sign of life."""
  logging.warning('%s is in use by %s, or was left behind: waiting up to %.0f s for a sign of life', lock.place.parent,
                  _name(owner), PATIENCE)
  end = time.monotonic() + PATIENCE
  while time.monotonic() < end:
    time.sleep(min(1.0, PATIENCE / 10))
    if lock.read() != owner:
      return True
  return False


@contextlib.contextmanager
def _beating(lock: '_File | _Object') -> Iterator[None]:
  """Raises the number in the lock every `BEAT` seconds."""
  owner, ended = lock.read(), threading.Event()

  def beat():
    number = 0
    while not ended.wait(BEAT):
      number += 1
      try:
        if not lock.write(owner | dict(beat=number)):
          print(f'error: {lock.place.parent} was taken over by {_name(lock.read())}, since this run gave no sign of '
                'life for too long: this run ends', file=sys.stderr, flush=True)
          os._exit(1)
      except Exception as error:  # the next one may get through
        logging.info('%s: %s', lock.place, error)

  thread = threading.Thread(target=beat, name='lock', daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()


class _File:
  """A lock file, which the kernel locks."""

  def __init__(self, place: pathlib.Path):
    self.place = place
    place.parent.mkdir(parents=True, exist_ok=True)
    self._file = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)

  def lock(self) -> bool:
    """Locks the file; False where the file system has no locks. UserError when another process holds it."""
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter from some network file systems
      raise UserError(f'{self.place.parent} is in use by {_name(self.read())}: wait for its end, stop it, or give '
                      'another --workdir') from None
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
      return False
    return True

  def read(self) -> dict:
    """The owner; empty when no one holds the lock, or where its owner has not written yet."""
    return _owner(os.pread(self._file, 4096, 0))

  def take(self, owner: dict, free: bool) -> None:
    del free
    self.write(owner)

  def write(self, owner: dict) -> bool:
    text = json.dumps(owner).encode() + b'\n'
    os.pwrite(self._file, text, 0)
    os.ftruncate(self._file, len(text))
    return True

  def release(self) -> None:
    with contextlib.suppress(OSError):
      os.ftruncate(self._file, 0)
    self.close()

  def close(self) -> None:
    os.close(self._file)


class _Object:
  """A lock in a bucket, where no one else keeps others out: of those that take it at once, the last one has it."""

  def __init__(self, place: epath.Path):
    self.place, self._mark = place, uuid.uuid4().hex
    self._files, self._path = fsspec.core.url_to_fs(str(place))

  def lock(self) -> bool:
    return False

  def read(self) -> dict:
    try:
      return _owner(self._files.cat_file(self._path))
    except FileNotFoundError:
      return {}

  def take(self, owner: dict, free: bool) -> None:
    """Writes the owner, and looks a moment later whether it still is. UserError where another one came first."""
    text = json.dumps(owner | dict(mark=self._mark)).encode()
    with contextlib.suppress(FileExistsError):
      self._files.pipe_file(self._path, text, mode='create' if free else 'overwrite')
      time.sleep(MOMENT)
    if not self._is_mine():
      raise UserError(f'{self.place.parent} was taken by {_name(self.read())} at the same moment: wait for its end, '
                      'stop it, or give another --workdir')

  def write(self, owner: dict) -> bool:
    """Writes the owner; False when it is another one by now."""
    if not self._is_mine():
      return False
    self._files.pipe_file(self._path, json.dumps(owner).encode())
    return True

  def release(self) -> None:
    try:
      if self._is_mine():
        self._files.rm_file(self._path)
    except Exception as error:
      logging.warning('%s stays behind: %s', self.place, error)

  def close(self) -> None:
    pass

  def _is_mine(self) -> bool:
    return self.read().get('mark') == self._mark


def _process(pid: int) -> dict:
  """A process of this host. No other has the same four, not even one that gets its number later."""
  return dict(host=platform.node(), boot=_text('/proc/sys/kernel/random/boot_id').strip(), pid=pid,
              start=_text(f'/proc/{pid}/stat').rpartition(')')[2].split()[19:20])  # in ticks since the boot


def _owner(text: bytes) -> dict:
  try:
    owner = json.loads(text or b'{}')
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
