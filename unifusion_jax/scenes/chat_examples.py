"""Training examples of the embedded VLM: a chat, and the labels of its image tokens."""

import dataclasses
from typing import Any

import jax
import numpy as np

from unifusion_jax.data import imaging, transforms
from unifusion_jax.errors import BrokenRecord
from unifusion_jax.scenes import image_tokens, world


@dataclasses.dataclass(frozen=True)
class ChatExample:
  """Chat examples: input ids and the tokens to write, in as many turns as the budget allows.

  input_ids [s] i32, attention_mask [s] bool; predict [w] i32, positions before a token to write; targets [w] i32, these
  tokens; target_mask [w] bool. With images also tiles and attributes [n COLUMNS] f32 of the n image tokens
  (`image_tokens.dense_attributes`, -1 for padding); for edits, also of several images, grounding [n] bool and places
  [n] i32, where in input_ids the image tokens are.
  """
  prompts: transforms.PromptEncoder

  def __call__(self, record: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    del rng
    references, prompts = record['references'], self.prompts.with_tiles(record.get('tiles', 0))
    tiles, counts = prompts.image_processor.preprocess(references, len(references))
    chat, task = prompts.chat, record['task']
    spans = chat.spans(record['instruction'], counts, record['caption'], system(task))
    length, (_, budget) = prompts.lengths(len(references), task)[0], prompts.budget(task)
    for question, answer in record.get('more', ()):
      longer = spans + chat.add_turn(question, answer)
      if _tokens(longer) > length or _tokens(longer, ('written', 'stop')) > budget:
        break
      spans = longer
    example = prompts.arrays(spans, len(references), task)
    positions = np.flatnonzero(example.pop('written'))
    if len(positions) > budget:
      raise BrokenRecord(f'an answer of {len(positions)} tokens does not fit the {budget} of data.max_rewrite_tokens')
    padding = (0, budget - len(positions))
    example = dict(input_ids=example['input_ids'], attention_mask=example['attention_mask'],
                   predict=np.pad(positions - 1, padding).astype(np.int32),
                   targets=np.pad(example['input_ids'][positions], padding),
                   target_mask=np.pad(np.ones(len(positions), bool), padding))
    if counts:
      example['tiles'] = tiles
      scenes = [world.Scene.from_json(scene) for scene in record['source']]
      processor: Any = prompts.image_processor  # TiledImages: the embedded VLM's
      grids = [imaging.tile_grid(*reference.shape[:2], processor.tile, processor.tiles) for reference in references]
      n = len(references) * processor.max_tokens
      example['attributes'] = image_tokens.all_dense_attributes(scenes, grids, self._side, n)
      if _is_edit(task):
        target = world.Scene.from_json(record['scene'])
        marks = (image_tokens.grounding(scenes[0], target, self._side, grids[0]) if len(scenes) == 1 else
                 image_tokens.taken(scenes, target, grids, self._side))
        places = np.flatnonzero(example['input_ids'] == chat.image_id)
        example['grounding'], example['places'] = (
            np.pad(each, (0, n - len(each))).astype(kind) for each, kind in ((marks, bool), (places, np.int32)))
    return example

  @property
  def _side(self) -> int:
    """Image tokens along each side of a tile."""
    processor: Any = self.prompts.image_processor
    return round(processor.tokens ** 0.5)

  def spec(self, height: int, width: int, references: int = 1, task: str = '') -> dict:
    """The shapes of one example of a task."""
    del height, width
    s, w = self.prompts.lengths(references, task)[0], self.prompts.budget(task)[1]
    n = references * self.prompts.image_processor.max_tokens
    shape = jax.ShapeDtypeStruct
    spec = dict(input_ids=shape((s,), np.int32), attention_mask=shape((s,), bool), predict=shape((w,), np.int32),
                targets=shape((w,), np.int32), target_mask=shape((w,), bool))
    if references:
      spec |= dict(tiles=self.prompts.image_processor.spec(references),
                   attributes=shape((n, image_tokens.COLUMNS), np.float32))
    if references and _is_edit(task):
      spec |= dict(grounding=shape((n,), bool), places=shape((n,), np.int32))
    return spec


def _tokens(spans, kinds=None) -> int:
  return sum(len(span.ids) for span in spans if kinds is None or span.kind in kinds)


def _is_edit(task: str) -> bool:
  return task.partition('/')[0] in ('edit', 'multi')


def system(task: str) -> str:
  """Name of the embedded VLM's system prompt for a task: 'answer' for questions and captions, else 'rewrite'."""
  return 'answer' if task.partition('/')[0] in ('question', 'caption') else 'rewrite'
