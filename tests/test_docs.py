"""What the documents say of settings and flags is so, and the package has what they promise.

Commands: test_docs_commands.py. Links: test_links.py.
"""

import dataclasses
import importlib
import re
import shlex
import tomllib

import pytest
import setuptools
from test_docs_commands import names, PAGES, parsed, RECIPES, ROOT

from unifusion_jax import command_line

GROUPS = ('objective', 'data', 'optim', 'train', 'sample', 'rewrite', 'eval', 'mesh', 'model', 'plan', 'demo',
          'benchmark', 'inspect')


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
  monkeypatch.chdir(ROOT)


@pytest.mark.parametrize('path', PAGES, ids=names)
def test_flags_in_tables_and_text_parse(path):
  """Code like `--config.sample.steps=24 --config.sample.eta=1`: without a recipe, of describe, compare or edit."""
  text = re.sub(r'```.*?```', '', path.read_text(), flags=re.DOTALL)
  for code in re.findall(r'`(--[^`]+)`', text):
    words = [word for word in shlex.split(code) if not re.fullmatch(r'--config\.[\w.]+', word)]
    if any(word.startswith('--config=') for word in words):
      parsed(['--mode=eval', *words])
    elif words and words[0].startswith('--config.'):
      for recipe in ('describe', 'compare', 'edit'):
        try:
          parsed([f'--config=configs/{recipe}.py', *words])
          break
        except command_line.UserError:
          if recipe == 'edit':
            raise


def settings(config, prefix: str = '') -> set[str]:
  """The dotted names of all settings of a configuration."""
  here = {f'{prefix}{field.name}' for field in dataclasses.fields(config)}
  return here.union(*(settings(getattr(config, field.name), f'{prefix}{field.name}.')
                      for field in dataclasses.fields(config) if dataclasses.is_dataclass(getattr(config, field.name))))


@pytest.mark.parametrize('path', [path for path in PAGES if path.name != 'history.md'], ids=names)
def test_settings_exist(path):
  there = set().union(*(settings(parsed([f'--config=configs/{recipe.name}'])) for recipe in RECIPES))
  named = re.findall(rf'`((?:{"|".join(GROUPS)})\.[a-z0-9_.]+)', path.read_text())
  files = {'config.json', 'eval.json', 'plan.json', 'train.lock', 'inspect.json', 'inspect.md'}
  assert set(named) <= there | files, sorted(set(named) - there)


def test_new_names_of_settings_exist():
  """The right column of the table of what a setting was called before."""
  there = set().union(*(settings(parsed([f'--config=configs/{recipe.name}'])) for recipe in RECIPES))
  rows = re.findall(r'^\|([^|]*)\|([^|]*)\|$', (ROOT / 'docs' / 'history.md').read_text(), re.M)
  before, now = (set(re.findall(rf'`((?:{"|".join(GROUPS)})\.[a-z_]+)', ' '.join(column))) for column in zip(*rows))
  assert len(now) >= 12 and now <= there, now - there
  assert before & there <= {'data.tasks', 'eval.study'}  # of which only the values changed


def test_extras_are_the_requirement_files():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  for extra in ('test', 'docs'):
    lines = [line.partition('#')[0].strip() for line in (ROOT / f'requirements-{extra}.txt').read_text().splitlines()]
    assert project['optional-dependencies'][extra] == [line for line in lines if line]
  assert project['license'] == 'Apache-2.0' and 'Apache License' in (ROOT / 'LICENSE').read_text()
  module, _, function = project['scripts']['unifusion'].partition(':')
  assert callable(getattr(importlib.import_module(module), function))


def test_the_package_holds_recipes_and_assets():
  settings = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']
  packages = setuptools.find_packages(ROOT, include=settings['packages']['find']['include'])
  sources = {path.parent for room in ('unifusion_jax', 'configs') for path in (ROOT / room).rglob('*.py')}
  assert {names(folder).replace('/', '.') for folder in sources} == set(packages)
  pattern, types = settings['package-data']['unifusion_jax']
  assert (ROOT / 'unifusion_jax' / types).exists()  # with it, users see our types
  assert {path for path in (ROOT / 'unifusion_jax' / 'assets').rglob('*') if path.is_file()} <= set(
      (ROOT / 'unifusion_jax').glob(pattern))
