"""Speed of our InternVL against that of transformers: one device, equal weights, shapes and dtype, in one run.

  python -m benchmarks.vlm                                              # the embedded VLM
  python -m benchmarks.vlm --vlm=random:small --dtype=float32           # 0.1B of random weights, for a CPU
  python -m benchmarks.vlm --vlm=random:InternVL3-1B --dtype=bfloat16 --compile   # for a GPU
  python -m benchmarks.vlm --vlm=FOLDER --batch=8 --text=512 --new=128

encode: all hidden states of the decoder, for prompts with images. decode: greedy tokens with a static cache, without
the prefill. load: each loader in a process of its own, with files in the page cache, until every weight is read.
Repetitions alternate between the two sides. Rates are median [smallest, largest]; ratios are ours / theirs of
neighbouring repetitions. Before the timing both sides' states are compared. Needs requirements-test.txt.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # one GPU serves both

from absl import app, flags
import numpy as np

from benchmarks import timing
from benchmarks.timing import spread

_VLM = flags.DEFINE_string('vlm', None, 'An InternVL folder in the -hf layout, or random:small, or random:<a public '
                           'name>; default the embedded VLM.')
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of weights and computation, on both sides.')
_BATCH = flags.DEFINE_integer('batch', 4, 'Prompts in a batch.', lower_bound=1)
_TEXT = flags.DEFINE_integer('text', 128, 'Text tokens of a prompt.', lower_bound=2)
_TILES = flags.DEFINE_integer('tiles', 1, 'Tiles of a prompt.', lower_bound=1)
_NEW = flags.DEFINE_integer('new', 64, 'Tokens to write.', lower_bound=2)
_REPEATS = flags.DEFINE_integer('repeats', 9, 'Timed repetitions of each side, after one that warms up.', lower_bound=1)
_COMPILE = flags.DEFINE_bool('compile', False, 'Use torch.compile for transformers.')
_PARTS = flags.DEFINE_list('parts', ['load', 'encode', 'decode'], 'Which parts to time.')
_JSON = flags.DEFINE_string('json', None, 'A file for all figures.')
_ONE_CORE = flags.DEFINE_bool('one_core', False, 'CPU seconds of one thread: for a machine that others use, too.')
_LOAD = flags.DEFINE_enum('load', None, ['ours', 'theirs'], 'Load on one side only, and print rate and memory.')


def main(argv):
  del argv
  if _LOAD.value:
    print(json.dumps(load_alone(_VLM.value, _LOAD.value)))
    return
  if _ONE_CORE.value:
    timing.one_core()
  with tempfile.TemporaryDirectory() as temporary:
    folder = prepare(_VLM.value, pathlib.Path(temporary))
    results = {}
    if 'load' in _PARTS.value:
      results['load'] = load(folder)
    if {'encode', 'decode'} & set(_PARTS.value):
      compare(folder, results)
    timing.write(_JSON.value, dict(machine=timing.machine(), vlm=_VLM.value, dtype=_DTYPE.value, **results))


def load(folder: pathlib.Path) -> dict:
  """Loads in turn, each in a process of its own; prints and returns the figures of `load_alone`."""
  loading = {who: [] for who in ('ours', 'theirs')}
  for _ in range(min(_REPEATS.value, 5) + 1):  # the first brings the files into the page cache
    for who, runs in loading.items():
      runs.append(json.loads(subprocess.run(
          [sys.executable, '-m', 'benchmarks.vlm', f'--vlm={folder}', f'--load={who}', f'--dtype={_DTYPE.value}'],
          check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
  for who, runs in loading.items():
    rate, extra = ([run[key] for run in runs[1:]] for key in ('gb_per_second', 'extra_gb'))
    print(f'load    {who:6} {spread(rate)} GB/s   host memory beyond the weights {spread(extra)} GB')
  return {who: runs[1:] for who, runs in loading.items()}


def prepare(name: str | None, temporary: pathlib.Path) -> pathlib.Path:
  """The checkpoint folder; random weights are initialised and written into `temporary`."""
  from unifusion_jax import config
  from unifusion_jax.models import decoder, internvl
  if not (name or '').startswith('random:'):
    return pathlib.Path(name or config.ASSETS / 'vlm')
  small = internvl.InternVLConfig(
      vision=internvl.VisionConfig(width=256, depth=6, heads=4, hidden=1024, tile=224),
      text=decoder.DecoderConfig(vocab=8192, width=768, depth=12, heads=12, kv_heads=4, head_dim=64, hidden=2048),
      image_token_id=5)
  architecture = dict(internvl.PRESETS, small=small)[name.removeprefix('random:')]
  from flax import nnx
  import jax
  with jax.set_mesh(one_device()):
    internvl.save(jax.jit(lambda: internvl.InternVL(architecture, _DTYPE.value, rngs=nnx.Rngs(0)))(), temporary)
  return temporary


def one_device():
  import jax

  from unifusion_jax import sharding
  return jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1])


def ours(folder):
  """Our model, on the first device; the mesh must be in context."""
  import jax

  from unifusion_jax.weights import encoders
  return jax.block_until_ready(encoders.load(folder, _DTYPE.value))


def theirs(folder):
  """The model of transformers, on the GPU if jax uses one."""
  import jax
  import torch
  import transformers
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  device = 'cuda' if jax.devices()[0].platform == 'gpu' else 'cpu'
  model = transformers.AutoModelForImageTextToText.from_pretrained(
      folder, dtype=getattr(torch, _DTYPE.value), device_map=device if device == 'cuda' else None)
  return model.eval()


def load_alone(folder: str, who: str) -> dict:
  """GB/s of one load, and its peak host memory beyond the memory before it and the weights held on the host."""
  import jax
  import torch
  import transformers

  from unifusion_jax.weights import encoders
  # Imported for both sides, so that the memory of their code counts for neither
  assert encoders and torch and transformers.InternVLForConditionalGeneration
  size = sum(file.stat().st_size for file in pathlib.Path(folder).glob('*.safetensors'))
  on_host = jax.devices()[0].platform == 'cpu'
  with jax.set_mesh(one_device()):
    before = int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    start = time.perf_counter()
    model = ours(folder) if who == 'ours' else theirs(folder)
    weights = jax.block_until_ready(jax.tree.leaves(model)) if who == 'ours' else list(model.state_dict().values())
    if who == 'theirs' and weights[0].device.type == 'cpu':
      for x in weights:  # reads the mapped file
        x.max()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    held = sum(x.nbytes for x in weights)
  return dict(gb_per_second=size / seconds / 1e9, extra_gb=(peak - before - held * on_host) / 1e9)


def compare(folder: pathlib.Path, results: dict) -> None:
  """Checks that both models compute the same states, then times both; rates go into `results`."""
  import jax
  import jax.numpy as jnp
  import torch

  from unifusion_jax.models import internvl
  from unifusion_jax.models.text_generation import generate
  with jax.set_mesh(one_device()):
    vlm, model = ours(folder), theirs(folder)
    config = vlm.config
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, config.text.vocab, (_BATCH.value, _TEXT.value + _TILES.value * config.tile_tokens))
    tokens = np.where(tokens == config.image_token_id, 10, tokens).astype(np.int32)
    tokens[:, 1:1 + _TILES.value * config.tile_tokens] = config.image_token_id
    tiles = rng.standard_normal((_BATCH.value, _TILES.value, *[config.vision.tile] * 2, 3)).astype(np.float32)
    inputs = jax.device_put((tokens, np.ones(tokens.shape, bool), tiles))
    taps = tuple(range(config.text.depth + 1))
    encode = jax.jit(internvl.InternVL.hidden, static_argnums=3)
    pixels = torch.from_numpy(tiles.reshape(-1, *tiles.shape[2:])).permute(0, 3, 1, 2).contiguous()
    torch_inputs = dict(input_ids=torch.from_numpy(tokens).long().to(model.device),
                        pixel_values=pixels.to(model.device, model.dtype),
                        attention_mask=torch.ones(tokens.shape, dtype=torch.long, device=model.device))
    forward = torch.compile(model.model) if _COMPILE.value else model.model
    settings = dict(do_sample=False, eos_token_id=None, pad_token_id=0, cache_implementation='static',
                    disable_compile=not _COMPILE.value)

    def synchronised(value):
      if model.device.type == 'cuda':
        torch.cuda.synchronize()
      return value

    def our_states():
      return jax.block_until_ready(encode(vlm, *inputs[:2], taps, inputs[2]))

    def their_states():
      with torch.inference_mode():
        return synchronised(forward(**torch_inputs, output_hidden_states=True, use_cache=False).hidden_states)

    def our_tokens(count):
      return jax.block_until_ready(generate(vlm, *inputs, max_new=count, stop_ids=()).ids)

    def their_tokens(count):
      with torch.inference_mode():
        return synchronised(model.generate(**torch_inputs, max_new_tokens=count, **settings))

    # The last state of transformers is after the final norm
    our_tap = np.asarray(our_states()[:, :, -2].astype(jnp.float32))
    their_tap = their_states()[-2].float().cpu().numpy()
    error = np.abs(our_tap - their_tap).max() / np.abs(their_tap).max()
    if not error < (1e-3 if _DTYPE.value == 'float32' else 0.1):
      raise ValueError(f'the states of the two models differ by {error:.2g} relative: nothing to compare')
    where = timing.machine()
    print(f'{where["device"]} ({where["processor"]}, load {where["load"]}), {_DTYPE.value}, batch {_BATCH.value}, '
          f'{tokens.shape[1]} tokens each; last tap differs by {error:.1e} relative')
    if 'encode' in _PARTS.value:
      results['encode'] = report('encode', _BATCH.value * tokens.shape[1], [seconds(our_states)],
                                 [seconds(their_states)])
    if 'decode' in _PARTS.value:
      results['decode'] = report(
          'decode', _BATCH.value * (_NEW.value - 1), [seconds(our_tokens, _NEW.value), seconds(our_tokens, 1)],
          [seconds(their_tokens, _NEW.value), seconds(their_tokens, 1)])


def seconds(call, *arguments):
  """A function that returns the seconds of one call."""
  clock = time.process_time if _ONE_CORE.value else time.perf_counter

  def timed():
    start = clock()
    call(*arguments)
    return clock() - start
  return timed


def report(name: str, tokens: int, ours_timed, theirs_timed) -> dict[str, list[float]]:
  """Times the two sides in turn, prints tokens/s of each and their ratio, and returns the rates.

  A side's second timer, if any, times the prefill, which is subtracted.
  """
  rates = {'ours': [], 'theirs': []}
  for repetition in range(_REPEATS.value + 1):
    for who, timers in (('ours', ours_timed), ('theirs', theirs_timed)):
      whole, *rest = (timer() for timer in timers)
      if repetition:
        rates[who].append(tokens / max(whole - sum(rest), 1e-9))
  for who, values in rates.items():
    print(f'{name}  {who:6} {spread(values)} tokens/s')
  print(f'{name}  ratio  {spread(timing.ratios(rates["ours"], rates["theirs"]))}')
  return rates


if __name__ == '__main__':
  app.run(main)
