"""Plans: topologies and their errors, refusals, the arithmetic of reports, the search; one TPU compile a generation."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from unifusion_jax import sharding
from unifusion_jax.commands import plan
from unifusion_jax.errors import UserError
from unifusion_jax.models import layers
from unifusion_jax.planning import chips, compiler, memory, model_flops, plans, programs, report, search, settings, work
from unifusion_jax.sharding import MeshConfig


@pytest.fixture(autouse=True)
def mesh():
  """None in context, in place of the one of all tests: a plan makes its own."""


@pytest.fixture
def small(recipe):
  """`small(topology, programs)`: a recipe of random models, with fsdp first."""
  def make(topology: str, *names: str, **changes):
    config = recipe(mesh=MeshConfig(), plan=settings.PlanConfig(topology, names or ('train',)))
    return search.changed(config, **dict(data__batch_size=2 * chips.topology(topology).devices) | changes)
  return make


@pytest.mark.parametrize('name, chip_count, devices', [
    ('v5e:1x1', 1, 1), ('v5e:16x16', 256, 256), ('v6e:2x4', 8, 8), ('v5p:2x2x1', 4, 4), ('v5p:4x4x8', 128, 128),
    ('tpu7x:2x2x1', 4, 8), ('h100:8', 8, 8)])
def test_topologies(name, chip_count, devices):
  topology = chips.topology(name)
  assert (topology.chips, topology.devices) == (chip_count, devices)
  assert 0 < topology.usable <= topology.hbm


@pytest.mark.parametrize('name, said', [
    ('v7x:2x2', "no generation 'v7x'; there are v5e, v6e, v5p, tpu7x, a100, h100, h200"), ('v6e', "shape ''"),
    ('v5e:3x3', "shape '3x3' must be one of 1x1, 2x2, 2x4"), ('v6e:32x16', "'32x16' must be one of"),
    ('v5p:4x4', "'4x4' must be one of 2x2x1"), ('v5p:8x4x4', 'multiples of 4 that rise, as 4x4x8'),
    ('v5p:16x16x28', 'up to 6144 chips'), ('v5p:0x4x4', 'must be'), ('h100:9', 'a number of GPUs up to 8'),
    ('v6e:8x', "'8x' must be")])
def test_topologies_that_do_not_exist(name, said):
  with pytest.raises(UserError, match='--topology=') as error:
    chips.topology(name)
  assert said in str(error.value) and '\n' not in str(error.value)


def test_settings_out_of_range():
  assert settings.PlanConfig('v6e:2x4').problems() == []
  assert 'no program' in settings.PlanConfig('v6e:2x4', ('train', 'draw')).problems()[0]
  assert 'plan.references=-1' in settings.PlanConfig(references=-1).problems()[0]


@pytest.mark.parametrize('message, needs', [
    ('RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (24.75G) exceeds '
     'available HBM (15.75G).', 24.75 * 2 ** 30),
    ('RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 512.00M of '
     '16.00M hbm.\nLargest program allocations', 2 ** 29),
    ('RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.', None)])
def test_refusals(message, needs):
  refused = compiler.refusal(message)
  assert refused.needs == needs and '\n' not in refused.message


def test_other_errors_are_no_refusals():
  assert compiler.refusal('INVALID_ARGUMENT: Invalid TPU program.') is None


def test_without_the_compiler(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"pip install 'jax\[tpu\]'"):
    compiler.mesh(MeshConfig(), chips.topology('v6e:2x4'))


def test_roofline_is_bound_by_its_slowest_peak():
  topology = chips.topology('v6e:2x4')
  gather = work.Collective('all-gather', 2, 10 ** 9, 10 ** 9, 'bf16[2,250000000]', '')
  done = work.Work(flops=9.18e12, attention=0, hbm_bytes=int(1.638e10), collectives=(gather,), tensors=())
  time = plans.roofline(done, topology, model=4.59e12)
  assert time['seconds'] == pytest.approx(dict(operations=0.01, HBM=0.01, links=0.005)) and time['mfu'] == 0.5
  slower = plans.roofline(dataclasses.replace(done, hbm_bytes=int(3.276e10)), topology, model=4.59e12)
  assert slower['bound'] == 'HBM' and slower['mfu'] == pytest.approx(0.25)


def test_a_core_of_two_has_half_a_chip():
  done = work.Work(flops=1e12, attention=0, hbm_bytes=0, collectives=(), tensors=())
  assert plans.roofline(done, chips.topology('tpu7x:2x2x1'), 0)['least'] == 2e12 / 2307e12
  assert chips.topology('tpu7x:2x2x1').usable == int(94.75 * 2 ** 30)


def test_the_largest_layer_and_tensor(recipe):
  """Of the models whole: a stack's leaves together by its depth, a checkpoint's tensors one layer each."""
  config = search.changed(recipe(), model__dit__depth=3)
  with jax.sharding.use_abstract_mesh(sharding.abstract_mesh(config.mesh, 8)):
    train = programs.of('train', config)
  dit = train.weights[0].dit
  assert memory.largest_layer(dit) == sum(leaf.size for leaf in jax.tree.leaves(dit.blocks)) // 3
  assert memory.largest_layer(train.weights) >= memory.largest_layer(dit)
  assert memory.largest_tensor(train.weights) == ('vlm.decoder.embedding', 1024 * 32 * 4)


@pytest.mark.parametrize('number, text', [
    (3 * 2 ** 30, '3.00 GiB'), (2 ** 28, '0.25 GiB'), (2 ** 24, '16.00 MiB'), (2048, '2.0 KiB'), (0, '0.0 KiB')])
def test_sizes(number, text):
  assert memory.size(number) == text


@pytest.fixture(scope='module')
def planned(recipe, tmp_path_factory):
  """(results, plan.json) of every program for GPUs, on the CPU that stands in for them."""
  folder, config = tmp_path_factory.mktemp('plan'), recipe(mesh=MeshConfig())
  config.plan = settings.PlanConfig('h100:8', settings.PROGRAMS)
  return plan.run(config, folder), json.loads((folder / 'plan.json').read_text())


@pytest.mark.slow
def test_every_program_has_its_numbers(planned):
  results, written = planned
  assert [result['program'] for result in written['programs']] == list(settings.PROGRAMS)
  assert written['mesh'] == dict(data=1, fsdp=8, tp=1) and written['programs'] == results
  assert all(result['fits'] and result['memory']['arguments'] > 0 and result['rows'] == 8 for result in results)
  train, _, _, denoise, *_ = results
  assert 0.9 < train['compiled_flops'] / train['model_flops']['total'] < 1.1  # without remat
  assert train['collectives'] and not plans.larger_than_a_layer(train)
  assert train['model_flops']['backward'] > train['model_flops']['forward'] and not denoise['model_flops']['backward']


@pytest.mark.slow
def test_reports_fit_a_screen(planned):
  for result in planned[0]:
    lines = report.program(result, chips.topology('h100:8')).splitlines()
    assert len(lines) <= 20 and max(map(len, lines)) <= 140
    assert any('usable' in line for line in lines) and any(line.strip().startswith('fits, ') for line in lines)


def unrolled_layers(jaxpr) -> set[int]:
  """How many steps of each loop, itself or in another, are unrolled."""
  found = {int(eqn.params['unroll']) for eqn in jaxpr.eqns if eqn.primitive.name == 'scan'}
  return found.union(*(unrolled_layers(inner) for eqn in jaxpr.eqns for inner in model_flops.subjaxprs(eqn)))


@pytest.mark.parametrize('topology', ['h100:2', 'v5e:2x4'])
def test_layers_are_scanned(small, topology, monkeypatch):
  """Also where it is a CPU, whose own layers are unrolled, that stands in for the chips."""
  monkeypatch.setattr(layers, 'UNROLL', None)
  config, chosen = small(topology, model__dit__depth=3), chips.topology(topology)
  with jax.set_mesh(compiler.mesh(config.mesh, chosen)), plans.as_accelerator(chosen):
    assert unrolled_layers(programs.of('train', config).trace().jaxpr.jaxpr) == {1}


@pytest.mark.slow
def test_what_does_not_fit_is_searched(small, planned, monkeypatch, tmp_path, capsys):
  """A verdict, and the nearest settings that fit, tried one after another."""
  train = planned[0][0]

  def examine(config, *_):
    """Memory as if it were in proportion to the examples of a micro-batch."""
    rows = config.data.batch_size // config.optim.accumulate
    used = dict(train['memory'], arguments=2 ** 20, temporaries=rows * 2 ** 30, total=rows * 2 ** 30 + 2 ** 20,
                usable=5 * 2 ** 30)
    return dict(train, memory=used, fits=used['total'] <= used['usable'])

  monkeypatch.setattr(plans, 'plan', examine)
  (result,) = plan.run(small('h100:2', data__batch_size=32), tmp_path)
  said, record = capsys.readouterr().out, json.loads((tmp_path / 'plan.json').read_text())
  assert not result['fits'] and 'DOES NOT FIT: 27.00 GiB too much' in said
  assert [each['settings'] for each in record['tried']] == ['--config.optim.accumulate=8']
  assert 'verdict: train does not fit; with --config.optim.accumulate=8 train fits, 1.00 GiB to spare' in said


def test_a_plan_for_gpus_is_no_program_to_keep(small, tmp_path):
  with pytest.raises(UserError, match='--save: the plan of h100:2 is compiled for CPUs'):
    plan.run(small('h100:2', plan__save=True), tmp_path)


@pytest.mark.slow
def test_where_nothing_fits(small, planned, monkeypatch, tmp_path, capsys):
  refused = dict(planned[0][0], fits=False, refused='Ran out of memory in memory space vmem.')
  refused['memory'] = dict(refused['memory'], total=None, temporaries=None)
  del refused['time']
  monkeypatch.setattr(plans, 'plan', lambda *_: refused)
  plan.run(small('h100:2'), tmp_path)
  said = capsys.readouterr().out
  assert 'DOES NOT FIT: Ran out of memory in memory space vmem.' in said and 'Traceback' not in said
  assert 'verdict: train does not fit; none of the 4 other settings that were compiled does' in said


def test_candidates_change_the_least_first(small):
  topology = chips.topology('v6e:2x4')
  config = small('v6e:2x4', data__batch_size=32, mesh__tp=2)
  memory_of = lambda arguments: dict(arguments=arguments, beside=0, temporaries=10 ** 9, usable=10 ** 9)
  names = [list(changes) for changes in search.candidates(config, topology, memory_of(0))]
  assert names[0] == ['optim__accumulate'] and any(name.endswith('remat') for name in names[-3])
  assert ['vlm_quantized' in each for each in names[-2:]] == [True, True] and 'data__batch_size' in names[-1]
  for changes in search.candidates(config, topology, memory_of(10 ** 10)):  # less work at a time would not help
    assert 'mesh__fsdp' in changes
    assert not search.changed(config, **changes).problems(topology.devices)


def test_other_objectives_do_not_sample(recipe):
  config = recipe(mesh=MeshConfig())
  config.objective = dataclasses.make_dataclass('Objective', ['tasks'])(('t2i',))
  config.objective.problems = lambda *_: []
  config.objective.unit = lambda _: 8
  with pytest.raises(UserError, match='samples no images'):
    plans.plan(config, chips.topology('h100:8'), 'encode')


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:Error reading persistent compilation cache')
@pytest.mark.parametrize('topology, program', [
    ('v6e:2x2', 'train'), ('v5e:2x2', 'rewrite'), ('v5p:2x2x1', 'rewrite'), ('tpu7x:2x2x1', 'rewrite')])
def test_each_generation(small, topology, program, tmp_path, capsys):
  """The real compiler: every number of the report is there, and within what the chip has."""
  (result,) = plan.run(small(topology, program, plan__save=True), tmp_path)
  assert len(list((tmp_path / 'executables').glob('train_step-*.bin'))) == (program == 'train')
  assert result['fits'] and 0 < result['memory']['arguments'] < result['memory']['total']
  assert 0.6 < result['compiled_flops'] / result['model_flops']['total'] < 1.3
  assert result['hbm_bytes'] > 0 and any(each['kind'] == 'all-gather' for each in result['collectives'])
  assert all(tensor['bytes'] > 0 for tensor in result['tensors']) and result['tensors'][0]['source']
  assert f'verdict: {program} fits' in capsys.readouterr().out


def test_the_stand_in_of_a_gpu_keeps_no_weights_in_float32():
  layers, x = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((8, 512, 512), (16, 512)))
  lowered = jax.jit(lambda w, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]).lower(layers, x)
  used = compiler.compile(lowered, chips.topology('h100:1')).memory_analysis().temp_size_in_bytes
  assert used < 2 * 512 * 512 * 4


def test_a_program_that_the_compiler_refuses():
  topology = chips.topology('v5e:1x1')
  mesh = compiler.mesh(MeshConfig(), topology)
  with jax.set_mesh(mesh):
    x = jax.ShapeDtypeStruct((8, 2 ** 28), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P()))
    refused = compiler.compile(jax.jit(lambda x: x[::-1] * 2).lower(x))
  assert refused.needs == 16 * 2 ** 30 > topology.usable
