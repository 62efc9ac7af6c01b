"""What int8 costs in accuracy: error of an encoder's tapped states, or of a transformer's velocity and its images.

  python -m benchmarks.int8                                         # random models without and with outliers
  python -m benchmarks.int8 --model=HuggingFaceTB/SmolLM2-135M      # any encoder of docs/encoders.md, on README.md
  python -m benchmarks.int8 --pipeline=unifusion_jax/assets/tiny/t2i --baseline=float32
  python -m benchmarks.int8 --pipeline=krea/Krea-2-Turbo            # its transformer three times after another

Of an encoder each line is a model and a kind of rounding: Frobenius norm of the difference over that of the states, per
tap, without the first token, whose states are far larger than the others in trained models. Both are in f32. Of a
pipeline a line has the same norm for velocities of noised images at three times, and the mean difference of finished
images from the same noise, in levels of 255. Encoder and autoencoder stay in the dtype of the baseline.
"""

import pathlib

from absl import app, flags
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax import sharding
from unifusion_jax.models import causal_lm, decoder
from unifusion_jax.pipeline import UniFusionPipeline
from unifusion_jax.request import Request
from unifusion_jax.weights import encoders, hub, quantize, tokenizers

_MODEL = flags.DEFINE_string('model', None, 'A folder or hub id, in place of the random models.')
_PIPELINE = flags.DEFINE_string('pipeline', None, 'A folder or hub id of a whole pipeline, whose transformer is meant.')
_BASELINE = flags.DEFINE_enum('baseline', 'bfloat16', ('bfloat16', 'float32'), 'Dtype of what a pipeline is beside.')
PROMPTS = ('a big red circle on a white background', 'a small green star to the left of a blue square',
           'a yellow triangle above a purple ring', 'three small black circles')
TIMES = (0.2, 0.5, 0.8)
VOCAB = 512
MARKS = (0, 1, 2)  # ids of tokens with massive activations; the first of them opens every prompt


def main(argv):
  del argv
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig())):
    if _MODEL.value:
      folder = str(hub.resolve(_MODEL.value))
      ids = tokenizers.load(folder).encode(pathlib.Path('README.md').read_text())
      report(_MODEL.value, lambda: encoders.load(folder, jnp.float32), np.array(ids[:8 * 128]).reshape(8, 128))
      return
    if _PIPELINE.value:
      report_pipeline(_PIPELINE.value)
      return
    report('random', random_model, random_tokens())
    report('random with outliers', lambda: with_outliers(random_model()), random_tokens())


def report(name: str, make, tokens: np.ndarray) -> None:
  exact = states(make(), tokens)
  for kind in ('int8', 'w8a8'):
    error = relative(states(quantize.quantize(make(), kind == 'w8a8'), tokens), exact)
    print(f'{name:22} {kind}  {" ".join(f"{100 * e:.2f}" for e in error)} %', flush=True)


def report_pipeline(name: str) -> None:
  dtype = _BASELINE.value
  load = lambda dtype, kind='': UniFusionPipeline.from_pretrained(name, dtype=dtype, transformer_quantized=kind)
  exact = generated(load(dtype))
  for label, kind in [('bfloat16', '')] * (dtype == 'float32') + [('int8', 'int8'), ('w8a8', 'w8a8')]:
    found = generated(load(dtype if kind else 'bfloat16', kind), exact[0])
    errors = [np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) for ours, theirs in zip(found[1], exact[1])]
    levels = np.abs(found[2].astype(int) - exact[2]).mean((1, 2, 3))
    print(f'{label:9} velocity at {TIMES}: {" ".join(f"{100 * error:.2f}" for error in errors)} %; images: '
          f'{" ".join(f"{level:.2f}" for level in levels)} of 255', flush=True)


def generated(pipe: UniFusionPipeline, latents: np.ndarray | None = None):
  """(latents of finished images, velocities of these noised to TIMES, images uint8); latents: the baseline's."""
  requests = [Request(prompt, seed=seed, rewrite=prompt) for seed, prompt in enumerate(PROMPTS)]
  conditioning, *_ = pipe.encode(requests)
  noise = pipe.noise(range(len(PROMPTS)), pipe.size, pipe.size)
  made = pipe.denoise(conditioning, noise, pipe.times(pipe.size, pipe.size), eta=0.0)
  images, made = pipe.decode(made)[:len(PROMPTS)], np.asarray(made)
  velocity = jax.jit(lambda model, z, t, conditioning: model.velocity(z, t, *conditioning))
  velocities = []
  with jax.set_mesh(pipe.mesh):
    for t in TIMES:
      z = sharding.shard((1 - t) * (made if latents is None else latents) + t * np.asarray(noise))
      times = sharding.shard(np.full(len(z), t, np.float32))
      velocities.append(np.asarray(velocity(pipe.model, z, times, conditioning), np.float32))
  return made, velocities, images


def states(model, tokens: np.ndarray) -> np.ndarray:
  """Every second tapped state of all tokens but the first: [b s l e]."""
  taps = tuple(range(0, model.config.text.depth + 1, 2))
  hidden = jax.jit(type(model).hidden, static_argnums=3)(model, tokens, np.ones(tokens.shape, bool), taps)
  return np.asarray(hidden, np.float32)[:, 1:]


def relative(ours: np.ndarray, exact: np.ndarray) -> np.ndarray:
  """Relative error of each tap, [l]."""
  return np.sqrt(np.sum((ours - exact) ** 2, (0, 1, 3)) / np.sum(exact ** 2, (0, 1, 3)))


def random_tokens(length: int = 48) -> np.ndarray:
  tokens = np.random.default_rng(0).integers(len(MARKS), VOCAB, (8, length)).astype(np.int32)
  tokens[:, [0, length // 3, length // 2]] = MARKS
  return tokens


def random_model(depth: int = 6) -> causal_lm.TextModel:
  """With the proportions of trained ones: what a block adds is smaller than what it adds it to."""
  config = causal_lm.TextConfig(decoder.DecoderConfig(
      model_type='llama', vocab=VOCAB, width=128, depth=depth, heads=4, kv_heads=2, head_dim=32, hidden=384, tied=True))
  model = jax.jit(lambda: causal_lm.TextModel(config, rngs=nnx.Rngs(0)))()
  d = model.decoder
  d.embedding[...] = d.embedding[...] * 8.0
  for matrix in (d.blocks.wo, d.blocks.mlp.down):
    matrix[...] = matrix[...] * 0.3
  return model


def with_outliers(model: causal_lm.TextModel, channels: int = 3, factor: float = 30.0) -> causal_lm.TextModel:
  """The model with the outliers of trained ones; but for the massive activations it computes nearly the same.

  A few channels of the residual stream are `factor` times the others; half of that (in orders of magnitude) passes the
  norms, and the matrices after them make up for it (arXiv 2208.07339). As many hidden channels of every MLP are
  `factor` times larger, and rows of the down projections smaller. In the second block the tokens MARKS excite one
  hidden channel each a thousandfold (arXiv 2402.17762).
  """
  rng = np.random.default_rng(1)
  d, width, hidden = model.decoder, model.config.text.width, model.config.text.hidden
  blocks = d.blocks
  large, wide = (rng.choice(n, channels, replace=False) for n in (width, hidden))
  grown = ((width - channels + channels * factor ** 2) / width) ** 0.5  # of the norms' divisor
  by_channel = np.ones(width, np.float32)
  by_channel[large] = factor
  by_hidden = np.ones(hidden, np.float32)
  by_hidden[wide] = factor
  d.embedding[...] = d.embedding[...] * by_channel
  for norm in (blocks.norm1, blocks.norm2, d.norm):
    norm[...] = norm[...] * (grown / by_channel ** 0.5)
  for matrix in (blocks.wq, blocks.wk, blocks.wv):
    matrix[...] = matrix[...] / (by_channel ** 0.5)[:, None, None]
  blocks.wo[...] = blocks.wo[...] * by_channel
  mlp = blocks.mlp
  mlp.gate[...] = mlp.gate[...] / (by_channel ** 0.5)[:, None]
  mlp.up[...] = mlp.up[...] / (by_channel ** 0.5)[:, None] * by_hidden
  mlp.down[...] = mlp.down[...] * by_channel / by_hidden[:, None]
  for mark, channel in zip(MARKS, rng.choice(hidden, len(MARKS), replace=False)):
    seen = np.asarray(d.embedding[...])[mark] / by_channel ** 0.5
    seen /= np.linalg.norm(seen) * width ** 0.5
    excited = np.zeros(mlp.gate.shape, np.float32)
    excited[1, :, channel] = 32 * seen
    for matrix in (mlp.gate, mlp.up):
      matrix[...] = matrix[...] + excited
  return model


if __name__ == '__main__':
  app.run(main)
