"""A page in the browser: a pipeline, its requests in a queue (demo/service.py), served by Gradio (demo/page.py)."""

import contextlib
import os
import pathlib
import signal
import socket
import sys
import tempfile
import threading

import jax

from unifusion_jax.commands import sample
from unifusion_jax.demo.settings import DemoConfig
from unifusion_jax.errors import UserError


def run(config, workdir: pathlib.Path) -> None:
  """Serves the pipeline that --mode=sample would load, until it is interrupted."""
  if jax.process_count() > 1:
    raise UserError('--mode=demo runs in one process: start it alone, without --distributed')
  _check_installed()
  free_port(config.demo)  # before anything slow is loaded
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and the folder goes, too
  with served(sample.load(config, workdir), config.demo) as address:
    print(f'{address} (Ctrl-C ends it)', flush=True)
    threading.Event().wait()


@contextlib.contextmanager
def served(pipe, config: DemoConfig):
  """The address of a pipeline's page, which is there as long as the context."""
  _check_installed()
  with tempfile.TemporaryDirectory(prefix='unifusion-demo-') as folder, _environment(folder):
    from starlette.middleware import Middleware

    from unifusion_jax.demo import guard, page
    from unifusion_jax.demo.service import Service
    service = Service(pipe, config)
    blocks = page.build(service)
    blocks.queue(default_concurrency_limit=None, max_size=None)
    try:
      _, local, public = blocks.launch(
          server_name=config.host, server_port=free_port(config), share=config.share, theme=page.THEME,
          css=page.css(service), max_file_size=config.max_upload_megabytes * 2 ** 20,
          max_threads=config.max_queue + 24, app_kwargs=dict(middleware=[Middleware(guard.Guard)]),
          prevent_thread_lock=True, quiet=True, inbrowser=False, footer_links=[], run_history=False, ssr_mode=False,
          mcp_server=False, enable_monitoring=False, pwa=False, num_workers=0)
      yield public or local
    finally:
      blocks.close(verbose=False)
      service.close()


def _check_installed() -> None:
  with _environment(''):
    try:
      import gradio  # noqa: F401
    except ModuleNotFoundError as error:
      raise UserError(f'--mode=demo needs {error.name}, which is not installed: pip install "unifusion_jax[demo]"'
                      ) from error


@contextlib.contextmanager
def _environment(folder: str):
  """Gradio's settings that are read from the environment: no calls home, uploads and images in a folder."""
  values = dict(GRADIO_ANALYTICS_ENABLED='False', HF_HUB_DISABLE_TELEMETRY='1', GRADIO_TEMP_DIR=folder)
  before = {name: os.environ.get(name) for name in values}
  os.environ |= values
  try:
    yield
  finally:
    for name, value in before.items():
      os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def free_port(config: DemoConfig) -> int:
  """The port to serve at; UserError where another program has it."""
  with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind((config.host, config.port))
    except OSError as error:
      raise UserError(f'demo.host={config.host} and demo.port={config.port} cannot be served at: {error.strerror}; '
                      'give another port, or 0 for any that is free') from error
    return probe.getsockname()[1]
