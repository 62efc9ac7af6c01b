"""Image processors against the public ones of InternVL and Qwen3-VL: the same ids and the same numbers for an image."""

import json
import shutil

import jax
import numpy as np
from PIL import Image
import pytest
import transformers
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from unifusion_jax import config, sharding, verifi
from unifusion_jax.data import vision_inputs
from unifusion_jax.errors import BrokenRecord
from unifusion_jax.models import layers
from unifusion_jax.weights import encoders

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
  image_processor = vision_inputs.PackedPatches(vision_inputs.PixelLimits.from_json(settings), 4)
  chat = verifi.Chat(qwen, image_processor.image_tokens)
  for seed, sizes in enumerate(REQUESTS):
    shown, asked = images(sizes, seed), f'make all {seed} circles blue'
    marks = '<|vision_start|><|image_pad|><|vision_end|>' * len(shown)  # as the public template writes images
    text = tokenizer.apply_chat_template(
        [dict(role='system', content=verifi.SYSTEM['faithful']), dict(role='user', content=marks + asked)],
        tokenize=False, add_generation_prompt=True)
    theirs = processor(images=[Image.fromarray(p) for p in shown] or None, text=[text])['input_ids'][0]
    assert ids(chat, image_processor, shown, asked) == list(theirs), sizes


SIZES = [(64, 64), (20, 20), (33, 47), (100, 37), (37, 100), (31, 250), (300, 17), (224, 161), (97, 96), (480, 640),
         (1, 150), (513, 129), (16, 24)]


@pytest.mark.parametrize('limits', [(1024, 16384), (4096, 5000), (65536, 16777216)])
def test_patches_and_their_normalisation_are_the_public_ones(limits):
  """The patches are normalised on the device, channel by channel."""
  settings = dict(patch_size=16, merge_size=2, temporal_patch_size=2, image_mean=[0.5, 0.4, 0.3],
                  image_std=[0.5, 0.25, 0.5])
  theirs = Qwen2VLImageProcessorPil(size=dict(shortest_edge=limits[0], longest_edge=limits[1]), **settings)
  pixels = vision_inputs.PixelLimits.from_json(json.loads(theirs.to_json_string()))
  shown = images(SIZES, 0)
  wanted = theirs([Image.fromarray(image) for image in shown], return_tensors='np')
  cut = [pixels.patches(image) for image in shown]
  np.testing.assert_array_equal([(1, *grid) for _, grid in cut], wanted['image_grid_thw'])
  patches = np.concatenate([patches for patches, _ in cut])
  mean, std = (np.repeat(settings[name], 2 * 16 ** 2) for name in ('image_mean', 'image_std'))
  assert patches.dtype == np.uint8
  np.testing.assert_allclose(layers.normalise_pixels(patches, mean, std), wanted['pixel_values'], rtol=0, atol=1e-5)


def test_tiles_are_normalised_as_the_folder_says(recipe, tmp_path):
  """By the mean and std of its preprocessor_config.json, which the family's own are not."""
  settings = json.loads((config.ASSETS / 'vlm' / 'preprocessor_config.json').read_text())
  settings |= dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.25, 0.125])
  shutil.copytree(recipe().vlm, tmp_path / 'vlm')
  (tmp_path / 'vlm' / 'preprocessor_config.json').write_text(json.dumps(settings))
  kept = dict(dtype=np.float32, cache=str(tmp_path / 'kept'))
  tiles = np.stack(images([(64, 64)] * 8, 3))[:, None]
  processor = GotOcr2ImageProcessorPil(**settings)
  normalised = [processor(Image.fromarray(tile), return_tensors='np')['pixel_values'] for tile in tiles[:, 0]]
  normalised = np.stack(normalised).transpose(0, 1, 3, 4, 2).astype(np.float32)
  for vlm in (encoders.load(tmp_path / 'vlm', **kept), encoders.load(tmp_path / 'vlm', **kept)):  # read, and kept
    ours, theirs = (vlm.image_features(sharding.shard(x)) for x in (tiles, normalised))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
  assert encoders.config(tmp_path / 'vlm').vision == vlm.config.vision
  (tmp_path / 'vlm' / 'preprocessor_config.json').unlink()
  with pytest.raises(ValueError, match='no preprocessor_config.json that says how images are normalised'):
    vision_inputs.for_model(encoders.config(tmp_path / 'vlm'), 1, tmp_path / 'vlm')


def test_images_are_packed_one_after_another():
  processor = vision_inputs.PackedPatches(vision_inputs.PixelLimits(min_pixels=1024, max_pixels=4096), 1)
  shown = [np.full((64, 32, 3), 255, np.uint8), np.full((32, 32, 3), 9, np.uint8)]
  packed, counts = processor.preprocess(shown, 3)
  np.testing.assert_array_equal(packed.grids, [(4, 2), (2, 2), (0, 0)])
  np.testing.assert_array_equal(packed.patches[:, 0], [255] * 8 + [9] * 4 + [0] * 36)
  assert counts == (2, 1) and processor.max_tokens == 4
  few, _ = processor.preprocess(shown)
  assert len(few.patches) == 16 and few.grids.tolist() == [[4, 2], [2, 2]]
  empty, counts = processor.preprocess([], 3)
  assert not empty.grids.any() and counts == ()


@pytest.mark.parametrize('image', [(1, 201), (1, 199)])
def test_an_image_that_is_too_long_is_a_broken_record(image):
  """For ever, or for so few tokens; the run passes over it."""
  processor = vision_inputs.PackedPatches(vision_inputs.PixelLimits(min_pixels=1024, max_pixels=4096), 1)
  with pytest.raises(BrokenRecord, match='200 times|too long and narrow'):
    processor.preprocess([np.zeros((*image, 3), np.uint8)], 1)


def test_limits_are_read_under_both_names():
  public = dict(patch_size=16, merge_size=2, temporal_patch_size=2)
  for limits in (dict(min_pixels=1024, max_pixels=16384), dict(size=dict(shortest_edge=1024, longest_edge=16384))):
    assert vision_inputs.PixelLimits.from_json(public | limits) == vision_inputs.PixelLimits(1024, 16384)
  with pytest.raises(ValueError, match='shortest_edge'):
    vision_inputs.PixelLimits.from_json({'size': {'height': 3}})


@pytest.mark.parametrize('processor', [
    vision_inputs.TiledImages(64, 16, 1), vision_inputs.TiledImages(32, 4, 6),
    vision_inputs.PackedPatches(vision_inputs.PixelLimits(1024, 16384), 1), vision_inputs.NoImages()])
def test_specs_are_the_shapes_of_what_is_made(processor):
  for count in range(1 if isinstance(processor, vision_inputs.NoImages) else 4):
    made, counts = processor.preprocess(images([(64, 64), (30, 90), (90, 30)][:count], 0), count)
    if count:
      assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(lambda x: (x.shape, x.dtype),
                                                                              processor.spec(count))
      assert all(1 <= n <= processor.max_tokens for n in counts)
    else:
      assert made is None and counts == ()
