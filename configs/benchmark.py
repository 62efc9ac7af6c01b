"""A public benchmark of a whole pipeline: images of its prompts, laid out for its own scorer, and tables of scores.

  python -m unifusion_jax.main --config=configs/benchmark.py
  python -m unifusion_jax.main --config=configs/benchmark.py:own --config.benchmark.path=my/prompts.jsonl
  python -m unifusion_jax.main --config=configs/benchmark.py:geneval:krea2_turbo --config.benchmark.path=geneval \
      --config.benchmark.judge=Qwen/Qwen3-VL-8B-Instruct
  python -m unifusion_jax.main --config=configs/benchmark.py:dpg:unifusion_jax/assets/tiny/edit \
      --config.benchmark.path=ELLA --config.benchmark.examples=20

After the first colon stands the set: own, geneval, geneval2, dpg, genai, oneig, imgedit, gedit. After a second one the
model, as after the colon of configs/sample.py: tiny, the embedded editing model, or krea2_turbo, or a folder. The first
command measures it on 200 prompts of scenes, for a CPU; a set of photographs needs an accelerator. docs/benchmarks.md.
"""

import dataclasses

from configs import sample
from unifusion_jax.commands.benchmark import BenchmarkConfig, BenchmarkSettings
from unifusion_jax.data.config import SCENES
from unifusion_jax.errors import UserError
from unifusion_jax.evaluation.benchmarks.sets import SETS


def get_config(scale: str = 'own') -> BenchmarkConfig:
  name, _, model = scale.partition(':')
  if name not in SETS:
    raise UserError(f'configs/benchmark.py has the sets {", ".join(SETS)}, not {name!r}')
  pipeline = sample.get_config(model or 'tiny')
  settings = BenchmarkSettings(name, SCENES[0] if name == 'own' else '')
  if not model:
    settings.judge_dtype = 'float32'
  return BenchmarkConfig(**{field.name: getattr(pipeline, field.name) for field in dataclasses.fields(pipeline)},
                         benchmark=settings)
