"""Rates of a run against numbers by hand: work by the shape of a batch, time by a clock that is told."""

import contextlib
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unifusion_jax import sharding
from unifusion_jax.models import dit
from unifusion_jax.planning import chips
from unifusion_jax.scenes import autoencoder, vlm
from unifusion_jax.training import meter
from unifusion_jax.training.meter import Meter, Work


class Clock:
  """Seconds that pass only when told to."""
  now = 100.0

  def __call__(self) -> float:
    return self.now

  def takes(self, seconds: float, value=None):
    """A function of any arguments that takes so long."""
    def run(*_):
      self.now += seconds
      return value
    return run


def device(kind: str = 'cpu', peak: int | None = None, process: int = 0):
  """A device as the meter looks at it."""
  stats = None if peak is None else dict(peak_bytes_in_use=peak)
  return types.SimpleNamespace(device_kind=kind, process_index=process, memory_stats=lambda: stats)


class Data:
  """Batches of the given numbers of tokens, each after a second."""

  def __init__(self, clock, sizes):
    self._clock, self._sizes = clock, iter(sizes)

  def __next__(self):
    self._clock.now += 1
    return dict(x=np.zeros((2, next(self._sizes))))


def run(sizes, devices, seconds=3.0, compiling=10.0, counted=None):
  """A meter and its clock after a step of each size, of 2 images and 100 FLOPs a token."""
  clock = Clock()

  def work(state, frozen, batch, key):
    if counted is not None:
      counted.append(batch['x'].shape)
    clock.now += compiling
    return Work(1, 2, batch['x'].size, 100 * batch['x'].size)
  measured, data = Meter(work, devices, clock), Data(clock, sizes)
  for _ in sizes:
    step = clock.takes(seconds, ('state', dict(loss=jnp.float32(0))))
    assert measured.step(step, 'state', None, measured.read(data), None, None)[0] == 'state'
  return measured, clock


def test_an_interval_adds_up_over_shapes_of_batches():
  """5 steps, 2 of them of a new shape: 5 waits of 1 s, 5 steps of 3 s, 2 counts of 10 s make 40 s."""
  counted = []
  measured, clock = run([4, 4, 6, 4, 6], [device()] * 8, counted=counted)
  rates = measured.rates()
  assert counted == [(2, 4), (2, 6)]
  tokens = 2 * (4 + 4 + 6 + 4 + 6)
  assert rates == pytest.approx(dict(
      step_time=40 / 5, data_wait=5 / 40, compile_wait=26 / 40, images_per_second=10 / 40,
      tokens_per_second=tokens / 40, tflops_per_chip=100e-12 * tokens / 40 / 8))
  # The next interval starts from nothing, and knows both shapes
  measured.step(clock.takes(2.0, ('state', None)), 'state', None, measured.read(Data(clock, [6])), None, None)
  assert measured.rates() == pytest.approx(dict(
      step_time=3, data_wait=1 / 3, compile_wait=0, images_per_second=2 / 3, tokens_per_second=4,
      tflops_per_chip=100e-12 * 4 / 8))
  assert counted == [(2, 4), (2, 6)]


def test_previews_are_in_no_rate():
  measured, clock = run([4, 4], [device()], compiling=0.0)
  with measured.aside():
    clock.now += 1000
  with contextlib.suppress(ZeroDivisionError), measured.aside():
    clock.now += 1000
    raise ZeroDivisionError
  assert measured.rates()['step_time'] == 4


@pytest.mark.parametrize('kind, generation', [('TPU v5 lite', 'v5e'), ('TPU v6 lite', 'v6e'), ('TPU v5', 'v5p'),
                                              ('TPU7x', 'tpu7x'), ('NVIDIA H100 80GB HBM3', 'h100')])
def test_mfu_is_of_whole_chips(kind, generation):
  """Eight devices, which are four chips of two cores."""
  chip = chips.CHIPS[generation]
  measured, _ = run([4], [device(kind)] * 8, compiling=0.0)
  rates, number = measured.rates(), 8 / chip.cores
  assert rates['tflops_per_chip'] == pytest.approx(800e-12 / 4 / number)
  assert rates['mfu'] == pytest.approx(800 / 4 / number / chip.flops)


def test_a_chip_that_is_not_in_the_table_has_no_mfu():
  for kind in ('cpu', 'TPU v4', 'NVIDIA H200 NVL', 'NVIDIA GH200 480GB'):
    assert 'mfu' not in run([4], [device(kind)])[0].rates()


def test_memory_is_of_the_fullest_device_of_this_process():
  devices = [device('TPU v5', 2 ** 30), device('TPU v5', 3 * 2 ** 30), device('TPU v5', 2 ** 40, process=1)]
  assert run([4], devices)[0].rates()['hbm_peak_gib'] == 3
  assert 'hbm_peak_gib' not in run([4], [device()])[0].rates()


@dataclasses.dataclass
class Linear:
  """A product of the pixels with weights in training, and of that with frozen ones."""

  def tokens(self, config, batch) -> int:
    return batch['target'].size

  def loss(self, params, frozen, batch, key):
    del key
    return jnp.mean((batch['target'] @ params @ frozen) ** 2), {}


def test_the_work_of_a_step_by_hand(mesh):
  """b rows of p pixels: 2 b p d forward and as much for the gradient; 2 b d e forward, and for the states below."""
  b, p, d, e = 8, 12, 16, 4
  batch = sharding.shard(dict(number=np.arange(b), target=np.ones((b, p), np.float32)))
  params, frozen = jnp.ones((p, d)), jnp.ones((d, e))
  work = meter.work_of(types.SimpleNamespace(objective=Linear()), types.SimpleNamespace(params=params), frozen, batch,
                       jax.random.key(0))
  assert work == Work(1, b, b * p, 2 * (2 * b * p * d) + 2 * (2 * b * d * e))


@pytest.mark.parametrize('references, noises, online', [(0, 3, False), (1, 2, True)])
def test_tokens_are_those_that_the_dit_reads(references, noises, online, recipe, mesh, monkeypatch):
  read, velocity = [], dit.DiT.__call__

  def spy(self, z, t, cond, mask, *rest, **more):
    read.append(z.shape[0] * (z.shape[1] * z.shape[2] // self.config.patch ** 2 + cond.shape[1]))
    return velocity(self, z, t, cond, mask, *rest, **more)

  monkeypatch.setattr(dit.DiT, '__call__', spy)
  made = recipe()
  made.objective = dataclasses.replace(made.objective, noises_per_example=noises, rewrite_online=online)
  with jax.sharding.use_abstract_mesh(sharding.abstract_mesh(made.mesh, 8)):
    params = jax.eval_shape(lambda: made.objective.random(made))
    batch = made.objective.batch_spec(made, references)
    frozen = made.objective.abstract_frozen(made)
    jax.eval_shape(made.objective.loss, params, frozen, batch, jax.eval_shape(lambda: jax.random.key(0)))
  assert read == [made.objective.tokens(made, batch)]


def test_tokens_of_the_other_objectives(recipe):
  """Places of latents; positions of the decoder, or image tokens where it does not run."""
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=np.int32)
  made = types.SimpleNamespace(model=types.SimpleNamespace(downsampling=8))
  assert autoencoder.AutoencoderObjective().tokens(made, dict(target=shape((4, 64, 48, 3)))) == 4 * 8 * 6
  chats = dict(input_ids=shape((4, 100)), attributes=shape((4, 16, 9)))
  assert vlm.VLMObjective().tokens(made, chats) == 400
  assert vlm.VLMObjective(lm_weight=0.0).tokens(made, chats) == 64
  assert vlm.VLMObjective(lm_weight=0.0).tokens(made, dict(input_ids=chats['input_ids'])) == 0  # no image
