"""Forgetting by a loop of the user's own, in every framework, and that a kill does not show."""

import functools
import itertools
import shutil
import types

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from runs import assert_same_bits

import know_jax
from know_jax import trees
from know_jax.errors import UserError
from know_jax.nowcast import from_run
from know_jax.runs import workdir as workdirs

# -- data of one's own: two classes on a ring and within it --------------------------------------

RNG = np.random.default_rng(0)
X = RNG.normal(size=(256, 2)).astype(np.float32)
Y = (np.square(X).sum(-1) > 1.4).astype(np.int32)
SUBSETS = know_jax.nested_subsets(Y, seed=1)


def cross_entropy(logits, labels):
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.cache
def adam_step(loss):
  optimizer = optax.adam(0.02)

  def step(params, state, x, y):
    updates, state = optimizer.update(jax.grad(loss)(params, x, y), state)
    return optax.apply_updates(params, updates), state

  return jax.jit(optimizer.init), jax.jit(step)


def adam(loss, params, indices, steps):
  """A loop as anybody has one: Adam on batches of 16."""
  init, step = adam_step(loss)
  state, order = init(params), np.random.default_rng(0)
  for _ in range(steps):
    some = order.choice(indices, 16, replace=False)
    params, state = step(params, state, X[some], Y[some])
  return params


def check(history, loss, train_on):
  """Predicted weights are those of NumPy in float64, have the network's form, and train on."""
  assert len(history) == 5
  stages = [trees.named_leaves(stage) for stage in history]
  predicted = know_jax.predict(history, predictor='task_vector')
  assert jax.tree.structure(predicted) == jax.tree.structure(history.newest)
  for path, leaf in trees.named_leaves(predicted).items():
    new, old = (np.asarray(stage[path], np.float64) for stage in (stages[-1], stages[-2]))
    np.testing.assert_allclose(leaf, new + (new - old), rtol=1e-5, atol=1e-6, err_msg=path)
    assert leaf.dtype == stages[-1][path].dtype
  before = float(loss(predicted, X, Y))
  after = float(loss(train_on(predicted), X, Y))
  assert after < min(before, 0.35)  # Of two classes one by chance: 0.69.


def test_flax_linen():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(2)(nn.relu(nn.Dense(16)(x)))

  net = Net()

  def loss(params, x, y):
    return cross_entropy(net.apply({'params': params}, x), y)

  def train(params, indices, stage, key):
    return adam(loss, params, indices, steps=200 if stage == 0 else 10)

  params = net.init(jax.random.key(0), X)['params']
  history = know_jax.forget(train, params, SUBSETS, key=0)
  check(history, loss, lambda p: adam(loss, p, SUBSETS[0], 60))
  # By the default predictor too.
  params = know_jax.predict(history)
  assert loss(adam(loss, params, SUBSETS[0], 60), X, Y) < 0.35


def test_flax_nnx():
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.first, self.second = nnx.Linear(2, 16, rngs=rngs), nnx.Linear(16, 2, rngs=rngs)

    def __call__(self, x):
      return self.second(nnx.relu(self.first(x)))

  graph, start = nnx.split(Net(nnx.Rngs(0)))

  def loss(state, x, y):
    return cross_entropy(nnx.merge(graph, state)(x), y)

  def train(state, indices, stage, key):
    return adam(loss, state, indices, steps=200 if stage == 0 else 10)

  history = know_jax.forget(train, start, SUBSETS, key=jax.random.key(0))
  check(history, loss, lambda state: adam(loss, state, SUBSETS[0], 60))


def test_equinox():
  net = eqx.nn.MLP(2, 2, 16, 1, key=jax.random.key(0))
  start, static = eqx.partition(net, eqx.is_inexact_array)

  def loss(weights, x, y):
    return cross_entropy(jax.vmap(eqx.combine(weights, static))(x), y)

  def train(weights, indices, stage, key):
    return adam(loss, weights, indices, steps=200 if stage == 0 else 10)

  history = know_jax.forget(train, start, SUBSETS)
  kinds = {f'layers/{i}/{name}': kind for i in (0, 1) for name, kind in
           (('weight', 'fc'), ('bias', 'bias'))}  # fmt: skip
  newest = trees.named_leaves(history.newest)
  assert set(newest) == set(kinds)
  predicted = know_jax.predict(
    history, predictor='task_vector', kinds=lambda path, leaf: kinds[path]
  )
  older = trees.named_leaves(history[-2])
  for path, leaf in trees.named_leaves(predicted).items():
    new, old = (np.asarray(stage[path], np.float64) for stage in (newest, older))
    np.testing.assert_allclose(leaf, new + (new - old), rtol=1e-5, atol=1e-6, err_msg=path)
  assert loss(adam(loss, predicted, SUBSETS[0], 60), X, Y) < 0.35
  assert eqx.combine(predicted, static)(X[0]).shape == (2,)


def test_haiku():
  net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 2])(x)))

  def loss(params, x, y):
    return cross_entropy(net.apply(params, x), y)

  def train(params, indices, stage, key):
    return adam(loss, params, indices, steps=200 if stage == 0 else 10)

  start = net.init(jax.random.key(0), X)
  history = know_jax.forget(train, start, SUBSETS, key=jax.random.PRNGKey(0))
  predicted = know_jax.predict(
    history,
    predictor='task_vector',
    kinds=lambda path, leaf: 'fc' if path.endswith('w') else 'bias',
  )
  named = [trees.named_leaves(stage) for stage in (predicted, history[-1], history[-2])]
  assert set(named[0]) == {f'mlp/~/linear_{i}/{name}' for i in (0, 1) for name in 'wb'}
  for path, leaf in named[0].items():
    new, old = (np.asarray(stage[path], np.float64) for stage in named[1:])
    np.testing.assert_allclose(leaf, 2 * new - old, rtol=1e-5, atol=1e-6, err_msg=path)
  assert loss(adam(loss, predicted, SUBSETS[0], 60), X, Y) < 0.35


# -- a loop in NumPy, which writes to the weights that it is given --------------------------------

KINDS = {'w': 'fc', 'b': 'bias'}


def features(x):
  return np.concatenate([x, x**2], axis=1)


def numpy_loss(params, x, y):
  p = 1 / (1 + np.exp(-(features(x) @ params['w'] + params['b'])))
  return -np.mean(np.log(np.where(y[:, None] == 1, p, 1 - p)))


def numpy_train(params, indices, stage, key, steps=200):
  x, y = features(X[indices]), Y[indices, None]
  order = np.random.default_rng(np.asarray(jax.random.key_data(key)))
  for _ in range(steps):
    some = order.choice(len(x), 16)
    error = 1 / (1 + np.exp(-(x[some] @ params['w'] + params['b']))) - y[some]
    params['w'] -= (0.3 / 16 * x[some].T @ error).astype(np.float32)
    params['b'] -= (0.3 * error.mean(0)).astype(np.float32)
  return params


def numpy_start():
  return {'w': np.zeros((4, 1), np.float32), 'b': np.zeros(1, np.float32)}


def numpy_forget(workdir=None, train=numpy_train, start=None, **options):
  start = numpy_start() if start is None else start
  return know_jax.forget(train, start, SUBSETS, **{'key': 3, **options}, workdir=workdir)


def test_numpy_and_weights_that_are_written_to():
  start = numpy_start()
  history = numpy_forget(start=start)
  assert all((leaf == 0).all() for leaf in start.values())  # The user's are left alone.
  # By hand: five trainings, each from the weights of the one before.
  params, stages = numpy_start(), []
  for stage, indices in enumerate(SUBSETS):
    key = jax.random.fold_in(jax.random.key(3), stage)
    params = numpy_train({k: v.copy() for k, v in params.items()}, indices, stage, key)
    stages.append(params)
  for found, expected in zip(history, stages[::-1], strict=True):
    assert_same_bits(jax.device_get(found), expected)
  predicted = know_jax.predict(history, predictor='task_vector', kinds=lambda p, _: KINDS[p])
  newest, older = stages[0], stages[1]
  for name, leaf in predicted.items():
    np.testing.assert_allclose(leaf, 2 * newest[name] - older[name], rtol=1e-5, atol=1e-6)
  ahead = {name: np.array(leaf) for name, leaf in predicted.items()}
  assert numpy_loss(numpy_train(ahead, SUBSETS[0], 0, jax.random.key(0)), X, Y) < 0.35


# -- with a workdir -------------------------------------------------------------------------------


class Crash(BaseException):
  """Ends a run where it stands."""


@pytest.mark.parametrize('killed_in', [0, 2, 4])
def test_a_kill_does_not_show(tmp_path, killed_in):
  trained = []

  def train(params, indices, stage, key):
    if stage == killed_in and stage not in trained:
      trained.append(stage)
      raise Crash
    trained.append(stage)
    return numpy_train(params, indices, stage, key)

  with pytest.raises(Crash):
    numpy_forget(tmp_path, train)
  history = numpy_forget(tmp_path, train)
  # The stage of the kill twice, every other once.
  assert trained == [*range(killed_in + 1), *range(killed_in, 5)]
  assert_same_bits(jax.device_get(history.weights), jax.device_get(numpy_forget().weights))
  # Finished, it trains no more, and there is nothing to tell.
  trained.clear()
  again = numpy_forget(tmp_path, train, on_metrics=lambda stage, metrics: trained.append(stage))
  assert trained == []
  assert_same_bits(jax.device_get(again.weights), jax.device_get(history.weights))


def test_what_is_no_array_is_kept_through_a_kill(tmp_path):
  start = {'net': {**numpy_start(), 'scale': 0.5}, 'seed': jnp.zeros(2, jnp.uint32)}

  def train(tree, indices, stage, key):
    if stage == 1 and not (tmp_path / 'killed').exists():
      (tmp_path / 'killed').touch()
      raise Crash
    assert tree['net']['scale'] == 0.5 / 2**stage
    weights = {name: tree['net'][name] for name in 'wb'}
    net = {**numpy_train(weights, indices, stage, key), 'scale': tree['net']['scale'] / 2}
    return {'net': net, 'seed': tree['seed'] + 1}

  with pytest.raises(Crash):
    know_jax.forget(train, start, SUBSETS[:3], workdir=tmp_path / 'run')
  history = know_jax.forget(train, start, SUBSETS[:3], workdir=tmp_path / 'run')
  assert np.asarray(history.weights['seed'])[:, 0].tolist() == [3, 2, 1]


def test_the_workdir_is_one_that_nowcast_reads(tmp_path):
  history = numpy_forget(tmp_path)
  trajectory, record = workdirs.load_trajectory(tmp_path)
  assert_same_bits(jax.device_get(trajectory.weights), jax.device_get(history.weights))
  assert record['config']['rate'] == 0.5 and record['parameters'] == 5
  assert record['subset_sizes'] == [256, 128, 64, 32, 16]
  found = from_run.run(
    tmp_path, predictors=['task_vector'], steps=2, kinds=lambda path, leaf: KINDS[path]
  )
  assert [p.multiple for p in found] == [1.0, 2.0, 4.0]
  assert {p.accuracy for p in found} == {None}
  expected = know_jax.forecast(history, 2, predictor='task_vector', kinds=lambda p, _: KINDS[p])
  for step, weights in enumerate(expected, 1):
    assert_same_bits(found[step].variables, jax.device_get(weights))
  assert '      -' in from_run.report(found)
  assert (tmp_path / 'predictions' / 'nowcast.png').stat().st_size > 1000
  with pytest.raises(UserError, match=r"batch_norm is 'reset', but .* of a training loop"):
    from_run.run(tmp_path, predictors=['shrink'], steps=1, batch_norm='reset')


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'key': 4}, r'key: found \[0, 3\], expected \[0, 4\]'),
    ({'start': {'w': np.zeros((4, 1), np.float32)}}, "has leaf 'b', which start lacks"),
    ({'start': {**numpy_start(), 'c': np.zeros(1, np.float32)}}, "lacks leaf 'c', which start has"),
    (
      {'start': {**numpy_start(), 'w': np.zeros((4, 2), np.float32)}},
      r"leaf 'w' has shape \(4, 1\) in .*; expected \(4, 2\), as in start",
    ),
  ],
)
def test_a_workdir_of_another_run(tmp_path_factory, options, message):
  folder = tmp_path_factory.getbasetemp() / 'whole'
  if not folder.exists():
    numpy_forget(folder)
  copy = tmp_path_factory.mktemp('copy') / 'run'
  shutil.copytree(folder, copy)
  with pytest.raises(UserError, match=message):
    numpy_forget(copy, **options)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'train': 3}, "train is <class 'int'>; expected a function"),
    ({'start': {'f': len}}, 'start has no floating-point arrays'),
    ({'start': {'w': np.zeros(3)}}, "leaf 'w' of start is float64, which JAX would narrow to"),
    (
      {'start': {'w': types.SimpleNamespace(new_tensor=len)}},
      "leaf 'w' of start is a tensor of PyTorch; give NumPy",
    ),
    ({'subsets': []}, 'subsets are empty'),
    ({'subsets': 100}, 'subsets are 100; expected an array of indices for each stage, as nested'),
    ({'subsets': [100, 50]}, r'subset 0 has shape \(\) and dtype int64; .* as nested_subsets'),
    ({'subsets': [[0.5]]}, r'subset 0 has shape \(1,\) and dtype float64'),
    ({'subsets': [[0, 1], [0, 1]]}, 'subset 1 has 2 examples and is no smaller part of subset 0'),
    ({'subsets': [[0, 1, 2], [0, 7]]}, 'subset 1 has 2 examples and is no smaller part'),
    ({'key': 'seed'}, "key is 'seed'; expected a whole number or one key"),
    ({'key': jax.random.split(jax.random.key(0))}, 'expected a whole number or one key'),
  ],
)
def test_bad_arguments(change, message):
  arguments = {'train': numpy_train, 'start': numpy_start(), 'subsets': SUBSETS, 'key': 0} | change
  with pytest.raises(UserError, match=message):
    know_jax.forget(
      arguments['train'], arguments['start'], arguments['subsets'], key=arguments['key']
    )


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    (lambda p: {'w': p['w']}, r"what train gave in stage 1 lacks leaf 'b'"),
    (lambda p: {**p, 'w': p['w'].T}, r"leaf 'w' has shape \(1, 4\) in what train gave in stage 1"),
    (lambda p: {**p, 'b': p['b'].astype(np.float16)}, r"leaf 'b' has dtype float16 in what train"),
    (lambda p: {**p, 'b': p['b'] * np.nan}, "leaf 'b' holds NaN or infinity after stage 1"),
  ],
)
def test_what_train_gives_is_checked(wrong, message):
  def train(params, indices, stage, key):
    return wrong(params) if stage == 1 else params

  with pytest.raises(UserError, match=message):
    numpy_forget(train=train)


@pytest.mark.parametrize(
  'labels',
  [
    np.arange(100) % 3,
    [['a', 'b', 'c'][i % 3] for i in range(100)],
    np.array(['x', 'yy', 'z'])[np.arange(100) % 3],
    [i % 3 for i in range(100)],
    jnp.arange(100) % 3,
    list(jnp.arange(100) % 3),
  ],
)
def test_labels_of_any_sort(labels):
  found = know_jax.nested_subsets(labels, rate=0.4, stages=3)
  assert [len(part) for part in found] == [100, 40, 16]
  for part, share in zip(found, (1, 0.4, 0.16), strict=True):
    counts = np.bincount(part % 3)
    assert np.abs(counts - share * np.bincount(np.arange(100) % 3)).max() <= 1
  for large, small in itertools.pairwise(found):
    assert set(small.tolist()) < set(large.tolist())


def test_a_watcher_is_told_of_each_stage():
  told = []
  numpy_forget(on_metrics=lambda *args: told.append(args))
  assert [stage for stage, _ in told] == [0, 1, 2, 3, 4]
  assert [metrics['examples'] for _, metrics in told] == [256, 128, 64, 32, 16]
  assert all(0 < metrics['train_seconds'] < 60 for _, metrics in told)


def test_whole_numbers_and_keys_of_any_sort_are_seeds():
  expected = [part.tolist() for part in know_jax.nested_subsets(64, 0.5, 3, 7)]
  for size, stages, seed in (
    (np.array(64), np.int8(3), np.uint32(7)),
    (jnp.int32(64), jnp.int32(3), jnp.int32(7)),
    (64, 3, jax.random.key(7)),
    (64, 3, jax.random.PRNGKey(7)),
  ):
    parts = know_jax.nested_subsets(size, 0.5, stages, seed)
    assert [part.tolist() for part in parts] == expected
  keys = [numpy_forget(key=key).newest['w'] for key in (7, jnp.int32(7), jax.random.key(7))]
  assert_same_bits({'w': keys[0]}, {'w': keys[1]})
  assert_same_bits({'w': keys[0]}, {'w': keys[2]})


def test_lists_of_torch_tensors_are_labels_and_stages():
  torch = pytest.importorskip('torch')
  labels = [i % 3 for i in range(100)]
  subsets = know_jax.nested_subsets([torch.tensor(label) for label in labels])
  for part, expected in zip(subsets, know_jax.nested_subsets(labels), strict=True):
    np.testing.assert_array_equal(part, expected)
  arrays = [
    [np.full((4, 4), 1 + 0.1 * stage, np.float32), np.eye(4, dtype=np.float32)]
    for stage in range(5)
  ]
  stages = [[torch.tensor(leaf) for leaf in stage] for stage in arrays]
  given, expected = (
    know_jax.predict(history, predictor='log_fit', kinds={'': 'fc'}) for history in (stages, arrays)
  )
  assert all(isinstance(leaf, torch.Tensor) for leaf in given)
  for leaf, value in zip(given, expected, strict=True):
    np.testing.assert_array_equal(leaf.numpy(), value)


def test_a_size_in_place_of_labels():
  found = know_jax.nested_subsets(64)
  assert [len(part) for part in found] == [64, 32, 16, 8, 4]
  assert found[0].tolist() == list(range(64))
  assert found[1].tolist() != know_jax.nested_subsets(64, seed=1)[1].tolist()


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((0,), 'the number of examples is 0'),
    (([],), r'labels have shape \(0,\)'),
    ((np.zeros(3),), 'dtype float64; expected'),
    ((np.zeros((2, 2), int),), r'labels have shape \(2, 2\)'),
    ((10, 1.5), 'rate is 1.5'),
    ((10, 0.5, 0), 'stages is 0; expected'),
    ((10, 0.5, 3, -1), 'seed is -1; expected'),
    ((10, 0.5, 3, 1.5), 'seed is 1.5; expected'),
    ((['a', 3, None],), 'cannot be compared'),
  ],
)
def test_bad_labels(arguments, message):
  with pytest.raises(UserError, match=message):
    know_jax.nested_subsets(*arguments)
