"""Pipelines from folders: a light import, parts that fit, descriptions that cannot be, exports that are moved."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from test_pipeline import REFERENCES

from unifusion_jax import config, description
from unifusion_jax.errors import UserError
from unifusion_jax.models import unifusion
from unifusion_jax.pipeline import UniFusionPipeline


def run(code: str, folder: pathlib.Path) -> str:
  """What a fresh process in another folder prints."""
  root = str(pathlib.Path(__file__).parent.parent)
  environment = dict(os.environ, PYTHONPATH=root, JAX_PLATFORMS='cpu', JAX_COMPILATION_CACHE_DIR=f'{root}/.cache/jax',
                     JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0.5')
  done = subprocess.run([sys.executable, '-c', code], cwd=folder, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_the_import_is_light(tmp_path):
  slow = ('tensorflow_datasets', 'pyarrow', 'orbax', 'transformers', 'grain')
  assert run('from unifusion_jax import UniFusionPipeline\nimport sys\n'
             f'print([name for name in {slow} if name in sys.modules])', tmp_path) == '[]\n'
  with pytest.raises(ImportError):
    from unifusion_jax import Pipeline  # noqa: F401


@pytest.mark.slow
def test_it_works_from_any_folder_without_a_mesh(tmp_path):
  code = ('from unifusion_jax import UniFusionPipeline\n'
          "pipe = UniFusionPipeline.from_pretrained('tiny')\n"
          "result = pipe('a red circle', rewrite='a red circle', steps=1, guidance=1.0)\n"
          'print(pipe.mesh.axis_names, result.images[0].size)')
  assert run(code, tmp_path) == "('data', 'fsdp', 'tp') (64, 64)\n"


def folder(tmp_path, **changes):
  """The shipped model's folder without its weights, with other entries in unifusion.json; None takes one out."""
  shutil.copy(config.ASSETS / 'edit' / 'config.json', tmp_path)
  values = json.loads((config.ASSETS / 'edit' / 'unifusion.json').read_text()) | changes
  values = {name: value for name, value in values.items() if value is not None}
  (tmp_path / 'unifusion.json').write_text(json.dumps(values))
  return tmp_path


@pytest.mark.parametrize('changes, message', [
    (dict(vlm=None, size=None), 'vlm is missing; size is missing'), (dict(colour='red'), 'colour is not known'),
    (dict(taps=[2, 4]), 'must be 3 increasing layer'), (dict(taps=[2, 6, 4]), 'must be 3 increasing layer'),
    (dict(taps=[2, 4, 60]), 'has 6 layers of width 160'), (dict(taps=7), 'taps=7 must be a list'),
    (dict(sample=dict(stepps=3)), "did you mean 'steps'"), (dict(sample=dict(steps=0)), 'steps=0 must be'),
    (dict(vlm='../nowhere'), 'has its vlm in ../nowhere, which is not there')])
def test_descriptions_that_cannot_be(tmp_path, changes, message):
  with pytest.raises(UserError, match=re.escape(message)):
    UniFusionPipeline.from_pretrained(folder(tmp_path, **changes))


def test_parts_that_do_not_fit(tmp_path, recipe, qwen):
  with pytest.raises(UserError, match='has no unifusion.json'):
    UniFusionPipeline.from_pretrained(config.ASSETS / 'vlm')
  with pytest.raises(UserError, match='of width 32, but .* pools layers .* of width 160'):
    UniFusionPipeline.from_pretrained(folder(tmp_path), vlm=str(qwen))
  with pytest.raises(UserError, match='has 4 latent channels and .* wants 16'):
    UniFusionPipeline.from_pretrained(folder(tmp_path), vae=recipe().vae)
  with pytest.raises(UserError, match='no such folder'):
    UniFusionPipeline.from_pretrained('small')
  with pytest.raises(UserError, match="dtype='half'"):
    UniFusionPipeline.from_pretrained(dtype='half')


@pytest.mark.slow
def test_an_export_is_a_pipeline(recipe, pipe, tmp_path):
  """Saved beside its parts, described, moved and loaded: the same images."""
  settings = recipe()
  shutil.copytree(settings.vlm, tmp_path / 'run' / 'vlm')
  settings = dataclasses.replace(settings, vlm=str(tmp_path / 'run' / 'vlm'))
  unifusion.save(pipe.model, tmp_path / 'run' / 'export')
  description.save(tmp_path / 'run' / 'export', settings)
  (tmp_path / 'run').rename(tmp_path / 'moved')
  loaded = UniFusionPipeline.from_pretrained(tmp_path / 'moved' / 'export')
  assert loaded.settings.settings() == settings.sample.settings() and loaded.size == 64
  np.testing.assert_array_equal(loaded('make it blue', images=REFERENCES[0], rewrite='x').arrays[0],
                                pipe('make it blue', images=REFERENCES[0], rewrite='x').arrays[0])
