"""Drawn scenes: what is drawn where, at every size and shape of canvas; and random scenes that fit."""

import dataclasses
import itertools

import numpy as np
import pytest

from unifusion_jax.scenes import world
from unifusion_jax.scenes.composition import fits, place_object, random_scene
from unifusion_jax.scenes.render import render
from unifusion_jax.scenes.world import Background, Object, Scene

PLAIN = Background('plain', ('cream',))


def test_a_solid_square_is_its_colour_inside_and_the_background_outside():
  image = render(Scene((Object('square', 'blue', 'large', 'solid', 0.5, 0.25),), PLAIN))
  assert image.dtype == np.uint8 and image.shape == (64, 64, 3)
  half = world.SIZES['large'] * 64 / 2 ** 0.5
  rows, columns = (np.abs(np.arange(64) + 0.5 - centre) for centre in (16, 32))
  inside = (rows[:, None] < half - 1) & (columns < half - 1)
  outside = (rows[:, None] > half + 1) | (columns > half + 1)
  assert (image[inside] == world.COLOURS['blue']).all()
  assert (image[outside] == world.BACKGROUND_COLOURS['cream']).all()


@pytest.mark.parametrize('shape', world.SHAPES)
def test_every_shape_stays_within_its_radius_and_fills_hold_less_and_less(shape):
  areas = {}
  for size, fill in itertools.product(world.SIZES, world.FILLS):
    image = render(Scene((Object(shape, 'black', size, fill, 0.5, 0.5),), PLAIN)).astype(float)
    share = (world.BACKGROUND_COLOURS['cream'][0] - image[..., 0]) / (world.BACKGROUND_COLOURS['cream'][0] - 15)
    y, x = np.nonzero(share > 0.1)
    assert np.hypot(x + 0.5 - 32, y + 0.5 - 32).max() < world.SIZES[size] * 64 + 0.8
    areas[size, fill] = share.sum()
  for size in world.SIZES:
    assert areas[size, 'solid'] > 1.2 * areas[size, 'striped'] > 1.2 * areas[size, 'outlined']
  for fill in world.FILLS:
    assert areas['large', fill] > 1.2 * areas['medium', fill] > 1.2 * areas['small', fill]


@pytest.mark.parametrize('aspect', world.ASPECTS)
def test_a_scene_is_the_same_at_every_size(aspect):
  rng = np.random.default_rng(1)
  for _ in range(4):
    scene = random_scene(rng, aspect=aspect)
    small = render(scene, 64).astype(float)
    for size in (128, 256):
      large = render(scene, size).astype(float)
      k = size // 64
      assert large.shape == (k * small.shape[0], k * small.shape[1], 3)
      reduced = large.reshape(small.shape[0], k, small.shape[1], k, 3).mean((1, 3))
      assert np.abs(reduced - small).mean() < 1.5  # positions are rounded to a quarter of a pixel of each size


def test_the_mirrored_image_is_the_image_of_the_mirrored_scene():
  rng = np.random.default_rng(2)
  for _ in range(10):
    scene = dataclasses.replace(random_scene(rng), background=PLAIN)
    # Whole quarters of a pixel, so that rounding goes the same way on both sides.
    scene = dataclasses.replace(
        scene, objects=tuple(dataclasses.replace(o, x=round(o.x * 256) / 256) for o in scene.objects))
    mirrored = dataclasses.replace(scene, objects=tuple(dataclasses.replace(o, x=1 - o.x) for o in scene.objects))
    assert np.abs(render(scene)[:, ::-1].astype(int) - render(mirrored)).max() <= 1


def test_gradients_go_from_top_to_bottom_and_checkerboards_begin_with_the_first_colour():
  top, bottom = (np.array(world.BACKGROUND_COLOURS[c]) for c in ('mint', 'sand'))
  gradient = render(Scene((), Background('gradient', ('mint', 'sand')))).astype(int)
  assert np.abs(gradient[0] - top).max() <= 1 and np.abs(gradient[-1] - bottom).max() <= 1
  board = render(Scene((), Background('checkered', ('mint', 'sand')), 'wide'))
  assert (board[:12, :12] == top).all() and (board[:12, 12:24] == bottom).all() and (board[12:24, :12] == bottom).all()


def test_a_size_without_whole_checkerboard_squares_is_refused():
  with pytest.raises(ValueError, match='multiple of 16'):
    render(Scene((), PLAIN), 72)


def test_every_object_colour_stands_out_from_every_background_and_from_the_others():
  objects = np.array(list(world.COLOURS.values()), float)
  grounds = np.array([[(1 - t) * np.array(a) + t * np.array(b) for t in np.linspace(0, 1, 9)]
                      for a, b in itertools.product(world.BACKGROUND_COLOURS.values(), repeat=2)]).reshape(-1, 3)
  assert np.linalg.norm(objects[:, None] - grounds, axis=-1).min() > 75
  apart = np.linalg.norm(objects[:, None] - objects, axis=-1) + 1e3 * np.eye(len(objects))
  assert apart.min() > 85


@pytest.mark.parametrize('aspect', world.ASPECTS)
def test_random_scenes_fit_and_are_a_function_of_the_seed(aspect):
  scenes = [random_scene(np.random.default_rng(seed), aspect=aspect) for seed in range(100)]
  assert scenes == [random_scene(np.random.default_rng(seed), aspect=aspect) for seed in range(100)]
  assert all(fits(s.objects, aspect) for s in scenes)
  assert {len(s.objects) for s in scenes} == {1, 2, 3, 4}
  assert {o.place for s in scenes for o in s.objects} == set(world.PLACES)
  for v in (v for s in scenes for o in s.objects for v in (o.x, o.y)):
    assert min(abs(v - 1 / 3), abs(v - 2 / 3)) > 0.0119 and v == round(v, 4)


def test_random_scenes_take_only_allowed_objects():
  rng = np.random.default_rng(3)
  for _ in range(20):
    scene = random_scene(rng, objects=3, allowed=lambda o: o.shape == 'star' and o.fill != 'solid')
    assert all(o.shape == 'star' and o.fill != 'solid' for o in scene.objects)


def test_what_overlaps_or_leaves_the_canvas_does_not_fit():
  circle = Object('circle', 'red', 'large', 'solid', 0.26, 0.26)
  assert fits((circle, dataclasses.replace(circle, x=0.74)), 'square')
  assert not fits((circle, dataclasses.replace(circle, x=0.7)), 'square')
  assert not fits((dataclasses.replace(circle, x=0.2),), 'square')


def test_place_object_honours_the_place_and_gives_up_where_there_is_no_room():
  rng = np.random.default_rng(4)
  for aspect, place, size in itertools.product(world.ASPECTS, world.PLACES, world.SIZES):
    obj = place_object(rng, 'star', 'red', size, 'solid', (), aspect, place)
    assert obj.place == place and fits((obj,), aspect)
  middle = Object('circle', 'red', 'large', 'solid', 0.5, 0.5)
  assert place_object(rng, 'star', 'red', 'large', 'solid', (middle,), 'square', 'center') is None
