"""Settings of --mode=plan."""

import dataclasses

from unifusion_jax import ranges
from unifusion_jax.planning import chips
from unifusion_jax.ranges import Range

# condition: LAP's part of encode, which is apart where models take turns
PROGRAMS = ('train', 'encode', 'condition', 'denoise', 'decode', 'rewrite')


@dataclasses.dataclass
class PlanConfig:
  """What --mode=plan compiles, and for which devices; none of them need be here."""
  topology: str = ''                      # v5e:16x16, v6e:8x8, v5p:4x4x8, tpu7x:4x4x4, h100:8; --topology is the same
  # Of PROGRAMS; --programs is the same. (): train, or of a recipe that samples what it needs of the rest
  programs: tuple[str, ...] = ()
  requests: int = 0                       # sampled at a time; 0: one for each device that shares a batch
  references: int = 1                     # of a request, and of an example in training
  tokens: int = 0                         # that condition, of a request without VERIFI in Krea 2's prompt; 0: the most
  save: bool = False                      # write the compiled train step for a later start; --save is the same
  tries: int = 4                          # other settings to compile where the train step does not fit; 0: none

  def problems(self) -> list[str]:
    """Settings that cannot work, a sentence each."""
    wrong = [f'plan.programs={",".join(self.programs)}: there is no program {name!r}, only {", ".join(PROGRAMS)}'
             for name in self.programs if name not in PROGRAMS]
    return wrong + ranges.problems(self, 'plan.', requests=Range(0, 65_536), references=Range(0, 64),
                                   tokens=Range(0, 512), tries=Range(0, 100))

  def chosen(self) -> chips.Topology:
    """The topology; UserError where there is none of that name."""
    return chips.topology(self.topology)
