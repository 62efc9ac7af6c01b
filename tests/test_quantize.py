"""int8 weights: exact products with the rounded matrix, states near those of the original, half the memory."""

from flax import nnx
import jax
from jax import P
import jax.numpy as jnp
import numpy as np
import pytest

from unifusion_jax import config, sharding, verifi
from unifusion_jax.data import sources, vision_inputs
from unifusion_jax.models import decoder, internvl
from unifusion_jax.models.layers import einsum, RESIDUAL
from unifusion_jax.models.text_generation import generate
from unifusion_jax.sharding import BATCH
from unifusion_jax.weights import encoders, quantize

PRODUCTS = [('bsd,dhk->bshk', (16, 4, 8), ('fsdp', 'tp', None), 'wq'),
            ('bshk,hkd->bsd', (4, 8, 16), ('tp', None, 'fsdp'), 'wo'),
            ('bsd,df->bsf', (16, 24), ('fsdp', 'tp'), 'up'), ('bsf,fd->bsd', (24, 16), ('tp', 'fsdp'), 'down'),
            ('bsd,dv->bsv', (16, 10), ('fsdp', None), 'head')]


class Layer(nnx.Module):
  """One matrix by one of the names."""

  def __init__(self, name, w):
    setattr(self, name, nnx.Param(w))


def make(equation, shape, spec, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  sizes = dict(b=8, s=3, d=16, h=4, k=8, f=24)
  of_x = equation.split(',')[0]
  x = rng.standard_normal([sizes[letter] for letter in of_x]).astype(np.float32)
  w = rng.standard_normal(shape).astype(np.float32) * rng.uniform(0.1, 3, shape[-1])
  where = P(BATCH, None, *(['tp'] if of_x[2] in 'hf' else []))
  return jax.device_put(x, where).astype(dtype), jax.device_put(w, P(*spec)).astype(dtype)


def rounded(x, axes):
  scale = np.abs(x).max(axis=axes, keepdims=True) / 127
  return np.round(x / scale) * scale


@pytest.mark.parametrize('equation,shape,spec,name', PRODUCTS)
@pytest.mark.parametrize('activations', [False, True])
def test_product_is_that_of_the_rounded_matrix(equation, shape, spec, name, activations):
  x, w = make(equation, shape, spec)
  contracted = (0, 1) if name == 'wo' else (0,)
  layer = quantize.quantize(Layer(name, w), activations)
  small = getattr(layer, name)
  assert small.values.dtype == jnp.int8 and jax.typeof(small.values).sharding.spec == P(*spec)
  out = RESIDUAL if name in ('wo', 'down') else None
  y = jax.jit(lambda x, layer: einsum(equation, x, getattr(layer, name), out))(x, layer)
  exact = einsum(equation, x, w, out)
  assert jax.typeof(y) == jax.typeof(exact)
  ours = rounded(np.asarray(x), tuple(range(2, x.ndim))) if activations else np.asarray(x)
  np.testing.assert_allclose(y, np.einsum(equation, ours, rounded(np.asarray(w), contracted)), rtol=1e-4, atol=1e-4)
  assert np.abs(np.asarray(y - exact)).max() > 1e-4  # it was rounded at all


def test_a_zero_channel_stays_zero():
  w = jnp.zeros((16, 24)).at[:, 3].set(1.0)
  small = quantize.quantize(Layer('up', w)).up
  np.testing.assert_array_equal(small.values * small.scale, w)


def test_axes_that_do_not_fit_are_refused():
  x, w = make('bsd,df->bsf', (16, 24), ('fsdp', 'tp'))
  layer = quantize.quantize(Layer('up', w))
  with pytest.raises(ValueError, match='bsd,fd->bsf contracts an axis'):
    einsum('bsd,fd->bsf', x, layer.up)


def test_nothing_to_quantise_is_an_error():
  with pytest.raises(ValueError, match='nothing to quantise'):
    quantize.quantize(Layer('norm', jnp.ones(3)))
  _, w = make('bsd,df->bsf', (16, 24), ('fsdp', 'tp'))
  with pytest.raises(ValueError, match='nothing to quantise'):
    quantize.quantize(quantize.quantize(Layer('up', w)))


def tiny(seed=0, **changes) -> internvl.InternVL:
  """A random model with the proportions of trained ones: what a block adds is smaller than what it adds it to."""
  made = internvl.InternVLConfig(
      vision=internvl.VisionConfig(width=32, depth=2, heads=2, hidden=64, tile=16, patch=4),
      text=decoder.DecoderConfig(**dict(dict(model_type='qwen3', vocab=64, width=64, depth=4, heads=4, kv_heads=2,
                                             head_dim=16, hidden=96), **changes)), image_token_id=5)
  vlm = jax.jit(lambda: internvl.InternVL(made, rngs=nnx.Rngs(seed)))()
  d = vlm.decoder
  d.embedding[...] = d.embedding[...] * 8.0
  for matrix in (d.blocks.wo, d.blocks.mlp.down):
    matrix[...] = matrix[...] * 0.3
  return vlm


def prompt(vlm, length=20):
  rng = np.random.default_rng(0)
  tokens = rng.integers(6, 64, (8, length)).astype(np.int32)
  tokens[:, 2:2 + vlm.config.tile_tokens] = vlm.config.image_token_id
  valid = np.arange(length) < rng.integers(length - 5, length + 1, (8, 1))
  tiles = rng.standard_normal((8, 1, 16, 16, 3)).astype(np.float32)
  return [jax.device_put(x, P(BATCH)) for x in (tokens, valid, tiles)]


def states(vlm, tokens, valid, tiles, taps):
  hidden = jax.jit(internvl.InternVL.hidden, static_argnums=3)(vlm, tokens, valid, taps, tiles)
  return np.where(np.asarray(valid)[..., None, None], np.asarray(hidden, np.float32), 0)


def relative(ours, theirs):
  """Relative error of each tap, [l]."""
  return np.sqrt(np.sum((ours - theirs) ** 2, (0, 1, 3)) / np.sum(theirs ** 2, (0, 1, 3)))


def test_states_within_two_percent():
  vlm = tiny()
  inputs, taps = prompt(vlm), (0, 2, 4)
  exact = states(vlm, *inputs, taps)
  error = relative(states(quantize.quantize(vlm), *inputs, taps), exact)
  assert (error < 0.02).all() and error[-1] > 1e-4, error
  error = relative(states(quantize.quantize(vlm, activations=True), *inputs, taps), exact)
  assert (error < 0.05).all(), error


def test_states_within_two_percent_on_the_embedded_vlm():
  folder = str(config.ASSETS / 'vlm')
  chat, source = verifi.Chat(folder), sources.SceneSource('edit', 'test', 64)
  image_processor = vision_inputs.for_model(encoders.config(folder), 1, config.ASSETS / 'vlm')
  rows, tiles = [], []
  for i in range(8):
    record = source[i]
    seen, counts = image_processor.preprocess(record['references'])
    rows.append(verifi.arrays(chat.spans(record['instruction'], counts, record['caption']), 144, 80))
    tiles.append(seen)
  inputs = [jax.device_put(x, P(BATCH)) for x in (np.stack([r['input_ids'] for r in rows]),
                                                  np.stack([r['attention_mask'] for r in rows]), np.stack(tiles))]
  vlm = internvl.load(folder, jnp.float32)
  taps = tuple(range(vlm.config.text.depth + 1))
  exact = states(vlm, *inputs, taps)
  # Rounded activations cost about as much again as rounded weights
  for dtype, activations, most in ((jnp.float32, False, 0.02), (jnp.bfloat16, False, 0.02), (jnp.float32, True, 0.03)):
    error = relative(states(quantize.quantize(internvl.load(folder, dtype), activations), *inputs, taps), exact)
    assert (error < most).all(), (dtype, activations, error)


def test_unrolled_layers_write_the_same(unrolled):
  test_writes_what_the_rounded_model_writes()


def test_writes_what_the_rounded_model_writes():
  vlm = tiny()
  small = quantize.quantize(vlm)
  dense = jax.tree.map(lambda w: nnx.Param(w.values * w.scale) if isinstance(w, quantize.Int8) else w, small,
                       is_leaf=lambda w: isinstance(w, quantize.Int8))
  tokens, valid, tiles = prompt(vlm)
  ours, wanted = (generate(m, tokens, valid, tiles, max_new=8, stop_ids=()) for m in (small, dense))
  np.testing.assert_array_equal(ours.ids, wanted.ids)
  np.testing.assert_allclose(ours.logprobs, wanted.logprobs, atol=1e-4)


def test_same_states_on_one_device():
  inputs = [np.asarray(x) for x in prompt(tiny())]
  many = states(quantize.quantize(tiny()), *prompt(tiny()), (0, 4))
  with jax.set_mesh(jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1])):
    one = states(quantize.quantize(tiny()), *inputs, (0, 4))
  assert np.abs(one - many).max() < 1e-4 * np.abs(one).max()


def test_half_the_memory_at_full_size():
  """The paper's VLM, as shapes: in bfloat16 are left the embedding table, norms, biases and the ViT's patches."""
  made = internvl.PRESETS['InternVL2_5-8B']
  plain = jax.eval_shape(lambda: internvl.InternVL(made, jnp.bfloat16, rngs=nnx.Rngs(0)))
  small = jax.eval_shape(quantize.quantize, plain)
  assert quantize.size(plain) / 2 > 8e9
  assert quantize.size(small) / quantize.size(plain) < 0.53
  for blocks in (small.vision.blocks, small.decoder.blocks):
    assert quantize.size(blocks) < 1.01 * sum(x.size for x in jax.tree.leaves(blocks) if x.dtype == jnp.int8)
