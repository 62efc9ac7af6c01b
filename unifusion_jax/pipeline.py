"""UniFusionPipeline: requests in, images out. The one path of the API, the command line, previews and evaluation.

  pipe = UniFusionPipeline.from_pretrained('tiny')
  result = pipe('make the circle blue', images='photo.png', num_images=4)
  result.images[0].save('blue.png')

`encode`: the VLM reads each request as a VERIFI prompt (verifi.py) and writes a rewrite; LAP turns its hidden states of
image tokens and written tokens into condition tokens. `denoise` integrates the flow, `decode` turns latents into
images. `Conditioning` may be edited between these phases.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import operator
import os
from typing import cast, NamedTuple, TypeVar

import einops
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from unifusion_jax import call, denoising, flow, metadata, parts, prompting, randomness, reading, sharding, turns
from unifusion_jax import conditioning as states
from unifusion_jax.conditioning import Conditioning
from unifusion_jax.data import imaging, transforms
from unifusion_jax.errors import UserError
from unifusion_jax.models import dit, unifusion
from unifusion_jax.request import check_ranges, LIMITS, METHODS, Request, requests_for, SampleConfig, shape_like
from unifusion_jax.weights import autoencoders, encoders, lora_files
from unifusion_jax.wording import Vocabulary

AHEAD = 64  # requests that the VLM reads before it leaves: for Krea 2, 4 to 60 MB of the host's memory each


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


_Method = TypeVar('_Method', bound=Callable)


def _in_mesh(method: _Method) -> _Method:
  """Runs a method of the pipeline with its mesh in context; UserError where the devices' memory is too small."""
  @functools.wraps(method)
  def run(self, *args, **kwargs):
    with jax.set_mesh(self.mesh), turns.enough_memory():
      return method(self, *args, **kwargs)
  return cast(_Method, run)


class UniFusionPipeline:
  """One model with its frozen VLM and autoencoder, on the mesh that holds its weights; every call enters that mesh.

  Programs are compiled once for every set of shapes. Rows are padded to a number that the devices share evenly, so `b`
  may be larger than the number of requests; a row does not depend on the others.
  """

  def __init__(self, model: unifusion.UniFusion, frozen: states.Frozen, prompt_encoder: transforms.PromptEncoder,
               settings: SampleConfig | None = None, size: int = 512, origin: dict | None = None,
               resolution_shift: flow.Points = flow.KREA2_SHIFT, in_turn: turns.Turns | None = None):
    """`frozen` has vlm, vae and taps; `settings` are the defaults of every call; `size` as in Description.

    origin: the names of the weights, for metadata and messages (`metadata.origin`).
    resolution_shift: of `flow.shift_for`, where the setting `shift` is 0.
    in_turn: loads 'vlm' and 'model' when they are needed; `model` and `frozen.vlm` are then shapes alone.
    """
    self.vae, self.taps, self.mesh = frozen.vae, frozen.taps, jax.tree.leaves(frozen.vae)[0].sharding.mesh
    self._model, self._vlm, self._in_turn = model, frozen.vlm, in_turn
    self.prompt_encoder, self.settings, self.size = prompt_encoder, settings or SampleConfig(), size
    self.origin, self.resolution_shift = origin or {}, resolution_shift
    self.vocabulary = Vocabulary.of(prompt_encoder.folder)
    self._reads, self._conditioned, self._null = [], None, None  # the last results, with what they were made of

  @classmethod
  def from_pretrained(cls, name: str | os.PathLike = 'tiny', *, transformer: str | None = None,
                      vlm: str | None = None, vae: str | None = None, dtype: str = 'float32', quantized: str = '',
                      transformer_quantized: str = '', cache: str | None = None, loras: Sequence[str] = (),
                      in_turn: bool = False) -> 'UniFusionPipeline':
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
      in_turn: for memory that does not hold VLM and transformer beside each other: each is loaded when it is needed,
        and leaves when the other one is. The autoencoder stays.

    Raises:
      UserError: for a folder without unifusion.json, and for parts that do not fit each other.
    """
    with jax.set_mesh(sharding.mesh_in_context()):
      return cls.load(parts.locate(name, transformer=transformer, vlm=vlm, vae=vae), dtype=dtype, quantized=quantized,
                      transformer_quantized=transformer_quantized, cache=cache, loras=loras, in_turn=in_turn)

  @classmethod
  @turns.enough_memory()
  def load(cls, located: parts.Parts, *, dtype: str = 'float32', quantized: str = '', transformer_quantized: str = '',
           cache: str | None = None, settings: SampleConfig | None = None, loras: Sequence[str] = (),
           in_turn: bool = False):
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
    origin |= dict(loras=list(loras)) if loras else {}
    config, dtype = dataclasses.replace(located.config, dtype=dtype), jnp.dtype(dtype)
    model = unifusion.shapes(transformer.folder, config)  # the files are whole, which is seen before anything slow
    adapters = lora_files.read_all(loras, model)
    merge = lambda later: functools.partial(lora_files.merge, [*adapters, *later])  # later: those of `Turns.give`
    load_model = lambda *later: unifusion.load(transformer.folder, config, dtype, transformer_quantized, merge(later))
    load_vlm = functools.partial(encoders.load, vlm.folder, dtype, quantized=quantized, cache=cache)
    if in_turn:
      vlm = encoders.abstract(encoders.config(vlm.folder), dtype, quantized)
    else:
      model, vlm = load_model(), load_vlm()
    return cls(model, states.Frozen(vlm, autoencoders.load(vae.folder, dtype), described.taps), located.prompt_encoder,
               settings or SampleConfig().changed(**described.sample), described.size, origin,
               located.resolution_shift, turns.Turns(dict(vlm=load_vlm, model=load_model)) if in_turn else None)

  @property
  @_in_mesh
  def model(self) -> unifusion.UniFusion:
    """The transformer; where models take turns, the VLM leaves for it."""
    return self._in_turn.take('model') if self._in_turn else self._model

  @property
  @_in_mesh
  def vlm(self) -> encoders.Encoder:
    """The VLM; where models take turns, the transformer leaves for it."""
    return self._in_turn.take('vlm') if self._in_turn else self._vlm

  @property
  @_in_mesh
  def frozen(self) -> states.Frozen:
    """VLM, autoencoder and taps."""
    return states.Frozen(self.vlm, self.vae, self.taps)

  @_in_mesh
  def add_loras(self, loras: Sequence[str], live: bool = False) -> None:
    """Merges LoRAs into the transformer: files, folders or hub ids; 'FILE:0.8' counts 0.8 times.

    With `live`, and where the weights are int8, they stay beside these; where models take turns, all are merged as the
    weights are read. UserError as of `lora_files.read`.
    """
    if loras:
      adapters = lora_files.read_all(loras, self._model)
      if self._in_turn:
        self._in_turn.give('model', *adapters)
      else:
        self._model = lora_files.apply(self.__dict__.pop('_model'), adapters, live)  # which alone refers to it then
      self.origin = self.origin | dict(loras=[*self.origin.get('loras', []), *loras])
      self._conditioned = self._null = None

  def __call__(self, prompt: str | Sequence[str] = '', images=None, *, num_images: int | None = None, seed=None,
               rewrite: str | None = None, height: int | None = None, width: int | None = None,
               callback: Callable[[int, int], None] | None = None, **settings) -> Result:
    """Samples `num_images` (1) of every prompt.

    Args:
      prompt: one or several.
      images: the references of every prompt: a path, an array or a Pillow image, or several in the order shown.
      seed: of the first image (0), every further image takes the next number; or a list with one for each. A whole
        number, or as of `randomness.seeds` a generator of torch or NumPy, or a key of jax.
      rewrite: text to condition on instead of the VLM's rewrite.
      height, width: in pixels. One alone keeps the proportions of the first reference, or a square without references;
        with neither, the image has that shape and about `self.size` squared pixels.
      callback: called as callback(done, all) after each sampling step.
      **settings: of SampleConfig: negative_prompt, steps, guidance, method, eta, shift, verifi, system, temperature,
        top_p, tiles, image_tokens, reference_latents, stitch, strengths, precise, decode_tile, batch_size. None, as for
        every argument here, is the pipeline's own default. And diffusers' names: image, num_images_per_prompt,
        generator and num_inference_steps are images, num_images, seed and steps; guidance_scale is guidance, for Krea 2
        counted as in Krea2Pipeline, which has one less; 1 (of Krea 2 0) and below are no guidance.

    Raises:
      UserError: for arguments that cannot be, before anything is sampled; and for what stops it later. Every error that
        does has the Result of the images that were there by then as its `result`.
    """
    given = call.named(dict(images=images, num_images=num_images, seed=seed, height=height, width=width) | settings,
                       self.prompt_encoder.layout.guidance_off)
    prompts, seed = call.prompts(prompt, rewrite), given.pop('seed', 0)
    references, files = call.references(given.pop('images', ()))
    s = self.settings.changed(**dict(num_images=1) | given)
    if problems := s.problems(self.unit, ''):
      raise UserError('; '.join(problems))
    height, width = shape_like(references[0] if references else None, self.size, self.unit, s.height, s.width)
    seeds = randomness.seeds(seed, len(prompts) * s.num_images)
    requests = requests_for(prompts, references, s.num_images, seeds, rewrite, files)
    prompting.check(self.prompt_encoder, requests, s, self.max_positions)
    s = s.changed(batch_size=min(s.batch_size, len(requests)))
    samples = []
    try:
      for _, batch in self.batches(requests, height, width, settings=s, callback=callback):
        samples += batch
    except BaseException as error:  # Ctrl-C too
      error.result = self._result(requests, samples, s)  # pyrefly: ignore[missing-attribute]
      if samples:
        error.add_note(f'{len(samples)} of {len(requests)} images were there by then: `result` of this error')
      raise
    return self._result(requests, samples, s)

  def _result(self, requests: list[Request], samples: list[Sample], s: SampleConfig) -> Result:
    return Result([Image.fromarray(sample.image) for sample in samples], [sample.rewrite for sample in samples],
                  [sample.warning for sample in samples], [sample.remark for sample in samples],
                  [self.metadata(request, sample, s) for request, sample in zip(requests, samples)])

  def batches(self, requests: list[Request], height: int, width: int, *, settings: SampleConfig | None = None,
              callback: Callable[[int, int], None] | None = None,
              preview: Callable | None = None) -> Iterator[tuple[list[Request], list[Sample]]]:
    """(requests, samples) of each batch of `batch_size` rows, as soon as it is there; arguments as of `generate`.

    Where models take turns, the VLM reads AHEAD requests, whose states wait on the host, before the transformer comes.
    callback: counts the steps of all batches.
    """
    s = settings or self.settings
    batches = list(sharding.batched(requests, s.batch_size))
    together = max(1, AHEAD // s.batch_size) if self._in_turn else 1
    for number, (part, rows) in enumerate(batches):
      if number % together == 0 and self._in_turn:
        for _, later in batches[number:number + together]:
          self._read_once(later, s)
      report = callback and (lambda done, steps, number=number: callback(number * steps + done, len(batches) * steps))
      yield part, self.generate(rows, height, width, settings=s, callback=report, preview=preview)[:len(part)]

  @_in_mesh
  def generate(self, requests: list[Request], height: int, width: int, *, settings: SampleConfig | None = None,
               init_images=None, start: float = 1.0, callback: Callable[[int, int], None] | None = None,
               preview: Callable | None = None) -> list[Sample]:
    """Samples all requests as one batch of one size.

    Args:
      settings: instead of the pipeline's.
      init_images: uint8 [y x 3], one a request: sampling begins with these, noised to the time `start`, instead of
        with noise alone.
      callback: called as callback(done, steps) when each step is done; steps are then dispatched one by one.
      preview: called as preview(done, look) after each step but the last: look() are the images, uint8 [b y x 3], that
        one step from there to the end makes.

    Raises:
      UserError: for a size that is no whole number of patches, settings out of range, text that is too long, and for
        latents or pixels that are not finite.
    """
    s = settings or self.settings
    check_ranges(start=start, **{name: value for name, value in vars(s).items() if name in LIMITS})
    self._check_size(height, width)
    if init_images is not None and [np.shape(x) for x in init_images] != [(height, width, 3)] * len(requests):
      raise UserError(f'init_images must be {len(requests)} images of shape {(height, width, 3)}, one for each request')
    read = self._read_once(requests, s)
    null = None if s.guidance == 1 else self.null(s.negative_prompt)  # the VLM is still there
    conditioning = self._condition_once(read, requests, height, width, s)
    seeds = [request.seed for request in requests]
    noise, kept, sources, changes = self.noise(seeds, height, width), None, (), ()
    latents = noise if init_images is None else self.add_noise(init_images, noise, start)
    if s.precise:
      shown = {id(request.references): request.references[0] for request in requests}  # one for all those of a call
      shown = {key: imaging.region(s.precise, imaging.read(image), width, height) for key, image in shown.items()}
      sources, changes = zip(*(shown[id(request.references)] for request in requests))
      kept = self.kept(sources, changes, noise)
    times = self.times(height, width, steps=s.steps, shift=s.shift, start=start)
    size = 1 if callback or preview else s.steps
    denoise = functools.partial(self.denoise, conditioning, guidance=s.guidance, null=null, method=s.method, eta=s.eta,
                                seeds=seeds, kept=kept)
    for first in range(0, s.steps, size):
      latents, done = denoise(latents, times[first:first + size + 1], first=first), first + size
      if callback:
        latents.block_until_ready()
        callback(done, s.steps)
      if preview and done < s.steps:
        ends = times[np.array([done, -1])]
        preview(done, lambda: self.decode(denoise(latents, ends, first=done), tile=s.decode_tile)[:len(requests)])
    images = self.decode(latents, conditioning, s.decode_tile)[:len(requests)]
    if s.precise:
      images = np.where(np.stack(changes)[..., None], images, np.stack(sources))
    return [Sample(*each) for each in zip(images, read.rewrites, read.warnings, read.remarks)]

  @_in_mesh
  def encode(self, requests: list[Request], settings: SampleConfig | None = None) -> Encoded:
    """Conditioning of requests: the VLM writes a rewrite where none is given, and reads the given ones.

    An unusable rewrite (`prompting.read_rewrites`) is replaced by the request itself, with a warning. What the VLM
    wrote and did not keep of the request is a remark.
    """
    read = self._read_requests(requests, settings or self.settings)
    return Encoded(self._condition(read), *(texts[:len(requests)] for texts in (
        read.rewrites, read.warnings, read.remarks)))

  @_in_mesh
  def write(self, requests: list[Request], settings: SampleConfig | None = None) -> list[tuple[str, str, str]]:
    """(rewrite, warning, remark) of each request. `generate` of the same requests goes on from there."""
    read = self._read_once(requests, settings or self.settings)
    return list(zip(read.rewrites, read.warnings, read.remarks))[:len(requests)]

  @_in_mesh
  def _read_once(self, requests: list[Request], s: SampleConfig) -> reading.Read:
    """`_read_requests`, or its result of before: requests that differ in their seeds alone share it."""
    key = s.settings(), self.prompt_encoder, [
        (request.instruction, request.rewrite, request.seed if s.temperature else 0) for request in requests]
    references = [request.references for request in requests]
    entry = next((entry for entry in self._reads if entry[0] == key and all(map(operator.is_, entry[1], references))),
                 None) or (key, references, self._read_requests(requests, s))
    most = max(1, AHEAD // len(requests)) if self._in_turn else 1
    self._reads = [*(other for other in self._reads if other is not entry), entry][-most:]
    return entry[2]

  def _condition_once(self, read: reading.Read, requests: list[Request], height: int, width: int, s: SampleConfig
                      ) -> Conditioning:
    """`_condition` with `references`, or the last result."""
    key = read, s.reference_latents and (height, width)
    if self._conditioned is None or self._conditioned[0][0] is not read or self._conditioned[0][1] != key[1]:
      conditioning = self._condition(read)
      self._conditioned = key, conditioning._replace(references=self.references(requests, height, width, s))
    return self._conditioned[1]

  def _condition(self, read: reading.Read) -> Conditioning:
    conditioning = states.condition(self.model, sharding.shard(read.states))
    return conditioning if read.strengths is None else states.weighted(conditioning, sharding.shard(read.strengths))

  def _read_requests(self, requests: list[Request], s: SampleConfig) -> reading.Read:
    """The VLM's half of `encode`; where models take turns, the states wait on the host."""
    prompts = prompting.Prompts.of(self.prompt_encoder, sharding.padded(requests), s, self.max_positions)
    read = reading.read(self.vlm, self.taps, prompts, s, self.vocabulary)
    return read._replace(states=sharding.gather(read.states)) if self._in_turn else read

  @_in_mesh
  def references(self, requests: list[Request], height: int, width: int, settings: SampleConfig | None = None
                 ) -> dit.References | None:
    """Clean latents of the references for images of a size: `references` of a Conditioning, which `encode` leaves None.

    None where the setting `reference_latents` is off or no request has any.
    """
    s, rows = settings or self.settings, sharding.padded(requests)
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
    return states.clean_references(self.vae, sharding.shard(batch), strengths)

  @_in_mesh
  def null(self, negative_prompt: str = '') -> Conditioning:
    """Null conditioning, for guidance: a text without images, one row on every device; computed once."""
    if self._null is None or self._null[0] != negative_prompt:
      rows = [prompting.null(self.prompt_encoder, negative_prompt)] * sharding.padded_batch(1)
      read = reading.states_of(self.vlm, self.taps, rows, None)
      first = jax.tree.map(lambda x: x[:1], sharding.gather(states.condition(self.model, read)))
      self._null = negative_prompt, jax.device_put(first, jax.NamedSharding(self.mesh, jax.P()))
    return self._null[1]

  @_in_mesh
  def noise(self, seeds: Sequence[int], height: int, width: int) -> jax.Array:
    """Noise latents [b y x c], each from its own seed alone, which may be any whole number."""
    self._check_size(height, width)
    vae = self.vae
    shape = height // vae.downsampling, width // vae.downsampling, vae.channels
    rows = [randomness.generator(seed).standard_normal(shape, np.float32) for seed in sharding.padded(seeds)]
    return sharding.shard(np.stack(rows))

  @_in_mesh
  def add_noise(self, images, noise: jax.Array, t: float) -> jax.Array:
    """Latents [b y x c] of images uint8 [y x 3], noised to the time t (1 is noise)."""
    check_ranges(t=t)
    return denoising.noised(self.vae, sharding.shard(np.stack(sharding.padded(list(images)))), noise, jnp.float32(t))

  @_in_mesh
  def kept(self, images, changes, noise: jax.Array) -> denoising.Kept:
    """What of images uint8 [y x 3] stays, under the same noise at all times; changes: where it does not, bool [y x]."""
    rows = einops.reduce(np.stack(sharding.padded(changes)), 'b (y i) (x j) -> b y x 1', 'max', i=self.vae.downsampling,
                         j=self.vae.downsampling)
    return denoising.Kept(self.add_noise(images, noise, 0.0), noise, sharding.shard(~rows))

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
              kept: denoising.Kept | None = None) -> jax.Array:
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
                     randomness.keys(sharding.padded(seeds)) if eta else None, jnp.int32(first), kept, method=method)

  @_in_mesh
  def decode(self, latents: jax.Array, conditioning: Conditioning | None = None, tile: int | None = None
             ) -> np.ndarray:
    """Latents [b y x c] -> images uint8 [b y x 3].

    conditioning: of these latents, only to find the reason where they are not finite, which is a UserError.
    tile: `SampleConfig.decode_tile`; None: the pipeline's.
    """
    tile = self.settings.decode_tile if tile is None else tile
    images, finite = sharding.gather(denoising.decode_latents(self.vae, latents, tile=tile))
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
    return self.vae.downsampling * self._model.config.dit.patch

  def metadata(self, request: Request, sample: Sample, settings: SampleConfig) -> dict:
    """All that made an image, enough to make it again: `metadata.of`."""
    return metadata.of(self, request, sample, settings)

  def _check_size(self, height: int, width: int) -> None:
    if height % self.unit or width % self.unit or min(height, width) < self.unit:
      raise UserError(f'an image of {width}x{height} cannot be sampled: both sides must be multiples of {self.unit}')

  @property
  def max_positions(self) -> int:
    """Positions of the VLM."""
    return self._vlm.decoder.config.max_positions  # pyrefly: ignore[missing-attribute]
