"""Remarks on what the embedded VLM writes: how often on a rewrite that is right, and how often on one that is wrong.

  python -m benchmarks.remarks                        # split test and the handwritten requests
  python -m benchmarks.remarks --split=train --show=5 # to look at single ones: the test split is for figures alone

A rewrite is right if it meets every constraint of the true caption. 'closed' has the VLM's own vocabulary, 'english' is
the light check that any other VLM gets. REQUESTS are outside of the VLM's language: each should end in a remark,
or in the warning that the rewrite is of no use.
"""

import itertools

from absl import app, flags
import jax

from unifusion_jax import UniFusionPipeline, wording
from unifusion_jax.remarks import remark
from unifusion_jax.request import Request
from unifusion_jax.scenes import examples, language
from unifusion_jax.scenes.evaluation import handwritten
from unifusion_jax.scenes.evaluation.language import answers

_SPLIT = flags.DEFINE_enum('split', 'test', ['train', 'test', 'heldout'], 'Of the examples.')
_EXAMPLES = flags.DEFINE_integer('examples', 200, 'Of each task.', lower_bound=1)
_SHOW = flags.DEFINE_integer('show', 0, 'Wrong remarks and missed rewrites to print of each group.', lower_bound=0)

REQUESTS = (
    '7 circles', 'seven red stars', 'five hearts on a mint background', '12 small triangles', 'a dozen rings',
    'no circle', 'a picture without circles', 'a star but no ring', 'ein roter Kreis', 'drei blaue Sterne',
    'ein grünes Dreieck oben links', 'un cercle rouge', 'dos estrellas azules', 'красный круг', 'a cat', 'a red cat',
    'two dogs', 'a house with a garden', 'the Eiffel tower at night', 'a portrait of an old man', 'a pentagon',
    'a green octagon', 'a magenta circle', 'a sign that says "hello"', 'the word “love” in red', "a star called 'Vega'",
    'a beige square', 'a spiral', 'a letter A', 'a sunset over the sea', 'sdfkj', '10 squares and 10 circles')

# Requests and rewrites as a large VLM writes them, all of them right, for the light check
PROMPTS = (
    ('an orange cat sleeping on a blue couch',
     'A ginger tabby cat is curled up asleep on a plush navy sofa, bathed in soft afternoon light.'),
    ('ten colorful hot air balloons over Cappadocia',
     'A flotilla of ten vibrant hot-air balloons drifts over the rocky spires of Cappadocia at sunrise.'),
    ('a pair of red shoes', 'A glossy pair of ruby-red leather shoes on a wooden floor.'),
    ('a golden retriever puppy', 'A fluffy golden retriever puppy with big eyes.'),
    ('green tea ceremony', 'A serene Japanese tea ceremony with a bowl of frothy matcha.'),
    ('a white rabbit and two brown foxes in a forest', 'In a lush forest, a snow-white rabbit faces two russet foxes.'),
    ('minimalist logo, no text',
     'A minimalist geometric logo in two tones on a plain field, without any lettering or text.'),
    ('a beach without tourists at sunset', 'A pristine, deserted beach glows under a pink sunset.'),
    ('the number 7 painted on a wall', 'A large number 7 painted in black on a brick wall.'),
    ('three-headed dragon', 'A fearsome dragon with three heads breathes fire.'),
    ('a poster with the title “Summer Nights”', "A vintage poster with the title 'SUMMER NIGHTS' in bold type."),
    ('a chessboard seen from above, all 32 pieces',
     'A top-down view of a chessboard with all 32 pieces in starting position.'),
    ('grey elephant with her 2 babies', 'An elephant mother with slate-coloured skin walks with two calves.'),
    ('two people shaking hands', 'A man and a woman in suits shake hands in an office.'),
    ('a purple house under a yellow sky', 'A whimsical violet cottage beneath a golden sky.'),
    ('3 red apples and 2 green pears', 'Three shiny red apples and two green pears on a table.'),
    ('a cube on top of a sphere', 'A wooden cube balanced on a polished sphere.'),
    ('a star-filled night sky', 'The Milky Way over a desert, countless stars.'),
    ('an oval mirror with a gold frame', 'An elliptical mirror in an ornate gilded frame.'),
    ('diamond ring on black velvet', 'A sparkling diamond ring on dark velvet.'),
    ('people at the red square in Moscow', "Visitors stroll across Red Square in Moscow beneath St. Basil's."),
    ('a room full of books, not dark', 'A bright library with shelves of books.'),
    ("a dog that isn't brown", 'A white dog with black spots.'),
    ('blue jeans and white sneakers', 'A pair of denim jeans and crisp white trainers.'),
    ('a single red rose', 'One crimson rose against a black background.'),
    ("5 o'clock shadow on a rugged man", 'A rugged man with stubble.'),
    ('24 hours of a city, four panels', 'Four panels show a city at dawn, noon, dusk and night.'),
    ('a triangle made of 6 blue dots', 'Six azure dots arranged in a triangular formation.'),
    ('a heart shaped cloud', 'A cloud in the form of a heart drifts by.'),
    ('six-pack of beer', 'A carton of beer cans.'))
EDITS = (
    ('change the color of the sofa from brown to dark green', 'A living room with a deep emerald sofa.'),
    ('make it night, with a full moon and no clouds',
     'The same harbour at night beneath a full moon, in a cloudless sky.'),
    ('remove all text from the green sign', 'A blank road sign.'),
    ('turn the photo into a black and white sketch', 'A monochrome pencil sketch of a woman.'),
    ('the dog should wear a purple collar instead of the red one', 'A dog wearing a violet collar.'),
    ('swap the colours of the two cars, red and blue', 'A blue car on the left and a red car on the right.'),
    ('put a white cat next to the black dog', 'A white cat sits beside a black dog.'),
    ('remove the two people on the left and fill with grass', 'A lawn with a bench.'),
    ('make the yellow taxi look rusty', 'A rusty old taxi on a street.'),
    ('add a sign that says "SOLD" in front of the white house', "A house with a 'SOLD' sign on the lawn."),
    ('make her hair red and her eyes green', 'A woman with auburn hair and emerald eyes.'),
    ('replace all red flowers by blue ones', 'A meadow of blue flowers.'),
    ('zoom out to show the whole green field', 'A wide field under the sky.'),
    ('delete the third person, keep the red balloon', 'Two people with a red balloon.'),
    ('convert to a square crop', 'A portrait of a man.'),
    ('make the square brighter', 'A town plaza in bright light.'),
    ('move the red ball behind the box', 'A box with a ball partly hidden behind it.'))


def holds(written: str, truth: str) -> bool:
  """Whether a rewrite meets the constraints of the true caption and has as many objects."""
  ours, theirs = language.parse(written), language.parse(truth)
  if ours is None or len(ours.objects) != len(theirs.objects) or theirs.background not in (None, ours.background):
    return False
  inverse = {'left of': 'right of', 'right of': 'left of', 'above': 'below', 'below': 'above'}

  def relations(constraints, names):
    for i, relation, *others in constraints.relations:
      yield relation, names[i], frozenset(names[j] for j in others)
      if relation in inverse:
        yield inverse[relation], names[others[0]], frozenset([names[i]])

  def meets(order):
    fit = all(getattr(wanted, name) in (None, getattr(ours.objects[i], name))
              for i, wanted in zip(order, theirs.objects) for name in ('shape', 'colour', 'size', 'fill', 'place'))
    return fit and set(relations(theirs, order)) <= set(relations(ours, range(len(order))))
  return any(map(meets, itertools.permutations(range(len(ours.objects)))))


def report(name: str, records: list[dict], written: list[str], vocabularies: dict) -> None:
  right = [holds(text, record['caption']) for text, record in zip(written, records)]
  line = f'{name:22} {sum(right):4} right, {len(right) - sum(right):4} wrong'
  for check, vocabulary in vocabularies.items():
    remarks = [remark(record['instruction'], text, len(record['references']), vocabulary)
               for text, record in zip(written, records)]
    false, hits = (sum(bool(r) for r, fine in zip(remarks, right) if fine == which) for which in (True, False))
    line += f';  {check}: {false} remarks on right ones, {hits} on wrong ones'
  print(line)
  closed = [remark(record['instruction'], text, len(record['references']), vocabularies['closed'])
            for text, record in zip(written, records)]
  odd = [i for i, fine in enumerate(right) if fine == bool(closed[i])]
  for i in sorted(odd, key=lambda i: not right[i])[:_SHOW.value]:
    print(f'  {"right" if right[i] else "wrong"}: {records[i]["instruction"]} -> {written[i]}\n    {closed[i]}')


def main(argv):
  del argv
  pipe = UniFusionPipeline.from_pretrained('tiny')
  vocabularies = dict(closed=pipe.vocabulary, english=wording.Vocabulary.of())
  groups = {}
  for task, name in (('rewrite', 't2i'), ('edit', 'edit')):
    for wide in (False, True) if _SPLIT.value == 'train' else (False,):
      groups[f'{_SPLIT.value} {name}{" wide" * wide}'] = [
          examples.example(task, _SPLIT.value, i, wide=wide) for i in range(_EXAMPLES.value)]
  if _SPLIT.value != 'train':
    groups |= {'handwritten prompts': handwritten.prompts(), 'handwritten edits': handwritten.edits(64)}
  for name, records in groups.items():
    with jax.set_mesh(pipe.mesh):
      report(name, records, answers(pipe.frozen.vlm, pipe.prompt_encoder, records, 32), vocabularies)
  pairs = [(*pair, 0) for pair in PROMPTS] + [(*pair, 1) for pair in EDITS]
  false = [pair for pair in pairs if remark(*pair)]
  print(f'elaborate rewrites     {len(false)} remarks on {len(pairs)} right ones, english', *false[:_SHOW.value])
  encoded = pipe.encode([Request(text) for text in REQUESTS])
  print(f'outside the language   {sum(map(bool, encoded.remarks))} of {len(REQUESTS)} end in a remark, '
        f'{sum(map(bool, encoded.warnings))} in a warning')
  for text, written, *notes in zip(REQUESTS, encoded.rewrites, encoded.remarks, encoded.warnings):
    print(f'  {text} -> {written}\n    {"".join(notes)}')


if __name__ == '__main__':
  app.run(main)
