"""The record of a run in its workdir: the configuration it was started with, and comparisons with another."""

import dataclasses
import json
import os
import pathlib

from unifusion_jax import sharding
from unifusion_jax.errors import UserError
from unifusion_jax.weights import hub

COMPUTING = ('dtype', 'remat')  # fields of a model that change how it is computed and not the result
FORMER = ('unroll',)  # fields of COMPUTING in the files of older runs


def claim(config, workdir: pathlib.Path) -> None:
  """Writes config.json into the workdir; UserError when a run with another configuration lives there.

  How a run samples and evaluates may change; what it trains may not.
  """
  free = ('sample', 'rewrite', 'eval', 'devices', 'mesh')
  _compare(config, workdir, lambda name: name.split('.')[0] not in free)
  write(config, workdir, 'config.json', files=fingerprints(config))


def check_same_model(config, workdir: pathlib.Path) -> None:
  """UserError when the workdir's run trained another model than `config`'s, or under another VLM or autoencoder."""
  def matters(name):
    model = name.split('.')[0] in ('model', 'vlm', 'vae', 'taps', 'files') and name.split('.')[-1] not in COMPUTING
    return model or name == 'objective.repa_weight'
  _compare(config, workdir, matters)


def write(config, workdir: pathlib.Path, name: str, **more) -> None:
  """Writes the configuration as a JSON file of the workdir, whole or not at all, on the first process only."""
  if sharding.is_main_process():
    workdir.mkdir(parents=True, exist_ok=True)
    part = workdir / f'{name}.part'
    part.write_text(json.dumps(dataclasses.asdict(config) | more, indent=2, sort_keys=True) + '\n')
    os.replace(part, workdir / name)


def fingerprints(config) -> dict[str, str]:
  """{name: fingerprint} of the folders that the objective reads, so that other weights at the same path are noticed."""
  folders = {name: pathlib.Path(getattr(config, name)) for name in config.objective.pretrained}
  return {name: hub.fingerprint(folder) for name, folder in folders.items() if folder.is_dir()}


def differences(old: dict, new: dict, prefix: str = ''):
  """(dotted name, old value, new value) of each leaf in which two nested dicts differ."""
  for name in sorted(old.keys() | new.keys()):
    a, b = old.get(name), new.get(name)
    if isinstance(a, dict) and isinstance(b, dict):
      yield from differences(a, b, f'{prefix}{name}.')
    elif a != b:
      yield prefix + name, a, b


def _compare(config, workdir: pathlib.Path, matters) -> None:
  path = workdir / 'config.json'
  if not (path.exists() and any(step.name.isdigit() for step in (workdir / 'checkpoints').glob('*'))):
    return  # nothing was trained there
  new = json.loads(json.dumps(dataclasses.asdict(config))) | dict(files=fingerprints(config))
  old = json.loads(path.read_text())
  differ = [f'{name}: {before!r} there, {now!r} now' for name, before, now in differences(old, new)
            if matters(name) and name.split('.')[-1] not in FORMER]
  if differ:
    raise UserError(f'{workdir} holds a run with another configuration; give another --workdir, or remove that one.\n  '
                    + '\n  '.join(differ))
