"""The notebooks run whole, at a reduced size, in a fresh kernel; their outputs stay out of the repository."""

import base64
import json
import pathlib
import sys

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / 'colab').glob('*.ipynb'))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_cleared(path):
  for cell in nbformat.read(path, as_version=4).cells:
    assert cell.cell_type != 'code' or (not cell.outputs and cell.execution_count is None)


def test_edit_runs_whole(tmp_path, monkeypatch):
  """Every cell runs; the grid of edits has the reference and two images of 256 pixels each."""
  notebook = nbformat.read(pathlib.Path(__file__).parent.parent / 'colab' / 'edit.ipynb', as_version=4)
  steps = [cell for cell in notebook.cells if 'STEPS = 24 ' in cell.source]
  assert len(steps) == 1
  steps[0].source = steps[0].source.replace('STEPS = 24 ', 'STEPS = 2 ')
  spec = dict(argv=[sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}'], display_name='here',
              language='python')
  kernels = tmp_path / 'kernels' / 'python3'
  kernels.mkdir(parents=True)
  (kernels / 'kernel.json').write_text(json.dumps(spec))
  monkeypatch.setenv('JUPYTER_PATH', str(tmp_path))
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  nbclient.NotebookClient(notebook, timeout=600, kernel_name='python3').execute()
  texts = [output.text for output in steps[0].outputs if output.output_type == 'stream']
  assert sum(text.count('the VLM wrote: ') for text in texts) == 2
  (image,) = [output.data['image/png'] for output in steps[0].outputs if 'image/png' in output.get('data', {})]
  header = base64.b64decode(image)[16:24]
  assert (int.from_bytes(header[:4]), int.from_bytes(header[4:])) == (3 * 256, 256)
