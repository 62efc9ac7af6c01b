"""Kills, signals and damaged files, counted: whether a run always goes on to the same weights.

  JAX_PLATFORMS=cpu python -m benchmarks.kills
  JAX_PLATFORMS=cpu python -m benchmarks.kills --kills=0 --signals=0 --damages=1000

A small run of the embedded editing recipe saves at every step. Real processes are killed or signalled at random moments
of it, started again, and their last state compared with that of an uninterrupted run, bit by bit. Files of its newest
checkpoint are damaged, and what is restored is compared with what was saved.
"""

import collections
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from absl import app, flags, logging
import jax
import numpy as np

from configs import edit
from unifusion_jax import sharding
from unifusion_jax.errors import UserError
from unifusion_jax.training import checkpoint, step

_KILLS = flags.DEFINE_integer('kills', 3, 'Runs ended by kill -9, each at a random moment.')
_SIGNALS = flags.DEFINE_integer('signals', 4, 'Runs ended by SIGTERM and SIGINT, in turn.')
_DAMAGES = flags.DEFINE_integer('damages', 60, 'Damages to a file of the newest checkpoint; half are flipped bits.')
_STEPS = flags.DEFINE_integer('steps', 12, 'Steps of a run.')
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of moments, files and damages.')
SMALL = {'model.dit.depth': 1, 'data.only': 'edit', 'data.batch_size': 4, 'train.log_every': 1, 'train.save_every': 1,
         'train.preview_every': 0, 'init': ''}
SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}


def start(workdir: pathlib.Path) -> subprocess.Popen:
  settings = SMALL | {'train.steps': _STEPS.value}
  return subprocess.Popen(
      [sys.executable, '-m', 'unifusion_jax.main', '--config=configs/edit.py', f'--workdir={workdir}',
       *(f'--config.{name}={value}' for name, value in settings.items())],
      cwd=pathlib.Path(__file__).parent.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(workdir: pathlib.Path) -> None:
  """Trains to the end, from the checkpoint that is there."""
  process = start(workdir)
  _, errors = process.communicate()
  if process.returncode:
    raise RuntimeError(f'a run ended with {process.returncode}:\n{errors}')


def interrupt(workdir: pathlib.Path, signum: int, rng: random.Random) -> tuple[int, str]:
  """Starts a run and signals it at a random moment after its first step; (return code, its last line)."""
  process, at = start(workdir), rng.randrange(1, _STEPS.value - 1)
  metrics = workdir / 'metrics.jsonl'
  while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= at):
    time.sleep(0.01)
  time.sleep(rng.random() * 0.5)  # about two steps
  process.send_signal(signum)
  _, errors = process.communicate()
  return process.returncode, (errors.strip().splitlines() or [''])[-1]


class Reader:
  """Restores states of this small run."""

  def __init__(self):
    self.config = edit.get_config('tiny')
    for name, value in SMALL.items():
      *path, last = name.split('.')
      holder = self.config
      for part in path:
        holder = getattr(holder, part)
      setattr(holder, last, value)
    tx = step.optimizer(self.config.optim, _STEPS.value)
    self.mesh = jax.sharding.get_mesh()
    self.abstract = jax.eval_shape(lambda: step.init(self.config.objective.random(self.config), tx))

  def set_state(self, state: dict) -> None:
    """Takes the position in the data, in its place."""
    self.position = state

  def state(self, workdir: pathlib.Path) -> list[np.ndarray]:
    """Leaves of the whole state, and the position, as the training run restores them."""
    with checkpoint.Checkpoints(workdir, tidy=True) as checkpoints:
      state = checkpoints.restore(self.abstract, self, self.mesh)
    return [*(np.asarray(x) for x in jax.tree.leaves(state)), np.array(self.position['next_batch'])]

  def ema(self, workdir: pathlib.Path) -> list[np.ndarray]:
    """Leaves of the EMA, as sampling restores them."""
    with checkpoint.Checkpoints(workdir) as checkpoints:
      return [np.asarray(x) for x in jax.tree.leaves(checkpoints.restore_ema(self.abstract.ema, self.mesh)[0])]


def same(leaves: list[np.ndarray], others: list[np.ndarray]) -> bool:
  return all(a.tobytes() == b.tobytes() for a, b in zip(leaves, others, strict=True))


def flip(path: pathlib.Path, rng: random.Random) -> None:
  content = bytearray(path.read_bytes())
  content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  path.write_bytes(content)


DAMAGE = {
    'flipped bit': flip,
    'truncated file': lambda path, rng: os.truncate(path, rng.randrange(path.stat().st_size)),
    'empty file': lambda path, rng: os.truncate(path, 0),
    'missing file': lambda path, rng: path.unlink(),
    'garbage': lambda path, rng: path.write_bytes(rng.randbytes(path.stat().st_size)),
}


def outcome(read, newest: list[np.ndarray], before: list[np.ndarray]) -> str:
  try:
    leaves = read()
  except UserError:
    return 'refused'
  except Exception as error:
    logging.error('%r', error)
    return 'TRACEBACK'
  return 'fell back' if same(leaves, before) else 'same values' if same(leaves, newest) else 'OTHER VALUES'


def damage(whole: pathlib.Path, reader: Reader, folder: pathlib.Path, rng: random.Random):
  """{kind: outcomes of training and of sampling} of damages to the newest of two checkpoints."""
  newest = str(_STEPS.value)
  after = reader.state(whole), reader.ema(whole)
  older = folder / 'older'
  shutil.copytree(whole, older)
  shutil.rmtree(older / 'checkpoints' / newest)
  before = reader.state(older), reader.ema(older)
  outcomes = collections.defaultdict(collections.Counter)
  for i in range(_DAMAGES.value):
    kind = 'flipped bit' if i % 2 else rng.choice([kind for kind in DAMAGE if kind != 'flipped bit'])
    workdir = folder / 'damaged'
    shutil.copytree(whole, workdir)
    files = sorted(path for path in (workdir / 'checkpoints' / newest).rglob('*') if path.is_file())
    DAMAGE[kind](rng.choice(files), rng)
    outcomes[f'{kind}, sampled'][outcome(lambda: reader.ema(workdir), after[1], before[1])] += 1
    outcomes[f'{kind}, trained on'][outcome(lambda: reader.state(workdir), after[0], before[0])] += 1
    shutil.rmtree(workdir)
  return outcomes


def main(_):
  logging.set_verbosity(logging.ERROR)
  jax.config.update('jax_num_cpu_devices', 2)
  rng, outcomes = random.Random(_SEED.value), collections.defaultdict(collections.Counter)
  with tempfile.TemporaryDirectory() as temporary, jax.set_mesh(sharding.make_mesh(edit.get_config().mesh)):
    folder, reader = pathlib.Path(temporary), Reader()
    finish(folder / 'whole')
    whole = reader.state(folder / 'whole')
    for i in range(_KILLS.value + _SIGNALS.value):
      signum = signal.SIGKILL if i < _KILLS.value else [*SIGNALS][i % 2]
      workdir = folder / f'run{i}'
      code, line = interrupt(workdir, signum, rng)
      finish(workdir)
      result = 'same bits' if same(whole, reader.state(workdir)) else 'OTHER BITS'
      if signum in SIGNALS and (code != SIGNALS[signum] or 'is saved' not in line):
        result = f'ENDED WITH {code}: {line}'
      outcomes[signal.Signals(signum).name][result] += 1
      shutil.rmtree(workdir)
    if _DAMAGES.value:
      outcomes |= damage(folder / 'whole', reader, folder, rng)
  for name, counts in outcomes.items():
    print(f'{name:30}', ', '.join(f'{count} {result}' for result, count in counts.most_common()))


if __name__ == '__main__':
  app.run(main)
