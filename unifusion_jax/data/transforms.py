"""Transforms: from a raw record to the arrays of one training example, in numpy.

A transform is called as `transform(record, rng)`; it is picklable, so worker processes can run it. Its
`spec(height, width, references)` is the shapes and dtypes of what it makes of the records of a bucket.
"""

import dataclasses
import functools
import threading

import jax
import numpy as np

from unifusion_jax import verifi
from unifusion_jax.data import imaging, vision_inputs
from unifusion_jax.errors import BrokenRecord
from unifusion_jax.weights import encoders, hub


@dataclasses.dataclass(frozen=True)
class PromptEncoder:
  """Images and text to the VLM's input ids, at one length for each number of references.

  Attributes:
    folder: the VLM's folder, for its tokenizer.
    image_processor: from images to the arrays of its vision tower.
    markers: the template's ids around each image.
    max_prompt: tokens for everything but images.  max_rewrite: for the rewrite and its stop token.
    budgets: (task, max_prompt, max_rewrite) for tasks that have their own.
    system: the system prompt, a name in verifi.SYSTEM or a text.
  """
  folder: str
  image_processor: vision_inputs.ImageProcessor
  markers: int
  max_prompt: int
  max_rewrite: int
  budgets: tuple[tuple[str, int, int], ...] = ()
  system: str = 'rewrite'

  @classmethod
  def load(cls, folder, tiles: int, max_prompt: int, max_rewrite: int, budgets=(), system: str = 'rewrite',
           vlm: encoders.Config | None = None) -> 'PromptEncoder':
    """The encoder of a VLM's folder for images in at most so many tiles; `vlm`: its configuration, if not that there."""
    described = encoders.config(folder) if vlm is None else vlm
    image_processor = vision_inputs.for_model(described, tiles, folder if vlm is None else None)
    chat = _chat(str(folder), image_processor.image_tokens)
    vision_inputs.check(described, chat)
    markers = sum(len(ids) for ids in chat.image_ends)
    return cls(str(folder), image_processor, markers, max_prompt, max_rewrite, budgets, system)

  @property
  def chat(self) -> verifi.Chat:
    return _chat(self.folder, self.image_processor.image_tokens)

  def with_tiles(self, tiles: int) -> 'PromptEncoder':
    """The same encoder for images in at most so many tiles (0: as it is)."""
    if not tiles or isinstance(self.image_processor, vision_inputs.NoImages):
      return self
    return dataclasses.replace(self, image_processor=dataclasses.replace(self.image_processor, tiles=tiles))

  def budget(self, task: str = '') -> tuple[int, int]:
    """(tokens but for images, tokens of the rewrite) of a task."""
    budgets = {name: (prompt, rewrite) for name, prompt, rewrite in self.budgets}
    return budgets.get(task, (self.max_prompt, self.max_rewrite))

  def lengths(self, references: int, task: str = '') -> tuple[int, int]:
    """(s, q): all tokens, and condition tokens, that a prompt with so many references is padded to."""
    prompt, rewrite = self.budget(task)
    images = references * self.image_processor.max_tokens
    return prompt + images + references * self.markers, rewrite + images

  def fits(self, record: dict) -> bool:
    """Whether a record's request, with an empty answer after it, is within `max_prompt`."""
    spans = self.chat.spans(record['instruction'] or record['caption'], (), '', self.system)
    return sum(len(span.ids) for span in spans) <= self.max_prompt

  def arrays(self, spans, references: int, task: str = '', kept=verifi.COND_VERIFI) -> dict[str, np.ndarray]:
    """`verifi.arrays` at the lengths for so many references; BrokenRecord where the text is too long for them."""
    try:
      return verifi.arrays(spans, *self.lengths(references, task), kept)
    except verifi.TooLong as error:
      raise BrokenRecord(str(error)) from error


def prompt_encoder(config, vlm: encoders.Config | None = None) -> PromptEncoder:
  """The prompt encoder of a config.Config: its VLM's tokenizer and image processor, its budgets and system prompt.

  vlm: the VLM's configuration, where `config.vlm` is but the folder of its tokenizer; None reads it from there.
  """
  return PromptEncoder.load(hub.resolve(config.vlm, weights=False), max(config.data.tiles), *config.data.budget,
                            config.data.budgets, config.system, vlm)


def abstract_prompt_encoder(config) -> PromptEncoder:
  """The same without a tokenizer, from a public name or config.json alone: it answers to `lengths` and `budget`."""
  image_processor = vision_inputs.for_model(encoders.config(config.vlm), max(config.data.tiles))
  return PromptEncoder('', image_processor, image_processor.markers, *config.data.budget, config.data.budgets,
                       config.system)


@functools.cache
def _chat(folder: str, image_tokens) -> verifi.Chat:
  with _LOADING:
    return verifi.Chat(folder, image_tokens)


_LOADING = threading.Lock()  # the tokenizer's library does not bear being imported by two threads at once


@dataclasses.dataclass(frozen=True)
class GenerationExample:
  """Examples for the DiT: the target image, and what the VLM reads and has written about it.

  The text is one of the record's `rewrites` (ids, from commands/rewrite.py), another one each time, or its caption.
  Where the VLM could write none the request itself conditions the DiT, as in sampling; the caption, where the request
  is too long.

  Attributes:
    prompts: the prompt encoder of the frozen VLM.
    cond_dropout: share of examples with the null condition, an empty text without images.
    image_dropout: share of examples with references that lose their image tokens.
    text_dropout: share of examples with references and no text: the answer is its stop token.
    instruction_prob: share of examples that keep the request itself instead of a rewritten one, as sampling without
      VERIFI does; a request longer than the budget of rewrites stays rewritten.
    rewrite_online: leave the answer to the VLM in the train step: `needs_rewrite` marks such examples, and
      `fallback_index`, `fallback_mask` index the request, which conditions the DiT where the rewrite is invalid.
  """
  prompts: PromptEncoder
  cond_dropout: float = 0.1
  image_dropout: float = 0.05
  text_dropout: float = 0.0
  instruction_prob: float = 0.0
  rewrite_online: bool = False

  def __call__(self, record: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    prompts, task = self.prompts.with_tiles(record.get('tiles', 0)), record.get('task', '')
    references = record['references']
    tiles, counts = prompts.image_processor.preprocess(references, len(references))
    chat = prompts.chat
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
      if len(chat.text_ids(instruction)) < prompts.budget(task)[1]:
        written, kept = '', verifi.COND_RAW
      elif unwritten:
        written = record['caption']
    needs_rewrite = self.rewrite_online and len(written) > 0
    if needs_rewrite:
      written = None
    spans = chat.spans(instruction, images, written, prompts.system)
    example = prompts.arrays(spans, len(references), task, kept)
    del example['written']
    if self.rewrite_online:
      fallback = verifi.arrays(spans, len(example['input_ids']), prompts.budget(task)[0], ('instruction',))
      example |= dict(needs_rewrite=np.array(needs_rewrite), fallback_index=fallback['cond_index'],
                      fallback_mask=fallback['cond_mask'])
    example['target'] = imaging.read(record['target'])
    if counts:
      example['tiles'] = tiles
    return example

  def spec(self, height: int, width: int, references: int = 1, task: str = '', tiles: int = 0) -> dict:
    """The shapes of one example of a task, of a target of height x width and references in at most so many tiles."""
    prompts = self.prompts.with_tiles(tiles)
    s, q = prompts.lengths(references, task)
    spec = dict(input_ids=_ints(s), attention_mask=_bools(s), cond_index=_ints(q), cond_mask=_bools(q))
    if self.rewrite_online:
      n = prompts.budget(task)[0]
      spec |= dict(needs_rewrite=_bools(), fallback_index=_ints(n), fallback_mask=_bools(n))
    spec |= TargetOnly().spec(height, width, references)
    return spec | dict(tiles=prompts.image_processor.spec(references)) if references else spec


@dataclasses.dataclass(frozen=True)
class TargetOnly:
  """Examples for the autoencoder: the target image uint8 [y x 3] alone."""

  def __call__(self, record: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    del rng
    return dict(target=imaging.read(record['target']))

  def spec(self, height: int, width: int, references: int = 1) -> dict:
    """The shapes of one example."""
    del references
    return dict(target=jax.ShapeDtypeStruct((height, width, 3), np.uint8))


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, np.int32)


def _bools(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, bool)
