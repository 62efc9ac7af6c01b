"""The programs of a recipe with the shapes of their arguments: the train step and the phases of sampling.

No weights and no tokenizer are read. A mesh, of devices or abstract, must be in context.
"""

from collections.abc import Callable
import dataclasses
import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from unifusion_jax import conditioning, denoising, sharding
from unifusion_jax.commands import train
from unifusion_jax.data import transforms
from unifusion_jax.models import dit, text_generation
from unifusion_jax.objectives.flow_matching import FlowMatching
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
  """
  name: str
  function: Callable
  arguments: tuple
  forward: Callable
  counted: tuple
  trained: int
  weights: object
  rows: int

  def trace(self):
    return self.function.trace(*self.arguments)


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
  state, frozen, batch, key = _on_mesh((state, frozen, batch, jax.eval_shape(lambda: jax.random.key(0))))
  progress = (jax.ShapeDtypeStruct((), np.float32),) if config.train.minutes else ()  # a number of the host
  train_step = step.make_train_step(objective.loss, step.optimizer(config.optim, config.train.steps), config.optim)
  return Program('train', train_step, (state, frozen, batch, key, *progress), objective.loss,
                 (state.params, frozen, batch, key), 1, (state.params, frozen), config.data.batch_size)


class _Sampling:
  """The phases of sampling, as `UniFusionPipeline` calls them, at the sizes of `config.data` and `config.sample`."""

  def __init__(self, config, requests: int, references: int):
    self.config, self.settings = config, config.sample
    mesh = jax.sharding.get_abstract_mesh().shape
    shards = math.prod(mesh[axis] for axis in sharding.BATCH)
    self.rows = -(-max(requests, 1) // shards) * shards
    objective, self.frozen = config.objective, _on_mesh(config.objective.abstract_frozen(config))
    self.model = _on_mesh(jax.eval_shape(lambda frozen: objective.model(objective.random(config), frozen), self.frozen))
    encoder = transforms.abstract_prompt_encoder(config).with_tiles(self.settings.tiles)
    count = 1 << (references - 1).bit_length() if references else 0  # as `prompting.Prompts` has them
    self.max_rewrite = encoder.max_rewrite
    self.length, self.image_length = encoder.lengths(count)[0], count * encoder.image_processor.max_tokens
    self.images = self._rows(encoder.image_processor.spec(count)) if count else None
    self.references = references if objective.sample_settings(config).reference_latents else 0

  def program(self, name: str) -> Program:
    function, arguments = getattr(self, f'_{name}')()
    arguments = _on_mesh(arguments)
    weights = [argument for argument in arguments if isinstance(argument, nnx.Module)]
    return Program(name, function, arguments, function, arguments, 0, weights, self.rows)

  def _rows(self, example):
    return sharding.batch_spec(example, self.rows)

  def _prompts(self, length: int):
    """(input ids, attention mask) of prompts."""
    return self._rows((jax.ShapeDtypeStruct((length,), np.int32), jax.ShapeDtypeStruct((length,), bool)))

  def _encode(self):
    function = jax.jit(functools.partial(conditioning.condition_read, taps=self.frozen.taps))
    return function, (self.model, self.frozen.vlm, *self._prompts(self.length + self.max_rewrite),
                      *self._prompts(self.image_length + self.max_rewrite), self.images)

  def _rewrite(self):
    def rewrite(vlm, input_ids, attention_mask, images, keep):
      return text_generation.generate(vlm, input_ids, attention_mask, images, max_new=self.max_rewrite, stop_ids=(0,),
                                      taps=self.frozen.taps, keep=keep)
    return jax.jit(rewrite), (self.frozen.vlm, *self._prompts(self.length), self.images,
                              self._prompts(self.image_length)[0])

  def _latents(self):
    config, vae, settings = self.config, self.frozen.vae, self.settings
    height, width = shape_like(None, config.data.size, config.objective.unit(config), settings.height, settings.width)
    shape = height // vae.downsampling, width // vae.downsampling, vae.channels
    return self._rows(jax.ShapeDtypeStruct(shape, np.float32))

  def _denoise(self):
    function, arguments = self._encode()
    conditioning = jax.eval_shape(function, *_on_mesh(arguments))
    number = jax.ShapeDtypeStruct((), np.float32)
    null, keys = None, None
    if self.settings.guidance != 1:
      null = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, 1, *x.shape[2:]), x.dtype), conditioning)
    if self.settings.eta:
      keys = self._rows(jax.eval_shape(lambda: jax.random.key(0)))
    if n := self.references:
      (height, width, channels), patch = self._latents().shape[1:], self.config.model.dit.patch
      conditioning = conditioning._replace(references=dit.References(*self._rows((
          jax.ShapeDtypeStruct((n, height, width, channels), np.float32),
          jax.ShapeDtypeStruct((n, height // patch, width // patch), bool)))))
    times = jax.ShapeDtypeStruct((self.settings.steps + 1,), np.float32)
    function = jax.jit(functools.partial(denoising.integrate, method=self.settings.method))
    return function, (self.model, conditioning, null, self._latents(), times, number, number, keys,
                      jax.ShapeDtypeStruct((), jnp.int32))

  def _decode(self):
    function = jax.jit(functools.partial(denoising.decode_latents, tile=self.settings.decode_tile))
    return function, (self.frozen.vae, self._latents())


def _on_mesh(tree):
  """Shapes with shardings on the mesh in context, of its devices where it has any."""
  mesh = jax.sharding.get_mesh()
  return sharding.abstract(tree, jax.sharding.get_abstract_mesh() if mesh.empty else mesh)
