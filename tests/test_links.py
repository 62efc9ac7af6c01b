"""Links of the documents, on GitHub and on the site that launch/docs.sh makes of docs/."""

import importlib.util
import pathlib
import pkgutil
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
DOCS = sorted((ROOT / 'docs').rglob('*.md'))
PAGES = [*(ROOT / folder / 'README.md' for folder in ('', 'benchmarks', 'launch')), *DOCS]


def without_code(text: str) -> str:
  """A page's text without fenced blocks and code in lines."""
  return re.sub(r'``.+?``|`[^`\n]*`', '', re.sub(r'^( *)```.*?^\1```', '', text, flags=re.DOTALL | re.MULTILINE))


def links(text: str) -> list[str]:
  """The targets of links and images that are no addresses of other servers."""
  targets = re.findall(r'\]\(<?([^)\s>]+)', without_code(text)) + re.findall(r'(?:href|src)="([^"]+)"', text)
  return [target for target in targets if not re.match(r'[a-z]+:', target)]


def anchors(text: str) -> set[str]:
  """The anchors of a page's headings by GitHub's rule: lower case, spaces to hyphens, no other punctuation.

  Of headings that are the same the first alone, since GitHub and the site number the others differently.
  """
  fenced = re.sub(r'^( *)```.*?^\1```', '', text, flags=re.DOTALL | re.MULTILINE)
  titles = re.findall(r'^#{1,6} +(.+?) *#*$', fenced, re.MULTILINE)
  shown = (re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', title) for title in titles)
  return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in shown}


@pytest.mark.parametrize('path', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
  for link in links(path.read_text()):
    name, _, anchor = link.partition('#')
    target = (path.parent / name).resolve() if name else path
    assert target.exists() and target.is_relative_to(ROOT), f'{link}: there is no such file'
    if anchor and target.suffix == '.md':
      assert anchor in anchors(target.read_text()), f'{link}: {target.name} has no such heading'


def test_dead_links_are_found():
  text = '# A & b, `c`\n[x](y.md#z) ![i](i.png "title") `[no](code)`\n```\n[no](code)\n# no\n```\n## [A](b) c\n[w](https://w.org)'
  assert links(text) == ['y.md#z', 'i.png', 'b']
  assert anchors(text) == {'a--b-c', 'a-c'}


def test_the_site_has_each_page_once():
  pages = re.findall(r': ([\w/]+\.md)$', (ROOT / 'mkdocs.yml').read_text(), re.MULTILINE)
  assert sorted(pages) == [str(path.relative_to(ROOT / 'docs')) for path in DOCS]


def test_links_out_of_docs_are_rewritten():
  """The hook of the generator changes them alone, and leaves code as it is."""
  spec = importlib.util.spec_from_file_location('links_of_the_site', ROOT / 'docs' / 'site' / 'links.py')
  hook = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(hook)
  text = ('[a](../README.md#b) ![i](x/i.png) [c](d.md#e) [f](#g) [w](https://w.org) `[h](../h)`\n'
          '```\n[h](../h)\n```\n[j](../unifusion_jax/flow.py)')
  expected = text.replace('](../README', '](https://r/README').replace('](../unifusion', '](https://r/unifusion')
  assert hook.rewritten(text, 'page.md', 'https://r/') == expected
  assert hook.rewritten('[a](../page.md) [b](../../LICENSE)', 'part/page.md', 'r/') == '[a](../page.md) [b](r/LICENSE)'


def test_the_reference_names_what_there_is():
  text = (ROOT / 'docs' / 'reference.md').read_text()
  blocks = re.findall(r'^::: ([\w.]+)\n(?:    options:\n      members: \[([^\]]*)\]\n)?', text, re.MULTILINE)
  assert len(blocks) >= 30
  for name, members in blocks:
    entry = pkgutil.resolve_name(name)
    assert entry.__doc__, f'{name} has no docstring'
    for member in filter(None, members.replace("'", '').split(', ')):
      assert getattr(entry, member).__doc__, f'{name}.{member} has no docstring'
