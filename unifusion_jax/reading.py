"""Requests read by the VLM: the states that condition, and what it wrote. The half of `encode` without the model."""

from typing import NamedTuple

import numpy as np

from unifusion_jax import conditioning, prompting, randomness, remarks, sharding, wording
from unifusion_jax.conditioning import States
from unifusion_jax.models import text_generation
from unifusion_jax.request import SampleConfig
from unifusion_jax.weights import encoders


class Read(NamedTuple):
  """States of requests, padded to rows that the devices share evenly, and of each its text, warning and remark.

  strengths: how often each condition token counts, f32 [b q]; None: once.
  rewrites, warnings, remarks: as of `pipeline.Encoded`.
  """
  states: States
  strengths: np.ndarray | None
  rewrites: list[str]
  warnings: list[str]
  remarks: list[str]


def read(vlm: encoders.Encoder, taps: tuple[int, ...], prompts: prompting.Prompts, s: SampleConfig,
         vocabulary: wording.Vocabulary) -> Read:
  """The VLM writes a rewrite where none is given, and reads the given ones."""
  requests = prompts.requests
  images = prompts.images and sharding.shard(prompting.stacked(prompts.images))
  answers = prompts.known(s.verifi)
  cut = prompts.cut(answers)
  written, failures = [None] * len(requests), {}
  states, strengths = None, None
  if None in answers:
    states, written, failures = _write(vlm, taps, prompts, images, s)
    failures = {i: reason for i, reason in failures.items() if answers[i] is None}
    answers = [prompting.RAW if i in failures else text for i, text in enumerate(answers)]
  if states is None:
    states = states_of(vlm, taps, prompts.answered(answers), images)
  elif again := [i for i, text in enumerate(answers) if text is not None]:
    # Those rows alone, filled up to a power of two of what the devices share, so that few shapes are ever compiled
    least = sharding.padded_batch(1)
    size = min(len(requests), least << (-(-len(again) // least) - 1).bit_length())
    _, rows_read = next(sharding.batched(again, size))
    laid_out = prompts.answered(answers)
    part = prompts.images and sharding.shard(prompting.stacked([prompts.images[i] for i in rows_read]))
    place = np.array([rows_read.index(i) if i in again else -1 for i in range(len(requests))])
    new = states_of(vlm, taps, [laid_out[i] for i in rows_read], part)
    states = conditioning.replace_rows(states, new, sharding.shard(place))
  if any(strength != 1 for strength in s.strengths):
    strengths = prompts.strengths(s.strengths, states.mask.shape[1])
  rewrites = [request.instruction if text is prompting.RAW else new if text is None else text
              for request, text, new in zip(requests, answers, written)]
  warnings = [f'{failures[i]}: conditioned on the request itself' if i in failures else cut.get(i, '')
              for i in range(len(requests))]
  notes = [remarks.remark(request.instruction, new, len(request.references), vocabulary) if text is None else ''
           for request, text, new in zip(requests, answers, written)]
  return Read(states, strengths, rewrites, warnings, notes)


def states_of(vlm: encoders.Encoder, taps: tuple[int, ...], rows: list, images) -> States:
  """States of prompts with known answers (`Prompts.answered`), from one teacher-forced pass."""
  rows = sharding.shard(prompting.stacked(rows))
  return conditioning.read(vlm, rows['input_ids'], rows['attention_mask'], rows['cond_index'], rows['cond_mask'],
                           images, taps=taps)


def _write(vlm, taps, prompts: prompting.Prompts, images, s: SampleConfig):
  """Text generation: (states of that pass, texts, {row: why its text is unusable})."""
  chat, rows = prompts.encoder.chat, sharding.shard(prompting.stacked(prompts.unanswered()))
  seeds = [request.seed for request in prompts.requests]
  ids, lengths, _, prompt_hidden, hidden = text_generation.generate(
      vlm, rows['input_ids'], rows['attention_mask'], images, max_new=prompts.encoder.max_rewrite,
      stop_ids=chat.stop_ids, taps=taps, keep=rows['cond_index'], temperature=s.temperature, top_p=s.top_p,
      key=randomness.keys(seeds, randomness.TEXT_STREAM) if s.temperature else None)
  image = conditioning.image_tokens(vlm, rows['input_ids'], rows['cond_index'])
  states = conditioning.written(prompt_hidden, hidden, lengths, rows['cond_mask'], image)
  return states, *prompting.read_rewrites(chat, *sharding.gather((ids, lengths)))
