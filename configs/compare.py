"""Two checkpoints side by side: the same requests and seeds, pairs to look at and to vote on blind, win rates.

  python -m unifusion_jax.main --config=configs/compare.py
  python -m unifusion_jax.main --config=configs/compare.py --config.serve
  python -m unifusion_jax.main --config=configs/compare.py --config.b.weights=tiny --config.b.steps=4 \
      --workdir=runs/steps
  python -m unifusion_jax.main --config=configs/compare.py --config.a.weights=out/before --config.b.weights=out/after \
      --config.data=my/held_out.jsonl --config.examples=100 --workdir=runs/before_after

The first compares the embedded editing model with the text-to-image model that it was trained on from, on a CPU; with
--config.serve a page at http://127.0.0.1:7861 asks for votes, and the first command again sums them up. Hardware: that
of sampling with the larger of the two, of which one is loaded at a time. docs/compare.md.
"""

from unifusion_jax.commands.compare import CompareConfig


def get_config() -> CompareConfig:
  return CompareConfig(dtype='float32')
