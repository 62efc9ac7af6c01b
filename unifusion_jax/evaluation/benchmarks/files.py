"""Public files of a set, from a folder, a file or a dataset on the hub: read whole, with their SHA-256."""

from collections.abc import Iterator, Mapping
import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import types

from unifusion_jax import json_file
from unifusion_jax.data import lists
from unifusion_jax.errors import clipped, UserError
from unifusion_jax.weights import hub


def git_id(data: bytes) -> str:
  """The id that git gives a file of this content, SHA-1 of its length and itself; repositories list it."""
  return hashlib.sha1(b'blob %d\0' % len(data) + data, usedforsecurity=False).hexdigest()


@dataclasses.dataclass(frozen=True)
class Files:
  """Files of a set.

  Attributes:
    name: the set's place: a folder, a file, or a dataset on the hub at its commit.
    folder: where its files are.
    file: name of the only one, where the place is a file.
    known: {file name: SHA-256, or git's id of the content} of those that are known.
    digests: {file name: SHA-256} of all that were read.
    pinned: {file name: SHA-256} that the user gives in the place of known ones.
    published: names of those that were read and whose content is the known one.
  """
  name: str
  folder: pathlib.Path
  file: str = ''
  known: Mapping[str, str] = dataclasses.field(default_factory=dict)
  digests: dict[str, str] = dataclasses.field(default_factory=dict)
  pinned: Mapping[str, str] = dataclasses.field(default_factory=dict)
  published: set[str] = dataclasses.field(default_factory=set)

  @classmethod
  def locate(cls, place: str, patterns: tuple[str, ...], known: Mapping[str, str] = types.MappingProxyType({}),
             pinned: Mapping[str, str] = types.MappingProxyType({})) -> 'Files':
    """The files at a place.

    patterns: of the files that are fetched from the hub.
    """
    path = pathlib.Path(place)
    if path.is_file():
      return cls(place, path.parent, path.name, known, pinned=pinned)
    found = hub.pin(place, dataset=patterns)
    return cls(found.name, found.folder, known=known, pinned=pinned)

  def path(self, *places: str) -> pathlib.Path:
    """The first of these places in the folder that is there. UserError where none is.

    A single file is what is read first, whatever its name; the set's other files are those beside it.
    """
    if self.file and (self.file not in self.digests or self.file in map(os.path.basename, places)):
      return self.folder / self.file
    for place in places:
      if (self.folder / place).is_file():
        return self.folder / place
    raise UserError(f'{self.folder} has no {" and no ".join(places)}: give the folder of the set, or that file')

  def read(self, *places: str) -> tuple[pathlib.Path, bytes]:
    """(path, content) of a file, its digest noted; UserError for another content than the known one."""
    path = self.path(*places)
    json_file.refuse_pointer(path)
    try:
      data = path.read_bytes()
    except OSError as error:
      raise UserError(f'{path} cannot be read: {error.strerror or error}') from error
    if not data.strip():
      raise UserError(f'{path} is empty: download it again')
    self.note(path, hashlib.sha256(data).hexdigest(), git_id(data))
    return path, data

  def note(self, path: pathlib.Path, digest: str, git: str | None = None) -> None:
    """Notes the SHA-256 of a file; UserError for another than the known one, or for another of git's ids."""
    self.digests[path.name] = digest
    known = self.known.get(path.name)
    wanted = self.pinned.get(path.name, known)
    if wanted and wanted not in (digest, git):
      kind = "git's id" if git and len(wanted) == len(git) else 'the SHA-256'
      raise UserError(f'{path} has the SHA-256 {digest}, and the file of the set has {kind} {wanted}: download it '
                      f'again, or if another edition is meant, give --config.benchmark.sha256={path.name}={digest}')
    if known and known in (digest, git):
      self.published.add(path.name)

  def text(self, *places: str) -> tuple[pathlib.Path, str]:
    """(path, text) of a file in UTF-8."""
    path, data = self.read(*places)
    try:
      return path, data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
      line = data.count(b'\n', 0, error.start) + 1
      raise UserError(f'{path} line {line} holds the byte 0x{data[error.start]:02x}, which is no UTF-8: download it '
                      'again') from error

  def json(self, *places: str) -> tuple[pathlib.Path, dict]:
    """(path, object) of a JSON file."""
    path, text = self.text(*places)
    try:
      value = json.loads(text)
    except (ValueError, RecursionError) as error:
      raise UserError(f'{path} is no JSON ({clipped(error, 150)}): download it again') from error
    if not isinstance(value, dict) or not value:
      raise UserError(f'{path} must hold an object, {{...}}, with an entry for each prompt')
    return path, value

  def json_lines(self, *places: str) -> list[tuple[str, dict]]:
    """(place, object) of each line of a JSON-lines file."""
    path, data = self.read(*places)
    rows = []
    for _, number, line in lists.numbered_lines(io.BytesIO(data)):
      place = f'{path} line {number}'
      try:
        row = json.loads(line.decode('utf-8-sig'))
      except (ValueError, RecursionError) as error:
        raise UserError(f'{place} is no JSON ({clipped(error, 150)}): download the file again') from error
      if not isinstance(row, dict):
        raise UserError(f'{place} must be an object, {{...}}, and is a {type(row).__name__}')
      rows.append((place, row))
    return rows

  def csv_rows(self, columns: tuple[str, ...], *places: str) -> list[tuple[str, dict[str, str]]]:
    """(place, row) of each row of a CSV file that has these columns."""
    path, text = self.text(*places)
    reader = csv.DictReader(io.StringIO(text, newline=''))
    rows = []
    try:
      if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
        raise UserError(f'{path} line 1 has no column {", ".join(missing)}: wanted {", ".join(columns)}')
      for row in reader:
        place = f'{path} line {reader.line_num}'
        if wrong := [name for name in columns if row[name] is None]:
          raise UserError(f'{place} has no {", ".join(wrong)}: download the file again')
        rows.append((place, row))
    except csv.Error as error:
      raise UserError(f'{path} line {reader.line_num} is no CSV ({error}): download the file again') from error
    return rows

  def tables(self, columns: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    """(place, row) of each row of the Parquet files, or Arrow files of `datasets`, below the folder."""
    import pyarrow
    import pyarrow.parquet
    paths = [self.folder / self.file] if self.file else sorted(
        path for path in self.folder.rglob('*') if path.suffix in ('.parquet', '.arrow'))
    if not paths:
      raise UserError(f'{self.folder} has no .parquet and no .arrow file: give the folder of the set')
    for path in paths:
      json_file.refuse_pointer(path)
      try:
        with path.open('rb') as file:
          self.note(path, hashlib.file_digest(file, 'sha256').hexdigest())
        if path.suffix == '.parquet':
          table = pyarrow.parquet.read_table(path)
        else:
          with pyarrow.memory_map(str(path)) as file:
            table = pyarrow.ipc.open_stream(file).read_all()
      except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f'{path} cannot be read ({clipped(error, 150)}): download it again') from error
      if missing := [name for name in columns if name not in table.column_names]:
        raise UserError(f'{path} has no column {", ".join(missing)}: wanted {", ".join(columns)}')
      part = table.select(list(columns))
      yield from ((f'{path} row {i + 1}', part.slice(i, 1).to_pylist()[0]) for i in range(part.num_rows))


@contextlib.contextmanager
def named(place: str):
  """Errors over what a record says as a UserError with its place."""
  try:
    yield
  except UserError as error:
    raise UserError(str(error) if str(error).startswith(place) else f'{place}: {error}') from error
  except KeyError as error:
    raise UserError(f'{place} has no {error}: download the file again') from error
  except (TypeError, ValueError, AttributeError, IndexError) as error:
    raise UserError(f'{place} has a value of the wrong kind ({clipped(error, 150)}): download the file again'
                    ) from error


def text(value, name: str) -> str:
  """A text of a record; UserError for anything else."""
  if not isinstance(value, str):
    raise UserError(f'{name} is a {type(value).__name__}, wanted text')
  return value


def listed(value, name: str) -> list:
  """A list of a record; UserError for anything else."""
  if not isinstance(value, list):
    raise UserError(f'{name} is a {type(value).__name__}, wanted a list')
  return value
