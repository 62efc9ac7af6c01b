"""Training metrics: progress on stderr, `metrics.jsonl` and TensorBoard events."""

import json
import math
import os
import pathlib
import sys
import time

import jax
import tensorboardX
import tqdm

SECONDS = 10.0  # between two lines of progress where stderr is no terminal


class Writer:
  """Metrics and progress of one run; only the first of several processes writes.

  On a resumed run, lines of `metrics.jsonl` after `step` are dropped: their steps run again. So are lines that are no
  metrics of a step, which a machine that stopped in the middle of writing may leave. NaN and infinity, which JSON does
  not have, are null there.
  """

  def __init__(self, workdir: str | pathlib.Path, step: int, steps: int | None, *, stream=None,
               clock=time.monotonic):
    self._active = jax.process_index() == 0
    if not self._active:
      return
    path = pathlib.Path(workdir) / 'metrics.jsonl'
    if path.exists():
      part = path.with_name(path.name + '.part')
      part.write_bytes(b''.join(line for line in path.read_bytes().splitlines(keepends=True) if _is_up_to(step, line)))
      os.replace(part, path)
    self._file = path.open('a')
    self._postfix = {}
    self._events = tensorboardX.SummaryWriter(str(workdir), write_to_disk=True, purge_step=step + 1 if step else None)
    self._stream = stream or sys.stderr
    if self._stream.isatty():
      self._bar = tqdm.tqdm(total=steps, initial=step, unit='step', dynamic_ncols=True, smoothing=0.1,
                            file=self._stream)
    else:
      self._bar = _Lines(step, steps, self._stream, clock)

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Writes the scalars of a log step to the file and the events, and the main ones to the progress."""
    if not self._active:
      return
    scalars = {name: float(value) for name, value in scalars.items()}
    values = {name: round(value, 6) if math.isfinite(value) else None for name, value in scalars.items()}
    self._file.write(json.dumps(dict(step=step, **values), allow_nan=False) + '\n')
    self._file.flush()
    for name, value in scalars.items():
      self._events.add_scalar(name, value, step)
    self.set_postfix(scalars)

  def set_postfix(self, scalars: dict[str, float]) -> None:
    """Sets the scalars that the progress shows from its next refresh on."""
    if self._active:
      shown = {'loss': 'loss', 'images_per_second': 'images/s'}
      self._postfix |= {shown[name]: f'{float(value):.4g}' for name, value in scalars.items() if name in shown}
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


def _is_up_to(step: int, line: bytes) -> bool:
  """Whether a line of metrics.jsonl is whole and of a step up to `step`."""
  try:
    at = json.loads(line)['step'] if line.endswith(b'\n') else None
  except (ValueError, TypeError, KeyError, RecursionError):
    return False
  return isinstance(at, int) and at <= step


class _Lines:
  """Progress on a pipe or into a file: a line every SECONDS at most, and one at the end. Called like tqdm's bar."""

  def __init__(self, step: int, steps: int | None, stream, clock):
    self.n, self._shown, self._stream, self._clock = step, step, stream, clock
    self._total = '' if steps is None else f'/{steps}'
    self._printed = clock()
    self._postfix = {}

  def set_postfix(self, values: dict[str, str], refresh: bool) -> None:
    del refresh
    self._postfix = values

  def update(self, steps: int) -> None:
    self.n += steps
    if self._clock() - self._printed >= SECONDS:
      self._print()

  def _print(self) -> None:
    self._printed, self._shown = self._clock(), self.n
    values = [f'{value} {name}' if '/' in name else f'{name} {value}' for name, value in self._postfix.items()]
    self.write(' '.join([f'step {self.n}{self._total}', *values]), file=self._stream)

  def write(self, text: str, file) -> None:
    print(text, file=file, flush=True)

  def close(self) -> None:
    if self._shown != self.n:
      self._print()
