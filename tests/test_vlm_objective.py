"""The embedded VLM and autoencoder: their training goes on exactly, what is measured of them, what is exported."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint import SMALL

from unifusion_jax import config, sharding
from unifusion_jax.commands import evaluate, export, train
from unifusion_jax.data.config import Task
from unifusion_jax.models import internvl, vae
from unifusion_jax.scenes import examples, vlm
from unifusion_jax.scenes.evaluation import language as eval_writing
from unifusion_jax.scenes.evaluation import settings

EVALUATION = {'vlm': settings.LanguageEvaluation, 'autoencoder': settings.AutoencoderEvaluation}


def small(name: str, **changes) -> config.Config:
  objective, model, tasks = SMALL[name]
  return config.Config(
      objective=dataclasses.replace(objective, **changes), model=model, mesh=sharding.MeshConfig(data=2, fsdp=2, tp=2),
      data=config.DataConfig(tasks=tasks, max_prompt_tokens=96, batch_size=8),
      train=config.TrainConfig(steps=4, log_every=1, save_every=2, preview_every=4),
      eval=EVALUATION[name](examples=3, batch_size=4))


@pytest.mark.slow
@pytest.mark.parametrize('name, changes', [('vlm', {}), ('vlm', dict(lm_weight=0.0)), ('autoencoder', {})])
def test_two_and_two_steps_are_four(name, changes, mesh, tmp_path):
  made = small(name, **changes)
  whole = train.run(made, tmp_path / 'whole')
  train.run(made, tmp_path / 'parts', stop_at=2)
  parts = train.run(made, tmp_path / 'parts')
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  assert (tmp_path / 'whole' / 'samples' / '0000004.png').exists() == (changes != dict(lm_weight=0.0))


def test_the_vlm_is_measured_and_exported(mesh, tmp_path):
  made = small('vlm')
  state = train.run(made, tmp_path, stop_at=2)
  report = eval_writing.evaluate(state.ema.vlm, made.objective.prompt_encoder(made), made)
  assert report['examples'] == 3 and report['caption_exact'] == 0
  assert {'yes_no', 'rewrite_exact', 'edit_exact'} <= report.keys()
  export.run(made, tmp_path)
  back = internvl.load(tmp_path / 'export', jnp.float32)
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state.ema.vlm), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  name = 'tokenizer.json'
  assert (tmp_path / 'export' / name).read_bytes() == (config.ASSETS / 'vlm' / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize('task', ['edit/1-2', 'multi'])
def test_the_pointer_learns_from_edits_and_only_when_asked(mesh, task):
  """Its loss reaches its matrices; at weight 0 it is neither computed nor moves them."""
  made = small('vlm')
  made.data = config.DataConfig(tasks=(Task(task),), max_prompt_tokens=132, max_rewrite_tokens=52, batch_size=8)
  batches = train.batches(made)
  batch = sharding.shard_batch(next(batches), mesh)
  batches.close()
  params = jax.jit(lambda: made.objective.random(made))()

  def gradient(weight):
    loss = vlm.VLMObjective(grounding_weight=weight).loss
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, None, batch, None)

  (with_pointer, metrics), moved = gradient(1.0)
  (without, bare), left = gradient(0.0)
  assert 'grounded' in metrics and 'grounded' not in bare and with_pointer > without
  for name in ('grounding', 'grounding_keys'):
    assert np.any(np.asarray(getattr(moved, name)[...])) and not np.any(np.asarray(getattr(left, name)[...]))


@pytest.mark.parametrize('within', [False, True])
def test_the_pointer_is_right_where_every_token_is(within):
  """What it looks for may be in the image's features or in the decoder's states of its tokens."""
  rng, width = np.random.default_rng(0), 16
  reader = types.SimpleNamespace(grounding=10 * jnp.eye(width), grounding_keys=10 * jnp.eye(width),
                                 grounding_bias=jnp.zeros(1))
  ends = jnp.array(rng.normal(size=(3, 1, 2, width)), jnp.float32)
  wanted = rng.random((3, 5)) < 0.5
  shown = jnp.ones((3, 5), bool)
  telling = jnp.where(wanted[..., None], ends[:, 0, -1:], -ends[:, 0, -1:])
  silent = jnp.zeros_like(telling)
  keys = (silent, telling) if within else (telling, silent)
  ends = jnp.broadcast_to(ends[:, :, -1:], ends.shape)
  loss, right = vlm.grounding_loss(reader, ends, *keys, jnp.array(wanted), shown)
  assert right == 1 and loss < 1e-3
  wrong = wanted.copy()
  wrong[0, 2] ^= True
  loss, right = vlm.grounding_loss(reader, ends, *keys, jnp.array(wrong), shown)
  assert right == pytest.approx(2 / 3) and loss > 1


def test_right_answers_are_measured_as_right(monkeypatch):
  made = small('vlm')
  made.eval.examples = 40
  monkeypatch.setattr(eval_writing, 'answers', lambda vlm, layout, records, size: [r['caption'] for r in records])
  report = eval_writing.evaluate(None, None, made)
  assert all(value == 1 for name, value in report.items() if name not in ('split', 'examples'))
  opposite = lambda vlm, layout, records, size: [{'yes': 'no', 'no': 'yes'}.get(r['caption'], '') for r in records]
  monkeypatch.setattr(eval_writing, 'answers', opposite)
  report = eval_writing.evaluate(None, None, made)
  assert all(value == 0 for name, value in report.items() if name not in ('split', 'examples'))


@pytest.mark.parametrize('written, right, total', [
    ('a small solid red circle at the center, on a mint background', 6, 6),
    ('a small solid blue circle at the center, on a mint background', 5, 6),
    ('a small solid red circle at the center, on a slate background', 5, 6),
    ('a small solid red circle at the center, a large striped blue star at the top left, on a mint background', 6, 7),
    ('a circle', 1, 6), ('no sentence of this language', 0, 6)])
def test_attributes_are_counted_one_by_one(written, right, total):
  truth = 'a small solid red circle at the center, on a mint background'
  assert tuple(eval_writing.attributes_right(written, truth)) == (right, total)


@pytest.mark.slow
def test_the_autoencoder_is_measured_and_exported(mesh, tmp_path):
  made = small('autoencoder')
  state = train.run(made, tmp_path, stop_at=2)
  evaluate.run(made, tmp_path)
  report = (tmp_path / 'eval.json').read_text()
  assert '"exact_as_drawn": 1.0' in report and '"psnr_db"' in report and 'at step 2' in report
  export.run(made, tmp_path)
  back = vae.load(tmp_path / 'export', jnp.float32)
  image = examples.example('reconstruct', 'test', 1)['target'].astype(np.float32) / 127.5 - 1
  image = sharding.shard(np.stack([image] * 8))
  np.testing.assert_allclose(back.decode(back.encode(image)), state.ema.decode(state.ema.encode(image)), atol=1e-4)
  assert back.config.scaling_factor == pytest.approx(1 / np.std(np.asarray(state.ema.moments(image)[0])), rel=0.5)
