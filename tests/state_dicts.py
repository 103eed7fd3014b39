"""Networks by PyTorch's names and layout: what files that they start from hold, and back.

Layouts: a convolution's `weight` [O, I, h, w] is Flax's `kernel` [h, w, I, O], a Linear's [O, I] is
[I, O]; a normalisation's `weight` is its `scale`, its running mean and variance are the `mean` and
`var` of `batch_stats`.
"""

import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from know_jax.errors import UserError
from know_jax.io.formats import open_weights
from know_jax.models import Classifier, start_from
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
  """Weights to start from, such as timm's of ImageNet: see `start_from`.

  Args:
    module: for images of three channels.
    path: the file.
    seed: of the new head, where the file's does not fit.

  Returns:
    The variables; and the names of the file's tensors that were left out.

  Raises:
    UserError: the file cannot be read, or its tensors, the head's apart, do not fit the module.
  """
  init = jax.jit(lambda key: module.init(key, jnp.zeros(_IMAGE), train=False))
  start = start_from(module, path, init(jax.random.key(seed)))
  leaves = open_weights(path).leaves
  return start.variables, [leaves[n].name if n in leaves else n for n in start.skipped]


@functools.lru_cache(maxsize=16)
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
  value = np.asarray(left.pop(name))
  expected = tuple(leaf.shape[axis] for axis in _to_torch(len(leaf.shape)))
  if value.shape != expected:
    raise UserError(f'tensor {name!r} has shape {value.shape}; expected {expected}.')
  if not is_floating(value):
    raise UserError(f'tensor {name!r} has dtype {value.dtype}; expected floating-point numbers.')
  return np.ascontiguousarray(np.transpose(value, _to_flax(value.ndim)), leaf.dtype)


def _to_flax(rank: int) -> tuple[int, ...]:
  return {4: (2, 3, 1, 0), 2: (1, 0)}.get(rank, tuple(range(rank)))


def _to_torch(rank: int) -> tuple[int, ...]:
  return {4: (3, 2, 0, 1), 2: (1, 0)}.get(rank, tuple(range(rank)))


def _summary(module: Classifier) -> str:
  return f'a {type(module).__name__} of width {module.width} and {module.num_classes} classes'


def _more(count: int) -> str:
  return f' (and {count} more such tensors)' if count > 0 else ''
