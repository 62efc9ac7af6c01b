"""Training by several processes is that by one."""

import pytest
from several import run

pytestmark = pytest.mark.slow

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
    model=vae.VAEConfig(block_out_channels=(8,), layers_per_block=1, latent_channels=4, norm_num_groups=4,
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
