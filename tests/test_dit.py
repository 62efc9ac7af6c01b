"""The transformer and UniFusion: parity with Krea 2 in both directions, masks, sharding, and full sizes abstractly."""

import dataclasses
import json

from flax import nnx
import jax
from jax import P
import jax.numpy as jnp
import numpy as np
import pytest

from unifusion_jax import flow, sharding
from unifusion_jax.models import dit, layers, unifusion
from unifusion_jax.models.dit import DiTConfig
from unifusion_jax.models.lap import LAPConfig
from unifusion_jax.models.unifusion import UniFusion, UniFusionConfig
from unifusion_jax.sharding import BATCH
from unifusion_jax.weights import safetensors_io

CONFIG = UniFusionConfig(
    LAPConfig(width=32, taps=3, heads=4, kv_heads=2, mlp=48),
    DiTConfig(channels=4, depth=2, heads=4, kv_heads=2, head_dim=16, mlp=48, time_dim=16, rope_axes=(4, 6, 6)),
    dtype='float32')


def build(config=CONFIG) -> UniFusion:
  """A model whose every parameter is random, the same on any mesh."""
  rng = np.random.default_rng(0)
  def fill(x):
    fan_in = 64.0 if x.ndim > 2 else 100.0
    return jax.device_put(rng.standard_normal(x.shape, np.float32) * fan_in ** -0.5, x.sharding)
  return jax.tree.map(fill, sharding.abstract(jax.eval_shape(lambda: UniFusion(config, rngs=nnx.Rngs(0))),
                                              jax.sharding.get_mesh()))


def example(height=6, width=4, tokens=5, b=4, seed=0, taps=3):
  """(hidden, mask, z, noise, t) in numpy; the mask has full, partial and empty rows."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape, np.float32)
  mask = np.arange(tokens) < np.resize([tokens, 2, 1, tokens - 1], b)[:, None]
  return normal(b, tokens, taps, 32), mask, normal(b, height, width, 4), normal(b, height, width, 4), rng.random(
      b, np.float32)


def put(*arrays):
  return [jax.device_put(x, P(BATCH)) for x in arrays]


@jax.jit
def velocity(model, hidden, mask, z, t):
  return model.velocity(z, t, model.condition(hidden, mask), mask)


def loss(model, hidden, mask, z, noise, t):
  cond = model.condition(hidden, mask)
  return jnp.mean(flow.loss(model.velocity(flow.interpolate(z, noise, t), t, cond, mask), z, noise))


loss_and_gradient = jax.jit(jax.value_and_grad(loss))


@pytest.fixture(scope='module')
def krea(tmp_path_factory):
  """A small random Krea 2 of diffusers, and its folder as diffusers writes it."""
  torch = pytest.importorskip('torch')
  module = pytest.importorskip('diffusers.models.transformers.transformer_krea2')
  torch.manual_seed(0)
  fields = unifusion.to_json(CONFIG)
  model = module.Krea2Transformer2DModel(**{k: v for k, v in fields.items() if k not in ('_class_name', 'patch_size')})
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn(parameter.shape))
  folder = tmp_path_factory.mktemp('krea')
  model.eval().save_pretrained(folder)
  return model, folder


def krea_velocity(model, hidden, mask, z, t, patch=2):
  """What diffusers' model says for latents [b y x c], packed and unpacked as its pipeline does."""
  import torch
  b, height, width, c = z.shape
  rows, columns = height // patch, width // patch
  packed = torch.tensor(z).permute(0, 3, 1, 2).reshape(b, c, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
  positions = torch.zeros(hidden.shape[1] + rows * columns, 3)
  positions[hidden.shape[1]:, 1] = torch.arange(rows).repeat_interleave(columns)
  positions[hidden.shape[1]:, 2] = torch.arange(columns).repeat(rows)
  with torch.no_grad():
    v = model(packed.reshape(b, rows * columns, c * patch ** 2), torch.tensor(hidden), torch.tensor(t), positions,
              None if mask.all() else torch.tensor(mask)).sample
  v = v.reshape(b, rows, columns, c, patch, patch).permute(0, 3, 1, 4, 2, 5).reshape(b, c, height, width)
  return v.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize('height, width, tokens, masked', [(6, 4, 5, True), (4, 10, 9, True), (8, 8, 3, False)])
def test_same_velocity_as_krea2(krea, height, width, tokens, masked):
  theirs, folder = krea
  ours = unifusion.load(folder, CONFIG)
  hidden, mask, z, _, t = example(height, width, tokens)
  mask |= not masked
  v = velocity(ours, *put(hidden, mask, z, t))
  assert v.dtype == jnp.float32
  np.testing.assert_allclose(v, krea_velocity(theirs, hidden, mask, z, t), rtol=1e-4, atol=1e-4)


def test_saved_folder_loads_in_diffusers_and_here(krea, tmp_path):
  theirs, folder = krea
  model = build()
  unifusion.save(model, tmp_path)
  assert safetensors_io.read(tmp_path).keys() == safetensors_io.read(folder).keys()
  hidden, mask, z, _, t = example()
  v = velocity(model, *put(hidden, mask, z, t))
  there, report = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
  assert not report['missing_keys'] and not report['unexpected_keys']
  np.testing.assert_allclose(krea_velocity(there, hidden, mask, z, t), v, rtol=1e-4, atol=1e-4)
  again = unifusion.load(tmp_path, CONFIG)
  assert again.config == CONFIG
  jax.tree.map(np.testing.assert_array_equal, model, again)
  assert [jax.typeof(x) for x in jax.tree.leaves(model)] == [jax.typeof(x) for x in jax.tree.leaves(again)]


def test_a_checkpoint_of_another_size_is_refused(krea):
  _, folder = krea
  other = dataclasses.replace(CONFIG, dit=dataclasses.replace(CONFIG.dit, depth=4))
  with pytest.raises(ValueError, match='num_layers is 2, not 4'):
    unifusion.load(folder, other)
  with pytest.raises(ValueError, match='config.json does not exist'):
    unifusion.load(folder / 'transformer')


def test_config_json_round_trip():
  for config in (CONFIG, unifusion.base_8b()):
    fields = json.loads(json.dumps(unifusion.to_json(config)))
    assert unifusion.to_json(unifusion.from_json(fields)) == fields
  # Krea's own file does not have patch_size.
  assert unifusion.from_json({'_class_name': 'Krea2Transformer2DModel', 'in_channels': 64}).dit.channels == 16
  with pytest.raises(ValueError, match='guidance_embeds'):
    unifusion.from_json({'guidance_embeds': True})


@pytest.mark.parametrize('patch', [1, 2])
def test_patches_come_back(patch):
  z, = put(example()[2])
  x = dit.patchify(z, patch)
  assert x.shape == (4, 24 // patch ** 2, 4 * patch ** 2)
  np.testing.assert_array_equal(dit.unpatchify(x, patch, 6 // patch, 4 // patch), z)


def test_masked_tokens_change_nothing():
  hidden, mask, z, _, t = example()
  other = hidden.copy()
  other[~mask] = np.nan
  model = build()
  v = velocity(model, *put(hidden, mask, z, t))
  np.testing.assert_array_equal(v, velocity(model, *put(other, mask, z, t)))
  wider = np.pad(hidden, ((0, 0), (0, 2), (0, 0), (0, 0)), constant_values=3.0)
  np.testing.assert_allclose(velocity(model, *put(wider, np.pad(mask, ((0, 0), (0, 2))), z, t)), v,
                             rtol=1e-4, atol=1e-5)
  seen = hidden.copy()
  seen[:, 0] += 1.0
  assert (np.abs(velocity(model, *put(seen, mask, z, t)) - v).max((1, 2, 3)) > 1e-3).all()


def test_no_condition_at_all_is_that_of_the_image_alone():
  """Finite, and the same for any number of masked tokens."""
  hidden, mask, z, _, t = example()
  model = build()
  many, one = (velocity(model, *put(hidden[:, :n], mask[:, :n] & False, z, t)) for n in (5, 1))
  np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-5)
  assert np.isfinite(many).all() and np.abs(many).max() > 0.1


def test_training_starts_from_velocity_zero():
  hidden, mask, z, _, t = example()
  model = UniFusion(CONFIG, rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(velocity(model, *put(hidden, mask, z, t)), 0)


def test_one_device_remat_and_unrolling_give_the_same_loss_and_gradients(mesh, monkeypatch):
  expected, gradients = jax.device_get(loss_and_gradient(build(), *put(*example())))
  monkeypatch.setattr(layers, 'UNROLL', True)
  change = lambda c: dataclasses.replace(c, remat=True)
  config = dataclasses.replace(CONFIG, lap=change(CONFIG.lap), dit=change(CONFIG.dit))
  with jax.set_mesh(jax.make_mesh((1, 1, 1), sharding.AXES, devices=mesh.devices.flat[:1])):
    alone, alone_gradients = jax.device_get(loss_and_gradient(build(config), *put(*example())))
  np.testing.assert_allclose(alone, expected, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(alone_gradients), jax.tree.leaves(gradients)):
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)


def test_every_parameter_gets_a_finite_gradient_and_its_own_sharding():
  model = build()
  _, gradients = loss_and_gradient(model, *put(*example()))
  for (path, g), x in zip(jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(model)):
    name = jax.tree_util.keystr(path)
    assert jax.typeof(g) == jax.typeof(x), name
    rows = np.asarray(g).reshape(len(g), -1)
    assert np.isfinite(rows).all() and np.abs(rows).max(-1).min() > 0, name


def test_bf16_follows_f32_and_answers_in_f32():
  hidden, mask, z, _, t = example()
  exact = velocity(build(), *put(hidden, mask, z, t))
  half = velocity(build(dataclasses.replace(CONFIG, dtype='bfloat16')), *put(hidden, mask, z, t))
  assert half.dtype == jnp.float32
  assert np.linalg.norm(half - exact) < 0.05 * np.linalg.norm(exact)


def test_sizes_that_do_not_fit_are_refused():
  hidden, mask, z, _, t = example()
  model = build()
  with pytest.raises(ValueError, match='multiples of the patch 2'):
    velocity(model, *put(hidden, mask, z[:, :5], t))
  with pytest.raises(ValueError, match='add up to the head dim 16'):
    UniFusion(dataclasses.replace(CONFIG, dit=dataclasses.replace(CONFIG.dit, rope_axes=(4, 6, 8))), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='kv_heads must divide heads'):
    UniFusion(dataclasses.replace(CONFIG, dit=dataclasses.replace(CONFIG.dit, kv_heads=3)), rngs=nnx.Rngs(0))


@pytest.mark.parametrize('mesh', [None])  # instead of the eight devices
@pytest.mark.parametrize('make, dit_parameters, lap_parameters', [
    (unifusion.krea2, 12.423e9, 0.397e9), (unifusion.base_8b, 8.025e9, 0.924e9)])
def test_full_size_gradient_type_checks_on_256_chips(mesh, make, dit_parameters, lap_parameters):
  config = make()
  mesh = sharding.abstract_mesh(sharding.MeshConfig(data=1, fsdp=64, tp=4), 256)
  with jax.sharding.use_abstract_mesh(mesh):
    model = jax.eval_shape(lambda: UniFusion(config, rngs=nnx.Rngs(0)))
    count = lambda part: sum(x.size for x in jax.tree.leaves(part))
    np.testing.assert_allclose([count(model.dit), count(model.lap)], [dit_parameters, lap_parameters], rtol=2e-3)
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, P(BATCH)))
    z = array(jnp.float32, 256, 128, 128, 16)
    value, gradients = jax.eval_shape(
        jax.value_and_grad(loss), model, array(jnp.bfloat16, 256, 512, config.lap.taps, config.lap.width),
        array(bool, 256, 512), z, z, array(jnp.float32, 256))
  assert value.shape == () and value.dtype == jnp.float32
  for x, g in zip(jax.tree.leaves(model), jax.tree.leaves(gradients)):
    assert (x.shape, x.dtype) == (g.shape, g.dtype)
    if x.sharding is not None and g.sharding is not None:
      assert x.sharding.spec == g.sharding.spec
  # No chip holds a whole matrix of any size.
  chip = lambda x: np.prod(x.sharding.shard_shape(x.shape)) if x.sharding is not None else x.size
  assert sum(map(chip, jax.tree.leaves(model))) < 1.05 * (dit_parameters + lap_parameters) / 256
