"""What a mesh repeats is said in one line with its arithmetic; what it cannot do is refused."""

import pytest

from unifusion_jax import command_line
from unifusion_jax import config as configuration
from unifusion_jax.errors import UserError
from unifusion_jax.planning import replication


@pytest.fixture(autouse=True)
def mesh():
  """None in context: only numbers are needed."""


def repeated(recipe, devices, *settings):
  return replication.repeated(command_line.read(recipe, settings), devices)


@pytest.mark.parametrize('recipe', ['t2i:8b_256', 't2i:8b_512', 't2i:8b', 'edit:8b_256', 'edit:8b_512', 'edit:8b'])
@pytest.mark.parametrize('devices', [64, 128, 256])
def test_the_8b_recipes_repeat_nothing(recipe, devices):
  assert repeated(recipe, devices) == []


@pytest.mark.parametrize('recipe', ['t2i', 'edit', 'vae', 'vlm'])
def test_a_tiny_model_on_every_device_is_not_worth_a_line(recipe):
  assert repeated(recipe, 8) == []


@pytest.mark.parametrize('settings, devices, sentence', [
    (['mesh.tp=8', 'data.max_rewrite_tokens=500', 'data.batch_size=64'], 64,
     'mesh.tp=8 does not divide 15 of the 15 lengths of a sequence in the DiT, 7,156 the longest: each of the 8 '
     'devices holds all of it between blocks, 7.10 GiB of the inputs of 26 blocks and not 0.89 GiB; data.unit and '
     'data.max_rewrite_tokens set the lengths'),
    (['mesh.tp=2'], 256, 'mesh.tp=2 does not divide 3 of the 4 lengths of a sequence in the VLM, 3,587 the longest'),
    (['mesh.tp=4', 'optim.accumulate=8'], 256,
     'mesh.tp=4 does not divide 1 of the 1 lengths of a sequence in the LAP, 10 the longest: each of the 4 devices '
     'holds all of it between blocks, 0.47 GiB of the inputs of 2 blocks and not 0.12 GiB'),
    (['mesh.tp=4', 'optim.accumulate=8'], 256,
     'data.batch_size=512 over optim.accumulate=8 are 64 images at a time, no multiple of 256 devices: the autoencoder '
     'encodes each of them on each of the 4 devices of mesh.tp'),
    (['mesh.data=4'], 64, 'mesh.data=4 keeps the whole training state 4 times: 8.35 GiB on each device, where '
     'mesh.data=1 with mesh.fsdp=64 keeps about 2.09 GiB')])
def test_what_is_repeated(settings, devices, sentence):
  lines = repeated('edit:8b', devices, *settings)
  assert any(line.startswith(sentence) for line in lines), lines


@pytest.mark.parametrize('settings, sentence', [
    (['mesh.tp=16'], 'mesh.tp=16 must divide model.dit.kv_heads=8'), (['mesh.tp=3', 'mesh.fsdp=1'], 'does not fit 512'),
    (['mesh.fsdp=512'], 'mesh.fsdp=512 must divide model.dit.time_dim=256'),
    (['data.batch_size=128', 'optim.accumulate=1'],
     'data.batch_size=128 must be a multiple of 512: mesh.data x mesh.fsdp = 512 devices share a batch, times '
     'optim.accumulate=1; mesh.tp shares an example among several'),
])
def test_what_cannot_be_is_refused(settings, sentence):
  with pytest.raises(UserError) as error:
    configuration.check(command_line.read('edit:8b', settings), 512)
  assert sentence in str(error.value)
