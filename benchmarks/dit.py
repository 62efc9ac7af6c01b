"""Speed and memory of our DiT beside diffusers' Krea2Transformer2DModel: one device, equal weights, shapes and dtype.

  python -m benchmarks.dit                                       # on a CPU: tiny and 0.3B
  python -m benchmarks.dit --sizes=2b,krea2 --pixels=512,1024    # on a GPU
  python -m benchmarks.dit --sizes=base --parts=products,gradient --repeats=3 --json=base.json
  python -m benchmarks.dit --sizes=tiny --one_core               # CPU seconds of one thread, where others work too

The weights are random; `unifusion.save` writes the folder that diffusers loads. diffusers runs eagerly and with its
blocks compiled (`compile_repeated_blocks`, torch.compile of every block, as its documentation has it). Parts:
  products  the bare matrix products of one block, XLA's beside torch's
  forward   one velocity: pooling, refiner and DiT, the same work on all sides
  sample    all Euler steps without guidance. Ours conditions once, as our pipeline does; diffusers' model has no such
            seam and pools and refines the text in every step, as its pipeline does
  gradient  forward and backward of the flow-matching loss
  train     the same and AdamW; parameters, gradients and moments f32
Repetitions alternate between the sides, after their outputs were compared. A ratio of times is theirs / ours of
neighbouring repetitions, above 1 where ours is faster; a ratio of memory is ours / theirs, below 1 where ours is
smaller. Memory is the weights (and moments) and the peak beyond them of one call. Needs requirements-test.txt.
"""

import ctypes
import dataclasses
import functools
import math
import os
import pathlib
import statistics
import tempfile
import time

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # one GPU serves both

from absl import app, flags
import einops
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import timing
from configs import t2i
from unifusion_jax import flow, sharding
from unifusion_jax.models import layers, unifusion
from unifusion_jax.models.dit import DiTConfig
from unifusion_jax.models.lap import LAPConfig
from unifusion_jax.planning import chips, model_flops

PARTS = ('products', 'forward', 'sample', 'gradient', 'train')
_SIZES = flags.DEFINE_list('sizes', None, 'tiny, base (0.3B), 2b, krea2 (12.9B); default tiny,base, on a GPU all.')
_PIXELS = flags.DEFINE_list('pixels', None, 'Sides of the images; default 64 (tiny), 256, or on a GPU 512,1024.')
_PARTS = flags.DEFINE_list('parts', list(PARTS), 'Which parts to time.')
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed repetitions of each side, after one that warms up.', lower_bound=1)
_STEPS = flags.DEFINE_integer('steps', 8, 'Sampling steps.', lower_bound=1)
_COMPILE = flags.DEFINE_bool('compile', True, 'Time diffusers compiled too, beside eager.')
_DTYPE = flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16'], 'Of the computation; default float32 on a CPU.')
_ONE_CORE = flags.DEFINE_bool('one_core', False, 'CPU seconds of one thread: for a machine that others use, too.')
_JSON = flags.DEFINE_string('json', None, 'A file for all figures.')


@dataclasses.dataclass
class Size:
  """A model, and what is fed to it: text tokens, image tokens of a batch on a CPU and on a GPU, sides of images."""
  config: unifusion.UniFusionConfig
  text: int
  tokens: tuple[int, int]
  pixels: tuple[tuple[int, ...], tuple[int, ...]] = ((256,), (512, 1024))


SIZES = {
    'tiny': lambda: Size(t2i.tiny().model, 32, (1024, 4096), ((64,), (64,))),
    'base': lambda: Size(unifusion.UniFusionConfig(
        LAPConfig(width=768, taps=4, heads=12, kv_heads=12, mlp=2048),
        DiTConfig(depth=22, heads=8, kv_heads=2, mlp=2816)), 64, (256, 16384)),
    '2b': lambda: Size(unifusion.UniFusionConfig(
        LAPConfig(width=2048, taps=10, heads=16, kv_heads=16, mlp=5504),
        DiTConfig(depth=22, heads=20, kv_heads=5, mlp=6912)), 512, (256, 4096)),
    'krea2': lambda: Size(unifusion.krea2(), 512, (256, 4096)),
}


def main(argv):
  del argv
  if _ONE_CORE.value:
    timing.one_core()
  results = dict(machine=timing.machine(), runs=[])
  print(', '.join(f'{key} {value}' for key, value in results['machine'].items()), flush=True)
  on_gpu = jax.devices()[0].platform == 'gpu'
  for name in _SIZES.value or (list(SIZES) if on_gpu else ['tiny', 'base']):
    size = SIZES[name]()
    with jax.set_mesh(jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1])):
      for row in rows(size, on_gpu):
        results['runs'].append(dict(size=name, **row))
        show(results['runs'][-1])
        timing.write(_JSON.value, results)


def rows(size: Size, on_gpu: bool):
  """One dict of figures for each number of pixels and part; inference first, then training in f32."""
  dtype = _DTYPE.value or ('bfloat16' if on_gpu else 'float32')
  bare = functools.partial(dataclasses.replace, remat=False)  # on either side
  config = dataclasses.replace(size.config, lap=bare(size.config.lap), dit=bare(size.config.dit), dtype=dtype)
  with tempfile.TemporaryDirectory() as folder:
    ours = jax.jit(lambda: layers.cast(random_model(config), dtype))()
    unifusion.save(ours, folder)
    theirs = load_theirs(folder, dtype, on_gpu)
  parameters = sum(x.size for x in jax.tree.leaves(ours))
  pixels = [int(p) for p in _PIXELS.value or size.pixels[on_gpu]]
  inputs = {p: Inputs.random(size, p, on_gpu) for p in pixels}
  for group in (('products', 'forward', 'sample'), ('gradient', 'train')):
    wanted = [part for part in group if part in _PARTS.value]
    if wanted and 'train' in group:
      if on_gpu and (needed := 2 * 16 * parameters) > jax.devices()[0].memory_stats()['bytes_limit']:
        print(f'gradient, train: weights and moments of both sides are {needed / 2**30:.0f} GiB, more than this device',
              flush=True)
        continue
      ours, theirs = layers.cast(ours, jnp.float32), theirs.float()
    for p in pixels:
      for part in wanted:
        comparison = globals()[part](ours, theirs, inputs[p], dtype)
        seconds = timing.interleaved({name: side.call for name, side in comparison.items()}, _REPEATS.value,
                                     time.process_time if _ONE_CORE.value else time.perf_counter)
        flops = forward_flops(ours, inputs[p]) * dict(sample=_STEPS.value, gradient=3, train=3).get(part, 1)
        yield dict(pixels=p, part=part, dtype=dtype, parameters=parameters, batch=len(inputs[p].z),
                   tokens=inputs[p].tokens, seconds=seconds, gflops=None if part == 'products' else flops / 1e9,
                   bytes={name: side.bytes() for name, side in comparison.items() if side.bytes})


def show(row: dict) -> None:
  """Prints a row: seconds, ratios, memory and MFU."""
  where = f'{row["size"]} {row["pixels"]} px, {row["part"]}'
  print(f'{where}: batch {row["batch"]}, {row["tokens"]} tokens each, {row["parameters"] / 1e9:.3g}B, {row["dtype"]}')
  ours, peak = row['seconds']['ours'], peak_flops()
  for name, seconds in row['seconds'].items():
    line = f'  {name:8} {timing.spread([1e3 * s for s in seconds])} ms'
    if peak and row['gflops']:
      line += f'  MFU {row["gflops"] * 1e9 / statistics.median(seconds) / peak:.3f}'
    if name in row['bytes']:
      line += f'  {row["bytes"][name] / 2**30:.3g} GiB'
    if name != 'ours':
      line += f'  speed, ours / this {timing.spread(timing.ratios(seconds, ours))}'
      if name in row['bytes']:
        line += f'  memory {row["bytes"]["ours"] / row["bytes"][name]:.2f}'
    print(line)
  if forward := _forward.get((row['size'], row['pixels'])) if row['part'] == 'gradient' else None:
    print('  forward and backward over forward: ' + ', '.join(
        f'{name} {statistics.median(seconds) / statistics.median(forward[name]):.2f}'
        for name, seconds in row['seconds'].items()))
  if row['part'] == 'forward':
    _forward[row['size'], row['pixels']] = row['seconds']


_forward = {}  # seconds of the forward passes by size and pixels


def peak_flops() -> float | None:
  chip = chips.KINDS.get(jax.devices()[0].device_kind)
  return chip and chip.flops / chip.cores


def random_model(config: unifusion.UniFusionConfig) -> unifusion.UniFusion:
  """A model without zeros: a new one has velocity 0 whatever it computes."""
  values, tree = jax.tree.flatten(unifusion.UniFusion(config, rngs=nnx.Rngs(0)))
  keys = jax.random.split(jax.random.key(1), len(values))
  return tree.unflatten(x + 0.02 * jax.random.normal(key, x.shape, x.dtype, out_sharding=jax.typeof(x).sharding)
                        for x, key in zip(values, keys))


def load_theirs(folder: str, dtype: str, on_gpu: bool):
  import diffusers
  import torch
  diffusers.utils.logging.disable_progress_bar()
  model = diffusers.Krea2Transformer2DModel.from_pretrained(
      folder, torch_dtype=getattr(torch, dtype), device_map='cuda' if on_gpu else None)
  if _COMPILE.value:
    torch._dynamo.config.recompile_limit = 64  # a shape and a dtype after the other
    model.compile_repeated_blocks(dynamic=False)
  return model


@dataclasses.dataclass
class Inputs:
  """A batch for both sides, in numpy; the last quarter of the text is padding."""
  hidden: np.ndarray  # [b s l e] tapped states
  mask: np.ndarray    # [b s]
  z: np.ndarray       # [b y x c] latents
  noise: np.ndarray
  t: np.ndarray       # [b]
  patch: int

  @classmethod
  def random(cls, size: Size, pixels: int, on_gpu: bool) -> 'Inputs':
    dit, lap, side = size.config.dit, size.config.lap, pixels // 8  # latents of an autoencoder that divides by 8
    batch = max(1, size.tokens[on_gpu] // (side // dit.patch) ** 2)
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    mask = np.broadcast_to(np.arange(size.text) < size.text - size.text // 4, (batch, size.text))
    return cls(normal(batch, size.text, lap.taps, lap.width), mask, normal(batch, side, side, dit.channels),
               normal(batch, side, side, dit.channels), rng.random(batch, np.float32), dit.patch)

  @property
  def tokens(self) -> int:
    return self.mask.shape[1] + math.prod(self.z.shape[1:3]) // self.patch ** 2

  def ours(self, *names: str):
    return [jax.device_put(getattr(self, name), jax.P(sharding.BATCH)) for name in names]

  def theirs(self, model):
    """(model(z, t) -> velocity, z, noise), packed as diffusers' pipeline packs them."""
    import torch
    put = lambda x: torch.from_numpy(np.array(x)).to(model.device)
    rows, columns = (n // self.patch for n in self.z.shape[1:3])
    positions = torch.zeros(self.tokens, 3, device=model.device)
    positions[-rows * columns:, 1] = torch.arange(rows, device=model.device).repeat_interleave(columns)
    positions[-rows * columns:, 2] = torch.arange(columns, device=model.device).repeat(rows)
    hidden, mask, z, noise = put(self.hidden), put(self.mask), put(self.pack(self.z)), put(self.pack(self.noise))

    def velocity(z, t):
      dtype = model.dtype
      return model(z.to(dtype), hidden.to(dtype), t, positions, mask, return_dict=False)[0].float()
    return velocity, z, noise, put(self.t)

  def pack(self, z: np.ndarray) -> np.ndarray:
    """[b y x c] -> [b s p]."""
    return einops.rearrange(np.asarray(z), 'b (y i) (x j) c -> b (y x) (c i j)', i=self.patch, j=self.patch)


@dataclasses.dataclass
class Side:
  """What is timed, and a function that answers its memory in bytes (None: not measured)."""
  call: object
  bytes: object = None


def sides(program, arguments: tuple, call, held: int, theirs_held: int, feed=None) -> dict[str, Side]:
  """Ours, eager and compiled; `feed` maps our outputs to the next call's arguments, whose memory it takes over."""
  import torch
  ours = jax.jit(program, donate_argnums=0 if feed else ()).lower(*arguments).compile()
  state = list(arguments)

  def run_ours():
    out = jax.block_until_ready(ours(*state))
    if feed:
      state[:] = feed(out, state)
    return out

  def run_theirs(stance):
    with torch.compiler.set_stance(stance):
      out = call()
    if torch.cuda.is_initialized():
      torch.cuda.synchronize()
    return out

  def our_bytes():
    if jax.devices()[0].platform == 'cpu':
      return held + peak_rss(run_ours)
    sizes = ours.memory_analysis()
    return (sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
            - sizes.alias_size_in_bytes)

  def their_bytes(run):
    if not torch.cuda.is_initialized():
      return theirs_held + peak_rss(run)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return theirs_held + torch.cuda.max_memory_allocated() - before

  found = dict(ours=Side(run_ours, our_bytes))
  for name, stance in (('eager', 'force_eager'), ('compiled', 'default')):
    if name == 'eager' or _COMPILE.value:
      run = functools.partial(run_theirs, stance)
      found[name] = Side(run, functools.partial(their_bytes, run))
  return found


def peak_rss(call) -> int:
  """Bytes by which one call raises this process's resident memory at its peak (Linux)."""
  status = lambda key: next(1024 * int(line.split()[1]) for line in pathlib.Path('/proc/self/status').open()
                            if line.startswith(key))
  ctypes.CDLL(None).malloc_trim(0)
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # the peak starts from here
  before = status('VmRSS')
  out = call()
  del out
  return max(0, status('VmHWM') - before)


def held_bytes(ours, theirs) -> tuple[int, int]:
  return sum(x.nbytes for x in jax.tree.leaves(ours)), sum(x.nbytes for x in theirs.state_dict().values())


def agree(what: str, ours, theirs, dtype: str) -> None:
  """ValueError where two outputs differ by more than rounding."""
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
  if not error < (1e-3 if dtype == 'float32' else 0.05):
    raise ValueError(f'{what} of the two models differs by {error:.2g} relative: nothing to compare')


def products(ours, theirs, inputs: Inputs, dtype: str) -> dict[str, Side]:
  """x times each matrix of a block, f32 out of XLA and torch alike: [tokens in] x [in out]."""
  import torch
  c = ours.dit.config
  rows = len(inputs.z) * inputs.tokens
  shapes = [(c.width, c.heads * c.head_dim)] * 3 + [(c.width, c.kv_heads * c.head_dim)] * 2
  shapes += [(c.width, c.mlp)] * 2 + [(c.mlp, c.width)]
  rng = np.random.default_rng(0)
  pairs = [(rng.standard_normal((rows, a), np.float32), rng.standard_normal((a, b), np.float32)) for a, b in shapes]
  our_pairs = [tuple(jnp.asarray(x, dtype) for x in pair) for pair in pairs]
  their_pairs = [tuple(torch.from_numpy(x).to(theirs.device, getattr(torch, dtype)) for x in pair) for pair in pairs]
  multiply = jax.jit(lambda pairs: [x @ w for x, w in pairs])

  def run_theirs():
    with torch.inference_mode():
      for x, w in their_pairs:
        x @ w
    if torch.cuda.is_initialized():
      torch.cuda.synchronize()
  return dict(ours=Side(lambda: jax.block_until_ready(multiply(our_pairs))), eager=Side(run_theirs))


def velocity(model: unifusion.UniFusion, hidden, mask, z, t) -> jax.Array:
  return model.velocity(z, t, model.condition(hidden, mask), mask)


def forward(ours, theirs, inputs: Inputs, dtype: str) -> dict[str, Side]:
  import torch
  their_velocity, z, _, t = inputs.theirs(theirs)

  def call():
    with torch.inference_mode():
      return their_velocity(z, t)
  found = sides(velocity, (ours, *inputs.ours('hidden', 'mask', 'z', 't')), call, *held_bytes(ours, theirs))
  answer = found['ours'].call()
  for name in found.keys() - {'ours'}:
    agree(f'the velocity ({name})', inputs.pack(answer), found[name].call().cpu(), dtype)
  return found


def sample(ours, theirs, inputs: Inputs, dtype: str) -> dict[str, Side]:
  import torch
  velocity, _, noise, _ = inputs.theirs(theirs)
  times = flow.timesteps(_STEPS.value, 3.0)

  def program(model, hidden, mask, noise):
    cond = model.condition(hidden, mask)
    return flow.sample(lambda z, t: model.velocity(z, t, cond, mask), noise, times)

  def call():
    with torch.inference_mode():
      z = noise
      for t, t_next in zip(times.tolist(), times.tolist()[1:]):
        z = z + (t_next - t) * velocity(z, torch.full((len(z),), t, device=z.device))
      return z
  found = sides(program, (ours, *inputs.ours('hidden', 'mask', 'noise')), call, *held_bytes(ours, theirs))
  agree('the sample', inputs.pack(found['ours'].call()), found['eager'].call().cpu(), dtype)
  return found


def loss(model, hidden, mask, z, noise, t):
  velocity = model.velocity(flow.interpolate(z, noise, t), t, model.condition(hidden, mask), mask)
  return jnp.mean(flow.loss(velocity, z, noise))


def their_loss(theirs, inputs: Inputs, dtype: str):
  import torch
  velocity, z, noise, t = inputs.theirs(theirs)

  def run():
    with torch.autocast(theirs.device.type, torch.bfloat16, enabled=dtype == 'bfloat16'):
      at = t[:, None, None]
      return torch.mean((velocity((1 - at) * z + at * noise, t) - (noise - z)) ** 2)
  return run


def gradient(ours, theirs, inputs: Inputs, dtype: str) -> dict[str, Side]:
  import torch
  value = their_loss(theirs, inputs, dtype)

  def call():
    theirs.zero_grad(set_to_none=True)
    out = value()
    out.backward()
    return out.detach()
  found = sides(jax.value_and_grad(loss), (ours, *inputs.ours('hidden', 'mask', 'z', 'noise', 't')), call,
                *held_bytes(ours, theirs))
  answer, gradients = found['ours'].call()
  norm = optax.tree.norm(gradients)
  for name in found.keys() - {'ours'}:
    agree(f'the loss ({name})', answer, found[name].call().cpu(), dtype)
    agree(f'the gradient norm ({name})', norm, torch.nn.utils.get_total_norm(
        [p.grad for p in theirs.parameters()]).cpu(), dtype)
  theirs.zero_grad(set_to_none=True)
  return found


def train(ours, theirs, inputs: Inputs, dtype: str) -> dict[str, Side]:
  """Updates of copies: the weights of the others parts stay."""
  import torch
  settings = dict(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01)
  tx = optax.adamw(settings['lr'], *settings['betas'], weight_decay=settings['weight_decay'])
  value = their_loss(theirs, inputs, dtype)
  optimizer = torch.optim.AdamW(theirs.parameters(), **settings, fused=True)

  def program(state, *batch):
    model, opt = state
    answer, gradients = jax.value_and_grad(loss)(model, *batch)
    updates, opt = tx.update(gradients, opt, model)
    return answer, (optax.apply_updates(model, updates), opt)

  def call():
    out = value()
    out.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return out.detach()
  model = jax.tree.map(jnp.copy, ours)
  batch = inputs.ours('hidden', 'mask', 'z', 'noise', 't')
  held = held_bytes(ours, theirs)
  found = sides(program, ((model, jax.jit(tx.init)(model)), *batch), call, *(3 * n for n in held),
                feed=lambda out, state: [out[1], *state[1:]])
  agree('the loss', found['ours'].call()[0], found['eager'].call().cpu(), dtype)
  return found


def forward_flops(model: unifusion.UniFusion, inputs: Inputs) -> float:
  """FLOPs of the products of one forward pass, counted on a mesh without devices, where no kernel hides attention's."""
  return model_flops.count_call(velocity, model, *inputs.ours('hidden', 'mask', 'z', 't')).total


if __name__ == '__main__':
  app.run(main)
