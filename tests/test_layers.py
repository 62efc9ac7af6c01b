"""The product everything is made of, against what jax does by itself; taps, and pixels that come as uint8."""

import math
import re

from flax import nnx
import jax
from jax import P
import jax.numpy as jnp
import numpy as np
import pytest

from unifusion_jax import sharding
from unifusion_jax.models import layers
from unifusion_jax.sharding import BATCH


def normal(seed, shape, spec, dtype=jnp.float32):
  return jax.device_put(np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype), spec)


@pytest.mark.parametrize('equation, shape, spec, out', [
    ('bsd,df->bsf', (8, 12), ('fsdp', 'tp'), None),
    ('bsd,dhk->bshk', (8, 4, 6), ('fsdp', 'tp', None), None),
    ('bsd,df->bsf', (8, 12), ('tp', 'fsdp'), P(BATCH))])
def test_einsum_has_the_gradients_of_einsum_and_the_shardings_of_its_arguments(equation, shape, spec, out):
  x, w = normal(0, (4, 5, 8), P(BATCH)), normal(1, shape, P(*spec))
  loss = lambda product: lambda x, w: jnp.sum(jnp.sin(product(x, w)))
  ours = jax.jit(jax.grad(loss(lambda x, w: layers.einsum(equation, x, w, out)), (0, 1)))(x, w)
  wanted = jax.grad(loss(lambda x, w: jnp.einsum(equation, x, w)), (0, 1))(*map(np.asarray, (x, w)))
  for a, b, like in zip(ours, wanted, (x, w)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert jax.typeof(a) == jax.typeof(like)


def test_the_gradient_of_a_weight_is_f32_where_the_compute_dtype_is_bfloat16():
  """As exact as a sum in f32 of the same rounded numbers; the gradient of x stays in the compute dtype."""
  x, w = normal(0, (8, 64, 32), P(BATCH), jnp.bfloat16), normal(1, (32, 48), P('fsdp', 'tp'))
  loss = lambda x, w: jnp.sum(layers.einsum('bsd,df->bsf', x, w).astype(jnp.float32) ** 2)
  of_x, of_w = jax.jit(jax.grad(loss, (0, 1)))(x, w)
  assert of_x.dtype == jnp.bfloat16 and of_w.dtype == jnp.float32
  wide = np.asarray(x, np.float64).reshape(-1, 32)
  y = np.asarray(layers.einsum('bsd,df->bsf', x, w), np.float32)
  coming = np.asarray(jnp.asarray(2 * y).astype(jnp.bfloat16), np.float64).reshape(-1, 48)
  exact = wide.T @ coming
  assert np.abs(of_w - exact).max() < 1e-5 * np.abs(exact).max()
  assert (np.asarray(of_w) != np.asarray(of_w.astype(jnp.bfloat16), np.float32)).mean() > 0.9  # it was never rounded


def test_a_weight_says_which_of_its_axes_a_product_sums_over():
  """By what it was told, whatever its sizes; the same in a stack of layers, in its shapes and in its gradient."""
  make = lambda rngs: nnx.Dict(
      square=layers.weight(rngs, (64, 64, 64), (), contract=1, std=1 / 64), join=layers.weight(rngs, (8, 4, 16), (), 2),
      table=layers.weight(rngs, (16, 16), (), contract=None, std=0.25), bias=layers.constant(0.0, (4,)))
  wanted = {'square': (-3,), 'join': (-3, -2), 'table': None, 'bias': None}
  one, stacked = make(nnx.Rngs(0)), layers.stack(make, 3, rngs=nnx.Rngs(0))
  shapes = jax.eval_shape(lambda: layers.stack(make, 3, rngs=nnx.Rngs(0)))
  layer = jax.tree.map(lambda x: x[1], stacked)
  for module in (one, stacked, shapes, layer, jax.grad(lambda m: jnp.sum(m.join[...]))(one)):
    assert {name: layers.contracted(module[name]) for name in wanted} == wanted
  spread = {name: float(np.std(stacked[name])) for name in ('square', 'join', 'table')}
  for name, std in dict(square=1 / 64, join=32 ** -0.5, table=0.25).items():
    assert abs(spread[name] / std - 1) < 0.15, name
  for contract, std in ((None, None), (0, None), (2, None), (2, 0.1)):
    with pytest.raises(ValueError, match='cannot contract'):
      layers.weight(nnx.Rngs(0), (4, 8), (), contract, std=std)


def test_taps_come_before_what_is_done_after_a_layer():
  """Layer i adds i to x; after it x doubles; the carry tells in which order the layers came."""
  x, stacked = jax.device_put(np.ones((4, 3, 2), np.float32), P(BATCH)), jnp.arange(4.0)
  block = lambda x, layer, index, carry: (x + layer, 10 * carry + index)
  after = lambda x, index: 2 * x
  run = jax.jit(lambda x: layers.scan_taps(block, x, stacked, (0, 2, 3), 3, carry=jnp.int32(0), after=after))
  x, tapped, carry = run(x)
  np.testing.assert_array_equal(np.asarray(tapped)[0, 0, :, 0], [1, 3, 8])  # 1; 2 (1 + 0) + 1; 2 * 3 + 2
  assert (np.asarray(x) == 16).all() and carry == 12
  x, tapped, carry = layers.scan_taps(lambda x, layer, *_: (x + layer, None), jnp.ones((4, 3, 2)), stacked)
  assert (np.asarray(x) == 7).all() and tapped is carry is None
  for taps, depth in (((2, 1), None), ((-1,), None), ((4,), 3), ((), 5)):
    with pytest.raises(ValueError, match='taps must increase'):
      layers.scan_taps(block, x, stacked, taps, depth)


def test_only_the_kept_tokens_are_tapped():
  x, stacked = jax.device_put(np.arange(24.0).reshape(4, 3, 2), P(BATCH)), jnp.arange(4.0)
  block = lambda x, layer, *_: (x + layer, None)
  keep = jax.device_put(np.array([[2, 0, 2, 2]] * 4), P(BATCH))
  run = jax.jit(lambda keep: layers.scan_taps(block, x, stacked, (0, 2, 3), keep=keep)[1])
  np.testing.assert_array_equal(run(keep), np.asarray(run(None))[:, [2, 0, 2, 2]])
  assert '4,3,3,2]' not in str(jax.make_jaxpr(run)(keep))  # [b s l d] never exists


def test_between_blocks_the_sequence_lies_over_tp_where_it_divides():
  stacked, seen = jnp.arange(2.0), []

  def block(x, layer, *_):
    seen.append(jax.typeof(x).sharding.spec)
    return x + layer, None

  for tokens, spec in ((4, P(BATCH, 'tp', None)), (3, P(BATCH, None, None))):
    x = jax.device_put(np.ones((4, tokens, 2)), P(BATCH))
    y, tapped, _ = layers.scan_taps(block, x, stacked, (1,))
    assert seen.pop() == spec and not jax.typeof(y).sharding.spec[1] and not jax.typeof(tapped).sharding.spec[1]
  spread = sharding.spread(jax.device_put(np.ones((8, 4, 2)), P(BATCH)))
  assert layers.stream(spread) == P(sharding.AXES) and layers.rows_of(spread) == P(sharding.AXES)
  assert layers.rows_of(sharding.spread(jax.device_put(np.ones((4, 4, 2)), P(BATCH)))) == P(BATCH)


def test_a_matrix_that_stays_in_place_is_moved_nowhere():
  """The same values and gradients; no device gathers the matrix."""
  x = jax.device_put(np.random.default_rng(0).standard_normal((4, 64), np.float32), P(BATCH))
  w = layers.weight(nnx.Rngs(0), (64, 6, 64), ('fsdp', None, 'tp'), contract=1)
  weights = np.random.default_rng(1).standard_normal((4, 6, 64), np.float32)
  value = lambda f: jax.jit(jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(f(x, w)) * weights), (0, 1)))
  ours = value(lambda x, w: layers.einsum_in_place('bd,dmf->bmf', x, w))
  theirs = value(lambda x, w: layers.einsum('bd,dmf->bmf', x, w, layers.RESIDUAL))
  for a, b in zip(jax.tree.leaves(ours(x, w)), jax.tree.leaves(theirs(x, w))):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert jax.typeof(a) == jax.typeof(b)
  text = ours.lower(x, w).compile().as_text()
  moved = [math.prod(map(int, dims.split(','))) for dims in re.findall(
      r'= f32\[([\d,]+)\][^=]*? (?:all-gather|all-to-all)\(', text)]
  assert moved and max(moved) < w.size / 16


def test_trained_layers_are_unrolled_over_cpus_and_all_are_scanned_over_devices_that_are_not_here(monkeypatch):
  def program(unroll=True):
    block = lambda x, layer: (x + layer, None)
    return str(jax.make_jaxpr(lambda x: layers.scan(block, x, jnp.arange(4.0), unroll=unroll))(1.0))
  monkeypatch.setattr(layers, 'UNROLL', None)
  assert 'unroll=4' in program() and 'unroll=1' in program(unroll=False)
  with jax.sharding.use_abstract_mesh(sharding.abstract_mesh(sharding.MeshConfig(fsdp=4, tp=2), 8)):
    assert 'unroll=1' in program()
  monkeypatch.setattr(layers, 'UNROLL', False)
  assert 'unroll=1' in program()


def test_attention_that_is_repeated_over_tp_is_told_once(caplog):
  assert layers.heads_axis(14, 2) == 'tp' and not caplog.records
  for _ in range(2):
    assert layers.heads_axis(15, 5) is None
  assert [record.getMessage() for record in caplog.records] == [
      'mesh.tp=2 does not divide 15 heads over 5 key/value heads: that attention is computed whole on each of the 2 '
      'devices; mesh.tp=1 divides them']
