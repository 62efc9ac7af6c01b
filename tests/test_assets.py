"""The shipped models: the public classes load them and compute the same; they fit their recipes and do their work."""

import hashlib
import importlib.util
import json
import pathlib

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_internvl import one_device
import torch
import transformers

from unifusion_jax import config, sharding, verifi
from unifusion_jax.data import vision_inputs
from unifusion_jax.evaluation import fidelity
from unifusion_jax.models import text_generation, unifusion, vae
from unifusion_jax.scenes import examples, judge
from unifusion_jax.scenes.world import Scene
from unifusion_jax.weights import encoders

VLM = config.ASSETS / 'vlm'
ROOT = pathlib.Path(__file__).parent.parent


def asked(count: int, task: str = 'edit'):
  """(chat, tokens, valid, tiles) of requests with one image each, padded on the left as transformers wants it."""
  image_processor = vision_inputs.for_model(encoders.config(VLM), 1, VLM)
  chat = verifi.Chat(VLM, image_processor.image_tokens)
  records = [examples.example(task, 'test', i) for i in range(count)]
  seen, counts = zip(*(image_processor.preprocess(record['references'], 1) for record in records))
  rows = [verifi.arrays(chat.spans(record['instruction'], c, None), 112, 0, ()) for record, c in zip(records, counts)]
  tokens, valid = (np.stack([np.roll(row[name], 112 - row['attention_mask'].sum()) for row in rows])
                   for name in ('input_ids', 'attention_mask'))
  return chat, tokens, valid, np.stack(seen)


def test_transformers_reads_the_vlm_and_writes_the_same():
  chat, tokens, valid, tiles = asked(8)
  settings = json.loads((VLM / 'preprocessor_config.json').read_text())
  mean, std = (np.array(settings[name], np.float32) for name in ('image_mean', 'image_std'))
  pixels = (tiles[:, 0].astype(np.float32) / 255 - mean) / std
  model = transformers.InternVLForConditionalGeneration.from_pretrained(VLM, dtype=torch.float32).eval()
  inputs = dict(input_ids=torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(valid).long(),
                pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
  positions = torch.from_numpy(np.maximum(np.cumsum(valid, axis=1) - 1, 0))
  with torch.no_grad():
    theirs = model(**inputs, position_ids=positions, output_hidden_states=True)
    words = model.generate(**inputs, max_new_tokens=52, do_sample=False, eos_token_id=list(chat.stop_ids),
                           pad_token_id=0)
  vlm = encoders.load(VLM, jnp.float32)
  batch = sharding.shard((tokens, valid, tiles))
  taps = tuple(range(vlm.config.text.depth))
  hidden = jax.jit(type(vlm).hidden, static_argnums=3)(vlm, *batch[:2], taps, batch[2])
  wanted = [*(theirs.hidden_states[tap] for tap in taps), theirs.logits]
  for name, a, b in zip((*taps, 'logits'), [*np.moveaxis(np.asarray(hidden), 2, 0),
                                            np.asarray(jax.jit(type(vlm).logits)(vlm, *batch))], wanted):
    assert np.abs(a - b.numpy())[valid].max() < 1e-4 * np.abs(b.numpy()[valid]).max(), name
  out = text_generation.generate(vlm, *batch, max_new=52, stop_ids=chat.stop_ids)
  for ours, n, row in zip(np.asarray(out.ids), np.asarray(out.lengths), words[:, tokens.shape[1]:].numpy()):
    np.testing.assert_array_equal(ours[:n], row[:n])


@pytest.mark.slow
def test_diffusers_reads_the_autoencoder_and_the_judge_what_comes_back():
  records = [examples.example('reconstruct', 'test', i) for i in range(140)]
  records = [record for record in records if record['target'].shape == (64, 64, 3)][:96]
  images = np.stack([record['target'] for record in records])
  ours = vae.load(config.ASSETS / 'vae', jnp.float32)
  back = fidelity.round_trip(ours, images)
  right = [judge.exact(judge.read(image), Scene.from_json(record['scene'])) for record, image in zip(records, back)]
  assert np.mean(right) >= 0.95
  x = images[:8].astype(np.float32) / 127.5 - 1
  theirs = diffusers.AutoencoderKL.from_pretrained(config.ASSETS / 'vae').eval()
  with torch.no_grad():
    wanted = theirs.encode(torch.from_numpy(x).permute(0, 3, 1, 2)).latent_dist.mean.permute(0, 2, 3, 1).numpy()
  found = np.asarray(ours.encode(sharding.shard(x))) / ours.config.scaling_factor
  assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize('name', ['t2i', 'edit'])
def test_diffusers_reads_the_dits_and_they_fit_their_recipes(name):
  spec = importlib.util.spec_from_file_location(name, ROOT / 'configs' / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  made = module.get_config('tiny')
  assert pathlib.Path(made.sample.weights) == config.ASSETS / name
  theirs = diffusers.Krea2Transformer2DModel.from_pretrained(config.ASSETS / name, torch_dtype=torch.float32).eval()
  rng = np.random.default_rng(0)
  z, hidden = rng.standard_normal((2, 6, 10, 16)), rng.standard_normal((2, 7, 3, 160))
  z, hidden, t = z.astype(np.float32), hidden.astype(np.float32), np.array([0.3, 0.9], np.float32)
  with one_device():
    model = unifusion.load(config.ASSETS / name, made.model)
    put = sharding.shard(dict(z=z, t=t, hidden=hidden, mask=np.ones((2, 7), bool)))
    ours = np.asarray(model.velocity(put['z'], put['t'], model.condition(put['hidden'], put['mask']), put['mask']))
  rows, columns = (a.reshape(-1) for a in np.meshgrid(np.arange(6), np.arange(10), indexing='ij'))
  places = np.concatenate([np.zeros((7, 3)), np.stack([0 * rows, rows, columns], axis=1)]).astype(np.float32)
  with torch.no_grad():
    wanted = theirs(torch.from_numpy(z).reshape(2, 60, 16), torch.from_numpy(hidden), torch.from_numpy(t),
                    torch.from_numpy(places), None).sample.numpy()
  assert np.abs(ours.reshape(2, 60, 16) - wanted).max() < 1e-3 * np.abs(wanted).max()


def test_they_are_small():
  assert sum(path.stat().st_size for path in config.ASSETS.rglob('*') if path.is_file()) < 40e6


def test_provenance_is_of_these_weights():
  """Digests, and a chain of parents from each model's last stage to one that started from random weights."""
  provenance = json.loads((config.ASSETS / 'provenance.json').read_text())
  assert provenance['models'].keys() == {path.name for path in config.ASSETS.iterdir() if path.is_dir()}
  stages = {stage['id']: stage for model in provenance['models'].values() for stage in model['stages']}
  for name, model in provenance['models'].items():
    weights = config.ASSETS / name / model['file']
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == model['sha256'], f'{name}: other weights are shipped'
    assert (ROOT / model['recipe']).exists() and model['figures']
    ancestors, waiting = set(), [model['stages'][-1]['id']]
    while waiting:
      stage = stages[waiting.pop()]
      ancestors.add(stage['id'])
      waiting += [parent for parent in stage['parents'] if parent not in ancestors]
    assert any(not stages[stage]['parents'] for stage in ancestors)
    assert ancestors >= {stage['id'] for stage in model['stages']}
