"""The canonical language is exact in both directions, and every prompt carries just what its constraints say."""

from collections import Counter
import itertools
import re

import numpy as np
import pytest

from unifusion_jax.scenes import language, prompts, words
from unifusion_jax.scenes.composition import random_background, random_scene
from unifusion_jax.scenes.constraints import Constraints, RELATIONS, Wanted
from unifusion_jax.scenes.edits import EDIT_KINDS, INSTRUCTIONS
from unifusion_jax.scenes.world import (
  ASPECTS,
  Background,
  BACKGROUND_COLOURS,
  BACKGROUND_KINDS,
  COLOURS,
  FILLS,
  Object,
  PLACES,
  Scene,
  SHAPES,
  SIZES,
)

SCENE = Scene(
    (Object('circle', 'red', 'large', 'solid', 0.5, 0.5), Object('star', 'blue', 'small', 'striped', 0.2, 0.2)),
    Background('plain', ('cream',)))


def random_constraints(rng) -> Constraints:
  """Any constraints that can be said, likelier to be odd than those of a real scene."""
  def wanted(place: float) -> Wanted:
    said = [values[rng.integers(len(values))] if rng.random() < p else None for values, p in
            ((SHAPES, 0.9), (tuple(COLOURS), 0.8), (tuple(SIZES), 0.5), (FILLS, 0.5), (PLACES, place))]
    return Wanted(*said)

  count, background = int(rng.integers(1, 5)), random_background(rng) if rng.random() < 0.5 else None
  if count > 1 and rng.random() < 0.3:
    relation = RELATIONS[rng.integers(5 if count > 2 else 4)]
    joined = 2 + (relation == 'between')
    at = int(rng.integers(count - joined + 1))
    return Constraints(tuple(wanted(0) for _ in range(count)), background,
                       relations=((at, relation, *range(at + 1, at + joined)),))
  place = float(rng.integers(3)) / 2
  objects = [wanted(place) for _ in range(count)]
  if rng.random() < 0.3:
    objects[-1] = objects[0]
  return Constraints(tuple(objects), background)


def test_caption_says_the_scene():
  assert language.caption(SCENE) == ('a small striped blue star at the top left, a large solid red circle at the '
                                     'center, on a cream background')
  two_grounds = [language.background_phrase(Background(kind, ('cream', 'mint'))) for kind in BACKGROUND_KINDS[1:]]
  assert two_grounds == ['a background fading from cream to mint', 'a cream and mint checkered background']


def test_caption_parses_back_to_the_whole_scene():
  rng = np.random.default_rng(0)
  for aspect in itertools.islice(itertools.cycle(ASPECTS), 600):
    scene = random_scene(rng, aspect=aspect)
    parsed = language.parse(language.caption(scene))
    assert parsed == language.full_description(scene)
    assert language.describe(parsed) == language.caption(scene)


def test_describe_and_parse_are_inverse():
  rng = np.random.default_rng(1)
  for _ in range(4000):
    constraints = random_constraints(rng)
    text = language.describe(constraints)
    parsed = language.parse(text)
    assert parsed == language.in_canonical_order(constraints), text
    assert language.describe(parsed) == text
    assert language.constraints_from_json(language.constraints_to_json(constraints)) == constraints


def test_likes_are_counted():
  circle = Wanted('circle', 'red')
  assert language.describe(Constraints((circle,) * 3)) == 'three red circles'
  cross = Wanted('cross', None, 'small', None, 'center')
  assert language.parse('two small crosses at the center').objects == (cross, cross)
  assert language.parse('five red circles') is None


@pytest.mark.parametrize('text', [
    '', 'hello', 'red circle', 'a circle red', 'an red circle', 'a red circle and a blue star', 'two red circle',
    'a red circle at the left', 'a red circle, on a teal background', 'on a cream background', 'a red circle, ',
    'a red circle left of two blue stars', 'a red circle left of a star above a ring', 'A red circle',
    'a star, on a orange background',
    'a red circle on a cream background', 'a red circle, on a background fading from cream'])
def test_other_sentences_do_not_parse(text):
  assert language.parse(text) is None


def test_relations_that_cannot_be_said_are_refused():
  objects = tuple(Wanted('circle', c) for c in ('red', 'blue', 'green'))
  for relations in (((0, 'above', 2),), ((1, 'above', 0),), ((0, 'above', 1), (1, 'above', 2)), ((0, 'between', 1),),
                    ((0, 'between', 2, 1),), ((0, 'above', 1, 2),)):
    with pytest.raises(ValueError, match='reorder the objects'):
      language.describe(Constraints(objects, relations=relations))


def test_constraints_of_a_scene_are_true_of_it():
  rng = np.random.default_rng(2)
  seen = Counter()
  for _ in range(1500):
    scene = random_scene(rng)
    constraints = language.constraints_of(scene, rng)
    left = list(scene.objects)
    for wanted in sorted(constraints.objects, key=lambda w: sum(v is None for v in vars(w).values())):
      match = next(o for o in left if all(v in (None, getattr(o, k)) for k, v in vars(wanted).items()))
      left.remove(match)
      assert wanted.shape and wanted.colour
    assert not left
    assert constraints.background in (None, scene.background)
    seen['full'] += constraints == language.full_description(scene)
    seen['relation'] += bool(constraints.relations)
    for i, relation, *others in constraints.relations:
      seen[relation] += 1
      # With objects that share a description, any of them may be the one that is meant.
      meant = [constraints.objects[k] for k in (i, *others)]
      choices = [chosen for chosen in itertools.permutations(scene.objects, len(meant)) if all(
          v in (None, getattr(o, k)) for w, o in zip(meant, chosen) for k, v in vars(w).items())]
      assert any(language.clearly(relation, *chosen) for chosen in choices)
  assert 0.35 < seen['full'] / 1500 < 0.5 and seen['relation'] > 30 and seen['between']


@pytest.mark.parametrize('x, y, truth', [
    (0.5, 0.5, True), (0.4, 0.55, True), (0.5, 0.7, None), (0.25, 0.5, None), (0.5, 0.9, False), (0.05, 0.5, False),
    (0.95, 0.5, False)])
def test_between_is_clear_or_not_said(x, y, truth):
  ends = [Object('ring', 'red', 'small', 'solid', at, 0.5) for at in (0.15, 0.85)]
  middle = Object('star', 'blue', 'small', 'solid', x, y)
  assert language.clearly('between', middle, *ends) is language.clearly('between', middle, *reversed(ends)) is truth


def lexicon() -> dict[str, tuple[str, object]]:
  """Phrase -> what it says, for reading prompts without knowing their grammar."""
  said = {}

  def add(attribute, table, pattern='{}'):
    for value, phrases in table.items():
      for text in phrases:
        text = pattern.format(text)
        assert said.setdefault(text, (attribute, value)) == (attribute, value), f'{text!r} says two things'

  add('size', words.SIZES)
  add('size', {'medium': ('mid size',)})
  add('fill', words.FILLS_BEFORE)
  add('fill', words.FILLS_AFTER)
  add('colour', words.COLOURS)
  add('colour', words.COLOUR_FACTS, 'the colour of {}')
  add('colour', words.COLOUR_FACTS_BEFORE, '{}-coloured')
  add('shape', words.SHAPES)
  add('shape', {shape: [words.plural(n) for n in nouns] for shape, nouns in words.SHAPES.items()})
  add('shape', words.SHAPE_FACTS, 'shape {}')
  add('shape', words.SHAPE_FACTS, 'shapes {}')
  add('place', words.PLACES)
  add('relation', words.RELATIONS)
  add('count', prompts.COUNTED)
  add('count', words.COUNT_FACTS, 'as {}')
  add('ground', {c: (c,) for c in BACKGROUND_COLOURS})
  add('kind', {'gradient': ('fading from', 'going from', 'a gradient from')})
  add('kind', {'checkered': ('checkered', 'checkerboard')})
  return said


LEXICON = lexicon()
# Longest first, so that a fact is not read as the words in it.
READER = re.compile('|'.join(rf'(?<![\w-]){re.escape(p)}(?![\w-])' for p in sorted(LEXICON, key=len, reverse=True)))


def read(text: str) -> list[tuple[str, object]]:
  lowered = text[0].lower() + text[1:]
  return [LEXICON[m[0]] for m in READER.finditer(lowered)]


def expected(constraints: Constraints) -> Counter:
  """What a prompt must say, and how often."""
  said = Counter()
  for wanted, count in language.grouped(language.in_canonical_order(constraints)):
    said.update((k, v) for k, v in vars(wanted).items() if v)
    said.update([('count', count)] * (count > 1))
  said.update(('relation', relation) for _, relation, *_ in constraints.relations)
  if constraints.background:
    said.update(('ground', c) for c in constraints.background.colours)
  return said


@pytest.mark.parametrize('style', prompts.STYLES)
def test_prompts_say_exactly_the_constraints(style):
  rng = np.random.default_rng(3)
  for _ in range(1500):
    scene = random_scene(rng)
    constraints = language.constraints_of(scene, rng)
    if rng.random() < 0.2:
      constraints = Constraints((Wanted(scene.objects[0].shape, scene.objects[0].colour),) * int(rng.integers(2, 5)))
    text = prompts.prompt(constraints, rng, style)
    found = read(text)
    assert Counter(t for t in found if t[0] != 'kind') == expected(constraints), text
    kinds = {value for attribute, value in found if attribute == 'kind'}
    background = constraints.background or Background('plain', ())
    assert kinds == (set() if background.kind == 'plain' else {background.kind}), text
    assert tuple(v for a, v in found if a == 'ground') == background.colours
    places = [w.place for w in constraints.objects]
    if constraints.relations or not all(places) or len(set(places)) < len(places):
      groups = language.grouped(language.in_canonical_order(constraints))
      assert [v for a, v in found if a == 'shape'] == [w.shape for w, _ in groups], text


def test_prompts_are_functions_of_their_arguments():
  constraints = language.full_description(SCENE)
  for style in prompts.STYLES:
    one, other = (prompts.prompt(constraints, np.random.default_rng(7), style) for _ in range(2))
    assert one == other
  assert len({prompts.prompt(constraints, np.random.default_rng(i), 'paraphrase') for i in range(50)}) > 40
  with pytest.raises(ValueError, match='no prompt style'):
    prompts.prompt(constraints, np.random.default_rng(0), 'rhyme')


def test_knowledge_prompts_name_facts():
  rng = np.random.default_rng(4)
  for _ in range(300):
    constraints = language.constraints_of(random_scene(rng), rng)
    text = prompts.prompt(constraints, rng, 'knowledge')
    assert re.search(r'the colour of|-coloured|shapes? |as many', text), text


def test_every_value_has_words_and_facts():
  for table, values in ((words.SHAPES, SHAPES), (words.COLOURS, COLOURS), (words.SIZES, SIZES), (words.PLACES, PLACES),
                        (words.FILLS_BEFORE, FILLS), (words.FILLS_AFTER, FILLS), (words.RELATIONS, RELATIONS),
                        (words.BACKGROUNDS, BACKGROUND_KINDS)):
    assert set(table) == set(values) and all(table.values())
  for facts, values in ((words.SHAPE_FACTS, SHAPES), (words.COLOUR_FACTS, COLOURS), (words.COUNT_FACTS, (2, 3, 4))):
    assert set(facts) == set(values) and all(len(set(f)) >= 3 for f in facts.values())


def test_no_fact_stands_for_two_things():
  for table in (words.SHAPE_FACTS, words.COLOUR_FACTS, words.COLOUR_FACTS_BEFORE, words.COUNT_FACTS):
    phrases = [p for facts in table.values() for p in facts]
    assert len(phrases) == len(set(phrases))


def test_heldout_templates_are_disjoint_from_those_of_training():
  for table in (prompts.THINGS, prompts.FRAMES, prompts.GROUNDS):
    trained = {t for name, templates in table.items() if name != 'heldout' for t in templates}
    assert table['heldout'] and not trained & set(table['heldout'])
  assert set(INSTRUCTIONS) == set(EDIT_KINDS)
  for trained, heldout in INSTRUCTIONS.values():
    assert heldout and not set(trained) & set(heldout)
