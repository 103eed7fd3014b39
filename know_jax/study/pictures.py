"""The pictures of a study. Matplotlib is imported where it draws, and draws to files only."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from know_jax.plots import MARKERS, new_figure


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


def _style(i: int) -> dict[str, Any]:
  return {'color': f'C{i % 10}', 'marker': MARKERS[i % len(MARKERS)], 'markersize': 5}


def gains_by_step(
  path: Path, series: Mapping[str, Sequence[tuple[float, ...]]], title: str
) -> None:
  """Draws gains with intervals.

  Args:
    path: the PNG file to write.
    series: arm -> (multiple of the data, gain, low, high), in points.
    title: of the picture.
  """
  with _axes(path, title, 'multiple of the data', 'points over naive transfer') as axes:
    axes.axhline(0.0, color='black', linewidth=0.8)
    for i, (arm, points) in enumerate(series.items()):
      # Side by side, so that intervals do not hide one another.
      x = [multiple * (1 + 0.012 * (i - len(series) / 2)) for multiple, *_ in points]
      mean = [p[1] for p in points]
      errors = [[max(p[1] - p[2], 0.0) for p in points], [max(p[3] - p[1], 0.0) for p in points]]
      axes.errorbar(x, mean, errors, label=arm, linewidth=1, capsize=2, **_style(i))
    axes.set_xscale('log', base=2)


def accuracy_by_step(
  path: Path, series: Mapping[str, Sequence[tuple[float, float]]], start: float, title: str
) -> None:
  """Draws accuracy (%) of predicted weights on the source task, from the newest weight's on.

  Args:
    path: the PNG file to write.
    series: arm -> (multiple of the data, accuracy).
    start: the accuracy of the newest weight.
    title: of the picture.
  """
  with _axes(path, title, 'multiple of the data', 'accuracy on the source task, %') as axes:
    for i, (arm, points) in enumerate(series.items()):
      x, y = zip((1.0, start), *points, strict=True)
      axes.plot(x, y, label=arm, linewidth=1, **_style(i))
    axes.set_xscale('log', base=2)


def learning_curves(
  path: Path, series: Mapping[str, Sequence[tuple[int, float]]], title: str
) -> None:
  """Draws mean accuracy by epoch of fine-tuning.

  Args:
    path: the PNG file to write.
    series: arm -> (epoch, accuracy in [0, 1]).
    title: of the picture.
  """
  with _axes(path, title, 'epoch of fine-tuning', 'accuracy on the target task, %') as axes:
    for i, (arm, points) in enumerate(series.items()):
      x, y = zip(*points, strict=True)
      axes.plot(x, [100 * value for value in y], label=arm, linewidth=1, **_style(i))


def scatter(
  path: Path,
  points: Sequence[tuple[str, float, float]],
  x: str,
  title: str,
  curve: Sequence[tuple[float, float]] = (),
  *,
  log: bool = False,
) -> None:
  """Draws the gain of predictions against something else of theirs.

  Args:
    path: the PNG file to write.
    points: arm, x, gain in points; the steps of an arm, nearest first, are joined by a line.
    x: what x is.
    title: of the picture.
    curve: (x, gain) of the shrink sweep, drawn as a line.
    log: whether x is on a logarithmic axis.
  """
  with _axes(path, title, x, 'points over naive transfer') as axes:
    axes.axhline(0.0, color='black', linewidth=0.8)
    if curve:
      axes.plot(*zip(*curve, strict=True), '-o', color='grey', markersize=3, label='shrink sweep')
    arms = dict.fromkeys(arm for arm, _, _ in points)
    for i, name in enumerate(arms):
      x_values, gains = zip(*((at, gain) for arm, at, gain in points if arm == name), strict=True)
      axes.plot(x_values, gains, linewidth=0.5, label=name, **_style(i))
    if log and points:
      axes.set_xscale('log')
