"""The train step, and what it carries: one pure function for every objective."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import optax
import optax.contrib

from unifusion_jax.models.layers import contracted
from unifusion_jax.sharding import BATCH


@dataclasses.dataclass
class OptimConfig:
  name: str = 'adamw'           # adamw | muon (matrices by Muon, the rest by NAdamW)
  learning_rate: float = 1e-3
  warmup: int = 200             # steps from 0 to learning_rate
  decay: float = 0.2            # last share of the run over which it falls to a hundredth (warm-up, stable, decay)
  b1: float = 0.9
  b2: float = 0.95
  weight_decay: float = 0.0
  clip: float = 1.0             # global gradient norm
  ema: float = 0.999
  accumulate: int = 1           # micro-batches a step


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
  """What training changes. `ema` is the average that is sampled from and exported."""
  step: jax.Array
  params: object
  ema: object
  opt: optax.OptState


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
  """Warm-up, stable, decay (WSD): linear up, flat, linear down over the last `decay` share of `steps`."""
  falling = int(config.decay * steps)
  flat = steps - falling
  warmup = min(config.warmup, flat)
  return optax.join_schedules(
      [optax.linear_schedule(0.0, config.learning_rate, max(warmup, 1)),
       optax.constant_schedule(config.learning_rate),
       optax.linear_schedule(config.learning_rate, config.learning_rate / 100, max(falling, 1))],
      [warmup, flat])


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
  """AdamW or Muon, after clipping by the global norm; matrices and tables decay, as norms do (Krea 2's report).

  Muon (with Nesterov momentum) takes the matrices that `layers.weight` marks, layer by layer, and scales its updates
  to 0.2 rms, about what AdamW's have (arXiv 2502.16982), so one learning rate serves them and the rest, which is left
  to AdamW with the same momentum.
  """
  rate = schedule(config, steps)
  if config.name == 'adamw':
    update = optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
  else:
    update = _auto_sharded(optax.contrib.muon(
        rate, weight_decay=config.weight_decay, adam_b1=config.b1, adam_b2=config.b2,
        adam_weight_decay=config.weight_decay, muon_weight_dimension_numbers=_muon_dims, consistent_rms=0.2))
  return optax.chain(optax.clip_by_global_norm(config.clip), update)


def _muon_dims(params):
  """Muon dimension numbers for each matrix Param; None for every other leaf."""
  def dims(param):
    axes = contracted(param)
    return axes and optax.contrib.MuonDimensionNumbers(tuple(param.ndim + axis for axis in axes),
                                                       tuple(range(param.ndim + axes[-1] + 1, param.ndim)))
  return jax.tree.map(dims, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _auto_sharded(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """tx with its products of sharded matrices left to the compiler, which explicit sharding would refuse."""
  def update(updates, state, params=None):
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
    return jax.sharding.auto_axes(tx.update, out_sharding=specs)(updates, state, params)

  return optax.GradientTransformation(tx.init, update)


def init(params, tx: optax.GradientTransformation) -> State:
  """State around freshly drawn or loaded parameters."""
  return State(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), tx.init(params))


def make_train_step(loss, tx: optax.GradientTransformation, config: OptimConfig):
  """A jitted `train_step(state, frozen, batch, key) -> (state, metrics)`; `state` is donated.

  Args:
    loss: `loss(params, frozen, batch, key) -> (scalar f32, dict of scalars)`.
    tx: the optimizer that `state.opt` belongs to.
    config: its settings. With `accumulate` > 1 the batch [b ...] is cut into that many micro-batches, one after
      another, and their gradients are averaged.
  """
  gradient = jax.value_and_grad(loss, has_aux=True)

  def accumulated(params, frozen, batch, key):
    n = config.accumulate

    def cut(x):
      # The outer factor keeps the sharding of the batch, so every micro-batch is spread over all devices.
      x = jnp.reshape(x, (x.shape[0] // n, n, *x.shape[1:]), out_sharding=jax.P(BATCH))
      return jnp.moveaxis(x, 1, 0)

    def add(total, part):
      return jax.tree.map(lambda t, p: t + p / n, total, gradient(params, frozen, part[0], part[1])), None

    parts = jax.tree.map(cut, batch), jax.random.split(key, n)
    first = gradient(params, frozen, *jax.tree.map(lambda x: x[0], parts))
    return jax.lax.scan(add, jax.tree.map(lambda x: x / n, first), jax.tree.map(lambda x: x[1:], parts))[0]

  @functools.partial(jax.jit, donate_argnums=0)
  def train_step(state, frozen, batch, key):
    key = jax.random.fold_in(key, state.step)
    run = gradient if config.accumulate == 1 else accumulated
    (_, metrics), gradients = run(state.params, frozen, batch, key)
    updates, opt = tx.update(gradients, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)
    # Early on the average would be of the initial noise: shorten its memory until enough steps are behind.
    decay = jnp.minimum(config.ema, (1.0 + state.step) / (10.0 + state.step))
    ema = jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), state.ema, params)
    metrics = dict(metrics, gradient_norm=optax.tree.norm(gradients))
    return State(state.step + 1, params, ema, opt), metrics

  return train_step
