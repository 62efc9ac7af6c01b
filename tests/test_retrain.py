"""The embedded models within a budget of time: the stages hang together, the clock ends them, interruptions go on."""

import dataclasses
import itertools
import json

import pytest

from unifusion_jax import config as configuration
from unifusion_jax.commands import train
from unifusion_jax.scenes import retrain

CPU, GPU = retrain.scale_of('cpu', 2), retrain.scale_of('gpu', 16)


@pytest.mark.parametrize('scale', [CPU, GPU])
def test_stages_start_from_what_earlier_ones_export(scale, tmp_path):
  stages = retrain.stages(tmp_path, 9.0, scale)
  assert list(stages) == ['vae', 'tower', 'vlm', 't2i', 'edit']
  assert stages['vlm'].init.endswith('tower/export') and stages['edit'].init.endswith('t2i/export')
  for name in ('t2i', 'edit'):
    assert stages[name].vlm.endswith('vlm/export') and stages[name].vae.endswith('vae/export')
  assert sum(stage.train.minutes for stage in stages.values()) == pytest.approx(9.0 * (1 - retrain.RESERVE))
  for stage in stages.values():
    assert stage.data.path == 'scenes/wide' and len({budget[1:] for budget in stage.data.budgets}) == 1
    stage.vae = str(configuration.ASSETS / 'vae')  # the export is not there yet
    configuration.check(stage, 1)


def test_the_clock_ends_a_run_and_its_learning_rate(recipe, tmp_path, monkeypatch):
  """Progress by the clock: the run stops when it is used up, is not begun again, and one that was cut goes on."""
  seconds, clock = itertools.count(0, 5), train.Clock
  monkeypatch.setattr(train, 'Clock', lambda minutes, progress: clock(minutes, progress, lambda: next(seconds)))
  config = recipe()
  config.train = train.TrainConfig(minutes=1.0, log_every=1, save_every=1, preview_every=0)
  config.optim.decay = 1.0
  state = train.run(config, tmp_path, stop_at=2)
  assert int(state.step) == 2 and 0 < float(state.progress) < 1
  state = train.run(config, tmp_path)
  # Twelve of five seconds, and the first of each start, which begins with the clock
  assert float(state.progress) == 1 and int(state.step) == 14
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == list(range(1, int(state.step) + 1))
  assert int(train.run(config, tmp_path).step) == int(state.step)


def test_interrupted_stages_go_on(recipe, tmp_path, monkeypatch):
  """A stage that was exported whole is done; the others train and export in order."""
  config = recipe()
  config.train = dataclasses.replace(config.train, steps=1, save_every=1, preview_every=0)
  configs = {name: dataclasses.replace(config) for name in ('one', 'two')}
  monkeypatch.setattr(retrain, 'stages', lambda *_: configs)
  (tmp_path / 'one').mkdir()
  (tmp_path / 'one' / 'config_export.json').touch()
  (tmp_path / 'two' / 'export').mkdir(parents=True)  # an export that was cut short
  retrain.run(tmp_path, 1.0, CPU)
  assert not (tmp_path / 'one' / 'export').exists()
  assert (tmp_path / 'two' / 'export' / 'unifusion.json').exists()
