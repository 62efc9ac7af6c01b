"""Text to image: DiT, LAP and refiner from random weights, conditioned on the frozen VLM.

  python -m unifusion_jax.main --config=configs/t2i.py
  python -m unifusion_jax.main --config=configs/t2i.py --mode=eval
  python -m unifusion_jax.main --config=configs/t2i.py --mode=export   # then copy runs/t2i/export to the assets
  python -m unifusion_jax.main --config=configs/t2i.py --config.data.path=FOLDER/list.jsonl --workdir=runs/own

:tiny trains on scenes at 64 px with the embedded models, on two CPU cores. The shipped weights meet all constraints of
0.70 of 500 test prompts with 1-2 objects, and of 0.29 with 3-4 objects (docs/embedded.md); their stages are in
unifusion_jax/assets/tiny/provenance.json.
:8b has the paper's size at 1024 px, with InternVL2.5-8B and taps 4, 7, ..., 31, for a TPU v5p slice of 128 chips; it
has not been trained. It trains on that VLM's rewrites of your own list, so first
  python -m unifusion_jax.main --config=configs/t2i.py:8b --mode=rewrite --workdir=runs/t2i
"""

from unifusion_jax import config
from unifusion_jax.data.config import DataConfig, Task
from unifusion_jax.errors import UserError
from unifusion_jax.models import dit, lap, unifusion
from unifusion_jax.objectives import flow_matching
from unifusion_jax.scenes.evaluation import settings
from unifusion_jax.sharding import MeshConfig
from unifusion_jax.training.step import OptimConfig


def get_config(scale: str = 'tiny') -> config.Config:
  scales = {'tiny': tiny, '8b': base_8b}
  if scale not in scales:
    raise UserError(f'configs/t2i.py has the scales tiny and 8b, not {scale!r}')
  return scales[scale]()


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


def base_8b() -> config.Config:
  return config.Config(
      objective=flow_matching.FlowMatching(shift=4.0, instruction_prob=0.1),
      system='faithful',
      model=unifusion.base_8b(),
      vlm='OpenGVLab/InternVL2_5-8B',
      vae='black-forest-labs/FLUX.1-schnell/vae',
      taps=tuple(range(4, 32, 3)),
      data=DataConfig(path='data/train.jsonl', tasks=(Task('t2i', weight=0.97), Task('reconstruct', weight=0.03)),
                      size=1024, tiles=(1, 4, 9), max_prompt_tokens=1024, max_rewrite_tokens=512, batch_size=512,
                      rewrites='runs/t2i/rewrites'),
      optim=OptimConfig(name='adamw', learning_rate=1e-4, warmup=2000, decay=0.1, clip=0.5, ema=0.9999),
      train=config.TrainConfig(steps=600_000, log_every=50, save_every=2000, preview_every=5000),
      sample=config.SampleConfig(steps=40, guidance=4.5, shift=0.0),
      mesh=MeshConfig(fsdp=32, tp=4),
      devices=128)
