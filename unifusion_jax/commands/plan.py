"""What a recipe needs on devices that are not here: compiled for them, nothing loaded and nothing run.

  python -m unifusion_jax.main --config=configs/edit.py:8b --mode=plan --topology=v6e:8x8
  python -m unifusion_jax.main --config=configs/edit.py:8b --mode=plan --topology=v6e:2x4 \
      --programs=encode,denoise,decode,rewrite
  python -m unifusion_jax.main --config=configs/edit.py:8b --mode=plan --topology=v6e:8x8 --save
  python -m unifusion_jax.main --config=configs/sample.py:krea2_turbo --mode=plan --topology=v5e:1x1 \
      --config.vlm_quantized=int8 --config.transformer_quantized=int8
"""

import json
import pathlib

from unifusion_jax import bucket
from unifusion_jax.commands.sample import PipelineConfig
from unifusion_jax.errors import UserError
from unifusion_jax.planning import plans, programs, replication, report, search


def run(config, workdir: pathlib.Path) -> list[dict]:
  """Prints the plan of each of `config.plan.programs` and writes them into workdir/plan.json; returns them."""
  topology, settings = config.plan.chosen(), config.plan
  examine = lambda config, name, save=None: plans.plan(
      config, topology, name, settings.requests, settings.references, save)
  folder, samples = None, isinstance(config, PipelineConfig)
  if settings.save:
    if samples:
      raise UserError('--save writes a train step, and this recipe has none: leave it out, or plan one that trains, '
                      'such as configs/edit.py')
    if topology.chip.platform != 'tpu':
      raise UserError(f'--save: the plan of {topology.name} is compiled for CPUs in their place, and is no program to '
                      'keep; plan a TPU')
    if bucket.is_address(bucket.address(workdir)) and not config.train.executables:
      raise UserError('--save: programs are written to and loaded from local folders: give --config.train.executables='
                      'FOLDER beside a --workdir in a bucket')
    folder = config.train.executables or str(workdir / 'executables')
  results, summary = [], plans.summary(config, topology)
  repeated = [] if samples else replication.repeated(config, topology.devices)
  print('\n'.join([report.heading(summary, topology), *repeated]))
  for name in settings.programs or programs.default(config):
    results.append(examine(config, name, folder))
    print(f'\n{report.program(results[-1], topology)}', flush=True)
  record = dict(summary, programs=results)
  for result in results:
    if result['program'] == 'train' and not result['fits'] and settings.tries:
      record['tried'] = _search(config, topology, result, examine)
  print(f'\n{report.ROUGH if topology.chip.platform == "gpu" else report.HOW}')
  print(f'\n{verdict(results, record.get("tried", []))}')
  for result in results:
    if result.get('saved'):
      print(f'{result["saved"]}: a start with --config.train.executables={folder} loads it, on {topology.name}')
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / 'plan.json'
  path.write_text(json.dumps(record, indent=2) + '\n')
  print(bucket.address(path))
  return results


def _search(config, topology, result: dict, examine) -> list[dict]:
  """Other settings of a train step that does not fit, each compiled and told in a line, up to the first that fits."""
  changes, tried = search.nearest(config, topology, result['memory'], lambda other: examine(other, 'train'),
                                  config.plan.tries)
  for change, other in zip(changes, tried):
    print(f'  with {search.flags(change)}\n    {report.verdict(other)}')
  return [dict(settings=search.flags(change), **other) for change, other in zip(changes, tried)]


def verdict(results: list[dict], tried: list[dict]) -> str:
  """The sentence at the end."""
  wrong = [result['program'] for result in results if not result['fits']]
  if not wrong:
    return f'verdict: {", ".join(result["program"] for result in results)} fit' + ('s' if len(results) == 1 else '')
  text = f'verdict: {" and ".join(wrong)} {"does" if len(wrong) == 1 else "do"} not fit'
  fitting = [each for each in tried if each['fits']]
  if fitting:
    return f'{text}; with {fitting[0]["settings"]} train fits, {report.size(_spare(fitting[0]))} to spare'
  return text + (f'; none of the {len(tried)} other settings that were compiled does' if tried else '')


def _spare(result: dict) -> int:
  return result['memory']['usable'] - result['memory']['total']
