"""Decoding in tiles against the undivided image, and the memory that it takes."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unifusion_jax import config, sharding
from unifusion_jax.errors import UserError
from unifusion_jax.models import qwen_vae, tiles, vae
from unifusion_jax.weights import autoencoders

decode = jax.jit(lambda model, z, tile: model.decode(z, tile), static_argnums=2)


@pytest.fixture
def device():
  """A mesh of one device: programs compile in a third of the time."""
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])):
    yield


def test_seams_of_the_embedded_autoencoder(device):
  """Below 1/255 of the range of pixels on a smooth image, though norms divide by the moments of the whole image."""
  model = autoencoders.load(config.ASSETS / 'vae')
  y, x = np.mgrid[:176, :128] / 128
  image = np.stack([np.cos(x + 2 * y), np.cos(3 * x + y), np.cos(2 * x + 4 * y)], -1)[None].astype(np.float32)
  z = jax.jit(lambda model, x: model.encode(x))(model, sharding.shard(image))
  error = np.abs(decode(model, z, 0) - decode(model, z, 128))
  assert 0 < error.max() < 2 / 255
  # A tile whose square is no smaller than the image: the same program as ever
  assert decode.lower(model, z, 152).as_text() == decode.lower(model, z, 0).as_text()


def test_norms_of_places_alone_leave_no_difference(mesh):
  latents = dict(z_dim=4, latents_mean=(0.1,) * 4, latents_std=(1.5,) * 4)
  model = vae.Autoencoder(qwen_vae.QwenVAEConfig(4, dim_mult=(1, 2), num_res_blocks=1, **latents), rngs=nnx.Rngs(0))
  z = np.random.default_rng(0).standard_normal((4, 15, 18, 4)).astype(np.float32)
  z = sharding.shard_batch(z, mesh)
  divided = decode(model, z, 22)
  assert jax.typeof(divided).sharding.spec[0] == sharding.BATCH
  np.testing.assert_allclose(divided, decode(model, z, 0), atol=1e-5)
  with pytest.raises(UserError, match='decode_tile=16: tiles overlap by 16 pixels and must be larger'):
    model.decode(z, 16)


@pytest.mark.parametrize('length, most', [(19, 17), (100, 32), (512, 128), (129, 128), (30, 128)])
def test_tiles_cover_an_axis(length, most):
  axis = tiles.Axis.of(length, most, reach=7)
  assert axis.size <= min(most, length) and axis.starts[0] == 0 and axis.starts[-1] + axis.size == length
  for factor in (1, 4):
    total = np.zeros(length * factor)
    for start, weight in zip(axis.starts, axis.weights(factor)):
      total[start * factor:][:axis.size * factor] += weight
      near = weight[:7 * factor] if start else weight[-7 * factor:] if start + axis.size < length else 0
      assert not np.any(near)  # what the edge of a tile, which is none of the image, reaches
    np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_memory_is_that_of_a_tile(device):
  """FLUX.1's size, from its shapes: sixteen times the pixels of a tile take less than half as much memory again."""
  model = autoencoders.abstract(autoencoders.config('black-forest-labs/FLUX.1-dev/vae'), jnp.bfloat16)

  def temporaries(side, tile):
    latents = sharding.batch_spec(jax.ShapeDtypeStruct((side // 8, side // 8, model.channels), jnp.float32), 1)
    return decode.lower(model, latents, tile).compile().memory_analysis().temp_size_in_bytes
  assert temporaries(4096, 1024) < 1.5 * temporaries(1024, 0)
