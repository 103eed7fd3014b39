"""Target networks: the image classifiers whose weights are predicted, one family a file."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from know_jax.errors import UserError, unknown_name
from know_jax.models.cnn import CNN
from know_jax.models.common import HEAD, Classifier
from know_jax.models.densenet import DenseNet
from know_jax.models.mobilenet import MobileNetV2
from know_jax.models.resnet import ResNet
from know_jax.models.shufflenet import ShuffleNetV2
from know_jax.models.vit import HEADS, ViT

__all__ = ['HEAD', 'MODELS', 'Classifier', 'Family', 'build_model', 'model_options']


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
}
"""Name -> family. `build_model` makes the module."""


def model_options(name: str) -> dict[str, Any]:
  """The options of a model and their defaults; all are positive integers.

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
  width: int | None = None,
  dtype: Any = jnp.float32,
  axis_name: str | None = None,
  **options: int,
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
    [B, num_classes] for images [B, H, W, C] of at least 8 x 8.

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
  if width is not None:
    settings['width'] = width
  for key in ('num_classes', 'width', *options):
    value = settings.get(key, 1)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise UserError(f'{key} of model {name!r} is {value!r}; wanted a positive integer.')
  if settings.get('width', 0) % family.width_multiple:
    raise UserError(
      f'width of model {name!r} is {width}; wanted a multiple of {family.width_multiple}.'
    )
  return family.module(dtype=_floating(name, dtype), axis_name=axis_name, **settings)


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
