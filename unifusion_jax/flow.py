"""Rectified flow: x_t = (1 - t) data + t noise, velocity = noise - data, t = 1 is noise.

Liu et al. (arXiv 2209.03003); time sampling and resolution shift of Stable Diffusion 3 (arXiv 2403.03206); the shift's
dependence on the number of image tokens as in Krea 2. Pure functions; a `velocity` maps (x [b ...], t [b]) to [b ...].
"""

import math
from typing import Callable

import jax
import jax.numpy as jnp

Velocity = Callable[[jax.Array, jax.Array], jax.Array]
Points = tuple[tuple[float, float], tuple[float, float]]
KREA2_SHIFT: Points = ((256, 0.5), (6400, 1.15))  # (image tokens, mu)


def shifted(t, shift):
  """s t / (1 + (s - 1) t): moves times towards the noise for s > 1 (SD3, section 5.3.2)."""
  return shift * t / (1 + (shift - 1) * t)


def shift_for(tokens: int, points: Points = KREA2_SHIFT) -> float:
  """exp(mu) for a number of image tokens, mu linear through two points (tokens, mu)."""
  low, high = points
  slope = (high[1] - low[1]) / (high[0] - low[0])
  return math.exp(low[1] + slope * (tokens - low[0]))


def noise(key: jax.Array, numbers: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
  """Unit normal values [b *shape] f32, each row from the key and the row's number alone, wherever it stands."""
  return jax.vmap(lambda number: jax.random.normal(jax.random.fold_in(key, number), shape))(numbers)


def sample_time(key: jax.Array, numbers: jax.Array, mean: float = 0.0, std: float = 1.0,
                shift: float = 1.0) -> jax.Array:
  """Training times [b] f32 in (0, 1), as `noise`: the logistic of N(mean, std), shifted."""
  return shifted(jax.nn.sigmoid(mean + std * noise(key, numbers)), shift)


def interpolate(data: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
  """(1 - t) data + t noise for data and noise [b ...] and t [b]."""
  t = t.reshape(t.shape + (1,) * (data.ndim - 1))
  return (1 - t) * data + t * noise


def loss(velocity: jax.Array, data: jax.Array, noise: jax.Array) -> jax.Array:
  """Mean squared error of each example's velocity, [b] in f32, for velocity, data and noise [b ...]."""
  error = velocity.astype(jnp.float32) - (noise - data).astype(jnp.float32)
  return jnp.mean(error * error, axis=tuple(range(1, data.ndim)))


def timesteps(steps: int, shift: float = 1.0, start: float = 1.0) -> jax.Array:
  """Sampling times [n + 1] f32 from `start` (1 is noise) to 0 (data), evenly spaced before they are shifted."""
  return shifted(jnp.linspace(shifted(start, 1 / shift), 0.0, steps + 1, dtype=jnp.float32), shift)


def guide(cond: jax.Array, uncond: jax.Array, scale) -> jax.Array:
  """Classifier-free guidance (arXiv 2207.12598): scale 1 is `cond` alone, larger follows the condition more."""
  return uncond + scale * (cond - uncond)


def sample(velocity: Velocity, noise: jax.Array, times: jax.Array, method: str = 'euler', eta=0.0,
           keys: jax.Array | None = None, first=0, settle=lambda x, t: x) -> jax.Array:
  """Integrates dx/dt = velocity from x [b ...] at times[0] along `times` [n + 1], in one `lax.scan`: x at times[n].

  'euler' has order 1 with one velocity a step; 'heun' has order 2 with two. With `keys` [b], one a row, every
  Euler step replaces part of the noise in x by new noise, as DDIM (arXiv 2010.02502, equations 12 and 16) does: at
  eta 1 as much as the noising from the next time to this one adds (ancestral sampling), at 0 none. Any eta leads to the
  same distribution in many steps; in few, with a velocity that errs, new noise lets errors of earlier steps fade.

  `first` is the index of the first step in the whole schedule: integrating it in parts samples the same new noise.
  `settle` maps (x, time) after each step to the x that the next one starts from.
  """
  if method not in ('euler', 'heun'):
    raise ValueError(f"method {method!r} is not a sampler: choose 'euler' or 'heun'")
  if keys is not None and method != 'euler':
    raise ValueError(f'noise is renewed between Euler steps, not between those of {method!r}: leave keys out')
  velocity_at = lambda x, t: velocity(x, jnp.full_like(x[(slice(None),) + (0,) * (x.ndim - 1)], t, dtype=jnp.float32))

  def step(x, interval):
    t, t_next, i = interval
    v = velocity_at(x, t)
    x_next = x + (t_next - t) * v
    if method == 'heun':
      x_next = x + (t_next - t) * (v + velocity_at(x_next, t_next)) / 2
    if keys is not None:
      new_noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), x.shape[1:]))(keys)
      # At t = 0 there is no noise to renew: the inner `where` keeps 0 / 0 out of the value and of its gradient
      ratio = jnp.where(t > 0, t_next / jnp.where(t > 0, t, 1), 0)
      renewed = eta ** 2 * (1 - ((1 - t) / (1 - t_next) * ratio) ** 2)  # a share of the noise's variance
      x_next += t_next * (jnp.sqrt(renewed) * new_noise + (jnp.sqrt(1 - renewed) - 1) * (x + (1 - t) * v))
    return settle(x_next.astype(x.dtype), t_next), None

  indices = first + jnp.arange(len(times) - 1)
  return jax.lax.scan(step, noise, (times[:-1], times[1:], indices))[0]
