"""Training checkpoints in orbax: items `state` (without its EMA), `ema` and `data`, the position in the data as JSON.

Trees are saved as flat dicts from path to array ('params/dit/blocks/attn/wq/value'), so files do not depend on classes,
and no item depends on the number of processes.
"""

from concurrent import futures
import contextlib
import dataclasses
import json
import os
import pathlib
import re
from typing import Any

from absl import logging
import jax
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from unifusion_jax import bucket, digests, sharding
from unifusion_jax.errors import UserError
from unifusion_jax.training.step import State
from unifusion_jax.weights import hub


class Checkpoints:
  """The checkpoints of one workdir.

  Saving is asynchronous: a thread waits until the checkpoint is whole, then writes the digests of its files. An
  interrupted save leaves a temporary folder, which is never read. Restoring takes the newest checkpoint whose files
  match their digests, with a warning for each that it passes over. A checkpoint without digests (its save was cut off
  just before them, or `checksums` was off) counts as whole if it can be loaded; its values are not verified. There are
  none in a bucket, which keeps checksums of its own.

  Args:
    keep: newest checkpoints to keep.  keep_every: steps; those of their multiples stay too. 0: none.
    tidy: removes temporary folders and sets damaged checkpoints aside as STEP.damaged: for the training run alone,
      since a reader could remove what a run is writing.
    checksums: whether digests are written and compared.
  """

  def __init__(self, workdir: str | pathlib.Path, keep: int = 2, keep_every: int = 0, tidy: bool = False,
               checksums: bool = True):
    self._folder = bucket.address(pathlib.Path(workdir).absolute() / 'checkpoints')
    self._tidy, self._checksums = tidy, checksums and not bucket.is_address(self._folder)
    context = ocp.Context()
    # Small arrays are written by one replica: dividing them among replicas compiles a program for every slice.
    context.array.saving.min_slice_bytes_for_replica_parallel = 2 ** 24
    context.checkpointables.registry = ocp.handlers.local_registry().add(
        ocp.handlers.JsonHandler, checkpointable_name='data')
    policies = ocp.training.preservation_policies
    kept = [policies.LatestN(keep), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
    with bucket.sentences(self._folder):
      self._folder.mkdir(parents=True, exist_ok=True)
      self._writer = ocp.training.Checkpointer(
          self._folder, context=context, preservation_policy=policies.AnyPreservationPolicy(kept),
          cleanup_tmp_directories=tidy)
    self._thread = futures.ThreadPoolExecutor(1, 'checkpoint')
    self._pending = None  # the future of the save under way
    self._failed = False

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def latest(self) -> int | None:
    """The step of the newest checkpoint."""
    newest = self._writer.latest
    return None if newest is None else newest.step

  def save(self, state: State, data) -> None:
    """Saves under `state.step`, unless that step is there already; first waits for the save before, as `wait` does."""
    step = int(state.step)
    if self.latest() != step:
      self.wait()
      rest = dataclasses.replace(state, ema=None)
      items = dict(state=_named(rest), ema=_named(state.ema), data=data.get_state())
      try:
        saved = self._writer.save_checkpointables_async(step, items, force=True)
      except Exception as error:
        raise _told(error, self._folder)
      self._pending = self._thread.submit(self._finish, step, saved)

  def restore(self, abstract: State, data, mesh) -> State:
    """The newest whole state, sharded as `abstract` on `mesh`; moves `data` to that run's position."""
    abstract = sharding.abstract(abstract, mesh)
    rest = dataclasses.replace(abstract, ema=None)
    _, loaded = self._newest_whole(dict(state=_named(rest), ema=_named(abstract.ema), data=None))
    data.set_state(loaded['data'])
    return dataclasses.replace(_like(rest, loaded['state']), ema=_like(abstract.ema, loaded['ema']))

  def restore_ema(self, abstract_params, mesh):
    """(EMA, step) of the newest checkpoint whose EMA is whole; the optimizer's state is not read."""
    if self.latest() is None:
      raise UserError(f'{self._folder} holds no checkpoint: train first (--mode=train)')
    abstract = sharding.abstract(abstract_params, mesh)
    step, loaded = self._newest_whole(dict(ema=_named(abstract)))
    return _like(abstract, loaded['ema']), step

  def wait(self) -> None:
    """Waits for the save under way and raises its error, on all processes if on one.

    A UserError where the operating system could not write: the disk is full, for one.
    """
    error = self._finished()
    if sharding.local(sharding.tell_all(np.array([error is not None], np.int32))).any():
      raise error or UserError('another process could not save its part of a checkpoint, and says why: all stop')

  def close(self) -> None:
    """Waits for the save under way; its error is logged."""
    error = self._finished()
    if error is not None:
      logging.error('%s', error)
    self._thread.shutdown()
    with contextlib.suppress(*[Exception] if self._failed else []):  # orbax raises a failed save's error again
      self._writer.close()

  def _finish(self, step: int, saved) -> None:
    """Until its result is taken, orbax keeps a thread and three file descriptors for each save."""
    saved.result()
    if self._checksums and sharding.is_main_process():
      digests.write(self._folder / str(step))

  def _finished(self) -> Exception | None:
    """Waits for the save under way; its error, if any."""
    pending, self._pending = self._pending, None
    error = pending and pending.exception()
    self._failed |= error is not None
    return error and _told(error, self._folder)

  def _newest_whole(self, items: dict) -> tuple[int, dict]:
    """(step, items) of the newest checkpoint in which these are whole. UserError if there is none.

    The first process compares digests for all, and all load the same checkpoint.
    """
    damaged, error, loaded = {}, None, {}
    for step in sorted((checkpoint.step for checkpoint in self._writer.checkpoints), reverse=True):
      verified, problem = self._compare(step, items)
      if verified:
        loaded = self._load(step, items)
      elif not problem:
        loaded, error = self._try(step, items)
        problem = error and f'it cannot be loaded ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]})'
      if not problem:
        for worse, reason in damaged.items():
          self._pass_over(worse, reason, step)
        return step, loaded
      damaged[step] = problem
    raise UserError(f'no checkpoint in {self._folder} is whole: '
                    + '; '.join(f'step {step}: {problem}' for step, problem in damaged.items())
                    + '. Put a copy of one there, or remove them to start anew') from error

  def _compare(self, step: int, items) -> tuple[bool, str]:
    """(whether the files match their digests, what is wrong with them); (False, '') where there are no digests."""
    known, problem, folder = False, '', self._folder / str(step)
    if self._checksums and sharding.is_main_process():
      known = (folder / digests.NAME).exists()
      problem = digests.damage(folder, items) if known else ''
    known, damaged = sharding.from_main_process(np.array([known, bool(problem)])).tolist()
    return known and not damaged, (problem or 'its files do not match their digests') if damaged else ''

  def _load(self, step: int, items: dict) -> dict:
    loaded = self._writer.load_checkpointables(step, {name: items[name] for name in items if name != 'data'})
    if 'data' in items:
      # Earlier versions wrote a file for each process, all with the same position
      path, *_ = sorted((self._folder / str(step) / 'data').glob('*.json'))
      loaded['data'] = json.loads(path.read_text())
    return loaded

  def _try(self, step: int, items: dict) -> tuple[dict, Exception | None]:
    """The items, or the error in their place: on all processes if on one."""
    loaded, error = {}, None
    try:
      loaded = self._load(step, items)
    except Exception as problem:
      error = problem
    if sharding.local(sharding.tell_all(np.array([error is not None], np.int32))).any():
      return {}, error or RuntimeError('another process cannot load it')
    return loaded, None

  def _pass_over(self, step: int, problem: str, taken: int) -> None:
    aside = self._folder / f'{step}.damaged'
    number = 1
    while aside.exists():
      aside, number = self._folder / f'{step}.damaged.{number}', number + 1
    logging.warning('the checkpoint of step %d in %s is damaged: %s. Step %d is taken instead%s', step, self._folder,
                    problem, taken, f'; {aside.name} is what is left of it' if self._tidy else '')
    if self._tidy:
      if sharding.is_main_process():
        (self._folder / str(step)).rename(aside)
      sharding.from_main_process(np.zeros(1))  # all go on after the first has renamed it
      self._writer.reload()


def shapes(folder: pathlib.Path) -> dict[str, jax.ShapeDtypeStruct]:
  """{path: shape and dtype} of a step's folder, as in 'params/...', 'opt/...', 'ema/...'; no value is read."""
  items = {'': 'state', 'ema/': 'ema'}
  return {prefix + path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for prefix, item in items.items()
          for path, leaf in ocp.metadata(folder, item).metadata.items()}  # pyrefly: ignore[missing-attribute]


def trained(config, workdir: pathlib.Path):
  """Parameters to sample, measure or export, and their origin in words; the mesh must be in context.

  The EMA of the workdir's newest whole checkpoint; without a run there, the weights that `sample.weights` or `init`
  names.
  """
  objective = config.objective
  if bucket.address(workdir / 'checkpoints').exists():
    with Checkpoints(workdir, checksums=config.train.checksums) as checkpoints:
      if checkpoints.latest() is not None:
        abstract = jax.eval_shape(lambda: objective.random(config))
        params, step = checkpoints.restore_ema(abstract, jax.sharding.get_mesh())
        return params, f'{bucket.address(workdir)} at step {step}'
  weights = config.sample.weights or config.init
  if weights is None:
    raise UserError(f'{bucket.address(workdir)} holds no run and the configuration names no weights: train first '
                    '(--mode=train), or give --config.sample.weights=FOLDER')
  pinned = hub.pin(weights)
  return objective.load(config, str(pinned.folder)), pinned.name


def _named(tree) -> dict[str, Any]:
  """{path: leaf}."""
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _like(tree, named: dict[str, Any]):
  """`tree` with its leaves taken from `named`."""
  return jax.tree.unflatten(jax.tree.structure(tree), [named[name] for name in _named(tree)])


def _told(error: Exception, folder: pathlib.Path) -> Exception:
  """A UserError in the place of an error of a bucket or the operating system, which tensorstore gives as text."""
  named = re.search(r"os_error_code='(\d+)'", str(error))
  if bucket.is_address(folder):
    reason = bucket.reason(error)
  else:
    number = int(named[1]) if named else getattr(error, 'errno', None)
    reason = number and os.strerror(number)
  if not reason:
    return error
  told = UserError(f'no checkpoint could be saved in {folder}: {reason}. Mend that, and the same command goes on from '
                   'the checkpoint before')
  told.__cause__ = error
  return told


def _tells_more(entry) -> bool:
  """False for what orbax logs beside: tracebacks of a failed save, in every thread (`wait` raises the error), and
  metadata that cannot be read (the digests say so)."""
  of_orbax = f'{os.sep}orbax{os.sep}' in entry.pathname
  return not (of_orbax and (entry.exc_info or 'Metadata file' in str(entry.msg)))


logging.get_absl_logger().addFilter(_tells_more)
