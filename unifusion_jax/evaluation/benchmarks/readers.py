"""Readers: the public files of each set as records. The schemas are those of the repositories that sets.py names."""

import json
import pathlib

from unifusion_jax.errors import UserError
from unifusion_jax.evaluation.benchmarks.files import Files, listed, named, text
from unifusion_jax.evaluation.benchmarks.records import Question, Record

ONEIG = {'Anime_Stylization': 'anime', 'Portrait': 'human', 'General_Object': 'object', 'Text_Rendering': 'text',
         'Knowledge_Reasoning': 'reasoning', 'Multilingualism': 'multilingualism'}  # category -> folder


def geneval(files: Files, language: str, references: str | None) -> list[Record]:
  """GenEval (arXiv 2310.11513): an object a line, with `tag` and `prompt`; its scorer wants the whole line back."""
  del language, references
  records = []
  for i, (place, row) in enumerate(files.json_lines('evaluation_metadata.jsonl', 'prompts/evaluation_metadata.jsonl')):
    with named(place):
      prompt = text(row['prompt'], 'prompt')
      records.append(Record(f'{i:05}', prompt, place, (text(row['tag'], 'tag'),), caption=prompt, line=row))
  return records


def geneval2(files: Files, language: str, references: str | None) -> list[Record]:
  """GenEval 2 (arXiv 2512.16853): `vqa_list` has the questions with their answers, `skills` what each is about."""
  del language, references
  records = []
  for i, (place, row) in enumerate(files.json_lines('geneval2_data.jsonl')):
    with named(place):
      questions = tuple(Question(text(question, 'question'), text(answer, 'answer').lower(), text(skill, 'skill'))
                        for (question, answer), skill in zip(row['vqa_list'], row['skills'], strict=True))
      prompt = text(row['prompt'], 'prompt')
      records.append(Record(f'{i:05}', prompt, place, (f'{int(row["atom_count"])} atoms',), questions, prompt))
  return records


def dpg(files: Files, language: str, references: str | None) -> list[Record]:
  """DPG-Bench (arXiv 2403.05135): a row a question, with the prompt, in the order of the propositions of its prompt.

  A question's category is the text of its `tuple` before the bracket, as its scorer takes it: 'entity - whole'. The one
  that holds it is that before the dash.
  """
  del language, references
  grouped: dict[str, list] = {}
  columns = ('item_id', 'text', 'proposition_id', 'dependency', 'tuple', 'question_natural_language')
  for place, row in files.csv_rows(columns, 'dpg_bench.csv', 'dpg_bench/dpg_bench.csv'):
    grouped.setdefault(row['item_id'].strip(), []).append((place, row))
  records = []
  for key, rows in grouped.items():
    numbered, questions = {}, []
    for i, (place, row) in enumerate(rows):
      with named(place):
        if numbered.setdefault(int(row['proposition_id']), i) != i:
          raise UserError(f'{place}: proposition {row["proposition_id"]} of {key!r} is there twice')
    for place, row in rows:
      with named(place):
        parents = [int(number) for number in row['dependency'].split(',')]
        if missing := [parent for parent in parents if parent and parent not in numbered]:
          raise UserError(f'{place}: it depends on proposition {missing[0]} of {key!r}, which is not there')
        category = row['tuple'].partition('(')[0].strip()
        broad = category.partition('-')[0].strip() if '-' in category else ''
        questions.append(Question(row['question_natural_language'].strip(), 'yes', category,
                                  tuple(numbered[parent] for parent in parents if parent), broad))
    place, row = rows[0]
    records.append(Record(key, row['text'].strip(), place, (), tuple(questions), row['text'].strip()))
  return records


def genai(files: Files, language: str, references: str | None) -> list[Record]:
  """GenAI-Bench (arXiv 2406.13743): prompts by number, and the numbers of each skill's prompts."""
  del language, references
  (path, prompts), (skills_path, skills) = files.json('genai_image.json'), files.json('genai_skills.json')
  tagged: dict[str, list[str]] = {}
  for skill, numbers in skills.items():
    with named(f'{skills_path} {skill!r}'):
      for number in numbers:
        key = f'{number:05d}'
        if key not in prompts:
          raise UserError(f'{skills_path} {skill!r}: prompt {key} is not in {path}: take both files of one edition')
        tagged.setdefault(key, []).append(skill)
  records = []
  for key, entry in prompts.items():
    with named(f'{path} {key!r}'):
      prompt = text(entry['prompt'], 'prompt')
      records.append(Record(key, prompt, f'{path} {key!r}', tuple(tagged.get(key, ())), caption=prompt))
  return records


def oneig(files: Files, language: str, references: str | None) -> list[Record]:
  """OneIG-Bench (arXiv 2506.07977), the English or the Chinese half, with the questions of its alignment score.

  Text rendering and reasoning have no such questions: their own scorers read text, and compare with texts.
  """
  del references
  column, suffix = ('prompt_en', '') if language == 'en' else ('prompt_cn', '_zh')
  table = 'OneIG-Bench.csv' if language == 'en' else 'OneIG-Bench-ZH.csv'
  asked: dict[str, dict] = {}
  records = []
  for place, row in files.csv_rows(('category', 'id', column), table):
    with named(place):
      if row['category'] not in ONEIG:
        raise UserError(f'{place}: the category {row["category"]!r} is none of {", ".join(ONEIG)}')
      folder, questions = ONEIG[row['category']], ()
      if folder in ('anime', 'human', 'object', 'multilingualism'):
        name = f'{folder}{suffix}.json'
        if folder not in asked:
          asked[folder] = files.json(f'scripts/alignment/Q_D/{name}', name)[1]
        with named(f'{name} {row["id"]!r}'):
          questions = _oneig_questions(asked[folder][row['id']])
      records.append(Record(f'{folder}_{row["id"]}', row[column].strip(), place, (row['category'],), questions,
                            row[column].strip(), folder=folder))
  return records


def _oneig_questions(entry: dict) -> tuple[Question, ...]:
  """Questions by number, and their parents' numbers, each a JSON text or an object."""
  asked, parents = ({int(number): value for number, value in (
      json.loads(entry[name]) if isinstance(entry[name], str) else entry[name]).items()}
      for name in ('question', 'dependency'))
  places = {number: i for i, number in enumerate(asked)}
  if missing := [parent for number in asked for parent in parents[number] if parent and parent not in places]:
    raise UserError(f'a question depends on question {missing[0]}, which is not there')
  return tuple(Question(text(question, 'a question'), parents=tuple(places[p] for p in parents[number] if p))
               for number, question in asked.items())


def imgedit(files: Files, language: str, references: str | None) -> list[Record]:
  """ImgEdit-Bench, basic (arXiv 2505.20275): edits by name, with the path of the original below `references`."""
  del language
  path, edits = files.json('basic_edit.json', 'Benchmark/Basic/basic_edit.json')
  originals, records = pathlib.Path(references) if references else path.parent, []
  for key, entry in edits.items():
    place = f'{path} {key!r}'
    with named(place):
      original = originals / text(entry['id'], 'id')
      if not original.is_file():
        raise UserError(f'{place}: {original} is not there: unpack the images of the set and give their folder, '
                        '--config.benchmark.references=FOLDER')
      records.append(Record(key, text(entry['prompt'], 'prompt'), place, (text(entry['edit_type'], 'edit_type'),),
                            references=(str(original),)))
  return records


def gedit(files: Files, language: str, references: str | None) -> list[Record]:
  """GEdit-Bench (arXiv 2504.17761), the edits in one language; the tables hold the originals themselves."""
  del references
  columns = ('task_type', 'key', 'instruction', 'instruction_language', 'input_image', 'input_image_raw',
             'Intersection_exist')
  wanted, records = 'en' if language == 'en' else 'cn', []
  for place, row in files.tables(columns):
    with named(place):
      if row['instruction_language'] != wanted:
        continue
      image, resized = (_bytes(row[name], name) for name in ('input_image_raw', 'input_image'))
      task = text(row['task_type'], 'task_type')
      categories = (task, 'intersection') if row['Intersection_exist'] else (task,)
      records.append(Record(text(row['key'], 'key'), text(row['instruction'], 'instruction'), place, categories,
                            references=(image,), folder=f'fullset/{task}/{wanted}', line=dict(input_image=resized)))
  return records


def _bytes(value, name: str) -> bytes:
  """The encoded image of a column of `datasets`."""
  image = value['bytes'] if isinstance(value, dict) else value
  if not isinstance(image, bytes) or not image:
    raise UserError(f'its {name} holds no image')
  return image


def own(files: Files, language: str, references: str | None) -> list[Record]:
  """A list of one's own, prompts.jsonl: an object a line; null stands for what is left out.

    prompt     what is asked for, with references an instruction; the only one that every line must have.
    id         a name; without one the number of the line among all, from 00000.
    category   a text, or a list of several.
    references, target   paths from the list's folder, or from `references` where that is given.
    caption    what the image is to show, of an edit; of a text to image the prompt.
    questions  texts to answer with yes, or objects with `question`, `answer` ('yes' where it is left out), `category`
               and `parents`, the numbers from 1 of the questions that it depends on.
  """
  del language
  folder = pathlib.Path(references) if references else files.path('prompts.jsonl').parent
  records = []
  for i, (place, row) in enumerate(files.json_lines('prompts.jsonl')):
    with named(place):
      row = _given(row, {'prompt', 'id', 'category', 'references', 'target', 'caption', 'questions'})
      prompt, category = text(row['prompt'], 'prompt'), row.get('category', [])
      categories = [category] if isinstance(category, str) else listed(category, 'category')
      images = [str(folder / text(path, 'a reference')) for path in listed(row.get('references', []), 'references')]
      target = str(folder / text(row['target'], 'target')) if 'target' in row else None
      for path in (*images, *filter(None, [target])):
        if not pathlib.Path(path).is_file():
          raise UserError(f'{place}: {path} is not there')
      questions = tuple(_own_question({'question': each} if isinstance(each, str) else each)
                        for each in listed(row.get('questions', []), 'questions'))
      records.append(Record(
          str(row.get('id', f'{i:05}')), prompt, place, tuple(map(_category, categories)), questions,
          text(row.get('caption', ''), 'caption') or ('' if images else prompt), tuple(images), target))
  return records


def _own_question(entry: dict) -> Question:
  entry = _given(entry, {'question', 'answer', 'category', 'parents'}, 'a question: ')
  return Question(text(entry['question'], 'question'), text(entry.get('answer', 'yes'), 'answer').lower(),
                  _category(entry['category']) if 'category' in entry else '',
                  tuple(int(parent) - 1 for parent in listed(entry.get('parents', []), 'parents')))


def _category(value) -> str:
  if not text(value, 'category').strip():
    raise UserError('a category is empty: name it, or leave it out')
  return value


def _given(row: dict, known: set[str], what: str = '') -> dict:
  """The values that are given; UserError for an unknown name."""
  if unknown := sorted({*row} - known):
    raise UserError(f'{what}there is no column {unknown[0]!r}: there are {", ".join(sorted(known))}')
  return {name: value for name, value in row.items() if value is not None}
