"""Accuracy of the VLM's captions, answers, rewrites and descriptions of edits on scenes."""

import collections

import numpy as np

from unifusion_jax import sharding, verifi
from unifusion_jax.data import imaging, transforms
from unifusion_jax.models import text_generation
from unifusion_jax.scenes import chat_examples, language, sources
from unifusion_jax.scenes.evaluation import handwritten

ATTRIBUTES = ('shape', 'colour', 'size', 'fill', 'place')


def answers(vlm, encoder: transforms.PromptEncoder, records: list[dict], batch_size: int) -> list[str]:
  """The VLM's greedy answer to each record; records with equally many images share a batch."""
  chat = encoder.chat
  groups = collections.defaultdict(list)
  for i, record in enumerate(records):
    groups[len(record['references']), record['task']].append(i)
  written = [''] * len(records)
  for (_, task), members in groups.items():
    system = chat_examples.system(task)
    for part, filled in sharding.batched(members, sharding.padded_batch(batch_size)):
      rows, tiles, counts = [], [], ()
      for i in filled:
        references = records[i]['references']
        inputs, counts = encoder.image_processor.preprocess(references, len(references))
        spans = chat.spans(records[i]['instruction'], counts, None, system)
        rows.append(verifi.arrays(spans, encoder.lengths(len(counts))[0], sum(counts)))
        tiles.append(inputs)
      batch = sharding.shard({name: np.stack([row[name] for row in rows]) for name in ('input_ids', 'attention_mask')})
      images = sharding.shard(np.stack(tiles)) if counts else None
      out = text_generation.generate(vlm, batch['input_ids'], batch['attention_mask'], images,
                                     max_new=encoder.max_rewrite, stop_ids=chat.stop_ids)
      ids, lengths = sharding.gather(out[:2])
      for i, row, n in zip(part, ids, lengths):
        written[i] = chat.read(row[:n])
  return written


def attributes_right(written: str, truth: str) -> tuple[int, int]:
  """(right, all) attributes of a caption: five for each object, one for the background, one for a surplus object."""
  wanted, parsed = language.parse(truth), language.parse(written)
  assert wanted, f'{truth!r} is no caption of the grammar'
  total = len(ATTRIBUTES) * len(wanted.objects) + 1
  if parsed is None:
    return 0, total
  pairs = zip(wanted.objects, parsed.objects)
  right = sum(getattr(a, name) == getattr(b, name) for a, b in pairs for name in ATTRIBUTES)
  return right + (wanted.background == parsed.background), total + max(0, len(parsed.objects) - len(wanted.objects))


def evaluate(vlm, encoder: transforms.PromptEncoder, config) -> dict:
  """Rates on `config.eval.examples` examples of each task of the split."""
  count, split, size = config.eval.examples, config.eval.split, config.data.size
  report = dict(split=split, examples=count)

  def answered(task):
    source = sources.SceneSource(task, split, size)
    records = [source[i] for i in range(count)]
    return records, answers(vlm, encoder, records, config.eval.batch_size)

  records, written = answered('caption')
  right, total = np.sum([attributes_right(w, r['caption']) for w, r in zip(written, records)], axis=0)
  report['caption_attributes'] = float(right / total)
  report['caption_exact'] = _rate(w == r['caption'] for w, r in zip(written, records))
  records, written = answered('question')
  for name, yes_no in (('yes_no', True), ('short_answer', False)):
    report[name] = _rate(w == r['caption'] for w, r in zip(written, records)
                         if (r['caption'] in ('yes', 'no')) == yes_no)
  for task in ('rewrite', 'edit', 'multi'):
    records, written = answered(task)
    report[f'{task}_exact'] = _rate(w == r['caption'] for w, r in zip(written, records))
    for kind in sorted({r['kind'] for r in records}):
      report[f'{task}_exact/{kind}'] = _rate(w == r['caption'] for w, r in zip(written, records) if r['kind'] == kind)
  by_hand = dict(prompts=handwritten.prompts('rewrite'), drawings=handwritten.drawings(size),
                 edits=handwritten.edits(size))
  for name, records in by_hand.items():
    written = answers(vlm, encoder, records, config.eval.batch_size)
    report[f'by_hand_{name}_exact'] = _rate(w == r['caption'] for w, r in zip(written, records))
  return report


def _rate(hits) -> float:
  hits = list(hits)
  return round(float(np.mean(hits)), 4) if hits else float('nan')


def preview_grid(vlm, encoder: transforms.PromptEncoder, data, count: int) -> np.ndarray:
  """A grid of test images with request, the VLM's answer and the truth."""
  source = sources.SceneSource('edit', 'test', data.size)
  records = [source[i] for i in range(count)]
  rows = [[imaging.read(r['references'][0])] for r in records]
  captions = [[f'{r["instruction"]} = {w} ({r["caption"]})']
              for r, w in zip(records, answers(vlm, encoder, records, count))]
  half = len(rows) // 2
  paired = [rows[i] + rows[i + half] for i in range(half)], [captions[i] + captions[i + half] for i in range(half)]
  return imaging.grid(*paired, cell=256)
