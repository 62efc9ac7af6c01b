"""Operations and arrays that a program asks for, read from its jaxpr: before XLA, remat and padding.

The backward pass is reckoned, not traced: a product costs its forward pass once more for each of its operands that
depends on a parameter in training. So rematerialisation counts nothing.
"""

import dataclasses
import math

import jax
from jax.extend import core
import numpy as np

from unifusion_jax import sharding
from unifusion_jax.planning import hlo
from unifusion_jax.planning.work import Tensor

# Their outputs are arrays in memory; what lies between them XLA fuses
_WRITES = {'dot_general', 'conv_general_dilated', 'scan', 'while', 'gather', 'scatter', 'scatter-add', 'concatenate',
           'sort', 'all_gather', 'pallas_call', 'custom_partitioning'}


@dataclasses.dataclass
class ModelFlops:
  """Operations of products and convolutions, over all devices: 2 for each multiplication."""
  forward: float = 0.0   # of what depends on parameters in training
  backward: float = 0.0
  frozen: float = 0.0    # of the rest

  @property
  def total(self) -> float:
    return self.forward + self.backward + self.frozen


def count(function, *arguments, trained: int = 0) -> ModelFlops:
  """Operations of `function` and of its gradient; the first `trained` arguments are parameters in training."""
  jaxpr = jax.make_jaxpr(function)(*arguments)
  leaves = [len(jax.tree.leaves(argument)) for argument in arguments]
  learnt = [at < trained for at, number in enumerate(leaves) for _ in range(number)]
  total = ModelFlops()
  _count(jaxpr.jaxpr, learnt, 1, total)
  return total


def count_call(function, *arguments, trained: int = 0) -> ModelFlops:
  """`count` of a call with arrays of the mesh in context, which stay where they are.

  Counted on the same mesh without its devices, where no fused kernel hides the operations of attention.
  """
  mesh = jax.sharding.get_mesh()
  absent = jax.sharding.AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=mesh.axis_types)
  with jax.sharding.use_abstract_mesh(absent):
    return count(function, *sharding.abstract(jax.tree.map(jax.typeof, arguments), absent), trained=trained)


def _count(jaxpr: core.Jaxpr, learnt: list[bool], times: float, total: ModelFlops) -> list[bool]:
  """Adds the operations of `times` runs; which outputs depend on inputs that are `learnt`."""
  depends = dict(zip(jaxpr.invars, learnt))
  ask = lambda var: not isinstance(var, core.Literal) and depends.get(var, False)
  for eqn in jaxpr.eqns:
    name, inputs = eqn.primitive.name, [ask(var) for var in eqn.invars]
    outputs = [any(inputs) and name != 'stop_gradient'] * len(eqn.outvars)
    if name in ('dot_general', 'conv_general_dilated'):
      flops = times * _flops(eqn)
      if any(inputs):
        total.forward += flops
        total.backward += sum(inputs) * flops
      else:
        total.frozen += flops
    elif name == 'scan':
      constants, carry = _scan_sizes(eqn.params)
      outputs = _loop(eqn.params['jaxpr'].jaxpr, inputs, constants, carry, times * eqn.params['length'], total)
    elif name == 'while':
      skipped, constants = eqn.params['cond_nconsts'], eqn.params['body_nconsts']
      trips = _most_trips(eqn.params['cond_jaxpr'].jaxpr)
      inputs = inputs[skipped:]
      outputs = _loop(eqn.params['body_jaxpr'].jaxpr, inputs, constants, len(inputs) - constants, times * trips, total)
    elif name == 'cond':
      for branch in eqn.params['branches']:  # all of them: which one runs is not known
        outputs = [a or b for a, b in zip(outputs, _count(branch.jaxpr, inputs[1:], times, total))]
    else:
      for inner in subjaxprs(eqn)[:1]:
        manual = math.prod(eqn.params['mesh'].shape[axis] for axis in eqn.params['manual_axes']
                           ) if name == 'shard_map' else 1
        outputs = _count(inner, inputs, times * manual, total)
    depends.update(zip(eqn.outvars, outputs))
  return [ask(var) for var in jaxpr.outvars]


def _scan_sizes(params: dict) -> tuple[int, int]:
  """(constants, carried values) of a scan; jax 0.12 has trees of its inputs where earlier versions have numbers."""
  if 'ft_in' in params:
    constants, carry, _ = params['ft_in'].unpack()
    return len(constants), len(carry)
  return params['num_consts'], params['num_carry']


def _loop(body: core.Jaxpr, inputs: list[bool], constants: int, carry: int, times: float, total: ModelFlops):
  state = inputs[constants:constants + carry]
  while True:  # until the state depends on no more than it did
    outputs = _count(body, inputs[:constants] + state + inputs[constants + carry:], 0, ModelFlops())
    after = [a or b for a, b in zip(state, outputs[:carry])]
    if after == state:
      break
    state = after
  return _count(body, inputs[:constants] + state + inputs[constants + carry:], times, total)


def _most_trips(condition: core.Jaxpr) -> int:
  """The most runs of a while loop that counts to a number; 1 where it does not."""
  limits = [int(eqn.invars[1].val) for eqn in condition.eqns if eqn.primitive.name == 'lt'
            and isinstance(eqn.invars[1], core.Literal) and np.ndim(eqn.invars[1].val) == 0]
  return max(limits, default=1)


def _flops(eqn) -> float:
  left, right = (var.aval.shape for var in eqn.invars[:2])
  out = math.prod(eqn.outvars[0].aval.shape)
  if eqn.primitive.name == 'dot_general':
    (contracted, _), _ = eqn.params['dimension_numbers']
    return 2.0 * out * math.prod(left[i] for i in contracted)
  kernel = eqn.params['dimension_numbers'].rhs_spec  # output features, input features, axes
  return 2.0 * out * right[kernel[1]] * math.prod(right[i] for i in kernel[2:])


def subjaxprs(eqn) -> list:
  """The jaxprs that an equation runs."""
  values = [value for param in eqn.params.values() for value in (param if isinstance(param, tuple) else (param,))]
  return [getattr(value, 'jaxpr', value) for value in values if isinstance(value, (core.Jaxpr, core.ClosedJaxpr))]


def largest(jaxpr: core.Jaxpr, number: int = 5) -> list[Tensor]:
  """The largest arrays that a traced program writes, by their shares on one device."""
  found = {}

  def walk(jaxpr):
    for eqn in jaxpr.eqns:
      if eqn.primitive.name in _WRITES:
        for aval in (var.aval for var in eqn.outvars):
          shape = aval.sharding.shard_shape(aval.shape)
          text = f'{aval.dtype.name}[{",".join(map(str, shape))}]'
          source = hlo.places([(frame.file_name, frame.line_num) for frame in eqn.source_info.traceback.frames])
          found[text, source] = Tensor(math.prod(shape) * aval.dtype.itemsize, text, source)
      for inner in subjaxprs(eqn):
        walk(inner)

  walk(jaxpr)
  return sorted(found.values(), key=lambda tensor: -tensor.bytes)[:number]
