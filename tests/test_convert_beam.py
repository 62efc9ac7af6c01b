"""Conversion on Apache Beam. It wants older libraries than this package's tests, hence an environment of its own:

  pip install apache-beam array_record msgpack fsspec numpy pillow pyarrow absl-py ml_collections tqdm pytest
  python -m pytest --noconftest tests/test_convert_beam.py
"""

import json

import numpy as np
import pytest

from unifusion_jax.data import convert, imaging


def test_the_same_shards(tmp_path):
  pytest.importorskip('apache_beam')
  for i in range(12):
    (tmp_path / f'{i}.png').write_bytes(imaging.png_bytes(np.full((8, 8, 3), (20 * i, 0, 0), np.uint8)))
  rows = (json.dumps(dict(image=f'{i}.png', text=f'red {i}')) for i in range(12))
  (tmp_path / 'list.jsonl').write_text('\n'.join(rows))
  inputs = [str(tmp_path / 'list.jsonl')]
  convert.convert(inputs, convert.Settings(str(tmp_path / 'one'), 3, convert.COLUMNS))
  convert.convert(inputs, convert.Settings(str(tmp_path / 'two'), 3, convert.COLUMNS), beam=['--runner=DirectRunner'])
  ours, theirs = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ('two', 'one'))
  assert len(ours) == 7 and ours == theirs
