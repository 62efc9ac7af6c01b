"""Sets: what each benchmark is, where its files come from, and the files that its own scorer takes.

A layout gives, of a record and the number of its images, the files below `images/` and which of the images are in each.
SHA-256 are of files that were read whole at the commits that stand beside them.
"""

from collections.abc import Callable
import dataclasses
import json

from unifusion_jax.data import imaging
from unifusion_jax.errors import UserError
from unifusion_jax.evaluation.benchmarks import readers
from unifusion_jax.evaluation.benchmarks.files import Files
from unifusion_jax.evaluation.benchmarks.records import checked, Record

MODEL = 'model'  # folder of the model's images where a layout wants its name


@dataclasses.dataclass(frozen=True)
class Output:
  """A file of images: its path below `images/`, and the numbers of the prompt's images in it; several are a grid."""
  path: str
  numbers: tuple[int, ...]

  @property
  def encoding(self) -> str:
    """One of `imaging.ENCODINGS`."""
    return self.path.rpartition('.')[2]


@dataclasses.dataclass(frozen=True)
class Set:
  """A benchmark.

  Attributes:
    source: where its files are, for messages: a repository at a commit, or a dataset.
    hub: the dataset on the hub that `benchmark.path` may be left out for; '' for none.
    patterns: of the files that are fetched from there.
    known: {file name: SHA-256, or git's id of the content} of those that are known.
    prompts: {language: numbers of prompts} of the published editions, the usual one first; {} for a list of one's own.
    images: of each prompt, as its scorer expects them.
    layout: `layout(record, images)` -> the files.
    beside: `beside(record, output)` -> {path below images/: content} of further files that the scorer reads.
    index: name of a file beside images/ that gives its scorer the path of each prompt's image, '' for none; where there
      are several of a prompt, in a folder for each number.
    summaries: categories that hold others: rows of the tables that no macro average counts.
  """
  read: Callable[[Files, str, str | None], list[Record]]
  source: str
  layout: Callable[[Record, int], list[Output]]
  hub: str = ''
  patterns: tuple[str, ...] = ('*.json', '*.jsonl')
  known: dict[str, str] = dataclasses.field(default_factory=dict)
  prompts: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
  images: int = 1
  beside: Callable[[Record, Output], dict[str, bytes]] = lambda record, output: {}
  index: str = ''
  summaries: tuple[str, ...] = ()

  def records(self, files: Files, language: str, references: str | None) -> list[Record]:
    """The set's records. UserError, with file and line, for files that cannot be read."""
    if self.prompts and language not in self.prompts:
      raise UserError(f'benchmark.language={language!r}: this set has {" and ".join(map(repr, self.prompts))}')
    return checked(self.read(files, language, references))


def _each(path: str) -> Callable[[Record, int], list[Output]]:
  """A file an image; where there are several, in a folder for each number, which its scorer takes one after another."""
  def layout(record: Record, images: int) -> list[Output]:
    name = path.format(id=record.id, folder=record.folder)
    return [Output(f'{i}/{name}' if images > 1 else name, (i,)) for i in range(images)]
  return layout


def _grid(path: str) -> Callable[[Record, int], list[Output]]:
  """All images of a prompt in one file, row by row, two beside each other."""
  def layout(record: Record, images: int) -> list[Output]:
    if images not in (1, 4):
      raise UserError(f'benchmark.images={images}: the scorer of this set cuts a file into 4 images or takes it whole: '
                      'give 4 or 1')
    name = record.id.removeprefix(f'{record.folder}_')
    return [Output(path.format(id=name, folder=record.folder), tuple(range(images)))]
  return layout


def _geneval(record: Record, images: int) -> list[Output]:
  return [Output(f'{record.id}/samples/{i:05}.png', (i,)) for i in range(images)]


SETS = {
    'geneval': Set(
        readers.geneval, 'https://github.com/djghosh13/geneval at af4902f, prompts/evaluation_metadata.jsonl', _geneval,
        known={'evaluation_metadata.jsonl': '5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13'},
        prompts={'en': (553,)}, images=4,
        beside=lambda record, output: {f'{record.id}/metadata.jsonl': json.dumps(record.line).encode()}),
    'geneval2': Set(
        readers.geneval2, 'https://github.com/facebookresearch/GenEval2 at a6e82d2, geneval2_data.jsonl',
        _each('{id}.png'),
        known={'geneval2_data.jsonl': '09233adbc9f877fba205f1a20efa4a8640e7e62a91dfd55893562bed8a928e43'},
        prompts={'en': (800,)}, index='image_paths.json'),
    'dpg': Set(
        readers.dpg, 'https://github.com/TencentQQGYLab/ELLA at 3c228f1, dpg_bench/dpg_bench.csv', _grid('{id}.png'),
        known={'dpg_bench.csv': '98457fc9901943f51ff9a30367250fc292533bed'},  # git's id: its content was not at hand
        prompts={'en': (1065,)}, images=4),
    'genai': Set(
        readers.genai, 'the dataset BaiqiL/GenAI-Bench-1600', _each('{id}.jpeg'), hub='BaiqiL/GenAI-Bench-1600',
        patterns=('genai_image.json', 'genai_skills.json'), prompts={'en': (1600, 527)},
        summaries=('basic', 'advanced')),
    'oneig': Set(
        readers.oneig, 'https://github.com/OneIG-Bench/OneIG-Benchmark at 41b4983, OneIG-Bench.csv and its scripts',
        _grid(f'{{folder}}/{MODEL}/{{id}}.webp'),
        known={'OneIG-Bench.csv': 'e06c65b32252d82406fb1a27f13022b38d432c899a2486eb49ab0c100f83b3e1',
               'OneIG-Bench-ZH.csv': '8fc4ae1403db32dbb1203cc457361c3215500b34e741194a53f5002c9d824700',
               'human.json': '0e92b25c6bc4091cac05fa0f4269b3b37465a7cd43ca2768f55f56149cdbf13b',
               'object.json': '350dfdf72c2da143c78a7544d4c554faf6698c1ba4fcd27c7a9cc9199d487e0e',
               'anime.json': '21ea3d0360e69d72bc5f4cbb93b203d293d16f5c2f626634a52b990119e0a6e3',
               'human_zh.json': '819f13b1efab67bdfba9ca633a37e009013350d148323f5d65b2a467f1789c64',
               'object_zh.json': '19f69cfdf17119ff5400919341c930468a0de5ee06b9c91d8f16ba2365f51498',
               'anime_zh.json': '171740d2d7158f0da2d907481b5cd97380398e4a45b53f0976ad4d91e01151d4',
               'multilingualism_zh.json': '63614e72dbd86f1e56ed625a55f73d509323d34b68fb27d8fed0f87a49f69db9'},
        prompts={'en': (1120,), 'zh': (1320,)}, images=4),
    'imgedit': Set(
        readers.imgedit, 'https://github.com/PKU-YuanGroup/ImgEdit at 547185d, Benchmark/Basic/basic_edit.json, with '
        'the images of Benchmark.tar of the dataset sysuyy/ImgEdit', _each('{id}.png'),
        known={'basic_edit.json': '5ee9b7d61e918692416f79896300f738598c83adff8de737b25be4aaff72dc69'},
        prompts={'en': (737,)}),
    'gedit': Set(
        readers.gedit, 'the dataset stepfun-ai/GEdit-Bench', _each('{folder}/{id}.png'), hub='stepfun-ai/GEdit-Bench',
        patterns=('*.arrow', '*.parquet'), prompts={'en': (606,), 'zh': (606,)}, summaries=('intersection',),
        beside=lambda record, output: {f'{output.path.removesuffix(".png")}_SRCIMG.png': imaging.png_bytes(
            imaging.read(record.line['input_image']))}),  # pyrefly: ignore[unsupported-operation]
    'own': Set(readers.own, 'a folder with prompts.jsonl', _each('{id}.png')),
}
