import re

import flax.core
import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from know_jax import kinds as kinds_
from know_jax import trees
from know_jax.errors import UserError


def struct(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


class Linen(nn.Module):
  """A layer of every sort that the default rule speaks of."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Conv(4, (3, 3))(x)))
    x = nn.LayerNorm()(x.reshape(x.shape[0], -1, 4))
    x = nn.Conv(4, (3,))(x)
    x = nn.MultiHeadDotProductAttention(2)(x)
    return nn.Dense(3)(x)


def test_kinds_of_a_linen_model():
  variables = jax.eval_shape(Linen().init, jax.random.key(0), jnp.zeros((2, 4, 4, 1)))
  attention = 'params/MultiHeadDotProductAttention_0'
  assert kinds_.leaf_kinds(variables) == {
    'batch_stats/BatchNorm_0/mean': 'keep',
    'batch_stats/BatchNorm_0/var': 'keep',
    'params/BatchNorm_0/bias': 'keep',
    'params/BatchNorm_0/scale': 'keep',
    'params/Conv_0/bias': 'bias',
    'params/Conv_0/kernel': 'conv',
    'params/Conv_1/bias': 'bias',
    'params/Conv_1/kernel': 'conv',
    'params/Dense_0/bias': 'bias',
    'params/Dense_0/kernel': 'fc',
    'params/LayerNorm_0/bias': 'keep',
    'params/LayerNorm_0/scale': 'keep',
    **{
      f'{attention}/{name}/{leaf}': kind
      for name in ('key', 'out', 'query', 'value')
      for leaf, kind in (('bias', 'bias'), ('kernel', 'fc'))
    },
  }


def test_kinds_of_an_nnx_model():
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
      self.norm = nnx.BatchNorm(4, rngs=rngs)
      self.attention = nnx.MultiHeadAttention(2, 4, 8, decode=False, rngs=rngs)
      self.drop = nnx.Dropout(0.1, rngs=rngs)

  found = kinds_.leaf_kinds(nnx.state(nnx.eval_shape(lambda: Net(nnx.Rngs(0)))))
  found = {path.removesuffix('/value'): kind for path, kind in found.items()}
  assert found == {
    'conv/kernel': 'conv',
    'conv/bias': 'bias',
    'norm/scale': 'keep',
    'norm/bias': 'keep',
    'norm/mean': 'keep',
    'norm/var': 'keep',
    'drop/rngs/count': 'keep',
    'drop/rngs/key': 'keep',
    **{
      f'attention/{name}/{leaf}': kind
      for name in ('key', 'out', 'query', 'value')
      for leaf, kind in (('bias', 'bias'), ('kernel', 'fc'))
    },
  }


@pytest.mark.parametrize(
  ('path', 'leaf', 'kind'),
  [
    ('kernel', struct(3, 4), 'fc'),
    ('a/kernel', struct(3, 4, 5), 'conv'),
    ('a/kernel', struct(3, 4, 5, 6), 'conv'),
    ('a/kernel', struct(1, 3, 4, 5, 6), 'conv'),
    ('query/kernel', struct(3, 4, 5), 'fc'),
    ('query/kernel', struct(3, 3, 4, 5), 'conv'),
    ('a/out/kernel', struct(3, 4), 'fc'),
    ('query/dense/kernel', struct(3, 4, 5), 'conv'),
    ('a/bias', struct(), 'bias'),
    ('query/bias', struct(2, 3), 'bias'),
    ('a/bias', struct(3, dtype=jnp.bfloat16), 'bias'),
    ('a/scale', struct(3), 'keep'),
    ('batch_stats/a/bias', struct(3), 'keep'),
    ('a/kernel', struct(3, 4, dtype=jnp.int8), 'keep'),
    ('step', struct(dtype=jnp.int32), 'keep'),
    ('step', 3, 'keep'),
    ('rng', jax.eval_shape(lambda: jax.random.key(0)), 'keep'),
    ('a/kernel/value', struct(3, 4), 'fc'),
    ('a/kernel', struct(3), None),
    ('a/embedding', struct(3, 4), None),
    ('a/kernels', struct(3, 4), None),
  ],
)
def test_the_default_rule(path, leaf, kind):
  assert kinds_.default_kind(path, leaf) == kind


def test_an_override_names_only_what_it_changes_and_sees_path_and_leaf():
  tree = {'embed': {'embedding': struct(7, 3)}, 'head': {'kernel': struct(3, 2)}}
  seen = {}

  def kinds(path, leaf):
    seen[path] = leaf
    return 'fc' if path == 'embed/embedding' else None

  assert kinds_.leaf_kinds(tree, kinds) == {'embed/embedding': 'fc', 'head/kernel': 'fc'}
  assert seen == {'embed/embedding': struct(7, 3), 'head/kernel': struct(3, 2)}


def test_an_override_may_predict_normalisation_and_keep_kernels():
  tree = {'norm': {'scale': struct(3), 'bias': struct(3)}, 'head': {'kernel': struct(3, 2)}}
  found = kinds_.leaf_kinds(tree, lambda path, leaf: 'bias' if 'norm' in path else 'keep')
  assert found == {'head/kernel': 'keep', 'norm/bias': 'bias', 'norm/scale': 'bias'}


def test_a_leaf_of_unknown_kind_is_named():
  tree = {'a': {'embedding': struct(7, 3)}, 'head': {'kernel': struct(3, 2)}}
  with pytest.raises(
    UserError, match=r"'a/embedding' with shape \(7, 3\) has no known kind.*kinds="
  ):
    kinds_.leaf_kinds(tree)


def test_what_stands_beside_a_scale_is_not_kept_in_silence():
  tree = {'norm': {'scale': struct(3), 'mean': struct(3), 'gate': struct(3, 2)}}
  with pytest.raises(UserError, match=r"'norm/gate' with shape \(3, 2\) has no known kind"):
    kinds_.leaf_kinds(tree)


def test_an_override_of_an_unknown_kind_is_an_error():
  with pytest.raises(
    UserError, match=r"kinds\('a/kernel', leaf\) returned 'dense'; wanted one of "
  ):
    kinds_.leaf_kinds({'a': {'kernel': struct(3, 2)}}, lambda path, leaf: 'dense')


def test_an_override_cannot_predict_integers():
  with pytest.raises(UserError, match="leaf 'step' has dtype int32 but kind 'bias'"):
    kinds_.leaf_kinds({'step': struct(dtype=jnp.int32)}, lambda path, leaf: 'bias')


def test_paths_that_collide_are_an_error():
  # They would shift the kinds of all later leaves.
  tree = {'a/bias': struct(3), 'a': {'bias': struct(2)}}
  with pytest.raises(UserError, match="two leaves have the path 'a/bias'"):
    kinds_.leaf_kinds(tree)


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
    "leaf 'b/bias' has shape (4,) in the new; wanted (2,), as in the old."
  )
  assert checked(base, base | {'b': {'bias': struct(2, dtype=jnp.bfloat16)}}) == (
    "leaf 'b/bias' has dtype bfloat16 in the new; wanted float32, as in the old."
  )
  message = checked(base, flax.core.freeze(base))
  assert 'containers of other types' in message
  assert 'FrozenDict' in message


def test_python_numbers_and_numpy_arrays_are_compared_without_narrowing():
  assert 'dtype float64' in checked({'a': np.float32(1)}, {'a': 1.0})
  assert 'dtype float32' in checked({'a': np.zeros(2)}, {'a': jnp.zeros(2)})


@pytest.mark.parametrize('leaf', [np.float64(1), np.int64(2**40), 1.0])
def test_stacking_never_narrows(leaf):
  with pytest.raises(UserError, match=r"leaf 'a' is (float64|int64), which JAX would narrow to "):
    trees.stack([{'a': leaf}] * 2)
  with jax.enable_x64(True):
    stacked = trees.stack([{'a': leaf}] * 2)['a']
  np.testing.assert_array_equal(stacked, [leaf, leaf])


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


named = st.recursive(
  leaves,
  lambda node: st.dictionaries(
    st.sampled_from(['kernel', 'bias', 'scale', 'query', 'out', 'batch_stats', 'value', 'w']),
    node,
    min_size=1,
    max_size=4,
  ),
  max_leaves=8,
)


@hypothesis.given(named, st.sampled_from([*kinds_.KINDS, kinds_.KEEP]))
@hypothesis.settings(max_examples=100, deadline=None)
def test_every_leaf_has_one_kind_or_the_first_without_one_is_named(tree, instead):
  def otherwise(path, leaf):
    """`instead` where the default rule is silent."""
    if kinds_.default_kind(path, leaf) is None:
      return instead
    return None

  kinds = kinds_.leaf_kinds(tree, otherwise)
  assert list(kinds) == trees.leaf_paths(tree)
  assert set(kinds.values()) <= {*kinds_.KINDS, kinds_.KEEP}
  for path, leaf in trees.named_leaves(tree).items():
    assert trees.is_floating(leaf) or kinds[path] == kinds_.KEEP
  unknown = [
    path for path, leaf in trees.named_leaves(tree).items() if not kinds_.default_kind(path, leaf)
  ]
  if unknown:
    with pytest.raises(UserError, match=f'leaf {re.escape(repr(unknown[0]))} .*has no known kind'):
      kinds_.leaf_kinds(tree)
  else:
    assert kinds_.leaf_kinds(tree) == kinds


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
