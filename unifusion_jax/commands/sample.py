"""Requests from the command line or from a source, and their answers as files and sheets."""

import json
import pathlib

import numpy as np

from unifusion_jax import pipeline, sharding
from unifusion_jax.data import imaging
from unifusion_jax.errors import BrokenRecord, UserError


def from_config(settings, size: int) -> list[tuple[pipeline.Request, int, int]]:
  """What `config.sample` asks for: (request, height, width), `num_images` for each line of the prompt.

  Raises:
    ValueError: when there is nothing to do, or an image cannot be read.
  """
  text = settings.prompt
  if text.startswith('@'):
    text = pathlib.Path(text[1:]).read_text()
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  if not lines and settings.rewrite is not None:
    lines = [settings.rewrite]
  if not lines:
    raise UserError('nothing to draw: give --config.sample.prompt="..." (one request a line, or @file.txt)')
  references = tuple(imaging.read(path) for path in settings.references)
  height, width = settings.height, settings.width
  if not height or not width:
    height, width = _shape_like(references[0] if references else None, size, height, width)
  if settings.stitch and references:
    references = (imaging.stitch(references),)
  made = []
  for i, line in enumerate(lines):
    for j in range(settings.num_images):
      seed = settings.seed + i * settings.num_images + j
      made.append((pipeline.Request(line, references, seed, settings.rewrite), height, width))
  return made


def _shape_like(reference, size: int, height: int, width: int) -> tuple[int, int]:
  """About size^2 pixels in the reference's proportions, each side a multiple of 16; a side that is given stays."""
  ratio = 1.0 if reference is None else reference.shape[1] / reference.shape[0]
  if height or width:
    wanted = (height, height * ratio) if height else (width / ratio, width)
  else:
    wanted = (size / ratio ** 0.5, size * ratio ** 0.5)
  rounded = [max(16, round(side / 16) * 16) for side in wanted]
  return height or rounded[0], width or rounded[1]


def answer(sampler: pipeline.Sampler, asked, settings, folder: pathlib.Path, **models: str) -> None:
  """Draws everything asked for, `settings.batch_size` at a time.

  Writes a PNG for each image as soon as it is there, with what made it (`models` too) in its metadata, numbered on from
  those that are there; and a grid at the end.
  """
  requests = [request for request, _, _ in asked]
  _, height, width = asked[0]
  told = ('references', 'steps', 'guidance', 'method', 'eta', 'shift', 'verifi', 'system', 'temperature', 'top_p', 'tiles',
          'images', 'stitch')
  told = {name: getattr(settings, name) for name in told} | dict(width=width, height=height, **models)
  told = json.dumps(told | dict(system=settings.system or sampler.layout.system))
  first = 1 + max((int(path.stem) for path in folder.glob('*.png') if path.stem.isdigit()), default=-1)
  rows, captions = [], []
  for start in range(0, len(requests), settings.batch_size):
    part = requests[start:start + settings.batch_size]
    # The last batch is filled up to the shape of those before it
    filled = part + part[-1:] * (min(len(requests), settings.batch_size) - len(part))
    results = sampler(filled, height, width)
    for i, (request, result) in enumerate(zip(part, results), start):
      rows.append([*request.references, result.image])
      captions.append([''] * (len(request.references) - 1) + ([request.instruction] if request.references else [])
                      + [result.rewrite])
      if sharding.is_main_process():
        path = folder / f'{first + i:03d}.png'
        imaging.write_png(path, result.image, dict(prompt=request.instruction, written=result.rewrite,
                                                    warning=result.warning, seed=str(request.seed), settings=told))
        print(f'{path}\n  asked:   {request.instruction}\n  written: {result.rewrite}'
              + (f'\n  warning:  {result.warning}' if result.warning else ''))
  if sharding.is_main_process():
    imaging.write_png(folder / 'grid.png', imaging.grid(rows, captions))
    print(f'{folder / "grid.png"}')


def same_shape(source, count: int, wanted=lambda record: True) -> list[dict]:
  """The first `count` records of a source that are whole, share the first one's shape and are wanted."""
  records, shape = [], None
  for i in range(len(source)):
    bucket = source.bucket(i)
    if bucket is None or shape not in (None, bucket):
      continue
    try:
      record = source[i]
    except BrokenRecord:
      continue
    if wanted(record):
      shape = bucket
      records.append(record)
    if len(records) == count:
      break
  return records


def sheet(sampler: pipeline.Sampler, records: list[dict]) -> np.ndarray:
  """An image of what the model makes of records: references, result (with what was written), target."""
  height, width = records[0]['target'].shape[:2]
  requests = [pipeline.Request(r['instruction'] or r['caption'], tuple(r['references']), i) for i, r in enumerate(records)]
  results = sampler(requests, height, width)
  rows = [[*(imaging.read(p) for p in r['references']), result.image, imaging.read(r['target'])]
          for r, result in zip(records, results)]
  captions = [([''] * (len(r['references']) - 1) + [request.instruction] if r['references'] else [])
              + [result.rewrite, r['caption'] if r['references'] else request.instruction]
              for r, request, result in zip(records, requests, results)]
  return imaging.grid(rows, captions, cell=192)
