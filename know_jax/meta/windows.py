"""Windows of weights for meta-training: histories of single weights with the weight to predict."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from know_jax.errors import UserError
from know_jax.kinds import KINDS
from know_jax.meta.collect import Run
from know_jax.predictors import known_leaf
from know_jax.predictors.known import HISTORY_LENGTH

SPAN = HISTORY_LENGTH + 1
"""Stages of a window: the history and the next, hidden weight."""


@dataclasses.dataclass(frozen=True)
class Windows:
  """Weights of several runs (`numbers`), every run with the same share."""

  numbers: tuple[int, ...]
  # Kind -> float32 `[runs, M, SPAN]`, oldest first, the hidden weight last.
  weights: dict[str, np.ndarray]
  # Kind -> int32 `[runs, M]`, the row of `moments` of the leaf and window drawn from.
  leaves: dict[str, np.ndarray]
  moments: dict[str, np.ndarray]  # Kind -> float32 `[leaves and windows, S, S]`, as `leaf_moments`.
  rates: np.ndarray  # Float32 `[runs]`, r of each run.

  def copying(self, kind: str) -> np.ndarray:
    """The mean absolute error of copying the newest weight, float64 `[runs]`."""
    w = self.weights[kind]
    error = np.abs(w[..., -2].astype(np.float64) - w[..., -1]).mean(axis=1)
    return np.maximum(error, np.finfo(np.float32).tiny)


def split_runs(
  abouts: Mapping[int, Mapping[str, Any]], seed: int, shares: tuple[float, float]
) -> tuple[list[int], list[int], list[int]]:
  """Splits runs (number -> JSON file) into training, validation and test: three ascending lists.

  Tested are the runs with the highest numbers: they were collected last, so that nothing decided
  while a collection was under way can have seen them. Of the others, validation and training get
  like shares of every family and data set, at random. `shares` are those of validation and test.

  Raises:
    UserError: a part would be empty.
  """
  numbers = sorted(abouts)
  validation, test = (round(share * len(numbers)) for share in shares)
  rest, tested = numbers[: len(numbers) - test], numbers[len(numbers) - test :]
  rng = np.random.default_rng(seed)
  groups: dict[tuple[str, str], list[int]] = {}
  for number in rest:
    config = abouts[number]['config']
    groups.setdefault((config['model'], config['dataset']), []).append(number)
  # Every group is spread evenly over [0, 1), from a random start; the first stretch is validation.
  place: dict[int, float] = {}
  for _, members in sorted(groups.items()):
    start = rng.random()
    for i, number in enumerate(rng.permutation(members)):
      place[int(number)] = (start + i / len(members)) % 1.0
  order = sorted(place, key=lambda number: place[number])
  parts = sorted(order[validation:]), sorted(order[:validation]), tested
  if not all(parts):
    raise UserError(
      f'{len(numbers)} runs split into {len(parts[0])} for training, {len(parts[1])} for '
      f'validation and {len(parts[2])} for test; expected at least one in each: collect more runs.'
    )
  return parts


def sample_windows(runs: Iterable[Run], per_run: int, seed: int) -> Windows:
  """Draws the same number of weights from every run and, within a run, from every leaf of a kind.

  Equal shares keep large layers and large networks from drowning small ones. Each run of T stages
  gives T - 5 windows (two for the paper's seven stages), drawn alike. Diverged runs are left out.

  Raises:
    UserError: no run is left, or one lacks a kind of leaf, has too few stages or too large weights.
  """
  numbers: list[int] = []
  rates: list[float] = []
  weights: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
  rows: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
  moments: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
  for run in runs:
    if run.weights is None:
      continue
    numbers.append(run.number)
    rates.append(run.about['config']['rate'])
    for kind in KINDS:
      paths = sorted(path for path in run.weights if run.about['kinds'][path] == kind)
      leaves = [run.weights[path] for path in paths]
      if not leaves:
        raise UserError(f'run {run.number} has no leaf of kind {kind!r}; expected at least one.')
      rng = np.random.default_rng([seed, run.number, KINDS.index(kind)])
      result, row = _draw(leaves, per_run, rng)
      weights[kind].append(result)
      rows[kind].append(row + len(moments[kind]))
      for path, leaf in zip(paths, leaves, strict=True):
        of_leaf = [
          leaf_moments(leaf[start : start + HISTORY_LENGTH])
          for start in range(len(leaf) - SPAN + 1)
        ]
        if not np.isfinite(of_leaf).all():
          raise UserError(
            f'run {run.about.get("file", run.number)}: the weights of leaf {path!r} are so large '
            'that their squares overflow.'
          )
        moments[kind] += of_leaf
  if not numbers:
    raise UserError('no finished run is left to draw weights from; expected at least one.')
  return Windows(
    tuple(numbers),
    {kind: np.stack(result) for kind, result in weights.items()},
    {kind: np.stack(result) for kind, result in rows.items()},
    {kind: np.stack(result) for kind, result in moments.items()},
    np.asarray(rates, np.float32),
  )


def leaf_moments(history: np.ndarray) -> np.ndarray:
  """The mean second moments of a leaf's differences and newest weights: `[S, ...]` -> `[S, S]`."""
  flat = history.reshape(len(history), -1).astype(np.float64)
  v = known_leaf.host_basis(flat)
  with np.errstate(over='ignore'):  # Infinite, where float32 cannot hold them.
    return (v @ v.T / max(flat.shape[1], 1)).astype(np.float32)


def _draw(
  leaves: Sequence[np.ndarray], count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """`[count, SPAN]` and `[count]`: leaf, place and window drawn uniformly, with replacement.

  The second is the number of leaf and window: windows of the first leaf, of the second, ...
  """
  stages = leaves[0].shape[0]
  if stages < SPAN:
    raise UserError(f'a run has {stages} stages; expected at least {SPAN}.')
  windows = stages - SPAN + 1
  flat = [leaf.reshape(stages, -1) for leaf in leaves]
  chosen = rng.integers(len(flat), size=count)
  start = rng.integers(windows, size=count)
  place = rng.random(count)
  result = np.empty((count, SPAN), np.float32)
  for i, leaf in enumerate(flat):
    rows = np.flatnonzero(chosen == i)
    columns = (place[rows] * leaf.shape[1]).astype(np.int64)
    result[rows] = leaf[start[rows, None] + np.arange(SPAN), columns[:, None]]
  return result, (chosen * windows + start).astype(np.int32)


def fit_least_squares(windows: Windows) -> dict[str, list[float]]:
  """The linear step with the least squared error, relative to copying, the mean over runs.

  Kind -> the coefficients of the differences, oldest first, and of the newest weight, as
  `least_squares` takes them.
  """
  result = {}
  for kind in KINDS:
    normal, right = 0.0, 0.0
    for weights in windows.weights[kind].astype(np.float64):
      history, hidden = weights[:, :-1].T, weights[:, -1]
      v = known_leaf.host_basis(history)
      move = hidden - history[-1]
      scale = 1.0 / max(float((move**2).sum()), np.finfo(np.float64).tiny)
      normal, right = normal + scale * (v @ v.T), right + scale * (v @ move)
    result[kind] = np.linalg.lstsq(normal, right, rcond=None)[0].tolist()
  return result
