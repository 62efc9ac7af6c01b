"""Requests and sampling settings."""

from collections.abc import Sequence
import dataclasses
import difflib
import numbers

import numpy as np

from unifusion_jax.errors import UserError
from unifusion_jax.fields import Path, Text


@dataclasses.dataclass
class SampleConfig:
  """Sampling settings, and the requests of --mode=sample."""
  weights: Path | None = None       # checkpoint to use where the workdir holds no run; None: that of `init`
  prompt: Text = ''                 # one request a line; @file.txt reads them from a file
  references: tuple[Path, ...] = ()  # image files, the same for every request; give the flag once for each
  rewrite: str | None = None        # text to condition on instead of the VLM's rewrite
  num_images: int = 1               # of each request
  seed: int = 0                     # of the first image; every further image takes the next number
  width: int = 0                    # 0: the first reference's shape, else square
  height: int = 0
  batch_size: int = 32              # images sampled at a time
  verifi: bool = True               # False: condition on the request itself
  system: str | None = None         # another system prompt, a name in verifi.SYSTEM or a text
  temperature: float = 0.0          # of rewrites; 0: the most probable one; above 0 each seed samples its own
  top_p: float = 1.0                # of rewrites: share of probability that tokens are sampled from
  tiles: int = 0                    # maximum tiles of a reference; 0: as in training
  image_tokens: bool = True         # False: the VLM reads the references, but their tokens do not condition the DiT
  stitch: bool = False              # show all references as one image, side by side
  steps: int = 24
  guidance: float = 3.0             # 1: off
  method: str = 'euler'             # or 'heun'
  eta: float = 0.0                  # 0: an ODE. Up to 1: new noise between Euler steps (flow.sample)
  shift: float = 1.0                # of the sampling times; 0: from the number of image tokens, as Krea 2

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
    return dataclasses.replace(self, **values)

  def problems(self, unit: int = 1, prefix: str = 'sample.') -> list[str]:
    """Values out of range, one sentence each. `unit`: pixels that both sides must be multiples of."""
    least = dict(steps=1, batch_size=1, num_images=1, seed=0, tiles=0, temperature=0, shift=0, width=0, height=0)
    checks = {f'{prefix}{name}={getattr(self, name)} must be {limit} or more': getattr(self, name) >= limit
              for name, limit in least.items()}
    checks |= {f'{prefix}{name}={side} must be a multiple of {unit} pixels (a latent patch)': side % unit == 0
               for name, side in (('width', self.width), ('height', self.height))}
    checks |= {
        f"{prefix}method={self.method!r} must be 'euler' or 'heun'": self.method in ('euler', 'heun'),
        f'{prefix}eta={self.eta} must be between 0 and 1': 0 <= self.eta <= 1,
        f'{prefix}eta={self.eta} renews noise between Euler steps only: set it to 0 with {prefix}method=heun, or take '
        'euler': not (self.eta and self.method == 'heun'),
        f'{prefix}top_p={self.top_p} must be above 0 and at most 1': 0 < self.top_p <= 1}
    return [text for text, holds in checks.items() if not holds]


# Accepted type of a setting, and its name in messages, by the type of the setting's default
_KINDS = {bool: (bool, 'True or False'), int: (numbers.Integral, 'a whole number'), float: (numbers.Real, 'a number')}
_PER_REQUEST = ('weights', 'prompt', 'references', 'rewrite', 'num_images', 'seed', 'width', 'height', 'batch_size')


@dataclasses.dataclass(frozen=True)
class Request:
  """One image to sample.

  Attributes:
    instruction: the user's text.
    references: images in the order shown to the VLM: uint8 [y x 3], or anything that `imaging.read` takes.
    seed: of the noise and of sampled text.
    rewrite: text to condition on instead of the VLM's rewrite.
  """
  instruction: str
  references: tuple = ()
  seed: int = 0
  rewrite: str | None = None


def requests_for(prompts: Sequence[str], references: tuple, num_images: int = 1, seed: int = 0,
                 rewrite: str | None = None) -> list[Request]:
  """`num_images` requests for every prompt, all with the same references, their seeds counting from `seed`."""
  return [Request(prompt, references, seed + i * num_images + j, rewrite)
          for i, prompt in enumerate(prompts) for j in range(num_images)]


def requests_of(records: Sequence[dict]) -> list[Request]:
  """Requests of a source's records, their seeds counting from 0."""
  return [Request(record['instruction'] or record['caption'], tuple(record['references']), seed)
          for seed, record in enumerate(records)]


def shape_like(reference: np.ndarray | None, size: int, height: int = 0, width: int = 0) -> tuple[int, int]:
  """(height, width): about size^2 pixels in a reference's proportions, multiples of 16; given sides stay."""
  ratio = 1.0 if reference is None else reference.shape[1] / reference.shape[0]
  if height or width:
    wanted = (height, height * ratio) if height else (width / ratio, width)
  else:
    wanted = (size / ratio ** 0.5, size * ratio ** 0.5)
  rounded = [max(16, round(side / 16) * 16) for side in wanted]
  return height or rounded[0], width or rounded[1]
