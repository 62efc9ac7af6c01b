"""Attention of every model here: one function, without any [q s] array in its arguments.

Its masks are segment ids and causality, which fused kernels (splash on TPU, cuDNN on GPU) take as well. Letters as in
`layers.py`.
"""

import functools
import math

import jax
import jax.numpy as jnp

MASKED = -1e30  # a logit whose softmax weight is 0
LOGITS = 2 ** 27  # bytes of f32 logits that a device holds at a time; more are computed in blocks of queries


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, q_segments: jax.Array | None = None,
              kv_segments: jax.Array | None = None, causal: bool = False, q_offset: jax.Array | int = 0) -> jax.Array:
  """Softmax attention: q [b q h k], k and v [b s g k] with g dividing h -> [b q h k]. Softmax in f32.

  A query attends to the keys of its own segment, with `causal` only to those up to its own position.

  Args:
    q_segments, kv_segments: int32 [b q] and [b s], both or neither. Padding is segment 0 and attends to padding, so
      that every row stays finite. Without them all tokens are one segment.
    q_offset: the position of the first query among the keys (a cache's filled slots). Used with `causal` alone.
  """
  if (q_segments is None) != (kv_segments is None):
    raise ValueError('attention takes segment ids of queries and of keys, or neither')
  b, queries, heads, dim = q.shape
  keys, groups = k.shape[1:3]
  # Heads before tokens at once, and normalisation after the product with v: on CPU that is twice as fast as
  # jax.nn.dot_product_attention, gradient included.
  q = q.reshape(b, queries, groups, heads // groups, dim).transpose(0, 2, 3, 1, 4)
  k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

  def block(q, segments, first, k, v):
    """Queries [b g h q k] from position `first` on -> [b g h q k]."""
    logits = jnp.einsum('bghqk,bgsk->bghqs', q * dim ** -0.5, k, preferred_element_type=jnp.float32)
    seen = []
    if causal:
      seen.append((first + jnp.arange(q.shape[3]))[:, None] >= jnp.arange(keys))
    if segments is not None:
      seen.append((segments[:, :, None] == kv_segments[:, None])[:, None, None])
    if seen:
      logits = _at_most(logits, jnp.where(functools.reduce(jnp.logical_and, seen), jnp.inf, MASKED))
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    y = jnp.einsum('bghqs,bgsk->bghqk', weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (y / jnp.sum(weights, axis=-1, keepdims=True)).astype(v.dtype)

  size = block_size(q, keys)
  if size == queries:
    y = block(q, q_segments, q_offset, k, v)
  else:
    y = _in_blocks(block, size, q, q_segments, q_offset, k, v)
  return y.transpose(0, 3, 1, 2, 4).reshape(b, queries, heads, dim)


def block_size(q: jax.Array, keys: int) -> int:
  """Queries in a block of q [b g h q k] over a number of keys: a device's logits stay within LOGITS bytes."""
  *rows, queries, _ = jax.typeof(q).sharding.shard_shape(q.shape)
  most = max(1, LOGITS // (4 * keys * math.prod(rows)))
  return -(-queries // -(-queries // most))


def _in_blocks(block, size, q, segments, offset, k, v):
  """Attention in blocks of `size` queries. The backward pass recomputes logits, so one block's exist at a time."""
  queries = q.shape[3]
  count = -(-queries // size)

  def split(x, axis):
    x = jnp.pad(x, [(0, count * size - queries if i == axis else 0) for i in range(x.ndim)])
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1:]), axis, 0)

  # The gradients of k and v are sums over blocks: in f32, as in one product over all queries
  dtype, k, v = v.dtype, k.astype(jnp.float32), v.astype(jnp.float32)

  @jax.checkpoint
  def one(part):
    q, segments, first = part
    return block(q, segments, first, k.astype(dtype), v.astype(dtype))

  parts = split(q, 3), None if segments is None else split(segments, 1), offset + size * jnp.arange(count)
  y = jnp.moveaxis(jax.lax.map(one, parts), 0, 3)
  return y.reshape(*y.shape[:3], count * size, y.shape[-1])[:, :, :, :queries]


@jax.custom_jvp
def _at_most(logits, most):
  """Logits that are MASKED where `most` is. Their gradient there is 0 already, as their weights are.

  A minimum and no gradient of its own: with a select, attention's gradient took a third more on a CPU.
  """
  return jnp.minimum(logits, most)


@_at_most.defjvp
def _at_most_jvp(primals, tangents):
  y = _at_most(*primals)
  return y, jax.sharding.reshard(tangents[0], jax.typeof(y).sharding.spec)  # one example: `most` alone may be sharded
