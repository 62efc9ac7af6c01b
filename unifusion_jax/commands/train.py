"""Training: build, restore, step, log, preview, save. The loop knows no model; `config.objective` does."""

import collections
import contextlib
import dataclasses
import functools
import math
import pathlib
import re
import statistics
import time

from absl import logging
import jax
import numpy as np

from unifusion_jax import bucket, ranges, sharding
from unifusion_jax.commands import rewrite
from unifusion_jax.data import imaging, loader
from unifusion_jax.errors import UserError
from unifusion_jax.fields import Path
from unifusion_jax.planning import executables, replication
from unifusion_jax.ranges import Range
from unifusion_jax.training import checkpoint, interrupt, lock, metrics, record, step, trace
from unifusion_jax.training.meter import Meter, work_of

ENDLESS = 2 ** 31 - 1  # steps


@dataclasses.dataclass
class TrainConfig:
  steps: int = 1000            # of a run without `minutes`
  minutes: float = 0.0         # wall-clock budget; above 0 the run ends, and its learning rate falls, by the clock
  log_every: int = 10
  save_every: int = 500
  save_minutes: float = 0.0    # also when so many have gone since the last save; 0: by steps alone
  keep: int = 2                # newest checkpoints
  keep_every: int = 0          # steps; checkpoints at their multiples are kept for good; 0: none
  preview_every: int = 500     # 0: never
  held_out_every: int = 100    # steps between measurements on data.held_out; 0: never
  max_loss_ratio: float = 4.0  # stop when the loss stays at this many times its running median
  checksums: bool = True       # digests of checkpoints' files, written and compared at 2.5 GB/s
  executables: Path | None = None  # folder of compiled train steps, which are loaded from it or saved there
  profile: str = ''            # '100:105': an XProf trace of steps 100 to 104, in WORKDIR/profile
  wandb: str = ''              # PROJECT or ENTITY/PROJECT of Weights & Biases, which gets the metrics too

  def problems(self) -> list[str]:
    """Settings that cannot work, a sentence each."""
    interval, optional = Range(1, 10 ** 9), Range(0, 10 ** 9)
    wrong, traced = [], trace.steps(self.profile)
    if traced is None:
      wrong.append(f'train.profile={self.profile!r} must be START:STOP with START from 1 on and below STOP, as 100:105 '
                   'for steps 100 to 104')
    elif traced and traced[0] > self.steps and not self.minutes:
      wrong.append(f'train.profile={self.profile} begins after the last step, train.steps={self.steps}')
    if self.wandb and not re.fullmatch(r'([^/\\#?%:]+/)?[^/\\#?%:]+', self.wandb):
      wrong.append(f'train.wandb={self.wandb!r} must be a project of Weights & Biases, as PROJECT or ENTITY/PROJECT')
    return wrong + ranges.problems(
        self, 'train.', steps=interval, minutes=Range(0, 10 ** 7), log_every=interval, save_every=interval,
        save_minutes=Range(0, 10 ** 7), keep=interval, keep_every=optional, preview_every=optional,
        held_out_every=optional, max_loss_ratio=Range(above=1))


class Diverged(UserError):
  """Training reached weights that are not worth saving."""


def run(config, workdir: pathlib.Path, *, stop_at: int | None = None) -> step.State:
  """Trains to the end, or to a pause at step `stop_at`; resumes from the workdir's last checkpoint.

  Returns the final State. The mesh must be in context. SIGTERM and SIGINT end it after a step, saved, with
  interrupt.Interrupted, a SystemExit. UserError when another training is at work in the workdir.
  """
  mesh, objective = jax.sharding.get_mesh(), config.objective
  with contextlib.ExitStack() as opened:
    interrupts = opened.enter_context(interrupt.Interrupts())
    opened.enter_context(lock.held(workdir / 'train.lock'))
    checkpoints = opened.enter_context(checkpoint.Checkpoints(
        workdir, config.train.keep, config.train.keep_every, tidy=True, checksums=config.train.checksums))
    planned = record.claim(config, workdir)
    for sentence in replication.repeated(config, mesh.size) if sharding.is_main_process() else ():
      logging.warning(sentence)
    measure = objective.measure(config) if config.data.held_out and config.train.held_out_every else None
    frozen = objective.frozen(config)
    tx = step.optimizer(config.optim, config.train.steps)
    data = opened.enter_context(contextlib.closing(batches(config)))
    if checkpoints.latest() is None:
      state = jax.jit(lambda params: step.init(params, tx), donate_argnums=0)(objective.init(config))
    else:
      state = checkpoints.restore(jax.eval_shape(lambda: step.init(objective.random(config), tx)), data, mesh)
      logging.info('resuming from step %d of %s', int(state.step), bucket.address(workdir))
    note = None
    if planned:
      progress, note = step.rescheduled(
          config.optim, planned, vars(config.train), int(state.step), float(state.progress))
      state.progress = jax.device_put(np.float32(progress), state.progress.sharding)
    train_step = step.make_train_step(objective.loss, tx, config.optim)
    preview = objective.preview(config) if config.train.preview_every else None

    start, end = int(state.step), ENDLESS if config.train.minutes else config.train.steps
    end = end if stop_at is None else min(stop_at, end)
    end = start if state.progress == 1 else end  # its budget of minutes is used up
    with sharding.together('open the metrics'):
      writer = opened.enter_context(contextlib.closing(
          metrics.Writer(workdir, start, None if config.train.minutes else config.train.steps, config.train.wandb)))
    clock, saved = Clock(config.train.minutes, float(state.progress)), time.monotonic()
    told = np.array([[0, clock.before, False]], np.float32)  # of each process: signal, clock, whether a save is late
    exchange = sharding.Exchange(told[0])
    guard = DivergenceGuard(config.train.max_loss_ratio)
    key = jax.random.key(config.seed)
    logged, pending = [], []  # metrics of the steps since the last log line; `pending` are still on the device
    if note:
      writer.note(note)
    if config.train.executables:
      train_step = executables.Programs(train_step, config.train.executables, writer.note)
    else:
      writer.note('compiling: the first step of each shape of batch takes its time')
    meter = Meter(functools.partial(work_of, config), list(mesh.devices.flat))
    traced = opened.enter_context(contextlib.closing(
        trace.Trace(config.train.profile, workdir / 'profile', start, meter, writer.note)))
    interrupts.defer()
    for done in range(start + 1, end + 1):
      progress = told[0, 1] if config.train.minutes else None  # by the clock of the first process
      with traced.step(done):
        batch = sharding.shard_batch(meter.read(data), mesh)
        state, scalars = meter.step(train_step, state, frozen, batch, key, progress)
      pending.append(scalars)
      if len(pending) > 1:
        jax.block_until_ready(pending[-2])  # the host runs at most one step ahead
      late = 0 < 60 * config.train.save_minutes <= time.monotonic() - saved
      told = exchange(np.array([interrupts.received, clock(), late], np.float32))
      finished = done == end or progress == 1
      signum = 0 if finished else int(told[:, 0].max())
      last = finished or signum
      logs, saves = (done % every == 0 or last for every in (config.train.log_every, config.train.save_every))
      saves = saves or told[0, 2]
      if logs or saves or done == start + 1:
        # A state is saved only after the guard has seen its metrics
        for at, values in enumerate(jax.device_get(pending), done + 1 - len(pending)):
          guard(at, values)
          logged.append(values)
        pending = []
        writer.set_postfix(logged[-1])
      writer.step(done, progress)
      if logs:
        writer.write(done, dict(_means(logged), **meter.rates(), skipped=data.skipped))
        logged = []
      if saves:
        checkpoints.save(state, data)
        saved = time.monotonic()
      if signum:
        checkpoints.wait()
        raise interrupt.Interrupted(signum, f'step {done} is saved in {bucket.address(workdir / "checkpoints")}, and '
                                    'the same command goes on from there')
      if measure and (done % config.train.held_out_every == 0 or last):
        with meter.aside():
          writer.write(done, measure(state.ema, frozen))
      if preview and (done % config.train.preview_every == 0 or last):
        with meter.aside():
          grid = preview(state.ema, frozen)
          with sharding.together('write a preview'):
            if grid is not None and sharding.is_main_process():
              imaging.write_png(workdir / 'samples' / f'{done:07d}.png', grid)
      if last:
        break
    checkpoints.wait()
  if sharding.is_main_process():
    place = bucket.address(workdir)
    print('done.', f'images: {place / "samples"}', f'metrics: {place / "metrics.jsonl"}',
          f'checkpoint: {place / "checkpoints"}', sep='\n  ')
  return state


def batches(config) -> loader.Feed:
  """Training batches: this process's rows of each."""
  if config.data.rewrites:
    rewrite.check(config)
  batches = loader.batches(
      loader.mix(config.data, seed=config.seed), config.objective.transform(config), config.data.batch_size,
      config.seed, sharding.rows(config.data.batch_size), config.data.workers)
  return loader.Feed(batches, config.data.skipped)


def abstract(config):
  """(state, frozen, batch) of the train step as shapes on the abstract mesh in context; needs no device, no weights."""
  objective, tx = config.objective, step.optimizer(config.optim, config.train.steps)
  state = jax.eval_shape(lambda: step.init(objective.random(config), tx))
  return state, objective.abstract_frozen(config), objective.batch_spec(config)


class Clock:
  """Progress of a run with a budget of minutes, from 0 to 1; time of earlier starts counts. Without a budget 0.

  Attributes:
    before: progress at the start.
  """

  def __init__(self, minutes: float, before: float, now=time.monotonic):
    self._seconds, self.before, self._now, self._start = 60 * minutes, before, now, now()

  def __call__(self) -> float:
    return min(self.before + (self._now() - self._start) / self._seconds, 1.0) if self._seconds else 0.0


def _means(steps: list[dict]) -> dict[str, float]:
  """Means over steps of metrics, each a scalar or a pair (sum, count); over those steps that have the metric."""
  means = {}
  for name in dict.fromkeys(name for values in steps for name in values):
    values = np.array([values[name] for values in steps if name in values], np.float64)
    means[name] = float(np.mean(values) if values.ndim == 1 else values[:, 0].sum() / max(values[:, 1].sum(), 1))
  return means


class DivergenceGuard:
  """Raises Diverged when loss or gradient is not finite, or when the loss rises far above its earlier values.

  Losses differ a lot between tasks, so medians over several steps are compared.
  """
  BEFORE, NOW = 100, 20  # steps

  def __init__(self, max_ratio: float):
    self._max_ratio = max_ratio
    self._recent = collections.deque(maxlen=self.BEFORE + self.NOW)

  def __call__(self, step: int, scalars: dict[str, float]) -> None:
    infinite = [name for name in ('loss', 'gradient_norm') if not math.isfinite(scalars[name])]
    advice = ('the last checkpoint is kept. Look at the data; or write its weights out (--mode=export) and start from '
              'them in another --workdir (--config.init=FOLDER) with a lower optim.learning_rate or optim.clip')
    if infinite:
      raise Diverged(f'step {step}: {" and ".join(infinite)} no longer finite; {advice}')
    self._recent.append(scalars['loss'])
    if len(self._recent) == self._recent.maxlen:
      losses = list(self._recent)
      before, now = statistics.median(losses[:self.BEFORE]), statistics.median(losses[self.BEFORE:])
      if now > self._max_ratio * before:
        raise Diverged(f'step {step}: the median of the last {self.NOW} losses, {now:.4g}, is more than '
                       f'train.max_loss_ratio={self._max_ratio:g} times that of the {self.BEFORE} before, '
                       f'{before:.4g}; {advice}')
