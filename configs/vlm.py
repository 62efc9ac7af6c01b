"""Embedded VLM: InternVL's architecture at 2.8M parameters, with a tokenizer of its own, on scenes at 64 px.

  python -m unifusion_jax.scenes.tokenizer --out=unifusion_jax/assets/tiny/vlm   # only for another language,
  python -m unifusion_jax.scenes.vocabulary --out=unifusion_jax/assets/tiny/vlm  # as this
  python -m unifusion_jax.main --config=configs/vlm.py:tower --workdir=runs/tower      # first the vision tower alone
  python -m unifusion_jax.main --config=configs/vlm.py:tower --workdir=runs/tower --mode=export
  python -m unifusion_jax.main --config=configs/vlm.py --config.init=runs/tower/export   # then the whole VLM
  python -m unifusion_jax.main --config=configs/vlm.py --mode=eval
  python -m unifusion_jax.main --config=configs/vlm.py --mode=export   # then copy runs/vlm/export to the assets

Hardware: two CPU cores. The shipped weights write 0.99 of test captions exactly, answer 0.96 of yes-no and 0.99 of
short questions right, and describe the result of 0.94 of edits and of 0.65 of requests with several images exactly
(docs/embedded.md); their stages are in unifusion_jax/assets/tiny/provenance.json. The paper uses a public VLM: no
setting here is from it.
"""

from unifusion_jax import config
from unifusion_jax.data.config import DataConfig, Task
from unifusion_jax.errors import UserError
from unifusion_jax.models import decoder, internvl
from unifusion_jax.scenes import vlm
from unifusion_jax.scenes.evaluation import settings
from unifusion_jax.sharding import MeshConfig
from unifusion_jax.training.step import OptimConfig


def get_config(scale: str = 'tiny') -> config.Config:
  if scale not in ('tiny', 'tower'):
    raise UserError(f'configs/vlm.py has the scales tiny and tower, not {scale!r}')
  base = tiny()
  if scale == 'tower':
    base.objective.lm_weight = 0.0  # only the attributes head: the decoder does not run
    base.data = DataConfig(tasks=(Task('caption'),), max_prompt_tokens=76, batch_size=64)
    base.optim = OptimConfig(name='muon', learning_rate=1e-3, warmup=300, decay=0.5, ema=0.998)
    base.train = config.TrainConfig(steps=3000, log_every=20, save_every=500, preview_every=100_000)
  return base


def tiny() -> config.Config:
  return config.Config(
      objective=vlm.VLMObjective(),
      model=internvl.InternVLConfig(
          vision=internvl.VisionConfig(width=128, depth=4, heads=4, hidden=512, tile=64, patch=8),
          text=decoder.DecoderConfig(model_type='qwen2', vocab=1024, width=160, depth=6, heads=4, kv_heads=2,
                                     head_dim=40, hidden=432, tied=True, theta=1e4, max_positions=2048),
          image_token_id=5),
      data=DataConfig(
          # Budgets by task and number of objects: padding would cost more than the few more shapes to compile.
          tasks=(Task('edit/1-2', weight=0.12, prompt=88, rewrite=40),
                 Task('edit/3-4', weight=0.30, prompt=108, rewrite=52),
                 Task('caption/1-2', weight=0.03, prompt=56, rewrite=30),
                 Task('caption/3-4', weight=0.05, prompt=72, rewrite=52),
                 Task('question/1-2', weight=0.12, prompt=140, rewrite=44),
                 Task('question/3-4', weight=0.22, prompt=150, rewrite=48),
                 Task('rewrite/1-2', weight=0.05, prompt=116, rewrite=30),
                 Task('rewrite/3-4', weight=0.06, prompt=132, rewrite=52),
                 Task('multi', weight=0.05, prompt=108, rewrite=52)),
          batch_size=64),
      optim=OptimConfig(name='muon', learning_rate=2e-3, warmup=300, decay=0.5, ema=0.998),
      train=config.TrainConfig(steps=10_000, log_every=20, save_every=500, preview_every=1000),
      mesh=MeshConfig(data=-1, fsdp=1),
      eval=settings.LanguageEvaluation(examples=500, batch_size=100))
