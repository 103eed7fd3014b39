"""Bad predictions are found, told by leaf, and kept away from the result."""

import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import know_jax
from know_jax import kinds
from know_jax.errors import PredictionWarning, UserError
from know_jax.nowcast import chunks, compiled
from know_jax.nowcast import health as health_
from know_jax.nowcast.health import OutsideWarning
from know_jax.nowcast.plan import plan_of
from know_jax.predictors import known, known_leaf

THETA = known.init_theta(jax.random.key(0))
pytestmark = pytest.mark.filterwarnings('error')


def ramp(size=1.0, shape=(6,), stages=5, dtype=np.float32, speed=0.01):
  """A leaf that moves by a hundredth of its size from stage to stage."""
  rng = np.random.default_rng(0)
  end, move = rng.uniform(0.5, 1, shape), speed * rng.normal(size=shape)
  return [(size * (end + (t - stages + 1) * move)).astype(dtype) for t in range(stages)]


def history_of(**leaves):
  return [dict(zip(leaves, stage, strict=True)) for stage in zip(*leaves.values(), strict=True)]


# A weight of 1000 takes the exponentials of KNOWN beyond float32.
OVERFLOWING = {'good/kernel': ramp(0.1, (2, 3)), 'large/kernel': ramp(1000.0, (3, 2))}


def with_jit(history, **options):
  found = jax.jit(functools.partial(know_jax.predict, **options))(history)
  jax.block_until_ready(found)
  jax.effects_barrier()
  return found


WAYS = {
  'on the host': lambda history, **options: know_jax.predict(history, **options),
  'under jit': with_jit,
  'stacked on the device, under vmap': lambda history, **options: jax.tree.map(
    lambda leaf: leaf[0],
    jax.vmap(functools.partial(know_jax.predict, **options))(
      [jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], stage) for stage in history]
    ),
  ),
}


def caught(fn, *args, **options):
  with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter('always')
    result = fn(*args, **options)
    jax.effects_barrier()
  return result, [w for w in found if issubclass(w.category, PredictionWarning)]


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('steps', [1, 3])
def test_a_bad_leaf_keeps_its_newest_weights_and_is_told(way, steps):
  history = history_of(**OVERFLOWING)
  options = {'predictor': 'known', 'steps': steps, 'theta': THETA}
  raw = know_jax.predict(history, on_bad='ignore', **options)
  assert not np.isfinite(raw['large/kernel']).all()
  found, told = caught(WAYS[way], history, **options)
  np.testing.assert_array_equal(found['large/kernel'], history[-1]['large/kernel'])
  np.testing.assert_allclose(found['good/kernel'], raw['good/kernel'], rtol=1e-6)
  (warning,) = told
  message = str(warning.message)
  assert message.startswith('known: 1 of 2 leaves have a bad prediction, and keep their')
  assert "'large/kernel' (fc) at step" in message and 'NaN or infinity' in message
  assert 'good' not in message


def test_the_warning_points_at_the_caller():
  for call in (know_jax.predict, know_jax.forecast):
    _, (warning,) = caught(call, history_of(**OVERFLOWING), predictor='known', theta=THETA)
    assert warning.filename == __file__


@pytest.mark.parametrize('way', WAYS)
def test_ignored_nothing_is_said_or_changed(way):
  history = history_of(**OVERFLOWING)
  options = {'predictor': 'known', 'theta': THETA, 'on_bad': 'ignore'}
  found, told = caught(WAYS[way], history, **options)
  assert not told
  assert not np.isfinite(found['large/kernel']).all()


def test_raised_it_is_an_error_that_names_the_leaf():
  history = history_of(**OVERFLOWING)
  with pytest.raises(
    UserError, match=r"1 of 2 leaves .*: 'large/kernel' \(fc\) at step 1: it holds"
  ):
    know_jax.predict(history, predictor='known', theta=THETA, on_bad='raise')
  know_jax.predict(history, predictor='average', on_bad='raise')


def test_raised_under_jit_the_error_ends_the_computation(capfd):
  history = history_of(**OVERFLOWING)
  with pytest.raises(jax.errors.JaxRuntimeError, match="'large/kernel' \\(fc\\) at step 1"):
    with_jit(history, predictor='known', theta=THETA, on_bad='raise')
  capfd.readouterr()  # JAX logs the error as well.


def saturating(kind):
  """Parameters of KNOWN whose residual is tanh(100 theta^0) nearly, whatever else."""
  theta = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), THETA[kind])
  theta['weights']['embed']['kernel'][-1, 0] = 100.0
  theta['weights']['squeeze']['kernel'][0, 0] = 1.0
  theta['weights']['offset']['kernel'][0, 0] = 1.0
  theta['weights']['project']['kernel'][0, 0] = 1.0
  theta['residual']['kernel'][0, 0] = 1.0
  return theta


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('size', [compiled.SMALL // 3, compiled.SMALL + 5])
def test_a_saturated_residual_is_told(way, size):
  theta = THETA | {'bias': saturating('bias')}
  at_rest, saturated = np.full((5, size), 0.01, np.float32), np.zeros((5, size), np.float32)
  saturated[:, size // 2] = 0.5  # tanh(50): one weight of many.
  at_rest[0] = 1.0  # Not read by these parameters; the movement is to stay within its bound.
  saturated[0, 0] = 0.1  # A leaf that never moved would be left alone.
  history = history_of(**{'a/bias': list(at_rest), 'b/bias': list(saturated)})
  # tanh(100 x 0.01) is not saturated; one step on tanh(100 x 0.77) is.
  for steps, expected in ((1, ["'b/bias' (bias) at step 1"]), (2, ["'a/bias'", "'b/bias'"])):
    found, (told,) = caught(WAYS[way], history, steps=steps, predictor='known', theta=theta)
    message = str(told.message)
    assert all(text in message for text in expected) and 'a residual is saturated, at 1;' in message
    assert message.startswith(f'known: {len(expected)} of 2 leaves')
    np.testing.assert_array_equal(found['b/bias'], saturated[-1])
  np.testing.assert_array_equal(found['a/bias'], at_rest[-1])


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('dtype', [np.float32, np.float16, jnp.bfloat16])
def test_a_movement_beyond_the_bound_is_told(way, dtype):
  # The two-point task vector moves by 2 n from 1: 9 steps move by less than 10 times 2, 11 do not.
  values = [-1.0, -1.0, -1.0, -1.0, 1.0]
  history = history_of(**{'a/bias': [np.full(3, v, dtype) for v in values]})
  options = {'predictor': 'task_vector', 'variant': 'two_point'}
  for steps, bad in ((4, False), (6, True)):
    found, told = caught(WAYS[way], history, steps=steps, **options)
    assert bool(told) is bad
    np.testing.assert_array_equal(np.asarray(found['a/bias'], np.float32), 1 if bad else 9)
  assert 'a weight would move by 12; at most 10 times the largest weight of the leaf, 1,' in str(
    told[0].message
  )


def test_the_bound_is_that_of_the_largest_stage():
  # The newest stage is small: what counts is how large the leaf ever was.
  history = history_of(**{'a/bias': [np.full(3, v, np.float32) for v in (-1.0, 0.01)]})
  found, told = caught(know_jax.predict, history, 9, predictor='task_vector', variant='two_point')
  assert not told and found['a/bias'][0] == pytest.approx(0.01 + 9 * 1.01)


def test_leaves_still_zero_may_move_a_little():
  history = history_of(**{'a/bias': [np.full(3, v, np.float32) for v in (-0.0001, 0.0)]})
  _, told = caught(know_jax.predict, history, 900, predictor='task_vector', variant='two_point')
  assert not told
  _, told = caught(know_jax.predict, history, 1100, predictor='task_vector', variant='two_point')
  assert len(told) == 1


def test_an_overflow_of_half_precision_is_told():
  history = history_of(**{'a/bias': [np.full(3, v, np.float16) for v in (1e4, 6e4)]})
  found, (told,) = caught(know_jax.predict, history, 1, predictor='task_vector')
  assert 'NaN or infinity' in str(told.message)
  np.testing.assert_array_equal(found['a/bias'], history[-1]['a/bias'])


def test_each_step_of_a_forecast_is_looked_at():
  history = history_of(**{'a/bias': [np.full(3, v, np.float32) for v in (-1.0, 1.0)]})
  found, (told,) = caught(
    know_jax.forecast, history, 7, predictor='task_vector', variant='two_point'
  )
  values = [float(stage['a/bias'][0]) for stage in found]
  assert values == [3, 5, 7, 9, 11, 1, 1]
  assert "'a/bias' (bias) at step 6" in str(told.message)


@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize('predictor', ['known', 'task_vector'])
def test_sharded_leaves_are_looked_at_where_they_lie(axis_type, predictor):
  mesh = jax.make_mesh((8,), ('x',), axis_types=(axis_type,))
  sharding = NamedSharding(mesh, PartitionSpec('x'))
  stages = [np.full(64, v, np.float32) for v in (-1.0, -1.0, -1.0, -1.0, 1.0)]
  stages[-1][-1] = 1000.0 if predictor == 'known' else 1.0
  if predictor == 'task_vector':
    stages[-2][-1] = 100.0
  history = [{'a/bias': jax.device_put(stage, sharding)} for stage in stages]
  theta = THETA | {'bias': saturating('bias')}
  options = {'known': {'theta': theta}, 'task_vector': {'lam': -12.0}}[predictor]
  found, (told,) = caught(know_jax.predict, history, 1, predictor=predictor, **options)
  assert "'a/bias' (bias) at step 1" in str(told.message)
  assert found['a/bias'].sharding.is_equivalent_to(sharding, 1)
  np.testing.assert_array_equal(found['a/bias'], stages[-1])


def test_the_gradient_of_a_kept_leaf_is_that_of_keeping():
  history = [{'a/bias': jnp.full(3, v)} for v in (-1.0, 1.0)]

  def total(history):
    found = know_jax.predict(history, 6, predictor='task_vector', variant='two_point')
    return found['a/bias'].sum()

  found, told = caught(jax.grad(total), history)
  assert len(told) == 1
  np.testing.assert_array_equal(found[-1]['a/bias'], 1)
  np.testing.assert_array_equal(found[0]['a/bias'], 0)


def test_an_unknown_choice_is_an_error():
  with pytest.raises(UserError, match=r"unknown choice of on_bad 'rise'\. Did you mean 'raise'"):
    know_jax.predict(history_of(**{'a/bias': ramp()}), on_bad='rise')


# --- outside the meta-dataset ---------------------------------------------------------------------


def context_in_float64(stages, rate):
  """The context of `known_leaf`, from its description, in NumPy."""
  flat = np.stack([stage.ravel() for stage in stages]).astype(np.float64)
  d, w = np.diff(flat, axis=0), flat[-1]
  squares, movement = (d**2).mean(1), (d**2).mean()

  def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))

  pairs = [cosine(d[i], d[j]) for i in range(len(d)) for j in range(i + 1, len(d))]
  with_newest = [cosine(x, w) for x in d]
  logs = np.clip(np.log([*squares / movement, movement / (w**2).mean()]), -12, 12)
  return np.array([*logs[:-1], *pairs, *with_newest, logs[-1], np.log(rate)])


@pytest.mark.parametrize('way', WAYS)
def test_a_trajectory_unlike_any_of_the_meta_dataset_is_told(way):
  theta = know_jax.load_known(shipped='known_leaf')
  odd = ramp(speed=1e-4)
  # What never moved stays where it is: that is no reason to warn.
  history = history_of(**{'odd/bias': odd, 'still/bias': [np.ones(6, np.float32)] * 5})
  found, told = caught(WAYS[way], history, rate=0.5, predictor='known_leaf')
  (warning,) = told
  assert warning.category is OutsideWarning
  message = str(warning.message)
  context = context_in_float64(odd, 0.5)
  distance = np.abs((context - theta['bias']['mean']) / theta['bias']['scale']).max()
  assert distance > known_leaf.FARTHEST
  assert message.startswith('known_leaf: 1 of 2 leaves lie outside the meta-dataset')
  assert f"'odd/bias' (bias), {distance / known_leaf.FARTHEST:.1f} times the limit" in message
  # It is predicted all the same.
  raw = know_jax.predict(history, predictor='known_leaf', on_bad='ignore')
  np.testing.assert_allclose(found['odd/bias'], raw['odd/bias'], rtol=1e-5)


def test_what_the_meta_dataset_holds_is_not_told():
  theta = know_jax.load_known(shipped='known_leaf')
  moments = np.eye(5, dtype=np.float32)
  shifted = {**theta['bias'], 'mean': known_leaf.context(moments, 0.5)}
  assert known_leaf.outside(shifted, moments, 0.5) == 0
  shifted['mean'] = shifted['mean'].at[3].add(4.5 * theta['bias']['scale'][3])
  assert known_leaf.outside(shifted, moments, 0.5) == pytest.approx(4.5 / 4, rel=1e-4)


def test_the_report_names_five_and_counts_the_rest():
  health = np.zeros((7, 1, health_.FIELDS))
  health[:, 0, 0] = math.inf
  leaves = [(f'{i}/kernel', 'fc') for i in range(7)]
  with pytest.raises(UserError, match=r"7 of 7 .*'4/kernel' .*; and 2 more\.$") as error:
    health_.report(health, predictor='p', leaves=leaves, steps=(2,), on_bad='raise')
  assert "'5/kernel'" not in str(error.value)


@pytest.mark.parametrize(
  ('numbers', 'bad'),
  [
    ((0, 0, 0, 0), False),
    ((10, 0, 1, 0), False),
    ((10.1, 0, 1, 0), True),
    ((0.09, 0, 0, 0), False),  # The floor of the scale.
    ((0.11, 0, 0, 0), True),
    ((0, 0.999, 1, 0), False),
    ((0, 0.9995, 1, 0), True),
    ((math.inf, 0, math.inf, 0), True),
    ((math.nan, 0, 1, 0), True),
    ((0, math.nan, 1, 0), True),
    ((0, 0, math.nan, 0), True),
    ((1, 0, 1, 99), False),  # Far outside is worth a warning, and no more.
  ],
)
def test_what_is_bad(numbers, bad):
  assert health_.is_bad(np.array(numbers, np.float32)) == bad
  assert health_.is_bad(jnp.array(numbers, jnp.float32)) == bad


@pytest.mark.parametrize('predictor', ['known', 'known_leaf'])
def test_health_on_the_host_and_on_the_device_agree(predictor):
  theta = references.random_theta()
  if predictor == 'known_leaf':  # It alone knows how far outside of the meta-dataset a leaf is.
    theta = know_jax.load_known(shipped=predictor)
  history = history_of(**{'a/kernel': ramp(0.3, (4, 5)), 'b/kernel': ramp(2.0, (3, 3, 2, 2))})
  plan = plan_of(history, 2, predictor, theta, 0.5, None, 'keep', {})
  leaves = plan.history.leaves
  with jax.ensure_compile_time_eval():
    _, on_host = chunks.predict_leaves(leaves, theta, plan.job, (1, 2))
  _, on_device = compiled.predict_leaves(leaves, theta, plan.job, (1, 2))
  # The scale of the host is that of the newest stage where older ones make no difference.
  compared = [0, 1, 3]
  assert (on_host[..., 3] > 0).any() == (predictor == 'known_leaf')
  np.testing.assert_allclose(on_host[..., compared], on_device[..., compared], 1e-4, 1e-6)
  np.testing.assert_array_equal(health_.is_bad(on_host), health_.is_bad(on_device))
  assert kinds.leaf_kinds(history[-1])['a/kernel'] == 'fc'
