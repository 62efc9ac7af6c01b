"""Progress of long work: a bar on terminals and in notebooks, else lines at intervals."""

import os
import sys
import time
import warnings

with warnings.catch_warnings(action='ignore'):  # of notebooks without ipywidgets
  from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook

IN_NOTEBOOK = issubclass(tqdm, tqdm_notebook)  # with ipywidgets, where the bar is one
SECONDS = 10.0  # between two lines


def bar(total: int | None, unit: str, start: int = 0, *, silent: bool = False, stream=None, clock=time.monotonic):
  """Progress on stderr: tqdm's bar on a terminal or in a notebook, lines that are called like it elsewhere.

  silent: no progress, as of every process but the first.
  """
  stream = stream or sys.stderr
  if silent or IN_NOTEBOOK or stream.isatty():
    return tqdm(total=total, initial=start, unit=unit, smoothing=0.1, file=stream, disable=silent, **_size(stream))
  return _Lines(total, unit, start, stream, clock)


def _size(stream) -> dict:
  """The size of a bar: that of the terminal, if it has one. One of no columns, as in some containers, shows no bar."""
  try:
    known = IN_NOTEBOOK or os.get_terminal_size(stream.fileno()).columns
  except OSError:
    known = 0
  return dict(dynamic_ncols=True) if known else dict(ncols=80, nrows=24)


class _Lines:
  """A line of progress every SECONDS at most, and one at the end."""

  def __init__(self, total: int | None, unit: str, start: int, stream, clock):
    self.n, self._shown, self._stream, self._clock = start, start, stream, clock
    self._unit, self._total = unit, '' if total is None else f'/{total}'
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
    self.write(' '.join([f'{self._unit} {self.n}{self._total}', *values]), file=self._stream)

  def write(self, text: str, file) -> None:
    print(text, file=file, flush=True)

  def close(self) -> None:
    if self._shown != self.n:
      self._print()
