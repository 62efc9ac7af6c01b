"""Progress on a pipe and on a terminal, what a resumed run keeps of `metrics.jsonl`, and Weights & Biases."""

import io
import json
import sys

import pytest

from unifusion_jax import progress
from unifusion_jax.errors import UserError
from unifusion_jax.training import metrics


class Clock:
  """Seconds that pass only when told to."""
  now = 100.0

  def __call__(self) -> float:
    return self.now


class Terminal(io.StringIO):
  def isatty(self) -> bool:
    return True


def test_a_pipe_gets_a_line_every_ten_seconds_and_the_last_step(tmp_path):
  stream, clock = io.StringIO(), Clock()
  writer = metrics.Writer(tmp_path, 0, 300, stream=stream, clock=clock)
  writer.note('compiling')
  for step in range(1, 301):
    clock.now += 0.25  # 75 seconds in all: lines after 10, 20, ... 70 of them
    writer.set_postfix(dict(loss=1 / step, accuracy=0.5))
    if step % 100 == 0:
      writer.write(step, dict(loss=1 / step, images_per_second=3.4, accuracy=0.5))
    writer.step(step)
  writer.close()
  lines = stream.getvalue().splitlines()
  assert lines[:2] == ['compiling', 'step 40/300 loss 0.025']
  assert [line.split()[1] for line in lines[1:]] == [f'{step}/300' for step in (*range(40, 281, 40), 300)]
  assert lines[-1] == 'step 300/300 loss 0.003333 3.4 images/s'
  assert '\r' not in stream.getvalue()


def test_slow_steps_get_a_line_each(tmp_path):
  stream, clock = io.StringIO(), Clock()
  writer = metrics.Writer(tmp_path, 4, 6, stream=stream, clock=clock)
  for step in (5, 6):
    clock.now += 60
    writer.step(step)
  writer.step(6)  # nothing more was done
  writer.close()
  assert stream.getvalue().splitlines() == ['step 5/6', 'step 6/6']


def test_a_line_has_all_rates(tmp_path):
  """In one order, large numbers in full, shares in percent."""
  stream = io.StringIO()
  writer = metrics.Writer(tmp_path, 0, 2, stream=stream)
  rates = dict(hbm_peak_gib=73.25, tokens_per_second=1234567.8, tflops_per_chip=402.46, mfu=0.40694, data_wait=0.021,
               compile_wait=0.0, step_time=2.3456, images_per_second=218.3, loss=0.51234, gradient_norm=1.0)
  writer.write(2, rates)
  writer.step(2)
  writer.close()
  assert stream.getvalue() == ('step 2/2 loss 0.5123 218 images/s 2.35 s/step data wait 2% MFU 40.7% 402 TFLOP/s '
                               '1,234,568 tokens/s HBM 73.2 GiB\n')


def test_other_work_on_a_pipe_gets_lines_too():
  stream, clock = io.StringIO(), Clock()
  bar = progress.bar(1000, 'record', stream=stream, clock=clock)
  for _ in range(1000):
    clock.now += 0.025
    bar.update(1)
  bar.close()
  assert stream.getvalue().splitlines() == ['record 400/1000', 'record 800/1000', 'record 1000/1000']


def test_a_run_by_the_clock_tells_its_share(tmp_path):
  stream, clock = io.StringIO(), Clock()
  writer = metrics.Writer(tmp_path, 0, None, stream=stream, clock=clock)
  for step in range(1, 4):
    clock.now += 6
    writer.step(step, step / 3)
  writer.close()
  assert stream.getvalue().splitlines() == ['step 2 done 67%', 'step 3 done 100%']


def test_a_terminal_gets_a_bar(tmp_path):
  stream = Terminal()
  writer = metrics.Writer(tmp_path, 2, 4, stream=stream)
  writer.note('compiling')
  writer.write(3, dict(loss=0.5, images_per_second=3.4))
  writer.step(3)
  writer.step(4)
  writer.close()
  last = stream.getvalue().split('\r')[-1]
  assert 'compiling\n' in stream.getvalue() and '4/4' in last and 'loss=0.5, images/s=3.4' in last


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
  """Whole lines up to it stay, one that was cut off goes, and the run writes on behind them."""
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
  writer = metrics.Writer(tmp_path, 2, 4, stream=io.StringIO())
  writer.write(3, dict(loss=0.123456789, tflops_per_chip=1.23456789e-5, images_per_second=12.3456789))
  writer.close()
  assert [json.loads(line) for line in path.read_text().splitlines()] == [
      dict(step=1, loss=3.0), dict(step=2, loss=2.0),
      dict(step=3, loss=0.123457, tflops_per_chip=1.23457e-05, images_per_second=12.345679)]
  assert list(tmp_path.glob('events.*'))


def test_a_torn_file_keeps_its_whole_lines_and_takes_more(tmp_path):
  """Lines that run into each other, zeros of a lost block, other JSON: none of them stops a run that goes on."""
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1, "loss": 3.0}\n{"step": 2, "lo{"step": 2, "loss": 2.5}\n' + b'\0' * 40 + b'\n\n'
                   b'[2]\n7\n{"loss": 1}\n{"step": "2"}\n\xff\xfe\n' + b'[' * 10 ** 5 + b'\n'
                   b'{"step": 2, "loss": NaN}\n{"step": 2, "loss_held_out": 2.0}\n{"step": 3, "loss": 1.0}')
  writer = metrics.Writer(tmp_path, 2, 4, stream=io.StringIO())
  writer.write(3, dict(loss=0.5, ratio=float('nan'), rate=float('inf')))
  writer.close()
  lines = path.read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines] == [1, 2, 2, 3]
  assert lines[-1] == '{"step": 3, "loss": 0.5, "ratio": null, "rate": null}'
  assert [file.name for file in tmp_path.iterdir() if file.suffix == '.part'] == []


WANDB = '''
import json, os

class Error(Exception):
  pass

def record(**call):
  with open(os.environ['WANDB_STUB'], 'a') as file:
    file.write(json.dumps(call) + '\\n')

class Run:
  starting_step = int(os.environ.get('WANDB_STUB_STEP', 0))

  def log(self, values, step):
    record(log=values, step=step)

  def finish(self, exit_code):
    record(finish=exit_code)

def init(**settings):
  if settings['project'] == 'closed':
    raise Error('permission denied')
  record(init=settings)
  return Run()
'''


@pytest.fixture
def wandb(tmp_path, monkeypatch):
  """`wandb()` -> the calls so far of a stub in the place of Weights & Biases."""
  folder, calls = tmp_path / 'packages', tmp_path / 'calls'
  folder.mkdir()
  (folder / 'wandb.py').write_text(WANDB)
  monkeypatch.syspath_prepend(str(folder))
  monkeypatch.setenv('WANDB_STUB', str(calls))
  monkeypatch.delitem(sys.modules, 'wandb', raising=False)
  yield lambda: [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
  sys.modules.pop('wandb', None)


def test_weights_and_biases_gets_the_metrics_and_goes_on_in_its_run(wandb, tmp_path, monkeypatch):
  workdir = tmp_path / 'mine'
  workdir.mkdir()
  (workdir / 'config.json').write_text('{"seed": 3}')
  writer = metrics.Writer(workdir, 0, 4, 'team/project', stream=io.StringIO())
  writer.write(1, dict(loss=2.0))
  writer.write(2, dict(loss=1.0, mfu=0.5))
  writer.close()
  first, *rest = wandb()
  run = first['init'].pop('id')
  assert first['init'] == dict(entity='team', project='project', resume='allow', name='mine', dir=str(workdir),
                               config=dict(seed=3), allow_val_change=True)
  assert rest == [dict(log=dict(loss=2.0), step=1), dict(log=dict(loss=1.0, mfu=0.5), step=2), dict(finish=0)]

  # From the checkpoint of step 1 on, the service having step 2 already
  monkeypatch.setenv('WANDB_STUB_STEP', '3')
  sys.modules.pop('wandb')
  writer = metrics.Writer(workdir, 1, 4, 'project', stream=io.StringIO())
  writer.write(2, dict(loss=1.0))
  writer.write(3, dict(loss=0.5))
  with pytest.raises(RuntimeError):
    try:
      raise RuntimeError
    finally:
      writer.close()
  second, *rest = wandb()[4:]
  assert second['init']['id'] == run and second['init']['entity'] is None
  assert rest == [dict(log=dict(loss=0.5), step=3), dict(finish=1)]


def test_weights_and_biases_that_cannot_be_used(wandb, tmp_path, monkeypatch):
  metrics.Writer(tmp_path, 0, 4, stream=io.StringIO()).close()
  assert not wandb() and 'wandb' not in sys.modules  # nobody asked for it
  with pytest.raises(UserError, match="train.wandb='closed': permission denied"):
    metrics.Writer(tmp_path, 0, 4, 'closed', stream=io.StringIO())
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(UserError, match="train.wandb='mine': .*not installed: pip install wandb"):
    metrics.Writer(tmp_path, 0, 4, 'mine', stream=io.StringIO())
  monkeypatch.setattr('jax.process_index', lambda: 1)
  metrics.Writer(tmp_path, 0, 4, 'mine', stream=io.StringIO()).close()  # the first process writes, this one does not
