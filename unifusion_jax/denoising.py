"""Compiled parts of sampling after the conditions are there: noise to latents, and latents to images."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from unifusion_jax import flow, sharding
from unifusion_jax.data import imaging


class Kept(NamedTuple):
  """Parts of images that stay: their latents and the noise on them, both [b y x c], and where they are."""
  latents: jax.Array
  noise: jax.Array
  cells: jax.Array  # [b y x 1] bool


@jax.jit
def noised(vae, images, noise, t):
  """Latents of images uint8 [b y x 3], noised to the time t."""
  return flow.interpolate(vae.encode(imaging.to_float(images)).astype(jnp.float32), noise, t)


@functools.partial(jax.jit, static_argnames='method')
def integrate(model, conditioning, null, latents, times, guidance, eta, keys, first, kept=None, *, method):
  """Integrates the flow, with guidance where a null conditioning of one row is given.

  Clean references condition the null too, as in training: guidance leads along what was asked.
  kept: parts that are put in their place after each step.
  """
  if null is not None:
    b = latents.shape[0]
    null = jax.tree.map(lambda x: jnp.broadcast_to(x, (b, *x.shape[1:]), out_sharding=jax.P(sharding.BATCH)), null)
    null = null._replace(references=conditioning.references)

  def velocity(z, t):
    v = model.velocity(z, t, *conditioning)
    return v if null is None else flow.guide(v, model.velocity(z, t, *null), guidance)

  def settle(z, t):
    return z if kept is None else jnp.where(kept.cells, flow.interpolate(kept.latents, kept.noise, t), z)

  return flow.sample(velocity, latents, times, method, eta, keys, first, settle)


@functools.partial(jax.jit, static_argnames='tile')
def decode_latents(vae, latents, *, tile):
  """Latents [b y x c] -> uint8 [b y x 3], and {name: [b] bool} whether the latents and the pixels are finite."""
  pixels = vae.decode(latents, tile)
  return imaging.to_uint8(pixels), {name: jnp.all(jnp.isfinite(x), axis=(1, 2, 3))
                                    for name, x in (('latents', latents), ('pixels', pixels))}


@jax.jit
def finite(conditioning) -> jax.Array:
  """Whether the condition tokens of each row are finite, [b] bool."""
  each = [jnp.all(jnp.isfinite(leaf), axis=range(2, leaf.ndim)) for leaf in jax.tree.leaves(conditioning.tokens)]
  return jnp.all(jnp.stack(each, axis=-1) | ~conditioning.mask[..., None], axis=(1, 2))
