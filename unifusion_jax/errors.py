"""The errors that a user can mend: their messages say what came, what is wanted and how to get there."""


class UserError(ValueError):
  """Bad settings, files or records. `main` ends with its message alone; every other error keeps its traceback."""


class BrokenRecord(UserError):
  """One record that cannot be used. The loader passes over it and counts it; any other error stops the run."""


def differences(there: dict, now: dict, matters=lambda name: True) -> list[str]:
  """A line for each setting that differs and matters, by its dotted name: 'optim.clip: 0.5 there, 1.0 now'."""
  return [f'{name}: {old!r} there, {new!r} now' for name, old, new in _different(there, now) if matters(name)]


def _different(there: dict, now: dict, prefix: str = ''):
  for name in sorted(there.keys() | now.keys()):
    old, new = there.get(name), now.get(name)
    if isinstance(old, dict) and isinstance(new, dict):
      yield from _different(old, new, f'{prefix}{name}.')
    elif old != new:
      yield prefix + name, old, new
