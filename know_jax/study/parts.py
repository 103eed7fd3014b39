"""Parts of a prediction, and predictions of altered histories: where a gain comes from."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from know_jax import trees
from know_jax.kinds import leaf_kinds
from know_jax.nowcast import api
from know_jax.predictors.known import HISTORY_LENGTH


def radial(newest: Any, predicted: Any) -> Any:
  """Of a prediction what lies along the newest weights, leaf by leaf: <p, w> / <w, w> w."""
  return jax.tree.map(lambda w, p: _share(w, p) * w, newest, predicted)


def tangential(newest: Any, predicted: Any) -> Any:
  """The newest weights and, of a prediction, what does not lie along them, leaf by leaf."""
  return jax.tree.map(lambda w, p: w + p - _share(w, p) * w, newest, predicted)


def at_norms_of(newest: Any, predicted: Any) -> Any:
  """The newest weights, every leaf scaled to the norm that it has in a prediction."""

  def scaled(w: np.ndarray, p: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(w)
    return w * np.float32(np.linalg.norm(p) / norm) if norm else w

  return jax.tree.map(scaled, newest, predicted)


def _share(w: np.ndarray, p: np.ndarray) -> np.float32:
  squares = np.vdot(w, w)
  return np.float32(np.vdot(w, p) / squares) if squares else np.float32(1)


def scaled_biases(history: Sequence[Any], steps: int, theta: Any) -> Any:
  """The authors' networks, biases in the units of their earlier code, step by step.

  Each bias's history minus its oldest value, over twice its range (and 1e-5), is what the network
  sees, and what it gives is scaled back.
  """
  kinds = leaf_kinds(history[-1])
  window = [trees.named_leaves(jax.device_get(stage)) for stage in history[-HISTORY_LENGTH:]]
  for _ in range(steps):
    offset, unit = dict.fromkeys(kinds, np.float32(0)), dict.fromkeys(kinds, np.float32(1))
    for path in (path for path, kind in kinds.items() if kind == 'bias'):
      values = np.stack([stage[path] for stage in window])
      offset[path], unit[path] = values[0], 2 * (np.ptp(values, axis=0) + 1e-5)
    seen = [
      {path: ((x - offset[path]) / unit[path]).astype(np.float32) for path, x in stage.items()}
      for stage in window
    ]
    moved = api.predict(
      seen, 1, predictor='known', theta=theta, kinds=lambda path, _: kinds[path], on_bad='ignore'
    )
    back = {p: (np.asarray(moved[p]) * unit[p] + offset[p]).astype(np.float32) for p in seen[-1]}
    window = [*window[1:], back]
  return jax.tree.unflatten(jax.tree.structure(history[-1]), list(window[-1].values()))


PARTS: dict[str, Callable[[Any, Any], Any]] = {
  'radial': radial,
  'tangential': tangential,
  'norms': at_norms_of,
}
"""Name -> (newest weights, predicted weights) -> the weights that an arm transfers."""

SCALED_BIASES = 'scaled biases'
"""In place of a part: the prediction of `scaled_biases`, which KNOWN's parameters alone have."""

HISTORIES: dict[str, Callable[[Sequence[Any]], list[Any]]] = {
  'reversed': lambda history: [*history[-2::-1], history[-1]],
  'rotated': lambda history: [history[-2], *history[:-2], history[-1]],
}
"""Name -> stages, oldest first, in another order: what is left if a trajectory has no direction.

The newest stage stays the newest, as it is what every start begins with.
"""
