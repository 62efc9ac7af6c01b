"""Checkpoint names to folders: a local folder, or a hub id that `huggingface_hub` fetches into its cache.

A hub id is `owner/name`, `owner/name/subfolder` or either with `@revision` (a branch, a tag or, to pin it for good, a
commit). Only data is ever fetched: safetensors, JSON, chat templates and the tokenizer's files. No code, no pickles.
Offline mode, the cache's place and access tokens are `huggingface_hub`'s own: HF_HUB_OFFLINE, HF_HOME, HF_TOKEN.
"""

import hashlib
import os
import pathlib
import re

from unifusion_jax.errors import UserError

TEXTS = ('*.json', '*.jinja', '*.txt', '*.model')  # configs, chat templates and all kinds of tokenizer files
WEIGHTS = ('*.safetensors',)
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')
_TAIL = 1 << 20  # bytes of a file of weights that tell it from others
_ID = re.compile(r'([\w.-]+/[\w.-]+)((?:/[\w.-]+)*?)(?:@([\w./-]+))?')


def resolve(name: str | os.PathLike, revision: str | None = None, weights: bool = True) -> pathlib.Path:
  """The folder behind a name, downloaded first where it is a hub id.

  Args:
    name: a folder that exists, or a hub id.
    revision: of a hub id, as `@revision` in it; None: the id's own, else the main branch.
    weights: False leaves the weights where they are: configuration and tokenizer alone.

  Raises:
    ValueError: when it is neither, when the hub cannot give it (offline and not in the cache, unknown, gated), or when
      it holds no safetensors.
  """
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    if revision is not None:
      raise UserError(f'{path} is a local folder, which has no revision {revision!r}: leave the revision out')
    return path
  if path.is_file():
    raise UserError(f'{path} is a file: give the folder that holds it, with its config.json')
  found = _ID.fullmatch(str(name))
  if found is None or str(name).startswith('.'):
    raise UserError(f'{name}: no such folder, and no hub id either, which is owner/name, owner/name/subfolder, or '
                     'one of these with @revision')
  repository, subfolder, pinned = found[1], found[2].strip('/'), found[3]
  if revision is not None and pinned is not None and revision != pinned:
    raise UserError(f'{name} is pinned to {pinned!r} and revision={revision!r} asks for another: give one of them')
  revision = revision if revision is not None else pinned
  folder = _download(repository, subfolder, revision, TEXTS + WEIGHTS * weights) / subfolder
  here = f'{repository}{f"/{subfolder}" if subfolder else ""}{f"@{revision}" if revision else ""}'
  if not folder.is_dir():
    raise UserError(f'{here}: that repository has no such subfolder')
  if weights and not any(folder.glob('*.safetensors')):
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    seen = f' (it holds {", ".join(pickles)})' if pickles else ''
    raise UserError(f'{here} has no .safetensors file{seen}. A pickle (.bin, .pt, .pth, .ckpt) is never fetched or '
                     'read: reading one runs any code that its author put there. Take a safetensors release, or '
                     'convert it in a place you trust and give the local folder')
  return folder


def fingerprint(folder: pathlib.Path) -> str:
  """Hash of config.json, tokenizer and the ends of the weights files: the same wherever the folder lies."""
  digest = hashlib.sha256()
  for name in ('config.json', 'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json'):
    if (folder / name).exists():
      digest.update((folder / name).read_bytes())
  for path in sorted(folder.glob('*.safetensors')):
    with path.open('rb') as file:
      file.seek(-min(path.stat().st_size, _TAIL), os.SEEK_END)
      digest.update(file.read())
  return digest.hexdigest()[:16]


def _download(repository: str, subfolder: str, revision: str | None, patterns: tuple[str, ...]) -> pathlib.Path:
  import huggingface_hub  # takes half a second
  from huggingface_hub import errors
  place = f'{subfolder}/' if subfolder else ''
  asked = f'{repository}{f" at {revision}" if revision else ""}'
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(
        repository, revision=revision, allow_patterns=[place + pattern for pattern in patterns],
        ignore_patterns=[f'{place}*/*']))  # the patterns' * also matches /: folders below are other models
  except errors.IncompleteSnapshotError as error:
    raise UserError(f'{asked}: its copy in the cache is not whole, and the rest cannot be fetched now; go online once '
                     '(unset HF_HUB_OFFLINE) to finish the download') from error
  except errors.LocalEntryNotFoundError as error:
    raise UserError(f'{asked}: there is no such local folder, it is not in the cache of {_cache()}, and the hub '
                     'cannot be reached (offline mode, or no network): download it where there is a network, or give '
                     'a local folder') from error
  except errors.GatedRepoError as error:
    raise UserError(f'{asked} is gated: accept its terms on its page, then set HF_TOKEN to your token') from error
  except errors.RevisionNotFoundError as error:
    raise UserError(f'{asked}: the hub has that repository but not that revision') from error
  except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
    raise UserError(f'{asked}: neither a local folder nor a repository on the hub (a private one needs HF_TOKEN)'
                     ) from error
  except errors.HfHubHTTPError as error:
    raise UserError(f'{asked}: the hub answered with an error, try again later: {error}') from error


def _cache() -> str:
  from huggingface_hub import constants
  return constants.HF_HUB_CACHE
