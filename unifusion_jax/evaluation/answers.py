"""Short answers: a VLM's probability that the next token after a prompt is the first one of some words."""

from collections.abc import Iterable, Iterator, Sequence
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax import sharding, verifi
from unifusion_jax.models.decoder import last_valid

SHORTEST = 64  # prompts are padded to this many tokens or to a power of 2 above: one compiled program for each


class Asked(NamedTuple):
  """A prompt that waits for its answer.

  spans: of the prompt, open at its end.
  images: arrays of the vision tower, of one shape in all prompts; None without images.
  ids: the token ids of each of the answers, as many answers in all prompts.
  """
  spans: list[verifi.Span]
  images: object
  ids: tuple[tuple[int, ...], ...]


def probabilities(vlm, asked: Iterable[Asked], batch_size: int) -> np.ndarray:
  """The probability of each answer to each of one or more prompts, f32 [n a].

  Prompts are taken as they are needed, so that the images of many never wait in memory.
  """
  rows, size = [], sharding.padded_batch(batch_size)
  for part in _parts(asked, size):
    padded = [part[i % len(part)] for i in range(size)]
    length = max(sum(len(span.ids) for span in one.spans) for one in part)
    length = max(length, min(max(SHORTEST, 1 << (length - 1).bit_length()), vlm.decoder.config.max_positions))
    arrays = [verifi.arrays(one.spans, length, length) for one in padded]
    most = max(len(ids) for one in part for ids in one.ids)
    batch = (np.stack([row['input_ids'] for row in arrays]), np.stack([row['attention_mask'] for row in arrays]),
             jax.tree.map(lambda *x: np.stack(x), *(one.images for one in padded)),
             np.array([[ids + (-1,) * (most - len(ids)) for ids in one.ids] for one in padded], np.int32))
    rows.append(sharding.gather(_probabilities(vlm, *sharding.shard(batch)))[:len(part)])
  return np.concatenate(rows)


def _parts(items: Iterable, size: int) -> Iterator[list]:
  """At most `size` items at a time; itertools.batched is there from Python 3.12 on."""
  items = iter(items)
  while part := list(itertools.islice(items, size)):
    yield part


@jax.jit
def _probabilities(vlm, input_ids, attention_mask, images, ids) -> jax.Array:
  """The probability that the next token is one of each row's ids [b a k], -1 for none, [b a]."""
  state = last_valid(vlm.last(input_ids, attention_mask, images), attention_mask)
  probabilities = jax.nn.softmax(vlm.decoder.logits(state)[:, 0])
  vocabulary = jnp.arange(probabilities.shape[-1])

  def of(ids):
    return jnp.sum(jnp.where(jnp.any(ids[:, :, None] == vocabulary, axis=1), probabilities, 0), axis=-1)

  return jnp.stack([of(ids[:, i]) for i in range(ids.shape[1])], axis=1)


def first_ids(chat: verifi.Chat, answers: Sequence[Sequence[str]]) -> tuple[tuple[int, ...], ...]:
  """The ids of the first tokens of each answer's words (capitalised too, and after a blank) that begin no other's."""
  found = [{ids[0] for ids in forms} for forms in _forms(chat, answers)]
  shared = _shared(found)
  return tuple(tuple(sorted(ids - shared)) for ids in found)


def second_ids(chat: verifi.Chat, answers: Sequence[Sequence[str]]) -> dict[int, tuple[tuple[int, ...], ...]]:
  """{first token of several answers: the ids that follow it in each answer, and in no other}.

  As of '1' and '10' in digits, and of words that a tokenizer does not know whole. What ends with the first token is
  followed by the end of the answer.
  """
  forms = _forms(chat, answers)
  after = {}
  for first in sorted(_shared([{ids[0] for ids in each} for each in forms])):
    following = [{i for ids in each if ids[0] == first for i in (ids[1:2] or chat.stop_ids)} for each in forms]
    after[first] = tuple(tuple(sorted(ids - _shared(following))) for ids in following)
  return after


def _forms(chat: verifi.Chat, answers: Sequence[Sequence[str]]) -> list[set[tuple[int, ...]]]:
  """The ids of each answer's words, as they may be written."""
  return [{ids for word in words for form in (word, word.capitalize())
           for ids in (chat.text_ids(form), chat.text_ids(f' {form}')) if ids and _begins(chat, ids[0], word)}
          for words in answers]


def _shared(ids: Sequence[set[int]]) -> set[int]:
  return {i for one, other in itertools.combinations(ids, 2) for i in one & other}


def _begins(chat: verifi.Chat, token: int, word: str) -> bool:
  """Whether a token is the beginning of a word, and not a blank alone or what stands for unknown text."""
  text = chat.tokenizer.decode([token]).strip().lower()
  return bool(text) and word.lower().startswith(text)
