"""Kills, signals and damaged files, counted: whether a run always goes on to the same weights.

  JAX_PLATFORMS=cpu python -m benchmarks.kills --times=50 --damages=0
  JAX_PLATFORMS=cpu python -m benchmarks.kills --times=50 --damages=0 --processes=2
  JAX_PLATFORMS=cpu python -m benchmarks.kills --times=0 --damages=1000

A small run of the embedded editing recipe saves at every step. It is ended again and again, by kill -9 at a random
moment or within a save, by SIGTERM or by SIGINT, of all its processes or of one, and started anew; each time its newest
checkpoint is compared with that of the same step of an uninterrupted run, bit by bit. Files of the newest checkpoint
are damaged, and what is restored is compared with what was saved.
"""

import collections
from concurrent import futures
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

from absl import app, flags, logging
import jax
import numpy as np
import tqdm

from configs import edit
from unifusion_jax import sharding
from unifusion_jax.errors import UserError
from unifusion_jax.training import checkpoint, step

_TIMES = flags.DEFINE_integer('times', 8, 'Times that the run is ended.')
_PROCESSES = flags.DEFINE_integer('processes', 1, 'Processes of the run, with a device each; one of one has two.')
_DAMAGES = flags.DEFINE_integer('damages', 60, 'Damages to a file of the newest checkpoint; half are flipped bits.')
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of moments, files and damages.')
FEWEST, MOST = 3, 8  # steps between a start and an end
HEARTBEAT = 10  # seconds after which the others end, too
SMALL = {'model.dit.depth': 1, 'data.only': 'edit', 'data.batch_size': 4, 'train.log_every': 1, 'train.save_every': 1,
         'train.preview_every': 0, 'init': ''}
SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}


def start(workdir: pathlib.Path, steps: int, keep: int = 2) -> list[subprocess.Popen]:
  """The processes of a run."""
  count, settings = _PROCESSES.value, SMALL | {'train.steps': steps, 'train.keep': keep}
  command = [sys.executable, '-m', 'unifusion_jax.main', '--config=configs/edit.py', f'--workdir={workdir}',
             *(f'--config.{name}={value}' for name, value in settings.items())]
  if count > 1:
    with socket.socket() as free:
      free.bind(('localhost', 0))
      command += [f'--coordinator=localhost:{free.getsockname()[1]}', f'--processes={count}',
                  f'--heartbeat_timeout={HEARTBEAT}']
  environment = os.environ | dict(JAX_NUM_CPU_DEVICES=str(max(1, 2 // count)), PJRT_NPROC='64')
  return [subprocess.Popen(
      [*command, *([f'--process={i}'] if count > 1 else [])], cwd=pathlib.Path(__file__).parent.parent,
      env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for i in range(count)]


def ended(running: list[subprocess.Popen]) -> list[tuple[int, str]]:
  """(return code, last line) of each process, when all are over."""
  with futures.ThreadPoolExecutor(len(running)) as pool:
    errors = [error for _, error in pool.map(subprocess.Popen.communicate, running)]
  return [(process.returncode, (error.strip().splitlines() or [''])[-1]) for process, error in zip(running, errors)]


def interrupt(workdir: pathlib.Path, steps: int, rng: random.Random) -> tuple[str, str]:
  """Starts the run, and ends it some steps later; (how, what was wrong with its end, or '')."""
  signum = rng.choice([signal.SIGKILL, signal.SIGKILL, *SIGNALS])
  saving = signum == signal.SIGKILL and rng.random() < 0.5
  running, before = start(workdir, steps), lines(workdir)
  victims = running if rng.random() < 0.5 else [rng.choice(running)]
  at = before + rng.randrange(FEWEST, MOST)
  while all(process.poll() is None for process in running) and lines(workdir) < at:
    time.sleep(0.01)
  if saving:
    while all(process.poll() is None for process in running) and not list(workdir.glob('checkpoints/*tmp*')):
      time.sleep(0.001)
  time.sleep(rng.random() * (0.05 if saving else 0.5))
  for process in victims:
    process.send_signal(signum)
  since, results = time.monotonic(), ended(running)
  seconds = time.monotonic() - since
  name = signal.Signals(signum).name + ' in a save' * saving
  name += '' if len(running) == 1 else ' of all' if victims is running else ' of one'
  if signum in SIGNALS:
    fine = all(code == SIGNALS[signum] for code, _ in results) and any('is saved' in line for _, line in results)
  else:
    others = [result for process, result in zip(running, results) if process not in victims]
    fine = all(code and line.startswith('error: ') for code, line in others) and seconds < 4 * HEARTBEAT
  return name, '' if fine else f'{seconds:.0f} s, {results}'


def lines(workdir: pathlib.Path) -> int:
  metrics = workdir / 'metrics.jsonl'
  return len(metrics.read_text().splitlines()) if metrics.exists() else 0


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
    tx = step.optimizer(self.config.optim, 1)
    self.mesh = jax.sharding.get_mesh()
    self.abstract = jax.eval_shape(lambda: step.init(self.config.objective.random(self.config), tx))

  def set_state(self, state: dict) -> None:
    """Takes the position in the data, in its place."""
    self.position = state

  def state(self, workdir: pathlib.Path) -> list[np.ndarray]:
    """Leaves of the whole state, and the position, as the training run restores them."""
    with checkpoint.Checkpoints(workdir, keep=10 ** 6, tidy=True) as checkpoints:
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


def damage(whole: pathlib.Path, newest: str, reader: Reader, folder: pathlib.Path, rng: random.Random):
  """{kind: outcomes of training and of sampling} of damages to the newest of two checkpoints."""
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
  steps = max(4, (MOST + 4) * _TIMES.value)
  with tempfile.TemporaryDirectory() as temporary, jax.set_mesh(sharding.make_mesh(edit.get_config().mesh)):
    folder, reader = pathlib.Path(temporary), Reader()
    whole, workdir = folder / 'whole', folder / 'run'
    results = ended(start(whole, steps, keep=steps))
    if any(code for code, _ in results):
      raise RuntimeError(f'the run that nothing interrupts ended with {results}')
    try:
      for _ in tqdm.trange(_TIMES.value):
        name, problem = interrupt(workdir, steps, rng)
        outcomes[name]['ENDED ' + problem if problem else same_as(whole, workdir, reader, folder)] += 1
      if _DAMAGES.value:
        for path in (whole / 'checkpoints').iterdir():
          if int(path.name) < steps - 1:
            shutil.rmtree(path)
        outcomes |= damage(whole, str(steps), reader, folder, rng)
    finally:  # stopped early, it says what it has seen
      for name, counts in outcomes.items():
        print(f'{name:30}', ', '.join(f'{count} {result}' for result, count in counts.most_common()))


def same_as(whole: pathlib.Path, workdir: pathlib.Path, reader: Reader, folder: pathlib.Path) -> str:
  """Compares the newest whole checkpoint of a run with that of the same step of another."""
  state, step_of = reader.state(workdir), folder / 'step'
  number = reader.position['next_batch']
  shutil.copytree(whole / 'checkpoints' / str(number), step_of / 'checkpoints' / str(number))
  result = 'same bits' if same(reader.state(step_of), state) else 'OTHER BITS'
  shutil.rmtree(step_of)
  return result


if __name__ == '__main__':
  app.run(main)
