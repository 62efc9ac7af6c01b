"""Compiled programs that outlive the process: a file each, in a folder that any machine may have written.

FOLDER/NAME-KEY.bin is a line of JSON, the header, and then the executable as jax serialises it. KEY is a hash of the
lowered program, of the devices it is for and of their mesh, so every shape of batch has a file of its own, and a plan
for a TPU writes the file that a start on that TPU looks for. The header also has the versions and flags of the
compiler; a program of others is refused.

A file is a pickle, and loading one can run any code: take it only from where you take programs.
"""

import hashlib
import json
import os
import pathlib
import time
import uuid

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
import jaxlib

from unifusion_jax import sharding
from unifusion_jax.errors import clipped, UserError
from unifusion_jax.training import record

# Kernels carry the paths of their sources; without this beginning a program is the same wherever it is installed.
SOURCES = r'^.*/((site|dist)-packages/|(?=unifusion_jax/))'
_HARMLESS = ('--xla_dump', '--xla_force_host_platform_device_count')  # flags that change no program
_EFFORT = ('jax_disable_most_optimizations', 'jax_optimization_level', 'jax_memory_fitting_level')
_LONGEST = 2 ** 20  # bytes of a header


class Programs:
  """A jitted function whose programs are kept in a folder: each is loaded from there, or else compiled and saved.

  Called as the function is, by all processes together, with the mesh in context. All processes load a program or all
  compile it; a file that cannot be used or written stops nothing.
  """

  def __init__(self, function, folder: str | pathlib.Path, note=print):
    """note: takes lines that say where a program came from, at its first call."""
    self._function, self._folder, self._note = function, folder, note
    self._programs = {}

  def __call__(self, *arguments):
    leaves, structure = jax.tree.flatten(arguments)
    # Not the types themselves: in jax 0.12 those of a loaded program's results equal no others
    key = structure, *((x.shape, x.dtype, x.weak_type, x.sharding) for x in map(jax.typeof, leaves))
    if key not in self._programs:
      self._programs[key] = self._program(self._function.lower(*arguments))
    return self._programs[key](*arguments)

  def _program(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    name, start, loaded, problem = self._function.__name__, time.monotonic(), None, ''
    try:
      loaded = load_program(self._folder, name, lowered)
    except UserError as error:
      problem = str(error)
    if sharding.everywhere(loaded is not None):
      self._note(f'{name}: loaded from {path(self._folder, name, lowered)} in {time.monotonic() - start:.1f} s')
      return loaded  # pyrefly: ignore[bad-return]
    if loaded is not None:
      problem = 'another process could not load its program'
    self._note(f'{problem}: compiling {name} anew' if problem else f'compiling {name}')
    compiled, seconds = compile_program(lowered), time.monotonic() - start
    try:
      outcome = f'saved as {save_program(self._folder, name, lowered, compiled)}'
    except (OSError, UserError) as error:  # what was compiled is worth more than its file
      outcome = f'not saved: {error}'
    self._note(f'{name}: compiled in {seconds:.1f} s and {outcome}')
    return compiled


def path(folder: str | pathlib.Path, name: str, lowered: jax.stages.Lowered) -> pathlib.Path:
  """The file of a program for the mesh in context."""
  header = _header(lowered)
  wanted = json.dumps([header['program'], header['topology']])
  return pathlib.Path(folder).expanduser() / f'{name}-{hashlib.sha256(wanted.encode()).hexdigest()[:16]}.bin'


def compile_program(lowered: jax.stages.Lowered, options: dict | None = None) -> jax.stages.Compiled:
  """Compiles a program past jax's compilation cache; options: of XLA.

  A program for a CPU that came from that cache cannot be serialised again: it lacks functions and ends the process that
  runs it. And devices that are not here can be compiled for, but load nothing from the cache.
  """
  enabled = jax.config.jax_enable_compilation_cache  # pyrefly: ignore[missing-attribute]
  try:
    jax.config.update('jax_enable_compilation_cache', False)
    compilation_cache.reset_cache()  # or the setting is not looked at again
    return lowered.compile(options)
  finally:
    jax.config.update('jax_enable_compilation_cache', enabled)
    compilation_cache.reset_cache()


def save_program(folder: str | pathlib.Path, name: str, lowered: jax.stages.Lowered,
                 compiled: jax.stages.Compiled) -> pathlib.Path:
  """Writes a program, whole or not at all, and returns its path; the mesh it was compiled for is in context.

  All processes call this together. What the first one writes serves all of them; another one writes only where its
  folder is on a disk of its own.
  """
  target = path(folder, name, lowered)
  with sharding.together(f'write {target}'):
    if sharding.is_main_process():
      _write(target, lowered, compiled)
  try:
    _payload(target, _header(lowered))
  except (OSError, UserError):
    _write(target, lowered, compiled)
  return target


def load_program(folder: str | pathlib.Path, name: str, lowered: jax.stages.Lowered) -> jax.stages.Compiled | None:
  """A saved program, ready to run on the mesh in context; None where the folder has none of that name.

  UserError: its file is damaged or was compiled by others, or the folder has other programs of that name only.
  """
  source, here = path(folder, name, lowered), _header(lowered)
  if not source.exists():
    others = [_differences(_header_of(other)[0], here) for other in sorted(source.parent.glob(f'{name}-*.bin'))]
    if not others:
      return None
    raise UserError(f'{source.parent} has programs of {name}, {len(others)}, and not this one; the nearest differs in '
                    + '; '.join(min(others, key=len)))
  payload = _payload(source, here)
  devices = list(jax.sharding.get_mesh().devices.flat)
  try:
    return serialize_executable.deserialize_and_load(
        payload, jax.tree.structure(lowered.args_info), lowered.out_tree, devices[0].client, devices)
  except Exception as error:  # of jax, the runtime or the pickle
    raise UserError(f'{source} cannot be loaded: {clipped(error)}') from error


def _header(lowered: jax.stages.Lowered) -> dict:
  """What a program is and what compiles it here, for the mesh in context."""
  mesh = jax.sharding.get_mesh()
  devices = list(mesh.devices.flat)
  flags = ' '.join(os.environ.get(name, '') for name in ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')).split()
  topology = dict(
      kind=devices[0].device_kind, mesh=dict(mesh.shape), order=[device.id for device in devices],
      processes=len({device.process_index for device in devices}))
  return dict(
      program=hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16], topology=topology, jax=jax.__version__,
      jaxlib=jaxlib.__version__, runtime=_runtime(devices[0]),
      flags=sorted(flag for flag in flags if not flag.startswith(_HARMLESS)),
      effort={name: str(jax.config.values[name]) for name in _EFFORT})


def _runtime(device: jax.Device) -> str:
  """The version of what compiles for and runs on a device: libtpu, CUDA; or a CPU, whose programs suit it alone."""
  if device.platform != 'cpu':
    return ' '.join(device.client.platform_version.split())
  facts = pathlib.Path('/proc/cpuinfo')
  lines = facts.read_text().partition('\n\n')[0].splitlines() if facts.exists() else []
  lines = [line for line in lines if line.startswith(('model name', 'flags', 'Features'))]
  return f'cpu {hashlib.sha256("".join(lines).encode()).hexdigest()[:16]}'


def _write(target: pathlib.Path, lowered: jax.stages.Lowered, compiled: jax.stages.Compiled) -> None:
  payload, *_ = serialize_executable.serialize(compiled)
  header = dict(_header(lowered), digest=hashlib.sha256(payload).hexdigest())
  part = target.with_name(f'{target.name}.{uuid.uuid4().hex[:8]}.part')
  target.parent.mkdir(parents=True, exist_ok=True)
  try:
    part.write_bytes(json.dumps(header).encode() + b'\n' + payload)
    os.replace(part, target)
  finally:
    part.unlink(missing_ok=True)


def _payload(source: pathlib.Path, here: dict) -> bytes:
  """The serialised program of a file; UserError where it is damaged or its header is not `here`."""
  there, digest = _header_of(source)
  if there != here:
    raise UserError(f'{source} is of another compiler: {"; ".join(_differences(there, here))}')
  payload = source.read_bytes().partition(b'\n')[2]
  if hashlib.sha256(payload).hexdigest() != digest:
    raise UserError(f'{source} is damaged')
  return payload


def _header_of(source: pathlib.Path) -> tuple[dict, str]:
  """The header of a file and the digest of the rest; UserError where it has none."""
  with source.open('rb') as file:
    line = file.readline(_LONGEST)
  try:
    header = json.loads(line)
    return header, header.pop('digest')
  except (ValueError, AttributeError, TypeError, KeyError) as error:
    raise UserError(f'{source} is damaged') from error


def _differences(there: dict, here: dict) -> list[str]:
  """What differs between two headers; the program itself only where nothing else does, as it follows from the rest."""
  lines = record.differences(there, here, lambda name: name != 'program')
  return [clipped(line, 200) for line in lines] or ['the shape of the batch, the recipe or the version of this code']
