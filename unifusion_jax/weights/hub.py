"""Checkpoint names to folders: a local folder, or a hub id or a gs:// address, which are fetched into a cache.

A hub id is `owner/name`, `owner/name/subfolder` or either with `@revision` (a branch, a tag or, to pin it for good, a
commit). Only data is ever fetched: safetensors, JSON, chat templates and the tokenizer's files. No code, no pickles.
Offline mode, the cache's place and access tokens are `huggingface_hub`'s own: HF_HUB_OFFLINE, HF_HOME, HF_TOKEN.
"""

import dataclasses
import fnmatch
import functools
import hashlib
import os
import pathlib
import re

import jax
from jax.experimental import multihost_utils
import numpy as np

from unifusion_jax import bucket, sharding
from unifusion_jax.errors import UserError
from unifusion_jax.weights.safetensors_io import PICKLES

TEXTS = ('*.json', '*.jinja', '*.txt', '*.model')  # configs, chat templates and all kinds of tokenizer files
WEIGHTS = ('*.safetensors',)
# The same weights in another precision (model.fp16.safetensors) or another layout: not fetched if there are plain ones
VARIANTS = ('*.*.safetensors', 'consolidated*.safetensors')
_TAIL = 1 << 20  # bytes at the end of a weights file that its fingerprint covers
_ID = re.compile(r'([\w.-]+/[\w.-]+)((?:/[\w.-]+)*?)(?:@([\w./-]+))?')
_INTERNVL = re.compile(r'(?:OpenGVLab/)?(InternVL\d)\.(\d.*)')  # as its papers spell it


@dataclasses.dataclass(frozen=True)
class Pinned:
  """A resolved checkpoint name."""
  name: str             # a hub id at its commit, the same at all times and places; or the local folder, or the address
  folder: pathlib.Path  # on this host; or the file
  commit: str           # '' for a folder, here or in a bucket, which has a `fingerprint` instead


def pin(name: str | os.PathLike, weights: bool = True, *, files: bool = False,
        variants: tuple[str, ...] = VARIANTS, dataset: tuple[str, ...] = ()) -> Pinned:
  """Resolves a name to one commit on all processes, which call this together, once for each name.

  Arguments and errors as of `resolve`. When one process fails all of them do.

  Args:
    files: whether the name may be that of one .safetensors file, here or as owner/name/FILE.safetensors.
    variants: patterns of weights that are left out where there are others.
    dataset: patterns of the files of a dataset, which is looked up in the place of a model.
  """
  look_up = functools.partial(_pinned, weights=weights, files=files, variants=variants, dataset=dataset)
  if jax.process_count() == 1:
    return look_up(name)
  # The first process looks the name up and the others take its commit: a branch may move between two look-ups
  first, pinned, error = sharding.is_main_process(), None, None
  try:
    pinned = look_up(name) if first else None
  except UserError as problem:
    error = problem
  commit = bytes.fromhex(pinned.commit) if pinned and pinned.commit else bytes(20)
  facts = np.frombuffer(bytes([pinned is not None, bool(pinned and pinned.commit)]) + commit, np.uint8)
  facts = np.asarray(multihost_utils.broadcast_one_to_all(facts))
  if facts[0] and not first:
    try:
      pinned = look_up(f'{str(name).partition("@")[0]}@{facts[2:].tobytes().hex()}' if facts[1] else name)
      if bool(pinned.commit) != bool(facts[1]):
        raise UserError(f'{name} is a local folder on some hosts and a hub id on others: make it the same on all')
    except UserError as problem:
      error = problem
  failed = np.flatnonzero(multihost_utils.process_allgather(np.array(error is not None)))
  if len(failed):
    raise error or UserError(f'{name}: process {failed[0]} has no such checkpoint, and its message says why')
  return pinned  # pyrefly: ignore[bad-return]


def resolve(name: str | os.PathLike, weights: bool = True) -> pathlib.Path:
  """The folder behind a name, downloaded first where it is a hub id or a gs:// address.

  Args:
    name: a folder that exists, a hub id, or an address.
    weights: False: only configuration and tokenizer are downloaded.

  Raises:
    UserError: when the name is neither, when the download fails (offline and not in the cache, unknown, gated), or when
      the folder holds no safetensors.
  """
  return _pinned(name, weights).folder


def _pinned(name: str | os.PathLike, weights: bool, files: bool = False, variants: tuple[str, ...] = VARIANTS,
            dataset: tuple[str, ...] = ()) -> Pinned:
  if dataset and bucket.is_address(name):
    raise UserError(f'{name}: the files of a set are read from a folder here or a dataset on the hub: copy them here')
  if str(name).startswith(bucket.SCHEMES):
    return Pinned(str(name), _of_bucket(str(name), weights), '')
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    return Pinned(str(name), path, '')
  if path.is_file() and not dataset:
    if files and path.suffix == '.safetensors':
      return Pinned(str(name), path, '')
    raise UserError(f'{path} is a file: give {"a .safetensors file, or " * files}the folder that holds it, with its '
                    'config.json')
  if version := _INTERNVL.fullmatch(str(name)):
    raise UserError(f'{name}: its name on the hub is OpenGVLab/{"_".join(version.groups())}: give that one')
  parts = _ID.fullmatch(str(name))
  if parts is None or str(name).startswith('.'):
    raise UserError(f'{name}: no such folder{" or file" * files}, and no hub id either, which is owner/name, '
                    f'owner/name/subfolder, {"owner/name/FILE.safetensors, " * files}or one of these with @revision')
  repository, subfolder, revision = parts[1], parts[2].strip('/'), parts[3]
  if dataset:
    place = f'{subfolder}/' * bool(subfolder)
    snapshot = _download(repository, revision, [place + pattern for pattern in dataset], [], 'dataset')
    return Pinned(f'{"/".join(filter(None, (repository, subfolder)))}@{snapshot.name}', snapshot / subfolder,
                  snapshot.name)
  if files and subfolder.endswith('.safetensors'):
    return _file_of(repository, subfolder, revision, weights)
  for left_out in (variants, ()):
    snapshot = _download_model(repository, subfolder, revision, TEXTS + WEIGHTS * weights, left_out)
    folder = snapshot / subfolder
    if not weights or any(folder.glob('*.safetensors')):
      break
  place = f'{repository}{f"/{subfolder}" if subfolder else ""}'
  label = f'{place}{f"@{revision}" if revision else ""}'
  if not folder.is_dir():
    raise UserError(f'{label}: that repository has no such subfolder')
  if weights:
    _check_weights(label, [file.name for file in folder.iterdir()])
  return Pinned(f'{place}@{snapshot.name}', folder, snapshot.name)  # huggingface_hub names a snapshot by its commit


def _file_of(repository: str, path: str, revision: str | None, weights: bool) -> Pinned:
  """One file of a repository, with the settings beside it; without weights these alone."""
  folder, _, file = path.rpartition('/')
  snapshot = _download_model(repository, folder, revision, (*TEXTS, *[file] * weights), ())
  if weights and not (snapshot / path).is_file():
    raise UserError(f'{repository}: that repository has no file {path}')
  return Pinned(f'{repository}/{path}@{snapshot.name}', snapshot / path, snapshot.name)


def _of_bucket(address: str, weights: bool) -> pathlib.Path:
  """A local copy of the files of a folder in a bucket."""
  there = bucket.names(address)
  if not there:
    raise UserError(f'{address}: there is no such folder in the bucket, or it is empty')
  if weights:
    _check_weights(address, there)
  wanted = [name for name in there if _matches(name, TEXTS + WEIGHTS * weights)]
  plain = [name for name in wanted if not _matches(name, VARIANTS)]
  whole = not weights or any(_matches(name, WEIGHTS) for name in plain)
  return bucket.fetched(address, plain if whole else wanted)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_weights(label: str, names: list[str]) -> None:
  """UserError for the files of a checkpoint when none is a safetensors file."""
  if not any(_matches(name, WEIGHTS) for name in names):
    pickles = sorted(name for name in names if pathlib.PurePath(name).suffix in PICKLES)
    contents = f' (it holds {", ".join(pickles)})' if pickles else ''
    raise UserError(f'{label} has no .safetensors file{contents}. A pickle (.bin, .pt, .pth, .ckpt) is never fetched '
                    'or read: reading one runs any code that its author put there. Take a safetensors release, or '
                    'convert it in a place you trust and give the local folder')


def fingerprint(folder: str | os.PathLike) -> str:
  """Hash of config.json, tokenizer and the ends of the weights files: the same wherever the folder, or file, lies."""
  folder, digest = pathlib.Path(folder), hashlib.sha256()
  for name in ('config.json', 'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json'):
    if (folder / name).exists():
      digest.update((folder / name).read_bytes())
  for path in [folder] if folder.is_file() else sorted(folder.glob('*.safetensors')):
    with path.open('rb') as file:
      file.seek(-min(path.stat().st_size, _TAIL), os.SEEK_END)
      digest.update(file.read())
  return digest.hexdigest()[:16]


def _download_model(repository: str, subfolder: str, revision: str | None, patterns: tuple[str, ...],
                    left_out: tuple[str, ...]) -> pathlib.Path:
  place = f'{subfolder}/' if subfolder else ''
  # The patterns' * also matches /: folders below are other models
  return _download(repository, revision, [place + pattern for pattern in patterns],
                   [place + pattern for pattern in ('*/*', *left_out)], 'model')


def _download(repository: str, revision: str | None, patterns: list[str], left_out: list[str], kind: str
              ) -> pathlib.Path:
  """A snapshot of a repository of a kind, 'model' or 'dataset'."""
  import huggingface_hub  # slow: half a second
  from huggingface_hub import errors
  label = f'{repository}{f" at {revision}" if revision else ""}'
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(
        repository, revision=revision, allow_patterns=patterns, ignore_patterns=left_out, repo_type=kind))
  except errors.IncompleteSnapshotError as error:
    raise UserError(f'{label}: its copy in the cache is not whole, and the rest cannot be fetched now; go online once '
                     '(unset HF_HUB_OFFLINE) to finish the download') from error
  except errors.LocalEntryNotFoundError as error:
    raise UserError(f'{label}: there is no such local folder, it is not in the cache of {_cache()}, and the hub '
                     'cannot be reached (offline mode, or no network): download it where there is a network, or give '
                     'a local folder') from error
  except errors.GatedRepoError as error:
    raise UserError(f'{label} is gated: accept its terms on its page, then set HF_TOKEN to your token') from error
  except errors.RevisionNotFoundError as error:
    raise UserError(f'{label}: the hub has that repository but not that revision') from error
  except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
    raise UserError(f'{label}: neither a local folder nor a repository on the hub (a private one needs HF_TOKEN)'
                     ) from error
  except errors.HfHubHTTPError as error:
    raise UserError(f'{label}: the hub answered with an error, try again later: {error}') from error


def _cache() -> str:
  from huggingface_hub import constants
  return constants.HF_HUB_CACHE
