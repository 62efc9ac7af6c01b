"""Bytes on each chip by formula: exact where shapes say them, within the chips that the recipes are for."""

import dataclasses

import jax
import pytest

from unifusion_jax import command_line, sharding
from unifusion_jax.commands import train
from unifusion_jax.planning import estimate

GIB = 2 ** 30
CHIPS = {'v5e:16x16': (256, 16), 'v6e:8x8': (64, 32), 'v5p:4x4x8': (128, 95)}  # devices, GiB of each
STAGES = [f'{name}:{scale}' for name in ('t2i', 'edit') for scale in ('8b_256', '8b_512', '8b')]


@pytest.fixture(autouse=True)
def mesh():
  """None in context: the estimate brings its own."""


def read(recipe, *settings):
  return command_line.read(recipe, settings)


@pytest.mark.parametrize('topology', CHIPS)
@pytest.mark.parametrize('recipe', STAGES)
def test_one_example_a_chip_fits(recipe, topology):
  devices, hbm = CHIPS[topology]
  bytes_held = estimate.chip_bytes(
      read(recipe, f'data.batch_size={devices}', 'optim.accumulate=1'), devices)
  assert bytes_held.total < 0.8 * hbm * GIB
  assert bytes_held.total == sum(bytes_held.arguments.values()) + bytes_held.temporaries


@pytest.mark.parametrize('recipe', STAGES)
def test_recipes_fit_the_pod_of_their_head(recipe):
  config = read(recipe)
  assert config.devices == 256 and estimate.chip_bytes(config, config.devices).total < 0.8 * 16 * GIB


@pytest.mark.parametrize('topology, accumulate, images', [('v6e:8x8', 4, 2), ('v5p:4x4x8', 1, 4)])
def test_other_pods_of_their_head(topology, accumulate, images):
  devices, hbm = CHIPS[topology]
  config = read('t2i:8b', f'optim.accumulate={accumulate}')
  assert config.data.batch_size == devices * accumulate * images
  assert estimate.chip_bytes(config, devices).total < 0.8 * hbm * GIB


def test_arguments_are_those_of_the_train_step():
  config = read('edit:8b', 'mesh.tp=2')
  with jax.sharding.use_abstract_mesh(sharding.abstract_mesh(config.mesh, 64)):
    abstract = train.abstract(config)
  held = sum(estimate.chip_bytes(config, 64).arguments.values())
  assert held == pytest.approx(sharding.shard_bytes(abstract), abs=100)  # of counters


def test_what_is_exact():
  """8.95e9 parameters, their average and two moments in f32; an 8B VLM in two bytes or one."""
  terms = estimate.chip_bytes(read('edit:8b', 'data.batch_size=256', 'optim.accumulate=1'), 256).terms
  state = sum(size for name, size in terms.items() if 'training/step.py' in name and 'gradients' not in name)
  assert state == pytest.approx(8.95e9 * 16 / 256, rel=0.05)
  assert terms['frozen VLM (conditioning.py)'] == pytest.approx(8.1e9 * 2 / 256, rel=0.1)
  int8 = estimate.chip_bytes(read('edit:8b', 'data.batch_size=256', 'optim.accumulate=1', 'vlm_quantized=int8'), 256)
  assert int8.terms['frozen VLM (conditioning.py)'] < 0.8 * terms['frozen VLM (conditioning.py)']


def dit_inputs(*settings, devices=256):
  phase = estimate.chip_bytes(read('t2i:8b', 'data.tiles=1', *settings), devices).phases['DiT']
  return phase['inputs of the blocks, kept for the backward (models/dit.py)']


def test_saved_inputs_of_blocks():
  tokens, depth, width = 4096 + 512 + 256, 26, 5120
  assert dit_inputs() == depth * tokens * width * 2  # bf16; a batch of 512 in two halves on 256 chips
  assert dit_inputs('optim.accumulate=1') == 2 * dit_inputs()
  # two examples on four devices, of which each has a quarter of the sequence
  assert dit_inputs('mesh.tp=4', 'optim.accumulate=2') == dit_inputs()
  assert dit_inputs('mesh.tp=4', 'optim.accumulate=2', 'data.max_rewrite_tokens=511') > 3.9 * dit_inputs()


@pytest.mark.parametrize('settings, more', [
    (['data.batch_size=512', 'optim.accumulate=1'], True), (['model.dit.remat=false'], True),
    (['data.size=1536'], True), (['vlm_quantized=int8'], False), (['data.tiles=1'], False),
    (['objective.noises_per_example=4'], True)])
def test_settings_move_it_the_right_way(settings, more):
  plain = estimate.chip_bytes(read('edit:8b', 'data.batch_size=256', 'optim.accumulate=1'), 256).total
  changed = estimate.chip_bytes(read('edit:8b', 'data.batch_size=256', 'optim.accumulate=1', *settings), 256).total
  assert (changed > plain) == more and changed != plain


@pytest.mark.parametrize('recipe', ['t2i', 'edit', 'vae', 'vlm'])
def test_embedded_recipes_have_an_estimate(recipe):
  config = dataclasses.replace(read(recipe), mesh=sharding.MeshConfig(data=1, fsdp=1))
  bytes_held = estimate.chip_bytes(config, 1)
  assert 0 < bytes_held.temporaries < bytes_held.total < 4 * GIB
