"""Target networks: those whose weights are predicted, one family a file."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from know_jax.errors import UserError, unknown_name
from know_jax.models.cnn import CNN
from know_jax.models.common import HEAD, Classifier
from know_jax.models.convert import convert_state_dict, load_pretrained, to_state_dict
from know_jax.models.deeplab import DeepLabV3Plus
from know_jax.models.densenet import DenseNet
from know_jax.models.mobilenet import MobileNetV2
from know_jax.models.pvt import PVTv2
from know_jax.models.resnet import ResNet
from know_jax.models.shufflenet import ShuffleNetV2
from know_jax.models.vit import HEADS, ViT

__all__ = [
  'HEAD',
  'MODELS',
  'Classifier',
  'Family',
  'build_model',
  'convert_state_dict',
  'load_pretrained',
  'model_options',
  'to_state_dict',
]


class Family(NamedTuple):
  """An entry of the registry.

  Attributes:
    module: the Flax module.
    fixed: the module's attributes that this name settles; those left are options.
    width_multiple: what `width` must be a multiple of.
  """

  module: type[Classifier]
  fixed: Mapping[str, Any] = {}
  width_multiple: int = 1


def _pvt_v2(first: int, depths: tuple[int, ...], *, mlp: int = 8, linear: bool = False) -> Family:
  dims = tuple(first * times for times in (1, 2, 5, 8))
  fixed = {
    'embed_dims': dims,
    'num_heads': (1, 2, 5, 8),
    'depths': depths,
    'sr_ratios': (8, 4, 2, 1),
    'mlp_ratios': (mlp, mlp, 4, 4),
    'linear': linear,
  }
  return Family(PVTv2, fixed)


MODELS: dict[str, Family] = {
  'cnn': Family(CNN, {'batch_norm': False}),
  'cnn_bn': Family(CNN, {'batch_norm': True}),
  # For 32 x 32 images, as in the paper's transfer experiments: no pooling after the stem.
  'resnet18': Family(
    ResNet,
    {
      'width': 64,
      'strides': (1, 1, 2, 2),
      'blocks': 2,
      'stem_kernel': 7,
      'stem_stride': 1,
      'conv_bias': True,
    },
  ),
  'resnet_small': Family(
    ResNet, {'strides': (1, 2, 2), 'stem_kernel': 3, 'stem_stride': 2, 'conv_bias': False}
  ),
  'densenet': Family(DenseNet),
  'shufflenetv2': Family(ShuffleNetV2),
  'mobilenetv2': Family(MobileNetV2),
  'vit': Family(ViT, width_multiple=HEADS),
  'pvt_v2': Family(PVTv2),
  'pvt_v2_b0': _pvt_v2(32, (2, 2, 2, 2)),
  'pvt_v2_b1': _pvt_v2(64, (2, 2, 2, 2)),
  'pvt_v2_b2': _pvt_v2(64, (3, 4, 6, 3)),
  'pvt_v2_b2_li': _pvt_v2(64, (3, 4, 6, 3), linear=True),
  'pvt_v2_b3': _pvt_v2(64, (3, 4, 18, 3)),
  'pvt_v2_b4': _pvt_v2(64, (3, 8, 27, 3)),
  'pvt_v2_b5': _pvt_v2(64, (3, 6, 40, 3), mlp=4),
  'deeplabv3plus': Family(DeepLabV3Plus),
}
"""Name -> family. `build_model` makes the module."""


def model_options(name: str) -> dict[str, Any]:
  """The options of a model and their defaults, which tell what values an option can have.

  A default that is an integer stands for positive integers, a truth value for itself, a number for
  numbers from 0 to below 1, and a tuple for as many positive integers.

  Args:
    name: a key of `MODELS`.

  Returns:
    Option -> default, for `build_model(name, ..., option=value)`.

  Raises:
    UserError: no such model.
  """
  family = _family(name)
  common = {field.name for field in dataclasses.fields(Classifier)}
  return {
    field.name: field.default
    for field in dataclasses.fields(family.module)
    if field.name not in common and field.name not in family.fixed
  }


def build_model(
  name: str,
  *,
  num_classes: int,
  width: float | None = None,
  dtype: Any = jnp.float32,
  axis_name: str | None = None,
  **options: Any,
) -> Classifier:
  """Makes a model by name.

  Args:
    name: a key of `MODELS`.
    num_classes: the number of logits.
    width: the family's measure of size, None for its default.
    dtype: a floating-point dtype, or its name, for the computation; parameters and BatchNorm
      statistics are float32 in any case.
    axis_name: the mapped axis over which BatchNorm averages its statistics in training, None for
      no averaging between devices.
    **options: the family's own, see `model_options`.

  Returns:
    The module: `model.init(key, images, train=False)`, and
    `model.apply(variables, images, train=..., mutable=...)`, which gives float32 logits
    [B, num_classes], or [B, H, W, num_classes] in segmentation, for images [B, H, W, C] of at
    least 8 x 8. With `spatial=True` it gives the feature map [B, h, w, F] instead.

  Raises:
    UserError: unknown model or option, or a value that the model cannot have.
  """
  family, known = _family(name), model_options(name)
  for option in options:
    if option not in known:
      listed = ', '.join(f'{key} (default {value})' for key, value in known.items())
      raise UserError(
        f'model {name!r} has no option {option!r}; its options: {listed or "none"}, and width.'
      )
  settings = {**family.fixed, **options, 'num_classes': num_classes}
  defaults = {'num_classes': 1, **known}
  if width is not None:
    settings['width'] = width
    defaults['width'] = getattr(family.module, 'width', None) or 1
  for key, default in defaults.items():
    if key in settings:
      settings[key] = _checked(f'{key} of model {name!r}', settings[key], default)
  if family.width_multiple > 1 and settings.get('width', 0) % family.width_multiple:
    raise UserError(
      f'width of model {name!r} is {width}; wanted a multiple of {family.width_multiple}.'
    )
  return family.module(dtype=_floating(name, dtype), axis_name=axis_name, **settings)


def _checked(what: str, value: Any, default: Any) -> Any:
  """The value of an option, if it is of its default's sort."""

  def positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1

  if isinstance(default, tuple):
    if isinstance(value, list | tuple) and len(value) == len(default) and all(map(positive, value)):
      return tuple(value)
    wanted = f'{len(default)} positive integers'
  elif isinstance(default, bool):
    if isinstance(value, bool):
      return value
    wanted = 'True or False'
  elif isinstance(default, float):
    # A share, or a multiple of a width: 1.0.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and (0 < value < math.inf if default == 1 else 0 <= value < 1):
      return float(value)
    wanted = 'a positive number' if default == 1 else 'a number from 0 to below 1'
  else:
    if positive(value):
      return value
    wanted = 'a positive integer'
  raise UserError(f'{what} is {value!r}; wanted {wanted}.')


def _floating(name: str, dtype: Any) -> np.dtype:
  error = UserError(
    f'dtype of model {name!r} is {dtype!r}; wanted a floating-point dtype that JAX computes in '
    '(float64 only where jax_enable_x64 is set).'
  )
  if dtype is None:  # NumPy takes it for float64.
    raise error
  try:
    found = jnp.dtype(dtype)
  except TypeError:
    raise error from None
  if not jnp.issubdtype(found, jnp.floating) or jax.dtypes.canonicalize_dtype(found) != found:
    raise error
  return found


def _family(name: str) -> Family:
  if name not in MODELS:
    raise unknown_name('model', name, MODELS)
  return MODELS[name]
