"""Files and lists changed at random, and what becomes of them: a promise that is not kept is counted, and shown.

  python -m benchmarks.fuzz                # tags, bits and records: some minutes on one core
  python -m benchmarks.fuzz --scale=0.1

tags     a turned photo with a random EXIF tag: read, and turned.
bits     image files with flipped bytes, cut or grown: an image, or a sentence that names the file.
records  lists with odd lines: every record is read and transformed, or passed over and named by file and line.
"""

import io
import json
import pathlib
import random
import struct
import tempfile
import time
import warnings

from absl import app, flags, logging
import numpy as np
from PIL import Image

from unifusion_jax import config
from unifusion_jax.data import imaging, loader, sources, transforms
from unifusion_jax.errors import BrokenRecord, UserError

_SCALE = flags.DEFINE_float('scale', 1.0, 'Share of the tries.', lower_bound=0)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the changes.')

TAGS, BITS, LISTS, LINES = 20_000, 20_000, 40, 250
LONGEST = 2000  # characters of a message
TAG_NAMES = (0x010e, 0x010f, 0x0110, 0x011a, 0x011b, 0x0128, 0x0131, 0x0132, 0x013b, 0x0213, 0x8298, 0x8769, 0x8825)


def main(_):
  logging.set_verbosity(logging.ERROR)
  warnings.simplefilter('ignore')
  rng = random.Random(_SEED.value)
  print(f'{"":8} {"tries":>7} {"used":>7} {"named":>7} {"promise not kept":>17} {"seconds":>8}')
  broken = 0
  for name, fuzz in (('tags', tags), ('bits', bits), ('records', records)):
    start, counts = time.monotonic(), dict(used=0, named=0)
    failures = []
    for outcome in fuzz(rng, _SCALE.value):
      if outcome in counts:
        counts[outcome] += 1
      else:
        failures.append(outcome)
    tries, broken = sum(counts.values()) + len(failures), broken + len(failures)
    print(f'{name:8} {tries:7} {counts["used"]:7} {counts["named"]:7} {len(failures):17} '
          f'{time.monotonic() - start:8.0f}')
    for failure in failures[:5]:
      print('   ', failure[:300])
  raise SystemExit(broken > 0)


def tags(rng: random.Random, scale: float):
  """'used' for each photo that is read and turned, a failure otherwise: none may be refused."""
  photo = Image.new('RGB', (96, 64), (200, 30, 30))
  photo.paste((30, 30, 200), (0, 0, 48, 64))
  for _ in range(int(TAGS * scale)):
    kind = rng.choice(('JPEG', 'JPEG', 'PNG', 'WEBP', *imaging.FORMATS[4:]))
    file, exif = io.BytesIO(), _exif(rng)
    if kind == 'AVIF':  # Pillow writes no odd tags into it: they are put there afterwards
      exif = Image.Exif()
      exif[0x0112], exif[0x010e], exif[0x0131], exif[0x011a] = 6, 'a photo', 'a program', 72.0
    photo.save(file, kind, exif=exif)
    data = bytearray(file.getvalue())
    if kind == 'AVIF':
      tags_at = data.index(b'MM\0*\0\0\0\x08') + 10
      for _ in range(rng.randint(1, 6)):
        data[tags_at + rng.randrange(36)] = rng.randrange(256)
    try:
      image, size = imaging.read(data), imaging.read_size(data)
      turned = size == image.shape[:2] == (96, 64) and image[8, 32, 2] > 128 > image[88, 32, 2]
      yield 'used' if turned else f'{kind} not turned: {exif}'
    except Exception as error:
      yield f'{kind} {type(error).__name__}: {error}: {exif}'


def _exif(rng: random.Random) -> bytes:
  """EXIF of orientation 6, with one to three random tags."""
  order, entries = rng.choice('<>'), []
  for _ in range(rng.randint(1, 3)):
    tag = rng.choice((*TAG_NAMES, rng.randrange(0x0112), rng.randrange(0x0113, 1 << 16)))
    count = rng.choice((0, 1, 2, 3, rng.randrange(1 << 32)))
    entries.append((tag, rng.choice((*range(14), rng.randrange(1 << 16))), count, rng.randbytes(4)))
  entries.append((0x0112, 3, 1, struct.pack(f'{order}HH', 6, 0)))
  return (b'Exif\0\0' + (b'II*\0' if order == '<' else b'MM\0*') + struct.pack(f'{order}IH', 8, len(entries)) +
          b''.join(struct.pack(f'{order}HHI', *entry[:3]) + entry[3] for entry in sorted(entries)) +
          rng.randbytes(rng.randrange(40)))


def bits(rng: random.Random, scale: float):
  """'used' for an image, 'named' for a UserError; any other error is a failure."""
  noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 4), np.uint8))
  exif = Image.Exif()
  exif[0x0112] = 6
  originals = []
  for kind, pil_image, options in (
      ('PNG', noise, dict(exif=exif)), ('PNG', noise.convert('P'), dict(transparency=3)),
      ('PNG', Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60)), {}),
      ('JPEG', noise.convert('RGB'), dict(exif=exif)), ('JPEG', noise.convert('CMYK'), {}),
      ('JPEG', noise.convert('L'), dict(progressive=True)), ('WEBP', noise, dict(exif=exif)),
      ('WEBP', noise, dict(lossless=True)), ('GIF', noise.convert('RGB'), {}),
      *((kind, noise, dict(save_all=True, append_images=[noise.rotate(90)])) for kind in ('PNG', 'GIF', 'WEBP')),
      *([('AVIF', noise, dict(exif=exif))] if 'AVIF' in imaging.FORMATS else [])):
    file = io.BytesIO()
    pil_image.save(file, kind, **options)
    originals.append(file.getvalue())
  for _ in range(int(BITS * scale)):
    data = bytearray(rng.choice(originals))
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
      data[rng.randrange(rng.choice((len(data), min(200, len(data)))))] = rng.randrange(256)  # heads matter most
    if rng.random() < 0.2:
      data = data[:rng.randrange(1, len(data))] if rng.random() < 0.5 else data + rng.randbytes(20)
    for read in (imaging.read_size, imaging.read):
      outcome = 'used'
      try:
        read(bytes(data), max_pixels=1_000_000)
      except UserError as error:
        outcome = 'named' if len(str(error)) < LONGEST else f'a message of {len(str(error))} characters'
      except Exception as error:
        outcome = f'{type(error).__name__}: {error}'
    yield outcome


def records(rng: random.Random, scale: float):
  """'used' for a record that makes an example, 'named' for one passed over with its line; else a failure."""
  encoder = transforms.PromptEncoder.load(config.ASSETS / 'vlm', 1, 128, 52)
  transform = transforms.GenerationExample(encoder, cond_dropout=0.0)
  for _ in range(max(1, int(LISTS * scale))):
    with tempfile.TemporaryDirectory() as folder:
      path = _list(rng, pathlib.Path(folder))
      try:
        source = sources.FolderSource(path, ((64, 64), (48, 80)), share=1.0)
        data = loader.batches([(source, 1.0)], transform, 4, rng.randrange(1000))
        for _ in range(10):
          next(data)
        data.close()
      except Exception as error:
        yield f'the list stopped: {type(error).__name__}: {error}'
        continue
      named = {problem.split(': ')[0]: problem for problem in source.problems}
      for i in range(len(source)):
        place = source.where(i)
        if source.bucket(i) is None:
          yield 'named' if len(named.get(place, ' ' * LONGEST)) < LONGEST else f'{place} is not named, or at length'
          continue
        try:
          transform(source[i], np.random.default_rng(0))
          yield 'used'
        except BrokenRecord:
          yield 'named'  # a text that is too long, by the loader
        except Exception as error:
          yield f'{type(error).__name__}: {error}'


def _list(rng: random.Random, folder: pathlib.Path) -> pathlib.Path:
  """A list of LINES records, of which half are sound, over eight images."""
  for i in range(8):
    imaging.write_png(folder / f'{i}.png', np.full((40, 40 + 8 * i, 3), 30 * i, np.uint8))
  (folder / 'empty.png').write_bytes(b'')
  (folder / 'noise.png').write_bytes(rng.randbytes(500))

  alphabets = ('abc xyz', 'äö 漢字 😀', ''.join(map(chr, range(40))), '\ud800\udfff \udc80', '\u202e\ufeff')

  def text() -> str:
    alphabet = rng.choice(alphabets)
    return ''.join(rng.choice(alphabet) for _ in range(rng.choice((0, 1, 5, 40, 300, 3000))))

  def value(depth: int = 0):
    kinds = (lambda: None, lambda: rng.random() < 0.5, lambda: rng.randrange(-5, 10 ** 18), lambda: 1e300,
             lambda: float('nan'), text, path, lambda: [value(depth + 1) for _ in range(rng.randrange(3))],
             lambda: {text(): value(depth + 1) for _ in range(rng.randrange(3))},
             lambda: dict(bytes=value(depth + 1), path=value(depth + 1)))
    return rng.choice(kinds[:7] if depth > 3 else kinds)()

  def path() -> str:
    return rng.choice((f'{rng.randrange(8)}.png', 'gone.png', 'empty.png', 'noise.png', '.', '/', '/dev/zero', '\\',
                       'a' * 256, '\0', '../' * 3000, text(), f'./{rng.randrange(8)}.png'))

  lines = []
  for _ in range(LINES):
    row = dict(references=[f'{rng.randrange(8)}.png'] * rng.randrange(3), instruction='make it red',
               target=f'{rng.randrange(8)}.png', caption='a red circle')
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
      name = rng.choice((*row, 'tiles', 'rewrites', 'task', 'kind', 'skipped', 'more'))
      row[name] = rng.choice((value, text, path, lambda: [path() for _ in range(rng.randrange(3))]))()
      if rng.random() < 0.1:
        del row[name]
    line = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode('utf-8', 'surrogatepass')
    if rng.random() < 0.1:
      line = bytearray(line)
      for _ in range(rng.randint(1, 5)):
        line[rng.randrange(len(line))] = rng.randrange(256)
    elif rng.random() < 0.03:
      line = rng.choice((rng.randbytes(60), b'[' * 100_000, b'{"a":' * 50_000, b'9' * 6000, b'null', b'\0' * 50, b'"'))
    lines.append(bytes(line).replace(b'\n', b' '))
  (folder / 'list.jsonl').write_bytes(rng.choice((b'\n', b'\r\n')).join(lines))
  return folder / 'list.jsonl'


if __name__ == '__main__':
  app.run(main)
