"""Arguments of a pipeline's call: by our names, or by those of diffusers' pipelines (0.42.1)."""

from collections.abc import Sequence
import difflib
import numbers
import os

import numpy as np

from unifusion_jax.data import imaging
from unifusion_jax.errors import UserError
from unifusion_jax.request import SampleConfig

OURS = ('prompt', 'images', 'num_images', 'seed', 'rewrite', 'height', 'width', 'callback', 'batch_size',
        *SampleConfig().settings())

# Ours for diffusers' names; prompt, negative_prompt, height and width are the same
DIFFUSERS = {'image': 'images', 'num_images_per_prompt': 'num_images', 'generator': 'seed',
             'num_inference_steps': 'steps', 'guidance_scale': 'guidance'}


def named(arguments: dict, guidance_off: float) -> dict:
  """The arguments that are not None, by our names.

  guidance_off: diffusers' guidance_scale at which there is no guidance, as at every one below.

  Raises:
    UserError: for a name that there is not, and for both names of one argument.
  """
  known = (*OURS, *DIFFUSERS)
  for name in arguments.keys() - set(known):
    near = difflib.get_close_matches(name, known, 1)
    hint = f'did you mean {near[0]!r}?' if near else f'there are {", ".join(known)}'
    raise UserError(f'there is no argument {name!r}: {hint}')
  given = {name: value for name, value in arguments.items() if value is not None}
  for theirs in DIFFUSERS.keys() & given:
    ours, value = DIFFUSERS[theirs], given.pop(theirs)
    if ours in given:
      raise UserError(f'{ours} and {theirs} are two names of one argument: give one of them')
    if theirs == 'guidance_scale' and isinstance(value, numbers.Real):
      value = 1.0 if value <= guidance_off else value + 1 - guidance_off
    given[ours] = value
  return given


def prompts(prompt: str | Sequence[str], rewrite: str | None = None) -> dict[str, str]:
  """{place: text} of one or several prompts, an empty one being the given rewrite; UserError where there are none."""
  texts = [prompt] if isinstance(prompt, str) else list(prompt)
  if not all(isinstance(text, str) for text in texts):
    raise UserError(f'prompt={prompt!r} must be a text or a list of texts')
  if rewrite is not None:
    texts = [text or rewrite for text in texts]
  placed = {f'prompt {i}' if len(texts) > 1 else 'prompt': text for i, text in enumerate(texts, 1)}
  empty = [place for place, text in placed.items() if not text.strip()]
  if empty or not texts:
    raise UserError(f'nothing to generate{f": {empty[0]} is empty" if len(texts) > 1 else ""}: give a prompt, as in '
                    "pipe('make the circle blue', images='photo.png')")
  return placed


def references(images) -> tuple[tuple[np.ndarray, ...], tuple[str, ...]]:
  """(images uint8 [y x 3], the file of each or '') of one image or several, each a path, an array or a Pillow image."""
  images = images if isinstance(images, (list, tuple)) else [images]
  files = tuple(str(image) if isinstance(image, (str, os.PathLike)) else '' for image in images)
  return tuple(map(imaging.read, images)), files
