"""The models of a pipeline as shapes, and how it lays out its requests: of a recipe that samples, or one that trains.

No weights are read. The mesh, of devices or abstract, must be in context.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from unifusion_jax import parts, sharding
from unifusion_jax.commands.sample import PipelineConfig
from unifusion_jax.data import transforms
from unifusion_jax.errors import UserError
from unifusion_jax.models import layers, unifusion
from unifusion_jax.weights import autoencoders, encoders, quantize


@dataclasses.dataclass(frozen=True)
class Resident:
  """The models that lie on the devices while a pipeline samples.

  Attributes:
    taps: layers of the VLM that LAP pools.
    size: default image size: the side of a square, in pixels.
    prompt_encoder: for its lengths; it may have no tokenizer.
    in_turn: whether VLM and transformer lie there one after the other.
  """
  transformer: unifusion.UniFusion
  vlm: encoders.Encoder
  vae: autoencoders.Autoencoder
  taps: tuple[int, ...]
  size: int
  prompt_encoder: transforms.PromptEncoder
  in_turn: bool = False

  @property
  def unit(self) -> int:
    """Pixels that both sides of an image must be multiples of: one patch of latents."""
    return self.vae.downsampling * self.transformer.config.dit.patch


def of(config) -> Resident:
  """The models of a PipelineConfig, or of a config.Config whose objective trains a pipeline's transformer."""
  return _sampled(config) if isinstance(config, PipelineConfig) else _trained(config)


def _sampled(config: PipelineConfig) -> Resident:
  located, dtype = parts.locate(config.weights, transformer=config.transformer, vlm=config.vlm, vae=config.vae,
                                weights=False), jnp.dtype(config.dtype)
  sizes = dataclasses.replace(located.config, dtype=config.dtype)
  if wrong := sizes.undivided(jax.sharding.get_abstract_mesh().shape):
    raise UserError(f'{located.transformer.name}: {"; ".join(wrong)}: choose another mesh')
  transformer = jax.eval_shape(lambda: layers.cast(unifusion.UniFusion(sizes, rngs=nnx.Rngs(0)), dtype))
  if config.transformer_quantized:
    activations = config.transformer_quantized == 'w8a8'
    transformer = jax.eval_shape(lambda model: quantize.quantize(model, activations), transformer)
  vlm = encoders.abstract(encoders.config(located.vlm.folder), dtype, config.vlm_quantized)
  vae = autoencoders.abstract(autoencoders.config(located.vae.folder), dtype)
  return Resident(*on_mesh((transformer, vlm, vae)), located.described.taps, located.described.size,
                  located.prompt_encoder, config.in_turn)


def _trained(config) -> Resident:
  objective, frozen = config.objective, on_mesh(config.objective.abstract_frozen(config))
  transformer = on_mesh(jax.eval_shape(lambda frozen: objective.model(objective.random(config), frozen), frozen))
  return Resident(transformer, frozen.vlm, frozen.vae, config.taps, config.data.size,
                  transforms.abstract_prompt_encoder(config))


def on_mesh(tree):
  """Shapes with shardings on the mesh in context, of its devices where it has any."""
  mesh = jax.sharding.get_mesh()
  return sharding.abstract(tree, jax.sharding.get_abstract_mesh() if mesh.empty else mesh)
