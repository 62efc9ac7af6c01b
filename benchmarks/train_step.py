"""Examples per second of a recipe's train step, repeated on one batch.

  JAX_PLATFORMS=cpu python -m benchmarks.train_step --config=configs/t2i.py --cpu_devices=2
"""

import json
import statistics
import time

from absl import app, flags
import jax

from unifusion_jax import command_line, sharding
from unifusion_jax.commands import train
from unifusion_jax.training import step

command_line.define()
_CPU_DEVICES = flags.DEFINE_integer('cpu_devices', 1, 'Number of jax devices on a CPU.')
_STEPS = flags.DEFINE_integer('steps', 12, 'Timed steps, after the first, which compiles.')


def main(_):
  jax.config.update('jax_num_cpu_devices', _CPU_DEVICES.value)
  config = command_line.read(flags.FLAGS.config, flags.FLAGS.setting)
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    frozen, tx = config.objective.frozen(config), step.optimizer(config.optim, config.train.steps)
    state = jax.jit(lambda params: step.init(params, tx), donate_argnums=0)(config.objective.init(config))
    train_step = step.make_train_step(config.objective.loss, tx, config.optim)
    data = train.batches(config)
    batch = next(data)
    data.close()
    batch = sharding.shard_batch(batch, mesh)
    seconds = []
    for _ in range(_STEPS.value + 1):
      start = time.perf_counter()
      state, metrics = train_step(state, frozen, batch, jax.random.key(0))
      jax.block_until_ready((state, metrics))
      seconds.append(time.perf_counter() - start)
  rates = sorted(config.data.batch_size / s for s in seconds[1:])
  median, least, most = (round(rate, 1) for rate in (statistics.median(rates), rates[0], rates[-1]))
  print(json.dumps(dict(
      devices=mesh.size, shapes={name: x.shape for name, x in batch.items()}, first_step_s=round(seconds[0], 1),
      examples_per_second=dict(median=median, least=least, most=most))))


if __name__ == '__main__':
  app.run(main, flags_parser=command_line.parse)
