"""Rewriting during training: what the VLM writes conditions as text that is known, and what is no use falls back."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from unifusion_jax import sharding
from unifusion_jax.data import imaging, loader, transforms
from unifusion_jax.data.config import Task
from unifusion_jax.models import text_generation
from unifusion_jax.objectives import flow_matching
from unifusion_jax.scenes import builder, examples

pytestmark = pytest.mark.slow

NUMBERS = dict(number=np.arange(16, dtype=np.uint32))  # of the examples of a batch


def random_model(made):
  """A random model whose final layer is not zero, so that its condition matters."""
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: jax.device_put(rng.normal(0, 0.2, x.shape).astype(np.float32), x.sharding),
                      made.objective.init(made))


def _dictated(ids, others=None):
  """`generate` whose choices are given (for the rows in `others`, others): the prompt is prolonged by them, and the
  states are those of feeding them, an image token as any word."""
  def made(vlm, tokens, valid, tiles, *, max_new, stop_ids, taps, keep=None, **sampling):
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
    prompt = hidden[:, :tokens.shape[1]]
    if keep is not None:
      prompt = np.take_along_axis(prompt, np.asarray(keep)[:, :, None, None], axis=1)
    return text_generation.Generated(
        sharding.shard(written), sharding.shard(np.array([len(row) for row in rows])), None, sharding.shard(prompt),
        sharding.shard(out))
  return made


def test_writing_while_training_is_training_on_what_was_written(recipe, monkeypatch):
  """The loss on the VLM's own text is that of a teacher-forced pass over it; raw and null rows are as they were."""
  made = recipe(objective=flow_matching.FlowMatching(cond_dropout=0.2, image_dropout=0.2, text_dropout=0.2,
                                                     instruction_prob=0.2))
  online = dataclasses.replace(made, objective=dataclasses.replace(made.objective, rewrite_online=True))
  params, frozen = random_model(made), made.objective.frozen(made)
  chat = transforms.prompt_encoder(made).chat
  ids = chat.text_ids('a small red circle')
  records = (dict(examples.example('edit', 'train', i, objects=(1, 2)), rewrites=[ids]) for i in range(100))
  records = [record for record in records if record['target'].shape == (64, 64, 3)][:16]
  losses = []
  for config in (made, online):
    transform = config.objective.transform(config)
    rows = [transform(record, np.random.default_rng(i)) for i, record in enumerate(records)]
    batch = sharding.shard({name: np.stack([row[name] for row in rows]) for name in rows[0]} | NUMBERS)
    monkeypatch.setattr(flow_matching.text_generation, 'generate', _dictated([*ids, *chat.stop_ids]))
    losses.append(float(config.objective.loss(params, frozen, batch, jax.random.key(0))[0]))
  assert 4 < np.sum(batch['needs_rewrite']) < 16
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.parametrize('answer', ['endless', 'empty', 'image'])
def test_a_request_whose_answer_is_no_use_is_trained_on_itself(recipe, monkeypatch, answer):
  made = recipe(objective=flow_matching.FlowMatching(cond_dropout=0.3, rewrite_online=True))
  params, frozen, encoder = random_model(made), made.objective.frozen(made), transforms.prompt_encoder(made)
  chat, most = encoder.chat, encoder.max_rewrite
  ids = dict(endless=chat.text_ids('red ' * most)[:most], empty=chat.stop_ids,
             image=(*chat.text_ids('a red circle'), chat.image_id, *chat.stop_ids))
  monkeypatch.setattr(flow_matching.text_generation, 'generate', _dictated(list(ids[answer])))
  records = [examples.example('edit', 'train', i, objects=(1, 2)) for i in range(40)]
  records = [record for record in records if record['target'].shape == (64, 64, 3)][:16]
  transform = made.objective.transform(made)
  rows = [transform(record, np.random.default_rng(i)) for i, record in enumerate(records)]
  batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]} | NUMBERS
  assert 4 < np.sum(batch['needs_rewrite']) < 16
  key = jax.random.key(0)
  value, metrics = made.objective.loss(params, frozen, sharding.shard(batch), key)
  np.testing.assert_allclose(metrics['fallback_rate'], np.mean(batch['needs_rewrite']))
  cond_index = np.concatenate([batch['cond_index'], batch['fallback_index']], axis=1)
  mask = np.concatenate([batch['cond_mask'], batch['fallback_mask'] & batch['needs_rewrite'][:, None]], axis=1)
  forced = flow_matching.FlowMatching(cond_dropout=0.3)
  wanted = forced.loss(params, frozen, sharding.shard(dict(batch, cond_index=cond_index, cond_mask=mask)), key)[0]
  np.testing.assert_allclose(value, wanted, rtol=1e-4)


def test_previews_of_your_own_images(recipe, tmp_path, mesh):
  """Whatever training passes over is no reason for a preview to fail."""
  for i in range(4):
    imaging.write_png(tmp_path / f'{i}.png', np.full((64, 64, 3), 60 * i, np.uint8))
  (tmp_path / 'cut.png').write_bytes(b'\x89PNG\r\n\x1a\n')
  rows = [dict(references=[], instruction='', target='gone.png', caption='broken'),
          dict(references=['cut.png'], instruction='broken', target='0.png', caption='broken'),
          dict(references=['0.png'], instruction='red ' * 200, target='1.png', caption='too long')]
  rows += [dict(references=[f'{i}.png'], instruction='make it lighter', target=f'{i + 1}.png', caption='whole')
           for i in range(3)]
  (tmp_path / 'list.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  tasks = Task('reconstruct'), Task('edit')
  data = dataclasses.replace(recipe().data, path=str(tmp_path / 'list.jsonl'), tasks=tasks, skipped=0.5,
                             rewrites='written for training alone')
  fits = transforms.prompt_encoder(recipe(data=data)).fits
  chosen = loader.preview_records(data, 8, fits)
  assert [record['caption'] for record in chosen] == ['too long', 'whole', 'whole', 'whole']  # asked to draw it again
  chosen = loader.preview_records(dataclasses.replace(data, only='edit'), 8, fits)
  assert [record['caption'] for record in chosen] == ['whole'] * 3
  builder.write(tmp_path / 'built', 't2i', 'train', 3)
  built = dataclasses.replace(data, path=str(tmp_path / 'built'), tasks=(Task('t2i'),))
  assert loader.preview_records(built, 8, fits)  # there is no test split
