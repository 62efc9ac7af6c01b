"""Edits by adapters alone: a LoRA teaches a text-to-image model to edit, which itself stays as it is.

  python -m unifusion_jax.main --config=configs/edit_lora.py
  python -m unifusion_jax.main --config=configs/edit_lora.py --mode=export
  python -m unifusion_jax.main --config=configs/edit_lora.py:krea2 --config.data.path=FOLDER/edits.jsonl

:tiny trains adapters of the shipped text-to-image base for minutes on two CPU cores.
:krea2 trains those of Krea 2 (Raw) at 1024 px, rank 32, on a list of edits (docs/data.md); for a TPU
v6e:2x4, or with --config.optim.accumulate=8 for one GPU of 80 GB. It has not been trained. The export,
pytorch_lora_weights.safetensors, is a file for diffusers and others; sampled here with --config.sample.loras=FILE, from
Raw or Turbo. docs/krea2.md. References are read by the VLM alone; with --config.objective.reference_latents=true the
DiT reads their clean latents too.
"""

from configs import edit
from unifusion_jax import config
from unifusion_jax.errors import UserError
from unifusion_jax.training.step import OptimConfig
from unifusion_jax.weights.lora import LoRAConfig


def get_config(scale: str = 'tiny') -> config.Config:
  if scale not in ('tiny', 'krea2'):
    raise UserError(f'configs/edit_lora.py has the scales tiny, krea2, not {scale!r}')
  made = edit.get_config(scale)
  made.sample.weights = None  # the base, with the adapters of the run
  if scale == 'tiny':
    made.objective.lora = LoRAConfig(rank=16, alpha=16.0, targets=('all',))
    made.optim = OptimConfig(learning_rate=2e-3, warmup=50, decay=0.5, ema=0.99)
    return made
  # Rank, alpha, learning rate: of Krea's community trainers (musubi-tuner). Reading references is LAP's and the
  # refiner's work too, so they are trained beside the DiT.
  made.objective.lora = LoRAConfig(rank=32, alpha=32.0, targets=('attention', 'mlp', 'lap', 'refiner'))
  made.optim = OptimConfig(learning_rate=1e-4, warmup=100, decay=0.0, ema=0.999)
  made.data.batch_size = 8
  made.train = config.TrainConfig(steps=5000, log_every=20, save_every=500, preview_every=500)
  made.devices = 8
  return made
