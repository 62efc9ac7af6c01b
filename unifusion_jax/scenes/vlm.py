"""Objective of the embedded VLM: next-token loss on its answers, and two auxiliary heads that train its vision.

The attributes head, linear on the projected image tokens, predicts the object and background that each token covers.
The grounding head predicts which image tokens show the objects that an edit changes, or of several images what the
result takes, from the decoder's states half-way up: of the end of the instruction, and of the image tokens, which know
the number of their image. Both are dropped when the VLM is exported.
"""

import dataclasses
import json
import math
import pathlib
import shutil
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from unifusion_jax import ranges, sharding, wording
from unifusion_jax.data import loader, transforms
from unifusion_jax.data.config import is_list
from unifusion_jax.models import internvl, layers
from unifusion_jax.ranges import Range
from unifusion_jax.scenes import chat_examples, image_tokens, world
from unifusion_jax.scenes.evaluation import language

PREVIEWED = 8  # images of a preview

# Sizes of the attributes head's outputs: covered, the object's attributes, its centre, background kind and colours.
_PARTS = (1, *(len(names) for _, names in image_tokens.ATTRIBUTES), 2, len(world.BACKGROUND_KINDS),
          len(image_tokens.BACKGROUNDS), len(image_tokens.BACKGROUNDS))


class VLMWithHeads(nnx.Module):
  """The VLM with its two training heads."""

  def __init__(self, config: internvl.InternVLConfig, *, rngs: nnx.Rngs):
    self.vlm = internvl.InternVL(config, rngs=rngs)
    width = config.text.width
    self.attributes = layers.weight(rngs, (width, sum(_PARTS)), (None, None), contract=1)
    self.grounding = layers.weight(rngs, (width, width), (None, None), contract=1)
    self.grounding_keys = layers.weight(rngs, (width, width), (None, None), contract=1)
    self.grounding_bias = layers.constant(0.0, ())


@dataclasses.dataclass
class VLMObjective:
  """Weights of the three losses; only scenes have the labels for them."""
  lm_weight: float = 1.0          # next-token loss; 0 trains the vision tower alone, several times as fast
  attributes_weight: float = 1.0  # attributes head
  grounding_weight: float = 1.0   # grounding head, on edits and requests of several images
  dtype: str = 'float32'          # of the computation; parameters stay f32

  tasks = ('t2i', 'edit', 'reconstruct', 'multi', 'caption', 'question', 'rewrite')
  pretrained = ()
  tokenizers = ('vlm',)  # settings that name folders of which it reads the tokenizer alone

  def unit(self, config) -> int:
    """Pixels that both sides of an image must be multiples of: 1, any size will do."""
    del config
    return 1

  def problems(self, config, devices: int) -> list[str]:
    """Settings that cannot work together, a sentence each."""
    del devices
    weight = Range(0, 10 ** 6)
    wrong = ranges.problems(self, 'objective.', lm_weight=weight, attributes_weight=weight, grounding_weight=weight)
    if self.dtype not in ('float32', 'bfloat16'):
      wrong.append(f"objective.dtype={self.dtype!r} must be 'float32' or 'bfloat16'")
    wrong += [f'data.{name}={path}: the embedded VLM is trained and measured on scenes alone, which come with '
              'questions and answers' for name, path in (('path', config.data.path), ('held_out', config.data.held_out))
              if path and is_list(path)]
    return wrong

  def init(self, config) -> VLMWithHeads:
    """Parameters to start from: random ones, or those of `config.init` with new heads."""
    return self.load(config, config.init) if config.init else jax.jit(lambda: self.random(config))()

  def random(self, config) -> VLMWithHeads:
    """Parameters of random weights; traceable."""
    return VLMWithHeads(config.model, rngs=nnx.Rngs(config.seed))

  def load(self, config, folder: str) -> VLMWithHeads:
    """The VLM in a folder, with newly initialised heads."""
    params: Any = jax.jit(lambda: self.random(config))()
    params.vlm = internvl.load(folder, jnp.float32)
    return params

  def export(self, config, params: VLMWithHeads, folder) -> None:
    """Writes the VLM without its heads, and its tokenizer."""
    save(params.vlm, config.vlm, folder)

  def frozen(self, config) -> None:
    """Nothing is frozen."""

  abstract_frozen = frozen

  def transform(self, config) -> chat_examples.ChatExample:
    """Record -> arrays of one chat."""
    return chat_examples.ChatExample(self.prompt_encoder(config))

  def prompt_encoder(self, config) -> transforms.PromptEncoder:
    """The prompt encoder of the VLM in training: its configuration is the recipe's, its tokenizer `config.vlm`'s."""
    return transforms.prompt_encoder(config, config.model)

  def batch_spec(self, config) -> dict[str, jax.ShapeDtypeStruct]:
    """The largest batch, as it reaches the train step."""
    size, transform = config.data.size, self.transform(config)
    return loader.batch_spec(transform.spec(size, size, references=1, task='edit'), config.data.batch_size)

  def tokens(self, config, batch) -> int:
    """Tokens that the decoder reads of a batch, padding too; image tokens where the tower trains alone."""
    del config
    if self.lm_weight:
      return batch['input_ids'].size
    return math.prod(batch['attributes'].shape[:2]) if 'attributes' in batch else 0

  def preview(self, config):
    """`preview(params, frozen)` -> uint8 grid of images, requests, answers and truths; None for the tower alone."""
    encoder = self.prompt_encoder(config)

    def preview(params, frozen):
      return language.preview_grid(params.vlm, encoder, config.data, PREVIEWED) if self.lm_weight else None
    return preview

  def loss(self, params: VLMWithHeads, frozen, batch, key):
    """Cross-entropy of the answers' tokens plus the two heads' losses: (scalar f32, metrics).

    batch: of `chat_examples.ChatExample`. Nothing is drawn from the key.
    """
    params = layers.cast(params, self.dtype)
    image_features, metrics = None, {}
    attributes_loss = jnp.zeros((), jnp.float32)
    if 'tiles' in batch:
      image_features = params.vlm.image_features(batch['tiles'])
      outputs = layers.einsum('bse,ef->bsf', image_features, params.attributes)
      attributes_loss, metrics = _attributes_loss(outputs, batch['attributes'])
    if not self.lm_weight:
      return attributes_loss, dict(loss=attributes_loss, **metrics)
    prompt = params.vlm.prompt(batch['input_ids'], batch['attention_mask'], image_features=image_features)
    half = params.vlm.config.text.depth // 2
    last, tapped, _ = params.vlm.decoder(prompt.x, prompt.angles, prompt.attention_mask, taps=(half, half + 1))
    grounding = 0.0
    if self.grounding_weight and 'grounding' in batch:
      ends = jnp.take_along_axis(tapped, batch['predict'][:, :1, None, None], axis=1)
      states = jnp.take_along_axis(tapped[:, :, 0], batch['places'][..., None], axis=1)
      grounding, metrics['grounded'] = grounding_loss(params, ends, image_features, states, batch['grounding'],
                                                      batch['attributes'][..., 0] >= 0)
    logits = params.vlm.decoder.logits(jnp.take_along_axis(last, batch['predict'][..., None], axis=1))
    mask = batch['target_mask'].astype(jnp.float32)
    targets = batch['targets'].astype(jnp.int32)
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    target_log_probabilities = jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
    count = jnp.sum(mask)
    loss = -jnp.sum(target_log_probabilities * mask) / count
    accuracy = jnp.sum((jnp.argmax(logits, axis=-1) == targets) * mask) / count
    heads = self.attributes_weight * attributes_loss + self.grounding_weight * grounding
    return self.lm_weight * loss + heads, dict(loss=loss, accuracy=accuracy, **metrics)


def grounding_loss(params: VLMWithHeads, ends: jax.Array, image_features: jax.Array, states: jax.Array,
                   marked: jax.Array, shown: jax.Array):
  """Loss of the grounding head, and the share of examples with every image token right.

  ends [b 1 l e]: states of l layers at the end of the instruction. image_features [b s e], states [b s e]: of the image
  tokens, before and within the decoder. marked [b s] bool: the tokens to find. shown [b s] bool: False on padding.
  """
  queries = layers.einsum('ble,ef->blf', layers.rms_norm(ends[:, 0].astype(jnp.float32)), params.grounding)
  keys = layers.rms_norm(image_features.astype(jnp.float32)) + layers.einsum(
      'bse,ef->bsf', layers.rms_norm(states.astype(jnp.float32)), params.grounding_keys)
  logits = jnp.einsum('blf,bsf->bls', queries, keys) / keys.shape[-1] ** 0.5 + params.grounding_bias[...]
  marked, shown = marked[:, None], shown[:, None]
  right = jnp.all(((logits[:, -1:] > 0) == marked) | ~shown, axis=(1, 2))
  losses = jnp.logaddexp(0.0, jnp.where(marked, -logits, logits))
  return jnp.sum(losses * shown) / (jnp.sum(shown) * logits.shape[1]), jnp.mean(right.astype(jnp.float32))


def _attributes_loss(outputs: jax.Array, truth: jax.Array):
  """Loss and accuracies of the attributes head: outputs [b s sum(_PARTS)], truth [b s COLUMNS] of `image_tokens`."""
  edges = [sum(_PARTS[:i + 1]) for i in range(len(_PARTS) - 1)]
  covered, *attributes, centre, kind, upper, lower = jnp.split(outputs.astype(jnp.float32), edges, axis=-1)
  shown, present = (truth[..., 0] >= 0).astype(jnp.float32), (truth[..., 0] > 0).astype(jnp.float32)

  def mean(x, where):
    return jnp.sum(x * where) / jnp.maximum(jnp.sum(where), 1.0)

  def cross_entropy(logits, labels, where):
    log_probabilities = jax.nn.log_softmax(logits)
    labels = jnp.maximum(labels, 0).astype(jnp.int32)
    label_log_probabilities = jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]
    return -mean(label_log_probabilities, where), mean((jnp.argmax(logits, -1) == labels).astype(jnp.float32), where)

  losses = {'covered': mean(jnp.logaddexp(0.0, jnp.where(present > 0, -1, 1) * covered[..., 0]), shown),
            'centre': mean(jnp.mean(jnp.abs(centre - truth[..., 5:7]), -1), present)}
  rates = {}
  for i, ((name, _), logits) in enumerate(zip(image_tokens.ATTRIBUTES, attributes, strict=True), 1):
    losses[name], rates[f'attributes_{name}'] = cross_entropy(logits, truth[..., i], present)
  losses['kind'], rates['attributes_background'] = cross_entropy(kind, truth[..., 7], shown)
  losses['upper'] = cross_entropy(upper, truth[..., 8], shown)[0]
  losses['lower'] = cross_entropy(lower, truth[..., 9], shown)[0]
  return sum(losses.values()), dict(rates, attributes_centre=losses['centre'])


def save(vlm: internvl.InternVL, tokenizer: str, folder) -> None:
  """Writes a Hugging Face folder, tokenizer and preprocessor_config.json included; all processes call it together."""
  folder = pathlib.Path(folder)
  internvl.save(vlm, folder)
  with sharding.together(f'write {folder}'):
    if sharding.is_main_process():
      _save_processors(vlm, tokenizer, folder)


def _save_processors(vlm: internvl.InternVL, tokenizer: str, folder: pathlib.Path) -> None:
  vision = vlm.config.vision
  pixels = dict(image_processor_type='GotOcr2ImageProcessor', size=dict(height=vision.tile, width=vision.tile),
                image_mean=list(vision.mean), image_std=list(vision.std), crop_to_patches=True, min_patches=1,
                max_patches=12, do_convert_rgb=True)
  (folder / 'preprocessor_config.json').write_text(json.dumps(pixels, indent=2) + '\n')
  if pathlib.Path(tokenizer).resolve() != folder.resolve():
    for name in ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja', wording.FILE):
      if (pathlib.Path(tokenizer) / name).exists():
        shutil.copyfile(pathlib.Path(tokenizer) / name, folder / name)
