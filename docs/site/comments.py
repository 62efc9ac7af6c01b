"""Extension of Griffe: how this code documents fields and arguments, for the reference.

The comment behind a field of a class is its documentation, and `a, b: text` in a docstring is of each argument.
"""

import ast
import re

import griffe

# 'a, b: text' with the lines below it that are indented further
_SHARED = re.compile(r'^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)', re.MULTILINE)


class Comments(griffe.Extension):

  def on_attribute_instance(self, *, node, attr, agent, **_) -> None:
    """Takes the comment on the last line of an attribute without a docstring."""
    if attr.docstring or not isinstance(node, ast.AST) or not attr.parent.is_class:
      return
    line = attr.lines_collection[attr.filepath][node.end_lineno - 1]
    _, sign, comment = line[node.end_col_offset:].partition('#')
    if sign:
      attr.docstring = griffe.Docstring(comment.strip(), lineno=node.end_lineno, endlineno=node.end_lineno, parent=attr)

  def on_function_instance(self, *, node, func, agent, **_) -> None:
    """Gives each argument of an entry of several an entry of its own."""
    def apart(match: re.Match) -> str:
      space, names, text = match.groups()
      names = names.split(', ')
      alone = all(name in func.parameters for name in names)
      return '\n'.join(f'{space}{name}: {text}' for name in names) if alone else match[0]

    if func.docstring:
      func.docstring.value = _SHARED.sub(apart, func.docstring.value)
