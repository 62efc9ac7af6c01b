"""Training examples of the embedded VLM: a chat, and what each of its image tokens should know of the scene."""

import dataclasses

import jax
import numpy as np

from unifusion_jax.data import transforms
from unifusion_jax.errors import BrokenRecord
from unifusion_jax.scenes import world

# The classes of the dense attributes, with the names that each counts by
ATTRIBUTES = (('shape', world.SHAPES), ('colour', tuple(world.COLOURS)), ('size', tuple(world.SIZES)),
              ('fill', world.FILLS))
COLUMNS = 9  # of `dense_attributes`


@dataclasses.dataclass(frozen=True)
class ChatExample:
  """Examples for the VLM's own training: a chat and the tokens it has to write, in as many turns as its budget allows.

  input_ids [s] i32, attention_mask [s] bool; predict [w] i32, the places whose next token is to be written, targets [w]
  i32, target_mask [w] bool; with images also tiles and attributes [n 9] f32 (`dense_attributes`), n image tokens; for
  edits grounding [n] bool.
  """
  prompts: transforms.PromptEncoder

  def __call__(self, record: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    del rng
    references = record['references']
    tiles, counts = self.prompts.image_processor.preprocess(references, len(references))
    chat, task = self.prompts.chat, record['task']
    spans = chat.spans(record['instruction'], counts, record['caption'], system(task))
    length, (_, most) = self.prompts.lengths(len(references), task)[0], self.prompts.budget(task)
    for question, answer in record.get('more', ()):
      longer = spans + chat.add_turn(question, answer)
      if _tokens(longer) > length or _tokens(longer, ('written', 'stop')) > most:
        break
      spans = longer
    example = self.prompts.arrays(spans, len(references), task)
    places = np.flatnonzero(example.pop('written'))
    if len(places) > most:
      raise BrokenRecord(f'an answer of {len(places)} tokens does not fit the {most} of data.max_rewrite_tokens')
    padding = (0, most - len(places))
    example = dict(input_ids=example['input_ids'], attention_mask=example['attention_mask'],
                   predict=np.pad(places - 1, padding).astype(np.int32),
                   targets=np.pad(example['input_ids'][places], padding),
                   target_mask=np.pad(np.ones(len(places), bool), padding))
    if counts:
      example['tiles'] = tiles
      scenes = [world.Scene.from_json(scene) for scene in record['source']]
      example['attributes'] = np.concatenate([dense_attributes(scene, self._side) for scene in scenes])
      if _is_edit(task):
        example['grounding'] = grounding(scenes[0], world.Scene.from_json(record['scene']), self._side)
    return example

  @property
  def _side(self) -> int:
    """Image tokens along each side of a tile."""
    return round(self.prompts.image_processor.tokens ** 0.5)

  def spec(self, height: int, width: int, references: int = 1, task: str = '') -> dict:
    """The shapes of one example of a task."""
    del height, width
    s, w, n = self.prompts.lengths(references, task)[0], self.prompts.budget(task)[1], references * self._side ** 2
    shape = jax.ShapeDtypeStruct
    spec = dict(input_ids=shape((s,), np.int32), attention_mask=shape((s,), bool), predict=shape((w,), np.int32),
                targets=shape((w,), np.int32), target_mask=shape((w,), bool))
    if references:
      spec |= dict(tiles=self.prompts.image_processor.spec(references), attributes=shape((n, COLUMNS), np.float32))
    return spec | dict(grounding=shape((n,), bool)) if references and _is_edit(task) else spec


def _tokens(spans, kinds=None) -> int:
  return sum(len(span.ids) for span in spans if kinds is None or span.kind in kinds)


def _is_edit(task: str) -> bool:
  return task.partition('/')[0] == 'edit'


def system(task: str) -> str:
  """The system prompt (its name) under which the embedded VLM does a task: it answers, or describes what to draw."""
  return 'answer' if task.partition('/')[0] in ('question', 'caption') else 'rewrite'


def dense_attributes(scene: world.Scene, side: int) -> np.ndarray:
  """What each of side x side image tokens should know of the scene, row by row: [side^2 9] f32.

  Columns: covered (0 or 1), index of shape, colour, size and fill of the nearest object that touches the token's
  cell, that object's centre relative to the token's (x, y, in cells), background kind, background colours
  (upper and lower as one index, 6 x 6).
  """
  background = scene.background
  names = tuple(world.BACKGROUND_COLOURS)
  colours = [names.index(c) for c in (background.colours[0], background.colours[-1])]
  out = np.zeros((side, side, COLUMNS), np.float32)
  out[..., 7] = world.BACKGROUND_KINDS.index(background.kind)
  out[..., 8] = colours[0] * len(names) + colours[1]
  centres, which = (np.arange(side) + 0.5) / side, nearest_objects(scene, side)
  for i, o in enumerate(scene.objects):
    y, x = np.nonzero(which == i)
    out[y, x, :5] = [1.0, *(values.index(getattr(o, kind)) for kind, values in ATTRIBUTES)]
    out[y, x, 5], out[y, x, 6] = (o.x - centres[x]) * side, (o.y - centres[y]) * side
  return out.reshape(side * side, COLUMNS)


def nearest_objects(scene: world.Scene, side: int) -> np.ndarray:
  """The object of each of side x side image tokens [y x]: the nearest that touches the token's cell, -1 for none."""
  centres = (np.arange(side) + 0.5) / side
  which, best = np.full((side, side), -1), np.full((side, side), np.inf)
  for i, o in enumerate(scene.objects):
    rx, ry = world.radius(o.size, scene.aspect)
    dx, dy = np.abs(o.x - centres[None, :]), np.abs(o.y - centres[:, None])
    # Distance from the cell to the centre of the object, in its radii: below 1 they touch.
    touches = np.hypot(np.maximum(dx - 0.5 / side, 0) / rx, np.maximum(dy - 0.5 / side, 0) / ry) < 1
    distance = np.hypot(dx / rx, dy / ry)
    nearest = touches & (distance < best)
    which, best = np.where(nearest, i, which), np.where(nearest, distance, best)
  return which


def grounding(source: world.Scene, target: world.Scene, side: int) -> np.ndarray:
  """Whether each of side x side image tokens, row by row, shows an object that an edit changes: [side^2] bool."""
  changed = [o not in target.objects for o in source.objects]
  return np.array([*changed, False])[nearest_objects(source, side)].reshape(side * side)  # -1 is the last
