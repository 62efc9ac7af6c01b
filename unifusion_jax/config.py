"""The configuration of a run: a tree of dataclasses, each beside the code that reads it.

`configs/*.py` build one; `--config.a.b=value` changes a field; a misspelt field or a value of the wrong type stops at
start. `objective` is what is trained and `eval` how it is measured. Both hold settings and behaviour (`objectives/`,
`evaluation/`, `scenes/`), so this file depends on no particular one.
"""

import dataclasses
from typing import Any

from unifusion_jax import bucket, ranges, verifi
from unifusion_jax.commands.rewrite import RewriteConfig
from unifusion_jax.commands.train import TrainConfig
from unifusion_jax.data.config import DataConfig
from unifusion_jax.demo.settings import DemoConfig
from unifusion_jax.description import ASSETS
from unifusion_jax.errors import UserError
from unifusion_jax.evaluation.inside import InspectConfig
from unifusion_jax.evaluation.records import RecordsEvaluation
from unifusion_jax.fields import Path, Seed
from unifusion_jax.planning.settings import PlanConfig
from unifusion_jax.ranges import Range
from unifusion_jax.request import SampleConfig
from unifusion_jax.sharding import MeshConfig
from unifusion_jax.training.step import OptimConfig


@dataclasses.dataclass
class Config:
  objective: Any                  # what is trained: a dataclass of objectives/ or scenes/
  model: Any                      # sizes of the model in training
  # Folder, hub id or gs:// address: of the frozen VLM, or when a VLM is trained, of its tokenizer
  vlm: Path = str(ASSETS / 'vlm')
  vlm_quantized: str = ''         # 'int8': weights in int8; 'w8a8': activations too
  vlm_cache: Path | None = None   # folder that keeps the converted VLM for the next start
  vae: Path = str(ASSETS / 'vae')  # folder, hub id or address of a diffusers autoencoder
  # Checkpoint folder to start training from; None: random weights. With adapters (objective.lora) their frozen base
  init: Path | None = None
  system: str = 'rewrite'         # system prompt of training, a name in verifi.SYSTEM or a text
  layout: str = 'verifi'          # of requests without VERIFI: a name in verifi.LAYOUTS
  taps: tuple[int, ...] = ()      # VLM layers that LAP pools, as indices of `hidden_states` (0: embeddings)
  frozen_dtype: str = 'bfloat16'  # of VLM and autoencoder
  seed: Seed = 0
  recipe: str = ''                # of --config, for the record of the run; main sets it
  # {setting: hub id at its commit, or address}; `record.pin` puts the local folder into the setting itself.
  hub: dict[str, str] = dataclasses.field(default_factory=dict)
  devices: int = 0                # devices that the recipe is for, to check it on another machine; 0: those present
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
  rewrite: RewriteConfig = dataclasses.field(default_factory=RewriteConfig)
  plan: PlanConfig = dataclasses.field(default_factory=PlanConfig)
  demo: DemoConfig = dataclasses.field(default_factory=DemoConfig)
  inspect: InspectConfig = dataclasses.field(default_factory=InspectConfig)
  eval: Any = dataclasses.field(default_factory=RecordsEvaluation)  # how --mode=eval measures

  def problems(self, devices: int) -> list[str]:
    """Settings that cannot work together on a number of devices, one sentence each."""
    wrong = [*ranges.problems(self, '', devices=Range(0, 10 ** 7), taps=Range(0, 1000)), *self.mesh.problems(),
             *self.model.problems('model.')]
    if wrong:
      return wrong
    data, fsdp, tp = self.mesh.shape(devices)
    mesh = dict(data=data, fsdp=fsdp, tp=tp)
    kinds, unit = self.objective.tasks, self.objective.unit(self)
    local = {'vlm_cache': self.vlm_cache, 'train.executables': self.train.executables}
    place_problems = [f'{name}={value} must be a local folder: it is written and loaded as files' for name, value
                      in local.items() if bucket.is_address(value)]
    dtype_problems = [] if self.frozen_dtype in ('float32', 'bfloat16') else [
        f"frozen_dtype={self.frozen_dtype!r} must be 'float32' or 'bfloat16'"]
    layout_problems = [] if self.layout in verifi.LAYOUTS else [
        f'layout={self.layout!r} must be one of {", ".join(map(repr, verifi.LAYOUTS))}']
    data_problems = self.data.problems(kinds=kinds, unit=unit, shards=data * fsdp, accumulate=self.optim.accumulate)
    return [*place_problems, *dtype_problems, *layout_problems, *self.model.undivided(mesh, 'model.'), *data_problems,
            *self.optim.problems(), *self.train.problems(), *self.objective.problems(self, devices),
            *self.sample.problems(unit), *self.rewrite.problems(), *self.plan.problems(), *self.demo.problems(),
            *self.inspect.problems(), *self.eval.problems(self)]


def check(config, devices: int) -> None:
  """Raises a UserError that lists all of `config.problems`, if there are any; of a Config or a DescribeConfig."""
  problems = config.problems(devices)
  if problems:
    raise UserError('this configuration cannot run:\n  ' + '\n  '.join(problems))
