"""Image processors: the arrays that each VLM's vision tower takes of an image, and its number of image tokens.

An image processor has
  image_tokens: the template's text before an image, for each of its tokens, and after it.
  markers: the usual number of ids of the first and the last of these texts.
  max_tokens: the most image tokens of one reference.
  preprocess(references, count) -> (arrays of one example, number of image tokens of each reference). The arrays are
    padded to `count` references, so that every example of a batch has one shape; None pads to a power of two. They are
    None if there are neither images nor a count.
  spec(references) -> shapes of these arrays.
Pixels stay uint8: the model normalises them (`vision.mean`, `vision.std` of its configuration).
"""

import dataclasses
import math
import os
import pathlib

import jax
import numpy as np
from PIL import Image

from unifusion_jax import json_file, verifi
from unifusion_jax.data import imaging
from unifusion_jax.errors import BrokenRecord, UserError
from unifusion_jax.models import internvl, qwen3_vl, t5
from unifusion_jax.weights import encoders

TILE = 448  # pixels on a side of InternVL's tiles, the unit of `tiles` for models that do not cut


@dataclasses.dataclass(frozen=True)
class TiledImages:
  """InternVL: square tiles uint8 [r y x 3], with a thumbnail of the image when there are several."""
  tile: int    # pixels on a side
  tokens: int  # image tokens of a tile
  tiles: int   # at most, without the thumbnail
  image_tokens = ('<img>', '<IMG_CONTEXT>', '</img>\n')
  markers = 3

  @property
  def max_tokens(self) -> int:
    return self._most * self.tokens

  @property
  def _most(self) -> int:
    return self.tiles + (self.tiles > 1)

  def preprocess(self, references, count: int | None = None):
    cut = [imaging.tiles(imaging.read(reference), self.tile, self.tiles) for reference in references]
    counts = tuple(len(tiles) * self.tokens for tiles in cut)
    if not (count or cut):
      return None, ()
    tiles = np.concatenate(cut or [np.zeros((0, self.tile, self.tile, 3), np.uint8)])
    # Without a count, a power of two: few shapes to compile
    missing = (1 << (len(tiles) - 1).bit_length() if count is None else count * self._most) - len(tiles)
    return np.pad(tiles, ((0, missing), (0, 0), (0, 0), (0, 0))), counts

  def spec(self, references: int):
    return jax.ShapeDtypeStruct((references * self._most, self.tile, self.tile, 3), np.uint8)


@dataclasses.dataclass(frozen=True)
class PixelLimits:
  """The sizes of Qwen3-VL's preprocessor_config.json; the defaults are those of the public checkpoints."""
  min_pixels: int = 65536  # of the resized image
  max_pixels: int = 16777216
  patch: int = 16
  frames: int = 2
  merge: int = 2

  @classmethod
  def from_json(cls, config: dict) -> 'PixelLimits':
    """From preprocessor_config.json, with its limits under `size` or, in older ones, as min_pixels and max_pixels."""
    size = config.get('size') or {}
    limits = [size.get(new) or config.get(old)
              for new, old in (('shortest_edge', 'min_pixels'), ('longest_edge', 'max_pixels'))]
    if None in limits:
      raise UserError(f'preprocessor_config.json has size={size}: wanted its shortest_edge and longest_edge, the '
                      'least and the most pixels of a resized image')
    return cls(*limits, config['patch_size'], config['temporal_patch_size'], config['merge_size'])

  def resized(self, height: int, width: int) -> tuple[int, int]:
    """(height, width) that an image is resized to: the nearest whole squares of patches within the limits."""
    unit = self.patch * self.merge
    if max(height, width) > 200 * min(height, width):
      raise BrokenRecord(f'an image of {width} x {height} pixels is more than 200 times as long as wide: crop it')
    y, x = round(height / unit) * unit, round(width / unit) * unit
    if y * x > self.max_pixels:
      shrink = math.sqrt(height * width / self.max_pixels)
      y, x = (max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width))
    elif y * x < self.min_pixels:
      grow = math.sqrt(self.min_pixels / (height * width))
      y, x = (math.ceil(side * grow / unit) * unit for side in (height, width))
    return y, x

  @property
  def patch_size(self) -> int:
    """Values in a patch."""
    return 3 * self.frames * self.patch ** 2

  def patches(self, image: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """uint8 RGB [y x 3] -> (patches uint8 [p c], (rows, columns) of patches with rows * columns = p).

    As transformers' Qwen2VLImageProcessor (its Pillow version) before it normalises. Patches come square by square of
    merge x merge; a patch holds its channels, each with its frames (which are equal).
    """
    y, x = self.resized(*image.shape[:2])
    n, m = self.patch, self.merge
    pixels = np.asarray(Image.fromarray(image).resize((x, y), Image.Resampling.BICUBIC))
    cut = pixels.reshape(y // n // m, m, n, x // n // m, m, n, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return np.repeat(cut.reshape(-1, 3, 1, n * n), self.frames, axis=2).reshape(-1, self.patch_size), (y // n, x // n)


@dataclasses.dataclass(frozen=True)
class PackedPatches:
  """Qwen3-VL: patches end to end with their grids, of at most as many pixels as `tiles` of InternVL's tiles."""
  pixels: PixelLimits
  tiles: int
  image_tokens = ('<|vision_start|>', '<|image_pad|>', '<|vision_end|>')
  markers = 2

  @property
  def max_tokens(self) -> int:
    return self._limits.max_pixels // (self.pixels.patch * self.pixels.merge) ** 2

  @property
  def _limits(self) -> PixelLimits:
    pixels = self.pixels
    most = max(pixels.min_pixels, min(pixels.max_pixels, self.tiles * TILE ** 2))
    return dataclasses.replace(pixels, max_pixels=most)

  def preprocess(self, references, count: int | None = None):
    if not (count or references):
      return None, ()
    images, merged = [imaging.read(reference) for reference in references], self.pixels.merge ** 2
    cut = [self._limits.patches(image) for image in images]
    for image, (patches, _) in zip(images, cut):
      if count is not None and len(patches) > self._patches(1):
        raise BrokenRecord(f'an image of {image.shape[1]}x{image.shape[0]} is too long and narrow to be shown in '
                           f'{self.max_tokens} tokens')
    total = sum(len(patches) for patches, _ in cut)
    # Without a count, a power of two: few shapes to compile
    space = self._patches(count) if count is not None else 1 << (total - 1).bit_length()
    packed = qwen3_vl.PackedImages(np.zeros((space, self.pixels.patch_size), np.uint8),
                                   np.zeros((len(references) if count is None else count, 2), np.int32))
    if cut:
      packed.patches[:total] = np.concatenate([patches for patches, _ in cut])
      packed.grids[:len(cut)] = [grid for _, grid in cut]
    return packed, tuple(len(patches) // merged for patches, _ in cut)

  def _patches(self, references: int) -> int:
    return references * self.max_tokens * self.pixels.merge ** 2

  def spec(self, references: int):
    return qwen3_vl.PackedImages(
        jax.ShapeDtypeStruct((self._patches(references), self.pixels.patch_size), np.uint8),
        jax.ShapeDtypeStruct((references, 2), np.int32))


@dataclasses.dataclass(frozen=True)
class NoImages:
  """A language model, which reads text alone."""
  image_tokens = None
  markers = 0
  max_tokens = 0

  def preprocess(self, references, count: int | None = None):
    if count or references:
      raise UserError('this model reads text alone: leave the images out, or take a VLM')
    return None, ()

  def spec(self, references: int):
    return None


ImageProcessor = TiledImages | PackedPatches | NoImages


def for_model(config: encoders.Config, tiles: int, folder: str | os.PathLike | None = None) -> ImageProcessor:
  """The image processor of a VLM.

  folder: of its preprocessor_config.json, which must be there: nothing is guessed. None takes the values of the
  family's public checkpoints. UserError for an encoder that writes no text.
  """
  match config:
    case internvl.InternVLConfig():
      if folder is not None:
        encoders.preprocessor(folder)
      return TiledImages(config.vision.tile, config.tile_tokens, tiles)
    case qwen3_vl.Qwen3VLConfig():
      if folder is None:
        vision = config.vision
        return PackedPatches(PixelLimits(patch=vision.patch, frames=vision.frames, merge=vision.merge), tiles)
      with json_file.named(pathlib.Path(folder) / 'preprocessor_config.json'):
        return PackedPatches(PixelLimits.from_json(encoders.preprocessor(folder)), tiles)
    case t5.T5Config():
      raise UserError(f'{folder} is an encoder, which writes nothing: take a VLM or a causal language model')
  return NoImages()


def check(config: encoders.Config, chat: verifi.Chat) -> None:
  """UserError if a VLM's tokenizer and its config.json disagree on the id of image tokens."""
  wanted = getattr(config, 'image_token_id', None)
  if chat.image_id != wanted:
    raise UserError(f'{chat.folder}: the image token has the id {chat.image_id} in its tokenizer and {wanted} in its '
                    'config.json: the folder mixes files of different checkpoints')
