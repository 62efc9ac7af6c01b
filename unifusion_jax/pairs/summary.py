"""What votes on pairs say: win rates with intervals, a sign test, and the agreement of the voters."""

import collections
import itertools
import math

import numpy as np

from unifusion_jax.evaluation import statistics

SCORES = {'a': 1.0, 'b': 0.0, 'tie': 0.5, 'bad': 0.5}


def summary(categories: dict[str, str], votes: dict[str, dict[str, tuple[str, str]]],
            requests: dict[str, str]) -> dict:
  """The report of votes {voter: {pair: (winner, choice)}} on pairs {name: category}.

  requests: {pair: what was asked for}, the same of pairs that differ in their noise alone.

  all, categories: `rates`, also of what stands before a category's slash.
  voters: those of each voter, who may have judged a part.
  agreement: for every two voters the share of the pairs they both judged that they judged alike, with its interval, and
    Cohen's kappa over a, b, tie and bad (J. Cohen 1960; None where chance alone would agree).
  left: share of the votes for the left image among those for one, with its interval: 0.5 where sides do not matter.
  """
  winners = {voter: {pair: winner for pair, (winner, _) in each.items()} for voter, each in votes.items()}
  sides = [choice for each in votes.values() for _, choice in each.values() if choice in ('left', 'right')]
  members = collections.defaultdict(set)
  for pair, category in categories.items():
    parts = category.split('/')
    for length in range(1, len(parts) + 1):
      members['/'.join(parts[:length])].add(pair)
  report = dict(pairs=len(categories), all=rates(winners, requests))
  report['categories'] = {name: rates(winners, {pair: requests[pair] for pair in pairs})
                          for name, pairs in sorted(members.items())}
  report['voters'] = {voter: rates({voter: each}, requests) for voter, each in winners.items()}
  report['agreement'] = [_agreement(*two, winners) for two in itertools.combinations(winners, 2)]
  return report | dict(left=_share(sides.count('left'), len(sides)))


def rates(winners: dict[str, dict[str, str]], requests: dict[str, str]) -> dict:
  """Counts of votes {voter: {pair: winner}} on the pairs of `requests`, and rates of which each request is one.

  A pair's score is the mean over its voters, 1 for a, 0 for b and 0.5 for a tie or two bad ones; a request's is the
  mean over its pairs, for images of one request are no independent evidence.

  judged: pairs with votes.  a, b, tie, bad: votes.
  wins_a: mean score of the requests with its bootstrap interval, None where their scores are all alike.
  decided_a: of the requests whose score is not 0.5, the share that a wins, with Wilson's interval.
  p: two-sided sign test over these requests.
  """
  counts, scores = collections.Counter(), collections.defaultdict(list)
  for each in winners.values():
    for pair, winner in each.items():
      if pair in requests:
        counts[winner] += 1
        scores[pair].append(SCORES[winner])
  report = dict(judged=len(scores), **{name: counts[name] for name in SCORES})
  if not scores:
    return report
  asked = collections.defaultdict(list)
  for pair in sorted(scores):
    asked[requests[pair]].append(np.mean(scores[pair]))
  means = np.round([np.mean(each) for each in asked.values()], 9)  # thirds may make 0.49999
  low, high = statistics.bootstrap(means)
  wins, losses = means > 0.5, means < 0.5
  *_, p = statistics.paired(wins, losses)
  return report | dict(wins_a=_rounded(np.mean(means), low, high),
                       decided_a=_share(int(wins.sum()), int(wins.sum() + losses.sum())), p=round(p, 5))


def _agreement(one: str, other: str, winners: dict[str, dict[str, str]]) -> dict:
  a, b = winners[one], winners[other]
  both = sorted(a.keys() & b.keys())
  same = sum(a[pair] == b[pair] for pair in both)
  report = dict(voters=[one, other], same=_share(same, len(both)), kappa=None)
  if both:
    shares = [collections.Counter(each[pair] for pair in both) for each in (a, b)]
    chance = sum(shares[0][name] * shares[1][name] for name in SCORES) / len(both) ** 2
    report['kappa'] = None if chance == 1 else round((same / len(both) - chance) / (1 - chance), 4)
  return report


def _share(successes: int, n: int) -> dict:
  return dict(n=n, **_rounded(successes / n if n else None, *statistics.wilson(successes, n)))


def _rounded(value, low: float, high: float) -> dict:
  """None in the place of what there is not: a share of nothing, an interval of scores that are all alike."""
  known = dict(share=value, low=low, high=high)
  return {name: None if each is None or math.isnan(each) else round(float(each), 4) for name, each in known.items()}
