"""Requests of the page: bounded, in one queue, one at a time on the model. Knows nothing of the page."""

from collections.abc import Iterator
from concurrent import futures
import dataclasses
import os
import queue
import threading
import time

import numpy as np

from unifusion_jax import metadata, prompting, ranges
from unifusion_jax.data import imaging
from unifusion_jax.demo.settings import DemoConfig
from unifusion_jax.errors import clipped, UserError
from unifusion_jax.pipeline import Sample, UniFusionPipeline
from unifusion_jax.ranges import Range
from unifusion_jax.request import Request, SampleConfig, shape_like

POLL = 0.5  # seconds between looks at the place in the queue


@dataclasses.dataclass(frozen=True)
class Form:
  """What a user filled in, of any type as it comes from the browser; None is the pipeline's own default.

  text: conditions the image instead of the VLM's.
  references: files, as they were uploaded.
  strengths: one for each reference.
  """
  prompt: str = ''
  text: str = ''
  references: tuple[str, ...] = ()
  strengths: tuple[float, ...] = ()
  num_images: int | None = 1
  seed: int | None = 0
  steps: int | None = None
  guidance: float | None = None
  height: int | None = 0
  width: int | None = 0
  tiles: int | None = None
  system: str = ''
  negative_prompt: str = ''
  verifi: bool | None = None


@dataclasses.dataclass(frozen=True)
class Image:
  """A finished image.

  form: of this image alone, with the text that conditioned it.
  png: the file, with its metadata.
  before: the first reference as large as the image, uint8 [y x 3]; None without references.
  """
  form: Form
  sample: Sample
  png: bytes
  before: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Update:
  """News of a request.

  text: the VLM's, once it is there; note: the warning and the remark on it, '' for none.
  images: all finished ones; previews: uint8 [y x 3], of those at work.
  """
  status: str
  text: str | None = None
  note: str = ''
  images: tuple[Image, ...] = ()
  previews: tuple[np.ndarray, ...] = ()


class Cancelled(Exception):
  """A request that its user cancelled."""


@dataclasses.dataclass
class Job:
  """A request in the queue, and its updates; the last one is None or the error that ended it."""
  updates: queue.SimpleQueue = dataclasses.field(default_factory=queue.SimpleQueue)
  cancelled: threading.Event = dataclasses.field(default_factory=threading.Event)
  future: futures.Future = dataclasses.field(init=False)
  begun: float = 0.0

  def tell(self, status: str, **more) -> None:
    self.updates.put(Update(status, **more))


@dataclasses.dataclass(frozen=True)
class _Checked:
  """A form as the pipeline takes it."""
  form: Form
  requests: list[Request]
  settings: SampleConfig
  height: int
  width: int


class Service:
  """A pipeline for several users, who are told apart by the name of their session.

  `write` and `generate` yield Updates. They raise a UserError for what is refused, before or while it is done, and
  Cancelled.
  """

  def __init__(self, pipe: UniFusionPipeline, limits: DemoConfig):
    self.pipe, self.limits = pipe, limits
    self._worker = futures.ThreadPoolExecutor(1, thread_name_prefix='model')
    self._jobs: dict[str, Job] = {}  # of each session, in the order of their turns
    self._lock = threading.Lock()
    self._compiled = set()  # what programs were run for: others are compiled first

  def write(self, form: Form, session: str) -> Iterator[Update]:
    """The VLM writes the text alone."""
    checked = self.check(dataclasses.replace(form, text='', num_images=1, verifi=True))
    yield from self._in_turn(session, lambda job: self._write(job, checked, 'written: edit it, or generate from it'))

  def generate(self, form: Form, session: str) -> Iterator[Update]:
    """Images; without a text in the form the VLM writes it before."""
    checked = self.check(form)
    yield from self._in_turn(session, lambda job: self._generate(job, checked))

  def cancel(self, session: str) -> None:
    """Ends the session's request: at once while it waits, else after the step at work."""
    with self._lock:
      job = self._jobs.get(session)
    if job:
      job.cancelled.set()
      job.future.cancel()

  def close(self) -> None:
    """Cancels all requests and ends the thread of the model."""
    for session in list(self._jobs):
      self.cancel(session)
    self._worker.shutdown()

  def check(self, form: Form) -> _Checked:
    """A form as the pipeline takes it; UserError for what is beyond the limits or cannot be sampled."""
    pipe, limits = self.pipe, self.limits
    self._check_texts(form)
    prompt, text = (form.prompt or '').strip(), (form.text or '').strip() or None
    strengths = tuple(map(_as_float, form.strengths)) if any(value != 1 for value in form.strengths) else ()
    settings = pipe.settings.changed(
        num_images=form.num_images, seed=form.seed, steps=form.steps, guidance=_as_float(form.guidance),
        height=form.height, width=form.width, tiles=form.tiles, system=form.system or None,
        negative_prompt=form.negative_prompt, verifi=form.verifi, strengths=strengths)
    problems = ranges.problems(settings, '', num_images=Range(1, limits.max_images), steps=Range(1, limits.max_steps),
                               tiles=Range(0, limits.max_tiles)) or settings.problems(pipe.unit, '')
    if len(form.references) > limits.max_references:
      problems.append(f'{len(form.references)} references are more than the {limits.max_references} that may be given')
    if problems:
      raise UserError('; '.join(problems))
    references = tuple(self._reference(i, path) for i, path in enumerate(form.references, 1))
    height, width = shape_like(references[0] if references else None, pipe.size, pipe.unit, settings.height,
                               settings.width)
    if height * width > limits.max_pixels:
      raise UserError(f'an image of {width}x{height} has {height * width:,} pixels, and here it may have '
                      f'{limits.max_pixels:,}: give a smaller width and height')
    requests = [Request(prompt or text, references, settings.seed + i, text, 'prompt')
                for i in range(settings.num_images)]
    prompts = prompting.Prompts.of(pipe.prompt_encoder, requests[:1], settings, pipe.max_positions)
    if prompts.max_length > limits.max_tokens:
      raise UserError(f'this is up to {prompts.max_length:,} tokens for the VLM, and here there may be '
                      f'{limits.max_tokens:,}: give fewer references, fewer tiles or a shorter system prompt')
    prompting.check(pipe.prompt_encoder, requests, settings, pipe.max_positions)
    return _Checked(form, requests, settings.changed(batch_size=min(settings.batch_size, len(requests))), height, width)

  def _check_texts(self, form: Form) -> None:
    most = self.limits.max_characters
    for name in ('prompt', 'text', 'system', 'negative_prompt'):
      text = getattr(form, name)
      if text is not None and not isinstance(text, str):
        raise UserError(f'{name}={clipped(text)} must be a text')
      if text and len(text) > most:
        raise UserError(f'the {name.replace("_", " ")} has {len(text):,} characters, and here it may have {most:,}: '
                        'shorten it')
    if not f'{form.prompt or ""}{form.text or ""}'.strip():
      raise UserError('there is nothing to generate: write a prompt')

  def _reference(self, number: int, path: str) -> np.ndarray:
    """A reference's pixels. Its header is read before it is decoded; the server's name of the file stays unsaid."""
    try:
      if (size := os.path.getsize(path)) > self.limits.max_upload_megabytes * 2 ** 20:
        raise UserError(f'the file has {size / 2 ** 20:.0f} MB, and here it may have '
                        f'{self.limits.max_upload_megabytes}: scale it down first')
      with open(path, 'rb') as file:
        return imaging.read(file.read(), self.limits.max_upload_pixels)
    except UserError as error:
      raise UserError(f'reference {number}: {error}') from error
    except OSError as error:
      raise UserError(f'reference {number} is no longer here: upload it again') from error

  def _in_turn(self, session: str, work) -> Iterator[Update]:
    """Queues `work(job)` and yields its updates, and before that its place in the queue."""
    with self._lock:
      if session in self._jobs:
        raise UserError('your last request is still at work: wait for it, or cancel it')
      if len(self._jobs) >= self.limits.max_queue:
        raise UserError(f'{len(self._jobs)} requests are in the queue, which is full: try again in a while')
      job = self._jobs[session] = Job()
      job.future = self._worker.submit(self._work, job, work)
    job.future.add_done_callback(lambda _: self._end(session, job))
    told = 0  # requests before this one
    try:
      while True:
        try:
          update = job.updates.get(timeout=POLL)
        except queue.Empty:
          if (before := self._before(session)) not in (0, told):
            told = before
            yield Update(f'waiting for {before} request{"s" * (before > 1)} before yours ...')
          continue
        if isinstance(update, BaseException):
          raise update
        if update is None:
          return
        yield update
    finally:  # whoever listened may be gone
      job.cancelled.set()
      job.future.cancel()

  def _before(self, session: str) -> int:
    """Requests before the session's own; the first is at work."""
    with self._lock:
      return list(self._jobs).index(session) if session in self._jobs else 0

  def _work(self, job: Job, work) -> None:
    job.begun = time.monotonic()
    work(job)

  def _end(self, session: str, job: Job) -> None:
    with self._lock:
      del self._jobs[session]
    job.updates.put(Cancelled('cancelled while it waited') if job.future.cancelled() else job.future.exception())

  def _go_on(self, job: Job, where: str) -> None:
    """Cancelled, or a UserError past the time that a request has."""
    if job.cancelled.is_set():
      raise Cancelled(f'cancelled {where}')
    if time.monotonic() - job.begun > self.limits.max_seconds:
      raise UserError(f'stopped {where}: a request may take {self.limits.max_seconds} seconds; ask for fewer steps, '
                      'fewer images or smaller ones')

  def _write(self, job: Job, checked: _Checked, status: str) -> None:
    """The VLM's half: it writes a text, or reads a given one or the prompt."""
    rows, settings = checked.requests[:checked.settings.batch_size], checked.settings
    writes = settings.verifi and rows[0].rewrite is None
    shapes = ('text', writes, len(rows), len(rows[0].references), settings.tiles, settings.system)
    job.tell(f'the VLM {"writes" if writes else "reads"} ...{self._note(shapes)}')
    text, warning, remark = self.pipe.write(rows, settings)[0]
    self._compiled.add(shapes)
    self._go_on(job, 'after the text')
    job.tell(status, text=text if writes else None, note='; '.join(filter(None, (warning, remark))))

  def _generate(self, job: Job, checked: _Checked) -> None:
    settings, done, images = checked.settings, 0, []
    shapes = (checked.height, checked.width, settings.batch_size, settings.guidance == 1,
              len(checked.form.references), settings.method)
    steps = settings.steps * -(-len(checked.requests) // settings.batch_size)
    self._write(job, checked, f'step 1 of {steps} ...{self._note(shapes)}')
    every = max(1, -(-settings.steps // self.limits.previews)) if self.limits.previews else settings.steps

    def stepped(count: int, _) -> None:
      nonlocal done
      done = count
      self._go_on(job, f'after step {done} of {steps}')
      job.tell(f'step {done} of {steps} ...', images=tuple(images))

    def preview(step: int, look) -> None:
      if step % every == 0:
        job.tell(f'step {done} of {steps} ...', images=tuple(images), previews=tuple(look()))

    for requests, samples in self.pipe.batches(checked.requests, checked.height, checked.width, settings=settings,
                                               callback=stepped, preview=preview if self.limits.previews else None):
      self._compiled.add(shapes)
      images += [self._image(checked, request, sample) for request, sample in zip(requests, samples)]
    job.tell(f'done in {time.monotonic() - job.begun:.1f} s', images=tuple(images))

  def _note(self, shapes: tuple) -> str:
    return '' if shapes in self._compiled else ' (the first of its kind: its program is compiled before)'

  def _image(self, checked: _Checked, request: Request, sample: Sample) -> Image:
    settings = checked.settings
    text = metadata.as_text(self.pipe.metadata(request, sample, settings))
    written = sample.rewrite if settings.verifi and not sample.warning else ''
    form = dataclasses.replace(
        checked.form, text=request.rewrite or written, num_images=1, seed=request.seed, steps=settings.steps,
        guidance=settings.guidance, tiles=settings.tiles, verifi=settings.verifi)
    before = [imaging.resize_cover(image, checked.width, checked.height) for image in request.references[:1]]
    return Image(form, sample, imaging.png_bytes(sample.image, text), before[0] if before else None)


def _as_float(value):
  """A whole number as a float, as the command line has it; a browser knows no difference."""
  return float(value) if isinstance(value, int) and abs(value) < 2 ** 53 else value
