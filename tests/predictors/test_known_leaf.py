"""KNOWN conditioned on the leaf: context and steps against float64 NumPy, and what it must keep.

Its predictions are compared with a reference that slides the weights themselves in
test_predictors.py; the contract of all predictors is in test_nowcast.py.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import references

import know_jax
from know_jax import trees
from know_jax.predictors import known_leaf

THETA = references.random_conditioned_theta()
LEAF = {'predictor': 'known_leaf', 'theta': THETA}


def make_leaf(seed, size=40, length=5):
  rng = np.random.default_rng(seed)
  start = rng.normal(0, 0.3, size)
  return start + (rng.uniform(0.001, 0.1, (length, 1)) * rng.normal(size=(length, size))).cumsum(0)


def moments_of(history):
  return jnp.asarray(known_leaf.second_moments(jnp.asarray(history))) / history.shape[1]


def test_the_number_of_parameters():
  theta = known_leaf.init_theta(jax.random.key(0))
  sizes = {path: leaf.size for path, leaf in trees.named_leaves(theta['conv']).items()}
  assert sum(sizes.values()) == 1798
  assert sizes['mean'] + sizes['scale'] == 32
  assert known_leaf.context_size(5) == 16
  found = {path: leaf.shape for path, leaf in trees.named_leaves(theta['fc']).items()}
  assert found == known_leaf.parameter_shapes(5)


def test_the_context_against_numpy():
  with jax.enable_x64(True):
    for seed in range(5):
      history = make_leaf(seed)
      found = known_leaf.context(moments_of(history), 0.4)
      np.testing.assert_allclose(found, references.leaf_context(history, 0.4), rtol=1e-9)


def test_a_context_of_stages_that_did_not_move_is_finite():
  history = np.stack([np.full(4, 0.2)] * 3 + [np.full(4, 0.3)] * 2)
  for case in (history, np.zeros((5, 4)), history[:1].repeat(5, axis=0)):
    found = known_leaf.context(moments_of(case.astype(np.float32)), 0.5)
    np.testing.assert_allclose(found, references.leaf_context(case, 0.5), rtol=1e-4, atol=1e-4)


def test_training_starts_from_copying():
  theta = known_leaf.init_theta(jax.random.key(1))
  history = [{'a': {'kernel': stage.reshape(8, 5)}} for stage in make_leaf(0).astype(np.float32)]
  found = know_jax.predict(history, 3, predictor='known_leaf', theta=theta)
  np.testing.assert_array_equal(found['a']['kernel'], history[-1]['a']['kernel'])


@hypothesis.given(seed=st.integers(0, 10**6), power=st.integers(-8, 8))
@hypothesis.settings(max_examples=25, deadline=None)
def test_scaling_the_weights_scales_the_prediction(seed, power):
  history = make_leaf(seed).astype(np.float32).reshape(5, 8, 5)
  factor = np.float32(2.0**power)
  once = know_jax.predict([{'a': {'kernel': h}} for h in history], 2, **LEAF)
  scaled = know_jax.predict([{'a': {'kernel': factor * h}} for h in history], 2, **LEAF)
  np.testing.assert_allclose(
    scaled['a']['kernel'], factor * np.asarray(once['a']['kernel']), rtol=2e-4, atol=1e-5 * factor
  )


def test_the_step_depends_on_the_other_weights_of_the_leaf():
  history = make_leaf(3).astype(np.float32)
  whole = know_jax.predict([{'b': {'bias': h}} for h in history], **LEAF)['b']['bias']
  half = know_jax.predict([{'b': {'bias': h[:20]}} for h in history], **LEAF)['b']['bias']
  assert np.abs(np.asarray(whole)[:20] - np.asarray(half)).max() > 1e-4


def test_a_leaf_that_never_moved_stays_where_it_is_and_its_copies_decay():
  still = [{'b': {'bias': np.linspace(-1, 1, 7, dtype=np.float32)}}] * 5
  found = know_jax.predict(still, 2, **LEAF)
  np.testing.assert_array_equal(found['b']['bias'], still[0]['b']['bias'])
  # One stage alone shows neither movement nor rest.
  free = {'predictor': 'known_leaf_history_free', 'theta': THETA}
  found = know_jax.predict(still[:1], 1, **free)
  expected = still[0]['b']['bias'] * (1 - THETA['bias']['decay'])
  np.testing.assert_allclose(found['b']['bias'], expected, rtol=1e-6)
  without = {kind: {**params, 'decay': np.float32(0)} for kind, params in THETA.items()}
  found = know_jax.predict(still[:1], 2, **{**free, 'theta': without})
  np.testing.assert_array_equal(found['b']['bias'], still[0]['b']['bias'])


def test_moments_of_a_leaf_larger_than_a_block_are_those_of_the_whole():
  rng = np.random.default_rng(0)
  shape = (3, 100_003)  # More than two blocks, and not a multiple of one.
  history = [{'a': {'kernel': rng.normal(t, 1, shape).astype(np.float32)}} for t in range(5)]
  stacked = np.stack([stage['a']['kernel'].ravel() for stage in history]).astype(np.float64)
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), THETA['fc'])
  expected = references.known_leaf(stacked, 1, params=params, rate=0.5).reshape(shape)
  run = functools.partial(know_jax.predict, **LEAF)
  for predict in (run, jax.jit(run)):
    found = predict(history)['a']['kernel']
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
