"""Training the DiT, LAP and refiner by rectified flow, conditioned on a frozen VLM (text to image, edits)."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax import flow
from unifusion_jax.data import imaging
from unifusion_jax.models import internvl, layers, text_generation, unifusion
from unifusion_jax.models import vae as autoencoder
from unifusion_jax.sharding import BATCH
from unifusion_jax.weights import encoders


@dataclasses.dataclass
class FlowMatching:
  """The loss of the DiT, and what of the condition is dropped for guidance."""
  mean: float = 0.0             # of the logit-normal times
  std: float = 1.0
  noises_per_example: int = 1                # times and noises for each example, which share the work of everything before the DiT
  shift: float = 1.0            # resolution shift of the times: 2, 3, 4 at 256, 512, 1024 px (Iris-3B)
  cond_dropout: float = 0.1             # share of examples with the null condition
  image_dropout: float = 0.05   # share of examples with references whose image tokens are masked
  text_dropout: float = 0.05    # share of examples with references about which nothing is written
  instruction_prob: float = 0.0              # share of examples conditioned on the user's words instead of the rewritten ones
  rewrite_online: bool = False          # the VLM writes as training goes (slow) instead of captions or --mode=rewrite
  # Representation alignment (REPA, arXiv 2410.06940): what the frozen VLM's own eye sees in the finished image is to be
  # told from the DiT's states after `repa_depth` blocks. 0: off. Its head is no part of the model.
  repa_weight: float = 0.0            # weight of its loss
  repa_depth: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Frozen:
  """The models that training reads and never changes."""
  vlm: encoders.Encoder
  vae: autoencoder.Autoencoder


class WithREPA(nnx.Module):
  """The model with the head that its states are aligned through, which no export holds."""

  def __init__(self, config: unifusion.UniFusionConfig, width: int, *, rngs: nnx.Rngs):
    self.model = unifusion.UniFusion(config, rngs=rngs)
    d = config.dit.width
    self.w1 = layers.weight(rngs, (d, d), ('fsdp', 'tp'), d)
    self.b1 = layers.constant(0.0, (d,), ('tp',))
    self.w2 = layers.weight(rngs, (d, width), ('tp', None), d)

  def distance(self, states: jax.Array, seen: jax.Array) -> jax.Array:
    """One minus the mean cosine between what the states [b y x d] tell and what is seen [b y x e]: a scalar, f32."""
    b, *_, d = states.shape
    y = layers.einsum('bsd,df->bsf', states.reshape(b, -1, d, out_sharding=layers.RESIDUAL), self.w1)
    y = layers.einsum('bsf,fd->bsd', jax.nn.silu(y + self.b1[...].astype(y.dtype)), self.w2, layers.RESIDUAL)
    a, b = (layers.rms_norm(x.astype(jnp.float32)) for x in (y, seen.reshape(y.shape, out_sharding=layers.RESIDUAL)))
    return 1 - jnp.mean(a * b)


def repa_targets(vlm: internvl.InternVL, pixels, images: jax.Array, rows: int, columns: int) -> jax.Array:
  """The states of the VLM's vision tower for images [b y x 3] in [-1, 1], shown whole in one tile: [b rows columns e] f32.

  Standardised over the places of each image, as only what differs between them says what is where (iREPA, arXiv
  2512.10794). `pixels` is the (mean, std) of the tower's own normalisation.
  """
  vision, (mean, std) = vlm.config.vision, (np.array(x, np.float32) for x in pixels)
  side = vision.tile // vision.patch

  def resized(x, y, x_):
    resize = lambda x: jax.image.resize(x, (x.shape[0], y, x_, x.shape[-1]), 'linear')
    return jax.sharding.auto_axes(resize, out_sharding=layers.RESIDUAL)(x)

  tiles = ((resized(images, vision.tile, vision.tile) + 1) / 2 - mean) / std
  states = vlm.vision(tiles).astype(jnp.float32).reshape(len(images), side, side, -1, out_sharding=layers.RESIDUAL)
  states = states - jnp.mean(states, axis=(1, 2), keepdims=True)
  states = states / (jnp.std(states, axis=(1, 2), keepdims=True) + 1e-6)
  return resized(states, rows, columns)


def select_tokens(hidden: jax.Array, cond_index: jax.Array) -> jax.Array:
  """The kept tokens' states: hidden [b s l e] at cond_index [b q] -> [b q l e]."""
  return jnp.take_along_axis(hidden, cond_index[:, :, None, None], axis=1)


def condition_states(prompt_hidden: jax.Array, written: jax.Array, lengths: jax.Array, cond_index: jax.Array, cond_mask: jax.Array):
  """States of what was read and kept, and of what was written, from the pass that wrote: ([b q+n l e], mask [b q+n]).

  prompt_hidden [b s l e] with cond_index, cond_mask [b q]; written [b n l e], of which the first lengths [b] count.
  """
  counted = jnp.arange(written.shape[1])[None] < lengths[:, None]
  return (jnp.concatenate([select_tokens(prompt_hidden, cond_index), written], axis=1), jnp.concatenate([cond_mask, counted], axis=1))


def is_valid_generation(tokens: jax.Array, lengths: jax.Array, stop_ids: tuple[int, ...], image_id: int | None) -> jax.Array:
  """Which answers [b n], of lengths [b], found an end, have something before it and no image token: as `sample.read`."""
  last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)
  found = jnp.any(last == jnp.array(stop_ids), axis=1) & (lengths > 1)
  if image_id is None:
    return found
  counted = jnp.arange(tokens.shape[1]) < lengths[:, None]
  return found & ~jnp.any((tokens == image_id) & counted, axis=1)


def _repeat(x: jax.Array, n: int) -> jax.Array:
  """Each row n times in a row, on the device that has it: [b ...] -> [b*n ...]."""
  many = jnp.broadcast_to(x[:, None], (x.shape[0], n, *x.shape[1:]), out_sharding=jax.P(BATCH))
  return jnp.reshape(many, (-1, *x.shape[1:]), out_sharding=jax.P(BATCH))


def loss(config: FlowMatching, taps: tuple[int, ...], writing, pixels, params, frozen: Frozen, batch, key):
  """Mean squared error of the velocity, f32, with the weighted distance of alignment; and the parts of the error by time.

  Args:
    writing: (most tokens, stop ids, image id) of the answers that the VLM writes to prompts with `open`; None without.
    pixels: as in `repa_targets`; read where config.repa_weight.
    params: a UniFusion; with config.repa_weight an WithREPA.
    batch: target [b y x 3] uint8; tokens, valid [b s]; cond_index, cond_mask [b q]; tiles [b r y x 3] if any;
      if any is to be written, open [b], whether it is, and asked, fallback_mask [b n], the request that stands in for it.
    key: drives times and noise.
  """
  time_key, noise_key = jax.random.split(key)
  target = imaging.to_float(batch['target'])
  z = jax.lax.stop_gradient(frozen.vae.encode(target)).astype(jnp.float32)
  mask, metrics = batch['cond_mask'], {}
  if writing is None:
    hidden = select_tokens(frozen.vlm.hidden(batch['input_ids'], batch['attention_mask'], taps, batch.get('tiles')), batch['cond_index'])
  else:
    most, stop_ids, image_id = writing
    out = text_generation.generate(frozen.vlm, batch['input_ids'], batch['attention_mask'], batch.get('tiles'), max_new=most,
                            stop_ids=stop_ids, taps=taps)
    fell = batch['needs_rewrite'] & ~is_valid_generation(out.tokens, out.lengths, stop_ids, image_id)
    hidden, mask = condition_states(out.prompt_hidden, out.hidden, out.lengths * (batch['needs_rewrite'] & ~fell), batch['cond_index'], mask)
    hidden = jnp.concatenate([hidden, select_tokens(out.prompt_hidden, batch['fallback_index'])], axis=1)
    mask = jnp.concatenate([mask, batch['fallback_mask'] & fell[:, None]], axis=1)
    metrics['fallback_rate'] = jnp.mean(fell.astype(jnp.float32))
  model = params.model if config.repa_weight else params
  condition = model.condition(jax.lax.stop_gradient(hidden), mask)
  z, condition, mask = (_repeat(x, config.noises_per_example) for x in (z, condition, mask))
  t = flow.sample_time(time_key, z.shape[0], config.mean, config.std, config.shift)
  noise = jax.random.normal(noise_key, z.shape, out_sharding=jax.typeof(z).sharding.spec)
  noised = flow.interpolate(z, noise, t)
  aligning = 0.0
  if config.repa_weight:
    velocity, states = model.velocity(noised, t, condition, mask, config.repa_depth)
    seen = jax.lax.stop_gradient(repa_targets(frozen.vlm, pixels, target, *states.shape[1:3]))
    metrics['align'] = params.distance(states, _repeat(seen, config.noises_per_example))
    aligning = config.repa_weight * metrics['align']
  else:
    velocity = model.velocity(noised, t, condition, mask)
  errors = flow.loss(velocity, z, noise)
  value = jnp.mean(errors)
  late = t > 0.5
  for name, part in (('noisy', late), ('clean', ~late)):
    metrics[f'loss_{name}'] = jnp.sum(errors * part) / jnp.maximum(jnp.sum(part), 1)
  return value + aligning, dict(loss=value, **metrics)
