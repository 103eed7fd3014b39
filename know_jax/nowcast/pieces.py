"""Stretches of leaves' weights, and what is seen of them while they are predicted."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from know_jax import trees
from know_jax.nowcast import health as health_
from know_jax.predictors.base import Leaf

STRETCH = 1 << 20
"""Weights of a leaf in files that are held at a time; a multiple of `chunks.ROW`."""


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
  """What is seen of weights while they are predicted: maxima; those of its pieces make a leaf's."""

  movement: np.ndarray  # From the newest stage, at each step.
  residual: np.ndarray  # Up to each step.
  still: bool = True  # Whether all stages are equal.
  scale: float = 0.0  # Of the newest stage.
  outside: float = 0.0  # How many times it is what the parameters saw.

  @classmethod
  def none(cls, steps: int) -> 'Facts':
    """Those of no weights."""
    return cls(np.zeros(steps), np.zeros(steps))

  def add(self, other: 'Facts') -> None:
    """Takes in what was seen of other weights of the same leaf."""
    self.movement = np.maximum(self.movement, other.movement)
    self.residual = np.maximum(self.residual, other.residual)
    self.still = self.still and other.still
    self.scale = max(self.scale, other.scale)
    self.outside = max(self.outside, other.outside)

  def health(self, largest: Callable[[], float]) -> np.ndarray:
    """The health of the leaf `[steps, FIELDS]`; `largest()` reads its largest weight of all."""
    if self.still:
      return np.zeros((len(self.movement), health_.FIELDS))
    scale = self.scale
    # Older stages are read only where they make a difference.
    if not (self.movement <= health_.MAX_MOVEMENT * max(scale, health_.FLOOR)).all():
      scale = max(scale, largest())
    rows = [self.movement, self.residual]
    rows += [np.full_like(self.movement, value) for value in (scale, self.outside)]
    return np.stack(rows, -1)


def largest(pieces: Iterable[Piece]) -> float:
  """The largest weight at any stage."""
  found = 0.0
  for piece in pieces:
    for stage in piece.stages:
      for start in range(0, stage.size, STRETCH):
        found = max(found, largest_of(stage[start : start + STRETCH].astype(piece.width)))
  return found


def largest_of(values: np.ndarray) -> float:
  """The largest magnitude; NaN where there is one."""
  return float(np.maximum(values.max(), -values.min()))
