"""The autoencoder against diffusers' class, on many devices."""

import json

from diffusers import AutoencoderKL
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from unifusion_jax import sharding
from unifusion_jax.errors import UserError
from unifusion_jax.models import vae
from unifusion_jax.weights import autoencoders, convert, safetensors_io

CONFIGS = {
  'flux': dict(block_out_channels=(8, 16, 16, 16), layers_per_block=1, latent_channels=16, norm_num_groups=4,
               scaling_factor=0.36, shift_factor=0.11, use_quant_conv=False, use_post_quant_conv=False),
  'stable diffusion 3': dict(block_out_channels=(8, 8, 16, 16), layers_per_block=2, latent_channels=16,
                             norm_num_groups=4, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
                             use_post_quant_conv=False, mid_block_add_attention=True),
  'stable diffusion': dict(block_out_channels=(8, 16), layers_per_block=2, latent_channels=4, norm_num_groups=8),
  'no attention': dict(block_out_channels=(6, 12, 6), layers_per_block=1, latent_channels=3, norm_num_groups=3,
                       mid_block_add_attention=False, scaling_factor=1.5),
}


def reference(config: dict) -> AutoencoderKL:
  torch.manual_seed(0)
  depth = len(config['block_out_channels'])
  model = AutoencoderKL(down_block_types=('DownEncoderBlock2D',) * depth, up_block_types=('UpDecoderBlock2D',) * depth,
                        **config)
  with torch.no_grad():  # norms that are not the identity
    for name, parameter in model.named_parameters():
      if 'norm' in name:
        parameter.add_(0.3 * torch.randn_like(parameter))
  return model.eval()


def to_torch(x):
  return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def to_numpy(x):
  return x.detach().permute(0, 2, 3, 1).numpy()


def close(ours, theirs):
  np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize('name', CONFIGS)
def test_parity_and_round_trip(tmp_path, mesh, name):
  """Moments and images of a sharded batch that is not square; and the folder goes back to diffusers unchanged."""
  model = reference(CONFIGS[name])
  model.save_pretrained(tmp_path / 'theirs')
  ours = vae.load(tmp_path / 'theirs')
  rng = np.random.default_rng(0)
  x = rng.uniform(-1, 1, (4, 16, 24, 3)).astype(np.float32)
  x[0] = 0.5  # a flat image, where norms divide by nearly nothing
  mean, logvar = jax.jit(lambda m, x: m.moments(x))(ours, sharding.shard_batch(x, mesh))
  assert jax.typeof(mean).sharding.spec[0] == sharding.BATCH
  with torch.no_grad():
    posterior = model.encode(to_torch(x)).latent_dist
    close(mean, to_numpy(posterior.mean))
    close(logvar, to_numpy(posterior.logvar))
    z = rng.standard_normal(mean.shape).astype(np.float32)
    shift = model.config.shift_factor or 0.0
    images = model.decode(to_torch(z) / model.config.scaling_factor + shift).sample
  decoded = jax.jit(lambda m, z: m.decode(z))(ours, sharding.shard_batch(z, mesh))
  assert decoded.dtype == jnp.float32 and jax.typeof(decoded).sharding.spec[0] == sharding.BATCH
  close(decoded, to_numpy(images))

  vae.save(ours, tmp_path / 'ours')
  back = AutoencoderKL.from_pretrained(tmp_path / 'ours')
  assert back.state_dict().keys() == model.state_dict().keys()
  assert all(torch.equal(p, back.state_dict()[key]) for key, p in model.state_dict().items())
  ours, theirs = ({k: list(v) if isinstance(v, tuple) else v for k, v in m.config.items() if k[0] != '_'}
                  for m in (back, model))
  assert ours == theirs


def from_torch(model: AutoencoderKL) -> vae.Autoencoder:
  config = vae.VAEConfig.from_json(dict(model.config))
  tensors = {name: p.detach().numpy() for name, p in model.named_parameters()}
  return convert.load(lambda: vae.Autoencoder(config, rngs=nnx.Rngs(0)), tensors, vae.RULES, {})


@pytest.fixture
def small():
  return from_torch(reference(dict(block_out_channels=(8, 8), layers_per_block=1, latent_channels=4,
                                   norm_num_groups=4, scaling_factor=0.7, shift_factor=0.2)))


def test_encode_scales_the_mean(small, mesh):
  x = sharding.shard_batch(np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32), mesh)
  mean, _ = jax.jit(lambda m, x: m.moments(x))(small, x)
  z = jax.jit(lambda m, x: m.encode(x))(small, x)
  np.testing.assert_allclose(z, (np.asarray(mean) - 0.2) * 0.7, rtol=1e-5)
  assert z.shape == (4, 8 // small.downsampling, 8 // small.downsampling, small.channels) == (4, 4, 4, 4)


def test_gradient_reaches_every_weight_and_agrees_with_torch(mesh):
  model = reference(dict(block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4,
                         scaling_factor=0.36, shift_factor=0.11))
  ours = from_torch(model)
  x = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32)

  def loss(m, x):
    mean, logvar = m.moments(x)
    config = m.config
    return jnp.mean((m.decode((mean - config.shift_factor) * config.scaling_factor) - x) ** 2) + jnp.mean(logvar ** 2)

  value, gradient = jax.jit(jax.value_and_grad(loss))(ours, sharding.shard_batch(x, mesh))
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: jax.typeof(a) == jax.typeof(b), gradient, ours)))
  posterior = model.encode(to_torch(x)).latent_dist
  theirs = ((model.decode(posterior.mean).sample - to_torch(x)) ** 2).mean() + (posterior.logvar ** 2).mean()
  theirs.backward()
  np.testing.assert_allclose(value, theirs.item(), rtol=1e-5)
  exported = dict(convert.export(gradient, vae.RULES, {}))
  largest = max(np.abs(g).max() for g in exported.values())
  for name, parameter in model.named_parameters():
    np.testing.assert_allclose(exported[name], parameter.grad, atol=1e-4 * largest, rtol=1e-3, err_msg=name)
  assert all(np.any(g) for g in exported.values())


def test_bfloat16_computes_in_bfloat16(small, mesh, tmp_path):
  vae.save(small, tmp_path)
  half = vae.load(tmp_path, jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
  z = sharding.shard_batch(np.random.default_rng(0).standard_normal((4, 4, 4, 4)).astype(np.float32), mesh)
  decode = jax.jit(lambda m, z: m.decode(z))
  a, b = decode(small, z), decode(half, z)
  assert b.dtype == jnp.float32
  assert 0 < np.abs(a - b).max() < 0.1 * np.abs(a).max()


def test_attention_names_of_old_releases(small, tmp_path):
  vae.save(small, tmp_path)
  old = {new: old for old, new in vae.OLD_NAMES.items()}
  tensors = {name: tensor[...] for name, tensor in safetensors_io.read(tmp_path).items()}
  renamed = {}
  for name, x in tensors.items():
    for new, was in old.items():
      name = name.replace(f'attentions.0.{new}.', f'attentions.0.{was}.')
    renamed[name] = x
  assert renamed.keys() != tensors.keys()
  safetensors_io.write(tmp_path / f'{vae.STEM}.safetensors', renamed)
  again = vae.load(tmp_path)
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), small, again)))


def test_config_round_trip_and_refusals(tmp_path):
  config = vae.VAEConfig(block_out_channels=(8, 16), norm_num_groups=4, shift_factor=0.1)
  assert vae.VAEConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
  assert config.downsampling == 2
  module = vae.Autoencoder(config, rngs=nnx.Rngs(0))
  config.scaling_factor = 9.0  # as a flag would
  assert module.config.scaling_factor == 0.18215
  for change, message in (({'act_fn': 'relu'}, 'act_fn is relu; only silu'),
                          ({'down_block_types': ['AttnDownEncoderBlock2D', 'DownEncoderBlock2D']}, 'down_block_types'),
                          ({'latents_mean': [0.0]}, 'latents_mean'), ({'base_dim': 96}, "'base_dim'")):
    with pytest.raises(ValueError, match=message):
      vae.VAEConfig.from_json(config.to_json() | change)
  with pytest.raises(ValueError, match=r'block_out_channels \[6\] do not divide into norm_num_groups=4'):
    vae.Autoencoder(vae.VAEConfig(block_out_channels=(6, 8), norm_num_groups=4), rngs=nnx.Rngs(0))


def test_any_autoencoder_by_the_class_of_its_config(small, tmp_path):
  vae.save(small, tmp_path / 'vae')
  loaded, shapes = autoencoders.load(tmp_path / 'vae'), autoencoders.abstract(autoencoders.config(tmp_path / 'vae'))
  assert loaded.config == small.config == autoencoders.config(str(tmp_path / 'vae'))
  assert jax.tree.structure(loaded) == jax.tree.structure(shapes)
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), small, loaded)))
  assert {leaf.dtype for leaf in jax.tree.leaves(autoencoders.load(tmp_path / 'vae', jnp.bfloat16))} == {
      jnp.dtype(jnp.bfloat16)}
  assert autoencoders.config('black-forest-labs/FLUX.1-schnell/vae').scaling_factor == 0.3611  # reads no weights


def test_folders_that_hold_no_autoencoder_are_refused(small, tmp_path):
  vae.save(small, tmp_path)
  described = json.loads((tmp_path / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(described | {'_class_name': 'VQModel'}))
  for call in (autoencoders.load, autoencoders.config):
    with pytest.raises(UserError, match="class 'VQModel' is not supported; supported are AutoencoderKL"):
      call(tmp_path)
    with pytest.raises(UserError, match='no such folder'):
      call(tmp_path / 'nothing')
  (tmp_path / 'config.json').unlink()
  with pytest.raises(UserError, match='has no config.json: give the folder of a diffusers autoencoder'):
    autoencoders.load(tmp_path)


def test_diffusers_reads_several_files(small, tmp_path):
  convert.save(small, vae.RULES, {}, tmp_path, small.config.to_json(), stem=vae.STEM, shard=20_000)
  assert len(list(tmp_path.glob('*.safetensors'))) > 3
  theirs = AutoencoderKL.from_pretrained(tmp_path).state_dict()
  wanted = dict(convert.export(small, vae.RULES, {}))
  assert theirs.keys() == wanted.keys()
  assert all(np.array_equal(theirs[name].numpy(), x) for name, x in wanted.items())
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), small, vae.load(tmp_path))))


def test_images_that_do_not_divide(small):
  with pytest.raises(ValueError, match='multiples of 2 pixels, got 8 x 7'):
    small.moments(jnp.zeros((4, 8, 7, 3)))
