"""What a VLM says, through padding, batching over devices, quantising and keeping, is what the bare model says."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unifusion_jax import command_line, sharding, verifi
from unifusion_jax import config as configuration
from unifusion_jax.commands import describe
from unifusion_jax.data import imaging, vision_inputs
from unifusion_jax.models import causal_lm, decoder, t5, text_generation
from unifusion_jax.scenes import language, sources
from unifusion_jax.weights import encoders

WORDS = 12
TEXT = decoder.DecoderConfig(vocab=1040, width=32, depth=2, heads=2, kv_heads=2, head_dim=16, hidden=48,
                             max_positions=512)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
  """Paths of three images: 64 x 64, 96 x 48 and 200 x 31 pixels."""
  folder = tmp_path_factory.mktemp('images')
  for i, (x, y) in enumerate([(64, 64), (96, 48), (200, 31)]):
    noise = np.random.default_rng(i).integers(0, 256, (y, x, 3)).astype(np.uint8)
    imaging.write_png(folder / f'{i}.png', noise)
  return [str(folder / f'{i}.png') for i in range(3)]


def language_model(folder, kind='llama'):
  for name in ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'):
    shutil.copyfile(describe.EMBEDDED / name, folder / name)
  model_config = causal_lm.TextConfig(dataclasses.replace(TEXT, model_type=kind))
  causal_lm.save(causal_lm.TextModel(model_config, rngs=nnx.Rngs(4)), folder)
  return folder


def asked(folder, **changes):
  return describe.DescribeConfig(**dict(dict(vlm=str(folder), dtype='float32', max_tokens=WORDS), **changes))


def bare(folder, spans, tiles, stop_ids, **settings):
  """Ids from one device, one row and no padding."""
  ids = np.array([token for span in spans for token in span.ids], np.int32)[None]
  with jax.set_mesh(jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1])):
    vlm = encoders.load(folder, jnp.float32)
    images = jax.tree.map(lambda x: x[None], tiles)
    out = text_generation.generate(vlm, ids, np.ones(ids.shape, bool), images, max_new=WORDS,
                            stop_ids=stop_ids, **settings)
    return np.asarray(out.ids)[0, :int(out.lengths[0])]


@pytest.mark.slow
def test_says_what_the_model_says(recipe, images):
  """Three images, one of them cut into tiles."""
  folder = recipe().vlm
  chat = verifi.Chat(folder)
  cut = [imaging.tiles(imaging.read(path), 64, 4) for path in images]
  assert [len(each) for each in cut] == [1, 3, 5]
  pixels = json.loads((pathlib.Path(folder) / 'preprocessor_config.json').read_text())
  tiles = ((np.concatenate(cut) / 255 - pixels['image_mean']) / pixels['image_std']).astype(np.float32)
  spans = chat.spans('what changed?', (16, 48, 80), None, verifi.SYSTEM['answer'])
  wanted = chat.read(bare(folder, spans, tiles, chat.stop_ids))
  assert wanted
  assert describe.describe(asked(folder, image=','.join(images), prompt='what changed?')) == wanted


@pytest.mark.slow
def test_words_alone_and_sampling(recipe):
  folder = recipe().vlm
  chat = verifi.Chat(folder)
  wanted = chat.read(bare(folder, chat.spans('draw a circle', (), None, verifi.SYSTEM['rewrite']), None, chat.stop_ids))
  assert describe.describe(asked(folder, prompt='draw a circle')) == wanted
  drawn = [describe.describe(asked(folder, prompt='draw a circle', temperature=2.0, seed=seed)) for seed in (0, 0, 1)]
  assert drawn[0] == drawn[1] != drawn[2]
  most_probable = describe.describe(asked(folder, prompt='draw a circle', temperature=2.0, top_p=1e-6, seed=1))
  assert most_probable == wanted != drawn[2]


def test_another_system_prompt_is_read(recipe):
  folder = recipe().vlm
  chat = verifi.Chat(folder)
  spans = chat.spans('draw a circle', (), None, 'a small circle')
  assert describe.layout(chat, 'draw a circle', (), 'a small circle') == spans
  wanted = chat.read(bare(folder, spans, None, chat.stop_ids))
  assert describe.describe(asked(folder, prompt='draw a circle', system='a small circle')) == wanted


@pytest.mark.slow
def test_quantised_and_kept(recipe, tmp_path, images):
  """The second start, which reads what the first one kept, says the same."""
  settings = dict(image=images[0], prompt='describe', quantized='int8', cache=str(tmp_path / 'kept'),
                  dtype='bfloat16')
  first = describe.describe(asked(recipe().vlm, **settings))
  assert len(list((tmp_path / 'kept').iterdir())) == 1
  assert describe.describe(asked(recipe().vlm, **settings)) == first


@pytest.mark.slow
def test_qwen3_vl(qwen, images):
  chat = verifi.Chat(qwen, ('<|vision_start|>', '<|image_pad|>', '<|vision_end|>'))
  image_processor = vision_inputs.for_model(encoders.config(qwen), 4, qwen)
  packed, counts = image_processor.preprocess([imaging.read(path) for path in images[:2]])
  tiles = packed._replace(patches=((packed.patches / 255 - 0.5) / 0.5).astype(np.float32))
  spans = chat.spans('what changed?', counts, None, 'Look.')
  wanted = chat.read(bare(qwen, spans, tiles, chat.stop_ids))
  assert wanted
  assert describe.describe(asked(qwen, image=','.join(images[:2]), prompt='what changed?', system='Look.')) == wanted


def test_text_alone(tmp_path, images):
  folder = language_model(tmp_path)
  chat = verifi.Chat(folder)
  wanted = chat.read(bare(folder, chat.spans('hello', (), None, 'Be brief.'), None, chat.stop_ids))
  assert describe.describe(asked(folder, prompt='hello', system='Be brief.')) == wanted
  with pytest.raises(ValueError, match='reads text alone: leave the images out'):
    describe.describe(asked(folder, image=images[0]))


def test_default_system_prompt_is_the_templates(tmp_path):
  """A public template that brings a system prompt of its own keeps it; the embedded VLM has the one it learned."""
  folder = language_model(tmp_path)
  template = (folder / 'chat_template.jinja').read_text()
  default = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nKind.<|im_end|>\\n' }}{% endif %}"
  (folder / 'chat_template.jinja').write_text(default + template)
  chat = verifi.Chat(folder)
  embedded = [token for span in describe.layout(chat, 'hi', (), None) for token in span.ids]
  assert embedded == [t for span in chat.spans('hi', (), None, verifi.SYSTEM['rewrite']) for t in span.ids]
  tokenizer = json.loads((folder / 'tokenizer.json').read_text())
  (folder / 'tokenizer.json').write_text(json.dumps(tokenizer, indent=1))  # no longer the embedded one, byte for byte
  ids = [token for span in describe.layout(chat, 'hi', (), None) for token in span.ids]
  messages = [dict(role='user', content='hi')]
  assert ids == chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True,
                                                   return_dict=False)
  assert 'Kind.' in chat.tokenizer.decode(ids)


def test_stops_of_the_checkpoint_count(recipe, tmp_path):
  shutil.copytree(recipe().vlm, tmp_path, dirs_exist_ok=True)
  (own,) = verifi.Chat(tmp_path).stop_ids
  for given, wanted in ((7, (7,)), ([7, own, 9], (7, 9)), (None, ())):
    (tmp_path / 'generation_config.json').write_text(json.dumps(dict(eos_token_id=given)))
    chat = verifi.Chat(tmp_path)
    assert chat.stop_ids == (own, *wanted)
    assert chat.spans('a', (), 'b')[-1].ids == (own,)
    for stop in wanted:
      assert chat.read([*chat.text_ids('a ring'), stop, *chat.text_ids('a star')]) == 'a ring'


@pytest.mark.parametrize('changes,message', [
    (dict(), 'nothing to answer'), (dict(prompt='x', dtype='int4'), "dtype='int4' must be"),
    (dict(prompt='x', quantized='int4'), "quantized='int4' must be one of"),
    (dict(image='nowhere.png'), 'nowhere.png is not there'), (dict(prompt='x', max_tokens=0), 'max_tokens=0 must be'),
    (dict(prompt='a red circle ' * 400), 'more than the 512 positions')])
def test_errors(recipe, changes, message):
  with pytest.raises(ValueError, match=message):
    describe.describe(asked(recipe().vlm, **changes))


def test_what_writes_nothing_is_refused(tmp_path):
  t5.save(t5.T5Encoder(t5.T5Config(64, 16, 1, 2, 8, 16), rngs=nnx.Rngs(0)), tmp_path)
  with pytest.raises(ValueError, match='an encoder, which writes nothing'):
    describe.describe(asked(tmp_path, prompt='x'))


def test_a_folder_that_does_not_say_how_to_normalise(recipe, tmp_path, images):
  shutil.copytree(recipe().vlm, tmp_path / 'vlm')
  (tmp_path / 'vlm' / 'preprocessor_config.json').unlink()
  with pytest.raises(ValueError, match='no preprocessor_config.json'):
    describe.describe(asked(tmp_path / 'vlm', image=images[0]))


def test_command_line():
  settings = ['image=a b.png', 'system=Be kind.', 'temperature=0.5', 'quantized=int8', 'mesh.tp=2']
  assert command_line.read('describe', settings) == describe.DescribeConfig(
      image='a b.png', system='Be kind.', temperature=0.5, quantized='int8', mesh=sharding.MeshConfig(tp=2))


def test_embedded_vlm_describes_a_scene(tmp_path, capsys):
  """Out of the box: the defaults of configs/describe.py and an image."""
  record = sources.SceneSource('caption', 'test', 64)[0]
  imaging.write_png(tmp_path / 'x.png', record['references'][0])
  describe.run(describe.DescribeConfig(image=str(tmp_path / 'x.png'), max_tokens=64), tmp_path)
  said = capsys.readouterr().out.strip()
  assert language.parse(said) is not None, said
  assert describe.EMBEDDED == configuration.ASSETS / 'vlm'


def test_an_answer_that_was_cut_off_says_so(recipe, capsys):
  describe.describe(asked(recipe().vlm, prompt='a small red circle', max_tokens=2))
  assert 'cut off after 2 tokens' in capsys.readouterr().err


def test_prompts_of_any_length_share_a_program(recipe, images):
  """Up to a power of two: neither a longer prompt nor another number of tiles is compiled again."""
  folder = recipe().vlm
  describe.describe(asked(folder, image=','.join(images), prompt='what changed?'))
  compiled = text_generation._generate._cache_size()
  describe.describe(asked(folder, image=','.join(images), prompt='what changed in the second one?'))
  describe.describe(asked(folder, image=','.join(images[2:] * 2), prompt='what is different? ' * 4))
  assert text_generation._generate._cache_size() == compiled


@pytest.mark.slow
def test_nothing_here_needs_torch(images):
  """The command line in a process for which there is no torch."""
  code = '''
import importlib.abc, importlib.util, runpy, sys
hidden = ('torch', 'diffusers', 'accelerate')
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split('.')[0] in hidden else found(name, *rest)
class Hide(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path, target=None):
    if name.split('.')[0] in hidden:
      raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
sys.argv = ['main', '--config=configs/describe.py', '--config.image=' + sys.argv[1]]
runpy.run_module('unifusion_jax.main', run_name='__main__')
'''
  done = subprocess.run([sys.executable, '-c', code, images[0]], cwd=pathlib.Path(__file__).parent.parent, text=True,
                        capture_output=True)
  assert done.returncode == 0 and done.stdout.strip(), done.stderr
