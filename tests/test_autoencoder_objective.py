"""What is measured of autoencoders."""

import dataclasses

import jax
import pytest

from unifusion_jax.scenes.evaluation import reconstruction


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Scaled:
  """An autoencoder whose latents are the pixels, scaled."""
  by: float

  def encode(self, x):
    return self.by * x


def test_larger_latents_are_decided_later():
  """Their distance over that of the noise grows with them: t / (1 - t) is in proportion."""
  one, two = (reconstruction.decided(Scaled(by), 64, scenes=3) for by in (0.1, 0.2))
  assert set(one) == {'shape', 'colour', 'size', 'fill', 'place'}
  for name in one:
    assert two[name] / (1 - two[name]) == pytest.approx(2 * one[name] / (1 - one[name]), rel=0.05)


def test_places_are_decided_before_shapes():
  """An object elsewhere differs by all of its pixels twice, one of another shape by its rim."""
  found = reconstruction.decided(Scaled(0.1), 64, scenes=3)
  assert found['place'] > found['shape']
