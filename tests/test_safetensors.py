"""safetensors files and folders of them: what is read, and what is refused by name."""

import json
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_convert import save_shards, torch_tensors

from unifusion_jax.weights import convert, safetensors_io


def test_refused_files(tmp_path):
  with pytest.raises(ValueError, match='download the checkpoint first'):
    safetensors_io.read(tmp_path / 'nothing')
  with pytest.raises(ValueError, match='found no .safetensors file'):
    safetensors_io.read(tmp_path)
  (tmp_path / 'pytorch_model.bin').write_bytes(pickle.dumps({}))
  for path in (tmp_path, tmp_path / 'pytorch_model.bin'):
    with pytest.raises(ValueError, match='pytorch_model.bin is a pickle, and reading a pickle runs any code'):
      safetensors_io.read(path)
  safetensors_io.write(tmp_path / 'model.safetensors', {'w': np.ones(64, np.float32)})
  assert safetensors_io.read(tmp_path).keys() == {'w'}
  whole = (tmp_path / 'model.safetensors').read_bytes()
  for size in (3, 40, len(whole) - 1):
    (tmp_path / 'model.safetensors').write_bytes(whole[:size])
    with pytest.raises(ValueError, match=rf'model.safetensors \({size} bytes\) is truncated'):
      safetensors_io.read(tmp_path)
  (tmp_path / 'model.safetensors').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n')
  with pytest.raises(ValueError, match='model.safetensors is a Git LFS pointer.*git lfs pull'):
    safetensors_io.read(tmp_path)


@pytest.mark.parametrize('stem', safetensors_io.STEMS)
def test_of_several_precisions_the_plain_one_is_read(tmp_path, stem):
  plain = {'w': np.ones(64, np.float32)}
  others = {'w': np.zeros(64, np.float16)}
  for name in (f'{stem}.fp16', 'consolidated', f'{stem}.bf16-00001-of-00001', f'{stem}-00001-of-00001.fp16'):
    safetensors_io.write(tmp_path / f'{name}.safetensors', others)
  for name in (f'{stem}.safetensors.index.fp16', f'{stem}.fp16.safetensors.index'):
    (tmp_path / f'{name}.json').write_text(json.dumps({'weight_map': {'w': f'{stem}-00001-of-00001.fp16.safetensors'}}))
  safetensors_io.write(tmp_path / f'{stem}.safetensors', plain)
  np.testing.assert_array_equal(safetensors_io.read(tmp_path)['w'][:], plain['w'])
  (tmp_path / f'{stem}.safetensors').rename(tmp_path / f'{stem}-00001-of-00001.safetensors')
  index = tmp_path / f'{stem}.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': {'w': f'{stem}-00001-of-00001.safetensors'}}))
  for path in (tmp_path, index):
    np.testing.assert_array_equal(safetensors_io.read(path)['w'][:], plain['w'])
  for path in tmp_path.glob('*.json'):
    path.unlink()
  with pytest.raises(ValueError, match='several checkpoints in one folder .consolidated.safetensors, .*rename the one'):
    safetensors_io.read(tmp_path)


def raw_file(path, tensors: dict[str, tuple[str, tuple, bytes]]) -> None:
  """A .safetensors file of {name: (type, shape, content)}, which numpy has no types for."""
  header, content = {}, b''
  for name, (kind, shape, data) in tensors.items():
    header[name] = dict(dtype=kind, shape=shape, data_offsets=[len(content), len(content) + len(data)])
    content += data
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, 'little') + text + content)


@pytest.mark.parametrize('kind', safetensors_io.FP8)
def test_fp8_is_read(tmp_path, kind):
  x = np.random.default_rng(0).standard_normal((6, 4)).astype(safetensors_io.FP8[kind])
  wide = np.arange(3, dtype=np.float32)
  raw_file(tmp_path / 'model.safetensors', {
      'b': ('F32', (3,), wide.tobytes()), 'w': (kind, x.shape, x.tobytes()), 'none': (kind, (0,), b'')})
  tensors = safetensors_io.read(tmp_path)
  np.testing.assert_array_equal(tensors['w'][2:4, 1:], x[2:4, 1:])
  np.testing.assert_array_equal(tensors['b'][:], wide)
  loaded = convert.load(lambda: {'w': jnp.zeros((4, 6)), 'b': jnp.zeros(3)}, tensors,
                        (('w', 'w', 'o i -> i o'), ('b', 'b', 'd -> d')), {}, ignore=('none',))
  np.testing.assert_array_equal(loaded['w'], x.astype(np.float32).T)


@pytest.mark.parametrize('name,shape,factors', [
    ('weight_scale', (), (260, 136)), ('scale_weight', (1,), (260, 136)), ('weight_scale', (260, 1), (1, 136)),
    ('weight_scale', (260,), (1, 136)), ('weight_scale_inv', (3, 2), (128, 128))])
def test_scaled_fp8_is_read_times_its_scale(tmp_path, name, shape, factors):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((260, 136)).astype(ml_dtypes.float8_e4m3fn)
  scale = rng.uniform(0.1, 2, shape).astype(np.float32)
  raw_file(tmp_path / 'model.safetensors', {
      'up.weight': ('F8_E4M3', x.shape, x.tobytes()), f'up.{name}': ('F32', shape, scale.tobytes()),
      'up.input_scale': ('F32', (), np.float32(3).tobytes()), 'scaled_fp8': ('F8_E4M3', (2,), b'\0\0')})
  tensors = safetensors_io.read(tmp_path)
  square = scale.reshape(shape if len(shape) == 2 else (-1, 1))
  wanted = np.array([[square[i // factors[0], j // factors[1]] for j in range(136)] for i in range(260)])
  wanted *= x.astype(np.float32)
  loaded = convert.load(lambda: {'up': jnp.zeros((136, 260), out_sharding=jax.P('fsdp', 'tp'))}, tensors,
                        ((r'up\.weight', 'up', 'o i -> i o'),), {})
  np.testing.assert_array_equal(loaded['up'], wanted.T)


def test_what_cannot_be_read_is_named(tmp_path):
  """Types that hold a part of a number, and scales of no known form."""
  path = tmp_path / 'model.safetensors'
  for kind, count in (('F4', 8), ('F6_E2M3', 12), ('F8_E8M0', 16), ('C64', 128)):
    raw_file(path, {'b': ('F32', (1,), bytes(4)), 'w': (kind, (4, 4), bytes(count))})
    with pytest.raises(ValueError, match=rf'model.safetensors: w \({kind}\) cannot be read'):
      safetensors_io.read(tmp_path)
  w = 'F8_E4M3', (64, 64), bytes(64 * 64)
  raw_file(path, {'w.weight': w, 'w.weight_scale': ('F32', (2, 2), bytes(16))})
  with pytest.raises(ValueError, match=r'model.safetensors: w.weight_scale \(2, 2\) is no scale of w.weight'):
    safetensors_io.read(tmp_path)
  raw_file(path, {'w.weight': w, 'w.other_scale': ('F32', (), bytes(4))})
  with pytest.raises(ValueError, match=r'unused: w.other_scale'):
    convert.load(lambda: {'w': jnp.zeros((64, 64))}, safetensors_io.read(tmp_path),
                 ((r'w\.weight', 'w', 'o i -> i o'),), {})


def test_an_index_that_lies(tmp_path):
  save_shards(tmp_path, torch_tensors())
  file = tmp_path / 'model.safetensors.index.json'
  index = json.loads(file.read_text())['weight_map']
  del index['scale']
  index['lost'] = 'model-00004-of-00004.safetensors'
  file.write_text(json.dumps({'weight_map': index}))
  with pytest.raises(ValueError) as error:
    safetensors_io.read(tmp_path)
  for line in ('scale in model', 'model-00004-of-00004.safetensors is not in the folder'):
    assert line in str(error.value)


def test_an_index_that_is_none(tmp_path):
  save_shards(tmp_path, torch_tensors())
  file = tmp_path / 'model.safetensors.index.json'
  for content in (file.read_text()[:100], '', '{}', '{"weight_map": {"w": 1}}', '[]'):
    file.write_text(content)
    with pytest.raises(ValueError, match=r'model.safetensors.index.json .*again|must be an object'):
      safetensors_io.read(tmp_path)


def test_an_index_may_promise_more_than_there_is(tmp_path):
  """As that of flan-t5-xxl, which lists a shared table under all of its names; `load` knows what is needed."""
  tensors = torch_tensors()
  save_shards(tmp_path, tensors)
  file = tmp_path / 'model.safetensors.index.json'
  index = json.loads(file.read_text())['weight_map']
  file.write_text(json.dumps({'weight_map': index | {'alias': 'model-00001-of-00003.safetensors'}}))
  assert safetensors_io.read(tmp_path).keys() == tensors.keys()


def test_write_keeps_transposed_views_and_leaves_no_half_file(tmp_path):
  x = np.arange(6, dtype=np.float32).reshape(2, 3)
  safetensors_io.write(tmp_path / 'a.safetensors', {'t': x.T, 's': np.float32(2).reshape(())})
  tensors = safetensors_io.read(tmp_path / 'a.safetensors')
  np.testing.assert_array_equal(tensors['t'][...], x.T)
  assert tensors['s'][()] == 2 and tensors['s'].shape == ()
  assert [f.name for f in tmp_path.iterdir()] == ['a.safetensors']
