"""Training checkpoints in orbax: items `state` (without its EMA), `ema` and `data`, the loader's position.

Trees are saved as flat dicts from path to array ('params/dit/blocks/attn/wq/value'), so files do not depend on classes.
"""

import dataclasses
import pathlib

import jax
from orbax.checkpoint.experimental import v1 as ocp

from unifusion_jax import sharding
from unifusion_jax.errors import UserError
from unifusion_jax.training.step import State
from unifusion_jax.weights import hub


class Checkpoints:
  """The checkpoints of one workdir.

  Saving is asynchronous; an interrupted save leaves a temporary folder, which is never read. `tidy` removes such
  folders: for the training run alone, since a reader could remove the one that a run is writing.
  """

  def __init__(self, workdir: str | pathlib.Path, keep: int = 2, tidy: bool = False):
    self._folder = pathlib.Path(workdir).absolute() / 'checkpoints'
    self._folder.mkdir(parents=True, exist_ok=True)
    # Small arrays are written by one replica: dividing them among replicas compiles a program for every slice.
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = 2 ** 24
    self._writer = ocp.training.Checkpointer(
        self._folder, context=context,
        preservation_policy=ocp.training.preservation_policies.LatestN(keep), cleanup_tmp_directories=tidy)

  def latest(self) -> int | None:
    """The step of the newest whole checkpoint."""
    newest = self._writer.latest
    return None if newest is None else newest.step

  def save(self, state: State, data) -> None:
    """Saves under `state.step`, unless that step is there already."""
    step = int(state.step)
    if self.latest() != step:
      rest = dataclasses.replace(state, ema=None)
      items = dict(state=_named(rest), ema=_named(state.ema), data=data)
      self._writer.save_checkpointables_async(step, items, force=True)

  def restore(self, abstract: State, data, mesh) -> State:
    """The newest state, sharded as `abstract` on `mesh`; moves `data` to that run's position."""
    abstract = sharding.abstract(abstract, mesh)
    rest = dataclasses.replace(abstract, ema=None)
    loaded = self._writer.load_checkpointables(None, dict(state=_named(rest), ema=_named(abstract.ema), data=data))
    return dataclasses.replace(_like(rest, loaded['state']), ema=_like(abstract.ema, loaded['ema']))

  def restore_ema(self, abstract_params, mesh):
    """The newest EMA alone, without the optimizer's state."""
    if self.latest() is None:
      raise UserError(f'{self._folder} holds no checkpoint: train first (--mode=train)')
    abstract = sharding.abstract(abstract_params, mesh)
    return _like(abstract, self._writer.load_checkpointables(None, dict(ema=_named(abstract)))['ema'])

  def wait(self) -> None:
    self._writer.wait()

  def close(self) -> None:
    self._writer.close()


def trained(config, workdir: pathlib.Path):
  """Parameters to sample, measure or export, and their origin in words; the mesh must be in context.

  The EMA of the workdir's last checkpoint; without a run there, the checkpoint that `sample.weights` or `init` names.
  """
  objective = config.objective
  if (workdir / 'checkpoints').exists():
    checkpoints = Checkpoints(workdir)
    try:
      if (step := checkpoints.latest()) is not None:
        params = checkpoints.restore_ema(jax.eval_shape(lambda: objective.random(config)), jax.sharding.get_mesh())
        return params, f'{workdir} at step {step}'
    finally:
      checkpoints.close()
  weights = config.sample.weights or config.init
  if weights is None:
    raise UserError(f'{workdir} holds no run and the configuration names no weights: train first (--mode=train), or '
                    'give --config.sample.weights=FOLDER')
  pinned = hub.pin(weights)
  return objective.load(config, str(pinned.folder)), pinned.name


def _named(tree) -> dict[str, object]:
  """{path: leaf}."""
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _like(tree, named: dict[str, object]):
  """`tree` with its leaves taken from `named`."""
  return jax.tree.unflatten(jax.tree.structure(tree), [named[name] for name in _named(tree)])
