"""Requests and sampling settings."""

import codecs
from collections.abc import Iterable, Sequence
import dataclasses
import difflib
import itertools
import numbers
import pathlib
import re
import types

import numpy as np

from unifusion_jax import ranges
from unifusion_jax.data import buckets
from unifusion_jax.errors import UserError
from unifusion_jax.fields import Path, Text
from unifusion_jax.ranges import Range

METHODS = ('euler', 'heun')
# Ranges of the numbers of a request and of the phases of sampling
LIMITS = dict(
    steps=Range(1, 10_000), guidance=Range(-1000, 1000), eta=Range(0, 1), shift=Range(0, 1000),
    temperature=Range(0, 100), top_p=Range(most=1, above=0), tiles=Range(0, 256), num_images=Range(1, 100_000),
    batch_size=Range(1, 65_536), decode_tile=Range(0, 65_536), width=Range(0, 65_536), height=Range(0, 65_536),
    start=Range(0, 1), t=Range(0, 1), first=Range(0))
STRENGTH = Range(0, 100)
MAX_REFERENCES = 10  # of an image, where their clean latents are tokens of the DiT: each is as many as the image
MAX_SIDE, MAX_PATCHES = 1024, 65_536  # latent patches along a side of an image, and in all: 4096 x 4096 at 16 pixels


@dataclasses.dataclass
class SampleConfig:
  """Sampling settings, and the requests of --mode=sample."""
  weights: Path | None = None       # checkpoint to use where the workdir holds no run; None: that of `init`
  loras: tuple[Path, ...] = ()      # LoRA files, folders or hub ids, merged into the weights; FILE:0.8 counts 0.8 times
  prompt: Text = ''                 # one request a line; @file.txt reads them from a file; @@ begins a prompt with @
  references: tuple[Path, ...] = ()  # image files, the same for every request; give the flag once for each
  rewrite: str | None = None        # text to condition on instead of the VLM's rewrite
  negative_prompt: Text = ''        # what guidance leads away from; '' for the empty text
  num_images: int = 1               # of each request
  seed: int = 0                     # of the first image, any whole number; every further image takes the next one
  width: int = 0                    # 0: the first reference's shape, else square
  height: int = 0
  batch_size: int = 32              # images sampled at a time
  verifi: bool = True               # False: condition on the request itself
  system: str | None = None         # another system prompt, a name in verifi.SYSTEM or a text
  temperature: float = 0.0          # of rewrites; 0: the most probable one; above 0 each seed samples its own
  top_p: float = 1.0                # of rewrites: share of probability that tokens are sampled from
  tiles: int = 0                    # maximum tiles of a reference; 0: as in training
  image_tokens: bool = True         # False: the VLM reads the references, but their tokens do not condition the DiT
  reference_latents: bool = False   # clean latents of the references are tokens of the DiT too, as it learned
  stitch: bool = False              # show all references as one image, side by side
  precise: Path | None = None       # image as large as the first reference: where it is not white, that stays
  strengths: tuple[float, ...] = ()  # how often each reference counts in the DiT's attention, in order; (): once
  steps: int = 24
  guidance: float = 3.0             # 1: off
  method: str = 'euler'             # or 'heun'
  eta: float = 0.0                  # 0: an ODE. Up to 1: new noise between Euler steps (flow.sample)
  shift: float = 1.0                # of the sampling times; 0: from the number of image tokens, as Krea 2
  decode_tile: int = 1024           # pixels: images of more than its square are decoded in such tiles; 0: undivided

  def settings(self) -> dict:
    """Sampling settings alone, without the fields of single requests and of the command line."""
    return {name: value for name, value in dataclasses.asdict(self).items() if name not in _PER_REQUEST}

  def changed(self, **values) -> 'SampleConfig':
    """A copy with other values, None for fields that stay; UserError for an unknown name or a wrong type."""
    values = {name: value for name, value in values.items() if value is not None}
    defaults = {field.name: field.default for field in dataclasses.fields(self)}
    for name, value in values.items():
      if name not in defaults:
        near = difflib.get_close_matches(name, defaults, 1)
        hint = f'did you mean {near[0]!r}?' if near else f'there are {", ".join(self.settings())}'
        raise UserError(f'there is no setting {name!r}: {hint}')
      kind, noun = _KINDS.get(type(defaults[name]), (str, 'a text'))
      if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f'{name}={value!r} must be {noun}')
      if isinstance(value, np.generic):
        values[name] = value.item()  # as metadata has it
      if isinstance(value, list):
        values[name] = tuple(value)
    return dataclasses.replace(self, **values)

  def problems(self, unit: int = 1, prefix: str = 'sample.') -> list[str]:
    """Values out of range, one sentence each. `unit`: pixels that both sides must be multiples of."""
    names = [field.name for field in dataclasses.fields(self) if field.name in LIMITS]
    checks = {f'{prefix}{name}={side} must be a multiple of {unit} pixels (a latent patch), as '
              f'{max(unit, (side + unit // 2) // unit * unit)} is': side % unit == 0
              for name, side in (('width', self.width), ('height', self.height))}
    checks |= {
        f"{prefix}method={self.method!r} must be 'euler' or 'heun'": self.method in METHODS,
        f'{prefix}eta={self.eta} renews noise between Euler steps only: set it to 0 with {prefix}method=heun, or take '
        'euler': not (self.eta and self.method == 'heun'),
        f'{prefix}negative_prompt needs guidance, which {prefix}guidance=1 turns off: raise it, or leave the negative '
        'prompt out': not (self.negative_prompt and self.guidance == 1)}
    checks |= {f'{prefix}strengths={self.strengths}: {value!r} must be {STRENGTH}': value in STRENGTH
               for value in self.strengths}
    checks[f'{prefix}strengths are of image tokens, each reference with its own: leave {prefix}stitch and '
           f'{prefix}image_tokens at their defaults'] = not self.strengths or self.image_tokens and not self.stitch
    return (ranges.problems(self, prefix, **{name: LIMITS[name] for name in names})
            + [text for text, holds in checks.items() if not holds])


def check_ranges(**values: float) -> None:
  """UserError for the values that are out of their range in LIMITS."""
  problems = ranges.problems(types.SimpleNamespace(**values), '', **{name: LIMITS[name] for name in values})
  if problems:
    raise UserError('; '.join(problems))


# Accepted type of a setting, and its name in messages, by the type of the setting's default
_KINDS = {bool: (bool, 'True or False'), int: (numbers.Integral, 'a whole number'), float: (numbers.Real, 'a number'),
          tuple: ((tuple, list), 'a list')}
_PER_REQUEST = ('weights', 'loras', 'prompt', 'references', 'rewrite', 'num_images', 'seed', 'width', 'height',
                'batch_size')


@dataclasses.dataclass(frozen=True)
class Request:
  """One image to sample.

  Attributes:
    instruction: the user's text.
    references: images in the order shown to the VLM: uint8 [y x 3], or anything that `imaging.read` takes.
    seed: of the noise and of sampled text, any whole number.
    rewrite: text to condition on instead of the VLM's rewrite.
    place: where it was asked for, as 'requests.txt:3', for messages.
    files: of the references, for metadata; '' for one that is no file.
  """
  instruction: str
  references: tuple = ()
  seed: int = 0
  rewrite: str | None = None
  place: str = ''
  files: tuple[str, ...] = ()


def requests_for(prompts: dict[str, str], references: tuple, num_images: int = 1, seed: int | Iterable[int] = 0,
                 rewrite: str | None = None, files: tuple[str, ...] = ()) -> list[Request]:
  """`num_images` requests for every prompt, all with the same references.

  prompts: {place: text}.
  seed: of the first, from which the others count on; or of each.
  """
  seeds = itertools.count(seed) if isinstance(seed, numbers.Integral) else seed
  each = [(place, prompt) for place, prompt in prompts.items() for _ in range(num_images)]
  return [Request(prompt, references, seed, rewrite, place, files) for (place, prompt), seed in zip(each, seeds)]


def requests_of(records: Sequence[dict]) -> list[Request]:
  """Requests of a source's records, their seeds counting from 0."""
  return [Request(record['instruction'] or record['caption'], tuple(record['references']), seed)
          for seed, record in enumerate(records)]


def prompt_lines(prompt: str) -> dict[str, str]:
  """{place: text} of the lines of `sample.prompt`, or of the file that it names after an @; empty ones are left out.

  Only \\n and \\r\\n end a line. UserError for a file that cannot be read or is not UTF-8.
  """
  label = 'sample.prompt'
  if prompt.startswith('@@'):
    prompt = prompt[1:]
  elif prompt.startswith('@'):
    label, prompt = prompt[1:], _read_text(prompt)
  lines = re.split('\r?\n', prompt)
  numbered = {f'{label}:{i}' if len(lines) > 1 else label: line.strip() for i, line in enumerate(lines, 1)}
  return {place: line for place, line in numbered.items() if line}


def _read_text(prompt: str) -> str:
  """Text of the file that `prompt` names after its @."""
  try:
    path = pathlib.Path(prompt[1:]).expanduser()
    if not path.exists():
      raise UserError(f'sample.prompt={prompt}: there is no file {path}, and @ names one that holds a request a line; '
                      'a prompt that itself begins with @ is given with @@')
    if not path.is_file():
      raise UserError(f'sample.prompt={prompt}: {path} is a folder or a device; @ names a file with a request a line')
    data = path.read_bytes()
  except (OSError, RuntimeError, UnicodeEncodeError) as error:  # RuntimeError: ~ of an unknown user
    raise UserError(f'sample.prompt={prompt} cannot be read ({getattr(error, "strerror", None) or error}): @ names a '
                    'file with a request a line') from error
  if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b'\0' in data:
    raise UserError(f'{path} is UTF-16, or no text at all: save it as UTF-8')
  try:
    return data.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = data.count(b'\n', 0, error.start) + 1
    raise UserError(f'{path}:{line} holds the byte 0x{data[error.start]:02x}, which is no UTF-8 (Latin-1 or '
                    'Windows-1252?): save it as UTF-8') from error


def shape_like(reference: np.ndarray | None, size: int, unit: int, height: int = 0, width: int = 0) -> tuple[int, int]:
  """(height, width) of an image in a reference's proportions, multiples of `unit`; given sides stay.

  About size^2 pixels, and not more: the nearest proportions among the pairs of sides near that area.

  Raises:
    UserError: for more patches of latents than MAX_SIDE along a side or MAX_PATCHES in all.
  """
  y, x = (1, 1) if reference is None else reference.shape[:2]
  if not (height or width):
    sides = buckets.canvas(x / y, size, unit) if size <= MAX_SIDE * unit else (size, size)
  else:
    sides = (height or max(1, round(width * y / x / unit)) * unit, width or max(1, round(height * x / y / unit)) * unit)
  rows, columns = (side // unit for side in sides)
  if max(rows, columns) > MAX_SIDE or rows * columns > MAX_PATCHES:
    like = '' if reference is None or (height and width) else f' like the first reference of {x}x{y}'
    raise UserError(f'width={width}, height={height} and size={size} ask for an image of {sides[1]}x{sides[0]} '
                    f'pixels{like}: {columns}x{rows} latent patches of {unit} pixels, and there may be {MAX_SIDE} '
                    f'along a side and {MAX_PATCHES} in all; give a smaller width and height')
  return sides
