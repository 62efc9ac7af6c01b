"""Public benchmarks: images that are made once, a judge that answers, dependencies, tables, and the command."""

import json
import pathlib
import zlib

from benchmark_sets import lay, lines, png, read
import jax
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy
from test_pipeline import random_pipe

from unifusion_jax import command_line, parts, sharding
from unifusion_jax import config as configuration
from unifusion_jax.commands import benchmark, describe
from unifusion_jax.data import imaging
from unifusion_jax.errors import UserError
from unifusion_jax.evaluation import answers, statistics
from unifusion_jax.evaluation.benchmarks import generation, judging
from unifusion_jax.evaluation.benchmarks.records import Record
from unifusion_jax.evaluation.benchmarks.sets import SETS
from unifusion_jax.request import SampleConfig, shape_like
from unifusion_jax.scenes import examples
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
  generation.identity(tmp_path, made_by | dict(settings=dict(steps=1, strengths=())))  # was refused before any image
  generation.identity(tmp_path, made_by)
  (tmp_path / 'images').mkdir()
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


def test_images_of_other_references_are_made_again(pipe, tmp_path):
  edits = read('imgedit', lay(tmp_path, 'imgedit', **{'1.png': png(size=(96, 64))}))
  wanted = jobs(pipe, 'imgedit', edits, 1)
  assert (wanted[0].height, wanted[0].width) == (48, 72) and len(wanted[0].requests[0].references) == 1
  generation.generate(pipe, SETS['imgedit'], wanted, tmp_path / 'run')
  assert generation.missing(tmp_path / 'run', wanted) == []
  lay(tmp_path, 'imgedit', **{'1.png': png('blue', size=(96, 64))})
  assert generation.missing(tmp_path / 'run', wanted) == wanted
  generation.generate(pipe, SETS['imgedit'], wanted, tmp_path / 'run')
  assert generation.missing(tmp_path / 'run', wanted) == []


def test_an_index_names_the_images_where_they_lie(tmp_path):
  (two,) = read('geneval2', lay(tmp_path, 'geneval2'))
  names = lambda path: json.loads((tmp_path / path).read_text())
  generation.write_index(tmp_path / 'one', SETS['geneval2'], [two], 1)
  assert names('one/image_paths.json') == {'two red stars': str(tmp_path / 'one/images/00000.png')}
  (tmp_path / 'one').rename(tmp_path / 'moved')
  generation.write_index(tmp_path / 'moved', SETS['geneval2'], [two], 1)
  assert names('moved/image_paths.json') == {'two red stars': str(tmp_path / 'moved/images/00000.png')}
  generation.write_index(tmp_path / 'several', SETS['geneval2'], [two], 2)
  assert [names(f'several/{i}/image_paths.json') for i in range(2)] == [
      {'two red stars': str(tmp_path / f'several/images/{i}/00000.png')} for i in range(2)]


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


# The command


@pytest.mark.slow
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


def test_what_no_judge_was_asked_about_is_judged_by_none(tmp_path, mesh):
  imaging.write_png(tmp_path / 'images/00000.png', np.zeros((64, 64, 3), np.uint8))
  benchmark.run(command_line.read('benchmark', [
      'benchmark.stage=score', 'benchmark.scores=exact', 'benchmark.examples=1']), tmp_path)
  report = json.loads((tmp_path / 'report_part.json').read_text())
  assert report['judge'] is None and [table['name'] for table in report['tables']] == ['exact']
  assert 'judged by' not in (tmp_path / 'report_part.md').read_text()


def noted(settings, workdir, **changes):
  """The command's configuration, and a workdir of which it is noted that its images were made by it."""
  config = command_line.read('benchmark', [f'benchmark.{name}={value}' for name, value in settings.items()])
  made_by = benchmark.made_by(config, parts.locate(config.weights))
  files = benchmark.read(config.benchmark)[0].digests
  generation.identity(workdir, dict(set=settings['set'], language='en', images=1, files=files) | made_by | changes)
  return config


def test_images_of_something_else_are_not_scored(tmp_path):
  """Another number, list or language than that of which they were made; sampling settings are not asked for."""
  folder, workdir = lay(tmp_path, 'own', **{'prompts.jsonl': lines(dict(prompt='a red circle'))}), tmp_path / 'run'
  settings = dict(set='own', path=folder, stage='score', images=1)
  config = noted(settings, workdir, seed=5)
  with pytest.raises(UserError, match='1 of 1 prompts have not all their images'):
    benchmark.run(config, workdir)
  with pytest.raises(UserError, match='holds images of images=1, and now it is 4: give another --workdir'):
    benchmark.run(command_line.read('benchmark', ['benchmark.set=own', f'benchmark.path={folder}',
                                                  'benchmark.stage=score', 'benchmark.images=4']), workdir)
  lay(tmp_path, 'own', **{'prompts.jsonl': lines(dict(prompt='a blue circle'))})
  with pytest.raises(UserError, match='holds images of files.prompts.jsonl='):
    benchmark.run(config, workdir)
  with pytest.raises(UserError, match="holds images of language='zh', and now it is 'en'"):
    benchmark.run(noted(settings, tmp_path / 'zh', language='zh'), tmp_path / 'zh')


def test_an_index_is_written_where_no_image_is(tmp_path, monkeypatch):
  """A run that was ended before it, or whose workdir moved, gets it by the same command."""
  monkeypatch.setitem(SETS['geneval2'].known, 'geneval2_data.jsonl', '')
  workdir, image = tmp_path / 'run', png()
  config = noted(dict(set='geneval2', path=lay(tmp_path, 'geneval2'), stage='generate'), workdir)
  imaging.write_bytes(workdir / 'images/00000.png', image)
  (workdir / generation.LOG).write_text(lines(
      dict(file='00000.png', id='00000', bytes=len(image), crc32=zlib.crc32(image))))
  benchmark.run(config, workdir)
  assert json.loads((workdir / 'image_paths.json').read_text()) == {
      'two red stars': str(workdir / 'images/00000.png')}


def test_a_lora_is_known_by_its_weights(tmp_path):
  path = tmp_path / 'lora.safetensors'
  adapt = lambda value: safetensors.numpy.save_file({'blocks.0.attn.to_q.lora_A.weight': np.full((1, 4), value)}, path)
  adapt(1.0)
  found = lambda scale: benchmark.made_by(
      command_line.read('benchmark', [f'sample.loras={path}:{scale}']), parts.locate('tiny'))
  generation.identity(tmp_path / 'run', found(0.5))
  (tmp_path / 'run' / 'images').mkdir()
  generation.identity(tmp_path / 'run', found(0.5))
  with pytest.raises(UserError, match='weights.loras.0.scale=0.5, and now it is 0.8'):
    generation.identity(tmp_path / 'run', found(0.8))
  adapt(2.0)
  with pytest.raises(UserError, match='weights.loras.0.file='):
    generation.identity(tmp_path / 'run', found(0.5))


@pytest.mark.parametrize('name, category, chosen', [
    ('dpg', 'entity - whole', [0, 1]), ('dpg', 'attribute - color', [0]), ('dpg', 'entity', [0, 1]),
    ('geneval2', 'count', [0]), ('geneval2', '3 atoms', [0]), ('geneval', 'counting', [1])])
def test_a_part_by_a_category_of_prompts_or_of_questions(tmp_path, name, category, chosen):
  found, settings = read(name, lay(tmp_path, name)), command_line.read('benchmark', [f'benchmark.only={category}'])
  assert [i for i, _ in benchmark.choose(found, settings.benchmark)] == chosen


def test_scenes_are_a_list_of_ones_own():
  files, found = benchmark.read(command_line.read('benchmark').benchmark)
  assert files.digests == {} and len(found) == scenes.PROMPTS
  chosen = benchmark.choose(found, benchmark.BenchmarkSettings(only=('3-4 objects',), examples=2))
  assert [i for i, _ in chosen] == [1, 3]
  with pytest.raises(UserError, match="no category '5 objects'; there are 1-2 objects, 3-4 objects, background, "):
    benchmark.choose(found, benchmark.BenchmarkSettings(only=('5 objects',)))


@pytest.mark.parametrize('setting, sentence', [
    ('benchmark.set=coco', "benchmark.set='coco' must be one of 'geneval'"),
    ('benchmark.sha256=x', "benchmark.sha256: 'x' must be FILE=DIGEST"),
    ('benchmark.scores=fid', "benchmark.scores: 'fid' must be one of 'vqascore'"),
    ('benchmark.question=yes?', 'must have {} where'), ('sample.prompt=x', "sample.prompt is the set's to say"),
    ('benchmark.images=-1', 'benchmark.images=-1 must be between'),
    ('sample.num_images=4', 'sample.num_images is not read here: give benchmark.images')])
def test_settings(setting, sentence):
  with pytest.raises(UserError) as error:
    configuration.check(command_line.read('benchmark', [setting]), 1)
  assert sentence in str(error.value)


def test_sides_that_cannot_be_are_refused_before_anything_is_written(tmp_path):
  config = command_line.read('benchmark', ['benchmark.path=scenes', 'sample.width=100'])
  with pytest.raises(UserError, match='sample.width=100 must be a multiple of 8 pixels'):
    benchmark.run(config, tmp_path)
  assert not list(tmp_path.iterdir())


def test_recipe():
  made = command_line.read('benchmark:gedit:krea2_turbo')
  assert made.benchmark.set == 'gedit' and made.weights == 'krea/Krea-2-Turbo' and made.sample.steps == 8
  with pytest.raises(UserError, match='has the sets geneval, geneval2, dpg'):
    command_line.read('benchmark:coco')
