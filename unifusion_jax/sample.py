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
from unifusion_jax import verifi
from unifusion_jax.data import transforms
from unifusion_jax.models import unifusion
from unifusion_jax.objectives import generation
from unifusion_jax.sharding import BATCH


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


@dataclasses.dataclass
class Sampler:
  """Samples from one model; every set of shapes and settings is compiled once.

  Attributes:
    settings: a config.SampleConfig; `verifi`, `system`, `steps`, `guidance`, `method` and `shift` are read here.
    factor: pixels of a side of a latent.  channels: c of the latents.
  """
  model: unifusion.UniFusion
  frozen: generation.Frozen
  layout: transforms.Layout
  taps: tuple[int, ...]
  settings: object
  factor: int
  channels: int

  def __call__(self, requests: list[Request], height: int, width: int) -> list[Result]:
    """All requests at one size, as one batch; they must show the VLM equally many tiles.

    Raises:
      ValueError: for a size that is no whole number of latents and patches, for text that is too long, and for
        requests whose pictures differ in number of tiles.
    """
    unit = self.factor * self.model.config.dit.patch
    if height % unit or width % unit or min(height, width) < unit:
      raise ValueError(f'a picture of {width}x{height} cannot be made: both sides must be multiples of {unit}')
    devices = int(np.prod([jax.sharding.get_mesh().shape[axis] for axis in BATCH]))
    padded = requests + [requests[-1]] * (-len(requests) % devices)
    condition, mask, written = self._condition(padded)
    null, null_mask = self._null(len(padded), condition.shape[1])
    noise = np.stack([_noise(request.seed, (height // self.factor, width // self.factor, self.channels))
                      for request in padded])
    s = self.settings
    shift = s.shift or flow.shift_for((height // unit) * (width // unit))
    pictures = _draw(self.model, self.frozen.vae, condition, mask, null, null_mask, _put(noise), jnp.float32(s.guidance),
                     steps=s.steps, method=s.method, shift=float(shift), guided=s.guidance != 1.0)
    pictures = np.asarray(jax.device_get(pictures))
    return [Result(p, w) for p, w in zip(pictures[:len(requests)], written)]

  def write(self, requests: list[Request]) -> list[str]:
    """What the VLM writes for each request, without drawing anything."""
    return self._condition(requests)[2]

  def _condition(self, requests):
    """Condition tokens [b q d], their mask [b q] and the written texts."""
    chat, system = self.layout.chat, self.settings.system or verifi.SYSTEM['rewrite']
    pictures = [self.layout.pictures(request.references) for request in requests]
    counts = {counts for _, counts in pictures}
    if len(counts) > 1:
      raise ValueError(f'requests of one batch must show equally many picture tokens; these show {sorted(counts)}')
    counts = counts.pop()
    tiles = _put(np.stack([tiles for tiles, _ in pictures])) if counts else None
    length, kept_length = self.layout.lengths(counts)
    given = [request.rewrite if request.rewrite is not None else None if self.settings.verifi else request.instruction
             for request in requests]
    if all(text is not None for text in given):
      rows = [verifi.arrays(chat.spans(r.instruction, counts, text, system), length, kept_length)
              for r, text in zip(requests, given)]
      batch = _put({name: np.stack([row[name] for row in rows]) for name in rows[0]})
      condition = _read(self.model, self.frozen.vlm, batch['tokens'], batch['valid'], batch['keep'],
                        batch['keep_mask'], tiles, taps=self.taps)
      return condition, batch['keep_mask'], given
    if any(text is not None for text in given):
      raise ValueError('either every request of a batch brings its rewrite or none does')
    rows = [verifi.arrays(chat.spans(r.instruction, counts, None, system), length, sum(counts)) for r in requests]
    batch = _put({name: np.stack([row[name] for row in rows]) for name in rows[0]})
    out = generate.generate(self.frozen.vlm, batch['tokens'], batch['valid'], tiles, max_new=self.layout.written,
                            stop_ids=chat.stop_ids, taps=self.taps)
    condition, mask = _listen(self.model, out.prompt_hidden, out.hidden, out.lengths, batch['keep'], batch['keep_mask'])
    ids, lengths = jax.device_get((out.tokens, out.lengths))
    return condition, mask, [chat.read(row[:n]) for row, n in zip(ids, lengths)]

  def _null(self, batch: int, kept_length: int):
    """The condition of the empty text without pictures, padded to `kept_length`."""
    spans = self.layout.chat.spans('', (), '')
    row = verifi.arrays(spans, self.layout.lengths(())[0], kept_length)
    tiled = _put({name: np.broadcast_to(x, (batch, *x.shape)) for name, x in row.items()})
    condition = _read(self.model, self.frozen.vlm, tiled['tokens'], tiled['valid'], tiled['keep'], tiled['keep_mask'],
                      None, taps=self.taps)
    return condition, tiled['keep_mask']


def _put(tree):
  sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.P(BATCH))
  return jax.tree.map(lambda x: jax.device_put(x, sharding), tree)


def _noise(seed: int, shape) -> np.ndarray:
  """Noise of one picture, the same whatever else is in the batch."""
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


@functools.partial(jax.jit, static_argnames='taps')
def _read(model, vlm, tokens, valid, keep, keep_mask, tiles, *, taps):
  """Condition tokens of a text that is known, from one teacher-forced pass."""
  return model.condition(generation.gather(vlm.hidden(tokens, valid, taps, tiles), keep), keep_mask)


@jax.jit
def _listen(model, prompt_hidden, hidden, lengths, keep, keep_mask):
  """Condition tokens of what was read (pictures) and written, from the states of the pass that wrote it."""
  states = jnp.concatenate([generation.gather(prompt_hidden, keep), hidden], axis=1)
  written = jnp.arange(hidden.shape[1])[None] < lengths[:, None]
  mask = jnp.concatenate([keep_mask, written], axis=1)
  return model.condition(states, mask), mask


@functools.partial(jax.jit, static_argnames=('steps', 'method', 'shift', 'guided'))
def _draw(model, vae, condition, mask, null, null_mask, noise, guidance, *, steps, method, shift, guided):
  """Integrates the flow and decodes: uint8 [b y x 3]."""
  def velocity(z, t):
    v = model.velocity(z, t, condition, mask)
    return flow.guide(v, model.velocity(z, t, null, null_mask), guidance) if guided else v

  z = flow.sample(velocity, noise, flow.timesteps(steps, shift), method)
  pixels = vae.decode(z).astype(jnp.float32)
  return jnp.round(jnp.clip((pixels + 1.0) * 127.5, 0, 255)).astype(jnp.uint8)
