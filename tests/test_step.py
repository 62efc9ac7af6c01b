"""The train step's arithmetic: EMA, schedule, clipping, Muon's dimensions, micro-batches."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unifusion_jax import sharding
from unifusion_jax.models import layers
from unifusion_jax.training import step


def square(params, frozen, batch, key):
  """Mean over the batch of (w . x - y)^2 / 2, and a random scalar that shows which key came."""
  del frozen
  error = jnp.einsum('bd,d->b', batch['x'], params['w']) - batch['y']
  value = jnp.mean(jnp.square(error)) / 2
  return value, dict(loss=value, largest=jnp.max(error), drawn=jax.random.uniform(key))


def examples(rows: int = 16, width: int = 4) -> dict:
  rng = np.random.default_rng(0)
  batch = dict(x=rng.normal(size=(rows, width)).astype(np.float32), y=rng.normal(size=rows).astype(np.float32))
  return jax.device_put(batch, jax.P(sharding.BATCH))


def started(config: step.OptimConfig, steps: int = 10, loss=square):
  tx = step.optimizer(config, steps)
  state = jax.jit(lambda: step.init({'w': jnp.linspace(-1.0, 1.0, 4)}, tx))()
  return state, step.make_train_step(loss, tx, config)


def test_ema_is_short_at_first_and_long_later():
  """decay = min(ema, (1 + step) / (10 + step)), step counted from 0."""
  state, train_step = started(step.OptimConfig(learning_rate=0.1, warmup=0, decay=0.0, ema=0.3), 100)
  average = np.asarray(state.params['w'])
  for i in range(6):
    state, _ = train_step(state, None, examples(), jax.random.key(0))
    decay = min(0.3, (1 + i) / (10 + i))
    average = decay * average + (1 - decay) * np.asarray(state.params['w'])
    np.testing.assert_allclose(state.ema['w'], average, rtol=1e-5)
    assert int(state.step) == i + 1
  assert (1 + 2) / (10 + 2) < 0.3 < (1 + 3) / (10 + 3)  # both kinds of step were seen
  assert np.abs(state.ema['w'] - state.params['w']).max() > 1e-4


@pytest.mark.parametrize('settings, at', [
    (dict(warmup=10, decay=0.5), {0: 0.0, 5: 0.5, 10: 1.0, 50: 1.0, 75: 0.505, 100: 0.01}),
    (dict(warmup=0, decay=0.0), {0: 1.0, 50: 1.0, 99: 1.0}),
    (dict(warmup=80, decay=0.4), {0: 0.0, 30: 0.5, 60: 1.0, 80: 0.505, 100: 0.01}),  # warm-up ends where decay begins
    (dict(warmup=10, decay=1.0), {0: 1.0, 50: 0.505, 100: 0.01}),
])
def test_schedule(settings, at):
  rate = step.schedule(step.OptimConfig(learning_rate=2.0, **settings), 100)
  for i, share in at.items():
    assert float(rate(i)) == pytest.approx(2.0 * share, abs=1e-6), i


@pytest.mark.parametrize('before, now, at, progress, after, text', [
    ((300, 0), (300, 0), 200, 0.0, 0.0, None),
    ((300, 0), (600, 0), 300, 0.0, 0.0,
     'train.steps 300 -> 600: the learning rate rises back from 0.02 to 2 and falls from step 480 to step 600'),
    ((300, 0), (600, 0), 100, 0.0, 0.0,
     'train.steps 300 -> 600: the learning rate stays at 2 and falls from step 480 to step 600'),
    ((600, 0), (300, 0), 270, 0.0, 0.0,
     'train.steps 600 -> 300: the learning rate drops from 2 to 1.01 and goes on falling until step 300'),
    ((9, 10), (9, 20), 77, 1.0, 0.5,
     'train.minutes 10 -> 20: the learning rate rises back from 0.02 to 2 and falls from minute 16 to minute 20'),
    ((9, 20), (9, 10), 77, 0.45, 0.9,
     'train.minutes 20 -> 10: the learning rate drops from 2 to 1.01 and goes on falling until minute 10'),
    ((9, 10), (8, 10), 77, 0.3, 0.3, None),  # the clock counts
    ((600, 0), (600, 10), 100, 0.0, 0.0,
     'train.minutes 0 -> 10: the learning rate stays at 2 and falls from minute 8 to minute 10'),
    ((300, 10), (300, 0), 100, 1.0, 0.0,
     'train.minutes 10 -> 0: the learning rate rises back from 0.02 to 2 and falls from step 240 to step 300'),
])
def test_a_longer_or_shorter_run_says_what_its_learning_rate_does(before, now, at, progress, after, text):
  before, now = (dict(steps=steps, minutes=minutes) for steps, minutes in (before, now))
  settings = step.OptimConfig(learning_rate=2.0, warmup=0, decay=0.2)
  assert step.rescheduled(settings, before, now, at, progress) == (pytest.approx(after), text)


def test_a_longer_run_without_decay_goes_on_as_it_was():
  before, now = dict(steps=3, minutes=0), dict(steps=6, minutes=0)
  said = step.rescheduled(step.OptimConfig(learning_rate=2.0, warmup=0, decay=0.0), before, now, 3, 0.0)
  assert said == (0.0, 'train.steps 3 -> 6: the learning rate stays at 2 and does not fall')


def test_the_first_step_is_adamws_under_a_clipped_gradient():
  """Adam's first step has the size of the learning rate whatever the gradient; weight decay adds lr * wd * w."""
  config = step.OptimConfig(learning_rate=0.5, warmup=0, decay=0.0, weight_decay=0.1, clip=1e-3)
  state, train_step = started(config)
  w, gradient = np.asarray(state.params['w']), jax.grad(lambda p: square(p, None, examples(), jax.random.key(0))[0])(
      state.params)['w']
  after, metrics = train_step(state, None, examples(), jax.random.key(0))
  np.testing.assert_allclose(after.params['w'], w - 0.5 * (np.sign(gradient) + 0.1 * w), rtol=1e-3)
  assert float(metrics['gradient_norm']) == pytest.approx(float(jnp.linalg.norm(gradient)), rel=1e-5)  # before clipping


@pytest.mark.parametrize('parts', [2, 4])
def test_accumulation_equals_one_batch(parts):
  """Gradients, loss and the updated state, from one key; a metric that is no mean is averaged over the parts."""
  config = step.OptimConfig(learning_rate=0.1, warmup=0, accumulate=parts)
  state, train_step = started(config)
  whole, whole_step = started(dataclasses.replace(config, accumulate=1))
  state, metrics = train_step(state, None, examples(), jax.random.key(3))
  whole, wanted = whole_step(whole, None, examples(), jax.random.key(3))
  for name in ('loss', 'gradient_norm'):
    np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-5)
  np.testing.assert_allclose(state.params['w'], whole.params['w'], rtol=1e-5)
  np.testing.assert_allclose(state.ema['w'], whole.ema['w'], rtol=1e-5)
  np.testing.assert_allclose(metrics['drawn'], wanted['drawn'], rtol=1e-6)
  batch = jax.device_get(examples())
  errors = batch['x'] @ np.linspace(-1, 1, 4, dtype=np.float32) - batch['y']
  np.testing.assert_allclose(metrics['largest'], np.mean([errors[k::parts].max() for k in range(parts)]), rtol=1e-5)


def test_accumulation_compiles_the_gradient_once():
  """As many products in the program of four parts as in that of one, each of the rows of one part."""
  shapes = set()

  def recording(params, frozen, batch, key):
    shapes.add(batch['x'].shape)
    return square(params, frozen, batch, key)

  def products(parts: int) -> int:
    state, train_step = started(step.OptimConfig(accumulate=parts), loss=recording)
    lowered = train_step.lower(state, None, examples(8 * parts), jax.random.key(0))
    return lowered.as_text().count('dot_general')

  assert products(4) == products(1) > 0
  assert shapes == {(8, 4)}


def test_micro_batches_of_sharded_parameters_stay_sharded():
  """A parameter split over fsdp keeps its sharding through gradients, moments and EMA."""
  config = step.OptimConfig(learning_rate=0.1, warmup=0, accumulate=2)
  tx = step.optimizer(config, 10)
  w = jax.device_put(np.linspace(-1, 1, 4, dtype=np.float32), jax.P('fsdp'))
  state, train_step = step.init({'w': w}, tx), step.make_train_step(
      lambda p, *rest: square({'w': jax.sharding.reshard(p['w'], jax.P())}, *rest), tx, config)
  specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, state)
  whole, whole_step = started(dataclasses.replace(config, accumulate=1))
  after, _ = train_step(state, None, examples(), jax.random.key(3))
  wanted, _ = whole_step(whole, None, examples(), jax.random.key(3))
  assert jax.tree.map(lambda x: jax.typeof(x).sharding.spec, after) == specs
  np.testing.assert_allclose(after.params['w'], wanted.params['w'], rtol=1e-5)


def test_muon_takes_each_layers_matrix_by_itself():
  """Stacked layers give what each layer gives alone; a matrix with more output dims is seen flattened."""
  config = step.OptimConfig('muon', learning_rate=0.1, warmup=0, clip=1e9)
  make = lambda rngs: nnx.Dict(w=layers.weight(rngs, (16, 2, 4), ('fsdp', 'tp', None), contract=1))
  params = layers.stack(make, 3, rngs=nnx.Rngs(0))
  gradients = jax.tree.map(lambda x: jax.device_put(
      np.random.default_rng(0).normal(size=x.shape).astype(np.float32), x.sharding), params)
  tx = step.optimizer(config, 10)
  stacked = np.asarray(jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(gradients, params)['w'][...])
  for i in range(3):
    reference = optax.contrib.muon(0.1, adam_b1=config.b1, adam_b2=config.b2, consistent_rms=0.2)
    one, gradient = (jnp.asarray(np.asarray(tree['w'][...])[i].reshape(16, 8)) for tree in (params, gradients))
    alone = reference.update({'w': gradient}, reference.init({'w': one}), {'w': one})[0]['w']
    np.testing.assert_allclose(stacked[i].reshape(16, 8), alone, rtol=2e-2, atol=1e-4)
