"""Histories to predict from: random walks in the shapes of real networks, or of any size."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from know_jax.benchmark.settings import STAGES, Target
from know_jax.kinds import KEEP, leaf_kinds
from know_jax.models import Classifier, build_model
from know_jax.trees import named_leaves

History = list[Any]
"""Pytrees of weights, oldest first."""

_SCALE, _MOVE = 0.05, 0.005


def build(target: Target, **options: Any) -> Classifier:
  """The module of a target, for ten classes."""
  return build_model(target.model, num_classes=10, **{**target.options, **options})


def of_network(target: Target) -> History:
  """A history of a network's parameters, float32 NumPy arrays."""
  init = functools.partial(build(target).init, train=False)
  return _random(jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, *target.image)))['params'])


def of_size(weights: int, dtype: Any = np.float32) -> History:
  """A history of exactly so many weights, 100 or more: a convolution, a third, and a Dense."""
  channels = math.isqrt(weights // 27)
  rest = weights - 9 * channels**2 - channels
  rows = math.isqrt(rest)
  columns = (rest - 1) // rows
  shapes = {
    'conv': {'kernel': (3, 3, channels, channels), 'bias': (channels,)},
    'dense': {'kernel': (rows, columns), 'bias': (rest - rows * columns,)},
  }
  return _of_shapes(shapes, dtype)


def of_kernels(count: int, rows: int, columns: int, dtype: Any = np.float32) -> History:
  """A history of so many dense kernels of this shape."""
  return _of_shapes({f'dense{i}': {'kernel': (rows, columns)} for i in range(count)}, dtype)


def _of_shapes(shapes: dict[str, dict[str, tuple[int, ...]]], dtype: Any) -> History:
  is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
  return _random(jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), shapes, is_leaf=is_shape))


def _random(structs: Any) -> History:
  """Gaussian weights that took a Gaussian step from each stage to the next."""
  rng = np.random.default_rng(0)
  stages: History = []
  for stage in range(STAGES):
    scale = _MOVE if stage else _SCALE
    moved = jax.tree.map(lambda s, scale=scale: _gaussian(rng, s, scale), structs)
    stages.append(jax.tree.map(np.add, stages[-1], moved) if stage else moved)
  return stages


def _gaussian(rng: np.random.Generator, struct: jax.ShapeDtypeStruct, scale: float) -> np.ndarray:
  drawn = rng.standard_normal(struct.shape, np.float32)
  drawn *= scale
  return drawn.astype(struct.dtype, copy=False)


def by_kind(history: History) -> dict[str, dict[str, list[Any]]]:
  """Kind -> path -> the stages of a leaf, oldest first; leaves that are kept are left out."""
  kinds = leaf_kinds(history[-1])
  named = [named_leaves(stage) for stage in history]
  result: dict[str, dict[str, list[Any]]] = {}
  for path, kind in kinds.items():
    if kind != KEEP:
      result.setdefault(kind, {})[path] = [stage[path] for stage in named]
  return result


def num_predicted(history: History) -> tuple[int, int]:
  """How many weights and how many leaves of a history are predicted."""
  leaves = [stages[-1] for group in by_kind(history).values() for stages in group.values()]
  return sum(leaf.size for leaf in leaves), len(leaves)
