"""Fidelity of an autoencoder: images beside their reconstructions."""

from collections.abc import Iterator
import pathlib

import jax
import numpy as np

from unifusion_jax import sharding
from unifusion_jax.data import imaging, loader
from unifusion_jax.errors import UserError
from unifusion_jax.evaluation import records

SHOWN = 12  # rows of a sheet


def round_trip(vae, images: np.ndarray) -> np.ndarray:
  """Images uint8 [b y x 3] -> their reconstructions uint8 [b y x 3]."""
  decoded = _round_trip(vae, pixels(images, len(images)))
  return sharding.gather(imaging.to_uint8(decoded))[:len(images)]


@jax.jit
def _round_trip(vae, x):
  return vae.decode(vae.encode(x))


def pixels(images: np.ndarray, rows: int) -> jax.Array:
  """uint8 [b y x 3] -> [-1, 1] on the devices, repeated to at least `rows` rows that the devices share evenly."""
  padded = np.resize(images, (sharding.padded_batch(rows), *images.shape[1:]))
  return sharding.shard(imaging.to_float(padded))


def psnr(images: np.ndarray, decoded: np.ndarray) -> np.ndarray:
  """Peak signal-to-noise ratio in dB of each of the reconstructions uint8 [b y x 3], [b]."""
  errors = np.mean((decoded.astype(np.float32) - images) ** 2, axis=(1, 2, 3))
  return 10 * np.log10(255 ** 2 / np.maximum(errors, 1e-3))


def batches(source, count: int, size: int) -> Iterator[np.ndarray]:
  """Targets uint8 [b y x 3] of the first `count` records of a source, at most `size` of one shape at a time."""
  for part, _ in loader.first_records(source, count, size):
    if part:
      yield np.stack([imaging.read(record['target']) for _, record in part])


def evaluate(vae, config, folder: pathlib.Path) -> dict:
  """PSNR of the first `config.eval.examples` targets of one's own, its mean and its least, and a sheet of the first."""
  named, trained = loader.held_out(config.data)
  source, *_ = named.values()
  values, rows = [], []
  for images in batches(source, config.eval.examples, config.eval.batch_size):
    decoded = round_trip(vae, images)
    values.extend(psnr(images, decoded))
    rows += [list(pair) for pair in zip(images, decoded)][:SHOWN - len(rows)]
  if not values:
    raise UserError(f'{source.name}: none of its first {config.eval.examples} records can be used: mend them or give '
                    'others')
  with sharding.together('write images'):
    if sharding.is_main_process():
      imaging.write_png(folder / 'reconstructions.png', imaging.grid(rows, titles=['image', 'reconstruction']))
  return records.origin(source, trained, len(values), config.eval.examples) | dict(
      file=config.data.measured, psnr_db=round(float(np.mean(values)), 2), psnr_db_least=round(float(min(values)), 2))
