"""The pictures of a study. Matplotlib is imported where it draws, and draws to files only."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from know_jax.report.plots import MARKERS, new_figure
from know_jax.study.analysis import Comparison, Line
from know_jax.study.arms import ANSWER


@contextlib.contextmanager
def _axes(path: Path, title: str, x: str, y: str) -> Iterator[Any]:
  """Axes with labels, written to a file when they are drawn."""
  figure = new_figure(9, 6)
  axes = figure.subplots()
  axes.set_title(title)
  axes.set_xlabel(x)
  axes.set_ylabel(y)
  yield axes
  if axes.get_legend_handles_labels()[1]:
    figure.legend(*axes.get_legend_handles_labels(), loc='outside right upper', fontsize=8)
  # No date and no version: the same results give the same file.
  figure.savefig(path, dpi=110, metadata={'Software': None})


def _style(i: int, arm: str) -> dict[str, Any]:
  """The arm of the answer stands out; of the others no two look alike."""
  from matplotlib import colormaps

  if arm.partition(' ')[0] == ANSWER:
    return {'color': 'black', 'marker': 'o', 'markersize': 6, 'linewidth': 2, 'zorder': 3}
  # Ten strong colours, then ten pale ones.
  color = colormaps['tab20'](2 * i % 20 + i // 10 % 2)
  return {'color': color, 'marker': MARKERS[i % len(MARKERS)], 'markersize': 5, 'linewidth': 1}


def _show_gains(axes: Any) -> None:
  """An axis on which a gain of half a point can be seen beside a loss of twenty."""
  axes.axhline(0.0, color='grey', linewidth=0.8)
  axes.yaxis.set_major_formatter('{x:+g}')
  low, high = axes.get_ylim()
  if max(-low, high) <= 10:
    return
  axes.set_yscale('symlog', linthresh=4, linscale=2)
  axes.yaxis.set_major_formatter('{x:+g}')
  low, high = axes.get_ylim()
  ticks = (-40, -20, -10, *range(-4, 5), 10, 20, 40)
  axes.set_yticks([tick for tick in ticks if low <= tick <= high])
  axes.set_ylabel(f'{axes.get_ylabel()} (logarithmic beyond 4)')


def _scale_x(axes: Any) -> None:
  """A logarithmic axis with plain numbers."""
  from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

  axes.set_xscale('log')
  low, high = axes.get_xlim()
  if high < 4 * low:
    # So narrow that powers of ten would leave it without a number.
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.minorticks_off()
  else:
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
  axes.xaxis.set_major_formatter('{x:g}')
  axes.xaxis.set_minor_formatter(NullFormatter())


def gains_by_step(path: Path, title: str, gains: Sequence[tuple[Line, Comparison]]) -> None:
  """Draws gains over naive transfer with their intervals, in points, by multiple of the data."""
  arms = list(dict.fromkeys(line.arm for line, _ in gains))
  with _axes(path, title, 'multiple of the data', 'points over naive transfer') as axes:
    for i, arm in enumerate(arms):
      mine = [(line.first['multiple'], result) for line, result in gains if line.arm == arm]
      # Side by side, so that intervals do not hide one another.
      x = [multiple * (1 + 0.012 * (i - len(arms) / 2)) for multiple, _ in mine]
      y = [result.mean for _, result in mine]
      below = [max(result.mean - result.low, 0.0) for _, result in mine]
      above = [max(result.high - result.mean, 0.0) for _, result in mine]
      axes.errorbar(x, y, [below, above], label=arm, capsize=2, **_style(i, arm))
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter('x{x:g}')
    _show_gains(axes)


def accuracy_by_step(path: Path, title: str, lines: Sequence[Line], newest: Line) -> None:
  """Draws accuracy (%) of predicted weights on the source task, from the newest weight's on."""
  with _axes(path, title, 'multiple of the data', 'accuracy on the source task, %') as axes:
    for i, arm in enumerate(dict.fromkeys(line.arm for line in lines)):
      mine = [line for line in lines if line.arm == arm]
      x = [1.0, *(line.first['multiple'] for line in mine)]
      y = [100 * line.mean('source_accuracy') for line in (newest, *mine)]
      axes.plot(x, y, label=arm, **_style(i, arm))
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter('x{x:g}')


def learning_curves(path: Path, title: str, curves: Mapping[str, pd.Series]) -> None:
  """Draws mean accuracy by epoch of fine-tuning; curves: arm -> accuracy in [0, 1] by epoch."""
  with _axes(path, title, 'epoch of fine-tuning', 'accuracy on the target task, %') as axes:
    for i, (arm, curve) in enumerate(curves.items()):
      axes.plot(curve.index, 100 * curve, label=arm, **_style(i, arm))


def scatter(
  path: Path, title: str, points: pd.DataFrame, x: str, curve: Sequence[tuple[float, float]] = ()
) -> None:
  """Draws the gain of predictions against something else of theirs, positive, by its logarithm.

  Points have `arm`, `x` and `gain` in points; the steps of an arm are joined, nearest first.
  `curve` is (x, gain) of the shrink sweep.
  """
  with _axes(path, title, x, 'points over naive transfer') as axes:
    if curve:
      axes.plot(*zip(*curve, strict=True), '-o', color='grey', markersize=3, label='shrink sweep')
    for i, (arm, mine) in enumerate(points.groupby('arm', sort=False)):
      axes.plot(mine['x'], mine['gain'], label=arm, **{**_style(i, arm), 'linewidth': 0.5})
    if len(points):
      _scale_x(axes)
    _show_gains(axes)
