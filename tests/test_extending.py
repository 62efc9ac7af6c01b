"""The code of docs/extending.md: it runs from top to bottom, and what it says is a file's is that file's."""

import pathlib
import re

import jax

from unifusion_jax import sharding

ROOT = pathlib.Path(__file__).parent.parent
BLOCKS = re.findall(r'^```python\n(.*?)^```', (ROOT / 'docs' / 'extending.md').read_text(), re.DOTALL | re.MULTILINE)


def file_of(block: str) -> str | None:
  """The file that a block is a part of, by the comment in its first line."""
  head = re.match(r'# (unifusion_jax/\S+\.py)\n', block)
  return head and head[1]


def test_code_runs(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  page = '\n'.join(block for block in BLOCKS if not file_of(block))
  assert page.count('assert ') >= 6
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])):  # one device compiles fastest
    exec(compile(page, 'docs/extending.md', 'exec'), {})
  assert (tmp_path / 'edits.jsonl').read_text().startswith('{"references": ["before.png"]')


def test_parts_of_files_are_there():
  parts = [block for block in BLOCKS if file_of(block)]
  assert len(parts) == 2
  for block in parts:
    name, lines = file_of(block), block.partition('\n')[2]
    assert lines in (ROOT / name).read_text(), f'docs/extending.md shows what {name} does not have'
