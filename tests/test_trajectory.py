import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_trees import moved, pytrees

from know_jax import Trajectory, UserError
from know_jax.trajectory import stacked_length


def stages(count=4):
  return [
    {'a': {'kernel': np.full((2, 3), t, np.float32)}, 'step': np.int32(10 * t)}
    for t in range(count)
  ]


def assert_same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_trajectory_is_a_sequence_of_stages_oldest_first():
  trajectory = Trajectory.from_sequence(stages())
  assert len(trajectory) == 4
  assert trajectory.weights['a']['kernel'].shape == (4, 2, 3)
  for t, stage in enumerate(stages()):
    assert_same(trajectory[t], stage)
    assert_same(trajectory[t - 4], stage)
  assert_same(list(trajectory), stages())
  assert_same(trajectory.newest, stages()[-1])


def test_slices_are_trajectories():
  trajectory = Trajectory.from_sequence(stages())
  part = trajectory[1:3]
  assert isinstance(part, Trajectory)
  assert_same(list(part), stages()[1:3])
  assert_same(list(trajectory[::-1]), stages()[::-1])


histories = st.builds(
  lambda tree, length: [moved(tree, t) for t in range(length)],
  pytrees.filter(jax.tree.leaves),
  st.integers(1, 3),
)
bounds = st.none() | st.integers(-5, 5)


def in_numpy(history):
  """The trajectory in NumPy arrays, whose slices JAX need not compile."""
  return Trajectory(jax.tree.map(lambda *leaves: np.stack(leaves), *history))


def same_weights(found, expected):
  """The same bits in the same dtypes, whether of JAX or NumPy."""
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@hypothesis.given(histories)
@hypothesis.settings(max_examples=10, deadline=None)
def test_stacking_taking_apart_and_stacking_again_changes_nothing(history):
  trajectory = Trajectory.from_sequence(history)
  same_weights(list(trajectory), history)
  same_weights(Trajectory.from_sequence(list(trajectory)).weights, trajectory.weights)
  assert len(trajectory) == len(history)


@hypothesis.given(histories, bounds, bounds, bounds.filter(lambda step: step != 0))
@hypothesis.settings(max_examples=40, deadline=None)
def test_slices_are_those_of_the_list_of_stages(history, start, stop, step):
  trajectory = in_numpy(history)
  part = slice(start, stop, step)
  expected = history[part]
  if not expected:
    with pytest.raises(UserError, match='the history is empty'):
      len(trajectory[part])
    return
  same_weights(list(trajectory[part]), expected)
  same_weights(trajectory[part].newest, expected[-1])
  # A slice of a slice.
  same_weights(list(trajectory[part][::-2]), expected[::-2])


@hypothesis.given(histories)
@hypothesis.settings(max_examples=20, deadline=None)
def test_reversal_is_its_own_inverse_and_that_of_the_stages(history):
  trajectory = in_numpy(history)
  same_weights(trajectory[::-1][::-1].weights, trajectory.weights)
  same_weights(Trajectory.from_sequence(history[::-1]).weights, trajectory[::-1].weights)


@pytest.mark.parametrize('index', [4, -5])
def test_indices_out_of_range_are_errors(index):
  # JAX would clamp them.
  with pytest.raises(IndexError, match=f'stage {index} of a trajectory of 4 stages'):
    Trajectory.from_sequence(stages())[index]


def test_a_trajectory_is_a_pytree():
  doubled = jax.jit(lambda t: jax.tree.map(lambda leaf: 2 * leaf, t))(
    Trajectory.from_sequence(stages())
  )
  assert isinstance(doubled, Trajectory)
  assert_same(doubled.newest, jax.tree.map(lambda leaf: 2 * leaf, stages()[-1]))


def test_dtypes_are_kept():
  tree = {'a': jnp.ones(2, jnp.bfloat16), 'b': np.ones(2, np.float16), 'c': jax.random.key(0)}
  weights = Trajectory.from_sequence([tree, tree]).weights
  assert {name: leaf.dtype for name, leaf in weights.items()} == {
    name: leaf.dtype for name, leaf in tree.items()
  }


def test_no_stage_is_an_error():
  with pytest.raises(UserError, match='the history is empty; expected the weights of at least one'):
    Trajectory.from_sequence([])
  with pytest.raises(UserError, match=r'the history is empty \(0 stages on axis 0\)'):
    len(Trajectory.from_sequence(stages())[4:])


def test_a_stage_that_differs_is_an_error_that_names_stage_and_leaf():
  history = stages()
  history[1]['a']['kernel'] = np.zeros((3, 2), np.float32)
  message = (
    r"leaf 'a/kernel' has shape \(3, 2\) in stage 1; expected \(2, 3\), as in stage 3 "
    r'\(the newest\)'
  )
  with pytest.raises(UserError, match=message):
    Trajectory.from_sequence(history)


def test_64_bit_stages_are_not_narrowed():
  with pytest.raises(UserError, match="leaf 'a' is float64, which JAX would narrow to float32"):
    Trajectory.from_sequence([{'a': np.zeros(2)}] * 2)


def test_stacked_leaves_must_agree_on_the_number_of_stages():
  with pytest.raises(
    UserError, match=r"leaf 'b' has 3 stages on axis 0 \(shape \(3, 7\)\); expected 4"
  ):
    stacked_length({'a': np.zeros((4, 2)), 'b': np.zeros((3, 7))})
  with pytest.raises(UserError, match="leaf 'b' of the stacked history is a scalar"):
    stacked_length({'a': np.zeros((4, 2)), 'b': np.float32(0)})
  with pytest.raises(UserError, match='no leaves'):
    stacked_length({})
  assert stacked_length({'a': np.zeros((4, 2)), 'b': np.zeros(4)}) == 4
