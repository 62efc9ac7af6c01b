"""Training of all embedded models within a wall-clock budget: autoencoder, vision tower, VLM, text to image, edits.

  python -m unifusion_jax.scenes.retrain --minutes=9                 # a GPU; launch/embedded.sh makes the environment
  python -m unifusion_jax.scenes.retrain --minutes=9 --folder=DIR    # run again, it resumes

All stages train on the wider world (`data.path=scenes/wide`). Each gets a share of the budget, decays its learning rate
by the clock, and exports to FOLDER/STAGE/export, which later stages start from or read.
"""

import dataclasses
import math
import os
import pathlib
import time

from absl import app, flags, logging
import jax

from configs import edit, t2i, vae, vlm
from unifusion_jax import command_line, errors, sharding
from unifusion_jax import config as configuration
from unifusion_jax.commands import export, train

SHARES = {'vae': 0.08, 'tower': 0.08, 'vlm': 0.40, 't2i': 0.28, 'edit': 0.16}
RESERVE = 0.12  # share of the budget for starts, checkpoints and exports
PROMPT, REWRITE = 150, 52  # one token budget for all tasks: few shapes, so little to compile


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
  """The recipes' own sizes on a CPU; elsewhere large batches in bfloat16, with a loader process for each core."""
  if platform == 'cpu':
    return Scale(32, 32, 16, noises=4, workers=0, tiles=(1,), dtype='float32', rate=1.0)
  return Scale(512, 512, 512, noises=8, workers=max(1, cores - 1), tiles=(1, 4, 9), dtype='bfloat16', rate=2.0)


def stages(folder: pathlib.Path, minutes: float, scale: Scale) -> dict[str, configuration.Config]:
  """The configuration of each stage, in order."""
  exports = {name: str(folder / name / 'export') for name in SHARES}
  configs = dict(vae=vae.get_config(), tower=vlm.get_config('tower'), vlm=vlm.get_config(), t2i=t2i.get_config(),
                 edit=edit.get_config())
  configs['vae'].init = str(configuration.ASSETS / 'vae')
  configs['vlm'].init, configs['edit'].init = exports['tower'], exports['t2i']
  batches = dict(vae=scale.vae_batch, tower=scale.vlm_batch, vlm=scale.vlm_batch, t2i=scale.dit_batch,
                 edit=scale.dit_batch)
  for name, config in configs.items():
    config.train = dataclasses.replace(
        config.train, minutes=minutes * (1 - RESERVE) * SHARES[name], log_every=50, save_every=500, preview_every=0)
    config.optim = dataclasses.replace(
        config.optim, learning_rate=config.optim.learning_rate * scale.rate, warmup=100, decay=0.4)
    tasks = tuple(dataclasses.replace(task, prompt=None, rewrite=None) for task in config.data.tasks)
    config.data = dataclasses.replace(
        config.data, path='scenes/wide', tasks=tasks, max_prompt_tokens=PROMPT, max_rewrite_tokens=REWRITE,
        batch_size=batches[name], workers=scale.workers, tiles=scale.tiles if name in ('tower', 'vlm') else (1,))
    if name in ('vae', 'tower', 'vlm'):
      config.objective.dtype = scale.dtype
    if name in ('t2i', 'edit'):
      config.vlm, config.vae = exports['vlm'], exports['vae']
      config.model.dtype = config.frozen_dtype = scale.dtype
      config.objective.noises_per_example = scale.noises
  return configs


def run(folder: pathlib.Path, minutes: float, scale: Scale) -> None:
  """Trains and exports every stage that is not exported yet; after an interruption the next call goes on."""
  for name, config in stages(folder, minutes, scale).items():
    workdir, start = folder / name, time.monotonic()
    if (workdir / 'config_export.json').exists():  # what an export writes last
      continue
    configuration.check(config, jax.device_count())
    with jax.set_mesh(sharding.make_mesh(config.mesh)):
      state = train.run(config, workdir)
      export.run(config, workdir)
    if sharding.is_main_process():
      print(f'{name}: {int(state.step)} steps of {config.data.batch_size} examples in '
            f'{time.monotonic() - start:.0f} s, of them {60 * config.train.minutes:.0f} s of training')


def main(argv):
  del argv
  jax.config.update('jax_num_cpu_devices', 2 ** int(math.log2(min(len(os.sched_getaffinity(0)), 8))))
  jax.config.update('jax_compilation_cache_dir', os.path.abspath(os.path.join('.cache', 'jax')))
  platform, cores = jax.devices()[0].platform, len(os.sched_getaffinity(0))
  run(pathlib.Path(flags.FLAGS.folder), flags.FLAGS.minutes, scale_of(platform, cores))


if __name__ == '__main__':
  # Defined here, so that programs with flags of the same names may import this module
  flags.DEFINE_float('minutes', 9.0, 'Wall-clock budget of all stages together, in minutes.', lower_bound=0.1)
  flags.DEFINE(command_line.PathParser(), 'folder', 'runs/embedded', 'Folder of all stages.')
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)
  with errors.at_the_terminal():
    app.run(main)
