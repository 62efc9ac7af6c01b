"""Intervals and tests, against scipy (which jax brings), closed forms, and their coverage of simulated data."""

import math

import numpy as np
import pytest
from scipy import stats

from unifusion_jax.evaluation import statistics


@pytest.mark.parametrize('successes, n', [(0, 10), (3, 10), (10, 10), (57, 100), (1, 1), (999, 1000)])
def test_wilson_is_scipys(successes, n):
  wanted = stats.binomtest(successes, n).proportion_ci(method='wilson')
  np.testing.assert_allclose(statistics.wilson(successes, n), (wanted.low, wanted.high), atol=1e-12)


def test_wilson_of_arrays_and_of_nothing():
  low, high = statistics.wilson([3, 0], [10, 0])
  assert (low[0], high[0]) == statistics.wilson(3, 10) and (low[1], high[1]) == (0, 1)
  with pytest.raises(ValueError, match='11 successes of 10'):
    statistics.wilson(11, 10)


def test_bootstrap_of_a_mean_is_its_normal_interval():
  values = np.random.default_rng(0).normal(3, 2, size=400)
  half = 1.96 * np.std(values) / math.sqrt(len(values))
  low, high = statistics.bootstrap(values)
  np.testing.assert_allclose((low, high), (values.mean() - half, values.mean() + half), atol=0.03)
  assert statistics.bootstrap(values) == (low, high) != statistics.bootstrap(values, seed=1)


def test_bootstrap_takes_any_statistic_and_columns():
  values = np.random.default_rng(0).normal(size=(200, 2))
  values[:, 1] += values[:, 0]
  low, high = statistics.bootstrap(values, lambda x: np.corrcoef(x.T)[0, 1])
  assert low < np.corrcoef(values.T)[0, 1] < high and 0 < low and high < 1


def test_bootstrap_of_groups_resamples_groups():
  """Four equal values to a prompt tell no more than one: the interval is that of the prompts."""
  prompts = np.random.default_rng(0).normal(size=50)
  values, groups = np.repeat(prompts, 4), np.repeat([f'prompt {i}' for i in range(50)], 4)
  low, high = statistics.bootstrap(values, groups=groups)
  alone = statistics.bootstrap(prompts)
  np.testing.assert_allclose((low, high), alone, atol=0.03)
  assert np.ptp(statistics.bootstrap(values)) < 0.6 * (high - low)
  shuffled = np.random.default_rng(1).permutation(200)[:150]  # groups of several sizes, in any order
  low, high = statistics.bootstrap(values[shuffled], groups=groups[shuffled])
  assert low < values[shuffled].mean() < high
  with pytest.raises(ValueError, match='200 values, labels of shape'):
    statistics.bootstrap(values, groups=groups[:3])


@pytest.mark.parametrize('n', [5, 12, 60])
def test_paired_is_scipys_permutation_test(n):
  rng = np.random.default_rng(n)
  a, b = rng.normal(0.4, 1, size=n), rng.normal(size=n)
  difference, low, high, p = statistics.paired(a, b)
  wanted = stats.permutation_test((a - b,), np.mean, permutation_type='samples', n_resamples=20_000, rng=0)
  np.testing.assert_allclose(p, wanted.pvalue, atol=1e-12 if n <= 14 else 0.01)
  assert low < difference < high and difference == np.mean(a - b)
  assert statistics.paired(b, a) != statistics.paired(a, b) == (difference, low, high, p)


@pytest.mark.parametrize('wins, losses', [(9, 1), (6, 6), (40, 20)])
def test_paired_of_wins_is_the_sign_test(wins, losses):
  a = np.concatenate([np.ones(wins), np.zeros(losses), np.full(30, 0.5)])  # and ties, which do not count
  _, _, _, p = statistics.paired(a, 1 - a)
  np.testing.assert_allclose(p, stats.binomtest(wins, wins + losses).pvalue, atol=1e-9 if wins + losses <= 14 else 0.01)


def test_paired_of_equals():
  assert statistics.paired([1, 2, 3], [1, 2, 3]) == (0, 0, 0, 1)


def test_paired_over_seeds():
  """A seed's own shift widens the interval, and none of it comes from the number of examples."""
  rng = np.random.default_rng(0)
  noise = rng.normal(scale=0.01, size=(2, 4, 300))
  shifts = np.array([0.0, 0.2, 0.4, 0.6])[:, None]
  a, b = noise[0] + shifts, noise[1]
  difference, low, high, p = statistics.paired(a, b)
  np.testing.assert_allclose(difference, 0.3, atol=0.01)
  np.testing.assert_allclose(high - low, 2 * 1.96 * np.std(shifts) / 2, rtol=0.15)
  assert p < 0.001  # on these examples these runs do differ
  with pytest.raises(ValueError, match='not matched'):
    statistics.paired(a, b[:3])


def test_seeds():
  runs = np.random.default_rng(0).normal(size=(3, 100)) + [[0.1], [0.2], [0.6]]
  mean, std, low, high = statistics.seeds(runs)
  assert mean == runs.mean() and low < mean < high
  np.testing.assert_allclose(std, np.std(runs.mean(axis=1), ddof=1))
  one = statistics.seeds(runs[:1])
  assert math.isnan(one[1])
  np.testing.assert_allclose(one[2:], statistics.bootstrap(runs[0]), atol=0.03)
  for wrong in ([1, 2, 3], [[1, 2], [3]], [], [[math.nan, 1]]):
    with pytest.raises(ValueError):
      statistics.seeds(wrong)


def test_intervals_cover_what_they_are_of():
  """Of 95% intervals about 95% hold the true value, and of null hypotheses about 5% fall."""
  rng = np.random.default_rng(0)
  trials, covered, seen, rejected = 200, 0, 0, 0
  for trial in range(trials):
    a, b = rng.normal(0.3, 1, size=60), rng.normal(size=60)
    _, low, high, _ = statistics.paired(a, b, seed=trial)
    covered += low <= 0.3 <= high
    rejected += statistics.paired(a[:14], b[:14] + 0.3)[3] <= 0.05
    low, high = statistics.wilson(rng.binomial(40, 0.85), 40)
    seen += low <= 0.85 <= high
  assert 0.9 <= covered / trials <= 0.99 and 0.9 <= seen / trials <= 0.99 and 0.01 <= rejected / trials <= 0.1
