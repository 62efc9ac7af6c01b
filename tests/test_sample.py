"""Sampling from the command line: what is checked first, files that nobody overwrites, and metadata that is enough."""

import dataclasses
import gc
import json
import pathlib
import threading
import weakref

import jax
import numpy as np
from PIL import Image
import pytest
from test_pipeline import REFERENCES, requests, same

from unifusion_jax import description, pipeline, prompting, sharding
from unifusion_jax.commands import sample
from unifusion_jax.data import imaging
from unifusion_jax.errors import UserError
from unifusion_jax.models import unifusion
from unifusion_jax.pipeline import UniFusionPipeline
from unifusion_jax.request import Request, requests_for, SampleConfig

LONG = 'red ' * 200


def with_settings(pipe, **changes):
  return UniFusionPipeline(pipe.model, pipe.frozen, pipe.prompt_encoder, dataclasses.replace(pipe.settings, **changes))


# Requests


def test_requests_from_the_command_line(tmp_path):
  path = tmp_path / 'wide.png'
  Image.new('RGB', (100, 60), 'red').save(path)
  settings = SampleConfig(prompt='make it blue\n\nmake it green', references=(str(path),), num_images=2, seed=5)
  asked, *size = sample.requests(settings, 64, 8)
  assert size == [48, 80] and [(r.instruction, r.seed) for r in asked] == [
      ('make it blue', 5), ('make it blue', 6), ('make it green', 7), ('make it green', 8)]
  assert asked[2].place == 'sample.prompt:3' and asked[0].files == (str(path),)
  (tmp_path / 'prompts.txt').write_text('one\ntwo\n')
  settings = SampleConfig(prompt=f'@{tmp_path}/prompts.txt', width=96, height=32)
  asked, *size = sample.requests(settings, 64, 8)
  assert size == [32, 96] and [r.instruction for r in asked] == ['one', 'two']
  with pytest.raises(UserError, match='nothing to sample'):
    sample.requests(SampleConfig(), 64, 8)
  (tmp_path / 'broken.png').write_bytes(b'no image')
  with pytest.raises(UserError, match='broken.png'):
    sample.requests(SampleConfig(prompt='x', references=(str(tmp_path / 'broken.png'),)), 64, 8)


@pytest.mark.parametrize('changes, lines', [
    (dict(), [2, 4]), (dict(verifi=False), [2, 4]), (dict(rewrite=LONG), [1, 2, 3, 4]), (dict(num_images=3), [2, 4])])
def test_every_line_is_checked_before_anything_is_loaded(recipe, tmp_path, changes, lines):
  """There are no weights here, which is found only after the requests are."""
  path = tmp_path / 'prompts.txt'
  path.write_text(f'a red circle\n{LONG}\na green star\n{LONG}\n')
  settings = recipe(sample=SampleConfig(prompt=f'@{path}', batch_size=2, **changes))
  with pytest.raises(UserError, match=f'{len(lines)} of 4 requests') as error:
    sample.run(settings, tmp_path / 'run')
  assert [int(line.split(':')[1]) for line in str(error.value).splitlines()[1:]] == lines
  assert 'does not fit' in str(error.value) and not (tmp_path / 'run').exists()
  path.write_text('a red circle\n')
  with pytest.raises(UserError, match='does not fit' if 'rewrite' in changes else 'names no weights'):
    sample.run(settings, tmp_path / 'run')


@pytest.mark.parametrize('changes, message', [
    (dict(prompt='x', system='faithfull'), "did you mean 'faithful'"), (dict(prompt='a\udce9'), 'lone surrogate'),
    (dict(prompt='x', system=LONG * 3), 'more than the 512 positions'),
    (dict(prompt='x', width=64, height=2 ** 15), '8x4096 latent patches')])
def test_what_else_is_found_before_loading(recipe, tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    sample.run(recipe(sample=SampleConfig(**changes)), tmp_path / 'run')


def test_a_call_checks_all_its_prompts_first(pipe):
  calls = []
  with pytest.raises(UserError, match='2 of 4 requests') as error:
    pipe(['x', LONG, 'y', LONG], batch_size=1, callback=lambda *step: calls.append(step))
  assert [line.split(':')[0].strip() for line in str(error.value).splitlines()[1:]] == ['prompt 2', 'prompt 4']
  assert not calls


def test_a_long_list_of_wrong_requests_is_cut_short(pipe):
  asked = requests_for({f'p:{i}': LONG for i in range(100)}, tuple(REFERENCES[:1]))
  with pytest.raises(UserError, match='100 of 100') as error:
    prompting.check(pipe.prompt_encoder, asked, pipe.settings, 512)
  assert len(str(error.value).splitlines()) < 30 and 'and 80 more' in str(error.value)


# Seeds


def test_any_whole_number_is_a_seed(pipe):
  """Those of today's images stay; every other one has noise of its own, and new noise between steps."""
  seeds = [0, 1, -1, 2 ** 32, 2 ** 63 - 1, 2 ** 63, -2 ** 63, 10 ** 30]
  noise = np.asarray(pipe.noise(seeds, 64, 64))
  for i in (0, 1, 3):
    np.testing.assert_array_equal(noise[i], np.random.default_rng(seeds[i]).standard_normal((8, 8, 4), np.float32))
  assert len({row.tobytes() for row in noise}) == len(seeds)
  result = pipe('x', rewrite='x', seed=2 ** 63 - 1, num_images=2, eta=1.0)
  assert [made['seed'] for made in result.metadata] == [2 ** 63 - 1, 2 ** 63]
  alone = pipe('x', rewrite='x', seed=2 ** 63, eta=1.0)
  same(alone.arrays[0], result.arrays[1])
  assert (result.arrays[0] != result.arrays[1]).any()


# Numbers that are none


@pytest.mark.parametrize('part, message', [
    ('vlm', r'conditioning came out .* the VLM \(reader\)'), ('model', r'latents .* the transformer \(painter\)'),
    ('vae', r'pixels .* the autoencoder \(in use\)')])
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_weights_that_are_no_numbers_make_no_image(pipe, part, message, value):
  def damaged(tree, part=''):
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x * np.float32(value) if part in jax.tree_util.keystr(path) else x, tree)
  model, frozen = pipe.model, pipe.frozen
  if part == 'model':
    model = damaged(model, 'dit')
  else:
    frozen = dataclasses.replace(frozen, **{part: damaged(getattr(frozen, part))})
  broken = UniFusionPipeline(model, frozen, pipe.prompt_encoder, pipe.settings,
                             origin=dict(vlm=dict(name='reader'), model=dict(name='painter')))
  with pytest.raises(UserError, match=message):
    broken.generate(requests(1, rewrite='x'), 64, 64)


@pytest.mark.parametrize('call', [
    lambda pipe, z: pipe.add_noise([REFERENCES[0]], z, 1.5), lambda pipe, z: pipe.times(64, 64, steps=0),
    lambda pipe, z: pipe.times(64, 64, start=np.nan), lambda pipe, z: pipe.denoise(None, z, None, guidance=np.nan),
    lambda pipe, z: pipe.denoise(None, z, None, eta=-1.0), lambda pipe, z: pipe.denoise(None, z, None, first=-1),
    lambda pipe, z: pipe.denoise(None, z, None, method='rk4'),
    lambda pipe, z: pipe.generate(requests(1), 64, 64, init_images=REFERENCES[:1], start=-0.1),
    lambda pipe, z: pipe.generate(requests(1), 64, 64, init_images=[]),
    lambda pipe, z: pipe.generate(requests(1), 64, 64, settings=SampleConfig(guidance=np.inf))])
def test_arguments_of_the_phases_that_cannot_be(pipe, call):
  with pytest.raises(UserError, match='must be'):
    call(pipe, pipe.noise([0], 64, 64))


# Files


def test_images_are_files_that_say_what_made_them(pipe, tmp_path, capsys):
  pipe = with_settings(pipe, prompt='a red circle', num_images=2)
  sample.run_requests(pipe, *sample.requests(pipe.settings, 64, 8), tmp_path)
  image = Image.open(tmp_path / '001.png')
  assert image.size == (64, 64) and image.text['prompt'] == 'a red circle' and image.text['seed'] == '1'
  assert json.loads(image.text['settings'])['steps'] == pipe.settings.steps and 'rewrite' in image.text
  assert (tmp_path / 'grid.png').exists() and 'prompt:  a red circle' in capsys.readouterr().out


def test_requests_are_sampled_some_at_a_time(pipe, tmp_path):
  for name, size in (('whole', 32), ('parts', 4)):
    some = with_settings(pipe, prompt='a red circle', num_images=6, batch_size=size)
    sample.run_requests(some, *sample.requests(some.settings, 64, 8), tmp_path / name)
  assert len(list((tmp_path / 'parts').glob('0*.png'))) == 6
  for i in range(6):
    same(*(imaging.read(tmp_path / name / f'{i:03d}.png') for name in ('whole', 'parts')))


@pytest.mark.slow
def test_an_image_is_made_again_from_its_metadata_alone(pipe, recipe, tmp_path, monkeypatch):
  """One of a batch, out of files, with new noise between steps; and the same of the API's metadata."""
  monkeypatch.chdir(tmp_path)
  Image.fromarray(REFERENCES[0]).save('first.png')
  unifusion.save(pipe.model, tmp_path / 'model')
  description.save(tmp_path / 'model', recipe())
  loaded = UniFusionPipeline.from_pretrained('model', quantized='int8')
  loaded.settings = dataclasses.replace(
      loaded.settings, prompt='make it blue', references=('first.png',), num_images=3, seed=-3, eta=0.5, guidance=2.0,
      rewrite='a blue star')
  sample.run_requests(loaded, *sample.requests(loaded.settings, 64, 8), tmp_path / 'images')
  with Image.open('images/001.png') as file:
    from_file = {name: value if name in ('prompt', 'rewrite', 'warning', 'remark') else json.loads(value)
                 for name, value in file.text.items() if name != 'parameters'}
  s = loaded.settings
  result = loaded(s.prompt, list(s.references), num_images=3, seed=-3, rewrite=s.rewrite)
  from_call = json.loads(json.dumps(result.metadata[1]))
  assert from_file == from_call and from_file['seed'] == -2
  origin, settings = from_file['origin'], SampleConfig().changed(**from_file['settings'])
  again = UniFusionPipeline.from_pretrained(
      origin['model']['name'], vlm=origin['vlm']['name'], vae=origin['vae']['name'], dtype=origin['dtype'],
      quantized=origin['quantized'], transformer_quantized=origin['transformer_quantized'])
  request = Request(from_file['prompt'], tuple(entry['file'] for entry in from_file['references']), from_file['seed'],
                    settings.rewrite)
  made, = again.generate([request] * settings.batch_size, settings.height, settings.width, settings=settings)[:1]
  np.testing.assert_array_equal(made.image, imaging.read('images/001.png'))
  assert again.metadata(dataclasses.replace(request, files=request.references), made, settings) == from_call
  # What differs is seen
  other = {name: again.origin[name]['fingerprint'] for name in ('model', 'vlm', 'vae')}
  assert len(set(other.values())) == 3 and origin['taps'] == [1, 2] and origin['max_rewrite_tokens'] == 32
  Image.fromarray(REFERENCES[1]).save('first.png')
  changed = again.metadata(request, made, settings)
  assert changed['references'][0]['digest'] != from_call['references'][0]['digest']


def write_all(folder, count, threads=4):
  """`count` images of each of several writers at once, each of one colour: the paths of each."""
  paths = [[] for _ in range(threads)]

  def write(colour):
    for _ in range(count):
      paths[colour].append(imaging.write_new_png(folder, 0, np.full((4, 4, 3), colour, np.uint8)))
  writers = [threading.Thread(target=write, args=(colour,)) for colour in range(threads)]
  for writer in writers:
    writer.start()
  for writer in writers:
    writer.join()
  return paths


@pytest.mark.parametrize('links', [True, False])
def test_two_writers_take_numbers_of_their_own(tmp_path, monkeypatch, links):
  """On a file system without links too."""
  if not links:
    def refuse(*args):
      raise PermissionError(1, 'no links here')
    monkeypatch.setattr(imaging.os, 'link', refuse)
  paths = write_all(tmp_path, 10)
  assert sorted(path.name for path in tmp_path.iterdir()) == [f'{i:03d}.png' for i in range(40)]
  for colour, mine in enumerate(paths):
    assert len(mine) == 10 and all((imaging.read(path) == colour).all() for path in mine)


def test_numbers_have_no_end(tmp_path):
  for number, name in ((999, '999.png'), (999, '1000.png'), (1000, '1001.png')):
    assert imaging.write_new_png(tmp_path, number, REFERENCES[0]).name == name


def test_folders_that_take_no_image(tmp_path):
  (tmp_path / 'images').write_text('a file')
  for write in (lambda: imaging.check_writable(tmp_path / 'images'),
                lambda: imaging.write_new_png(tmp_path / 'images', 0, REFERENCES[0]),
                lambda: imaging.write_png(tmp_path / 'images' / 'grid.png', REFERENCES[0])):
    with pytest.raises(UserError, match='cannot be written'):
      write()
  imaging.check_writable(tmp_path / 'new')
  assert list((tmp_path / 'new').iterdir()) == []


@dataclasses.dataclass
class Painter:
  """A pipeline that is fast: image i is of the grey i."""
  settings: SampleConfig
  size: int = 8
  made: list = dataclasses.field(default_factory=list)
  most: int = 0  # images that were alive at once

  def generate(self, requests):
    gc.collect()
    self.most = max(self.most, sum(image() is not None for image in self.made))
    images = [np.full((self.size, self.size, 3), request.seed % 256, np.uint8) for request in requests]
    self.made += [weakref.ref(image) for image in images]
    return [pipeline.Sample(image, request.instruction) for image, request in zip(images, requests)]

  def batches(self, requests, height, width, settings):
    for part, _ in sharding.batched(requests, settings.batch_size):
      yield part, self.generate(part)

  def metadata(self, request, sample, settings):
    return dict(prompt=request.instruction, seed=request.seed, origin={},
                settings=settings.settings() | dict(width=self.size, height=self.size))


def painted(tmp_path, count, **changes):
  painter = Painter(SampleConfig(batch_size=4), **changes)
  sample.run_requests(painter, requests_for({f'p:{i}': f'grey {i}' for i in range(count)}, ()), 8, 8, tmp_path)
  return painter


@pytest.mark.slow
def test_many_images_need_little_memory_and_their_grids_are_pages(tmp_path, capsys):
  (tmp_path / '000.png').write_bytes(b'there already')
  painter = painted(tmp_path, 2 * sample.PAGE + 6, size=sample.CELL + 4)
  assert painter.most <= 8
  grids = [f'grid-{1 + page * sample.PAGE:03d}.png' for page in range(3)]
  assert sorted(path.name for path in tmp_path.glob('grid*')) == grids
  printed = capsys.readouterr().out.splitlines()
  assert [line for line in printed if 'grid' in line] == [str(tmp_path / name) for name in grids]
  assert len(list(tmp_path.glob('[0-9]*.png'))) == 2 * sample.PAGE + 7
  assert (tmp_path / '000.png').read_bytes() == b'there already'
  for name in grids[:2]:
    height, width = imaging.read_size(tmp_path / name)
    assert 1.2 < width / height < 2.2 and width < 4000


def test_one_page_is_grid_png(tmp_path):
  painted(tmp_path, 3)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['000.png', '001.png', '002.png', 'grid.png']


@pytest.mark.parametrize('reason', ['disk', 'pipeline'])
def test_what_stops_a_list_leaves_what_was_made_and_says_how_far_it_came(tmp_path, capsys, monkeypatch, reason):
  if reason == 'disk':
    write, left = pathlib.Path.write_bytes, iter(range(6))

    def full(path, data):
      if next(left, None) is None:
        raise OSError(28, 'No space left on device')
      return write(path, data)
    monkeypatch.setattr(pathlib.Path, 'write_bytes', full)
  else:
    generate, batches = Painter.generate, iter(range(1))

    def stops(self, *args, **kwargs):
      if next(batches, None) is None:
        raise UserError('cannot be written')
      return generate(self, *args, **kwargs)
    monkeypatch.setattr(Painter, 'generate', stops)
  with pytest.raises(UserError, match='cannot be written'):
    painted(tmp_path, 10)
  done = 6 if reason == 'disk' else 4
  assert sorted(path.name for path in tmp_path.iterdir()) == [f'{i:03d}.png' for i in range(done)]
  assert f'stopped after {done} of 10 images' in (error := capsys.readouterr().err)
  assert f'p:{done}, with sample.seed={done}' in error


def test_grids_are_wrapped():
  """One image a request: near a screen's shape. Pairs stay side by side; more references have a row each."""
  image = lambda grey, size=64: np.full((size, size, 3), grey, np.uint8)
  for count in (1, 4, 9, 30, 64):
    height, width = imaging.wrapped_grid([[image(9)]] * count, [['a red circle']] * count).shape[:2]
    assert count == 1 or 0.8 < width / height < 2.5
  pairs = imaging.wrapped_grid([[image(10 * i + 1), image(10 * i + 2)] for i in range(12)], [['', '']] * 12, cell=64)
  rows = [[value for value, before in zip(row, [255, *row]) if value != before and value != 255]
          for row in pairs[8 + 32::64 + 8, :, 0].tolist()]
  assert sum(rows, []) == [10 * i + j for i in range(12) for j in (1, 2)] and 1 < len(rows) < 12
  three = imaging.wrapped_grid([[image(1)] * 3] * 5, [['', 'x', 'y']] * 5, cell=64)
  assert three.shape[1] == 3 * 64 + 4 * 8
