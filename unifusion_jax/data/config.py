"""The data of a run: its source, tasks and shapes, and the checks of these settings."""

import dataclasses
import pathlib

from unifusion_jax import ranges
from unifusion_jax.data import buckets, lists, shards
from unifusion_jax.errors import UserError
from unifusion_jax.fields import Path
from unifusion_jax.ranges import Range

SCENES = ('scenes', 'scenes/wide')  # the embedded world (unifusion_jax/scenes), and a wider one to train on
TOKENS = Range(1, 10 ** 6)  # of a prompt
LARGEST = 2 ** 34  # bytes of a device's share of a batch
FINEST = 2048  # units in the side of a canvas


@dataclasses.dataclass(frozen=True)
class Task:
  """A task of the mix: its weight, and token budgets of its own if any."""
  name: str
  weight: float = 1.0
  prompt: int | None = None   # None: DataConfig.max_prompt_tokens
  rewrite: int | None = None  # None: DataConfig.max_rewrite_tokens


@dataclasses.dataclass
class DataConfig:
  """Source, tasks and shapes of the examples."""
  # 'scenes' or 'scenes/wide': drawn on the fly; a folder of scenes/builder.py; of your own a .jsonl or .parquet file,
  # or a folder of data/convert.py, here or at gs://.
  path: Path = 'scenes'
  held_out: Path | None = None               # a list as `path`, kept out of training: measured, and shown in previews
  tasks: tuple[Task, ...] = (Task('t2i'),)   # your own images: one source for all; 'reconstruct': their own references
  only: str = ''                             # some of the tasks: 'edit' (edit/1-2 too), or 'edit=0.7,t2i=0.3'
  size: int = 64                             # images have about size^2 pixels
  aspects: tuple[str, ...] = ('1:1', '5:3', '3:5')  # width:height of the canvases that your own images are cut to
  unit: int = 16                             # pixels; both sides of a canvas are multiples of it
  # Most tiles that a reference is cut into; with several numbers each batch takes one, all equally often.
  tiles: tuple[int, ...] = (1,)
  max_prompt_tokens: int = 128               # of a prompt with its written text, without image tokens
  max_rewrite_tokens: int = 52               # of the written text
  rewrites: Path | None = None               # folder of --mode=rewrite to train on; None: captions
  batch_size: int = 32                       # over all devices
  workers: int = 0                           # processes that prepare batches; 0: threads of this one
  skipped: float = 0.01                      # share of broken records past which the run stops

  @property
  def chosen(self) -> tuple[Task, ...]:
    """The tasks that `only` names, with its weights; all tasks without it. UserError for a name that no task has."""
    if not self.only:
      return self.tasks
    chosen = {}
    for entry in self.only.split(','):
      name, given, weight = (part.strip() for part in entry.partition('='))
      matching = [task for task in self.tasks if name in (task.name, task.name.partition('/')[0])]
      if not matching:
        raise UserError(f'data.only={self.only!r}: there is no task {name!r} here; there are '
                        f'{", ".join(task.name for task in self.tasks)}')
      if given and not _is_positive(weight):
        raise UserError(f'data.only={self.only!r}: the weight {weight!r} of {name!r} must be a number above 0')
      share = float(weight) / sum(task.weight for task in matching) if given else 1.0
      chosen |= {task.name: dataclasses.replace(task, weight=task.weight * share) for task in matching}
    return tuple(chosen[task.name] for task in self.tasks if task.name in chosen)

  @property
  def measured(self) -> str:
    """Path of the records that evaluation measures and previews show."""
    return self.held_out or self.path

  @property
  def canvases(self) -> tuple[tuple[int, int], ...]:
    """(height, width) of the canvases that your own images are cut to. UserError where there are none."""
    if not self.aspects:
      raise UserError('data.aspects=() must name at least one, as in 1:1,5:3')
    if self.size // self.unit > FINEST:
      raise UserError(f'data.size={self.size} is more than {FINEST} times data.unit={self.unit}: raise the unit')
    return buckets.canvases(self.aspects, self.size, self.unit)

  @property
  def budgets(self) -> tuple[tuple[str, int, int], ...]:
    """(name, prompt tokens, rewrite tokens) of every task, whatever `only` says."""
    return tuple((task.name, self.max_prompt_tokens if task.prompt is None else task.prompt,
                  self.max_rewrite_tokens if task.rewrite is None else task.rewrite) for task in self.tasks)

  @property
  def budget(self) -> tuple[int, int]:
    """(prompt tokens, rewrite tokens): the largest of all budgets, which a request without a task takes."""
    _, prompts, rewritten = zip(('', self.max_prompt_tokens, self.max_rewrite_tokens), *self.budgets)
    return max(prompts), max(rewritten)

  def problems(self, *, kinds: tuple[str, ...], unit: int, shards: int, accumulate: int = 1) -> list[str]:
    """Settings that cannot work, a sentence each.

    Args:
      kinds: the tasks that the objective has a loss for, without their numbers of objects.
      unit: pixels that both sides of every image must be multiples of: a latent patch.
      shards: devices that share a batch.  accumulate: micro-batches that each device splits its share into.
    """
    wrong, micro = [], shards * max(1, accumulate)
    if self.batch_size % micro:
      few = '; mesh.tp shares an example among several' if self.batch_size < micro else ''
      wrong.append(f'data.batch_size={self.batch_size} must be a multiple of {micro}: mesh.data x mesh.fsdp = {shards} '
                   f'devices share a batch, times optim.accumulate={accumulate}{few}')
    names = [task.name for task in self.tasks]
    if not names or len(set(names)) < len(names):
      wrong.append(f'data.tasks={names} must name at least one task, and each of them once')
    for task in self.tasks:
      if task.name.partition('/')[0] not in kinds:
        wrong.append(f'data.tasks: this objective trains on {", ".join(kinds)}, not on {task.name!r}')
      wrong += ranges.problems(task, f'data.tasks[{task.name!r}].', weight=Range(above=0, most=10 ** 9), prompt=TOKENS,
                               rewrite=TOKENS)
    if not self.tiles:
      wrong.append('data.tiles=() must be one number of tiles or more')
    out_of_range = ranges.problems(
        self, 'data.', size=Range(1, 10 ** 4), unit=Range(1, 10 ** 4), tiles=Range(1, 1000), max_prompt_tokens=TOKENS,
        max_rewrite_tokens=TOKENS, batch_size=Range(1, 10 ** 7), workers=Range(0, 1000), skipped=Range(0, 1))
    if out_of_range:
      return wrong + out_of_range
    tokens = self.budget[0]
    largest = self.batch_size / shards * (3 * self.size ** 2 + 4 * tokens)
    if largest > LARGEST:
      wrong.append(f'data.batch_size={self.batch_size} of data.size={self.size}: {self.batch_size:,} images of '
                   f'{self.size}^2 pixels with prompts of {tokens:,} tokens are {largest / 2 ** 30:,.0f} GiB on each '
                   f'of {shards} devices, where {LARGEST / 2 ** 30:.0f} are the most: take fewer or smaller ones')
    for name in ('chosen', *([] if self.measured in SCENES else ['canvases'])):
      try:
        getattr(self, name)
      except UserError as error:
        wrong.append(str(error))
    if self.path in SCENES:
      wrong += scenes_sources().problems(self, unit)
    if self.measured not in SCENES and self.unit % unit:
      wrong.append(f'data.unit={self.unit} must be a multiple of the {unit} pixels of a latent patch')
    return wrong + self._problems_of_held_out()

  def _problems_of_held_out(self) -> list[str]:
    if self.held_out is None:
      return []
    held_out, path = pathlib.Path(self.held_out), pathlib.Path(self.path)
    if not is_list(self.held_out):
      return [f'data.held_out={self.held_out!r} must be a .jsonl or .parquet file, or a folder of data/convert.py: a '
              'list of the records to measure']
    same = held_out.samefile(path) if held_out.exists() and path.exists() else held_out == path
    if same:
      return [f'data.held_out={self.held_out!r} is the file of data.path: put the records to measure into a list of '
              'their own, which training does not read']
    return []


def _is_positive(number: str) -> bool:
  try:
    return 0 < float(number) < float('inf')
  except ValueError:
    return False


def is_list(path: str) -> bool:
  """Whether a path is that of a user's own images: a list of them, or a folder of shards."""
  return path not in SCENES and (pathlib.Path(path).suffix.lower() in lists.SUFFIXES or shards.is_there(path))


def scenes_sources():
  """The module of the embedded world's sources, imported by those alone who ask for it."""
  from unifusion_jax.scenes import sources as scenes
  return scenes
