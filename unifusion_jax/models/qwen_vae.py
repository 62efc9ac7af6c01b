"""The autoencoder of Qwen-Image and Krea 2, as diffusers' AutoencoderKLQwenImage lays it out, for single images.

It is one of video, of Wan 2.1's build. Its convolutions are causal: time is padded with zeros in front, and the steps
between frame rates pass over the first frame. So of one frame a convolution is the last temporal slice of its kernel,
the only part that is read. Norms are over channels, at each place alone; the middle block is vae.py's.
"""

from collections.abc import Mapping
import dataclasses
import functools
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax import json_file, ranges
from unifusion_jax.errors import UserError
from unifusion_jax.models import layers, vae
from unifusion_jax.ranges import Range
from unifusion_jax.weights import convert, safetensors_io

EPS = 1e-24  # of mean squares: diffusers keeps a norm above 1e-12
FIXED = {'attn_scales': [], 'input_channels': 3}  # the only values that are implemented
UNREAD = ('dropout', 'temperal_downsample')  # of training, and of the frame rate
SIZES = {'n': 3}  # of letters of the rules: queries, keys and values
TIME = (r'.*\.time_conv\.(weight|bias)',)  # tensors that no first frame meets


@dataclasses.dataclass(unsafe_hash=True)  # not frozen, as VAEConfig
class QwenVAEConfig:
  """Sizes by diffusers' names; the defaults are the public model's."""
  base_dim: int = 96
  z_dim: int = 16
  dim_mult: tuple[int, ...] = (1, 2, 4, 4)
  num_res_blocks: int = 2
  latents_mean: tuple[float, ...] = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                                     0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
  latents_std: tuple[float, ...] = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                                    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)

  use_quant_conv = use_post_quant_conv = True

  def problems(self, prefix: str = '') -> list[str]:
    """Sizes that cannot be, a sentence each."""
    width = Range(1, 10 ** 4)
    wrong = ranges.problems(self, prefix, base_dim=width, z_dim=width, dim_mult=Range(1, 100),
                            num_res_blocks=Range(1, 100), latents_mean=Range(-10 ** 6, 10 ** 6),
                            latents_std=Range(above=0, most=10 ** 6))
    if not 1 <= len(self.dim_mult) <= 10:
      wrong.append(f'{prefix}dim_mult={self.dim_mult} must be from 1 to 10 numbers')
    if not wrong and any(width % 2 for width in self.widths[1:]):
      wrong.append(f'{prefix}base_dim={self.base_dim} times {prefix}dim_mult={self.dim_mult} must be even widths')
    for name in ('latents_mean', 'latents_std'):
      if not wrong and len(getattr(self, name)) != self.z_dim:
        wrong.append(f'{prefix}{name} has {len(getattr(self, name))} numbers and must have {prefix}z_dim={self.z_dim}')
    return wrong

  def undivided(self, mesh: Mapping[str, int], prefix: str = '') -> list[str]:
    """Sizes that a mesh does not divide: none, for every device holds the whole autoencoder."""
    del mesh, prefix
    return []

  @property
  def widths(self) -> tuple[int, ...]:
    """Channels of each level, an image's own resolution first."""
    return tuple(self.base_dim * factor for factor in self.dim_mult)

  @property
  def downsampling(self) -> int:
    """Pixels per latent, along y and along x."""
    return 2 ** (len(self.dim_mult) - 1)

  @property
  def channels(self) -> int:
    """Channels of a latent."""
    return self.z_dim

  @property
  def first_width(self) -> int:
    """Channels of the encoder at an image's own resolution."""
    return self.widths[0]

  def halves(self, dtype, *, rngs: nnx.Rngs) -> tuple[nnx.Module, nnx.Module]:
    """(encoder, decoder)."""
    return Encoder(self, dtype, rngs=rngs), Decoder(self, dtype, rngs=rngs)

  def scaled(self, z: jax.Array) -> jax.Array:
    """The encoder's latents at about zero mean and unit variance."""
    return (z - np.array(self.latents_mean, np.float32)) / np.array(self.latents_std, np.float32)

  def unscaled(self, z: jax.Array) -> jax.Array:
    """The inverse of `scaled`."""
    return z * np.array(self.latents_std, np.float32) + np.array(self.latents_mean, np.float32)

  @classmethod
  def from_json(cls, config: dict) -> 'QwenVAEConfig':
    """From the dict of a diffusers config.json; UserError for settings that are not implemented."""
    config = {k: v for k, v in config.items() if not k.startswith('_') and k not in UNREAD}
    for key, value in FIXED.items():
      if (given := config.pop(key, value)) != value:
        raise UserError(f'VAE config: {key} is {given}; only {value} is implemented')
    unknown = config.keys() - {field.name for field in dataclasses.fields(cls)}
    if unknown:
      raise UserError(f'VAE config: {sorted(unknown)} not known; this reads the config of AutoencoderKLQwenImage')
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in config.items()})


class RMSNorm(nnx.Module):
  """Root mean square over channels, at each place alone."""

  def __init__(self, width: int, dtype):
    self.scale = layers.constant(1.0, (width,), dtype=dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    return layers.rms_norm(x, self.scale, EPS)


class Encoder(nnx.Module):
  """Residual blocks, with a convolution that halves y and x after each level but the last, in one list."""

  def __init__(self, config: QwenVAEConfig, dtype, *, rngs: nnx.Rngs):
    widths, norm = config.widths, functools.partial(RMSNorm, dtype=dtype)
    self.conv_in = vae.Conv(3, config.base_dim, 3, dtype, rngs=rngs)
    blocks, inputs = [], config.base_dim
    for i, width in enumerate(widths):
      for _ in range(config.num_res_blocks):
        blocks.append(vae.ResBlock(inputs, width, norm, dtype, rngs=rngs))
        inputs = width
      if i < len(widths) - 1:
        blocks.append(vae.Conv(width, width, 3, dtype, rngs=rngs))
    self.blocks = nnx.List(blocks)
    self.middle = vae.Middle(widths[-1], True, norm, dtype, rngs=rngs)
    self.norm_out = norm(widths[-1])
    self.conv_out = vae.Conv(widths[-1], 2 * config.z_dim, 3, dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.conv_in(x)
    for block in self.blocks:
      x = block(x, stride=2, padding=(0, 1)) if isinstance(block, vae.Conv) else block(x)
    return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x))))


class Decoder(nnx.Module):
  """vae.Decoder with other widths: each step to a finer level halves its channels."""

  def __init__(self, config: QwenVAEConfig, dtype, *, rngs: nnx.Rngs):
    widths, norm = config.widths[::-1], functools.partial(RMSNorm, dtype=dtype)
    following = [width // 2 for width in widths[:-1]]
    self.conv_in = vae.Conv(config.z_dim, widths[0], 3, dtype, rngs=rngs)
    self.middle = vae.Middle(widths[0], True, norm, dtype, rngs=rngs)
    self.levels = nnx.List([
        vae.Level(inputs, width, after, config.num_res_blocks + 1, norm, dtype, rngs=rngs)
        for inputs, width, after in zip((widths[0], *following), widths, (*following, None))])
    self.norm_out = norm(widths[-1])
    self.conv_out = vae.Conv(widths[-1], 3, 3, dtype, rngs=rngs)

  __call__ = vae.Decoder.__call__


# For planning without a checkpoint
PRESETS = {name: QwenVAEConfig() for name in ('krea/Krea-2-Raw/vae', 'krea/Krea-2-Turbo/vae', 'Qwen/Qwen-Image/vae')}


class LastSlice:
  """A causal kernel [o i t y x] without its time axis: the slice that the newest frame meets. Read as it is indexed."""

  def __init__(self, kernel):
    self._kernel, self._last = kernel, kernel.shape[2] - 1
    self.shape, self.dtype = (*kernel.shape[:2], *kernel.shape[3:]), kernel.dtype
    self.path = getattr(kernel, 'path', 'the checkpoint')

  def __getitem__(self, index: tuple[slice, ...]):
    outputs, inputs, *place = index
    return self._kernel[(outputs, inputs, slice(self._last, self._last + 1), *place)][:, :, 0]


def load(folder, dtype=jnp.float32) -> vae.Autoencoder:
  """From a diffusers folder (config.json and *.safetensors), replicated over the mesh in context."""
  folder = pathlib.Path(folder)
  path = folder / 'config.json'
  with json_file.named(path):
    config = QwenVAEConfig.from_json(json_file.read(path))
  tensors = {name: LastSlice(tensor) if len(tensor.shape) == 5 else tensor
             for name, tensor in safetensors_io.read(folder).items()}
  return convert.load(lambda: vae.Autoencoder(config, dtype, rngs=nnx.Rngs(0)), tensors, RULES, SIZES, ignore=TIME)


def _rules():
  """Of kernels as LastSlice has them; what `convert.export` gives are these slices."""
  def conv(torch, ours):
    return (torch + r'\.weight', ours + '/kernel', 'o i y x -> y x i o'), (torch + r'\.bias', ours + '/bias', 'o -> o')

  def norm(torch, ours, places='1 1 1'):
    return ((torch + r'\.gamma', ours + '/scale', f'c {places} -> c'),)

  def resnet(torch, ours):
    return (*norm(torch + r'\.norm1', ours + '/norm1'), *conv(torch + r'\.conv1', ours + '/conv1'),
            *norm(torch + r'\.norm2', ours + '/norm2'), *conv(torch + r'\.conv2', ours + '/conv2'),
            *conv(torch + r'\.conv_shortcut', ours + '/shortcut'))

  def middle(half):
    attention, ours = half + r'\.mid_block\.attentions\.0\.', f'{half}/middle/attention/'
    parts = [rule for i, part in enumerate('qkv')
             for rule in ((attention + r'to_qkv\.weight', ours + part + '/kernel', '(n e) d 1 1 -> d e', {'n': i}),
                          (attention + r'to_qkv\.bias', ours + part + '/bias', '(n e) -> e', {'n': i}))]
    return (*resnet(half + r'\.mid_block\.resnets\.0', f'{half}/middle/before'),
            *norm(attention + 'norm', ours + 'norm', '1 1'), *parts,
            (attention + r'proj\.weight', ours + 'out/kernel', 'e d 1 1 -> d e'),
            (attention + r'proj\.bias', ours + 'out/bias', 'e -> e'),
            *resnet(half + r'\.mid_block\.resnets\.1', f'{half}/middle/after'))

  def ends(half):
    return (*conv(half + r'\.conv_in', f'{half}/conv_in'), *middle(half),
            *norm(half + r'\.norm_out', f'{half}/norm_out'), *conv(half + r'\.conv_out', f'{half}/conv_out'))

  down, up = r'encoder\.down_blocks\.(\d+)', r'decoder\.up_blocks\.(\d+)'
  return (*ends('encoder'), *resnet(down, r'encoder/blocks/\1'), *conv(down + r'\.resample\.1', r'encoder/blocks/\1'),
          *ends('decoder'), *resnet(up + r'\.resnets\.(\d+)', r'decoder/levels/\1/resnets/\2'),
          *conv(up + r'\.upsamplers\.0\.resample\.1', r'decoder/levels/\1/resample'),
          *conv('quant_conv', 'quant_conv'), *conv('post_quant_conv', 'post_quant_conv'))


RULES = _rules()
