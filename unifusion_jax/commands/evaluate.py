"""Evaluation: `config.eval` measures the workdir's run, or the weights that the configuration names."""

import json
import pathlib

from unifusion_jax import sharding
from unifusion_jax.data import storage
from unifusion_jax.data.config import SCENES
from unifusion_jax.errors import UserError
from unifusion_jax.training import checkpoint, record


def run(config, workdir: pathlib.Path) -> None:
  """Writes and prints a report (`eval.json`, or `eval_STUDY.json`) that names the weights it measured."""
  record.check_same_model(config, workdir)
  path = config.data.measured
  if path not in SCENES and not storage.exists(path):  # before anything slow is loaded
    raise UserError(f'{path} is not there: evaluate on data.path=scenes, or give a list of records of your own')
  params, weights = checkpoint.trained(config, workdir)
  report = dict(weights=weights, **config.eval.run(config, params, workdir / 'eval'))
  record.write(config, workdir, 'config_eval.json')
  if sharding.is_main_process():
    text = json.dumps(report, indent=2)
    (workdir / f'{config.eval.report}.json').write_text(text + '\n')
    print(text)
