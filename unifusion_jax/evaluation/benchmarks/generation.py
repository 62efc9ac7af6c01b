"""Images of a set's prompts in the files of its layout, made once: what is there whole is not made again.

`generation.json` in the workdir says of which set and by which model and settings, and `generated.jsonl` has a line for
each file, with the request, seeds and rewrites of its images and the digests of their references. Image k of prompt i
of a whole set has the seed sample.seed + i n + k, n being the images of a prompt, so a part of a set has the images
that the whole has.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import zlib

import numpy as np

from unifusion_jax import metadata, pipeline, progress, sharding
from unifusion_jax.data import imaging
from unifusion_jax.errors import UserError
from unifusion_jax.evaluation.benchmarks.records import Record
from unifusion_jax.evaluation.benchmarks.sets import Output, Set
from unifusion_jax.request import Request

IMAGES, IDENTITY, LOG = 'images', 'generation.json', 'generated.jsonl'
QUALITY = dict(jpeg=95, webp=100, png=100)  # of `imaging.encoded`; a WebP of 100 loses nothing


@dataclasses.dataclass(frozen=True)
class Job:
  """A file to make: requests of its images, which have one size."""
  record: Record
  output: Output
  requests: tuple[Request, ...]
  height: int
  width: int


def jobs(benchmark: Set, records: Sequence[tuple[int, Record]], images: int, seed: int,
         size_of: Callable[[np.ndarray | None], tuple[int, int]]) -> list[Job]:
  """The files of numbered records, those of one shape and number of references one after another.

  images: of each prompt.  seed: of the first prompt's first image.
  size_of: (height, width) of an image by its first reference, None without one.
  """
  made = []
  for i, record in records:
    files = tuple(path if isinstance(path, str) else '' for path in record.references)
    size = size_of(_shape(record.references[0]) if record.references else None)
    for output in benchmark.layout(record, images):
      requests = tuple(Request(record.prompt, record.references, seed + i * images + k, None, record.place, files)
                       for k in output.numbers)
      made.append(Job(record, output, requests, *size))
  return sorted(made, key=lambda job: (job.height, job.width, len(job.record.references)))


def _shape(reference) -> np.ndarray:
  """An array of the size of a reference, which holds no pixels."""
  size = reference.shape[:2] if isinstance(reference, np.ndarray) else imaging.read_size(reference)
  return np.broadcast_to(np.uint8(0), (*size, 3))


def identity(workdir: pathlib.Path, made_by: dict) -> None:
  """Notes what makes the images; UserError where the workdir has images of another model or other settings."""
  path = workdir / IDENTITY
  with sharding.together('open the workdir'):
    if not sharding.is_main_process():
      return
    if not (workdir / IMAGES).exists():
      imaging.write_bytes(path, json.dumps(made_by, indent=2).encode())
    elif path.exists():
      _check(workdir, made_by)
    else:
      raise UserError(f'{workdir / IMAGES} has images of which nothing says what made them: give another --workdir, or '
                      '--config.benchmark.stage=score to score them as they are')


def check(workdir: pathlib.Path, made_by: dict) -> None:
  """UserError where generation.json has another value of one of these; a workdir without that file passes."""
  with sharding.together('open the workdir'):
    if sharding.is_main_process() and (workdir / IDENTITY).exists():
      _check(workdir, made_by)


def _check(workdir: pathlib.Path, made_by: dict) -> None:
  before, now = json.loads((workdir / IDENTITY).read_text()), json.loads(json.dumps(made_by))
  if wrong := _difference({name: before.get(name) for name in now}, now):
    raise UserError(f'{workdir} holds images of {wrong[0]}={wrong[1]!r}, and now it is {wrong[2]!r}: give another '
                    '--workdir, or the settings of before')


def _difference(before, now, name: str = ''):
  """(dotted name, before, now) of the first difference of two JSON values; None for none."""
  if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
    before, now = dict(enumerate(before)), dict(enumerate(now))
  if isinstance(before, dict) and isinstance(now, dict):
    for key in dict.fromkeys((*before, *now)):
      if found := _difference(before.get(key), now.get(key), f'{name}.{key}'.lstrip('.')):
        return found
    return None
  return None if before == now else (name, before, now)


def log(workdir: pathlib.Path) -> dict[str, dict]:
  """{path below images/: its line} of the files that were made; a line that was cut short is none."""
  lines = {}
  if (workdir / LOG).exists():
    for line in (workdir / LOG).read_text().splitlines():
      try:
        entry = json.loads(line)
      except ValueError:
        continue
      lines[entry['file']] = entry
  return lines


def is_whole(workdir: pathlib.Path, entry: dict) -> bool:
  """Whether the file of a line of `log` is there as it was written."""
  path = workdir / IMAGES / entry['file']
  return (path.is_file() and path.stat().st_size == entry['bytes']
          and zlib.crc32(path.read_bytes()) == entry['crc32'])


def missing(workdir: pathlib.Path, wanted: Sequence[Job]) -> list[Job]:
  """The files that are not there whole, or are of other references, as the first process sees it."""
  lines = log(workdir) if sharding.is_main_process() else {}

  def is_made(job: Job) -> bool:
    entry = lines.get(job.output.path)
    return (entry is not None and is_whole(workdir, entry)
            and entry.get('references', []) == _digests(job.record))

  absent = sharding.from_main_process(np.array([not is_made(job) for job in wanted], np.uint8))
  return [job for job, is_absent in zip(wanted, absent) if is_absent]


def check_references(workdir: pathlib.Path, benchmark: Set, records: Sequence[Record], images: int) -> None:
  """UserError for files that were made of other references than their record has now; what no line is of passes."""
  with sharding.together('find the images'):
    if sharding.is_main_process():
      lines, others = log(workdir), []
      for record in records:
        made = [lines[output.path] for output in benchmark.layout(record, images) if output.path in lines]
        now = _digests(record) if made else []
        others += [entry['file'] for entry in made if entry.get('references', []) != now]
      if others:
        raise UserError(f'{len(others)} files in {workdir} were made of other references than the set has now: the '
                        f'first is {IMAGES}/{others[0]}. Make them again with --config.benchmark.stage=all, or give '
                        'the references of before')


def _digests(record: Record) -> list[str]:
  return [metadata.digest(reference) for reference in record.references]


def write_index(workdir: pathlib.Path, benchmark: Set, records: Sequence[Record], images: int) -> None:
  """The benchmark's index, where it has one: the path of each prompt's image, of all records, where it lies now."""
  with sharding.together('write the index'):
    if not benchmark.index or not sharding.is_main_process():
      return
    paths = collections.defaultdict(dict)
    for record in records:
      for output in benchmark.layout(record, images):
        folder = str(output.numbers[0]) if images > 1 else ''
        paths[folder][record.prompt] = str((workdir / IMAGES / output.path).absolute())
    for folder, each in paths.items():
      imaging.write_bytes(workdir / folder / benchmark.index, json.dumps(each, indent=2).encode())


def generate(pipe: pipeline.UniFusionPipeline, benchmark: Set, wanted: Sequence[Job], workdir: pathlib.Path) -> None:
  """Makes the files, `batch_size` images of the pipeline's settings at a time, each written when its images are there.

  All processes call this together; the first one writes.
  """
  groups = collections.defaultdict(list)
  for job in wanted:
    groups[job.height, job.width, len(job.record.references)].append(job)
  total = sum(len(job.requests) for job in wanted)
  with contextlib.closing(progress.bar(total, 'images', silent=not sharding.is_main_process())) as done:
    for (height, width, _), members in groups.items():
      samples = _samples(pipe, [request for job in members for request in job.requests], height, width, done)
      for job in members:
        made = [next(samples) for _ in job.requests]
        with sharding.together('write images'):
          if sharding.is_main_process():
            _write(pipe, benchmark, job, made, workdir)


def _samples(pipe, requests: list[Request], height: int, width: int, done) -> Iterator[pipeline.Sample]:
  settings = pipe.settings.changed(batch_size=min(pipe.settings.batch_size, len(requests)))
  for part, samples in pipe.batches(requests, height, width, settings=settings):
    done.update(len(part))
    yield from samples


def _write(pipe, benchmark: Set, job: Job, made: list[pipeline.Sample], workdir: pathlib.Path) -> None:
  """The file, what the scorer reads beside it, and then its line in the log."""
  for path, content in benchmark.beside(job.record, job.output).items():
    if not (workdir / IMAGES / path).exists():
      imaging.write_bytes(workdir / IMAGES / path, content)
  image = grid([sample.image for sample in made])
  if job.output.encoding == 'png' and len(made) == 1:
    data = imaging.png_bytes(image, metadata.as_text(pipe.metadata(job.requests[0], made[0], pipe.settings)))
  else:
    data = imaging.encoded(image, job.output.encoding, QUALITY[job.output.encoding])
  imaging.write_bytes(workdir / IMAGES / job.output.path, data)
  entry = dict(file=job.output.path, id=job.record.id, bytes=len(data), crc32=zlib.crc32(data),
               prompt=job.record.prompt, references=_digests(job.record),
               seeds=[request.seed for request in job.requests],
               rewrites=[sample.rewrite for sample in made],
               warnings=[sample.warning for sample in made], remarks=[sample.remark for sample in made])
  with (workdir / LOG).open('a+b') as file:
    file.seek(-min(1, file.tell()), os.SEEK_END)
    cut = file.read() not in (b'', b'\n')  # a line that a process was ended in
    file.write(b'\n' * cut + json.dumps(entry).encode() + b'\n')


def grid(images: Sequence[np.ndarray]) -> np.ndarray:
  """Images of one shape in one [y x 3], row by row, in a square."""
  columns = math.isqrt(len(images))
  return np.concatenate([np.concatenate(images[i:i + columns], axis=1) for i in range(0, len(images), columns)])


def split(image: np.ndarray, count: int) -> list[np.ndarray]:
  """The images of a `grid` of `count`."""
  columns = math.isqrt(count)
  height, width = (side // columns for side in image.shape[:2])
  return [image[y * height:(y + 1) * height, x * width:(x + 1) * width] for y in range(columns) for x in range(columns)]


def read(workdir: pathlib.Path, outputs: Sequence[Output]) -> list[np.ndarray]:
  """All images of a prompt, in the order of their numbers, on every process; the first one reads the files."""
  images = {}
  for output in outputs:
    image = None
    with sharding.together('read images'):
      if sharding.is_main_process():
        image = imaging.read(workdir / IMAGES / output.path)
    images |= dict(zip(output.numbers, split(on_all(image), len(output.numbers))))
  return [images[k] for k in sorted(images)]


def on_all(image: np.ndarray | None) -> np.ndarray:
  """The first process's image uint8 [y x 3] on every process."""
  shape = sharding.from_main_process(np.array(image.shape if image is not None else (0, 0, 0), np.int32))
  return sharding.from_main_process(np.zeros(shape, np.uint8) if image is None else image)
