"""Public benchmarks: images that are made once, a judge that answers, dependencies, tables, and the command."""

import json
import pathlib

from benchmark_sets import lay, lines, png, read
import jax
import numpy as np
from PIL import Image
import pytest
from test_pipeline import random_pipe

from unifusion_jax import command_line, sharding
from unifusion_jax import config as configuration
from unifusion_jax.commands import benchmark, describe
from unifusion_jax.data import imaging
from unifusion_jax.errors import UserError
from unifusion_jax.evaluation import answers, images, statistics
from unifusion_jax.evaluation.benchmarks import generation, judging, records, scoring, tables
from unifusion_jax.evaluation.benchmarks.records import Question, Record
from unifusion_jax.evaluation.benchmarks.sets import SETS
from unifusion_jax.request import SampleConfig, shape_like
from unifusion_jax.scenes import examples, language
from unifusion_jax.scenes.evaluation import benchmark as scenes

QUICK = SampleConfig(steps=1, guidance=1.0, verifi=False)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
  monkeypatch.setattr(statistics, 'RESAMPLES', 200)


# Images


def test_grids_are_cut_as_they_were_put_together():
  images = [np.full((4, 6, 3), i, np.uint8) for i in range(4)]
  whole = generation.grid(images)
  assert whole.shape == (8, 12, 3) and (whole[0, 7, 0], whole[5, 0, 0]) == (1, 2)
  np.testing.assert_array_equal(generation.split(whole, 4), images)
  with pytest.raises(UserError, match='benchmark.images=3'):
    SETS['dpg'].layout(Record('7', 'x', ''), 3)


@pytest.fixture(scope='module')
def pipe(recipe):
  """A pipeline of random models that writes no text, sharded over all axes."""
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tp=2))):
    return random_pipe(recipe(sample=QUICK))


def sizes(pipe):
  return lambda reference: shape_like(reference, 64, pipe.unit)


def jobs(pipe, name, found, images, seed=0):
  return generation.jobs(SETS[name], list(enumerate(found)), images, seed, sizes(pipe))


def test_images_are_made_once(pipe, tmp_path):
  """What is missing or damaged is made again, as it was; the rest is not touched."""
  found, workdir = read('geneval', lay(tmp_path, 'geneval')), tmp_path / 'run'
  wanted = jobs(pipe, 'geneval', found, 2, seed=5)
  assert [request.seed for job in wanted for request in job.requests] == [5, 6, 7, 8]
  generation.identity(workdir, dict(model='a', settings=dict(steps=2)))
  assert generation.missing(workdir, wanted) == wanted
  generation.generate(pipe, SETS['geneval'], wanted, workdir)
  assert generation.missing(workdir, wanted) == []
  assert json.loads((workdir / 'images/00001/metadata.jsonl').read_text()) == found[1].line
  paths = [workdir / 'images' / job.output.path for job in wanted]
  assert Image.open(paths[1]).info['prompt'] == 'a red circle' and Image.open(paths[1]).info['seed'] == '6'
  before = [imaging.read(path) for path in paths]
  paths[1].unlink()
  paths[2].write_bytes(paths[2].read_bytes()[:-9])
  times = paths[0].stat().st_mtime_ns, paths[3].stat().st_mtime_ns
  with (workdir / generation.LOG).open('a') as file:
    file.write('{"file": "000')  # a process that was ended while it wrote
  again = generation.missing(workdir, wanted)
  assert again == wanted[1:3]
  generation.generate(pipe, SETS['geneval'], again, workdir)
  assert generation.missing(workdir, wanted) == []
  assert times == (paths[0].stat().st_mtime_ns, paths[3].stat().st_mtime_ns)
  for image, path in zip(before, paths):
    assert np.abs(image.astype(int) - imaging.read(path)).max() <= 1
  assert np.abs(before[0].astype(int) - before[1]).max() > 10


def test_another_setting_in_the_same_folder_is_refused(tmp_path):
  made_by = dict(origin=dict(model=dict(name='a')), settings=dict(steps=2, strengths=()))
  generation.identity(tmp_path, made_by)
  generation.identity(tmp_path, made_by)
  for changed, sentence in ((made_by | dict(settings=dict(steps=3, strengths=())), 'settings.steps=2, and now it is 3'),
                            (made_by | dict(origin=dict(model=dict(name='b'))), "origin.model.name='a'")):
    with pytest.raises(UserError, match=sentence):
      generation.identity(tmp_path, changed)
  (tmp_path / 'other' / 'images').mkdir(parents=True)
  with pytest.raises(UserError, match='nothing says what made them'):
    generation.identity(tmp_path / 'other', made_by)


def test_grids_edits_and_a_part_have_the_images_of_the_whole(pipe, tmp_path):
  found = read('dpg', lay(tmp_path, 'dpg'))
  wanted = jobs(pipe, 'dpg', found, 4)
  generation.generate(pipe, SETS['dpg'], wanted, tmp_path / 'whole')
  assert imaging.read_size(tmp_path / 'whole/images/7.png') == (128, 128)
  part = generation.jobs(SETS['dpg'], [(1, found[1])], 4, 0, sizes(pipe))
  generation.generate(pipe, SETS['dpg'], part, tmp_path / 'part')
  for one, other in zip(generation.read(tmp_path / 'whole', [wanted[1].output]),
                        generation.read(tmp_path / 'part', [part[0].output]), strict=True):
    assert np.abs(one.astype(int) - other).max() <= 1
  (two,) = read('geneval2', lay(tmp_path, 'geneval2'))
  generation.generate(pipe, SETS['geneval2'], jobs(pipe, 'geneval2', [two], 1), tmp_path / 'two')
  assert json.loads((tmp_path / 'two' / 'image_paths.json').read_text()) == {
      'two red stars': str(tmp_path / 'two/images/00000.png')}
  edits = read('imgedit', lay(tmp_path, 'imgedit', **{'1.png': png(size=(96, 64))}))
  (job,) = jobs(pipe, 'imgedit', edits, 1)
  assert (job.height, job.width) == (48, 72) and len(job.requests[0].references) == 1


def test_one_device_makes_what_eight_make(pipe, recipe, tmp_path):
  found = read('oneig', lay(tmp_path, 'oneig'))[:1]
  wanted = jobs(pipe, 'oneig', found, 4)
  generation.generate(pipe, SETS['oneig'], wanted, tmp_path / 'eight')
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])):
    generation.generate(random_pipe(recipe(sample=QUICK)), SETS['oneig'], wanted, tmp_path / 'one')
  eight, one = (generation.read(tmp_path / name, [wanted[0].output]) for name in ('eight', 'one'))
  assert np.abs(np.stack(eight).astype(int) - np.stack(one)).max() <= 2 and np.std(one) > 5


# The judge


@pytest.fixture(scope='module')
def judge():
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=4, fsdp=2))):
    return judging.Judge.load(pathlib.Path(describe.EMBEDDED), dtype='float32', quantized='', cache=None, tiles=1,
                              batch_size=8)


@pytest.fixture(scope='module')
def rendered():
  """(records of scenes, their true images): what the judge should say yes to."""
  found = scenes.records()[:24]
  pictures = [examples.example('t2i', 'test', i // 2, objects=((1, 2), (3, 4))[i % 2])['target'] for i in range(24)]
  return found, pictures


def test_yes_is_for_the_image_that_shows_it(judge, rendered):
  found, pictures = rendered
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=4, fsdp=2))):
    true, false = judge.shown(found, pictures), judge.shown(found, pictures[1:] + pictures[:1])
  assert true.mean() > 0.65 and false.mean() < 0.15 and np.mean(true > false) > 0.85
  assert all(record.exact(picture) for record, picture in zip(found, pictures))
  assert not any(record.exact(picture) for record, picture in zip(found, pictures[1:] + pictures[:1]))


def test_questions_are_answered(judge, rendered):
  found, pictures = (each[:12] for each in rendered)
  assert {question.category for record in found for question in record.questions} >= {'object', 'count', 'background'}
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=4, fsdp=2))):
    true, false = judge.answer(found, pictures), judge.answer(found, pictures[1:] + pictures[:1])
  share = lambda told: np.mean(np.concatenate([answer.right for answer in told]))
  assert share(true) > 0.95 and share(false) < 0.6
  assert all(answer.answered.all() for answer in true)
  four = [answer.right[i] for answer, record in zip(true, found)
          for i, question in enumerate(record.questions) if question.answer == 'four']
  assert four and all(four)  # which the embedded tokenizer writes in two tokens
  assert [len(answer.right) for answer in true] == [len(record.questions) for record in found]


def test_a_judge_on_one_device_as_on_eight(judge, rendered):
  found, pictures = (each[:5] for each in rendered)
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=4, fsdp=2))):
    eight = judge.shown(found, pictures)
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])):
    alone = judging.Judge.load(pathlib.Path(describe.EMBEDDED), dtype='float32', quantized='', cache=None, tiles=1,
                               batch_size=3)
    np.testing.assert_allclose(alone.shown(found, pictures), eight, atol=1e-4)


def test_an_edit_without_a_caption_is_judged_by_both_images(judge, rendered):
  """That a probability comes of it; the embedded VLM never saw two images with such a question."""
  found, pictures = rendered
  edit = Record('a', 'make it blue', 'x', references=(pictures[0],))
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=4, fsdp=2))):
    both = judge.shown([edit, found[0]], [pictures[1], pictures[0]])
  assert 0 <= both[0] <= 1 and both[1] > 0.5


def test_a_judge_of_text_alone_is_refused(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(dict(
      model_type='qwen2', vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
      intermediate_size=8)))
  with pytest.raises(UserError, match='reads no images, and a judge has to'):
    judging.Judge.load(tmp_path, dtype='float32', quantized='', cache=None, tiles=1, batch_size=1)


class Digits:
  """A tokenizer that gives words whole and numbers digit by digit."""
  vocabulary = ('yes', 'no', 'one', 'ten', '1', '0', ' ')
  stop_ids, tokenizer = (9,), property(lambda self: self)

  def text_ids(self, text):
    if text.isdigit():
      return tuple(self.vocabulary.index(digit) for digit in text)
    return (self.vocabulary.index(' '),) if text[0] == ' ' else tuple(
        [self.vocabulary.index(text)] if text in self.vocabulary else [])

  def decode(self, ids):
    return ''.join(self.vocabulary[i] for i in ids)


def test_a_first_token_of_two_answers_is_told_apart_by_the_second():
  """1 begins 1, after which the answer ends, and 10; a blank begins every word."""
  assert answers.first_ids(Digits(), [('one', '1'), ('ten', '10')]) == ((2,), (3,))
  assert answers.second_ids(Digits(), [('one', '1'), ('ten', '10')]) == {4: ((9,), (5,))}
  assert answers.first_ids(Digits(), [('one', '1'), ('maybe',)]) == ((2, 4), ())
  assert answers.second_ids(Digits(), [('one', '1'), ('maybe',)]) == {}


# Dependencies


def test_a_question_counts_with_those_that_it_depends_on():
  """DPG's own rule, through a chain: the grandchild of a wrong one counts nothing either. Of two images."""
  asked = (Question('a'), Question('b', parents=(0,)), Question('c', parents=(1,)), Question('d'),
           Question('e', parents=(0, 3)))
  right = np.array([[1, 0, 1, 1, 1], [1, 1, 1, 0, 1]], bool).T
  np.testing.assert_array_equal(records.with_parents(asked, right).T,
                                [[1, 0, 0, 1, 1], [1, 1, 1, 0, 0]])
  circle = (Question('a', parents=(1,)), Question('b', parents=(0,)), Question('c', parents=(2,)))
  np.testing.assert_array_equal(records.with_parents(circle, np.array([[1, 0, 1], [1, 1, 0]], bool).T).T,
                                [[0, 0, 1], [1, 1, 0]])


def test_questions_of_scenes_know_their_parents():
  constraints = language.parse('a red circle left of a blue star')
  made = scenes.questions(constraints)
  assert [question.text for question in made] == [
      'is there a red circle in the picture?', 'is there a blue star in the picture?', 'how many shapes are there?',
      'is the red circle left of the blue star?']
  assert made[2].answer == 'two' and made[3].parents == (0, 1)


# Tables


def test_macro_micro_and_the_best_of_several():
  """By hand: a has the prompts 1 and 2, b the prompts 2 and 3; all is a summary."""
  values = {'1': [0.0, 1.0], '2': [0.2, 0.4], '3': [0.6, 0.6]}
  categories = {'a': {k: values[k] for k in '12'}, 'b': {k: values[k] for k in '23'}, 'all': values}
  made = tables.report(tables.Scores('x', values, categories), summaries=('all',))
  mean = {name: row['mean']['value'] for name, row in made['categories'].items()}
  assert mean == {'a': 0.4, 'b': 0.45, 'all': 0.4667}
  assert {name: row['top']['value'] for name, row in made['categories'].items()} == {'a': 0.7, 'b': 0.5, 'all': 0.6667}
  assert made['macro']['mean']['value'] == 0.425 and made['macro']['top']['value'] == 0.6
  assert made['micro']['mean']['value'] == 0.4667 and made['micro']['top']['value'] == 0.6667
  assert made['macro']['categories'] == 2 and made['micro']['prompts'] == 3
  for row in (*made['categories'].values(), made['macro'], made['micro']):
    assert all(row[kind]['low'] <= row[kind]['value'] <= row[kind]['high'] for kind in ('mean', 'top'))
  lower = tables.report(tables.Scores('lpips', values, {}, higher=False))
  assert lower['micro']['top']['value'] == 0.2667 and 'macro' not in lower
  text = tables.markdown(made, 2)
  assert '| a | 2 | 0.400 |' in text and 'best of 2' in text and '| **macro**, mean of 2 categories |' in text
  single = tables.report(tables.Scores('x', {'1': [0.5]}, {}))
  assert 'top' not in single['micro'] and 'best of' not in tables.markdown(single, 1)


def test_intervals_shrink_with_the_number_of_prompts():
  rng = np.random.default_rng(0)
  width = []
  for n in (10, 1000):
    values = {str(i): [float(x)] for i, x in enumerate(rng.random(n))}
    row = tables.report(tables.Scores('x', values, dict(a=values, b=values)))
    width.append([row[name]['mean']['high'] - row[name]['mean']['low'] for name in ('micro', 'macro')])
  assert np.all(np.array(width[0]) > 5 * np.array(width[1]))


class Said:
  """A judge whose answers are given: a probability for each image, and of its questions those that are right."""

  def distances(self, images, others):
    return np.abs(images.astype(float) - others).mean(axis=(1, 2, 3))

  def shown(self, found, images):
    return np.array([image[0, 0, 0] / 100 for image in images])

  def answer(self, found, images):
    return [judging.Answer(np.arange(len(record.questions)) < image[0, 0, 1], np.full(len(record.questions), 0.25),
                           np.full(len(record.questions), image[0, 0, 1] > 0)) for record, image in zip(found, images)]


def painted(workdir, outputs, *colours):
  """A file of images of the colours given."""
  image = generation.grid([np.full((8, 8, 3), colour, np.uint8) for colour in colours])
  imaging.write_bytes(workdir / 'images' / outputs[0].path, imaging.encoded(image, outputs[0].encoding, 100))


def test_scores_of_a_set(tmp_path):
  """DPG by hand: of four images of a prompt with a chain of three questions 3, 1, 0, 2 are right."""
  found = read('dpg', lay(tmp_path, 'dpg'))
  layouts = [SETS['dpg'].layout(record, 4) for record in found]
  painted(tmp_path, layouts[0], (90, 3, 0), (10, 1, 0), (20, 0, 0), (40, 2, 0))
  with pytest.raises(UserError, match='1 of 2 prompts have not all their images.*images/COCOval1.png'):
    scoring.score(SETS['dpg'], found, 4, tmp_path, scoring.SCORES, {}, Said)
  painted(tmp_path, layouts[1], *[(50, 1, 0)] * 4)
  scored = scoring.score(SETS['dpg'], found, 4, tmp_path, scoring.SCORES, {}, Said)
  by_name = {table['name']: table for table in scored.tables}
  assert list(by_name) == ['vqascore', 'questions', 'questions_soft', 'questions_geometric']
  assert by_name['vqascore']['micro']['mean']['value'] == 0.45 and by_name['vqascore']['micro']['top']['value'] == 0.7
  questions = by_name['questions']
  assert scored.prompts[0]['questions'] == pytest.approx([1, 1 / 3, 0, 2 / 3])
  assert questions['micro']['mean']['value'] == 0.75 and questions['micro']['top']['value'] == 1
  assert {name: (row['prompts'], row['mean']['value']) for name, row in questions['categories'].items()} == {
      'entity - whole': (2, 0.875), 'attribute - color': (1, 0.5), 'relation - spatial': (1, 0.25)}
  assert questions['macro']['mean']['value'] == pytest.approx((0.875 + 0.5 + 0.25) / 3, abs=1e-4)
  assert by_name['questions_geometric']['micro']['mean']['value'] == 0.25
  assert scored.notes == ['3 of 16 questions were given none of their options as an answer, and count as wrong']


def test_prompts_without_questions_are_counted(tmp_path):
  found = read('oneig', lay(tmp_path, 'oneig'))
  for record in found:
    painted(tmp_path, SETS['oneig'].layout(record, 1), (30, 2, 0))
  scored = scoring.score(SETS['oneig'], found, 1, tmp_path, ('questions',), {}, Said)
  assert scored.notes == [
      'questions, questions_soft, questions_geometric: 1 of 2 prompts have what it wants']
  with pytest.raises(UserError, match='nothing of benchmark.scores=images can be measured'):
    scoring.score(SETS['oneig'], found, 1, tmp_path, ('images',), {}, Said)


def test_images_beside_the_truth_and_the_reference(tmp_path):
  """The true image is scaled to the size of the one that was made."""
  found = read('own', lay(tmp_path, 'own'))
  for record in found:
    painted(tmp_path, SETS['own'].layout(record, 1), (0, 0, 255))
  red = lambda images, truths: np.mean(truths[..., 0], axis=(1, 2)) - np.mean(images[..., 0], axis=(1, 2))
  scored = scoring.score(SETS['own'], found, 1, tmp_path, ('images',),
                         dict(psnr=images.psnr, lpips=red), Said)
  assert scored.prompts[0] == {} and scored.prompts[1]['lpips'] == [0] and scored.prompts[1]['psnr'][0] > 60
  assert scored.prompts[1]['lpips_to_reference'] == [255] and scored.prompts[1]['psnr_to_reference'][0] < 3


# The command


def test_the_embedded_model_from_prompts_to_tables(run, tmp_path):
  """GenEval's schema with prompts of scenes: images, the report of all and of a part, and a run that makes none."""
  prompts = lines(*(dict(tag=tag, include=[], prompt=prompt) for tag, prompt in (
      ('single_object', 'a big red circle'), ('counting', 'two blue stars'), ('counting', 'three green hearts'))))
  folder = lay(tmp_path, 'geneval', **{'evaluation_metadata.jsonl': prompts})
  with pytest.raises(UserError) as error:
    benchmark.read(benchmark.BenchmarkSettings('geneval', str(folder)))
  pinned = str(error.value).rpartition('benchmark.sha256=')[2]
  common = ['--config=configs/benchmark.py:geneval', f'--workdir={tmp_path / "run"}', '--config.sample.steps=1',
            f'--config.benchmark.path={folder}', f'--config.benchmark.sha256={pinned}', '--config.sample.guidance=1',
            '--config.benchmark.images=1', '--config.sample.batch_size=8']
  run(*common)
  workdir = tmp_path / 'run'
  times = {path: path.stat().st_mtime_ns for path in (workdir / 'images').rglob('*') if path.is_file()}
  assert len(times) == 6
  report = json.loads((workdir / 'report_part.json').read_text())  # the published set has 553
  assert (report['prompts'], report['prompts_of_set'], report['images_per_prompt']) == (3, 553, 1)
  assert report['files']['evaluation_metadata.jsonl'] == dict(sha256=pinned.partition('=')[2], published=False)
  assert report['judge']['name'] == 'tiny' and report['made_by']['origin']['model']['name'] == 'tiny'
  assert [table['name'] for table in report['tables']] == ['vqascore']
  assert '# geneval: 3 of 553 prompts' in (workdir / 'report_part.md').read_text()
  assert not (workdir / 'report.json').exists()
  run(*common, '--config.benchmark.only=counting', '--config.benchmark.stage=score')
  part = (workdir / 'report_part.md').read_text()
  assert '# geneval: 2 of 553 prompts' in part and "benchmark.only=('counting',)" in part
  assert times == {path: path.stat().st_mtime_ns for path in (workdir / 'images').rglob('*') if path.is_file()}
  scores = [json.loads(line) for line in (workdir / 'scores_part.jsonl').read_text().splitlines()]
  assert [row['id'] for row in scores] == ['00001', '00002'] and 0 <= scores[0]['scores']['vqascore'][0] <= 1
  with pytest.raises(UserError, match='settings.steps=1, and now it is 2'):
    run(*common, '--config.sample.steps=2')
  (workdir / 'images/00002/samples/00000.png').unlink()
  with pytest.raises(UserError, match='1 of 3 prompts have not all their images'):
    run(*common, '--config.benchmark.stage=score')


def test_a_whole_list_of_ones_own_and_images_of_elsewhere(tmp_path, mesh):
  """report.json is of the whole alone; what other programs made is scored as it is."""
  folder = lay(tmp_path, 'own', **{'prompts.jsonl': lines(dict(prompt='a red circle', target='black.png'))})
  workdir, black = tmp_path / 'run', np.zeros((64, 64, 3), np.uint8)
  imaging.write_png(folder / 'black.png', black)
  imaging.write_png(workdir / 'images/00000.png', black)
  config = command_line.read('benchmark', [
      f'benchmark.path={folder}', 'benchmark.stage=score', 'benchmark.judge_tiles=1'])
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=4, fsdp=2))):
    benchmark.run(config, workdir)
  report = json.loads((workdir / 'report.json').read_text())
  assert report['made_by'] is None and report['prompts'] == report['prompts_of_set'] == 1
  assert 'made by another program' in (workdir / 'report.md').read_text()
  values = {table['name']: table['micro']['mean']['value'] for table in report['tables']}
  assert values.pop('vqascore') < 0.2  # a black square is no red circle
  assert values == dict(psnr_db=78.1308, ssim=1, embedding_distance=pytest.approx(0, abs=1e-4))


def test_scenes_are_a_list_of_ones_own():
  files, found = benchmark.read(command_line.read('benchmark').benchmark)
  assert files.digests == {} and len(found) == scenes.PROMPTS
  chosen = benchmark.choose(found, benchmark.BenchmarkSettings(only=('3-4 objects',), examples=2))
  assert [i for i, _ in chosen] == [1, 3]
  with pytest.raises(UserError, match="no category '5 objects'; there are 1-2 objects, 3-4 objects"):
    benchmark.choose(found, benchmark.BenchmarkSettings(only=('5 objects',)))


@pytest.mark.parametrize('setting, sentence', [
    ('benchmark.set=coco', "benchmark.set='coco' must be one of 'geneval'"),
    ('benchmark.sha256=x', "benchmark.sha256: 'x' must be FILE=DIGEST"),
    ('benchmark.scores=fid', "benchmark.scores: 'fid' must be one of 'vqascore'"),
    ('benchmark.question=yes?', 'must have {} where'), ('sample.prompt=x', "sample.prompt is the set's to say"),
    ('benchmark.images=-1', 'benchmark.images=-1 must be between')])
def test_settings(setting, sentence):
  with pytest.raises(UserError) as error:
    configuration.check(command_line.read('benchmark', [setting]), 1)
  assert sentence in str(error.value)


def test_recipe():
  made = command_line.read('benchmark:gedit:krea2_turbo')
  assert made.benchmark.set == 'gedit' and made.weights == 'krea/Krea-2-Turbo' and made.sample.steps == 8
  with pytest.raises(UserError, match='has the sets geneval, geneval2, dpg'):
    command_line.read('benchmark:coco')
