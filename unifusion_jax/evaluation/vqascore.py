"""VQAScore (arXiv 2404.01291): a VLM's probability that an image shows a description."""

import numpy as np

from unifusion_jax.data import transforms
from unifusion_jax.evaluation import answers

QUESTION = 'does this picture show {}?'


def scores(vlm, encoder: transforms.PromptEncoder, images: list[np.ndarray], descriptions: list[str],
           batch_size: int) -> np.ndarray:
  """The probability of "yes" to QUESTION about each image uint8 [y x 3] and its description, [n] f32."""
  chat = encoder.chat
  yes = answers.first_ids(chat, [['yes']])

  def asked():
    for image, text in zip(images, descriptions, strict=True):
      inputs, counts = encoder.image_processor.preprocess((image,), 1)
      yield answers.Asked(chat.spans(QUESTION.format(text), counts, None, 'answer'), inputs, yes)

  return answers.probabilities(vlm, asked(), batch_size)[:, 0]
