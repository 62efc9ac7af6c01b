"""Files of low-rank adapters, in the namings that people's trainers write, and in diffusers' naming out.

  naming      an adapter's factors in the file
  diffusers   transformer.transformer_blocks.0.attn.to_q.lora_A.weight, .lora_B.weight
  native      diffusion_model.blocks.0.attn.wq.lora_A.weight          (Krea's reference trainer, ComfyUI)
  PEFT        base_model.model.blocks.0.attn.wq.lora_A.weight         (AI-toolkit)
  kohya       lora_unet_blocks_0_attn_wq.lora_down.weight, .lora_up.weight, .alpha

Any prefix goes with native and diffusers' names, A and B with down and up. The product B A counts alpha / rank: alpha
is a tensor beside the factors, or stands in the file's head (diffusers' `lora_adapter_metadata`) or in PEFT's
adapter_config.json; without any it is the rank. A LoKr (`lokr_w1`, `lokr_w2`, each whole or as a product `_a _b`) is
the Kronecker product of its two matrices.

The torch matrix [out in] of a module is known from the model's rules: B's rows and A's columns go through the same
pattern, so that Krea's heads, and their reordered query and key channels, come out as those of the weight do.
"""

from collections.abc import Sequence
import dataclasses
import functools
import json
import math
import pathlib
import re
from typing import Any

import einops
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax import json_file, sharding
from unifusion_jax.errors import UserError
from unifusion_jax.models import unifusion
from unifusion_jax.weights import hub, lora, rules, safetensors_io

FILE = 'pytorch_lora_weights.safetensors'  # as diffusers names it
HEAD = 'lora_adapter_metadata'  # of diffusers' files, in their head
PEFT = 'adapter_config.json'
PREFIXES = ('base_model.model.', 'diffusion_model.', 'model.', 'transformer.', 'lora_unet_', 'lora_transformer_',
            'lycoris_')
_KEY = re.compile(r'(.+?)\.(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|alpha|lokr_w[12](?:_[ab])?)'
                  r'(?:\.default)?(?:\.weight)?')
_PARTS = {'lora_A': 'a', 'lora_down': 'a', 'lora.down': 'a', 'lora_B': 'b', 'lora_up': 'b', 'lora.up': 'b'}


@dataclasses.dataclass(frozen=True)
class Product:
  """The change of one matrix: scale * a b, in our axes; numpy f32."""
  a: np.ndarray  # [in.. j]
  b: np.ndarray  # [j out..]
  scale: float


# {path of a matrix: {layer, or None where it is not stacked: its change}}; a LoKr's is the whole matrix
Adapter = dict[str, dict[int | None, Product | np.ndarray]]


def split(text: str) -> tuple[str, float]:
  """'FILE:SCALE' -> (FILE, scale); 1 without a scale."""
  name, _, scale = text.rpartition(':')
  try:
    return (name, float(scale)) if name and math.isfinite(float(scale)) else (text, 1.0)
  except ValueError:
    return text, 1.0


def load(model, texts, live: bool = False):
  """The model with the adapters of 'FILE:SCALE' texts; as `apply`. Prints how many keys of each match."""
  adapters = read_all(texts, model)
  return apply(model, adapters, live) if adapters else model


def read_all(texts, model) -> list[tuple[Adapter, float]]:
  """The adapters of 'FILE:SCALE' texts with their scales; as `read`."""
  return [(read(name, model), scale) for name, scale in map(split, texts)]


def read(name, model) -> Adapter:
  """The adapter in a file, a folder or a hub id, for a UniFusion or its shapes; prints how many of its keys match.

  Raises:
    UserError: when none of its keys or only a part of them belongs to this model, and for factors that do not fit.
  """
  path, modules = locate(str(name)), matrices(model)
  tensors = safetensors_io.read(path)
  parts, unknown = matched(tensors, modules)
  if not parts:
    diffusers = next(iter(modules))
    raise UserError(f'{path}: none of its {len(tensors)} keys is of this model: it has {", ".join(list(tensors)[:2])}; '
                    f'wanted are keys such as transformer.{diffusers}.lora_A.weight (diffusers) or diffusion_model.'
                    f'{_native(diffusers)}.lora_A.weight (native): take a LoRA of this transformer')
  if unknown:
    raise UserError(f'{path}: only {len(tensors) - len(unknown)} of its {len(tensors)} keys are of this model; the '
                    f'first of the others are {", ".join(unknown[:3])}: take a LoRA of this transformer alone')
  adapter, settings = {}, settings_of(path)
  for module, tensors_of in parts.items():
    found = {part: np.asarray(tensor[...], np.float32) for part, tensor in tensors_of.items()}
    path_of_ours, source = modules[module]
    adapter.setdefault(path_of_ours, {})[source.layer] = _change(f'{path}: {module}', module, found, source, settings)
  if sharding.is_main_process():
    ranks = sorted({change.a.shape[-1] for layers in adapter.values() for change in layers.values()
                    if isinstance(change, Product)})
    print(f'{path}: all {len(tensors)} keys match, for {len(parts)} of {len(modules)} matrices'
          + (f', rank {" to ".join(map(str, (ranks[0], ranks[-1])[:len(ranks)]))}' if ranks else ''))
  return adapter


def apply(model, adapters: list[tuple[Adapter, float]], live: bool = False):
  """The model with adapters times their scales: merged into its weights, or with `live` beside them as `LoRA`s.

  Into int8 nothing is merged, nor into a `LoRA`. It works matrix by matrix and frees each one before the next, if
  nothing else refers to the model. UserError for a LoKr beside int8.
  """
  leaves, structure = lora.flatten(model)
  del model
  for path in leaves:
    for adapter, scale in adapters:
      if path in adapter:
        leaves[path] = _changed(leaves[path], adapter[path], scale, live)
  return jax.tree.unflatten(structure, list(leaves.values()))


def merge(adapters: Sequence[tuple[Adapter, float]], param: nnx.Param, path: str, layer: int | None) -> nnx.Param:
  """A Param at a path, or one layer of it, with adapters times their scales merged into it."""
  for adapter, scale in adapters:
    if (change := adapter.get(path, {}).get(layer)) is not None:
      param = _merged(param, {None: change}, scale)
  return param


def save(adapters: dict[str, lora.Factors], config: lora.LoRAConfig, model, folder) -> None:
  """Writes adapters of a model (or of its shapes) as diffusers' file FILE; all processes call it together."""
  whole, tensors, targets = sharding.gather(adapters), {}, []
  for module, (path, source) in matrices(model).items():
    if path in whole:
      layer = ... if source.layer is None else source.layer
      a, b = (np.asarray(factor[...])[layer] for factor in (whole[path].a, whole[path].b))
      (torch_in, ours_in), (torch_out, ours_out) = _sides(source.layout)
      a = _rearranged(a, f'{ours_in} rank', f'rank {torch_in}', source.layout)
      b = _rearranged(b, f'rank {ours_out}', f'{torch_out} rank', source.layout)
      tensors |= {f'transformer.{module}.lora_A.weight': a, f'transformer.{module}.lora_B.weight': b}
      targets.append(module)
  head = {f'transformer.{name}': value for name, value in dict(
      r=config.rank, lora_alpha=config.alpha, target_modules=targets).items()}
  path = pathlib.Path(folder) / FILE
  with sharding.together(f'write {path}'):
    if sharding.is_main_process():
      safetensors_io.write(path, tensors, {HEAD: json.dumps(head)})


def factors(adapter: Adapter, like: dict[str, lora.Factors], config: lora.LoRAConfig) -> dict[str, lora.Factors]:
  """An adapter as adapters in training, of the shapes and shardings of `like`; UserError where it is another kind."""
  changes = [change for layers in adapter.values() for change in layers.values()]
  same = adapter.keys() == like.keys() and all(
      isinstance(change, Product) and (change.a.shape[-1], change.scale) == (config.rank, config.scale)
      for change in changes)
  if not same:
    raise UserError(f'the LoRA has other matrices, rank or alpha than lora.targets={config.targets}, lora.rank='
                    f'{config.rank}, lora.alpha={config.alpha:g}: set these as it was trained')

  def put(path, shape, name):
    layers = adapter[path]
    parts = [getattr(layers[layer], name) for layer in sorted(layers, key=lambda layer: layer or 0)]
    value = parts[0] if None in layers else np.stack(parts)
    return jax.tree.map(lambda x: jax.device_put(value, jax.NamedSharding(jax.sharding.get_mesh(), x.sharding.spec)),
                        shape)
  made = {}
  for path, shapes in like.items():
    leaves, structure = jax.tree.flatten(shapes)
    made[path] = jax.tree.unflatten(structure, [put(path, leaf, name) for leaf, name in zip(leaves, 'ab', strict=True)])
  return made


def matched(tensors: dict, modules: dict) -> tuple[dict[str, dict], list[str]]:
  """({diffusers' name of a matrix: {'a', 'b', 'alpha' or 'lokr_...': tensor}}, the keys of no matrix of `modules`)."""
  parts, unknown = {}, []
  for key, tensor in tensors.items():
    match = _KEY.fullmatch(key)
    module = match and _module(match[1], modules)
    if module:
      parts.setdefault(module, {})[_PARTS.get(match[2], match[2])] = tensor
    else:
      unknown.append(key)
  return parts, unknown


def naming(key: str) -> str | None:
  """The naming of a key, as the table above calls it, for any model; None for a key that is no adapter's."""
  match = _KEY.fullmatch(key)
  if match is None:
    return None
  name, lokr = match[1], ', LoKr' * match[2].startswith('lokr')
  if name.startswith(('lora_', 'lycoris_')):
    return 'kohya' + lokr
  if name.startswith('base_model.model.'):
    return 'PEFT' + lokr
  return ('diffusers' if 'transformer' in name else 'native') + lokr


def locate(name: str) -> pathlib.Path:
  """The safetensors file of a name: itself, the one in a folder, of a hub id, or OWNER/NAME/FILE.safetensors there."""
  folder = hub.pin(name, files=True, variants=()).folder
  if folder.is_file():
    return folder
  files = sorted(folder.glob('*.safetensors'))
  known = [file for file in files if file.name in (FILE, 'adapter_model.safetensors')]
  if len(known or files) != 1:
    raise UserError(f'{name} holds {len(files)} files ({", ".join(file.name for file in files[:3])}): name the one '
                    'that is meant, as FOLDER/FILE.safetensors')
  return (known or files)[0]


def matrices(model) -> dict[str, tuple[str, rules.Source]]:
  """{diffusers' name of a matrix: (our path, its source)}."""
  shapes = {path: np.broadcast_to(False, leaf.shape) for path, leaf in lora.flatten(model)[0].items()}
  found, problems = rules.sources(shapes, unifusion.RULES, unifusion.AXIS_SIZES)
  if problems:
    raise ValueError(problems)
  return {source.name.removesuffix('.weight'): (path, source) for path, sources in found.items() for source in sources
          if source.name.endswith('.weight') and len(source.layout.torch) == 2}


def _native(module: str) -> str:
  return unifusion.native_name(f'{module}.weight').removesuffix('.weight')


def _module(name: str, modules: dict) -> str | None:
  """Diffusers' name of a module in any naming; None for one that is not there."""
  names = _names(tuple(modules))
  while name not in names:
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    if prefix is None:
      return None
    name = name.removeprefix(prefix)
  return names[name]


@functools.lru_cache(maxsize=4)
def _names(modules: tuple[str, ...]) -> dict[str, str]:
  """{any name without its prefix: diffusers' name}."""
  names = {name: module for module in modules for name in (module, _native(module))}
  return names | {name.replace('.', '_'): module for name, module in names.items()}


def settings_of(path: pathlib.Path) -> dict:
  """lora_alpha, alpha_pattern and use_rslora of a file, from its head or from PEFT's adapter_config.json beside it."""
  head = safetensors_io.metadata(path)
  if HEAD in head:
    with json_file.named(path):
      return {name.removeprefix('transformer.'): value for name, value in json.loads(head[HEAD]).items()}
  if (path.parent / PEFT).exists() and path.name == 'adapter_model.safetensors':
    return json_file.read(path.parent / PEFT)
  with json_file.named(path):
    return {'lora_alpha': float(head['lora_alpha'])} if 'lora_alpha' in head else {}


def _change(place: str, module: str, parts: dict, source: rules.Source, settings: dict) -> Product | np.ndarray:
  """The change of one torch matrix, from its tensors by kind."""
  wanted, alpha = source.layout.torch_shape(), parts.pop('alpha', None)
  (torch_in, ours_in), (torch_out, ours_out) = _sides(source.layout)
  if parts.keys() == {'a', 'b'}:
    a, b = parts['a'], parts['b']
    if a.ndim != 2 or b.ndim != 2 or (b.shape[0], a.shape[1]) != wanted or a.shape[0] != b.shape[1]:
      raise UserError(f'{place}: factors {b.shape} and {a.shape} do not make its matrix {wanted}: the LoRA is of a '
                      'transformer of another size')
    rank = a.shape[0]
    a = _rearranged(a, f'rank {torch_in}', f'{ours_in} rank', source.layout)
    b = _rearranged(b, f'{torch_out} rank', f'rank {ours_out}', source.layout)
    alpha = alpha_of(module, settings, rank) if alpha is None else float(alpha)
    return Product(a, b, alpha / (rank ** 0.5 if settings.get('use_rslora') else rank))
  left, right = (parts[name] if (name := f'lokr_w{i}') in parts else parts[f'{name}_a'] @ parts[f'{name}_b']
                 if {f'{name}_a', f'{name}_b'} <= parts.keys() else None for i in (1, 2))
  if left is None or right is None:
    raise UserError(f'{place}: of its factors there are only {", ".join(sorted(parts))}: the file is not whole')
  dense = np.kron(left, right)
  if dense.shape != wanted:
    raise UserError(f'{place}: the LoKr factors {left.shape} and {right.shape} do not make its matrix {wanted}: it is '
                    'of a transformer of another size')
  ranks = [parts[name].shape[0] for name in ('lokr_w2_b', 'lokr_w1_b') if name in parts]
  scale = 1.0 if alpha is None or not ranks else float(alpha) / ranks[0]  # both whole: alpha is not used
  return scale * _rearranged(dense, f'{torch_out} {torch_in}', f'{ours_in} {ours_out}', source.layout)


def alpha_of(module: str, settings: dict, rank: int) -> float:
  """alpha from a file's settings, in which a module may have its own; the rank without any."""
  for name, alpha in (settings.get('alpha_pattern') or {}).items():
    if any(re.fullmatch(rf'(.*\.)?({name.removeprefix("transformer.")})', each) for each in (module, _native(module))):
      return float(alpha)
  return float(settings.get('lora_alpha') or rank)


def _sides(layout: rules.Layout) -> tuple[tuple[str, str], tuple[str, str]]:
  """The axes (in torch, in ours) that a matrix [out in] contracts, and those of its output, as einops writes them."""
  group = lambda axes: ' '.join(f'({" ".join(axis)})' for axis in axes)
  inner = sum(set(axis) <= set(layout.torch[1]) for axis in layout.ours)  # these come first in ours
  return (group(layout.torch[1:]), group(layout.ours[:inner])), (group(layout.torch[:1]), group(layout.ours[inner:]))


def _rearranged(x: np.ndarray, before: str, after: str, layout: rules.Layout) -> np.ndarray:
  letters = re.findall(r'\w+', before)
  return einops.rearrange(x, f'{before} -> {after}', **{a: n for a, n in layout.sizes.items() if a in letters})


def _changed(leaf, changes: dict[int | None, Product | np.ndarray], scale: float, live: bool):
  """A leaf with the changes of its layers times a scale."""
  products = {layer: change for layer, change in changes.items() if isinstance(change, Product)}
  if isinstance(leaf, nnx.Param) and not live:
    return _merged(leaf, changes, scale)
  dense = {layer: change for layer, change in changes.items() if layer not in products}
  if dense:
    leaf = _merged_below(leaf, dense, scale)
  return _beside(leaf, products, scale) if products else leaf


def _merged_below(leaf, changes: dict, scale: float):
  """A leaf with changes merged into the Param below its adapters."""
  if isinstance(leaf, lora.LoRA):
    return dataclasses.replace(leaf, base=_merged_below(leaf.base, changes, scale))
  if isinstance(leaf, nnx.Param):
    return _merged(leaf, changes, scale)
  raise UserError('a LoKr cannot lie beside weights in int8, nor be merged into them: load the transformer without '
                  'quantisation, or merge the LoKr first')


def _merged(leaf: nnx.Param, changes: dict, scale: float) -> nnx.Param:
  """A Param with changes added to its layers, in f32."""
  value: Any = jnp.copy(leaf[...])
  mesh = value.sharding.mesh
  for layer, change in changes.items():
    spec = value.sharding.spec if layer is None else value.sharding.spec[1:]
    if isinstance(change, Product):
      inner = change.a.ndim - 1
      spec = (*spec, *[None] * (inner + change.b.ndim - 1 - len(spec)))
      change = _put(change.a, (*spec[:inner], None), mesh), _put(change.b * (change.scale * scale),
                                                                 (None, *spec[inner:]), mesh)
    else:
      change = _put(change * scale, spec, mesh),
    value = _added(value, layer, *change)
  return jax.tree.unflatten(jax.tree.structure(leaf), [value])


def _put(x: np.ndarray, spec, mesh) -> jax.Array:
  return jax.device_put(np.asarray(x, np.float32), jax.NamedSharding(mesh, jax.P(*spec)))


@jax.jit(donate_argnums=0)
def _added(value: jax.Array, layer: int | None, *factors: jax.Array) -> jax.Array:
  """value[layer] (all of it for None) plus the product of the factors."""
  change, = factors if len(factors) == 1 else (
      jnp.tensordot(*factors, 1, precision=jax.lax.Precision.HIGHEST),)
  if layer is None:
    return (value.astype(jnp.float32) + change).astype(value.dtype)
  old = jax.lax.dynamic_index_in_dim(value, layer, 0, keepdims=False)
  return jax.lax.dynamic_update_index_in_dim(value, (old.astype(jnp.float32) + change).astype(value.dtype), layer, 0)


def _beside(leaf, changes: dict[int | None, Product], scale: float) -> lora.LoRA:
  """A leaf with products beside it, stacked over its layers; a layer without one has zeros."""
  value = jax.tree.leaves(leaf)[0]
  spec, mesh = (*value.sharding.spec, *[None] * (value.ndim - len(value.sharding.spec))), value.sharding.mesh
  depth = () if None in changes else value.shape[:1]
  inner = next(iter(changes.values())).a.ndim - 1 + len(depth)
  rank = max(change.a.shape[-1] for change in changes.values())
  a = np.zeros((*value.shape[:inner], rank), np.float32)
  b = np.zeros((*depth, rank, *value.shape[inner:]), np.float32)
  scales = np.zeros(depth, np.float32)
  for layer, change in changes.items():
    at, used = ... if layer is None else layer, change.a.shape[-1]
    a[at][..., :used], b[at][:used], scales[at] = change.a, change.b, change.scale * scale
  return lora.LoRA(leaf, _put(a, (*spec[:inner], None), mesh),
                   _put(b, (*[None] * len(depth), None, *spec[inner:]), mesh), _put(scales, (), mesh))
