"""Fidelity of the autoencoder, and the noise level above which its latents no longer tell objects apart."""

import dataclasses

import jax
import numpy as np

from unifusion_jax import sharding
from unifusion_jax.data import loader
from unifusion_jax.evaluation.fidelity import pixels, round_trip
from unifusion_jax.evaluation.images import psnr
from unifusion_jax.scenes import composition, judge, render, world


def evaluate(vae, config) -> dict:
  """Rates on `config.eval.examples` scenes of the split, in all canvas shapes."""
  source, _ = loader.mix(config.data, split=config.eval.split)[0]
  shapes: dict[tuple, list[int]] = {}
  for i in range(min(config.eval.examples, len(source))):
    shapes.setdefault(source.bucket(i), []).append(i)
  exact, original_exact, fidelity = [], [], []
  for members in shapes.values():
    for part, filled in sharding.batched([source[i] for i in members], config.eval.batch_size):
      images = np.stack([record['target'] for record in filled])
      reconstructed = round_trip(vae, images)
      fidelity.extend(psnr(images, reconstructed)[:len(part)])
      for record, image, decoded in zip(part, images, reconstructed):
        scene = world.Scene.from_json(record['scene'])
        exact.append(judge.exact(judge.read(decoded), scene))
        original_exact.append(judge.exact(judge.read(image), scene))
  return dict(split=config.eval.split, examples=len(exact), exact=float(np.mean(exact)),
              exact_as_drawn=float(np.mean(original_exact)), psnr_db=round(float(np.mean(fidelity)), 2),
              decided=decided(vae, config.data.size, config.seed))


@jax.jit
def _encode(vae, x):
  return vae.encode(x)


def decided(vae, size: int, seed: int = 0, scenes: int = 24, errors: float = 3.0) -> dict[str, float]:
  """{attribute: time t}: up to t noised latents tell an object from its nearest alternative; beyond t the text must.

  Two latents at distance D, noised to (1 - t) z + t noise, are D (1 - t) / t standard deviations of the noise apart.
  An observer tells them apart (wrong in 7 of 100) down to `errors` = 3 standard deviations. The effect of a text is
  learned above these times, so training times belong there (`objective.shift`).
  """
  rng = np.random.default_rng(seed)
  values = {'shape': world.SHAPES, 'colour': tuple(world.COLOURS), 'size': tuple(world.SIZES), 'fill': world.FILLS,
            'place': world.PLACES}
  nearest, most = {name: [] for name in values}, max(map(len, values.values()))
  for _ in range(scenes):
    scene = composition.random_scene(rng, 1)
    (obj,) = scene.objects
    for name, options in values.items():
      objects = [dataclasses.replace(obj, **(_at(option) if name == 'place' else {name: option})) for option in options]
      images = np.stack([render.render(dataclasses.replace(scene, objects=(o,)), size) for o in objects])
      z = sharding.gather(_encode(vae, pixels(images, most)))[:len(objects)]
      z = np.asarray(z, np.float64).reshape(len(objects), -1)
      distance = np.linalg.norm(z[:, None] - z, axis=-1)
      nearest[name] += list(np.min(distance + np.diag([np.inf] * len(objects)), axis=1))
  return {name: round(float(np.median(d) / (np.median(d) + errors)), 3) for name, d in nearest.items()}


def _at(place: str) -> dict[str, float]:
  """The middle of a place."""
  row, column = divmod(world.PLACES.index(place), 3)
  return dict(x=(column + 0.5) / 3, y=(row + 0.5) / 3)
