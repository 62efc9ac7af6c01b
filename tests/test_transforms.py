"""One example at a time: what reaches the DiT and the VLM, and what dropping leaves."""

import dataclasses

import numpy as np
import pytest

from unifusion_jax import config
from unifusion_jax.data import sources, transforms, vision_inputs
from unifusion_jax.scenes import examples, world

LAYOUT = transforms.PromptEncoder(str(config.ASSETS / 'vlm'), vision_inputs.TiledImages(64, 16, 1), 132, 52,
                           (('edit', 110, 50), ('question', 80, 12)))
EDIT = examples.example('edit', 'train', 3)


def kept_ids(example):
  return list(example['input_ids'][example['cond_index'][example['cond_mask']]])


def test_an_edit_keeps_its_image_and_the_written_caption():
  example = transforms.GenerationExample(LAYOUT, cond_dropout=0, image_dropout=0)(EDIT, np.random.default_rng(0))
  chat = LAYOUT.chat
  assert kept_ids(example) == [chat.image_id] * 16 + list(chat.text_ids(EDIT['caption'])) + list(chat.stop_ids)
  assert example['tiles'].shape == (1, 64, 64, 3) and example['target'].min() >= -1 and example['target'].max() <= 1
  assert (len(example['input_ids']), len(example['cond_index'])) == LAYOUT.lengths(1, 'edit') != LAYOUT.lengths(1)


@pytest.mark.parametrize('drops, wanted', [
    (dict(cond_dropout=1), 'stop'), (dict(cond_dropout=0, image_dropout=1), 'text'), (dict(cond_dropout=0, image_dropout=0, text_dropout=1), 'image'),
    (dict(cond_dropout=0, image_dropout=0, instruction_prob=1), 'raw')])
def test_dropping(drops, wanted):
  chat = LAYOUT.chat
  example = transforms.GenerationExample(LAYOUT, **drops)(EDIT, np.random.default_rng(0))
  whole = transforms.GenerationExample(LAYOUT, cond_dropout=0, image_dropout=0)(EDIT, np.random.default_rng(0))
  assert {k: v.shape for k, v in example.items()} == {k: v.shape for k, v in whole.items()}
  stop, images = list(chat.stop_ids), [chat.image_id] * 16
  assert kept_ids(example) == {
      'stop': stop, 'text': list(chat.text_ids(EDIT['caption'])) + stop, 'image': images + stop,
      'raw': images + list(chat.text_ids(EDIT['instruction'])) + stop}[wanted]
  if wanted == 'stop':  # the null condition has seen no image either
    assert chat.image_id not in example['input_ids']


def test_the_null_condition_is_the_same_in_training_and_sampling():
  dropped = transforms.GenerationExample(LAYOUT, cond_dropout=1)(EDIT, np.random.default_rng(0))
  spans = LAYOUT.chat.spans('', (), '')
  assert list(dropped['input_ids'][dropped['attention_mask']]) == [token for span in spans for token in span.ids]


def test_what_the_vlm_has_to_write():
  for task in ('edit', 'question', 'rewrite'):
    record = examples.example(task, 'train', 5)
    example = transforms.ChatExample(LAYOUT)(record, np.random.default_rng(0))
    chat, mask = LAYOUT.chat, example['target_mask']
    answers = [record['caption'], *(answer for _, answer in record.get('more', ()))]
    wanted = [token for text in answers for token in (*chat.text_ids(text), *chat.stop_ids)]
    said = list(example['targets'][mask])
    assert said == wanted[:len(said)] and len(said) >= len(chat.text_ids(record['caption'])) + 1
    np.testing.assert_array_equal(example['input_ids'][example['predict'][mask] + 1], example['targets'][mask])
    assert ('readout' in example) == bool(record['references']) and ('changes' in example) == (task == 'edit')


def test_more_questions_are_asked_as_long_as_there_is_room():
  drawn = examples.example('question', 'train', 5)
  assert len(drawn['more']) == examples.MORE and 'more' not in examples.example('question', 'test', 5)
  record = dict(drawn, instruction='what is red?', caption='nothing', more=[('is anything green?', 'no')] * 4)
  chat = LAYOUT.chat
  turns = [chat.spans('what is red?', (16,), 'nothing', 'answer')]
  for turn in record['more']:
    turns.append(turns[-1] + chat.add_turn(*turn))
  ids = [[token for span in spans for token in span.ids] for spans in turns]
  unimaged = len(ids[0]) - 16 - sum(len(ends) for ends in chat.image_ends)
  turn = len(ids[1]) - len(ids[0])
  for text, written, asked in ((unimaged, 99, 0), (unimaged + 2 * turn + 1, 99, 2), (400, 99, 4), (400, 7, 2)):
    layout = dataclasses.replace(LAYOUT, rooms=(('question', text, written),))
    example = transforms.ChatExample(layout)(record, np.random.default_rng(0))
    assert list(example['input_ids'][example['attention_mask']]) == ids[asked], (text, written)


def test_turns_are_the_templates_own():
  chat, turns = LAYOUT.chat, [('what colour is it?', 'red'), ('is it a ring?', 'no')]
  spans = chat.spans(turns[0][0], (), turns[0][1], 'Answer.') + chat.add_turn(*turns[1])
  messages = [dict(role='system', content='Answer.')]
  for question, answer in turns:
    messages += [dict(role='user', content=question), dict(role='assistant', content=answer)]
  rendered = chat.tokenizer.apply_chat_template(messages, tokenize=False)
  assert chat.tokenizer.decode([token for span in spans for token in span.ids]) == rendered.rstrip('\n')


def test_text_that_does_not_fit_is_a_broken_record():
  long = dict(EDIT, caption='red ' * 60)
  for transform in (transforms.GenerationExample(LAYOUT, cond_dropout=0, image_dropout=0), transforms.ChatExample(LAYOUT)):
    with pytest.raises(sources.BrokenRecord, match='does not fit'):
      transform(long, np.random.default_rng(0))


def test_the_readout_says_what_covers_each_token():
  scene = world.Scene((world.Object('star', 'red', 'large', 'solid', 0.30, 0.25),
                       world.Object('ring', 'blue', 'small', 'striped', 0.80, 0.80)),
                      world.Background('gradient', ('sky', 'sand')))
  table = transforms.readout(scene, 4).reshape(4, 4, 9)
  star = table[0, 1]  # the cell around (.375, .125)
  assert star[0] == 1 and world.SHAPES[int(star[1])] == 'star' and list(world.COLOURS)[int(star[2])] == 'red'
  np.testing.assert_allclose(star[5:7], [(0.30 - 0.375) * 4, (0.25 - 0.125) * 4], atol=1e-6)
  ring = table[3, 3]
  assert world.SHAPES[int(ring[1])] == 'ring' and world.FILLS[int(ring[4])] == 'striped'
  assert table[0, 3, 0] == 0 and table[3, 0, 0] == 0
  assert (table[..., 7] == world.BACKGROUND_KINDS.index('gradient')).all() and len(np.unique(table[..., 8])) == 1
  without = dataclasses.replace(scene, objects=scene.objects[1:])
  np.testing.assert_array_equal(transforms.changes(scene, without, 4).reshape(4, 4),
                                (table[..., 0] > 0) & (table[..., 1] == star[1]))
  assert not transforms.changes(scene, scene, 4).any()


def test_several_references_each_bring_their_tokens():
  record = next(r for r in (examples.example('multi', 'train', i) for i in range(20)) if len(r['references']) == 3)
  layout = dataclasses.replace(LAYOUT, rooms=())
  example = transforms.GenerationExample(layout, cond_dropout=0, image_dropout=0)(record, np.random.default_rng(0))
  assert example['tiles'].shape[0] == 3 and kept_ids(example).count(layout.chat.image_id) == 48


def test_rewrites_take_the_place_of_the_caption():
  chat = LAYOUT.chat
  rewrites = [list(chat.text_ids(text)) for text in ('a red circle', 'a blue star')]
  transform = transforms.GenerationExample(LAYOUT, cond_dropout=0, image_dropout=0)
  seen = {tuple(kept_ids(transform(dict(EDIT, rewrites=rewrites), np.random.default_rng(i)))[16:]) for i in range(20)}
  assert seen == {(*ids, *chat.stop_ids) for ids in rewrites}


def test_a_raw_request_that_is_too_long_stays_rewritten():
  long = dict(EDIT, instruction='red ' * 60)
  example = transforms.GenerationExample(dataclasses.replace(LAYOUT, rooms=(('edit', 240, 50),)), cond_dropout=0, image_dropout=0, instruction_prob=1)(
      long, np.random.default_rng(0))
  assert kept_ids(example)[16:] == [*LAYOUT.chat.text_ids(EDIT['caption']), *LAYOUT.chat.stop_ids]


def test_a_request_without_a_rewrite_that_is_too_long_to_be_kept_has_its_caption():
  layout = dataclasses.replace(LAYOUT, text=300, rooms=())
  record = dict(EDIT, instruction='red ' * 60, rewrites=[])
  example = transforms.GenerationExample(layout, cond_dropout=0, image_dropout=0)(record, np.random.default_rng(0))
  chat = layout.chat
  assert kept_ids(example)[16:] == [*chat.text_ids(EDIT['caption']), *chat.stop_ids]
  assert layout.fits(record) and not layout.fits(dict(record, instruction='red ' * 300))


def test_a_model_without_eyes_has_no_tiles():
  layout = dataclasses.replace(LAYOUT, image_processor=vision_inputs.NoImages())
  assert layout.in_tiles(4) == layout


def test_a_record_says_in_how_many_tiles_it_is_shown():
  wide = dict(EDIT, references=[np.zeros((64, 128, 3), np.uint8)])
  transform = transforms.GenerationExample(dataclasses.replace(LAYOUT, rooms=()), cond_dropout=0, image_dropout=0)
  for tiles, room, shown in ((1, 1, 1), (4, 5, 3)):  # two tiles and the thumbnail, in the room of four and one
    example = transform(dict(wide, tiles=tiles), np.random.default_rng(0))
    assert len(example['tiles']) == room and kept_ids(example).count(LAYOUT.chat.image_id) == 16 * shown
