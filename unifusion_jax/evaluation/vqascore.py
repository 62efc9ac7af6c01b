"""VQAScore (arXiv 2404.01291): a VLM's probability that an image shows a description."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax import sharding, verifi
from unifusion_jax.data import transforms
from unifusion_jax.models.decoder import last_valid

QUESTION = 'does this picture show {}?'


def scores(vlm, encoder: transforms.PromptEncoder, images: Sequence[np.ndarray], descriptions: Sequence[str],
           batch_size: int) -> np.ndarray:
  """The probability of "yes" to QUESTION about each image uint8 [y x 3] and its description, [n] f32."""
  questions = [QUESTION.format(text) for text in descriptions]
  return probabilities(vlm, encoder, images, questions, ['yes'] * len(questions), batch_size)


def probabilities(vlm, encoder: transforms.PromptEncoder, images: Sequence[np.ndarray], questions: Sequence[str],
                  answers: Sequence[str], batch_size: int) -> np.ndarray:
  """The probability that the answer to a question about an image uint8 [y x 3] begins with a word's first token.

  [n] f32; a word counts with and without a capital letter.
  """
  chat, size = encoder.chat, sharding.padded_batch(batch_size)
  ids = np.array([[chat.text_ids(word)[0] for word in (answer.lower(), answer.capitalize())] for answer in answers])
  inputs, image_tokens = zip(*(encoder.image_processor.preprocess((image,), 1) for image in images))
  spans = [chat.spans(question, counts, None, 'answer') for question, counts in zip(questions, image_tokens)]
  length = max(sum(len(span.ids) for span in prompt) for prompt in spans)
  rows = [verifi.arrays(prompt, length, length) for prompt in spans]
  found = []
  for _, indices in sharding.batched(range(len(rows)), size):
    input_ids, attention_mask, tiles, words = (
        sharding.shard(jax.tree.map(lambda *x: np.stack(x), *part)) for part in (
            [rows[i]['input_ids'] for i in indices], [rows[i]['attention_mask'] for i in indices],
            [inputs[i] for i in indices], [ids[i] for i in indices]))
    found.append(sharding.gather(_probability_of(vlm, input_ids, attention_mask, tiles, words)))
  return np.concatenate(found)[:len(rows)]


@jax.jit
def _probability_of(vlm, input_ids, attention_mask, tiles, ids):
  """The probability that the next token is one of `ids` [b k], [b] f32."""
  state = last_valid(vlm.last(input_ids, attention_mask, tiles), attention_mask)
  probabilities = jax.nn.softmax(vlm.decoder.logits(state)[:, 0])
  wanted = jnp.any(jnp.arange(probabilities.shape[-1]) == ids[..., None], axis=1)
  return jnp.sum(jnp.where(wanted, probabilities, 0), axis=-1)
