"""What the rows of a study say: arms side by side, in pairs, with intervals and tests."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from know_jax.errors import UserError
from know_jax.report import intervals
from know_jax.study.arms import MAIN
from know_jax.study.results import read_curve

Row = Mapping[str, Any]
Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Line:
  """All trainings of one arm at one step and amount of source data.

  Attributes:
    group: 'main' or that of an ablation.
    arm: its name.
    predictor: its predictor.
    step: n.
    amount: share of the source's data.
    rows: (source seed, transfer seed) -> row.
  """

  group: str
  arm: str
  predictor: str
  step: int
  amount: float
  rows: Mapping[Pair, Row]

  @property
  def first(self) -> Row:
    """Any row, for what all have in common."""
    return next(iter(self.rows.values()))

  @property
  def title(self) -> str:
    """The arm with the multiple of the data that it stands for."""
    return f'{self.arm} x{self.first["multiple"]:.3g}' if self.step else self.arm

  def values(self, column: str = 'accuracy') -> list[float]:
    """One column, a value for each training."""
    return [row[column] for row in self.rows.values()]

  def per_source(self, column: str) -> list[float]:
    """A column of the start, which all transfers from one source seed share; finite values only."""
    found = {source: row[column] for (source, _), row in self.rows.items()}
    return [value for value in found.values() if math.isfinite(value)]

  def mean(self, column: str) -> float:
    """The mean over source seeds of a column of the start; NaN where it is not defined."""
    values = self.per_source(column)
    return float(np.mean(values)) if values else math.nan


def lines_of(rows: Iterable[Row]) -> list[Line]:
  """Rows by arm, step and amount, in the order of the rows."""
  found: dict[tuple[str, str, str, int, float], dict[Pair, Row]] = {}
  for row in rows:
    key = (row['group'], row['arm'], row['predictor'], row['step'], row['amount'])
    found.setdefault(key, {})[row['source_seed'], row['transfer_seed']] = row
  return [Line(*key, members) for key, members in found.items()]


def naive_line(lines: Sequence[Line], amount: float) -> Line:
  """The line that others are compared with.

  Raises:
    UserError: there is none.
  """
  for line in lines:
    plain = line.first['batch_norm'] == 'keep' and line.first['lr_scale'] == 1
    is_naive = line.predictor == 'persistence' and plain
    if line.group == MAIN and line.amount == amount and is_naive:
      return line
  raise UserError(f'the results have no naive transfer for amount {amount:g}; run the study first.')


def differences(line: Line, reference: Callable[[Pair], float | None]) -> list[list[float]]:
  """Accuracy minus that of a reference, in points, a list for each source seed.

  Pairs without a reference, and trainings that diverged, are left out.
  """
  groups: dict[int, list[float]] = {}
  for pair, row in line.rows.items():
    other = reference(pair)
    if other is not None and math.isfinite(difference := row['accuracy'] - other):
      groups.setdefault(pair[0], []).append(100 * difference)
  return list(groups.values())


def to_line(other: Line) -> Callable[[Pair], float | None]:
  """The reference that another arm is, in the same pair."""
  return lambda pair: other.rows[pair]['accuracy'] if pair in other.rows else None


def is_sweep(line: Line) -> bool:
  """Whether a line is one strength of the shrink sweep."""
  return line.group == MAIN and line.predictor == 'shrink' and line.first['option'] != ''


def to_shrink_curve(line: Line, lines: Sequence[Line]) -> Callable[[Pair], float | None]:
  """The accuracy that shrinking gives, in the same pair, at the same weight norm.

  The sweep's accuracies, and that of naive transfer at norm 1, are joined by straight lines over
  the weight norm; norms beyond the sweep's have no reference.
  """
  sweep = [other for other in lines if other.amount == line.amount and is_sweep(other)]
  sweep.append(naive_line(lines, line.amount))

  def reference(pair: Pair) -> float | None:
    rows = [other.rows[pair] for other in sweep if pair in other.rows]
    points = sorted((row['weight_norm'], row['accuracy']) for row in rows)
    norms, accuracies = (np.array(values) for values in zip(*points, strict=True))
    norm = line.rows[pair]['weight_norm']
    if len(points) < 2 or not norms[0] <= norm <= norms[-1]:
      return None
    return float(np.interp(norm, norms, accuracies))

  return reference


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A paired difference in points, over source seeds and the transfers from each.

  Attributes:
    mean: the mean of the source seeds' means.
    low: lower end of the 95 % bootstrap interval.
    high: upper end.
    p_exact: of the sign-flip test over source seeds.
    p_t: of the paired t-test over source seeds.
    sources: how many source seeds.
    pairs: how many pairs.
  """

  mean: float
  low: float
  high: float
  p_exact: float
  p_t: float
  sources: int
  pairs: int

  @property
  def excludes_zero(self) -> bool:
    """Whether the interval does."""
    return self.low > 0 or self.high < 0


def compare(groups: Sequence[Sequence[float]]) -> Comparison | None:
  """Summary of `differences`; None if there are none."""
  if not groups:
    return None
  means = intervals.source_means(groups)
  low, high = intervals.bootstrap_interval(groups)
  return Comparison(
    mean=float(means.mean()),
    low=low,
    high=high,
    p_exact=intervals.sign_flip_test(means),
    p_t=intervals.paired_t_test(means),
    sources=len(groups),
    pairs=sum(len(group) for group in groups),
  )


def mean_curve(line: Line) -> list[tuple[int, float]]:
  """The learning curve of an arm: epoch and mean accuracy over the trainings that have one."""
  found: dict[int, list[float]] = {}
  for row in line.rows.values():
    for epoch, accuracy in read_curve(row['curve']):
      found.setdefault(epoch, []).append(accuracy)
  return [(epoch, float(np.mean(values))) for epoch, values in sorted(found.items())]


def cross_chosen(lines: Sequence[Line]) -> Line | None:
  """The best of several lines, chosen for each source seed by the other source seeds.

  Choosing on the very pairs that are then compared would flatter whatever has many lines to choose
  from. With one source seed there is nothing to choose by: the first line is taken.

  Returns:
    A line with rows of several; None if there is no line that never diverged.
  """
  whole = [line for line in lines if np.isfinite(line.values()).all()]
  if not whole:
    return None
  rows: dict[Pair, Row] = {}
  for source in dict.fromkeys(pair[0] for line in whole for pair in line.rows):

    def merit(line: Line, source: int = source) -> float:
      others = [row['accuracy'] for pair, row in line.rows.items() if pair[0] != source]
      return float(np.mean(others)) if others else -math.inf

    best = max(whole, key=merit)
    rows |= {pair: row for pair, row in best.rows.items() if pair[0] == source}
  return dataclasses.replace(whole[0], rows=rows)
