"""The command line: from training to images, and what cannot run ends in one sentence that says how to mend it."""

import json
import os
import pathlib
import subprocess
import sys

from PIL import Image
import pytest

ROOT = pathlib.Path(__file__).parent.parent


def called(*arguments, **environment):
  return subprocess.run([sys.executable, '-m', 'unifusion_jax.main', *arguments], cwd=ROOT, capture_output=True, text=True,
                        check=False, timeout=900, env=os.environ | environment)


def test_from_training_to_images(tmp_path):
  """Every mode on one workdir, and what each leaves there."""
  small = ['--config=configs/t2i.py', f'--workdir={tmp_path / "run"}', '--config.model.dit.depth=1',
           '--config.model.dit.unroll=1', '--config.objective.repa_depth=1', '--config.data.only=t2i/1-2',
           '--config.data.batch_size=4', '--config.train.steps=2', '--config.train.log_every=1', '--config.sample.steps=2',
           '--config.eval.examples=2', '--config.eval.batch_size=2']
  Image.new('RGB', (90, 90), 'white').save(tmp_path / 'my photo, white.png')
  more = {'sample': ['--config.sample.prompt=make the circle blue', f'--config.sample.references={tmp_path}/my photo, white.png']}
  for mode in ('train', 'sample', 'eval', 'export', 'sample'):
    done = called(*small, f'--mode={mode}', *more.get(mode, []), JAX_DISABLE_MOST_OPTIMIZATIONS='1')
    assert done.returncode == 0, done.stderr[-3000:]
  run = tmp_path / 'run'
  assert [json.loads(line)['step'] for line in (run / 'metrics.jsonl').read_text().splitlines()] == [1, 2]
  assert json.loads((run / 'config.json').read_text())['train']['steps'] == 2 and (run / 'config_eval.json').exists()
  assert list(run.glob('events.*')) and (run / 'samples' / '0000002.png').exists() and (run / 'checkpoints' / '2').is_dir()
  assert {'test_t2i_1-2', 'heldout_t2i_1-2'} <= json.loads((run / 'eval.json').read_text()).keys()
  assert (run / 'eval' / 'test_t2i_1-2.png').exists() and (run / 'export' / 'config.json').exists()
  # The second request has not written over the first
  assert sorted(path.name for path in (run / 'images').iterdir()) == ['000.png', '001.png', 'grid.png']
  text = Image.open(run / 'images' / '000.png').text
  assert text['prompt'] == 'make the circle blue' and text['seed'] == '0'
  settings = json.loads(text['settings'])
  assert settings['system'] == 'rewrite' and settings['weights'].endswith('at step 2') and 'white.png' in settings['references'][0]
  refused = called(*small, '--config.taps=(1,2,3)', '--mode=eval')
  assert refused.returncode and 'taps: [2, 4, 6] there' in refused.stderr and 'Traceback' not in refused.stderr


@pytest.mark.parametrize('arguments, said', [
    (['--config=configs/edit.py', '--config.optim.learning_rat=1'], "did you mean 'learning_rate'?"),
    (['--config=configs/edit.py', '--config.optim.learning_rate=fast'], "could not convert string to float: 'fast'"),
    (['--config=configs/edit.py:huge'], "has the scales tiny and 8b, not 'huge'"),
    (['--config=configs/nothere.py'], 'configs/nothere.py'),
    (['--config=configs/edit.py', '--mode=dance'], 'train|sample|rewrite|eval'),
    (['--config=configs/edit.py', '--mode=sample'], 'nothing to draw'),
    (['--config=configs/edit.py', '--mode=sample', '--config.sample.prompt=x', '--config.sample.references=no.png'], 'no.png'),
    (['--config=configs/edit.py', '--config.sample.references=/a.png,/b.png'], 'as tuple'),
    (['--config=configs/vlm.py', '--mode=sample'], 'draws nothing'),
    (['--config=configs/vae.py', '--mode=rewrite'], 'rewritten for a DiT'),
    (['--config=configs/edit.py', '--config.data.path=nowhere'], "data.path='nowhere' is neither"),
    (['--config=configs/edit.py', '--config.data.only=edits'], "there is no task 'edits' here; there are edit, t2i, reconstruct"),
    (['--config=configs/edit.py', '--config.data.batch_size=0'], 'data.batch_size=0 must be a multiple of'),
])
def test_what_cannot_run_says_so(arguments, said, tmp_path):
  run = called(*arguments, f'--workdir={tmp_path / "run"}')
  assert run.returncode != 0
  assert said in run.stderr.replace('\n', ' '), run.stderr[-2000:]
  assert 'Traceback' not in run.stderr
  assert not list(tmp_path.glob('run/checkpoints/*'))
