"""Results of the claims: a file for each arm and seed in a run's folder, all of a claim in one file in docs/results."""

from collections.abc import Mapping
import json
import os
import pathlib

import jax

from unifusion_jax import json_file
from unifusion_jax.errors import UserError
from unifusion_jax.scenes.claims import experiments


def result_file(folder: pathlib.Path, claim: str, arm: str, seed: int) -> pathlib.Path:
  return folder / 'results' / claim / f'{arm}_{seed}.json'


def write(file: pathlib.Path, content: dict) -> None:
  """A JSON file, whole or not at all."""
  file.parent.mkdir(parents=True, exist_ok=True)
  part = file.with_suffix('.part')
  part.write_text(json.dumps(content, allow_nan=False) + '\n')
  os.replace(part, file)


def read(docs: pathlib.Path) -> dict[str, dict]:
  """The results in docs/results, {claim: result}."""
  return {file.stem: json_file.read(file) for file in sorted((docs / 'results').glob('?.json'))}


def settings(size: str, device: str) -> dict:
  """What all results of a claim must share: size, weights, version of jax and kind of device, as 'cpu'."""
  return experiments.settings(size) | dict(jax=jax.__version__, device=device)


def _differing(one: Mapping, other: Mapping) -> str:
  return ', '.join(name for name in {**one, **other} if one.get(name) != other.get(name))


def check(folder: pathlib.Path, now: Mapping) -> None:
  """UserError where a run's folder has results of other settings than those of `settings` that it would go on with."""
  for file in sorted((folder / 'results').glob('*/*.json')):
    if differing := _differing(now, json_file.read(file)['settings']):
      raise UserError(f'{file} has another {differing} than this run: results are compared within one set of settings, '
                      'so give another --folder, or remove its results')


def _current(result: Mapping, arm: experiments.Arm, size: experiments.Size) -> bool:
  """Whether a result is of the training and the measurement that the arm has now."""
  return (result.get('digest'), result.get('measure')) == (
      experiments.digest(arm.stage, size), experiments.measured(arm))


def is_measured(folder: pathlib.Path, claim: str, arm: str, seed: int, size: experiments.Size) -> bool:
  """Whether the folder has the result of an arm, of the training and the measurement that it has now."""
  file = result_file(folder, claim, arm, seed)
  return file.exists() and _current(json_file.read(file), experiments.CLAIMS[claim].arms[arm], size)


def collect(folder: pathlib.Path, claim: str) -> dict | None:
  """A claim's results in a run's folder, in the form of docs/results; None without any.

  UserError where they have other settings, or those of an arm another training, measurement or other values.
  """
  files = sorted((folder / 'results' / claim).glob('*.json'))
  return _collected(claim, [(file, json_file.read(file)) for file in files]) if files else None


def _collected(claim: str, files: list[tuple[pathlib.Path, dict]]) -> dict:
  (first, one), arms = files[0], {}
  for file, each in files:
    if differing := _differing(one['settings'], each['settings']):
      raise UserError(f'{file} has another {differing} than {first}: results are compared within one set of '
                      'settings, so remove one of them and run it again')
    arm = arms.setdefault(each['arm'], dict(
        digest=each['digest'], measure=each['measure'], parameters=each['parameters'], seeds=[], dates=[], seconds=[],
        devices=[], values={name: [] for name in each['values']}))
    for what, same in (('training', each['digest'] == arm['digest']),
                       ('measurement', each['measure'] == arm['measure']),
                       ('set of values', each['values'].keys() == arm['values'].keys())):
      if not same:
        raise UserError(f'{file} is of another {what} than the other seeds of {each["arm"]}: remove what is older and '
                        'run it again')
    for name, key in (('seeds', 'seed'), ('dates', 'date'), ('seconds', 'seconds'), ('devices', 'devices')):
      arm[name].append(each[key])
    for name, values in each['values'].items():
      arm['values'][name].append(_packed(values))
  order = [name for name in experiments.CLAIMS[claim].arms if name in arms]
  return dict(claim=claim, settings=one['settings'], arms={name: arms[name] for name in order})


def check_replaced(file: pathlib.Path, result: Mapping) -> None:
  """UserError where a file of docs/results has what a new result has not: other settings, arms or seeds."""
  if not file.exists():
    return
  there = json_file.read(file)
  if differing := _differing(there['settings'], result['settings']):
    lost = f'another {differing}'
  else:
    lost = ', '.join(f'{name} of seed {seed}' for name, arm in there['arms'].items() for seed in arm['seeds']
                     if seed not in result['arms'].get(name, dict(seeds=[]))['seeds'])
  if lost:
    raise UserError(f'{file} has results that this run has not ({lost}): give --replace to write over them')


def _packed(values: list) -> str | list:
  """Verdicts as a text of 0 and 1, other values rounded."""
  if all(isinstance(value, bool) for value in values):
    return ''.join(str(int(value)) for value in values)
  return [None if value is None else round(value, 4) for value in values]


def _unpacked(values: str | list) -> list:
  return [value == '1' for value in values] if isinstance(values, str) else values


def restore(docs: pathlib.Path, folder: pathlib.Path, size: str, device: str) -> int:
  """Writes results of docs/results that a run's folder lacks and that belong to its settings into it: their number.

  So a run goes on on another machine. Results of another size, other weights, another version of jax or kind of
  device, and of another training or measurement of an arm stay out.
  """
  written = 0
  for claim, result in read(docs).items():
    if result['settings'] != settings(size, device):
      continue
    for name, arm in result['arms'].items():
      known = experiments.CLAIMS[claim].arms.get(name)
      if known is None or not _current(arm, known, experiments.SIZES[size]):
        continue
      for i, seed in enumerate(arm['seeds']):
        if not is_measured(folder, claim, name, seed, experiments.SIZES[size]):
          write(result_file(folder, claim, name, seed), dict(
              claim=claim, arm=name, seed=seed, settings=result['settings'], digest=arm['digest'],
              measure=arm['measure'], parameters=arm['parameters'], date=arm['dates'][i], seconds=arm['seconds'][i],
              devices=arm['devices'][i], values={value: _unpacked(runs[i]) for value, runs in arm['values'].items()}))
          written += 1
  return written


def shared(result: Mapping, *arms: str) -> list[int]:
  """The seeds that all of these arms have."""
  return sorted(set.intersection(*(set(result['arms'][name]['seeds']) for name in arms)))
