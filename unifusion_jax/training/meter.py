"""Rates of a training run, from the shapes of its batches and a wall clock.

Operations, tokens and images of a step follow from the shape of its batch, so nothing is asked of the devices.
docs/metrics.md says what each rate means.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import time

import jax

from unifusion_jax.planning import chips, model_flops


@dataclasses.dataclass
class Work:
  """What one step or several do on all devices together."""
  steps: int = 0
  images: int = 0
  tokens: int = 0     # as the objective counts them
  flops: float = 0.0  # of the model: forward and backward pass, nothing twice (planning/model_flops.py)

  def add(self, other: 'Work') -> None:
    for name, number in vars(other).items():
      setattr(self, name, getattr(self, name) + number)


def work_of(config, state, frozen, batch, key) -> Work:
  """The work of a train step on a batch of that shape; traces the loss, which takes a second for the largest models."""
  flops = model_flops.count_call(config.objective.loss, state.params, frozen, batch, key, trained=1)
  return Work(1, len(batch['number']), config.objective.tokens(config, batch), flops.total)


class Meter:
  """Rates of the steps since the last call of `rates`. The wall clock is read, and the devices are never waited for.

  Args:
    work: as `work_of` without its configuration; called once for each shape of batch.
    devices: of the mesh.
  """

  def __init__(self, work: Callable[..., Work], devices: list[jax.Device], clock=time.monotonic):
    self._work, self._devices, self._clock = work, devices, clock
    self._chip = chips.KINDS.get(devices[0].device_kind)
    self._chips = len(devices) / (self._chip.cores if self._chip else 1)
    self._works, self._latest = {}, None
    self._start_interval()

  def read(self, data):
    """The next batch; the wait for it counts as that for data."""
    start = self._clock()
    with jax.profiler.TraceAnnotation('wait for data'):
      batch = next(data)
    self._waited += self._clock() - start
    return batch

  def step(self, train_step, state, frozen, batch, key, progress):
    """What the train step returns."""
    leaves, structure = jax.tree.flatten(batch)
    shapes = structure, *map(jax.typeof, leaves)
    start = self._clock()
    state, self._latest = train_step(state, frozen, batch, key, progress)
    if shapes not in self._works:
      self._works[shapes] = self._work(state, frozen, batch, key)  # while the devices are at work
      self._compiling += self._clock() - start
    self._done.add(self._works[shapes])
    return state, self._latest

  @contextlib.contextmanager
  def aside(self):
    """Work that belongs to no step, such as a preview: its time is in no rate. The steps before it are finished."""
    jax.block_until_ready(self._latest)
    start = self._clock()
    try:
      yield
    finally:
      self._aside += self._clock() - start

  def rates(self) -> dict[str, float]:
    """The rates of the interval that ends here, all of whose steps are finished."""
    done, seconds = self._done, self._clock() - self._start - self._aside
    flops = done.flops / seconds / self._chips
    rates = dict(step_time=seconds / done.steps, data_wait=self._waited / seconds,
                 compile_wait=self._compiling / seconds, images_per_second=done.images / seconds,
                 tokens_per_second=done.tokens / seconds, tflops_per_chip=flops / 1e12)
    if self._chip:
      rates['mfu'] = flops / self._chip.flops
    stats = [device.memory_stats() for device in self._devices if device.process_index == jax.process_index()]
    if peaks := [each['peak_bytes_in_use'] for each in stats if each and 'peak_bytes_in_use' in each]:
      rates['hbm_peak_gib'] = max(peaks) / 2 ** 30
    self._start_interval()
    return rates

  def _start_interval(self) -> None:
    self._start, self._waited, self._compiling, self._aside, self._done = self._clock(), 0.0, 0.0, 0.0, Work()
