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


def test_paired_is_of_examples_alone():
  for a, b in (([1, 2, 3], [1, 2]), ([[1, 2]], [[2, 1]])):
    with pytest.raises(ValueError, match='not matched'):
      statistics.paired(a, b)


@pytest.mark.parametrize('values', [[3.0], [[1.0, 2.0]]])
def test_one_value_has_no_interval(values):
  """Of itself alone it says nothing of others."""
  assert np.isnan(statistics.bootstrap(values, np.mean)).all()
  assert np.isnan(statistics.bootstrap([1, 2, 3], groups=['a', 'a', 'a'])).all()
  assert np.isnan(statistics.bootstrap([1, 1, 1])).all()  # nor do equal ones, of how others vary
  assert not np.isnan(statistics.bootstrap([1, 2, 3], groups=['a', 'a', 'b'])).any()


def test_over_seeds_of_hand_computed_numbers():
  """Means of seeds 1 and 4, of examples 1, 2 and 4.5; residuals -0.5, 0, 0.5 and their opposites."""
  values = np.array([[1.0], [4.0]]) + [1, 2, 4.5] - 2.5 + [[-0.5, 0, 0.5], [0.5, 0, -0.5]]
  mean, low, high, p = statistics.over_seeds(values)
  seeds, examples, residuals = 3 * 4.5, 2 * np.var([1, 2, 4.5], ddof=1), 4 * 0.25 / 2
  square = seeds + examples - residuals
  freedom = square ** 2 / (seeds ** 2 + examples ** 2 / 2 + residuals ** 2 / 2)
  error = math.sqrt(square / 6)
  assert mean == 2.5
  np.testing.assert_allclose((low, high), 2.5 + stats.t.ppf([0.025, 0.975], freedom) * error)
  np.testing.assert_allclose(p, 2 * stats.t.sf(2.5 / error, freedom))


def test_over_seeds_where_seeds_and_examples_differ_less_than_chance_is_of_the_residuals():
  """Both variances count as 0, and what is left is all there is: mean squares 0, 0 and 1."""
  mean, low, high, p = statistics.over_seeds([[1, 0], [0, 1]])
  np.testing.assert_allclose((mean, low, high), (0.5, *(0.5 + stats.t.ppf([0.025, 0.975], 1) * math.sqrt(1 / 4))))
  np.testing.assert_allclose(p, 2 * stats.t.sf(1, 1))


def test_over_seeds_of_one_seed_is_the_t_test():
  values = np.random.default_rng(0).normal(0.2, 1, size=(1, 30))
  mean, low, high, p = statistics.over_seeds(values)
  wanted = stats.ttest_1samp(values[0], 0)
  np.testing.assert_allclose((low, high), wanted.confidence_interval())
  np.testing.assert_allclose((mean, p), (values.mean(), wanted.pvalue))


def test_over_seeds_whose_examples_are_alike_is_the_t_test_of_their_means():
  """A variance below 0 counts as 0."""
  rng = np.random.default_rng(1)
  values = rng.normal(size=(3, 1)) + rng.normal(scale=0.5, size=(3, 40))
  values -= values.mean(axis=0) - values.mean()
  wanted = stats.ttest_1samp(values.mean(axis=1), 0)
  _, low, high, p = statistics.over_seeds(values)
  np.testing.assert_allclose((low, high, p), (*wanted.confidence_interval(), wanted.pvalue))


def test_over_seeds_of_equals_and_of_what_it_cannot_take():
  mean, low, high, p = statistics.over_seeds(np.zeros((3, 5)))
  assert mean == 0 and p == 1 and -1e-9 < low <= high < 1e-9
  for wrong in ([1, 2, 3], [[1], [2]], [[math.nan, 1]], np.zeros((0, 4))):
    with pytest.raises(ValueError):
      statistics.over_seeds(wrong)


@pytest.mark.parametrize('seeds, low, high', [(2, 0.88, 0.99), (3, 0.92, 0.98)])
@pytest.mark.parametrize('of_seeds, of_examples', [(0.003, 0.0), (0.003, 0.02), (0.0, 0.01)])
def test_over_seeds_covers_the_truth(seeds, low, high, of_seeds, of_examples):
  """Without a true difference about one interval in twenty leaves 0 out, however much is the seeds'."""
  rng, repeats = np.random.default_rng(0), 600
  values = (rng.normal(scale=0.007, size=(repeats, seeds, 100)) + rng.normal(size=(repeats, seeds, 1)) * of_seeds
            + rng.normal(size=(repeats, 1, 100)) * of_examples)
  found = np.array([statistics.over_seeds(each) for each in values])
  covered = (found[:, 1] <= 0) & (0 <= found[:, 2])
  assert low <= covered.mean() <= high, covered.mean()
  np.testing.assert_array_equal(covered, found[:, 3] >= 0.05)


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
