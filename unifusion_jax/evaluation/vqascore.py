"""VQAScore (arXiv 2404.01291): a VLM's probability that an image shows a description."""

from collections.abc import Sequence

import numpy as np

from unifusion_jax.data import transforms
from unifusion_jax.evaluation import answers

QUESTION = 'does this picture show {}?'


def scores(vlm, encoder: transforms.PromptEncoder, images: Sequence[np.ndarray], descriptions: Sequence[str],
           batch_size: int) -> np.ndarray:
  """The probability of "yes" to QUESTION about each image uint8 [y x 3] and its description, [n] f32."""
  questions = [QUESTION.format(text) for text in descriptions]
  return probabilities(vlm, encoder, images, questions, ['yes'] * len(questions), batch_size)


def probabilities(vlm, encoder: transforms.PromptEncoder, images: Sequence[np.ndarray], questions: Sequence[str],
                  words: Sequence[str], batch_size: int) -> np.ndarray:
  """The probability that the answer to a question about an image uint8 [y x 3] begins as a word does, [n] f32."""
  chat = encoder.chat
  ids = {word: answers.first_ids(chat, [[word]]) for word in dict.fromkeys(words)}

  def asked():
    for image, question, word in zip(images, questions, words, strict=True):
      inputs, counts = encoder.image_processor.preprocess((image,), 1)
      yield answers.Asked(chat.spans(question, counts, None, 'answer'), inputs, ids[word])

  return answers.probabilities(vlm, asked(), batch_size)[:, 0]
