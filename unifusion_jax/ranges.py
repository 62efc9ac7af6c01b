"""Ranges of numeric settings, and the sentence for a value outside its range.

  ranges.problems(self, 'train.', steps=Range(1), max_loss_ratio=Range(above=1), share=Range(0, 1))
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Range:
  """Numbers from `least` to `most`, or strictly above `above`. nan lies in no range, and an infinity in none either."""
  least: float = -math.inf
  most: float = math.inf
  above: float = -math.inf

  def __contains__(self, value: float) -> bool:
    finite = isinstance(value, int) or math.isfinite(value)  # a whole number may be too large for a float
    return finite and self.least <= value <= self.most and value > self.above

  def __str__(self) -> str:
    bounds = [f'above {self.above:g}'] * (self.above > -math.inf)
    if self.least > -math.inf and self.most < math.inf:
      bounds = [f'between {self.least:g} and {self.most:g}']
    elif self.least > -math.inf:
      bounds = [f'{self.least:g} or more']
    elif self.most < math.inf:
      bounds += [f'at most {self.most:g}']
    return ' and '.join(bounds) or 'a finite number'


def problems(holder, prefix: str, **limits: Range) -> list[str]:
  """A sentence for each named field of `holder` whose value, or an item of whose tuple, is out of its range."""
  wrong = []
  for name, limit in limits.items():
    value = getattr(holder, name)
    if not all(item in limit for item in (value if isinstance(value, tuple) else (value,))):
      wrong.append(f'{prefix}{name}={value} must be {limit}')
  return wrong
