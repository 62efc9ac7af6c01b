"""VQAScore (arXiv 2404.01291): a VLM's probability that an image shows a description."""

import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax import sharding, verifi
from unifusion_jax.data import transforms
from unifusion_jax.models.decoder import last_valid
from unifusion_jax.scenes import questions


def scores(vlm, layout: transforms.PromptEncoder, images: list[np.ndarray], descriptions: list[str],
           batch_size: int) -> np.ndarray:
  """Probabilities of "yes" to 'does this image show ...?', [n] f32; images are uint8 [y x 3]."""
  chat, size = layout.chat, sharding.padded_batch(batch_size)
  yes = tuple(sorted({chat.text_ids(word)[0] for word in ('yes', 'Yes')}))
  inputs, image_tokens = zip(*(layout.image_processor.preprocess((image,), 1) for image in images))
  spans = [chat.spans(questions.shows(text), counts, None, 'answer')
           for text, counts in zip(descriptions, image_tokens)]
  length = max(sum(len(span.ids) for span in each) for each in spans)
  rows = [verifi.arrays(each, length, length) for each in spans]
  probabilities = []
  for _, chosen in sharding.batched(range(len(rows)), size):
    tokens, valid, tiles = (sharding.shard(jax.tree.map(lambda *x: np.stack(x), *part)) for part in (
        [rows[i]['input_ids'] for i in chosen], [rows[i]['attention_mask'] for i in chosen],
        [inputs[i] for i in chosen]))
    probabilities.append(sharding.gather(_probability_of(vlm, tokens, valid, tiles, yes)))
  return np.concatenate(probabilities)[:len(rows)]


@jax.jit(static_argnums=4)
def _probability_of(vlm, tokens, valid, tiles, ids: tuple[int, ...]):
  """The probability that the next token is one of `ids`, [b] f32."""
  state = last_valid(vlm.last(tokens, valid, tiles), valid)
  probabilities = jax.nn.softmax(vlm.decoder.logits(state)[:, 0])
  return jnp.sum(jnp.where(jnp.isin(jnp.arange(probabilities.shape[-1]), jnp.array(ids)), probabilities, 0), axis=-1)
