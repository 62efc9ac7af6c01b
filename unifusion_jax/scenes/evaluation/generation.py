"""Success rates of text to image and of edits on scenes, read by the judge."""

import collections
import pathlib

import numpy as np

from unifusion_jax import pipeline, sharding
from unifusion_jax.data import imaging
from unifusion_jax.evaluation import vqascore
from unifusion_jax.evaluation.records import sheet
from unifusion_jax.request import Request, SampleConfig
from unifusion_jax.scenes import examples, judge, language, world

SHOWN = 12  # rows of a sheet


def evaluate(pipe: pipeline.UniFusionPipeline, config, folder: pathlib.Path) -> dict:
  """Rates of `score` on `config.eval.examples` examples of each task, from `config.eval.split` and from `heldout`.

  t2i is measured on scenes of one or two objects and on scenes of three or four. `vqascore` and `vqascore_truth` are
  the VLM's own scores of sampled and of true images. Sheets of the first examples are written into `folder`.
  """
  settings = pipe.settings
  encoder = pipe.prompt_encoder.with_tiles(settings.tiles)
  report = dict(examples=config.eval.examples, steps=settings.steps, guidance=settings.guidance, eta=settings.eta)
  tasks = dict.fromkeys(task.name.partition('/')[0] for task in config.data.chosen)
  measures = [(task, objects) for task in tasks for objects in (((1, 2), (3, 4)) if task == 't2i' else ((1, 4),))]
  for split in dict.fromkeys((config.eval.split, 'heldout')):
    for task, objects in measures:
      records = [examples.example(task, split, i, size=config.data.size, objects=objects)
                 for i in range(config.eval.examples)]
      samples = generate(pipe, records, config.eval.batch_size)
      name = f'{split}_{task}_{objects[0]}-{objects[1]}'
      report[name] = score(records, samples)
      if encoder.image_processor.max_tokens:  # a VLM that reads images
        captions = [record['caption'] for record in records]
        sampled, targets = [sample.image for sample in samples], [record['target'] for record in records]
        for suffix, images in (('', sampled), ('_truth', targets)):
          scores = vqascore.scores(pipe.frozen.vlm, encoder, images, captions, config.eval.batch_size)
          report[name][f'vqascore{suffix}'] = round(float(np.mean(scores)), 4)
      with sharding.together('write images'):
        if sharding.is_main_process():
          imaging.write_png(folder / f'{name}.png', sheet(records[:SHOWN], samples[:SHOWN]))
  return report


def generate(pipe: pipeline.UniFusionPipeline, records: list[dict], batch_size: int, seed: int = 0,
             settings: SampleConfig | None = None) -> list[pipeline.Sample]:
  """One image for each record, seeds counting from `seed`; batches hold one shape."""
  groups = collections.defaultdict(list)
  for i, record in enumerate(records):
    groups[(*record['target'].shape[:2], len(record['references']))].append(i)
  samples: list = [None] * len(records)
  for (height, width, _), members in groups.items():
    for part, rows in sharding.batched(members, batch_size):
      requests = [Request(records[i]['instruction'], tuple(records[i]['references']), seed + i,
                          records[i].get('rewrite')) for i in rows]
      for i, sample in zip(part, pipe.generate(requests, height, width, settings=settings)):
        samples[i] = sample
  return samples


def score(records: list[dict], samples: list[pipeline.Sample], wide: bool = False) -> dict:
  """Shares of examples by verdict; `wide`: the judge reads all backgrounds of the wider world.

  t2i: `all`, every attribute, place, count, relation and background of the prompt is met. edit: `asked`, the change was
  made; `kept`, the rest stayed; `all`, both. `all/KIND`: the same for one kind of prompt or edit. `written_exact`:
  rewrites equal to the caption. `fallback_rate`: unusable rewrites. With several references the image is compared with
  the whole true scene, as there is no single source to preserve.
  """
  verdicts = collections.defaultdict(list)
  for record, sample in zip(records, samples):
    reading = judge.read(sample.image, wide)
    if len(record['references']) > 1:
      verdict = {'all': judge.exact(reading, world.Scene.from_json(record['scene']))}
    elif record['references']:
      source, target = world.Scene.from_json(record['source'][0]), world.Scene.from_json(record['scene'])
      verdict = judge.check_edit(reading, source, target)
    else:
      verdict = judge.check(reading, language.constraints_from_json(record['constraints']))
    for name, met in verdict.items():
      verdicts[name].append(met)
    verdicts[f'all/{record["kind"]}'].append(verdict['all'])
    verdicts['written_exact'].append(sample.rewrite == record['caption'])
    verdicts['fallback_rate'].append(bool(sample.warning))
  return {name: round(float(np.mean(values)), 4) for name, values in sorted(verdicts.items())}
