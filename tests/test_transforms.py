"""One example at a time: what reaches the DiT and the VLM, and what dropping leaves."""

import dataclasses

import jax
import numpy as np
import pytest

from unifusion_jax import config, parts
from unifusion_jax.data import transforms, vision_inputs
from unifusion_jax.data.config import Task
from unifusion_jax.errors import BrokenRecord
from unifusion_jax.scenes import examples
from unifusion_jax.weights import encoders, hub

PROMPTS = transforms.PromptEncoder(str(config.ASSETS / 'vlm'), vision_inputs.TiledImages(64, 16, 1), markers=3,
                                   max_prompt=132, max_rewrite=52, budgets=(('edit', 110, 50),))
EDIT = examples.example('edit', 'train', 3)


def kept_ids(example):
  return list(example['input_ids'][example['cond_index'][example['cond_mask']]])


def test_an_edit_keeps_its_image_and_the_written_caption():
  example = transforms.GenerationExample(PROMPTS, cond_dropout=0, image_dropout=0)(EDIT, np.random.default_rng(0))
  chat = PROMPTS.chat
  assert kept_ids(example) == [chat.image_id] * 16 + list(chat.text_ids(EDIT['caption'])) + list(chat.stop_ids)
  assert example['tiles'].shape == (1, 64, 64, 3) and example['target'].dtype == example['tiles'].dtype == np.uint8
  assert (len(example['input_ids']), len(example['cond_index'])) == PROMPTS.lengths(1, 'edit') != PROMPTS.lengths(1)


@pytest.mark.parametrize('drops, wanted', [
    (dict(cond_dropout=1), 'stop'), (dict(cond_dropout=0, image_dropout=1), 'text'),
    (dict(cond_dropout=0, image_dropout=0, text_dropout=1), 'image'),
    (dict(cond_dropout=0, image_dropout=0, instruction_prob=1), 'raw')])
def test_dropping(drops, wanted):
  chat = PROMPTS.chat
  example = transforms.GenerationExample(PROMPTS, **drops)(EDIT, np.random.default_rng(0))
  whole = transforms.GenerationExample(PROMPTS, cond_dropout=0, image_dropout=0)(EDIT, np.random.default_rng(0))
  assert {k: v.shape for k, v in example.items()} == {k: v.shape for k, v in whole.items()}
  stop, images = list(chat.stop_ids), [chat.image_id] * 16
  assert kept_ids(example) == {
      'stop': stop, 'text': list(chat.text_ids(EDIT['caption'])) + stop, 'image': images + stop,
      'raw': images + list(chat.text_ids(EDIT['instruction'])) + stop}[wanted]
  if wanted == 'stop':  # the null condition has seen no image either
    assert chat.image_id not in example['input_ids']


def test_the_null_condition_is_the_same_in_training_and_sampling():
  dropped = transforms.GenerationExample(PROMPTS, cond_dropout=1)(EDIT, np.random.default_rng(0))
  spans = PROMPTS.chat.spans('', (), '')
  assert list(dropped['input_ids'][dropped['attention_mask']]) == [token for span in spans for token in span.ids]


def test_turns_are_the_templates_own():
  chat, turns = PROMPTS.chat, [('what colour is it?', 'red'), ('is it a ring?', 'no')]
  spans = chat.spans(turns[0][0], (), turns[0][1], 'Answer.') + chat.add_turn(*turns[1])
  messages = [dict(role='system', content='Answer.')]
  for question, answer in turns:
    messages += [dict(role='user', content=question), dict(role='assistant', content=answer)]
  rendered = chat.tokenizer.apply_chat_template(messages, tokenize=False)
  assert chat.tokenizer.decode([token for span in spans for token in span.ids]) == rendered.rstrip('\n')


def test_text_that_does_not_fit_is_a_broken_record():
  long = dict(EDIT, caption='red ' * 60)
  with pytest.raises(BrokenRecord, match='does not fit'):
    transforms.GenerationExample(PROMPTS, cond_dropout=0, image_dropout=0)(long, np.random.default_rng(0))


def test_several_references_each_bring_their_tokens():
  record = next(r for r in (examples.example('multi', 'train', i) for i in range(20)) if len(r['references']) == 3)
  prompts = dataclasses.replace(PROMPTS, budgets=())
  example = transforms.GenerationExample(prompts, cond_dropout=0, image_dropout=0)(record, np.random.default_rng(0))
  assert example['tiles'].shape[0] == 3 and kept_ids(example).count(prompts.chat.image_id) == 48


def test_rewrites_take_the_place_of_the_caption():
  chat = PROMPTS.chat
  rewrites = [list(chat.text_ids(text)) for text in ('a red circle', 'a blue star')]
  transform = transforms.GenerationExample(PROMPTS, cond_dropout=0, image_dropout=0)
  seen = {tuple(kept_ids(transform(dict(EDIT, rewrites=rewrites), np.random.default_rng(i)))[16:]) for i in range(20)}
  assert seen == {(*ids, *chat.stop_ids) for ids in rewrites}


def test_a_raw_request_that_is_too_long_stays_rewritten():
  long = dict(EDIT, instruction='red ' * 60)
  prompts = dataclasses.replace(PROMPTS, budgets=(('edit', 240, 50),))
  transform = transforms.GenerationExample(prompts, cond_dropout=0, image_dropout=0, instruction_prob=1)
  example = transform(long, np.random.default_rng(0))
  assert kept_ids(example)[16:] == [*PROMPTS.chat.text_ids(EDIT['caption']), *PROMPTS.chat.stop_ids]


def test_a_request_without_a_rewrite_that_is_too_long_to_be_kept_has_its_caption():
  prompts = dataclasses.replace(PROMPTS, max_prompt=300, budgets=())
  record = dict(EDIT, instruction='red ' * 60, rewrites=[])
  example = transforms.GenerationExample(prompts, cond_dropout=0, image_dropout=0)(record, np.random.default_rng(0))
  chat = prompts.chat
  assert kept_ids(example)[16:] == [*chat.text_ids(EDIT['caption']), *chat.stop_ids]
  assert prompts.fits(record) and not prompts.fits(dict(record, instruction='red ' * 300))


def test_a_language_model_has_no_tiles():
  prompts = dataclasses.replace(PROMPTS, image_processor=vision_inputs.NoImages(), markers=0)
  assert prompts.with_tiles(4) == prompts and prompts.lengths(0) == (132, 52)


def test_a_record_says_in_how_many_tiles_it_is_shown():
  wide = dict(EDIT, references=[np.zeros((64, 128, 3), np.uint8)])
  transform = transforms.GenerationExample(dataclasses.replace(PROMPTS, budgets=()), cond_dropout=0, image_dropout=0)
  for tiles, most, shown in ((1, 1, 1), (4, 5, 3)):  # two tiles and the thumbnail, of at most four and one
    example = transform(dict(wide, tiles=tiles), np.random.default_rng(0))
    assert len(example['tiles']) == most and kept_ids(example).count(PROMPTS.chat.image_id) == 16 * shown


def shapes(tree):
  return jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), tree)


@pytest.mark.parametrize('online', [False, True])
@pytest.mark.parametrize('kind', ['tiles', 'patches', 'none'])
def test_specs_are_the_shapes_of_real_examples(kind, online, qwen):
  """Of every number of references, task, number of tiles, and whatever is dropped."""
  prompts = dict(
      tiles=PROMPTS, none=dataclasses.replace(PROMPTS, image_processor=vision_inputs.NoImages(), markers=0),
      patches=dataclasses.replace(PROMPTS, folder=str(qwen), markers=2, image_processor=vision_inputs.for_model(
          encoders.config(qwen), 1, qwen)))[kind]
  records = [examples.example('t2i', 'train', 0, objects=(1, 2))]
  if kind != 'none':
    records += [EDIT, dict(EDIT, task='elsewhere'), dict(EDIT, task='', references=EDIT['references'] * 3)]
    records += [dict(EDIT, tiles=4, references=[np.zeros((64, 128, 3), np.uint8)])]
  for record in records:
    for drops in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)):
      transform = transforms.GenerationExample(prompts, *drops, rewrite_online=online)
      size, references = record['target'].shape[:2], len(record['references'])
      spec = transform.spec(*size, references, record['task'], record.get('tiles', 0))
      assert shapes(spec) == shapes(transform(record, np.random.default_rng(0)))
  assert shapes(transforms.TargetOnly().spec(*EDIT['target'].shape[:2])) == shapes(transforms.TargetOnly()(EDIT, None))


def test_an_online_rewrite_leaves_the_answer_open_and_says_where_the_request_is():
  chat, transform = PROMPTS.chat, transforms.GenerationExample(PROMPTS, 0.0, 0.0, rewrite_online=True)
  example = transform(EDIT, np.random.default_rng(0))
  assert example['needs_rewrite'] and kept_ids(example) == [chat.image_id] * 16
  fallback = example['input_ids'][example['fallback_index'][example['fallback_mask']]]
  assert list(fallback) == list(chat.text_ids(EDIT['instruction']))
  dropped = dataclasses.replace(transform, cond_dropout=1.0)(EDIT, np.random.default_rng(0))
  assert not dropped['needs_rewrite'] and kept_ids(dropped) == list(chat.stop_ids)


def test_a_prompt_encoder_is_the_recipes(recipe, qwen):
  """Its budgets and system prompt, and as many ids around an image as its template has; without a tokenizer too."""
  data = dataclasses.replace(recipe().data, tasks=(Task('edit', prompt=140, rewrite=20), Task('t2i')), only='t2i',
                             tiles=(1, 4))
  for vlm in (recipe().vlm, str(qwen)):
    made = recipe(vlm=vlm, data=data, system='answer')
    prompts, abstract = transforms.prompt_encoder(made), transforms.abstract_prompt_encoder(made)
    assert prompts.budget() == (140, 32) and prompts.system == 'answer'  # enough for all tasks, whatever `only` says
    assert prompts.budget('edit') == (140, 20) and prompts.budget('t2i') == (112, 32)
    assert prompts.lengths(2, 'edit') == (140 + 2 * (prompts.image_processor.max_tokens + prompts.markers),
                                          20 + 2 * prompts.image_processor.max_tokens)
    assert abstract.markers == prompts.markers == sum(map(len, prompts.chat.image_ends))
    if vlm != str(qwen):  # whose own limits of pixels its config.json does not say
      assert abstract.lengths(2, 'edit') == prompts.lengths(2, 'edit')


def test_a_folder_may_be_a_text(qwen):
  """Wherever one is named."""
  for folder in (config.ASSETS / 'vlm', qwen):
    ways = (lambda name: transforms.PromptEncoder.load(name, 2, 128, 52), hub.fingerprint, encoders.preprocessor)
    for read in ways:
      assert read(str(folder)) == read(folder)
  assert parts.describe(str(config.ASSETS / 'edit')) == parts.describe(config.ASSETS / 'edit')
