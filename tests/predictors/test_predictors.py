"""Every predictor's numbers against the float64 references, in float64 and in float32."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import references
from runs import compilations

import know_jax
from know_jax.errors import UserError
from know_jax.predictors.base import max_steps
from know_jax.predictors.registry import resolve

# Path -> shape, kind, and the shape of the matrix that tsv reads. A leaf of each kind is little to
# compile; the others are for shapes and for tsv.
KINDS = {
  'conv/kernel': ((3, 3, 2, 2), 'conv', (18, 2)),
  'head/kernel': ((4, 3), 'fc', (4, 3)),
  'head/bias': ((3,), 'bias', None),
}
ONE = {'head/kernel': KINDS['head/kernel']}
SMALL = {
  **KINDS,
  'attention/out/kernel': ((2, 2, 3), 'fc', (4, 3)),
  'attention/query/bias': ((2, 2), 'bias', None),
  'scalar/bias': ((), 'bias', None),
}
# Large enough for tsv's rank to differ from 1, and between ways to read the leaf as a matrix.
LARGE = {
  'conv/kernel': ((3, 3, 4, 20), 'conv', (36, 20)),
  'conv1d/kernel': ((3, 10, 20), 'conv', (30, 20)),
  'head/kernel': ((40, 29), 'fc', (40, 29)),
  'attention/query/kernel': ((24, 5, 5), 'fc', (24, 25)),
  'attention/key/kernel': ((21, 4, 6), 'fc', (21, 24)),
  'attention/value/kernel': ((22, 7, 3), 'fc', (22, 21)),
  'attention/out/kernel': ((5, 5, 24), 'fc', (25, 24)),
  'nnx/out/kernel/value': ((5, 4, 21), 'fc', (20, 21)),
  'nnx/key/kernel/value': ((21, 4, 5), 'fc', (21, 20)),
  'attention/query/bias': ((21, 21), 'bias', None),
  'head/bias': ((31,), 'bias', None),
}
THETA = references.random_theta()
CONDITIONED = references.random_conditioned_theta()
COEFFICIENTS = {
  'conv': (0.1, -0.2, 0.3, 0.4, -0.05),
  'fc': (0.0, 0.1, 0.2, 0.5, 0.02),
  'bias': (0.3, 0.0, -0.1, 0.2, 0.0),
}


def make_history(leaves, length, seed=0):
  """Path -> `[T, ...]` float64: weights that start anywhere and move a little at every stage."""
  rng = np.random.default_rng(seed)
  return {
    path: 0.1 * rng.normal(size=shape) + 0.02 * rng.normal(size=(length, *shape)).cumsum(0)
    for path, (shape, _, _) in leaves.items()
  }


def reference(name, path, leaves, options):
  """The reference for one leaf, with the options that it takes."""
  _, kind, matrix = leaves[path]
  options = dict(options)
  if name == 'tsv':
    options['matrix'] = matrix
  if name == 'shrink':
    c = options.pop('c', {})
    options['c'] = (references.SHRINK | c)[kind] if isinstance(c, dict) else c
  if name == 'least_squares':
    options['coefficients'] = options['coefficients'][kind]
  if name.startswith('known'):
    params = options.pop('theta')[kind]
    options['params'] = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    if 'step' in params:
      options = {'rate': 0.5} | options
  return functools.partial(getattr(references, name), **options)


def largest_step(name, options, length, most=4):
  if name in references.MAX_STEPS and options.get('variant') != 'two_point':
    return min(most, references.MAX_STEPS[name](length))
  return most


def check(name, options, leaves, length, rtol, atol, dtype):
  steps = largest_step(name, options, length)
  history = {path: leaf.astype(dtype) for path, leaf in make_history(leaves, length).items()}
  # Random weights go far.
  found = know_jax.forecast(history, steps, predictor=name, on_bad='ignore', **options).weights
  assert set(found) == set(history)
  for path, leaf in history.items():
    of_leaf = reference(name, path, leaves, options)
    expected = np.stack([of_leaf(leaf.astype(np.float64), n) for n in range(1, steps + 1)])
    assert found[path].dtype == dtype
    np.testing.assert_allclose(found[path], expected, rtol=rtol, atol=atol, err_msg=path)


KNOWN_OPTIONS = {'theta': THETA}
FITS = [
  *[('linear_fit', {'rate': rate}) for rate in (0.5, 0.3)],
  ('linear_fit', {'regressor': 'index'}),
  ('log_fit', {}),
  ('exp_fit', {}),
]
LOOKING_BACK = [('task_vector', {}), ('magmax', {}), ('consensus_ta', {}), ('average', {})]
CASES = [(name, options, length) for length in range(2, 8) for name, options in FITS]
CASES += [(name, options, length) for length in (2, 3, 4, 5, 7) for name, options in LOOKING_BACK]
CASES += [
  ('linear_fit', {'rate': 0.9}, 4),
  ('log_fit', {'rate': 0.3}, 4),
  ('persistence', {}, 1),
  ('persistence', {}, 5),
  ('shrink', {}, 1),
  ('shrink', {}, 5),
  ('task_vector', {'lam': 0.3}, 4),
  ('task_vector', {'lam': -2}, 3),
  ('task_vector', {'variant': 'two_point'}, 2),
  ('task_vector', {'variant': 'two_point'}, 5),
  ('task_vector', {'variant': 'two_point', 'lam': 0.3}, 3),
  ('shrink', {'c': 0.2}, 2),
  ('shrink', {'c': {'fc': 0.5}}, 2),
  ('shrink', {'c': {'bias': -0.1, 'conv': 1.5, 'fc': 0}}, 2),
  ('least_squares', {'coefficients': COEFFICIENTS}, 6),
  ('least_squares', {'coefficients': {k: c[2:] for k, c in COEFFICIENTS.items()}}, 3),
  ('known', KNOWN_OPTIONS, 7),
  ('known', {'theta': references.random_theta(3)}, 4),
  ('known_leaf', {'theta': CONDITIONED}, 7),
  ('known_leaf', {'theta': CONDITIONED, 'rate': 0.8}, 5),
  ('known_leaf', {'theta': references.random_conditioned_theta(3)}, 4),
  ('known_history_free', KNOWN_OPTIONS, 1),
  ('known_leaf_history_free', {'theta': CONDITIONED}, 1),
]


def case_name(value):
  if isinstance(value, dict):
    return (
      ','.join(k if k in ('theta', 'coefficients') else f'{k}={v}' for k, v in value.items())
      or 'default'
    )
  return str(value)


@pytest.mark.parametrize(('name', 'options', 'length'), CASES, ids=case_name)
def test_numbers_in_float64(name, options, length):
  with jax.enable_x64(True):
    if 'theta' in options:
      theta = jax.tree.map(lambda leaf: leaf.astype(np.float64), options['theta'])
      options = options | {'theta': theta}
    by_kind = name in ('shrink', 'least_squares') or name.startswith('known')
    leaves = KINDS if by_kind else ONE
    check(name, options, leaves, length, rtol=1e-9, atol=1e-12, dtype=np.float64)


def test_numbers_of_tsv_in_float64():
  with jax.enable_x64(True):
    check('tsv', {}, LARGE, 3, rtol=1e-9, atol=1e-12, dtype=np.float64)


# exp_fit's error is that of the logarithms times the steepness of the exponential.
@pytest.mark.parametrize('name', know_jax.PREDICTORS)
def test_numbers_in_float32(name):
  options = {'theta': CONDITIONED if 'leaf' in name else THETA}
  if not name.startswith('known'):
    options = {'coefficients': COEFFICIENTS} if name == 'least_squares' else {}
  rtol = 1e-4 if name == 'exp_fit' else 1e-5
  check(name, options, SMALL, 5, rtol=rtol, atol=2e-6, dtype=np.float32)


def test_all_predictors_are_referenced_here():
  assert set(know_jax.PREDICTORS) == {name for name, *_ in CASES} | {'tsv'}


def predict_scalar(values, steps, **options):
  history = {'bias': np.asarray(values, np.float32)}
  return float(know_jax.predict(history, steps, on_bad='ignore', **options)['bias'])


# --- cases that can be worked out by hand ---------------------------------------------------------


@pytest.mark.parametrize('rate', [0.5, 0.25])
def test_fits_continue_what_they_fit(rate):
  ages = np.arange(4, -1, -1)
  for n in (1, 2, 3):
    on_size = predict_scalar(3 - 2 * rate**ages, n, predictor='linear_fit', rate=rate)
    np.testing.assert_allclose(on_size, 3 - 2 * rate**-n, rtol=1e-5)
    for options in ({'predictor': 'log_fit'}, {'predictor': 'linear_fit', 'regressor': 'index'}):
      on_index = predict_scalar(3 - 2.0 * ages, n, rate=rate, **options)
      np.testing.assert_allclose(on_index, 3 + 2 * n, rtol=1e-5)
    growth = predict_scalar(-2 * 1.5 ** (-ages), n, predictor='exp_fit')
    np.testing.assert_allclose(growth, -2 * 1.5**n, rtol=1e-5)


def test_exp_fit_takes_the_sign_of_the_newest_weight_and_survives_zeros():
  assert predict_scalar([-1, 1, -1, 1], 2, predictor='exp_fit') == 1
  assert predict_scalar([1, 2, 4, 0], 1, predictor='exp_fit') == 0
  assert predict_scalar([0, 0], 1, predictor='exp_fit') == 0
  found = predict_scalar([0, 1e-6], 1, predictor='exp_fit')
  np.testing.assert_allclose(found, 1, rtol=1e-4)  # From 1e-12 to 1e-6 in one stage.


def test_magmax_gives_a_tie_to_the_older_stage():
  # tau_1 = 1, tau_2 = -1, tau_3 = 0.5.
  assert predict_scalar([2.5, 4, 2, 3], 1, predictor='magmax') == 4
  assert predict_scalar([2.5, 4, 2, 3], 2, predictor='magmax') == 2
  assert predict_scalar([2.5, 4, 2, 3], 3, predictor='magmax') == 2


@pytest.mark.parametrize(
  ('deltas', 'moves'),  # Newest first.
  [
    ((1, 1, 1), True),
    ((5, 1, 1), False),  # Only the first exceeds 0.4 times the others.
    ((5, 2, 0), False),  # The second equals 0.4 times the others: a mask wants more.
    ((5, 2.5, 0), True),
    ((-5, 2.5, 0), True),
    ((3, -3, 1), True),
    ((0, 0, 0), False),
  ],
)
def test_consensus_wants_two_masks_of_three(deltas, moves):
  values = [0.0]
  for delta in reversed(deltas):
    values.append(values[-1] + delta)
  expected = values[-1] + (values[-1] - values[0] if moves else 0)
  assert predict_scalar(values, 3, predictor='consensus_ta') == expected


def test_consensus_below_three_steps_is_the_task_vector():
  for n in (1, 2):
    assert predict_scalar([0, 5, 7, 7.5], n, predictor='consensus_ta') == predict_scalar(
      [0, 5, 7, 7.5], n, predictor='task_vector'
    )


def test_tsv_of_a_movement_of_rank_one_is_the_task_vector():
  rng = np.random.default_rng(0)
  old = rng.normal(size=(6, 4)).astype(np.float32)
  new = old + np.outer(rng.normal(size=6), rng.normal(size=4)).astype(np.float32)
  history = [{'kernel': old}, {'kernel': new}]
  found = know_jax.predict(history, predictor='tsv')['kernel']
  np.testing.assert_allclose(found, 2 * new - old, atol=1e-5)


def test_tsv_is_compiled_once_for_all_matrices_of_a_shape():
  rng = np.random.default_rng(0)

  def history(count):
    names = [f'layer{i}' for i in range(count)]
    return [
      {name: {'kernel': rng.normal(size=(9, 7)).astype(np.float32)} for name in names}
      for _ in range(2)
    ]

  know_jax.predict(history(1), predictor='tsv')
  many = history(12)
  with compilations() as found:
    predicted = know_jax.predict(many, predictor='tsv')
  assert not found
  for name, layer in predicted.items():
    old, new = (stage[name]['kernel'] for stage in many)
    u, s, vt = np.linalg.svd(new - old)
    np.testing.assert_allclose(layer['kernel'], new + s[0] * np.outer(u[:, 0], vt[0]), atol=1e-5)


def test_a_predictor_of_whole_leaves_is_told_the_path_of_each():
  class ByName(know_jax.WholeLeaf):
    def predict(self, history, leaf, params, rate, steps):
      return history[-1] + len(leaf.path)

  history = [
    {name: {'kernel': np.full((3, 2), t, np.float32)} for name in ('a', 'long')} for t in (-1, 0)
  ]
  found = know_jax.predict(history, predictor=ByName(), on_bad='ignore')
  assert {name: set(np.ravel(layer['kernel'])) for name, layer in found.items()} == {
    'a': {len('a/kernel')}, 'long': {len('long/kernel')}
  }  # fmt: skip


@pytest.mark.parametrize('name', ['linear_fit', 'log_fit'])
def test_fits_keep_the_digits_of_a_small_movement_far_from_zero(name):
  # From 64 to 128 float32 has steps of 2**-17; a sum of coefficient times weight would lose them.
  last = np.random.default_rng(0).integers(65 * 2**17, 127 * 2**17, 500) * 2.0**-17
  history = [{'bias': (last + (t - 4) * 2.0**-17).astype(np.float32)} for t in range(5)]
  options = {'regressor': 'index'} if name == 'linear_fit' else {}
  found = know_jax.predict(history, 2, predictor=name, **options)['bias']
  np.testing.assert_array_equal(found, last + 2 * 2.0**-17)


# --- symmetries -----------------------------------------------------------------------------------
# With histories of the shapes of the tests of numbers above, for which all is compiled already.
# That permuting weights permutes predictions, and that coordinate-wise predictors split a leaf's
# prediction with the leaf, is also in test_nowcast.py.

OF_THE_WHOLE_LEAF = ('known_leaf', 'tsv')
COORDINATE_WISE = [name for name in know_jax.PREDICTORS if name not in OF_THE_WHOLE_LEAF]
# The paper's KNOWN has exponentials and biases: it knows how large a weight is.
NOT_OF_DEGREE_ONE = ('tsv', 'known', 'known_history_free')
OF_DEGREE_ONE = [name for name in know_jax.PREDICTORS if name not in NOT_OF_DEGREE_ONE]
# Their coefficients sum to one.
OF_DIFFERENCES = (
  'persistence', 'linear_fit', 'log_fit', 'task_vector', 'magmax', 'consensus_ta', 'average', 'tsv'
)  # fmt: skip
seeds = st.integers(0, 10**6)


def small_forecast(name, history):
  # A leaf that moves too far would be kept as a whole.
  options = {'on_bad': 'ignore'}
  if name.startswith('known'):
    options['theta'] = CONDITIONED if 'leaf' in name else THETA
  if name == 'least_squares':
    options['coefficients'] = COEFFICIENTS
  steps = largest_step(name, options, 5)
  history = {path: leaf.astype(np.float32) for path, leaf in history.items()}
  found = know_jax.forecast(history, steps, predictor=name, **options).weights
  return {path: np.asarray(leaf) for path, leaf in found.items()}


def orthogonal(rng, size):
  return np.linalg.qr(rng.normal(size=(size, size)))[0]


@pytest.mark.parametrize('name', COORDINATE_WISE)
@hypothesis.given(seed=seeds)
@hypothesis.settings(max_examples=5, deadline=None)
def test_a_weight_is_predicted_from_its_own_history_alone(name, seed):
  # Hence any part of a leaf is predicted as it is in the whole. Bit for bit, but for the control
  # that reads the leaf's moments and finds no movement there.
  rng = np.random.default_rng(seed)
  history = make_history(SMALL, 5, seed)
  untouched = {path: rng.random(leaf.shape[1:]) < 0.5 for path, leaf in history.items()}
  other = {
    path: np.where(untouched[path], leaf, leaf + rng.normal(size=leaf.shape))
    for path, leaf in history.items()
  }
  expected, found = small_forecast(name, history), small_forecast(name, other)
  for path, mask in untouched.items():
    rtol = 1e-6 if name == 'known_leaf_history_free' else 0
    np.testing.assert_allclose(
      found[path][:, mask], expected[path][:, mask], rtol=rtol, err_msg=path
    )


@pytest.mark.parametrize('name', OF_DEGREE_ONE)
@hypothesis.given(seed=seeds, power=st.integers(-4, 4))
@hypothesis.settings(max_examples=5, deadline=None)
def test_weights_moved_about_with_other_signs_and_scale_have_such_predictions(name, seed, power):
  rng = np.random.default_rng(seed)
  history = make_history(SMALL, 5, seed)
  orders = {path: rng.permutation(leaf[0].size) for path, leaf in history.items()}
  signs = {path: rng.choice([-1, 1], leaf[0].size) for path, leaf in history.items()}

  def moved(path, leaf):
    flat = leaf.reshape(len(leaf), -1)
    return (2.0**power * signs[path] * flat[:, orders[path]]).reshape(leaf.shape)

  expected = small_forecast(name, history)
  found = small_forecast(name, {path: moved(path, leaf) for path, leaf in history.items()})
  rtol = 1e-4 if name == 'exp_fit' else 1e-5
  for path, leaf in expected.items():
    atol = 2e-6 * 2.0**power
    np.testing.assert_allclose(found[path], moved(path, leaf), rtol=rtol, atol=atol, err_msg=path)


@pytest.mark.parametrize('name', OF_DIFFERENCES)
@hypothesis.given(seed=seeds, shift=st.integers(-8, 8))
@hypothesis.settings(max_examples=5, deadline=None)
def test_shifting_all_stages_shifts_the_prediction(name, seed, shift):
  # Multiples of 2**-12, so that float32 holds the shifted stages exactly.
  history = {
    path: np.round(leaf * 2**12) / 2**12 for path, leaf in make_history(SMALL, 5, seed).items()
  }
  expected = small_forecast(name, history)
  found = small_forecast(name, {path: leaf + shift for path, leaf in history.items()})
  for path, leaf in expected.items():
    np.testing.assert_allclose(found[path], leaf + shift, rtol=1e-6, atol=1e-5, err_msg=path)


@hypothesis.given(seed=seeds)
@hypothesis.settings(max_examples=3, deadline=None)
def test_rotating_rows_and_columns_rotates_the_prediction_of_tsv(seed):
  # Permutations and reflections of either among them: singular values do not see them.
  rng = np.random.default_rng(seed)
  history = make_history(LARGE, 3, seed)
  turns = {
    path: [orthogonal(rng, size) for size in matrix]
    for path, (_, _, matrix) in LARGE.items()
    if matrix
  }

  def rotated(path, leaf):
    if path not in turns:
      return leaf
    rows, columns = turns[path]
    matrices = leaf.reshape(len(leaf), len(rows), len(columns))
    return (rows @ matrices @ columns).reshape(leaf.shape)

  with jax.enable_x64(True):
    forecast = functools.partial(know_jax.forecast, steps=2, predictor='tsv', on_bad='ignore')
    expected = forecast(history).weights
    found = forecast({path: rotated(path, leaf) for path, leaf in history.items()}).weights
    for path, leaf in expected.items():
      # The nearer two singular values are, the less do the vectors beside them hold still.
      np.testing.assert_allclose(
        found[path], rotated(path, np.asarray(leaf)), atol=1e-9, err_msg=path
      )


def test_tsv_sees_which_weights_share_a_row_or_a_column():
  history = make_history(LARGE, 3)
  order = np.random.default_rng(0).permutation(40 * 29)

  def moved(leaf):
    return leaf.reshape(len(leaf), -1)[:, order].reshape(leaf.shape)

  with jax.enable_x64(True):
    forecast = functools.partial(know_jax.forecast, steps=2, predictor='tsv', on_bad='ignore')
    expected = np.asarray(forecast(history).weights['head/kernel'])
    shuffled = history | {'head/kernel': moved(history['head/kernel'])}
    found = np.asarray(forecast(shuffled).weights['head/kernel'])
  assert np.abs(found - moved(expected)).max() > 0.01


@hypothesis.given(seed=seeds)
@hypothesis.settings(max_examples=5, deadline=None)
def test_rotating_all_weights_of_a_leaf_rotates_the_prediction_of_known_leaf(seed):
  # It sees the leaf's second moments only. Permutations are rotations of this sort.
  rng = np.random.default_rng(seed)
  history = make_history(KINDS, 7, seed)
  turns = {path: orthogonal(rng, leaf[0].size) for path, leaf in history.items()}

  def rotated(path, leaf):
    return (leaf.reshape(len(leaf), -1) @ turns[path]).reshape(leaf.shape)

  with jax.enable_x64(True):
    theta = jax.tree.map(lambda leaf: leaf.astype(np.float64), CONDITIONED)
    forecast = functools.partial(
      know_jax.forecast, steps=4, predictor='known_leaf', theta=theta, on_bad='ignore'
    )
    expected = forecast(history).weights
    found = forecast({path: rotated(path, leaf) for path, leaf in history.items()}).weights
  for path, leaf in expected.items():
    np.testing.assert_allclose(
      found[path], rotated(path, np.asarray(leaf)), rtol=1e-9, atol=1e-10, err_msg=path
    )


@hypothesis.given(seed=seeds)
@hypothesis.settings(max_examples=5, deadline=None)
def test_known_leaf_splits_a_leaf_into_parts_that_have_moved_alike(seed):
  rng = np.random.default_rng(seed)
  part = make_history(ONE, 5, seed)['head/kernel'].reshape(5, 12)
  # A rotation keeps the moments: the parts have those of the whole.
  first, rest = (leaf.reshape(5, 4, 3) for leaf in (part, part @ orthogonal(rng, 12)))
  history = {
    'whole': {'kernel': np.concatenate([first, rest], axis=1)},
    'first': {'kernel': first},
    'rest': {'kernel': rest},
  }
  history = jax.tree.map(lambda leaf: leaf.astype(np.float32), history)
  found = know_jax.predict(history, 2, predictor='known_leaf', theta=CONDITIONED)
  parts = np.concatenate([found['first']['kernel'], found['rest']['kernel']])
  np.testing.assert_allclose(parts, found['whole']['kernel'], rtol=1e-4, atol=1e-5)


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    ('linear', {}, "unknown predictor 'linear'. Did you mean 'linear_fit'"),
    ('KNOWN', {}, "unknown predictor 'KNOWN'.* Known: average, "),
    (None, {}, 'unknown predictor None'),
    (['known'], {}, r"unknown predictor \['known'\]. Did you mean 'known'"),
    ('known_paper', {}, "predictor 'known_paper' is called 'known' now"),
    ('tsv', {'rank': 3}, "predictor 'tsv' has no option 'rank'; it has none"),
    ('task_vector', {'lamb': 3}, "'task_vector' has no option 'lamb'; it has lam, variant"),
    ('linear_fit', {'regressor': 'sizes'}, "unknown regressor 'sizes'. Did you mean 'size'"),
    ('linear_fit', {'regressor': None}, "unknown regressor 'None'"),
    ('task_vector', {'variant': 2}, "unknown variant '2'. Known: tau_n, two_point"),
    ('task_vector', {'lam': '1'}, "task_vector option lam is '1'; expected a finite Python number"),
    ('task_vector', {'lam': float('nan')}, 'option lam is nan; expected a finite'),
    ('task_vector', {'lam': np.ones(2)}, 'option lam is .*; expected a finite'),
    ('shrink', {'c': None}, r"shrink option c\['conv'\] is None; expected a finite"),
    ('shrink', {'c': {'fc': float('inf')}}, r"shrink option c\['fc'\] is inf; expected a finite"),
    (
      'shrink',
      {'c': {'dense': 0.1}},
      "unknown kind in shrink option c 'dense'.* Known: bias, conv",
    ),
    (
      'shrink',
      {'c': (0.1, 0.2)},
      r'shrink option c is \(0.1, 0.2\); expected a number, or a mapping',
    ),
  ],
)
def test_bad_names_and_options_are_errors(name, options, message):
  with pytest.raises(UserError, match=message):
    resolve(name, options)
  # The history is not looked at before the name and the options are known to be good.
  with pytest.raises(UserError, match=message):
    know_jax.predict([], predictor=name, **options)


@pytest.mark.parametrize(
  ('name', 'options', 'expected'),  # For histories of 1, 2, 3 and 5 stages.
  [
    ('persistence', {}, (None, None, None, None)),
    ('linear_fit', {}, (None, None, None, None)),
    ('task_vector', {}, (0, 1, 2, 4)),
    ('task_vector', {'lam': 2}, (0, 1, 2, 4)),
    ('task_vector', {'variant': 'two_point'}, (None, None, None, None)),
    ('magmax', {}, (0, 1, 2, 4)),
    ('consensus_ta', {}, (0, 1, 2, 4)),
    ('tsv', {}, (0, 1, 2, 4)),
    ('average', {}, (0, 1, 2, 4)),
    ('shrink', {'c': 0.1}, (None, None, None, None)),
    ('known', {}, (None, None, None, None)),
  ],
)
def test_the_most_steps_that_a_predictor_can_do(name, options, expected):
  assert tuple(max_steps(resolve(name, options)[1], length) for length in (1, 2, 3, 5)) == expected


def test_the_gradient_of_tsv_where_singular_values_are_equal():
  """By differences of NumPy's SVD, where a leaf moved by a matrix of rank one; that of keeping
  where it did not move."""
  rng = np.random.default_rng(0)
  old, weights, ahead = rng.normal(size=(3, 6, 5))
  new = old + np.outer(rng.normal(size=6), rng.normal(size=5))

  def loss(new):
    return (jax.numpy.asarray(weights) * predict(new)).sum()

  def predict(new):
    history = [{'kernel': jax.numpy.asarray(old)}, {'kernel': new}]
    return know_jax.predict(history, predictor='tsv', on_bad='ignore')['kernel']

  def reference(new):
    u, s, vt = np.linalg.svd(new - old)
    return (weights * (new + s[0] * np.outer(u[:, 0], vt[0]))).sum()

  with jax.enable_x64(True):
    found = np.vdot(jax.grad(loss)(jax.numpy.asarray(new)), ahead)
    expected = (reference(new + 1e-6 * ahead) - reference(new - 1e-6 * ahead)) / 2e-6
    np.testing.assert_allclose(found, expected, rtol=1e-7)
    np.testing.assert_array_equal(jax.grad(loss)(jax.numpy.asarray(old)), weights)


@pytest.mark.parametrize('name', ['known', 'known_leaf'])
def test_parameters_may_be_wider_than_weights(name):
  rng = np.random.default_rng(0)
  history = [{'kernel': rng.normal(size=(6, 5)).astype(np.float32) / 10} for _ in range(5)]
  theta = jax.device_get(know_jax.load_known(shipped=name))
  expected = know_jax.predict(history, predictor=name, theta=theta, on_bad='ignore')['kernel']
  wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), theta)
  with jax.enable_x64(True):
    for call in (
      know_jax.predict,
      jax.jit(know_jax.predict, static_argnames=('predictor', 'on_bad')),
    ):
      found = call(history, predictor=name, theta=wide, on_bad='ignore')['kernel']
      assert found.dtype == np.float32
      np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
