"""Predictions on the host, a chunk of weights at a time: of arrays in memory, and of files.

No shape of a leaf is ever compiled for. Linear predictors are arithmetic of NumPy on chunks that
stay in the cache. Elementwise ones are compiled once for a row of `ROW` weights, which leaves fill
one after the other, whatever their borders. Each processor works on chunks of its own.
"""

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
from know_jax.nowcast.compiled import leaf_coefficients, predict_blocks
from know_jax.nowcast.compiled import predict_leaves as predict_whole
from know_jax.nowcast.job import Job
from know_jax.nowcast.pieces import Facts, Piece, largest, largest_of
from know_jax.predictors.base import Elementwise, WholeLeaf
from know_jax.system.machine import give_back_memory, processors

_T = TypeVar('_T')

ROW = 1 << 17
"""Weights that a thread takes at a time, at most."""

ROW_BLOCK = 2048
"""Weights of a row that are predicted at a time where each processor has a cache of its own."""

CHUNK = 1 << 14
"""Weights that NumPy takes at a time: with the stages' and the temporaries they fill a cache."""

LEAST_ROW = 8192
"""Weights for which it does not pay to have another thread."""

_Parts = list[tuple[int, int, int, int]]


# --- leaves in memory -----------------------------------------------------------------------------


def predict_leaves(
  leaves: list[Any], theta: Any, job: Job, steps: tuple[int, ...]
) -> tuple[list[np.ndarray], np.ndarray | None]:
  """What `compiled.predict_leaves` computes, by NumPy and by rows."""
  views = [
    [np.asarray(stage) for stage in (leaf if isinstance(leaf, tuple) else np.asarray(leaf))]
    for leaf in leaves
  ]
  result = [_empty((len(steps), *view[-1].shape), view[-1].dtype) for view in views]
  pieces = [
    Piece(info, [stage.reshape(-1) for stage in view], out.reshape(len(steps), -1))
    for view, info, out in zip(views, job.leaves, result, strict=True)
  ]
  facts = predict(pieces, theta, job, steps)
  health = np.zeros((len(leaves), len(steps), health_.FIELDS), np.float32)
  for i, (piece, of_leaf) in enumerate(zip(pieces, facts, strict=True)):
    kept = np.full(len(steps), of_leaf.still)
    if job.is_watched:
      health[i] = of_leaf.health(functools.partial(largest, [piece]))
      kept |= health_.is_bad(health[i])
    if kept.any():
      piece.out[kept] = piece.stages[-1]
  return result, health if job.is_watched and leaves else None


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """An array of NumPy's that XLA can take as it is, which wants it to begin at a 64th byte."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + size].view(dtype).reshape(shape)


# --- pieces ---------------------------------------------------------------------------------------


def predict(
  pieces: Sequence[Piece],
  theta: Any,
  job: Job,
  steps: tuple[int, ...],
  coefficients: np.ndarray | None = None,
  outside: float = 0.0,
) -> list[Facts]:
  """Fills the pieces with predictions.

  Args:
    pieces: stretches of leaves.
    theta: kind -> parameters.
    job: the prediction.
    steps: the steps that are asked for, ascending.
    coefficients: those of a linear predictor for the leaf of these pieces, `[len(steps), S]`, where
      they are known from all of it; see `leaf_coefficients_of`.
    outside: likewise how far outside it is.

  Returns:
    What was seen of each piece.
  """
  facts = [Facts.none(len(steps)) for _ in pieces]
  groups: dict[tuple[str, np.dtype], list[int]] = {}
  for i, piece in enumerate(pieces):
    groups.setdefault((piece.leaf.kind, piece.width), []).append(i)
  for (kind, width), members in groups.items():
    group = [pieces[i] for i in members]
    params, count = job.window(kind, theta, len(group[0].stages), steps)
    still = job.keeps_still(len(group[0].stages))
    threads = _threads(width)
    parts = list(_rows([piece.size for piece in group], threads))
    seen: Iterable[list[tuple[int, Facts]]]
    if isinstance(job.predictor, WholeLeaf):
      seen = (_whole(i, piece, theta, job, steps) for i, piece in enumerate(group))
    elif isinstance(job.predictor, Elementwise):
      seen = _elementwise(group, params, count, width, job, steps, parts, threads)
    else:
      rows: Any = [coefficients] * len(group)
      far: Any = [outside] * len(group)
      if coefficients is None and job.predictor.needs_moments:
        rows, far = _coefficients(group, params, count, width, job, steps, threads)
      elif coefficients is None:
        rows = [np.asarray(job.coefficients(params, count, steps), np.float64)] * len(group)
      linear = functools.partial(_linear_parts, group, rows, width, job.is_watched, still)
      seen = _in_threads(linear, [(of_row,) for of_row in parts], threads)
      for i, value in zip(members, far, strict=True):
        facts[i].outside = float(value)
    for i, of_part in itertools.chain.from_iterable(seen):
      facts[members[i]].add(of_part)
    for i in members:
      facts[i].still = facts[i].still and still and pieces[i].size > 0
  return facts


def leaf_coefficients_of(
  size: int,
  stretches: Callable[[], Iterable[Piece]],
  theta: Any,
  job: Job,
  steps: tuple[int, ...],
) -> tuple[np.ndarray | None, float]:
  """The coefficients of a leaf that is read for its moments, and how far outside it is.

  None where the predictor needs none.
  """
  if not getattr(job.predictor, 'needs_moments', False):
    return None, 0.0
  total: Any = 0.0
  for piece in stretches():
    params, count = job.window(piece.leaf.kind, theta, len(piece.stages), steps)
    for of_row in _moment_rows(piece, count, _threads(piece.width)):
      total = total + of_row
    width = piece.width
  if not size:
    return None, 0.0
  moments = (total / size).astype(width)
  rows, far = _from_moments(moments[None], params, job, steps)
  return rows[0], float(far[0])


def _coefficients(
  group: Sequence[Piece],
  params: Any,
  count: int,
  width: np.dtype,
  job: Job,
  steps: tuple[int, ...],
  threads: int,
) -> tuple[Any, Any]:
  # Compiled for few numbers of leaves: powers of two.
  moments = np.zeros((1 << (len(group) - 1).bit_length(), count, count), width)
  totals = np.zeros((len(group), count, count))
  if max(piece.size for piece in group) > ROW:
    for total, piece in zip(totals, group, strict=True):
      for of_row in _moment_rows(piece, count, threads):
        total += of_row
  else:
    batches = [group[i : i + 64] for i in range(0, len(group), 64)]
    found = _in_threads(
      lambda batch: [_moments(piece, count, 0, piece.size) for piece in batch],
      [(batch,) for batch in batches],
      threads,
    )
    totals[:] = list(itertools.chain.from_iterable(found))
  sizes = np.array([max(piece.size, 1) for piece in group])
  moments[: len(group)] = totals / sizes[:, None, None]
  return _from_moments(moments, params, job, steps, len(group))


def _from_moments(
  moments: np.ndarray, params: Any, job: Job, steps: tuple[int, ...], count: int = 1
) -> tuple[np.ndarray, np.ndarray]:
  found = leaf_coefficients(job.predictor, params, moments, job.rate, steps)
  rows, far = jax.device_get(found)
  return rows[:count].astype(np.float64), far[:count]


def _moment_rows(piece: Piece, count: int, threads: int) -> Iterator[np.ndarray]:
  size = piece.size
  calls = [(piece, count, start, min(start + ROW, size)) for start in range(0, size, ROW)]
  return _in_threads(_moments, calls, threads)


def _moments(piece: Piece, count: int, start: int, stop: int) -> np.ndarray:
  """The second moments of a stretch, summed over its weights: `[S, S]`, in float64."""
  window, width = piece.stages[-count:], piece.width
  total = np.zeros((count, count))
  # Small enough for one thread of the library that multiplies matrices.
  size = CHUNK // 2
  v, before = np.empty((count, size), width), np.empty(size, width)
  for begin in range(start, stop, size):
    end = min(begin + size, stop)
    part = v[:, : end - begin]
    newest = window[-1][begin:end]
    part[-1] = newest
    for i in range(count - 1):
      older, newer = window[i][begin:end], window[i + 1][begin:end]
      if older.dtype != width:  # Differences of half precision are not exact in it.
        before[: end - begin] = older
        older, newer = before[: end - begin], newer.astype(width)
      np.subtract(newer, older, out=part[i])
    total += part @ part.T
  return total


# --- linear ---------------------------------------------------------------------------------------


def _linear_parts(
  group: Sequence[Piece],
  rows: Sequence[np.ndarray],
  width: np.dtype,
  is_watched: bool,
  still: bool,
  parts: _Parts,
) -> list[tuple[int, Facts]]:
  """Combines the stages of some parts of pieces, and sees what there is to see."""
  found = []
  buffers = _buffers(width)
  for _, i, start, stop in parts:
    piece, facts = group[i], Facts.none(len(rows[i]))
    facts.still = still
    terms = [
      ([(-len(row) + k, float(c)) for k, c in enumerate(row[:-1]) if c], float(row[-1]))
      for row in rows[i]
    ]
    for begin in range(start, stop, CHUNK):
      _combine(piece, begin, min(begin + CHUNK, stop), terms, buffers, is_watched, facts)
    found.append((i, facts))
  return found


_kept = threading.local()


def _buffers(width: np.dtype) -> np.ndarray:
  """Three chunks of this thread's own."""
  buffers = getattr(_kept, 'buffers', None)
  if buffers is None or buffers.dtype != width or buffers.shape[1] < CHUNK:
    buffers = _kept.buffers = np.empty((3, CHUNK), width)
  return buffers


def _combine(
  piece: Piece,
  start: int,
  stop: int,
  terms: Sequence[tuple[list[tuple[int, float]], float]],
  buffers: np.ndarray,
  is_watched: bool,
  facts: Facts,
) -> None:
  """Combines the stages of a chunk that stays in the cache; see `Linear.coefficients`."""
  moved, term, in_width = buffers[:, : stop - start]
  newest = piece.stages[-1][start:stop]
  if facts.still:
    facts.still = all(np.array_equal(stage[start:stop], newest) for stage in piece.stages[:-1])
  if newest.dtype != moved.dtype:
    in_width[:] = newest
    newest = in_width
  with np.errstate(over='ignore', invalid='ignore'):
    for step, (older, towards) in enumerate(terms):
      out = piece.out[step, start:stop]
      for number, (place, coefficient) in enumerate(older):
        target = term if number else moved
        np.subtract(piece.stages[place][start:stop], newest, out=target)
        if coefficient != 1.0:
          np.multiply(target, coefficient, out=target)
        if number:
          np.add(moved, term, out=moved)
      if towards:
        np.multiply(newest, towards, out=term if older else moved)
        if older:
          np.add(moved, term, out=moved)
      elif not older:
        out[:] = newest
        continue
      if out.dtype == moved.dtype:
        np.add(newest, moved, out=out)
      else:
        np.add(newest, moved, out=moved)
        out[:] = moved
      if is_watched:
        np.subtract(out, newest, out=moved)
        facts.movement[step] = np.maximum(facts.movement[step], largest_of(moved))
  if is_watched:
    facts.scale = max(facts.scale, largest_of(newest))


# --- elementwise ----------------------------------------------------------------------------------


def _elementwise(
  group: Sequence[Piece],
  params: Any,
  count: int,
  width: np.dtype,
  job: Job,
  steps: tuple[int, ...],
  parts: Sequence[_Parts],
  threads: int,
) -> Iterator[list[tuple[int, Facts]]]:
  """Predicts pieces of one kind in rows, by several threads."""
  saturates = job.predictor.saturates and job.is_watched
  # Residuals are the changes from step to step.
  taken = tuple(range(1, max(steps) + 1)) if saturates else steps
  asked = [taken.index(n) for n in steps]
  limits = dict(job.ranges).get(group[0].leaf.kind) if job.is_watched else None
  program = functools.partial(_row_program(), job.predictor, taken, job.rate)

  def run_row(row: np.ndarray, of_row: _Parts) -> list[tuple[int, Facts]]:
    end = 0
    for place, i, start, stop in of_row:
      end = place + stop - start
      for t, stage in enumerate(group[i].stages[-count:]):
        row[t, place:end] = stage[start:stop]
    predicted = jax.device_get(program(row, np.int32(end), params))
    found = []
    for place, i, start, stop in of_row:
      here = slice(place, place + stop - start)
      part, newest = predicted[:, here], row[-1, here]
      with np.errstate(over='ignore', invalid='ignore'):
        group[i].out[:, start:stop] = part[asked]
        facts = _facts(group[i], start, stop, newest, job)
        if saturates:
          facts.residual = _residuals(newest, part)[asked]
        if limits is not None:
          weights, moves = largest_of(row[:, here]), largest_of(np.diff(row[:, here], axis=0))
          facts.outside = max(weights / limits[0], moves / limits[1])
      found.append((i, facts))
    return found

  if parts:
    _compile_row(count, width, params, job, taken)
  # Taken once and not by every row: threads keep most of the memory that they once had.
  spare: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
  for _ in range(min(threads, len(parts))):
    spare.put(_new_row(count, width))

  def in_spare_row(of_row: _Parts) -> list[tuple[int, Facts]]:
    row = spare.get()
    try:
      return run_row(row, of_row)
    finally:
      spare.put(row)

  return _in_threads(in_spare_row, [(of_row,) for of_row in parts], threads)


def _facts(piece: Piece, start: int, stop: int, newest: np.ndarray, job: Job) -> Facts:
  """What is seen of a stretch that has been predicted; `newest` is in the dtype to compute in."""
  facts = Facts.none(len(piece.out))
  last = piece.stages[-1][start:stop]
  facts.still = job.keeps_still(len(piece.stages)) and all(
    np.array_equal(stage[start:stop], last) for stage in piece.stages[:-1]
  )
  if job.is_watched and newest.size:
    for step, values in enumerate(piece.out[:, start:stop]):
      facts.movement[step] = largest_of(values.astype(newest.dtype) - newest)
    facts.scale = largest_of(newest)
  return facts


def _whole(
  i: int, piece: Piece, theta: Any, job: Job, steps: tuple[int, ...]
) -> list[tuple[int, Facts]]:
  """A leaf as a whole, by the program that is compiled for its shape."""
  plain = dataclasses.replace(job, leaves=(piece.leaf,), shardings=(None,), on_bad='ignore')
  stages = tuple(stage.reshape(piece.shape or -1) for stage in piece.stages)
  (found,), _ = jax.device_get(predict_whole([stages], theta, plain, steps))
  with np.errstate(over='ignore', invalid='ignore'):
    piece.out[:] = found.reshape(piece.out.shape)
    return [(i, _facts(piece, 0, piece.size, piece.stages[-1].astype(piece.width), job))]


def _residuals(newest: np.ndarray, predicted: np.ndarray) -> np.ndarray:
  """The largest residual up to each step, `[steps]`, of weights `[N]` and `[steps, N]`."""
  found = [largest_of(b - a) for a, b in itertools.pairwise((newest, *predicted))]
  return np.maximum.accumulate(found)


def _new_row(length: int, dtype: Any) -> np.ndarray:
  row = _empty((length, ROW), dtype)
  row.fill(0)
  return row


_compiled: set[tuple[Any, ...]] = set()
"""What `_compile_row` was called for in this process."""


def _compile_row(length: int, dtype: Any, params: Any, job: Job, steps: tuple[int, ...]) -> None:
  """Compiles `_row_program`, where it is not, before threads take rows.

  The memory of both would be taken at a time otherwise, and the process would keep what compiling
  freed.
  """
  static = (job.predictor, steps, job.rate)
  program = (ROW, length, np.dtype(dtype), jax.tree.structure(params), *static)
  if program in _compiled:
    return
  row = _new_row(length, dtype)
  jax.block_until_ready(_row_program()(*static, row, np.int32(0), params))
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
  predictor: Elementwise, steps: tuple[int, ...], rate: float, row: Any, count: Any, params: Any
) -> jax.Array:
  """Predictions `[len(steps), N]` of a row `[S, N]`; only its first `count` weights matter.

  What comes after them may be any number that a weight can be.
  """
  return predict_blocks(predictor, params, row, steps, rate, ROW_BLOCK, count)[0]


# --- threads --------------------------------------------------------------------------------------


def _threads(width: np.dtype) -> int:
  """How many threads may work on leaves that are computed in this dtype."""
  # What JAX is told for one thread alone, as by `jax.enable_x64`, others do not know.
  return processors() if width == np.float32 else 1


def _in_threads(
  function: Callable[..., _T], calls: Sequence[tuple[Any, ...]], threads: int
) -> Iterator[_T]:
  """What a function gives for each tuple of arguments, in their order, from so many threads."""
  if min(len(calls), threads) < 2:
    yield from (function(*arguments) for arguments in calls)
    return
  pool = concurrent.futures.ThreadPoolExecutor(threads)
  try:
    yield from pool.map(lambda arguments: function(*arguments), calls)
  finally:
    # After an error or Ctrl-C nothing new is begun.
    pool.shutdown(cancel_futures=True)


def _rows(sizes: Sequence[int], threads: int) -> Iterator[_Parts]:
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
