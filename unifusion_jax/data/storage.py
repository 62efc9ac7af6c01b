"""Files wherever they lie: on this machine, or at an address that fsspec knows, as gs://bucket/file and s3://bucket/file.

Addresses want fsspec's library for them: gcsfs for gs://, s3fs for s3://. Everything here raises an OSError where the
storage fails, a FileNotFoundError among them, and a UserError for an address that no library opens.
"""

import logging
import os
import pathlib

from unifusion_jax.errors import UserError

LIBRARIES = {'gs': 'gcsfs', 'gcs': 'gcsfs', 's3': 's3fs'}


def is_address(path) -> bool:
  """Whether a path is in a bucket, or in another file system that has a scheme."""
  return '://' in str(path)


def filesystem(path):
  """(fsspec's file system, the path in it) of a path or an address."""
  import fsspec.config  # here, as the import takes a while
  if 'GCSFS_DEBUG' not in os.environ:
    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # it logs tracebacks of all that it raises
  # Other processes and tensorstore write there too: a listing that was kept would not show it. So that epath, and with
  # it orbax, keeps none either, this is set for all
  fsspec.config.conf.setdefault('gs', {}).setdefault('use_listings_cache', False)
  try:
    return fsspec.core.url_to_fs(str(path), **dict(auto_mkdir=True) if str(path).startswith('file://') else {})
  except (ImportError, ValueError) as error:
    scheme = str(path).partition('://')[0]
    advice = f'pip install {LIBRARIES[scheme]}' if scheme in LIBRARIES else 'give a path, or an address of gs:// or s3://'
    raise UserError(f'{path} cannot be opened ({error}): {advice}') from error


def join(folder, name: str) -> str:
  """A name in a folder; names that are addresses, or absolute, stay as they are."""
  if is_address(name):
    return name
  return f'{str(folder).rstrip("/")}/{name}' if is_address(folder) else os.path.join(folder, name)


def parent(path) -> str:
  return str(path).rpartition('/')[0] if is_address(path) else str(pathlib.Path(path).parent)


def exists(path) -> bool:
  if not is_address(path):
    return os.path.exists(path)
  files, name = filesystem(path)
  return files.exists(name)


def size(path) -> int:
  files, name = filesystem(path)
  return files.size(name)


def open_file(path, block: int | None = None):
  """The file, to read bytes from; block: bytes that are fetched at a time of an address, instead of some MiB."""
  if not is_address(path):
    return open(path, 'rb')
  files, name = filesystem(path)
  return files.open(name, 'rb', block_size=block)


def read(path) -> bytes:
  if not is_address(path):
    return pathlib.Path(path).read_bytes()
  files, name = filesystem(path)
  return files.cat_file(name)


def write(path, data: bytes) -> None:
  """Writes a file whole or not at all; its folder must be there, if storage has folders."""
  if is_address(path):
    files, name = filesystem(path)
    return files.pipe_file(name, data)
  partial = partial_name(path)
  partial.write_bytes(data)
  os.replace(partial, path)


def partial_name(path) -> pathlib.Path:
  """The name of a local file while it is written: one for each file, so that what a killed process left is reused."""
  path = pathlib.Path(path)
  return path.with_name(f'.{path.name}.partial')


def matching(pattern: str) -> list[str]:
  """Files and folders that a pattern with * names, sorted; a name without * is itself, whether it is there or not."""
  if not any(character in pattern for character in '*?['):
    return [pattern]
  files, name = filesystem(pattern)
  found = sorted(files.glob(name))
  return [files.unstrip_protocol(each) for each in found] if is_address(pattern) else found


def names(folder) -> list[str]:
  """Names of the files below a folder, relative to it, sorted; without those that begin with a dot."""
  files, root = filesystem(folder)
  root = root.rstrip('/')
  found = (name[len(root):].lstrip('/') for name in files.find(root))
  return sorted(name for name in found if not any(part.startswith('.') for part in name.split('/')))
