"""Distances between images and their truths: PSNR, SSIM, LPIPS, and of the states of a VLM.

Each compares images with others of the same sizes, one by one.
"""

from collections.abc import Sequence

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from unifusion_jax import sharding, verifi
from unifusion_jax.data import imaging, transforms
from unifusion_jax.errors import UserError
from unifusion_jax.evaluation import statistics
from unifusion_jax.models import layers, vae
from unifusion_jax.weights import convert, encoders, safetensors_io

WINDOW, SIGMA = 11, 1.5  # pixels of SSIM's Gaussian window, and its standard deviation
K1, K2, MOST = 0.01, 0.03, 255
# AlexNet's convolutions in torchvision: number in `features`, channels out, side, stride, padding
CONVOLUTIONS = ((0, 64, 11, 4, 2), (3, 192, 5, 1, 2), (6, 384, 3, 1, 1), (8, 256, 3, 1, 1), (10, 256, 3, 1, 1))
POOLED = (1, 2)  # the convolutions before which a maximum is taken
LEAST = 31  # pixels of a side that leave AlexNet something to read
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of LPIPS 0.1, for pixels in [-1, 1]


def psnr(images: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Peak signal-to-noise ratios in dB of images uint8 [... y x 3], [...]; 78.1 for equal ones, where it has no end."""
  errors = np.mean((images.astype(np.float32) - others) ** 2, axis=(-3, -2, -1))
  return 10 * np.log10(MOST ** 2 / np.maximum(errors, 1e-3))


def ssim(images: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Structural similarities of images uint8 [... y x 3], [...]: the mean over windows and channels.

  Z. Wang et al., Image quality assessment: from error visibility to structural similarity (2004), with its Gaussian
  window and constants and population variances, over the windows that lie inside the image: as scikit-image's
  structural_similarity with gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255.
  """
  if min(images.shape[-3:-1]) < WINDOW:
    raise UserError(f'an image of {images.shape[-2]}x{images.shape[-3]} is smaller than the window of SSIM, '
                    f'{WINDOW} pixels: compare larger ones')
  margin, axes = WINDOW // 2, (images.ndim - 3, images.ndim - 2)
  inner = (..., slice(margin, -margin), slice(margin, -margin), slice(None))
  blurred = lambda x: ndimage.gaussian_filter(x, SIGMA, axes=axes, radius=margin)[inner]
  x, y = images.astype(np.float64), others.astype(np.float64)
  mean_x, mean_y = blurred(x), blurred(y)
  variances = blurred(x * x) - mean_x ** 2 + blurred(y * y) - mean_y ** 2
  covariance = blurred(x * y) - mean_x * mean_y
  c1, c2 = (K1 * MOST) ** 2, (K2 * MOST) ** 2
  similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)
                / ((mean_x ** 2 + mean_y ** 2 + c1) * (variances + c2)))
  return np.mean(similarity, axis=(-3, -2, -1))


class AlexNet(nnx.Module):
  """The convolutions of AlexNet (arXiv 1404.5997), and a weight for each of their channels."""

  def __init__(self, *, rngs: nnx.Rngs):
    inputs = [3, *(outputs for _, outputs, *_ in CONVOLUTIONS)]
    self.convolutions = nnx.List([vae.Conv(width, outputs, side, jnp.float32, rngs=rngs)
                                  for width, (_, outputs, side, _, _) in zip(inputs, CONVOLUTIONS)])
    self.heads = nnx.List([layers.constant(1.0, (width,)) for width in inputs[1:]])

  def features(self, x: jax.Array) -> list[jax.Array]:
    """Images [b y x 3] in [-1, 1] -> each convolution's activations [b y x c]."""
    x, states = (x - jnp.array(SHIFT)) / jnp.array(SCALE), []
    for i, (convolution, (_, _, _, stride, padding)) in enumerate(zip(self.convolutions, CONVOLUTIONS)):
      if i in POOLED:
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), 'VALID')
      x = jax.nn.relu(convolution(x, stride, (padding, padding)))
      states.append(x)
    return states

  def distance(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """LPIPS of images [b y x 3] in [-1, 1], [b]."""
    unit = lambda states: states / (jnp.linalg.norm(states, axis=-1, keepdims=True) + 1e-10)
    states = zip(self.features(x), self.features(y), self.heads)
    return jnp.sum(jnp.stack([jnp.mean((unit(a) - unit(b)) ** 2 @ head[...], axis=(1, 2)) for a, b, head in states]),
                   axis=0)


RULES = tuple(rule for i, (number, *_) in enumerate(CONVOLUTIONS) for rule in (
    (rf'features\.{number}\.weight', f'convolutions/{i}/kernel', 'o i y x -> y x i o'),
    (rf'features\.{number}\.bias', f'convolutions/{i}/bias', 'o -> o'),
    (rf'lin{i}\.model\.1\.weight', f'heads/{i}', '1 c 1 1 -> c')))


class Lpips:
  """LPIPS (arXiv 1801.03924), version 0.1 with AlexNet: `lpips(images, others)`, on the mesh in context.

  `folder` holds a .safetensors file with torchvision's names of AlexNet's convolutions and the five linear heads of
  the lpips package (docs/metrics.md). UserError for another.
  """

  def __init__(self, folder):
    self.network = convert.load(lambda: AlexNet(rngs=nnx.Rngs(0)), safetensors_io.read(folder), RULES, {})

  def __call__(self, images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distances of images uint8 [b y x 3], [b] f32; 0 for equal ones."""
    if min(images.shape[1:3]) < LEAST:
      raise UserError(f'an image of {images.shape[2]}x{images.shape[1]} is too small for LPIPS, whose network reads at '
                      f'least {LEAST} pixels: compare larger ones')
    rows = (sharding.shard(np.stack(sharding.padded(list(part)))) for part in (images, others))
    return sharding.gather(_lpips(self.network, *rows))[:len(images)]


@jax.jit
def _lpips(network: AlexNet, images: jax.Array, others: jax.Array) -> jax.Array:
  return network.distance(imaging.to_float(images), imaging.to_float(others))


def embedding_distance(vlm: encoders.Encoder, encoder: transforms.PromptEncoder, images: Sequence[np.ndarray],
                       others: Sequence[np.ndarray], batch_size: int, layer: int = 0) -> np.ndarray:
  """Cosine distances of a VLM's states of images and others uint8 [y x 3], of any sizes, [n] f32; 0 for equal ones.

  layer: whose states are averaged over an image's tokens, as an index of `hidden_states`; 0 is what the vision tower
    gives. encoder: of the VLM, one that reads images.
  """
  a, b = (_embeddings(vlm, encoder, part, batch_size, layer) for part in (images, others))
  return np.maximum(1 - np.sum(a * b, axis=-1), 0)


def _embeddings(vlm, encoder: transforms.PromptEncoder, images: Sequence[np.ndarray], batch_size: int, layer: int
                ) -> np.ndarray:
  """Mean states of unit length of images, [n e]."""
  chat, size = encoder.chat, sharding.padded_batch(batch_size)
  inputs, counts = zip(*(encoder.image_processor.preprocess((image,), 1) for image in images))
  prompts = [chat.spans('', count, None, '') for count in counts]
  length = max(sum(len(span.ids) for span in spans) for spans in prompts)
  rows = [dict(images=image, **verifi.arrays(spans, length, encoder.image_processor.max_tokens, ('image',)))
          for image, spans in zip(inputs, prompts)]
  found = []
  for part, filled in sharding.batched(rows, size):
    batch = sharding.shard(jax.tree.map(lambda *x: np.stack(x), *filled))
    found.append(sharding.gather(_mean_state(vlm, batch, layer))[:len(part)])
  return np.concatenate(found)


@jax.jit(static_argnums=2)
def _mean_state(vlm, batch, layer: int) -> jax.Array:
  states = vlm.hidden(batch['input_ids'], batch['attention_mask'], (layer,), batch['images'], batch['cond_index'])
  mask = batch['cond_mask'][..., None]
  mean = jnp.sum(jnp.where(mask, states[:, :, 0].astype(jnp.float32), 0), axis=1) / jnp.sum(mask, axis=1)
  return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def measures(images: np.ndarray, others: np.ndarray, lpips: Lpips | None = None) -> dict[str, np.ndarray]:
  """{name: value of each} of images uint8 [b y x 3]; `lpips` where it is given."""
  values = dict(psnr_db=psnr(images, others), ssim=ssim(images, others))
  return values | (dict(lpips=lpips(images, others)) if lpips else {})


def summary(values: dict[str, np.ndarray], groups: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
  """{name: mean, and where there is an interval its low and high} of measures of images.

  groups: a label for each image, such as its request, where several images of one are not independent.
  """
  report = {}
  for name, each in values.items():
    low, high = statistics.bootstrap(each, groups=groups)
    interval = {} if np.isnan(low) else dict(low=low, high=high)
    report[name] = {key: round(float(value), 4) for key, value in dict(mean=np.mean(each), **interval).items()}
  return report
