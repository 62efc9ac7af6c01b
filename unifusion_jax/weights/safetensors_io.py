"""safetensors files: read lazily by name and slice, written whole or not at all, several where one would be too large.

A pickle is never read: it runs any code that its author put there. A matrix in fp8 is read times the scale that lies
beside it.
"""

import json
import os
import pathlib

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from unifusion_jax import json_file
from unifusion_jax.errors import UserError

FP8 = {'F8_E4M3': ml_dtypes.float8_e4m3fn, 'F8_E5M2': ml_dtypes.float8_e5m2,
       'F8_E4M3FNUZ': ml_dtypes.float8_e4m3fnuz, 'F8_E5M2FNUZ': ml_dtypes.float8_e5m2fnuz}
DTYPES = {'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, **FP8, 'BOOL': np.bool_,
          'I64': np.int64, 'I32': np.int32, 'I16': np.int16, 'I8': np.int8,
          'U64': np.uint64, 'U32': np.uint32, 'U16': np.uint16, 'U8': np.uint8}
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')
STEMS = ('model', 'diffusion_pytorch_model')  # of the plain checkpoint, as transformers and diffusers name it
# What the numbers of `X.weight` in fp8 are multiplied by, under the names of compressed-tensors and fbgemm, of
# DeepSeek's and Qwen's releases, and of ComfyUI's
SCALES = ('weight_scale', 'weight_scale_inv', 'scale_weight')
# Of the activations, which are never rounded to fp8 here
INPUT_SCALES = ('input_scale', 'input_scale_ub', 'activation_scale', 'scale_input')
BLOCK = 128  # rows and columns of a block that has a scale of its own, in all of these releases


class Tensor:
  """One tensor of a safetensors file; indexing reads that slice and nothing else."""

  def __init__(self, values, shape, dtype, path: pathlib.Path):
    self._values, self.shape, self.dtype, self.path = values, tuple(shape), np.dtype(dtype), path

  def __getitem__(self, index) -> np.ndarray:
    return np.asarray(self._values[index])


class Scaled:
  """A matrix in fp8 times its scale, in f32; indexed by one slice for each axis.

  On each axis of the matrix the scale has one number, one for each row (or column), or one for each BLOCK of them.
  """
  dtype = np.dtype(np.float32)

  def __init__(self, matrix: Tensor, scale: np.ndarray):
    self._matrix, self.shape, self.path = matrix, matrix.shape, matrix.path
    self._scale = scale.astype(np.float32).reshape(scale.shape + (1,) * (len(self.shape) - scale.ndim))
    self._places = [np.arange(n) // (n if count == 1 else 1 if count == n else BLOCK)
                    for n, count in zip(self.shape, self._scale.shape)]

  @staticmethod
  def fits(matrix: Tensor, scale: Tensor) -> bool:
    """Whether that is a scale of the matrix."""
    return len(scale.shape) <= len(matrix.shape) and all(
        count in (1, n, -(-n // BLOCK)) for n, count in zip(matrix.shape, scale.shape))

  def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
    scale = self._scale[np.ix_(*(place[i] for place, i in zip(self._places, index, strict=True)))]
    return self._matrix[index].astype(np.float32) * scale


def read(path) -> dict[str, Tensor | Scaled]:
  """The tensors of a .safetensors file, or of a folder that holds one or an index of several. Reads headers only."""
  return _scaled(stored(path))


def stored(path) -> dict[str, Tensor]:
  """As `read`, with fp8 matrices and their scales as they lie in the files."""
  path = pathlib.Path(path)
  if not path.exists():
    raise UserError(f'{path}: no such file or folder; download the checkpoint first and give its local path')
  files = sorted(path.iterdir()) if path.is_dir() else [path]
  indexes = [f for f in files if f.name.endswith('.safetensors.index.json')]
  singles = [f for f in files if f.suffix == '.safetensors']
  plain = [f for stem in STEMS for f in indexes + singles
           if f.name in (f'{stem}.safetensors.index.json', f'{stem}.safetensors')]
  if plain:  # variants in other precisions and the original's consolidated.safetensors may lie beside it
    indexes, singles = [f for f in indexes if f == plain[0]], [f for f in singles if f == plain[0]]
  if not indexes and not singles:
    pickles = [f.name for f in files if f.suffix in PICKLES]
    if pickles:
      raise UserError(f'{path}: {", ".join(pickles)} is a pickle, and reading a pickle runs any code that its author '
                       'put there; convert it to safetensors in a place you trust, or take a safetensors release')
    raise UserError(f'{path}: found no .safetensors file')
  if len(indexes) > 1 or not indexes and len(singles) > 1:
    names = [f.name for f in indexes or singles]
    raise UserError(f'{path}: several checkpoints in one folder ({", ".join(names)}), and none is called '
                     f'{STEMS[0]}.safetensors: rename the one that is meant, or move the others elsewhere')
  if not indexes:
    return _read_file(singles[0])
  folder = indexes[0].parent
  places = json_file.read(indexes[0]).get('weight_map')
  if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
    raise UserError(f'{indexes[0]} has no weight_map of tensors to files: download it again')
  tensors, problems = {}, []
  for name in sorted(set(places.values())):
    if not (folder / name).exists():
      problems.append(f'{name} is not in the folder')
      continue
    shard = _read_file(folder / name)
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
  json_file.refuse_pointer(path)
  try:
    file = safetensors.safe_open(path, framework='np')
    parts = {name: file.get_slice(name) for name in file.keys()}
  except safetensors.SafetensorError as e:
    raise UserError(f'{path} ({path.stat().st_size} bytes) is truncated or is no safetensors file ({e}); '
                     'download it again') from e
  except OSError as e:
    raise UserError(f'{path} cannot be read: {e}') from e
  kinds = {name: part.get_dtype() for name, part in parts.items()}
  unknown = [f'{name} ({kind})' for name, kind in kinds.items() if kind not in DTYPES]
  if unknown:
    raise UserError(f'{path}: {", ".join(unknown[:3])}{" and others" * (len(unknown) > 3)} cannot be read here: take '
                    f'a release in one of {", ".join(DTYPES)}')
  mapped = _fp8(path) if any(kind in FP8 for kind in kinds.values()) else {}
  return {name: Tensor(mapped.get(name, part), part.get_shape(), DTYPES[kinds[name]], path)
          for name, part in parts.items()}


def _fp8(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The fp8 tensors of a sound file, as its own bytes: `safe_open` does not slice them for numpy."""
  raw = np.memmap(path, np.uint8, 'r')
  start = 8 + int.from_bytes(raw[:8].tobytes(), 'little')
  header = json.loads(raw[8:start].tobytes())
  return {name: raw[start:][slice(*facts['data_offsets'])].view(FP8[facts['dtype']]).reshape(facts['shape'])
          for name, facts in header.items() if facts.get('dtype') in FP8}


def _scaled(plain: dict[str, Tensor]) -> dict[str, Tensor | Scaled]:
  """The tensors with those in fp8 times their scales, which are left out then.

  Any other tensor of a quantised checkpoint is left in, where `convert.load` names it as one that no leaf uses.
  """
  tensors: dict = dict(plain)
  fp8 = {name: tensor for name, tensor in plain.items() if tensor.dtype in map(np.dtype, FP8.values())}
  for name, matrix in fp8.items():
    stem = name.removesuffix('weight')
    for scale in (stem + suffix for suffix in SCALES if stem + suffix in tensors and stem != name):
      if not Scaled.fits(matrix, tensors[scale]):
        raise UserError(f'{matrix.path}: {scale} {tensors[scale].shape} is no scale of {name} {matrix.shape}: wanted '
                        f'are one number, one a row, or one for each block of {BLOCK} x {BLOCK}; take a release in '
                        'bfloat16')
      tensors[name] = Scaled(matrix, tensors.pop(scale)[...])
    for suffix in INPUT_SCALES:
      tensors.pop(stem + suffix, None)
  if fp8:
    tensors.pop('scaled_fp8', None)  # says that the scales are there
  return tensors


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


def metadata(path) -> dict[str, str]:
  """The texts in the head of a .safetensors file that `read` has read."""
  with safetensors.safe_open(path, framework='np') as file:
    return file.metadata() or {}


def write(path, tensors: dict[str, np.ndarray], texts: dict[str, str] | None = None) -> None:
  """Writes one .safetensors file, whole or not at all, with `texts` in its head.

  `format: pt` is among these, because transformers requires it.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(path.name + '.part')
  # Contiguous first: safetensors silently writes the memory of a transposed view in the wrong order.
  tensors = {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in tensors.items()}
  safetensors.numpy.save_file(tensors, part, metadata={'format': 'pt'} | (texts or {}))
  os.replace(part, path)
