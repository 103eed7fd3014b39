"""PVTv2 against timm (parameter counts, outputs, gradients) and against NumPy in float64."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax import traverse_util
from jaxprs import equations

from know_jax.errors import UserError
from know_jax.kinds import leaf_kinds
from know_jax.models import HEAD, build_model, convert_state_dict, model_options, to_state_dict
from know_jax.models.common import Layers
from know_jax.models.pvt import Block, adaptive_average_pool, attend
from know_jax.trees import named_leaves, num_weights

TINY = {
  'depths': (1, 2, 1, 1),
  'embed_dims': (4, 4, 10, 8),
  'num_heads': (1, 2, 5, 8),
  'sr_ratios': (4, 2, 1, 1),
  'mlp_ratios': (2, 2, 2, 2),
  'stem_stride': 2,
}
PARITY = ('pvt_v2_half_64px', 'pvt_v2_linear_small')


def shapes(name, size=(64, 64, 3), num_classes=10, **options):
  model = build_model(name, num_classes=num_classes, **options)
  x = jax.ShapeDtypeStruct((2, *size), jnp.float32)
  return model, jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)


# Of timm 1.0.31: without a head, and with 1000, 100, 21, 19, 10 and 7 classes.
@pytest.mark.parametrize(
  ('name', 'counts'),
  [
    ('b0', (3_409_760, 3_666_760, 3_435_460, 3_415_157, 3_414_643, 3_412_330, 3_411_559)),
    ('b1', (13_496_000, 14_009_000, 13_547_300, 13_506_773, 13_505_747, 13_501_130, 13_499_591)),
    ('b2', (24_849_856, 25_362_856, 24_901_156, 24_860_629, 24_859_603, 24_854_986, 24_853_447)),
    ('b2_li', (22_040_512, 22_553_512, 22_091_812, 22_051_285, 22_050_259, 22_045_642, 22_044_103)),
    ('b3', (44_725_696, 45_238_696, 44_776_996, 44_736_469, 44_735_443, 44_730_826, 44_729_287)),
    ('b4', (62_043_072, 62_556_072, 62_094_372, 62_053_845, 62_052_819, 62_048_202, 62_046_663)),
    ('b5', (81_443_008, 81_956_008, 81_494_308, 81_453_781, 81_452_755, 81_448_138, 81_446_599)),
  ],
)
def test_the_official_networks_have_timms_parameter_counts(name, counts):
  params = shapes(f'pvt_v2_{name}', num_classes=7)[1]['params']
  body = num_weights(params) - num_weights(params[HEAD])
  features = params[HEAD]['kernel'].shape[0]
  for classes, count in zip((1000, 100, 21, 19, 10, 7), counts[1:], strict=True):
    assert body + (features + 1) * classes == count
  assert (body, num_weights(params)) == (counts[0], counts[-1])


@pytest.mark.parametrize(
  ('name', 'options', 'count'),
  [
    ('pvt_v2_b0', {'width': 24, 'stem_stride': 2}, 1_933_330),
    ('pvt_v2_b0', {'width': 16}, 871_610),
    ('pvt_v2', {'width': 16, 'mlp_ratios': (4, 4, 4, 4)}, 846_906),
    ('pvt_v2', {'width': 8, 'mlp_ratios': (4, 4, 4, 4), 'depths': (1, 1, 1, 1)}, 126_178),
  ],
)
def test_narrow_networks_have_timms_parameter_counts(name, options, count):
  assert num_weights(shapes(name, **options)[1]['params']) == count


@pytest.mark.parametrize('name', PARITY)
def test_outputs_and_gradients_are_timms(name):
  arrays, about = parity.load(name)
  config = {key: value for key, value in about['meta']['config'].items() if value is not None}
  assert config.pop('stem_kernel') == 7
  model = build_model('pvt_v2', **config)
  variables = convert_state_dict(model, parity.tensors(arrays))
  assert num_weights(variables) == about['meta']['parameters']
  back = to_state_dict(model, variables)
  assert set(back) == set(parity.tensors(arrays))
  for key, value in back.items():
    np.testing.assert_array_equal(value, arrays[f'param/{key}'])

  @parity.quickly
  def outputs(variables, x):
    return model.apply(variables, x, train=False, capture_intermediates=True)

  for case in 'ab':
    logits, state = outputs(variables, arrays[f'{case}/input'])
    own = traverse_util.flatten_dict(state['intermediates'], sep='/')
    own = {path.removesuffix('/__call__'): values[0] for path, values in own.items()}
    stages = {f'stage{i}': own[f'stage{i}_norm'] for i in range(1, 5)}
    stages |= {'patch_embed1': own['stage1_embed_norm'], 'logits': logits}
    stages['pooled'] = own['stage4_norm'].mean((1, 2))
    if case == 'a':
      stages['stage1_block1'] = own['stage1_block1']
      stages['stage1_block1_attention'] = own['stage1_embed_norm'] + own['stage1_block1/out']
    stored = {key[2:] for key in arrays if key.startswith(f'{case}/')}
    assert stored - {'input', 'labels', 'loss'} == set(stages)
    for stage, result in stages.items():
      parity.check(result, arrays[f'{case}/{stage}'])

  @parity.quickly
  @jax.value_and_grad
  def loss(params):
    logits = model.apply({'params': params}, arrays['a/input'], train=False)
    return -jnp.take_along_axis(nn.log_softmax(logits), arrays['a/labels'][:, None], 1).mean()

  value, gradients = loss(variables['params'])
  parity.check(value, arrays['a/loss'])
  for key, gradient in to_state_dict(model, {'params': gradients}).items():
    parity.check(np.linalg.norm(gradient.astype(np.float64)), arrays[f'grad_norm/{key}'])


@pytest.mark.parametrize(('reduction', 'linear'), [(1, False), (3, False), (1, True)])
def test_a_block_is_the_publications_in_float64(reduction, linear):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 7, 8, 6)).astype(np.float32)
  layers = Layers(jnp.float32, None, train=False)
  block = Block(
    heads=2, reduction=reduction, expansion=2, linear=linear, drop_path=0.5, layers=layers
  )
  made = jax.eval_shape(lambda: block.init(jax.random.key(0), x))['params']
  params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 3, made)
  p = {path: np.asarray(leaf, np.float64) for path, leaf in named_leaves(params).items()}

  def dense(x, name):
    return x @ p[f'{name}/kernel'] + p[f'{name}/bias']

  def norm(x, name, epsilon):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return x * p[f'{name}/scale'] + p[f'{name}/bias']

  def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

  def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)

  z = x.astype(np.float64)
  y = small = norm(z, 'norm1', 1e-6)
  if linear:
    # The map is 7 x 8: seven windows of one row, and of two columns that overlap by one.
    small = (y[:, :, :-1] + y[:, :, 1:]) / 2
    small = small @ p['reduce/kernel'][0, 0] + p['reduce/bias']
    small = gelu(norm(small, 'reduce_norm', 1e-5))
  elif reduction > 1:
    # The seventh row and the last two columns fill no window.
    windows = y[:, :6, :6].reshape(2, 2, 3, 2, 3, 6)
    small = np.einsum('bihjwc,hwcd->bijd', windows, p['reduce/kernel']) + p['reduce/bias']
    small = norm(small, 'reduce_norm', 1e-5)
  query = dense(y, 'query').reshape(2, 56, 2, 3)
  key, value = np.split(dense(small, 'key_value').reshape(2, -1, 12), 2, axis=-1)
  key, value = (t.reshape(2, -1, 2, 3) for t in (key, value))
  weights = softmax(np.einsum('bqhd,bkhd->bhqk', query, key) / math.sqrt(3))
  z = z + dense(np.einsum('bhqk,bkhd->bqhd', weights, value).reshape(z.shape), 'out')
  y = dense(norm(z, 'norm2', 1e-6), 'dense1')
  y = np.pad(np.maximum(y, 0) if linear else y, ((0, 0), (1, 1), (1, 1), (0, 0)))
  taps = (
    y[:, i : i + 7, j : j + 8] * p['depthwise/kernel'][i, j, 0] for i in range(3) for j in range(3)
  )
  z = z + dense(gelu(sum(taps) + p['depthwise/bias']), 'dense2')

  result = parity.quickly(block.apply)({'params': params}, x)
  np.testing.assert_allclose(result, z, atol=2e-5 * np.abs(z).max())


@pytest.mark.parametrize('side', [3, 7, 10, 16])
def test_adaptive_pooling_has_the_windows_of_its_definition(side):
  x = np.random.default_rng(side).normal(size=(1, side, 2 * side, 2)).astype(np.float32)
  expected = np.empty((1, 7, 7, 2))
  for i in range(7):
    for j in range(7):
      rows = slice(i * side // 7, math.ceil((i + 1) * side / 7))
      columns = slice(j * 2 * side // 7, math.ceil((j + 1) * 2 * side / 7))
      expected[:, i, j] = x[:, rows, columns].mean((1, 2))
  np.testing.assert_allclose(adaptive_average_pool(jnp.asarray(x), 7), expected, atol=1e-6)


def test_drop_path_takes_whole_samples_and_needs_a_key():
  x = np.random.default_rng(0).normal(size=(64, 3, 4, 5)).astype(np.float32)
  block = functools.partial(Block, heads=1, reduction=1, expansion=1, linear=False, drop_path=0.25)
  fixed = block(layers=Layers(jnp.float32, None, train=True))
  params = parity.quickly(fixed.init)(parity.KEY, x)
  random = block(layers=Layers(jnp.float32, None, train=True, random=True))
  # Without the MLP's branch: what is left is the attention's.
  params['params']['dense2'] = jax.tree.map(jnp.zeros_like, params['params']['dense2'])
  key = jax.random.key(1, impl='rbg')
  whole, dropped = parity.quickly(
    lambda x: (fixed.apply(params, x) - x, random.apply(params, x, rngs={'dropout': key}) - x)
  )(x)
  whole, dropped = np.asarray(whole), np.asarray(dropped)
  gone = np.abs(dropped).max((1, 2, 3)) == 0
  assert 6 <= gone.sum() <= 27  # 16 expected, 3 standard deviations are 10.4
  np.testing.assert_allclose(dropped[~gone], whole[~gone] / 0.75, atol=1e-5)


def test_drop_path_rates_rise_evenly_to_the_last_block():
  model, variables = shapes('pvt_v2', drop_path=0.3)
  rates, x = [], jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)

  def record(next_fun, args, kwargs, context):
    if isinstance(context.module, nn.Dropout) and context.method_name == '__call__':
      rates.append((context.module.rate, context.module.deterministic))
    return next_fun(*args, **kwargs)

  for rngs, train in (({'dropout': jax.random.key(0)}, True), ({}, True), (None, False)):
    rates.clear()

    def apply(v, x, rngs=rngs, train=train):
      return model.apply(v, x, train=train, rngs=rngs)

    with nn.intercept_methods(record):
      jax.eval_shape(apply, variables, x)
    expected = np.repeat([0.3 * i / 7 for i in range(8)], 2)
    np.testing.assert_allclose([rate for rate, _ in rates], expected, atol=1e-7)
    assert {deterministic for _, deterministic in rates} == {not rngs}


def test_leaves_have_their_kinds():
  kinds = leaf_kinds(shapes('pvt_v2', **TINY)[1]['params'])
  block = {path.split('/', 1)[1]: kind for path, kind in kinds.items() if 'stage2_block2/' in path}
  dense = ('query', 'key_value', 'out', 'dense1', 'dense2')
  norms = ('norm1', 'norm2', 'reduce_norm')
  assert block == {
    **{f'{layer}/kernel': 'fc' for layer in dense},
    **{f'{layer}/kernel': 'conv' for layer in ('reduce', 'depthwise')},
    **{f'{layer}/bias': 'bias' for layer in (*dense, 'reduce', 'depthwise')},
    **{f'{layer}/{leaf}': 'keep' for layer in norms for leaf in ('scale', 'bias')},
  }


@pytest.mark.parametrize(('dtype', 'bound'), [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
@pytest.mark.parametrize(('images', 'heads', 'apart'), [(2, 3, True), (4, 3, False)])
def test_attention_is_jaxs(images, heads, apart, dtype, bound):
  rng = np.random.default_rng(0)
  shapes = [(images, n, heads, 5) for n in (12, 7, 7, 12)]
  *arrays, cotangent = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
  found = [jax.vjp(f, *arrays) for f in (attend, jax.nn.dot_product_attention)]
  (got, slope), (want, plain_slope) = found
  for a, b in zip((got, *slope(cotangent)), (want, *plain_slope(cotangent)), strict=True):
    assert a.dtype == dtype
    np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=bound, atol=bound)
  names = [eqn.primitive.name for eqn in equations(jax.make_jaxpr(attend)(*arrays).jaxpr)]
  assert (names.count('dot_general') == 2 * images * heads) == apart


# On a CPU the embeddings' convolutions are products too.
@pytest.mark.parametrize(('backend', 'convolutions_left'), [('cpu', 0), ('gpu', 4)])
def test_bfloat16_computes_in_bfloat16_and_keeps_float32(monkeypatch, backend, convolutions_left):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  model, variables = shapes('pvt_v2', **TINY, dtype='bfloat16')
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  x = jnp.zeros((2, 64, 64, 3))
  jaxpr = jax.make_jaxpr(lambda v: model.apply(v, x, train=False))(variables).jaxpr
  results = [(eqn.primitive.name, eqn.outvars[0].aval) for eqn in equations(jaxpr)]
  convolutions = [aval.dtype for name, aval in results if name == 'conv_general_dilated']
  # Those of Dense and of the reductions give maps [B, H, W, C]; attention's scores are float32.
  products = [aval.dtype for name, aval in results if name == 'dot_general' and aval.ndim == 4]
  assert len(convolutions) == convolutions_left
  assert set(convolutions) <= {jnp.dtype('bfloat16')}
  assert len(products) >= 24 - convolutions_left and set(products) == {jnp.dtype('bfloat16')}
  out = jax.eval_shape(lambda v: model.apply(v, x, train=False), variables)
  assert (out.shape, out.dtype) == ((2, 10), jnp.float32)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'name': 'pvt_v2_b0', 'depths': (1, 1, 1, 1)}, "no option 'depths'; its options: stem_stride"),
    (
      {'name': 'pvt_v2', 'depths': (1, 1)},
      r'depths of .* is \(1, 1\); expected 4 positive integers',
    ),
    ({'name': 'pvt_v2', 'depths': (1, 1, 0, 1)}, 'expected 4 positive integers'),
    ({'name': 'pvt_v2', 'linear': 1}, "linear of model 'pvt_v2' is 1; expected True or False"),
    ({'name': 'pvt_v2', 'drop_path': 1.0}, 'is 1.0; expected a number from 0 to below 1'),
    ({'name': 'pvt_v2', 'width': 16.0}, "width of model 'pvt_v2' is 16.0; expected a positive int"),
  ],
)
def test_bad_settings_are_refused(settings, message):
  with pytest.raises(UserError, match=message):
    build_model(**{'num_classes': 10, **settings})


def test_widths_and_images_that_do_not_fit_are_refused():
  with pytest.raises(
    UserError, match='width 2 gives a stage of 8 channels 4; expected a multiple of its 8'
  ):
    shapes('pvt_v2', **TINY, width=2)
  with pytest.raises(UserError, match='a map of 7 x 7, which is reduced 8 times; expected larger'):
    shapes('pvt_v2_b0', (28, 28, 1))
  assert shapes('pvt_v2_b2_li', (9, 13, 2), width=8)[1]['params'][HEAD]['bias'].shape == (10,)


def test_the_options_there_are():
  assert tuple(model_options('pvt_v2_b5')) == ('stem_stride', 'drop_path')
  assert tuple(model_options('pvt_v2')) == (
    'depths', 'embed_dims', 'num_heads', 'sr_ratios', 'mlp_ratios', 'stem_stride', 'linear',
    'drop_path',
  )  # fmt: skip
