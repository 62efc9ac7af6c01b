"""Images in and out: any file as RGB, resizing, tiles for the vision tower, PNGs and sample grids.

An image is uint8 RGB [y x 3] on the host and on the wire; a model's door makes floats of it. `tiles` follows the
dynamic preprocessing of InternVL (arXiv 2404.16821), as GotOcr2ImageProcessor does it with crop_to_patches.
"""

import contextlib
import errno
import io
import itertools
import math
import os
import pathlib
import secrets
import stat

import numpy as np
from PIL import features, Image, ImageDraw, ImageFile, ImageFont, ImageOps, PngImagePlugin

from unifusion_jax.data import image_files, storage
from unifusion_jax.errors import clipped, UserError

FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF') + ('AVIF',) * features.check('avif')
WANTED = 'a PNG, JPEG, WebP, GIF or AVIF' if 'AVIF' in FORMATS else 'a PNG, JPEG, WebP or GIF'
MAX_PIXELS = 64_000_000
MAX_BYTES = 2 ** 30  # of a file
HEADER = 2 ** 16  # bytes that are fetched at a time of an address, where the size of an image alone is wanted
ENCODINGS = ('jpeg', 'webp', 'png')


def read(source, max_pixels: int = MAX_PIXELS) -> np.ndarray:
  """The image as uint8 RGB [y x 3], from a path, an address (storage.py), encoded bytes, an array or a Pillow image.

  The first frame, turned as its EXIF says, transparency over white, 16 bits scaled to 8; no colour profile is applied.
  UserError naming the file when it is missing, empty, damaged, no image, or has more than `max_pixels`.
  """
  if isinstance(source, np.ndarray):
    return _from_array(source)
  if isinstance(source, Image.Image):
    with _damage('a Pillow image'):
      return _turned(_to_rgb(source), _orientation(source))
  with _opened(source, max_pixels) as (name, pil_image, orientation), _damage(name):
    return _turned(_to_rgb(pil_image), orientation)


def read_size(source, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
  """(height, width) in pixels after the EXIF turn, from the header alone. Errors as `read`."""
  with _opened(source, max_pixels, whole=False) as (_, pil_image, orientation):
    width, height = pil_image.size
    return (width, height) if orientation >= 5 else (height, width)


def check_file(path) -> None:
  """UserError when there is no file at a path or an address, or nothing in it; the quickest check."""
  if storage.is_address(path):
    with _opening(clipped(path)):
      return _check_bytes(storage.size(path), clipped(path))
  path = pathlib.Path(path)
  name = clipped(path)
  try:
    status = path.stat()
  except FileNotFoundError:
    raise UserError(f'{name} is not there: give the path of {WANTED}') from None
  except (OSError, ValueError) as error:  # ValueError: a NUL, or half a surrogate pair
    reason = error.strerror if isinstance(error, OSError) else error
    raise UserError(f'{name!r} cannot be a file ({reason}): give the path of {WANTED}') from error
  if not stat.S_ISREG(status.st_mode):
    raise UserError(f'{name} is not there as a file, it is a folder or a device: give the path of {WANTED}')
  _check_bytes(status.st_size, name)


def _check_bytes(size: int, name: str) -> None:
  if not size:
    raise UserError(f'{name} is empty: give {WANTED}')
  if size > MAX_BYTES:
    raise UserError(f'{name} has {size} bytes, more than the {MAX_BYTES} allowed: scale the image down first')


@contextlib.contextmanager
def _opening(name: str):
  """Errors of files and of storage as a UserError, but those that are the machine's fault."""
  try:
    yield
  except FileNotFoundError:
    raise UserError(f'{name} is not there: give the path of {WANTED}') from None
  except OSError as error:
    if error.errno in (errno.EMFILE, errno.ENFILE):
      raise
    raise UserError(f'{name} cannot be read ({error.strerror or clipped(error)}): give the path of {WANTED}') from error


@contextlib.contextmanager
def _opened(source, max_pixels: int, whole: bool = True):
  """(name for messages, Pillow image whose header is read, orientation)."""
  if isinstance(source, (bytes, bytearray, memoryview)):
    name, file = f'an image of {len(source)} bytes', io.BytesIO(source)
    if not source:
      raise UserError(f'{name} is empty: give {WANTED}')
  else:
    check_file(source)
    name = clipped(source)
    with _opening(name):
      whole_address = whole and storage.is_address(source)
      file = io.BytesIO(storage.read(source)) if whole_address else storage.open_file(source, HEADER)
  with file:
    with _damage(name):
      pixels, orientation = image_files.pixels(file, whole)
      pil_image = _header(pixels, name, max_pixels)
      if pil_image.format in ('WEBP', 'AVIF'):
        orientation = image_files.orientation(*(pil_image.info.get(key, b'') for key in ('exif', 'xmp')))
      _scale_transparency(pil_image)
    yield name, pil_image, orientation


@contextlib.contextmanager
def _damage(name: str):
  """Pillow's errors as a UserError: their types depend on the format, and on where the damage is."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    reason = clipped(error, 100) or type(error).__name__
    raise UserError(f'{name} is damaged or cut short ({reason}): replace the file or take it out') from error


def _header(file, name: str, max_pixels: int) -> Image.Image:
  try:
    pil_image = Image.open(file, formats=FORMATS)
  except Image.DecompressionBombError as error:
    raise UserError(f'{name} has more than {max_pixels} pixels ({error}): scale it down first') from error
  except Image.UnidentifiedImageError as error:
    raise UserError(f'{name} is not an image that can be read: give {WANTED}') from error
  width, height = pil_image.size
  if width * height > max_pixels:
    raise UserError(f'{name} has {width}x{height} pixels, more than the {max_pixels} allowed: scale it down first')
  if width * height == 0:
    raise UserError(f'{name} has no pixels ({width}x{height}): replace the file or take it out')
  return pil_image


def _orientation(pil_image: Image.Image) -> int:
  """The orientation 1-8 of an opened image; 1 where its EXIF cannot be read."""
  try:
    orientation = pil_image.getexif().get(image_files.ORIENTATION)
  except Exception:
    return image_files.orientation(pil_image.info.get('exif', b''))
  return int(orientation) if orientation in range(1, 9) else 1


def _turned(image: np.ndarray, orientation: int) -> np.ndarray:
  across = image.swapaxes(0, 1) if orientation >= 5 else image
  flips = {2: np.s_[:, ::-1], 3: np.s_[::-1, ::-1], 4: np.s_[::-1],
           6: np.s_[:, ::-1], 7: np.s_[::-1, ::-1], 8: np.s_[::-1]}
  return np.ascontiguousarray(across[flips.get(orientation, ...)])


def _scale_transparency(pil_image: ImageFile.ImageFile) -> None:
  """The transparent colour of a PNG in 8 bits, as its pixels; Pillow keeps it in those of the file."""
  if 'transparency' not in pil_image.info or not pil_image.tile:
    return
  colour, bits = pil_image.info['transparency'], pil_image.tile[0].args
  if bits in ('L;2', 'L;4'):
    pil_image.info['transparency'] = colour * {'L;2': 85, 'L;4': 17}[bits]
  elif bits == 'RGB;16B':
    pil_image.info['transparency'] = tuple(value >> 8 for value in colour)


def _from_array(array: np.ndarray) -> np.ndarray:
  if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)):
    raise UserError(f'an image array is {array.dtype} {list(array.shape)}: '
                     'wanted uint8 [y x], [y x 1], [y x 3] or [y x 4] (RGB, alpha last)')
  if array.size == 0:
    raise UserError(f'an image array has no pixels: its shape is {list(array.shape)}')
  if array.ndim == 3 and array.shape[-1] == 3:
    return array
  return _to_rgb(Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array))


def _to_rgb(pil_image: Image.Image) -> np.ndarray:
  if pil_image.mode.startswith('I'):  # 16-bit grey; Pillow's own conversion would clip it at 255
    values = np.asarray(pil_image).astype(np.uint32)
    grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
    grey[values == pil_image.info.get('transparency', -1)] = 255
    return np.repeat(grey[..., None], 3, axis=-1)
  if pil_image.has_transparency_data:
    pil_image = pil_image.convert('RGBA')
    pil_image = Image.alpha_composite(Image.new('RGBA', pil_image.size, 'white'), pil_image)
  return np.array(pil_image.convert('RGB'))


def to_float(images):
  """uint8 -> f32 in [-1, 1], the range of the autoencoder; numpy or jax arrays of any shape."""
  return images.astype(np.float32) / 127.5 - 1.0


def to_uint8(images):
  """[-1, 1] -> uint8, clipped and rounded; numpy or jax arrays of any shape."""
  return ((images.astype(np.float32) + 1.0) * 127.5).clip(0, 255).round().astype(np.uint8)


def resize_cover(image: np.ndarray, width: int, height: int) -> np.ndarray:
  """Scaled (antialiased) to cover width x height pixels and cut at the centre: uint8 [height width 3]."""
  return np.asarray(ImageOps.fit(Image.fromarray(image), (width, height), Image.Resampling.BICUBIC))


def canvases(references, count: int, height: int, width: int, unit: int) -> tuple[np.ndarray, np.ndarray]:
  """References on canvases of the size of a target, for clean latents: (uint8 [count height width 3], mask).

  Each is scaled to the largest size that fits, to the nearest whole patches of `unit` pixels, cut at the centre where
  these have other proportions and never stretched. It lies in the centre, and its edge goes on around it. The mask
  [count height/unit width/unit] marks the patches that it covers, and none of the canvases without a reference.
  """
  images, mask = np.zeros((count, height, width, 3), np.uint8), np.zeros((count, height // unit, width // unit), bool)
  for canvas, covered, image in zip(images, mask, references):
    scale = min(height / image.shape[0], width / image.shape[1])
    rows, columns = (max(1, round(side * scale / unit)) for side in image.shape[:2])
    top, left = (covered.shape[0] - rows) // 2, (covered.shape[1] - columns) // 2
    covered[top:top + rows, left:left + columns] = True
    below, right = (height // unit - top - rows) * unit, (width // unit - left - columns) * unit
    canvas[:] = np.pad(resize_cover(image, columns * unit, rows * unit),
                       ((top * unit, below), (left * unit, right), (0, 0)), mode='edge')
  return images, mask


def region(mask, image: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
  """(image uint8 [height width 3], where it may change bool [height width]): where the mask is white.

  Both as `resize_cover` has them. UserError unless the mask is as large as the image and white somewhere.
  """
  found = read(mask)
  if found.shape != image.shape:
    raise UserError(f'{clipped(str(mask))} is {found.shape[1]}x{found.shape[0]} and the first reference '
                    f'{image.shape[1]}x{image.shape[0]}: give a mask as large as it, white where it may change')
  changes = resize_cover(found, width, height).min(axis=2) >= 128
  if not changes.any():
    raise UserError(f'{clipped(str(mask))} is white nowhere: nothing may change; make it white where the image may')
  return resize_cover(image, width, height), changes


def tile_grid(height: int, width: int, tile: int, max_tiles: int) -> tuple[int, int]:
  """(columns, rows) of tiles for an image: the closest aspect ratio of columns * rows <= max_tiles.

  Among equally close grids the larger one wins if the image has more than half as many pixels as it.
  """
  grids = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles + 1) if c * r <= max_tiles]
  grids.sort(key=lambda grid: grid[0] * grid[1])
  best, best_error = (1, 1), float('inf')
  for columns, rows in grids:
    error = abs(width / height - columns / rows)
    roomy = width * height > 0.5 * tile * tile * columns * rows
    if error < best_error or (error == best_error and roomy):
      best, best_error = (columns, rows), error
  return best


def tiles(image: np.ndarray, tile: int, max_tiles: int) -> np.ndarray:
  """The image as uint8 tiles [r tile tile 3], row by row; a thumbnail follows when there is more than one."""
  height, width = image.shape[:2]
  columns, rows = tile_grid(height, width, tile, max_tiles)
  stretched = _stretch(image, columns * tile, rows * tile)
  cut = stretched.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(rows * columns, tile, tile, 3)
  return np.concatenate([cut, _stretch(image, tile, tile)[None]]) if rows * columns > 1 else cut


def _stretch(image: np.ndarray, width: int, height: int) -> np.ndarray:
  return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def stitch(images) -> np.ndarray:
  """One image uint8 [y x 3] of several side by side, each scaled to the height of the tallest."""
  height = max(image.shape[0] for image in images)
  widths = [max(1, round(image.shape[1] * height / image.shape[0])) for image in images]
  return np.concatenate([_stretch(image, width, height) for image, width in zip(images, widths)], axis=1)


def png_bytes(image: np.ndarray, metadata: dict[str, str] | None = None) -> bytes:
  """The image as a PNG, with `metadata` as text entries: in Latin-1 (tEXt), which all tools read, or UTF-8 (iTXt)."""
  text = PngImagePlugin.PngInfo()
  for key, value in (metadata or {}).items():
    text.add_text(key, value)
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'PNG', pnginfo=text)
  return file.getvalue()


def encoded(image: np.ndarray, encoding: str, quality: int) -> bytes:
  """The image in one of ENCODINGS. JPEG keeps all colours (4:4:4); WebP of quality 100, and PNG, lose nothing."""
  options = dict(jpeg=dict(quality=quality, subsampling=0), png={},
                 webp=dict(quality=quality, lossless=quality == 100, method=4))[encoding]
  file = io.BytesIO()
  Image.fromarray(image).save(file, encoding, **options)
  return file.getvalue()


def write_png(path, image: np.ndarray, metadata: dict[str, str] | None = None) -> None:
  """Writes the image [y x 3] to a PNG file, whole or not at all; missing folders are created.

  Raises:
    UserError: when the file system does not take it.
  """
  write_bytes(path, png_bytes(image, metadata))


def write_bytes(path, data: bytes) -> None:
  """Writes an encoded image to a file; as `write_png`."""
  path = pathlib.Path(path)
  with _partial(path, data) as partial:
    os.replace(partial, path)


def write_new_png(folder: pathlib.Path, number: int, image: np.ndarray,
                  metadata: dict[str, str] | None = None) -> pathlib.Path:
  """Writes the image to NUMBER.png, or the first number after it that is free; as `write_png`.

  Nothing is overwritten, whoever else writes into the folder.
  """
  with _partial(folder / f'{number:03d}.png', png_bytes(image, metadata)) as partial:
    paths = (folder / f'{i:03d}.png' for i in itertools.count(number))
    return next(path for path in paths if _put_if_free(partial, path))


def check_writable(folder: pathlib.Path) -> None:
  """UserError if images cannot be written into the folder, which is created."""
  with _partial(folder / 'image', b''):
    pass


@contextlib.contextmanager
def _partial(path: pathlib.Path, data: bytes):
  """A file of the data beside `path`, for as long as the context lasts. UserError for an OSError in it."""
  partial = path.with_name(f'.{path.name}.{secrets.token_hex(4)}')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(data)
    yield partial
  except OSError as error:
    raise UserError(f'{path} cannot be written ({error.strerror}): make room, or give another --workdir') from error
  finally:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)


def _put_if_free(partial: pathlib.Path, path: pathlib.Path) -> bool:
  """Gives the file `partial` the name `path` too, unless something has it."""
  try:
    os.link(partial, path)
  except FileExistsError:
    return False
  except OSError:  # a file system without links
    try:
      os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
      return False
    os.replace(partial, path)
  return True


def grid(rows, captions=None, titles=None, cell: int = 256, pad: int = 8) -> np.ndarray:
  """A sheet of many images, uint8 [y x 3].

  rows: lists of images [y x 3], None for an empty place; they may differ in size and shape.
  captions: like rows, text (or '') under each image. titles: one text over each column.
  Every image is enlarged by the same whole number, so that none is wider or higher than `cell` pixels and small
  ones stay crisp; images larger than `cell` are scaled down to it.
  """
  captions = captions or [[''] * len(row) for row in rows]
  shapes = [(len(row), len(texts)) for row, texts in zip(rows, captions, strict=True)]
  if not any(image is not None for row in rows for image in row) or any(a != b for a, b in shapes):
    raise UserError('a grid wants at least one image and as many captions as images: '
                     f'each row has (images, captions) {shapes}')
  factor = max(1, cell // max(max(image.shape[:2]) for row in rows for image in row if image is not None))
  rows = [[None if image is None else _enlarged(image, factor, cell) for image in row] for row in rows]
  columns = max(len(row) for row in rows)
  widths = [max([image.shape[1] for row in rows for image in row[c:c + 1] if image is not None] + [48])
            for c in range(columns)]
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


def wrapped_grid(groups, captions, cell: int = 256, aspect: float = 1.6) -> np.ndarray:
  """`grid` of groups of images that stay side by side, as many to a row as bring the sheet near `aspect`, x / y.

  Pairs have a gap between them; groups of three and more have a row each.

  groups: lists of images [y x 3].  captions: like groups.
  """
  height = max(image.shape[0] for group in groups for image in group)
  width = max(image.shape[1] for group in groups for image in group)
  factor, font = max(1, cell // max(height, width)), ImageFont.load_default(size=13)
  width, height = (min(side * factor, cell) for side in (width, height))
  lines = [max(_label(text, width, font).shape[0] for text in texts) for texts in captions]
  height, columns = height + sum(lines) / len(lines), max(map(len, groups))

  def cost(n):  # the wrong aspect and the empty places
    rows = -(-len(groups) // n)
    return abs(math.log(n * columns * width / (rows * height) / aspect)) + math.log(rows * n / len(groups))

  n = 1 if columns > 2 else min(range(1, len(groups) + 1), key=cost)
  gap = columns > 1
  rows = [[sum(([empty] * gap + part for part in parts[i + 1:i + n]), parts[i]) for i in range(0, len(parts), n)]
          for parts, empty in ((groups, None), (captions, ''))]
  return grid(*rows, cell=cell)


def shrunk(image: np.ndarray, cell: int) -> np.ndarray:
  """The image, scaled down where it is wider or higher than `cell` pixels."""
  y, x = image.shape[:2]
  scale = cell / max(y, x)
  return image if scale >= 1 else _stretch(image, max(1, round(x * scale)), max(1, round(y * scale)))


def _enlarged(image: np.ndarray, factor: int, cell: int) -> np.ndarray:
  return shrunk(image, cell) if max(image.shape[:2]) > cell else image.repeat(factor, axis=0).repeat(factor, axis=1)


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
  pil_image = Image.new('RGB', (width, max(1, line_height * len(lines))), 'white')
  draw = ImageDraw.Draw(pil_image)
  for i, line in enumerate(lines):
    draw.text((0, i * line_height), line, fill='black', font=font)
  return np.asarray(pil_image)


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
