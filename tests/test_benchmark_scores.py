"""Scores of public benchmarks: dependencies of questions, tables, and what is measured of a set's images."""

import json

from benchmark_sets import lay, read
import numpy as np
import pytest

from unifusion_jax import metadata
from unifusion_jax.data import imaging
from unifusion_jax.errors import UserError
from unifusion_jax.evaluation import images, statistics
from unifusion_jax.evaluation.benchmarks import generation, judging, records, scoring, tables
from unifusion_jax.evaluation.benchmarks.records import Question, Record
from unifusion_jax.evaluation.benchmarks.sets import SETS
from unifusion_jax.scenes import language
from unifusion_jax.scenes.evaluation import benchmark as scenes


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
  monkeypatch.setattr(statistics, 'RESAMPLES', 200)


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
  assert single['micro']['mean'] == dict(value=0.5, low=None, high=None)  # one prompt has no interval
  assert tables.markdown(single, 1).endswith('| 1 | 0.500 |  |')
  values = {name: [1.0] for name in '123'}
  right = tables.report(tables.Scores('x', values, {'a': {name: [1.0] for name in '12'}, 'b': {'3': [1.0]}}))
  low, high = statistics.wilson(3, 3)
  assert right['micro']['mean'] == dict(value=1, low=round(low, 4), high=high)  # three right of three are no certainty
  assert right['categories']['b']['mean']['low'] is right['macro']['mean']['low'] is None


def test_a_row_of_questions_is_the_mean_of_all_of_them():
  """By hand: of prompts with 1, 2 and 3 questions in c one each is right, so 3 of 6; the one question in d is wrong."""
  values = {'1': [1.0], '2': [1 / 2], '3': [1 / 3, 1.0]}
  scores = tables.Scores('questions', values, {'all': values, 'c': values, 'd': {'3': [0.0, 1.0]}},
                         {'all': {'1': 1, '2': 2, '3': 3}, 'c': {'1': 1, '2': 2, '3': 3}, 'd': {'3': 1}})
  made = tables.report(scores, {'all'})
  assert list(made['categories']) == ['c', 'd', 'all'] and made['macro']['categories'] == 2
  row = made['categories']['c']
  assert row['mean']['value'] == round((1 + 1 + 2) / 6, 4) and row['top']['value'] == round((1 + 1 + 3) / 6, 4)
  assert made['macro']['mean']['value'] == round((4 / 6 + 1 / 2) / 2, 4)
  assert made['micro']['mean']['value'] == round((1 + 1 / 2 + 2 / 3) / 3, 4)
  low, high = statistics.bootstrap([[1, 1], [1, 2], [2, 3]], lambda rows: rows[:, 0].sum() / rows[:, 1].sum())
  assert (row['mean']['low'], row['mean']['high']) == (round(low, 4), round(high, 4))


def test_a_category_without_a_name_is_not_the_whole():
  values = {'1': [1.0], '2': [0.0]}
  made = tables.report(tables.Scores('x', values, {'': {'1': [1.0]}}))
  assert made['categories']['']['mean']['value'] == 1 and made['micro']['mean']['value'] == 0.5


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
      'entity - whole': (2, 0.875), 'attribute - color': (1, 0.5), 'relation - spatial': (1, 0.25),
      'entity': (2, 0.875), 'attribute': (1, 0.5), 'relation': (1, 0.25)}
  assert questions['macro']['mean']['value'] == pytest.approx((0.875 + 0.5 + 0.25) / 3, abs=1e-4)
  assert by_name['questions_geometric']['micro']['mean']['value'] == 0.25
  assert scored.notes == ['3 of 16 questions were given none of their options as an answer, and count as wrong']


def test_the_first_level_of_dpg_holds_all_questions_of_its_rows(tmp_path):
  """By hand: one of 1 and one of 2 in entity - whole, 0 of 3 in entity - part, so 2 of 6 in entity."""
  asked = lambda count, name: [Question('?', category=f'entity - {name}', broad='entity')] * count
  found = [Record(str(i), 'x', '', questions=tuple(questions)) for i, questions in enumerate((
      asked(1, 'whole'), asked(2, 'whole') + asked(3, 'part')))]
  for record in found:
    painted(tmp_path, SETS['dpg'].layout(record, 1), (0, 1, 0))
  scored = scoring.score(SETS['dpg'], found, 1, tmp_path, ('questions',), {}, Said)
  table = scored.tables[0]
  assert {name: row['mean']['value'] for name, row in table['categories'].items()} == {
      'entity - whole': 0.6667, 'entity - part': 0, 'entity': 0.3333}
  assert table['macro']['categories'] == 2 and table['macro']['mean']['value'] == 0.3333
  assert table['micro']['mean']['value'] == 0.6


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
  assert scored.judged and scored.prompts[1]['embedding_distance'] == [0]
  assert scored.prompts[1]['embedding_distance_to_reference'] == [170]


def test_images_of_other_references_are_not_scored(tmp_path):
  folder = lay(tmp_path, 'own')
  found = read('own', folder)
  outputs = [SETS['own'].layout(record, 1) for record in found]
  for each in outputs:
    painted(tmp_path, each, (0, 0, 255))
  made_of = [[metadata.digest(reference) for reference in record.references] for record in found]
  assert [len(each) for each in made_of] == [0, 1]
  (tmp_path / generation.LOG).write_text(''.join(
      json.dumps(dict(file=each[0].path, references=digests)) + '\n' for each, digests in zip(outputs, made_of)))
  check = lambda: generation.check_references(tmp_path, SETS['own'], found, 1)
  check()
  imaging.write_png(found[1].references[0], np.full((8, 8, 3), 7, np.uint8))
  with pytest.raises(UserError, match=f'1 files .* other references .* images/{outputs[1][0].path}'):
    check()


def test_no_more_images_are_embedded_than_there_are(monkeypatch):
  monkeypatch.setattr(judging, 'embedding_distance', lambda vlm, encoder, images, others, batch_size: batch_size)
  judge, images = judging.Judge(None, None, None, 3, '', ''), np.zeros((4, 8, 8, 3), np.uint8)
  assert [judge.distances(images[:n], images[:n]) for n in (1, 4)] == [1, 3]
