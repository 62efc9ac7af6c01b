"""The walk of optimised HLO: trips, operations, collectives and bytes of small programs whose numbers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unifusion_jax.planning import hlo, model_flops, work

F32 = 4


def struct(mesh, shape, *spec, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P(*spec)))


def compiled(function, *arguments) -> str:
  return jax.jit(function).lower(*arguments).compile().as_text()


def scanned(x, layers):
  return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0]


def test_products_of_a_scan_are_counted_by_its_trips(mesh):
  x, layers = struct(mesh, (4, 16)), struct(mesh, (7, 16, 16))
  assert work.of(compiled(scanned, x, layers), 8).flops == 7 * 2 * 4 * 16 * 16


def test_loops_within_loops(mesh):
  def nested(x, layers):
    return jax.lax.scan(lambda x, _: (scanned(x, layers), None), x, length=5)[0]
  text = compiled(nested, struct(mesh, (4, 16)), struct(mesh, (7, 16, 16)))
  assert work.of(text, 8).flops == 5 * 7 * 2 * 4 * 16 * 16
  assert 35 in hlo.Program(text).times.values()


def test_a_loop_that_ends_by_what_it_computes_counts_by_its_counter(mesh):
  def generate(x, w):
    def running(state):
      i, x = state
      return (i < 9) & jnp.any(x > 0)
    return jax.lax.while_loop(running, lambda state: (state[0] + 1, state[1] @ w), (jnp.int32(0), x))[1]
  text = compiled(generate, struct(mesh, (4, 16)), struct(mesh, (16, 16)))
  assert work.of(text, 8).flops == 9 * 2 * 4 * 16 * 16


def test_trips_without_a_known_count():
  """As TPUs print loops: the limit stands in the condition, the start in the caller, the stride in the body."""
  program = hlo.Program('''HloModule jit_f

%body (state: (s32[], f32[2])) -> (s32[], f32[2]) {
  %state = (s32[]{:T(128)}, f32[2]{0:T(128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %x = f32[2]{0:T(128)S(1)} get-tuple-element(%state), index=1
  ROOT %out = (s32[]{:T(128)}, f32[2]{0:T(128)S(1)}) tuple(%next, %x)
}

%condition (other: (s32[], f32[2])) -> pred[] {
  %other = (s32[]{:T(128)}, f32[2]{0:T(128)S(1)}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%other), index=0
  %limit = s32[]{:T(128)} constant(26)
  ROOT %less = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

ENTRY %main (a: f32[2]) -> (s32[], f32[2]) {
  %a = f32[2]{0:T(128)} parameter(0)
  %start = s32[]{:T(128)} constant(6)
  %tuple = (s32[]{:T(128)}, f32[2]{0:T(128)}) tuple(%start, %a)
  ROOT %loop = (s32[]{:T(128)}, /*index=1*/f32[2]{0:T(128)S(1)}) while(%tuple), condition=%condition, body=%body
}
''')
  assert program.times == {'body': 10, 'condition': 10, 'main': 1}


@pytest.mark.parametrize('padding', ['VALID', 'SAME'])
@pytest.mark.parametrize('stride', [1, 2])
def test_convolutions(mesh, stride, padding):
  """The multiplications that meet a pixel: a window over the edge costs less than a whole one."""
  x, kernel = struct(mesh, (2, 9, 12, 3)), struct(mesh, (3, 3, 3, 5))
  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding,
                                        dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  ones = convolve(np.ones((1, 9, 12, 1), np.float32), np.ones((3, 3, 1, 1), np.float32))
  assert work.of(compiled(convolve, x, kernel), 8).flops == 2 * float(ones.sum()) * 2 * 3 * 5


def test_collectives_by_kind_count_and_bytes(mesh):
  """Weights that are sharded over fsdp are gathered once a layer; what each of 2 devices sends is half of them."""
  x, layers = struct(mesh, (4, 64)), struct(mesh, (7, 64, 64), None, 'fsdp')
  def step(x, layers):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ jax.sharding.reshard(w, jax.P())), None), x, layers)[0]
  collectives = work.of(compiled(step, x, layers), 8).collectives
  (gather,) = [each for each in collectives if each.kind == 'all-gather']
  assert (gather.count, gather.bytes, gather.link_bytes) == (7, 64 * 64 * F32, 64 * 64 * F32 // 2)
  assert gather.source.startswith('test_hlo.py:')


def test_sums_over_devices(mesh):
  def total(x):
    return jax.sharding.reshard(jnp.sum(x, axis=0), jax.P())
  collectives = work.of(compiled(total, struct(mesh, (8, 64), ('data', 'fsdp'))), 8).collectives
  (reduce,) = [each for each in collectives if each.kind == 'all-reduce']
  assert (reduce.bytes, reduce.link_bytes) == (64 * F32, 2 * 3 * 64 * F32 // 4)


@pytest.mark.parametrize('groups, devices', [
    ('{{0,1,2,3},{4,5,6,7}}', 4), ('[2,4]<=[8]', 4), ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
    ("mesh['a'=2,'b'=1,'c'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}", 2), ('{}', 8)])
def test_groups_of_devices(groups, devices):
  text = f'''HloModule jit_f

ENTRY %main (a: f32[2,16]) -> f32[8,16] {{
  %a = f32[2,16]{{1,0:T(8,128)}} parameter(0)
  ROOT %gather = f32[8,16]{{1,0:T(8,128)}} all-gather(%a), channel_id=1, replica_groups={groups}, dimensions={{0}}
}}
'''
  (gather,) = work.of(text, 8).collectives
  assert gather.link_bytes == 8 * 16 * F32 * (devices - 1) // devices


def test_bytes_of_tiled_arrays():
  assert hlo.Array('f32', (2, 65, 100), '2,1,0:T(8,128)').bytes == 2 * 72 * 128 * F32
  assert hlo.Array('bf16', (3, 10), '0,1:T(8,128)(2,1)').bytes == 128 * 16 * 2
  assert hlo.Array('pred', (5,)).bytes == 5 and hlo.Array('s4', (6,)).bytes == 3 and hlo.Array('token', ()).bytes == 0
  assert hlo.Array('f32', (4,), '0:T(128)S(1)').space == 1


def test_updates_in_place_write_the_update_alone():
  text = '''HloModule jit_f

%fused (p0: f32[10,8,128], p1: f32[1,8,128], p2: s32[]) -> f32[10,8,128] {
  %p0 = f32[10,8,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = f32[1,8,128]{2,1,0:T(8,128)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %update = f32[10,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%p0, %p1, %p2, %zero, %zero)
}

ENTRY %main (a: f32[10,8,128], b: f32[1,8,128], i: s32[]) -> f32[10,8,128] {
  %a = f32[10,8,128]{2,1,0:T(8,128)} parameter(0)
  %b = f32[1,8,128]{2,1,0:T(8,128)} parameter(1)
  %i = s32[]{:T(128)S(6)} parameter(2)
  ROOT %out = f32[10,8,128]{2,1,0:T(8,128)} fusion(%a, %b, %i), kind=kLoop, calls=%fused
}
'''
  assert work.of(text, 1).hbm_bytes == 2 * 8 * 128 * F32


def test_attention_kernels_are_counted_from_their_shapes():
  text = '''HloModule jit_f

ENTRY %main (q: bf16[1,4,512,128], k: bf16[1,2,256,128], v: bf16[1,2,256,128]) -> bf16[1,4,512,128] {
  %q = bf16[1,4,512,128]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[1,2,256,128]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %v = bf16[1,2,256,128]{3,2,1,0:T(8,128)(2,1)} parameter(2)
  ROOT %o = bf16[1,4,512,128]{3,2,1,0:T(8,128)(2,1)} custom-call(%q, %k, %v), custom_call_target="tpu_custom_call", META
}
'''.replace('META', 'metadata={op_name="jit(f)/splash_mha_fwd_segmented_residuals"}')
  done = work.of(text, 1)
  assert done.flops == done.attention == 2 * 2 * 4 * 512 * 256 * 128


def loss(params, frozen, x):
  """A frozen product, a trained one, and a layer under remat."""
  hidden = jax.lax.stop_gradient(x @ frozen)
  return jnp.sum(jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), hidden, params)[0])


def test_model_operations_of_a_gradient_leave_remat_out(mesh):
  params, frozen, x = (struct(mesh, shape) for shape in ((7, 16, 16), (8, 16), (4, 8)))
  flops = model_flops.count(loss, params, frozen, x, trained=1)
  layer = 2 * 4 * 16 * 16
  # In a scan every layer has the gradient of its input, the first one too
  assert vars(flops) == dict(forward=7 * layer, backward=2 * 7 * layer, frozen=2 * 4 * 8 * 16)
  done = work.of(compiled(jax.grad(loss), params, frozen, x), 8)
  assert done.flops == flops.total + 7 * layer


def test_largest_arrays_of_a_traced_program(mesh):
  x, layers = struct(mesh, (4, 16), 'data'), struct(mesh, (7, 16, 16))
  jaxpr = jax.make_jaxpr(jax.grad(lambda x, layers: jnp.sum(scanned(x, layers))))(x, layers)
  largest = model_flops.largest(jaxpr.jaxpr)
  assert (largest[0].shape, largest[0].bytes) == ('float32[7,2,16]', 7 * 2 * 16 * F32)
  assert 'test_hlo.py:' in largest[0].source


def test_a_kernel_whose_attributes_are_on_several_lines_ends_no_computation():
  program = hlo.Program('''HloModule jit_f

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  %kernel = f32[2]{0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block": "{\\"q\\": 512}"
}}, metadata={op_name="kernel" source_file="a.py" source_line=3}
  ROOT %y = f32[2]{0} negate(%kernel)
}
''')
  assert list(program.computations['main']) == ['x', 'kernel', 'y']
  assert program.source(program.computations['main']['kernel']) == 'a.py:3'


@pytest.mark.parametrize('stack, source', [
    ([('unifusion_jax/models/layers.py', 3), ('unifusion_jax/models/dit.py', 9)],
     'models/layers.py:3 < models/dit.py:9'),
    ([(str(hlo.PACKAGE / 'models' / 'dit.py'), 9), ('a/main.py', 1)], 'models/dit.py:9'),
    ([('a/run.py', 1)], 'run.py:1')])
def test_sources_are_lines_of_this_package(stack, source):
  """Given whole, or from the package on, as commands have them in their programs."""
  assert hlo.places(stack) == source
