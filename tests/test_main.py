"""The command line: what cannot run ends in one sentence that says how to mend it."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


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
    (['--config=configs/edit.py', '--config.data.batch_size=0'], 'data.batch_size=0 must be a multiple of'),
])
def test_what_cannot_run_says_so(arguments, said, tmp_path):
  run = subprocess.run([sys.executable, '-m', 'unifusion_jax.main', *arguments, f'--workdir={tmp_path / "run"}'],
                       cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
  assert run.returncode != 0
  assert said in run.stderr.replace('\n', ' '), run.stderr[-2000:]
  assert 'Traceback' not in run.stderr
  assert not list(tmp_path.glob('run/checkpoints/*'))
