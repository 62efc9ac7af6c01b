"""The device mesh, its axis names, and arrays moved to and from it.

Three axes: `data` (pure replication of parameters), `fsdp` (parameters and batch), `tp` (heads and hidden units).
All are Explicit: an array's type says how it is sharded, and gradients, moments and EMA inherit it.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import functools
import math

import jax
from jax.experimental import mesh_utils, multihost_utils
import numpy as np

from unifusion_jax import ranges
from unifusion_jax.errors import UserError
from unifusion_jax.ranges import Range

AXES = ('data', 'fsdp', 'tp')
BATCH = ('data', 'fsdp')  # the batch dimension of every activation
WEIGHTS = ('fsdp', 'tp')  # the dimension of a weight whose model knows no tp: its rows are over all devices


@dataclasses.dataclass
class MeshConfig:
  data: int = 1
  fsdp: int = -1  # -1: all devices that the other two leave
  tp: int = 1

  def shape(self, devices: int) -> tuple[int, int, int]:
    """(data, fsdp, tp) for a number of devices; UserError when their product is another number."""
    if wrong := self.problems():
      raise UserError('; '.join(wrong))
    sizes = [self.data, self.fsdp, self.tp]
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) == 1 and devices % known == 0:
      sizes[sizes.index(-1)] = devices // known
    if any(s < 1 for s in sizes) or int(np.prod(sizes)) != devices:
      raise UserError(f'mesh.data={self.data} x mesh.fsdp={self.fsdp} x mesh.tp={self.tp} does not fit {devices} '
                       'devices: the product must equal the number of devices, and one axis at most may be -1')
    return tuple(sizes)

  def problems(self) -> list[str]:
    """Sizes out of range, a sentence each."""
    return [problem for name in AXES if getattr(self, name) != -1
            for problem in ranges.problems(self, 'mesh.', **{name: Range(1, 2 ** 20)})]


def padded_batch(count: int) -> int:
  """The smallest batch size >= `count` that the mesh in context divides evenly."""
  shape = jax.sharding.get_mesh().shape
  devices = int(np.prod([shape[axis] for axis in BATCH]))
  return -(-count // devices) * devices


def batched(items: Sequence, size: int) -> Iterator[tuple[list, list]]:
  """(items, rows) of each batch: at most `size` items, and exactly `size` rows, which repeat the items.

  So every batch has one shape; `rows[:len(items)] == items`.
  """
  for start in range(0, len(items), size):
    part = list(items[start:start + size])
    yield part, [part[i % len(part)] for i in range(size)]


def padded(items: Sequence) -> list:
  """Items, repeated up to a number that the devices share evenly."""
  return next(batched(items, padded_batch(len(items))))[1]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """The mesh over the devices of all processes, or over others that may not be here, such as those of a topology.

  On TPUs neighbours on an axis are neighbours on the torus, as far as its sides allow.
  """
  devices = jax.devices() if devices is None else devices
  explicit = (jax.sharding.AxisType.Explicit,) * len(AXES)
  placed = mesh_utils.create_device_mesh(config.shape(len(devices)), devices, allow_split_physical_axes=True)
  return jax.sharding.Mesh(placed, AXES, explicit)


def mesh_in_context() -> jax.sharding.Mesh:
  """The mesh in context, or else one over all devices that shares out the batch."""
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return make_mesh(MeshConfig(data=-1, fsdp=1))
  if mesh.axis_names != AXES:
    raise UserError(f'the mesh in context has the axes {mesh.axis_names}: make it with sharding.make_mesh, which '
                    f'gives it {AXES}')
  return mesh


def abstract_mesh(config: MeshConfig, devices: int) -> jax.sharding.AbstractMesh:
  """The mesh over any number of devices, present or not, for type-checking a program at full size."""
  explicit = (jax.sharding.AxisType.Explicit,) * len(AXES)
  return jax.sharding.AbstractMesh(config.shape(devices), AXES, axis_types=explicit)


def rows(batch: int, process: int | None = None) -> list[int]:
  """The rows of a batch that a process's devices hold on the mesh in context, in order; None: of this process.

  Processes whose devices share an example's work (tp) hold the same ones.
  """
  process = jax.process_index() if process is None else process
  spread = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.P(BATCH))
  places = (place for device, (place,) in spread.devices_indices_map((batch,)).items()
            if device.process_index == process)
  return sorted({row for place in places for row in range(*place.indices(batch))})


def own_rows(batch: int) -> list[int]:
  """Those of this process's `rows` that no process before it holds: each row is one process's own."""
  before = {row for process in range(jax.process_index()) for row in rows(batch, process)}
  return [row for row in rows(batch) if row not in before]


@dataclasses.dataclass(frozen=True)
class Share:
  """A share of the examples, one of `count`, of a process and of those whose devices share the work of each example.

  Attributes:
    rows: those of each batch.  first: whether this process is the first of those that have this share.
  """
  number: int
  count: int
  rows: tuple[int, ...]
  first: bool


def share(batch: int) -> Share:
  """This process's share of batches on the mesh in context. UserError where processes have parts of each other's."""
  held = [tuple(rows(batch, process)) for process in range(jax.process_count())]
  shares, mine = sorted(set(held)), held[jax.process_index()]
  if sum(map(len, shares)) != batch:
    raise UserError('some processes hold a part of the rows that another one holds: give mesh.tp a number that divides '
                    'the devices of a process, or is a multiple of them')
  return Share(shares.index(mine), len(shares), mine, held.index(mine) == jax.process_index())


def spread(x: jax.Array) -> jax.Array:
  """Rows [b ...] over all devices of the mesh in context, tp among them, where they divide b; else over BATCH.

  For the frozen models whose work tp would repeat: autoencoders and vision towers.
  """
  even = x.shape[0] % jax.sharding.get_abstract_mesh().size == 0
  return jax.sharding.reshard(x, jax.P(AXES if even else BATCH))


def shard_batch(batch, mesh: jax.sharding.Mesh):
  """Global arrays sharded over BATCH, from this process's `rows` of the batch (numpy, leading dim b)."""
  sharding = jax.sharding.NamedSharding(mesh, jax.P(BATCH))
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def shard(batch):
  """Global arrays sharded over BATCH on the mesh in context, from a batch that every process holds whole."""
  return jax.device_put(batch, jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.P(BATCH)))


def gather(tree):
  """Whole numpy arrays on every process, from sharded ones; all processes call this together."""
  return jax.device_get(tree) if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def tell_all(row: np.ndarray) -> jax.Array | np.ndarray:
  """Gathers a row [n] of each process: [processes n], in the order of the processes, on all of them.

  All processes call this together. It is asynchronous, queued behind earlier work of the devices; `local` waits for it.
  """
  if jax.process_count() == 1:
    return row[None]
  mesh = jax.sharding.get_mesh()
  owners = [device.process_index for device in mesh.devices.flat]
  spread = jax.sharding.NamedSharding(mesh, jax.P(AXES))
  rows = jax.make_array_from_callback((len(owners), len(row)), spread, lambda _: row[None])
  return _everywhere(rows, tuple(owners.index(process) for process in sorted(set(owners))))


@functools.partial(jax.jit, static_argnums=1)
def _everywhere(rows: jax.Array, chosen: tuple[int, ...]) -> jax.Array:
  return jax.sharding.reshard(rows, jax.P())[np.array(chosen)]


class Exchange:
  """A row of numbers that all processes tell one another, and read at the next call; a process alone at once.

  All processes call this together, in every step. What was told is read when the work of the devices before it is done,
  so that the host stays a step ahead. The mesh must be in context.

  Args:
    first: the row [n] of all processes that the first call reads where there are several.
  """

  def __init__(self, first: np.ndarray):
    self._first, self._told = first[None], None

  def __call__(self, row: np.ndarray) -> np.ndarray:
    """Rows [processes n]."""
    told = tell_all(row)
    if jax.process_count() > 1:
      told, self._told = self._told, told
    return self._first if told is None else local(told)


def local(x: jax.Array | np.ndarray) -> np.ndarray:
  """An array that every process holds whole, as numpy."""
  return np.asarray(x.addressable_data(0)) if isinstance(x, jax.Array) else x


def is_main_process() -> bool:
  """Whether this process is the one that prints and writes shared files."""
  return jax.process_index() == 0


@contextlib.contextmanager
def together(work: str):
  """A part of the work, which all processes enter together: where it fails on one, all of them raise.

  work: what it does, for the message of those where it did not fail.
  """
  error = None
  try:
    yield
  except Exception as problem:  # raised as soon as the other processes know
    error = problem
  if jax.process_count() > 1:
    failed = np.flatnonzero(multihost_utils.process_allgather(np.array(error is not None)))
    if len(failed) and error is None:
      raise UserError(f'process {failed[0]} of {jax.process_count()} could not {work} and says why: all stop')
  if error is not None:
    raise error


def everywhere(holds: bool) -> bool:
  """Whether something holds on all processes; all call this together."""
  return holds if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(holds)).all())


def from_main_process(x: np.ndarray) -> np.ndarray:
  """The first process's value of a small numpy array, on every process; all call this together."""
  return x if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(x))


def batch_spec(example: dict, batch: int) -> dict:
  """The shapes of one example as a batch sharded over the mesh in context."""
  by_rows = jax.sharding.NamedSharding(jax.sharding.get_abstract_mesh(), jax.P(BATCH))
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch, *x.shape), x.dtype, sharding=by_rows), example)


def abstract(tree, mesh):
  """An `eval_shape` result whose leaves have shardings on `mesh`; leaves without a spec are replicated."""
  def leaf(x):
    spec = x.sharding.spec if x.sharding is not None else jax.P()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))
  return jax.tree.map(leaf, tree)


def shard_bytes(tree) -> int:
  """Bytes of one device's shards of (abstract) arrays; those without a sharding are whole."""
  def held(x):
    return x.dtype.itemsize * math.prod(x.shape if x.sharding is None else x.sharding.shard_shape(x.shape))
  return sum(held(x) for x in jax.tree.leaves(tree))
