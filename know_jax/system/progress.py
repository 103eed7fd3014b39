"""A progress bar with rate and time left, in a terminal or a log."""

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any, Protocol, TextIO

_BAR_SECONDS = {True: 0.1, False: 10.0}


class Bar(Protocol):
  """What `progress` yields."""

  def update(self, n: float = 1) -> Any:
    """Counts `n` more units."""

  def set_postfix(self, *args: Any, **kwargs: Any) -> Any:
    """Shows values by name at the end of the bar, from the next update on."""


@contextlib.contextmanager
def progress(
  total: int,
  desc: str,
  unit: str,
  *,
  initial: float = 0,
  show: bool = True,
  scale: bool = False,
) -> Iterator[Bar]:
  """A progress bar on stderr with rate and time left.

  Args:
    total: how many units there are.
    desc: what is being done.
    unit: what is counted, as in 'step'.
    initial: units done before, which the rate leaves out.
    show: False: count in silence.
    scale: whether large numbers are shown as 1.23M.

  Yields:
    The bar, with `update(n=1)` and `set_postfix(name=value)`, which the next update shows. Where
    stderr is no terminal it prints a line every 10 seconds.
  """
  from tqdm import tqdm

  terminal = sys.stderr.isatty()
  bar = tqdm(
    total=total,
    desc=desc,
    unit=f' {unit}',
    initial=initial,
    unit_scale=scale,
    disable=not show,
    mininterval=_BAR_SECONDS[terminal],
    maxinterval=10.0,
    dynamic_ncols=terminal,
    file=sys.stderr if terminal else _Lines(sys.stderr),
  )
  # By default it draws the bar at once, however lately that was done.
  bar.set_postfix = functools.partial(bar.set_postfix, refresh=False)
  with bar:
    yield bar


class _Lines:
  """A text file in which a bar leaves lines, in place of carriage returns that only add up."""

  def __init__(self, file: TextIO):
    self._file = file

  def write(self, text: str) -> None:
    # tqdm pads the new state to the length of the old one, and ends the bar with a line's end.
    if text := text.strip():
      self._file.write(f'{text}\n')

  def flush(self) -> None:
    self._file.flush()
