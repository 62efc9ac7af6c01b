"""Several processes: arrays of all are put together, fetched whole by each, and the data ends for all at once."""

import socket
import subprocess
import sys

import pytest

START = '''
import sys
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 2)
jax.distributed.initialize(f'localhost:{sys.argv[1]}', 2, int(sys.argv[2]))
import numpy as np
from unifusion_jax import sharding
from unifusion_jax.data import loader
from unifusion_jax.errors import BrokenRecord

mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2))
here = jax.process_index()


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
      raise KeyError(f'{i} on process {here}')
    if i in self.broken:
      raise BrokenRecord(f'{i} on process {here}')
    return dict(x=np.float32(i))


def feed(source, share=1.0):
  batches = loader.batches([(source, 1.0)], lambda record, rng: record, 4, 0, here, jax.process_count())
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
'''


def run(program: str) -> list[tuple[int, str, str]]:
  """(return code, last line of output, errors) of the program in two processes of two devices each."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  running = [subprocess.Popen([sys.executable, '-c', START + program, str(port), str(i)], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True) for i in range(2)]
  try:
    outputs = [process.communicate(timeout=120) for process in running]
  finally:
    for process in running:
      process.kill()
  return [(process.returncode, (out.splitlines() or [''])[-1], error)
          for process, (out, error) in zip(running, outputs)]


def test_two_processes_put_and_fetch():
  results = run('''
with jax.set_mesh(mesh):
  whole = np.arange(24, dtype=np.float32).reshape(8, 3)
  both = sharding.shard({'x': whole})
  assert not both['x'].is_fully_addressable
  np.testing.assert_array_equal(sharding.gather(jax.jit(lambda x: x * 2)(both['x'])), whole * 2)
  mine = whole[4 * here:][:4]
  np.testing.assert_array_equal(sharding.gather(sharding.shard_batch(mine, mesh)), whole)
  rows = sharding.tell_all(np.array([here, 7 + here], np.int32))
  np.testing.assert_array_equal(sharding.local(rows), [[0, 7], [1, 8]])
  print('leads' if sharding.is_main_process() else 'follows')
''')
  assert [(code, out) for code, out, _ in results] == [(0, 'leads'), (0, 'follows')], results


def test_they_read_one_order_and_go_on_in_it():
  """The batches of one process, each its rows of them; after a restart too, though one batch was read early."""
  results = run('''
with jax.set_mesh(mesh):
  straight, total = train(feed(Numbers()), 8)
  first = feed(Numbers())
  parts, _ = train(first, 3)
  resumed = feed(Numbers())
  resumed.set_state(first.get_state())
  assert parts + train(resumed, 5)[0] == straight and total == np.sum(straight)
  alone = loader.batches([(Numbers(), 1.0)], lambda record, rng: record, 4, 0)
  interleaved = [np.concatenate([x[0::2], x[1::2]]).tolist() for x in (next(alone)['x'] for _ in range(8))]
  assert straight == interleaved, (straight, interleaved)
  print('same')
''')
  assert [(code, out) for code, out, _ in results] == [(0, 'same')] * 2, results


@pytest.mark.parametrize('trouble, first, second', [
    ('Numbers(faulty=[17] if here else [])', 'UserError: process 1 of 2 could not read its data and says why: all stop',
     "KeyError: '17 on process 1'"),
    ('Numbers(broken=range(4, 40) if here else [])', *['broken records were passed over for'] * 2)])
def test_the_trouble_of_one_process_ends_both(trouble, first, second):
  """They stop in the same call, each with its reason, and no one waits for the other."""
  results = run(f'''
with jax.set_mesh(mesh):
  data, steps = feed({trouble}, 0.01), 0
  try:
    for _ in range(1000):
      train(data, 1)
      steps += 1
  finally:
    print(steps, data.seen, data.skipped)
''')
  (code, out, error), (other_code, other_out, other_error) = results
  assert code == other_code == 1 and out == other_out and int(out.split()[0]) < 100, results
  assert first in error and second in other_error, results


def test_what_one_process_cannot_do_ends_both():
  results = run('''
with sharding.together('count'):
  count = here
try:
  with sharding.together('write the file'):
    if sharding.is_main_process():
      open('/', 'w')
except Exception as error:
  print(type(error).__name__, error)
''')
  assert [(code, out) for code, out, _ in results] == [
      (0, "IsADirectoryError [Errno 21] Is a directory: '/'"),
      (0, 'UserError process 0 of 2 could not write the file and says why: all stop')], results
