"""Timing of two or more sides in turn, and the names of the machine they ran on."""

import json
import os
import pathlib
import re
import statistics
import time


def spread(values: list[float]) -> str:
  """Median [smallest, largest]."""
  return f'{statistics.median(values):.4g} [{min(values):.4g}, {max(values):.4g}]'


def one_core() -> None:
  """Keeps this process on one core and one thread; call it before jax is first used.

  Seconds of the process's own CPU time (`interleaved(..., clock=time.process_time)`) are then much the same on a busy
  machine, where wall-clock time says more about the others: torch's threads wait for each other at every operation.
  """
  os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
  os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_cpu_multi_thread_eigen=false'
  import torch
  torch.set_num_threads(1)  # not OMP_NUM_THREADS: torch may be imported already, and two threads on a core spin


def interleaved(sides: dict, repeats: int, clock=time.perf_counter) -> dict[str, list[float]]:
  """Seconds of each side's function, called in turn `repeats` times after one call of each that warms up."""
  seconds = {name: [] for name in sides}
  for repetition in range(repeats + 1):
    for name, call in sides.items():
      start = clock()
      call()
      if repetition:
        seconds[name].append(clock() - start)
  return seconds


def ratios(theirs: list[float], ours: list[float]) -> list[float]:
  """Theirs / ours of neighbouring repetitions: above 1 where ours takes less."""
  return [a / b for a, b in zip(theirs, ours)]


def processor() -> str:
  """Name, family and model of the CPU, with the number of cores this process may use."""
  text = pathlib.Path('/proc/cpuinfo').read_text() if os.path.exists('/proc/cpuinfo') else ''
  name, family, model = (match.group(1) if (match := re.search(rf'^{key}\s*: (.*)$', text, re.MULTILINE)) else '?'
                         for key in ('model name', 'cpu family', 'model'))
  return f'{len(os.sched_getaffinity(0))} cores of {name}, family {family} model {model}'


def machine() -> dict:
  """Names of jax's device and of the processor, load of the machine, versions of the libraries, and the date."""
  from importlib import metadata

  import jax
  device = jax.devices()[0]
  names = ('jax', 'jaxlib', 'flax', 'torch', 'diffusers', 'transformers')
  return dict(device='CPU' if device.platform == 'cpu' else device.device_kind, processor=processor(),
              load=round(os.getloadavg()[0], 2), versions={name: metadata.version(name) for name in names},
              date=time.strftime('%Y-%m-%d'))


def write(path: str | None, value: dict) -> None:
  """Writes JSON where a path is given."""
  if path:
    pathlib.Path(path).write_text(json.dumps(value, indent=1) + '\n')
