"""Stretches of leaves' weights, and what is seen of them while they are predicted."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from know_jax import trees
from know_jax.errors import UserError
from know_jax.nowcast import health as health_
from know_jax.predictors.base import Leaf

STRETCH = 1 << 19
"""Weights of a leaf in files that are held at a time; a multiple of `chunks.ROW`."""

_FEW = 1 << 10
"""Weights that are compared before all are."""


@dataclasses.dataclass(frozen=True)
class Piece:
  """A stretch of one leaf's weights."""

  leaf: Leaf  # Its path and kind.
  stages: Sequence[np.ndarray]  # All stages `[N]`, oldest first, in their own dtype.
  out: np.ndarray  # `[len(steps), N]`, to be filled, in the dtype that is written.
  # Of the leaf, where this is all of it; None where any stretch will do.
  shape: tuple[int, ...] | None = None

  @property
  def size(self) -> int:
    """N."""
    return self.stages[-1].size

  @property
  def width(self) -> np.dtype:
    """The dtype to compute in."""
    return np.dtype(trees.wide(self.stages[-1].dtype))


@dataclasses.dataclass
class Facts:
  """What is seen of leaves while they are predicted: maxima; those of its pieces make a leaf's."""

  movement: np.ndarray  # From the newest stage, `[leaves, steps]`.
  residual: np.ndarray  # Up to each step, `[leaves, steps]`.
  still: np.ndarray  # Whether all stages are equal, `[leaves]`.
  finite: np.ndarray  # Whether no stage has NaN or infinity, `[leaves]`.
  scale: np.ndarray  # Of the newest stage, `[leaves]`.
  outside: np.ndarray  # How many times it is what the parameters saw, `[leaves]`.

  @classmethod
  def none(cls, leaves: int, steps: int, still: bool = True) -> 'Facts':
    """Those of no weights of so many leaves."""
    movement, residual = np.zeros((2, leaves, steps))
    scale, outside = np.zeros((2, leaves))
    return cls(movement, residual, np.full(leaves, still), np.ones(leaves, bool), scale, outside)

  def add(self, other: 'Facts', leaves: Any = slice(None)) -> None:
    """Takes in what was seen of other weights of these leaves, each named once."""
    for name in ('movement', 'residual', 'scale', 'outside'):
      mine = getattr(self, name)
      mine[leaves] = np.maximum(mine[leaves], getattr(other, name))
    self.still[leaves] &= other.still
    self.finite[leaves] &= other.finite

  def see_still(self, stages: Sequence[np.ndarray], starts: np.ndarray) -> None:
    """Takes in which leaves, each from its start on, are equal at all stages `[N]`."""
    newest = stages[-1]
    for stage in reversed(stages[:-1]):
      if not self.still.any():
        break
      # bfloat16 is slow to compare, and the first few weights nearly always tell.
      if len(starts) == 1 and not np.array_equal(stage[:_FEW], newest[:_FEW]):
        self.still[:] = False
      else:
        self.still &= np.logical_and.reduceat(stage == newest, starts)

  def see_finite(self, stages: Sequence[np.ndarray], starts: np.ndarray) -> None:
    """Takes in which leaves have no NaN or infinity in these stages `[N]`."""
    for i in range(0, len(stages), 2):
      if not sums_finite(*stages[i : i + 2]):
        for stage in stages[i : i + 2]:
          self.finite &= np.logical_and.reduceat(np.isfinite(stage), starts)

  def health(self, largest: Callable[[int], float]) -> np.ndarray:
    """The health `[leaves, steps, FIELDS]`; `largest(i)` reads a leaf's largest weight of all."""
    # Older stages are read only where they make a difference.
    limits = health_.MAX_MOVEMENT * np.maximum(self.scale, health_.FLOOR)
    far = ~(self.movement <= limits[:, None]).all(1) & ~self.still
    scale = self.scale.copy()
    for i in np.flatnonzero(far).tolist():
      scale[i] = max(scale[i], largest(i))
    rows = [self.movement, self.residual]
    rows += [np.broadcast_to(of[:, None], self.movement.shape) for of in (scale, self.outside)]
    return np.where(self.still[:, None, None], 0.0, np.stack(rows, -1))


def largest(pieces: Iterable[Piece]) -> float:
  """The largest weight at any stage."""
  result = 0.0
  for piece in pieces:
    for stage in piece.stages:
      for start in range(0, stage.size, STRETCH):
        result = max(result, largest_of(stage[start : start + STRETCH].astype(piece.width)))
  return result


def largest_of(values: np.ndarray) -> float:
  """The largest magnitude; NaN where there is one."""
  return float(largest_by(values, _WHOLE)[0])


_WHOLE = np.zeros(1, np.intp)


def largest_by(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
  """The largest magnitude of each stretch of `[N]`, from each start to the next; NaN for NaN."""
  return np.maximum(np.maximum.reduceat(values, starts), -np.minimum.reduceat(values, starts))


def cast(newest: np.ndarray, dtype: np.dtype, path: str) -> np.ndarray:
  """The newest weights of a leaf, which are kept, in another dtype.

  Raises:
    UserError: it cannot hold them.
  """
  with np.errstate(over='ignore'):
    result = newest.astype(dtype, copy=False)
  if result is not newest and (lost := np.isfinite(newest) & ~np.isfinite(result)).any():
    raise UserError(
      f'leaf {path!r} keeps its newest weights, and {dtype} cannot hold one of them, '
      f'{newest[lost][0]}; take another --dtype.'
    )
  return result


def sums_finite(*arrays: np.ndarray) -> bool:
  """Whether the sum of products of two `[N]`, or of one's squares, is finite: then all are."""
  wide = [x if x.dtype.itemsize >= 4 else x.astype(np.float32) for x in arrays]
  with np.errstate(over='ignore', invalid='ignore'):
    return math.isfinite(np.dot(wide[0], wide[-1]))
