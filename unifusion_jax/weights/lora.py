"""Low-rank adapters (LoRA, arXiv 2106.09685): a matrix plus a scaled product of two thin ones.

A `LoRA` takes the place of a matrix's Param or `Int8`, and `layers.einsum` multiplies with it. The factors begin with
the axes that the matrix contracts and with those of its output, so they are stacked over layers, scanned and sharded as
the matrix is. Adapters in training are {path of the matrix: Factors}; files of them are in lora_files.py.
"""

import dataclasses
import re
from typing import Any

from flax import nnx
import jax
from jax import P
import jax.numpy as jnp

from unifusion_jax import ranges
from unifusion_jax.errors import UserError
from unifusion_jax.models import layers
from unifusion_jax.models.layers import contracted, einsum, rows_of, weight
from unifusion_jax.ranges import Range

# Paths of matrices by the names of `LoRAConfig.targets`
TARGETS = {'attention': r'dit/blocks/attn/.*', 'mlp': r'dit/blocks/mlp/.*', 'lap': r'lap/(blocks/.*|w1|w2)',
           'refiner': r'lap/refiner/.*', 'fusion': r'fusion/.*', 'all': r'.*'}


@dataclasses.dataclass
class LoRAConfig:
  """Adapters in training."""
  rank: int = 0                # 0: none, the whole model is trained
  alpha: float = 32.0          # the product of the factors counts alpha / rank
  dropout: float = 0.0         # share of an adapter's inputs that are left out
  # Matrices: attention, mlp (of the DiT), lap, refiner, fusion (what is in their place: models/fusion.py), all, or a
  # pattern of paths such as 'dit/blocks/attn/w[qkv]'
  targets: tuple[str, ...] = ('attention', 'mlp')
  quantized: str = ''          # 'int8': the frozen base in int8 instead of frozen_dtype

  @property
  def scale(self) -> float:
    return self.alpha / self.rank

  def problems(self, prefix: str) -> list[str]:
    """Settings that cannot work, a sentence each."""
    wrong = ranges.problems(self, prefix, rank=Range(0, 10 ** 4), alpha=Range(above=0, most=10 ** 6),
                            dropout=Range(0, below=1))
    if self.quantized not in ('', 'int8'):
      wrong.append(f"{prefix}quantized={self.quantized!r} must be '' or 'int8'")
    for target in self.targets:
      try:
        re.compile(target)
      except re.error as error:
        wrong.append(f'{prefix}targets: {target!r} is no regular expression ({error}): take one, or a name of '
                     f'{", ".join(TARGETS)}')
    return wrong if self.targets else [*wrong, f'{prefix}targets is empty: name some of {", ".join(TARGETS)}']


class Factors(nnx.Module):
  """The factors a [in.. j] and b [j out..] of an adapter; b is zero, so that it changes nothing at first."""

  def __init__(self, shape: tuple[int, ...], spec: tuple, contract: int, rank: int, *, rngs: nnx.Rngs):
    self.a = weight(rngs, (*shape[:contract], rank), (*spec[:contract], None), contract=contract, int8=False)
    self.b = weight(rngs, (rank, *shape[contract:]), (None, *spec[contract:]), contract=1, std=0.0, int8=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRA:
  """A matrix with an adapter; all but `dropout` may have a leading layer axis.

  Attributes:
    base: a Param, an `Int8` or another `LoRA`.
    a, b: arrays or Params [in.. j] and [j out..].
    scale: of their product, f32 [].
    key: random key of the dropout; None for none.
  """
  base: Any
  a: Any
  b: Any
  scale: jax.Array
  key: jax.Array | None = None
  dropout: float = dataclasses.field(default=0.0, metadata=dict(static=True))

  @property
  def shape(self) -> tuple[int, ...]:
    return self.base.shape

  def times(self, equation: str, x: jax.Array, out: P | None) -> jax.Array:
    """The einsum of x and this matrix, in x's dtype; arguments as `layers.einsum`."""
    y = einsum(equation, x, self.base, out)
    operands, result = equation.split('->')
    x_axes, w_axes = operands.split(',')
    inner = ''.join(letter for letter in w_axes if letter not in result)
    outer = ''.join(letter for letter in w_axes if letter in result)
    kept = ''.join(letter for letter in x_axes if letter in result)
    if self.key is not None:
      keep = jax.random.bernoulli(self.key, 1 - self.dropout, x.shape, out_sharding=jax.typeof(x).sharding.spec)
      x = jnp.where(keep, x / (1 - self.dropout), jnp.zeros((), x.dtype)).astype(x.dtype)
    thin = einsum(f'{x_axes},{inner}j->{kept}j', x, self.a, rows_of(x)) * self.scale.astype(x.dtype)
    return y + einsum(f'{kept}j,j{outer}->{result}', thin, self.b, out)


nnx.register_data_type(LoRA)


def init(model, config: LoRAConfig, seed: int) -> dict[str, Factors]:
  """Adapters for the targets of a model (or of its shapes); UserError for a target that no matrix has."""
  matrices = {path: leaf for path, leaf in flatten(model)[0].items() if contracted(leaf)}
  chosen = set()
  for target in config.targets:
    found = {path for path in matrices if re.fullmatch(TARGETS.get(target, target), path)}
    if not found:
      raise UserError(f'lora.targets: {target!r} is no matrix of this model: take {", ".join(TARGETS)} or a pattern of '
                      f'paths such as {", ".join(list(matrices)[:3])}')
    chosen |= found
  rngs = nnx.Rngs(seed)
  return {path: _factors(matrices[path], config.rank, rngs) for path in sorted(chosen)}


def _factors(leaf: nnx.Param, rank: int, rngs: nnx.Rngs) -> Factors:
  depth, shape, spec = geometry(leaf, contracted(leaf))
  if depth is None:
    return Factors(shape, spec, len(contracted(leaf)), rank, rngs=rngs)
  return layers.stack(Factors, depth, shape, spec, len(contracted(leaf)), rank, rngs=rngs)


def join(model, adapters: dict[str, Factors], config: LoRAConfig, key: jax.Array | None = None):
  """The model with `LoRA`s in the places of the adapters' matrices.

  key: of the dropout; None for none, as in sampling.
  """
  leaves, structure = flatten(model)
  for number, (path, factors) in enumerate(sorted(adapters.items())):
    stacked = factors.b.shape[:1] if factors.a.ndim + factors.b.ndim - 2 > len(leaves[path].shape) else ()
    keys = None
    if key is not None and config.dropout:
      keys = jax.random.split(jax.random.fold_in(key, number), stacked) if stacked else jax.random.fold_in(key, number)
    leaves[path] = LoRA(leaves[path], factors.a, factors.b, jnp.full(stacked, config.scale), keys, config.dropout)
  return jax.tree.unflatten(structure, list(leaves.values()))


def flatten(model) -> tuple[dict[str, Any], Any]:
  """({path: Param, `Int8` or `LoRA`}, structure) of a model."""
  paths, structure = jax.tree.flatten_with_path(
      model, is_leaf=lambda x: isinstance(x, nnx.Variable) or hasattr(x, 'times'))
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in paths}, structure


def geometry(leaf: nnx.Param, axes: tuple[int, ...]) -> tuple[int | None, tuple[int, ...], tuple]:
  """(layers or None, shape, sharding spec) of a matrix, the last two of one layer, from its contracted axes."""
  value = jax.tree.leaves(leaf)[0]
  spec = value.sharding.spec if value.sharding is not None else ()
  spec = (*spec, *[None] * (value.ndim - len(spec)))
  if value.ndim == -min(axes):
    return None, value.shape, spec
  return value.shape[0], value.shape[1:], spec[1:]
