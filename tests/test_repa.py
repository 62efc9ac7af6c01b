"""Representation alignment: the vision features, the head that predicts them, and what is left of it afterwards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unifusion_jax import config, sharding
from unifusion_jax.commands import export, train
from unifusion_jax.data import imaging
from unifusion_jax.models import unifusion
from unifusion_jax.objectives import flow_matching, repa

pytestmark = pytest.mark.slow

WITH_REPA = flow_matching.FlowMatching(repa_weight=0.5, repa_depth=1)


@pytest.fixture
def aligned(recipe):
  model = recipe().model
  return recipe(objective=WITH_REPA, model=dataclasses.replace(model, dit=dataclasses.replace(model.dit, depth=2)))


def images(seed, *shape):
  return sharding.shard(np.random.default_rng(seed).integers(0, 256, (8, *shape, 3)).astype(np.uint8))


def test_targets_are_standardised_over_the_positions_of_each_image(aligned):
  vlm = aligned.objective.frozen(aligned).vlm
  targets = np.asarray(repa.targets(vlm, images(0, 64, 64), 8, 8))
  assert targets.shape == (8, 8, 8, vlm.config.vision.width)
  np.testing.assert_allclose(targets.mean((1, 2)), 0, atol=1e-5)
  np.testing.assert_allclose(targets.std((1, 2)), 1, atol=1e-3)
  mean, std = (np.array(x, np.float32) for x in (vlm.config.vision.mean, vlm.config.vision.std))
  tiles = (np.asarray(images(0, 64, 64)) / np.float32(255) - mean) / std
  direct = np.asarray(vlm.vision(sharding.shard(tiles.astype(np.float32)))).reshape(8, 8, 8, -1)
  direct = (direct - direct.mean((1, 2), keepdims=True)) / direct.std((1, 2), keepdims=True)
  np.testing.assert_allclose(targets, direct, atol=1e-3)
  assert repa.targets(vlm, images(0, 48, 80), 6, 10).shape == (8, 6, 10, vlm.config.vision.width)


def test_the_loss_is_one_minus_the_cosine_of_prediction_and_target(aligned):
  head = aligned.objective.init(aligned).head
  states = imaging.to_float(images(1, 4, 4))
  states = jnp.concatenate([states] * 11, axis=-1)[..., :head.w1.shape[0]]
  hidden = np.asarray(states) @ np.asarray(head.w1[...]) + np.asarray(head.b1[...])
  predicted = sharding.shard((hidden / (1 + np.exp(-hidden)) @ np.asarray(head.w2[...])).astype(np.float32))
  for targets, loss in ((predicted, 0), (3 * predicted, 0), (-predicted, 2)):
    np.testing.assert_allclose(head.cosine_loss(states, targets), loss, atol=1e-4)


def test_alignment_teaches_the_blocks_before_it_alone(aligned, mesh):
  # A model whose last layer is zero, as it starts, has no gradient but that of alignment
  data = train.batches(aligned)
  batch = next(data)
  data.close()
  batch = sharding.shard_batch(batch, mesh)
  frozen, params, key = aligned.objective.frozen(aligned), aligned.objective.init(aligned), jax.random.key(0)
  step = jax.jit(jax.value_and_grad(aligned.objective.loss, has_aux=True))
  (value, metrics), gradients = step(params, frozen, batch, key)
  np.testing.assert_allclose(value, metrics['loss'] + 0.5 * metrics['repa'], rtol=1e-6)
  table = np.asarray(gradients.model.dit.blocks.table[...])
  assert np.abs(table[0]).max() > 0 and not table[1].any()
  without = flow_matching.FlowMatching().loss(params.model, frozen, batch, key)[1]
  np.testing.assert_allclose(metrics['loss'], without['loss'], rtol=1e-5)


def test_a_tap_leaves_the_velocity_as_it_is(aligned):
  model = jax.tree.map(lambda x: x + 0.01, aligned.objective.init(aligned).model)
  z = sharding.shard(np.random.default_rng(2).standard_normal((8, 4, 6, 4), np.float32))
  t, mask = sharding.shard(np.linspace(0, 1, 8, dtype=np.float32)), sharding.shard(np.ones((8, 5), bool))
  cond = sharding.shard(np.random.default_rng(3).standard_normal((8, 5, model.config.dit.width), np.float32))
  velocity, states = model.velocity(z, t, cond, mask, tap=1)
  np.testing.assert_allclose(velocity, model.velocity(z, t, cond, mask), atol=1e-5)
  assert states.shape == (8, 4, 6, model.config.dit.width)


def test_a_run_exports_the_model_without_its_head(aligned, tmp_path):
  state = train.run(aligned, tmp_path)
  export.run(aligned, tmp_path)
  back = unifusion.load(tmp_path / 'export', aligned.model)
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state.ema.model), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-6)  # bfloat16
  again = aligned.objective.init(dataclasses.replace(aligned, init=str(tmp_path / 'export')))
  assert isinstance(again, repa.WithREPA)
  for params in (again, aligned.objective.load(aligned, str(tmp_path / 'export'))):  # to train on, and to sample from
    assert isinstance(aligned.objective.model(params, None), unifusion.UniFusion)


def test_what_cannot_be_aligned_is_refused(aligned, qwen):
  with pytest.raises(ValueError, match='aligns with the vision tower of an InternVL'):
    aligned.objective.init(dataclasses.replace(aligned, vlm=str(qwen)))
  for objective, text in ((dataclasses.replace(WITH_REPA, repa_depth=3), 'one of the 2 blocks'),
                          (dataclasses.replace(WITH_REPA, repa_depth=0), 'one of the 2 blocks'),
                          (dataclasses.replace(WITH_REPA, repa_weight=-1.0), 'repa_weight=-1.0 must be')):
    with pytest.raises(ValueError, match=text):
      config.check(dataclasses.replace(aligned, objective=objective), 8)
