"""unifusion.json in a transformer's folder: the VLM, autoencoder and settings of its pipeline."""

import dataclasses
import json
import os
import pathlib
import posixpath

from unifusion_jax import json_file, ranges, sharding, verifi
from unifusion_jax.data import transforms
from unifusion_jax.errors import UserError
from unifusion_jax.ranges import Range
from unifusion_jax.request import SampleConfig

ASSETS = pathlib.Path(__file__).parent / 'assets' / 'tiny'
FILE = 'unifusion.json'


@dataclasses.dataclass(frozen=True)
class Description:
  """Contents of unifusion.json: a pipeline's parts and settings beside its transformer.

  Attributes:
    vlm, vae: a path relative to the folder ('./x', '../x') or absolute, a hub id, or 'tiny' for the embedded model.
    taps: layers of the VLM that LAP pools.
    size: default image size: the side of a square, in pixels.
    max_prompt_tokens, max_rewrite_tokens: token budgets of a prompt without its images, and of a rewrite.
    system: system prompt of training, a name in verifi.SYSTEM or a text.
    tiles: maximum tiles of a reference in training.
    sample: defaults of SampleConfig.
    layout: of requests without VERIFI, a name in verifi.LAYOUTS.
  """
  vlm: str
  vae: str
  taps: tuple[int, ...]
  size: int
  max_prompt_tokens: int
  max_rewrite_tokens: int
  system: str = 'rewrite'
  tiles: int = 1
  sample: dict = dataclasses.field(default_factory=dict)
  layout: str = 'verifi'


def read(folder: pathlib.Path) -> Description:
  """unifusion.json of a folder; UserError where it is missing or wrong."""
  path = pathlib.Path(folder) / FILE
  if not path.exists():
    raise UserError(f'{folder} has no {FILE}, which names the VLM and the autoencoder of this model and how '
                    'they are used: --mode=export and description.save write it')
  values = json_file.read(path)
  fields = dataclasses.fields(Description)
  required = [field.name for field in fields
              if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING]
  kinds = dict(taps=(list, 'a list'), sample=(dict, 'an object'))
  kinds |= {name: (int, 'a whole number') for name in ('size', 'tiles', 'max_prompt_tokens', 'max_rewrite_tokens')}
  wrong = [f'{name} is missing' for name in required if name not in values]
  wrong += [f'{name} is not known' for name in values if name not in [field.name for field in fields]]
  for name, value in values.items():
    kind, noun = kinds.get(name, (str, 'a text'))
    if not isinstance(value, kind) or value in ('', [], 0):
      wrong.append(f'{name}={value!r} must be {noun}')
  if not wrong:
    try:
      wrong = SampleConfig().changed(**values.get('sample', {})).problems()
    except UserError as error:
      wrong = [f'sample: {error}']
  if not wrong:
    described, tokens = Description(**values | dict(taps=tuple(values['taps']))), Range(1, 10 ** 6)
    wrong = ranges.problems(described, '', taps=Range(0, 1000), size=Range(1, 10 ** 4), tiles=Range(1, 1000),
                            max_prompt_tokens=tokens, max_rewrite_tokens=tokens)
    if described.layout not in verifi.LAYOUTS:
      wrong.append(f'layout={described.layout!r} must be one of {", ".join(map(repr, verifi.LAYOUTS))}')
  if wrong:
    raise UserError(f'{path}: {"; ".join(wrong)}')
  return described  # pyrefly: ignore[unbound-name]


def save(folder: str | os.PathLike, config) -> None:
  """Writes unifusion.json of a config.Config into the folder of its transformer."""
  folder, encoder = pathlib.Path(folder), transforms.prompt_encoder(config)
  vlm, vae = (config.hub.get(name) or _entry(getattr(config, name), folder) for name in ('vlm', 'vae'))
  description = Description(vlm, vae, config.taps, config.data.size, encoder.max_prompt, encoder.max_rewrite,
                            config.system, max(config.data.tiles), config.sample.settings(), config.layout)
  with sharding.together(f'write {folder / FILE}'):
    if sharding.is_main_process():
      folder.mkdir(parents=True, exist_ok=True)
      (folder / FILE).write_text(json.dumps(dataclasses.asdict(description), indent=2) + '\n')


def _entry(path: str, folder: pathlib.Path) -> str:
  """Entry of unifusion.json in `folder` for a VLM or autoencoder: relative to `folder` where it lies beside it."""
  place = pathlib.Path(path).expanduser()
  if not place.is_dir():
    return path  # a hub id
  place, folder = place.resolve(), folder.resolve()
  if place.parent == ASSETS.resolve():
    return 'tiny'
  return os.path.relpath(place, folder) if place.is_relative_to(folder.parent) else str(place)


def part_of(part: str, entry: str, name, folder: pathlib.Path) -> pathlib.Path | str:
  """Folder, hub id or address of the `part` ('vlm' or 'vae') that unifusion.json calls `entry`.

  name: the pipeline's folder, hub id or address as the user gave it; folder: its local folder.
  """
  if entry == 'tiny':
    return ASSETS / part
  local = pathlib.Path(name).expanduser().is_dir()
  # Of a hub id or an address a part that lies here may have been fetched in part
  if (local or not entry.startswith('.')) and (folder / entry).is_dir():
    return folder / entry
  if not entry.startswith('.'):
    return entry
  if local:
    index = folder / FILE if (folder / FILE).exists() else folder
    raise UserError(f'{index} has its {part} in {entry}, which is not there: put it there, or give {part}=FOLDER')
  repository, at, revision = str(name).partition('@')
  scheme, mark, repository = repository.rpartition('://')
  return scheme + mark + posixpath.normpath(posixpath.join(repository, entry)) + at + revision
