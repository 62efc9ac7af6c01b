"""On a terminal, in a pipe and behind a reader that has had enough: colours, progress, exit codes."""

import os
import pathlib
import pty
import subprocess
import sys
import termios

import pytest

ROOT = pathlib.Path(__file__).parent.parent
BAR = """
import time
from unifusion_jax import progress
bar = progress.bar(40, 'step')
for _ in range(40):
  time.sleep(0.01)
  bar.update(1)
bar.close()
"""
FAILS = """
from unifusion_jax import errors
with errors.at_the_terminal():
  raise errors.UserError('data.tiles=0 must be more')
"""


def process(code: str, **environment) -> tuple:
  """The command and the environment of a Python process."""
  kept = {name: value for name, value in os.environ.items() if name not in ('NO_COLOR', 'FORCE_COLOR', 'TERM')}
  return [sys.executable, '-c', code], kept | dict(PYTHONPATH=str(ROOT), TERM='xterm') | environment


def in_a_pipe(code: str, **environment) -> tuple[str, int]:
  """(stderr, exit code) of a process without a terminal."""
  command, environment = process(code, **environment)
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
  return done.stderr, done.returncode


def on_a_terminal(code: str, size: tuple[int, int] = (24, 80), **environment) -> tuple[str, int]:
  """(what a terminal shows, exit code) of a process on one."""
  command, environment = process(code, **environment)
  ours, theirs = pty.openpty()
  termios.tcsetwinsize(theirs, size)
  child = subprocess.Popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True)
  os.close(theirs)
  shown = b''
  try:
    while part := os.read(ours, 4096):
      shown += part
  except OSError:  # the other end is closed
    pass
  os.close(ours)
  return shown.decode(), child.wait(timeout=60)


@pytest.mark.parametrize('size', [(24, 60), (0, 0)])
def test_a_bar_moves_on_a_terminal(size):
  """Also on one that does not know its size."""
  shown, code = on_a_terminal(BAR, size)
  bars = shown.rstrip('\r\n').split('\r')
  assert code == 0 and len(bars) > 2 and '40/40' in bars[-1] and max(map(len, bars)) <= (size[1] or 80)


def test_progress_in_a_pipe_is_lines():
  assert in_a_pipe(BAR) == ('step 40/40\n', 0)


@pytest.mark.parametrize('environment, red', [
    (dict(), True), (dict(NO_COLOR='1'), False), (dict(TERM='dumb'), False),
    (dict(NO_COLOR='1', FORCE_COLOR='1'), False)])
def test_colours_on_a_terminal(environment, red):
  shown, code = on_a_terminal(FAILS, **environment)
  begin = '\x1b[31merror:\x1b[0m' if red else 'error:'
  assert (shown, code) == (f'{begin} data.tiles=0 must be more\r\n', 1)


@pytest.mark.parametrize('environment, red', [
    (dict(), False), (dict(FORCE_COLOR='1'), True), (dict(FORCE_COLOR=''), False)])
def test_no_colours_in_a_pipe(environment, red):
  begin = '\x1b[31merror:\x1b[0m' if red else 'error:'
  assert in_a_pipe(FAILS, **environment) == (f'{begin} data.tiles=0 must be more\n', 1)


LINES = """
from unifusion_jax import errors
with errors.at_the_terminal():
  for i in range(10 ** 5):
    print('line', i)
"""


def test_a_reader_that_has_enough_ends_it_in_silence():
  """Each line is there at once, not when a buffer is full."""
  command, environment = process(LINES)
  with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
    assert child.stdout.readline() == 'line 0\n'
    child.stdout.close()
    assert child.stderr.read() == '' and child.wait(timeout=60) == 141


def test_another_pipe_that_breaks_is_an_error():
  code = LINES.partition('  for')[0] + "  raise BrokenPipeError(32, 'of another program')\n"
  said, code = in_a_pipe(code)
  assert code == 1 and said.endswith('BrokenPipeError: [Errno 32] of another program\n')
