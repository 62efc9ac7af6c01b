"""Flow matching: trains the DiT, LAP and refiner by rectified flow, conditioned on a frozen VLM.

With `lora.rank` the parameters in training are adapters alone, {path: lora.Factors}, and the model in `config.init` is
their frozen base.
"""

import dataclasses
import math
import pathlib
from typing import Any

from absl import logging
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax import conditioning, description, flow, json_file, pipeline, ranges, sharding
from unifusion_jax.commands import sample
from unifusion_jax.data import imaging, loader, transforms
from unifusion_jax.errors import UserError
from unifusion_jax.evaluation import flow_loss
from unifusion_jax.models import internvl, layers, text_generation, unifusion
from unifusion_jax.objectives import repa
from unifusion_jax.ranges import Range
from unifusion_jax.request import SampleConfig
from unifusion_jax.sharding import BATCH
from unifusion_jax.weights import autoencoders, encoders, lora, lora_files, quantize
from unifusion_jax.weights.lora import Factors, LoRAConfig

PREVIEWED = 8  # rows of a preview
MEASURED = 64  # records of data.held_out


@dataclasses.dataclass
class FlowMatching:
  """Flow-matching loss and the dropout rates of its condition, for classifier-free guidance."""
  mean: float = 0.0              # of the logit-normal times
  std: float = 1.0
  shift: float = 1.0             # resolution shift of the times: 2, 3, 4 at 256, 512, 1024 px (Iris-3B)
  noises_per_example: int = 1    # (time, noise) pairs of an example, which share all work before the DiT
  cond_dropout: float = 0.1      # share of examples with the null condition
  image_dropout: float = 0.05    # share of examples with references whose image tokens, and clean ones, are masked
  text_dropout: float = 0.05     # share of examples with references whose text is left empty
  instruction_prob: float = 0.0  # share of examples conditioned on the instruction instead of a rewrite
  rewrite_online: bool = False   # the VLM rewrites during training (slow) instead of captions or --mode=rewrite
  repa_weight: float = 0.0       # weight of the REPA term (objectives/repa.py); 0: none, and no head
  repa_depth: int = 0            # DiT blocks before the states that REPA aligns
  reference_latents: bool = False  # clean latents of the references are tokens of the DiT too
  lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)  # adapters in the place of the whole model

  tasks = ('t2i', 'edit', 'reconstruct')
  tokenizers = ()

  @property
  def pretrained(self) -> tuple[str, ...]:
    """Settings that name folders which it reads at every start."""
    return ('vlm', 'vae', 'init') if self.lora.rank else ('vlm', 'vae')

  def unit(self, config) -> int:
    """Pixels that both sides of an image must be multiples of: one patch of latents."""
    patch = config.model.dit.patch if isinstance(config.model, unifusion.UniFusionConfig) else 1
    return autoencoders.config(config.vae).downsampling * patch

  def problems(self, config, devices: int) -> list[str]:
    """Settings that cannot work together, a sentence each."""
    if not isinstance(config.model, unifusion.UniFusionConfig):
      return [f'flow matching trains a UniFusion model, not a {type(config.model).__name__}']
    lap, dit, share = config.model.lap, config.model.dit, Range(0, 1)
    checks = {
        f'taps={config.taps} are {len(config.taps)} layers but model.lap.taps={lap.taps}': len(config.taps) == lap.taps,
        f'taps={config.taps} must rise': list(config.taps) == sorted(set(config.taps)),
        f"taps={config.taps} must begin with 0: model.fusion='text' reads the VLM's token embeddings":
            config.model.fusion != 'text' or config.taps[:1] == (0,),
        f"vlm_quantized={config.vlm_quantized!r} must be '', 'int8' or 'w8a8'":
            config.vlm_quantized in encoders.QUANTIZED,
        f'objective.rewrite_online rewrites during training, but data.rewrites={config.data.rewrites} names stored '
        'rewrites: leave one of them out': not (self.rewrite_online and config.data.rewrites),
        f'objective.repa_depth={self.repa_depth} must be one of the {dit.depth} blocks that model.dit.depth counts':
            not self.repa_weight or 0 < self.repa_depth <= dit.depth,
        f'objective.lora.rank={self.lora.rank} trains adapters of a model: name its folder or hub id (init=...)':
            bool(config.init or not self.lora.rank),
        f'objective.lora.rank={self.lora.rank} and objective.repa_weight={self.repa_weight}: REPA helps a model that '
        'is trained from the start; set one of them to 0': not (self.lora.rank and self.repa_weight)}
    wrong = [text for text, holds in checks.items() if not holds] + self.lora.problems('objective.lora.')
    return wrong + ranges.problems(
        self, 'objective.', mean=Range(-20, 20), std=Range(0, 20), shift=Range(above=0, most=1000),
        noises_per_example=Range(1, 1000), cond_dropout=share, image_dropout=share, text_dropout=share,
        instruction_prob=share, repa_weight=Range(0, 10 ** 6), repa_depth=Range(0, 1000))

  def init(self, config):
    """Initial parameters: random ones, or those of `config.init`. A REPA head is always initialised anew."""
    if config.init:
      _warn_of_distilled(config)
    if self.lora.rank or not config.init:
      return jax.jit(lambda: self.random(config))()
    model = self.load(config, config.init)
    if not self.repa_weight:
      return model
    params: Any = jax.jit(lambda: self.random(config))()
    params.model = model
    return params

  def random(self, config) -> 'unifusion.UniFusion | repa.WithREPA | dict[str, Factors]':
    """Randomly initialised parameters; traceable. Adapters change nothing at first."""
    if self.lora.rank:
      return lora.init(_shapes(config), self.lora, config.seed)
    rngs = nnx.Rngs(config.seed)
    if not self.repa_weight:
      return unifusion.UniFusion(config.model, rngs=rngs)
    encoder = encoders.config(config.vlm)
    if not isinstance(encoder, internvl.InternVLConfig):
      raise UserError(f'objective.repa_weight={self.repa_weight} aligns with the vision tower of an InternVL, which '
                      f'{config.vlm} is not: set it to 0')
    return repa.WithREPA(config.model, encoder.vision.width, rngs=rngs)

  def load(self, config, folder: str) -> 'unifusion.UniFusion | dict[str, Factors]':
    """The model in a checkpoint folder; with `lora.rank` the adapters there, new ones where it is that of the base."""
    if not self.lora.rank:
      return unifusion.load(folder, config.model)
    params = jax.jit(lambda: self.random(config))()
    if (pathlib.Path(folder) / lora_files.FILE).exists():
      return lora_files.factors(lora_files.read(folder, _shapes(config)), params, self.lora)
    if pathlib.Path(folder) != pathlib.Path(config.init):
      raise UserError(f'{folder} has no {lora_files.FILE}, and this recipe trains adapters of init={config.init}: give '
                      'the export of such a run')
    return params

  def export(self, config, params, folder) -> None:
    """Writes the model alone, in bfloat16 as such models are published, and unifusion.json beside it.

    With `lora.rank` the adapters alone, as they are, in diffusers' naming.
    """
    if self.lora.rank:
      lora_files.save(params, self.lora, _shapes(config), folder)
      return
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), self.model(params, None))
    unifusion.save(model, folder)
    description.save(folder, dataclasses.replace(config, sample=self.sample_settings(config)))

  def frozen(self, config) -> conditioning.Frozen:
    """VLM and autoencoder, and the base of adapters; UserError where they do not fit the model."""
    frozen = conditioning.Frozen.load(config)
    if not self.lora.rank:
      return frozen
    base = unifusion.load(config.init, config.model, jnp.dtype(config.frozen_dtype), self.lora.quantized)
    return dataclasses.replace(frozen, base=base)

  def abstract_frozen(self, config) -> conditioning.Frozen:
    """The shapes of `frozen` on the abstract mesh in context; reads no weights."""
    frozen = conditioning.Frozen.abstract(config)
    if not self.lora.rank:
      return frozen
    base = _shapes(config, jnp.dtype(config.frozen_dtype))
    base = jax.eval_shape(quantize.quantize, base) if self.lora.quantized else base
    return dataclasses.replace(frozen, base=sharding.abstract(base, jax.sharding.get_abstract_mesh()))

  def model(self, params, frozen: conditioning.Frozen, key: jax.Array | None = None) -> unifusion.UniFusion:
    """The model of parameters in training; `key` is that of the adapters' dropout, None for none."""
    if self.lora.rank:
      return lora.join(frozen.base, params, self.lora, key)
    return params.model if isinstance(params, repa.WithREPA) else params

  def transform(self, config) -> transforms.GenerationExample:
    """Record -> arrays of one example."""
    return transforms.GenerationExample(
        transforms.prompt_encoder(config), self.cond_dropout, self.image_dropout, self.text_dropout,
        self.instruction_prob, self.rewrite_online, self._reference_unit(config))

  def _reference_unit(self, config) -> int:
    return self.unit(config) if self.reference_latents else 0

  def batch_spec(self, config, references: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of the largest batch of the train step, of examples with that many references."""
    encoder = transforms.abstract_prompt_encoder(config)
    transform = transforms.GenerationExample(encoder, rewrite_online=self.rewrite_online,
                                             reference_unit=self._reference_unit(config))
    return loader.batch_spec(transform.spec(config.data.size, config.data.size, references), config.data.batch_size)

  def tokens(self, config, batch) -> int:
    """Tokens that the DiT reads of a batch, padding too, once for each noise.

    Image patches and condition tokens, and the patches of clean references.
    """
    rows, height, width, _ = batch['target'].shape
    condition = batch['cond_index'].shape[1]
    if 'reference_mask' in batch:
      condition += math.prod(batch['reference_mask'].shape[1:])
    if self.rewrite_online:
      condition += config.data.budget[1] + batch['fallback_index'].shape[1]
    return rows * self.noises_per_example * (height * width // self.unit(config) ** 2 + condition)

  def pipeline(self, config, params, frozen) -> pipeline.UniFusionPipeline:
    """Pipeline around parameters in training or just loaded."""
    return pipeline.UniFusionPipeline(self.model(params, frozen), frozen, transforms.prompt_encoder(config),
                                     self.sample_settings(config), config.data.size)

  def sample_settings(self, config) -> SampleConfig:
    """Those of the configuration, with clean references where the model learns to read them."""
    return config.sample.changed(reference_latents=self.reference_latents or config.sample.reference_latents)

  def preview(self, config):
    """`preview(params, frozen)` -> uint8 grid of test requests: references, request, rewrite, result, target."""
    records = loader.preview_records(config.data, PREVIEWED, transforms.prompt_encoder(config).fits)

    def preview(params, frozen):
      return sample.preview_grid(self.pipeline(config, params, frozen), records) if records else None
    return preview

  def measure(self, config):
    """`measure(params, frozen)` -> the flow loss on the first records of `data.held_out`, its mean and by time."""
    named, _ = loader.held_out(config.data)
    (source,) = named.values()
    batches = [batch._replace(records=()) for batch in flow_loss.batches(  # which may be large photographs
        source, transforms.prompt_encoder(config), MEASURED, config.data.batch_size, self._reference_unit(config))]

    def measure(params, frozen):
      pipe = self.pipeline(config, params, frozen)
      by_time = flow_loss.summary(np.concatenate([flow_loss.losses(pipe, batch) for batch in batches]))
      return dict(held_out_loss=by_time.pop('mean'), **{f'held_out_loss_{t}': loss for t, loss in by_time.items()})
    return measure

  def loss(self, params, frozen: conditioning.Frozen, batch, key):
    """Mean squared error of the velocity plus the weighted REPA term: (scalar f32, metrics).

    Args:
      params: a UniFusion; with `repa_weight` a WithREPA.
      frozen: VLM and autoencoder, and the taps and stop ids that go with them.
      batch: number uint32 [b]; target uint8 [b y x 3]; input_ids, attention_mask [b s]; cond_index, cond_mask [b q];
        tiles if any; references and reference_mask as of `conditioning.clean_references`; with `rewrite_online`
        needs_rewrite [b], and fallback_index, fallback_mask [b n] of the instruction, which conditions where the
        rewrite is invalid.
      key: random key of times and noise, with an example's number.

    A metric is a scalar, or a pair (sum, count) whose ratio over many steps is the mean.
    """
    time_key, noise_key = jax.random.split(key)
    with jax.named_scope('autoencoder'):
      z = jax.lax.stop_gradient(frozen.vae.encode(imaging.to_float(batch['target']))).astype(jnp.float32)
      references = jax.lax.stop_gradient(conditioning.clean_references(frozen.vae, batch))
    with jax.named_scope('vlm'):
      states, metrics = self._states(frozen, batch)
    dropout_key = jax.random.fold_in(key, jnp.sum(batch['number']))  # of the examples: micro-batches differ
    model = self.model(params, frozen, dropout_key)
    cond = conditioning.condition(model, jax.lax.stop_gradient(states))._replace(references=references)
    n = self.noises_per_example
    z, cond = jax.tree.map(lambda x: _repeat(x, n), (z, cond))
    numbers = _numbers(batch['number'], n)
    t = flow.sample_time(time_key, numbers, self.mean, self.std, self.shift)
    noise = flow.noise(noise_key, numbers, z.shape[1:])
    noised = flow.interpolate(z, noise, t)
    repa_term = 0.0
    if self.repa_weight:
      velocity, tapped = model.velocity(noised, t, *cond, tap=self.repa_depth)
      with jax.named_scope('repa'):
        targets = jax.lax.stop_gradient(repa.targets(frozen.vlm, batch['target'], *tapped.shape[1:3]))
        metrics['repa'] = params.head.cosine_loss(tapped, _repeat(targets, n))
      repa_term = self.repa_weight * metrics['repa']
    else:
      velocity = model.velocity(noised, t, *cond)
    errors = flow.loss(velocity, z, noise)
    noisy = t > 0.5
    for name, part in (('noisy', noisy), ('clean', ~noisy)):
      metrics[f'loss_{name}'] = jnp.sum(errors * part), jnp.sum(part, dtype=jnp.float32)
    loss = jnp.mean(errors)
    return loss + repa_term, dict(loss=loss, **metrics)

  def _states(self, frozen: conditioning.Frozen, batch) -> tuple[conditioning.States, dict]:
    """States of the tokens that condition the DiT, and metrics."""
    images = batch.get('tiles')
    if not self.rewrite_online:
      return conditioning.read(frozen.vlm, batch['input_ids'], batch['attention_mask'], batch['cond_index'],
                               batch['cond_mask'], images, taps=frozen.taps), {}
    keep = jnp.concatenate([batch['cond_index'], batch['fallback_index']], axis=1)
    out = text_generation.generate(frozen.vlm, batch['input_ids'], batch['attention_mask'], images,
                                   max_new=frozen.max_rewrite, stop_ids=frozen.stop_ids, taps=frozen.taps, keep=keep)
    valid = conditioning.is_valid_generation(out.ids, out.lengths, frozen.stop_ids, frozen.image_id, frozen.blank_ids)
    fallback = batch['needs_rewrite'] & ~valid
    lengths = out.lengths * (batch['needs_rewrite'] & valid)
    prompt, instruction = jnp.split(out.prompt_hidden, [batch['cond_index'].shape[1]], axis=1)
    hidden, mask = conditioning.condition_states(prompt, out.hidden, lengths, batch['cond_mask'])
    hidden = jnp.concatenate([hidden, instruction], axis=1)
    mask = jnp.concatenate([mask, batch['fallback_mask'] & fallback[:, None]], axis=1)
    image = conditioning.image_tokens(frozen.vlm, batch['input_ids'], batch['cond_index'])
    states = conditioning.States(hidden, mask, conditioning.padded_to(image, mask))
    return states, dict(fallback_rate=jnp.mean(fallback.astype(jnp.float32)))


def _shapes(config, dtype=jnp.float32) -> unifusion.UniFusion:
  """The shapes of the model; reads no weights."""
  shapes = jax.eval_shape(lambda: unifusion.UniFusion(config.model, rngs=nnx.Rngs(0)))
  return jax.eval_shape(lambda model: layers.cast(model, dtype), shapes)


def _warn_of_distilled(config) -> None:
  """A warning where the weights to train from are distilled to few steps, by their name or their pipeline's index."""
  name, index = config.hub.get('init', config.init), pathlib.Path(config.init).parent / 'model_index.json'
  distilled = index.exists() and json_file.read(index).get('is_distilled')
  if sharding.is_main_process() and (distilled or 'turbo' in name.lower()):
    logging.warning('init=%s is distilled to few steps, which training on plain flow undoes: train on the undistilled '
                    'model (Krea-2-Raw), and sample its LoRA with the distilled one', name)


def _repeat(x: jax.Array, n: int) -> jax.Array:
  """Each row repeated n times, on the device that holds it: [b ...] -> [b*n ...]."""
  spec = jax.typeof(x).sharding.spec[1:]
  rows = jnp.broadcast_to(x[:, None], (x.shape[0], n, *x.shape[1:]), out_sharding=jax.P(BATCH, None, *spec))
  return jnp.reshape(rows, (-1, *x.shape[1:]), out_sharding=jax.P(BATCH, *spec))


def _numbers(numbers: jax.Array, n: int) -> jax.Array:
  """A number for each of the n noises of each example, by rows as of `_repeat`: uint32 [b] -> [b*n]."""
  rows = numbers[:, None] * np.uint32(n) + np.arange(n, dtype=np.uint32)
  return jnp.reshape(rows, (-1,), out_sharding=jax.P(BATCH))
