"""VQAScore (arXiv 2404.01291): a VLM's probability that an image shows a description."""

import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax import sharding, verifi
from unifusion_jax.data import transforms
from unifusion_jax.models.decoder import last_valid

QUESTION = 'does this picture show {}?'


def scores(vlm, encoder: transforms.PromptEncoder, images: list[np.ndarray], descriptions: list[str],
           batch_size: int) -> np.ndarray:
  """The probability of "yes" to QUESTION about each image uint8 [y x 3] and its description, [n] f32."""
  chat, size = encoder.chat, sharding.padded_batch(batch_size)
  yes = tuple(sorted({chat.text_ids(word)[0] for word in ('yes', 'Yes')}))
  inputs, image_tokens = zip(*(encoder.image_processor.preprocess((image,), 1) for image in images))
  spans = [chat.spans(QUESTION.format(text), counts, None, 'answer')
           for text, counts in zip(descriptions, image_tokens)]
  length = max(sum(len(span.ids) for span in prompt) for prompt in spans)
  rows = [verifi.arrays(prompt, length, length) for prompt in spans]
  probabilities = []
  for _, indices in sharding.batched(range(len(rows)), size):
    input_ids, attention_mask, tiles = (sharding.shard(jax.tree.map(lambda *x: np.stack(x), *part)) for part in (
        [rows[i]['input_ids'] for i in indices], [rows[i]['attention_mask'] for i in indices],
        [inputs[i] for i in indices]))
    probabilities.append(sharding.gather(_probability_of(vlm, input_ids, attention_mask, tiles, yes)))
  return np.concatenate(probabilities)[:len(rows)]


@jax.jit(static_argnums=4)
def _probability_of(vlm, input_ids, attention_mask, tiles, ids: tuple[int, ...]):
  """The probability that the next token is one of `ids`, [b] f32."""
  state = last_valid(vlm.last(input_ids, attention_mask, tiles), attention_mask)
  probabilities = jax.nn.softmax(vlm.decoder.logits(state)[:, 0])
  return jnp.sum(jnp.where(jnp.isin(jnp.arange(probabilities.shape[-1]), jnp.array(ids)), probabilities, 0), axis=-1)
