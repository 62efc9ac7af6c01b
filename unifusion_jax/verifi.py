"""VERIFI prompt layout: builds the VLM's chat tokens and marks those that condition the DiT.

The order is the paper's (arXiv 2510.12789, architecture figure): system prompt | images | instruction | written
text, inside the VLM's own chat template. The DiT is conditioned on the image tokens and on the written text with the
stop token that ends it; system prompt, instruction and every other token of the template are masked. The stop
token stays so that the empty text, the null condition of classifier-free guidance, is one token and not none.

Without VERIFI the instruction conditions in place of the written text, before an empty answer's stop token; models that
were trained elsewhere have a prompt of their own for it (`LAYOUTS`).

Several references are several images in one user turn, in their order, with the labels that the VLM's template gives
them, if any; the instruction names them by what they show or by that order. Their image tokens all condition the DiT,
in the same order and with nothing between them. As one image instead (`SampleConfig.stitch`) they stand side by side,
by `imaging.stitch`.

The procedure itself: models/text_generation.py generates the text and keeps the hidden states of that pass;
conditioning.py selects those of the marked tokens; reading.py runs both for sampling and falls back on the instruction
where the text is unusable; commands/rewrite.py generates for a whole data set, objectives/flow_matching.py during
training.

Ids are built span by span. Text of a user is tokenised as plain text, so a template token spelled inside it stays text.
"""

from collections.abc import Sequence
import dataclasses
import difflib
import functools
import pathlib

import jinja2
import numpy as np

from unifusion_jax import json_file
from unifusion_jax.errors import UserError
from unifusion_jax.weights import tokenizers

# System prompts by name; training uses one, sampling may swap it (config.system, config.sample.system). The first two
# are those that the embedded VLM was trained with, and it knows no others.
SYSTEM = {
    'rewrite': 'Describe the picture to draw.',
    'answer': 'Answer.',
    'faithful': (
        'You write the description that a painter works from. Describe the picture that the user asks for, taking any '
        'pictures shown into account: every object with its number, colour, shape, size and material, written text '
        'word for word, where things stand to each other, and the background. Keep everything that was asked, add '
        'nothing that contradicts it, and answer with the description alone, in one paragraph.'),
    'elaborate': (
        'You write the description that a painter works from. Describe the picture that the user asks for, taking any '
        'pictures shown into account, and fill in what the request leaves open: setting, light, viewpoint, textures, '
        'mood and small details that suit it. Keep everything that was asked. Answer with the description alone, in '
        'one rich paragraph.'),
    'translate': (
        'The user may write in any language. First understand the request, then describe in English the picture that '
        'is asked for, taking any pictures shown into account: objects, numbers, colours, places and background. '
        'Written text that is to appear in the picture stays in its own language. Answer with the English description '
        'alone.'),
    'style': (
        'You write the description that a painter works from. Describe the picture that the user asks for, taking any '
        'pictures shown into account. Name the style first: medium, technique, palette and light, those of the shown '
        'pictures where the user refers to them; then the content, with everything that was asked. Answer with the '
        'description alone, in one paragraph.'),
}
PLACEHOLDERS = ('slotsystem', 'slotuser', 'slotwritten')  # stand-ins that no template rewrites


@dataclasses.dataclass(frozen=True)
class Span:
  """A run of token ids of one kind: 'template', 'system', 'image', 'instruction', 'written', 'stop' or 'suffix'."""
  kind: str
  ids: tuple[int, ...]


COND_VERIFI = ('image', 'written', 'stop')
COND_RAW = ('image', 'instruction', 'stop')  # without VERIFI, of a prompt with an empty answer


@dataclasses.dataclass(frozen=True)
class Layout:
  """Prompt of requests without VERIFI, as a model was trained: its template, and the spans that condition the DiT.

  Attributes:
    kinds: kinds of span that condition the DiT.
    prefix: text before the request with the template's special tokens, and plain text that is tokenised together with
      the request. None: the VLM's own chat template, with system prompt and references.
    suffix: text after the request, of the kind 'suffix'.
    dropped: number of ids at the start that do not condition the DiT.
    max_sequence_length: condition tokens; a longer request is cut off before the suffix.
    vlm: the one VLM that fits; '' for any.
    guidance_off: diffusers' guidance_scale of this model without guidance.
  """
  kinds: tuple[str, ...] = COND_RAW
  prefix: tuple[str, str] | None = None
  suffix: str = ''
  dropped: int = 0
  max_sequence_length: int = 0
  vlm: str = ''
  guidance_off: float = 1.0


# By the name that unifusion.json and config.layout use. Krea 2's: Krea2Pipeline of diffusers 0.42.1, which pads between
# request and suffix. Its positions count valid tokens alone, so padding after the suffix gives the same states.
LAYOUTS = {
    'verifi': Layout(),
    'krea2': Layout(
        ('instruction', 'suffix'),
        ('<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial '
         'relationships of the objects and background:<|im_end|>\n<|im_start|>', 'user\n'),
        '<|im_end|>\n<|im_start|>assistant\n', dropped=34, max_sequence_length=512, vlm='Qwen3-VL-4B-Instruct',
        guidance_off=0.0),
}
# ChatML, for a tokenizer without a chat template of its own
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
          "'<|im_end|>\n' }}{% endfor %}")


class TooLong(UserError):
  """Text that exceeds its token budget."""


class Chat:
  """Chat template of one VLM, taken apart: its tokenizer, its pieces, and the tokens around an image.

  Attributes:
    stop_ids: ids that end written text, the template's own first.
    image_id: the id of every image token, whose embedding the vision tower's output replaces; None for a language
      model.
    image_ends: the template's ids before and after the tokens of an image.
  """

  def __init__(self, folder: str | pathlib.Path,
               image: tuple[str, str, str] | None = ('<img>', '<IMG_CONTEXT>', '</img>\n'),
               fallback: str | None = None):
    """`image`: texts before an image, for each of its tokens, and after it; None for a language model.

    fallback: the chat template where the tokenizer has none.
    """
    self.folder = str(folder)
    self.tokenizer = tokenizers.load(self.folder)
    self._fallback = None if self.tokenizer.chat_template else fallback
    self._plain = tokenizers.plain(self.folder)
    before, each, after = image or ('', None, '')
    self._each, self.image_id = each, None if each is None else self._one_id(each)
    self.image_ends = tuple(self._template_ids(text) for text in (before, after))
    rendered = self._render(system=PLACEHOLDERS[0], user=PLACEHOLDERS[1], written=PLACEHOLDERS[2])
    literals, rest = [], rendered
    for slot in PLACEHOLDERS:
      before, separator, rest = rest.partition(slot)
      if not separator or slot in rest:
        raise UserError(f'{self.folder}: its chat template does not give system, user and assistant text once each, '
                         f'in this order, so VERIFI cannot tell the spans apart; it renders {rendered!r}')
      literals.append(self._template_ids(before) if literals else self.with_bos(before))
    closing = self._template_ids(rest)
    if not closing:
      raise UserError(f'{self.folder}: its chat template ends an answer with no token, so nothing stops writing')
    self._template_pieces = literals
    self.stop_ids = tuple(dict.fromkeys([closing[0], *self._other_stops()]))

  def _render(self, system, user, written) -> str:
    messages = [dict(role='system', content=system), dict(role='user', content=user),
                dict(role='assistant', content=written)]
    try:
      return self.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=self._fallback)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
      raise UserError(f'{self.folder}: no usable chat template in its tokenizer: {error}') from error

  @functools.lru_cache(maxsize=16)
  def image_labels(self, count: int) -> tuple[tuple[int, ...], ...]:
    """Ids that the template puts before each of `count` images where there are several, as 'picture 2'; mostly none."""
    slot, none = PLACEHOLDERS[1], ((),) * count
    if count < 2 or self._each is None:
      return none

    def shown(images: int) -> list[str]:
      """Texts of the template before, between and after images."""
      parts = [dict(type='image')] * images + [dict(type='text', text=slot)]
      rendered = self._render(PLACEHOLDERS[0], parts, PLACEHOLDERS[2]).partition(slot)[0]
      return rendered.removeprefix(self._render(*PLACEHOLDERS).partition(slot)[0]).split(self._each)
    try:
      alone, several = shown(1), shown(count)
    except UserError:  # a template for text alone
      return none
    if len(alone) != 2 or len(several) != count + 1:
      return none
    labels = [text.removesuffix(alone[0]) for text in (several[0], *(t.removeprefix(alone[1]) for t in several[1:-1]))]
    return tuple(map(self._template_ids, labels))

  def _template_ids(self, text: str) -> tuple[int, ...]:
    return tuple(self.tokenizer.encode(text, add_special_tokens=False))

  def _other_stops(self) -> list[int]:
    """Further ids that end an answer, from the model's generation_config.json."""
    path = pathlib.Path(self.folder) / 'generation_config.json'
    stops = json_file.read(path).get('eos_token_id') if path.exists() else None
    return [] if stops is None else [stops] if isinstance(stops, int) else list(stops)

  def with_bos(self, text: str) -> tuple[int, ...]:
    """Ids of the template's opening text, with the start token where the model expects one.

    The processors of VLMs put the tokenizer's own start token before a template that has none; language models take
    their template as it is.
    """
    start, ids = self.tokenizer.bos_token_id, self._template_ids(text)
    adds_start = self.image_id is not None and start in self.tokenizer.encode('')
    return (start, *ids) if adds_start and start not in ids[:1] else ids

  def _one_id(self, token: str) -> int:
    ids = self._template_ids(token)
    if len(ids) != 1:
      raise UserError(f'{self.folder}: {token!r} is not one token of its tokenizer, so images cannot be placed')
    return ids[0]

  def text_ids(self, text: str) -> tuple[int, ...]:
    """Ids of plain text: a special token spelled in it is tokenised letter by letter."""
    return tuple(self._plain.encode(text, add_special_tokens=False, split_special_tokens=True))

  @functools.lru_cache(maxsize=16)  # the same in every example of a run
  def system_ids(self, system: str) -> tuple[int, ...]:
    """Ids of a system prompt, a name in SYSTEM or a text; UserError for a misspelt name."""
    near = difflib.get_close_matches(system, SYSTEM, 1) if system.isidentifier() and system not in SYSTEM else ()
    if near:
      raise UserError(f'there is no system prompt {system!r}: did you mean {near[0]!r}? Names are {", ".join(SYSTEM)}; '
                       'anything else is taken as the text of one')
    return self.text_ids(SYSTEM.get(system, system))

  def spans(self, instruction: str, images: tuple[int, ...] = (), written: str | Sequence[int] | None = None,
            system: str = 'rewrite') -> list[Span]:
    """Spans of a prompt, in order, with or without its answer.

    Args:
      instruction: the user's text.
      images: the number of image tokens of each reference.
      written: the answer, as text or as ids without the stop token; None leaves the prompt open, for the VLM to write.
      system: the system prompt, a name in SYSTEM or a text.
    """
    open_image, close_image = self.image_ends
    spans = [Span('template', self._template_pieces[0]), Span('system', self.system_ids(system)),
             Span('template', self._template_pieces[1])]
    for label, tokens in zip(self.image_labels(len(images)), images):
      spans += [Span('template', label + open_image), Span('image', (self.image_id,) * tokens),
                Span('template', close_image)]
    spans += [Span('instruction', self.text_ids(instruction)), Span('template', self._template_pieces[2])]
    if written is not None:
      ids = self.text_ids(written) if isinstance(written, str) else tuple(int(i) for i in written)
      spans += [Span('written', ids), Span('stop', self.stop_ids[:1])]
    return spans

  def alone(self, text: str, layout: Layout) -> tuple[list[Span], int]:
    """(spans of a request in a layout with a prefix, number of its tokens that were cut off)."""
    template, plain = layout.prefix  # pyrefly: ignore[not-iterable]
    ids = (*self._template_ids(template), *self.text_ids(plain + text))
    suffix = self._template_ids(layout.suffix)
    most = layout.dropped + layout.max_sequence_length - len(suffix)
    spans = [Span('template', ids[:layout.dropped]), Span('instruction', ids[layout.dropped:most]),
             Span('suffix', suffix)]
    return spans, max(0, len(ids) - most)

  def add_turn(self, instruction: str, written: str) -> list[Span]:
    """Spans of one more turn, after spans that end in an answer."""
    return [Span('template', self._between), Span('instruction', self.text_ids(instruction)),
            Span('template', self._template_pieces[2]), Span('written', self.text_ids(written)),
            Span('stop', self.stop_ids[:1])]

  @functools.cached_property
  def blank_ids(self) -> tuple[int, ...]:
    """Ids of which text alone is left empty by `read`: white space and special tokens."""
    texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))], skip_special_tokens=True)
    return tuple(i for i, text in enumerate(texts) if not text.strip())

  @functools.cached_property
  def _between(self) -> tuple[int, ...]:
    """The template's ids between the stop token of one turn and the next instruction."""
    turns = [*PLACEHOLDERS, *(slot + 'again' for slot in PLACEHOLDERS[1:])]
    messages = [dict(role=role, content=turn) for role, turn in zip(('system', *('user', 'assistant') * 2), turns)]
    rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=self._fallback)
    _, separator, rest = rendered.partition(turns[2])
    between, following, _ = rest.partition(turns[3])
    ids = self._template_ids(between)
    if not (separator and following and ids[:1] == self.stop_ids[:1]):
      raise UserError(f'{self.folder}: its chat template does not give one turn after another; it renders {rendered!r}')
    return ids[1:]

  def read(self, ids) -> str:
    """Text of generated ids, up to the first stop token."""
    ids = list(ids)
    stops = [i for i, token in enumerate(ids) if token in self.stop_ids]
    return self.tokenizer.decode(ids[:stops[0]] if stops else ids, skip_special_tokens=True).strip()


def arrays(spans: list[Span], length: int, cond_length: int,
           kinds: tuple[str, ...] = COND_VERIFI) -> dict[str, np.ndarray]:
  """Spans as padded arrays.

  Args:
    spans: from `Chat.spans`.
    length: s, tokens that the prompt is padded to.
    cond_length: q, tokens that its conditioning is padded to.
    kinds: kinds of span that condition the DiT.

  Returns:
    input_ids [s] i32 and attention_mask [s] bool; cond_index [q] i32, the positions in s of the tokens that condition
    the DiT, and cond_mask [q] bool; written [s] bool, the tokens that the VLM has to write (text and stop).

  Raises:
    TooLong: when the text does not fit; nothing is cut off.
  """
  ids = np.array([token for span in spans for token in span.ids], np.int32)
  lengths = [len(span.ids) for span in spans]
  cond_index = np.flatnonzero(np.repeat([span.kind in kinds for span in spans], lengths)).astype(np.int32)
  if len(ids) > length or len(cond_index) > cond_length:
    part, tokens, most = (('prompt', len(ids), length) if len(ids) > length else
                          ('text for the DiT', len(cond_index), cond_length))
    raise TooLong(f'a {part} of {tokens} tokens does not fit the {most} that are set: shorten the text or raise '
                  'data.max_prompt_tokens / data.max_rewrite_tokens')
  written = np.repeat([span.kind in ('written', 'stop') for span in spans], lengths)
  return dict(input_ids=_padded(ids, length), attention_mask=np.arange(length) < len(ids),
              cond_index=_padded(cond_index, cond_length), cond_mask=np.arange(cond_length) < len(cond_index),
              written=_padded(written, length))


def _padded(x: np.ndarray, length: int) -> np.ndarray:
  """x [n] with zeros after it. `np.pad` takes as long as everything else in `arrays`."""
  out = np.zeros(length, x.dtype)
  out[:len(x)] = x
  return out
