"""Decoding in overlapping tiles of one shape, one after another: memory grows with a tile, not with the image.

Tiles agree with the undivided image, for all that reaches across an image is computed of the whole:
  decoder.coarse     at the resolution of latents, attention among it, before the image is divided
  moments of norms   of group norms, by passes over all tiles: each takes the moments that the last pass found, and
                     they are those of the undivided image up to TOLERANCE when a pass finds them again
What is left reaches as far as its convolutions do, and tiles overlap by twice that and a ramp between them.
"""

from collections.abc import Callable
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax.errors import UserError
from unifusion_jax.models import layers

RAMP = 2  # latents over which a tile goes over to the next
TOLERANCE = 1e-2  # of moments, in standard deviations: about a tenth of 1/255 of the image's range
PASSES = 16  # at most


class Axis(NamedTuple):
  """Tiles along one axis of `length` places: `size` places from each of `starts` on."""
  length: int
  size: int
  starts: np.ndarray
  reach: int

  @classmethod
  def of(cls, length: int, most: int, reach: int) -> 'Axis':
    """The fewest tiles of at most `most` places whose every place is `reach` from the edges of one; evenly spaced."""
    overlap = 2 * reach + RAMP
    count = max(1, -(-(length - overlap) // (most - overlap)))
    size = -(-(length + (count - 1) * overlap) // count)
    return cls(length, size, np.round(np.linspace(0, length - size, count)).astype(np.int32), reach)

  def weights(self, factor: int) -> np.ndarray:
    """[tiles, size * factor] f32 at a finer resolution: of the tiles at each place, with the sum 1."""
    place = np.arange(self.size * factor) + 0.5
    weights, total = np.zeros((len(self.starts), len(place))), np.zeros(self.length * factor)
    for i, start in enumerate(self.starts):
      edges = [place] * bool(start > 0) + [place[::-1]] * bool(start + self.size < self.length)
      # Tiles may overlap by a place more: the ramp is then as wide, and a place further in
      weights[i] = np.clip(np.min([np.ones(len(place)), *(
          (edge / factor - self.reach) / RAMP for edge in edges)], axis=0), 0, 1)
      total[start * factor:(start + self.size) * factor] += weights[i]
    for i, start in enumerate(self.starts):
      weights[i] /= total[start * factor:(start + self.size) * factor]
    return weights.astype(np.float32)


def decode(decoder, z: jax.Array, most: int, factor: int) -> jax.Array:
  """decoder(z) for latents z [b y x c], in tiles of at most `most` latents a side; -> f32 [b y*factor x*factor 3].

  Args:
    decoder: with `coarse`, `fine` and `reach`, as vae.Decoder.
  """
  overlap = 2 * decoder.reach + RAMP
  if most <= overlap:
    raise UserError(f'decode_tile={most * factor}: tiles overlap by {overlap * factor} pixels and must be larger; '
                    'or give 0 for the image undivided')
  x = decoder.coarse(z)
  axes = [Axis.of(length, most, decoder.reach) for length in x.shape[1:3]]
  weights = {2 ** i: [axis.weights(2 ** i) for axis in axes] for i in range(factor.bit_length())}
  places = np.stack(np.meshgrid(*(np.arange(len(axis.starts)) for axis in axes), indexing='ij'), -1).reshape(-1, 2)
  starts = [jnp.array(axis.starts) for axis in axes]

  def over_tiles(add: Callable, total):
    """total = add(total, tile [b y x c], start, weight(factor) -> [y x]) for one tile after another."""
    def step(total, place):
      start = [begin[i] for begin, i in zip(starts, place)]
      tile = jax.lax.dynamic_slice(x, (0, *start, 0), (x.shape[0], *(axis.size for axis in axes), x.shape[3]))
      weight = lambda finer: jnp.outer(*(jnp.array(all_tiles)[i] for all_tiles, i in zip(weights[finer], place)))
      return add(total, tile, start, weight), None
    return jax.lax.scan(step, total, jnp.array(places))[0]

  moments = _moments(decoder, x, axes, over_tiles)

  def blend(image, tile, start, weight):
    known = iter(moments)
    pixels = decoder.fine(tile, lambda _: next(known)).astype(jnp.float32) * weight(factor)[:, :, None]
    corner = (0, *(first * factor for first in start), 0)
    before = jax.lax.dynamic_slice(image, corner, pixels.shape)
    return jax.lax.dynamic_update_slice(image, before + pixels, corner)
  shape = x.shape[0], x.shape[1] * factor, x.shape[2] * factor, 3
  return over_tiles(blend, jnp.full(shape, 0.0, jnp.float32, out_sharding=layers.rows_of(x)))


def channel_moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(mean, variance) [b c] of x [b y x c]. The gradient through the variance's centre is 0, hence the stop_gradient."""
  mean = jnp.mean(x, axis=(1, 2))
  return mean, jnp.mean((x - jax.lax.stop_gradient(mean)[:, None, None]) ** 2, axis=(1, 2))


def _moments(decoder, x, axes, over_tiles):
  """[(mean, variance) [b c] of each norm of `decoder.fine`] over the whole x [b y x c]; a row by itself."""
  first = []

  def own(y):
    first.append(channel_moments(y))
    return first[-1]
  small = x[:, :, np.linspace(0, x.shape[2] - 1, axes[1].size).round().astype(int)]
  decoder.fine(small[:, np.linspace(0, x.shape[1] - 1, axes[0].size).round().astype(int)], own)
  if not first:
    return first

  def improve(state):
    """A pass: moments under those of the last pass, for the rows in which some changed by more than TOLERANCE."""
    count, moments, change = state

    def add(sums, tile, start, weight):
      del start
      known, seen = iter(moments), []

      def measure(y):
        mean, variance = next(known)
        finer = y.shape[1] // axes[0].size
        share = weight(finer) / math.prod(axis.length * finer for axis in axes)
        offset = y - mean[:, None, None]
        seen.append((jnp.einsum('byxc,yx->bc', offset, share), jnp.einsum('byxc,yx->bc', offset ** 2, share)))
        return mean, variance
      decoder.fine(tile, measure)
      return jax.tree.map(jnp.add, sums, seen)
    sums = over_tiles(add, jax.tree.map(jnp.zeros_like, moments))
    new = [(mean + offset, square - offset ** 2) for (mean, _), (offset, square) in zip(moments, sums)]
    active = change > TOLERANCE
    change = jnp.max(jnp.stack([_change(*pair) for pair in zip(moments, new)]), axis=0)
    kept = jax.tree.map(lambda a, b: jnp.where(active[:, None], b, a), moments, new)
    return count + 1, kept, jnp.where(active, change, 0.0)
  unknown = jnp.full(x.shape[:1], jnp.inf, jnp.float32, out_sharding=layers.rows_of(x))
  return jax.lax.while_loop(lambda state: (state[0] < PASSES) & jnp.any(state[2] > TOLERANCE), improve,
                            (0, first, unknown))[1]


def _change(old, new) -> jax.Array:
  """The largest change of a norm's moments in standard deviations of its channels together, [b]."""
  (mean, _), (new_mean, variance) = old, new
  scale = jnp.mean(variance, axis=1) + 1e-6
  return jnp.maximum(jnp.max(jnp.abs(mean - new_mean), axis=1) / jnp.sqrt(scale),
                     jnp.max(jnp.abs(old[1] - variance), axis=1) / scale)
