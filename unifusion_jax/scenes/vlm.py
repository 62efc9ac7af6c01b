"""Training the embedded VLM: next-token loss on what it has to write, and two heads that teach it to see and to find.

The read-out is a linear head on the projected image tokens that has to tell what of the scene each of them covers.
The pointer has to tell, half-way up the decoder at the end of an edit's instruction, which image tokens show what the edit
changes. Both are dropped when the VLM is exported.
"""

import dataclasses
import json
import pathlib
import shutil

from flax import nnx
import jax
import jax.numpy as jnp

from unifusion_jax import sharding
from unifusion_jax.data import transforms, vision_inputs
from unifusion_jax.models import internvl, layers
from unifusion_jax.models.decoder import causal_mask
from unifusion_jax.scenes import world


@dataclasses.dataclass
class VLMObjective:
  lm_weight: float = 1.0    # weight of the written tokens' loss; at 0 the eye alone is trained, several times as fast
  attributes_weight: float = 1.0  # weight of the read-out's loss; it only exists for scenes
  grounding_weight: float = 1.0  # weight of the pointer's loss; it only exists for edits of scenes


# Sizes of the read-out's outputs: covered, the object's attributes, its centre, background kind and colours.
_PARTS = (1, *(len(names) for _, names in transforms.READOUT), 2, len(world.BACKGROUND_KINDS),
          len(world.BACKGROUND_COLOURS) ** 2)


class VLMWithHeads(nnx.Module):
  """The VLM with the heads that it is trained with."""

  def __init__(self, config: internvl.InternVLConfig, *, rngs: nnx.Rngs):
    self.vlm = internvl.InternVL(config, rngs=rngs)
    width = config.text.width
    self.head = layers.weight(rngs, (width, sum(_PARTS)), (None, None), contract=1)
    self.pointer = layers.weight(rngs, (width, width), (None, None), contract=1)
    self.grounding_bias = layers.constant(0.0, ())


def loss(config: VLMObjective, params: VLMWithHeads, frozen, batch, key):
  """Cross-entropy of the written tokens (and the two heads' losses), f32.

  Args:
    batch: as `transforms.ChatExample` gives it, batched.
  """
  del frozen, key
  image_features = None
  metrics = {}
  readout = jnp.zeros((), jnp.float32)
  if 'tiles' in batch:
    image_features = params.vlm.image_features(batch['tiles'])
    readout, metrics = _readout_loss(layers.einsum('bse,ef->bsf', image_features, params.head), batch['readout'])
  if not config.lm_weight:
    return readout, dict(loss=readout, **metrics)
  prompt = params.vlm.prompt(batch['input_ids'], batch['attention_mask'], image_features=image_features)
  half = params.vlm.config.text.depth // 2
  last, tapped, _ = params.vlm.decoder(prompt.x, prompt.angles, causal_mask(batch['attention_mask']), taps=(half, half + 1))
  pointing = 0.0
  if config.grounding_weight and 'changes' in batch:
    ends = jnp.take_along_axis(tapped, batch['predict'][:, :1, None, None], axis=1)
    pointing, metrics['pointed'] = _pointer_loss(params, ends, image_features, batch['changes'])
  logits = params.vlm.decoder.logits(jnp.take_along_axis(last, batch['predict'][..., None], axis=1))
  mask = batch['target_mask'].astype(jnp.float32)
  targets = batch['targets'].astype(jnp.int32)
  log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
  chosen = jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
  count = jnp.sum(mask)
  value = -jnp.sum(chosen * mask) / count
  right = jnp.sum((jnp.argmax(logits, axis=-1) == targets) * mask) / count
  heads = config.attributes_weight * readout + config.grounding_weight * pointing
  return config.lm_weight * value + heads, dict(loss=value, accuracy=right, **metrics)


def _pointer_loss(params: VLMWithHeads, ends: jax.Array, image_features: jax.Array, wanted: jax.Array):
  """Whether each image token shows what will change, told from a few layers' states at the end of the instruction.

  ends [b 1 l e], image_features [b s e], wanted [b s] bool -> (mean loss, share of the examples with every token right).
  """
  asked = layers.einsum('ble,ef->blf', layers.rms_norm(ends[:, 0].astype(jnp.float32)), params.pointer)
  shown = layers.rms_norm(image_features.astype(jnp.float32))
  logits = jnp.einsum('blf,bsf->bls', asked, shown) / shown.shape[-1] ** 0.5 + params.grounding_bias[...]
  wanted = wanted[:, None]
  right = jnp.all((logits[:, -1:] > 0) == wanted, axis=(1, 2))
  return jnp.mean(jnp.logaddexp(0.0, jnp.where(wanted, -logits, logits))), jnp.mean(right.astype(jnp.float32))


def _readout_loss(outputs: jax.Array, wanted: jax.Array):
  """outputs [b s sum(_PARTS)], wanted [b s 9] as `transforms.readout` -> (mean loss, accuracies)."""
  edges = [sum(_PARTS[:i + 1]) for i in range(len(_PARTS) - 1)]
  covered, shape, colour, size, fill, centre, kind, colours = jnp.split(outputs.astype(jnp.float32), edges, axis=-1)
  present = wanted[..., 0]

  def mean(x, where):
    return jnp.sum(x * where) / jnp.maximum(jnp.sum(where), 1.0)

  def chosen(logits, labels, where):
    log_probabilities = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probabilities, labels.astype(jnp.int32)[..., None], axis=-1)[..., 0]
    return -mean(picked, where), mean((jnp.argmax(logits, -1) == labels).astype(jnp.float32), where)

  everywhere = jnp.ones_like(present)
  losses = {'covered': mean(jnp.logaddexp(0.0, jnp.where(present > 0, -1, 1) * covered[..., 0]), everywhere),
            'centre': mean(jnp.mean(jnp.abs(centre - wanted[..., 5:7]), -1), present)}
  rates = {}
  for i, (name, logits) in enumerate((('shape', shape), ('colour', colour), ('size', size), ('fill', fill)), 1):
    losses[name], rates[f'readout_{name}'] = chosen(logits, wanted[..., i], present)
  losses['kind'], rates['readout_background'] = chosen(kind, wanted[..., 7], everywhere)
  losses['colours'], _ = chosen(colours, wanted[..., 8], everywhere)
  return sum(losses.values()), dict(rates, readout_centre=losses['centre'])


def save(vlm: internvl.InternVL, tokenizer: str, folder) -> None:
  """Writes a Hugging Face folder, tokenizer and preprocessor_config.json included; all processes call it together."""
  folder = pathlib.Path(folder)
  internvl.save(vlm, folder)
  if not sharding.is_main_process():
    return
  tile = vlm.config.vision.tile
  pixels = dict(image_processor_type='GotOcr2ImageProcessor', size=dict(height=tile, width=tile), image_mean=list(vision_inputs.TiledImages.mean),
                image_std=list(vision_inputs.TiledImages.std), crop_to_patches=True, min_patches=1, max_patches=12, do_convert_rgb=True)
  (folder / 'preprocessor_config.json').write_text(json.dumps(pixels, indent=2) + '\n')
  for name in ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'):
    if pathlib.Path(tokenizer).resolve() != folder.resolve():
      shutil.copyfile(pathlib.Path(tokenizer) / name, folder / name)
