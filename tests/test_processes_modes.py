"""Every command of main by several processes as by one."""

import dataclasses
import json
import pickle

import numpy as np
from PIL import Image
import pytest
import safetensors.numpy
from several import run

from unifusion_jax import config
from unifusion_jax.commands import rewrite
from unifusion_jax.data import imaging
from unifusion_jax.data.config import Task
from unifusion_jax.evaluation import records

pytestmark = pytest.mark.slow

COMMANDS = """
import pathlib
from absl import flags
from unifusion_jax import command_line, main
from unifusion_jax.models import layers
layers.UNROLL = False  # compiles faster
folder = pathlib.Path(folder)
for arguments in COMMANDS:
  sys.argv = ['main', f'--config={folder.parent}/recipe.py', f'--workdir={folder}', *arguments]
  main.main(command_line.parse(sys.argv))
  flags.FLAGS.unparse_flags()
  flags.FLAGS.setting = []
print('done')
"""
MODES = COMMANDS.replace('COMMANDS', repr([
    ['--mode=train'], ['--mode=sample', '--config.sample.prompt=a red circle', '--config.sample.steps=2'],
    ['--mode=eval'], ['--mode=export'], ['--mode=rewrite']]))
LONGER = ['--mode=train', '--config.train.steps=4', '--config.train.preview_every=0']  # shown on the mesh before


def test_every_mode_on_two_processes_as_on_one(recipe, tmp_path):
  """One writes what there is one of; the numbers are those of one process, to the order of sums over devices."""
  for i in range(2):
    noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    imaging.write_png(tmp_path / f'{i}.png', noise)
  rows = [dict(references=['0.png'], instruction=f'make it {color}', target='1.png', caption=f'a {color} circle')
          for color in ('red', 'green', 'blue', 'black', 'white', 'yellow', 'gray', 'orange', 'pink')]
  (tmp_path / 'list.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  made = recipe(mesh=config.MeshConfig(data=2, fsdp=2), eval=records.RecordsEvaluation(examples=4, batch_size=4),
                train=config.TrainConfig(steps=2, log_every=1, save_every=1, preview_every=2, held_out_every=0),
                rewrite=rewrite.RewriteConfig(batch_size=4))
  made.data = dataclasses.replace(made.data, path=str(tmp_path / 'list.jsonl'), tasks=(Task('edit'),))
  (tmp_path / 'recipe.pickle').write_bytes(pickle.dumps(made))
  (tmp_path / 'recipe.py').write_text('import pathlib, pickle\n\n\ndef get_config():\n  return pickle.loads('
                                      "pathlib.Path(__file__).with_suffix('.pickle').read_bytes())\n")
  two, one = tmp_path / 'two', tmp_path / 'one'
  results = run(MODES, folder=str(two)), run(MODES, count=1, folder=str(one))
  assert [(code, out) for each in results for code, out, _ in each] == [(0, 'done')] * 3, results
  names = [sorted(str(path.relative_to(folder)) for path in folder.rglob('*')
                  if path.is_file() and not {'checkpoints'} & {*path.relative_to(folder).parts}
                  and not path.name.startswith(('events', 'rewrites-'))) for folder in (two, one)]
  assert names[0] == names[1] and {'config.json', 'metrics.jsonl', 'eval.json', 'export/config.json',
                                   'images/000.png', 'samples/0000002.png'} <= set(names[0])
  steps = [[json.loads(line)['step'] for line in (folder / 'metrics.jsonl').read_text().splitlines()]
           for folder in (two, one)]
  assert steps == [[1, 2]] * 2
  weights = [safetensors.numpy.load_file(next((folder / 'export').glob('*.safetensors'))) for folder in (two, one)]
  for name, value in weights[1].items():
    np.testing.assert_allclose(weights[0][name].astype(np.float32), value.astype(np.float32), rtol=0, atol=1e-4)
  images = [np.asarray(Image.open(folder / 'images' / '000.png'), np.int32) for folder in (two, one)]
  assert np.abs(images[0] - images[1]).max() <= 2
  written = [{line['key']: line for path in sorted((folder / 'rewrites').glob('rewrites-*.jsonl'))
              for line in map(json.loads, path.read_text().splitlines())} for folder in (two, one)]
  assert written[0] == written[1] and len(written[0]) == len(rows)
  assert len(list((two / 'rewrites').glob('rewrites-*.jsonl'))) == 2
  # Each goes on as the other was, on another mesh
  results = [run(COMMANDS.replace('COMMANDS', repr([[*LONGER, *mesh], ['--mode=export']])), count, str(folder))
             for folder, count, mesh in ((two, 1, ['--config.mesh.data=1', '--config.mesh.fsdp=4']),
                                         (one, 2, ['--config.mesh.data=1', '--config.mesh.tp=2']))]
  assert [(code, out) for each in results for code, out, _ in each] == [(0, 'done')] * 3, results
  for folder in (two, one):
    lines = (folder / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(line)['step'] for line in lines] == [1, 2, 3, 4]
  later = [safetensors.numpy.load_file(next((folder / 'export').glob('*.safetensors'))) for folder in (two, one)]
  for name, value in later[1].items():
    np.testing.assert_allclose(later[0][name].astype(np.float32), value.astype(np.float32), rtol=0, atol=2e-4)
  assert any(np.abs(weights[0][name].astype(np.float32) - value).max() > 1e-3 for name, value in later[0].items())
