"""DeepLabV3+ against torchvision's layers and in its own right."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax import traverse_util

from know_jax.errors import UserError
from know_jax.kinds import leaf_kinds
from know_jax.models import HEAD, build_model, convert_state_dict, model_options, to_state_dict
from know_jax.models.deeplab import scaled
from know_jax.trees import num_weights

PARITY = ('deeplabv3plus_mobilenetv2', 'deeplabv3plus_mobilenetv2_w050_os8')
SMALL = {'width': 0.25, 'channels': 8, 'output_stride': 8, 'rates': (1, 2, 3)}


def shapes(size=(64, 64, 3), num_classes=21, **options):
  model = build_model('deeplabv3plus', num_classes=num_classes, **options)
  x = jax.ShapeDtypeStruct((2, *size), jnp.float32)
  return model, jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)


@pytest.mark.parametrize(
  ('options', 'count', 'statistics'),
  [
    ({}, 2_719_813, 38_784),
    ({'num_classes': 19}, 2_719_299, 38_784),
    ({'separable': False}, 5_816_053, None),
    ({'separable': False, 'num_classes': 19}, 5_815_539, None),
    ({'width': 0.5, 'output_stride': 8, 'channels': 64}, 573_733, 18_416),
    ({'width': 0.5, 'channels': 64, 'num_classes': 11}, 573_083, 18_416),
    ({'width': 0.35, 'output_stride': 8, 'channels': 64}, 326_293, 13_664),
    ({'width': 0.35, 'channels': 64, 'num_classes': 11}, 325_643, 13_664),
  ],
)
def test_parameter_counts_are_those_of_torchvisions_layers(options, count, statistics):
  variables = shapes(**options)[1]
  assert num_weights(variables['params']) == count
  assert statistics in (None, num_weights(variables['batch_stats']))


@pytest.mark.parametrize('name', PARITY)
def test_outputs_gradients_and_statistics_are_pytorchs(name):
  arrays, about = parity.load(name)
  config = about['meta']['config']
  classes = config.pop('classes')
  model = build_model('deeplabv3plus', num_classes=classes, dropout=0.0, **config)
  variables = convert_state_dict(model, parity.tensors(arrays))
  assert num_weights(variables['params']) == about['meta']['parameters']
  back = to_state_dict(model, variables)
  assert set(back) == set(parity.tensors(arrays))
  for key, value in back.items():
    np.testing.assert_array_equal(value, arrays[f'param/{key}'])

  @parity.quickly
  def outputs(variables, x):
    logits, state = model.apply(variables, x, train=False, capture_intermediates=True)
    return logits, stages(state)

  def stages(state):
    own = traverse_util.flatten_dict(state['intermediates'], sep='/')
    own = {path.removesuffix('/__call__'): values[0] for path, values in own.items()}
    result = {f'backbone{i}': own[f'block{i}'] for i in (1, 3, 6, 10, 13, 17)}
    return result | {'aspp': own['aspp'], 'decoder': own['decoder1'], 'coarse_logits': own[HEAD]}

  stored = {case: {} for case in 'abc'}
  for key, value in arrays.items():
    if key[:2] in ('a/', 'b/', 'c/') and key[2:] not in ('input', 'labels', 'loss'):
      stored[key[0]][key[2:]] = value
  for case, expected in stored.items():
    if not expected:
      continue
    logits, own = outputs(variables, arrays[f'{case}/input'])
    own |= {'logits': logits, 'logits_every_16th': logits[:, ::16, ::16]}
    for stage, value in expected.items():
      parity.check(own[stage], value)

  def loss(params, case):
    logits = model.apply({**variables, 'params': params}, arrays[f'{case}/input'], train=False)
    labels = arrays[f'{case}/labels']
    counts = labels != 255
    at = np.where(counts, labels, 0)[..., None]
    values = -jnp.take_along_axis(nn.log_softmax(logits), at, -1)[..., 0]
    return (values * counts).sum() / counts.sum()

  value, gradients = parity.quickly(jax.value_and_grad(lambda p: loss(p, 'g')))(variables['params'])
  parity.check(value, arrays['g/loss'])
  norms = to_state_dict(model, {**variables, 'params': gradients})
  compared = [key.removeprefix('grad_norm/') for key in arrays if key.startswith('grad_norm/')]
  assert set(compared) == {
    key for key in norms if not key.endswith(('running_mean', 'running_var'))
  }
  for key in compared:
    parity.check(np.linalg.norm(norms[key].astype(np.float64)), arrays[f'grad_norm/{key}'])
  if 'train/input' not in arrays:
    return

  mutable = ['batch_stats', 'intermediates']
  _, state = parity.quickly(
    lambda v, x: model.apply(v, x, train=True, capture_intermediates=True, mutable=mutable)
  )(variables, arrays['train/input'])
  parity.check(stages(state)['coarse_logits'], arrays['train/coarse_logits'], 1e-4)
  new = to_state_dict(model, {**variables, 'batch_stats': state['batch_stats']})
  sides = {'backbone.features.0': 32, 'backbone.features.10': 64 // config['output_stride']}
  for key in (key for key in arrays if key.startswith('train/') and 'running' in key):
    layer = key.removeprefix('train/')
    result, old = new[layer], arrays[f'param/{layer}']
    if layer.endswith('var'):
      # PyTorch records the unbiased variance of the batch.
      side = next((side for start, side in sides.items() if layer.startswith(f'{start}.')), 16)
      count = len(arrays['train/input']) * side**2
      result = 0.9 * old + (result - 0.9 * old) * count / (count - 1)
    parity.check(result, arrays[key], 1e-4)


@pytest.mark.parametrize(
  ('stride', 'rates', 'side'),
  [
    # Stride and dilation of the blocks' depthwise convolutions where they are not 1 and 1.
    (32, {2: (2, 1), 4: (2, 1), 7: (2, 1), 14: (2, 1)}, 2),
    (16, {2: (2, 1), 4: (2, 1), 7: (2, 1), 15: (1, 2), 16: (1, 2), 17: (1, 2)}, 4),
    (
      8,
      {
        **{2: (2, 1), 4: (2, 1)},
        **dict.fromkeys(range(8, 15), (1, 2)),
        **dict.fromkeys((15, 16, 17), (1, 4)),
      },
      8,
    ),
  ],
)
def test_output_strides_turn_strides_into_rates(stride, rates, side):
  model, variables = shapes(output_stride=stride, width=0.25)
  own = {}

  def record(next_fun, args, kwargs, context):
    out = next_fun(*args, **kwargs)
    if context.module.name == 'depthwise' and context.module.path[0].startswith('block'):
      module = context.module
      own[int(module.path[0].removeprefix('block'))] = (module.stride, module.dilation)
      assert out.shape[1] == -(-args[0].shape[1] // module.stride)
    return out

  x = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
  with nn.intercept_methods(record):
    shape = jax.eval_shape(lambda v, x: model.apply(v, x, train=False, spatial=True), variables, x)
  assert {i: at for i, at in own.items() if at != (1, 1)} == rates
  assert sorted(own) == list(range(1, 18))
  assert shape.shape == (2, side, side, 80)


@pytest.mark.parametrize('size', [(64, 64, 3), (33, 50, 1)])
def test_logits_have_the_images_size_and_leaves_their_kinds(size):
  model, variables = shapes(size, num_classes=5, **SMALL)
  x = jax.ShapeDtypeStruct((3, *size), jnp.float32)
  out = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, x)
  assert (out.shape, out.dtype) == ((3, *size[:2], 5), jnp.float32)
  kinds = leaf_kinds(variables)
  assert {kind for path, kind in kinds.items() if 'norm' in path} == {'keep'}
  assert {kind for path, kind in kinds.items() if 'norm' not in path} == {'conv', 'bias'}
  assert [path for path, kind in kinds.items() if kind == 'bias'] == [f'params/{HEAD}/bias']


def test_channels_are_rounded_as_in_the_publications_code():
  # MobileNetV2 at 0.35 and 1.4, as torchvision's _make_divisible gives them.
  narrow = [scaled(c, 0.35) for c in (32, 16, 24, 32, 64, 96, 160, 320)]
  assert narrow == [16, 8, 8, 16, 24, 32, 56, 112]
  wide = [scaled(c, 1.4) for c in (32, 16, 24, 32, 64, 96, 160, 320)]
  assert wide == [48, 24, 32, 48, 88, 136, 224, 448]


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'output_stride': 12}, r'output_stride of deeplabv3plus is 12; expected one of \(8, 16, 32\)'),
    ({'width': 0.0}, "width of model 'deeplabv3plus' is 0.0; expected a positive number"),
    ({'rates': (1, 2)}, 'expected 3 positive integers'),
    ({'dropout': True}, 'is True; expected a number from 0 to below 1'),
  ],
)
def test_bad_settings_are_refused(settings, message):
  with pytest.raises(UserError, match=message):
    shapes(**settings)


def test_the_options_there_are():
  assert tuple(model_options('deeplabv3plus')) == (
    'output_stride', 'rates', 'channels', 'separable', 'dropout',
  )  # fmt: skip
