"""Edits: the shipped text-to-image base goes on with single-reference edits, a few text prompts among them.

  python -m unifusion_jax.main --config=configs/edit.py
  python -m unifusion_jax.main --config=configs/edit.py --mode=sample --config.sample.references=my.png \
      --config.sample.prompt="make the circle blue" --workdir=out
  python -m unifusion_jax.main --config=configs/edit.py --mode=eval
  python -m unifusion_jax.main --config=configs/edit.py --config.data.path=FOLDER/list.jsonl --workdir=runs/own

Sampling in a folder without a run uses the shipped editing model. :tiny takes minutes on two CPU cores;
docs/embedded.md has its figures, machine and time. :8b is the paper's editing fine-tune: 11,000 steps, on what
--mode=rewrite wrote of your own list (configs/t2i.py).
"""

from configs import t2i
from unifusion_jax import config
from unifusion_jax.data.loader import Task
from unifusion_jax.training.step import OptimConfig


def get_config(scale: str = 'tiny') -> config.Config:
  base = t2i.get_config(scale)
  base.data.tasks = (Task('edit', weight=0.8), Task('t2i', weight=0.15), Task('reconstruct', weight=0.05))
  if scale == 'tiny':
    # REPA helps a DiT to begin and hinders it later (HASTE, arXiv 2505.16792), and its head would be new to this base.
    base.objective.repa_weight = 0.0
    # One budget for all tasks: few shapes, so little to compile for a run of minutes.
    base.data.max_prompt_tokens, base.data.max_rewrite_tokens = 132, 52
    base.init = str(config.ASSETS / 't2i')
    base.sample.weights = str(config.ASSETS / 'edit')
    base.optim = OptimConfig('muon', learning_rate=1e-3, warmup=50, decay=0.5, ema=0.99)
    base.train = config.TrainConfig(steps=300, log_every=10, save_every=150, preview_every=150)
  else:
    base.init, base.data.rewrites = 'runs/t2i/export', 'runs/edit/rewrites'
    base.optim = OptimConfig(learning_rate=5e-5, warmup=500, decay=0.1, clip=0.5, ema=0.9999)
    base.train = config.TrainConfig(steps=11_000, log_every=50, save_every=1000, preview_every=1000)
  return base
