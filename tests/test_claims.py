"""The paper's claims: plans, a run through the scheduler, measures, statements, tables, plots, the page."""

import dataclasses
import json
import pathlib
import pickle
import re
import sys

import jax
import numpy as np
import pytest

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
  config = experiments.config(job.stage, job.seed, size, folder)
  with jax.set_mesh(sharding.make_mesh(config.mesh)):
    train.run(config, experiments.workdir(folder, job.stage, job.seed), stop_at=1)
  os.kill(os.getpid(), signal.SIGKILL)
run.work(job, 'try', folder, 1)
'''


def test_a_run_goes_on_after_a_kill_and_ends_in_a_table_and_a_plot(recipe, tmp_path, monkeypatch, capfd):
  folder, docs = tmp_path / 'run', tmp_path / 'docs'
  run.claim_folder(folder, 'try')
  (folder / 'config').write_bytes(pickle.dumps(recipe(mesh=MeshConfig(data=-1, fsdp=1))))
  monkeypatch.setitem(experiments.STAGES, 'shipped_t2i', experiments.Stage(recipe, '', {'init': 'more_edit'}))
  command = [sys.executable, '-c', WORKER.format(folder=str(folder), cache=str(ROOT / '.cache' / 'jax'))]
  jobs = [job for job in run.plan(['e'], 1, TRY) if job.stage != 'more_t2i']
  assert [job.name for job in jobs] == ['more_edit_0', 'shipped_t2i_0']
  assert run.run(jobs, folder, command, 1, 0) == ['more_edit_0']  # and what needs its export is left out
  workdir = experiments.workdir(folder, 'more_edit', 0)
  assert (workdir / 'checkpoints').exists() and not run.exported(jobs[0], folder)
  assert run.run(jobs, folder, command, 1, 0) == [], (folder / 'logs' / 'more_edit_0.txt').read_text()
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == [1, 2] and not (workdir / 'checkpoints').exists()
  assert run.remaining(jobs, folder) == []
  assert run.run(jobs, folder, ['false'], 1, 0) == []  # there is nothing left to start

  docs.mkdir()
  (docs / 'paper.md').write_text('before\n<!-- claim e -->\nold\n<!-- end of claim e -->\nafter\n')
  report.report(folder, docs)
  page = (docs / 'paper.md').read_text()
  assert page.startswith('before\n<!-- claim e -->\nSize `try`') and page.endswith('<!-- end of claim e -->\nafter\n')
  assert '| `more_edit` | 0.0' in page and 'old' not in page and 'Not there: more_t2i.' in page
  assert 'no difference seen between `more_edit` and `before`: 0.000 [0.000, 0.000], p = 1.000, 1 seed, 2 ' in page
  assert imaging.read(docs / 'results' / 'e.png').shape[1] > 400
  result = json.loads((docs / 'results' / 'e.json').read_text())
  assert result['arms']['before']['values'] == result['arms']['more_edit']['values']  # the same weights and noise
  assert page == report.page(page, results.read(docs))


def test_minutes_that_are_over_stop_what_runs(tmp_path):
  """The process is ended, nothing counts as failed, and nothing more starts."""
  run.claim_folder(tmp_path, 'try')
  script = 'import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)'
  jobs = run.plan(['e'], 1, TRY)
  assert run.run(jobs, tmp_path, [sys.executable, '-c', script, str(tmp_path / 'started')], 1, 1e-3) == []
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


def test_every_stage_is_a_configuration_that_runs(tmp_path):
  size = experiments.SIZES['full']
  conditioned = {name for name in experiments.STAGES if name.startswith('t2i_') or name in ('edit_lap', 'edit_last')}
  there = (ROOT / 'configs' / 'ablation.py').exists()
  configs = {stage: experiments.config(stage, 2, size, tmp_path)
             for stage in set(experiments.STAGES) - (set() if there else conditioned)}
  for stage, config in configs.items():
    configuration.check(config, 1)
    assert config.seed == 2 and config.data.aspects == ('1:1',)
    for setting, before in experiments.STAGES[stage].after.items():
      assert getattr(config, setting) == str(tmp_path / 'stages' / f'{before}_2' / 'export')
  for stage in ('tiles', 'more_edit', 'more_t2i', 'edit_multi'):  # the DiT is never trained on several references
    assert {task.name.partition('/')[0] for task in configs[stage].data.tasks} <= {'t2i', 'edit', 'reconstruct'}
  edits, prompts = configs['more_edit'], configs['more_t2i']
  assert edits.optim == prompts.optim and edits.train == prompts.train and edits.init == prompts.init
  assert edits.model == prompts.model and edits.objective == prompts.objective


def test_the_digest_of_a_stage_is_that_of_its_settings_and_of_those_before_it():
  before = experiments.digest('edit_multi', TRY)
  assert before != experiments.digest('edit_multi', experiments.SIZES['reduced'])
  vlm = dict(TRY.steps, vlm=3)
  assert before != experiments.digest('edit_multi', dataclasses.replace(TRY, steps=vlm))
  assert experiments.digest('more_edit', TRY) == experiments.digest('more_edit', dataclasses.replace(TRY, steps=vlm))


def test_results_alone_are_enough_to_go_on(tmp_path):
  """On another machine, where the trainings are not: those that a missing measurement needs are done again."""
  jobs = run.plan(['f'], 1, TRY)
  assert [job.stage for job in run.remaining(jobs, tmp_path)] == [
      'shipped_edit', 'vlm_multi', 'shipped_edit_multi', 'edit_multi']
  for arm in ('shipped', 'shipped_truth', 'vlm'):
    results.write(results.result_file(tmp_path, 'f', arm, 0), {})
  assert [job.stage for job in run.remaining(jobs, tmp_path)] == ['vlm_multi', 'edit_multi']
  for arm in ('vlm_edit', 'vlm_edit_truth'):
    results.write(results.result_file(tmp_path, 'f', arm, 0), {})
  assert run.remaining(jobs, tmp_path) == []


def test_only_some_stages_are_measured_and_what_they_start_from_is_trained():
  jobs = run.plan(['c', 'e', 'f'], 2, TRY, ['shipped_t2i', 'edit_multi'])
  assert [job.name for job in jobs] == [f'{stage}_{seed}' for seed in (0, 1)
                                        for stage in ('shipped_t2i', 'vlm_multi', 'edit_multi')]
  assert jobs[0].arms == (('c', 'shipped'), ('c', 'shipped_off'), ('e', 'before')) and not jobs[1].arms


def test_unknown_claims_and_stages_are_named():
  assert experiments.named(['e', 'a', 'e']) == ['e', 'a']
  with pytest.raises(UserError, match='must be some of a,b,c,d,e,f'):
    experiments.named(['a', 'g'])
  assert experiments.stages(['tiles']) == ['tiles'] and experiments.stages([]) == []
  with pytest.raises(UserError, match='--only=tile names no stage: there are t2i_lap, '):
    experiments.stages(['tiles', 'tile'])


def test_a_run_goes_on_from_what_is_in_docs(tmp_path):
  """What the report wrote comes back the same; what belongs to other settings or another training stays out."""
  one = dict(claim='e', arm='before', seed=0, parameters=1, seconds=1.5, date='2026-11-27',
             settings=experiments.settings('try') | dict(jax=jax.__version__, device='cpu', devices=1),
             digest=experiments.digest('shipped_t2i', TRY), values={'1-2/all': [True, False], 'x': [0.25, None]})
  written = [one, one | dict(seed=2, date='2026-11-28'), one | dict(arm='more_edit', digest='another')]
  for each in written:
    results.write(results.result_file(tmp_path / 'one', 'e', each['arm'], each['seed']), each)
  (tmp_path / 'docs').mkdir()
  (tmp_path / 'docs' / 'paper.md').write_text('')
  report.report(tmp_path / 'one', tmp_path / 'docs')
  assert results.restore(tmp_path / 'docs', tmp_path / 'two', 'try') == 2
  for each in written[:2]:
    file = results.result_file(tmp_path / 'two', 'e', 'before', each['seed'])
    assert json.loads(file.read_text()) == each
    file.write_text(json.dumps(each | dict(seconds=9.0)))
  assert results.restore(tmp_path / 'docs', tmp_path / 'two', 'try') == 0  # what is there is never written over
  assert json.loads(file.read_text())['seconds'] == 9.0
  assert results.restore(tmp_path / 'docs', tmp_path / 'three', 'reduced') == 0
  assert not (tmp_path / 'three').exists()


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
  settings = experiments.settings('try') | dict(jax='0', device='cpu', devices=1)
  seeds = {name: len(next(iter(values.values()))) for name, values in arms.items()}
  return dict(claim=claim, settings=settings, arms={
      name: dict(digest='d', parameters=2_000_000, seeds=list(range(seeds[name])), seconds=[1.0] * seeds[name],
                 dates=['2026-11-27'] * seeds[name], values=values) for name, values in arms.items()})


def test_statements_are_those_of_hand_computed_numbers():
  made = result(before={'1-2/all': ['01' * 7] * 3, '3-4/all': ['0' * 14] * 3},
                more_t2i={'1-2/all': ['1' * 14] * 3, '3-4/all': ['0' * 14] * 3},
                more_edit={'1-2/all': ['0' * 14] * 3, '3-4/all': ['0' * 14] * 3})
  first, second, third, fourth = report.statements(made)
  # Against more_t2i all 14 examples differ: p is 2 of 2^14 flips, times four comparisons
  assert first == ('1-2 objects as asked: `more_edit` below `more_t2i` by 1.000 [1.000, 1.000], p < 0.001, 3 seeds, 14 '
                   'examples.')
  # Against before seven differ: p is 2 of 2^7, times three
  assert second.startswith('1-2 objects as asked: `more_edit` below `before` by 0.500 [0.2')
  assert second.endswith(f'p = {3 * 2 / 2 ** 7:.3f}, 3 seeds, 14 examples.')
  assert 'no difference seen between `more_edit` and `more_t2i`: 0.000 [0.000, 0.000], p = 1.000' in third
  assert fourth.startswith('3-4 objects as asked: no difference')
  assert report.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
  # Of 14 alike the score interval ends at z^2 / (14 + z^2), z being 1.96
  assert '| `more_t2i` | 2.00M | 1.000 ± 0.000 [0.785, 1.000] | 0.000 ± 0.000 [0.000, 0.215] |' in report.table(made)


def test_arms_are_compared_in_the_seeds_and_examples_that_both_have():
  made = result('b', shipped={'edit/psnr': [[1.0, None, 3.0], [2.0, None, 4.0]]},
                shipped_text={'edit/psnr': [[0.0, None, 2.0]]})
  mine, theirs = report.matched(made, 'edit/psnr', 'shipped', 'shipped_text')
  assert mine.tolist() == [[1.0, 3.0]] and theirs.tolist() == [[0.0, 2.0]]
  assert 'shipped_text (1 of 2 seeds)' in report.section('b', made)


def test_tiles_are_given_beside_one_tile():
  made = result('d', image_1={'rmse': [[30.0, 50.0]]}, image_9={'rmse': [[10.0, 30.0]]}, text_9={'rmse': [[9.0, 9.0]]})
  rows = report.table(made).splitlines()
  assert rows[2].endswith('40.00 [30.00, 50.00], 1.00 |') and rows[3].endswith(', 0.50 |')
  assert rows[4].endswith('9.00 [9.00, 9.00] |')


@pytest.mark.parametrize('change, named', (
    ({'settings': {'device': 'another'}}, 'has another device than'), ({'digest': 'another'}, 'of another training')))
def test_results_that_do_not_belong_together_are_refused(tmp_path, change, named):
  one = dict(claim='e', arm='before', seed=0, settings=dict(size='try', device='cpu'), digest='d', parameters=1,
             seconds=1.0, date='2026-11-27', values={'1-2/all': [True]})
  results.write(results.result_file(tmp_path, 'e', 'before', 0), one)
  results.write(results.result_file(tmp_path, 'e', 'before', 1), one | dict(seed=1))
  assert results.collect(tmp_path)['e']['arms']['before']['values'] == {'1-2/all': ['1', '1']}
  change = {name: one[name] | value if isinstance(value, dict) else value for name, value in change.items()}
  results.write(results.result_file(tmp_path, 'e', 'before', 1), one | dict(seed=1) | change)
  with pytest.raises(UserError, match=named):
    results.collect(tmp_path)


def test_the_page_is_what_the_report_makes_of_the_results():
  text, found = (ROOT / 'docs' / 'paper.md').read_text(), results.read(ROOT / 'docs')
  assert [claim for _, claim, _ in report.MARKED.findall(text)] == list(experiments.CLAIMS)
  assert report.page(text, found) == text, 'python -m unifusion_jax.scenes.claims.report --folder= writes it anew'
  assert all((ROOT / 'docs' / 'results' / f'{claim}.png').exists() for claim in found)
