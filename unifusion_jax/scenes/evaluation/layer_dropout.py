"""Layer dropout on scenes: what the judge says of images without some taps."""

from collections.abc import Iterable
import itertools

import jax

from unifusion_jax import pipeline, progress, prompting, reading, sharding
from unifusion_jax.conditioning import States
from unifusion_jax.evaluation import inside
from unifusion_jax.evaluation.statistics import wilson
from unifusion_jax.request import requests_of, SampleConfig
from unifusion_jax.scenes import examples
from unifusion_jax.scenes.evaluation import generation

OBJECTS = dict(t2i=(1, 2), edit=(1, 4))


def evaluate(pipe: pipeline.UniFusionPipeline, task: str, count: int, sets: dict[str, tuple[int, ...]],
             replace: Iterable[str], settings: SampleConfig) -> dict:
  """{set: {how: rates}} of the first `count` square examples of the test split, 'all' for the set of all taps present.

  Rates are those of `generation.score`, and `interval` is Wilson's of their `all`. t2i has one or two objects. Every
  image of an example begins with the same noise.
  """
  stream = (examples.example(task, 'test', i, size=pipe.size, objects=OBJECTS[task]) for i in itertools.count())
  square = (record for record in stream if record['target'].shape[0] == record['target'].shape[1])
  records = list(itertools.islice(square, count))
  requests, states, rewrites = requests_of(records), [], []
  for part, rows in sharding.batched(requests, min(settings.batch_size, count)):
    with jax.set_mesh(pipe.mesh):
      prompts = prompting.Prompts.of(pipe.prompt_encoder, sharding.padded(rows), settings, pipe.max_positions)
      read = reading.read(pipe.vlm, pipe.taps, prompts, settings, pipe.vocabulary)
      gathered = sharding.gather(read.states)
    states += [States(*row) for row in zip(*gathered)][:len(part)]
    rewrites += read.rewrites[:len(part)]
  ways = [('all', 'present', ()), *((name, how, positions) for name, positions in sets.items() for how in replace)]
  report = {}
  bar = progress.bar(len(ways) * count, 'image', silent=not sharding.is_main_process())
  for name, how, positions in ways:
    images = inside.generate(pipe, requests, states, pipe.size, pipe.size, settings, positions, how)
    rates = generation.score(records, [pipeline.Sample(*pair) for pair in zip(images, rewrites)])
    interval = wilson(round(rates['all'] * count), count)
    report.setdefault(name, {})[how] = dict(interval=[round(x, 4) for x in interval], **{
        kind: rate for kind, rate in rates.items() if kind not in ('written_exact', 'fallback_rate')})
    bar.update(count)
  bar.close()
  return report
