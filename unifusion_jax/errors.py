"""Errors that a user can fix: a message says what was given, what is expected and how to fix it."""

import contextlib
import errno
import io
import os
import re
import select
import sys

LONGEST = 2000  # characters of a message on the terminal
RED, YELLOW = 31, 33
# Errors of files and disks that are no fault of the program, and those of them that may come without a file's name.
_ANYWHERE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE}
_OF_FILES = _ANYWHERE | {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


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


def sentence(error: BaseException) -> str | None:
  """The message for an error that a user can mend: a UserError, or one of files and disks. None for every other."""
  if isinstance(error, UserError):
    return shown(str(error))
  number, names = None, []
  if isinstance(error, OSError):
    number, names = error.errno, [name for name in (error.filename, error.filename2) if name is not None]
  if number in (_OF_FILES if names else _ANYWHERE):
    return shown(' -> '.join(map(str, names)) + ': ' * bool(names) + os.strerror(number))
  return None


def shown(text: str) -> str:
  """A message without control characters, cut to a length that can be read."""
  text = re.sub(r'[^\n\t\x20-\x7e\xa0-\U0010ffff]', '\N{REPLACEMENT CHARACTER}', text)
  return text if len(text) <= LONGEST else f'{text[:LONGEST]}... ({len(text) - LONGEST:,} more characters)'


@contextlib.contextmanager
def at_the_terminal():
  """Ends the process in one sentence for an error that a user can mend, and with its traceback for every other.

  UNIFUSION_TRACEBACK=1 keeps all tracebacks. Output goes to a terminal of any encoding, and line by line into a pipe; a
  pipe that nobody reads any more, as one to `head`, ends the process with 141.
  """
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):  # a notebook has others
      stream.reconfigure(errors='backslashreplace', line_buffering=True)
  try:
    yield
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    sys.exit(130)
  except Exception as error:
    if isinstance(error, BrokenPipeError) and _is_closed(sys.stdout):
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be written at the end
      sys.exit(141)
    message = sentence(error)
    if message is None or os.environ.get('UNIFUSION_TRACEBACK'):
      raise
    sys.exit(f'{coloured("error:", RED, sys.stderr)} {message}')


def _is_closed(stream) -> bool:
  """Whether nobody reads a pipe any more."""
  poll = select.poll()
  poll.register(stream, 0)  # for errors alone
  return any(events & select.POLLERR for _, events in poll.poll(0))


def coloured(text: str, colour: int, stream) -> str:
  """The text in a colour, if the stream is a terminal: NO_COLOR is for none, FORCE_COLOR for colours everywhere."""
  if os.environ.get('NO_COLOR') or not (os.environ.get('FORCE_COLOR') or
                                        stream.isatty() and os.environ.get('TERM') != 'dumb'):
    return text
  return f'\x1b[{colour}m{text}\x1b[0m'
