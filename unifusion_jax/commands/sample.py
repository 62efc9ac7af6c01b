"""Sampling from the command line: images of the configuration's requests, and a grid of them. Also previews."""

import json
import pathlib

import numpy as np

from unifusion_jax import pipeline, sharding
from unifusion_jax.data import imaging
from unifusion_jax.errors import UserError
from unifusion_jax.request import Request, requests_for, requests_of, SampleConfig, shape_like
from unifusion_jax.training import checkpoint, record


def run(config, workdir: pathlib.Path) -> None:
  """Samples the requests of `config.sample` with the workdir's run, or the weights that the configuration names."""
  if not hasattr(config.objective, 'pipeline'):
    raise UserError('this recipe trains a part of a model, which samples no images: sample with configs/t2i.py or '
                    'configs/edit.py, or measure it with --mode=eval')
  record.check_same_model(config, workdir)
  wanted, height, width = requests(config.sample, config.data.size)  # before anything slow is loaded
  params, weights = checkpoint.trained(config, workdir)
  pipe = config.objective.pipeline(config, params, config.objective.frozen(config))
  run_requests(pipe, wanted, height, width, workdir / 'images', weights=weights, vlm=config.hub.get('vlm', config.vlm))
  record.write(config, workdir, 'config_sample.json')


def requests(settings: SampleConfig, size: int) -> tuple[list[Request], int, int]:
  """Requests of `config.sample`, and their height and width: `num_images` for each line of the prompt.

  Raises:
    UserError: when there is nothing to do, or an image cannot be read.
  """
  text = settings.prompt
  if text.startswith('@'):
    path = pathlib.Path(text[1:])
    if not path.is_file():
      raise UserError(f'sample.prompt={text}: there is no file {path}, and @ names one that holds a request a line')
    text = path.read_text()
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  if not lines and settings.rewrite is not None:
    lines = [settings.rewrite]
  if not lines:
    raise UserError('nothing to sample: give --config.sample.prompt="..." (one request a line, or @file.txt)')
  references = tuple(imaging.read(path) for path in settings.references)
  height, width = shape_like(references[0] if references else None, size, settings.height, settings.width)
  return (requests_for(lines, references, settings.num_images, settings.seed, settings.rewrite), height, width)


def run_requests(pipe: pipeline.UniFusionPipeline, requests: list[Request], height: int, width: int,
                 folder: pathlib.Path, **models: str) -> None:
  """Samples the requests, `batch_size` of the pipeline's settings at a time.

  Writes each image at once as a PNG with its metadata (`models` too), numbered after those in the folder, and a grid at
  the end.
  """
  number = 1 + max((int(path.stem) for path in folder.glob('*.png') if path.stem.isdigit()), default=-1)
  size = min(pipe.settings.batch_size, len(requests))
  rows, captions = [], []
  for part, padded in sharding.batched(requests, size):
    for request, sample in zip(part, pipe.generate(padded, height, width)):
      rows.append([*request.references, sample.image])
      captions.append([''] * (len(request.references) - 1) + ([request.instruction] if request.references else [])
                      + [sample.rewrite])
      if sharding.is_main_process():
        metadata = pipe.metadata(request, sample, pipe.settings)
        settings = metadata['settings'] | dict(references=pipe.settings.references) | models
        path = folder / f'{number:03d}.png'
        imaging.write_png(path, sample.image, metadata | dict(seed=str(request.seed), settings=json.dumps(settings)))
        print(f'{path}\n  prompt:  {request.instruction}\n  rewrite: {sample.rewrite}'
              + (f'\n  warning: {sample.warning}' if sample.warning else '')
              + (f'\n  remark:  {sample.remark}' if sample.remark else ''))
      number += 1
  if sharding.is_main_process():
    imaging.write_png(folder / 'grid.png', imaging.grid(rows, captions))
    print(f'{folder / "grid.png"}')


def preview_grid(pipe: pipeline.UniFusionPipeline, records: list[dict]) -> np.ndarray:
  """Preview grid of records: references, request, sample with its rewrite, target; uint8 [y x 3]."""
  requests = requests_of(records)
  samples = pipe.generate(requests, *records[0]['target'].shape[:2])
  rows = [[*(imaging.read(image) for image in r['references']), sample.image, imaging.read(r['target'])]
          for r, sample in zip(records, samples)]
  captions = [([''] * (len(r['references']) - 1) + [request.instruction] if r['references'] else [])
              + [sample.rewrite, r['caption'] if r['references'] else request.instruction]
              for r, request, sample in zip(records, requests, samples)]
  return imaging.grid(rows, captions, cell=192)
