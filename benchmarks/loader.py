"""Examples a second and core that the loader makes, beside what the train step of a pod needs.

  python -m benchmarks.loader --size=1024 --workers=0,1,2

Images of smooth colours with noise, one reference and one target of about size^2 pixels as JPEG, quality 95, as a list
and as shards of data/convert.py. An example is read, decoded, cut to its canvas, its reference cut into tiles of 448
pixels, its text tokenised: all that `configs/edit.py:8b` asks of the host, with the tokenizer of the embedded VLM. The
need is that of docs/plans/*.json, one example a device in the least time of a step, on hosts of 4 and 8 chips.
"""

import functools
import json
import os
import pathlib
import statistics
import tempfile
import time

from absl import app, flags
import numpy as np
from PIL import Image

from benchmarks import timing
from unifusion_jax import command_line, config
from unifusion_jax.data import buckets, convert, imaging, loader, transforms, vision_inputs
from unifusion_jax.data.config import DataConfig, Task

PLANS = pathlib.Path(__file__).parent.parent / 'docs' / 'plans'
TEXT = 'Put a small red lantern on the wooden table at the left, lit from within, and keep the light of the evening.'
BATCH = 4


def write(folder: pathlib.Path, count: int, size: int) -> tuple[pathlib.Path, pathlib.Path]:
  """(list, folder of shards) of `count` edits."""
  rng, rows = np.random.default_rng(0), []
  for i in range(2 * count):
    height, width = buckets.canvases(('4:3', '1:1', '3:4'), size, 16)[i // 2 % 3]
    colours = Image.fromarray(rng.integers(0, 256, (height // 32, width // 32, 3), np.uint8))
    smooth = np.asarray(colours.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    image = (smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)
    (folder / f'{i}.jpg').write_bytes(imaging.encoded(image, 'jpeg', 95))
  for i in range(count):
    rows.append(dict(references=[f'{2 * i}.jpg'], instruction=TEXT, target=f'{2 * i + 1}.jpg', caption=3 * TEXT))
  (folder / 'list.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  convert.convert([str(folder / 'list.jsonl')], convert.Settings(str(folder / 'shards'), 4, convert.COLUMNS))
  return folder / 'list.jsonl', folder / 'shards'


def transform(tiles: int) -> transforms.GenerationExample:
  images = vision_inputs.TiledImages(448, 256, tiles)
  return transforms.GenerationExample(transforms.PromptEncoder(str(config.ASSETS / 'vlm'), images, 3, 512, 256))


def parts(record_of, encode, repeats: int) -> dict[str, float]:
  """Milliseconds of CPU of one example's parts, medians."""
  record = record_of()
  target, reference = record['target'], record['references'][0]
  encoded = imaging.encoded(target, 'jpeg', 95)
  rng = functools.partial(np.random.default_rng, 0)
  calls = dict(record=record_of, decode=lambda: imaging.read(encoded),
               cover=lambda: imaging.resize_cover(target, target.shape[1] - 16, target.shape[0] - 16),
               tiles=lambda: encode.prompts.image_processor.preprocess([reference], 1),
               transform=lambda: encode(record, rng()))
  seconds = timing.interleaved(calls, repeats, clock=time.process_time)
  return {name: round(1000 * statistics.median(values), 1) for name, values in seconds.items()}


def rates(data: DataConfig, encode, workers: int, batches: int, repeats: int) -> list[float]:
  """Examples a second of the loader, by wall-clock time, of each repetition; the first batches warm up."""
  feed = loader.batches(loader.mix(data), encode, BATCH, workers=workers)
  for _ in range(2 + 4 * workers):
    next(feed)
  found = []
  for _ in range(repeats):
    start = time.perf_counter()
    for _ in range(batches):
      next(feed)
    found.append(BATCH * batches / (time.perf_counter() - start))
  feed.close()
  return found


def needs() -> dict[str, float]:
  """Examples a second and chip of the plans' train steps."""
  found = {}
  for path in sorted(PLANS.glob('*.json')):
    plan = json.loads(path.read_text())
    for program in plan['programs']:
      if program['program'] == 'train' and program.get('time'):
        found[path.stem] = plan['batch_size'] / program['time']['least'] / plan['chips']
  return found


def main(_):
  values = flags.FLAGS
  with tempfile.TemporaryDirectory() as temporary:
    listed, shards = write(pathlib.Path(temporary), values.examples, values.size)
    encode, report = transform(values.tiles), dict(processor=timing.processor(), size=values.size, tiles=values.tiles)
    print(f'{report["processor"]}, load {os.getloadavg()[0]:.1f}, {time.strftime("%Y-%m-%d")}')
    datas = {kind: DataConfig(path=str(path), tasks=(Task('edit'),), size=values.size, tiles=(values.tiles,),
                              aspects=('4:3', '1:1', '3:4')) for kind, path in (('list', listed), ('shards', shards))}
    cpu = {}
    for kind, data in datas.items():
      source = loader.mix(data)[0][0]
      report[kind] = dict(cpu_ms=parts(lambda: source[1], encode, values.repeats))
      cpu[kind] = report[kind]['cpu_ms']
      print(f'{kind}: ms of CPU, medians of {values.repeats}: {cpu[kind]}; '
            f'{1000 / (cpu[kind]["record"] + cpu[kind]["transform"]):.1f} examples/s a core')
      for workers in map(int, values.workers):
        rate = rates(data, encode, workers, values.batches, values.repeats)
        report[kind][f'workers_{workers}'] = [round(each, 2) for each in rate]
        print(f'{kind}, {workers} workers: {timing.spread(rate)} examples/s', flush=True)
  best = 1000 / (cpu['shards']['record'] + cpu['shards']['transform'])
  for name, need in needs().items():
    for chips in (4, 8):
      print(f'{name}: {need * chips:.1f} examples/s on a host of {chips} chips: {need * chips / best:.2f} such cores')
  timing.write(values.json, report | dict(needs=needs()))


if __name__ == '__main__':
  flags.DEFINE_integer('size', 1024, 'images have about size^2 pixels')
  flags.DEFINE_integer('tiles', 9, 'most tiles of a reference, without the thumbnail')
  flags.DEFINE_integer('examples', 24, 'records that are written')
  flags.DEFINE_integer('batches', 6, f'batches of {BATCH} of each repetition')
  flags.DEFINE_integer('repeats', 5, 'repetitions')
  flags.DEFINE_list('workers', ['0', '1', '2'], 'numbers of worker processes, each measured')
  flags.DEFINE(command_line.PathParser(), 'json', None, 'file for the figures')
  app.run(main)
