"""UniFusionPipeline: requests in, images out. The one path of the API, the command line, previews and evaluation.

  pipe = UniFusionPipeline.from_pretrained('tiny')
  result = pipe('make the circle blue', images='photo.png', num_images=4)
  result.images[0].save('blue.png')

`encode`: the VLM reads each request as a VERIFI prompt (verifi.py) and writes a rewrite; LAP turns its hidden states of
image tokens and written tokens into condition tokens. `denoise` integrates the flow, `decode` turns latents into
images. `Conditioning` may be edited between these phases.
"""

from collections.abc import Callable, Sequence
import dataclasses
import difflib
import functools
import operator
import os
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from unifusion_jax import conditioning as states
from unifusion_jax import denoising, flow, metadata, parts, prompting, remarks, sharding, wording
from unifusion_jax.conditioning import Conditioning
from unifusion_jax.data import imaging, transforms
from unifusion_jax.denoising import Kept
from unifusion_jax.errors import UserError
from unifusion_jax.models import dit, text_generation, unifusion
from unifusion_jax.request import check_ranges, LIMITS, METHODS, Request, requests_for, SampleConfig, shape_like
from unifusion_jax.weights import autoencoders, encoders, lora_files, quantize

TEXT_STREAM = 2 ** 32 - 1  # folded into a request's key to sample text; sampling steps fold in 0, 1, ...


@dataclasses.dataclass(frozen=True)
class Sample:
  """The image of one request."""
  image: np.ndarray  # uint8 [y x 3]
  rewrite: str       # text that conditioned it
  warning: str = ''  # why the VLM's rewrite was not used; '' when it was, or was not wanted
  remark: str = ''   # what the request asks for and the VLM's rewrite does not say (remarks.py); '' for nothing


@dataclasses.dataclass(frozen=True)
class Result:
  """Images of one call, with one entry each in every list, in the order of the prompts."""
  images: list[Image.Image]
  rewrites: list[str]   # text that conditioned each
  warnings: list[str]   # '' for none
  remarks: list[str]    # '' for none
  metadata: list[dict]  # all that made each: UniFusionPipeline.metadata

  @property
  def arrays(self) -> list[np.ndarray]:
    """The images as uint8 [y x 3]."""
    return [np.asarray(image) for image in self.images]


class Encoded(NamedTuple):
  """Conditioning of requests, with the text, the warning and the remark ('' for none) of each."""
  conditioning: Conditioning
  rewrites: list[str]
  warnings: list[str]
  remarks: list[str]


def _in_mesh(method):
  """Runs a method of the pipeline with its mesh in context."""
  @functools.wraps(method)
  def run(self, *args, **kwargs):
    with jax.set_mesh(self.mesh):
      return method(self, *args, **kwargs)
  return run


class UniFusionPipeline:
  """One model with its frozen VLM and autoencoder, on the mesh that holds its weights; every call enters that mesh.

  Programs are compiled once for every set of shapes. Rows are padded to a number that the devices share evenly, so `b`
  may be larger than the number of requests; a row does not depend on the others.
  """

  def __init__(self, model: unifusion.UniFusion, frozen: states.Frozen, prompt_encoder: transforms.PromptEncoder,
               settings: SampleConfig | None = None, size: int = 512, origin: dict | None = None,
               resolution_shift: flow.Points = flow.KREA2_SHIFT):
    """`frozen` has vlm, vae and taps; `settings` are the defaults of every call; `size` as in Description.

    origin: the names of the weights, for metadata and messages (`metadata.origin`).
    resolution_shift: of `flow.shift_for`, where the setting `shift` is 0.
    """
    self.mesh = jax.tree.leaves(model)[0].sharding.mesh
    self.model, self.frozen, self.prompt_encoder = model, frozen, prompt_encoder
    self.settings, self.size, self.origin = settings or SampleConfig(), size, origin or {}
    self.vocabulary = wording.Vocabulary.of(prompt_encoder.folder)
    self.resolution_shift = resolution_shift
    self._encoded = self._null = None  # what each was made of, and the last result

  @classmethod
  def from_pretrained(cls, name: str | os.PathLike = 'tiny', *, transformer: str | None = None,
                      vlm: str | None = None, vae: str | None = None, dtype: str = 'float32', quantized: str = '',
                      transformer_quantized: str = '', cache: str | None = None,
                      loras: Sequence[str] = ()) -> 'UniFusionPipeline':
    """Loads a pipeline from a folder or hub id, onto the mesh in context or else one over all devices.

    Args:
      name: 'tiny' for the embedded editing model; else the folder or hub id of a model with unifusion.json, or of a
        whole Krea 2 pipeline, as 'krea/Krea-2-Turbo' (docs/krea2.md).
      transformer: a folder, a hub id or a .safetensors file with Krea's keys or diffusers', instead of its own weights.
      vlm, vae: a folder, a hub id or 'tiny' to use instead of its own.
      dtype: 'float32' or 'bfloat16', of all weights and of the computation.
      quantized: of the VLM: '' for none, 'int8' for weights, 'w8a8' for activations too.
      transformer_quantized: the same for LAP, refiner and DiT.
      cache: a folder that keeps the converted VLM for the next start.
      loras: as in `add_loras`; merged before the transformer is quantised.

    Raises:
      UserError: for a folder without unifusion.json, and for parts that do not fit each other.
    """
    with jax.set_mesh(_mesh()):
      return cls.load(parts.locate(name, transformer=transformer, vlm=vlm, vae=vae), dtype=dtype, quantized=quantized,
                      transformer_quantized=transformer_quantized, cache=cache, loras=loras)

  @classmethod
  def load(cls, located: parts.Parts, *, dtype: str = 'float32', quantized: str = '', transformer_quantized: str = '',
           cache: str | None = None, settings: SampleConfig | None = None, loras: Sequence[str] = ()):
    """Reads the weights of located parts; the mesh must be in context. `settings`: in the place of the parts' own."""
    if dtype not in ('float32', 'bfloat16'):
      raise UserError(f"dtype={dtype!r} must be 'float32' or 'bfloat16'")
    if transformer_quantized not in encoders.QUANTIZED:
      raise UserError(f'transformer_quantized={transformer_quantized!r} must be one of '
                      f'{", ".join(map(repr, encoders.QUANTIZED))}')
    described, transformer, vlm, vae = located.described, located.transformer, located.vlm, located.vae
    origin = metadata.origin(located.name, vlm.name, vae.name, dtype, dtype, quantized, transformer_quantized)
    if transformer.name != located.name:
      origin['transformer'] = metadata.weights(transformer.name)
    frozen = states.Frozen(encoders.load(vlm.folder, jnp.dtype(dtype), quantized=quantized, cache=cache),
                           autoencoders.load(vae.folder, jnp.dtype(dtype)), described.taps)
    model = unifusion.load(transformer.folder, dataclasses.replace(located.config, dtype=dtype), jnp.dtype(dtype))
    model = lora_files.load(model, loras)
    origin |= dict(loras=list(loras)) if loras else {}
    if transformer_quantized:
      model = quantize.quantize(model, activations=transformer_quantized == 'w8a8')
    return cls(model, frozen, located.prompt_encoder, settings or SampleConfig().changed(**described.sample),
               described.size, origin, located.resolution_shift)

  @_in_mesh
  def add_loras(self, loras: Sequence[str], live: bool = False) -> None:
    """Merges LoRAs into the transformer: files, folders or hub ids; 'FILE:0.8' counts 0.8 times.

    With `live`, and where the weights are int8, they stay beside these. UserError as of `lora_files.read`.
    """
    if loras:
      adapters = [(lora_files.read(name, self.model), scale) for name, scale in map(lora_files.split, loras)]
      self.model = lora_files.apply(self.__dict__.pop('model'), adapters, live)  # which alone refers to it then
      self.origin = self.origin | dict(loras=[*self.origin.get('loras', []), *loras])
      self._encoded = self._null = None

  def __call__(self, prompt: str | Sequence[str] = '', images=None, *, num_images: int = 1, seed: int = 0,
               rewrite: str | None = None, height: int | None = None, width: int | None = None,
               callback: Callable[[int, int], None] | None = None, **settings) -> Result:
    """Samples `num_images` of every prompt.

    Args:
      prompt: one or several.
      images: the references of every prompt: a path, an array or a Pillow image, or several in the order shown.
      seed: of the first image; every further image takes the next number.
      rewrite: text to condition on instead of the VLM's rewrite.
      height, width: in pixels. One alone keeps the proportions of the first reference, or a square without references;
        with neither, the image has that shape and about `self.size` squared pixels.
      callback: called as callback(done, all) after each sampling step.
      **settings: of SampleConfig: negative_prompt, steps, guidance, method, eta, shift, verifi, system, temperature,
        top_p, tiles, image_tokens, reference_latents, stitch, strengths, precise, decode_tile, batch_size. None, as for
        every argument here, is the pipeline's own default.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not all(isinstance(text, str) for text in prompts):
      raise UserError(f'prompt={prompt!r} must be a text or a list of texts')
    if rewrite is not None:
      prompts = [text or rewrite for text in prompts]
    prompts = {f'prompt {i}' if len(prompts) > 1 else 'prompt': text for i, text in enumerate(prompts, 1)}
    empty = [place for place, text in prompts.items() if not text.strip()]
    if empty or not prompts:
      raise UserError(f'nothing to generate{f": {empty[0]} is empty" if len(prompts) > 1 else ""}: give a prompt, as '
                      "in pipe('make the circle blue', images='photo.png')")
    images = list(images) if isinstance(images, (list, tuple)) else [] if images is None else [images]
    references = tuple(imaging.read(image) for image in images)
    files = tuple(str(image) if isinstance(image, (str, os.PathLike)) else '' for image in images)
    arguments = [*self.settings.settings(), 'batch_size']
    for name in settings.keys() - set(arguments):
      near = difflib.get_close_matches(name, arguments, 1)
      hint = f'did you mean {near[0]!r}?' if near else f'there are {", ".join(arguments)}'
      raise UserError(f'there is no argument {name!r}: {hint}')
    s = self.settings.changed(num_images=num_images, seed=seed, height=height, width=width, **settings)
    if problems := s.problems(self.unit, ''):
      raise UserError('; '.join(problems))
    height, width = shape_like(references[0] if references else None, self.size, self.unit, s.height, s.width)
    requests = requests_for(prompts, references, s.num_images, s.seed, rewrite, files)
    prompting.check(self.prompt_encoder, requests, s, self._max_positions)
    s = s.changed(batch_size=min(s.batch_size, len(requests)))
    batches, samples = -(-len(requests) // s.batch_size), []
    for number, (part, rows) in enumerate(sharding.batched(requests, s.batch_size)):
      report = callback and (lambda done, steps, number=number: callback(number * steps + done, batches * steps))
      samples += self.generate(rows, height, width, settings=s, callback=report)[:len(part)]
    return Result([Image.fromarray(sample.image) for sample in samples], [sample.rewrite for sample in samples],
                  [sample.warning for sample in samples], [sample.remark for sample in samples],
                  [self.metadata(request, sample, s) for request, sample in zip(requests, samples)])

  @_in_mesh
  def generate(self, requests: list[Request], height: int, width: int, *, settings: SampleConfig | None = None,
               init_images=None, start: float = 1.0, callback: Callable[[int, int], None] | None = None
               ) -> list[Sample]:
    """Samples all requests as one batch of one size.

    Args:
      settings: instead of the pipeline's.
      init_images: uint8 [y x 3], one a request: sampling begins with these, noised to the time `start`, instead of
        with noise alone.
      callback: called as callback(done, steps) after each step; steps are then dispatched one by one.

    Raises:
      UserError: for a size that is no whole number of patches, settings out of range, text that is too long, and for
        latents or pixels that are not finite.
    """
    s = settings or self.settings
    check_ranges(start=start, **{name: value for name, value in vars(s).items() if name in LIMITS})
    self._check_size(height, width)
    if init_images is not None and [np.shape(x) for x in init_images] != [(height, width, 3)] * len(requests):
      raise UserError(f'init_images must be {len(requests)} images of shape {(height, width, 3)}, one for each request')
    conditioning, *texts = self._encode_once(requests, s, height, width)
    null = None if s.guidance == 1 else self.null(s.negative_prompt)
    seeds = [request.seed for request in requests]
    noise, kept = self.noise(seeds, height, width), None
    latents = noise if init_images is None else self.add_noise(init_images, noise, start)
    if s.precise:
      shown = {id(request.references): request.references[0] for request in requests}  # one for all those of a call
      shown = {key: imaging.region(s.precise, imaging.read(image), width, height) for key, image in shown.items()}
      sources, changes = zip(*(shown[id(request.references)] for request in requests))
      kept = self.kept(sources, changes, noise)
    times = self.times(height, width, steps=s.steps, shift=s.shift, start=start)
    size = 1 if callback else s.steps
    for first in range(0, s.steps, size):
      latents = self.denoise(conditioning, latents, times[first:first + size + 1], guidance=s.guidance, null=null,
                             method=s.method, eta=s.eta, seeds=seeds, first=first, kept=kept)
      if callback:
        callback(first + 1, s.steps)
    images = self.decode(latents, conditioning, s.decode_tile)[:len(requests)]
    if s.precise:
      images = np.where(np.stack(changes)[..., None], images, np.stack(sources))
    return [Sample(*each) for each in zip(images, *texts)]

  def _encode_once(self, requests: list[Request], s: SampleConfig, height: int, width: int) -> Encoded:
    """`encode` with `references`, or the last result: requests that differ in their seeds alone share it."""
    key = s.settings(), self.prompt_encoder, s.reference_latents and (height, width), [
        (request.instruction, request.rewrite, request.seed if s.temperature else 0) for request in requests]
    objects = self.model, self.frozen, *(request.references for request in requests)
    same = self._encoded and self._encoded[0] == key and all(map(operator.is_, self._encoded[1], objects))
    if not same:
      encoded, references = self.encode(requests, s), self.references(requests, height, width, s)
      conditioning = encoded.conditioning._replace(references=references)
      self._encoded = key, objects, encoded._replace(conditioning=conditioning)
    return self._encoded[2]

  @_in_mesh
  def encode(self, requests: list[Request], settings: SampleConfig | None = None) -> Encoded:
    """Conditioning of requests: the VLM writes a rewrite where none is given, and reads the given ones.

    An unusable rewrite (`prompting.read_rewrites`) is replaced by the request itself, with a warning. What the VLM
    wrote and did not keep of the request is a remark.
    """
    s = settings or self.settings
    rows = _padded(requests)
    prompts = prompting.Prompts.of(self.prompt_encoder, rows, s, self._max_positions)
    images = prompts.images and sharding.shard(prompting.stacked(prompts.images))
    answers = prompts.known(s.verifi)
    cut = prompts.cut(answers)
    written, failures = [None] * len(rows), {}
    conditioning = None
    if None in answers:
      conditioning, written, failures = self._write(prompts, images, s)
      failures = {i: reason for i, reason in failures.items() if answers[i] is None}
      answers = [prompting.RAW if i in failures else text for i, text in enumerate(answers)]
    if conditioning is None:
      conditioning = self._read(prompts.answered(answers), images)
    elif again := [i for i, text in enumerate(answers) if text is not None]:
      # Those rows alone, filled up to a power of two of what the devices share, so that few shapes are ever compiled
      least = sharding.padded_batch(1)
      _, rows_read = next(sharding.batched(again, min(len(rows), least << (-(-len(again) // least) - 1).bit_length())))
      laid_out = prompts.answered(answers)
      part = prompts.images and sharding.shard(prompting.stacked([prompts.images[i] for i in rows_read]))
      read = self._read([laid_out[i] for i in rows_read], part)
      place = np.array([rows_read.index(i) if i in again else -1 for i in range(len(rows))])
      conditioning = states.replace_rows(conditioning, read, sharding.shard(place))
    if any(strength != 1 for strength in s.strengths):
      counts = prompts.strengths(s.strengths, conditioning.mask.shape[1])
      conditioning = states.weighted(conditioning, sharding.shard(counts))
    rewrites = [row.instruction if text is prompting.RAW else new if text is None else text
                for row, text, new in zip(rows, answers, written)]
    warnings = [f'{failures[i]}: conditioned on the request itself' if i in failures else cut.get(i, '')
                for i in range(len(rows))]
    notes = [remarks.remark(row.instruction, new, len(row.references), self.vocabulary) if text is None else ''
             for row, text, new in zip(rows, answers, written)]
    return Encoded(conditioning, *(texts[:len(requests)] for texts in (rewrites, warnings, notes)))

  @_in_mesh
  def references(self, requests: list[Request], height: int, width: int, settings: SampleConfig | None = None
                 ) -> dit.References | None:
    """Clean latents of the references for images of a size: `references` of a Conditioning, which `encode` leaves None.

    None where the setting `reference_latents` is off or no request has any.
    """
    s, rows = settings or self.settings, _padded(requests)
    most = max(len(row.references) for row in rows)
    if not (s.reference_latents and most):
      return None
    # Requests that share their references, as those of one call do, share what is made of them
    shown = {id(row.references): row.references for row in rows}
    shown = {key: imaging.canvases([imaging.read(image) for image in images], most, height, width, self.unit)
             for key, images in shown.items()}
    images, mask = zip(*(shown[id(row.references)] for row in rows))
    strengths = None
    if any(strength != 1 for strength in s.strengths):
      strengths = sharding.shard(np.tile(np.array(s.strengths, np.float32), (len(rows), 1)))
    batch = dict(references=np.stack(images), reference_mask=np.stack(mask))
    return states.clean_references(self.frozen.vae, sharding.shard(batch), strengths)

  @_in_mesh
  def null(self, negative_prompt: str = '') -> Conditioning:
    """Null conditioning, for guidance: a text without images, one row on every device; computed once."""
    made_of = self.model, self.frozen, negative_prompt
    if self._null is None or not all(map(operator.is_, self._null[0], made_of)):
      row = prompting.null(self.prompt_encoder, negative_prompt)
      rows = sharding.shard(prompting.stacked([row] * sharding.padded_batch(1)))
      first = jax.tree.map(lambda x: x[:1], sharding.gather(self._read(rows, None)))
      self._null = made_of, jax.device_put(first, jax.NamedSharding(self.mesh, jax.P()))
    return self._null[1]

  @_in_mesh
  def noise(self, seeds: Sequence[int], height: int, width: int) -> jax.Array:
    """Noise latents [b y x c], each from its own seed alone, which may be any whole number."""
    self._check_size(height, width)
    vae = self.frozen.vae
    shape = height // vae.downsampling, width // vae.downsampling, vae.channels
    return sharding.shard(np.stack([_rng(seed).standard_normal(shape, np.float32) for seed in _padded(seeds)]))

  @_in_mesh
  def add_noise(self, images, noise: jax.Array, t: float) -> jax.Array:
    """Latents [b y x c] of images uint8 [y x 3], noised to the time t (1 is noise)."""
    check_ranges(t=t)
    return denoising.noised(self.frozen.vae, sharding.shard(np.stack(_padded(list(images)))), noise, jnp.float32(t))

  @_in_mesh
  def kept(self, images, changes, noise: jax.Array) -> Kept:
    """What of images uint8 [y x 3] stays, under the same noise at all times; changes: where it does not, bool [y x]."""
    rows = einops.reduce(np.stack(_padded(changes)), 'b (y i) (x j) -> b y x 1', 'max', i=self.frozen.vae.downsampling,
                         j=self.frozen.vae.downsampling)
    return Kept(self.add_noise(images, noise, 0.0), noise, sharding.shard(~rows))

  @_in_mesh
  def times(self, height: int, width: int, *, steps: int | None = None, shift: float | None = None,
            start: float = 1.0) -> jax.Array:
    """Sampling times [steps + 1] from `start` to 0 for images of a size."""
    steps, shift = (default if value is None else value
                    for value, default in ((steps, self.settings.steps), (shift, self.settings.shift)))
    check_ranges(steps=steps, shift=shift, start=start)
    tokens = (height // self.unit) * (width // self.unit)
    return flow.timesteps(steps, shift or flow.shift_for(tokens, self.resolution_shift), start)

  @_in_mesh
  def denoise(self, conditioning: Conditioning, latents: jax.Array, times: jax.Array, *,
              guidance: float | None = None, null: Conditioning | None = None, method: str | None = None,
              eta: float | None = None, seeds: Sequence[int] | None = None, first: int = 0,
              kept: Kept | None = None) -> jax.Array:
    """Integrates latents [b y x c] from times[0] to times[-1].

    `times` may be a part of a schedule: part after part gives the same result as the whole.

    Args:
      guidance, method, eta: None: the pipeline's.
      null: null conditioning; None: that of the pipeline's negative prompt. Not used at guidance 1.
      seeds: one a request, for the noise that an eta above 0 adds.
      first: index of times[0] in the whole schedule.
      kept: what stays, put in its place after each step.
    """
    s = self.settings
    guidance = s.guidance if guidance is None else guidance
    method, eta = s.method if method is None else method, s.eta if eta is None else eta
    check_ranges(guidance=guidance, eta=eta, first=first)
    if method not in METHODS or (eta and method == 'heun'):
      raise UserError(f"method={method!r} must be 'euler', or with eta=0 'heun'")
    if eta and seeds is None:
      raise UserError(f'eta={eta} renews noise between steps: give seeds=, one for each request, or eta=0')
    null = None if guidance == 1 else null or self.null(s.negative_prompt)
    return denoising.integrate(self.model, conditioning, null, latents, times, jnp.float32(guidance), jnp.float32(eta),
                     _keys(_padded(seeds)) if eta else None, jnp.int32(first), kept, method=method)

  @_in_mesh
  def decode(self, latents: jax.Array, conditioning: Conditioning | None = None, tile: int | None = None
             ) -> np.ndarray:
    """Latents [b y x c] -> images uint8 [b y x 3].

    conditioning: of these latents, only to find the reason where they are not finite, which is a UserError.
    tile: `SampleConfig.decode_tile`; None: the pipeline's.
    """
    tile = self.settings.decode_tile if tile is None else tile
    images, finite = sharding.gather(denoising.decode_latents(self.frozen.vae, latents, tile=tile))
    if conditioning is not None:
      finite['conditioning'] = sharding.gather(denoising.finite(conditioning))
    wrong = next((name for name in ('conditioning', 'latents', 'pixels') if not np.all(finite.get(name, True))), None)
    if wrong:
      vlm, model, vae = (self.origin.get(part, {}).get('name', 'in use') for part in ('vlm', 'model', 'vae'))
      weights = dict(conditioning=f'the VLM ({vlm}) or the transformer ({model}), which pools its states,',
                     latents=f'the transformer ({model})', pixels=f'the autoencoder ({vae})')[wrong]
      raise UserError(f'no image: its {wrong} came out as NaN or infinity, so the weights of {weights} hold such '
                      'numbers, or some too large for their dtype: take others, or float32')
    return images

  @property
  def reference_unit(self) -> int:
    """`transforms.GenerationExample.reference_unit` of the pipeline's settings."""
    return self.unit if self.settings.reference_latents else 0

  @property
  def unit(self) -> int:
    """Pixels that both sides of an image must be multiples of: one patch of latents."""
    return self.frozen.vae.downsampling * self.model.config.dit.patch

  def metadata(self, request: Request, sample: Sample, settings: SampleConfig) -> dict:
    """All that made an image, enough to make it again: `metadata.of`."""
    return metadata.of(self, request, sample, settings)

  def _check_size(self, height: int, width: int) -> None:
    if height % self.unit or width % self.unit or min(height, width) < self.unit:
      raise UserError(f'an image of {width}x{height} cannot be sampled: both sides must be multiples of {self.unit}')

  @property
  def _max_positions(self) -> int:
    return self.frozen.vlm.decoder.config.max_positions

  def _write(self, prompts: prompting.Prompts, images, s: SampleConfig):
    """Text generation: (conditioning from the states of that pass, texts, {row: why its text is unusable})."""
    chat, rows = prompts.encoder.chat, sharding.shard(prompting.stacked(prompts.unanswered()))
    keys = _keys([request.seed for request in prompts.requests], TEXT_STREAM) if s.temperature else None
    ids, lengths, _, prompt_hidden, hidden = text_generation.generate(
        self.frozen.vlm, rows['input_ids'], rows['attention_mask'], images, max_new=prompts.encoder.max_rewrite,
        stop_ids=chat.stop_ids, taps=self.frozen.taps, keep=rows['cond_index'],
        temperature=s.temperature, top_p=s.top_p, key=keys)
    conditioning = states.condition_written(self.model, prompt_hidden, hidden, lengths, rows['cond_mask'])
    return conditioning, *prompting.read_rewrites(chat, *sharding.gather((ids, lengths)))

  def _read(self, rows, images) -> Conditioning:
    """Conditioning of prompts with known answers, from one teacher-forced pass."""
    rows = sharding.shard(prompting.stacked(rows)) if isinstance(rows, list) else rows
    return states.condition_read(self.model, self.frozen.vlm, rows['input_ids'], rows['attention_mask'],
                                 rows['cond_index'], rows['cond_mask'], images, taps=self.frozen.taps)


def _mesh() -> jax.sharding.Mesh:
  """The mesh in context, or else one over all devices that shares out the batch."""
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return sharding.make_mesh(sharding.MeshConfig(data=-1, fsdp=1))
  if mesh.axis_names != sharding.AXES:
    raise UserError(f'the mesh in context has the axes {mesh.axis_names}: make it with sharding.make_mesh, which '
                    f'gives it {sharding.AXES}')
  return mesh


def _padded(items: Sequence) -> list:
  """Items, repeated up to a number that the devices share evenly."""
  return next(sharding.batched(items, sharding.padded_batch(len(items))))[1]


def _rng(seed: int) -> np.random.Generator:
  """The random numbers of any whole number, also below 0 or of more than 64 bits."""
  return np.random.default_rng(np.random.SeedSequence(abs(seed), spawn_key=(1,) if seed < 0 else ()))


def _keys(seeds: Sequence[int], stream: int | None = None) -> jax.Array:
  """Random keys [b], one for each seed (modulo 2^32); each `stream` is an independent set of them."""
  keys = jax.vmap(jax.random.key)(np.array([seed % 2 ** 32 for seed in seeds], np.uint32))
  if stream is not None:
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, stream)
  return jax.random.wrap_key_data(sharding.shard(np.asarray(jax.random.key_data(keys))))
