"""Two checkpoints side by side: images of both, votes in a browser that are blind and stay, and what they say."""

import dataclasses
import http.client
import json
import pathlib
import re
import shutil
import socket

import jax
import numpy as np
from PIL import Image
from playwright.sync_api import expect
import pytest
from test_evaluation import write_list
from test_record import other_weights

from unifusion_jax import command_line, config
from unifusion_jax.commands import compare
from unifusion_jax.data import imaging
from unifusion_jax.description import ASSETS
from unifusion_jax.errors import UserError
from unifusion_jax.pairs import page, requests, summary
from unifusion_jax.pairs.votes import is_swapped, PAGE, shuffled, VOTER, Votes
from unifusion_jax.weights import safetensors_io

NAMES = dict(a='weights=secret-one', b='weights=secret-two')
PROMPTS = ('a red <b>circle</b>', 'a blue star', 'make it green', 'two rings')
SECONDS = 30_000  # milliseconds that anything on the page may take


@pytest.fixture(scope='module')
def shown(tmp_path_factory):
  """Pairs as files whose metadata names the checkpoints: a's images are red, b's blue, references grey."""
  folder, pairs = tmp_path_factory.mktemp('pairs'), []
  for i, prompt in enumerate(PROMPTS):
    files = {}
    for name, colour in dict(a=(200 - i, 0, 0), b=(0, 0, 200 - i), reference=(90, 90, 90)).items():
      files[name] = folder / 'images' / name / f'{i:04d}.png'
      imaging.write_png(files[name], np.full((64, 64, 3), colour, np.uint8), dict(origin='secret-one secret-two'))
    pairs.append(page.Shown(f'{i:04d}', prompt, (files['reference'],) * (i == 2), files['a'], files['b']))
  return pairs


@pytest.fixture
def voting(shown, tmp_path):
  """`voting()`: a server's context over the votes of this test, as it is after each start."""
  def start(seed: int = 3):
    votes = Votes(tmp_path / 'votes', [pair.pair for pair in shown], seed, 'these')
    return page.serving(page.Server(0, shown, votes, seed, 'Which is better?', NAMES))
  return start


def read(votes: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in votes.read_text().splitlines()]


def visited(browser, address: str, name: str):
  """The voting page after a voter's name; what it asks of other servers, and errors, fail in `checked`."""
  context = browser.new_context(viewport=dict(width=1280, height=900))
  context.set_default_timeout(SECONDS)
  view, wrong = context.new_page(), []
  view.on('request', lambda request: request.url.startswith((address, 'data:', 'blob:')) or wrong.append(request.url))
  view.on('pageerror', lambda error: wrong.append(str(error)))
  view.wrong = wrong
  view.goto(address)
  view.locator('#voter').fill(name)
  view.get_by_text('Begin').click()
  expect(view.locator('#main')).to_be_visible()
  return view


def colour(view, side: str) -> str:
  """'a' or 'b': whose image is on a side, by its pixels."""
  expect(view.locator(f'#{side}')).to_have_js_property('complete', True)
  red, _, blue = view.evaluate(
      '''async side => {
        const image = document.getElementById(side), canvas = document.createElement('canvas');
        await image.decode();
        canvas.width = canvas.height = 1;
        const context = canvas.getContext('2d');
        context.drawImage(image, 0, 0);
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
      }''', side)
  return 'a' if red > blue else 'b'


def test_a_vote_from_end_to_end(chromium, voting, tmp_path):
  """By keys and clicks; what the browser gets before the end has no name; votes and their ends survive restarts."""
  received, expected = [], {}
  with voting() as address:
    view = visited(chromium, address, 'Ann')
    view.on('response', lambda response: received.append(response.body()))
    view.reload()
    expect(view.locator('#voter')).to_have_value('Ann')
    view.get_by_text('Begin').click()
    expect(view.locator('#count')).to_have_text('0 of 4 judged')
    expect(view.locator('#question')).to_have_text('Which is better?')
    order = shuffled(3, 'Ann', ['0000', '0001', '0002', '0003'])
    for number, (key, choice) in enumerate((('ArrowLeft', 'left'), ('ArrowDown', 'tie'))):
      name = order[number]
      expect(view.locator('#prompt')).to_have_text(PROMPTS[int(name)])  # as text, whatever is in it
      expect(view.locator('#references img')).to_have_count(int(name == '0002'))
      left, right = colour(view, 'left'), colour(view, 'right')
      assert [left, right] == (['b', 'a'] if is_swapped(3, 'Ann', name) else ['a', 'b'])
      view.keyboard.press(key)
      expect(view.locator('#count')).to_have_text(f'{number + 1} of 4 judged')
      line = read(tmp_path / 'votes' / 'Ann.jsonl')[number]
      assert (line['pair'], line['choice'], line['voter']) == (name, choice, 'Ann')
      expected[name] = dict(left=left).get(choice, choice)
    assert not view.wrong
    view.context.close()
  with voting() as address:  # started anew
    view = visited(chromium, address, 'Ann')
    view.on('response', lambda response: received.append(response.body()))
    expect(view.locator('#count')).to_have_text('2 of 4 judged')
    expect(view.locator('#prompt')).to_have_text(PROMPTS[int(order[2])])
    _, expected[order[2]] = colour(view, 'left'), colour(view, 'right')  # both are there
    view.locator('#right').click()
    expect(view.locator('#count')).to_have_text('3 of 4 judged')
    assert {colour(view, 'left'), colour(view, 'right')} == {'a', 'b'}
    view.keyboard.press('x')
    expected[order[3]] = 'bad'
    expect(view.locator('#finish')).to_be_visible()
    view.locator('#back').click()  # a second thought
    expect(view.locator('[data-choice=right]')).to_have_class('chosen')
    assert {colour(view, 'left'), colour(view, 'right')} == {'a', 'b'}
    view.locator('[data-choice=left]').click()
    expect(view.locator('[data-choice=left]')).to_have_class('chosen')
    expected[order[2]] = dict(a='b', b='a')[expected[order[2]]]
    expect(view.locator('#finish')).to_be_enabled()
    assert received and not any(b'secret' in body for body in received)
    assert not any(b'images/a' in body or str(tmp_path.parent).encode() in body for body in received)
    view.locator('#finish').click()
    expect(view.locator('#result')).to_contain_text('weights=secret-one')
    counts = {name: list(expected.values()).count(name) for name in 'ab'}
    assert view.locator('#result td').all_text_contents()[:4] == [
        NAMES['a'], str(counts['a']), NAMES['b'], str(counts['b'])]
    assert not view.wrong
    view.context.close()
  votes = Votes(tmp_path / 'votes', list(order), 3, 'these')
  assert {pair: winner for pair, (winner, _) in votes.resolved()['Ann'].items()} == expected
  with pytest.raises(UserError, match='Ann has finished and seen the names'):
    votes.cast('Ann', '0000', 'left')


def test_the_page_as_a_file(chromium, shown, tmp_path):
  """Whole, and blind: no name, no metadata; its votes are saved as a file that is read like the others."""
  page.write(tmp_path / 'page.html', shown, 3, 'Which is <better>?', 'these')
  text = (tmp_path / 'page.html').read_text()
  assert 'secret' not in text and 'images/a' not in text and 'http' not in text
  context = chromium.new_context()
  context.set_default_timeout(SECONDS)
  view, wrong, asked = context.new_page(), [], []
  view.on('pageerror', lambda error: wrong.append(str(error)))
  answers = iter(["Anna O'Neill", 'anna@example.com', '', ' Bo Ångström '])  # three that are no names
  view.on('dialog', lambda dialog: (asked.append(dialog.message), dialog.accept(next(answers))))
  view.goto(f'file://{tmp_path / "page.html"}')
  expect(view.locator('#question')).to_have_text('Which is <better>?')
  order = shuffled(3, PAGE, [pair.pair for pair in shown])
  expect(view.locator('#prompt')).to_have_text(PROMPTS[int(order[0])])
  winner, _ = colour(view, 'left'), colour(view, 'right')
  assert winner == 'ab'[is_swapped(3, PAGE, order[0])]
  view.keyboard.press('ArrowLeft')
  expect(view.locator('#count')).to_have_text('1 of 4 judged')
  view.reload()
  expect(view.locator('#count')).to_have_text('1 of 4 judged')
  with view.expect_download() as download:
    view.locator('#finish').click()
  assert asked[0] == 'Your name' and len(asked) == 4 and all('1 to 40 letters' in text for text in asked[1:])
  names = ['Zoë', 'Анна', '花子 2', 'a.b-c', '-a', ' a', "O'Neill", 'a@b', 'a/b', 'x' * 41, 'a_b', '²', '🙂']
  fits = 'name => new RegExp(`^(?:${page.names.pattern})$`, "u").test(name)'
  assert [view.evaluate(fits, name) for name in names] == [bool(VOTER.fullmatch(name)) for name in names]
  (tmp_path / 'votes').mkdir()
  download.value.save_as(tmp_path / 'votes' / download.value.suggested_filename)
  bo = 'Bo Ångström'
  votes = Votes(tmp_path / 'votes', order, 3, 'these')
  assert votes.resolved() == {bo: {order[0]: (winner, 'left')}}
  votes.cast(bo, order[1], 'tie')  # the same person on the voting page
  assert votes.choices(bo) == {order[1]: 'tie'} and len(votes.resolved()[bo]) == 2
  # Of two votes on a pair the later one counts, whatever its file is called; and they stay when pairs are added
  votes.cast(bo, order[0], 'bad')
  assert votes.resolved()[bo][order[0]] == ('bad', 'bad')
  page.write(tmp_path / 'page.html', [*shown, dataclasses.replace(shown[0], pair='0004')], 3, '', 'these')
  view.reload()
  expect(view.locator('#count')).to_have_text('1 of 5 judged')
  context.close()
  assert not wrong
  with pytest.raises(UserError, match='it is of another one'):
    Votes(tmp_path / 'votes', order, 3, 'those').resolved()


def test_the_later_of_two_files_counts(tmp_path):
  """As when a page is saved twice: the second file's name comes before that of the first."""
  line = dict(comparison='these', pair='0', voter='Bo', order=PAGE)
  for name, choice, time in (('page Bo', 'tie', '2026-01-01T10:00:00.000+00:00'),
                             ('page Bo (1)', 'bad', '2026-01-01T11:00:00.000+00:00')):
    (tmp_path / f'{name}.jsonl').write_text(json.dumps(line | dict(choice=choice, time=time)) + '\n')
  assert Votes(tmp_path, ['0'], 0, 'these').resolved() == {'Bo': {'0': ('bad', 'bad')}}


def test_no_vote_on_images_that_are_not_there(chromium, voting, tmp_path):
  """The pair before is shown until they have come; another server has other images under the same names."""
  with voting() as address:
    view = visited(chromium, address, 'Ann')
    colour(view, 'left'), colour(view, 'right')
    view.route('**/image/*', lambda route: None)  # an answer that never comes
    for side in ('left', 'right'):
      view.evaluate('side => { document.getElementById(side).src += "?"; }', side)
    view.keyboard.press('ArrowLeft')
    expect(view.locator('#status')).to_have_text('The images are still coming.')
    view.unroute('**/image/*')
    for side in ('left', 'right'):
      view.evaluate('side => { document.getElementById(side).src = "image/none"; }', side)
      expect(view.locator(f'#{side}')).to_have_js_property('complete', True)
    view.keyboard.press('ArrowLeft')
    expect(view.locator('#status')).to_have_text('An image has not come: load the page again.')
    view.context.close()
  assert not (tmp_path / 'votes').exists()


def answer(address: str, method: str, path: str, body=None, **headers) -> tuple[int, bytes]:
  """Status and body of an answer of the server, to a path sent as it is."""
  connection = http.client.HTTPConnection(address.removeprefix('http://'), timeout=30)
  data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
  connection.request(method, path, data, {'Content-Type': 'application/json'} | headers)
  response = connection.getresponse()
  return response.status, response.read()


def test_what_the_server_gives_and_takes_is_bounded(voting, shown, tmp_path):
  with voting() as address:
    own = pathlib.Path(__file__).resolve()
    for path in ('/../../etc/passwd', '/image/../../../etc/passwd', f'/image/{own}', f'/{own}', '/image//etc/passwd',
                 '/image/%2e%2e/%2e%2e/etc/passwd', f'/image/{shown[0].a}', '/votes/Ann.jsonl', '/compare.json',
                 '/image/'):
      status, text = answer(address, 'GET', path)
      assert status == 404 and text == b'there is no such page here', path
    vote = dict(comparison='these', voter='Ann', pair='0000', choice='left')
    for changes, sentence in ((dict(voter='../Ann'), b'a name has'), (dict(voter=''), b'a name has'),
                              (dict(voter='x' * 41), b'a name has'), (dict(pair='9999'), b'a vote names one of'),
                              (dict(choice='a'), b'a vote names one of'), (dict(choice=3), b'an object of texts'),
                              (dict(comparison='those'), b'Another comparison is served here')):
      status, text = answer(address, 'POST', '/vote', vote | changes)
      assert status == 400 and sentence.replace(b'an object', b'a JSON object') in text
    assert answer(address, 'POST', '/vote', b'[1') [0] == 400
    assert answer(address, 'POST', '/vote', vote | dict(more='x' * 5000))[0] == 400
    assert answer(address, 'POST', '/vote', vote, **{'Content-Type': 'text/plain'})[0] == 400  # of a page elsewhere
    assert answer(address, 'GET', '/pairs?voter=Ann', Host='elsewhere.org')[0] == 403
    assert answer(address, 'POST', '/finish', vote) == (400, b'4 of 4 pairs are still to be judged')
    assert answer(address, 'PUT', '/vote', vote)[0] == 501
    assert not (tmp_path / 'votes').exists()
    pairs = json.loads(answer(address, 'GET', '/pairs?voter=Ann')[1])['pairs']
    status, png = answer(address, 'GET', f'/{pairs[0]["left"]}')
    (tmp_path / 'left.png').write_bytes(png)
    assert status == 200 and not Image.open(tmp_path / 'left.png').text
    for _ in range(80):
      assert answer(address, 'POST', '/vote', vote)[0] == 200
    assert b'that is enough' in answer(address, 'POST', '/vote', vote)[1]
    for i in range(99):
      (tmp_path / 'votes' / f'{i}.jsonl').touch()
    assert b'100 people have voted' in answer(address, 'POST', '/vote', vote | dict(voter='Bo'))[1]


def test_a_line_that_was_cut_off_and_one_that_is_wrong(tmp_path):
  votes = Votes(tmp_path, ['0', '1'], 0, 'these')
  votes.cast('Ann', '0', 'left')
  path = tmp_path / 'Ann.jsonl'
  path.write_bytes(path.read_bytes() + b'{"pair": "1", "cho')
  assert votes.choices('Ann') == {'0': 'left'}
  votes.cast('Ann', '1', 'bad')
  assert votes.choices('Ann') == {'0': 'left', '1': 'bad'} and len(read(path)) == 2
  line = dict(comparison='these', pair='0', voter='Ann', order='Ann', choice='left')
  for changes, sentence in ((dict(pair='7'), 'names no pair'), (dict(choice='a'), 'or no choice'),
                            (dict(voter='a@b', order=PAGE), 'a name has 1 to 40'), (dict(time=1), 'is no text')):
    (tmp_path / 'Bo.jsonl').write_text(json.dumps(line | changes) + '\n')
    with pytest.raises(UserError, match=f'Bo.jsonl:1 is no vote of this comparison .*{sentence}'):
      votes.resolved()
  assert votes.finish('Ann') == ['ba'[not is_swapped(0, 'Ann', '0')], 'bad']  # whatever others have in their files
  (tmp_path / 'ann.jsonl').write_text(path.read_text())  # as a disk that takes both names for one has it
  assert votes.choices('ann') == {}


def test_orders_are_shuffled_by_voter_and_seed():
  pairs = [f'{i:04d}' for i in range(400)]
  sides = {(seed, name): [is_swapped(seed, name, pair) for pair in pairs] for seed in (0, 1) for name in ('Ann', 'Bo')}
  for key, swapped in sides.items():
    assert 160 < sum(swapped) < 240
    order = shuffled(*key, pairs)
    assert sorted(order) == pairs != order
    ranks = np.argsort(order)
    assert abs(np.corrcoef(ranks, swapped)[0, 1]) < 0.2  # the place tells no side
    others = [other for name, other in sides.items() if name != key]
    assert all(140 < sum(np.equal(swapped, other)) < 260 for other in others)


def test_the_summary():
  categories = {str(i): f't2i/{"even" if i % 2 == 0 else "odd"}' for i in range(12)}
  ann = dict(zip(categories, 'aaaaaaaab') ) | {'9': 'tie', '10': 'bad'}
  bo = {pair: 'a' if winner == 'a' else 'tie' for pair, winner in ann.items() if pair != '10'}
  votes = {name: {pair: (winner, 'left' if winner == 'a' else 'right' if winner == 'b' else winner)
                  for pair, winner in each.items()} for name, each in dict(Ann=ann, Bo=bo).items()}
  each = {pair: pair for pair in categories}  # a request of its own
  report = summary.summary(categories, votes, each)
  own = report['voters']['Ann']
  assert (own['judged'], own['a'], own['b'], own['tie'], own['bad']) == (11, 8, 1, 1, 1)
  assert own['wins_a']['share'] == pytest.approx((8 + 1) / 11, abs=1e-4)
  assert own['decided_a']['n'] == 9 and own['decided_a']['share'] == pytest.approx(8 / 9, abs=1e-4)
  assert own['p'] == pytest.approx(2 * (1 + 9) / 2 ** 9, abs=1e-5)  # the sign test's
  assert report['all']['judged'] == 11 and report['all']['a'] == 16  # a pair is one, however often it was judged
  assert report['all']['wins_a']['share'] == pytest.approx((8 + 0.25 + 0.5 + 0.5) / 11, abs=1e-4)
  (agreement,) = report['agreement']
  assert agreement['same']['n'] == 10 and agreement['same']['share'] == 0.9
  assert agreement['kappa'] == pytest.approx((0.9 - (0.8 * 0.8 + 0.1 * 0.2)) / (1 - 0.66), abs=1e-4)
  assert report['categories'].keys() == {'t2i', 't2i/even', 't2i/odd'}
  assert report['categories']['t2i/odd']['judged'] == 5 and report['left']['n'] == 17
  assert summary.summary(categories, {}, each)['all'] == dict(judged=0, a=0, b=0, tie=0, bad=0)
  # A pair is decided where one side has more votes than the other, however many ties
  winners = dict(Ann=dict(x='a', y='a'), Bo=dict(x='tie', y='b'), Cleo=dict(x='tie', y='tie'))
  rates = summary.rates(winners, dict(x='x', y='y'))
  assert rates['decided_a']['n'] == rates['decided_a']['share'] == rates['p'] == 1
  assert summary.rates(winners, dict(x='x'))['wins_a'] == dict(share=round(2 / 3, 4), low=None, high=None)  # one pair
  # Four images of each of two requests are evidence of two, not of eight
  images = {f'{request}{i}': request for request in 'xy' for i in range(4)}
  votes = dict(Ann={pair: ('a', 'left') for pair in images} | {'y0': ('b', 'right')})
  for requests_of, judged, p in ({pair: pair for pair in images}, 8, 0.07031), (images, 2, 0.5):
    rates = summary.summary(dict.fromkeys(images, 't2i'), votes, requests_of)['all']
    assert (rates['judged'], rates['decided_a']['n'], rates['p']) == (8, judged, p)
    assert rates['wins_a']['share'] == 7 / 8


def test_requests_of_prompts_and_lists(tmp_path):
  (tmp_path / 'prompts.txt').write_text('a red circle\n\na blue star\n')
  made = command_line.read('compare', [f'prompt=@{tmp_path}/prompts.txt', 'num_images=2', 'examples=3', 'seed=5'])
  pairs = requests.pairs(made, 64, 8)
  assert [(pair.request.instruction, pair.request.seed, pair.category) for pair in pairs] == [
      ('a red circle', 5, 't2i'), ('a red circle', 6, 't2i'), ('a blue star', 7, 't2i')]
  assert {(pair.height, pair.width) for pair in pairs} == {(64, 64)}
  assert pairs[0].asked == pairs[1].asked != pairs[2].asked
  made = command_line.read('compare', [f'data={write_list(tmp_path / "own.jsonl")}'])
  pairs = requests.pairs(made, 64, 8)
  assert [pair.category for pair in pairs] == ['t2i', 't2i', 'edit', 'edit']
  assert pairs[2].request.instruction == 'make it green' and pairs[2].request.references[0].shape == (64, 64, 3)
  (tmp_path / 'own.jsonl').write_text(
      '{"references": ["gone.png"], "instruction": "x", "target": "x.png", "caption": "x"}\n')
  with pytest.raises(UserError, match='own.jsonl line 1: '):
    requests.pairs(made, 64, 8)
  for settings, sentence in ((['data=x'], 'data=x must be scenes, or'), ([f'prompt=@{tmp_path}/none.txt'], 'no file')):
    with pytest.raises(UserError, match=sentence):
      requests.pairs(command_line.read('compare', settings), 64, 8)
  for settings, sentence in ((['b.weights=tiny'], 'a and b are the same'), (['tasks=caption'], 'tasks='),
                             (['references=x.png'], 'references go with'),
                             (['a.vlm_quantized=int4'], 'must be one of')):
    with pytest.raises(UserError, match=sentence):
      config.check(command_line.read('compare', settings), 1)
  with pytest.raises(UserError, match='^width=100 must be a multiple of 8 pixels'):
    compare.run(command_line.read('compare', ['prompt=a red circle', 'width=100']), tmp_path / 'none')
  assert not (tmp_path / 'none').exists()


def test_what_was_claimed_and_has_no_image_may_change(tmp_path):
  with socket.socket() as other:
    other.bind(('127.0.0.1', 0))
    other.listen()
    port = other.getsockname()[1]  # taken: a run ends before any weights are read
    begin = lambda width: compare.run(command_line.read('compare', [
        'prompt=a red circle', f'width={width}', 'serve=true', f'port={port}']), tmp_path)
    for width in (64, 96):
      with pytest.raises(UserError, match='cannot be served at'):
        begin(width)
    (tmp_path / 'images').mkdir()
    with pytest.raises(UserError, match='pair 0000 is of another request or size'):
      begin(64)


@pytest.mark.slow
def test_the_command(run, tmp_path, capsys):
  """Images of both from the same noise; the same command again goes on, and refuses another comparison's folder."""
  arguments = ['--config=configs/compare.py', f'--workdir={tmp_path}', '--config.b.weights=tiny', '--config.b.steps=2',
               '--config.a.steps=1', '--config.prompt=a red circle', '--config.num_images=2', '--config.batch_size=2']
  run(*arguments)
  report = json.loads((tmp_path / 'summary.json').read_text())
  assert (report['a'], report['b']) == ('steps=1', 'steps=2') and report['between']['psnr_db']['mean'] < 60
  text = {side: Image.open(tmp_path / 'images' / side / '0001.png').text for side in 'ab'}
  assert text['a']['seed'] == text['b']['seed'] == '1' and json.loads(text['b']['settings'])['steps'] == 2
  files = sorted((tmp_path / 'images').rglob('*.png'))
  before = {path: path.read_bytes() for path in files}
  assert len(files) == 4
  comparison = re.search('"comparison": "(.+?)"', (tmp_path / 'page.html').read_text())[1]
  run(*arguments, '--config.question=Which is sharper?')  # there are no votes yet
  Votes(tmp_path / 'votes', ['0000', '0001'], 0, comparison).cast('Ann', '0001', 'left')
  with pytest.raises(UserError, match="question: 'Which is sharper.' there, 'Which image"):
    run(*arguments)
  arguments.append('--config.question=Which is sharper?')
  files[-1].unlink()
  run(*arguments)
  assert {path: path.read_bytes() for path in files} == before
  report = json.loads((tmp_path / 'summary.json').read_text())
  assert report['all']['a'] + report['all']['b'] == 1 and report['categories']['t2i']['judged'] == 1
  assert '"steps=1"' in capsys.readouterr().out
  for setting, sentence in (('a.guidance=2', 'another comparison: a.guidance: None there, 2.0 now: give another'),
                            ('prompt=a blue circle', 'another comparison: pair 0000 is of another request'),
                            ('examples=1', 'has 2 pairs, and 1 are asked for: give examples=2 or more')):
    with pytest.raises(UserError, match=sentence):
      run(*arguments, f'--config.{setting}')
  run(*arguments, '--config.num_images=3')  # more of the same
  assert Votes(tmp_path / 'votes', ['0000', '0001', '0002'], 0, comparison).choices('Ann') == {'0001': 'left'}
  assert (tmp_path / 'images' / 'b' / '0002.png').exists()
  arguments.append('--config.num_images=3')
  with socket.socket() as other:
    other.bind(('127.0.0.1', 0))
    other.listen()
    with pytest.raises(UserError, match='cannot be served at'):
      run(*arguments, '--config.serve', f'--config.port={other.getsockname()[1]}')
  with pytest.raises(UserError, match='it takes configs/compare.py'):
    run('--config=configs/edit.py', '--mode=compare', f'--workdir={tmp_path}')
  (tmp_path / 'compare.json').unlink()
  with pytest.raises(UserError, match='has images and votes but no compare.json'):
    run(*arguments)
  assert compare.CompareConfig().labels()['a'] == 'weights=tiny'


@pytest.mark.slow
def test_other_files_under_the_same_names_are_refused(run, tmp_path):
  """Weights, LoRAs and references are known by what they hold, not by where they lie."""
  def adapter(value: float):
    return {f'transformer.transformer_blocks.0.attn.to_q.lora_{name}.weight': np.full(shape, value, np.float32)
            for name, shape in dict(A=(1, 192), B=(192, 1)).items()}
  side = tmp_path / 'side'
  for name in ('edit', 'vlm', 'vae'):
    shutil.copytree(ASSETS / name, side / name)
  lora, description = side / 'style.safetensors', side / 'edit' / 'unifusion.json'
  safetensors_io.write(lora, adapter(0.1))
  imaging.write_png(side / 'a.png', np.full((64, 64, 3), 80, np.uint8))
  imaging.write_png(side / 'b.png', np.full((64, 64, 3), 90, np.uint8))
  arguments = ['--config=configs/compare.py', f'--workdir={tmp_path / "work"}', '--config.a.steps=1',
               '--config.b.steps=1', '--config.prompt=make it green', f'--config.references={side / "a.png"}',
               *(f'--config.b.{name}={side / folder}' for name, folder in dict(
                   weights='edit', vlm='vlm', vae='vae', loras='style.safetensors:0.8').items())]
  run(*arguments)
  run(*arguments)
  reference, = (tmp_path / 'work' / 'references').iterdir()
  assert imaging.read(reference).max() == 80

  def refused(sentence: str, *more: str):
    with pytest.raises(UserError, match=f'work holds another comparison: {sentence}.*give another --workdir'):
      run(*arguments, *more)
  for path, setting in ((side / 'edit', 'transformer'), (side / 'vlm', 'vlm'), (side / 'vae', 'vae')):
    before = shutil.copytree(path, tmp_path / 'before')
    other_weights(path)
    refused(f'b.files.{setting}: ')
    shutil.rmtree(path)
    before.rename(path)
  settings = json.loads(description.read_text())
  description.write_text(json.dumps(settings | dict(sample=settings['sample'] | dict(guidance=2.0))))
  refused('b.described.sample.guidance: 3.0 there, 2.0 now')
  description.write_text(json.dumps(settings))
  safetensors_io.write(lora, adapter(0.2))  # retrained to the same place
  refused('b.files.loras: ')
  safetensors_io.write(lora, adapter(0.1), dict(lora_alpha='4'))
  refused('b.files.loras: ')
  safetensors_io.write(lora, adapter(0.1))
  (side / 'b.png').rename(side / 'a.png')
  refused('pair 0000 is of another request')


def test_several_processes_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(UserError, match='runs in one process and these are 2: start it on one host alone'):
    compare.run(command_line.read('compare', []), tmp_path)
