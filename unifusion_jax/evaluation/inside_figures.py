"""Figures of inside.py, with matplotlib: each function returns a Figure, which `write` puts into a small file."""

from collections.abc import Sequence
import io
import pathlib
import textwrap

from matplotlib.figure import Figure
import numpy as np
from PIL import Image

ROWS = 40     # tokens of a text in a figure
NUMBERS = 12  # cells along a side up to which a heat map shows its numbers
INCHES = 8.5  # width of a figure
LARGE = 140_000  # bytes


def write(figure: Figure, path: pathlib.Path) -> None:
  """Writes a PNG, of 256 colours where it would have more than LARGE bytes."""
  file = io.BytesIO()
  figure.savefig(file, format='png', dpi=100, pil_kwargs=dict(optimize=True))
  if len(file.getvalue()) <= LARGE:
    path.write_bytes(file.getvalue())
  else:
    Image.open(file).convert('RGB').quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def layer_attention(titles: Sequence[str], attention: Sequence[np.ndarray], taps: Sequence[int]) -> Figure:
  """Attention of layer over layer: a column for each title, whose attention is [n q l], a row for each block."""
  blocks, side = len(attention[0]), min(2.4, INCHES / len(titles))
  figure = Figure((max(5, side * len(titles) + 1), side * blocks + 0.8), layout='constrained')
  axes, drawn = figure.subplots(blocks, len(titles), squeeze=False, sharex=True, sharey=True), None
  most = max(float(values.max()) for values in attention)
  for column, (title, values) in enumerate(zip(titles, attention)):
    axes[0, column].set_title(title, fontsize=9)
    for block, line in enumerate(axes):
      drawn = _heat(line[column], values[block], numbers=7 if len(taps) <= 5 else 0, low=0, high=most,
                    cmap='viridis')
      _ticks(line[column], taps, x=True, y=True, most=max(1, int(5 * side)))
  for block, line in enumerate(axes):
    line[0].set_ylabel(f'block {block + 1}\nlayer that looks', fontsize=8)
  figure.supxlabel('layer looked at', fontsize=8)
  figure.colorbar(drawn, ax=axes, shrink=0.7)
  return figure


def text(labels: Sequence[str], maps: dict[str, np.ndarray], taps: Sequence[int]) -> Figure:
  """Tokens of a text by taps: for each title a heat map [s l]; the first ROWS tokens."""
  labels = labels[:ROWS]
  figure = Figure((INCHES, 0.22 * len(labels) + 1), layout='constrained')
  axes, drawn = figure.subplots(1, len(maps), squeeze=False, sharey=True)[0], None
  most = max(float(np.abs(values).max()) for values in maps.values())
  for axis, (title, values) in zip(axes, maps.items()):
    drawn = _heat(axis, values[:ROWS], numbers=7 if len(taps) <= 5 else 0, low=-most, high=most)
    axis.set_title(title, fontsize=10)
    _ticks(axis, taps, x=True)
  axes[0].set_yticks(range(len(labels)), labels, fontsize=8)
  figure.supxlabel('tap', fontsize=8)
  figure.colorbar(drawn, ax=axes, shrink=0.6)
  return figure


def over_image(image: np.ndarray, places: np.ndarray, maps: dict[str, np.ndarray], taps: Sequence[int]) -> Figure:
  """The maps [s l] of image tokens over their image, with its outlines: a row for each, a column for each tap."""
  rows, columns = places.shape
  side = INCHES / (1 + len(taps))
  tall = side * image.shape[0] / image.shape[1]
  figure = Figure((INCHES + 1, (tall + 0.25) * len(maps) + 0.2), layout='constrained')
  axes, drawn = figure.subplots(len(maps), 1 + len(taps), squeeze=False), None
  outlines = image.mean(axis=2)
  most = max(float(np.abs(values[places]).max()) for values in maps.values())
  places_of = [(np.arange(n) + 0.5) * cells / n - 0.5 for n, cells in zip(outlines.shape, (rows, columns))]
  for line, (title, values) in zip(axes, maps.items()):
    line[0].imshow(image)
    line[0].set_ylabel(textwrap.fill(title, 10), fontsize=8)
    for axis, tap, column in zip(line[1:], taps, values.T):
      drawn = _heat(axis, column[places], numbers=8 if max(rows, columns) <= 4 and len(taps) <= 5 else 0, low=-most,
                    high=most)
      if outlines.std() > 0:
        axis.contour(*places_of[::-1], outlines, levels=[outlines.mean()], colors='black', linewidths=0.8)
      axis.set_title(f'tap {tap}', fontsize=8)
  for axis in axes.flat:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_box_aspect(image.shape[0] / image.shape[1])
  figure.colorbar(drawn, ax=axes, shrink=0.6)
  return figure


def bars(names: Sequence[str], series: dict[str, Sequence[tuple[float, float, float]]], label: str,
         line: tuple[str, float] | None = None) -> Figure:
  """Bars of (value, low, high) for each name, one colour a series, with whiskers from low to high.

  line: (title, value) of a level to compare with.
  """
  width = 0.8 / len(series)
  figure = Figure((INCHES, 2.8), layout='constrained')
  axis = figure.subplots()
  for i, (title, values) in enumerate(series.items()):
    value, low, high = np.array(values, float).T
    places = np.arange(len(names)) + (i - (len(series) - 1) / 2) * width
    axis.bar(places, value, width, label=title)
    if np.any(low < high):
      axis.errorbar(places, value, np.maximum(0, [value - low, high - value]), fmt='none', ecolor='black',
                    elinewidth=0.8, capsize=2)
  if line:
    axis.axhline(line[1], color='black', linestyle='--', linewidth=0.8, label=line[0])
  axis.axhline(0, color='black', linewidth=0.5)
  longest = max(map(len, names))
  axis.set_xticks(range(len(names)), names, fontsize=8, rotation=0 if longest * len(names) < 90 else 45)
  axis.set_ylabel(label, fontsize=8)
  axis.legend(fontsize=8, ncols=len(series) + 1, loc='lower left', bbox_to_anchor=(0, 1), frameon=False)
  return figure


def images(titles: Sequence[str], *rows: Sequence[np.ndarray]) -> Figure:
  """Rows of images uint8 [y x 3] under one row of titles; many in several lines."""
  most = 8
  lines = [(titles[i:i + most], [row[i:i + most] for row in rows]) for i in range(0, len(titles), most)]
  columns, side = min(most, len(titles)), 1.1
  tall = side * max(image.shape[0] / image.shape[1] for image in rows[0])
  figure = Figure((side * columns, len(lines) * (tall * len(rows) + 0.35)), layout='constrained')
  axes = figure.subplots(len(lines) * len(rows), columns, squeeze=False)
  for number, (names, parts) in enumerate(lines):
    for line, part in zip(axes[number * len(rows):], parts):
      for axis, image in zip(line, part):
        axis.imshow(image)
    for axis, name in zip(axes[number * len(rows)], names):
      axis.set_title(name, fontsize=8)
  for axis in axes.flat:
    axis.axis('off')
  return figure


def similarity(matrices: dict[str, np.ndarray], taps: Sequence[int]) -> Figure:
  """Square heat maps [n n] of the layers of a VLM, whose taps are marked along the axes."""
  n = len(next(iter(matrices.values())))
  figure = Figure((INCHES, INCHES / 2 * -(-len(matrices) // 2)), layout='constrained')
  axes, drawn = figure.subplots(-(-len(matrices) // 2), min(2, len(matrices)), squeeze=False), None
  low = min(0.0, *(float(matrix.min()) for matrix in matrices.values()))
  for axis, (title, matrix) in zip(axes.flat, matrices.items()):
    drawn = _heat(axis, matrix, numbers=7 if n <= NUMBERS else 0, low=low, high=1, cmap='viridis')
    axis.set_title(title, fontsize=9)
    _ticks(axis, range(n), x=True, y=True)
    for tick, layer in [(label, at) for side in (axis.xaxis, axis.yaxis)
                        for label, at in zip(side.get_ticklabels(), side.get_ticklocs())]:
      tick.set_fontweight('bold' if layer in taps else 'normal')
      tick.set_color('tab:red' if layer in taps else 'black')
    if n > NUMBERS:
      axis.plot(taps, taps, '.', color='tab:red', markersize=4)
  for axis in axes.flat[len(matrices):]:
    axis.axis('off')
  figure.supxlabel('layer of the VLM (0: embeddings); taps in red', fontsize=8)
  figure.colorbar(drawn, ax=axes, shrink=0.6)
  return figure


def by_layer(series: dict[str, np.ndarray], taps: Sequence[int], label: str) -> Figure:
  """Lines of a value [n] by layer of the VLM, with its taps marked."""
  figure = Figure((INCHES, 2.6), layout='constrained')
  axis = figure.subplots()
  for title, values in series.items():
    axis.plot(values, marker='.', label=title)
  for tap in taps:
    axis.axvline(tap, color='tab:red', linewidth=0.6, alpha=0.5)
  if all(np.min(values) > 0 for values in series.values()) and max(map(np.max, series.values())) > 20 * min(
      map(np.min, series.values())):
    axis.set_yscale('log')
  axis.set_xlabel('layer of the VLM (0: embeddings); taps in red', fontsize=8)
  axis.set_ylabel(label, fontsize=8)
  axis.legend(fontsize=8)
  return figure


def _heat(axis, values: np.ndarray, numbers: int, low: float, high: float, cmap: str = 'RdBu_r'):
  """A heat map of values [y x]; numbers: the size of their digits, 0 for none."""
  drawn = axis.imshow(values, cmap=cmap, vmin=low, vmax=high, aspect='auto')
  for (y, x), value in np.ndenumerate(values) if numbers else ():
    red, green, blue, _ = drawn.cmap(drawn.norm(value))
    dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
    axis.text(x, y, f'{value:.2f}', ha='center', va='center', fontsize=numbers, color='white' if dark else 'black')
  return drawn


def _ticks(axis, names: Sequence, x: bool = False, y: bool = False, most: int = 20) -> None:
  """Names along the axes, of more than `most` each n-th."""
  each = -(-len(names) // most)
  places = range(0, len(names), each)
  if x:
    axis.set_xticks(places, [names[i] for i in places], fontsize=7)
  if y:
    axis.set_yticks(places, [names[i] for i in places], fontsize=7)
