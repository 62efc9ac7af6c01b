"""The record of a run in its workdir: the configuration it was started with, and comparisons with another."""

import dataclasses
import json
import os
import pathlib

from unifusion_jax import sharding
from unifusion_jax.errors import UserError
from unifusion_jax.weights import hub

COMPUTING = ('dtype', 'remat')  # fields of a model that change how it is computed, not what


def pin(config, workdir: pathlib.Path, *names: str) -> None:
  """Puts the folder of one commit in the place of each hub id, for all processes; they call this together, once.

  A run that goes on keeps the commits of its start, which are in its config.json.
  """
  path = workdir / 'config.json'
  before = json.loads(path.read_text()) if path.exists() else {}
  for name in names:
    value, known = getattr(config, name), str(before.get(name, ''))
    if known in (value, str(pathlib.Path(value).expanduser())):
      setattr(config, name, known)  # a folder, which may be gone where nothing reads it any more
      continue
    pinned = hub.pin(known if known.partition('@')[0] == value else value)
    setattr(config, name, str(pinned.folder))
    if pinned.commit:
      config.hub[name] = pinned.name


def claim(config, workdir: pathlib.Path) -> None:
  """Writes config.json into the workdir; UserError when it holds a run with another configuration.

  How a run samples, evaluates and keeps its books may change; what it trains may not.
  """
  free = ('sample', 'rewrite', 'eval', 'devices', 'mesh', 'vlm_cache')
  bookkeeping = ('data.workers', 'data.held_out', 'train.log_every', 'train.save_every', 'train.preview_every',
                 'train.held_out_every')
  _compare(config, workdir, lambda name: name.split('.')[0] not in free and name not in bookkeeping)
  write(config, workdir, 'config.json', files=fingerprints(config))


def check_same_model(config, workdir: pathlib.Path) -> None:
  """UserError when the workdir's run has another model, VLM or autoencoder than `config`."""
  def matters(name):
    model = name.split('.')[0] in ('model', 'vlm', 'vae', 'taps', 'files') and name.split('.')[-1] not in COMPUTING
    return model or name == 'objective.repa_weight'
  _compare(config, workdir, matters)


def write(config, workdir: pathlib.Path, name: str, **more) -> None:
  """The configuration as a JSON file of the workdir, whole or not at all; the first of several processes writes it."""
  if sharding.is_main_process():
    workdir.mkdir(parents=True, exist_ok=True)
    part = workdir / f'{name}.part'
    part.write_text(json.dumps(_as_dict(config) | more, indent=2, sort_keys=True) + '\n')
    os.replace(part, workdir / name)


def fingerprints(config) -> dict[str, str]:
  """{name: fingerprint} of the folders that the objective reads, so that other weights at the same path are noticed."""
  return {name: hub.fingerprint(hub.resolve(getattr(config, name))) for name in config.objective.pretrained}


def _as_dict(config) -> dict:
  """The configuration as nested dicts; a folder from the hub is written as its id and commit, the same on any host."""
  settings = dataclasses.asdict(config)
  return settings | settings.pop('hub')


def differences(there: dict, now: dict, matters=lambda name: True) -> list[str]:
  """A line for each setting that differs and matters, by its dotted name: 'optim.clip: 0.5 there, 1.0 now'."""
  return [f'{name}: {old!r} there, {new!r} now' for name, old, new in _different(there, now) if matters(name)]


def _different(there: dict, now: dict, prefix: str = ''):
  for name in sorted(there.keys() | now.keys()):
    old, new = there.get(name), now.get(name)
    if isinstance(old, dict) and isinstance(new, dict):
      yield from _different(old, new, f'{prefix}{name}.')
    elif old != new:
      yield prefix + name, old, new


def _compare(config, workdir: pathlib.Path, matters) -> None:
  path = workdir / 'config.json'
  if not (path.exists() and any(step.name.isdigit() for step in (workdir / 'checkpoints').glob('*'))):
    return  # nothing was trained there
  old, new = json.loads(path.read_text()), json.loads(json.dumps(_as_dict(config))) | dict(files=fingerprints(config))
  changes = differences(old, new, matters)
  if changes:
    raise UserError(f'{workdir} holds a run with another configuration; give another --workdir, or remove that one.\n  '
                    + '\n  '.join(changes))
