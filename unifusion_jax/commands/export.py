"""Export: the EMA of a run's last checkpoint as weights in the public formats, in WORKDIR/export."""

import pathlib

from unifusion_jax import bucket, sharding
from unifusion_jax.training import checkpoint, record


def run(config, workdir: pathlib.Path) -> None:
  """Writes the weights; the mesh must be in context."""
  record.check_same_model(config, workdir)
  params, _ = checkpoint.trained(config, workdir)
  config.objective.export(config, params, workdir / 'export')
  record.write(config, workdir, 'config_export.json')
  if sharding.is_main_process():
    print(f'wrote {bucket.address(workdir / "export")}')
