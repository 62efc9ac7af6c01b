"""The mathematics of rectified flow, against closed forms and diffusers' scheduler."""

import jax
from jax import P
import jax.numpy as jnp
import numpy as np
import pytest

from unifusion_jax import flow, sharding
from unifusion_jax.sharding import BATCH


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape, out_sharding=P(BATCH))


def test_ends_of_the_path():
  data, noise = normal(0, 8, 3, 2), normal(1, 8, 3, 2)
  t = jax.device_put(np.array([0, 1] * 4, np.float32), P(BATCH))
  x = np.asarray(flow.interpolate(data, noise, t))
  np.testing.assert_array_equal(x[0::2], np.asarray(data)[0::2])
  np.testing.assert_array_equal(x[1::2], np.asarray(noise)[1::2])


def test_the_true_velocity_has_zero_loss_and_a_constant_error_its_square():
  data, noise = normal(0, 8, 4, 4, 2), normal(1, 8, 4, 4, 2)
  assert not flow.loss(noise - data, data, noise).any()
  loss = flow.loss((noise - data + 0.5).astype(jnp.bfloat16), data, noise)
  assert loss.dtype == jnp.float32 and loss.shape == (8,)
  np.testing.assert_allclose(loss, 0.25, rtol=1e-2)


def test_times_are_the_shifted_logit_normal():
  numbers = sharding.shard(np.arange(40000, dtype=np.uint32))
  t = np.asarray(flow.sample_time(jax.random.key(0), numbers, mean=0.4, std=0.8, shift=3.0))
  assert t.dtype == np.float32 and (t > 0).all() and (t < 1).all()
  # A shift by s adds log s to the logit.
  logit = np.log(t / (1 - t))
  np.testing.assert_allclose(logit.mean(), 0.4 + np.log(3.0), atol=0.02)
  np.testing.assert_allclose(logit.std(), 0.8, atol=0.02)


def test_noise_belongs_to_a_number_and_not_to_its_place():
  """The same bits in any order, any batch and on any mesh, sharded as the numbers are; others for other numbers."""
  noise, key = jax.jit(flow.noise, static_argnums=2), jax.random.key(0)
  numbers = np.array([7, 2 ** 32 - 1, 0, 5, 6, 4, 3, 9], np.uint32)
  whole = noise(key, sharding.shard(numbers), (4, 2))
  assert whole.dtype == jnp.float32 and jax.typeof(whole).sharding.spec == P(BATCH, None, None)
  for order in (slice(None, None, -1), slice(0, 4), [3, 1, 6, 2]):
    np.testing.assert_array_equal(noise(key, sharding.shard(numbers[order]), (4, 2)), np.asarray(whole)[order])
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(fsdp=8))):
    np.testing.assert_array_equal(noise(jax.random.key(0), sharding.shard(numbers), (4, 2)), whole)
  other = noise(jax.random.key(1), sharding.shard(numbers), (4, 2))
  assert len(np.unique(whole)) == whole.size and (whole != other).all()


def test_krea2_shift_and_sampling_times_are_those_of_diffusers():
  scheduling = pytest.importorskip('diffusers.schedulers.scheduling_flow_match_euler_discrete')
  np.testing.assert_allclose([flow.shift_for(256), flow.shift_for(6400)], np.exp([0.5, 1.15]), rtol=1e-6)
  np.testing.assert_allclose(flow.shift_for(4096), np.exp(0.90625), rtol=1e-6)
  assert flow.shift_for(64, ((64, 0.0), (256, 1.0))) == 1.0
  scheduler = scheduling.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
  scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 7, 7), mu=np.log(flow.shift_for(1024)))
  np.testing.assert_allclose(flow.timesteps(7, flow.shift_for(1024)), scheduler.sigmas.numpy(), rtol=1e-5, atol=1e-6)


def test_sampling_times_that_start_later_are_the_rest_of_the_way():
  for shift in (1.0, 3.0):
    whole = flow.timesteps(6, shift)
    np.testing.assert_allclose(flow.timesteps(4, shift, whole[2]), whole[2:], rtol=1e-5)
  assert not np.asarray(flow.timesteps(3, 2.0, 0.0)).any()


def test_guidance_of_one_is_off():
  cond, uncond = normal(0, 8, 3), normal(1, 8, 3)
  np.testing.assert_allclose(flow.guide(cond, uncond, 1.0), cond, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(flow.guide(cond, uncond, 0.0), uncond)
  np.testing.assert_allclose(flow.guide(cond, uncond, 4.5), cond + 3.5 * (cond - uncond), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('method', ['euler', 'heun'])
def test_a_straight_path_is_exact_in_any_number_of_steps(method):
  data, noise = normal(0, 8, 4, 2), normal(1, 8, 4, 2)
  for steps in (1, 5):
    x = jax.jit(lambda n: flow.sample(lambda x, t: noise - data, n, flow.timesteps(steps, 2.0), method))(noise)
    np.testing.assert_allclose(x, data, atol=1e-5)
    assert jax.typeof(x).sharding.spec[0] == BATCH


@pytest.mark.parametrize('method, order', [('euler', 1), ('heun', 2)])
def test_order_of_convergence(method, order):
  # dx/dt = 3 t^2 x from t = 1 to 0: x(0) = x(1) / e.
  def error(steps):
    x = flow.sample(lambda x, t: 3 * t[:, None] ** 2 * x, jnp.ones((8, 1), out_sharding=P(BATCH)),
                    flow.timesteps(steps), method)
    return abs(np.asarray(x)[0, 0] - np.exp(-1.0))
  np.testing.assert_allclose(np.log2(error(32) / error(64)), order, atol=0.15)


def test_unknown_method_is_refused():
  with pytest.raises(ValueError, match="choose 'euler' or 'heun'"):
    flow.sample(lambda x, t: x, normal(0, 8, 2), flow.timesteps(2), 'rk4')


@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
def test_new_noise_between_steps_leads_to_the_same_distribution(eta):
  """Data of N(0.5, 0.3^2): its velocity is known. Without the right share of old noise the spread would be off."""
  mean, std = 0.5, 0.3

  def velocity(x, t):
    t = t[:, None]
    spread = ((1 - t) * std) ** 2 + t ** 2
    return -mean + (t - (1 - t) * std ** 2) / spread * (x - (1 - t) * mean)

  keys = jax.random.wrap_key_data(jax.device_put(
      np.random.default_rng(0).integers(0, 2 ** 32, (64, 2), np.uint32), P(BATCH)))
  noise = normal(0, 64, 512)
  sample = jax.jit(lambda n, k: flow.sample(velocity, n, flow.timesteps(400, 2.0), 'euler', eta, k))
  x = sample(noise, keys)
  assert jax.typeof(x).sharding.spec[0] == BATCH
  np.testing.assert_allclose([np.mean(x), np.std(x)], [mean, std], rtol=0.03)
  # New noise decides more of the image than the first noise the more of it there is.
  likeness = np.corrcoef(np.ravel(x), np.ravel(noise))[0, 1]
  assert abs(likeness - {0.0: 1.0, 0.5: likeness, 1.0: 0.0}[eta]) < 0.1 and (eta != 0.5 or 0.01 < likeness < 0.99)


def test_at_eta_0_new_noise_is_none():
  keys, noise = jax.random.split(jax.random.key(0), 8), normal(0, 8, 4)
  plain, with_keys = (flow.sample(lambda x, t: 3 * t[:, None] ** 2 * x, noise, flow.timesteps(8), 'euler', 0.0, k)
                      for k in (None, jax.sharding.reshard(keys, P(BATCH))))
  np.testing.assert_allclose(plain, with_keys, rtol=1e-5, atol=1e-6)
  with pytest.raises(ValueError, match='leave keys out'):
    flow.sample(lambda x, t: x, noise, flow.timesteps(2), 'heun', 1.0, keys)


@pytest.mark.parametrize('eta', [0.0, 1.0])
@pytest.mark.parametrize('start', [1.0, 0.5, 0.0])
def test_every_start_is_finite_and_from_zero_nothing_moves(start, eta):
  keys = jax.sharding.reshard(jax.random.split(jax.random.key(0), 8), P(BATCH))
  x = normal(0, 8, 4)

  def way(x):
    return flow.sample(lambda x, t: 3 * x, x, flow.timesteps(3, 2.0, start), 'euler', eta, keys)

  y, gradient = jax.jit(way)(x), jax.jit(jax.grad(lambda x: jnp.sum(way(x))))(x)
  assert np.isfinite(y).all() and np.isfinite(gradient).all()
  assert np.array_equal(y, x) == (start == 0)


def test_the_way_in_parts_is_the_way():
  """New noise goes by the number of its step within the whole way."""
  keys = jax.sharding.reshard(jax.random.split(jax.random.key(0), 8), P(BATCH))
  times, x = flow.timesteps(5, 2.0), normal(0, 8, 4)
  part = lambda x, times, first: flow.sample(lambda x, t: 3 * t[:, None] ** 2 * x, x, times, 'euler', 0.7, keys, first)
  whole, half = part(x, times, 0), part(x, times[:3], 0)
  np.testing.assert_allclose(part(half, times[2:], 2), whole, rtol=1e-5, atol=1e-6)
  assert np.abs(part(half, times[2:], 0) - whole).max() > 0.1
