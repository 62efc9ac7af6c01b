"""Study of VERIFI on scenes: rewriting, image tokens, system prompts, several references, tiles (docs/verifi.md).

  python -m unifusion_jax.main --config=configs/edit.py --mode=eval --config.eval.study=verifi --workdir=runs/edit
"""

import dataclasses
import itertools
import pathlib
from typing import Any

import numpy as np

from unifusion_jax import pipeline, sharding
from unifusion_jax.data import imaging
from unifusion_jax.scenes import examples, multi
from unifusion_jax.scenes.evaluation import generation

SHOWN = 8         # rows of each sheet
MEASURED = ('all', 'written_exact', 'fallback_rate')  # rates of `generation.score`
TILES = (1, 4, 9)  # with the thumbnail 1, 5 and 10, as in the paper
SIDE = 3          # side of references in the study of tiles, relative to those of training


def evaluate(pipe: pipeline.UniFusionPipeline, config, folder: pathlib.Path) -> dict:
  """Rates MEASURED on `config.eval.examples` examples of each kind, with `config.eval.seeds` seeds.

  prompts: plain, paraphrased (by templates kept out of training) and knowledge prompts of one or two objects, with
    VERIFI and on the request itself.
  edits: conditioned on image tokens and rewrite, on either alone, and on image tokens with the request itself.
  system: the system prompt of training, and another one that the embedded VLM knows.
  references: two and three, named by their content, as separate images and stitched into one; the VLM was trained to
    describe several, the DiT was not trained on them. `copy` is the rate of the best reference, returned unchanged.
  tiles: error of references generated again, read in 1, 4 and 9 tiles.
  Each rate is {'mean', 'least', 'most'} over the seeds. All targets are square.
  """
  study = _Study(pipe, config, folder)
  on, raw = {}, dict(verifi=False)
  report = dict(examples=config.eval.examples, seeds=config.eval.seeds, split=config.eval.split)
  report['prompts'] = {}
  for name, style in (('plain', 'plain'), ('paraphrase', 'heldout'), ('knowledge', 'knowledge')):
    records = study.records('t2i', (1, 2), lambda record, style=style: record['style'] == style)
    report['prompts'][name] = study.compare(f'prompts_{name}', records, verifi=on, raw=raw)
  edits = study.records('edit', (1, 4))
  report['edits'] = study.compare('edits', edits, both=on, written=dict(image_tokens=False), images=dict(rewrite=''),
                                  raw=raw)
  prompts = study.records('t2i', (1, 2))
  report['system'] = {
      name: study.compare(f'system_{name}', records, trained=on, swapped=dict(system='answer'))
      for name, records in (('t2i', prompts), ('edit', edits))}
  report['references'] = {}
  for count in (2, 3):
    records = study.records('multi', (1, 4), lambda record, count=count: len(record['references']) == count and not any(
        number in record['instruction'] for numbers in multi.ORDINALS for number in numbers))
    rates = study.compare(f'references_{count}', records, verifi=on, stitched=dict(stitch=True, tiles=count))
    copies = [generation.score(records, [pipeline.Sample(r['references'][k], '') for r in records])['all']
              for k in range(count)]
    report['references'][str(count)] = dict(rates, copy=max(copies))
  report['tiles'] = study.tiles()
  return report


@dataclasses.dataclass
class _Study:
  pipe: pipeline.UniFusionPipeline
  config: Any
  folder: pathlib.Path

  def records(self, task: str, objects, wanted=lambda record: True, size: int = 0) -> list[dict]:
    """The first `wanted` examples of the split with a square target; other shapes would be compiled anew."""
    stream = (examples.example(task, self.config.eval.split, i, size=size or self.config.data.size, objects=objects)
              for i in itertools.count())
    square = (record for record in stream if record['target'].shape[0] == record['target'].shape[1])
    return list(itertools.islice(filter(wanted, square), self.config.eval.examples))

  def generate(self, records: list[dict], seed: int, rewrite: str | None = None, **settings) -> list[pipeline.Sample]:
    """One image of each record, with some sampling settings changed."""
    records = [dict(record, rewrite=rewrite) for record in records]
    return generation.generate(self.pipe, records, self.config.eval.batch_size, seed,
                               self.pipe.settings.changed(**settings))

  def compare(self, name: str, records: list[dict], **ways) -> dict:
    """Rates by way of sampling, {name: settings}; writes a sheet with a column for each."""
    rates, samples = {}, {}
    for way, settings in ways.items():
      by_seed = {measure: [] for measure in MEASURED}
      for seed in range(self.config.eval.seeds):
        images = self.generate(records, 1_000_003 * seed, **settings)
        verdicts = generation.score(records, images)
        for measure in MEASURED:
          by_seed[measure].append(verdicts[measure])
        samples.setdefault(way, images)
      rates[way] = {measure: _spread(values) for measure, values in by_seed.items()}
    most = max(len(record['references']) for record in records[:SHOWN])
    rows, captions = [], []
    for i, record in enumerate(records[:SHOWN]):
      rows.append([*record['references'], *[None] * (most - len(record['references'])),
                   *(column[i].image for column in samples.values()), record['target']])
      captions.append([''] * most + [column[i].rewrite for column in samples.values()] + [record['instruction']])
    self._write(name, imaging.grid(rows, captions, ['reference'] * most + list(samples) + ['target'], cell=160))
    return rates

  def _write(self, name: str, sheet: np.ndarray) -> None:
    with sharding.together('write images'):
      if sharding.is_main_process():
        imaging.write_png(self.folder / f'{name}.png', sheet)

  def tiles(self) -> dict:
    """Root mean square error (0 to 255) of references generated again, by the number of tiles that the VLM reads."""
    small = self.records('reconstruct', (1, 4))
    large = self.records('reconstruct', (1, 4), size=SIDE * self.config.data.size)
    shown = [dict(record, references=big['references']) for record, big in zip(small, large)]
    report, rows = {}, [[record['references'][0], record['target']] for record in small[:SHOWN]]
    for tiles in TILES:
      errors, samples = [], []
      for seed in range(self.config.eval.seeds):
        samples = self.generate(shown, 1_000_003 * seed, tiles=tiles)
        squares = [np.mean((sample.image.astype(np.float32) - record['target']) ** 2)
                   for sample, record in zip(samples, small)]
        errors.append(float(np.sqrt(np.mean(squares))))
      report[str(tiles)] = _spread(errors)
      for row, sample in zip(rows, samples):
        row.insert(-1, sample.image)
    titles = ['reference', *(f'{tiles} tiles' for tiles in TILES), 'target']
    self._write('tiles', imaging.grid(rows, None, titles, cell=160))
    return report


def _spread(values: list[float]) -> dict[str, float]:
  return dict(mean=round(float(np.mean(values)), 4), least=round(min(values), 4), most=round(max(values), 4))
