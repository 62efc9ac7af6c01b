"""Remarks on what the embedded VLM writes: how often on a rewrite that is right, and how often on one that is wrong.

  python -m benchmarks.remarks                        # split test and the handwritten requests
  python -m benchmarks.remarks --split=train --show=5 # to look at single ones: the test split is for figures alone

A rewrite is right if it meets every constraint of the true caption. 'closed' has the VLM's own vocabulary, 'english' is
the light check that any other VLM gets. REQUESTS are outside of the VLM's language: each should end in a remark.
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
  encoded = pipe.encode([Request(text) for text in REQUESTS])
  print(f'outside the language   {sum(map(bool, encoded.remarks))} of {len(REQUESTS)} end in a remark')
  for text, written, note in zip(REQUESTS, encoded.rewrites, encoded.remarks):
    print(f'  {text} -> {written}\n    {note}')


if __name__ == '__main__':
  app.run(main)
