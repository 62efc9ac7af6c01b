"""XProf traces of some steps of a training run, as `train.profile` names them."""

import contextlib
import re
import socket
import zlib

import jax
import numpy as np

from unifusion_jax import sharding


def steps(text: str) -> range | None:
  """The steps that '100:105' names, 100 to 104: none for '', and None for what is no such text."""
  if not text:
    return range(0)
  match = re.fullmatch(r'(\d{1,9}):(\d{1,9})', text)
  named = range(*map(int, match.groups())) if match else range(0)
  return named if named and named[0] else None


class Trace:
  """The trace of a run's steps, written into `folder` by each process; called by all of them together.

  Hosts share one session of XProf's. Processes of one host would write one file, so each of those has its own session.
  """

  def __init__(self, text: str, folder, done: int, meter, note=print):
    """text: train.profile.  done: steps that the run has behind it.  note: takes a line for the user."""
    named = steps(text) or range(0)
    self._steps, self._folder, self._meter, self._note = named[max(0, done + 1 - named.start):], folder, meter, note
    self._options, self._running, self._reached = jax.profiler.ProfileOptions(), False, done
    if named and not self._steps:
      note(f'train.profile={text}: the run goes on after step {done}, past these steps: nothing is traced')
    elif named:
      hosts = sharding.local(sharding.tell_all(np.array([zlib.crc32(socket.gethostname().encode())], np.uint32)))
      alone = len(set(hosts.flat)) == len(hosts)
      self._options.session_id = f'steps_{self._steps[0]}_to_{self._steps[-1]}' + (
          '' if alone else f'_process_{jax.process_index()}')

  @contextlib.contextmanager
  def step(self, number: int):
    """One step of the run, from the wait for its batch on."""
    if self._steps and number == self._steps[0]:
      with self._meter.aside():
        jax.profiler.start_trace(self._folder, profiler_options=self._options)
        self._running = True
    self._reached = number
    with jax.profiler.StepTraceAnnotation('train', step_num=number):
      yield
    if self._running and number == self._steps[-1]:
      with self._meter.aside():
        self.close()

  def close(self) -> None:
    """Writes the trace that is under way, if any."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()
      self._note(f'traced steps {self._steps[0]} to {self._reached}: xprof --logdir={self._folder}')
