"""The errors that a user can mend: their messages say what came, what is wanted and how to get there."""


class UserError(ValueError):
  """Bad settings, files or records. `main` ends with its message alone; every other error keeps its traceback."""


class BrokenRecord(UserError):
  """One record that cannot be used. The loader passes over it and counts it; any other error stops the run."""
