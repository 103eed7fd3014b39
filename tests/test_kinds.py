"""Which kind a leaf has, by names, shapes and siblings, and by rules of the user's."""

import collections
import re
import time

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
    ('a/kernel', struct(3, 4, 5), None),
    ('a/conv/kernel', struct(3, 4, 5), 'conv'),
    ('a/kernel', struct(3, 4, 5, 6), 'conv'),
    ('a/kernel', struct(1, 3, 4, 5, 6), 'conv'),
    ('query/kernel', struct(3, 4, 5), 'fc'),
    ('query/kernel', struct(3, 3, 4, 5), 'conv'),
    ('a/out/kernel', struct(3, 4), 'fc'),
    ('query/dense/kernel', struct(3, 4, 5), None),
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
    ('a/embedding', struct(3, 4), 'keep'),
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
  tree = {'a': {'table': struct(7, 3), 'kernels': struct(7, 3)}, 'head': {'kernel': struct(3, 2)}}
  with pytest.raises(UserError, match=r"'a/kernels' with shape \(7, 3\) has no known kind.*kinds="):
    kinds_.leaf_kinds(tree)


def test_what_stands_beside_a_scale_is_not_kept_in_silence():
  tree = {'norm': {'scale': struct(3), 'mean': struct(3), 'gate': struct(3, 2)}}
  with pytest.raises(UserError, match=r"'norm/gate' with shape \(3, 2\) has no known kind"):
    kinds_.leaf_kinds(tree)


def test_an_override_of_an_unknown_kind_is_an_error():
  with pytest.raises(
    UserError, match=r"kinds\('a/kernel', leaf\) returned 'dense'; expected one of "
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


NAMES = {
  'bn.weight': (8,),
  'bn.bias': (8,),
  'bn.running_mean': (8,),
  'bn.running_var': (8,),
  'conv.weight': (8, 4, 3, 3),
  'fc.weight': (8, 4),
  'fc.bias': (8,),
  'dense.kernel': (4, 8),
  'dense.bias': (8,),
  'ln.scale': (8,),
  'ln.bias': (8,),
}
TOLD = ['keep'] * 4 + ['conv', 'fc', 'bias', 'fc', 'bias', 'keep', 'keep']


def structs(shapes):
  return {
    name.replace('.', '/'): jax.ShapeDtypeStruct(shape, np.float32)
    for name, shape in shapes.items()
  }


def test_kinds_by_names():
  expected = dict(zip(structs(NAMES), TOLD, strict=True))
  assert kinds_.find_kinds(structs(NAMES)).of == expected
  rules = kinds_.parse_kinds(['^fc=keep', 'fc/weight=conv', r'bias$=fc'])
  found = kinds_.find_kinds(structs(NAMES), rules).of
  assert found == expected | {
    'fc/weight': 'keep', 'fc/bias': 'fc', 'bn/bias': 'fc', 'dense/bias': 'fc', 'ln/bias': 'fc'
  }  # fmt: skip


@pytest.mark.parametrize(
  ('name', 'shape'),
  [
    ('0.weight', (100, 8)),
    ('experts.weight', (2, 8, 8)),
    ('layers.mlp.kernel', (2, 8, 8)),
    ('time_decay', (8,)),
  ],
)
def test_unknown_kinds_are_named(name, shape):
  path = name.replace('.', '/')
  leaves = structs({name: shape, 'z.tensor': (1, 1)})
  with pytest.raises(UserError, match=r"leaf 'z/tensor' with shape .* has no known kind") as error:
    kinds_.find_kinds(leaves)
  assert f"leaf '{path}' with shape {shape} has no known kind" in str(error.value)
  assert set(kinds_.find_kinds(leaves, {'.*': 'keep'}).of.values()) == {'keep'}


# Path -> shape; the first leaf has two readings.
TWO_READINGS = {
  'a scanned stack': {'layers/wi/kernel': (3, 8, 8)},
  'a scanned stack with biases': {'layers/wi/kernel': (3, 8, 6), 'layers/wi/bias': (3, 6)},
  'a scanned stack of query kernels': {'h/query/kernel': (3, 8, 8), 'h/query/bias': (3, 8)},
  'a convolution called query': {'a/query/kernel': (3, 8, 8), 'a/query/bias': (8,)},
  'a convolution called out': {'a/out/kernel': (3, 8, 8), 'a/out/bias': (8,)},
  'a dense kernel from heads': {'a/mix/kernel': (2, 4, 8), 'a/mix/bias': (8,)},
  'scanned kernels to heads': {'layers/attn/query/kernel': (12, 80, 2, 4)},
  'scanned kernels to heads, few': {'layers/attn/query/kernel': (3, 8, 2, 4)},
  'experts': {'experts/weight': (4, 8, 6)},
  'experts with biases': {'experts/weight': (4, 8, 6), 'experts/bias': (4, 8)},
  'replicated': {'Dense_0/kernel': (4, 8, 6), 'Dense_0/bias': (4, 6)},
  'replicated convolutions': {'Conv_0/kernel': (4, 3, 3, 2, 8), 'Conv_0/bias': (4, 8)},
  'replicated convolutions over one axis': {'Conv_0/kernel': (4, 3, 2, 8), 'norm/scale': (4, 8)},
  'a sequence of dense kernels': {'net/0/weight': (8, 8)},
}
TWO_READINGS['replicated convolutions over one axis']['norm/bias'] = (4, 8)


@pytest.mark.parametrize('what', TWO_READINGS)
def test_two_readings_are_an_error_that_names_the_leaf_and_the_rule(what):
  leaves = structs(TWO_READINGS[what])
  path = next(iter(leaves))
  with pytest.raises(UserError, match=re.escape(f'leaf {path!r} with shape')) as error:
    kinds_.leaf_kinds(leaves)
  text = str(error.value)
  assert 'it may be' in text and '\n' not in text
  rules = kinds_.parse_kinds(re.search(r"--kinds='([^']*)'", text)[1].split(','))
  assert f"kinds={{'{next(iter(rules))}'".replace(r'\d', 'd') in text.replace("r'", "'").replace(
    r'\d', 'd'
  )
  assert kinds_.leaf_kinds(leaves, rules)[path] == 'fc'


# The same, where a sibling or a name leaves one reading.
ONE_READING = [
  ({'Conv_0/kernel': (3, 8, 8)}, 'conv'),
  ({'Conv_0/kernel': (3, 8, 6), 'Conv_0/bias': (6,)}, 'conv'),
  ({'stem/weight': (8, 4, 3), 'stem/bias': (8,)}, 'conv'),
  ({'stem/w': (3, 4, 8), 'stem/b': (8,)}, 'conv'),
  ({'DenseGeneral_0/kernel': (8, 2, 4)}, 'fc'),
  ({'to_heads/kernel': (8, 2, 4), 'to_heads/bias': (2, 4)}, 'fc'),
  ({'a/query/kernel': (8, 2, 4), 'a/query/bias': (2, 4)}, 'fc'),
  ({'a/out/kernel': (2, 4, 8), 'a/out/bias': (8,), 'a/query/kernel': (8, 2, 4)}, 'fc'),
  ({'patch/kernel': (16, 16, 3, 8), 'patch/bias': (8,)}, 'conv'),
  ({'mlp/0/weight': (8, 8)}, 'fc'),
  ({'net/0/weight': (8, 8), 'net/0/bias': (8,)}, 'fc'),
]


@pytest.mark.parametrize(('leaves', 'kind'), ONE_READING)
def test_siblings_leave_one_reading(leaves, kind):
  assert kinds_.leaf_kinds(structs(leaves))[next(iter(leaves))] == kind


NET = structs(
  {
    'patch_embed/proj/weight': (8, 3, 4, 4), 'patch_embed/proj/bias': (8,), 'wte/weight': (9, 8),
    'ln/weight': (8,), 'ln/bias': (8,), 'mlp/c_proj/weight': (8, 8), 'mlp/c_proj/bias': (8,),
    'attn/in_proj_bias': (8,), 'rnn/query/bias': (2, 4),
  }
)  # fmt: skip


@pytest.mark.parametrize(
  ('rule', 'touched'),
  [
    ('weight=fc', {'patch_embed/proj/weight', 'wte/weight', 'mlp/c_proj/weight'}),
    ('proj=fc', {'patch_embed/proj/weight', 'mlp/c_proj/weight'}),
    ('embed=keep', {'patch_embed/proj/weight'}),
    ('embed.*=keep', {'patch_embed/proj/weight', 'patch_embed/proj/bias'}),
    ('bias=conv', {path for path in NET if path.endswith('/bias')}),
    ('bias$=conv', {path for path in NET if path.endswith('/bias')}),
    ('in_proj_bias=fc', {'attn/in_proj_bias'}),
    ('ln/weight=bias', {'ln/weight'}),
    ('(?i)LN/.*=bias', {'ln/weight', 'ln/bias'}),
    ('.*=fc', set(NET)),
    ('.=fc', {'patch_embed/proj/weight', 'wte/weight', 'mlp/c_proj/weight'}),
  ],
)
def test_a_rule_touches_biases_and_norms_only_if_it_names_them(rule, touched):
  ((pattern, kind),) = kinds_.parse_kinds([rule]).items()
  before = kinds_.leaf_kinds(NET)
  found = kinds_.find_kinds(NET, {pattern: kind})
  assert found.of == {path: kind if path in touched else before[path] for path in NET}
  # What else than unknown leaves it changes is said, unless it names the leaf to its end.
  is_exact = pattern.endswith(('$', '.*', 'bias', 'ln/weight'))
  changed = {p for p in touched if before[p] not in (kind, 'keep') and not is_exact}
  (note,) = [n for n in found.notes if n.startswith('kinds: the rule')] or ['']
  assert set(re.findall(r"'([^']*)' \(", note)) == changed


@pytest.mark.parametrize(
  ('rule', 'message'),
  [
    ({'norm': 'bias'}, "'norm' is found in no path; the first is"),
    ({'c_proj/bia': 'fc'}, "'c_proj/bia' changes no leaf. It is found in 'mlp/c_proj/bias', but"),
    ({'^ln': 'bias'}, r"names them to the end, such as 'ln/weight\$'"),
    ({'(': 'fc'}, r"kinds: '\(' is no regular expression"),
    ({'wte': 'embedding'}, "unknown kind of 'wte' 'embedding'"),
  ],
)
def test_a_rule_that_changes_nothing_is_an_error(rule, message):
  with pytest.raises(UserError, match=message):
    kinds_.find_kinds(NET, rule)


def test_unknown_leaves_are_told_at_once_as_one_rule_that_fits_them_alone():
  leaves = structs(
    {f'blocks/{i}/{name}': (8,) for i in range(12) for name in ('mix', 'decay', 'ln/scale')}
    | {'decay/kernel': (8, 8), 'other/mix/bias': (8,)}
  )
  with pytest.raises(UserError, match='has no known kind') as error:
    kinds_.leaf_kinds(leaves)
  text = str(error.value)
  assert text.count('has no known kind') == 20
  assert 'and 4 more. ' in text and "--kinds='(^|/)(decay|mix)$=keep'" in text
  found = kinds_.leaf_kinds(leaves, {'(^|/)(decay|mix)$': 'keep'})
  assert found['decay/kernel'] == 'fc' and found['other/mix/bias'] == 'bias'


def test_thousands_of_leaves_take_no_time():
  leaves = structs(
    {f'layers/{i}/attn/{name}_proj/weight': (8, 8) for i in range(1250) for name in 'qkvo'}
  )
  start = time.process_time()
  found = kinds_.find_kinds(leaves, {'o_proj': 'conv'})
  assert time.process_time() - start < 1.0  # 0.1 s on a machine that is idle.
  assert collections.Counter(found.of.values()) == {'fc': 3750, 'conv': 1250}


# Leaves as the package meets them; the shapes are few so that little is compiled.
leaves = st.builds(
  lambda dtype, shape, seed: (np.random.default_rng(seed).normal(0, 9, shape)).astype(dtype),
  st.sampled_from([np.float32, np.float16, jnp.bfloat16, np.int32]),
  st.sampled_from([(), (3,), (2, 3)]),
  st.integers(0, 99),
)
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
  of = kinds_.find_kinds(trees.named_leaves(tree), otherwise).of
  assert of == kinds
  named_by_rules = {f'^{re.escape(path)}$': instead for path in kinds}
  if all(trees.is_floating(leaf) for leaf in jax.tree.leaves(tree)) and kinds:
    # A rule that names a leaf to its end is obeyed, whatever the leaf is.
    assert set(kinds_.leaf_kinds(tree, named_by_rules).values()) == {instead}
  try:
    found = kinds_.leaf_kinds(tree)
  except UserError as error:
    told = re.findall(r"leaf '([^']*)' with shape", str(error))
    assert set(told) <= set(kinds)
    # What is told to be pasted is enough, and touches what was told alone.
    rules = kinds_.parse_kinds(re.search(r"--kinds='([^']*)'", str(error))[1].split(','))
    done = kinds_.leaf_kinds(tree, rules)
    assert set(map(done.get, told)) <= set(rules.values())
    touched = {path for path in kinds if any(re.search(rule, path) for rule in rules)}
    assert touched <= set(told)
  else:
    assert list(found) == list(kinds)


@pytest.mark.parametrize('rules', [['kernel$=keep'], 'kernel$=keep', [('kernel$', 'keep')], 3])
def test_rules_of_another_type_are_refused(rules):
  with pytest.raises(UserError, match='expected a mapping of regular expressions to kinds'):
    kinds_.find_kinds({'dense/kernel': np.ones((2, 2), np.float32)}, rules)
  with pytest.raises(UserError, match='kinds: found 1; expected a regular expression'):
    kinds_.find_kinds({'dense/kernel': np.ones((2, 2), np.float32)}, {1: 'fc'})
