"""Memory, cost and compilation by size, from processes of their own; see `child.py`."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from know_jax.benchmark.predicting import PLAIN
from know_jax.benchmark.settings import Settings
from know_jax.benchmark.timing import spread
from know_jax.system.progress import progress

PREDICTORS = ('known', 'known_leaf')


def memory(settings: Settings, *, show: bool = True) -> list[dict[str, Any]]:
  """Peak memory beyond inputs and outputs, and cost, by number of weights.

  Returns:
    For every predictor, size and steps: the task, what `child.measure` gives, and the spread of
    `seconds_a_weight` and of `extra` over calls after the first.
  """
  tasks = [
    {'predictor': predictor, 'weights': size, 'steps': steps, 'targets': []}
    for predictor in PREDICTORS
    for steps in settings.steps
    for size in settings.sizes
  ]
  tasks += [
    {'predictor': PLAIN, 'weights': size, 'steps': 1, 'targets': []}
    for size in settings.sizes_plain
  ]
  found = _measure(tasks, settings, 'memory', show)
  for entry in found:
    entry['seconds_a_weight'] = spread([s / entry['weights'] for s in entry['later_seconds']])
    entry['extra'] = spread(entry['later_extra'])
  return found


def compilation(settings: Settings, *, show: bool = True) -> list[dict[str, Any]]:
  """How long the first prediction takes beyond a later one, and what another network compiles.

  Returns:
    For every predictor: the task, what `child.measure` gives, and `compile_seconds`, the time of
    the first call minus the median of the later ones.
  """
  targets = [dataclasses.asdict(target) for target in settings.compiled]
  tasks = [{'predictor': predictor, 'steps': 1, 'targets': targets} for predictor in PREDICTORS]
  found = _measure(tasks, settings, 'compile', show)
  for entry in found:
    later = spread(entry['later_seconds'])['median']
    entry['compile_seconds'] = entry['first']['seconds'] - later
  return found


def growth(entries: Sequence[dict[str, Any]]) -> dict[str, float]:
  """The power of the number of weights that cost grows with: 1 is linear.

  Args:
    entries: of `memory`.

  Returns:
    `'<predictor>, <steps>'` -> the slope of log cost over log size, by least squares, over the
    sizes from their median on: below, the call itself costs more than the work.
  """
  found = {}
  for predictor, steps in dict.fromkeys((e['predictor'], e['steps']) for e in entries):
    mine = [e for e in entries if (e['predictor'], e['steps']) == (predictor, steps)]
    least = np.median([e['weights'] for e in mine])
    points = [
      (e['weights'], e['weights'] * e['seconds_a_weight']['median'])
      for e in mine
      if e['weights'] >= least
    ]
    if len(points) > 1:
      sizes, seconds = np.log(points).T
      found[f'{predictor}, {steps}'] = float(np.polyfit(sizes, seconds, 1)[0])
  return found


def _measure(
  tasks: Sequence[dict[str, Any]], settings: Settings, what: str, show: bool
) -> list[dict[str, Any]]:
  """Each task with its result, from a process of its own or, in short, all from one."""
  full = [{**task, 'seconds': settings.size_seconds} for task in tasks]
  groups = [[task] for task in full] if settings.fresh else [full]
  found = []
  with progress(len(full), what, 'network', show=show) as bar:
    for group in groups:
      results = _in_child(group)
      found += [{**task, **result} for task, result in zip(group, results, strict=True)]
      bar.update(len(group))
  return found


def environment() -> dict[str, str]:
  """Variables for processes on the host, which take nothing from programs compiled before."""
  root = str(Path(__file__).parents[2])
  return {
    **os.environ,
    'PYTHONPATH': os.pathsep.join(filter(None, [root, os.environ.get('PYTHONPATH', '')])),
    'JAX_PLATFORMS': 'cpu',
    'JAX_ENABLE_COMPILATION_CACHE': 'false',
  }


def _in_child(tasks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  command = [sys.executable, '-m', 'know_jax.benchmark.child']
  done = subprocess.run(
    command, env=environment(), input=json.dumps(tasks), text=True, stdout=-1, check=True
  )
  return json.loads(done.stdout)
