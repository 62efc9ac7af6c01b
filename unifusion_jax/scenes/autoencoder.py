"""Training the embedded autoencoder: squared error and a KL term that keeps its latents near a unit normal."""

import dataclasses

import jax
import jax.numpy as jnp

from unifusion_jax.data import imaging
from unifusion_jax.models import vae as autoencoder


@dataclasses.dataclass
class AutoencoderObjective:
  # Of the mean KL of a latent number, beside the mean squared error of a pixel. At sigma^2 / 6 the two are the bound of
  # a Gaussian with that sigma on pixels, for 12 pixel numbers to a latent number: 4e-4 is sigma 0.05.
  kl: float = 4e-4


def loss(config: AutoencoderObjective, params: autoencoder.Autoencoder, frozen, batch, key):
  """batch: target [b y x 3] uint8. The autoencoder trains with scaling factor 1."""
  del frozen
  x = imaging.to_float(batch['target'])
  mean, log_variance = params.moments(x)
  noise = jax.random.normal(key, mean.shape, out_sharding=jax.typeof(mean).sharding.spec)
  back = params.decode(mean + jnp.exp(0.5 * log_variance) * noise)
  error = jnp.mean(jnp.square(back - x))
  kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
  return error + config.kl * kl, dict(loss=error, kl=kl, latent_std=jnp.std(mean))
