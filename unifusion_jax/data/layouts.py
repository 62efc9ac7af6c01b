"""The layouts that people's data have: Parquet with images inside, WebDataset tar files, JSON lines, folders of images.

  inputs = layouts.inputs(['gs://bucket/part-*.parquet'])
  for piece in layouts.split(inputs, shards)[k]:
    for place, columns in layouts.read(piece, wanted): ...

`columns` is {name: value} as the file has it, or the UserError that says why this record cannot be read:

  Parquet, JSON lines   its columns
  tar                   the extensions of a sample's files ('jpg', 'txt', 'input.jpg'), images as bytes and texts as
                        text; the keys of its .json stand beside them
  folder                'image', and 'text' from the .txt file of the same name
"""

from collections.abc import Iterator
import dataclasses
import itertools
import json
import os
import tarfile

from unifusion_jax.data import lists, storage
from unifusion_jax.errors import clipped, UserError

IMAGES = ('.png', '.jpg', '.jpeg', '.webp', '.gif', '.avif')


@dataclasses.dataclass(frozen=True)
class Piece:
  """Records `start` to `stop` of one input; of a tar file all, as their number is not known."""
  path: str
  kind: str
  start: int = 0
  stop: int | None = None
  offset: int = 0               # of JSON lines: the first byte of the first record,
  line: int = 1                 # and its line
  names: tuple[str, ...] = ()   # of a folder: the images


def inputs(patterns: list[str]) -> list[Piece]:
  """A piece for each input that patterns name, whole. UserError for what is none, and for layouts that are mixed."""
  paths = [path for pattern in patterns for path in storage.matching(pattern)]
  if not paths:
    raise UserError(f'--input={",".join(patterns)} names no file: give files, patterns of them, or a folder of images')
  pieces = [_input(path) for path in paths]
  if len({piece.kind for piece in pieces}) > 1:
    kinds = ', '.join(sorted({piece.kind for piece in pieces}))
    raise UserError(f'--input={",".join(patterns)} mixes {kinds}: convert each to a folder of its own')
  return pieces


def _input(path: str) -> Piece:
  if not storage.exists(path):
    raise UserError(f'--input: {path} is not there: give files, patterns of them, or a folder of images')
  suffixes = os.path.basename(path).lower()
  if suffixes.endswith('.parquet'):
    with _parquet(path) as file:
      return Piece(path, 'parquet', stop=file.metadata.num_rows)
  if suffixes.endswith(('.jsonl', '.ndjson')):
    with storage.open_file(path) as file:
      return Piece(path, 'jsonl', stop=sum(1 for _ in lists.numbered_lines(file)))
  if suffixes.endswith(('.tar', '.tar.gz', '.tgz')):
    return Piece(path, 'tar')
  files, name = storage.filesystem(path)
  if not files.isdir(name):
    raise UserError(f'--input: {path} is no .parquet, .jsonl, .tar and no folder of images: give one of these')
  names = tuple(each for each in storage.names(path) if each.lower().endswith(IMAGES))
  if not names:
    raise UserError(f'--input: the folder {path} has no images ({", ".join(IMAGES)}): to convert the files in it, name '
                    f'them, as in --input={path}/*.parquet')
  return Piece(path, 'folder', stop=len(names), names=names)


def split(whole: list[Piece], count: int) -> list[tuple[Piece, ...]]:
  """The pieces of each of `count` shards: as many records each, in order; tar files are shared out whole."""
  if whole[0].kind == 'tar':
    return [tuple(whole[number::count]) for number in range(count)]
  starts = [0, *itertools.accumulate(piece.stop for piece in whole)]
  bounds = [starts[-1] * number // count for number in range(count + 1)]
  shards = []
  for first, last in itertools.pairwise(bounds):
    shards.append(tuple(_part(piece, max(first - start, 0), min(last - start, piece.stop))
                        for piece, start in zip(whole, starts) if start < last and first < start + piece.stop))
  return _with_offsets(shards) if whole[0].kind == 'jsonl' else shards


def _part(piece: Piece, start: int, stop: int) -> Piece:
  return dataclasses.replace(piece, start=start, stop=stop, names=piece.names[start:stop])


def _with_offsets(shards: list[tuple[Piece, ...]]) -> list[tuple[Piece, ...]]:
  """Shards of JSON lines, whose pieces know where they begin; each file is read once."""
  starts = {}
  for path in {piece.path for shard in shards for piece in shard}:
    wanted = {piece.start for shard in shards for piece in shard if piece.path == path}
    with storage.open_file(path) as file:
      starts |= {(path, row): (offset, number) for row, (offset, number, _) in enumerate(lists.numbered_lines(file))
                 if row in wanted}
  return [tuple(dataclasses.replace(piece, offset=starts[piece.path, piece.start][0],
                                    line=starts[piece.path, piece.start][1]) for piece in shard) for shard in shards]


def read(piece: Piece, wanted: set[str]) -> Iterator[tuple[str, dict | UserError]]:
  """(place for messages, columns) of each record of a piece; `wanted` columns alone need be there."""
  reader = dict(parquet=_read_parquet, jsonl=_read_lines, tar=_read_tar, folder=_read_folder)[piece.kind]
  return reader(piece, wanted)


def _parquet(path: str):
  """The Parquet file, as a context; UserError where it is none."""
  import pyarrow
  import pyarrow.parquet
  try:
    return pyarrow.parquet.ParquetFile(storage.open_file(path), pre_buffer=False)
  except (ValueError, pyarrow.ArrowException) as error:
    raise UserError(f'{path} is not a Parquet file that can be read ({clipped(error)}): replace it') from error


def _read_parquet(piece: Piece, wanted: set[str]) -> Iterator[tuple[str, dict | UserError]]:
  import pyarrow
  with _parquet(piece.path) as file:
    names = [name for name in file.schema_arrow.names if name in wanted]
    first = 0
    for group in range(file.metadata.num_row_groups):
      rows = file.metadata.row_group(group).num_rows
      if first + rows > piece.start and first < piece.stop:
        number = first
        try:
          for batch in file.iter_batches(64, row_groups=[group], columns=names):
            for i in range(batch.num_rows):
              if piece.start <= number < piece.stop:
                yield f'{piece.path} row {number + 1}', _arrow_row(batch, i)
              number += 1
        except (OSError, ValueError, pyarrow.ArrowException) as error:
          raise UserError(f'{piece.path} cannot be read ({clipped(error)}): replace it') from error
      first += rows


def _arrow_row(batch, i: int) -> dict | UserError:
  try:
    return {name: batch[name][i].as_py() for name in batch.schema.names}
  except ValueError as error:  # text in another encoding
    return UserError(f'it is not what the file says it is ({clipped(error, 150)})')


def _read_lines(piece: Piece, wanted: set[str]) -> Iterator[tuple[str, dict | UserError]]:
  with storage.open_file(piece.path) as file:
    file.seek(piece.offset)
    for _, number, line in itertools.islice(lists.numbered_lines(file, piece.line), piece.stop - piece.start):
      yield f'{piece.path} line {number}', _object(line)


def _object(text: bytes) -> dict | UserError:
  """The object in JSON; a UserError where there is none."""
  try:
    value = json.loads(text.decode('utf-8-sig'))
  except (ValueError, RecursionError, MemoryError) as error:
    return UserError(f'it is not JSON ({clipped(error, 150) or type(error).__name__})')
  return value if isinstance(value, dict) else UserError(f'it is a {type(value).__name__}: wanted an object')


def _read_tar(piece: Piece, wanted: set[str]) -> Iterator[tuple[str, dict | UserError]]:
  try:
    with storage.open_file(piece.path) as raw, tarfile.open(fileobj=raw, mode='r|*') as file:
      members = ((*_stem(member.name), file.extractfile(member).read()) for member in file if member.isfile())  # pyrefly: ignore[missing-attribute]
      for stem, group in itertools.groupby(members, lambda member: member[0]):
        if not os.path.basename(stem).startswith('.') and not stem.startswith('__MACOSX'):
          yield f'{piece.path} sample {stem}', _sample({extension: data for _, extension, data in group})
  except (tarfile.TarError, EOFError) as error:
    raise UserError(f'{piece.path} is no tar file, damaged or cut short ({clipped(error)}): replace it or leave it '
                    'out') from error


def _stem(name: str) -> tuple[str, str]:
  """(a sample's name, the extension) of a file in a tar: as in WebDataset, the extension begins at the first dot."""
  folder, _, base = name.rpartition('/')
  stem, _, extension = base[1:].partition('.')
  return f'{folder}/{base[:1]}{stem}'.lstrip('/'), extension.lower()


def _sample(files: dict[str, bytes]) -> dict | UserError:
  columns = {}
  for extension, data in files.items():
    if f'.{extension}'.endswith(IMAGES):
      columns[extension] = data
    elif extension == 'json':
      facts = _object(data)
      if isinstance(facts, UserError):
        return UserError(f'its .json: {facts}')
      columns = facts | columns
    else:
      try:
        columns[extension] = data.decode('utf-8-sig')
      except UnicodeDecodeError:  # no text: it stays what it is
        columns[extension] = data
  return columns


def _read_folder(piece: Piece, wanted: set[str]) -> Iterator[tuple[str, dict | UserError]]:
  for name in piece.names:
    path = storage.join(piece.path, name)
    try:
      text = storage.read(os.path.splitext(path)[0] + '.txt').decode('utf-8-sig')
      yield path, dict(image=name, text=text)
    except FileNotFoundError:
      yield path, UserError(f'there is no {os.path.splitext(os.path.basename(name))[0]}.txt with its caption beside it')
    except UnicodeDecodeError as error:
      yield path, UserError(f'its caption is not UTF-8 ({error.reason} at byte {error.start})')
