"""Files of public benchmarks for tests, made up, in the columns of the public ones."""

import io
import json
import pathlib

from PIL import Image

from unifusion_jax.evaluation.benchmarks.files import Files
from unifusion_jax.evaluation.benchmarks.records import Record
from unifusion_jax.evaluation.benchmarks.sets import SETS


def png(colour='red', size=(64, 64)) -> bytes:
  file = io.BytesIO()
  Image.new('RGB', size, colour).save(file, 'PNG')
  return file.getvalue()


def lines(*rows) -> str:
  return ''.join(json.dumps(row) + '\n' for row in rows)


DPG = ('item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,'
       'question_natural_language\n'
       '7,"a red circle, and a star",,1,0,entity,whole,entity - whole (circle),Is there a circle?\n'
       '7,"a red circle, and a star",,2,1,attribute,color,"attribute - color (circle, red)",Is the circle red?\n'
       '7,"a red circle, and a star",,3,"1, 2",relation,spatial,"relation - spatial (a, b)",Is it left of the star?\n'
       'COCOval1,a star,,1,0,entity,whole,entity - whole (star),Is there a star?\n')
ONEIG = ('category,id,prompt_en,type,prompt_length,class\n'
         'Anime_Stylization,000,"a girl, smiling","T, P",short,\nText_Rendering,000,a sign,NP,short,\n')
ASKED = {'000': {'question': '{"1": "Is there a girl?", "2": "Does she smile?"}', 'dependency': '{"1": [0], "2": [1]}'}}
# set -> {file: content}, as the public files have it
FILES = {
    'geneval': {'prompts/evaluation_metadata.jsonl': lines(
        dict(tag='single_object', include=[{'class': 'circle', 'count': 1}], prompt='a red circle'),
        dict(tag='counting', include=[{'class': 'star', 'count': 2}], prompt='two stars'))},
    'geneval2': {'geneval2_data.jsonl': lines(
        dict(prompt='two red stars', atom_count=3, vqa_list=[['How many stars are there?', 'two'],
                                                             ['Are the stars red?', 'Yes']],
             skills=['count', 'attribute']))},
    'dpg': {'dpg_bench/dpg_bench.csv': DPG},
    'genai': {'genai_image.json': json.dumps({f'{i:05}': dict(id=f'{i:05}', prompt=f'prompt {i}', models={})
                                              for i in range(3)}),
              'genai_skills.json': json.dumps({'counting': [1], 'basic': [0], 'advanced': [1], 'attribute': [0, 1]})},
    'oneig': {'OneIG-Bench.csv': ONEIG, 'scripts/alignment/Q_D/anime.json': json.dumps(ASKED)},
    'imgedit': {'basic_edit.json': json.dumps({
        '1082': dict(id='animal/1.png', prompt='make it blue', edit_type='adjust')}), 'animal/1.png': png()},
    'own': {'prompts.jsonl': lines(
        dict(prompt='a red circle', id='one', category='easy', questions=[
            'is there a circle?', dict(question='how many?', answer='one', category='count', parents=[1])]),
        dict(prompt='make it blue', references=['a.png'], target='b.png', caption='a blue square')),
        'a.png': png(), 'b.png': png('blue')}}


def lay(folder: pathlib.Path, name: str, **changes) -> pathlib.Path:
  """The files of a set in a folder; changes: {name of a file: other content}."""
  for path, content in FILES[name].items():
    content = changes.get(pathlib.PurePath(path).name, content)
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())
  return folder


def read(name: str, folder: pathlib.Path, language: str = 'en') -> list[Record]:
  return SETS[name].records(Files.locate(str(folder), SETS[name].patterns), language, None)
