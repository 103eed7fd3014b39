"""Arithmetic of NumPy on chunks of leaves that stay in the cache: linear predictors, and moments.

A chunk is a stretch of one large leaf, or several small leaves one after the other, which cost
together what one leaf costs.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from know_jax.nowcast.pieces import Facts, Piece, largest_by

CHUNK = 1 << 18
"""Weights that NumPy takes at a time: with the stages' and the temporaries they fill a cache. Of
fewer, threads would wait for each other at every operation."""

Parts = list[tuple[int, int, int, int]]
"""Of a chunk or a row: the place in it, the index of a leaf, and where in that it starts and stops.
"""

Seen = tuple[Any, Facts]
"""The indices of leaves, each once, and what was seen of them."""

MOMENTS = 1 << 9
"""Weights whose moments are summed in float32: more would cost digits, and NumPy lets other threads
work beside `vecdot` only where a chunk has hundreds of them. It divides `CHUNK`, and that
`pieces.STRETCH`, so that a leaf in files has the sums that it has in memory."""


# --- chunks of leaves -----------------------------------------------------------------------------


class Room:
  """A thread's own memory for its chunks: new pages would cost more than the arithmetic."""

  def __init__(self) -> None:
    self._taken: dict[tuple[str, int, np.dtype, int], np.ndarray] = {}

  def rows(self, name: str, count: int, dtype: np.dtype, length: int = CHUNK) -> np.ndarray:
    """`[count, length]`, with whatever was left there under this name."""
    key = name, count, dtype, length
    if key not in self._taken:
      self._taken[key] = np.empty((count, length), dtype)
    return self._taken[key]


def cut(sizes: Sequence[int], most: int, multiple: int = 1) -> list[Parts]:
  """Cuts leaves into chunks of at most so many weights; small leaves come into one together.

  There each begins at a multiple of `multiple`.
  """
  result: list[Parts] = []
  together: Parts = []
  place = 0
  for i, size in enumerate(sizes):
    if size > most // 8:
      result += [[(0, i, start, min(start + most, size))] for start in range(0, size, most)]
    elif size:
      taken = -(-size // multiple) * multiple
      if place + taken > most:
        result.append(together)
        together, place = [], 0
      together.append((place, i, 0, size))
      place += taken
  return [*result, together] if together else result


def shared_out(chunks: list[Parts], threads: int) -> list[tuple[list[Parts]]]:
  """Some tasks for each thread; one for all where it does not pay to have another thread."""
  total = sum(stop - start for parts in chunks for _, _, start, stop in parts)
  each = -(-len(chunks) // (threads * 8)) if total > 1 << 18 else max(len(chunks), 1)
  return [(chunks[i : i + each],) for i in range(0, len(chunks), each)]


def _gathered(group: Sequence[Piece], parts: Parts, room: Room) -> tuple[list[np.ndarray], int]:
  """The stages of a chunk, and its size; copied where it has several parts."""
  if len(parts) == 1:
    ((_, i, start, stop),) = parts
    return [stage[start:stop] for stage in group[i].stages], stop - start
  pieces = [group[i] for _, i, _, _ in parts]
  size = sum(piece.size for piece in pieces)
  rows = room.rows('stages', len(pieces[0].stages), pieces[0].stages[-1].dtype)[:, :size]
  for t, row in enumerate(rows):
    np.concatenate([piece.stages[t] for piece in pieces], out=row)
  return list(rows), size


# --- moments --------------------------------------------------------------------------------------


def moments(
  group: Sequence[Piece], count: int, room: Room, chunks: Sequence[Parts]
) -> list[tuple[int, np.ndarray]]:
  """The second moments of the parts of some chunks, in float64.

  Each part begins at a multiple of `MOMENTS`.
  """
  width = group[0].width
  v, wide = room.rows('basis', count, width), room.rows('wide', count, width)
  result = []
  with np.errstate(over='ignore', invalid='ignore'):
    for parts in chunks:
      end = 0
      for place, i, start, stop in parts:
        v[:, end:place] = 0
        end = place + stop - start
        stages = [stage[start:stop] for stage in group[i].stages[-count:]]
        if stages[-1].dtype != width:  # Differences of half precision are not exact in it.
          for row, stage in zip(wide, stages, strict=True):
            row[: stop - start] = stage
          stages = [row[: stop - start] for row in wide]
        for row, (older, newer) in zip(v, itertools.pairwise(stages), strict=False):
          np.subtract(newer, older, out=row[place:end])
        v[-1, place:end] = stages[-1]
      whole = -(-end // MOMENTS) * MOMENTS
      v[:, end:whole] = 0
      blocks = v[:, :whole].reshape(count, -1, MOMENTS)
      starts = [place // MOMENTS for place, _, _, _ in parts]
      grams = np.empty((len(parts), count, count))
      for k, row in enumerate(blocks):
        sums = np.vecdot(blocks[: k + 1], row)
        grams[:, k, : k + 1] = np.add.reduceat(sums, starts, axis=1, dtype=np.float64).T
        grams[:, :k, k] = grams[:, k, :k]
      result += [(i, gram) for (_, i, _, _), gram in zip(parts, grams, strict=True)]
  return result


# --- linear ---------------------------------------------------------------------------------------

_Term = tuple[int, Any]
_Terms = list[tuple[list[_Term], Any]]


def combined(
  group: Sequence[Piece],
  rows: np.ndarray,
  width: np.dtype,
  is_watched: bool,
  is_checked: bool,
  still: bool,
  room: Room,
  chunks: Sequence[Parts],
) -> list[Seen]:
  """Combines the stages of some chunks, and sees what there is to see.

  `rows` are the coefficients `[steps, S]` for all leaves, or `[L, steps, S]`.
  """
  result: list[Seen] = []
  buffers = room.rows('buffers', 3, width)
  steps = len(group[0].out)
  for parts in chunks:
    indices = [i for _, i, _, _ in parts]
    stages, size = _gathered(group, parts, room)
    starts = np.array([place for place, _, _, _ in parts])
    again = len(parts) == 1 and bool(result) and result[-1][0] == indices
    facts = result[-1][1] if again else Facts.none(len(parts), steps, still)
    if len(parts) == 1:
      ((_, i, start, stop),) = parts
      terms = _terms(rows[i] if rows.ndim > 2 else rows, float)
      _combine(
        stages,
        list(group[i].out[:, start:stop]),
        terms,
        starts,
        buffers,
        is_watched,
        is_checked,
        facts,
      )
    else:
      of_parts = rows[indices] if rows.ndim > 2 else rows
      lengths = [stop - start for _, _, start, stop in parts]
      spread = functools.partial(_spread, lengths, width)
      terms = _terms(np.moveaxis(of_parts, 0, -1) if rows.ndim > 2 else rows, spread)
      outs = list(room.rows('outs', steps, group[indices[0]].out.dtype)[:, :size])
      _combine(stages, outs, terms, starts, buffers, is_watched, is_checked, facts)
      with np.errstate(over='ignore', invalid='ignore'):
        for place, i, start, stop in parts:
          for out, values in zip(group[i].out, outs, strict=True):
            out[start:stop] = values[place : place + stop - start]
    if not again:
      result.append((indices, facts))
  return result


def _spread(lengths: Sequence[int], width: np.dtype, of_parts: Any) -> Any:
  """A coefficient for each weight from those of the parts; one for all as a number."""
  if np.ndim(of_parts) == 0:
    return float(of_parts)
  return np.repeat(of_parts.astype(width), lengths)


def _terms(rows: np.ndarray, of: Callable[[Any], Any]) -> _Terms:
  """Stages counted from the end and their coefficients, and that of the newest, for each step."""
  return [
    ([(k - len(row), of(c)) for k, c in enumerate(row[:-1]) if np.any(c)], of(row[-1]))
    for row in rows
  ]


def _combine(
  stages: Sequence[np.ndarray],
  outs: Sequence[np.ndarray],
  terms: _Terms,
  starts: np.ndarray,
  buffers: np.ndarray,
  is_watched: bool,
  is_checked: bool,
  facts: Facts,
) -> None:
  """Combines the stages of a chunk that stays in the cache; see `Linear.coefficients`.

  Args:
    stages: of the chunk `[N]`, oldest first.
    outs: to be filled, one `[N]` for each step.
    terms: the coefficients.
    starts: where its leaves begin.
    buffers: three chunks of this thread's own.
    is_watched: whether predictions are checked.
    is_checked: whether it is known that all stages are finite.
    facts: of its leaves, to be added to.
  """
  newest = stages[-1]
  moved, term, in_width = buffers[:, : newest.size]
  facts.see_still(stages, starts)
  if newest.dtype != moved.dtype:
    in_width[:] = newest
    newest = in_width

  def written_movement(out: np.ndarray) -> np.ndarray:
    """That of what is written, which may have overflowed."""
    np.subtract(out, newest, out=moved, dtype=moved.dtype)
    return largest_by(moved, starts)

  with np.errstate(over='ignore', invalid='ignore'):
    is_seen, used = False, {-1}
    if is_watched:
      scale = largest_by(newest, starts)
      facts.scale = np.maximum(facts.scale, scale)
      is_seen = bool(np.isfinite(scale).all())
    for step, ((older, towards), out) in enumerate(zip(terms, outs, strict=True)):
      has_towards = not _is(towards, 0.0)
      if not older and not has_towards:
        out[:] = stages[-1]
        if is_watched and not scale.max() < _limit(out.dtype):
          facts.movement[:, step] = np.maximum(facts.movement[:, step], written_movement(out))
        continue
      # A sum is the same as a difference of the negative, which spares a multiplication.
      is_minus = len(older) == 1 and not has_towards and _is(older[0][1], -1.0)
      for number, (place, coefficient) in enumerate(older):
        target = term if number else moved
        np.subtract(stages[place], newest, out=target)
        if not is_minus and not _is(coefficient, 1.0):
          np.multiply(target, coefficient, out=target)
        if number:
          np.add(moved, term, out=moved)
      if has_towards:
        np.multiply(newest, towards, out=term if older else moved)
        if older:
          np.add(moved, term, out=moved)
      apply = np.subtract if is_minus else np.add
      into = out if out.dtype == moved.dtype else term
      apply(newest, moved, out=into)
      if into is not out:
        out[:] = into
      if is_watched:
        movement = largest_by(moved, starts)
        if is_seen := is_seen and bool(np.isfinite(movement).all()):
          used |= {place for place, _ in older}
        if not (scale + movement).max() < _limit(out.dtype):
          movement = written_movement(out)
        facts.movement[:, step] = np.maximum(facts.movement[:, step], movement)
  if not is_checked:
    # What a finite prediction was made of is finite.
    unseen = [k for k in range(-len(stages), 0) if not (is_seen and k in used)]
    facts.see_finite([stages[k] for k in unseen], starts)


def _is(coefficient: Any, number: float) -> bool:
  return isinstance(coefficient, float) and coefficient == number


@functools.cache
def _limit(dtype: np.dtype) -> float:
  """What does not overflow in a dtype, however it is rounded."""
  return 0.9 * float(jnp.finfo(dtype).max)
