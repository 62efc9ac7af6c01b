"""The door of the page's server: what the page itself asks for, and nothing else of all that Gradio's server can do.

Gradio hands out what was uploaded to it and what it made, and checks that itself. It also fetches addresses that a
request names, keeps links to states and has pages of its own; none of that is reached through here. No page of ours
loads anything from elsewhere, and the header says so to the browser.
"""

import json

from starlette.responses import PlainTextResponse

MAX_BYTES = 1_000_000  # of a request but uploads, which Gradio counts itself
API = '/gradio_api/'
OPEN = ('/assets/', '/static/', '/svelte/', *(API + name for name in ('heartbeat/', 'upload', 'file=')))
EXACT = ('/', '/config', '/theme.css', '/favicon.ico', '/manifest.json', '/robots.txt', *(API + name for name in (
    'info', 'run/predict', 'queue/join', 'queue/data', 'cancel', 'reset', 'startup-events')))
HEADERS = {
    b'content-security-policy': b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
                                b"style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
                                b"connect-src 'self' data: blob:; media-src 'self' blob:; worker-src 'self' blob:",
    b'referrer-policy': b'no-referrer', b'x-content-type-options': b'nosniff'}


class Guard:
  """ASGI middleware before Gradio's app."""

  def __init__(self, app):
    self._app = app

  async def __call__(self, scope, receive, send):
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return

    async def send_with_headers(message):
      if message['type'] == 'http.response.start':
        kept = [(name, value) for name, value in message['headers'] if name.lower() not in HEADERS]
        message = message | dict(headers=[*kept, *HEADERS.items()])
      await send(message)

    path = scope['path'].rstrip('/') or '/'
    refused = None
    if not (path in EXACT or path.startswith(OPEN)) or ':/' in scope['path']:
      refused = PlainTextResponse('there is no such page here', 404)
    elif scope['method'] == 'POST' and not path.startswith(API + 'upload'):
      body = await _body(receive)
      if body is None:
        refused = PlainTextResponse(f'a request may have {MAX_BYTES} bytes', 413)
      elif _names_address(body):
        refused = PlainTextResponse('images are uploaded; none is fetched from an address', 400)
      else:
        receive = _again(body, receive)
    await (refused or self._app)(scope, receive, send_with_headers)


async def _body(receive) -> bytes | None:
  """The body of a request; None where it is too large or its client is gone."""
  body = b''
  while True:
    message = await receive()
    if message['type'] != 'http.request':
      return None
    body += message.get('body', b'')
    if len(body) > MAX_BYTES:
      return None
    if not message.get('more_body'):
      return body


def _again(body: bytes, receive):
  """`receive` for who reads the body after us."""
  first = [dict(type='http.request', body=body, more_body=False)]

  async def receive_again():
    return first.pop() if first else await receive()
  return receive_again


def _names_address(body: bytes) -> bool:
  """Whether a file in the JSON is at an address; what is no JSON is Gradio's to refuse."""
  try:
    values = [json.loads(body)]
  except (ValueError, RecursionError):
    return False
  while values:
    value = values.pop()
    if isinstance(value, dict):
      if '://' in str(value.get('path', '')):
        return True
      values += value.values()
    elif isinstance(value, list):
      values += value
  return False
