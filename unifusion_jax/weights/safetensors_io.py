"""safetensors files: read lazily by name and slice, written whole or not at all, several where one would be too large.

A pickle is never read: it runs any code that its author put there.
"""

import json
import os
import pathlib

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from unifusion_jax.errors import UserError

DTYPES = {'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16,
          'F8_E4M3': ml_dtypes.float8_e4m3fn, 'F8_E5M2': ml_dtypes.float8_e5m2, 'BOOL': np.bool_,
          'I64': np.int64, 'I32': np.int32, 'I16': np.int16, 'I8': np.int8,
          'U64': np.uint64, 'U32': np.uint32, 'U16': np.uint16, 'U8': np.uint8}
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')


class Tensor:
  """One tensor of an open safetensors file; indexing reads that slice and nothing else."""

  def __init__(self, file, name: str):
    self._slice = file.get_slice(name)
    self.shape = tuple(self._slice.get_shape())
    kind = self._slice.get_dtype()
    if kind not in DTYPES:
      raise UserError(f'{name} is of type {kind}, which is not read here: take a release in one of {", ".join(DTYPES)}')
    self.dtype = np.dtype(DTYPES[kind])

  def __getitem__(self, index) -> np.ndarray:
    return np.asarray(self._slice[index])


def read(path) -> dict[str, Tensor]:
  """The tensors of a .safetensors file, or of a folder that holds one or an index of several. Reads headers only."""
  path = pathlib.Path(path)
  if not path.exists():
    raise UserError(f'{path}: no such file or folder; download the checkpoint first and give its local path')
  files = sorted(path.iterdir()) if path.is_dir() else [path]
  indexes = [f for f in files if f.name.endswith('.safetensors.index.json')]
  singles = [f for f in files if f.suffix == '.safetensors']
  if not indexes and not singles:
    pickles = [f.name for f in files if f.suffix in PICKLES]
    if pickles:
      raise UserError(f'{path}: {", ".join(pickles)} is a pickle, and reading a pickle runs any code that its author '
                       'put there; convert it to safetensors in a place you trust, or take a safetensors release')
    raise UserError(f'{path}: found no .safetensors file')
  if len(indexes) > 1 or not indexes and len(singles) > 1:
    names = [f.name for f in indexes or singles]
    raise UserError(f'{path}: several checkpoints in one folder ({", ".join(names)}); give the path of one file')
  if not indexes:
    return _read_file(singles[0])
  places = json.loads(indexes[0].read_text())['weight_map']
  tensors, problems = {}, []
  for name in sorted(set(places.values())):
    if not (path / name).exists():
      problems.append(f'{name} is not in the folder')
      continue
    shard = _read_file(path / name)
    # The index may list a tensor under a second name that no shard holds
    listed = {tensor for tensor, file in places.items() if file == name}
    problems += [f'{tensor} in {name} is not in the index, or is in it under another file'
                 for tensor in sorted(shard.keys() - listed)]
    tensors |= shard
  if problems:
    raise UserError(f'{indexes[0]} does not match its files; download the checkpoint again:\n  '
                     + '\n  '.join(problems))
  return tensors


def _read_file(path: pathlib.Path) -> dict[str, Tensor]:
  try:
    file = safetensors.safe_open(path, framework='np')
    return {name: Tensor(file, name) for name in file.keys()}
  except safetensors.SafetensorError as e:
    raise UserError(f'{path} ({path.stat().st_size} bytes) is truncated or is no safetensors file ({e}); '
                     'download it again') from e


def shards(sizes: dict[str, int], stem: str, most: int) -> dict[str, list[str]]:
  """{file: names of its tensors}, in order, with up to `most` bytes a file; a larger tensor has a file of its own.

  Named as transformers and diffusers name them: stem.safetensors, or stem-00001-of-00003.safetensors and so on.
  """
  groups, free = [[]], most
  for name, size in sizes.items():
    if groups[-1] and size > free:
      groups.append([])
      free = most
    groups[-1].append(name)
    free -= size
  count = len(groups)
  names = [f'{stem}.safetensors'] if count == 1 else [
      f'{stem}-{i:05d}-of-{count:05d}.safetensors' for i in range(1, count + 1)]
  return dict(zip(names, groups))


def index(files: dict[str, list[str]], total: int) -> str:
  """The text of stem.safetensors.index.json."""
  places = {tensor: file for file, tensors in files.items() for tensor in tensors}
  return json.dumps({'metadata': {'total_size': total}, 'weight_map': places}, indent=2) + '\n'


def write(path, tensors: dict[str, np.ndarray]) -> None:
  """Writes one .safetensors file, whole or not at all. `format: pt`, because transformers requires it."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(path.name + '.part')
  # Contiguous first: safetensors silently writes the memory of a transposed view in the wrong order.
  tensors = {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in tensors.items()}
  safetensors.numpy.save_file(tensors, part, metadata={'format': 'pt'})
  os.replace(part, path)
