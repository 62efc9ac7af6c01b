"""A judge: a VLM that is asked about images, by the probabilities of its short answers.

  probability of yes  to "does the image show PROMPT?", VQAScore (arXiv 2404.01291); of an edit without a caption, to
                      whether the second image is the first one after it.
  questions           of the set, each by the options that its answer is one of: yes and no, or numbers. It is right
                      where the right option is the most probable one. A question whose options together have less than
                      half of the probability is unanswered, which counts as wrong and is counted.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import pathlib

import numpy as np

from unifusion_jax import verifi
from unifusion_jax.commands import describe
from unifusion_jax.data import vision_inputs
from unifusion_jax.errors import UserError
from unifusion_jax.evaluation import answers, vqascore
from unifusion_jax.evaluation.benchmarks.records import Question, Record
from unifusion_jax.evaluation.images import embedding_distance
from unifusion_jax.weights import encoders

SHOWS = 'Does this figure show "{}"? Please answer yes or no.'  # the question of VQAScore
EDITED = ('The last image should be the one before it after this edit: "{}". Was the edit made, and nothing else '
          'changed? Please answer yes or no.')
ONE_WORD = '{} Answer in one word.'  # GenEval 2
YES_NO = (('yes',), ('no',))
NUMBERS = tuple(zip(('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten'),
                    map(str, range(11))))
ANSWERED = 0.5  # least probability of all options together
LEAST = 0.01    # of a first token of several options, to look at the second


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a judge said to the questions of one image.

  Attributes:
    right: whether each was answered rightly, bool [q].
    probability: of each right answer, f32 [q].
    answered: whether it gave one of the options, bool [q].
  """
  right: np.ndarray
  probability: np.ndarray
  answered: np.ndarray


@dataclasses.dataclass(frozen=True)
class Judge:
  """A VLM with its way of asking.

  Attributes:
    shows: the question about a description, with {} in its place.
    asks: around a question of a set.
  """
  vlm: encoders.Encoder
  chat: verifi.Chat
  image_processor: vision_inputs.ImageProcessor
  batch_size: int
  shows: str
  asks: str

  @classmethod
  def load(cls, folder: pathlib.Path, *, dtype: str, quantized: str, cache: str | None, tiles: int, batch_size: int,
           question: str = '') -> 'Judge':
    """The judge in a folder. UserError for a model that reads no images.

    question: about a description, with {} in its place; '' for that of VQAScore, or the embedded VLM's own.
    """
    config = encoders.config(folder)
    image_processor = vision_inputs.for_model(config, tiles, folder)
    if not image_processor.max_tokens:
      raise UserError(f'{folder} reads no images, and a judge has to: give a VLM, --config.benchmark.judge=FOLDER')
    chat = verifi.Chat(folder, image_processor.image_tokens)
    vision_inputs.check(config, chat)
    embedded = describe.is_embedded(chat.folder)
    return cls(encoders.load(folder, dtype, quantized, cache), chat, image_processor, batch_size,
               question or (vqascore.QUESTION if embedded else SHOWS), '{}' if embedded else ONE_WORD)

  def distances(self, images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distances of the states that the VLM's vision tower gives of images and others uint8 [n y x 3], [n]."""
    return embedding_distance(self.vlm, self, images, others, min(self.batch_size, len(images)))

  def shown(self, records: Sequence[Record], images: Sequence[np.ndarray]) -> np.ndarray:
    """The probability that each image uint8 [y x 3] is what its record asks for, [n]."""
    yes, no = answers.first_ids(self.chat, YES_NO)
    most = max(1 if record.caption else 1 + len(record.references) for record in records)
    question = lambda record: (self.shows if record.caption else EDITED).replace('{}', record.caption or record.prompt)
    return answers.probabilities(self.vlm, (
        self._asked((image,) if record.caption else (*record.references, image), question(record), most, (yes, no))
        for record, image in zip(records, images, strict=True)), self.batch_size)[:, 0]

  def answer(self, records: Sequence[Record], images: Sequence[np.ndarray]) -> list[Answer]:
    """The answers to the questions of each record about its image uint8 [y x 3]."""
    rows = [(image, question) for record, image in zip(records, images, strict=True) for question in record.questions]
    right, probability, answered = np.zeros(len(rows), bool), np.zeros(len(rows), np.float32), np.zeros(len(rows), bool)
    options = [_options(question) for _, question in rows]
    for each in dict.fromkeys(options):
      members = [i for i, option in enumerate(options) if option == each]
      found = self._probabilities([rows[i] for i in members], each)
      wanted = [next(k for k, words in enumerate(each) if rows[i][1].answer in words) for i in members]
      probability[members] = found[np.arange(len(members)), wanted]
      several = len(each) > 1
      right[members] = np.argmax(found, axis=1) == wanted if several else found[:, 0] >= ANSWERED
      answered[members] = found.sum(axis=1) >= ANSWERED if several else True
    ends = np.cumsum([len(record.questions) for record in records])[:-1]
    return [Answer(*each) for each in zip(*(np.split(x, ends) for x in (right & answered, probability, answered)))]

  def _probabilities(self, rows: Sequence[tuple[np.ndarray, Question]], options) -> np.ndarray:
    """The probability of each option to each question about its image, [n a]."""
    ids, after = answers.first_ids(self.chat, options), answers.second_ids(self.chat, options)
    if unknown := [words[0] for k, words in enumerate(options)
                   if not ids[k] and not any(following[k] for following in after.values())]:
      raise UserError(f'{self.chat.folder}: no two tokens of its tokenizer tell the answer {unknown[0]!r} from others: '
                      'take another VLM as the judge')

    def asked(chosen, ids, *written):
      prompts = (self._asked((rows[i][0],), self.asks.format(rows[i][1].text), 1, ids, written) for i in chosen)
      return answers.probabilities(self.vlm, prompts, self.batch_size)

    found = asked(range(len(rows)), (*ids, *((first,) for first in after)))
    found, begun = found[:, :len(options)].copy(), found[:, len(options):]
    for (first, following), share in zip(after.items(), begun.T):
      chosen = np.flatnonzero(share >= LEAST)
      if len(chosen):
        found[chosen] += share[chosen, None] * asked(chosen, following, first)
    return found

  def _asked(self, images: Iterable, question: str, most: int, ids, written: tuple[int, ...] = ()) -> answers.Asked:
    inputs, counts = self.image_processor.preprocess(tuple(images), most)
    spans = describe.layout(self.chat, question, counts, None)
    return answers.Asked([*spans, verifi.Span('written', written)], inputs, ids)


def _options(question: Question) -> tuple[tuple[str, ...], ...]:
  """The answers that a question has, the words of each; of a word that is neither yes nor a number that one alone."""
  return next((options for options in (YES_NO, NUMBERS) if any(question.answer in words for words in options)),
              ((question.answer,),))
