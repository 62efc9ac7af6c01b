"""All benchmarks that a GPU is needed for, in under eight minutes, into one JSON file.

  python -m benchmarks.gpu --json=gpu.json
  JAX_PLATFORMS=cpu python -m benchmarks.gpu --reduced --json=/tmp/gpu.json    # the same code at tiny sizes

First fused attention (cuDNN) is checked against the plain one, forward and backward; where they differ, nothing is
timed. Then each benchmark runs in a process of its own, the most telling first, until the time is up; the file is
written after each, so whatever was measured is there. Needs requirements-test.txt and a jax with CUDA.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

from absl import app, flags

_JSON = flags.DEFINE_string('json', 'gpu.json', 'The file for all figures.')
_SECONDS = flags.DEFINE_integer('seconds', 470, 'Time for all of it; what remains then is left out, and named.')
_REDUCED = flags.DEFINE_bool('reduced', False, 'Tiny sizes, to try the code without a GPU.')
_CHECK = flags.DEFINE_bool('check', False, 'Check attention alone and print it as JSON.')

RUNS = (
    ('dit', '--sizes=2b', '--pixels=1024', '--repeats=5'),
    ('dit', '--sizes=krea2', '--pixels=1024,512', '--parts=forward', '--repeats=5'),
    ('dit', '--sizes=2b', '--pixels=512', '--parts=forward,gradient,train', '--repeats=5'),
    ('vlm', '--vlm=random:InternVL3-1B', '--dtype=bfloat16', '--parts=encode,decode', '--repeats=3'),
    ('dit', '--sizes=base', '--pixels=512', '--parts=forward,gradient,train', '--repeats=5'),
    ('dit', '--sizes=krea2', '--pixels=1024', '--parts=sample', '--repeats=2', '--nocompile'),
    ('dit', '--sizes=tiny', '--repeats=5'),
)
SMALL = (
    ('dit', '--sizes=tiny', '--repeats=1', '--parts=products,forward,gradient', '--nocompile'),
    ('vlm', '--parts=encode', '--repeats=1', '--text=16'),
)


def main(argv):
  del argv
  if _CHECK.value:
    print(json.dumps(check_attention(_REDUCED.value)))
    return
  end = time.monotonic() + _SECONDS.value
  flag = ['--reduced'] if _REDUCED.value else []
  checked = subprocess.run([sys.executable, '-m', 'benchmarks.gpu', '--check', *flag], check=True, text=True,
                           stdout=subprocess.PIPE, timeout=_SECONDS.value).stdout
  results = dict(attention=json.loads(checked.splitlines()[-1]), runs=[], left_out=[])
  print(results['attention'], flush=True)
  with tempfile.TemporaryDirectory() as folder:
    part = pathlib.Path(folder) / 'part.json'
    for module, *arguments in SMALL if _REDUCED.value else RUNS:
      command = [module, *arguments]
      print(' '.join(command), flush=True)
      part.unlink(missing_ok=True)
      try:
        subprocess.run([sys.executable, '-m', f'benchmarks.{module}', *arguments, f'--json={part}'], check=True,
                       timeout=max(1.0, end - time.monotonic()))
      except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        results['left_out'].append(dict(command=command, why=str(error)))
        print(error, flush=True)
      if part.exists():
        results['runs'].append(dict(command=command, **json.loads(part.read_text())))
      pathlib.Path(_JSON.value).write_text(json.dumps(results, indent=1) + '\n')


def check_attention(reduced: bool) -> dict:
  """Relative differences of fused attention from the plain one, and their seconds; ValueError above bf16's rounding.

  On a CPU, which has no fused kernel, attention in blocks of queries stands in for it.
  """
  import functools

  import jax
  import jax.numpy as jnp
  import numpy as np

  from benchmarks import timing
  from unifusion_jax import sharding
  from unifusion_jax.models.attention import attention
  fused = 'cudnn' if jax.devices()[0].platform == 'gpu' else 'blocks'
  b, s, h, g, k = (2, 48, 4, 2, 16) if reduced else (1, 4608, 20, 5, 128)
  found = dict(machine=timing.machine(), fused=fused, shape=[b, s, h, g, k], cases={})
  with jax.set_mesh(jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1])):
    rng = np.random.default_rng(0)
    q, key, v, cotangent = (jnp.asarray(rng.standard_normal((b, s, n, k), np.float32), jnp.bfloat16)
                            for n in (h, g, g, h))
    used = jnp.arange(s) < s - s // 8  # bool: lengths, which every kernel takes
    used = jnp.broadcast_to(used, (b, s))
    for name, options, rows in (('whole', {}, 1), ('lengths', dict(q_segments=used, kv_segments=used), used),
                                ('causal', dict(causal=True), 1)):

      def run(implementation, *arrays, options=options, rows=rows):
        def forward(*arrays):
          y = attention(*arrays, implementation=implementation, **options)
          return jnp.where(jnp.broadcast_to(rows, (b, s))[:, :, None, None], y, 0)  # what padding answers is its own
        y, backward = jax.vjp(forward, *arrays)
        return y, *backward(cotangent)
      programs = {which: functools.partial(jax.jit(run, static_argnums=0), which, q, key, v)
                  for which in ('plain', fused)}
      outputs = {which: [np.asarray(x, np.float32) for x in program()] for which, program in programs.items()}
      errors = [float(np.linalg.norm(a - e) / np.linalg.norm(e)) for a, e in zip(outputs[fused], outputs['plain'])]
      if not max(errors) < 0.02:
        raise ValueError(f'{fused} differs from plain attention by {errors} (y, dq, dk, dv): nothing to time')
      seconds = timing.interleaved({which: lambda program=program: jax.block_until_ready(program())
                                    for which, program in programs.items()}, 3)
      found['cases'][name] = dict(errors=errors, seconds=seconds)
  return found


if __name__ == '__main__':
  app.run(main)
