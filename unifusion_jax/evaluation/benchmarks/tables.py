"""Tables of scores: a row a category, the mean over categories (macro) and over prompts (micro), best of n (top).

A prompt's score is the mean of its images'; with `top` it is that of its best image, as in the paper's table of
DPG-Bench (best of four). Intervals are 95%, by resampling prompts; those of the macro average too.
"""

from collections.abc import Mapping, Sequence
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
    higher: whether more is better.
  """
  name: str
  prompts: Mapping[str, Sequence[float]]
  categories: Mapping[str, Mapping[str, Sequence[float]]]
  higher: bool = True


def report(scores: Scores, summaries: Sequence[str] = ()) -> dict:
  """Rows of a measure: `categories`, each with prompts, mean, interval and top, then `macro` and `micro`.

  summaries: categories that hold others, which no macro average counts.
  """
  best = np.max if scores.higher else np.min
  several = any(len(values) > 1 for values in scores.prompts.values())
  kinds = dict(mean=np.mean) | (dict(top=best) if several else {})
  reduced = {kind: {name: {key: float(of(values)) for key, values in part.items()}
                    for name, part in (*scores.categories.items(), ('', scores.prompts))}
             for kind, of in kinds.items()}
  rows = {name: dict(prompts=len(part)) | {
      kind: _figure(list(reduced[kind][name].values())) for kind in kinds}
          for name, part in scores.categories.items()}
  counted = [name for name in scores.categories if name not in summaries]
  made = dict(name=scores.name, categories=rows)
  if len(counted) > 1:
    made['macro'] = dict(categories=len(counted)) | {
        kind: _macro([reduced[kind][name] for name in counted]) for kind in kinds}
  made['micro'] = dict(prompts=len(scores.prompts)) | {
      kind: _figure(list(reduced[kind][''].values())) for kind in kinds}
  return made


def _figure(values: list[float]) -> dict:
  low, high = statistics.bootstrap(values)
  return dict(value=_rounded(np.mean(values)), low=_rounded(low), high=_rounded(high))


def _macro(categories: list[dict[str, float]]) -> dict:
  """The mean of categories' means; a prompt that is resampled is in all of its categories."""
  keys = list(dict.fromkeys(key for category in categories for key in category))
  there = np.array([[key in category for category in categories] for key in keys], float)
  values = np.array([[category.get(key, 0.0) for category in categories] for key in keys])

  def macro(columns: np.ndarray) -> float:
    sums, counts = np.split(columns.sum(axis=0), 2)
    return float(np.mean(sums[counts > 0] / counts[counts > 0]))

  columns = np.concatenate([values * there, there], axis=1)
  low, high = statistics.bootstrap(columns, macro)
  return dict(value=_rounded(macro(columns)), low=_rounded(low), high=_rounded(high))


def _rounded(value) -> float:
  return round(float(value), 4)


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
    cells = [f'{row[kind]["value"]:.3f} | {row[kind]["low"]:.3f} to {row[kind]["high"]:.3f}' for kind in kinds]
    lines.append(f'| {name} | {row.get("prompts", "")} | {" | ".join(cells)} |')
  return '\n'.join(lines)
