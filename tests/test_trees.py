import re

import flax.core
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from know_jax import kinds as kinds_
from know_jax import trees
from know_jax.errors import UserError


def struct(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def checked(reference, other):
  with pytest.raises(UserError) as error:
    trees.check_same(reference, other, names=('the old', 'the new'))
  return str(error.value)


def test_differing_trees_are_told_apart_by_leaf():
  base = {'a': {'kernel': struct(3, 2)}, 'b': {'bias': struct(2)}}
  trees.check_same(base, base, names=('', ''))
  wider = base | {'c': struct(1), 'd': struct(1)}
  assert checked(wider, base) == (
    "the new lacks leaf 'c', which the old has (and 1 more such leaves)."
  )
  assert checked(base, wider) == (
    "the new has leaf 'c', which the old lacks (and 1 more such leaves)."
  )
  assert checked(base, base | {'b': {'bias': struct(4)}}) == (
    "leaf 'b/bias' has shape (4,) in the new; expected (2,), as in the old."
  )
  assert checked(base, base | {'b': {'bias': struct(2, dtype=jnp.bfloat16)}}) == (
    "leaf 'b/bias' has dtype bfloat16 in the new; expected float32, as in the old."
  )
  message = checked(base, flax.core.freeze(base))
  assert 'containers of other types' in message
  assert 'FrozenDict' in message


def test_python_numbers_and_numpy_arrays_are_compared_without_narrowing():
  assert 'dtype float64' in checked({'a': np.float32(1)}, {'a': 1.0})
  assert 'dtype float32' in checked({'a': np.zeros(2)}, {'a': jnp.zeros(2)})


@pytest.mark.parametrize('leaf', [np.float64(1), np.int64(2**40)])
def test_stacking_never_narrows(leaf):
  with pytest.raises(UserError, match=r"leaf 'a' is (float64|int64), which JAX would narrow to "):
    trees.stack([{'a': leaf}] * 2)
  with jax.enable_x64(True):
    stacked = trees.stack([{'a': leaf}] * 2)['a']
  np.testing.assert_array_equal(stacked, [leaf, leaf])


def test_what_is_no_array_is_stacked_as_it_is():
  stacked = trees.stack([{'a': 1.5, 'b': len}, {'a': 2.5, 'b': max}])
  assert list(stacked['a']) == [1.5, 2.5]
  assert list(stacked['b']) == [len, max]


# Leaves as the package meets them; the shapes are few so that little is compiled.
leaves = st.builds(
  lambda dtype, shape, seed: (np.random.default_rng(seed).normal(0, 9, shape)).astype(dtype),
  st.sampled_from([np.float32, np.float16, jnp.bfloat16, np.int32]),
  st.sampled_from([(), (3,), (2, 3)]),
  st.integers(0, 99),
)
keys = st.text('abc', min_size=1, max_size=2)
pytrees = st.recursive(
  leaves,
  lambda node: st.dictionaries(keys, node, min_size=1, max_size=3) | st.lists(node, max_size=3),
  max_leaves=6,
)


@hypothesis.given(pytrees)
@hypothesis.settings(max_examples=40, deadline=None)
def test_names_follow_the_order_of_leaves_and_count_all_weights(tree):
  flat = jax.tree.leaves(tree)
  named = trees.named_leaves(tree)
  assert list(named) == trees.leaf_paths(tree)
  assert all(a is b for a, b in zip(named.values(), flat, strict=True))
  assert trees.num_weights(tree) == sum(leaf.size for leaf in flat)
  for path, leaf in named.items():
    node = tree
    for key in filter(None, path.split('/')):
      node = node[int(key) if isinstance(node, list) else key]
    assert node is leaf


def moved(tree, by):
  """The tree with a number added to every weight, in the dtype of each."""
  return jax.tree.map(lambda leaf: np.asarray(leaf + leaf.dtype.type(by)), tree)


@hypothesis.given(pytrees, st.integers(1, 3))
@hypothesis.settings(max_examples=40, deadline=None)
def test_stacking_and_taking_apart_gives_the_same_trees(tree, count):
  stages = [moved(tree, t) for t in range(count)]
  stacked = trees.stack(stages)
  for t, stage in enumerate(stages):
    back = jax.tree.map(lambda leaf, t=t: np.asarray(leaf)[t], stacked)
    trees.check_same(stage, back, names=('before', 'after'))
    jax.tree.map(np.testing.assert_array_equal, stage, back)


# Keys that may make two paths the same: 'a/b' beside 'a' above 'b', and '0' beside a list.
slashed = st.recursive(
  st.just(np.float32(0)),
  lambda node: (
    st.dictionaries(st.sampled_from(['a', 'b', 'a/b', '0', 'b/0', '']), node, max_size=4)
    | st.lists(node, max_size=2)
  ),
  max_leaves=8,
)


@hypothesis.given(slashed)
@hypothesis.settings(max_examples=100, deadline=None)
def test_paths_are_unique_or_the_one_that_is_not_is_named(tree):
  paths = trees.leaf_paths(tree)
  assert len(paths) == len(jax.tree.leaves(tree))
  twice = [path for n, path in enumerate(paths) if path in paths[:n]]
  if not twice:
    assert list(trees.named_leaves(tree)) == paths
    return
  for function in (trees.named_leaves, kinds_.leaf_kinds):
    with pytest.raises(UserError, match=f'two leaves have the path {re.escape(repr(twice[0]))}'):
      function(tree)


def change(tree, at, how):
  """The tree with a leaf changed, or taken away, or None where that leaves it as it was."""
  flat, structure = jax.tree.flatten(tree)
  leaf = flat[at % len(flat)]
  flat[at % len(flat)] = {
    'nothing': leaf + leaf.dtype.type(1),
    'shape': np.stack([leaf, leaf]),
    'dtype': np.asarray(leaf).astype(np.float64),
    'deeper': {'z': leaf},
    'container': (leaf,),
    'missing': None,
  }[how]
  return jax.tree.unflatten(structure, flat)


CHANGES = ('nothing', 'shape', 'dtype', 'deeper', 'container', 'missing')


def complaint(reference, other):
  try:
    trees.check_same(reference, other, names=('A', 'B'))
  except UserError as error:
    return str(error)
  return None


@hypothesis.given(pytrees.filter(jax.tree.leaves), st.integers(0, 9), st.sampled_from(CHANGES))
@hypothesis.settings(max_examples=100, deadline=None)
def test_comparing_trees_is_symmetric_and_finds_any_difference(tree, at, how):
  other = change(tree, at, how)
  there, back = complaint(tree, other), complaint(other, tree)
  assert (there is None) == (back is None) == (how == 'nothing')
  assert complaint(tree, tree) is complaint(other, other) is None
  if how in ('shape', 'dtype'):
    # The same leaf, told from either side.
    path = trees.leaf_paths(tree)[at % len(trees.leaf_paths(tree))]
    assert there.startswith(f'leaf {path!r} has {how} ')
    assert back.startswith(f'leaf {path!r} has {how} ')
