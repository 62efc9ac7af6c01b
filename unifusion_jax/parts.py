"""Parts of a pipeline by one name: a folder, hub id or address with unifusion.json, or a Krea 2 pipeline of diffusers.

Krea 2's holds model_index.json and the folders transformer, text_encoder, tokenizer, vae and scheduler.
"""

import dataclasses
import math
import os
import pathlib

from unifusion_jax import description, flow, json_file, verifi
from unifusion_jax.data import transforms, vision_inputs
from unifusion_jax.description import ASSETS, Description
from unifusion_jax.errors import UserError
from unifusion_jax.models import qwen3_vl, unifusion
from unifusion_jax.weights import autoencoders, encoders, hub

INDEX = 'model_index.json'
TAPS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)  # of Qwen3-VL-4B, where the index of Krea 2 names none
TURBO_MU = 1.15  # log of the shift of Krea 2 Turbo, at every size (Krea2Pipeline)
# Steps and guidance of Krea's model cards; our guidance is theirs + 1
KREA2_RAW = dict(verifi=False, steps=52, guidance=4.5, shift=0.0)
KREA2_TURBO = dict(verifi=False, steps=8, guidance=1.0, shift=math.exp(TURBO_MU))
KREA2 = {'krea/Krea-2-Raw': KREA2_RAW, 'krea/Krea-2-Turbo': KREA2_TURBO}  # whose sizes are known without a file


@dataclasses.dataclass(frozen=True)
class Parts:
  """Folders of a pipeline's models, and the settings that belong to them; no weights are read yet.

  Attributes:
    name: of the whole.
    config: of the transformer; its dtype is a default.
    resolution_shift: points (tokens, mu) of `flow.shift_for`.
  """
  name: str
  described: Description
  transformer: hub.Pinned
  vlm: hub.Pinned
  vae: hub.Pinned
  config: unifusion.UniFusionConfig
  prompt_encoder: transforms.PromptEncoder
  resolution_shift: flow.Points = flow.KREA2_SHIFT

  @property
  def unit(self) -> int:
    """Pixels that both sides of an image must be multiples of: one patch of latents."""
    return autoencoders.config(self.vae.folder).downsampling * self.config.dit.patch

  @property
  def max_positions(self) -> int:
    """Positions of the VLM."""
    return encoders.config(self.vlm.folder).text.max_positions  # pyrefly: ignore[missing-attribute]


def locate(name: str | os.PathLike, *, transformer: str | None = None, vlm: str | None = None,
           vae: str | None = None, weights: bool = True) -> Parts:
  """The parts of a pipeline, downloaded where they are behind a hub id, and fitting each other.

  Arguments and errors as of `UniFusionPipeline.from_pretrained`. The mesh must be in context.

  weights: False: for sizes alone. Of other hub ids configurations and tokenizers are downloaded then; of a name in
    KREA2 nothing is, so its folders do not exist and its prompt encoder has no tokenizer.
  """
  given = {part: ASSETS / part if value == 'tiny' else value for part, value in (('vlm', vlm), ('vae', vae))}
  if not weights and str(name) in KREA2 and not pathlib.Path(name).is_dir():
    return _known(str(name), given, transformer)
  pinned = hub.pin(ASSETS / 'edit' if name == 'tiny' else name, weights=False)
  part = lambda name, entry: hub.pin(
      given.get(name) or description.part_of(name, entry, pinned.name, pinned.folder), weights)
  if (pinned.folder / INDEX).exists():
    return _krea2(pinned, part, transformer, weights)
  described = description.read(pinned.folder)
  model = hub.pin(transformer, weights, files=True) if transformer else hub.pin(pinned.name, weights)
  config = unifusion.read_config(pinned.folder)
  pinned_vlm, pinned_vae = part('vlm', described.vlm), part('vae', described.vae)
  prompt_encoder = transforms.PromptEncoder.load(
      pinned_vlm.folder, described.tiles, described.max_prompt_tokens, described.max_rewrite_tokens,
      system=described.system, layout=described.layout)
  parts = Parts(model.name, described, model, pinned_vlm, pinned_vae, config, prompt_encoder)
  _check(parts)
  return parts


def describe(folder: str | os.PathLike) -> Description:
  """The settings of a pipeline's folder; reads no weights."""
  folder = pathlib.Path(folder)
  return _index(folder)[0] if (folder / INDEX).exists() else description.read(folder)


def _index(folder: pathlib.Path) -> tuple[Description, int]:
  """(settings, latents along the sides of a patch) of a Krea 2 pipeline, from its index."""
  path = folder / INDEX
  index = json_file.read(path)
  if index.get('_class_name') != 'Krea2Pipeline':
    raise UserError(f"{path} is of a {index.get('_class_name')}: of diffusers' pipelines only Krea2Pipeline is read; "
                    'give a folder with unifusion.json, or krea/Krea-2-Raw or krea/Krea-2-Turbo')
  with json_file.named(path):
    taps, patch = tuple(index.get('text_encoder_select_layers') or TAPS), index.get('patch_size', 2)
    turbo = index.get('is_distilled', False)
  return _described(taps, KREA2_TURBO if turbo else KREA2_RAW), patch


def _described(taps: tuple[int, ...], sample: dict) -> Description:
  return Description('./text_encoder', './vae', taps, 1024, 1024, 512, 'faithful', 2, sample, 'krea2')


def _known(name: str, given: dict[str, str | None], transformer: str | None) -> Parts:
  """The parts of a name in KREA2 by the sizes that are known of it; those that are given, by their configurations."""
  known = dict(vlm=f'Qwen/{verifi.LAYOUTS["krea2"].vlm}', vae=f'{name}/vae')
  vlm, vae = (hub.pin(given[part], weights=False) if given[part] else
              hub.Pinned(known[part], pathlib.Path(known[part]), '') for part in ('vlm', 'vae'))
  described, model = _described(TAPS, KREA2[name]), transformer and hub.pin(transformer, False, files=True)
  config = unifusion.read_config(model.folder) if model else unifusion.from_json({})
  processor = vlm.folder if (vlm.folder / 'preprocessor_config.json').exists() else None
  images = vision_inputs.for_model(encoders.config(vlm.folder), described.tiles, processor)
  prompt_encoder = transforms.PromptEncoder(
      '', images, images.markers, described.max_prompt_tokens, described.max_rewrite_tokens, system=described.system,
      layout=verifi.LAYOUTS[described.layout])
  parts = Parts(name, described, model or hub.Pinned(name, pathlib.Path(name), ''), vlm, vae, config, prompt_encoder)
  _check(parts)
  return parts


def _krea2(pinned: hub.Pinned, part, transformer: str | None, weights: bool) -> Parts:
  """The parts of a pipeline of diffusers.

  part: `part(name, entry)` -> the pinned part at that entry; transformer: in the place of its own.
  """
  described, patch = _index(pinned.folder)
  vlm = part('vlm', described.vlm)
  vlm_config = encoders.config(vlm.folder)
  check_vlm(vlm.name, vlm_config, described.layout)
  model = hub.pin(transformer, weights, files=True) if transformer else part('transformer', './transformer')
  own = pinned.folder / 'transformer'  # has the sizes of a file
  config = unifusion.read_config(own if model.folder.suffix == '.safetensors' and own.is_dir() else model.folder, patch)
  vae = part('vae', described.vae)
  tokenizer, scheduler = (hub.pin(description.part_of(name, f'./{name}', pinned.name, pinned.folder), weights=False)
                          for name in ('tokenizer', 'scheduler'))
  prompt_encoder = transforms.PromptEncoder.load(
      tokenizer.folder, described.tiles, described.max_prompt_tokens, described.max_rewrite_tokens,
      system=described.system, vlm=vlm_config, layout='krea2')
  if (vlm.folder / 'preprocessor_config.json').exists():  # Krea's own has none, for it is shown no images
    prompt_encoder = dataclasses.replace(
        prompt_encoder, image_processor=vision_inputs.for_model(vlm_config, described.tiles, vlm.folder))
  parts = Parts(pinned.name, described, model, vlm, vae, config, prompt_encoder,
                _resolution_shift(scheduler.folder / 'scheduler_config.json'))
  _check(parts)
  return parts


def check_vlm(name: str, config: encoders.Config, layout: str) -> None:
  """UserError unless Krea 2's encoder is a Qwen3-VL: the language model of the same size loads, and gives rubbish."""
  wanted = verifi.LAYOUTS[layout].vlm
  if wanted and not isinstance(config, qwen3_vl.Qwen3VLConfig):
    raise UserError(f'{name} is no Qwen3-VL, and Krea 2 was trained with the states of {wanted}, which no other model '
                    'has: give its folder (vlm=)')


def _resolution_shift(path: pathlib.Path) -> flow.Points:
  """The points of the resolution shift in scheduler_config.json; UserError for another schedule than Krea 2's."""
  scheduler = json_file.read(path)
  wanted = dict(_class_name='FlowMatchEulerDiscreteScheduler', use_dynamic_shifting=True, time_shift_type='exponential')
  wrong = [f'{name}={scheduler.get(name)!r}' for name, value in wanted.items() if scheduler.get(name) != value]
  wrong += [f'{name}={scheduler[name]!r}' for name in (
      'shift_terminal', 'invert_sigmas', 'use_karras_sigmas', 'use_exponential_sigmas', 'use_beta_sigmas',
      'stochastic_sampling') if scheduler.get(name)]
  if wrong:
    raise UserError(f'{path}: {", ".join(wrong)} is no schedule of Krea 2, which is the exponential shift by '
                    'resolution: take the scheduler of its pipeline')
  with json_file.named(path):
    low, high = ((float(scheduler.get(f'{end}_image_seq_len', tokens)), float(scheduler.get(f'{end}_shift', mu)))
                 for end, (tokens, mu) in zip(('base', 'max'), flow.KREA2_SHIFT))
    return low, high


def _check(parts: Parts) -> None:
  """UserError where the parts do not fit each other."""
  vlm = encoders.config(parts.vlm.folder)
  check_vlm(parts.vlm.name, vlm, parts.described.layout)
  taps, lap, text = parts.described.taps, parts.config.lap, vlm.text  # pyrefly: ignore[missing-attribute]
  if len(taps) != lap.taps or list(taps) != sorted(set(taps)) or taps[0] < 0:
    raise UserError(f'{parts.name}: taps={list(taps)} must be {lap.taps} increasing layer numbers, as many as the '
                    'model pools')
  if taps[-1] > text.depth or text.width != lap.width:
    named = verifi.LAYOUTS[parts.described.layout].vlm or 'the VLM that it was trained with'
    raise UserError(f'{parts.vlm.name} has {text.depth} layers of width {text.width}, but {parts.name} pools layers '
                    f'{list(taps)} of width {lap.width}: give {named} (vlm=)')
  channels = autoencoders.config(parts.vae.folder).channels
  if channels != parts.config.dit.channels:
    raise UserError(f'{parts.vae.name} has {channels} latent channels and {parts.name} wants '
                    f'{parts.config.dit.channels}: give the autoencoder that it was trained with (vae=)')
