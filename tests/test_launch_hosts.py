"""The launch scripts of hosts, Slurm and GPU boxes, with stubs in the place of the training and of other commands; the
manifests for GKE and the image; the commands of docs/scale.md."""

import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import time

import pytest
from test_launch import ROOT, STUB, Stubs
import yaml


@pytest.fixture
def stubs(tmp_path):
  return Stubs(tmp_path)


# ---------------------------------------------------------------------------------------------------------- on a host
def written(file: pathlib.Path) -> str:
  """A file's text, once it is there."""
  for _ in range(500):
    if file.exists() and (text := file.read_text()):
      return text
    time.sleep(0.01)
  raise TimeoutError(file)


def test_a_host_installs_python_312(stubs):
  """With uv, fetched where it is not there, and jax for TPUs."""
  stubs.add('curl', '#!/bin/sh\necho "$*" >>"$STUB/commands"; cat "$STUB/uv"\n')
  (stubs.folder / 'stub' / 'uv').write_text(
      'mkdir -p ~/.local/bin; cat >~/.local/bin/uv <<"E"\n#!/bin/sh\necho "uv $*" >>"$STUB/commands"\n'
      'mkdir -p .venv/bin; cat >.venv/bin/python <<"P"\n#!/bin/sh\necho "python $*" >>"$STUB/commands"\nP\n'
      'chmod +x .venv/bin/python\nE\nchmod +x ~/.local/bin/uv\n')
  stubs.add('sudo', '#!/bin/sh\nexit 1\n')
  for _ in range(2):
    done = stubs.run('host.sh', 'install')
    assert done.returncode == 0 and 'ready' in done.stdout, done.stderr
  said = (stubs.folder / 'stub' / 'commands').read_text()
  assert said.count('astral.sh/uv/0.') == said.count('uv venv') == 1 and '--python 3.12' in said
  assert said.count('jax[tpu]') == 1 and '--requirement=requirements.txt' in said


def test_a_host_restarts_after_a_preemption(stubs):
  stubs.add('.venv/bin/python', '#!/bin/sh\necho "$A $*"; echo x >>tries; [ "$(wc -l <tries)" -ge 3 ] || exit 143\n')
  (stubs.root / 'run.env').write_text('A=1\n')
  assert stubs.run('host.sh', 'start', '--restart', '--workdir=/w').returncode == 0
  assert written(stubs.root / 'run.code') == '0\n'
  log = (stubs.root / 'run.log').read_text()
  assert log.count('1 -m unifusion_jax.main --workdir=/w') == 3
  assert log.count('exit code 143; the same command again') == 2
  assert 'ended with exit code 0' in stubs.run('host.sh', 'status').stdout
  assert 'exit code 143' in stubs.run('host.sh', 'logs').stdout


def test_a_host_stops_and_is_not_restarted(stubs):
  stubs.add('.venv/bin/python', '#!/bin/bash\ntrap "exit 143" TERM\necho up >up; while :; do sleep 0.02; done\n')
  stubs.run('host.sh', 'start', '--restart', '--workdir=/w')
  written(stubs.root / 'up')
  assert 'training runs here already' in stubs.run('host.sh', 'start', '--workdir=/w').stderr
  assert stubs.run('host.sh', 'idle').returncode == 1 and 'training runs' in stubs.run('host.sh', 'status').stdout
  assert 'SIGTERM sent' in stubs.run('host.sh', 'stop').stdout
  assert written(stubs.root / 'run.code') == '143\n'
  assert stubs.run('host.sh', 'idle').returncode == 0


def test_the_notice_of_a_preemption_is_passed_on(stubs):
  """Asked once, then waited for; what is saved is not started again on a machine that goes."""
  stubs.add('curl', """#!/bin/bash
echo "$*" >>"$STUB/commands"
case $* in *wait_for_change*) until [ -e up ]; do sleep 0.02; done; echo TRUE ;; *) echo FALSE ;; esac
""")
  stubs.add('.venv/bin/python', '#!/bin/bash\ntrap "exit 143" TERM\necho up >up; while :; do sleep 0.02; done\n')
  stubs.run('host.sh', 'start', '--restart', '--workdir=/w')
  assert written(stubs.root / 'run.code') == '143\n'
  asked = (stubs.folder / 'stub' / 'commands').read_text().splitlines()
  assert len(asked) == 2 and all('Metadata-Flavor: Google' in line and 'instance/preempted' in line for line in asked)
  log = (stubs.root / 'run.log').read_text()
  assert 'this machine is preempted' in log and 'the same command again' not in log


def test_a_run_is_once_without_restart(stubs):
  stubs.add('.venv/bin/python', '#!/bin/sh\nexit 143\n')
  stubs.run('host.sh', 'start', '--workdir=gs://bucket/run')
  assert written(stubs.root / 'run.code') == '143\n'
  assert 'started' not in (stubs.root / 'run.log').read_text()


def again(stubs, script: str, **variables) -> subprocess.CompletedProcess:
  (stubs.root / 'train.sh').write_text(script)
  return subprocess.run(['bash', '-euc', 'source launch/restart.sh; again bash train.sh'], cwd=stubs.root, text=True,
                        capture_output=True, timeout=60, env=stubs.environment | variables)


def test_crashes_in_a_row_end_it(stubs):
  """Three that come soon after their start; a crash of a run that had worked, and preemptions, are gone on from."""
  done = again(stubs, 'echo x >>tries; exit 1')
  assert done.returncode == 1 and 'third time' in done.stderr
  assert (stubs.root / 'tries').read_text().count('x') == 3
  done = again(stubs, 'echo x >>more; [ "$(wc -l <more)" -ge 7 ] || exit 134', RESTART_QUICK='0')
  assert done.returncode == 0
  done = again(stubs, 'echo x >>mixed; case $(wc -l <mixed) in 3|6) exit 143 ;; 8) exit 0 ;; *) exit 1 ;; esac')
  assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------- Slurm and GPUs
SRUN = '#!/bin/bash\necho "srun $*" >>"$STUB/commands"\n'


def slurm(stubs, srun: str, *arguments: str, **variables) -> subprocess.Popen:
  stubs.add('srun', SRUN + srun)
  stubs.add('scontrol', STUB)
  stubs.add('.venv/bin/python', '#!/bin/sh\n')
  job = dict(SLURM_JOB_ID='7', SLURM_SUBMIT_DIR=str(stubs.root), SLURM_NTASKS_PER_NODE='8', SLURM_GPUS_ON_NODE='8')
  spool = shutil.copy(stubs.root / 'launch' / 'slurm.sh', stubs.folder / 'script')
  return subprocess.Popen(['bash', spool, *arguments], cwd='/', text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=stubs.environment | job | variables)


def test_a_preempted_slurm_job_saves_and_is_queued_again(stubs):
  job = slurm(stubs, 'trap "sleep 0.1; exit 143" TERM\necho up >up; while :; do sleep 0.02; done\n', '--config=c')
  written(stubs.root / 'up')
  job.send_signal(signal.SIGTERM)
  assert job.wait(timeout=30) == 143 and 'exit code 143' in job.stdout.read()
  srun, requeue = stubs.commands()
  assert srun.endswith('.venv/bin/python -m unifusion_jax.main --distributed --config=c')
  assert requeue == 'scontrol requeue 7'


@pytest.mark.parametrize('code', [0, 1, 143])
def test_a_slurm_job_that_ends_by_itself_is_over(stubs, code):
  job = slurm(stubs, f'exit {code}\n', '--config=c')
  assert job.wait(timeout=30) == code and len(stubs.commands()) == 1


@pytest.mark.parametrize('variables,words', [
    (dict(SLURM_NTASKS_PER_NODE='1'), '--ntasks-per-node=8 --gpus-per-node=8'),
    (dict(SLURM_JOB_ID=''), 'sbatch launch/'), (dict(SLURM_SUBMIT_DIR='/'), 'is not the repository')])
def test_what_slurm_cannot_mean(stubs, variables, words):
  job = slurm(stubs, '', '--config=c', **variables)
  assert job.wait(timeout=30) == 1 and words in job.stdout.read()


def test_slurm_asks_for_the_signal():
  head = (ROOT / 'launch' / 'slurm.sh').read_text()
  for line in ('--signal=B:TERM@120', '--requeue', '--open-mode=append', '--gpus-per-node=8', '--ntasks-per-node=8'):
    assert f'\n#SBATCH {line}\n' in head


@pytest.mark.parametrize('driver,seen,words', [('580.65.06', 2, ''), ('535.183.01', 2, '580 or newer'),
                                               ('590.1', 1, 'lists 2 GPUs and jax sees 1')])
def test_a_gpu_box_is_checked_first(stubs, driver, seen, words):
  stubs.add('nvidia-smi', f'#!/bin/sh\ncase "$*" in *driver*) echo {driver}; echo {driver} ;; '
                          '-L) echo GPU 0; echo GPU 1 ;; esac\n')
  stubs.add('.venv/bin/python', f'#!/bin/sh\ncase "$*" in *jax.devices*) echo {seen} ;; '
                                '*main*) echo "trains $*" ;; esac\n')
  done = stubs.run('gpu.sh', '--config=c', CUDA_VISIBLE_DEVICES='')
  assert (words in done.stderr if words else 'trains -m unifusion_jax.main --config=c' in done.stdout), done
  assert (done.returncode == 1) == bool(words)


# ------------------------------------------------------------------------------------------------------- Kubernetes
def manifest(stubs, *arguments: str, **more) -> list[dict]:
  done = stubs.run('gke/submit.sh', 'edit', '--image=r/unifusion_jax:tpu', '--workdir=gs://bucket/run', *arguments,
                   '--dry-run', **more)
  assert done.returncode == 0, done.stderr
  return list(yaml.safe_load_all(done.stdout))


@pytest.mark.parametrize('topology,hosts,chips_a_host,label,shape', [
    ('v5e:16', 4, 4, 'tpu-v5-lite-podslice', '4x4'), ('v6e:8', 1, 8, 'tpu-v6e-slice', '2x4'),
    ('v5p:4x4x4', 16, 4, 'tpu-v5p-slice', '4x4x4'), ('tpu7x:16', 4, 4, 'tpu7x', '2x2x4')])
def test_manifest_of_a_slice(stubs, topology, hosts, chips_a_host, label, shape):
  words = ['--config=configs/edit.py:8b', '--config.sample.prompt=a "b" \\c ${NAME} $x & d']
  (jobset,) = manifest(stubs, f'--topology={topology}', *words, '--env=A=b c')
  assert jobset['kind'] == 'JobSet' and jobset['apiVersion'] == 'jobset.x-k8s.io/v1alpha2'
  (job,) = (each['template']['spec'] for each in jobset['spec']['replicatedJobs'])
  assert job['parallelism'] == job['completions'] == hosts and job['backoffLimit'] == 0
  pod = job['template']['spec']
  assert pod['nodeSelector'] == {'cloud.google.com/gke-tpu-accelerator': label,
                                 'cloud.google.com/gke-tpu-topology': shape}
  (container,) = pod['containers']
  assert container['resources']['limits'] == {'google.com/tpu': chips_a_host}
  assert container['args'] == ['--workdir=gs://bucket/run', *['--distributed'] * (hosts > 1), *words]
  assert container['env'] == [{'name': 'A', 'value': 'b c'}]


@pytest.mark.parametrize('arguments', [['--topology=v6e:4x4'], ['--gpus=nvidia-h100-80gb:8', '--nodes=2']],
                         ids=['tpu', 'gpu'])
def test_manifests_restart(stubs, arguments):
  """A node that was taken and a run that saved restart the set without counting; other ends are counted."""
  jobset = manifest(stubs, *arguments, '--restarts=7', '--spot')[-1]
  policy = jobset['spec']['failurePolicy']
  assert policy['maxRestarts'] == 7 and policy['rules'] == [
      {'name': 'preempted', 'action': 'RestartJobSetAndIgnoreMaxRestarts', 'onJobFailureReasons': ['PodFailurePolicy']}]
  job = jobset['spec']['replicatedJobs'][0]['template']['spec']
  pod = job['template']['spec']
  codes = [rule.get('onExitCodes') for rule in job['podFailurePolicy']['rules']]
  assert {'containerName': pod['containers'][0]['name'], 'operator': 'In', 'values': [143]} in codes
  assert [{'type': 'DisruptionTarget'}] in [rule.get('onPodConditions') for rule in job['podFailurePolicy']['rules']]
  assert pod['restartPolicy'] == 'Never' and pod['terminationGracePeriodSeconds'] >= 60
  assert pod['nodeSelector']['cloud.google.com/gke-spot'] == 'true'


def test_manifest_of_gpus(stubs):
  """And the account by which jax asks Kubernetes for the other pods."""
  account, role, binding, jobset = manifest(stubs, '--gpus=nvidia-h100-80gb:8', '--nodes=2', '--config=c')
  job = jobset['spec']['replicatedJobs'][0]['template']['spec']
  assert job['completionMode'] == 'Indexed' and job['parallelism'] == 2
  pod = job['template']['spec']
  assert pod['serviceAccountName'] == account['metadata']['name'] == binding['subjects'][0]['name']
  assert binding['roleRef']['name'] == role['metadata']['name']
  assert {resource for rule in role['rules'] for resource in rule['resources']} == {'pods', 'services', 'jobs'}
  (container,) = pod['containers']
  assert container['resources']['limits'] == {'nvidia.com/gpu': 8} and '--distributed' in container['args']
  assert container['volumeMounts'][0]['mountPath'] == '/dev/shm'


def test_submit_asks_and_applies(stubs):
  words = ('edit', '--topology=v6e:4x4', '--image=r/i:t', '--workdir=gs://b/r', '--config=c')
  stubs.rule('current-context', 'cluster')
  done = stubs.run('gke/submit.sh', *words, answer='n\n')
  assert done.returncode == 1 and 'nothing was done' in done.stderr and not (stubs.folder / 'stub/applied').exists()
  done = stubs.run('gke/submit.sh', *words, answer='y\n')
  assert done.returncode == 0
  assert yaml.safe_load((stubs.folder / 'stub' / 'applied').read_text())['metadata']['name'] == 'edit'
  for wrong, sentence in (('--topology=v6e:5', 'no such slice'), ('--gpus=h100', 'wanted is either'),
                          ('--restarts=-1', 'whole number'), ('--workdir=runs', 'gs://'), ('--env=A', 'NAME=VALUE')):
    assert sentence in stubs.run('gke/submit.sh', *words, wrong, '--dry-run').stderr


def test_the_image():
  text = (ROOT / 'launch' / 'Dockerfile').read_text()
  (base,) = re.findall(r'^FROM (\S+)', text, re.M)
  assert base.startswith('python:3.12') and re.search(r'^ARG DEVICE=tpu$', text, re.M)
  assert '"jax[$DEVICE,k8s]"' in text and 'ENTRYPOINT ["python", "-m", "unifusion_jax.main"]' in text
  assert {'.git', '.venv', '.cache', 'runs'} <= set((ROOT / '.dockerignore').read_text().split())


# -------------------------------------------------------------------------------------------------------------- docs
def documented() -> list[list[str]]:
  pages = [ROOT / 'docs' / 'scale.md', ROOT / 'launch' / 'README.md']
  blocks = [block for page in pages for block in re.findall(r'```bash\n(.*?)```', page.read_text(), re.S)]
  lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
  return [shlex.split(line, comments=True) for line in lines if line.startswith('bash launch/')]


def test_documented_commands_run_dry(stubs):
  """In the order of the page, each slice known from the create before."""
  told, tried = {}, 0
  for words in documented():
    script, *arguments = words[1:]
    if script == 'launch/tpu.sh':
      verb, name, *more = arguments
      told[name] = more if verb == 'create' else told[name]
      stubs.made(verb, name, *(told[name] if verb != 'create' else []), '--dry-run', *more)
    elif script == 'launch/gke/submit.sh':
      assert stubs.run('gke/submit.sh', *arguments, '--dry-run').returncode == 0
    tried += 1
  assert tried >= 10
