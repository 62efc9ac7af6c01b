"""What is saved comes back: every kind of model, sharded as it was, and the EMA alone."""

import os
import pathlib
import resource
import shutil
import threading
import time

import jax
import numpy as np
import pytest

from unifusion_jax import config, sharding
from unifusion_jax.commands import train
from unifusion_jax.data.config import Task
from unifusion_jax.errors import UserError
from unifusion_jax.models import decoder, internvl, vae
from unifusion_jax.scenes import autoencoder, vlm
from unifusion_jax.training import checkpoint, step

SMALL = {
    'vlm': (vlm.VLMObjective(), internvl.InternVLConfig(
        vision=internvl.VisionConfig(width=16, depth=1, heads=2, hidden=32, tile=64, patch=8),
        text=decoder.DecoderConfig(vocab=1024, width=32, depth=1, heads=2, kv_heads=2, head_dim=16, hidden=32,
                                   tied=True),
        image_token_id=5), (Task('caption/1-2'),)),
    'autoencoder': (autoencoder.AutoencoderObjective(), vae.VAEConfig(
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, scaling_factor=1.0),
        (Task('reconstruct'),)),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', SMALL)
def test_state_and_position_come_back(name, mesh, tmp_path):
  objective, model, tasks = SMALL[name]
  made = config.Config(objective=objective, model=model, mesh=sharding.MeshConfig(data=2, fsdp=2, tp=2),
                       data=config.DataConfig(tasks=tasks, batch_size=8))
  tx = step.optimizer(made.optim, 10)
  state = jax.jit(lambda: step.init(made.objective.random(made), tx))()
  data = train.batches(made)
  next(data)
  saved = checkpoint.Checkpoints(tmp_path)
  saved.save(state, data)
  saved.wait()
  saved.close()
  following = next(data)

  again = checkpoint.Checkpoints(tmp_path)
  other = train.batches(made)
  back = again.restore(jax.eval_shape(lambda: step.init(made.objective.random(made), tx)), other, mesh)
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
  for name, x in next(other).items():
    np.testing.assert_array_equal(x, following[name])
  ema, _ = again.restore_ema(jax.eval_shape(lambda: made.objective.random(made)), mesh)
  for a, b in zip(jax.tree.leaves(state.ema), jax.tree.leaves(ema), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  again.close()
  data.close()
  other.close()


class Position:
  """Stands for the data: all that a checkpoint holds of it is its position."""

  def __init__(self, batch=0):
    self.batch = batch

  def get_state(self):
    return dict(next_batch=self.batch, made_of='numbers')

  def set_state(self, state):
    self.batch = state['next_batch']


def small_state(number: int) -> step.State:
  """A state whose numbers are all `number`, or random ones of it."""
  x = jax.device_put(np.random.default_rng(number).normal(size=(64, 8)).astype(np.float32), jax.P('fsdp', 'tp'))
  return step.State(jax.numpy.int32(number), jax.numpy.float32(0), dict(w=x), dict(w=x + 1), dict(m=x + 2))


@pytest.fixture
def saved(mesh, tmp_path):
  """A workdir with the checkpoints of steps 1 and 2."""
  with checkpoint.Checkpoints(tmp_path / 'saved') as checkpoints:
    for number in (1, 2):
      checkpoints.save(small_state(number), Position(10 * number))
  return tmp_path / 'saved'


def restored(workdir, mesh, **settings) -> tuple[int, int]:
  """(step, position in the data) that a training run goes on from, the values compared with those that were saved."""
  position = Position()
  with checkpoint.Checkpoints(workdir, tidy=True, **settings) as checkpoints:
    state = checkpoints.restore(jax.eval_shape(lambda: small_state(0)), position, mesh)
  assert_same(state, small_state(int(state.step)))
  return int(state.step), position.batch


def assert_same(tree, other):
  for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def flip(path: pathlib.Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  path.write_bytes(content)


DAMAGE = {
    'flipped bit': flip,
    'truncated': lambda path: os.truncate(path, path.stat().st_size - 1),
    'empty': lambda path: os.truncate(path, 0),
    'garbage': lambda path: path.write_bytes(b'\x00{\xff' * 40),
    'missing': lambda path: path.unlink(),
}


def files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(path.relative_to(folder) for path in folder.rglob('*') if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize('kind', DAMAGE)
def test_of_a_damaged_checkpoint_nothing_is_loaded(kind, saved, mesh, tmp_path):
  """Whatever is wrong with whatever file of the newest: it is set aside, and the one before is taken."""
  for number, name in enumerate(files(saved / 'checkpoints' / '2')):
    if kind == 'missing' and name.name == 'digests.json':
      continue  # as after a kill
    workdir = shutil.copytree(saved, tmp_path / str(number))
    DAMAGE[kind](workdir / 'checkpoints' / '2' / name)
    assert restored(workdir, mesh) == (1, 10), name
    assert sorted(path.name for path in (workdir / 'checkpoints').iterdir()) == ['1', '2.damaged']
    shutil.rmtree(workdir)


def test_the_log_names_step_and_file(saved, mesh, caplog):
  file = next((saved / 'checkpoints' / '2' / 'state').glob('**/d/*'))
  flip(file)
  assert restored(saved, mesh) == (1, 10)
  (entry,) = [entry.getMessage() for entry in caplog.records if 'damaged' in entry.getMessage()]
  assert 'step 2' in entry and file.name in entry and 'has other bytes than were written' in entry
  with checkpoint.Checkpoints(saved) as checkpoints:  # and the run saves this step again
    checkpoints.save(small_state(2), Position(20))
  assert restored(saved, mesh) == (2, 20)


def test_damaged_metadata_are_one_line(saved, mesh, caplog):
  DAMAGE['garbage'](saved / 'checkpoints' / '2' / '_CHECKPOINT_METADATA')
  assert restored(saved, mesh) == (1, 10)
  assert len(caplog.records) == 1


def test_a_reader_passes_over_and_changes_nothing(saved, mesh):
  """Sampling looks at what it reads: the EMA."""
  abstract = jax.eval_shape(lambda: small_state(0).ema)
  for item, step_taken in (('state', 2), ('ema', 1)):
    flip(next((saved / 'checkpoints' / '2' / item).glob('**/d/*')))
    before = files(saved)
    with checkpoint.Checkpoints(saved) as checkpoints:
      ema, step_read = checkpoints.restore_ema(abstract, mesh)
    assert step_read == step_taken and files(saved) == before
    assert_same(ema, small_state(step_taken).ema)


def test_none_is_whole(saved, mesh):
  for number in '12':
    DAMAGE['truncated'](saved / 'checkpoints' / number / 'data' / 'data.json')
  before = files(saved)
  with pytest.raises(UserError, match='no checkpoint in .* is whole: step 2: data/data.json has .* bytes; step 1: '):
    restored(saved, mesh)
  assert files(saved) == before


def test_without_digests_a_checkpoint_that_loads_is_taken(saved, mesh):
  """A kill between a save and its digests loses nothing."""
  newest = saved / 'checkpoints' / '2'
  (newest / 'digests.json').unlink()
  (newest / 'digests.json.part').write_text('{')
  assert restored(saved, mesh) == (2, 20)
  (newest / 'ema' / '_METADATA').write_bytes(b'{')
  assert restored(saved, mesh) == (1, 10)


def test_digests_may_be_left_out(mesh, tmp_path):
  with checkpoint.Checkpoints(tmp_path, checksums=False) as checkpoints:
    checkpoints.save(small_state(1), Position(10))
  assert not list(tmp_path.glob('**/digests.json'))
  assert restored(tmp_path, mesh, checksums=False) == restored(tmp_path, mesh) == (1, 10)


def test_the_position_of_each_process_is_that_of_all(saved, mesh):
  """As earlier versions wrote it, for any number of processes."""
  newest = saved / 'checkpoints' / '2'
  (newest / 'digests.json').unlink()
  data = newest / 'data'
  shutil.copy(data / 'data.json', data / 'process_1-of-2.json')
  (data / 'data.json').rename(data / 'process_0-of-2.json')
  assert restored(saved, mesh) == (2, 20)


def test_saves_leave_neither_threads_nor_descriptors(mesh, tmp_path):
  def held():
    return threading.active_count(), len(os.listdir('/proc/self/fd'))

  state = small_state(0)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    for number in range(50):
      checkpoints.save(step.State(jax.numpy.int32(number), state.progress, state.params, state.ema, state.opt),
                       Position())
      checkpoints.wait()
      if number == 1:
        before = held()
    assert held() == before


def test_a_save_that_fails_is_one_sentence(mesh, tmp_path, caplog):
  """A limit of the size of files stands for a full disk."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save(small_state(1), Position(10))
  checkpoints.wait()
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    checkpoints.save(small_state(2), Position(20))
    with pytest.raises(UserError, match='no checkpoint could be saved in .*: File too large'):
      checkpoints.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  checkpoints.close()
  assert not [entry for entry in caplog.records if entry.exc_info]
  assert restored(tmp_path, mesh) == (1, 10)


def test_no_checkpoint_says_what_to_do(mesh, tmp_path):
  with pytest.raises(ValueError, match='train first'):
    checkpoint.Checkpoints(tmp_path).restore_ema({}, mesh)


def test_reading_leaves_alone_what_a_run_is_writing(tmp_path):
  """Exporting or sampling beside a run that saves must not take its half-written checkpoint away."""
  half = tmp_path / 'checkpoints' / '7.orbax-checkpoint-tmp'
  half.mkdir(parents=True)
  reader = checkpoint.Checkpoints(tmp_path)
  time.sleep(1.0)
  assert reader.latest() is None and half.exists()
  trainer = checkpoint.Checkpoints(tmp_path, tidy=True)
  until = time.monotonic() + 60
  while half.exists() and time.monotonic() < until:  # orbax removes it in a thread
    time.sleep(0.1)
  assert not half.exists()
  trainer.close()
  reader.close()
