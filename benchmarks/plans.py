"""docs/plans.md: what the 8B recipes need on real TPU slices, by the TPU compiler; no TPU is needed.

  python -m benchmarks.plans                       # every case that has no result in docs/plans/ yet, then the page
  python -m benchmarks.plans --only=edit_10_tiles  # of the cases whose names begin so
  python -m benchmarks.plans --only=edit_10_tiles --again   # also those that have one
  python -m benchmarks.plans --page                # only writes the page

A case is one command of --mode=plan; a train step takes minutes of two cores.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from absl import app, flags

from benchmarks import timing
from unifusion_jax.planning import chips, plans, report
from unifusion_jax.planning.memory import size

ROOT = pathlib.Path(__file__).parent.parent
PAGE, FOLDER = ROOT / 'docs' / 'plans.md', ROOT / 'docs' / 'plans'
FSDP = ('mesh.data=1', 'mesh.fsdp=-1', 'mesh.tp=1', 'optim.accumulate=1')
_ONLY = flags.DEFINE_string('only', '', 'Only cases whose names begin so.')
_AGAIN = flags.DEFINE_bool('again', False, 'Also the cases that have a result.')
_PAGE = flags.DEFINE_bool('page', False, 'Compile nothing, write the page of the results that are there.')


@dataclasses.dataclass(frozen=True)
class Case:
  """Programs of a recipe on a topology; `what` is the row's name on the page."""
  name: str
  what: str
  recipe: str
  topology: str
  settings: tuple[str, ...]
  programs: str = 'train'

  @property
  def command(self) -> list[str]:
    return ['python', '-m', 'unifusion_jax.main', f'--config=configs/{self.recipe}', '--mode=plan',
            f'--topology={self.topology}', f'--programs={self.programs}',
            *(f'--config.{setting}' for setting in self.settings)]


def train(name: str, what: str, recipe: str, *settings: str, topologies: tuple[str, ...] = ('v6e:8x8',)) -> list[Case]:
  """A train step on each topology, one example a device."""
  return [Case(f'{name}_{topology.replace(":", "_")}', what, recipe, topology,
               (*FSDP, f'data.batch_size={chips.topology(topology).devices}', *settings, 'plan.tries=0'))
          for topology in topologies]


PODS = ('v5e:16x16', 'v6e:8x8', 'v5p:4x4x8')
CASES = [
    *train('t2i_256', 't2i:8b_256, 256 px', 't2i.py:8b_256'),
    *train('t2i_512', 't2i:8b_512, 512 px', 't2i.py:8b_512'),
    *train('t2i_1024', 't2i:8b, 1024 px', 't2i.py:8b', topologies=PODS),
    *train('edit_1_tile', 'edit:8b, 1024 px, 1 tile', 'edit.py:8b', 'data.tiles=1'),
    *train('edit_5_tiles', 'edit:8b, 1024 px, 5 tiles', 'edit.py:8b', 'data.tiles=4'),  # 4 and a thumbnail
    *train('edit_10_tiles', 'edit:8b, 1024 px, 10 tiles', 'edit.py:8b', 'data.tiles=9',
           topologies=(*PODS, 'tpu7x:4x4x4')),
    *train('edit_3_references', 'edit:8b, 1024 px, 3 references of 5 tiles', 'edit.py:8b', 'data.tiles=4',
           'plan.references=3'),
    # One request a chip; rewriting over tp, for under fsdp every token gathers all weights. Edits decode as t2i does.
    *[Case(f'{name}_{programs.partition(",")[0]}_{topology.replace(":", "_")}', what, recipe, topology,
           (*mesh, 'plan.requests=8', *settings), programs)
      for topology in ('v6e:2x4', 'v5e:2x4')
      for name, what, recipe, settings, sampling in (
          ('t2i', 't2i:8b, 1024 px', 't2i.py:8b', ('plan.references=0',), 'encode,denoise,decode'),
          ('edit_10_tiles', 'edit:8b, 1024 px, 10 tiles', 'edit.py:8b', ('data.tiles=9',), 'encode,denoise'))
      for programs, mesh in ((sampling, FSDP[:3]), ('rewrite', ('mesh.data=1', 'mesh.fsdp=1', 'mesh.tp=-1')))]]

HEAD = '''# Plans

What the 8B recipes need on TPU slices, by the TPU compiler on a machine without one. Written by
`python -m benchmarks.plans`; each row is a command of `--mode=plan`, which stands with all its numbers in
docs/plans/NAME.json. Nothing here has run on a TPU. A train step is that of the largest batch: of t2i:8b the one that
reconstructs a reference, in up to 10 tiles. Krea 2 is planned the same way ([krea2.md](krea2.md#memory)), whole
pipelines of configs/sample.py too.

- **a chip**: GiB of one device's HBM (tpu7x: of a core, half a chip): arguments that the program reads (weights,
  optimizer state, batch); by its shapes, what lies beside them: in sampling the other models of a pipeline (not in
  --mode=rewrite, which holds the VLM alone), and of all models what the program does not read; temporaries; the total,
  with outputs and code; what the compiler lets a program use.
- **compiled / model**: operations of the optimised program over those of the model, whose backward pass is reckoned
  without remat. All pairs of an attention are counted on both sides, those that causality hides too.
- **gathers**: bytes that the collectives of one call move, and the largest of those, if any, that move more than one
  layer of weights.
- **at least**: time of a step, or of a call with all its steps or tokens, by the slowest of three: operations, HBM
  bytes and link bytes, each at the chip's peak, the other two hidden behind it. A bound, not a forecast. MFU is the
  model's share of the peak if it took no longer.
- **compile**: wall-clock time, in most rows beside other work. Alone on two cores a train step takes seven minutes.
'''


def result_of(case: Case) -> dict:
  """The plan of a case, its collectives as sums by kind with the larger ones kept."""
  with tempfile.TemporaryDirectory() as workdir:
    environment = os.environ | {'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
    subprocess.run([sys.executable, *case.command[1:], f'--workdir={workdir}', '--compilation_cache='], cwd=ROOT,
                   env=environment, check=True)
    made = json.loads((pathlib.Path(workdir) / 'plan.json').read_text())
  for result in made['programs']:
    result['larger'] = plans.larger_than_a_layer(result)
    result['moved'] = sum(each['count'] * each['bytes'] for each in result.pop('collectives', ()))
  versions = {name: importlib.metadata.version(name) for name in ('jax', 'libtpu')}
  return made | dict(command=' '.join(case.command), date=f'{datetime.date.today()}', machine=timing.processor(),
                     versions=versions)


def page(results: dict[str, dict]) -> str:
  """The page of the results {case name: result} that are there."""
  parts = [HEAD]
  for title, sampling in (('Training, one example a device', False), ('Sampling, 8 requests', True)):
    rows = [row(case, program) for case in CASES if (case.programs != 'train') == sampling
            and (result := results.get(case.name)) for program in result['programs']]
    if rows:
      parts.append(f'## {title}\n\n| recipe | topology | {"program | " if sampling else ""}a chip, GiB | verdict | '
                   'compiled / model | gathers | at least | compile |\n'
                   f'|---|---|{"---|" if sampling else ""}---|---|---|---|---|---|\n' + '\n'.join(rows) + '\n')
  if missing := [case.name for case in CASES if case.name not in results]:
    parts.append(f'Not compiled yet: {", ".join(missing)}.\n')
  made = sorted({(each['machine'], each['date'], *each['versions'].values()) for each in results.values()})
  parts += [f'Compiled on {machine}, {date}, jax {jax}, libtpu {libtpu}.\n' for machine, date, jax, libtpu in made]
  return '\n'.join(parts)


def row(case: Case, program: dict) -> str:
  memory, gib = program['memory'], 2 ** 30
  held = ' + '.join(f'{memory[part] / gib:.2f}' for part in ('arguments', 'beside', 'temporaries')
                    if memory[part] is not None)
  total = '' if memory['total'] is None else f' = {memory["total"] / gib:.2f}'
  cells = [case.what, case.topology, *([program['program']] if case.programs != 'train' else []),
           f'{held}{total} of {memory["usable"] / gib:.2f}', report.verdict(program)]
  if 'time' in program:
    model, time = program['model_flops']['total'], program['time']
    larger = max(program['larger'], key=lambda each: each['bytes'], default=None)
    said = f'; {larger["kind"]} {larger["shape"]} of `{larger["source"]}` is more than a layer' if larger else ''
    cells += [f'{program["compiled_flops"] / model:.2f}' if model else '',
              f'{size(program["moved"])}{said}',
              f'{report.seconds(time["least"])} ({time["bound"]}), MFU {time["mfu"]:.0%}']
  else:
    cells += ['', '', '']
  return f'| {" | ".join([*cells, report.seconds(program["compile_seconds"])])} |'


def main(_):
  for case in CASES:
    path = FOLDER / f'{case.name}.json'
    if case.name.startswith(_ONLY.value) and not _PAGE.value and (_AGAIN.value or not path.exists()):
      print(f'{case.name}: {" ".join(case.command)}', flush=True)
      made = result_of(case)
      FOLDER.mkdir(exist_ok=True)
      path.write_text(json.dumps(made, indent=1) + '\n')
  results = {case.name: json.loads((FOLDER / f'{case.name}.json').read_text()) for case in CASES
             if (FOLDER / f'{case.name}.json').exists()}
  PAGE.write_text(page(results))
  print(PAGE)


if __name__ == '__main__':
  app.run(main)
