"""Flow-matching loss of fixed records at fixed times, each record with the noise of its number.

Two models are compared on the same draws, and one model twice gives the same bits. A record is conditioned on its
caption, read after its request and its references; nothing is dropped.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax import conditioning, flow, sharding
from unifusion_jax.data import imaging, loader, transforms
from unifusion_jax.errors import UserError

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # 1 is noise


class Batch(NamedTuple):
  """Records of one shape with their numbers and arrays, and the number of rows that they are filled up to."""
  numbers: Sequence[int]
  records: Sequence[dict]
  arrays: Sequence[dict]
  rows: int


def batches(source, encoder: transforms.PromptEncoder, count: int, size: int, reference_unit: int = 0
            ) -> Iterator[Batch]:
  """The usable ones of the first `count` records of a source, `size` at a time; UserError when there are none.

  reference_unit: of `transforms.GenerationExample`.
  """
  transform = transforms.GenerationExample(encoder, cond_dropout=0.0, image_dropout=0.0,  # so nothing is random
                                           reference_unit=reference_unit)
  arrays = lambda record: (record, transform(record, np.random.default_rng(0)))
  empty = True
  for part, rows in loader.first_records(source, count, size, arrays):
    if part:
      empty = False
      yield Batch([number for number, _ in part], *zip(*(pair for _, pair in part)), rows)
  if empty:
    raise UserError(f'{source.name}: none of its first {count} records can be used: mend them or give others')


def losses(pipe, batch: Batch) -> np.ndarray:
  """The loss of each record at each of TIMES, [n times] f32, under a pipeline.UniFusionPipeline."""
  _, filled = next(sharding.batched(list(zip(batch.numbers, batch.arrays)), batch.rows))
  numbers, arrays = zip(*filled)
  rows = sharding.shard({name: np.stack([row[name] for row in arrays]) for name in arrays[0]})
  noise = pipe.noise(numbers, *arrays[0]['target'].shape[:2])
  return sharding.gather(_losses(pipe.model, pipe.frozen, rows, noise, jnp.array(TIMES)))[:len(batch.numbers)]


@jax.jit
def _losses(model, frozen: conditioning.Frozen, batch, noise, times):
  z = frozen.vae.encode(imaging.to_float(batch['target'])).astype(jnp.float32)
  states = conditioning.read(frozen.vlm, batch['input_ids'], batch['attention_mask'], batch['cond_index'],
                             batch['cond_mask'], batch.get('tiles'), taps=frozen.taps)
  cond = conditioning.condition(model, states)._replace(references=conditioning.clean_references(frozen.vae, batch))

  def at(t):
    t = jnp.full_like(z[:, 0, 0, 0], t)
    velocity = model.velocity(flow.interpolate(z, noise, t), t, *cond)
    return flow.loss(velocity, z, noise)
  return jax.lax.map(at, times).T


def summary(values: np.ndarray) -> dict[str, float]:
  """The mean of losses [n times] over all, and by time."""
  by_time = zip(TIMES, np.mean(values, axis=0, dtype=np.float64))
  return dict(mean=round(float(np.mean(values, dtype=np.float64)), 6),
              **{f'{t:g}': round(float(loss), 6) for t, loss in by_time})
