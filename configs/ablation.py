"""Ways to condition the DiT on the VLM, and variants of LAP: one training each, all else equal (docs/ablations.md).

  python -m unifusion_jax.main --config=configs/ablation.py:lap
  python -m unifusion_jax.main --config=configs/ablation.py:kv
  python -m unifusion_jax.main --config=configs/ablation.py:kv --mode=eval
  python -m unifusion_jax.main --config=configs/ablation.py:kv --config.seed=1 --workdir=runs/ablation_kv_1

All train as configs/t2i.py does, from random weights: DiT, data, steps, optimizer and REPA are those of its :tiny, and
between VLM and DiT there are as many parameters as LAP and refiner have there, within 1%.

The ways of the paper's comparison:
  :lap            layerwise attention pooling, configs/t2i.py itself
  :last           the VLM's last hidden state
  :kv             keys and values for each block of the DiT
  :hidden         a hidden state added before each block of the DiT
  :text           token embeddings alone, read by an encoder that trains with the DiT: the text-only baseline
Variants:
  :lap_all        every layer of the VLM and not every second
  :kv_all         key-value fusion of every layer: each block of the DiT reads the layer of its own depth
  :hidden_all     hidden states of every layer, likewise
  :lap_mean       a learnt mean of the taps, without blocks over them
  :lap_no_refiner without a refiner
  :lap_norm       each tap normalised
  :lap_two        image tokens pooled by blocks of their own

Hardware: that of configs/t2i.py. The five ways have been trained for 250 steps of 128 on one GPU (docs/paper.md), the
variants not at all.
"""

import dataclasses

from configs import t2i
from unifusion_jax import config
from unifusion_jax.errors import UserError
from unifusion_jax.models import fusion

# (fusion, taps, changes of model.lap) of each scale
SCALES = {
    'lap': ('lap', (2, 4, 6), {}),
    'last': ('last', (6,), {}),
    'kv': ('kv', (2, 4, 6), {}),
    'hidden': ('hidden', (2, 4, 6), {}),
    'text': ('text', (0,), {}),
    'lap_all': ('lap', (1, 2, 3, 4, 5, 6), {}),
    'kv_all': ('kv', (1, 2, 3, 4, 5, 6), {}),
    'hidden_all': ('hidden', (1, 2, 3, 4, 5, 6), {}),
    'lap_mean': ('lap', (2, 4, 6), dict(depth=0)),
    'lap_no_refiner': ('lap', (2, 4, 6), dict(refiner_depth=0)),
    'lap_norm': ('lap', (2, 4, 6), dict(tap_norm=True)),
    'lap_two': ('lap', (2, 4, 6), dict(separate=True))}


def get_config(scale: str = 'lap') -> config.Config:
  if scale not in SCALES:
    raise UserError(f'configs/ablation.py has the scales {", ".join(SCALES)}, not {scale!r}')
  made, (way, taps, changes) = t2i.tiny(), SCALES[scale]
  pooling = dataclasses.replace(made.model.lap, taps=len(taps), **changes)
  made.model = fusion.matched(dataclasses.replace(made.model, fusion=way, lap=pooling), made.model)
  made.taps = taps
  made.sample.weights = None  # of its own run alone: the shipped model is another one
  return made
