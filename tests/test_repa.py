"""Representation alignment: what the VLM's eye sees, the head that has to tell it, and what is left of both afterwards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unifusion_jax import config, jobs, sharding
from unifusion_jax.commands import train
from unifusion_jax.data import loader
from unifusion_jax.models import unifusion
from unifusion_jax.objectives import flow_matching

ALIGNED = flow_matching.FlowMatching(repa_weight=0.5, repa_depth=1)


@pytest.fixture
def aligned(recipe):
  model = recipe().model
  return recipe(objective=ALIGNED, model=dataclasses.replace(model, dit=dataclasses.replace(model.dit, depth=2)))


def images(seed, *shape):
  return sharding.shard(np.random.default_rng(seed).uniform(-1, 1, (8, *shape, 3)).astype(np.float32))


def test_sight_is_standardised_over_each_image(aligned):
  job = jobs.build(aligned)
  vlm, pixels = job.load_vlm(), ((0.5,) * 3, (0.25,) * 3)
  seen = np.asarray(flow_matching.repa_targets(vlm, pixels, images(0, 64, 64), 8, 8))
  assert seen.shape == (8, 8, 8, vlm.config.vision.width)
  np.testing.assert_allclose(seen.mean((1, 2)), 0, atol=1e-5)
  np.testing.assert_allclose(seen.std((1, 2)), 1, atol=1e-3)
  tiles = (np.asarray(images(0, 64, 64)) + 1) / 2
  direct = np.asarray(vlm.vision(sharding.shard((tiles - 0.5) / 0.25))).reshape(8, 8, 8, -1)
  direct = (direct - direct.mean((1, 2), keepdims=True)) / direct.std((1, 2), keepdims=True)
  np.testing.assert_allclose(seen, direct, atol=1e-3)
  assert flow_matching.repa_targets(vlm, pixels, images(0, 48, 80), 6, 10).shape == (8, 6, 10, vlm.config.vision.width)


def test_distance_is_zero_where_the_head_tells_what_is_seen(aligned):
  params = jobs.build(aligned).init_params()
  states = images(1, 4, 4)
  states = jnp.concatenate([states] * 11, axis=-1)[..., :params.w1.shape[0]]
  hidden = np.asarray(states) @ np.asarray(params.w1[...]) + np.asarray(params.b1[...])
  told = sharding.shard((hidden / (1 + np.exp(-hidden)) @ np.asarray(params.w2[...])).astype(np.float32))
  for seen, distance in ((told, 0), (3 * told, 0), (-told, 2)):
    np.testing.assert_allclose(params.distance(states, seen), distance, atol=1e-4)


def test_alignment_teaches_the_blocks_before_it_alone(aligned, mesh):
  # A model whose last layer is zero, as it starts, has no gradient but that of alignment
  job = jobs.build(aligned)
  data = loader.batches(*job.data(), 8, 0)
  batch = next(data)
  data.close()
  batch.pop('skipped')
  batch = sharding.shard_batch(batch, mesh)
  frozen, params, key = job.load_frozen(), job.init_params(), jax.random.key(0)
  (value, metrics), gradients = jax.jit(jax.value_and_grad(job.loss, has_aux=True))(params, frozen, batch, key)
  np.testing.assert_allclose(value, metrics['loss'] + 0.5 * metrics['align'], rtol=1e-6)
  table = np.asarray(gradients.model.dit.blocks.table[...])
  assert np.abs(table[0]).max() > 0 and not table[1].any()
  without = flow_matching.loss(flow_matching.FlowMatching(), aligned.taps, None, None, params.model, frozen, batch, key)[1]
  np.testing.assert_allclose(metrics['loss'], without['loss'], rtol=1e-5)


def test_a_tap_leaves_the_velocity_as_it_is(aligned):
  model = jax.tree.map(lambda x: x + 0.01, jobs.build(aligned).init_params().model)
  z = sharding.shard(np.random.default_rng(2).standard_normal((8, 4, 6, 4), np.float32))
  t, mask = sharding.shard(np.linspace(0, 1, 8, dtype=np.float32)), sharding.shard(np.ones((8, 5), bool))
  cond = sharding.shard(np.random.default_rng(3).standard_normal((8, 5, model.config.dit.width), np.float32))
  velocity, states = model.velocity(z, t, cond, mask, 1)
  np.testing.assert_allclose(velocity, model.velocity(z, t, cond, mask), atol=1e-5)
  assert states.shape == (8, 4, 6, model.config.dit.width)


def test_a_run_exports_the_model_without_its_head(aligned, mesh, tmp_path, monkeypatch):
  monkeypatch.setattr(jobs.Generation, 'preview', lambda *_: None)
  state = train.train(aligned, tmp_path, mesh)
  job = jobs.build(aligned)
  job.export(tmp_path, mesh)
  back = unifusion.load(tmp_path / 'export', aligned.model)
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state.ema.model), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-6)  # bfloat16
  again = jobs.build(dataclasses.replace(aligned, init=str(tmp_path / 'export'))).init_params()
  assert isinstance(again, flow_matching.WithREPA)
  for params in (again, job.load_params(str(tmp_path / 'export'))):  # to train on, and to draw with
    sampler = job.sampler(params, job.load_frozen())
    assert isinstance(sampler.model, unifusion.UniFusion)


def test_what_cannot_be_aligned_is_refused(aligned, qwen):
  with pytest.raises(ValueError, match='aligns with the eye of an InternVL'):
    jobs.build(dataclasses.replace(aligned, vlm=str(qwen))).init_params()
  for objective, text in ((dataclasses.replace(ALIGNED, repa_depth=3), 'one of the 2 blocks'),
                          (dataclasses.replace(ALIGNED, repa_depth=0), 'one of the 2 blocks'),
                          (dataclasses.replace(ALIGNED, repa_weight=-1.0), 'must be 0 or more')):
    with pytest.raises(ValueError, match=text):
      config.check(dataclasses.replace(aligned, objective=objective), 8)
