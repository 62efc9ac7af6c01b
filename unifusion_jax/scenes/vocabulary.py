"""Words of the language of scenes for `remarks`, as remarks.json in the embedded VLM's folder.

  python -m unifusion_jax.scenes.vocabulary --out=unifusion_jax/assets/tiny/vlm
"""

import collections
import difflib
import json
import pathlib

from absl import app, flags

from unifusion_jax import wording
from unifusion_jax.scenes import examples, words, world

SHAPES = ('shape', 'object', 'thing')  # any shape
SEEN = 3  # a word of fewer training requests is a slip of casual.py, and so is one like a word before it ...
OFTEN = 40  # ... unless it occurs more often than this
TASKS = ('rewrite', 'edit', 'multi')


def kinds() -> dict[str, dict[str, list[str]]]:
  """{kind: {value: phrases}} for `wording.Vocabulary`."""
  colours = {name: (name, *words.COLOURS.get(name, ()), *words.MORE_COLOURS.get(name, ()),
                    *(fact.removeprefix('a ').removeprefix('an ').removeprefix('the ')
                      for fact in words.COLOUR_FACTS.get(name, ())),
                    *(f'{thing} coloured' for thing in words.COLOUR_FACTS_BEFORE.get(name, ())))
             for name in world.WIDE_BACKGROUND_COLOURS}
  shapes = {name: (*spoken, *words.MORE_SHAPES.get(name, ()),
                   *(f'{shape} {fact}' for fact in words.SHAPE_FACTS[name] for shape in ('shape', 'shapes')))
            for name, spoken in words.SHAPES.items()}
  tables = dict(
      colour=colours, shape=shapes | {'': SHAPES},
      size={name: (*spoken, *words.MORE_SIZES[name]) for name, spoken in words.SIZES.items()},
      fill={name: (*spoken, *words.FILLS_AFTER[name], *words.MORE_FILLS[name])
            for name, spoken in words.FILLS_BEFORE.items()},
      place={name: (name, *spoken, *words.MORE_PLACES[name]) for name, spoken in words.PLACES.items()},
      count={str(n): [f'as {fact}' for fact in facts] for n, facts in words.COUNT_FACTS.items()})
  return {kind: {value: list(dict.fromkeys(phrases)) for value, phrases in table.items()}
          for kind, table in tables.items()}


def build(folder: str, count: int = 8000) -> None:
  """Writes remarks.json, with the words of the first `count` training requests of each task that no table has."""
  phrases = wording.Vocabulary(kinds()).phrases
  seen = collections.Counter()
  for task in TASKS:
    for i in range(count):
      request = examples.example(task, 'train', i, images=False, wide=True)['instruction']
      seen.update({item.text for item in wording.read(request, phrases) if item.kind == 'word'})
  known, others = [], [word for listed in phrases.values() for words, *_ in listed for word in words]
  for word, times in seen.most_common():
    if times >= SEEN and word.isalpha() and (
        times > OFTEN or not difflib.get_close_matches(word, known + others, 1, 0.8)):
      known.append(word)
  # An image of scenes has at most four objects
  contents = dict(kinds=kinds(), shades={}, words=sorted(known), most=4)
  (pathlib.Path(folder) / wording.FILE).write_text(json.dumps(contents, indent=0) + '\n')


if __name__ == '__main__':
  # Defined here, so that programs with a flag of the same name may import this module
  flags.DEFINE_string('out', None, 'folder to write', required=True)
  app.run(lambda _: build(flags.FLAGS.out))
