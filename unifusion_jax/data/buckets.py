"""Canvas sizes: one bucket for each aspect, all of about the same number of pixels."""

import math

import numpy as np

from unifusion_jax.errors import UserError

# Aspects of photographs: about 21:9, 16:9, 3:2, 4:3 and square, lying and standing. With a unit of size / 16 their
# canvases have from 15/16 of size^2 pixels to all of them; at size 1024 they are SDXL's (arXiv 2307.01952), 640 x 1536,
# 768 x 1344, 832 x 1216, 896 x 1152 and 1024 x 1024, and at other sizes they have the same proportions.
PHOTOGRAPHS = ('12:5', '7:4', '19:13', '9:7', '1:1', '7:9', '13:19', '4:7', '5:12')
AREA = 0.05  # weight of missing area against a wrong aspect, both as logarithms


def canvases(aspects: tuple[str, ...], size: int, unit: int = 1) -> tuple[tuple[int, int], ...]:
  """(height, width) for each aspect 'width:height': multiples of `unit`, at most size^2 pixels in all.

  At size 1024 and unit 16: 1:1 is 1024 x 1024, 5:3 is 768 x 1280, 16:9 is 768 x 1360.
  """
  return tuple(canvas(_ratio(aspect), size, unit) for aspect in aspects)


def nearest(sizes: tuple[tuple[int, int], ...], height: int, width: int) -> int:
  """The index of the canvas (height, width) whose aspect is closest to an image's."""
  wanted = math.log(width / height)
  return min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i][1] / sizes[i][0]) - wanted))


def _ratio(aspect: str) -> float:
  width, _, height = aspect.partition(':')
  if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
    raise UserError(f'data.aspects: the aspect {aspect!r} must be width:height in whole numbers, as in 16:9')
  return int(width) / int(height)


def canvas(ratio: float, size: int, unit: int) -> tuple[int, int]:
  """(height, width) of about the ratio width / height: multiples of `unit`, at most size^2 pixels in all."""
  most = size ** 2 // unit ** 2  # squares of unit x unit
  if not most:
    raise UserError(f'data.size={size}: no canvas of so few pixels has sides that are multiples of data.unit={unit}: '
                    'raise the size')
  heights = np.arange(1, most + 1)
  widths = np.clip(np.rint(heights * ratio), 1, most // heights)
  error = np.abs(np.log(widths / heights / ratio)) - AREA * np.log(widths * heights / most)
  best = int(np.argmin(error))
  return int(heights[best]) * unit, int(widths[best]) * unit
