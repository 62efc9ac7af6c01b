"""Several processes: arrays of all of them are put together, and fetched whole by each."""

import socket
import subprocess
import sys

PROGRAM = '''
import sys
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 2)
jax.distributed.initialize(f'localhost:{sys.argv[1]}', 2, int(sys.argv[2]))
import numpy as np
from unifusion_jax import sharding

with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2))) as _:
  whole = np.arange(24, dtype=np.float32).reshape(8, 3)
  both = sharding.shard({'x': whole})
  assert not both['x'].is_fully_addressable
  np.testing.assert_array_equal(sharding.gather(jax.jit(lambda x: x * 2)(both['x'])), whole * 2)
  mine = whole[4 * jax.process_index():][:4]
  np.testing.assert_array_equal(sharding.gather(sharding.shard_batch(mine, jax.sharding.get_mesh())), whole)
  print('leads' if sharding.is_main_process() else 'follows')
'''


def test_two_processes_put_and_fetch():
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  running = [subprocess.Popen([sys.executable, '-c', PROGRAM, str(port), str(i)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True) for i in range(2)]
  told = [process.communicate(timeout=120) for process in running]
  assert [out.split('\n')[-2:] for out, _ in told] == [['leads', ''], ['follows', '']], told
