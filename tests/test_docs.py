"""What the documents tell a reader to type: commands parse against their recipe, settings and files exist.

Links: test_links.py."""

import copy
import dataclasses
import importlib.util
import pathlib
import re
import shlex
import tomllib

from absl import flags
import pytest
import setuptools

from unifusion_jax import command_line, main
from unifusion_jax import config as configuration
from unifusion_jax.planning import chips

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [*(ROOT / folder / 'README.md' for folder in ('', 'benchmarks', 'launch')), ROOT / 'CONTRIBUTING.md',
         *sorted((ROOT / 'docs').glob('*.md'))]
RECIPES = sorted((ROOT / 'configs').glob('[a-z]*.py'))
GROUPS = ('objective', 'data', 'optim', 'train', 'sample', 'rewrite', 'eval', 'mesh', 'model', 'plan', 'demo')


def names(path: pathlib.Path) -> str:
  return str(path.relative_to(ROOT))


def parsed(arguments: list[str]):
  """The recipe under the overrides of one command; UserError where they cannot be parsed or cannot work together."""
  values, argv = flags.FlagValues(), ['main', *arguments]
  command_line.define(values)
  for flag in flags.FLAGS.get_flags_for_module(main.__name__):
    if flag.name not in values:
      flags.DEFINE_flag(copy.deepcopy(flag), values)
  command_line.parse(argv, values)
  config = command_line.read(values.config, values.setting)
  if isinstance(config, configuration.Config):
    devices = chips.topology(values.topology).devices if values.topology else config.devices or 1
    configuration.check(config, devices)
  return config


def commands(text: str) -> list[list[str]]:
  """The words of each simple command of a shell script, its variables put in place."""
  variables, found = {}, []
  for line in text.replace('\\\n', ' ').splitlines():
    for name, value in variables.items():
      line = line.replace(f'${name}', value)
    words = shlex.split(line, comments=True)
    while words and '=' in words[0] and not words[0].startswith('-'):
      name, _, variables[name] = words.pop(0).partition('=')
    if words:
      found.append(words)
  return found


def fenced(path: pathlib.Path) -> list[list[str]]:
  """The commands of a page's shell blocks, or of a recipe's head."""
  text = path.read_text()
  if path.suffix == '.py':
    head = text.split('"""')[1].replace('\\\n', ' ')
    return commands('\n'.join(line for line in head.splitlines() if line.startswith('  python ')))
  blocks = re.findall(r'^ *```(\w*)\n(.*?)^ *```$', text, re.DOTALL | re.MULTILINE)
  return [words for language, block in blocks if language == 'bash' for words in commands(block)]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
  monkeypatch.chdir(ROOT)


@pytest.mark.parametrize('path', [*PAGES, *RECIPES], ids=names)
def test_commands_parse(path):
  for words in fenced(path):
    if words[:2] == ['python', '-m']:
      module, arguments = words[2], words[3:]
      if module == 'unifusion_jax.main':
        parsed(arguments)
      elif module != 'pytest':
        file = ROOT / (module.replace('.', '/') + '.py')
        for argument in arguments:
          name = argument.lstrip('-').partition('=')[0].partition('.')[0]
          there = re.search(rf"""['"](--)?{name}['"]""", file.read_text())
          assert there or name == 'config' and 'command_line.define()' in file.read_text(), (
              f'{names(path)}: {module} has no --{name}')
    elif words[0] == 'bash':
      assert (ROOT / words[1]).exists(), words


def test_the_commands_are_found():
  """The test above looks at something: the commands that a reader meets first are among them."""
  found = [' '.join(words) for words in fenced(ROOT / 'README.md')]
  assert found[:2] == ['bash launch/local.sh', 'bash launch/test.sh']
  assert any('--mode=sample' in each and '--config.sample.references=my.png' in each for each in found)
  training = [words for words in fenced(ROOT / 'docs' / 'training.md') if words[2:3] == ['unifusion_jax.main']]
  assert len(training) >= 9 and all(words[0] == 'python' for words in training)
  assert sum(len(fenced(path)) for path in RECIPES) >= 15


@pytest.mark.parametrize('path', PAGES, ids=names)
def test_flags_in_tables_and_text_parse(path):
  """Code like `--config.sample.steps=24 --config.sample.eta=1`: without a recipe, for configs/edit.py or describe."""
  text = re.sub(r'```.*?```', '', path.read_text(), flags=re.DOTALL)
  for code in re.findall(r'`(--[^`]+)`', text):
    words = [word for word in shlex.split(code) if not re.fullmatch(r'--config\.[\w.]+', word)]
    if any(word.startswith('--config=') for word in words):
      parsed(['--mode=eval', *words])
    elif words and words[0].startswith('--config.'):
      try:
        parsed(['--config=configs/describe.py', *words])
      except command_line.UserError:
        parsed(['--config=configs/edit.py', *words])


def settings(config, prefix: str = '') -> set[str]:
  """The dotted names of all settings of a configuration."""
  here = {f'{prefix}{field.name}' for field in dataclasses.fields(config)}
  return here.union(*(settings(getattr(config, field.name), f'{prefix}{field.name}.')
                      for field in dataclasses.fields(config) if dataclasses.is_dataclass(getattr(config, field.name))))


@pytest.mark.parametrize('path', [path for path in PAGES if path.name != 'history.md'], ids=names)
def test_settings_exist(path):
  there = set().union(*(settings(parsed([f'--config=configs/{recipe.name}'])) for recipe in RECIPES))
  named = re.findall(rf'`((?:{"|".join(GROUPS)})\.[a-z_.]+)', path.read_text())
  assert set(named) <= there | {'config.json', 'eval.json', 'plan.json', 'train.lock'}, sorted(set(named) - there)


def test_new_names_of_settings_exist():
  """The right column of the table of what a setting was called before."""
  there = set().union(*(settings(parsed([f'--config=configs/{recipe.name}'])) for recipe in RECIPES))
  rows = re.findall(r'^\|([^|]*)\|([^|]*)\|$', (ROOT / 'docs' / 'history.md').read_text(), re.M)
  before, now = (set(re.findall(rf'`((?:{"|".join(GROUPS)})\.[a-z_]+)', ' '.join(column))) for column in zip(*rows))
  assert len(now) >= 12 and now <= there, now - there
  assert before & there <= {'data.tasks', 'eval.study'}  # of which only the values changed


def test_readmes_python_is_importable_python():
  (code,) = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
  compile(code, 'README.md', 'exec')
  modules = re.findall(r'^(?:from|import) ([\w.]+)', code, re.M)
  assert modules and all(importlib.util.find_spec(module) for module in modules)


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
  (pattern,) = settings['package-data']['unifusion_jax']
  assert {path for path in (ROOT / 'unifusion_jax' / 'assets').rglob('*') if path.is_file()} <= set(
      (ROOT / 'unifusion_jax').glob(pattern))
