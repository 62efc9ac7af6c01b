"""Text from a VLM for images and a prompt: the first thing to try with a checkpoint."""

import dataclasses
import os
import pathlib
import sys

import jax
import numpy as np

from unifusion_jax import config as configuration
from unifusion_jax import ranges, sharding, verifi
from unifusion_jax.data import imaging, vision_inputs
from unifusion_jax.fields import Path, Seed
from unifusion_jax.models import text_generation
from unifusion_jax.ranges import Range
from unifusion_jax.sharding import BATCH, MeshConfig
from unifusion_jax.weights import encoders, hub

EMBEDDED = configuration.ASSETS / 'vlm'
SHORTEST = 64  # prompts are padded to this many tokens or to a power of 2 above: one compiled program for each


@dataclasses.dataclass
class DescribeConfig:
  vlm: Path = str(EMBEDDED)    # a folder, or a hub id
  image: str = ''              # an image file, or several with commas between, in the order they are shown
  prompt: str = ''             # '' with an image: describe the image
  system: str | None = None    # a name in verifi.SYSTEM, or a text; None: the model's own
  tiles: int = 4               # maximum tiles of an image, or as many pixels; InternVL's own maximum is 12
  max_tokens: int = 256        # maximum tokens of the answer
  temperature: float = 0.0     # 0: always the most probable token
  top_p: float = 1.0
  seed: Seed = 0               # of sampling
  dtype: str = 'bfloat16'
  quantized: str = ''          # 'int8': int8 weights; 'w8a8': int8 activations as well
  cache: Path | None = None    # a folder that keeps the converted model for the next start
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

  mode = 'describe'

  def problems(self, devices: int) -> list[str]:
    """Settings that cannot work, a sentence each."""
    del devices
    wrong = self.mesh.problems() + ranges.problems(
        self, '', tiles=Range(1, 1000), max_tokens=Range(1, 10 ** 6), temperature=Range(0, 1000),
        top_p=Range(above=0, most=1))
    if not self.prompt and not self.image:
      wrong.append('nothing to answer: give --config.image=x.png, --config.prompt="..." or both')
    if self.dtype not in ('float32', 'bfloat16'):
      wrong.append(f"dtype={self.dtype!r} must be 'bfloat16' or 'float32'")
    if self.quantized not in encoders.QUANTIZED:
      wrong.append(f'quantized={self.quantized!r} must be one of {", ".join(map(repr, encoders.QUANTIZED))}')
    return wrong


def run(config: DescribeConfig, workdir: pathlib.Path) -> None:
  """Prints the model's answer; nothing is written. The mesh must be in context."""
  del workdir
  answer = describe(config)
  if sharding.is_main_process():
    print(answer)


def describe(config: DescribeConfig) -> str:
  """The model's answer; a note on stderr where it was cut off.

  Raises:
    UserError: without prompt and image, for a wrong setting, and for a file that is not an image.
  """
  configuration.check(config, jax.device_count())
  whole = os.path.isfile(os.path.expanduser(config.image))
  paths = [config.image] if whole else config.image.split(',') if config.image else []
  images = [imaging.read(os.path.expanduser(path)) for path in paths]
  folder = hub.resolve(config.vlm)
  vlm_config = encoders.config(folder)
  image_processor = vision_inputs.for_model(vlm_config, config.tiles, folder)
  tiles, counts = image_processor.preprocess(images)
  chat = verifi.Chat(folder, image_processor.image_tokens)
  vision_inputs.check(vlm_config, chat)
  spans = layout(chat, config.prompt or 'describe the picture', counts, config.system)
  length = sum(len(span.ids) for span in spans)
  padded = max(SHORTEST, 1 << (length - 1).bit_length())
  padded = max(length, min(padded, vlm_config.text.max_positions - config.max_tokens))  # pyrefly: ignore[missing-attribute]
  row = verifi.arrays(spans, padded, padded)
  vlm = encoders.load(folder, config.dtype, config.quantized, config.cache)
  out = text_generation.generate(
      vlm, *(_every_device(x) for x in (row['input_ids'], row['attention_mask'], tiles)), max_new=config.max_tokens,
      stop_ids=chat.stop_ids, temperature=config.temperature, top_p=config.top_p, key=jax.random.key(config.seed))
  # All rows are the same one, so each process reads a row of its own devices
  ids, count = (np.asarray(x.addressable_data(0))[0] for x in (out.ids, out.lengths))
  if ids[count - 1] not in chat.stop_ids and jax.process_index() == 0:
    print(f'(cut off after {count} tokens: raise --config.max_tokens for more)', file=sys.stderr)
  return chat.read(ids[:count])


def layout(chat: verifi.Chat, prompt: str, counts: tuple[int, ...], system: str | None) -> list[verifi.Span]:
  """Spans of the prompt; `system` None: the template's own system prompt, or the embedded VLM's."""
  if system is None and is_embedded(chat.folder):
    system = 'answer' if counts else 'rewrite'
  spans = chat.spans(prompt, counts, None, system or '')
  if system is not None:
    return spans
  rendered = chat.tokenizer.apply_chat_template(
      [dict(role='user', content='slotuser'), dict(role='assistant', content='slotwritten')], tokenize=False)
  opening = rendered.partition('slotuser')[0]
  return [verifi.Span('template', chat.with_bos(opening)), *spans[3:]]


def is_embedded(folder: str) -> bool:
  """Whether a VLM has the vocabulary of the scenes: the shipped one, or one trained here."""
  path = pathlib.Path(folder) / 'tokenizer.json'
  return path.exists() and path.read_bytes() == (EMBEDDED / 'tokenizer.json').read_bytes()


def _every_device(tree):
  """One example, repeated into a batch with a row for every device of the batch axes."""
  rows, spread = sharding.padded_batch(1), jax.NamedSharding(jax.sharding.get_mesh(), jax.P(BATCH))
  return jax.tree.map(lambda x: jax.make_array_from_callback((rows, *x.shape), spread, lambda _: x[None]), tree)
