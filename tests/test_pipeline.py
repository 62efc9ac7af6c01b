"""From conditions to images: guidance, parts that make up the whole, seeds; and the pipelines of other tests."""

import dataclasses

from flax import nnx
import jax
import numpy as np
import pytest

from unifusion_jax import conditioning, sharding
from unifusion_jax.data import transforms
from unifusion_jax.errors import UserError
from unifusion_jax.models import unifusion
from unifusion_jax.pipeline import UniFusionPipeline
from unifusion_jax.request import Request
from unifusion_jax.scenes import examples
from unifusion_jax.weights import autoencoders, encoders

SQUARE = [e for e in (examples.example('edit', 'test', i) for i in range(40)) if e['target'].shape == (64, 64, 3)]
REFERENCES = [e['references'][0] for e in SQUARE[:4]]


def random_pipe(settings):
  """A pipeline of random weights, none of them zero, so that the condition matters."""
  rng = np.random.default_rng(0)
  model = jax.jit(lambda: unifusion.UniFusion(settings.model, rngs=nnx.Rngs(0)))()
  model = jax.tree.map(lambda x: jax.device_put(rng.normal(0, 0.2, x.shape).astype(np.float32), x.sharding), model)
  frozen = conditioning.Frozen(encoders.load(settings.vlm, np.float32), autoencoders.load(settings.vae), settings.taps)
  return UniFusionPipeline(model, frozen, transforms.prompt_encoder(settings), settings.sample, settings.data.size)


def requests(count=4, **changes):
  return [dataclasses.replace(Request('make it blue', (REFERENCES[i],), i), **changes) for i in range(count)]


def tokens(encoded):
  """The tokens of each row that condition the DiT."""
  return [np.asarray(c)[np.asarray(m)] for c, m in zip(encoded.conditioning.tokens, encoded.conditioning.mask)]


def same(a, b):
  assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1


# Guidance


@pytest.mark.slow
def test_the_null_condition_is_the_empty_text_and_computed_once(pipe):
  null = pipe.null()
  assert null.mask.shape == (1, 1) and pipe.null() is null
  np.testing.assert_allclose(null.tokens[0], tokens(pipe.encode([Request('', rewrite='')]))[0], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_guidance_of_one_computes_no_null(pipe):
  """A model whose token budget has no room for the null prompt: it works as long as nobody asks for that."""
  encoder = pipe.prompt_encoder.with_tiles(4)  # the room of four tiles that a small image leaves is there for its text
  spans = encoder.chat.spans('', (), '', encoder.system)
  narrow = dataclasses.replace(encoder, max_prompt=sum(len(span.ids) for span in spans) - 1)
  cramped = UniFusionPipeline(pipe.model, pipe.frozen, narrow, pipe.settings)
  one = cramped.generate(requests(1, rewrite='x'), 64, 64, settings=pipe.settings.changed(guidance=1.0))[0].image
  with pytest.raises(UserError, match='does not fit'):
    cramped.generate(requests(1, rewrite='x'), 64, 64, settings=pipe.settings.changed(guidance=1.5))
  near = pipe.generate(requests(1, rewrite='x'), 64, 64, settings=pipe.settings.changed(guidance=1.0001))[0].image
  same(one, near)


# Sampling


@pytest.mark.slow
@pytest.mark.parametrize('eta', [0.0, 1.0])
def test_answers_do_not_depend_on_their_batch(pipe, eta):
  s = pipe.settings.changed(eta=eta)
  together, alone = pipe.generate(requests(4), 64, 64, settings=s), pipe.generate(requests(1), 64, 64, settings=s)
  assert together[0].rewrite == alone[0].rewrite
  same(together[0].image, alone[0].image)


def test_seed_text_and_reference_matter(pipe):
  base = pipe.generate(requests(1, rewrite='a red circle'), 64, 64)[0].image
  for change in (dict(seed=9), dict(rewrite='a blue star'), dict(references=(REFERENCES[1],))):
    request = dataclasses.replace(requests(1, rewrite='a red circle')[0], **change)
    assert (pipe.generate([request], 64, 64)[0].image != base).any()


def test_renewed_noise_follows_the_seed(pipe):
  three = [Request('make it red', (REFERENCES[0],), seed, 'a red circle') for seed in (1, 2, 1)]
  calm, lively = (pipe.generate(three, 64, 64, settings=pipe.settings.changed(eta=eta)) for eta in (0.0, 1.0))
  assert (lively[0].image != calm[0].image).any() and (lively[0].image != lively[1].image).any()
  np.testing.assert_array_equal(lively[0].image, lively[2].image)


@pytest.mark.slow
@pytest.mark.parametrize('eta', [0.0, 0.8])
def test_part_after_part_is_the_whole_way(pipe, eta):
  encoded, seeds = pipe.encode(requests(2, rewrite='x')), [0, 1]
  noise, times = pipe.noise(seeds, 64, 64), pipe.times(64, 64, steps=4)
  ways = dict(guidance=2.0, eta=eta, seeds=seeds)
  whole = pipe.denoise(encoded.conditioning, noise, times, **ways)
  half = pipe.denoise(encoded.conditioning, noise, times[:2], **ways)
  parts = pipe.denoise(encoded.conditioning, half, times[1:], first=1, **ways)
  np.testing.assert_allclose(parts, whole, atol=1e-4)
  forgotten = pipe.denoise(encoded.conditioning, half, times[1:], **ways)
  assert (np.abs(np.asarray(forgotten) - np.asarray(whole)).max() > 1e-2) == (eta > 0)
  calls = []
  s = pipe.settings.changed(steps=4, eta=eta, guidance=2.0)
  shown = pipe.generate(requests(2, rewrite='x'), 64, 64, settings=s, callback=lambda *step: calls.append(step))
  assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
  for image, sampled in zip(pipe.decode(whole), shown):
    same(image, sampled.image)
  if eta:
    with pytest.raises(UserError, match='give seeds='):
      pipe.denoise(encoded.conditioning, noise, times, eta=eta)


@pytest.mark.parametrize('eta', [0.0, 1.0])
def test_sampling_on_from_images(pipe, eta):
  """From time 1 they leave no trace; from 0 the autoencoder gives them back; between, something of both."""
  s = pipe.settings.changed(eta=eta)
  images = [np.random.default_rng(0).integers(0, 256, (8, 8, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)] * 3
  plain = pipe.generate(requests(3, rewrite='x'), 64, 64, settings=s)
  back = {t: pipe.generate(requests(3, rewrite='x'), 64, 64, settings=s, init_images=images, start=t)
          for t in (1.0, 0.5, 0.0)}
  x = sharding.shard(np.stack(images * 3)[:8].astype(np.float32) / 127.5 - 1)
  decoded = np.clip((np.asarray(pipe.frozen.vae.decode(pipe.frozen.vae.encode(x)))[0] + 1) * 127.5, 0, 255)
  assert len(back[0.0]) == 3
  for i in range(3):
    same(back[1.0][i].image, plain[i].image)
    np.testing.assert_allclose(back[0.0][i].image, decoded, atol=1)
    assert np.abs(back[0.5][i].image.astype(int) - decoded).mean() > 1


@pytest.mark.parametrize('height, width', [(48, 80), (80, 48)])
def test_other_shapes(pipe, height, width):
  assert pipe.generate([Request('a red circle', rewrite='x')], height, width)[0].image.shape == (height, width, 3)


def test_sizes_and_texts_that_cannot_be(pipe):
  with pytest.raises(UserError, match='multiples of 8'):
    pipe.generate(requests(1), 60, 64)
  with pytest.raises(UserError, match='does not fit'):
    pipe.generate(requests(1, instruction='red ' * 200), 64, 64)
