"""A look inside any pipeline: what LAP attends to, images without some taps, how alike the layers of the VLM are.

  python -m unifusion_jax.main --config=configs/inspect.py
  python -m unifusion_jax.main --config=configs/inspect.py --config.sample.prompt="make the circle blue" \
      --config.sample.references=my.png --config.inspect.tokens=circle,blue --config.inspect.scenes=edit
  python -m unifusion_jax.main --config=configs/inspect.py:unifusion_jax/assets/tiny/t2i
  python -m unifusion_jax.main --config=configs/inspect.py:krea2_turbo --config.inspect.tokens=woman,drinking
  python -m unifusion_jax.main --config=configs/inspect.py:krea2_turbo_int8 --config.inspect.replace=
  python -m unifusion_jax.main --config=configs/inspect.py:vlm --config.vlm=OpenGVLab/InternVL2_5-8B

The scales are those of configs/sample.py, with the same weights and the same need of memory, and :vlm, the similarity
of layers of a VLM alone. A run of a recipe that trains is inspected by its own:
--config=configs/edit.py --mode=inspect --workdir=runs/edit.
:tiny, the embedded editing model, takes a minute or two on two CPU cores.
:krea2_raw and :krea2_turbo want a GPU of 80 GB, :krea2_raw_int8 and :krea2_turbo_int8 a chip of 16 GB. They sample 62
images of 1024 px of a prompt, with --config.inspect.replace= none. Krea 2 itself has not been inspected yet, small
models of its layout have.
Needs matplotlib: pip install "unifusion_jax[inspect]". docs/inside.md.
"""

from configs import sample
from unifusion_jax import description
from unifusion_jax.commands.inspect import InspectedPipeline
from unifusion_jax.evaluation.inside import InspectConfig
from unifusion_jax.request import SampleConfig

PROMPT = 'a big red circle left of a small blue square'


def get_config(scale: str = 'tiny') -> InspectedPipeline:
  if scale == 'vlm':
    return InspectedPipeline(weights='', vlm=str(description.ASSETS / 'vlm'), sample=SampleConfig(prompt=PROMPT))
  config = InspectedPipeline(**vars(sample.get_config(scale)))
  config.sample.num_images = 4
  if scale.startswith('krea2'):
    config.sample.prompt = 'She is a woman drinking tea in a greenhouse'
    config.sample.num_images = 2
    # As the paper: first and last taps, which a picture hardly misses, those and one more, and all between them
    config.inspect = InspectConfig(drop=('2+32+35', '2+29+32+35', '5-29'), replace=('zeros', 'weight'))
  else:
    config.sample.prompt = PROMPT
  return config
