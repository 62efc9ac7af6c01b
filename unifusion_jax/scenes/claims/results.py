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


def collect(folder: pathlib.Path) -> dict[str, dict]:
  """{claim: result} of a run's folder, in the form of docs/results.

  UserError where results of a claim have other settings, devices or jax, or those of an arm another training.
  """
  results = {}
  for claim in experiments.CLAIMS:
    files = sorted((folder / 'results' / claim).glob('*.json'))
    if files:
      results[claim] = _collected(claim, [(file, json_file.read(file)) for file in files])
  return results


def _collected(claim: str, files: list[tuple[pathlib.Path, dict]]) -> dict:
  (first, one), arms = files[0], {}
  for file, each in files:
    if each['settings'] != one['settings']:
      different = [name for name in one['settings'] if each['settings'].get(name) != one['settings'][name]]
      raise UserError(f'{file} has another {", ".join(different)} than {first}: results are compared within one set of '
                      'settings, so remove one of them and run it again')
    arm = arms.setdefault(each['arm'], dict(digest=each['digest'], parameters=each['parameters'], seeds=[], dates=[],
                                            seconds=[], values={}))
    if each['digest'] != arm['digest']:
      raise UserError(f'{file} is of another training than the other seeds of {each["arm"]} (settings '
                      f'{each["digest"]}, theirs {arm["digest"]}): remove what is older and run it again')
    arm['seeds'].append(each['seed'])
    arm['dates'].append(each['date'])
    arm['seconds'].append(each['seconds'])
    for name, values in each['values'].items():
      arm['values'].setdefault(name, []).append(_packed(values))
  order = [name for name in experiments.CLAIMS[claim].arms if name in arms]
  return dict(claim=claim, settings=one['settings'], arms={name: arms[name] for name in order})


def _packed(values: list) -> str | list:
  """Verdicts as a text of 0 and 1, other values rounded."""
  if all(isinstance(value, bool) for value in values):
    return ''.join(str(int(value)) for value in values)
  return [None if value is None else round(value, 4) for value in values]


def _unpacked(values: str | list) -> list:
  return [value == '1' for value in values] if isinstance(values, str) else values


def restore(docs: pathlib.Path, folder: pathlib.Path, size: str) -> int:
  """Writes results of docs/results that a run's folder lacks and that belong to its settings into it: their number.

  So a run goes on on another machine. Results of another size, other weights, another version of jax or another
  training of an arm stay out.
  """
  wanted, written = experiments.settings(size) | dict(jax=jax.__version__), 0
  for claim, result in read(docs).items():
    if any(result['settings'].get(name) != value for name, value in wanted.items()):
      continue
    for name, arm in result['arms'].items():
      known = experiments.CLAIMS[claim].arms.get(name)
      if known is None or arm['digest'] != experiments.digest(known.stage, experiments.SIZES[size]):
        continue
      for i, seed in enumerate(arm['seeds']):
        file = result_file(folder, claim, name, seed)
        if not file.exists():
          write(file, dict(
              claim=claim, arm=name, seed=seed, settings=result['settings'], digest=arm['digest'],
              parameters=arm['parameters'], date=arm['dates'][i], seconds=arm['seconds'][i],
              values={value: _unpacked(runs[i]) for value, runs in arm['values'].items()}))
          written += 1
  return written


def shared(result: Mapping, *arms: str) -> list[int]:
  """The seeds that all of these arms have."""
  return sorted(set.intersection(*(set(result['arms'][name]['seeds']) for name in arms)))
