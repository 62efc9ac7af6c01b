"""Causal language models without eyes (Llama 3.1, Qwen2, Qwen3) behind the same verbs as the VLMs.

Follows `LlamaForCausalLM`, `Qwen2ForCausalLM` and `Qwen3ForCausalLM` of transformers.
"""

import dataclasses
import json
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp

from unifusion_jax.errors import UserError
from unifusion_jax.models.decoder import causal_mask, Decoder, DecoderConfig, positions_of, Prompt, resolve_lm_head
from unifusion_jax.models.internvl import TEXT_RULES
from unifusion_jax.models.layers import RESIDUAL
from unifusion_jax.weights import convert, safetensors_io


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """The whole model is its decoder; `text` is where the VLMs have theirs."""
  text: DecoderConfig = DecoderConfig()

  @classmethod
  def from_json(cls, config: dict, unroll: bool = False) -> 'TextConfig':
    """From the config.json of a transformers checkpoint; ValueError for what is not computed here."""
    if 'text_config' in config or 'llm_config' in config:
      raise UserError(f'{config.get("model_type")!r} is a model with eyes: load it with the module of its own name')
    return cls(dataclasses.replace(DecoderConfig.from_json(config), unroll=unroll))

  def to_json(self) -> dict:
    """The config.json of a transformers checkpoint."""
    text = self.text.to_json()
    return text | {'architectures': [f'{text["model_type"].title()}ForCausalLM'], 'dtype': 'float32'}


class TextModel(nnx.Module):
  """The whole model; tokens [b s] int32, valid [b s] (False on padding, either side). tiles must be None."""

  def __init__(self, config: TextConfig, dtype=jnp.float32, *, rngs: nnx.Rngs):
    self.config = config
    self.decoder = Decoder(config.text, dtype, rngs=rngs)

  def prompt(self, tokens: jax.Array, valid: jax.Array, tiles: None = None) -> Prompt:
    """Embeddings, and where each token stands."""
    if tiles is not None:
      raise UserError(f'a {self.config.text.model_type} model reads text alone: give it no images, or take a VLM')
    tokens, valid = jax.sharding.reshard((tokens, valid), RESIDUAL)  # plain arrays are welcome
    angles = self.decoder.angles(positions_of(valid))
    return Prompt(self.decoder.embed(tokens), angles, valid, jnp.sum(valid, axis=1, dtype=jnp.int32))

  def hidden(self, tokens: jax.Array, valid: jax.Array, taps: tuple[int, ...], tiles: None = None) -> jax.Array:
    """Tapped states [b s l e]: tap k after k blocks, 0 the embeddings, never final-normed. Later blocks do not run."""
    prompt = self.prompt(tokens, valid, tiles)
    return self.decoder(prompt.x, prompt.angles, causal_mask(prompt.valid), taps=taps, depth=max(taps))[1]

  def last(self, tokens: jax.Array, valid: jax.Array, tiles: None = None) -> jax.Array:
    """The last block's output [b s e], which `decoder.logits` takes at any chosen positions."""
    prompt = self.prompt(tokens, valid, tiles)
    return self.decoder(prompt.x, prompt.angles, causal_mask(prompt.valid))[0]

  def logits(self, tokens: jax.Array, valid: jax.Array, tiles: None = None) -> jax.Array:
    """Next-token logits [b s v], f32."""
    return self.decoder.logits(self.last(tokens, valid, tiles))


def axis_sizes(config: TextConfig) -> dict[str, int]:
  """The sizes behind the letters of the rules."""
  return {'h': config.text.heads, 'g': config.text.kv_heads, 'k': config.text.head_dim}


def load(folder, dtype=jnp.bfloat16, unroll: bool = False, on_leaf=None) -> TextModel:
  """From a checkpoint folder (config.json and safetensors), sharded over the mesh in context.

  `on_leaf`: see `convert.load`.
  """
  folder = pathlib.Path(folder)
  described = json.loads((folder / 'config.json').read_text())
  config = TextConfig.from_json(described, unroll)
  tensors, tied = resolve_lm_head(safetensors_io.read(folder), described, folder)
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
        'llama', 128256, 4096, 32, 32, 8, 128, 14336, 1e-5, 5e5, 131072, llama3=(8.0, 1.0, 4.0, 8192))),
}
