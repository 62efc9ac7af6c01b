"""Requests in, pictures out: the one sampler behind the command line, previews, evaluation and notebooks.

A request is laid out by VERIFI; the VLM reads it and writes; the states of the picture tokens that it read and of the
tokens that it wrote, as they were computed, condition the DiT; the flow is integrated and decoded.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax import flow
from unifusion_jax import generate
from unifusion_jax import sharding
from unifusion_jax import verifi
from unifusion_jax.data import transforms
from unifusion_jax.models import unifusion
from unifusion_jax.objectives import generation


@dataclasses.dataclass(frozen=True)
class Request:
  """One picture to make.

  Attributes:
    instruction: what is asked.  references: pictures uint8 [y x 3], in the order they are shown to the VLM.
    seed: of the noise.
    rewrite: text to condition on instead of what the VLM would write.
  """
  instruction: str
  references: tuple = ()
  seed: int = 0
  rewrite: str | None = None


@dataclasses.dataclass(frozen=True)
class Result:
  picture: np.ndarray  # uint8 [y x 3]
  written: str         # what the DiT was conditioned on
  remark: str = ''     # why that is not what was to be expected


@dataclasses.dataclass
class Sampler:
  """Samples from one model; every set of shapes and settings is compiled once.

  Attributes:
    settings: a config.SampleConfig; all but what a request says of itself and `weights` is read here.
    factor: pixels of a side of a latent.  channels: c of the latents.
  """
  model: unifusion.UniFusion
  frozen: generation.Frozen
  layout: transforms.Layout
  taps: tuple[int, ...]
  settings: object
  factor: int
  channels: int

  def __call__(self, requests: list[Request], height: int, width: int, pictures=None, start: float = 1.0) -> list[Result]:
    """All requests at one size, as one batch.

    With `pictures`, uint8 [y x 3] for each request, drawing does not begin with noise but with these, noised to the time
    `start`.

    Raises ValueError for a size that is no whole number of latents and patches, and for text that is too long.
    """
    unit = self.factor * self.model.config.dit.patch
    if height % unit or width % unit or min(height, width) < unit:
      raise ValueError(f'a picture of {width}x{height} cannot be made: both sides must be multiples of {unit}')
    padded = requests + [requests[-1]] * (sharding.rows(len(requests)) - len(requests))
    condition, mask, written, remarks = self._condition(padded)
    null, null_mask = self._null(len(padded), condition.shape[1])
    noise = np.stack([_noise(request.seed, (height // self.factor, width // self.factor, self.channels))
                      for request in padded])
    begin = sharding.put(noise)
    if pictures is not None:
      pictures = [*pictures, *[pictures[-1]] * (len(padded) - len(requests))]
      begin = _noised(self.frozen.vae, sharding.put(np.stack(pictures)), begin, jnp.float32(start))
    s = self.settings
    shift = s.shift or flow.shift_for((height // unit) * (width // unit))
    keys = _keys([request.seed for request in padded]) if s.eta else None
    drawn = _draw(self.model, self.frozen.vae, condition, mask, null, null_mask, begin, jnp.float32(s.guidance),
                  jnp.float32(start), jnp.float32(s.eta), keys, steps=s.steps, method=s.method, shift=float(shift),
                  guided=s.guidance != 1.0)
    return [Result(*parts) for parts in zip(sharding.fetch(drawn)[:len(requests)], written, remarks)]

  def _condition(self, requests):
    """Condition tokens [b q d], their mask [b q], and of each request the text they stand for and a remark."""
    s, layout = self.settings, self.layout.in_tiles(self.settings.tiles)
    system = s.system or layout.system
    count = max(len(request.references) for request in requests)
    seen, counts = zip(*(layout.eye.see(request.references, count) for request in requests))
    pictures = sharding.put(stacked(seen)) if count else None
    longer = len(layout.chat.system_ids(system)) - len(layout.chat.system_ids(layout.system))
    length = layout.lengths(count)[0] + max(0, longer)
    forced = {i: (r.instruction if r.rewrite is None else r.rewrite, r.rewrite is None)
              for i, r in enumerate(requests) if r.rewrite is not None or not s.verifi}
    remarks = [''] * len(requests)
    condition = mask = None
    if len(forced) < len(requests):
      rows = [verifi.arrays(layout.chat.spans(r.instruction, c, None, system), length, count * layout.eye.most,
                            ('picture',) if s.pictures else ()) for r, c in zip(requests, counts)]
      out, condition, mask = self._listen(layout, sharding.put(stacked(rows)), pictures, [r.seed for r in requests])
      written, failed = read(layout.chat, *sharding.fetch((out.tokens, out.lengths)))
      for i, reason in failed.items():
        if i not in forced:
          forced[i] = requests[i].instruction, True
          remarks[i] = f'{reason}: drawn from the request itself'
    if forced:
      rows, length = [], length + layout.written  # the prompt and a whole answer
      for i, (request, c) in enumerate(zip(requests, counts)):
        text, raw = forced.get(i, ('', False))
        spans = layout.chat.spans(request.instruction, c, '' if raw else text, system)
        room = count * layout.eye.most + (layout.text if any(raw for _, raw in forced.values()) else layout.written)
        kinds = verifi.RAW if raw else verifi.KEPT
        rows.append(verifi.arrays(spans, length, room, kinds if s.pictures else tuple(k for k in kinds if k != 'picture')))
      rows = sharding.put(stacked(rows))
      told = _read(self.model, self.frozen.vlm, rows['tokens'], rows['valid'], rows['keep'], rows['keep_mask'], pictures,
                   taps=self.taps)
      if condition is None:
        condition, mask = told, rows['keep_mask']
      else:
        condition, mask = _choose(sharding.put(np.array([i in forced for i in range(len(requests))])),
                                  (told, rows['keep_mask']), (condition, mask))
    return condition, mask, [forced[i][0] if i in forced else written[i] for i in range(len(requests))], remarks

  def _listen(self, layout, rows, pictures, seeds):
    """The VLM writes: its answer, and the condition tokens from the states in which it was written."""
    s = self.settings
    keys = _keys(seeds) if s.temperature else None
    out = generate.generate(self.frozen.vlm, rows['tokens'], rows['valid'], pictures, max_new=layout.written,
                            stop_ids=layout.chat.stop_ids, taps=self.taps, temperature=s.temperature, top_p=s.top_p,
                            key=keys)
    return out, *_listen(self.model, out.prompt_hidden, out.hidden, out.lengths, rows['keep'], rows['keep_mask'])

  def _null(self, batch: int, kept_length: int):
    """The condition of the empty text without pictures, padded to `kept_length`."""
    spans = self.layout.chat.spans('', (), '', self.layout.system)
    row = verifi.arrays(spans, self.layout.lengths(0)[0], kept_length)
    tiled = sharding.put({name: np.broadcast_to(x, (batch, *x.shape)) for name, x in row.items()})
    condition = _read(self.model, self.frozen.vlm, tiled['tokens'], tiled['valid'], tiled['keep'], tiled['keep_mask'],
                      None, taps=self.taps)
    return condition, tiled['keep_mask']


def read(chat: verifi.Chat, ids: np.ndarray, lengths: np.ndarray) -> tuple[list[str], dict[int, str]]:
  """Texts of written ids [b n], and of the rows that are no use why.

  Nothing was written, no end was found, or a picture token was, which no later pass could tell from a picture.
  """
  texts = [chat.read(row[:n]) for row, n in zip(ids, lengths)]
  failed = {}
  for i, (row, n) in enumerate(zip(ids, lengths)):
    if row[n - 1] not in chat.stop_ids:
      failed[i] = f'the VLM found no end within {len(row)} tokens'
    elif chat.picture_id in row[:n]:
      failed[i] = 'the VLM wrote a picture token'
    elif not texts[i]:
      failed[i] = 'the VLM wrote nothing'
  return texts, failed


def stacked(examples):
  """Examples of one shape as a batch."""
  return jax.tree.map(lambda *x: np.stack(x), *examples)


def _noise(seed: int, shape) -> np.ndarray:
  """Noise of one picture, the same whatever else is in the batch."""
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _keys(seeds: list[int]) -> jax.Array:
  """Random keys [b], each of its own seed."""
  words = np.asarray(jax.random.key_data(jax.vmap(jax.random.key)(np.array(seeds) % 2 ** 32)))
  return jax.random.wrap_key_data(sharding.put(words))


@functools.partial(jax.jit, static_argnames='taps')
def _read(model, vlm, tokens, valid, keep, keep_mask, tiles, *, taps):
  """Condition tokens of a text that is known, from one teacher-forced pass."""
  return model.condition(generation.gather(vlm.hidden(tokens, valid, taps, tiles), keep), keep_mask)


@jax.jit
def _listen(model, prompt_hidden, hidden, lengths, keep, keep_mask):
  """Condition tokens of what was read (pictures) and written, from the states of the pass that wrote it."""
  states, mask = generation.listen(prompt_hidden, hidden, lengths, keep, keep_mask)
  return model.condition(states, mask), mask


@jax.jit
def _choose(first, a, b):
  """Row by row (condition [b q d], mask [b q]) of a where `first` [b], else of b, padded to the longer of the two."""
  longest = max(a[1].shape[1], b[1].shape[1])

  def pick(x, y):
    x, y = (jnp.pad(z, [(0, 0), (0, longest - z.shape[1])] + [(0, 0)] * (z.ndim - 2)) for z in (x, y))
    return jnp.where(first.reshape(-1, *[1] * (x.ndim - 1)), x, y)
  return jax.tree.map(pick, a, b)


@jax.jit
def _noised(vae, pictures, noise, t):
  """Latents of pictures, uint8 [b y x 3], noised to the time t."""
  z = vae.encode(pictures.astype(jnp.float32) / 127.5 - 1.0).astype(jnp.float32)
  return (1 - t) * z + t * noise


@functools.partial(jax.jit, static_argnames=('steps', 'method', 'shift', 'guided'))
def _draw(model, vae, condition, mask, null, null_mask, noised, guidance, start, eta, keys, *, steps, method, shift, guided):
  """Integrates the flow from latents noised to the time `start` and decodes: uint8 [b y x 3]."""
  def velocity(z, t):
    v = model.velocity(z, t, condition, mask)
    return flow.guide(v, model.velocity(z, t, null, null_mask), guidance) if guided else v

  z = flow.sample(velocity, noised, flow.timesteps(steps, shift, start), method, eta, keys)
  pixels = vae.decode(z).astype(jnp.float32)
  return jnp.round(jnp.clip((pixels + 1.0) * 127.5, 0, 255)).astype(jnp.uint8)
