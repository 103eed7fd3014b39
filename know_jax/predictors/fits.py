"""Fits to each weight's history, read where the predicted stage lies."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from know_jax.predictors.base import Elementwise, Linear


def _ages(stages: int) -> np.ndarray:
  """I of Theta^i, oldest first."""
  return np.arange(stages - 1, -1, -1, dtype=np.float64)


def _line(x: np.ndarray, at: float) -> np.ndarray:
  """The least-squares line through (x, values), read at `at`, is these shares of the values."""
  centred = x - x.mean()
  return 1.0 / len(x) + (at - x.mean()) * centred / (centred**2).sum()


class _Fit(Linear):
  reads_all = True

  def stages(self, steps: int, params: Any) -> int:
    del steps, params
    return 2

  def _x(self, age: np.ndarray, rate: float) -> np.ndarray:
    """Where a stage of this age lies; the predicted one has the age -n."""
    raise NotImplementedError

  def coefficients(
    self, stages: int, moments: Any, params: Any, rate: float, steps: tuple[int, ...]
  ) -> np.ndarray:
    del moments, params
    x = self._x(_ages(stages), rate)
    result = np.stack([_line(x, float(self._x(np.array(-float(n)), rate))) for n in steps])
    result[:, -1] = 0.0  # The shares sum to 1.
    return result


@dataclasses.dataclass(frozen=True)
class LinearFit(_Fit):
  """Least squares of a + b x over the history, read at step n.

  Attributes:
    regressor: 'size': x = r^i, the share of the data, read at r^-n; 'index': x = -i, read at n.
  """

  regressor: Literal['size', 'index'] = 'size'

  def _x(self, age: np.ndarray, rate: float) -> np.ndarray:
    return rate**age if self.regressor == 'size' else -age


@dataclasses.dataclass(frozen=True)
class LogFit(_Fit):
  """Least squares of a + b log x with x = r^i, the share of the data, read at x = r^-n."""

  def _x(self, age: np.ndarray, rate: float) -> np.ndarray:
    return age * math.log(rate)


@dataclasses.dataclass(frozen=True)
class ExpFit(Elementwise):
  """sign(Theta^0) exp(least squares of log max(|theta|, 1e-12) on the index), read at step n."""

  reads_all = True

  def stages(self, steps: int, params: Any) -> int:
    del steps, params
    return 2

  def predict(
    self, history: jax.Array, params: Any, rate: float, steps: tuple[int, ...]
  ) -> jax.Array:
    del params, rate
    newest = history[-1]
    logs = jnp.log(jnp.maximum(jnp.abs(history), 1e-12))
    result = []
    for n in steps:
      shares = _line(-_ages(len(history)), n)
      moved = sum(float(c) * (log - logs[-1]) for c, log in zip(shares[:-1], logs, strict=False))
      result.append(jnp.sign(newest) * jnp.exp(logs[-1] + moved))
    return jnp.stack(result)


PREDICTORS = {'linear_fit': LinearFit, 'log_fit': LogFit, 'exp_fit': ExpFit}
