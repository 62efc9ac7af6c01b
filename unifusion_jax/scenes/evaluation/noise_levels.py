"""Success rates by noise level: the judge reads true images that were noised to a time and denoised from there.

  python -m unifusion_jax.main --config=configs/t2i.py --mode=eval --config.eval.study=noise_levels \
      --config.eval.split=train

A rate that falls between two times is lost by the velocities there, so training should spend more of its times there
(`objective.shift`). As the study tunes training, it takes the training split, with examples that no run has seen.
"""

import pathlib

from unifusion_jax import pipeline, sharding
from unifusion_jax.data import imaging
from unifusion_jax.request import Request
from unifusion_jax.scenes import examples
from unifusion_jax.scenes.evaluation import generation

TIMES = (1.0, 0.9, 0.8, 0.7, 0.5, 0.3, 0.0)  # the last is the autoencoder alone
SEED = 2 ** 31 - 1  # of the examples: no run trains with it
SHOWN = 8  # rows of the sheet


def evaluate(pipe: pipeline.UniFusionPipeline, config, folder: pathlib.Path) -> dict:
  """`generation.score` for each time that the true images are noised to.

  Measured on `config.eval.examples` square images of one or two objects of the recipe's first task, denoised under
  their true captions.
  """
  task = config.data.chosen[0].name.partition('/')[0]
  plan = (i for i in range(100 * config.eval.examples) if examples.aspect(task, config.eval.split, i, SEED) == 'square')
  records = [examples.example(task, config.eval.split, i, SEED, config.data.size, (1, 2))
             for i, _ in zip(plan, range(config.eval.examples))]
  requests = [Request(r['instruction'], tuple(r['references']), i, r['caption'])
              for i, r in enumerate(records)]
  report, columns, size = dict(examples=len(records), task=task), [], config.data.size
  for t in TIMES:
    samples = []
    for part, rows in sharding.batched(range(len(records)), config.eval.batch_size):
      samples += pipe.generate([requests[i] for i in rows], size, size, start=t,
                               init_images=[records[i]['target'] for i in rows])[:len(part)]
    report[str(t)] = generation.score(records, samples)
    columns.append([sample.image for sample in samples[:SHOWN]])
  with sharding.together('write images'):
    if sharding.is_main_process():
      rows = [[column[i] for column in columns] + [records[i]['target']] for i in range(min(SHOWN, len(records)))]
      titles = [f't = {t}' for t in TIMES] + ['truth']
      imaging.write_png(folder / 'times.png', imaging.grid(rows, None, titles, cell=128))
  return report
