"""Memory, cost by size and compilation, measured in processes that have done nothing else.

Such a process (`python -m know_jax.benchmark.memory`) reads a list of tasks from stdin, as
`measure_task` takes them, and writes a list of results to stdout.
"""

import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from know_jax.benchmark.histories import History, num_predicted, of_network, of_size
from know_jax.benchmark.settings import Settings, Target
from know_jax.benchmark.timing import goal, spread
from know_jax.errors import PredictionWarning
from know_jax.nowcast import api
from know_jax.system.machine import give_back_memory
from know_jax.system.progress import progress

MIB = 2**20
PREDICTORS = ('known', 'known_leaf', 'task_vector')
_LEAST, _MOST = 2, 25  # Repetitions.
_LARGE = 10**6

_compiled: list[float] = []


def measure(settings: Settings, *, show: bool = True) -> dict[str, Any]:
  """Peak memory beyond inputs and outputs, and cost, by number of weights."""
  entries = _measure(
    [
      {'predictor': predictor, 'weights': size, 'steps': steps, 'dtype': dtype, 'targets': []}
      for predictor in PREDICTORS
      for dtype, all_steps, sizes in settings.series
      for steps in all_steps
      for size in sizes
    ],
    settings, 'memory', show,
  )  # fmt: skip
  for entry in entries:
    entry['seconds_a_weight'] = spread([s / entry['weights'] for s in entry['later_seconds']])
    entry['extra'] = spread(entry['later_extra'])
  what = 'memory beyond inputs and outputs, MiB'
  first = max(entry['first']['extra'] for entry in entries)
  later = max(max(entry['later_extra']) for entry in entries)
  powers = growth(entries)
  return {
    'note': 'In processes of their own, on the host: resident memory at the peak of a call, less '
    'that before it and less its outputs. The first call compiles; later ones do not. Before it '
    'a product in a loop was compiled, so that XLA itself is not counted. Memory that the process '
    'had freed goes back to the system before each. From a million weights on, cost grows with '
    'this power of their number: '
    + ', '.join(f'{power:.2f} ({name})' for name, power in powers.items())
    + '.',
    'entries': entries,
    'growth': powers,
    'tables': {'': [
      {
        'predictor': e['predictor'], 'dtype': e['dtype'], 'weights': e['weights'],
        'steps': e['steps'],
        'inputs, MiB': e['inputs'] / MIB, 'outputs, MiB': e['outputs'] / MIB,
        'extra, first call, MiB': e['first']['extra'] / MIB,
        'extra later, MiB': spread([extra / MIB for extra in e['later_extra']]),
        'seconds a weight': e['seconds_a_weight'],
      }
      for e in entries
    ]},
    'goals': [
      goal(what, later / MIB, most=128),
      goal(f'{what}, in a first call, its compilation included', first / MIB, most=128),
      *(
        goal(f'power of the size that cost grows with, `{name}`', power, most=1.05)
        for name, power in powers.items()
      ),
    ],
  }  # fmt: skip


def compilation(settings: Settings, *, show: bool = True) -> dict[str, Any]:
  """How long the first prediction takes beyond a later one, and what another network compiles."""
  targets = [dataclasses.asdict(target) for target in settings.compiled]
  tasks = [{'predictor': predictor, 'steps': 1, 'targets': targets} for predictor in PREDICTORS[:2]]
  entries = _measure(tasks, settings, 'compile', show)
  for entry in entries:
    later = spread(entry['later_seconds'])['median']
    entry['compile_seconds'] = entry['first']['seconds'] - later
  what = 'programs that another network compiles'
  return {
    'note': 'In processes of their own, nothing compiled before: the first prediction of a '
    'network, minus the median of later ones, and the programs that XLA compiled in it. Then '
    'another network of other leaf shapes.',
    'entries': entries,
    'tables': {'': [
      {
        '': e['predictor'], 'first call, s': e['first']['seconds'],
        'compilation, s': e['compile_seconds'], 'programs': e['first']['programs'],
        'programs of the other network': e['other']['programs'],
      }
      for e in entries
    ]},
    'goals': [
      goal(f'{what}, `{e["predictor"]}`', e['other']['programs'], most=0) for e in entries
    ],
  }  # fmt: skip


def growth(entries: Sequence[dict[str, Any]]) -> dict[str, float]:
  """The power of the size that cost grows with, by `series`: 1 is linear.

  The slope of log cost over log size, by least squares, over sizes from `_LARGE` on, or over all
  where fewer than two are so large: below, the call itself costs more than the work.
  """
  result = {}
  for name in dict.fromkeys(map(series, entries)):
    mine = [e for e in entries if series(e) == name]
    large = [e for e in mine if e['weights'] >= _LARGE]
    large = large if len(large) > 1 else mine
    sizes = np.array([e['weights'] for e in large])
    seconds = sizes * [e['seconds_a_weight']['median'] for e in large]
    result[name] = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
  return result


def series(entry: dict[str, Any]) -> str:
  """What an entry has in common with those of other sizes."""
  steps = entry['steps']
  return f'{entry["predictor"]}, {entry["dtype"]}, {steps} step{"s" if steps > 1 else ""}'


def _measure(
  tasks: Sequence[dict[str, Any]], settings: Settings, what: str, show: bool
) -> list[dict[str, Any]]:
  """Each task with its result, from a process of its own or, in short, all from one."""
  full = [{**task, 'seconds': settings.size_seconds} for task in tasks]
  groups = [[task] for task in full] if settings.fresh else [full]
  found = []
  with progress(len(full), what, 'network', show=show) as bar:
    for group in groups:
      done = subprocess.run(
        [sys.executable, '-m', 'know_jax.benchmark.memory'], env=environment(),
        input=json.dumps(group), text=True, stdout=subprocess.PIPE, check=True,
      )  # fmt: skip
      results = json.loads(done.stdout)
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


# --- in a process of its own ----------------------------------------------------------------------


def measure_task(task: dict[str, Any]) -> dict[str, Any]:
  """Measures how a predictor does, for the first time in this process.

  Args:
    task: `predictor`; `steps`; either `weights` and `dtype` of a made-up network, or `targets`,
      fields of the `Target` that is predicted and of one that comes after it; `seconds`, how long
      it is repeated, twice at least.

  Returns:
    `weights`, `inputs` and `outputs` (bytes). For `start`, a small program of another kind that is
    compiled before all, for the first network, `first`, and the other, if there is one, `other`:
    `seconds`, `programs` compiled, and `extra` bytes of memory at the peak, beyond inputs and
    outputs. For the first network also `later_seconds` and `later_extra`, lists over repetitions.
  """
  warnings.simplefilter('ignore', PredictionWarning)
  targets = [Target(**{**fields, 'image': tuple(fields['image'])}) for fields in task['targets']]
  if targets:
    history = of_network(targets[0])
  else:
    history = of_size(task['weights'], dtype=jnp.dtype(task['dtype']))

  def call(history: History) -> Any:
    return api.predict(history, task['steps'], predictor=task['predictor'])

  start, first = watched(_start_xla, history), watched(call, history)
  later: list[dict[str, Any]] = []
  began = time.perf_counter()
  while len(later) < _LEAST or (
    len(later) < _MOST and time.perf_counter() - began < task['seconds']
  ):
    later.append(watched(call, history))
  result = {
    'weights': num_predicted(history)[0],
    'inputs': sum(leaf.nbytes for leaf in jax.tree.leaves(history)),
    'outputs': first.pop('outputs'),
    'start': start,
    'first': first,
    'later_seconds': [entry['seconds'] for entry in later],
    'later_extra': [entry['extra'] for entry in later],
  }
  if len(targets) > 1:
    result['other'] = watched(call, of_network(targets[1]))
  return result


def _start_xla(_: History) -> jax.Array:
  """Compiles and runs something: XLA's compiler itself comes into memory."""

  def multiply(_: int, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ x)

  return jax.jit(lambda x: jax.lax.fori_loop(0, 2, multiply, x))(jnp.zeros((64, 64)))


def watched(call: Callable[[History], Any], history: History) -> dict[str, Any]:
  """`seconds` of a call, `programs` compiled in it, bytes of `outputs` and `extra` at the peak."""
  gc.collect()
  # Taken again, freed memory would not be seen.
  give_back_memory()
  compiled = len(_compiled)
  # The kernel begins to count the peak anew.
  Path('/proc/self/clear_refs').write_text('5')
  before = status('VmRSS')
  began = time.perf_counter()
  result = jax.block_until_ready(call(history))
  seconds, peak = time.perf_counter() - began, status('VmHWM')
  outputs = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(result))
  return {
    'seconds': seconds,
    'programs': len(_compiled) - compiled,
    'extra': peak - before - outputs,
    'outputs': outputs,
  }


def status(field: str, process: int | str = 'self') -> int:
  """A number of bytes from what Linux says of a process; OSError where there is none."""
  path = Path(f'/proc/{process}/status')
  for line in path.read_text().splitlines():
    if line.startswith(f'{field}:'):
      return 1024 * int(line.split()[1])
  raise OSError(f'{path} has no {field}')


def _listen(event: str, duration_secs: float, **_: Any) -> None:
  if event.endswith('/backend_compile_duration'):
    _compiled.append(duration_secs)


if __name__ == '__main__':
  jax.monitoring.register_event_duration_secs_listener(_listen)
  json.dump([measure_task(task) for task in json.load(sys.stdin)], sys.stdout)
