"""Kinds of settings whose values are completed once, at the start: paths, where `~` is the home folder, and seeds.

A field declares its kind by its type, as in `vlm_cache: Path | None = None`; `completed` completes a whole tree.
"""

from collections.abc import Callable
import dataclasses
import hashlib
import os
import typing
from typing import Annotated


def _with_file(text: str) -> str:
  return '@' + os.path.expanduser(text[1:]) if text.startswith('@') else text


def _folded(seed: int) -> int:
  """A whole number as 32 bits, which every generator takes; other numbers than those have a digest of theirs."""
  if 0 <= seed < 2 ** 32:
    return seed
  return int.from_bytes(hashlib.sha256(f'{seed:x}'.encode()).digest()[:4], 'big')


Path = Annotated[str, os.path.expanduser]  # a file or folder; where a hub id may stand, too
Text = Annotated[str, _with_file]          # a text, or @file.txt that holds it
Seed = Annotated[int, _folded]             # any whole number


def completed(holder):
  """A tree of dataclasses whose annotated fields are completed."""
  changes = {}
  for name, hint in hints(type(holder)).items():
    value, complete = getattr(holder, name), completion(hint)
    if dataclasses.is_dataclass(value):
      changes[name] = completed(value)
    elif complete and value is not None:
      changes[name] = tuple(map(complete, value)) if isinstance(value, tuple) else complete(value)
  return dataclasses.replace(holder, **{name: new for name, new in changes.items() if new != getattr(holder, name)})


def hints(kind: type) -> dict[str, object]:
  """{name: type} of the fields of a dataclass, with their annotations."""
  there = typing.get_type_hints(kind, include_extras=True)
  return {field.name: there[field.name] for field in dataclasses.fields(kind)}


def completion(hint) -> Callable | None:
  """The function that completes the values of a type, its optional values or its items; None for most types."""
  if metadata := getattr(hint, '__metadata__', None):
    return metadata[0]
  return next(filter(None, map(completion, typing.get_args(hint))), None)
