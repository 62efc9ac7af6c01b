"""Every number of every recipe has a range, and what is out of it is refused by its full name."""

import dataclasses
import json
import math
import typing

import jax
import pytest

from unifusion_jax import command_line, fields, sharding
from unifusion_jax import config as configuration
from unifusion_jax.commands import describe
from unifusion_jax.errors import UserError
from unifusion_jax.models import causal_lm, decoder, dit, internvl, lap, qwen3_vl, t5, unifusion, vae
from unifusion_jax.weights import autoencoders, encoders

RECIPES = ('ablation:kv', 'benchmark', 'compare', 'describe', 'edit', 'edit:8b_256', 'edit:8b_512', 'edit:8b',
           'inspect', 'inspect:vlm', 'sample', 'sample:krea2_raw', 'sample:krea2_turbo_int8', 't2i', 't2i:8b_256',
           't2i:8b_512', 't2i:8b', 'vae', 'vlm', 'vlm:tower')
ANY = {'seed', 'sample.seed'}  # any whole number
MINUS_ONE = {'mesh.data', 'mesh.fsdp', 'mesh.tp', 'sample.guidance', 'a.guidance', 'b.guidance', 'objective.mean',
             'model.shift_factor', 'model.vision.mean'}  # where -1 is in range


def numbers(holder, prefix=''):
  """(name, value, kind) of every number of a configuration and tuple of numbers; of a tuple of groups, of the first."""
  for name, hint in fields.hints(type(holder)).items():
    value, name = getattr(holder, name), prefix + name
    kinds = {hint, *typing.get_args(hint)} & {int, float}
    if dataclasses.is_dataclass(value):
      yield from numbers(value, f'{name}.')
    elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
      yield from numbers(value[0], f'{name}[{value[0].name!r}].')
    elif kinds or hint is fields.Seed:
      yield name, value, (kinds or {int}).pop()


def replaced(holder, name, value):
  """The configuration with one number changed."""
  first, _, rest = name.partition('.')
  first, bracket, _ = first.partition('[')
  if not rest:
    return dataclasses.replace(holder, **{first: value})
  there = getattr(holder, first)
  new = (replaced(there[0], rest, value), *there[1:]) if bracket else replaced(there, rest, value)
  return dataclasses.replace(holder, **{first: new})


def read(recipe):
  config = command_line.read(recipe)
  return dataclasses.replace(config, prompt='x') if recipe == 'describe' else config


@pytest.mark.parametrize('recipe', RECIPES)
def test_numbers_out_of_range_are_refused_by_name(recipe):
  config, seen = read(recipe), set()
  devices = getattr(config, 'devices', 0) or 1
  configuration.check(config, devices)
  for name, value, kind in numbers(config):
    if name in ANY:
      continue
    wrong = [math.nan, math.inf, -math.inf, -1e30] if kind is float else [-10 ** 30, 10 ** 30, math.inf]
    for number in wrong + [-1] * (name not in MINUS_ONE):
      changed = replaced(config, name, (*value[1:], number) if isinstance(value, tuple) else number)
      with pytest.raises(UserError) as error:
        configuration.check(changed, devices)
      assert f'{name}=' in str(error.value) and 'must be' in str(error.value), (name, number)
    seen.add(name)
  assert len(seen) >= 5


def test_all_wrong_settings_are_listed_at_once():
  config = command_line.read('edit', ['optim.b1=1', 'train.steps=0', 'rewrite.count=0', 'eval.examples=0'])
  with pytest.raises(UserError) as error:
    configuration.check(config, 1)
  assert str(error.value).count('\n  ') == 4


@pytest.mark.parametrize('settings, sentence', [
    (['data.batch_size=10000000'], '10,000,000 images of 64^2 pixels with prompts of 132 tokens are 119 GiB'),
    (['data.batch_size=1000000000'], 'data.batch_size=1000000000 must be between 1 and 10,000,000'),
    (['data.path=x.jsonl', 'data.size=10000', 'data.unit=1', 'data.batch_size=1'], 'more than 2048 times data.unit=1'),
    (['mesh.tp=0'], 'mesh.tp=0 must be between 1 and 1,048,576'), (['mesh.data=0'], 'mesh.data=0 must be'),
    (['model.dit.depth=1000', 'model.dit.heads=1000', 'model.dit.head_dim=100', 'model.dit.mlp=1000000'],
     'model.dit.depth=1000 blocks of model.dit.width=100000, with 1000000 hidden units, are 3e+14 parameters'),
    (['model.dit.head_dim=10000', 'model.dit.heads=11'], 'model.dit.heads=11 x model.dit.head_dim=10000 make a width'),
    (['model.lap.heads=7'], 'model.lap.heads=7 must divide model.lap.width=160'),
    (['model.dit.rope_axes=4,14,12'], 'model.dit.rope_axes=(4, 14, 12) must be three even numbers that add up'),
    (['model.dit.kv_heads=5'], 'model.dit.kv_heads=5 must divide model.dit.heads=6'),
    (['data.path=x.jsonl', 'data.aspects=wide'], "data.aspects: the aspect 'wide' must be"),
    (['model.dtype=int4'], "model.dtype='int4' must be"),
])
def test_sizes_are_bounded_and_the_arithmetic_said(settings, sentence):
  with pytest.raises(UserError) as error:
    configuration.check(command_line.read('edit', settings), 1)
  assert sentence in str(error.value)


@pytest.mark.parametrize('recipe, mesh, sentence', [
    ('edit', dict(data=1, fsdp=1, tp=4), 'mesh.tp=4 must divide model.lap.heads=5'),
    ('edit', dict(data=1, fsdp=64, tp=1), 'mesh.fsdp=64 must divide model.lap.width=160'),
    ('vlm', dict(data=1, fsdp=3, tp=1), 'mesh.fsdp=3 must divide model.vision.width=128 x 2 x 2'),
    ('vlm', dict(data=1, fsdp=1, tp=64), 'mesh.tp=64 must divide model.text.hidden=432'),
])
def test_a_mesh_that_does_not_divide_a_recipes_model(recipe, mesh, sentence):
  config = dataclasses.replace(command_line.read(recipe), mesh=sharding.MeshConfig(**mesh))
  with pytest.raises(UserError) as error:
    configuration.check(config, math.prod(mesh.values()))
  assert sentence in str(error.value)


TEXT = decoder.DecoderConfig(vocab=64, width=24, depth=1, heads=2, kv_heads=2, head_dim=8, hidden=20)
CONFIGS = {
    'text': causal_lm.TextConfig(TEXT),
    'internvl': internvl.InternVLConfig(internvl.VisionConfig(width=16, depth=1, heads=2, hidden=20, tile=16, patch=4),
                                        TEXT),
    'qwen3_vl': qwen3_vl.Qwen3VLConfig(qwen3_vl.VisionConfig(width=20, depth=2, heads=2, hidden=24, side=4,
                                                             deepstack=(0,)), TEXT, sections=(2, 1, 1)),
    't5': t5.T5Config(64, 24, 1, 2, 8, 20)}


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('mesh', [(8, 1), (5, 1), (3, 1), (7, 1), (1, 8), (1, 3), (1, 7), (1, 5), (2, 2), (4, 1)])
def test_what_an_encoder_needs_of_a_mesh(name, mesh):
  """`undivided` says nothing where jax shards the parameters, and a sentence where it would not."""
  fsdp, tp = mesh
  abstract = sharding.abstract_mesh(sharding.MeshConfig(data=1, fsdp=fsdp, tp=tp), fsdp * tp)
  with jax.sharding.use_abstract_mesh(abstract):
    try:
      encoders._shapes(CONFIGS[name], 'float32', '')
    except ValueError:
      divides = False
    else:
      divides = True
    assert divides == (not CONFIGS[name].undivided(abstract.shape))
    if not divides:
      with pytest.raises(UserError, match=r'mesh\.(fsdp|tp)=\d must divide \S+=\d+.*choose another mesh'):
        encoders.abstract(CONFIGS[name])


def test_loading_on_a_mesh_that_does_not_divide(tmp_path):
  model = unifusion.UniFusionConfig(lap.LAPConfig(width=6, heads=3, kv_heads=3, mlp=6), dit.DiTConfig(depth=1))
  (tmp_path / 'config.json').write_text(json.dumps(unifusion.to_json(model)))
  with jax.set_mesh(jax.make_mesh((1, 1, 7), sharding.AXES, devices=jax.devices()[:7])):
    with pytest.raises(UserError, match='mesh.tp=7 must divide text.hidden=432'):
      encoders.load(describe.EMBEDDED)
    with pytest.raises(UserError, match='mesh.tp=7 must divide text.hidden=432'):
      describe.describe(describe.DescribeConfig(prompt='x'))
    with pytest.raises(UserError, match='mesh.tp=7 must divide lap.heads=3'):
      unifusion.load(tmp_path)


ABSURD = 10 ** 9


@pytest.mark.parametrize('name, sentence', [
    ('num_hidden_layers', 'text.depth=1000000000 must be'), ('hidden_size', 'text.width=1000000000 must be'),
    ('intermediate_size', 'text.hidden=1000000000 must be'), ('vocab_size', 'text.vocab=1000000000 must be')])
def test_absurd_encoders_are_refused_from_their_numbers(name, sentence, tmp_path):
  config_json = causal_lm.TextConfig(TEXT).to_json() | {name: ABSURD}
  (tmp_path / 'config.json').write_text(json.dumps(config_json))
  for read_folder in (encoders.config, encoders.load):
    with pytest.raises(UserError, match='config.json: ' + sentence):
      read_folder(tmp_path)


def test_absurd_models_are_refused_from_their_numbers(tmp_path):
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(unifusion.to_json(unifusion.krea2()) | dict(num_layers=ABSURD)))
  with pytest.raises(UserError, match='config.json: dit.depth=1000000000 must be'):
    unifusion.load(tmp_path)
  path.write_text(json.dumps(unifusion.to_json(unifusion.krea2()) | dict(text_intermediate_size='many')))
  with pytest.raises(UserError, match='config.json: lap.mlp=many must be'):
    unifusion.read_config(tmp_path)
  path.write_text(json.dumps(vae.VAEConfig(block_out_channels=(8, ABSURD), norm_num_groups=8).to_json()))
  for read_folder in (autoencoders.config, autoencoders.load):
    with pytest.raises(UserError, match='config.json: block_out_channels=.8, 1000000000. must be'):
      read_folder(tmp_path)


def test_public_sizes_are_in_range():
  for preset in (internvl.PRESETS | qwen3_vl.PRESETS | causal_lm.PRESETS | t5.PRESETS | autoencoders.PRESETS).values():
    assert preset.problems() == []
  assert unifusion.krea2().problems() == unifusion.base_8b().problems() == []
