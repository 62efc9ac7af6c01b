"""The notebooks run whole, at a reduced size, in a fresh kernel; their outputs stay out of the repository."""

import base64
import json
import pathlib
import re
import sys

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parent.parent / 'colab'
NOTEBOOKS = sorted(FOLDER.glob('*.ipynb'))


@pytest.fixture
def run(tmp_path, monkeypatch):
  """`run(name, change=to, ...)`: the cells of a notebook after running it, with `change = ` a number set to another."""
  spec = dict(argv=[sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}'], display_name='here',
              language='python')
  kernels = tmp_path / 'kernels' / 'python3'
  kernels.mkdir(parents=True)
  (kernels / 'kernel.json').write_text(json.dumps(spec))
  monkeypatch.setenv('JUPYTER_PATH', str(tmp_path))
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', 'true')  # compiles faster
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(FOLDER.parent / '.cache' / 'jax'))

  def run(name, **changes):
    notebook = nbformat.read(FOLDER / f'{name}.ipynb', as_version=4)
    for setting, value in changes.items():
      cells = [cell for cell in notebook.cells if re.search(rf'^{setting} = \d+ ', cell.source, re.MULTILINE)]
      assert len(cells) == 1, setting
      cells[0].source = re.sub(rf'^{setting} = \d+ ', f'{setting} = {value} ', cells[0].source, flags=re.MULTILINE)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name='python3').execute()
    return notebook.cells
  return run


def cell_of(cells, line: str):
  """The one cell with a line of code."""
  (cell,) = [cell for cell in cells if line in cell.source]
  return cell


def printed(cell) -> str:
  return ''.join(output.text for output in cell.outputs if output.output_type == 'stream' and output.name == 'stdout')


def shown(cell) -> list[tuple[int, int]]:
  """(width, height) of a cell's images."""
  headers = [base64.b64decode(output.data['image/png'])[16:24]
             for output in cell.outputs if 'image/png' in output.get('data', {})]
  return [(int.from_bytes(header[:4]), int.from_bytes(header[4:])) for header in headers]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_cleared(path):
  for cell in nbformat.read(path, as_version=4).cells:
    assert cell.cell_type != 'code' or (not cell.outputs and cell.execution_count is None)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_the_set_up_is_the_same(path):
  """The first two cells of code are those of the notebook on editing."""
  sources = lambda path: [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == 'code']
  assert sources(path)[:2] == sources(FOLDER / 'edit.ipynb')[:2]


def test_edit_runs_whole(run):
  """Every cell runs; the grid of edits has the reference and two images of 256 pixels each."""
  cell = cell_of(run('edit', STEPS=2), 'STEPS = 2 ')
  assert printed(cell).count('the VLM wrote: ') == 2
  assert shown(cell) == [(3 * 256, 256)]


def test_inside_runs_whole(run):
  """Every cell runs, the check of LAP by hand among them; shares add up to 1, and no tap is without effect."""
  cells = run('inside', STEPS=2, SEEDS=2)
  text = printed(cell_of(cells, 'The prompt, span by span'))
  assert '\n> image        16 tokens' in text and '\n  instruction ' in text and '\n> written ' in text
  assert float(re.search('condition tokens of pipe.encode: (.+?);', printed(cell_of(cells, 'by_hand =')))[1]) < 1e-3
  maps = cell_of(cells, 'looks =')
  weights = re.findall(r'(image|text) +tap 2: +(\S+) tap 4: +(\S+) tap 6: +(\S+)', printed(maps))
  assert len(weights) == 6 and all(abs(sum(map(float, each[1:])) - 1) < 0.02 for each in weights)
  dropped = cell_of(cells, 'SEEDS = 2 ')
  changes = re.findall(r'^(all taps|tap \d: \w+) +(\S+)  from', printed(dropped), re.MULTILINE)
  assert changes[0] == ('all taps', '0.0') and len(changes) == 7 and all(float(change) > 0 for _, change in changes[1:])
  tiles = cell_of(cells, '(4, rewrite)')
  read = re.findall(r'tiles=(\d): (\d) read, (\d+) image', printed(tiles))
  assert read == [('1', '1', '16'), *[('4', '5', '80')] * 2]
  assert [len(shown(cell)) for cell in (maps, cell_of(cells, 'outlines,'), dropped, tiles)] == [1, 1, 1, 3]
