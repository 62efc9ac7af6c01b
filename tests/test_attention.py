"""The door to attention: against jax's own, whole and in blocks, and how much memory either takes."""

import functools

import jax
from jax import P
import jax.numpy as jnp
import numpy as np
import pytest

from unifusion_jax import sharding
from unifusion_jax.models import attention as module
from unifusion_jax.models.attention import attention
from unifusion_jax.planning import chips, compiler
from unifusion_jax.sharding import BATCH

HEADS = P(BATCH, None, 'tp')


def normal(seed, shape, spec=HEADS, dtype=jnp.float32):
  return jax.device_put(np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype), spec)


def qkv(queries, keys, heads=4, groups=2, dtype=jnp.float32, spec=HEADS):
  return [normal(i, (4, n, h, 8), spec, dtype) for i, (n, h) in enumerate(((queries, heads), (keys, groups),
                                                                          (keys, groups)))]


def segments_of(*shape):
  """Padding on the right, on the left, in a whole row, and two segments with padding between them."""
  b, s = shape
  rows = np.ones(shape, np.int32)
  rows[0, s - 2:] = 0
  rows[1, :s // 2] = 0
  rows[2] = 0
  rows[3, s // 2:] = 2
  rows[3, s // 2] = 0
  return rows


def reference(q, k, v, q_segments, kv_segments, causal, q_offset):
  """jax's attention under a dense mask."""
  mask = q_segments[:, None, :, None] == kv_segments[:, None, None]
  if causal:
    mask = mask & (q_offset + np.arange(q.shape[1])[:, None] >= np.arange(k.shape[1]))
  return jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(mask))


@pytest.fixture(params=['whole', 'blocks', 'single queries'])
def path(request, monkeypatch):
  """How many queries are computed at a time: all, some with a ragged tail, one."""
  if request.param != 'whole':
    monkeypatch.setattr(module, 'LOGITS', 1 if request.param == 'single queries' else 4 * 2 * 3 * 13)
  return request.param


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('segmented', [False, True])
@pytest.mark.parametrize('heads, groups, spec', [(4, 2, HEADS), (4, 4, HEADS), (3, 1, P(BATCH))])
def test_values_and_gradients_are_those_of_jax(path, causal, segmented, heads, groups, spec):
  """13 tokens, so that a block of 3 or 4 leaves a ragged tail; heads over tp, or whole on every device."""
  arrays = qkv(13, 13, heads, groups, spec=spec)
  segments = segments_of(4, 13) if segmented else None
  held = None if segments is None else jax.device_put(segments, P(BATCH))
  weights = np.random.default_rng(9).standard_normal((4, 13, heads, 8), np.float32)
  ours = lambda *x: attention(*x, q_segments=held, kv_segments=held, causal=causal)
  ones = np.ones((4, 13), np.int32)
  theirs = lambda *x: reference(*x, *[ones if segments is None else segments] * 2, causal, 0)
  value = lambda f: lambda *x: jnp.sum(f(*x) * weights)
  result, gradients = jax.jit(lambda *x: (ours(*x), jax.grad(value(ours), (0, 1, 2))(*x)))(*arrays)
  wanted, wanted_gradients = jax.jit(lambda *x: (theirs(*x), jax.grad(value(theirs), (0, 1, 2))(*x)))(
      *map(np.asarray, arrays))
  np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-5)
  for array, ours, theirs in zip(arrays, gradients, wanted_gradients):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert jax.typeof(ours) == jax.typeof(array)
  assert jax.typeof(result) == jax.typeof(arrays[0])


def test_no_more_logits_than_a_block_has_are_in_the_program(path):
  arrays, held = qkv(13, 13), jax.device_put(segments_of(4, 13), P(BATCH))
  text = str(jax.make_jaxpr(functools.partial(attention, q_segments=held, kv_segments=held))(*arrays))
  queries = dict(whole=13, blocks=3).get(path, 1)
  assert f',{queries},13]' in text
  assert path == 'whole' or ',13,13]' not in text


def test_queries_from_an_offset_on_over_a_cache(path):
  """The next five tokens over a cache of 13 slots, the first seven of them filled, two of those with padding."""
  q, k, v = qkv(5, 13)
  mask = np.ones((4, 13), np.int32)
  mask[1, :2] = 0
  ones, held = jax.device_put((np.ones((4, 5), np.int32), mask), P(BATCH))
  wanted = reference(*map(np.asarray, (q, k, v)), np.ones((4, 5)), mask, True, 7)
  for offset in (7, jnp.int32(7)):
    result = jax.jit(functools.partial(attention, causal=True))(
        q, k, v, q_segments=ones, kv_segments=held, q_offset=offset)
    np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-5)
  # Slots after the last query may hold anything finite
  spoiled = jax.device_put(np.where(np.arange(13)[:, None, None] > 11, 1e6, np.asarray(v)), HEADS)
  again = attention(q, k, spoiled, q_segments=ones, kv_segments=held, causal=True, q_offset=7)
  np.testing.assert_allclose(again, wanted, rtol=1e-5, atol=1e-5)


def test_padding_reaches_no_other_segment_and_rows_of_padding_are_finite(path):
  q, k, v = qkv(13, 13)
  segments = segments_of(4, 13)
  held = jax.device_put(segments, P(BATCH))
  run = functools.partial(attention, q_segments=held, kv_segments=held)
  spoil = lambda x: jax.device_put(np.where((segments == 0)[..., None, None], 1e30, np.asarray(x)), HEADS)
  plain, spoiled = np.asarray(run(q, k, v)), np.asarray(run(q, spoil(k), spoil(v)))
  np.testing.assert_array_equal(plain[segments > 0], spoiled[segments > 0])
  assert np.isfinite(plain).all() and np.isfinite(spoiled).all()
  nothing = attention(q, k, v, q_segments=held + 5, kv_segments=held)  # queries without any key
  assert np.isfinite(np.asarray(nothing)).all()


def test_bf16_is_as_exact_as_bf16(path):
  arrays = qkv(13, 13, dtype=jnp.bfloat16)
  exact_arrays = [np.asarray(x, np.float32) for x in arrays]
  ones = np.ones((4, 13), np.int32)
  value = lambda f: lambda *x: jnp.sum(jnp.sin(f(*x).astype(jnp.float32)))
  theirs = lambda *x: reference(*x, ones, ones, True, 0)
  ours = functools.partial(attention, causal=True)
  result, gradients = ours(*arrays), jax.grad(value(ours), (0, 1, 2))(*arrays)
  assert result.dtype == jnp.bfloat16 and all(x.dtype == jnp.bfloat16 for x in gradients)
  np.testing.assert_allclose(np.asarray(result, np.float32), theirs(*exact_arrays), atol=0.03)
  for ours, theirs in zip(gradients, jax.grad(value(theirs), (0, 1, 2))(*exact_arrays)):
    assert np.linalg.norm(np.asarray(ours, np.float32) - theirs) < 0.02 * np.linalg.norm(theirs)


def test_key_gradients_of_many_blocks_add_up_in_f32(monkeypatch):
  """In bf16 a sum of 512 like parts stops growing at 256 of them."""
  monkeypatch.setattr(module, 'LOGITS', 1)
  q, k, v = (jax.device_put(np.zeros((4, 512, 2, 8)), HEADS).astype(jnp.bfloat16) for _ in range(3))
  gradient = jax.jit(jax.grad(lambda v: jnp.sum(attention(q, k, v).astype(jnp.float32))))(v)
  np.testing.assert_allclose(np.asarray(gradient, np.float32), 1.0, rtol=0.01)


@pytest.mark.parametrize('rows, heads, groups, dim, causal, share', [
    (8, 8, 2, 64, True, 8), (32, 1, 1, 512, False, 3)])
def test_memory_of_forward_and_backward_is_a_fraction_of_the_logits(mesh, rows, heads, groups, dim, causal, share):
  """8 GiB of logits a device: of 16384 tokens, and of the autoencoder's middle block at 1024 px (whose q is large)."""
  def shape(*dims, dtype=jnp.bfloat16):
    spec = HEADS if len(dims) == 4 and heads > 1 else P(BATCH)
    return jax.ShapeDtypeStruct(dims, dtype, sharding=jax.NamedSharding(mesh, spec))

  def loss(q, k, v, segments):
    y = attention(q, k, v, q_segments=segments, kv_segments=segments, causal=causal)
    return jnp.sum(y.astype(jnp.float32) ** 2)

  q, k, v = (shape(rows, 16384, n, dim) for n in (heads, groups, groups))
  here = q.sharding.shard_shape(q.shape)
  assert 4 * here[0] * here[2] * 16384 ** 2 == 2 ** 33
  program = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(q, k, v, shape(rows, 16384, dtype=jnp.int32)).compile()
  assert program.memory_analysis().temp_size_in_bytes < 2 ** 33 / share


@pytest.mark.parametrize('mesh', [None])  # instead of the eight devices
def test_type_checks_over_devices_that_are_not_here(mesh):
  mesh = sharding.abstract_mesh(sharding.MeshConfig(data=1, fsdp=32, tp=4), 128)
  with jax.sharding.use_abstract_mesh(mesh):
    q, k = (jax.ShapeDtypeStruct((512, 7168, n, 128), jnp.bfloat16, sharding=jax.NamedSharding(mesh, HEADS))
            for n in (40, 8))
    y = jax.eval_shape(attention, q, k, k)
  assert (y.shape, y.dtype, y.sharding.spec) == (q.shape, q.dtype, P(BATCH, None, 'tp', None))


def test_segments_of_one_side_alone_are_refused():
  with pytest.raises(ValueError, match='or neither'):
    attention(*qkv(5, 5), kv_segments=jnp.ones((4, 5), jnp.int32))


def fused(name, monkeypatch):
  """`attention` by one of the fused kernels, on a CPU: splash interpreted, cuDNN's call answered by XLA."""
  monkeypatch.setattr(module, 'CUDNN', 'xla')
  return functools.partial(attention, implementation=name)


@pytest.mark.parametrize('name, causal, mask, heads, groups, spec', [
    ('splash', False, None, 4, 2, HEADS), ('splash', True, 'ids', 4, 2, HEADS),
    ('splash', False, 'valid', 3, 1, P(BATCH)), ('cudnn', False, None, 3, 1, P(BATCH)),
    ('cudnn', False, 'valid', 3, 1, P(BATCH)), ('cudnn', True, 'valid', 4, 2, HEADS)])
def test_fused_kernels_have_the_values_and_gradients_of_the_plain_one(name, causal, mask, heads, groups, spec,
                                                                      monkeypatch):
  """Of tokens in use: 140 tokens are no whole block, a head dim of 8 no whole lane; row 2 is padding alone."""
  arrays = qkv(140, 140, heads, groups, spec=spec)
  segments = None if mask is None else segments_of(4, 140)
  segments = segments > 0 if mask == 'valid' else segments
  held = None if mask is None else jax.device_put(segments, P(BATCH))
  weights = np.random.default_rng(9).standard_normal((4, 140, heads, 8), np.float32)
  if mask is not None:
    weights = weights * (np.asarray(segments) > 0)[..., None, None]
  value = lambda f: lambda *x: jnp.sum(f(*x, q_segments=held, kv_segments=held, causal=causal) * weights)
  both = [jax.jit(jax.value_and_grad(value(f), (0, 1, 2)))(*arrays)
          for f in (fused(name, monkeypatch), functools.partial(attention, implementation='plain'))]
  for ours, theirs in zip(*map(jax.tree.leaves, both)):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert jax.typeof(ours) == jax.typeof(theirs)
  y = fused(name, monkeypatch)(*arrays, q_segments=held, kv_segments=held, causal=causal)
  assert np.isfinite(np.asarray(y)).all() and jax.typeof(y) == jax.typeof(arrays[0])


@pytest.mark.parametrize('name', ['plain', 'blocks', 'splash', 'cudnn'])
def test_a_key_that_counts_twice_is_two_keys(name, monkeypatch):
  monkeypatch.setattr(module, 'LOGITS', 4 * 2 * 3 * 160)
  q, k, v = qkv(140, 140)
  counts = np.random.default_rng(4).integers(1, 4, 140)
  valid = np.arange(140) < np.array([140, 100, 60, 1])[:, None]
  run = lambda counts, *x: attention(*x, q_segments=held, kv_segments=held, key_bias=jnp.log(counts),
                                     implementation=name)
  held, rows = (jax.device_put(x, P(BATCH)) for x in (valid, np.tile(counts, (4, 1)).astype(np.float32)))
  many = [np.repeat(np.asarray(x), counts, axis=1) for x in (k, v)]
  ids = valid.astype(np.int32)
  wanted = reference(np.asarray(q), *many, ids, np.repeat(ids, counts, axis=1), False, 0)
  np.testing.assert_allclose(np.asarray(jax.jit(run)(rows, q, k, v))[valid], wanted[valid], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('count, most, block', [
    (7168, 512, 512), (16384, 512, 512), (1025, 512, 384), (1408, 512, 512), (4608, 1024, 768), (100, 512, 128)])
def test_blocks_pad_little(count, most, block):
  assert module.padded_block(count, most) == block


def test_cudnn_refuses_what_lengths_cannot_say():
  ids = jnp.ones((4, 5), jnp.int32)
  with pytest.raises(ValueError, match='takes lengths'):
    attention(*qkv(5, 5), q_segments=ids, kv_segments=ids, implementation='cudnn')


class Absent:
  """A mesh's devices, as far as `choice` asks for them."""

  def __init__(self, platform):
    self.abstract_device = type('Device', (), dict(platform=platform))


@pytest.mark.parametrize('platform, queries, keys, causal, segments, chosen', [
    ('cpu', 4096, 4096, False, None, 'blocks'), ('cpu', 64, 64, False, None, 'plain'),
    ('tpu', 4096, 4096, False, 'ids', 'splash'), ('tpu', 4096, 4096, True, 'valid', 'splash'),
    ('tpu', 64, 64, False, None, 'plain'), ('tpu', 1, 4096, True, 'valid', 'plain'),
    ('gpu', 4096, 4096, False, 'valid', 'cudnn'), ('gpu', 4096, 4096, False, 'ids', 'blocks'),
    ('gpu', 4096, 4096, False, None, 'cudnn'), ('gpu', 1, 4096, True, 'valid', 'plain')])
def test_the_implementation_is_chosen_by_platform_and_size(platform, queries, keys, causal, segments, chosen,
                                                           monkeypatch):
  arrays = [jax.ShapeDtypeStruct((4, n, h, 128), jnp.bfloat16, sharding=jax.NamedSharding(jax.sharding.get_mesh(), P()))
            for n, h in ((queries, 4), (keys, 2))]
  names = []

  def ask(q, k):
    ids = segments and jnp.ones((4, keys), bool if segments == 'valid' else jnp.int32)
    monkeypatch.setattr(jax.sharding, 'get_abstract_mesh', lambda: Absent(platform))
    names.append(module.choice(q, k, ids, ids, causal, keys - queries))
    monkeypatch.undo()
    return q

  jax.eval_shape(ask, *arrays)
  assert names == [chosen]


@pytest.mark.parametrize('mesh', [None])
def test_on_a_tpu_it_is_the_kernel_forward_and_backward(mesh):
  """Compiled for chips that are not here: three kernels, no logits; ragged, grouped heads of 72."""
  mesh = compiler.mesh(sharding.MeshConfig(), chips.topology('v5e:2x2'))
  with jax.set_mesh(mesh):
    def struct(*dims, dtype=jnp.bfloat16):
      return jax.ShapeDtypeStruct(dims, dtype, sharding=jax.NamedSharding(mesh, P(BATCH)))
    loss = lambda q, k, v, valid: jnp.sum(attention(q, k, v, q_segments=valid, kv_segments=valid).astype(jnp.float32))
    program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(
        struct(4, 1000, 4, 72), *[struct(4, 1000, 2, 72)] * 2, struct(4, 1000, dtype=bool)).compile()
  assert program.as_text().count('custom_call_target="tpu_custom_call"') == 3
  assert program.memory_analysis().temp_size_in_bytes < 4 * 1000 ** 2 * 4 / 2


@pytest.mark.parametrize('path', ['plain', 'blocks'])
@pytest.mark.parametrize('spec', [P(), P(BATCH, None, 'tp')])
def test_gradient_of_one_example_on_one_device(mesh, spec, path, monkeypatch):
  """Whether or not more than the mask is sharded over the batch's axes, which have one device."""
  q, k, v = (np.asarray(x)[:1] for x in qkv(13, 13))
  segments = segments_of(4, 13)[:1]
  monkeypatch.setattr(module, 'LOGITS', 4 * 13 * q.shape[2] * 4)  # four queries

  def gradients():
    held = jax.device_put(segments, P(BATCH))
    run = lambda *x: jnp.sum(jnp.sin(attention(*x, q_segments=held, kv_segments=held, implementation=path)))
    return jax.jit(jax.grad(run, (0, 1, 2)))(*(jax.device_put(x, spec) for x in (q, k, v)))
  with jax.set_mesh(jax.make_mesh((1, 1, 1), mesh.axis_names, devices=mesh.devices.flat[:1])):
    found = gradients()
  ours = lambda *x: jnp.sum(jnp.sin(reference(*x, segments, segments, False, 0)))
  for a, b in zip(found, jax.grad(ours, (0, 1, 2))(q, k, v)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
