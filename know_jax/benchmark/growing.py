"""How the cost of every predictor grows with the number of weights."""

import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from know_jax.benchmark.histories import History, num_predicted, of_kernels, of_size
from know_jax.benchmark.memory import growth, series
from know_jax.benchmark.predicting import prediction
from know_jax.benchmark.settings import STAGES, Settings
from know_jax.benchmark.timing import goal, spread, timed
from know_jax.predictors.base import WholeLeaf
from know_jax.predictors.registry import REGISTRY, resolve_all
from know_jax.system.progress import progress

DTYPE, STEPS = 'bfloat16', 1
_MOST = 9  # Repetitions.
_LONG = 10.0  # Seconds; what takes longer is not done twice: smaller sizes have compiled it.


def measure(settings: Settings, *, show: bool = True) -> dict[str, Any]:
  """Seconds of a prediction by every predictor that is registered, by the number of weights."""
  made = resolve_all(REGISTRY)
  whole = [name for name, predictor in made.items() if isinstance(predictor, WholeLeaf)]
  others = [name for name in made if name not in whole]
  side, sizes = settings.growth_side, settings.growth
  entries: list[dict[str, Any]] = []
  with progress(len(sizes) * len(made), 'growth', 'prediction', show=show) as bar:

    def add(history: History, names: Sequence[str], size: int) -> None:
      for name in names:
        entries.append({**_entry(history, name, settings.size_seconds), 'about': size})
        bar.update(1)

    for size in sizes:
      add(of_size(size, dtype=jnp.dtype(DTYPE)), others, size)
      add(of_kernels(-(-size // side**2), side, side, jnp.dtype(DTYPE)), whole, size)
  powers = growth(entries)
  return {
    'note': f'One step ahead of {STAGES} stages in {DTYPE}, in memory. The power is the slope of '
    'log cost over log size; it is below 1 where a call has costs of its own, which count most '
    'among few weights. '
    f'{" and ".join(f"`{name}`" for name in whole)} decomposes matrices, whose cost grows faster '
    f'than their size: there the number of kernels grows, of {side} x {side} weights each.',
    'entries': entries,
    'growth': powers,
    'tables': {'': _rows(entries, powers)},
    'goals': [
      goal(f'power of the size that cost grows with, every predictor: `{name}`', power, most=1.05)
      for name, power in powers.items()
    ],
  }  # fmt: skip


def _entry(history: History, name: str, seconds: float) -> dict[str, Any]:
  """Of one predictor; a first call, which may compile, is left out unless it takes long."""
  call, began = prediction(history, name), time.perf_counter()
  _, first = timed(call)
  found = [first] if first > _LONG else []
  while not found or (len(found) < _MOST and time.perf_counter() - began < seconds):
    found.append(timed(call)[1])
  weights = num_predicted(history)[0]
  return {
    'predictor': name, 'dtype': DTYPE, 'steps': STEPS, 'weights': weights,
    'seconds_a_weight': spread([s / weights for s in found]),
  }  # fmt: skip


def _rows(entries: Sequence[dict[str, Any]], powers: dict[str, float]) -> list[dict[str, Any]]:
  """A row for each predictor: nanoseconds a weight by size, and the power."""
  sizes = sorted({entry['about'] for entry in entries})
  rows = []
  for name in dict.fromkeys(entry['predictor'] for entry in entries):
    mine = {entry['about']: entry for entry in entries if entry['predictor'] == name}
    cost = {size: 1e9 * entry['seconds_a_weight']['median'] for size, entry in mine.items()}
    columns = {f'{size:,} weights, ns a weight': cost.get(size) for size in sizes}
    rows.append({'': name, **columns, 'power': powers[series(mine[sizes[0]])]})
  return rows
