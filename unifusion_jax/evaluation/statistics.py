"""Intervals and tests for figures of examples: 95% intervals, two-sided p, and the same draws for the same seed.

  wilson: shares, by E. B. Wilson, Probable inference, the law of succession, and statistical inference (1927).
  bootstrap: any statistic, by percentiles of resamples: B. Efron, R. Tibshirani, An Introduction to the Bootstrap
    (1993), chapter 13.
  paired, seeds: several training seeds on the same examples. A resample takes seeds and examples, both with
    replacement, so that the interval holds for another seed and other examples. With few seeds it is too narrow, by
    about sqrt((seeds - 1) / seeds) of the seeds' part: three are the least that say anything of the spread.
"""

from collections.abc import Callable, Iterator, Sequence
import math
import statistics

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 4000
FLIPS = 20_000  # random flips of signs, where there are too many examples for all
EXACT = 14  # differences whose 2^14 flips are all tried
PERCENTILES = (2.5, 97.5)
CHUNK = 500  # resamples or flips at a time


def wilson(successes: ArrayLike, n: ArrayLike) -> tuple:
  """Score interval (low, high) of the share successes / n, of each element of arrays; (0, 1) where n is 0."""
  if np.any(np.less(successes, 0)) or np.any(np.less(n, successes)):
    raise ValueError(f'{successes} successes of {n}')
  z = statistics.NormalDist().inv_cdf(PERCENTILES[1] / 100)
  trials = np.maximum(n, 1)
  share = np.divide(successes, trials)
  centre = (share + z ** 2 / (2 * trials)) / (1 + z ** 2 / trials)
  half = z / (1 + z ** 2 / trials) * np.sqrt(share * (1 - share) / trials + z ** 2 / (4 * trials ** 2))
  low = np.where(np.equal(successes, 0), 0.0, centre - half)  # exactly, where rounding would leave 1e-17
  high = np.where(np.equal(successes, n), 1.0, centre + half)
  return (float(low), float(high)) if low.ndim == 0 else (low, high)


def bootstrap(values: ArrayLike, statistic: Callable[[np.ndarray], float] = np.mean,
              groups: Sequence | None = None, seed: int = 0) -> tuple[float, float]:
  """Percentile interval (low, high) of `statistic(values)`, values [n] or, for statistics of several columns, [n c].

  groups: a label for each value, such as the prompt of an image; whole groups are resampled then, for values of one
    group are not independent.
  """
  values, rng = _finite(values), np.random.default_rng(seed)
  if groups is None:
    draws = (rng.integers(len(values), size=len(values)) for _ in range(RESAMPLES))
  else:
    _, labels = np.unique(np.asarray(groups), return_inverse=True)
    if labels.shape != values.shape[:1]:
      raise ValueError(f'{len(values)} values, labels of shape {labels.shape}')
    members = np.split(np.argsort(labels, kind='stable'), np.cumsum(np.bincount(labels))[:-1])
    draws = (np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
             for _ in range(RESAMPLES))
  return _interval([statistic(values[draw]) for draw in draws])


def paired(a: ArrayLike, b: ArrayLike, seed: int = 0) -> tuple[float, float, float, float]:
  """(difference, low, high, p) of mean(a) - mean(b) over matched examples, both [examples] or [seeds examples].

  The interval is a percentile bootstrap. p is of the sign-flip permutation test on the examples' differences, each
  the mean over seeds (R. A. Fisher, The Design of Experiments, 1935): of all flips where at most 14 differ, else of
  20,000 random ones, by (1 + those as large) / (1 + flips). It asks whether these two sets of runs differ on other
  examples; whether another training seed would agree is what the interval says.
  """
  a, b = np.atleast_2d(_finite(a)), np.atleast_2d(_finite(b))
  if a.shape != b.shape:
    raise ValueError(f'not matched: shapes {a.shape} and {b.shape}')
  rng = np.random.default_rng(seed)
  low, high = _interval(_means_of_resamples(a - b, rng))
  return float(np.mean(a - b)), low, high, _sign_flips(np.mean(a - b, axis=0), rng)


def seeds(runs: ArrayLike, seed: int = 0) -> tuple[float, float, float, float]:
  """(mean, std, low, high) of runs [seeds examples]: std of the seeds' means, nan for one seed; bootstrap interval."""
  runs = _finite(runs)
  if runs.ndim != 2:
    raise ValueError(f'runs of shape {runs.shape}, not [seeds examples]')
  std = float(np.std(np.mean(runs, axis=1), ddof=1)) if len(runs) > 1 else math.nan
  return float(np.mean(runs)), std, *_interval(_means_of_resamples(runs, np.random.default_rng(seed)))


def _finite(values: ArrayLike) -> np.ndarray:
  values = np.asarray(values, np.float64)
  if not values.size or not np.all(np.isfinite(values)):
    raise ValueError(f'{values.size} values, of which {np.count_nonzero(~np.isfinite(values))} are not finite')
  return values


def _interval(resampled: ArrayLike) -> tuple[float, float]:
  low, high = np.percentile(resampled, PERCENTILES)
  return float(low), float(high)


def _chunks(count: int) -> Iterator[int]:
  yield from (min(CHUNK, count - start) for start in range(0, count, CHUNK))


def _means_of_resamples(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Means of resamples of both axes of values [s e], [RESAMPLES]."""
  weights = lambda n, rows: rng.multinomial(n, np.full(n, 1 / n), size=rows) / n
  s, e = values.shape
  return np.concatenate([np.einsum('rs,se,re->r', weights(s, rows), values, weights(e, rows), optimize=True)
                         for rows in _chunks(RESAMPLES)])


def _sign_flips(differences: np.ndarray, rng: np.random.Generator) -> float:
  differences = differences[differences != 0]  # these have no sign to flip
  n = len(differences)
  observed = abs(np.sum(differences)) * (1 - 1e-9)  # equal sums in another order of rounding count
  if n <= EXACT:
    signs = 1 - 2 * (np.arange(2 ** n)[:, None] >> np.arange(n) & 1)
    return float(np.mean(abs(signs @ differences) >= observed))
  larger = sum(np.count_nonzero(abs((1 - 2 * rng.integers(2, size=(rows, n), dtype=np.int8)) @ differences) >= observed)
               for rows in _chunks(FLIPS))
  return (1 + larger) / (1 + FLIPS)
