"""Training the DiT, LAP and refiner by rectified flow, conditioned on a frozen VLM (text to image, edits)."""

import dataclasses

import jax
import jax.numpy as jnp

from unifusion_jax import encoders
from unifusion_jax import flow
from unifusion_jax import generate
from unifusion_jax.models import unifusion
from unifusion_jax.models import vae as autoencoder
from unifusion_jax.sharding import BATCH


@dataclasses.dataclass
class FlowConfig:
  """The loss of the DiT, and what of the condition is dropped for guidance."""
  mean: float = 0.0             # of the logit-normal times
  std: float = 1.0
  draws: int = 1                # times and noises for each example, which share the work of everything before the DiT
  shift: float = 1.0            # resolution shift of the times: 2, 3, 4 at 256, 512, 1024 px (Iris-3B)
  drop: float = 0.1             # share of examples with the null condition
  drop_pictures: float = 0.05   # share of examples with references whose picture tokens are masked
  drop_written: float = 0.05    # share of examples with references about which nothing is written
  raw: float = 0.0              # share of examples conditioned on the user's words instead of the rewritten ones
  online: bool = False          # the VLM writes as training goes (slow) instead of captions or --mode=rewrite


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Frozen:
  """The models that training reads and never changes."""
  vlm: encoders.Encoder
  vae: autoencoder.Autoencoder


def gather(hidden: jax.Array, keep: jax.Array) -> jax.Array:
  """The kept tokens' states: hidden [b s l e] at keep [b q] -> [b q l e]."""
  return jnp.take_along_axis(hidden, keep[:, :, None, None], axis=1)


def listen(prompt_hidden: jax.Array, written: jax.Array, lengths: jax.Array, keep: jax.Array, keep_mask: jax.Array):
  """States of what was read and kept, and of what was written, from the pass that wrote: ([b q+n l e], mask [b q+n]).

  prompt_hidden [b s l e] with keep, keep_mask [b q]; written [b n l e], of which the first lengths [b] count.
  """
  counted = jnp.arange(written.shape[1])[None] < lengths[:, None]
  return (jnp.concatenate([gather(prompt_hidden, keep), written], axis=1), jnp.concatenate([keep_mask, counted], axis=1))


def _repeat(x: jax.Array, n: int) -> jax.Array:
  """Each row n times in a row, on the device that has it: [b ...] -> [b*n ...]."""
  many = jnp.broadcast_to(x[:, None], (x.shape[0], n, *x.shape[1:]), out_sharding=jax.P(BATCH))
  return jnp.reshape(many, (-1, *x.shape[1:]), out_sharding=jax.P(BATCH))


def loss(config: FlowConfig, taps: tuple[int, ...], writing, params: unifusion.UniFusion, frozen: Frozen, batch, key):
  """Mean squared error of the velocity, f32, and its parts by time.

  Args:
    writing: (most tokens, stop ids) of the answers that the VLM writes to prompts with `open`; None without such.
    batch: target [b y x 3] f32 in [-1, 1]; tokens, valid [b s]; keep, keep_mask [b q]; tiles [b r y x 3] if any;
      open [b], whether an answer is to be written, if any is.
    key: drives times and noise.
  """
  time_key, noise_key = jax.random.split(key)
  z = jax.lax.stop_gradient(frozen.vae.encode(batch['target'])).astype(jnp.float32)
  mask = batch['keep_mask']
  if writing is None:
    hidden = gather(frozen.vlm.hidden(batch['tokens'], batch['valid'], taps, batch.get('tiles')), batch['keep'])
  else:
    most, stop_ids = writing
    out = generate.generate(frozen.vlm, batch['tokens'], batch['valid'], batch.get('tiles'), max_new=most,
                            stop_ids=stop_ids, taps=taps)
    hidden, mask = listen(out.prompt_hidden, out.hidden, out.lengths * batch['open'], batch['keep'], mask)
  condition = params.condition(jax.lax.stop_gradient(hidden), mask)
  z, condition, mask = (_repeat(x, config.draws) for x in (z, condition, mask))
  t = flow.sample_time(time_key, z.shape[0], config.mean, config.std, config.shift)
  noise = jax.random.normal(noise_key, z.shape, out_sharding=jax.typeof(z).sharding.spec)
  errors = flow.loss(lambda x, t: params.velocity(x, t, condition, mask), z, noise, t)
  value = jnp.mean(errors)
  late = t > 0.5
  halves = {f'loss_{name}': jnp.sum(errors * part) / jnp.maximum(jnp.sum(part), 1)
            for name, part in (('noisy', late), ('clean', ~late))}
  return value, dict(loss=value, **halves)
