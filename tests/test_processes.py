"""Several processes: arrays of all are put together, they train as one would, and all end at once."""

import dataclasses
import json
import os
import pathlib
import pickle
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy

from unifusion_jax import config, processes
from unifusion_jax.commands import rewrite
from unifusion_jax.data import imaging, loader
from unifusion_jax.data.config import Task
from unifusion_jax.evaluation import records
from unifusion_jax.training import checkpoint, step

START = '''
import sys
import jax
port, here, count, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4 // count)
jax.config.update('jax_disable_most_optimizations', True)
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
'''


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
    outputs = [process.communicate(timeout=900) for process in running]
  finally:
    for process in running:
      process.kill()
  return [(process.returncode, (out.splitlines() or [''])[-1], error)
          for process, (out, error) in zip(running, outputs)]


def run(program: str, count: int = 2, folder: str = '') -> list[tuple[int, str, str]]:
  return ended(start(program, count, folder))


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


TRAINING = '''
import json, pathlib
from unifusion_jax import config
from unifusion_jax.data.config import Task
from unifusion_jax.commands import train
from unifusion_jax.models import vae
from unifusion_jax.scenes import autoencoder
from unifusion_jax.training import step

made = config.Config(
    objective=autoencoder.AutoencoderObjective(kl=1.0), mesh=sharding.MeshConfig(data=2, fsdp=2),
    model=vae.VAEConfig(block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
                        mid_block_add_attention=False, scaling_factor=1.0),
    data=config.DataConfig(tasks=(Task('t2i/1-2'),), batch_size=8))
tx = step.optimizer(made.optim, 10)
train_step = step.make_train_step(made.objective.loss, tx, made.optim)


def steps(state, data, count):
  """The state after some steps, and the rows and the loss of each."""
  seen = []
  for _ in range(count):
    batch = sharding.shard_batch(next(data), mesh)
    state, scalars = train_step(state, None, batch, jax.random.key(0))
    rows = sharding.gather(batch)
    seen.append([rows['number'].tolist(), int(rows['target'].sum()), float(scalars['loss'])])
  return state, seen


def leaves(state):
  return [np.asarray(sharding.gather(x)) for x in jax.tree.leaves(state)]


saved = pathlib.Path(folder)
with jax.set_mesh(mesh):
  fresh = jax.jit(lambda: step.init(made.objective.random(made), tx))()
  data = train.batches(made)
'''


def test_one_process_trains_as_two_and_goes_on_where_they_stopped(tmp_path):
  """The same rows in the same noise; the sums over devices are added in another order, so the last bits differ."""
  two = run(TRAINING + '''
  state, first = steps(fresh, data, 3)
  middle, position = leaves(state), data.get_state()
  state, rest = steps(state, data, 3)
  end = leaves(state)
  if here == 0:
    np.savez(saved / 'middle.npz', *middle)
    np.savez(saved / 'end.npz', *end)
    (saved / 'seen.json').write_text(json.dumps([first + rest, position]))
  print('saved')
''', folder=str(tmp_path))
  assert [(code, out) for code, out, _ in two] == [(0, 'saved')] * 2, two
  one = run(TRAINING + '''
  seen, position = json.loads((saved / 'seen.json').read_text())
  places = [x.sharding for x in jax.tree.leaves(fresh)]
  tree = jax.tree.structure(fresh)
  whole, alone = steps(fresh, data, 6)
  middle = [jax.device_put(x, place) for x, place in zip(np.load(saved / 'middle.npz').values(), places)]
  data.set_state(position)
  resumed, rest = steps(jax.tree.unflatten(tree, middle), data, 3)
  shown = [row[:2] for row in seen]
  assert [row[:2] for row in alone] == shown and [row[:2] for row in rest] == shown[3:]
  np.testing.assert_allclose([row[2] for row in alone + rest], [row[2] for row in seen + seen[3:]], rtol=1e-6)
  for state in (whole, resumed):
    for a, b in zip(leaves(state), np.load(saved / 'end.npz').values(), strict=True):
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
  print('same')
''', count=1, folder=str(tmp_path))
  assert [(code, out) for code, out, _ in one] == [(0, 'same')], one


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


COMMANDS = """
import pathlib
from absl import flags
from unifusion_jax import command_line, main
folder = pathlib.Path(folder)
for arguments in COMMANDS:
  sys.argv = ['main', f'--config={folder.parent}/recipe.py', f'--workdir={folder}', *arguments]
  main.main(command_line.parse(sys.argv))
  flags.FLAGS.unparse_flags()
  flags.FLAGS.setting = []
print('done')
"""
MODES = COMMANDS.replace('COMMANDS', repr([
    ['--mode=train'], ['--mode=sample', '--config.sample.prompt=a red circle', '--config.sample.steps=2'],
    ['--mode=eval'], ['--mode=export'], ['--mode=rewrite']]))
LONGER = ['--mode=train', '--config.train.steps=4']


def test_every_mode_on_two_processes_as_on_one(recipe, tmp_path):
  """One writes what there is one of; the numbers are those of one process, to the order of sums over devices."""
  for i in range(2):
    noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    imaging.write_png(tmp_path / f'{i}.png', noise)
  rows = [dict(references=['0.png'], instruction=f'make it {color}', target='1.png', caption=f'a {color} circle')
          for color in ('red', 'green', 'blue', 'black', 'white', 'yellow', 'gray', 'orange', 'pink')]
  (tmp_path / 'list.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  made = recipe(mesh=config.MeshConfig(data=2, fsdp=2), eval=records.RecordsEvaluation(examples=4, batch_size=4),
                train=config.TrainConfig(steps=2, log_every=1, save_every=1, preview_every=2, held_out_every=0),
                rewrite=rewrite.RewriteConfig(batch_size=4))
  made.data = dataclasses.replace(made.data, path=str(tmp_path / 'list.jsonl'), tasks=(Task('edit'),))
  (tmp_path / 'recipe.pickle').write_bytes(pickle.dumps(made))
  (tmp_path / 'recipe.py').write_text('import pathlib, pickle\n\n\ndef get_config():\n  return pickle.loads('
                                      "pathlib.Path(__file__).with_suffix('.pickle').read_bytes())\n")
  two, one = tmp_path / 'two', tmp_path / 'one'
  results = run(MODES, folder=str(two)), run(MODES, count=1, folder=str(one))
  assert [(code, out) for each in results for code, out, _ in each] == [(0, 'done')] * 3, results
  names = [sorted(str(path.relative_to(folder)) for path in folder.rglob('*')
                  if path.is_file() and not {'checkpoints'} & {*path.relative_to(folder).parts}
                  and not path.name.startswith(('events', 'rewrites-'))) for folder in (two, one)]
  assert names[0] == names[1] and {'config.json', 'metrics.jsonl', 'eval.json', 'export/config.json',
                                   'images/000.png', 'samples/0000002.png'} <= set(names[0])
  steps = [[json.loads(line)['step'] for line in (folder / 'metrics.jsonl').read_text().splitlines()]
           for folder in (two, one)]
  assert steps == [[1, 2]] * 2
  weights = [safetensors.numpy.load_file(next((folder / 'export').glob('*.safetensors'))) for folder in (two, one)]
  for name, value in weights[1].items():
    np.testing.assert_allclose(weights[0][name].astype(np.float32), value.astype(np.float32), rtol=0, atol=1e-4)
  images = [np.asarray(Image.open(folder / 'images' / '000.png'), np.int32) for folder in (two, one)]
  assert np.abs(images[0] - images[1]).max() <= 2
  written = [{line['key']: line for path in sorted((folder / 'rewrites').glob('rewrites-*.jsonl'))
              for line in map(json.loads, path.read_text().splitlines())} for folder in (two, one)]
  assert written[0] == written[1] and len(written[0]) == len(rows)
  assert len(list((two / 'rewrites').glob('rewrites-*.jsonl'))) == 2
  # Each goes on as the other was, on another mesh
  results = [run(COMMANDS.replace('COMMANDS', repr([[*LONGER, *mesh], ['--mode=export']])), count, str(folder))
             for folder, count, mesh in ((two, 1, ['--config.mesh.data=1', '--config.mesh.fsdp=4']),
                                         (one, 2, ['--config.mesh.data=1', '--config.mesh.tp=2']))]
  assert [(code, out) for each in results for code, out, _ in each] == [(0, 'done')] * 3, results
  for folder in (two, one):
    lines = (folder / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(line)['step'] for line in lines] == [1, 2, 3, 4]
  later = [safetensors.numpy.load_file(next((folder / 'export').glob('*.safetensors'))) for folder in (two, one)]
  for name, value in later[1].items():
    np.testing.assert_allclose(later[0][name].astype(np.float32), value.astype(np.float32), rtol=0, atol=2e-4)
  assert any(np.abs(weights[0][name].astype(np.float32) - value).max() > 1e-3 for name, value in later[0].items())


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
