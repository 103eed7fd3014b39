"""The start to use: what the search finds, how sure it is, and that a kill loses nothing."""

import shutil

import numpy as np
import pytest
from test_transfer import small_transfer

import know_jax
from know_jax import recommendation, transfer_starts
from know_jax.errors import UserError
from know_jax.io.journal import read_lines
from know_jax.recommendation import NAIVE, Start

HISTORY = [{'dense': {'kernel': np.full((2, 2), 1.0 + 0.1 * i, np.float32)}} for i in range(5)]
STARTS = (Start('shrink'), Start('average', 2), Start('task_vector', 1, (('lam', 0.3),)))


def size(params):
  return float(params['dense']['kernel'][0, 0])


def scorer(best_size, best_rate, noise=0.0, calls=None):
  """Trainings whose score is known: highest for weights of one size, trained at one rate."""

  def score(params, rate, budget, seed):
    if calls is not None:
      calls.append((size(params), rate, budget, seed))
    # Seeded by what is trained, so that the same training has the same score.
    rng = np.random.default_rng([seed, int(1e6 * size(params)), int(1e6 * rate)])
    loss = (size(params) - best_size) ** 2 + np.log2(rate / best_rate) ** 2
    return budget - loss + noise * rng.normal()

  return score


def test_the_start_and_the_rate_with_the_highest_score_are_found():
  # By the formulas: shrink is 0.94 times the newest 1.4, average the mean of 1.2, 1.3 and 1.4,
  # task_vector 1.4 + 0.3 (1.4 - 1.3).
  for start, value in zip(STARTS, (1.4 * 0.94, 1.3, 1.43), strict=True):
    calls = []
    found = know_jax.recommend(HISTORY, scorer(value, 2.0, 1e-4, calls), starts=STARTS, repeats=5)
    assert (found.start, found.rate, found.naive_rate) == (start, 2.0, 2.0)
    # Naive is (1.4 - value)^2 below at the same rate.
    assert found.gain == pytest.approx((1.4 - value) ** 2, abs=2e-4)
    assert found.interval[0] < found.gain < found.interval[1]
    assert str(start) in str(found)
    assert len(calls) == found.trainings[0]
    assert found.trainings[1] == pytest.approx(sum(call[2] for call in calls))


def test_what_decides_are_seeds_that_the_search_did_not_use():
  calls = []
  know_jax.recommend(HISTORY, scorer(1.3, 1.0, 0.0, calls), starts=STARTS, repeats=4)
  full = [call for call in calls if call[2] == 1.0 and call[3]]
  assert sorted({call[3] for call in full}) == [1, 2, 3, 4] and len(full) == 8
  searched = [call for call in calls if call[3] == 0]
  # 4 rates of naive: 4, 2, 1; 12 pairs: 12, 4, 2.
  assert [round(1 / call[2]) for call in searched] == [9] * 4 + [3] * 2 + [1] + [9] * 12 + [
    3
  ] * 4 + [1] * 2
  assert len(calls) == recommendation.trainings(3, 4, 4)


def test_the_grid_grows_where_its_edge_is_best():
  found = know_jax.recommend(HISTORY, scorer(1.3, 16.0), starts=STARTS, rates=(1, 2))
  assert found.rate == found.naive_rate == 16.0
  found = know_jax.recommend(HISTORY, scorer(1.3, 0.25), starts=STARTS, rates=(1, 2))
  assert found.rate == found.naive_rate == 0.25


def test_none_is_said_where_naive_is_best():
  found = know_jax.recommend(HISTORY, scorer(1.4, 1.0, 1e-3), starts=STARTS)
  assert (found.start, found.rate, found.gain) == (NAIVE, 1.0, 0.0)
  assert found.best[0] in STARTS and found.best[2] < 0
  assert str(found).startswith('None: train from the newest weights at 1 times the rate.')


def test_starts_that_are_no_better_are_seldom_recommended():
  """With all starts equal, the chance of a wrong recommendation is that of a t-test's one side."""
  wrong, runs = 0, 400
  for run in range(runs):
    rng = np.random.default_rng(run)
    found = know_jax.recommend(
      HISTORY, lambda *about, rng=rng: rng.normal(), starts=STARTS, rates=(1.0,), repeats=5
    )
    wrong += found.start != NAIVE
  # Binomial(400, 0.025): 22 or more has a chance of 1 in 1,000 (SciPy's binom.sf(21, 400, 0.025)).
  assert wrong < 22


def test_a_training_that_diverges_is_no_start_to_recommend():
  def score(params, rate, budget, seed):
    return float('nan') if size(params) != pytest.approx(1.4) else 0.5

  found = know_jax.recommend(HISTORY, score, starts=STARTS)
  assert found.start == NAIVE
  with pytest.raises(UserError, match='newest weights diverged'):
    know_jax.recommend(HISTORY, lambda *about: float('nan'), starts=STARTS)


def test_a_start_that_the_history_is_too_short_for_is_named():
  found = know_jax.recommend(HISTORY[:2], scorer(1.1, 1.0), starts=STARTS)
  assert len(found.left_out) == 1 and 'average (steps=2)' in found.left_out[0]
  with pytest.raises(UserError, match='no start can be tried'):
    know_jax.recommend(HISTORY[:2], scorer(1.1, 1.0), starts=[Start('average', 4)])


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'repeats': 2}, 'repeats is 2; expected at least 3'),
    ({'rates': ()}, 'rates are'),
    ({'rates': (1.0, 1.0)}, 'rates are'),
    ({'rates': (0.0,)}, 'rates are'),
  ],
)
def test_wrong_arguments_are_refused_before_any_training(wrong, message):
  with pytest.raises(UserError, match=message):
    know_jax.recommend(HISTORY, lambda *about: pytest.fail('trained'), **wrong)


def test_after_a_kill_nothing_is_trained_twice(tmp_path):
  whole = know_jax.recommend(HISTORY, scorer(1.3, 2.0, 0.01), starts=STARTS)
  calls = []
  score = scorer(1.3, 2.0, 0.01, calls)

  def killed(*about):
    if len(calls) == 20:
      raise KeyboardInterrupt
    return score(*about)

  with pytest.raises(KeyboardInterrupt):
    know_jax.recommend(HISTORY, killed, starts=STARTS, workdir=tmp_path / 'w')
  found = know_jax.recommend(HISTORY, score, starts=STARTS, workdir=tmp_path / 'w')
  assert found == whole
  assert len(calls) == len(set(calls)) == found.trainings[0]
  # Other weights are other trainings.
  before = len(calls)
  other = [{'dense': {'kernel': 1.01 * stage['dense']['kernel']}} for stage in HISTORY]
  know_jax.recommend(other, score, starts=STARTS, workdir=tmp_path / 'w')
  assert len(calls) - before == found.trainings[0]


def test_a_run_and_a_transfer_task(finished, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  config = small_transfer()
  options = {'starts': [Start('shrink')], 'rates': (1.0, 2.0), 'repeats': 3}
  found = transfer_starts.run(config, workdir, **options)
  (path,) = workdir.glob('recommend/digits-*/trials.jsonl')
  rows = read_lines(path)
  assert len(rows) == found.trainings[0]
  assert all(0 <= row['score'] <= 1 for row in rows)
  # 10 of 50 labelled images are held out: scores are tenths.
  assert all(round(10 * row['score'], 6) % 1 == 0 for row in rows)
  again = path.read_bytes()
  assert transfer_starts.run(config, workdir, **options) == found
  assert path.read_bytes() == again


@pytest.mark.parametrize(
  ('validation', 'message'),
  [(0.0, 'validation is 0.0'), (0.001, 'which is none'), (0.9, 'batch_size = 24')],
)
def test_a_validation_set_that_cannot_be_is_refused(finished, validation, message):
  with pytest.raises(UserError, match=message):
    transfer_starts.run(small_transfer(), finished, validation=validation)


def test_an_unknown_predictor_is_told_before_anything_is_trained():
  def score(params, rate, budget, seed):
    raise AssertionError('something was trained')

  for start in (Start('nope'), Start('shrink', options=(('d', 1),))):
    with pytest.raises(UserError, match=r"unknown predictor 'nope'|has no option 'd'"):
      know_jax.recommend(HISTORY, score, starts=[Start('shrink'), start])
