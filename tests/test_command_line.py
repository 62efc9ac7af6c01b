"""Overrides reach the recipe; what cannot be read ends in one sentence; a recipe's own errors stay whole."""

import os

from absl import flags
from ml_collections import config_flags
import pytest

from unifusion_jax import command_line
from unifusion_jax.errors import UserError


def parsed(*arguments):
  """The recipe under its overrides."""
  argv = ['main', *arguments]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', None, '', flag_values=values, sys_argv=argv)
  flags.DEFINE_enum('mode', 'train', ['train', 'sample'], '', flag_values=values)
  flags.mark_flag_as_required('config', flag_values=values)
  assert command_line.parse(argv, values) == ['main']
  return values['config'].value


def test_overrides():
  config = parsed('--config=configs/edit.py', '--config.optim.learning_rate=0.5', '--config.data.tiles=1,4,9',
                  '--config.sample.references=a.png', '--config.sample.references=b.png',
                  '--config.objective.rewrite_online')
  assert config.optim.learning_rate == 0.5 and config.data.tiles == (1, 4, 9)
  assert config.sample.references == ('a.png', 'b.png') and config.objective.rewrite_online


def test_a_reference_may_have_any_name(tmp_path):
  path = tmp_path / "my photo, it's (1).png"
  path.touch()
  assert parsed('--config=configs/edit.py', f'--config.sample.references={path}').sample.references == (str(path),)


EDIT = 'configs/edit.py'


@pytest.mark.parametrize('arguments, sentence', [
    ([EDIT, '--config.optim.learning_rat=1'], "no setting 'learning_rat'; did you mean 'learning_rate'? There are"),
    ([EDIT, '--config.optm.learning_rate=1'], "no setting 'optm'; did you mean 'optim'? There are: objective,"),
    ([EDIT, '--config.zzz=1'], "no setting 'zzz'; There are: objective,"),
    ([EDIT, '--config.seed.x=1'], "no setting 'x': its parent is of type int"),
    ([EDIT, '--config.optim.learning_rate=fast'], "learning_rate='fast' must be of type float, as 0.001 is"),
    ([EDIT, '--config.optim.warmup=1.5'], "config.optim.warmup='1.5' must be of type int, as 50 is"),
    ([EDIT, '--config.sample.verifi=perhaps'], "verifi='perhaps' must be of type bool, as True is"),
    ([EDIT, '--config.optim=muon'], 'config.optim is a group of settings: give --config.optim.name=value'),
    ([EDIT, '--config.taps=1,x'], "config.taps holds '1,x': all its items must be of type int"),
    ([EDIT, '--config.sample.references=/a.png,/b.png'], '/a.png,/b.png must be a tuple: give the flag once'),
    ([EDIT, '--config.seed'], 'Missing value for flag --config.seed'),
    ([EDIT, 'train'], "'train' is no flag"),
    ([EDIT, '--mode=dance'], '--mode=dance: value should be one of <train|sample>'),
    ([EDIT, '--mod=train'], 'Did you mean: mode'),
    ([f'{EDIT}:huge'], "has the scales tiny and 8b, not 'huge'"),
    (['configs/describe.py:tiny'], 'this recipe has no scales'),
    (['configs/nothere.py'], "No such file or directory: 'configs/nothere.py'"),
    (['configs/nothere.py', '--config.seed=1'], "No such file or directory: 'configs/nothere.py'"),
])
def test_sentences(arguments, sentence):
  with pytest.raises(UserError) as error:
    parsed(f'--config={arguments[0]}', *arguments[1:])
  assert sentence in str(error.value)
  assert 'Traceback' not in str(error.value)


def test_no_recipe():
  with pytest.raises(UserError, match='no recipe is named: give --config='):
    parsed()


@pytest.mark.parametrize('body, kind', [
    ("return {}['there']", KeyError), ('return None.there', AttributeError), ("return open('/there')", OSError),
    ("raise ValueError('there')", ValueError), ("return len(there)", NameError)])
def test_a_recipe_that_fails_keeps_its_traceback(body, kind, tmp_path):
  path = tmp_path / 'recipe.py'
  path.write_text(f'def get_config():\n  {body}\n')
  with pytest.raises(Exception, match='there') as error:
    parsed(f'--config={path}')
  assert not isinstance(error.value, UserError)
  chain = [error.value]
  while inner := chain[-1].__cause__ or chain[-1].__context__:
    chain.append(inner)
  assert any(isinstance(each, kind) and error_file(each) == os.fspath(path) for each in chain)


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
