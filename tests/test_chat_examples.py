"""Examples for the embedded VLM: what it has to write, and what each of its image tokens should know."""

import dataclasses

import numpy as np
import pytest

from unifusion_jax import config
from unifusion_jax.data import transforms, vision_inputs
from unifusion_jax.errors import BrokenRecord
from unifusion_jax.scenes import chat_examples, examples, image_tokens

PROMPTS = transforms.PromptEncoder(str(config.ASSETS / 'vlm'), vision_inputs.TiledImages(64, 16, 1), markers=3,
                                   max_prompt=132, max_rewrite=52, budgets=(('edit', 110, 50), ('question', 80, 12)))


def test_what_the_vlm_has_to_write():
  for task in ('edit', 'question', 'rewrite'):
    record = examples.example(task, 'train', 5)
    example = chat_examples.ChatExample(PROMPTS)(record, np.random.default_rng(0))
    chat, mask = PROMPTS.chat, example['target_mask']
    answers = [record['caption'], *(answer for _, answer in record.get('more', ()))]
    wanted = [token for text in answers for token in (*chat.text_ids(text), *chat.stop_ids)]
    written = list(example['targets'][mask])
    assert written == wanted[:len(written)] and len(written) >= len(chat.text_ids(record['caption'])) + 1
    np.testing.assert_array_equal(example['input_ids'][example['predict'][mask] + 1], example['targets'][mask])
    assert ('attributes' in example) == bool(record['references']) and ('grounding' in example) == (task == 'edit')


def test_more_questions_are_asked_as_long_as_there_is_room():
  question = examples.example('question', 'train', 5)
  assert len(question['more']) == examples.MORE and 'more' not in examples.example('question', 'test', 5)
  record = dict(question, instruction='what is red?', caption='nothing', more=[('is anything green?', 'no')] * 4)
  chat = PROMPTS.chat
  turns = [chat.spans('what is red?', (16,), 'nothing', 'answer')]
  for turn in record['more']:
    turns.append(turns[-1] + chat.add_turn(*turn))
  ids = [[token for span in spans for token in span.ids] for spans in turns]
  unimaged = len(ids[0]) - 16 - sum(len(ends) for ends in chat.image_ends)
  turn = len(ids[1]) - len(ids[0])
  for text, written, asked in ((unimaged, 99, 0), (unimaged + 2 * turn + 1, 99, 2), (400, 99, 4), (400, 7, 2)):
    prompts = dataclasses.replace(PROMPTS, budgets=(('question', text, written),))
    example = chat_examples.ChatExample(prompts)(record, np.random.default_rng(0))
    assert list(example['input_ids'][example['attention_mask']]) == ids[asked], (text, written)


@pytest.mark.parametrize('tiles', [1, 4])
def test_every_image_token_has_its_row_of_attributes(tiles):
  """As many rows as the processor makes tokens of the references, the rest padding; edits say what changes."""
  prompts = PROMPTS.with_tiles(tiles)
  record = dict(examples.example('edit', 'train', 3, reference_size=128), task='edit', tiles=tiles)
  example = chat_examples.ChatExample(PROMPTS)(record, np.random.default_rng(0))
  _, (count,) = prompts.image_processor.preprocess(record['references'])
  assert example['attributes'].shape == (prompts.image_processor.max_tokens, image_tokens.COLUMNS)
  assert (example['attributes'][:count, 0] >= 0).all() and (example['attributes'][count:] == -1).all()
  assert not example['grounding'][count:].any() and (example['grounding'] <= (example['attributes'][:, 0] > 0)).all()


def test_text_that_does_not_fit_is_a_broken_record():
  long = dict(examples.example('edit', 'train', 3), caption='red ' * 60)
  with pytest.raises(BrokenRecord, match='does not fit'):
    chat_examples.ChatExample(PROMPTS)(long, np.random.default_rng(0))


@pytest.mark.parametrize('task', ['edit', 'caption', 'question', 'rewrite', 'multi'])
def test_specs_are_the_shapes_of_real_examples(task):
  transform = chat_examples.ChatExample(dataclasses.replace(PROMPTS, budgets=(('edit', 110, 50),)))
  for i in range(4):
    record = examples.example(task, 'train', i)
    example, spec = transform(record, np.random.default_rng(0)), transform.spec(64, 64, len(record['references']), task)
    assert {name: (x.shape, x.dtype) for name, x in example.items()} == {
        name: (x.shape, np.dtype(x.dtype)) for name, x in spec.items()}
