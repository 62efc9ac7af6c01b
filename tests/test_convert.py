"""Checkpoints in and out: exact, strict, lazy."""

import json
import socket
import subprocess
import sys
import tracemalloc

from flax import nnx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from unifusion_jax import sharding
from unifusion_jax.models import layers
from unifusion_jax.weights import convert, safetensors_io
from unifusion_jax.weights import rules as engine

WIDTH, HEADS, GROUPS, DIM, DEPTH = 16, 8, 2, 4, 3
AXIS_SIZES = {'r': HEADS // GROUPS + 2, 'n': 3}
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
    self.up = layers.weight(rngs, (WIDTH, 24), ('fsdp', 'tp'), contract=1, dtype=dtype)
    self.q = layers.weight(rngs, (WIDTH, HEADS, DIM), ('fsdp', 'tp', None), contract=1, dtype=dtype)
    self.key = layers.weight(rngs, (WIDTH, GROUPS, DIM), ('fsdp', 'tp', None), contract=1, dtype=dtype)
    self.value = layers.weight(rngs, (WIDTH, GROUPS, DIM), ('fsdp', 'tp', None), contract=1, dtype=dtype)
    self.fused = layers.weight(rngs, (WIDTH, 3, HEADS, DIM), ('fsdp', None, 'tp', None), contract=1, dtype=dtype)
    for name in ('proj_q', 'proj_k', 'proj_v'):
      setattr(self, name, layers.weight(rngs, (HEADS, DIM, WIDTH), ('tp', None, 'fsdp'), contract=2, dtype=dtype))


class Model(nnx.Module):

  def __init__(self, dtype, *, rngs):
    self.embed = layers.weight(rngs, (32, WIDTH), ('tp', 'fsdp'), contract=None, dtype=dtype, std=1.0)
    self.scale = layers.constant(1., (), dtype=dtype)
    self.blocks = layers.stack(Block, DEPTH, dtype, rngs=rngs)
    self.stages = nnx.List([nnx.List([
        layers.weight(rngs, (3, 3, 4, 2 * (i + 1)), (), contract=None, dtype=dtype, std=0.5) for _ in range(2)])
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
    safetensors_io.write(folder / file, {name: tensors[name] for name in names[i::count]})
    index |= {name: file for name in names[i::count]}
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': index}))
  return folder


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_round_trip_is_exact(tmp_path, dtype):
  tensors = torch_tensors(dtype)
  folder = save_shards(tmp_path, tensors)
  model = convert.load(make(dtype), safetensors_io.read(folder), RULES, AXIS_SIZES)
  convert.save(model, RULES, AXIS_SIZES, tmp_path / 'out', {'width': WIDTH})
  back = safetensors_io.read(tmp_path / 'out')
  assert back.keys() == tensors.keys()
  assert json.loads((tmp_path / 'out' / 'config.json').read_text()) == {'width': WIDTH}
  for name, x in tensors.items():
    assert back[name].dtype == x.dtype and back[name].shape == x.shape, name
    assert back[name][...].tobytes() == x.tobytes(), name


def test_values_and_shardings():
  tensors = torch_tensors()
  model = convert.load(make(), tensors, RULES, AXIS_SIZES)
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
  convert.load(make(), watched, RULES, AXIS_SIZES)
  assert all(watched[f'layers.{i}.up.weight'].count == 24 * WIDTH for i in range(DEPTH))
  assert watched['embed.weight'].count == 32 * WIDTH
  layout = engine.Layout.of('(g r k) d -> d (g r) k', {'r': slice(0, -2)}, (WIDTH, HEADS, DIM), AXIS_SIZES)
  wqkv = watched['layers.0.wqkv.weight']
  whole = wqkv.x.reshape(GROUPS, -1, DIM, WIDTH)[:, :-2].reshape(HEADS, DIM, WIDTH).transpose(2, 0, 1)
  for heads, count in ((slice(4, 8), 4 * 4 * DIM), (slice(2, 6), 4 * 12 * DIM)):
    wqkv.count = 0
    index = (slice(4, 8), heads, slice(0, DIM))
    np.testing.assert_array_equal(engine.Source('wqkv', None, layout).read(wqkv, index), whole[index])
    assert wqkv.count == count


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def test_large_checkpoints_become_several_files_with_an_index(tmp_path):
  """As transformers and diffusers name them; a later save takes the place of an earlier one, of however many files."""
  tensors = torch_tensors()
  model = convert.load(make(), tensors, RULES, AXIS_SIZES)
  (tmp_path / 'tokenizer.json').write_text('{}')
  most = 12_000  # one qkv of 6 KiB, and then some

  def check(files):
    assert names(tmp_path) == sorted([*files, 'config.json', 'tokenizer.json'])
    back = safetensors_io.read(tmp_path)
    assert back.keys() == tensors.keys()
    assert all(back[name][...].tobytes() == x.tobytes() for name, x in tensors.items())

  convert.save(model, RULES, AXIS_SIZES, tmp_path, {}, shard=most)
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  assert index['metadata']['total_size'] == sum(x.nbytes for x in tensors.values())
  count = len(set(index['weight_map'].values()))
  files = [f'model-{i:05d}-of-{count:05d}.safetensors' for i in range(1, count + 1)]
  assert count > 3 and index['weight_map'].keys() == tensors.keys()
  check([*files, 'model.safetensors.index.json'])
  for file in files:
    sizes = [x[...].nbytes for x in safetensors_io.read(tmp_path / file).values()]
    assert sum(sizes) <= most or len(sizes) == 1
  convert.save(model, RULES, AXIS_SIZES, tmp_path, {}, shard=2 * most)  # fewer files
  convert.save(model, RULES, AXIS_SIZES, tmp_path, {})
  check(['model.safetensors'])


def test_a_save_that_fails_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
  model = convert.load(make(), torch_tensors(), RULES, AXIS_SIZES)
  convert.save(model, RULES, AXIS_SIZES, tmp_path / 'old', {'old': True})
  before = (tmp_path / 'old' / 'model.safetensors').read_bytes()
  written, write = [], safetensors_io.write

  def full_disk(path, tensors):
    written.append(path)
    if len(written) % 2 == 0:
      raise OSError('no space left on device')
    write(path, tensors)
  monkeypatch.setattr(safetensors_io, 'write', full_disk)
  for name in ('old', 'new'):
    with pytest.raises(OSError, match='no space'):
      convert.save(jax.tree.map(jnp.zeros_like, model), RULES, AXIS_SIZES, tmp_path / name, {}, shard=12_000)
  assert names(tmp_path) == ['old'] and names(tmp_path / 'old') == ['config.json', 'model.safetensors']
  assert (tmp_path / 'old' / 'model.safetensors').read_bytes() == before
  with pytest.raises(ValueError, match='no rule: embed'):
    convert.save(model, RULES[1:], AXIS_SIZES, tmp_path / 'new', {})
  assert names(tmp_path) == ['old']


def test_a_save_holds_one_file_of_the_model_at_a_time(tmp_path):
  """And not what earlier ones read of it: an array keeps what numpy took from it."""
  width, depth = 256, 16
  arrays = jax.jit(lambda: {'blocks': jnp.ones((depth, width, width)), **{str(i): jnp.ones((width, width))
                                                                           for i in range(depth)}})()
  rules = ((r'layers\.(\d+)\.w', 'blocks', 'o i -> i o'), *((rf'w{i}', str(i), 'o i -> i o') for i in range(depth)))
  layer = width * width * 4
  tracemalloc.start()
  convert.save(arrays, rules, {}, tmp_path, {}, shard=2 * layer)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert len(names(tmp_path)) == depth + 2 and 2 * layer < peak < 4.5 * layer  # of 32


PROGRAM = '''
import sys
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 2)
jax.distributed.initialize(f'localhost:{sys.argv[1]}', 2, int(sys.argv[2]))
import jax.numpy as jnp
import numpy as np
from unifusion_jax import sharding
from unifusion_jax.weights import convert, safetensors_io

with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(fsdp=4))) as _:
  stacked = np.arange(48, dtype=np.float32).reshape(3, 4, 4)
  arrays = {'blocks': jax.device_put(stacked, jax.P(None, 'fsdp')), 'bias': jnp.arange(3.0)}
  assert not arrays['blocks'].is_fully_addressable
  rules = ((r'layers\\.(\\d+)\\.w', 'blocks', 'o i -> i o'), ('b', 'bias', 'd -> d'))
  convert.save(arrays, rules, {}, sys.argv[3], {'process': jax.process_index()}, shard=100)
  tensors = safetensors_io.read(sys.argv[3])  # the other one's files, as soon as save returns
  for i in range(3):
    np.testing.assert_array_equal(tensors[f'layers.{i}.w'][:], stacked[i].T)
  print('saved')
'''


def test_of_two_processes_the_first_one_writes(tmp_path):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  running = [subprocess.Popen([sys.executable, '-c', PROGRAM, str(port), str(i), str(tmp_path / 'out')], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(2)]
  outputs = [process.communicate(timeout=120) for process in running]
  assert [out.splitlines()[-1] for out, _ in outputs] == ['saved'] * 2, outputs
  assert json.loads((tmp_path / 'out' / 'config.json').read_text()) == {'process': 0}
  assert len(names(tmp_path / 'out')) == 5  # three files, their index, config.json


@pytest.mark.parametrize('mesh', [None])  # in place of the fixture
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])  # of the file; the model's is f32
@pytest.mark.parametrize('shape', [(2, 2, 2), (1, 1, 1)])
def test_host_memory_stays_below_two_layers(shape, dtype, mesh, tmp_path, monkeypatch):
  depth, width = 12, 768
  monkeypatch.setattr(engine, 'BLOCK', 2 ** 18)

  class Stack(nnx.Module):

    def __init__(self, *, rngs):
      self.up = layers.weight(rngs, (width, 2 * width), ('fsdp', 'tp'), contract=1)

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
          convert.load(lambda: Deep(rngs=nnx.Rngs(0)), safetensors_io.read(tmp_path), rules, {}))

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
    convert.load(make(), tensors, RULES, AXIS_SIZES, ignore=(r'.*\.inv_freq',))
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
   r'layers.0.proj.weight must be used once and whole, .* slices \[0, 1, 1\] of 3 .*blocks/proj_q, blocks/proj_v'),
  (lambda rules: ((r'embed\.weight', 'embed', 'v d -> d'),) + rules[1:], 'do not have the same letters'),
  (lambda rules: ((r'embed\.(weight|w)', 'embed', 'v d -> v d'),) + rules[1:], 'a torch name is plain text'),
])
def test_rules_that_do_not_fit(change, message):
  with pytest.raises(ValueError, match=message):
    convert.load(make(), torch_tensors(), change(RULES), AXIS_SIZES)


def test_a_size_that_no_shape_tells():
  with pytest.raises(ValueError, match='needs the size of r in axis_sizes'):
    convert.load(make(), torch_tensors(), RULES, {'n': 3})


def test_no_mesh():
  with jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ())):
    with pytest.raises(ValueError, match='jax.set_mesh'):
      convert.load(lambda: {'w': jnp.zeros(2)}, {'w': np.zeros(2, np.float32)}, (('w', 'w', 'd -> d'),), {})
