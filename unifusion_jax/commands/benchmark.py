"""A public benchmark: images of its prompts, made once, and their scores by a VLM that judges.

In the workdir `images/` is laid out as the set's own scorer takes it, `report.md` and `report.json` have the tables,
and `scores.jsonl` every prompt's scores. What is measured on a part of a set has `_part` in these names and says which.
"""

import dataclasses
import json
import pathlib

from unifusion_jax import metadata, parts, prompting, ranges, sharding
from unifusion_jax.commands import sample
from unifusion_jax.data.config import SCENES
from unifusion_jax.errors import UserError
from unifusion_jax.evaluation import images as image_metrics
from unifusion_jax.evaluation.benchmarks import generation, judging, scoring, tables
from unifusion_jax.evaluation.benchmarks.files import Files
from unifusion_jax.evaluation.benchmarks.records import Record
from unifusion_jax.evaluation.benchmarks.sets import SETS
from unifusion_jax.fields import Path
from unifusion_jax.ranges import Range
from unifusion_jax.request import shape_like
from unifusion_jax.training import record as training_record
from unifusion_jax.weights import encoders, hub

STAGES = ('all', 'generate', 'score')
CHECKED = 64  # requests that are checked at a time, their references being read for it


@dataclasses.dataclass
class BenchmarkSettings:
  """Which set, which part of it, and who judges."""
  set: str = 'own'                  # a name in SETS of evaluation/benchmarks/sets.py
  path: Path = ''                   # folder or file of the set, or a dataset on the hub; 'scenes' for own
  references: Path | None = None    # folder of the images that the set's files name; None: where these files are
  sha256: tuple[str, ...] = ()      # FILE=DIGEST, in the place of the known digests
  language: str = 'en'              # or 'zh', of oneig and gedit
  images: int = 0                   # of each prompt; 0: as many as the set's own scorer expects
  only: tuple[str, ...] = ()        # categories; (): all
  examples: int = 0                 # the first so many prompts; 0: all
  stage: str = 'all'                # or 'generate', or 'score' of images that are there
  scores: tuple[str, ...] = scoring.SCORES  # what is measured where the set has what it wants
  judge: Path | None = None         # folder or hub id of a VLM; None: the pipeline's own
  judge_dtype: str = 'bfloat16'
  judge_quantized: str = ''         # 'int8': int8 weights; 'w8a8': int8 activations as well
  judge_cache: Path | None = None   # folder that keeps the converted judge for the next start
  judge_tiles: int = 4              # maximum tiles of an image, or as many pixels
  judge_batch: int = 32             # questions at a time
  lpips: Path | None = None         # folder with the weights of LPIPS (docs/metrics.md); None: it is not measured
  question: str = ''                # about a description, with {} in its place; '': that of VQAScore

  def problems(self) -> list[str]:
    """Settings that cannot work, a sentence each."""
    wrong = ranges.problems(self, 'benchmark.', images=Range(0, 1000), examples=Range(0, 10 ** 6),
                            judge_tiles=Range(1, 1000), judge_batch=Range(1, 10 ** 6))
    choices = dict(set=tuple(SETS), stage=STAGES, language=('en', 'zh'), judge_dtype=('float32', 'bfloat16'),
                   judge_quantized=encoders.QUANTIZED)
    wrong += [f'benchmark.{name}={getattr(self, name)!r} must be one of {", ".join(map(repr, values))}'
              for name, values in choices.items() if getattr(self, name) not in values]
    if unknown := [name for name in self.scores if name not in scoring.SCORES]:
      wrong.append(f'benchmark.scores: {unknown[0]!r} must be one of {", ".join(map(repr, scoring.SCORES))}')
    wrong += [f'benchmark.sha256: {entry!r} must be FILE=DIGEST, a digest having 64 hexadecimal digits'
              for entry in self.sha256 if not _is_digest(entry)]
    if self.question and '{}' not in self.question:
      wrong.append(f'benchmark.question={self.question!r} must have {{}} where the description stands')
    return wrong


def _is_digest(entry: str) -> bool:
  file, _, digest = entry.rpartition('=')
  return bool(file) and len(digest) == 64 and set(digest) <= set('0123456789abcdef')


@dataclasses.dataclass
class BenchmarkConfig(sample.PipelineConfig):
  """A pipeline, and the benchmark that it is measured by (configs/benchmark.py)."""
  benchmark: BenchmarkSettings = dataclasses.field(default_factory=BenchmarkSettings)

  mode = 'benchmark'

  def problems(self, devices: int) -> list[str]:
    """Settings that cannot work, a sentence each."""
    s = self.sample
    unused = [f'sample.{name}' for name in ('prompt', 'references', 'rewrite') if getattr(s, name)]
    wrong = [f'{name} is the set\'s to say: leave it out' for name in unused]
    if s.num_images != 1:
      wrong.append('sample.num_images is not read here: give benchmark.images, the images of each prompt')
    return [*super().problems(devices), *self.benchmark.problems(), *wrong]


def run(config: BenchmarkConfig, workdir: pathlib.Path) -> None:
  """Makes the images that are missing, judges them and writes the report."""
  settings, benchmark = config.benchmark, SETS[config.benchmark.set]
  metrics: dict = dict(psnr_db=image_metrics.psnr, ssim=image_metrics.ssim)
  if settings.lpips:  # before anything slow
    metrics['lpips'] = image_metrics.Lpips(settings.lpips)
  files, records = read(settings)
  chosen = choose(records, settings)
  images = settings.images or benchmark.images
  located = sample.locate(config)
  shown = dict(set=settings.set, language=settings.language, images=images, files=files.digests)
  if settings.stage == 'score':
    generation.check(workdir, shown)
    generation.check_references(workdir, benchmark, [record for _, record in chosen], images)
  else:
    _generate(config, located, chosen, images, shown, workdir)
    generation.write_index(workdir, benchmark, records, images)
  if settings.stage == 'generate':
    return
  judge = hub.pin(settings.judge) if settings.judge else located.vlm
  scored = scoring.score(
      benchmark, [record for _, record in chosen], images, workdir, settings.scores, metrics,
      lambda: judging.Judge.load(
          judge.folder, dtype=settings.judge_dtype, quantized=settings.judge_quantized, cache=settings.judge_cache,
          tiles=settings.judge_tiles, batch_size=settings.judge_batch, question=settings.question))
  with sharding.together('write the report'):
    if sharding.is_main_process():
      _write_report(workdir, settings, files, records, [record for _, record in chosen], images,
                    metadata.weights(judge.name) if scored.judged else None, scored)


def read(settings: BenchmarkSettings) -> tuple[Files, list[Record]]:
  """(files that were read, all records of the set). UserError where they cannot be had."""
  benchmark = SETS[settings.set]
  if settings.set == 'own' and settings.path == SCENES[0]:
    from unifusion_jax.scenes.evaluation import benchmark as scenes
    return Files(SCENES[0], pathlib.Path()), scenes.records()
  place = settings.path or benchmark.hub
  if not place:
    raise UserError(f'the files of {settings.set} are wanted: give their folder, --config.benchmark.path=FOLDER, from '
                    f'{benchmark.source}')
  pinned = dict(entry.rpartition('=')[::2] for entry in settings.sha256)
  files = Files.locate(place, benchmark.patterns, benchmark.known, pinned)
  records = benchmark.records(files, settings.language, settings.references)
  if unread := sorted(set(pinned) - set(files.digests)):
    raise UserError(f'benchmark.sha256 names {unread[0]}, and of this set {", ".join(files.digests)} are read')
  return files, records


def choose(records: list[Record], settings: BenchmarkSettings) -> list[tuple[int, Record]]:
  """(number in the set, record) of those that are measured. UserError for a category that is not there."""
  there = sorted({category for record in records for category in record.all_categories})
  if unknown := [name for name in settings.only if name not in there]:
    raise UserError(f'benchmark.only: there is no category {unknown[0]!r}; there are {", ".join(there) or "none"}')
  chosen = [(i, record) for i, record in enumerate(records)
            if not settings.only or {*settings.only} & {*record.all_categories}]
  return chosen[:settings.examples or None]


def _generate(config: BenchmarkConfig, located: parts.Parts, chosen: list[tuple[int, Record]], images: int,
              shown: dict, workdir: pathlib.Path) -> None:
  """The images that are not there yet; nothing is loaded where all are.

  shown: what they are of, for `generation.identity`.
  """
  s, benchmark = config.sample, SETS[config.benchmark.set]
  size_of = lambda reference: shape_like(reference, located.described.size, located.unit, s.height, s.width)
  jobs = generation.jobs(benchmark, chosen, images, s.seed, size_of)
  generation.identity(workdir, shown | made_by(config, located))
  wanted = generation.missing(workdir, jobs)
  if not wanted:
    return
  requests = [request for job in wanted for request in job.requests]
  for start in range(0, len(requests), CHECKED):
    prompting.check(located.prompt_encoder, requests[start:start + CHECKED], s, located.max_positions)
  generation.generate(sample.load(config, workdir, located), benchmark, wanted, workdir)


def made_by(config: BenchmarkConfig, located: parts.Parts) -> dict:
  """What makes the images: sampling settings, and the weights by name and by content, those of LoRAs too."""
  s = config.sample
  origin = metadata.origin(located.name, located.vlm.name, located.vae.name, config.dtype, config.dtype,
                           config.vlm_quantized, config.transformer_quantized)
  if located.transformer.name != located.name:
    origin['transformer'] = metadata.weights(located.transformer.name)
  return dict(seed=s.seed, width=s.width, height=s.height, size=located.described.size, settings=s.settings(),
              weights=training_record.contents(located, s.loras), origin=origin)


def _write_report(workdir: pathlib.Path, settings: BenchmarkSettings, files: Files, records: list[Record],
                  chosen: list[Record], images: int, judge: dict | None, scored: scoring.Scored) -> None:
  """report.json, report.md and scores.jsonl, or those of a part, which never have the names of the whole."""
  published = SETS[settings.set].prompts.get(settings.language, (len(records),))
  of = len(records) if len(records) in published else max(len(records), published[0])
  path, lines = workdir / generation.IDENTITY, generation.log(workdir)
  made = [line for line in lines.values() if line['id'] in {record.id for record in chosen}]
  warnings = sum(bool(warning) for line in made for warning in line['warnings'])
  report = dict(
      set=settings.set, language=settings.language, source=files.name,
      files={name: dict(sha256=digest, published=name in files.published) for name, digest in files.digests.items()},
      prompts=len(chosen), prompts_of_set=of, images_per_prompt=images,
      made_by=json.loads(path.read_text()) if path.exists() else None, fallbacks=warnings, judge=judge,
      question=settings.question, notes=scored.notes, agreement_with_exact=scored.agreement, tables=scored.tables)
  suffix = '' if report['prompts'] == report['prompts_of_set'] else '_part'
  (workdir / f'report{suffix}.json').write_text(json.dumps(report, indent=2) + '\n')
  text = markdown(report, settings)
  (workdir / f'report{suffix}.md').write_text(text)
  (workdir / f'scores{suffix}.jsonl').write_text(''.join(
      json.dumps(dict(id=record.id, categories=record.categories, scores=scores)) + '\n'
      for record, scores in zip(chosen, scored.prompts)))
  print(text)


def markdown(report: dict, settings: BenchmarkSettings) -> str:
  """The report as a page: what was measured, on how much of the set, by whom, and the tables."""
  part = [f'benchmark.{name}={getattr(settings, name)}' for name in ('only', 'examples') if getattr(settings, name)]
  whole = report['prompts'] == report['prompts_of_set']
  model, judge = report['made_by'] and report['made_by']['origin'], report['judge']
  lines = [f'# {report["set"]}: {report["prompts"]} of {report["prompts_of_set"]} prompts', '']
  if not whole:
    why = ', '.join(part) or 'its files hold no more'
    lines += [f'A part of the set ({why}), whose figures are not those of the set.', '']
  lines += [f'- {report["images_per_prompt"]} images of each prompt, made by '
            + (f'{model.get("transformer", model["model"])["name"]}' if model else 'another program')
            + f'; {report["fallbacks"]} on the request itself, as the rewrite was unusable' * bool(report['fallbacks']),
            *([f'- judged by {judge["name"]}, whose figures are not those of the judge of published tables'] if judge
              else []),
            *(f'- {name}: SHA-256 {file["sha256"]}'
              + (', that of the published file' if file['published'] else ', not known before')
              for name, file in report['files'].items()),
            *(f'- {note}' for note in report['notes'])]
  if report['agreement_with_exact'] is not None:
    lines.append(f'- the judge agrees with the exact judge on {report["agreement_with_exact"]:.3f} of the images')
  return '\n'.join([*lines, '', *(f'{tables.markdown(table, report["images_per_prompt"])}\n'
                                  for table in report['tables'])])
