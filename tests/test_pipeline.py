"""From requests to images: the single pass and the teacher-forced one agree, answers do not depend on their batch."""

import dataclasses
import json
import re
import shutil

from flax import nnx
import jax
import numpy as np
from PIL import Image
import pytest

from unifusion_jax import config, jobs, pipeline, sharding, verifi
from unifusion_jax.commands import sample
from unifusion_jax.data import imaging, transforms
from unifusion_jax.models import causal_lm, decoder, text_generation, unifusion
from unifusion_jax.objectives import flow_matching
from unifusion_jax.scenes import builder, examples
from unifusion_jax.scenes.evaluation import generation as eval_generation
from unifusion_jax.scenes.evaluation import noise_levels as eval_times
from unifusion_jax.scenes.evaluation import verifi_study as eval_verifi


@pytest.fixture(scope='module')
def sampler(recipe):
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tp=2))):
    return random_sampler(recipe())


def random_sampler(made):
  """A random model whose final layer is not zero, so that its condition matters."""
  job = jobs.build(made)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: jax.device_put(rng.normal(0, 0.2, x.shape).astype(np.float32), x.sharding),
                        job.init_params())
  return job.sampler(params, job.load_frozen())


REFERENCES = [examples.example('edit', 'test', i)['references'][0] for i in range(4)]


def asked(count=4, **changes):
  return [dataclasses.replace(pipeline.Request('make it blue', (REFERENCES[i],), i), **changes) for i in range(count)]


def test_written_tokens_condition_as_they_were_computed(sampler, monkeypatch):
  """A VLM that writes a known text gives the velocity of a teacher-forced pass over that text."""
  text = 'a small red circle'
  ids = [*sampler.layout.chat.text_ids(text), *sampler.layout.chat.stop_ids]
  monkeypatch.setattr(pipeline.text_generation, 'generate', _dictated(ids))
  single, mask, written, warnings = sampler._condition(asked())
  forced, forced_mask, _, _ = sampler._condition(asked(rewrite=text))
  assert written == [text] * 4 and warnings == [''] * 4
  for row in range(4):
    np.testing.assert_allclose(np.asarray(single)[row][np.asarray(mask)[row]],
                               np.asarray(forced)[row][np.asarray(forced_mask)[row]], atol=2e-4, rtol=2e-3)


def test_decoded_states_give_the_velocity_of_a_teacher_forced_pass(sampler):
  """What the VLM writes by itself, over its cache, against one pass over the same ids."""
  layout, vlm, more = sampler.layout, sampler.frozen.vlm, 6
  seen, counts = zip(*(layout.image_processor.preprocess(request.references, 1) for request in asked()))
  images = sharding.shard(np.stack(seen))
  length, room = layout.lengths(1)[0], layout.image_processor.max_tokens

  def rows(kept_length, kept, texts):
    made = [verifi.arrays(layout.chat.spans(request.instruction, count, text), length, kept_length, kept)
            for request, count, text in zip(asked(), counts, texts)]
    return sharding.shard(pipeline.stacked(made))

  opened = rows(room, ('image',), [None] * 4)
  out = text_generation.generate(vlm, opened['input_ids'], opened['attention_mask'], images, max_new=more, stop_ids=(), taps=sampler.taps)
  ids = np.asarray(out.ids)
  assert not np.isin(ids, [layout.chat.image_id, *layout.chat.stop_ids]).any()
  single = pipeline._condition_states(sampler.model, out.prompt_hidden, out.hidden, out.lengths, opened['cond_index'], opened['cond_mask'])
  whole = rows(room + more, ('image', 'written'), list(ids))
  forced = pipeline._read(sampler.model, vlm, whole['input_ids'], whole['attention_mask'], whole['cond_index'], whole['cond_mask'], images,
                        taps=sampler.taps)
  z, t = sharding.shard(np.random.default_rng(0).standard_normal((4, 8, 8, sampler.channels), np.float32)), np.full(4, 0.7, np.float32)
  velocity = jax.jit(unifusion.UniFusion.velocity)
  a = velocity(sampler.model, z, sharding.shard(t), *single)
  b = velocity(sampler.model, z, sharding.shard(t), forced, whole['cond_mask'])
  np.testing.assert_allclose(a, b, atol=1e-3 * float(np.abs(b).max()))
  assert np.abs(np.asarray(a) - np.asarray(velocity(sampler.model, z, sharding.shard(t), single[0] * 0, single[1]))).max() > 1e-2


def _dictated(ids, others=None):
  """`generate` whose choices are given (for the rows in `others`, others): the prompt is prolonged by them, and the
  states are those of feeding them, an image token as any word."""
  def made(vlm, tokens, valid, tiles, *, max_new, stop_ids, taps, **sampling):
    tokens, valid = np.asarray(tokens), np.asarray(valid)
    rows = [(others or {}).get(row, ids) for row in range(len(tokens))]
    lengths, most = valid.sum(1), max(map(len, rows))
    longer = np.pad(tokens, ((0, 0), (0, most)))
    more = np.pad(valid, ((0, 0), (0, most)))
    for row, n in enumerate(lengths):
      fed = [0 if token == vlm.config.image_token_id else token for token in rows[row]]
      longer[row, n:n + len(fed)], more[row, n:n + len(fed)] = fed, True
    hidden = np.asarray(vlm.hidden(sharding.shard(longer), sharding.shard(more), taps, tiles))
    out = np.zeros((len(tokens), max_new, *hidden.shape[2:]), hidden.dtype)
    written = np.zeros((len(tokens), max_new), np.int32)
    for row, n in enumerate(lengths):
      out[row, :len(rows[row])] = hidden[row, n:n + len(rows[row])]
      written[row, :len(rows[row])] = rows[row]
    return text_generation.Generated(sharding.shard(written), sharding.shard(np.array([len(row) for row in rows])), None,
                              sharding.shard(hidden[:, :tokens.shape[1]]), sharding.shard(out))
  return made


def test_qwen3_vl_conditions_in_the_same_way(recipe, qwen, monkeypatch):
  """Images of two sizes in one batch, written about and teacher-forced."""
  sampler = random_sampler(recipe(vlm=str(qwen)))
  small = np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)
  mixture = [*asked(2), dataclasses.replace(asked(1)[0], references=(small,)), pipeline.Request('make it blue')]
  chat, text = sampler.layout.chat, 'a small red circle'
  monkeypatch.setattr(pipeline.text_generation, 'generate', _dictated([*chat.text_ids(text), *chat.stop_ids]))
  single, written, _ = kept(sampler, mixture)
  forced, _, _ = kept(sampler, [dataclasses.replace(request, rewrite=text) for request in mixture])
  words = len(chat.text_ids(text)) + 1
  assert [len(tokens) - words for tokens in single] == [16, 16, 6, 0] and written == [text] * 4
  for a, b in zip(single, forced):
    np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-3)
  assert np.abs(single[0][:6] - single[2][:6]).max() > 1e-3
  assert sampler(asked(1, rewrite=text), 64, 64)[0].image.shape == (64, 64, 3)


def test_previews_of_your_own_images(recipe, tmp_path, mesh):
  """Whatever training passes over is no reason for a preview to fail."""
  for i in range(4):
    imaging.write_png(tmp_path / f'{i}.png', np.full((64, 64, 3), 60 * i, np.uint8))
  (tmp_path / 'cut.png').write_bytes(b'\x89PNG\r\n\x1a\n')
  rows = [dict(references=[], instruction='', target='gone.png', caption='broken'),
          dict(references=['cut.png'], instruction='broken', target='0.png', caption='broken'),
          dict(references=['0.png'], instruction='red ' * 200, target='1.png', caption='too long')]
  rows += [dict(references=[f'{i}.png'], instruction='make it lighter', target=f'{i + 1}.png', caption='whole') for i in range(3)]
  (tmp_path / 'list.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  data = dataclasses.replace(recipe().data, path=str(tmp_path / 'list.jsonl'), tasks=('reconstruct', 'edit'),
                             weights=(0.5, 0.5), skipped=0.5, rewrites='written for training alone')
  made = recipe(data=data)
  chosen = jobs._preview_records(made.data, jobs.transforms.prompt_encoder(made))
  assert [record['caption'] for record in chosen] == ['too long', 'whole', 'whole', 'whole']  # asked to draw it again
  edits = dataclasses.replace(made.data, tasks=('edit',), weights=(1.0,))
  chosen = jobs._preview_records(edits, jobs.transforms.prompt_encoder(made))
  assert [record['caption'] for record in chosen] == ['whole'] * 3
  builder.write(tmp_path / 'built', 't2i', 'train', 3)
  built = dataclasses.replace(edits, path=str(tmp_path / 'built'), tasks=('t2i',))
  assert len(jobs._preview_records(built, jobs.transforms.prompt_encoder(made))) >= 1  # there is no test split


def test_a_language_model_conditions_on_text_alone(recipe, tmp_path):
  for name in ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'):
    shutil.copyfile(config.ASSETS / 'vlm' / name, tmp_path / name)
  made = decoder.DecoderConfig('llama', vocab=1024, width=32, depth=2, heads=2, kv_heads=2, head_dim=16, hidden=48,
                               max_positions=512)
  causal_lm.save(causal_lm.TextModel(causal_lm.TextConfig(made), rngs=nnx.Rngs(4)), tmp_path)
  sampler = random_sampler(recipe(vlm=str(tmp_path)))
  tokens, written, _ = kept(sampler, [pipeline.Request('x', rewrite='a red circle')] * 4)
  assert written[0] == 'a red circle' and len(tokens[0]) == len(sampler.layout.chat.text_ids('a red circle')) + 1
  with pytest.raises(ValueError, match='reads text alone'):
    kept(sampler, asked(4))


@pytest.mark.parametrize('eta', [0.0, 1.0])
def test_answers_do_not_depend_on_their_batch(sampler, eta):
  sampler = changed(sampler, eta=eta)
  together, alone = sampler(asked(4), 64, 64), sampler(asked(1), 64, 64)
  assert together[0].written == alone[0].written
  difference = np.abs(together[0].image.astype(int) - alone[0].image)
  assert difference.max() <= 1


def test_seed_text_and_reference_matter(sampler):
  base = sampler(asked(1, rewrite='a red circle'), 64, 64)[0].image
  for change in (dict(seed=9), dict(rewrite='a blue star'), dict(references=(REFERENCES[1],))):
    request = dataclasses.replace(asked(1, rewrite='a red circle')[0], **change)
    assert (sampler([request], 64, 64)[0].image != base).any()


def test_noise_drawn_anew_follows_the_seed(sampler):
  requests = [pipeline.Request('make it red', (REFERENCES[0],), seed, 'a red circle') for seed in (1, 2, 1)]
  calm, lively = (changed(sampler, eta=eta)(requests, 64, 64) for eta in (0.0, 1.0))
  assert (lively[0].image != calm[0].image).any() and (lively[0].image != lively[1].image).any()
  np.testing.assert_array_equal(lively[0].image, lively[2].image)


def test_guidance_of_one_needs_no_null(sampler, monkeypatch):
  plain = dataclasses.replace(sampler, settings=dataclasses.replace(sampler.settings, guidance=1.0))
  near = dataclasses.replace(sampler, settings=dataclasses.replace(sampler.settings, guidance=1.0001))
  a, b = plain(asked(1, rewrite='x'), 64, 64)[0].image, near(asked(1, rewrite='x'), 64, 64)[0].image
  assert np.abs(a.astype(int) - b).max() <= 1


def changed(sampler, **settings):
  return dataclasses.replace(sampler, settings=dataclasses.replace(sampler.settings, **settings))


def kept(sampler, requests):
  """The condition tokens that count, of each request, and what they stand for."""
  condition, mask, written, warnings = sampler._condition(requests)
  return [np.asarray(c)[np.asarray(m)] for c, m in zip(condition, mask)], written, warnings


def test_writing_while_training_is_training_on_what_was_written(recipe, monkeypatch):
  """The loss with the VLM's own words is that of a teacher-forced pass over them; raw and null rows are as they were."""
  made = recipe(objective=flow_matching.FlowMatching(cond_dropout=0.2, image_dropout=0.2, text_dropout=0.2, instruction_prob=0.2))
  job, online = jobs.build(made), jobs.build(dataclasses.replace(
      made, objective=dataclasses.replace(made.objective, rewrite_online=True)))
  params, frozen = random_sampler(made).model, job.load_frozen()
  chat = jobs.transforms.prompt_encoder(made).chat
  ids = chat.text_ids('a small red circle')
  records = (dict(examples.example('edit', 'train', i, objects=(1, 2)), rewrites=[ids]) for i in range(100))
  records = [record for record in records if record['target'].shape == (64, 64, 3)][:16]
  losses = []
  for j in (job, online):
    _, transform = j.data()
    rows = [transform(record, np.random.default_rng(i)) for i, record in enumerate(records)]
    batch = sharding.shard({name: np.stack([row[name] for row in rows]) for name in rows[0]})
    monkeypatch.setattr(flow_matching.text_generation, 'generate', _dictated([*ids, *chat.stop_ids]))
    losses.append(float(j.loss(params, frozen, batch, jax.random.key(0))[0]))
  assert 4 < np.sum(batch['needs_rewrite']) < 16
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.parametrize('answer', ['endless', 'empty', 'image'])
def test_a_request_whose_answer_is_no_use_is_trained_on_itself(recipe, monkeypatch, answer):
  made = recipe(objective=flow_matching.FlowMatching(cond_dropout=0.3, rewrite_online=True))
  job, params = jobs.build(made), random_sampler(made).model
  frozen, layout = job.load_frozen(), jobs.transforms.prompt_encoder(made)
  ids = dict(endless=layout.chat.text_ids('red ' * layout.written)[:layout.written], empty=layout.chat.stop_ids,
             image=(*layout.chat.text_ids('a red circle'), layout.chat.image_id, *layout.chat.stop_ids))
  monkeypatch.setattr(flow_matching.text_generation, 'generate', _dictated(list(ids[answer])))
  records = [examples.example('edit', 'train', i, objects=(1, 2)) for i in range(40)]
  records = [record for record in records if record['target'].shape == (64, 64, 3)][:16]
  _, transform = job.data()
  rows = [transform(record, np.random.default_rng(i)) for i, record in enumerate(records)]
  batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  assert 4 < np.sum(batch['needs_rewrite']) < 16
  key = jax.random.key(0)
  value, metrics = job.loss(params, frozen, sharding.shard(batch), key)
  np.testing.assert_allclose(metrics['fallback_rate'], np.mean(batch['needs_rewrite']))
  cond_index = np.concatenate([batch['cond_index'], batch['fallback_index']], axis=1)
  mask = np.concatenate([batch['cond_mask'], batch['fallback_mask'] & batch['needs_rewrite'][:, None]], axis=1)
  forced = jobs.build(recipe(objective=flow_matching.FlowMatching(cond_dropout=0.3)))
  wanted = forced.loss(params, frozen, sharding.shard(dict(batch, cond_index=cond_index, cond_mask=mask)), key)[0]
  np.testing.assert_allclose(value, wanted, rtol=1e-4)


def test_without_verifi_the_request_itself_is_kept(sampler):
  tokens, written, _ = kept(changed(sampler, verifi=False), asked(4))
  words = len(sampler.layout.chat.text_ids('make it blue'))
  assert written == ['make it blue'] * 4 and [len(t) for t in tokens] == [16 + words + 1] * 4
  # As in training: a transform that keeps the raw request gives the same tokens to the DiT
  record = dict(examples.example('edit', 'test', 0), instruction='make it blue')
  example = transforms.GenerationExample(sampler.layout, cond_dropout=0, image_dropout=0, instruction_prob=1)(record, np.random.default_rng(0))
  batch = sharding.shard({name: np.stack([example[name]] * 8) for name in ('input_ids', 'attention_mask', 'cond_index', 'cond_mask', 'tiles')})
  trained = pipeline._read(sampler.model, sampler.frozen.vlm, batch['input_ids'], batch['attention_mask'], batch['cond_index'],
                         batch['cond_mask'], batch['tiles'], taps=sampler.taps)
  np.testing.assert_allclose(np.asarray(trained)[0][example['cond_mask']], tokens[0], atol=1e-4, rtol=1e-3)


def test_a_rewrite_that_is_no_use_falls_back(sampler, monkeypatch):
  """Without words, without an end, with an image token: only those rows do, and they say so."""
  chat, room = sampler.layout.chat, sampler.layout.written
  good, stop, endless = chat.text_ids('a small red circle'), chat.stop_ids, chat.text_ids('red ' * room)[:room]
  plain, _, _ = kept(changed(sampler, verifi=False), asked(4))
  monkeypatch.setattr(pipeline.text_generation, 'generate', _dictated([*good, *stop]))
  usual, _, _ = kept(sampler, asked(4))
  monkeypatch.setattr(pipeline.text_generation, 'generate', _dictated([*good, *stop], {1: [*stop], 2: [*endless], 3: [*good, chat.image_id, *stop]}))
  tokens, written, warnings = kept(sampler, asked(4))
  assert written == ['a small red circle', 'make it blue', 'make it blue', 'make it blue'] and not warnings[0]
  assert 'wrote nothing' in warnings[1] and f'no end within {room} tokens' in warnings[2] and 'image token' in warnings[3]
  for row, wanted in enumerate((usual, plain, plain, plain)):
    np.testing.assert_allclose(tokens[row], wanted[row], atol=1e-4, rtol=1e-3)


def test_each_way_of_asking_in_one_batch(sampler):
  """Given text, the VLM's own, with images and without: each row is what it would be alone."""
  mixture = [asked(1, rewrite='a red circle')[0], asked(1)[0], pipeline.Request('a red circle', seed=3),
             pipeline.Request('make it blue', (REFERENCES[0], REFERENCES[1]), 4)]
  together, written, _ = kept(sampler, mixture)
  for row, request in enumerate(mixture):
    alone, said, _ = kept(sampler, [request] * 4)
    assert said[0] == written[row] and len(alone[0]) == len(together[row])
    np.testing.assert_allclose(together[row], alone[0], atol=1e-4, rtol=1e-3)


def test_what_was_written_can_be_handed_back(sampler, monkeypatch):
  chat = sampler.layout.chat
  monkeypatch.setattr(pipeline.text_generation, 'generate', _dictated([*chat.text_ids('a small red circle,  at the top'), *chat.stop_ids]))
  tokens, written, _ = kept(sampler, asked(4))
  again, _, _ = kept(sampler, asked(4, rewrite=written[0]))
  np.testing.assert_allclose(again[0], tokens[0], atol=2e-4, rtol=2e-3)


def test_sampled_rewrites_follow_the_seed(sampler, monkeypatch):
  monkeypatch.setattr(pipeline, 'read', lambda chat, ids, lengths: ([chat.read(row) for row in ids], {}))  # it never ends
  hot = changed(sampler, temperature=5.0)
  requests = [pipeline.Request('a red circle', seed=seed) for seed in (1, 2, 1, 3)]
  _, first, _ = kept(hot, requests)
  _, again, _ = kept(hot, requests[::-1])
  assert first == again[::-1] and first[0] == first[2] and len(set(first)) == 3


def test_the_system_prompt_can_be_swapped(sampler):
  by_name = kept(changed(sampler, system='faithful'), asked(4, rewrite='x'))[0][0]
  by_text = kept(changed(sampler, system=verifi.SYSTEM['faithful']), asked(4, rewrite='x'))[0][0]
  own = kept(sampler, asked(4, rewrite='x'))[0][0]
  np.testing.assert_array_equal(by_name, by_text)
  assert np.abs(by_name - own).max() > 1e-3


def test_more_tiles_for_a_request(sampler):
  wide = np.random.default_rng(0).integers(0, 256, (64, 128, 3)).astype(np.uint8)
  request = pipeline.Request('make it blue', (wide,), rewrite='x')
  one, several = (kept(changed(sampler, tiles=n), [request] * 4)[0][0] for n in (1, 2))
  assert len(several) - len(one) == 2 * 16  # two tiles and the thumbnail in place of one tile


@pytest.mark.parametrize('height, width', [(48, 80), (80, 48)])
def test_other_shapes(sampler, height, width):
  assert sampler([pipeline.Request('a red circle')], height, width)[0].image.shape == (height, width, 3)


def test_sizes_that_cannot_be(sampler):
  with pytest.raises(ValueError, match='multiples of 8'):
    sampler(asked(1), 60, 64)
  with pytest.raises(ValueError, match='does not fit'):
    sampler(asked(1, instruction='red ' * 200), 64, 64)


def test_requests_from_the_command_line(tmp_path):
  path = tmp_path / 'wide.png'
  Image.new('RGB', (100, 60), 'red').save(path)
  settings = config.SampleConfig(prompt='make it blue\n\nmake it green', references=(str(path),), num_images=2, seed=5)
  made = sample.from_config(settings, 64)
  assert [(r.instruction, r.seed, h, w) for r, h, w in made] == [
      ('make it blue', 5, 48, 80), ('make it blue', 6, 48, 80), ('make it green', 7, 48, 80), ('make it green', 8, 48, 80)]
  (tmp_path / 'prompts.txt').write_text('one\ntwo\n')
  settings = config.SampleConfig(prompt=f'@{tmp_path}/prompts.txt', width=96, height=32)
  assert [(r.instruction, h, w) for r, h, w in sample.from_config(settings, 64)] == [('one', 32, 96), ('two', 32, 96)]
  settings = config.SampleConfig(prompt='x', references=(str(path), str(path)), stitch=True)
  (request, *_), = sample.from_config(settings, 64)
  assert [image.shape for image in request.references] == [(60, 200, 3)]
  assert sample.from_config(settings, 64)[0][1:] == (48, 80)  # the first reference's shape, stitched or not
  with pytest.raises(ValueError, match='nothing to draw'):
    sample.from_config(config.SampleConfig(), 64)
  (tmp_path / 'broken.png').write_bytes(b'no image')
  with pytest.raises(ValueError, match='broken.png'):
    sample.from_config(config.SampleConfig(prompt='x', references=(str(tmp_path / 'broken.png'),)), 64)


def test_answers_are_files_that_say_what_made_them(sampler, tmp_path, capsys):
  settings = dataclasses.replace(sampler.settings, prompt='a red circle', num_images=2)
  sample.answer(sampler, sample.from_config(settings, 64), settings, tmp_path)
  image = Image.open(tmp_path / '001.png')
  assert image.size == (64, 64) and image.text['prompt'] == 'a red circle' and image.text['seed'] == '1'
  assert json.loads(image.text['settings'])['steps'] == settings.steps and 'written' in image.text
  assert (tmp_path / 'grid.png').exists() and 'asked:   a red circle' in capsys.readouterr().out


def test_requests_are_drawn_some_at_a_time(sampler, tmp_path):
  whole, parts = (dataclasses.replace(sampler.settings, prompt='a red circle', num_images=6, batch_size=n) for n in (32, 4))
  for name, settings in (('whole', whole), ('parts', parts)):
    sample.answer(sampler, sample.from_config(settings, 64), settings, tmp_path / name)
  assert len(list((tmp_path / 'parts').glob('0*.png'))) == 6
  for i in range(6):
    a, b = (imaging.read(tmp_path / name / f'{i:03d}.png').astype(int) for name in ('whole', 'parts'))
    assert np.abs(a - b).max() <= 1


def test_preview_and_evaluation(sampler, recipe, tmp_path, mesh):
  made = recipe()
  job = jobs.build(made)
  job.preview(sampler.model, sampler.frozen, tmp_path, 7)
  assert imaging.read(tmp_path / 'samples' / '0000007.png').shape[2] == 3
  report = eval_generation.evaluate(sampler, made, tmp_path / 'eval')
  for name in ('test_t2i_1-2', 'test_t2i_3-4', 'heldout_t2i_1-2', 'heldout_t2i_3-4'):
    assert 0 <= report[name]['all'] <= 1 and 0 < report[name]['vqascore'] < 1 and (tmp_path / 'eval' / f'{name}.png').exists()


def test_the_study_of_verifi(recipe, tmp_path):
  """Each way of asking is asked in that way, on examples of its kind."""
  asked = []

  @dataclasses.dataclass
  class Recorder:
    settings: config.SampleConfig

    def __call__(self, requests, height, width):
      asked.extend((self.settings, request) for request in requests)
      noise = np.random.default_rng(self.settings.tiles).integers(0, 256, (height, width, 3)).astype(np.uint8)
      return [pipeline.Result(noise, request.instruction) for request in requests]

  made = recipe(eval=config.EvalConfig(examples=3, batch_size=4, seeds=2))
  report = eval_verifi.evaluate(Recorder(config.SampleConfig()), made, tmp_path)
  assert set(report['edits']) == {'both', 'written', 'images', 'raw'} and set(report['references']) == {'2', '3'}
  assert report['edits']['both']['all'] == dict(mean=0.0, least=0.0, most=0.0) and 0 <= report['references']['2']['copy'] <= 1
  assert report['tiles']['1'] != report['tiles']['9'] and 0 < report['tiles']['1']['mean'] < 255
  ways = {(s.verifi, s.images, s.system, s.tiles, r.rewrite, len(r.references)) for s, r in asked}
  assert ways == {
      *((on, True, None, 0, None, n) for on in (True, False) for n in (0, 1)),
      (True, False, None, 0, None, 1), (True, True, None, 0, '', 1), *((True, True, 'answer', 0, None, n) for n in (0, 1)),
      (True, True, None, 0, None, 2), (True, True, None, 0, None, 3), *((True, True, None, n, None, 1) for n in (1, 2, 3, 4, 9))}
  several = [request.instruction for _, request in asked if len(request.references) > 1]
  assert several and not any(re.search(r'image (one|two|three|[123])|(first|second|third) ', text) for text in several)
  wide = [request.references[0].shape for settings, request in asked if settings.tiles in (1, 4, 9)]
  assert min(min(shape[:2]) for shape in wide) >= 100  # large enough for tiles to matter
  for name in ('prompts_plain', 'edits', 'system_t2i', 'references_3', 'tiles'):
    assert imaging.read(tmp_path / f'{name}.png').shape[1] > 300


def test_drawing_on_from_images(sampler):
  """From time 1 they leave no trace; from 0 they come back as the autoencoder gives them; between, as something of both."""
  requests = asked(3, rewrite='x')
  images = [np.random.default_rng(0).integers(0, 256, (8, 8, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)] * 3
  plain = sampler(requests, 64, 64)
  back = {t: sampler(requests, 64, 64, images, t) for t in (1.0, 0.5, 0.0)}
  vae, x = sampler.frozen.vae, sharding.shard(np.stack(images * 3)[:8].astype(np.float32) / 127.5 - 1)
  kept_by_vae = np.clip((np.asarray(vae.decode(vae.encode(x)))[0] + 1) * 127.5, 0, 255)
  assert len(back[0.0]) == 3 and [r.written for r in back[0.5]] == [r.written for r in plain]
  for i in range(3):
    np.testing.assert_allclose(back[1.0][i].image.astype(int), plain[i].image, atol=1)
    np.testing.assert_allclose(back[0.0][i].image, kept_by_vae, atol=1)
    assert np.abs(back[0.5][i].image.astype(int) - kept_by_vae).mean() > 1


def test_the_study_of_times(recipe, tmp_path):
  """Of images that come back as they are, all are right; those that are lost beyond a time say so."""
  @dataclasses.dataclass
  class Recorder:
    settings: config.SampleConfig

    def __call__(self, requests, height, width, images, start):
      assert all(request.rewrite for request in requests) and len(requests) == 4
      return [pipeline.Result(p if start < 0.6 else 0 * p, request.rewrite) for request, p in zip(requests, images)]

  made = recipe(eval=config.EvalConfig(study='times', split='train', examples=6, batch_size=4))
  report = eval_times.evaluate(Recorder(config.SampleConfig()), made, tmp_path)
  assert report['examples'] == 6 and [report[t]['all'] for t in ('1.0', '0.7', '0.5', '0.0')] == [0, 0, 1, 1]
  assert imaging.read(tmp_path / 'times.png').shape[1] > 8 * 128


def test_without_images_only_the_written_text_is_kept(sampler):
  alone, whole = (kept(changed(sampler, images=on), asked(4, rewrite='x'))[0][0] for on in (False, True))
  assert len(whole) - len(alone) == 16
  words = len(sampler.layout.chat.text_ids('make it blue'))
  assert len(kept(changed(sampler, images=False, verifi=False), asked(4))[0][0]) == words + 1


def test_the_score_of_perfect_answers_is_one():
  for task in ('t2i', 'edit'):
    records = [examples.example(task, 'test', i) for i in range(20)]
    perfect = [pipeline.Result(r['target'], r['caption']) for r in records]
    report = eval_generation.score(records, perfect)
    assert report['all'] == 1.0 and report['written_exact'] == 1.0
  copies = [pipeline.Result(r['references'][0], '') for r in records]
  report = eval_generation.score(records, copies)
  assert report['all'] == 0.0 and report['kept'] > 0.9
