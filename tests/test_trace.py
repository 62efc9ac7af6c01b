"""XProf traces: of the steps that were named, also in a run that goes on, and written when it ends before them."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unifusion_jax.training import trace


class Aside:
  """A meter that counts what it leaves out."""
  count = 0

  @contextlib.contextmanager
  def aside(self):
    self.count += 1
    yield


def traced(text, folder, done=0, steps=range(1, 9)):
  """(notes, asides) of a run of some steps."""
  notes, meter = [], Aside()
  double = jax.jit(lambda x: x + x)
  with contextlib.closing(trace.Trace(text, folder, done, meter, notes.append)) as made:
    for number in steps:
      with made.step(number):
        double(jnp.float32(number)).block_until_ready()
  return notes, meter.count


def numbers(folder, session) -> list[int]:
  """The steps that the one file of a session has."""
  (path,) = (folder / 'plugins' / 'profile' / session).glob('*.xplane.pb')
  return sorted(dict(event.stats)['step_num'] for plane in jax.profiler.ProfileData.from_file(str(path)).planes
                for line in plane.lines for event in line.events if event.name == 'train')


@pytest.mark.parametrize('text, named', [
    ('', range(0)), ('100:105', range(100, 105)), ('1:2', range(1, 2)), ('105:100', None), ('5:5', None),
    ('0:3', None), ('7', None), ('1:2:3', None), ('-1:3', None), ('a:b', None), ('1.5:3', None), (':', None),
    ('1:' + '9' * 20, None)])
def test_steps(text, named):
  assert trace.steps(text) == named


def test_the_stop_is_left_out(tmp_path, mesh):
  notes, asides = traced('3:5', tmp_path / 'profile')
  assert numbers(tmp_path / 'profile', 'steps_3_to_4') == [3, 4]
  assert notes == [f'traced steps 3 to 4: xprof --logdir={tmp_path / "profile"}']
  assert asides == 2  # neither the start nor the writing is in a rate


def test_a_run_that_goes_on_traces_what_is_left(tmp_path, mesh):
  notes, _ = traced('3:6', tmp_path, 4, range(5, 8))
  assert numbers(tmp_path, 'steps_5_to_5') == [5] and 'traced steps 5 to 5' in notes[0]
  notes, asides = traced('3:6', tmp_path / 'past', 5, range(6, 8))
  assert notes == ['train.profile=3:6: the run goes on after step 5, past these steps: nothing is traced']
  assert not asides and not (tmp_path / 'past').exists()


def test_a_run_that_ends_before_writes_what_it_has(tmp_path, mesh):
  notes, _ = traced('3:100', tmp_path)
  assert numbers(tmp_path, 'steps_3_to_99') == [3, 4, 5, 6, 7, 8] and 'traced steps 3 to 8' in notes[0]
  assert traced('', tmp_path / 'none') == ([], 0) and not (tmp_path / 'none').exists()
  assert traced('20:30', tmp_path / 'none') == ([], 0) and not (tmp_path / 'none').exists()


@pytest.mark.parametrize('hosts, session', [([1, 2], 'steps_1_to_1'), ([1, 1], 'steps_1_to_1_process_0')])
def test_hosts_share_a_session_and_processes_of_one_host_do_not(hosts, session, tmp_path, mesh, monkeypatch):
  monkeypatch.setattr(trace.sharding, 'tell_all', lambda row: np.array(hosts, row.dtype)[:, None])
  traced('1:2', tmp_path)
  assert numbers(tmp_path, session) == [1]
