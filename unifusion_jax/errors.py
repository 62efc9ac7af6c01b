"""Errors that a user can fix: a message says what was given, what is expected and how to fix it."""


class UserError(ValueError):
  """Bad settings, files or records. `main` exits with the message alone; every other error keeps its traceback."""


class BrokenRecord(UserError):
  """One record that cannot be used. The loader skips and counts it; any other error stops the run."""
