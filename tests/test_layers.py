"""The product everything is made of, against what jax does by itself; taps, and pixels that come as uint8."""

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
