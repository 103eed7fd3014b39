"""KNOWN against the authors' Keras outputs, and against a NumPy float64 copy of the formula."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import scipy.stats

import know_jax
from know_jax import UserError, kinds, trees
from know_jax.predictors import known, parameters
from know_jax.predictors.known import KNOWN

KERAS_NAMES = {'conv': 'Conv', 'fc': 'FC', 'bias': 'Bias'}


@pytest.fixture(scope='module')
def keras_pairs(official):
  """Kind -> histories [1000, 5] and the authors' residuals [1000]."""
  pairs = np.load(official / 'keras_pairs.npz')
  return {kind: (pairs[f'{k}_in'], pairs[f'{k}_out']) for kind, k in KERAS_NAMES.items()}


@pytest.fixture(scope='module')
def official_theta(official):
  return know_jax.load_known(official)


@pytest.fixture(scope='module')
def theta():
  return references.random_theta()


def in_float64(tree):
  return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def apply_module(params, histories):
  return jax.vmap(lambda w: KNOWN().apply({'params': params}, w))(histories)


def test_known_has_9425_parameters():
  params = jax.eval_shape(KNOWN().init, jax.random.key(0), jnp.zeros(5))['params']
  assert trees.num_weights(params) == 9425


def test_a_shorter_history_takes_fewer_parameters():
  theta = jax.eval_shape(lambda key: known.init_theta(key, history_length=3), jax.random.key(0))
  assert known.history_length(theta['conv']) == 3
  assert trees.num_weights(theta['conv']) == 9425 - 2 * 2 * 64


@pytest.mark.parametrize('kind', kinds.KINDS)
def test_the_module_gives_what_the_authors_keras_code_gave(kind, keras_pairs, official_theta):
  histories, expected = keras_pairs[kind]
  assert expected.std() > 1e-4
  found = apply_module(official_theta[kind], histories)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize('kind', kinds.KINDS)
def test_the_fused_form_gives_what_the_authors_keras_code_gave(kind, keras_pairs, official_theta):
  histories, expected = keras_pairs[kind]
  found = known.residuals(official_theta[kind], jnp.asarray(histories.T))
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_predict_gives_what_the_authors_keras_code_gave(keras_pairs, official_theta):
  shapes = {'conv': (5, 5, 4, 10), 'fc': (20, 50), 'bias': (1000,)}
  expected = {kind: w[:, -1] + residual for kind, (w, residual) in keras_pairs.items()}
  stages = [
    {
      'stem': {'kernel': keras_pairs['conv'][0][:, t].reshape(shapes['conv'])},
      'head': {
        'kernel': keras_pairs['fc'][0][:, t].reshape(shapes['fc']),
        'bias': keras_pairs['bias'][0][:, t],
      },
    }
    for t in range(5)
  ]
  found = know_jax.predict(stages, theta=official_theta)
  found = {
    'conv': found['stem']['kernel'], 'fc': found['head']['kernel'], 'bias': found['head']['bias']
  }  # fmt: skip
  for kind, leaf in found.items():
    assert leaf.shape == shapes[kind]
    np.testing.assert_allclose(leaf.ravel(), expected[kind], rtol=0, atol=1e-6, err_msg=kind)


def test_keras_outputs_follow_from_the_formula_in_float64(keras_pairs, official_theta):
  # Of the reference rather than of the package: it is what other tests lean on.
  for kind, (histories, expected) in keras_pairs.items():
    found = references.known_residual(in_float64(official_theta[kind]), histories.astype(float))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, err_msg=kind)


@pytest.mark.parametrize('form', ['module', 'fused'])
def test_the_formula_in_float64(form, theta):
  histories = np.random.default_rng(0).normal(0, 0.3, (300, 5))
  with jax.enable_x64(True):
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), theta['conv'])
    if form == 'module':
      found = apply_module(params, jnp.asarray(histories))
    else:
      found = known.residuals(params, jnp.asarray(histories.T))
    assert found.dtype == jnp.float64
  expected = references.known_residual(in_float64(theta['conv']), histories)
  assert np.abs(expected).max() > 0.3
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_the_fused_form_equals_the_module_in_float32(theta):
  histories = np.random.default_rng(1).normal(0, 0.3, (300, 5)).astype(np.float32)
  found = known.residuals(theta['fc'], jnp.asarray(histories.T))
  np.testing.assert_allclose(found, apply_module(theta['fc'], histories), rtol=0, atol=1e-6)


def test_rollout_slides_the_window_over_its_own_predictions(theta):
  histories = np.random.default_rng(2).normal(0, 0.1, (5, 40)).astype(np.float32)
  found = known.rollout(known.fuse(theta['bias']), jnp.asarray(histories), (1, 3, 4))
  params = in_float64(theta['bias'])
  expected = [references.known(histories.astype(float), n, params=params) for n in (1, 3, 4)]
  np.testing.assert_allclose(found, np.stack(expected), rtol=0, atol=3e-6)


# --- in units of the leaf -------------------------------------------------------------------------


def scaled(theta, bound=1.5):
  """Parameters in units of the leaf; a low bound, so that it cuts some weights off."""
  return {kind: {**params, 'bound': np.float32(bound)} for kind, params in theta.items()}


LEAVES = {'conv': (3, 3, 2, 8), 'fc': (16, 4), 'bias': (24,)}
PATHS = {'conv': ('stem', 'kernel'), 'fc': ('head', 'kernel'), 'bias': ('head', 'bias')}


def moving(seed=0):
  """Kind -> `[5, ...]`, every leaf with a scale of its own."""
  rng = np.random.default_rng(seed)
  result = {}
  for (kind, shape), scale in zip(LEAVES.items(), (3e-3, 0.2, 40.0), strict=True):
    moves = scale * 0.1 * rng.normal(size=(5, *shape))
    result[kind] = (scale * rng.normal(size=shape) + moves.cumsum(axis=0)).astype(np.float32)
  return result


def nested(leaves):
  result = {}
  for kind, leaf in leaves.items():
    layer, name = PATHS[kind]
    result.setdefault(layer, {})[name] = leaf
  return result


def predict_scaled(leaves, theta, steps=1, **options):
  stages = [nested({kind: leaf[t] for kind, leaf in leaves.items()}) for t in range(5)]
  found = know_jax.predict(stages, steps, theta=theta, **options)
  return {kind: np.asarray(found[layer][name]) for kind, (layer, name) in PATHS.items()}


@pytest.mark.parametrize('steps', [1, 3])
def test_in_units_of_the_leaf_it_is_the_formula_in_float64(theta, steps):
  leaves = moving()
  found = predict_scaled(leaves, scaled(theta), steps)
  for kind, leaf in leaves.items():
    params, history = in_float64(scaled(theta)[kind]), leaf.astype(np.float64)
    expected = references.known_scaled(history, steps, params=params)
    assert np.abs(expected - history[-1]).max() > 0.1 * history.std()
    np.testing.assert_allclose(found[kind], expected, rtol=0, atol=1e-5 * history.std())
    # The bound makes a difference.
    far = references.known_scaled(history, steps, params={**params, 'bound': 100.0})
    assert np.abs(far - expected).max() > 1e-2 * history.std()


@pytest.mark.parametrize('factor', [2.0**-20, 2.0**12])
def test_in_units_of_the_leaf_scaling_the_weights_scales_the_prediction(theta, factor):
  leaves = moving()
  found = predict_scaled({kind: factor * leaf for kind, leaf in leaves.items()}, scaled(theta))
  for kind, leaf in predict_scaled(leaves, scaled(theta)).items():
    np.testing.assert_allclose(found[kind], factor * leaf, rtol=1e-6)


def test_in_units_of_the_leaf_what_never_moved_stays(theta):
  leaves = moving()
  leaves['fc'][:] = leaves['fc'][0]
  leaves['bias'][:] = 0.0
  found = predict_scaled(leaves, scaled(theta), 2)
  assert found['fc'].tobytes() == leaves['fc'][-1].tobytes()
  assert not found['bias'].any()
  # Nor does anything without its history.
  free = predict_scaled(leaves, scaled(theta), 2, predictor='known_history_free')
  assert all(free[kind].tobytes() == leaf[-1].tobytes() for kind, leaf in leaves.items())


def test_in_units_of_the_leaf_gradients_are_finite_where_nothing_moved(theta):
  leaves = {kind: jnp.zeros((5, *shape)) for kind, shape in LEAVES.items()}

  @jax.jit
  def total(leaves):
    stages = [nested({kind: leaf[t] for kind, leaf in leaves.items()}) for t in range(5)]
    return sum(x.sum() for x in jax.tree.leaves(know_jax.predict(stages, theta=scaled(theta))))

  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.grad(total)(leaves)))


def test_in_units_of_the_leaf_parameters_are_saved_and_read(theta, tmp_path):
  path = tmp_path / 'known.safetensors'
  parameters.save_known(path, scaled(theta), {})
  found = know_jax.load_known(path)
  chex.assert_trees_all_equal(found, scaled(theta))
  assert all(known.is_scaled(params) for params in found.values())
  fresh = known.init_scaled_theta(jax.random.key(0))
  assert {trees.num_weights(params) for params in fresh.values()} == {9425 + 1}


@pytest.mark.parametrize('bound', [0.0, -1.0])
def test_a_bound_that_is_none_is_refused(theta, tmp_path, bound):
  with pytest.raises(UserError, match=f"'conv/bound' is {bound}; expected a positive"):
    parameters.save_known(tmp_path / 'known.safetensors', scaled(theta, bound), {})


def test_kinds_of_which_some_are_in_units_of_their_leaf_are_refused(theta):
  mixed = {**theta, 'fc': scaled(theta)['fc']}
  with pytest.raises(UserError, match=r"different networks: .*'fc': 'known_scaled'"):
    predict_scaled(moving(), mixed)


# Of the two initialisers each is Keras' formula for the bound of a uniform distribution.
GLOROT = {
  'squeeze': (64, 8), 'gate': (8, 64), 'offset': (8, 64), 'amplitude': (8, 64)
}  # fmt: skip
BOUNDS = {
  **{f'{s}/{name}': np.sqrt(6 / sum(shape)) for name, shape in GLOROT.items()
     for s in ('weights', 'differences')},
  'weights/embed': np.sqrt(3 * 0.1 / 5),
  'differences/embed': np.sqrt(3 * 0.1 / 4),
  'weights/project': np.sqrt(3 * 0.1 / 64),
  'differences/project': np.sqrt(3 * 0.1 / 64),
  'residual': np.sqrt(6 / (64 + 1)),
}  # fmt: skip


@pytest.fixture(scope='module')
def many_inits():
  """Path -> the leaf in 20 fresh networks."""
  keys = jax.random.split(jax.random.key(3), 20)
  inits = [KNOWN().init(key, jnp.zeros(5))['params'] for key in keys]
  return trees.named_leaves(jax.tree.map(lambda *leaves: np.stack(leaves), *inits))


def test_initial_biases_are_zero(many_inits):
  biases = {path: leaf for path, leaf in many_inits.items() if path.endswith('/bias')}
  assert len(biases) == len(BOUNDS)
  for path, leaf in biases.items():
    assert not leaf.any(), path


@pytest.mark.parametrize('layer', BOUNDS)
def test_initial_kernels_are_uniform_within_keras_bounds(layer, many_inits):
  leaf = np.asarray(many_inits[f'{layer}/kernel'], np.float64).ravel()
  bound = BOUNDS[layer]
  assert np.abs(leaf).max() <= bound * (1 + 1e-6)
  assert scipy.stats.kstest(leaf, scipy.stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-3


def test_kinds_start_from_different_weights():
  theta = known.init_theta(jax.random.key(0))
  assert sorted(theta) == sorted(kinds.KINDS)
  first = {kind: float(theta[kind]['residual']['kernel'][0, 0]) for kind in theta}
  assert len(set(first.values())) == len(kinds.KINDS)


def test_the_penalty_is_the_l1_norm_of_embed_and_project():
  params = references.random_theta()['conv']
  constant = jax.tree.map(lambda leaf: np.full_like(leaf, -2.0), params)
  kernels = (5 * 64 + 64 * 32) + (4 * 64 + 64 * 32)
  biases = 2 * (64 + 32)
  expected = 2.0 * (1e-6 * kernels + 0.1 * biases)
  np.testing.assert_allclose(known.penalty(constant), expected, rtol=1e-6)


def test_the_penalty_leaves_the_other_layers_alone(theta):
  gradients = trees.named_leaves(jax.jit(jax.grad(known.penalty))(theta['conv']))
  values = trees.named_leaves(theta['conv'])
  for path, gradient in gradients.items():
    weight = 0.0
    if path.split('/')[-2] in ('embed', 'project'):
      weight = 0.1 if path.endswith('bias') else 1e-6
    np.testing.assert_allclose(gradient, weight * np.sign(values[path]), rtol=1e-6, err_msg=path)
