"""Training metrics: progress on stderr, `metrics.jsonl`, TensorBoard events and, where asked for, Weights & Biases."""

import json
import math
import os
import pathlib
import sys
import time
import uuid

import jax
import tensorboardX

from unifusion_jax import progress
from unifusion_jax.errors import UserError


def _number(x: float) -> str:
  return f'{x:,.0f}' if abs(x) >= 1000 else f'{x:.3g}'


# What the progress shows, in this order: the name of a scalar, the name there, and the text of a value
SHOWN = {
    'loss': ('loss', '{:.4g}'.format),
    'images_per_second': ('images/s', _number),
    'step_time': ('s/step', '{:.3g}'.format),
    'data_wait': ('data wait', '{:.0%}'.format),
    'mfu': ('MFU', '{:.1%}'.format),
    'tflops_per_chip': ('TFLOP/s', _number),
    'tokens_per_second': ('tokens/s', _number),
    'hbm_peak_gib': ('HBM', '{:.1f} GiB'.format),
}


class Writer:
  """Metrics and progress of one run; only the first of several processes writes.

  On a resumed run, lines of `metrics.jsonl` after `step` are dropped: their steps run again. So are lines that are no
  metrics of a step, which a machine that stopped in the middle of writing may leave. NaN and infinity, which JSON does
  not have, are null there.

  wandb: PROJECT or ENTITY/PROJECT of Weights & Biases; '' for none. UserError where it cannot be used.
  """

  def __init__(self, workdir: str | pathlib.Path, step: int, steps: int | None, wandb: str = '', *, stream=None,
               clock=time.monotonic):
    self._active = jax.process_index() == 0
    if not self._active:
      return
    workdir = pathlib.Path(workdir)
    self._wandb = _wandb_run(workdir, wandb) if wandb else None
    path = workdir / 'metrics.jsonl'
    if path.exists():
      part = path.with_name(path.name + '.part')
      part.write_bytes(b''.join(line for line in path.read_bytes().splitlines(keepends=True) if _is_up_to(step, line)))
      os.replace(part, path)
    self._file = path.open('a')
    self._postfix = {}
    self._events = tensorboardX.SummaryWriter(str(workdir), write_to_disk=True, purge_step=step + 1 if step else None)
    self._stream = stream or sys.stderr
    self._bar = progress.bar(steps, 'step', step, stream=self._stream, clock=clock)

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Writes the scalars of a log step wherever metrics go, and the main ones to the progress."""
    if not self._active:
      return
    scalars = {name: float(value) for name, value in scalars.items()}
    values = {name: _rounded(value) if math.isfinite(value) else None for name, value in scalars.items()}
    self._file.write(json.dumps(dict(step=step, **values), allow_nan=False) + '\n')
    self._file.flush()
    for name, value in scalars.items():
      self._events.add_scalar(name, value, step)
    if self._wandb and step >= self._wandb.starting_step:  # of a run that goes on; it has what was before
      self._wandb.log(scalars, step=step)
    self.set_postfix(scalars)

  def set_postfix(self, scalars: dict[str, float]) -> None:
    """Sets the scalars that the progress shows from its next refresh on."""
    if self._active:
      shown = {name: (label, text) for name, (label, text) in SHOWN.items() if name in scalars}
      self._postfix |= {label: text(float(scalars[name])) for name, (label, text) in shown.items()}
      self._bar.set_postfix(self._postfix, refresh=False)

  def step(self, step: int, share: float | None = None) -> None:
    """Moves the progress to `step`; `share` of the run is done, where the number of its steps is not known."""
    if self._active:
      if share is not None:
        self._postfix['done'] = f'{share:.0%}'
        self._bar.set_postfix(self._postfix, refresh=False)
      self._bar.update(step - self._bar.n)

  def note(self, text: str) -> None:
    """A line of its own, above the bar."""
    if self._active:
      self._bar.write(text, file=self._stream)

  def close(self) -> None:
    if self._active:
      self._bar.close()
      self._events.close()
      self._file.close()
      if self._wandb:
        self._wandb.finish(exit_code=int(sys.exc_info()[0] is not None))


def _rounded(value: float) -> float:
  """To six digits behind the point, or six in all where the value is below 1."""
  return round(value, 6) if abs(value) >= 1 else float(f'{value:.6g}')


def _is_up_to(step: int, line: bytes) -> bool:
  """Whether a line of metrics.jsonl is whole and of a step up to `step`."""
  try:
    at = json.loads(line)['step'] if line.endswith(b'\n') else None
  except (ValueError, TypeError, KeyError, RecursionError):
    return False
  return isinstance(at, int) and at <= step


def _wandb_run(workdir: pathlib.Path, project: str):
  """The workdir's run at Weights & Biases: a new one, or that of its earlier starts, whose id is in `wandb_id`."""
  try:
    from wandb import Error, init  # by name: a folder `wandb`, as runs leave it, is an empty package
  except ImportError as error:
    raise UserError(f'train.wandb={project!r}: Weights & Biases is not installed: pip install wandb, or leave the '
                    'setting out') from error
  path, settings = workdir / 'wandb_id', workdir / 'config.json'
  if not path.exists() or not path.read_text():
    path.write_text(uuid.uuid4().hex[:12])
  entity, _, name = project.rpartition('/')
  try:
    return init(entity=entity or None, project=name, id=path.read_text(), resume='allow', name=workdir.name,
                dir=str(workdir), config=json.loads(settings.read_text()) if settings.exists() else {},
                allow_val_change=True)
  except Error as error:
    raise UserError(f'train.wandb={project!r}: {error}') from error
