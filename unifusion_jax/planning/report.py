"""Plans as text for a terminal: one screen a program."""

import collections

from unifusion_jax.planning import plans
from unifusion_jax.planning.chips import Topology
from unifusion_jax.planning.memory import size

_LABEL = 13  # columns
HOW = ('Operations, bytes and collectives are sums over the optimised HLO, loops by their trip counts. The time is the '
       'largest of three:\noperations, HBM bytes and link bytes, each over its peak; it assumes that the other two are '
       'hidden behind it, so it is a least one.')
ROUGH = 'Of GPUs only shapes are known here: the memory is that of the same program compiled for CPUs, a rough guide.'


def heading(summary: dict, topology: Topology) -> str:
  """The line above the programs."""
  mesh = ' x '.join(f'{axis} {size}' for axis, size in summary['mesh'].items())
  devices = f'{topology.chips} {"GPUs" if topology.chip.platform == "gpu" else "chips"}'
  devices += f' of {topology.chip.cores} cores, which are the devices' if topology.chip.cores > 1 else ''
  if 'weights' in summary:
    models = [f'{name} in {summary[f"{name}_quantized"] or summary["dtype"]}' for name in ('transformer', 'vlm')]
    return (f'{topology.name}: {devices}, mesh {mesh}; {summary["weights"]}, {" and ".join(models)}, '
            f'{"one after the other" if summary["in_turn"] else "all models at once"}')
  remat = [name for name, on in summary['remat'].items() if on]
  return (f'{topology.name}: {devices}, mesh {mesh}; batch {summary["batch_size"]}, accumulate '
          f'{summary["accumulate"]}, {summary["size"]} px, remat of {" and ".join(remat) or "nothing"}, '
          f'VLM in {summary["vlm_quantized"] or "its dtype"}')


def program(result: dict, topology: Topology) -> str:
  """The report of a plan (`plans.plan`)."""
  rows = [('memory', _memory(result, topology)), ('', _room(result)), *_tensors(result),
          *zip(('operations', ''), _flops(result))]
  if 'time' in result:
    rows += [*_collectives(result), ('', _layer(result)), ('time', _time(result))]
  rows.append(('host', f'{size(result["host"]["bytes"])} while it loads: twice the largest tensor of the weights, '
               f'{result["host"]["tensor"]}'))
  sizes = ''.join(f', {number} {noun}' for noun, number in result['sizes'].items())
  return '\n'.join([f'{result["program"]}: {result["rows"]} examples{sizes}; compiled in '
                    f'{seconds(result["compile_seconds"])}',
                    *(f'  {label:<{_LABEL}}{text}' for label, text in rows if text)])


def seconds(number: float) -> str:
  if number >= 60:
    return f'{int(number) // 60} min {int(number) % 60} s'
  if number >= 1:
    return f'{number:.1f} s'
  return f'{1000 * number:.0f} ms' if number >= 0.01 else f'{1000 * number:.2g} ms'


def operations(number: float) -> str:
  for unit, scale in (('PFLOP', 1e15), ('TFLOP', 1e12)):
    if number >= scale / 10:
      return f'{number / scale:.3g} {unit}'
  return f'{number / 1e9:.3g} GFLOP'


def verdict(result: dict) -> str:
  """Whether a program fits, and by how much."""
  memory = result['memory']
  if memory['total'] is None:
    return f'DOES NOT FIT: {result["refused"]}'
  spare = memory['usable'] - memory['total']
  if result['fits']:
    return f'fits, {size(spare)} to spare ({spare / memory["usable"]:.0%})'
  return f'DOES NOT FIT: {size(-spare)} too much' + (', the compiler refuses it' if 'refused' in result else '')


def _memory(result: dict, topology: Topology) -> str:
  memory = result['memory']
  parts = [f'{name} {size(memory[name])}' for name in ('arguments', 'beside', 'temporaries', 'outputs', 'code')
           if memory[name]]
  total = '' if memory['total'] is None else f' = {size(memory["total"])}'
  return f'a {topology.noun}: {" + ".join(parts)}{total}'


def _room(result: dict) -> str:
  memory = result['memory']
  return f'{verdict(result)}; {size(memory["usable"])} usable of {size(memory["hbm"])} HBM'


def _tensors(result: dict) -> list[tuple[str, str]]:
  """The largest tensors. Of a refused program they are those that it asks for, which XLA may not keep as they are."""
  label = 'asks for' if 'refused' in result else 'largest'
  width = max((len(each['shape']) for each in result['tensors']), default=0)
  return [('' if i else label, f'{size(each["bytes"]):>9}  {each["shape"]:<{width}}  {each["source"]}'.rstrip())
          for i, each in enumerate(result['tensors'])]


def _flops(result: dict) -> list[str]:
  """Operations on one device: of the model, and of the program beside them."""
  model, compiled = result['model_flops'], ''
  if 'compiled_flops' in result:
    compiled = f'compiled {operations(result["compiled_flops"])}'
    compiled += f', {result["compiled_flops"] / model["total"]:.2f} of the model\'s' if model['total'] else ''
    if result['attention_flops']:
      compiled += f'; {operations(result["attention_flops"])} of them in attention kernels'
  parts = (f': forward {operations(model["forward"])}, backward {operations(model["backward"])}, frozen models '
           f'{operations(model["frozen"])}' if model['backward'] else '')
  return [f'model {operations(model["total"])}{parts}', compiled]


def _collectives(result: dict) -> list[tuple[str, str]]:
  """A line for each kind: how many, their bytes together, the largest and where it comes from."""
  by_kind = collections.defaultdict(list)
  for each in result['collectives']:
    by_kind[each['kind']].append(each)
  rows = []
  for kind, members in by_kind.items():
    largest = max(members, key=lambda each: each['bytes'])
    total = sum(each['count'] * each['bytes'] for each in members)
    rows.append(('' if rows else 'collectives', f'{kind:<18} {sum(each["count"] for each in members):>5} x, '
                 f'{size(total):>9}; largest {size(largest["bytes"])} {largest["shape"]} {largest["source"]}'.rstrip()))
  return rows or [('collectives', 'none')]


def _layer(result: dict) -> str:
  larger, layer = plans.larger_than_a_layer(result), size(result['layer_bytes'])
  if not result['collectives']:
    return ''
  if not larger:
    return f'none moves more than one layer of weights ({layer})'
  worst = max(larger, key=lambda each: each['bytes'])
  return (f'MORE THAN ONE LAYER ({layer}): {len(larger)}, the largest {worst["kind"]} {worst["shape"]} '
          f'{worst["source"]}, {worst["count"]} x')


def _time(result: dict) -> str:
  time = result['time']
  parts = ', '.join(f'{name} {seconds(least)}' for name, least in time['seconds'].items())
  return f'at least {seconds(time["least"])}, bound by {time["bound"]} ({parts}); MFU at most {time["mfu"]:.0%}'
