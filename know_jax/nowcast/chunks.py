"""Predictions on the host, a chunk of weights at a time: of arrays in memory, and of files.

No shape of a leaf is ever compiled for, but by predictors of whole leaves. Linear predictors are
arithmetic of NumPy on chunks that stay in the cache. Elementwise ones are compiled once for a row
of `ROW` weights, which leaves fill one after the other, whatever their borders. Each processor
works on chunks of its own.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from know_jax.nowcast import health as health_
from know_jax.nowcast import linear
from know_jax.nowcast.compiled import leaf_coefficients, predict_blocks, tell_leaves
from know_jax.nowcast.compiled import predict_leaves as predict_whole
from know_jax.nowcast.job import Job
from know_jax.nowcast.linear import Parts, Seen
from know_jax.nowcast.pieces import Facts, Piece, largest, largest_by
from know_jax.predictors.base import Elementwise, WholeLeaf
from know_jax.system.machine import give_back_memory, processors

_T = TypeVar('_T')

ROW = 1 << 17
"""Weights that a thread takes at a time, at most."""

ROW_BLOCK = 2048
"""Weights of a row that are predicted at a time where each processor has a cache of its own."""

LEAST_ROW = 8192
"""Weights for which it does not pay to have another thread."""


# --- leaves in memory -----------------------------------------------------------------------------


def predict_leaves(
  leaves: list[Any], theta: Any, job: Job, steps: tuple[int, ...]
) -> tuple[list[np.ndarray] | None, np.ndarray | None]:
  """What `compiled.predict_leaves` computes, by NumPy and by rows.

  No predictions where a leaf has NaN or infinity, which is seen on the way.
  """
  views = [
    [np.asarray(stage) for stage in (leaf if isinstance(leaf, tuple) else np.asarray(leaf))]
    for leaf in leaves
  ]
  result = _room([((len(steps), *view[-1].shape), view[-1].dtype) for view in views])
  pieces = [
    Piece(info, [stage.reshape(-1) for stage in view], out.reshape(len(steps), -1), view[-1].shape)
    for view, info, out in zip(views, job.leaves, result, strict=True)
  ]
  facts = predict(pieces, theta, job, steps)
  if not facts.finite.all():
    return None, None
  kept = np.broadcast_to(facts.still[:, None], facts.movement.shape)
  health = None
  if job.is_watched and leaves:
    health = facts.health(lambda i: largest([pieces[i]])).astype(np.float32)
    kept = kept | health_.is_bad(health)
  for i in np.flatnonzero(kept.any(1)):
    pieces[i].out[kept[i]] = pieces[i].stages[-1]
  return result, health


def _room(arrays: Sequence[tuple[tuple[int, ...], Any]]) -> list[np.ndarray]:
  """Arrays of these shapes and dtypes, small ones in the same memory one after the other."""
  result, room = [], np.empty(0, np.uint8)
  for shape, dtype in arrays:
    size = math.prod(shape) * dtype.itemsize
    taken = -(-size // _ALIGNED) * _ALIGNED
    if taken > room.size:
      room = _aligned(max(taken, _SHARED if taken <= _SHARED // 16 else 0))
    result.append(room[:size].view(dtype).reshape(shape))
    room = room[taken:]
  return result


_ALIGNED, _SHARED = 64, 1 << 20
"""XLA takes an array of NumPy's as it is where it begins at a 64th byte."""


def _aligned(size: int) -> np.ndarray:
  raw = np.empty(size + _ALIGNED, np.uint8)
  start = -raw.ctypes.data % _ALIGNED
  return raw[start : start + size]


# --- pieces ---------------------------------------------------------------------------------------


def predict(
  pieces: Sequence[Piece],
  theta: Any,
  job: Job,
  steps: tuple[int, ...],
  of_leaves: tuple[np.ndarray, ...] | None = None,
  room: linear.Room | None = None,
) -> Facts:
  """Fills the pieces with predictions.

  Args:
    pieces: stretches of leaves, each of another.
    theta: kind -> parameters.
    job: the prediction.
    steps: the steps that are asked for, ascending.
    of_leaves: what follows from the moments of the pieces' leaves, where those are known of all
      of them, as `from_moments` gives it.
    room: of this thread, which then works alone; None for one thread on each processor.

  Returns:
    What was seen of each piece.
  """
  facts = Facts.none(len(pieces), len(steps))
  groups: dict[tuple[str, np.dtype, np.dtype], list[int]] = {}
  for i, piece in enumerate(pieces):
    key = piece.leaf.kind, piece.stages[-1].dtype, piece.out.dtype
    groups.setdefault(key, []).append(i)
  for (kind, _, _), members in groups.items():
    group = [pieces[i] for i in members]
    width = group[0].width
    params, count = job.window(kind, theta, len(group[0].stages), steps)
    still = job.keeps_still(len(group[0].stages))
    threads = 1 if room else threads_for(width)
    sizes = [piece.size for piece in group]
    given: tuple[np.ndarray, ...] | None = None
    is_checked = False
    if of_leaves is not None:
      given = tuple(of[members] for of in of_leaves)
    elif job.predictor.needs_moments:
      sums = moment_sums(group, count, room)
      # Sums of squares of all stages' differences and of the newest: then all stages are.
      is_checked = count == len(group[0].stages) and bool(np.isfinite(sums).all())
      given = from_moments(sums, sizes, kind, width, theta, job, steps)
    seen: Iterable[list[Seen]]
    if isinstance(job.predictor, WholeLeaf):
      seen = (_whole(i, piece, theta, job, steps) for i, piece in enumerate(group))
    elif isinstance(job.predictor, Elementwise):
      parts = list(_rows(sizes, threads))
      told = None if given is None else given[0].astype(width, copy=False)
      seen = _elementwise(group, params, count, width, job, steps, parts, threads, told)
    else:
      rows, far = given or (np.asarray(job.coefficients(params, count, steps), np.float64), 0.0)
      facts.outside[members] = far
      combine = functools.partial(
        linear.combined, group, rows, width, job.is_watched, is_checked, still
      )
      calls = linear.shared_out(linear.cut(sizes, linear.CHUNK), threads)
      seen = in_threads(combine, calls, threads, lambda: (room or linear.Room(),))
    places = np.array(members)
    for indices, of_parts in itertools.chain.from_iterable(seen):
      facts.add(of_parts, places[indices])
    facts.still[members] &= still & (np.array(sizes) > 0)
  return facts


def from_moments(
  sums: np.ndarray,
  sizes: Sequence[int],
  kind: str,
  width: np.dtype,
  theta: Any,
  job: Job,
  steps: tuple[int, ...],
) -> tuple[np.ndarray, ...]:
  """What a predictor makes of leaves' moments.

  Args:
    sums: their moments summed over their weights, `[L, S, S]`, as `moment_sums` gives them.
    sizes: how many weights they have.
    kind: theirs.
    width: the dtype to compute in.
    theta: kind -> parameters.
    job: the prediction.
    steps: the steps that are asked for, ascending.

  Returns:
    Of a linear one the coefficients, `[L, len(steps), S]`, and how far outside of what it saw each
    leaf is, `[L]`; of an elementwise one what the weights are told, `[L, F]`.
  """
  params, count = job.window(kind, theta, sums.shape[-1], steps)
  moments = (sums / np.maximum(sizes, 1)[:, None, None]).astype(width)
  result = []
  # Always of one size: compiled once, whatever networks come.
  for start in range(0, len(moments), _LEAVES):
    part = moments[start : start + _LEAVES]
    filled = np.zeros((_LEAVES, count, count), width)
    filled[: len(part)] = part
    if isinstance(job.predictor, Elementwise):
      result.append([np.asarray(tell_leaves(job.predictor, params, filled))[: len(part)]])
      continue
    rows, outside = leaf_coefficients(job.predictor, params, filled, job.rate, steps)
    result.append([np.asarray(rows, np.float64)[: len(part)], np.asarray(outside)[: len(part)]])
  return tuple(np.concatenate(parts) for parts in zip(*result, strict=True))


_LEAVES = 128
"""Leaves whose moments are made use of at a time."""


def moment_sums(group: Sequence[Piece], count: int, room: linear.Room | None = None) -> np.ndarray:
  """The second moments of pieces, summed over their weights: `[L, count, count]`, in float64.

  `room`: as in `predict`.
  """
  threads = 1 if room else threads_for(group[0].width)
  total = np.zeros((len(group), count, count))
  cuts = linear.cut([piece.size for piece in group], linear.CHUNK, linear.MOMENTS)
  calls = linear.shared_out(cuts, threads)
  sum_up = functools.partial(linear.moments, group, count)
  for result in in_threads(sum_up, calls, threads, lambda: (room or linear.Room(),)):
    for i, of_part in result:
      total[i] += of_part
  return total


# --- elementwise ----------------------------------------------------------------------------------


def _elementwise(
  group: Sequence[Piece],
  params: Any,
  count: int,
  width: np.dtype,
  job: Job,
  steps: tuple[int, ...],
  parts: Sequence[Parts],
  threads: int,
  told: np.ndarray | None,
) -> Iterator[list[Seen]]:
  """Predicts pieces of one kind in rows, by several threads; they are told `[pieces, F]`."""
  count_told = None if told is None else told.shape[1]
  saturates = job.predictor.saturates and job.is_watched
  # Residuals are the changes from step to step.
  taken = tuple(range(1, max(steps) + 1)) if saturates else steps
  asked = [taken.index(n) for n in steps]
  program = functools.partial(_row_program(), job.predictor, taken, job.rate)

  def run_row(row: np.ndarray, of_leaf: np.ndarray | None, of_row: Parts) -> list[Seen]:
    indices = [i for _, i, _, _ in of_row]
    starts = np.array([place for place, _, _, _ in of_row])
    end = starts[-1] + of_row[-1][3] - of_row[-1][2]
    facts = Facts.none(len(of_row), len(steps), job.keeps_still(len(group[0].stages)))
    stages = [
      [group[i].stages[t][start:stop] for _, i, start, stop in of_row]
      for t in range(len(group[0].stages))
    ]
    for t, parts in enumerate(stages[-count:]):
      np.concatenate(parts, out=row[t, :end], casting='unsafe')
    values = row[:, :end]
    before = [np.concatenate(parts, dtype=width, casting='unsafe') for parts in stages[:-count]]
    if of_leaf is not None and told is not None:
      lengths = [stop - start for _, _, start, stop in of_row]
      of_leaf[:, :end] = np.repeat(told[indices].T, lengths, axis=1)
    predicted = jax.device_get(program(row, np.int32(end), params, of_leaf))[:, :end]
    newest = values[-1]
    with np.errstate(over='ignore', invalid='ignore'):
      for place, i, start, stop in of_row:
        group[i].out[:, start:stop] = predicted[asked, place : place + stop - start]
      facts.see_finite([*before, *values], starts)
      facts.see_still([*before, *values], starts)
      if job.is_watched:
        facts.scale = largest_by(newest, starts)
        for step, k in enumerate(asked):
          stored = predicted[k].astype(group[0].out.dtype).astype(width)
          facts.movement[:, step] = largest_by(stored - newest, starts)
      if saturates:
        facts.residual = _residuals(newest, predicted, starts)[:, asked]
    return [(indices, facts)]

  if parts:
    _compile_row(count, count_told, width, params, job, taken)
  new_rows = functools.partial(_new_rows, count, count_told, width)
  return in_threads(run_row, [(of_row,) for of_row in parts], threads, new_rows)


def _whole(i: int, piece: Piece, theta: Any, job: Job, steps: tuple[int, ...]) -> list[Seen]:
  """A leaf as a whole, by the program that is compiled for its shape."""
  leaf = job.predictor.alike(piece.leaf)
  plain = dataclasses.replace(job, leaves=(leaf,), shardings=(None,), on_bad='ignore')
  shape = -1 if piece.shape is None else piece.shape
  stages = tuple(stage.reshape(shape) for stage in piece.stages)
  (result,), _ = jax.device_get(predict_whole([stages], theta, plain, steps))
  facts = Facts.none(1, len(steps), job.keeps_still(len(piece.stages)))
  starts = np.zeros(1, np.intp)
  with np.errstate(over='ignore', invalid='ignore'):
    piece.out[:] = result.reshape(piece.out.shape)
    if piece.size:
      facts.see_finite(piece.stages, starts)
      facts.see_still(piece.stages, starts)
      newest = piece.stages[-1].astype(piece.width)
      if job.is_watched:
        facts.scale = largest_by(newest, starts)
        moves = [largest_by(values.astype(piece.width) - newest, starts) for values in piece.out]
        facts.movement = np.stack(moves, -1)
  return [([i], facts)]


def _residuals(newest: np.ndarray, predicted: np.ndarray, starts: np.ndarray) -> np.ndarray:
  """The largest residual up to each step, `[leaves, steps]`, of weights `[N]` and `[steps, N]`."""
  result = [largest_by(b - a, starts) for a, b in itertools.pairwise((newest, *predicted))]
  return np.maximum.accumulate(np.stack(result, -1), axis=1)


def _new_rows(count: int, told: int | None, dtype: Any) -> tuple[np.ndarray, np.ndarray | None]:
  """Room for so many stages of a row of weights, and for what the weights are told."""

  def row(length: int) -> np.ndarray:
    result = _aligned(length * ROW * np.dtype(dtype).itemsize).view(dtype).reshape(length, ROW)
    result.fill(0)
    return result

  return row(count), None if told is None else row(told)


_compiled: set[tuple[Any, ...]] = set()
"""What `_compile_row` was called for in this process."""

_compiling = threading.Lock()


def _compile_row(
  count: int, told: int | None, dtype: Any, params: Any, job: Job, steps: tuple[int, ...]
) -> None:
  """Compiles `_row_program`, where it is not, before threads take rows: once, though several ask.

  The memory of both would be taken at a time otherwise, and the process would keep what compiling
  freed.
  """
  static = (job.predictor, steps, job.rate)
  program = (ROW, count, told, np.dtype(dtype), jax.tree.structure(params), *static)
  with _compiling:
    if program in _compiled:
      return
    row, of_leaf = _new_rows(count, told, dtype)
    jax.block_until_ready(_row_program()(*static, row, np.int32(0), params, of_leaf))
    give_back_memory()
    _compiled.add(program)


@functools.cache
def _row_program() -> Callable[..., Any]:
  """`_predict_row`, compiled for the processors of this machine."""
  # LLVM takes vectors of 256 bits even where there are longer ones, which halve the time of exp.
  cpu = jax.default_backend() == 'cpu'
  options = {'xla_cpu_prefer_vector_width': 512} if cpu else None
  return jax.jit(_predict_row, static_argnums=(0, 1, 2), compiler_options=options)


def _predict_row(
  predictor: Elementwise,
  steps: tuple[int, ...],
  rate: float,
  row: Any,
  count: Any,
  params: Any,
  of_leaf: Any,
) -> jax.Array:
  """Predictions `[len(steps), N]` of a row `[S, N]`; only its first `count` weights matter.

  What comes after them may be any number that a weight can be. `of_leaf` is None or `[F, N]`.
  """
  return predict_blocks(predictor, params, row, steps, rate, ROW_BLOCK, count, of_leaf)[0]


# --- threads --------------------------------------------------------------------------------------


def threads_for(width: np.dtype) -> int:
  """How many threads may work on leaves that are computed in this dtype."""
  # What JAX is told for one thread alone, as by `jax.enable_x64`, others do not know.
  return processors() if width == np.float32 else 1


def in_threads(
  function: Callable[..., _T],
  calls: Iterable[tuple[Any, ...]],
  threads: int,
  room: Callable[[], tuple[Any, ...]] = tuple,
  ahead: int | None = None,
) -> Iterator[_T]:
  """What a function gives for each tuple of arguments, in their order, from so many threads.

  Args:
    function: called with what a thread has for itself, and the arguments.
    calls: the arguments.
    threads: how many.
    room: makes what a thread has for itself. It is taken once and not by every call, for threads
      keep most of the memory that they once had.
    ahead: how many calls are taken beyond those that are worked on; None: all.
  """
  if ahead is None:
    calls = list(calls)
    threads, ahead = min(len(calls), threads), len(calls)
  spare: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
  for _ in range(threads):
    spare.put(room())

  def call(arguments: tuple[Any, ...]) -> _T:
    own = spare.get()
    try:
      return function(*own, *arguments)
    finally:
      spare.put(own)

  if threads < 2:
    yield from map(call, calls)
    return
  waiting: collections.deque[concurrent.futures.Future[_T]] = collections.deque()
  pool = concurrent.futures.ThreadPoolExecutor(threads)
  try:
    for arguments in calls:
      waiting.append(pool.submit(call, arguments))
      if len(waiting) >= threads + ahead:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  finally:
    # After an error or Ctrl-C nothing new is begun.
    pool.shutdown(cancel_futures=True)


def _rows(sizes: Sequence[int], threads: int) -> Iterator[Parts]:
  """Cuts leaves laid end to end into rows: for each part its place, leaf, start and stop.

  Args:
    sizes: of the leaves.
    threads: how many rows are worked on at a time; there are as many rows for each thread, unless
      rows become short.
  """
  total = sum(sizes)
  rows = max(1, min(-(-total // LEAST_ROW), threads * -(-total // (threads * ROW))))
  width = min(ROW, -(-total // (rows * ROW_BLOCK)) * ROW_BLOCK)
  place, parts = 0, []
  for i, size in enumerate(sizes):
    start = 0
    while start < size:
      stop = min(size, start + width - place)
      parts.append((place, i, start, stop))
      place, start = place + stop - start, stop
      if place == width:
        yield parts
        place, parts = 0, []
  if parts:
    yield parts
