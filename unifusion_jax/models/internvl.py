"""InternVL 2.5 / 3 / 3.5: InternViT, pixel shuffle, a two-layer projector and a decoder.

Follows `InternVLForConditionalGeneration` of transformers. One tile of y x x pixels becomes (y / patch)^2 vision tokens
and, after the pixel shuffle by 2, a quarter as many image embeddings, which replace the image tokens of the prompt.
"""

from collections.abc import Mapping
import dataclasses
import math
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax import json_file
from unifusion_jax.errors import UserError
from unifusion_jax.models import decoder, sizes
from unifusion_jax.models.attention import attention
from unifusion_jax.models.decoder import Decoder, DecoderConfig, positions_of, Prompt, tied_head
from unifusion_jax.models.layers import (
  constant,
  einsum,
  layer_norm,
  normalise,
  RESIDUAL,
  rms_norm,
  rows_axes,
  rows_of,
  scan,
  stack,
  weight,
)
from unifusion_jax.ranges import Range
from unifusion_jax.sharding import spread
from unifusion_jax.weights import convert, safetensors_io


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """InternViT; the defaults are the 300M one."""
  width: int = 1024
  depth: int = 24
  heads: int = 16
  hidden: int = 4096
  tile: int = 448  # pixels on a side
  patch: int = 14
  norm: str = 'layer_norm'  # or rms_norm (the 6B one)
  eps: float = 1e-6
  qkv_bias: bool = True
  qk_norm: bool = False
  mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of pixels from 0 to 1, for tiles that come as uint8
  std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class InternVLConfig:
  """The whole model; PRESETS at the end of this file has the public sizes."""
  vision: VisionConfig = VisionConfig()
  text: DecoderConfig = DecoderConfig()
  image_token_id: int = 151667
  shuffle: int = 2  # tokens joined along each side

  def problems(self, prefix: str = '') -> list[str]:
    """Sizes that cannot be, a sentence each."""
    vision = self.vision
    wrong = [*sizes.problems(vision, f'{prefix}vision.', tile=Range(1, 10 ** 4)), *self.text.problems(f'{prefix}text.'),
             *sizes.problems(self, prefix, image_token_id=Range(0, 10 ** 7), shuffle=Range(1, 100))]
    if not wrong and (vision.width % vision.heads or vision.tile % (vision.patch * self.shuffle)):
      wrong.append(f'{prefix}vision.heads={vision.heads} must divide {prefix}vision.width={vision.width}, and '
                   f'{prefix}vision.patch={vision.patch} x {prefix}shuffle={self.shuffle} the {vision.tile} pixels of '
                   f'{prefix}vision.tile')
    return wrong

  def undivided(self, mesh: Mapping[str, int], prefix: str = '') -> list[str]:
    """Sizes that a mesh does not divide, a sentence each."""
    fsdp, projected = mesh.get('fsdp', 1), f'{prefix}vision.width={self.vision.width} x {self.shuffle} x {self.shuffle}'
    return [*([f'mesh.fsdp={fsdp} must divide {projected}, of the projector'] if self.joined % fsdp else []),
            *self.text.undivided(mesh, f'{prefix}text.'),
            *sizes.undivided(self.text, f'{prefix}text.', mesh, tp=('width',))]

  @property
  def joined(self) -> int:
    """Width of the vision tokens that the projector takes, several joined."""
    return self.vision.width * self.shuffle ** 2

  @property
  def tile_tokens(self) -> int:
    """Image embeddings of one tile."""
    return (self.vision.tile // self.vision.patch // self.shuffle) ** 2

  @classmethod
  def from_original(cls, config: dict, image_token_id: int) -> 'InternVLConfig':
    """From the config.json of OpenGVLab's own layout, which leaves the image token's id to the tokenizer."""
    vision, size = config['vision_config'], config.get('force_image_size')
    wrong = [f'{key}={config[key]!r}' for key, value in {'ps_version': 'v2', 'use_backbone_lora': 0, 'use_llm_lora': 0}
             .items() if config.get(key, value) != value]
    if size not in (None, vision['image_size']):
      wrong.append(f'force_image_size={size} over a ViT for {vision["image_size"]}')
    if wrong:
      raise UserError(f'this InternVL does not support {", ".join(wrong)}')
    names = {'attention_bias': vision.get('qkv_bias', False), 'use_qk_norm': vision.get('qk_normalization', True),
             'norm_type': vision.get('norm_type', 'rms_norm')}
    return cls.from_json({
        'vision_config': vision | names, 'text_config': config['llm_config'], 'image_token_id': image_token_id,
        'vision_feature_layer': config.get('select_layer', -1), 'downsample_ratio': config['downsample_ratio']})

  @classmethod
  def from_json(cls, config: dict) -> 'InternVLConfig':
    """From the config.json of a `-hf` checkpoint; UserError for settings that are not supported."""
    vision = config['vision_config']
    tile, patch = (value if isinstance(value, list) else [value, value]
                   for value in (vision.get('image_size', 448), vision.get('patch_size', 14)))
    wanted = {
        'vision_feature_layer': -1, 'vision_feature_select_strategy': 'default', 'projector_hidden_act': 'gelu'}
    wrong = [f'{key}={config[key]!r}' for key, value in wanted.items() if config.get(key, value) != value]
    wanted = {'hidden_act': 'gelu', 'use_mask_token': False, 'use_mean_pooling': True, 'num_channels': 3,
              'use_absolute_position_embeddings': True}
    wrong += [f'vision_config.{key}={vision[key]!r}' for key, value in wanted.items()
              if vision.get(key, value) != value]
    if tile[0] != tile[1] or patch[0] != patch[1]:
      wrong.append(f'tiles of {tile} pixels in patches of {patch}, which are not square')
    if wrong:
      raise UserError(f'this InternVL does not support {", ".join(wrong)}')
    text = DecoderConfig.from_json(config['text_config'])
    tied = config.get('tie_word_embeddings', text.tied)
    return cls(
        vision=VisionConfig(
            width=vision.get('hidden_size', 1024), depth=vision.get('num_hidden_layers', 24),
            heads=vision.get('num_attention_heads', 16), hidden=vision.get('intermediate_size', 4096), tile=tile[0],
            patch=patch[0], norm=vision.get('norm_type', 'layer_norm'), eps=vision.get('layer_norm_eps', 1e-6),
            qkv_bias=vision.get('attention_bias', False), qk_norm=vision.get('use_qk_norm', False)),
        text=dataclasses.replace(text, tied=tied),
        image_token_id=config['image_token_id'], shuffle=round(1 / config.get('downsample_ratio', 0.5)))

  def to_json(self) -> dict:
    """The config.json of a `-hf` checkpoint."""
    v = self.vision
    return {
        'architectures': ['InternVLForConditionalGeneration'], 'model_type': 'internvl', 'dtype': 'float32',
        'downsample_ratio': 1 / self.shuffle, 'image_seq_length': self.tile_tokens,
        'image_token_id': self.image_token_id, 'projector_hidden_act': 'gelu', 'vision_feature_layer': -1,
        'vision_feature_select_strategy': 'default', 'tie_word_embeddings': self.text.tied,
        'text_config': self.text.to_json(),
        'vision_config': {
            'model_type': 'internvl_vision', 'attention_bias': v.qkv_bias, 'hidden_act': 'gelu', 'hidden_size': v.width,
            'image_size': [v.tile, v.tile], 'intermediate_size': v.hidden, 'layer_norm_eps': v.eps,
            'norm_type': v.norm, 'num_attention_heads': v.heads, 'num_channels': 3, 'num_hidden_layers': v.depth,
            'patch_size': [v.patch, v.patch], 'use_absolute_position_embeddings': True, 'use_mask_token': False,
            'use_mean_pooling': True, 'use_qk_norm': v.qk_norm}}


class VisionBlock(nnx.Module):
  """x += scale1 * attention(norm x); x += scale2 * mlp(norm x)."""

  def __init__(self, config: VisionConfig, dtype=jnp.float32, *, rngs: nnx.Rngs):
    d, h, f = config.width, config.heads, config.hidden
    k, axes = d // h, rows_axes(d)
    self.eps = config.eps
    centred = config.norm == 'layer_norm'
    self.norm1 = constant(1.0, (d,), dtype=dtype)
    self.norm1_bias = constant(0.0, (d,), dtype=dtype) if centred else None
    self.wq = weight(rngs, (d, h, k), (axes, None, None), contract=1, dtype=dtype)
    self.wk = weight(rngs, (d, h, k), (axes, None, None), contract=1, dtype=dtype)
    self.wv = weight(rngs, (d, h, k), (axes, None, None), contract=1, dtype=dtype)
    self.bq = constant(0.0, (h, k), dtype=dtype) if config.qkv_bias else None
    self.bk = constant(0.0, (h, k), dtype=dtype) if config.qkv_bias else None
    self.bv = constant(0.0, (h, k), dtype=dtype) if config.qkv_bias else None
    self.q_norm = constant(1.0, (d,), dtype=dtype) if config.qk_norm else None
    self.k_norm = constant(1.0, (d,), dtype=dtype) if config.qk_norm else None
    self.wo = weight(rngs, (h, k, d), (None, None, axes), contract=2, dtype=dtype)
    self.bo = constant(0.0, (d,), dtype=dtype)
    self.scale1 = constant(1.0, (d,), dtype=dtype)
    self.norm2 = constant(1.0, (d,), dtype=dtype)
    self.norm2_bias = constant(0.0, (d,), dtype=dtype) if centred else None
    self.w1 = weight(rngs, (d, f), (axes, None), contract=1, dtype=dtype)
    self.b1 = constant(0.0, (f,), dtype=dtype)
    self.w2 = weight(rngs, (f, d), (None, axes), contract=1, dtype=dtype)
    self.b2 = constant(0.0, (d,), dtype=dtype)
    self.scale2 = constant(1.0, (d,), dtype=dtype)

  def norm(self, x: jax.Array, scale, bias) -> jax.Array:
    return rms_norm(x, scale, self.eps) if bias is None else layer_norm(x, scale, bias, self.eps)

  def __call__(self, x: jax.Array) -> jax.Array:
    """[b s d] -> [b s d], b being tiles."""
    y = self.norm(x, self.norm1, self.norm1_bias)
    q, k, v = (einsum('bsd,dhk->bshk', y, w) for w in (self.wq, self.wk, self.wv))
    if self.bq is not None:
      q, k, v = q + self.bq[...], k + self.bk[...], v + self.bv[...]
    if self.q_norm is not None:  # over all heads together
      q, k = (rms_norm(a.reshape(y.shape), scale).reshape(a.shape) for a, scale in ((q, self.q_norm), (k, self.k_norm)))
    y = einsum('bshk,hkd->bsd', attention(q, k, v), self.wo, rows_of(x)) + self.bo[...]
    x = x + self.scale1[...] * y
    y = einsum('bsd,df->bsf', self.norm(x, self.norm2, self.norm2_bias), self.w1) + self.b1[...]
    y = einsum('bsf,fd->bsd', jax.nn.gelu(y, approximate=False), self.w2, rows_of(x)) + self.b2[...]
    return x + self.scale2[...] * y


def sinusoids(side: int, width: int) -> np.ndarray:
  """Initial learned positions [1 + side^2 width]: zero for the class token, then waves along y and along x.

  From small random numbers, a tower trained from scratch takes thousands of steps longer to attend to neighbours.
  """
  frequencies = 100.0 ** -np.linspace(0, 1, width // 4)
  angles = np.arange(side)[:, None] * frequencies
  waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [side width/2]
  shape = (side, side, width // 2)
  grid = np.concatenate([np.broadcast_to(waves[:, None], shape), np.broadcast_to(waves[None], shape)], axis=-1)
  return np.pad(grid.reshape(side * side, -1), ((1, 0), (0, width - 4 * (width // 4))))


class Vision(nnx.Module):
  """InternViT: tiles -> patch states after the last block."""

  def __init__(self, config: VisionConfig, dtype=jnp.float32, *, rngs: nnx.Rngs):
    self.config = config
    d, p = config.width, config.patch ** 2 * 3
    self.patch = weight(rngs, (p, d), (None, rows_axes(d)), contract=1, dtype=dtype, int8=False)
    self.patch_bias = constant(0.0, (d,), dtype=dtype)
    self.class_token = weight(rngs, (d,), (None,), contract=None, dtype=dtype, std=0.02)
    self.positions = nnx.Param(jnp.asarray(sinusoids(config.tile // config.patch, d), dtype))
    self.blocks = stack(VisionBlock, config.depth, config, dtype, rngs=rngs)

  def __call__(self, tiles: jax.Array) -> jax.Array:
    """Normalised tiles [b y x 3] -> [b s d] without the class token, rows first."""
    tiles = spread(tiles)
    b, n, p = tiles.shape[0], self.config.tile // self.config.patch, self.config.patch
    x = tiles.astype(self.patch.dtype).reshape(b, n, p, n, p, 3, out_sharding=rows_of(tiles))
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, n * n, -1, out_sharding=rows_of(tiles))
    x = einsum('bsp,pd->bsd', x, self.patch, rows_of(tiles)) + self.patch_bias[...]
    first = jnp.broadcast_to(self.class_token[...], (b, 1, x.shape[-1]), out_sharding=rows_of(tiles))
    x = jnp.concatenate([first, x], axis=1) + self.positions[...]
    x, _ = scan(lambda x, block: (block(x), None), x, self.blocks)
    return jax.sharding.reshard(x[:, 1:], RESIDUAL)


class Projector(nnx.Module):
  """linear2(gelu(linear1(layer_norm x)))."""

  def __init__(self, width_in: int, width: int, dtype=jnp.float32, *, rngs: nnx.Rngs):
    self.norm = constant(1.0, (width_in,), dtype=dtype)
    self.norm_bias = constant(0.0, (width_in,), dtype=dtype)
    self.w1 = weight(rngs, (width_in, width), ('fsdp', 'tp'), contract=1, dtype=dtype)
    self.b1 = constant(0.0, (width,), ('tp',), dtype)
    self.w2 = weight(rngs, (width, width), ('tp', 'fsdp'), contract=1, dtype=dtype)
    self.b2 = constant(0.0, (width,), dtype=dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    y = einsum('bsd,de->bse', layer_norm(x, self.norm, self.norm_bias, 1e-5), self.w1) + self.b1[...]
    return einsum('bsd,de->bse', jax.nn.gelu(y, approximate=False), self.w2, RESIDUAL) + self.b2[...]


class InternVL(nnx.Module):
  """The whole model; input_ids [b s] int32, attention_mask [b s] (False on padding, either side), images: tiles.

  Tiles [b r y x 3] are uint8, or floats that were normalised before.
  """

  def __init__(self, config: InternVLConfig, dtype=jnp.float32, *, rngs: nnx.Rngs):
    self.config = config
    self.vision = Vision(config.vision, dtype, rngs=rngs)
    self.projector = Projector(config.joined, config.text.width, dtype, rngs=rngs)
    self.decoder = Decoder(config.text, dtype, rngs=rngs)

  def image_features(self, tiles: jax.Array) -> jax.Array:
    """Tiles [b r y x 3] -> image embeddings [b r*n e], n = config.tile_tokens of each tile, rows first."""
    b, r, *size = tiles.shape
    vision = self.config.vision
    if size != [vision.tile, vision.tile, 3]:
      raise UserError(f'tiles are {size[0]} x {size[1]} with {size[2]} channels; this model wants {vision.tile} x '
                      f'{vision.tile} x 3')
    # Empty tiles, so that all devices share the rows
    devices = jax.sharding.get_abstract_mesh().size
    all_tiles = r + -r % (devices // math.gcd(b, devices))
    tiles = jnp.pad(normalise(tiles, vision.mean, vision.std), ((0, 0), (0, all_tiles - r)) + ((0, 0),) * 3)
    x = self.vision(tiles.reshape(b * all_tiles, *size, out_sharding=RESIDUAL))
    n, a = vision.tile // vision.patch // self.config.shuffle, self.config.shuffle
    x = x.reshape(b, all_tiles, n, a, n, a, -1, out_sharding=RESIDUAL)[:, :r]
    x = x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, r * n * n, -1, out_sharding=RESIDUAL)
    return self.projector(x)

  def prompt(self, input_ids: jax.Array, attention_mask: jax.Array, images: jax.Array | None = None,
             image_features: jax.Array | None = None) -> Prompt:
    """Embeddings, images in place of their tokens, and positions of a batch of prompts.

    `image_features`, when given, are used in place of those of `images`. Image embeddings replace the image tokens in
    order; padded tiles at the end are never used. Image tokens in excess of the tiles become NaN: a compiled program
    cannot raise an error for a count that it only learns when it runs.
    """
    input_ids, attention_mask = jax.sharding.reshard((input_ids, attention_mask), RESIDUAL)  # they may come unsharded
    x = self.decoder.embed(input_ids)
    if images is not None:
      image_features = self.image_features(jax.sharding.reshard(images, RESIDUAL))
    if image_features is not None:
      is_image = (input_ids == self.config.image_token_id) & attention_mask
      index = jnp.where(is_image, jnp.cumsum(is_image, axis=1) - 1, 0)
      pick = jax.vmap(lambda table, i: table.at[i].get(mode='fill', fill_value=jnp.nan))
      picked = pick(image_features.astype(x.dtype), index)
      x = jnp.where(is_image[..., None], picked, x)
    angles = self.decoder.angles(positions_of(attention_mask))
    return Prompt(x, angles, attention_mask, jnp.sum(attention_mask, axis=1, dtype=jnp.int32))

  hidden, last, logits = decoder.hidden, decoder.last, decoder.logits


def axis_sizes(config: InternVLConfig) -> dict[str, int]:
  """The sizes behind the letters of the rules: h g k of the decoder, a c the ViT's heads and head dim, y x its patch,
  n the three of its fused qkv, r the heads of a group in InternLM2's fused wqkv: its queries, its key, its value."""
  text, vision = config.text, config.vision
  return {'h': text.heads, 'g': text.kv_heads, 'k': text.head_dim, 'r': text.heads // text.kv_heads + 2,
          'a': vision.heads, 'c': vision.width // vision.heads, 'n': 3, 'y': vision.patch, 'x': vision.patch}


def load(folder, dtype=jnp.bfloat16, on_leaf=None) -> InternVL:
  """From a checkpoint folder (config.json and safetensors), sharded over the mesh in context.

  Reads the `-hf` layout and OpenGVLab's own, the latter with its tokenizer's files beside it; `on_leaf`: see
  `convert.load`.
  """
  folder = pathlib.Path(folder)
  config_json = json_file.read(folder / 'config.json')
  tensors = safetensors_io.read(folder)
  if 'llm_config' in config_json:
    config = InternVLConfig.from_original(config_json, image_token(folder))
    rules = INTERNLM2_RULES if config_json['llm_config']['model_type'] == 'internlm2' else ORIGINAL_RULES
  else:
    config, rules = InternVLConfig.from_json(config_json), RULES
  head = not {'language_model.lm_head.weight', 'language_model.output.weight'}.isdisjoint(tensors)
  tied = tied_head(config_json, head)
  config = dataclasses.replace(config, text=dataclasses.replace(config.text, tied=tied))
  return convert.load(lambda: InternVL(config, dtype, rngs=nnx.Rngs(0)), tensors, rules, axis_sizes(config), dtype,
                      ignore=(r'.*rotary_emb\.inv_freq',), on_leaf=on_leaf)


def image_token(folder: pathlib.Path) -> int:
  """The id of <IMG_CONTEXT> in a folder with a tokenizer's files."""
  def parse(name):
    return json_file.read(folder / name) if (folder / name).exists() else {}
  ids = dict(parse('added_tokens.json'))
  decoder = parse('tokenizer_config.json').get('added_tokens_decoder', {})
  ids |= {token['content']: int(i) for i, token in decoder.items()}
  ids |= {token['content']: token['id'] for token in parse('tokenizer.json').get('added_tokens', [])}
  if '<IMG_CONTEXT>' not in ids:
    raise UserError(f'{folder}: no added_tokens.json, tokenizer_config.json or tokenizer.json gives the id of '
                    "<IMG_CONTEXT>; copy the checkpoint's tokenizer files next to its config.json")
  return ids['<IMG_CONTEXT>']


def save(vlm: InternVL, folder) -> None:
  """Writes the folder that transformers' InternVLForConditionalGeneration loads; all processes call it together."""
  convert.save(vlm, RULES, axis_sizes(vlm.config), folder, vlm.config.to_json())


_LAYER = r'language_model\.model\.layers\.(\d+)\.'
_VISION = r'vision_tower\.encoder\.layer\.(\d+)\.'
_ORIGINAL = r'vision_model\.encoder\.layers\.(\d+)\.'

TEXT_RULES = (
    (r'language_model\.model\.embed_tokens\.weight', 'decoder/embedding', 'v d -> v d'),
    (r'language_model\.model\.norm\.weight', 'decoder/norm', 'd -> d'),
    (r'language_model\.lm_head\.weight', 'decoder/head', 'v d -> d v'),
    (_LAYER + r'input_layernorm\.weight', 'decoder/blocks/norm1', 'd -> d'),
    (_LAYER + r'self_attn\.q_proj\.weight', 'decoder/blocks/wq', '(h k) d -> d h k'),
    (_LAYER + r'self_attn\.k_proj\.weight', 'decoder/blocks/wk', '(g k) d -> d g k'),
    (_LAYER + r'self_attn\.v_proj\.weight', 'decoder/blocks/wv', '(g k) d -> d g k'),
    (_LAYER + r'self_attn\.q_proj\.bias', 'decoder/blocks/bq', '(h k) -> h k'),
    (_LAYER + r'self_attn\.k_proj\.bias', 'decoder/blocks/bk', '(g k) -> g k'),
    (_LAYER + r'self_attn\.v_proj\.bias', 'decoder/blocks/bv', '(g k) -> g k'),
    (_LAYER + r'self_attn\.q_norm\.weight', 'decoder/blocks/q_norm', 'k -> k'),
    (_LAYER + r'self_attn\.k_norm\.weight', 'decoder/blocks/k_norm', 'k -> k'),
    (_LAYER + r'self_attn\.o_proj\.weight', 'decoder/blocks/wo', 'd (h k) -> h k d'),
    (_LAYER + r'post_attention_layernorm\.weight', 'decoder/blocks/norm2', 'd -> d'),
    (_LAYER + r'mlp\.gate_proj\.weight', 'decoder/blocks/mlp/gate', 'f d -> d f'),
    (_LAYER + r'mlp\.up_proj\.weight', 'decoder/blocks/mlp/up', 'f d -> d f'),
    (_LAYER + r'mlp\.down_proj\.weight', 'decoder/blocks/mlp/down', 'd f -> f d'),
)

INTERNLM2_TEXT_RULES = (
    (r'language_model\.model\.tok_embeddings\.weight', 'decoder/embedding', 'v d -> v d'),
    (r'language_model\.model\.norm\.weight', 'decoder/norm', 'd -> d'),
    (r'language_model\.output\.weight', 'decoder/head', 'v d -> d v'),
    (_LAYER + r'attention_norm\.weight', 'decoder/blocks/norm1', 'd -> d'),
    (_LAYER + r'attention\.wqkv\.weight', 'decoder/blocks/wq', '(g r k) d -> d (g r) k', {'r': slice(0, -2)}),
    (_LAYER + r'attention\.wqkv\.weight', 'decoder/blocks/wk', '(g r k) d -> d g k', {'r': -2}),
    (_LAYER + r'attention\.wqkv\.weight', 'decoder/blocks/wv', '(g r k) d -> d g k', {'r': -1}),
    (_LAYER + r'attention\.wo\.weight', 'decoder/blocks/wo', 'd (h k) -> h k d'),
    (_LAYER + r'ffn_norm\.weight', 'decoder/blocks/norm2', 'd -> d'),
    (_LAYER + r'feed_forward\.w1\.weight', 'decoder/blocks/mlp/gate', 'f d -> d f'),
    (_LAYER + r'feed_forward\.w3\.weight', 'decoder/blocks/mlp/up', 'f d -> d f'),
    (_LAYER + r'feed_forward\.w2\.weight', 'decoder/blocks/mlp/down', 'd f -> f d'),
)

RULES = TEXT_RULES + (
    (r'multi_modal_projector\.layer_norm\.weight', 'projector/norm', 'd -> d'),
    (r'multi_modal_projector\.layer_norm\.bias', 'projector/norm_bias', 'd -> d'),
    (r'multi_modal_projector\.linear_1\.weight', 'projector/w1', 'e d -> d e'),
    (r'multi_modal_projector\.linear_1\.bias', 'projector/b1', 'e -> e'),
    (r'multi_modal_projector\.linear_2\.weight', 'projector/w2', 'e d -> d e'),
    (r'multi_modal_projector\.linear_2\.bias', 'projector/b2', 'e -> e'),
    (r'vision_tower\.embeddings\.cls_token', 'vision/class_token', '1 1 d -> d'),
    (r'vision_tower\.embeddings\.position_embeddings', 'vision/positions', '1 s d -> s d'),
    (r'vision_tower\.embeddings\.patch_embeddings\.projection\.weight', 'vision/patch', 'd i y x -> (y x i) d'),
    (r'vision_tower\.embeddings\.patch_embeddings\.projection\.bias', 'vision/patch_bias', 'd -> d'),
    (_VISION + r'layernorm_before\.weight', 'vision/blocks/norm1', 'd -> d'),
    (_VISION + r'layernorm_before\.bias', 'vision/blocks/norm1_bias', 'd -> d'),
    (_VISION + r'attention\.q_proj\.weight', 'vision/blocks/wq', '(a c) d -> d a c'),
    (_VISION + r'attention\.k_proj\.weight', 'vision/blocks/wk', '(a c) d -> d a c'),
    (_VISION + r'attention\.v_proj\.weight', 'vision/blocks/wv', '(a c) d -> d a c'),
    (_VISION + r'attention\.q_proj\.bias', 'vision/blocks/bq', '(a c) -> a c'),
    (_VISION + r'attention\.k_proj\.bias', 'vision/blocks/bk', '(a c) -> a c'),
    (_VISION + r'attention\.v_proj\.bias', 'vision/blocks/bv', '(a c) -> a c'),
    (_VISION + r'attention\.q_norm\.weight', 'vision/blocks/q_norm', 'd -> d'),
    (_VISION + r'attention\.k_norm\.weight', 'vision/blocks/k_norm', 'd -> d'),
    (_VISION + r'attention\.projection_layer\.weight', 'vision/blocks/wo', 'd (a c) -> a c d'),
    (_VISION + r'attention\.projection_layer\.bias', 'vision/blocks/bo', 'd -> d'),
    (_VISION + r'lambda_1', 'vision/blocks/scale1', 'd -> d'),
    (_VISION + r'layernorm_after\.weight', 'vision/blocks/norm2', 'd -> d'),
    (_VISION + r'layernorm_after\.bias', 'vision/blocks/norm2_bias', 'd -> d'),
    (_VISION + r'mlp\.fc1\.weight', 'vision/blocks/w1', 'f d -> d f'),
    (_VISION + r'mlp\.fc1\.bias', 'vision/blocks/b1', 'f -> f'),
    (_VISION + r'mlp\.fc2\.weight', 'vision/blocks/w2', 'd f -> f d'),
    (_VISION + r'mlp\.fc2\.bias', 'vision/blocks/b2', 'd -> d'),
    (_VISION + r'lambda_2', 'vision/blocks/scale2', 'd -> d'),
)

_ORIGINAL_VISION_RULES = (
    (r'mlp1\.0\.weight', 'projector/norm', 'd -> d'),
    (r'mlp1\.0\.bias', 'projector/norm_bias', 'd -> d'),
    (r'mlp1\.1\.weight', 'projector/w1', 'e d -> d e'),
    (r'mlp1\.1\.bias', 'projector/b1', 'e -> e'),
    (r'mlp1\.3\.weight', 'projector/w2', 'e d -> d e'),
    (r'mlp1\.3\.bias', 'projector/b2', 'e -> e'),
    (r'vision_model\.embeddings\.class_embedding', 'vision/class_token', '1 1 d -> d'),
    (r'vision_model\.embeddings\.position_embedding', 'vision/positions', '1 s d -> s d'),
    (r'vision_model\.embeddings\.patch_embedding\.weight', 'vision/patch', 'd i y x -> (y x i) d'),
    (r'vision_model\.embeddings\.patch_embedding\.bias', 'vision/patch_bias', 'd -> d'),
    (_ORIGINAL + r'norm1\.weight', 'vision/blocks/norm1', 'd -> d'),
    (_ORIGINAL + r'norm1\.bias', 'vision/blocks/norm1_bias', 'd -> d'),
    (_ORIGINAL + r'attn\.qkv\.weight', 'vision/blocks/wq', '(n a c) d -> d a c', {'n': 0}),
    (_ORIGINAL + r'attn\.qkv\.weight', 'vision/blocks/wk', '(n a c) d -> d a c', {'n': 1}),
    (_ORIGINAL + r'attn\.qkv\.weight', 'vision/blocks/wv', '(n a c) d -> d a c', {'n': 2}),
    (_ORIGINAL + r'attn\.qkv\.bias', 'vision/blocks/bq', '(n a c) -> a c', {'n': 0}),
    (_ORIGINAL + r'attn\.qkv\.bias', 'vision/blocks/bk', '(n a c) -> a c', {'n': 1}),
    (_ORIGINAL + r'attn\.qkv\.bias', 'vision/blocks/bv', '(n a c) -> a c', {'n': 2}),
    (_ORIGINAL + r'attn\.q_norm\.weight', 'vision/blocks/q_norm', 'd -> d'),
    (_ORIGINAL + r'attn\.k_norm\.weight', 'vision/blocks/k_norm', 'd -> d'),
    (_ORIGINAL + r'attn\.proj\.weight', 'vision/blocks/wo', 'd (a c) -> a c d'),
    (_ORIGINAL + r'attn\.proj\.bias', 'vision/blocks/bo', 'd -> d'),
    (_ORIGINAL + r'ls1', 'vision/blocks/scale1', 'd -> d'),
    (_ORIGINAL + r'norm2\.weight', 'vision/blocks/norm2', 'd -> d'),
    (_ORIGINAL + r'norm2\.bias', 'vision/blocks/norm2_bias', 'd -> d'),
    (_ORIGINAL + r'mlp\.fc1\.weight', 'vision/blocks/w1', 'f d -> d f'),
    (_ORIGINAL + r'mlp\.fc1\.bias', 'vision/blocks/b1', 'f -> f'),
    (_ORIGINAL + r'mlp\.fc2\.weight', 'vision/blocks/w2', 'd f -> f d'),
    (_ORIGINAL + r'mlp\.fc2\.bias', 'vision/blocks/b2', 'd -> d'),
    (_ORIGINAL + r'ls2', 'vision/blocks/scale2', 'd -> d'),
)

ORIGINAL_RULES = TEXT_RULES + _ORIGINAL_VISION_RULES
INTERNLM2_RULES = INTERNLM2_TEXT_RULES + _ORIGINAL_VISION_RULES


def _preset(kind: str, *, width: int, depth: int, heads: int, kv_heads: int, hidden: int, head_dim: int = 128,
            vision: VisionConfig = VisionConfig()) -> InternVLConfig:
  families = {
      'internlm2': dict(model_type='llama', vocab=92553, eps=1e-5, max_positions=32768),
      'qwen2': dict(model_type='qwen2', vocab=151674, eps=1e-6, max_positions=32768),
      'qwen3': dict(model_type='qwen3', vocab=151936, eps=1e-6, max_positions=40960)}
  image_token_ids = {'internlm2': 92546, 'qwen2': 151667, 'qwen3': 151671}
  text = DecoderConfig(width=width, depth=depth, heads=heads, kv_heads=kv_heads, head_dim=head_dim, hidden=hidden,
                       **families[kind])
  return InternVLConfig(vision=vision, text=text, image_token_id=image_token_ids[kind])


_VIT_6B = VisionConfig(width=3200, depth=45, heads=25, hidden=12800, norm='rms_norm', qkv_bias=False, qk_norm=True)

# For planning without a checkpoint; `load` goes by the checkpoint's own config.json
PRESETS = {
    'InternVL2_5-1B': _preset('qwen2', width=896, depth=24, heads=14, kv_heads=2, hidden=4864, head_dim=64),
    'InternVL2_5-2B': _preset('internlm2', width=2048, depth=24, heads=16, kv_heads=8, hidden=8192),
    'InternVL2_5-4B': _preset('qwen2', width=2048, depth=36, heads=16, kv_heads=2, hidden=11008),
    'InternVL2_5-8B': _preset('internlm2', width=4096, depth=32, heads=32, kv_heads=8, hidden=14336),
    'InternVL3-1B': _preset('qwen2', width=896, depth=24, heads=14, kv_heads=2, hidden=4864, head_dim=64),
    'InternVL3-2B': _preset('qwen2', width=1536, depth=28, heads=12, kv_heads=2, hidden=8960),
    'InternVL3-8B': _preset('qwen2', width=3584, depth=28, heads=28, kv_heads=4, hidden=18944),
    'InternVL3-14B': _preset('qwen2', width=5120, depth=48, heads=40, kv_heads=8, hidden=13824),
    'InternVL3_5-1B': _preset('qwen3', width=1024, depth=28, heads=16, kv_heads=8, hidden=3072),
    'InternVL3_5-2B': _preset('qwen3', width=2048, depth=28, heads=16, kv_heads=8, hidden=6144),
    'InternVL3_5-4B': _preset('qwen3', width=2560, depth=36, heads=32, kv_heads=8, hidden=9728),
    'InternVL3_5-8B': _preset('qwen3', width=4096, depth=36, heads=32, kv_heads=8, hidden=12288),
    'InternVL3_5-14B': _preset('qwen3', width=5120, depth=40, heads=40, kv_heads=8, hidden=17408),
    'InternVL3_5-38B': _preset('qwen3', width=5120, depth=64, heads=64, kv_heads=8, hidden=25600, vision=_VIT_6B),
}
