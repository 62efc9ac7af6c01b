"""The three things that can be trained, behind one set of verbs: data, parameters, loss, preview, evaluation, export."""

import dataclasses
import functools
import json
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax import config as configuration
from unifusion_jax import pipeline, sharding
from unifusion_jax.commands import rewrite, sample
from unifusion_jax.data import imaging, loader, mix, transforms, vision_inputs
from unifusion_jax.errors import UserError
from unifusion_jax.models import internvl, unifusion
from unifusion_jax.models import vae as autoencoder
from unifusion_jax.objectives import flow_matching
from unifusion_jax.scenes import autoencoder as autoencoder_objective
from unifusion_jax.scenes import vlm
from unifusion_jax.scenes.evaluation import generation as eval_generation
from unifusion_jax.scenes.evaluation import language as eval_writing
from unifusion_jax.scenes.evaluation import noise_levels as eval_times
from unifusion_jax.scenes.evaluation import reconstruction as eval_reconstruction
from unifusion_jax.scenes.evaluation import verifi_study as eval_verifi
from unifusion_jax.sharding import BATCH
from unifusion_jax.training import checkpoint, step
from unifusion_jax.weights import autoencoders, encoders

PREVIEWED = 8  # rows of a preview


def build(config: configuration.Config) -> 'Generation | Writing | Reconstruction':
  """The job that the configuration's objective is for."""
  jobs = {flow_matching.FlowMatching: Generation, vlm.VLMObjective: Writing,
          autoencoder_objective.AutoencoderObjective: Reconstruction}
  return jobs[type(config.objective)](config)


_shape = jax.ShapeDtypeStruct


def _abstract_batch(batch: int, example: dict) -> dict:
  """A batch as it reaches the train step, from the shapes of one example."""
  by_rows = jax.sharding.NamedSharding(jax.sharding.get_abstract_mesh(), jax.P(BATCH))
  return jax.tree.map(lambda x: _shape((batch, *x.shape), x.dtype, sharding=by_rows), example)


def _abstract_state(job):
  tx = step.optimizer(job.config.optim, job.config.train.steps)
  return jax.eval_shape(lambda: step.init(job.draw_params(), tx))


def _trained(job, workdir: pathlib.Path, mesh):
  """The EMA of the workdir's last checkpoint; without a run there, what `sample.weights` or `init` names. And where from."""
  if (workdir / 'checkpoints').exists():
    saved = checkpoint.Checkpoints(workdir)
    try:
      if (step := saved.latest()) is not None:
        return saved.restore_ema(jax.eval_shape(job.draw_params), mesh), f'{workdir} at step {step}'
    finally:
      saved.close()
  weights = job.config.sample.weights or job.config.init
  if weights is None:
    raise UserError(f'{workdir} holds no run and the configuration names no weights: train first (--mode=train), '
                            'or give --config.sample.weights=FOLDER')
  return job.load_params(weights), str(weights)


def _preview_records(data, layout: transforms.PromptEncoder | None = None) -> list[dict]:
  """Records of the first task to make a preview of: of the test split, or of what there is where none was written."""
  data = dataclasses.replace(data, tasks=data.tasks[:1], weights=(1.0,), rewrites=None, tiles=(max(data.tiles),))
  try:
    source, _ = mix.mix(data, split='test')[0]
  except UserError:
    source, _ = mix.mix(data)[0]
  return sample.same_shape(source, PREVIEWED, layout.fits if layout else lambda record: True)


def _write_preview(workdir: pathlib.Path, step: int, sheet: np.ndarray) -> None:
  if sharding.is_main_process():
    imaging.write_png(workdir / 'samples' / f'{step:07d}.png', sheet)


def _write_report(workdir: pathlib.Path, report: dict, name: str = 'eval.json') -> None:
  if not sharding.is_main_process():
    return
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / name).write_text(json.dumps(report, indent=2) + '\n')
  print(json.dumps(report, indent=2))


@dataclasses.dataclass
class Generation:
  """The DiT with LAP and refiner, conditioned on a frozen VLM."""
  config: configuration.Config

  def load_vlm(self) -> encoders.Encoder:
    dtype = jnp.dtype(self.config.frozen_dtype)
    return encoders.load(self.config.vlm, dtype, _on_cpu(), self.config.vlm_quantized, self.config.vlm_cache)

  def load_frozen(self) -> flow_matching.Frozen:
    vlm = self.load_vlm()
    if self.config.taps[-1] > vlm.config.text.depth or vlm.config.text.width != self.config.model.lap.width:
      raise UserError(f'{self.config.vlm} has {vlm.config.text.depth} layers of width {vlm.config.text.width}, but '
                       f'taps={self.config.taps} and model.lap.width={self.config.model.lap.width} ask for others')
    vae = autoencoders.load(self.config.vae, jnp.dtype(self.config.frozen_dtype))
    if vae.channels != self.config.model.dit.channels:
      raise UserError(f'{self.config.vae} has {vae.channels} latent channels, but '
                       f'model.dit.channels={self.config.model.dit.channels}')
    return flow_matching.Frozen(vlm, vae)

  def draw_params(self) -> 'unifusion.UniFusion | flow_matching.WithREPA':
    model, rngs = self.config.model, nnx.Rngs(self.config.seed)
    if not self.config.objective.repa_weight:
      return unifusion.UniFusion(model, rngs=rngs)
    encoder = encoders.config(self.config.vlm)
    if not isinstance(encoder, internvl.InternVLConfig):
      raise UserError(f'objective.repa_weight={self.config.objective.repa_weight} aligns with the eye of an InternVL, which '
                       f'{self.config.vlm} is not: set it to 0')
    return flow_matching.WithREPA(model, encoder.vision.width, rngs=rngs)

  def init_params(self) -> 'unifusion.UniFusion | flow_matching.WithREPA':
    """The head of alignment, which no folder holds, starts anew."""
    if not self.config.init:
      return jax.jit(self.draw_params)()
    model = self.load_params(self.config.init)
    if not self.config.objective.repa_weight:
      return model
    params = jax.jit(self.draw_params)()
    params.model = model
    return params

  def load_params(self, folder: str) -> unifusion.UniFusion:
    return unifusion.load(folder, self.config.model)

  def abstract(self):
    """(state, frozen, batch) as shapes on the abstract mesh in context: for checks without devices or weights."""
    c, data = self.config, self.config.data
    vlm, vae = encoders.config(c.vlm), autoencoders.config(c.vae)
    dtype = jnp.dtype(c.frozen_dtype)
    frozen = flow_matching.Frozen(encoders.abstract(vlm, dtype, c.vlm_quantized),
                               autoencoders.abstract(vae, dtype))
    image_processor = vision_inputs.for_model(vlm, max(data.tiles))
    s, q = max(data.max_prompt_tokens) + image_processor.max_tokens, max(data.max_rewrite_tokens) + image_processor.max_tokens
    size = data.size
    batch = _abstract_batch(data.batch_size, dict(
        target=_shape((size, size, 3), jnp.float32), input_ids=_shape((s,), jnp.int32), attention_mask=_shape((s,), bool),
        cond_index=_shape((q,), jnp.int32), cond_mask=_shape((q,), bool), tiles=image_processor.spec(1)))
    return _abstract_state(self), frozen, batch

  def data(self):
    o = self.config.objective
    if self.config.data.rewrites:
      rewrite.check(self.config)
    transform = transforms.GenerationExample(transforms.prompt_encoder(self.config), o.cond_dropout, o.image_dropout, o.text_dropout, o.instruction_prob, o.rewrite_online)
    return mix.mix(self.config.data, seed=self.config.seed), transform

  @property
  def loss(self):
    writing = None
    if self.config.objective.rewrite_online:
      layout = transforms.prompt_encoder(self.config)
      writing = layout.written, layout.chat.stop_ids, layout.chat.image_id
    image_processor = transforms.prompt_encoder(self.config).image_processor if self.config.objective.repa_weight else None
    pixels = image_processor and (image_processor.mean, image_processor.std)
    return functools.partial(flow_matching.loss, self.config.objective, self.config.taps, writing, pixels)

  def sampler(self, params, frozen) -> pipeline.Sampler:
    return pipeline.Sampler(_model(params), frozen, transforms.prompt_encoder(self.config), self.config.taps, self.config.sample,
                          frozen.vae.downsampling, frozen.vae.channels)

  def preview(self, params, frozen, workdir: pathlib.Path, step: int) -> None:
    """A grid of test requests: references, what was asked, what was written, result, target."""
    if self._previewed:
      _write_preview(workdir, step, sample.sheet(self.sampler(params, frozen), self._previewed))

  @functools.cached_property
  def _previewed(self) -> list[dict]:
    return _preview_records(self.config.data, transforms.prompt_encoder(self.config))

  def sample(self, workdir: pathlib.Path, mesh) -> None:
    asked = sample.from_config(self.config.sample, self.config.data.size)  # before anything slow is loaded
    params, weights = _trained(self, workdir, mesh)
    sampler = self.sampler(params, self.load_frozen())
    sample.answer(sampler, asked, self.config.sample, workdir / 'images', weights=weights, vlm=self.config.vlm)

  def evaluate(self, workdir: pathlib.Path, mesh) -> None:
    params, weights = _trained(self, workdir, mesh)
    sampler = self.sampler(params, self.load_frozen())
    measure = {'': eval_generation, 'verifi': eval_verifi, 'times': eval_times}[self.config.eval.study].evaluate
    name = f'eval_{self.config.eval.study}.json' if self.config.eval.study else 'eval.json'
    _write_report(workdir, dict(weights=weights, **measure(sampler, self.config, workdir / 'eval')), name)

  def rewrite(self, workdir: pathlib.Path, mesh) -> None:
    source = mix.mix(dataclasses.replace(self.config.data, rewrites=None, tiles=self.config.data.tiles[-1:]))
    rewrite.write(self.config, self.load_vlm(), source, workdir / 'rewrites', mesh)

  def export(self, workdir: pathlib.Path, mesh) -> None:
    """In bfloat16, as such models are published."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _model(_trained(self, workdir, mesh)[0]))
    unifusion.save(params, workdir / 'export')
    print(f'wrote {workdir / "export"}')


def _model(params) -> unifusion.UniFusion:
  """The model, with or without what it was trained with."""
  return params.model if isinstance(params, flow_matching.WithREPA) else params


@dataclasses.dataclass
class Writing:
  """The embedded VLM."""
  config: configuration.Config

  def __post_init__(self):
    self._unroll = _on_cpu()  # here, because no device is known while something is traced

  def load_frozen(self):
    return None

  def draw_params(self) -> vlm.VLMWithHeads:
    model, unroll = self.config.model, self._unroll
    model = dataclasses.replace(model, vision=dataclasses.replace(model.vision, unroll=unroll),
                                text=dataclasses.replace(model.text, unroll=unroll))
    return vlm.VLMWithHeads(model, rngs=nnx.Rngs(self.config.seed))

  def init_params(self) -> vlm.VLMWithHeads:
    return self.load_params(self.config.init) if self.config.init else jax.jit(self.draw_params)()

  def load_params(self, folder: str) -> vlm.VLMWithHeads:
    """The read-out head, which no folder holds, starts anew."""
    params = jax.jit(self.draw_params)()
    params.vlm = internvl.load(folder, jnp.float32, unroll=self._unroll)
    return params

  def abstract(self):
    data, image_processor = self.config.data, self._layout().image_processor
    s, w = max(data.max_prompt_tokens) + image_processor.max_tokens, max(data.max_rewrite_tokens)
    batch = _abstract_batch(data.batch_size, dict(
        input_ids=_shape((s,), jnp.int32), attention_mask=_shape((s,), bool), predict=_shape((w,), jnp.int32),
        targets=_shape((w,), jnp.int32), target_mask=_shape((w,), bool), tiles=image_processor.spec(1),
        readout=_shape((image_processor.max_tokens, 9), jnp.float32), changes=_shape((image_processor.max_tokens,), bool)))
    return _abstract_state(self), None, batch

  def data(self):
    return mix.mix(self.config.data, seed=self.config.seed), transforms.ChatExample(self._layout())

  def _layout(self) -> transforms.PromptEncoder:
    model, data = self.config.model, self.config.data
    return transforms.PromptEncoder(self.config.vlm, vision_inputs.for_model(model, 1), max(data.max_prompt_tokens), max(data.max_rewrite_tokens),
                             transforms.budgets(data))

  @property
  def loss(self):
    return functools.partial(vlm.loss, self.config.objective)

  def preview(self, params, frozen, workdir: pathlib.Path, step: int) -> None:
    del frozen
    if not self.config.objective.lm_weight:
      return  # an eye alone says nothing
    _write_preview(workdir, step, eval_writing.sheet(params.vlm, self._layout(), self.config.data, PREVIEWED))

  def sample(self, workdir: pathlib.Path, mesh) -> None:
    raise UserError('a VLM draws nothing: sample with configs/t2i.py or configs/edit.py, or use --mode=eval')

  def rewrite(self, workdir: pathlib.Path, mesh) -> None:
    raise UserError('requests are rewritten for a DiT: use configs/t2i.py or configs/edit.py')

  def evaluate(self, workdir: pathlib.Path, mesh) -> None:
    params, weights = _trained(self, workdir, mesh)
    _write_report(workdir, dict(weights=weights, **eval_writing.evaluate(params.vlm, self._layout(), self.config)))

  def export(self, workdir: pathlib.Path, mesh) -> None:
    vlm.save(_trained(self, workdir, mesh)[0].vlm, self.config.vlm, workdir / 'export')
    print(f'wrote {workdir / "export"}')


@dataclasses.dataclass
class Reconstruction:
  """The embedded autoencoder."""
  config: configuration.Config

  def load_frozen(self):
    return None

  def draw_params(self) -> autoencoder.Autoencoder:
    return autoencoder.Autoencoder(self.config.model, rngs=nnx.Rngs(self.config.seed))

  def init_params(self) -> autoencoder.Autoencoder:
    return self.load_params(self.config.init) if self.config.init else jax.jit(self.draw_params)()

  def load_params(self, folder: str) -> autoencoder.Autoencoder:
    vae = autoencoder.load(folder, jnp.float32)
    vae.config = self.config.model  # the scaling factor is measured anew at the export
    return vae

  def abstract(self):
    data = self.config.data
    batch = _abstract_batch(data.batch_size, dict(target=_shape((data.size, data.size, 3), jnp.float32)))
    return _abstract_state(self), None, batch

  def data(self):
    return mix.mix(self.config.data, seed=self.config.seed), transforms.TargetOnly()

  @property
  def loss(self):
    return functools.partial(autoencoder_objective.loss, self.config.objective)

  def preview(self, params, frozen, workdir: pathlib.Path, step: int) -> None:
    del frozen
    if self._previewed:
      images = np.stack([imaging.read(record['target']) for record in self._previewed])
      back = eval_reconstruction.round_trip(params, images)
      _write_preview(workdir, step, imaging.grid([list(images), list(back)], cell=128))

  @functools.cached_property
  def _previewed(self) -> list[dict]:
    return _preview_records(self.config.data)

  def sample(self, workdir: pathlib.Path, mesh) -> None:
    raise UserError('an autoencoder draws nothing of its own: sample with configs/t2i.py or configs/edit.py')

  def rewrite(self, workdir: pathlib.Path, mesh) -> None:
    raise UserError('requests are rewritten for a DiT: use configs/t2i.py or configs/edit.py')

  def evaluate(self, workdir: pathlib.Path, mesh) -> None:
    params, weights = _trained(self, workdir, mesh)
    _write_report(workdir, dict(weights=weights, **eval_reconstruction.evaluate(params, self.config)))

  def export(self, workdir: pathlib.Path, mesh) -> None:
    """The scaling factor makes latents of unit variance: it is measured on training images here."""
    vae, _ = _trained(self, workdir, mesh)
    mixture, transform = self.data()
    batches = loader.batches(mixture, transform, self.config.data.batch_size, self.config.seed)
    spread = [float(jnp.std(jax.jit(lambda v, x: v.moments(x)[0])(vae, sharding.shard(next(batches)['target']))))
              for _ in range(8)]
    batches.close()
    vae.config = dataclasses.replace(vae.config, scaling_factor=1.0 / float(np.mean(spread)))
    autoencoder.save(vae, workdir / 'export')
    print(f'wrote {workdir / "export"}')


def _on_cpu() -> bool:
  """Unrolled layers run faster on a CPU; scanned ones compile faster everywhere."""
  mesh = jax.sharding.get_mesh()
  return not mesh.empty and mesh.devices.flat[0].platform == 'cpu'
