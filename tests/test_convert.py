"""Checkpoints in and out: exact, strict, lazy."""

import json
import pickle
import tracemalloc

from flax import nnx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from unifusion_jax import sharding
from unifusion_jax.models import layers
from unifusion_jax.weights import convert

WIDTH, HEADS, GROUPS, DIM, DEPTH = 16, 8, 2, 4, 3
DIMS = {'r': HEADS // GROUPS + 2, 'n': 3}
RULES = (
  (r'embed\.weight', 'embed', 'v d -> v d'),
  (r'scale', 'scale', '->'),
  (r'stages\.(\d+)\.conv(\d+)\.weight', r'stages/\1/\2', 'o i y x -> y x i o'),
  (r'layers\.(\d+)\.norm\.weight', 'blocks/norm', 'd -> d'),
  (r'layers\.(\d+)\.up\.weight', 'blocks/up', 'f d -> d f'),
  (r'layers\.(\d+)\.wqkv\.weight', 'blocks/q', '(g r k) d -> d (g r) k', {'r': slice(0, -2)}),
  (r'layers\.(\d+)\.wqkv\.weight', 'blocks/key', '(g r k) d -> d g k', {'r': -2}),
  (r'layers\.(\d+)\.wqkv\.weight', 'blocks/value', '(g r k) d -> d g k', {'r': -1}),
  (r'layers\.(\d+)\.qkv\.weight', 'blocks/fused', '(n h k) d -> d n h k'),
  (r'layers\.(\d+)\.proj\.weight', 'blocks/proj_q', '(n h k) d -> h k d', {'n': 0}),
  (r'layers\.(\d+)\.proj\.weight', 'blocks/proj_k', '(n h k) d -> h k d', {'n': 1}),
  (r'layers\.(\d+)\.proj\.weight', 'blocks/proj_v', '(n h k) d -> h k d', {'n': 2}),
)


class Block(nnx.Module):

  def __init__(self, dtype, *, rngs):
    self.norm = layers.constant(1., (WIDTH,), dtype=dtype)
    self.up = layers.weight(rngs, (WIDTH, 24), ('fsdp', 'tp'), WIDTH, dtype)
    self.q = layers.weight(rngs, (WIDTH, HEADS, DIM), ('fsdp', 'tp', None), WIDTH, dtype)
    self.key = layers.weight(rngs, (WIDTH, GROUPS, DIM), ('fsdp', 'tp', None), WIDTH, dtype)
    self.value = layers.weight(rngs, (WIDTH, GROUPS, DIM), ('fsdp', 'tp', None), WIDTH, dtype)
    self.fused = layers.weight(rngs, (WIDTH, 3, HEADS, DIM), ('fsdp', None, 'tp', None), WIDTH, dtype)
    for name in ('proj_q', 'proj_k', 'proj_v'):
      setattr(self, name, layers.weight(rngs, (HEADS, DIM, WIDTH), ('tp', None, 'fsdp'), WIDTH, dtype))


class Model(nnx.Module):

  def __init__(self, dtype, *, rngs):
    self.embed = layers.weight(rngs, (32, WIDTH), ('tp', 'fsdp'), WIDTH, dtype)
    self.scale = layers.constant(1., (), dtype=dtype)
    self.blocks = layers.stack(Block, DEPTH, dtype, rngs=rngs)
    self.stages = nnx.List([nnx.List([layers.weight(rngs, (3, 3, 4, 2 * (i + 1)), (), 4, dtype) for _ in range(2)])
                            for i in range(2)])


def make(dtype=jnp.float32):
  return lambda: Model(dtype, rngs=nnx.Rngs(0))


def torch_tensors(dtype=np.float32, seed=0) -> dict[str, np.ndarray]:
  """Torch's side, written out by hand so that it does not depend on what is tested."""
  rng = np.random.default_rng(seed)
  shapes = {'embed.weight': (32, WIDTH), 'scale': ()}
  for i in range(DEPTH):
    shapes |= {f'layers.{i}.norm.weight': (WIDTH,), f'layers.{i}.up.weight': (24, WIDTH),
               f'layers.{i}.wqkv.weight': ((HEADS + 2 * GROUPS) * DIM, WIDTH),
               f'layers.{i}.qkv.weight': (3 * HEADS * DIM, WIDTH), f'layers.{i}.proj.weight': (3 * HEADS * DIM, WIDTH)}
  for i in range(2):
    shapes |= {f'stages.{i}.conv{j}.weight': (2 * (i + 1), 4, 3, 3) for j in range(2)}
  return {name: np.asarray(rng.standard_normal(shape), np.float32).astype(dtype) for name, shape in shapes.items()}


def save_shards(folder, tensors, count=3):
  names = sorted(tensors)
  index = {}
  for i in range(count):
    file = f'model-{i + 1:05d}-of-{count:05d}.safetensors'
    convert.write(folder / file, {name: tensors[name] for name in names[i::count]})
    index |= {name: file for name in names[i::count]}
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': index}))
  return folder


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_round_trip_is_exact(tmp_path, dtype):
  tensors = torch_tensors(dtype)
  folder = save_shards(tmp_path, tensors)
  model = convert.load(make(dtype), convert.read(folder), RULES, DIMS)
  convert.write(tmp_path / 'out' / 'model.safetensors', convert.export(model, RULES, DIMS))
  back = convert.read(tmp_path / 'out')
  assert back.keys() == tensors.keys()
  for name, x in tensors.items():
    assert back[name].dtype == x.dtype and back[name].shape == x.shape, name
    assert back[name][...].tobytes() == x.tobytes(), name


def test_values_and_shardings():
  tensors = torch_tensors()
  model = convert.load(make(), tensors, RULES, DIMS)
  ours = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
  wqkv = tensors['layers.1.wqkv.weight'].reshape(GROUPS, HEADS // GROUPS + 2, DIM, WIDTH)
  np.testing.assert_array_equal(ours['blocks']['q'][1, :, 5], wqkv[1, 1].T)
  np.testing.assert_array_equal(ours['blocks']['key'][1, :, 1], wqkv[1, -2].T)
  np.testing.assert_array_equal(ours['blocks']['value'][1, :, 0], wqkv[0, -1].T)
  qkv = tensors['layers.2.qkv.weight'].reshape(3, HEADS, DIM, WIDTH)
  np.testing.assert_array_equal(ours['blocks']['fused'][2, :, 1, 3], qkv[1, 3].T)
  proj = tensors['layers.0.proj.weight'].reshape(3, HEADS, DIM, WIDTH)
  np.testing.assert_array_equal(ours['blocks']['proj_v'][0, 3], proj[2, 3])
  np.testing.assert_array_equal(ours['stages'][1][0][2, 1, 3, 0], tensors['stages.1.conv0.weight'][0, 3, 2, 1])
  same = jax.tree.map(lambda a, b: a.sharding.spec == b.sharding.spec and a.dtype == b.dtype,
                      jax.eval_shape(make()), model)
  assert all(jax.tree.leaves(same))


def test_dtype_is_cast_and_integers_are_not():
  rules = (('w', 'w', 'd -> d'), ('steps', 'steps', '->'))
  tensors = {'w': np.linspace(0, 1, 7, dtype=np.float32), 'steps': np.asarray(3, np.int32)}

  def both():
    return {'w': jnp.zeros(7), 'steps': jnp.zeros((), jnp.int32)}

  loaded = convert.load(both, tensors, rules, {}, jnp.bfloat16)
  assert loaded['w'].dtype == jnp.bfloat16 and loaded['steps'].dtype == jnp.int32 and loaded['steps'] == 3
  np.testing.assert_array_equal(loaded['w'], tensors['w'].astype(ml_dtypes.bfloat16))
  for kind in (ml_dtypes.bfloat16, np.float16):  # widened on the device, layer by layer, whatever each is stored in
    mixed = {'w.0': tensors['w'].astype(kind), 'w.1': tensors['w']}
    loaded = convert.load(lambda: {'w': jnp.zeros((2, 7))}, mixed, ((r'w\.(\d+)', 'w', 'd -> d'),), {})
    assert loaded['w'].dtype == jnp.float32
    np.testing.assert_array_equal(loaded['w'], [mixed['w.0'].astype(np.float32), tensors['w']])
    alone = convert.load(lambda: {'w': jnp.zeros(7)}, {'w': mixed['w.0']}, (('w', 'w', 'd -> d'),), {})
    assert alone['w'].dtype == jnp.float32
    np.testing.assert_array_equal(alone['w'], loaded['w'][0])
  with pytest.raises(ValueError, match='steps is int32 in torch and float32 in our w'):
    convert.load(lambda: {'w': jnp.zeros(())}, {'steps': tensors['steps']}, (('steps', 'w', '->'),), {})


class Watched:
  """A tensor that counts the numbers read from it."""

  def __init__(self, x):
    self.x, self.shape, self.dtype, self.count = x, x.shape, x.dtype, 0

  def __getitem__(self, index):
    self.count += self.x[index].size
    return self.x[index]


def test_reads_only_the_slices_needed():
  """Each number once, although every slice lives on several devices; from a fused tensor, the box around ours."""
  watched = {name: Watched(x) for name, x in torch_tensors().items()}
  convert.load(make(), watched, RULES, DIMS)
  assert all(watched[f'layers.{i}.up.weight'].count == 24 * WIDTH for i in range(DEPTH))
  assert watched['embed.weight'].count == 32 * WIDTH
  layout = convert.Layout.of('(g r k) d -> d (g r) k', {'r': slice(0, -2)}, (WIDTH, HEADS, DIM), DIMS)
  wqkv = watched['layers.0.wqkv.weight']
  whole = wqkv.x.reshape(GROUPS, -1, DIM, WIDTH)[:, :-2].reshape(HEADS, DIM, WIDTH).transpose(2, 0, 1)
  for heads, count in ((slice(4, 8), 4 * 4 * DIM), (slice(2, 6), 4 * 12 * DIM)):
    wqkv.count = 0
    index = (slice(4, 8), heads, slice(0, DIM))
    np.testing.assert_array_equal(convert.Source('wqkv', None, layout).read(wqkv, index), whole[index])
    assert wqkv.count == count


@pytest.mark.parametrize('mesh', [None])  # in place of the fixture
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])  # of the file; the model's is f32
@pytest.mark.parametrize('shape', [(2, 2, 2), (1, 1, 1)])
def test_host_memory_stays_below_two_layers(shape, dtype, mesh, tmp_path, monkeypatch):
  depth, width = 12, 768
  monkeypatch.setattr(convert, 'BLOCK', 2 ** 18)

  class Stack(nnx.Module):

    def __init__(self, *, rngs):
      self.up = layers.weight(rngs, (width, 2 * width), ('fsdp', 'tp'), width)

  class Deep(nnx.Module):

    def __init__(self, *, rngs):
      self.blocks = layers.stack(Stack, depth, rngs=rngs)

  rng = np.random.default_rng(0)
  tensors = {f'layers.{i}.up.weight': rng.standard_normal((2 * width, width), np.float32).astype(dtype)
             for i in range(depth)}
  largest = tensors['layers.0.up.weight'].nbytes
  save_shards(tmp_path, tensors)
  rules = ((r'layers\.(\d+)\.up\.weight', 'blocks/up', 'f d -> d f'),)

  def run():
    mesh = jax.make_mesh(shape, sharding.AXES, devices=jax.devices()[:int(np.prod(shape))])
    with jax.set_mesh(mesh):
      return jax.block_until_ready(
          convert.load(lambda: Deep(rngs=nnx.Rngs(0)), convert.read(tmp_path), rules, {}))

  run()  # compiles, so that only the loading is measured
  tracemalloc.start()
  model = run()
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert model.blocks.up.dtype == jnp.float32
  np.testing.assert_array_equal(np.asarray(model.blocks.up[...])[7], tensors['layers.7.up.weight'].T)
  assert 0.9 * largest < peak < 2 * largest  # of 12


def test_one_error_lists_everything():
  tensors = torch_tensors()
  del tensors['layers.1.norm.weight'], tensors['stages.0.conv1.weight']
  tensors['layers.3.norm.weight'] = np.ones(WIDTH, np.float32)
  tensors['lm_head.weight'] = np.ones((2, 2), np.float32)
  tensors['rotary.inv_freq'] = np.ones(2, np.float32)
  tensors['layers.2.wqkv.weight'] = np.ones((40, WIDTH), np.float32)
  with pytest.raises(ValueError) as error:
    convert.load(make(), tensors, RULES, DIMS, ignore=(r'.*\.inv_freq',))
  text = str(error.value)
  for line in ('missing: layers.1.norm.weight, for our blocks/norm',
               'missing: stages.0.conv1.weight, for our stages/0/1',
               'unused: layers.3.norm.weight (16,)', 'unused: lm_head.weight (2, 2)',
               'misshapen: layers.2.wqkv.weight is (40, 16) in torch and must be (48, 16) '
               'for our blocks/q (3, 16, 8, 4)'):
    assert line in text
  assert 'inv_freq' not in text


@pytest.mark.parametrize('change, message', [
  (lambda rules: rules[1:], r'no rule: embed \(32, 16\)'),
  (lambda rules: rules + ((r'other', 'embed', 'v d -> v d'),),
   r'duplicate: embed is filled by several rules: embed\\.weight and other'),
  (lambda rules: rules[:-1], r'no rule: blocks/proj_v'),
  (lambda rules: rules[:-1] + (rules[-1][:3] + ({'n': 1},),),
   r'layers.0.proj.weight must be used once and whole, .* parts \[0, 1, 1\] of 3 .*blocks/proj_q, blocks/proj_v'),
  (lambda rules: ((r'embed\.weight', 'embed', 'v d -> d'),) + rules[1:], 'do not have the same letters'),
  (lambda rules: ((r'embed\.(weight|w)', 'embed', 'v d -> v d'),) + rules[1:], 'a torch name is plain text'),
])
def test_rules_that_do_not_fit(change, message):
  with pytest.raises(ValueError, match=message):
    convert.load(make(), torch_tensors(), change(RULES), DIMS)


def test_a_size_that_no_shape_tells():
  with pytest.raises(ValueError, match='needs the size of r in dims'):
    convert.load(make(), torch_tensors(), RULES, {'n': 3})


def test_no_mesh():
  with jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ())):
    with pytest.raises(ValueError, match='jax.set_mesh'):
      convert.load(lambda: {'w': jnp.zeros(2)}, {'w': np.zeros(2, np.float32)}, (('w', 'w', 'd -> d'),), {})


def test_refused_files(tmp_path):
  with pytest.raises(ValueError, match='download the checkpoint first'):
    convert.read(tmp_path / 'nothing')
  with pytest.raises(ValueError, match='found no .safetensors file'):
    convert.read(tmp_path)
  (tmp_path / 'pytorch_model.bin').write_bytes(pickle.dumps({}))
  for path in (tmp_path, tmp_path / 'pytorch_model.bin'):
    with pytest.raises(ValueError, match='pytorch_model.bin is a pickle, and reading a pickle runs any code'):
      convert.read(path)
  convert.write(tmp_path / 'model.safetensors', {'w': np.ones(64, np.float32)})
  assert convert.read(tmp_path).keys() == {'w'}
  whole = (tmp_path / 'model.safetensors').read_bytes()
  for size in (3, 40, len(whole) - 1):
    (tmp_path / 'model.safetensors').write_bytes(whole[:size])
    with pytest.raises(ValueError, match=rf'model.safetensors \({size} bytes\) is truncated'):
      convert.read(tmp_path)
  (tmp_path / 'model.fp16.safetensors').write_bytes(whole)
  with pytest.raises(ValueError, match='several checkpoints in one folder .model.fp16.safetensors, model.safetensors'):
    convert.read(tmp_path)


def test_an_index_that_lies(tmp_path):
  save_shards(tmp_path, torch_tensors())
  file = tmp_path / 'model.safetensors.index.json'
  index = json.loads(file.read_text())['weight_map']
  del index['scale']
  index['lost'] = 'model-00004-of-00004.safetensors'
  file.write_text(json.dumps({'weight_map': index}))
  with pytest.raises(ValueError) as error:
    convert.read(tmp_path)
  for line in ('scale in model', 'model-00004-of-00004.safetensors is not in the folder'):
    assert line in str(error.value)


def test_an_index_may_promise_more_than_there_is(tmp_path):
  """As that of flan-t5-xxl, which lists a shared table under all of its names; `load` knows what is needed."""
  tensors = torch_tensors()
  save_shards(tmp_path, tensors)
  file = tmp_path / 'model.safetensors.index.json'
  index = json.loads(file.read_text())['weight_map']
  file.write_text(json.dumps({'weight_map': index | {'alias': 'model-00001-of-00003.safetensors'}}))
  assert convert.read(tmp_path).keys() == tensors.keys()


def test_write_keeps_transposed_views_and_leaves_no_half_file(tmp_path):
  x = np.arange(6, dtype=np.float32).reshape(2, 3)
  convert.write(tmp_path / 'a.safetensors', {'t': x.T, 's': np.float32(2).reshape(())}, {'note': 'here'})
  tensors = convert.read(tmp_path / 'a.safetensors')
  np.testing.assert_array_equal(tensors['t'][...], x.T)
  assert tensors['s'][()] == 2 and tensors['s'].shape == ()
  assert [f.name for f in tmp_path.iterdir()] == ['a.safetensors']
