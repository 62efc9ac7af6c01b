"""Training checkpoints in orbax: items `state` (with the EMA apart, as `ema`) and `data`, the loader's position."""

import dataclasses
import pathlib

import jax
from orbax.checkpoint.experimental import v1 as ocp

from unifusion_jax import sharding
from unifusion_jax.step import State


class Checkpoints:
  """The checkpoints of one workdir.

  Saving is asynchronous; an interrupted save leaves a temporary folder that is never taken for a checkpoint.
  """

  def __init__(self, workdir: str | pathlib.Path, keep: int = 2):
    self._folder = pathlib.Path(workdir).absolute() / 'checkpoints'
    self._folder.mkdir(parents=True, exist_ok=True)
    # Small arrays are written by one replica: sharing them out would compile a program for every slice.
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = 2 ** 24
    self._writer = ocp.training.Checkpointer(
        self._folder, context=context,
        preservation_policy=ocp.training.preservation_policies.LatestN(keep), cleanup_tmp_directories=True)

  def latest(self) -> int | None:
    """The step of the newest whole checkpoint."""
    newest = self._writer.latest
    return None if newest is None else newest.step

  def save(self, state: State, data) -> None:
    """Saves under `state.step`; does nothing when that step is there already."""
    step = int(state.step)
    if self.latest() != step:
      rest = dataclasses.replace(state, ema=None)
      self._writer.save_checkpointables_async(step, dict(state=rest, ema=state.ema, data=data), force=True)

  def restore(self, abstract: State, data, mesh) -> State:
    """The newest state, sharded as `abstract` is on `mesh`; `data` is moved to where that run stood."""
    abstract = sharding.abstract(abstract, mesh)
    items = dict(state=dataclasses.replace(abstract, ema=None), ema=abstract.ema, data=data)
    loaded = self._writer.load_checkpointables(None, items)
    return dataclasses.replace(loaded['state'], ema=loaded['ema'])

  def restore_ema(self, abstract_params, mesh):
    """The newest EMA alone: sampling never reads an optimizer."""
    if self.latest() is None:
      raise FileNotFoundError(f'{self._folder} holds no checkpoint: train first (--mode=train), or leave out --workdir '
                              'to use the weights that config.init names')
    return self._writer.load_checkpointables(None, dict(ema=sharding.abstract(abstract_params, mesh)))['ema']

  def wait(self) -> None:
    self._writer.wait()

  def close(self) -> None:
    self._writer.close()
