"""Any supported encoder by name: a folder or a hub id to a sharded model, by the model_type of its config.json.

  vlm = encoders.load('OpenGVLab/InternVL3-1B-hf', jnp.bfloat16)
  vlm = encoders.load('Qwen/Qwen3-VL-4B-Instruct@main', jnp.bfloat16, quantized='int8', cache='.cache/encoders')

All models have the same methods; docs/encoders.md has the table and says how to add one.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil

from absl import logging
from flax import nnx
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from unifusion_jax import digests, json_file, sharding
from unifusion_jax.errors import UserError
from unifusion_jax.models import causal_lm, internvl, qwen3_vl, t5
from unifusion_jax.weights import hub, quantize

Config = internvl.InternVLConfig | qwen3_vl.Qwen3VLConfig | causal_lm.TextConfig | t5.T5Config
Encoder = internvl.InternVL | qwen3_vl.Qwen3VL | causal_lm.TextModel | t5.T5Encoder
QUANTIZED = ('', 'int8', 'w8a8')
FORMAT = 2  # of the cache: raise it when the same files and rules give other numbers


def load(name, dtype=jnp.bfloat16, quantized: str = '', cache: str | None = None) -> Encoder:
  """The encoder in a folder or behind a hub id, in `dtype`, sharded over the mesh in context.

  Args:
    name: a folder, or a hub id; the folder of `hub.pin` is sure to be of one revision.
    quantized: 'int8' for int8 weights, 'w8a8' for int8 activations as well, '' for neither.
    cache: a folder (one for all processes) that keeps the converted form: the next load reads its own slices of it.
      A damaged entry is made again.

  Raises:
    UserError: for a model that is not supported, and as raised by `hub`, `convert` and the model.
  """
  if quantized not in QUANTIZED:
    raise UserError(f'quantized={quantized!r} must be one of {", ".join(map(repr, QUANTIZED))}')
  folder = hub.resolve(name)
  if wrong := config(folder).undivided(jax.sharding.get_mesh().shape):
    raise UserError(f'{name}: {"; ".join(wrong)}: choose another mesh')
  path = stored = None
  if cache:
    path, stored = _cache_entry(pathlib.Path(cache).expanduser().absolute(), _fingerprint(folder, dtype, quantized))
  model = _restore(path, dtype, quantized) if stored else _read(folder, dtype, quantized)
  model.config = _with_pixel_statistics(model.config, folder)
  if cache and not stored:
    _store(model, path)
  return model


def config(name) -> Config:
  """Configuration of a folder, of a hub id, or of a public name in a model's PRESETS; reads no weights.

  `text.tied` is provisional: the weights may contradict their config.json, and only `load` sees them.
  """
  presets = internvl.PRESETS | qwen3_vl.PRESETS | causal_lm.PRESETS | t5.PRESETS
  short = re.sub('-hf$', '', str(name).partition('@')[0].split('/')[-1], flags=re.IGNORECASE)
  short = short if short in presets else short.removesuffix('-Instruct')
  if short in presets and not pathlib.Path(name).expanduser().is_dir():
    return presets[short]
  folder = hub.resolve(name, weights=False)
  return _with_pixel_statistics(_config(_config_json(folder), folder), folder)


def preprocessor(folder: str | os.PathLike) -> dict:
  """The image processor's settings, which newer checkpoints keep in processor_config.json."""
  folder = pathlib.Path(folder)
  for name in ('preprocessor_config.json', 'processor_config.json'):
    if (folder / name).exists():
      settings = json_file.read(folder / name)
      settings = settings.get('image_processor', settings)
      if 'image_mean' in settings:
        return settings
  raise UserError(f'{folder} has no preprocessor_config.json that says how images are normalised (image_mean): copy '
                  'it there from the public checkpoint')


def _with_pixel_statistics(config: Config, folder: pathlib.Path) -> Config:
  """The configuration with the pixel mean and std of the folder's image processor, if it has one."""
  files = (folder / f'{name}_config.json' for name in ('preprocessor', 'processor'))
  if isinstance(config, causal_lm.TextConfig | t5.T5Config) or not any(file.exists() for file in files):
    return config
  settings = preprocessor(folder)
  with json_file.named(folder / 'preprocessor_config.json'):
    mean, std = (tuple(settings[name]) for name in ('image_mean', 'image_std'))
  return dataclasses.replace(config, vision=dataclasses.replace(config.vision, mean=mean, std=std))


def abstract(config: Config, dtype=jnp.bfloat16, quantized: str = '') -> Encoder:
  """Shapes and shardings of a configuration's model on the mesh in context; UserError where it does not divide."""
  if wrong := config.undivided(jax.sharding.get_abstract_mesh().shape):
    raise UserError(f'{"; ".join(wrong)}: choose another mesh')
  return sharding.abstract(_shapes(config, dtype, quantized), jax.sharding.get_abstract_mesh())


def _config_json(folder: pathlib.Path) -> dict:
  path = folder / 'config.json'
  if not path.exists():
    raise UserError(f'{folder} has no config.json: give the folder of a transformers checkpoint')
  return json_file.read(path)


def _config(config_json: dict, folder: pathlib.Path) -> Config:
  with json_file.named(folder / 'config.json'):
    config = _of_type(config_json, folder)
    if wrong := config.problems():
      raise UserError('; '.join(wrong))
    return config


def _of_type(config_json: dict, folder: pathlib.Path) -> Config:
  match config_json.get('model_type'):
    case 'internvl':
      return internvl.InternVLConfig.from_json(config_json)
    case 'internvl_chat':
      return internvl.InternVLConfig.from_original(config_json, internvl.image_token(folder))
    case 'qwen3_vl':
      return qwen3_vl.Qwen3VLConfig.from_json(config_json)
    case 'llama' | 'qwen2' | 'qwen3':
      return causal_lm.TextConfig.from_json(config_json)
    case 't5':
      return t5.T5Config.from_json(config_json)
    case other:
      raise UserError(f'{folder}: a model of type {other!r} is not supported; supported are internvl and '
                       'internvl_chat (InternVL 2.5, 3, 3.5), qwen3_vl, llama, qwen2 and qwen3 (text alone), and t5 '
                       '(the encoder of T5 v1.1 and Flan-T5)')


def _initialised(config: Config, dtype) -> Encoder:
  """The model of a configuration, with random weights."""
  rngs = nnx.Rngs(0)
  match config:
    case internvl.InternVLConfig():
      return internvl.InternVL(config, dtype, rngs=rngs)
    case qwen3_vl.Qwen3VLConfig():
      return qwen3_vl.Qwen3VL(config, dtype, rngs=rngs)
    case causal_lm.TextConfig():
      return causal_lm.TextModel(config, dtype, rngs=rngs)
    case t5.T5Config():
      return t5.T5Encoder(config, dtype, rngs=rngs)


def _shapes(config: Config, dtype, quantized: str) -> Encoder:
  shapes = jax.eval_shape(lambda: _initialised(config, dtype))
  return jax.eval_shape(lambda model: quantize.quantize(model, quantized == 'w8a8'), shapes) if quantized else shapes


def _read(folder: pathlib.Path, dtype, quantized: str) -> Encoder:
  def read(on_leaf=None):
    match _config(_config_json(folder), folder):
      case internvl.InternVLConfig():
        return internvl.load(folder, dtype, on_leaf)
      case qwen3_vl.Qwen3VLConfig():
        return qwen3_vl.load(folder, dtype, on_leaf)
      case causal_lm.TextConfig():
        return causal_lm.load(folder, dtype, on_leaf)
      case t5.T5Config():
        return t5.load(folder, dtype, on_leaf)

  return quantize.load(read, quantized)


def _fingerprint(folder: pathlib.Path, dtype, quantized: str) -> str:
  """Hash of the files of a checkpoint (names, sizes, times), of the rules and shapes, and of the converted form."""
  files = sorted(file for pattern in hub.TEXTS + hub.WEIGHTS for file in folder.glob(pattern))
  facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
  rules = (FORMAT, internvl.RULES, internvl.ORIGINAL_RULES, internvl.INTERNLM2_RULES, qwen3_vl.RULES, causal_lm.RULES,
           t5.RULES)
  config = _config(_config_json(folder), folder)
  shapes = [(jax.tree_util.keystr(path), leaf.shape, leaf.dtype.name)
            for path, leaf in jax.tree_util.tree_leaves_with_path(_shapes(config, dtype, quantized))]
  return hashlib.sha256(repr((facts, rules, config.to_json(), shapes, quantized)).encode()).hexdigest()[:24]


def _cache_entry(cache: pathlib.Path, fingerprint: str) -> tuple[pathlib.Path, bool]:
  """(folder of the converted form, whether it is there and whole), as process 0 sees it: file times differ by host."""
  whole = sharding.is_main_process() and _is_whole(cache / fingerprint)
  facts = np.frombuffer(bytes.fromhex(fingerprint) + bytes([whole]), np.uint8)
  if jax.process_count() > 1:
    facts = np.asarray(multihost_utils.broadcast_one_to_all(facts))
  return cache / facts[:-1].tobytes().hex(), bool(facts[-1])


def _is_whole(path: pathlib.Path) -> bool:
  """Whether a cache entry is there, every byte as it was written; one that is damaged is removed."""
  if not path.exists():
    return False
  problem = digests.damage(path)
  if not problem:
    return True
  logging.warning('%s is damaged or was not finished (%s): it is made again from the checkpoint', path, problem)
  shutil.rmtree(path, ignore_errors=True)
  return False


def _store(model: Encoder, path: pathlib.Path) -> None:
  from orbax.checkpoint.experimental import v1 as ocp  # slow to import, and loading without a cache needs none of it
  context = ocp.Context()
  context.array.saving.use_compression = False
  # Small arrays are written by one replica: dividing them among replicas compiles a program for every slice
  context.array.saving.min_slice_bytes_for_replica_parallel = 2 ** 24
  try:
    with context:
      ocp.save(path, model, custom_metadata={'config': json.dumps(model.config.to_json())})
  except ValueError:
    if not path.exists():  # else another run stored the same in the meantime
      raise
    return
  if sharding.is_main_process():
    with contextlib.suppress(FileNotFoundError):  # another run took the entry for an unfinished one
      digests.write(path)


def _restore(path: pathlib.Path, dtype, quantized: str) -> Encoder:
  from orbax.checkpoint.experimental import v1 as ocp
  config = _config(json.loads(ocp.metadata(path).custom_metadata['config']), path)
  return ocp.load(path, sharding.abstract(_shapes(config, dtype, quantized), jax.sharding.get_mesh()))  # pyrefly: ignore[bad-return]
