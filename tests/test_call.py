"""The call: prompts, references, sizes and settings in; images in their order out."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from test_pipeline import REFERENCES, same

from unifusion_jax import call, conditioning, denoising, randomness, sharding, turns
from unifusion_jax.errors import UserError
from unifusion_jax.models import unifusion
from unifusion_jax.pipeline import UniFusionPipeline
from unifusion_jax.request import Request
from unifusion_jax.scenes import judge, render, world


def test_a_scene_is_edited_as_asked(tiny):
  """The shipped model on a scene: the judge reads a circle that was red and is blue, and the star as it was."""
  circle = world.Object('circle', 'red', 'medium', 'solid', 0.3, 0.3)
  star = world.Object('star', 'green', 'medium', 'solid', 0.7, 0.7)
  scene = world.Scene((circle, star), world.Background('plain', ('mint',)))
  result = tiny('make the circle blue', images=render.render(scene, 64), num_images=4, steps=12)
  assert len(result.images) == 4 and result.warnings == [''] * 4
  wanted = dataclasses.replace(scene, objects=(dataclasses.replace(circle, colour='blue'), star))
  verdicts = [judge.check_edit(judge.read(image), scene, wanted) for image in result.arrays]
  assert sum(verdict['asked'] for verdict in verdicts) >= 3, (verdicts, result.rewrites)


@pytest.mark.slow
def test_paths_arrays_and_pillow_images_are_one(pipe, tmp_path):
  Image.fromarray(REFERENCES[0]).save(tmp_path / 'image.png')
  ways = [tmp_path / 'image.png', str(tmp_path / 'image.png'), REFERENCES[0], Image.fromarray(REFERENCES[0]),
          [REFERENCES[0]], Image.fromarray(REFERENCES[0]).convert('RGBA')]
  results = [pipe('make it blue', images=images, rewrite='x') for images in ways]
  for result in results:
    np.testing.assert_array_equal(result.arrays[0], results[0].arrays[0])
  assert (results[0].arrays[0] != pipe('make it blue', rewrite='x').arrays[0]).any()


def test_several_prompts_and_images_of_each(pipe):
  calls = []
  result = pipe(['a red circle', 'a blue star'], num_images=3, seed=5, rewrite='x', batch_size=4, steps=1, eta=None,
                callback=lambda *step: calls.append(step))
  assert [m['seed'] for m in result.metadata] == [5, 6, 7, 8, 9, 10] and calls == [(1, 2), (2, 2)]
  assert [m['prompt'] for m in result.metadata] == ['a red circle'] * 3 + ['a blue star'] * 3
  assert result.metadata[0]['settings']['steps'] == 1 and result.metadata[0]['settings']['width'] == 64
  assert result.rewrites == ['x'] * 6 and result.images[0].size == (64, 64)
  one = pipe.generate([Request('a blue star', seed=9, rewrite='x')], 64, 64, settings=pipe.settings.changed(steps=1))
  same(result.arrays[4], one[0].image)


def test_sizes_follow_the_first_reference(pipe):
  wide = np.zeros((30, 50, 3), np.uint8)
  sizes = [pipe('x', rewrite='x', steps=1, guidance=1.0, **ways).images[0].size
           for ways in (dict(), dict(images=wide), dict(images=wide, height=80), dict(width=32, height=48))]
  assert sizes == [(64, 64), (80, 48), (136, 80), (32, 48)]


@pytest.mark.parametrize('ways, message', [
    (dict(prompt=''), 'nothing to generate'), (dict(prompt=[]), 'nothing to generate'),
    (dict(prompt=['x', ' ']), 'prompt 2 is empty'), (dict(prompt=['x', 3]), 'list of texts'),
    (dict(guidence=2.0), "did you mean 'guidance'"),
    (dict(references='photo.png'), "no argument 'references'"), (dict(weights='x'), "no argument 'weights'"),
    (dict(steps=0), 'steps=0 must be between 1 and'), (dict(steps=2.5), 'steps=2.5 must be a whole number'),
    (dict(guidance='high'), 'must be a number'), (dict(verifi=1), 'must be True or False'),
    (dict(method='rk4'), "must be 'euler' or 'heun'"), (dict(method='heun', eta=0.5), 'between Euler steps'),
    (dict(num_images=0), 'num_images=0'), (dict(guidance=float('nan')), 'guidance=nan must be'),
    (dict(width=60), 'width=60 must be a multiple of 8 pixels (a latent patch), as 64 is'),
    (dict(height=-8, width=4), 'height=-8 must be'), (dict(height=64.0), 'height=64.0 must be a whole number'),
    (dict(height=2 ** 15, width=8), 'there may be 1024 along a side'), (dict(width=2 ** 17), 'width=131072 must be'),
    (dict(image='a.png', images='a.png'), 'images and image are two names of one argument: give one of them'),
    (dict(steps=2, num_inference_steps=2), 'steps and num_inference_steps are two names'),
    (dict(num_inference_step=2), "did you mean 'num_inference_steps'?"), (dict(guidance_scales=2), "'guidance_scale'?"),
    (dict(guidance_scale='high'), 'must be a number'), (dict(guidance_scale=float('nan')), 'guidance=nan must be'),
    (dict(num_images_per_prompt=0), 'num_images=0'), (dict(callback_on_step_end=print), 'callback, batch_size,'),
    (dict(seed=0.5), 'seed=0.5 must be a whole number, a generator'), (dict(seed=True), 'seed=True must be'),
    (dict(generator='cpu'), "seed='cpu' must be"), (dict(generator=jnp.zeros(())), 'must be a whole number'),
    (dict(generator=[1, 2], num_images=3), 'there are 2 seeds (or generators) for 3 images'),
    (dict(images='gone.png'), 'gone.png is not there'), (dict(images=np.zeros((4, 4), np.float32)), 'image array'),
    (dict(system='faithfull', rewrite='x'), "did you mean 'faithful'"), (dict(top_p=0.0), 'top_p=0.0'),
    (dict(eta=2), 'eta=2')])
def test_arguments_that_cannot_be(pipe, ways, message):
  with pytest.raises(UserError, match=re.escape(message)):
    pipe(**dict(prompt='x', rewrite='x') | ways if 'prompt' not in ways else ways)


# Names of diffusers


def test_diffusers_names_are_ours(pipe):
  """The same images and metadata by either; None is no value."""
  ours = pipe(['make it blue', 'red'], images=REFERENCES[:2], steps=1, guidance=2.5, num_images=2, seed=7, height=48,
              width=64, negative_prompt='grey')
  theirs = pipe(prompt=['make it blue', 'red'], image=REFERENCES[:2], num_inference_steps=1, guidance_scale=2.5,
                num_images_per_prompt=2, generator=np.random.default_rng(7), height=48, width=64,
                negative_prompt='grey', steps=None, seed=None)
  assert theirs.metadata == ours.metadata and theirs.images == ours.images and theirs.images[0].size == (64, 48)
  assert [made['seed'] for made in ours.metadata] == [7, 8, 9, 10]


@pytest.mark.parametrize('off, scale, guidance', [
    (1.0, 3, 3.0), (1.0, 1.0, 1.0), (1.0, 0.0, 1.0), (0.0, 3.5, 4.5), (0.0, 0.0, 1.0), (0.0, -1.0, 1.0)])
def test_a_guidance_scale_without_guidance_is_one(off, scale, guidance):
  assert call.named(dict(guidance_scale=scale), off) == dict(guidance=guidance)


def test_seeds_are_those_of_generators():
  torch_like = types.SimpleNamespace(initial_seed=lambda: 2 ** 40 + 1)
  used = np.random.default_rng(9)
  used.standard_normal(3)
  key = jax.random.key(5)
  for seed, wanted in (
      (7, [7, 8]), (np.int64(7), [7, 8]), ([3, 1], [3, 1]), (np.array([3, 1]), [3, 1]), (-1, [-1, 0]),
      (torch_like, [2 ** 40 + 1, 2 ** 40 + 2]), ([torch_like, 4], [2 ** 40 + 1, 4]), (used, [9, 10]), (key, [5, 6]),
      (jax.random.PRNGKey(5), [5, 6]), ([key, jax.random.key(8)], [5, 8])):
    assert randomness.seeds(seed, 2) == wanted
  split = randomness.seeds(jax.random.split(key), 2)
  assert split == randomness.seeds(jax.random.split(jax.random.PRNGKey(5)), 2) and split[0] != split[1]
  spawned = [randomness.seeds(child, 1)[0] for child in np.random.default_rng(9).spawn(2)]
  assert len({*spawned, 9}) == 3
  assert randomness.seeds(np.random.default_rng(2 ** 100), 1) == [2 ** 100]


def test_a_list_of_seeds_has_one_for_each_image(pipe):
  ask = dict(rewrite='x', steps=1, guidance=1.0)
  several = pipe(['a', 'b'], num_images=2, generator=[4, 3, 4, 9], **ask)
  assert [made['seed'] for made in several.metadata] == [4, 3, 4, 9]
  same(several.arrays[3], pipe('b', seed=9, **ask).arrays[0])


# What stops a call


def test_images_that_were_there_are_kept(pipe, monkeypatch):
  """By any error of a later batch; what cannot be is found before the first."""
  generate, left = type(pipe).generate, iter(range(2))

  def stops(self, *args, **kwargs):
    if next(left, None) is None:
      raise KeyboardInterrupt
    return generate(self, *args, **kwargs)
  ask = dict(rewrite='x', steps=1, guidance=1.0, num_images=5, batch_size=2)
  whole = pipe('a', **ask)
  monkeypatch.setattr(type(pipe), 'generate', stops)
  with pytest.raises(KeyboardInterrupt) as stopped:
    pipe('a', **ask)
  kept = stopped.value.result
  assert kept.images == whole.images[:4] and kept.metadata == whole.metadata[:4]
  assert stopped.value.__notes__ == ['4 of 5 images were there by then: `result` of this error']


@pytest.mark.parametrize('module, name', [(conditioning, 'read'), (denoising, 'integrate'), (unifusion, 'load')])
def test_memory_that_is_too_small_is_a_sentence(pipe, monkeypatch, module, name):
  """Whether states, latents or weights do not fit."""
  def full(*_, **__):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 281474976710656 bytes.\nmore of it')
  monkeypatch.setattr(module, name, full)
  with pytest.raises(UserError, match='memory is too small .*6 bytes.*: sample fewer .*in_turn.*int8') as stop:
    if name == 'load':
      with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=4, fsdp=2))):
        UniFusionPipeline.from_pretrained('tiny')
    pipe('a', rewrite=f'too much for {name}', steps=1, guidance=1.0)
  assert len(str(stop.value).splitlines()) == 1


def test_other_errors_of_devices_keep_their_traceback():
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'), turns.enough_memory():
    raise jax.errors.JaxRuntimeError('INTERNAL: nothing to do with memory')
