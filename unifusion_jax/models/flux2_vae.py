"""FLUX.2's autoencoder, as diffusers' AutoencoderKLFlux2 lays it out: vae.py's, whose latents are patches.

Squares of 2 x 2 latents are one of four times the channels, channel first, then y and x. They are normalised by the
statistics of a batch norm, which are read with the weights.
"""

from collections.abc import Mapping
import dataclasses
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp

from unifusion_jax import json_file, ranges
from unifusion_jax.errors import UserError
from unifusion_jax.models import dit, layers, vae
from unifusion_jax.ranges import Range
from unifusion_jax.weights import convert, safetensors_io

PATCH = 2  # latents along each side of a patch
# The only values that are implemented; the momentum is of training
FIXED = {'patch_size': [PATCH, PATCH], 'decoder_block_out_channels': None}
UNREAD = ('batch_norm_momentum',)
COUNT = (r'bn\.num_batches_tracked',)  # of training, too


@dataclasses.dataclass(unsafe_hash=True)  # not frozen, as VAEConfig
class Flux2VAEConfig:
  """`unscaled`: of the autoencoder whose latents are put into patches."""
  unscaled: vae.VAEConfig = dataclasses.field(default_factory=lambda: vae.VAEConfig(
      latent_channels=32, scaling_factor=1.0, use_quant_conv=True, use_post_quant_conv=True))
  batch_norm_eps: float = 1e-4

  def problems(self, prefix: str = '') -> list[str]:
    """Sizes that cannot be, a sentence each."""
    return self.unscaled.problems(prefix) + ranges.problems(self, prefix, batch_norm_eps=Range(0, 1))

  def undivided(self, mesh: Mapping[str, int], prefix: str = '') -> list[str]:
    """Sizes that a mesh does not divide: none, for every device holds the whole autoencoder."""
    return self.unscaled.undivided(mesh, prefix)

  @property
  def downsampling(self) -> int:
    """Pixels per patch, along y and along x."""
    return self.unscaled.downsampling * PATCH

  @property
  def channels(self) -> int:
    """Channels of a patch."""
    return self.unscaled.latent_channels * PATCH ** 2

  @property
  def first_width(self) -> int:
    """Channels of the encoder at an image's own resolution."""
    return self.unscaled.first_width

  @classmethod
  def from_json(cls, config: dict) -> 'Flux2VAEConfig':
    """From the dict of a diffusers config.json; UserError for settings that are not implemented."""
    config = {k: v for k, v in config.items() if k not in UNREAD}
    for key, value in FIXED.items():
      given = config.pop(key, value)
      if (list(given) if isinstance(given, tuple) else given) != value:
        raise UserError(f'VAE config: {key} is {given}; only {value} is implemented')
    eps = config.pop('batch_norm_eps', cls.batch_norm_eps)
    # diffusers' own defaults for absent keys, where they are not those of AutoencoderKL
    public = {'block_out_channels': (128, 256, 512, 512), 'layers_per_block': 2, 'latent_channels': 32}
    config = public | config
    depth = len(config['block_out_channels'])
    blocks = {'down_block_types': (vae.ENCODER_BLOCK,) * depth, 'up_block_types': (vae.DECODER_BLOCK,) * depth}
    return cls(vae.VAEConfig.from_json(blocks | config | {'scaling_factor': 1.0}), eps)

  def to_json(self) -> dict:
    """The dict of a diffusers config.json."""
    own = {'_class_name': 'AutoencoderKLFlux2', 'batch_norm_eps': self.batch_norm_eps, 'patch_size': [PATCH, PATCH]}
    return {k: v for k, v in self.unscaled.to_json().items() if k not in ('scaling_factor', 'shift_factor')} | own


class Autoencoder(nnx.Module):
  """Images [b y x 3] <-> patches of latents [b y x c]."""

  def __init__(self, config: Flux2VAEConfig, dtype=jnp.float32, *, rngs: nnx.Rngs):
    self.config = dataclasses.replace(config)
    self.unscaled = vae.Autoencoder(config.unscaled, dtype, rngs=rngs)
    self.mean = layers.constant(0.0, (config.channels,))
    self.variance = layers.constant(1.0, (config.channels,))

  @property
  def downsampling(self) -> int:
    """Pixels per patch, along y and along x."""
    return self.config.downsampling

  @property
  def channels(self) -> int:
    """Channels of a patch."""
    return self.config.channels

  def encode(self, x: jax.Array) -> jax.Array:
    """Images [b y x 3] in [-1, 1] -> patches [b y/16 x/16 c] f32: the posterior's mean, at about unit variance."""
    step = self.downsampling
    if x.shape[1] % step or x.shape[2] % step:
      raise UserError(f'the autoencoder takes images of multiples of {step} pixels, got {x.shape[1]} x {x.shape[2]}')
    z, _ = self.unscaled.moments(x)
    y, x_ = z.shape[1] // PATCH, z.shape[2] // PATCH
    z = dit.patchify(z, PATCH).reshape(len(z), y, x_, -1, out_sharding=layers.RESIDUAL)
    return (z - self.mean[...]) / self._std

  def decode(self, z: jax.Array, tile: int = 0) -> jax.Array:
    """The inverse of encode: patches [b y x c] -> images [b 16y 16x 3] f32; `tile` as in vae.Autoencoder.decode."""
    z = z * self._std + self.mean[...]
    b, y, x, c = z.shape
    z = dit.unpatchify(z.reshape(b, y * x, c, out_sharding=layers.RESIDUAL), PATCH, y, x)
    return self.unscaled.decode(z, tile)

  @property
  def _std(self) -> jax.Array:
    return jnp.sqrt(self.variance[...] + self.config.batch_norm_eps)


# For planning without a checkpoint
PRESETS = {'black-forest-labs/FLUX.2-dev/vae': Flux2VAEConfig()}


def load(folder, dtype=jnp.float32) -> Autoencoder:
  """From a diffusers folder (config.json and *.safetensors), replicated over the mesh in context."""
  folder = pathlib.Path(folder)
  path = folder / 'config.json'
  with json_file.named(path):
    config = Flux2VAEConfig.from_json(json_file.read(path))
  return convert.load(lambda: Autoencoder(config, dtype, rngs=nnx.Rngs(0)), safetensors_io.read(folder), RULES, {},
                      ignore=COUNT)


def save(autoencoder: Autoencoder, folder) -> None:
  """Writes the folder that diffusers' AutoencoderKLFlux2 and `load` read; all processes call it together."""
  convert.save(autoencoder, RULES, {}, folder, autoencoder.config.to_json(), stem=vae.STEM)


RULES = (*((torch, f'unscaled/{ours}', pattern) for torch, ours, pattern in vae.RULES),
         (r'bn\.running_mean', 'mean', 'c -> c'), (r'bn\.running_var', 'variance', 'c -> c'))
