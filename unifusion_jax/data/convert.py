"""Conversion of a user's data to ArrayRecord shards, which `data.path=FOLDER` trains on.

  python -m unifusion_jax.data.convert --input='my/*.parquet' --output=my/shards --pixels=2000000 --workers=8

Reads Parquet with images inside (Hugging Face), WebDataset tar files, JSON lines and folders of images with .txt
captions (data/layouts.py), here or at gs:// and s3:// addresses. Every image is decoded once, so that training meets
none that is broken: such records are left out, counted and named. A start after an interruption does the shards that
are left; the same command makes the same shards, whatever the number of processes and machines.
"""

from collections.abc import Iterator
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import shlex

from absl import app, flags
import numpy as np
from PIL import Image

from unifusion_jax import command_line, errors, progress
from unifusion_jax.data import imaging, layouts, lists, shards, storage
from unifusion_jax.errors import clipped, UserError

# Columns that are taken where no others are named: ours, then those of public sets.
COLUMNS = dict(target=('target', 'image', 'jpg', 'jpeg', 'png', 'webp'), caption=('caption', 'text', 'txt'),
               instruction=('instruction',), references=('references',))
NAMED = 20  # broken records that a shard's JSON names
RECORDS = 4096  # of a shard


@dataclasses.dataclass(frozen=True)
class Settings:
  """How records are converted."""
  output: str
  count: int                             # shards
  columns: dict[str, tuple[str, ...]]    # {column of ours: columns of theirs}; the first there, of references all
  pixels: int | None = None              # of an image at most; None: as it is
  format: str = 'jpeg'                   # of images that are encoded anew: those scaled down, or all
  quality: int = 95
  reencode: bool = False
  skipped: float = 0.01                  # share of broken records past which the conversion stops


def shard(settings: Settings, work: tuple[int, tuple[layouts.Piece, ...]]) -> dict:
  """Writes one shard, (its number, its pieces) -> the shard's JSON (see shards.py). UserError for too many broken."""
  number, pieces = work
  report = dict(broken=0, reasons=[])
  return shards.write(settings.output, number, settings.count, _rows(settings, pieces, report), report)


def _rows(settings: Settings, pieces: tuple[layouts.Piece, ...], report: dict) -> Iterator[tuple[dict, tuple]]:
  """(row, shape) of each record that can be used; counts the others in `report`."""
  wanted, seen = set().union(*settings.columns.values()), 0
  for piece in pieces:
    folder = piece.path if piece.kind == 'folder' else storage.parent(piece.path)
    for place, columns in layouts.read(piece, wanted):
      seen += 1
      try:
        if isinstance(columns, UserError):
          raise columns
        yield _converted(settings, columns, folder)
      except UserError as error:
        report['broken'] += 1
        report['reasons'] += [clipped(f'{place}: {error}', 400)] * (len(report['reasons']) < NAMED)
        if report['broken'] > settings.skipped * max(seen, 1000):
          raise UserError(f'{report["broken"]} of the first {seen} records of a shard cannot be used, more than the '
                          f'allowed share of {settings.skipped:g}: mend them or allow more (--skipped). The first are: '
                          + '; '.join(report['reasons'][:3])) from error


def _converted(settings: Settings, columns: dict, folder: str) -> tuple[dict, tuple[int, int, int]]:
  """(row with encoded images, (height and width of the target, number of references)) of one record."""
  row = lists.checked({name: _picked(columns, name, theirs) for name, theirs in settings.columns.items()})
  *references, (target, shape) = (_image(settings, lists.image_file(folder, image))
                                  for image in (*row['references'], row['target']))
  return dict(row, references=[data for data, _ in references], target=target), (*shape, len(references))


def _picked(columns: dict, name: str, theirs: tuple[str, ...]):
  """What stands for a column of ours."""
  found = [columns[column] for column in theirs if columns.get(column) is not None]
  if name == 'references':
    return [image for value in found for image in (value if isinstance(value, list) else [value])]
  if not found and name != 'instruction':
    raise UserError(f'it has no {" or ".join(theirs)} for the {name}: its columns are {", ".join(sorted(columns))} '
                    f'(--{name} names one)')
  return found[0] if found else None


def _image(settings: Settings, image) -> tuple[bytes, tuple[int, int]]:
  """(encoded image, its height and width) of encoded bytes, a path or an address."""
  pixels = imaging.read(image)
  y, x = pixels.shape[:2]
  scale = min(1.0, math.sqrt((settings.pixels or y * x) / (y * x)))
  if scale == 1.0 and not settings.reencode:
    return (image if isinstance(image, bytes) else storage.read(image)), (y, x)
  if scale < 1.0:
    y, x = max(1, math.floor(y * scale)), max(1, math.floor(x * scale))
    pixels = np.asarray(Image.fromarray(pixels).resize((x, y), Image.Resampling.BICUBIC))
  return imaging.encoded(pixels, settings.format, settings.quality), (y, x)


def convert(patterns: list[str], settings: Settings, records: int = RECORDS, workers: int = 0,
            machine: tuple[int, int] = (0, 1), beam: list[str] | None = None) -> dict[int, dict]:
  """Converts inputs -> {number: JSON} of all shards that are whole now.

  settings.count: 0 for as many shards as hold `records` each; of tar files, one for each.
  workers: processes; 0 is this one alone.  machine: (this one's number, how many there are).
  beam: arguments of Apache Beam's pipeline, which then runs the shards in place of processes.
  """
  inputs = layouts.inputs(patterns)
  total = None if inputs[0].kind == 'tar' else sum(piece.stop for piece in inputs)
  most = len(inputs) if total is None else total
  if not most:
    raise UserError(f'--input={",".join(patterns)} has no records')
  count = min(settings.count or (most if total is None else -(-total // records)), most)
  settings = dataclasses.replace(settings, count=count)
  shards.begin(settings.output, count, _made_of(inputs, settings))
  there, pieces = shards.whole(settings.output, count), layouts.split(inputs, count)
  work = [(number, pieces[number]) for number in range(machine[0], count, machine[1]) if number not in there]
  print(f'{settings.output}: {len(there)} of {count} shards are there, {len(work)} are made here', flush=True)
  if beam is not None:
    _run_beam(settings, work, beam)
  elif workers:
    _run_processes(settings, work, workers)
  else:
    with contextlib.closing(progress.bar(len(work), 'shard')) as bar:
      for each in work:
        shard(settings, each)
        bar.update(1)
  return shards.whole(settings.output, count)


def _made_of(inputs: list[layouts.Piece], settings: Settings) -> dict:
  """What shards depend on; a folder holds shards of one such."""
  facts = [[piece.path, *piece.names] + ([] if piece.kind == 'folder' else [storage.size(piece.path)])
           for piece in inputs]
  digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
  chosen = dataclasses.asdict(settings)
  return json.loads(json.dumps(dict(inputs=digest, **{name: chosen[name] for name in (
      'columns', 'pixels', 'format', 'quality', 'reencode')})))


def _run_processes(settings: Settings, work: list, workers: int) -> None:
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(min(workers, max(1, len(work))), context) as pool:
    futures = [pool.submit(shard, settings, each) for each in work]
    try:
      with contextlib.closing(progress.bar(len(work), 'shard')) as bar:
        for future in concurrent.futures.as_completed(futures):
          future.result()
          bar.update(1)
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def _run_beam(settings: Settings, work: list, arguments: list[str]) -> None:
  try:
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as error:
    raise UserError(f'--beam wants Apache Beam ({error}): pip install apache-beam, in an environment of its '
                    'own') from error
  with apache_beam.Pipeline(options=PipelineOptions(arguments)) as pipeline:
    pipeline | apache_beam.Create(work) | apache_beam.Reshuffle() | apache_beam.Map(functools.partial(shard, settings))


def summary(settings: Settings, reports: dict[int, dict]) -> str:
  """What is there, in a few lines. UserError where too many records of a whole folder are broken."""
  broken, kept = (sum(report[name] for report in reports.values()) for name in ('broken', 'records'))
  reasons = [reason for _, report in sorted(reports.items()) for reason in report['reasons']]
  count = shards.about(settings.output)['shards']
  named = f'; the first: {"; ".join(reasons[:3])}' if broken else ''
  if broken > settings.skipped * max(kept + broken, 1000):
    raise UserError(f'{settings.output}: {broken} of {kept + broken} records could not be used, more than the allowed '
                    f'share of {settings.skipped:g}: mend them or allow more (--skipped){named}')
  ended = f'train with --config.data.path={settings.output}' if len(reports) == count else (
      f'{count - len(reports)} shards are left to other machines, or to another start')
  return (f'{settings.output}: {len(reports)} of {count} shards, {kept} records, {broken} broken ones left out{named}\n'
          f'{ended}')


def _names(text: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
  return default if text is None else tuple(name.strip() for name in text.split(',') if name.strip())


def machine_number(text: str) -> tuple[int, int]:
  """'i/n' -> (i, n); UserError for another text."""
  number, _, count = text.partition('/')
  if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
    raise UserError(f'--machine={text} must be NUMBER/COUNT, as in 0/4 to 3/4')
  return int(number), int(count)


def main(argv) -> None:
  del argv
  values = flags.FLAGS
  columns = {name: _names(values[name].value, default) for name, default in COLUMNS.items()}
  settings = Settings(values.output.rstrip('/'), values.shards, columns, values.pixels, values.format, values.quality,
                      values.reencode, values.skipped)
  beam = None if values.beam is None else [f'--runner={values.beam}', *shlex.split(values.beam_options)]
  reports = convert(values.input, settings, values.records, values.workers, machine_number(values.machine), beam)
  print(summary(settings, reports))


def define() -> None:
  """Defines the flags; apart, so that programs with flags of the same names may import this module."""
  flags.DEFINE_list('input', None, 'files, patterns of them, or folders of images, with commas between', required=True)
  flags.DEFINE(command_line.PathParser(), 'output', None, 'folder to write to, here or at gs://', required=True)
  flags.DEFINE_integer('shards', 0, 'number of shards; 0: by --records, and of tar files one for each', lower_bound=0)
  flags.DEFINE_integer('records', RECORDS, 'records of a shard', lower_bound=1)
  flags.DEFINE_integer('workers', 0, 'processes; 0: this one alone', lower_bound=0)
  flags.DEFINE_string('machine', '0/1', 'NUMBER/COUNT: which of how many machines this is; each makes its shards')
  flags.DEFINE_integer('pixels', None, 'most pixels of an image: larger ones are scaled down', lower_bound=1)
  flags.DEFINE_enum('format', 'jpeg', imaging.ENCODINGS, 'format of the images that are encoded anew')
  flags.DEFINE_integer('quality', 95, 'quality of JPEG and WebP; WebP of 100 is lossless', 1, 100)
  flags.DEFINE_bool('reencode', False, 'encode all images anew; otherwise those that are not scaled keep their bytes')
  flags.DEFINE_float('skipped', 0.01, 'share of broken records past which the conversion stops', 0, 1)
  for name, default in COLUMNS.items():
    each = 'all of them' if name == 'references' else 'the first that a record has'
    flags.DEFINE_string(name, None, f'column of {name}, or several with commas, of which {each}; by default '
                        + ', '.join(default))
  flags.DEFINE_string('beam', None, 'run on Apache Beam: DirectRunner, DataflowRunner or another')
  flags.DEFINE_string('beam_options', '', "Beam's own options, as '--project=x --region=y'")


if __name__ == '__main__':
  from unifusion_jax.data import convert as itself  # whose functions other processes find by name
  itself.define()
  with errors.at_the_terminal():
    app.run(itself.main, flags_parser=command_line.parse_flags)
