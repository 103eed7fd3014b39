"""Windows of weights for meta-training: histories of single weights with the weight to predict."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from know_jax.errors import UserError
from know_jax.known import HISTORY_LENGTH
from know_jax.meta.collect import Run
from know_jax.trees import KINDS

SPAN = HISTORY_LENGTH + 1
"""Stages of a window: the history and the next, hidden weight."""


@dataclasses.dataclass(frozen=True)
class Windows:
  """Weights of several runs, every run with the same share.

  Attributes:
    numbers: the runs' numbers.
    weights: kind -> float32 `[runs, M, SPAN]`, oldest first, the hidden weight last.
  """

  numbers: tuple[int, ...]
  weights: dict[str, np.ndarray]


def split_runs(
  numbers: Sequence[int], seed: int, shares: tuple[float, float]
) -> tuple[list[int], list[int], list[int]]:
  """Splits runs into training, validation and test, by run, at random.

  Args:
    numbers: the runs' numbers.
    seed: decides the split.
    shares: of validation and test.

  Returns:
    Three lists of numbers, ascending.

  Raises:
    UserError: a part would be empty.
  """
  order = np.random.default_rng(seed).permutation(sorted(numbers))
  validation, test = (round(share * len(order)) for share in shares)
  parts = np.split(order, [validation, validation + test])
  if not all(len(part) for part in parts):
    raise UserError(
      f'{len(order)} runs split into {len(parts[2])} for training, {validation} for validation and '
      f'{test} for test; wanted at least one in each: collect more runs.'
    )
  chosen, held_out, tested = parts[2], parts[0], parts[1]
  return sorted(chosen.tolist()), sorted(held_out.tolist()), sorted(tested.tolist())


def sample_windows(runs: Iterable[Run], per_run: int, seed: int) -> Windows:
  """Draws the same number of weights from every run and, within a run, from every leaf of a kind.

  Equal shares keep large layers and large networks from drowning small ones. Each run of T stages
  gives T - 5 windows (two for the paper's seven stages), drawn alike.

  Args:
    runs: finished runs; diverged ones are left out.
    per_run: M, weights of each kind and run.
    seed: decides which, together with the run's number.

  Raises:
    UserError: no run is left, or one lacks a kind of leaf or has too few stages.
  """
  numbers: list[int] = []
  columns: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
  for run in runs:
    if run.weights is None:
      continue
    numbers.append(run.number)
    for kind in KINDS:
      paths = sorted(path for path in run.weights if run.about['kinds'][path] == kind)
      leaves = [run.weights[path] for path in paths]
      if not leaves:
        raise UserError(f'run {run.number} has no leaf of kind {kind!r}; wanted at least one.')
      rng = np.random.default_rng([seed, run.number, KINDS.index(kind)])
      columns[kind].append(_draw(leaves, per_run, rng))
  if not numbers:
    raise UserError('no finished run is left to draw weights from; wanted at least one.')
  return Windows(tuple(numbers), {kind: np.stack(c) for kind, c in columns.items()})


def _draw(leaves: Sequence[np.ndarray], count: int, rng: np.random.Generator) -> np.ndarray:
  """`[count, SPAN]`: leaf, place and window drawn uniformly, with replacement."""
  stages = leaves[0].shape[0]
  if stages < SPAN:
    raise UserError(f'a run has {stages} stages; wanted at least {SPAN}.')
  flat = [leaf.reshape(stages, -1) for leaf in leaves]
  chosen = rng.integers(len(flat), size=count)
  start = rng.integers(stages - SPAN + 1, size=count)
  place = rng.random(count)
  found = np.empty((count, SPAN), np.float32)
  for i, leaf in enumerate(flat):
    rows = np.flatnonzero(chosen == i)
    columns = (place[rows] * leaf.shape[1]).astype(np.int64)
    found[rows] = leaf[start[rows, None] + np.arange(SPAN), columns[:, None]]
  return found
