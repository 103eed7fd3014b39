"""Task arithmetic: what the newest stages moved by is added once more."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from know_jax.predictors.base import Elementwise, Linear


@dataclasses.dataclass(frozen=True)
class TaskVector(Linear):
  """Theta^0 + lam tau_n, or with `variant='two_point'` Theta^0 + lam n tau_1.

  Attributes:
    lam: the strength.
    variant: which movement is added.

  References:
    Ilharco et al., "Editing models with task arithmetic", ICLR 2023, as the paper uses it.
  """

  lam: float = 1.0
  variant: Literal['tau_n', 'two_point'] = 'tau_n'

  def stages(self, steps: int, params: Any) -> int:
    return 2 if self.variant == 'two_point' else steps + 1

  def coefficients(
    self, stages: int, moments: Any, params: Any, rate: float, steps: tuple[int, ...]
  ) -> np.ndarray:
    result = np.zeros((len(steps), stages))
    for row, n in zip(result, steps, strict=True):
      if self.variant == 'two_point':
        row[-2] = -self.lam * n
      else:
        row[-1 - n] = -self.lam
    return result


class _LooksBack(Elementwise):
  def stages(self, steps: int, params: Any) -> int:
    return steps + 1

  def predict(
    self, history: jax.Array, params: Any, rate: float, steps: tuple[int, ...]
  ) -> jax.Array:
    return history[-1] + jnp.stack([self._movement(history, n) for n in steps])

  def _movement(self, history: jax.Array, steps: int) -> jax.Array:
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class MagMax(_LooksBack):
  """Theta^0 + for each coordinate the entry of largest magnitude among tau_1..tau_n.

  A tie goes to the larger i.

  References:
    Marczak et al., "MagMax", ECCV 2024.
  """

  def _movement(self, history: jax.Array, steps: int) -> jax.Array:
    chosen = history[-1] - history[-2]
    for i in range(2, steps + 1):
      tau = history[-1] - history[-1 - i]
      chosen = jnp.where(jnp.abs(tau) >= jnp.abs(chosen), tau, chosen)
    return chosen


@dataclasses.dataclass(frozen=True)
class ConsensusTA(_LooksBack):
  """Theta^0 + c tau_n, c = [at least 2 of the n masks]; the whole tau_n where n < 3.

  With delta_i = Theta^(i-1) - Theta^i: m_i = |delta_i| > 0.4 |sum_j delta_j - delta_i|, i and j in
  1..n, and the sum is tau_n.

  References:
    Wang et al., "Localizing task information for improved model merging and compression", ICML
    2024.
  """

  def _movement(self, history: jax.Array, steps: int) -> jax.Array:
    total = history[-1] - history[-1 - steps]
    if steps < 3:
      return total
    deltas = [history[-i] - history[-i - 1] for i in range(1, steps + 1)]
    votes = sum((jnp.abs(d) > 0.4 * jnp.abs(total - d)).astype(jnp.int32) for d in deltas)
    return jnp.where(votes >= 2, total, 0)


PREDICTORS = {'task_vector': TaskVector, 'magmax': MagMax, 'consensus_ta': ConsensusTA}
