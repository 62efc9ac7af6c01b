"""Pictures in and out: reading any file as RGB, resizing, tiling for the vision tower, PNGs and sample grids.

A picture is uint8 RGB [y x 3] everywhere. `tiles` follows the dynamic preprocessing of InternVL (arXiv 2404.16821),
as the public GotOcr2ImageProcessor does it with crop_to_patches.
"""

import io
import os
import pathlib
import struct
import zlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF')
MAX_PIXELS = 64_000_000
# What Pillow raises for a damaged file depends on the format and on where the damage is.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


def read(source, max_pixels: int = MAX_PIXELS) -> np.ndarray:
  """The picture of a path, of encoded bytes, or of an array, as uint8 RGB [y x 3].

  The first frame, turned as its EXIF says, alpha over white, 16 bits scaled to 8; colour profiles are not applied.
  ValueError naming the file when it is missing, empty, damaged, no picture, or has more than `max_pixels`.
  """
  if isinstance(source, np.ndarray):
    return _from_array(source)
  name, file = _open(source)
  image = _header(file, name, max_pixels)
  try:
    image.load()
    return _to_rgb(ImageOps.exif_transpose(image))
  except _DAMAGE as error:
    raise ValueError(f'{name} is damaged or cut short ({error}): replace the file or take it out') from error


def read_size(source, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
  """(height, width) in pixels after the EXIF turn, from the header alone. Errors as `read`."""
  name, file = _open(source)
  image = _header(file, name, max_pixels)
  try:
    turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5-8 swap the sides
  except _DAMAGE as error:
    raise ValueError(f'{name} is damaged ({error}): replace the file or take it out') from error
  width, height = image.size
  return (width, height) if turned else (height, width)


def _open(source) -> tuple[str, object]:
  """(name for messages, what Pillow opens)."""
  if isinstance(source, (bytes, bytearray, memoryview)):
    name = f'a picture of {len(source)} bytes'
    if not source:
      raise ValueError(f'{name} is empty: give a PNG, JPEG, WebP or GIF')
    return name, io.BytesIO(source)
  path = pathlib.Path(source)
  if not path.is_file():
    raise ValueError(f'{path} is not there (or is no file): give the path of a PNG, JPEG, WebP or GIF')
  if path.stat().st_size == 0:
    raise ValueError(f'{path} is empty: give a PNG, JPEG, WebP or GIF')
  return str(path), path


def _header(file, name: str, max_pixels: int) -> Image.Image:
  try:
    image = Image.open(file, formats=FORMATS)
  except Image.DecompressionBombError as error:
    raise ValueError(f'{name} has more than {max_pixels} pixels ({error}): scale it down first') from error
  except Image.UnidentifiedImageError as error:
    raise ValueError(f'{name} is not a picture that can be read: give a PNG, JPEG, WebP or GIF') from error
  except _DAMAGE as error:
    raise ValueError(f'{name} is damaged ({error}): replace the file or take it out') from error
  width, height = image.size
  if width * height > max_pixels:
    raise ValueError(f'{name} has {width}x{height} pixels, more than the {max_pixels} allowed: scale it down first')
  if width * height == 0:
    raise ValueError(f'{name} has no pixels ({width}x{height}): replace the file or take it out')
  return image


def _from_array(array: np.ndarray) -> np.ndarray:
  if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)):
    raise ValueError(f'a picture array is {array.dtype} {list(array.shape)}: '
                     'wanted uint8 [y x], [y x 1], [y x 3] or [y x 4] (RGB, alpha last)')
  if array.size == 0:
    raise ValueError(f'a picture array has no pixels: its shape is {list(array.shape)}')
  if array.ndim == 3 and array.shape[-1] == 3:
    return array
  return _to_rgb(Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array))


def _to_rgb(image: Image.Image) -> np.ndarray:
  if image.mode.startswith('I'):  # 16-bit grey; Pillow's own conversion would clip it at 255
    values = np.asarray(image).astype(np.uint32)
    grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)
  if image.has_transparency_data:
    image = image.convert('RGBA')
    image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
  return np.array(image.convert('RGB'))


def resize_cover(picture: np.ndarray, width: int, height: int) -> np.ndarray:
  """Scaled (antialiased) to cover width x height pixels and cut at the centre: uint8 [height width 3]."""
  y, x = picture.shape[:2]
  if (x, y) == (width, height):
    return picture
  scale = min(x / width, y / height)  # source pixels per wanted pixel
  left, top = (x - scale * width) / 2, (y - scale * height) / 2
  box = (max(left, 0), max(top, 0), min(left + scale * width, x), min(top + scale * height, y))
  return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC, box=box))


def tile_grid(height: int, width: int, tile: int, max_tiles: int, min_tiles: int = 1) -> tuple[int, int]:
  """(columns, rows) of tiles for a picture: the closest aspect ratio of min_tiles <= columns * rows <= max_tiles.

  Of grids equally close the larger is taken while the picture has more than half as many pixels as the grid.
  """
  if not 1 <= min_tiles <= max_tiles:
    raise ValueError(f'min_tiles={min_tiles} and max_tiles={max_tiles}: wanted 1 <= min_tiles <= max_tiles')
  grids = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles + 1) if min_tiles <= c * r <= max_tiles]
  grids.sort(key=lambda grid: grid[0] * grid[1])
  best, best_error = (1, 1), float('inf')
  for columns, rows in grids:
    error = abs(width / height - columns / rows)
    roomy = width * height > 0.5 * tile * tile * columns * rows
    if error < best_error or (error == best_error and roomy):
      best, best_error = (columns, rows), error
  return best


def tiles(picture: np.ndarray, tile: int, max_tiles: int, min_tiles: int = 1, thumbnail: bool = True) -> np.ndarray:
  """The picture as uint8 tiles [r tile tile 3], row by row, then the whole of it when there is more than one."""
  height, width = picture.shape[:2]
  columns, rows = tile_grid(height, width, tile, max_tiles, min_tiles)
  whole = _stretch(picture, columns * tile, rows * tile)
  cut = whole.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(rows * columns, tile, tile, 3)
  if thumbnail and rows * columns > 1:
    return np.concatenate([cut, _stretch(picture, tile, tile)[None]])
  return cut


def _stretch(picture: np.ndarray, width: int, height: int) -> np.ndarray:
  return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


def stitch(pictures) -> np.ndarray:
  """Pictures [y x 3] edge to edge as one, each scaled to the height of the highest: uint8 [y x 3]."""
  height = max(picture.shape[0] for picture in pictures)
  return np.concatenate([_stretch(p, max(1, round(p.shape[1] * height / p.shape[0])), height) for p in pictures], axis=1)


def normalise(pictures: np.ndarray, mean, std) -> np.ndarray:
  """uint8 [... 3] -> f32 [... 3], (x / 255 - mean) / std per channel."""
  mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
  return pictures.astype(np.float32) * (1 / (255 * std)) - mean / std


def png_bytes(picture: np.ndarray, metadata: dict[str, str] | None = None) -> bytes:
  """The picture as a PNG, with `metadata` as text entries (UTF-8)."""
  text = PngImagePlugin.PngInfo()
  for key, value in (metadata or {}).items():
    text.add_itxt(key, value)
  file = io.BytesIO()
  Image.fromarray(picture).save(file, 'PNG', pnginfo=text)
  return file.getvalue()


def write_png(path, picture: np.ndarray, metadata: dict[str, str] | None = None) -> None:
  """Writes the picture [y x 3] to a PNG file, whole or not at all; folders are made."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'.{path.name}.{os.getpid()}')
  partial.write_bytes(png_bytes(picture, metadata))
  os.replace(partial, path)


def grid(rows, captions=None, titles=None, cell: int = 256, pad: int = 8) -> np.ndarray:
  """One sheet of many pictures: uint8 [y x 3].

  rows: lists of pictures [y x 3], None for an empty place; they may differ in size and shape.
  captions: like rows, text (or '') under each picture. titles: one text over each column.
  Every picture is enlarged by the same whole number, so that none is wider or higher than `cell` pixels and small
  ones stay crisp; pictures larger than `cell` are scaled down to it.
  """
  captions = captions or [[''] * len(row) for row in rows]
  shapes = [(len(row), len(texts)) for row, texts in zip(rows, captions, strict=True)]
  if not any(p is not None for row in rows for p in row) or any(a != b for a, b in shapes):
    raise ValueError('a grid wants at least one picture and as many captions as pictures: '
                     f'it got (pictures, captions) {shapes} by row')
  factor = max(1, cell // max(max(p.shape[:2]) for row in rows for p in row if p is not None))
  rows = [[None if p is None else _enlarged(p, factor, cell) for p in row] for row in rows]
  columns = max(len(row) for row in rows)
  widths = [max([p.shape[1] for row in rows for p in row[c:c + 1] if p is not None] + [48]) for c in range(columns)]
  font = ImageFont.load_default(size=13)

  def labels(texts):
    return [_label(text, width, font) for text, width in zip(texts, widths)]

  strips = [_strip(labels(titles), widths, pad, align='bottom')] if titles else []
  for row, texts in zip(rows, captions):
    strips.append(_strip(row, widths, pad, align='bottom'))
    if any(texts):
      strips.append(_strip(labels(texts), widths, pad, align='top'))
  sheet = np.concatenate(strips)
  return np.pad(sheet, ((pad, 0), (0, 0), (0, 0)), constant_values=255)


def _enlarged(picture: np.ndarray, factor: int, cell: int) -> np.ndarray:
  y, x = picture.shape[:2]
  if max(y, x) > cell:
    scale = cell / max(y, x)
    return _stretch(picture, max(1, round(x * scale)), max(1, round(y * scale)))
  return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def _label(text: str, width: int, font) -> np.ndarray:
  """Black text on white, wrapped to `width` pixels; words longer than a line are broken."""
  lines = []
  for word in text.split():
    joined = f'{lines[-1]} {word}' if lines else word
    if lines and font.getlength(joined) <= width:
      lines[-1] = joined
      continue
    while font.getlength(word) > width and len(word) > 1:
      fits = max(1, next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width))
      lines.append(word[:fits])
      word = word[fits:]
    lines.append(word)
  line_height = sum(font.getmetrics())
  image = Image.new('RGB', (width, max(1, line_height * len(lines))), 'white')
  draw = ImageDraw.Draw(image)
  for i, line in enumerate(lines):
    draw.text((0, i * line_height), line, fill='black', font=font)
  return np.asarray(image)


def _strip(cells, widths: list[int], pad: int, align: str) -> np.ndarray:
  """Cells side by side on white, each in its column, with `pad` pixels around and below."""
  height = max([c.shape[0] for c in cells if c is not None] + [1])
  strip = np.full((height + pad, sum(widths) + pad * (len(widths) + 1), 3), 255, np.uint8)
  x = pad
  for cell, width in zip(cells, widths):
    if cell is not None:
      y = height - cell.shape[0] if align == 'bottom' else 0
      strip[y:y + cell.shape[0], x:x + cell.shape[1]] = cell
    x += width + pad
  return strip
