"""Fidelity of an autoencoder: images beside their reconstructions."""

from collections.abc import Iterator
import pathlib

import jax
import numpy as np

from unifusion_jax import sharding
from unifusion_jax.data import imaging, loader
from unifusion_jax.errors import UserError
from unifusion_jax.evaluation import images as metrics
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


def batches(source, count: int, size: int) -> Iterator[np.ndarray]:
  """Targets uint8 [b y x 3] of the first `count` records of a source, at most `size` of one shape at a time."""
  for part, _ in loader.first_records(source, count, size):
    if part:
      yield np.stack([imaging.read(record['target']) for _, record in part])


def evaluate(vae, config, folder: pathlib.Path) -> dict:
  """Distances of the first `config.eval.examples` targets of one's own to their reconstructions, and a sheet.

  `psnr_db` and `psnr_db_least` are the mean and the least, `similarity` is `images.summary`.
  """
  lpips = metrics.Lpips(config.eval.lpips) if config.eval.lpips else None  # before anything slow
  named, trained = loader.held_out(config.data)
  source, *_ = named.values()
  measures, rows = [], []
  for images in batches(source, config.eval.examples, config.eval.batch_size):
    decoded = round_trip(vae, images)
    measures.append(metrics.measures(images, decoded, lpips))
    rows += [list(pair) for pair in zip(images, decoded)][:SHOWN - len(rows)]
  if not measures:
    raise UserError(f'{source.name}: none of its first {config.eval.examples} records can be used: mend them or give '
                    'others')
  with sharding.together('write images'):
    if sharding.is_main_process():
      imaging.write_png(folder / 'reconstructions.png', imaging.grid(rows, titles=['image', 'reconstruction']))
  values = {name: np.concatenate([part[name] for part in measures]) for name in measures[0]}
  decibels = values['psnr_db']
  return records.origin(source, trained, len(decibels), config.eval.examples) | dict(
      file=config.data.measured, psnr_db=round(float(np.mean(decibels)), 2),
      psnr_db_least=round(float(np.min(decibels)), 2), similarity=metrics.summary(values))
