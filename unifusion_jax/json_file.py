"""JSON files of checkpoints and runs, read so that every error names the file and what to do."""

import contextlib
import json
import pathlib

from unifusion_jax.errors import UserError

_LFS = b'version https://git-lfs'


def read(path) -> dict:
  """The object in a JSON file, with or without a byte-order mark; UserError when there is none to read."""
  path = pathlib.Path(path)
  refuse_pointer(path)
  try:
    value = json.loads(path.read_text('utf-8-sig'))
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror or error}') from error
  except (ValueError, RecursionError) as error:
    what = 'is empty' if not path.stat().st_size else f'is damaged or is no JSON ({error})'
    raise UserError(f'{path} {what}: download or write it again') from error
  if not isinstance(value, dict):
    raise UserError(f'{path} holds a {type(value).__name__}: it must be an object, {{...}}')
  return value


@contextlib.contextmanager
def named(path):
  """Errors over what a JSON file says, while a configuration is made of it, become a UserError that names the file."""
  try:
    yield
  except UserError as error:
    known = str(pathlib.Path(path).parent) in str(error)
    raise UserError(str(error) if known else f'{path}: {error}') from error
  except KeyError as error:
    raise UserError(f'{path} does not give {error}: take the whole file of the checkpoint') from error
  except (TypeError, AttributeError, ValueError) as error:
    raise UserError(f'{path} has a value of the wrong kind ({error}): take the file of the checkpoint') from error


def refuse_pointer(path: pathlib.Path) -> None:
  """UserError for a file that git-lfs has not fetched: three lines of text stand in its place."""
  with contextlib.suppress(OSError), path.open('rb') as file:
    if file.read(len(_LFS)) == _LFS:
      raise UserError(f'{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder, or '
                      'download the file')
