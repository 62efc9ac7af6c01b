"""Temporaries of decoding one image, undivided and in tiles, as the compiler counts them; nothing is computed.

  JAX_PLATFORMS=cpu python -m benchmarks.tiles
"""

from absl import app
import jax
import jax.numpy as jnp

from unifusion_jax import sharding
from unifusion_jax.weights import autoencoders

NAMES = 'black-forest-labs/FLUX.1-dev/vae', 'krea/Krea-2-Turbo/vae'
SIZES = (1024, 0), (1024, 512), (2048, 1024), (4096, 1024)  # pixels of an image's sides, and of its tiles'


def main(_):
  jax.config.update('jax_disable_most_optimizations', True)  # compiles faster
  decode = jax.jit(lambda model, z, tile: model.decode(z, tile), static_argnums=2)
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig())):
    for name in NAMES:
      model = autoencoders.abstract(autoencoders.config(name), jnp.bfloat16)
      for side, tile in SIZES:
        places = side // model.downsampling
        latents = sharding.batch_spec(jax.ShapeDtypeStruct((places, places, model.channels), jnp.float32), 1)
        used = decode.lower(model, latents, tile).compile().memory_analysis().temp_size_in_bytes
        print(f'{name:34} {side} px, tiles of {tile}: {used / 2 ** 30:.2f} GiB')


if __name__ == '__main__':
  app.run(main)
