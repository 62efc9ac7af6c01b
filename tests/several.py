"""Programs that tests run in several processes, with four devices in all."""

from concurrent import futures
import pathlib
import socket
import subprocess
import sys

import numpy as np

START = '''
import sys
import jax
port, here, count, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4 // count)
jax.config.update('jax_disable_most_optimizations', True)
jax.config.update('jax_compilation_cache_dir', PROGRAMS)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
if count > 1:
  jax.distributed.initialize(f'localhost:{port}', count, here, heartbeat_timeout_seconds=8, shutdown_timeout_seconds=8)
import numpy as np
from unifusion_jax import sharding
from unifusion_jax.data import loader
from unifusion_jax.errors import BrokenRecord

mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2))


class Numbers:
  """Example i is i, but where it is one of the broken or of the faulty."""
  name = 'numbers'

  def __init__(self, broken=(), faulty=()):
    self.broken, self.faulty = set(broken), set(faulty)

  def __len__(self):
    return 40

  def bucket(self, i):
    return 8, 8, 0

  def __getitem__(self, i):
    if i in self.faulty:
      raise OSError(f'{i} on process {here}')
    if i in self.broken:
      raise BrokenRecord(f'{i} on process {here}')
    return dict(x=np.float32(i))


def feed(source, share=1.0):
  batches = loader.batches([(source, 1.0)], lambda record, rng: record, 4, 0, sharding.rows(4))
  return loader.Feed(batches, share)


@jax.jit
def step(total, x):
  return total + x.sum()  # of all processes: one that stops alone leaves the others waiting


def train(data, steps):
  total, seen = np.float32(0), []
  for _ in range(steps):
    x = next(data)['x']
    seen.append(sharding.shard_batch(x, mesh))
    total = step(total, seen[-1])
  return [sharding.gather(x).tolist() for x in seen], float(total)
'''.replace('PROGRAMS', repr(str(pathlib.Path(__file__).parent.parent / '.cache' / 'jax')))  # as conftest.py


class Numbers:
  """The source of the same name above."""
  name = 'numbers'

  def __len__(self):
    return 40

  def bucket(self, i):
    return 8, 8, 0

  def __getitem__(self, i):
    return dict(x=np.float32(i))


def start(program: str, count: int = 2, folder: str = '') -> list[subprocess.Popen]:
  """The program in processes that have four devices in all."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  return [subprocess.Popen([sys.executable, '-c', START + program, str(port), str(i), str(count), folder],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(count)]


def ended(running: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
  """(return code, last line of output, errors) of processes when all are over."""
  try:
    with futures.ThreadPoolExecutor(len(running)) as pool:  # one whose pipe is full would stop them all
      outputs = list(pool.map(lambda process: process.communicate(timeout=900), running))
  finally:
    for process in running:
      process.kill()
  return [(process.returncode, (out.splitlines() or [''])[-1], error)
          for process, (out, error) in zip(running, outputs)]


def run(program: str, count: int = 2, folder: str = '') -> list[tuple[int, str, str]]:
  return ended(start(program, count, folder))
