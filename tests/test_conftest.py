"""Which tests run: those marked slow where they are asked for or named, and all in continuous integration."""

import pathlib
import types

import conftest
import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize('options, arguments, left', [
    ({}, ['tests'], ['fast']), ({}, ['tests/test_x.py'], ['fast']), (dict(slow=True), ['tests'], ['fast', 'slow']),
    (dict(keyword='x'), ['tests'], ['fast', 'slow']), ({}, ['tests/test_x.py::slow'], ['fast', 'slow'])])
def test_slow_tests_run_where_asked_for_or_named(options, arguments, left):
  test = lambda name: types.SimpleNamespace(
      name=name, path=ROOT / 'tests' / 'test_x.py', get_closest_marker=lambda mark: mark if mark == name else None)
  items, gone = [test('fast'), test('slow')], []
  config = types.SimpleNamespace(getoption=options.get, args=arguments,
                                 hook=types.SimpleNamespace(pytest_deselected=lambda items: gone.extend(items)))
  conftest.pytest_collection_modifyitems(config, items)
  assert [item.name for item in items] == left and len(items) + len(gone) == 2


def test_continuous_integration_runs_them_all():
  assert (ROOT / '.ci' / 'run').read_text().endswith('launch/test.sh" --slow\n')
