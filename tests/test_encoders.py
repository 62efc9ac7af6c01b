"""Encoders by name: each kind of checkpoint finds its model, and what is kept of one is that model."""

import codecs
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import weakref

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unifusion_jax import digests, sharding
from unifusion_jax.errors import UserError
from unifusion_jax.models import causal_lm, decoder, internvl, qwen3_vl, t5
from unifusion_jax.weights import encoders, quantize, safetensors_io

TEXT = decoder.DecoderConfig(vocab=64, width=16, depth=2, heads=2, kv_heads=2, head_dim=8, hidden=32, max_positions=64)
EYE = internvl.VisionConfig(width=16, depth=1, heads=2, hidden=32, tile=16, patch=4)
MADE = {
    'internvl': (internvl, internvl.InternVL, internvl.InternVLConfig(EYE, TEXT, image_token_id=5)),
    'qwen3_vl': (qwen3_vl, qwen3_vl.Qwen3VL, qwen3_vl.Qwen3VLConfig(
        qwen3_vl.VisionConfig(width=16, depth=2, heads=2, hidden=32, patch=8, side=4, deepstack=(0,)),
        dataclasses.replace(TEXT, model_type='qwen3'), 5, (2, 1, 1))),
    'llama': (causal_lm, causal_lm.TextModel, causal_lm.TextConfig(dataclasses.replace(
        TEXT, model_type='llama', llama3=(8.0, 1.0, 4.0, 32)))),
    'qwen2': (causal_lm, causal_lm.TextModel, causal_lm.TextConfig(dataclasses.replace(TEXT, tied=True))),
    'qwen3': (causal_lm, causal_lm.TextModel, causal_lm.TextConfig(dataclasses.replace(TEXT, model_type='qwen3'))),
    't5': (t5, t5.T5Encoder, t5.T5Config(64, 16, 2, 2, 8, 32)),
}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """{kind: a folder with a random model of it}."""
  made = {}
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tp=2))):
    for kind, (module, model, config) in MADE.items():
      made[kind] = tmp_path_factory.mktemp(kind)
      module.save(jax.jit(lambda: model(config, rngs=nnx.Rngs(0)))(), made[kind])
  return made


def assert_equal(ours, wanted):
  assert jax.tree.structure(ours) == jax.tree.structure(wanted)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted)):
    assert a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, a.ndim)
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def spec(leaf):
  return tuple(leaf.sharding.spec) + (None,) * (leaf.ndim - len(leaf.sharding.spec))


@pytest.mark.parametrize('kind', MADE)
def test_each_kind_finds_its_model(folders, kind):
  module, model, config = MADE[kind]
  loaded = encoders.load(folders[kind], jnp.float32)
  assert type(loaded) is model and loaded.config == config == encoders.config(folders[kind])
  assert_equal(loaded, module.load(folders[kind], jnp.float32))
  shapes = encoders.abstract(config, jnp.float32)
  assert jax.tree.structure(shapes) == jax.tree.structure(loaded)
  for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(loaded)):
    assert (a.shape, a.dtype, spec(a)) == (b.shape, b.dtype, spec(b))


ATTENTION, GATED, MLP = ('wq', 'wk', 'wv', 'wo'), ('gate', 'up', 'down'), ('w1', 'w2')
DECODER = {f'decoder/blocks/{name}' for name in (*ATTENTION, *(f'mlp/{name}' for name in GATED))}
VISION = {f'vision/blocks/{name}' for name in ATTENTION + MLP}
ROUNDED = {
    'internvl': DECODER | VISION | {'projector/w1', 'projector/w2', 'decoder/head'},
    'qwen3_vl': DECODER | VISION | {f'vision/{part}/{name}' for part in ('merger', 'deepstack') for name in MLP} | {
        'decoder/head'},
    'llama': DECODER | {'decoder/head'}, 'qwen2': DECODER, 'qwen3': DECODER | {'decoder/head'},
    't5': {f'blocks/{name}' for name in ATTENTION + GATED}}


def is_int8(leaf):
  return isinstance(leaf, quantize.Int8)


@pytest.mark.slow
@pytest.mark.parametrize('kind', MADE)
def test_every_matrix_of_every_kind_is_quantised(folders, kind):
  """And nothing else: tables (a tied head is one), norms, biases and the projection of pixels stay as they are."""
  small = encoders.load(folders[kind], quantized='int8')
  leaves = jax.tree_util.tree_leaves_with_path(small, is_leaf=is_int8)
  rounded = {jax.tree_util.keystr(path, simple=True, separator='/') for path, leaf in leaves if is_int8(leaf)}
  assert rounded == ROUNDED[kind]
  assert jax.tree.structure(small) == jax.tree.structure(encoders.abstract(small.config, quantized='int8'))


@pytest.mark.slow
@pytest.mark.parametrize('quantized', ['int8', 'w8a8'])
@pytest.mark.parametrize('kind', MADE)
def test_int8_never_holds_two_dense_matrices(folders, kind, quantized):
  """While a model is read, each layer of a matrix is gone before the next one is filled."""
  module, _, _ = MADE[kind]
  dense_matrices, paths = [], set()

  def read(on_leaf):
    def watched(param, path, layer):
      assert not any(earlier() is not None for earlier in dense_matrices)
      leaf = on_leaf(param, path, layer)
      if is_int8(leaf):
        dense_matrices.append(weakref.ref(jax.tree.leaves(param)[0]))
        paths.add(path)
      return leaf
    return module.load(folders[kind], on_leaf=watched)

  quantize.load(read, quantized)
  assert paths == ROUNDED[kind] and len(dense_matrices) > len(paths) > 5  # of stacked ones, a layer at a time
  small = encoders.load(folders[kind], quantized=quantized)
  assert_equal(small, quantize.quantize(module.load(folders[kind]), quantized == 'w8a8'))


def test_original_layout_is_found(tmp_path):
  from test_internvl import original_layout, torch_model
  original_layout(torch_model('qwen2', attention_bias=True), tmp_path)
  vlm = encoders.load(tmp_path, jnp.float32)
  assert type(vlm) is internvl.InternVL and vlm.config == encoders.config(tmp_path)


def test_public_names_need_no_weights():
  assert encoders.config('OpenGVLab/InternVL2_5-8B') is internvl.PRESETS['InternVL2_5-8B']
  assert encoders.config('Qwen/Qwen3-VL-4B-Instruct@main') is qwen3_vl.PRESETS['Qwen3-VL-4B-Instruct']
  assert encoders.config('OpenGVLab/InternVL3_5-8B-HF') is internvl.PRESETS['InternVL3_5-8B']
  for name in ('meta-llama/Llama-3.1-8B', 'meta-llama/Llama-3.1-8B-Instruct'):
    assert encoders.config(name) is causal_lm.PRESETS['Llama-3.1-8B']
  assert encoders.config('google/flan-t5-xxl') is t5.PRESETS['flan-t5-xxl']
  with pytest.raises(ValueError, match='owner/absent.*not in the cache'):
    encoders.config('owner/absent')


def test_others_are_refused(tmp_path):
  with pytest.raises(ValueError, match='has no config.json'):
    encoders.load(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps(dict(model_type='llava')))
  for call in (encoders.load, encoders.config):
    with pytest.raises(ValueError, match="type 'llava' is not supported; supported are internvl .*qwen3_vl.*t5"):
      call(tmp_path)
  with pytest.raises(ValueError, match="quantized='int4' must be one of '', 'int8', 'w8a8'"):
    encoders.load(tmp_path, quantized='int4')


@pytest.mark.parametrize('content,message', [
    (b'', 'is empty: download'), (b'{"model_type": "qwen2"', r'damaged or is no JSON \(.*line 1'),
    (b'[1]', 'holds a list'), (b'\xff\xfe', 'damaged or is no JSON'), (b'[' * 10 ** 5, 'damaged or is no JSON'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n', 'Git LFS pointer.*git lfs pull'),
    (b'{"model_type": "qwen2"}', "config.json does not give 'num_attention_heads'"),
    (b'{"model_type": "qwen2", "num_attention_heads": "a", "hidden_size": 4}', 'config.json has a value of the wrong'),
    (b'{"model_type": "internvl", "text_config": null, "vision_config": null}', 'config.json has a value of the wrong'),
    (b'{"model_type": "qwen2", "hidden_act": "relu", "num_attention_heads": 2}', "config.json: .*hidden_act='relu'")])
def test_a_wrong_config_is_named(tmp_path, content, message):
  (tmp_path / 'config.json').write_bytes(content)
  for call in (encoders.load, encoders.config):
    with pytest.raises(UserError, match=message) as error:
      call(tmp_path)
    assert str(tmp_path / 'config.json') in str(error.value) and len(str(error.value)) < 500


def test_a_byte_order_mark_is_passed_over(folders, tmp_path):
  shutil.copytree(folders['qwen2'], tmp_path / 'model')
  path = tmp_path / 'model' / 'config.json'
  path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
  assert encoders.config(tmp_path / 'model') == MADE['qwen2'][2]


@pytest.mark.parametrize('kind', ['internvl', 'qwen3_vl'])
def test_a_wrong_preprocessor_is_named(folders, tmp_path, kind):
  folder = tmp_path / 'model'
  shutil.copytree(folders[kind], folder)
  for content in (b'', b'{"image_mean": [0.5', b'version https://git-lfs.github.com/spec/v1\n',
                  b'{"image_mean": [0.5, 0.5, 0.5]}'):
    (folder / 'preprocessor_config.json').write_bytes(content)
    with pytest.raises(UserError, match='preprocessor_config.json'):
      encoders.config(folder)


@pytest.mark.slow
@pytest.mark.parametrize('kind', MADE)
def test_weights_that_are_no_numbers_are_refused(folders, tmp_path, kind):
  folder = tmp_path / 'model'
  shutil.copytree(folders[kind], folder)
  tensors = {name: np.array(tensor[...]) for name, tensor in safetensors_io.read(folder).items()}
  first, *_, last = sorted(tensors)
  tensors[first].flat[-1], tensors[last].flat[0] = np.nan, -np.inf
  safetensors_io.write(folder / 'model.safetensors', tensors)
  for settings in (dict(dtype=jnp.float32), dict(quantized='int8'), dict(cache=str(tmp_path / 'cache'))):
    with pytest.raises(UserError, match='model.safetensors: .* hold NaN, infinite numbers') as error:
      encoders.load(folder, **settings)
    assert f'{first}, {last} hold' in str(error.value)
  tensors[first].flat[-1], tensors[last].flat[0] = 0, 7e4
  safetensors_io.write(folder / 'model.safetensors', tensors)
  encoders.load(folder)
  with pytest.raises(UserError, match=f'{last} hold .*too large for float16'):
    encoders.load(folder, jnp.float16)


@pytest.mark.parametrize('kind,quantized', [('internvl', ''), ('qwen3_vl', 'int8'), ('qwen2', 'w8a8'), ('t5', '')])
def test_what_is_cached_is_the_model(folders, tmp_path, monkeypatch, kind, quantized):
  first = encoders.load(folders[kind], quantized=quantized, cache=str(tmp_path))
  monkeypatch.setattr(safetensors_io, 'read', None)  # the second load has no use for the checkpoint
  again = encoders.load(folders[kind], quantized=quantized, cache=str(tmp_path))
  assert_equal(again, first)
  assert again.config == first.config
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=8))):
    other = encoders.load(folders[kind], quantized=quantized, cache=str(tmp_path))
    shapes = encoders.abstract(first.config, quantized=quantized)
  for a, b, shape in zip(*map(jax.tree.leaves, (other, first, shapes))):
    assert a.sharding.spec == shape.sharding.spec and a.sharding.mesh.shape['fsdp'] == 8
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_every_form_of_every_version_is_cached_apart(folders, tmp_path, monkeypatch):
  folder = tmp_path / 'model'
  shutil.copytree(folders['qwen2'], folder)
  def count():
    return len(list((tmp_path / 'cache').iterdir()))
  cache = str(tmp_path / 'cache')
  encoders.load(folder, cache=cache)
  encoders.load(folder, cache=cache)  # the same weights
  assert count() == 1
  encoders.load(folder, jnp.float32, cache=cache)
  encoders.load(folder, quantized='int8', cache=cache)
  assert count() == 3
  tensors = {name: tensor[:] + 1 for name, tensor in safetensors_io.read(folder).items()}
  safetensors_io.write(folder / 'model.safetensors', tensors)
  os.utime(folder / 'model.safetensors', (1, 1))
  changed = encoders.load(folder, jnp.float32, cache=cache)
  assert count() == 4
  assert_equal(changed, causal_lm.load(folder, jnp.float32))
  monkeypatch.setattr(encoders, 'FORMAT', encoders.FORMAT + 1)
  assert_equal(encoders.load(folder, jnp.float32, cache=cache), changed)
  assert count() == 5


PROGRAM = '''
import sys
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 2)
jax.distributed.initialize(f'localhost:{sys.argv[1]}', 2, int(sys.argv[2]))
import jax.numpy as jnp
from unifusion_jax import sharding
from unifusion_jax.weights import encoders

with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(fsdp=4))) as _:
  first, again = (encoders.load(sys.argv[3], jnp.float32, cache=sys.argv[4]) for _ in range(2))
  equal = jax.jit(lambda a, b: jnp.all(jnp.stack(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.all(x == y), a, b)))))
  print('equal' if equal(first, again) else 'different')
'''


def test_two_processes_share_one_cache_entry(folders, tmp_path):
  """Each host's copy of a checkpoint has its own times, and all must read or write one folder."""
  for i in range(2):
    shutil.copytree(folders['qwen2'], tmp_path / str(i))
    for file in (tmp_path / str(i)).iterdir():
      os.utime(file, (i, i))
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  running = [subprocess.Popen(
      [sys.executable, '-c', PROGRAM, str(port), str(i), str(tmp_path / str(i)), str(tmp_path / 'cache')],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(2)]
  outputs = [process.communicate(timeout=240) for process in running]
  assert [out.splitlines()[-1:] for out, _ in outputs] == [['equal']] * 2, outputs
  assert len(list((tmp_path / 'cache').iterdir())) == 1


def largest_file(entry):
  return max((file for file in entry.rglob('*') if file.is_file()), key=lambda file: file.stat().st_size)


def flip(entry):
  file = largest_file(entry)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


def truncate(entry):
  os.truncate(largest_file(entry), 100)


def empty_digests(entry):
  (entry / digests.NAME).write_text('')


@pytest.mark.parametrize('damage', [flip, truncate, empty_digests, lambda entry: largest_file(entry).unlink(),
                                    lambda entry: (entry / digests.NAME).unlink()])
def test_a_damaged_cache_entry_is_made_again(folders, tmp_path, caplog, damage):
  def load():
    return encoders.load(folders['qwen2'], jnp.float32, cache=str(tmp_path))
  first = load()
  entry, = tmp_path.iterdir()
  damage(entry)
  assert_equal(load(), first)
  assert f'{entry} is damaged' in caplog.text
  caplog.clear()
  assert_equal(load(), first)
  assert not caplog.text and [*tmp_path.iterdir()] == [entry]
