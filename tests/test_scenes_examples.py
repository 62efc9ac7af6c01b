"""Examples are pure functions of their numbers, hold-outs are held out, and every instruction means one thing."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest

from unifusion_jax.scenes import language, splits, words
from unifusion_jax.scenes.composition import fits, random_scene
from unifusion_jax.scenes.constraints import Constraints, RELATIONS
from unifusion_jax.scenes.edits import Edit, EDIT_KINDS, random_edit
from unifusion_jax.scenes.examples import aspect, example, references, TASKS, WORDS
from unifusion_jax.scenes.multi import MULTI_KINDS, random_multi
from unifusion_jax.scenes.pointing import EXTREMES, Pointer, random_pointer, resolve
from unifusion_jax.scenes.questions import NUMBERS, QUESTION_KINDS, random_question
from unifusion_jax.scenes.render import render
from unifusion_jax.scenes.world import Background, canvas, Object, Scene

POINTING = ('recolour', 'resize', 'move', 'remove', 'replace', 'refill', 'swap')


def scenes_of(e: dict) -> list[Scene]:
  return [Scene.from_json(text) for text in e['source'] + [e['scene']] * bool(e['scene'])]


def changed(edit: Edit) -> list[int]:
  """Indices in the source of the objects that are not in the target."""
  return [i for i, o in enumerate(edit.source.objects) if o not in edit.target.objects]


def any_of(table: dict) -> str:
  return '|'.join(sorted((w for phrases in table.values() for w in phrases), key=len, reverse=True))


VALUE = {w: value for table in (words.SIZES, words.FILLS_BEFORE, words.COLOURS, words.SHAPES, words.PLACES,
                                words.RELATIONS) for value, phrases in table.items() for w in phrases}
POINTER = re.compile(
    rf'[Tt]he (?:({"|".join(EXTREMES)}) )?(?:({any_of(words.SIZES)}) )?(?:({any_of(words.FILLS_BEFORE)}) )?'
    rf'(?:({any_of(words.COLOURS)}) )?({any_of(words.SHAPES)}|shape|object)\b(?! used)'
    rf'(?: ({any_of(words.PLACES)}))?(?: ({any_of(words.RELATIONS)})(?= the ))?')


def read_pointer(text: str, at: int = 0) -> tuple[Pointer, int] | None:
  """The first noun phrase from `at` on, as a stranger would read it, and where it ends."""
  found = POINTER.search(text, at)
  if not found:
    return None
  extreme, *rest = found.groups()
  size, fill, colour, shape, place, relation = (w and VALUE.get(w) for w in rest)
  anchor, end = read_pointer(text, found.end()) if relation else (None, found.end())
  second, end = read_pointer(text, end) if relation == 'between' else (None, end)
  return Pointer(shape, colour, size, fill, place, extreme, relation, anchor, second), end


@pytest.mark.parametrize('task', TASKS)
def test_examples_are_pure_and_complete(task):
  for split, i in itertools.product(splits.SPLITS, (0, 11)):
    e, again = example(task, split, i), example(task, split, i)
    assert repr(e) == repr(again)
    assert all(np.array_equal(a, b) for a, b in zip(e['references'], again['references']))
    assert example(task, split, i, seed=1)['caption'] != e['caption'] or task == 'question'
    assert set(e) == {'task', 'references', 'instruction', 'caption', 'target', 'kind', 'style', 'source', 'scene',
                      'constraints'} | ({'more'} if (task, split) == ('question', 'train') else set())
    assert e['task'] == task and e['instruction'] and e['caption'] and e['kind']
    for image, text in zip(e['references'], e['source'], strict=True):
      np.testing.assert_array_equal(image, render(Scene.from_json(text), 64))
    if task in ('caption', 'question', 'rewrite'):
      assert e['target'] is None and not e['scene']
    else:
      np.testing.assert_array_equal(e['target'], render(Scene.from_json(e['scene']), 64))
      assert language.describe(language.constraints_from_json(e['constraints'])) == e['caption']
    assert len(e['references']) in {'t2i': (0,), 'rewrite': (0,), 'multi': (2, 3)}.get(task, (1,))
    assert len(e['references']) == references(task, split, i)
    bare = example(task, split, i, images=False)
    assert (bare['references'], bare['target']) == ([], None)
    assert {k: bare[k] for k in ('instruction', 'caption', 'scene')} == {k: e[k] for k in (
        'instruction', 'caption', 'scene')}


@pytest.mark.parametrize('task', TASKS)
def test_aspect_tells_the_shape_of_the_image(task):
  seen = set()
  for i in range(60):
    e, said = example(task, 'test', i, size=32), aspect(task, 'test', i)
    seen.add(said)
    image = e['target'] if e['target'] is not None else next(iter(e['references']), None)
    if image is not None:
      assert image.dtype == np.uint8 and image.shape == (*canvas(said, 32)[::-1], 3)
  assert seen == {'square', 'wide', 'tall'}


def test_the_number_of_objects_can_be_chosen():
  for objects, i in itertools.product((1, 2, 3, 4), range(10)):
    for task, split in itertools.product(('t2i', 'rewrite'), splits.SPLITS):
      e = example(task, split, i, objects=objects, images=False)
      assert len(json.loads(e['constraints'])['objects']) == objects


def test_unknown_tasks_and_splits_are_refused():
  with pytest.raises(ValueError, match='splits train, test, heldout'):
    example('t2i', 'validation', 0)
  with pytest.raises(ValueError, match='tasks are t2i, edit'):
    aspect('inpaint', 'train', 0)


def heldout_things(task: str, e: dict) -> list[str]:
  """All held-out things that an example shows or names."""
  found = [f'object in {s.to_json()}' for s in scenes_of(e) if splits.scene_is_heldout(s)]
  if e['constraints'] and splits.constraints_are_heldout(language.constraints_from_json(e['constraints'])):
    found.append('constraints')
  text = ' | '.join([e['instruction'], e['caption'], *(text for turn in e.get('more', ()) for text in turn)])
  found += [f'name {triple}' for triple in splits.HELDOUT_OBJECTS
            if re.search(rf'\b{triple[2]} {triple[1]} {triple[0]}', text)]
  at = 0
  while read := read_pointer(text, at):
    pointer, at = read
    if pointer.relation and (pointer.shape, pointer.relation, pointer.anchor.shape) in splits.HELDOUT_RELATIONS:
      found.append(f'relation {pointer}')
  if task == 'edit':
    source, target = scenes_of(e)
    before, after = (target, source) if e['kind'] == 'add' else (source, target)
    found += [f'edit {e["kind"]} {o.shape}' for o in before.objects
              if o not in after.objects and (e['kind'], o.shape) in splits.HELDOUT_EDITS]
  return found


@pytest.mark.slow
@pytest.mark.parametrize('task', TASKS)
def test_heldout_things_occur_in_heldout_only(task):
  count = 150 if task == 'multi' else 700
  for i in range(count):
    for split in ('train', 'test'):
      e = example(task, split, i, images=False)
      assert not heldout_things(task, e), e
    if i < count // 4:
      e = example(task, 'heldout', i, images=False)
      assert heldout_things(task, e), e


def test_heldout_lists_are_what_they_say():
  assert len(splits.HELDOUT_OBJECTS) == len(set(splits.HELDOUT_OBJECTS)) == 24
  rng = np.random.default_rng(0)
  forms = {'objects': 0, 'relations': 0, 'edits': 0}
  for i in range(150):
    forms['objects'] += any(map(splits.scene_is_heldout, scenes_of(example('t2i', 'heldout', i, images=False))))
    e = example('rewrite', 'heldout', i, images=False)
    forms['relations'] += bool(json.loads(e['constraints'])['relations'])
    forms['edits'] += any(f.startswith('edit') for f in heldout_things('edit', example(
        'edit', 'heldout', i, images=False)))
  assert min(forms.values()) > 15
  assert splits.scene_is_heldout(splits.with_heldout_object(rng, random_scene(rng)))


@pytest.mark.parametrize('kind', EDIT_KINDS)
def test_edits_do_what_they_say_and_nothing_else(kind):
  rng = np.random.default_rng(1)
  made = 0
  while made < 120:
    source = random_scene(rng, allowed=splits.allowed('train'))
    edit = random_edit(rng, source, kind, style=('paraphrase', 'heldout')[made % 2])
    if not edit:
      continue
    made += 1
    target = edit.target
    assert edit.source == source != target and fits(target.objects, target.aspect), edit
    whole = kind in ('background', 'mirror', 'aspect')
    if not whole:
      assert target.background == source.background and target.aspect == source.aspect
      assert len(target.objects) - len(source.objects) == {'add': 1, 'remove': -1}.get(kind, 0)
      assert len(changed(edit)) == {'add': 0, 'swap': 2}.get(kind, 1), edit
    else:
      assert (target.objects == source.objects) == (kind != 'mirror')
      assert (target.background == source.background) == (kind != 'background')
      assert (target.aspect == source.aspect) == (kind != 'aspect')
    if kind in POINTING:
      before, after = (scene.objects for scene in (source, target))
      fields = {'recolour': {'colour'}, 'resize': {'size'}, 'refill': {'fill'}, 'move': {'x', 'y'},
                'swap': {'x', 'y'}, 'replace': {'shape', 'colour'}, 'remove': set()}[kind]
      if kind != 'remove':
        differ = {k for a, b in zip(before, after) for k in vars(a) if getattr(a, k) != getattr(b, k)}
        assert differ and differ <= fields


@pytest.mark.parametrize('kind', POINTING)
def test_instructions_point_at_one_object_only(kind):
  """A reader who knows the words but not who wrote them finds the same object, and only that one."""
  rng = np.random.default_rng(2)
  forms, made = set(), 0
  while made < 250:
    style = 'heldout' if made % 3 == 0 else 'paraphrase'
    edit = random_edit(rng, random_scene(rng), kind, style, split='heldout')
    if not edit:
      continue
    made += 1
    text = edit.instruction
    if kind == 'move':  # The last place is where to.
      ends = [w.split(' ', 1)[1] if w.startswith(('at', 'in')) else w for ws in words.PLACES.values() for w in ws]
      end = max((e for e in ends if text.rstrip('.?').endswith(e)), key=len)
      text = text.rstrip('.?').removesuffix(end)
    pointer, at = read_pointer(text)
    meant = [resolve(pointer, edit.source)]
    if kind == 'swap':
      meant.append(resolve(read_pointer(text, at)[0], edit.source))
    assert sorted(meant) == [(i,) for i in changed(edit)], edit
    forms |= {k for k, v in vars(pointer).items() if v}
  assert {'shape', 'colour', 'size', 'fill', 'place', 'extreme'} <= forms
  assert kind == 'swap' or 'relation' in forms


def test_resolver_knows_close_calls():
  def ring(x, y, colour='red'):
    return Object('ring', colour, 'small', 'solid', x, y)

  apart = Scene((ring(0.2, 0.2), ring(0.8, 0.25, 'blue')), Background('plain', ('mint',)))
  assert resolve(Pointer(shape='ring'), apart) == (0, 1)
  assert resolve(Pointer(shape='ring', colour='blue'), apart) == (1,)
  assert resolve(Pointer(extreme='leftmost'), apart) == (0,) and resolve(Pointer(extreme='topmost'), apart) == ()
  assert resolve(Pointer(relation='right of', anchor=Pointer(colour='red')), apart) == (1,)
  assert resolve(Pointer(relation='below', anchor=Pointer(colour='red')), apart) == ()
  assert resolve(Pointer(relation='above', anchor=Pointer(shape='ring')), apart) == ()
  three = dataclasses.replace(apart, objects=(*apart.objects, ring(0.5, 0.3, 'green')))
  between = Pointer(relation='between', anchor=Pointer(colour='blue'), second=Pointer(colour='red'))
  assert resolve(between, three) == (2,)
  assert resolve(dataclasses.replace(between, second=Pointer(shape='ring')), three) == ()
  assert resolve(dataclasses.replace(between, second=Pointer(colour='blue')), three) == ()
  twins = dataclasses.replace(apart, objects=(ring(0.2, 0.2), ring(0.25, 0.25)))
  assert random_pointer(np.random.default_rng(0), twins, 0) is None


def test_added_and_moved_objects_have_a_place_of_their_own():
  rng = np.random.default_rng(3)
  for kind in ('add', 'move'):
    made = 0
    while made < 100:
      edit = random_edit(rng, random_scene(rng), kind)
      if edit:
        made += 1
        new, = (o for o in edit.target.objects if o not in edit.source.objects)
        assert [o.place for o in edit.target.objects].count(new.place) == 1


@pytest.mark.parametrize('kind', [k for kinds in MULTI_KINDS.values() for k in kinds])
def test_several_references_make_the_target(kind):
  rng = np.random.default_rng(4)
  count = 2 if kind in MULTI_KINDS[2] else 3
  for _ in range(25):
    made = random_multi(rng, count, kind=kind)
    assert len(made.references) == count and made.kind == kind
    assert made.target not in made.references and fits(made.target.objects, made.target.aspect)
    assert made.target.background in [r.background for r in made.references]
    given = [o for r in made.references for o in r.objects]
    stand = {(o.shape, o.size, o.fill) for o in given}
    assert all((o.shape, o.size, o.fill) in stand for o in made.target.objects)
    assert {o.colour for o in made.target.objects} <= {o.colour for o in given}
    sources = [k for k, r in enumerate(made.references) if any(o in r.objects for o in made.target.objects)]
    if kind in ('insert', 'insert two'):
      assert set(made.target.objects) <= set(given) and len(sources) == count
      assert any(set(r.objects) < set(made.target.objects) for r in made.references)
    if kind in ('colours', 'restyle'):
      assert len({o.colour for o in made.target.objects}) == 1
    if kind == 'collage':
      assert len(made.target.objects) == 2 and set(made.target.objects) <= set(given)
    assert '{' not in made.instruction and 'None' not in made.instruction


def shown(description: str, scene: Scene) -> bool:
  """Whether some order of the objects makes the description true, by trying them all."""
  wanted = language.parse(description)
  if wanted.background not in (None, scene.background) or len(wanted.objects) != len(scene.objects):
    return False
  return any(fits_all(wanted, order) for order in itertools.permutations(scene.objects))


def fits_all(wanted: Constraints, objects) -> bool:
  """Whether the objects, in this order, are as wanted and stand to each other as they should."""
  return (all(v in (None, getattr(o, k)) for w, o in zip(wanted.objects, objects) for k, v in vars(w).items()) and
          all(language.clearly(r, *(objects[k] for k in (i, *others))) for i, r, *others in wanted.relations))


def attributes_of(o) -> tuple[str, ...]:
  return o.shape, o.colour, o.size, o.fill, o.place


def attributes(answer: str) -> list[tuple[str, ...]]:
  """What an answer says of each object it describes."""
  return [] if answer == 'nothing' else [attributes_of(w) for w in language.parse(answer).objects]


@pytest.mark.parametrize('kind', QUESTION_KINDS)
def test_answers_are_right_and_yes_is_as_common_as_no(kind):
  rng = np.random.default_rng(5)
  said, spoken = [], set()
  for _ in range(400):
    scene = random_scene(rng)
    text, answer, asked = random_question(rng, scene, kind)
    if asked != kind:  # A scene of one object has no relations.
      continue
    said.append(answer)
    if kind == 'shows':
      description = text.removeprefix('does this picture show ').removesuffix('?')
      assert shown(description, scene) == (answer == 'yes'), (text, scene)
    if kind == 'relation':
      read, at = read_pointer(text)
      others = [read.anchor, read.second]
      first = dataclasses.replace(read, relation=None, anchor=None, second=None)
      said_of = [resolve(pointer, scene) for pointer in (first, *filter(None, others))]
      assert all(len(meant) == 1 for meant in said_of), (text, scene)
      assert language.clearly(read.relation, *(scene.objects[k] for k, in said_of)) is (answer == 'yes'), (text, scene)
      spoken.add(read.relation)
    if kind == 'has':
      asking = r'(?:is anything|is there a shape|are there any|can you see any) (?:at the )?(.*?)(?: shapes)?\?'
      said_of = re.fullmatch(asking, text)[1]
      there = any(said_of in (v, language.plural(v)) for o in scene.objects for v in attributes_of(o))
      assert there == (answer == 'yes'), (text, scene)
    if kind == 'what':
      asking = r'(?:what|which) (?:shape |shapes )?(?:is |are )?(?:at the )?(.*?)(?: are there| can you see)?\?'
      value = re.fullmatch(asking, text)[1]
      wanted = [attributes_of(o) for o in scene.objects if value in (*attributes_of(o), language.plural(o.shape))]
      assert sorted(attributes(answer)) == sorted(wanted), (text, scene)
    if kind == 'which':
      meant, = resolve(read_pointer(text)[0], scene)
      assert attributes(answer) == [attributes_of(scene.objects[meant])], (text, scene)
    if kind == 'beside':
      found = re.match(rf'(?:what is|which shapes are) ({any_of(words.RELATIONS)}) (?=the )', text)
      relation, (anchor,) = VALUE[found[1]], resolve(read_pointer(text, found.end())[0], scene)
      there = [o for k, o in enumerate(scene.objects)
               if k != anchor and language.clearly(relation, o, scene.objects[anchor])]
      assert sorted(attributes(answer)) == sorted(map(attributes_of, there)), (text, scene)
      spoken.add(relation)
    if kind == 'wrong':
      claimed = re.fullmatch(r'what is wrong here: (.*)\?|the picture shows (.*): what is wrong\?|'
                             r'what should be different in this: (.*)\?', text)
      claimed, = filter(None, claimed.groups())
      assert shown(claimed, scene) == (answer == 'nothing'), (text, scene)
      if answer != 'nothing' and language.parse(answer):  # what should have been said is true, and was not said
        right = language.parse(answer)
        orders = itertools.permutations(scene.objects, len(right.objects))
        assert any(fits_all(right, order) for order in orders), (text, answer)
        assert not set(answer.split(', ')) <= set(claimed.split(', ')), (text, answer)
      elif answer != 'nothing':
        assert answer == language.background_phrase(scene.background) and answer not in claimed, (text, answer)
    if kind == 'exists':
      wanted, = language.parse(re.search(r'\ban? .*?(?= in the picture\?|\?)', text)[0]).objects
      there = any(all(v in (None, getattr(o, k)) for k, v in vars(wanted).items()) for o in scene.objects)
      assert there == (answer == 'yes'), (text, scene)
    if kind == 'count':
      value = text.split('how many ')[1].split(' ')[0]
      count = sum(value.rstrip('s') in (v, str(v).rstrip('s')) or value == 'crosses' and v == 'cross'
                  for o in scene.objects for v in vars(o).values())
      assert answer == NUMBERS[len(scene.objects) if value in ('shapes', 'objects') else count], (text, scene)
    if kind in ('colour', 'shape', 'size', 'fill'):
      found = resolve(read_pointer(text)[0], scene)
      assert len(found) == 1 and getattr(scene.objects[found[0]], kind) == answer, (text, scene)
    if kind == 'where':
      found = resolve(read_pointer(text)[0], scene)
      assert [f'at the {scene.objects[i].place}' for i in found] == [answer], (text, scene)
  assert len(said) > 100
  assert kind != 'relation' or spoken == set(RELATIONS)
  assert kind != 'beside' or spoken == set(RELATIONS) - {'between'}
  if kind in ('has', 'shows', 'exists', 'relation', 'compare'):
    assert 0.35 < said.count('yes') / len(said) < 0.65


def test_prompts_stay_short():
  assert all(len(example('t2i', 'train', i, images=False)['instruction'].split()) <= WORDS for i in range(300))


def test_test_prompts_are_half_heldout_language():
  styles = [example(task, 'test', i, images=False)['style'] for task in ('t2i', 'edit') for i in range(150)]
  assert 0.4 < styles.count('heldout') / 300 < 0.6
  assert 'heldout' not in {example(task, 'train', i, images=False)['style'] for task in ('t2i', 'edit')
                           for i in range(200)}
