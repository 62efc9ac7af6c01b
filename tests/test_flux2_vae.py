"""FLUX.2's autoencoder against diffusers' class, with its latents in patches as diffusers' pipeline has them."""

from diffusers import AutoencoderKLFlux2, Flux2Pipeline
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from unifusion_jax import sharding
from unifusion_jax.errors import UserError
from unifusion_jax.models import flux2_vae
from unifusion_jax.weights import autoencoders


def to_torch(x):
  return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def close(ours, theirs):
  theirs = theirs.permute(0, 2, 3, 1).numpy()
  np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=0)


@torch.no_grad()
def test_parity_and_round_trip(mesh, tmp_path):
  """Encoded and decoded patches of images that are not square; and the folder goes back to diffusers."""
  torch.manual_seed(0)
  theirs = AutoencoderKLFlux2(down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2,
                              block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4)
  theirs.bn.running_mean.normal_()
  theirs.bn.running_var.uniform_(0.5, 2.0)
  theirs.eval().save_pretrained(tmp_path / 'theirs')
  ours = autoencoders.load(tmp_path / 'theirs')
  assert (ours.channels, ours.downsampling) == (16, 4)
  x = np.random.default_rng(0).uniform(-1, 1, (4, 16, 24, 3)).astype(np.float32)
  z = jax.jit(lambda m, x: m.encode(x))(ours, sharding.shard_batch(x, mesh))
  assert jax.typeof(z).sharding.spec[0] == sharding.BATCH
  mean = theirs.bn.running_mean.view(1, -1, 1, 1)
  std = torch.sqrt(theirs.bn.running_var.view(1, -1, 1, 1) + theirs.config.batch_norm_eps)
  close(z, (Flux2Pipeline._patchify_latents(theirs.encode(to_torch(x)).latent_dist.mean) - mean) / std)
  noise = np.random.default_rng(1).standard_normal(z.shape).astype(np.float32)
  images = theirs.decode(Flux2Pipeline._unpatchify_latents(to_torch(noise) * std + mean)).sample
  close(jax.jit(lambda m, z: m.decode(z))(ours, sharding.shard_batch(noise, mesh)), images)

  flux2_vae.save(ours, tmp_path / 'ours')
  back = AutoencoderKLFlux2.from_pretrained(tmp_path / 'ours').state_dict()
  wanted = {name: tensor for name, tensor in theirs.state_dict().items() if 'num_batches' not in name}
  assert all(torch.equal(back[name], tensor) for name, tensor in wanted.items())
  assert autoencoders.config(tmp_path / 'ours') == autoencoders.config(tmp_path / 'theirs') == ours.config
  half = autoencoders.load(tmp_path / 'ours', jnp.bfloat16)
  assert half.mean.dtype == jnp.float32 and half.unscaled.encoder.conv_in.kernel.dtype == jnp.bfloat16


def test_configurations():
  public = autoencoders.config('black-forest-labs/FLUX.2-dev/vae')
  assert flux2_vae.Flux2VAEConfig.from_json({}) == public
  assert flux2_vae.Flux2VAEConfig.from_json(public.to_json()) == public
  assert (public.channels, public.downsampling) == (128, 16)
  for change, message in ((dict(patch_size=[4, 4]), 'patch_size'), (dict(act_fn='relu'), 'act_fn'),
                          (dict(decoder_block_out_channels=[96, 192, 384, 384]), 'decoder_block_out_channels')):
    with pytest.raises(UserError, match=message):
      flux2_vae.Flux2VAEConfig.from_json(public.to_json() | change)
