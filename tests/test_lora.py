"""LoRA: the leaf type against dense weights, files of each naming against deltas by hand and against diffusers."""

import dataclasses
import json

from flax import nnx
import jax
import numpy as np
import optax
import pytest
from test_dit import build, CONFIG, example, krea, krea_velocity, loss, put, velocity  # noqa: F401 (a fixture)

from unifusion_jax import sharding
from unifusion_jax.errors import UserError
from unifusion_jax.models import unifusion
from unifusion_jax.weights import convert, lora, lora_files, quantize, safetensors_io

# Matrices of every kind of pattern: reordered and plain heads, heads contracted, hidden units, slots, one of no output
MODULES = {'transformer_blocks.0.attn.to_q': 'blocks.0.attn.wq', 'transformer_blocks.1.attn.to_k': 'blocks.1.attn.wk',
           'transformer_blocks.1.attn.to_v': 'blocks.1.attn.wv',
           'transformer_blocks.0.attn.to_out.0': 'blocks.0.attn.wo',
           'transformer_blocks.1.attn.to_gate': 'blocks.1.attn.gate',
           'transformer_blocks.0.ff.gate': 'blocks.0.mlp.gate',
           'transformer_blocks.0.ff.down': 'blocks.0.mlp.down', 'time_mod_proj': 'tproj.1', 'img_in': 'first',
           'time_embed.linear_1': 'tmlp.0', 'time_embed.linear_2': 'tmlp.2', 'final_layer.linear': 'last.linear',
           'txt_in.linear_1': 'txtmlp.1', 'txt_in.linear_2': 'txtmlp.3', 'text_fusion.projector': 'txtfusion.projector',
           'text_fusion.layerwise_blocks.1.attn.to_q': 'txtfusion.layerwise_blocks.1.attn.wq',
           'text_fusion.refiner_blocks.0.ff.up': 'txtfusion.refiner_blocks.0.mlp.up'}
RANK = 3


@pytest.fixture(scope='module')
def torch_weights():
  """{torch name: matrix} of the model of `build`."""
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tp=2))):
    return torch_layout(build())


def shapes():
  return jax.eval_shape(lambda: unifusion.UniFusion(CONFIG, rngs=nnx.Rngs(0)))


def torch_layout(model) -> dict[str, np.ndarray]:
  return dict(convert.export(model, unifusion.RULES, unifusion.AXIS_SIZES))


def factors(weights, seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """{diffusers' module: (A [rank in], B [out rank])}."""
  rng = np.random.default_rng(seed)
  sizes = {module: weights[f'{module}.weight'].shape for module in MODULES}
  return {module: (rng.standard_normal((RANK, inner), np.float32) * inner ** -0.5,
                   rng.standard_normal((outer, RANK), np.float32) * 0.3) for module, (outer, inner) in sizes.items()}


def written(folder, naming: str, parts):
  """(file in that naming, scale of its products)."""
  path, tensors, head, scale = folder / 'lora.safetensors', {}, None, 1.0
  for module, (a, b) in parts.items():
    native = MODULES[module]
    match naming:
      case 'diffusers':
        tensors |= {f'transformer.{module}.lora_A.weight': a, f'transformer.{module}.lora_B.weight': b}
      case 'native' | 'PEFT':
        prefix = 'diffusion_model.' if naming == 'native' else 'base_model.model.'
        tensors |= {f'{prefix}{native}.lora_A.weight': a, f'{prefix}{native}.lora_B.weight': b}
      case 'kohya':
        name = f'lora_unet_{native.replace(".", "_")}'
        tensors |= {f'{name}.lora_down.weight': a, f'{name}.lora_up.weight': b, f'{name}.alpha': np.float32(6.0)}
        scale = 2.0
  if naming == 'diffusers':
    facts = dict(r=RANK, lora_alpha=1.5, target_modules=list(parts))
    facts = json.dumps({f'transformer.{name}': value for name, value in facts.items()})
    head, scale = {'lora_adapter_metadata': facts}, 0.5
  if naming == 'PEFT':
    path, scale = folder / 'adapter_model.safetensors', 4.0
    (folder / 'adapter_config.json').write_text(json.dumps(dict(r=RANK, lora_alpha=12)))
  safetensors_io.write(path, tensors, head)
  return path, scale


@pytest.mark.parametrize('naming', ['diffusers', 'native', 'PEFT', 'kohya'])
def test_each_naming_gives_the_delta_by_hand(naming, torch_weights, tmp_path, capsys):
  parts = factors(torch_weights)
  path, scale = written(tmp_path, naming, parts)
  merged = torch_layout(lora_files.load(build(), [f'{path}:0.5']))
  keys = len(parts) * (3 if naming == 'kohya' else 2)
  assert f'all {keys} keys match, for {len(parts)} of 56 matrices, rank 3' in capsys.readouterr().out
  for name, weight in torch_weights.items():
    a, b = parts.get(name.removesuffix('.weight'), (None, None))
    delta = 0.0 if a is None else 0.5 * scale * (b @ a)
    np.testing.assert_allclose(merged[name], weight + delta, atol=1e-5, err_msg=name)


def test_merged_live_and_over_int8_are_one_model(torch_weights, tmp_path):
  """Two files at once, of which each has some of the layers, and scales."""
  path, _ = written(tmp_path, 'kohya', factors(torch_weights))
  path.rename(tmp_path / 'kohya.safetensors')
  other, _ = written(tmp_path, 'diffusers', dict(list(factors(torch_weights, 1).items())[2:]))
  texts = [f'{tmp_path / "kohya.safetensors"}:0.5', str(other)]
  hidden, mask, z, _, t = put(*example())
  base = velocity(build(), hidden, mask, z, t)
  merged = velocity(lora_files.load(build(), texts), hidden, mask, z, t)
  live = velocity(lora_files.load(build(), texts, live=True), hidden, mask, z, t)
  assert np.abs(merged - base).max() > 0.1
  np.testing.assert_allclose(live, merged, atol=1e-4)
  rounded = velocity(lora_files.load(quantize.quantize(build()), texts), hidden, mask, z, t)
  assert np.abs(rounded - merged).mean() < 0.1 * np.abs(merged - base).mean()


def test_lokr_is_a_kronecker_product(torch_weights, tmp_path):
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape, np.float32) * 0.3
  q, up = 'transformer_blocks.0.attn.to_q', 'transformer_blocks.1.ff.up'
  tensors = {'lycoris_blocks_0_attn_wq.lokr_w1': normal(4, 4), 'lycoris_blocks_0_attn_wq.lokr_w2_a': normal(16, 2),
             'lycoris_blocks_0_attn_wq.lokr_w2_b': normal(2, 16), 'lycoris_blocks_0_attn_wq.alpha': np.float32(1),
             **{f'diffusion_model.blocks.1.mlp.up.{name}': x for name, x in dict(
                 lokr_w1=normal(6, 8), lokr_w2=normal(8, 8), alpha=np.float32(1e10)).items()}}
  safetensors_io.write(tmp_path / 'lokr.safetensors', tensors)
  merged = torch_layout(lora_files.load(build(), [str(tmp_path)], live=True))
  w1, a, b, _, v1, v2, _ = tensors.values()
  for name, delta in ((q, 0.5 * np.kron(w1, a @ b)), (up, np.kron(v1, v2))):
    np.testing.assert_allclose(merged[f'{name}.weight'], torch_weights[f'{name}.weight'] + delta, atol=1e-5)
  with pytest.raises(UserError, match='LoKr cannot lie beside weights in int8'):
    lora_files.load(quantize.quantize(build()), [str(tmp_path)])


def test_files_that_do_not_fit_say_why(torch_weights, tmp_path):
  path, _ = written(tmp_path, 'native', factors(torch_weights))
  tensors = {name: np.array(tensor[...]) for name, tensor in safetensors_io.read(path).items()}
  model = shapes()

  def refused(text, **changes):
    safetensors_io.write(path, {name.replace('__', '.'): x for name, x in changes.items() if x is not None})
    with pytest.raises(UserError, match=text):
      lora_files.read(path, model)

  part = {name.replace('.', '__'): x for name, x in tensors.items()}
  first = next(name for name in part if name.endswith('lora_A__weight'))
  refused('none of its 1 keys is of this model: it has unet.x.lora_A.weight; wanted are keys such as transformer.'
          r'[a-z_0-9.]*lora_A.weight \(diffusers\) or diffusion_model.[a-z_0-9.]*lora_A.weight \(native\)',
          unet__x__lora_A__weight=np.ones((2, 2), np.float32))
  refused('only 34 of its 36 keys are of this model; the first of the others are .*blocks.7.attn.wq.lora_A.weight',
          **part, diffusion_model__blocks__7__attn__wq__lora_A__weight=np.ones((2, 2), np.float32),
          diffusion_model__blocks__0__attn__wq__dora_scale=np.ones(2, np.float32))
  refused('do not make its matrix', **part | {first: np.ones((3, 5), np.float32)})
  refused('of its factors there are only b', **part | {first: None})
  with pytest.raises(UserError, match='no such folder or file'):
    lora_files.read(tmp_path / 'no.safetensors', model)
  assert lora_files.split('a/b.safetensors:0.8') == ('a/b.safetensors', 0.8)
  assert lora_files.split('gs://a/b') == ('gs://a/b', 1.0)


@pytest.mark.parametrize('naming', ['diffusers', 'native'])
def test_diffusers_gives_the_same_velocity(naming, krea, tmp_path):  # noqa: F811
  pytest.importorskip('peft')
  from diffusers.loaders.lora_pipeline import Krea2LoraLoaderMixin
  theirs, folder = krea
  ours = unifusion.load(folder, dataclasses.replace(unifusion.read_config(folder), dtype='float32'))
  weights = {f'{name}.weight': theirs.get_submodule(name).weight for name in MODULES}
  path, _ = written(tmp_path, naming, factors(weights))
  state, head = Krea2LoraLoaderMixin.lora_state_dict(str(path), return_lora_metadata=True)
  arrays = example()
  before = krea_velocity(theirs, *(arrays[i] for i in (0, 1, 2, 4)))
  try:
    theirs.load_lora_adapter(state, prefix='transformer', metadata=head)
    wanted = krea_velocity(theirs, *(arrays[i] for i in (0, 1, 2, 4)))
  finally:
    theirs.unload_lora()
  hidden, mask, z, _, t = put(*arrays)
  for live in (False, True):
    got = velocity(lora_files.load(ours, [str(path)], live), hidden, mask, z, t)
    np.testing.assert_allclose(got, wanted, atol=1e-4)
  assert np.abs(wanted - before).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize('base', ['bfloat16', 'int8'])
def test_adapters_alone_are_trained(base):
  """From no change at all; one step changes the output, and the loss falls."""
  config = lora.LoRAConfig(rank=4, alpha=8.0, dropout=0.1, targets=('attention', 'mlp', 'refiner', 'lap/w1'))
  model = quantize.quantize(build()) if base == 'int8' else jax.tree.map(lambda x: x.astype(base), build())
  hidden, mask, z, noise, t = put(*example())
  adapters = jax.jit(lambda: lora.init(shapes(), config, 0))()
  assert len(adapters) == 8 + 8 + 1
  joined = jax.jit(lambda adapters, model: velocity(lora.join(model, adapters, config), hidden, mask, z, t))
  start = joined(adapters, model)
  np.testing.assert_allclose(start, velocity(model, hidden, mask, z, t), atol=1e-5)
  tx = optax.adam(3e-3)

  @jax.jit
  def update(adapters, moments, model, key):
    value, gradients = jax.value_and_grad(
        lambda adapters: loss(lora.join(model, adapters, config, key), hidden, mask, z, noise, t))(adapters)
    updates, moments = tx.update(gradients, moments, adapters)
    return optax.apply_updates(adapters, updates), moments, value

  moments, losses = tx.init(adapters), []
  for i in range(12):
    adapters, moments, value = update(adapters, moments, model, jax.random.key(i))
    losses.append(float(value))
    if i == 0:
      assert np.abs(joined(adapters, model) - start).max() > 1e-4
  assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
def test_gradients_are_those_of_the_dense_weights():
  """On a mesh of 2 x 2 x 2: d loss / d B is A^T times the gradient of the merged matrix."""
  config = lora.LoRAConfig(rank=2, alpha=4.0, targets=('dit/blocks/attn/w[qo]',))
  arrays = put(*example())
  adapters = jax.jit(lambda: lora.init(shapes(), config, 0))()
  dense = jax.jit(jax.grad(loss))(build(), *arrays)
  thin = jax.jit(jax.grad(lambda adapters, model: loss(lora.join(model, adapters, config), *arrays)))(adapters, build())
  for name, pattern in (('wq', 'ldj,ldhk->ljhk'), ('wo', 'lhkj,lhkd->ljd')):
    path, full = f'dit/blocks/attn/{name}', np.asarray(getattr(dense.dit.blocks.attn, name)[...])
    np.testing.assert_allclose(np.asarray(thin[path].b[...]),
                               2 * np.einsum(pattern, np.asarray(adapters[path].a[...]), full), atol=1e-5)
    assert not np.asarray(thin[path].a[...]).any()  # B is zero


def test_targets_that_match_nothing_are_named():
  with pytest.raises(UserError, match="lora.targets: 'dit/blocks/attn/wz' is no matrix of this model: take attention"):
    lora.init(shapes(), lora.LoRAConfig(rank=2, targets=('attention', 'dit/blocks/attn/wz')), 0)
  wrong = lora.LoRAConfig(rank=-1, dropout=1.0, quantized='w8a8', targets=('(',)).problems('objective.lora.')
  assert len(wrong) == 4 and all(text.startswith('objective.lora.') for text in wrong)
