"""SIGTERM and SIGINT (Ctrl-C) during training: the step under way is finished and saved, then the process ends.

  with interrupt.Interrupts() as interrupts:
    ...                              # a signal ends this at once: there is nothing to save
    interrupts.defer()
    for step in ...:
      ...
      if signum := interrupts.received:  # several processes tell one another, and take what all know
        ...                              # save
        raise interrupt.Interrupted(signum, 'saved: the same command goes on')
"""

import os
import signal
import sys
import threading
import time

from unifusion_jax import sharding

SIGNALS = signal.SIGTERM, signal.SIGINT
NOTICE = 1.0  # seconds: what a machine that shuts down, a scheduler and a script send within them is one notice


class Interrupted(SystemExit):
  """Exit with 128 + the signal's number, as shells have it: 143 for SIGTERM, 130 for SIGINT."""

  def __init__(self, signum: int, message: str):
    super().__init__(128 + signum)
    self.message = f'{signal.Signals(signum).name}: {message}'


class Interrupts:
  """Context in which SIGTERM and SIGINT raise Interrupted, and after `defer` are only noted, for the loop to read.

  Another signal, NOTICE seconds or more after the first, ends the process at once. A thread sees to that, since python
  handles no signal while XLA compiles.
  The message of an Interrupted that leaves the context is printed. Signals reach the main thread alone: in another
  thread nothing is installed.
  """

  def __init__(self):
    self.received = 0
    self._deferred = False

  def __enter__(self) -> 'Interrupts':
    self._installed = threading.current_thread() is threading.main_thread()
    if self._installed:
      self._reader, self._writer = os.pipe()
      os.set_blocking(self._writer, False)
      self._thread = threading.Thread(target=self._watch, name='signals', daemon=True)
      self._thread.start()
      self._earlier_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
      self._earlier = {signum: signal.signal(signum, self._handle) for signum in SIGNALS}
    return self

  def __exit__(self, kind, error, traceback) -> None:
    if self._installed:
      for signum, handler in self._earlier.items():
        signal.signal(signum, signal.SIG_DFL if handler is None else handler)
      signal.set_wakeup_fd(self._earlier_writer)
      os.close(self._writer)
      self._thread.join()
      os.close(self._reader)
    if isinstance(error, Interrupted) and sharding.is_main_process():
      print(error.message, file=sys.stderr, flush=True)

  def defer(self) -> None:
    """From now on a signal is only noted."""
    self._deferred = True

  def _handle(self, signum, frame) -> None:
    del frame
    self.received = signum
    if not self._deferred:
      raise Interrupted(signum, 'stopped before the first step; there is nothing to save')

  def _watch(self) -> None:
    """Reads the number of each signal as it comes, whatever the main thread does."""
    first = None
    while number := os.read(self._reader, 1):
      if number[0] not in SIGNALS:
        continue
      name, now = signal.Signals(number[0]).name, time.monotonic()
      if first is not None and now - first >= NOTICE:
        print(f'{name} again: ended without saving', file=sys.stderr, flush=True)
        os._exit(128 + number[0])
      if first is None and self._deferred:
        print(f'{name}: this step is finished and saved; once more to end at once', file=sys.stderr, flush=True)
      first = now if first is None else first
