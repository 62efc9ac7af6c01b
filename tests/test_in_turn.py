"""Models in turn: the images of a pipeline that holds all, one model in memory at a time, loaded matrix by matrix."""

import gc

import jax
import numpy as np
import pytest
from test_krea2 import LONG, mesh, theirs  # noqa: F401 (fixtures)

from unifusion_jax import command_line, pipeline, reading
from unifusion_jax.commands import sample
from unifusion_jax.data import imaging
from unifusion_jax.errors import UserError
from unifusion_jax.models import unifusion
from unifusion_jax.pipeline import UniFusionPipeline
from unifusion_jax.request import Request
from unifusion_jax.scenes import examples
from unifusion_jax.weights import encoders, lora_files, quantize, rules, safetensors_io

pytestmark = pytest.mark.slow

PROMPTS = [LONG, 'a star', 'a blue square']
INT8 = dict(quantized='int8', transformer_quantized='int8')


def shapes(model):
  return {leaf.shape for leaf in jax.tree.leaves(model) if leaf.ndim > 2 and leaf.shape[0] > 1}


@pytest.fixture
def lora(tmp_path):
  """A LoRA file for the small transformer: matrices of two layers, one of a single layer, one that is not stacked."""
  rng, tensors = np.random.default_rng(0), {}
  for module, inner, outer in (('transformer_blocks.0.attn.to_q', 64, 64), ('transformer_blocks.1.attn.to_q', 64, 64),
                               ('transformer_blocks.1.ff.down', 48, 64), ('txt_in.linear_2', 64, 64)):
    tensors[f'transformer.{module}.lora_A.weight'] = rng.standard_normal((2, inner), np.float32)
    tensors[f'transformer.{module}.lora_B.weight'] = rng.standard_normal((outer, 2), np.float32)
  safetensors_io.write(tmp_path / 'lora.safetensors', tensors)
  return f'{tmp_path / "lora.safetensors"}:0.5'


def test_the_images_are_the_same_and_one_model_is_there_at_a_time(theirs, monkeypatch, caplog):  # noqa: F811
  """Bit for bit, for the programs and their arguments are the same; a second load compiles nothing."""
  ask = dict(seed=3, height=64, width=64, steps=2, batch_size=2, negative_prompt='blurred')
  held = UniFusionPipeline.from_pretrained(theirs[1], **INT8)
  wanted, other = held(PROMPTS, **ask).arrays, held(PROMPTS[::-1], **ask).arrays
  vlm, model = shapes(held.vlm), shapes(held.model)
  vlm, model = vlm - model, model - vlm
  assert len(vlm) > 4 and len(model) > 4
  del held
  gc.collect()

  others, seen = jax.live_arrays(), []

  def note(*_):
    new = {x.shape for x in jax.live_arrays() if not x.is_deleted() and not any(x is other for other in others)}
    assert not (new & vlm and new & model)
    seen.append('vlm' if new & vlm else 'model' if new & model else '')
  read = reading.read
  monkeypatch.setattr(reading, 'read', lambda *args: (read(*args), note())[0])
  pipe = UniFusionPipeline.from_pretrained(theirs[1], in_turn=True, **INT8)
  note()
  for prompts, images in ((PROMPTS, wanted), (PROMPTS[::-1], other)):
    with jax.log_compiles(prompts is not PROMPTS):
      np.testing.assert_array_equal(pipe(prompts, **ask, callback=note).arrays, images)
  assert seen == ['', *(['vlm'] * 2 + ['model'] * 4) * 2]
  assert 'Compiling' not in caplog.text
  np.testing.assert_array_equal(pipe(PROMPTS[::-1], **ask, callback=note).arrays, other)
  assert seen[-5:] == ['model'] * 5  # what was read waits for other seeds


def test_each_phase_loads_what_it_needs(theirs, monkeypatch):  # noqa: F811
  monkeypatch.setattr(pipeline, 'AHEAD', 2)
  pipe = UniFusionPipeline.from_pretrained(theirs[1], in_turn=True, **INT8)
  ask = dict(height=64, width=64, steps=2, batch_size=1)
  images = pipe(PROMPTS, **ask).arrays  # the models take turns twice
  for seed, (prompt, image) in enumerate(zip(PROMPTS, images)):
    conditioning = pipe.encode([Request(prompt)]).conditioning
    latents = pipe.denoise(conditioning, pipe.noise([seed], 64, 64), pipe.times(64, 64, steps=2))
    np.testing.assert_array_equal(pipe.decode(latents)[0], image)


def test_written_texts_and_references_are_the_same():
  """The embedded models in float32, several batches."""
  edits = [e for e in (examples.example('edit', 'test', i) for i in range(40)) if e['target'].shape == (64, 64, 3)][:2]
  requests = [Request(e['instruction'], tuple(e['references']), i) for i, e in enumerate(edits)]
  held, in_turn = (UniFusionPipeline.from_pretrained('tiny', in_turn=in_turn) for in_turn in (False, True))
  settings = held.settings.changed(steps=1, guidance=1.0, batch_size=1, strengths=(2.0,))
  for (part, a), (_, b) in zip(held.batches(requests, 64, 64, settings=settings),
                               in_turn.batches(requests, 64, 64, settings=settings), strict=True):
    assert len(a) == len(b) == len(part)
    for one, two in zip(a, b):
      np.testing.assert_array_equal(one.image, two.image)
      assert (one.rewrite, one.warning, one.remark) == (two.rewrite, two.warning, two.remark)


def test_loras_are_merged_and_rounded_layer_by_layer(theirs, lora, monkeypatch):  # noqa: F811
  """As into the whole model, which is then rounded: that one is never there. In turn, also LoRAs that come later."""
  held = UniFusionPipeline.from_pretrained(theirs[1], loras=[lora], **INT8)
  whole = lora_files.load(unifusion.load(theirs[1] / 'transformer', held.model.config), [lora])
  wanted, size = quantize.quantize(whole), quantize.size(whole)
  pipe = UniFusionPipeline.from_pretrained(theirs[1], in_turn=True, **INT8)
  plain = pipe.model
  assert any((np.asarray(a) != b).any() for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(wanted)))
  pipe.add_loras([lora])
  assert pipe.origin == held.origin

  load, peak = unifusion.load, []
  total = lambda: sum(x.nbytes for x in jax.live_arrays() if not x.is_deleted())
  before = total()

  def watched(*args):
    *args, change = args

    def changed(*param):
      new = change(*param)
      peak.append(total() - before)
      return new
    return load(*args, changed)
  monkeypatch.setattr(unifusion, 'load', watched)
  for model in (held.model, pipe.model):
    jax.tree.map(np.testing.assert_array_equal, model, wanted)
  assert max(peak) < 1.2 * quantize.size(wanted) < 0.7 * size


def test_files_are_read_once_and_in_blocks(theirs, monkeypatch):  # noqa: F811
  """Each read is a part of one matrix, so the host never holds a file, nor a matrix that is larger than a block."""
  read, sizes = safetensors_io.Tensor.__getitem__, []

  def watched(tensor, index):
    part = read(tensor, index)
    sizes.append(part.nbytes)
    return part
  monkeypatch.setattr(safetensors_io.Tensor, '__getitem__', watched)
  monkeypatch.setattr(rules, 'BLOCK', 2 ** 12)
  pipe = UniFusionPipeline.from_pretrained(theirs[1], in_turn=True, **INT8)
  assert pipe.vlm and pipe.model
  files = sum(path.stat().st_size for path in theirs[1].rglob('*.safetensors'))
  assert max(sizes) <= 2 ** 13 and files / 2 < sum(sizes) < files  # of 3-D kernels of the autoencoder a part


def test_what_is_wrong_is_found_before_a_model_is_loaded(theirs, tmp_path, monkeypatch):  # noqa: F811
  for module in (encoders, unifusion):
    monkeypatch.setattr(module, 'load', lambda *args: pytest.fail('loaded'))
  UniFusionPipeline.from_pretrained(theirs[1], in_turn=True)
  safetensors_io.write(tmp_path / 'x.safetensors', {'x.lora_A.weight': np.ones((2, 2), np.float32)})
  for ways, message in ((dict(loras=[str(tmp_path)]), 'none of its 1 keys'),
                        (dict(transformer=str(tmp_path / 'x.safetensors')), 'missing: ')):
    with pytest.raises(UserError, match=message):
      UniFusionPipeline.from_pretrained(theirs[1], in_turn=True, **ways)


def test_the_scales_in_int8(theirs, tmp_path):  # noqa: F811
  """And a folder of the same pipeline, from the command line."""
  for scale in ('krea2_turbo', 'krea2_raw'):
    whole, config = (command_line.read(f'sample:{scale}{kind}') for kind in ('', '_int8'))
    assert (config.vlm_quantized, config.transformer_quantized, config.in_turn) == ('int8', 'int8', True)
    assert config.sample == whole.sample.changed(decode_tile=512) and config.sample.batch_size == 1
  config = command_line.read(f'sample:{theirs[1]}', [
      'dtype=float32', 'sample.prompt=a star\na circle', 'sample.width=64', 'sample.height=64', 'sample.steps=2',
      'in_turn=true', 'vlm_quantized=int8', 'transformer_quantized=int8'])
  assert config.sample.batch_size == 1
  sample.run(config, tmp_path)
  first, second = (imaging.read(tmp_path / 'images' / f'00{i}.png') for i in range(2))
  assert (first != second).any()
