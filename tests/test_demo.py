"""The page: the bounds of its requests, the queue, and what a person sees in Chromium, with the embedded model.

One pipeline and one server for all tests.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import socket
import sys
import threading
import urllib.error
import urllib.request

import jax
import numpy as np
from PIL import Image, ImageDraw
from playwright.sync_api import expect
import pytest

from unifusion_jax import metadata, sharding
from unifusion_jax.commands import demo
from unifusion_jax.data import imaging
from unifusion_jax.demo.service import Cancelled, Form, Service
from unifusion_jax.demo.settings import DemoConfig
from unifusion_jax.errors import UserError
from unifusion_jax.pipeline import UniFusionPipeline

LIMITS = DemoConfig(port=0, max_references=2, max_upload_pixels=10_000, max_pixels=100 * 100, max_images=2,
                    max_steps=60, max_tiles=3, max_characters=200, max_queue=2, previews=2)
PROMPT = 'make the circle blue'
SECONDS = 60_000  # milliseconds that anything on the page may take: on busy cores it compiles for a while


@pytest.fixture(scope='module')
def pipe():
  """The embedded model on one device, in few steps and one image at a time: few programs are compiled."""
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])):
    made = UniFusionPipeline.from_pretrained('tiny')
  made.settings = made.settings.changed(steps=4, batch_size=1)
  return made


@pytest.fixture
def service(pipe):
  made = Service(pipe, LIMITS)
  yield made
  made.close()


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  """Files by name: a scene, one that is too large, and one that is no image."""
  folder = tmp_path_factory.mktemp('photos')
  scene = Image.new('RGB', (64, 64), (170, 225, 200))
  ImageDraw.Draw(scene).ellipse((8, 8, 28, 28), fill=(220, 40, 40))
  ImageDraw.Draw(scene).rectangle((38, 38, 56, 56), fill=(40, 80, 210))
  scene.save(folder / 'scene.png')
  Image.new('RGB', (101, 100)).save(folder / 'large.png')
  (folder / 'text.png').write_text('no image')
  return {path.stem: str(path) for path in folder.iterdir()}


# The service, without a page


@pytest.mark.parametrize('changes, sentence', [
    (dict(prompt=' '), 'write a prompt'),
    (dict(prompt='x' * 201), 'the prompt has 201 characters, and here it may have 200'),
    (dict(text='x' * 201), 'the text has 201'),
    (dict(system='x' * 201), 'the system has 201'),
    (dict(prompt={'path': '/etc/passwd'}), 'must be a text'),
    (dict(num_images=3), 'num_images=3 must be between 1 and 2'),
    (dict(steps=61), 'steps=61 must be between 1 and 60'),
    (dict(steps='many'), "steps='many' must be a whole number"),
    (dict(tiles=4), 'tiles=4 must be between 0 and 3'),
    (dict(guidance=float('nan')), 'guidance=nan must be'),
    (dict(width=1000, height=1000), 'an image of 1000x1000 has 1,000,000 pixels, and here it may have 10,000'),
    (dict(width=63), 'width=63 must be a multiple of 8'),
    (dict(references=('a', 'b', 'c'), strengths=(1, 1, 1)), '3 references are more than the 2'),
    (dict(references=('gone.png',), strengths=(1,)), 'reference 1 is no longer here'),
    (dict(negative_prompt='blurred', guidance=1), 'negative_prompt needs guidance'),
])
def test_what_is_beyond_the_bounds_is_refused_in_a_sentence(service, changes, sentence):
  with pytest.raises(UserError) as error:
    next(service.generate(Form(**dict(prompt=PROMPT) | changes), 'user'))
  assert sentence in str(error.value)


def test_images_are_refused_by_their_header_and_the_servers_path_is_not_said(service, photos):
  for name, sentence in (('large', 'has 101x100 pixels, more than the 10000'), ('text', 'is not an image')):
    with pytest.raises(UserError, match=f'reference 1: .*{sentence}') as error:
      service.check(Form(PROMPT, references=(photos[name],), strengths=(1,)))
    assert photos[name] not in str(error.value)


def test_tokens_and_time_are_bounded(pipe, photos):
  with pytest.raises(UserError, match='tokens for the VLM, and here there may be 100'):
    Service(pipe, DemoConfig(max_tokens=100)).check(Form(PROMPT, references=(photos['scene'],), strengths=(1,)))
  service = Service(pipe, DemoConfig(max_seconds=-1))
  with pytest.raises(UserError, match='stopped after the text: a request may take'):
    list(service.generate(Form(PROMPT), 'user'))
  service.close()


def test_images_are_those_of_the_pipeline(service, pipe, photos):
  form = Form(PROMPT, references=(photos['scene'],), strengths=(1,), num_images=2, seed=5)
  assert service.check(dataclasses.replace(form, strengths=(0.5,))).settings.strengths == (0.5,)
  *updates, last = service.generate(form, 'user')
  wanted = pipe(PROMPT, [imaging.read(photos['scene'])], num_images=2, seed=5)
  assert [image.form.seed for image in last.images] == [5, 6] and 'done' in last.status
  for image, array, data in zip(last.images, wanted.arrays, wanted.metadata, strict=True):
    np.testing.assert_array_equal(image.sample.image, array)
    np.testing.assert_array_equal(imaging.read(image.png), array)
    assert Image.open(io.BytesIO(image.png)).text == metadata.as_text(data)
    assert image.before.shape == array.shape
  # Intermediate images after step 2 of each, and not after the last one
  assert [(len(update.previews), len(update.images)) for update in updates if update.previews] == [(1, 0), (1, 1)]
  assert updates[-1].status == 'step 8 of 8 ...'
  assert [update.text for update in updates if update.text is not None] == wanted.rewrites[:1]
  assert any('compiled' in update.status for update in updates)
  assert not any('compiled' in update.status for update in service.generate(form, 'user'))


def test_one_request_at_a_time_and_one_of_each_user(service):
  """A full queue refuses; who waits knows the place, and who cancels gives it up at once."""
  ask = lambda user, steps=2: service.generate(Form(PROMPT, steps=steps), user)
  first, second, news = ask('first', 60), ask('second'), []
  next(first)
  with pytest.raises(UserError, match='your last request is still at work'):
    next(ask('first'))

  def wait():
    with contextlib.suppress(Cancelled):
      for update in second:
        news.append(update.status)
        service.cancel('second')
  waiting = threading.Thread(target=wait)
  waiting.start()
  refused = None
  while refused is None and next(first):  # until the second has its place
    try:
      next(ask('third'))
    except UserError as error:
      refused = error
  assert '2 requests are in the queue, which is full' in str(refused)
  waiting.join(60)
  assert news in (['waiting for 1 request before yours ...'], [])
  service.cancel('first')
  with pytest.raises(Cancelled, match='cancelled after'):
    list(first)
  assert list(ask('third'))[-1].images


def test_a_missing_gradio_says_how_to_install_it(monkeypatch, run, tmp_path):
  monkeypatch.setitem(sys.modules, 'gradio', None)
  with pytest.raises(UserError, match=r'pip install "unifusion_jax\[demo\]"'):
    run('--mode=demo', f'--workdir={tmp_path}')


def test_a_port_in_use_says_so():
  with socket.socket() as other:
    other.bind(('127.0.0.1', 0))
    other.listen()
    with pytest.raises(UserError, match='in use; give another port'):
      demo.free_port(DemoConfig(port=other.getsockname()[1]))


# The page, in a browser


@pytest.fixture(scope='module')
def address(pipe):
  with demo.served(pipe, LIMITS) as address:
    yield address.rstrip('/')


@pytest.fixture
def visit(chromium, address):
  """`visit()`: the page of a new visitor. It asks nothing of any other server, and logs no error."""
  contexts, elsewhere = [], []

  def opened():
    contexts.append(chromium.new_context(viewport=dict(width=1280, height=900)))
    contexts[-1].set_default_timeout(SECONDS)
    page = contexts[-1].new_page()
    page.on('request', lambda request: request.url.startswith((address, 'blob:', 'data:'))
            or elsewhere.append(request.url))
    page.on('pageerror', lambda error: elsewhere.append(str(error)))
    page.goto(address)
    expect(page.locator('#generate')).to_be_visible(timeout=SECONDS)
    return page
  yield opened
  for context in contexts:
    context.close()
  assert not elsewhere


def upload(page, path: str) -> None:
  page.locator('#reference-1 input[type=file]').set_input_files(path)
  expect(page.locator('#strength-1')).to_be_visible(timeout=SECONDS)


def set_number(page, name: str, value) -> None:
  """Fills in a number of the settings; once more where Gradio, which draws them when they are opened, overwrote it."""
  number = page.locator(f'#{name} input[type=number]')
  if not number.is_visible():
    page.locator('#settings button').first.click()
  for _ in range(20):
    number.fill(str(value))
    number.blur()
    page.wait_for_timeout(200)
    if number.input_value() == str(value):
      return


def says(page, text: str) -> None:
  expect(page.locator('#status')).to_contain_text(text, timeout=SECONDS)


def downloaded(page) -> tuple[np.ndarray, dict[str, str]]:
  """Pixels and metadata of the image that is shown."""
  with page.expect_download() as download:
    page.locator('#download').click()
  path = download.value.path()
  return imaging.read(path), Image.open(path).text


@pytest.mark.slow
def test_an_edit(visit, pipe, photos):
  """The image of the pipeline, with its metadata; then its settings come back from the gallery."""
  page = visit()
  page.locator('#prompt textarea').fill(PROMPT)
  upload(page, photos['scene'])
  set_number(page, 'seed', 7)
  page.locator('#generate').click()
  says(page, 'done in')
  wanted = pipe(PROMPT, [imaging.read(photos['scene'])], seed=7)
  expect(page.locator('#text textarea')).to_have_value(wanted.rewrites[0])
  expect(page.locator('#facts')).to_contain_text('seed 7')
  expect(page.locator('#comparison img')).to_have_count(2)
  pixels, text = downloaded(page)
  np.testing.assert_array_equal(pixels, wanted.arrays[0])
  assert text == metadata.as_text(wanted.metadata[0])

  page.locator('#prompt textarea').fill('another')
  set_number(page, 'seed', 8)
  page.locator('#history button.thumbnail-item').first.click()
  page.locator('#reuse').click()
  expect(page.locator('#prompt textarea')).to_have_value(PROMPT)
  expect(page.locator('#seed input')).to_have_value('7')


@pytest.mark.slow
def test_text_that_is_edited_between_the_phases(visit, pipe, photos):
  page = visit()
  page.locator('#prompt textarea').fill(PROMPT)
  upload(page, photos['scene'])
  page.locator('#write').click()
  says(page, 'written')
  written = page.locator('#text textarea').input_value()
  assert 'blue circle' in written and not page.locator('#history img').count()
  edited = written.replace('blue circle', 'yellow circle')
  page.locator('#text textarea').fill(edited)
  page.locator('#text textarea').blur()
  page.locator('#from-text').click()
  says(page, 'done in')
  wanted = pipe(PROMPT, [imaging.read(photos['scene'])], rewrite=edited)
  pixels, text = downloaded(page)
  assert text['rewrite'] == edited
  np.testing.assert_array_equal(pixels, wanted.arrays[0])
  assert json.loads(text['settings'])['rewrite'] == edited
  expect(page.locator('#text textarea')).to_have_value(edited)
  page.locator('#text textarea').fill('x' * 201)  # is refused, and not cut in silence
  page.locator('#from-text').click()
  says(page, 'the text has 201 characters')


@pytest.mark.parametrize('name, sentence', [
    ('large', 'has 101x100 pixels, more than the 10000 allowed'), ('text', 'is not an image that can be read')])
def test_a_refused_image_is_told_why(visit, photos, name, sentence):
  page = visit()
  page.locator('#prompt textarea').fill(PROMPT)
  upload(page, photos[name])
  page.locator('#generate').click()
  says(page, f'reference 1: an image of {pathlib.Path(photos[name]).stat().st_size} bytes {sentence}')
  assert not page.locator('#history img').count()


def test_cancel_stops_at_the_next_step(visit):
  page = visit()
  page.locator('#prompt textarea').fill('a red circle')
  set_number(page, 'steps', 60)
  page.locator('#generate').click()
  expect(page.locator('#live img').first).to_be_visible(timeout=SECONDS)  # an intermediate image
  page.locator('#cancel').click()
  says(page, 'cancelled after step')
  expect(page.locator('#live')).to_be_hidden()
  assert not page.locator('#history img').count()


def test_two_users_at_once_get_their_own(visit, pipe):
  users = [(visit(), 'a red circle', 3), (visit(), 'a green star', 4)]
  for page, prompt, seed in users:
    page.locator('#prompt textarea').fill(prompt)
    set_number(page, 'seed', seed)
  for page, *_ in users:
    page.locator('#generate').click()
  for page, prompt, seed in users:
    says(page, 'done in')
    expect(page.locator('#facts')).to_contain_text(prompt)
    expect(page.locator('#history img')).to_have_count(1)
    pixels, text = downloaded(page)
    assert text['prompt'] == prompt and text['seed'] == str(seed)
    np.testing.assert_array_equal(pixels, pipe(prompt, seed=seed).arrays[0])


def answer(address: str, path: str, body: dict | None = None) -> tuple[int, str]:
  """Status and text of an answer of the server."""
  data = None if body is None else json.dumps(body).encode()
  request = urllib.request.Request(f'{address}/{path}', data, {'Content-Type': 'application/json'})
  try:
    with urllib.request.urlopen(request, timeout=60) as response:
      return response.status, response.read().decode(errors='replace')
  except urllib.error.HTTPError as error:
    return error.code, error.read().decode(errors='replace')


def test_files_of_the_server_and_other_servers_are_out_of_reach(visit, address):
  """Neither by their path, nor as the reference of a request that is made by hand."""
  own = pathlib.Path(__file__).resolve()
  for path in (f'file={own}', 'file=/etc/passwd', 'file=../../etc/passwd', 'file=http://127.0.0.1/',
               'proxy=http://127.0.0.1/', 'deep_link?session_hash=x', 'openapi.json', 'run-history/buckets'):
    status, text = answer(address, f'gradio_api/{path}')
    assert status in (403, 404) and 'root:' not in text and 'def ' not in text, path
  for path in ('monitoring', 'docs', 'login_check'):
    assert answer(address, path)[0] == 404, path

  page = visit()
  page.locator('#prompt textarea').fill(PROMPT)
  with page.expect_request('**/queue/join*') as joined:
    page.locator('#generate').click()
  says(page, 'done in')
  asked = joined.value.post_data_json
  reference = 3  # after the kept images, the prompt and the text
  assert asked['data'][1] == PROMPT and asked['data'][reference] is None
  for path, status in (('/etc/passwd', 200), (str(own), 200), ('http://127.0.0.1/', 400), ('file:///etc/passwd', 400)):
    data = list(asked['data'])
    data[reference] = dict(path=path, meta=dict(_type='gradio.FileData'))
    found, text = answer(address, 'gradio_api/queue/join', asked | dict(data=data, session_hash='by-hand'))
    assert found == status
    if status == 200:
      _, text = answer(address, 'gradio_api/queue/data?session_hash=by-hand')
      assert '"success":false' in text and 'root:' not in text and str(own) not in text
  assert answer(address, 'gradio_api/queue/join', asked | dict(more='x' * 1_000_001))[0] == 413
