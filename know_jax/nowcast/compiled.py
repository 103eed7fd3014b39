"""Predictions as one compiled program: under jit, grad, vmap and shard_map, and on sharded arrays.

Weights stay on their devices: what is summed over devices are the moments of a leaf and its health.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from know_jax import trees
from know_jax.nowcast import health as health_
from know_jax.nowcast.job import Job, grouped
from know_jax.predictors.base import Elementwise, Linear, check_shape
from know_jax.predictors.moments import second_moments

BLOCK = 8192
"""Weights that are predicted at a time: what is computed on the way stays in the cache."""

SMALL = 1 << 17
BATCH = 1 << 20
"""Leaves of fewer than `SMALL` weights are copied together, at most `BATCH` weights at a time,
into one run of blocks: a loop for each leaf would take long to compile."""

_PRECISION = jax.lax.Precision.HIGHEST


def _predict_leaves(
  leaves: list[Any], theta: Any, job: Job, steps: tuple[int, ...]
) -> tuple[list[jax.Array], jax.Array | None]:
  """Predictions `[len(steps), ...]`, bad ones replaced, and health `[leaves, steps, FIELDS]`."""
  if not leaves:
    return [], None
  run = _linear if isinstance(job.predictor, Linear) else _whole
  run = _elementwise if isinstance(job.predictor, Elementwise) else run
  result, residuals, outside = run(leaves, theta, job, steps)
  health = []
  for i, leaf in enumerate(leaves):
    newest = leaf[-1]
    kept: Any = jnp.zeros(len(steps), bool)
    if job.keeps_still(_length(leaf)):
      kept |= _is_still(leaf)
    if job.is_watched:
      of_leaf = _health(leaf, result[i], residuals[i], outside[i])
      # What never moved is left alone, whatever might have become of it.
      of_leaf = jnp.where(kept[:, None], 0.0, of_leaf)
      health.append(of_leaf)
      kept |= health_.is_bad(of_leaf)
    result[i] = jnp.where(kept.reshape(-1, *[1] * newest.ndim), newest[None], result[i])
  return result, jnp.stack(health) if job.is_watched else None


predict_leaves = jax.jit(_predict_leaves, static_argnums=(2, 3))
"""`(leaves, theta, job, steps)` -> predictions `[len(steps), ...]` of each leaf, bad and unmoved
ones replaced by the newest weights, and health `[leaves, steps, FIELDS]`, None where ignored.
Leaves are tuples of T arrays or arrays `[T, ...]`."""


def _length(leaf: Any) -> int:
  return len(leaf) if isinstance(leaf, tuple) else leaf.shape[0]


def _in_float32(leaf: Any) -> list[jax.Array]:
  """The stages of a leaf, in float32 at least."""
  dtype = trees.wide(leaf[0].dtype)
  return [leaf[i].astype(dtype) for i in range(_length(leaf))]


def _is_still(leaf: Any) -> jax.Array:
  """Whether a leaf is equal at all stages."""
  newest = leaf[-1]
  return functools.reduce(
    jnp.logical_and, [(leaf[i] == newest).all() for i in range(_length(leaf) - 1)]
  )


def _health(leaf: Any, predicted: jax.Array, residual: jax.Array, outside: jax.Array) -> jax.Array:
  """The health of one leaf: `[steps, FIELDS]`."""
  leaf, predicted, residual, outside = jax.lax.stop_gradient((leaf, predicted, residual, outside))
  stages = _in_float32(leaf)
  largest = [jnp.abs(stage).max(initial=0.0) for stage in stages]
  moved = jnp.abs(predicted.astype(stages[-1].dtype) - stages[-1])
  movement = moved.max(axis=tuple(range(1, moved.ndim)), initial=0.0)
  numbers = [movement, residual, functools.reduce(jnp.maximum, largest), outside]
  return jnp.stack([jnp.broadcast_to(x, movement.shape).astype(jnp.float32) for x in numbers], -1)


# --- linear ---------------------------------------------------------------------------------------


def _linear(
  leaves: list[Any], theta: Any, job: Job, steps: tuple[int, ...]
) -> tuple[list[Any], list[Any], list[Any]]:
  result: list[Any] = [None] * len(leaves)
  outside: list[Any] = [jnp.zeros(())] * len(leaves)
  for kind in dict.fromkeys(info.kind for info in job.leaves):
    members = [i for i, info in enumerate(job.leaves) if info.kind == kind]
    params, count = job.window(kind, theta, _length(leaves[0]), steps)
    windows = [leaves[i][-count:] for i in members]
    shardings = [job.shardings[i] for i in members]
    if job.predictor.needs_moments:
      moments = [_moments(*pair) for pair in zip(windows, shardings, strict=True)]
      rows, far = leaf_coefficients(job.predictor, params, jnp.stack(moments), job.rate, steps)
      for i, of_leaf in zip(members, far, strict=True):
        outside[i] = of_leaf
    else:
      rows = [job.coefficients(params, count, steps)] * len(members)
    for i, row, window, sharding in zip(members, rows, windows, shardings, strict=True):
      result[i] = _combine(row, window, sharding)
  return result, [jnp.zeros(len(steps))] * len(leaves), outside


@functools.partial(jax.jit, static_argnums=(0, 4))
def leaf_coefficients(
  predictor: Linear, params: Any, moments: jax.Array, rate: Any, steps: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
  """The stages' coefficients for many leaves, and how far outside of what it saw each leaf is.

  Moments `[L, S, S]` -> `[L, len(steps), S]` and `[L]`.
  """
  count = moments.shape[-1]

  def of_leaf(g: jax.Array) -> tuple[jax.Array, jax.Array]:
    result = jnp.asarray(predictor.coefficients(count, g, params, rate, steps))
    check_shape(predictor, 'coefficients', result, (len(steps), count))
    return result, jnp.asarray(predictor.outside(g, params, rate))

  return jax.vmap(of_leaf)(moments)


@functools.partial(jax.jit, static_argnums=0)
def tell_leaves(predictor: Elementwise, params: Any, moments: jax.Array) -> jax.Array:
  """What the weights of many leaves are told of them: moments `[L, S, S]` -> `[L, F]`."""
  return jax.vmap(lambda g: jnp.asarray(predictor.of_leaf(g, params)))(moments)


def _moments(window: Any, sharding: NamedSharding | None) -> jax.Array:
  """The second moments of a leaf, means over its weights: `[S, S]`."""
  size = max(math.prod(window[0].shape), 1)
  if sharding is None:
    return _leaf_moments(window) / size
  axes = _used_axes(sharding)

  def of_shard(window: Any) -> jax.Array:
    moments = _leaf_moments(window) / size
    return jax.lax.psum(moments, axes) if axes else moments

  specs = (_window_spec(window, sharding),)
  return jax.shard_map(of_shard, mesh=sharding.mesh, in_specs=specs, out_specs=PartitionSpec())(
    window
  )


def _leaf_moments(window: Any) -> jax.Array:
  """The second moments of one leaf, summed over its weights, block by block: `[S, S]`."""
  size = math.prod(window[0].shape)
  stages = _flat(window)
  width = trees.wide(window[0].dtype)

  def sums(block: Any) -> jax.Array:
    return second_moments(_stacked(block).astype(width))

  whole = size - size % SMALL
  # Made from the input, the sums have its mapped axes, which a loop in shard_map must carry.
  total = sums(jax.tree.map(lambda x: x[..., whole:], stages))

  def body(index: jax.Array, total: jax.Array) -> jax.Array:
    return total + sums(_block(stages, index * SMALL, SMALL))

  return jax.lax.fori_loop(0, whole // SMALL, body, total) if whole else total


def _combine(coefficients: Any, window: Any, sharding: NamedSharding | None) -> jax.Array:
  """The stages of a leaf combined, `[len(steps), ...]` in its dtype; see `Linear.coefficients`."""

  def combine(coefficients: Any, window: Any) -> jax.Array:
    *older, newest = _in_float32(window)
    if newest.size < SMALL and older and not is_known:  # Fewer operations, for a copy of stages.
      differences = jnp.stack([stage - newest for stage in older])
      moved = jnp.tensordot(coefficients[:, :-1], differences, 1, precision=_PRECISION)
      towards = coefficients[:, -1].reshape(-1, *[1] * newest.ndim)
      return (newest + (moved + towards * newest)).astype(window[0].dtype)
    predicted = []
    for row in coefficients:
      terms = [c * (stage - newest) for c, stage in zip(row[:-1], older, strict=True) if used(c)]
      terms += [row[-1] * newest] if used(row[-1]) else []
      predicted.append(newest + sum(terms[1:], start=terms[0]) if terms else newest)
    return jnp.stack(predicted).astype(window[0].dtype)

  # Numbers that are known before anything is compiled; Python's do not widen float32.
  is_known = isinstance(coefficients, np.ndarray)

  def used(coefficient: Any) -> bool:
    return not is_known or coefficient != 0

  run: Callable[..., jax.Array] = combine
  arguments: tuple[Any, ...] = (coefficients, window)
  if is_known:
    given = [[float(c) for c in row] for row in coefficients]
    run, arguments = functools.partial(combine, given), (window,)
  if sharding is None:
    return run(*arguments)
  specs = (PartitionSpec(), _window_spec(window, sharding))[-len(arguments) :]
  return jax.shard_map(
    run, mesh=sharding.mesh, in_specs=specs, out_specs=PartitionSpec(None, *sharding.spec)
  )(*arguments)


# --- elementwise ----------------------------------------------------------------------------------


def _elementwise(
  leaves: list[Any], theta: Any, job: Job, steps: tuple[int, ...]
) -> tuple[list[Any], list[Any], list[Any]]:
  """Sharded leaves shard by shard, large ones in place, small ones together."""
  result: list[Any] = [None] * len(leaves)
  residuals: list[Any] = [jnp.zeros(len(steps))] * len(leaves)
  for kind in dict.fromkeys(info.kind for info in job.leaves):
    members = [i for i, info in enumerate(job.leaves) if info.kind == kind]
    params, count = job.window(kind, theta, _length(leaves[0]), steps)
    run = functools.partial(predict_blocks, job.predictor, rate=job.rate, block_size=BLOCK)
    windows = {i: leaves[i][-count:] for i in members}
    of_leaf: dict[int, Any] = dict.fromkeys(members)
    if job.predictor.needs_moments:
      moments = [_moments(windows[i], job.shardings[i]) for i in members]
      told = tell_leaves(job.predictor, params, jnp.stack(moments))
      of_leaf = {i: row[:, None] for i, row in zip(members, told, strict=True)}
    small = []
    for i, window in windows.items():
      sharding = job.shardings[i]
      if sharding is not None:
        result[i], residuals[i] = _sharded(run, params, window, steps, sharding, of_leaf[i])
      elif math.prod(window[0].shape) < SMALL:
        small.append(i)
      else:
        result[i], residuals[i] = run(params, window, steps, of_leaf=of_leaf[i])
    for batch in grouped([(i, math.prod(windows[i][0].shape)) for i in small], BATCH):
      flat, told = [windows[i] for i in batch], [of_leaf[i] for i in batch]
      joined = _batch(run, params, flat, steps, job.predictor.saturates, told)
      for i, parts in zip(batch, joined, strict=True):
        result[i], residuals[i] = parts
  return result, residuals, [jnp.zeros(())] * len(leaves)


def predict_blocks(
  predictor: Elementwise,
  params: Any,
  window: Any,
  steps: tuple[int, ...],
  rate: float,
  block_size: int,
  count: Any = None,
  of_leaf: Any = None,
) -> tuple[jax.Array, jax.Array]:
  """An elementwise predictor block by block, so that the temporaries are those of one block.

  Args:
    predictor: it.
    params: of the leaf's kind.
    window: S arrays `[...]` or one `[S, ...]`, oldest first.
    steps: the steps that are asked for, ascending.
    rate: r.
    block_size: how many weights are taken at a time.
    count: how many weights, of those in the window the first, are to be predicted; None for all.
      It need not be known where this is compiled.
    of_leaf: what the weights are told of their leaves, `[F, N]`, or `[F, 1]` for all; None where
      the predictor does not read moments.

  Returns:
    The predictions `[len(steps), ...]`, in the leaf's dtype, and the largest residual up to each
    step, `[len(steps)]`, 0 where steps do not saturate.
  """
  shape, dtype = window[0].shape, window[0].dtype
  size = math.prod(shape)
  width = trees.wide(dtype)
  stages, prepared = _flat(window), predictor.prepare(params)
  # Residuals are the changes from step to step.
  taken = tuple(range(1, max(steps) + 1)) if predictor.saturates else steps
  asked = jnp.asarray([taken.index(n) for n in steps])

  told = () if of_leaf is None else (of_leaf.astype(width),)

  def run(block: Any, told: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    block = _stacked(block).astype(width)
    rolled = predictor.predict(block, prepared, rate, taken, *told)
    check_shape(predictor, 'predictions', rolled, (len(taken), block.shape[1]))
    residual = residuals(block[-1], rolled) if predictor.saturates else jnp.zeros(len(taken), width)
    return rolled[asked].astype(dtype), residual[asked]

  if size <= block_size and count is None:
    out, residual = run(stages, told)
    return out.reshape(len(steps), *shape), residual

  def body(index: jax.Array, carry: Any) -> Any:
    out, residual = carry
    # The last block reaches back over the one before: it repeats some weights, and pads none.
    start = jnp.minimum(index * block_size, size - block_size)
    here = told if of_leaf is None or of_leaf.shape[1] == 1 else _block(told, start, block_size)
    predicted, largest = run(_block(stages, start, block_size), here)
    place = (jnp.zeros_like(start), start)
    largest = trees.vary_alike(jnp.maximum(residual, largest), residual)
    return jax.lax.dynamic_update_slice(out, predicted, place), largest

  blank = jnp.zeros((len(steps), size), dtype), jnp.zeros(len(steps), width)
  blank = trees.vary_alike(blank, stages, prepared, told)
  blocks = ((size if count is None else count) + block_size - 1) // block_size
  out, residual = jax.lax.fori_loop(0, blocks, body, blank)
  return out.reshape(len(steps), *shape), residual


def residuals(newest: jax.Array, rolled: jax.Array) -> jax.Array:
  """The largest residual up to each step, from the newest weights `[N]` and all steps `[n, N]`."""
  path = jax.lax.stop_gradient(jnp.concatenate([newest[None], rolled]))
  return jax.lax.cummax(jnp.abs(jnp.diff(path, axis=0)).max(1, initial=0.0))


def _sharded(
  run: Callable[..., Any],
  params: Any,
  window: Any,
  steps: tuple[int, ...],
  sharding: NamedSharding,
  of_leaf: Any,
) -> tuple[jax.Array, jax.Array]:
  """Each shard where it lies: no weight leaves its device."""
  axes = _used_axes(sharding)

  def of_shard(params: Any, window: Any, of_leaf: Any) -> tuple[jax.Array, jax.Array]:
    result, residual = run(params, window, steps, of_leaf=of_leaf)
    residual = trees.vary_alike(residual, window)
    return result, jax.lax.pmax(residual, axes) if axes else residual

  return jax.shard_map(
    of_shard,
    mesh=sharding.mesh,
    in_specs=(PartitionSpec(), _window_spec(window, sharding), PartitionSpec()),
    out_specs=(PartitionSpec(None, *sharding.spec), PartitionSpec()),
  )(params, window, of_leaf)


def _batch(
  run: Callable[..., Any],
  params: Any,
  windows: list[Any],
  steps: tuple[int, ...],
  saturates: bool,
  of_leaf: list[Any],
) -> list[tuple[jax.Array, jax.Array]]:
  """Several small leaves joined into one row of weights."""
  flat = [jnp.stack([stage.ravel() for stage in _in_float32(window)]) for window in windows]
  taken = tuple(range(1, max(steps) + 1)) if saturates else steps
  told = [
    jnp.broadcast_to(of, (len(of), x.shape[1]))
    for of, x in zip(of_leaf, flat, strict=True)
    if of is not None
  ]
  joined, _ = run(
    params, jnp.concatenate(flat, axis=1), taken, of_leaf=jnp.concatenate(told, 1) if told else None
  )
  splits = np.cumsum([leaf.shape[1] for leaf in flat])[:-1]
  asked = jnp.asarray([taken.index(n) for n in steps])
  result = []
  for part, row, window in zip(jnp.split(joined, splits, axis=1), flat, windows, strict=True):
    predicted = part[asked].reshape(len(steps), *window[0].shape).astype(window[0].dtype)
    largest = residuals(row[-1], part)[asked] if saturates else jnp.zeros(len(steps))
    result.append((predicted, largest))
  return result


# --- whole leaves ---------------------------------------------------------------------------------


def _whole(
  leaves: list[Any], theta: Any, job: Job, steps: tuple[int, ...]
) -> tuple[list[Any], list[Any], list[Any]]:
  found = []
  for leaf, info, sharding in zip(leaves, job.leaves, job.shardings, strict=True):
    predicted = []
    for n in steps:
      params, count = job.window(info.kind, theta, _length(leaf), (n,))
      predict = functools.partial(
        job.predictor.predict, leaf=info, params=params, rate=job.rate, steps=n
      )
      stages = _in_float32(leaf[-count:])
      result = _let_xla_shard(predict, sharding)(stages)
      predicted.append(check_shape(job.predictor, 'a leaf', result, stages[-1].shape))
    found.append(jnp.stack([p.astype(leaf[0].dtype) for p in predicted]))
  return found, [jnp.zeros(len(steps))] * len(leaves), [jnp.zeros(())] * len(leaves)


def _let_xla_shard(fn: Callable[..., Any], sharding: NamedSharding | None) -> Callable[..., Any]:
  """`fn` for arrays of this sharding: JAX infers no explicit one for a reshape."""
  if sharding is None or not sharding.mesh.are_all_axes_explicit:
    return fn
  return jax.sharding.auto_axes(fn, out_sharding=sharding)


# --- windows --------------------------------------------------------------------------------------


def _used_axes(sharding: NamedSharding) -> tuple[Any, ...]:
  """The mesh axes over which an array is split."""
  axes = [axis for axis in sharding.spec if axis is not None]
  return tuple(name for axis in axes for name in (axis if isinstance(axis, tuple) else (axis,)))


def _window_spec(window: Any, sharding: NamedSharding) -> Any:
  stage = sharding.spec
  return (stage,) * len(window) if isinstance(window, tuple) else PartitionSpec(None, *stage)


def _flat(window: Any) -> Any:
  """A window, S arrays `[...]` or one `[S, ...]`, with its weights in one row."""
  axes, size = window[0].ndim, math.prod(window[0].shape)
  # A stacked window stays as it is: taking it apart first would copy all of it.
  return jax.tree.map(lambda x: x.reshape(*x.shape[: x.ndim - axes], size), window)


def _block(stages: Any, start: jax.Array, size: int) -> Any:
  """A stretch of the weights of a flat window."""
  return jax.tree.map(
    lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=x.ndim - 1), stages
  )


def _stacked(block: Any) -> jax.Array:
  return jnp.stack(block) if isinstance(block, tuple) else block
