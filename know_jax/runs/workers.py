"""Independent parts of one job: in this process, or by Dask's workers, here or in a cluster.

Dask, and not Ray: it is a few MB of Python, where Ray's wheel has some 70; it runs on every system
that JAX runs on; and it gives what a worker that died was at to another one by itself.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax

from know_jax.errors import UserError

T = TypeVar('T')
R = TypeVar('R')

_CONNECT_SECONDS = 30


def each(
  make: Callable[[T], R], items: Sequence[T], *, workers: int = 1, scheduler: str | None = None
) -> Iterator[R]:
  """What `make` gives for every item: in their order in this process, else as they end.

  A worker takes one item at a time. An item whose worker died goes to another; `make` is to resume
  what it finds begun, and to guard it against a second worker.

  Args:
    make: a function that can be pickled.
    items: what it is called with.
    workers: how many processes of this machine; 1 without a scheduler: this process itself.
    scheduler: the address of a Dask scheduler, 'tcp://HOST:8786', whose workers see the same
      folders; then `workers` says nothing.

  Raises:
    UserError: Dask is not installed, the scheduler does not answer, or an item lost worker after
      worker; or what `make` raises, and then the other items are given up.
  """
  if workers < 1:
    raise UserError(f'workers is {workers}; expected at least 1.')
  if workers == 1 and scheduler is None:
    yield from map(make, items)
    return
  try:
    import dask
    from distributed import Client, LocalCluster, as_completed
    from distributed.scheduler import KilledWorker
  except ImportError as error:
    raise UserError(f"workers need Dask: pip install 'know_jax[workers]' ({error}).") from error
  with contextlib.ExitStack() as stack:
    cluster: Any = scheduler
    if scheduler is None:
      folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
      env = {'JAX_COMPILATION_CACHE_DIR': folder} if folder else {}
      # Dask would look a hundred times a second at what a worker is at, deep in JAX.
      stack.enter_context(dask.config.set({'distributed.worker.profile.enabled': False}))
      # No limit of memory: Dask would end a worker at it, again and again.
      cluster = stack.enter_context(
        LocalCluster(
          n_workers=workers,
          threads_per_worker=1,
          memory_limit=None,
          dashboard_address='127.0.0.1:0',  # Any free port; Dask's own is taken by a second study.
          env=env,
        )
      )
    try:
      client = stack.enter_context(Client(cluster, timeout=_CONNECT_SECONDS))
    except (OSError, ValueError) as error:
      raise UserError(f'scheduler {scheduler!r} does not answer: {error}') from error
    for future in as_completed(client.map(make, items, pure=False)):
      try:
        yield future.result()
      except KilledWorker as error:
        raise UserError(f'a part of the job lost worker after worker: {error}') from error
