"""How much of a picture the autoencoder gives back: scenes that the judge still reads exactly, and PSNR."""

import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax import sharding
from unifusion_jax.data import mix
from unifusion_jax.data.scenes import judge
from unifusion_jax.data.scenes import scene as world


@jax.jit
def _round_trip(vae, x):
  return vae.decode(vae.encode(x))


def round_trip(vae, pictures: np.ndarray) -> np.ndarray:
  """uint8 [b y x 3] -> what comes back, uint8 [b y x 3]."""
  back = _round_trip(vae, sharding.put(pictures.astype(np.float32) / 127.5 - 1.0))
  return sharding.fetch(jnp.round(jnp.clip((back + 1.0) * 127.5, 0, 255)).astype(jnp.uint8))


def evaluate(vae, config) -> dict:
  """Rates over `config.eval.examples` scenes of the split, all shapes of canvas."""
  source, _ = mix.mix(config.data, split=config.eval.split)[0]
  shapes: dict[tuple, list[int]] = {}
  for i in range(config.eval.examples):
    shapes.setdefault(source.bucket(i), []).append(i)
  exact, drawn_exact, errors = [], [], []
  for members in shapes.values():
    for start in range(0, len(members), config.eval.batch_size):
      records = [source[i] for i in members[start:start + config.eval.batch_size]]
      pictures = np.stack([record['target'] for record in records])
      padded = np.resize(pictures, (config.eval.batch_size, *pictures.shape[1:]))
      for record, picture, back in zip(records, pictures, round_trip(vae, padded)):
        scene = world.Scene.from_json(record['scene'])
        exact.append(judge.exact(judge.read(back), scene))
        drawn_exact.append(judge.exact(judge.read(picture), scene))
        errors.append(np.mean((back.astype(np.float32) - picture) ** 2))
  psnr = float(np.mean(10 * np.log10(255 ** 2 / np.maximum(errors, 1e-3))))
  return dict(split=config.eval.split, examples=len(exact), exact=float(np.mean(exact)),
              exact_as_drawn=float(np.mean(drawn_exact)), psnr_db=round(psnr, 2))
