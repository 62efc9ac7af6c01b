"""Random numbers of a request's seed, which may be any whole number."""

from collections.abc import Sequence
import numbers

import jax
import numpy as np

from unifusion_jax import sharding
from unifusion_jax.errors import clipped, UserError

TEXT_STREAM = 2 ** 32 - 1  # folded into a request's key to sample text; sampling steps fold in 0, 1, ...


def seeds(seed, count: int) -> list[int]:
  """Seeds of `count` images: numbers that count from `seed`, or those of a list with one for each.

  seed: a whole number; a generator of torch or NumPy, for the seed that it began with; or a key of jax, for the number
    that its words are. Their seeds alone count: the noise is ours, not what they would draw.
  """
  if _is_keys(seed):
    seed = list(seed)
  if isinstance(seed, (list, tuple)) or isinstance(seed, np.ndarray) and seed.ndim:
    if len(seed) != count:
      raise UserError(f'there are {len(seed)} seeds (or generators) for {count} images: give one for each, or one from '
                      'which they count')
    return [_number(each) for each in seed]
  first = _number(seed)
  return list(range(first, first + count))


def _number(seed) -> int:
  """The whole number that an entry of `seeds` stands for."""
  if isinstance(seed, numbers.Integral) and not isinstance(seed, bool):
    return int(seed)
  if callable(initial_seed := getattr(seed, 'initial_seed', None)):  # torch.Generator
    return initial_seed()
  sequence = seed.bit_generator.seed_seq if isinstance(seed, np.random.Generator) else None
  if isinstance(sequence, np.random.SeedSequence):
    entropy = sequence.entropy
    if isinstance(entropy, int) and not sequence.spawn_key:
      return entropy
    return int.from_bytes(sequence.generate_state(4).tobytes())
  if isinstance(seed, jax.Array):
    words = jax.random.key_data(seed) if _is_typed(seed) else seed
    if words.ndim == 1 and words.dtype == np.uint32:
      return int.from_bytes(np.asarray(words).astype('>u4').tobytes())
  raise UserError(f'seed={clipped(repr(seed))} must be a whole number, a generator of torch or NumPy, a key of jax, or '
                  'a list with one of them for each image')


def _is_typed(x: jax.Array) -> bool:
  return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _is_keys(x) -> bool:
  """Whether x is an array of several keys."""
  return isinstance(x, jax.Array) and x.ndim == (1 if _is_typed(x) else 2)


def generator(seed: int) -> np.random.Generator:
  """The random numbers of any whole number, also below 0 or of more than 64 bits."""
  return np.random.default_rng(np.random.SeedSequence(abs(seed), spawn_key=(1,) if seed < 0 else ()))


def keys(seeds: Sequence[int], stream: int | None = None) -> jax.Array:
  """Random keys [b], one for each seed (modulo 2^32); each `stream` is an independent set of them."""
  keys = jax.vmap(jax.random.key)(np.array([seed % 2 ** 32 for seed in seeds], np.uint32))
  if stream is not None:
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, stream)
  return jax.random.wrap_key_data(sharding.shard(np.asarray(jax.random.key_data(keys))))
