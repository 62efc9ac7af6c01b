"""PackedImages for Qwen3-VL: resized to whole squares of patches within a range of pixels, then cut into flat patches.

Gives what `Qwen2VLImageProcessor` of transformers gives (its Pillow version, bit for bit but for float rounding).
"""

import dataclasses
import math

import numpy as np
from PIL import Image

from unifusion_jax.errors import UserError
from unifusion_jax.models.qwen3_vl import PackedImages


@dataclasses.dataclass(frozen=True)
class PixelConfig:
  """A preprocessor_config.json; the defaults are Qwen3-VL's."""
  min_pixels: int = 65536  # of the resized image
  max_pixels: int = 16777216
  patch: int = 16
  frames: int = 2
  merge: int = 2
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)

  @classmethod
  def from_json(cls, config: dict) -> 'PixelConfig':
    """From preprocessor_config.json, with its limits under `size` or, in older ones, as min_pixels and max_pixels."""
    size = config.get('size') or {}
    limits = [size.get(new) or config.get(old)
              for new, old in (('shortest_edge', 'min_pixels'), ('longest_edge', 'max_pixels'))]
    if None in limits:
      raise UserError(f'preprocessor_config.json has size={size}: wanted its shortest_edge and longest_edge, the '
                       'least and the most pixels of a resized image')
    return cls(*limits, config['patch_size'], config['temporal_patch_size'], config['merge_size'],
               tuple(config['image_mean']), tuple(config['image_std']))


def size_of(height: int, width: int, config: PixelConfig) -> tuple[int, int]:
  """(height, width) in pixels that an image is resized to: the nearest whole squares of patches within the limits."""
  unit = config.patch * config.merge
  if max(height, width) > 200 * min(height, width):
    raise UserError(f'an image of {width} x {height} pixels is more than 200 times as long as it is wide: crop it')
  y, x = round(height / unit) * unit, round(width / unit) * unit
  if y * x > config.max_pixels:
    shrink = math.sqrt(height * width / config.max_pixels)
    y, x = (max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width))
  elif y * x < config.min_pixels:
    grow = math.sqrt(config.min_pixels / (height * width))
    y, x = (math.ceil(side * grow / unit) * unit for side in (height, width))
  return y, x


def patches(image: np.ndarray, config: PixelConfig) -> tuple[np.ndarray, tuple[int, int]]:
  """uint8 RGB [y x 3] -> (normalised patches [p c] f32, (rows, columns) of patches with rows * columns = p).

  Patches come square by square of merge x merge; a patch holds its channels, each with its frames (which are equal).
  """
  y, x = size_of(*image.shape[:2], config)
  n, m = config.patch, config.merge
  resized = np.asarray(Image.fromarray(image).resize((x, y), Image.Resampling.BICUBIC))
  normalised = (resized.astype(np.float32) / 255 - np.float32(config.mean)) / np.float32(config.std)
  cut = normalised.reshape(y // n // m, m, n, x // n // m, m, n, 3).transpose(0, 3, 1, 4, 6, 2, 5)
  cut = np.repeat(cut.reshape(-1, 3, 1, n * n), config.frames, axis=2)
  return cut.reshape(len(cut), -1), (y // n, x // n)


def pack(images: list[np.ndarray], config: PixelConfig, room: int, count: int) -> PackedImages:
  """One example's images (uint8 RGB), laid end to end: patches [room c] f32, grids [count 2] int32, zeros after them.

  ValueError when they are more than `count` images or `room` patches.
  """
  packed = PackedImages(np.zeros((room, 3 * config.frames * config.patch ** 2), np.float32), np.zeros((count, 2), np.int32))
  cut = [patches(image, config) for image in images]
  total = sum(len(each) for each, _ in cut)
  if len(cut) > count or total > room:
    raise UserError(f'{len(cut)} images of {total} patches do not fit {count} images of {room} patches: give more '
                     'room, lower max_pixels or show fewer')
  if cut:
    packed.patches[:total] = np.concatenate([each for each, _ in cut])
    packed.grids[:len(cut)] = [grid for _, grid in cut]
  return packed
