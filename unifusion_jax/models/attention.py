"""Attention of every model here: one function, without any [q s] array in its arguments.

Its masks are segment ids and causality, which fused kernels take as well. Behind it are four implementations, equal up
to rounding:
  plain   all logits at once, where they are few
  blocks  blocks of queries, whose logits the backward pass computes again: any platform, any size
  splash  the Pallas kernel of TPUs, forward and backward, which keeps its logits on the chip
  cudnn   the kernel of GPUs, for bfloat16
Letters as in `layers.py`.
"""

import functools

import jax
from jax import P
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
import jax.numpy as jnp

MASKED = -1e30  # a logit whose softmax weight is 0
LOGITS = 2 ** 27  # bytes of f32 logits that a device holds at a time; more are computed in blocks of queries
FUSED = 512  # keys from which on a fused kernel is used; ours, measured on no chip
LANES = 128  # of a TPU: head dims and blocks are multiples
# Largest blocks (queries, keys) of the splash kernel by kind of chip, as AbstractDevice.device_kind has it. 512 is what
# public TPU trainers use; the chips with the larger matrix unit take more queries at a time (tuned on none of them).
BLOCKS = {'TPU v6 lite': (1024, 512), 'TPU7x': (1024, 512)}
BLOCK = (512, 512)  # of every other chip
CUDNN = 'cudnn'  # implementation of jax.nn.dot_product_attention


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, q_segments: jax.Array | None = None,
              kv_segments: jax.Array | None = None, causal: bool = False, q_offset: jax.Array | int = 0,
              key_bias: jax.Array | None = None, implementation: str | None = None) -> jax.Array:
  """Softmax attention: q [b q h k], k and v [b s g k] with g dividing h -> [b q h k]. Softmax in f32.

  A query attends to the keys of its own segment, with `causal` only to those up to its own position.

  Args:
    q_segments, kv_segments: [b q] and [b s], both or neither: int32 ids, or bool where every token is either in use or
      padding. Padding is segment 0 and attends to padding, so that every row stays finite. Without them all tokens are
      one segment. One array for both says that queries and keys are the same tokens.
    q_offset: the position of the first query among the keys (a cache's filled slots). Used with `causal` alone.
    key_bias: [b s] f32, added to the logits of each key: the logarithm of how often it counts. cuDNN
      takes none, and leaves such to `blocks`.
    implementation: None: chosen by the platform of the mesh in context and the size.
  """
  if (q_segments is None) != (kv_segments is None):
    raise ValueError('attention takes segment ids of queries and of keys, or neither')
  chosen = implementation or choice(q, k, q_segments, kv_segments, causal, q_offset)
  if chosen == 'cudnn' and key_bias is not None:
    chosen = 'blocks'
  if chosen in ('plain', 'blocks'):
    return _unfused(q, k, v, q_segments, kv_segments, causal, q_offset, key_bias, whole=chosen == 'plain')
  if key_bias is not None:  # kernels take none: values times their weights, over the weights themselves
    factor = jnp.exp(key_bias)[:, :, None, None].astype(v.dtype)
    v = jnp.concatenate([v * factor, factor * jnp.ones_like(v[..., :1])], axis=3)
    y = attention(q, k, v, q_segments=q_segments, kv_segments=kv_segments, causal=causal, implementation=chosen)
    return y[..., :-1] / y[..., -1:]
  kernel = dict(splash=_splash, cudnn=_cudnn)[chosen]
  return _on_each_device(kernel, causal, q_segments is kv_segments, q, k, v, q_segments, kv_segments)


def choice(q: jax.Array, k: jax.Array, q_segments, kv_segments, causal: bool, q_offset) -> str:
  """The name of the implementation for arguments of `attention`."""
  device = jax.sharding.get_abstract_mesh().abstract_device  # None for a mesh of absent devices
  platform = device and device.platform
  keys, dim = k.shape[1], q.shape[3]
  from_the_start = not causal or isinstance(q_offset, int) and q_offset == 0 and q.shape[1] == keys
  if platform in ('tpu', 'gpu', 'cuda') and keys >= FUSED and q.shape[1] >= LANES and from_the_start:
    if platform == 'tpu':
      return 'splash'
    lengths_do = q_segments is None or q_segments is kv_segments and q_segments.dtype == bool
    if lengths_do and q.dtype in (jnp.bfloat16, jnp.float16) and dim % 8 == 0 and dim <= 128:
      return 'cudnn'
  return 'plain' if block_size(q, keys) == q.shape[1] else 'blocks'


def block_size(q: jax.Array, keys: int) -> int:
  """Queries in a block of q [b q h k] over a number of keys: a device's logits stay within LOGITS bytes."""
  b, queries, heads, _ = jax.typeof(q).sharding.shard_shape(q.shape)
  most = max(1, LOGITS // (4 * keys * b * heads))
  return -(-queries // -(-queries // most))


def _unfused(q, k, v, q_segments, kv_segments, causal, q_offset, key_bias, whole) -> jax.Array:
  b, queries, heads, dim = q.shape
  keys, groups = k.shape[1:3]
  size = queries if whole else block_size(q, keys)
  spec = jax.typeof(q).sharding.spec
  if b == 1:  # of an axis of size 1 some operations forget the sharding, which says nothing there
    q, k, v, q_segments, kv_segments, key_bias = (
        x if x is None else jax.sharding.reshard(x, P(None, *jax.typeof(x).sharding.spec[1:]))
        for x in (q, k, v, q_segments, kv_segments, key_bias))
  # Heads before tokens at once, and normalisation after the product with v: on CPU that is twice as fast as
  # jax.nn.dot_product_attention, gradient included.
  q = q.reshape(b, queries, groups, heads // groups, dim).transpose(0, 2, 3, 1, 4)
  k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

  def block(q, segments, first, k, v):
    """Queries [b g h q k] from position `first` on -> [b g h q k]."""
    logits = jnp.einsum('bghqk,bgsk->bghqs', q * dim ** -0.5, k, preferred_element_type=jnp.float32)
    if key_bias is not None:
      logits += key_bias[:, None, None, None]
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

  if size == queries:
    y = block(q, q_segments, q_offset, k, v)
  else:
    y = _in_blocks(block, size, q, q_segments, q_offset, k, v)
  y = y.transpose(0, 3, 1, 2, 4).reshape(b, queries, heads, dim)
  return jax.sharding.reshard(y, P(*spec[:1], *jax.typeof(y).sharding.spec[1:])) if b == 1 else y


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
  return _at_most(*primals), tangents[0]


def _on_each_device(kernel, causal, same, q, k, v, q_segments, kv_segments) -> jax.Array:
  """`kernel` on each device's rows and heads; sequences are whole there."""
  local = functools.partial(kernel, device=jax.sharding.get_abstract_mesh().abstract_device, causal=causal)
  rows = P(jax.typeof(q).sharding.spec[0])
  segments = () if q_segments is None else (kv_segments,) if same else (q_segments, kv_segments)

  def run(q, k, v, *segments):
    return local(q, k, v, *(segments or (None,)) * (1 if len(segments) == 2 else 2))

  # Specs are inferred from the arrays
  return jax.shard_map(run, out_specs=jax.typeof(q).sharding.spec, check_vma=False)(
      q, k, v, *(jax.sharding.reshard(ids, rows) for ids in segments))


def _splash(q, k, v, q_segments, kv_segments, *, device, causal) -> jax.Array:
  """One device's attention by the splash kernel, one call for every key head; interpreted where there is no TPU."""
  queries, heads, dim = q.shape[1:]
  keys, groups, value_dim = k.shape[1], k.shape[2], v.shape[3]
  most = BLOCKS.get(device.device_kind, BLOCK)
  block_q, block_kv = (padded_block(n, largest) for n, largest in zip((queries, keys), most))
  all_queries, all_keys = -(-queries // block_q) * block_q, -(-keys // block_kv) * block_kv
  if q_segments is None and all_keys > keys:
    q_segments, kv_segments = (jnp.ones((len(q), n), jnp.int32) for n in (queries, keys))

  def padded(x, count):  # [b s n k] -> [b n s k]
    return jnp.pad(x, ((0, 0), (0, count - x.shape[1]), (0, 0), (0, -x.shape[3] % LANES))).transpose(0, 2, 1, 3)

  def ids(segments, count):  # padding to whole blocks is a segment of its own
    segments = segments.astype(jnp.int32)
    return jnp.pad(segments, ((0, 0), (0, count - segments.shape[1])), constant_values=-1)

  shape = all_queries, all_keys
  mask = splash_attention_mask.CausalMask(shape) if causal else splash_attention_mask.FullMask(shape)
  sizes = splash_attention_kernel.BlockSizes(
      block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv, block_q_dkv=block_q, block_kv_dkv=block_kv,
      block_kv_dkv_compute=block_kv, block_q_dq=block_q, block_kv_dq=block_kv)
  kernel = splash_attention_kernel.make_splash_mqa_single_device(
      splash_attention_mask.MultiHeadMask([mask] * (heads // groups)), block_sizes=sizes,
      interpret=device.platform != 'tpu')
  q = padded((q.astype(jnp.float32) * dim ** -0.5).astype(q.dtype), all_queries)
  q = q.reshape(len(q), groups, heads // groups, all_queries, -1)
  k, v = padded(k, all_keys), padded(v, all_keys)
  if q_segments is None:
    y = jax.vmap(jax.vmap(kernel))(q, k, v)
  else:
    of_rows = splash_attention_kernel.SegmentIds(ids(q_segments, all_queries), ids(kv_segments, all_keys))
    y = jax.vmap(jax.vmap(kernel, in_axes=(0, 0, 0, None)))(q, k, v, of_rows)
  y = jnp.reshape(y, (len(q), heads, all_queries, -1)).transpose(0, 2, 1, 3)
  return y[:, :queries, :, :value_dim].astype(v.dtype)


def padded_block(count: int, most: int) -> int:
  """The block up to `most`, a multiple of LANES, that costs `count` tokens least.

  It pads them to whole blocks, and each block costs about what 64 more of its tokens would.
  """
  return min(range(most, 0, -LANES), key=lambda size: -(-count // size) * (size + 64))


def _cudnn(q, k, v, q_segments, kv_segments, *, device, causal) -> jax.Array:
  """One device's attention by cuDNN, which masks by length alone: tokens in use go to the front, and back after it."""
  del device
  run = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation=CUDNN)
  if q_segments is None:
    return run(q, k, v)
  if q_segments is not kv_segments or q_segments.dtype != bool:
    raise ValueError('cuDNN takes lengths: attention over ids, or of queries that are not the keys, is for `blocks`')
  order = jnp.argsort(~kv_segments, axis=1, stable=True)
  back = jnp.argsort(order, axis=1)
  sort = lambda x, order: jnp.take_along_axis(x, order[:, :, None, None], axis=1)
  # A row of padding alone keeps one token: no softmax is over nothing
  lengths = jnp.maximum(jnp.sum(kv_segments, axis=1, dtype=jnp.int32), 1)
  y = run(*(sort(x, order) for x in (q, k, v)), query_seq_lengths=lengths, key_value_seq_lengths=lengths)
  y = jnp.where((jnp.arange(q.shape[1]) < lengths[:, None])[..., None, None], y, 0)
  return sort(y, back)
