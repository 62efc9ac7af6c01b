"""The wheel: it holds assets and recipes, and works from another folder than the repository."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from test_terminal import on_a_terminal

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
USES = """
import sys

from unifusion_jax import command_line, main

def run(*arguments):
  sys.argv = ['unifusion', *arguments]
  try:
    main.run()
  except SystemExit as end:
    print('ended with', end.code)

print(main.__file__)
print(command_line.read('configs/edit.py', ['data.size=96']).data.size, command_line.read('t2i:8b').taps)
run('--mode=info', 'tiny')
run('--mode=info', 'tiny', '--config=edit')
run('--mode=info')
run('--help')
"""


def done(*command, **options) -> str:
  result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False,
                          timeout=600, **options)
  assert result.returncode == 0, result.stdout + result.stderr
  return result.stdout


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
  """The folder in which a wheel of the repository's sources is installed, without its requirements."""
  sources, target = tmp_path_factory.mktemp('sources'), tmp_path_factory.mktemp('target')
  for name in ('pyproject.toml', 'requirements.txt', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, sources)
  for name in ('unifusion_jax', 'configs'):
    shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns('__pycache__'))
  quiet = ('--quiet', '--no-deps', '--disable-pip-version-check')
  done('-m', 'pip', 'wheel', *quiet, '--no-build-isolation', f'--wheel-dir={sources}/dist', sources)
  (wheel,) = (sources / 'dist').glob('unifusion_jax-*-py3-none-any.whl')
  done('-m', 'pip', 'install', *quiet, '--no-compile', f'--target={target}', wheel)
  return target


def test_it_holds_what_the_repository_has(installed):
  for room in ('unifusion_jax', 'configs'):
    files = {path.relative_to(ROOT) for path in (ROOT / room).rglob('*') if path.is_file()}
    there = {path.relative_to(installed) for path in (installed / room).rglob('*') if path.is_file()}
    assert there == {path for path in files if '__pycache__' not in path.parts}
  assert (installed / 'bin' / 'unifusion').exists()


def test_it_works_from_another_folder(installed, tmp_path):
  environment = os.environ | dict(PYTHONPATH=str(installed), PYTHONDONTWRITEBYTECODE='1')
  result = subprocess.run([sys.executable, '-c', USES], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          check=False, timeout=600)
  said = result.stdout
  assert result.returncode == 0, said + result.stderr
  lines = said.splitlines()
  assert lines[0] == str(installed / 'unifusion_jax' / 'main.py')
  assert lines[1].startswith('96 (')
  assert lines[2].split(maxsplit=1) == ['checkpoint', str(installed / 'unifusion_jax' / 'assets' / 'tiny' / 'edit')]
  assert lines[3].startswith('kind ') and any(re.match('scores +test: all ', line) for line in lines)
  ends = [line.removeprefix('ended with ') for line in lines if line.startswith('ended with ')]
  assert ends[0] == 'None' and len(ends) == 3
  assert all(end.startswith('error: --mode=info takes one checkpoint') for end in ends[1:]), ends
  assert '\n  edit_lora ' in said and '\n  --workdir: Folder of the run' in said


def test_the_console_script_on_a_terminal(installed, tmp_path, monkeypatch):
  """What is wrong ends it in one sentence, with 1."""
  monkeypatch.chdir(tmp_path)
  code = f"""
import runpy, sys
sys.argv = ['unifusion', '--config', 'edit', '--config.data.sizes=1']
runpy.run_path('{installed}/bin/unifusion', run_name='__main__')
"""
  shown, ended = on_a_terminal(code, PYTHONPATH=str(installed), PYTHONDONTWRITEBYTECODE='1')
  assert ended == 1 and shown.startswith("\x1b[31merror:\x1b[0m there is no setting 'config.data.sizes'; did you mean")
  assert 'Traceback' not in shown


def test_versions_have_lower_bounds():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  lines = (ROOT / 'requirements.txt').read_text().splitlines() + sum(project['optional-dependencies'].values(), [])
  names = [line.partition('#')[0].strip() for line in lines]
  assert all(re.search('[>=]=', name) for name in names if name and not name.startswith('jax['))
  assert {'tpu', 'cuda13', 'test', 'lint'} <= project['optional-dependencies'].keys()
