"""A run that trains adapters: what is saved, resumed, refused, sampled and exported."""

import copy
import dataclasses
import json

from flax import nnx
import jax
import numpy as np
import pytest
from test_dit import example, krea_velocity, put, velocity

from unifusion_jax.commands import export, train
from unifusion_jax.errors import UserError
from unifusion_jax.models import unifusion
from unifusion_jax.objectives.flow_matching import FlowMatching
from unifusion_jax.training import checkpoint, record
from unifusion_jax.weights import lora_files, safetensors_io
from unifusion_jax.weights.lora import LoRAConfig

pytestmark = pytest.mark.slow


@pytest.fixture
def adapted(recipe, tmp_path):
  """A recipe that trains adapters of a random model, which lies in a folder named turbo."""
  made = recipe(objective=FlowMatching(lora=LoRAConfig(rank=2, alpha=3.0, dropout=0.1, targets=('attention', 'lap'))))
  made.data = dataclasses.replace(made.data)
  made.train = dataclasses.replace(made.train, steps=2, save_every=1, preview_every=0)
  model = jax.tree.map(lambda x: x + 0.02, jax.jit(lambda: unifusion.UniFusion(made.model, rngs=nnx.Rngs(5)))())
  unifusion.save(model, tmp_path / 'turbo')
  return dataclasses.replace(made, init=str(tmp_path / 'turbo'))


def leaves(state):
  return [np.asarray(x) for x in jax.tree.leaves(state)]


def test_a_run_from_start_to_export(adapted, mesh, tmp_path, caplog, capsys):
  """Resumed bit for bit; adapters alone in the state; the export is what it sampled with, in diffusers too."""
  fresh = lambda: copy.deepcopy(adapted)
  whole = train.run(fresh(), tmp_path / 'whole')
  assert caplog.text.count('is distilled to few steps') == 1
  train.run(fresh(), tmp_path / 'run', stop_at=1)
  state = train.run(fresh(), tmp_path / 'run')
  for a, b in zip(leaves(whole), leaves(state), strict=True):
    np.testing.assert_array_equal(a, b)
  assert {path for path in state.params} == {
      *(f'dit/blocks/attn/{name}' for name in ('wq', 'wk', 'wv', 'wo', 'gate')), 'lap/w1', 'lap/w2',
      *(f'lap/blocks/attn/{name}' for name in ('wq', 'wk', 'wv', 'wo', 'gate')),
      *(f'lap/blocks/mlp/{name}' for name in ('gate', 'up', 'down'))}
  assert len(jax.tree.leaves(state.params)) == 2 * len(state.params)

  frozen = adapted.objective.frozen(adapted)
  params, origin = checkpoint.trained(fresh(), tmp_path / 'run')
  assert origin.endswith('at step 2')
  with_run = adapted.objective.pipeline(adapted, params, frozen)
  target = dict(target=np.zeros((64, 64, 3), np.uint8))
  latents = with_run.noise([0] * 8, *target['target'].shape[:2])
  conditioning = with_run.null()
  spread = jax.tree.map(lambda x: jax.device_put(np.repeat(np.asarray(x), 8, 0), jax.P(('data', 'fsdp'))), conditioning)
  times = with_run.times(64, 64, steps=1)
  sampled = lambda pipe: np.asarray(pipe.denoise(spread, latents, times, guidance=1.0))
  export.run(fresh(), tmp_path / 'run')
  file = tmp_path / 'run' / 'export' / lora_files.FILE
  none, _ = checkpoint.trained(fresh(), tmp_path / 'nothing')  # the base as it is
  base = adapted.objective.pipeline(adapted, none, frozen)
  before = sampled(base)
  assert np.abs(sampled(with_run) - before).max() > 1e-4
  base.add_loras([str(file)])
  assert '30 keys match' in capsys.readouterr().out and base.origin['loras'] == [str(file)]
  np.testing.assert_allclose(sampled(base), sampled(with_run), atol=1e-5)
  again = dataclasses.replace(fresh(), sample=dataclasses.replace(adapted.sample, weights=str(file.parent)))
  back, _ = checkpoint.trained(again, tmp_path / 'nothing')
  for a, b in zip(leaves(state.ema), leaves(back), strict=True):
    np.testing.assert_array_equal(a, b)
  head = json.loads(safetensors_io.metadata(file)['lora_adapter_metadata'])
  assert head['transformer.lora_alpha'] == 3 and head['transformer.r'] == 2

  peft, diffusers = pytest.importorskip('peft'), pytest.importorskip('diffusers')
  theirs = diffusers.Krea2Transformer2DModel.from_pretrained(tmp_path / 'turbo')
  diffusers.Krea2Pipeline(None, None, None, None, theirs).load_lora_weights(str(file.parent), weight_name=file.name)
  layers = [layer for layer in theirs.modules() if isinstance(layer, peft.tuners.lora.Linear)]
  assert len(layers) == 15 and {layer.scaling['default_0'] for layer in layers} == {1.5}
  written = np.asarray(safetensors_io.read(file)['transformer.txt_in.linear_1.lora_B.weight'][...])
  np.testing.assert_array_equal(theirs.txt_in.linear_1.lora_B['default_0'].weight.detach().numpy(), written)
  hidden, mask, z, _, t = example(taps=2)
  wanted = krea_velocity(theirs, hidden, mask, z, t, patch=1)
  ours = lora_files.load(unifusion.load(tmp_path / 'turbo', adapted.model), [str(file)])
  np.testing.assert_allclose(velocity(ours, *put(hidden, mask, z, t)), wanted, atol=1e-4)
  theirs.disable_adapters()
  assert np.abs(krea_velocity(theirs, hidden, mask, z, t, patch=1) - wanted).max() > 1e-3


@pytest.mark.parametrize('change, text', [
    (dict(rank=3), 'objective.lora.rank: 2 there, 3 now'), (dict(targets=('attention',)), 'objective.lora.targets'),
    (dict(alpha=1.0), 'objective.lora.alpha')])
def test_another_adapter_in_the_same_workdir_is_refused(change, text, adapted, tmp_path):
  record.claim(adapted, tmp_path / 'run')
  (tmp_path / 'run' / 'checkpoints' / '2').mkdir(parents=True)
  record.claim(adapted, tmp_path / 'run')
  other = copy.deepcopy(adapted)
  other.objective.lora = dataclasses.replace(other.objective.lora, **change)
  for check in (record.claim, record.check_same_model):
    with pytest.raises(UserError, match=text):
      check(other, tmp_path / 'run')


def test_another_base_is_refused_wherever_it_lies(adapted, tmp_path):
  record.claim(adapted, tmp_path / 'run')
  (tmp_path / 'run' / 'checkpoints' / '2').mkdir(parents=True)
  (tmp_path / 'turbo').rename(tmp_path / 'moved')
  moved = dataclasses.replace(adapted, init=str(tmp_path / 'moved'))
  record.claim(moved, tmp_path / 'run')
  path, = (tmp_path / 'moved').glob('*.safetensors')
  tensors = {name: np.array(tensor[...]) for name, tensor in safetensors_io.read(path).items()}
  safetensors_io.write(path, tensors | {'img_in.weight': tensors['img_in.weight'] + 1})
  for check in (record.claim, record.check_same_model):
    with pytest.raises(UserError, match='init: .*whose files are others'):
      check(moved, tmp_path / 'run')


def test_settings_that_cannot_work_are_named(adapted):
  adapted.objective.repa_weight, adapted.objective.repa_depth, adapted.init = 0.5, 1, None
  wrong = '\n'.join(adapted.problems(8))
  assert 'trains adapters of a model: name its folder or hub id (init=...)' in wrong
  assert 'REPA helps a model that is trained from the start' in wrong
