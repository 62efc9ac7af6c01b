"""REPA, representation alignment (arXiv 2410.06940): a head predicts vision features of the target from DiT states.

The features are those of the frozen VLM's own vision tower, standardised over the positions of each image (iREPA, arXiv
2512.10794), so no further model is needed. The head is trained beside the model and left out of every export.
"""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from unifusion_jax.data import imaging
from unifusion_jax.models import internvl, layers, unifusion


class WithREPA(nnx.Module):
  """A UniFusion model and its REPA head."""

  def __init__(self, config: unifusion.UniFusionConfig, width: int, *, rngs: nnx.Rngs):
    self.model = unifusion.UniFusion(config, rngs=rngs)
    self.head = Head(config.dit.width, width, rngs=rngs)


class Head(nnx.Module):
  """DiT states -> predicted vision features: two layers with SiLU between."""

  def __init__(self, width: int, width_out: int, *, rngs: nnx.Rngs):
    self.w1 = layers.weight(rngs, (width, width), ('fsdp', 'tp'), contract=1)
    self.b1 = layers.constant(0.0, (width,), ('tp',))
    self.w2 = layers.weight(rngs, (width, width_out), ('tp', None), contract=1)

  def cosine_loss(self, states: jax.Array, targets: jax.Array) -> jax.Array:
    """1 - mean cosine similarity of the predictions for states [b y x d] and targets [b y x e]: a scalar, f32."""
    b, *_, d = states.shape
    y = layers.einsum('bsd,df->bsf', states.reshape(b, -1, d, out_sharding=layers.RESIDUAL), self.w1)
    y = layers.einsum('bsf,fd->bsd', jax.nn.silu(y + self.b1[...].astype(y.dtype)), self.w2, layers.RESIDUAL)
    targets = targets.reshape(y.shape, out_sharding=layers.RESIDUAL)
    return 1 - jnp.mean(layers.rms_norm(y.astype(jnp.float32)) * layers.rms_norm(targets.astype(jnp.float32)))


def targets(vlm: internvl.InternVL, images: jax.Array, rows: int, columns: int) -> jax.Array:
  """Vision features of uint8 images [b y x 3], each shown whole in one tile: [b rows columns e] f32.

  Standardised over the positions of each image: only differences between positions describe the layout.
  """
  vision = vlm.config.vision
  side = vision.tile // vision.patch

  def resized(x, y, x_) -> Any:
    resize = lambda x: jax.image.resize(x, (x.shape[0], y, x_, x.shape[-1]), 'linear')
    return jax.sharding.auto_axes(resize, out_sharding=layers.RESIDUAL)(x)

  pixels = (resized(imaging.to_float(images), vision.tile, vision.tile) + 1) / 2
  features = vlm.vision((pixels - jnp.array(vision.mean)) / jnp.array(vision.std)).astype(jnp.float32)
  features = features.reshape(len(images), side, side, -1, out_sharding=layers.RESIDUAL)
  features = features - jnp.mean(features, axis=(1, 2), keepdims=True)
  features = features / (jnp.std(features, axis=(1, 2), keepdims=True) + 1e-6)
  return resized(features, rows, columns)
