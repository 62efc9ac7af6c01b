"""Text-only causal language models (Llama 3.1, Qwen2, Qwen3) with the same methods as the VLMs.

Follows `LlamaForCausalLM`, `Qwen2ForCausalLM` and `Qwen3ForCausalLM` of transformers.
"""

from collections.abc import Mapping
import dataclasses
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp

from unifusion_jax import json_file
from unifusion_jax.errors import UserError
from unifusion_jax.models import decoder
from unifusion_jax.models.decoder import Decoder, DecoderConfig, positions_of, Prompt, resolve_lm_head
from unifusion_jax.models.internvl import TEXT_RULES
from unifusion_jax.models.layers import RESIDUAL
from unifusion_jax.weights import convert, safetensors_io


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """A text-only model: a decoder, under the name `text` as in the VLMs."""
  text: DecoderConfig = DecoderConfig()

  def problems(self) -> list[str]:
    """Sizes that cannot be, a sentence each."""
    return self.text.problems()

  def undivided(self, mesh: Mapping[str, int]) -> list[str]:
    """Sizes that a mesh does not divide, a sentence each."""
    return self.text.undivided(mesh)

  @classmethod
  def from_json(cls, config: dict) -> 'TextConfig':
    """From the config.json of a transformers checkpoint; UserError for settings that are not supported."""
    if 'text_config' in config or 'llm_config' in config:
      raise UserError(f'{config.get("model_type")!r} is a vision-language model: load it with the module of its own '
                      'name')
    return cls(DecoderConfig.from_json(config))

  def to_json(self) -> dict:
    """The config.json of a transformers checkpoint."""
    text = self.text.to_json()
    return text | {'architectures': [f'{text["model_type"].title()}ForCausalLM'], 'dtype': 'float32'}


class TextModel(nnx.Module):
  """The whole model; input_ids [b s] int32, attention_mask [b s] (False on padding, either side), images None."""

  def __init__(self, config: TextConfig, dtype=jnp.float32, *, rngs: nnx.Rngs):
    self.config = config
    self.decoder = Decoder(config.text, dtype, rngs=rngs)

  def prompt(self, input_ids: jax.Array, attention_mask: jax.Array, images: None = None) -> Prompt:
    """Embeddings and positions of a batch of prompts."""
    if images is not None:
      raise UserError(f'a {self.config.text.model_type} model reads text alone: give it no images, or take a VLM')
    input_ids, attention_mask = jax.sharding.reshard((input_ids, attention_mask), RESIDUAL)  # they may come unsharded
    angles = self.decoder.angles(positions_of(attention_mask))
    length = jnp.sum(attention_mask, axis=1, dtype=jnp.int32)
    return Prompt(self.decoder.embed(input_ids), angles, attention_mask, length)

  hidden, last, logits = decoder.hidden, decoder.last, decoder.logits


def axis_sizes(config: TextConfig) -> dict[str, int]:
  """The sizes behind the letters of the rules."""
  return {'h': config.text.heads, 'g': config.text.kv_heads, 'k': config.text.head_dim}


def load(folder, dtype=jnp.bfloat16, on_leaf=None) -> TextModel:
  """From a checkpoint folder (config.json and safetensors), sharded over the mesh in context.

  `on_leaf`: see `convert.load`.
  """
  folder = pathlib.Path(folder)
  config_json = json_file.read(folder / 'config.json')
  config = TextConfig.from_json(config_json)
  tensors, tied = resolve_lm_head(safetensors_io.read(folder), config_json, folder)
  config = TextConfig(dataclasses.replace(config.text, tied=tied))
  return convert.load(lambda: TextModel(config, dtype, rngs=nnx.Rngs(0)), tensors, RULES, axis_sizes(config), dtype,
                      ignore=(r'.*rotary_emb\.inv_freq',), on_leaf=on_leaf)


def save(model: TextModel, folder) -> None:
  """Writes the folder that transformers' AutoModelForCausalLM loads; all processes call it together."""
  convert.save(model, RULES, axis_sizes(model.config), folder, model.config.to_json())


RULES = tuple((name.removeprefix(r'language_model\.'), *rest) for name, *rest in TEXT_RULES)

# For planning without a checkpoint; `load` goes by the checkpoint's own config.json
PRESETS = {
    'Llama-3.1-8B': TextConfig(DecoderConfig(
        model_type='llama', vocab=128256, width=4096, depth=32, heads=32, kv_heads=8, head_dim=128, hidden=14336,
        eps=1e-5, theta=5e5, max_positions=131072, llama3=(8.0, 1.0, 4.0, 8192))),
}
