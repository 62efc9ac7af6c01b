"""Qwen3-VL: a vision tower for images of any shape, deepstack, and a Qwen3 decoder under interleaved M-RoPE.

Follows `Qwen3VLForConditionalGeneration` of transformers, without video. An image is a grid of 16 x 16 pixel patches.
Learned positions are interpolated to its grid, patches attend within their image, and every square of 2 x 2 patches
becomes one image embedding, which replaces an image token of the prompt, and one deepstack feature for each of the
first decoder blocks, which is added to that block's output at the same token. A token's rotary position has three parts
(time, row, column), which differ at image tokens only; the text goes on after the longer side of an image.

Images vary in shape and arrays must not: the patches of all images of an example lie end to end in `PackedImages`,
padded at the end, beside their grids. Positions, rotations, interpolation and masks are computed from the grids on the
device, so that one compiled program serves all images that fit, in any mixture within a batch.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax import json_file
from unifusion_jax.errors import UserError
from unifusion_jax.models import decoder, sizes
from unifusion_jax.models.attention import attention
from unifusion_jax.models.decoder import Decoder, DecoderConfig, positions_of, Prompt, resolve_lm_head
from unifusion_jax.models.internvl import TEXT_RULES
from unifusion_jax.models.layers import (
  constant,
  einsum,
  layer_norm,
  normalise,
  RESIDUAL,
  rope,
  rope_angles,
  rows_axes,
  rows_of,
  scan_taps,
  stack,
  stream,
  weight,
  whole,
)
from unifusion_jax.ranges import Range
from unifusion_jax.sharding import spread
from unifusion_jax.weights import convert, safetensors_io


class PackedImages(NamedTuple):
  """The images of a batch of prompts; `data/vision_inputs.py` packs them."""
  patches: jax.Array  # [b p c] uint8 or normalised floats, c = 3 * 2 * 16 * 16; 4 divides p, and padding is at the end
  grids: jax.Array  # [b r 2] int32 rows and columns of patches, both even; 0, 0 where there is no image


class ImageFeatures(NamedTuple):
  """The vision tower's result for the images of a batch of prompts."""
  features: jax.Array  # [b n 1+l e], n = p / 4: the image embedding, then those of deepstack
  grids: jax.Array  # [b r 2]


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The vision tower; the defaults are those of the 2B and 4B models."""
  width: int = 1024
  depth: int = 24
  heads: int = 16
  hidden: int = 4096
  patch: int = 16  # pixels on a side
  frames: int = 2  # a still image is shown twice
  merge: int = 2  # patches joined along each side
  side: int = 48  # of the square of learned positions
  deepstack: tuple[int, ...] = (5, 11, 17)  # 0-based blocks whose outputs reach the decoder
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of pixels from 0 to 1, for patches that come as uint8
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)

  @property
  def joined(self) -> int:
    """Width of the patches that one token joins."""
    return self.width * self.merge ** 2

  @property
  def patch_size(self) -> int:
    """Numbers in a patch."""
    return 3 * self.frames * self.patch ** 2


@dataclasses.dataclass(frozen=True)
class Qwen3VLConfig:
  """The whole model; PRESETS at the end of this file has the public sizes."""
  vision: VisionConfig = VisionConfig()
  text: DecoderConfig = DecoderConfig(model_type='qwen3')
  image_token_id: int = 151655
  sections: tuple[int, int, int] = (24, 20, 20)  # rotary frequencies that turn with time, row and column

  def problems(self, prefix: str = '') -> list[str]:
    """Sizes that cannot be, a sentence each."""
    few, vision = Range(1, 100), self.vision
    wrong = [*sizes.problems(vision, f'{prefix}vision.', frames=few, merge=few, side=Range(1, 10 ** 4),
                             deepstack=Range(0, 1000)),
             *self.text.problems(f'{prefix}text.'),
             *sizes.problems(self, prefix, image_token_id=Range(0, 10 ** 7), sections=Range(0, 10 ** 4))]
    if not wrong and vision.width % vision.heads:
      wrong.append(f'{prefix}vision.heads={vision.heads} must divide {prefix}vision.width={vision.width}')
    return wrong

  def undivided(self, mesh: Mapping[str, int], prefix: str = '') -> list[str]:
    """Sizes that a mesh does not divide, a sentence each."""
    return [*sizes.undivided(self.vision, f'{prefix}vision.', mesh, fsdp=('joined',), tp=('joined',)),
            *self.text.undivided(mesh, f'{prefix}text.')]

  @classmethod
  def from_json(cls, config: dict) -> 'Qwen3VLConfig':
    """From the config.json of a transformers checkpoint; UserError for settings that are not supported."""
    vision, text = config['vision_config'], config['text_config']
    patch, frames = (value[0] if isinstance(value, list) and len(set(value)) == 1 else value for value in (
        vision.get('patch_size', 16), vision.get('temporal_patch_size', 2)))
    wanted = {'hidden_act': 'gelu_pytorch_tanh', 'in_channels': 3, 'out_hidden_size': text['hidden_size']}
    wrong = [f'vision_config.{key}={vision[key]!r}' for key, value in wanted.items() if vision.get(key, value) != value]
    if text.get('model_type') != 'qwen3_vl_text':
      wrong.append(f'text_config.model_type={text.get("model_type")!r}')
    rotary = vision.get('rope_parameters') or {}
    if rotary.get('rope_theta', 1e4) != 1e4 or rotary.get('rope_type', 'axial') != 'axial':
      wrong.append(f'vision_config.rope_parameters={rotary}')
    rotary = {**(text.get('rope_scaling') or {}), **(text.get('rope_parameters') or {})}
    if not rotary.get('mrope_interleaved', True):
      wrong.append('mrope_interleaved=False')
    deepstack = tuple(vision.get('deepstack_visual_indexes', (8, 16, 24)))
    if not deepstack or list(deepstack) != sorted(set(deepstack)):
      wrong.append(f'vision_config.deepstack_visual_indexes={list(deepstack)}, which must increase')
    side = round(vision.get('num_position_embeddings', 2304) ** 0.5)
    if side ** 2 != vision.get('num_position_embeddings', 2304):
      wrong.append(f'vision_config.num_position_embeddings={vision["num_position_embeddings"]}, which is no square')
    if wrong:
      raise UserError(f'this Qwen3-VL does not support {", ".join(wrong)}')
    # transformers' own defaults, where the text config is silent
    defaults = {'rope_theta': 500000.0, 'max_position_embeddings': 128000}
    text = DecoderConfig.from_json(defaults | text | {'model_type': 'qwen3'})
    return cls(
        vision=VisionConfig(
            width=vision.get('hidden_size', 1152), depth=vision.get('depth', 27), heads=vision.get('num_heads', 16),
            hidden=vision.get('intermediate_size', 4304), patch=patch, frames=frames,
            merge=vision.get('spatial_merge_size', 2), side=side, deepstack=deepstack),
        text=dataclasses.replace(text, tied=config.get('tie_word_embeddings', text.tied)),
        image_token_id=config.get('image_token_id', 151655),
        sections=tuple(rotary.get('mrope_section', (24, 20, 20))))

  def to_json(self) -> dict:
    """The config.json of a transformers checkpoint."""
    v, text = self.vision, self.text.to_json()
    # The same under both names: rope_parameters is read by transformers 5.x, rope_scaling by 4.x
    rotary = text['rope_parameters'] | {'mrope_interleaved': True, 'mrope_section': list(self.sections)}
    return {
        'architectures': ['Qwen3VLForConditionalGeneration'], 'model_type': 'qwen3_vl', 'dtype': 'float32',
        'image_token_id': self.image_token_id, 'tie_word_embeddings': self.text.tied,
        'text_config': text | {'model_type': 'qwen3_vl_text', 'rope_parameters': rotary, 'rope_scaling': rotary},
        'vision_config': {
            'model_type': 'qwen3_vl_vision', 'hidden_size': v.width, 'depth': v.depth, 'num_heads': v.heads,
            'intermediate_size': v.hidden, 'patch_size': v.patch, 'temporal_patch_size': v.frames, 'in_channels': 3,
            'spatial_merge_size': v.merge, 'num_position_embeddings': v.side ** 2, 'out_hidden_size': self.text.width,
            'deepstack_visual_indexes': list(v.deepstack), 'hidden_act': 'gelu_pytorch_tanh'}}


def grid_position(index: jax.Array, grids: jax.Array):
  """(image, cell, rows, columns), [b s] each, of cell `index` [b s] in images with grids [b r 2], laid end to end.

  `cell` counts within its image of `rows` x `columns`. Past the last image: the number of images, and no rows.
  """
  sizes = grids[..., 0] * grids[..., 1]
  past = index[..., None] >= jnp.cumsum(sizes, axis=1)[:, None]
  image = jnp.sum(past, axis=-1)
  cell = index - jnp.sum(jnp.where(past, sizes[:, None], 0), axis=-1)
  one_hot = image[..., None] == jnp.arange(grids.shape[1])
  rows, columns = (jnp.sum(jnp.where(one_hot, grids[:, None, :, i], 0), axis=-1) for i in (0, 1))
  return image, cell, rows, columns


class VisionBlock(nnx.Module):
  """x += attention(norm x); x += mlp(norm x)."""

  def __init__(self, config: VisionConfig, dtype=jnp.float32, *, rngs: nnx.Rngs):
    d, h, f = config.width, config.heads, config.hidden
    k, axes = d // h, rows_axes(d)
    self.norm1 = constant(1.0, (d,), dtype=dtype)
    self.norm1_bias = constant(0.0, (d,), dtype=dtype)
    self.wq = weight(rngs, (d, h, k), (axes, None, None), contract=1, dtype=dtype)
    self.wk = weight(rngs, (d, h, k), (axes, None, None), contract=1, dtype=dtype)
    self.wv = weight(rngs, (d, h, k), (axes, None, None), contract=1, dtype=dtype)
    self.bq = constant(0.0, (h, k), dtype=dtype)
    self.bk = constant(0.0, (h, k), dtype=dtype)
    self.bv = constant(0.0, (h, k), dtype=dtype)
    self.wo = weight(rngs, (h, k, d), (None, None, axes), contract=2, dtype=dtype)
    self.bo = constant(0.0, (d,), dtype=dtype)
    self.norm2 = constant(1.0, (d,), dtype=dtype)
    self.norm2_bias = constant(0.0, (d,), dtype=dtype)
    self.w1 = weight(rngs, (d, f), (axes, None), contract=1, dtype=dtype)
    self.b1 = constant(0.0, (f,), dtype=dtype)
    self.w2 = weight(rngs, (f, d), (None, axes), contract=1, dtype=dtype)
    self.b2 = constant(0.0, (d,), dtype=dtype)

  def __call__(self, x: jax.Array, angles: jax.Array, segments: jax.Array) -> jax.Array:
    """[b p d] -> [b p d]; angles [b p k/2], segments [b p]: patches attend within their image."""
    y = whole(layer_norm(x, self.norm1, self.norm1_bias))
    q, k, v = (einsum('bsd,dhk->bshk', y, w) + b[...] for w, b in (
        (self.wq, self.bq), (self.wk, self.bk), (self.wv, self.bv)))
    y = attention(rope(q, angles), rope(k, angles), v, q_segments=segments, kv_segments=segments)
    x = x + einsum('bshk,hkd->bsd', y, self.wo, stream(x)) + self.bo[...]
    y = einsum('bsd,df->bsf', layer_norm(x, self.norm2, self.norm2_bias), self.w1) + self.b1[...]
    return x + einsum('bsf,fd->bsd', jax.nn.gelu(y, approximate=True), self.w2, stream(x)) + self.b2[...]


class Merger(nnx.Module):
  """Squares of patches to embeddings: linear2(gelu(linear1(norm x))), the norm before or after joining a square."""

  def __init__(self, config: VisionConfig, width: int, joined_norm: bool, dtype=jnp.float32, *, rngs: nnx.Rngs):
    d, joined = config.width, config.width * config.merge ** 2
    self.joined_norm = joined_norm
    self.norm = constant(1.0, (joined if joined_norm else d,), dtype=dtype)
    self.norm_bias = constant(0.0, (joined if joined_norm else d,), dtype=dtype)
    self.w1 = weight(rngs, (joined, joined), ('fsdp', 'tp'), contract=1, dtype=dtype)
    self.b1 = constant(0.0, (joined,), ('tp',), dtype)
    self.w2 = weight(rngs, (joined, width), ('tp', 'fsdp'), contract=1, dtype=dtype)
    self.b2 = constant(0.0, (width,), dtype=dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    """[b p d] -> [b n e]."""
    joined = self.w1.shape[0]
    if not self.joined_norm:
      x = layer_norm(x, self.norm, self.norm_bias)
    x = x.reshape(x.shape[0], -1, joined, out_sharding=RESIDUAL)
    if self.joined_norm:
      x = layer_norm(x, self.norm, self.norm_bias)
    x = jax.nn.gelu(einsum('bsd,df->bsf', x, self.w1) + self.b1[...], approximate=False)
    return einsum('bsf,fe->bse', x, self.w2, RESIDUAL) + self.b2[...]


class Vision(nnx.Module):
  """The vision tower and its mergers."""

  def __init__(self, config: VisionConfig, width: int, dtype=jnp.float32, *, rngs: nnx.Rngs):
    self.config = config
    d, p = config.width, config.patch_size
    self.patch = weight(rngs, (p, d), (None, rows_axes(d)), contract=1, dtype=dtype, int8=False)
    self.patch_bias = constant(0.0, (d,), dtype=dtype)
    self.positions = weight(rngs, (config.side ** 2, d), (None, None), contract=None, dtype=dtype, std=0.02)
    self.blocks = stack(VisionBlock, config.depth, config, dtype, rngs=rngs)
    self.merger = Merger(config, width, False, dtype, rngs=rngs)
    self.deepstack = stack(Merger, len(config.deepstack), config, width, True, dtype, rngs=rngs)

  def __call__(self, patches: jax.Array, grids: jax.Array) -> jax.Array:
    """Patches [b p c] of images with grids [b r 2] -> features [b n 1+l e]."""
    c = self.config
    patches, grids = spread(patches), spread(grids)
    image, cell, rows, columns = grid_position(jnp.arange(patches.shape[1])[None], grids)
    spec = rows_of(patches)
    # Patches come square by square, and within a square row by row
    squares, inside = jnp.maximum(columns // c.merge, 1), cell % c.merge ** 2
    row = cell // c.merge ** 2 // squares * c.merge + inside // c.merge
    column = cell // c.merge ** 2 % squares * c.merge + inside % c.merge
    x = einsum('bsp,pd->bsd', patches.astype(self.patch.dtype), self.patch, spec) + self.patch_bias[...]
    x = x + self.interpolated(row, column, rows, columns).astype(x.dtype)
    k = c.width // c.heads
    angles = jnp.concatenate([rope_angles(row, k // 2, 1e4), rope_angles(column, k // 2, 1e4)], axis=-1)
    segments = jnp.where(rows > 0, image + 1, 0)
    x, tapped, _ = scan_taps(lambda x, block, *_: (block(x, angles, segments), None), x, self.blocks,
                             tuple(i + 1 for i in c.deepstack))
    x, tapped = jax.sharding.reshard((x, tapped), RESIDUAL)
    deep = jax.lax.map(lambda pair: pair[0](pair[1]), (self.deepstack, jnp.moveaxis(tapped, 2, 0)))
    return jnp.moveaxis(jnp.concatenate([self.merger(x)[None], deep]), 0, 2)

  def interpolated(self, row, column, rows, columns) -> jax.Array:
    """Learned positions at cells [b p] of grids of rows x columns, corners aligned: [b p d] f32."""
    side, spec = self.config.side, rows_of(row)

    def neighbours(at, size):
      at = at * (side - 1) / jnp.maximum(size - 1, 1).astype(jnp.float32)
      low = jnp.floor(at)
      clipped = (jnp.clip(low.astype(jnp.int32) + i, 0, side - 1) for i in (0, 1))  # padding may lie anywhere
      return list(zip(clipped, (1 - (at - low), at - low)))

    def learned(y, x):
      return self.positions[...].at[y * side + x].get(out_sharding=spec).astype(jnp.float32)

    return sum(learned(y, x) * (along_y * along_x)[..., None]  # pyrefly: ignore[bad-return]
               for y, along_y in neighbours(row, rows) for x, along_x in neighbours(column, columns))


class Qwen3VL(nnx.Module):
  """The whole model; input_ids [b s] int32, attention_mask [b s] (False on padding, either side), PackedImages."""

  def __init__(self, config: Qwen3VLConfig, dtype=jnp.float32, *, rngs: nnx.Rngs):
    self.config = config
    self.vision = Vision(config.vision, config.text.width, dtype, rngs=rngs)
    self.decoder = Decoder(config.text, dtype, rngs=rngs)

  def image_features(self, images: PackedImages) -> ImageFeatures:
    """The vision tower's features of the images; uint8 patches are normalised here."""
    vision = self.config.vision
    if images.patches.shape[-1] != vision.patch_size or images.patches.shape[1] % vision.merge ** 2:
      raise UserError(f'patches are {list(images.patches.shape)}; this model wants {vision.patch_size} numbers in each '
                      f'(3 x {vision.frames} x {vision.patch} x {vision.patch}) and a multiple of {vision.merge ** 2} '
                      'patches')
    # A patch has its channels one after another
    mean, std = (np.repeat(values, vision.patch_size // 3) for values in (vision.mean, vision.std))
    return ImageFeatures(self.vision(normalise(images.patches, mean, std), images.grids), images.grids)

  def prompt(self, input_ids: jax.Array, attention_mask: jax.Array, images: PackedImages | None = None,
             image_features: ImageFeatures | None = None) -> Prompt:
    """Embeddings, images in place of their tokens, and positions of a batch of prompts.

    `image_features`, when given, are used in place of those of `images`. Image embeddings replace the image tokens in
    order. Image tokens in excess of the grids and patches become NaN: a compiled program cannot raise an error for a
    count that it only learns when it runs.
    """
    input_ids, attention_mask = jax.sharding.reshard((input_ids, attention_mask), RESIDUAL)  # they may come unsharded
    x = self.decoder.embed(input_ids)
    if images is not None:
      image_features = self.image_features(PackedImages(*jax.sharding.reshard(tuple(images), RESIDUAL)))
    if image_features is None:
      angles = self.decoder.angles(positions_of(attention_mask))
      return Prompt(x, angles, attention_mask, jnp.sum(attention_mask, axis=1, dtype=jnp.int32))
    is_image = (input_ids == self.config.image_token_id) & attention_mask
    is_text = attention_mask & ~is_image
    before = jnp.cumsum(is_image, axis=1, dtype=jnp.int32) - is_image
    grids = image_features.grids // self.config.vision.merge
    image, cell, rows, columns = grid_position(before, grids)
    passed = image[..., None] > jnp.arange(grids.shape[1])
    start = jnp.cumsum(is_text, axis=1, dtype=jnp.int32) - is_text
    start = start + jnp.sum(jnp.where(passed, jnp.max(grids, axis=-1)[:, None], 0), axis=-1)
    columns = jnp.maximum(columns, 1)
    positions = jnp.stack([jnp.zeros_like(cell), cell // columns, cell % columns], axis=-1)
    positions = start[..., None] + jnp.where(is_image[..., None], positions, 0)

    pick = jax.vmap(lambda table, i: table.at[i].get(mode='fill', fill_value=jnp.nan))
    picked = pick(image_features.features.astype(x.dtype), jnp.where(is_image, before, 0))
    picked = jnp.where((rows > 0)[..., None, None], picked, jnp.nan)
    x = jnp.where(is_image[..., None], picked[:, :, 0], x)
    deepstack = jnp.moveaxis(jnp.where(is_image[..., None, None], picked[:, :, 1:], 0), 2, 0)
    length = jnp.max(jnp.where(attention_mask[..., None], positions, -1), axis=(1, 2)) + 1
    return Prompt(x, self.angles(positions), attention_mask, length, deepstack)

  def angles(self, positions: jax.Array) -> jax.Array:
    """Rotation angles [b s k/2] of positions [b s 3]: time, row and column interleaved by sections."""
    part = np.zeros(self.config.text.head_dim // 2, int)
    for i in (1, 2):
      part[i:3 * self.config.sections[i]:3] = i
    time, row, column = (self.decoder.angles(positions[..., i]) for i in range(3))
    return jnp.where(part == 0, time, jnp.where(part == 1, row, column))

  hidden, last, logits = decoder.hidden, decoder.last, decoder.logits


def axis_sizes(config: Qwen3VLConfig) -> dict[str, int]:
  """The sizes behind the letters of the rules: h g k of the decoder, a c the tower's heads and head dim, n the three of
  its fused qkv, i t y x a patch's channels, frames, rows and columns."""
  text, vision = config.text, config.vision
  return {'h': text.heads, 'g': text.kv_heads, 'k': text.head_dim, 'a': vision.heads, 'c': vision.width // vision.heads,
          'n': 3, 'i': 3, 't': vision.frames, 'y': vision.patch, 'x': vision.patch}


def load(folder, dtype=jnp.bfloat16, on_leaf=None) -> Qwen3VL:
  """From a checkpoint folder (config.json and safetensors), sharded over the mesh in context.

  `on_leaf`: see `convert.load`.
  """
  folder = pathlib.Path(folder)
  config_json = json_file.read(folder / 'config.json')
  config = Qwen3VLConfig.from_json(config_json)
  tensors, tied = resolve_lm_head(safetensors_io.read(folder), config_json, folder)
  config = dataclasses.replace(config, text=dataclasses.replace(config.text, tied=tied))
  return convert.load(lambda: Qwen3VL(config, dtype, rngs=nnx.Rngs(0)), tensors, RULES, axis_sizes(config), dtype,
                      on_leaf=on_leaf)


def save(vlm: Qwen3VL, folder) -> None:
  """Writes the folder that transformers' Qwen3VLForConditionalGeneration loads; all processes call it together."""
  convert.save(vlm, RULES, axis_sizes(vlm.config), folder, vlm.config.to_json())


_VISION = r'model\.visual\.blocks\.(\d+)\.'
_DEEPSTACK = r'model\.visual\.deepstack_merger_list\.(\d+)\.'

RULES = tuple(
    (name.replace(r'language_model\.model\.', r'model\.language_model\.').replace(r'language_model\.lm', 'lm'), *rest)
    for name, *rest in TEXT_RULES) + (
    (r'model\.visual\.patch_embed\.proj\.weight', 'vision/patch', 'd i t y x -> (i t y x) d'),
    (r'model\.visual\.patch_embed\.proj\.bias', 'vision/patch_bias', 'd -> d'),
    (r'model\.visual\.pos_embed\.weight', 'vision/positions', 's d -> s d'),
    (_VISION + r'norm1\.weight', 'vision/blocks/norm1', 'd -> d'),
    (_VISION + r'norm1\.bias', 'vision/blocks/norm1_bias', 'd -> d'),
    (_VISION + r'attn\.qkv\.weight', 'vision/blocks/wq', '(n a c) d -> d a c', {'n': 0}),
    (_VISION + r'attn\.qkv\.weight', 'vision/blocks/wk', '(n a c) d -> d a c', {'n': 1}),
    (_VISION + r'attn\.qkv\.weight', 'vision/blocks/wv', '(n a c) d -> d a c', {'n': 2}),
    (_VISION + r'attn\.qkv\.bias', 'vision/blocks/bq', '(n a c) -> a c', {'n': 0}),
    (_VISION + r'attn\.qkv\.bias', 'vision/blocks/bk', '(n a c) -> a c', {'n': 1}),
    (_VISION + r'attn\.qkv\.bias', 'vision/blocks/bv', '(n a c) -> a c', {'n': 2}),
    (_VISION + r'attn\.proj\.weight', 'vision/blocks/wo', 'd (a c) -> a c d'),
    (_VISION + r'attn\.proj\.bias', 'vision/blocks/bo', 'd -> d'),
    (_VISION + r'norm2\.weight', 'vision/blocks/norm2', 'd -> d'),
    (_VISION + r'norm2\.bias', 'vision/blocks/norm2_bias', 'd -> d'),
    (_VISION + r'mlp\.linear_fc1\.weight', 'vision/blocks/w1', 'f d -> d f'),
    (_VISION + r'mlp\.linear_fc1\.bias', 'vision/blocks/b1', 'f -> f'),
    (_VISION + r'mlp\.linear_fc2\.weight', 'vision/blocks/w2', 'd f -> f d'),
    (_VISION + r'mlp\.linear_fc2\.bias', 'vision/blocks/b2', 'd -> d'),
    (r'model\.visual\.merger\.norm\.weight', 'vision/merger/norm', 'd -> d'),
    (r'model\.visual\.merger\.norm\.bias', 'vision/merger/norm_bias', 'd -> d'),
    (r'model\.visual\.merger\.linear_fc1\.weight', 'vision/merger/w1', 'f d -> d f'),
    (r'model\.visual\.merger\.linear_fc1\.bias', 'vision/merger/b1', 'f -> f'),
    (r'model\.visual\.merger\.linear_fc2\.weight', 'vision/merger/w2', 'e f -> f e'),
    (r'model\.visual\.merger\.linear_fc2\.bias', 'vision/merger/b2', 'e -> e'),
    (_DEEPSTACK + r'norm\.weight', 'vision/deepstack/norm', 'd -> d'),
    (_DEEPSTACK + r'norm\.bias', 'vision/deepstack/norm_bias', 'd -> d'),
    (_DEEPSTACK + r'linear_fc1\.weight', 'vision/deepstack/w1', 'f d -> d f'),
    (_DEEPSTACK + r'linear_fc1\.bias', 'vision/deepstack/b1', 'f -> f'),
    (_DEEPSTACK + r'linear_fc2\.weight', 'vision/deepstack/w2', 'e f -> f e'),
    (_DEEPSTACK + r'linear_fc2\.bias', 'vision/deepstack/b2', 'e -> e'),
)


def _preset(*, width: int, depth: int, heads: int, hidden: int, tied: bool,
            vision: VisionConfig = VisionConfig()) -> Qwen3VLConfig:
  text = DecoderConfig(model_type='qwen3', vocab=151936, width=width, depth=depth, heads=heads, kv_heads=8,
                       head_dim=128, hidden=hidden, theta=5e6, max_positions=262144, tied=tied)
  return Qwen3VLConfig(vision=vision, text=text)


# For planning without a checkpoint; `load` goes by the checkpoint's own config.json
PRESETS = {
    'Qwen3-VL-2B-Instruct': _preset(width=2048, depth=28, heads=16, hidden=6144, tied=True),
    'Qwen3-VL-4B-Instruct': _preset(width=2560, depth=36, heads=32, hidden=9728, tied=True),
    'Qwen3-VL-8B-Instruct': _preset(width=4096, depth=36, heads=32, hidden=12288, tied=False,
                                    vision=VisionConfig(width=1152, depth=27, hidden=4304, deepstack=(8, 16, 24))),
}
