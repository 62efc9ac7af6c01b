"""The three things that can be trained, behind one set of verbs: data, parameters, loss, preview, evaluation, export."""

import dataclasses
import functools
import json
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax import checkpoint
from unifusion_jax import config as configuration
from unifusion_jax import encoders
from unifusion_jax import requests
from unifusion_jax import rewrite
from unifusion_jax import sample
from unifusion_jax import sharding
from unifusion_jax import step
from unifusion_jax.data import eyes
from unifusion_jax.data import images
from unifusion_jax.data import mix
from unifusion_jax.data import pipeline
from unifusion_jax.data import transforms
from unifusion_jax.eval import generation as eval_generation
from unifusion_jax.eval import reconstruction as eval_reconstruction
from unifusion_jax.eval import times as eval_times
from unifusion_jax.eval import verifi as eval_verifi
from unifusion_jax.eval import writing as eval_writing
from unifusion_jax.models import internvl
from unifusion_jax.models import unifusion
from unifusion_jax.models import vae as autoencoder
from unifusion_jax.objectives import generation
from unifusion_jax.objectives import reconstruction
from unifusion_jax.objectives import writing
from unifusion_jax.sharding import BATCH

PREVIEWED = 8  # rows of a preview


def build(config: configuration.Config) -> 'Generation | Writing | Reconstruction':
  """The job that the configuration's objective is for."""
  jobs = {generation.FlowConfig: Generation, writing.WritingConfig: Writing,
          reconstruction.ReconstructionConfig: Reconstruction}
  return jobs[type(config.objective)](config)


_shape = jax.ShapeDtypeStruct


def _abstract_batch(batch: int, example: dict) -> dict:
  """A batch as it reaches the train step, from the shapes of one example."""
  by_rows = jax.sharding.NamedSharding(jax.sharding.get_abstract_mesh(), jax.P(BATCH))
  return jax.tree.map(lambda x: _shape((batch, *x.shape), x.dtype, sharding=by_rows), example)


def _abstract_state(job):
  tx = step.optimizer(job.config.optim, job.config.train.steps)
  return jax.eval_shape(lambda: step.init(job.draw_params(), tx))


def _vae_config(name: str) -> autoencoder.VAEConfig:
  path = pathlib.Path(name) / 'config.json'
  return autoencoder.VAEConfig.from_json(json.loads(path.read_text())) if path.exists() else autoencoder.PRESETS[name]


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
    raise FileNotFoundError(f'{workdir} holds no run and the configuration names no weights: train first (--mode=train), '
                            'or give --config.sample.weights=FOLDER')
  return job.load_params(weights), str(weights)


def _preview_records(data, layout: transforms.Layout | None = None) -> list[dict]:
  """Records of the first task to make a preview of: of the test split, or of what there is where none was written."""
  data = dataclasses.replace(data, tasks=data.tasks[:1], weights=(1.0,), rewrites=None, tiles=(max(data.tiles),))
  try:
    source, _ = mix.mix(data, split='test')[0]
  except FileNotFoundError:
    source, _ = mix.mix(data)[0]
  return requests.same_shape(source, PREVIEWED, layout.fits if layout else lambda record: True)


def _write_preview(workdir: pathlib.Path, step: int, sheet: np.ndarray) -> None:
  if sharding.leads():
    images.write_png(workdir / 'samples' / f'{step:07d}.png', sheet)


def _write_report(workdir: pathlib.Path, report: dict, name: str = 'eval.json') -> None:
  if not sharding.leads():
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

  def load_frozen(self) -> generation.Frozen:
    vlm = self.load_vlm()
    if self.config.taps[-1] > vlm.config.text.depth or vlm.config.text.width != self.config.model.lap.width:
      raise ValueError(f'{self.config.vlm} has {vlm.config.text.depth} layers of width {vlm.config.text.width}, but '
                       f'taps={self.config.taps} and model.lap.width={self.config.model.lap.width} ask for others')
    vae = autoencoder.load(self.config.vae, jnp.dtype(self.config.frozen_dtype))
    if vae.config.latent_channels != self.config.model.dit.channels:
      raise ValueError(f'{self.config.vae} has {vae.config.latent_channels} latent channels, but '
                       f'model.dit.channels={self.config.model.dit.channels}')
    return generation.Frozen(vlm, vae)

  def draw_params(self) -> 'unifusion.UniFusion | generation.Aligned':
    model, rngs = self.config.model, nnx.Rngs(self.config.seed)
    if not self.config.objective.align:
      return unifusion.UniFusion(model, rngs=rngs)
    encoder = encoders.config(self.config.vlm)
    if not isinstance(encoder, internvl.InternVLConfig):
      raise ValueError(f'objective.align={self.config.objective.align} aligns with the eye of an InternVL, which '
                       f'{self.config.vlm} is not: set it to 0')
    return generation.Aligned(model, encoder.vision.width, rngs=rngs)

  def init_params(self) -> 'unifusion.UniFusion | generation.Aligned':
    """The head of alignment, which no folder holds, starts anew."""
    if not self.config.init:
      return jax.jit(self.draw_params)()
    model = self.load_params(self.config.init)
    if not self.config.objective.align:
      return model
    params = jax.jit(self.draw_params)()
    params.model = model
    return params

  def load_params(self, folder: str) -> unifusion.UniFusion:
    return unifusion.load(folder, self.config.model)

  def abstract(self):
    """(state, frozen, batch) as shapes on the abstract mesh in context: for checks without devices or weights."""
    c, data = self.config, self.config.data
    vlm, vae = encoders.config(c.vlm), _vae_config(c.vae)
    dtype = jnp.dtype(c.frozen_dtype)
    frozen = generation.Frozen(encoders.abstract(vlm, dtype, c.vlm_quantized),
                               jax.eval_shape(lambda: autoencoder.Autoencoder(vae, dtype, rngs=nnx.Rngs(0))))
    eye = eyes.of(vlm, max(data.tiles))
    s, q = max(data.text_tokens) + eye.most, max(data.written_tokens) + eye.most
    size = data.size
    batch = _abstract_batch(data.batch_size, dict(
        target=_shape((size, size, 3), jnp.float32), tokens=_shape((s,), jnp.int32), valid=_shape((s,), bool),
        keep=_shape((q,), jnp.int32), keep_mask=_shape((q,), bool), tiles=eye.shapes(1)))
    return _abstract_state(self), frozen, batch

  def data(self):
    o = self.config.objective
    if self.config.data.rewrites:
      rewrite.check(self.config)
    transform = transforms.Generate(transforms.layout(self.config), o.drop, o.drop_pictures, o.drop_written, o.raw, o.online)
    return mix.mix(self.config.data, seed=self.config.seed), transform

  @property
  def loss(self):
    writing = None
    if self.config.objective.online:
      layout = transforms.layout(self.config)
      writing = layout.written, layout.chat.stop_ids, layout.chat.picture_id
    eye = transforms.layout(self.config).eye if self.config.objective.align else None
    pixels = eye and (eye.mean, eye.std)
    return functools.partial(generation.loss, self.config.objective, self.config.taps, writing, pixels)

  def sampler(self, params, frozen) -> sample.Sampler:
    vae = frozen.vae.config
    return sample.Sampler(_model(params), frozen, transforms.layout(self.config), self.config.taps, self.config.sample,
                          2 ** (len(vae.block_out_channels) - 1), vae.latent_channels)

  def preview(self, params, frozen, workdir: pathlib.Path, step: int) -> None:
    """A grid of test requests: references, what was asked, what was written, result, target."""
    if self._previewed:
      _write_preview(workdir, step, requests.sheet(self.sampler(params, frozen), self._previewed))

  @functools.cached_property
  def _previewed(self) -> list[dict]:
    return _preview_records(self.config.data, transforms.layout(self.config))

  def sample(self, workdir: pathlib.Path, mesh) -> None:
    asked = requests.from_config(self.config.sample, self.config.data.size)  # before anything slow is loaded
    params, weights = _trained(self, workdir, mesh)
    sampler = self.sampler(params, self.load_frozen())
    requests.answer(sampler, asked, self.config.sample, workdir / 'pictures', weights=weights, vlm=self.config.vlm)

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
  return params.model if isinstance(params, generation.Aligned) else params


@dataclasses.dataclass
class Writing:
  """The embedded VLM."""
  config: configuration.Config

  def __post_init__(self):
    self._unroll = _on_cpu()  # here, because no device is known while something is traced

  def load_frozen(self):
    return None

  def draw_params(self) -> writing.Reader:
    model, unroll = self.config.model, self._unroll
    model = dataclasses.replace(model, vision=dataclasses.replace(model.vision, unroll=unroll),
                                text=dataclasses.replace(model.text, unroll=unroll))
    return writing.Reader(model, rngs=nnx.Rngs(self.config.seed))

  def init_params(self) -> writing.Reader:
    return self.load_params(self.config.init) if self.config.init else jax.jit(self.draw_params)()

  def load_params(self, folder: str) -> writing.Reader:
    """The read-out head, which no folder holds, starts anew."""
    params = jax.jit(self.draw_params)()
    params.vlm = internvl.load(folder, jnp.float32, unroll=self._unroll)
    return params

  def abstract(self):
    data, eye = self.config.data, self._layout().eye
    s, w = max(data.text_tokens) + eye.most, max(data.written_tokens)
    batch = _abstract_batch(data.batch_size, dict(
        tokens=_shape((s,), jnp.int32), valid=_shape((s,), bool), predict=_shape((w,), jnp.int32),
        targets=_shape((w,), jnp.int32), target_mask=_shape((w,), bool), tiles=eye.shapes(1),
        readout=_shape((eye.most, 9), jnp.float32), changes=_shape((eye.most,), bool)))
    return _abstract_state(self), None, batch

  def data(self):
    return mix.mix(self.config.data, seed=self.config.seed), transforms.Write(self._layout())

  def _layout(self) -> transforms.Layout:
    model, data = self.config.model, self.config.data
    return transforms.Layout(self.config.vlm, eyes.of(model, 1), max(data.text_tokens), max(data.written_tokens),
                             transforms.rooms(data))

  @property
  def loss(self):
    return functools.partial(writing.loss, self.config.objective)

  def preview(self, params, frozen, workdir: pathlib.Path, step: int) -> None:
    del frozen
    if not self.config.objective.words:
      return  # an eye alone says nothing
    _write_preview(workdir, step, eval_writing.sheet(params.vlm, self._layout(), self.config.data, PREVIEWED))

  def sample(self, workdir: pathlib.Path, mesh) -> None:
    raise ValueError('a VLM draws nothing: sample with configs/t2i.py or configs/edit.py, or use --mode=eval')

  def rewrite(self, workdir: pathlib.Path, mesh) -> None:
    raise ValueError('requests are rewritten for a DiT: use configs/t2i.py or configs/edit.py')

  def evaluate(self, workdir: pathlib.Path, mesh) -> None:
    params, weights = _trained(self, workdir, mesh)
    _write_report(workdir, dict(weights=weights, **eval_writing.evaluate(params.vlm, self._layout(), self.config)))

  def export(self, workdir: pathlib.Path, mesh) -> None:
    writing.save(_trained(self, workdir, mesh)[0].vlm, self.config.vlm, workdir / 'export')
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
    return mix.mix(self.config.data, seed=self.config.seed), transforms.Picture()

  @property
  def loss(self):
    return functools.partial(reconstruction.loss, self.config.objective)

  def preview(self, params, frozen, workdir: pathlib.Path, step: int) -> None:
    del frozen
    if self._previewed:
      pictures = np.stack([images.read(record['target']) for record in self._previewed])
      back = eval_reconstruction.round_trip(params, pictures)
      _write_preview(workdir, step, images.grid([list(pictures), list(back)], cell=128))

  @functools.cached_property
  def _previewed(self) -> list[dict]:
    return _preview_records(self.config.data)

  def sample(self, workdir: pathlib.Path, mesh) -> None:
    raise ValueError('an autoencoder draws nothing of its own: sample with configs/t2i.py or configs/edit.py')

  def rewrite(self, workdir: pathlib.Path, mesh) -> None:
    raise ValueError('requests are rewritten for a DiT: use configs/t2i.py or configs/edit.py')

  def evaluate(self, workdir: pathlib.Path, mesh) -> None:
    params, weights = _trained(self, workdir, mesh)
    _write_report(workdir, dict(weights=weights, **eval_reconstruction.evaluate(params, self.config)))

  def export(self, workdir: pathlib.Path, mesh) -> None:
    """The scaling factor makes latents of unit variance: it is measured on training pictures here."""
    vae, _ = _trained(self, workdir, mesh)
    mixture, transform = self.data()
    batches = pipeline.batches(mixture, transform, self.config.data.batch_size, self.config.seed)
    spread = [float(jnp.std(jax.jit(lambda v, x: v.moments(x)[0])(vae, sharding.put(next(batches)['target']))))
              for _ in range(8)]
    batches.close()
    vae.config = dataclasses.replace(vae.config, scaling_factor=1.0 / float(np.mean(spread)))
    autoencoder.save(vae, workdir / 'export')
    print(f'wrote {workdir / "export"}')


def _on_cpu() -> bool:
  """Unrolled layers run faster on a CPU; scanned ones compile faster everywhere."""
  mesh = jax.sharding.get_mesh()
  return not mesh.empty and mesh.devices.flat[0].platform == 'cpu'
