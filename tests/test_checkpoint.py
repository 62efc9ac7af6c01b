"""What is saved comes back: every kind of model, sharded as it was, and the EMA alone."""

import time

import jax
import numpy as np
import pytest

from unifusion_jax import config, sharding
from unifusion_jax.commands import train
from unifusion_jax.data import loader
from unifusion_jax.models import decoder, internvl, vae
from unifusion_jax.scenes import autoencoder, vlm
from unifusion_jax.training import checkpoint, step

SMALL = {
    'vlm': (vlm.VLMObjective(), internvl.InternVLConfig(
        vision=internvl.VisionConfig(width=16, depth=1, heads=2, hidden=32, tile=64, patch=8),
        text=decoder.DecoderConfig(vocab=1024, width=32, depth=1, heads=2, kv_heads=2, head_dim=16, hidden=32,
                                   tied=True),
        image_token_id=5), (loader.Task('caption/1-2'),)),
    'autoencoder': (autoencoder.AutoencoderObjective(), vae.VAEConfig(
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, scaling_factor=1.0),
        (loader.Task('reconstruct'),)),
}


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
