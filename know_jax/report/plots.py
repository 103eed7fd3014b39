"""Pictures. Matplotlib is imported where it draws, and draws to files only."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from know_jax import kinds as kinds_
from know_jax.trajectory import Trajectory

MARKERS = 'osD^vP*X<>hp'


def new_figure(width: float, height: float) -> Any:
  """An empty Matplotlib figure, in inches, that can be written to files."""
  # Figure and Agg canvas without pyplot: no global state, no display.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), layout='constrained')
  FigureCanvasAgg(figure)
  return figure


def plot_nowcast(
  path: Path,
  trajectory: Trajectory,
  predictions: Mapping[str, Sequence[Any]],
  history_loss: Sequence[float],
  rate: float,
  kinds: kinds_.Rules | None = None,
) -> None:
  """Draws a trajectory with its predictions in a plane, and test loss against amount of data.

  Predictions: predictor -> objects with `variables`, `multiple` and `loss`, nearest first; weights
  with NaN or infinity have no place in the plane. `history_loss` is the test loss of the stages,
  all data first; empty where none is known, and then only the trajectory is drawn.
  """
  history = [kinds_.flatten(stage, kinds) for stage in jax.device_get(trajectory)]
  points = {
    name: [v for p in group if np.isfinite(v := kinds_.flatten(p.variables, kinds)).all()]
    for name, group in predictions.items()
  }
  everything = np.stack([*history, *(x for group in points.values() for x in group)])
  plane, shares = principal_plane(everything)

  figure = new_figure(13, 5.5)
  left, *others = np.atleast_1d(figure.subplots(1, 2 if history_loss else 1))
  colors = {name: f'C{i % 10}' for i, name in enumerate(predictions)}

  past = plane[: len(history)]
  left.plot(*past.T, '-o', color='black', label='history (stages)')
  # The stages between lie on the line between; the label of the oldest is on its other side.
  across = np.where(past[0] > past[1], 6, -6) if len(past) > 1 else (6, 6)
  for age, point, at in ((len(past) - 1, past[0], across), (0, past[-1], (6, 6))):
    side = {'ha': 'left' if at[0] > 0 else 'right', 'va': 'bottom' if at[1] > 0 else 'top'}
    left.annotate(f'$\\Theta^{age}$', point, textcoords='offset points', xytext=at, **side)
  start = len(history)
  for i, (name, group) in enumerate(points.items()):
    ahead = np.vstack([past[-1:], plane[start : start + len(group)]])
    start += len(group)
    left.plot(*ahead.T, '--', color=colors[name], linewidth=1)
    left.plot(*ahead[1:].T, MARKERS[i % len(MARKERS)], color=colors[name], label=name)
  left.margins(0.1)  # So that the labels of the ends stay within.
  left.set_xlabel(f'first principal component ({shares[0]:.0%} of variance)')
  left.set_ylabel(f'second principal component ({shares[1]:.0%})')
  left.set_title('Predicted leaves of the network, in the plane that shows most of them')
  left.legend(fontsize=8)

  for right in others:
    _draw_losses(right, predictions, history_loss, rate, colors)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=110)


def _draw_losses(
  right: Any,
  predictions: Mapping[str, Sequence[Any]],
  history_loss: Sequence[float],
  rate: float,
  colors: Mapping[str, str],
) -> None:
  """Test loss against amount of data."""
  amounts = [rate**i for i in range(len(history_loss))]
  right.plot(amounts, history_loss, '-o', color='black', label='history (stages)')
  for i, (name, ahead_of) in enumerate(predictions.items()):
    right.plot(
      [1.0, *(p.multiple for p in ahead_of)],
      [history_loss[0], *(p.loss for p in ahead_of)],
      '--' + MARKERS[i % len(MARKERS)],
      color=colors[name],
      linewidth=1,
      label=name,
    )
  right.set_xscale('log', base=2)
  # Losses grow by orders of magnitude where a prediction fails; accuracies saturate before.
  right.set_yscale('log')
  right.axvline(1.0, color='grey', linewidth=0.5)
  right.set_xlabel('amount of data, as a multiple of the training set (beyond 1: predicted)')
  right.set_ylabel('test loss (mean cross-entropy) of the weights as they are')
  right.set_title('Before any further training')
  right.legend(fontsize=8)


def plot_learning_curves(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
  """Draws the curves of a meta-training: its loss, and the validation error of each kind of leaf.

  Lines of the metrics log have `step`, `loss` and `ratio_conv`, `ratio_fc`, `ratio_bias`.
  """
  figure = new_figure(10, 4)
  left, right = figure.subplots(1, 2)
  steps = [line['step'] for line in lines]
  left.plot(steps, [line['loss'] for line in lines], color='black')
  left.set_ylabel('training loss')
  for kind in kinds_.KINDS:
    right.plot(steps, [line[f'ratio_{kind}'] for line in lines], label=kind)
  right.axhline(1.0, color='grey', linewidth=0.5)
  right.set_ylabel('validation error / error of copying')
  right.legend()
  for axes in (left, right):
    axes.set_xlabel('step')
  figure.savefig(path, dpi=110)


def principal_plane(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Coordinates of points `[n, d]`, n > 1, in the plane of the two first principal components.

  `d` may be in the millions: only an n x n matrix is decomposed. Gives coordinates `[n, 2]` and the
  two components' shares of the variance, `[2]`. The sign of a component is such that the last point
  of the first half lies on its positive side or at 0.
  """
  centred = points.astype(np.float64) - points.mean(axis=0, dtype=np.float64)
  values, vectors = np.linalg.eigh(centred @ centred.T)
  values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
  coordinates = vectors[:, :2] * np.sqrt(values[:2])
  middle = coordinates[(len(points) - 1) // 2]
  coordinates = coordinates * np.where(middle < 0, -1.0, 1.0)
  return coordinates, values[:2] / max(values.sum(), np.finfo(np.float64).tiny)
