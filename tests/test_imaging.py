"""Reading images of every kind, refusing the rest, tiling as the public processor does, and sample grids."""

import io
import struct
import zlib

import jax.numpy as jnp
import numpy as np
from PIL import features, Image
import pytest

from unifusion_jax.data import imaging
from unifusion_jax.errors import UserError

# Four colours in quarters survive JPEG, palettes and turns.
QUARTERS = np.zeros((24, 32, 3), np.uint8)
QUARTERS[:12, :16], QUARTERS[:12, 16:] = (220, 40, 40), (40, 150, 60)
QUARTERS[12:, :16], QUARTERS[12:, 16:] = (40, 70, 210), (250, 220, 30)


def encoded(pil_image, kind, **options) -> bytes:
  file = io.BytesIO()
  pil_image.save(file, kind, **options)
  return file.getvalue()


def centres(image):
  """The colours in the middle of the four quarters, [4 3]."""
  y, x = image.shape[:2]
  return np.array([image[y * j // 4, x * i // 4] for j in (1, 3) for i in (1, 3)], int)


@pytest.mark.parametrize('kind, options, tolerance', [
    ('PNG', {}, 0), ('JPEG', {'quality': 95}, 8), ('WEBP', {'lossless': True}, 0), ('WEBP', {'quality': 95}, 12)])
def test_formats(tmp_path, kind, options, tolerance):
  data = encoded(Image.fromarray(QUARTERS), kind, **options)
  path = tmp_path / 'image'
  path.write_bytes(data)
  for source in (data, path, str(path)):
    image = imaging.read(source)
    assert image.dtype == np.uint8 and image.shape == QUARTERS.shape
    assert np.abs(centres(image) - centres(QUARTERS)).max() <= tolerance
    assert imaging.read_size(source) == QUARTERS.shape[:2]


@pytest.mark.parametrize('mode, kind', [
    ('P', 'PNG'), ('P', 'GIF'), ('CMYK', 'JPEG'), ('RGBA', 'PNG'), ('RGBA', 'WEBP')])
def test_modes(mode, kind):
  options = {'lossless': True} if kind == 'WEBP' else {'quality': 95} if kind == 'JPEG' else {}
  pil_image = Image.fromarray(QUARTERS)
  pil_image = pil_image.quantize(4) if mode == 'P' else pil_image.convert(mode)
  image = imaging.read(encoded(pil_image, kind, **options))
  assert np.abs(centres(image) - centres(QUARTERS)).max() <= 8


def test_grey():
  grey = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
  image = imaging.read(encoded(Image.fromarray(grey), 'PNG'))
  np.testing.assert_array_equal(image, np.repeat(grey[..., None], 3, -1))
  bits = imaging.read(encoded(Image.fromarray(grey > 100), 'PNG'))
  np.testing.assert_array_equal(bits[..., 0], np.where(grey > 100, 255, 0))


def test_alpha_is_laid_on_white():
  rgba = np.zeros((2, 3, 4), np.uint8)
  rgba[:, 1] = (255, 0, 0, 255)
  rgba[:, 2] = (255, 0, 0, 128)
  for kind, options in (('PNG', {}), ('WEBP', {'lossless': True, 'exact': True})):
    image = imaging.read(encoded(Image.fromarray(rgba), kind, **options))
    np.testing.assert_array_equal(image[0], [[255, 255, 255], [255, 0, 0], [255, 127, 127]])
  grey = imaging.read(encoded(Image.fromarray(rgba).convert('LA'), 'PNG'))
  np.testing.assert_array_equal(grey[0, 0], [255, 255, 255])
  np.testing.assert_array_equal(imaging.read(rgba)[0, 0], [255, 255, 255])


def test_palette_transparency():
  pil_image = Image.fromarray(QUARTERS).quantize(4)
  hidden = int(np.asarray(pil_image)[0, 0])
  image = imaging.read(encoded(pil_image, 'PNG', transparency=hidden))
  np.testing.assert_array_equal(image[0, 0], [255, 255, 255])
  np.testing.assert_array_equal(image[-1, -1], QUARTERS[-1, -1])


def test_sixteen_bits_are_scaled():
  values = np.array([[0, 257, 32768, 65535]], np.uint16)
  image = imaging.read(encoded(Image.fromarray(values), 'PNG'))
  np.testing.assert_array_equal(image[0, :, 0], [0, 1, 128, 255])


def chunk(name: bytes, body: bytes) -> bytes:
  return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))


def png(rows: np.ndarray, width: int, bits: int, colours: int, *chunks: bytes) -> bytes:
  """A PNG of packed rows uint8 [y n], of kinds that Pillow cannot write. colours: the colour type of the format."""
  head = struct.pack('>IIBBBBB', width, len(rows), bits, colours, 0, 0, 0)
  pixels = zlib.compress(b''.join(b'\0' + bytes(row) for row in rows))
  return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + b''.join(chunks) + chunk(b'IDAT', pixels) + chunk(b'IEND', b''))


def sixteen_bit_rgb(values: np.ndarray) -> bytes:
  """A PNG of uint16 [y x 3]."""
  return png(values.astype('>u2').reshape(len(values), -1).view(np.uint8), values.shape[1], 16, 2)


def test_sixteen_bit_colours():
  values = (QUARTERS.astype(np.uint16) * 257)
  np.testing.assert_array_equal(imaging.read(sixteen_bit_rgb(values)), QUARTERS)


WHITE, BLACK = (255, 255, 255), (0, 0, 0)


@pytest.mark.parametrize('bits, colours, row, transparent, wanted', [
    (1, 0, '40', '0001', [BLACK, WHITE, BLACK, BLACK]),
    (2, 0, '1b', '0002', [BLACK, (85,) * 3, WHITE, WHITE]),
    (4, 0, '07f0', '0007', [BLACK, WHITE, WHITE, BLACK]),
    (8, 0, '0010ff20', '0010', [BLACK, WHITE, WHITE, (32,) * 3]),
    (16, 0, '1234567812350000', '1234', [WHITE, (86,) * 3, (18,) * 3, BLACK]),
    (8, 2, '102030102031000000ffffff', '001000200030', [WHITE, (16, 32, 49), BLACK, WHITE]),
    (16, 2, '123456789abc' + 'ffff00008000' + '0' * 24, '123456789abc', [WHITE, (255, 0, 128), BLACK, BLACK]),
    (16, 4, '1234000080800000' + '0000ffff' + 'ffffffff', '', [WHITE, WHITE, BLACK, WHITE]),
    (16, 6, '1234123412340000' + '800000000000ffff' + '0000' * 3 + '8080' + '0' * 16, '',
     [WHITE, (128, 0, 0), (127,) * 3, WHITE])])
def test_transparency_of_every_depth_is_white(bits, colours, row, transparent, wanted):
  chunks = [chunk(b'tRNS', bytes.fromhex(transparent))] if transparent else []
  image = imaging.read(png([bytes.fromhex(row)], 4, bits, colours, *chunks))
  np.testing.assert_array_equal(image, [wanted])


def test_phone_photos_of_several_images_give_the_first():
  more = [Image.new('RGB', (32, 24))]
  data = encoded(Image.fromarray(QUARTERS), 'MPO', save_all=True, append_images=more, quality=95)
  assert Image.open(io.BytesIO(data)).format == 'MPO'
  assert np.abs(centres(imaging.read(data)) - centres(QUARTERS)).max() <= 8
  grey = encoded(Image.fromarray(QUARTERS).convert('L'), 'JPEG', progressive=True, quality=95)
  assert np.ptp(imaging.read(grey), axis=-1).max() == 0


def exif(entries, order='<') -> bytes:
  """EXIF of (tag, type, count, four bytes) entries."""
  head = (b'II*\0' if order == '<' else b'MM\0*') + struct.pack(f'{order}IH', 8, len(entries))
  return b'Exif\0\0' + head + b''.join(struct.pack(f'{order}HHI', *e[:3]) + e[3] for e in entries) + bytes(4)


ODD_TAGS = [(0x010e, 5, 1, bytes(4)), (0x0131, 12, 1, b'\xff' * 4), (0x0132, 12, 1, bytes(4)), (0x011a, 2, 4, b'text'),
            (0x0213, 4, 1, b'\xff' * 4), (0x8769, 4, 1, b'\xff' * 4), (0x8825, 2, 4, b'text'), (0x9003, 0, 0, bytes(4)),
            (0xffff, 99, 2 ** 32 - 1, b'\xff' * 4)]


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP'])
@pytest.mark.parametrize('odd', ODD_TAGS)
def test_odd_tags_hide_no_turn(kind, odd, recwarn):
  wanted = QUARTERS.swapaxes(0, 1)[:, ::-1]
  for order in '<>':
    for long in (False, True):
      value = struct.pack(f'{order}I' if long else f'{order}HH', *((6,) if long else (6, 0)))
      tags = sorted([odd, (0x0112, 4 if long else 3, 1, value)])
      options = {} if kind == 'PNG' else dict(quality=95)
      data = encoded(Image.fromarray(QUARTERS), kind, exif=exif(tags, order), **options)
      assert imaging.read_size(data) == (32, 24)
      assert np.abs(centres(imaging.read(data)) - centres(wanted)).max() <= 8
  assert not recwarn.list


def test_exif_that_cannot_be_read_turns_nothing():
  six = (0x0112, 3, 1, struct.pack('<HH', 6, 0))
  whole = exif([six])
  for broken in (whole[:20], whole.replace(b'II', b'XX'), exif([six[:3] + (struct.pack('<HH', 9, 0),)]),
                 exif([(0x0112, 2, 4, b'six\0')]), b'Exif\0\0', b'Exif\0\0II*\0\xff\xff\xff\xff\xff\xff'):
    data = encoded(Image.fromarray(QUARTERS), 'JPEG', exif=broken, quality=95)
    assert imaging.read(data).shape == QUARTERS.shape and imaging.read_size(data) == QUARTERS.shape[:2]


def test_an_odd_pillow_image_is_turned_too():
  data = encoded(Image.fromarray(QUARTERS), 'JPEG', exif=exif([(0x0112, 3, 1, struct.pack('<HH', 6, 0)), ODD_TAGS[2]]))
  assert imaging.read(Image.open(io.BytesIO(data))).shape == (32, 24, 3)


def test_avif():
  known = features.check('avif')
  assert ('AVIF' in imaging.FORMATS) == ('AVIF' in imaging.WANTED) == known
  for orientation, turned in ((1, QUARTERS), (6, QUARTERS.swapaxes(0, 1)[:, ::-1])) if known else ():
    tags = Image.Exif()
    tags[0x0112], tags[0x0132] = orientation, 'a date'
    data = bytearray(encoded(Image.fromarray(QUARTERS), 'AVIF', exif=tags, quality=95))
    data[data.index(b'MM\0*') + 13] = 12  # the date's type: now a double
    assert imaging.read_size(data) == turned.shape[:2]
    assert np.abs(centres(imaging.read(data)) - centres(turned)).max() <= 12


def test_texts_and_profiles_of_any_length_are_not_read():
  """As programs that generate images write them: whole workflows, or a profile that unpacks to megabytes."""
  long = zlib.compress(b' ' * 2 ** 22)
  chunks = [chunk(b'zTXt', b'workflow\0\0' + long), chunk(b'iTXt', b'prompt\0\1\0\0\0' + long),
            chunk(b'iCCP', b'profile\0\0' + long), chunk(b'tEXt', b'x\0' + b' ' * 2 ** 21),
            chunk(b'iTXt', b'\xff' * 10), chunk(b'zTXt', b''), chunk(b'sRGB', b'\0' * 50)]
  rows = QUARTERS.reshape(24, -1)
  data = png(rows, 32, 8, 2, *chunks)
  damaged = bytearray(data)
  damaged[data.index(b'workflow') + 30] ^= 0xff  # the checksum of a text is none of the pixels' business
  for source in (data, bytes(damaged), data[:-12] + b''.join(chunks) + data[-12:]):
    np.testing.assert_array_equal(imaging.read(source), QUARTERS)
    assert imaging.read_size(source) == (24, 32)
  jpeg = encoded(Image.fromarray(QUARTERS), 'JPEG', icc_profile=b'x' * 200_000, comment=b'y' * 60_000, quality=95)
  assert np.abs(centres(imaging.read(jpeg)) - centres(QUARTERS)).max() <= 8


@pytest.mark.parametrize('name, text', [
    (b'tEXt', b'Raw profile type exif\0\nexif\n      32\n%s\n'),
    (b'iTXt', b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>')])
def test_a_turn_that_a_text_of_a_png_holds(name, text):
  tags = exif([(0x0112, 3, 1, struct.pack('<HH', 6, 0))])
  data = png(QUARTERS.reshape(24, -1), 32, 8, 2, chunk(name, text.replace(b'%s', tags.hex().encode())))
  assert imaging.read(data).shape == (32, 24, 3) and imaging.read_size(data) == (32, 24)


def test_padding_between_the_segments_of_a_jpeg():
  data = encoded(Image.fromarray(QUARTERS), 'JPEG', exif=exif([(0x0112, 3, 1, struct.pack('<HH', 6, 0))]), quality=95)
  padded = data[:2] + b'\xff\xff' + data[2:]
  assert imaging.read(padded).shape == (32, 24, 3) and imaging.read_size(padded) == (32, 24)


def test_a_damaged_file_is_an_image_or_one_sentence():
  """benchmarks/fuzz.py tries more."""
  rng = np.random.default_rng(0)
  for kind in imaging.FORMATS:
    data = encoded(Image.fromarray(QUARTERS), kind)
    for _ in range(60):
      changed = bytearray(data)
      changed[rng.integers(len(data))] = rng.integers(256)
      for read in (imaging.read, imaging.read_size):
        try:
          read(changed)
        except UserError as error:
          assert len(str(error)) < 500


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP'])
@pytest.mark.parametrize('orientation, turned', [
    (1, QUARTERS), (2, QUARTERS[:, ::-1]), (3, QUARTERS[::-1, ::-1]), (4, QUARTERS[::-1]),
    (5, QUARTERS.swapaxes(0, 1)),
    (6, QUARTERS.swapaxes(0, 1)[:, ::-1]),
    (7, QUARTERS.swapaxes(0, 1)[::-1, ::-1]), (8, QUARTERS.swapaxes(0, 1)[::-1])])
def test_exif_turn(kind, orientation, turned):
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = encoded(Image.fromarray(QUARTERS), kind, exif=exif, **({} if kind == 'PNG' else dict(quality=95)))
  image = imaging.read(data)
  assert image.shape == turned.shape and imaging.read_size(data) == turned.shape[:2]
  assert np.abs(centres(image) - centres(turned)).max() <= 8


@pytest.mark.parametrize('kind', ['GIF', 'WEBP', 'PNG'])
def test_animation_gives_the_first_frame(kind):
  frames = [Image.fromarray(QUARTERS), Image.new('RGB', (32, 24), 'black')]
  options = {'lossless': True} if kind == 'WEBP' else {}
  data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
  assert np.abs(centres(imaging.read(data)) - centres(QUARTERS)).max() <= 8


@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'WEBP', 'GIF'])
@pytest.mark.parametrize('share', [0.1, 0.5, 0.9])
def test_truncated(tmp_path, kind, share):
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  data = encoded(Image.fromarray(noise), kind)
  path = tmp_path / 'cut.bin'
  path.write_bytes(data[:int(len(data) * share)])
  with pytest.raises(ValueError, match='cut.bin'):
    imaging.read(path)


def test_damaged_in_the_middle():
  data = bytearray(encoded(Image.fromarray(QUARTERS), 'PNG'))
  data[-30:-20] = b'\0' * 10
  with pytest.raises(ValueError, match='damaged'):
    imaging.read(bytes(data))


def test_refused_files(tmp_path):
  (tmp_path / 'empty.png').write_bytes(b'')
  (tmp_path / 'text.png').write_text('this is no image')
  for name, words in (('empty.png', 'is empty'), ('text.png', 'not an image'), ('gone.png', 'not there')):
    for read in (imaging.read, imaging.read_size):
      with pytest.raises(ValueError, match=f'{name}.*{words}'):
        read(tmp_path / name)
  with pytest.raises(ValueError, match='empty'):
    imaging.read(b'')
  (tmp_path / 'loop.png').symlink_to('loop.png')
  refused = (('', 'a folder or a device'), ('n' * 300, 'File name too long'), ('a\0b', 'null'),
             ('\ud800', 'surrogates'), ('loop.png', 'symbolic links'), ('text.png/a.png', 'Not a directory'))
  for name, words in refused:
    for read in (imaging.read, imaging.read_size):
      with pytest.raises(ValueError, match=words) as error:
        read(f'{tmp_path}/{name}')
      assert len(str(error.value).encode()) < 600
  with open(tmp_path / 'long.png', 'wb') as file:
    file.truncate(imaging.MAX_BYTES + 1)
  with pytest.raises(ValueError, match='more than the .* allowed'):
    imaging.read(tmp_path / 'long.png')


def test_too_many_pixels():
  data = encoded(Image.new('1', (400, 300)), 'PNG')
  assert imaging.read(data, max_pixels=120_000).shape == (300, 400, 3)
  with pytest.raises(ValueError, match='400x300 pixels, more than the 119999'):
    imaging.read(data, max_pixels=119_999)
  # A header that promises 60000 x 60000 pixels, with next to nothing behind it.
  bomb = bytearray(sixteen_bit_rgb(np.zeros((1, 1, 3), np.uint16)))
  bomb[16:24] = struct.pack('>II', 60000, 60000)
  bomb[29:33] = struct.pack('>I', zlib.crc32(bytes(bomb[12:29])))
  with pytest.raises(ValueError, match='more than'):
    imaging.read(bytes(bomb))


def test_zero_size():
  png = bytearray(sixteen_bit_rgb(np.zeros((1, 1, 3), np.uint16)))
  png[16:24] = struct.pack('>II', 0, 5)
  png[29:33] = struct.pack('>I', zlib.crc32(bytes(png[12:29])))
  with pytest.raises(ValueError):
    imaging.read(bytes(png))
  with pytest.raises(ValueError, match='no pixels'):
    imaging.read(np.zeros((0, 4, 3), np.uint8))


def test_arrays():
  assert imaging.read(QUARTERS) is QUARTERS
  assert imaging.read(QUARTERS[..., 0]).shape == QUARTERS.shape
  assert imaging.read(QUARTERS[..., :1]).shape == QUARTERS.shape
  for bad in (QUARTERS.astype(np.float32), QUARTERS[None], QUARTERS[..., :2]):
    with pytest.raises(ValueError, match='wanted uint8'):
      imaging.read(bad)


def test_resize_cover():
  same = imaging.resize_cover(QUARTERS, 32, 24)
  np.testing.assert_array_equal(same, QUARTERS)
  for width, height in ((16, 12), (64, 16), (10, 40), (33, 33)):
    image = imaging.resize_cover(QUARTERS, width, height)
    assert image.shape == (height, width, 3) and image.dtype == np.uint8
    assert np.abs(centres(image) - centres(QUARTERS)).max() <= 8  # the cut is at the centre
  stripes = np.zeros((64, 64, 3), np.uint8)
  stripes[:, ::2] = 255
  assert np.abs(imaging.resize_cover(stripes, 8, 8).astype(int) - 128).max() < 8  # antialiased
  ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
  assert imaging.resize_cover(np.ascontiguousarray(ramp), 50, 50)[:, :, 0].min() >= 50 - 2  # nothing is squeezed


def test_tiles_match_the_public_processor():
  from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
  rng = np.random.default_rng(0)
  sizes = [(64, 64), (48, 80), (80, 48), (1, 1), (7, 100), (300, 20), (32, 96), (100, 100), (128, 64)]
  sizes += [tuple(rng.integers(1, 200, 2)) for _ in range(40)]
  for n, (y, x) in enumerate(sizes):
    for tile, most in ((32, 12), (48, 4), (32, 1), (32, 6))[n % 2::2]:
      small = rng.integers(0, 256, (1 + y // 8, 1 + x // 8, 3), np.uint8)
      image = np.asarray(Image.fromarray(small).resize((x, y)))
      processor = GotOcr2ImageProcessorPil(
          size={'height': tile, 'width': tile}, crop_to_patches=True, min_patches=1, max_patches=most,
          do_normalize=False, do_rescale=False)
      theirs = np.stack(processor(Image.fromarray(image), return_tensors='np')['pixel_values']).transpose(0, 2, 3, 1)
      ours = imaging.tiles(image, tile, most)
      assert ours.dtype == np.uint8 and ours.shape == theirs.shape, (y, x, tile, most)
      np.testing.assert_array_equal(ours, theirs)


def test_tile_grid():
  assert imaging.tile_grid(60, 180, 64, 12) == (3, 1)
  assert imaging.tile_grid(640, 640, 64, 12) == (3, 3)  # large enough for the larger of the square grids
  assert imaging.tile_grid(64, 64, 64, 12) == (1, 1)
  assert imaging.tiles(np.zeros((60, 180, 3), np.uint8), 64, 12).shape == (4, 64, 64, 3)  # and the whole


@pytest.mark.parametrize('array', [np.asarray, jnp.asarray])
def test_floats_and_back(array):
  every = np.arange(256, dtype=np.uint8)
  floats = imaging.to_float(array(every))
  assert floats.dtype == np.float32 and floats[0] == -1 and floats[255] == 1
  np.testing.assert_allclose(floats, every / 127.5 - 1, atol=1e-6)
  np.testing.assert_array_equal(imaging.to_uint8(floats), every)
  rounded = imaging.to_uint8(array(np.array([-3.0, -1.004, -0.997, -0.995, 0.999, 1.5], np.float32)))
  assert rounded.dtype == np.uint8
  np.testing.assert_array_equal(rounded, [0, 0, 0, 1, 255, 255])
  assert imaging.to_uint8(array(np.ones(3, np.float32)).astype('bfloat16'))[0] == 255


def test_write_png(tmp_path):
  path = tmp_path / 'deep' / 'image.png'
  imaging.write_png(path, QUARTERS, {'prompt': 'ein roter Stern ★', 'seed': '3'})
  pil_image = Image.open(path)
  np.testing.assert_array_equal(np.asarray(pil_image), QUARTERS)
  assert pil_image.text == {'prompt': 'ein roter Stern ★', 'seed': '3'}
  assert [p.name for p in path.parent.iterdir()] == ['image.png']


def test_grid():
  small, wide = np.full((64, 64, 3), 7, np.uint8), QUARTERS
  small[10, 20] = (200, 0, 0)
  sheet = imaging.grid([[small, wide], [None, small]], captions=[['a red star ' * 12, ''], ['', 'x' * 200]],
                      titles=['first', 'second'])
  assert sheet.dtype == np.uint8 and sheet.shape[1] == 3 * 8 + 2 * 256
  marks = np.argwhere((sheet == (200, 0, 0)).all(-1))
  assert len(marks) == 2 * 4 * 4  # the marked pixel is a crisp square of four by four, in both copies
  bare = imaging.grid([[small]], cell=64)
  np.testing.assert_array_equal(bare[8:72, 8:72], small)
  assert imaging.grid([[small]], captions=[['some text']], cell=64).shape[0] > bare.shape[0]
  assert imaging.grid([[np.zeros((500, 1000, 3), np.uint8)]], cell=100).shape == (8 + 50 + 8, 116, 3)
  for rows, captions in (([[None]], None), ([[small]], [[]]), ([], None)):
    with pytest.raises(ValueError, match='at least one image'):
      imaging.grid(rows, captions)
