"""Embedded autoencoder: AutoencoderKL, 8x downsampling, 16 channels, 1.0M parameters, on scenes at 64 px.

  python -m unifusion_jax.main --config=configs/vae.py
  python -m unifusion_jax.main --config=configs/vae.py --mode=eval
  python -m unifusion_jax.main --config=configs/vae.py --mode=export   # then copy runs/vae/export to the assets

Hardware: two CPU cores. The shipped weights reach 0.974 of 500 test scenes read back exactly, at 35.2 dB
(docs/embedded.md); their stages, with steps and seeds, are in unifusion_jax/assets/tiny/provenance.json.
"""

from unifusion_jax import config
from unifusion_jax.data.config import DataConfig, Task
from unifusion_jax.errors import UserError
from unifusion_jax.models import vae
from unifusion_jax.scenes import autoencoder
from unifusion_jax.scenes.evaluation import settings
from unifusion_jax.sharding import MeshConfig
from unifusion_jax.training.step import OptimConfig


def get_config(scale: str = 'tiny') -> config.Config:
  if scale != 'tiny':
    raise UserError(f'configs/vae.py has the scale tiny, not {scale!r}')
  return config.Config(
      objective=autoencoder.AutoencoderObjective(),
      model=vae.VAEConfig(block_out_channels=(16, 32, 64, 64), layers_per_block=1, latent_channels=16,
                          norm_num_groups=8, scaling_factor=1.0),  # 1.0: measured at the export
      data=DataConfig(tasks=(Task('reconstruct'),), batch_size=32),
      optim=OptimConfig(name='adamw', learning_rate=2e-3, warmup=200, decay=0.5, ema=0.998),
      train=config.TrainConfig(steps=2600, log_every=20, save_every=500, preview_every=1000),
      mesh=MeshConfig(data=-1, fsdp=1),
      eval=settings.AutoencoderEvaluation(examples=500))
