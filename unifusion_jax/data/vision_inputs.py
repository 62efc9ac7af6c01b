"""How each VLM is shown images: what its vision tower takes, and how many tokens of its prompt that makes.

An image processor answers to
  image_tokens: the template's texts before an image, for each of its tokens, and after it.
  max_tokens: the most image tokens of one reference.
  preprocess(references, room) -> (arrays of one example, the image tokens of each reference). `room` is the number of
    references that the arrays are padded to, so that every example of a batch has one shape; None pads no more than
    the model needs. The arrays are None when nothing is to be seen.
  spec(references) -> the arrays' shapes, for checks without data.
`of` finds the eye of a VLM.
"""

import dataclasses
import json
import pathlib

import jax
import numpy as np

from unifusion_jax import verifi
from unifusion_jax.data import imaging, qwen_patches
from unifusion_jax.data.sources import BrokenRecord
from unifusion_jax.errors import UserError
from unifusion_jax.models import internvl, qwen3_vl, t5
from unifusion_jax.weights import encoders

TILE = 448  # pixels on a side, of InternVL: what `tiles` counts for the models that do not cut


@dataclasses.dataclass(frozen=True)
class TiledImages:
  """InternVL: square tiles [r y x 3] f32, and the whole image as one more when there are several."""
  tile: int    # pixels on a side
  tokens: int  # of a tile
  tiles: int   # that an image may be cut into
  mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
  std: tuple[float, float, float] = (0.229, 0.224, 0.225)
  image_tokens = ('<img>', '<IMG_CONTEXT>', '</img>\n')

  @property
  def max_tokens(self) -> int:
    return self._tiles * self.tokens

  @property
  def _tiles(self) -> int:
    return self.tiles + (self.tiles > 1)

  def preprocess(self, references, room: int | None = None):
    cut = [imaging.tiles(imaging.read(reference), self.tile, self.tiles) for reference in references]
    counts = tuple(len(each) * self.tokens for each in cut)
    if not (room or cut):
      return None, ()
    seen = np.concatenate([imaging.normalise(each, self.mean, self.std) for each in cut] or [self._none()])
    # Without a room, a power of two: few shapes to compile
    missing = (1 << (len(seen) - 1).bit_length() if room is None else room * self._tiles) - len(seen)
    return np.pad(seen, ((0, missing), (0, 0), (0, 0), (0, 0))), counts

  def _none(self) -> np.ndarray:
    return np.zeros((0, self.tile, self.tile, 3), np.float32)

  def spec(self, references: int):
    return jax.ShapeDtypeStruct((references * self._tiles, self.tile, self.tile, 3), np.float32)


@dataclasses.dataclass(frozen=True)
class PackedPatches:
  """Qwen3-VL: patches laid end to end with their grids, as many as the pixels that so many of InternVL's tiles have."""
  pixels: qwen_patches.PixelConfig
  tiles: int
  image_tokens = ('<|vision_start|>', '<|image_pad|>', '<|vision_end|>')

  @property
  def max_tokens(self) -> int:
    return self._limited.max_pixels // (self.pixels.patch * self.pixels.merge) ** 2

  @property
  def _limited(self) -> qwen_patches.PixelConfig:
    pixels = self.pixels
    return dataclasses.replace(pixels, max_pixels=max(pixels.min_pixels, min(pixels.max_pixels, self.tiles * TILE ** 2)))

  def preprocess(self, references, room: int | None = None):
    if not (room or references):
      return None, ()
    pixels, images = self._limited, [imaging.read(reference) for reference in references]
    sizes = [qwen_patches.size_of(*image.shape[:2], pixels) for image in images]
    patches = [y * x // pixels.patch ** 2 for y, x in sizes]
    if room is not None and max(patches, default=0) > self._patches(1):
      shape = images[int(np.argmax(patches))].shape
      raise BrokenRecord(f'an image of {shape[1]}x{shape[0]} is too long and narrow to be shown in {self.max_tokens} tokens')
    # Without a room, a power of two: few shapes to compile
    space = self._patches(room) if room is not None else 1 << (sum(patches) - 1).bit_length()
    return (qwen_patches.pack(images, pixels, space, len(references) if room is None else room),
            tuple(n // pixels.merge ** 2 for n in patches))

  def _patches(self, references: int) -> int:
    return references * self.max_tokens * self.pixels.merge ** 2

  def spec(self, references: int):
    width = 3 * self.pixels.frames * self.pixels.patch ** 2
    return qwen3_vl.PackedImages(jax.ShapeDtypeStruct((self._patches(references), width), np.float32),
                             jax.ShapeDtypeStruct((references, 2), np.int32))


@dataclasses.dataclass(frozen=True)
class NoImages:
  """A language model: it reads text alone."""
  image_tokens = None
  max_tokens = 0

  def preprocess(self, references, room: int | None = None):
    if room or references:
      raise UserError('this model reads text alone: leave the images out, or take a VLM')
    return None, ()

  def spec(self, references: int):
    return None


ImageProcessor = TiledImages | PackedPatches | NoImages


def for_model(config: encoders.Config, tiles: int, folder: pathlib.Path | None = None) -> ImageProcessor:
  """The eye of a VLM of that configuration; `folder` says how its pixels are normalised (None: as its family does).

  ValueError for an encoder that takes no chat.
  """
  match config:
    case internvl.InternVLConfig():
      image_processor = TiledImages(config.vision.tile, config.tile_tokens, tiles)
      if folder is None:
        return image_processor
      pixels = _pixels(folder)
      return dataclasses.replace(image_processor, mean=tuple(pixels['image_mean']), std=tuple(pixels['image_std']))
    case qwen3_vl.Qwen3VLConfig():
      return PackedPatches(qwen_patches.PixelConfig() if folder is None else qwen_patches.PixelConfig.from_json(_pixels(folder)), tiles)
    case t5.T5Config():
      raise UserError(f'{folder} is an encoder, which writes nothing: take a VLM or a causal language model')
  return NoImages()


def check(config: encoders.Config, chat: verifi.Chat) -> None:
  """ValueError where a VLM's tokenizer and its config.json do not agree on the id that image tokens stand under."""
  wanted = getattr(config, 'image_token_id', None)
  if chat.image_id != wanted:
    raise UserError(f'{chat.folder}: images stand under the id {chat.image_id} for its tokenizer and under {wanted} for '
                     'its config.json, so they would be read as words: the folder mixes files of different checkpoints')


def _pixels(folder: pathlib.Path) -> dict:
  """The image processor's settings, which newer checkpoints keep in processor_config.json."""
  for name in ('preprocessor_config.json', 'processor_config.json'):
    if (folder / name).exists():
      settings = json.loads((folder / name).read_text())
      settings = settings.get('image_processor', settings)
      if 'image_mean' in settings:
        return settings
  raise UserError(f'{folder} has no preprocessor_config.json that says how images are normalised (image_mean): copy '
                   'it there from the public checkpoint')
