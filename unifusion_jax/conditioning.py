"""Frozen models, and the VLM states that LAP pools: shared by training and sampling."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax import parts
from unifusion_jax.data import imaging, transforms
from unifusion_jax.errors import UserError
from unifusion_jax.models import dit, unifusion
from unifusion_jax.sharding import BATCH
from unifusion_jax.weights import autoencoders, encoders

_static: Any = lambda: dataclasses.field(default=None, metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Frozen:
  """Frozen VLM and autoencoder, and the base of adapters, with the static settings that belong to them.

  Attributes:
    base: the model whose adapters are in training, if any.
    taps: layers of the VLM that LAP pools.
    stop_ids: token ids that end generated text.
    image_id: the id of every image token; None for a language model.
    max_rewrite: maximum tokens of a rewrite.
    blank_ids: ids that say nothing, alone or together (`verifi.Chat.blank_ids`); only for rewriting during training.
  """
  vlm: encoders.Encoder
  vae: autoencoders.Autoencoder
  taps: tuple[int, ...] = _static()
  stop_ids: tuple[int, ...] = _static()
  image_id: int | None = _static()
  max_rewrite: int = _static()
  blank_ids: tuple[int, ...] = _static()
  base: unifusion.UniFusion | None = None

  @classmethod
  def load(cls, config) -> 'Frozen':
    """Loads both models of a config.Config; UserError where they do not fit `config.model`."""
    dtype = jnp.dtype(config.frozen_dtype)
    _check_fit(config, encoders.config(config.vlm), autoencoders.config(config.vae))
    vlm = encoders.load(config.vlm, dtype, quantized=config.vlm_quantized, cache=config.vlm_cache)
    vae = autoencoders.load(config.vae, dtype)
    return cls(vlm, vae, config.taps, **_token_ids(config))

  @classmethod
  def abstract(cls, config) -> 'Frozen':
    """Shapes and shardings of `load` on the abstract mesh in context; reads no weights.

    Nor a tokenizer, but where the VLM rewrites during training: its ids are part of that program.
    """
    vlm, vae = encoders.config(config.vlm), autoencoders.config(config.vae)
    dtype = jnp.dtype(config.frozen_dtype)
    _check_fit(config, vlm, vae)
    if getattr(config.objective, 'rewrite_online', False):
      ids = _token_ids(config)
    else:  # any ids will do for shapes; how many tokens are written is known without a tokenizer
      ids = dict(stop_ids=(0,), image_id=1, max_rewrite=config.data.budget[1])
    vlm = encoders.abstract(vlm, dtype, config.vlm_quantized)
    return cls(vlm, autoencoders.abstract(vae, dtype), config.taps, **ids)


def _token_ids(config) -> dict:
  encoder = transforms.prompt_encoder(config)
  return dict(stop_ids=encoder.chat.stop_ids, image_id=encoder.chat.image_id, max_rewrite=encoder.max_rewrite,
              blank_ids=encoder.chat.blank_ids if getattr(config.objective, 'rewrite_online', False) else ())


def _check_fit(config, vlm, vae) -> None:
  parts.check_vlm(config.vlm, vlm, config.layout)
  if config.taps[-1] > vlm.text.depth or vlm.text.width != config.model.lap.width:
    raise UserError(f'{config.vlm} has {vlm.text.depth} layers of width {vlm.text.width}, but taps={config.taps} and '
                    f'model.lap.width={config.model.lap.width} do not match it: change these or the VLM')
  if vae.channels != config.model.dit.channels:
    raise UserError(f'{config.vae} has {vae.channels} latent channels, but model.dit.channels='
                    f'{config.model.dit.channels}: change one of them')


def condition_states(prompt_hidden: jax.Array, hidden: jax.Array, lengths: jax.Array, cond_mask: jax.Array
                     ) -> tuple[jax.Array, jax.Array]:
  """States of the conditioning prompt tokens, then those of the generated tokens: ([b q+n l e], mask [b q+n]).

  prompt_hidden [b q l e] is masked by cond_mask [b q]; of hidden [b n l e] the first `lengths` [b] are valid.
  """
  generated_mask = jnp.arange(hidden.shape[1])[None] < lengths[:, None]
  return (jnp.concatenate([prompt_hidden, hidden], axis=1),
          jnp.concatenate([cond_mask, generated_mask], axis=1))


def is_valid_generation(ids: jax.Array, lengths: jax.Array, stop_ids: tuple[int, ...],
                        image_id: int | None, blank_ids: tuple[int, ...] | None = None) -> jax.Array:
  """Valid rows [b] bool of generated ids [b n] with lengths [b]: a stop id at the end, not blank, no image token.

  The rule of `prompting.read_rewrites`, on the device. They differ only where several ids make one character of white
  space, none of which is blank alone.
  """
  last = jnp.take_along_axis(ids, lengths[:, None] - 1, axis=1)
  blank = jnp.any(ids[:, :, None] == np.array(blank_ids or (-1,)), axis=-1)
  text = ~blank & (jnp.arange(ids.shape[1]) < lengths[:, None] - 1)
  ended = jnp.any(last == jnp.array(stop_ids), axis=1) & jnp.any(text, axis=1)
  if image_id is None:
    return ended
  generated_mask = jnp.arange(ids.shape[1]) < lengths[:, None]
  return ended & ~jnp.any((ids == image_id) & generated_mask, axis=1)


class Conditioning(NamedTuple):
  """Condition tokens of the DiT with their mask, and clean references; a pytree with the batch first in every leaf."""
  tokens: dit.Condition  # [b q d]; of some ways (models/fusion.py) several leaves [b q ...], for each block of the DiT
  mask: jax.Array    # [b q], False on padding
  bias: jax.Array | None = None  # [b q] f32, the logarithm of how often each token counts in attention; None: once
  references: dit.References | None = None  # clean latents of reference images, where the model reads them


class States(NamedTuple):
  """VLM states of the tokens that condition, for LAP, and the mask of these tokens; the batch is first in all."""
  hidden: jax.Array  # [b q l e]
  mask: jax.Array    # [b q], False on padding
  image: jax.Array   # [b q], which tokens are an image's


def image_tokens(vlm, input_ids: jax.Array, index: jax.Array) -> jax.Array:
  """Which of the tokens at `index` [b q] of prompts [b s] are an image's, [b q] bool; of a language model none."""
  is_image = input_ids == getattr(vlm.config, 'image_token_id', -1)
  # Elementwise, as the gather of one token of one row is refused on a mesh of one device.
  return jnp.any((jnp.arange(input_ids.shape[1]) == index[..., None]) & is_image[:, None], axis=-1)


@functools.partial(jax.jit, static_argnames='taps')
def read(vlm, input_ids, attention_mask, cond_index, cond_mask, images, *, taps) -> States:
  """States of prompts with known answers, from one teacher-forced pass."""
  hidden = vlm.hidden(input_ids, attention_mask, taps, images, cond_index)
  return States(hidden, cond_mask, image_tokens(vlm, input_ids, cond_index))


@jax.jit
def written(prompt_hidden, hidden, lengths, cond_mask, image) -> States:
  """States of the generating pass: those of the prompt's image tokens and of the generated tokens."""
  states, mask = condition_states(prompt_hidden, hidden, lengths, cond_mask)
  return States(states, mask, padded_to(image, mask))


def padded_to(image: jax.Array, mask: jax.Array) -> jax.Array:
  """`image` [b q] of a prompt's tokens, for those and the text [b q+n] after them that `mask` is of."""
  return jnp.pad(image, ((0, 0), (0, mask.shape[1] - image.shape[1])))


@functools.partial(jax.jit, inline=True)
def condition(model, states: States) -> Conditioning:
  """Conditioning from the VLM's states."""
  return Conditioning(model.condition(*states), model.visible(states.mask, states.image))


@jax.jit
def weighted(conditioning: Conditioning, strengths: jax.Array) -> Conditioning:
  """Conditioning whose tokens count `strengths` [b q] times, those of 0 not at all."""
  mask, bias = conditioning.mask & (strengths > 0), jnp.log(jnp.where(strengths > 0, strengths, 1))
  return conditioning._replace(mask=mask, bias=bias)


@jax.jit
def clean_references(vae, batch, strengths: jax.Array | None = None) -> dit.References | None:
  """Clean latents of a batch's references, which count `strengths` [b n] times, those of 0 not at all.

  batch: references uint8 [b n y x 3] and reference_mask [b n rows columns] as of `imaging.canvases`; without them None.
  """
  if 'references' not in batch:
    return None
  images, mask, bias = batch['references'], batch['reference_mask'], None
  b, n = images.shape[:2]
  images = jnp.reshape(images, (b * n, *images.shape[2:]), out_sharding=jax.P(BATCH))
  latents = vae.encode(imaging.to_float(images)).astype(jnp.float32)
  if strengths is not None:
    mask, bias = mask & (strengths > 0)[:, :, None, None], jnp.log(jnp.where(strengths > 0, strengths, 1))
  return dit.References(jnp.reshape(latents, (b, n, *latents.shape[1:]), out_sharding=jax.P(BATCH)), mask, bias)


@jax.jit
def replace_rows(old: States, new: States, place: jax.Array) -> States:
  """Row i of the result is row place[i] of `new` [n q l e], or of `old` [b q l e] where that is -1; padded alike."""
  longest = max(old.mask.shape[1], new.mask.shape[1])

  def rows(x, y):
    x, y = (jnp.pad(z, [(0, 0), (0, longest - z.shape[1])] + [(0, 0)] * (z.ndim - 2)) for z in (x, y))
    taken = jax.sharding.reshard(y, jax.P()).at[jnp.maximum(place, 0)].get(out_sharding=jax.typeof(x).sharding.spec)
    return jnp.where((place >= 0).reshape(-1, *[1] * (x.ndim - 1)), taken, x)
  return jax.tree.map(rows, old, new)
