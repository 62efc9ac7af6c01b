"""UniFusion: layerwise attention pooling and the diffusion transformer as one module, its configurations and files.

A checkpoint is a folder in the layout of diffusers' Krea2Transformer2DModel: config.json with its field names (and
`patch_size`, which Krea keeps in the pipeline's index) and diffusion_pytorch_model.safetensors with its keys. Krea 2's
published transformer folder therefore loads here, and what is saved here loads there. Other ways to condition the DiT
(`fusion.py`) and variants of LAP are folders of the class UniFusionTransformer, with more fields and keys.
"""

from collections.abc import Mapping
import dataclasses
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp

from unifusion_jax import json_file
from unifusion_jax.errors import UserError
from unifusion_jax.models import dit, fusion, lap
from unifusion_jax.models.dit import DiT, DiTConfig
from unifusion_jax.models.lap import LAPConfig
from unifusion_jax.weights import convert, quantize, safetensors_io


@dataclasses.dataclass
class UniFusionConfig:
  lap: LAPConfig = dataclasses.field(default_factory=LAPConfig)
  dit: DiTConfig = dataclasses.field(default_factory=DiTConfig)
  dtype: str = 'bfloat16'  # of the computation; parameters have their own
  # How the DiT is conditioned on the VLM: lap | last | kv | hidden | text (fusion.py). `lap` has the sizes of each
  fusion: str = 'lap'

  def problems(self, prefix: str = '') -> list[str]:
    """Sizes that cannot be, a sentence each."""
    wrong = self.lap.problems(f'{prefix}lap.') + self.dit.problems(f'{prefix}dit.')
    if self.dtype not in ('float32', 'bfloat16'):
      wrong.append(f"{prefix}dtype={self.dtype!r} must be 'float32' or 'bfloat16'")
    return wrong or fusion.problems(self, prefix)

  def undivided(self, mesh: Mapping[str, int], prefix: str = '') -> list[str]:
    """Sizes that a mesh does not divide, a sentence each."""
    return self.lap.undivided(mesh, f'{prefix}lap.') + self.dit.undivided(mesh, f'{prefix}dit.')


def krea2() -> UniFusionConfig:
  """Krea 2 (12.8B parameters, 0.4B of them pooling and refiner) for the 12 taps of Qwen3-VL-4B."""
  return UniFusionConfig(LAPConfig(remat=True), DiTConfig(remat=True))


def base_8b() -> UniFusionConfig:
  """A DiT of 8.0B parameters and 0.9B of pooling and refiner for 10 taps of InternVL2.5-8B, as large as the paper's.

  Krea 2's blocks and proportions (width over depth about 200); the paper gives no sizes below "8B".
  """
  return UniFusionConfig(
      LAPConfig(width=4096, taps=10, heads=32, kv_heads=32, mlp=11008, remat=True),
      DiTConfig(depth=26, heads=40, kv_heads=8, mlp=13824, remat=True))


class UniFusion(nnx.Module):
  """`condition` once per prompt, `velocity` once per step."""

  def __init__(self, config: UniFusionConfig, *, rngs: nnx.Rngs):
    self.dtype, self.way = config.dtype, config.fusion
    made = fusion.make(config, rngs=rngs)
    if self.way == 'lap':
      self.lap = made
    else:
      self.fusion = made
    self.dit = DiT(config.dit, rngs=rngs)

  @property
  def config(self) -> UniFusionConfig:
    return UniFusionConfig(dataclasses.replace(self._between.config), dataclasses.replace(self.dit.config), self.dtype,
                           self.way)

  @property
  def _between(self):
    """The module between VLM and DiT."""
    return self.lap if self.way == 'lap' else self.fusion

  @jax.named_scope('lap')
  def condition(self, hidden: jax.Array, mask: jax.Array, image: jax.Array | None = None) -> dit.Condition:
    """Tapped VLM states [b s l e] and the mask of their tokens [b s] -> the condition; of LAP tokens [b s d].

    image: [b s], which tokens are an image's: for those ways that tell them apart.
    """
    return self._between(hidden.astype(self.dtype), mask, image)

  def visible(self, mask: jax.Array, image: jax.Array | None = None) -> jax.Array:
    """The mask [b s] of the condition, from the one of the VLM's tokens (`fusion.visible`)."""
    return fusion.visible(self.way, mask, image)

  @jax.named_scope('dit')
  def velocity(self, z: jax.Array, t: jax.Array, cond: dit.Condition, mask: jax.Array, bias: jax.Array | None = None,
               references: dit.References | None = None, *, tap: int | None = None):
    """Latents [b y x c] at time t [b] (1 is noise), a condition and its mask [b s] -> velocity [b y x c] f32.

    `bias`, `references` and `tap` as in `DiT`.
    """
    cond = jax.tree.map(lambda leaf: leaf.astype(self.dtype), cond)
    return self.dit(z, t, cond, mask, bias, references, tap=tap)


KREA_CLASS, OWN_CLASS = 'Krea2Transformer2DModel', 'UniFusionTransformer'  # OWN_CLASS: of what Krea 2 has not
PLAIN = dict(fusion='lap', text_tap_norm=False, text_separate=False)  # fields of such folders, as Krea 2 has them


def to_json(config: UniFusionConfig) -> dict:
  """The sizes under the names of diffusers' Krea2Transformer2DModel, with those of PLAIN where Krea's differs."""
  own = dict(fusion=config.fusion, text_tap_norm=config.lap.tap_norm, text_separate=config.lap.separate)
  own = {} if own == PLAIN else own
  return {
      '_class_name': OWN_CLASS if own else KREA_CLASS,
      'in_channels': config.dit.channels * config.dit.patch ** 2,
      'patch_size': config.dit.patch,
      'num_layers': config.dit.depth,
      'attention_head_dim': config.dit.head_dim,
      'num_attention_heads': config.dit.heads,
      'num_key_value_heads': config.dit.kv_heads,
      'intermediate_size': config.dit.mlp,
      'timestep_embed_dim': config.dit.time_dim,
      'axes_dims_rope': list(config.dit.rope_axes),
      'rope_theta': config.dit.rope_theta,
      'norm_eps': config.dit.eps,
      'text_hidden_dim': config.lap.width,
      'num_text_layers': config.lap.taps,
      'text_num_attention_heads': config.lap.heads,
      'text_num_key_value_heads': config.lap.kv_heads,
      'text_intermediate_size': config.lap.mlp,
      'num_layerwise_text_blocks': config.lap.depth,
      'num_refiner_text_blocks': config.lap.refiner_depth,
      **own,
  }


def from_json(fields: dict) -> UniFusionConfig:
  """The configuration of a config.json; dtype and remat, which it does not hold, have their defaults."""
  own = fields.get('_class_name') == OWN_CLASS
  known = to_json(krea2()) | (PLAIN if own else {})
  fields = known | {k: v for k, v in fields.items() if not k.startswith('_')}
  unknown = sorted(fields.keys() - known.keys())
  if unknown:
    raise UserError(f'config.json has fields that a {"UniFusion" if own else "Krea 2"} transformer does not: '
                    f'{", ".join(unknown)}')
  f = PLAIN | fields
  patch = f['patch_size']
  if f['in_channels'] % patch ** 2:
    raise UserError(f'config.json: in_channels {f["in_channels"]} is not a multiple of patch_size {patch} squared')
  return UniFusionConfig(
      LAPConfig(
          width=f['text_hidden_dim'], taps=f['num_text_layers'], depth=f['num_layerwise_text_blocks'],
          refiner_depth=f['num_refiner_text_blocks'], heads=f['text_num_attention_heads'],
          kv_heads=f['text_num_key_value_heads'], mlp=f['text_intermediate_size'], eps=f['norm_eps'],
          tap_norm=f['text_tap_norm'], separate=f['text_separate']),
      DiTConfig(
          channels=f['in_channels'] // patch ** 2, patch=patch, depth=f['num_layers'],
          heads=f['num_attention_heads'], kv_heads=f['num_key_value_heads'], head_dim=f['attention_head_dim'],
          mlp=f['intermediate_size'], time_dim=f['timestep_embed_dim'], rope_axes=tuple(f['axes_dims_rope']),
          rope_theta=f['rope_theta'], eps=f['norm_eps']),
      fusion=f['fusion'])


def read_config(folder, patch: int = 2) -> UniFusionConfig:
  """The configuration of a checkpoint folder; of a native file, which holds none, Krea 2's.

  patch: the size of patches where config.json does not say, as Krea's own does not.
  """
  if pathlib.Path(folder).suffix == '.safetensors':  # which need not be there to plan
    return from_json({'patch_size': patch})
  path = pathlib.Path(folder) / 'config.json'
  if not path.exists():
    raise UserError(f'{path} does not exist: give the folder of a UniFusion checkpoint, or the `transformer` folder '
                    'of a Krea 2 pipeline')
  with json_file.named(path):
    config = from_json({'patch_size': patch} | json_file.read(path))
    if wrong := config.problems():
      raise UserError('; '.join(wrong))
    return config


def load(folder, config: UniFusionConfig | None = None, dtype=jnp.float32, quantized: str = '', change=None
         ) -> UniFusion:
  """The checkpoint in `folder` with parameters in `dtype`, sharded over the mesh in context.

  folder: in diffusers' layout, or a .safetensors file: Krea's own, whose keys may begin with `model.diffusion_model.`
    as ComfyUI writes them, or one with diffusers' keys.
  config: chooses dtype and remat; UserError where its sizes are not those of config.json. A file has the sizes of
    `config`.
  quantized: as of `quantize.load`.
  change: `change(param, path, layer) -> param`, before it is quantised; the arguments as of `convert.load`'s on_leaf.
  """
  def read(on_leaf=lambda param, path, layer: param):
    changed = lambda param, *place: on_leaf(change(param, *place) if change else param, *place)
    return convert.load(*_checkpoint(folder, config), dtype=dtype, ignore=UNUSED, on_leaf=changed)
  return quantize.load(read, quantized)


def shapes(folder, config: UniFusionConfig | None = None) -> UniFusion:
  """The shapes of what `load` reads; UserError as there, but for the numbers in the files."""
  return convert.shapes(*_checkpoint(folder, config), ignore=UNUSED)


def _checkpoint(folder, config: UniFusionConfig | None):
  """(function that makes the model, tensors, their rules, sizes of axes), as `convert.load` takes them."""
  is_file = pathlib.Path(folder).is_file()
  stored = config if config and is_file else read_config(folder, config.dit.patch if config else 2)
  config = config or stored
  if wrong := config.undivided(jax.sharding.get_mesh().shape):
    raise UserError(f'{folder}: {"; ".join(wrong)}: choose another mesh')
  if config.fusion != stored.fusion:
    raise UserError(f'{folder} holds a model of fusion={stored.fusion!r}, not {config.fusion!r}: set model.fusion='
                    f'{stored.fusion}, or give the folder of another model')
  wanted, present = (PLAIN | to_json(each) | dict(_class_name='') for each in (config, stored))
  differ = [f'{k} is {present[k]}, not {wanted[k]}' for k in wanted if wanted[k] != present[k]]
  if differ:
    raise UserError(f'{folder} does not hold a model of these sizes: {"; ".join(differ)}')
  tensors = safetensors_io.read(folder)
  if any(name.startswith(PREFIX) for name in tensors):  # other models may lie beside it in the same file
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
  native = any(name.startswith('txtfusion.') for name in tensors)
  return lambda: UniFusion(config, rngs=nnx.Rngs(0)), tensors, NATIVE_RULES if native else RULES, AXIS_SIZES


def save(model: UniFusion, folder) -> None:
  """Writes config.json and the weights, in the model's own dtype, into `folder`; all processes call it together."""
  convert.save(model, RULES, AXIS_SIZES, folder, to_json(model.config), stem='diffusion_pytorch_model')


KREA_RULES, AXIS_SIZES = lap.RULES + dit.RULES, {'two': 2}
RULES = KREA_RULES + lap.VARIANT_RULES + fusion.RULES

# Krea's own names (github.com/krea-ai/krea-2), by diffusers'; its blocks keep their six modulation vectors end to end
PREFIX = 'model.diffusion_model.'
NATIVE = {
    'img_in.': 'first.', 'time_embed.linear_1.': 'tmlp.0.', 'time_embed.linear_2.': 'tmlp.2.',
    'time_mod_proj.': 'tproj.1.', 'txt_in.norm.weight': 'txtmlp.0.scale', 'txt_in.linear_1.': 'txtmlp.1.',
    'txt_in.linear_2.': 'txtmlp.3.', 'text_fusion.': 'txtfusion.', 'final_layer.linear.': 'last.linear.',
    'final_layer.norm.weight': 'last.norm.scale', 'final_layer.scale_shift_table': 'last.modulation.lin',
    'transformer_blocks.': 'blocks.', '.scale_shift_table': '.mod.lin', '.norm1.weight': '.prenorm.scale',
    '.norm2.weight': '.postnorm.scale', '.to_q.': '.wq.', '.to_k.': '.wk.', '.to_v.': '.wv.', '.to_out.0.': '.wo.',
    '.to_gate.': '.gate.', '.norm_q.weight': '.qknorm.qnorm.scale', '.norm_k.weight': '.qknorm.knorm.scale',
    '.ff.': '.mlp.'}
UNUSED = (r'last\.(up|down)\.weight',)  # leftovers that some files of Turbo hold


def native_name(name: str) -> str:
  """Krea's own name of a tensor that diffusers calls `name`."""
  for theirs, native in NATIVE.items():
    name = name.replace(theirs, native)
  return name


def _native(name: str, path: str, pattern: str):
  name = native_name(name.replace(r'\.', '.')).replace('.', r'\.')
  return name, path, '(m d) -> m d' if name.endswith(r'mod\.lin') else pattern


NATIVE_RULES = tuple(_native(*rule) for rule in KREA_RULES)
