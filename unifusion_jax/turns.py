"""Models that take turns in the devices' memory, where they do not fit beside each other."""

from collections.abc import Callable
import functools
from typing import Any

from flax import nnx
import jax


class Turns:
  """Models by name, of which one is there at a time: the one that was taken last.

  loaders: {name: function that loads it, from local files}.
  """

  def __init__(self, loaders: dict[str, Callable[[], nnx.Module]]):
    self._loaders, self._there = dict(loaders), {}

  def take(self, name: str) -> Any:
    """A model, which is loaded unless it was taken last; the arrays of the one before are deleted first."""
    if name not in self._there:
      self.leave()
      self._there[name] = self._loaders[name]()
    return self._there[name]

  def leave(self) -> None:
    """Deletes the arrays of the model that is there."""
    for array in jax.tree.leaves(self._there):
      array.delete()
    self._there.clear()

  def give(self, name: str, *arguments) -> None:
    """More arguments for the function that loads a model, which is loaded anew."""
    self._loaders[name] = functools.partial(self._loaders[name], *arguments)
    if name in self._there:
      self.leave()
