"""Tables in Markdown."""

from collections.abc import Iterable, Mapping, Sequence


def table(header: Sequence[str], body: Iterable[Sequence[str]], *, pad: bool = True) -> str:
  """A Markdown table, all columns but the first to the right; padded, it is straight in text."""
  rows = [list(header), *map(list, body)]
  rules = ['---', *['---:'] * (len(header) - 1)]
  if pad:
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    rows = [[row[0].ljust(first), *map(str.rjust, row[1:], others)] for row in rows]
    rules = ['-' * (first + 2), *('-' * (width + 1) + ':' for width in others)]
  lines = [f'| {" | ".join(row)} |' for row in rows]
  return '\n'.join([lines[0], f'|{"|".join(rules)}|', *lines[1:]])


def spread(values: Mapping[str, float]) -> str:
  """Median and quartiles, as in `2.5 [2, 3]`, of `median`, `low` and `high`."""
  low, median, high = (f'{values[key]:.3g}' for key in ('low', 'median', 'high'))
  return f'{median} [{low}, {high}]'
