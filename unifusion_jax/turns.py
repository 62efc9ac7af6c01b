"""Memory of the devices that is too small: models that take turns in it, and what is said where that does not do."""

from collections.abc import Callable
import contextlib
import functools
from typing import Any

from flax import nnx
import jax

from unifusion_jax.errors import clipped, UserError


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


@contextlib.contextmanager
def enough_memory():
  """UserError for a pipeline that the devices' memory does not hold, in the place of XLA's RESOURCE_EXHAUSTED."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).partition('RESOURCE_EXHAUSTED: ')[2]
    if not reason:
      raise
    raise UserError(
        f"the devices' memory is too small ({clipped(reason.splitlines()[0])}): sample fewer images at a time "
        '(batch_size) or smaller ones (width, height), load the models in turn (in_turn) or in int8 (quantized, '
        'transformer_quantized), or take more devices') from error
