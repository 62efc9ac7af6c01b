"""Training of all embedded models within a wall-clock budget: autoencoder, vision tower, VLM, text to image, edits.

  python -m unifusion_jax.scenes.retrain --minutes=9                  # a GPU; launch/embedded.sh makes the environment
  python -m unifusion_jax.scenes.retrain --minutes=9 --from_shipped=vlm,t2i,edit   # these on from the shipped weights
  python -m unifusion_jax.scenes.retrain --minutes=9 --folder=DIR     # run again, it resumes

All stages train on the wider world (`data.path=scenes/wide`), but DiTs that go on from shipped ones on `scenes`, which
these know. Each gets a share of the budget, decays its learning rate by the clock, and exports to FOLDER/STAGE/export,
which later stages start from or read. With many cores the programs of later stages are compiled while an earlier one
trains, by processes of their own, into jax's cache.
"""

from collections.abc import Sequence
from concurrent import futures
import contextlib
import dataclasses
import math
import os
import pathlib
import subprocess
import sys
import time

from absl import app, flags, logging
import jax
import numpy as np

from configs import edit, t2i, vae, vlm
from unifusion_jax import command_line, errors, sharding
from unifusion_jax import config as configuration
from unifusion_jax.commands import export, train
from unifusion_jax.data import loader
from unifusion_jax.data.config import Task
from unifusion_jax.training import step

SHARES = {'vae': 0.08, 'tower': 0.08, 'vlm': 0.40, 't2i': 0.28, 'edit': 0.16}  # of the budget, all from random weights
# From the shipped weights, shared out among the stages that are trained. The autoencoder stays, whose latents the DiT
# knows, and the VLM has its tower.
SHARES_ON = {'vlm': 0.44, 't2i': 0.33, 'edit': 0.23}
RESERVE = 0.12  # share of the budget for starts, checkpoints and exports
PROMPT, REWRITE = 150, 52  # one token budget for all tasks: few shapes, so little to compile
MANY_CORES = 8  # from here on processes beside the training compile ahead
# Weights of the tasks for models that begin with the shipped weights: more of what these are weak in.
MORE = {
    'vlm': {'edit/1-2': 0.06, 'edit/3-4': 0.14, 'caption/1-2': 0.02, 'caption/3-4': 0.02, 'question/1-2': 0.04,
            'question/3-4': 0.08, 'rewrite/1-2': 0.05, 'rewrite/3-4': 0.09, 'multi': 0.50},
    't2i': {'t2i/1-2': 0.45, 't2i/3-4': 0.45, 'reconstruct': 0.10}}


@dataclasses.dataclass(frozen=True)
class Scale:
  """Settings that depend on the machine; `tiles` are the VLM's, `dtype` the DiT's, `rate` scales all learning rates."""
  vae_batch: int
  vlm_batch: int
  dit_batch: int
  noises: int
  workers: int
  tiles: tuple[int, ...]
  dtype: str
  rate: float


def scale_of(platform: str, cores: int) -> Scale:
  """The recipes' own sizes on a CPU; elsewhere larger batches in bfloat16, with a loader process for each core."""
  if platform == 'cpu':
    return Scale(32, 32, 16, noises=4, workers=0, tiles=(1,), dtype='float32', rate=1.0)
  return Scale(256, 256, 256, noises=8, workers=max(1, cores - 1), tiles=(1,), dtype='bfloat16', rate=1.5)


def stages(folder: pathlib.Path, minutes: float, scale: Scale, from_shipped: Sequence[str]
           ) -> dict[str, configuration.Config]:
  """The configuration of each stage, in order.

  from_shipped: stages of SHARES_ON, which are trained alone and begin with the shipped weights, but edits with those of
    text to image where that is one of them. Empty: all, from random weights.
  """
  weights = {name: weight for name, weight in SHARES_ON.items() if name in from_shipped} or SHARES
  shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
  shipped = {name: str(configuration.ASSETS / name) for name in ('vae', 'vlm', 't2i', 'edit')}
  exports = shipped | {name: str(folder / name / 'export') for name in shares}
  configs = dict(vae=vae.get_config(), tower=vlm.get_config('tower'), vlm=vlm.get_config(), t2i=t2i.get_config(),
                 edit=edit.get_config())
  configs = {name: configs[name] for name in shares}
  for name, config in configs.items():
    config.init = shipped[name] if from_shipped or name == 'vae' else None
  if 't2i' in configs and 'edit' in configs:
    configs['edit'].init = exports['t2i']
  if not from_shipped:
    configs['vlm'].init = exports['tower']
  batches = dict(vae=scale.vae_batch, tower=scale.vlm_batch, vlm=scale.vlm_batch, t2i=scale.dit_batch,
                 edit=scale.dit_batch)
  for name, config in configs.items():
    is_dit = name in ('t2i', 'edit')
    config.train = dataclasses.replace(
        config.train, minutes=minutes * (1 - RESERVE) * shares[name], log_every=50, save_every=500, preview_every=0)
    config.optim = dataclasses.replace(
        config.optim, learning_rate=config.optim.learning_rate * scale.rate, warmup=100, decay=0.5)
    tasks = tuple(dataclasses.replace(task, prompt=None, rewrite=None) for task in config.data.tasks)
    if from_shipped and name in MORE:
      tasks = tuple(Task(task, weight) for task, weight in MORE[name].items())
    config.data = dataclasses.replace(
        config.data, path='scenes' if is_dit and from_shipped else 'scenes/wide', tasks=tasks,
        max_prompt_tokens=PROMPT, max_rewrite_tokens=REWRITE, batch_size=batches[name], workers=scale.workers,
        tiles=scale.tiles if name in ('tower', 'vlm') else (1,))
    if name in ('tower', 'vlm'):
      config.objective.dtype = scale.dtype
    if is_dit:
      config.vlm, config.vae = exports['vlm'], exports['vae']
      config.model.dtype = config.frozen_dtype = scale.dtype
      config.objective.noises_per_example = scale.noises
      config.objective.repa_weight *= not from_shipped
  return configs


def compile_ahead(config: configuration.Config) -> int:
  """Compiles the train step of every shape of batch, so that jax's cache has it for the training: their number.

  The mesh must be in context. In the place of weights that earlier stages have yet to write are the shipped ones, of
  the same shapes.
  """
  objective, tx = config.objective, step.optimizer(config.optim, config.train.steps)
  frozen = objective.frozen(config)
  state = jax.jit(lambda params: step.init(params, tx), donate_argnums=0)(objective.init(config))
  train_step = step.make_train_step(objective.loss, tx, config.optim)
  with futures.ThreadPoolExecutor() as pool:
    compiled = [pool.submit(train_step.lower(state, frozen, sharding.shard_batch(batch, jax.sharding.get_mesh()),
                                             jax.random.key(config.seed), np.float32(0)).compile)
                for batch in shapes(config)]
    for program in compiled:
      program.result()
  return len(compiled)


def shapes(config: configuration.Config) -> list[dict[str, np.ndarray]]:
  """A batch of each shape that the training meets: copies of one example."""
  transform, found = config.objective.transform(config), {}
  for source, _ in loader.mix(config.data, seed=config.seed):
    for bucket, (_, indices) in source.buckets().items():
      example = dict(transform(source[int(indices[0])], np.random.default_rng(0)), number=np.uint32(0))
      batch = {key: np.stack([value] * config.data.batch_size) for key, value in example.items()}
      found.setdefault(tuple((key, value.shape, value.dtype) for key, value in sorted(batch.items())), batch)
  return list(found.values())


class Compilers:
  """Processes that compile the programs of stages to come."""

  def __init__(self):
    self._processes: dict[str, subprocess.Popen] = {}

  def start(self, name: str, config: configuration.Config) -> None:
    """Starts the stage's process, once its autoencoder is there: the scale of latents is a constant of the programs."""
    if name not in self._processes and pathlib.Path(config.vae, 'config.json').exists():
      self._processes[name] = subprocess.Popen(
          [sys.executable, '-m', 'unifusion_jax.scenes.retrain', *sys.argv[1:], f'--compile={name}'],
          env=dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE='false'))

  def wait(self, name: str) -> None:
    if name in self._processes:
      self._processes[name].wait()

  def close(self) -> None:
    for process in self._processes.values():
      process.terminate()


def run(folder: pathlib.Path, minutes: float, scale: Scale, from_shipped: Sequence[str]) -> None:
  """Trains and exports every stage that is not exported yet; after an interruption the next call goes on."""
  left = {name: config for name, config in stages(folder, minutes, scale, from_shipped).items()
          if not (folder / name / 'config_export.json').exists()}  # what an export writes last
  with contextlib.closing(Compilers()) as compilers:
    for number, (name, config) in enumerate(left.items(), 1):
      configuration.check(config, jax.device_count())
      start = time.monotonic()
      compilers.wait(name)
      for later in list(left)[number:] if len(os.sched_getaffinity(0)) >= MANY_CORES else ():
        compilers.start(later, left[later])
      began = time.monotonic()
      with jax.set_mesh(sharding.make_mesh(config.mesh)):
        state = train.run(config, folder / name)
        export.run(config, folder / name)
      if sharding.is_main_process():
        print(f'{name}: {int(state.step)} steps of {config.data.batch_size} examples, '
              f'{60 * config.train.minutes:.0f} s of {time.monotonic() - began:.0f} s being training, after '
              f'{began - start:.0f} s of waiting for the compiler', flush=True)


def main(argv):
  del argv
  cores = len(os.sched_getaffinity(0))
  jax.config.update('jax_num_cpu_devices', 2 ** int(math.log2(min(cores, 8))))
  jax.config.update('jax_compilation_cache_dir', os.path.abspath(os.path.join('.cache', 'jax')))
  folder, from_shipped, only = pathlib.Path(flags.FLAGS.folder), flags.FLAGS.from_shipped, flags.FLAGS.compile
  scale = scale_of(jax.devices()[0].platform, cores)
  if not only:
    return run(folder, flags.FLAGS.minutes, scale, from_shipped)
  config, start = stages(folder, flags.FLAGS.minutes, scale, from_shipped)[only], time.monotonic()
  config.init = config.init and str(configuration.ASSETS / {'edit': 't2i'}.get(only, only))
  config.vlm = str(configuration.ASSETS / 'vlm')
  with jax.set_mesh(sharding.make_mesh(config.mesh)):
    print(f'{only}: {compile_ahead(config)} programs compiled in {time.monotonic() - start:.0f} s', flush=True)


if __name__ == '__main__':
  # Defined here, so that programs with flags of the same names may import this module
  flags.DEFINE_float('minutes', 9.0, 'Wall-clock budget of all stages together, in minutes.', lower_bound=0.1)
  flags.DEFINE(command_line.PathParser(), 'folder', 'runs/embedded', 'Folder of all stages.')
  flags.DEFINE_list('from_shipped', [], 'Train these of vlm, t2i and edit alone, on from the shipped weights; without '
                    'it all stages are trained, from random weights.')
  flags.register_validator('from_shipped', lambda names: set(names) <= set(SHARES_ON),
                           f'some of {", ".join(SHARES_ON)}, as --from_shipped=t2i,edit')
  flags.DEFINE_string('compile', '', 'Compile the programs of this stage and end; for the processes that do so.')
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)
  with errors.at_the_terminal():
    app.run(main)
