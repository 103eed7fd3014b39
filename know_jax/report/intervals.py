"""Paired comparisons with few repetitions: bootstrap over two levels, exact tests, Holm.

A study trains from a few source seeds and, from each, with a few transfer seeds. Transfers from one
source share its weights, so that they are no independent repetitions: intervals and tests count
source seeds.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from know_jax.errors import UserError

_MOST_FLIPS = 20  # 2^20 sign patterns are counted, in 0.1 s; more would only take memory.


def source_means(groups: Sequence[Sequence[float]]) -> np.ndarray:
  """The mean of each source seed's differences, float64 `[sources]`."""
  return np.array([np.mean(np.asarray(group, np.float64)) for group in groups])


def bootstrap_interval(
  groups: Sequence[Sequence[float]],
  *,
  level: float = 0.95,
  resamples: int = 10000,
  seed: int = 0,
) -> tuple[float, float]:
  """A percentile interval for the mean of source means, by a bootstrap over two levels.

  Sources are drawn with replacement, then, within each, its values (Davison and Hinkley, Bootstrap
  methods and their application, 1997, section 3.8). With one source only its values are drawn: the
  interval then says nothing of other sources. `groups` are the values of each source, of any
  length.

  Raises:
    UserError: there is no source, or one has no value.
  """
  lengths = np.array([len(group) for group in groups])
  if not lengths.size or not lengths.all():
    raise UserError(f'the groups have {lengths.tolist()} values; expected at least one in each.')
  values = np.zeros((lengths.size, lengths.max()))
  for row, group in zip(values, groups, strict=True):
    row[: len(group)] = group
  rng = np.random.default_rng(seed)
  sources = rng.integers(lengths.size, size=(resamples, lengths.size))
  drawn = rng.random((*sources.shape, lengths.max()))
  chosen = (drawn * lengths[sources][..., None]).astype(np.int64)
  counted = np.arange(lengths.max()) < lengths[sources][..., None]
  sums = (values[sources[..., None], chosen] * counted).sum(-1)
  means = (sums / lengths[sources]).mean(-1)
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def sign_flip_test(differences: ArrayLike) -> float:
  """The exact two-sided p of a mean of zero, if each difference could have had the other sign.

  The share of the 2^n sign patterns whose mean is at least as far from zero as the one found
  (Fisher, The design of experiments, 1935). It is never below `smallest_p(n)`.

  Raises:
    UserError: there are no differences, or more than 20, too many to count all patterns.
  """
  values = np.asarray(differences, np.float64)
  if not 1 <= values.size <= _MOST_FLIPS:
    raise UserError(f'found {values.size} differences; expected 1 to {_MOST_FLIPS}.')
  sums = np.zeros(1)
  for value in values:
    sums = np.concatenate([sums + value, sums - value])
  # Patterns that tie with the one found must count, whatever rounding did to their sums.
  slack = 1e-9 * np.abs(values).sum()
  return float((np.abs(sums) >= abs(values.sum()) - slack).mean())


def smallest_p(n: int) -> float:
  """The least that `sign_flip_test` of n differences can give: all signs, or none, are flipped."""
  return min(1.0, 2.0 ** (1 - n))


def paired_t_test(differences: ArrayLike) -> float:
  """The two-sided p of Student's t-test for a mean of zero; NaN for fewer than two differences.

  It assumes normal differences, which a handful cannot show; `sign_flip_test` does not.
  """
  values = np.asarray(differences, np.float64)
  if values.size < 2:
    return math.nan
  spread = values.std(ddof=1)
  if spread == 0:
    return 1.0 if values.mean() == 0 else 0.0
  # SciPy's own test warns of differences that are nearly equal.
  from scipy.stats import t

  statistic = abs(values.mean()) / (spread / math.sqrt(values.size))
  return float(2 * t.sf(statistic, values.size - 1))


def t_interval(means: ArrayLike, level: float = 0.95) -> tuple[float, float]:
  """Student's interval for the mean of source seeds' means; NaN for fewer than two.

  With a handful of source seeds a bootstrap interval is too narrow; this one covers the true mean
  with chance `level` if the means are normal.
  """
  values = np.asarray(means, np.float64)
  if values.size < 2:
    return math.nan, math.nan
  from scipy.stats import t

  error = values.std(ddof=1) / math.sqrt(values.size)
  half = t.ppf((1 + level) / 2, values.size - 1) * error
  return float(values.mean() - half), float(values.mean() + half)


def holm(p_values: ArrayLike) -> np.ndarray:
  """P values adjusted for being many (Holm, 1979), float64 of the same length; NaN stays NaN.

  The k-th smallest of m is multiplied by m - k + 1, and is at least the adjusted one before it, so
  that the chance of any true hypothesis with an adjusted p below alpha is at most alpha. NaN does
  not count.
  """
  values = np.asarray(p_values, np.float64)
  adjusted = np.full(values.shape, np.nan)
  real = np.flatnonzero(~np.isnan(values))
  order = real[np.argsort(values[real], kind='stable')]
  factors = np.arange(order.size, 0, -1)
  adjusted[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * factors))
  return adjusted


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
  """Spearman's rank correlation; NaN for fewer than three points or where one side is constant."""
  if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
    return math.nan
  from scipy.stats import spearmanr

  result: Any = spearmanr(x, y)
  return float(result.statistic)
