"""Scalars on their way out: a progress bar, `metrics.jsonl` and TensorBoard events."""

import json
import os
import pathlib
import sys

import jax
import tensorboardX
import tqdm


class Writer:
  """Writes the metrics of one run; only the first of several processes does.

  On a resumed run, lines of `metrics.jsonl` from `step` on belong to work that was lost and are dropped.
  """

  def __init__(self, workdir: str | pathlib.Path, step: int, steps: int):
    self._active = jax.process_index() == 0
    if not self._active:
      return
    path = pathlib.Path(workdir) / 'metrics.jsonl'
    kept = []
    if path.exists():
      whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith('\n')]  # an end may be cut off
      kept = [line for line in whole if line.strip() and json.loads(line)['step'] <= step]
    part = path.with_name(path.name + '.part')
    part.write_text(''.join(kept))
    os.replace(part, path)
    self._file = path.open('a')
    self._shown = {}
    self._events = tensorboardX.SummaryWriter(str(workdir), write_to_disk=True, purge_step=step + 1 if step else None)
    self._bar = tqdm.tqdm(total=steps, initial=step, unit='step', dynamic_ncols=True, file=sys.stderr, smoothing=0.1)

  def write(self, step: int, scalars: dict[str, float]) -> None:
    if not self._active:
      return
    scalars = {name: float(value) for name, value in scalars.items()}
    self._file.write(json.dumps(dict(step=step, **{k: round(v, 6) for k, v in scalars.items()})) + '\n')
    self._file.flush()
    for name, value in scalars.items():
      self._events.add_scalar(name, value, step)
    self.show(scalars)

  def show(self, scalars: dict[str, float]) -> None:
    """What of them the bar tells."""
    if self._active:
      self._shown |= {k: f'{float(v):.4g}' for k, v in scalars.items() if k in ('loss', 'images_per_second')}
      self._bar.set_postfix(self._shown, refresh=False)

  def advance(self, step: int) -> None:
    if self._active:
      self._bar.update(step - self._bar.n)

  def say(self, text: str) -> None:
    """A line of its own, above the bar."""
    if self._active:
      tqdm.tqdm.write(text, file=sys.stderr)

  def close(self) -> None:
    if self._active:
      self._bar.close()
      self._events.close()
      self._file.close()
