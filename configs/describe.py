"""Text that a VLM writes about one image, about several, or without any.

  python -m unifusion_jax.main --config=configs/describe.py --config.image=x.png
  python -m unifusion_jax.main --config=configs/describe.py --config.image=x.png --config.prompt="what shape is red?"
  python -m unifusion_jax.main --config=configs/describe.py --config.vlm=OpenGVLab/InternVL3-1B-hf \
      --config.image=a.jpg,b.jpg --config.prompt="What changed?" --config.quantized=int8
  python -m unifusion_jax.main --config=configs/describe.py --config.vlm=FOLDER --config.prompt="Write a haiku." \
      --config.temperature=0.7 --config.top_p=0.9 --config.seed=1

Hardware: any; the default, the embedded VLM of 2.8M parameters, needs a CPU alone. It describes scenes right in 1.00 of
300 test images (docs/embedded.md) and knows nothing else. docs/encoders.md lists the models.
"""

from unifusion_jax.commands import describe


def get_config() -> describe.DescribeConfig:
  return describe.DescribeConfig()
