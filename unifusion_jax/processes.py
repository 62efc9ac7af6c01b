"""The processes of a run on several hosts: how they find one another, that all are there, and how they end.

  with processes.companion(name, seconds):    # before anything uses a device
    processes.join(...)
    ...                                       # the run

Where one of them is lost (killed, its host gone), jax ends the others some seconds later by SIGABRT, and no code
of a process can speak then. A companion process does it in its place: it waits for the end of the one that started it,
and writes a sentence when that came without a word. It also ends a process whose start takes too long.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import platform
import subprocess
import sys
import traceback

import jax
from jax.experimental import multihost_utils
import numpy as np

from unifusion_jax import errors
from unifusion_jax.errors import UserError

ENDING = 30  # seconds that one which ends waits for the others
_NAME = 64   # bytes of a host's name


def expected() -> str | None:
  """What says that this process is one of several, as 'TPU_WORKER_HOSTNAMES names 4 hosts'; None where nothing does."""
  hosts = os.environ.get('TPU_WORKER_HOSTNAMES', '').split(',')
  if len(hosts) > 1:
    return f'TPU_WORKER_HOSTNAMES names {len(hosts)} hosts'
  tasks = os.environ.get('SLURM_STEP_NUM_TASKS', '1')
  return f'SLURM_STEP_NUM_TASKS says {tasks} tasks' if tasks.isdigit() and int(tasks) > 1 else None


def join(coordinator: str | None, count: int | None, index: int | None, *, seconds: int,
         heartbeat: int) -> None:
  """Joins the processes of the run, and returns when all of them are there; the first one prints who they are.

  Args:
    coordinator: HOST:PORT of process 0.  count: processes.  index: of this one. What is None, jax finds on Cloud TPU,
      Slurm, Kubernetes and Open MPI.
    seconds: how long to wait for the others.  heartbeat: seconds of silence after which one of them counts as lost.

  Raises:
    UserError: when nothing tells one of the three, when they contradict each other, or when not all come in time.
  """
  if count is not None and index is not None and not 0 <= index < count:
    raise UserError(f'--process={index} of --processes={count}: they are numbered from 0 to {count - 1}')
  if coordinator is not None and not (coordinator.rpartition(':')[0] and coordinator.rpartition(':')[2].isdigit()):
    raise UserError(f'--coordinator={coordinator}: give HOST:PORT, a port of process 0 that is free there')
  jax.config.update('jax_enable_preemption_service', False)  # signals are handled in training/interrupt.py
  try:
    jax.distributed.initialize(coordinator, count, index, initialization_timeout=seconds,
                               heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=ENDING)
  except ValueError as error:
    raise UserError(f'--distributed: {error} Nothing here tells it: give --coordinator=HOST:PORT --processes=N '
                    '--process=I to each process') from error
  except RuntimeError as error:
    raise UserError(f'--distributed: not all processes came within {seconds} s, or their number and addresses '
                    f'contradict each other ({errors.clipped(error)}): start the same command on every host at about '
                    'the same time, with ports open between them') from error
  _check(count)


def _check(count: int | None) -> None:
  """Prints the hosts and devices; UserError where they are not those of all processes, whatever jax says."""
  here = platform.node().encode()[:_NAME]
  row = np.zeros(_NAME + 2, np.int32)
  row[:2] = jax.process_index() + 1, jax.local_device_count()
  row[2:2 + len(here)] = list(here)
  rows = np.asarray(multihost_utils.process_allgather(row)).reshape(-1, len(row))
  total = jax.process_count()
  if rows[:, 0].sum() != total * (total + 1) // 2 or (count or total) != total:
    raise UserError(f'--distributed: {total} processes are known, of {count or total}, and {rows[:, 0] - 1} answered: '
                    'end what is left of an earlier run on these hosts, and start all processes anew')
  if jax.process_index() == 0:
    names = [bytes(name[name > 0].astype(np.uint8)).decode(errors='replace') for name in rows[:, 2:]]
    print(described(names, rows[:, 1].tolist(), jax.devices()[0].device_kind), flush=True)


def described(hosts: list[str], devices: list[int], kind: str) -> str:
  """One line on processes, by host and number of devices: '4 processes on a, b, c, d: 16 x TPU v6 lite, 4 each'."""
  unique = list(dict.fromkeys(hosts))
  named = ', '.join(unique if len(unique) <= 8 else [*unique[:3], '...', *unique[-2:]])
  each = f'{devices[0]} each' if len(set(devices)) == 1 else f'from {min(devices)} to {max(devices)} each'
  where = f'{len(unique)} hosts ({named})' if len(unique) > 1 else named
  return f'{len(hosts)} processes on {where}: {sum(devices)} x {kind}, {each}'


@contextlib.contextmanager
def companion(seconds: int) -> Iterator['Companion']:
  """A companion for the process, which also ends it where `Companion.ready` is not called within some seconds.

  An error is printed before the processes part, since that may take up to `ENDING` seconds, and then raised as
  SystemExit. Where another process is lost, jax ends this one while they part.
  """
  beside = Companion(seconds)
  try:
    yield beside
  except BaseException as error:
    code = _told(error)
    _part()
    beside.dismiss()
    raise SystemExit(code) from None
  _part()
  beside.dismiss()


def _told(error: BaseException) -> int:
  """Prints an error as Python does at the end of a process; the exit code."""
  if not isinstance(error, SystemExit):
    traceback.print_exception(error)
    return 1
  if error.code is None or isinstance(error.code, int):
    return error.code or 0
  print(error.code, file=sys.stderr, flush=True)
  return 1


def _part() -> None:
  sys.stdout.flush()
  with contextlib.suppress(RuntimeError):  # another one has ended without this one
    jax.distributed.shutdown()


class Companion:
  """The process that speaks for this one when it cannot (companion.py)."""

  def __init__(self, seconds: int):
    reader, self._writer = os.pipe()
    program = pathlib.Path(__file__).parent / 'companion.py'
    self._process = subprocess.Popen(
        [sys.executable, '-I', '-S', program, str(reader), str(seconds), platform.node()], pass_fds=[reader],
        stdin=subprocess.DEVNULL)
    os.close(reader)

  def ready(self) -> None:
    """The start is over: it may take as long as it likes from now on."""
    os.write(self._writer, b'r')

  def dismiss(self) -> None:
    """This process ends by itself, and has said what there is to say."""
    with contextlib.suppress(BrokenPipeError):
      os.write(self._writer, b'd')
    os.close(self._writer)
    self._process.wait()
