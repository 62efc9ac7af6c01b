"""Images of a whole pipeline by name: Krea 2, or any folder or hub id with unifusion.json.

  python -m unifusion_jax.main --config=configs/sample.py --config.sample.prompt="a big red circle"
  python -m unifusion_jax.main --config=configs/sample.py:krea2_turbo --config.sample.prompt="a fox in the snow"
  python -m unifusion_jax.main --config=configs/sample.py:krea2_raw --config.sample.prompt="a fox in the snow" \
      --config.sample.negative_prompt="blurry" --config.sample.width=1280 --config.sample.height=720
  python -m unifusion_jax.main --config=configs/sample.py:unifusion_jax/assets/tiny/t2i \
      --config.sample.prompt="a big red circle"
  python -m unifusion_jax.main --config=configs/sample.py:krea2_turbo_int8 --config.sample.prompt="a fox in the snow"

After the colon may stand a folder with unifusion.json, or with the whole pipeline of Krea 2: it says how it is sampled.
:tiny is the embedded editing model, for a CPU. :krea2_raw and :krea2_turbo are Krea 2 in bfloat16, with the steps and
guidance of its model cards: 52 and 4.5 (Krea counts one less, 3.5), and 8 without guidance. 12.8B parameters of the
transformer, 4.4B of the VLM: 35 GB of weights. :krea2_raw_int8 and :krea2_turbo_int8 hold transformer and VLM in int8,
and one of the two at a time, for a chip of 16 GB. docs/krea2.md.
"""

import pathlib

from unifusion_jax import description, parts
from unifusion_jax.commands.sample import PipelineConfig
from unifusion_jax.errors import UserError
from unifusion_jax.request import SampleConfig

KREA2 = {'krea2_raw': 'krea/Krea-2-Raw', 'krea2_turbo': 'krea/Krea-2-Turbo'}


def get_config(scale: str = 'tiny') -> PipelineConfig:
  if scale == 'tiny':
    settings = description.read(description.ASSETS / 'edit').sample
    return PipelineConfig(dtype='float32', sample=SampleConfig().changed(**settings))
  if (folder := pathlib.Path(scale).expanduser()).is_dir():
    described = parts.describe(folder)
    defaults = SampleConfig(batch_size=1) if described.layout == 'krea2' else SampleConfig()
    return PipelineConfig(weights=scale, sample=defaults.changed(**described.sample))
  name = scale.removesuffix('_int8')
  if name not in KREA2:
    scales = ', '.join(f'{name}{kind}' for name in KREA2 for kind in ('', '_int8'))
    raise UserError(f'configs/sample.py has the scales tiny, {scales} and folders of models, not {scale!r}')
  weights = KREA2[name]
  config = PipelineConfig(weights=weights, sample=SampleConfig(**parts.KREA2[weights], batch_size=1))
  if scale.endswith('_int8'):
    config.vlm_quantized = config.transformer_quantized = 'int8'
    config.in_turn, config.sample.decode_tile = True, 512
  return config
