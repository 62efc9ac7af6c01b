"""Writing offline: the frozen VLM rewrites every request of a data set once, and training reads the ids back.

  python -m unifusion_jax.main --config=configs/edit.py --mode=rewrite --config.data.path=FOLDER/list.jsonl --workdir=runs/own
  python -m unifusion_jax.main --config=configs/edit.py --config.data.path=FOLDER/list.jsonl \
      --config.data.rewrites=runs/own/rewrites --workdir=runs/own

A request is its text and the pixels of its references: equal ones are written once by each process that meets them. Each
process appends lines of JSON to a file of its own, {"key", "ids", "texts"}, and a run that was interrupted goes on after
the last whole line. A rewrite without words, without an end or without room beside its request is not kept, and a request
left with none is trained on as it is.
"""

import dataclasses
import json
import os
import pathlib
import time

import jax
from jax.experimental import multihost_utils
import numpy as np
import tqdm

from unifusion_jax import pipeline, sharding, verifi
from unifusion_jax.data import rewrites, sources, transforms
from unifusion_jax.errors import UserError
from unifusion_jax.models import text_generation
from unifusion_jax.weights import hub


@dataclasses.dataclass
class RewriteConfig:
  """How requests are rewritten offline; vlm, system prompt, tiles and room are those of training."""
  count: int = 1            # rewrites of each request; training draws one of them each time
  temperature: float = 0.0  # 0: the most probable rewrite, which there is one of
  top_p: float = 1.0
  batch_size: int = 32      # requests at a time, over all devices


def write(config, vlm, mix, folder: pathlib.Path, mesh: jax.sharding.Mesh) -> None:
  """Rewrites the requests of all sources of `mix` into `folder`; `config` is a config.Config.

  ValueError for settings that cannot work and for a folder that was written under others.
  """
  settings, layout = config.rewrite, transforms.prompt_encoder(config)
  _check(config, mesh)
  if sharding.is_main_process():
    _keep_settings(folder, _settings(config, layout))
  mine = folder / f'rewrites-{jax.process_index():05d}.jsonl'
  _cut_to_whole_lines(mine)
  multihost_utils.sync_global_devices('rewrite settings')
  done = set(_keys(folder))
  local = settings.batch_size // jax.process_count()
  written = failed = broken = 0
  start = time.monotonic()
  total = sum(len(source) for source, _ in mix)
  with mine.open('a') as file, tqdm.tqdm(total=total, unit='record', disable=not sharding.is_main_process()) as bar:
    for source, _ in mix:
      # By the number of references, which is the shape of a batch: all processes go through them in the same order
      counts = np.array([-1 if (bucket := source.bucket(i)) is None else bucket[2] for i in range(len(source))])
      for references in sorted(set(counts) - {-1}):
        records = iter(np.flatnonzero(counts == references)[jax.process_index()::jax.process_count()])
        while True:
          batch = []
          for i in records:
            bar.update(jax.process_count())
            try:
              record = source[int(i)]
              name = rewrites.key(record)
              if name not in done:
                row = _row(layout, record, int(references))
                done.add(name)
                task = record.get('task', '')
                room = layout.lengths(int(references), task)[0] - np.sum(row['attention_mask'])
                batch += [(name, j, row, min(room, layout.room(task)[1])) for j in range(settings.count)]
            except sources.BrokenRecord:
              broken += 1
            if len(batch) >= local:
              break
          if not _anywhere(bool(batch)):
            break
          for name, ids, texts in _rewritten(settings, layout, vlm, batch, int(references), local, mesh):
            file.write(json.dumps(dict(key=name, ids=ids, texts=texts)) + '\n')
            written, failed = written + len(ids), failed + settings.count - len(ids)
          file.flush()
  took = time.monotonic() - start
  print(f'{folder}: {written} rewrites in {took:.0f} s ({written / took:.1f}/s), {failed} without words, end or room left out, '
        f'{broken} broken records passed over; train with --config.data.rewrites={folder}')


def check(config) -> None:
  """ValueError when `config.data.rewrites` was written for another VLM, system prompt or room than training has."""
  _compare(pathlib.Path(config.data.rewrites), _settings(config, transforms.prompt_encoder(config)), ('count', 'temperature', 'top_p'))


def _row(layout: transforms.PromptEncoder, record: dict, references: int) -> dict:
  """The open prompt of a request; BrokenRecord when its text is too long."""
  images, counts = layout.image_processor.preprocess(record['references'], references)
  spans = layout.chat.spans(record['instruction'] or record['caption'], counts, None, layout.system)
  row = layout.arrays(spans, references)
  return dict(input_ids=row['input_ids'], attention_mask=row['attention_mask'], **(dict(tiles=images) if references else {}))


def _rewritten(settings: RewriteConfig, layout: transforms.PromptEncoder, vlm, batch, references: int, local: int, mesh):
  """(key, ids, texts) of each request of a batch [(key, j, row, room)]; all processes call this together.

  An answer that is longer than the room that training has for it is left out.
  """
  # A batch may hold a few more than `local`, when several rewrites are asked of each: in turns
  found = {}
  turns = int(_most(-(-len(batch) // local)))
  for turn in range(turns):
    part = batch[turn * local:(turn + 1) * local]
    # A process without requests of its own takes part with an empty one
    rows = [row for _, _, row, _ in part] or [_row(layout, dict(references=(), instruction='', caption=''), references)]
    seeds = [(int(name[:8], 16) + j) % 2 ** 32 for name, j, *_ in part] or [0]
    filled = np.resize(np.arange(len(rows)), local)
    arrays = sharding.shard_batch(pipeline.stacked([rows[i] for i in filled]), mesh)
    keys = None
    if settings.temperature:
      words = np.asarray(jax.random.key_data(jax.vmap(jax.random.key)(np.array(seeds)[filled])))
      keys = jax.random.wrap_key_data(sharding.shard_batch(words, mesh))
    out = text_generation.generate(vlm, arrays['input_ids'], arrays['attention_mask'], arrays.get('tiles'), max_new=layout.written,
                            stop_ids=layout.chat.stop_ids, temperature=settings.temperature, top_p=settings.top_p, key=keys)
    ids, lengths = _local(out.ids), _local(out.lengths)
    texts, failed = pipeline.read_rewrites(layout.chat, ids, lengths)
    for i, (name, _, _, room) in enumerate(part):
      kept = found.setdefault(name, ([], []))
      if i not in failed and lengths[i] <= room:
        kept[0].append([int(token) for token in ids[i, :lengths[i] - 1]])
        kept[1].append(texts[i])
  return [(name, *kept) for name, kept in found.items()]


def _local(x: jax.Array) -> np.ndarray:
  """This process's rows of an array that is sharded by rows."""
  parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
  return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def _anywhere(here: bool) -> bool:
  return bool(_most(int(here)))


def _most(number: int) -> int:
  """The largest of all processes' numbers."""
  return number if jax.process_count() == 1 else int(np.max(multihost_utils.process_allgather(np.array(number))))


def _settings(config, layout: transforms.PromptEncoder) -> dict:
  """What rewrites depend on."""
  vlm = hub.fingerprint(hub.resolve(config.vlm))
  return dict(vlm=vlm, quantized=config.vlm_quantized, system=verifi.SYSTEM.get(layout.system, layout.system),
              tiles=max(config.data.tiles), text=layout.text, written=layout.written,
              **{name: getattr(config.rewrite, name) for name in ('count', 'temperature', 'top_p')})


def _check(config, mesh) -> None:
  settings, wrong = config.rewrite, []
  shards = mesh.shape['data'] * mesh.shape['fsdp']
  if config.data.path == 'scenes':
    wrong.append('data.path=scenes is drawn on the fly and has no end: write a folder with '
                 'python -m unifusion_jax.scenes.builder, or name a list of your own')
  if settings.batch_size < 1 or settings.batch_size % shards:
    wrong.append(f'rewrite.batch_size={settings.batch_size} must be a multiple of the {shards} devices that share a batch')
  if settings.count < 1 or (settings.count > 1 and not settings.temperature):
    wrong.append(f'rewrite.count={settings.count} wants rewrite.temperature above 0: there is one most probable rewrite')
  if settings.temperature < 0 or not 0 < settings.top_p <= 1:
    wrong.append(f'rewrite.temperature={settings.temperature} must be 0 or more, and rewrite.top_p={settings.top_p} above 0 '
                 'and at most 1')
  if wrong:
    raise UserError('this cannot be rewritten:\n  ' + '\n  '.join(wrong))


def _keep_settings(folder: pathlib.Path, settings: dict) -> None:
  if (folder / rewrites.SETTINGS).exists():
    return _compare(folder, settings)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / rewrites.SETTINGS).write_text(json.dumps(settings, indent=2) + '\n')


def _compare(folder: pathlib.Path, settings: dict, free: tuple[str, ...] = ()) -> None:
  if not (folder / rewrites.SETTINGS).exists():
    raise UserError(f'{folder} holds no {rewrites.SETTINGS}: give the folder that --mode=rewrite wrote')
  there = json.loads((folder / rewrites.SETTINGS).read_text())
  differ = [f'{name}: {there.get(name)!r} there, {value!r} now' for name, value in settings.items()
            if name not in free and there.get(name) != value]
  if differ:
    raise UserError(f'{folder} holds rewrites made under other settings; give another folder, or remove that one.\n  '
                     + '\n  '.join(differ))


def _keys(folder: pathlib.Path):
  for path in folder.glob('rewrites-*.jsonl'):
    for line in path.read_text().splitlines(keepends=True):
      if line.endswith('\n'):
        yield json.loads(line)['key']


def _cut_to_whole_lines(path: pathlib.Path) -> None:
  """Takes a last line that was cut off from a file; the others are not touched."""
  if path.exists() and (data := path.read_bytes()) and not data.endswith(b'\n'):
    os.truncate(path, data.rfind(b'\n') + 1)
