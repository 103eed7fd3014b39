"""Weights of the same network in PyTorch's names and layout, and back.

Layouts: a convolution's `weight` [O, I, h, w] is Flax's `kernel` [h, w, I, O], a Linear's [O, I] is
[I, O]; a normalisation's `weight` is its `scale`, its running mean and variance are the `mean` and
`var` of `batch_stats`. (In training PyTorch records the unbiased variance of a batch and Flax the
biased one, n - 1 and n; nothing is to be converted for that.) Names: each family's
`state_dict_name`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load_file

from know_jax.errors import UserError, reason
from know_jax.models.common import HEAD, Classifier
from know_jax.trees import is_floating

_LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}
_COUNTER = 'num_batches_tracked'
_IMAGE = (1, 64, 64, 3)


def convert_state_dict(module: Classifier, tensors: Mapping[str, Any]) -> dict[str, Any]:
  """The variables of a network from a state_dict.

  Args:
    module: a PVTv2 (tensors named as in timm) or DeepLabV3+ (torchvision's names), for images of
      three channels.
    tensors: name -> array. BatchNorm's `num_batches_tracked` is left out.

  Returns:
    `{'params': ..., 'batch_stats': ...}` of NumPy arrays, for `module.apply`; float32.

  Raises:
    UserError: a tensor is missing, has another shape, or belongs to no layer; it is named.
  """
  names = _names(module)
  left = {name: value for name, value in tensors.items() if not name.endswith(_COUNTER)}
  flat = {path: _taken(left, name, path, leaf) for path, (name, leaf) in names.items()}
  if left:
    raise UserError(
      f'tensor {min(left)!r} belongs to no layer of {_summary(module)}{_more(len(left) - 1)}.'
    )
  return traverse_util.unflatten_dict(flat, sep='/')


def to_state_dict(module: Classifier, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The state_dict of a network's variables: what `convert_state_dict` undoes.

  Args:
    module: as in `convert_state_dict`.
    variables: of the module.

  Returns:
    Name -> array in PyTorch's layout.

  Raises:
    UserError: the variables are not those of the module; the leaf is named.
  """
  names, flat = _names(module), traverse_util.flatten_dict(dict(variables), sep='/')
  if differing := sorted(set(names) ^ set(flat)):
    have = 'lack' if differing[0] in names else 'have'
    raise UserError(
      f'the variables {have} leaf {differing[0]!r}; expected those of {_summary(module)}.'
    )
  result = {}
  for path, (name, leaf) in names.items():
    value = np.asarray(flat[path])
    if value.shape != leaf.shape:
      raise UserError(f'leaf {path!r} has shape {value.shape}; expected {leaf.shape}.')
    result[name] = np.ascontiguousarray(np.transpose(value, _to_torch(value.ndim)))
  return result


def load_pretrained(
  module: Classifier, path: str | os.PathLike, *, seed: int = 0
) -> tuple[dict[str, Any], list[str]]:
  """Weights to start from, such as timm's of ImageNet, out of a safetensors file.

  Args:
    module: as in `convert_state_dict`.
    path: the safetensors file.
    seed: of the new head, where the file's does not fit.

  Returns:
    The variables, as of `convert_state_dict`; and the names of the file's tensors that were left
    out, which are those of a head for another number of classes.

  Raises:
    UserError: the file cannot be read, or its tensors, the head's apart, do not fit the module.
  """
  tensors = _read(Path(path))
  names = _names(module)
  head = dict(entry for path, entry in names.items() if path.startswith(f'params/{HEAD}/'))
  fits = all(
    name in tensors and tensors[name].shape == _torch_shape(leaf) for name, leaf in head.items()
  )
  if fits:
    return convert_state_dict(module, tensors), []
  skipped = [name for name in head if name in tensors]
  fresh = module.init(jax.random.key(seed), jnp.zeros(_IMAGE), train=False)
  return convert_state_dict(
    module, tensors | {name: to_state_dict(module, fresh)[name] for name in head}
  ), skipped


def _read(path: Path) -> dict[str, np.ndarray]:
  try:
    return load_file(path)
  except OSError as error:
    raise UserError(f'cannot read {path}: {reason(error)}; expected a safetensors file.') from error
  except SafetensorError as error:
    raise UserError(f'{path} is no safetensors file that can be read: {error}.') from error


def _names(module: Classifier) -> dict[str, tuple[str, Any]]:
  """Path of every variable -> its name in a state_dict, and its shape and dtype."""
  shapes = jax.eval_shape(
    lambda x: module.init(jax.random.key(0), x, train=False),
    jax.ShapeDtypeStruct(_IMAGE, jnp.float32),
  )
  result = {}
  for path, leaf in traverse_util.flatten_dict(shapes, sep='/').items():
    layer, _, name = path.partition('/')[2].rpartition('/')
    result[path] = (f'{module.state_dict_name(layer)}.{_LEAVES[name]}', leaf)
  return result


def _taken(left: dict[str, Any], name: str, path: str, leaf: Any) -> np.ndarray:
  if name not in left:
    raise UserError(f'tensor {name!r} is missing; expected it for leaf {path!r}.')
  value, expected = np.asarray(left.pop(name)), _torch_shape(leaf)
  if value.shape != expected:
    raise UserError(f'tensor {name!r} has shape {value.shape}; expected {expected}.')
  if not is_floating(value):
    raise UserError(f'tensor {name!r} has dtype {value.dtype}; expected floating-point numbers.')
  return np.ascontiguousarray(np.transpose(value, _to_flax(value.ndim)), leaf.dtype)


def _to_flax(rank: int) -> tuple[int, ...]:
  return {4: (2, 3, 1, 0), 2: (1, 0)}.get(rank, tuple(range(rank)))


def _to_torch(rank: int) -> tuple[int, ...]:
  return {4: (3, 2, 0, 1), 2: (1, 0)}.get(rank, tuple(range(rank)))


def _torch_shape(leaf: Any) -> tuple[int, ...]:
  return tuple(leaf.shape[axis] for axis in _to_torch(len(leaf.shape)))


def _summary(module: Classifier) -> str:
  return f'a {type(module).__name__} of width {module.width} and {module.num_classes} classes'


def _more(count: int) -> str:
  return f' (and {count} more such tensors)' if count > 0 else ''
