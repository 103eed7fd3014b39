"""What the others must beat: no prediction, shrinking, averaging, least squares, no history."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from know_jax.errors import UserError
from know_jax.kinds import KINDS
from know_jax.predictors.base import (
  Elementwise,
  Leaf,
  Linear,
  Predictor,
  WholeLeaf,
  by_kind,
  check_number,
)
from know_jax.predictors.parameters import least_squares_coefficients


@dataclasses.dataclass(frozen=True)
class Persistence(Linear):
  """Theta^0: naive transfer."""

  def coefficients(
    self, stages: int, moments: Any, params: Any, rate: float, steps: tuple[int, ...]
  ) -> np.ndarray:
    return np.zeros((len(steps), stages))


_SHRINK = (('conv', 0.19), ('fc', 0.06), ('bias', 0.0))


@dataclasses.dataclass(frozen=True)
class Shrink(Linear):
  """Theta^0 (1 - c)^n, with c by kind: the rival to beat.

  Attributes:
    c: a number, or a mapping kind -> number. The default is what the authors' three networks do on
      average, and most of what they do.
  """

  c: float | Mapping[str, float] | tuple[tuple[str, float], ...] = _SHRINK
  keeps_unmoved = False

  def __post_init__(self):
    object.__setattr__(self, 'c', by_kind('shrink option c', dict(_SHRINK), self.c))

  def params(self, kind: str, theta: Any) -> float:
    return dict(self.c)[kind]  # type: ignore[arg-type]

  def coefficients(
    self, stages: int, moments: Any, params: Any, rate: float, steps: tuple[int, ...]
  ) -> np.ndarray:
    assert stages == 1
    return np.array([[(1.0 - params) ** n - 1.0] for n in steps])


@dataclasses.dataclass(frozen=True)
class Average(Linear):
  """The mean of the n + 1 newest weights: a step the other way."""

  def stages(self, steps: int, params: Any) -> int:
    return steps + 1

  def coefficients(
    self, stages: int, moments: Any, params: Any, rate: float, steps: tuple[int, ...]
  ) -> np.ndarray:
    result = np.zeros((len(steps), stages))
    for row, n in zip(result, steps, strict=True):
      row[-1 - n : -1] = 1.0 / (n + 1)
    return result


@dataclasses.dataclass(frozen=True, init=False)
class LeastSquares(Linear):
  """Theta^0 + sum_k a_k d_k + b Theta^0, sliding over its own predictions: the best linear KNOWN.

  d_0 .. d_(S-2) are the differences of the S newest stages, oldest first.

  Args:
    coefficients: kind -> (a_0, .., a_(S-2), b); None: those that minimise the squared error on the
      meta-dataset.
  """

  rows: tuple[tuple[str, tuple[float, ...]], ...]

  def __init__(self, coefficients: Mapping[str, Sequence[float]] | None = None):
    value = least_squares_coefficients() if coefficients is None else coefficients
    object.__setattr__(self, 'rows', _checked_rows(value))

  def stages(self, steps: int, params: Any) -> int:
    return len(params)

  def params(self, kind: str, theta: Any) -> tuple[float, ...]:
    return dict(self.rows)[kind]

  def coefficients(
    self, stages: int, moments: Any, params: Any, rate: float, steps: tuple[int, ...]
  ) -> np.ndarray:
    step, identity = np.array(params), np.eye(stages)
    # The slid window's v = (d_1, ..., step, theta^0 + step) in terms of the present one's.
    slid = np.concatenate([identity[1:-1], step[None], identity[-1:] + step[None]])
    now, moved, path = identity, np.zeros(stages), []
    for _ in range(max(steps)):
      moved, now = moved + step @ now, slid @ now
      path.append(moved)
    result = np.stack([path[n - 1] for n in steps])
    # From the differences between neighbours to those from the newest stage.
    older = np.concatenate([np.zeros_like(result[:, :1]), result[:, :-2]], axis=1) - result[:, :-1]
    return np.concatenate([older, result[:, -1:]], axis=1)


def _checked_rows(value: Any) -> tuple[tuple[str, tuple[float, ...]], ...]:
  try:
    given = {kind: tuple(float(number) for number in row) for kind, row in dict(value).items()}
  except (TypeError, ValueError) as error:
    raise UserError(
      f'least_squares option coefficients is {value!r}; expected a mapping kind -> numbers.'
    ) from error
  lengths = {len(row) for row in given.values()}
  if set(given) != set(KINDS) or len(lengths) != 1 or lengths & {0, 1}:
    raise UserError(
      f'least_squares option coefficients has { ({k: len(v) for k, v in given.items()}) } numbers; '
      f'expected S of them, the same S of at least 2, for each of {", ".join(KINDS)}.'
    )
  for kind, row in given.items():
    for number in row:
      check_number(f'least_squares option coefficients[{kind!r}]', number)
  return tuple((kind, given[kind]) for kind in KINDS)


def history_free(predictor: Predictor) -> Predictor:
  """Any predictor on copies of the newest stage: what it does without a history.

  Args:
    predictor: one of any capability, which the result has too.
  """
  for capability, wrapper in _WRAPPERS.items():
    if isinstance(predictor, capability):
      return wrapper(predictor)
  raise UserError(f'history_free takes a predictor; found {predictor!r}.')


class _Copies(Predictor):
  """What the wrappers share. Copies are like no history in any range, and meant to be."""

  inner: Any

  def _count(self, params: Any, steps: int) -> int:
    return self.inner.stages(steps, params)

  @property
  def keeps_unmoved(self) -> bool:  # type: ignore[override]
    return self.inner.keeps_unmoved

  @property
  def takes_theta(self) -> bool:  # type: ignore[override]
    return self.inner.takes_theta

  @property
  def saturates(self) -> bool:  # type: ignore[override]
    return self.inner.saturates

  @property
  def needs_moments(self) -> bool:  # type: ignore[override]
    return self.inner.needs_moments

  def for_theta(self, theta: Any) -> Predictor:
    return history_free(self.inner.for_theta(theta))

  def _moments(self, moments: Any, params: Any, steps: int) -> Any:
    """Those of copies, which have no differences: the mean square of the newest is all."""
    count = self._count(params, steps)
    return jnp.zeros((count, count), moments.dtype).at[-1, -1].set(moments[-1, -1])

  @property
  def theta_name(self) -> str:
    return self.inner.theta_name

  def default_theta(self) -> Mapping[str, Any] | None:
    return self.inner.default_theta()

  def check_theta(self, theta: Any, kinds: set[str]) -> None:
    self.inner.check_theta(theta, kinds)

  def accepts(self, network: str) -> bool:
    return self.inner.accepts(network)

  def params(self, kind: str, theta: Any) -> Any:
    return self.inner.params(kind, theta)


@dataclasses.dataclass(frozen=True)
class _LinearCopies(_Copies, Linear):
  inner: Linear

  def coefficients(
    self, stages: int, moments: Any, params: Any, rate: float, steps: tuple[int, ...]
  ) -> Any:
    count = self._count(params, max(steps))
    if moments is not None:
      moments = self._moments(moments, params, max(steps))
    return self.inner.coefficients(count, moments, params, rate, steps)[:, -1:]


@dataclasses.dataclass(frozen=True)
class _ElementwiseCopies(_Copies, Elementwise):
  inner: Elementwise

  def of_leaf(self, moments: jax.Array, params: Any) -> jax.Array:
    return self.inner.of_leaf(self._moments(moments, params, 1), params)

  def prepare(self, params: Any) -> Any:
    # `predict` gets no parameters as they were given, and must know how many stages they read.
    return self.inner.prepare(params), params

  def predict(
    self, history: jax.Array, params: Any, rate: float, steps: tuple[int, ...], *of_leaf: jax.Array
  ) -> jax.Array:
    prepared, given = params
    count = self._count(given, max(steps))
    copies = jnp.broadcast_to(history[-1], (count, *history.shape[1:]))
    return self.inner.predict(copies, prepared, rate, steps, *of_leaf)


@dataclasses.dataclass(frozen=True)
class _WholeCopies(_Copies, WholeLeaf):
  inner: WholeLeaf

  def is_whole(self, leaf: Leaf, shape: tuple[int, ...]) -> bool:
    return self.inner.is_whole(leaf, shape)

  def predict(
    self, history: Sequence[jax.Array], leaf: Leaf, params: Any, rate: float, steps: int
  ) -> jax.Array:
    copies = [history[-1]] * self._count(params, steps)
    return self.inner.predict(copies, leaf, params, rate, steps)


_WRAPPERS = {Linear: _LinearCopies, Elementwise: _ElementwiseCopies, WholeLeaf: _WholeCopies}


PREDICTORS = {
  'persistence': Persistence,
  'shrink': Shrink,
  'average': Average,
  'least_squares': LeastSquares,
}
