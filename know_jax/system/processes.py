"""Several processes that train one network: starting them, and what one must tell the others.

Every process runs the same program. Process 0 alone writes; what it reads or finds wrong, all get
to know. In a process by itself all of this is a plain call.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from know_jax.errors import UserError
from know_jax.jsonable import plain

T = TypeVar('T')

DETECTED = 'auto'
"""The coordinator to give where a cluster tells its processes by itself who they are."""

_CONNECT_SECONDS = 120
# How long a process that has ended waits for the others, before all are ended.
_END_SECONDS = 30
_SMALLEST = 512


def start(coordinator: str, processes: int | None = None, process: int | None = None) -> None:
  """Connects this process with the others. To be called before JAX looks for its devices.

  Processors talk by gloo, GPUs and TPUs by their own means.

  Args:
    coordinator: `HOST:PORT` of process 0, or `DETECTED` under Slurm, Open MPI, Kubernetes and other
      clusters that `jax.distributed.initialize` knows.
    processes: how many there are; None where they are detected.
    process: which one this is, from 0; None where it is detected.

  Raises:
    UserError: a value does not fit, the processes do not find each other, or they differ in how
      many devices they have.
  """
  detected = coordinator == DETECTED
  if detected != (processes is None) or detected != (process is None):
    raise UserError(
      f'coordinator is {coordinator!r}, with processes {processes} and process {process}; expected '
      f'HOST:PORT with both, or {DETECTED!r} with neither.'
    )
  if processes is not None and process is not None and not 0 <= process < processes:
    raise UserError(
      f'process is {process}; expected 0 to {processes - 1}, of {processes} processes.'
    )
  host, _, port = coordinator.rpartition(':')
  if not detected and not (host and port.isdecimal()):
    raise UserError(f'coordinator is {coordinator!r}; expected HOST:PORT or {DETECTED!r}.')
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  # It would take SIGTERM away from us; `training.fit` has the processes stop at the same step.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      None if detected else coordinator,
      processes,
      process,
      initialization_timeout=_CONNECT_SECONDS,
      shutdown_timeout_seconds=_END_SECONDS,
    )
    devices, here = jax.device_count(), jax.local_device_count()
  except (ValueError, RuntimeError) as error:
    what = 'no cluster is found' if detected else f'no connection through {coordinator}'
    raise UserError(f'{what}: {error}') from error
  if devices != here * jax.process_count():
    raise UserError(
      f'process {jax.process_index()} has {here} devices of {devices}; expected as many in each of '
      f'the {jax.process_count()} processes.'
    )


def is_first() -> bool:
  """Whether this is the process that writes."""
  return jax.process_index() == 0


def in_all(make: Callable[[], T]) -> T:
  """What `make` gives, in each process its own; where it fails in one, it fails in all.

  To be called by all processes at the same place, as `from_first` and `check_same` are.

  Raises:
    UserError: `make` raised it here, or has failed in another process.
  """
  if jax.process_count() == 1:
    return make()
  result: Any = None
  failed: Exception | None = None
  try:
    result = make()
  except Exception as error:
    failed = error
  told = '' if failed is None else str(failed) or repr(failed)
  messages = _exchange(told)
  if failed is not None:
    raise failed
  for process, message in enumerate(messages):
    if message:
      raise UserError(f'process {process}: {message}')
  return result


def from_first(make: Callable[[], Any]) -> Any:
  """What `make`, called in process 0 alone, gives there: JSON data, for all.

  Raises:
    UserError: `make` raised it, or has failed in process 0.
  """
  if jax.process_count() == 1:
    return make()
  result = in_all(lambda: make() if is_first() else None)
  return json.loads(_exchange(json.dumps(result))[0])


def check_same(values: Mapping[str, Any], what: str) -> None:
  """Checks that JSON data are the same in all processes.

  Raises:
    UserError: they are not; `what` and the first key that differs are named.
  """
  if jax.process_count() == 1:
    return
  first, *others = [json.loads(text) for text in _exchange(json.dumps(plain(dict(values), what)))]
  for process, other in enumerate(others, 1):
    for name in dict.fromkeys((*first, *other)):
      if first.get(name) != other.get(name):
        raise UserError(
          f'{what}: {name} is {first.get(name)!r} in process 0 and {other.get(name)!r} in process '
          f'{process}; expected the same in all.'
        )


def _exchange(text: str) -> list[str]:
  """The texts of all processes."""
  data = text.encode()
  sizes = multihost_utils.process_allgather(np.int32(len(data)))
  # Powers of two, so that little is compiled.
  width = max(_SMALLEST, 1 << (int(sizes.max()) - 1).bit_length())
  row = np.frombuffer(data.ljust(width, b'\0'), np.uint8)
  rows = multihost_utils.process_allgather(row)
  return [row.tobytes()[:size].decode() for row, size in zip(rows, sizes, strict=True)]
