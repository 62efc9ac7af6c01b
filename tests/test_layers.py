"""The two products everything is made of, against what jax does by itself."""

import jax
from jax import P
import jax.numpy as jnp
import numpy as np
import pytest

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


@pytest.mark.parametrize('causal, mask_shape, mask_spec', [
    (False, None, None), (True, None, None), (False, (4, 1, 1, 5), P(BATCH)), (True, (4, 1, 5, 5), P(BATCH)),
    (False, (4, 4, 5, 5), P(BATCH, 'tp')), (False, (5, 5), P())])
def test_attention_and_its_gradient_are_those_of_jax(causal, mask_shape, mask_spec):
  heads = P(BATCH, None, 'tp')
  q, k, v = (normal(i, (4, 5, n, 8), heads) for i, n in enumerate((4, 2, 2)))
  mask = None
  if mask_shape:
    mask = np.random.default_rng(3).random(mask_shape) < 0.5
    mask |= np.eye(5, dtype=bool)[0 if mask_shape[-2] == 1 else slice(None)]
  sharded = None if mask is None else jax.device_put(mask, mask_spec)
  wide = None if mask is None else jnp.asarray(mask.reshape((1,) * (4 - mask.ndim) + mask.shape))
  ours = lambda q, k, v: layers.attention(q, k, v, sharded, causal=causal)
  theirs = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=wide, is_causal=causal)
  value = lambda f: lambda *qkv: jnp.sum(jnp.sin(f(*qkv)))
  gradients = jax.jit(jax.value_and_grad(value(ours), (0, 1, 2)))(q, k, v)
  expected = jax.jit(jax.value_and_grad(value(theirs), (0, 1, 2)))(*map(np.asarray, (q, k, v)))
  for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  assert jax.typeof(gradients[1][0]) == jax.typeof(q)


def test_attention_of_bf16_is_as_exact_as_bf16_and_a_row_without_keys_is_finite():
  heads = P(BATCH, None, 'tp')
  q, k, v = (normal(i, (4, 5, 2, 8), heads, jnp.bfloat16) for i in range(3))
  y = layers.attention(q, k, v)
  assert y.dtype == jnp.bfloat16
  exact = jax.nn.dot_product_attention(*(np.asarray(x, np.float32) for x in (q, k, v)))
  np.testing.assert_allclose(np.asarray(y, np.float32), exact, atol=0.02)
  nothing = jax.device_put(np.zeros((4, 1, 1, 5), bool), P(BATCH))
  assert np.isfinite(np.asarray(layers.attention(q, k, v, nothing), np.float32)).all()
