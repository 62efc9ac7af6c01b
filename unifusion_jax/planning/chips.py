"""Generations of chips with their memory and peaks, and the topologies that exist of each.

TPUs: cloud.google.com/tpu/docs/v5e, v5p, v6e and tpu7x (tables of specifications and of configurations), read
2026-11-26. GPUs: NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM, dense bf16.
"""

import dataclasses
import math
import re

from unifusion_jax.errors import UserError

GIB = 2 ** 30
_SQUARES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # and every a x b x c of multiples of 4 that rise


@dataclasses.dataclass(frozen=True)
class Chip:
  """A generation. Numbers of one chip; bytes and operations a second."""
  platform: str     # 'tpu' or 'gpu'
  hbm: float        # GiB
  usable: float     # GiB that programs may take. TPUs: as the compiler says when it refuses one
  flops: float      # bf16
  bandwidth: float  # of HBM
  link: float       # that it sends over all its links at once: half of the bidirectional bandwidth
  most: int         # chips in a slice, or GPUs joined by NVLink
  cores: int = 1    # jax devices in a chip
  per_host: int = 4
  shapes: tuple[tuple[int, ...], ...] = ()

  def shape_problem(self, shape: tuple[int, ...]) -> str:
    """What is wrong with a topology's shape; '' for nothing."""
    if self.platform == 'gpu':
      return '' if len(shape) == 1 and 1 <= shape[0] <= self.most else f'a number of GPUs up to {self.most}'
    large = len(shape) == 3 == len(self.shapes[0]) and all(n and n % 4 == 0 for n in shape)
    if shape in self.shapes or large and list(shape) == sorted(shape) and math.prod(shape) <= self.most:
      return ''
    named = ', '.join('x'.join(map(str, each)) for each in self.shapes)
    return f'one of {named}' + (f', or multiples of 4 that rise, as 4x4x8, up to {self.most} chips'
                                if len(self.shapes[0]) == 3 else '')


# The usable share of a GPU is what jax takes of it unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
CHIPS = {
    'v5e': Chip('tpu', 16, 15.75, 197e12, 819e9, 200e9, 256, shapes=_SQUARES),
    'v6e': Chip('tpu', 32, 31.25, 918e12, 1638e9, 400e9, 256, shapes=_SQUARES),
    'v5p': Chip('tpu', 95.74, 95.74, 459e12, 2765e9, 600e9, 6144, shapes=_CUBES),
    'tpu7x': Chip('tpu', 192, 189.5, 2307e12, 7380e9, 600e9, 9216, cores=2, shapes=_CUBES),
    'a100': Chip('gpu', 80, 60, 312e12, 2039e9, 300e9, 8, per_host=8),
    'h100': Chip('gpu', 80, 60, 989e12, 3350e9, 450e9, 8, per_host=8),
    'h200': Chip('gpu', 141, 105.75, 989e12, 4800e9, 450e9, 8, per_host=8),
}

_PCIE = dataclasses.replace(CHIPS['h100'], flops=756e12, bandwidth=2000e9, link=300e9, most=2)
_40GB = dataclasses.replace(CHIPS['a100'], hbm=40, usable=30, bandwidth=1555e9)
# By the name that jax gives their devices (device_kind)
KINDS = {
    'TPU v5 lite': CHIPS['v5e'], 'TPU v5e': CHIPS['v5e'], 'TPU v6 lite': CHIPS['v6e'], 'TPU v6e': CHIPS['v6e'],
    'TPU v5': CHIPS['v5p'], 'TPU v5p': CHIPS['v5p'], 'TPU7x': CHIPS['tpu7x'],
    'NVIDIA A100-SXM4-80GB': CHIPS['a100'], 'NVIDIA A100-SXM4-40GB': _40GB,
    'NVIDIA H100 80GB HBM3': CHIPS['h100'], 'NVIDIA H100 PCIe': _PCIE, 'NVIDIA H200': CHIPS['h200'],
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice of TPUs, or a machine of GPUs. The numbers with `device_` are those of one jax device."""
  name: str
  chip: Chip
  shape: tuple[int, ...]

  @property
  def chips(self) -> int:
    return math.prod(self.shape)

  @property
  def devices(self) -> int:
    return self.chips * self.chip.cores

  @property
  def local_devices(self) -> int:
    """Devices of one host."""
    return min(self.chips, self.chip.per_host) * self.chip.cores

  @property
  def noun(self) -> str:
    """What one jax device is."""
    return 'GPU' if self.chip.platform == 'gpu' else 'chip' if self.chip.cores == 1 else 'core (half a chip)'

  @property
  def usable(self) -> int:
    """Bytes of memory that a program may take on one device."""
    return int(self.chip.usable * GIB / self.chip.cores)

  @property
  def hbm(self) -> int:
    return int(self.chip.hbm * GIB / self.chip.cores)


def topology(name: str) -> Topology:
  """The topology of a name, as v6e:8x8, v5p:4x4x8 or h100:8; UserError for one that does not exist."""
  generation, _, text = name.partition(':')
  if generation not in CHIPS:
    raise UserError(f'--topology={name}: there is no generation {generation!r}; there are {", ".join(CHIPS)}, as in '
                    'v6e:8x8, v5p:4x4x8 or h100:8')
  chip = CHIPS[generation]
  shape = tuple(map(int, text.split('x'))) if re.fullmatch(r'\d{1,5}(x\d{1,5})*', text) else ()
  if wanted := chip.shape_problem(shape):
    raise UserError(f'--topology={name}: the shape {text!r} must be {wanted}')
  return Topology(name, chip, shape)
