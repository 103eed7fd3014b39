"""The model families: shapes, counts, leaf kinds, dtypes, layers against references, learning."""

import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from jax import lax
from jaxprs import equations

from know_jax.data.digits import load_digits
from know_jax.errors import UserError
from know_jax.kinds import leaf_kinds
from know_jax.models import HEAD, MODELS, build_model, model_options, ops
from know_jax.models.common import DepthwiseConv, LayerNorm, Layers
from know_jax.models.ops import gelu, max_pool, overlapping_product, patch_product, product
from know_jax.models.shufflenet import shuffle
from know_jax.trees import leaf_paths, named_leaves, num_weights

SIZES = ((8, 8, 1), (28, 28, 1), (32, 32, 3))
# Those that take images of 8 x 8; PVTv2 and DeepLabV3+ have files of their own.
SMALL = [name for name in MODELS if not name.startswith(('pvt_v2', 'deeplabv3plus'))]
WITHOUT_BATCH_NORM = ('cnn', 'vit')

# Compiling is what takes time here, and fast code is not worth it for a few steps; nor is threefry,
# which is slow to compile.
QUICKLY = {'compiler_options': {'xla_backend_optimization_level': 0}}
KEY = jax.random.key(0, impl='rbg')


def images(size, batch=2, seed=0):
  return np.random.default_rng(seed).normal(size=(batch, *size)).astype(np.float32)


def split(variables):
  """Parameters, and the other collections."""
  rest = {key: value for key, value in variables.items() if key != 'params'}
  return variables['params'], rest


# Small enough to compile in a second or two, each with every kind of block that its family has.
TINY = {
  'cnn': {'width': 4, 'convs': 2},
  'cnn_bn': {'width': 4, 'convs': 2},
  'resnet18': {'width': 4},
  'resnet_small': {'width': 8},
  'densenet': {'width': 8, 'layers_per_block': 1},
  'shufflenetv2': {'width': 8},
  'mobilenetv2': {'width': 4},
  'vit': {'width': 16, 'depth': 1},
}


@functools.cache
def initialised(name):
  """A tiny model, its parameters and its other collections, for 8x8 images."""
  model = build_model(name, num_classes=10, **TINY[name])
  x = jnp.zeros((1, 8, 8, 1))
  init = jax.jit(lambda key: split(model.init(key, x, train=False)), **QUICKLY)
  return model, *init(KEY)


@functools.cache
def shapes(name, size=(28, 28, 1), num_classes=10, **settings):
  """The model and the shapes of its variables; nothing is computed."""
  model = build_model(name, num_classes=num_classes, **settings)
  x = jax.ShapeDtypeStruct((2, *size), jnp.float32)
  return model, jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)


# -- every family ------------------------------------------------------------------------------


@pytest.mark.parametrize('size', [*SIZES, (9, 13, 2)])
@pytest.mark.parametrize('name', SMALL)
def test_logits_at_every_image_size(name, size):
  model, variables = shapes(name, size, num_classes=7)
  x = jax.ShapeDtypeStruct((5, *size), jnp.float32)
  out = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, x)
  assert (out.shape, out.dtype) == ((5, 7), jnp.float32)
  out, new = jax.eval_shape(
    lambda v, x: model.apply(v, x, train=True, mutable=['batch_stats']), variables, x
  )
  assert (out.shape, out.dtype) == ((5, 7), jnp.float32)
  assert new == {key: variables[key] for key in variables if key == 'batch_stats'}
  assert set(variables) == {'params'} | (set() if name in WITHOUT_BATCH_NORM else {'batch_stats'})


@pytest.mark.parametrize('name', SMALL)
def test_every_leaf_has_its_kind_without_an_override(name):
  _, variables = shapes(name)
  kinds = leaf_kinds(variables['params'])
  norms = {path.rpartition('/')[0] for path in kinds if path.endswith('/scale')}
  for path, leaf in named_leaves(variables['params']).items():
    layer, _, leaf_name = path.rpartition('/')
    if layer in norms:
      expected = 'keep'
    elif leaf_name == 'bias':
      expected = 'bias'
    else:
      # Dense and attention, told here by the layer's name, not by its rank as leaf_kinds does it.
      dense = ('head', 'dense', 'dense1', 'dense2', 'query', 'key', 'value', 'out')
      expected = 'fc' if layer.split('/')[-1] in dense else 'conv'
      assert leaf_name == 'kernel'
      assert leaf.ndim == 4 or expected == 'fc'
    assert kinds[path] == expected, path
  if 'batch_stats' in variables:
    whole = leaf_kinds(variables)
    assert {kind for path, kind in whole.items() if path.startswith('batch_stats/')} == {'keep'}


@pytest.mark.parametrize('name', SMALL)
def test_the_head_is_the_last_layer_and_nothing_else_knows_the_classes(name):
  (_, ten), (_, seven) = shapes(name), shapes(name, num_classes=7)
  assert ten['params'][HEAD]['kernel'].shape[1:] == ten['params'][HEAD]['bias'].shape == (10,)
  assert seven['params'][HEAD]['bias'].shape == (7,)
  ten, seven = ({**v, 'params': {**v['params'], HEAD: None}} for v in (ten, seven))
  assert ten == seven


@pytest.mark.parametrize('name', [name for name in SMALL if name != 'resnet18'])
def test_the_families_for_collecting_are_small(name):
  for size, num_classes in (((28, 28, 1), 10), ((32, 32, 3), 100)):
    assert 5e4 < num_weights(shapes(name, size, num_classes)[1]['params']) < 3e5
  narrow = num_weights(shapes(name, (28, 28, 1), width=4)[1]['params'])
  assert narrow < 0.4 * num_weights(shapes(name, (28, 28, 1))[1]['params'])


@pytest.mark.parametrize('name', SMALL)
def test_bfloat16_computes_in_bfloat16_and_keeps_float32(name):
  model, variables = shapes(name, dtype='bfloat16')
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  x = jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32)
  out, new = jax.eval_shape(
    lambda v, x: model.apply(v, x, train=True, mutable=['batch_stats']), variables, x
  )
  assert out.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(new)} <= {jnp.dtype('float32')}
  jaxpr = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, x)
  products = [
    eqn
    for eqn in equations(jaxpr.jaxpr)
    if eqn.primitive.name in ('dot_general', 'conv_general_dilated')
  ]
  kernels = [p for p in leaf_paths(variables['params']) if p.endswith('kernel')]
  # Depthwise convolutions are computed without a matrix product.
  assert len(products) >= len([path for path in kernels if 'depthwise' not in path])
  for eqn in products:
    assert {var.aval.dtype for var in eqn.invars} == {jnp.dtype('bfloat16')}


@pytest.mark.parametrize('name', SMALL)
def test_batch_norm_synchronises_in_training_only(name):
  model, variables = shapes(name, axis_name='devices')
  found = []

  def record(next_fun, args, kwargs, context):
    if isinstance(context.module, nn.BatchNorm) and context.method_name == '__call__':
      found.append((context.module.axis_name, context.module.use_running_average))
    return next_fun(*args, **kwargs)

  x = jax.ShapeDtypeStruct((3, 2, 28, 28, 1), jnp.float32)
  layers = len(jax.tree.leaves(variables.get('batch_stats', {}))) // 2
  for train, expected in ((True, ('devices', False)), (False, (None, True))):
    found.clear()

    def apply(v, x, train=train):
      return model.apply(v, x, train=train, mutable=['batch_stats'])

    with nn.intercept_methods(record):
      jax.eval_shape(jax.vmap(apply, in_axes=(None, 0), axis_name='devices'), variables, x)
    assert found == [expected] * layers


@pytest.mark.parametrize('name', SMALL)
def test_every_family_learns(name):
  images, labels, _ = load_digits('train')
  x = jnp.asarray(images[:32] / 127.5 - 1, jnp.float32)
  y = jnp.asarray(labels[:32])
  model, params, state = initialised(name)
  optimizer = optax.adam(1e-2)
  moments = optimizer.init(params)

  def step(params, state, moments):
    def loss_fn(params):
      logits, new = model.apply({'params': params, **state}, x, train=True, mutable=['batch_stats'])
      return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

    (loss, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, moments = optimizer.update(grads, moments)
    return optax.apply_updates(params, updates), state, moments, loss

  step = jax.jit(step, **QUICKLY)
  for _ in range(30):
    params, state, moments, loss = step(params, state, moments)
  assert float(loss) < 0.3 * math.log(10)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state)))


# -- counts in closed form, and starting values ------------------------------------------------


@pytest.mark.parametrize('width', [4, 24])
@pytest.mark.parametrize('convs', [1, 3, 5])
@pytest.mark.parametrize(
  ('size', 'sides'), [((28, 28, 1), (28, 14, 7, 3, 1, 1)), ((9, 13, 2), (9, 4, 2, 1, 1, 1))]
)
def test_cnn_parameter_count(width, convs, size, sides):
  w, channels = width, size[-1]
  height = sides[convs]
  # 9 x 13: pooling stops where the shorter side is one pixel.
  other = height if size[0] == 28 else (13, 6, 3, 1, 1, 1)[convs]
  count = 9 * channels * w + w
  for i in range(1, convs):
    count += 9 * (w if i == 1 else 2 * w) * 2 * w + 2 * w
  flat = height * other * (w if convs == 1 else 2 * w)
  count += flat * 8 * w + 8 * w + 8 * w * 10 + 10
  assert num_weights(shapes('cnn', size, width=w, convs=convs)[1]['params']) == count
  norm_channels = w + (convs - 1) * 2 * w  # scale and shift for each, but no bias
  with_norm = num_weights(shapes('cnn_bn', size, width=w, convs=convs)[1]['params'])
  assert with_norm == count + norm_channels


@pytest.mark.parametrize(('width', 'channels', 'classes'), [(64, 3, 100), (64, 3, 10), (8, 1, 10)])
def test_resnet18_parameter_count(width, channels, classes):
  w = width

  def conv(kernel, inputs, outputs):  # with its bias and its BatchNorm's scale and shift
    return kernel**2 * inputs * outputs + outputs + 2 * outputs

  count = conv(7, channels, w) + 4 * conv(3, w, w)
  for i in (1, 2, 3):
    inputs, outputs = w * 2 ** (i - 1), w * 2**i
    count += conv(3, inputs, outputs) + 3 * conv(3, outputs, outputs) + conv(1, inputs, outputs)
  count += 8 * w * classes + classes
  _, variables = shapes('resnet18', (32, 32, channels), classes, width=None if w == 64 else w)
  assert num_weights(variables['params']) == count
  if (w, classes) == (64, 100):
    # torchvision's resnet18 has 11,689,512; here: 100 classes not 1000, biases (4,800), a stem of
    # the same size.
    assert count == 11_689_512 - 900 * 513 + 4_800


def test_resnet18_keeps_the_image_size_through_two_stages():
  model = build_model('resnet18', num_classes=10, width=2)
  found = {}

  def record(next_fun, args, kwargs, context):
    out = next_fun(*args, **kwargs)
    if context.method_name == '__call__':
      found['/'.join(context.module.path)] = out.shape
    return out

  with nn.intercept_methods(record):
    jax.eval_shape(
      lambda x: model.init(jax.random.key(0), x, train=False), jnp.zeros((1, 32, 32, 3))
    )
  assert found['stem'] == (1, 32, 32, 2)
  assert [found[f'stage{i}_block2'] for i in (1, 2, 3, 4)] == [
    (1, 32, 32, 2),
    (1, 32, 32, 4),
    (1, 16, 16, 8),
    (1, 8, 8, 16),
  ]


@pytest.mark.parametrize('name', SMALL)
def test_kernels_start_glorot_uniform_and_biases_at_zero(name):
  model, params, _ = initialised(name)
  for path, leaf in named_leaves(params).items():
    if path.endswith('kernel'):
      # Glorot and Bengio 2010: uniform within sqrt(6 / (fan in + fan out)).
      kernel = np.asarray(leaf)
      if kernel.ndim == 3:  # attention: heads x their size count as one side
        d = model.width
        kernel = kernel.reshape(d, d)
      fans = np.prod(kernel.shape[:-2]) * sum(kernel.shape[-2:])
      limit = math.sqrt(6 / fans)
      assert np.abs(kernel).max() <= limit * (1 + 1e-6), path
      # Uniform: the mean square is limit^2 / 3; five standard deviations of its estimate.
      tolerance = 5 * math.sqrt(4 / 5 / kernel.size)
      np.testing.assert_allclose((kernel**2).mean() * 3 / limit**2, 1, atol=tolerance, err_msg=path)
    elif path.endswith('scale'):
      np.testing.assert_array_equal(leaf, 1)
    elif path != 'position/bias':
      np.testing.assert_array_equal(leaf, 0)


# -- layers against references -----------------------------------------------------------------


def both_ways(f, args, cotangent):
  """The value of a function and its gradients, for a given gradient of its output."""

  def value_and_vjp(*args):
    value, vjp = jax.vjp(f, *args)
    return value, *vjp(cotangent)

  return jax.jit(value_and_vjp, **QUICKLY)(*args)


@pytest.mark.parametrize('size', [(8, 8), (7, 7), (9, 6), (2, 3)])
def test_max_pool_equals_reduce_window(size):
  # All values differ, so that each window has one largest and the gradient is unique.
  count = 2 * math.prod(size) * 3
  x = np.random.default_rng(0).permutation(count).reshape(2, *size, 3).astype(np.float32)

  def reference(x):
    return nn.max_pool(x, (2, 2), strides=(2, 2))

  cotangent = images((size[0] // 2, size[1] // 2, 3))
  got, expected = (both_ways(f, (x,), cotangent) for f in (max_pool, reference))
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_max_pool_gives_the_gradient_of_a_tie_to_the_first():
  for values in itertools.product([0.0, 1.0], repeat=4):
    grad = jax.grad(lambda x: max_pool(x).sum())(jnp.array(values).reshape(1, 2, 2, 1))
    expected = np.zeros(4)
    expected[np.argmax(values)] = 1
    np.testing.assert_array_equal(grad.ravel(), expected)


def test_max_pool_is_differentiated_forwards_and_twice():
  x = np.random.default_rng(0).permutation(2 * 5 * 6 * 3).reshape(2, 5, 6, 3).astype(np.float32)
  direction = images((5, 6, 3))

  def both(f):
    """A tangent forwards, and a product with the Hessian."""
    grad = jax.grad(lambda x: (f(x) ** 3).sum())
    return jax.jvp(f, (x,), (direction,))[1], jax.jvp(grad, (x,), (direction,))[1]

  got, expected = both(max_pool), both(lambda x: nn.max_pool(x, (2, 2), strides=(2, 2)))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, expected)


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'stride': 2},
    {'padding': 1, 'bias': True},
    {'stride': 2, 'padding': 1},
    {'padding': 3, 'dilation': 3},
    {'dilation': 2},
  ],
)
@pytest.mark.parametrize('size', [(8, 8), (7, 5), (1, 2)])
@pytest.mark.parametrize('by_rows', [0, 1 << 14])
def test_depthwise_equals_grouped_convolution(monkeypatch, by_rows, size, options):
  monkeypatch.setattr(ops, 'BY_ROWS', by_rows)
  x = images((*size, 3))
  layer = DepthwiseConv(dtype=jnp.float32, **options)
  stride, padding = options.get('stride', 1), options.get('padding', 'SAME')
  params = {'kernel': images((3, 1, 3), batch=3, seed=1)}
  if 'bias' in options:
    params['bias'] = images((3,), batch=1, seed=3)[0]
  made = jax.eval_shape(lambda x: layer.init(KEY, x), x)
  assert made == {'params': jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)}

  def reference(x, params):
    return params.get('bias', 0) + lax.conv_general_dilated(
      x,
      params['kernel'],
      (stride, stride),
      padding if padding == 'SAME' else [(padding, padding)] * 2,
      rhs_dilation=(options.get('dilation', 1),) * 2,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=3,
    )

  def ours(x, params):
    return layer.apply({'params': params}, x)

  cotangent = images((-(-size[0] // stride), -(-size[1] // stride), 3), seed=2)
  got, expected = (both_ways(f, (x, params), cotangent) for f in (ours, reference))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('backend', 'by_rows'), [('cpu', 0), ('cpu', 1 << 14), ('gpu', 0)])
def test_depthwise_is_differentiated_forwards_twice_and_under_vmap(monkeypatch, backend, by_rows):
  x, kernel = images((5, 4, 3)), images((3, 1, 3), batch=3, seed=1)
  along = images((5, 4, 3), seed=2), images((3, 1, 3), batch=3, seed=3)
  layer = DepthwiseConv(dtype=jnp.float32, padding=1)

  def reference(x, kernel):
    dims = ('NHWC', 'HWIO', 'NHWC')
    pads = [(1, 1)] * 2
    return lax.conv_general_dilated(
      x, kernel, (1, 1), pads, dimension_numbers=dims, feature_group_count=3
    )

  def ours(x, kernel):
    return layer.apply({'params': {'kernel': kernel}}, x)

  monkeypatch.setattr(ops, 'BY_ROWS', by_rows)
  expected = every_way(reference, x, kernel, along)
  # What other devices compute: the choice is made by the backend's name alone.
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  got = every_way(ours, x, kernel, along)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, expected)


def every_way(f, x, kernel, along):
  """Forwards, forwards over the gradient, and under vmap."""
  grad = jax.grad(lambda *a: (f(*a) ** 3).sum(), argnums=(0, 1))
  several = jax.vmap(f)(np.stack([x, 2 * x]), np.stack([kernel, -kernel]))
  return jax.jvp(f, (x, kernel), along), jax.jvp(grad, (x, kernel), along), several


@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
@pytest.mark.parametrize(('inner', 'outer'), [(3, 5), (5, 3)])
def test_a_product_is_jaxs_whichever_side_is_wider(monkeypatch, backend, inner, outer):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  x, kernel = images((2, 4, inner)), images((outer,), batch=inner, seed=1)
  along = images((2, 4, inner), seed=2), images((outer,), batch=inner, seed=3)
  got, expected = (every_way(f, x, kernel, along) for f in (product, jnp.matmul))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, expected)
  got, expected = (both_ways(f, (x, kernel), expected[0][0]) for f in (product, jnp.matmul))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('size', [(8, 8), (7, 10)])
def test_patch_product_equals_the_strided_convolution(size):
  x, kernel = images((*size, 3)), images((2, 3, 4), batch=2, seed=1)

  def reference(x, kernel):
    dims = ('NHWC', 'HWIO', 'NHWC')
    return lax.conv_general_dilated(x, kernel, (2, 2), 'VALID', dimension_numbers=dims)

  def ours(x, kernel):
    return nn.Conv(4, (2, 2), 2, 'VALID', use_bias=False, conv_general_dilated=patch_product).apply(
      {'params': {'kernel': kernel}}, x
    )

  cotangent = images((size[0] // 2, size[1] // 2, 4), seed=2)
  got, expected = (both_ways(f, (x, kernel), cotangent) for f in (ours, reference))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('reach', 'step', 'pad'), [(7, 4, 3), (3, 2, 1), (3, 1, 0)])
@pytest.mark.parametrize('size', [(8, 8), (7, 10), (5, 4)])
def test_overlapping_product_equals_the_padded_convolution(size, reach, step, pad):
  x, kernel = images((*size, 3)), images((reach, 3, 4), batch=reach, seed=1)
  pads, dims = [(pad, pad)] * 2, ('NHWC', 'HWIO', 'NHWC')

  def reference(x, kernel):
    return lax.conv_general_dilated(x, kernel, (step, step), pads, dimension_numbers=dims)

  def ours(x, kernel):
    return overlapping_product(x, kernel, (step, step), pads)

  rows, columns = ((side + 2 * pad - reach) // step + 1 for side in size)
  cotangent = images((rows, columns, 4), seed=2)
  got, expected = (both_ways(f, (x, kernel), cotangent) for f in (ours, reference))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(('backend', 'left'), [('cpu', 0), ('gpu', 1)])
def test_a_convolution_by_patches_is_one_on_a_cpu_alone(monkeypatch, backend, left):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  layers = Layers(jnp.float32, None, train=False)
  conv = layers.conv(4, 3, 'embed', stride=2, padding=1, bias=True, by_patches=True)
  x = images((8, 8, 3))
  variables = conv.init(KEY, x)
  jaxpr = jax.make_jaxpr(lambda x: conv.apply(variables, x))(x).jaxpr
  names = [eqn.primitive.name for eqn in equations(jaxpr)]
  assert names.count('conv_general_dilated') == left and names.count('dot_general') == 1 - left
  plain = layers.conv(4, 3, 'embed', stride=2, padding=1, bias=True)
  np.testing.assert_allclose(conv.apply(variables, x), plain.apply(variables, x), atol=1e-5)


@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
@pytest.mark.parametrize(('dtype', 'bound'), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_a_layer_norm_is_flaxs(monkeypatch, backend, dtype, bound):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  x, cotangent = images((3, 4, 6)).astype(dtype), images((3, 4, 6), seed=1).astype(dtype)
  params = {'scale': images((6,), seed=2)[0], 'bias': images((6,), seed=3)[0]}

  def of(layer):
    def function(x, params):
      return layer.apply({'params': params}, x)

    return function

  layers = LayerNorm(1e-5, dtype), nn.LayerNorm(1e-5, dtype=dtype)
  got, expected = (both_ways(of(layer), (x, params), cotangent) for layer in layers)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=bound, atol=4 * bound)


def test_a_layer_norm_is_differentiated_forwards_twice_and_under_vmap():
  def with_scale(make):
    return lambda x, scale: make.apply({'params': {'scale': scale[0], 'bias': scale[1]}}, x)

  x, scale = images((4, 6)), images((6,), batch=2, seed=1)
  along = images((4, 6), seed=2), images((6,), batch=2, seed=3)
  got, expected = (
    every_way(with_scale(layer), x, scale, along)
    for layer in (LayerNorm(1e-5, jnp.float32), nn.LayerNorm(1e-5))
  )
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), got, expected)


@pytest.mark.parametrize(
  ('kernel', 'stride', 'padding', 'dilation', 'is_product'),
  [
    (1, 1, 'SAME', 1, True),
    (1, 1, 'SAME', 2, True),
    (2, 2, 0, 1, True),
    (2, 2, 0, 2, False),
    (2, 2, 'SAME', 1, False),
    (1, 1, 1, 1, False),
    (3, 1, 0, 1, False),
  ],
)
def test_windows_side_by_side_within_the_image_are_a_product(
  kernel, stride, padding, dilation, is_product
):
  conv = Layers(jnp.float32, None, train=True).conv(
    4, kernel, 'conv', stride=stride, padding=padding, dilation=dilation
  )
  x = images((5, 5, 3))
  params = {'kernel': images((kernel, 3, 4), batch=kernel, seed=1)}
  run = functools.partial(conv.apply, {'params': params})
  assert ('conv_general_dilated' not in str(jax.make_jaxpr(run)(x))) == is_product
  pads = padding if padding == 'SAME' else [(padding, padding)] * 2
  dims = ('NHWC', 'HWIO', 'NHWC')
  expected = lax.conv_general_dilated(
    x, params['kernel'], (stride, stride), pads, rhs_dilation=(dilation,) * 2,
    dimension_numbers=dims,
  )  # fmt: skip
  np.testing.assert_allclose(run(x), expected, rtol=1e-5, atol=1e-5)


def test_a_gelu_keeps_its_input_alone_for_the_gradient():
  x = jnp.linspace(-3, 3, 64)
  _, slope = jax.vjp(gelu, x)
  assert sum(leaf.size for leaf in jax.tree.leaves(slope)) <= x.size + 1


def test_a_layer_norm_keeps_its_input_alone_for_the_gradient_and_its_names():
  norm = Layers(jnp.float32, None, train=True).layer_norm('norm')
  x = jnp.linspace(-3, 3, 64).reshape(2, 32) ** 3
  variables = norm.init(jax.random.key(0), x)
  assert jax.tree.map(jnp.shape, variables) == {'params': {'scale': (32,), 'bias': (32,)}}
  got, slope = jax.vjp(lambda x: norm.apply(variables, x), x)
  assert sum(leaf.size for leaf in jax.tree.leaves(slope)) <= x.size + 2 * 32 + 1
  plain = nn.LayerNorm(1e-6)
  want, plain_slope = jax.vjp(lambda x: plain.apply(variables, x), x)
  np.testing.assert_allclose(got, want, atol=1e-6)
  np.testing.assert_allclose(slope(x)[0], plain_slope(x)[0], atol=1e-5)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_gelu_and_its_slope_equal_those_of_the_normal_distribution(dtype):
  x = jnp.linspace(-9, 9, 401).astype(dtype)
  exact = np.float64(x)
  slope = scipy.stats.norm.cdf(exact) + exact * scipy.stats.norm.pdf(exact)
  bound = 1e-6 if dtype == jnp.float32 else 0.02
  got = gelu(x)
  assert got.dtype == dtype
  np.testing.assert_allclose(np.float64(got), exact * scipy.stats.norm.cdf(exact), atol=9 * bound)
  np.testing.assert_allclose(np.float64(jax.vmap(jax.grad(gelu))(x)), slope, atol=9 * bound)


@pytest.mark.parametrize('name', SMALL)
def test_every_family_gives_its_feature_map_without_the_layers_above(name):
  size = (16, 24, 1)
  model, variables = shapes(name, size)
  x = jax.ShapeDtypeStruct((2, *size), jnp.float32)
  made = jax.eval_shape(lambda x: model.init(KEY, x, train=False, spatial=True), x)
  above = {HEAD, 'dense'} if name.startswith('cnn') else {HEAD}
  assert set(variables['params']) - set(made['params']) == above
  out = jax.eval_shape(lambda v, x: model.apply(v, x, train=False, spatial=True), variables, x)
  assert len(out.shape) == 4 and out.shape[0] == 2 and out.dtype == jnp.float32


def test_shuffle_is_the_channel_shuffle_of_two_groups():
  left, right = images((2, 3, 4), seed=1), images((2, 3, 4), seed=2)
  # Zhang et al. 2018, section 3.1: reshape to (groups, n), transpose, flatten.
  both = np.concatenate([left, right], axis=-1)
  expected = both.reshape(2, 2, 3, 2, 4).swapaxes(-1, -2).reshape(2, 2, 3, 8)
  np.testing.assert_array_equal(shuffle(left, right), expected)


def test_vit_knows_where_a_patch_was_by_its_position_alone():
  model = build_model('vit', num_classes=3, width=8, depth=1, grid=2)
  x = images((8, 8, 1))
  swapped = np.concatenate([x[:, :, 4:], x[:, :, :4]], axis=2)  # left and right column of patches
  params, _ = jax.jit(lambda key: split(model.init(key, x, train=False)), **QUICKLY)(KEY)
  apply = jax.jit(lambda params, x: model.apply({'params': params}, x, train=False), **QUICKLY)
  assert params['position']['bias'].shape == (4, 8)
  assert np.abs(apply(params, x) - apply(params, swapped)).max() > 1e-4
  params['position'] = {'bias': jnp.zeros((4, 8))}
  np.testing.assert_allclose(apply(params, x), apply(params, swapped), atol=1e-6)


# -- options and errors ------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('name', 'option'), [(name, option) for name in SMALL for option in model_options(name)]
)
def test_options_have_defaults_and_change_the_model(name, option):
  default = model_options(name)[option]
  size = (28, 28, 1)
  plain = shapes(name, size)[1]
  assert shapes(name, size, **{option: default})[1] == plain
  changed = shapes(name, size, **{option: default + 1})[1]
  assert num_weights(changed['params']) != num_weights(plain['params'])


def test_the_options_there_are():
  assert {name: tuple(model_options(name)) for name in SMALL} == {
    'cnn': ('convs',),
    'cnn_bn': ('convs',),
    'resnet18': (),
    'resnet_small': ('blocks',),
    'densenet': ('layers_per_block',),
    'shufflenetv2': ('units',),
    'mobilenetv2': ('blocks',),
    'vit': ('depth', 'grid'),
  }


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'name': 'resnet19'}, "unknown model 'resnet19'. Did you mean 'resnet18'"),
    ({'name': 'cnn', 'depth': 3}, r"'cnn' has no option 'depth'; its options: convs \(default 3\)"),
    ({'name': 'resnet18', 'blocks': 3}, "'resnet18' has no option 'blocks'; its options: none"),
    ({'name': 'cnn', 'width': 0}, "width of model 'cnn' is 0; expected a positive integer"),
    ({'name': 'cnn', 'width': 8.0}, "width of model 'cnn' is 8.0; expected a positive integer"),
    ({'name': 'cnn', 'convs': True}, "convs of model 'cnn' is True; expected a positive integer"),
    ({'name': 'vit', 'num_classes': 0}, "num_classes of model 'vit' is 0; expected a positive"),
    ({'name': 'vit', 'width': 30}, "width of model 'vit' is 30; expected a multiple of 4"),
    ({'name': 'cnn', 'dtype': jnp.int32}, "dtype of model 'cnn' is .*int32.*; expected a floating"),
    ({'name': 'cnn', 'dtype': 'float33'}, "dtype of model 'cnn' is 'float33'; expected a floating"),
    ({'name': 'cnn', 'dtype': None}, "dtype of model 'cnn' is None; expected a floating"),
    ({'name': 'cnn', 'dtype': 'float64'}, "dtype of model 'cnn' is 'float64'; .* jax_enable_x64"),
  ],
)
def test_bad_settings_are_refused(settings, message):
  with pytest.raises(UserError, match=message):
    build_model(**{'num_classes': 10, **settings})


@pytest.mark.parametrize(
  ('x', 'message'),
  [
    (np.zeros((8, 8, 1), np.float32), r'shape \(8, 8, 1\); expected \[batch, height'),
    (np.zeros((2, 7, 8, 1), np.float32), r'shape \(2, 7, 8, 1\); .* at least 8'),
    (np.zeros((2, 8, 8, 1), np.uint8), 'dtype uint8; expected normalised floating-point'),
  ],
)
@pytest.mark.parametrize('name', MODELS)
def test_bad_images_are_refused(name, x, message):
  with pytest.raises(UserError, match=message):
    build_model(name, num_classes=2).init(jax.random.key(0), x, train=False)
