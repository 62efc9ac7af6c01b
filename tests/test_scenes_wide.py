"""The wider world for training: true captions, looks that stay what they are called, and nothing of it in the tests."""

import collections
import dataclasses
import itertools
import re

import numpy as np
import pytest

from unifusion_jax.scenes import casual, edits, image_tokens, judge, language, looks, prompts, splits, words, world
from unifusion_jax.scenes.composition import place_object, random_background, random_scene, stands_out, visible
from unifusion_jax.scenes.constraints import Constraints
from unifusion_jax.scenes.evaluation import handwritten
from unifusion_jax.scenes.examples import aspect, example, references, TASKS
from unifusion_jax.scenes.multi import random_multi, WIDE_KINDS
from unifusion_jax.scenes.render import render
from unifusion_jax.scenes.world import Background, Object, Scene

WHITE = Background('plain', ('white',))
SKY = Background('plain', ('sky',))


def wide(task, i, **more):
  return example(task, 'train', i, wide=True, **more)


def scenes_of(e):
  return [Scene.from_json(text) for text in e['source'] + [e['scene']] * bool(e['scene'])]


@pytest.mark.parametrize('task', TASKS)
def test_wide_examples_are_pure_and_leave_the_other_splits_alone(task):
  for i in (3, 14):
    one, again = wide(task, i), wide(task, i)
    assert repr(one) == repr(again)
    images = [[*e['references'], e['target']] for e in (one, again)]
    assert all(np.array_equal(a, b) for a, b in zip(*images))
    assert set(one) == set(example(task, 'train', i))
    for split in ('test', 'heldout'):
      assert repr(example(task, split, i, wide=True)) == repr(example(task, split, i))
  assert any(repr(wide(task, i, images=False)) != repr(example(task, 'train', i, images=False)) for i in range(8))


@pytest.mark.parametrize('task', TASKS)
def test_wide_examples_have_the_shape_that_is_said_of_them(task):
  for i in range(20):
    e = wide(task, i)
    assert len(e['references']) == references(task, 'train', i)
    image = e['target'] if e['target'] is not None else next(iter(e['references']), None)
    if image is not None:
      assert image.dtype == np.uint8 and image.shape == (*world.canvas(aspect(task, 'train', i), 64)[::-1], 3)
  larger = next(e for i in range(9) if (e := wide('edit', i, reference_size=128))['kind'] != 'aspect')
  assert larger['references'][0].shape[0] == 2 * larger['target'].shape[0]


@pytest.mark.parametrize('task', TASKS)
def test_wide_scenes_are_visible_on_many_backgrounds(task):
  grounds = collections.Counter()
  for i in range(150):
    for scene in scenes_of(wide(task, i, images=False)):
      assert visible(scene)
      grounds.update(scene.background.colours)
  if task != 'rewrite':
    assert grounds['white'] > 10 and set(grounds) > set(world.BACKGROUND_COLOURS)


def test_captions_of_wide_scenes_parse_back():
  rng = np.random.default_rng(0)
  for _ in range(300):
    scene = random_scene(rng, wide=True)
    parsed = language.parse(language.caption(scene))
    assert parsed == language.full_description(scene) and language.describe(parsed) == language.caption(scene)


def test_half_of_the_object_colours_stand_out_from_every_background():
  rng = np.random.default_rng(1)
  for _ in range(400):
    background = random_background(rng, wide=True)
    assert sum(stands_out(colour, background) for colour in world.COLOURS) >= 6, background
  assert not stands_out('white', WHITE) and stands_out('black', WHITE)
  assert not stands_out('grey', Background('gradient', ('black', 'white')))


def lexicon():
  """Phrase -> what it says."""
  said = {}

  def add(attribute, table):
    for value, phrases in table.items():
      for text in phrases:
        assert said.setdefault(text, (attribute, value)) == (attribute, value), f'{text!r} says two things'

  add('size', words.SIZES)
  add('size', words.MORE_SIZES)
  add('fill', words.FILLS_BEFORE)
  add('fill', words.FILLS_AFTER)
  add('fill', words.MORE_FILLS)
  add('colour', words.COLOURS)
  add('colour', words.MORE_COLOURS)
  for table in (words.SHAPES, words.MORE_SHAPES):
    add('shape', table)
    add('shape', {shape: [words.plural(noun) for noun in nouns] for shape, nouns in table.items()})
  add('place', words.PLACES)
  add('place', words.MORE_PLACES)
  return said


LEXICON = lexicon()
READER = re.compile('|'.join(rf'(?<![\w-]){re.escape(p)}(?![\w-])' for p in sorted(LEXICON, key=len, reverse=True)))


def read(text):
  return [LEXICON[m[0]] for m in READER.finditer(text)]


def met(constraints, objects):
  """Whether the objects, in this order, are as wanted and clearly stand to each other as they should."""
  return (all(v in (None, getattr(o, k)) for w, o in zip(constraints.objects, objects) for k, v in vars(w).items()) and
          all(language.clearly(r, *(objects[k] for k in (i, *others))) for i, r, *others in constraints.relations))


def test_casual_requests_say_exactly_their_constraints():
  """Each value is named, nothing else is, shapes are counted, and the scene meets what is said."""
  rng = np.random.default_rng(2)
  done, forms = 0, collections.Counter()
  while done < 1500:
    asked = casual.request(rng, random_scene(rng, wide=True))
    if not asked:
      continue
    done += 1
    scene, constraints, text = asked
    grounds = [*(constraints.background.colours if constraints.background else ())]
    found = read(text)
    for ground in grounds:  # the background's colours may be names of object colours too
      for name in ground.split():
        if ('colour', name) in found:
          found.remove(('colour', name))
    wanted = {(k, v) for w in constraints.objects for k, v in vars(w).items() if v}
    assert set(found) == wanted, (text, constraints)
    assert all(re.search(rf'\b{ground}\b', text) for ground in grounds)
    assert language.parse(language.describe(constraints)) == language.in_canonical_order(constraints)
    assert any(met(constraints, order) for order in itertools.permutations(scene.objects)), (text, scene)
    assert len(constraints.objects) == len(scene.objects)
    forms['relation'] += bool(constraints.relations)
    forms['between'] += any(r[1] == 'between' for r in constraints.relations)
    forms['one'] += bool(re.search(r'\bone\b', text))
    forms['bare'] += not re.search(r'\b(an?|one|two|three|the)\b', text)
    forms['ground'] += bool(grounds)
  assert min(forms.values()) > 60, forms


HELDOUT = [re.compile(pattern) for pattern in (
    r' of \S+ size\b', r'\b(?:in the colou?r) (?!of)', r'there should be an? .* at', r'all in front of',
    r'drawn on top of', r'^with an? .* background, ', r'^now ', r'^i would like', r'^a drawing that shows',
    r'could i get an image', r'what i need',
    r'picture should have', r'nothing else', r'^let (?:it|the) .*become', r'^the new (?:size|colou?r) of',
    r'trade their', r'and put it', r'^let there be', r'what is missing', r'everything except',
    r'^set it all', r'to the place of', r'left and right change sides')]


def test_casual_language_keeps_off_the_phrasings_of_the_tests():
  for task in ('t2i', 'edit'):
    casually = [e['instruction'].lower() for i in range(1200)
                if (e := wide(task, i, images=False))['style'] == 'casual']
    assert len(casually) > 400
    for text in casually:
      assert not any(pattern.search(text) for pattern in HELDOUT), text
  heldout = {t for templates in (prompts.FRAMES, prompts.GROUNDS, prompts.THINGS) for t in templates['heldout']}
  assert not heldout & {t.replace('{}', '{things}').replace('{g}', '{ground}') for t in
                        (*casual.FRAMES, *casual.GROUND_FIRST, *casual.GROUND_LAST)}
  for kind, templates in casual.INSTRUCTIONS.items():
    assert not set(templates) & set(edits.INSTRUCTIONS[kind][1])


@pytest.mark.parametrize('kind, attribute', [('recolour', 'colour'), ('refill', 'fill'), ('replace', 'shape'),
                                             ('add', 'shape')])
def test_casual_instructions_name_what_is_new(kind, attribute):
  rng = np.random.default_rng(3)
  done = 0
  while done < 150:
    edit = edits.random_edit(rng, random_scene(rng, wide=True), kind, 'casual', wide=True)
    if not edit:
      continue
    done += 1
    new, = (o for o in edit.target.objects if o not in edit.source.objects)
    text = edit.instruction.lower().replace('gray', 'grey').replace('color', 'colour').replace('centre', 'center')
    values = {v for a, v in read(text) if a == attribute}
    assert getattr(new, attribute) in values or attribute == 'colour' and 'colour of' in text or \
        re.search('fill|outline|stripe|colour in', text) or _misspelt(text), (text, edit)


def _misspelt(text):
  known = casual.vocabulary() | {'please', 'change', 'colour', 'should', 'where', 'stead', 'place', 'another'}
  return any(w not in known for w in re.findall('[a-z]{4,}', text))


def test_slips_change_letters_and_not_words():
  rng = np.random.default_rng(4)
  text = 'two yellow circles with a striped star between them'
  outcomes = [casual.slips(rng, text) for _ in range(3000)]
  same = [t.lower().rstrip('.! ') == text for t in outcomes]
  assert 0.93 < np.mean(same) < 0.97
  changed = {w for t in outcomes for w in t.lower().rstrip('.! ').split()} - set(text.split())
  assert changed and not changed & casual.vocabulary()
  assert any(t[0].isupper() for t in outcomes) and not any(t.isupper() for t in outcomes)
  assert any(casual.slips(rng, 'two yellow circles').isupper() for _ in range(200))


@pytest.mark.parametrize('kind', [k for kinds in WIDE_KINDS.values() for k in kinds])
def test_wide_examples_of_several_references_name_their_images(kind):
  rng = np.random.default_rng(5)
  ways = set()
  for _ in range(12):
    e = random_multi(rng, 2 if kind in WIDE_KINDS[2] else 3, kind=kind, wide=True)
    assert (e.target in e.references) == (kind == 'choose') and visible(e.target)
    text = e.instruction.lower()
    assert '{' not in text and 'none' not in text
    ways |= {way for way in ('first', '1', 'two', 'with the', '2', 'second') if way in text}
    if kind == 'merge':
      assert set(e.target.objects) == {o for s in e.references for o in s.objects}
  assert len(ways) > 2


# --- looks

def test_inks_and_papers_go_by_their_names():
  """Nearest in plain RGB among the usual colours too, but for what is near two of them to begin with."""
  for papers, palette in ((False, world.COLOURS), (True, world.WIDE_BACKGROUND_COLOURS)):
    for name in palette:
      variants = looks.variants(name, papers)
      assert len(set(variants)) > 30 or name == 'white'
      distance = {other: np.linalg.norm(np.array(variants, float) - rgb, axis=-1) for other, rgb in palette.items()}
      own = distance.pop(name)
      assert own.max() < 210 and np.median(min(distance.values(), key=np.median) - own) > 0, name


@pytest.mark.parametrize('shape', world.SHAPES)
def test_outlines_leave_a_hole_and_solid_shapes_none(shape):
  rng = np.random.default_rng(6)
  for size, fill in itertools.product(world.SIZES, world.FILLS):
    scene = Scene((Object(shape, 'black', size, fill, 0.5, 0.5),), WHITE)
    solid = render(Scene((Object(shape, 'black', size, 'solid', 0.5, 0.5),), WHITE)).astype(float)
    full = (255 - solid).sum()
    for _ in range(12):
      look = looks.random_look(rng, scene)
      image = looks.draw(scene, looks.Look(hands=look.hands))
      share = (255 - image.astype(float)).sum() / full
      assert share > 0.8 if fill == 'solid' else share < 0.93, (shape, size, fill, look)
      y, x = np.nonzero(image[..., 0] < 200)
      assert np.hypot(x - 31.5, y - 31.5).max() < world.SIZES[size] * 64 * 1.18 + 1


def test_a_look_without_a_hand_is_the_usual_drawing():
  rng = np.random.default_rng(7)
  for _ in range(10):
    scene = random_scene(rng, wide=True)
    np.testing.assert_array_equal(looks.draw(scene, looks.Look()), render(scene))


def test_an_edit_keeps_the_look_of_its_reference_but_for_the_camera():
  rng = np.random.default_rng(8)
  kinds = collections.Counter()
  for kind in edits.EDIT_KINDS * 12:
    source = random_scene(rng, (2, 4), wide=True)
    edit = edits.random_edit(rng, source, kind, wide=True)
    if not edit:
      continue
    look = looks.random_look(rng, source)
    after = look.after(source, edit.target)
    assert after.camera == looks.Camera()
    image = looks.draw(edit.target, after)
    assert not look.hands or len(after.hands) == len(edit.target.objects)
    if kind in ('recolour', 'resize', 'remove', 'add', 'replace', 'refill', 'move'):
      clean = looks.draw(source, looks.Look(look.paper, look.inks, look.hands))
      touched = np.zeros((64, 64), bool)
      y, x = np.mgrid[:64, :64] + 0.5
      for o in {*source.objects} ^ {*edit.target.objects}:
        touched |= np.hypot(x - 64 * o.x, y - 64 * o.y) < 64 * world.SIZES[o.size] * 1.2 + 2
      assert (image == clean).all(-1)[~touched].all(), (kind, edit)
      kinds[kind] += 1
    if kind == 'mirror' and source.background.kind == 'plain' and not after.paper and look.hands:
      upright = looks.draw(source, looks.Look(look.paper, look.inks, look.hands)).astype(int)
      assert np.abs(upright[:, ::-1] - image).mean() < 2.5
      kinds[kind] += 1
  assert len(kinds) == 8


def test_only_references_are_photographed():
  grainy = 0
  for i in range(200):
    e = wide('reconstruct', i)
    scene = Scene.from_json(e['scene'])
    corner = e['target'][:3].reshape(-1, 3).astype(int)
    if scene.background.kind == 'plain' and all(o.y > 0.45 for o in scene.objects):
      assert (corner == corner[0]).all()
      reference = e['references'][0][:3].reshape(-1, 3).astype(int)
      grainy += bool((reference != reference[0]).any())
  assert grainy > 2


# --- the judge, and what image tokens show

def test_wide_targets_are_read_exactly():
  rng = np.random.default_rng(9)
  scenes = [random_scene(rng, aspect=str(rng.choice(list(world.ASPECTS))), wide=True) for _ in range(200)]
  assert sum(judge.exact(judge.read(render(s), wide=True), s) for s in scenes) >= 198
  for i in range(25):
    e = wide('t2i', i)
    asked = language.constraints_from_json(e['constraints'])
    assert judge.check(judge.read(e['target'], wide=True), asked)['all'], e['instruction']
  assert judge.read(render(Scene((), WHITE))).background is None


def test_tokens_of_tiles_are_the_cells_of_a_finer_grid():
  rng = np.random.default_rng(10)
  for _ in range(10):
    scene = random_scene(rng, wide=True)
    fine = image_tokens.nearest_objects(scene, 8).reshape(2, 4, 2, 4).swapaxes(1, 2).ravel()
    tiled = image_tokens.nearest_objects(scene, 4, (2, 2))
    np.testing.assert_array_equal(tiled[:64], fine)
    np.testing.assert_array_equal(tiled[64:], image_tokens.nearest_objects(scene, 4))
    np.testing.assert_array_equal(image_tokens.dense_attributes(scene, 4, (2, 2))[64:],
                                  image_tokens.dense_attributes(scene, 4))
  assert len(image_tokens.cells(4, (3, 2))) == (6 + 1) * 16 and len(image_tokens.cells(4)) == 16


def test_dense_attributes_say_what_is_drawn_where():
  scene = Scene((Object('star', 'red', 'large', 'solid', 0.25, 0.25), Object('ring', 'blue', 'small',
                                                                             'outlined', 0.8, 0.7)),
                Background('gradient', ('white', 'sky')))
  for grid, side in (((1, 1), 8), ((3, 2), 4)):
    table, cells = image_tokens.dense_attributes(scene, side, grid), image_tokens.cells(side, grid)
    assert table.shape == (len(cells), image_tokens.COLUMNS)
    for row, (x, y, width, height) in zip(table, cells):
      near = [o for o in scene.objects if abs(o.x - x) <= width / 2 and abs(o.y - y) <= height / 2]
      if near:
        assert row[0] == 1 and image_tokens.ATTRIBUTES[0][1][int(row[1])] == near[0].shape
      if row[0]:
        centre = (x + row[5] * width, y + row[6] * height)
        assert any(np.allclose(centre, (o.x, o.y), atol=1e-4) for o in scene.objects)
    assert {image_tokens.BACKGROUNDS[int(k)] for k in table[0, 8:]} == {'white', 'sky'}
  rows = image_tokens.all_dense_attributes([scene, scene], [(2, 1), (1, 1)], 4, 80)
  assert rows.shape == (80, image_tokens.COLUMNS) and (rows[64:, 0] == -1).all() and (rows[:64, 0] >= 0).all()


def test_grounding_marks_the_tokens_of_what_an_edit_changes():
  source = Scene((Object('star', 'red', 'medium', 'solid', 0.2, 0.2), Object('ring', 'blue', 'small',
                                                                             'solid', 0.8, 0.8)),
                 WHITE)
  target = Scene((source.objects[0], Object('ring', 'green', 'small', 'solid', 0.8, 0.8)), WHITE)
  marked = image_tokens.grounding(source, target, 4, (2, 2))
  np.testing.assert_array_equal(marked, image_tokens.nearest_objects(source, 4, (2, 2)) == 1)
  assert marked[48:64].any() and not marked[:16].any()


def test_grounding_of_several_images_marks_what_the_result_takes():
  """Objects that it has, moved and recoloured ones too, and the image whose background it has."""
  star, ring = Object('star', 'red', 'medium', 'solid', 0.2, 0.2), Object('ring', 'blue', 'small', 'solid', 0.8, 0.8)
  one, two = Scene((star, ring), WHITE), Scene((Object('heart', 'red', 'small', 'solid', 0.5, 0.5),), SKY)
  grids = [(1, 1), (1, 1)]

  def taken(target):
    marked = image_tokens.taken([one, two], target, grids, 4).reshape(2, 16)
    shown = [image_tokens.nearest_objects(scene, 4) for scene in (one, two)]
    return [{int(i) for i in which[marks]} for which, marks in zip(shown, marked)], [
        {int(i) for i in which[~marks]} for which, marks in zip(shown, marked)]
  moved = dataclasses.replace(star, x=0.8, y=0.2)
  assert taken(Scene((moved, two.objects[0]), SKY)) == ([{0}, {-1, 0}], [{-1, 1}, set()])  # -1: no object
  green = tuple(dataclasses.replace(o, colour='green') for o in one.objects)
  assert taken(Scene(green, WHITE)) == ([{-1, 0, 1}, set()], [set(), {-1, 0}])


# --- what was written and drawn by hand

def meeting(constraints: Constraints, rng) -> Scene:
  """A scene that meets the constraints."""
  background = constraints.background or Background('plain', ('cream',))
  while True:
    placed = []
    for wanted in constraints.objects:
      values = {'shape': world.SHAPES, 'colour': tuple(world.COLOURS), 'size': ('small', 'medium'), 'fill': world.FILLS}
      drawn = [getattr(wanted, k) or v[rng.integers(len(v))] for k, v in values.items()]
      obj = place_object(rng, *drawn, placed, 'square', wanted.place)
      if obj is None or not stands_out(obj.colour, background):
        break
      placed.append(obj)
    if len(placed) == len(constraints.objects) and all(
        language.clearly(r, *(placed[k] for k in (i, *others))) for i, r, *others in constraints.relations):
      return Scene(tuple(placed), background)


@pytest.mark.parametrize('record', handwritten.prompts(), ids=lambda r: r['instruction'])
def test_descriptions_of_handwritten_prompts_can_be_drawn_and_judged(record):
  constraints = language.parse(record['caption'])
  assert language.describe(constraints) == record['caption']
  assert language.constraints_from_json(record['constraints']) == constraints
  scene = meeting(constraints, np.random.default_rng(len(record['instruction'])))
  assert judge.check(judge.read(render(scene), wide=True), constraints)['all']


def test_drawings_show_what_is_said_of_them():
  records = handwritten.drawings(128)
  assert len(records) >= 20 and len({r['caption'] for r in records}) == len(records)
  for record in records + handwritten.edits(128):
    scene = Scene.from_json(record['scene'] or record['source'][0])
    assert visible(scene) and language.caption(scene) == record['caption']
    assert judge.exact(judge.read(render(scene), wide=True), scene)
    image = record['target'] if record['scene'] else record['references'][0]
    for o in scene.objects:  # ink where the object is, or paper inside of an outline
      y, x = (int(v * 128) for v in (o.y, o.x))
      window = image[max(y - 24, 0):y + 24, max(x - 24, 0):x + 24].reshape(-1, 3).astype(float)
      assert np.linalg.norm(window - world.COLOURS[o.colour], axis=-1).min() < 60, (record['caption'], o)


def test_nothing_written_by_hand_is_trained_on():
  for text, _ in handwritten.PROMPTS:
    assert handwritten.is_kept(text) and handwritten.is_kept(text.upper() + ' !')
  assert handwritten.is_kept('Gray ring, in the center.') and not handwritten.is_kept('a grey ring at the center')
  for task, i in itertools.product(('t2i', 'rewrite', 'edit'), range(700)):
    assert not handwritten.is_kept(wide(task, i, images=False)['instruction'])


def test_wide_examples_hold_nothing_held_out():
  for task, i in itertools.product(('t2i', 'edit', 'caption', 'multi'), range(150)):
    e = wide(task, i, images=False)
    assert not any(map(splits.scene_is_heldout, scenes_of(e)))
    if e['constraints']:
      assert not splits.constraints_are_heldout(language.constraints_from_json(e['constraints']))
