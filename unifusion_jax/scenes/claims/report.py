"""Tables, plots and statements of the paper's claims: from the results of runs to docs/results and docs/paper.md.

  python -m unifusion_jax.scenes.claims.report --folder=runs/claims    # after scenes/claims/run.py
  python -m unifusion_jax.scenes.claims.report --folder=               # docs/paper.md again, from docs/results alone

docs/results/CLAIM.json holds every example's verdict in every seed, so that anyone can test what this does not. What
stands between <!-- claim X --> and <!-- end of claim X --> in docs/paper.md is written here and nowhere else.
"""

from collections.abc import Mapping
import math
import pathlib
import re

from absl import app, flags
import numpy as np

from unifusion_jax import command_line, errors
from unifusion_jax.errors import UserError
from unifusion_jax.evaluation import statistics
from unifusion_jax.scenes.claims import experiments, results

LEVEL = 0.05  # below this p, adjusted, and with an interval without 0 a difference is called one
LEAST = 2  # examples that say anything of others
MARKED = re.compile(r'(<!-- claim (\w) -->\n).*?(<!-- end of claim \2 -->)', re.DOTALL)


def matched(result: Mapping, value: str, *arms: str) -> list[np.ndarray]:
  """The values [seeds examples] of each arm, of the seeds that all of them have; examples without a value left out."""
  chosen = [result['arms'][name] for name in arms]
  seeds = results.shared(result, *arms)
  tables = [np.array([[math.nan if x is None else float(x) for x in arm['values'][value][arm['seeds'].index(seed)]]
                      for seed in seeds]) for arm in chosen]
  known = np.all([np.all(np.isfinite(table), axis=0) for table in tables], axis=0) if seeds else []
  return [table[:, known] if len(table) else table for table in tables]


def has(result: Mapping, value: str, *arms: str) -> bool:
  """Whether the arms have this value of two examples or more, in a seed that they share."""
  there = all(name in result['arms'] and value in result['arms'][name]['values'] for name in arms)
  return there and bool(results.shared(result, *arms)) and matched(result, value, *arms)[0].shape[1] >= LEAST


def _verdicts(*tables: np.ndarray) -> bool:
  return all(np.isin(table, (0, 1)).all() for table in tables)


def spread(runs: np.ndarray) -> tuple[float, float, float, float]:
  """(mean, std over seeds, low, high) of values [seeds examples], as of `statistics.over_seeds`; std nan for one seed.

  Shares of verdicts end at 0 and 1. The interval of verdicts that are all alike is Wilson's of one seed.
  """
  mean, low, high, _ = statistics.over_seeds(runs)
  std = float(np.std(np.mean(runs, axis=1), ddof=1)) if len(runs) > 1 else math.nan
  if _verdicts(runs):
    alike = np.ptp(runs) == 0
    low, high = statistics.wilson(mean * runs.shape[1], runs.shape[1]) if alike else (max(low, 0.0), min(high, 1.0))
  return mean, std, low, high


def difference(mine: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float, float]:
  """(mean, low, high, p) of mine - theirs [seeds examples], as of `statistics.over_seeds`.

  Where verdicts differ alike in all examples, or in none, the interval is Wilson's: of the share of examples that
  differ, in either direction where none does; p is the sign test's. Other values that are all equal have low = high.
  """
  values = mine - theirs
  mean, low, high, p = statistics.over_seeds(values)
  if not _verdicts(mine, theirs):
    return (mean, low, high, p) if values.any() else (0.0, 0.0, 0.0, 1.0)
  if np.ptp(values):
    return mean, max(low, -1.0), min(high, 1.0), p
  n = values.shape[1]
  low, high = statistics.wilson(abs(mean) * n, n)
  if mean == 0:
    return 0.0, -high, high, 1.0
  return mean, *sorted((mean * low, mean * high)), 2.0 ** (1 - n)


def holm(ps: list[float]) -> list[float]:
  """p values adjusted for their number: S. Holm, A simple sequentially rejective multiple test procedure (1979)."""
  order, adjusted, largest = np.argsort(ps, kind='stable'), [0.0] * len(ps), 0.0
  for rank, i in enumerate(order):
    largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
    adjusted[i] = largest
  return adjusted


def statements(result: Mapping) -> list[str]:
  """A sentence for each comparison of the claim whose arms are there."""
  claim, found = experiments.CLAIMS[result['claim']], []
  for value, arm, other in claim.compared:
    if has(result, value, arm, other):
      tables = matched(result, value, arm, other)
      found.append((value, arm, other, tables[0].shape, difference(*tables)))
  adjusted = holm([p for *_, (_, _, _, p) in found])
  sentences = []
  for (value, arm, other, (seeds, examples), (mean, low, high, _)), p in zip(found, adjusted):
    digits, trained = _digits(value), {claim.arms[name].stage for name in (arm, other)}
    trained = [stage for stage in trained if experiments.trains(stage)]
    interval = f'[{low:.{digits}f}, {high:.{digits}f}]'
    about = [f'{seeds} seed{"s" * (seeds > 1)}', f'{examples} examples']
    if not low == high == 0:
      about.insert(0, 'p < 0.001' if p < 0.001 else f'p = {p:.3f}')
    if low == high == 0:
      said = f'`{arm}` and `{other}` are the same to the last digit'
    elif p >= LEVEL or low <= 0 <= high:
      said = f'no difference seen between `{arm}` and `{other}`: {mean:.{digits}f} {interval}'
    elif seeds == 1 and trained:
      said = (f"one training{' each' * (len(trained) > 1)}: the difference between `{arm}` and `{other}` may be the "
              f"seed's: {mean:.{digits}f} {interval}")
    else:
      said = f'`{arm}` {"above" if mean > 0 else "below"} `{other}` by {abs(mean):.{digits}f}'
      said += f' {interval if mean > 0 else f"[{-high:.{digits}f}, {-low:.{digits}f}]"}'
    sentences.append(f'{claim.shown[value]}: {said}, {", ".join(about)}.')
  return sentences


def _digits(value: str) -> int:
  return 2 if value.endswith(('psnr', 'rmse')) else 3


def relatives(claim: experiments.Claim, result: Mapping, value: str, name: str) -> float | None:
  """The mean of an arm beside that with one tile; None where there is no such arm."""
  base = f'{name.rpartition("_")[0]}_1'
  if value not in claim.relative or not has(result, value, name, base):
    return None
  mine, theirs = matched(result, value, name, base)
  return float(np.mean(mine) / np.mean(theirs))


def table(result: Mapping) -> str:
  """A Markdown table: a row for each arm of the claim, its values with the spread over seeds and the 95% interval."""
  claim = experiments.CLAIMS[result['claim']]
  columns = [value for value in claim.shown if any(has(result, value, name) for name in result['arms'])]
  rows = [['arm', 'parameters', *(claim.shown[value] for value in columns)], ['---'] * (2 + len(columns))]
  for name, arm in result['arms'].items():
    cells = []
    for value in columns:
      if not has(result, value, name):
        cells.append('')
        continue
      mean, std, low, high = spread(matched(result, value, name)[0])
      digits = _digits(value)
      over_seeds = '' if math.isnan(std) else f' ± {std:.{digits}f}'
      relative = relatives(claim, result, value, name)
      cells.append(f'{mean:.{digits}f}{over_seeds} [{low:.{digits}f}, {high:.{digits}f}]' + (
          '' if relative is None else f', {relative:.2f}'))
    rows.append([f'`{name}`', f'{arm["parameters"] / 1e6:.2f}M', *cells])
  return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def section(claim: str, result: Mapping | None) -> str:
  """What docs/paper.md says of a claim's results, generated; the sentence that it was not run without any."""
  if result is None:
    return '*Not yet run: there are no results of it in `docs/results/`.*\n'
  at, dates = result['settings'], sorted({date for arm in result['arms'].values() for date in arm['dates']})
  kinds = {experiments.STAGES[stage].kind for name in result['arms']
           for stage in experiments.chain(experiments.CLAIMS[claim].arms[name].stage)}
  steps = ', '.join(f'{name} {count}' for name, count in at['steps'].items() if name in kinds)
  examples, noises, texts = at['batch']
  batches = f'batches of {examples} noised {noises} times, of the VLM {texts}'
  trained = f'steps of each training: {steps}; {batches}' if steps else 'nothing is trained'
  parts = [
      f'Size `{at["size"]}`: {trained}; {at["examples"]} test examples of each kind, {at["sampling_steps"]} sampling '
      f'steps. Device {at["device"]}, jax {at["jax"]}, {" to ".join(dict.fromkeys((dates[0], dates[-1])))}.'
      f'{_earlier(at)}',
      table(result),
      '\n'.join(f'- {sentence}' for sentence in statements(result)) or '- No comparison has both of its arms yet.']
  missing = [name for name in experiments.arms(claim, experiments.SIZES[at['size']]) if name not in result['arms']]
  most = max(len(arm['seeds']) for arm in result['arms'].values())
  missing += [f'{name} ({len(arm["seeds"])} of {most} seeds)' for name, arm in result['arms'].items()
              if len(arm['seeds']) < most]
  if missing:
    parts.append(f'Not there: {", ".join(missing)}.')
  title = experiments.CLAIMS[claim].title
  parts.append(f'![{title}](results/{claim}.png)\n\nEvery verdict: [results/{claim}.json](results/{claim}.json).')
  return '\n\n'.join(parts) + '\n'


def _earlier(settings: Mapping) -> str:
  """A sentence where results were made with other weights than those that are shipped now; else nothing."""
  now = experiments.settings(settings['size'])['weights']
  other = [f'{part} {digest}' for part, digest in sorted(settings['weights'].items()) if now.get(part) != digest]
  return f' Made with earlier weights than the shipped ones (SHA-256 {", ".join(other)}...).' if other else ''


def page(text: str, found: Mapping[str, Mapping]) -> str:
  """A page with the sections of all claims written anew."""
  return MARKED.sub(lambda mark: f'{mark[1]}{section(mark[2], found.get(mark[2]))}{mark[3]}', text)


def plot(result: Mapping, file: pathlib.Path) -> None:
  """The plotted values of every arm: mean and 95% interval, and a dot for each seed. UserError without matplotlib."""
  try:
    import matplotlib
  except ImportError as error:
    raise UserError('plots want matplotlib: pip install matplotlib') from error
  matplotlib.use('agg')
  from matplotlib import pyplot
  claim = experiments.CLAIMS[result['claim']]
  columns = [value for value in claim.plotted if any(has(result, value, name) for name in result['arms'])]
  figure, axes = pyplot.subplots(1, max(1, len(columns)), squeeze=False, layout='constrained',
                                 figsize=(1 + 4 * max(1, len(columns)), 1.2 + 0.35 * len(result['arms'])))
  for axis, value in zip(axes[0], columns):
    names = [name for name in result['arms'] if has(result, value, name)]
    for y, name in enumerate(names):
      runs = matched(result, value, name)[0]
      mean, _, low, high = spread(runs)
      axis.errorbar(mean, y, xerr=[[max(mean - low, 0)], [max(high - mean, 0)]], fmt='o', color='black', capsize=3)
      axis.plot(np.mean(runs, axis=1), [y] * len(runs), '|', color='tab:orange', markersize=12)
    axis.set(xlabel=claim.shown[value], yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    axis.locator_params(axis='x', nbins=6)  # with more their labels run into one another
    axis.grid(axis='x', alpha=0.3)
  figure.suptitle(claim.title)
  file.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(file, dpi=110)
  pyplot.close(figure)


def report(folder: pathlib.Path | None, docs: pathlib.Path, replace: bool = False) -> None:
  """Writes the results of a run's folder, if one is given, and their plots into `docs`, and the page of all results.

  UserError, at the end, for claims whose results do not belong together, and without `replace` for those of which
  docs/results has what the run has not; the others are written.
  """
  problems = []
  for claim in experiments.CLAIMS if folder else ():
    file = docs / 'results' / f'{claim}.json'
    try:
      if (result := results.collect(folder, claim)) is None:
        continue
      if not replace:
        results.check_replaced(file, result)
      results.write(file, result)
      plot(result, file.with_suffix('.png'))
    except UserError as error:
      problems.append(f'({claim}) {error}')
  file, found = docs / 'paper.md', results.read(docs)
  file.write_text(page(file.read_text(), found))
  for claim, result in found.items():
    print('\n'.join([f'({claim}) {experiments.CLAIMS[claim].title}', *statements(result)]))
  if problems:
    raise UserError('; '.join(problems))


def main(argv):
  del argv
  folder = flags.FLAGS.folder
  report(pathlib.Path(folder) if folder else None, pathlib.Path(flags.FLAGS.docs or 'docs'), flags.FLAGS.replace)


if __name__ == '__main__':
  flags.DEFINE(command_line.PathParser(), 'folder', 'runs/claims', 'Folder of a run of the claims; empty: none, the '
               'page alone is written.')
  flags.DEFINE(command_line.PathParser(), 'docs', 'docs', 'Folder of paper.md and results/; empty: docs.')
  flags.DEFINE_bool('replace', False, 'Write over results in docs that the run has not.')
  with errors.at_the_terminal():
    app.run(main)
