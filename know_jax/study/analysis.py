"""What the rows of a study say: arms side by side, in pairs, with intervals and tests."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from know_jax.errors import UserError
from know_jax.report import intervals
from know_jax.study.arms import MAIN, UNPREDICTED
from know_jax.study.results import read_curve

PAIR = ['source_seed', 'transfer_seed']
"""What the rows of a line are indexed by; arms are compared in the same pair."""

_LINE = ['group', 'arm', 'predictor', 'step', 'amount']


@dataclasses.dataclass(frozen=True)
class Line:
  """All trainings of one arm, at one step n and one share (`amount`) of the source's data.

  `group` is 'main' or that of an ablation; `rows` are those of results.csv, by source seed and
  transfer seed.
  """

  group: str
  arm: str
  predictor: str
  step: int
  amount: float
  rows: pd.DataFrame

  @property
  def first(self) -> pd.Series:
    """Any row, for what all have in common."""
    return self.rows.iloc[0]

  @property
  def title(self) -> str:
    """The arm with the multiple of the data that it stands for."""
    return f'{self.arm} x{self.first["multiple"]:.3g}' if self.step else self.arm

  def mean(self, column: str) -> float:
    """The mean over source seeds of a column of the start; NaN where it is not defined."""
    starts = self.rows[column].groupby(level=0).last().astype(float)
    return float(starts[np.isfinite(starts)].mean())


def lines_of(rows: pd.DataFrame) -> list[Line]:
  """Rows by arm, step and amount, in the order of the rows; of equal pairs the last counts."""
  rows = rows.drop_duplicates([*_LINE, *PAIR], keep='last')
  groups = rows.groupby(_LINE, sort=False)
  return [
    Line(group, arm, predictor, step, amount, members.set_index(PAIR, drop=False))
    for (group, arm, predictor, step, amount), members in groups
  ]


def trainings(rows: pd.DataFrame) -> int:
  """How many trainings rows are of: arms of equal weights and rate share theirs."""
  begun = rows[rows['weights'] != '']
  return len(begun.drop_duplicates(['weights', 'lr_scale', *PAIR]))


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


def is_sweep(line: Line) -> bool:
  """Whether a line is one strength of the shrink sweep."""
  return line.group == MAIN and line.predictor == 'shrink' and line.first['option'] != ''


def shrink_curve(line: Line, lines: Sequence[Line]) -> pd.Series:
  """The accuracy that shrinking gives, in the same pair, at the same weight norm.

  The sweep's accuracies, and that of naive transfer at norm 1, are joined by straight lines over
  the weight norm; norms beyond the sweep's have no reference, NaN.
  """
  sweep = [other for other in lines if other.amount == line.amount and is_sweep(other)]
  points = pd.concat([other.rows for other in [*sweep, naive_line(lines, line.amount)]])
  points = points.sort_values(['weight_norm', 'accuracy'])
  curves = dict(list(points.groupby(level=[0, 1])))

  def at(pair: tuple[int, int], norm: float) -> float:
    if pair not in curves or len(curve := curves[pair]) < 2:
      return math.nan
    return float(
      np.interp(norm, curve['weight_norm'], curve['accuracy'], left=math.nan, right=math.nan)
    )

  norms = line.rows['weight_norm']
  return pd.Series([at(pair, norm) for pair, norm in norms.items()], norms.index)


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A paired difference in points: the mean of the source seeds' means, with intervals and tests.

  `low` and `high` end the 95 % bootstrap interval, `t_low` and `t_high` Student's over source seeds
  (NaN for one); `p_exact` is of the sign-flip test, `p_t` of the paired t-test, over source seeds.
  """

  mean: float
  low: float
  high: float
  t_low: float
  t_high: float
  p_exact: float
  p_t: float
  sources: int
  pairs: int

  @property
  def excludes_zero(self) -> bool:
    """Whether the interval does."""
    return self.low > 0 or self.high < 0


def differences(line: Line, reference: Line | pd.Series) -> pd.Series:
  """Accuracy minus that of another line, or of numbers, in the same pair, in points.

  Pairs without a reference, and trainings that diverged, are left out.
  """
  other = reference.rows['accuracy'] if isinstance(reference, Line) else reference
  result = 100 * (line.rows['accuracy'] - other.reindex(line.rows.index)).astype(float)
  return result[np.isfinite(result)]


def compare(line: Line | None, reference: Line | pd.Series | None) -> Comparison | None:
  """Summary of `differences`; None where there are none, or one of the two is None."""
  if line is None or reference is None:
    return None
  result = differences(line, reference).groupby(level=0, sort=False)
  groups = [members.to_numpy() for _, members in result]
  if not groups:
    return None
  means = intervals.source_means(groups)
  low, high = intervals.bootstrap_interval(groups)
  t_low, t_high = intervals.t_interval(means)
  return Comparison(
    mean=float(means.mean()),
    low=low,
    high=high,
    t_low=t_low,
    t_high=t_high,
    p_exact=intervals.sign_flip_test(means),
    p_t=intervals.paired_t_test(means),
    sources=len(groups),
    pairs=sum(map(len, groups)),
  )


def beyond_shrinking(
  lines: Sequence[Line], amount: float
) -> list[tuple[Line, Comparison, Comparison]]:
  """What main arms that predict, but do not shrink, gain over naive transfer and over shrinking.

  The second is against the shrink sweep at the line's weight norm; lines whose norm lies beyond the
  sweep's are left out.
  """
  naive, result = naive_line(lines, amount), []
  for line in lines:
    predicted = line.predictor not in (*UNPREDICTED, 'persistence', 'shrink')
    if line.group == MAIN and line.amount == amount and predicted:
      to_naive, to_shrink = compare(line, naive), compare(line, shrink_curve(line, lines))
      if to_naive and to_shrink:
        result.append((line, to_naive, to_shrink))
  return result


def mean_curve(line: Line) -> pd.Series:
  """The learning curve of an arm: the mean accuracy by epoch, over the trainings that have one."""
  points = [point for text in line.rows['curve'] for point in read_curve(text)]
  return pd.DataFrame(points, columns=['epoch', 'accuracy']).groupby('epoch')['accuracy'].mean()


def cross_chosen(lines: Sequence[Line]) -> Line | None:
  """The best of several lines, chosen for each source seed by the other source seeds.

  Choosing on the very pairs that are then compared would flatter whatever has many lines to choose
  from. With one source seed there is nothing to choose by: the first line is taken.

  Returns:
    A line with rows of several; None if there is no line that never diverged.
  """
  whole = [line for line in lines if np.isfinite(line.rows['accuracy'].astype(float)).all()]
  if not whole:
    return None
  accuracies = pd.concat([line.rows['accuracy'].astype(float) for line in whole], axis=1)
  sources = accuracies.index.get_level_values(0)
  chosen = []
  for source in sources.unique():
    merits = accuracies[sources != source].mean().fillna(-math.inf)
    rows = whole[int(merits.to_numpy().argmax())].rows
    chosen.append(rows[rows.index.get_level_values(0) == source])
  return dataclasses.replace(whole[0], rows=pd.concat(chosen))
