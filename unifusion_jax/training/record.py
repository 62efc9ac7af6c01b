"""The record of a run in its workdir: the configuration it was started with, and comparisons with another.

A run is known by what it reads, not by where that lies: `files` in config.json holds a fingerprint of each folder, and
one spelling of its path is as good as another.
"""

from collections.abc import Iterable
import dataclasses
import hashlib
import json
import os
import pathlib
import struct
import uuid

from unifusion_jax import bucket, sharding
from unifusion_jax.data import rewrites
from unifusion_jax.data.config import SCENES
from unifusion_jax.errors import UserError
from unifusion_jax.weights import hub, lora_files

# Groups and settings that do not change what is trained: how a run computes, keeps its books, samples and measures.
# `step.rescheduled` follows a change of train.steps and train.minutes.
BOOKKEEPING = ('devices', 'mesh', 'vlm_cache', 'train', 'sample', 'rewrite', 'plan', 'demo', 'inspect', 'eval',
               'recipe', 'data.workers', 'data.skipped', 'data.held_out', 'optim.accumulate')
COMPUTING = ('dtype', 'remat')  # fields of a model that change how it is computed, not what
PATHS = ('vlm', 'vae', 'init', 'data.path', 'data.rewrites')  # compared by fingerprint
TOKENIZER = ('tokenizer.json', 'tokenizer.model', 'tokenizer_config.json', 'chat_template.jinja')
_END = 1 << 14    # bytes at both ends of a file of records that its fingerprint covers
_MIDDLE = 1 << 8  # bytes in the middle of a tensor that the fingerprint of weights covers


def pin(config, workdir: pathlib.Path, *names: str) -> None:
  """Puts a local folder in the place of each hub id and address, for all processes; they call this together, once.

  A run that goes on keeps the commits of its start, which are in its config.json.
  """
  before = _read(workdir) or {}
  for name in names:
    value, known = getattr(config, name), str(before.get(name, ''))
    if known in (value, str(pathlib.Path(value).expanduser())) and not bucket.is_address(value):
      setattr(config, name, known)
      continue
    pinned = hub.pin(known if known.partition('@')[0] == value else value)
    setattr(config, name, str(pinned.folder))
    if pinned.commit or bucket.is_address(value):
      config.hub[name] = pinned.name


def claim(config, workdir: pathlib.Path) -> dict | None:
  """Writes config.json into the workdir; UserError when it holds a run that trains something else.

  All processes call this together. `init` is looked for only by a run without a checkpoint; one that goes on keeps that
  of its start.

  Returns:
    The `steps` and `minutes` that a run which goes on was planned for; None for a new run.
  """
  with sharding.together('read the record of the run'):
    before, reached = _read(workdir), _reached(workdir)
    goes_on = before is not None and reached is not None
  if config.init and not goes_on:
    pin(config, workdir, 'init')
  with sharding.together('compare the configuration with that of the run'):
    files = fingerprints(config) | _fingerprints_of_data(config)
    more, planned = {}, None
    if goes_on:
      starts = 'init' not in config.objective.pretrained  # and is not read again
      _refuse(workdir, [*_changes(config, before, files, lambda name: not _is_bookkeeping(name)),
                        *(_change_of_init(config, before) if starts else [])])
      if not config.train.minutes and config.train.steps < reached:
        raise UserError(f'train.steps={config.train.steps} is less than the {reached} steps that the run in '
                        f'{bucket.address(workdir)} has done: give that number or more')
      if starts:
        config.init = before.get('init')
        files |= {'init': value for name, value in before.get('files', {}).items() if name == 'init'}
      planned = _planned(_filled(before, _defaults(config)), reached)
      if planned['minutes'] != config.train.minutes:
        more = dict(earlier=dict(until=reached, minutes=planned['minutes']))
    elif config.init and 'init' not in files:
      files['init'] = fingerprint(hub.resolve(config.init))
  write(config, workdir, 'config.json', files=files, **more)
  return planned


def check_same_model(config, workdir: pathlib.Path) -> None:
  """UserError when the workdir's run has another model, VLM or autoencoder than `config`; for all processes."""
  def matters(name):
    model = name.split('.')[0] in ('model', 'taps') and name.split('.')[-1] not in COMPUTING
    adapters = name.startswith('objective.lora.') and name.split('.')[-1] in ('rank', 'alpha', 'targets')
    return model or adapters or name in ('objective.repa_weight', 'objective.reference_latents')
  with sharding.together('compare the model with that of the run'):
    before = _read(workdir)
    if before is not None and _reached(workdir) is not None:
      _refuse(workdir, _changes(config, before, fingerprints(config), matters))


def write(config, workdir: pathlib.Path, name: str, **more) -> None:
  """The configuration as a JSON file of the workdir, whole or not at all; the first of several processes writes it."""
  part = workdir / f'{name}.{uuid.uuid4().hex[:8]}.part'  # two that sample beside each other write one name
  with sharding.together(f'write {workdir / name}'):
    if sharding.is_main_process():
      try:
        workdir.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(_as_dict(config) | more, indent=2, sort_keys=True) + '\n')
        os.replace(part, workdir / name)
        bucket.flush(workdir)
      finally:
        part.unlink(missing_ok=True)


def fingerprints(config) -> dict[str, str]:
  """{setting: fingerprint} of the weights and tokenizers that the objective reads, the same wherever they lie."""
  weights = {name: fingerprint(hub.resolve(getattr(config, name))) for name in config.objective.pretrained}
  folders = {name: hub.resolve(getattr(config, name), weights=False) for name in config.objective.tokenizers}
  return weights | {name: _digest(folder / file for file in TOKENIZER) for name, folder in folders.items()}


def differences(there: dict, now: dict, matters=lambda name: True) -> list[str]:
  """A line for each setting that differs and matters, by its dotted name: 'optim.clip: 0.5 there, 1.0 now'."""
  return [f'{name}: {old!r} there, {new!r} now' for name, old, new in _different(there, now) if matters(name)]


def steps(workdir: pathlib.Path) -> list[int]:
  """The steps of a workdir's checkpoints, in order."""
  folder = bucket.address(workdir / 'checkpoints')
  with bucket.sentences(folder):
    folders = [step for step in folder.glob('*') if step.name.isdigit()]
    if bucket.is_address(folder):  # where no folder is renamed, orbax marks one that is whole
      folders = [step for step in folders if (step / 'commit_success.txt').exists()]
    return sorted(int(step.name) for step in folders)


def _read(workdir: pathlib.Path) -> dict | None:
  """config.json of a workdir, None where there is none; UserError for a damaged one."""
  path = workdir / 'config.json'
  try:
    settings = json.loads(path.read_bytes())
  except FileNotFoundError:
    return None
  except (ValueError, RecursionError) as error:
    settings = str(error)
  if not isinstance(settings, dict):
    raise UserError(f'{bucket.address(path)}, the record of the run, is damaged ({str(settings)[:80]}): put a copy of '
                    'it there, or remove it, and the next training writes it anew without a comparison')
  return settings


def _reached(workdir: pathlib.Path) -> int | None:
  """The step of the newest checkpoint."""
  return max(steps(workdir), default=None)


def _planned(before: dict, reached: int) -> dict:
  """Steps and minutes of the plan under which the newest checkpoint was written.

  A run that was stopped before its first checkpoint under a new plan has the minutes of the plan before as `earlier`.
  """
  earlier = before.get('earlier', dict(until=-1))
  return dict(steps=before['train']['steps'],
              minutes=earlier['minutes'] if reached <= earlier['until'] else before['train']['minutes'])


def _is_bookkeeping(name: str) -> bool:
  return name.startswith('model.') and name.endswith('.remat') or any(
      name == free or name.startswith(f'{free}.') for free in BOOKKEEPING)


def _refuse(workdir: pathlib.Path, changes: list[str]) -> None:
  if changes:
    raise UserError(f'{bucket.address(workdir)} holds a run with another configuration; give another --workdir, or '
                    'remove that one.\n  ' + '\n  '.join(changes))


def _changes(config, before: dict, files: dict[str, str], matters) -> list[str]:
  """Lines as of `differences` between the run of config.json and `config`: settings that matter, and files."""
  now, defaults = (json.loads(json.dumps(settings, default=dataclasses.asdict))
                   for settings in (_as_dict(config), _defaults(config)))
  there = _filled(before, defaults)  # a setting that is younger than the run had the effect of its default
  lines = differences(there, now, lambda name: matters(name) and name not in PATHS
                      and name.partition('.')[0] not in ('files', 'earlier'))
  recorded = before.get('files', {})
  for name in ('vlm', 'vae', 'init', 'data.path', 'data.rewrites'):
    old, new, spelled, spelled_now = recorded.get(name), files.get(name), _at(there, name), _at(now, name)
    if name in ('vlm', 'vae', 'init'):
      same = new is None or (old[:len(new)] == new[:len(old)] if old else spelled == spelled_now)
    elif not matters(name) or spelled == spelled_now:  # a list in its place may have been mended
      same = True
    else:  # the loader knows how many records there were, if nothing else
      same = not {spelled, spelled_now} & {None, *SCENES} and (None in (old, new) or old == new)
    if not same:
      lines.append(f'{name}: {spelled!r} there, {spelled_now!r} now, whose files are others')
  return lines


def _change_of_init(config, before: dict) -> list[str]:
  """A line where `init` names other weights than the run began with, and they are there to tell."""
  there, old = before.get('init'), before.get('files', {}).get('init')
  if config.init in (None, there):
    return []
  if there is None:
    return [f'init: None there, {config.init!r} now; a run goes on from its own checkpoint']
  folder = pathlib.Path(config.init).expanduser()
  if old is None or not folder.is_dir() or fingerprint(folder) == old:
    return []
  return [f'init: {there!r} there, {config.init!r} now, whose files are others']


def fingerprint(folder: pathlib.Path) -> str:
  """`hub.fingerprint` of a folder or file and a digest of the middle of every tensor: two finetunes may end alike."""
  digest = hashlib.sha256()
  for path in [folder] if folder.is_file() else sorted(folder.glob('*.safetensors')):
    with path.open('rb') as file:
      try:
        length, = struct.unpack('<Q', file.read(8))
        header = json.loads(file.read(length if length < 10 ** 8 else 0))
        places = sorted(facts['data_offsets'] for name, facts in header.items() if name != '__metadata__')
      except (struct.error, ValueError, TypeError, KeyError, AttributeError):
        places = ()  # damaged, as whoever reads it will say
        length = 0
      for start, end in places:
        file.seek(8 + length + max(start, (start + end - _MIDDLE) // 2))
        digest.update(file.read(min(_MIDDLE, end - start)))
  return hub.fingerprint(folder) + digest.hexdigest()[:16]


def contents(pipeline, loras: Iterable[str]) -> dict:
  """What the images of a pipeline's parts (`parts.Parts`) and LoRAs, as of `sample.loras`, depend on.

  Weights by their commit on the hub or their fingerprint; of LoRAs their scale and alpha too.
  """
  content = lambda pinned: pinned.name if pinned.commit else fingerprint(pinned.folder)
  adapters = [(lora_files.locate(name), scale) for name, scale in map(lora_files.split, loras)]
  return {name: content(getattr(pipeline, name)) for name in ('transformer', 'vlm', 'vae')} | dict(
      loras=[dict(file=fingerprint(file), settings=lora_files.settings_of(file), scale=scale)
             for file, scale in adapters])


def _fingerprints_of_data(config) -> dict[str, str]:
  """{setting: fingerprint} of the records and rewrites on disk that a run is made of."""
  prints = {}
  rewritten = config.data.rewrites and str(rewrites.local(config.data.rewrites))
  for name, setting in (('data.path', config.data.path), ('data.rewrites', rewritten)):
    path = pathlib.Path(setting or '').expanduser()
    if setting and setting not in SCENES and path.exists():
      prints[name] = _digest(sorted(file for file in path.rglob('*') if file.suffix != '.lock') or [path])
  return prints


def _digest(files: Iterable[pathlib.Path]) -> str:
  """Digest of the sizes and both ends of those files that exist."""
  digest = hashlib.sha256()
  for path in files:
    if path.is_file():
      with path.open('rb') as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(f'{size} '.encode())
        for start in sorted({0, max(0, size - _END)}):
          file.seek(start)
          digest.update(file.read(_END))
  return digest.hexdigest()[:16]


def _as_dict(config) -> dict:
  """The configuration as nested dicts; a folder from the hub is written as its id and commit, the same on any host."""
  settings = dataclasses.asdict(config)
  return settings | settings.pop('hub')


def _defaults(config) -> dict:
  """The defaults of all settings that have one, as nested dicts."""
  defaults = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      defaults[field.name] = _defaults(value)
    elif field.default is not dataclasses.MISSING:
      defaults[field.name] = field.default
    elif field.default_factory is not dataclasses.MISSING:
      defaults[field.name] = field.default_factory()
  return defaults


def _filled(settings: dict, defaults: dict) -> dict:
  """Nested settings with the defaults of those that are missing."""
  inner = {name: _filled(value, defaults[name]) for name, value in settings.items()
           if isinstance(value, dict) and isinstance(defaults.get(name), dict)}
  return {name: value for name, value in defaults.items() if name != 'hub'} | settings | inner


def _at(settings: dict, name: str):
  for part in name.split('.'):
    settings = (settings or {}).get(part)
  return settings


def _different(there: dict, now: dict, prefix: str = ''):
  for name in sorted(there.keys() | now.keys()):
    old, new = there.get(name), now.get(name)
    if isinstance(old, dict) and isinstance(new, dict):
      yield from _different(old, new, f'{prefix}{name}.')
    elif old != new:
      yield prefix + name, old, new
