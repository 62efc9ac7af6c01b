"""Qwen-Image's autoencoder, for single images, against diffusers' class."""

import json

from diffusers import AutoencoderKLQwenImage
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from unifusion_jax import sharding
from unifusion_jax.errors import UserError
from unifusion_jax.models import qwen_vae
from unifusion_jax.weights import autoencoders, convert

CONFIG = dict(base_dim=8, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=1, temperal_downsample=[False, True, True],
              latents_mean=[-0.7, 0.1, 0.9, 1.5], latents_std=[2.8, 1.4, 0.6, 1.1])


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  """(diffusers' model of random weights, its folder)."""
  torch.manual_seed(0)
  model = AutoencoderKLQwenImage(**CONFIG)
  with torch.no_grad():  # norms that are not the identity
    for name, parameter in model.named_parameters():
      if 'gamma' in name:
        parameter.add_(0.3 * torch.randn_like(parameter))
  folder = tmp_path_factory.mktemp('qwen') / 'vae'
  model.save_pretrained(folder)
  return model.eval(), folder


def to_torch(x):
  """[b y x c] -> [b c 1 y x]."""
  return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)[:, :, None]


def to_numpy(x):
  return x.detach()[:, :, 0].permute(0, 2, 3, 1).numpy()


def close(ours, theirs):
  np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize('height, width', [(32, 32), (16, 40)])
def test_parity_of_single_images(reference, mesh, height, width):
  model, folder = reference
  ours = autoencoders.load(folder)
  rng = np.random.default_rng(0)
  x = rng.uniform(-1, 1, (4, height, width, 3)).astype(np.float32)
  x[0] = 0.5
  x = sharding.shard_batch(x, mesh)
  mean, std = (torch.tensor(CONFIG[name]).view(1, -1, 1, 1, 1) for name in ('latents_mean', 'latents_std'))
  z, logvar = jax.jit(lambda m, x: (m.encode(x), m.moments(x)[1]))(ours, x)
  assert z.shape == (4, height // ours.downsampling, width // ours.downsampling, ours.channels)
  assert ours.downsampling == 8 and jax.typeof(z).sharding.spec[0] == sharding.BATCH
  with torch.no_grad():
    posterior = model.encode(to_torch(x)).latent_dist
    close(z, to_numpy((posterior.mean - mean) / std))
    close(logvar, to_numpy(posterior.logvar))
    noise = rng.standard_normal(z.shape).astype(np.float32)
    images = to_numpy(model.decode(to_torch(noise) * std + mean).sample)  # clamped
  decoded = jax.jit(lambda m, z: m.decode(z))(ours, sharding.shard_batch(noise, mesh))
  assert decoded.dtype == jnp.float32 and (np.abs(images) < 1).any()
  close(np.clip(decoded, -1, 1), images)


def test_the_last_slices_of_kernels_are_read_and_given_back(reference):
  """Every tensor but those of frame rates, once; the rest is what a single frame never meets."""
  model, folder = reference
  exported = dict(convert.export(autoencoders.load(folder), qwen_vae.RULES, qwen_vae.SIZES))
  theirs = {name: tensor[:, :, -1] if tensor.ndim == 5 else tensor for name, tensor in model.state_dict().items()
            if 'time_conv' not in name}
  assert exported.keys() == theirs.keys()
  assert all(np.array_equal(exported[name], tensor.numpy()) for name, tensor in theirs.items())
  half = autoencoders.load(folder, jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
  shapes = autoencoders.abstract(autoencoders.config(folder), jnp.bfloat16)
  assert jax.tree.structure(shapes) == jax.tree.structure(half)
  assert [x.shape for x in jax.tree.leaves(shapes)] == [x.shape for x in jax.tree.leaves(half)]


def test_configurations(reference, tmp_path):
  _, folder = reference
  public = qwen_vae.QwenVAEConfig()
  assert autoencoders.config('krea/Krea-2-Turbo/vae') == public  # reads no weights
  assert qwen_vae.QwenVAEConfig.from_json(dict(AutoencoderKLQwenImage.load_config(folder)) | {
      name: getattr(public, name) for name in vars(public)}) == public
  theirs = json.loads((folder / 'config.json').read_text())
  for change, message in ((dict(input_channels=4), 'input_channels is 4; only 3'),
                          (dict(attn_scales=[0.5]), 'attn_scales'), (dict(is_residual=True), "'is_residual'"),
                          (dict(latents_std=[1.0]), 'latents_std has 1 numbers and must have z_dim=4'),
                          (dict(base_dim=10 ** 9), 'base_dim=1000000000 must be'),
                          (dict(_class_name='AutoencoderKLWan'), 'supported are AutoencoderKL, .*QwenImage')):
    (tmp_path / 'config.json').write_text(json.dumps(theirs | change))
    with pytest.raises(UserError, match=message):
      autoencoders.config(tmp_path)
