"""A look inside a pipeline: figures, numbers and a page about LAP, layer dropout and the layers of the VLM."""

import dataclasses
import json
import pathlib

import numpy as np

from unifusion_jax import bucket, pipeline, prompting, sharding
from unifusion_jax.commands import sample
from unifusion_jax.commands.sample import PipelineConfig
from unifusion_jax.data import imaging, transforms
from unifusion_jax.data.vision_inputs import TILE
from unifusion_jax.errors import UserError
from unifusion_jax.evaluation import inside
from unifusion_jax.evaluation.inside import InspectConfig, Maps, Read
from unifusion_jax.request import Request, SampleConfig
from unifusion_jax.scenes.evaluation import layer_dropout
from unifusion_jax.training import record
from unifusion_jax.weights import encoders, hub

SHOWN_TOKENS = 5  # whose attention is shown where `inspect.tokens` names none
KINDS = ('text', 'image')
BUDGET = 1024, 512  # most tokens of a prompt and of a rewrite for a VLM alone, and a quarter of its positions each
CELL = 160  # pixels of an image in a figure
CAPTIONS = dict(
    attention='Attention of layer over layer, the mean over tokens and heads', tokens='The same of single tokens',
    text='Tokens of the text by taps', image='The same maps for image tokens, over the reference',
    weights='Learned weights, and shares of the pooled state', similarity='Cosine similarity of the layers',
    sizes='Size of the states by layer', changes='Change without taps',
    dropout='Images without taps, and their differences',
    rates='Share of images without taps that are right')


@dataclasses.dataclass
class InspectedPipeline(PipelineConfig):
  """A whole pipeline to look into, or with empty `weights` the layers of a VLM alone (configs/inspect.py)."""
  inspect: InspectConfig = dataclasses.field(default_factory=InspectConfig)

  mode = 'inspect'

  def problems(self, devices: int) -> list[str]:
    """Settings that cannot work, a sentence each."""
    alone = [] if self.weights or self.vlm else ['there is nothing to look into: give weights= for a pipeline, or vlm= '
                                                 'for a VLM alone']
    return super().problems(devices) + self.inspect.problems() + alone


def run(config, workdir: pathlib.Path) -> None:
  """Writes inspect.json, inspect.md and figures into the folder `inspect` of the workdir.

  A PipelineConfig names the pipeline; a config.Config takes the workdir's run, or the weights that it names.
  """
  try:
    import matplotlib  # noqa: F401
  except ModuleNotFoundError as error:
    raise UserError('--mode=inspect draws with matplotlib, which is not installed: pip install "unifusion_jax[inspect]"'
                    ) from error
  folder = workdir / 'inspect'
  if isinstance(config, InspectedPipeline) and not config.weights:
    report, figures = inspect_vlm(config, folder)
  else:
    inside.check_settings(config.sample)
    prepared = sample.prepare(config, workdir, folder)
    sets = inside.sets_of_taps(config.inspect.drop, prepared.taps)
    pipe = prepared.load()
    report, figures = inspect(pipe, prepared.requests, prepared.height, prepared.width, pipe.settings, config.inspect,
                              sets)
  with sharding.together('write figures'):
    if sharding.is_main_process():
      for name, figure in figures.items():
        _figures().write(figure, folder / f'{name}.png')
      (folder / 'inspect.json').write_text(json.dumps(report, indent=1) + '\n')
      (folder / 'inspect.md').write_text(page(report, figures))
      print(bucket.address(folder / 'inspect.md'))
  if not isinstance(config, PipelineConfig):
    record.write(config, workdir, 'config_inspect.json')


def inspect_vlm(config: InspectedPipeline, folder: pathlib.Path) -> tuple[dict, dict]:
  """(report, figures by name) of the layers of the VLM that a configuration names, without a model of images."""
  settings, vlm_folder = config.sample, hub.resolve(config.vlm)
  wanted, _, _ = sample.requests(settings, TILE, 16)  # any size will do: no image is sampled
  most = encoders.config(vlm_folder).text.max_positions  # pyrefly: ignore[missing-attribute]
  encoder = transforms.PromptEncoder.load(vlm_folder, settings.tiles or 1, *(min(each, most // 4) for each in BUDGET))
  prompting.check(encoder, wanted, settings, most)
  with sharding.together('write figures'):
    if sharding.is_main_process():
      imaging.check_writable(folder)
  vlm = encoders.load(vlm_folder, config.dtype, config.vlm_quantized, config.vlm_cache)
  reads = [inside.read_by(vlm, encoder, (), request, settings) for request in wanted[::settings.num_images]]
  similarity, figures = _similarity(reads, ())
  return dict(taps=[], requests=_requests(reads), layers=similarity), figures


def inspect(pipe: pipeline.UniFusionPipeline, requests: list[Request], height: int, width: int, settings: SampleConfig,
            config: InspectConfig, sets: dict[str, tuple[int, ...]]) -> tuple[dict, dict]:
  """(report, figures by name) of requests, `settings.num_images` of each prompt; sets: of `inside.sets_of_taps`."""
  reads = [inside.read(pipe, request, settings) for request in requests[::settings.num_images]]
  shown = _shown(reads, config.tokens)
  report = dict(taps=list(pipe.taps), requests=_requests(reads))
  similarity, figures = _similarity(reads, pipe.taps)
  report['layers'] = similarity
  replace = config.replace
  if replace and settings.guidance != 1:
    pipe.null(settings.negative_prompt)  # as long as the VLM is there, where models take turns
  try:
    maps = [inside.maps(pipe, read) for read in reads]
  except inside.NotPooled as error:
    report['note'] = str(error) + (', and no images with weights of 0' if 'weight' in replace else '')
    replace = tuple(how for how in replace if how != 'weight')
  else:
    pooled, drawn = _pooling(pipe.taps, reads, maps, shown)
    report, figures = report | pooled, drawn | figures
  if replace:
    dropped, drawn = _dropout(pipe, reads, requests, height, width, settings, sets, replace)
    report, figures = report | dropped, figures | drawn
  if config.scenes and replace:
    rates = layer_dropout.evaluate(pipe, config.scenes, config.examples, sets, replace, settings)
    report['scenes'] = dict(task=config.scenes, examples=config.examples, rates=rates)
    figures['rates'] = _figures().bars(
        list(sets),
        {how: [(rates[name][how]['all'], *rates[name][how]['interval']) for name in sets] for how in replace},
        'share right', ('all taps', rates['all']['present']['all']))
  return report, figures


def _requests(reads: list[Read]) -> list[dict]:
  return [dict(prompt=read.request.instruction, references=len(read.request.references), rewrite=read.rewrite,
               warning=read.warning, text_tokens=int((~read.is_image).sum()), image_tokens=int(read.is_image.sum()))
          for read in reads]


def _figures():
  from unifusion_jax.evaluation import inside_figures  # needs matplotlib, which `run` looks for
  return inside_figures


def _shown(reads: list[Read], words: tuple[str, ...]) -> list[tuple[int, int]]:
  """(number of the request, place) of the tokens whose attention is shown. UserError for a word that no text has."""
  if not words:
    labels = reads[0].labels
    places = [i for i, label in enumerate(labels) if label.isalpha() and label not in labels[:i]]
    places = places or [i for i, image in enumerate(reads[0].is_image) if not image]
    return [(0, places[i]) for i in dict.fromkeys(np.linspace(0, len(places) - 1, SHOWN_TOKENS).astype(int))]
  places = []
  for word in words:
    found = [(number, place) for number, read in enumerate(reads)
             if (place := inside.position_of(read, word)) is not None]
    if not found:
      raise UserError(f'inspect.tokens={word}: no text that conditions has it; they are '
                      f'{"; ".join(repr(" ".join(filter(None, read.labels))) for read in reads)}')
    places.append(found[0])
  return places


def _over_tokens(reads: list[Read], values: list[np.ndarray], kind: str, axis: int = 0) -> np.ndarray:
  """Values of one kind of token of all requests, end to end along the axis of tokens."""
  return np.concatenate([np.compress(read.is_image == (kind == 'image'), value, axis)
                         for read, value in zip(reads, values)], axis)


def _kinds(reads: list[Read]) -> list[str]:
  return [kind for kind in KINDS if any((read.is_image == (kind == 'image')).any() for read in reads)]


def _rounded(values) -> list:
  return np.round(np.asarray(values, np.float64), 4).tolist()


def _pooling(taps: tuple[int, ...], reads: list[Read], maps: list[Maps], shown: list[tuple[int, int]]
             ) -> tuple[dict, dict]:
  """(report, figures) of LAP: learned weights, attention and shares."""
  draw, means, kinds = _figures(), {}, _kinds(reads)
  for kind in kinds:
    over = lambda values, axis, kind=kind: _over_tokens(reads, values, kind, axis).mean(axis=axis)
    means[kind] = dict(layers=over([each.attention.mean(axis=2) for each in maps], 1),
                       received=over([each.received for each in maps], 1), share=over([each.share for each in maps], 0))
  tokens = [dict(request=number, token=read.labels[i] or None, received=_rounded(each.received[:, i]),
                 share=_rounded(each.share[i]))
            for number, (read, each) in enumerate(zip(reads, maps)) for i in range(len(read.labels))]
  report = dict(weights=_rounded(maps[0].weights), difference=max(each.difference for each in maps),
                mean={kind: {name: _rounded(value) for name, value in mean.items()} for kind, mean in means.items()},
                shown=[dict(request=number, token=reads[number].labels[i], layers=_rounded(
                    maps[number].attention[:, i].mean(axis=1))) for number, i in shown], tokens=tokens)
  learned = {'learned weight': maps[0].weights}
  if maps[0].image_weights is not None:
    report['image_weights'] = _rounded(maps[0].image_weights)
    learned['learned weight, image'] = maps[0].image_weights
  figures = {}
  if len(maps[0].attention):
    figures['attention'] = draw.layer_attention([f'{kind} tokens' for kind in kinds],
                                                [means[kind]['layers'] for kind in kinds], taps)
    figures['tokens'] = draw.layer_attention([reads[number].labels[i] or f'image {i}' for number, i in shown],
                                             [maps[number].attention[:, i].mean(axis=1) for number, i in shown], taps)
  is_text = ~reads[0].is_image
  figures['text'] = draw.text([label for label in reads[0].labels if label],
                              {title: values[is_text] for title, values in maps[0].by_tap.items()}, taps)
  if reads[0].places.size:
    figures['image'] = draw.over_image(reads[0].image, reads[0].places, maps[0].by_tap, taps)
  series = learned | {f'share, {kind}': means[kind]['share'] for kind in kinds}
  figures['weights'] = draw.bars(
      [f'tap {tap}' for tap in taps],
      {title: [(value, value, value) for value in values] for title, values in series.items()}, '')
  return report, figures


def _similarity(reads: list[Read], taps: tuple[int, ...]) -> tuple[dict, dict]:
  """(report, figures) of the VLM's layers: cosine similarity and size of their states."""
  report, matrices, sizes = {}, {}, {}
  for kind in _kinds(reads):
    parts = [read.layers[read.is_image == (kind == 'image')] for read in reads]
    parts = [part for part in parts if len(part)]
    mean = lambda values, parts=parts: np.average(values, axis=0, weights=[len(part) for part in parts])
    matrix = mean([inside.layer_similarity(part) for part in parts])
    sizes[kind], matrices[f'{kind} tokens'] = mean([inside.layer_norms(part) for part in parts]), matrix
    nearest = _rounded(inside.nearest_tap(matrix, taps)) if taps else None
    report[kind] = dict(cosine=_rounded(matrix), nearest_tap=nearest, rms=_rounded(sizes[kind]),
                        neighbours={d: round(float(np.diag(matrix, d).mean()), 4)
                                    for d in range(1, min(4, len(matrix)))})
    if all(len(part) > 1 for part in parts):
      matrix = mean([inside.layer_similarity(part, centred=True) for part in parts])
      matrices[f'{kind} tokens, without their mean'] = matrix
      report[kind]['centred'] = _rounded(matrix)
  draw = _figures()
  return report, dict(similarity=draw.similarity(matrices, taps),
                      sizes=draw.by_layer(sizes, taps, 'root mean square of the states'))


def _dropout(pipe: pipeline.UniFusionPipeline, reads: list[Read], requests: list[Request], height: int, width: int,
             settings: SampleConfig, sets: dict[str, tuple[int, ...]], replace: tuple[str, ...]) -> tuple[dict, dict]:
  """(report, figures) of images without taps: how far their pixels are from those of the same noise with all taps."""
  count, draw = settings.num_images, _figures()
  states = [reads[i // count].states for i in range(len(requests))]
  sample_with = lambda *dropped: inside.generate(pipe, requests, states, height, width, settings, *dropped)
  whole = sample_with()
  seeds = whole.reshape(len(reads), count, *whole.shape[1:])
  another = float(inside.rms(seeds[:, 1:], seeds[:, :-1]).mean()) if count > 1 else None
  report, shown, changes = {}, [('all taps', whole[0])], {}
  for how in replace:
    for name, positions in sets.items():
      images = sample_with(positions, how)
      change = inside.rms(images, whole)
      changes.setdefault(how, []).append((change.mean(), change.min(), change.max()))
      report.setdefault(name, {})[how] = dict(zip(('mean', 'least', 'most'), _rounded(changes[how][-1])))
      shown.append((f'{name}: {how}\n{change[0]:.1f}', images[0]))
  titles, images = zip(*[('reference', reads[0].image)] * (reads[0].image is not None), *shown)
  cells = [imaging.shrunk(image, CELL) for image in images]
  first = len(titles) - len(shown)
  apart = [np.full_like(cells[0], 255)] * first + [
      imaging.shrunk(np.abs(image.astype(int) - whole[0]).astype(np.uint8), CELL) for _, image in shown]
  figures = dict(dropout=draw.images(titles, cells, apart), changes=draw.bars(
      list(sets), changes, 'rms difference, of 255', another and ('another seed', another)))
  return dict(dropout=dict(images=len(requests), another_seed=another and round(another, 4), sets=report)), figures


def page(report: dict, figures: dict) -> str:
  """The report as Markdown, with the figures beside it."""
  taps, lines = report['taps'], ['# A look inside', '']
  for request in report['requests']:
    lines += [f'- `{request["prompt"]}`, {request["references"]} references: {request["image_tokens"]} image tokens, '
              f'{request["text_tokens"]} of the text `{request["rewrite"]}`. {request["warning"]}'.strip()]
  table = lambda head, rows: ['', '| ' + ' | '.join(map(str, head)) + ' |', '|---' * len(head) + '|',
                              *('| ' + ' | '.join(map(str, row)) + ' |' for row in rows), '']
  number = lambda value: f'{value:.2f}'
  if 'note' in report:
    lines += ['', report['note']]
  if 'weights' in report:
    lines += ['', '## LAP', '', f'Condition tokens computed along the way differ from the model\'s by '
              f'{report["difference"]:.1e} of their size.']
    rows = [['learned weight', *map(number, report['weights'])]]
    if 'image_weights' in report:
      rows.append(['learned weight, image tokens', *map(number, report['image_weights'])])
    for kind, mean in report['mean'].items():
      rows += [[f'attention, block {i + 1}: {kind}', *map(number, received)]
               for i, received in enumerate(mean['received'])]
      rows.append([f'share of the sum: {kind}', *map(number, mean['share'])])
    lines += table(['mean over the tokens', *(f'tap {tap}' for tap in taps)], rows)
  lines += _shown_figures(figures, 'attention', 'tokens', 'text', 'image', 'weights')
  lines += ['', '## Layers of the VLM', '', 'Mean cosine similarity of layers that are 1, 2 and 3 apart, and the least '
            'similarity of a layer to that tap which is most like it.']
  lines += table(['', *range(1, 4), 'nearest tap'], [
      [kind, *(number(each['neighbours'][apart]) if apart in each['neighbours'] else '' for apart in range(1, 4)),
       number(min(each['nearest_tap'])) if each['nearest_tap'] else '']
      for kind, each in report['layers'].items()])
  lines += _shown_figures(figures, 'similarity', 'sizes')
  if 'dropout' in report:
    dropout = report['dropout']
    seed = f'; another seed changes {dropout["another_seed"]:.1f}' if dropout['another_seed'] is not None else ''
    lines += ['## Without taps', '', f'Root mean square difference of the pixels, of 255, to the image of the same '
              f'noise with all taps: mean [least, most] of {dropout["images"]} images{seed}.']
    hows = list(next(iter(dropout['sets'].values())))
    lines += table(['without', *hows], [[name, *(f'{x["mean"]:.1f} [{x["least"]:.1f}, {x["most"]:.1f}]'
                                                 for x in each.values())] for name, each in dropout['sets'].items()])
    lines += _shown_figures(figures, 'changes', 'dropout')
  if 'scenes' in report:
    scenes = report['scenes']
    present = scenes['rates']['all']['present']
    lines += ['## On scenes', '', f'Share of {scenes["examples"]} {scenes["task"]} requests of the test split in whose '
              'images the judge finds all that was asked, [95% interval]. With all taps '
              f'{present["all"]:.2f} [{present["interval"][0]:.2f}, {present["interval"][1]:.2f}].']
    rates = {name: each for name, each in scenes['rates'].items() if name != 'all'}
    lines += table(['without', *next(iter(rates.values()))], [
        [name, *(f'{x["all"]:.2f} [{x["interval"][0]:.2f}, {x["interval"][1]:.2f}]' for x in each.values())]
        for name, each in rates.items()])
    lines += _shown_figures(figures, 'rates')
  return '\n'.join(lines).rstrip() + '\n'


def _shown_figures(figures: dict, *names: str) -> list[str]:
  return [line for name in names if name in figures for line in (f'![{CAPTIONS[name]}]({name}.png)', '')]
