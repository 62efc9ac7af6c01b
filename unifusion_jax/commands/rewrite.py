"""Offline rewriting: the frozen VLM rewrites every request of a data set once, and training reads the ids back.

  python -m unifusion_jax.main --config=configs/edit.py --mode=rewrite --config.data.path=FOLDER/list.jsonl \
      --workdir=runs/own
  python -m unifusion_jax.main --config=configs/edit.py --config.data.path=FOLDER/list.jsonl \
      --config.data.rewrites=runs/own/rewrites --workdir=runs/own

Processes share the records; those whose devices share an example's work (tp) have the same ones, and the first of them
writes. Requests with equal text and equal pixels of their references are rewritten once by each share that has them.
Lines of JSON are appended to a file of each such process, {"key", "ids", "texts"}, and a run that was interrupted goes
on after the last whole line, with any number of processes. A rewrite is left out when it is empty, has no end, or does
not fit beside its request; a request without rewrites is trained on as it is.
"""

import collections
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax import bucket, json_file, progress, prompting, ranges, sharding, verifi
from unifusion_jax.data import loader, rewrites, sources, transforms
from unifusion_jax.data.config import SCENES
from unifusion_jax.errors import BrokenRecord, UserError
from unifusion_jax.models import text_generation
from unifusion_jax.ranges import Range
from unifusion_jax.training import lock
from unifusion_jax.training.record import differences
from unifusion_jax.weights import encoders, hub

SAMPLING = ('count', 'temperature', 'top_p')  # settings that training on the rewrites does not depend on


@dataclasses.dataclass
class RewriteConfig:
  """How requests are rewritten offline; the VLM, system prompt, tiles and budgets are those of training."""
  count: int = 1            # rewrites of each request; training samples one each time
  temperature: float = 0.0  # 0: the most probable rewrite; only one exists
  top_p: float = 1.0
  batch_size: int = 32      # requests at a time, over all devices

  def problems(self, *, path: str = '', shards: int = 1) -> list[str]:
    """Settings that cannot work for the data of `path` and a batch over `shards` devices, one sentence each."""
    problems = []
    if path in SCENES:
      problems.append(f'data.path={path} is generated on the fly, without an end: write a folder with '
                      'python -m unifusion_jax.scenes.builder, or name a list of your own')
    if self.batch_size % shards:
      problems.append(f'rewrite.batch_size={self.batch_size} must be a multiple of the {shards} devices that share a '
                      'batch')
    if self.count > 1 and not self.temperature:
      problems.append(f'rewrite.count={self.count} wants rewrite.temperature above 0: only one rewrite is the most '
                      'probable')
    return problems + ranges.problems(self, 'rewrite.', count=Range(1, 10 ** 4), temperature=Range(0, 1000),
                                      top_p=Range(above=0, most=1), batch_size=Range(1, 10 ** 6))


def run(config, workdir: pathlib.Path) -> None:
  """Rewrites the requests of `config.data` into workdir/rewrites; the mesh must be in context.

  UserError for settings that cannot work, and for a folder that was written under other settings.
  """
  if 'vlm' not in config.objective.pretrained:
    raise UserError('requests are rewritten for a DiT to train on: use configs/t2i.py or configs/edit.py')
  mesh = jax.sharding.get_mesh()
  problems = config.rewrite.problems(path=config.data.path, shards=mesh.shape['data'] * mesh.shape['fsdp'])
  if problems:
    raise UserError('this cannot be rewritten:\n  ' + '\n  '.join(problems))
  mixture = loader.mix(dataclasses.replace(config.data, rewrites=None, tiles=config.data.tiles[-1:]))
  vlm = encoders.load(config.vlm, jnp.dtype(config.frozen_dtype), config.vlm_quantized, config.vlm_cache)
  with lock.held(workdir / 'rewrites' / 'rewrite.lock'):
    write(config, [source for source, _ in mixture], workdir / 'rewrites',
          functools.partial(text_generation.generate, vlm))


def write(config, mixture: list, folder: pathlib.Path, generate: Callable[..., text_generation.Generated]) -> None:
  """Rewrites the requests of the sources of a mixture into a folder.

  generate: `text_generation.generate` with its VLM: (input_ids, attention_mask, tiles, *, max_new, ...).
  """
  encoder, share = transforms.prompt_encoder(config), sharding.share(config.rewrite.batch_size)
  path = folder / f'rewrites-{jax.process_index():05d}.jsonl'
  with sharding.together('prepare the folder of rewrites'):
    if sharding.is_main_process():
      _claim_settings(folder, _settings(config, encoder))
    folder.mkdir(parents=True, exist_ok=True)
    if share.first:
      _cut_to_whole_lines(path)
  with sharding.together('read the rewrites that are there'):
    done, tally, start = set(_keys(folder)), collections.Counter(), time.monotonic()
  total = sum(len(source) for source in mixture)
  with (open(path if share.first else os.devnull, 'a') as file,
        contextlib.closing(progress.bar(total, 'record', silent=not sharding.is_main_process())) as bar):
    for source in mixture:
      for references, indices in _by_references(source, share):
        requests = _requests(encoder, source, references, indices, config.rewrite.count, done, tally,
                             lambda: bar.update(share.count))
        while True:
          with sharding.together('read its requests'):
            batch = _take(requests, len(share.rows))
          if not _largest(len(batch)):
            break
          results = _rewrite(config.rewrite, encoder, generate, batch, references, len(share.rows))
          with sharding.together('write its rewrites'):
            for key, ids, texts in results:
              file.write(json.dumps(dict(key=key, ids=ids, texts=texts)) + '\n')
              tally.update(written=len(ids), failed=config.rewrite.count - len(ids))
            file.flush()
  seconds, place = time.monotonic() - start, bucket.address(folder)
  print(f'{place}: {tally["written"]} rewrites in {seconds:.0f} s ({tally["written"] / seconds:.1f}/s), '
        f'{tally["failed"]} left out that were empty, had no end or did not fit, {tally["broken"]} broken records '
        f'passed over; train with --config.data.rewrites={place}')


def check(config) -> None:
  """UserError when `config.data.rewrites` was written for another VLM, system prompt or budget than training has."""
  _compare(rewrites.local(config.data.rewrites), _settings(config, transforms.prompt_encoder(config)), SAMPLING)


@dataclasses.dataclass(frozen=True)
class _Prompt:
  """A prompt without its answer, for rewrite `number` of a request, which may have `budget` tokens."""
  key: str
  number: int
  row: dict
  budget: int


def _by_references(source, share: sharding.Share) -> Iterator[tuple[int, np.ndarray]]:
  """(number of references, indices of this share's records with that number), in one order for all processes."""
  references = sources.shapes_of(source)[:, 2]
  for count in sorted(set(references.tolist()) - {-1}):
    yield count, np.flatnonzero(references == count)[share.number::share.count]


def _requests(encoder: transforms.PromptEncoder, source, references: int, indices, count: int, done: set,
              tally: collections.Counter, advance: Callable[[], None]) -> Iterator[list[_Prompt]]:
  """`count` prompts for each request that is not in `done` yet; adds it to `done`."""
  for i in indices:
    advance()
    try:
      record = source[int(i)]
      key = rewrites.key(record)
      if key in done:
        continue
      row, task = _row(encoder, record, references), record.get('task', '')
    except BrokenRecord:
      tally['broken'] += 1
      continue
    done.add(key)
    budget = min(encoder.lengths(references, task)[0] - np.sum(row['attention_mask']), encoder.budget(task)[1])
    yield [_Prompt(key, number, row, budget) for number in range(count)]


def _take(requests: Iterator[list[_Prompt]], least: int) -> list[_Prompt]:
  """Prompts of the next requests, `least` or a few more; fewer at the end."""
  batch = []
  for prompts in requests:
    batch += prompts
    if len(batch) >= least:
      break
  return batch


def _row(encoder: transforms.PromptEncoder, record: dict, references: int) -> dict:
  """Arrays of a request's prompt without its answer; BrokenRecord when its text is too long."""
  tiles, counts = encoder.image_processor.preprocess(record['references'], references)
  spans = encoder.chat.spans(record['instruction'] or record['caption'], counts, None, encoder.system)
  row = encoder.arrays(spans, references)
  return dict(input_ids=row['input_ids'], attention_mask=row['attention_mask'],
              **(dict(tiles=tiles) if references else {}))


def _rewrite(settings: RewriteConfig, encoder: transforms.PromptEncoder, generate, batch: list[_Prompt],
             references: int, local: int) -> list[tuple[str, list, list]]:
  """(key, ids, texts) of each request of a batch; all processes call this together."""
  # With several rewrites of each request, a batch may exceed `local`: it then runs in turns
  results, mesh, empty = {}, jax.sharding.get_mesh(), dict(references=(), instruction='', caption='')
  for turn in range(_largest(-(-len(batch) // local))):
    part = batch[turn * local:(turn + 1) * local]
    # A process without requests of its own takes part with an empty one
    rows = [prompt.row for prompt in part] or [_row(encoder, empty, references)]
    seeds = [(int(prompt.key[:8], 16) + prompt.number) % 2 ** 32 for prompt in part] or [0]
    indices = np.resize(np.arange(len(rows)), local)
    arrays = sharding.shard_batch(prompting.stacked([rows[i] for i in indices]), mesh)
    keys = None
    if settings.temperature:
      key_data = np.asarray(jax.random.key_data(jax.vmap(jax.random.key)(np.array(seeds)[indices])))
      keys = jax.random.wrap_key_data(sharding.shard_batch(key_data, mesh))
    out = generate(arrays['input_ids'], arrays['attention_mask'], arrays.get('tiles'), max_new=encoder.max_rewrite,
                   stop_ids=encoder.chat.stop_ids, temperature=settings.temperature, top_p=settings.top_p, key=keys)
    ids, lengths = _local(out.ids), _local(out.lengths)
    texts, failures = prompting.read_rewrites(encoder.chat, ids, lengths)
    for i, prompt in enumerate(part):
      all_ids, all_texts = results.setdefault(prompt.key, ([], []))
      if i not in failures and lengths[i] <= prompt.budget:
        all_ids.append([int(token) for token in ids[i, :lengths[i] - 1]])
        all_texts.append(texts[i])
  return [(key, *both) for key, both in results.items()]


def _local(x: jax.Array) -> np.ndarray:
  """This process's rows of an array that is sharded by rows."""
  parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
  return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def _largest(number: int) -> int:
  """The largest `number` of all processes."""
  return int(np.max(sharding.local(sharding.tell_all(np.array([number], np.int32)))))


def _settings(config, encoder: transforms.PromptEncoder) -> dict:
  """Settings that rewrites depend on, as in settings.json."""
  return dict(vlm=hub.fingerprint(hub.resolve(config.vlm)), quantized=config.vlm_quantized,
              system=verifi.SYSTEM.get(encoder.system, encoder.system), tiles=max(config.data.tiles),
              text=encoder.max_prompt, written=encoder.max_rewrite,
              **{name: getattr(config.rewrite, name) for name in SAMPLING})


def _claim_settings(folder: pathlib.Path, settings: dict) -> None:
  if (folder / rewrites.SETTINGS).exists():
    return _compare(folder, settings)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / rewrites.SETTINGS).write_text(json.dumps(settings, indent=2) + '\n')


def _compare(folder: pathlib.Path, settings: dict, free: tuple[str, ...] = ()) -> None:
  if not (folder / rewrites.SETTINGS).exists():
    raise UserError(f'{folder} holds no {rewrites.SETTINGS}: give the folder that --mode=rewrite wrote')
  stored = json_file.read(folder / rewrites.SETTINGS)
  changes = differences(stored, settings, lambda name: name in settings and name not in free)
  if changes:
    raise UserError(f'{folder} holds rewrites of other settings; give another folder, or remove that one.\n  '
                    + '\n  '.join(changes))


def _keys(folder: pathlib.Path) -> Iterator[str]:
  for path in folder.glob('rewrites-*.jsonl'):
    yield from (line['key'] for _, line in rewrites.lines(path))


def _cut_to_whole_lines(path: pathlib.Path) -> None:
  """Removes the last line of a file if it is incomplete."""
  if path.exists() and (data := path.read_bytes()) and not data.endswith(b'\n'):
    os.truncate(path, data.rfind(b'\n') + 1)
