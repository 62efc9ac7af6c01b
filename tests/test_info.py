"""What --mode=info says of each kind of checkpoint, and what is none."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from test_checkpoint import Position

from unifusion_jax import config
from unifusion_jax.commands import info
from unifusion_jax.description import ASSETS
from unifusion_jax.errors import UserError
from unifusion_jax.models import unifusion
from unifusion_jax.objectives import flow_matching
from unifusion_jax.training import checkpoint, record, step
from unifusion_jax.weights import safetensors_io

# Matrices of Krea 2 by diffusers' names and its own: [out in], and the target that they belong to
KREA2 = {('transformer_blocks.27.attn.to_q', 'blocks.27.attn.wq'): (6144, 6144, 'attention'),
         ('transformer_blocks.0.ff.gate', 'blocks.0.mlp.gate'): (16384, 6144, 'mlp'),
         ('text_fusion.refiner_blocks.1.attn.to_k', 'txtfusion.refiner_blocks.1.attn.wk'): (2560, 2560, 'refiner'),
         ('img_in', 'first'): (6144, 64, 'others')}


def said(place) -> str:
  return '\n'.join(info.lines(info.facts(str(place))))


@pytest.mark.parametrize('part', ['edit', 't2i', 'vlm', 'vae'])
def test_embedded(part):
  facts = info.facts(str(ASSETS / part))
  (path,) = (ASSETS / part).glob('*.safetensors')
  with safetensors.safe_open(path, framework='np') as file:
    number = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
  assert facts['parameters'].startswith(f'{number / 1e6:.3g}M: ' if number >= 1e6 else f'{number / 1e3:.3g}K: ')
  assert facts['dtype'] in ('float32', 'bfloat16') and facts['recipe'].startswith('configs/')
  assert 'stages (provenance.json)' in facts['trained'] and facts['scores']
  if part in ('edit', 't2i'):
    assert facts['taps'].startswith('hidden states 2, 4, 6') and 'steps=24' in facts['sampling']
    assert (facts['VLM'], facts['autoencoder']) == ('tiny', 'tiny')
  assert (info.facts('tiny') == facts | {'checkpoint': str(ASSETS / 'edit')}) == (part == 'edit')


def test_lines_are_aligned(capsys):
  info.run('tiny')
  text = capsys.readouterr().out
  column = text.index('/')
  assert all(line[column - 1] == ' ' != line[column] for line in text.splitlines())
  assert max(map(len, text.splitlines())) <= max(info.WIDTH, len(text.splitlines()[0]))


def test_a_part_stands_below_the_whole_and_nothing_unprintable_comes_through():
  assert info.lines({'a': 'x', 'part': {'long': ['y\x1b', 'z']}, 'bb': 'w'}) == [
      'a   x', 'bb  w', '', 'part', '  long  y\\x1b', '        z']


def test_run(tmp_path):
  made = config.Config(flow_matching.FlowMatching(), unifusion.UniFusionConfig(), recipe='configs/edit.py:tiny',
                       taps=(1, 2), train=config.TrainConfig(steps=4))
  record.claim(made, tmp_path)
  params = jax.device_put(dict(dit=np.ones((40, 60), np.float32), lap=np.ones(100, np.float32)), jax.P())
  state = step.State(jnp.int32(0), jnp.float32(0), params, params, dict(mu=params, count=jnp.int32(0)))
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state, Position())
    checkpoints.save(dataclasses.replace(state, step=state.step + 3), Position())
  (tmp_path / 'checkpoints' / '2.damaged').mkdir()
  (tmp_path / 'metrics.jsonl').write_text(
      '{"step": 1, "loss": 2.5, "mfu": 0.5}\n{"step": 2, "held_out_loss": 2.25}\n{"step": 2, "loss": null}\n{"st')
  (tmp_path / 'eval.json').write_text(json.dumps(dict(weights='here', test={'all': 0.5, 'all/add': 1.0, 'b/c': 2})))
  facts = info.facts(str(tmp_path))
  assert facts['kind'] == 'run' and facts['recipe'] == 'configs/edit.py:tiny'
  assert facts['trained'] == '3 steps, planned for 4 steps'
  assert facts['checkpoints'].startswith('0, 3 (') and facts['checkpoints'].endswith(', 2.damaged')
  assert facts['parameters'] == '2.5K float32, 9.8 KiB; their average (EMA) as much'
  assert facts['state of optimizer'] == '2.5K float32, 9.8 KiB'
  assert facts['DiT'].startswith('28 blocks of width 6144, 48 heads (12 of keys and values) of 128')
  assert facts['started from'] == 'random weights' and facts['taps'].startswith('hidden states 1, 2 ')
  fingerprint = json.loads((tmp_path / 'config.json').read_text())['files']['vlm']
  assert facts['VLM'] == f'{made.vlm} ({fingerprint})'
  assert facts['metrics'] == ['step 1: loss 2.5, MFU 50.0%', 'step 2: ', 'step 2: loss on held-out data 2.25']
  assert facts['scores (eval.json)'] == ['weights here', 'test: all 0.5, b/c 2']

  shutil.rmtree(tmp_path / 'checkpoints' / '3' / 'state')
  assert 'cannot be read' in info.facts(str(tmp_path))['parameters']
  shutil.rmtree(tmp_path / 'checkpoints')
  assert info.facts(str(tmp_path))['checkpoints'] == 'none'


def adapters(path, naming: str, matrices=KREA2, rank: int = 2):
  tensors, head = {}, None
  for (theirs, native), (rows, columns, _) in matrices.items():
    name = {'diffusers': f'transformer.{theirs}', 'native': f'diffusion_model.{native}',
            'PEFT': f'base_model.model.{native}', 'kohya': f'lora_unet_{native.replace(".", "_")}'}[naming]
    down, up = ('lora_down', 'lora_up') if naming == 'kohya' else ('lora_A', 'lora_B')
    tensors |= {f'{name}.{down}.weight': np.zeros((rank, columns), np.float16),
                f'{name}.{up}.weight': np.zeros((rows, rank), np.float16)}
    if naming == 'kohya':
      tensors[f'{name}.alpha'] = np.float32(6.0)
  if naming == 'diffusers':
    head = {'lora_adapter_metadata': json.dumps({'transformer.lora_alpha': 6, 'transformer.r': rank})}
  if naming == 'PEFT':
    (path.parent / 'adapter_config.json').write_text(json.dumps(dict(r=rank, lora_alpha=6)))
  safetensors_io.write(path, tensors, head)


@pytest.mark.parametrize('naming, alpha', [('diffusers', '6'), ('native', '2'), ('PEFT', '6'), ('kohya', '6')])
def test_adapters_of_krea2(naming, alpha, tmp_path):
  adapters(tmp_path / 'adapter_model.safetensors', naming)
  facts = info.facts(str(tmp_path))
  assert facts == info.facts(str(tmp_path / 'adapter_model.safetensors')) | {'checkpoint': str(tmp_path)}
  assert (facts['kind'], facts['naming'], facts['rank'], facts['alpha']) == ('adapters (LoRA)', naming, '2', alpha)
  assert facts['fits Krea 2'].startswith('yes: 4 of ')
  each = 3 if naming == 'kohya' else 2
  assert facts['keys'] == f'{4 * each}: ' + f'attention {each}, mlp {each}, refiner {each}, others {each}'


def test_adapters_of_another_model(tmp_path):
  path = tmp_path / 'lora.safetensors'
  adapters(path, 'diffusers', {name: (32, 16, '') for name in KREA2})
  assert info.facts(str(path))['fits Krea 2'].startswith('no: its names fit, its sizes are of another transformer')
  adapters(path, 'native', KREA2 | {('x', 'blocks.28.attn.wq'): (6144, 6144, '')})
  assert info.facts(str(path))['fits Krea 2'] == 'no: 2 of its 10 keys are not of this transformer'
  adapters(path, 'diffusers', {('single_blocks.0.attn.to_q', 'x'): (32, 16, '')}, rank=3)
  facts = info.facts(str(path))
  assert facts['fits Krea 2'].startswith('no: none of its keys') and facts['rank'] == '3'
  assert 'single_blocks.0' in facts['keys']


@pytest.mark.parametrize('prefix', ['', 'model.diffusion_model.'])
def test_native_file(prefix, tmp_path):
  tensors = {'first.weight': (48, 16), 'txtfusion.projector.weight': (1, 12), 'blocks.0.attn.wq.weight': (48, 48),
             'blocks.1.attn.wq.weight': (48, 48)}
  made = {f'{prefix}{name}': np.zeros(shape, np.float16) for name, shape in tensors.items()}
  safetensors_io.write(tmp_path / 'raw.safetensors', made | ({'vae.x': np.zeros(5000)} if prefix else {}))
  facts = info.facts(str(tmp_path / 'raw.safetensors'))
  assert facts['kind'].startswith("transformer in one file, under Krea's own names") and prefix in facts['kind']
  assert facts['DiT'] == '2 blocks of width 48' and facts['LAP'] == 'pools 12 taps'
  assert facts['parameters'] == '5.39K: LAP and refiner 12, DiT 5.38K' and facts['dtype'] == 'float16'


def test_pipeline_of_krea2(tmp_path):
  for part, source in dict(transformer='t2i', text_encoder='vlm', vae='vae').items():
    shutil.copytree(ASSETS / source, tmp_path / part)
  (tmp_path / 'model_index.json').write_text(json.dumps(dict(
      _class_name='Krea2Pipeline', is_distilled=True, text_encoder_select_layers=[0, 1], patch_size=1)))
  (tmp_path / 'scheduler').mkdir()
  (tmp_path / 'scheduler' / 'scheduler_config.json').write_text('{"_class_name": "Flow", "base_shift": 0.5}')
  (tmp_path / 'vae' / 'diffusion_pytorch_model.safetensors').unlink()
  facts = info.facts(str(tmp_path))
  assert facts['kind'].endswith('distilled (Turbo)') and facts['scheduler'] == 'Flow, base_shift 0.5'
  assert facts['taps'].startswith('hidden states 0, 1 ') and facts['layout'] == 'krea2'
  assert 'steps=8' in facts['sampling'] and '6 blocks of width 192' in facts['transformer']['DiT']
  assert facts['text_encoder']['parameters'].partition(': ')[2].startswith('vision ')
  assert facts['vae']['weights'] == 'not here'
  text = said(tmp_path)
  assert '\n\ntext_encoder\n  language model  qwen2, 6 blocks of width 160' in text


def test_what_is_no_checkpoint(tmp_path):
  cases = {'empty': {}, 'other': {'config.json': '{"_class_name": "UNet"}'}, 'torn': {'config.json': '{"'},
           'run': {'config.json': '{"objective": {}, "model": {}, "train": {}}'}, 'weights': {'x.safetensors': 'x'}}
  for name, files in cases.items():
    (tmp_path / name).mkdir()
    for file, text in files.items():
      (tmp_path / name / file).write_text(text)
  safetensors_io.write(tmp_path / 'y.safetensors', {'a': np.zeros(3)})
  messages = dict(empty='is no checkpoint that is known here: wanted is', other='is no checkpoint', torn='is damaged',
                  run="config.json does not give 'optim'", weights='is truncated or is no safetensors file',
                  nowhere='no such folder or file')
  for name, message in (messages | {'y.safetensors': 'is no checkpoint'}).items():
    with pytest.raises(UserError, match=message):
      info.facts(str(tmp_path / name))
  with pytest.raises(UserError, match='copy it here'):
    info.facts('gs://bucket/run')
