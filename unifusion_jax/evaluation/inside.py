"""A look inside a pipeline: what LAP attends to, images without some taps, how alike the layers of the VLM are.

These are the measures that UniFusion (arXiv 2510.12789) shows of itself. `read` has the VLM read one request, `maps`
are LAP's attention and the shares of the taps, `layer_similarity` compares the layers of the VLM, `generate` samples
with some taps replaced. Nothing here needs matplotlib: figures are in inside_figures.py.
"""

from collections.abc import Sequence
import dataclasses
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax import conditioning, pipeline, prompting, ranges, reading, sharding
from unifusion_jax.conditioning import States
from unifusion_jax.data import imaging, transforms, vision_inputs
from unifusion_jax.errors import UserError
from unifusion_jax.models import layers
from unifusion_jax.models.layers import einsum, RESIDUAL, rms_norm
from unifusion_jax.request import Request, SampleConfig
from unifusion_jax.wording import Vocabulary

# In the place of a tap: zeros; its mean over the tokens; 'weight': LAP reads it, and its learned weight is 0
REPLACEMENTS = ('zeros', 'mean', 'weight')
# Most that condition tokens computed here may differ from the model's, in parts of their size: rounding to bfloat16
# makes a hundredth, another computation about 1
SAME = 0.05
PART = 256   # tokens whose layers are compared at a time


class NotPooled(UserError):
  """A model that has no LAP, or another one than is measured here."""


@dataclasses.dataclass
class InspectConfig:
  """Settings of --mode=inspect; its requests are those of `sample`."""
  tokens: tuple[str, ...] = ()  # words of the text whose attention is shown, layer over layer; (): some of them
  drop: tuple[str, ...] = ()    # taps that are left out together, as 4+28+31 or 7-25; each one alone always is
  replace: tuple[str, ...] = ('zeros', 'mean')  # what is in their place (REPLACEMENTS); (): no images are sampled
  scenes: str = ''              # t2i or edit: such requests of the embedded world are sampled without taps and judged
  examples: int = 100           # number of these

  def problems(self) -> list[str]:
    """Settings that cannot work, a sentence each."""
    wrong = ranges.problems(self, 'inspect.', examples=ranges.Range(1, 10 ** 6))
    wrong += [f'inspect.replace={name!r} must be one of {", ".join(REPLACEMENTS)}'
              for name in self.replace if name not in REPLACEMENTS]
    wrong += [f'inspect.drop={item!r} must be taps with + between, or the first and the last with -, as 4+28+31 or 7-25'
              for item in self.drop if not re.fullmatch(r'\d+(-\d+)?(\+\d+(-\d+)?)*', item)]
    if self.scenes not in ('', 't2i', 'edit'):
      wrong.append(f"inspect.scenes={self.scenes!r} must be 't2i', 'edit' or '' for none")
    if self.scenes and not self.replace:
      wrong.append(f'inspect.scenes={self.scenes} samples without taps, and inspect.replace names nothing in their '
                   'place: give inspect.replace=zeros')
    return wrong


def sets_of_taps(drop: Sequence[str], taps: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
  """{name: positions in `taps`} of each tap alone and of the sets of `inspect.drop`; UserError where no tap is."""
  sets: dict[str, tuple[int, ...]] = {str(tap): (i,) for i, tap in enumerate(taps)}
  for item in drop:
    named = set()
    for part in item.split('+'):
      first, _, last = part.partition('-')
      inside = [tap for tap in taps if int(first) <= tap <= int(last or first)]
      if not inside:
        raise UserError(f'inspect.drop={item}: there is no tap {part}; this model taps the layers '
                        f'{", ".join(map(str, taps))}')
      named |= set(inside)
    sets[item] = tuple(i for i, tap in enumerate(taps) if tap in named)
  return sets


class Read(NamedTuple):
  """One request as the VLM reads it, with the states of the tokens that condition, on the host.

  Attributes:
    states: tapped states [q l e] and mask [q].
    layers: [s n e], the states of the valid tokens before the first block and after each.
    labels: text of each valid token; '' of an image's.
    is_image: [s].
    places: [rows columns], which of the valid tokens lie where over the first reference, its thumbnail left out.
    image: this reference, uint8 [y x 3]; None without one.
    warning: as of `pipeline.Sample`.
  """
  request: Request
  rewrite: str
  warning: str
  states: States
  layers: np.ndarray
  labels: list[str]
  is_image: np.ndarray
  places: np.ndarray
  image: np.ndarray | None


def read(pipe: pipeline.UniFusionPipeline, request: Request, settings: SampleConfig) -> Read:
  """`read_by` the VLM of a pipeline."""
  with jax.set_mesh(pipe.mesh):
    return read_by(pipe.vlm, pipe.prompt_encoder, pipe.taps, request, settings)


def read_by(vlm, encoder: transforms.PromptEncoder, taps: tuple[int, ...], request: Request, settings: SampleConfig
            ) -> Read:
  """The VLM writes the rewrite as in sampling, then reads it in one pass that keeps the states of all layers.

  The mesh must be in context.
  """
  decoder = vlm.decoder.config
  prompts = prompting.Prompts.of(encoder, sharding.padded([request]), settings, decoder.max_positions)
  written = reading.read(vlm, taps or (0,), prompts, settings, Vocabulary.of(encoder.folder))
  answers = [known if known is not None else prompting.RAW if warning else text for known, text, warning in
             zip(prompts.known(settings.verifi), written.rewrites, written.warnings)]
  rows = prompts.answered(answers)
  images = prompts.images and sharding.shard(prompting.stacked(prompts.images))
  states = sharding.gather(reading.states_of(vlm, tuple(range(decoder.depth + 1)), rows, images))
  states = jax.tree.map(lambda x: x[0], states)
  hidden, mask, row, chat = states.hidden, states.mask, rows[0], prompts.encoder.chat
  ids = row['input_ids'][row['cond_index'][mask]]
  is_image = ids == (-1 if chat.image_id is None else chat.image_id)
  labels = ['' if image else label_of(chat.tokenizer.decode([token])) for token, image in zip(ids, is_image)]
  shown = _first_image(prompts, settings) if is_image.any() else (np.zeros((0, 0), int), None)
  return Read(request, written.rewrites[0], written.warnings[0], states._replace(hidden=hidden[:, list(taps)]),
              hidden[mask], labels, is_image, *shown)


def label_of(text: str) -> str:
  """A token's text as figures show it, never '', which is an image token's."""
  return text.strip() or repr(text)[1:-1] or "''"


def _first_image(prompts: prompting.Prompts, settings: SampleConfig) -> tuple[np.ndarray, np.ndarray]:
  """`places` and `image` of the first request: image tokens are its first, and InternVL's lie tile by tile."""
  processor, images = prompts.encoder.image_processor, [imaging.read(x) for x in prompts.requests[0].references]
  image = imaging.stitch(images) if settings.stitch else images[0]
  if isinstance(processor, vision_inputs.PackedPatches):
    rows, columns = (int(side) // processor.pixels.merge for side in prompts.images[0].grids[0])
    return np.arange(rows * columns).reshape(rows, columns), image
  assert isinstance(processor, vision_inputs.TiledImages)  # a language model has no image tokens
  columns, rows = imaging.tile_grid(*image.shape[:2], processor.tile, processor.tiles)
  side = math.isqrt(processor.tokens)
  places = np.arange(rows * columns * side * side).reshape(rows, columns, side, side)
  return places.swapaxes(1, 2).reshape(rows * side, columns * side), image


def position_of(read: Read, word: str) -> int | None:
  """The place among the valid tokens of a word of the text, of several pieces the last one's; None: it is not there."""
  if word in read.labels:
    return read.labels.index(word)
  ends = np.cumsum([len(label) for label in read.labels])
  start = ''.join(read.labels).find(word)
  return None if start < 0 or not word else int(np.searchsorted(ends, start + len(word)))


# LAP


def layer_attention(lap, hidden: jax.Array, mask: jax.Array, image: jax.Array
                    ) -> tuple[jax.Array, jax.Array, jax.Array]:
  """LAP of hidden [b s l e] with mask [b s], step by step, from its own parameters.

  image: [b s], which tokens are an image's: those of a `separate` LAP have their own blocks and weights.

  Returns:
    attention [n b*s g h q l] f32 of each block: in the g-th group of heads that share keys and values, by the h-th of
      them, of the layer q to the layer l of one token.
    terms [b s l e], whose sum over l is the pooled state.
    condition tokens [b s d]: those of the model, if this is its computation.
  """
  c = lap.config
  x = jnp.where(mask[:, :, None, None], hidden, jnp.zeros((), hidden.dtype))
  if c.tap_norm:
    x = rms_norm(x, lap.tap_norm, c.eps, 1.0)
  attention, terms, pooled = _pooled(x, lap.blocks, lap.pool)
  if c.separate:
    image_attention, image_terms, image_pooled = _pooled(x, lap.image_blocks, lap.image_pool)
    rows = image.reshape(image.size, out_sharding=RESIDUAL)[:, None, None, None, None]
    attention = jnp.where(rows, image_attention, attention)
    terms = jnp.where(image[:, :, None, None], image_terms, terms)
    pooled = jnp.where(image[:, :, None], image_pooled, pooled)
  x = layers.scan(lambda x, block: (block(x, mask), None), layers.split(pooled), lap.refiner)[0]
  x = rms_norm(layers.whole(x), lap.norm, c.eps, 1.0)
  x = jax.nn.gelu(einsum('bse,ed->bsd', x, lap.w1) + lap.b1[...].astype(x.dtype), approximate=True)
  return attention, terms, einsum('bsd,dm->bsm', x, lap.w2, RESIDUAL) + lap.b2[...].astype(x.dtype)


def _pooled(x: jax.Array, blocks, pool) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(attention, terms, their sum [b s e]) of x [b s l e] by one stack of blocks and its weights."""
  b, s, l, e = x.shape
  x, attention = layers.scan(_attend, layers.split(x.reshape(b * s, l, e, out_sharding=RESIDUAL)), blocks)
  x = layers.whole(x).reshape(b, s, l, e, out_sharding=RESIDUAL)
  return attention, x * pool[...].astype(x.dtype)[:, None], einsum('bsle,l->bse', x, pool)


def _attend(x: jax.Array, block) -> tuple[jax.Array, jax.Array]:
  """One block of rows x [b s d]: (its output, its attention [b g h q s])."""
  w, y = block.attn, layers.whole(rms_norm(x, block.norm1, block.eps, 1.0))
  q = rms_norm(einsum('bsd,dhk->bshk', y, w.wq), w.q_norm, w.eps, 1.0)
  k = rms_norm(einsum('bsd,dgk->bsgk', y, w.wk), w.k_norm, w.eps, 1.0)
  v, gate = einsum('bsd,dgk->bsgk', y, w.wv), jax.nn.sigmoid(einsum('bsd,dhk->bshk', y, w.gate))
  b, s, heads, dim = q.shape
  q = q.reshape(b, s, k.shape[2], heads // k.shape[2], dim)
  logits = jnp.einsum('bqghk,bsgk->bghqs', q * dim ** -0.5, k, preferred_element_type=jnp.float32)
  attention = jax.nn.softmax(logits, axis=-1)
  attended = jnp.einsum('bghqs,bsgk->bqghk', attention.astype(v.dtype), v).reshape(b, s, heads, dim)
  x = x + einsum('bshk,hkd->bsd', attended * gate, w.wo, layers.stream(x))
  return x + block.mlp(rms_norm(x, block.norm2, block.eps, 1.0)), attention


class Maps(NamedTuple):
  """What LAP does with the valid tokens of one request, f32 on the host.

  Attributes:
    attention: [n s h q l] of block, token, head, the layer that looks and the layer looked at.
    received: [n s l], the attention that each layer gets: the mean over heads, and over the layers that look, as much
      as the learned weights of its kind of token count these.
    share: [s l], the projection of each tap's term onto the pooled state, by that state's length; they add up to 1.
    weights: [l], the learned ones; of a LAP that is `separate` those of the text.
    difference: root mean square of the condition tokens computed here minus the model's, in parts of these.
    image_weights: [l], those of image tokens where LAP is `separate`; None elsewhere.
  """
  attention: np.ndarray
  received: np.ndarray
  share: np.ndarray
  weights: np.ndarray
  difference: float
  image_weights: np.ndarray | None = None

  @property
  def by_tap(self) -> dict[str, np.ndarray]:
    """{title: [s l]} of attention received in each block, and of the share."""
    return {**{f'attention, block {i}': values for i, values in enumerate(self.received, 1)},
            'share of the sum': self.share}


def maps(pipe: pipeline.UniFusionPipeline, read: Read) -> Maps:
  """The maps of one request. NotPooled where the model fuses the layers in another way than `layer_attention`."""
  with jax.set_mesh(pipe.mesh):
    model = pipe.model
    _check_pooled(model)
    states = _rows([read.states])
    tokens = np.asarray(sharding.gather(conditioning.condition(model, states).tokens)[0], np.float32)[read.states.mask]
    attention, share, computed = (np.asarray(x, np.float32) for x in sharding.gather(_measured(model, states)))
    weights = [np.asarray(sharding.gather(pool[...]), np.float32) for pool in _pools(model.lap)]
  valid = read.states.mask
  difference = float(np.sqrt(np.mean((computed[0][valid] - tokens) ** 2) / np.mean(tokens ** 2)))
  if not difference < SAME:
    raise NotPooled('this model pools its taps in another way than the LAP that is measured here: its condition tokens '
                    f'differ by {difference:.2g} of their size, so there are no maps of it')
  n, rows, groups, heads, l, _ = attention.shape
  attention = attention.reshape(n, rows // len(valid), len(valid), groups * heads, l, l)[:, 0, valid]
  counts = np.abs(np.where(read.states.image[valid][:, None], weights[-1], weights[0]))
  looks = counts / counts.sum(axis=1, keepdims=True)
  return Maps(attention, np.einsum('nshql,sq->nsl', attention, looks) / (groups * heads), share[0][valid], weights[0],
              difference, *weights[1:])


def _check_pooled(model) -> None:
  if getattr(model, 'lap', None) is None:
    raise NotPooled('this model pools no taps by LAP, so it has no attention over layers, no weights and no shares')


def _pools(lap) -> list:
  """Parameters of learned weights: the one, and where LAP is `separate` that of image tokens."""
  return [lap.pool, lap.image_pool] if lap.config.separate else [lap.pool]


@jax.jit
def _measured(model, states: States):
  attention, terms, tokens = layer_attention(model.lap, states.hidden.astype(model.dtype), states.mask,
                                             states.image)
  terms = terms.astype(jnp.float32)
  pooled = jnp.sum(terms, axis=2, keepdims=True)
  share = jnp.sum(terms * pooled, axis=3) / jnp.maximum(jnp.sum(pooled * pooled, axis=3), 1e-30)
  return attention, share, tokens


# Layer dropout


def replaced(states: States, positions: Sequence[int], how: str) -> States:
  """States [q l e] of one request with some taps replaced in all tokens, by 'zeros' or by the 'mean' over tokens."""
  hidden, places = np.array(states.hidden), list(positions)
  valid = hidden[states.mask][:, places].astype(np.float32)
  hidden[:, places] = 0 if how == 'zeros' else valid.mean(axis=0)
  return states._replace(hidden=hidden)


def unweighted(model, positions: Sequence[int]):
  """The model with some learned weights of LAP at 0, for both kinds of token; all else is shared with the model.

  NotPooled for a model without LAP.
  """
  _check_pooled(model)
  changed = jax.tree.map(lambda x: x, model)
  for pool in _pools(changed.lap):
    keep = np.ones(pool.shape, bool)
    keep[list(positions)] = False
    pool[...] = jnp.where(keep, pool[...], jnp.zeros((), pool.dtype))
  return changed


def check_settings(settings: SampleConfig) -> None:
  """UserError for settings of images that `generate` does not know."""
  if settings.precise or any(strength != 1 for strength in settings.strengths):
    raise UserError('images without taps are sampled without sample.precise and sample.strengths: leave them out')


def generate(pipe: pipeline.UniFusionPipeline, requests: Sequence[Request], states: Sequence[States], height: int,
             width: int, settings: SampleConfig, positions: Sequence[int] = (), how: str = 'zeros') -> np.ndarray:
  """Images uint8 [b y x 3] of requests whose states are there, with the taps at some positions replaced by `how`.

  The condition alone loses them: guidance leads away from the null condition as it is. A request's seed gives the same
  noise whatever is replaced.
  """
  check_settings(settings)
  s, images = settings, []
  for part, rows in sharding.batched(range(len(requests)), min(s.batch_size, len(requests))):
    with jax.set_mesh(pipe.mesh):
      null = None if s.guidance == 1 else pipe.null(s.negative_prompt)  # before the model, where they take turns
      model = unweighted(pipe.model, positions) if how == 'weight' else pipe.model
      changed = lambda state: state if how == 'weight' or not len(positions) else replaced(state, positions, how)
      condition = conditioning.condition(model, _rows([changed(states[i]) for i in rows]))
    wanted = [requests[i] for i in rows]
    condition = condition._replace(references=pipe.references(wanted, height, width, s))
    seeds = [request.seed for request in wanted]
    latents = pipe.denoise(condition, pipe.noise(seeds, height, width),
                           pipe.times(height, width, steps=s.steps, shift=s.shift), guidance=s.guidance, null=null,
                           method=s.method, eta=s.eta, seeds=seeds)
    images.append(pipe.decode(latents, condition, s.decode_tile)[:len(part)])
  return np.concatenate(images)


def _rows(states: Sequence[States]) -> States:
  """States of several requests as one sharded batch, padded alike."""
  longest = max(len(each.mask) for each in states)
  pad = lambda x: np.pad(x, [(0, longest - len(x))] + [(0, 0)] * (x.ndim - 1))
  return sharding.shard(prompting.stacked(sharding.padded([States(*map(pad, each)) for each in states])))


def rms(images: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Root mean square difference [...] of the pixels of images uint8 [... y x 3], of 255."""
  return np.sqrt(np.mean((np.asarray(images, np.float32) - others) ** 2, axis=(-3, -2, -1)))


# Layers of the VLM


def layer_similarity(hidden: np.ndarray, centred: bool = False) -> np.ndarray:
  """Cosine similarity of the layers' states [s n e], the mean over tokens: [n n].

  centred: of the states minus their mean over the tokens, without what all tokens have in common; two tokens at least.
  """
  mean = hidden.mean(axis=0, dtype=np.float32) if centred else np.float32(0)
  total = np.zeros((hidden.shape[1],) * 2)
  for part in np.array_split(hidden, -(-len(hidden) // PART)):
    x = part.astype(np.float32) - mean
    x /= np.maximum(np.linalg.norm(x, axis=2, keepdims=True), 1e-30)
    total += np.sum(x @ x.swapaxes(1, 2), axis=0)
  return total / len(hidden)


def layer_norms(hidden: np.ndarray) -> np.ndarray:
  """Root mean square of the layers' states [s n e], the mean over tokens: [n]."""
  return np.mean([np.sqrt(np.mean(token.astype(np.float32) ** 2, axis=1)) for token in hidden], axis=0)


def nearest_tap(similarity: np.ndarray, taps: Sequence[int]) -> np.ndarray:
  """The similarity [n] of each layer to that tap which is most like it."""
  return similarity[:, list(taps)].max(axis=1)
