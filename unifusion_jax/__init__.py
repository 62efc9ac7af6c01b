"""UniFusion (arXiv 2510.12789): a diffusion transformer conditioned on a frozen vision-language model."""

__version__ = '0.1.0'


def __getattr__(name: str):
  if name == 'UniFusionPipeline':  # imported at first use: it is slow
    from unifusion_jax.pipeline import UniFusionPipeline
    return UniFusionPipeline
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
