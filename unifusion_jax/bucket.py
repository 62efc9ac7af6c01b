"""Folders in buckets, such as gs://bucket/run, for code that reads and writes local files.

  with bucket.mirrored('gs://bucket/run') as workdir:  # a local folder; what is written there comes into the bucket
    bucket.address(workdir / 'checkpoints')            # the place in the bucket itself, an epath.Path
  folder = bucket.fetched('gs://bucket/model', names)  # a copy that stays on this host

Checkpoints alone are written to the bucket at once, by orbax: all that a run writes beside them is small, and grows
line by line, which objects of a bucket cannot. Access, retries and credentials are those of gcsfs (data/storage.py).
"""

from collections.abc import Iterable, Iterator
import contextlib
import fcntl
import hashlib
import os
import pathlib
import re
import shutil
import tempfile
import threading
import time
import uuid

from absl import logging
from etils import epath

from unifusion_jax import sharding
from unifusion_jax.data import storage
from unifusion_jax.data.storage import is_address
from unifusion_jax.errors import clipped, UserError

SCHEMES = ('gs://', 'file://')
SECONDS = 15.0         # between two copies into the bucket
CHECKPOINTS = 'checkpoints'
LARGE = ('export',)     # copied at the end alone, and not fetched at the start
_SHARE = 10            # a copy takes at most one part in so many of the time
_WHOLE = 2 ** 26       # bytes; files up to this size are read whole, since they may grow while they are copied
_FAILURES = 'UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED'  # of tensorstore
_MIRRORS: dict[pathlib.Path, 'Mirror'] = {}
_FETCHED: dict[str, pathlib.Path] = {}


def address(path: pathlib.Path) -> pathlib.Path | epath.Path:
  """The place in the bucket of a path in a mirrored folder; every other path as it is."""
  mirror = _mirror_of(path)
  return path if mirror is None else mirror.address / path.relative_to(mirror.folder)


def flush(path: pathlib.Path) -> None:
  """Copies what is new in the mirrored folder of a path now. UserError where that fails; nothing for other paths."""
  if mirror := _mirror_of(path):
    with sentences(mirror.url):
      mirror.copy()


@contextlib.contextmanager
def mirrored(url: str) -> Iterator[pathlib.Path]:
  """A local folder that holds what is in the bucket under `url`, and whose files are copied there.

  All processes enter and leave it together, each with a folder of its own. Checkpoints and LARGE folders are not
  fetched. Every SECONDS and at the end each process copies the files that it has changed, and removes in the bucket
  those that it has removed. Files that are being written (.part, a dot before the name) and locks stay where they are.

  Raises:
    UserError: where the bucket is not there or may not be written to, before anything is fetched; at the end where it
      cannot be written to any more. The local folder stays then. In between that is a warning, and tried again.
  """
  mirror = Mirror(url)
  try:
    with sharding.together(f'read {url}'), sentences(url):
      mirror.fetch()
  except BaseException:
    shutil.rmtree(mirror.folder)
    raise
  _MIRRORS[mirror.folder] = mirror
  thread = threading.Thread(target=mirror.repeat, name='bucket', daemon=True)
  thread.start()
  try:
    yield mirror.folder
  except BaseException:
    try:
      mirror.finish(thread)
    except UserError as error:
      logging.error('%s', error)
    raise
  with sharding.together(f'copy its files to {url}'):
    mirror.finish(thread)


class Mirror:
  """A local folder and the one in the bucket that it is copied to."""

  def __init__(self, url: str):
    self.url = url
    self.folder = pathlib.Path(tempfile.mkdtemp(prefix='unifusion-'))
    self._known: dict[str, tuple[int, int]] = {}  # (size, mtime) of files that are the same on both sides
    self._lock, self._ended = threading.Lock(), threading.Event()

  @property
  def address(self) -> pathlib.Path | epath.Path:
    return pathlib.Path(self._root) if self.url.startswith('file://') else epath.Path(self.url)

  def fetch(self) -> None:
    """Fetches the files, after a try whether any can be written."""
    self._files, self._root = _file_system(self.url)
    trial = f'{self._root}/.{uuid.uuid4().hex}'
    self._files.pipe_file(trial, b'')
    self._files.rm_file(trial)
    names = [name for name in self._there() if _is_copied(name)]
    for name in names:
      (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
    if names:
      self._files.get([f'{self._root}/{name}' for name in names], [str(self.folder / name) for name in names])
    self._known = self._here(LARGE)

  def copy(self, *, large: bool = False) -> None:
    """Copies what has changed; the LARGE folders too if `large`."""
    with self._lock:
      left_out = () if large else LARGE
      here = self._here(left_out)
      for name, stamp in here.items():
        if self._known.get(name) != stamp and self._put(name, stamp):
          self._known[name] = stamp
      for name in [name for name in self._known if name not in here and _top(name) not in left_out]:
        with contextlib.suppress(FileNotFoundError):
          self._files.rm_file(f'{self._root}/{name}')
        del self._known[name]

  def repeat(self) -> None:
    """Copies every SECONDS until `finish`, less often where a copy takes long."""
    wait, failing = SECONDS, False
    while not self._ended.wait(wait):
      start = time.monotonic()
      try:
        self.copy()
        failing = False
      except Exception as error:
        if not failing:
          logging.warning('%s: what this run writes cannot be copied there now (%s); that is tried again',
                          self.url, reason(error) or _shown(error))
        failing = True
      wait = max(SECONDS, (_SHARE - 1) * (time.monotonic() - start))

  def finish(self, thread: threading.Thread) -> None:
    """Copies all that is left and removes the local folder; UserError, and the folder stays, where that fails."""
    self._ended.set()
    thread.join()
    try:
      self.copy(large=True)
    except Exception as error:
      raise UserError(f'{self.url}: what this run has written could not all be copied there '
                      f'({reason(error) or _shown(error)}); it is in {self.folder}: copy it with '
                      f'gcloud storage cp --recursive "{self.folder}/*" {self.url.rstrip("/")}/') from error
    finally:
      del _MIRRORS[self.folder]
    shutil.rmtree(self.folder, ignore_errors=True)

  def _there(self) -> Iterator[str]:
    """Names of the files in the bucket that are fetched."""
    try:
      entries = self._files.ls(self._root, detail=True)
    except FileNotFoundError:  # a new run
      return
    for entry in entries:
      if entry['type'] != 'directory':
        yield _name(entry['name'], self._root)
      elif _name(entry['name'], self._root) not in (CHECKPOINTS, *LARGE):
        yield from (_name(path, self._root) for path in self._files.find(entry['name']))

  def _here(self, left_out: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    found = {}
    for place, folders, files in os.walk(self.folder):
      inner = pathlib.Path(place).relative_to(self.folder)
      folders[:] = sorted(name for name in folders if _is_copied(name)
                          and not (inner == pathlib.Path() and name in (CHECKPOINTS, *left_out)))
      for name in sorted(filter(_is_copied, files)):
        with contextlib.suppress(FileNotFoundError):  # renamed or removed since
          status = os.stat(self.folder / inner / name)
          found[(inner / name).as_posix()] = status.st_size, status.st_mtime_ns
    return found

  def _put(self, name: str, stamp: tuple[int, int]) -> bool:
    """Copies a file; False when it is not there any more."""
    path, place = self.folder / name, f'{self._root}/{name}'
    if stamp[0] > _WHOLE:
      self._files.put_file(str(path), place)
      return True
    try:
      data = path.read_bytes()
    except FileNotFoundError:
      return False
    self._files.pipe_file(place, data)
    return True


def names(url: str) -> list[str]:
  """Names of the files right in a folder of a bucket; none where there is no such folder. UserError as `sentences`."""
  with sentences(url):
    return sorted(_facts(url))


def fetched(url: str, wanted: Iterable[str]) -> pathlib.Path:
  """A local folder with these files of a folder of a bucket, fetched unless they were before. UserError as `sentences`.

  It is in the user's cache, by address and the files' generations, so a file that was written anew is fetched anew.
  """
  with sentences(url):
    files, root = _file_system(url)
    facts = _facts(url)
    wanted = sorted(facts.keys() & set(wanted))
    key = hashlib.sha256(repr([url.rstrip('/'), [(name, facts[name]) for name in wanted]]).encode()).hexdigest()[:16]
    folder = cache() / f'{os.path.basename(root)}-{key}'
    if not folder.exists():
      folder.parent.mkdir(parents=True, exist_ok=True)
      with open(folder.with_name(f'{folder.name}.lock'), 'w') as lock:
        with contextlib.suppress(OSError):  # no locks here: several processes fetch it, and one gives it its name
          fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
          part = pathlib.Path(tempfile.mkdtemp(prefix=f'{folder.name}.', suffix='.part', dir=folder.parent))
          try:
            files.get([f'{root}/{name}' for name in wanted], [str(part / name) for name in wanted])
            with contextlib.suppress(FileExistsError):
              part.rename(folder)
          finally:
            shutil.rmtree(part, ignore_errors=True)
    _FETCHED[str(url)] = folder
    return folder


def here(name) -> pathlib.Path:
  """The local folder of an address that this process has fetched; of every other name the path."""
  return _FETCHED.get(str(name), pathlib.Path(name).expanduser())


def cache() -> pathlib.Path:
  """The folder that keeps what `fetched` has fetched."""
  return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'unifusion_jax' / 'buckets'


@contextlib.contextmanager
def sentences(place):
  """Errors of a bucket become a UserError; others pass, as do all of a `place` that is no address."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    why = is_address(place) and reason(error)
    if not why:
      raise
    raise UserError(f'{place}: {why}') from error


def _mirror_of(path: pathlib.Path) -> Mirror | None:
  return next((mirror for folder, mirror in _MIRRORS.items() if path.is_relative_to(folder)), None)


def _file_system(url: str):
  """(fsspec's file system, path in it) of a folder's address."""
  if not url.startswith(SCHEMES) or not url.partition('://')[2].strip('/'):
    raise UserError(f'{url}: an address must be gs://BUCKET/FOLDER')
  files, root = storage.filesystem(url)
  return files, root.rstrip('/')


def _facts(url: str) -> dict[str, tuple]:
  """{name: (size, generation)} of the files right in a folder."""
  files, root = _file_system(url)
  try:
    entries = files.ls(root, detail=True)
  except FileNotFoundError:
    return {}
  return {_name(entry['name'], root): (entry['size'], str(entry.get('generation') or entry.get('mtime')))
          for entry in entries if entry['type'] != 'directory' and _name(entry['name'], root)}


def _name(path: str, root: str) -> str:
  return path[len(root):].strip('/')


def _top(name: str) -> str:
  return name.partition('/')[0]


def _is_copied(name: str) -> bool:
  return bool(name) and not any(part.startswith('.') or part.endswith(('.part', '.lock')) for part in name.split('/'))


def reason(error: Exception) -> str | None:
  """Why a bucket could not be read or written, and what mends it; None for an error of another kind.

  Those of gcsfs, google's libraries and tensorstore have no class in common.
  """
  text, code = f'{type(error).__name__}: {error}', getattr(error, 'code', None)
  remote = isinstance(error, OSError) and error.errno is None  # a number is of a local file
  if remote and isinstance(error, FileNotFoundError) or code == 404 or 'NOT_FOUND' in text:
    return f'there is no such bucket ({_shown(error)}): create it, or give another address'
  if code in (401, 403) or re.search('Forbidden|PERMISSION_DENIED|UNAUTHENTICATED|DefaultCredentials', text):
    return (f'this account may not do that there ({_shown(error)}): gcloud auth application-default login, or a '
            'machine whose account has the roles Storage Object Admin and Storage Legacy Bucket Reader')
  if remote or re.match('(gcsfs|google|aiohttp|requests)[.]', type(error).__module__) or re.search(_FAILURES, text):
    return f'it cannot be reached ({_shown(error)}): look at the network, then start the same command again'
  return None


def _shown(error: Exception) -> str:
  return clipped(f'{type(error).__name__}: {error}', 200)
