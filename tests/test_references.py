"""Clean latents of references: geometry, the DiT against a plain formula, training, sampling."""

import contextlib
import dataclasses
import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_dit import build, example, put
from test_pipeline import random_pipe, same

from unifusion_jax import conditioning, description, flow, sharding
from unifusion_jax.commands import sample, train
from unifusion_jax.data import imaging, transforms
from unifusion_jax.errors import UserError
from unifusion_jax.models import unifusion
from unifusion_jax.models.dit import References
from unifusion_jax.objectives.flow_matching import FlowMatching
from unifusion_jax.planning import estimate, programs
from unifusion_jax.request import MAX_REFERENCES, Request
from unifusion_jax.scenes import examples
from unifusion_jax.training import record, step
from unifusion_jax.weights.lora import LoRAConfig

NOISE = np.random.default_rng(3).integers(0, 256, (64, 64, 3), np.uint8)
WIDE, TALL = NOISE[:24], NOISE[:, :40]


# Geometry


@pytest.mark.parametrize('shape, rows, columns', [
    ((64, 96), 8, 12), ((32, 48), 8, 12), ((640, 962), 8, 12),  # the canvas's own proportions, whatever the size
    ((64, 64), 8, 8), ((40, 96), 5, 12), ((3, 96), 1, 12), ((10, 1), 8, 1)])
def test_a_reference_fits_the_canvas_in_its_own_proportions(shape, rows, columns):
  image = np.resize(NOISE, (*shape, 3))
  (canvas, absent), (mask, nowhere) = imaging.canvases([image], 2, 64, 96, 8)
  assert canvas.shape == (64, 96, 3) and not absent.any() and not nowhere.any() and mask.shape == (8, 12)
  top, left = (8 - rows) // 2, (12 - columns) // 2
  covered = np.zeros((8, 12), bool)
  covered[top:top + rows, left:left + columns] = True
  np.testing.assert_array_equal(mask, covered)
  inside = np.s_[8 * top:8 * (top + rows), 8 * left:8 * (left + columns)]
  np.testing.assert_array_equal(canvas[inside], imaging.resize_cover(image, 8 * columns, 8 * rows))
  np.testing.assert_array_equal(canvas[:8 * top], np.repeat(canvas[8 * top][None], 8 * top, 0))


# The DiT


def references(b=4, n=2, height=6, width=4, seed=1):
  """Numbers [b n y x 4] and masks [b n y/2 x/2] of all sizes, in numpy."""
  rng = np.random.default_rng(seed)
  mask = rng.random((b, n, height // 2, width // 2)) < 0.5
  mask[0, 0], mask[1] = True, False
  return References(rng.standard_normal((b, n, height, width, 4), np.float32), mask,
                    rng.standard_normal((b, n), np.float32))


def formula(model, z, t, cond, mask, references):
  """One row's velocity [y x 4]: tokens that are there alone, each with its position, its time and its weight."""
  w = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model.dit)))
  c = model.config.dit
  rows, columns = z.shape[0] // 2, z.shape[1] // 2
  tokens = [(token, (0, 0, 0), t, 1.0) for token, there in zip(cond, mask) if there]
  frames = [(z, np.ones((rows, columns), bool), t, 1.0)] + [
      (latents, there, 0.0, np.exp(bias)) for latents, there, bias in zip(*references)]
  for frame, (latents, there, time, weight) in enumerate(frames):
    for y, x in np.argwhere(there):
      patch = latents[2 * y:2 * y + 2, 2 * x:2 * x + 2].transpose(2, 0, 1).reshape(-1)
      tokens.append((patch @ w['image_w'] + w['image_b'], (frame, y, x), time, weight))
  x, positions, times, weights = (np.array(values, np.float64) for values in zip(*tokens))

  gelu = lambda x: np.asarray(jax.nn.gelu(x, approximate=True), np.float64)
  rms = lambda x: x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + c.eps)
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  frequencies = 1e4 ** (-np.arange(c.time_dim // 2) / (c.time_dim // 2))
  phases = 1000 * times[:, None] * frequencies
  time = gelu(np.concatenate([np.cos(phases), np.sin(phases)], -1) @ w['time_w1'] + w['time_b1'])
  time = time @ w['time_w2'] + w['time_b2']
  modulation = np.einsum('sd,dmf->msf', gelu(time), w['mod_w']) + w['mod_b'][:, None]
  angles = np.concatenate([positions[:, i, None] * c.rope_theta ** (-np.arange(0, size, 2) / size)
                           for i, size in enumerate(c.rope_axes)], axis=-1)
  turn = np.exp(1j * angles)[:, None]

  def rotated(x):
    turned = (x[..., :c.head_dim // 2] + 1j * x[..., c.head_dim // 2:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)

  for i in range(c.depth):
    block = jax.tree.map(lambda leaf: leaf[i], w['blocks'])
    scale1, shift1, gate1, scale2, shift2, gate2 = modulation + block['table'][:, None]
    y, a = (1 + scale1) * (1 + block['norm1']) * rms(x) + shift1, block['attn']
    q, k = (rotated(rms(np.einsum('sd,dhk->shk', y, a[name])) * (1 + a[f'{norm}_norm']))
            for name, norm in (('wq', 'q'), ('wk', 'k')))
    k, v = (np.repeat(each, c.heads // c.kv_heads, axis=1) for each in (k, np.einsum('sd,dhk->shk', y, a['wv'])))
    shares = np.exp(np.einsum('qhk,shk->hqs', q, k) / np.sqrt(c.head_dim)) * weights
    attended = np.einsum('hqs,shk->qhk', shares / shares.sum(-1, keepdims=True), v)
    x = x + gate1 * np.einsum('shk,hkd->sd', attended * sigmoid(np.einsum('sd,dhk->shk', y, a['gate'])), a['wo'])
    y, mlp = (1 + scale2) * (1 + block['norm2']) * rms(x) + shift2, block['mlp']
    gate = y @ mlp['gate']
    x = x + gate2 * ((gate * sigmoid(gate) * (y @ mlp['up'])) @ mlp['down'])
  first, image = mask.sum(), slice(mask.sum(), mask.sum() + rows * columns)
  scale, shift = time[first] + w['table'][:, None][0], time[first] + w['table'][:, None][1]
  x = ((1 + scale) * (1 + w['norm']) * rms(x[image]) + shift) @ w['final_w'] + w['final_b']
  return x.reshape(rows, columns, 4, 2, 2).transpose(0, 3, 1, 4, 2).reshape(z.shape)


@jax.jit
def velocity(model, z, t, cond, mask, references=None):
  return model.velocity(z, t, cond, mask, references=references)


def inputs(tokens=5):
  hidden, mask, z, noise, t = example(tokens=tokens)
  return build(), z, t, np.random.default_rng(4).standard_normal((4, tokens, 64), np.float32), mask


@pytest.mark.parametrize('tokens', [5, 6])  # with 6, tp shares out the sequence
def test_the_velocity_is_the_plain_formulas(tokens):
  model, *rows = inputs(tokens)
  known = references()
  v = np.asarray(velocity(model, *put(*rows), jax.tree.map(lambda x: put(x)[0], known)))
  for i in range(4):
    wanted = formula(model, *(x[i] for x in rows), [x[i] for x in known])
    np.testing.assert_allclose(v[i], wanted, atol=2e-5 * np.abs(wanted).max())


def test_what_is_not_covered_changes_nothing():
  """Patches beside a reference, and references that are not there; and each row is what it is alone."""
  model, *rows = inputs()
  known = references()._replace(bias=None)
  ask = lambda known: np.asarray(velocity(model, *put(*rows), known and jax.tree.map(lambda x: put(x)[0], known)))
  v, without = ask(known), ask(None)
  cells = known.mask.repeat(2, axis=2).repeat(2, axis=3)[..., None]
  np.testing.assert_array_equal(ask(known._replace(latents=np.where(cells, known.latents, 7.0))), v)
  one_more = References(*(np.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2)) for x in known[:2]))
  np.testing.assert_allclose(ask(one_more), v, atol=1e-5)
  np.testing.assert_allclose(v[1], without[1], atol=1e-5)  # the row without any
  assert np.abs(v - without)[[0, 2, 3]].max(axis=(1, 2, 3)).min() > 1e-3
  alone = [np.repeat(x[2:3], 4, axis=0) for x in (*rows, *known[:2])]
  row = np.asarray(velocity(model, *put(*alone[:4]), References(*put(*alone[4:]))))[0]
  np.testing.assert_allclose(row, v[2], atol=1e-5)


def test_every_parameter_gets_a_finite_gradient_through_references():
  model, *rows = inputs()
  known = jax.tree.map(lambda x: put(x)[0], references())
  model.dit.config.remat = True
  gradients = jax.jit(jax.grad(lambda model, *rows: jnp.sum(velocity(model, *rows) ** 2)))(model, *put(*rows), known)
  for (path, g), x in zip(jax.tree_util.tree_leaves_with_path(gradients.dit), jax.tree.leaves(model.dit)):
    assert jax.typeof(g) == jax.typeof(x) and np.isfinite(g).all() and np.abs(g).max() > 0, jax.tree_util.keystr(path)


# Training


@pytest.fixture
def taught(recipe, tmp_path):
  """A recipe that teaches adapters of a random model to edit by clean latents."""
  made = recipe(objective=FlowMatching(reference_latents=True, lora=LoRAConfig(rank=4, targets=('all',))))
  rng = np.random.default_rng(0)
  model = jax.jit(lambda: unifusion.UniFusion(made.model, rngs=nnx.Rngs(5)))()
  model = jax.tree.map(lambda x: x + jax.device_put(rng.normal(0, 0.1, x.shape).astype(np.float32), x.sharding), model)
  unifusion.save(model, tmp_path / 'base')
  return dataclasses.replace(made, init=str(tmp_path / 'base'))


def test_examples_have_them_where_the_switch_is_on(taught):
  edit = examples.example('edit', 'train', 3)
  encoder = transforms.prompt_encoder(taught)
  make = lambda edit, unit=8, **drops: transforms.GenerationExample(
      encoder, reference_unit=unit, **dict(cond_dropout=0.0, image_dropout=0.0) | drops)(
          edit, np.random.default_rng(0))
  whole, height, width = make(edit), *edit['target'].shape[:2]
  images, mask = imaging.canvases(edit['references'], 1, height, width, 8)
  np.testing.assert_array_equal(whole['references'], images)
  np.testing.assert_array_equal(whole['reference_mask'], mask)
  assert mask.any()
  spec = transforms.GenerationExample(encoder, reference_unit=8).spec(height, width, 1, edit['task'])
  assert jax.tree.map(lambda x: (x.shape, x.dtype), whole) == jax.tree.map(lambda x: (x.shape, x.dtype), spec)
  assert not make(edit, image_dropout=1.0)['reference_mask'].any()
  for drops in (dict(cond_dropout=1.0), dict(text_dropout=1.0), dict(instruction_prob=1.0)):
    np.testing.assert_array_equal(make(edit, **drops)['reference_mask'], mask)
  assert 'references' not in make(edit, unit=0) and 'references' not in make(dict(edit, references=[]))


@pytest.mark.slow
def test_a_memorised_edit(taught, mesh, tmp_path):
  """The first step changes the output, the loss falls, and from its middle training goes on as it did, bit for bit."""
  for name, image in (('before.png', WIDE), ('after.png', NOISE)):
    imaging.write_png(tmp_path / name, image)
  row = dict(references=['before.png'], instruction='make it whole', target='after.png', caption='a wall')
  (tmp_path / 'edits.jsonl').write_text(json.dumps(row))
  taught.data = dataclasses.replace(taught.data, path=str(tmp_path / 'edits.jsonl'), size=64)
  with contextlib.closing(train.batches(taught)) as data:
    batch = sharding.shard_batch(next(data), mesh)
  hidden, frozen = batch | dict(reference_mask=jnp.zeros_like(batch['reference_mask'])), taught.objective.frozen(taught)
  tx = optax.adam(1e-2)
  train_step = step.make_train_step(taught.objective.loss, tx, taught.optim)
  start = step.init(taught.objective.init(taught), tx)

  def trained(state, batches):
    losses, state = [], jax.tree.map(jnp.copy, state)  # it is donated
    for batch in batches:
      state, metrics = train_step(dataclasses.replace(state, step=start.step + 0), frozen, batch, jax.random.key(0))
      losses.append(float(metrics['loss']))
    return state, losses
  middle, first = trained(start, [batch] * 10)
  end, last = trained(middle, [batch] * 10)
  assert first[1] != first[0] and last[-1] < 0.8 * first[0]
  again, _ = trained(jax.tree.map(lambda x: jax.device_put(np.asarray(x), x.sharding), middle), [batch] * 10)
  for a, b in zip(jax.tree.leaves(end), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)
  assert trained(end, [hidden])[1][0] > trained(end, [batch])[1][0]  # it looks at the reference


def test_tokens_and_plans_count_them(taught):
  """A reference is as many tokens as the image."""
  plain = dataclasses.replace(taught, objective=dataclasses.replace(taught.objective, reference_latents=False))
  specs = [config.objective.batch_spec(config, 2) for config in (plain, taught)]
  assert specs[1].keys() - specs[0].keys() == {'references', 'reference_mask'}
  tokens = [config.objective.tokens(config, spec) for config, spec in zip((plain, taught), specs)]
  assert tokens[1] - tokens[0] == 8 * 2 * 64
  shapes = [x.aval.shape for x in programs.of('denoise', taught, 4, 2).trace().jaxpr.jaxpr.invars]
  assert (4, 2, 8, 8, 4) in shapes and (4, 2, 8, 8) in shapes
  with jax.set_mesh(None):
    assert estimate.chip_bytes(taught, 8).total > estimate.chip_bytes(plain, 8).total


def test_an_export_samples_as_it_was_trained(recipe, tmp_path):
  config = recipe(objective=FlowMatching(reference_latents=True))
  config.objective.export(config, config.objective.init(config), tmp_path)
  assert description.read(tmp_path).sample['reference_latents'] and not config.sample.reference_latents


def test_a_run_that_reads_them_samples_with_them(recipe, tmp_path):
  config = recipe(objective=FlowMatching(reference_latents=True))
  record.claim(config, tmp_path)
  (tmp_path / 'checkpoints' / '2').mkdir(parents=True)
  record.check_same_model(config, tmp_path)
  with pytest.raises(UserError, match='objective.reference_latents: True there, False now'):
    record.check_same_model(recipe(), tmp_path)


# Sampling


@pytest.fixture(scope='module')
def pipe(recipe):
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tp=2))):
    made = random_pipe(recipe())
    made.settings = made.settings.changed(reference_latents=True)
    return made


def test_guidance_leaves_references_in_the_null(pipe, mesh):
  asked = [Request('make it blue', (WIDE, TALL), i, 'a blue circle') for i in range(4)]
  known, noise = pipe.references(asked, 48, 80), pipe.noise(range(4), 48, 80)
  np.testing.assert_array_equal(np.asarray(known.mask)[0], imaging.canvases((WIDE, TALL), 2, 48, 80, 8)[1])
  assert pipe.references(asked, 48, 80, pipe.settings.changed(reference_latents=False)) is None
  cond = pipe.encode(asked).conditioning
  null = jax.tree.map(lambda x: sharding.shard(np.repeat(np.asarray(x), 4, axis=0)), pipe.null())
  v, uncond = (velocity(pipe.model, noise, sharding.shard(np.ones(4, np.float32)), c.tokens, c.mask, known)
               for c in (cond, null))
  z = pipe.denoise(cond._replace(references=known), noise, jnp.array([1.0, 0.75]), guidance=3.0)
  wanted = noise - 0.25 * flow.guide(v, uncond, 3.0)
  np.testing.assert_allclose(z, wanted, atol=1e-4 * np.abs(wanted).max())


def test_a_reference_of_strength_zero_is_absent(pipe):
  two = [Request('x', (WIDE, TALL), i) for i in range(4)]
  one = [dataclasses.replace(request, references=(WIDE,)) for request in two]
  null = jax.tree.map(lambda x: sharding.shard(np.repeat(np.asarray(x), 4, axis=0)), pipe.null())
  noise, t = pipe.noise(range(4), 64, 64), sharding.shard(np.ones(4, np.float32))
  run = lambda asked, strengths: np.asarray(velocity(pipe.model, noise, t, null.tokens, null.mask, pipe.references(
      asked, 64, 64, pipe.settings.changed(strengths=strengths))))
  absent, alone, both, half = run(two, (1.0, 0.0)), run(one, ()), run(two, ()), run(two, (1.0, 0.5))
  np.testing.assert_allclose(absent, alone, atol=1e-5 * np.abs(alone).max())
  assert min(np.abs(both - alone).max(), np.abs(half - both).max()) > 1e-3 * np.abs(both).max()


@pytest.mark.slow
def test_rows_with_unlike_references_are_what_they_are_alone(pipe, monkeypatch):
  """One, two and none in a batch, of several shapes, guided and with new noise; encoded once for all seeds."""
  encode, calls = conditioning.clean_references, []
  monkeypatch.setattr(conditioning, 'clean_references', lambda *args: calls.append(1) or encode(*args))
  mixture = [Request('make it blue', images, i, 'x') for i, images in enumerate(((WIDE,), (TALL, NOISE), ()))]
  s = pipe.settings.changed(guidance=2.0, eta=0.5)
  together = pipe.generate(mixture, 64, 64, settings=s)
  for i, request in enumerate(mixture):
    same(pipe.generate([request], 64, 64, settings=s)[0].image, together[i].image)
  assert len(calls) == 3  # without references there is nothing to encode
  asked, changes = mixture[0], (dict(seed=0), dict(seed=1), dict(references=(WIDE[:, ::-1],)))
  images = [pipe.generate([dataclasses.replace(asked, **change)], 64, 64, settings=s)[0].image for change in changes]
  assert len(calls) == 5 and (images[0] != images[2]).any()
  on = pipe.generate([asked], 64, 64, settings=s, init_images=[NOISE], start=0.5)[0].image
  assert (on != images[0]).any()


def test_a_precise_edit_with_references(pipe, tmp_path):
  mask = np.zeros((64, 64), np.uint8)
  mask[16:48, 16:48] = 255
  imaging.write_png(tmp_path / 'mask.png', mask)
  result = pipe('make it blue', images=[NOISE, WIDE], rewrite='x', precise=str(tmp_path / 'mask.png'), height=64,
                width=64, guidance=1.0)
  np.testing.assert_array_equal(result.arrays[0][mask == 0], NOISE[mask == 0])
  assert result.metadata[0]['settings']['reference_latents']


def test_too_many_references_are_refused(pipe, recipe, tmp_path):
  """In a call, and in a run that learned to read them before anything is loaded."""
  imaging.write_png(tmp_path / 'one.png', NOISE)
  many = (str(tmp_path / 'one.png'),) * (MAX_REFERENCES + 1)
  with pytest.raises(UserError, match=f'{len(many)} references, and with reference_latents'):
    pipe('all of them', images=list(many))
  config = recipe(objective=FlowMatching(reference_latents=True))
  config.sample = config.sample.changed(prompt='all of them', references=many)
  with pytest.raises(UserError, match=f'{len(many)} references, and with reference_latents'):
    sample.run(config, tmp_path)
