"""A look inside: maps of the model's own computation, images without taps, layers that are alike, the command."""

import dataclasses
import json
import sys

from flax import nnx
import jax
import numpy as np
from PIL import Image
import pytest
from test_krea2 import theirs  # noqa: F401 (a fixture)
from test_pipeline import random_pipe

from unifusion_jax import command_line, conditioning, sharding
from unifusion_jax import config as configuration
from unifusion_jax.commands import inspect
from unifusion_jax.errors import UserError
from unifusion_jax.evaluation import inside
from unifusion_jax.models import lap
from unifusion_jax.pipeline import UniFusionPipeline
from unifusion_jax.request import Request
from unifusion_jax.scenes import examples
from unifusion_jax.scenes.evaluation import layer_dropout
from unifusion_jax.weights import quantize

SCENE = examples.example('edit', 'test', 0)['references'][0]
EDIT = Request('make it blue', (SCENE,), rewrite='a small blue circle at the top left')


def random(module, seed=0):
  """The module with random parameters, so that each matters."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jax.device_put(rng.normal(0, 0.3, x.shape).astype(np.float32), x.sharding), module)


def some_lap(**sizes):
  config = lap.LAPConfig(**dict(width=32, taps=3, depth=2, refiner_depth=1, heads=4, kv_heads=4, mlp=48) | sizes)
  return random(jax.jit(lambda: lap.LAP(config, 24, rngs=nnx.Rngs(0)))())


@pytest.mark.slow
@pytest.mark.parametrize('kind, sizes', [
    ('float32', dict(kv_heads=2)), ('float32', dict(depth=0, refiner_depth=0)), ('bfloat16', {}), ('int8', {}),
    ('float32', dict(tap_norm=True)), ('float32', dict(separate=True)), ('float32', dict(depth=0, separate=True)),
    ('bfloat16', dict(tap_norm=True, separate=True)), ('int8', dict(tap_norm=True, separate=True))], ids=str)
def test_attention_is_that_of_the_model(kind, sizes):
  """The condition tokens computed along the way are LAP's; rows of attention and the terms add up."""
  model, rng = some_lap(**sizes), np.random.default_rng(1)
  hidden = rng.normal(0, 1, (4, 5, 3, 32)).astype(np.float32)
  mask, image = (np.arange(5) < np.array(counts)[:, None] for counts in ((5, 3, 1, 4), (2, 3, 0, 1)))
  hidden[1, 4] = np.inf  # padding may hold anything
  if kind == 'int8':
    model = quantize.quantize(model)
  states = sharding.shard((hidden.astype('bfloat16' if kind == 'bfloat16' else np.float32), mask, image))
  attention, terms, tokens = jax.jit(inside.layer_attention)(model, *states)
  wanted = jax.jit(lambda lap, *states: lap(*states))(model, *states)
  tokens, wanted = (np.asarray(x, np.float32)[mask] for x in (tokens, wanted))
  difference = np.sqrt(np.mean((tokens - wanted) ** 2) / np.mean(wanted ** 2))
  assert difference < (inside.SAME if kind == 'bfloat16' else 1e-5)
  depth, groups = model.config.depth, model.config.kv_heads
  assert attention.shape == (depth, 20, groups, 4 // groups, 3, 3) and terms.shape == (4, 5, 3, 32)
  np.testing.assert_allclose(np.asarray(attention).sum(-1), 1, rtol=1e-5)
  assert depth == 0 or np.asarray(attention).std() > 0.05


def test_image_tokens_have_their_own_maps():
  """Of a separate LAP: they are those of a plain LAP with the blocks and weights of images; text has the other ones."""
  model = some_lap(separate=True)
  hidden = np.random.default_rng(1).normal(0, 1, (4, 5, 3, 32)).astype(np.float32)
  image = np.arange(5) < np.array([2, 3, 0, 5])[:, None]
  hidden, mask, image = sharding.shard((hidden, np.ones_like(image), image))
  attention, terms, _ = jax.jit(inside.layer_attention)(model, hidden, mask, image)
  plain = some_lap()
  for blocks, pool, where in ((model.blocks, model.pool, ~image), (model.image_blocks, model.image_pool, image)):
    plain.blocks, plain.pool, where = blocks, pool, np.asarray(where)
    one, two, _ = jax.jit(inside.layer_attention)(plain, hidden, mask, image)
    np.testing.assert_allclose(np.asarray(attention)[:, where.ravel()], np.asarray(one)[:, where.ravel()], atol=1e-5)
    np.testing.assert_allclose(np.asarray(terms)[where], np.asarray(two)[where], rtol=1e-4, atol=1e-5)


def test_maps_of_a_request(pipe):
  read = inside.read(pipe, EDIT, pipe.settings)
  maps = inside.maps(pipe, read)
  tokens = len(read.labels)
  assert read.is_image.sum() == 16 and read.places.shape == (4, 4) and ''.join(read.labels[:16]) == ''
  assert read.labels[16:19] == ['a', 'small', 'blue'] and inside.position_of(read, 'blue') == 18
  assert inside.position_of(read, 'dragon') is None and inside.label_of('') == "''"  # '' is an image's
  with pytest.raises(UserError, match="inspect.tokens=dragon: no text that conditions has it; they are 'a small blue"):
    inspect.inspect(pipe, [EDIT], 64, 64, pipe.settings, inside.InspectConfig(('dragon',)), {})
  assert maps.attention.shape == (1, tokens, 2, 2, 2) and maps.difference < 1e-4
  for values in (maps.received, maps.share):
    np.testing.assert_allclose(values.sum(-1), 1, rtol=1e-4)
  np.testing.assert_array_equal(read.states.hidden[read.states.mask], read.layers[:, [1, 2]])
  encoded = pipe.encode([EDIT]).conditioning
  with jax.set_mesh(pipe.mesh):
    rows = sharding.shard(jax.tree.map(lambda x: np.stack([x] * 4), read.states))
    again = conditioning.condition(pipe.model, rows)
  for condition in (encoded, again):
    assert np.asarray(condition.mask)[0].sum() == tokens
  np.testing.assert_allclose(*(np.asarray(c.tokens)[0][np.asarray(c.mask)[0]] for c in (encoded, again)), atol=1e-3)


def test_another_fusion_is_said(pipe):
  """A LAP that computes something else, and a model without one."""
  class Other(lap.LAP):
    def __call__(self, hidden, *masks):
      return super().__call__(hidden * 0.5, *masks)

  read = inside.read(pipe, EDIT, pipe.settings)
  other = jax.tree.map(lambda x: x, pipe.model)
  other.lap = jax.tree.map(lambda x: x, pipe.model.lap)
  other.lap.__class__ = Other
  with pytest.raises(inside.NotPooled, match='in another way than the LAP'):
    inside.maps(UniFusionPipeline(other, pipe.frozen, pipe.prompt_encoder), read)
  del other.lap
  bare = UniFusionPipeline(other, pipe.frozen, pipe.prompt_encoder)
  with pytest.raises(inside.NotPooled, match='pools no taps by LAP'):
    inside.maps(bare, read)
  with pytest.raises(inside.NotPooled, match='pools no taps by LAP'):
    inside.generate(bare, [EDIT], [read.states], 64, 64, pipe.settings.changed(guidance=1.0), (0,), 'weight')
  for replace, end in ((), 'no weights and no shares'), (('weight',), 'no shares, and no images with weights of 0'):
    config = inside.InspectConfig(replace=replace, scenes='edit')
    report, figures = inspect.inspect(bare, [EDIT], 64, 64, pipe.settings.changed(guidance=1.0), config, {})
    assert 'pools no taps by LAP' in report['note'] and report['note'].endswith(end)
    assert report['note'] in inspect.page(report, figures) and not report.keys() & {'dropout', 'scenes'}
  assert list(figures) == ['similarity', 'sizes'] and np.shape(report['layers']['image']['cosine']) == (3, 3)


def test_dropped_taps(pipe):
  """None changes nothing; all are what states of zeros give; a weight of 0 is a term less; padding stays unread."""
  requests = [dataclasses.replace(EDIT, seed=seed) for seed in (0, 1)]
  states = [inside.read(pipe, EDIT, pipe.settings).states] * 2
  sample = lambda *dropped: inside.generate(pipe, requests, states, 64, 64, pipe.settings, *dropped)
  whole = sample()
  for image, sampled in zip(whole, pipe.generate(requests, 64, 64)):
    assert np.abs(image.astype(int) - sampled.image).max() <= 1
  blank = [each._replace(hidden=np.zeros_like(each.hidden)) for each in states]
  for how in ('zeros', 'mean', 'weight'):
    np.testing.assert_array_equal(sample((), how), whole)
    assert inside.rms(sample((0,), how), whole).min() > 0
  np.testing.assert_array_equal(
      sample((0, 1), 'zeros'), inside.generate(pipe, requests, blank, 64, 64, pipe.settings))
  mean = inside.replaced(states[0], (1,), 'mean')
  np.testing.assert_array_equal(mean.hidden[:, 0], states[0].hidden[:, 0])
  np.testing.assert_allclose(mean.hidden[3, 1], states[0].hidden[states[0].mask][:, 1].mean(0), rtol=1e-5)
  before = np.asarray(pipe.model.lap.pool[...])
  with jax.set_mesh(pipe.mesh):
    assert np.asarray(inside.unweighted(pipe.model, (1,)).lap.pool[...]).tolist() == [before[0], 0]
  np.testing.assert_array_equal(pipe.model.lap.pool[...], before)
  with pytest.raises(UserError, match='without sample.precise and sample.strengths'):
    inside.generate(pipe, requests, states, 64, 64, pipe.settings.changed(strengths=(2.0,)))


@pytest.mark.slow
def test_image_tokens_with_weights_of_their_own(recipe):
  """Both kinds of weights are read, shown and set to 0: without all of them the states are no longer in the images."""
  made = recipe()
  made.model = dataclasses.replace(made.model, lap=dataclasses.replace(made.model.lap, separate=True, tap_norm=True))
  pipe = random_pipe(made)
  settings = pipe.settings.changed(guidance=1.0)
  read = inside.read(pipe, EDIT, settings)
  states, maps = read.states, inside.maps(pipe, read)
  sample = lambda states, *dropped: inside.generate(pipe, [EDIT], [states], 64, 64, settings, *dropped)
  blank = states._replace(hidden=np.zeros_like(states.hidden))
  assert inside.rms(sample(states), sample(blank)).min() > 0
  np.testing.assert_array_equal(*(sample(each, (0, 1), 'weight') for each in (states, blank)))
  with jax.set_mesh(pipe.mesh):
    without = inside.unweighted(pipe.model, (1,)).lap
    for changed, pool in (without.pool, pipe.model.lap.pool), (without.image_pool, pipe.model.lap.image_pool):
      assert np.asarray(changed[...]).tolist() == [np.asarray(pool[...])[0], 0]
  assert maps.difference < 1e-4
  for weights, where in (maps.weights, ~read.is_image), (maps.image_weights, read.is_image):
    looks = np.abs(weights) / np.abs(weights).sum()
    wanted = np.einsum('nshql,q->nsl', maps.attention[:, where], looks) / 2
    np.testing.assert_allclose(maps.received[:, where], wanted, rtol=1e-4)
  np.testing.assert_array_equal(maps.image_weights, pipe.model.lap.image_pool[...])
  config = inside.InspectConfig(replace=('weight',))
  report, figures = inspect.inspect(pipe, [EDIT], 64, 64, settings, config, {'1': (0,), '2': (1,)})
  assert 'note' not in report and report['dropout']['sets']['2']['weight']['least'] > 0
  np.testing.assert_allclose(report['image_weights'], maps.image_weights, atol=1e-4)
  page = inspect.page(report, figures)
  for name, weights in ('learned weight', maps.weights), ('learned weight, image tokens', maps.image_weights):
    assert f'| {name} | {weights[0]:.2f} | {weights[1]:.2f} |' in page
  labels = [text.get_text() for text in figures['weights'].axes[0].get_legend().get_texts()]
  assert labels == ['learned weight', 'learned weight, image', 'share, text', 'share, image']


def test_similarity_of_layers():
  hidden = np.random.default_rng(0).normal(3, 1, (300, 5, 16)).astype(np.float32)
  hidden[:, 4] = 2 * hidden[:, 1]
  for centred in (False, True):
    matrix = inside.layer_similarity(hidden, centred)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)
    np.testing.assert_allclose(np.diag(matrix), 1, rtol=1e-5)
    assert abs(matrix[1, 4] - 1) < 1e-5
    assert (matrix[0, 1] > 0.8) != centred  # what all tokens have in common
  np.testing.assert_allclose(inside.layer_norms(hidden)[1] * 2, inside.layer_norms(hidden)[4], rtol=1e-5)
  np.testing.assert_allclose(inside.nearest_tap(matrix, (0, 1))[[0, 1, 4]], 1, rtol=1e-5)


def test_the_judge_reads_images_without_taps(pipe):
  sets = {'1': (0,), '1+2': (0, 1)}
  report = layer_dropout.evaluate(pipe, 't2i', 2, sets, ('zeros',), pipe.settings)
  assert list(report) == ['all', '1', '1+2'] and list(report['all']) == ['present']
  rates = report['1+2']['zeros']
  assert rates['interval'][0] <= rates['all'] <= rates['interval'][1] and 'count' in rates


def test_sets_of_taps():
  sets = inside.sets_of_taps(('4+28+31', '7-25', '31+4-7'), tuple(range(4, 32, 3)))
  assert list(sets)[:10] == [str(tap) for tap in range(4, 32, 3)] and len(sets) == 13
  assert sets['4+28+31'] == (0, 8, 9) and sets['31+4-7'] == (0, 1, 9)
  assert sets['7-25'] == tuple(range(1, 8))
  with pytest.raises(UserError, match='there is no tap 5; this model taps the layers 2, 4, 6'):
    inside.sets_of_taps(('2+5',), (2, 4, 6))


@pytest.mark.parametrize('settings, sentence', [
    ('inspect.replace=nothing', "inspect.replace='nothing' must be one of zeros, mean, weight"),
    ('inspect.drop=2-4-6', "inspect.drop='2-4-6' must be taps with"),
    ('inspect.drop=two', "inspect.drop='two' must be taps with"),
    ('inspect.scenes=multi', "inspect.scenes='multi' must be 't2i', 'edit'"),
    ('inspect.examples=0', 'inspect.examples=0 must be'),
    ('inspect.replace= inspect.scenes=t2i', 'give inspect.replace=zeros'),
])
@pytest.mark.parametrize('recipe', ['inspect', 'edit'])
def test_wrong_settings(recipe, settings, sentence):
  with pytest.raises(UserError) as error:
    configuration.check(command_line.read(recipe, settings.split()), 1)
  assert str(error.value).count('\n') == 1 and sentence in str(error.value)


@pytest.mark.slow
def test_the_command(run, tmp_path, capsys):
  """Of a request with an image: every figure, every number; what is not there ends in a sentence."""
  Image.fromarray(SCENE).save(tmp_path / 'scene.png')
  small = ['--config=configs/inspect.py', f'--workdir={tmp_path}', '--config.sample.steps=2',
           '--config.sample.prompt=make it blue', f'--config.sample.references={tmp_path}/scene.png',
           '--config.sample.rewrite=a small blue circle at the top left', '--config.sample.num_images=2',
           '--config.inspect.replace=zeros', '--config.inspect.drop=2+6']
  with pytest.raises(UserError, match='inspect.drop=3: there is no tap 3'):
    run(*small, '--config.inspect.drop=3')
  run(*small, '--config.inspect.tokens=blue,circle')
  folder = tmp_path / 'inspect'
  report = json.loads((folder / 'inspect.json').read_text())
  assert report['taps'] == [2, 4, 6] and [each['token'] for each in report['shown']] == ['blue', 'circle']
  assert np.shape(report['mean']['image']['layers']) == (2, 3, 3) and report['difference'] < 1e-4
  np.testing.assert_allclose(np.sum(report['shown'][0]['layers'], axis=-1), 1, atol=1e-3)
  assert np.shape(report['layers']['text']['cosine']) == (7, 7) and len(report['tokens']) == 16 + 9
  dropped = report['dropout']['sets']
  assert list(dropped) == ['2', '4', '6', '2+6'] and all(each['zeros']['least'] > 0 for each in dropped.values())
  page = (folder / 'inspect.md').read_text()
  names = ['attention', 'tokens', 'text', 'image', 'weights', 'similarity', 'sizes', 'changes', 'dropout']
  for name in names:
    assert f']({name}.png)' in page and np.asarray(Image.open(folder / f'{name}.png').convert('RGB')).std() > 5, name
  assert str(folder / 'inspect.md') in capsys.readouterr().out


@pytest.mark.slow
def test_krea2s_layout_in_turn(run, theirs, tmp_path):  # noqa: F811
  """A tiny Krea 2: its own prompt and VLM, int8, one model at a time, no images."""
  run(f'--config=configs/inspect.py:{theirs[1]}', f'--workdir={tmp_path}', '--config.in_turn=true',
      '--config.sample.steps=2', '--config.sample.height=64', '--config.sample.width=64',
      '--config.sample.num_images=1', '--config.transformer_quantized=int8', '--config.inspect.replace=weight',
      '--config.inspect.drop=0-1', '--config.mesh.fsdp=1', '--config.mesh.data=8')
  report = json.loads((tmp_path / 'inspect' / 'inspect.json').read_text())
  assert report['taps'] == [0, 1, 3] and list(report['mean']) == ['text'] and report['difference'] < 0.05
  assert list(report['dropout']['sets']) == ['0', '1', '3', '0-1'] and report['dropout']['another_seed'] is None
  assert np.shape(report['layers']['text']['cosine']) == (5, 5)


def test_a_vlm_alone(run, qwen, tmp_path):
  """A language model that sees, with a reference; and nothing at all."""
  Image.fromarray(SCENE).save(tmp_path / 'scene.png')
  small = ['--config=configs/inspect.py:vlm', f'--workdir={tmp_path}', '--config.dtype=float32']
  run(*small, f'--config.vlm={qwen}', '--config.sample.rewrite=a circle',
      f'--config.sample.references={tmp_path}/scene.png')
  report = json.loads((tmp_path / 'inspect' / 'inspect.json').read_text())
  assert list(report) == ['taps', 'requests', 'layers'] and list(report['layers']) == ['text', 'image']
  assert np.shape(report['layers']['image']['centred']) == (3, 3)
  assert {path.name for path in (tmp_path / 'inspect').iterdir()} == {
      'inspect.json', 'inspect.md', 'similarity.png', 'sizes.png'}
  with pytest.raises(UserError, match='nothing to look into'):
    run(*small, '--config.vlm=')


def test_without_matplotlib(run, monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  with pytest.raises(UserError, match=r'pip install "unifusion_jax\[inspect\]"'):
    run('--config=configs/inspect.py', f'--workdir={tmp_path}')
