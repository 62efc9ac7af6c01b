"""Train step, optimizer and training state: pure functions, the same for every objective."""

import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax
import optax.contrib

from unifusion_jax import ranges
from unifusion_jax.models.layers import contracted
from unifusion_jax.ranges import Range
from unifusion_jax.sharding import BATCH


@dataclasses.dataclass
class OptimConfig:
  name: str = 'adamw'           # adamw | muon (matrices by Muon, the rest by NAdamW)
  learning_rate: float = 1e-3
  warmup: int = 200             # steps from 0 to learning_rate
  decay: float = 0.2            # last share of the run, over which learning_rate falls to a hundredth
  b1: float = 0.9
  b2: float = 0.95
  weight_decay: float = 0.0
  clip: float = 1.0             # global gradient norm
  ema: float = 0.999
  accumulate: int = 1           # micro-batches a step

  def problems(self) -> list[str]:
    """Settings that cannot work, a sentence each."""
    name = [] if self.name in ('adamw', 'muon') else [f'optim.name={self.name!r} must be adamw or muon']
    return name + ranges.problems(
        self, 'optim.', learning_rate=Range(above=0, most=1000), warmup=Range(0, 10 ** 9), decay=Range(0, 1),
        b1=Range(0, below=1), b2=Range(0, below=1), weight_decay=Range(0, 1000), clip=Range(above=0),
        ema=Range(0, below=1), accumulate=Range(1, 10 ** 6))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
  """Training state. `ema` is the average of `params` that is sampled from and exported."""
  step: jax.Array
  progress: jax.Array  # share of a wall-clock budget that was used; 0 without one
  params: Any
  ema: Any
  opt: optax.OptState


def schedule(config: OptimConfig, steps: int):
  """Learning rate `rate(step, progress=None)`: linear warm-up, flat, linear down over the last `decay` share.

  progress: share of the run that is done, for runs that end by the clock; None: step / steps.
  """
  warmup = min(config.warmup, (1 - config.decay) * steps)

  def rate(step, progress=None):
    progress = step / steps if progress is None else progress
    rising = jnp.minimum(step / warmup, 1) if warmup >= 1 else 1.0
    falling = jnp.clip((progress - (1 - config.decay)) / max(config.decay, 1 / steps), 0, 1)
    return config.learning_rate * rising * (1 - 0.99 * falling)
  return rate


def rescheduled(config: OptimConfig, before: dict, now: dict, step: int, progress: float) -> tuple[float, str | None]:
  """(progress, sentence) for a run that goes on at `step` with another number of steps or minutes than before.

  Args:
    before, now: `steps` and `minutes` of the run; with minutes above 0 it ends by the clock.
    progress: share of the minutes before that was used.

  Returns:
    The share of the minutes now that was used, and what the learning rate does; None where nothing changes.
  """
  clock, key = bool(now['minutes']), 'minutes' if now['minutes'] else 'steps'
  changes = [f'train.{name} {before[name]:g} -> {now[name]:g}' for name in ('steps', 'minutes')
             if before[name] != now[name] and (name == 'minutes' or not clock)]
  if not changes:
    return progress, None
  after = min(progress * before['minutes'] / now['minutes'], 1.0) if clock else 0.0
  old, new = (float(schedule(config, length['steps'])(step, share if length['minutes'] else None))
              for length, share in ((before, progress), (now, after)))
  move = (f'stays at {new:.3g}' if abs(new - old) <= 1e-6 * old else
          f'{"rises back" if new > old else "drops"} from {old:.3g} to {new:.3g}')
  end, unit = now[key], 'minute' if clock else 'step'
  start, done = (1 - config.decay) * end, after * end if clock else step
  fall = ('does not fall' if not config.decay else f'falls from {unit} {start:.4g} to {unit} {end:.4g}' if done < start
          else f'goes on falling until {unit} {end:.4g}')
  return after, f'{", ".join(changes)}: the learning rate {move} and {fall}'


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformationExtraArgs:
  """AdamW or Muon after clipping by the global norm; weight decay is for all parameters, norms too (Krea 2's report).

  Muon (with Nesterov momentum) updates the matrices that `layers.weight` marks, layer by layer; NAdamW with the same
  momentum updates the rest. Muon's updates are scaled to 0.2 rms, about that of AdamW's (arXiv 2502.16982), so both
  share one learning rate. `update(..., progress=)` as in `schedule`.
  """
  if config.name == 'adamw':
    update = optax.adamw(1.0, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
  else:
    update = _auto_sharded(optax.contrib.muon(
        1.0, weight_decay=config.weight_decay, adam_b1=config.b1, adam_b2=config.b2,
        adam_weight_decay=config.weight_decay, muon_weight_dimension_numbers=_muon_dims, consistent_rms=0.2))
  return optax.chain(optax.clip_by_global_norm(config.clip), update, _scale_by(schedule(config, steps)))


def _scale_by(rate) -> optax.GradientTransformationExtraArgs:
  """Updates times the learning rate `rate(step, progress)`; counts the steps."""
  def update(updates, count, params=None, *, progress=None, **others):
    del params, others
    factor = rate(count, progress)
    return jax.tree.map(lambda u: (factor * u).astype(u.dtype), updates), count + 1

  return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros((), jnp.int32), update)


def _muon_dims(params):
  """Muon dimension numbers for each matrix Param; None for every other leaf."""
  def dims(param):
    axes = contracted(param)
    return axes and optax.contrib.MuonDimensionNumbers(tuple(param.ndim + axis for axis in axes),
                                                       tuple(range(param.ndim + axes[-1] + 1, param.ndim)))
  return jax.tree.map(dims, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _auto_sharded(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """`tx` with its inner shardings left to the compiler: explicit sharding refuses its matrix products."""
  def update(updates, state, params=None):
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
    return jax.sharding.auto_axes(tx.update, out_sharding=specs)(updates, state, params)

  return optax.GradientTransformation(tx.init, update)


def init(params, tx: optax.GradientTransformationExtraArgs) -> State:
  """Training state at step 0."""
  return State(jnp.zeros((), jnp.int32), jnp.zeros(()), params, jax.tree.map(jnp.copy, params), tx.init(params))


def make_train_step(loss, tx: optax.GradientTransformationExtraArgs, config: OptimConfig):
  """A jitted `train_step(state, frozen, batch, key, progress=None) -> (state, metrics)`; `state` is donated.

  Args:
    loss: `loss(params, frozen, batch, key) -> (scalar f32, dict of scalars or pairs of them)`.
    tx: the optimizer of `state.opt`.
    config: its settings. With `accumulate` = n the batch [b ...] is split into n micro-batches [b/n ...], which run one
      after another; gradients and metrics are averaged. All get the same key: what a loss draws for an example comes
      from the key and the example's number.
  """
  gradient = jax.value_and_grad(loss, has_aux=True)

  def accumulated(params, frozen, batch, key):
    n = config.accumulate

    def cut(x):
      # The outer factor keeps the batch's sharding, so every micro-batch is spread over all devices.
      x = jnp.reshape(x, (x.shape[0] // n, n, *x.shape[1:]), out_sharding=jax.P(BATCH))
      return jnp.moveaxis(x, 1, 0)

    def add(total, part):
      return jax.tree.map(lambda t, p: t + p / n, total, gradient(params, frozen, part, key)), None

    parts = jax.tree.map(cut, batch)
    # From zeros, so that the gradient is compiled once; only its shapes and shardings are known before it runs.
    shapes = jax.eval_shape(lambda parts: gradient(params, frozen, jax.tree.map(lambda x: x[0], parts), key), parts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding), shapes)
    return jax.lax.scan(add, zeros, parts)[0]

  @functools.partial(jax.jit, donate_argnums=0)
  def train_step(state, frozen, batch, key, progress=None):
    key = jax.random.fold_in(key, state.step)
    run = gradient if config.accumulate == 1 else accumulated
    (_, metrics), gradients = run(state.params, frozen, batch, key)
    with jax.named_scope('optimizer'):
      updates, opt = tx.update(gradients, state.opt, state.params, progress=progress)
      params = optax.apply_updates(state.params, updates)
    with jax.named_scope('ema'):
      # A short memory at first, or the average would hold the initial weights for thousands of steps.
      decay = jnp.minimum(config.ema, (1.0 + state.step) / (10.0 + state.step))
      ema = jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), state.ema, params)
    metrics = dict(metrics, gradient_norm=optax.tree.norm(gradients))
    progress = state.progress if progress is None else progress
    return State(state.step + 1, progress, params, ema, opt), metrics

  return train_step
