"""The autoencoder of latent diffusion (arXiv 2112.10752) as diffusers' AutoencoderKL lays it out.

Images and latents are [b y x c], batch sharded, parameters replicated. Every level but the last halves y and x, so
four levels make latents of an eighth. Computes in the dtype of its weights, with group norm statistics in f32.

Not nnx.Conv and nnx.Linear, which run sharded as well: they take a random key for their zero biases too, so every later
layer would start from other values. Not nnx.GroupNorm: see `GroupNorm`. Convolutions are no `layers.einsum`, so int8
never reaches them.
"""

from collections.abc import Mapping
import dataclasses
import functools
import math
import pathlib
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from unifusion_jax import json_file, ranges
from unifusion_jax.errors import UserError
from unifusion_jax.models import layers, tiles
from unifusion_jax.models.attention import attention
from unifusion_jax.ranges import Range
from unifusion_jax.sharding import spread
from unifusion_jax.weights import convert, safetensors_io

STEM = 'diffusion_pytorch_model'  # of the files of weights
EPS = 1e-6  # of every norm, in diffusers too
ENCODER_BLOCK, DECODER_BLOCK = 'DownEncoderBlock2D', 'UpDecoderBlock2D'
FIXED = {'act_fn': 'silu', 'latents_mean': None, 'latents_std': None}  # the only values that are implemented
UNREAD = ('sample_size', 'force_upcast')  # diffusers' own tiling and precision
OLD_NAMES = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}  # of attention before 2023


@dataclasses.dataclass(unsafe_hash=True)  # not frozen: recipes set fields of their model; modules hold a copy
class VAEConfig:
  in_channels: int = 3
  out_channels: int = 3
  block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
  layers_per_block: int = 2
  latent_channels: int = 16
  norm_num_groups: int = 32
  mid_block_add_attention: bool = True
  scaling_factor: float = 0.18215
  shift_factor: float | None = None
  use_quant_conv: bool = False
  use_post_quant_conv: bool = False

  def problems(self, prefix: str = '') -> list[str]:
    """Sizes that cannot be, a sentence each."""
    channels, widths = Range(1, 10 ** 4), self.block_out_channels
    wrong = ranges.problems(
        self, prefix, in_channels=channels, out_channels=channels, block_out_channels=channels,
        latent_channels=channels, layers_per_block=Range(1, 100), norm_num_groups=channels,
        scaling_factor=Range(above=0, most=10 ** 6), shift_factor=Range(-10 ** 6, 10 ** 6))
    if not 1 <= len(widths) <= 10:
      wrong.append(f'{prefix}block_out_channels={widths} must be from 1 to 10 numbers')
    if not wrong and any(width % self.norm_num_groups for width in widths):
      wrong.append(f'{prefix}norm_num_groups={self.norm_num_groups} must divide {prefix}block_out_channels={widths}')
    return wrong

  def undivided(self, mesh: Mapping[str, int], prefix: str = '') -> list[str]:
    """Sizes that a mesh does not divide: none, for every device holds the whole autoencoder."""
    del mesh, prefix
    return []

  @property
  def downsampling(self) -> int:
    """Pixels per latent, along y and along x."""
    return 2 ** (len(self.block_out_channels) - 1)

  @property
  def channels(self) -> int:
    """Channels of a latent."""
    return self.latent_channels

  @property
  def first_width(self) -> int:
    """Channels of the encoder at an image's own resolution."""
    return self.block_out_channels[0]

  def halves(self, dtype, *, rngs: nnx.Rngs) -> tuple[nnx.Module, nnx.Module]:
    """(encoder, decoder)."""
    if bad := [c for c in self.block_out_channels if c % self.norm_num_groups]:
      raise UserError(f'VAE config: block_out_channels {bad} do not divide into norm_num_groups='
                      f'{self.norm_num_groups} groups')
    return Encoder(self, dtype, rngs=rngs), Decoder(self, dtype, rngs=rngs)

  def scaled(self, z: jax.Array) -> jax.Array:
    """The encoder's latents at about unit variance."""
    return (z - (self.shift_factor or 0.0)) * self.scaling_factor

  def unscaled(self, z: jax.Array) -> jax.Array:
    """The inverse of `scaled`."""
    return z / self.scaling_factor + (self.shift_factor or 0.0)

  @classmethod
  def from_json(cls, config: dict) -> 'VAEConfig':
    """From the dict of a diffusers config.json; UserError for settings that are not implemented."""
    config = {k: v for k, v in config.items() if not k.startswith('_') and k not in UNREAD}
    # diffusers' own defaults for absent keys, where they differ from ours.
    config = {'block_out_channels': (64,), 'layers_per_block': 1, 'latent_channels': 4, 'use_quant_conv': True,
              'use_post_quant_conv': True, 'down_block_types': (ENCODER_BLOCK,), 'up_block_types': (DECODER_BLOCK,)
              } | config
    depth = len(config['block_out_channels'])
    fixed = FIXED | {'down_block_types': (ENCODER_BLOCK,) * depth, 'up_block_types': (DECODER_BLOCK,) * depth}
    for key, value in fixed.items():
      given = config.pop(key, value)
      if (tuple(given) if isinstance(given, list) else given) != value:
        raise UserError(f'VAE config: {key} is {given}; only {value} is implemented')
    unknown = config.keys() - {field.name for field in dataclasses.fields(cls)}
    if unknown:
      raise UserError(f'VAE config: {sorted(unknown)} not known; this reads the config of diffusers AutoencoderKL')
    return cls(**config | {'block_out_channels': tuple(config['block_out_channels'])})

  def to_json(self) -> dict:
    """The dict of a diffusers config.json."""
    depth = len(self.block_out_channels)
    return {'_class_name': 'AutoencoderKL', 'act_fn': 'silu', 'down_block_types': [ENCODER_BLOCK] * depth,
            'up_block_types': [DECODER_BLOCK] * depth} | dataclasses.asdict(self)


class Conv(nnx.Module):
  """A square convolution with bias; `padding` is (before, after) along y and x alike."""

  def __init__(self, inputs: int, outputs: int, size: int, dtype, *, rngs: nnx.Rngs):
    self.kernel = layers.weight(rngs, (size, size, inputs, outputs), (), contract=None, dtype=dtype,
                                std=(size * size * inputs) ** -0.5)
    self.bias = layers.constant(0.0, (outputs,), dtype=dtype)

  def __call__(self, x: jax.Array, stride: int = 1, padding: tuple[int, int] | None = None) -> jax.Array:
    size = self.kernel.shape[0]
    x = jax.lax.conv_general_dilated(x, self.kernel[...], (stride, stride), (padding or (size // 2, size // 2),) * 2,
                                     dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    return x + self.bias[...]


class GroupNorm(nnx.Module):

  def __init__(self, width: int, groups: int, dtype):
    self.scale = layers.constant(1.0, (width,), dtype=dtype)
    self.bias = layers.constant(0.0, (width,), dtype=dtype)
    self.groups = groups

  def __call__(self, x: jax.Array, moments=None) -> jax.Array:
    """x [b y x c] normalised by group, from the moments of its channels and with one multiply-add: a tenth of the
    time of reshaping to groups on CPU. `moments` as in `Decoder.fine`."""
    z = x.astype(jnp.float32)
    mean, variance = (moments or tiles.channel_moments)(z)
    group_mean = self._per_group(mean)
    group_variance = self._per_group(variance + (mean - group_mean) ** 2)
    gain = self.scale[...].astype(jnp.float32) * jax.lax.rsqrt(group_variance + EPS)
    offset = self.bias[...].astype(jnp.float32) - group_mean * gain
    return (z * gain[:, None, None] + offset[:, None, None]).astype(x.dtype)

  def _per_group(self, channels: jax.Array) -> jax.Array:
    """[b c] -> [b c]: every channel's group mean."""
    b, c = channels.shape
    return jnp.repeat(jnp.mean(channels.reshape(b, self.groups, -1), axis=-1), c // self.groups, axis=1)


class ResBlock(nnx.Module):

  def __init__(self, inputs: int, outputs: int, norm, dtype, *, rngs: nnx.Rngs):
    """norm: `norm(width) -> module`, here as in the blocks below."""
    self.norm1 = norm(inputs)
    self.conv1 = Conv(inputs, outputs, 3, dtype, rngs=rngs)
    self.norm2 = norm(outputs)
    self.conv2 = Conv(outputs, outputs, 3, dtype, rngs=rngs)
    self.shortcut = Conv(inputs, outputs, 1, dtype, rngs=rngs) if inputs != outputs else None

  def __call__(self, x: jax.Array, moments=None) -> jax.Array:
    y = self.conv1(jax.nn.silu(self.norm1(x, moments)))
    y = self.conv2(jax.nn.silu(self.norm2(y, moments)))
    return y + (x if self.shortcut is None else self.shortcut(x))


class Linear(nnx.Module):

  def __init__(self, width: int, dtype, *, rngs: nnx.Rngs):
    self.kernel = layers.weight(rngs, (width, width), (), contract=1, dtype=dtype)
    self.bias = layers.constant(0.0, (width,), dtype=dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    return layers.einsum('bsd,de->bse', x, self.kernel) + self.bias[...]


class Attention(nnx.Module):
  """One head over all positions, residual."""

  def __init__(self, width: int, norm, dtype, *, rngs: nnx.Rngs):
    self.norm = norm(width)
    self.q, self.k, self.v, self.out = (Linear(width, dtype, rngs=rngs) for _ in range(4))

  def __call__(self, x: jax.Array) -> jax.Array:
    y = self.norm(x).reshape(x.shape[0], -1, x.shape[-1])
    q, k, v = (part(y)[:, :, None] for part in (self.q, self.k, self.v))
    return x + self.out(attention(q, k, v)[:, :, 0]).reshape(x.shape)


class Middle(nnx.Module):

  def __init__(self, width: int, attends: bool, norm, dtype, *, rngs: nnx.Rngs):
    self.before = ResBlock(width, width, norm, dtype, rngs=rngs)
    self.attention = Attention(width, norm, dtype, rngs=rngs) if attends else None
    self.after = ResBlock(width, width, norm, dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.before(x)
    x = x if self.attention is None else self.attention(x)
    return self.after(x)


class Level(nnx.Module):
  """Residual blocks at one resolution, and the convolution to the `following` width of the next (None: the last)."""

  def __init__(self, inputs: int, outputs: int, following: int | None, depth: int, norm, dtype, *, rngs: nnx.Rngs):
    self.resnets = nnx.List([ResBlock(inputs if i == 0 else outputs, outputs, norm, dtype, rngs=rngs)
                             for i in range(depth)])
    self.resample: Any = None if following is None else Conv(outputs, following, 3, dtype, rngs=rngs)

  def __call__(self, x: jax.Array, moments=None) -> jax.Array:
    for resnet in self.resnets:
      x = resnet(x, moments)
    return x


class Encoder(nnx.Module):

  def __init__(self, config: VAEConfig, dtype, *, rngs: nnx.Rngs):
    widths, norm = config.block_out_channels, functools.partial(GroupNorm, groups=config.norm_num_groups, dtype=dtype)
    self.conv_in = Conv(config.in_channels, widths[0], 3, dtype, rngs=rngs)
    self.levels = nnx.List([
        Level(before, width, following, config.layers_per_block, norm, dtype, rngs=rngs)
        for before, width, following in zip((widths[0], *widths), widths, (*widths[:-1], None))])
    self.middle = Middle(widths[-1], config.mid_block_add_attention, norm, dtype, rngs=rngs)
    self.norm_out = norm(widths[-1])
    self.conv_out = Conv(widths[-1], 2 * config.latent_channels, 3, dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.conv_in(x)
    for level in self.levels:
      x = level(x)
      if level.resample is not None:
        x = level.resample(x, stride=2, padding=(0, 1))
    return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x))))


class Decoder(nnx.Module):

  def __init__(self, config: VAEConfig, dtype, *, rngs: nnx.Rngs):
    widths = config.block_out_channels[::-1]
    norm = functools.partial(GroupNorm, groups=config.norm_num_groups, dtype=dtype)
    self.conv_in = Conv(config.latent_channels, widths[0], 3, dtype, rngs=rngs)
    self.middle = Middle(widths[0], config.mid_block_add_attention, norm, dtype, rngs=rngs)
    self.levels = nnx.List([
        Level(before, width, following, config.layers_per_block + 1, norm, dtype, rngs=rngs)
        for before, width, following in zip((widths[0], *widths), widths, (*widths[:-1], None))])
    self.norm_out = norm(widths[-1])
    self.conv_out = Conv(widths[-1], config.out_channels, 3, dtype, rngs=rngs)

  def __call__(self, z: jax.Array) -> jax.Array:
    return self.fine(self.coarse(z))

  @property
  def reach(self) -> int:
    """Latents on each side of a place that `fine` reads."""
    places = sum((1 + 2 * len(level.resnets)) / 2 ** i for i, level in enumerate(self.levels) if i)
    return math.ceil(places + 1 / 2 ** (len(self.levels) - 1))

  def coarse(self, z: jax.Array) -> jax.Array:
    """What is computed at the resolution of latents, where attention is over all places."""
    return self.levels[0](self.middle(self.conv_in(z)))

  def fine(self, x: jax.Array, moments=None) -> jax.Array:
    """The rest, in which a place is reached by its neighbours alone, and by the moments of norms.

    moments: `moments(x) -> (mean, variance) [b c]`, in place of those of x [b y x c] itself; called by one norm after
      another (`tiles`).
    """
    for level, finer in zip(self.levels, self.levels[1:]):
      x = finer(level.resample(double(x)), moments)
    return self.conv_out(jax.nn.silu(self.norm_out(x, moments)))


def double(x: jax.Array) -> jax.Array:
  """[b y x c] -> [b 2y 2x c], every pixel as a square of four. One broadcast: its gradient is one sum, on CPU too."""
  b, y, x_, c = x.shape
  squares = jnp.broadcast_to(x[:, :, None, :, None], (b, y, 2, x_, 2, c))
  return jax.lax.reshape(squares, (b, 2 * y, 2 * x_, c), out_sharding=layers.rows_of(x))


class Autoencoder(nnx.Module):
  """Images [b y x 3] <-> latents [b y x c]. Another class of it has another configuration (`qwen_vae`)."""

  def __init__(self, config, dtype=jnp.float32, *, rngs: nnx.Rngs):
    self.config = dataclasses.replace(config)
    self.encoder, self.decoder = config.halves(dtype, rngs=rngs)
    c = config.channels
    self.quant_conv = Conv(2 * c, 2 * c, 1, dtype, rngs=rngs) if config.use_quant_conv else None
    self.post_quant_conv = Conv(c, c, 1, dtype, rngs=rngs) if config.use_post_quant_conv else None

  @property
  def downsampling(self) -> int:
    """Pixels per latent, along y and along x."""
    return self.config.downsampling

  @property
  def channels(self) -> int:
    """Channels of a latent."""
    return self.config.channels

  def moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images [b y x 3] in [-1, 1] -> (mean, log variance) of the latents [b y/8 x/8 c], unscaled, f32."""
    step = self.downsampling
    if x.shape[1] % step or x.shape[2] % step:
      raise UserError(f'the autoencoder takes images of multiples of {step} pixels, got {x.shape[1]} x {x.shape[2]}')
    h = self.encoder(spread(x.astype(self.encoder.conv_in.kernel.dtype)))
    h = jax.sharding.reshard(h if self.quant_conv is None else self.quant_conv(h), layers.RESIDUAL)
    mean, logvar = jnp.split(h.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)

  def encode(self, x: jax.Array) -> jax.Array:
    """Images [b y x 3] in [-1, 1] -> latents [b y/8 x/8 c] f32: the posterior's mean, scaled to about unit variance."""
    z, _ = self.moments(x)
    return self.config.scaled(z)

  def decode(self, z: jax.Array, tile: int = 0) -> jax.Array:
    """The inverse of encode: latents [b y x c] -> images [b 8y 8x 3] f32, about [-1, 1] and not clipped.

    tile: pixels; an image of more than their square is decoded in `tiles` of at most so many a side. 0: undivided.
    """
    z = self.config.unscaled(z)
    z = spread(z.astype(self.decoder.conv_in.kernel.dtype))
    z = z if self.post_quant_conv is None else self.post_quant_conv(z)
    most = tile // self.downsampling
    divided = tile and z.shape[1] * z.shape[2] > most ** 2
    images = tiles.decode(self.decoder, z, most, self.downsampling) if divided else self.decoder(z)
    return jax.sharding.reshard(images.astype(jnp.float32), layers.RESIDUAL)


FLUX = VAEConfig(scaling_factor=0.3611, shift_factor=0.1159)
SD3 = VAEConfig(scaling_factor=1.5305, shift_factor=0.0609)
# For planning without a checkpoint; `load` goes by the checkpoint's own config.json
PRESETS = {f'black-forest-labs/FLUX.1-{name}/vae': FLUX for name in ('schnell', 'dev')} | {
    f'stabilityai/stable-diffusion-{name}/vae': SD3 for name in ('3-medium-diffusers', '3.5-medium', '3.5-large')}


def load(folder, dtype=jnp.float32) -> Autoencoder:
  """From a diffusers folder (config.json and *.safetensors), replicated over the mesh in context."""
  folder = pathlib.Path(folder)
  path = folder / 'config.json'
  with json_file.named(path):
    config = VAEConfig.from_json(json_file.read(path))
  tensors = {}
  for name, tensor in safetensors_io.read(folder).items():
    *head, part, kind = name.split('.')
    tensors['.'.join([*head, OLD_NAMES.get(part, part), kind])] = tensor
  return convert.load(lambda: Autoencoder(config, dtype, rngs=nnx.Rngs(0)), tensors, RULES, {})


def save(vae: Autoencoder, folder) -> None:
  """Writes the folder that diffusers' AutoencoderKL and `load` read; all processes call it together."""
  convert.save(vae, RULES, {}, folder, vae.config.to_json(), stem=STEM)


def _rules():
  def conv(torch, ours):
    return (torch + r'\.weight', ours + '/kernel', 'o i y x -> y x i o'), (torch + r'\.bias', ours + '/bias', 'o -> o')

  def norm(torch, ours):
    return (torch + r'\.weight', ours + '/scale', 'c -> c'), (torch + r'\.bias', ours + '/bias', 'c -> c')

  def linear(torch, ours):
    return (torch + r'\.weight', ours + '/kernel', 'e d -> d e'), (torch + r'\.bias', ours + '/bias', 'e -> e')

  def resnet(torch, ours):
    return (*norm(torch + r'\.norm1', ours + '/norm1'), *conv(torch + r'\.conv1', ours + '/conv1'),
            *norm(torch + r'\.norm2', ours + '/norm2'), *conv(torch + r'\.conv2', ours + '/conv2'),
            *conv(torch + r'\.conv_shortcut', ours + '/shortcut'))

  def half(torch, levels, resample):
    attention, ours = torch + r'\.mid_block\.attentions\.0\.', f'{torch}/middle/attention/'
    return (*conv(torch + r'\.conv_in', f'{torch}/conv_in'),
            *resnet(rf'{torch}\.{levels}\.(\d+)\.resnets\.(\d+)', rf'{torch}/levels/\1/resnets/\2'),
            *conv(rf'{torch}\.{levels}\.(\d+)\.{resample}\.0\.conv', rf'{torch}/levels/\1/resample'),
            *resnet(torch + r'\.mid_block\.resnets\.0', f'{torch}/middle/before'),
            *norm(attention + 'group_norm', ours + 'norm'), *linear(attention + 'to_q', ours + 'q'),
            *linear(attention + 'to_k', ours + 'k'), *linear(attention + 'to_v', ours + 'v'),
            *linear(attention + r'to_out\.0', ours + 'out'),
            *resnet(torch + r'\.mid_block\.resnets\.1', f'{torch}/middle/after'),
            *norm(torch + r'\.conv_norm_out', f'{torch}/norm_out'), *conv(torch + r'\.conv_out', f'{torch}/conv_out'))

  return (*half('encoder', 'down_blocks', 'downsamplers'), *half('decoder', 'up_blocks', 'upsamplers'),
          *conv('quant_conv', 'quant_conv'), *conv('post_quant_conv', 'post_quant_conv'))


RULES = _rules()
