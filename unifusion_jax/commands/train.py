"""The training loop: build, restore, step, log, preview, save. It knows no model; `jobs.py` does."""

import collections
import math
import pathlib
import statistics
import time

from absl import logging
import jax
import numpy as np

from unifusion_jax import config as configuration
from unifusion_jax import jobs, sharding
from unifusion_jax.data import loader
from unifusion_jax.errors import UserError
from unifusion_jax.training import checkpoint
from unifusion_jax.training import metrics as metrics_lib
from unifusion_jax.training import step as step_lib


class Diverged(UserError):
  """Training produced something that is not worth saving."""


def train(config: configuration.Config, workdir: pathlib.Path, mesh: jax.sharding.Mesh, *, stop_at: int | None = None):
  """Trains to `config.train.steps` (or pauses at `stop_at`), going on where the workdir's last checkpoint stands.

  Returns the final State. The mesh must be in context.
  """
  configuration.check(config, mesh.size)
  configuration.keep(config, workdir)
  job = jobs.build(config)
  frozen = job.load_frozen()
  tx = step_lib.optimizer(config.optim, config.train.steps)

  def fresh(params):
    return step_lib.init(params, tx)

  data = loader.Feed(loader.batches(*job.data(), config.data.batch_size, config.seed, jax.process_index(),
                                    jax.process_count(), config.data.workers), config.data.skipped)
  saved = checkpoint.Checkpoints(workdir, tidy=True)
  if saved.latest() is None:
    state = jax.jit(fresh, donate_argnums=0)(job.init_params())
  else:
    state = saved.restore(jax.eval_shape(lambda: fresh(job.draw_params())), data, mesh)
    logging.info('going on from step %d of %s', int(state.step), workdir)
  train_step = step_lib.make_train_step(job.loss, tx, config.optim)

  start, end = int(state.step), config.train.steps if stop_at is None else min(stop_at, config.train.steps)
  writer = metrics_lib.Writer(workdir, start, config.train.steps)
  watch = DivergenceGuard(config.train.max_loss_ratio)
  key = jax.random.key(config.seed)
  # The scalars of each step since the last logged one, of which the mean is logged as batches differ; the last few of them
  # still where they were computed
  since, unwatched = [], []
  clock, clock_step = time.monotonic(), start
  try:
    writer.say('compiling: the first step of each shape of batch takes its time')
    for step in range(start, end):
      batch = next(data)
      state, scalars = train_step(state, frozen, sharding.shard_batch(batch, mesh), key)
      done = step + 1
      unwatched.append(scalars)
      logs, saves = (done % every == 0 or done == end for every in (config.train.log_every, config.train.save_every))
      if logs or saves or done == start + 1:
        # Nothing is saved before it was looked at
        for at, each in enumerate(jax.device_get(unwatched), done + 1 - len(unwatched)):
          watch(at, each)
          since.append(each)
        unwatched = []
        writer.show(since[-1])
      writer.advance(done)
      if logs:
        # A scalar that only some batches have (a read-out of tiles, say) is the mean over those.
        scalars = {name: float(np.mean([each[name] for each in since if name in each]))
                   for name in dict.fromkeys(name for each in since for name in each)}
        since = []
        now = time.monotonic()
        rate = (done - clock_step) * config.data.batch_size / (now - clock)
        clock, clock_step = now, done
        writer.write(done, dict(scalars, images_per_second=rate, skipped=data.skipped))
      if done % config.train.preview_every == 0 or done == end:
        job.preview(state.ema, frozen, workdir, done)
        clock, clock_step = time.monotonic(), done
      if saves:
        saved.save(state, data)
    saved.wait()
  finally:
    saved.close()
    data.close()
    writer.close()
  return state


class DivergenceGuard:
  """Raises Diverged when the loss or the gradient is not finite, or the loss has leapt above what it was before.

  Batches of one task differ a lot from those of another, so it takes the median of several losses to leap.
  """
  BEFORE, NOW = 100, 20  # steps

  def __init__(self, factor: float):
    self._factor = factor
    self._recent = collections.deque(maxlen=self.BEFORE + self.NOW)

  def __call__(self, step: int, scalars: dict[str, float]) -> None:
    bad = [name for name in ('loss', 'gradient_norm') if not math.isfinite(scalars[name])]
    advice = ('the last checkpoint is kept. Look at the data; or write its weights out (--mode=export) and start from them in '
              'another --workdir (--config.init=FOLDER) with a lower optim.learning_rate or optim.clip')
    if bad:
      raise Diverged(f'step {step}: {" and ".join(bad)} no longer finite; {advice}')
    self._recent.append(scalars['loss'])
    if len(self._recent) == self._recent.maxlen:
      losses = list(self._recent)
      before, now = statistics.median(losses[:self.BEFORE]), statistics.median(losses[self.BEFORE:])
      if now > self._factor * before:
        raise Diverged(f'step {step}: the median of the last {self.NOW} losses, {now:.4g}, is more than '
                       f'train.max_loss_ratio={self._factor:g} times that of the {self.BEFORE} before, {before:.4g}; {advice}')
