"""UniFusion from the command line: a recipe, its settings, one command.

  python -m unifusion_jax.main --config=configs/edit.py --mode=train --workdir=runs/edit
  unifusion --config=edit --workdir=runs/edit --config.train.steps=1000
  unifusion --mode=info runs/edit
"""

import contextlib
import importlib
import math
import os
import pathlib
import re
import sys
import tempfile

from absl import app, flags, logging
import jax

from unifusion_jax import bucket, command_line, errors, processes, sharding
from unifusion_jax import config as configuration
from unifusion_jax.errors import UserError
from unifusion_jax.planning import compiler, executables
from unifusion_jax.training import record

# The module of commands/ for each --mode, imported only when it runs: each has heavy imports of its own.
COMMANDS = {'train': 'train', 'sample': 'sample', 'rewrite': 'rewrite', 'eval': 'evaluate', 'export': 'export',
            'describe': 'describe', 'plan': 'plan', 'demo': 'demo', 'benchmark': 'benchmark', 'compare': 'compare',
            'inspect': 'inspect', 'info': 'info'}

# Recipes of the modes that take no other
RECIPES = {name: f'configs/{name}.py' for name in ('describe', 'benchmark', 'compare')}

SAMPLED = ('plan', 'demo')  # modes with a group of settings in recipes that sample, as in those that train

GRACE = 60  # seconds for the devices of all processes, once these have found each other

command_line.define()
_MODE = flags.DEFINE_enum('mode', None, COMMANDS, 'What to do; default train, with configs/describe.py describe, with '
                          'configs/{sample,benchmark,compare,inspect}.py the mode of that name. --mode=demo alone is a '
                          'page of the embedded model; --mode=info CHECKPOINT needs no recipe.')
_WORKDIR = flags.DEFINE(command_line.PathParser(), 'workdir', None,
                        'Folder of the run, here or gs://BUCKET/FOLDER; default runs/RECIPE, with a scale '
                        'runs/RECIPE_SCALE.')
_DISTRIBUTED = flags.DEFINE_bool(
    'distributed', False, 'One of several processes that run together, as on the hosts of a TPU pod; jax finds the '
    'others by itself on Cloud TPU, GKE, Slurm and Open MPI.')
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, a free port there, where jax does not '
                                   'find the processes by itself; with --processes and --process.')
_PROCESSES = flags.DEFINE_integer('processes', None, 'Number of processes that run together.', lower_bound=1)
_PROCESS = flags.DEFINE_integer('process', None, 'Number of this one among them, from 0.', lower_bound=0)
_START_TIMEOUT = flags.DEFINE_integer('start_timeout', 300, 'Seconds in which all processes and their devices must be '
                                      'there.', lower_bound=1)
_HEARTBEAT = flags.DEFINE_integer('heartbeat_timeout', 30, 'Seconds without a sign of life after which a process is '
                                  'taken for lost, and the others end.', lower_bound=1)
_TOPOLOGY = flags.DEFINE_string('topology', None, 'Devices that --mode=plan compiles for, as v6e:8x8, v5p:4x4x8 or '
                                'h100:8; none need be here.')
_PROGRAMS = flags.DEFINE_list('programs', None, 'What --mode=plan compiles, of train, encode, condition, denoise, '
                              'decode, rewrite; default train, of a recipe that samples what it needs of the rest.')
_SAVE = flags.DEFINE_bool('save', False, 'Write the train step that --mode=plan compiles, so that a start on that '
                          'topology loads it.')
_CACHE = flags.DEFINE(command_line.PathParser(), 'compilation_cache', str(pathlib.Path('.cache') / 'jax'),
                      'Folder, here or gs://BUCKET/FOLDER, that keeps compiled programs between runs; empty for none.')


def start(argv):
  """Sets up the process (devices, compilation cache, the other processes), then runs main."""
  if _MODE.value == 'info':
    jax.config.update('jax_platforms', 'cpu')  # a run beside it may have the accelerators
    _info(argv[1:])
    return
  if 'JAX_NUM_CPU_DEVICES' not in os.environ:
    # Where the CPU is the device, one a core is up to 1.3 times as fast as one for all cores (docs/training.md).
    jax.config.update('jax_num_cpu_devices', 2 ** int(math.log2(min(len(os.sched_getaffinity(0)), 8))))
  jax.config.update('jax_hlo_source_file_canonicalization_regex', executables.SOURCES)
  if _CACHE.value:
    in_bucket = bucket.is_address(_CACHE.value)
    jax.config.update('jax_compilation_cache_dir', _CACHE.value if in_bucket else os.path.abspath(_CACHE.value))
    if in_bucket:
      jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')  # XLA itself reads and writes no buckets
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.0)
  if not (_DISTRIBUTED.value or {_COORDINATOR.value, _PROCESSES.value, _PROCESS.value} != {None}):
    if others := processes.expected():
      raise UserError(f'{others}, and each would run for itself: give --distributed to each, or start one alone')
    main(argv)
    return
  with processes.companion(_START_TIMEOUT.value + GRACE) as companion, errors.at_the_terminal():
    processes.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, seconds=_START_TIMEOUT.value,
                   heartbeat=_HEARTBEAT.value)
    companion.ready()
    main(argv)


def main(argv):
  """Runs the command on the recipe's mesh."""
  del argv
  with sharding.together('start'):
    named = flags.FLAGS.config or (str(command_line.PACKAGED / 'sample.py') if _MODE.value == 'demo' else None)
    recipe, _ = command_line.locate(named)
    config = command_line.read(named, flags.FLAGS.setting)
    trains = isinstance(config, configuration.Config)
    mode = _MODE.value or ('train' if trains else config.mode)
    others = [] if trains else [config.mode, *(name for name in SAMPLED if hasattr(config, name))]
    if mode in RECIPES if trains else mode not in others:
      wanted = RECIPES.get(mode, 'a recipe that trains, such as configs/edit.py')
      raise UserError(f'--mode={mode} does not go with --config={recipe}: it takes {wanted}')
    if mode == 'plan':
      _set_plan(config)
    else:
      configuration.check(config, jax.device_count())
    opened = _opened(_WORKDIR.value or default_workdir(named), mode not in ('describe', 'demo'))
  command = importlib.import_module(f'unifusion_jax.commands.{COMMANDS[mode]}')
  with opened as workdir:
    if mode == 'plan':  # reads no weights, and makes a mesh of its own
      command.run(config, workdir)
      return
    if trains:
      config.recipe = named
      record.pin(config, workdir, *config.objective.pretrained)
    with jax.set_mesh(sharding.make_mesh(config.mesh)):
      command.run(config, workdir)


def _info(checkpoints: list[str]) -> None:
  """Runs --mode=info, which takes one checkpoint and nothing else."""
  if len(checkpoints) != 1 or flags.FLAGS.config or flags.FLAGS.setting:
    raise UserError('--mode=info takes one checkpoint, after the flags, and no recipe: --mode=info runs/edit, or '
                    'another folder, .safetensors file or hub id')
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig())):
    importlib.import_module('unifusion_jax.commands.info').run(checkpoints[0])


def default_workdir(recipe: str) -> pathlib.Path:
  """The workdir of a recipe without one: runs/edit for edit, runs/edit_8b for edit:8b, runs/sample_my_model."""
  path, scale = command_line.locate(recipe)
  return pathlib.Path('runs') / '_'.join([path.stem, *re.findall(r'\w+', scale)])


def _opened(name: str | pathlib.Path, writes: bool):
  """The context of a workdir, a local folder in it. UserError where it cannot be written to."""
  if bucket.is_address(name):
    return bucket.mirrored(name)
  if writes:
    check_writable(pathlib.Path(name))
  return contextlib.nullcontext(pathlib.Path(name))


def _set_plan(config) -> None:
  """The flags of --mode=plan as settings, checked, and this process's CPU in the place of its accelerators."""
  config.plan.topology = _TOPOLOGY.value or config.plan.topology
  config.plan.programs = tuple(_PROGRAMS.value or config.plan.programs)
  config.plan.save = _SAVE.value or config.plan.save
  if not config.plan.topology:
    raise UserError('--mode=plan wants the devices to plan for: --topology=v6e:8x8, or another of the shapes of v5e, '
                    'v6e, v5p, tpu7x, a100, h100, h200')
  topology = config.plan.chosen()
  compiler.prepare(topology)
  configuration.check(config, topology.devices)


def check_writable(workdir: pathlib.Path) -> None:
  """UserError where a workdir cannot be made or written to; it is not made yet."""
  folder = workdir.absolute()
  try:
    while not folder.exists():
      folder = folder.parent
    with tempfile.TemporaryFile(dir=folder) as file:
      file.write(b'0')
  except OSError as error:
    raise UserError(f'--workdir={workdir} cannot be written to: {folder}: {os.strerror(error.errno)}; give another '
                    'folder, or mend that one') from error


def run():
  """The console entry."""
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)
  with errors.at_the_terminal():
    if {'--help', '-help', '-h'} & {*sys.argv[1:]}:
      listed = flags.FLAGS.module_help(sys.modules[__name__]).partition(':\n')[2]  # without the module's name
      print(command_line.explained(__doc__, listed, sys.argv))
      return
    app.run(start, flags_parser=command_line.parse)


if __name__ == '__main__':
  run()
