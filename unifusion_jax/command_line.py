"""Command-line overrides `--config.a.b=value` of a recipe, and one-sentence errors for wrong ones."""

import dataclasses
import difflib
import pathlib
import pydoc
import re
import traceback
import typing

from absl import flags

from unifusion_jax.errors import UserError

_HINT = ('\nSettings are --config.a.b=value; configs/ and unifusion_jax/config.py list them, --helpfull the flags. '
         'UNIFUSION_TRACEBACK=1 shows where this was raised.')


def parse(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
  """Parses argv into flags; the flag `config` then holds the recipe with its overrides applied.

  Raises:
    UserError: for an unknown flag or setting and for a wrong value. Errors of a recipe's own code pass unchanged.
  """
  try:
    rest = values([_quoted(argument) for argument in argv])
    dataclasses.fields(values['config'].value)  # a recipe that could not be read raises at its first use
    _check_tuples(values)
    if len(rest) > 1:
      raise UserError(f'{rest[1]!r} is no flag: settings are given as --config.a.b=value')
    return rest
  except (flags.Error, KeyError, TypeError, AttributeError, ValueError, OSError) as error:
    chain = [error]
    while inner := chain[-1].__cause__ or chain[-1].__context__:
      chain.append(inner)
    for cause in chain[::-1]:  # absl and ml_collections wrap what a recipe raises in errors of the same type
      if isinstance(cause, UserError):
        raise cause from None
    if any(map(_raised_by_recipe, chain)):
      raise
    raise UserError(_sentence(error, chain[-1], values) + _HINT) from error


def _raised_by_recipe(error: BaseException) -> bool:
  """Whether the body of a recipe's file or its `get_config` was running."""
  return any(frame.f_code.co_name in ('get_config', '<module>') for frame, _ in traceback.walk_tb(error.__traceback__))


def _quoted(argument: str) -> str:
  """The argument, with the path of an existing reference quoted: a comma or a space would make it a list."""
  name, equals, value = argument.partition('=')
  if equals and name.lstrip('-') == 'config.sample.references' and pathlib.Path(value).is_file():
    return f'{name}={value!r}'
  return argument


def _check_tuples(values: flags.FlagValues) -> None:
  """Checks the items of overridden tuples by the field's annotation: ml_collections takes items of any type."""
  for path in values['config'].override_values:
    *groups, name = path.split('.')
    holder = values['config'].value
    for group in groups:
      holder = getattr(holder, group)
    annotation, value = typing.get_type_hints(type(holder))[name], getattr(holder, name)
    if typing.get_origin(annotation) is tuple:
      kind = typing.get_args(annotation)[0]
      wrong = [item for item in value if not isinstance(item, (int, float) if kind is float else kind)]
      if wrong:
        raise UserError(f'config.{path} holds {wrong[0]!r}: all its items must be of type {kind.__name__}{_HINT}')


def _sentence(error: Exception, cause: BaseException, values: flags.FlagValues) -> str:
  """Message for a command-line error: names the settings that exist, or the expected type."""
  text = str(cause.args[0] if isinstance(cause, KeyError) else cause)
  if match := (re.match(r"Field (?P<name>\w+) not found on dataclass <class '(?P<holder>[\w.]+)'>", text)
               or re.match(r"Attribute <class '(?P<holder>[\w.]+)'>\.(?P<name>\w+) does not exist", text)):
    return _no_such_setting(match['name'], pydoc.locate(match['holder']))
  if 'get_config() takes' in text:
    return 'this recipe has no scales: remove the colon and the text after it'
  if match := re.match(r'flag --(config\.[\w.]+)=(.*?): ', str(error), re.DOTALL):
    name, value = match.groups()
    flag = values[name]
    if dataclasses.is_dataclass(flag.default):
      first = dataclasses.fields(flag.default)[0].name
      return f'{name} is a group of settings: give --{name}.{first}=value, or another of them'
    if flag.parser.flag_type() == 'tuple':
      return f'{name}={value} must be a tuple: give the flag once for each item'
    return f'{name}={value!r} must be of type {flag.parser.flag_type()}, as {flag.default!r} is'
  if '--config=None' in str(error):
    return 'no recipe is named: give --config=configs/edit.py or another of configs/'
  return (str(error) if isinstance(error, flags.Error) else text.splitlines()[-1]).strip().removeprefix('flag ')


def _no_such_setting(name: str, holder: type) -> str:
  if not dataclasses.is_dataclass(holder):
    return f'there is no setting {name!r}: its parent is of type {holder.__name__} and not a group of settings'
  names = [field.name for field in dataclasses.fields(holder)]
  near = difflib.get_close_matches(name, names, 1)
  question = f'did you mean {near[0]!r}? ' if near else ''
  return f'there is no setting {name!r}; {question}There are: {", ".join(names)}'
