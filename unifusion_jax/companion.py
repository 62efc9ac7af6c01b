"""The companion of a process of several (processes.py), run as a program: companion.py PIPE SECONDS HOST.

It reads the pipe of the process that started it: r when its start is over, d when it ends by itself, and the end of the
pipe when it is gone. Imports as little as it can.
"""

import os
import select
import signal
import sys


def main(pipe: int, seconds: int, host: str) -> None:
  parent = os.getppid()
  for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(signum, signal.SIG_IGN)
  if not select.select([pipe], [], [], seconds)[0]:
    say(f'the start on {host} took more than {seconds} s and is ended: the devices of a host are missing, or still in '
        'use by an earlier run. Look at the other hosts, then start all processes anew; --start_timeout=SECONDS waits '
        'longer')
    os.kill(parent, signal.SIGKILL)
    return
  words = b''
  while word := os.read(pipe, 1):
    words += word
  if not words:
    say(f'the process on {host} was ended in its start: not all processes came in time (--start_timeout), or one of '
        'them was lost; lines above name it. Start the same command on all hosts at about the same time, with the '
        'ports between them open')
  elif not words.endswith(b'd'):
    say(f'the process on {host} was ended from outside, as all are when one of them is lost (killed, out of memory, '
        'its host gone); lines above name it. Start the same command again on all hosts: training goes on from its '
        'last checkpoint')


def say(sentence: str) -> None:
  print(f'error: {sentence}', file=sys.stderr, flush=True)


if __name__ == '__main__':
  main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
