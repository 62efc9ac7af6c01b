"""Ranges of settings."""

import dataclasses

import pytest

from unifusion_jax import ranges
from unifusion_jax.ranges import Range


@dataclasses.dataclass
class Settings:
  share: float = 0.5
  sizes: tuple[int, ...] = (1, 2)


def test_values_in_range_give_no_sentence():
  assert ranges.problems(Settings(), 'x.', share=Range(0, 1), sizes=Range(1)) == []
  assert ranges.problems(Settings(share=1, sizes=()), 'x.', share=Range(0, 1), sizes=Range(1)) == []


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf'), 1.5, -0.1])
def test_a_value_out_of_range_is_named(value):
  assert ranges.problems(Settings(share=value), 'x.', share=Range(0, 1)) == [
      f'x.share={value} must be between 0 and 1']


def test_an_open_bound_and_the_items_of_a_tuple():
  assert ranges.problems(Settings(share=0), '', share=Range(above=0)) == ['share=0 must be above 0']
  assert ranges.problems(Settings(share=2), '', share=Range(above=0, most=1)) == [
      'share=2 must be above 0 and at most 1']
  assert ranges.problems(Settings(sizes=(3, 0)), '', sizes=Range(1)) == ['sizes=(3, 0) must be 1 or more']
  assert ranges.problems(Settings(share=float('nan')), '', share=Range()) == ['share=nan must be a finite number']


def test_whole_numbers_beyond_floats():
  assert ranges.problems(Settings(share=10 ** 400), '', share=Range(0, 1)) == [
      f'share={10 ** 400} must be between 0 and 1']
