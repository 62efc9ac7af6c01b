"""The paper's claims: plans, a run through the scheduler, measures, statements, tables, plots, the page."""

import dataclasses
import json
import pathlib
import pickle
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from scipy import stats

from unifusion_jax import config as configuration
from unifusion_jax import pipeline
from unifusion_jax.data import imaging
from unifusion_jax.errors import UserError
from unifusion_jax.scenes.claims import experiments, measures, report, results, run
from unifusion_jax.scenes.evaluation import generation
from unifusion_jax.sharding import MeshConfig

ROOT = pathlib.Path(__file__).parent.parent
TRY = experiments.SIZES['try']
# A job's process, with tiny models in the place of claim e's. The first try of 'more_edit' is killed after one step.
WORKER = '''
import os, pathlib, pickle, signal, sys
import jax
jax.config.update('jax_num_cpu_devices', 1)
jax.config.update('jax_disable_most_optimizations', True)
jax.config.update('jax_compilation_cache_dir', {cache!r})
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
from unifusion_jax import sharding
from unifusion_jax.commands import train
from unifusion_jax.models import layers
from unifusion_jax.scenes.claims import experiments, run
layers.UNROLL = False
folder, name, size = pathlib.Path({folder!r}), sys.argv[1].removeprefix('--job='), experiments.SIZES['try']
make = lambda: pickle.loads((folder / 'config').read_bytes())
experiments.STAGES |= dict(more_edit=experiments.Stage(make, 'edit'),
                           shipped_t2i=experiments.Stage(make, '', {{'init': 'more_edit'}}))
(job,) = (each for each in run.plan(['e'], 1, size) if each.name == name)
if name == 'more_edit_0' and not (folder / 'killed').exists():
  (folder / 'killed').touch()
  run.claim_stages(job, folder, size)
  config = experiments.config(job.stage, job.seed, size, folder)
  with jax.set_mesh(sharding.make_mesh(config.mesh)):
    train.run(config, experiments.workdir(folder, job.stage, job.seed), stop_at=1)
  os.kill(os.getpid(), signal.SIGKILL)
run.work(job, 'try', folder, 1)
'''


@pytest.fixture
def unpublished(tmp_path):
  """A folder in the place of docs, with a page for claim e and no results."""
  (tmp_path / 'docs').mkdir()
  (tmp_path / 'docs' / 'paper.md').write_text('before\n<!-- claim e -->\nold\n<!-- end of claim e -->\nafter\n')
  return tmp_path / 'docs'


def written(**changes) -> dict:
  """A result of claim e's arm `before` as a run writes it."""
  return dict(claim='e', arm='before', seed=0, settings=results.settings('try', 'cpu'),
              digest=experiments.digest('shipped_t2i', TRY),
              measure=experiments.measured(experiments.CLAIMS['e'].arms['before']), parameters=1, seconds=1.5,
              date='2026-11-27', devices=2, values={'1-2/all': [True, False], 'x': [0.25, None]}) | changes


def put(folder, *each: dict) -> None:
  """Writes results into a run's folder."""
  for one in each:
    results.write(results.result_file(folder, one['claim'], one['arm'], one['seed']), one)


def measured(folder, claim: str, *arms: str) -> None:
  """Results of arms in a run's folder as far as the plan needs them: without values."""
  for name in arms:
    arm = experiments.CLAIMS[claim].arms[name]
    put(folder, dict(claim=claim, arm=name, seed=0, digest=experiments.digest(arm.stage, TRY),
                     measure=experiments.measured(arm)))


@pytest.mark.slow
def test_a_run_goes_on_after_a_kill_and_ends_in_a_table_and_a_plot(recipe, unpublished, tmp_path, monkeypatch, capfd):
  folder, docs = tmp_path / 'run', unpublished
  run.claim_folder(folder, 'try')
  (folder / 'config').write_bytes(pickle.dumps(recipe(mesh=MeshConfig(data=-1, fsdp=1))))
  make = lambda: pickle.loads((folder / 'config').read_bytes())
  monkeypatch.setitem(experiments.STAGES, 'more_edit', experiments.Stage(make, 'edit'))
  monkeypatch.setitem(experiments.STAGES, 'shipped_t2i', experiments.Stage(make, '', {'init': 'more_edit'}))
  command = [sys.executable, '-c', WORKER.format(folder=str(folder), cache=str(ROOT / '.cache' / 'jax'))]
  jobs = [job for job in run.plan(['e'], 1, TRY) if job.stage != 'more_t2i']
  assert [job.name for job in jobs] == ['more_edit_0', 'shipped_t2i_0']
  assert run.run(jobs, folder, TRY, command, 1, 0) == ['more_edit_0']  # and what needs its export is left out
  workdir = experiments.workdir(folder, 'more_edit', 0)
  assert (workdir / 'checkpoints').exists() and not run.exported(jobs[0], folder)
  assert run.run(jobs, folder, TRY, command, 1, 0) == [], (folder / 'logs' / 'more_edit_0.txt').read_text()
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == [1, 2] and not (workdir / 'checkpoints').exists()
  assert run.remaining(jobs, folder, TRY) == []
  assert run.run(jobs, folder, TRY, ['false'], 1, 0) == []  # there is nothing left to start

  report.report(folder, docs)
  page = (docs / 'paper.md').read_text()
  assert page.startswith('before\n<!-- claim e -->\nSize `try`') and page.endswith('<!-- end of claim e -->\nafter\n')
  assert '| `more_edit` | 0.0' in page and 'old' not in page and 'Not there: more_t2i.' in page
  assert 'no difference seen between `more_edit` and `before`: 0.000 [-0.658, 0.658], p = 1.000, 1 seed, 2 ' in page
  assert imaging.read(docs / 'results' / 'e.png').shape[1] > 400
  result = json.loads((docs / 'results' / 'e.json').read_text())
  assert result['arms']['before']['values'] == result['arms']['more_edit']['values']  # the same weights and noise
  assert page == report.page(page, results.read(docs))


def test_minutes_that_are_over_stop_what_runs(tmp_path):
  """The process is ended, nothing counts as failed, and nothing more starts."""
  run.claim_folder(tmp_path, 'try')
  script = 'import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)'
  jobs = run.plan(['e'], 1, TRY)
  assert run.run(jobs, tmp_path, TRY, [sys.executable, '-c', script, str(tmp_path / 'started')], 1, 1e-3) == []
  assert len(list((tmp_path / 'logs').iterdir())) == 1


def test_a_folder_of_another_size_is_refused(tmp_path):
  run.claim_folder(tmp_path, 'try')
  run.claim_folder(tmp_path, 'try')
  with pytest.raises(UserError, match='another size, steps, batch, examples'):
    run.claim_folder(tmp_path, 'short')


def test_the_plan_has_each_stage_once_after_what_it_needs():
  jobs = run.plan(list(experiments.CLAIMS), 3, experiments.SIZES['full'])
  names = [job.name for job in jobs]
  assert len(set(names)) == len(names) == 3 * len(experiments.STAGES)
  assert all(names.index(before) < names.index(job.name) for job in jobs for before in job.after)
  assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)
  assert sum(len(job.arms) for job in jobs) == 3 * sum(len(claim.arms) for claim in experiments.CLAIMS.values())
  reduced = run.plan(['a'], 1, experiments.SIZES['reduced'])
  assert [job.stage for job in reduced] == [f't2i_{name}' for name in experiments.CONDITIONINGS]


def test_the_estimate_of_a_plan_adds_up():
  size = dataclasses.replace(TRY, steps=dict(edit=100), examples=10, seconds=dict(start=60, image=1, edit=2))
  jobs = run.plan(['e'], 2, size)
  assert [run.seconds(job, size) for job in jobs] == 2 * [80, 280, 280]
  lines = run.describe(jobs, size).splitlines()
  assert lines[1].split() == ['shipped_t2i', '0', '2', '2.7', 'e/before']
  assert lines[-1] == '6 jobs, about 0.4 h one after another (an estimate)'  # 1280 s


@pytest.mark.slow
def test_every_stage_is_a_configuration_that_runs(tmp_path):
  size = experiments.SIZES['full']
  configs = {stage: experiments.config(stage, 2, size, tmp_path) for stage in experiments.STAGES}
  for stage, config in configs.items():
    configuration.check(config, 1)
    assert config.seed == 2 and config.data.aspects == ('1:1',)
    for setting, before in experiments.STAGES[stage].after.items():
      assert getattr(config, setting) == str(tmp_path / 'stages' / f'{before}_2' / 'export')
  for stage in ('tiles', 'more_edit', 'more_t2i', 'edit_multi'):  # the DiT is never trained on several references
    assert {task.name.partition('/')[0] for task in configs[stage].data.tasks} <= {'t2i', 'edit', 'reconstruct'}
  pairs = [(configs['more_edit'], configs['more_t2i'], 'init'), (configs['edit_lap'], configs['more_t2i_lap'], 'init'),
           (configs['edit_multi'], configs['edit_more'], 'data')]
  for one, control, same in pairs:  # alike but for the tasks, and in the last but for the VLM
    assert getattr(one, same) == getattr(control, same)
    assert all(getattr(one, name) == getattr(control, name) for name in ('optim', 'train', 'model', 'objective'))
  both = configs['edit_more'], configs['edit_multi']
  assert both[0].vlm != both[1].vlm and both[0].init == both[1].init
  assert configs['more_t2i_lap'].data.tasks == configs['more_t2i'].data.tasks == configs['t2i_lap'].data.tasks


def test_the_digest_of_a_stage_is_that_of_its_settings_and_of_those_before_it():
  before = experiments.digest('edit_multi', TRY)
  assert before != experiments.digest('edit_multi', experiments.SIZES['reduced'])
  vlm = dict(TRY.steps, vlm=3)
  assert before != experiments.digest('edit_multi', dataclasses.replace(TRY, steps=vlm))
  assert experiments.digest('more_edit', TRY) == experiments.digest('more_edit', dataclasses.replace(TRY, steps=vlm))


def test_the_digest_of_a_measurement_is_that_of_its_function_and_settings():
  arms = experiments.CLAIMS['f'].arms | experiments.CLAIMS['b'].arms
  one = arms['shipped']
  digests = {experiments.measured(arm) for arm in (
      one, dataclasses.replace(one, settings=dict(tiles=4)), dataclasses.replace(one, how=dict(larger=2)),
      dataclasses.replace(one, measure=measures.styles), dataclasses.replace(one, measure=measures.several))}
  assert len(digests) == 5 and experiments.measured(dataclasses.replace(one, stage='tiles')) in digests


def test_results_alone_are_enough_to_go_on(tmp_path):
  """On another machine, where the trainings are not: those that a missing measurement needs are done again."""
  jobs = run.plan(['f'], 1, TRY)
  left = lambda: [job.stage for job in run.remaining(jobs, tmp_path, TRY)]
  assert left() == ['shipped_edit', 'vlm_multi', 'shipped_edit_multi', 'edit_multi', 'edit_more']
  measured(tmp_path, 'f', 'shipped', 'shipped_truth', 'vlm', 'edit_more')
  assert left() == ['vlm_multi', 'edit_multi']
  measured(tmp_path, 'f', 'vlm_edit', 'vlm_edit_truth')
  assert left() == []
  file = results.result_file(tmp_path, 'f', 'shipped_truth', 0)  # measured in another way: to be measured again
  file.write_text(json.dumps(json.loads(file.read_text()) | dict(measure='another')))
  assert left() == ['shipped_edit']


def test_a_training_of_other_settings_is_refused(tmp_path):
  """Also of a stage that another starts from; one whose digest was never written is of settings that nobody knows."""
  first, second = (job for job in run.plan(['b'], 1, TRY) if job.stage in ('t2i_lap', 'edit_lap'))
  run.claim_stages(first, tmp_path, TRY)
  run.claim_stages(first, tmp_path, TRY)
  run.claim_stages(second, tmp_path, TRY)
  longer = dataclasses.replace(TRY, steps=dict(TRY.steps, t2i=3))
  with pytest.raises(UserError, match='t2i_lap_0 holds a training of other settings .*: remove it, or give another'):
    run.claim_stages(second, tmp_path, longer)
  (experiments.workdir(tmp_path, 't2i_lap', 0) / 'stage.json').unlink()
  (experiments.workdir(tmp_path, 't2i_lap', 0) / 'export').mkdir()
  with pytest.raises(UserError, match='their digest is not known'):
    run.claim_stages(first, tmp_path, TRY)


def test_results_of_another_device_are_found_before_anything_is_trained(tmp_path):
  here = jax.devices()[0].device_kind
  put(tmp_path, written(settings=results.settings('try', here), devices=4))
  results.check(tmp_path, results.settings('try', here))  # however many there are
  put(tmp_path, written(seed=1, settings=results.settings('try', 'another') | dict(jax='0')))
  (job,) = (job for job in run.plan(['e'], 1, TRY) if job.stage == 'more_edit')
  with pytest.raises(UserError, match='before_1.json has another jax, device than this run: .* give another --folder'):
    run.work(job, 'try', tmp_path, 1)
  assert not (tmp_path / 'stages').exists()


def test_checkpoints_that_a_kill_left_are_removed(tmp_path, monkeypatch):
  """The export is whole, the checkpoints half removed: nothing is trained again."""
  size = dataclasses.replace(TRY, scale=dataclasses.replace(TRY.scale, vlm_batch=jax.device_count()))
  monkeypatch.setitem(experiments.SIZES, 'try', size)
  (job,) = (job for job in run.plan(['f'], 1, TRY) if job.stage == 'vlm_multi')
  workdir = experiments.workdir(tmp_path, 'vlm_multi', 0)
  run.claim_stages(job, tmp_path, size)
  (workdir / 'config_export.json').write_text('{}')
  (workdir / 'checkpoints' / '2').mkdir(parents=True)
  run.work(job, 'try', tmp_path, 1)
  assert not (workdir / 'checkpoints').exists()


def test_only_some_stages_are_measured_and_what_they_start_from_is_trained():
  jobs = run.plan(['c', 'e', 'f'], 2, TRY, ['shipped_t2i', 'edit_multi'])
  assert [job.name for job in jobs] == [f'{stage}_{seed}' for seed in (0, 1)
                                        for stage in ('shipped_t2i', 'vlm_multi', 'edit_multi')]
  assert jobs[0].arms == (('c', 'shipped'), ('c', 'shipped_off'), ('e', 'before')) and not jobs[1].arms


@pytest.mark.parametrize('only, named', [(['shipped_edit'], 'shipped_edit'), (['vlm_multi'], 'vlm_multi'),
                                         (['shipped_t2i', 't2i_lap', 'tiles'], 't2i_lap,tiles')])
def test_stages_that_no_claim_measures_are_named(only, named):
  """Neither another claim's, nor one that others start from, nor a variant's at this size."""
  with pytest.raises(UserError, match=f'--only={named}: none of --claims=e measures it at this size'):
    run.plan(['e'], 1, TRY, only)
  assert run.plan(['e'], 1, experiments.SIZES['full'], ['t2i_lap'])


def test_unknown_claims_and_stages_are_named():
  assert experiments.named(['e', 'a', 'e']) == ['e', 'a']
  with pytest.raises(UserError, match='must be some of a,b,c,d,e,f'):
    experiments.named(['a', 'g'])
  assert experiments.stages(['tiles']) == ['tiles'] and experiments.stages([]) == []
  with pytest.raises(UserError, match='--only=tile names no stage: there are t2i_lap, '):
    experiments.stages(['tiles', 'tile'])


def test_a_run_goes_on_from_what_is_in_docs(unpublished, tmp_path):
  """What the report wrote comes back the same; what belongs to other settings or another training stays out."""
  known = [written(), written(seed=2, date='2026-11-28')]
  put(tmp_path / 'one', *known, written(arm='more_edit', digest='another'), written(arm='more_t2i', measure='another'))
  report.report(tmp_path / 'one', unpublished)
  restore = lambda folder, size='try', device='cpu': results.restore(unpublished, tmp_path / folder, size, device)
  assert restore('two') == 2
  for each in known:
    file = results.result_file(tmp_path / 'two', 'e', 'before', each['seed'])
    assert json.loads(file.read_text()) == each
    file.write_text(json.dumps(each | dict(seconds=9.0)))
  assert restore('two') == 0  # what is there is never written over
  assert json.loads(file.read_text())['seconds'] == 9.0
  file.write_text(json.dumps(each | dict(measure='another')))
  assert restore('two') == 1  # but what is not the arm's
  assert restore('three', size='reduced') == 0 and restore('three', device='another') == 0
  assert not (tmp_path / 'three').exists()


def test_the_kind_of_device_is_that_of_the_jobs():
  assert run.device_kind() == jax.devices()[0].device_kind


# Measures


@pytest.fixture
def answers(monkeypatch):
  """Images and texts in the place of the pipeline's, by a function that is set as `answers.of`; what was asked."""
  class Answers:
    asked = []
    of = staticmethod(lambda record: pipeline.Sample(record['target'], record['caption']))

  def generate(pipe, records, batch_size, seed, settings):
    Answers.asked.append(records)
    return [Answers.of(record) for record in records]
  monkeypatch.setattr(generation, 'generate', generate)
  return Answers


def test_edits_are_measured_where_the_reference_stays(pipe, answers):
  size = dataclasses.replace(TRY, examples=12)
  perfect = measures.edits(pipe, size, 0, {})
  assert all(map(all, (perfect[f'edit/{name}'] for name in ('all', 'asked', 'kept', 'written'))))
  known = [psnr for psnr in perfect['edit/psnr'] if psnr is not None]
  assert len(known) > 6 and min(known) > 78 and min(x for x in perfect['edit/ssim'] if x is not None) == 1
  answers.of = staticmethod(lambda record: pipeline.Sample(np.resize(record['references'][0], (64, 64, 3)), ''))
  copied = measures.edits(pipe, size, 0, {})  # nothing is changed: all that must stay is there to the pixel
  assert not any(copied['edit/all']) and not any(copied['edit/written'])
  assert [psnr for psnr in copied['edit/psnr'] if psnr is not None] == known


def test_two_references_are_named_by_what_they_show(pipe, answers):
  size = dataclasses.replace(TRY, examples=3)
  assert measures.several(pipe, size, 0, {}, truth=True) == {
      f'{n}/{name}': [True] * 3 for n in (2, 3) for name in ('all', 'written')}
  two, three = answers.asked
  assert not any(re.search('first|second|picture (one|two|[12])', record['instruction']) for record in two)
  assert [[len(record['references']) for record in asked] for asked in (two, three)] == [[2] * 3, [3] * 3]
  assert all(record['rewrite'] == record['caption'] for record in two + three)
  measures.several(pipe, size, 0, {})
  assert all(record['rewrite'] is None for record in answers.asked[2])


def test_references_are_shown_larger_and_measured_small(pipe, answers):
  values = measures.reconstruct(pipe, TRY, 0, dict(tiles=9), larger=3, rewrite='')
  assert values['exact'] == [True, True] and values['rmse'] == [0, 0] and values['dissimilarity'] == [0, 0]
  assert max(values['distance']) < 1e-5
  assert all(record['rewrite'] == '' and record['references'][0].shape == (192, 192, 3) for record in answers.asked[0])


@pytest.mark.slow
def test_prompts_have_verdicts_scores_and_losses(pipe):
  values = measures.prompts(pipe, TRY, 0, {}, loss=True)
  assert set(values) == {'loss', *(f'{group}/{name}' for group in ('1-2', '3-4')
                                   for name in ('all', 'share', 'written', 'vqascore'))}
  assert len(values['loss']) == 4 and min(values['loss']) > 0 and all(len(each) == 2 for name, each in values.items()
                                                                      if name != 'loss')
  assert measures.prompts(pipe, TRY, 1, {}, loss=True)['loss'] == values['loss']  # fixed draws, whatever the seed


# Reports


def result(claim='e', **arms):
  """A result in the form of docs/results, of {arm: {value: [values of a seed, ...]}}."""
  settings = results.settings('try', 'cpu')
  seeds = {name: len(next(iter(values.values()))) for name, values in arms.items()}
  return dict(claim=claim, settings=settings, arms={
      name: dict(digest='d', measure='m', parameters=2_000_000, seeds=list(range(seeds[name])),
                 seconds=[1.0] * seeds[name], devices=[1] * seeds[name], dates=['2026-11-27'] * seeds[name],
                 values=values) for name, values in arms.items()})


def test_statements_are_those_of_hand_computed_numbers():
  made = result(before={'1-2/all': ['01' * 7] * 3, '3-4/all': ['0' * 14] * 3},
                more_t2i={'1-2/all': ['1' * 14] * 3, '3-4/all': ['0' * 14] * 3},
                more_edit={'1-2/all': ['0' * 14] * 3, '3-4/all': ['0' * 14] * 3})
  first, second, third, fourth = report.statements(made)
  # Against more_t2i all 14 examples differ: p is 2 of 2^14, times four comparisons; Wilson's interval ends at
  # 14 / (14 + z^2), z being 1.96
  assert first == ('1-2 objects as asked: `more_edit` below `more_t2i` by 1.000 [0.785, 1.000], p < 0.001, 3 seeds, 14 '
                   'examples.')
  # Against before half differ, the same in all seeds: the t interval of 14 examples, p times three
  t = 0.5 / np.std([0, 1] * 7, ddof=1) * 14 ** 0.5
  half, p = 0.5 / t * stats.t.ppf(0.975, 13), 3 * 2 * stats.t.sf(t, 13)
  assert second == (f'1-2 objects as asked: `more_edit` below `before` by 0.500 [{0.5 - half:.3f}, {0.5 + half:.3f}], '
                    f'p = {p:.3f}, 3 seeds, 14 examples.')
  # Not one success is no proof of equality: of 14 alike the score interval ends at z^2 / (14 + z^2)
  assert 'no difference seen between `more_edit` and `more_t2i`: 0.000 [-0.215, 0.215], p = 1.000' in third
  assert fourth.startswith('3-4 objects as asked: no difference')
  assert report.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
  assert '| `more_t2i` | 2.00M | 1.000 ± 0.000 [0.785, 1.000] | 0.000 ± 0.000 [0.000, 0.215] |' in report.table(made)


def test_one_training_each_is_no_difference_of_the_arms():
  """What is seen over examples may be the seed's; not where nothing was trained."""
  low, high = ([[0.0, 0.1] * 10], [[1.0, 1.2] * 10])
  (said,) = report.statements(result('b', lap={'edit/psnr': high}, last={'edit/psnr': low}))
  assert "each: the difference between `lap` and `last` may be the seed's: 1.05 [1.03, 1.07], p < 0.001, 1 seed" in said
  (said,) = report.statements(result('b', lap={'edit/psnr': high}, lap_text={'edit/psnr': low}))
  assert said.startswith("PSNR of what stays, dB: one training: the difference between `lap` and `lap_text` may be")
  (said,) = report.statements(result('b', shipped={'edit/psnr': high}, shipped_text={'edit/psnr': low}))
  assert '`shipped` above `shipped_text` by 1.05' in said
  (said,) = report.statements(result('b', lap={'edit/psnr': 2 * high}, last={'edit/psnr': 2 * low}))
  assert '`lap` above `last` by 1.05' in said and said.endswith('2 seeds, 20 examples.')


def test_equal_values_are_the_same_and_one_example_says_nothing():
  same = {'edit/psnr': [[3.0, 4.0]]}
  (said,) = report.statements(result('b', shipped=same, shipped_text=same))
  assert said == ('PSNR of what stays, dB: `shipped` and `shipped_text` are the same to the last digit, 1 seed, 2 '
                  'examples.')
  made = result('b', shipped={'edit/psnr': [[3.0, None]]}, shipped_text={'edit/psnr': [[4.0, 5.0]]})
  assert report.statements(made) == [] and report.table(made).splitlines()[2] == '| `shipped` | 2.00M |  |'


def test_shares_of_verdicts_end_at_0_and_1():
  mean, std, low, high = report.spread(np.array([[1.0, 1, 1, 0], [1, 1, 1, 1]]))
  assert (mean, high) == (0.875, 1) and 0 <= low < mean and std > 0
  assert report.spread(np.array([[3.0, 5.0]]))[2] < 0


def test_arms_are_compared_in_the_seeds_and_examples_that_both_have():
  made = result('b', shipped={'edit/psnr': [[1.0, None, 3.0], [2.0, None, 4.0]]},
                shipped_text={'edit/psnr': [[0.0, None, 2.0]]})
  mine, theirs = report.matched(made, 'edit/psnr', 'shipped', 'shipped_text')
  assert mine.tolist() == [[1.0, 3.0]] and theirs.tolist() == [[0.0, 2.0]]
  assert 'shipped_text (1 of 2 seeds)' in report.section('b', made)


def test_results_of_earlier_weights_are_named():
  made = result('b', shipped={'edit/psnr': [[1.0, 2.0]]})
  assert 'earlier weights' not in report.section('b', made)
  made['settings']['weights'] = made['settings']['weights'] | dict(vlm='da14acc22685')
  assert 'Made with earlier weights than the shipped ones (SHA-256 vlm da14acc22685...).' in report.section('b', made)


def test_tiles_are_given_beside_one_tile():
  made = result('d', image_1={'rmse': [[30.0, 50.0]]}, image_9={'rmse': [[10.0, 30.0]]}, text_9={'rmse': [[9.0, 9.0]]})
  rows = report.table(made).splitlines()
  assert rows[2].endswith('40.00 [-87.06, 167.06], 1.00 |') and rows[3].endswith(', 0.50 |')  # t of 1 degree is 12.71
  assert rows[4].endswith('9.00 [9.00, 9.00] |')


@pytest.mark.parametrize('change, named', (
    (dict(settings=results.settings('try', 'another')), 'has another device than'),
    (dict(digest='another'), 'of another training than the other seeds of before'),
    (dict(measure='another'), 'of another measurement'),
    (dict(values={'1-2/all': [True, True]}), 'of another set of values')))
def test_results_that_do_not_belong_together_are_refused(unpublished, tmp_path, change, named):
  """The report says of which claim, and writes the others."""
  put(tmp_path, written(), written(seed=1, devices=8), written(claim='c', arm='shipped', values={'plain/all': [True]}))
  arm = results.collect(tmp_path, 'e')['arms']['before']
  assert arm['values'] == {'1-2/all': ['10'] * 2, 'x': [[0.25, None]] * 2} and arm['devices'] == [2, 8]
  assert results.collect(tmp_path, 'a') is None
  put(tmp_path, written(seed=1) | change)
  with pytest.raises(UserError, match=named):
    results.collect(tmp_path, 'e')
  with pytest.raises(UserError, match=rf'^\(e\) [^;]* {named}'):
    report.report(tmp_path, unpublished)
  assert list(results.read(unpublished)) == ['c']


@pytest.mark.parametrize('change, lost', ((dict(settings=results.settings('reduced', 'cpu')), 'another size, steps'),
                                          (dict(seed=2), 'before of seed 0'), (dict(arm='more_t2i'), 'before of seed')))
def test_published_results_are_replaced_only_when_that_is_asked_for(unpublished, tmp_path, change, lost):
  put(tmp_path / 'one', written())
  put(tmp_path / 'two', written() | change)
  put(tmp_path / 'three', written(), written() | change | dict(seed=1, settings=written()['settings']))
  report.report(tmp_path / 'one', unpublished)
  page = (unpublished / 'paper.md').read_text()
  with pytest.raises(UserError, match=rf'e.json has results that this run has not \({lost}.*: give --replace'):
    report.report(tmp_path / 'two', unpublished)
  assert (unpublished / 'paper.md').read_text() == page
  report.report(tmp_path / 'three', unpublished)  # more of the same
  report.report(tmp_path / 'two', unpublished, replace=True)
  assert results.read(unpublished)['e'] == results.collect(tmp_path / 'two', 'e')


@pytest.mark.parametrize('flags, ran, reported', (
    (['--size=try', '--folder=here', '--docs=there'], '--size=try --folder=here --docs=there',
     '--folder=here --docs=there'),
    (['--folder', 'a b', '--jobs', '2', '--docs', 'there', '--replace'], '--folder a b --jobs 2 --docs there',
     '--folder a b --docs there --replace'),
    ([], '', ''), (['--folder'], '--folder', '--folder'), (['--plan', '--size=try'], '--plan --size=try', None)))
def test_the_script_gives_each_program_its_flags(tmp_path, flags, ran, reported):
  shutil.copytree(ROOT / 'launch', tmp_path / 'launch')
  (tmp_path / 'requirements.txt').write_text('')
  python = tmp_path / '.venv' / 'bin' / 'python'
  python.parent.mkdir(parents=True)
  python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$*" >>"$0.calls"\n')
  python.chmod(0o755)
  subprocess.run(['bash', 'launch/claims.sh', *flags], cwd=tmp_path, check=True, timeout=60, capture_output=True)
  calls = [line.removeprefix('-m unifusion_jax.scenes.claims.').rstrip() for line in
           python.with_name('python.calls').read_text().splitlines() if 'claims' in line]
  assert calls == [f'run {ran}'.rstrip(), *([] if reported is None else [f'report {reported}'.rstrip()])]


def test_the_page_is_what_the_report_makes_of_the_results():
  text, found = (ROOT / 'docs' / 'paper.md').read_text(), results.read(ROOT / 'docs')
  assert [claim for _, claim, _ in report.MARKED.findall(text)] == list(experiments.CLAIMS)
  assert report.page(text, found) == text, 'python -m unifusion_jax.scenes.claims.report --folder= writes it anew'
  assert all((ROOT / 'docs' / 'results' / f'{claim}.png').exists() for claim in found)
