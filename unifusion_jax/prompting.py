"""VERIFI prompts of requests, as arrays for the VLM, and rewrites decoded from the ids that it generates."""

import dataclasses

import jax
import numpy as np

from unifusion_jax import verifi
from unifusion_jax.data import imaging, transforms
from unifusion_jax.errors import UserError
from unifusion_jax.request import MAX_REFERENCES, Request, SampleConfig

COND_BUCKET = 64  # condition tokens of a layout with a prefix: this many, or the next power of 2
SYSTEM_BUCKET = 64  # extra tokens for a system prompt longer than training's: this many, or the next power of 2
SHOWN = 20  # requests that one message names
RAW = object()  # in place of an answer: the row is conditioned on its instruction, and its answer is empty


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Prompts of requests, padded to few shapes: numbers of references and longer system prompts are bucketed.

  Attributes:
    images: preprocessed references of each request; None without references.
    counts: image tokens of each reference of each request.
    length: tokens that a prompt without its answer is padded to.
    image_length: maximum image tokens of a prompt.
    image_tokens: whether image tokens condition the DiT.
    layout: the model's own, in the place of VERIFI's; None where the VLM's chat template is used.
  """
  encoder: transforms.PromptEncoder
  requests: list[Request]
  images: list | None
  counts: tuple
  system: str
  length: int
  image_length: int
  image_tokens: bool
  layout: verifi.Layout | None = None

  @classmethod
  def of(cls, encoder: transforms.PromptEncoder, requests: list[Request], s: SampleConfig,
         max_positions: int) -> 'Prompts':
    encoder = encoder.with_tiles(s.tiles)
    layout = encoder.layout
    if layout.prefix and not s.verifi:
      if s.system or any(request.references for request in requests):
        raise UserError(f"{layout.vlm} reads this model's own prompt, which has neither references nor another system "
                        'prompt: leave them out, or set sample.verifi=true')
      length = layout.dropped + layout.max_sequence_length
      return cls(encoder, requests, None, ((),) * len(requests), '', length, 0, True, layout)
    # Requests that share their references, as those of one call do, share what is made of them
    shown = {id(request.references): request.references for request in requests}
    shown = {key: [imaging.read(image) for image in references] for key, references in shown.items()}
    if s.stitch:
      shown = {key: [imaging.stitch(images)] if images else [] for key, images in shown.items()}
    most, system = max(map(len, shown.values())), s.system or encoder.system
    overflow = max(0, len(encoder.chat.system_ids(system)) - len(encoder.chat.system_ids(encoder.system)))
    count = 1 << (most - 1).bit_length() if most else 0
    extra = max(SYSTEM_BUCKET, 1 << (overflow - 1).bit_length()) if overflow else 0
    if encoder.lengths(count)[0] + extra + encoder.max_rewrite > max_positions:
      count, extra = most, overflow  # no room for buckets
    shown = {key: encoder.image_processor.preprocess(images, count) for key, images in shown.items()}
    images, counts = zip(*(shown[id(request.references)] for request in requests))
    return cls(encoder, requests, list(images) if count else None, counts, system,
               encoder.lengths(count)[0] + extra, count * encoder.image_processor.max_tokens, s.image_tokens)

  def known(self, verifi: bool) -> list:
    """Answer of each request that needs no writing: a text, or RAW for the request itself; None: the VLM writes it."""
    return [request.rewrite if request.rewrite is not None else None if verifi else RAW for request in self.requests]

  def unanswered(self) -> list[dict[str, np.ndarray]]:
    """Prompts without answers, for the VLM to write."""
    return [verifi.arrays(self._spans(i, None), self.length, self.image_length, self._kinds(('image',)))
            for i in range(len(self.requests))]

  def answered(self, answers: list) -> list[dict[str, np.ndarray]]:
    """Prompts with answers, each a text or RAW; the row of a None is a placeholder."""
    if self.layout:
      return _alone([spans for spans, _ in self._own(answers)], self.layout)
    rows = [(self._spans(i, '' if answer in (None, RAW) else answer),
             self._kinds(verifi.COND_RAW if answer is RAW else verifi.COND_VERIFI)) for i, answer in enumerate(answers)]
    # The budget of rewrites where all texts fit into it, so that the DiT mostly runs at one shape
    most = max(sum(len(span.ids) for span in spans if span.kind in kinds and span.kind != 'image')
               for spans, kinds in rows)
    max_rewrite, max_prompt = self.encoder.max_rewrite, self.encoder.max_prompt
    cond_length = self.image_length + (max_rewrite if most <= max_rewrite else max(max_rewrite, max_prompt))
    return [verifi.arrays(spans, self.length + max_rewrite, cond_length, kinds) for spans, kinds in rows]

  def strengths(self, references: tuple[float, ...], length: int) -> np.ndarray:
    """How often each condition token counts, f32 [b length], from the strength of each reference."""
    rows = np.ones((len(self.requests), length), np.float32)
    for row, counts in zip(rows, self.counts):
      row[:sum(counts)] = np.repeat(references, counts)  # image tokens are the first
    return rows

  @property
  def max_length(self) -> int:
    """Most tokens of a prompt with its answer."""
    return self.length + (0 if self.layout else self.encoder.max_rewrite)

  def cut(self, answers: list) -> dict[int, str]:
    """{row: warning} of the requests that are longer than the model's own layout has room for."""
    most = self.layout and self.layout.max_sequence_length
    return {i: f'the request is {tokens} tokens longer than the {most} that the model reads: its end was cut off'
            for i, (_, tokens) in enumerate(self._own(answers) if self.layout else ()) if tokens}

  def _own(self, answers: list):
    texts = [request.instruction if answer in (None, RAW) else answer
             for request, answer in zip(self.requests, answers)]
    return [self.encoder.chat.alone(text, self.layout) for text in texts]

  def _spans(self, i: int, answer: str | None):
    return self.encoder.chat.spans(self.requests[i].instruction, self.counts[i], answer, self.system)

  def _kinds(self, kinds: tuple[str, ...]) -> tuple[str, ...]:
    return kinds if self.image_tokens else tuple(kind for kind in kinds if kind != 'image')


def check(encoder: transforms.PromptEncoder, requests: list[Request], s: SampleConfig, max_positions: int) -> None:
  """Checks requests before any model is there: text that is readable and fits its tokens, and the system prompt.

  Raises:
    UserError: one, which names each request that is wrong by its place.
  """
  prompts = Prompts.of(encoder, requests, s, max_positions)
  if prompts.max_length > max_positions:
    raise UserError(f'a prompt may have {prompts.length} tokens and a rewrite {encoder.max_rewrite}, together more '
                    f'than the {max_positions} positions of the VLM: give fewer references, fewer tiles or a shorter '
                    'system prompt')
  if s.guidance != 1:
    null(encoder, s.negative_prompt)
  checked, wrong = set(), {}
  for request, count, answer in zip(requests, prompts.counts, prompts.known(s.verifi)):
    text = request.place, request.instruction, request.rewrite, id(request.references)
    if text not in checked:  # else it differs in its seed alone
      checked.add(text)
      try:
        f'{request.instruction}{request.rewrite}'.encode()
        if s.strengths and len(s.strengths) != len(request.references):
          raise UserError(f'strengths={s.strengths} are {len(s.strengths)} and its references '
                          f'{len(request.references)}: give one for each')
        if s.reference_latents and len(request.references) > MAX_REFERENCES:
          raise UserError(f'it has {len(request.references)} references, and with reference_latents, where each is as '
                          f'many tokens as the image, there may be {MAX_REFERENCES}: give fewer')
        if s.precise and not request.references:
          raise UserError('precise= keeps parts of the first reference, and there is none: give references')
        if s.precise:
          image = imaging.read(request.references[0])
          imaging.region(s.precise, image, image.shape[1], image.shape[0])
        one = dataclasses.replace(prompts, requests=[request], counts=(count,))
        one.unanswered() if answer is None else one.answered([answer])
      except UnicodeEncodeError as error:
        wrong[request.place] = f'it holds a lone surrogate ({error.object[error.start]!r}), which is no text'
      except UserError as error:
        wrong[request.place] = str(error)
  if wrong:
    more = [f'and {len(wrong) - SHOWN} more'] * (len(wrong) > SHOWN)
    raise UserError('\n  '.join([f'{len(wrong)} of {len({text[0] for text in checked})} requests cannot be sampled:',
                                 *[f'{place}: {reason}' for place, reason in wrong.items()][:SHOWN], *more]))


def null(encoder: transforms.PromptEncoder, negative: str = '') -> dict[str, np.ndarray]:
  """The row of the null condition, for guidance: a text without images, written where the layout is VERIFI's.

  Of the empty one the stop token alone conditions there.
  """
  if encoder.layout.prefix:
    return _alone([encoder.chat.alone(negative, encoder.layout)[0]], encoder.layout)[0]
  spans, (length, cond_length) = encoder.chat.spans('', (), negative, encoder.system), encoder.lengths(0)
  return verifi.arrays(spans, length + cond_length, cond_length) if negative else verifi.arrays(spans, length, 1)


def own_length(layout: verifi.Layout, tokens: int) -> int:
  """Condition tokens that a prompt in a layout with a prefix is padded to, of which `tokens` are valid."""
  return min(max(COND_BUCKET, 1 << (tokens - 1).bit_length()), layout.max_sequence_length)


def _alone(prompts: list[list[verifi.Span]], layout: verifi.Layout) -> list[dict[str, np.ndarray]]:
  """Prompts in a layout with a prefix as arrays of one shape."""
  cond_length = own_length(layout, max(
      sum(len(span.ids) for span in spans if span.kind in layout.kinds) for spans in prompts))
  return [verifi.arrays(spans, layout.dropped + cond_length, cond_length, layout.kinds) for spans in prompts]


def read_rewrites(chat: verifi.Chat, ids: np.ndarray, lengths: np.ndarray) -> tuple[list[str], dict[int, str]]:
  """Texts decoded from generated ids [b n], and {row: reason} of the unusable ones.

  A row is unusable when it is empty, has no stop token, or holds an image token, which later passes take for an image.
  """
  texts = [chat.read(row[:n]) for row, n in zip(ids, lengths)]
  failures = {}
  for i, (row, n) in enumerate(zip(ids, lengths)):
    if row[n - 1] not in chat.stop_ids:
      failures[i] = f'the VLM found no end within {len(row)} tokens'
    elif chat.image_id in row[:n]:
      failures[i] = 'the VLM wrote an image token'
    elif not texts[i]:
      failures[i] = 'the VLM wrote nothing'
  return texts, failures


def stacked(examples):
  """Examples of one shape as a batch."""
  return jax.tree.map(lambda *x: np.stack(x), *examples)
