"""The paper's claims as experiments on scenes: sizes, trainings, what is measured of each, and what is compared.

A stage is a training by a recipe, or a model that is there already; several claims may share one. An arm is a way to
sample a stage's model that a claim measures. All compare on square scenes of the split test, with the same examples and
the same noise for every arm of a seed.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

from configs import edit, t2i, vlm
from unifusion_jax import command_line, json_file
from unifusion_jax import config as configuration
from unifusion_jax.data.config import Task
from unifusion_jax.errors import UserError
from unifusion_jax.scenes import retrain
from unifusion_jax.scenes.claims import measures
from unifusion_jax.scenes.evaluation.verifi_study import TILES

ASSETS = configuration.ASSETS
LARGER = 3  # side of references that are shown in several tiles, relative to those of training
REQUEST = 96  # tokens of a request that conditions as it is; without VERIFI no other text does


@dataclasses.dataclass(frozen=True)
class Size:
  """How long is trained and how much is measured.

  Attributes:
    scale: batches, noises, precision and learning rates, as of scenes/retrain.py.
    steps: of each kind of stage.
    examples: of each group of examples that a measure has.
    sampling_steps: of every image.
    seconds: estimates for the plan: of a step of each kind; 'start', of a process and its compiling; 'image', of an
      image in a measurement.
    variants: whether what is a variant is trained too (`Arm`).
  """
  scale: retrain.Scale
  steps: Mapping[str, int]
  examples: int
  sampling_steps: int
  seconds: Mapping[str, float]
  variants: bool = False


GPU, CPU = (retrain.scale_of(platform, 1) for platform in ('gpu', 'cpu'))
# Seconds of a step. One H100, 2026-11-27: 0.175 for 256 examples noised 8 times, 0.047 of the VLM (docs/training.md),
# by the number of noises. Two cores of an AMD EPYC (family 25), 2026-11-27: t2i, edit, vlm (half of its examples with
# several images) and images as measured. With several tiles, and the start and the images of a GPU: guesses.
ON_GPU = dict(t2i=0.09, edit=0.10, vlm=0.05, vlm_tiles=0.15, tiles=0.2, start=40.0, image=0.02)
ON_CPU = dict(t2i=2.7, edit=3.3, vlm=2.0, vlm_tiles=2.8, tiles=4.0, start=60.0, image=0.35)
SIZES = {
    'full': Size(dataclasses.replace(GPU, noises=4),
                 dict(t2i=3000, edit=1500, vlm=4000, vlm_tiles=2000, tiles=2000), examples=400, sampling_steps=24,
                 seconds=ON_GPU, variants=True),
    'short': Size(dataclasses.replace(GPU, noises=4, dit_batch=128),
                  dict(t2i=250, edit=200, vlm=500, vlm_tiles=300, tiles=250), examples=150, sampling_steps=24,
                  seconds={name: value / 2 if name in ('t2i', 'edit', 'tiles') else value
                           for name, value in ON_GPU.items()}),
    'reduced': Size(CPU, dict(t2i=300, edit=200, vlm=300, vlm_tiles=150, tiles=150), examples=100, sampling_steps=24,
                    seconds=ON_CPU),
    'try': Size(retrain.Scale(2, 2, 2, noises=2, workers=0, tiles=(1,), dtype='float32', rate=1.0),
                dict(t2i=2, edit=2, vlm=2, vlm_tiles=2, tiles=2), examples=2, sampling_steps=2, seconds=ON_CPU)}


@dataclasses.dataclass(frozen=True)
class Stage:
  """A training, or with an empty `kind` a model that is measured as it is.

  Attributes:
    make: the recipe.
    kind: of `Size.steps`.
    after: {setting of the configuration: stage whose export it names}.
  """
  make: Callable[[], configuration.Config]
  kind: str = ''
  after: Mapping[str, str] = dataclasses.field(default_factory=dict)


CONDITIONINGS = ('lap', 'last', 'kv', 'hidden', 'text')
VARIANTS = ('lap_all', 'kv_all', 'hidden_all', 'lap_mean', 'lap_no_refiner', 'lap_norm')


def _conditioned(name: str) -> Any:
  return command_line.load(f'ablation:{name}')


def _edits_of(name: str) -> configuration.Config:
  """Edits under a way to condition: configs/edit.py with the model of configs/ablation.py."""
  config, other = edit.get_config(), _conditioned(name)
  return dataclasses.replace(config, model=other.model, taps=other.taps, vlm=other.vlm)


def _without_verifi() -> configuration.Config:
  config = _conditioned('lap')
  config.objective = dataclasses.replace(config.objective, instruction_prob=1.0)
  config.data = dataclasses.replace(config.data, max_rewrite_tokens=REQUEST)
  return config


def _on_prompts(config: configuration.Config) -> configuration.Config:
  """A training on edits made one on the tasks of configs/t2i.py: as many steps by the same optimizer."""
  config.data = dataclasses.replace(config.data, tasks=t2i.get_config().data.tasks)
  return config


def _on(config: configuration.Config, weights: Mapping[str, float]) -> configuration.Config:
  """The configuration on other tasks, {task: weight}, of the wider world."""
  tasks = tuple(Task(name, weight) for name, weight in weights.items())
  config.data = dataclasses.replace(config.data, path='scenes/wide', tasks=tasks)
  return config


def _vlm(weights: Mapping[str, float]) -> configuration.Config:
  """The shipped VLM, trained on."""
  return dataclasses.replace(_on(vlm.get_config(), weights), init=str(ASSETS / 'vlm'))


def _several_tiles(config: configuration.Config) -> configuration.Config:
  config.data = dataclasses.replace(config.data, tiles=TILES)
  return config


def _edits_in_tiles() -> configuration.Config:
  """Edits and repetitions of references in several tiles, some of them by the image tokens alone."""
  config = _several_tiles(_on(_shipped_edit(), dict(edit=0.5, reconstruct=0.5)))
  config.objective = dataclasses.replace(config.objective, text_dropout=0.3)
  return config


def _shipped_edit() -> configuration.Config:
  return dataclasses.replace(edit.get_config(), init=str(ASSETS / 'edit'))


STAGES = {
    **{f't2i_{name}': Stage(functools.partial(_conditioned, name), 't2i')
       for name in (*CONDITIONINGS, *VARIANTS, 'lap_two')},
    't2i_raw': Stage(_without_verifi, 't2i'),
    **{f'edit_{name}': Stage(functools.partial(_edits_of, name), 'edit', {'init': f't2i_{name}'})
       for name in ('lap', 'last', 'lap_two')},
    'shipped_t2i': Stage(lambda: dataclasses.replace(t2i.get_config(), init=str(ASSETS / 't2i'))),
    'shipped_edit': Stage(_shipped_edit),
    'more_t2i': Stage(lambda: _on_prompts(edit.get_config()), 'edit'),
    'more_edit': Stage(edit.get_config, 'edit'),
    'more_t2i_lap': Stage(lambda: _on_prompts(_edits_of('lap')), 'edit', {'init': 't2i_lap'}),
    'vlm_tiles': Stage(lambda: _several_tiles(_vlm(dict(edit=0.5, caption=0.3, question=0.2))), 'vlm_tiles'),
    'tiles': Stage(_edits_in_tiles, 'tiles', {'vlm': 'vlm_tiles'}),
    'vlm_multi': Stage(lambda: _vlm(retrain.MORE['vlm'] | {'multi': 1.0}), 'vlm'),
    'shipped_edit_multi': Stage(_shipped_edit, '', {'vlm': 'vlm_multi'}),
    'edit_multi': Stage(_shipped_edit, 'edit', {'vlm': 'vlm_multi'}),
    'edit_more': Stage(_shipped_edit, 'edit')}


@dataclasses.dataclass(frozen=True)
class Arm:
  """What a claim measures: of which stage, by a function of measures.py, under which settings of sampling.

  Attributes:
    how: arguments of the measure beside `settings`.
    variant: left out by sizes without `variants`.
  """
  stage: str
  measure: Callable[..., dict[str, list]]
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  how: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  variant: bool = False


@dataclasses.dataclass(frozen=True)
class Claim:
  """A claim of the paper.

  Attributes:
    shown: measured values in the table, {value: heading}.
    plotted: those of them in the plot.
    compared: (value, arm, other arm) of each comparison that is tested.
    relative: values that are also given beside those of the arm with one tile, NAME_1, as in the paper's figure.
  """
  title: str
  arms: Mapping[str, Arm]
  shown: Mapping[str, str]
  plotted: Sequence[str]
  compared: Sequence[tuple[str, str, str]]
  relative: Sequence[str] = ()


_PROMPTS = {'1-2/all': '1-2 objects as asked', '3-4/all': '3-4 objects as asked', '1-2/share': 'constraints met, 1-2',
            '3-4/share': 'constraints met, 3-4', '1-2/vqascore': 'VQAScore, 1-2'}
_LOSS = {'loss': 'flow loss at t of 0.7 and 0.9'}
_EDITS = {'edit/all': 'as asked, all else kept', 'edit/asked': 'change made', 'edit/kept': 'all else kept',
          'edit/psnr': 'PSNR of what stays, dB', 'edit/ssim': 'SSIM of what stays'}
_TILES = tuple(f'{name}_{n}' for name in ('image', 'text', 'shipped') for n in TILES)

CLAIMS = {
    'a': Claim(
        'The order of the ways to condition',
        {name: Arm(f't2i_{name}', measures.prompts, how=dict(loss=True), variant=name in VARIANTS)
         for name in CONDITIONINGS + VARIANTS},
        {**_PROMPTS, **_LOSS}, ('1-2/share', 'loss'),
        [(value, 'lap', other) for value in ('1-2/share', 'loss') for other in CONDITIONINGS[1:] + VARIANTS]),
    'b': Claim(
        'Detail of an image stays in edits',
        {**{name: Arm(f'edit_{name}', measures.edits) for name in ('lap', 'last')},
         'lap_two': Arm('edit_lap_two', measures.edits, variant=True),
         **{f'{name}_text': Arm(f'edit_{name}', measures.edits, dict(image_tokens=False)) for name in ('lap', 'last')},
         'shipped': Arm('shipped_edit', measures.edits),
         'shipped_text': Arm('shipped_edit', measures.edits, dict(image_tokens=False)),
         **{f'tiles_{n}': Arm('tiles', measures.edits, dict(tiles=n), dict(larger=LARGER)) for n in TILES}},
        _EDITS, ('edit/psnr', 'edit/all'),
        [('edit/psnr', 'lap', 'last'), ('edit/psnr', 'lap', 'lap_text'), ('edit/psnr', 'last', 'last_text'),
         ('edit/psnr', 'shipped', 'shipped_text'), ('edit/all', 'shipped', 'shipped_text'),
         ('edit/psnr', 'tiles_9', 'tiles_1'), ('edit/psnr', 'lap_two', 'lap'), ('edit/all', 'lap_two', 'lap')]),
    'c': Claim(
        'VERIFI: the VLM rewrites the request',
        {'shipped': Arm('shipped_t2i', measures.styles),
         'shipped_off': Arm('shipped_t2i', measures.styles, dict(verifi=False)),
         'edit': Arm('shipped_edit', measures.edits),
         'edit_off': Arm('shipped_edit', measures.edits, dict(verifi=False)),
         'lap': Arm('t2i_lap', measures.styles), 'lap_off': Arm('t2i_lap', measures.styles, dict(verifi=False)),
         'trained_off': Arm('t2i_raw', measures.styles, dict(verifi=False))},
        {f'{style}/{value}': f'{name}: {words}' for value, words in (('all', 'as asked'), ('share', 'constraints met'))
         for style, name in measures.STYLES.items()} | {'edit/all': 'edits as asked'},
        [f'{style}/share' for style in measures.STYLES],
        [*((f'{style}/share', *arms) for style in measures.STYLES
           for arms in (('shipped', 'shipped_off'), ('lap', 'trained_off'))), ('edit/all', 'edit', 'edit_off')]),
    'd': Claim(
        'More tiles, better reconstruction',
        {name: Arm('shipped_edit' if name.startswith('shipped') else 'tiles', measures.reconstruct,
                   dict(tiles=int(name.partition('_')[2])),
                   dict(larger=LARGER, rewrite='' if name.startswith('image') else None)) for name in _TILES},
        {'rmse': 'root mean square error', 'dissimilarity': '1 - SSIM', 'distance': "distance of the VLM's states",
         'exact': 'read back exactly'},
        ('rmse', 'dissimilarity'),
        [(value, f'{name}_9', f'{name}_1') for name in ('image', 'text', 'shipped')
         for value in ('rmse', 'dissimilarity')],
        relative=('rmse', 'dissimilarity', 'distance')),
    'e': Claim(
        'Learning to edit helps text to image',
        {**{name: Arm(stage, measures.prompts, how=dict(loss=True)) for name, stage in (
             ('before', 'shipped_t2i'), ('more_t2i', 'more_t2i'), ('more_edit', 'more_edit'))},
         **{name: Arm(stage, measures.prompts, how=dict(loss=True), variant=True) for name, stage in (
             ('lap', 't2i_lap'), ('lap_more_t2i', 'more_t2i_lap'), ('lap_more_edit', 'edit_lap'))}},
        {**_PROMPTS, **_LOSS}, ('1-2/all', '3-4/all', 'loss'),
        [(value, *arms) for value in ('1-2/all', '3-4/all', 'loss') for arms in (
            ('more_edit', 'more_t2i'), ('more_edit', 'before'), ('lap_more_edit', 'lap_more_t2i'),
            ('lap_more_edit', 'lap'))]),
    'f': Claim(
        'Several references, without training on them',
        {'shipped': Arm('shipped_edit', measures.several),
         'shipped_truth': Arm('shipped_edit', measures.several, how=dict(truth=True)),
         'vlm': Arm('shipped_edit_multi', measures.several), 'vlm_edit': Arm('edit_multi', measures.several),
         'vlm_edit_truth': Arm('edit_multi', measures.several, how=dict(truth=True)),
         'edit_more': Arm('edit_more', measures.several)},
        {'2/all': 'two references, exact', '3/all': 'three, exact', '2/written': 'text exact, two',
         '3/written': 'text exact, three'},
        ('2/all', '3/all'),
        [*((f'{n}/all', 'vlm_edit', other) for n in (2, 3) for other in ('shipped', 'edit_more')),
         ('2/all', 'vlm_edit_truth', 'vlm_edit'),
         *((f'{n}/all', 'shipped_truth', 'shipped') for n in (2, 3))])}


def arms(claim: str, size: Size) -> dict[str, Arm]:
  """The arms of a claim that a size measures."""
  return {name: arm for name, arm in CLAIMS[claim].arms.items() if size.variants or not arm.variant}


def chain(stage: str) -> list[str]:
  """The stages that a stage starts from, first ones first, and the stage itself."""
  before = [each for name in STAGES[stage].after.values() for each in chain(name)]
  return [*dict.fromkeys(before), stage]


def workdir(folder: pathlib.Path, stage: str, seed: int) -> pathlib.Path:
  return folder / 'stages' / f'{stage}_{seed}'


def config(stage: str, seed: int, size: Size, folder: pathlib.Path) -> configuration.Config:
  """Configuration of a stage; trained parts that it starts from lie under `folder`."""
  made, what = STAGES[stage].make(), STAGES[stage]
  made.seed = seed
  steps = size.steps[what.kind] if what.kind else 0
  trains_vlm = what.kind.startswith('vlm')
  batch = size.scale.vlm_batch if trains_vlm else size.scale.dit_batch
  tasks = tuple(dataclasses.replace(task, prompt=None, rewrite=None) for task in made.data.tasks)
  made.data = dataclasses.replace(
      made.data, tasks=tasks, aspects=('1:1',), max_prompt_tokens=retrain.PROMPT,
      max_rewrite_tokens=max(retrain.REWRITE, made.data.max_rewrite_tokens), workers=0,
      batch_size=batch // 2 if what.kind.endswith('tiles') else batch)  # of which an example has up to ten
  made.train = dataclasses.replace(made.train, steps=max(steps, 1), log_every=50, save_every=500, save_minutes=5.0,
                                   keep=1, preview_every=0)
  made.optim = dataclasses.replace(made.optim, learning_rate=made.optim.learning_rate * size.scale.rate,
                                   warmup=min(made.optim.warmup, steps // 8))
  if trains_vlm:
    made.objective.dtype = size.scale.dtype
  else:
    made.model.dtype = made.frozen_dtype = size.scale.dtype
    made.objective.noises_per_example = size.scale.noises
    made.sample = dataclasses.replace(made.sample, steps=size.sampling_steps)
  for setting, earlier in what.after.items():
    setattr(made, setting, str(workdir(folder, earlier, seed) / 'export'))
  return made


def digest(stage: str, size: Size) -> str:
  """Digest of the settings of a stage and of the stages before it; every seed and folder has the same."""
  settings = [dataclasses.asdict(config(each, 0, size, pathlib.Path('FOLDER'))) for each in chain(stage)]
  for each in settings:
    each['data'].pop('workers')
  return _hashed(settings)


def measured(arm: Arm) -> str:
  """Digest of how an arm's stage is measured."""
  return _hashed([arm.measure.__name__, dict(arm.settings), dict(arm.how)])


def _hashed(content: list) -> str:
  text = json.dumps(content, sort_keys=True).replace(str(ASSETS), 'tiny')
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def trains(stage: str) -> list[str]:
  """Those stages of its chain that train."""
  return [each for each in chain(stage) if STAGES[each].kind]


def settings(name: str) -> dict:
  """What all results of a claim must share but machine and jax: the size, and the shipped weights that it builds on."""
  size = SIZES[name]
  models = json_file.read(ASSETS / 'provenance.json')['models']
  return dict(size=name, steps=dict(size.steps), batch=[size.scale.dit_batch, size.scale.noises, size.scale.vlm_batch],
              examples=size.examples, sampling_steps=size.sampling_steps,
              weights={part: model['sha256'][:12] for part, model in sorted(models.items())})


def named(claims: Sequence[str]) -> list[str]:
  """The claims of a flag; UserError for one that there is not."""
  if not claims or not set(claims) <= set(CLAIMS):
    raise UserError(f'--claims={",".join(claims)} must be some of {",".join(CLAIMS)}')
  return list(dict.fromkeys(claims))


def stages(names: Sequence[str]) -> list[str]:
  """The stages of a flag; UserError for one that there is not."""
  if unknown := [name for name in names if name not in STAGES]:
    raise UserError(f'--only={",".join(unknown)} names no stage: there are {", ".join(STAGES)}')
  return list(names)
