"""Objective of the embedded autoencoder: squared error, and a KL term that keeps its latents near a unit normal."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax import flow, ranges, sharding
from unifusion_jax.commands import train
from unifusion_jax.data import imaging, loader, transforms
from unifusion_jax.evaluation import fidelity
from unifusion_jax.evaluation.images import psnr
from unifusion_jax.models import layers, vae
from unifusion_jax.ranges import Range

PREVIEWED = 8    # images of a preview
SCALED = 8       # batches that the scaling factor is measured on
MEASURED = 64    # images of data.held_out


@dataclasses.dataclass
class AutoencoderObjective:
  """Reconstruction loss of an autoencoder.

  kl: weight of the mean KL per latent value against the mean squared error per pixel value. At sigma^2 / 6 the sum is
    the variational bound of Gaussian pixels with that sigma (12 pixel values to a latent value): 4e-4 is sigma 0.05.
  """
  kl: float = 4e-4
  dtype: str = 'float32'  # of the computation; parameters stay f32

  tasks = ('t2i', 'edit', 'reconstruct')
  pretrained = ()
  tokenizers = ()

  def unit(self, config) -> int:
    """Pixels that both sides of an image must be multiples of."""
    return config.model.downsampling

  def problems(self, config, devices: int) -> list[str]:
    """Settings that cannot work together, a sentence each."""
    del devices
    wrong = ranges.problems(self, 'objective.', kl=Range(0, 10 ** 6))
    if self.dtype not in ('float32', 'bfloat16'):
      wrong.append(f"objective.dtype={self.dtype!r} must be 'float32' or 'bfloat16'")
    if config.model.scaling_factor == 1.0 and not config.model.shift_factor:
      return wrong
    return [*wrong, f'model.scaling_factor={config.model.scaling_factor}: an autoencoder trains with 1, and '
            '--mode=export measures the factor: leave it out']

  def init(self, config) -> vae.Autoencoder:
    """Parameters to start from: random ones, or those of `config.init`."""
    return self.load(config, config.init) if config.init else jax.jit(lambda: self.random(config))()

  def random(self, config) -> vae.Autoencoder:
    """Parameters of random weights; traceable."""
    return vae.Autoencoder(config.model, rngs=nnx.Rngs(config.seed))

  def load(self, config, folder: str) -> vae.Autoencoder:
    """The autoencoder in a folder, without its scaling factor, which the export measures anew."""
    model = vae.load(folder, jnp.float32)
    model.config = config.model
    return model

  def export(self, config, params: vae.Autoencoder, folder) -> None:
    """Writes the autoencoder with the scaling factor that gives latents of training images unit variance."""
    batches, mesh = train.batches(config), jax.sharding.get_mesh()
    latent_std = jax.jit(lambda model, x: jnp.std(model.moments(imaging.to_float(x))[0]))
    stds = [float(latent_std(params, sharding.shard_batch(next(batches)['target'], mesh))) for _ in range(SCALED)]
    batches.close()
    params.config = dataclasses.replace(params.config, scaling_factor=1.0 / float(np.mean(stds)))
    vae.save(params, folder)

  def frozen(self, config) -> None:
    """Nothing is frozen."""

  abstract_frozen = frozen

  def transform(self, config) -> transforms.TargetOnly:
    """Record -> arrays of one example."""
    return transforms.TargetOnly()

  def batch_spec(self, config) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as it reaches the train step."""
    return loader.batch_spec(self.transform(config).spec(config.data.size, config.data.size), config.data.batch_size)

  def tokens(self, config, batch) -> int:
    """Places of the latents of a batch."""
    rows, height, width, _ = batch['target'].shape
    return rows * (height // config.model.downsampling) * (width // config.model.downsampling)

  def preview(self, config):
    """`preview(params, frozen)` -> uint8 grid: test images and their reconstructions."""
    records = loader.preview_records(config.data, PREVIEWED)

    def preview(params, frozen):
      if not records:
        return None
      images = np.stack([imaging.read(record['target']) for record in records])
      return imaging.grid([list(images), list(fidelity.round_trip(params, images))], cell=128)
    return preview

  def measure(self, config):
    """`measure(params, frozen)` -> the mean PSNR of the first images of `data.held_out`."""
    named, _ = loader.held_out(config.data)
    (source,) = named.values()
    batches = list(fidelity.batches(source, MEASURED, config.data.batch_size))

    def measure(params, frozen):
      values = [psnr(images, fidelity.round_trip(params, images)) for images in batches]
      return dict(held_out_psnr_db=float(np.mean(np.concatenate(values))))
    return measure

  def loss(self, params: vae.Autoencoder, frozen, batch, key):
    """Squared error plus weighted KL: (scalar f32, metrics). batch: number uint32 [b]; target uint8 [b y x 3]."""
    x, params = imaging.to_float(batch['target']), layers.cast(params, self.dtype)
    mean, log_variance = params.moments(x)
    noise = flow.noise(key, batch['number'], mean.shape[1:])
    decoded = params.decode(mean + jnp.exp(0.5 * log_variance) * noise)
    error = jnp.mean(jnp.square(decoded - x))
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
    return error + self.kl * kl, dict(loss=error, kl=kl, latent_std=jnp.std(mean))
