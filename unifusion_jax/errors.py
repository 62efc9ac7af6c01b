"""Errors that a user can fix: a message says what was given, what is expected and how to fix it."""


class UserError(ValueError):
  """Bad settings, files or records. `main` exits with the message alone; every other error keeps its traceback."""


class BrokenRecord(UserError):
  """One record that cannot be used. The loader skips and counts it; any other error stops the run."""


def clipped(value, most: int = 300) -> str:
  """str(value) for a message: its beginning and its end where it is longer than `most`, and nothing unprintable."""
  text = str(value)
  if len(text) > most:
    text = f'{text[:most // 2]} ... {text[len(text) - most // 2:]}'
  return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)
