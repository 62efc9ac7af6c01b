"""Ways to condition the DiT beside LAP, and LAP's variants: masks, gradients, meshes, files, budgets, runs."""

import dataclasses
import json
import pathlib
import re
import types

from flax import nnx
import jax
from jax import P
import jax.numpy as jnp
import numpy as np
import pytest
from test_pipeline import random_pipe, REFERENCES, same

from configs.ablation import SCALES
from unifusion_jax import command_line, conditioning, flow, sharding
from unifusion_jax import config as configuration
from unifusion_jax.commands import export, info, train
from unifusion_jax.data.config import Task
from unifusion_jax.errors import UserError
from unifusion_jax.models import dit, fusion, unifusion
from unifusion_jax.models.dit import DiTConfig
from unifusion_jax.models.lap import LAPConfig
from unifusion_jax.models.unifusion import UniFusion, UniFusionConfig
from unifusion_jax.pipeline import UniFusionPipeline
from unifusion_jax.planning import estimate, model_flops, replication
from unifusion_jax.request import Request
from unifusion_jax.sharding import BATCH
from unifusion_jax.weights import lora, lora_files, safetensors_io

CONFIG = UniFusionConfig(
    LAPConfig(width=32, taps=3, depth=1, refiner_depth=1, heads=4, kv_heads=2, mlp=48),
    DiTConfig(channels=4, patch=1, depth=3, heads=4, kv_heads=2, head_dim=16, mlp=48, time_dim=16,
              rope_axes=(4, 6, 6)), dtype='float32')
OTHERS = fusion.WAYS[1:]
VARIANTS = {'norm': dict(tap_norm=True), 'two': dict(separate=True), 'mean': dict(depth=0, separate=True)}
B, S = 4, 6
MASK = np.arange(S) < np.array([S, 2, 4, 5])[:, None]
IMAGE = np.arange(S) < np.array([2, 1, 0, 3])[:, None]


def of(name: str) -> UniFusionConfig:
  """CONFIG of a way, or with a variant of LAP."""
  if name in VARIANTS:
    return dataclasses.replace(CONFIG, lap=dataclasses.replace(CONFIG.lap, **VARIANTS[name]))
  return dataclasses.replace(CONFIG, fusion=name)


def build(name: str) -> UniFusion:
  """A model whose every parameter is random, the same on any mesh."""
  rng = np.random.default_rng(0)
  def fill(x):
    fan_in = 64.0 if x.ndim > 2 else 100.0
    return jax.device_put(rng.standard_normal(x.shape, np.float32) * fan_in ** -0.5, x.sharding)
  return jax.tree.map(fill, sharding.abstract(jax.eval_shape(lambda: UniFusion(of(name), rngs=nnx.Rngs(0))),
                                              jax.sharding.get_mesh()))


def example(seed=0):
  """(hidden, z, noise, t) in numpy."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape, np.float32)
  return normal(B, S, 3, 32), normal(B, 4, 2, 4), normal(B, 4, 2, 4), rng.random(B, np.float32)


def put(*arrays):
  return [jax.device_put(x, P(BATCH)) for x in arrays]


@jax.jit
def velocity(model, hidden, mask, image, z, t, bias=None, references=None):
  cond = conditioning.condition(model, conditioning.States(hidden, mask, image))
  return model.velocity(z, t, *cond._replace(bias=bias, references=references))


def changed(model, hidden, other, mask=MASK, image=IMAGE) -> np.ndarray:
  """By how much other states change the velocity, the largest number of each row [b]."""
  _, z, _, t = example()
  one, two = (np.asarray(velocity(model, *put(states, mask, image, z, t))) for states in (hidden, other))
  assert np.isfinite(one).all() and np.isfinite(two).all()
  return np.abs(one - two).max((1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize('name', OTHERS)
def test_masked_tokens_change_nothing_and_others_do(name):
  model, (hidden, z, _, t) = build(name), example()
  rubbish = hidden.copy()
  rubbish[~MASK] = np.resize([np.nan, np.inf, 7.0], rubbish[~MASK].shape)
  assert (changed(model, hidden, rubbish) == 0).all()
  last_used = MASK.sum(1) - 1
  moved = hidden.copy()
  moved[np.arange(B), last_used] += 1.0
  assert (changed(model, hidden, moved) > 1e-4).all()
  longer = [np.pad(x, ((0, 0), (0, 3), *[(0, 0)] * (x.ndim - 2))) for x in (hidden, MASK, IMAGE)]
  np.testing.assert_allclose(velocity(model, *put(*longer, z, t)), velocity(model, *put(hidden, MASK, IMAGE, z, t)),
                             rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name, read', [('last', [2]), ('text', [0]), ('kv', [0, 1, 2]), ('hidden', [0, 1, 2])])
def test_taps_that_are_read(name, read):
  model, hidden = build(name), example()[0]
  for tap in range(3):
    other = hidden.copy()
    other[:, -S:, tap] += MASK[:, :, None]
    assert (changed(model, hidden, other) > 1e-4).all() == (tap in read)


def test_each_block_has_the_tap_of_its_depth():
  assert fusion.taps_of_blocks(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
  assert fusion.taps_of_blocks(6, 6).tolist() == [0, 1, 2, 3, 4, 5]  # of :kv_all and :hidden_all
  assert fusion.taps_of_blocks(26, 10).tolist() == sorted(fusion.taps_of_blocks(26, 10)) and set(
      fusion.taps_of_blocks(26, 10)) == set(range(10))
  hidden = example()[0]
  last = hidden.copy()
  last[:, :, 2] += 1.0
  for name in ('kv', 'hidden'):
    condition = jax.jit(lambda model, states: model.condition(*put(states, MASK)))
    one, two = (condition(build(name), states) for states in (hidden, last))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
      moved = np.abs(np.asarray(a - b)[MASK]).reshape(MASK.sum(), 3, -1).max((0, 2))
      assert (moved[:2] == 0).all() and moved[2] > 1e-3


def test_text_encoder_sees_no_image_and_the_order_of_words():
  model, hidden = build('text'), example()[0]
  other = hidden + np.where(IMAGE, 5.0, 0.0)[:, :, None, None]
  assert (changed(model, hidden, other) == 0).all()
  swapped = hidden.copy()
  swapped[0, [3, 4]] = hidden[0, [4, 3]]
  assert changed(model, hidden, swapped)[0] > 1e-4
  assert model.visible(MASK, IMAGE).tolist() == (MASK & ~IMAGE).tolist()
  with pytest.raises(ValueError, match='give `image`'):
    model.condition(*put(hidden, MASK))


@pytest.mark.parametrize('name', ['mean'])
def test_separate_pools_are_chosen_by_the_kind_of_token(name):
  """Before the refiner, which mixes tokens: the image pool is that of image tokens, the other of the rest."""
  config = dataclasses.replace(of(name), lap=dataclasses.replace(of(name).lap, refiner_depth=0))
  model, hidden = UniFusion(config, rngs=nnx.Rngs(0)), example()[0]
  states = conditioning.States(*put(hidden, np.ones_like(MASK), IMAGE))
  base = np.asarray(conditioning.condition(model, states).tokens)
  for part, where in (('image_pool', IMAGE), ('pool', ~IMAGE)):
    other = jax.tree.map(lambda x: x, model)
    setattr(other.lap, part, jax.tree.map(lambda x: x + jnp.arange(3.0), getattr(model.lap, part)))
    moved = np.abs(np.asarray(conditioning.condition(other, states).tokens) - base).max(-1)
    assert (moved[where] > 1e-3).all() and (moved[~where] == 0).all()
  with pytest.raises(ValueError, match='give it `image`'):
    model.condition(*put(hidden, MASK))


def test_normalised_taps_forget_their_scale():
  hidden = example()[0]
  louder = hidden * np.array([0.1, 1.0, 30.0], np.float32)[:, None]
  assert (changed(build('norm'), hidden, louder) < 1e-3).all()
  assert (changed(build('lap'), hidden, louder) > 1e-2).all()


def loss(model, hidden, mask, image, z, noise, t):
  cond = conditioning.condition(model, conditioning.States(hidden, mask, image))
  return jnp.mean(flow.loss(model.velocity(flow.interpolate(z, noise, t), t, *cond), z, noise))


@pytest.mark.slow
@pytest.mark.parametrize('name', [*OTHERS, 'two'])
def test_meshes_agree_and_every_parameter_learns(name):
  hidden, z, noise, t = example()
  results = []
  for devices, shape in ((jax.devices(), (2, 2, 2)), (jax.devices()[:1], (1, 1, 1))):
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(*shape), devices)):
      results.append(jax.device_get(jax.jit(jax.value_and_grad(loss))(
          build(name), *put(hidden, MASK, IMAGE, z, noise, t))))
  (value, gradient), (alone, gradient_alone) = results
  np.testing.assert_allclose(value, alone, rtol=1e-5)
  for (path, g), (_, g_alone) in zip(*(jax.tree.leaves_with_path(each) for each in (gradient, gradient_alone))):
    np.testing.assert_allclose(g, g_alone, rtol=1e-3, atol=1e-4 * np.abs(g_alone).max(), err_msg=str(path))
    layers = g.reshape(len(g), -1) if 'blocks' in str(path) or 'projections' in str(path) else g.reshape(1, -1)
    assert (np.abs(layers).max(1) > 0).all(), path


@pytest.mark.parametrize('name', ['kv', 'hidden'])
def test_strengths_and_clean_references(name):
  """A token that counts twice is two of it; references that cover nothing change nothing."""
  model, (hidden, z, _, t) = build(name), example()
  used = np.ones((B, S), bool)
  bias = np.where(np.arange(S) == S - 1, np.log(2.0), 0.0).astype(np.float32) * np.ones((B, 1), np.float32)
  plain, counted = (np.asarray(velocity(model, *put(hidden, used, IMAGE, z, t), bias=each))
                    for each in (None, *put(bias)))
  assert np.abs(plain - counted).max() > 1e-4
  if name == 'kv':  # after the adaptor, which is not told
    cond = conditioning.condition(model, conditioning.States(*put(hidden, used, IMAGE)))
    double = lambda x: jnp.concatenate([x, x[:, -1:]], axis=1)
    twice = jax.jit(model.velocity)(*put(z, t), jax.tree.map(double, cond.tokens), double(cond.mask))
    np.testing.assert_allclose(counted, twice, rtol=1e-3, atol=1e-4)
  latents = np.random.default_rng(1).standard_normal((B, 2, 4, 2, 4), np.float32)
  covered = np.zeros((B, 2, 4, 2), bool)
  for cover in (False, True):
    covered[:, 0] = cover
    beside = velocity(model, *put(hidden, used, IMAGE, z, t), references=dit.References(*put(latents, covered)))
    assert (np.abs(np.asarray(beside) - plain).max() > 1e-4) == cover


def test_programs_do_not_grow_with_depth():
  def equations(name, depth):
    config = dataclasses.replace(of(name), dit=dataclasses.replace(CONFIG.dit, depth=depth),
                                 lap=dataclasses.replace(CONFIG.lap, refiner_depth=depth))
    model = jax.eval_shape(lambda: UniFusion(config, rngs=nnx.Rngs(0)))
    hidden, z, noise, t = put(*example())
    mask, image = put(MASK, IMAGE)
    return str(jax.make_jaxpr(jax.grad(loss))(model, hidden, mask, image, z, noise, t)).count('\n')
  for name in ('kv', 'hidden'):
    assert equations(name, 3) == equations(name, 7)


@pytest.mark.slow
@pytest.mark.parametrize('name', [*OTHERS, *VARIANTS])
def test_files_hold_the_way_and_load_again(name, tmp_path):
  model = build(name)
  unifusion.save(model, tmp_path)
  fields = json.loads((tmp_path / 'config.json').read_text())
  assert fields['_class_name'] == 'UniFusionTransformer' and fields['fusion'] == of(name).fusion
  again = unifusion.load(tmp_path)
  assert dataclasses.replace(again.config, dtype='float32') == of(name)
  jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(model), jax.tree.leaves(again))
  with pytest.raises(UserError, match="fusion='" if name in OTHERS else 'text_.* is True, not False'):
    unifusion.load(tmp_path, CONFIG)
  tensors = {key: np.asarray(tensor[...]) for key, tensor in safetensors_io.read(tmp_path).items()}
  dropped = sorted(key for key in tensors if not key.startswith('transformer_blocks'))[0]
  safetensors_io.write(tmp_path / 'diffusion_pytorch_model.safetensors',
                       {key: tensor for key, tensor in tensors.items() if key != dropped})
  with pytest.raises(UserError, match=f'missing: {dropped}'):
    unifusion.load(tmp_path)


def test_plain_lap_is_krea2s_format(tmp_path):
  unifusion.save(build('lap'), tmp_path)
  fields = json.loads((tmp_path / 'config.json').read_text())
  assert fields['_class_name'] == 'Krea2Transformer2DModel' and not fields.keys() & unifusion.PLAIN.keys()
  assert not [key for key in safetensors_io.read(tmp_path) if key.startswith('fusion') or 'image' in key]
  with pytest.raises(UserError, match="holds a model of fusion='lap', not 'kv': set model.fusion=lap"):
    unifusion.load(tmp_path, of('kv'))
  (tmp_path / 'config.json').write_text(json.dumps(fields | dict(fusion='kv')))
  with pytest.raises(UserError, match='fields that a Krea 2 transformer does not: fusion'):
    unifusion.read_config(tmp_path)


def test_kinds_of_tokens(mesh):
  """On a mesh of one device too, for the null condition, which is one token of one row."""
  ids = np.array([[1, 7, 7, 2, 0], [7, 3, 4, 0, 0]], np.int32)
  index = np.array([[1, 2, 3, 0], [0, 2, 0, 0]], np.int32)
  vlm = types.SimpleNamespace(config=types.SimpleNamespace(image_token_id=7))
  wanted = [[True, True, False, False], [True, False, True, True]]
  for rows, tokens in ((2, 4), (1, 1)):
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])):
      part = sharding.shard((ids[:rows], index[:rows, :tokens]))
      found = jax.jit(lambda i, k: conditioning.image_tokens(vlm, i, k))(*part)
      np.testing.assert_array_equal(found, np.array(wanted)[:rows, :tokens])
  blind = types.SimpleNamespace(config=types.SimpleNamespace())
  assert not np.any(conditioning.image_tokens(blind, ids, index))


def test_settings_that_cannot_be():
  wrong = dataclasses.replace(CONFIG, fusion='sum').problems('model.')
  assert wrong == ["model.fusion='sum' must be one of 'lap', 'last', 'kv', 'hidden', 'text'"]
  wrong = dataclasses.replace(of('norm'), fusion='kv').problems('model.')
  assert wrong == ["model.lap.tap_norm=True is a variant of model.fusion='lap', not of 'kv': leave it out"]
  assert not [of(name).problems() for name in (*fusion.WAYS, *VARIANTS) if of(name).problems()]


@pytest.mark.parametrize('base', [CONFIG, unifusion.base_8b()], ids=['small', '8b'])
def test_budgets_match_within_a_percent(base):
  goal = fusion.parameters(base)
  for way in OTHERS:
    matched = fusion.parameters(fusion.matched(dataclasses.replace(base, fusion=way), base))
    assert matched['fusion'] == pytest.approx(goal['fusion'], rel=0.01) and matched['dit'] == goal['dit']
    assert matched['total'] == matched['fusion'] + matched['dit']
  assert fusion.matched(base, base) == base


def test_a_budget_that_no_width_reaches_is_refused():
  small = dataclasses.replace(CONFIG, lap=dataclasses.replace(CONFIG.lap, depth=0, refiner_depth=0))
  with pytest.raises(UserError, match="fusion='kv' with 2 blocks .* cannot have about"):
    fusion.matched(of('kv'), small)


# Through pipeline, commands and plans


def with_way(made, way: str):
  """A recipe with a way, whose taps are of a VLM of two layers."""
  variant = VARIANTS.get(way, {})
  made.model = dataclasses.replace(
      made.model, fusion='lap' if variant else way, lap=dataclasses.replace(made.model.lap, **variant),
      dit=dataclasses.replace(made.model.dit, depth=2))
  made.taps = (0, 2) if way == 'text' else made.taps
  return made


@pytest.mark.parametrize('way', ['kv', 'text', 'two'])
def test_requests_become_images(way, recipe):
  """Rewritten and given texts, guidance, a row alone and among others; an image's tokens condition, but as text."""
  pipe = random_pipe(with_way(recipe(), way))
  settings = pipe.settings.changed(guidance=2.0, steps=2)
  given = Request('make it blue', (REFERENCES[0],), 0, 'a blue circle')
  images = [sample.image for sample in pipe.generate(
      [given, Request('make it blue', (REFERENCES[1],), 1), dataclasses.replace(given, rewrite='two red squares'),
       dataclasses.replace(given, references=(REFERENCES[1],))], 64, 64, settings=settings)]
  same(images[0], pipe.generate([given], 64, 64, settings=settings)[0].image)
  assert np.abs(images[0].astype(int) - images[2]).max() > 2
  assert (np.abs(images[0].astype(int) - images[3]).max() > 2) == (way != 'text')
  counts = [np.asarray(pipe.encode([dataclasses.replace(given, references=references)]).conditioning.mask)[0].sum()
            for references in ((), given.references)]
  assert (counts[0] == counts[1]) == (way == 'text')


def test_loras_of_other_ways(recipe):
  """Of attention as of LAP's; for a part that the model has not there is an error."""
  shapes = jax.eval_shape(lambda: UniFusion(of('kv'), rngs=nnx.Rngs(0)))
  chosen = lora.init(shapes, lora.LoRAConfig(rank=2, targets=('attention', 'fusion')), 0)
  assert {'dit/blocks/attn/wq', 'fusion/projections/wk', 'fusion/adaptor/blocks/mlp/up'} <= chosen.keys()
  with pytest.raises(UserError, match="lora.targets: 'refiner' is no matrix of this model: take attention, mlp"):
    lora.init(shapes, lora.LoRAConfig(rank=2, targets=('refiner',)), 0)
  assert {'fusion.projections.2.to_v', 'transformer_blocks.0.attn.to_q'} <= lora_files.matrices(shapes).keys()


def trained(way: str, recipe, workdir):
  """The recipe of a run of two steps on edits, whose losses are finite."""
  made = with_way(recipe(), way)
  made.data = dataclasses.replace(made.data, tasks=(Task('edit'),), max_prompt_tokens=132, max_rewrite_tokens=52)
  made.objective.noises_per_example = 2
  made.train = dataclasses.replace(made.train, steps=2, preview_every=0)
  train.run(made, workdir)
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == [1, 2] and all(np.isfinite(line['loss']) for line in lines)
  return made


@pytest.mark.slow
def test_a_text_encoder_trains(recipe, tmp_path):
  trained('text', recipe, tmp_path)


@pytest.mark.slow
def test_edits_from_training_to_images(recipe, tmp_path, capsys):
  made = trained('kv', recipe, tmp_path)
  export.run(made, tmp_path)
  pipe = UniFusionPipeline.from_pretrained(tmp_path / 'export')
  assert pipe.model.config == made.model and pipe.taps == made.taps
  assert pipe('make it blue', images=REFERENCES[0], rewrite='a blue circle', steps=1).arrays[0].shape == (64, 64, 3)
  capsys.readouterr()
  info.run(str(tmp_path / 'export'))
  assert 'kv, of 2 taps of width 32: 2 blocks over the tokens' in capsys.readouterr().out


@pytest.mark.parametrize('mesh', [None])  # in place of the fixture: the estimate brings its own
def test_bytes_by_formula(mesh, recipe):
  """Exact where shapes say them, and larger where a way holds more."""
  del mesh
  temporaries = {}
  for way in (*fusion.WAYS, 'two'):
    config = with_way(recipe(), way)
    held = estimate.chip_bytes(config, 8)
    with jax.sharding.use_abstract_mesh(sharding.abstract_mesh(config.mesh, 8)):
      assert sum(held.arguments.values()) == pytest.approx(sharding.shard_bytes(train.abstract(config)), abs=100)
    temporaries[way] = held.temporaries
    assert (held.phases['LAP'] != {}) and replication.repeated(config, 8) is not None
  assert temporaries['last'] == temporaries['text'] < temporaries['hidden'] and temporaries['lap'] < temporaries['two']


def megaflops_a_token(config, tokens=96) -> float:
  """Of a forward pass between VLM and DiT over one prompt."""
  whole, none = sharding.abstract_mesh(sharding.MeshConfig(1, 1, 1), 1), jax.sharding.AbstractMesh((), ())
  with jax.sharding.use_abstract_mesh(none), jax.sharding.use_abstract_mesh(whole):
    module = jax.eval_shape(lambda: fusion.make(config.model, rngs=nnx.Rngs(0)))
    hidden = jax.ShapeDtypeStruct((1, tokens, len(config.taps), config.model.lap.width), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, tokens), bool)
    counted = model_flops.count(lambda module, *inputs: module(*inputs), module, hidden, mask, mask, trained=1)
  return counted.forward / tokens / 1e6


@pytest.mark.slow
def test_recipes_differ_in_the_condition_alone():
  """All scales can run, have one budget, and docs/ablations.md says their counts."""
  page = (pathlib.Path(__file__).parent.parent / 'docs' / 'ablations.md').read_text()
  base = command_line.read('t2i')
  budget = fusion.parameters(base.model)
  assert f'{budget["dit"]:,}' in page
  for scale in SCALES:
    made = command_line.read(f'ablation:{scale}')
    configuration.check(made, 1)
    counts = fusion.parameters(made.model)
    assert counts['fusion'] == pytest.approx(budget['fusion'], rel=0.01) and counts['dit'] == budget['dit']
    row = rf'`:?{scale}`.*\| {made.model.lap.mlp} \| {counts["fusion"]:,} \| {megaflops_a_token(made):.2f} \|'
    assert re.search(row, page), scale
    lap = dataclasses.replace(base.model.lap, **{name: getattr(made.model.lap, name) for name in (
        'mlp', 'taps', 'depth', 'refiner_depth', 'tap_norm', 'separate')})
    assert made.model == dataclasses.replace(base.model, fusion=made.model.fusion, lap=lap)
    made.model, made.taps, made.sample.weights, made.recipe = base.model, base.taps, base.sample.weights, base.recipe
    assert made == base
  with pytest.raises(UserError, match="must begin with 0: model.fusion='text' reads"):
    configuration.check(command_line.read('ablation:text', ['taps=6']), 1)
