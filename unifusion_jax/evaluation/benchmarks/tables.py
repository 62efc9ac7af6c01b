"""Tables of scores: a row a category, the mean over categories (macro) and over prompts (micro), best of n (top).

A prompt's score is the mean of its images'; with `top` it is that of its best image, as in the paper's table of
DPG-Bench (best of four). In the row of a category of questions a prompt counts once for each of its questions there, so
that the row is the mean of all its questions. Intervals are 95%, by resampling prompts; those of the macro average too.
Where all prompts of a category are right or all are wrong they are Wilson's.
"""

from collections.abc import Collection, Mapping, Sequence
import dataclasses

import numpy as np

from unifusion_jax.evaluation import statistics


@dataclasses.dataclass(frozen=True)
class Scores:
  """A measure of a set's images.

  Attributes:
    name: of the measure.
    prompts: {id: score of each image} of every prompt that it was measured on.
    categories: {category: the same}, where a prompt may have another score than of all of it.
    counts: {category: {id: number of questions that the score is a mean of}}, of categories of questions.
    higher: whether more is better.
  """
  name: str
  prompts: Mapping[str, Sequence[float]]
  categories: Mapping[str, Mapping[str, Sequence[float]]]
  counts: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
  higher: bool = True


def report(scores: Scores, summaries: Collection[str] = ()) -> dict:
  """Rows of a measure: `categories`, each with prompts, mean, interval and top, then `macro` and `micro`.

  summaries: categories that hold others, which no macro average counts and which stand last.
  """
  several = any(len(values) > 1 for values in scores.prompts.values())
  kinds = dict(mean=np.mean) | (dict(top=np.max if scores.higher else np.min) if several else {})
  counted = [name for name in scores.categories if name not in summaries]
  parts = {name: scores.categories[name] for name in sorted(scores.categories, key=lambda name: name in summaries)}

  def figures(*names: str | None) -> dict:  # None: all prompts
    wanted = [(scores.prompts if name is None else parts[name], scores.counts.get(name, {})) for name in names]
    return {kind: _figure([{key: (float(of(values)), counts.get(key, 1)) for key, values in part.items()}
                           for part, counts in wanted]) for kind, of in kinds.items()}

  made = dict(name=scores.name,
              categories={name: dict(prompts=len(part)) | figures(name) for name, part in parts.items()})
  if len(counted) > 1:
    made['macro'] = dict(categories=len(counted)) | figures(*counted)
  made['micro'] = dict(prompts=len(scores.prompts)) | figures(None)
  return made


def _figure(categories: list[dict[str, tuple[float, int]]]) -> dict:
  """The mean of categories' means; a prompt that is resampled is in all of its categories.

  categories: {id: (value, how often it counts)} of each.
  low and high are Wilson's of the prompts where all of a category are right or none is; None of one prompt, and for
  other values that are all alike, whose resamples are, too.
  """
  keys = list(dict.fromkeys(key for category in categories for key in category))
  values, counts = np.moveaxis(np.array(
      [[category.get(key, (0.0, 0)) for category in categories] for key in keys], float), -1, 0)

  def mean(columns: np.ndarray) -> float:
    sums, counts = np.split(columns.sum(axis=0), 2)
    return float(np.mean(sums[counts > 0] / counts[counts > 0]))

  columns, found = np.concatenate([values * counts, counts], axis=1), values[counts > 0]
  if np.ptp(found):
    low, high = statistics.bootstrap(columns, mean)
  elif len(keys) > 1 and len(categories) == 1 and found[0] in (0, 1):
    low, high = statistics.wilson(found[0] * len(keys), len(keys))
  else:
    low = high = np.nan
  return dict(value=_rounded(mean(columns)), low=_rounded(low), high=_rounded(high))


def _rounded(value) -> float | None:
  return None if np.isnan(value) else round(float(value), 4)


def markdown(made: dict, images: int) -> str:
  """The table of a `report`, of a number of images of each prompt."""
  kinds = [kind for kind in ('mean', 'top') if kind in made['micro']]
  titles = dict(mean='mean', top=f'best of {images}')
  lines = [f'### {made["name"]}', '',
           '| | prompts | ' + ' | '.join(f'{titles[kind]} | 95% interval' for kind in kinds) + ' |',
           '|---|---|' + '---|---|' * len(kinds)]
  named = dict(made['categories'])
  if 'macro' in made:
    named[f'**macro**, mean of {made["macro"]["categories"]} categories'] = made['macro']
  named['**micro**, mean of all prompts'] = made['micro']
  for name, row in named.items():
    cells = [f'{row[kind]["value"]:.3f} | ' + (
        '' if row[kind]['low'] is None else f'{row[kind]["low"]:.3f} to {row[kind]["high"]:.3f}') for kind in kinds]
    lines.append(f'| {name} | {row.get("prompts", "")} | {" | ".join(cells)} |')
  return '\n'.join(lines)
