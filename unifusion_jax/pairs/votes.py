"""Votes on pairs of images of the checkpoints a and b: the sides of each voter, and the files of votes.

A vote is a line of JSON in WORKDIR/votes/VOTER.jsonl: comparison, pair, voter, order, choice ('left', 'right', 'tie',
'bad') and time (UTC). The last one of a voter on a pair counts. Which of a and b was left follows from the seed, the
order (the voter, or the page that was saved as a file) and the pair, so that no file of votes tells it.
"""

import collections
import datetime
import hashlib
import json
import os
import pathlib
import re
import threading

from unifusion_jax.errors import UserError

CHOICES = ('left', 'right', 'tie', 'bad')  # bad: both are
PAGE = 'page.html'  # the order of the page that is a file
# Unicode letters, digits, spaces, dots, hyphens: also the name of a file. \w stands in classes alone, as page.py wants.
VOTER = re.compile(r'[\w][\w .-]{0,39}')
NAME_RULE = 'a name has 1 to 40 letters, digits, spaces, dots and hyphens, and begins with a letter or digit'
MOST_VOTERS = 100
MOST_PER_PAIR = 20  # votes of a voter on a pair, on average


def is_swapped(seed: int, order: str, pair: str) -> bool:
  """Whether b is on the left."""
  return bool(_digest(seed, order, pair)[0] & 1)


def shuffled(seed: int, order: str, pairs: list[str]) -> list[str]:
  """The order in which a voter sees the pairs."""
  return sorted(pairs, key=lambda pair: _digest(seed, order, pair)[1:])


def _digest(seed: int, order: str, pair: str) -> bytes:
  return hashlib.sha256(json.dumps([seed, order, pair]).encode()).digest()


class Votes:
  """The votes in a folder; thread-safe, and each is in its file before `cast` returns.

  pairs: the names of all pairs.
  comparison: digest of the comparison; a vote with another digest is refused.
  A file of another program, such as one that the page saved, is read as well.
  """

  def __init__(self, folder: pathlib.Path, pairs: list[str], seed: int, comparison: str):
    self._folder, self._pairs, self._seed, self.comparison = folder, pairs, seed, comparison
    self._lock = threading.Lock()

  def cast(self, voter: str, pair: str, choice: str) -> None:
    """Appends a vote. UserError for what is none, for a voter who has finished, and past the bounds."""
    with self._lock:
      self._check(voter)
      if pair not in self._pairs or choice not in CHOICES:
        raise UserError('a vote names one of the pairs, and left, right, tie or bad')
      lines = self._lines(voter)
      if any('finished' in line for line in lines):
        raise UserError(f'{voter} has finished and seen the names: vote under another name')
      if len(lines) >= MOST_PER_PAIR * len(self._pairs):
        raise UserError(f'{voter} has voted {len(lines)} times, and that is enough')
      self._append(voter, dict(pair=pair, voter=voter, order=voter, choice=choice))

  def finish(self, voter: str) -> list[str]:
    """Closes the votes of a voter, who has judged every pair and now sees the names: the winners, one a pair.

    UserError where some are left.
    """
    with self._lock:
      self._check(voter)
      lines = self._lines(voter)
      if missing := len(set(self._pairs) - {line.get('pair') for line in lines}):
        raise UserError(f'{missing} of {len(self._pairs)} pairs are still to be judged')
      if not any('finished' in line for line in lines):
        self._append(voter, dict(voter=voter, finished=True))
      return [winner for winner, _ in self._resolved(lines).values()]

  def choices(self, voter: str) -> dict[str, str]:
    """{pair: 'left', 'right', 'tie' or 'bad'} of a voter on the voting page."""
    with self._lock:
      self._check(voter)
      return {line['pair']: line['choice'] for line in self._lines(voter) if 'pair' in line}

  def resolved(self) -> dict[str, dict[str, tuple[str, str]]]:
    """{voter: {pair: (winner 'a', 'b', 'tie' or 'bad', choice)}} of all files; UserError names a line that is none."""
    with self._lock:
      lines = [line for path in sorted(self._folder.glob('*.jsonl')) for line in self._read(path) if 'pair' in line]
      by_voter = collections.defaultdict(list)
      for line in sorted(lines, key=lambda line: line.get('time', '')):  # one may vote on both pages
        by_voter[line['voter']].append(line)
      return {voter: self._resolved(each) for voter, each in sorted(by_voter.items())}

  def _resolved(self, lines: list[dict]) -> dict[str, tuple[str, str]]:
    """{pair: (winner, choice)} of the lines of one voter."""
    found = {}
    for line in lines:
      if 'pair' in line:
        left, right = 'ba' if is_swapped(self._seed, line['order'], line['pair']) else 'ab'
        found[line['pair']] = dict(left=left, right=right).get(line['choice'], line['choice']), line['choice']
    return found

  def _check(self, voter: str) -> None:
    if not VOTER.fullmatch(voter):
      raise UserError(NAME_RULE)
    if not self._path(voter).exists() and len(list(self._folder.glob('*.jsonl'))) >= MOST_VOTERS:
      raise UserError(f'{MOST_VOTERS} people have voted, and that is enough')

  def _path(self, voter: str) -> pathlib.Path:
    return self._folder / f'{voter}.jsonl'

  def _lines(self, voter: str) -> list[dict]:
    """What a voter did on the voting page."""
    path = self._path(voter)
    lines = self._read(path) if path.exists() else []
    return [line for line in lines if line.get('order') != PAGE and line.get('voter') == voter]

  def _read(self, path: pathlib.Path) -> list[dict]:
    lines = path.read_bytes().split(b'\n')
    found = []
    for number, raw in enumerate(lines, 1):
      try:
        line = json.loads(raw) if raw.strip() else {}
        if line and 'finished' not in line:
          self._check_line(line)
      except (ValueError, KeyError, TypeError) as error:
        if number == len(lines):  # without its end
          continue  # cut off as it was written, so the voter was never told that it is there
        raise UserError(f'{path}:{number} is no vote of this comparison ({error}): mend the line or take it '
                        'out') from error
      found += [line] * bool(line)
    return found

  def _check_line(self, line: dict) -> None:
    """ValueError, KeyError or TypeError for a line that is no vote of this comparison."""
    if line['comparison'] != self.comparison:
      raise ValueError('it is of another one, whose votes folder it belongs into')
    if line['pair'] not in self._pairs or line['choice'] not in CHOICES:
      raise ValueError('it names no pair of it, or no choice')
    if not VOTER.fullmatch(line['voter']) or line['order'] not in (line['voter'], PAGE):
      raise ValueError(f'voter={line["voter"]!r}: {NAME_RULE}')
    if not isinstance(line.get('time', ''), str):
      raise ValueError('its time is no text')

  def _append(self, voter: str, vote: dict) -> None:
    self._folder.mkdir(parents=True, exist_ok=True)
    path = self._path(voter)
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec='milliseconds')  # as the page that is a file has it
    line = json.dumps(dict(comparison=self.comparison) | vote | dict(time=time), ensure_ascii=False).encode() + b'\n'
    before = path.read_bytes() if path.exists() else b''
    with open(path, 'ab') as file:
      file.truncate(before.rfind(b'\n') + 1)  # without a line that was cut off
      file.write(line)
      file.flush()
      os.fsync(file.fileno())
