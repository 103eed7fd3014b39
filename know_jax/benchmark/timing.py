"""Interleaved repetitions, medians with quartiles, ratios of what ran side by side, and goals."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from know_jax.system.progress import progress

Times = dict[str, list[float]]
"""Contestant -> seconds of every repetition."""


def spread(values: Sequence[float]) -> dict[str, float]:
  """Median and quartiles: `{'median': ..., 'low': ..., 'high': ...}`."""
  low, median, high = np.quantile(np.asarray(values, np.float64), [0.25, 0.5, 0.75])
  return {'median': float(median), 'low': float(low), 'high': float(high)}


def race(
  contestants: Mapping[str, Callable[[], Any]], repetitions: int, what: str, *, show: bool = True
) -> Times:
  """Times functions in turn, so that what slows the machine for a while slows all of them.

  Each is called once before, to compile; each round then begins with another one. JAX arrays in
  what they give are waited for. Gives name -> seconds, one a round.
  """
  names = list(contestants)
  times: Times = {name: [] for name in names}
  with progress(len(names) * (repetitions + 1), what, 'run', show=show) as bar:
    for turn in range(-1, repetitions):
      first = turn % len(names)
      for name in names[first:] + names[:first]:
        seconds = timed(contestants[name])[1]
        if turn >= 0:
          times[name].append(seconds)
        bar.update()
  return times


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
  """What a function gives, once it is there, and the seconds that it took."""
  began = time.perf_counter()
  result = jax.block_until_ready(function())
  return result, time.perf_counter() - began


def rates(times: Times, amount: float) -> dict[str, dict[str, float]]:
  """Contestant -> spread of `amount` a second."""
  return {name: spread([amount / s for s in seconds]) for name, seconds in times.items()}


def speedups(times: Times, of: str) -> dict[str, dict[str, float]]:
  """How many times as fast `of` is as each other: spreads of the ratios within each round."""
  return {
    name: spread([s / ours for s, ours in zip(seconds, times[of], strict=True)])
    for name, seconds in times.items()
    if name != of
  }


def goal(
  what: str, found: float | None, *, least: float | None = None, most: float | None = None
) -> dict[str, Any]:
  """A number that is asked for: `what`, `expected`, `found` (None: unmeasured), and `met`."""
  expected = f'at most {most:g}' if least is None else f'at least {least:g}'
  met = None
  if found is not None:
    met = (least is None or found >= least) and (most is None or found <= most)
  return {'what': what, 'expected': expected, 'found': found, 'met': met}
