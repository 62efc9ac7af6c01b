"""What a mesh repeats: memory and work that every device of an axis has whole, although it could have a share."""

import jax
import jax.numpy as jnp

from unifusion_jax import sharding
from unifusion_jax.data import transforms
from unifusion_jax.data.config import SCENES
from unifusion_jax.models import fusion, unifusion
from unifusion_jax.planning.memory import size

STATE = 4  # arrays of f32 for each parameter: it, its average and two moments
WORTH_SAYING = 2 ** 30  # bytes of state on a device


def repeated(config, devices: int) -> list[str]:
  """One sentence, with its arithmetic, for each thing that the mesh of a config.Config repeats.

  What a mesh cannot do at all is among `config.problems`; `layers.heads_axis` tells of heads.
  """
  mesh = sharding.abstract_mesh(config.mesh, devices)
  flow = isinstance(config.model, unifusion.UniFusionConfig) and mesh.shape['tp'] > 1
  return [*_state(config, mesh), *(_sequences(config, mesh.shape) if flow else ()),
          *(_images(config, mesh) if flow else ())]


def _state(config, mesh) -> list[str]:
  data, fsdp = mesh.shape['data'], mesh.shape['fsdp']
  if data == 1:
    return []
  with jax.sharding.use_abstract_mesh(mesh):
    held = STATE * sharding.shard_bytes(jax.eval_shape(lambda: config.objective.random(config)))
  if held < WORTH_SAYING:
    return []
  return [f'mesh.data={data} keeps the whole training state {data} times: {size(held)} on each device, where '
          f'mesh.data=1 with mesh.fsdp={data * fsdp} keeps about {size(held / data)}']


def _sequences(config, mesh) -> list[str]:
  """Between blocks tp shares a sequence where it divides its length (`layers.split`)."""
  tp, model = mesh['tp'], config.model
  prompts, kept, sequences = _lengths(config)
  rows = -(-config.data.batch_size // (mesh['data'] * mesh['fsdp'] * config.optim.accumulate))
  state = rows * jnp.dtype(model.dtype).itemsize
  lap, dit = state * model.lap.width, state * config.objective.noises_per_example * model.dit.width
  between = ('LAP', {model.lap.taps}, lap * max(kept) * model.lap.depth, f'the inputs of {model.lap.depth} blocks',
             'there it is the number of taps')
  if model.fusion != 'lap':
    blocks = model.lap.depth + model.lap.refiner_depth
    between = ('adaptor', kept, lap * fusion.taps_read(model) * blocks, f'the inputs of {blocks} blocks',
               'data.max_rewrite_tokens sets the lengths')
  lines = []
  for part, lengths, token, held_where, settings in (
      ('DiT', sequences, dit * model.dit.depth, f'the inputs of {model.dit.depth} blocks',
       'data.unit and data.max_rewrite_tokens set the lengths'),
      between,
      ('VLM', prompts, lap, 'states between blocks', 'data.max_prompt_tokens sets the lengths')):
    whole = [length for length in lengths if length % tp]
    if whole:
      held = token * max(whole)
      lines.append(f'mesh.tp={tp} does not divide {len(whole)} of the {len(lengths)} lengths of a sequence in the '
                   f'{part}, {max(whole):,} the longest: each of the {tp} devices holds all of it between blocks, '
                   f'{size(held)} of {held_where} and not {size(held / tp)}; {settings}')
  return lines


def _images(config, mesh) -> list[str]:
  """The autoencoder's images are shared out over all devices where these divide their number (`sharding.spread`)."""
  images = config.data.batch_size // config.optim.accumulate
  if images % mesh.size == 0:
    return []
  return [f'data.batch_size={config.data.batch_size} over optim.accumulate={config.optim.accumulate} are {images} '
          f'images at a time, no multiple of {mesh.size} devices: the autoencoder encodes each of them on each of the '
          f'{mesh.shape["tp"]} devices of mesh.tp']


def _lengths(config) -> tuple[set[int], set[int], set[int]]:
  """Numbers of tokens, with a reference in each number of tiles and with none: prompts, kept ones, the DiT's."""
  encoder, data, unit = transforms.abstract_prompt_encoder(config), config.data, config.objective.unit(config)
  lengths = {encoder.with_tiles(tiles).lengths(references, task.name)
             for tiles in data.tiles for task in data.chosen for references in (0, 1)}
  canvases = [(data.size, data.size)] if data.path in SCENES else data.canvases
  outside = config.model.fusion == 'kv'  # its tokens are not between the DiT's blocks
  return ({prompt for prompt, _ in lengths}, {kept for _, kept in lengths},
          {kept * (not outside) + (height // unit) * (width // unit) for _, kept in lengths
           for height, width in canvases})
