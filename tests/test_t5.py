"""The T5 encoder against transformers' own class, in both directions."""

import json

from flax import nnx
import jax
from jax import P
import jax.numpy as jnp
import numpy as np
import pytest
from test_internvl import one_device, relative
import torch
import transformers
from transformers.models.t5.modeling_t5 import T5Attention

from unifusion_jax import sharding
from unifusion_jax.models import t5
from unifusion_jax.sharding import BATCH
from unifusion_jax.weights import safetensors_io

SIZES = dict(vocab_size=64, d_model=32, d_kv=12, d_ff=48, num_layers=3, num_heads=4, feed_forward_proj='gated-gelu',
             relative_attention_num_buckets=8, relative_attention_max_distance=12, tie_word_embeddings=False)
HIDDEN = jax.jit(t5.T5Encoder.hidden, static_argnums=3)


def torch_model(cls=transformers.T5EncoderModel):
  """A random T5 of transformers whose every parameter matters."""
  torch.manual_seed(0)
  model = cls(transformers.T5Config(**SIZES)).eval()
  with torch.no_grad():
    for p in model.parameters():
      p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 1 else 0.2) + (1.0 if p.ndim == 1 else 0.0))
  return model


def batch(left: bool = False):
  rng = np.random.default_rng(0)
  valid = np.arange(20) < np.array([20, 7, 1, 13])[:, None]
  valid = valid[:, ::-1] if left else valid
  return jax.device_put((np.where(valid, rng.integers(1, 64, valid.shape), 0).astype(np.int32), valid), P(BATCH))


@pytest.mark.parametrize('left', [False, True])
def test_parity(left, tmp_path):
  model = torch_model()
  model.save_pretrained(tmp_path / 'theirs')
  ours = t5.load(tmp_path / 'theirs', jnp.float32)
  tokens, valid = batch(left)
  inputs = dict(input_ids=torch.from_numpy(np.array(tokens)).long(),
                attention_mask=torch.from_numpy(np.array(valid)).long())
  with torch.no_grad():
    theirs = model(**inputs, output_hidden_states=True)
  hidden = HIDDEN(ours, tokens, valid, (0, 1, 2))
  for tap in range(3):
    assert relative(hidden[:, :, tap], theirs.hidden_states[tap], valid) < 1e-5, tap
  assert relative(jax.jit(t5.T5Encoder.last)(ours, tokens, valid), theirs.last_hidden_state, valid) < 1e-5

  t5.save(ours, tmp_path / 'ours')
  again = transformers.T5EncoderModel.from_pretrained(tmp_path / 'ours').eval()
  with torch.no_grad():
    assert torch.equal(again(**inputs).last_hidden_state, theirs.last_hidden_state)
  configs = [json.loads((tmp_path / which / 'config.json').read_text()) for which in ('ours', 'theirs')]
  assert t5.T5Config.from_json(configs[0]) == t5.T5Config.from_json(configs[1])

  with one_device():
    alone = HIDDEN(t5.load(tmp_path / 'ours', jnp.float32), np.asarray(tokens), np.asarray(valid), (0, 1, 2))
  np.testing.assert_allclose(hidden, alone, rtol=1e-4, atol=1e-4)


def test_whole_models_and_either_name_of_the_table(tmp_path):
  """The encoder within the public encoder-decoder checkpoints, whose table has one of two names or both."""
  model = torch_model(transformers.T5ForConditionalGeneration)
  model.save_pretrained(tmp_path)
  tensors = {name: x[:] for name, x in safetensors_io.read(tmp_path).items()}
  assert any(name.startswith('decoder.') for name in tensors)
  first = jax.tree.leaves(t5.load(tmp_path))
  table = tensors.pop('shared.weight')
  safetensors_io.write(tmp_path / 'model.safetensors', tensors | {'encoder.embed_tokens.weight': table})
  second = jax.tree.leaves(t5.load(tmp_path))
  for a, b in zip(first, second):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('buckets,distance', [(32, 128), (8, 12)])
def test_buckets(buckets, distance):
  at = np.arange(-600, 601)
  wanted = T5Attention._relative_position_bucket(torch.from_numpy(at), True, buckets, distance)
  np.testing.assert_array_equal(t5.bucket_of(at, buckets, distance), wanted.numpy())


def test_errors(tmp_path):
  config = t5.T5Config().to_json()
  for change, said in ((dict(feed_forward_proj='relu'), "'relu'"), (dict(model_type='mt5'), "'mt5'")):
    with pytest.raises(ValueError, match=said):
      t5.T5Config.from_json(config | change)
  torch_model().save_pretrained(tmp_path)
  ours, (tokens, valid) = t5.load(tmp_path, jnp.float32), batch()
  with pytest.raises(ValueError, match='no images'):
    ours.hidden(tokens, valid, (1,), jnp.zeros(()))
  with pytest.raises(ValueError, match=r'0 \.\. 4'):
    ours.hidden(tokens, valid, (2, 1, 4))


@pytest.mark.parametrize('mesh', [None])  # instead of the eight devices
@pytest.mark.parametrize('name,billions', [('flan-t5-base', 0.109629), ('flan-t5-xxl', 4.762311)])
def test_presets_type_check_at_full_size(mesh, name, billions):
  config = t5.PRESETS[name]
  mesh = sharding.abstract_mesh(sharding.MeshConfig(data=1, fsdp=64, tp=4), 256)
  with jax.sharding.use_abstract_mesh(mesh):
    model = jax.eval_shape(lambda: t5.T5Encoder(config, jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(model)) == pytest.approx(billions * 1e9, rel=1e-5)
    rows = jax.NamedSharding(mesh, P(BATCH))
    tokens, valid = (jax.ShapeDtypeStruct((256, 256), kind, sharding=rows) for kind in (jnp.int32, bool))
    last = jax.eval_shape(t5.T5Encoder.last, model, tokens, valid)
  assert last.shape == (256, 256, config.width) and last.dtype == jnp.bfloat16 and last.sharding.spec[0] == BATCH
