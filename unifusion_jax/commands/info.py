"""What a checkpoint holds, how it was made and what it scored, as aligned text.

  python -m unifusion_jax.main --mode=info runs/edit
  unifusion --mode=info krea/Krea-2-Turbo

Of weights the heads of the files alone are read, and of a hub id none are fetched.
"""

from collections.abc import Iterable
import json
import math
import pathlib
import re
import textwrap
import types

from flax import nnx
import jax
import numpy as np

from unifusion_jax import bucket, description, json_file, parts
from unifusion_jax.errors import clipped, UserError
from unifusion_jax.models import causal_lm, internvl, qwen3_vl, t5, unifusion
from unifusion_jax.planning.memory import size
from unifusion_jax.request import SampleConfig
from unifusion_jax.training import checkpoint, metrics, record
from unifusion_jax.weights import autoencoders, encoders, hub, lora, lora_files, safetensors_io

# What is said: {label: text, one text a line, or the same of a part}
Facts = dict[str, 'str | list[str] | Facts']
WIDTH = 120  # columns
SAMPLING = ('verifi', 'steps', 'guidance', 'method', 'eta', 'shift')  # settings that are shown
# Parts of a model by the beginning of a tensor's name; the first that fits
TRANSFORMER = {'LAP and refiner': r'text_fusion\.|txt_in\.|txtfusion\.|txtmlp\.', 'fusion': r'fusion\.', 'DiT': ''}
ENCODER = {'vision': r'.*(vision|visual)', 'projector': r'mlp1\.|.*multi_modal_projector', 'language model': ''}
AUTOENCODER = {'encoder': r'encoder\.|quant_conv\.', 'decoder': r'decoder\.|post_quant_conv\.', 'statistics': ''}


def run(name: str) -> None:
  """Prints what there is to say about a folder, a file or a hub id; the mesh must be in context."""
  print('\n'.join(lines(facts(name))))


def facts(name: str) -> Facts:
  """All that is known of a checkpoint without its weights; 'tiny' is the embedded editing model.

  Raises:
    UserError: for what is no checkpoint of a kind that is known, and for one that is damaged.
  """
  if bucket.is_address(name):
    raise UserError(f'{name}: --mode=info reads folders and files of this machine and hub ids: copy it here')
  pinned = hub.pin(description.ASSETS / 'edit' if name == 'tiny' else name, weights=False, files=True)
  place = pinned.folder
  if place.is_file():
    return {'checkpoint': pinned.name} | _file(place)
  return {'checkpoint': pinned.name} | _folder(pinned)


def lines(facts: Facts, indent: str = '') -> list[str]:
  """Lines with labels in one column and texts in another; parts below, each under its label."""
  flat = {label: value for label, value in facts.items() if not isinstance(value, dict)}
  column, out = max(map(len, flat), default=0) + 2, []
  for label, value in flat.items():
    for number, text in enumerate([value] if isinstance(value, str) else value):
      start = indent + (label if number == 0 else '').ljust(column)
      out += textwrap.wrap(clipped(text, 2000), WIDTH, initial_indent=start, subsequent_indent=' ' * len(start),
                           break_long_words=False, break_on_hyphens=False) or [start.rstrip()]
  for label, value in facts.items():
    if isinstance(value, dict):
      out += ['', f'{indent}{label}', *lines(value, f'{indent}  ')]
  return out


def _folder(pinned: hub.Pinned) -> Facts:
  folder = pinned.folder
  if (folder / parts.INDEX).exists():
    return _pipeline(pinned)
  if (folder / description.FILE).exists():
    return _described(folder)
  if not (folder / 'config.json').exists():
    if any(folder.glob('*.safetensors')):
      return _file(lora_files.locate(str(folder)))
    raise _unknown(folder)
  settings = json_file.read(folder / 'config.json')
  if {'objective', 'model', 'train'} <= settings.keys():
    return _run(folder, settings)
  if settings.get('_class_name') in (unifusion.KREA_CLASS, unifusion.OWN_CLASS):
    return {'kind': 'transformer, in the layout of diffusers'} | _transformer(folder)
  if settings.get('_class_name') in autoencoders.CLASSES:
    return {'kind': f'autoencoder ({settings["_class_name"]})'} | _autoencoder(folder)
  if 'model_type' in settings:
    return {'kind': f'encoder ({settings["model_type"]})'} | _encoder(folder)
  raise _unknown(folder)


def _unknown(place: pathlib.Path) -> UserError:
  return UserError(f'{place} is no checkpoint that is known here: wanted is the workdir of a run, a folder with '
                   f'{description.FILE} or {parts.INDEX}, the folder of a transformer, an encoder or an autoencoder '
                   'with its config.json, or a .safetensors file of adapters (LoRA) or of a transformer')


# -------------------------------------------------------------------------------------------------- folders and files
def _pipeline(pinned: hub.Pinned) -> Facts:
  """A pipeline of Krea 2 in diffusers' layout."""
  described = parts.describe(pinned.folder)
  index = json_file.read(pinned.folder / parts.INDEX)
  place = lambda part: hub.pin(description.part_of(part, f'./{part}', pinned.name, pinned.folder), weights=False).folder
  scheduler = json_file.read(place('scheduler') / 'scheduler_config.json')
  return {
      'kind': f'pipeline of Krea 2, {"distilled (Turbo)" if index.get("is_distilled") else "not distilled (Raw)"}',
      **_use(described),
      'scheduler': ', '.join([str(scheduler.get('_class_name')), *(
          f'{name} {scheduler[name]}' for name in ('base_shift', 'max_shift') if name in scheduler)]),
      'transformer': _transformer(place('transformer'), index.get('patch_size', 2)),
      'text_encoder': _encoder(place('text_encoder')), 'vae': _autoencoder(place('vae'))}


def _described(folder: pathlib.Path) -> Facts:
  """A transformer with unifusion.json, as --mode=export writes it."""
  described = description.read(folder)
  return {'kind': f'transformer with the settings of its pipeline ({description.FILE})', **_transformer(folder),
          'VLM': described.vlm, 'autoencoder': described.vae, **_use(described)}


def _use(described: description.Description) -> Facts:
  """How a transformer is conditioned and sampled."""
  sample = SampleConfig().changed(**described.sample).settings()
  return {'taps': f'hidden states {", ".join(map(str, described.taps))} of the VLM',
          'layout': described.layout, 'system prompt': described.system,
          'image': f'{described.size} px, up to {described.tiles} {"tile" if described.tiles == 1 else "tiles"} of a '
                   'reference',
          'prompt': f'up to {described.max_prompt_tokens} tokens, rewrites up to {described.max_rewrite_tokens}',
          'sampling': ', '.join(f'{name}={sample[name]}' for name in SAMPLING)}


def _transformer(folder: pathlib.Path, patch: int = 2) -> Facts:
  config = unifusion.read_config(folder, patch)
  return {**_transformer_sizes(config.lap, config.dit, config.fusion), **_weights(folder, TRANSFORMER),
          **_history(folder)}


def _encoder(folder: pathlib.Path) -> Facts:
  return {**_encoder_sizes(encoders.config(folder)), **_weights(folder, ENCODER), **_history(folder)}


def _autoencoder(folder: pathlib.Path) -> Facts:
  config = autoencoders.config(folder)
  return {'latents': f'{config.channels} channels, 1 for {config.downsampling} x {config.downsampling} pixels; '
                     f"{config.first_width} channels at the image's own resolution",
          **_weights(folder, AUTOENCODER), **_history(folder)}


def _file(path: pathlib.Path) -> Facts:
  """A .safetensors file: of adapters, or of a whole transformer."""
  tensors = safetensors_io.stored(path)
  if any(map(lora_files.naming, tensors)):
    return _lora(path, tensors)
  prefix = unifusion.PREFIX if any(name.startswith(unifusion.PREFIX) for name in tensors) else ''
  tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
  native, ours = ('txtfusion.projector.weight', 'blocks'), ('text_fusion.projector.weight', 'transformer_blocks')
  naming = next((naming for naming in (native, ours) if naming[0] in tensors), None)
  if naming is None:
    raise _unknown(path)
  blocks = {name.split('.')[1] for name in tensors if name.startswith(f'{naming[1]}.')}
  pool, image = tensors[naming[0]], tensors.get('first.weight' if naming == native else 'img_in.weight')
  return {'kind': 'transformer in one file, under ' + ("Krea's own names" if naming == native else "diffusers' names")
                  + f' after {prefix}' * bool(prefix),
          'DiT': f'{len(blocks)} blocks' + (f' of width {image.shape[0]}' if image else ''),
          'LAP': f'pools {pool.shape[-1]} taps', **_held(tensors, TRANSFORMER)}


def _weights(folder: pathlib.Path, names: dict[str, str]) -> Facts:
  if any(folder.glob('*.safetensors')):
    return _held(safetensors_io.stored(folder), names)
  indexes = map(json_file.read, folder.glob('*.safetensors.index.json'))
  totals = [index['metadata']['total_size'] for index in indexes if 'total_size' in (index.get('metadata') or {})]
  return {'weights': 'not here' + ''.join(f', {size(total)}' for total in totals)}


def _held(tensors: dict[str, safetensors_io.Tensor], names: dict[str, str]) -> Facts:
  """Parameters, in all and by part, their dtypes and the size on disk."""
  counts, dtypes = {}, {}
  for name, tensor in tensors.items():
    part, number = next(part for part, start in names.items() if re.match(start, name)), math.prod(tensor.shape)
    counts[part] = counts.get(part, 0) + number
    dtypes[tensor.dtype.name] = dtypes.get(tensor.dtype.name, 0) + number
  files = {tensor.path for tensor in tensors.values()}
  total = max(1, sum(counts.values()))
  by_part = [f'{part} {_count(counts[part])}' for part in names if part in counts]
  shares = sorted(dtypes.items(), key=lambda item: -item[1])
  return {'parameters': _count(total) + f': {", ".join(by_part)}' * (len(by_part) > 1),
          'dtype': ', '.join(dtype + f' ({_count(number)})' * (len(dtypes) > 1) for dtype, number in shares),
          'size on disk': size(sum(path.stat().st_size for path in files))
                          + f' in {len(files)} files' * (len(files) > 1)}


def _history(folder: pathlib.Path) -> Facts:
  """How weights were made and what they scored: provenance.json beside the folder, or the run that exported it."""
  path = folder.parent / 'provenance.json'
  if path.exists():
    with json_file.named(path):
      made = json_file.read(path)['models'].get(folder.name)
      if made:
        stages = made['stages']
        steps = sum(stage.get('steps', 0) for stage in stages)
        return {'recipe': made['recipe'], 'trained': f'{steps:,} steps in {len(stages)} stages ({path.name})',
                'scores': _scores(made['figures'])}
  if folder.name == 'export' and (folder.parent / 'config_export.json').exists():
    settings = json_file.read(folder.parent / 'config_export.json')
    return {'recipe': str(settings.get('recipe') or 'not recorded'), 'exported by': f'the run in {folder.parent}',
            **_evaluations(folder.parent)}
  return {}


# ----------------------------------------------------------------------------------------------------------- adapters
def _lora(path: pathlib.Path, tensors: dict[str, safetensors_io.Tensor]) -> Facts:
  """A file of adapters, beside the names and sizes of Krea 2's transformer."""
  matrices = lora_files.matrices(jax.eval_shape(lambda: unifusion.UniFusion(unifusion.krea2(), rngs=nnx.Rngs(0))))
  found, unknown = lora_files.matched(tensors, matrices)
  namings = sorted(filter(None, set(map(lora_files.naming, tensors))))
  settings, alphas, ranks, misfits, keys = lora_files.settings_of(path), set(), set(), [], {}
  for module, factors in found.items():
    ours, source = matrices[module]
    target = next(name for name, pattern in lora.TARGETS.items() if re.fullmatch(pattern, ours))
    target = 'others' if target == 'all' else target
    keys[target] = keys.get(target, 0) + len(factors)
    if {'a', 'b'} <= factors.keys():
      rank = factors['a'].shape[0]
      ranks.add(rank)
      alphas.add(float(np.asarray(factors['alpha'][...])) if 'alpha' in factors
                 else lora_files.alpha_of(module, settings, rank))
      if (factors['b'].shape[0], factors['a'].shape[-1]) != source.layout.torch_shape():
        misfits.append(module)
  if not found:
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if re.search(r'\.lora(_A|_down|\.down)\b', name)}
  others = f'{len(unknown)} others, such as {", ".join(unknown[:2])}' if unknown else ''
  counted = [f'{target} {keys[target]}' for target in (*lora.TARGETS, 'others') if target in keys]
  if not found:
    fits = 'no: none of its keys is of this transformer'
  elif unknown:
    fits = f'no: {len(unknown)} of its {len(tensors)} keys are not of this transformer'
  elif misfits:
    fits = f'no: its names fit, its sizes are of another transformer, as at {misfits[0]}'
  else:
    fits = f'yes: {len(found)} of {len(matrices)} matrices'
  return {'kind': 'adapters (LoRA)', 'naming': ', '.join(namings), 'fits Krea 2': fits,
          'rank': _span(ranks), 'alpha': _span(alphas) if alphas else 'not read',
          'keys': f'{len(tensors)}: ' + ', '.join([*counted, *filter(None, [others])]),
          **_held(tensors, {'adapters': ''}), **_history(path.parent)}


def _span(numbers: Iterable[float]) -> str:
  """The number, or the least and the largest of several."""
  ordered = sorted(numbers)
  return ' to '.join(f'{number:g}' for number in (ordered[:1] + ordered[-1:])[:len(ordered)]) or 'none'


# --------------------------------------------------------------------------------------------------------------- runs
def _run(workdir: pathlib.Path, settings: dict) -> Facts:
  """The workdir of a run, from its config.json and what lies beside."""
  with json_file.named(workdir / 'config.json'):
    train, optim, data, model = (settings[name] for name in ('train', 'optim', 'data', 'model'))
    files, adapters = settings.get('files', {}), settings['objective'].get('lora', {})
    rank = adapters.get('rank', 0)
    steps = record.steps(workdir)
    planned = f'{train["minutes"]:g} minutes' if train.get('minutes') else f'{train["steps"]:,} steps'
    origin = lambda name: f'{settings[name]} ({files.get(name, "no fingerprint")})'
    facts = {
        'kind': f'run, adapters of rank {rank}, alpha {adapters["alpha"]:g}' if rank else 'run',
        'recipe': settings.get('recipe') or 'not recorded',
        'trained': f'{steps[-1] if steps else 0:,} steps, planned for {planned}',
        'checkpoints': _checkpoints(workdir, steps),
        **_model_sizes(model), **(_state(workdir / 'checkpoints' / str(steps[-1])) if steps else {}),
        'started from': origin('init') if settings.get('init') else 'random weights',
        **{label: origin(name) for label, name in (('VLM', 'vlm'), ('autoencoder', 'vae')) if name in files},
        'data': f'{data["path"]}, {data["size"]} px, batches of {data["batch_size"]}',
        'optimizer': f'{optim["name"]}, learning rate {optim["learning_rate"]:g}, EMA {optim["ema"]:g}, '
                     f'{optim["accumulate"]} {"batch" if optim["accumulate"] == 1 else "parts"} a step'}
    if settings.get('taps'):
      facts |= {'taps': f'hidden states {", ".join(map(str, settings["taps"]))} of the VLM',
                'layout': settings.get('layout', 'verifi'),
                'sampling': ', '.join(f'{name}={settings["sample"][name]}' for name in SAMPLING
                                      if name in settings['sample'])}
  return {**facts, 'metrics': _last_metrics(workdir / 'metrics.jsonl'), **_evaluations(workdir),
          **({'export': str(workdir / 'export')} if (workdir / 'export').is_dir() else {})}


def _checkpoints(workdir: pathlib.Path, steps: list[int]) -> str:
  damaged = sorted(path.name for path in (workdir / 'checkpoints').glob('*.damaged*'))
  if not steps:
    return ', '.join(['none', *damaged])
  files = (workdir / 'checkpoints' / str(steps[-1])).rglob('*')
  newest = size(sum(path.stat().st_size for path in files if path.is_file()))
  return f'{", ".join(map(str, steps))} ({newest} the newest)' + ''.join(f', {name}' for name in damaged)


def _state(folder: pathlib.Path) -> Facts:
  """Parameters and optimizer of a checkpoint: numbers, dtypes and bytes."""
  try:
    leaves = checkpoint.shapes(folder)
  except Exception as error:  # orbax's own, of many kinds: the training says more, and the rest is worth reading
    return {'parameters': f'not known, {folder} cannot be read: {str(error).partition(chr(10))[0]}'}

  def held(start: str) -> str:
    chosen = [leaf for name, leaf in leaves.items() if name.startswith(start)]
    dtypes = sorted({leaf.dtype.name for leaf in chosen if leaf.shape})
    return (f'{_count(sum(math.prod(leaf.shape) for leaf in chosen))} {", ".join(dtypes)}, '
            + size(sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in chosen)))
  return {'parameters': f'{held("params/")}; their average (EMA) as much', 'state of optimizer': held('opt/')}


def _last_metrics(path: pathlib.Path) -> list[str]:
  """The last lines of metrics.jsonl: of training, and of a measurement on held-out data."""
  if not path.exists():
    return ['none']
  entries = []
  for line in path.read_text(errors='replace').splitlines():
    try:
      entry = json.loads(line)
    except ValueError:
      continue  # torn
    if isinstance(entry, dict) and 'step' in entry:
      entries.append(entry)
  shown = [entry for entry in entries if 'loss' in entry][-3:]
  shown += [entry for entry in entries if 'held_out_loss' in entry][-1:]
  texts = metrics.SHOWN | {'held_out_loss': ('loss on held-out data', '{:.4g}'.format)}
  return [f'step {entry["step"]}: ' + ', '.join(f'{label} {text(entry[name])}' for name, (label, text) in texts.items()
                                                if isinstance(entry.get(name), int | float))
          for entry in shown] or ['none']


def _evaluations(workdir: pathlib.Path) -> Facts:
  """The reports of --mode=eval in a workdir."""
  return {f'scores ({path.name})': _scores(json_file.read(path)) for path in sorted(workdir.glob('eval*.json'))}


def _scores(report: dict, label: str = '') -> list[str]:
  """A line of a report's own values, and one for each group of them; of 'all' and 'all/add' the former alone."""
  own = [f'{name} {_number(value)}' for name, value in report.items()
         if not isinstance(value, dict | list) and not ('/' in name and name.partition('/')[0] in report)]
  groups = [_scores(value, f'{label}{name}: ') for name, value in report.items() if isinstance(value, dict)]
  return [label + ', '.join(own)] * bool(own) + [line for group in groups for line in group]


# -------------------------------------------------------------------------------------------------------------- words
def _model_sizes(model: dict) -> Facts:
  """The sizes of the model in a run's config.json."""
  names = lambda values: types.SimpleNamespace(**values)
  if 'dit' in model:
    dit = names(model['dit'])
    dit.width = dit.heads * dit.head_dim
    return _transformer_sizes(names(model['lap']), dit, model.get('fusion', 'lap'))
  if 'text' in model:
    return {'language model': _decoder(names(model['text'])),
            **({'vision': _blocks(names(model['vision']))} if 'vision' in model else {})}
  return {'model': ', '.join(f'{name} {value}' for name, value in model.items() if 'channels' in name)}


def _transformer_sizes(lap, dit, way: str) -> Facts:
  taps, blocks = f'{lap.taps} taps of width {lap.width}', f'{lap.heads} heads, MLP of {lap.mlp}'
  variants = {'tap_norm': 'taps normalised', 'separate': 'image tokens pooled apart'}
  between = {'LAP': ', '.join([f'{taps}: {lap.depth} blocks over them, {lap.refiner_depth} of refinement, {blocks}',
                               *(text for name, text in variants.items() if vars(lap).get(name))])}
  if way != 'lap':
    between = {'fusion': f'{way}, of {taps}: {lap.depth + lap.refiner_depth} blocks over the tokens, {blocks}'}
  return {'DiT': f'{_blocks(dit)} of {dit.head_dim}, MLP of {dit.mlp}; patches of {dit.patch} x {dit.patch} latents '
                 f'with {dit.channels} channels', **between}


def _encoder_sizes(config: encoders.Config) -> Facts:
  match config:
    case internvl.InternVLConfig():
      return {'language model': _decoder(config.text),
              'vision': f'{_blocks(config.vision)}; tiles of {config.vision.tile} px in patches of '
                        f'{config.vision.patch}, {config.tile_tokens} tokens each'}
    case qwen3_vl.Qwen3VLConfig():
      return {'language model': _decoder(config.text),
              'vision': f'{_blocks(config.vision)}; patches of {config.vision.patch} px, {config.vision.merge} x '
                        f'{config.vision.merge} of them a token'}
    case causal_lm.TextConfig():
      return {'language model': _decoder(config.text)}
    case t5.T5Config():
      return {'encoder': f'{_blocks(config)} of {config.head_dim}; vocabulary of {config.vocab:,}'}


def _decoder(text) -> str:
  return (f'{text.model_type}, {_blocks(text)} of {text.head_dim}, MLP of {text.hidden}; vocabulary of {text.vocab:,}, '
          f'{text.max_positions:,} positions')


def _blocks(config) -> str:
  shared = getattr(config, 'kv_heads', config.heads)
  return (f'{config.depth} block{"s" * (config.depth != 1)} of width {config.width}, {config.heads} heads'
          + f' ({shared} of keys and values)' * (shared != config.heads))


def _count(number: int) -> str:
  """A number of parameters: 12.8B, 2.93M, 4.5K or 640."""
  for unit, scale in (('B', 10 ** 9), ('M', 10 ** 6), ('K', 10 ** 3)):
    if number >= scale:
      return f'{number / scale:.3g}{unit}'
  return str(number)


def _number(value) -> str:
  if isinstance(value, float):
    return f'{value:.4g}'
  return 'null' if value is None else str(value)
