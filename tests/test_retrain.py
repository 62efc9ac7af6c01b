"""Training of all embedded models: stages that follow from each other, and programs compiled before they are needed."""

import dataclasses
import itertools
import pathlib

import jax
import pytest

from unifusion_jax import config as configuration
from unifusion_jax import sharding
from unifusion_jax.commands import train
from unifusion_jax.scenes import retrain

SCALE = retrain.Scale(2, 2, 2, noises=2, workers=0, tiles=(1,), dtype='bfloat16', rate=1.5)


@pytest.mark.parametrize('from_shipped', ((), ('vlm', 't2i', 'edit')))
def test_stages_start_from_the_exports_of_those_before_them(tmp_path, from_shipped):
  stages, shipped = retrain.stages(tmp_path, 9, SCALE, from_shipped), configuration.ASSETS
  assert sum(config.train.minutes for config in stages.values()) == pytest.approx(9 * (1 - retrain.RESERVE))
  assert stages['edit'].init == str(tmp_path / 't2i' / 'export')
  assert stages['edit'].vlm == stages['t2i'].vlm == str(tmp_path / 'vlm' / 'export')
  assert stages['vlm'].init == str(shipped / 'vlm' if from_shipped else tmp_path / 'tower' / 'export')
  # Weights that know the latents of the shipped autoencoder go on with it
  vae = shipped / 'vae' if from_shipped else tmp_path / 'vae' / 'export'
  assert stages['edit'].vae == stages['t2i'].vae == str(vae)
  assert stages['vlm'].data.path == 'scenes/wide'
  # The shipped DiTs know no other world
  assert {stages[name].data.path for name in ('t2i', 'edit')} == {'scenes' if from_shipped else 'scenes/wide'}
  for config in stages.values():
    assert sum(task.weight for task in config.data.tasks) == pytest.approx(1)


def test_stages_alone_go_on_from_the_shipped_weights_within_the_whole_budget(tmp_path):
  stages, shipped = retrain.stages(tmp_path, 9, SCALE, ('edit',)), configuration.ASSETS
  assert list(stages) == ['edit']
  config = stages['edit']
  assert [config.init, config.vlm, config.vae] == [str(shipped / name) for name in ('edit', 'vlm', 'vae')]
  assert config.train.minutes == pytest.approx(9 * (1 - retrain.RESERVE))
  stages = retrain.stages(tmp_path, 9, SCALE, ('t2i', 'edit'))
  assert stages['t2i'].init == str(shipped / 't2i')
  assert stages['edit'].init == str(tmp_path / 't2i' / 'export')


@pytest.mark.parametrize('name', ('vlm', 'edit'))
def test_every_batch_has_a_shape_that_is_compiled_ahead(tmp_path, name):
  config = retrain.stages(tmp_path, 9, SCALE, ('vlm', 'edit'))[name]
  config = dataclasses.replace(config, vlm=str(configuration.ASSETS / 'vlm'), vae=str(configuration.ASSETS / 'vae'))
  shapes = lambda batch: tuple((key, value.shape, value.dtype) for key, value in sorted(batch.items()))
  with jax.set_mesh(jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1])):
    ahead = set(map(shapes, retrain.shapes(config)))
    met = set(map(shapes, itertools.islice(train.batches(config), 60)))
  assert met <= ahead
  assert len(met) > 1


def test_programs_with_an_autoencoder_that_is_not_there_yet_are_not_compiled(tmp_path, monkeypatch):
  started = []
  monkeypatch.setattr(retrain.subprocess, 'Popen', lambda command, **_: started.append(command[-1]))
  stages, compilers = retrain.stages(tmp_path, 9, SCALE, ()), retrain.Compilers()
  for name in ('vlm', 't2i'):
    compilers.start(name, stages[name])
  pathlib.Path(stages['t2i'].vae).mkdir(parents=True)
  pathlib.Path(stages['t2i'].vae, 'config.json').touch()
  for name in ('vlm', 't2i'):
    compilers.start(name, stages[name])
  assert started == ['--compile=vlm', '--compile=t2i']
