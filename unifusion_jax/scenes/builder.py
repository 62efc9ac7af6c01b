"""Scenes as a TFDS dataset in ArrayRecord files, written and read without TensorFlow.

  python -m unifusion_jax.scenes.builder --out=DIR --task=edit --split=train --examples=10000

Writes DIR/scenes/edit_train/1.0.0 in the schema of data/sources.py, example i at index i. Read it back with
`data.sources.ArrayRecordSource(DIR, 'edit', 'train')`, or with `tfds.builder_from_directory(...).as_data_source()`.
"""

import dataclasses
import io

from absl import app, flags
import tensorflow_datasets as tfds

from unifusion_jax import command_line, errors
from unifusion_jax.data import imaging
from unifusion_jax.errors import UserError
from unifusion_jax.scenes import sources, splits

TASKS = ('t2i', 'edit', 'reconstruct', 'multi')  # with a target image; also with numbers of objects, as in 't2i/1-2'


@dataclasses.dataclass(eq=False)
class ScenesConfig(tfds.core.BuilderConfig):
  """One task in one split, named task_split."""
  task: str = 't2i'
  split: str = 'train'
  size: int = 64
  examples: int = 10_000
  seed: int = 0


class Scenes(tfds.core.GeneratorBasedBuilder):
  """Examples of the embedded world, with images as PNG."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    image = tfds.features.Image(shape=(None, None, 3), encoding_format='png')
    text = tfds.features.Text()
    return tfds.core.DatasetInfo(
        builder=self, description=__doc__,
        features=tfds.features.FeaturesDict({
            'references': tfds.features.Sequence(image), 'instruction': text, 'target': image, 'caption': text,
            'kind': text, 'style': text, 'task': text, 'source': tfds.features.Sequence(text), 'scene': text,
            'constraints': text}),
        # [height, width, references] of each example: its bucket, which the loader need not read images for.
        metadata=tfds.core.MetadataDict(shapes=[]),
        disable_shuffling=True)

  def _split_generators(self, dl_manager):
    del dl_manager
    return {self.builder_config.split: self._generate_examples()}

  def _generate_examples(self):
    config = self.builder_config
    source = sources.SceneSource(config.task, config.split, config.size, config.seed)
    for i in range(config.examples):
      example = source[i]
      self.info.metadata['shapes'].append([*example['target'].shape[:2], len(example['references'])])
      yield i, {**{name: example[name] for name in self.info.features},
                'references': [io.BytesIO(imaging.png_bytes(r)) for r in example['references']],
                'target': io.BytesIO(imaging.png_bytes(example['target']))}


def write(out, task: str, split: str, count: int, size: int = 64, seed: int = 0) -> str:
  """Writes `count` examples below `out` and returns their folder. UserError if it exists."""
  if task.partition('/')[0] not in TASKS:
    raise UserError(f'task {task!r} has no images to write: choose one of {", ".join(TASKS)}')
  config = ScenesConfig(name=f'{task.replace("/", "_")}_{split}', task=task, split=split, size=size, examples=count,  # pyrefly: ignore[unexpected-keyword]
                        seed=seed)
  builder = Scenes(data_dir=str(out), config=config, file_format='array_record')
  if builder.data_path.exists():
    raise UserError(f'{builder.data_path} is there already: remove it, or give another folder')
  builder.download_and_prepare()
  return str(builder.data_path)


def main(argv) -> None:
  del argv
  values = flags.FLAGS
  print(write(values.out, values.task, values.split, values.examples, values.size, values.seed))


if __name__ == '__main__':
  # Defined here, so that programs with flags of the same names may import this module.
  flags.DEFINE(command_line.PathParser(), 'out', None, 'folder to write to', required=True)
  flags.DEFINE_string('task', 't2i', f'task of the examples: {", ".join(TASKS)}, or one of these with its numbers of '
                                     'objects, as in t2i/1-2')
  flags.DEFINE_enum('split', 'train', tuple(splits.SPLITS), 'split of the examples')
  flags.DEFINE_integer('examples', 10_000, 'number of examples', lower_bound=1)
  flags.DEFINE_integer('size', 64, 'side in pixels of a square canvas', lower_bound=16)
  flags.DEFINE_integer('seed', 0, 'seed of the examples', lower_bound=0)
  with errors.at_the_terminal():
    app.run(main, flags_parser=command_line.parse_flags)
