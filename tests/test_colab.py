"""The notebooks run whole, at a reduced size, in a fresh kernel; their outputs stay out of the repository."""

import base64
import io
import json
import pathlib
import re
import shutil
import sys

import jax
import nbclient
import nbformat
import numpy as np
from PIL import Image
import pytest
from test_krea2 import changed, theirs  # noqa: F401 (a fixture)

FOLDER = pathlib.Path(__file__).parent.parent / 'colab'
NOTEBOOKS = sorted(FOLDER.glob('*.ipynb'))


@pytest.fixture
def run(tmp_path, monkeypatch):
  """`run(name, PARAMETER=value, ...)`: the cells of a notebook after running it in tmp_path."""
  spec = dict(argv=[sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}'], display_name='here',
              language='python')
  kernels = tmp_path / 'kernels' / 'python3'
  kernels.mkdir(parents=True)
  (kernels / 'kernel.json').write_text(json.dumps(spec))
  monkeypatch.setenv('JUPYTER_PATH', str(tmp_path))
  monkeypatch.setenv('PYTHONPATH', str(FOLDER.parent))
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', 'true')  # compiles faster
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(FOLDER.parent / '.cache' / 'jax'))
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')

  def run(name, **changes):
    notebook = nbformat.read(FOLDER / f'{name}.ipynb', as_version=4)
    for setting, value in changes.items():
      line = re.compile(rf"^{setting} = (?:[\d.]+|'.*')(?=  #@param)", re.MULTILINE)
      cells = [cell for cell in notebook.cells if line.search(cell.source)]
      assert len(cells) == 1, setting
      cells[0].source = line.sub(lambda _: f'{setting} = {value!r}', cells[0].source)
    scanned = 'from unifusion_jax.models import layers\nlayers.UNROLL = False'  # compiles faster, too
    notebook.cells.insert(0, nbformat.v4.new_code_cell(scanned))
    place = dict(metadata=dict(path=str(tmp_path)))
    nbclient.NotebookClient(notebook, timeout=600, kernel_name='python3', resources=place).execute()
    return notebook.cells[1:]
  return run


def cell_of(cells, line: str):
  """The one cell with a line of code."""
  (cell,) = [cell for cell in cells if line in cell.source]
  return cell


def printed(cell) -> str:
  return ''.join(output.text for output in cell.outputs if output.output_type == 'stream' and output.name == 'stdout')


def images(cell) -> list[Image.Image]:
  """The images that a cell shows."""
  return [Image.open(io.BytesIO(base64.b64decode(output.data['image/png'])))
          for output in cell.outputs if 'image/png' in output.get('data', {})]


def shown(cell) -> list[tuple[int, int]]:
  """(width, height) of a cell's images."""
  return [image.size for image in images(cell)]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_cleared(path):
  for cell in nbformat.read(path, as_version=4).cells:
    assert cell.cell_type != 'code' or (not cell.outputs and cell.execution_count is None)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_the_set_up_is_the_same(path):
  """The first two cells of code are those of the notebook on editing."""
  sources = lambda path: [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == 'code']
  assert sources(path)[:2] == sources(FOLDER / 'edit.ipynb')[:2]


@pytest.mark.slow
def test_edit_runs_whole(run):
  """Every cell runs; the grid of edits has the reference and two images of 256 pixels each."""
  cell = cell_of(run('edit', STEPS=2), 'STEPS = 2 ')
  assert printed(cell).count('the VLM wrote: ') == 2
  assert shown(cell) == [(3 * 256, 256)]


@pytest.mark.slow
def test_inside_runs_whole(run):
  """Every cell runs, the check of LAP step by step among them; shares add up to 1, and no tap is without effect."""
  cells = run('inside', STEPS=2, SEEDS=2)
  text = printed(cell_of(cells, 'The prompt, span by span'))
  assert '\n> image        16 tokens' in text and '\n  instruction ' in text and '\n> written ' in text
  steps = cell_of(cells, 'inside.maps(')
  assert float(re.search("differ from the model's by (.+?) of their size", printed(steps))[1]) < 1e-4
  maps = cell_of(cells, 'inside_figures.text(')
  weights = re.findall(r'(image|text) +tap 2: +(\S+) tap 4: +(\S+) tap 6: +(\S+)', printed(maps))
  assert len(weights) == 6 and all(abs(sum(map(float, each[1:])) - 1) < 0.02 for each in weights)
  dropped = cell_of(cells, 'SEEDS = 2 ')
  changes = re.findall(r'^(all taps|tap \d: \w+) +(\S+)  from', printed(dropped), re.MULTILINE)
  assert changes[0] == ('all taps', '0.0') and len(changes) == 7 and all(float(change) > 0 for _, change in changes[1:])
  tiles = cell_of(cells, '(4, rewrite)')
  read = re.findall(r'tiles=(\d): (\d) read, (\d+) image', printed(tiles))
  assert read == [('1', '1', '16'), *[('4', '5', '80')] * 2]
  drawn = steps, maps, cell_of(cells, 'over_image('), cell_of(cells, 'layer_similarity('), dropped, tiles
  assert [len(shown(cell)) for cell in drawn] == [1, 1, 1, 1, 1, 3]


@pytest.mark.slow
def test_train_runs_whole(run, tmp_path):
  """Both stages are trained, drawn and exported. Samples and scores are those of the trained weights."""
  Image.new('RGB', (64, 64), 'red').save(tmp_path / 'red.png')
  line = dict(references=['red.png'], instruction='draw it again', target='red.png', caption='a red background')
  (tmp_path / 'list.jsonl').write_text(json.dumps(line) + '\n')  # one shape, while scenes have several to compile
  small = (f'data.path={tmp_path / "list.jsonl"}', 'data.batch_size=2', 'objective.noises_per_example=1',
           'objective.repa_weight=0', 'model.dit.depth=1', 'sample.steps=1', 'sample.verifi=false',
           'eval.split=heldout')
  cells = run('train', T2I_MINUTES=0.01, EDIT_MINUTES=0.01, OWN_MINUTES=0.01, HELD_OUT=2, SHOWN=2, EXAMPLES=1,
              JUDGED='edit', MORE=' '.join(small))
  runs = tmp_path / 'runs' / 'notebook'
  for name in ('t2i', 'edit', 'own'):
    curves, preview = images(cell_of(cells, f"with watched('{name}'):"))
    lines = [json.loads(line) for line in (runs / name / 'metrics.jsonl').read_text().splitlines()]
    assert np.std(curves) > 5 and np.std(preview) > 5 and any('loss' in line for line in lines)
    assert any('held_out_loss_0.9' in line for line in lines) == (name != 'own')
  assert (runs / 'edit' / 'export' / 'unifusion.json').exists()
  assert len(shown(cell_of(cells, 'SHOWN = 2 '))) == 2
  rates = re.findall(r'^(\w+_\d-\d) +all [01]\.\d\d', printed(cell_of(cells, 'EXAMPLES = 1 ')), re.MULTILINE)
  assert rates == ['heldout_edit_1-4']


@pytest.mark.slow
def test_krea2_runs_whole(run, theirs, tmp_path):  # noqa: F811
  """With a small random pipeline in place of the hub's; a LoRA is trained and sampled, and diffusers reads its file."""
  raw, vlm = theirs[1], tmp_path / 'vlm'
  for part in ('text_encoder', 'tokenizer'):
    shutil.copytree(raw / part, vlm, dirs_exist_ok=True)
  turbo = changed(raw, tmp_path / 'turbo', 'model_index.json', is_distilled=True)
  stops = dict(eos_token_id=list(range(300, 640)))  # random weights seldom end by themselves
  (turbo / 'tokenizer' / 'generation_config.json').write_text(json.dumps(stops))
  cells = run('krea2', WEIGHTS=str(turbo), BASE=str(raw), VLM=str(vlm), SIDE=64, STEPS=2, LORA_STEPS=2)
  checked = printed(cell_of(cells, 'SIDE = 64 '))
  assert checked.count('GiB, fits') == 3
  assert 'GB at most' in printed(cell_of(cells, 'NUM_IMAGES = 2 '))
  for line, count in (('NUM_IMAGES = 2 ', 2), ('for system in SYSTEMS', 3), ("REWRITE = '", 1), ("STYLED = '", 1)):
    assert shown(cell_of(cells, line)) == [(64, 64)] * count, line
  full, weak = images(cell_of(cells, 'strengths='))[1:]
  assert np.any(np.asarray(full) != weak)
  assert 'all 32 keys match' in printed(cell_of(cells, "STYLED = '"))
  pipe, folder = theirs[0], tmp_path / 'runs' / 'style' / 'export'
  pipe.load_lora_weights(str(folder), weight_name='pytorch_lora_weights.safetensors')  # as the notebook says
  assert pipe.get_active_adapters()
  pipe.unload_lora_weights()


def test_krea2_says_what_fits(capsys):
  """Of the published sizes what docs/krea2.md says, and a sentence where that is too much; nothing is downloaded."""
  cells = nbformat.read(FOLDER / 'krea2.ipynb', as_version=4).cells
  source = cell_of(cells, 'def missing').source.replace('HOST = 10 ', 'HOST = 10 ** 6 ')
  with pytest.raises(SystemExit, match='are too few'):
    exec(source, dict(jax=jax, pathlib=pathlib, shutil=shutil))
  needs = re.findall(r'^  (.+): ([0-9.]+) GiB', capsys.readouterr().out, re.MULTILINE)
  assert needs == [('sampling, VLM and DiT in turn', '15.2'), ('sampling, both held', '19.7'), ('LoRA', '29.1')]
