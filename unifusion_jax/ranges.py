"""Ranges of numeric settings, and the sentence for a value outside its range.

  ranges.problems(self, 'train.', steps=Range(1), max_loss_ratio=Range(above=1), ema=Range(0, below=1))
"""

import dataclasses
import math
import numbers


@dataclasses.dataclass(frozen=True)
class Range:
  """Numbers from `least` to `most`, or strictly above `above` and below `below`.

  nan lies in no range, and an infinity in none either.
  """
  least: float = -math.inf
  most: float = math.inf
  above: float = -math.inf
  below: float = math.inf

  def __contains__(self, value: float) -> bool:
    if not isinstance(value, numbers.Real):  # out of a config.json
      return False
    finite = isinstance(value, int) or math.isfinite(value)  # a whole number may be too large for a float
    return finite and self.least <= value <= self.most and self.above < value < self.below

  def __str__(self) -> str:
    bounds = [f'above {_text(self.above)}'] * (self.above > -math.inf)
    if self.least > -math.inf and self.most < math.inf:
      bounds = [f'between {_text(self.least)} and {_text(self.most)}']
    elif self.least > -math.inf:
      bounds = [f'{_text(self.least)} or more']
    elif self.most < math.inf:
      bounds += [f'at most {_text(self.most)}']
    if self.below < math.inf:
      bounds += [f'below {_text(self.below)}']
    return ' and '.join(bounds) or 'a finite number'


def _text(bound: float) -> str:
  return f'{bound:,}' if isinstance(bound, int) else f'{bound:g}'


def problems(holder, prefix: str, **limits: Range) -> list[str]:
  """A sentence for each named field of `holder` whose value, or an item of whose tuple, is out of its range.

  None, of an optional setting, is in every range.
  """
  wrong = []
  for name, limit in limits.items():
    value = getattr(holder, name)
    if not all(item is None or item in limit for item in (value if isinstance(value, tuple) else (value,))):
      wrong.append(f'{prefix}{name}={value} must be {limit}')
  return wrong
