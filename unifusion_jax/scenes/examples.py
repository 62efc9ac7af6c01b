"""Examples of the embedded world: example i of a task in a split, a pure function of its arguments.

Tasks: t2i (prompt -> image), edit (one reference), reconstruct (the reference is the target), multi (two or three
references), caption and question (about one reference), rewrite (prompt -> description, without images).

Training may use a wider world (`wide`): backgrounds of any colour, requests as people type them (casual.py), references
as people draw and photograph them (looks.py). `test` and `heldout` have none of this. In the wider world:
  prompts of t2i and rewrite    a share CASUAL is casual; targets are rendered plainly, for the judge to read
  references                    a share LOOKED has a look
  targets of edit, reconstruct  have the look of their reference without its camera: an edit keeps all it does not name
  targets of multi              rendered plainly; nothing trains on them
"""

import dataclasses

import numpy as np

from unifusion_jax.errors import UserError
from unifusion_jax.scenes import casual, looks, splits
from unifusion_jax.scenes.composition import pick, random_scene, weighted
from unifusion_jax.scenes.constraints import Constraints, Wanted
from unifusion_jax.scenes.edits import Edit, EDIT_KINDS, EDIT_WEIGHTS, random_edit
from unifusion_jax.scenes.evaluation import handwritten
from unifusion_jax.scenes.language import caption, constraints_of, constraints_to_json, describe, full_description
from unifusion_jax.scenes.multi import random_multi
from unifusion_jax.scenes.prompts import prompt
from unifusion_jax.scenes.questions import random_question
from unifusion_jax.scenes.render import render
from unifusion_jax.scenes.world import ASPECTS, Scene

TASKS = {'t2i': 0, 'edit': 1, 'reconstruct': 2, 'multi': 3, 'caption': 4, 'question': 5, 'rewrite': 6}
ASPECT_WEIGHTS = {'square': 0.8, 'wide': 0.1, 'tall': 0.1}
_ASPECT_WEIGHTS, _EVEN = tuple(ASPECT_WEIGHTS[a] for a in ASPECTS), (1 / 3,) * 3
STYLE_WEIGHTS = {'plain': 0.35, 'paraphrase': 0.4, 'knowledge': 0.25}
ALIKE = 0.2  # share of t2i scenes with like objects, which prompts count
MORE = 4  # further questions about an image of the train split: they cost text tokens alone
WORDS = 48  # most words of a prompt: rare longer ones would set the padded length of all
AGAIN = ('draw this picture again', 'repeat the picture', 'the same picture, please', 'copy this', 'keep it as it is',
         'reproduce the picture', 'change nothing')
CAPTION = ('describe the picture', 'what does the picture show?', 'describe this image', 'caption this picture')
# The wider world: shares of casual requests and of references with a look, and more ways to ask.
CASUAL, LOOKED = 0.5, 0.6
MORE_AGAIN = ('again please', 'same again', 'the same picture once more', 'no changes', 'leave it as it is',
              'just copy it')
MORE_CAPTION = ('what is in the picture?', 'what do you see?', 'what is this?', 'say what is in it', 'describe it')


def _start(task: str, split: str, i: int, seed: int) -> tuple[np.random.Generator, str, str]:
  """(rng, canvas of the target, kind of edit or ''): the first draws, equal in both worlds, which `aspect` reads."""
  if task not in TASKS or split not in splits.SPLITS:
    raise UserError(f'there is no task {task!r} in split {split!r}: tasks are {", ".join(TASKS)} and splits '
                    f'{", ".join(splits.SPLITS)}')
  rng = np.random.default_rng([seed, splits.SPLITS[split], TASKS[task], i])
  kind = weighted(rng, EDIT_KINDS, EDIT_WEIGHTS) if task == 'edit' else ''
  weights = _EVEN if kind == 'aspect' else _ASPECT_WEIGHTS
  return rng, weighted(rng, tuple(ASPECTS), weights), kind


def aspect(task: str, split: str, i: int, seed: int = 0) -> str:
  """The canvas shape of the example's target (of its reference, if it has no target), without making the example."""
  return _start(task, split, i, seed)[1]


def _count(rng: np.random.Generator) -> int:
  return 2 if rng.random() < 0.65 else 3


def references(task: str, split: str, i: int, seed: int = 0) -> int:
  """The number of references of the example, without making it."""
  if task == 'multi':
    return _count(_start(task, split, i, seed)[0])
  return 0 if task in ('t2i', 'rewrite') else 1


def _scene(rng: np.random.Generator, split: str, canvas: str, objects, wide: bool) -> Scene:
  scene = random_scene(rng, objects, canvas, splits.allowed(split), wide)
  return splits.with_heldout_object(rng, scene) if split == 'heldout' else scene


def _alike(rng: np.random.Generator, scene: Scene) -> Scene:
  """The scene with two or more objects made equal in shape, colour and fill."""
  first, count = scene.objects[0], rng.integers(2, len(scene.objects) + 1)
  objects = (dataclasses.replace(o, shape=first.shape, colour=first.colour, fill=first.fill) if k < count else o
             for k, o in enumerate(scene.objects))
  return dataclasses.replace(scene, objects=tuple(objects))


def _counted(rng: np.random.Generator, scene: Scene) -> Constraints:
  """A description by shape, colour and perhaps fill alone, so that like objects are counted."""
  filled = rng.random() < 0.3
  wanted = [Wanted(o.shape, o.colour, fill=o.fill if filled else None) for o in scene.objects]
  background = scene.background if rng.random() < 0.5 else None
  return Constraints(tuple(sorted(wanted, key=wanted.index)), background)


def _prompted(rng: np.random.Generator, split: str, canvas: str, objects, wide: bool) -> tuple[Scene, Constraints]:
  """A scene and a description of it."""
  held = split == 'heldout'
  while True:
    scene = random_scene(rng, objects, canvas, splits.allowed('train'), wide)
    several = len(scene.objects) > 1
    alike = several and not held and rng.random() < ALIKE
    related = several and held and rng.random() < 0.3
    if alike:
      scene = _alike(rng, scene)
    elif related:
      scene = splits.with_heldout_relation(rng, scene)
    elif held:
      scene = splits.with_heldout_object(rng, scene)
    if alike and rng.random() < 0.6:
      return scene, _counted(rng, scene)
    full, relation = (0, 1) if related else (0.4, 0.17)
    constraints = constraints_of(scene, rng, full=full, relation=relation, fills=held,
                                 relation_allowed=splits.relation_allowed(split))
    if held == splits.constraints_are_heldout(constraints):
      return scene, constraints


def _style(rng: np.random.Generator, split: str, weights=STYLE_WEIGHTS) -> str:
  if split == 'test' and rng.random() < 0.5:
    return 'heldout'
  return weighted(rng, tuple(weights), tuple(weights.values()))


def _requested(rng: np.random.Generator, canvas: str, objects) -> tuple[Scene, Constraints, str]:
  """(scene, constraints, casual prompt) in the wider world."""
  while True:
    scene = random_scene(rng, objects, canvas, splits.allowed('train'), wide=True)
    if request := casual.request(rng, scene):
      return *request[:2], casual.slips(rng, request[2])


def _edited(rng: np.random.Generator, split: str, canvas: str, kind: str, style: str, objects, wide: bool) -> Edit:
  pairs = dict(splits.HELDOUT_EDITS)
  while True:
    shape = None
    before = canvas
    if kind == 'aspect':
      before = pick(rng, [a for a in ASPECTS if a != canvas])
    if split == 'heldout' and kind in pairs and rng.random() < 0.5:
      source = random_scene(rng, objects, before, splits.allowed('train'))
      shape = pairs[kind]
      if kind != 'add':
        k = int(rng.integers(len(source.objects)))
        changed = dataclasses.replace(source.objects[k], shape=shape)
        source = dataclasses.replace(source, objects=source.objects[:k] + (changed,) + source.objects[k + 1:])
    else:
      source = _scene(rng, split, before, objects, wide)
    if edit := random_edit(rng, source, kind, style, split, shape, canvas, wide):
      return edit


def example(task: str, split: str, i: int, seed: int = 0, size: int = 64, objects: int | tuple[int, int] = (1, 4),
            images: bool = True, wide: bool = False, reference_size: int | None = None) -> dict:
  """Example i of a task in a split ('train', 'test' or 'heldout').

  size: of the images (world.canvas). objects: of a scene before an edit (a number, or a least and a most).
  images: False leaves the references empty and the target None, for callers that need texts and scenes only.
  wide: an example of the wider world, in train alone. reference_size: of the references (None: `size`).

  Returns references (list of uint8 [y x 3]), instruction, caption (the text that the VLM should write: a description of
  the target as far as it is determined, an answer, or a caption), target (uint8 [y x 3] or None), kind (of prompt,
  edit, multi-reference example or question), style (of language; '' where there is one only), source (the reference
  scenes as JSON), scene (the target scene as JSON, or '') and constraints (of the caption, as JSON, or ''); a training
  question also has more (further questions with their answers).
  """
  rng, canvas, edit_kind = _start(task, split, i, seed)
  wide = wide and split == 'train'
  references, target, constraints, style, more = (), None, None, '', []
  if task in ('t2i', 'rewrite'):
    kind = style = 'casual' if wide and rng.random() < CASUAL else _style(rng, split)
    while True:
      if style == 'casual':
        target, constraints, instruction = _requested(rng, canvas, objects)
      else:
        target, constraints = _prompted(rng, split, canvas, objects, wide)
        instruction = prompt(constraints, rng, style)
      text = describe(constraints)
      if len(instruction.split()) <= WORDS and not (wide and handwritten.is_kept(instruction)):
        break
    if task == 'rewrite':
      target = None
  elif task == 'edit':
    style = 'casual' if wide and rng.random() < CASUAL else _style(rng, split, {'paraphrase': 1.0})
    edit = _edited(rng, split, canvas, edit_kind, style, objects, wide)
    while wide and handwritten.is_kept(edit.instruction):
      edit = _edited(rng, split, canvas, edit_kind, style, objects, wide)
    references, instruction, target, kind = (edit.source,), edit.instruction, edit.target, edit.kind
    text, constraints = caption(target), full_description(target)
  elif task == 'multi':
    count = _count(rng)
    while True:
      multi = random_multi(rng, count, split, canvas, wide=wide)
      if split != 'heldout' or any(map(splits.scene_is_heldout, (*multi.references, multi.target))):
        break
    references, instruction, target, kind = multi.references, multi.instruction, multi.target, multi.kind
    text, constraints = caption(target), full_description(target)
  elif task == 'reconstruct':
    target = _scene(rng, split, canvas, objects, wide)
    references, instruction, kind = (target,), pick(rng, AGAIN + MORE_AGAIN * wide), 'reconstruct'
    text, constraints = caption(target), full_description(target)
  else:
    source = _scene(rng, split, canvas, objects, wide)
    references = (source,)
    if task == 'caption':
      instruction, text, kind = pick(rng, CAPTION + MORE_CAPTION * wide), caption(source), 'caption'
    else:
      instruction, text, kind = random_question(rng, source, split=split)
      more = [random_question(rng, source, split=split)[:2] for _ in range(MORE if split == 'train' else 0)]
      if wide and rng.random() < CASUAL:
        instruction = casual.slips(rng, instruction)
  reference_looks = [looks.random_look(rng, s) if wide and rng.random() < LOOKED else None for s in references]
  source_look = reference_looks[0] if task in ('edit', 'reconstruct') else None
  target_look = source_look.after(references[0], target) if source_look else None
  reference_size = reference_size or size
  return {
      'task': task,
      'references': [_image(s, look, reference_size)
                     for s, look in zip(references, reference_looks)] if images else [],
      'instruction': instruction, 'caption': text,
      'target': _image(target, target_look, size) if target and images else None, 'kind': kind, 'style': style,
      'source': [s.to_json() for s in references], 'scene': target.to_json() if target else '',
      'constraints': constraints_to_json(constraints) if constraints else '',
      **({'more': more} if more else {})}


def _image(scene: Scene, look: looks.Look | None, size: int) -> np.ndarray:
  return looks.draw(scene, look, size) if look else render(scene, size)
