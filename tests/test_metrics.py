"""Progress on a pipe and on a terminal, and what a resumed run keeps of `metrics.jsonl`."""

import io
import json

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
  writer.write(3, dict(loss=0.123456789))
  writer.close()
  assert [json.loads(line) for line in path.read_text().splitlines()] == [
      dict(step=1, loss=3.0), dict(step=2, loss=2.0), dict(step=3, loss=0.123457)]
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
