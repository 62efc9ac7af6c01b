"""Compilers for devices that are not here: a mesh over a topology, and a program compiled for it or refused."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import sys
import tempfile
import threading
import time

import jax
from jax.experimental import topologies

from unifusion_jax import sharding
from unifusion_jax.errors import UserError
from unifusion_jax.planning import executables
from unifusion_jax.planning.chips import Topology

EVERY = 30  # seconds between lines of progress where stderr is no terminal
# CPUs in the place of GPUs: they multiply no bfloat16, and would keep every stack of weights in float32 beside a loop
STAND_IN = {'xla_disable_hlo_passes': 'while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion'}
_UNITS = {'': 1, 'B': 1, 'K': 2 ** 10, 'M': 2 ** 20, 'G': 2 ** 30, 'T': 2 ** 40}
# 'total memory required for HLO temporaries (24.75G) exceeds available HBM (15.75G)', 'Used 98.4G of 95.7G hbm'
_NEEDS = (r'\(([\d.]+)([KMGT]?)B?\) exceeds available HBM \(([\d.]+)([KMGT]?)B?\)',
          r'Used ([\d.]+)([KMGT]?)B? of ([\d.]+)([KMGT]?)B? hbm')


@dataclasses.dataclass(frozen=True)
class Refused:
  """A program that the compiler refused because it does not fit.

  needs: bytes of arguments and temporaries on one device; None where the compiler does not say.
  """
  needs: int | None
  message: str


def prepare(topology: Topology) -> None:
  """Settings of this process that come before jax's first use of a device: it plans on the CPU alone."""
  jax.config.update('jax_platforms', 'cpu')
  if topology.chip.platform == 'gpu':
    jax.config.update('jax_num_cpu_devices', topology.devices)


def mesh(config: sharding.MeshConfig, topology: Topology) -> jax.sharding.Mesh:
  """The mesh over a topology's devices. GPUs are stood in for by as many CPU devices.

  UserError without libtpu, and where the mesh does not fit the devices.
  """
  tpu = topology.chip.platform == 'tpu'
  return sharding.make_mesh(config, _tpus(topology) if tpu else jax.devices('cpu')[:topology.devices])


def _tpus(topology: Topology) -> list:
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(f'--topology={topology.name}: the TPU compiler, libtpu, is not installed; no TPU is needed, only '
                    "pip install 'jax[tpu]'")
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # else it asks Google Cloud's metadata server for its hosts
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # no TPU is taken: several processes may plan at once
  more = {}
  if topology.chips < 4:
    more['chips_per_host_bounds'] = (*topology.shape, 1)[:3]
  with _quiet():  # of warnings about hosts that it did not find
    return topologies.get_topology_desc(topology_name=topology.name, platform='tpu', **more).devices


@contextlib.contextmanager
def _quiet():
  """Keeps from the user what native code writes to stderr, unless it fails."""
  with tempfile.TemporaryFile() as file:
    sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
      yield
    except BaseException:
      file.seek(0)
      os.write(kept, file.read())
      raise
    finally:
      os.dup2(kept, 2)
      os.close(kept)


def compile(lowered: jax.stages.Lowered, topology: Topology | None = None) -> jax.stages.Compiled | Refused:
  """The compiled program, or why it is refused; any error but a lack of memory is raised."""
  stands_in = topology is not None and topology.chip.platform == 'gpu'
  try:
    return executables.compile_program(lowered, STAND_IN if stands_in else None)
  except jax.errors.JaxRuntimeError as error:
    if (refused := refusal(str(error))) is None:
      raise
    return refused


def refusal(message: str) -> Refused | None:
  """What a compiler's error says of a lack of memory; None for any other error."""
  if 'RESOURCE_EXHAUSTED' not in message:
    return None
  match = next(filter(None, (re.search(pattern, message) for pattern in _NEEDS)), None)
  needs = int(float(match.group(1)) * _UNITS[match.group(2)]) if match else None
  return Refused(needs, message.splitlines()[0].removeprefix('RESOURCE_EXHAUSTED: '))


@contextlib.contextmanager
def progress(work: str):
  """A line on stderr with the seconds that have passed: on a terminal every second, else every EVERY seconds."""
  terminal, start, done = sys.stderr.isatty(), time.monotonic(), threading.Event()

  def tell():
    while not done.wait(1 if terminal else EVERY):
      line = f'{work}: {time.monotonic() - start:.0f} s'
      print(f'\r{line} ' if terminal else line, end='' if terminal else '\n', file=sys.stderr, flush=True)

  thread = threading.Thread(target=tell, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
    if terminal:
      print('\r\033[K', end='', file=sys.stderr, flush=True)
