"""The contract of predict and forecast, the same for every predictor."""

import functools
import itertools
import logging
import math
import operator
import re
import threading
import time

import chex
import flax.core
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from runs import assert_same_bits

import know_jax
from know_jax import PREDICTORS, Trajectory, UserError, trees
from know_jax import kinds as kinds_
from know_jax.errors import KindsWarning
from know_jax.nowcast import chunks, compiled, linear, pieces
from know_jax.nowcast.plan import plan_of
from know_jax.predictors import known
from know_jax.predictors.base import Leaf
from know_jax.predictors.known import KNOWN

EVERY = pytest.mark.parametrize('name', PREDICTORS)
THETA = references.random_theta()
SCALED = {kind: {**params, 'bound': np.float32(2.0)} for kind, params in THETA.items()}
CONDITIONED = references.random_conditioned_theta()
OF_THE_WHOLE_LEAF = ('tsv', 'known_leaf')
COORDINATE_WISE = [name for name in PREDICTORS if name not in OF_THE_WHOLE_LEAF]

# One leaf of each sort; the sizes can be shared out to 8 devices.
SHAPES = {
  'conv': {'kernel': (3, 3, 2, 8), 'bias': (8,)},
  'out': {'kernel': (2, 4, 8)},
  'head': {'kernel': (16, 4)},
}
# Of one kind only: every kind of leaf and every step is a copy of KNOWN to compile.
TINY = {'head': {'kernel': (4, 3)}}
KEPT = ('batch_stats', 'norm', 'rng', 'step', 'table')


def make_history(length=5, dtype=np.float32, seed=0, shapes=None):
  """Weights that start anywhere and move a little at every stage."""
  rng = np.random.default_rng(seed)
  is_shape = functools.partial(operator.is_, tuple)
  shapes, structure = jax.tree.flatten(
    SHAPES if shapes is None else shapes, is_leaf=lambda node: is_shape(type(node))
  )
  start = [0.1 * rng.normal(size=shape) for shape in shapes]
  stages = []
  for _ in range(length):
    start = [leaf + 0.02 * rng.normal(size=leaf.shape) for leaf in start]
    stages.append(jax.tree.unflatten(structure, [np.asarray(leaf, dtype) for leaf in start]))
  return stages


def with_kept(history):
  """The history with leaves that no predictor touches; they differ from stage to stage."""
  return [
    {
      **stage,
      'batch_stats': {'norm': {'mean': np.full(3, t, np.float32), 'var': np.ones(3, np.float32)}},
      'norm': {'scale': jnp.full(3, 1.0 + t), 'bias': jnp.full(3, -1.0 * t)},
      'rng': jax.random.key(t),
      'step': np.int32(100 * t),
      'table': np.full((2, 2), t, np.int64),
    }
    for t, stage in enumerate(history)
  ]


def options_of(name):
  if not name.startswith('known'):
    # Exponentials of random weights go far.
    return {'on_bad': 'ignore'} if name == 'exp_fit' else {}
  return {'theta': CONDITIONED if 'leaf' in name else THETA}


def predict(history, steps, name, **options):
  return PREDICTORS[name](history, steps, **options_of(name), **options)


def bits(leaf):
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.asarray(leaf).tobytes()


def assert_identical(found, expected):
  trees.check_same(expected, found, names=('expected', 'found'))
  for (path, a), b in zip(
    trees.named_leaves(found).items(), jax.tree.leaves(expected), strict=True
  ):
    assert bits(a) == bits(b), path


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
  chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
  chex.assert_trees_all_close(found, expected, rtol=rtol, atol=atol)


# --- structure, shapes, dtypes --------------------------------------------------------------------


@EVERY
def test_the_result_is_like_one_stage_and_keeps_what_is_not_predicted(name):
  history = [flax.core.freeze(stage) for stage in with_kept(make_history())]
  found = predict(history, 2, name)
  trees.check_same(history[-1], found, names=('a stage', 'the result'))
  assert_identical({k: found[k] for k in KEPT}, {k: history[-1][k] for k in KEPT})
  moving = {'persistence': (), 'shrink': ('conv', 'fc')}.get(name, kinds_.KINDS)
  newest = trees.named_leaves(history[-1])
  kinds = kinds_.leaf_kinds(history[-1])
  for path, leaf in trees.named_leaves(found).items():
    if not path.startswith(KEPT):
      assert (leaf != newest[path]).any() == (kinds[path] in moving), path


@EVERY
def test_forecast_keeps_what_is_not_predicted_at_every_step(name):
  history = with_kept(make_history(shapes=TINY))
  found = know_jax.forecast(history, 2, predictor=name, **options_of(name))
  assert isinstance(found, Trajectory)
  assert len(found) == 2
  for stage in (jax.tree.map(operator.itemgetter(n), found.weights) for n in range(2)):
    trees.check_same(history[-1], stage, names=('a stage', 'the result'))
    assert_identical({k: stage[k] for k in KEPT}, {k: history[-1][k] for k in KEPT})


HALF = {
  'conv': {'kernel': jnp.bfloat16, 'bias': np.float16},
  'out': {'kernel': np.float16},
  'head': {'kernel': jnp.bfloat16},
}


@EVERY
def test_half_precision_is_computed_in_float32_and_given_back(name):
  history = [jax.tree.map(lambda w, d: w.astype(d), stage, HALF) for stage in make_history()]
  in_float32 = [jax.tree.map(lambda leaf: leaf.astype(np.float32), stage) for stage in history]
  expected = jax.tree.map(lambda w, d: w.astype(d), predict(in_float32, 2, name), HALF)
  assert_identical(predict(history, 2, name), expected)


# --- transformations ------------------------------------------------------------------------------


@EVERY
def test_under_jit(name):
  history = make_history(shapes=TINY)
  found = jax.jit(lambda h: predict(h, 2, name))(history)
  assert_close(found, predict(history, 2, name), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('name', ['linear_fit', 'known_leaf', 'known'])
def test_under_jit_with_the_history_a_constant(name):
  history = make_history(shapes=TINY)
  found = jax.jit(lambda: predict(history, 2, name))()
  assert_close(found, predict(history, 2, name), rtol=1e-6, atol=1e-7)


def test_a_forecast_under_jit_and_vmap():
  history = drop_int64(with_kept(make_history(shapes=TINY)))
  forecast = functools.partial(know_jax.forecast, steps=2, predictor='linear_fit')
  expected = jax.tree.map(jnp.asarray, forecast(history).weights)
  found = jax.jit(forecast)(history).weights
  assert_close(found.pop('head'), expected['head'])
  assert_identical(found, {k: expected[k] for k in found})
  batch = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), history)
  found = jax.tree.map(operator.itemgetter(1), jax.vmap(forecast)(batch).weights)
  assert_close(found.pop('head'), expected['head'])
  assert_identical(found, {k: expected[k] for k in found})


def test_the_prediction_of_an_nnx_state_is_one():
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.head = nnx.Linear(4, 3, rngs=rngs)
      self.norm = nnx.BatchNorm(3, rngs=rngs)

  nets = [Net(nnx.Rngs(seed)) for seed in range(5)]
  history = [nnx.state(net) for net in nets]
  expected = know_jax.predict([nnx.to_pure_dict(state) for state in history], theta=THETA)
  nnx.update(nets[0], know_jax.predict(history, theta=THETA))
  assert_identical(nnx.to_pure_dict(nnx.state(nets[0])), expected)
  assert (expected['head']['kernel'] != history[-1]['head']['kernel'][...]).all()


def test_jit_of_predict_itself():
  history = make_history(shapes=TINY)
  jitted = jax.jit(know_jax.predict, static_argnames=('steps', 'predictor', 'rate', 'regressor'))
  options = {'predictor': 'linear_fit', 'rate': 0.3, 'regressor': 'index'}
  assert_close(jitted(history, steps=2, **options), know_jax.predict(history, 2, **options))


@EVERY
def test_under_vmap(name):
  histories = [make_history(shapes=TINY, seed=seed) for seed in range(3)]
  batch = jax.tree.map(lambda *leaves: np.stack(leaves), *histories)
  found = jax.vmap(lambda h: predict(h, 2, name))(batch)
  expected = [predict(history, 2, name) for history in histories]
  assert_close(found, jax.tree.map(lambda *leaves: np.stack(leaves), *expected))


def inner(a, b):
  return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def central_difference(fn, at, direction, width=1e-5):
  ahead = fn(jax.tree.map(lambda x, d: x + width * d, at, direction))
  behind = fn(jax.tree.map(lambda x, d: x - width * d, at, direction))
  return (ahead - behind) / (2 * width)


@EVERY
def test_the_gradient_for_the_history(name):
  history, direction = (make_history(dtype=np.float64, shapes=TINY, seed=s) for s in (0, 1))
  weights = make_history(1, np.float64, shapes=TINY, seed=2)[0]

  @jax.jit
  def loss(history):
    return inner(weights, predict(history, 2, name))

  with jax.enable_x64(True):
    gradient = jax.grad(loss)(history)
    expected = central_difference(loss, history, direction)
    np.testing.assert_allclose(inner(gradient, direction), expected, rtol=1e-6)
    assert abs(expected) > 1e-4


@pytest.mark.parametrize('name', ['known_leaf', 'known'])
def test_the_gradient_for_theta(name):
  history = make_history(dtype=np.float64, shapes=TINY)
  theta = jax.tree.map(lambda leaf: leaf.astype(np.float64), options_of(name)['theta'])
  direction = jax.tree.map(lambda leaf: np.cos(np.arange(leaf.size)).reshape(leaf.shape), theta)

  @jax.jit
  def loss(theta):
    # The history is a constant of the trace: this is how KNOWN is trained through predict.
    return inner(history[0], know_jax.predict(history, predictor=name, theta=theta))

  with jax.enable_x64(True):
    gradient = jax.grad(loss)(theta)
    expected = central_difference(loss, theta, direction, width=1e-6)
    np.testing.assert_allclose(inner(gradient, direction), expected, rtol=1e-6)
    assert abs(expected) > 1e-4


@EVERY
def test_the_gradient_is_finite(name):
  history = make_history(shapes=TINY)
  if name in COORDINATE_WISE:
    # Zero and still; not for tsv, as the best matrix of a lower rank has no derivative there.
    history = [{**stage, 'still': {'bias': np.zeros(2, np.float32)}} for stage in history]

  @jax.jit
  def loss(history):
    return sum(leaf.sum() for leaf in jax.tree.leaves(predict(history, 2, name)))

  gradient = jax.grad(loss)(history)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
  assert any(leaf.any() for leaf in jax.tree.leaves(gradient))


# --- shards ---------------------------------------------------------------------------------------

SPECS = {
  'conv': {'kernel': P(None, None, 'y', 'x'), 'bias': P(('x', 'y'))},
  'out': {'kernel': P()},
  'head': {'kernel': P('x')},
}
FORMS = {
  'list, automatic axes': (False, AxisType.Auto),
  'stacked, explicit axes': (True, AxisType.Explicit),
}


def sharded_history(stacked, axis_type):
  """The history over 8 devices, and the shardings of one stage."""
  mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(axis_type,) * 2)
  shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
  history = make_history()
  if not stacked:
    return [jax.tree.map(jax.device_put, stage, shardings) for stage in history], shardings

  def put(sharding, *stages):
    return jax.device_put(np.stack(stages), NamedSharding(mesh, P(None, *sharding.spec)))

  return jax.tree.map(put, shardings, *history), shardings


def assert_sharded(found, shardings):
  for (path, leaf), expected in zip(
    trees.named_leaves(found).items(), jax.tree.leaves(shardings), strict=True
  ):
    assert len(leaf.sharding.device_set) == 8, path
    assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), (path, leaf.sharding)


# Of the coordinate-wise functions, which share all code that knows of shards, one in both forms.
@pytest.mark.parametrize(
  ('name', 'form'),
  [(name, next(iter(FORMS))) for name in PREDICTORS]
  + [
    (name, list(FORMS)[1])
    for name in ('linear_fit', 'tsv', 'known_leaf', 'known_leaf_history_free')
  ],
)
def test_on_sharded_arrays(name, form):
  history, shardings = sharded_history(*FORMS[form])
  found = predict(history, 1, name)
  assert_close(found, predict(make_history(), 1, name))
  if name in COORDINATE_WISE:
    assert_sharded(found, shardings)


@pytest.mark.parametrize('name', ['known_leaf', 'known', 'tsv'])
def test_on_sharded_arrays_under_jit(name):
  expected = predict(make_history(), 1, name)
  for form in FORMS.values():
    history, shardings = sharded_history(*form)
    found = jax.jit(lambda h: predict(h, 1, name))(history)
    assert_close(found, expected)
    # A traced array shows its sharding only where the axes are explicit.
    if name == 'known_leaf' and AxisType.Explicit in form:
      assert_sharded(found, shardings)


def test_forecasts_and_trajectories_keep_the_sharding():
  history, shardings = sharded_history(False, AxisType.Auto)
  for predictor, steps in (('known_leaf', 1), ('linear_fit', 2)):
    found = know_jax.forecast(
      Trajectory.from_sequence(history), steps, predictor=predictor, **options_of(predictor)
    )
    assert len(found) == steps
    for stage in found:
      assert_sharded(stage, shardings)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('name', ['known_leaf', 'known', 'known_leaf_history_free', 'linear_fit'])
def test_no_weight_leaves_its_device(name, form):
  history, _ = sharded_history(*FORMS[form])
  plan = plan_of(history, 1, name, options_of(name).get('theta'), 0.5, None, 'keep', {})
  leaves = plan.history.leaves
  hlo = compiled.predict_leaves.lower(leaves, plan.theta, plan.job, (1,)).compile().as_text()
  assert 'num_partitions=8' in hlo
  for collective in ('all-gather', 'all-to-all', 'collective-permute'):
    assert collective not in hlo
  # Three numbers of a leaf's health, and the moments of KNOWN conditioned on the leaf.
  summed = re.findall(r'= (.*?) all-reduce\(', hlo)
  sizes = {shape for found in summed for shape in re.findall(r'\[([\d,]*)\]', found)}
  moments = {'known_leaf': {'5,5'}, 'known_leaf_history_free': {'1,1'}}.get(name, set())
  assert moments <= sizes <= moments | {'', '1'}, summed


def test_a_sharded_time_axis_gives_the_same_numbers():
  history = make_history(8, shapes=TINY)
  mesh = jax.make_mesh((8,), ('x',), axis_types=(AxisType.Auto,))
  stacked = jax.tree.map(
    lambda *stages: jax.device_put(np.stack(stages), NamedSharding(mesh, P('x'))), *history
  )
  for name in ('known_leaf', 'linear_fit'):
    assert_close(predict(stacked, 1, name), predict(history, 1, name))


# --- steps = 0, compiling once, forms of the history, forecast ------------------------------------


@EVERY
def test_no_step_is_the_identity_bit_for_bit(name):
  history = with_kept(make_history())
  odd = [-0.0, 0.0, 1e-45, -3.4e38]
  history[-1]['head']['bias'] = np.array(odd, np.float32)
  history[-1]['half'] = {'bias': np.array([-0.0, 0.0, 3.14, 1e-3], jnp.bfloat16)}
  for stage in history[:-1]:
    stage['head']['bias'], stage['half'] = np.ones(4, np.float32), history[-1]['half']
  assert_identical(PREDICTORS[name](history, 0), history[-1])
  stacked = Trajectory.from_sequence([s | {'table': np.int32(0)} for s in history])
  assert_identical(PREDICTORS[name](stacked, 0), history[-1] | {'table': np.int32(0)})


@EVERY
def test_a_second_call_compiles_nothing(name, caplog):
  def messages():
    names = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    caplog.clear()
    return [message for message in names if message.startswith('Compiling')]

  first, second = with_kept(make_history(seed=1)), with_kept(make_history(seed=2))
  stacked = [Trajectory.from_sequence(history) for history in map(drop_int64, (first, second))]
  predict(first, 2, name)
  predict(stacked[0], 2, name)
  with jax.log_compiles():
    sizes = [program._cache_size() for program in (compiled.predict_leaves, chunks._row_program())]
    predict(second, 2, name)
    predict(stacked[1], 2, name)
    assert not messages()
    assert [p._cache_size() for p in (compiled.predict_leaves, chunks._row_program())] == sizes
    jax.jit(lambda x: x + len(name))(1)
    assert messages()  # So the log would have shown it.


def drop_int64(history):
  return [{k: v for k, v in stage.items() if k != 'table'} for stage in history]


@EVERY
def test_the_three_forms_of_a_history_agree(name):
  history = make_history()
  found = predict(history, 2, name)
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *history)
  assert_identical(predict(tuple(history), 2, name), found)
  of_stacked = predict(stacked, 2, name)
  assert_identical(predict(Trajectory.from_sequence(history), 2, name), of_stacked)
  assert_close(of_stacked, found, rtol=1e-6, atol=1e-7)


@EVERY
def test_a_forecast_is_made_of_predictions(name):
  history = make_history(shapes=TINY)
  found = know_jax.forecast(history, 3, predictor=name, **options_of(name))
  for n in (1, 2, 3):
    assert_close(found[n - 1], predict(history, n, name), rtol=1e-6, atol=1e-7)


def test_predict_runs_known_one_step_ahead_by_default():
  history = make_history(shapes=TINY)
  assert_identical(
    know_jax.predict(history, theta=THETA),
    know_jax.predict(history, 1, predictor='known', rate=0.5, theta=THETA, kinds=None),
  )
  assert len(know_jax.forecast(history, theta=THETA)) == 3


def test_kinds_choose_the_network_and_what_is_kept():
  history = [{'a': s['head']['kernel'], 'b': s['head']['kernel']} for s in make_history()]
  kinds = {'a': 'conv', 'b': 'bias'}
  found = know_jax.predict(history, theta=THETA, kinds=lambda path, leaf: kinds[path])
  for path, kind in kinds.items():
    expected = know_jax.predict(
      [{'c': s['a']} for s in history], theta=THETA, kinds=lambda path, leaf, kind=kind: kind
    )
    assert_identical(found[path], expected['c'])
  assert (np.asarray(found['a']) != found['b']).any()
  with pytest.warns(KindsWarning, match='nothing is predicted: all of 2 leaves are kept'):
    kept = know_jax.predict(history, theta={}, kinds=lambda path, leaf: 'keep')
  assert_identical(kept, history[-1])


def test_known_reads_the_newest_stages():
  history = make_history(7, shapes=TINY)
  assert_identical(predict(history, 2, 'known_leaf'), predict(history[2:], 2, 'known_leaf'))
  theta = references.random_theta(3)
  assert_identical(
    know_jax.predict(history, theta=theta), know_jax.predict(history[-3:], theta=theta)
  )


def test_leaves_without_weights_and_scalars_are_no_trouble():
  history = [
    {'a': {'bias': np.zeros(0, np.float32)}, 'b': {'bias': np.float32(t)}} for t in range(5)
  ]
  for name in ('known_leaf', 'linear_fit'):
    found = predict(history, 1, name)
    trees.check_same(history[-1], found, names=('a stage', 'the result'))


@pytest.mark.parametrize('place', [0, 1023, 1024, 2999])
def test_a_leaf_of_which_one_weight_moved_has_moved(place):
  older, newer = (np.full(3000, 0.5, jnp.bfloat16) for _ in range(2))
  older[place] = 0.25
  found = predict([{'bias': older}, {'bias': newer}], 1, 'task_vector')['bias']
  expected = newer.copy()
  expected[place] = 0.75
  np.testing.assert_array_equal(np.asarray(found), expected)


# --- KNOWN block by block -------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks of 16 weights and runs of at most 40, so that small leaves take every path."""
  monkeypatch.setattr(compiled, 'BLOCK', 16)
  monkeypatch.setattr(compiled, 'SMALL', 16)
  monkeypatch.setattr(compiled, 'BATCH', 40)
  monkeypatch.setattr(chunks, 'ROW', 40)
  monkeypatch.setattr(chunks, 'ROW_BLOCK', 12)
  monkeypatch.setattr(chunks, 'LEAST_ROW', 16)
  monkeypatch.setattr(linear, 'CHUNK', 16)
  monkeypatch.setattr(linear, 'MOMENTS', 4)
  programs = (compiled.predict_leaves, chunks._row_program())
  for program in programs:
    program.clear_cache()
  yield
  for program in programs:
    program.clear_cache()


@jax.jit
def apply_module(params, windows):
  return jax.vmap(lambda window: KNOWN().apply({'params': params}, window))(windows)


def plain_known(history, steps):
  """The Flax module alone, weight by weight."""
  kinds = kinds_.leaf_kinds(history[-1])
  found = []
  for path, leaf in trees.named_leaves(history[-1]).items():
    window = np.stack([trees.named_leaves(stage)[path].ravel() for stage in history], -1)
    # Filled up to few sizes, as each is compiled.
    window = np.pad(window, ((0, max(64 - leaf.size, 0)), (0, 0)))
    for _ in range(steps):
      nearest = window[:, -1] + apply_module(THETA[kinds[path]], window)
      window = np.concatenate([window[:, 1:], nearest[:, None]], axis=1)
    found.append(window[: leaf.size, -1].reshape(leaf.shape))
  return jax.tree.unflatten(jax.tree.structure(history[-1]), found)


# Below, at and above a block, and more small leaves than one run takes.
BLOCKS = {f'fc{n}': {'kernel': (n, 1)} for n in (1, 15, 16, 17, 45)} | {
  f'bias{n}': {'bias': (n,)} for n in (5, 15, 14, 13)
}


def test_blocks_give_what_the_plain_module_gives(small_blocks):
  history = make_history(shapes=BLOCKS)
  expected = plain_known(history, 2)
  assert_close(know_jax.predict(history, 2, theta=THETA), expected)
  # Rows of two kinds and of many lengths.
  assert chunks._row_program()._cache_size() == 1
  assert_close(jax.jit(lambda h: know_jax.predict(h, 2, theta=THETA))(history), expected)


def scaled_known(history, steps):
  """KNOWN in units of the leaf by the formula in float64."""
  kinds = kinds_.leaf_kinds(history[-1])
  stages = [trees.named_leaves(stage) for stage in history]
  found = []
  for path in stages[-1]:
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), SCALED[kinds[path]])
    leaf = np.stack([stage[path] for stage in stages]).astype(np.float64)
    found.append(references.known_scaled(leaf, steps, params=params).astype(np.float32))
  return jax.tree.unflatten(jax.tree.structure(history[-1]), found)


def test_blocks_in_units_of_their_leaves_give_what_the_formula_gives(small_blocks):
  history = make_history(shapes=BLOCKS)
  # Each leaf has a unit of its own.
  for stage in history:
    for i, layer in enumerate(stage.values()):
      layer.update({name: leaf * np.float32(1 + i) for name, leaf in layer.items()})
  expected = scaled_known(history, 2)
  assert_close(know_jax.predict(history, 2, theta=SCALED), expected, atol=1e-5)
  assert chunks._row_program()._cache_size() == 1
  found = jax.jit(lambda h: know_jax.predict(h, 2, theta=SCALED))(history)
  assert_close(found, expected, atol=1e-5)
  stacked = know_jax.predict(Trajectory.from_sequence(history), 2, theta=SCALED)
  assert_close(stacked, expected, atol=1e-5)


@pytest.mark.parametrize('form', FORMS)
def test_shards_in_units_of_their_leaves_give_what_the_formula_gives(form):
  history, shardings = sharded_history(*FORMS[form])
  found = know_jax.predict(history, theta=SCALED)
  assert_close(found, scaled_known(make_history(), 1), atol=1e-5)
  assert_sharded(found, shardings)


def test_in_units_of_their_leaves_under_vmap_and_grad(small_blocks):
  histories = [make_history(shapes=SPILLING, seed=seed) for seed in range(2)]
  batch = jax.tree.map(lambda *leaves: np.stack(leaves), *histories)
  found = jax.vmap(lambda h: know_jax.predict(h, theta=SCALED))(batch)
  for i, history in enumerate(histories):
    assert_close(jax.tree.map(operator.itemgetter(i), found), scaled_known(history, 1), atol=1e-5)

  def loss(newest):
    stages = [*histories[0][:-1], {'a': {'kernel': newest}}]
    return know_jax.predict(stages, theta=SCALED)['a']['kernel'].sum()

  with jax.enable_x64(True):
    histories = [jax.tree.map(lambda leaf: leaf.astype(np.float64), histories[0])]
    newest = jnp.asarray(histories[0][-1]['a']['kernel'])
    jax.test_util.check_grads(loss, (newest,), 1, modes=['rev'], eps=1e-6)


@pytest.mark.parametrize('name', ['known', 'magmax'])
def test_rows_are_compiled_before_threads_take_them(small_blocks, monkeypatch, name):
  """So that a first call does not take the memory of both at a time."""
  rows, given_back, sizes = [], [], []
  monkeypatch.setattr(chunks, '_compiled', set())
  new_rows, program = chunks._new_rows, chunks._row_program()
  monkeypatch.setattr(chunks, '_new_rows', lambda *a: rows.append(None) or new_rows(*a))
  monkeypatch.setattr(chunks, 'processors', lambda: 3)
  monkeypatch.setattr(chunks, 'give_back_memory', lambda: given_back.append(len(rows)))
  in_threads = chunks.in_threads
  monkeypatch.setattr(
    chunks, 'in_threads', lambda *a: sizes.append(program._cache_size()) or in_threads(*a)
  )
  history = make_history(shapes={'fc': {'kernel': (200, 1)}})
  predict(history, 2, name)
  assert given_back == [1]  # One row to compile with, before those of the threads.
  assert sizes[0] == program._cache_size() == 1
  assert len(rows) == 4
  predict(history, 2, name)
  assert given_back == [1]
  assert len(rows) == 7


@hypothesis.given(st.lists(st.integers(0, 120), max_size=12), st.integers(1, 5))
@hypothesis.settings(deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_rows_hold_every_weight_once(small_blocks, sizes, threads):
  seen = [np.zeros(size, int) for size in sizes]
  lengths = []
  for parts in chunks._rows(sizes, threads):
    filled = np.zeros(40, int)
    for place, i, start, stop in parts:
      seen[i][start:stop] += 1
      filled[place : place + stop - start] += 1
    lengths.append(filled.sum())
    # Without a gap, each weight at a place of its own.
    assert filled[: lengths[-1]].all() and filled.max() == 1
  assert all((count == 1).all() for count in seen)
  # Equal rows but for the last, and work for every thread where there are blocks enough.
  assert len(set(lengths[:-1])) <= 1 and (not lengths or lengths[-1] <= lengths[0])
  if sum(sizes) >= 120 * threads:
    assert len(lengths) >= threads


def test_threads_give_the_same_bits(monkeypatch, small_blocks):
  history = make_history(shapes=BLOCKS)
  names = set()

  def spy(*args):
    names.add(threading.current_thread().name)
    return _residuals(*args)

  _residuals = chunks._residuals
  monkeypatch.setattr(chunks, '_residuals', spy)
  monkeypatch.setattr(chunks, 'processors', lambda: 1)
  expected = know_jax.forecast(history, 3, theta=THETA)
  assert names == {'MainThread'}
  monkeypatch.setattr(chunks, 'processors', lambda: 3)
  found = know_jax.forecast(history, 3, theta=THETA)
  assert len(names) > 2
  for stage, other in zip(found, expected, strict=True):
    assert_same_bits(stage, other)


def test_what_a_thread_raises_ends_the_rest():
  begun = []

  def fail_at_2(i):
    begun.append(i)
    if i == 2:
      raise FloatingPointError('the third')
    time.sleep(0.01)
    return i

  found = chunks.in_threads(fail_at_2, [(i,) for i in range(200)], 2)
  assert [next(found), next(found)] == [0, 1]
  with pytest.raises(FloatingPointError, match='the third'):
    next(found)
  assert len(begun) < 20


def test_threads_take_few_calls_ahead():
  taken = []

  def calls():
    for i in itertools.count():
      taken.append(i)
      yield (i,)

  found = chunks.in_threads(lambda i: -i, calls(), 2, ahead=1)
  assert [next(found) for _ in range(5)] == [0, -1, -2, -3, -4]
  assert len(taken) == 5 + 2
  found.close()


@hypothesis.given(
  st.lists(st.integers(1, 2000), min_size=1, max_size=8),
  st.sampled_from(['float32', 'bfloat16', 'float16']),
  st.integers(1, 5),
  st.booleans(),
)
@hypothesis.settings(deadline=None, max_examples=30)
def test_moments_of_leaves_that_share_a_chunk_are_those_of_each(sizes, dtype, count, is_alone):
  rng = np.random.default_rng(0)
  group = [
    pieces.Piece(
      Leaf(f'{i}/kernel', 'fc'),
      list(rng.normal(size=(5, size)).astype(jnp.dtype(dtype))),
      np.empty((1, size), dtype),
    )
    for i, size in enumerate(sizes)
  ]
  found = chunks.moment_sums(group, count, linear.Room() if is_alone else None)
  for piece, sums in zip(group, found, strict=True):
    history = np.stack(piece.stages[-count:]).astype(np.float64)
    v = np.concatenate([np.diff(history, axis=0), history[-1:]])
    np.testing.assert_allclose(sums, v @ v.T, rtol=1e-5, atol=1e-5 * np.sqrt(piece.size))


def test_float64_for_one_thread_stays_float64():
  history = make_history(dtype=np.float64, shapes={'a': {'kernel': (3 * compiled.BLOCK, 1)}})
  with jax.enable_x64(True):
    found = know_jax.predict(history, predictor='task_vector')
  older, newest = (stage['a']['kernel'] for stage in history[-2:])
  np.testing.assert_allclose(found['a']['kernel'], 2 * newest - older, rtol=0, atol=1e-14)


SPILLING = {'a': {'kernel': (37, 1)}}


def test_blocks_of_stacked_leaves(small_blocks):
  history = make_history(shapes=SPILLING | {'b': {'kernel': (3, 1)}, 'c': {'kernel': (14, 1)}})
  found = know_jax.predict(Trajectory.from_sequence(history), theta=THETA)
  assert_close(found, plain_known(history, 1))


def test_blocks_in_half_precision(small_blocks):
  # Stages far apart, so that their differences are not exact in half precision.
  stages = np.random.default_rng(0).normal(size=(5, 37, 1)).astype(np.float16)
  history = [{'a': {'kernel': stage}} for stage in stages]
  in_float32 = jax.tree.map(lambda leaf: leaf.astype(np.float32), history)
  expected = know_jax.predict(in_float32, 2, theta=THETA, on_bad='ignore')
  expected = jax.tree.map(lambda leaf: leaf.astype(np.float16), expected)
  assert_identical(know_jax.predict(history, 2, theta=THETA, on_bad='ignore'), expected)


def test_blocks_under_vmap(small_blocks):
  histories = [make_history(shapes=SPILLING, seed=seed) for seed in range(2)]
  batch = jax.tree.map(lambda *leaves: np.stack(leaves), *histories)
  found = jax.vmap(lambda h: know_jax.predict(h, theta=THETA))(batch)
  for i, history in enumerate(histories):
    assert_close(jax.tree.map(operator.itemgetter(i), found), plain_known(history, 1))


def test_the_gradient_through_blocks(small_blocks):
  # The last block overlaps the one before: no weight may count twice.
  history = make_history(shapes=SPILLING)

  def loss(history):
    return know_jax.predict(history, theta=THETA)['a']['kernel'].sum()

  def plain(history):
    windows = jnp.stack([stage['a']['kernel'].ravel() for stage in history])
    return known.rollout(known.fuse(THETA['fc']), windows, (1,)).sum()

  assert_close(jax.grad(loss)(history), jax.jit(jax.grad(plain))(history))


def test_blocks_of_sharded_leaves(small_blocks):
  history = make_history(shapes={'a': {'kernel': (8, 21)}, 'b': {'kernel': (8, 2)}})
  mesh = jax.make_mesh((8,), ('x',))
  put = functools.partial(jax.device_put, device=NamedSharding(mesh, P('x')))
  found = know_jax.predict(jax.tree.map(put, history), theta=THETA)
  assert_close(found, plain_known(history, 1))


def test_a_leaf_larger_than_the_real_block():
  history = make_history(shapes={'a': {'kernel': (compiled.SMALL + 1001, 1)}})
  assert_close(know_jax.predict(history, theta=THETA), plain_known(history, 1))


# --- what a coordinate-wise predictor may not see -------------------------------------------------


@pytest.mark.parametrize('name', [*COORDINATE_WISE, 'known_leaf'])
@hypothesis.given(seed=st.integers(0, 10**6))
@hypothesis.settings(max_examples=8, deadline=None)
def test_permuting_weights_permutes_predictions(name, seed):
  order = np.random.default_rng(seed).permutation(12)
  history = make_history(shapes={'head': {'kernel': (4, 3)}}, seed=seed)

  def permuted(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf).ravel()[order].reshape(4, 3), tree)

  found = predict([permuted(stage) for stage in history], 2, name)
  assert_close(found, permuted(predict(history, 2, name)))


@pytest.mark.parametrize('name', COORDINATE_WISE)
@hypothesis.given(cut=st.sampled_from([1, 4]), seed=st.integers(0, 10**6))
@hypothesis.settings(max_examples=5, deadline=None)
def test_splitting_a_leaf_splits_its_prediction(name, cut, seed):
  history = [
    {
      'whole': {'kernel': stage['kernel']},
      'first': {'kernel': stage['kernel'][:cut]},
      'rest': {'kernel': stage['kernel'][cut:]},
    }
    for stage in make_history(shapes={'kernel': (6, 2)}, seed=seed)
  ]
  found = predict(history, 2, name)
  parts = np.concatenate([found['first']['kernel'], found['rest']['kernel']])
  assert_close({'kernel': parts}, found['whole'])


# --- bad input ------------------------------------------------------------------------------------


def no_run(*args, **kwargs):
  raise AssertionError('something was computed before the error')


@pytest.fixture
def nothing_runs(monkeypatch):
  monkeypatch.setattr(compiled, 'predict_leaves', no_run)
  monkeypatch.setattr(chunks, 'predict', no_run)


def fails(message, history, steps=1, **options):
  for function in (know_jax.predict, know_jax.forecast):
    with pytest.raises(UserError, match=message):
      function(history, steps, **options)


@EVERY
def test_a_short_history_is_an_error_that_says_what_is_needed(name, nothing_runs):
  needed = {
    'known': 5,
    'known_leaf': 5,
    'least_squares': 5,
    'linear_fit': 2,
    'log_fit': 2,
    'exp_fit': 2,
  }.get(name, 1)
  needed = 2 if name in references.MAX_STEPS else needed
  if needed > 1:
    fails(
      f'predictor {name!r} needs a history of {needed} stages for steps=1; found {needed - 1}',
      make_history(needed - 1),
      predictor=name,
      **options_of(name),
    )
  fails('the history is empty', [], predictor=name, **options_of(name))


@pytest.mark.parametrize('name', references.MAX_STEPS)
def test_more_steps_than_the_history_allows_says_the_most(name, nothing_runs):
  fails(
    f'{name!r} needs a history of 6 stages for steps=5; found 3; with this history it can do at '
    'most steps=2',
    make_history(3),
    5,
    predictor=name,
  )


def test_known_needs_as_many_stages_as_theta_reads(nothing_runs):
  message = r"'known' needs a history of 3 stages for steps=4; found 2\."
  fails(message, make_history(2), 4, theta=references.random_theta(3))


@pytest.mark.parametrize(
  ('steps', 'message'),
  [
    (-1, 'steps is -1; expected at least [01]'),
    (1.0, r'steps is 1\.0; expected a Python integer'),
    ('2', "steps is '2'; expected a Python integer"),
    (None, 'steps is None; expected a Python integer'),
    (np.ones(2, int), r'steps is array\(\[1, 1\]\); expected a Python integer'),
  ],
)
def test_steps_must_be_a_natural_number(steps, message, nothing_runs):
  fails(message, make_history(), steps, predictor='persistence')


def test_a_forecast_has_at_least_one_step(nothing_runs):
  with pytest.raises(UserError, match='steps is 0; expected at least 1'):
    know_jax.forecast(make_history(), 0, predictor='persistence')


def test_steps_may_be_a_numpy_integer_but_no_traced_one():
  history = make_history(shapes=TINY)
  assert_identical(
    know_jax.predict(history, np.int64(2), predictor='average'),
    know_jax.predict(history, 2, predictor='average'),
  )
  with pytest.raises(UserError, match=r'steps is .*; expected a Python integer'):
    jax.jit(lambda n: know_jax.predict(history, n, predictor='average'))(2)


@pytest.mark.parametrize('rate', [0, 1, -0.5, 2, math.nan, math.inf, '0.5', None, np.ones(2)])
def test_the_rate_is_between_0_and_1(rate, nothing_runs):
  fails(r'rate is .*; expected a Python number in \(0, 1\)', make_history(), rate=rate)


def test_stages_that_differ_are_told_by_leaf_and_stage(nothing_runs):
  def differ(message, change):
    history = make_history()
    change(history[1])
    fails(message, history, predictor='linear_fit')

  newest = r'stage 4 \(the newest\)'
  differ(
    rf"stage 1 lacks leaf 'head/kernel', which {newest} has", lambda s: s['head'].pop('kernel')
  )
  differ(
    rf"stage 1 has leaf 'x', which {newest} lacks", lambda s: s.update(x=np.ones(1, np.float32))
  )
  differ(
    rf"leaf 'head/kernel' has shape \(4, 16\) in stage 1; expected \(16, 4\), as in {newest}",
    lambda s: s['head'].update(kernel=s['head']['kernel'].T),
  )
  differ(
    rf"leaf 'head/kernel' has dtype float16 in stage 1; expected float32, as in {newest}",
    lambda s: s['head'].update(kernel=s['head']['kernel'].astype(np.float16)),
  )
  differ(
    f'stage 1 has the leaves of {newest} in containers of other types: found .*FrozenDict',
    lambda s: s.update(head=flax.core.freeze(s['head'])),
  )


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('form', ['list', 'stacked', 'device', 'half'])
@pytest.mark.parametrize('name', ['linear_fit', 'known_leaf', 'known'])
def test_what_is_not_finite_is_told_by_leaf_stage_and_count(name, form, value, request):
  if name == 'known':  # Linear predictors see it while they combine the stages.
    request.getfixturevalue('nothing_runs')
  history = make_history(dtype=jnp.bfloat16 if form == 'half' else np.float32)
  history[1]['head']['kernel'][2, :3] = value
  history[3]['head']['kernel'][0, 0] = value
  given = Trajectory.from_sequence(history) if form == 'stacked' else history
  given = jax.device_put(given) if form == 'device' else given
  message = (
    r"leaf 'head/kernel' has 3 of 64 values NaN or infinite at stage 1 of 5 \(0 is the oldest"
  )
  fails(message, given, predictor=name)


@pytest.mark.parametrize('on_bad', ['keep', 'ignore'])
@pytest.mark.parametrize('name', ['persistence', 'task_vector', 'shrink', 'least_squares'])
@pytest.mark.parametrize('stage', [0, 4])
def test_what_is_not_finite_is_told_of_stages_that_are_not_used_too(name, stage, on_bad):
  history = make_history()
  history[stage]['conv']['bias'][1] = np.inf
  message = f"leaf 'conv/bias' has 1 of 8 values NaN or infinite at stage {stage} of 5"
  fails(message, history, predictor=name, on_bad=on_bad)
  with pytest.raises(UserError, match=message):
    know_jax.predict(history, 0, predictor=name)


def test_what_is_not_finite_is_found_in_a_constant_of_a_trace(nothing_runs):
  history = make_history()
  history[0]['conv']['bias'][0] = np.nan
  with pytest.raises(UserError, match="leaf 'conv/bias' has 1 of 8 values NaN"):
    jax.jit(lambda theta: know_jax.predict(history, theta=theta))(THETA)


def test_a_leaf_of_unknown_kind_is_an_error(nothing_runs):
  history = [{'token': {'kernels': stage['head']['kernel']}} for stage in make_history()]
  fails(r"leaf 'token/kernels' with shape \(16, 4\) has no known kind", history)
  fails('returned 3; expected one of conv, fc, bias, keep', history, kinds=lambda path, leaf: 3)


def test_stacked_leaves_must_agree_on_the_number_of_stages(nothing_runs):
  fails(
    r"leaf 'b/bias' has 4 stages on axis 0 \(shape \(4, 3\)\); expected 5, as leaf 'a/bias' has",
    {'a': {'bias': np.ones((5, 2), np.float32)}, 'b': {'bias': np.ones((4, 3), np.float32)}},
  )
  fails("leaf 'bias' of the stacked history is a scalar", {'bias': np.float32(1)})
  fails('the history is empty', {'bias': np.ones((0, 3), np.float32)})


@pytest.mark.parametrize('history', [{}, None, [{}, {}], [None, None], Trajectory({})])
def test_a_history_without_leaves_is_an_error(history, nothing_runs):
  fails('the history has no leaves', history)


@pytest.mark.parametrize('form', ['list', 'stacked'])
def test_float64_is_not_narrowed(form, nothing_runs):
  history = make_history(dtype=np.float64)
  if form == 'stacked':
    history = jax.tree.map(lambda *leaves: np.stack(leaves), *history)
  fails("leaf 'conv/bias' is float64, which JAX would narrow to float32", history)


def test_theta_must_have_every_kind_that_the_history_has(nothing_runs):
  theta = {kind: THETA[kind] for kind in ('conv', 'fc')}
  fails(
    r"no parameters for leaves of kind 'bias'; it has \['conv', 'fc'\]", make_history(), theta=theta
  )
  fails("no parameters for leaves of kind 'bias'; it has", make_history(), theta=THETA['conv'])


def test_theta_must_have_the_shapes_of_known(nothing_runs):
  fails(r"theta\['conv'\] has 'weights/embed/kernel' of shape None", make_history(),
        theta={**THETA, 'conv': 1.0})  # fmt: skip
  short = jax.tree.map(lambda leaf: leaf, THETA)
  short['fc']['residual']['bias'] = np.zeros(2, np.float32)
  fails(r"theta\['fc'\] has 'residual/bias' of shape \(2,\); expected \(1,\)", make_history(),
        theta=short)  # fmt: skip


@pytest.mark.parametrize('name', [n for n in PREDICTORS if not n.startswith('known')])
def test_theta_is_for_known_only(name, nothing_runs):
  fails(f'theta is for the predictors that run KNOWN; {name!r} takes none', make_history(),
        predictor=name, theta=THETA)  # fmt: skip


def test_unknown_predictors_and_options_are_errors(nothing_runs):
  fails("unknown predictor 'taskvector'. Did you mean 'task_vector'", make_history(),
        predictor='taskvector')  # fmt: skip
  fails("predictor 'known' has no option 'lam'", make_history(), lam=1.0)


def test_paths_that_collide_are_an_error(nothing_runs):
  history = [{'a/bias': s['conv']['bias'], 'a': s['conv']} for s in make_history()]
  fails("two leaves have the path 'a/bias'", history, predictor='linear_fit')
