"""A plan of one program on one topology: memory, work, time and verdict, as the dict that plan.json holds."""

import contextlib
import time

import jax

from unifusion_jax import config as configuration
from unifusion_jax import sharding
from unifusion_jax.commands.sample import PipelineConfig
from unifusion_jax.errors import UserError
from unifusion_jax.models import layers
from unifusion_jax.objectives.flow_matching import FlowMatching
from unifusion_jax.planning import compiler, executables, memory, model_flops, programs, work
from unifusion_jax.planning.chips import Topology

LISTED = 5  # tensors


def plan(config, topology: Topology, name: str = 'train', requests: int = 0, references: int = 1,
         save: str | None = None) -> dict:
  """The plan of a program of `settings.PROGRAMS`: compiled for the topology, or refused there.

  save: a folder for the executable of a train step that fits (planning/executables.py).
  UserError for a configuration that cannot work on the topology.
  """
  configuration.check(config, topology.devices)
  _check(config, name, references)
  flops, start = _model_flops(config, topology, name, requests, references), time.monotonic()
  with (jax.set_mesh(compiler.mesh(config.mesh, topology)), as_accelerator(topology),
        compiler.progress(f'{name} on {topology.name}: compiling')):
    program = programs.of(name, config, requests, references)
    traced = program.trace()
    lowered = traced.lower()
    compiled = compiler.compile(lowered, topology)
    saved = None
    if save and name == 'train' and not isinstance(compiled, compiler.Refused):
      saved = str(executables.save_program(save, program.function.__name__, lowered, compiled))
  result = dict(program=name, rows=program.rows, compile_seconds=round(time.monotonic() - start, 1),
                sizes=program.sizes, host=_host(program), model_flops=_per_device(flops, topology))
  read, unread = memory.read(program.arguments, traced.jaxpr.jaxpr)
  beside = unread + sharding.shard_bytes(program.beside)
  if isinstance(compiled, compiler.Refused):
    tensors = model_flops.largest(traced.jaxpr.jaxpr, LISTED)
    return result | dict(memory=_refused(read, beside, compiled, topology), fits=False, refused=compiled.message,
                         tensors=[vars(tensor) for tensor in tensors])
  done = work.of(compiled.as_text(), topology.devices, LISTED)
  used = _memory(compiled.memory_analysis(), beside, topology)
  layer = memory.largest_layer(program.weights) * jax.numpy.dtype(_dtype(config)).itemsize
  return result | dict(
      saved=saved, memory=used, fits=used['total'] <= used['usable'], tensors=[vars(tensor) for tensor in done.tensors],
      compiled_flops=done.flops, attention_flops=done.attention, hbm_bytes=done.hbm_bytes, link_bytes=done.link_bytes,
      layer_bytes=layer, collectives=[vars(each) for each in done.collectives],
      time=roofline(done, topology, flops.total / topology.devices))


def _check(config, name: str, references: int) -> None:
  """UserError for a program that a recipe does not have."""
  if isinstance(config, PipelineConfig):
    if name == 'train':
      raise UserError('--programs=train: this recipe samples with a pipeline and trains nothing; plan encode, denoise, '
                      'decode, rewrite, or a recipe that trains, such as configs/edit.py:krea2')
    return
  if name != 'train' and not hasattr(config.objective, 'pipeline'):
    raise UserError(f'--programs={name}: this recipe trains a part of a model, which samples no images; plan train')
  if references != 1 and not isinstance(config.objective, FlowMatching):
    raise UserError(f'plan.references={references}: the examples of this recipe have no references to count')


@contextlib.contextmanager
def as_accelerator(topology: Topology):
  """Layers in a loop, as on every accelerator, also where the mesh is of the CPU's devices in the place of GPUs."""
  before = layers.UNROLL
  if topology.chip.platform == 'gpu':
    layers.UNROLL = False
  try:
    yield
  finally:
    layers.UNROLL = before


def roofline(done: work.Work, topology: Topology, model: float) -> dict:
  """Least seconds of a program by each peak of the chip; the largest is the estimate, as if all else were hidden.

  model: operations of the model on one device; over the peak of the time estimated they are the MFU at most.
  """
  chip, cores = topology.chip, topology.chip.cores
  seconds = {'operations': done.flops * cores / chip.flops, 'HBM': done.hbm_bytes * cores / chip.bandwidth,
             'links': done.link_bytes * cores / chip.link}
  bound = max(seconds, key=seconds.get)
  least = seconds[bound]
  return dict(seconds=seconds, bound=bound, least=least, mfu=model * cores / chip.flops / least if least else 0.0)


def larger_than_a_layer(result: dict) -> list[dict]:
  """The collectives of a plan that move more than one layer of weights, in the dtype of the computation."""
  return [each for each in result.get('collectives', ()) if result['layer_bytes'] < each['bytes']]


def _model_flops(config, topology: Topology, name: str, requests: int, references: int) -> model_flops.ModelFlops:
  """Counted on a mesh without devices, where no fused kernel hides the operations of attention."""
  with jax.sharding.use_abstract_mesh(sharding.abstract_mesh(config.mesh, topology.devices)):
    program = programs.of(name, config, requests, references)
    return model_flops.count(program.forward, *program.counted, trained=program.trained)


def _per_device(flops: model_flops.ModelFlops, topology: Topology) -> dict:
  return {part: number / topology.devices for part, number in vars(flops).items()} | {
      'total': flops.total / topology.devices}


def _dtype(config) -> str:
  if isinstance(config, PipelineConfig):
    return config.dtype
  return getattr(config.model, 'dtype', None) or getattr(config.objective, 'dtype', 'float32')


def _memory(stats, beside: int, topology: Topology) -> dict:
  """Bytes on one device. Outputs are those that take no place of a donated argument.

  beside: bytes of the other models on the device, and of arguments that the program does not read.
  """
  parts = dict(arguments=stats.argument_size_in_bytes, beside=beside, temporaries=stats.temp_size_in_bytes,
               outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
               code=0 if topology.chip.platform == 'gpu' else stats.generated_code_size_in_bytes)
  return parts | dict(total=sum(parts.values()), usable=topology.usable, hbm=topology.hbm)


def _refused(arguments: int, beside: int, refused: compiler.Refused, topology: Topology) -> dict:
  """Bytes on one device: arguments by their shapes, and what is over of the compiler's total."""
  rest, total = (None, None) if refused.needs is None else (max(0, refused.needs - arguments), refused.needs + beside)
  return dict(arguments=arguments, beside=beside, temporaries=rest, outputs=0, code=0, total=total,
              usable=topology.usable, hbm=topology.hbm)


def _host(program: programs.Program) -> dict:
  """Bytes of a host's memory while it loads: twice the largest tensor of the weights (`weights/convert.py`)."""
  tensor, size = memory.largest_tensor(program.weights)
  return dict(bytes=2 * size, tensor=tensor)


def summary(config, topology: Topology) -> dict:
  """What was planned, in the words of settings."""
  where = dict(topology=topology.name, chips=topology.chips, devices=topology.devices,
               mesh=dict(zip(sharding.AXES, config.mesh.shape(topology.devices))))
  if isinstance(config, PipelineConfig):
    names = 'weights', 'transformer', 'vlm', 'vae', 'dtype', 'vlm_quantized', 'transformer_quantized'
    return where | {name: getattr(config, name) for name in names} | dict(
        verifi=config.sample.verifi, in_turn=config.in_turn)
  remat = {name: getattr(part, 'remat') for name, part in vars(config.model).items() if hasattr(part, 'remat')}
  return where | dict(
      size=config.data.size, tiles=max(config.data.tiles), batch_size=config.data.batch_size,
      accumulate=config.optim.accumulate, remat=remat, vlm=config.vlm, vlm_quantized=config.vlm_quantized)
