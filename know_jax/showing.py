"""How objects show themselves: at most a screen of text, and a table in a notebook."""

import html
from collections.abc import Sequence
from typing import Any

from know_jax.trees import PyTree, dtype_of, is_array, named_leaves

_ROWS = 20  # Of a table that is shown; the rest is counted.

Table = tuple[Sequence[str], Sequence[Sequence[Any]]]
"""The names of the columns, and the cells of each row."""


def leaves_table(tree: PyTree, axes: int = 0) -> Table:
  """Path, shape and dtype of every leaf, shapes without the first `axes` axes."""
  rows = []
  for path, leaf in named_leaves(tree).items():
    if is_array(leaf):
      rows.append((path, str(list(leaf.shape[axes:])), str(dtype_of(leaf))))
    else:
      rows.append((path, '', type(leaf).__name__))
  return ('leaf', 'shape', 'dtype'), rows


def as_text(title: str, table: Table) -> str:
  """A title and a table, the first column to the left, at most a screen of them."""
  header, rows, more = _shown(table)
  lines = [title]
  if rows:
    cells = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines += ['  '.join(map(str.ljust, row, widths)).rstrip() for row in cells]
  return '\n'.join([f'{lines[0]}{":" if rows else ""}', *(f'  {x}' for x in lines[1:]), *more])


def as_html(title: str, table: Table) -> str:
  """The same for a notebook."""
  header, rows, more = _shown(table)

  def row(cells: Sequence[str], tag: str) -> str:
    return '<tr>' + ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells) + '</tr>'

  body = [row(header, 'th'), *(row(cells, 'td') for cells in rows)] if rows else []
  notes = ''.join(f'<p>{html.escape(note.strip())}</p>' for note in more)
  return f'<p>{html.escape(title)}</p><table>{"".join(body)}</table>{notes}'


def _shown(table: Table) -> tuple[list[str], list[list[str]], list[str]]:
  header, rows = table
  cells = [[_short(cell) for cell in row] for row in rows[:_ROWS]]
  more = len(rows) - len(cells)
  return list(header), cells, [f'  and {more} more'] if more else []


def _short(value: Any) -> str:
  if isinstance(value, float):
    return f'{value:.4g}'
  text = ' '.join(str(value).split())
  return text if len(text) <= 60 else f'{text[:57]}...'
