"""The paper's claims on scenes: every training and measurement that is not there yet, in processes of their own.

  python -m unifusion_jax.scenes.claims.run --claims=a,b,c,d,e,f --seeds=3 --size=full             # one GPU, hours
  python -m unifusion_jax.scenes.claims.run --claims=e,f --size=reduced --minutes=120              # two CPU cores
  python -m unifusion_jax.scenes.claims.run --only=shipped_t2i,shipped_edit --size=reduced         # trains nothing
  python -m unifusion_jax.scenes.claims.run --plan                                                 # what it would do
  python -m unifusion_jax.scenes.claims.report                                                     # tables and plots

Run again with the same flags it goes on, also after a kill: a training from its checkpoint. All arms of one seed come
before those of the next, so what is there when the minutes are over can be compared. What docs/results has of the same
settings is not measured again, so a run goes on on another machine. A training and a result belong to the settings
that they were made with: of others they are refused. experiments.py has the table.
"""

from collections.abc import Sequence
from concurrent import futures
import dataclasses
import datetime
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

from absl import app, flags, logging
import jax

from unifusion_jax import command_line, errors, json_file, sharding
from unifusion_jax import config as configuration
from unifusion_jax.commands import export, train
from unifusion_jax.errors import UserError
from unifusion_jax.scenes.claims import experiments, results
from unifusion_jax.training import checkpoint

GRACE = 120  # seconds in which a training that is told to stop has saved


@dataclasses.dataclass(frozen=True)
class Job:
  """The training of a stage under a seed, if it trains, and the measurements of its arms: one process."""
  stage: str
  seed: int
  arms: tuple[tuple[str, str], ...] = dataclasses.field(default=(), compare=False)  # (claim, arm)

  @property
  def name(self) -> str:
    return f'{self.stage}_{self.seed}'

  @property
  def after(self) -> list[str]:
    """Names of the jobs that it needs the exports of."""
    return [f'{stage}_{self.seed}' for stage in experiments.STAGES[self.stage].after.values()]


def plan(claims: Sequence[str], seeds: int, size: experiments.Size, only: Sequence[str] = ()) -> list[Job]:
  """The jobs of these claims, in the order in which they start: by seed, then by claim; each stage once.

  only: stages that are measured, and trained with those before them; empty: all. UserError for one that none of the
    claims measures.
  """
  arms: dict[str, list] = {}
  for claim in claims:
    for name, arm in experiments.arms(claim, size).items():
      if only and arm.stage not in only:
        continue
      for stage in experiments.chain(arm.stage):
        arms.setdefault(stage, [])
      arms[arm.stage].append((claim, name))
  if idle := [stage for stage in only if not arms.get(stage)]:
    raise UserError(f'--only={",".join(idle)}: none of --claims={",".join(claims)} measures it at this size; --plan '
                    'without --only says what they measure')
  return [Job(stage, seed, tuple(each)) for seed in range(seeds) for stage, each in arms.items()]


def seconds(job: Job, size: experiments.Size) -> float:
  """Estimated seconds of a job that nothing is there of; an arm counts as two groups of examples."""
  kind = experiments.STAGES[job.stage].kind
  trained = size.steps[kind] * size.seconds[kind] if kind else 0.0
  return size.seconds['start'] + trained + len(job.arms) * 2 * size.examples * size.seconds['image']


def describe(jobs: Sequence[Job], size: experiments.Size) -> str:
  """The plan as text: stages with their steps, seeds, arms and estimated minutes, and the total."""
  lines = [f'{"stage":20} {"steps":>6} {"seeds":>5} {"min":>6}  measured as']
  for stage in dict.fromkeys(job.stage for job in jobs):
    same = [job for job in jobs if job.stage == stage]
    kind = experiments.STAGES[stage].kind
    arms = ', '.join(f'{claim}/{arm}' for claim, arm in same[0].arms) or '-'
    lines.append(f'{stage:20} {size.steps[kind] if kind else 0:6} {len(same):5} '
                 f'{sum(seconds(job, size) for job in same) / 60:6.1f}  {arms}')
  total = sum(seconds(job, size) for job in jobs)
  return '\n'.join([*lines, f'{len(jobs)} jobs, about {total / 3600:.1f} h one after another (an estimate)'])


def exported(job: Job, folder: pathlib.Path) -> bool:
  """Whether the job's training is over; what an export writes last is there then."""
  return not experiments.STAGES[job.stage].kind or (
      experiments.workdir(folder, job.stage, job.seed) / 'config_export.json').exists()


def remaining(jobs: Sequence[Job], folder: pathlib.Path, size: experiments.Size) -> list[Job]:
  """Jobs that have something to measure, or to train for one of these; in order.

  Results alone are enough: a folder that has lost its trainings goes on with the measurements that it lacks. Results
  of other settings than an arm has now are measured again.
  """
  wanted, needed = [], set()
  for job in reversed(jobs):  # what a job needs comes before it
    measured = all(results.is_measured(folder, *arm, job.seed, size) for arm in job.arms)
    if not measured or (job.name in needed and not exported(job, folder)):
      wanted.append(job)
      needed.update(job.after)
  return wanted[::-1]


def claim_folder(folder: pathlib.Path, size: str) -> None:
  """Writes what the folder's results have in common; UserError where it holds a run of other settings."""
  file, now = folder / 'settings.json', experiments.settings(size)
  folder.mkdir(parents=True, exist_ok=True)
  if not file.exists():
    results.write(file, now)
  elif (there := json.loads(file.read_text())) != now:
    changed = ', '.join(name for name in now if there.get(name) != now[name])
    raise UserError(f'{folder} holds a run with another {changed}: give another --folder, or remove that one')


def claim_stages(job: Job, folder: pathlib.Path, size: experiments.Size) -> None:
  """Writes the digest of what the job trains into its workdir, where nothing is trained yet.

  UserError where that workdir, or the one of a stage that it starts from, holds a training of other settings.
  """
  for stage in experiments.trains(job.stage):
    workdir, digest = experiments.workdir(folder, stage, job.seed), experiments.digest(stage, size)
    file = workdir / 'stage.json'
    there = json_file.read(file).get('digest') if file.exists() else None
    begun = any((workdir / name).exists() for name in ('checkpoints', 'export'))
    if there != digest and (there or begun):
      raise UserError(f'{workdir} holds a training of other settings (their digest is {there or "not known"}, that of '
                      f'this run {digest}): remove it, or give another --folder')
    if stage == job.stage and there is None:
      results.write(file, dict(digest=digest))


def device_kind() -> str:
  """Kind of this machine's devices, as jax names it in a process of its own: the jobs need them, not this one."""
  program = 'import jax; print(jax.devices()[0].device_kind)'
  done = subprocess.run([sys.executable, '-c', program], stdout=subprocess.PIPE, text=True, check=True)
  return done.stdout.splitlines()[-1]


def run(jobs: Sequence[Job], folder: pathlib.Path, size: experiments.Size, command: Sequence[str], at_once: int,
        minutes: float) -> list[str]:
  """Runs the remaining jobs, `at_once` at a time, until the minutes are over (0: all): names of those that failed.

  command: the program and flags of a job's process, without its --job. What needs the export of a failed job is left
  out.
  """
  left = remaining(jobs, folder, size)
  ready = {job.name for job in jobs if exported(job, folder)}
  end = time.monotonic() + 60 * minutes if minutes else math.inf
  environment = dict(os.environ)
  if at_once > 1:  # an accelerator's memory, of which each process takes its share at its start
    environment['XLA_PYTHON_CLIENT_MEM_FRACTION'] = f'{0.9 / at_once:.2f}'
  running: dict[futures.Future, tuple[Job, subprocess.Popen]] = {}
  (folder / 'logs').mkdir(exist_ok=True)
  failed = []
  with futures.ThreadPoolExecutor(at_once) as pool:
    try:
      while True:
        while len(running) < at_once and (job := next((job for job in left if ready.issuperset(job.after)), None)):
          left.remove(job)
          with (folder / 'logs' / f'{job.name}.txt').open('a') as log:
            process = subprocess.Popen([*command, f'--job={job.name}'], stdout=log, stderr=log, env=environment)
          running[pool.submit(process.wait)] = job, process
        if not running:
          return failed
        over, _ = futures.wait(running, max(end - time.monotonic(), 0) if minutes else None, futures.FIRST_COMPLETED)
        for future in over:
          job, _ = running.pop(future)
          if future.result():
            failed.append(job.name)
            print(f'{job.name}: FAILED, as {folder / "logs" / job.name}.txt says', flush=True)
          else:
            ready.add(job.name)
            print(f'{job.name}: done', flush=True)
        if time.monotonic() >= end:
          return failed
    finally:
      for _, process in running.values():
        process.send_signal(signal.SIGTERM)
      for _, process in running.values():
        try:
          process.wait(GRACE)
        except subprocess.TimeoutExpired:
          process.kill()


def work(job: Job, size_name: str, folder: pathlib.Path, cores: int) -> None:
  """Trains and exports a job's stage if that is not done, then measures its arms that are not measured yet.

  UserError where the folder has results of other settings or another kind of device, or another training of a stage.
  cores: for this job; on an accelerator all but one of them prepare batches, in processes.
  """
  size, common = experiments.SIZES[size_name], results.settings(size_name, jax.devices()[0].device_kind)
  results.check(folder, common)
  claim_stages(job, folder, size)
  config = experiments.config(job.stage, job.seed, size, folder)
  config.data.workers = size.scale.workers and max(1, cores - 1)
  workdir = experiments.workdir(folder, job.stage, job.seed)
  configuration.check(config, jax.device_count())
  with jax.set_mesh(sharding.make_mesh(config.mesh)):
    if not exported(job, folder):
      train.run(config, workdir)
      export.run(config, workdir)
    shutil.rmtree(workdir / 'checkpoints', ignore_errors=True)  # gigabytes, also what an earlier run left of them
    arms = [arm for arm in job.arms if not results.is_measured(folder, *arm, job.seed, size)]
    if not arms:
      return
    config.sample.weights = str(workdir / 'export') if experiments.STAGES[job.stage].kind else config.init
    params, _ = checkpoint.trained(config, workdir)
    pipe = config.objective.pipeline(config, params, config.objective.frozen(config))
    measured = []  # (arm, its values): some claims measure the same
    for claim, name in arms:
      arm, start = experiments.CLAIMS[claim].arms[name], time.monotonic()
      values = next((values for other, values in measured if other == arm), None)
      if values is None:
        values = arm.measure(pipe, size, job.seed, arm.settings, **arm.how)
        measured.append((arm, values))
      results.write(results.result_file(folder, claim, name, job.seed), dict(
          claim=claim, arm=name, seed=job.seed, settings=common, digest=experiments.digest(job.stage, size),
          measure=experiments.measured(arm), parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
          date=datetime.date.today().isoformat(), seconds=round(time.monotonic() - start, 1),
          devices=jax.device_count(), values=values))


def main(argv):
  del argv
  values, cores = flags.FLAGS, len(os.sched_getaffinity(0))
  size, folder = experiments.SIZES[values.size], pathlib.Path(values.folder)
  jobs = plan(experiments.named(values.claims), values.seeds, size, experiments.stages(values.only))
  if values.job:
    if 'JAX_NUM_CPU_DEVICES' not in os.environ:
      jax.config.update('jax_num_cpu_devices', 2 ** int(math.log2(max(1, min(cores // values.jobs, 8)))))
    jax.config.update('jax_compilation_cache_dir', os.path.abspath(os.path.join('.cache', 'jax')))
    (job,) = (job for job in jobs if job.name == values.job)
    return work(job, values.size, folder, cores // values.jobs)
  print(describe(jobs, size), flush=True)
  if values.plan:
    return None
  claim_folder(folder, values.size)
  if values.docs and results.read(pathlib.Path(values.docs)):
    if count := results.restore(pathlib.Path(values.docs), folder, values.size, device_kind()):
      print(f'{count} results are in {values.docs}/results already; --docs= measures them again', flush=True)
  signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))  # through `run`, which stops its processes
  command = [sys.executable, '-m', 'unifusion_jax.scenes.claims.run', *sys.argv[1:]]
  failed = run(jobs, folder, size, command, values.jobs, values.minutes)
  left = remaining(jobs, folder, size)
  print(f'{len(jobs) - len(left)} of {len(jobs)} jobs are done' + (
      '; the same command goes on with the others' if left else ''), flush=True)
  if failed:
    raise UserError(f'these jobs failed: {", ".join(failed)}; {folder / "logs"} says why, and the same command tries '
                    'them again')


if __name__ == '__main__':
  flags.DEFINE_list('claims', list(experiments.CLAIMS), 'Some of the claims, in the order in which they run.')
  flags.DEFINE_integer('seeds', 3, 'Seeds of every training and measurement, from 0.', lower_bound=1)
  flags.DEFINE_enum('size', 'full', list(experiments.SIZES), 'full: one GPU, hours; short: one GPU, minutes; '
                    'reduced: two CPU cores, overnight; try: two steps, to see it run.')
  flags.DEFINE(command_line.PathParser(), 'folder', 'runs/claims', 'Folder of trainings and results.')
  flags.DEFINE_list('only', [], 'Some of the stages that the plan names: only these are measured.')
  flags.DEFINE(command_line.PathParser(), 'docs', 'docs', 'Folder whose results/ are not measured again; empty: none.')
  flags.DEFINE_integer('jobs', 1, 'Processes at once, which share the cores, and the memory of an accelerator.',
                       lower_bound=1)
  flags.DEFINE_float('minutes', 0.0, 'Minutes after which all stops, trainings saved; 0: when all is done.',
                     lower_bound=0)
  flags.DEFINE_bool('plan', False, 'Print the plan and end.')
  flags.DEFINE_string('job', '', 'Run this job alone; for the processes that do so.')
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)
  with errors.at_the_terminal():
    app.run(main)
