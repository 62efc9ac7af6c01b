"""Extension of Griffe: the comment behind a field of a class is its documentation in the reference."""

import ast

import griffe


class Comments(griffe.Extension):

  def on_attribute_instance(self, *, node, attr, agent, **_) -> None:
    """Takes the comment on the last line of an attribute without a docstring."""
    if attr.docstring or not isinstance(node, ast.AST) or not attr.parent.is_class:
      return
    line = attr.lines_collection[attr.filepath][node.end_lineno - 1]
    _, sign, comment = line[node.end_col_offset:].partition('#')
    if sign:
      attr.docstring = griffe.Docstring(comment.strip(), lineno=node.end_lineno, endlineno=node.end_lineno, parent=attr)
