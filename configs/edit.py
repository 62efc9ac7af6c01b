"""Edits: single-reference edits and a few text prompts, trained from the shipped text-to-image base.

  python -m unifusion_jax.main --config=configs/edit.py
  python -m unifusion_jax.main --config=configs/edit.py --mode=sample --config.sample.references=my.png \
      --config.sample.prompt="make the circle blue" --workdir=out
  python -m unifusion_jax.main --config=configs/edit.py --mode=eval
  python -m unifusion_jax.main --config=configs/edit.py --config.data.path=FOLDER/list.jsonl --workdir=runs/own

Sampling in a folder without a run uses the shipped editing model.
:tiny trains for minutes on two CPU cores. The shipped weights make the change and keep all else in 0.75 of 200 test
edits, and make the change in 0.87 (docs/embedded.md); their stages are in unifusion_jax/assets/tiny/provenance.json.
:8b is the paper's editing fine-tune of 11,000 steps, at 1024 px. Before it :8b_256 and :8b_512, which are ours, learn
to read references where a step is cheap; --config.init=runs/t2i_8b/export on :8b leaves them out, as the paper does.
The first starts from the export of configs/t2i.py:8b; all train on your own list, on the pod that it names. They have
not been trained. In this order, each in a workdir of its own:
  python -m unifusion_jax.main --config=configs/edit.py:8b_256 --mode=rewrite \
      --config.mesh.data=-1 --config.mesh.fsdp=1 --config.mesh.tp=8   # the VLM's rewrites, for all stages
  python -m unifusion_jax.main --config=configs/edit.py:8b_256
  python -m unifusion_jax.main --config=configs/edit.py:8b_256 --mode=export
  python -m unifusion_jax.main --config=configs/edit.py:8b_512
  python -m unifusion_jax.main --config=configs/edit.py:8b_512 --mode=export
  python -m unifusion_jax.main --config=configs/edit.py:8b
  python -m unifusion_jax.main --config=configs/edit.py:8b --mode=export
:krea2 tunes all of Krea 2 (Raw, 12.8B parameters with open weights) to edit at 1024 px, its references read by
Qwen3-VL-4B alone; for a TPU v6e:8x8 or v5e:16x16. It has not been trained. configs/edit_lora.py:krea2 takes one GPU.
  python -m unifusion_jax.main --config=configs/edit.py:krea2 --config.data.path=FOLDER/edits.jsonl
With --config.objective.reference_latents=true the DiT reads clean latents of the references too (docs/krea2.md).
"""

import dataclasses

from configs import t2i
from unifusion_jax import config, parts
from unifusion_jax.data.buckets import PHOTOGRAPHS
from unifusion_jax.data.config import DataConfig, Task
from unifusion_jax.errors import UserError
from unifusion_jax.models import unifusion
from unifusion_jax.objectives import flow_matching
from unifusion_jax.training.step import OptimConfig

# Of :8b the paper's; of the others ours.
STEPS = {'8b_256': 8000, '8b_512': 4000, '8b': 11_000}


def get_config(scale: str = 'tiny') -> config.Config:
  if scale not in ('tiny', *STEPS, 'krea2'):
    raise UserError(f'configs/edit.py has the scales tiny, {", ".join(STEPS)}, krea2, not {scale!r}')
  if scale == 'krea2':
    return krea2()
  base = t2i.get_config(scale)
  # Edits of single references: the paper's; the shares beside them are ours.
  base.data.tasks = (Task('edit', weight=0.8), Task('t2i', weight=0.15), Task('reconstruct', weight=0.05))
  if scale == 'tiny':
    # No REPA: it helps a DiT early and hinders it later (HASTE, arXiv 2505.16792), and the base has no head for it.
    base.objective.repa_weight = 0.0
    # One budget for all tasks: few shapes, so little to compile in a run of minutes.
    base.data.max_prompt_tokens, base.data.max_rewrite_tokens = 132, 52
    base.init = str(config.ASSETS / 't2i')
    base.sample.weights = str(config.ASSETS / 'edit')
    # Muon is not in the paper (docs/training.md).
    base.optim = OptimConfig(name='muon', learning_rate=1e-3, warmup=50, decay=0.5, ema=0.99)
    base.train = config.TrainConfig(steps=300, log_every=10, save_every=150, preview_every=150)
  else:
    previous = t2i.before(scale)
    base.init = f'runs/edit_{previous}/export' if previous else 'runs/t2i_8b/export'
    base.data.rewrites = f'runs/edit_{next(iter(STEPS))}/rewrites'
    # Batch size: ours, the paper gives none; a reference is as many tokens at every size, so all take it in two halves.
    # Learning rate: Iris-3B's at 1024 px. Warm-up and decay: ours.
    base.data.batch_size = 512
    base.optim = dataclasses.replace(base.optim, learning_rate=5e-5, warmup=500, accumulate=2)
    base.train = config.TrainConfig(steps=STEPS[scale], log_every=50, save_every=1000, preview_every=1000)
  return base


def krea2() -> config.Config:
  return config.Config(
      # Half of the edits are conditioned on the instruction, as people give it, half on the caption of the result.
      # Shift: that of Krea's community trainers at 1024 px.
      objective=flow_matching.FlowMatching(shift=2.5, instruction_prob=0.5),
      layout='krea2',  # of what has no reference; edits are VERIFI's prompts, as Krea 2 has none
      system='faithful',
      model=unifusion.krea2(),
      vlm='Qwen/Qwen3-VL-4B-Instruct',
      vae='krea/Krea-2-Raw/vae',
      init='krea/Krea-2-Raw/transformer',
      taps=parts.TAPS,
      data=DataConfig(
          path='data/edits.jsonl',
          tasks=(Task('edit', weight=0.8), Task('t2i', weight=0.2)),  # ours: editing is new, text to image must stay
          size=1024, aspects=PHOTOGRAPHS, unit=64, tiles=(1, 4), max_prompt_tokens=1024, max_rewrite_tokens=512,
          batch_size=256),
      # Learning rate: a community trainer's of full tuning (1e-5). One image a chip at a time on 64 chips: ours.
      optim=OptimConfig(learning_rate=1e-5, warmup=500, decay=0.1, ema=0.999, accumulate=4),
      train=config.TrainConfig(steps=10_000, log_every=50, save_every=1000, preview_every=1000),
      sample=config.SampleConfig(steps=40, guidance=4.5, shift=0.0, batch_size=1),
      devices=64)
