"""The 8B recipes: three stages, each from the weights of the one before, on canvases of the same proportions."""

import dataclasses
import itertools
import json

import numpy as np
from PIL import Image
import pytest

from unifusion_jax import command_line, main
from unifusion_jax.data import buckets, loader, transforms

STAGES = ('8b_256', '8b_512', '8b')
SIZES = (256, 512, 1024)


def stages(name):
  return [command_line.read(f'{name}:{scale}') for scale in STAGES]


@pytest.mark.parametrize('name, first', [('t2i', None), ('edit', 't2i:8b')])
def test_each_stage_starts_from_the_export_of_the_one_before(name, first):
  before = (first, *(f'{name}:{scale}' for scale in STAGES))
  for config, previous in zip(stages(name), before):
    assert config.init == (previous and str(main.default_workdir(previous) / 'export'))
    # written once, by the first stage in its own workdir, for the tiles and budgets that all stages have
    assert config.data.rewrites == str(main.default_workdir(f'{name}:{STAGES[0]}') / 'rewrites')


def test_stages_have_workdirs_of_their_own():
  folders = {main.default_workdir(recipe) for recipe in (*(f'{name}:{scale}' for name in ('t2i', 'edit')
                                                           for scale in STAGES), 't2i', 'edit', 'configs/vlm.py:tower')}
  assert len(folders) == 9 and {str(folder) for folder in folders} >= {'runs/t2i', 'runs/t2i_8b', 'runs/vlm_tower'}


@pytest.mark.parametrize('name', ['t2i', 'edit'])
def test_stages_are_one_training(name):
  """What the weights, the rewrites and the buckets of a stage depend on is the same in all; the size grows."""
  made = stages(name)
  for a, b in itertools.pairwise(made):
    assert (a.model, a.vlm, a.vae, a.taps, a.system) == (b.model, b.vlm, b.vae, b.taps, b.system)
    alike = dataclasses.replace(a.data, size=b.data.size, unit=b.data.unit, batch_size=b.data.batch_size)
    assert alike == b.data
    assert a.data.size < b.data.size and a.objective.shift < b.objective.shift
    assert a.optim.learning_rate >= b.optim.learning_rate
  assert tuple(config.data.size for config in made) == SIZES
  assert [config.objective.shift for config in made] == [2, 3, 4]
  images = sum(config.train.steps * config.data.batch_size for config in made)
  assert images < 1e9 and made[-1].train.steps == (95_000 if name == 't2i' else 11_000)


@pytest.mark.parametrize('name', ['t2i', 'edit'])
def test_one_example_a_chip_at_a_time(name):
  for config in stages(name):
    data, fsdp, tp = config.mesh.shape(config.devices)
    assert (data, fsdp, tp) == (1, 256, 1)
    assert config.data.batch_size == config.devices * config.optim.accumulate
    assert config.rewrite.batch_size % config.devices == 0


@pytest.mark.parametrize('size', SIZES)
def test_the_canvases_of_photographs(size):
  (config,) = (config for config in stages('t2i') if config.data.size == size)
  sizes, unit = config.data.canvases, config.data.unit
  assert len(set(sizes)) == len(buckets.PHOTOGRAPHS) == 9
  for height, width in sizes:
    assert height % unit == width % unit == unit % config.objective.unit(config) == 0
    assert 0.93 * size ** 2 <= height * width <= size ** 2
    assert height % (size // 16) == width % (size // 16) == 0  # of the same grid at every stage
    assert (width, height) in sizes
  ratios = [width / height for height, width in sizes]
  assert ratios == sorted(ratios, reverse=True) and ratios[0] > 21 / 9 and ratios[4] == 1
  for wide, narrow in itertools.pairwise(ratios):
    assert (wide / narrow) ** 0.5 < 1.25  # the most that is cut away, between two canvases, is a fifth
  if size == 1024:
    assert sizes[:5] == ((640, 1536), (768, 1344), (832, 1216), (896, 1152), (1024, 1024))  # SDXL's


@pytest.mark.parametrize('pixels, canvas', [
    ((2160, 3840), (768, 1344)), ((4000, 6000), (832, 1216)), ((3024, 4032), (896, 1152)), ((1080, 1080), (1024, 1024)),
    ((4032, 3024), (1152, 896)), ((1920, 1080), (1344, 768)), ((1440, 3440), (640, 1536)), ((100, 5000), (640, 1536))])
def test_common_photographs_find_their_canvas(pixels, canvas):
  sizes = command_line.read('t2i:8b').data.canvases
  assert sizes[buckets.nearest(sizes, *pixels)] == canvas


def test_batches_of_photographs(tmp_path):
  """Nine canvases: every batch has one of them, and each comes as often as its images do."""
  data = dataclasses.replace(command_line.read('t2i:8b').data, path=str(tmp_path / 'list.jsonl'), size=64, unit=4,
                             tiles=(1,), rewrites=None, only='t2i', batch_size=4)
  rows = []
  for i, (height, width) in enumerate(data.canvases * 4):
    Image.new('RGB', (2 * width + 3, 2 * height), (i, 0, 0)).save(tmp_path / f'{i}.png')
    rows.append(dict(references=[], instruction='', target=f'{i}.png', caption='x'))
  (tmp_path / 'list.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  batches = itertools.islice(loader.batches(loader.mix(data), transforms.TargetOnly(), 4), 36)
  shapes = [batch['target'].shape[1:3] for batch in batches]
  assert sorted(shapes) == sorted(data.canvases * 4)
  assert all(np.prod(shape) <= 64 ** 2 for shape in shapes)
