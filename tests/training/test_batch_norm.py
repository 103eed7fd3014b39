"""BatchNorm policies after a prediction, and BatchNorm over several devices."""

import copy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import know_jax
from know_jax.errors import UserError
from know_jax.models import build_model
from know_jax.models.adapters import linen
from know_jax.recalibration import BATCH_NORM_POLICIES
from know_jax.training import batch_norm
from know_jax.training.batch_norm import has_batch_norm
from know_jax.trees import named_leaves

SETTINGS = {'num_batches': 2, 'batch_size': 4}


class OneLayer(nn.Module):
  """A Dense over channels, then BatchNorm: small enough to be written down in NumPy."""

  momentum: float = 0.9

  @nn.compact
  def __call__(self, x, *, train):
    x = nn.Dense(5, name='dense')(x)
    return nn.BatchNorm(use_running_average=not train, momentum=self.momentum, name='norm')(x)


class Mixed(nn.Module):
  """BatchNorm next to LayerNorm."""

  @nn.compact
  def __call__(self, x, *, train):
    x = nn.LayerNorm(name='layer_norm')(x)
    return nn.BatchNorm(use_running_average=not train, name='batch_norm')(x)


def apply_policy(policy, model, variables, x=None, **sizes):
  batch = None if x is None else {'image': x}
  return batch_norm.apply_policy(policy, linen(model), variables, batch, **sizes)


def images(batch=8, size=(8, 8, 1), seed=0):
  # Away from mean 0 and variance 1, where old statistics would go unnoticed.
  x = np.random.default_rng(seed).normal(1, 3, (batch, *size))
  return jnp.asarray(x, jnp.float32)


def trained(model, x):
  """Variables with no leaf at its starting value, as after training."""
  shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)
  rng = np.random.default_rng(2)

  def leaf(shape):
    if len(shape.shape) == 1:  # shifts, scales and variances, away from 0 and 1
      return jnp.asarray(rng.uniform(1.1, 1.9, shape.shape), shape.dtype)
    return jnp.asarray(
      rng.normal(size=shape.shape) / np.sqrt(np.prod(shape.shape[:-1])), shape.dtype
    )

  return jax.tree.map(leaf, shapes)


def small(name='cnn_bn', **settings):
  if name == 'cnn_bn':
    settings['convs'] = 2
  return build_model(name, num_classes=3, width=4, **settings)


@pytest.mark.parametrize('momentum', [0.5, 0.9, 0.99])
def test_recalibrate_equals_numpy(momentum):
  model, x = OneLayer(momentum), images(10, (3, 2, 4))
  variables = trained(model, x)
  new = apply_policy('recalibrate', model, variables, x, num_batches=3, batch_size=3)
  dense = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables['params']['dense'])
  y = np.asarray(x, np.float64) @ dense['kernel'] + dense['bias']
  batches = [y[i : i + 3].reshape(-1, 5) for i in (0, 3, 6)]  # the tenth image is left over
  stats = new['batch_stats']['norm']
  np.testing.assert_allclose(stats['mean'], np.mean([b.mean(0) for b in batches], 0), rtol=3e-6)
  # Flax's running variance is the biased one, as is the one it divides by in training.
  np.testing.assert_allclose(stats['var'], np.mean([b.var(0) for b in batches], 0), rtol=1e-5)
  assert new['params'] is variables['params']


@pytest.mark.parametrize('name', ['cnn_bn', 'resnet_small'])
def test_after_recalibrating_on_one_batch_eval_equals_train_on_it(name):
  model, x = small(name), images()
  variables = trained(model, x)
  new = apply_policy('recalibrate', model, variables, x, num_batches=1, batch_size=8)

  @jax.jit
  def outputs(old, new):
    train, _ = model.apply(old, x, train=True, mutable=['batch_stats'])
    return train, model.apply(new, x, train=False), model.apply(old, x, train=False)

  train, recalibrated, kept = outputs(variables, new)
  scale = float(jnp.abs(train).max())
  np.testing.assert_allclose(recalibrated, train, atol=2e-5 * scale)
  assert float(jnp.abs(kept - train).max()) > 0.01 * scale


def test_recalibrate_for_everybody_equals_numpy():
  """`know_jax.recalibrate`, with batches of two sizes."""
  model, x = OneLayer(), images(10)
  variables = trained(model, x)
  batches = [np.asarray(x[:6]), np.asarray(x[6:])]

  def apply_fn(given, batch):
    return model.apply(given, batch, train=True, mutable=['batch_stats'])

  new = know_jax.recalibrate(apply_fn, variables, iter(batches))
  dense = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables['params']['dense'])
  hidden = [batch.astype(np.float64) @ dense['kernel'] + dense['bias'] for batch in batches]
  for name, expected in (
    ('mean', np.mean([h.mean((0, 1, 2)) for h in hidden], 0)),
    ('var', np.mean([h.var((0, 1, 2)) for h in hidden], 0)),
  ):
    np.testing.assert_allclose(new['batch_stats']['norm'][name], expected, rtol=2e-4, atol=1e-5)
  assert new['params'] is variables['params']
  with pytest.raises(UserError, match='given no batch'):
    know_jax.recalibrate(apply_fn, variables, [])
  with pytest.raises(UserError, match='found the collections params; expected batch_stats'):
    know_jax.recalibrate(apply_fn, {'params': variables['params']}, batches)
  with pytest.raises(UserError, match=r"leaves 'norm/mean' of batch_stats as it is; expected trai"):
    know_jax.recalibrate(
      lambda v, b: model.apply(v, b, train=False, mutable=['batch_stats']), variables, batches
    )
  with pytest.raises(UserError, match=r"apply_fn returned .*; expected \(outputs, {'batch_stats'"):
    know_jax.recalibrate(lambda v, b: model.apply(v, b, train=False), variables, batches)


def test_recalibrate_averages_the_statistics_that_training_computes():
  model, x = small(), images()
  variables = trained(model, x)
  new = apply_policy('recalibrate', model, variables, x, **SETTINGS)

  @jax.jit
  def batch_stats(x):
    # From zero running statistics, momentum 0.9 leaves a tenth of the batch's.
    zeros = jax.tree.map(jnp.zeros_like, variables['batch_stats'])
    given = {'params': variables['params'], 'batch_stats': zeros}
    _, new = model.apply(given, x, train=True, mutable=['batch_stats'])
    return jax.tree.map(lambda leaf: leaf / 0.1, new['batch_stats'])

  first, second = named_leaves(batch_stats(x[:4])), named_leaves(batch_stats(x[4:]))
  got = named_leaves(new['batch_stats'])
  assert set(got) == set(first)
  for path, leaf in got.items():
    expected = (first[path] + second[path]) / 2
    np.testing.assert_allclose(leaf, expected, rtol=2e-5, atol=1e-5, err_msg=path)


def test_recalibrate_forgets_the_old_statistics():
  model, x = small(), images()
  variables = trained(model, x)
  other = {
    **variables,
    'batch_stats': jax.tree.map(lambda leaf: 100 * leaf + 7, variables['batch_stats']),
  }
  a, b = (apply_policy('recalibrate', model, v, x, **SETTINGS) for v in (variables, other))
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_recalibrate_undoes_what_batch_norm_should_not_see():
  # Scaling a kernel before BatchNorm, as a shrinking predictor does, changes nothing but epsilon's
  # share, once the statistics follow.
  model, x = small(), images()
  variables = trained(model, x)
  scaled = {**variables, 'params': dict(variables['params'])}
  for conv in ('conv1', 'conv2'):
    scaled['params'][conv] = jax.tree.map(lambda leaf: 0.5 * leaf, scaled['params'][conv])
  apply = jax.jit(lambda v: model.apply(v, x, train=False))
  a, b = (apply(apply_policy('recalibrate', model, v, x, **SETTINGS)) for v in (variables, scaled))
  size = float(jnp.abs(a).max())
  np.testing.assert_allclose(a, b, atol=1e-3 * size)
  assert float(jnp.abs(apply(variables) - apply(scaled)).max()) > 0.02 * size


def test_recalibrate_outside_pmap_with_a_synchronised_model():
  x = images()
  variables = trained(small(), x)
  a, b = (
    apply_policy('recalibrate', small(axis_name=axis), variables, x, **SETTINGS)
    for axis in (None, 'devices')
  )
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_recalibrate_keeps_float32_statistics_in_bfloat16():
  model, x = small(dtype=jnp.bfloat16), images()
  variables = trained(model, x)
  new = apply_policy('recalibrate', model, variables, np.asarray(x), **SETTINGS)
  assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype('float32')}
  exact = apply_policy('recalibrate', small(), variables, x, **SETTINGS)
  for path, leaf in named_leaves(new['batch_stats']).items():
    expected = named_leaves(exact['batch_stats'])[path]
    np.testing.assert_allclose(leaf, expected, rtol=0.05, atol=0.05 * np.abs(expected).max())


def test_reset_is_a_fresh_batch_norm_and_nothing_else():
  model, x = small('resnet_small'), images()
  variables = trained(model, x)
  new = named_leaves(apply_policy('reset', model, variables, **SETTINGS))
  given = named_leaves(variables)
  assert sum('norm' in path for path in new) == 4 * 9  # stem, 2 in each block, 2 shortcuts
  for path, leaf in new.items():
    if 'norm' in path:
      expected = {'scale': 1, 'bias': 0, 'mean': 0, 'var': 1}[path.rpartition('/')[2]]
      np.testing.assert_array_equal(leaf, np.full_like(given[path], expected), err_msg=path)
    else:
      assert leaf is given[path]


def test_reset_leaves_layer_norm_alone():
  model, x = Mixed(), images()
  variables = trained(model, x)
  new = apply_policy('reset', model, variables, **SETTINGS)
  assert new['params']['layer_norm'] == variables['params']['layer_norm']
  assert {path: float(leaf[0]) for path, leaf in named_leaves(new).items() if 'batch' in path} == {
    'batch_stats/batch_norm/mean': 0,
    'batch_stats/batch_norm/var': 1,
    'params/batch_norm/bias': 0,
    'params/batch_norm/scale': 1,
  }


@pytest.mark.parametrize('policy', BATCH_NORM_POLICIES)
def test_what_is_given_stays_as_it_is(policy):
  model, x = OneLayer(), images()
  variables = {**trained(model, x), 'other': {'count': jnp.arange(3)}}
  before = copy.deepcopy(jax.tree.map(np.asarray, variables))
  new = apply_policy(policy, model, variables, x, **SETTINGS)
  jax.tree.map(np.testing.assert_array_equal, variables, before)
  assert new['other'] is variables['other']
  assert jax.tree.structure(new) == jax.tree.structure(variables)
  if policy == 'keep':
    assert new is variables


@pytest.mark.parametrize('policy', BATCH_NORM_POLICIES)
@pytest.mark.parametrize('name', ['cnn', 'vit'])
def test_without_batch_norm_every_policy_is_the_identity(name, policy):
  model = small(name)
  variables = trained(model, images())
  assert not has_batch_norm(variables)
  assert not has_batch_norm({**variables, 'batch_stats': {}})
  assert apply_policy(policy, model, variables, **SETTINGS) is variables


@pytest.mark.parametrize(
  ('policy', 'given', 'message'),
  [
    ('recalibrated', {}, "unknown BatchNorm policy 'recalibrated'. Did you mean 'recalibrate'"),
    (
      'recalibrate',
      {'num_batches': 3},
      r'given 8 examples; expected at least 12 \(num_batches 3 x',
    ),
    ('recalibrate', {'batch_size': 0}, 'num_batches=2, batch_size=0; expected both'),
    ('recalibrate', {'num_batches': -1}, 'num_batches=-1, batch_size=4; expected both'),
    ('recalibrate', {'x': None}, 'given 0 examples; expected at least 8'),
    ('recalibrate', {'x': np.zeros((0, 8, 8, 1))}, 'given 0 examples; expected at least 8'),
  ],
)
def test_bad_input_is_refused(policy, given, message):
  model, x = OneLayer(), images()
  variables = trained(model, x)
  assert has_batch_norm(variables)
  with pytest.raises(UserError, match=message):
    apply_policy(policy, model, variables, **{'x': x, **SETTINGS, **given})


# -- several devices ---------------------------------------------------------------------------


def test_training_under_pmap_equals_one_device_with_the_whole_batch():
  devices = jax.local_device_count()
  assert devices > 1, 'the suite simulates several devices'
  x = images(3 * devices)
  # Every device gets images of another brightness: statistics of its own would differ widely.
  x += jnp.repeat(jnp.arange(devices), 3)[:, None, None, None]
  y = jnp.arange(3 * devices) % 3
  variables = trained(small(), x)

  def train(model, params, stats, x, y):
    def loss_fn(params):
      logits, new = model.apply(
        {'params': params, 'batch_stats': stats}, x, train=True, mutable=['batch_stats']
      )
      loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
      return loss, (new['batch_stats'], logits)

    return jax.grad(loss_fn, has_aux=True)(params)

  def train_shard(params, stats, x, y):
    grads, rest = train(small(axis_name='devices'), params, stats, x, y)
    return jax.lax.pmean(grads, 'devices'), rest

  args = variables['params'], variables['batch_stats']
  grads, (stats, logits) = jax.jit(lambda *args: train(small(), *args))(*args, x, y)
  shards = (jnp.stack(jnp.split(a, devices)) for a in (x, y))
  got_grads, (got_stats, got_logits) = jax.pmap(
    train_shard, axis_name='devices', in_axes=(None, None, 0, 0)
  )(*args, *shards)
  np.testing.assert_allclose(got_logits.reshape(logits.shape), logits, rtol=1e-4, atol=1e-4)
  for expected, got in ((stats, got_stats), (grads, got_grads)):
    expected, got = named_leaves(expected), named_leaves(got)
    for path, leaf in expected.items():
      size = np.abs(leaf).max()
      for device in range(devices):
        np.testing.assert_allclose(got[path][device], leaf, atol=1e-4 * size, err_msg=path)
