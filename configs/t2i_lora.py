"""A style or a subject by adapters alone: a LoRA of a text-to-image model, from a folder of images with captions.

  python -m unifusion_jax.main --config=configs/t2i_lora.py
  python -m unifusion_jax.data.convert --input=my/style --output=data/style
  python -m unifusion_jax.main --config=configs/t2i_lora.py:krea2 --config.data.path=data/style
  python -m unifusion_jax.main --config=configs/t2i_lora.py:krea2 --mode=export

A folder holds about 20 images, each with a .txt of the same name beside it that describes it; the second command makes
records of it.
:tiny trains adapters of the shipped base on scenes for minutes on two CPU cores.
:krea2 trains those of Krea 2 (Raw) at 1024 px, rank 32; for a TPU v6e:2x4, or with --config.optim.accumulate=8 for one
GPU of 80 GB. It has not been trained.
Sampled here with --config.sample.loras=FILE, from Raw or Turbo, and by diffusers. docs/krea2.md.
"""

from configs import edit_lora
from unifusion_jax import config
from unifusion_jax.data.config import Task
from unifusion_jax.errors import UserError


def get_config(scale: str = 'tiny') -> config.Config:
  if scale not in ('tiny', 'krea2'):
    raise UserError(f'configs/t2i_lora.py has the scales tiny, krea2, not {scale!r}')
  made = edit_lora.get_config(scale)
  made.data.tasks = (Task('t2i'),)
  # Attention and MLPs of the DiT: how text is read need not change for a style.
  made.objective.lora.targets = ('attention', 'mlp')
  if scale == 'krea2':
    made.objective.instruction_prob = 0.0  # Krea's own prompt has the caption in its place
    made.data.path = 'data/style'
    made.sample.verifi = False
    made.train.steps = 2000
  return made
