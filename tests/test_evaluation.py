"""Evaluation of records of one's own: the same draws every time, the files by name, rates of scenes alone."""

import dataclasses
import json

import numpy as np
import pytest
from test_vlm_objective import small

from unifusion_jax import config, flow
from unifusion_jax.commands import evaluate, train
from unifusion_jax.data import imaging, loader
from unifusion_jax.data.config import DataConfig, Task
from unifusion_jax.errors import UserError
from unifusion_jax.evaluation import fidelity, flow_loss, records
from unifusion_jax.evaluation.images import psnr
from unifusion_jax.scenes import builder
from unifusion_jax.scenes.evaluation import settings
from unifusion_jax.training import record

pytestmark = pytest.mark.slow

COLOURS = dict(red=(200, 30, 30), blue=(30, 60, 200), green=(30, 160, 60), black=(20, 20, 20))


def write_list(path, captions=None, more=(), edits: int = 2) -> str:
  """A list of one image for each colour, the last of them edits of the first."""
  captions = captions or [f'a small solid {name} circle at the center' for name in COLOURS]
  rows = list(more)
  for i, ((name, colour), caption) in enumerate(zip(COLOURS.items(), captions)):
    image = np.full((64, 64, 3), 230, np.uint8)
    image[20:40, 20 + 4 * i:40 + 4 * i] = colour
    imaging.write_png(path.parent / f'{name}.png', image)
    rows.append(dict(references=['red.png'] if i >= len(COLOURS) - edits else [], instruction=f'make it {name}',
                     target=f'{name}.png', caption=caption))
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def losses(pipe, path) -> np.ndarray:
  """The loss of each record of a list, in its order, at each time: [n times]."""
  batches = list(flow_loss.batches(loader.mix(DataConfig(path=path))[0][0], pipe.prompt_encoder, 64, 8))
  order = np.argsort(np.concatenate([batch.numbers for batch in batches]))
  return np.concatenate([flow_loss.losses(pipe, batch) for batch in batches])[order]


def test_draws_belong_to_the_record(pipe, tmp_path):
  """Two measurements are equal bit for bit, whatever else is in the list; another caption gives another loss."""
  own = write_list(tmp_path / 'own.jsonl')
  first = losses(pipe, own)
  assert first.shape == (4, len(flow_loss.TIMES)) and np.isfinite(first).all()
  np.testing.assert_array_equal(first, losses(pipe, own))
  broken = dict(references=[], instruction='', target='gone.png', caption='broken')
  (tmp_path / 'more.jsonl').write_text((tmp_path / 'own.jsonl').read_text() + json.dumps(broken) + '\n')
  more = loader.mix(DataConfig(path=str(tmp_path / 'more.jsonl'), skipped=0.5))[0][0]
  batches = flow_loss.batches(more, pipe.prompt_encoder, 64, 8)
  np.testing.assert_array_equal(np.concatenate([flow_loss.losses(pipe, batch) for batch in batches]), first)
  other = losses(pipe, write_list(tmp_path / 'other.jsonl', ['a blue star'] + [
      f'a small solid {name} circle at the center' for name in list(COLOURS)[1:]]))
  assert np.all(other[0] != first[0])
  np.testing.assert_array_equal(other[1:], first[1:])


def test_the_loss_is_that_of_flow_matching(pipe, tmp_path):
  """At one time, by the pipeline's own phases."""
  source = loader.mix(DataConfig(path=write_list(tmp_path / 'own.jsonl')))[0][0]
  batch, *_ = flow_loss.batches(source, pipe.prompt_encoder, 2, 2)
  requests = [dataclasses.replace(request, rewrite=row['caption'])
              for request, row in zip(records.requests_of(batch.records), batch.records)]
  cond = pipe.encode(requests).conditioning
  images, noise, t = [row['target'] for row in batch.records], pipe.noise(batch.numbers, 64, 64), flow_loss.TIMES[3]
  z, noised = pipe.add_noise(images, noise, 0.0), pipe.add_noise(images, noise, t)
  velocity = pipe.model.velocity(noised, np.full(len(z), t, np.float32), *cond)
  np.testing.assert_allclose(flow_loss.losses(pipe, batch)[:, 3], np.asarray(flow.loss(velocity, z, noise))[:2],
                             rtol=1e-4)


def test_training_and_evaluation_measure_what_is_held_out(recipe, mesh, tmp_path):
  """On the EMA, the same records; the report names the list, and says what was left out."""
  (tmp_path / 'held').mkdir()
  more = [dict(references=[], instruction='', target='red.png', caption='red ' * 200)]
  held_out = write_list(tmp_path / 'held' / 'out.jsonl', more=more, edits=4)
  data = dataclasses.replace(recipe().data, path=write_list(tmp_path / 'own.jsonl', edits=4), held_out=held_out,
                             tasks=(Task('edit'), Task('t2i')), aspects=('1:1',), batch_size=8)
  made = recipe(data=data, train=config.TrainConfig(steps=2, log_every=1, save_every=2, held_out_every=1),
                eval=settings.GenerationEvaluation(examples=8, batch_size=8))
  config.check(made, 8)
  train.run(made, tmp_path / 'run')
  lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  measured = [line for line in lines if 'held_out_loss' in line]
  assert [line['step'] for line in measured] == [1, 2] and measured[0]['held_out_loss'] != measured[1]['held_out_loss']
  changed = dataclasses.replace(made, data=dataclasses.replace(data, held_out=None))
  record.claim(changed, tmp_path / 'run')  # what is measured may change on the way
  evaluate.run(made, tmp_path / 'run')
  report = json.loads((tmp_path / 'run' / 'eval.json').read_text())
  assert report['file'] == held_out and report['held_out'] and 'note' not in report
  assert (report['records'], report['examples'], report['left_out']) == (5, 4, 1)
  assert 0 < report['vqascore'] < 1 and 0 < report['vqascore_truth'] < 1 and 'step 2' in report['weights']
  loss = report['flow_loss']
  assert loss.pop('mean') == pytest.approx(measured[1]['held_out_loss'], rel=1e-5)
  assert loss.keys() == {'0.1', '0.3', '0.5', '0.7', '0.9'}
  assert loss == pytest.approx({time: measured[1][f'held_out_loss_{time}'] for time in loss}, rel=1e-5)
  assert imaging.read(tmp_path / 'run' / 'eval' / 'out_references_1.png').shape[1] > 500
  made = recipe(data=changed.data, eval=records.RecordsEvaluation(examples=2, batch_size=4))
  evaluate.run(made, tmp_path / 'run')
  report = json.loads((tmp_path / 'run' / 'eval.json').read_text())
  assert report['file'] == data.path and report['examples'] == 2 and 'data.held_out' in report['note']


def test_rates_are_of_scenes(recipe, pipe, tmp_path):
  """Those of a prepared folder are read by the judge too, from its test split if it has one."""
  builder.write(tmp_path / 'built', 't2i/1-2', 'train', 3)
  data = dataclasses.replace(recipe().data, path=str(tmp_path / 'built'))
  made = recipe(data=data, eval=settings.GenerationEvaluation(examples=8, batch_size=4))
  report = records.evaluate(pipe, made, tmp_path / 'eval', settings.generation.score)
  assert report['file'].endswith('t2i_1-2_train/1.0.0') and report['examples'] == 3 and not report['held_out']
  assert 0 <= report['all'] <= 1 and (tmp_path / 'eval' / 't2i_1-2_references_0.png').exists()
  builder.write(tmp_path / 'built', 't2i/1-2', 'test', 2)
  named, trained = loader.held_out(data)
  assert len(named['t2i/1-2']) == 2 and not trained


def test_previews_show_what_is_held_out(recipe, tmp_path, caplog):
  own, held_out = (write_list(tmp_path / f'{name}.jsonl', [f'a {name} circle'] * 4) for name in ('own', 'other'))
  data = dataclasses.replace(recipe().data, path=own, tasks=(Task('t2i'),), aspects=('1:1',))
  shown = lambda **changes: [row['caption'] for row in loader.preview_records(dataclasses.replace(data, **changes), 8)]
  assert shown(held_out=held_out) == ['a other circle'] * 2 and not caplog.records
  assert shown() == ['a own circle'] * 2 and 'name others with data.held_out' in caplog.text
  assert shown(path='scenes', held_out=held_out) == ['a other circle'] * 2


def test_a_damaged_test_split_is_no_missing_one(recipe, tmp_path):
  """Only where there is none, records of training are shown in its place."""
  builder.write(tmp_path, 't2i', 'train', 2)
  folder = tmp_path / 'scenes' / 't2i_test' / '1.0.0'
  folder.mkdir(parents=True)
  (folder / 'dataset_info.json').write_text('{')
  data = dataclasses.replace(recipe().data, path=str(tmp_path), tasks=(Task('t2i'),))
  with pytest.raises(Exception, match='(?i)parse|json|expect'):
    loader.preview_records(data, 2)


def test_the_autoencoder_is_measured_on_a_list(mesh, tmp_path):
  """By what needs no judge, in training and after it."""
  made = small('autoencoder')
  (tmp_path / 'held').mkdir()
  held_out = write_list(tmp_path / 'held' / 'out.jsonl')
  made.data = dataclasses.replace(made.data, path=write_list(tmp_path / 'own.jsonl'), held_out=held_out,
                                  aspects=('1:1',))
  made.eval.examples = 3
  config.check(made, 8)
  state = train.run(made, tmp_path / 'run', stop_at=2)
  evaluate.run(made, tmp_path / 'run')
  report = json.loads((tmp_path / 'run' / 'eval.json').read_text())
  assert report['file'] == held_out and report['examples'] == 3 and 'exact' not in report
  assert report['psnr_db_least'] <= report['psnr_db'] and (tmp_path / 'run' / 'eval' / 'reconstructions.png').exists()
  lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  (measured,) = [line for line in lines if 'held_out_psnr_db' in line]
  images = np.stack([imaging.read(tmp_path / f'{name}.png') for name in COLOURS])
  wanted = psnr(images, fidelity.round_trip(state.ema, images))
  assert measured['step'] == 2 and measured['held_out_psnr_db'] == pytest.approx(np.mean(wanted), rel=1e-4)


def test_nothing_usable_is_an_error(pipe, tmp_path):
  path = tmp_path / 'long.jsonl'
  write_list(path, ['red ' * 200] * 4)
  with pytest.raises(UserError, match='none of its first 64 records can be used'):
    losses(pipe, str(path))


def test_what_cannot_be_measured_says_so(recipe, tmp_path):
  own, other = (write_list(tmp_path / name) for name in ('own.jsonl', 'other.jsonl'))

  def problems(made, **changes):
    made.data = dataclasses.replace(made.data, **changes)
    return ' '.join(made.problems(8))

  same = dict(path=own, held_out=str(tmp_path / '..' / tmp_path.name / 'own.jsonl'))
  assert 'is the file of data.path' in problems(recipe(), **same)
  assert 'must be a .jsonl or .parquet file' in problems(recipe(), held_out=str(tmp_path))
  made = recipe()
  made.data = dataclasses.replace(made.data, held_out=str(tmp_path / 'nowhere.jsonl'))
  for command in (train, evaluate):
    with pytest.raises(UserError, match='nowhere.jsonl is not there'):
      command.run(made, tmp_path / 'run')
  assert not problems(recipe(), path=own, held_out=other) and not problems(recipe(), held_out=other)
  assert 'data.unit=12 must be a multiple of the 8 pixels' in problems(recipe(), held_out=other, unit=12)
  for study, split in (('verifi', 'test'), ('noise_levels', 'train'), ('by_hand', 'test'),
                       ('agreement', 'test')):
    made = recipe(eval=settings.GenerationEvaluation(study=study, split=split))
    assert not problems(made)
    for changes in (dict(path=own), dict(held_out=other)):
      assert f'eval.study={study!r} is a study of scenes' in problems(
          recipe(eval=settings.GenerationEvaluation(study=study, split=split)), **changes)
  assert f'data.held_out={other}: the embedded VLM is trained and measured on scenes' in problems(
      small('vlm'), held_out=other)
  folder = small('vlm')
  folder.data = dataclasses.replace(folder.data, path=str(tmp_path))
  with pytest.raises(UserError, match='evaluate with --config.data.path=scenes'):
    folder.eval.run(folder, None, tmp_path)
  for changes in (dict(examples=0), dict(batch_size=0)):
    (name,) = changes
    made = recipe(eval=records.RecordsEvaluation(**changes))
    assert f'eval.{name}=0 must be between 1 and 1,000,000' in problems(made)
  made = recipe(train=config.TrainConfig(held_out_every=-1))
  assert 'train.held_out_every=-1 must be between 0 and 1,000,000,000' in problems(made)
