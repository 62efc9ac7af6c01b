"""From a raw record to the arrays of one training example: numpy functions on one example at a time.

A transform is called as `transform(record, rng)`; it is picklable, so worker processes can run it.
"""

import dataclasses
import functools
import threading

import numpy as np

from unifusion_jax import verifi
from unifusion_jax.data import imaging, sources, vision_inputs
from unifusion_jax.scenes import world
from unifusion_jax.weights import encoders, hub


@dataclasses.dataclass(frozen=True)
class PromptEncoder:
  """How images and text become the VLM's input, at one shape for each number of references.

  Attributes:
    folder: the VLM's folder, for its tokenizer.
    image_processor: how it is shown images.
    text: room in tokens for everything but images.  written: room for the written text and its stop token.
    rooms: (task, text, written) for tasks that have their own.
    system: the system prompt, a name in verifi.SYSTEM or a text.
  """
  folder: str
  image_processor: vision_inputs.ImageProcessor
  text: int
  written: int
  rooms: tuple[tuple[str, int, int], ...] = ()
  system: str = 'rewrite'

  @property
  def chat(self) -> verifi.Chat:
    return _chat(self.folder, self.image_processor.image_tokens)

  def in_tiles(self, tiles: int) -> 'PromptEncoder':
    """The same, showing each image in at most so many tiles (0: as it is)."""
    if not tiles or isinstance(self.image_processor, vision_inputs.NoImages):
      return self
    return dataclasses.replace(self, image_processor=dataclasses.replace(self.image_processor, tiles=tiles))

  def lengths(self, references: int, task: str = '') -> tuple[int, int]:
    """(s, q): tokens, and tokens that reach the DiT, that a prompt with so many references is padded to."""
    markers = sum(len(ids) for ids in self.chat.image_ends)
    text, written = self.room(task)
    return text + references * (self.image_processor.max_tokens + markers), written + references * self.image_processor.max_tokens

  def room(self, task: str = '') -> tuple[int, int]:
    """Tokens for text, and for written text, of a task."""
    return next((room for name, *room in self.rooms if name == task), (self.text, self.written))

  def fits(self, record: dict) -> bool:
    """Whether there is room for a request, and for an empty answer after it."""
    spans = self.chat.spans(record['instruction'] or record['caption'], (), '', self.system)
    return sum(len(span.ids) for span in spans) <= self.text

  def arrays(self, spans, references: int, task: str = '', kept=verifi.COND_VERIFI) -> dict[str, np.ndarray]:
    """`verifi.arrays` at the lengths for so many references; a record whose text is too long for them is a broken one."""
    try:
      return verifi.arrays(spans, *self.lengths(references, task), kept)
    except verifi.TooLong as error:
      raise sources.BrokenRecord(str(error)) from error


def prompt_encoder(config) -> PromptEncoder:
  """The layout of the frozen VLM of a config.Config: its folder says how it is shown images."""
  data, path = config.data, hub.resolve(config.vlm, weights=False)
  described = encoders.config(path)
  image_processor = vision_inputs.for_model(described, max(data.tiles), path)
  made = PromptEncoder(str(path), image_processor, max(data.max_prompt_tokens), max(data.max_rewrite_tokens), budgets(data), config.system)
  vision_inputs.check(described, made.chat)
  return made


def budgets(data) -> tuple[tuple[str, int, int], ...]:
  """The rooms of each task: of `max_prompt_tokens` and `max_rewrite_tokens`, which hold one number for all or one for each."""
  count = len(data.tasks)
  each = [numbers * count if len(numbers) == 1 else numbers for numbers in (data.max_prompt_tokens, data.max_rewrite_tokens)]
  return tuple(zip(data.tasks, *each))


@functools.cache
def _chat(folder: str, marks) -> verifi.Chat:
  with _LOADING:
    return verifi.Chat(folder, marks)


_LOADING = threading.Lock()  # the tokenizer's library does not bear being imported by two threads at once


@dataclasses.dataclass(frozen=True)
class GenerationExample:
  """Examples for the DiT: the target, and what the VLM reads and has written about it.

  What was written is one of the record's `rewrites` (ids, `rewrite.py`), drawn anew each time, or its caption. Where
  the VLM could write none the request itself is kept, as it is in sampling; the caption, where the request is too long.

  Attributes:
    layout: of the frozen VLM.
    cond_dropout: share of examples with the null condition, an empty text without images.
    image_dropout: share of examples with references that lose their image tokens.
    text_dropout: share of examples with references about which nothing is written: the answer is its stop token.
    instruction_prob: share of examples that keep the request itself instead of a rewritten one, as sampling without VERIFI does;
      a request longer than the room for written text stays rewritten.
    rewrite_online: leave the answer open for the VLM, and say of each example whether it is (`open`) and where the request
      itself stands (`asked`, `fallback_mask`), in case that nothing comes of it.
  """
  layout: PromptEncoder
  cond_dropout: float = 0.1
  image_dropout: float = 0.05
  text_dropout: float = 0.0
  instruction_prob: float = 0.0
  rewrite_online: bool = False

  def __call__(self, record: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    layout, task, references = self.layout.in_tiles(record.get('tiles', 0)), record.get('task', ''), record['references']
    seen, counts = layout.image_processor.preprocess(references, len(references))
    chat = layout.chat
    instruction = record['instruction'] or record['caption']
    chance, raw, part = rng.random(3)
    written, unwritten = record['caption'], False
    if 'rewrites' in record:
      unwritten = not record['rewrites']
      written = '' if unwritten else record['rewrites'][rng.integers(len(record['rewrites']))]
    kept, images = verifi.COND_VERIFI, counts
    if chance < self.cond_dropout:
      instruction, written, images = '', '', ()
    elif counts and part < self.image_dropout:
      kept = tuple(kind for kind in kept if kind != 'image')
    elif counts and part < self.image_dropout + self.text_dropout:
      written = ''
    elif unwritten or raw < self.instruction_prob:
      if len(chat.text_ids(instruction)) < layout.room(task)[1]:
        written, kept = '', verifi.COND_RAW
      elif unwritten:
        written = record['caption']
    still_open = self.rewrite_online and len(written) > 0
    if still_open:
      written = None
    spans = chat.spans(instruction, images, written, layout.system)
    example = layout.arrays(spans, len(references), task, kept)
    del example['written']
    if self.rewrite_online:
      example['needs_rewrite'] = np.array(still_open)
      asked = verifi.arrays(spans, len(example['input_ids']), layout.room(task)[0], ('instruction',))
      example['fallback_index'], example['fallback_mask'] = asked['cond_index'], asked['cond_mask']
    example['target'] = imaging.read(record['target']).astype(np.float32) / 127.5 - 1.0
    if counts:
      example['tiles'] = seen
    return example


@dataclasses.dataclass(frozen=True)
class ChatExample:
  """Examples for the VLM's own training: a chat and the tokens it has to write, in as many turns as there is room for.

  Adds to `verifi.arrays`: predict [w] i32, the places whose next token is to be written, targets [w] i32,
  target_mask [w] bool; and, with images, the read-out of scenes (`readout`).
  """
  layout: PromptEncoder

  def __call__(self, record: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    del rng
    references = record['references']
    seen, counts = self.layout.image_processor.preprocess(references, len(references))
    chat, task = self.layout.chat, record['task']
    spans = chat.spans(record['instruction'], counts, record['caption'], system(task))
    length, (_, most) = self.layout.lengths(len(references), task)[0], self.layout.room(task)
    for question, answer in record.get('more', ()):
      longer = spans + chat.add_turn(question, answer)
      if sum(len(s.ids) for s in longer) > length or sum(len(s.ids) for s in longer if s.kind in ('written', 'stop')) > most:
        break
      spans = longer
    example = self.layout.arrays(spans, len(references), task)
    places = np.flatnonzero(example.pop('written'))
    if len(places) > most:
      raise sources.BrokenRecord(f'an answer of {len(places)} tokens does not fit the {most} of data.max_rewrite_tokens')
    room = (0, most - len(places))
    example = dict(input_ids=example['input_ids'], attention_mask=example['attention_mask'],
                   predict=np.pad(places - 1, room).astype(np.int32),
                   targets=np.pad(example['input_ids'][places], room),
                   target_mask=np.pad(np.ones(len(places), bool), room))
    if counts:
      example['tiles'] = seen
      side = round(self.layout.image_processor.tokens ** 0.5)
      scenes = [world.Scene.from_json(s) for s in record['source']]
      example['readout'] = np.concatenate([readout(scene, side) for scene in scenes])
      if task.partition('/')[0] == 'edit':
        example['changes'] = changes(scenes[0], world.Scene.from_json(record['scene']), side)
    return example


def system(task: str) -> str:
  """The system prompt (its name) under which the embedded VLM does a task: it answers, or writes what is to be drawn."""
  return 'answer' if task.partition('/')[0] in ('question', 'caption') else 'rewrite'


READOUT = (('shape', world.SHAPES), ('colour', tuple(world.COLOURS)), ('size', tuple(world.SIZES)),
           ('fill', world.FILLS))


def readout(scene: world.Scene, side: int) -> np.ndarray:
  """What each of side x side image tokens should know of the scene, row by row: [side^2 9] f32.

  Columns: covered (0 or 1), index of shape, colour, size and fill of the nearest object that touches the token's
  cell, that object's centre relative to the token's (x, y, in cells), background kind, background colours
  (upper and lower as one index, 6 x 6).
  """
  background = scene.background
  names = tuple(world.BACKGROUND_COLOURS)
  colours = [names.index(c) for c in (background.colours[0], background.colours[-1])]
  out = np.zeros((side, side, 9), np.float32)
  out[..., 7] = world.BACKGROUND_KINDS.index(background.kind)
  out[..., 8] = colours[0] * len(names) + colours[1]
  centres, which = (np.arange(side) + 0.5) / side, shown(scene, side)
  for i, o in enumerate(scene.objects):
    y, x = np.nonzero(which == i)
    out[y, x, :5] = [1.0, *(values.index(getattr(o, kind)) for kind, values in READOUT)]
    out[y, x, 5], out[y, x, 6] = (o.x - centres[x]) * side, (o.y - centres[y]) * side
  return out.reshape(side * side, 9)


def shown(scene: world.Scene, side: int) -> np.ndarray:
  """Which object each of side x side image tokens shows, [y x]: the nearest that touches the token's cell, -1 for none."""
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


def changes(source: world.Scene, target: world.Scene, side: int) -> np.ndarray:
  """Whether each of side x side image tokens, row by row, shows an object that the target has otherwise: [side^2] bool."""
  otherwise = [o not in target.objects for o in source.objects]
  return np.array([*otherwise, False])[shown(source, side)].reshape(side * side)  # -1 is the last


@dataclasses.dataclass(frozen=True)
class TargetOnly:
  """Examples for the autoencoder: the target alone."""

  def __call__(self, record: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    del rng
    return dict(target=imaging.read(record['target']).astype(np.float32) / 127.5 - 1.0)
