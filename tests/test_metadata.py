"""Metadata of images in the form of other tools."""

import io
import json
import re

import numpy as np
from PIL import Image
import pytest

from unifusion_jax import metadata
from unifusion_jax.data import imaging
from unifusion_jax.request import SampleConfig

# A key with its value, by modules/infotext_utils.py of AUTOMATIC1111/stable-diffusion-webui at 0365002
PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def parsed(text: str) -> dict[str, str]:
  """What that file reads: stripped lines of the prompt, from 'Negative prompt:' on of the other, then values."""
  *lines, last = text.strip().split('\n')
  assert len(PARAMETER.findall(last)) >= 3  # else it takes the line for a prompt
  lines = [line.strip() for line in lines]
  start = next((i for i, line in enumerate(lines) if line.startswith('Negative prompt:')), len(lines))
  negative = '\n'.join(lines[start:]).removeprefix('Negative prompt:').strip()
  values = {key: json.loads(value) if re.fullmatch('".*"', value) else value for key, value in PARAMETER.findall(last)}
  return dict(Prompt='\n'.join(lines[:start]), Negative=negative) | values


def made(prompt: str, **changes) -> dict:
  """Metadata of an image."""
  model, settings = changes.pop('model', dict(name='my/model', fingerprint='0123456789abcdef')), SampleConfig(**changes)
  return dict(prompt=prompt, rewrite='w', warning='', remark='', seed=-7, references=[], origin=dict(model=model),
              settings=settings.settings() | dict(width=640, height=48))


@pytest.mark.parametrize('prompt', [
    'a fox', 'a fox, in snow: "quoted", (very:1.2), 50% \\ off', 'one\ntwo, three: 4\n\nfive', 'ein Fuchs im Café, ½',
    '雪の中の狐、「静か」\nлиса: снег, зима 🦊', 'Steps, Sampler, Seed'])
@pytest.mark.parametrize('negative', ['', 'blurry, "low": 1\nсветлый'])
def test_other_tools_read_it(prompt, negative):
  """From the file, where our own entries stay what they are."""
  of_image = made(prompt, negative_prompt=negative, guidance=4.5)
  data = imaging.png_bytes(np.zeros((48, 640, 3), np.uint8), metadata.as_text(of_image))
  text = Image.open(io.BytesIO(data)).text
  read = parsed(text.pop('parameters'))
  assert read.pop('Version').startswith('unifusion_jax ')
  assert read == {'Prompt': prompt, 'Negative': negative, 'Steps': '24', 'Sampler': 'Euler', 'CFG scale': '4.5',
                  'Seed': '-7', 'Size': '640x48', 'Model hash': '0123456789', 'Model': 'model'}
  assert {name: value if isinstance(of_image[name], str) else json.loads(value) for name, value in text.items()
          } == json.loads(json.dumps(of_image))


@pytest.mark.parametrize('model, name, digest', [
    (dict(name='krea/Krea-2-Turbo@0123456789abcdef'), 'Krea-2-Turbo', '0123456789'),
    (dict(name='runs/a@b/run, the "second": one/', fingerprint='fedcba9876543210'), 'run, the "second": one',
     'fedcba9876'), (dict(name='/x/raw.safetensors', fingerprint='00aa'), 'raw', '00aa'),
    (dict(name='"x"', fingerprint='00aa'), '"x"', '00aa')])
def test_any_name_of_a_model_is_read(model, name, digest):
  read = parsed(metadata.parameters(made('a', model=model, eta=0.5)))
  assert (read['Model'], read['Model hash'], read['Sampler'], read['Eta']) == (name, digest, 'Euler a', '0.5')


def test_weights_without_a_name_have_none():
  read = parsed(metadata.parameters(made('a', method='heun') | dict(origin={})))
  assert read['Sampler'] == 'Heun' and 'Model' not in read and 'Model hash' not in read


def test_one_encoding_for_latin_letters_as_other_tools_write_it():
  """Latin-1 in tEXt, of which old readers know no more; all else in UTF-8."""
  for prompt, chunk in (('café', b'tEXtparameters'), ('лиса', b'iTXtparameters')):
    assert chunk in imaging.png_bytes(np.zeros((8, 8, 3), np.uint8), metadata.as_text(made(prompt)))
