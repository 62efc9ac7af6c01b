"""Requests and drawings made by hand, outside the grammar and the looks of training, sampled and read by the judge.

  python -m unifusion_jax.main --config=configs/edit.py --mode=eval --config.eval.study=by_hand
"""

import pathlib

import numpy as np

from unifusion_jax import pipeline, sharding
from unifusion_jax.data import imaging
from unifusion_jax.evaluation.records import sheet
from unifusion_jax.scenes.evaluation import generation, handwritten


def evaluate(pipe: pipeline.UniFusionPipeline, config, folder: pathlib.Path) -> dict:
  """Verdicts (`generation.score`) on all prompts, rates of rewrites on all edits, and sheets of both into `folder`.

  The judge reads clean shapes: of the true images of these edits, drawn with thick pens and tilted, it reads one in
  eight exactly. So edits are judged by their text, and their images are for the eye.
  """
  size = config.data.size
  blank = np.full((size, size, 3), 255, np.uint8)  # says the size: of a prompt there is no one true image
  groups = dict(prompts=[dict(record, target=blank) for record in handwritten.prompts('t2i')],
                edits=handwritten.edits(size))
  report = {}
  for name, records in groups.items():
    samples = generation.generate(pipe, records, config.eval.batch_size)
    rates = generation.score(records, samples, wide=True)
    if name == 'edits':
      rates = {measure: rates[measure] for measure in ('written_exact', 'fallback_rate')}
    report[name] = dict(examples=len(records), **rates)
    with sharding.together('write images'):
      if sharding.is_main_process():
        imaging.write_png(folder / f'by_hand_{name}.png', sheet(records, samples))
  return report
