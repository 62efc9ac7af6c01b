"""SIGTERM and SIGINT: noted where a run is under way, final before it and the second time."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from unifusion_jax.training import interrupt


@pytest.mark.parametrize('signum, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_noted_after_defer_and_raised_before(signum, code, capfd):
  handler = signal.getsignal(signum)
  with interrupt.Interrupts() as interrupts:
    interrupts.defer()
    assert interrupts.received == 0
    os.kill(os.getpid(), signum)
    assert interrupts.received == signum
  assert signal.getsignal(signum) is handler
  with pytest.raises(SystemExit) as ended:
    with interrupt.Interrupts():
      os.kill(os.getpid(), signum)
  assert ended.value.code == code and signal.getsignal(signum) is handler
  assert 'before the first step; there is nothing to save' in capfd.readouterr().err.splitlines()[-1]
  assert not [thread for thread in threading.enumerate() if thread.name == 'signals']


def test_nothing_is_installed_in_another_thread():
  handlers = []

  def run():
    with interrupt.Interrupts() as interrupts:
      handlers.append(signal.getsignal(signal.SIGTERM))
      assert interrupts.received == 0

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert handlers == [signal.getsignal(signal.SIGTERM)]


def test_another_ends_what_python_cannot():
  """The hash stands for a program that XLA compiles: python gets control only when it is through."""
  program = '''
import hashlib, os, signal, threading
from unifusion_jax.training import interrupt

def repeat():
  for seconds in (0.2, 1.3, 60):  # the second one is part of the first notice
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait(seconds)

with interrupt.Interrupts() as interrupts:
  interrupts.defer()
  threading.Thread(target=repeat).start()
  hashlib.pbkdf2_hmac('sha256', b'', b'', 2 ** 31 - 1)
'''
  ended = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=False, timeout=100)
  assert ended.returncode == 130
  assert ended.stderr.splitlines() == ['SIGINT: this step is finished and saved; once more to end at once',
                                       'SIGINT again: ended without saving']
