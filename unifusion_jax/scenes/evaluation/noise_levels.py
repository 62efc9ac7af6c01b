"""At which times a DiT falls short: true images of scenes noised to a time, drawn on from there and read by the judge.

  python -m unifusion_jax.main --config=configs/t2i.py --mode=eval --config.eval.study=times --config.eval.split=train

What is lost between two times is lost by the velocities there, so that is where training should spend more
(`objective.shift`). A tool to tune with, so it draws from the training split, from examples that no run has seen.
"""

import pathlib

import numpy as np

from unifusion_jax import pipeline, sharding
from unifusion_jax.data import imaging
from unifusion_jax.scenes import examples
from unifusion_jax.scenes.evaluation import generation

TIMES = (1.0, 0.9, 0.8, 0.7, 0.5, 0.3, 0.0)  # the last is the autoencoder alone
SEED = 2 ** 31 - 1  # of examples that no run trains on
SHOWN = 8


def evaluate(sampler: pipeline.Sampler, config, folder: pathlib.Path) -> dict:
  """The judge's verdicts (`generation.score`) by the time to which the truth was noised.

  `config.eval.examples` square images of one or two objects for the first task of the recipe, each drawn on under the
  words that are true of it.
  """
  task = config.data.chosen[0].name.partition('/')[0]
  plan = (i for i in range(100 * config.eval.examples) if examples.aspect(task, config.eval.split, i, SEED) == 'square')
  records = [examples.example(task, config.eval.split, i, SEED, config.data.size, (1, 2))
             for i, _ in zip(plan, range(config.eval.examples))]
  asked = [pipeline.Request(r['instruction'], tuple(r['references']), i, r['caption']) for i, r in enumerate(records)]
  report, drawn, size = dict(examples=len(records), task=task), [], config.eval.batch_size
  for t in TIMES:
    results = []
    for start in range(0, len(asked), size):
      rows = np.resize(np.arange(start, min(start + size, len(asked))), size)  # one shape for all batches
      results += sampler([asked[i] for i in rows], config.data.size, config.data.size,
                         [records[i]['target'] for i in rows], t)[:len(set(rows))]
    report[str(t)] = generation.score(records, results)
    drawn.append([result.image for result in results[:SHOWN]])
  if sharding.is_main_process():
    rows = [[column[i] for column in drawn] + [records[i]['target']] for i in range(min(SHOWN, len(records)))]
    imaging.write_png(folder / 'times.png', imaging.grid(rows, None, [f't = {t}' for t in TIMES] + ['truth'], cell=128))
  return report
