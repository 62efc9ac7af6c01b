"""Requests in, images out: the one sampler behind the command line, previews, evaluation and notebooks.

A request is laid out by VERIFI; the VLM reads it and writes; the states of the image tokens that it read and of the
tokens that it wrote, as they were computed, condition the DiT; the flow is integrated and decoded.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax import flow, sharding, verifi
from unifusion_jax.data import imaging, transforms
from unifusion_jax.errors import UserError
from unifusion_jax.models import text_generation, unifusion
from unifusion_jax.objectives import flow_matching


@dataclasses.dataclass(frozen=True)
class Request:
  """One image to make.

  Attributes:
    instruction: what is asked.  references: images uint8 [y x 3], in the order they are shown to the VLM.
    seed: of the noise.
    rewrite: text to condition on instead of what the VLM would write.
  """
  instruction: str
  references: tuple = ()
  seed: int = 0
  rewrite: str | None = None


@dataclasses.dataclass(frozen=True)
class Result:
  image: np.ndarray  # uint8 [y x 3]
  written: str         # what the DiT was conditioned on
  warning: str = ''     # why that is not what was to be expected


@dataclasses.dataclass
class Sampler:
  """Samples from one model; every set of shapes and settings is compiled once.

  Attributes:
    settings: a config.SampleConfig; all but what a request says of itself and `weights` is read here.
    factor: pixels of a side of a latent.  channels: c of the latents.
  """
  model: unifusion.UniFusion
  frozen: flow_matching.Frozen
  layout: transforms.PromptEncoder
  taps: tuple[int, ...]
  settings: object
  factor: int
  channels: int

  def __call__(self, requests: list[Request], height: int, width: int, images=None, start: float = 1.0) -> list[Result]:
    """All requests at one size, as one batch.

    With `images`, uint8 [y x 3] for each request, drawing does not begin with noise but with these, noised to the time
    `start`.

    Raises ValueError for a size that is no whole number of latents and patches, and for text that is too long.
    """
    unit = self.factor * self.model.config.dit.patch
    if height % unit or width % unit or min(height, width) < unit:
      raise UserError(f'an image of {width}x{height} cannot be made: both sides must be multiples of {unit}')
    padded = requests + [requests[-1]] * (sharding.padded_batch(len(requests)) - len(requests))
    condition, mask, written, warnings = self._condition(padded)
    null, null_mask = self._null(len(padded), condition.shape[1])
    noise = np.stack([_noise(request.seed, (height // self.factor, width // self.factor, self.channels))
                      for request in padded])
    begin = sharding.shard(noise)
    if images is not None:
      images = [*images, *[images[-1]] * (len(padded) - len(requests))]
      begin = _noised(self.frozen.vae, sharding.shard(np.stack(images)), begin, jnp.float32(start))
    s = self.settings
    shift = s.shift or flow.shift_for((height // unit) * (width // unit))
    keys = _keys([request.seed for request in padded]) if s.eta else None
    drawn = _draw(self.model, self.frozen.vae, condition, mask, null, null_mask, begin, jnp.float32(s.guidance),
                  jnp.float32(start), jnp.float32(s.eta), keys, steps=s.steps, method=s.method, shift=float(shift),
                  guided=s.guidance != 1.0)
    return [Result(*parts) for parts in zip(sharding.gather(drawn)[:len(requests)], written, warnings)]

  def _condition(self, requests):
    """Condition tokens [b q d], their mask [b q], and of each request the text they stand for and a warning."""
    s, layout = self.settings, self.layout.with_tiles(self.settings.tiles)
    system = s.system or layout.system
    count = max(len(request.references) for request in requests)
    seen, counts = zip(*(layout.image_processor.preprocess(request.references, count) for request in requests))
    images = sharding.shard(stacked(seen)) if count else None
    longer = len(layout.chat.system_ids(system)) - len(layout.chat.system_ids(layout.system))
    length = layout.lengths(count)[0] + max(0, longer)
    forced = {i: (r.instruction if r.rewrite is None else r.rewrite, r.rewrite is None)
              for i, r in enumerate(requests) if r.rewrite is not None or not s.verifi}
    warnings = [''] * len(requests)
    condition = mask = None
    if len(forced) < len(requests):
      rows = [verifi.arrays(layout.chat.spans(r.instruction, c, None, system), length, count * layout.image_processor.max_tokens,
                            ('image',) if s.images else ()) for r, c in zip(requests, counts)]
      out, condition, mask = self._condition_states(layout, sharding.shard(stacked(rows)), images, [r.seed for r in requests])
      written, failed = read(layout.chat, *sharding.gather((out.tokens, out.lengths)))
      for i, reason in failed.items():
        if i not in forced:
          forced[i] = requests[i].instruction, True
          warnings[i] = f'{reason}: drawn from the request itself'
    if forced:
      rows, length = [], length + layout.max_rewrite  # the prompt and a whole answer
      for i, (request, c) in enumerate(zip(requests, counts)):
        text, raw = forced.get(i, ('', False))
        spans = layout.chat.spans(request.instruction, c, '' if raw else text, system)
        room = count * layout.image_processor.max_tokens + (layout.max_prompt if any(raw for _, raw in forced.values()) else layout.max_rewrite)
        kinds = verifi.COND_RAW if raw else verifi.COND_VERIFI
        rows.append(verifi.arrays(spans, length, room, kinds if s.images else tuple(k for k in kinds if k != 'image')))
      rows = sharding.shard(stacked(rows))
      told = _read(self.model, self.frozen.vlm, rows['input_ids'], rows['attention_mask'], rows['cond_index'], rows['cond_mask'], images,
                   taps=self.taps)
      if condition is None:
        condition, mask = told, rows['cond_mask']
      else:
        condition, mask = _choose(sharding.shard(np.array([i in forced for i in range(len(requests))])),
                                  (told, rows['cond_mask']), (condition, mask))
    return condition, mask, [forced[i][0] if i in forced else written[i] for i in range(len(requests))], warnings

  def _condition_states(self, layout, rows, images, seeds):
    """The VLM writes: its answer, and the condition tokens from the states in which it was written."""
    s = self.settings
    keys = _keys(seeds) if s.temperature else None
    out = text_generation.generate(self.frozen.vlm, rows['input_ids'], rows['attention_mask'], images, max_new=layout.max_rewrite,
                            stop_ids=layout.chat.stop_ids, taps=self.taps, temperature=s.temperature, top_p=s.top_p,
                            key=keys)
    return out, *_condition_states(self.model, out.prompt_hidden, out.hidden, out.lengths, rows['cond_index'], rows['cond_mask'])

  def _null(self, batch: int, kept_length: int):
    """The condition of the empty text without images, padded to `kept_length`."""
    spans = self.layout.chat.spans('', (), '', self.layout.system)
    row = verifi.arrays(spans, self.layout.lengths(0)[0], kept_length)
    tiled = sharding.shard({name: np.broadcast_to(x, (batch, *x.shape)) for name, x in row.items()})
    condition = _read(self.model, self.frozen.vlm, tiled['input_ids'], tiled['attention_mask'], tiled['cond_index'], tiled['cond_mask'],
                      None, taps=self.taps)
    return condition, tiled['cond_mask']


def read(chat: verifi.Chat, ids: np.ndarray, lengths: np.ndarray) -> tuple[list[str], dict[int, str]]:
  """Texts of written ids [b n], and of the rows that are no use why.

  Nothing was written, no end was found, or an image token was, which no later pass could tell from an image.
  """
  texts = [chat.read(row[:n]) for row, n in zip(ids, lengths)]
  failed = {}
  for i, (row, n) in enumerate(zip(ids, lengths)):
    if row[n - 1] not in chat.stop_ids:
      failed[i] = f'the VLM found no end within {len(row)} tokens'
    elif chat.image_id in row[:n]:
      failed[i] = 'the VLM wrote an image token'
    elif not texts[i]:
      failed[i] = 'the VLM wrote nothing'
  return texts, failed


def stacked(examples):
  """Examples of one shape as a batch."""
  return jax.tree.map(lambda *x: np.stack(x), *examples)


def _noise(seed: int, shape) -> np.ndarray:
  """Noise of one image, the same whatever else is in the batch."""
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _keys(seeds: list[int]) -> jax.Array:
  """Random keys [b], each of its own seed."""
  words = np.asarray(jax.random.key_data(jax.vmap(jax.random.key)(np.array(seeds) % 2 ** 32)))
  return jax.random.wrap_key_data(sharding.shard(words))


@functools.partial(jax.jit, static_argnames='taps')
def _read(model, vlm, tokens, valid, cond_index, cond_mask, tiles, *, taps):
  """Condition tokens of a text that is known, from one teacher-forced pass."""
  return model.condition(flow_matching.select_tokens(vlm.hidden(tokens, valid, taps, tiles), cond_index), cond_mask)


@jax.jit
def _condition_states(model, prompt_hidden, hidden, lengths, cond_index, cond_mask):
  """Condition tokens of what was read (images) and written, from the states of the pass that wrote it."""
  states, mask = flow_matching.condition_states(prompt_hidden, hidden, lengths, cond_index, cond_mask)
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
def _noised(vae, images, noise, t):
  """Latents of images, uint8 [b y x 3], noised to the time t."""
  z = vae.encode(imaging.to_float(images)).astype(jnp.float32)
  return (1 - t) * z + t * noise


@functools.partial(jax.jit, static_argnames=('steps', 'method', 'shift', 'guided'))
def _draw(model, vae, condition, mask, null, null_mask, noised, guidance, start, eta, keys, *, steps, method, shift, guided):
  """Integrates the flow from latents noised to the time `start` and decodes: uint8 [b y x 3]."""
  def velocity(z, t):
    v = model.velocity(z, t, condition, mask)
    return flow.guide(v, model.velocity(z, t, null, null_mask), guidance) if guided else v

  z = flow.sample(velocity, noised, flow.timesteps(steps, shift, start), method, eta, keys)
  return imaging.to_uint8(vae.decode(z))
