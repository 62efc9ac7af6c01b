"""Requests: files of prompts, seeds, sizes and ranges, and what is said of those that cannot be."""

import math
import re

import numpy as np
import pytest

from unifusion_jax.data import buckets
from unifusion_jax.errors import UserError
from unifusion_jax.request import check_ranges, MAX_SIDE, prompt_lines, requests_for, SampleConfig, shape_like

ENDS_NO_LINE = 'a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g\rh'


@pytest.mark.parametrize('data, lines', [
    (b'one\ntwo\n', {1: 'one', 2: 'two'}), (b'one\r\n\r\n  two \r\n', {1: 'one', 3: 'two'}), (b'one', {'': 'one'}),
    (b'\xef\xbb\xbfone\ntwo', {1: 'one', 2: 'two'}), (b'\n \n', {}),
    (f'{ENDS_NO_LINE}\nnext'.encode(), {1: ENDS_NO_LINE, 2: 'next'})])
def test_lines_of_a_file(tmp_path, monkeypatch, data, lines):
  (tmp_path / 'prompts.txt').write_bytes(data)
  monkeypatch.setenv('HOME', str(tmp_path))
  for name in (f'{tmp_path}/prompts.txt', '~/prompts.txt'):
    assert prompt_lines(f'@{name}') == {f'{name}:{i}' if i else name: line for i, line in lines.items()}


def test_prompts_of_the_command_line():
  assert prompt_lines('make it blue') == {'sample.prompt': 'make it blue'} and prompt_lines('') == {}
  assert prompt_lines('one\n\ntwo') == {'sample.prompt:1': 'one', 'sample.prompt:3': 'two'}
  assert prompt_lines('@@home sign in red') == {'sample.prompt': '@home sign in red'}


@pytest.mark.parametrize('data, message', [
    ('ein grüner Stern'.encode('utf-16'), 'is UTF-16'), ('star'.encode('utf-16-be'), 'is UTF-16'),
    ('star\nein grüner Stern'.encode('latin-1'), ':2 holds the byte 0xfc, which is no UTF-8')])
def test_other_encodings_are_named(tmp_path, data, message):
  path = tmp_path / 'prompts.txt'
  path.write_bytes(data)
  with pytest.raises(UserError, match=re.escape(message)) as error:
    prompt_lines(f'@{path}')
  assert str(path) in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
  with pytest.raises(UserError, match='no file .*gone.txt.*with @@'):
    prompt_lines(f'@{tmp_path}/gone.txt')
  with pytest.raises(UserError, match='is a folder'):
    prompt_lines(f'@{tmp_path}')
  for name in ('x' * 300, '~nobody_of_this_name/x', 'a\udc80\x00'):
    with pytest.raises(UserError, match='no file|cannot be read'):
      prompt_lines(f'@{name}')


def test_seeds_count_on_beyond_any_word():
  requests = requests_for({'a:1': 'x', 'a:2': 'y'}, (), 2, 2 ** 63 - 1, files=())
  assert [request.seed for request in requests] == [2 ** 63 - 1 + i for i in range(4)]
  assert [request.place for request in requests] == ['a:1', 'a:1', 'a:2', 'a:2']
  for seed in (-1, 0, 2 ** 63, 10 ** 40):
    assert SampleConfig(seed=seed).problems() == []


@pytest.mark.parametrize('values, names', [
    (dict(guidance=math.nan), ['guidance']), (dict(guidance=math.inf), ['guidance']), (dict(shift=-1.0), ['shift']),
    (dict(steps=10 ** 9), ['steps']), (dict(temperature=math.nan, tiles=-1), ['tiles', 'temperature']),
    (dict(top_p=0.0), ['top_p']), (dict(width=-8), ['width']), (dict(height=2 ** 40), ['height']),
    (dict(batch_size=0, num_images=0), ['num_images', 'batch_size']), (dict(eta=1.1), ['eta'])])
def test_every_number_has_a_range(values, names):
  problems = ' '.join(SampleConfig(**values).problems(8))
  assert all(f'sample.{name}={values[name]} must be' in problems for name in names)
  assert problems.count('must be') == len(names)


def test_numbers_of_numpy_are_those_of_json():
  s = SampleConfig().changed(guidance=np.float32(1.5), seed=np.int64(3), eta=0)
  assert type(s.guidance) is float and type(s.seed) is int


def test_arguments_of_phases_have_ranges():
  check_ranges(t=0.5, start=1.0, guidance=-2.0)
  with pytest.raises(UserError, match='t=1.5 must be between 0 and 1; start=nan must be'):
    check_ranges(t=1.5, start=math.nan)


def image(height, width):
  return np.zeros((height, width, 3), np.uint8)


@pytest.mark.parametrize('size, unit', [(64, 8), (512, 16), (1024, 16)])
def test_an_image_has_its_reference_s_proportions(size, unit):
  """No pair of sides of about that area is nearer, and squares stay squares."""
  assert shape_like(None, size, unit) == shape_like(image(30, 30), size, unit) == (size, size)
  for height, width in ((80, 100), (30, 50), (9, 16), (400, 300), (700, 100)):
    sides = shape_like(image(height, width), size, unit)
    error = lambda y, x: abs(math.log(x / y * height / width))
    least, most = math.prod(sides) / unit ** 2, size ** 2 // unit ** 2
    others = [error(y, x) for y in range(1, most + 1) for x in range(1, most // y + 1) if y * x >= least]
    assert sides[0] % unit == sides[1] % unit == 0 and size ** 2 / 2 < math.prod(sides) <= size ** 2
    assert error(*sides) <= min(others) + 1e-9
  assert shape_like(image(80, 100), 512, 16) == (448, 560)


def test_one_side_brings_the_other():
  assert shape_like(image(30, 50), 64, 8, height=80) == (80, 136) and shape_like(None, 64, 8, width=32) == (32, 32)
  assert shape_like(image(30, 50), 64, 8, 32, 40) == (32, 40)
  assert shape_like(image(1000, 1), 64, 8)[1] == 8


def test_sizes_are_bounded_and_the_arithmetic_is_said():
  with pytest.raises(UserError, match=f'64x64000 pixels like the first reference of 1x1000: 8x8000 .*{MAX_SIDE}'):
    shape_like(image(1000, 1), 64, 8, width=64)
  with pytest.raises(UserError, match='8192x8192 pixels: 1024x1024 latent patches'):
    shape_like(image(1000, 1), 64, 8, 8192, 8192)
  with pytest.raises(UserError, match='size=1000000000 ask for'):
    shape_like(None, 10 ** 9, 8)


def test_buckets_and_samples_have_one_rule():
  assert buckets.canvases(('5:4',), 512, 16)[0] == shape_like(image(80, 100), 512, 16)
