"""Bytes of a train step on each chip, from the configuration and the number of devices alone: nothing is compiled.

State, frozen models and batch are exact, the shards of their abstract shapes. The rest are formulas, one for each array
that grows with the model, the tokens or the pixels, for the largest batch (`batch_spec`). The phases of a step follow
one another, so the largest counts: autoencoder, VLM, DiT forward and backward, LAP backward, update; what is in LAP's
place (models/fusion.py) has its name. Attention over tokens is taken as fused, without logits. docs/plans.md has what
the compiler says of the same steps.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from unifusion_jax import sharding
from unifusion_jax.commands import train
from unifusion_jax.models import fusion, lap
from unifusion_jax.objectives import flow_matching

F32 = 4  # bytes
ROWS, LANES = 16, 128  # to whose multiples a TPU pads the last two axes of an array in bfloat16


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Bytes on each chip, by name: of an array or a group of arrays, with the file whose code makes them.

  Attributes:
    arguments: state, frozen models and batch.
    throughout: temporaries that live through most of the step.
    phases: temporaries of each phase alone; the phases follow one another.
  """
  arguments: dict[str, int]
  throughout: dict[str, int]
  phases: dict[str, dict[str, int]]

  @property
  def largest(self) -> str:
    """The phase that takes most."""
    return max(self.phases, key=lambda name: sum(self.phases[name].values()))

  @property
  def terms(self) -> dict[str, int]:
    """All that is there in the largest phase."""
    return self.arguments | self.throughout | self.phases[self.largest]

  @property
  def temporaries(self) -> int:
    return sum(self.throughout.values()) + sum(self.phases[self.largest].values())

  @property
  def total(self) -> int:
    return sum(self.terms.values())


def chip_bytes(config, devices: int) -> Estimate:
  """The estimate of a config.Config's train step on a number of devices: half a second, or a millisecond where models
  and mesh.tp are those of an earlier call.

  The configuration must be one that `config.check` passes. Of objectives other than flow matching the temporaries are
  the gradients alone.
  """
  mesh = sharding.abstract_mesh(config.mesh, devices)
  state, frozen = (sharding.abstract(tree, mesh) for tree in _models(config, mesh.shape['tp']))
  with jax.sharding.use_abstract_mesh(mesh):
    batch = config.objective.batch_spec(config)
  held = sharding.shard_bytes
  arguments = {'parameters (training/step.py)': held(state.params), 'EMA (training/step.py)': held(state.ema),
               'moments of the optimizer (training/step.py)': held(state.opt), 'batch (data/loader.py)': held(batch)}
  # Under accumulation there are two, a micro-batch's and the sum
  throughout = {'gradients (training/step.py)': held(state.params) * min(2, config.optim.accumulate)}
  muon = 2 * held(state.params) if config.optim.name == 'muon' else 0
  phases = {'update': {'new matrices of Muon (training/step.py)': muon}}
  if isinstance(config.objective, flow_matching.FlowMatching):
    model = frozen.base or config.objective.model(state.params, frozen)
    step = _Step(config, model, frozen, batch, mesh.shape)
    arguments |= {'frozen VLM (conditioning.py)': held(frozen.vlm),
                  'frozen autoencoder (conditioning.py)': held(frozen.vae)}
    if frozen.base is not None:
      arguments['frozen base of the adapters (conditioning.py)'] = held(frozen.base)
    throughout |= step.throughout()
    phases |= {'autoencoder': step.autoencoder(), 'VLM': step.vlm(), 'DiT': step.dit(), 'LAP': step.lap()}
  else:
    arguments |= {'frozen models (objective.frozen)': held(frozen)}
  return Estimate(arguments, throughout, phases)


_MODELS = {}  # (state, frozen) by what their shapes and specs depend on


def _models(config, tp: int):
  """(state, frozen) of the train step as shapes; their specs are those of every mesh with that tp."""
  key = repr((config.model, config.objective, config.optim.name, config.vlm, config.vlm_quantized, config.vae,
              config.taps, config.frozen_dtype, tp))
  if key not in _MODELS:
    with jax.sharding.use_abstract_mesh(sharding.abstract_mesh(sharding.MeshConfig(1, 1, tp), tp)):
      _MODELS[key] = train.abstract(config)[:2]
  return _MODELS[key]


def _elements(tree) -> int:
  """Numbers in all arrays of a tree, whole."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


class _Step:
  """The terms of one micro-batch of flow matching. Sizes as in models/layers.py."""

  def __init__(self, config, model, frozen, batch, mesh):
    self._config, self._model, self._frozen, self._tp = config, model, frozen, mesh['tp']
    # b: examples of a device at a time
    self._rows = -(-config.data.batch_size // (mesh['data'] * mesh['fsdp'] * config.optim.accumulate))
    # Rows that tp does not divide are whole on each of its devices (sharding.spread)
    devices, batch_rows = mesh['data'] * mesh['fsdp'] * mesh['tp'], config.data.batch_size // config.optim.accumulate
    self._spread = batch_rows // devices if batch_rows % devices == 0 else self._rows
    self._noised = self._rows * config.objective.noises_per_example
    self._height, self._width = batch['target'].shape[1:3]
    self._prompt = batch['input_ids'].shape[1]  # s
    self._kept = batch['cond_index'].shape[1]  # q
    if config.objective.rewrite_online:
      self._kept += config.data.budget[1] + batch['fallback_index'].shape[1]
    unit = config.objective.unit(config)
    self._references = batch['references'].shape[1] if 'references' in batch else 0  # as clean latents
    self._image = (1 + self._references) * (self._height // unit) * (self._width // unit)
    self._dtype = jnp.dtype(config.model.dtype).itemsize
    self._frozen_dtype = jnp.dtype(config.frozen_dtype).itemsize
    self._place = f'models/{"lap" if config.model.fusion == "lap" else "fusion"}.py'  # between VLM and DiT

  def _split(self, tokens: int) -> int:
    """Tokens of a sequence between blocks on a device: tp shares them where it divides them (layers.split)."""
    return tokens if tokens % self._tp else tokens // self._tp

  def throughout(self) -> dict[str, int]:
    model, lap, dit = self._config.model, self._config.model.lap, self._config.model.dit
    state = self._rows * lap.width * self._dtype
    inputs = (1 + lap.separate) * lap.depth * self._kept * self._split(lap.taps)
    inputs += lap.refiner_depth * self._split(self._kept)
    if model.fusion != 'lap':
      inputs = (lap.depth + lap.refiner_depth) * fusion.taps_read(model) * self._split(self._kept)
    layerwise = dict(kv=2 * dit.kv_heads * dit.head_dim, hidden=dit.width)  # numbers of a token for each block
    numbers = dit.depth * layerwise[model.fusion] // self._tp if model.fusion in layerwise else dit.width
    blocks = 'LAP and refiner' if model.fusion == 'lap' else 'the adaptor'
    return {
        'tapped states of kept tokens (layers.scan_taps)': self._kept * lap.taps * state,
        f'inputs of the blocks of {blocks}, kept for the backward ({self._place})': inputs * state,
        f'condition tokens and their gradient ({self._place})': 2 * self._noised * self._kept * numbers * self._dtype}

  def dit(self) -> dict[str, int]:
    """Forward and backward of the DiT: blocks' inputs, and one block's backward."""
    c, outside = self._config.model.dit, self._config.model.fusion == 'kv'  # of the stream
    length = self._image if outside else self._kept + self._image
    tokens, split = self._noised * length, self._noised * self._split(length)
    attention = tokens * (3 * c.heads + 2 * c.kv_heads) * c.head_dim
    attention += outside * self._noised * self._kept * 2 * c.kv_heads * c.head_dim
    recomputed = 1 if c.remat else c.depth
    return {
        'inputs of the blocks, kept for the backward (models/dit.py)': c.depth * split * c.width * self._dtype,
        'backward of a block (models/dit.py)':
            recomputed * self._backward(tokens, split, c.width, c.mlp, attention),
        'weights gathered over fsdp, and gradients before they are scattered (models/dit.py)':
            self._gathered(self._model.dit.blocks, c.depth)}

  def lap(self) -> dict[str, int]:
    """Backward of LAP, whose rows are kept tokens in all taps, a part of them at a time; the refiner's are fewer.

    Its attention is plain, over few taps: [b q h l k] and the weights [b q h l l] are padded, the weights most of all.
    """
    c = self._config.model.lap
    if self._config.model.fusion != 'lap' or not c.depth:
      return self._over_tokens()
    parts = lap.parts_of(self._rows * self._kept, c, self._dtype)
    recomputed = 1 if c.remat else (1 + c.separate) * c.depth
    tokens, split, padded = (-(-self._rows * self._kept // parts) * n
                             for n in (c.taps, self._split(c.taps), -(-c.taps // ROWS) * ROWS))
    weights = padded * c.heads * LANES // self._tp * self._dtype
    return {
        'backward of its blocks (models/lap.py)':
            recomputed * (weights + self._backward(tokens, split, c.width, c.mlp, padded * (
                3 * c.heads + 2 * c.kv_heads) * (c.width // c.heads))),
        'weights gathered over fsdp, and gradients before they are scattered (models/lap.py)':
            self._gathered(self._model.lap.blocks, c.depth)}

  def _over_tokens(self) -> dict[str, int]:
    """Backward of blocks over the tokens alone: of an adaptor, whose rows are taps, or of a refiner."""
    model, c = self._config.model, self._config.model.lap
    own = model.fusion == 'lap'
    blocks = self._model.lap.refiner if own else self._model.fusion.adaptor.blocks
    depth, rows = (c.refiner_depth, 1) if own else (c.depth + c.refiner_depth, fusion.taps_read(model))
    tokens, split = (self._rows * rows * n for n in (self._kept, self._split(self._kept)))
    attention = tokens * (3 * c.heads + 2 * c.kv_heads) * (c.width // c.heads)
    return {
        f'backward of its blocks ({self._place})':
            (1 if c.remat else depth) * self._backward(tokens, split, c.width, c.mlp, attention),
        f'weights gathered over fsdp, and gradients before they are scattered ({self._place})':
            self._gathered(blocks, depth)}

  def _backward(self, tokens: int, split: int, width: int, mlp: int, attention: int) -> int:
    """One block, recomputed and differentiated: heads and hidden units over tp, the rest as between blocks.

    attention: numbers in q, gate and output, k and v, which wait for their turn while the MLP is differentiated.
    """
    hidden = 5 * tokens * mlp  # gate, up and their product; gradients of two
    stream = 2 * split * width * (F32 + self._dtype)  # normed inputs of both halves, and gradients
    return (attention + hidden) // self._tp * self._dtype + stream

  def _gathered(self, blocks, depth: int) -> int:
    """One block in use and the next under way; one's gradient in f32."""
    return _elements(blocks) // max(1, depth) // self._tp * (2 * self._dtype + F32)

  def vlm(self) -> dict[str, int]:
    """Forward of the frozen VLM: one block at a time."""
    vlm = self._frozen.vlm
    c, tokens = vlm.config.text, self._rows * self._prompt
    terms = {
        'a block of the VLM (models/decoder.py)': self._frozen_dtype * (
            tokens * (2 * c.heads + 2 * c.kv_heads) * c.head_dim + 3 * tokens * c.hidden) // self._tp
            + tokens * c.width * (F32 + 3 * self._frozen_dtype),
        'weights gathered over fsdp (models/decoder.py)':
            2 * _elements(vlm.decoder.blocks) // c.depth // self._tp * self._frozen_dtype}
    if self._config.objective.rewrite_online:
      slots = self._rows * (self._prompt + self._config.data.budget[1])
      terms['keys and values of rewriting (models/text_generation.py)'] = (
          2 * c.depth * slots * c.kv_heads * c.head_dim * self._frozen_dtype)
      terms['logits of rewriting (models/text_generation.py)'] = self._rows * c.vocab * F32
    return terms

  def autoencoder(self) -> dict[str, int]:
    """Forward of the encoder at its widest: the first level, in f32 where it is normalised."""
    widest = max(1, self._references) * self._spread * self._height * self._width * self._frozen.vae.config.first_width
    return {'first level of the autoencoder (models/vae.py)': widest * (2 * F32 + 2 * self._frozen_dtype)}
