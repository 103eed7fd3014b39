"""Weights of the same network in PyTorch's names and layout, and back.

Layouts: a convolution's `weight` [O, I, h, w] is Flax's `kernel` [h, w, I, O], a Linear's [O, I] is
[I, O]; a normalisation's `weight` is its `scale`, its running mean and variance are the `mean` and
`var` of `batch_stats`. (In training PyTorch records the unbiased variance of a batch and Flax the
biased one, n - 1 and n; nothing is to be converted for that.) Names: each family's
`state_dict_name`.
"""

import functools
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from know_jax.errors import UserError
from know_jax.io.formats import open_weights
from know_jax.models.common import BATCH_NORM_EPSILON, Classifier
from know_jax.trees import is_floating

_LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}
_KERAS_LEAVES = {
  'kernel': 'kernel',
  'scale': 'gamma',
  'mean': 'moving_mean',
  'var': 'moving_variance',
}
_KERAS_EPSILON = 1e-3
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


class Start(NamedTuple):
  """Variables that were read from a file, and an account of it."""

  variables: dict[str, Any]  # As of `module.init`, NumPy arrays.
  taken: list[str]  # The names of the file's tensors that are in them.
  skipped: list[str]  # Those that are not: of a head for other classes, say.
  fresh: list[str]  # The paths of the leaves that are as they were given.


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


def start_from(module: Classifier, path: str | os.PathLike, fresh: Mapping[str, Any]) -> Start:
  """Weights to start from, out of a file of any format that is read here.

  Args:
    module: a PVTv2 takes files with timm's names, and Keras' .h5 with those of
      keras_cv_attention_models; a DeepLabV3+ takes those with torchvision's names, and those of a
      MobileNetV2 of torchvision, timm or Keras; all take checkpoints of this project. Keras pads
      strided convolutions below and to the right, this network all around: results differ a
      little until it is trained. Its larger epsilon goes into the running variances.
    path: the file or folder.
    fresh: variables of the module; the head, and of a DeepLabV3+ what is above the backbone, stay
      so where the file has no such tensors, or of another shape.

  Raises:
    UserError: the file cannot be read, its tensors do not fit the module, or it has more of the
      network's layers than the module.
  """
  tensors = _read(path)
  leaves = dict(traverse_util.flatten_dict(fresh, sep='/'))
  style, names = max(
    ((style, _names_in(module, leaves, style)) for style in module.pretrained_styles),
    key=lambda entry: sum(name in tensors for name in entry[1].values()),
  )
  start = Start({}, [], [], [])
  for path_, name in names.items():
    leaf, upper = leaves[path_], module.is_above_backbone(_layer_of(path_))
    if name not in tensors and upper:
      start.fresh.append(path_)
    elif name not in tensors:
      some = ', '.join(repr(other) for other in sorted(tensors)[:3])
      raise UserError(
        f'{path}: tensor {name!r} is missing; expected it for leaf {path_!r} of '
        f'{_summary(module)}. It has {some} ...'
      )
    else:
      value = _from_style(style, np.asarray(tensors[name]), path_, leaf)
      if not is_floating(value):
        raise UserError(
          f'{path}: tensor {name!r} has dtype {value.dtype}; expected floating-point numbers.'
        )
      if value.shape == leaf.shape:
        leaves[path_] = np.ascontiguousarray(value, leaf.dtype)
        start.taken.append(name)
      elif upper:
        start.fresh.append(path_)
      else:
        raise UserError(
          f'{path}: tensor {name!r} has shape {value.shape} in the layout of {path_!r}; expected '
          f'{leaf.shape}, as in {_summary(module)}.'
        )
  start.skipped.extend(sorted(set(tensors) - set(start.taken)))
  for name in start.skipped:
    if name not in names.values() and not re.match(module.skippable, name):
      raise UserError(
        f'{path}: tensor {name!r} belongs to no layer of {_summary(module)}; expected weights of '
        'the same network.'
      )
  return start._replace(variables=traverse_util.unflatten_dict(leaves, sep='/'))


def _layer_of(path: str) -> str:
  return path.partition('/')[2].rpartition('/')[0]


def _names_in(module: Classifier, leaves: Mapping[str, Any], style: str) -> dict[str, str]:
  """Path of every variable -> what the tensor is called in a file, '/' between components."""
  result = {}
  for path in leaves:
    layer, leaf = _layer_of(path), path.rpartition('/')[2]
    if style == 'know_jax':
      result[path] = path
    elif style.startswith('keras'):
      norm = f'{path.rpartition("/")[0].replace("batch_stats", "params", 1)}/scale' in leaves
      names = {**_KERAS_LEAVES, 'bias': 'beta' if norm else 'bias'}
      result[path] = f'{module.pretrained_name(style, layer)}/{names[leaf]}'
    else:
      name = f'{module.pretrained_name(style, layer)}.{_LEAVES[leaf]}'
      result[path] = name.replace('.', '/')
  return result


def _from_style(style: str, value: np.ndarray, path: str, leaf: Any) -> np.ndarray:
  """A tensor in the layout of a leaf."""
  if style == 'know_jax':
    return value
  if not style.startswith('keras'):
    return np.transpose(value, _to_flax(value.ndim))
  if value.ndim == 4 and value.shape[3] == 1 == leaf.shape[2]:
    return np.transpose(value, (0, 1, 3, 2))  # Depthwise.
  if path.endswith('/var'):
    return value + np.float32(_KERAS_EPSILON - BATCH_NORM_EPSILON)
  return value


def _read(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """All tensors of a file by their paths; Keras' by layer and variable."""
  weights = open_weights(path)
  tensors = {}
  with tempfile.TemporaryDirectory() as folder:
    for name, leaf in weights.leaves.items():
      if name.endswith(_COUNTER) or leaf.dtype.kind == 'V':
        continue
      if weights.format == 'keras':
        layer, _, variable = name.rpartition('/')
        name = f'{layer.rpartition("/")[2]}/{variable.removesuffix(":0")}'
        name = name.replace('/depthwise_kernel', '/kernel')
      with leaf.open(Path(folder)) as reader:
        tensors[name] = reader.read(0, leaf.size).reshape(leaf.shape)
  return tensors


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
