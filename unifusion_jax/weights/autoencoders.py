"""Any supported autoencoder by name: a diffusers folder or a hub id, by the _class_name of its config.json.

All have the same methods: `encode` images [b y x 3] in [-1, 1] to latents [b y x c] of about unit variance, `decode`
them, `downsampling` (pixels per latent) and `channels` (c). Configurations have the last two as well, and `first_width`
(channels at an image's own resolution). Another one is a file in models/ and a line in `CLASSES`.
"""

import pathlib

from flax import nnx
import jax
import jax.numpy as jnp

from unifusion_jax import json_file, sharding
from unifusion_jax.errors import UserError
from unifusion_jax.models import flux2_vae, qwen_vae, vae
from unifusion_jax.weights import hub

Config = vae.VAEConfig | qwen_vae.QwenVAEConfig | flux2_vae.Flux2VAEConfig
Autoencoder = vae.Autoencoder | flux2_vae.Autoencoder
CLASSES = {'AutoencoderKL': (vae.VAEConfig, vae.Autoencoder, vae.load),  # by _class_name
           'AutoencoderKLQwenImage': (qwen_vae.QwenVAEConfig, vae.Autoencoder, qwen_vae.load),
           'AutoencoderKLFlux2': (flux2_vae.Flux2VAEConfig, flux2_vae.Autoencoder, flux2_vae.load)}
PRESETS = vae.PRESETS | qwen_vae.PRESETS | flux2_vae.PRESETS


def load(name, dtype=jnp.float32) -> Autoencoder:
  """The autoencoder in a folder (as `hub.pin` gave it) or behind a hub id, in `dtype`, on the mesh in context."""
  folder = hub.resolve(name)
  config(folder)  # a size that cannot be ends here
  _, _, load_class = _class(_config_json(folder), folder)
  return load_class(folder, dtype)


def config(name) -> Config:
  """Configuration of a folder, of a hub id, or of a public name in PRESETS; reads no weights."""
  if str(name) in PRESETS and not pathlib.Path(name).is_dir():
    return PRESETS[str(name)]
  folder = hub.resolve(name, weights=False)
  config_json = _config_json(folder)
  with json_file.named(folder / 'config.json'):
    config = _class(config_json, folder)[0].from_json(config_json)
    if wrong := config.problems():
      raise UserError('; '.join(wrong))
    return config


def abstract(config: Config, dtype=jnp.float32) -> Autoencoder:
  """The shapes and shardings, on the mesh in context, of the autoencoder with that configuration."""
  model = next(model for kind, model, _ in CLASSES.values() if isinstance(config, kind))
  shapes = jax.eval_shape(lambda: model(config, dtype, rngs=nnx.Rngs(0)))
  return sharding.abstract(shapes, jax.sharding.get_abstract_mesh())


def _config_json(folder: pathlib.Path) -> dict:
  path = folder / 'config.json'
  if not path.exists():
    raise UserError(f'{folder} has no config.json: give the folder of a diffusers autoencoder, the `vae` of a pipeline')
  return json_file.read(path)


def _class(config_json: dict, folder: pathlib.Path):
  name = config_json.get('_class_name')
  if name not in CLASSES:
    raise UserError(f'{folder}: an autoencoder of class {name!r} is not supported; supported are {", ".join(CLASSES)}')
  return CLASSES[name]
