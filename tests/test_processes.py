"""Several processes: arrays of all are put together, they read as one would, and all end at once.

Their training and all commands: test_processes_train.py and test_processes_modes.py.
"""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from several import ended, Numbers, run, start

from unifusion_jax import processes
from unifusion_jax.data import loader
from unifusion_jax.training import checkpoint, step

pytestmark = pytest.mark.slow


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
  # On a mesh in another order, and with processes that share the work of an example
  for shape, order, rows in (((1, 4, 1), [0, 2, 1, 3], [[0, 1, 4, 5], [2, 3, 6, 7]][here]),
                             ((1, 1, 4), [0, 1, 2, 3], range(8)), ((1, 2, 2), [0, 2, 1, 3], range(8))):
    other = jax.sharding.Mesh(np.array(jax.devices())[order].reshape(shape), sharding.AXES,
                              axis_types=(jax.sharding.AxisType.Explicit,) * 3)
    with jax.set_mesh(other):
      assert sharding.rows(8) == list(rows), sharding.rows(8)
      alone, share = len(rows) < 8, sharding.share(8)
      assert sharding.own_rows(8) == (list(rows) if alone or not here else [])
      assert (share.number, share.count, share.first) == ((here, 2, True) if alone else (0, 1, not here))
      np.testing.assert_array_equal(sharding.gather(sharding.shard_batch(whole[sharding.rows(8)], other)), whole)
      once = loader.Feed(loader.batches([(Numbers(broken={3}), 1.0)], lambda record, rng: record, 8, 0, rows), 1.0)
      for _ in range(5):
        next(once)
      assert (once.seen, once.skipped) == (40, 1), (once.seen, once.skipped)
  print('leads' if sharding.is_main_process() else 'follows')
''')
  assert [(code, out) for code, out, _ in results] == [(0, 'leads'), (0, 'follows')], results


def test_they_read_one_order_and_go_on_in_it():
  """The batches of one process, row by row; after a restart too, though one batch was read early."""
  results = run('''
with jax.set_mesh(mesh):
  straight, total = train(feed(Numbers()), 8)
  first = feed(Numbers())
  parts, _ = train(first, 3)
  resumed = feed(Numbers())
  resumed.set_state(first.get_state())
  assert parts + train(resumed, 5)[0] == straight and total == np.sum(straight)
  alone = loader.batches([(Numbers(), 1.0)], lambda record, rng: record, 4, 0)
  assert straight == [next(alone)['x'].tolist() for _ in range(8)]
  print('same')
''')
  assert [(code, out) for code, out, _ in results] == [(0, 'same')] * 2, results


def test_they_load_the_program_that_the_first_one_wrote(tmp_path):
  """From a folder of all; where each has its own, all compile unless each has the file."""
  program = '''
import pathlib
from unifusion_jax.planning import executables
notes = []
with jax.set_mesh(mesh):
  x = sharding.shard_batch(np.arange(8.0)[sharding.rows(8)] / 3, mesh)
  for name in ('shared', str(here)):
    total = executables.Programs(step, pathlib.Path(folder) / name, notes.append)(np.float32(0), x)
    assert sharding.local(total) == sharding.local(step(np.float32(0), x))
print(' '.join(note.replace(':', '').split()[1] for note in notes))
'''
  first = run(program, folder=str(tmp_path))
  assert [(code, out) for code, out, _ in first] == [(0, 'step compiled step compiled')] * 2, first
  files = [next((tmp_path / name).iterdir()) for name in ('shared', '0', '1')]
  assert len({file.name for file in files}) == 1
  files[2].unlink()
  second = run(program, folder=str(tmp_path))
  assert [(code, out) for code, out, _ in second] == [
      (0, 'loaded process compiled'), (0, 'loaded step compiled')], second
  assert files[2].exists()


def test_a_folder_in_use_stops_all(tmp_path):
  results = run('''
import pathlib
from unifusion_jax.training import lock
path = pathlib.Path(folder) / 'train.lock'
with lock.held(path):
  with lock.held(path):
    pass
''', folder=str(tmp_path))
  assert [code for code, *_ in results] == [1, 1], results
  assert 'is in use by process' in results[0][2] and 'process 0 of 2 could not lock the' in results[1][2], results
  assert (tmp_path / 'train.lock').read_text() == ''


@pytest.mark.parametrize('trouble, first, second', [
    ('Numbers(faulty=[17] if here else [])', 'UserError: process 1 of 2 could not read its data and says why: all stop',
     'OSError: 17 on process 1'),
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


def test_a_signal_to_one_ends_both_after_the_same_step():
  results = run('''
import os, signal
from unifusion_jax.training import interrupt
with jax.set_mesh(mesh), interrupt.Interrupts() as interrupts:
  interrupts.defer()
  data, exchange = feed(Numbers()), sharding.Exchange(np.array([0], np.int32))
  for done in range(1, 100):
    train(data, 1)
    if done == 3 and here:
      os.kill(os.getpid(), signal.SIGTERM)
    if signum := int(exchange(np.array([interrupts.received], np.int32)).max()):
      print(done)
      raise interrupt.Interrupted(signum, 'saved')
''')
  assert [(code, out) for code, out, _ in results] == [(143, '4')] * 2, results
  assert [error.splitlines()[-1] for _, _, error in results].count('SIGTERM: saved') == 1


def test_a_checkpoint_of_two_is_gone_on_with_by_one(mesh, tmp_path):
  results = run(f'''
from unifusion_jax.training import checkpoint
from unifusion_jax.training.step import State
with jax.set_mesh(mesh), checkpoint.Checkpoints({str(tmp_path)!r}) as checkpoints:
  data = feed(Numbers())
  train(data, 3)
  x = sharding.shard({{'w': np.arange(8, dtype=np.float32)}})
  whole = lambda value, dtype: jax.device_put(dtype(value), jax.NamedSharding(mesh, jax.P()))
  checkpoints.save(State(whole(3, np.int32), whole(0, np.float32), x, x, x), data)
  checkpoints.wait()
''')
  assert [code for code, _, _ in results] == [0, 0], results
  alone = loader.Feed(loader.batches([(Numbers(), 1.0)], lambda record, rng: record, 4))
  x = {'w': jax.device_put(np.zeros(8, np.float32), jax.P('fsdp'))}
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    abstract = jax.eval_shape(lambda: step.State(jnp.int32(0), jnp.float32(0), x, x, x))
    state = checkpoints.restore(abstract, alone, mesh)
  np.testing.assert_array_equal(state.ema['w'], np.arange(8))
  assert int(state.step) == 3 and alone.get_state()['next_batch'] == 3


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


def test_four_find_each_other_and_one_line_says_who(tmp_path):
  """By the flags of the command."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  command = [sys.executable, '-m', 'unifusion_jax.main', '--config=configs/edit.py', '--mode=sample',
             f'--workdir={tmp_path}', f'--coordinator=localhost:{port}', '--processes=4']
  results = [subprocess.Popen([*command, f'--process={i}'], cwd=pathlib.Path(__file__).parent.parent,
                              env=os.environ | dict(JAX_NUM_CPU_DEVICES='1'), text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE) for i in range(4)]
  results = ended(results)
  assert [code for code, *_ in results] == [1] * 4, results
  assert results[0][1].startswith('4 processes on') and results[0][1].endswith(': 4 x cpu, 1 each'), results
  assert not any('processes on' in out for _, out, _ in results[1:])
  assert all(error.splitlines()[-1].startswith('error: nothing to sample') for *_, error in results), results


def test_where_not_all_come_those_that_came_end_with_a_sentence(tmp_path):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  alone = subprocess.run([sys.executable, '-m', 'unifusion_jax.main', '--config=configs/edit.py',
                          f'--coordinator=localhost:{port}', '--processes=2', '--process=0', '--start_timeout=1'],
                         cwd=pathlib.Path(__file__).parent.parent, capture_output=True, text=True, check=False)
  last = [line for line in alone.stderr.splitlines() if line.startswith('error: ')]
  assert alone.returncode == -signal.SIGABRT and len(last) == 1, alone.stderr
  assert 'ended in its start: not all processes came in time (--start_timeout)' in last[0]


@pytest.mark.parametrize('hosts, devices, text', [
    (['a', 'b'], [4, 4], '2 processes on 2 hosts (a, b): 8 x TPU v6 lite, 4 each'),
    (['a'] * 4, [1] * 4, '4 processes on a: 4 x TPU v6 lite, 1 each'),
    ([f'h{i}' for i in range(64)], [4] * 63 + [3],
     '64 processes on 64 hosts (h0, h1, h2, ..., h62, h63): 255 x TPU v6 lite, from 3 to 4 each')])
def test_who_is_there(hosts, devices, text):
  assert processes.described(hosts, devices, 'TPU v6 lite') == text


@pytest.mark.parametrize('arguments, sentence', [
    (dict(coordinator='localhost', count=2, index=0), '--coordinator=localhost: give HOST:PORT'),
    (dict(coordinator='localhost:1', count=2, index=2), '--process=2 of --processes=2: they are numbered from 0 to 1'),
    (dict(coordinator=None, count=None, index=None), '--distributed: coordinator_address should be defined')])
def test_settings_of_processes_that_cannot_be(arguments, sentence):
  program = f'from unifusion_jax import processes\nprocesses.join(**{arguments!r}, seconds=5, heartbeat=5)'
  alone = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=False)
  assert alone.returncode == 1 and f'UserError: {sentence}' in alone.stderr, alone.stderr


@pytest.mark.parametrize('names', [dict(TPU_WORKER_HOSTNAMES='a,b,c,d'), dict(SLURM_STEP_NUM_TASKS='4')])
def test_one_of_several_that_does_not_know_it(monkeypatch, names):
  assert processes.expected() is None
  for name, value in names.items():
    monkeypatch.setenv(name, value)
  assert '4' in processes.expected()


@pytest.mark.parametrize('victim', [0, 1])
def test_where_one_is_killed_the_other_ends_with_a_sentence(tmp_path, victim):
  running = start('''
from unifusion_jax import processes
with processes.companion(60) as companion, jax.set_mesh(mesh):
  companion.ready()
  data = feed(Numbers())
  while True:
    train(data, 1)
    open(f'{folder}/{here}', 'w').close()
''', folder=str(tmp_path))
  while len(list(tmp_path.iterdir())) < 2 and all(process.poll() is None for process in running):
    time.sleep(0.05)
  running[victim].send_signal(signal.SIGKILL)
  since, results = time.monotonic(), ended(running)
  assert time.monotonic() - since < 60  # a bound, not a figure: jax notices after eight seconds of silence
  (code, _, error), (dead, *_) = results[1 - victim], results[victim]
  assert dead == -signal.SIGKILL and code == -signal.SIGABRT, results
  last = [line for line in error.splitlines() if line.startswith('error: the process on')]
  assert len(last) == 1 and 'one of them is lost' in last[0] and 'last checkpoint' in last[0], error
