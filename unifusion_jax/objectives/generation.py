"""Training the DiT, LAP and refiner by rectified flow, conditioned on a frozen VLM (text to image, edits)."""

import dataclasses

import jax
import jax.numpy as jnp

from unifusion_jax import encoders
from unifusion_jax import flow
from unifusion_jax.models import unifusion
from unifusion_jax.models import vae as autoencoder


@dataclasses.dataclass
class FlowConfig:
  """The loss of the DiT, and what of the condition is dropped for guidance."""
  mean: float = 0.0             # of the logit-normal times
  std: float = 1.0
  shift: float = 1.0            # resolution shift of the times: 2, 3, 4 at 256, 512, 1024 px (Iris-3B)
  drop: float = 0.1             # share of examples with the null condition
  drop_pictures: float = 0.05   # share of examples with references whose picture tokens are masked
  drop_written: float = 0.05    # share of examples with references whose written text is masked
  raw: float = 0.0              # share of examples conditioned on the user's words instead of the rewritten ones


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Frozen:
  """The models that training reads and never changes."""
  vlm: encoders.Encoder
  vae: autoencoder.Autoencoder


def gather(hidden: jax.Array, keep: jax.Array) -> jax.Array:
  """The kept tokens' states: hidden [b s l e] at keep [b q] -> [b q l e]."""
  return jnp.take_along_axis(hidden, keep[:, :, None, None], axis=1)


def loss(config: FlowConfig, taps: tuple[int, ...], params: unifusion.UniFusion, frozen: Frozen, batch, key):
  """Mean squared error of the velocity, f32, and its parts by time.

  Args:
    batch: target [b y x 3] f32 in [-1, 1]; tokens, valid [b s]; keep, keep_mask [b q]; tiles [b r y x 3] if any.
    key: drives times and noise.
  """
  time_key, noise_key = jax.random.split(key)
  z = jax.lax.stop_gradient(frozen.vae.encode(batch['target'])).astype(jnp.float32)
  hidden = frozen.vlm.hidden(batch['tokens'], batch['valid'], taps, batch.get('tiles'))
  hidden = jax.lax.stop_gradient(gather(hidden, batch['keep']))
  sharding = jax.typeof(z).sharding.spec
  t = flow.sample_time(time_key, z.shape[0], config.mean, config.std, config.shift)
  noise = jax.random.normal(noise_key, z.shape, out_sharding=sharding)
  condition = params.condition(hidden, batch['keep_mask'])
  velocity = params.velocity(flow.interpolate(z, noise, t), t, condition, batch['keep_mask'])
  errors = jnp.mean(jnp.square(velocity - (noise - z)), axis=(1, 2, 3))
  value = jnp.mean(errors)
  late = t > 0.5
  halves = {f'loss_{name}': jnp.sum(errors * part) / jnp.maximum(jnp.sum(part), 1)
            for name, part in (('noisy', late), ('clean', ~late))}
  return value, dict(loss=value, **halves)
