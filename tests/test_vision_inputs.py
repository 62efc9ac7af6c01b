"""Whole prompts with images against the public processors of InternVL and Qwen3-VL: the same ids for the same request."""

import json

import numpy as np
from PIL import Image
import pytest
import transformers
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from unifusion_jax import config, verifi
from unifusion_jax.data import qwen_patches, vision_inputs

# (height, width) of the images of one request
REQUESTS = [(), ((64, 64),), ((448, 448),), ((100, 37), (37, 100)), ((31, 250),), ((300, 40), (64, 64), (161, 224)),
            ((97, 96), (480, 640)), ((513, 129),), ((20, 20), (150, 1000), (33, 47))]


def without_video(processor):
  """The class, made without a processor of videos, which would want torchvision."""
  class Made(processor):
    def check_argument_for_proper_class(self, name, argument):
      return type(argument)
  return Made


def images(sizes, seed):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def ids(chat, image_processor, shown, instruction):
  """Ours: of a system prompt, the images and an instruction, ready for the answer."""
  spans = chat.spans(instruction, image_processor.preprocess(shown)[1], None, 'faithful')
  return [token for span in spans for token in span.ids]


@pytest.mark.parametrize('most', [1, 4, 12])
def test_internvl(most):
  folder = str(config.ASSETS / 'vlm')
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  for name, token in (('start_image_token', '<img>'), ('end_image_token', '</img>'),
                      ('context_image_token', '<IMG_CONTEXT>'), ('video_token', '<video>')):
    setattr(tokenizer, name, token)
    setattr(tokenizer, f'{name}_id', tokenizer.convert_tokens_to_ids(token))
  processor = without_video(InternVLProcessor)(
      GotOcr2ImageProcessorPil(size=dict(height=448, width=448), crop_to_patches=True, min_patches=1, max_patches=most),
      tokenizer, None, image_seq_length=256, chat_template=tokenizer.chat_template)
  chat, image_processor = verifi.Chat(folder), vision_inputs.TiledImages(448, 256, most)
  for seed, sizes in enumerate(REQUESTS):
    shown, asked = images(sizes, seed), f'make all {seed} circles blue'
    message = [dict(role='system', content=verifi.SYSTEM['faithful']), dict(role='user', content=[
        *[dict(type='image')] * len(shown), dict(type='text', text=asked)])]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    theirs = processor(images=[Image.fromarray(p) for p in shown] or None, text=text)['input_ids'][0]
    assert ids(chat, image_processor, shown, asked) == list(theirs), sizes


def test_qwen3_vl(qwen):
  tokenizer = transformers.AutoTokenizer.from_pretrained(qwen)
  settings = json.loads((qwen / 'preprocessor_config.json').read_text())
  processor = without_video(Qwen3VLProcessor)(Qwen2VLImageProcessorPil(**settings), tokenizer)
  image_processor = vision_inputs.PackedPatches(qwen_patches.PixelConfig.from_json(settings), 4)
  chat = verifi.Chat(qwen, image_processor.image_tokens)
  for seed, sizes in enumerate(REQUESTS):
    shown, asked = images(sizes, seed), f'make all {seed} circles blue'
    marks = '<|vision_start|><|image_pad|><|vision_end|>' * len(shown)  # as the public template writes images
    text = tokenizer.apply_chat_template(
        [dict(role='system', content=verifi.SYSTEM['faithful']), dict(role='user', content=marks + asked)],
        tokenize=False, add_generation_prompt=True)
    theirs = processor(images=[Image.fromarray(p) for p in shown] or None, text=[text])['input_ids'][0]
    assert ids(chat, image_processor, shown, asked) == list(theirs), sizes
