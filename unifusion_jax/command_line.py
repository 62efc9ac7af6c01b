"""Command lines: a recipe, its settings `--config.a.b=value`, and one-sentence errors for wrong ones.

`--config.a.b value` is the same, as are `--config.flag` and `--config.flag=true`. `None` unsets an optional setting, an
empty value an optional path. A tuple is given as `1,4,9`, as `(1, 4, 9)`, or item by item with the flag once for each.
"""

import ast
from collections.abc import Sequence
import dataclasses
import difflib
import inspect
import os
import pathlib
import re
import types
import typing

from absl import flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from unifusion_jax import fields
from unifusion_jax.errors import UserError

flags.disclaim_key_flags()  # they are the flags of the module that defines them

PACKAGED = pathlib.Path(__file__).parent.parent / 'configs'  # the recipes that come with the package
_HINT = ('\nSettings are --config.a.b=value; --help lists the flags, --config=RECIPE --help the settings of a recipe. '
         'UNIFUSION_TRACEBACK=1 shows where this was raised.')
_SETTING = re.compile(r'--?(no)?config\.([^=]*)(?:=(.*))?', re.DOTALL)
_NOUNS = {int: 'a whole number', float: 'a number', bool: 'true or false', str: 'a text'}
_PARSERS = {int: flags.IntegerParser(), float: flags.FloatParser(), bool: flags.BooleanParser()}


class PathParser(flags.ArgumentParser):
  """Of flags that name a file or folder: `~` is the home folder."""

  def parse(self, argument: str) -> str:
    return os.path.expanduser(argument)


def define(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags `config` and `setting`, which `read` takes."""
  flags.DEFINE(PathParser(), 'config', None, 'Recipe: a file, as configs/edit.py or configs/edit.py:8b, or edit, '
               'edit:8b for those of the package.', values)
  flags.DEFINE_multi_string('setting', [], '--setting=a.b=value is --config.a.b=value', values)


def parse(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
  """Parses argv into flags, with settings `--config.a.b=value` as --setting; returns argv without them.

  UserError for what is no flag, but for the checkpoint of --mode=info.
  """
  rest = parse_flags(_with_settings(argv), values, _HINT)
  if len(rest) > 1 and not ('mode' in values and values.mode == 'info'):
    raise UserError(f'{rest[1]!r} is no flag: settings are given as --config.a.b=value{_HINT}')
  return rest


def parse_flags(argv: list[str], values: flags.FlagValues = flags.FLAGS, hint: str = '\n--help lists the flags.'
                ) -> list[str]:
  """Parses argv into flags alone; returns it without them. UserError for what is no flag; --help ends with 0."""
  try:
    return values(argv)
  except flags.Error as error:
    raise UserError(str(error).strip().removeprefix('flag ') + hint) from error
  except SystemExit:  # absl ends with 1 after --help, too
    raise SystemExit(0) from None


def explained(head: str, listed: str, argv: list[str]) -> str:
  """Text of --help: the command, the recipes and the flags; with a recipe in argv that one and its settings.

  head: of the command; listed: its flags.
  """
  values = flags.FlagValues()
  define(values)
  try:
    values(_with_settings(argv), known_only=True)  # of --help and all other flags nothing is wanted here
  except flags.Error as error:
    raise UserError(str(error) + _HINT) from error
  if values.config:
    path, _ = locate(values.config)
    lines = [f'--config.{name}={value!r}{comment}' for name, value, comment in _values(
        read(values.config, values.setting))]
    return '\n'.join([ast.get_docstring(ast.parse(path.read_text())) or path.name, '', 'settings:', *lines])
  recipes = {path.stem: ast.get_docstring(ast.parse(path.read_text())) or ''
             for path in sorted(PACKAGED.glob('[a-z]*.py'))}
  lines = [f'  {name:9} {text.splitlines()[0]}' for name, text in recipes.items()]
  return '\n'.join([head.strip(), '', 'recipes (of one, --config=RECIPE --help tells more):', *lines, '', 'flags:',
                    listed])


def _values(config, prefix: str = ''):
  """(dotted name, value, the comment on its line of the source or '') of each setting."""
  source = ''.join(map(_source, type(config).__mro__))
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from _values(value, f'{prefix}{field.name}.')
    else:
      comment = re.search(rf'^  {field.name}: .*?  # (.*)$', source, re.MULTILINE)
      yield f'{prefix}{field.name}', value, f'  # {comment[1]}' if comment else ''


def _source(kind: type) -> str:
  """Source text of a class; '' of one that has none, as those of a recipe of one's own."""
  try:
    return inspect.getsource(kind)
  except (OSError, TypeError):
    return ''


def _with_settings(argv: list[str]) -> list[str]:
  """argv with each setting as one argument, --setting=a.b=value."""
  rest, arguments = argv[:1], iter(argv[1:])
  following = next(arguments, None)
  while (argument := following) is not None:
    following = next(arguments, None)
    if match := _SETTING.fullmatch(argument):
      negated, name, value = match.groups()
      if value is None and following is not None and not re.match('--?[a-zA-Z]', following) and not negated:
        value, following = following, next(arguments, None)
      value = 'false' if negated else value
      argument = f'--setting={name}' + ('' if value is None else f'={value}')
    rest.append(argument)
  return rest


def read(recipe: str | None, settings: Sequence[str] = ()):
  """The configuration of a recipe under settings 'a.b=value', with its paths and seeds completed.

  Raises:
    UserError: for a recipe that is not there, an unknown setting and a wrong value. Errors of a recipe's own code pass
      unchanged.
  """
  config, given = load(recipe), {}
  for setting in settings:
    name, equals, value = setting.partition('=')
    given.setdefault(name, []).append(value if equals else None)
  for name, values in given.items():
    config = _changed(config, name, values)
  return fields.completed(config)


def locate(recipe: str | None) -> tuple[pathlib.Path, str]:
  """(file, scale) of a recipe: a path, or the name of one of the package; with ':' and its scale, or without."""
  if not recipe:
    raise UserError('no recipe is named: give --config=configs/edit.py or another of configs/' + _HINT)
  name, _, scale = recipe.partition(':')
  for path in (pathlib.Path(name), PACKAGED.parent / name, PACKAGED / f'{name}.py'):
    if path.is_file():
      return path, scale
  there = ', '.join(sorted(path.stem for path in PACKAGED.glob('[a-z]*.py')))
  raise UserError(f'--config={recipe}: there is no recipe {name}: give the path of a file, or one of {there}{_HINT}')


def load(recipe: str | None):
  """What a recipe's `get_config` returns; UserError for a file that is no recipe."""
  path, scale = locate(recipe)
  if path.suffix != '.py':
    raise UserError(f'{path} is no recipe: it must be a Python file (.py) with a function get_config(){_HINT}')
  module = re.sub(r'\W', '_', str(path.absolute()))  # of its own: one name would be one module
  try:
    config = ConfigFileFlagParser(module).parse(f'{path}:{scale}' if scale else str(path))
    getattr(config, '', None)  # ml_collections raises an OSError of the recipe at the first use
  except (TypeError, ValueError, AttributeError, OSError) as error:
    # ml_collections puts the traceback of a recipe's error into the text of another one
    cause = error.__cause__ or error.__context__ or error
    if "no attribute 'get_config'" in str(cause):
      raise UserError(f'{path} is no recipe: it has no function get_config(){_HINT}') from cause
    if 'get_config() takes 0 positional' in str(cause):
      raise UserError(f'{path}: this recipe has no scales: remove the colon and the text after it{_HINT}') from cause
    if 'get_config() missing 1 required' in str(cause):
      raise UserError(f'{path}: this recipe wants a scale, after a colon: --config={path}:SCALE{_HINT}') from cause
    raise cause
  if not dataclasses.is_dataclass(config):
    raise UserError(f'{path}: get_config() returned a {type(config).__name__}, and must return a config.Config{_HINT}')
  return config


def _changed(holder, name: str, values: list[str | None], prefix: str = 'config'):
  """`holder` with the setting `name` ('a.b') set to the texts of one or more flags."""
  first, _, rest = name.partition('.')
  if not dataclasses.is_dataclass(holder):
    raise UserError(f'there is no setting {f"{prefix}.{name}"!r}: {prefix} is of type {type(holder).__name__} and '
                    f'no group of settings{_HINT}')
  hints = fields.hints(type(holder))
  if first not in hints:
    near = difflib.get_close_matches(first, hints, 1)
    question = f'did you mean {f"{prefix}.{near[0]}"!r}? ' if near else ''
    raise UserError(f'there is no setting {f"{prefix}.{first}"!r}; {question}There are: {", ".join(hints)}{_HINT}')
  value, prefix = getattr(holder, first), f'{prefix}.{first}'
  if rest:
    value = _changed(value, rest, values, prefix)
  elif dataclasses.is_dataclass(value):
    raise UserError(f'{prefix} is a group of settings: give --{prefix}.{dataclasses.fields(value)[0].name}=value, or '
                    f'another of them{_HINT}')
  else:
    try:
      value = _value(hints[first], values)
    except ValueError as error:
      shown = ','.join('' if text is None else text for text in values)
      raise UserError(f'--{prefix}={shown}: {error}; here it is {value!r}{_HINT}') from error
  return dataclasses.replace(holder, **{first: value})


def _value(hint, texts: list[str | None]):
  """The value of type `hint` of the texts of a flag, None for one without a value; ValueError for another type."""
  if hasattr(hint, '__metadata__'):
    return _value(typing.get_args(hint)[0], texts)
  kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
  if kind in (typing.Union, types.UnionType):
    (inner,) = (argument for argument in arguments if argument is not type(None))
    unset = ('None',) if inner is str else ('None', '')  # the empty text is a text
    return None if texts[-1] in unset else _value(inner, texts)
  if kind is tuple:
    return _items(arguments, texts)
  if kind not in _NOUNS:
    raise ValueError('this setting is a part of the recipe, which the command line cannot change')
  if texts[-1] is None:
    if kind is bool:
      return True
    raise ValueError('it wants a value, after = or a space')
  try:
    return _PARSERS[kind].parse(texts[-1]) if kind in _PARSERS else texts[-1]
  except (ValueError, TypeError):
    raise ValueError(f'it must be {_NOUNS[kind]}') from None


def _items(arguments: tuple, texts: list[str | None]) -> tuple:
  """The items of a tuple[...] from the texts of all its flags."""
  kind = arguments[0] if arguments else str
  pieces = [piece for text in texts for piece in _pieces(text, kind == fields.Path)]
  if len(arguments) > 1 and arguments[1] is not Ellipsis and len(pieces) != len(arguments):
    raise ValueError(f'it must be {len(arguments)} items with commas between')
  values = []
  for piece in pieces:
    try:
      values.append(_value(kind, [piece]))
    except ValueError as error:
      raise ValueError(f'item {piece!r}: {error}') from None
  return tuple(values)


def _pieces(text: str | None, paths: bool) -> list[str]:
  """The texts of the items in the text of one flag. A path may itself hold commas, so one that exists is one item."""
  if text is None:
    raise ValueError('it wants a value, after = or a space')
  if text in ('', 'None', '()', '[]'):
    return []
  if text[0] + text[-1] in ('()', '[]'):
    try:
      return [str(item) for item in ast.literal_eval(f'[{text[1:-1]}]')]
    except (ValueError, SyntaxError):
      text = text if paths else text[1:-1]
  pieces = [piece.strip() for piece in text.rstrip(',').split(',')]
  whole, *each = (os.path.exists(os.path.expanduser(path)) for path in (text, *pieces))
  return [text] if paths and (whole or not all(each)) else pieces
