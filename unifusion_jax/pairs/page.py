"""The page of pairs: as one file to look at, and served on this machine to vote (assets/compare.html is its text).

Neither gives the browser a checkpoint's name, or a word of which image is whose: files are reached by names that are
drawn at the start, and images go out without their metadata.
"""

import base64
import contextlib
import dataclasses
import functools
import hashlib
import http.server
import json
import pathlib
import secrets
import sys
import threading
import urllib.parse

from unifusion_jax.data import imaging
from unifusion_jax.description import ASSETS
from unifusion_jax.errors import UserError
from unifusion_jax.pairs import votes as ballots
from unifusion_jax.pairs.votes import Votes

TEMPLATE = ASSETS.parent / 'compare.html'
SLOT = '<script type="application/json" id="data">null</script>'
MAX_BYTES = 4096  # of a request's body
MAX_THREADS = 32  # requests at a time
SECONDS = 30  # that a client may take over its request
LARGE = 512  # pixels of a side above which the page that is a file holds an image as WebP of quality 90
HEADERS = {
    'Content-Security-Policy': "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; script-src "
                               "'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'; form-action 'none'",
    'Referrer-Policy': 'no-referrer', 'X-Content-Type-Options': 'nosniff', 'Cache-Control': 'no-store'}


@dataclasses.dataclass(frozen=True)
class Shown:
  """A pair as a voter may see it: its name, the request, and the files of its images."""
  pair: str
  prompt: str
  references: tuple[pathlib.Path, ...]
  a: pathlib.Path
  b: pathlib.Path


def for_browser(pairs: list[Shown], seed: int, order: str, url) -> list[dict]:
  """The pairs in an order and on its sides, with `url(file)` of each image."""
  by_name = {pair.pair: pair for pair in pairs}
  rows = []
  for name in ballots.shuffled(seed, order, list(by_name)):
    pair = by_name[name]
    left, right = (pair.b, pair.a) if ballots.is_swapped(seed, order, name) else (pair.a, pair.b)
    rows.append(dict(pair=name, prompt=pair.prompt, references=[url(path) for path in pair.references],
                     left=url(left), right=url(right)))
  return rows


def write(path: pathlib.Path, pairs: list[Shown], seed: int, question: str, comparison: str) -> None:
  """Writes the page as one file, images within. comparison: as of `Votes`."""
  rows = for_browser(pairs, seed, ballots.PAGE, functools.cache(_inlined))
  names = dict(pattern=ballots.VOTER.pattern.replace(r'\w', r'\p{L}\p{N}_'), rule=ballots.NAME_RULE)  # of JavaScript
  data = json.dumps(dict(comparison=comparison, question=question, names=names, pairs=rows)).replace('<', '\\u003c')
  before, _, after = TEMPLATE.read_text().partition(SLOT)
  path.write_text(before + SLOT.replace('null', data) + after)


def _inlined(path: pathlib.Path) -> str:
  image = imaging.read(path)
  kind = 'webp' if max(image.shape) > LARGE else 'png'
  return f'data:image/{kind};base64,{base64.b64encode(imaging.encoded(image, kind, 90)).decode()}'


class Server(http.server.ThreadingHTTPServer):
  """The voting page at a port of this machine alone.

  pairs: as they are shown. names: of a and b, which a voter gets who has finished.
  """
  daemon_threads = True

  def __init__(self, port: int, pairs: list[Shown], votes: Votes, seed: int, question: str, names: dict[str, str]):
    self.pairs, self.votes, self.seed, self.question, self.names = pairs, votes, seed, question, names
    secret = secrets.token_bytes(16)
    token = lambda path: hashlib.sha256(secret + str(path).encode()).hexdigest()[:32]
    files = [path for pair in pairs for path in (pair.a, pair.b, *pair.references)]
    self.tokens = {path: token(path) for path in files}
    self.files = {token: path for path, token in self.tokens.items()}
    self._places = threading.BoundedSemaphore(MAX_THREADS)
    try:
      super().__init__(('127.0.0.1', port), _Handler)
    except OSError as error:
      raise UserError(f'port={port} cannot be served at: {error.strerror}; give another, or 0 for any that is free'
                      ) from error

  @property
  def address(self) -> str:
    return f'http://127.0.0.1:{self.server_port}'

  def process_request(self, request, client_address):
    self._places.acquire()
    super().process_request(request, client_address)

  def process_request_thread(self, request, client_address):
    try:
      super().process_request_thread(request, client_address)
    finally:
      self._places.release()

  def handle_error(self, request, client_address):
    if not isinstance(sys.exception(), ConnectionError):  # a browser that went on before its image had come
      super().handle_error(request, client_address)


@contextlib.contextmanager
def serving(server: Server):
  """The server's address, answering as long as the context."""
  thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.1), daemon=True)
  thread.start()
  try:
    yield server.address
  finally:
    server.shutdown()
    thread.join()
    server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
  server: Server  # pyrefly: ignore[bad-override-mutable-attribute]
  timeout = SECONDS
  server_version, sys_version = 'unifusion', ''

  def log_message(self, format, *args):
    del format, args

  def do_GET(self):
    self._answer(self._get)

  def do_POST(self):
    self._answer(self._post)

  def _answer(self, method) -> None:
    """Sends what `method` returns, or in a sentence why not."""
    host, _, _ = self.headers.get('Host', '').partition(':')
    if host not in ('127.0.0.1', 'localhost'):  # a page elsewhere whose name was made to lead here
      self._send(403, 'text/plain', b'ask for 127.0.0.1')
      return
    try:
      kind, body = method(urllib.parse.urlsplit(self.path))
      self._send(200, kind, body)
    except UserError as error:
      self._send(400, 'text/plain', str(error).encode())
    except LookupError:
      self._send(404, 'text/plain', b'there is no such page here')

  def _get(self, url) -> tuple[str, bytes]:
    server = self.server
    if url.path == '/':
      return 'text/html', TEMPLATE.read_bytes()
    if url.path == '/question':
      return _json(server.question)
    if url.path == '/pairs':
      voter = urllib.parse.parse_qs(url.query).get('voter', [''])[0]
      chosen = server.votes.choices(voter)
      rows = for_browser(server.pairs, server.seed, voter, lambda path: f'image/{server.tokens[path]}')
      return _json(dict(comparison=server.votes.comparison,
                        pairs=[dict(row, choice=chosen.get(row['pair'])) for row in rows]))
    _, _, token = url.path.partition('/image/')
    return 'image/png', imaging.png_bytes(imaging.read(server.files[token]))  # without the metadata, which has names

  def _post(self, url) -> tuple[str, bytes]:
    votes, asked = self.server.votes, self._body()
    voter = asked.get('voter', '')
    if url.path in ('/vote', '/finish') and asked.get('comparison', '') != votes.comparison:
      raise UserError('Another comparison is served here now: load the page again.')
    if url.path == '/vote':
      votes.cast(voter, asked.get('pair', ''), asked.get('choice', ''))
      return _json({})
    if url.path == '/finish':
      winners = votes.finish(voter)
      labels = self.server.names | dict(tie='tie', bad='both bad')
      return _json({label: winners.count(winner) for winner, label in labels.items()})
    raise LookupError

  def _body(self) -> dict[str, str]:
    """The texts of a JSON object. A page elsewhere cannot send one unasked, for its content type needs leave."""
    length = self.headers.get('Content-Length', '')
    if self.headers.get_content_type() != 'application/json' or not length.isdecimal() or int(length) > MAX_BYTES:
      raise UserError(f'a vote is JSON of at most {MAX_BYTES} bytes')
    try:
      asked = json.loads(self.rfile.read(int(length)))
    except (ValueError, RecursionError):
      asked = None
    if not isinstance(asked, dict) or not all(isinstance(value, str) for value in asked.values()):
      raise UserError('a vote is a JSON object of texts')
    return asked

  def _send(self, status: int, kind: str, body: bytes) -> None:
    self.send_response(status)
    for name, value in {'Content-Type': f'{kind}; charset=utf-8' if kind != 'image/png' else kind,
                        'Content-Length': str(len(body)), **HEADERS}.items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(body)


def _json(value) -> tuple[str, bytes]:
  return 'application/json', json.dumps(value).encode()
