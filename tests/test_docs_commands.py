"""What the documents tell a reader to type: every command is parsed or tried dry, every piece of Python is compiled.

A command of `unifusion_jax.main` builds its recipe with its settings and checks them; one of another module is parsed
by the flags that its file defines; scripts that rent machines run with --dry-run. So a flag, setting, recipe or file
that was renamed fails here. What runs for real is in EXECUTED, and what needs hardware says so in its block.
"""

import ast
import copy
import importlib
import pathlib
import re
import shlex
import textwrap
import tomllib

from absl import flags
import jax
import pytest
from test_launch import Stubs

from unifusion_jax import command_line, main, sharding
from unifusion_jax import config as configuration
from unifusion_jax.planning import chips

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [*(ROOT / folder / 'README.md' for folder in ('', 'benchmarks', 'launch')), ROOT / 'CONTRIBUTING.md',
         *sorted((ROOT / 'docs').glob('*.md'))]
RECIPES = sorted((ROOT / 'configs').glob('[a-z]*.py'))
# Commands that tests run, smaller: what a command has in it -> the test
EXECUTED = {
    '--config=configs/edit.py --mode=sample': 'test_main.py::test_from_training_to_images',
    '--config=configs/edit.py --config.data.path=my/edits.jsonl':
        'test_processes_modes.py::test_every_mode_on_two_processes_as_on_one',
    '--mode=rewrite': 'test_processes_modes.py::test_every_mode_on_two_processes_as_on_one',
    '--mode=plan': 'test_plan.py::test_every_program_has_its_numbers',
    '--config=configs/inspect.py --workdir=out': 'test_inspect.py::test_the_command',
    'unifusion_jax.data.convert': 'test_convert_data.py::test_the_command',
}
CLOUD = {'gcloud', 'docker', 'kubectl', 'gcluster', 'sbatch'}
# A comment in a block of commands that names what they need
HARDWARE = re.compile(r'(^|\s)# .*\b(GPU|TPU|v5e|v6e)\b')


def names(path: pathlib.Path) -> str:
  return str(path.relative_to(ROOT))


def commands(text: str) -> list[list[str]]:
  """The words of each simple command of a shell script, its variables put in place."""
  variables, found = {}, []
  for line in text.replace('\\\n', ' ').splitlines():
    for name, value in variables.items():
      line = line.replace(f'${name}', value)
    for part in shlex.split(line, comments=True) and line.split(' && '):
      words = shlex.split(part, comments=True)
      while words and '=' in words[0] and not words[0].startswith('-'):
        name, _, variables[name] = words.pop(0).partition('=')
      if words:
        found.append(words)
  return found


def blocks(path: pathlib.Path, language: str) -> list[str]:
  """The fenced blocks of a page in a language, or the commands in a recipe's head."""
  text = path.read_text()
  if path.suffix == '.py':
    head = text.split('"""')[1].replace('\\\n', ' ')
    return ['\n'.join(line for line in head.splitlines() if line.startswith('  python '))]
  found = re.findall(r'^ *```(\w*)\n(.*?)^ *```$', text, re.DOTALL | re.MULTILINE)
  return [textwrap.dedent(block) for kind, block in found if kind == language]


def parsed(arguments: list[str]):
  """The recipe under the overrides of one command; UserError where they cannot be parsed or cannot work together."""
  values, argv = flags.FlagValues(), ['main', *arguments]
  command_line.define(values)
  for flag in flags.FLAGS.get_flags_for_module(main.__name__):
    if flag.name not in values:
      flags.DEFINE_flag(copy.deepcopy(flag), values)
  command_line.parse(argv, values)
  if values.mode == 'info':
    return None
  default = 'sample' if values.mode == 'demo' else None
  config = command_line.read(values.config or default, values.setting)
  if isinstance(config, configuration.Config):
    devices = chips.topology(values.topology).devices if values.topology else config.devices or 1
    configuration.check(config, devices)
  return config


def flags_of(file: pathlib.Path) -> tuple[flags.FlagValues, bool]:
  """(the flags that a module defines, whether it takes a recipe), read from its source."""
  values, text = flags.FlagValues(), file.read_text()
  for node in ast.walk(ast.parse(text)):
    called = ast.unparse(node.func) if isinstance(node, ast.Call) else ''
    if not called.startswith('flags.DEFINE'):
      continue
    kind, name = called.removeprefix('flags.DEFINE_'), node.args[called == 'flags.DEFINE']
    if kind == 'enum' and isinstance(node.args[2], ast.Tuple | ast.List):
      flags.DEFINE_enum(name.value, None, ast.literal_eval(node.args[2]), '', values)
    elif isinstance(name, ast.Constant):
      kind = kind if kind in ('integer', 'float', 'bool') else 'string'
      getattr(flags, f'DEFINE_{kind}')(name.value, None, '', flag_values=values)
  return values, 'command_line.define()' in text


def check_python(module: str, arguments: list[str]) -> None:
  if module == 'unifusion_jax.main':
    parsed(arguments)
  elif module != 'pytest':
    values, takes_recipe = flags_of(ROOT / (module.replace('.', '/') + '.py'))
    settings = [each for each in arguments if takes_recipe and re.match('--config[.=]', each)]
    rest = values(['module', *(each for each in arguments if each not in settings)])
    assert len(rest) == 1, f'{rest[1]!r} is no flag'
    if settings:
      parsed(settings)


def check_script(words: list[str], stubs: Stubs) -> None:
  """A script of launch/ with its arguments."""
  script, arguments = words[0], words[1:]
  assert (ROOT / script).exists(), script
  settings = [each for each in arguments if re.match('--(config[.=]|mode=)', each)]
  if script == 'launch/tpu.sh':
    place = ('--topology=', '--zone=')
    if arguments[0] == 'create':
      stubs.slice = ['--project=p', *(each for each in arguments if each.startswith(place))]
    else:
      arguments = [*arguments, *stubs.slice]
  if settings:
    slices = [each for each in arguments if each.startswith('--topology=')]
    default = ['--config=configs/edit.py'] * (script == 'launch/local.sh')
    parsed([*default, *settings, *slices[-1:]])
  if script in ('launch/tpu.sh', 'launch/gke/submit.sh'):
    done = stubs.run(script.removeprefix('launch/'), *arguments, '--dry-run')
    assert done.returncode == 0, done.stderr
  else:
    for each in arguments:
      if each.startswith('-') and each not in settings and not each.startswith('--workdir='):
        assert each in (ROOT / script).read_text(), f'{script} knows no {each}'
      elif not each.startswith('-'):
        assert (ROOT / each).exists(), each


def dry(folder: pathlib.Path) -> Stubs:
  """A copy of the scripts of launch/; `slice`: of the last one that was created, by default one of some size."""
  stubs = Stubs(folder)
  stubs.slice = ['--project=p', '--topology=v6e:4x4', '--zone=us-east5-a']
  return stubs


def check(words: list[str], stubs: Stubs) -> None:
  """One command; an error where it is none that could run."""
  program, arguments = pathlib.Path(words[0]).name, words[1:]
  if program in ('for', 'done', 'do'):
    return
  if program == 'python':
    check_python(arguments[1], arguments[2:])
  elif program == 'unifusion':
    parsed(arguments)
  elif program == 'bash':
    check_script(arguments, stubs)
  elif program == 'sbatch':
    check_script([each for each in arguments if not each.startswith('--nodes')], stubs)
  elif program in CLOUD:
    for inner in (each for each in arguments if each.startswith('python -m ')):
      check(shlex.split(inner), stubs)
    assert all((ROOT / each).exists() for each in arguments if each.startswith('launch/'))
  else:
    assert program in ('pip', 'pre-commit', 'uv', 'pytest'), f'{program}: neither run nor tried dry'
    extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
    assert {extra for each in arguments for group in re.findall(r'^\.\[(.*)\]$', each)
            for extra in group.split(',')} <= extras.keys()
    assert all((ROOT / each).exists() for each in arguments if each.endswith('.txt'))


def needs_hardware(words: list[str]) -> bool:
  """Whether a command of `main` loads or trains a model of billions of parameters."""
  recipes = [each for each in words if re.match('--config=.*:(8b|krea2)', each)]
  return words[0] in ('python', 'unifusion') and bool(recipes) and '--mode=plan' not in words


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
  monkeypatch.chdir(ROOT)


@pytest.mark.parametrize('path', [*PAGES, *RECIPES], ids=names)
def test_commands_can_run(path, tmp_path):
  stubs = dry(tmp_path)
  found = [words for block in blocks(path, 'bash') for words in commands(block)]
  inline = [] if path.suffix == '.py' else re.findall(r'`((?:\w+=\S+ )?(?:python -m|bash launch/) ?[^`]*)`', re.sub(
      r'```.*?```', '', path.read_text(), flags=re.DOTALL))
  whole = (text for text in inline if not re.search(r'\.\.\.|tpu\.sh|\.main(?!.* --config=)', text))  # no fragments
  found += [words for text in whole for words in commands(text)]
  for words in found:
    try:
      check(words, stubs)
    except Exception as error:
      raise AssertionError(f'{names(path)}: {shlex.join(words)}: {error}') from error


@pytest.mark.parametrize('path', PAGES, ids=names)
def test_blocks_that_need_hardware_say_which(path):
  for block in blocks(path, 'bash'):
    if any(map(needs_hardware, commands(block))):
      assert HARDWARE.search(block), f'{names(path)}: a comment must say what this runs on:\n{block}'


@pytest.mark.parametrize('path', PAGES, ids=names)
def test_python_compiles_and_its_imports_are_there(path):
  for block in blocks(path, 'python'):
    if block.startswith('# unifusion_jax/'):  # lines of that file, which test_extending.py finds there
      continue
    for node in ast.walk(ast.parse(block, names(path))):
      if isinstance(node, ast.Import):
        for each in node.names:
          importlib.import_module(each.name)
      elif isinstance(node, ast.ImportFrom):
        module = importlib.import_module(node.module)
        for each in node.names:
          assert hasattr(module, each.name) or importlib.import_module(f'{node.module}.{each.name}')


@pytest.mark.parametrize('wrong', [
    'python -m unifusion_jax.main --config=configs/edit.py --config.sample.step=3',
    'python -m unifusion_jax.main --config=configs/edit.py --mod=sample',
    'python -m unifusion_jax.main --config=configs/edits.py',
    'python -m unifusion_jax.main --config=configs/edit.py:9b',
    'python -m unifusion_jax.main --config=configs/edit.py:8b --mode=plan --topology=v7e:8x8',
    'python -m unifusion_jax.data.convert --input=a --outputs=b', 'python -m benchmarks.vlm --dtype=float16',
    'python -m benchmarks.int9', 'python -m benchmarks.train_step --config=configs/t2i.py --config.data.batch=3',
    'bash launch/local.sh --config.train.minute=3', 'bash launch/locals.sh', 'bash launch/gpu.sh --again',
    'bash launch/tpu.sh create try --topology=v6e:2x4 --zone=z --spot', 'bash launch/tpu.sh begin try',
    'bash launch/gke/submit.sh edit --topology=v6e:4x4 --picture=x --workdir=gs://b/r --config=configs/edit.py',
    'pip install -e .[tests]', 'make test'])
def test_a_renamed_flag_setting_or_file_is_found(wrong, tmp_path):
  """The test above fails on each of these."""
  (words,) = commands(wrong)
  with pytest.raises(Exception):  # of any kind: assertions, sentences, errors of absl
    check(words, dry(tmp_path))


def test_the_commands_are_found():
  """The tests above look at something: the commands that a reader meets first are among them."""
  found = [' '.join(words) for block in blocks(ROOT / 'README.md', 'bash') for words in commands(block)]
  assert found[:2] == ['bash launch/local.sh', 'bash launch/test.sh']
  assert any('--mode=sample' in each and '--config.sample.references=my.png' in each for each in found)
  training = [words for block in blocks(ROOT / 'docs' / 'training.md', 'bash') for words in commands(block)]
  assert sum(words[:3] == ['python', '-m', 'unifusion_jax.main'] for words in training) >= 9
  assert sum(len(commands(block)) for path in RECIPES for block in blocks(path, 'bash')) >= 15


def test_what_runs_for_real():
  everything = [' '.join(words) for path in PAGES for block in blocks(path, 'bash') for words in commands(block)]
  for part, test in EXECUTED.items():
    file, _, name = test.partition('::')
    assert any(part in each for each in everything), f'{part}: no document has it'
    assert f'def {name}' in (ROOT / 'tests' / file).read_text(), test


def test_readmes_python_runs(tmp_path, monkeypatch):
  """In one sampling step without guidance, on one device."""
  monkeypatch.chdir(tmp_path)
  (code,) = blocks(ROOT / 'README.md', 'python')
  assert code.count('seed=0)') == 1
  (tmp_path / 'my.png').write_bytes((ROOT / 'docs' / 'embedded' / 'scene.png').read_bytes())
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])):
    exec(compile(code.replace('seed=0)', 'seed=0, steps=1, guidance=1.0)'), 'README.md', 'exec'), {})
  assert (tmp_path / 'out.png').exists()
