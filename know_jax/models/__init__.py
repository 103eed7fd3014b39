"""Target networks: those whose weights are predicted, one family a file."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from know_jax.errors import UserError, unknown_name
from know_jax.models.common import HEAD, Classifier, Family
from know_jax.models.convert import (
  convert_state_dict,
  load_pretrained,
  start_from,
  to_state_dict,
)
from know_jax.registry import discover

__all__ = [
  'HEAD',
  'MODELS',
  'Classifier',
  'Family',
  'build_model',
  'convert_state_dict',
  'load_pretrained',
  'model_options',
  'start_from',
  'to_state_dict',
]


MODELS: dict[str, Family] = discover(__name__, 'MODELS')
"""Name -> family, as the `MODELS` of the modules declare them. `build_model` makes the module."""


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
      f'width of model {name!r} is {width}; expected a multiple of {family.width_multiple}.'
    )
  return family.module(dtype=_floating(name, dtype), axis_name=axis_name, **settings)


def _checked(what: str, value: Any, default: Any) -> Any:
  """The value of an option, if it is of its default's sort."""

  def positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1

  if isinstance(default, tuple):
    if isinstance(value, list | tuple) and len(value) == len(default) and all(map(positive, value)):
      return tuple(value)
    expected = f'{len(default)} positive integers'
  elif isinstance(default, bool):
    if isinstance(value, bool):
      return value
    expected = 'True or False'
  elif isinstance(default, float):
    # A share, or a multiple of a width: 1.0.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and (0 < value < math.inf if default == 1 else 0 <= value < 1):
      return float(value)
    expected = 'a positive number' if default == 1 else 'a number from 0 to below 1'
  else:
    if positive(value):
      return value
    expected = 'a positive integer'
  raise UserError(f'{what} is {value!r}; expected {expected}.')


def _floating(name: str, dtype: Any) -> np.dtype:
  error = UserError(
    f'dtype of model {name!r} is {dtype!r}; expected a floating-point dtype that JAX computes in '
    '(float64 only where jax_enable_x64 is set).'
  )
  if dtype is None:  # NumPy takes it for float64.
    raise error
  try:
    result = jnp.dtype(dtype)
  except TypeError:
    raise error from None
  if not jnp.issubdtype(result, jnp.floating) or jax.dtypes.canonicalize_dtype(result) != result:
    raise error
  return result


def _family(name: str) -> Family:
  if name not in MODELS:
    raise unknown_name('model', name, MODELS)
  return MODELS[name]
