"""What can be wrong with the prediction of a leaf, how it is found, and what is done about it.

Every leaf has four numbers at every step, its health:

  movement   the largest change of a weight from the newest stage
  residual   the largest change in one step of the paper's KNOWN, whose tanh ends at 1; else 0
  scale      the leaf's largest weight at any stage of its history
  outside    how many times it is as far from the meta-dataset as the farthest that is believed:
             see `OutsideWarning`; 0 where that is not known

A prediction is bad if it holds NaN or infinity, if a weight moves farther than `MAX_MOVEMENT` times
the scale, or if a residual is saturated: the exponentials in KNOWN overflow on large weights.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from know_jax.errors import PredictionWarning, UserError, unknown_name

ON_BAD = ('keep', 'raise', 'ignore')
"""What becomes of a bad leaf: it keeps its newest weights, it is an error, or nothing is checked.
"""

MAX_MOVEMENT = 10.0
"""How far a weight may move from the newest stage, in units of its leaf's largest weight."""

FLOOR = 0.01
"""The least scale: leaves that are still zero, as fresh biases are, may move by ten times this."""

SATURATION = 0.999
"""From here on a residual of KNOWN says nothing but that it is large."""

FIELDS = 4
"""How many numbers the health of a leaf has."""

_SHOWN = 5  # Leaves named in one message.


class OutsideWarning(PredictionWarning):
  """Leaves unlike any that KNOWN was trained on.

  For KNOWN conditioned on the leaf: something in the leaf's context (`known_leaf.context`, which
  includes the sampling rate) is more than four standard deviations of the meta-dataset from its
  mean; beyond three it is cut off.
  """


def check_on_bad(on_bad: str) -> str:
  """Checks a choice of what becomes of bad leaves.

  Raises:
    UserError: it is not in `ON_BAD`.
  """
  if on_bad not in ON_BAD:
    raise unknown_name('choice of on_bad', on_bad, ON_BAD)
  return on_bad


def is_bad(health: Any) -> Any:
  """Whether predictions are bad: health `[..., FIELDS]` -> bool `[...]`, NumPy or JAX."""
  movement, residual, scale = health[..., 0], health[..., 1], health[..., 2]
  maximum = np.maximum if isinstance(health, np.ndarray) else jnp.maximum
  limit = MAX_MOVEMENT * maximum(scale, FLOOR)
  # Written so that NaN is bad.
  return ~((movement <= limit) & (movement < math.inf) & (residual <= SATURATION))


def report(
  health: Any,
  *,
  predictor: str,
  leaves: Sequence[tuple[str, str]],
  steps: Sequence[int],
  on_bad: str,
  stacklevel: int = 2,
) -> None:
  """Says what is wrong with predictions, if anything is.

  Args:
    health: `[leaves, steps, FIELDS]`.
    predictor: its name.
    leaves: path and kind of every leaf.
    steps: the steps that were predicted.
    on_bad: 'keep' or 'raise'.
    stacklevel: as that of `warnings.warn`, seen from the caller.

  Raises:
    UserError: a prediction is bad and `on_bad` is 'raise'.
  """
  health = np.asarray(health, np.float64)
  bad = is_bad(health)
  names = [f'{path!r} ({kind})' for path, kind in leaves]
  if bad.any():
    # The first bad step of a leaf says what went wrong.
    told = [
      f'{names[leaf]} at step {steps[first := int(bad[leaf].argmax())]}: {_fault(*result[first])}'
      for leaf, result in enumerate(health)
      if bad[leaf].any()
    ]
    text = f'{predictor}: {len(told)} of {len(leaves)} leaves have a bad prediction'
    if on_bad == 'raise':
      raise UserError(f'{text}: {_listed(told)}.')
    text += f', and keep their newest weights: {_listed(told)}.'
    warnings.warn(text, PredictionWarning, stacklevel=stacklevel + 1)
  # Of a bad leaf enough has been said.
  outside = np.where(bad.any(1), 0.0, health[:, :, 3].max(1, initial=0.0))
  if (outside > 1).any():
    farthest = sorted(np.flatnonzero(outside > 1), key=lambda leaf: -outside[leaf])
    told = [f'{names[leaf]}, {outside[leaf]:.1f} times the limit' for leaf in farthest]
    warnings.warn(
      f'{predictor}: {len(told)} of {len(leaves)} leaves lie outside the meta-dataset that it was '
      f'trained on, so that their predictions are worth less: {_listed(told)}.',
      OutsideWarning,
      stacklevel=stacklevel + 1,
    )


def _fault(movement: float, residual: float, scale: float, _: float) -> str:
  if not math.isfinite(movement):
    return 'it holds NaN or infinity'
  if not residual <= SATURATION:
    return f'a residual is saturated, at {residual:.4g}; at most {SATURATION} is believed'
  return (
    f'a weight would move by {movement:.4g}; at most {MAX_MOVEMENT:g} times the largest weight of '
    f'the leaf, {scale:.4g}, is believed'
  )


def _listed(told: Sequence[str]) -> str:
  more = len(told) - _SHOWN
  return '; '.join(told[:_SHOWN]) + (f'; and {more} more' if more > 0 else '')


def report_traced(health: jax.Array, **about: Any) -> None:
  """`report` from within a transformation, each time the numbers are there.

  Under `jit` an error of 'raise' ends the computation as a `JaxRuntimeError` that holds its text.
  """

  def tell(health: Any) -> None:
    report(health, **about)

  jax.debug.callback(tell, health)
