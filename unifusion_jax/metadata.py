"""Metadata of images: all that made one, enough to make the same again on a device of the same kind."""

import hashlib
import json
import re

import jax
import numpy as np

import unifusion_jax
from unifusion_jax import bucket
from unifusion_jax.data import imaging
from unifusion_jax.description import ASSETS
from unifusion_jax.request import Request, SampleConfig
from unifusion_jax.weights import hub

EMBEDDED = {(ASSETS / part).resolve(): 'tiny' for part in ('edit', 'vlm', 'vae')}  # as from_pretrained names them


def weights(name) -> dict[str, str]:
  """A checkpoint's name; of a folder or file its fingerprint too. A hub id has its commit in the name (hub.Pinned)."""
  folder = bucket.here(name)
  if not folder.exists():
    return dict(name=str(name))
  return dict(name=EMBEDDED.get(folder.resolve(), str(name)), fingerprint=hub.fingerprint(folder))


def origin(model, vlm, vae, dtype: str, frozen_dtype: str, quantized: str = '',
           transformer_quantized: str = '') -> dict:
  """Weights by name and fingerprint, their dtypes, and the quantisation of the VLM and of the transformer."""
  return dict(model=weights(model), vlm=weights(vlm), vae=weights(vae), dtype=dtype, frozen_dtype=frozen_dtype,
              quantized=quantized, transformer_quantized=transformer_quantized)


def of(pipe, request: Request, sample, settings: SampleConfig) -> dict:
  """Metadata of a pipeline's `Sample`.

  prompt: the request.  seed: as given.
  rewrite: the text that conditioned.  warning: why it is not the VLM's, '' for none.
  remark: what of the request it does not say, '' for none.
  settings: fields of SampleConfig. `rewrite` is the text that was given, if any, and `batch_size` the number of rows
    that were sampled together.
  references: file and digest of each.
  origin: `origin`, and what the pipeline knows of itself, the software and the devices.
  """
  height, width = sample.image.shape[:2]
  encoder = pipe.prompt_encoder
  used = dict(rewrite=request.rewrite, system=settings.system or encoder.system, width=width, height=height,
              batch_size=settings.batch_size, strengths=list(settings.strengths))
  pipeline = dict(taps=list(pipe.taps), max_prompt_tokens=encoder.max_prompt,
                  max_rewrite_tokens=encoder.max_rewrite, tiles=getattr(encoder.image_processor, 'tiles', 0),
                  size=pipe.size)
  software = dict(unifusion_jax=unifusion_jax.__version__, jax=jax.__version__,
                  device=pipe.mesh.devices.flat[0].device_kind, mesh=dict(pipe.mesh.shape))
  files = request.files or [''] * len(request.references)
  return dict(prompt=request.instruction, rewrite=sample.rewrite, warning=sample.warning,
              remark=sample.remark, seed=request.seed, settings=settings.settings() | used,
              references=[dict(file=file, digest=digest(image)) for image, file in zip(request.references, files)],
              origin=pipe.origin | pipeline | software)


def as_text(metadata: dict) -> dict[str, str]:
  """Metadata as the text entries of a PNG: what is no text in JSON; and `parameters`, for other tools."""
  own = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
  return dict(parameters=parameters(metadata)) | own


def parameters(metadata: dict) -> str:
  """Metadata in the form of AUTOMATIC1111's web UI, which Civitai and others read too.

  Request, negative prompt, and a line of keys and values (modules/infotext_utils.py there, at 0365002): a value with a
  comma, a colon or a line break is a JSON string. The hash is of our fingerprint or commit, not of a file.
  """
  settings, origin = metadata['settings'], metadata['origin']
  lines = [metadata['prompt']]
  if settings['negative_prompt']:
    lines.append(f'Negative prompt: {settings["negative_prompt"]}')
  sampler = {'euler': 'Euler a' if settings['eta'] else 'Euler', 'heun': 'Heun'}[settings['method']]
  values = {'Steps': settings['steps'], 'Sampler': sampler, 'CFG scale': f'{settings["guidance"]:g}',
            'Seed': metadata['seed'], 'Size': f'{settings["width"]}x{settings["height"]}'}
  if settings['eta']:
    values['Eta'] = f'{settings["eta"]:g}'
  if 'model' in origin:
    used = origin.get('transformer', origin['model'])
    name, fingerprint = used['name'], used.get('fingerprint')
    if fingerprint is None:  # a hub id at its commit
      name, _, fingerprint = name.partition('@')
    values['Model hash'] = fingerprint[:10]
    values['Model'] = name.rstrip('/').rpartition('/')[2].removesuffix('.safetensors')
  values['Version'] = f'unifusion_jax {unifusion_jax.__version__}'
  return '\n'.join([*lines, ', '.join(f'{key}: {_quoted(str(value))}' for key, value in values.items() if value != '')])


def _quoted(value: str) -> str:
  """A value of `parameters`."""
  return json.dumps(value, ensure_ascii=False) if re.search('[,:"\n]', value) else value


def digest(image) -> str:
  """A digest of an image's pixels, as `imaging.read` gives them."""
  pixels = np.ascontiguousarray(imaging.read(image))
  return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:16]
