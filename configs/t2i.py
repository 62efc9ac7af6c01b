"""Text to image: DiT, LAP and refiner from random weights, conditioned on the frozen VLM.

  python -m unifusion_jax.main --config=configs/t2i.py
  python -m unifusion_jax.main --config=configs/t2i.py --mode=eval
  python -m unifusion_jax.main --config=configs/t2i.py --mode=export   # then copy runs/t2i/export to the assets
  python -m unifusion_jax.main --config=configs/t2i.py --config.data.path=FOLDER/list.jsonl --workdir=runs/own

:tiny trains on scenes at 64 px with the embedded models, on two CPU cores. The shipped weights meet all constraints of
0.69 of 150 test prompts with 1-2 objects, and of 0.29 with 3-4 objects (docs/embedded.md); their stages are in
unifusion_jax/assets/tiny/provenance.json.
:8b_256, :8b_512 and :8b are one training in three stages, at 256, 512 and 1024 px, each from the weights of the one
before (STAGES below, docs/training.md): the paper's size, with InternVL2.5-8B and taps 4, 7, ..., 31, on your own list.
They have not been trained. In this order, each in a workdir of its own, runs/t2i_8b_256 and so on:
  python -m unifusion_jax.main --config=configs/t2i.py:8b_256 --mode=rewrite \
      --config.mesh.data=-1 --config.mesh.fsdp=1 --config.mesh.tp=8   # the VLM's rewrites, for all stages
  python -m unifusion_jax.main --config=configs/t2i.py:8b_256
  python -m unifusion_jax.main --config=configs/t2i.py:8b_256 --mode=export
  python -m unifusion_jax.main --config=configs/t2i.py:8b_512
  python -m unifusion_jax.main --config=configs/t2i.py:8b_512 --mode=export
  python -m unifusion_jax.main --config=configs/t2i.py:8b
  python -m unifusion_jax.main --config=configs/t2i.py:8b --mode=export
Hardware: a TPU v5e:16x16, 256 chips of 16 GiB. Parameters and batch are shared out over all chips (fsdp), and
optim.accumulate splits the batch so that a chip has one image at a time. On other pods that alone changes: by
planning/estimate.py two images fit a v6e (32 GiB), four a v5p (95 GiB), so for :8b it is
--config.optim.accumulate=4 on 64 chips of v6e and =1 on 128 of v5p.
"""

import dataclasses

from unifusion_jax import config
from unifusion_jax.commands.rewrite import RewriteConfig
from unifusion_jax.data.buckets import PHOTOGRAPHS
from unifusion_jax.data.config import DataConfig, Task
from unifusion_jax.errors import UserError
from unifusion_jax.models import dit, lap, unifusion
from unifusion_jax.objectives import flow_matching
from unifusion_jax.scenes.evaluation import settings
from unifusion_jax.sharding import MeshConfig
from unifusion_jax.training.step import OptimConfig


@dataclasses.dataclass(frozen=True)
class Stage:
  """One resolution of the training of the 8B model."""
  size: int             # pixels
  shift: float          # of the times
  steps: int
  batch_size: int
  accumulate: int       # micro-batches: one image a chip at a time on 256 chips of 16 GiB
  learning_rate: float
  warmup: int
  decay: float          # last share of the steps, over which the learning rate falls


# Sizes: Krea 2 and Iris-3B. Shift, steps, batch size and learning rate: Iris-3B (arXiv 2610.09450), an open LAP model;
# they are 0.59 billion images, and the paper says below one billion. Warm-up: Iris-3B's for the first stage; ours for
# the others, whose moments start anew. Decay in the last stage alone: Krea 2's report, its share ours.
STAGES = {
    '8b_256': Stage(256, shift=2.0, steps=367_000, batch_size=1024, accumulate=4, learning_rate=1e-4, warmup=2000,
                    decay=0.0),
    '8b_512': Stage(512, shift=3.0, steps=163_000, batch_size=1024, accumulate=4, learning_rate=1e-4, warmup=500,
                    decay=0.0),
    '8b': Stage(1024, shift=4.0, steps=95_000, batch_size=512, accumulate=2, learning_rate=5e-5, warmup=500,
                decay=0.1)}


def get_config(scale: str = 'tiny') -> config.Config:
  if scale != 'tiny' and scale not in STAGES:
    raise UserError(f'configs/t2i.py has the scales tiny, {", ".join(STAGES)}, not {scale!r}')
  return tiny() if scale == 'tiny' else base_8b(scale)


def before(scale: str) -> str | None:
  """The stage before a stage; None for the first."""
  return dict(zip(list(STAGES)[1:], STAGES)).get(scale)


def tiny() -> config.Config:
  return config.Config(
      # The text decides these images at t from 0.67 to 0.9 (`decided` in eval.json of configs/vae.py); their sharpness
      # is decided below (scenes/evaluation/noise_levels.py). With this shift half of the training times lie above 0.71,
      # one in six below 0.5. Shift, noises per example, REPA, eta and Muon are not in the paper (docs/training.md).
      objective=flow_matching.FlowMatching(instruction_prob=0.1, noises_per_example=4, shift=2.5, repa_weight=0.5,
                                           repa_depth=3),
      model=unifusion.UniFusionConfig(
          lap.LAPConfig(width=160, taps=3, heads=5, kv_heads=5, mlp=208),
          dit.DiTConfig(channels=16, patch=1, depth=6, heads=6, kv_heads=2, head_dim=32, mlp=512, time_dim=128,
                        rope_axes=(8, 12, 12)),
          dtype='float32'),
      taps=(2, 4, 6),
      frozen_dtype='float32',
      data=DataConfig(tasks=(Task('t2i/1-2', weight=0.67, prompt=116, rewrite=30),
                             Task('t2i/3-4', weight=0.3, prompt=132, rewrite=52),
                             Task('reconstruct', weight=0.03, prompt=76, rewrite=52)),
                      batch_size=16),
      optim=OptimConfig(name='muon', learning_rate=2e-3, warmup=200, decay=0.4, ema=0.998),
      train=config.TrainConfig(steps=5000, log_every=20, save_every=500, preview_every=1000),
      sample=config.SampleConfig(weights=str(config.ASSETS / 't2i'), shift=4.0, eta=1.0),
      mesh=MeshConfig(data=-1, fsdp=1),
      eval=settings.GenerationEvaluation())


def base_8b(scale: str) -> config.Config:
  stage, first = STAGES[scale], next(iter(STAGES))
  return config.Config(
      # The paper trains on few requests as they are, without a share: 0.1 is ours.
      objective=flow_matching.FlowMatching(shift=stage.shift, instruction_prob=0.1),
      system='faithful',
      model=unifusion.base_8b(),
      vlm='OpenGVLab/InternVL2_5-8B',
      vae='black-forest-labs/FLUX.1-schnell/vae',  # ours: the paper names none
      init=before(scale) and f'runs/t2i_{before(scale)}/export',
      taps=tuple(range(4, 32, 3)),
      data=DataConfig(
          path='data/train.jsonl',
          tasks=(Task('t2i', weight=0.97), Task('reconstruct', weight=0.03)),  # the paper: about 3%
          # A sixteenth of the size: each aspect is the same grid of units, so the same images, at every stage.
          size=stage.size, aspects=PHOTOGRAPHS, unit=stage.size // 16,
          # 1, 5 and 10 with the thumbnail, as in the paper's reconstruction figure. Prompt: ours; rewrite: Krea 2's.
          tiles=(1, 4, 9), max_prompt_tokens=1024, max_rewrite_tokens=512,
          batch_size=stage.batch_size, rewrites=f'runs/t2i_{first}/rewrites'),
      # Betas, clip, EMA and no weight decay: Iris-3B.
      optim=OptimConfig(name='adamw', learning_rate=stage.learning_rate, warmup=stage.warmup, decay=stage.decay,
                        clip=0.5, ema=0.9999, accumulate=stage.accumulate),
      train=config.TrainConfig(steps=stage.steps, log_every=50, save_every=2000, save_minutes=20.0, keep_every=20_000,
                               preview_every=5000),
      # Guidance and its shift by size: Krea 2's; steps: ours, between its 28 and 52.
      sample=config.SampleConfig(steps=40, guidance=4.5, shift=0.0),
      rewrite=RewriteConfig(batch_size=256),  # one request a chip
      devices=256)
