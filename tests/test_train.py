"""The loop: resuming is exact, the mesh does not matter, bad runs stop, and every shipped recipe type-checks whole."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import threading

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unifusion_jax import config, sharding
from unifusion_jax.commands import train
from unifusion_jax.data import loader
from unifusion_jax.data.config import Task
from unifusion_jax.models import layers
from unifusion_jax.planning import model_flops, programs
from unifusion_jax.scenes.evaluation import settings
from unifusion_jax.training import step
from unifusion_jax.weights import encoders

CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'


def leaves(state):
  return [np.asarray(x) for x in jax.tree.leaves(state)]


@pytest.mark.slow
@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_two_and_two_steps_are_four(name, recipe, mesh, tmp_path):
  """In batches of several shapes, with AdamW; traced in one of the runs, which changes nothing."""
  made = recipe(optim=dataclasses.replace(recipe().optim, name=name))
  if name == 'adamw':
    made.data.aspects = '1:1', '5:3'
    made.train.profile = '2:4'
  whole = train.run(dataclasses.replace(made, train=dataclasses.replace(made.train, log_every=2, profile='')),
                    tmp_path / 'whole')
  train.run(made, tmp_path / 'parts', stop_at=2)
  parts = train.run(made, tmp_path / 'parts')
  assert int(parts.step) == 4
  for a, b in zip(leaves(whole), leaves(parts), strict=True):
    np.testing.assert_array_equal(a, b)
  lines, means = ([json.loads(line) for line in (tmp_path / name / 'metrics.jsonl').read_text().splitlines()]
                  for name in ('parts', 'whole'))
  assert [line['step'] for line in lines] == [1, 2, 3, 4] and [line['step'] for line in means] == [2, 4]
  for i, mean in enumerate(means):
    assert mean['loss'] == pytest.approx((lines[2 * i]['loss'] + lines[2 * i + 1]['loss']) / 2, abs=2e-6)
  assert (tmp_path / 'parts' / 'config.json').exists() and list((tmp_path / 'parts').glob('events.*'))
  for line in lines:
    assert line['images_per_second'] * line['step_time'] == pytest.approx(made.data.batch_size, rel=1e-4)
    assert 0 <= line['data_wait'] <= 1 and 0 <= line['compile_wait'] <= 1 and 'mfu' not in line
  for i, mean in enumerate(means):  # of two steps, which may differ in shape
    for rate in ('tokens_per_second', 'tflops_per_chip'):
      a, b = (line[rate] * line['step_time'] for line in lines[2 * i:2 * i + 2])
      assert 2 * mean[rate] * mean['step_time'] == pytest.approx(a + b, rel=1e-4)
  sessions = sorted(path.name for path in (tmp_path / 'parts').glob('profile/plugins/profile/*'))
  assert sessions == (['steps_2_to_3', 'steps_3_to_3'] if name == 'adamw' else [])
  if name == 'muon':  # all steps are of one shape: what a plan counts
    program = programs.of('train', made, references=0)
    flops = model_flops.count_call(program.forward, *program.counted, trained=program.trained).total
    for line in lines:
      assert 1e12 * line['tflops_per_chip'] * line['step_time'] * mesh.size == pytest.approx(flops, rel=1e-4)


def test_work_after_the_last_checkpoint_is_done_again(recipe, mesh, tmp_path, monkeypatch):
  """Saved by steps; the run that it is compared with, by the clock, and kept as told."""
  by_the_clock = config.TrainConfig(steps=4, log_every=1, save_minutes=1e-9, keep=1, keep_every=2, preview_every=0)
  whole = train.run(recipe(train=by_the_clock), tmp_path / 'whole')
  assert {path.name for path in (tmp_path / 'whole' / 'checkpoints').iterdir()} == {'2', '4'}
  cut, good = recipe(), train.metrics.Writer.write

  def killed(self, step, scalars):
    good(self, step, scalars)
    if step == 3:
      raise KeyboardInterrupt

  monkeypatch.setattr(train.metrics.Writer, 'write', killed)
  with pytest.raises(KeyboardInterrupt):
    train.run(cut, tmp_path / 'cut')
  monkeypatch.setattr(train.metrics.Writer, 'write', good)
  checkpoints = tmp_path / 'cut' / 'checkpoints'
  (checkpoints / '99.orbax-checkpoint-tmp').mkdir()  # what an interrupted save leaves
  assert int(train.run(cut, tmp_path / 'cut').step) == 4
  lines = [json.loads(line)['step'] for line in (tmp_path / 'cut' / 'metrics.jsonl').read_text().splitlines()]
  assert lines == [1, 2, 3, 4]  # that of the lost third step is gone
  again = train.run(cut, tmp_path / 'cut')  # nothing is left to do
  for a, b in zip(leaves(whole), leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_signal_ends_a_run_after_its_step(recipe, mesh, tmp_path, monkeypatch, capfd):
  """Saved, and the same call goes on to the same numbers."""
  made = recipe(train=config.TrainConfig(steps=4, log_every=1, save_every=100, preview_every=0))
  whole = train.run(made, tmp_path / 'whole')
  read, handler = loader.Feed.__next__, signal.getsignal(signal.SIGTERM)

  def signalled(self):
    os.kill(os.getpid(), signal.SIGTERM)
    return read(self)

  monkeypatch.setattr(loader.Feed, '__next__', signalled)
  with pytest.raises(SystemExit) as ended:
    train.run(made, tmp_path / 'parts')
  monkeypatch.undo()
  last = capfd.readouterr().err.splitlines()[-1]
  assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) is handler
  assert last.startswith('SIGTERM: step 1 is saved in ') and last.endswith('the same command goes on from there')
  for a, b in zip(leaves(whole), leaves(train.run(made, tmp_path / 'parts')), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_failed_start_closes_what_it_opened(recipe, mesh, tmp_path, monkeypatch):
  monkeypatch.setattr(train.metrics, 'Writer', lambda *_: 1 / 0)
  handler = signal.getsignal(signal.SIGINT)
  with pytest.raises(ZeroDivisionError):
    train.run(recipe(), tmp_path)
  assert signal.getsignal(signal.SIGINT) is handler
  assert not {'signals', 'checkpoint_0'} & {thread.name for thread in threading.enumerate()}


def losses(recipe, shape, name):
  """The first losses and gradient norms on a mesh of that shape."""
  optim = 'adamw' if name == 'aligned' else name
  made = recipe(mesh=sharding.MeshConfig(*shape), optim=dataclasses.replace(recipe().optim, name=optim, warmup=0))
  if name == 'aligned':
    made.objective.repa_weight, made.objective.repa_depth = 0.5, 1
  devices = int(np.prod(shape))
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]).reshape(shape), sharding.AXES,
                           axis_types=(jax.sharding.AxisType.Explicit,) * 3)
  out = []
  with jax.set_mesh(mesh):
    frozen = made.objective.frozen(made)
    tx = step.optimizer(made.optim, 4)
    state = jax.jit(lambda: step.init(made.objective.random(made), tx))()
    train_step = step.make_train_step(made.objective.loss, tx, made.optim)
    data = train.batches(made)
    for _ in range(3):
      batch = next(data)
      state, scalars = train_step(state, frozen, sharding.shard_batch(batch, mesh), jax.random.key(0))
      out.append([float(scalars['loss']), float(scalars['gradient_norm'])])
    data.close()
  return np.array(out)


@pytest.mark.slow
def test_edits_under_qwen3_vl(recipe, qwen, mesh, tmp_path):
  """References of other sizes than the target, in batches of one shape."""
  data = dataclasses.replace(recipe().data, tasks=(Task('edit'),), max_prompt_tokens=132, max_rewrite_tokens=52)
  made = recipe(vlm=str(qwen), data=data, train=config.TrainConfig(steps=2, log_every=1, save_every=2))
  state = train.run(made, tmp_path)
  assert int(state.step) == 2
  assert all(np.isfinite(json.loads(line)['loss']) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines())


@pytest.mark.slow
def test_the_vlm_writes_as_training_goes(recipe, mesh, tmp_path):
  made = recipe(objective=dataclasses.replace(recipe().objective, rewrite_online=True),
                train=config.TrainConfig(steps=2, log_every=1))
  assert int(train.run(made, tmp_path).step) == 2


@pytest.mark.slow
def test_draws_of_an_example_are_the_example_several_times(recipe, mesh):
  made = recipe()
  data = train.batches(made)
  batch = next(data)
  data.close()
  frozen, params, key = made.objective.frozen(made), made.objective.init(made), jax.random.key(3)
  three = dataclasses.replace(made.objective, noises_per_example=3)
  drawn = jax.jit(three.loss)(params, frozen, sharding.shard_batch(batch, mesh), key)[0]
  many = {name: np.repeat(x, 3, axis=0) for name, x in batch.items()}
  many['number'] = 3 * many['number'] + np.tile(np.arange(3, dtype=np.uint32), len(batch['number']))
  alone = jax.jit(made.objective.loss)(params, frozen, sharding.shard_batch(many, mesh), key)[0]
  np.testing.assert_allclose(drawn, alone, rtol=1e-5)


@pytest.mark.slow
def test_a_step_computes_nothing_of_the_vlm_beyond_its_last_tap(recipe, mesh, unrolled):
  """Neither blocks after it nor the head: they cost no FLOPs of the compiled step."""
  made = recipe()
  state, frozen, batch = train.abstract(made)
  tiny = encoders.config(made.vlm)

  def flops(depth, tied, taps=made.taps):
    vlm = dataclasses.replace(tiny, text=dataclasses.replace(tiny.text, depth=depth, tied=tied))
    whole = dataclasses.replace(frozen, vlm=encoders.abstract(vlm, jnp.float32), taps=taps)
    train_step = step.make_train_step(made.objective.loss, step.optimizer(made.optim, 4), made.optim)
    arguments = sharding.abstract((state, whole, batch), mesh)
    return train_step.lower(*arguments, jax.eval_shape(lambda: jax.random.key(0))).compile().cost_analysis()['flops']

  least = flops(2, True)
  assert flops(4, False) == pytest.approx(least, rel=1e-5)
  assert flops(4, False, taps=(1, 4)) > 1.01 * least


@pytest.mark.slow
@pytest.mark.parametrize('name', ['adamw', 'muon', 'aligned'])
def test_every_mesh_gives_the_same_losses(name, recipe):
  one = losses(recipe, (1, 1, 1), name)
  assert np.isfinite(one).all()
  np.testing.assert_allclose(losses(recipe, (2, 2, 2), name), one, rtol=2e-4)


def test_muon_turns_matrices_and_leaves_the_rest_to_adam():
  keys = nnx.Rngs(0)
  params = layers.stack(lambda rngs: nnx.Dict(
      fan=layers.weight(rngs, (32, 4, 8), ('fsdp', 'tp', None), 1), join=layers.weight(rngs, (4, 8, 64), (), 2),
      table=layers.weight(rngs, (16, 32), (), None, std=1.0), bias=layers.constant(0.0, (4, 8))), 3, rngs=keys)
  normal = lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32)
  gradients = jax.tree.map(lambda x: jax.device_put(normal(x), x.sharding), params)
  settings = step.OptimConfig(name='muon', learning_rate=0.1, warmup=0, clip=1e9)
  muon, adam = (jax.jit(lambda g, p, tx=tx: tx.update(g, tx.init(p), p)[0])(gradients, params)
                for tx in (step.optimizer(settings, 10), optax.nadamw(0.1, settings.b1, settings.b2, weight_decay=0.0)))
  for name in ('table', 'bias'):
    np.testing.assert_allclose(muon[name][...], adam[name][...], rtol=1e-5)
  for name, shape in (('fan', (32, 32)), ('join', (32, 64))):
    for matrix in np.asarray(muon[name][...]).reshape(3, *shape):
      # Newton-Schulz takes every singular value near one; 0.2 rms of a full matrix is 0.2 sqrt(its longer side)
      values = np.linalg.svd(matrix, compute_uv=False) / (0.1 * 0.2 * max(shape) ** 0.5)
      assert 0.3 < values.min() and values.max() < 1.3


@pytest.mark.slow
def test_accumulated_edits_are_the_mean_of_their_parts(recipe, mesh):
  """The real loss, images in the batch: as if each half were a batch, and as the whole is, in the same noise."""
  data = dataclasses.replace(recipe().data, tasks=(Task('edit'),), max_prompt_tokens=132,
                             max_rewrite_tokens=52, batch_size=16)
  made = recipe(data=data, optim=dataclasses.replace(recipe().optim, accumulate=2))
  frozen, tx = made.objective.frozen(made), step.optimizer(made.optim, 4)
  state = jax.jit(lambda: step.init(made.objective.random(made), tx))()
  batches = train.batches(made)
  batch = next(batches)
  batches.close()
  key = jax.random.fold_in(jax.random.key(0), 0)
  gradient = jax.jit(jax.value_and_grad(made.objective.loss, has_aux=True))
  halves = [sharding.shard_batch({name: x[k::2] for name, x in batch.items()}, mesh) for k in range(2)]
  (_, losses), gradients = jax.tree.map(
      lambda a, b: (a + b) / 2, *(gradient(state.params, frozen, half, key) for half in halves))
  whole = gradient(state.params, frozen, sharding.shard_batch(batch, mesh), key)[0][1]
  train_step = step.make_train_step(made.objective.loss, tx, made.optim)
  _, metrics = train_step(state, frozen, sharding.shard_batch(batch, mesh), jax.random.key(0))
  np.testing.assert_allclose([metrics['loss'], whole['loss']], losses['loss'], rtol=1e-5)
  np.testing.assert_allclose(metrics['gradient_norm'], optax.tree.norm(gradients), rtol=1e-3)


def test_not_a_number_stops_and_keeps_the_last_checkpoint(recipe, mesh, tmp_path, monkeypatch):
  monkeypatch.setattr(train.step, 'make_train_step', _poisoned(train.step.make_train_step, at=3))
  with pytest.raises(train.Diverged, match='step 4: loss .*no longer finite'):
    train.run(recipe(), tmp_path)
  assert [p.name for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()] == ['2']


def _poisoned(make, at):
  """A train step whose loss is not a number from step `at` on."""
  def made(*args):
    real = make(*args)
    def run(state, *rest):
      bad = int(state.step) >= at
      state, metrics = real(state, *rest)
      return state, dict(metrics, loss=metrics['loss'] * (jnp.nan if bad else 1))
    return run
  return made


def test_a_leap_of_the_loss_stops():
  watch = train.DivergenceGuard(3.0)
  for i in range(120):
    watch(i, dict(loss=1.0 + 0.01 * (i % 3), gradient_norm=1.0))
  for i in range(120, 129):
    watch(i, dict(loss=9.0, gradient_norm=1.0))  # a few batches of a harder task are no leap
  for i in range(129, 150):
    watch(i, dict(loss=1.0, gradient_norm=1.0))
  with pytest.raises(train.Diverged, match='median of the last 20 losses, 5'):
    for i in range(150, 170):
      watch(i, dict(loss=9.0, gradient_norm=1.0))


@pytest.mark.parametrize('change, text', [
    (lambda c: setattr(c.data, 'batch_size', 6), 'data.batch_size=6 must be a multiple of 4'),
    (lambda c: setattr(c, 'taps', (1,)), 'model.lap.taps=2'),
    (lambda c: setattr(c, 'taps', (2, 1)), 'must rise'),
    (lambda c: setattr(c.data, 'only', 'edit'), "there is no task 'edit' here; there are t2i/1-2"),
    (lambda c: setattr(c.data, 'size', 50), 'must be multiples of 8 pixels'),
    (lambda c: setattr(c.data, 'size', 48), 'sides of [36, 48, 60]'),
    (lambda c: setattr(c.data, 'tasks', (Task('multi'),)), "trains on t2i, edit, reconstruct, not on 'multi'"),
    (lambda c: setattr(c.data, 'tasks', (Task('edit/1-1'),)), 'as in edit/1-2'),
    (lambda c: setattr(c.data, 'tasks', (Task('edit/2'),)), 'as in edit/1-2'),
    (lambda c: setattr(c.train, 'save_every', 0), 'train.save_every=0'),
    (lambda c: setattr(c.train, 'profile', '105:100'), "train.profile='105:100' must be START:STOP"),
    (lambda c: setattr(c.train, 'profile', '5:6'), 'train.profile=5:6 begins after the last step, train.steps=4'),
    (lambda c: setattr(c.train, 'wandb', 'a/b/c'), "train.wandb='a/b/c' must be a project"),
    (lambda c: setattr(c.optim, 'accumulate', 0), 'optim.accumulate=0'),
    (lambda c: setattr(c.optim, 'decay', 2.0), 'optim.decay=2.0'),
    (lambda c: setattr(c.optim, 'clip', 0.0), 'optim.clip=0.0'),
    (lambda c: setattr(c, 'frozen_dtype', 'fp16'), "frozen_dtype='fp16'"),
    (lambda c: setattr(c.sample, 'guidance', float('nan')), 'sample.guidance=nan'),
    (lambda c: setattr(c.mesh, 'tp', 3), 'does not fit 8 devices'),
    (lambda c: setattr(c, 'mesh', sharding.MeshConfig(tp=4, fsdp=-1)), 'mesh.tp=4 must divide model.lap.heads=2'),
    (lambda c: setattr(c.model.lap, 'width', 33), 'must divide model.lap.width=33'),
    (lambda c: setattr(c.sample, 'width', 50), 'sample.width=50 must be a multiple of 8'),
    (lambda c: setattr(c, 'eval', settings.GenerationEvaluation(split='tset')), "eval.split='tset' must be one of"),
    (lambda c: setattr(c.sample, 'method', 'rk4'), "'euler' or 'heun'"),
    (lambda c: setattr(c.sample, 'eta', 1.5), 'sample.eta=1.5 must be between 0 and 1'),
    (lambda c: (setattr(c.sample, 'eta', 1.0), setattr(c.sample, 'method', 'heun')), 'renews noise between Euler'),
    (lambda c: setattr(c.objective, 'cond_dropout', 2.0), 'objective.cond_dropout=2.0'),
    (lambda c: setattr(c.objective, 'noises_per_example', 0), 'objective.noises_per_example=0'),
    (lambda c: setattr(c, 'eval', settings.GenerationEvaluation(study='verifi', split='heldout')),
     'only the split test'),
    (lambda c: setattr(c, 'eval', settings.GenerationEvaluation(study='noise_levels')), 'set it to train'),
])
def test_impossible_combinations_say_so(recipe, change, text):
  made = recipe()
  for name in ('mesh', 'data', 'train', 'optim', 'sample'):
    setattr(made, name, dataclasses.replace(getattr(made, name)))
  change(made)
  with pytest.raises(ValueError) as error:
    config.check(made, 8)
  assert text in str(error.value)


def shipped(name: str, scale: str) -> config.Config:
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(scale)


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [None])  # in place of the fixture: an abstract mesh of any size comes into context
@pytest.mark.parametrize('name, scale', [('t2i', 'tiny'), ('edit', 'tiny'), ('vlm', 'tiny'), ('vae', 'tiny'),
                                         ('edit_lora', 'tiny'), ('edit_lora', 'krea2'), ('t2i_lora', 'krea2'),
                                         ('edit', 'krea2'),
                                         *((name, scale) for name in ('t2i', 'edit')
                                           for scale in ('8b_256', '8b_512', '8b'))])
def test_recipes_type_check_at_full_size(name, scale, mesh):
  """The whole train step, abstractly, on the recipe's own mesh: no device, no weight is needed."""
  made = shipped(name, scale)
  devices = made.devices or 1
  config.check(made, devices)
  mesh = sharding.abstract_mesh(made.mesh, devices)
  with jax.sharding.use_abstract_mesh(mesh):
    state, frozen, batch = train.abstract(made)
    tx = step.optimizer(made.optim, made.train.steps)
    train_step = step.make_train_step(made.objective.loss, tx, made.optim)
    after, metrics = jax.eval_shape(train_step, state, frozen, batch, jax.eval_shape(lambda: jax.random.key(0)))
  assert jax.tree.structure(after) == jax.tree.structure(state)
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(after)):
    assert a.shape == b.shape and (a.sharding is None or a.sharding.spec == b.sharding.spec)
  assert metrics['loss'].shape == () and metrics['loss'].dtype == jnp.float32
