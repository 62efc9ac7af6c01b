"""The embedded VLM's own tokenizer: byte-level BPE trained on the language of scenes, with InternVL's chat tokens.

  python -m unifusion_jax.scenes.tokenizer --out=unifusion_jax/assets/tiny/vlm
"""

import itertools
import json
import pathlib

from absl import app, flags
import tokenizers

from unifusion_jax import command_line, errors, verifi
from unifusion_jax.scenes import examples

SPECIAL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>', '<img>', '</img>', '<IMG_CONTEXT>')
# Several images are numbered, in the words that requests have for them.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% set images = message['content'] | selectattr('type', 'equalto', 'image') | list %}"
    "{% set shown = namespace(images=0) %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{% set shown.images = shown.images + 1 %}"
    "{% if images | length > 1 %}{{ 'picture ' ~ shown.images ~ '\\n' }}{% endif %}{{ '<IMG_CONTEXT>\\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
TASKS = ('rewrite', 'edit', 'question', 'multi')


def corpus(count: int):
  """Texts of `count` training examples of each task in TASKS, and of system prompts and chat template."""
  for text in (*verifi.SYSTEM.values(), 'system\nuser\nassistant\n', 'describe the picture'):
    yield from itertools.repeat(text, count // 10)
  for task in TASKS:
    for i in range(count):
      record = examples.example(task, 'train', i, images=False)
      yield record['instruction']
      yield record['caption']


def build(folder: str, vocabulary: int = 1024, count: int = 4000) -> None:
  """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja for transformers."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=vocabulary, special_tokens=list(SPECIAL), show_progress=False,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
  tokenizer.train_from_iterator(corpus(count), trainer)
  out = pathlib.Path(folder)
  out.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(out / 'tokenizer.json'))
  config = dict(tokenizer_class='PreTrainedTokenizerFast', eos_token='<|im_end|>', pad_token='<|endoftext|>',
                additional_special_tokens=['<|im_start|>', '<img>', '</img>', '<IMG_CONTEXT>'],
                clean_up_tokenization_spaces=False, model_max_length=2048)
  (out / 'tokenizer_config.json').write_text(json.dumps(config, indent=2) + '\n')
  (out / 'chat_template.jinja').write_text(CHAT_TEMPLATE)


if __name__ == '__main__':
  # Defined here, so that programs with a flag of the same name may import this module
  flags.DEFINE(command_line.PathParser(), 'out', None, 'folder to write', required=True)
  with errors.at_the_terminal():
    app.run(lambda _: build(flags.FLAGS.out))
