"""Layerwise attention pooling: which token reaches which, scales that real VLMs have, and its place in Krea 2."""

import dataclasses

from flax import nnx
import jax
from jax import P
import jax.numpy as jnp
import numpy as np
import pytest

from unifusion_jax import sharding
from unifusion_jax.models import lap as module
from unifusion_jax.models.lap import LAP, LAPConfig
from unifusion_jax.sharding import BATCH

CONFIG = LAPConfig(width=32, taps=3, heads=4, kv_heads=2, mlp=48)
B, S = 4, 5


def make(config=CONFIG) -> LAP:
  """A pooling whose every parameter is random."""
  rng = np.random.default_rng(0)
  def fill(x):
    fan_in = config.width if x.ndim > 2 else 100.0
    return jax.device_put(rng.standard_normal(x.shape, np.float32) * fan_in ** -0.5, x.sharding)
  return jax.tree.map(fill, sharding.abstract(jax.eval_shape(lambda: LAP(config, 24, rngs=nnx.Rngs(0))),
                                              jax.sharding.get_mesh()))


def hidden(seed=0):
  return np.random.default_rng(seed).standard_normal((B, S, CONFIG.taps, CONFIG.width), np.float32)


def put(x):
  return jax.device_put(x, P(BATCH))


def call(lap, states, mask):
  return np.asarray(jax.jit(lambda lap, h, m: lap(h, m))(lap, put(states), put(mask)))


def test_starts_as_the_mean_of_its_taps():
  """Before any training, and without blocks between, taps of any order and their mean in the place of each are one."""
  lap = LAP(dataclasses.replace(CONFIG, depth=0), 24, rngs=nnx.Rngs(0))
  states, mask = hidden(), np.ones((B, S), bool)
  pooled = call(lap, states, mask)
  mean = np.broadcast_to(states.mean(2, keepdims=True), states.shape)
  np.testing.assert_allclose(call(lap, mean, mask), pooled, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(call(lap, states[:, :, ::-1], mask), pooled, rtol=1e-4, atol=1e-5)
  assert np.abs(call(lap, np.broadcast_to(states[:, :, :1], states.shape), mask) - pooled).max() > 0.1


@pytest.mark.parametrize('remat', [False, True])
def test_parts_are_the_whole(remat, monkeypatch):
  """Values and gradients of five tokens at once and of two at a time, the last part padded."""
  lap = make(dataclasses.replace(CONFIG, remat=remat))
  states, mask = put(hidden()), put(np.arange(S) < np.full((B, 1), 4))
  weights = np.random.default_rng(1).standard_normal((B, S, 24), np.float32)

  def run():
    loss = lambda lap: jnp.sum(jnp.where(mask[..., None], lap(states, mask), 0) * weights)
    return jax.jit(jax.value_and_grad(loss))(lap)

  value, gradient = run()
  monkeypatch.setattr(module, 'HIDDEN', 2 * CONFIG.taps * CONFIG.mlp * 4)  # of two tokens in f32; one example a device
  text = str(jax.make_jaxpr(lambda lap: lap(states, mask))(lap))
  assert '[8@(data,fsdp),3,32]' in text and '[20@(data,fsdp),3,32]' not in text
  parts_value, parts_gradient = run()
  np.testing.assert_allclose(parts_value, value, rtol=1e-4, atol=1e-4)
  for a, b in zip(jax.tree.leaves(parts_gradient), jax.tree.leaves(gradient)):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_padding_changes_nothing_whatever_it_holds():
  mask = np.arange(S) < np.array([5, 3, 1, 2])[:, None]
  one, two = hidden(), hidden()
  two[~mask] = np.resize([np.nan, np.inf, 7.0], two[~mask].shape)
  lap = make()
  a, b = call(lap, one, mask), call(lap, two, mask)
  np.testing.assert_array_equal(a[mask], b[mask])
  longer = call(lap, np.pad(one, ((0, 0), (0, 2), (0, 0), (0, 0))), np.pad(mask, ((0, 0), (0, 2))))
  np.testing.assert_allclose(longer[:, :S][mask], a[mask], rtol=1e-4, atol=1e-5)


def test_refiner_looks_both_ways_and_layers_stay_within_a_token():
  lap, mask, states = make(), np.ones((B, S), bool), hidden()
  changed = states.copy()
  changed[:, 2] += 1.0
  moved = np.abs(call(lap, changed, mask) - call(lap, states, mask)).max(-1)
  assert (moved > 1e-4).all()
  alone = make(dataclasses.replace(CONFIG, refiner_depth=0))
  moved = np.abs(call(alone, changed, mask) - call(alone, states, mask)).max(-1)
  assert (moved[:, 2] > 1e-3).all() and (np.delete(moved, 2, axis=1) == 0).all()


def test_a_row_of_padding_is_finite_and_so_are_its_gradients():
  mask = put(np.arange(S) < np.array([5, 0, 1, 0])[:, None])
  def loss(lap, states):
    return jnp.sum(lap(states, mask) ** 2)
  value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(make(), put(hidden()))
  assert np.isfinite(value)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
  assert (np.asarray(gradients[1])[1] == 0).all()


def test_attention_sinks_and_taps_of_very_different_scale_survive_bf16():
  states = hidden() * np.array([0.05, 1.0, 40.0], np.float32)[:, None]
  states[:, 0, 1:, :2] = 24000.0
  mask = np.ones((B, S), bool)
  lap = make()
  exact = call(lap, states, mask)
  rounded = call(lap, states.astype(jnp.bfloat16), mask).astype(np.float32)
  error = np.linalg.norm(rounded - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
  assert error.max() < 0.08, error
  # What the smallest tap says still reaches the other tokens, half a million times below the sink.
  other = states.copy()
  other[:, 1:, 0] = -other[:, 1:, 0]
  wanted = (call(lap, other, mask) - exact)[:, 1:]
  moved = (call(lap, other.astype(jnp.bfloat16), mask).astype(np.float32) - rounded)[:, 1:]
  assert np.linalg.norm(moved - wanted) < 0.4 * np.linalg.norm(wanted)
  gradient = jax.jit(jax.grad(lambda lap, h: jnp.sum(lap(h, put(mask)).astype(jnp.float32) ** 2)))(
      lap, put(states.astype(jnp.bfloat16)))
  assert all(np.isfinite(g.astype(jnp.float32)).all() for g in jax.tree.leaves(gradient))


def test_wrong_taps_are_refused():
  with pytest.raises(ValueError, match='3 taps of width 16 .* pools 3 of width 32'):
    make()(put(hidden()[..., :16]), put(np.ones((B, S), bool)))


def test_same_as_krea2_text_fusion():
  torch = pytest.importorskip('torch')
  krea = pytest.importorskip('diffusers.models.transformers.transformer_krea2')
  from unifusion_jax.models import lap as module
  from unifusion_jax.weights import convert
  torch.manual_seed(0)
  fusion = krea.Krea2TextFusion(3, 32, 4, 2, 48, 2, 2, 1e-5)
  projection = krea.Krea2TextProjection(32, 24, 1e-5)
  tensors = {f'text_fusion.{k}': v for k, v in fusion.state_dict().items()}
  tensors |= {f'txt_in.{k}': v for k, v in projection.state_dict().items()}
  with torch.no_grad():
    for tensor in tensors.values():
      tensor.add_(0.3 * torch.randn(tensor.shape))

  class Holder(nnx.Module):
    def __init__(self):
      self.lap = LAP(CONFIG, 24, rngs=nnx.Rngs(0))

  ours = convert.load(Holder, {k: v.numpy() for k, v in tensors.items()}, module.RULES, {}).lap
  mask = np.arange(S) < np.array([5, 3, 1, 4])[:, None]
  with torch.no_grad():
    theirs = projection(fusion(torch.tensor(hidden()), torch.tensor(mask)[:, None, None, :])).numpy()
  np.testing.assert_allclose(call(ours, hidden(), mask)[mask], theirs[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [None])  # in place of the fixture
@pytest.mark.parametrize('shape', [(2, 1, 1), (2, 4, 1), (1, 2, 1)])
def test_a_batch_of_one_row_a_device(shape, mesh):
  """As many rows as devices share, or as the first axis has: rows are split the way they were joined."""
  devices = np.array(jax.devices()[:int(np.prod(shape))]).reshape(shape)
  made = jax.sharding.Mesh(devices, sharding.AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 3)
  rows = shape[0] * shape[1]
  with jax.set_mesh(made):
    config = LAPConfig(width=16, taps=2, depth=1, refiner_depth=1, heads=2, kv_heads=2, mlp=16)
    model = LAP(config, 16, rngs=nnx.Rngs(0))
    hidden = jax.device_put(np.ones((rows, 8, 2, 16), np.float32), P(sharding.BATCH))
    mask = jax.device_put(np.ones((rows, 8), bool), P(sharding.BATCH))
    out = jax.jit(lambda m, h, k: m(h, k))(model, hidden, mask)
    assert jax.typeof(out).sharding.spec[0] == sharding.BATCH and np.isfinite(np.asarray(out)).all()
