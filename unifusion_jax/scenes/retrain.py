"""The embedded models anew within a budget of wall-clock time: vision tower, VLM, text to image, edits.

  python -m unifusion_jax.scenes.retrain --minutes=9                  # a GPU; launch/embedded.sh makes the environment
  python -m unifusion_jax.scenes.retrain --minutes=9 --folder=DIR     # the same command again goes on where it stood

Each stage gets a share of the budget, trains by the clock, so that its learning rate falls in its last share, and exports
to FOLDER/STAGE/export, from which the next one starts. What starting and exporting take is kept in reserve. The autoencoder
is the shipped one: the DiT learns its latents.
"""

import dataclasses
import math
import os
import pathlib
import time

from absl import app, flags, logging
import jax

from configs import edit, t2i, vlm
from unifusion_jax import config as configuration
from unifusion_jax import sharding
from unifusion_jax.commands import export, train

SHARES = {'tower': 0.10, 'vlm': 0.42, 't2i': 0.30, 'edit': 0.18}
RESERVE = 0.12  # share of the budget for starts, previews, checkpoints and exports


@dataclasses.dataclass(frozen=True)
class Scale:
  """Settings of a machine: batch sizes of VLM and DiT, loader processes, dtype, and what their learning rates grow by."""
  vlm_batch: int
  dit_batch: int
  noises: int
  workers: int
  dtype: str
  rate: float


def scale_of(platform: str, cores: int) -> Scale:
  """An accelerator takes large batches in bfloat16 and a loader process a core; a CPU the recipes as they are."""
  if platform == 'cpu':
    return Scale(vlm_batch=32, dit_batch=16, noises=4, workers=0, dtype='float32', rate=1.0)
  return Scale(vlm_batch=512, dit_batch=512, noises=8, workers=max(1, cores - 1), dtype='bfloat16', rate=2.0)


def stages(folder: pathlib.Path, minutes: float, scale: Scale) -> dict[str, configuration.Config]:
  """The configuration of each stage, in order."""
  exported = {name: str(folder / name / 'export') for name in SHARES}
  configs = dict(tower=vlm.get_config('tower'), vlm=vlm.get_config(), t2i=t2i.get_config(), edit=edit.get_config())
  configs['vlm'].init = exported['tower']
  configs['edit'].init = exported['t2i']
  for name, config in configs.items():
    dit = name in ('t2i', 'edit')
    config.train = dataclasses.replace(
        config.train, minutes=minutes * (1 - RESERVE) * SHARES[name], steps=1_000_000, log_every=50, save_every=1000,
        preview_every=1_000_000)
    config.optim = dataclasses.replace(config.optim, learning_rate=config.optim.learning_rate * scale.rate, decay=0.4)
    config.data = dataclasses.replace(
        config.data, path='scenes/wide', batch_size=scale.dit_batch if dit else scale.vlm_batch, workers=scale.workers)
    if dit:
      config.vlm = exported['vlm']
      config.model.dtype = scale.dtype
      config.objective.noises_per_example = scale.noises
  return configs


def run(folder: pathlib.Path, minutes: float, scale: Scale) -> None:
  """Trains and exports every stage that has not been exported; interrupted, the next call goes on."""
  for name, config in stages(folder, minutes, scale).items():
    workdir, start = folder / name, time.monotonic()
    if (workdir / 'export').exists():
      continue
    configuration.check(config, jax.device_count())
    with jax.set_mesh(sharding.make_mesh(config.mesh)):
      state = train.run(config, workdir)
      export.run(config, workdir)
    if sharding.is_main_process():
      print(f'{name}: {int(state.step)} steps of {config.data.batch_size} in {time.monotonic() - start:.0f} s')


def main(argv):
  del argv
  jax.config.update('jax_num_cpu_devices', 2 ** int(math.log2(min(len(os.sched_getaffinity(0)), 8))))
  jax.config.update('jax_compilation_cache_dir', os.path.abspath(os.path.join('.cache', 'jax')))
  run(pathlib.Path(_FOLDER.value), _MINUTES.value,
      scale_of(jax.devices()[0].platform, len(os.sched_getaffinity(0))))


_MINUTES = flags.DEFINE_float('minutes', 9.0, 'Wall-clock budget of all stages together.', lower_bound=0.1)
_FOLDER = flags.DEFINE_string('folder', 'runs/embedded', 'Folder of the stages.')

if __name__ == '__main__':
  logging.use_absl_handler()
  app.run(main)
