r"""Conversion rules of a model, between torch tensors (or slices of them) and our leaves.

A rule is (torch name, our path, pattern) or (torch name, our path, pattern, slices):

  torch name  a regex of plain text and `(\d+)` groups: r'model\.layers\.(\d+)\.mlp\.up_proj\.weight'
  our path    'blocks/mlp/up'. `\1` is the text of group 1; a group that the path does not use is the layer of a
              stacked leaf, the leading axis of ours that patterns leave out
  pattern     einops, from torch's layout to ours: 'o i y x -> y x i o', '(h k) d -> d h k', 'd 1 1 -> d'
  slices      for a torch tensor that holds several leaves: one letter of its layout and where this leaf lies on it.
              {'n': 0} of '(n h k) d -> d h k' is the q of a fused qkv; {'r': slice(0, -2)} of '(g r k) d -> d (g r) k'
              are InternLM2's queries, {'r': -2} its keys. The slices of a tensor must cover it exactly once.

The sizes of letters come from our leaf's shape, then from `axis_sizes`: needed for slices and for our fused axes.
Rules without a leaf in the module are ignored, so one table serves every configuration of a model.
"""

import dataclasses
import math
import re

import jax.numpy as jnp
import numpy as np

BLOCK = 2 ** 26  # bytes of a tensor that are read and rearranged at a time


def sources(leaves: dict, rules, axis_sizes: dict[str, int]) -> tuple[dict[str, list['Source']], list[str]]:
  """({path: its sources, layer by layer}, problems) of leaves {path: array or shape}."""
  templates = [Template(*rule) for rule in rules]
  by_path, problems, readers = {}, [], {}
  for path, leaf in leaves.items():
    matches = [(t, groups) for t in templates if (groups := t.match(path)) is not None]
    if len(matches) != 1:
      names = ' and '.join(t.name for t, _ in matches)
      problems.append(f'duplicate: {path} is filled by several rules: {names}' if names else
                      f'no rule: {path} {tuple(leaf.shape)} is a leaf of the model that no rule fills')
      continue
    template, groups = matches[0]
    try:
      by_path[path] = template.sources(groups, leaf.shape, axis_sizes)
    except ValueError as e:
      problems.append(f'rule {template.name} -> {path} {tuple(leaf.shape)}: {e}')
      continue
    for source in by_path[path]:
      readers.setdefault(source.name, []).append((path, source.layout))
  for name, users in readers.items():
    taken = sorted(i for _, layout in users for i in layout.taken())
    if taken != list(range(users[0][1].parts())):
      paths = ', '.join(path for path, _ in users)
      problems.append(f'slices: {name} must be used once and whole, but its rules use slices {taken} of '
                      f'{users[0][1].parts()} (for {paths})')
  return by_path, problems


@dataclasses.dataclass
class Template:
  """One rule."""
  name: str
  path: str
  pattern: str
  slices: dict = dataclasses.field(default_factory=dict)

  def match(self, path: str) -> dict[int, str] | None:
    """{group number: text} if this rule fills the leaf at `path`."""
    pieces = re.split(r'\\(\d)', self.path)
    regex = ''.join(rf'(?P<g{p}>\d+)' if i % 2 else re.escape(p) for i, p in enumerate(pieces))
    match = re.fullmatch(regex, path)
    return match and {int(g[1:]): text for g, text in match.groupdict().items()}

  def sources(self, groups: dict[int, str], shape, axis_sizes) -> list['Source']:
    """Sources of a leaf of that shape: one, or one for each layer."""
    literals = [text.replace(r'\.', '.') for text in self.name.split(r'(\d+)')]
    layer = set(range(1, len(literals))) - groups.keys()
    if len(layer) > 1 or any(re.search(r'[][\\(){}|*+?^$]', text) for text in literals):
      raise ValueError(r'a torch name is plain text with \. and (\d+), and all groups but one must be in our path')

    def name(layer_text):
      texts = [groups.get(g, layer_text) for g in range(1, len(literals))]
      return literals[0] + ''.join(text + literal for text, literal in zip(texts, literals[1:]))

    if not layer:
      return [Source(name(''), None, Layout.of(self.pattern, self.slices, shape, axis_sizes))]
    layout = Layout.of(self.pattern, self.slices, shape[1:], axis_sizes)
    return [Source(name(str(i)), i, layout) for i in range(shape[0])]


@dataclasses.dataclass
class Layout:
  """Axes of one torch tensor and one leaf (without its layer axis) with the same numbers.

  torch, ours: the letters of each axis. sizes: of every letter, in torch. span: where ours lies on a letter of torch.
  """
  torch: list[list[str]]
  ours: list[list[str]]
  sizes: dict[str, int]
  span: dict[str, tuple[int, int]]

  @classmethod
  def of(cls, pattern: str, slices: dict, shape, axis_sizes: dict[str, int]) -> 'Layout':
    torch, ours = [[(fused or single).split() if (fused or single) != '1' else []
                    for fused, single in re.findall(r'\(([^)]*)\)|([^\s()]+)', side)] for side in pattern.split('->')]
    flat_torch, flat_ours = sum(torch, []), sum(ours, [])
    dropped = {letter for letter, where in slices.items() if isinstance(where, int)}
    if sorted(flat_torch) != sorted(flat_ours + list(dropped)) or len(set(flat_torch)) != len(flat_torch):
      raise ValueError(f'the two sides of {pattern!r} do not have the same letters (slices {slices})')
    if len(ours) != len(shape):
      raise ValueError(f'{pattern!r} makes {len(ours)} axes')
    if len(slices) > 1 or any(isinstance(w, slice) and w.step not in (None, 1) for w in slices.values()):
      raise ValueError(f'slices {slices} must be one letter and one place or one unbroken slice')
    sizes = {axis[0]: n for axis, n in zip(ours, shape) if len(axis) == 1 and axis[0] not in slices}
    sizes |= {letter: axis_sizes[letter] for letter in flat_torch if letter not in sizes and letter in axis_sizes}
    span = {}
    for letter, where in slices.items():
      if letter not in sizes:
        raise ValueError(f'{pattern!r} needs the size of {letter} in axis_sizes, which has {axis_sizes}')
      start, stop, _ = (where if isinstance(where, slice) else slice(where, where + 1 or None)).indices(sizes[letter])
      span[letter] = (start, stop)
    for axis, n in zip(ours, shape):
      unknown = [letter for letter in axis if letter not in sizes]
      if len(unknown) > 1:
        raise ValueError(f'{pattern!r} needs the size of one of {unknown} in axis_sizes, '
                         f'which has {axis_sizes}')
      known = math.prod(span[a][1] - span[a][0] if a in span else sizes[a] for a in axis if a in sizes)
      if unknown and known and n % known == 0:
        sizes[unknown[0]] = n // known
      elif unknown or known != n:
        raise ValueError(f'an axis of {n} does not split as ({" ".join(axis)}) of {pattern!r} with {sizes} {slices}')
    return cls(torch, ours, sizes, {a: span.get(a, (0, sizes[a])) for a in flat_torch})

  def parts(self) -> int:
    """Number of pieces that leaves divide the torch tensor into (1: one leaf has it whole)."""
    return math.prod(self.sizes[a] for a in self.divided())

  def taken(self) -> list[int]:
    """Indices of our pieces among those of `parts`."""
    return list(range(*self.span[self.divided()[0]])) if self.divided() else [0]

  def divided(self) -> list[str]:
    return [a for a, (start, stop) in self.span.items() if stop - start != self.sizes[a]]

  def torch_shape(self) -> tuple[int, ...]:
    return tuple(math.prod(self.sizes[a] for a in axis) for axis in self.torch)

  def width(self, letter: str) -> int:
    return self.span[letter][1] - self.span[letter][0]

  def order(self) -> list[str]:
    """Our letters, then those that slices fix to one index."""
    flat = sum(self.ours, [])
    return flat + [a for axis in self.torch for a in axis if a not in flat]


@dataclasses.dataclass
class Source:
  """The torch tensor behind one leaf, or behind one layer of a stacked leaf."""
  name: str
  layer: int | None
  layout: Layout

  def problems(self, tensor, path: str, leaf) -> list[str]:
    """Reasons why a tensor cannot fill this leaf."""
    wanted = self.layout.torch_shape()
    if tuple(tensor.shape) != wanted:
      return [f'misshapen: {self.name} is {tuple(tensor.shape)} in torch and must be {wanted} '
              f'for our {path} {tuple(leaf.shape)}']
    if jnp.issubdtype(tensor.dtype, jnp.floating) != jnp.issubdtype(leaf.dtype, jnp.floating):
      return [f'dtype: {self.name} is {tensor.dtype} in torch and {leaf.dtype} in our {path}: quantised weights '
              'must be written back to floating point first']
    return []

  def blocks(self, index: tuple[slice, ...], itemsize: int):
    """`index` of our leaf (or layer) in pieces of about BLOCK bytes, along the axis that torch's rows lie on."""
    if not index:
      return [index]
    rows = self.layout.torch[0][0] if self.layout.torch[0] else None
    axis = next((i for i, letters in enumerate(self.layout.ours) if letters[:1] == [rows]), 0)
    whole = index[axis]
    size = math.prod(i.stop - i.start for i in index) * itemsize
    length = max(1, (whole.stop - whole.start) * BLOCK // max(size, 1))
    return [(*index[:axis], slice(start, min(start + length, whole.stop)), *index[axis + 1:])
            for start in range(whole.start, whole.stop, length)]

  def read(self, tensor, index: tuple[slice, ...]) -> np.ndarray:
    """Our leaf (or layer) at `index`, from the smallest box of the torch tensor around it."""
    layout = self.layout
    need, inside = dict(layout.span), []  # spans of letters in torch; slices of our axes within the box
    for axis, want in zip(layout.ours, index):
      if not axis:
        inside.append(want)
        continue
      inner = math.prod(layout.width(a) for a in axis[1:])
      start, stop = want.start // inner, -(-want.stop // inner)
      first = layout.span[axis[0]][0]
      need[axis[0]] = (first + start, first + stop)
      inside.append(slice(want.start - start * inner, want.stop - start * inner))
    box, pick, widths = [], [], []
    for axis in layout.torch:
      low, high, narrow = 0, 0, True  # once a letter spans more than one place, those after it are read whole
      for a in axis:
        start, stop = need[a] if narrow else (0, layout.sizes[a])
        low, high = low * layout.sizes[a] + start, high * layout.sizes[a] + stop - 1
        widths.append(stop - start)
        pick.append(slice(need[a][0] - start, need[a][1] - start))
        narrow = narrow and stop - start == 1
      box.append(slice(low, high + 1))
    x = np.asarray(tensor[tuple(box)]).reshape(widths)[tuple(pick)]
    flat = sum(layout.torch, [])
    x = x.transpose([flat.index(a) for a in layout.order()])
    sizes = dict(zip(layout.order(), x.shape))
    return x.reshape([math.prod(sizes[a] for a in axis) for axis in layout.ours])[tuple(inside)]

  def to_torch(self, x: np.ndarray) -> np.ndarray:
    """Our leaf (or layer) as a view with one axis for each letter of torch's layout."""
    layout = self.layout
    x = x.reshape([layout.width(a) for a in layout.order()])
    return x.transpose([layout.order().index(a) for a in sum(layout.torch, [])])

  def place(self, tensor: np.ndarray) -> np.ndarray:
    """The view of a whole torch tensor that `to_torch` fills."""
    layout = self.layout
    letters = sum(layout.torch, [])
    tensor = tensor.reshape([layout.sizes[a] for a in letters])
    return tensor[(..., *(slice(*layout.span[a]) for a in letters))]  # a view, of a scalar too
