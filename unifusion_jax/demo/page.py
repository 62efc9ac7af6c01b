"""The page: what is shown of the service, in Gradio's components. What it may ask for is the service's matter."""

from collections.abc import Iterator
import dataclasses
import html
import os

from absl import logging
import gradio as gr
from gradio import processing_utils
import numpy as np

from unifusion_jax import verifi
from unifusion_jax.data import imaging
from unifusion_jax.demo.service import Cancelled, Form, Image, Service, Update
from unifusion_jax.errors import UserError

KEPT = 24   # images of one visitor
LARGE = 512  # pixels: smaller images are shown enlarged, each pixel a square
# The system's fonts: Gradio's own would be loaded from elsewhere
THEME = gr.themes.Default(primary_hue='orange', neutral_hue='slate', font=['system-ui', 'sans-serif'],
                          font_mono=['ui-monospace', 'monospace'])
CSS = """
.gradio-container { max-width: 1240px !important; margin: auto; }
.gradio-container .app { padding: 14px !important; }
.gradio-container main { padding: 0 !important; }
.status .refused { color: #b91c1c; font-weight: 600; }
.dark .status .refused { color: #fca5a5; }
.facts { overflow-wrap: anywhere; }
.warning { color: #b45309; }
.dark .warning { color: #fcd34d; }
.live img, .history img { image-rendering: %s; object-fit: contain !important; }
.live .grid-wrap, .history .grid-wrap { height: auto !important; min-height: 0 !important;
  max-height: none !important; padding-top: 32px; }
.live .grid-container { grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)) !important; }
.live .grid-container img { max-height: 420px; }
.history .grid-container { grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)) !important; }
footer { display: none !important; }
"""
INTRODUCTION = """# UniFusion
Ask for an image, or for an edit of yours. A vision-language model writes what the image should show, and the image is
generated from its words: change them, and generate again."""


@dataclasses.dataclass
class Inputs:
  """Components of the form. settings: by the names of Form's fields, as the rest."""
  prompt: gr.Textbox
  references: list[gr.Image]
  slots: list[gr.Column]
  strengths: list[gr.Slider]
  text: gr.Textbox
  settings: dict[str, gr.components.Component]
  status: gr.HTML
  generate: gr.Button
  cancel: gr.Button
  write: gr.Button
  from_text: gr.Button
  new_seed: gr.Button

  @property
  def all(self) -> list:
    return [self.prompt, self.text, *self.references, *self.strengths, *self.settings.values()]

  def form(self, values: tuple) -> Form:
    """The form that was filled in, of the values of `all` as the browser sends them."""
    count = len(self.references)
    prompt, text, *values = values
    given = [(image['path'], strength) for image, strength in zip(values, values[count:2 * count])
             if image and image.get('path')]
    paths, strengths = zip(*given) if given else ((), ())
    return Form(prompt, text, paths, strengths, **dict(zip(self.settings, values[2 * count:])))

  def filled(self, form: Form) -> list:
    """Values of `all` that fill a form in again, as far as its references are still there."""
    count = len(self.references)
    paths = [path if os.path.exists(path) else None for path in form.references]
    return [form.prompt, form.text, *(paths + [None] * count)[:count],
            *(list(form.strengths) + [1.0] * count)[:count], *(getattr(form, name) for name in self.settings)]


@dataclasses.dataclass
class Results:
  """Components that show what came of it; `kept` are the visitor's images, newest first."""
  live: gr.Gallery
  details: gr.Column
  comparison: gr.ImageSlider
  image: gr.Image
  facts: gr.HTML
  download: gr.DownloadButton
  reuse: gr.Button
  gallery: gr.Gallery
  kept: gr.State
  chosen: gr.State


@dataclasses.dataclass(frozen=True)
class Kept:
  """A finished image of a visitor, and the reference that it is compared with, as files in Gradio's cache."""
  path: str
  before: str | None
  form: Form
  facts: str

  @classmethod
  def of(cls, image: Image, cache: str) -> 'Kept':
    save = lambda png, name: processing_utils.save_bytes_to_cache(png, name, cache)
    before = None if image.before is None else save(imaging.png_bytes(image.before), 'reference.png')
    return cls(save(image.png, f'unifusion-seed-{image.form.seed}.png'), before, image.form, _facts(image))


def build(service: Service) -> gr.Blocks:
  """The page of a service."""
  with gr.Blocks(title='UniFusion', analytics_enabled=False, delete_cache=(3600, 86_400)) as blocks:
    gr.Markdown(INTRODUCTION)
    with gr.Row():
      with gr.Column(scale=5, min_width=340):
        inputs = _inputs(service)
      with gr.Column(scale=4, min_width=340):
        results = _results()
    _connect(blocks, service, inputs, results)
  return blocks


def css(service: Service) -> str:
  """The page's style; images of a small model keep their pixels visible."""
  return CSS % ('pixelated' if service.pipe.size < LARGE else 'auto')


def _inputs(service: Service) -> Inputs:
  limits = service.limits
  prompt = gr.Textbox(label='Prompt', lines=2, max_lines=6, autofocus=True,
                      placeholder='make the circle blue', elem_id='prompt')
  slots, references, strengths = [], [], []
  with gr.Row():
    for i in range(limits.max_references):
      with gr.Column(min_width=150, visible=i == 0) as slot:
        references.append(gr.Image(
            label=f'Reference {i + 1}' if i else 'Reference', sources=['upload', 'clipboard', 'webcam'], height=190,
            type='filepath', buttons=[], elem_id=f'reference-{i + 1}'))
        strengths.append(gr.Slider(0, 2, 1, step=0.05, label='Strength', elem_id=f'strength-{i + 1}', visible=False))
      slots.append(slot)
  with gr.Row():
    generate = gr.Button('Generate', variant='primary', min_width=120, elem_id='generate')
    cancel = gr.Button('Cancel', min_width=120, elem_id='cancel')
  status = gr.HTML(elem_id='status', elem_classes='status', container=False)
  text = gr.Textbox(label='Text of the VLM', info='Written from prompt and references. The image is generated from it: '
                    'edit it, then generate from it.', lines=3, max_lines=12, elem_id='text')
  with gr.Row():
    write = gr.Button('Write only', size='sm', min_width=120, elem_id='write')
    from_text = gr.Button('Generate from text', size='sm', min_width=120, elem_id='from-text')
  with gr.Accordion('Settings', open=False, elem_id='settings'):
    settings, new_seed = _settings(service)
  return Inputs(prompt, references, slots, strengths, text, settings, status, generate, cancel, write, from_text,
                new_seed)


def _settings(service: Service) -> tuple[dict[str, gr.components.Component], gr.Button]:
  limits, defaults, unit = service.limits, service.pipe.settings, service.pipe.unit
  settings: dict[str, gr.components.Component] = {}
  with gr.Row():
    with gr.Column(min_width=140):
      settings['seed'] = gr.Number(defaults.seed, precision=0, label='Seed', elem_id='seed')
      new_seed = gr.Button('New seed', size='sm')
    settings['num_images'] = gr.Slider(1, max(2, limits.max_images), 1, step=1, label='Images', min_width=140,
                                       elem_id='num-images')
  with gr.Row():
    settings['steps'] = gr.Slider(1, max(2, limits.max_steps), min(defaults.steps, limits.max_steps), step=1,
                                  label='Steps', min_width=140, elem_id='steps')
    settings['guidance'] = gr.Slider(1, 10, defaults.guidance, step=0.1, label='Guidance (1: off)', min_width=140)
  with gr.Row():
    size = f'0: as the first reference. Else a multiple of {unit}'
    settings['width'] = gr.Number(defaults.width, precision=0, label='Width', info=size, min_width=140, elem_id='width')
    settings['height'] = gr.Number(defaults.height, precision=0, label='Height', info=size, min_width=140,
                                   elem_id='height')
  settings['tiles'] = gr.Slider(0, limits.max_tiles, min(defaults.tiles, limits.max_tiles), step=1,
                                label='Tiles of a reference, at most (0: as the model was trained)')
  settings['system'] = gr.Dropdown(['', *verifi.SYSTEM], value=defaults.system or '', allow_custom_value=True,
                                   label='System prompt', info='a name, or a text of yours; empty: the model\'s own')
  settings['negative_prompt'] = gr.Textbox(defaults.negative_prompt, label='Negative prompt')
  settings['verifi'] = gr.Checkbox(defaults.verifi, label='The VLM writes the text (VERIFI)',
                                   info='Else the image is generated from the prompt as it is.')
  return settings, new_seed


def _results() -> Results:
  live = gr.Gallery(label='At work', visible=False, columns=2, height='auto', allow_preview=False,
                    format='png', buttons=[], elem_id='live', elem_classes='live')
  with gr.Column(visible=False) as details:
    comparison = gr.ImageSlider(label='Reference and result', format='png', max_height=420, buttons=['fullscreen'],
                                elem_id='comparison')
    image = gr.Image(label='Result', format='png', height=420, buttons=['fullscreen'], interactive=False,
                     elem_id='image')
    facts = gr.HTML(elem_id='facts', elem_classes='facts', padding=True)
    with gr.Row():
      download = gr.DownloadButton('Download PNG', size='sm', elem_id='download')
      reuse = gr.Button('Use these settings', size='sm', elem_id='reuse')
  gallery = gr.Gallery(label='Images of this visit', visible=False, columns=4, height='auto',
                       allow_preview=False, format='png', buttons=[], elem_id='history', elem_classes='history')
  return Results(live, details, comparison, image, facts, download, reuse, gallery, gr.State([]), gr.State())


def _connect(blocks: gr.Blocks, service: Service, inputs: Inputs, results: Results) -> None:
  """What happens at each button. Nothing of it is an endpoint of Gradio's API."""
  outputs = [inputs.text, inputs.status, *vars(results).values()]
  own = dict(api_visibility='private')
  # The service has the queue, and it alone opens images: Gradio would decode them before their size is known
  at_work = dict(inputs=[results.kept, *inputs.all], outputs=outputs, preprocess=False, show_progress='hidden',
                 concurrency_limit=None, **own)

  def handler(method, with_text: bool):
    def handle(request: gr.Request, kept, *values):
      form = inputs.form(values)
      form = form if with_text else dataclasses.replace(form, text='')
      yield from _news(method(form, request.session_hash), inputs, results, kept)
    return handle

  generate = handler(service.generate, with_text=False)
  gr.on([inputs.generate.click, inputs.prompt.submit], generate, **at_work)
  inputs.from_text.click(handler(service.generate, with_text=True), **at_work)
  inputs.write.click(handler(service.write, with_text=False), **at_work)

  def cancel(request: gr.Request) -> None:
    service.cancel(request.session_hash)
  inputs.cancel.click(cancel, queue=False, **own)
  blocks.unload(cancel)

  inputs.new_seed.click(lambda: int(np.random.default_rng().integers(2 ** 31)), outputs=inputs.settings['seed'],
                        queue=False, **own)

  def show_slots(*images):
    filled = [bool(image) for image in images]
    most = max((i for i, there in enumerate(filled) if there), default=-1) + 1
    return [gr.update(visible=i <= most) for i in range(len(images))] + [gr.update(visible=there) for there in filled]
  for reference in inputs.references:
    reference.change(show_slots, inputs.references, [*inputs.slots, *inputs.strengths], preprocess=False,
                     queue=False, show_progress='hidden', **own)

  def choose(kept, event: gr.SelectData):
    return _details(results, kept[event.index])
  results.gallery.select(choose, results.kept, outputs, queue=False, show_progress='hidden', **own)
  results.reuse.click(lambda chosen: inputs.filled(chosen.form), results.chosen, inputs.all, queue=False, **own)


def _news(updates: Iterator[Update], inputs: Inputs, results: Results, kept: list[Kept]) -> Iterator[dict]:
  """Values of components for each update of a request, and for how it ended."""
  finished = ()
  try:
    for update in updates:
      values = {inputs.status: _status(update.status)}
      if update.text is not None:
        values[inputs.text] = update.text
      if update.note:
        values[inputs.status] += _warning(update.note)
      if update.previews:
        shown = [image.sample.image for image in update.images] + [*update.previews]
        values[results.live] = gr.update(value=[_enlarged(pixels) for pixels in shown], visible=True)
      finished = update.images
      yield values
    yield _finished(results, kept, finished)
  except (UserError, Cancelled) as error:
    yield _finished(results, kept, finished) | {inputs.status: _status(str(error), refused=True)}
  except Exception:
    logging.exception('a request of the page failed')
    yield _finished(results, kept, finished) | {
        inputs.status: _status('this failed for a reason that is not yours; the log of the server has it',
                                refused=True)}


def _finished(results: Results, kept: list[Kept], images: tuple[Image, ...]) -> dict:
  """Values of components where a request ended with these images; the first of them is shown."""
  values = {results.live: gr.update(value=None, visible=False)}
  if images:
    kept = [*(Kept.of(image, results.gallery.GRADIO_CACHE) for image in images), *kept][:KEPT]
    captions = [(each.path, f'seed {each.form.seed}') for each in kept]
    values |= {results.kept: kept, results.gallery: gr.update(value=captions, visible=True)}
    values |= _details(results, kept[0])
  return values


def _details(results: Results, chosen: Kept) -> dict:
  """Values of components that show one image with all that made it."""
  image = _shown(chosen.path)
  pair = (_shown(chosen.before), image) if chosen.before else None
  return {results.details: gr.update(visible=True), results.chosen: chosen,
          results.comparison: gr.update(value=pair, visible=bool(pair)),
          results.image: gr.update(value=None if pair else image, visible=not pair),
          results.download: chosen.path, results.facts: chosen.facts}


def _facts(image: Image) -> str:
  """All that made an image, as HTML."""
  form, sample = image.form, image.sample
  y, x = sample.image.shape[:2]
  texts = [('Prompt', form.prompt), ('Text', sample.rewrite), ('System prompt', form.system),
           ('Negative prompt', form.negative_prompt)]
  lines = [f'<b>{name}</b>: {html.escape(text)}' for name, text in texts if text]
  numbers = [f'{x}x{y}', f'seed {form.seed}', f'{form.steps} steps', f'guidance {form.guidance:g}']
  if any(strength != 1 for strength in form.strengths):
    numbers.append(f'strength {", ".join(f"{strength:g}" for strength in form.strengths)}')
  if form.tiles:
    numbers.append(f'{form.tiles} tiles')
  lines.append(' &middot; '.join(numbers))
  return '<br>'.join(lines) + ''.join(_warning(note) for note in (sample.warning, sample.remark) if note)


def _status(text: str, refused: bool = False) -> str:
  return f'<span class="{"refused" if refused else "news"}" role="status">{html.escape(text)}</span>'


def _warning(text: str) -> str:
  return f'<div class="warning">{html.escape(text)}</div>'


def _shown(path: str) -> str | np.ndarray:
  """A file for the browser, which shows small images small: those are enlarged here."""
  return path if max(imaging.read_size(path)) >= LARGE else _enlarged(imaging.read(path))


def _enlarged(image: np.ndarray) -> np.ndarray:
  factor = max(1, LARGE // max(image.shape[:2]))
  return image.repeat(factor, axis=0).repeat(factor, axis=1)
