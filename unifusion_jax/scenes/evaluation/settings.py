"""Settings of --mode=eval on scenes: the `eval` of the embedded models' recipes.

Records of one's own are measured by what needs no judge (unifusion_jax/evaluation); rates are of scenes alone.
"""

import dataclasses

from unifusion_jax import ranges
from unifusion_jax.data.config import is_list, SCENES
from unifusion_jax.errors import UserError
from unifusion_jax.evaluation import fidelity, records
from unifusion_jax.fields import Path
from unifusion_jax.ranges import Range
from unifusion_jax.scenes import splits
from unifusion_jax.scenes.evaluation import (
  agreement,
  by_hand,
  generation,
  language,
  noise_levels,
  reconstruction,
  verifi_study,
)

STUDIES = {'rates': generation, 'verifi': verifi_study, 'noise_levels': noise_levels, 'by_hand': by_hand,
           'agreement': agreement}


@dataclasses.dataclass
class _Scenes:
  split: str = 'test'
  examples: int = 200   # of each measurement
  batch_size: int = 50

  @property
  def report(self) -> str:
    """Name of the report."""
    return 'eval'

  def problems(self, config) -> list[str]:
    """Settings that cannot work, a sentence each."""
    del config
    wrong = ranges.problems(self, 'eval.', examples=Range(1, 10 ** 6), batch_size=Range(1, 10 ** 6))
    if self.split not in splits.SPLITS:
      wrong.append(f'eval.split={self.split!r} must be one of {", ".join(splits.SPLITS)}')
    return wrong


@dataclasses.dataclass
class GenerationEvaluation(_Scenes):
  """Evaluation of images from prompts and edits, read by the judge.

  study: 'rates', success rates; 'verifi', the effect of rewriting, image tokens and system prompts (docs/verifi.md); or
    'noise_levels', success rates by the time that denoising starts from; 'by_hand', success rates on requests and
    drawings outside the grammar; 'agreement', of the VLM as a judge with the exact one (docs/metrics.md).
  """
  study: str = 'rates'
  seeds: int = 3        # of study=verifi
  lpips: Path | None = None  # folder with the weights of LPIPS, for records of one's own; None: it is not measured

  @property
  def report(self) -> str:
    """Name of the report."""
    return 'eval' if self.study == 'rates' else f'eval_{self.study}'

  def problems(self, config) -> list[str]:
    """Settings that cannot work, a sentence each."""
    split = {'verifi': 'test', 'noise_levels': 'train'}.get(self.study, self.split)
    why = {'verifi': 'the study of VERIFI uses phrasings that only the split test has',
           'noise_levels': 'the study of noise levels tunes training, so it keeps off the test split'}.get(self.study)
    checks = {
        f'eval.study={self.study!r} must be one of {", ".join(STUDIES)}': self.study in STUDIES,
        f'eval.split={self.split!r}: {why}: set it to {split}': self.split == split,
        f'eval.study={self.study!r} is a study of scenes, not of {config.data.measured}: leave it out, or set '
        'data.path=scenes without data.held_out': self.study == 'rates' or config.data.measured in SCENES}
    return [*super().problems(config), *ranges.problems(self, 'eval.', seeds=Range(1, 1000)),
            *(text for text, holds in checks.items() if not holds)]

  def run(self, config, params, folder) -> dict:
    """The report; sheets of images go into `folder`. The scenes of a prepared folder are also read by the judge."""
    pipe = config.objective.pipeline(config, params, config.objective.frozen(config))
    path = config.data.measured
    if path in SCENES:
      return STUDIES[self.study].evaluate(pipe, config, folder)
    return records.evaluate(pipe, config, folder, None if is_list(path) else generation.score)


@dataclasses.dataclass
class LanguageEvaluation(_Scenes):
  """Evaluation of the VLM's captions, answers, rewrites and descriptions of edits."""

  def run(self, config, params, folder) -> dict:
    """The report."""
    del folder
    if config.data.measured not in SCENES:
      raise UserError(f'what the VLM writes is measured on scenes drawn on the fly, not on {config.data.measured}: '
                      'evaluate with --config.data.path=scenes')
    return language.evaluate(params.vlm, config.objective.prompt_encoder(config), config)


@dataclasses.dataclass
class AutoencoderEvaluation(_Scenes):
  """Evaluation of reconstructed images, read by the judge."""
  lpips: Path | None = None  # folder with the weights of LPIPS, for records of one's own; None: it is not measured

  def run(self, config, params, folder) -> dict:
    """The report; a sheet of images of one's own goes into `folder`."""
    if is_list(config.data.measured):
      return fidelity.evaluate(params, config, folder)
    return reconstruction.evaluate(params, config)
