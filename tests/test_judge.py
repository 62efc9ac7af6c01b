"""The judge: it reads drawn images back exactly, rejects what resembles nothing, and scores captions and edits."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from unifusion_jax.scenes import judge, world
from unifusion_jax.scenes.composition import random_scene
from unifusion_jax.scenes.constraints import Constraints, Wanted
from unifusion_jax.scenes.render import render
from unifusion_jax.scenes.world import Background, Object, Scene

PLAIN = Background('plain', ('cream',))
RING = Object('ring', 'red', 'small', 'outlined', 0.2, 0.2)
STAR = Object('star', 'blue', 'medium', 'solid', 0.75, 0.75)
SCENE = Scene((RING, STAR), PLAIN)


def random_scenes(count, seed):
  rng = np.random.default_rng(seed)
  return [random_scene(rng, aspect=str(rng.choice(list(world.ASPECTS), p=(0.6, 0.2, 0.2)))) for _ in range(count)]


def perturbed(image, rng):
  """A blur of 0.6 pixels, noise of 6 levels and a colour shift of 4."""
  soft = ndimage.gaussian_filter(image.astype(float), (0.6, 0.6, 0), mode='nearest')
  soft += rng.normal(0, 6, soft.shape) + rng.choice([-4, 4], 3)
  return np.clip(soft + 0.5, 0, 255).astype(np.uint8)


def edited(**changes):
  """SCENE with changes to its star."""
  return dataclasses.replace(SCENE, objects=(RING, dataclasses.replace(STAR, **changes)))


def judged(image_of, source, target):
  result = judge.check_edit(judge.read(render(image_of)), source, target)
  return result['asked'], result['kept'], result['all']


def test_drawn_images_are_read_exactly():
  scenes = random_scenes(200, 0)
  assert sum(judge.exact(judge.read(render(s)), s) for s in scenes) >= 198


def test_blurred_noisy_and_tinted_images_are_read_nearly_always():
  rng = np.random.default_rng(1)
  scenes = random_scenes(200, 1)
  assert sum(judge.exact(judge.read(perturbed(render(s), rng)), s) for s in scenes) >= 194


@pytest.mark.parametrize('size', (128, 256))
def test_larger_images_are_read_as_well(size):
  for scene in random_scenes(10, 2):
    assert judge.exact(judge.read(render(scene, size)), scene)


def test_positions_are_read_to_a_fraction_of_a_pixel():
  for scene in random_scenes(20, 3):
    reading = judge.read(render(scene))
    for read, drawn in zip(reading.scene.objects, scene.in_reading_order()):
      assert abs(read.x - drawn.x) < 0.01 and abs(read.y - drawn.y) < 0.01


def test_exact_sees_every_single_difference():
  reading = judge.read(render(SCENE))
  assert judge.exact(reading, SCENE)
  assert judge.exact(reading, dataclasses.replace(SCENE, objects=(STAR, RING)))
  for changes in ({'shape': 'heart'}, {'colour': 'green'}, {'size': 'large'}, {'fill': 'striped'}, {'x': 0.5}):
    assert not judge.exact(reading, edited(**changes))
  for other in (Scene((RING,), PLAIN), Scene((RING, STAR, STAR), PLAIN), Scene((), PLAIN),
                dataclasses.replace(SCENE, background=Background('plain', ('mint',)))):
    assert not judge.exact(reading, other)
  assert not judge.exact(dataclasses.replace(reading, rejected=1), SCENE)


def test_an_empty_scene_is_read_as_empty():
  for background in (PLAIN, Background('gradient', ('sky', 'sand')), Background('checkered', ('slate', 'cream'))):
    scene = Scene((), background)
    assert judge.exact(judge.read(render(scene)), scene)


def test_a_centre_at_the_border_of_two_places_counts_for_both():
  reading = judge.read(render(Scene((dataclasses.replace(STAR, x=0.345),), PLAIN)))
  wanted = {place: judge.check(reading, Constraints((Wanted('star', place=place),)))['place'] for place in world.PLACES}
  assert [place for place, met in wanted.items() if met] == ['bottom left', 'bottom center']


def test_what_resembles_nothing_is_rejected():
  half = render(SCENE)
  half[:, 48:] = world.BACKGROUND_COLOURS['cream']
  reading = judge.read(half)
  assert [o.shape for o in reading.scene.objects] == ['ring'] and reading.rejected == 1
  strange = render(Scene((), PLAIN))
  strange[10:14, 10:50] = world.COLOURS['red']
  assert judge.read(strange).scene.objects == () and judge.read(strange).rejected == 1


def test_a_background_of_another_colour_is_none():
  image = render(Scene((), PLAIN)) // 2
  assert judge.read(image).background is None


def test_garbage_is_read_without_complaint_and_without_objects():
  rng = np.random.default_rng(4)
  noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
  smooth = np.clip(128 + 900 * ndimage.gaussian_filter(rng.normal(size=(64, 64, 3)), (3, 3, 0)), 0, 255)
  for image in (noise, smooth.astype(np.uint8), np.zeros((64, 64, 3), np.uint8), np.full((50, 70, 3), 255, np.uint8),
                  noise[:1, :40], noise[:20, :16]):
    reading = judge.read(image)
    assert len(reading.scene.objects) <= 1 and not judge.exact(reading, SCENE)


def test_a_image_in_floats_is_refused():
  with pytest.raises(ValueError, match='uint8'):
    judge.read(np.zeros((64, 64, 3), np.float32))


def test_check_reports_each_kind_of_demand():
  reading = judge.read(render(SCENE))
  ring, star = (Wanted(o.shape, o.colour, o.size, o.fill, o.place) for o in (RING, STAR))
  true = Constraints((star, ring), PLAIN, relations=((1, 'left of', 0), (0, 'below', 1)))
  assert judge.check(reading, true) == dict.fromkeys(
      ('count', 'object', 'colour', 'size', 'fill', 'place', 'relation', 'background', 'all'), True)

  def failing(constraints):
    return {kind for kind, met in judge.check(reading, constraints).items() if not met}

  assert failing(Constraints((star,))) == {'count', 'all'}
  assert failing(Constraints((star,), exact_count=False)) == set()
  assert failing(Constraints((star, ring, ring), exact_count=False)) >= {'count', 'object', 'all'}
  assert failing(Constraints((Wanted('heart'), ring))) >= {'object', 'all'}
  for kind, value in (('colour', 'red'), ('size', 'small'), ('fill', 'outlined'), ('place', 'top left')):
    # The value is in the image, but on the other object: this is what binding means.
    assert failing(Constraints((dataclasses.replace(star, **{kind: value}), ring))) == {kind, 'all'}
  assert failing(Constraints((star, ring), relations=((0, 'left of', 1),))) == {'relation', 'all'}
  assert failing(Constraints((star, ring), Background('plain', ('sand',)))) == {'background', 'all'}
  assert set(judge.check(reading, Constraints((Wanted(colour='red'), Wanted())))) == {'count', 'colour', 'all'}


def test_between_is_on_the_way_from_one_to_the_other():
  ends = (dataclasses.replace(RING, x=0.18, y=0.2), dataclasses.replace(STAR, x=0.8, y=0.8))
  middle = Object('square', 'blue', 'small', 'solid', 0.45, 0.55)
  for first, second in (ends, ends[::-1]):
    said = Constraints(tuple(Wanted(o.shape) for o in (middle, first, second)), relations=((0, 'between', 1, 2),))
    for scene, truth in ((Scene((*ends, middle), PLAIN), True),
                         (Scene((*ends, dataclasses.replace(middle, x=0.8, y=0.2)), PLAIN), False)):
      assert judge.check(judge.read(render(scene)), said)['relation'] == truth


def test_all_needs_one_choice_of_objects_for_every_demand():
  other = dataclasses.replace(RING, colour='blue', size='large', x=0.7, y=0.7)
  reading = judge.read(render(Scene((RING, other), PLAIN)))
  crossed = Constraints((Wanted('ring', 'red', 'large'), Wanted('ring', 'blue', 'small')))
  result = judge.check(reading, crossed)
  assert result['colour'] and result['size'] and not result['all']


EDITS = {
    'recolour': edited(colour='green'), 'resize': edited(size='large'), 'refill': edited(fill='striped'),
    'replace': edited(shape='heart', colour='black'), 'move': edited(y=0.25),
    'add': dataclasses.replace(SCENE, objects=SCENE.objects + (Object('cross', 'pink', 'small', 'solid', 0.2, 0.8),)),
    'remove': Scene((RING,), PLAIN), 'background': dataclasses.replace(SCENE, background=Background('plain', ('sky',))),
    'mirror': Scene(tuple(dataclasses.replace(o, x=1 - o.x) for o in SCENE.objects), PLAIN),
    'swap': Scene((dataclasses.replace(RING, x=0.75, y=0.75), dataclasses.replace(STAR, x=0.2, y=0.2)), PLAIN),
    'aspect': dataclasses.replace(SCENE, aspect='wide')}


@pytest.mark.parametrize('kind', EDITS)
def test_an_edit_is_met_by_its_target_and_not_by_its_source(kind):
  assert judged(EDITS[kind], SCENE, EDITS[kind]) == (True, True, True)
  assert judged(SCENE, SCENE, EDITS[kind]) == (False, True, False)


def test_an_edit_that_spoils_something_else_is_asked_but_not_kept():
  target = EDITS['recolour']
  spoilt = (dataclasses.replace(target, objects=(dataclasses.replace(RING, fill='solid'), target.objects[1])),
            dataclasses.replace(target, objects=(dataclasses.replace(RING, x=0.4), target.objects[1])),
            dataclasses.replace(target, background=Background('plain', ('sky',))),
            edited(colour='green', size='large'), edited(colour='green', y=0.3), Scene(target.objects[1:], PLAIN))
  for scene in spoilt:
    assert judged(scene, SCENE, target) == (True, False, False)
  extra = dataclasses.replace(target, objects=target.objects + (Object('cross', 'pink', 'small', 'solid', 0.2, 0.8),))
  assert judged(extra, SCENE, target) == (True, True, False)


def test_a_moved_object_must_arrive():
  assert judged(edited(x=0.5), SCENE, EDITS['move']) == (False, True, False)
  assert judged(edited(x=0.72, y=0.22), SCENE, EDITS['move']) == (True, True, True)
