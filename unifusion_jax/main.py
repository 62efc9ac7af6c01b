"""Entry: flags, configuration, mesh, one job.

  python -m unifusion_jax.main --config=configs/edit.py --mode=train --workdir=runs/edit
"""

import math
import os
import pathlib
import sys

from absl import app, flags, logging
import jax
from ml_collections import config_flags

from unifusion_jax import command_line, jobs, sharding
from unifusion_jax import config as configuration
from unifusion_jax.commands import describe, train
from unifusion_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Recipe, e.g. configs/edit.py or configs/edit.py:8b.')
_MODE = flags.DEFINE_enum('mode', 'train', ['train', 'sample', 'rewrite', 'eval', 'export'], 'What to do.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; default runs/<name of the recipe>.')
_DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'One of several processes that run together, as on the hosts '
                                 'of a TPU pod; jax finds the others by itself on Cloud TPU, Slurm and Kubernetes.')
_CACHE = flags.DEFINE_string('compilation_cache', str(pathlib.Path('.cache') / 'jax'),
                             'Folder that keeps compiled programs between runs; empty for none.')


def start(argv):
  """What holds for the whole process (other processes, devices, compilation cache), then main."""
  if _DISTRIBUTED.value:
    jax.distributed.initialize()
  # Where the CPU is the device, one device a core is up to 1.3 times as fast as one for all cores (docs/training.md).
  jax.config.update('jax_num_cpu_devices', 2 ** int(math.log2(min(len(os.sched_getaffinity(0)), 8))))
  if _CACHE.value:
    jax.config.update('jax_compilation_cache_dir', os.path.abspath(_CACHE.value))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.0)
  main(argv)


def main(argv):
  del argv
  config = _CONFIG.value
  if isinstance(config, describe.DescribeConfig):
    with jax.set_mesh(sharding.make_mesh(config.mesh)):
      return describe.run(config)
  recipe = pathlib.Path(flags.FLAGS['config'].config_filename.split(':')[0]).stem
  workdir = pathlib.Path(_WORKDIR.value or pathlib.Path('runs') / recipe)
  configuration.check(config, jax.device_count())
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    if _MODE.value == 'train':
      train.train(config, workdir, mesh)
      where = dict(images=workdir / 'samples', metrics=workdir / 'metrics.jsonl', checkpoint=workdir / 'checkpoints')
      print('\n'.join(['done.', *(f'  {name}: {path}' for name, path in where.items())]))
    else:
      configuration.check_run(config, workdir)
      job = jobs.build(config)
      run = dict(sample=job.sample, rewrite=job.rewrite, eval=job.evaluate, export=job.export)[_MODE.value]
      run(workdir, mesh)
      configuration.write(config, workdir, f'config_{_MODE.value}.json')


def run():
  """The console entry: bad input ends in one sentence and not in a traceback."""
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)
  flags.mark_flag_as_required('config')
  try:
    app.run(start, flags_parser=command_line.parse)
  except UserError as error:
    if os.environ.get('UNIFUSION_TRACEBACK'):
      raise
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  run()
