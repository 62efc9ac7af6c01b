"""Settings reach the recipe; what cannot be read ends in one sentence; a recipe's own errors stay whole."""

import os
import pathlib
import re

from absl import flags
import pytest

from unifusion_jax import command_line, fields
from unifusion_jax.errors import UserError

EDIT = 'configs/edit.py'


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
  monkeypatch.chdir(pathlib.Path(__file__).parent.parent)


def parsed(*arguments):
  """The recipe under its settings."""
  values = flags.FlagValues()
  command_line.define(values)
  flags.DEFINE_enum('mode', 'train', ['train', 'sample'], '', flag_values=values)
  assert command_line.parse(['main', *arguments], values) == ['main']
  return command_line.read(values.config, values.setting)


def edit(*arguments):
  return parsed(f'--config={EDIT}', *arguments)


def test_settings():
  config = edit('--config.optim.learning_rate=0.5', '--config.data.tiles=1,4,9', '--config.sample.references=a.png',
                '--config.sample.references=b.png', '--config.objective.rewrite_online', '--noconfig.sample.verifi')
  assert config.optim.learning_rate == 0.5 and config.data.tiles == (1, 4, 9)
  assert config.sample.references == ('a.png', 'b.png')
  assert config.objective.rewrite_online and not config.sample.verifi


@pytest.mark.parametrize('name, text, value', [
    ('optim.warmup', '7', 7), ('optim.learning_rate', '1e-5', 1e-5), ('objective.mean', '-1', -1.0),
    ('objective.rewrite_online', 'true', True), ('sample.verifi', 'False', False), ('data.only', 'edit', 'edit'),
    ('sample.prompt', 'a ring,\na "star" = 1', 'a ring,\na "star" = 1'), ('sample.prompt', '', ''),
    ('sample.rewrite', 'a ring', 'a ring'), ('sample.rewrite', 'None', None), ('sample.rewrite', '', ''),
    ('init', 'None', None), ('init', '', None), ('data.rewrites', 'None', None), ('vlm_cache', '', None),
    ('sample.weights', 'None', None), ('sample.system', 'None', None),
    ('data.tiles', '(1,4)', (1, 4)), ('data.tiles', '[1, 4]', (1, 4)), ('data.tiles', '1,', (1,)), ('taps', '', ()),
    ('data.aspects', '1:1, 5:3', ('1:1', '5:3')), ('data.aspects', "('1:1', '5:3')", ('1:1', '5:3')),
    ('sample.references', 'a, b.png', ('a, b.png',)), ('sample.references', 'None', ()),
    ('sample.references', "('a, b.png', '(1).png')", ('a, b.png', '(1).png')),
    ('sample.references', '(1).png', ('(1).png',)), ('sample.references', "it's (1", ("it's (1",)),
    ('seed', '-1', fields._folded(-1)), ('model.dit.rope_axes', '4,14,14', (4, 14, 14))])
def test_a_value_after_an_equals_sign_or_a_space(name, text, value):
  *groups, last = name.split('.')
  for arguments in ((f'--config.{name}={text}',), (f'--config.{name}', text)):
    holder = edit(*arguments, '--mode=sample')
    for group in groups:
      holder = getattr(holder, group)
    assert getattr(holder, last) == value and type(getattr(holder, last)) is type(value)


def test_every_optional_setting_is_unset():
  def optional(holder, prefix=''):
    for name, hint in fields.hints(type(holder)).items():
      value = getattr(holder, name)
      if type(None) in getattr(hint, '__args__', ()):
        yield prefix + name
      elif hasattr(value, '__dataclass_fields__'):
        yield from optional(value, f'{prefix}{name}.')
  names = list(optional(edit()))
  assert {'init', 'vlm_cache', 'data.rewrites', 'sample.weights', 'sample.rewrite', 'sample.system'} <= set(names)
  for name in names:
    holder = edit(f'--config.{name}=None')
    for part in name.split('.'):
      holder = getattr(holder, part)
    assert holder is None


def test_a_frozen_part_of_a_recipe_is_set():
  config = parsed('--config=configs/vlm.py', '--config.model.text.depth=4')
  assert config.model.text.depth == 4 and config.model.vision.depth == 4


def test_references_may_have_any_name(tmp_path):
  path = tmp_path / "my photo, it's (1).png"
  path.touch()
  (tmp_path / 'b').touch()
  assert edit(f'--config.sample.references={path}').sample.references == (str(path),)
  assert edit(f'--config.sample.references={tmp_path}/b,{tmp_path}/b').sample.references == (f'{tmp_path}/b',) * 2


def test_home_is_the_home_folder_in_every_path(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  names = ('vlm', 'vae', 'init', 'vlm_cache', 'data.path', 'data.rewrites', 'sample.weights', 'sample.references')
  config = edit(*(f'--config.{name}=~/x' for name in names), '--config.sample.prompt=@~/x')
  assert [config.vlm, config.vae, config.init, config.vlm_cache, config.data.path, config.data.rewrites,
          config.sample.weights] == ['/home/me/x'] * 7
  assert config.sample.references == ('/home/me/x',) and config.sample.prompt == '@/home/me/x'
  describe = parsed('--config', 'configs/describe.py', '--config.vlm=~/x', '--config.cache=~')
  assert (describe.vlm, describe.cache) == ('/home/me/x', '/home/me')
  assert edit('--config.sample.prompt=~/x is a path').sample.prompt == '~/x is a path'
  assert command_line.PathParser().parse('~/x') == '/home/me/x'


def test_any_whole_number_is_a_seed():
  seeds = [edit(f'--config.seed={seed}').seed for seed in (
      0, 1, 2 ** 31 - 1, 2 ** 32 - 1, -1, 2 ** 32, 2 ** 63 - 1, 2 ** 63, -2 ** 63, 10 ** 100)]
  assert seeds[:4] == [0, 1, 2 ** 31 - 1, 2 ** 32 - 1]
  assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2 ** 32 for seed in seeds)


def test_a_recipe_by_its_name(tmp_path, monkeypatch):
  """From any folder; a file wins."""
  monkeypatch.chdir(tmp_path)
  tiny = parsed('--config=edit')
  assert tiny == parsed('--config=edit:tiny') == parsed('--config=configs/edit.py') != parsed('--config=edit:8b')
  (tmp_path / 'edit').mkdir()
  assert parsed('--config=edit') == tiny
  path = tmp_path / 'odd name.py'
  path.write_text('from unifusion_jax.commands import describe\n\n'
                  'def get_config():\n  return describe.DescribeConfig(vlm="~", seed=-1)\n')
  monkeypatch.setenv('HOME', '/home/me')
  here = parsed(f'--config={path}')
  assert here.vlm == '/home/me' and here.seed >= 0  # its own values are completed as those of the command line


@pytest.mark.parametrize('arguments, sentence', [
    ([EDIT, '--config.optim.learning_rat=1'],
     "no setting 'config.optim.learning_rat'; did you mean 'config.optim.learning_rate'? There are"),
    ([EDIT, '--config.optm.learning_rate=1'], "no setting 'config.optm'; did you mean 'config.optim'? There are: obj"),
    ([EDIT, '--config.zzz=1'], "no setting 'config.zzz'; There are: objective,"),
    ([EDIT, '--config.=1'], "no setting 'config.'; There are: objective,"),
    ([EDIT, '--config.seed.x=1'], "no setting 'config.seed.x': config.seed is of type int"),
    ([EDIT, '--config.init.x=1'], "no setting 'config.init.x': config.init is of type str"),
    ([EDIT, '--config.optim.learning_rate=fast'], '--config.optim.learning_rate=fast: it must be a number; here it is'),
    ([EDIT, '--config.optim.learning_rate', 'fast'], '--config.optim.learning_rate=fast: it must be a number'),
    ([EDIT, '--config.optim.warmup=1.5'], '--config.optim.warmup=1.5: it must be a whole number; here it is 50'),
    ([EDIT, '--config.optim.warmup=None'], '--config.optim.warmup=None: it must be a whole number'),
    ([EDIT, '--config.sample.verifi=perhaps'], '--config.sample.verifi=perhaps: it must be true or false'),
    ([EDIT, '--config.optim=muon'], 'config.optim is a group of settings: give --config.optim.name=value'),
    ([EDIT, '--config.objective=None'], 'config.objective is a group of settings: give --config.objective.mean=value'),
    ([EDIT, '--config.data.tiles=four'], "--config.data.tiles=four: item 'four': it must be a whole number"),
    ([EDIT, '--config.data.tiles=1', '--config.data.tiles=x'], "--config.data.tiles=1,x: item 'x': it must be a whole"),
    ([EDIT, '--config.data.tiles=(1,2.5)'], "--config.data.tiles=(1,2.5): item '2.5': it must be a whole number"),
    ([EDIT, '--config.taps=1,,2'], "--config.taps=1,,2: item '': it must be a whole number"),
    ([EDIT, '--config.model.dit.rope_axes=1,2'], '--config.model.dit.rope_axes=1,2: it must be 3 items with commas'),
    ([EDIT, '--config.data.tasks=t2i'], '--config.data.tasks=t2i: item \'t2i\': this setting is a part of the recipe'),
    ([EDIT, '--config.hub=x'], '--config.hub=x: this setting is a part of the recipe'),
    ([EDIT, '--config.seed'], '--config.seed=: it wants a value, after = or a space'),
    ([EDIT, '--config.seed', '--mode=train'], '--config.seed=: it wants a value'),
    ([EDIT, '--config.seed=' + '9' * 5000], '--config.seed='),
    ([EDIT, 'train'], "'train' is no flag"),
    ([EDIT, '--mode=dance'], '--mode=dance: value should be one of <train|sample>'),
    ([EDIT, '--mod=train'], 'Did you mean: mode'),
    ([f'{EDIT}:huge'], "has the scales tiny, 8b_256, 8b_512, 8b, krea2, not 'huge'"),
    (['configs/describe.py:tiny'], 'this recipe has no scales'),
    (['configs/nothere.py'], 'there is no recipe configs/nothere.py: give the path of a file, or one of ablation, '),
    (['configs'], 'there is no recipe configs:'),
    (['README.md'], 'README.md is no recipe: it must be a Python file'),
    (['unifusion_jax/flow.py'], 'flow.py is no recipe: it has no function get_config()'),
])
def test_sentences(arguments, sentence):
  with pytest.raises(UserError) as error:
    parsed(f'--config={arguments[0]}', *arguments[1:])
  assert sentence in str(error.value)
  assert 'Traceback' not in str(error.value)


def test_a_wrong_value_of_any_setting_names_it():
  texts = (tuple[str, ...], tuple[fields.Path, ...])  # of which 'four' is one
  def leaves(holder, prefix=''):
    for name, kind in fields.hints(type(holder)).items():
      value = getattr(holder, name)
      if hasattr(value, '__dataclass_fields__'):
        yield from leaves(value, f'{prefix}{name}.')
      elif value is not None and not isinstance(value, str) and kind not in texts:
        yield prefix + name
  names = list(leaves(edit()))
  assert len(names) > 100
  for name in names:
    with pytest.raises(UserError, match=rf'^--config\.{name}=four: '):
      edit(f'--config.{name}=four')


def test_no_recipe():
  with pytest.raises(UserError, match='no recipe is named: give --config='):
    parsed()


@pytest.mark.parametrize('body, kind', [
    ("return {}['there']", KeyError), ('return None.there', AttributeError), ("return open('/there')", OSError),
    ("raise ValueError('there')", ValueError), ("return len(there)", NameError)])
def test_a_recipe_that_fails_keeps_its_traceback(body, kind, tmp_path):
  path = tmp_path / 'recipe.py'
  path.write_text(f'def get_config():\n  {body}\n')
  with pytest.raises(kind, match='there') as error:
    parsed(f'--config={path}')
  assert not isinstance(error.value, UserError)
  assert error_file(error.value) == os.fspath(path)


def error_file(error: BaseException) -> str:
  """The file of the innermost frame."""
  frames = error.__traceback__
  while frames.tb_next:
    frames = frames.tb_next
  return frames.tb_frame.f_code.co_filename


def test_a_recipe_may_end_in_a_sentence_of_its_own(tmp_path):
  path = tmp_path / 'recipe.py'
  path.write_text('from unifusion_jax.errors import UserError\n\ndef get_config(scale):\n  try:\n    return {}[scale]\n'
                  "  except KeyError:\n    raise UserError(f'no scale {scale}') from None\n")
  with pytest.raises(UserError, match='^no scale small$'):
    parsed(f'--config={path}:small')
  with pytest.raises(UserError, match='wants a scale, after a colon'):
    parsed(f'--config={path}')
  path.write_text('def get_config():\n  return {}\n')
  with pytest.raises(UserError, match='returned a dict, and must return a config.Config'):
    parsed(f'--config={path}')


def test_help_tells_of_recipes_and_their_settings():
  text = command_line.explained('head', '  --flag', ['main', '--help', '--mode', 'train'])
  assert text.startswith('head') and text.endswith('  --flag')
  assert all(f'\n  {path.stem} ' in text for path in command_line.PACKAGED.glob('[a-z]*.py'))


@pytest.mark.parametrize('arguments', [
    ['--help', '--config=edit:8b'], ['--config', 'edit:8b', '--help'], ['-config', 'edit:8b', '--mode=plan', '-h'],
    ['--config=t2i', '--workdir', 'x', '--help', '--config=edit:8b'],
    ['--config.sample.prompt', 'a --config=t2i', '--help', '--config', 'edit:8b']])
def test_help_tells_of_the_recipe_that_would_run(arguments):
  """Under the settings that are given."""
  text = command_line.explained('head', '  --flag', ['main', *arguments, '--config.data.batch_size', '24'])
  assert text.startswith('Edits: ') and "\n--config.data.tasks=(Task(name='edit'" in text
  assert '\n--config.seed=0\n' in text and '\n--config.data.size=1024  # images have about size^2 pixels\n' in text
  assert '\n--config.objective.lora.rank=0  # 0: none, the whole model is trained\n' in text
  assert '\n--config.data.batch_size=24  # over all devices\n' in text


def test_help_with_a_wrong_recipe_is_a_sentence():
  for arguments, said in ((['--config'], 'config'), (['--config=none'], 'there is no recipe none'),
                          (['--config=edit', '--config.data.sizes=1'], "did you mean 'config.data.size'?")):
    with pytest.raises(UserError, match=re.escape(said)):
      command_line.explained('head', '  --flag', ['main', '--help', *arguments])


def test_help_with_a_recipe_of_ones_own(tmp_path):
  """Its classes, too."""
  path = tmp_path / 'recipe.py'
  path.write_text('''"""A recipe."""
import dataclasses

@dataclasses.dataclass
class Config:
  colour: str = 'red'  # of everything

def get_config():
  return Config()
''')
  text = command_line.explained('head', '  --flag', ['main', '--help', f'--config={path}'])
  assert text.startswith("A recipe.\n\nsettings:\n--config.colour='red'")
