"""The command line: from training to images, and what cannot run ends in one sentence that says how to mend it."""

import contextlib
import errno
import io
import json
import os
import pathlib
import subprocess
import sys

from PIL import Image
import pytest

from unifusion_jax import errors, main
from unifusion_jax.errors import UserError
from unifusion_jax.planning import compiler

ROOT = pathlib.Path(__file__).parent.parent


def started(*arguments, **environment):
  """A process of its own."""
  return subprocess.run([sys.executable, '-m', 'unifusion_jax.main', *arguments], cwd=ROOT, capture_output=True,
                        text=True, check=False, timeout=900, env=os.environ | environment)


@pytest.mark.slow
def test_from_training_to_images(run, tmp_path):
  """Every mode on one workdir, and what each leaves there."""
  workdir = tmp_path / 'run'
  small = ['--config=configs/edit.py', f'--workdir={workdir}', '--config.init=', '--config.model.dit.depth=1',
           '--config.data.only=edit', '--config.data.batch_size=8', '--config.train.steps=2',
           '--config.train.log_every=1', '--config.sample.steps=2', '--config.eval.examples=2',
           '--config.eval.batch_size=2']
  Image.new('RGB', (90, 90), 'white').save(tmp_path / 'my photo, white.png')
  sample = ['--mode=sample', '--config.sample.prompt=make the circle blue',
            f'--config.sample.references={tmp_path}/my photo, white.png']
  for mode in (['--mode=train'], sample, ['--mode=eval'], ['--mode=export']):
    run(*small, *mode)
  again = started(*small, *sample, JAX_DISABLE_MOST_OPTIMIZATIONS='1', JAX_NUM_CPU_DEVICES='1')
  assert again.returncode == 0, again.stderr[-3000:]
  steps = [json.loads(line)['step'] for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert steps == [1, 2]
  settings = json.loads((workdir / 'config.json').read_text())
  assert settings['train']['steps'] == 2 and settings['recipe'] == 'configs/edit.py'
  assert (workdir / 'config_eval.json').exists() and list(workdir.glob('events.*'))
  assert (workdir / 'samples' / '0000002.png').exists() and (workdir / 'checkpoints' / '2').is_dir()
  assert {'test_edit_1-4', 'heldout_edit_1-4'} <= json.loads((workdir / 'eval.json').read_text()).keys()
  assert (workdir / 'eval' / 'test_edit_1-4.png').exists() and (workdir / 'export' / 'config.json').exists()
  # The second request has not written over the first
  assert sorted(path.name for path in (workdir / 'images').iterdir()) == ['000.png', '001.png', 'grid.png']
  text = Image.open(workdir / 'images' / '000.png').text
  assert text['prompt'] == 'make the circle blue' and text['seed'] == '0'
  settings, origin = json.loads(text['settings']), json.loads(text['origin'])
  assert settings['system'] == 'rewrite' and origin['model']['name'].endswith('at step 2')
  assert 'white.png' in json.loads(text['references'])[0]['file']
  with pytest.raises(UserError, match=r'taps: \[2, 4, 6\] there'):
    run(*small, '--config.taps=(1,2,3)', '--mode=eval')


@pytest.mark.parametrize('arguments, sentence', [
    (['--config=configs/edit.py', '--mode=dance'], 'train|sample|rewrite|eval'),
    (['--config=configs/edit.py', '--mode=sample'], 'nothing to sample'),
    (['--config=configs/edit.py', '--mode=sample', '--config.sample.prompt=x', '--config.sample.references=no.png'],
     'no.png'),
    (['--config=configs/vlm.py', '--mode=sample'], 'samples no images'),
    (['--config=configs/vae.py', '--mode=rewrite'], 'rewritten for a DiT'),
    (['--config=configs/edit.py', '--config.data.path=nowhere'], "data.path='nowhere' is neither"),
    (['--config=configs/edit.py', '--config.data.batch_size=0'], 'data.batch_size=0 must be between 1 and'),
])
def test_what_cannot_run_says_so(run, arguments, sentence, tmp_path):
  with pytest.raises(UserError) as error:
    run(*arguments, f'--workdir={tmp_path / "run"}')
  assert sentence in str(error.value).replace('\n', ' ')
  assert not list(tmp_path.glob('run/checkpoints/*'))


@pytest.mark.parametrize('name, reason', [
    ('file', 'Not a directory'), ('file/below', 'Not a directory'), ('n' * 300, 'File name too long')])
@pytest.mark.parametrize('mode', ['train', 'sample', 'eval', 'export', 'rewrite'])
def test_a_workdir_that_cannot_be_says_so_at_the_start(run, mode, name, reason, tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match=f'^--workdir=.* cannot be written to: .*: {reason}; give another folder'):
    run('--config=configs/edit.py', f'--mode={mode}', f'--workdir={tmp_path / name}')
  assert [path.name for path in tmp_path.iterdir()] == ['file']


def ended(error: BaseException):
  """The exit code or message of a process in which an error is raised."""
  with pytest.raises(SystemExit) as stop, errors.at_the_terminal():
    raise error
  return stop.value.code


@pytest.mark.parametrize('code', ['ENOSPC', 'EACCES', 'EROFS', 'ENOTDIR', 'EISDIR', 'ENAMETOOLONG', 'EDQUOT', 'EMFILE'])
def test_errors_of_files_end_in_one_sentence(code):
  number = getattr(errno, code)
  assert ended(OSError(number, 'why', '/a/b')) == f'error: /a/b: {os.strerror(number)}'
  assert ended(OSError(number, 'why', '/a', None, '/b')) == f'error: /a -> /b: {os.strerror(number)}'


def test_a_full_disk_needs_no_name():
  assert ended(OSError(errno.ENOSPC, 'why')) == 'error: No space left on device'


@pytest.mark.parametrize('error', [
    FileNotFoundError(errno.ENOENT, 'why', '/a/b'), OSError('why'), OSError(errno.ENOTDIR, 'why'), ValueError('why'),
    KeyError('why')])
def test_a_programmers_error_keeps_its_traceback(error):
  with pytest.raises(type(error), match='why'), errors.at_the_terminal():
    raise error


def test_a_message_is_no_longer_than_it_is_useful():
  message = ended(UserError('\x1b[31mred\x00 ' + 'é' * 10 ** 6))
  assert len(message) < 2100 and message.endswith('é... (998,010 more characters)')
  assert message.startswith('error: \ufffd[31mred\ufffd é')
  assert ended(UserError('two\nlines')) == 'error: two\nlines'


def test_an_interrupted_process_says_so_in_one_line(capsys):
  assert ended(KeyboardInterrupt()) == 130
  assert capsys.readouterr().err == 'interrupted\n'


def test_output_goes_to_a_terminal_of_any_encoding():
  code = r"""
from unifusion_jax import errors
with errors.at_the_terminal():
  print('caf\xe9')
  raise errors.UserError('\xe9')
"""
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False,
                        env=os.environ | dict(PYTHONIOENCODING='ascii'))
  assert (done.stdout, done.stderr, done.returncode) == ('caf\\xe9\n', 'error: \\xe9\n', 1)


def test_output_goes_where_python_sends_it():
  """As in a notebook, whose streams have no encoding."""
  with contextlib.redirect_stdout(io.StringIO()) as out, errors.at_the_terminal():
    print('caf\xe9')
  assert out.getvalue() == 'caf\xe9\n'


WRONG = ['--config=configs/edit.py', '--config.optim.learning_rat=1']


def test_a_process_ends_in_the_sentence_alone():
  process = started(*WRONG)
  assert process.returncode == 1
  assert process.stderr.startswith("error: there is no setting 'config.optim.learning_rat'; did you mean")
  assert 'Traceback' not in process.stderr


def test_a_traceback_where_it_is_asked_for(monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['main', '--config=edit', '--mode=dance'])
  monkeypatch.setenv('UNIFUSION_TRACEBACK', '1')
  with pytest.raises(UserError, match='train|sample|rewrite|eval'):
    main.run()


def test_an_interrupt_is_one_line(monkeypatch, capsys):
  def interrupted(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(main.app, 'run', interrupted)
  with pytest.raises(SystemExit) as ended:
    main.run()
  assert ended.value.code == 130 and capsys.readouterr().err == 'interrupted\n'


@pytest.mark.parametrize('recipe, flag, said', [
    ('edit.py', [], '--topology=v6e:8x8'), ('edit.py', ['--topology=v6e:3x3'], "the shape '3x3' must be one of"),
    ('edit.py', ['--topology=v6e:2x2', '--programs=draw'], "there is no program 'draw'"),
    ('sample.py:krea2_turbo', ['--topology=v5e:1x1', '--programs=train'], 'samples with a pipeline and trains nothing'),
    ('sample.py', ['--topology=v5e:1x1', '--save'], '--save writes a train step'),
    ('sample.py', ['--topology=v5e:1x1', '--config.plan.requests=-1'], 'plan.requests=-1'),
    ('describe.py', ['--topology=v5e:1x1'], '--mode=plan does not go with')])
def test_plans_want_devices_and_programs(run, tmp_path, monkeypatch, recipe, flag, said):
  monkeypatch.setattr(compiler, 'prepare', lambda topology: None)  # settings of a process that only plans
  with pytest.raises(UserError) as error:
    run(f'--config=configs/{recipe}', '--mode=plan', f'--workdir={tmp_path}', *flag)
  assert said in str(error.value) and not list(tmp_path.iterdir())
