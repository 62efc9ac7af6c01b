"""Plans of configs/sample.py: known sizes of Krea 2, lengths of prompts, what lies beside a program; a TPU compile."""

import json

import jax
import jax.numpy as jnp
import pytest

from unifusion_jax import command_line, sharding
from unifusion_jax.commands import plan
from unifusion_jax.errors import UserError
from unifusion_jax.pipeline import UniFusionPipeline
from unifusion_jax.planning import chips, memory, programs, resident
from unifusion_jax.sharding import MeshConfig

pytestmark = pytest.mark.slow

INT8 = ('vlm_quantized=int8', 'transformer_quantized=int8')


@pytest.fixture(autouse=True)
def mesh():
  """None in context, in place of the one of all tests: a plan makes its own."""


def sampling(scale: str = 'krea2_turbo', *changes: str):
  """A recipe of configs/sample.py."""
  return command_line.read(f'configs/sample.py:{scale}', changes)


def laid_out(config, name: str, **arguments):
  """(program, {part: bytes that it reads, does not read, and that lie beside it}) on one chip; nothing is compiled."""
  with jax.sharding.use_abstract_mesh(sharding.abstract_mesh(config.mesh, 1)):
    program = programs.of(name, config, **arguments)
    read, unread = memory.read(program.arguments, program.trace().jaxpr.jaxpr)
    return program, dict(read=read, unread=unread, beside=sharding.shard_bytes(program.beside))


def test_krea2_is_planned_by_its_known_sizes():
  """Nothing is downloaded; the models together are the same beside each program, and one of 16 GB has no room."""
  gib, config = 2 ** 30, sampling('krea2_turbo', *INT8)
  encode, *_, decode = laid = [laid_out(config, name) for name in programs.default(config)]
  assert [program.name for program, _ in laid] == ['encode', 'denoise', 'decode']
  held = [sum(parts.values()) / gib for _, parts in laid]
  assert max(held) - min(held) < 0.1 and 16.7 < min(held) < 17.0 and min(held) > chips.topology('v5e:1x1').usable / gib
  _, parts = decode
  assert parts['read'] < 0.1 * gib < parts['beside']
  assert 4.0 < encode[1]['read'] / gib < 5.0  # the VLM and LAP
  assert memory.largest_layer(encode[0].weights) > 4 * 10 ** 8  # matrices in int8 too
  assert memory.largest_tensor(encode[0].weights) == ('decoder.embedding', 2 * 2560 * 151_936)


def test_tokens_are_of_krea2s_prompt_alone():
  for config in (sampling('tiny', 'plan.tokens=9'), sampling('krea2_raw', 'plan.tokens=9', 'sample.verifi=true')):
    with pytest.raises(UserError, match='plan.tokens=9 are of a request in the prompt of Krea 2 itself'):
      laid_out(config, 'encode')


def test_models_in_turn_lie_beside_no_other():
  config, gib = sampling('krea2_turbo', *INT8), 2 ** 30
  config.in_turn = True
  assert programs.default(config) == ('encode', 'condition', 'denoise', 'decode')
  held = {name: sum(laid_out(config, name)[1].values()) / gib for name in programs.default(config)}
  assert held.pop('encode') < 4.8 and all(12.2 < each < 12.5 for each in held.values())


@pytest.mark.parametrize('changes, tokens, null', [
    (['plan.tokens=100'], 128, None), (['sample.guidance=4.5'], 512, 64),
    (['sample.guidance=4.5', 'sample.negative_prompt=blurry'], 512, 512),
    (['sample.verifi=true', 'sample.guidance=4.5'], 512 + 392, 64)])
def test_lengths_of_krea2s_prompts(changes, tokens, null):
  """References are there with VERIFI alone: each of 392 tokens (docs/krea2.md), beside a rewrite of 512."""
  config = sampling('krea2_turbo', *changes)
  program, _ = laid_out(config, 'denoise', requests=2)
  _, conditioning, given, latents, *_ = program.arguments
  assert conditioning.tokens.shape == (2, tokens, 6144) and conditioning.tokens.dtype == jnp.bfloat16
  assert (given and given.tokens.shape) == (null and (1, null, 6144)) and latents.shape == (2, 128, 128, 16)
  prompt = laid_out(config, 'encode', requests=2)[0].arguments[3]
  assert prompt.shape == (2, 1024 + 392 + 2 + 512 if config.sample.verifi else 34 + tokens)


def test_models_are_planned_as_they_are_loaded():
  config = sampling('tiny', 'transformer_quantized=int8', 'dtype=bfloat16')
  with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:2])):
    models = resident.of(config)
    pipe = UniFusionPipeline.from_pretrained('tiny', dtype='bfloat16', transformer_quantized='int8')
  facts = lambda tree: [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(tree)]
  assert facts((models.transformer, models.vlm, models.vae)) == facts((pipe.model, pipe.frozen.vlm, pipe.frozen.vae))
  assert (models.taps, models.size, models.unit) == (pipe.frozen.taps, pipe.size, pipe.unit)


def test_a_pipeline_for_a_chip(tmp_path, capsys):
  """The real compiler on the embedded pipeline; a total counts what lies beside the program."""
  config = sampling('tiny', *INT8, 'plan.topology=v5e:1x1', 'plan.programs=condition')
  (result,) = plan.run(config, tmp_path)
  used, said = result['memory'], capsys.readouterr().out
  assert result['fits'] and result['program'] == 'condition' and result['rows'] == 1
  assert used['beside'] > 0 < used['arguments']
  assert used['total'] == sum(used[part] for part in ('arguments', 'beside', 'temporaries', 'outputs', 'code'))
  assert 'tiny, transformer in int8 and vlm in int8, all models at once' in said and 'verdict: condition fits' in said
  assert json.loads((tmp_path / 'plan.json').read_text())['weights'] == 'tiny'
