"""Saved programs: found by what they are, equal to jit's, and refused in one sentence wherever they do not fit."""

import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unifusion_jax import sharding
from unifusion_jax.errors import UserError
from unifusion_jax.models import layers
from unifusion_jax.planning import executables, programs
from unifusion_jax.training import step


class Model(nnx.Module):
  """A matrix, sharded over the mesh, and a power that belongs to the program."""

  def __init__(self, power: int):
    self.power = power
    self.w = layers.weight(nnx.Rngs(0), (16, 8), ('fsdp', 'tp'), 1)


@pytest.fixture
def start(mesh):
  """`start(power)` -> (jitted train step, its arguments); each call is as in a process of its own."""
  def start(power=2, rows=8):
    jax.clear_caches()
    config = step.OptimConfig(warmup=0)
    tx = step.optimizer(config, 10)

    def loss(model, frozen, batch, key):
      noise = jax.random.normal(key, (8,), out_sharding=jax.P('tp'))
      out = jnp.einsum('bi,io->bo', batch['x'], model.w[...], out_sharding=jax.P(sharding.BATCH, 'tp'))
      value = jnp.mean((out + noise) ** model.power)
      return value, dict(loss=value)
    x = np.random.default_rng(0).normal(size=(rows, 16)).astype(np.float32)
    state = jax.jit(lambda: step.init(Model(power), tx))()
    batch = sharding.shard_batch({'x': x}, mesh)
    return step.make_train_step(loss, tx, config), (state, None, batch, jax.random.key(0))
  return start


def two_steps(train_step, arguments):
  state, *rest = arguments
  after, _ = train_step(state, *rest)
  donated = jax.tree.leaves(state)[2].is_deleted()
  return [np.asarray(x) for x in jax.tree.leaves(train_step(after, *rest))], donated


@pytest.fixture
def compiled():
  """Names of the functions compiled so far."""
  names = []

  def listen(event, seconds, **facts):
    if event == '/jax/core/compile/backend_compile_duration':
      names.append(facts.get('fun_name', ''))
  jax.monitoring.register_event_duration_secs_listener(listen)
  yield names
  jax.monitoring.unregister_event_duration_listener(listen)


def test_a_saved_program_is_loaded_and_equals_that_of_jit(start, compiled, tmp_path):
  want, donated = two_steps(*start())
  assert donated
  for said in (['compiling train_step', 'train_step: compiled in'], ['train_step: loaded from']):
    function, arguments = start()
    compiled.clear()
    notes = []
    have, donated = two_steps(executables.Programs(function, tmp_path / 'folder', notes.append), arguments)
    assert donated and all(note.startswith(text) for note, text in zip(notes, said, strict=True)), notes
    assert any('train_step' in name for name in compiled) == ('compiling' in said[0]), compiled
    for a, b in zip(want, have, strict=True):
      np.testing.assert_array_equal(a, b)
  assert [path.name in notes[0] for path in (tmp_path / 'folder').iterdir()] == [True]


def test_each_shape_and_each_program_has_its_own_file(start, tmp_path):
  function, arguments = start()
  notes = []
  programs = executables.Programs(function, tmp_path, notes.append)
  for rows in (8, 16, 8):
    programs(*start(rows=rows)[1])
  assert len(list(tmp_path.iterdir())) == 2 and len(notes) == 4, notes
  function, arguments = start(power=4)
  executables.Programs(function, tmp_path, notes.append)(*arguments)
  assert len(list(tmp_path.iterdir())) == 3
  assert notes[-2].startswith(f'{tmp_path} has programs of train_step, 2, and not this one; the nearest differs in the '
                              'shape of the batch, the recipe')


def changed(payload: bytes, **header) -> bytes:
  """A file whose header has other values."""
  line, _, rest = payload.partition(b'\n')
  return json.dumps(json.loads(line) | header).encode() + b'\n' + rest


def test_a_file_that_does_not_fit_is_refused_and_written_anew(start, tmp_path):
  function, arguments = start()
  lowered = function.lower(*arguments)
  path = executables.save_program(tmp_path, 'train_step', lowered, executables.compile_program(lowered))
  whole = path.read_bytes()
  for content, text in (
      (changed(whole, jax='0.1'), "is of another compiler: jax: '0.1' there, '"),
      (changed(whole, runtime='libtpu 0'), "is of another compiler: runtime: 'libtpu 0' there, 'cpu "),
      (changed(whole, flags=['--a']), "is of another compiler: flags: ['--a'] there, ["),
      (whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], 'is damaged'), (whole[:-1], 'is damaged'),
      (whole[:9], 'is damaged'), (b'', 'is damaged'), (b'[]\n', 'is damaged'), (b'\xff\n', 'is damaged')):
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
      executables.load_program(tmp_path, 'train_step', lowered)
    assert str(refused.value).startswith(f'{path} {text}')
  notes = []
  executables.Programs(function, tmp_path, notes.append)(*arguments)
  assert notes[0] == f'{path} is damaged: compiling train_step anew' and notes[1].endswith(f'saved as {path}')
  assert executables.load_program(tmp_path, 'train_step', lowered) is not None
  assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_program_of_another_mesh_is_named_as_such(start, tmp_path):
  function, arguments = start()
  lowered = function.lower(*arguments)
  path = executables.save_program(tmp_path, 'train_step', lowered, executables.compile_program(lowered))
  facts = json.loads(path.read_bytes().partition(b'\n')[0])
  assert facts['topology'] == dict(kind='cpu', mesh=dict(data=2, fsdp=2, tp=2), order=list(range(8)), processes=1)
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(fsdp=8))):
    with pytest.raises(UserError, match='topology.mesh.data: 2 there, 1 now; topology.mesh.fsdp: 2 there, 8 now'):
      executables.load_program(tmp_path, 'train_step', lowered)


def test_a_folder_that_cannot_be_written_stops_nothing(start, tmp_path):
  (tmp_path / 'file').write_text('')
  function, arguments = start()
  notes = []
  executables.Programs(function, tmp_path / 'file', notes.append)(*arguments)
  assert 'not saved: ' in notes[-1] and 'file' in notes[-1]


@pytest.mark.slow
@pytest.mark.parametrize('minutes, online', [(0.0, False), (5.0, True)])
def test_training_starts_the_program_that_is_lowered_from_shapes(recipe, mesh, minutes, online, tmp_path):
  """So a plan, which has no weights and no data, writes the file that a start finds."""
  made = recipe()
  made.objective.rewrite_online, made.train.minutes = online, minutes
  batch = {name: np.zeros(x.shape, x.dtype) for name, x in made.objective.batch_spec(made).items()}
  tx = step.optimizer(made.optim, made.train.steps)
  state = jax.jit(lambda params: step.init(params, tx), donate_argnums=0)(made.objective.init(made))
  concrete = step.make_train_step(made.objective.loss, tx, made.optim).lower(
      state, made.objective.frozen(made), sharding.shard_batch(batch, mesh), jax.random.key(made.seed),
      np.float32(0) if minutes else None)
  planned = programs.of('train', made).trace().lower()
  assert executables.path(tmp_path, 'a', planned) == executables.path(tmp_path, 'a', concrete)


@pytest.mark.slow
def test_a_program_for_a_tpu_is_written_here_and_not_loaded(start, mesh, tmp_path, monkeypatch):
  from jax.experimental import topologies
  for name in ('TPU_SKIP_MDS_QUERY', 'ALLOW_MULTIPLE_LIBTPU_LOAD'):
    monkeypatch.setenv(name, '1')
  devices = topologies.get_topology_desc('v5e:2x4', 'tpu').devices
  torus = topologies.get_topology_desc('v6e:8x8', 'tpu').devices  # of which 16 x 4 are no whole sides
  assert dict(sharding.make_mesh(sharding.MeshConfig(tp=4), torus).shape) == dict(data=1, fsdp=16, tp=4)
  function, arguments = start()
  tpu = sharding.make_mesh(sharding.MeshConfig(2, 2, 2), devices)
  with jax.set_mesh(tpu):
    lowered = function.lower(*sharding.abstract(jax.eval_shape(lambda *x: x, *arguments), tpu))
    path = executables.save_program(tmp_path, 'train_step', lowered, executables.compile_program(lowered))
    facts = json.loads(path.read_bytes().partition(b'\n')[0])
    assert facts['topology']['kind'] == 'TPU v5 lite' and facts['topology']['processes'] == 2
    assert sorted(facts['topology']['order']) == list(range(8)) and 'TPU' in facts['runtime']
    with pytest.raises(UserError, match=f'{path.name} cannot be loaded: '):
      executables.load_program(tmp_path, 'train_step', lowered)
  notes = []
  executables.Programs(function, tmp_path, notes.append)(*arguments)
  assert "topology.kind: 'TPU v5 lite' there, 'cpu' now" in notes[0] and len(list(tmp_path.iterdir())) == 2
