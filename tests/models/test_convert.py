"""Conversion of checkpoints: round trips, what is skipped, and errors that name tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from know_jax.errors import UserError
from know_jax.models import build_model, convert_state_dict, load_pretrained, to_state_dict

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
  fresh = model.init(jax.random.key(5), jnp.zeros((1, 64, 64, 3)), train=False)['params']['head']
  assert_same(variables['params'], {**expected, 'head': fresh})


def test_files_that_cannot_be_read_are_named(model, tmp_path):
  with pytest.raises(UserError, match=r'cannot read .*absent.safetensors: '):
    load_pretrained(model, tmp_path / 'absent.safetensors')
  (tmp_path / 'torn').write_bytes(b'\x10')
  with pytest.raises(UserError, match='torn is no safetensors file that can be read'):
    load_pretrained(model, tmp_path / 'torn')
