"""The programs of a recipe with the shapes of their arguments: the train step and the phases of sampling.

A recipe of configs/sample.py has the phases alone. No weights are read. A mesh, of devices or abstract, must be in
context.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax import conditioning, denoising, prompting, sharding
from unifusion_jax.commands import train
from unifusion_jax.commands.sample import PipelineConfig
from unifusion_jax.errors import UserError
from unifusion_jax.models import dit, text_generation
from unifusion_jax.objectives.flow_matching import FlowMatching
from unifusion_jax.planning import resident
from unifusion_jax.planning.resident import on_mesh
from unifusion_jax.request import shape_like
from unifusion_jax.training import step


@dataclasses.dataclass(frozen=True)
class Program:
  """A jitted function, the shapes of its arguments, and what it takes besides.

  Attributes:
    forward: what its model's operations are counted of, with the arguments `counted`; of a train step the loss.
    trained: how many of these arguments, the first ones, are parameters in training.
    weights: parameters and frozen models among the arguments.
    rows: examples of one call.
    beside: models that lie on the devices while it runs, besides the arguments.
    sizes: what else the shapes follow from, in words: {noun: number}.
  """
  name: str
  function: Any  # jitted
  arguments: tuple
  forward: Callable
  counted: tuple
  trained: int
  weights: Any
  rows: int
  beside: list = dataclasses.field(default_factory=list)
  sizes: dict[str, int] = dataclasses.field(default_factory=dict)

  def trace(self):
    return self.function.trace(*self.arguments)


def default(config) -> tuple[str, ...]:
  """The programs of a recipe that names none in `plan.programs`."""
  if not isinstance(config, PipelineConfig):
    return ('train',)
  in_turn = config.in_turn
  return ('encode', *['condition'] * in_turn, 'denoise', 'decode', *['rewrite'] * config.sample.verifi)


def of(name: str, config, requests: int = 0, references: int = 1) -> Program:
  """A program of a recipe by its name.

  Args:
    requests: sampled at a time; 0: one for each device that shares a batch.
    references: of a request, and of an example of the largest batch.
  """
  return _train(config, references) if name == 'train' else _Sampling(config, requests, references).program(name)


def _train(config, references: int) -> Program:
  objective = config.objective
  state, frozen, batch = train.abstract(config)
  if isinstance(objective, FlowMatching):
    batch = objective.batch_spec(config, references)
  state, frozen, batch, key = on_mesh((state, frozen, batch, jax.eval_shape(lambda: jax.random.key(0))))
  progress = (jax.ShapeDtypeStruct((), np.float32),) if config.train.minutes else ()  # a number of the host
  train_step = step.make_train_step(objective.loss, step.optimizer(config.optim, config.train.steps), config.optim)
  return Program('train', train_step, (state, frozen, batch, key, *progress), objective.loss,
                 (state.params, frozen, batch, key), 1, (state.params, frozen), config.data.batch_size)


class _Sampling:
  """The phases of sampling, as `UniFusionPipeline` calls them, at the sizes of `config.sample` and of the models."""

  def __init__(self, config, requests: int, references: int):
    self.settings, self.models = config.sample, resident.of(config)
    mesh = jax.sharding.get_abstract_mesh().shape
    shards = math.prod(mesh[axis] for axis in sharding.BATCH)
    self.rows = -(-max(requests, 1) // shards) * shards
    encoder, layout = self.models.prompt_encoder.with_tiles(self.settings.tiles), self.models.prompt_encoder.layout
    count = 1 << (references - 1).bit_length() if references else 0  # as `prompting.Prompts` has them
    self.images = self._rows(encoder.image_processor.spec(count)) if count else None
    self.max_rewrite, self.image_length = encoder.max_rewrite, count * encoder.image_processor.max_tokens
    self.unwritten = encoder.lengths(count)[0]  # of a prompt without its answer
    self.length, self.kept = self.unwritten + self.max_rewrite, self.image_length + self.max_rewrite
    self.shown = self.images  # beside a prompt with its answer
    self.null_length = encoder.lengths(0)[1] if self.settings.negative_prompt else 1
    if layout.prefix:
      self.null_length = prompting.own_length(layout, layout.max_sequence_length * bool(self.settings.negative_prompt))
    own, tokens = layout.prefix and not self.settings.verifi, config.plan.tokens
    if own:  # of the request alone
      self.kept, self.shown = prompting.own_length(layout, tokens or layout.max_sequence_length), None
      self.length = layout.dropped + self.kept
    elif tokens:
      raise UserError(f'plan.tokens={tokens} are of a request in the prompt of Krea 2 itself, and here VERIFI lays '
                      'prompts out, to the budget of rewrites: leave it at 0, or set sample.verifi=false')
    clean = config.sample if isinstance(config, PipelineConfig) else config.objective.sample_settings(config)
    self.references = 0 if own else references * clean.reference_latents

  def program(self, name: str) -> Program:
    function, arguments, sizes = getattr(self, f'_{name}')()
    beside = [model for model in self._held(name) if all(model is not argument for argument in arguments)]
    arguments = on_mesh(arguments)
    weights = [argument for argument in arguments if isinstance(argument, nnx.Module)]
    return Program(name, function, arguments, function, arguments, 0, weights, self.rows, beside, sizes)

  def _held(self, name: str) -> list[nnx.Module]:
    """The models on the devices while a program runs."""
    models = self.models
    if not models.in_turn:
      return [models.transformer, models.vlm, models.vae]
    return [models.vlm if name in ('encode', 'rewrite') else models.transformer, models.vae]

  def _rows(self, example):
    return sharding.batch_spec(example, self.rows)

  def _prompts(self, length: int):
    """(input ids, attention mask) of prompts."""
    return self._rows((jax.ShapeDtypeStruct((length,), np.int32), jax.ShapeDtypeStruct((length,), bool)))

  def _states(self):
    """(the VLM's part of encoding, its arguments)."""
    states = functools.partial(conditioning.read, taps=self.models.taps)
    return states, (self.models.vlm, *self._prompts(self.length), *self._prompts(self.kept), self.shown)

  def _encode(self):
    (states, arguments), sizes = self._states(), {'prompt tokens': self.length, 'condition tokens': self.kept}
    if self.models.in_turn:
      return jax.jit(states), arguments, sizes

    def encode(model, *prompts):
      return conditioning.condition(model, states(*prompts))
    return jax.jit(encode), (self.models.transformer, *arguments), sizes

  def _condition(self):
    states, arguments = self._states()
    return conditioning.condition, (self.models.transformer, jax.eval_shape(states, *on_mesh(arguments))), {
        'condition tokens': self.kept}

  def _rewrite(self):
    def rewrite(vlm, input_ids, attention_mask, images, keep):
      return text_generation.generate(vlm, input_ids, attention_mask, images, max_new=self.max_rewrite, stop_ids=(0,),
                                      taps=self.models.taps, keep=keep)
    arguments = self.models.vlm, *self._prompts(self.unwritten), self.images, self._prompts(self.image_length)[0]
    return jax.jit(rewrite), arguments, {'prompt tokens': self.unwritten, 'new tokens': self.max_rewrite}

  def _latents(self):
    """(latents, {noun: pixels} of their images)."""
    vae, settings = self.models.vae, self.settings
    height, width = shape_like(None, self.models.size, self.models.unit, settings.height, settings.width)
    shape = height // vae.downsampling, width // vae.downsampling, vae.channels
    return self._rows(jax.ShapeDtypeStruct(shape, np.float32)), {'pixels high': height, 'pixels wide': width}

  def _denoise(self):
    function, arguments, sizes = self._condition()
    latents, pixels = self._latents()
    cond: conditioning.Conditioning = jax.eval_shape(function, *on_mesh(arguments))
    if any(strength != 1 for strength in self.settings.strengths):
      cond = cond._replace(bias=self._rows(jax.ShapeDtypeStruct(cond.mask.shape[1:], np.float32)))
    number = jax.ShapeDtypeStruct((), np.float32)
    null, keys = None, None
    if self.settings.guidance != 1:
      one_row = lambda x: jax.ShapeDtypeStruct((1, self.null_length, *x.shape[2:]), x.dtype)
      null = jax.tree.map(one_row, cond._replace(bias=None))
    if self.settings.eta:
      keys = self._rows(jax.eval_shape(lambda: jax.random.key(0)))
    if n := self.references:
      (height, width, channels), patch = latents.shape[1:], self.models.transformer.config.dit.patch  # pyrefly: ignore[missing-attribute]
      cond = cond._replace(references=dit.References(*self._rows((
          jax.ShapeDtypeStruct((n, height, width, channels), np.float32),
          jax.ShapeDtypeStruct((n, height // patch, width // patch), bool)))))
    times = jax.ShapeDtypeStruct((self.settings.steps + 1,), np.float32)
    function = jax.jit(functools.partial(denoising.integrate, method=self.settings.method))
    return function, (self.models.transformer, cond, null, latents, times, number, number, keys,
                      jax.ShapeDtypeStruct((), jnp.int32)), pixels | sizes | {'steps': self.settings.steps}

  def _decode(self):
    latents, pixels = self._latents()
    function = jax.jit(functools.partial(denoising.decode_latents, tile=self.settings.decode_tile))
    return function, (self.models.vae, latents), pixels
