"""Eight fake CPU devices and a persistent compilation cache, before anything uses jax."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
os.environ['HF_HUB_OFFLINE'] = '1'

import pathlib

import jax
import pytest

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(__file__).parent.parent / '.cache' / 'jax'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
jax.config.update('jax_threefry_partitionable', True)

from unifusion_jax import sharding


@pytest.fixture(autouse=True)
def mesh():
  """2 x 2 x 2 over (data, fsdp, tp): every test runs sharded."""
  made = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tp=2))
  with jax.set_mesh(made):
    yield made
