"""Statistics against SciPy, closed forms and brute force."""

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings

from know_jax.errors import UserError
from know_jax.report import intervals

numbers = st.floats(-10, 10).map(lambda x: round(x, 3))


def test_source_means_count_each_source_once():
  assert intervals.source_means([[1.0, 3.0], [10.0]]).tolist() == [2.0, 10.0]


# -- the bootstrap -------------------------------------------------------------------------------


def all_resamples(groups):
  """Every equally likely outcome of the two-level bootstrap of groups of equal size."""
  within = [
    [np.mean(drawn) for drawn in itertools.product(group, repeat=len(group))] for group in groups
  ]
  for sources in itertools.product(range(len(groups)), repeat=len(groups)):
    for means in itertools.product(*(within[source] for source in sources)):
      yield np.mean(means)


def test_the_interval_is_that_of_all_resamples():
  groups = [[0.1, 0.9], [2.0, 2.3], [-1.0, 0.5]]
  outcomes = np.array(list(all_resamples(groups)))
  assert len(outcomes) == 27 * 64
  for level in (0.5, 0.8, 0.95):
    found = intervals.bootstrap_interval(groups, level=level, resamples=100_000)
    # An end holds the share of outcomes that it should: few outcomes lie close to one another.
    for end, share in zip(found, ((1 - level) / 2, (1 + level) / 2), strict=True):
      assert (outcomes < end - 0.02).mean() <= share + 0.005
      assert (outcomes <= end + 0.02).mean() >= share - 0.005


def test_one_value_a_source_is_the_usual_bootstrap():
  values = np.random.default_rng(0).normal(1.0, 2.0, 12)
  low, high = intervals.bootstrap_interval([[v] for v in values], resamples=50_000)
  found = scipy.stats.bootstrap(
    (values,), np.mean, n_resamples=50_000, method='percentile', rng=np.random.default_rng(1)
  ).confidence_interval
  assert (low, high) == (pytest.approx(found.low, abs=0.03), pytest.approx(found.high, abs=0.03))


def test_transfers_are_no_sources():
  # All of the spread is between sources: more transfers of the same must not narrow the interval.
  few = [[float(i)] for i in range(6)]
  many = [[float(i)] * 50 for i in range(6)]
  narrow = [x for group in many for x in group]
  for low, high in (intervals.bootstrap_interval(few), intervals.bootstrap_interval(many)):
    assert low < 1.4 and high > 3.6
  low, high = intervals.bootstrap_interval([[x] for x in narrow])
  assert low > 2.2 and high < 2.8


def test_groups_of_different_lengths():
  low, high = intervals.bootstrap_interval([[5.0], [5.0, 5.0, 5.0]])
  assert (low, high) == (5.0, 5.0)
  # A source with one value is always drawn as that value, whatever others have.
  low, high = intervals.bootstrap_interval([[0.0], [6.0] * 9], level=1.0)
  assert (low, high) == (0.0, 6.0)


def test_the_interval_is_a_function_of_its_seed():
  groups = np.random.default_rng(0).normal(size=(6, 3))
  assert intervals.bootstrap_interval(groups) == intervals.bootstrap_interval(groups)
  assert intervals.bootstrap_interval(groups, resamples=100, seed=1) != (
    intervals.bootstrap_interval(groups, resamples=100, seed=2)
  )


@pytest.mark.parametrize('groups', [[], [[1.0], []]])
def test_nothing_to_draw_from(groups):
  with pytest.raises(UserError, match='expected at least one in each'):
    intervals.bootstrap_interval(groups)


# -- tests ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(numbers, min_size=2, max_size=7))
def test_sign_flips_equal_scipy(differences):
  found = intervals.sign_flip_test(differences)
  expected = scipy.stats.permutation_test(
    (np.array(differences),), np.mean, permutation_type='samples', n_resamples=np.inf
  )
  # SciPy doubles the smaller of both sides, which are equal up to its own handling of ties.
  assert found == pytest.approx(expected.pvalue, abs=1e-12)


@given(st.lists(numbers, min_size=1, max_size=8))
def test_sign_flips_equal_counting_exactly(differences):
  # In whole thousandths there is no rounding.
  exact = [round(1000 * d) for d in differences]
  patterns = itertools.product((1, -1), repeat=len(exact))
  sums = [sum(s * d for s, d in zip(signs, exact, strict=True)) for signs in patterns]
  expected = np.mean([abs(total) >= abs(sum(exact)) for total in sums])
  assert intervals.sign_flip_test(differences) == expected


@pytest.mark.parametrize('n', range(1, 9))
def test_the_smallest_p(n):
  assert intervals.sign_flip_test(np.arange(1.0, n + 1)) == intervals.smallest_p(n)
  assert intervals.smallest_p(n) == min(1.0, 2 / 2**n)


@pytest.mark.parametrize('n', [0, 21])
def test_too_few_and_too_many_signs(n):
  with pytest.raises(UserError, match=f'found {n} differences; expected 1 to 20'):
    intervals.sign_flip_test([1.0] * n)


@settings(deadline=None)
@given(st.lists(numbers, min_size=2, max_size=9).filter(lambda x: np.std(x) > 1e-3))
def test_paired_t_equals_scipy(differences):
  expected = scipy.stats.ttest_1samp(differences, 0.0).pvalue
  assert intervals.paired_t_test(differences) == pytest.approx(expected, rel=1e-9)


def test_paired_t_without_spread():
  assert intervals.paired_t_test([0.0, 0.0]) == 1.0
  assert intervals.paired_t_test([2.0, 2.0]) == 0.0
  assert math.isnan(intervals.paired_t_test([2.0]))


@settings(deadline=None)
@given(
  st.lists(numbers, min_size=2, max_size=9).filter(lambda x: np.std(x) > 1e-3),
  st.floats(0.5, 0.999),
)
def test_the_t_interval_equals_scipy(means, level):
  expected = scipy.stats.ttest_1samp(means, 0.0).confidence_interval(level)
  np.testing.assert_allclose(intervals.t_interval(means, level), expected, rtol=1e-9, atol=1e-9)


def test_the_t_interval_without_spread():
  assert intervals.t_interval([2.0, 2.0]) == (2.0, 2.0)
  assert all(map(math.isnan, intervals.t_interval([2.0])))


# -- many tests ----------------------------------------------------------------------------------


def closed_testing(p_values):
  """Holm is the closed test of Bonferroni: an adjusted p is the largest of all sets with it."""
  m = len(p_values)
  adjusted = []
  for i in range(m):
    sets = (s for size in range(1, m + 1) for s in itertools.combinations(range(m), size))
    tests = [min(1.0, len(s) * min(p_values[j] for j in s)) for s in sets if i in s]
    adjusted.append(max(tests))
  return adjusted


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_equals_closed_testing(p_values):
  np.testing.assert_allclose(intervals.holm(p_values), closed_testing(p_values), rtol=1e-12)


def test_holm_by_hand_and_without_numbers():
  found = intervals.holm([0.01, math.nan, 0.04, 0.03, 0.005])
  np.testing.assert_allclose(found, [0.03, math.nan, 0.06, 0.06, 0.02])
  assert intervals.holm([]).shape == (0,)


def test_rank_correlation():
  assert intervals.rank_correlation([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1.0)
  # 1 - 6 sum d^2 / (n (n^2 - 1)) over the differences d of the ranks.
  assert intervals.rank_correlation([1, 2, 3, 4], [5, 1, 3, 2]) == pytest.approx(
    1 - 6 * sum((a - b) ** 2 for a, b in zip([1, 2, 3, 4], [4, 1, 3, 2], strict=True)) / 60
  )
  assert math.isnan(intervals.rank_correlation([1, 2], [1, 2]))
  assert math.isnan(intervals.rank_correlation([1, 1, 1], [1, 2, 3]))


@pytest.mark.parametrize('sources', [2, 5, 10])
def test_the_t_interval_covers_what_it_claims(sources):
  """95 % of studies with a known truth; a bootstrap of as many sources covers fewer."""
  rng, studies, truth = np.random.default_rng(sources), 2000, 0.3
  # Three transfers from each source: sources differ by 1, transfers from one of them by 0.5.
  means = truth + rng.normal(size=(studies, sources, 1))
  values = means + 0.5 * rng.normal(size=(studies, sources, 3))
  covered = {'t': 0, 'bootstrap': 0}
  for groups in values:
    for name, (low, high) in {
      't': intervals.t_interval(intervals.source_means(groups)),
      'bootstrap': intervals.bootstrap_interval(groups, resamples=200),
    }.items():
      covered[name] += low <= truth <= high
  # The central 99.9 % of Binomial(2000, 0.95), by SciPy.
  least, most = scipy.stats.binom.interval(0.999, studies, 0.95)
  assert least <= covered['t'] <= most
  assert covered['bootstrap'] < least
