"""The configuration of every job: a tree of dataclasses, each living beside the code that reads it.

`configs/*.py` build one; `--config.a.b=value` changes a field; a misspelt field or a value of the wrong type stops at
start. What is trained is what `objective` is: generation (DiT, LAP), writing (VLM) or reconstruction (autoencoder).
"""

import dataclasses
import json
import os
import pathlib

from unifusion_jax import sharding
from unifusion_jax.commands.rewrite import RewriteConfig
from unifusion_jax.data.loader import DataConfig
from unifusion_jax.errors import differences, UserError
from unifusion_jax.models import internvl, unifusion
from unifusion_jax.models import vae as autoencoder
from unifusion_jax.objectives import flow_matching
from unifusion_jax.scenes import autoencoder as autoencoder_objective
from unifusion_jax.scenes import splits, vlm
from unifusion_jax.sharding import MeshConfig
from unifusion_jax.training.step import OptimConfig
from unifusion_jax.weights import hub

ASSETS = pathlib.Path(__file__).parent / 'assets' / 'tiny'


@dataclasses.dataclass
class TrainConfig:
  steps: int = 1000
  log_every: int = 10
  save_every: int = 500
  preview_every: int = 500
  max_loss_ratio: float = 4.0  # stop when the loss stays at this many times its running median


@dataclasses.dataclass
class SampleConfig:
  weights: str | None = None        # what to sample from where the workdir holds no run; None: what training starts from
  prompt: str = ''                  # one request a line; @file.txt reads them from a file
  references: tuple[str, ...] = ()  # image files, the same for every request; give the flag once for each
  rewrite: str | None = None        # text to condition on instead of what the VLM would write
  verifi: bool = True               # False: condition on the request itself
  system: str | None = None         # another system prompt, a name in verifi.SYSTEM or a text
  temperature: float = 0.0          # of the rewrites: 0, the most probable one; above 0 each seed draws its own
  top_p: float = 1.0                # share of probability that they are drawn from
  tiles: int = 0                    # tiles that the VLM may cut a reference into; 0: the most of training
  images: bool = True               # False: the VLM sees the references, but their tokens do not reach the DiT
  batch_size: int = 32              # requests drawn at a time
  stitch: bool = False              # show all references as one image, side by side
  num_images: int = 1               # for each request
  seed: int = 0
  width: int = 0                    # 0: the first reference's shape, else square
  height: int = 0
  steps: int = 24
  guidance: float = 3.0             # 1: off
  method: str = 'euler'             # or 'heun'
  eta: float = 0.0                  # 0: an ODE. Up to 1: new noise between Euler steps, as DDIM and DDPM have it (`flow.sample`)
  shift: float = 1.0                # of the sampling times; 0: from the number of image tokens, as Krea 2


@dataclasses.dataclass
class EvalConfig:
  # '': the rates. 'verifi': what rewriting, images and system prompts do (docs/verifi.md). 'times': at which times drawing
  # falls short (scenes/evaluation/noise_levels.py)
  study: str = ''
  seeds: int = 3        # of a study
  split: str = 'test'
  examples: int = 200   # of each measurement
  batch_size: int = 50


@dataclasses.dataclass
class Config:
  objective: flow_matching.FlowMatching | vlm.VLMObjective | autoencoder_objective.AutoencoderObjective
  model: unifusion.UniFusionConfig | internvl.InternVLConfig | autoencoder.VAEConfig
  vlm: str = str(ASSETS / 'vlm')  # a folder or hub id: the frozen VLM, or the tokenizer of the one in training
  vlm_quantized: str = ''         # 'int8': its weights in int8; 'w8a8': its activations too
  vlm_cache: str | None = None    # a folder that keeps the converted VLM for the next start
  vae: str = str(ASSETS / 'vae')  # a diffusers AutoencoderKL folder
  init: str | None = None         # a checkpoint folder to start training from; None: from random weights
  system: str = 'rewrite'         # the system prompt of training, a name in verifi.SYSTEM or a text
  taps: tuple[int, ...] = ()      # VLM layers that LAP pools, as indices of `hidden_states` (0: embeddings)
  frozen_dtype: str = 'bfloat16'  # of VLM and autoencoder
  seed: int = 0
  devices: int = 0                # the recipe's number of devices, for checks where they are not; 0: those here
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
  rewrite: RewriteConfig = dataclasses.field(default_factory=RewriteConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)


# What each objective has examples of; with several references only the VLM trains.
_TASKS = {flow_matching.FlowMatching: ('t2i', 'edit', 'reconstruct'),
          autoencoder_objective.AutoencoderObjective: ('t2i', 'edit', 'reconstruct'),
          vlm.VLMObjective: ('t2i', 'edit', 'reconstruct', 'multi', 'caption', 'question', 'rewrite')}


def _unit(config: Config) -> int:
  """Pixels that both sides of every image must be multiples of."""
  if isinstance(config.model, autoencoder.VAEConfig):
    return config.model.downsampling
  return 8 * config.model.dit.patch if isinstance(config.model, unifusion.UniFusionConfig) else 1


def check(config: Config, devices: int) -> None:
  """Raises one ValueError that lists every combination of settings that cannot work."""
  data, wrong = config.data, []

  def want(condition, text):
    if not condition:
      wrong.append(text)

  unit, shards = _unit(config), config.mesh.shape(devices)[0] * config.mesh.shape(devices)[1]
  wrong += data.problems(kinds=_TASKS[type(config.objective)], unit=unit, shards=shards, accumulate=config.optim.accumulate)
  for name in ('log_every', 'save_every', 'preview_every'):
    want(getattr(config.train, name) >= 1, f'train.{name}={getattr(config.train, name)} must be 1 or more')
  want(config.optim.accumulate >= 1, f'optim.accumulate={config.optim.accumulate} must be 1 or more')
  want(0 <= config.optim.decay <= 1, f'optim.decay={config.optim.decay} is a share of the run: between 0 and 1')
  want(config.optim.clip > 0, f'optim.clip={config.optim.clip} must be above 0')
  want(config.frozen_dtype in ('float32', 'bfloat16'), f"frozen_dtype={config.frozen_dtype!r} must be 'float32' or 'bfloat16'")
  want(config.eval.split in splits.SPLITS, f'eval.split={config.eval.split!r} must be one of {", ".join(splits.SPLITS)}')
  want(config.eval.batch_size >= 1 and config.eval.examples >= 1,
       f'eval.batch_size={config.eval.batch_size} and eval.examples={config.eval.examples} must be 1 or more')
  own = data.path.endswith(('.jsonl', '.parquet'))
  want(not (own and isinstance(config.objective, vlm.VLMObjective)),
       f'data.path={data.path}: the embedded VLM trains on scenes, which know the answers to its questions')
  want(config.train.steps > 0, f'train.steps={config.train.steps} must be 1 or more')
  want(config.optim.name in ('adamw', 'muon'), f'optim.name={config.optim.name!r} must be adamw or muon')
  want(config.optim.learning_rate > 0, f'optim.learning_rate={config.optim.learning_rate} must be above 0')
  want(0 <= config.optim.ema < 1, f'optim.ema={config.optim.ema} must be in [0, 1)')
  if isinstance(config.objective, flow_matching.FlowMatching):
    want(isinstance(config.model, unifusion.UniFusionConfig), 'a flow objective trains a UniFusion model')
    want(len(config.taps) == config.model.lap.taps,
         f'taps={config.taps} are {len(config.taps)} layers but model.lap.taps={config.model.lap.taps}')
    want(config.vlm_quantized in ('', 'int8', 'w8a8'), f"vlm_quantized={config.vlm_quantized!r} must be '', 'int8' or 'w8a8'")
    want(tuple(sorted(set(config.taps))) == tuple(config.taps), f'taps={config.taps} must rise')
    want(config.sample.method in ('euler', 'heun'), f"sample.method={config.sample.method!r} must be 'euler' or 'heun'")
    want(0 <= config.sample.eta <= 1 and (not config.sample.eta or config.sample.method == 'euler'),
         f'sample.eta={config.sample.eta} must be between 0 and 1, and 0 with sample.method={config.sample.method!r}: only '
         'between Euler steps is noise drawn anew')
    want(config.sample.steps >= 1, f'sample.steps={config.sample.steps} must be 1 or more')
    want(config.sample.batch_size >= 1, f'sample.batch_size={config.sample.batch_size} must be 1 or more')
    want(config.sample.num_images >= 1, f'sample.num_images={config.sample.num_images} must be 1 or more')
    want(not (config.objective.rewrite_online and data.rewrites), f'objective.rewrite_online writes as training goes and data.rewrites='
         f'{data.rewrites} was written before: leave one of them out')
    want(config.sample.temperature >= 0, f'sample.temperature={config.sample.temperature} must be 0 or more')
    want(0 < config.sample.top_p <= 1, f'sample.top_p={config.sample.top_p} must be above 0 and at most 1')
    want(config.eval.study in ('', 'verifi', 'times'), f"eval.study={config.eval.study!r} must be '', 'verifi' or 'times'")
    want(config.eval.study != 'verifi' or config.eval.split == 'test',
         f'eval.split={config.eval.split!r}: the study of VERIFI asks in phrasings that only the split test has')
    want(config.eval.study != 'times' or config.eval.split == 'train',
         f'eval.split={config.eval.split!r}: the study of times is there to tune training with: add --config.eval.split=train')
    want(config.eval.seeds >= 1, f'eval.seeds={config.eval.seeds} must be 1 or more')
    want(config.sample.seed >= 0, f'sample.seed={config.sample.seed} must be 0 or more')
    want(config.sample.tiles >= 0, f'sample.tiles={config.sample.tiles} must be 0 or more')
    want(config.objective.noises_per_example >= 1, f'objective.noises_per_example={config.objective.noises_per_example} must be 1 or more')
    for name in ('width', 'height'):
      side = getattr(config.sample, name)
      want(side >= 0 and side % unit == 0, f'sample.{name}={side} must be a multiple of {unit} pixels (a latent patch)')
    lap, dit, (_, fsdp, tp) = config.model.lap, config.model.dit, config.mesh.shape(devices)
    want(not any(n % tp for n in (lap.heads, lap.kv_heads, lap.mlp, dit.heads, dit.kv_heads, dit.mlp)),
         f'mesh.tp={tp} must divide the heads, key/value heads and mlp of model.lap ({lap.heads}, {lap.kv_heads}, {lap.mlp}) '
         f'and model.dit ({dit.heads}, {dit.kv_heads}, {dit.mlp})')
    want(not any(n % fsdp for n in (lap.width, dit.width, dit.time_dim)),
         f'mesh.fsdp={fsdp} must divide model.lap.width={lap.width}, the width {dit.width} of model.dit and its '
         f'time_dim={dit.time_dim}')
    want(config.objective.repa_weight >= 0, f'objective.repa_weight={config.objective.repa_weight} must be 0 or more')
    want(not config.objective.repa_weight or 0 < config.objective.repa_depth <= config.model.dit.depth,
         f'objective.repa_depth={config.objective.repa_depth} must be one of the {config.model.dit.depth} blocks that '
         'model.dit.depth counts')
    for name in ('cond_dropout', 'image_dropout', 'text_dropout', 'instruction_prob'):
      value = getattr(config.objective, name)
      want(0 <= value <= 1, f'objective.{name}={value} is a share: between 0 and 1')
  if isinstance(config.objective, autoencoder_objective.AutoencoderObjective):
    want(config.model.scaling_factor == 1.0 and not config.model.shift_factor,
         f'model.scaling_factor={config.model.scaling_factor}: an autoencoder trains with 1; --mode=export measures it')
  if wrong:
    raise UserError('this configuration cannot run:\n  ' + '\n  '.join(wrong))


def keep(config: Config, workdir: pathlib.Path) -> None:
  """Writes config.json into the workdir; ValueError when a run with another configuration lives there.

  How a run samples and evaluates may change; what it trains may not.
  """
  _compare(config, workdir, lambda name: name.split('.')[0] not in ('sample', 'rewrite', 'eval', 'devices', 'mesh'))
  write(config, workdir, files=_frozen(config))


def check_run(config: Config, workdir: pathlib.Path) -> None:
  """ValueError when the workdir's run trained another model, or beside another VLM or autoencoder, than is now used."""
  def matters(name):
    computing = name.split('.')[-1] in ('dtype', 'unroll', 'remat')
    return name.split('.')[0] in ('model', 'vlm', 'vae', 'taps', 'files') and not computing or name == 'objective.repa_weight'
  _compare(config, workdir, matters)


def _compare(config: Config, workdir: pathlib.Path, matters) -> None:
  path = workdir / 'config.json'
  if not (path.exists() and any(step.name.isdigit() for step in (workdir / 'checkpoints').glob('*'))):
    return  # nothing was trained there
  new = json.loads(json.dumps(dataclasses.asdict(config))) | dict(files=_frozen(config))
  differ = differences(json.loads(path.read_text()), new, matters)
  if differ:
    raise UserError(f'{workdir} holds a run with another configuration; give another --workdir, or remove that one.\n  '
                     + '\n  '.join(differ))


def _frozen(config: Config) -> dict[str, str]:
  """What the frozen models of a DiT are known by where they are folders: other weights in the same place are others."""
  if not isinstance(config.objective, flow_matching.FlowMatching):
    return {}
  folders = {name: pathlib.Path(getattr(config, name)) for name in ('vlm', 'vae')}
  return {name: hub.fingerprint(folder) for name, folder in folders.items() if folder.is_dir()}


def write(config: Config, workdir: pathlib.Path, name: str = 'config.json', **more) -> None:
  """The resolved configuration as a file of the workdir, whole or not at all; the first of several processes writes it."""
  if sharding.is_main_process():
    workdir.mkdir(parents=True, exist_ok=True)
    part = workdir / f'{name}.part'
    part.write_text(json.dumps(dataclasses.asdict(config) | more, indent=2, sort_keys=True) + '\n')
    os.replace(part, workdir / name)
