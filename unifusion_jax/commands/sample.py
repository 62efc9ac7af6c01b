"""Sampling from the command line: images of the configuration's requests, and grids of them. Also previews."""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
import sys
from typing import NamedTuple

import numpy as np

from unifusion_jax import bucket, errors, metadata, parts, pipeline, prompting, sharding
from unifusion_jax.data import imaging, transforms
from unifusion_jax.demo.settings import DemoConfig
from unifusion_jax.errors import UserError
from unifusion_jax.evaluation.records import sheet
from unifusion_jax.fields import Path
from unifusion_jax.planning.settings import PlanConfig
from unifusion_jax.request import prompt_lines, Request, requests_for, requests_of, SampleConfig, shape_like
from unifusion_jax.sharding import MeshConfig
from unifusion_jax.training import checkpoint, record
from unifusion_jax.weights import encoders

CELL = 256  # pixels of an image in a grid
PAGE = 64   # requests in a grid


@dataclasses.dataclass
class PipelineConfig:
  """A whole pipeline to sample with (configs/sample.py)."""
  weights: Path = 'tiny'            # folder or hub id, sampled as the recipe's scale says
  transformer: Path | None = None   # folder, hub id or .safetensors file instead of the pipeline's own
  vlm: Path | None = None           # folder or hub id instead of the pipeline's own
  vae: Path | None = None
  dtype: str = 'bfloat16'
  vlm_quantized: str = ''           # 'int8': int8 weights; 'w8a8': int8 activations as well
  transformer_quantized: str = ''   # the same for LAP, refiner and DiT
  vlm_cache: Path | None = None     # folder that keeps the converted VLM for the next start
  in_turn: bool = False             # VLM and transformer are loaded in turn, where memory does not hold both
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
  plan: PlanConfig = dataclasses.field(default_factory=PlanConfig)
  demo: DemoConfig = dataclasses.field(default_factory=DemoConfig)

  mode = 'sample'

  def problems(self, devices: int) -> list[str]:
    """Settings that cannot work, a sentence each."""
    del devices
    wrong = self.mesh.problems() + self.sample.problems() + self.plan.problems() + self.demo.problems()
    if self.dtype not in ('float32', 'bfloat16'):
      wrong.append(f"dtype={self.dtype!r} must be 'bfloat16' or 'float32'")
    return wrong + [f'{name}={getattr(self, name)!r} must be one of {", ".join(map(repr, encoders.QUANTIZED))}'
                    for name in ('vlm_quantized', 'transformer_quantized')
                    if getattr(self, name) not in encoders.QUANTIZED]


class Prepared(NamedTuple):
  """Requests of a configuration, checked before anything slow is loaded: `load()` gives the pipeline.

  taps: of this pipeline.
  """
  load: Callable[[], pipeline.UniFusionPipeline]
  taps: tuple[int, ...]
  requests: list[Request]
  height: int
  width: int


def run(config, workdir: pathlib.Path) -> None:
  """Samples the requests of `config.sample`.

  A PipelineConfig names the pipeline; a config.Config samples with the workdir's run, or the weights that it names.
  """
  prepared = prepare(config, workdir, workdir / 'images')
  run_requests(prepared.load(), prepared.requests, prepared.height, prepared.width, workdir / 'images')
  if not isinstance(config, PipelineConfig):
    record.write(config, workdir, 'config_sample.json')


def prepare(config, workdir: pathlib.Path, folder: pathlib.Path) -> Prepared:
  """The requests of `config.sample` and how to load their pipeline; UserError for requests that cannot be.

  folder: where images will be written.
  """
  if isinstance(config, PipelineConfig):
    located = locate(config)
    wanted, height, width = requests(config.sample, located.described.size, located.unit)
    _check(located.prompt_encoder, wanted, config.sample, located.max_positions, folder)
    return Prepared(lambda: load(config, workdir, located), located.described.taps, wanted, height, width)
  _check_samples(config, workdir)
  wanted, height, width = requests(config.sample, config.data.size, config.objective.unit(config))
  _check(transforms.prompt_encoder(config), wanted, config.objective.sample_settings(config),
         encoders.config(config.vlm).text.max_positions, folder)  # pyrefly: ignore[missing-attribute]
  return Prepared(lambda: load(config, workdir), config.taps, wanted, height, width)


def load(config, workdir: pathlib.Path, located: parts.Parts | None = None) -> pipeline.UniFusionPipeline:
  """The pipeline of a PipelineConfig, whose parts may be `located` already, or of a config.Config as of `run`."""
  if isinstance(config, PipelineConfig):
    return pipeline.UniFusionPipeline.load(
        located or locate(config), dtype=config.dtype, quantized=config.vlm_quantized,
        transformer_quantized=config.transformer_quantized, cache=config.vlm_cache, settings=config.sample,
        loras=config.sample.loras, in_turn=config.in_turn)
  _check_samples(config, workdir)
  params, weights = checkpoint.trained(config, workdir)
  pipe = config.objective.pipeline(config, params, config.objective.frozen(config))
  vlm, vae = (config.hub.get(name, getattr(config, name)) for name in ('vlm', 'vae'))
  pipe.origin = metadata.origin(weights, vlm, vae, config.model.dtype, config.frozen_dtype, config.vlm_quantized)
  pipe.add_loras(config.sample.loras)
  return pipe


def locate(config: PipelineConfig) -> parts.Parts:
  """The parts of a PipelineConfig, none of them loaded; UserError for sides of images that they cannot have."""
  located = parts.locate(config.weights, transformer=config.transformer, vlm=config.vlm, vae=config.vae)
  if wrong := config.sample.problems(located.unit):
    raise UserError('; '.join(wrong))
  return located


def _check_samples(config, workdir: pathlib.Path) -> None:
  """UserError for a recipe whose model samples no images, and for a workdir with another model's run."""
  if not hasattr(config.objective, 'pipeline'):
    raise UserError('this recipe trains a part of a model, which samples no images: sample with configs/t2i.py or '
                    'configs/edit.py, or measure it with --mode=eval')
  record.check_same_model(config, workdir)


def _check(encoder: transforms.PromptEncoder, wanted: list[Request], settings: SampleConfig, max_positions: int,
           folder: pathlib.Path) -> None:
  prompting.check(encoder, wanted, settings, max_positions)
  with sharding.together('write images'):
    if sharding.is_main_process():
      imaging.check_writable(folder)


def requests(settings: SampleConfig, size: int, unit: int) -> tuple[list[Request], int, int]:
  """Requests of `config.sample`, and their height and width: `num_images` for each line of the prompt.

  Raises:
    UserError: when there is nothing to do, or a file cannot be read.
  """
  lines = prompt_lines(settings.prompt)
  if not lines and settings.rewrite is not None:
    lines = {'sample.rewrite': settings.rewrite}
  if not lines:
    raise UserError('nothing to sample: give --config.sample.prompt="..." (one request a line, or @file.txt)')
  references = tuple(imaging.read(path) for path in settings.references)
  height, width = shape_like(references[0] if references else None, size, unit, settings.height, settings.width)
  return (requests_for(lines, references, settings.num_images, settings.seed, settings.rewrite, settings.references),
          height, width)


def run_requests(pipe: pipeline.UniFusionPipeline, requests: list[Request], height: int, width: int,
                 folder: pathlib.Path) -> None:
  """Samples the requests, `batch_size` of the pipeline's settings at a time.

  Writes each image at once as a PNG with its metadata, numbered after those in the folder, and grids of PAGE requests:
  grid.png, or if there are several, grid-NUMBER.png with the number of its first image.

  Raises:
    UserError: what stops it, after a line that says how far it came.
  """
  number = 1 + max((int(path.stem) for path in folder.glob('*.png') if path.stem.isdecimal()), default=-1)
  settings = pipe.settings.changed(batch_size=min(pipe.settings.batch_size, len(requests)))
  yellow = functools.partial(errors.coloured, colour=errors.YELLOW, stream=sys.stdout)
  page, first, done = [], '', 0  # what a grid shows, the number of its first image, and all images so far
  try:
    for part, samples in pipe.batches(requests, height, width, settings=settings):
      problem = None
      try:
        for request, sample in zip(part, samples if sharding.is_main_process() else ()):
          text = metadata.as_text(pipe.metadata(request, sample, settings))
          path = imaging.write_new_png(folder, number, sample.image, text)
          number, done = 1 + int(path.stem), done + 1
          print(f'{bucket.address(path)}\n  prompt:  {request.instruction}\n  rewrite: {sample.rewrite}'
                + (f'\n  {yellow("warning:")} {sample.warning}' if sample.warning else '')
                + (f'\n  {yellow("remark:")}  {sample.remark}' if sample.remark else ''))
          first = first or path.stem
          page.append(_row(request, sample))
          if len(page) == PAGE or done == len(requests):
            path = folder / ('grid.png' if len(requests) <= PAGE else f'grid-{first}.png')
            imaging.write_png(path, imaging.wrapped_grid(*zip(*page), CELL))
            print(bucket.address(path))
            page, first = [], ''
      except UserError as error:
        problem = error
      if sharding.from_main_process(np.array([problem is not None], np.uint8))[0]:
        raise problem or UserError('the first process could not write an image, and says why: all stop')
  except BaseException:
    if 0 < done < len(requests):
      print(f'stopped after {done} of {len(requests)} images; the next was to be of {requests[done].place}, with '
            f'sample.seed={requests[done].seed}', file=sys.stderr)
    raise


def _row(request: Request, sample: pipeline.Sample) -> tuple[list, list]:
  """References and image at the size of a grid's cells, and the captions under them."""
  images = [imaging.shrunk(imaging.read(image), CELL) for image in (*request.references, sample.image)]
  captions = [''] * (len(request.references) - 1) + [request.instruction] * bool(request.references) + [sample.rewrite]
  return images, captions


def preview_grid(pipe: pipeline.UniFusionPipeline, records: list[dict]) -> np.ndarray:
  """Preview grid of records: references, request, sample with its rewrite, target; uint8 [y x 3]."""
  samples = pipe.generate(requests_of(records), *records[0]['target'].shape[:2])
  return sheet(records, samples)
