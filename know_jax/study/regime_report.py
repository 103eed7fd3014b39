"""The page of `know_jax.study.regime`: every arm, and what the fixed bounds decide."""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from know_jax.errors import UserError
from know_jax.io.files import write_atomic
from know_jax.io.journal import read_lines
from know_jax.report import intervals
from know_jax.study.regime import SOURCE, Arm
from know_jax.study.tables import table

MATTERS = 0.3
"""Points; see `know_jax.study.regime`."""

NAIVE, RESET = Arm('naive', batch_norm='keep').name, Arm('naive').name
OFFICIAL, MATCHED = Arm('official x8').name, Arm('naive', 'matched').name
RADIAL, TANGENTIAL = Arm('official x8, radial').name, Arm('official x8, tangential').name

Scores = Mapping[str, Mapping[int, float]]
"""Arm -> source -> accuracy in per cent."""


class Difference(NamedTuple):
  """Of two arms in points, paired by source.

  Attributes:
    mean: over sources.
    low: of the 95 % t-interval; NaN for fewer than two sources.
    high: likewise.
    sources: how many have both.
    p: of the paired t-test.
  """

  mean: float
  low: float
  high: float
  sources: int
  p: float

  @property
  def matters(self) -> bool:
    """Whether it is at least `MATTERS`, and its interval does not hold zero."""
    return abs(self.mean) >= MATTERS and (self.low > 0 or self.high < 0)


def difference(scores: Scores, arm: str, other: str) -> Difference | None:
  """An arm minus another; None where no source has both."""
  both = sorted(set(scores.get(arm, {})) & set(scores.get(other, {})))
  values = [scores[arm][seed] - scores[other][seed] for seed in both]
  if not values:
    return None
  low, high = intervals.t_interval(values)
  return Difference(
    statistics.mean(values), low, high, len(values), intervals.paired_t_test(values)
  )
