"""Two checkpoints side by side: the same requests and seeds, a page of pairs to look at and to vote on, and win rates.

In the workdir: images/a, images/b and references, page.html, votes/, and summary.json. The same command again goes on
where it stood, and reads no weights where all images are there.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
import signal
import sys
import threading

import jax
import numpy as np

from unifusion_jax import bucket, json_file, metadata, parts, prompting, ranges
from unifusion_jax.data import imaging
from unifusion_jax.description import ASSETS
from unifusion_jax.errors import UserError
from unifusion_jax.evaluation import images as metrics
from unifusion_jax.fields import Path, Text
from unifusion_jax.pairs import page, requests, summary
from unifusion_jax.pairs.requests import Pair
from unifusion_jax.pairs.votes import Votes
from unifusion_jax.pipeline import UniFusionPipeline
from unifusion_jax.progress import bar
from unifusion_jax.ranges import Range
from unifusion_jax.request import LIMITS, SampleConfig
from unifusion_jax.scenes import examples
from unifusion_jax.sharding import MeshConfig
from unifusion_jax.training import record
from unifusion_jax.weights import encoders

RECORD = 'compare.json'  # of the workdir: what is compared


@dataclasses.dataclass
class Side:
  """A checkpoint and how it is sampled; what is not named is as the checkpoint says."""
  weights: Path = 'tiny'            # folder (such as a run's export) or hub id of a pipeline
  transformer: Path | None = None   # folder, hub id or .safetensors file instead of the pipeline's own
  vlm: Path | None = None           # folder or hub id instead of the pipeline's own
  vae: Path | None = None
  loras: tuple[Path, ...] = ()      # LoRA files, folders or hub ids; FILE:0.8 counts 0.8 times
  vlm_quantized: str = ''           # 'int8': int8 weights; 'w8a8': int8 activations as well
  transformer_quantized: str = ''   # the same for LAP, refiner and DiT
  in_turn: bool = False             # VLM and transformer are loaded in turn, where memory does not hold both
  steps: int | None = None
  guidance: float | None = None
  verifi: bool | None = None        # False: condition on the request itself

  def problems(self, prefix: str) -> list[str]:
    """Settings that cannot work, a sentence each."""
    given = {name: LIMITS[name] for name in ('steps', 'guidance') if getattr(self, name) is not None}
    return ranges.problems(self, prefix, **given) + [
        f'{prefix}{name}={getattr(self, name)!r} must be one of {", ".join(map(repr, encoders.QUANTIZED))}'
        for name in ('vlm_quantized', 'transformer_quantized') if getattr(self, name) not in encoders.QUANTIZED]

  def settings(self, described: SampleConfig, batch_size: int) -> SampleConfig:
    """The checkpoint's sampling settings under those that are given."""
    return described.changed(steps=self.steps, guidance=self.guidance, verifi=self.verifi, batch_size=batch_size)


@dataclasses.dataclass
class CompareConfig:
  """What is compared on which requests (configs/compare.py)."""
  a: Side = dataclasses.field(default_factory=Side)
  b: Side = dataclasses.field(default_factory=lambda: Side(str(ASSETS / 't2i')))
  data: Path = 'scenes'            # requests: scenes of the test split, or a list of records (.jsonl, .parquet)
  tasks: tuple[str, ...] = ('t2i',)  # of scenes, in turn: t2i, edit, multi, reconstruct
  prompt: Text = ''                # requests instead of `data`, one a line; @file.txt reads them from a file
  references: tuple[Path, ...] = ()  # image files, the same for every line of `prompt`
  num_images: int = 1              # of each line of `prompt`
  examples: int = 40               # pairs, at most; may grow later
  seed: int = 0                    # of the first pair's noise, every further one takes the next; and of the order
  width: int = 0                   # 0: as the target or the first reference, else square; of scenes as they are
  height: int = 0
  batch_size: int = 32             # images sampled at a time
  dtype: str = 'bfloat16'
  lpips: Path | None = None        # folder with the weights of LPIPS, to measure how far the images of a pair differ
  question: str = 'Which image is the better answer to the request?'
  serve: bool = False              # the voting page, until Ctrl-C
  port: int = 7861                 # of the voting page; 0: a free one
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

  mode = 'compare'

  def problems(self, devices: int) -> list[str]:
    """Settings that cannot work, a sentence each."""
    del devices
    tasks = [task for task in examples.TASKS if task not in ('caption', 'question', 'rewrite')]
    checks = {f"dtype={self.dtype!r} must be 'bfloat16' or 'float32'": self.dtype in ('float32', 'bfloat16'),
              f'tasks={self.tasks} must be some of {", ".join(tasks)}': self.tasks and {*self.tasks} <= {*tasks},
              'references go with --config.prompt': not self.references or bool(self.prompt),
              'a and b are the same, sampled in the same way: name another checkpoint, or other settings':
                  self.a != self.b}
    return [*self.mesh.problems(), *self.a.problems('a.'), *self.b.problems('b.'), *ranges.problems(
        self, '', examples=Range(1, 100_000), port=Range(0, 65_535),
        **{name: LIMITS[name] for name in ('num_images', 'batch_size', 'width', 'height')}),
            *(text for text, holds in checks.items() if not holds)]

  def labels(self) -> dict[str, str]:
    """{'a': the settings in which a differs from b, 'b': ...}, for who may know."""
    both = {name: dataclasses.asdict(getattr(self, name)) for name in 'ab'}
    differing = [name for name, value in both['a'].items() if value != both['b'][name]]
    return {side: ', '.join(f'{name}={values[name]}' for name in differing) for side, values in both.items()}


def run(config: CompareConfig, workdir: pathlib.Path) -> None:
  """Generates what is missing, writes page and summary, and serves the voting page where it is asked for."""
  if jax.process_count() > 1:
    raise UserError(f'--mode=compare runs in one process and these are {jax.process_count()}: start it on one host '
                    'alone, without --distributed')
  located = {side: _located(getattr(config, side)) for side in 'ab'}
  size, unit = located['a'].described.size, math.lcm(*(place.unit for place in located.values()))
  if wrong := SampleConfig(width=config.width, height=config.height).problems(unit, ''):
    raise UserError('; '.join(wrong))
  pairs = requests.pairs(config, size, unit)
  for side, place in located.items():
    settings = getattr(config, side).settings(SampleConfig().changed(**place.described.sample), config.batch_size)
    if wrong := settings.problems(unit, f'{side}.'):
      raise UserError('; '.join(wrong))
    prompting.check(place.prompt_encoder, [pair.request for pair in pairs], settings, place.max_positions)
  lpips = metrics.Lpips(config.lpips) if config.lpips else None
  comparison = _claim(config, pairs, located, workdir)
  shown = [_shown(pair, workdir) for pair in pairs]
  votes = Votes(workdir / 'votes', [pair.name for pair in pairs], config.seed, comparison)
  make = lambda: page.Server(config.port, shown, votes, config.seed, config.question, config.labels())
  with make() if config.serve else contextlib.nullcontext() as server:  # has its port before anything slow
    for side in 'ab':
      _generate(config, side, located[side], pairs, workdir / 'images' / side)
    if server:
      signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
      with page.serving(server) as address:
        print(f'{address} (Ctrl-C ends it; the command without --config.serve sums up)', flush=True)
        threading.Event().wait()
  page.write(workdir / 'page.html', shown, config.seed, config.question, comparison)
  report = dict(**config.labels(), **summary.summary({pair.name: pair.category for pair in pairs}, votes.resolved(),
                                                    {pair.name: pair.asked for pair in pairs}),
                between=metrics.summary(_distances(shown, lpips), [pair.asked for pair in pairs]))
  (workdir / 'summary.json').write_text(json.dumps(report, indent=2) + '\n')
  print(json.dumps({name: value for name, value in report.items() if name not in ('categories', 'voters')}, indent=2))
  print(', '.join(str(bucket.address(workdir / name)) for name in ('page.html', 'summary.json')))


def _located(side: Side) -> parts.Parts:
  return parts.locate(side.weights, transformer=side.transformer, vlm=side.vlm, vae=side.vae)


def _claim(config: CompareConfig, pairs: list[Pair], located: dict[str, parts.Parts], workdir: pathlib.Path) -> str:
  """Writes what is compared into the workdir, and returns a digest of it, the same when pairs are added.

  UserError where the workdir has images or votes of another comparison, or more pairs.
  """
  compared = {side: _identity(getattr(config, side), place) for side, place in located.items()}
  compared |= dict(dtype=config.dtype, seed=config.seed)
  now = compared | dict(question=config.question, pairs=[pair.to_json() for pair in pairs])
  now = json.loads(json.dumps(now))  # tuples as the file has them
  path, place = workdir / RECORD, bucket.address(workdir)
  begun = [name for name in ('images', 'votes') if (workdir / name).exists()]
  if begun and path.exists():
    before = json_file.read(path)
    changes = _changes(before, now, voted=any((workdir / 'votes').glob('*.jsonl')))
    if changes:
      raise UserError(f'{place} holds another comparison: {"; ".join(changes)}: give another --workdir')
    if len(before['pairs']) > len(pairs):
      raise UserError(f'{place} has {len(before["pairs"])} pairs, and {len(pairs)} are asked for: give examples='
                      f'{len(before["pairs"])} or more with the same requests, or another --workdir')
  elif begun:
    raise UserError(f'{place} has {" and ".join(begun)} but no {RECORD}, which says of what: give another --workdir')
  imaging.write_bytes(path, json.dumps(now, indent=2).encode() + b'\n')
  return hashlib.sha256(json.dumps(compared | dict(first=now['pairs'][0])).encode()).hexdigest()[:16]


def _identity(side: Side, place: parts.Parts) -> dict:
  """What the images of a side depend on beside the requests: settings, and the files at their commit or by content."""
  described = dataclasses.asdict(place.described) | dict(resolution_shift=place.resolution_shift)
  return dataclasses.asdict(side) | dict(files=record.contents(place, side.loras), described=described)


def _changes(before: dict, now: dict, voted: bool) -> list[str]:
  """A line for each thing in which two comparisons differ, but for pairs that one has more.

  voted: whether there are votes, which are all on one question.
  """
  left_out = ('pairs',) if voted else ('pairs', 'question')
  settings = [{name: value for name, value in found.items() if name not in left_out} for found in (before, now)]
  pairs = [new['pair'] for old, new in zip(before.get('pairs', []), now['pairs']) if old != new]
  return record.differences(*settings) + [f'pair {name} is of another request or size' for name in pairs[:1]]


def _generate(config: CompareConfig, side: str, located: parts.Parts, pairs: list[Pair], folder: pathlib.Path) -> None:
  """Writes the images that are missing, batch by batch."""
  missing = [pair for pair in pairs if not _image(folder, pair).exists()]
  if not missing:
    return
  chosen: Side = getattr(config, side)
  pipe = UniFusionPipeline.load(
      located, dtype=config.dtype, quantized=chosen.vlm_quantized, transformer_quantized=chosen.transformer_quantized,
      loras=chosen.loras, in_turn=chosen.in_turn)
  settings = chosen.settings(pipe.settings, min(config.batch_size, len(pairs)))
  groups: dict[tuple, list[Pair]] = {}
  for pair in missing:
    groups.setdefault((pair.height, pair.width, len(pair.request.references)), []).append(pair)
  progress = bar(len(pairs), f'images of {side}', len(pairs) - len(missing))
  for (height, width, _), members in groups.items():
    names = iter(members)
    for part, samples in pipe.batches([pair.request for pair in members], height, width, settings=settings):
      for request, sample, pair in zip(part, samples, names):
        text = metadata.as_text(pipe.metadata(request, sample, settings))
        imaging.write_png(_image(folder, pair), sample.image, text)
      progress.update(len(part))
  progress.close()


def _image(folder: pathlib.Path, pair: Pair) -> pathlib.Path:
  return folder / f'{pair.name}.png'


def _shown(pair: Pair, workdir: pathlib.Path) -> page.Shown:
  """The pair with its references as files of the workdir, written where they are not there."""
  references = []
  for image, digest in zip(pair.request.references, pair.digests):
    references.append(workdir / 'references' / f'{digest}.png')
    if not references[-1].exists():
      imaging.write_png(references[-1], imaging.read(image))
  a, b = (_image(workdir / 'images' / side, pair) for side in 'ab')
  return page.Shown(pair.name, pair.request.instruction, tuple(references), a, b)


def _distances(shown: list[page.Shown], lpips: metrics.Lpips | None) -> dict[str, np.ndarray]:
  """{measure: its value for each pair} of a's images beside b's."""
  values: dict[str, list[np.ndarray]] = {}
  for files in shown:
    a, b = (imaging.read(path)[None] for path in (files.a, files.b))
    for name, value in metrics.measures(a, b, lpips).items():
      values.setdefault(name, []).append(value)
  return {name: np.concatenate(each) for name, each in values.items()}
