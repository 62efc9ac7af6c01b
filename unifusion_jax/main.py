"""Entry: flags, configuration, mesh, one job.

  python -m unifusion_jax.main --config=configs/edit.py --mode=train --workdir=runs/edit
"""

import os
import pathlib
import sys

from absl import app
from absl import flags
from absl import logging
import jax
from ml_collections import config_flags

from unifusion_jax import config as configuration
from unifusion_jax import sharding

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Recipe, e.g. configs/edit.py or configs/edit.py:8b.')
_MODE = flags.DEFINE_enum('mode', 'train', ['train', 'sample', 'eval', 'export'], 'What to do.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; default runs/<name of the recipe>.')
_CACHE = flags.DEFINE_string('compilation_cache', str(pathlib.Path('.cache') / 'jax'),
                             'Folder that keeps compiled programs between runs; empty for none.')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'{argv[1]!r} is no flag: settings are given as --config.a.b=value')
  if _CACHE.value:
    jax.config.update('jax_compilation_cache_dir', os.path.abspath(_CACHE.value))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.0)
  config: configuration.Config = _CONFIG.value
  recipe = pathlib.Path(flags.FLAGS['config'].config_filename.split(':')[0]).stem
  workdir = pathlib.Path(_WORKDIR.value or pathlib.Path('runs') / recipe)
  configuration.check(config, jax.device_count())
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    if _MODE.value == 'train':
      from unifusion_jax import train
      train.train(config, workdir, mesh)
      where = dict(pictures=workdir / 'samples', metrics=workdir / 'metrics.jsonl', checkpoint=workdir / 'checkpoints')
      print('\n'.join(['done.', *(f'  {name}: {path}' for name, path in where.items())]))
    else:
      from unifusion_jax import jobs
      job = jobs.build(config)
      run = dict(sample=job.sample, eval=job.evaluate, export=job.export)[_MODE.value]
      run(workdir, mesh)


def run():
  """The console entry: bad input ends in one sentence and not in a traceback."""
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)
  flags.mark_flag_as_required('config')
  try:
    app.run(main, flags_parser=_parse)
  except (ValueError, FileNotFoundError) as error:
    if os.environ.get('UNIFUSION_TRACEBACK'):
      raise
    sys.exit(f'error: {error}')


def _parse(argv):
  """Parses flags; an unknown field of the configuration is answered with those that exist."""
  try:
    return flags.FLAGS(argv)
  except (flags.Error, KeyError, TypeError, AttributeError, ValueError) as error:
    sys.exit(f'error: {error.args[0] if error.args else error}\nSettings are --config.a.b=value; configs/ and '
             'unifusion_jax/config.py list them. --helpfull lists the flags.')


if __name__ == '__main__':
  run()
