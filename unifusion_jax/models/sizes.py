"""Limits of a model's sizes: absurd ones are refused from their numbers, before anything is allocated."""

from collections.abc import Mapping
import dataclasses

from unifusion_jax import ranges
from unifusion_jax.ranges import Range

PARAMETERS = 10 ** 13  # of a stack of blocks
_HEADS, _HIDDEN = Range(1, 10 ** 4), Range(1, 10 ** 6)
LIMITS = dict(width=Range(1, 10 ** 5), depth=Range(1, 1000), heads=_HEADS, kv_heads=_HEADS, head_dim=Range(1, 10 ** 4),
              mlp=_HIDDEN, hidden=_HIDDEN, vocab=Range(1, 10 ** 7), patch=Range(1, 1000), mean=Range(-100, 100),
              std=Range(above=0, most=100), eps=Range(0, 1))


def problems(config, prefix: str, **others: Range) -> list[str]:
  """A sentence for each number of a model's configuration out of its range: of LIMITS by its name, or of `others`.

  Another one where the numbers are in range, and the parameters of the blocks are not.
  """
  names = {field.name for field in dataclasses.fields(config)}
  limits = {name: limit for name, limit in LIMITS.items() if name in names} | others
  wrong = ranges.problems(config, prefix, **limits)
  if wrong or 'depth' not in names:
    return wrong
  hidden = config.mlp if 'mlp' in names else config.hidden
  parameters = config.depth * config.width * (4 * config.width + 3 * hidden)
  if parameters > PARAMETERS:
    wrong.append(f'{prefix}depth={config.depth} blocks of {prefix}width={config.width}, with {hidden} hidden units, '
                 f'are {parameters:.0e} parameters: more than {PARAMETERS:.0e} are refused')
  return wrong


def undivided(config, prefix: str, mesh: Mapping[str, int], **names: tuple[str, ...]) -> list[str]:
  """A sentence for each size of a configuration that its axis of a mesh does not divide, as in fsdp=('width',)."""
  return [f'mesh.{axis}={mesh[axis]} must divide {prefix}{name}={getattr(config, name)}'
          for axis in names if axis in mesh for name in names[axis] if getattr(config, name) % mesh[axis]]
