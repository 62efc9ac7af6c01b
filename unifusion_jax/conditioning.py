"""From frozen models to condition tokens: what training and sampling share before LAP."""

import dataclasses

import jax
import jax.numpy as jnp

from unifusion_jax.models import vae as autoencoder
from unifusion_jax.weights import encoders


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Frozen:
  """The models that training reads and never changes, and the facts that belong to them.

  Attributes:
    taps: layers of the VLM that LAP pools.
  """
  vlm: encoders.Encoder
  vae: autoencoder.Autoencoder
  taps: tuple[int, ...] = dataclasses.field(default=None, metadata=dict(static=True))


def select_tokens(hidden: jax.Array, index: jax.Array) -> jax.Array:
  """States of the chosen tokens: hidden [b s l e] at index [b q] -> [b q l e]."""
  return jnp.take_along_axis(hidden, index[:, :, None, None], axis=1)


def condition_states(prompt_hidden: jax.Array, hidden: jax.Array, lengths: jax.Array, cond_index: jax.Array,
                     cond_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """States of the conditioning prompt tokens, then those of the generated tokens: ([b q+n l e], mask [b q+n]).

  prompt_hidden [b s l e] with cond_index, cond_mask [b q]; hidden [b n l e], of which the first lengths [b] count.
  """
  generated = jnp.arange(hidden.shape[1])[None] < lengths[:, None]
  return (jnp.concatenate([select_tokens(prompt_hidden, cond_index), hidden], axis=1),
          jnp.concatenate([cond_mask, generated], axis=1))
