"""Hook of MkDocs: links that lead out of docs/ show the file where the repository is shown.

On GitHub such links work as they stand. `extra.files` is the address before a file's path, as
https://github.com/OWNER/NAME/blob/HEAD/; without one it is this checkout.
"""

import pathlib
import posixpath
import re

ROOT = pathlib.Path(__file__).parent.parent.parent
# Code, in which nothing is a link, or the target of a link up to its anchor
_CODE_OR_LINK = re.compile(r'^( *)```.*?^\1```|``.+?``|`[^`\n]+`|(?<=\]\()([^)#\s]+)', re.MULTILINE | re.DOTALL)


def rewritten(markdown: str, page: str, files: str) -> str:
  """A page's text with links out of docs/ below the address `files`; page: its path within docs/."""
  def link(match: re.Match) -> str:
    target = match[2]
    if target is None or '://' in target or target.startswith('mailto:'):
      return match[0]
    path = posixpath.normpath(posixpath.join('docs', posixpath.dirname(page), target))
    return match[0] if path.startswith('docs/') else files + path
  return _CODE_OR_LINK.sub(link, markdown)


def on_page_markdown(markdown, page, config, **_):
  return rewritten(markdown, page.file.src_uri, config.extra['files'] or f'{ROOT.as_uri()}/')
