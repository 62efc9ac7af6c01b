"""The command line: from training to images, and what cannot run ends in one sentence that says how to mend it."""

import json
import os
import pathlib
import subprocess
import sys

from absl import flags
from PIL import Image
import pytest

from unifusion_jax import command_line, main
from unifusion_jax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def run(monkeypatch):
  """`run(arguments)`: main in this process, as if it were started with them."""
  monkeypatch.chdir(ROOT)

  def call(*arguments):
    monkeypatch.setattr(sys, 'argv', ['main', *arguments])
    try:
      main.main(command_line.parse(sys.argv))
    finally:
      flags.FLAGS.unparse_flags()
      for name in [name for name in flags.FLAGS if name.startswith('config.')]:
        delattr(flags.FLAGS, name)
  return call


def started(*arguments, **environment):
  """A process of its own."""
  return subprocess.run([sys.executable, '-m', 'unifusion_jax.main', *arguments], cwd=ROOT, capture_output=True,
                        text=True, check=False, timeout=900, env=os.environ | environment)


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
  again = started(*small, *sample, JAX_DISABLE_MOST_OPTIMIZATIONS='1')
  assert again.returncode == 0, again.stderr[-3000:]
  steps = [json.loads(line)['step'] for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert steps == [1, 2]
  assert json.loads((workdir / 'config.json').read_text())['train']['steps'] == 2
  assert (workdir / 'config_eval.json').exists() and list(workdir.glob('events.*'))
  assert (workdir / 'samples' / '0000002.png').exists() and (workdir / 'checkpoints' / '2').is_dir()
  assert {'test_edit_1-4', 'heldout_edit_1-4'} <= json.loads((workdir / 'eval.json').read_text()).keys()
  assert (workdir / 'eval' / 'test_edit_1-4.png').exists() and (workdir / 'export' / 'config.json').exists()
  # The second request has not written over the first
  assert sorted(path.name for path in (workdir / 'images').iterdir()) == ['000.png', '001.png', 'grid.png']
  text = Image.open(workdir / 'images' / '000.png').text
  assert text['prompt'] == 'make the circle blue' and text['seed'] == '0'
  settings = json.loads(text['settings'])
  assert settings['system'] == 'rewrite' and settings['weights'].endswith('at step 2')
  assert 'white.png' in settings['references'][0]
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
    (['--config=configs/edit.py', '--config.data.batch_size=0'], 'data.batch_size=0 must be a multiple of'),
])
def test_what_cannot_run_says_so(run, arguments, sentence, tmp_path):
  with pytest.raises(UserError) as error:
    run(*arguments, f'--workdir={tmp_path / "run"}')
  assert sentence in str(error.value).replace('\n', ' ')
  assert not list(tmp_path.glob('run/checkpoints/*'))


WRONG = ['--config=configs/edit.py', '--config.optim.learning_rat=1']


def test_a_process_ends_in_the_sentence_alone():
  ended = started(*WRONG)
  assert ended.returncode == 1 and ended.stderr.startswith("error: there is no setting 'learning_rat'; did you mean")
  assert 'Traceback' not in ended.stderr


def test_a_traceback_where_it_is_asked_for(monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['main', *WRONG])
  monkeypatch.setenv('UNIFUSION_TRACEBACK', '1')
  with pytest.raises(UserError, match="no setting 'learning_rat'"):
    main.run()


def test_an_interrupt_is_one_line(monkeypatch, capsys):
  def interrupted(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(main.app, 'run', interrupted)
  with pytest.raises(SystemExit) as ended:
    main.run()
  assert ended.value.code == 130 and capsys.readouterr().err == 'interrupted\n'
