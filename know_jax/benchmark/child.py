"""Memory and compilation, measured in a process that has done nothing else.

Reads a list of tasks from stdin, as `measure` takes them, and writes a list of results to stdout.
"""

import gc
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from know_jax.benchmark import rivals
from know_jax.benchmark.histories import History, num_predicted, of_network, of_size
from know_jax.benchmark.settings import Target
from know_jax.errors import PredictionWarning
from know_jax.nowcast import api
from know_jax.predictors.parameters import load_known
from know_jax.system.machine import give_back_memory

_LEAST, _MOST = 2, 25

_compiled: list[float] = []


def measure(task: dict[str, Any]) -> dict[str, Any]:
  """Measures how a predictor does, for the first time in this process.

  Args:
    task: `predictor`, the name of one of ours or 'plain vmap' for the module over whole leaves;
      `steps`; either `weights`, the size of a made-up network, or `targets`, fields of the
      `Target` that is predicted and of one that comes after it; `seconds`, how long it is
      repeated, twice at least.

  Returns:
    `weights`, `inputs` and `outputs` (bytes). For `start`, a small program of another kind that is
    compiled before all, for the first network, `first`, and the other, if there is one, `other`:
    `seconds`, `programs` compiled, `compile_seconds` of XLA, `extra` bytes of memory at the peak,
    beyond inputs and outputs. For the first network also `later_seconds` and `later_extra`, lists
    over repetitions.
  """
  warnings.simplefilter('ignore', PredictionWarning)
  targets = [Target(**{**fields, 'image': tuple(fields['image'])}) for fields in task['targets']]
  history = of_network(targets[0]) if targets else of_size(task['weights'])
  call = _call(task['predictor'], task['steps'])
  start = _watched(_start_xla, history)
  first = _watched(call, history)
  times: list[float] = []
  extras: list[int] = []
  began = time.perf_counter()
  while len(times) < _LEAST or (
    len(times) < _MOST and time.perf_counter() - began < task['seconds']
  ):
    again = _watched(call, history)
    times.append(again['seconds'])
    extras.append(again['extra'])
  found = {
    'weights': num_predicted(history)[0],
    'inputs': sum(leaf.nbytes for leaf in jax.tree.leaves(history)),
    'outputs': first.pop('outputs'),
    'start': start,
    'first': first,
    'later_seconds': times,
    'later_extra': extras,
  }
  if len(targets) > 1:
    found['other'] = _watched(call, of_network(targets[1]))
  return found


def _call(predictor: str, steps: int) -> Callable[[History], Any]:
  if predictor in api.PREDICTORS:
    return lambda history: api.predict(history, steps, predictor=predictor)
  return rivals.plain_vmap(load_known(), None)


def _start_xla(_: History) -> jax.Array:
  """Compiles and runs something: XLA's compiler itself comes into memory."""

  def multiply(_: int, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ x)

  return jax.jit(lambda x: jax.lax.fori_loop(0, 2, multiply, x))(jnp.zeros((64, 64)))


def _watched(call: Callable[[History], Any], history: History) -> dict[str, Any]:
  gc.collect()
  # Taken again, freed memory would not be seen.
  give_back_memory()
  compiled = len(_compiled)
  # The kernel begins to count the peak anew.
  Path('/proc/self/clear_refs').write_text('5')
  before = status('VmRSS')
  began = time.perf_counter()
  found = jax.block_until_ready(call(history))
  seconds = time.perf_counter() - began
  peak = status('VmHWM')
  outputs = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(found))
  return {
    'seconds': seconds,
    'programs': len(_compiled) - compiled,
    'compile_seconds': sum(_compiled[compiled:]),
    'extra': peak - before - outputs,
    'outputs': outputs,
  }


def status(field: str, process: int | str = 'self') -> int:
  """A number of bytes from what Linux says of a process.

  Raises:
    OSError: there is no such process, or it has ended.
  """
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
  json.dump([measure(task) for task in json.load(sys.stdin)], sys.stdout)
