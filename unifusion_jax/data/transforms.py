"""Transforms: from a raw record to the arrays of one training example, in numpy.

A transform is called as `transform(record, rng)`; it is picklable, so worker processes can run it. Its
`spec(height, width, references)` gives the shapes and dtypes of these arrays for a bucket.
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
  """Encoder of images and text into the VLM's input ids, padded to one length for each number of references.

  Attributes:
    folder: of the tokenizer, the VLM's own unless it lies elsewhere.
    image_processor: images to the arrays of the VLM's vision tower.
    markers: number of template ids around each image.
    max_prompt: tokens of everything but images.  max_rewrite: tokens of the rewrite with its stop token.
    budgets: (task, max_prompt, max_rewrite) of tasks with budgets of their own.
    system: the system prompt, a name in verifi.SYSTEM or a text.
    layout: of requests without VERIFI.
  """
  folder: str
  image_processor: vision_inputs.ImageProcessor
  markers: int
  max_prompt: int
  max_rewrite: int
  budgets: tuple[tuple[str, int, int], ...] = ()
  system: str = 'rewrite'
  layout: verifi.Layout = verifi.Layout()

  @classmethod
  def load(cls, folder, tiles: int, max_prompt: int, max_rewrite: int, budgets=(), system: str = 'rewrite',
           vlm: encoders.Config | None = None, layout: str = 'verifi') -> 'PromptEncoder':
    """The encoder of the VLM in `folder`; vlm: its configuration, None reads the one in the folder.

    With `vlm` the folder need hold a tokenizer alone.
    """
    config = encoders.config(folder) if vlm is None else vlm
    image_processor = vision_inputs.for_model(config, tiles, folder if vlm is None else None)
    made = cls(str(folder), image_processor, 0, max_prompt, max_rewrite, budgets, system, verifi.LAYOUTS[layout])
    vision_inputs.check(config, made.chat)
    return dataclasses.replace(made, markers=sum(len(ids) for ids in made.chat.image_ends))

  @property
  def chat(self) -> verifi.Chat:
    return _chat(self.folder, self.image_processor.image_tokens, verifi.CHATML if self.layout.prefix else None)

  def with_tiles(self, tiles: int) -> 'PromptEncoder':
    """The same encoder, cutting images into at most `tiles` tiles (0: unchanged)."""
    if not tiles or isinstance(self.image_processor, vision_inputs.NoImages):
      return self
    return dataclasses.replace(self, image_processor=dataclasses.replace(self.image_processor, tiles=tiles))

  def budget(self, task: str = '') -> tuple[int, int]:
    """(max_prompt, max_rewrite) of a task."""
    budgets = {name: (prompt, rewrite) for name, prompt, rewrite in self.budgets}
    return budgets.get(task, (self.max_prompt, self.max_rewrite))

  def lengths(self, references: int, task: str = '') -> tuple[int, int]:
    """(s, q): padded numbers of input ids and of condition tokens, by the number of references."""
    prompt, rewrite = self.budget(task)
    images = references * self.image_processor.max_tokens
    return prompt + images + references * self.markers, rewrite + images

  def fits(self, record: dict) -> bool:
    """Whether a record's request with an empty answer is within `max_prompt`."""
    spans = self.chat.spans(record['instruction'] or record['caption'], (), '', self.system)
    return sum(len(span.ids) for span in spans) <= self.max_prompt

  def arrays(self, spans, references: int, task: str = '', kept=verifi.COND_VERIFI) -> dict[str, np.ndarray]:
    """`verifi.arrays` at the padded lengths; BrokenRecord if the text is too long for them."""
    try:
      return verifi.arrays(spans, *self.lengths(references, task), kept)
    except verifi.TooLong as error:
      raise BrokenRecord(str(error)) from error


def prompt_encoder(config, vlm: encoders.Config | None = None) -> PromptEncoder:
  """The prompt encoder of a config.Config: its VLM's tokenizer and image processor, its budgets and system prompt.

  vlm: the VLM's configuration, if `config.vlm` holds only its tokenizer; None reads it from there.
  """
  return PromptEncoder.load(hub.resolve(config.vlm, weights=False), max(config.data.tiles), *config.data.budget,
                            config.data.budgets, config.system, vlm, config.layout)


def abstract_prompt_encoder(config) -> PromptEncoder:
  """A prompt encoder without a tokenizer, from a public name or config.json alone: for `lengths` and `budget`."""
  image_processor = vision_inputs.for_model(encoders.config(config.vlm), max(config.data.tiles))
  return PromptEncoder('', image_processor, image_processor.markers, *config.data.budget, config.data.budgets,
                       config.system, verifi.LAYOUTS[config.layout])


@functools.cache
def _chat(folder: str, image_tokens, fallback: str | None) -> verifi.Chat:
  with _LOADING:
    return verifi.Chat(folder, image_tokens, fallback)


_LOADING = threading.Lock()  # the tokenizers library cannot be imported by two threads at once


@dataclasses.dataclass(frozen=True)
class GenerationExample:
  """Training examples of the DiT: target image, the VLM's inputs, and the indices of the condition tokens.

  The written text is a random one of the record's `rewrites` (token ids, from commands/rewrite.py), or the caption of a
  record without them. An empty list of rewrites means that the VLM wrote no usable text: then the request itself
  conditions the DiT, as in sampling, or the caption if the request is too long.

  Attributes:
    prompts: the prompt encoder of the frozen VLM.
    cond_dropout: share of examples with the null condition, an empty text without images.
    image_dropout: share of examples with references that lose their image tokens.
    text_dropout: share of examples with references whose text is left empty, a stop token alone.
    instruction_prob: share of examples conditioned on the request itself instead of a rewrite, as in sampling without
      VERIFI; a request longer than the rewrite budget stays rewritten.
    reference_unit: pixels of a patch of latents, for examples whose references reach the DiT as clean latents too, on
      canvases of the target's size; 0: they do not. Image dropout takes these as well, condition dropout leaves them.
    rewrite_online: the VLM writes in the train step. `needs_rewrite` marks the examples to be rewritten;
      `fallback_index`, `fallback_mask` index the request, which conditions the DiT where the rewrite is invalid.
  """
  prompts: PromptEncoder
  cond_dropout: float = 0.1
  image_dropout: float = 0.05
  text_dropout: float = 0.0
  instruction_prob: float = 0.0
  rewrite_online: bool = False
  reference_unit: int = 0

  def __call__(self, record: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    prompts, task = self.prompts.with_tiles(record.get('tiles', 0)), record.get('task', '')
    references = record['references']
    tiles, counts = prompts.image_processor.preprocess(references, len(references))
    chat = prompts.chat
    instruction = record['instruction'] or record['caption']
    null_draw, raw_draw, dropout_draw = rng.random(3)
    written, unwritten = record['caption'], False
    if 'rewrites' in record:
      unwritten = not record['rewrites']
      written = '' if unwritten else record['rewrites'][rng.integers(len(record['rewrites']))]
    kept, images = verifi.COND_VERIFI, counts
    if null_draw < self.cond_dropout:
      instruction, written, images = '', '', ()
    elif counts and dropout_draw < self.image_dropout:
      kept = tuple(kind for kind in kept if kind != 'image')
    elif counts and dropout_draw < self.image_dropout + self.text_dropout:
      written = ''
    elif unwritten or raw_draw < self.instruction_prob:
      if len(chat.text_ids(instruction)) < prompts.budget(task)[1]:
        written, kept = '', verifi.COND_RAW
      elif unwritten:
        written = record['caption']
    clean = 'image' in kept
    needs_rewrite = self.rewrite_online and len(written) > 0
    if needs_rewrite:
      written = None
    if prompts.layout.prefix and not images and not self.rewrite_online:
      spans, kept = chat.alone(instruction, prompts.layout)[0], prompts.layout.kinds
    else:
      spans = chat.spans(instruction, images, written, prompts.system)
    example = prompts.arrays(spans, len(references), task, kept)
    del example['written']
    if self.rewrite_online:
      fallback = verifi.arrays(spans, len(example['input_ids']), prompts.budget(task)[0], ('instruction',))
      example |= dict(needs_rewrite=np.array(needs_rewrite), fallback_index=fallback['cond_index'],
                      fallback_mask=fallback['cond_mask'])
    target = example['target'] = imaging.read(record['target'])
    if counts:
      example['tiles'] = tiles
    if self.reference_unit and references:
      images, mask = imaging.canvases([imaging.read(image) for image in references], len(references),
                                      *target.shape[:2], self.reference_unit)
      example |= dict(references=images, reference_mask=mask & clean)
    return example

  def spec(self, height: int, width: int, references: int = 1, task: str = '', tiles: int = 0) -> dict:
    """The shapes of one example: a target of height x width, references in at most `tiles` tiles."""
    prompts = self.prompts.with_tiles(tiles)
    s, q = prompts.lengths(references, task)
    spec = dict(input_ids=_ints(s), attention_mask=_bools(s), cond_index=_ints(q), cond_mask=_bools(q))
    if self.rewrite_online:
      n = prompts.budget(task)[0]
      spec |= dict(needs_rewrite=_bools(), fallback_index=_ints(n), fallback_mask=_bools(n))
    spec |= TargetOnly().spec(height, width, references)
    if references and self.reference_unit:
      unit = self.reference_unit
      spec |= dict(references=jax.ShapeDtypeStruct((references, height, width, 3), np.uint8),
                   reference_mask=_bools(references, height // unit, width // unit))
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
