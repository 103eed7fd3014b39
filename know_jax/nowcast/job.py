"""What both engines are told of a prediction."""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding

from know_jax.predictors.base import Leaf, check_shape

T = TypeVar('T')


def grouped(sizes: Iterable[tuple[T, int]], most: int) -> list[list[T]]:
  """Items and their sizes in groups of at most so much, in order; a larger one is alone."""
  groups: list[list[T]] = []
  total = 0
  for item, size in sizes:
    if not groups or total + size > most:
      groups.append([])
      total = 0
    groups[-1].append(item)
    total += size
  return groups


@dataclasses.dataclass(frozen=True)
class Job:
  """The static part of a prediction: with equal jobs and shapes nothing is compiled again."""

  name: str  # Of the predictor, for messages.
  predictor: Any  # An object of one of the capabilities.
  leaves: tuple[Leaf, ...]  # Path and kind of those that are predicted.
  shardings: tuple[NamedSharding | None, ...]  # Theirs, None where they lie on one device.
  rate: float  # r.
  on_bad: str  # What becomes of bad leaves, a choice of `health.ON_BAD`.

  @property
  def is_watched(self) -> bool:
    """Whether predictions are checked."""
    return self.on_bad != 'ignore'

  def window(self, kind: str, theta: Any, length: int, steps: tuple[int, ...]) -> tuple[Any, int]:
    """The parameters for a kind of leaf, and how many of the newest stages are read."""
    params = self.predictor.params(kind, theta)
    reads_all = self.predictor.reads_all
    return params, length if reads_all else self.predictor.stages(max(steps), params)

  def keeps_still(self, length: int) -> bool:
    """Whether leaves that are equal at all of so many stages are left alone."""
    return self.predictor.keeps_unmoved and length > 1

  def coefficients(self, params: Any, stages: int, steps: tuple[int, ...]) -> Any:
    """The coefficients of a linear predictor that needs no moments: `[len(steps), stages]`.

    NumPy's in float64, unless they come from parameters that are traced.
    """
    result = self.predictor.coefficients(stages, None, params, self.rate, steps)
    result = result if isinstance(result, jax.core.Tracer) else np.asarray(result, np.float64)
    return check_shape(self.predictor, 'coefficients', result, (len(steps), stages))
