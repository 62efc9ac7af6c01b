"""Text-only models against transformers' own classes, in both directions."""

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

from unifusion_jax import sharding
from unifusion_jax.models import causal_lm
from unifusion_jax.models.text_generation import generate
from unifusion_jax.sharding import BATCH
from unifusion_jax.weights import safetensors_io

KINDS = {
    'llama': (transformers.LlamaForCausalLM, transformers.LlamaConfig, dict(rope_parameters=dict(
        rope_type='llama3', rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16))),
    'qwen2': (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, dict(tie_word_embeddings=True)),
    'qwen3': (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, dict(head_dim=24)),
}


def torch_model(kind: str, kv_heads: int = 2):
  """A random model of transformers whose every parameter matters."""
  model, config, changes = KINDS[kind]
  torch.manual_seed(0)
  model = model(config(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=kv_heads,
                       intermediate_size=48, vocab_size=64, max_position_embeddings=128, **changes)).eval()
  with torch.no_grad():
    for p in model.parameters():
      p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 1 else 0.2) + (1.0 if p.ndim == 1 else 0.0))
  return model


def batch(left: bool = False):
  """Padded on the right, or on the left."""
  rng = np.random.default_rng(0)
  valid = np.arange(18) < np.array([18, 7, 2, 13])[:, None]
  valid = valid[:, ::-1] if left else valid
  return jax.device_put((np.where(valid, rng.integers(1, 64, valid.shape), 0).astype(np.int32), valid), P(BATCH))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('kv_heads, left', [(2, False), (4, True)])
def test_parity(kind, kv_heads, left, tmp_path):
  model = torch_model(kind, kv_heads)
  model.save_pretrained(tmp_path / 'theirs')
  ours = causal_lm.load(tmp_path / 'theirs', jnp.float32)
  tokens, valid = batch(left)
  inputs = dict(input_ids=torch.from_numpy(np.array(tokens)).long(),
                attention_mask=torch.from_numpy(np.array(valid)).long(),
                position_ids=torch.from_numpy(np.maximum(np.cumsum(valid, axis=1) - 1, 0)).long())
  with torch.no_grad():
    theirs = model(**inputs, output_hidden_states=True)
  hidden = jax.jit(causal_lm.TextModel.hidden, static_argnums=3)(ours, tokens, valid, (0, 1, 2))
  for tap in range(3):
    assert relative(hidden[:, :, tap], theirs.hidden_states[tap], valid) < 1e-5, tap
  assert relative(jax.jit(causal_lm.TextModel.logits)(ours, tokens, valid), theirs.logits, valid) < 1e-5

  causal_lm.save(ours, tmp_path / 'ours')
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours').eval()
  with torch.no_grad():
    assert torch.equal(again(**inputs).logits, theirs.logits)
  configs = [json.loads((tmp_path / which / 'config.json').read_text()) for which in ('ours', 'theirs')]
  assert causal_lm.TextConfig.from_json(configs[0]) == causal_lm.TextConfig.from_json(configs[1])


@pytest.mark.parametrize('kind', KINDS)
def test_greedy_writes_what_transformers_writes(kind, tmp_path):
  model = torch_model(kind)
  model.save_pretrained(tmp_path)
  tokens, valid = batch()
  out = generate(causal_lm.load(tmp_path, jnp.float32), tokens, valid, max_new=64, stop_ids=(), taps=(1, 3))
  with one_device():
    alone = generate(causal_lm.load(tmp_path, jnp.float32), np.asarray(tokens), np.asarray(valid), max_new=64,
                     stop_ids=(), taps=(1, 3))
  np.testing.assert_array_equal(out.ids, alone.ids)
  np.testing.assert_allclose(out.hidden, alone.hidden, rtol=1e-4, atol=1e-4)
  for row, n in enumerate(np.asarray(valid).sum(1)):
    prompt = torch.from_numpy(np.array(tokens)[row:row + 1, :n]).long()
    with torch.no_grad():
      theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False,
                              eos_token_id=None, pad_token_id=0)
    np.testing.assert_array_equal(np.asarray(out.ids)[row], theirs[0, n:].numpy(), err_msg=f'example {row}')


def test_a_missing_head_is_tied_only_where_no_config_denies_it(tmp_path):
  model = torch_model('llama')
  model.save_pretrained(tmp_path)
  described = json.loads((tmp_path / 'config.json').read_text())
  tensors = {name: tensor[:] for name, tensor in safetensors_io.read(tmp_path).items()}
  assert described['tie_word_embeddings'] is False
  (tmp_path / 'config.json').write_text(json.dumps(described | dict(tie_word_embeddings=True)))
  assert not causal_lm.load(tmp_path).config.text.tied  # a head that is there is the head
  del tensors['lm_head.weight']
  safetensors_io.write(tmp_path / 'model.safetensors', tensors)
  assert causal_lm.load(tmp_path).config.text.tied
  (tmp_path / 'config.json').write_text(json.dumps(described))
  with pytest.raises(ValueError, match='missing: lm_head.weight, for our decoder/head'):
    causal_lm.load(tmp_path)
  del described['tie_word_embeddings']
  (tmp_path / 'config.json').write_text(json.dumps(described))
  assert causal_lm.load(tmp_path).config.text.tied


@pytest.mark.parametrize('kind', ['llama', 'qwen2'])
def test_a_class_without_a_head(kind, tmp_path):
  """LlamaModel's names lack `model.`; its head is the embedding table, or is nowhere."""
  model = torch_model(kind)
  model.save_pretrained(tmp_path / 'whole')
  model.model.save_pretrained(tmp_path / 'base')
  assert 'embed_tokens.weight' in safetensors_io.read(tmp_path / 'base')
  if kind == 'llama':
    with pytest.raises(ValueError, match='saved from a class without a head'):
      causal_lm.load(tmp_path / 'base')
    return
  whole, base = (jax.tree.leaves(causal_lm.load(tmp_path / which)) for which in ('whole', 'base'))
  assert len(whole) == len(base)
  for a, b in zip(whole, base):
    np.testing.assert_array_equal(a, b)


def test_errors():
  with pytest.raises(ValueError, match="'internvl' is a vision-language model"):
    causal_lm.TextConfig.from_json(dict(model_type='internvl', text_config={}))
  text = causal_lm.DecoderConfig(vocab=32, width=16, depth=1, heads=2, kv_heads=2, head_dim=8, hidden=16)
  config = causal_lm.TextConfig(text)
  tokens, valid = batch()
  with pytest.raises(ValueError, match='text alone'):
    causal_lm.TextModel(config, rngs=nnx.Rngs(0)).logits(tokens, valid, jnp.zeros(()))


@pytest.mark.parametrize('mesh', [None])  # instead of the eight devices
def test_presets_type_check_at_full_size(mesh):
  config = causal_lm.PRESETS['Llama-3.1-8B']
  mesh = sharding.abstract_mesh(sharding.MeshConfig(data=1, fsdp=64, tp=4), 256)
  with jax.sharding.use_abstract_mesh(mesh):
    model = jax.eval_shape(lambda: causal_lm.TextModel(config, jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(model)) == 8030261248
    rows = jax.NamedSharding(mesh, P(BATCH))
    tokens, valid = (jax.ShapeDtypeStruct((256, 512), kind, sharding=rows) for kind in (jnp.int32, bool))
    hidden = jax.eval_shape(lambda *x: causal_lm.TextModel.hidden(*x, (8, 16, 32)), model, tokens, valid)
  assert hidden.shape == (256, 512, 3, 4096) and hidden.sharding.spec[0] == BATCH
  assert causal_lm.TextConfig.from_json(config.to_json()) == config
