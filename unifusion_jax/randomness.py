"""Random numbers of a request's seed, which may be any whole number."""

from collections.abc import Sequence

import jax
import numpy as np

from unifusion_jax import sharding

TEXT_STREAM = 2 ** 32 - 1  # folded into a request's key to sample text; sampling steps fold in 0, 1, ...


def generator(seed: int) -> np.random.Generator:
  """The random numbers of any whole number, also below 0 or of more than 64 bits."""
  return np.random.default_rng(np.random.SeedSequence(abs(seed), spawn_key=(1,) if seed < 0 else ()))


def keys(seeds: Sequence[int], stream: int | None = None) -> jax.Array:
  """Random keys [b], one for each seed (modulo 2^32); each `stream` is an independent set of them."""
  keys = jax.vmap(jax.random.key)(np.array([seed % 2 ** 32 for seed in seeds], np.uint32))
  if stream is not None:
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, stream)
  return jax.random.wrap_key_data(sharding.shard(np.asarray(jax.random.key_data(keys))))
