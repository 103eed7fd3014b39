"""Conversion of checkpoints: round trips, what is skipped, and errors that name tensors."""

import functools

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import small_config
from safetensors.numpy import save_file

from know_jax import forgetting
from know_jax.errors import UserError
from know_jax.models import (
  build_model,
  convert_state_dict,
  load_pretrained,
  start_from,
  to_state_dict,
)
from know_jax.runs.workdir import restore_stage
from know_jax.trees import named_leaves

TINY = {'depths': (1, 1, 1, 1), 'width': 8, 'stem_stride': 2}


def pvt(num_classes=10, **options):
  return build_model('pvt_v2', num_classes=num_classes, **{**TINY, **options})


def random_variables(model, seed=0):
  made = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False)
  )
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), made)


@pytest.fixture(scope='module')
def model():
  return pvt()


@pytest.fixture(scope='module')
def tensors(model):
  """As a file of timm's has them."""
  return to_state_dict(model, random_variables(model))


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_names_and_layouts_are_timms(model, tensors):
  variables = random_variables(model)
  params = variables['params']
  assert_same(tensors['head.weight'], params['head']['kernel'].T)
  assert_same(tensors['patch_embed.proj.bias'], params['stage1_embed']['bias'])
  assert tensors['stages.1.downsample.proj.weight'].shape == (16, 8, 3, 3)
  kernel = params['stage3_block1']['reduce']['kernel']
  assert_same(tensors['stages.2.blocks.0.attn.sr.weight'][3, 5], kernel[:, :, 5, 3])
  assert_same(
    tensors['stages.3.blocks.0.mlp.dwconv.weight'][7, 0],
    params['stage4_block1']['depthwise']['kernel'][:, :, 0, 7],
  )
  assert_same(tensors['stages.0.norm.weight'], params['stage1_norm']['scale'])
  assert_same(convert_state_dict(model, tensors), variables)


@pytest.mark.parametrize('separable', [False, True])
def test_deeplab_comes_back_as_it_was(separable):
  model = build_model('deeplabv3plus', num_classes=3, width=0.25, channels=8, separable=separable)
  variables = random_variables(model)
  tensors = to_state_dict(model, variables)
  counters = {name.replace('running_var', 'num_batches_tracked'): np.int64(3) for name in tensors
              if name.endswith('running_var')}  # fmt: skip
  assert_same(convert_state_dict(model, tensors | counters), variables)


def test_half_precision_is_read_exactly_and_becomes_float32(model, tensors):
  half = {name: value.astype(jnp.bfloat16) for name, value in tensors.items()}
  variables = convert_state_dict(model, half)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
  for name, value in to_state_dict(model, variables).items():
    assert_same(value, half[name].astype(np.float32))


def test_errors_name_the_tensor(model, tensors):
  name = 'stages.2.blocks.0.attn.kv.weight'
  less = {key: value for key, value in tensors.items() if key != name}
  with pytest.raises(UserError, match=rf"'{name}' is missing; .* 'params/stage3_block1/key_value"):
    convert_state_dict(model, less)
  with pytest.raises(UserError, match=rf"'{name}' has shape \(3, 4\); expected \(80, 40\)"):
    convert_state_dict(model, tensors | {name: np.zeros((3, 4), np.float32)})
  with pytest.raises(UserError, match=r"'norm.a' belongs to no layer .* \(and 1 more such"):
    convert_state_dict(model, tensors | {'norm.a': 0, 'norm.b': 0})
  with pytest.raises(UserError, match=r"'head.bias' has dtype int64; expected floating-point"):
    convert_state_dict(model, tensors | {'head.bias': np.zeros(10, np.int64)})
  with pytest.raises(UserError, match='ResNet has no counterpart'):
    convert_state_dict(build_model('resnet_small', num_classes=3), tensors)
  params = random_variables(model)['params']
  with pytest.raises(UserError, match="the variables lack leaf 'params/head/bias'"):
    to_state_dict(model, {'params': {key: params[key] for key in params if key != 'head'}})
  with pytest.raises(UserError, match=r"'params/head/bias' has shape \(3,\); expected \(10,\)"):
    head = {**params['head'], 'bias': np.zeros(3)}
    to_state_dict(model, {'params': {**params, 'head': head}})


def test_pretrained_weights_start_a_network_of_as_many_classes(model, tensors, tmp_path):
  save_file(tensors, tmp_path / 'model.safetensors')
  variables, skipped = load_pretrained(model, tmp_path / 'model.safetensors')
  assert_same(variables, random_variables(model))
  assert skipped == []


@pytest.mark.parametrize('head', [True, False])
def test_a_head_that_does_not_fit_is_made_anew_and_listed(tensors, tmp_path, head):
  if not head:
    tensors = {name: value for name, value in tensors.items() if not name.startswith('head.')}
  save_file(tensors, tmp_path / 'model.safetensors')
  model = pvt(num_classes=7)
  variables, skipped = load_pretrained(model, tmp_path / 'model.safetensors', seed=5)
  assert sorted(skipped) == (['head.bias', 'head.weight'] if head else [])
  expected = {**random_variables(pvt())['params']}
  image = jnp.zeros((1, 64, 64, 3))
  init = jax.jit(lambda key: model.init(key, image, train=False)['params']['head'])
  fresh = init(jax.random.key(5))
  assert_same(variables['params'], {**expected, 'head': fresh})


def deeplab():
  return build_model('deeplabv3plus', num_classes=3, width=0.35, channels=8)


KERAS = {
  'stem': ('Conv1', 'conv2d'),
  'stem_norm': ('bn_Conv1', 'batch_normalization'),
  'block1/depthwise': ('expanded_conv_depthwise', 'depthwise_conv2d'),
  'block1/project_norm': ('expanded_conv_project_BN', 'batch_normalization_2'),
  'block2/expand': ('block_1_expand', 'conv2d_2'),
  'block2/expand_norm': ('block_1_expand_BN', 'batch_normalization_3'),
  'block17/depthwise_norm': ('block_16_depthwise_BN', 'batch_normalization_49'),
  'block17/project': ('block_16_project', 'conv2d_33'),
}
"""As `keras.applications.MobileNetV2` names layers, and its `.keras` file (read off both)."""
TIMM = {
  'stem': 'conv_stem',
  'stem_norm': 'bn1',
  'block1/depthwise': 'blocks.0.0.conv_dw',
  'block1/project_norm': 'blocks.0.0.bn2',
  'block2/expand': 'blocks.1.0.conv_pw',
  'block10/project': 'blocks.3.3.conv_pwl',
  'block17/depthwise_norm': 'blocks.6.0.bn2',
}
"""As `timm.create_model('mobilenetv2_100')` does."""


def test_layers_have_the_names_of_other_libraries():
  model = deeplab()
  for layer, names in KERAS.items():
    assert tuple(model.pretrained_name(style, layer) for style in ('keras', 'keras_3')) == names
  for layer, name in TIMM.items():
    assert model.pretrained_name('timm', layer) == name
  assert model.pretrained_name('mobilenet', 'block17/project_norm') == 'features.17.conv.3'
  keras = functools.partial(build_model('pvt_v2_b2', num_classes=3).pretrained_name, 'keras')
  assert keras('stage1_embed') == 'stem_conv'
  assert keras('stage3_block6/reduce') == 'stack3_block6_attn_kv_sr_conv'
  assert keras('stage3_block2/depthwise') == 'stack3_block2_mlp_mid_dw_conv'
  assert keras('stage3_norm') == 'stack3_block6_output_ln'
  assert keras('head') == 'predictions'


def keras_file(path, model, variables, style):
  """Weights as Keras 2 writes them, layer by layer, with a classifier of other classes."""
  norms = {p.rpartition('/')[0] for p in named_leaves(variables['params']) if p.endswith('scale')}
  names = {'kernel': 'kernel', 'scale': 'gamma', 'mean': 'moving_mean', 'var': 'moving_variance'}
  with h5py.File(path, 'w') as file:
    for path_, leaf in named_leaves(variables).items():
      layer, _, name = path_.partition('/')[2].rpartition('/')
      if model.is_above_backbone(layer):
        continue
      value, called = np.asarray(leaf), names.get(name, 'beta' if layer in norms else 'bias')
      if 'depthwise' in layer and name == 'kernel':
        value, called = value.transpose(0, 1, 3, 2), 'depthwise_kernel'
      if name == 'var':
        value = value - np.float32(1e-3 - 1e-5)
      keras = model.pretrained_name(style, layer)
      file[f'{keras}/{keras}/{called}:0'] = value
    file['predictions/predictions/kernel:0'] = np.ones((4, 1000), np.float32)


@pytest.mark.parametrize('make', [deeplab, pvt])
def test_a_keras_file_starts_all_but_what_is_of_its_classes(make, tmp_path):
  model = make()
  variables, fresh = random_variables(model), random_variables(model, seed=1)
  keras_file(tmp_path / 'model.h5', model, variables, 'keras')
  start = start_from(model, tmp_path / 'model.h5', fresh)
  assert start.skipped == ['predictions/kernel']
  expected, old = named_leaves(variables), named_leaves(fresh)
  for path, leaf in named_leaves(start.variables).items():
    upper = model.is_above_backbone(path.partition('/')[2].rpartition('/')[0])
    assert (path in start.fresh) == upper
    np.testing.assert_allclose(leaf, (old if upper else expected)[path], atol=1e-6, err_msg=path)
  assert len(start.taken) + len(start.fresh) == len(expected)


@pytest.mark.parametrize('style', ['mobilenet', 'timm', 'torchvision'])
def test_a_mobilenet_starts_the_backbone(style, tmp_path):
  model = deeplab()
  variables, fresh = random_variables(model), random_variables(model, seed=1)
  own = to_state_dict(model, variables)
  tensors = {'classifier.1.weight': np.ones((9, 9), np.float32)} if style != 'torchvision' else {}
  for path, name in zip(named_leaves(variables), named_names(model, variables), strict=True):
    layer = path.partition('/')[2].rpartition('/')[0]
    if style == 'torchvision' or not model.is_above_backbone(layer):
      other = f'{model.pretrained_name(style, layer)}.{name.rpartition(".")[2]}'
      tensors[other] = own[name]
  save_file(tensors, tmp_path / 'model.safetensors')
  start = start_from(model, tmp_path / 'model.safetensors', fresh)
  for path, leaf in named_leaves(start.variables).items():
    kept = fresh if path in start.fresh else variables
    assert_same(leaf, named_leaves(kept)[path])
  assert any(path.startswith('params/aspp') for path in start.fresh) == (style != 'torchvision')
  assert 'params/block17/project/kernel' not in start.fresh


def named_names(model, variables):
  """The state_dict's name of every leaf, in the order of the leaves."""
  leaves = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean'}
  for path in named_leaves(variables):
    layer, _, leaf = path.partition('/')[2].rpartition('/')
    yield f'{model.state_dict_name(layer)}.{leaves.get(leaf, "running_var")}'


def test_weights_of_another_network_are_refused(model, tensors, tmp_path):
  fresh, file = random_variables(model), tmp_path / 'model.safetensors'
  deeper = {'stages.0.blocks.1.attn.q.weight': np.zeros((8, 8), np.float32)}
  save_file(tensors | deeper, file)
  with pytest.raises(UserError, match=r"'stages/0/blocks/1/attn/q/weight' belongs to no layer"):
    start_from(model, file, fresh)
  name = 'stages.2.blocks.0.attn.kv.weight'
  save_file({key: value for key, value in tensors.items() if key != name}, file)
  with pytest.raises(UserError, match=r"kv/weight' is missing; expected it for leaf .*key_value"):
    start_from(model, file, fresh)
  save_file(tensors | {name: np.zeros((3, 4), np.float32)}, file)
  with pytest.raises(UserError, match=r"kv/weight' has shape \(4, 3\) .* \(40, 80\)"):
    start_from(model, file, fresh)
  save_file(tensors | {name: np.zeros((80, 40), np.int32)}, file)
  with pytest.raises(UserError, match="kv/weight' has dtype int32; expected floating-point"):
    start_from(model, file, fresh)


@pytest.mark.parametrize('classes', [(0, 1, 2, 3, 4), (3, 7, 8)])
def test_a_forgetting_run_starts_from_a_file_and_from_a_run(model, tensors, tmp_path, classes):
  grey = {**tensors, 'patch_embed.proj.weight': tensors['patch_embed.proj.weight'][:, :1]}
  grey |= {'head.weight': np.ones((5, 64), np.float32), 'head.bias': np.ones(5, np.float32)}
  save_file(grey, tmp_path / 'grey.safetensors')
  options = 'depths=(1, 1, 1, 1), stem_stride=2, sr_ratios=(1, 1, 1, 1)'
  assert {name for name in grey if '.sr.' in name}
  grey = {name: x for name, x in grey.items() if '.sr.' not in name and '.attn.norm' not in name}
  save_file(grey, tmp_path / 'grey.safetensors')
  config = small_config(
    model='pvt_v2', width=8, model_options=options, classes=classes, train_examples=0,
    stages=2, epochs=1, lr=0.0, start=str(tmp_path / 'grey.safetensors'),
  )  # fmt: skip
  record = forgetting.run(config, tmp_path / 'run', show_progress=False)
  fits = len(classes) == 5
  assert record['start']['skipped'] == ([] if fits else ['head/bias', 'head/weight'])
  assert record['start']['fresh'] == ([] if fits else ['params/head/bias', 'params/head/kernel'])
  assert record['start']['taken'] == len(grey) - (0 if fits else 2)
  params = restore_stage(tmp_path / 'run', 0)['params']
  assert_same(
    params['stage4_block1']['out']['kernel'], grey['stages.3.blocks.0.attn.proj.weight'].T
  )
  assert (params['head']['bias'] == (1 if fits else 0)).all()
  if fits:
    # Another network of the same task, from the checkpoint of that run.
    config.start, config.seed = str(tmp_path / 'run'), 5
    forgetting.run(config, tmp_path / 'again', show_progress=False)
    assert_same(restore_stage(tmp_path / 'again', 0)['params'], params)
    assert 'start: ' in forgetting.account(record['start'])


def test_files_that_cannot_be_read_are_named(model, tmp_path):
  with pytest.raises(UserError, match=r'absent.safetensors: no such file or folder'):
    load_pretrained(model, tmp_path / 'absent.safetensors')
  (tmp_path / 'torn').write_bytes(b'\x10')
  with pytest.raises(UserError, match='torn: not a readable safetensors file: its header'):
    load_pretrained(model, tmp_path / 'torn')
