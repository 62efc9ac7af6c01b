"""Remarks: what is missing is named, and a rewrite that is right is let be."""

import random

import jax
import pytest

from unifusion_jax import config, sharding, wording
from unifusion_jax.errors import UserError
from unifusion_jax.pipeline import UniFusionPipeline
from unifusion_jax.remarks import remark
from unifusion_jax.request import Request
from unifusion_jax.scenes import examples, vocabulary

SCENES = wording.Vocabulary.of(config.ASSETS / 'vlm')

# Plain English: (request, rewrite, remark)
PROMPTS = [
    ('7 red circles', 'Three purple circles on white.', 'asked for and not written: red, 7 red circles (3 written)'),
    ('two cats', 'A cat sleeps on a sofa.', 'asked for and not written: two cats (1 written)'),
    ('three cats on a sofa', 'A black cat, a tabby cat and a white kitten share a sofa.', ''),
    ('two dogs', 'A retriever and a husky romp through the snow.', ''),
    ('4 friends', 'Two men and two women hike along a ridge.', ''),
    ('a dozen eggs', 'Twelve brown eggs in a carton.', ''),
    ('a dozen eggs', 'Ten eggs in a carton.', 'asked for and not written: a dozen eggs (10 written)'),
    ('six apples', 'Half a dozen apples in a bowl.', ''),
    ('a two-storey house at 7 pm, version 2', 'A tall house at dusk.', ''),
    ('one of the three musketeers', 'A musketeer in a feathered hat.', ''),
    ('a red car', 'A blue car on a road.', 'asked for and not written: red'),
    ('a red car, a violet sky', 'A crimson car under a purple sky.', ''),
    ('a gray wall', 'A grey wall.', ''),
    ('the White House in winter', "The president's residence under snow.", ''),
    ('a hexagon', 'A pentagon.', 'asked for and not written: hexagon'),
    ('a circle of stones', 'A ring of standing stones.', ''),
    ('a street with no people', 'A street full of people.', 'not wanted and written: people'),
    ('a street with no people', 'A deserted street without people or cars.', ''),
    ('a room without windows', 'A room with a large window.', 'not wanted and written: windows'),
    ('no more rain, a logo with no background', 'Rain on a plain background.', ''),
    ('a sign "OPEN 24 hours"', "A neon sign that reads 'Open, 24 Hours'.", ''),
    ('a sign “OPEN”', 'A sign that says CLOSED.', 'asked for and not written: "OPEN"'),
    ('a red logo', 'A logo in "red".', ''),
    ("a sign 'OPEN'", 'A blank sign.', 'asked for and not written: "OPEN"'),
    ("rock 'n' roll, the dogs' toys and a 5'10\" man", 'A band on stage.', ''),
    ('ein roter Kreis', 'A red circle.', ''),  # the VLM may know German
]
EDITS = [
    ('make the red circle blue', 'A blue circle.', ''),
    ('make the red circle blue', 'A red circle.', 'asked for and not written: blue'),
    ('remove the man in the red shirt', 'An empty bench.', ''),
    ('replace the white cat with a black star', 'A black star on a sofa.', ''),
    ('replace the white cat with a black star', 'A cat on a sofa.', 'asked for and not written: black, star'),
    ('a black hat instead of the red one', 'A man with a black hat.', ''),
    ('swap the red cat and the white dog', 'A dog on the left, a cat on the right.', ''),
    ('remove the glasses and make the shirt green', 'A man with glasses.', 'asked for and not written: green'),
    ('add two birds', 'Five birds in a blue sky.', ''),
    ('change "OPEN" to "CLOSED"', 'A door with a sign: "Closed".', ''),
    ('change "OPEN" to "CLOSED"', 'A door with a sign: "OPEN".', 'asked for and not written: "CLOSED"'),
]
# The embedded VLM's language
MOST = ', and an image of this VLM has at most 4 objects)'
SCENE_PROMPTS = [
    ('7 circles', 'three purple circles', f'asked for and not written: 7 circles (3 written{MOST}'),
    ('no circle', 'a green circle', 'not wanted and written: circle'),
    ('ein roter Kreis', 'a ring', 'unknown to this VLM: ein, roter, kreis'),
    ('a cat', 'a red heart', 'unknown to this VLM: cat'),
    ('two red stars', 'two red stars, a blue star', ''),  # more than asked for of another kind
    ('two stars', 'three stars', 'asked for and not written: two stars (3 written)'),
    ('a red star and a blue one', 'a red star, a blue star', ''),
    ('a red star and a blue circle', 'a blue star, a red circle', 'asked for and not written: red star, blue circle'),
    ('a star in the upper left corner', 'a star at the top left', ''),
    ('a star at the top left', 'a star at the top right',
     'asked for and not written: star at the top left'),
    ('a shape like a coin in the colour of a ripe tomato', 'a red circle', ''),
    ('as many tiny rings as a car has wheels', 'four small rings', ''),
    ('a white star on a grey background', 'a white star, on a sky background',
     'asked for and not written: grey background'),
    ('a gray star on a red backdrop', 'a red star, on a grey background',
     'asked for and not written: grey star, red background'),
    ('a red star and "hi"', 'a red star', 'asked for and not written: "hi"'),
    ('a red trinagle', 'a red triangle', ''),
]
SCENE_EDITS = [
    ('make the red circle blue', 'a small solid blue circle at the center, on a mint background', ''),
    ('make the circle blue', 'a small solid red circle at the center, on a blue background',
     'asked for and not written: circle blue'),
    ('remove the red ring', 'a small solid red ring at the center, on a mint background',
     'not wanted and written: red ring'),
    ('remove the ring left of the star', 'a small solid red ring at the center, on a mint background', ''),
    ('use a square canvas', 'a small solid red ring at the center, on a mint background', ''),
    ('swap the ring for a big star', 'a large solid red star at the center, on a mint background', ''),
    ('add a cat', 'a large solid red star at the center, on a mint background', 'unknown to this VLM: cat'),
    ('move it to the top left', 'a large solid red star at the center, on a mint background',
     'asked for and not written: top left'),
]


@pytest.mark.parametrize('references, known, cases', [
    (0, None, PROMPTS), (1, None, EDITS), (0, SCENES, SCENE_PROMPTS), (1, SCENES, SCENE_EDITS)])
def test_what_is_missing_is_named_and_nothing_else(references, known, cases):
  remarks = {case: remark(*case[:2], references, known) for case in cases}
  assert remarks == {case: case[2] for case in cases}


@pytest.mark.parametrize('task, references', [('t2i', 0), ('edit', 1), ('multi', 2)])
def test_requests_of_the_world_and_their_captions_end_in_none(task, references):
  records = [examples.example(task, 'train', i, images=False) for i in range(60)]
  assert [remark(r['instruction'], r['caption'], references, SCENES) for r in records] == [''] * 60
  if task == 't2i':  # and another caption ends in one
    others = [r['caption'] for r in records[1:] + records[:1]]
    assert all(remark(r['instruction'], other, 0, SCENES) for r, other in zip(records, others))


def test_any_text_can_be_read():
  rng = random.Random(0)
  parts = ['7', ' ', 'no ', "'", '"', '“', 'red', '-', 'circles', '\n', 'ß', '²', '٣', '. ', 'instead of ', 'a ']
  texts = [''.join(rng.choices(parts, k=rng.randrange(12))) for _ in range(300)]
  for request, written in zip(texts, reversed(texts)):
    for references, known in ((0, None), (1, None), (0, SCENES), (2, SCENES)):
      assert isinstance(remark(request, written, references, known), str)


def test_the_shipped_words_are_those_of_the_world(tmp_path):
  assert SCENES.kinds == vocabulary.kinds() and SCENES.most == 4
  vocabulary.build(tmp_path, 20)
  assert wording.Vocabulary.of(tmp_path).words <= SCENES.words and not wording.Vocabulary.of().closed
  assert wording.Vocabulary.of(tmp_path / 'none') == wording.Vocabulary.of()


def test_a_broken_file_of_words_is_named(tmp_path):
  for i, text in enumerate(('{', '[]', '{"kinds": {}}')):
    (tmp_path / str(i)).mkdir()
    (tmp_path / str(i) / wording.FILE).write_text(text)
    with pytest.raises(UserError, match=f'{i}/{wording.FILE} must hold'):
      wording.Vocabulary.of(tmp_path / str(i))


@pytest.mark.slow
def test_the_embedded_vlm_turns_seven_circles_into_others_and_the_sample_says_so():
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=4, fsdp=2))):
    pipe = UniFusionPipeline.from_pretrained('tiny')
  asked = ['7 circles', 'no circle', 'two red circles', '7 circles']
  given = [None, None, None, 'a red star']
  encoded = pipe.encode([Request(text, rewrite=rewrite) for text, rewrite in zip(asked, given)])
  assert encoded.remarks[0].startswith('asked for and not written: 7 circles (') and '4 objects' in encoded.remarks[0]
  assert encoded.remarks[1:] == ['not wanted and written: circle', '', '']
  result = pipe(asked[:2], steps=1, guidance=1.0)
  assert result.remarks == encoded.remarks[:2] == [metadata['remark'] for metadata in result.metadata]
  assert pipe.encode([Request('7 circles')], pipe.settings.changed(verifi=False)).remarks == ['']
