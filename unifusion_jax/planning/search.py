"""Settings that make a train step fit: tried by compiling, the least change first."""

from collections.abc import Callable, Iterator
import dataclasses

from unifusion_jax.planning import estimate
from unifusion_jax.planning.chips import Topology


def changed(config, **settings):
  """A copy of a configuration with other settings, named with '__' for a dot: optim__accumulate=4."""
  for name, value in settings.items():
    first, _, rest = name.partition('__')
    value = changed(getattr(config, first), **{rest: value}) if rest else value
    config = dataclasses.replace(config, **{first: value})
  return config


def candidates(config, topology: Topology, memory: dict) -> Iterator[dict]:
  """Changes of settings that need less memory, each with all before it: what is trained changes last.

  memory: of the plan that does not fit, as in `plans.plan`.
  """
  mesh = config.mesh.shape(topology.devices)
  data, fsdp, tp = mesh
  changes = {}
  rows = config.data.batch_size // (data * fsdp)
  room = memory['usable'] - memory['arguments'] - memory['beside']
  if room >= 0:  # else less work at a time does not help
    if rows > config.optim.accumulate:
      accumulate = 2 * config.optim.accumulate
      while (rows % accumulate == 0 and accumulate < rows and memory['temporaries'] is not None
             and memory['temporaries'] * config.optim.accumulate / accumulate > room):
        accumulate *= 2
      for number in dict.fromkeys((accumulate if rows % accumulate == 0 else rows, rows)):
        changes |= {'optim__accumulate': number}
        yield dict(changes)
    off = {f'model__{name}__remat': True for name, part in vars(config.model).items()
           if getattr(part, 'remat', True) is False}
    if off:
      changes |= off
      yield dict(changes)
  if data > 1 or tp > 1:
    changes |= dict(mesh__data=1, mesh__fsdp=-1, mesh__tp=1)
    shards = topology.devices
    changes |= dict(optim__accumulate=max(1, config.data.batch_size // shards))
    if config.data.batch_size % shards:
      changes |= dict(data__batch_size=shards, optim__accumulate=1)
    yield dict(changes)
  if not config.vlm_quantized and 'vlm' in config.objective.pretrained:
    changes |= dict(vlm_quantized='int8')
    yield dict(changes)
  shards = topology.devices if 'mesh__fsdp' in changes else data * fsdp
  if changes.get('data__batch_size', config.data.batch_size) > shards:
    changes |= dict(data__batch_size=shards, optim__accumulate=1)
    yield dict(changes)


def nearest(config, topology: Topology, memory: dict, plan: Callable, tries: int) -> tuple[list[dict], list[dict]]:
  """(changes, plans) of the settings that were tried, up to the first that fits.

  plan: `plan(config) -> dict` as `plans.plan`.
  """
  tried, results = [], []
  for changes in candidates(config, topology, memory):
    if len(tried) == tries:
      break
    other = changed(config, **changes)
    if other.problems(topology.devices) or estimate.chip_bytes(other, topology.devices).total > 1.2 * topology.usable:
      continue  # by the formula far from fitting: not worth minutes of compiling
    tried.append(changes)
    results.append(plan(other))
    if results[-1]['fits']:
      break
  return tried, results


def flags(changes: dict) -> str:
  """Changes as they are typed."""
  return ' '.join(f'--config.{name.replace("__", ".")}={value}' for name, value in changes.items())
