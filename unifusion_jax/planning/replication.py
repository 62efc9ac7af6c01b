"""What a mesh repeats: memory and work that every device of an axis has whole, although it could have a share."""

import dataclasses

import jax
import jax.numpy as jnp

from unifusion_jax import sharding
from unifusion_jax.data import transforms
from unifusion_jax.data.config import SCENES
from unifusion_jax.models import unifusion
from unifusion_jax.weights import encoders

STATE = 4  # arrays of f32 for each parameter: it, its average and two moments
WORTH_SAYING = 2 ** 30  # bytes of state on a device


def repeated(config, devices: int) -> list[str]:
  """One sentence, with its arithmetic, for each thing that the mesh of a config.Config repeats.

  What a mesh cannot do at all is among `config.problems`.
  """
  data, fsdp, tp = config.mesh.shape(devices)
  return [*_state(config, devices, data, fsdp), *_heads(config, fsdp, tp), *_sequences(config, data * fsdp, tp)]


def _state(config, devices: int, data: int, fsdp: int) -> list[str]:
  if data == 1:
    return []
  with jax.sharding.use_abstract_mesh(sharding.abstract_mesh(config.mesh, devices)):
    held = STATE * sharding.shard_bytes(jax.eval_shape(lambda: config.objective.random(config)))
  if held < WORTH_SAYING:
    return []
  return [f'mesh.data={data} keeps the whole training state {data} times: {_size(held)} on each device, where '
          f'mesh.data=1 with mesh.fsdp={data * fsdp} keeps about {_size(held / data)}']


def _heads(config, fsdp: int, tp: int) -> list[str]:
  """Of a VLM; for LAP and DiT such a mesh is refused."""
  frozen = 'vlm' in config.objective.pretrained
  name, model = (config.vlm, encoders.config(config.vlm)) if frozen else ('model', config.model)
  bytes_each = jnp.dtype(config.frozen_dtype).itemsize if frozen else 4 * STATE
  lines = []
  for part in ('vision', 'text'):
    c = getattr(model, part, None)
    if not dataclasses.is_dataclass(c):
      continue
    kv_heads = getattr(c, 'kv_heads', c.heads)
    smaller = [n for n in range(1, tp + 1) if tp % n == c.heads % n == kv_heads % n == 0]
    if tp in smaller:
      continue
    weights = 2 * c.depth * c.width * (c.heads + kv_heads) * getattr(c, 'head_dim', c.width // c.heads)
    held = weights * bytes_each / fsdp
    lines.append(f'mesh.tp={tp} does not divide the {c.heads} heads over {kv_heads} key/value heads of {name}, {part}: '
                 f'each of the {tp} devices computes that attention whole and holds {_size(held)} of its weights, not '
                 f'{_size(held / tp)}; mesh.tp={smaller[-1]} divides them')
  return lines


def _sequences(config, shards: int, tp: int) -> list[str]:
  """Of flow matching: between blocks tp shares a sequence where it divides its length."""
  if tp == 1 or not isinstance(config.model, unifusion.UniFusionConfig):
    return []
  prompts, sequences = _lengths(config)
  rows = -(-config.data.batch_size // (shards * config.optim.accumulate))
  token, dit = jnp.dtype(config.model.dtype).itemsize, config.model.dit
  lines = []
  for part, lengths, held, kept, settings in (
      ('DiT', sequences, rows * config.objective.noises_per_example * dit.depth * dit.width * token,
       f'the inputs of {dit.depth} blocks', 'data.unit and data.max_rewrite_tokens'),
      ('VLM', prompts, rows * config.model.lap.width * token, 'states between blocks', 'data.max_prompt_tokens')):
    whole = [length for length in lengths if length % tp]
    if whole:
      held *= max(whole)
      lines.append(f'mesh.tp={tp} does not divide {len(whole)} of the {len(lengths)} lengths of a sequence in the '
                   f'{part}, {max(whole):,} tokens the longest: each of the {tp} devices holds all of it between '
                   f'blocks, {_size(held)} of {kept} and not {_size(held / tp)}; {settings} set the lengths')
  return lines


def _lengths(config) -> tuple[set[int], set[int]]:
  """Tokens of the VLM's prompts and of the DiT's sequences: with a reference in each number of tiles, and with none."""
  encoder, data, unit = transforms.abstract_prompt_encoder(config), config.data, config.objective.unit(config)
  lengths = {encoder.with_tiles(tiles).lengths(references, task.name)
             for tiles in data.tiles for task in data.chosen for references in (0, 1)}
  canvases = [(data.size, data.size)] if data.path in SCENES else data.canvases
  return ({prompt for prompt, _ in lengths},
          {kept + (height // unit) * (width // unit) for _, kept in lengths for height, width in canvases})


def _size(held: float) -> str:
  return f'{held / 2 ** 30:.1f} GiB' if held >= 2 ** 30 else f'{held / 2 ** 20:.1f} MiB'
