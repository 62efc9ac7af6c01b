"""Image files as Pillow is given them: the chunks and segments that pixels depend on, and the orientation.

EXIF, XMP, texts, profiles and thumbnails are dropped before Pillow sees them: it would refuse a sound photo for an odd
tag, or a long text. Whatever else is malformed is passed on as it is, for the decoder to judge.
"""

import io
import os
import re
import struct
import zlib

PNG = b'\x89PNG\r\n\x1a\n'
JPEG = b'\xff\xd8\xff'
AVIF = tuple(b'ftyp' + brand for brand in (b'avif', b'avis', b'mif1', b'msf1'))
ORIENTATION = 0x0112
_MAX_TEXT = 2 ** 20  # bytes of an unpacked text that may hold EXIF
_IFD = re.compile(rb'(II\*\0\x08\0\0\0|MM\0\*\0\0\0\x08)..', re.DOTALL)  # the head of EXIF with its number of tags


def pixels(file, whole: bool = True) -> tuple[io.IOBase, int]:
  """(what Pillow decodes, orientation 1-8) of an open binary file. That of WebP and AVIF is left to Pillow, as 1.

  whole: False leaves out the pixels of PNG and JPEG, where the size alone is wanted.
  """
  start = file.read(16)
  file.seek(0)
  if start.startswith(PNG):
    return _png(file, whole)
  if start.startswith(JPEG):
    return _jpeg(file, whole)
  if start[4:12] in AVIF:  # whose turn is no part of its EXIF; Pillow would write that anew, odd tags included
    return io.BytesIO(_IFD.sub(rb'\1\0\0', file.read())), 1
  return file, 1


def orientation(exif: bytes, xmp: bytes = b'') -> int:
  """The orientation 1-8 in EXIF, else in XMP; 1 where there is none that can be read."""
  found = _of_exif(exif)
  if found is None and (match := re.search(rb'tiff:Orientation(?:="|>)([1-8])', xmp)):
    found = int(match[1])
  return found if found and found in range(1, 9) else 1


def _of_exif(exif: bytes) -> int | None:
  tiff = bytes(exif).removeprefix(b'Exif\0\0')
  order = {b'II': '<', b'MM': '>'}.get(tiff[:2])
  try:
    start, = struct.unpack_from(f'{order}I', tiff, 4)
    count, = struct.unpack_from(f'{order}H', tiff, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
      tag, kind, _ = struct.unpack_from(f'{order}HHI', tiff, entry)
      if tag == ORIENTATION and kind in (1, 3, 4):
        return struct.unpack_from(order + {1: 'B', 3: 'H', 4: 'I'}[kind], tiff, entry + 8)[0]
  except struct.error:  # no EXIF, or cut short
    pass
  return None


def _png(file, whole: bool) -> tuple[io.BytesIO, int]:
  """Critical chunks and transparency."""
  kept, exif, xmp = [file.read(len(PNG))], b'', b''
  size = file.seek(0, os.SEEK_END)
  file.seek(len(PNG))
  while len(head := file.read(8)) == 8:
    length, name = struct.unpack('>I4s', head)
    left = size - file.tell()
    if length > left or name == b'tRNS' or not name[0] & 0x20 and (whole or name != b'IDAT'):
      kept += [head, file.read(min(length + 4, left))]
      if name == b'IEND':
        break
    elif name in (b'eXIf', b'iTXt', b'tEXt', b'zTXt'):
      body = file.read(length + 4)[:length]
      if name == b'eXIf':
        exif = body
      elif body.startswith(b'XML:com.adobe.xmp\0'):
        xmp = body
      elif body.startswith(b'Raw profile type exif\0') and not exif:
        exif = _raw_profile(body[22:], packed=name == b'zTXt')
    else:
      kept += [head] * (name == b'IDAT')  # where Pillow stops reading for the size
      file.seek(length + 4, os.SEEK_CUR)
  return io.BytesIO(b''.join(kept)), orientation(exif, xmp)


def _raw_profile(body: bytes, packed: bool) -> bytes:
  """EXIF that ImageMagick writes as hexadecimal text, after three lines of its own."""
  try:
    text = zlib.decompressobj().decompress(body[1:], _MAX_TEXT) if packed else body
    return bytes.fromhex(b''.join(text.split(b'\n')[3:]).decode('ascii'))
  except (zlib.error, ValueError):
    return b''


def _jpeg(file, whole: bool) -> tuple[io.BytesIO, int]:
  """All segments but those of applications and comments; JFIF (APP0) and Adobe's (APP14) say what the colours are."""
  kept, exif, xmp = [file.read(2)], b'', b''
  while True:
    marker = file.read(2)
    while marker == b'\xff\xff':  # padding
      marker = marker[:1] + file.read(1)
    kept.append(marker)
    if len(marker) < 2 or marker[0] != 0xff or not 0xc0 <= marker[1] or 0xd0 <= marker[1] < 0xda:
      break  # not a segment
    head = file.read(2)
    length = int.from_bytes(head) - 2
    body = file.read(max(length, 0))
    if marker[1] == 0xe1 and body.startswith(b'Exif\0\0') and not exif:
      exif = body
    elif marker[1] == 0xe1 and body.startswith(b'http://ns.adobe.com/xap/'):
      xmp = body
    if len(body) == length and (0xe1 <= marker[1] < 0xf0 and marker[1] != 0xee or marker[1] == 0xfe):
      kept.pop()
      continue
    kept += [head, body]
    if marker[1] == 0xda or len(body) < length:  # the scan follows, or nothing
      break
  return io.BytesIO(b''.join([*kept, file.read() if whole else b''])), orientation(exif, xmp)
