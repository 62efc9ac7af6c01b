"""The one error that a user can mend: its message says what came, what is wanted and how to get there."""


class UserError(ValueError):
  """Bad settings, files or records. `main` ends with its message alone; every other error keeps its traceback."""
