"""Requests that two checkpoints are compared on: of scenes, of a list of records, or prompts."""

from collections.abc import Iterator
import dataclasses
import itertools
import pathlib

import numpy as np

from unifusion_jax import metadata, request
from unifusion_jax.data import imaging, lists, storage
from unifusion_jax.data.config import is_list
from unifusion_jax.errors import UserError
from unifusion_jax.request import Request
from unifusion_jax.scenes import examples


@dataclasses.dataclass(frozen=True)
class Pair:
  """One request, of which both checkpoints make an image of a size from the same noise.

  category: what rates are told apart by; a slash divides it into finer ones.
  digests: of the references' pixels.
  """
  name: str
  category: str
  request: Request
  height: int
  width: int
  digests: tuple[str, ...] = ()

  @property
  def asked(self) -> str:
    """Prompt and references in one text, the same of pairs that differ in their noise alone."""
    return '\n'.join((self.request.instruction, *self.digests))

  def to_json(self) -> dict:
    """What the images depend on beside the checkpoints."""
    return dict(pair=self.name, category=self.category, prompt=self.request.instruction, seed=self.request.seed,
                references=list(self.digests), height=self.height, width=self.width)


def pairs(config, size: int, unit: int) -> list[Pair]:
  """The first `config.examples` pairs of `config.prompt`, or without one of `config.data`.

  Seeds count from `config.seed`. size, unit: of `request.shape_like`. UserError for what cannot be read.
  """
  if config.prompt:
    made = _of_prompts(config, size, unit)
  elif is_list(config.data):
    made = _of_list(config, size, unit)
  elif config.data == 'scenes':
    made = _of_scenes(config, size)
  else:
    raise UserError(f'data={config.data} must be scenes, or a .jsonl or .parquet file of records')
  found = [dataclasses.replace(pair, name=f'{i:04d}', request=dataclasses.replace(pair.request, seed=config.seed + i))
           for i, pair in enumerate(itertools.islice(made, config.examples))]
  if not found:
    raise UserError(f'prompt={config.prompt} holds no request: give one a line')
  return found


def _of_scenes(config, size: int) -> Iterator[Pair]:
  """Of the test split, the tasks in turn."""
  for i in itertools.count():
    task = config.tasks[i % len(config.tasks)]
    record = examples.example(task, 'test', i // len(config.tasks), size=size)
    references = tuple(record['references'])
    yield Pair('', f'{task}/{record["kind"]}', Request(record['instruction'], references),
               *record['target'].shape[:2], _digests(references))


def _of_list(config, size: int, unit: int) -> Iterator[Pair]:
  """Of records as `data.path` takes them, in the proportions of their targets."""
  rows, folder = lists.load(pathlib.Path(config.data)), storage.parent(config.data)
  for i in range(len(rows)):
    try:
      record = rows.parse(rows[i])
      image = lambda file: lists.image_file(folder, file)
      references = tuple(imaging.read(image(file)) for file in record['references'])
      shape = imaging.read_size(image(record['target']))
    except UserError as error:
      raise UserError(f'{rows.where(i)}: {error}') from error
    yield _pair(record['instruction'] or record['caption'], references, _digests(references), shape, config, size, unit)


def _of_prompts(config, size: int, unit: int) -> Iterator[Pair]:
  """`config.num_images` of each line, all with the same references."""
  references = tuple(imaging.read(path) for path in config.references)
  digests, shape = _digests(references), references[0].shape[:2] if references else None
  for place, text in request.prompt_lines(config.prompt).items():
    for _ in range(config.num_images):
      pair = _pair(text, references, digests, shape, config, size, unit)
      yield dataclasses.replace(pair, request=dataclasses.replace(pair.request, place=place))


def _digests(references: tuple) -> tuple[str, ...]:
  return tuple(map(metadata.digest, references))


def _pair(text: str, references: tuple, digests: tuple[str, ...], shape: tuple[int, int] | None, config, size: int,
          unit: int) -> Pair:
  like = None if shape is None else np.broadcast_to(np.uint8(0), (*shape, 3))
  height, width = request.shape_like(like, size, unit, config.height, config.width)
  return Pair('', ('t2i', 'edit', 'multi')[min(len(references), 2)], Request(text, references), height, width, digests)
