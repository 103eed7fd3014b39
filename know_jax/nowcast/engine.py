"""predict and forecast: check the history, route its leaves by kind, apply a predictor."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import math
import numbers
import operator
import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from know_jax import kinds as kinds_
from know_jax import trees
from know_jax.errors import UserError
from know_jax.nowcast import health as health_
from know_jax.nowcast.history import History, check_finite, read_history
from know_jax.predictors import known, known_leaf
from know_jax.predictors.methods import METHODS, Leaf, Method, check_options, max_steps
from know_jax.predictors.parameters import (
  load_known,
  network_of,
  parameter_shapes,
  trained_range,
)
from know_jax.system.machine import give_back_memory, processors

_T = TypeVar('_T')

BLOCK = 8192
"""Weights that KNOWN takes at a time: its temporaries (64 features each) stay in the cache."""

ROW_BLOCK = 2048
"""The same where every processor takes blocks of its own, and has its own cache for them."""

ROW = 1 << 17
"""Weights that a thread takes at a time on the host, at most."""

SMALL = 1 << 17
BATCH = 1 << 20
"""Leaves of fewer than `SMALL` weights are copied together, at most `BATCH` weights at a time,
into one run of blocks: a loop for each leaf would take long to compile."""

_Parts = list[tuple[int, int, int, int]]


def check_steps(steps: Any, least: int) -> int:
  """A number of steps as an integer.

  Raises:
    UserError: it is none, or less than `least`.
  """
  try:
    steps = operator.index(steps)
  except TypeError as error:
    raise UserError(f'steps is {steps!r}; wanted a Python integer of at least {least}.') from error
  if steps < least:
    raise UserError(f'steps is {steps}; wanted at least {least}.')
  return steps


# --- the history in one form ----------------------------------------------------------------------


# --- the plan and its run -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
  """The static part of a prediction: with equal jobs and shapes nothing is compiled again."""

  predictor: str
  leaves: tuple[Leaf, ...]
  shardings: tuple[NamedSharding | None, ...]
  rate: float
  options: tuple[tuple[str, Any], ...]
  on_bad: str
  limits: tuple[tuple[str, tuple[float, float]], ...] = ()
  """Kind -> the largest weight and difference that KNOWN was trained on, where they are known."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """A prediction that has been checked; `run` carries it out."""

  history: History
  job: Job
  theta: Any

  def run(self, steps: tuple[int, ...]) -> list[jax.Array]:
    """The predictions of the history's leaves `[len(steps), ...]`, checked."""
    predicted = self.history.leaves
    on_host = self.job.predictor != 'tsv' and is_on_host(predicted, self.theta)
    if on_host:
      # Now, also where the caller is traced and the history is a constant of the trace. Elsewhere
      # it would have every small operation compiled.
      with jax.ensure_compile_time_eval() if is_traced() else contextlib.nullcontext():
        found, health = _run_on_host(predicted, self.theta, self.job, steps)
    else:
      _check_devices(predicted, self.job)
      found, health = _run(predicted, self.theta, self.job, steps)
    if health is not None:
      about: dict[str, Any] = {
        'predictor': self.job.predictor,
        'leaves': tuple((leaf.path, leaf.kind) for leaf in self.job.leaves),
        'steps': steps,
        'on_bad': self.job.on_bad,
      }
      if isinstance(health, jax.core.Tracer):
        health_.report_traced(health, **about)
      else:
        health_.report(health, **about, stacklevel=3)
    return found


def _check_devices(leaves: list[Any], job: Job) -> None:
  """Raises where leaves are bound to different devices; to none are traced and NumPy arrays."""
  bound: dict[frozenset[jax.Device], str] = {}
  for leaf, info in zip(leaves, job.leaves, strict=True):
    for array in jax.tree.leaves(leaf):
      if isinstance(array, jax.core.Tracer) or not getattr(array, 'committed', False):
        continue
      bound.setdefault(frozenset(array.devices()), info.path)
      if len(bound) > 1:
        (first, other), (where, there) = bound.values(), map(_named_devices, bound)
        raise UserError(
          f'leaf {other!r} lies on {there}, and {first!r} on {where}; wanted the same devices for '
          'all leaves.'
        )


def _named_devices(devices: frozenset[jax.Device]) -> str:
  names = sorted(str(device) for device in devices)
  return names[0] if len(names) == 1 else f'{len(names)} devices ({names[0]}, ...)'


def is_traced() -> bool:
  """Whether operations are recorded now, and not done."""
  return isinstance(jnp.add(0, 0), jax.core.Tracer)


def plan_of(
  params_history: Any,
  steps: int,
  predictor: str,
  theta: Any,
  rate: float,
  kinds: kinds_.Rules | None,
  on_bad: str,
  options: dict[str, Any],
  stacked: str | None = None,
) -> Plan:
  """Checks everything that `predict` checks, and computes nothing.

  The arguments are those of `predict`.

  Raises:
    UserError: as `predict` does before it computes.
  """
  health_.check_on_bad(on_bad)
  options = check_options(predictor, options)
  if not isinstance(rate, numbers.Real) or not 0 < rate < 1:
    raise UserError(f'rate is {rate!r}; wanted a Python number in (0, 1).')
  history = read_history(params_history, kinds, stacked)
  method = METHODS[predictor]
  if method.leaf_fn is not None and theta is not None:
    raise UserError(f'theta is for the predictors that run KNOWN; {predictor!r} takes none.')
  # Copies of the newest weight are like no history that KNOWN was trained on, and meant to be.
  ours = theta is None and method.leaf_fn is None and not method.history_free
  limits = trained_range(method.shipped) if ours else {}
  if steps and method.leaf_fn is None:
    theta = load_known(shipped=method.shipped) if theta is None else theta
    _check_theta(theta, set(history.kinds))
    if (network := network_of(theta)) != method.shipped:
      raise UserError(
        f'theta holds parameters of {network!r}; predictor {predictor!r} takes those of '
        f'{method.shipped!r}.'
      )
  _check_length(predictor, method, steps, history.length, options, theta)
  check_finite(history)
  job = Job(
    predictor=predictor,
    leaves=tuple(map(Leaf, history.paths, history.kinds)),
    shardings=tuple(map(_sharding, history.leaves)),
    rate=float(rate),
    options=tuple(options.items()),
    on_bad=on_bad,
    limits=tuple(limits.items()),
  )
  return Plan(history, job, theta)


def _check_theta(theta: Any, kinds: set[str]) -> None:
  if missing := sorted(kinds - set(theta)):
    raise UserError(
      f'theta has no parameters for leaves of kind {missing[0]!r}; it has {sorted(theta)}.'
    )
  for kind in sorted(kinds):
    found = {path: tuple(np.shape(leaf)) for path, leaf in trees.named_leaves(theta[kind]).items()}
    for path, shape in parameter_shapes(found).items():
      if found.get(path) != shape:
        raise UserError(
          f'theta[{kind!r}] has {path!r} of shape {found.get(path)}; wanted {shape}, as load_known '
          'gives it.'
        )


def _check_length(
  predictor: str, method: Method, steps: int, length: int, options: dict[str, Any], theta: Any
) -> None:
  if steps == 0:
    return
  needed = method.needs(steps, options)
  if method.leaf_fn is None and not method.history_free:
    needed = max((known_history_length(params) for params in theta.values()), default=needed)
  if length >= needed:
    return
  reach = max_steps(predictor, length, **options)
  at_most = f'; with this history it can do at most steps={reach}' if reach else ''
  raise UserError(
    f'predictor {predictor!r} needs a history of {needed} stages for steps={steps}; found {length}'
    f'{at_most}.'
  )


def known_history_length(params: Any) -> int:
  """S, the number of stages that the parameters of one kind of leaf read."""
  module = known_leaf if known_leaf.is_conditioned(params) else known
  return module.history_length(params)


def _sharding(leaf: Any) -> NamedSharding | None:
  """The sharding that all stages of a leaf share, if it spans devices and spares the time axis."""
  shardings = [_array_sharding(part) for part in jax.tree.leaves(leaf)]
  sharding = shardings[0]
  if sharding is None or any(other != sharding for other in shardings):
    return None
  if isinstance(leaf, tuple):
    return sharding
  time, *rest = (*sharding.spec, None) if not sharding.spec else sharding.spec
  return NamedSharding(sharding.mesh, PartitionSpec(*rest)) if time is None else None


def _array_sharding(array: Any) -> NamedSharding | None:
  sharding: Any = None
  if isinstance(array, jax.core.Tracer):
    # A traced array shows its sharding only where the axes of the mesh are explicit.
    sharding = jax.typeof(array).sharding
    if not sharding.mesh.are_all_axes_explicit:
      return None
  elif isinstance(array, jax.Array):
    sharding = array.sharding
  return sharding if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None


def _run_leaves(
  leaves: list[Any], theta: Any, job: Job, steps: tuple[int, ...]
) -> tuple[list[jax.Array], jax.Array | None]:
  """Predictions `[len(steps), ...]`, bad ones replaced, and health `[leaves, steps, FIELDS]`."""
  method = METHODS[job.predictor]
  if method.leaf_fn is None:
    found, residuals, outside = _run_known(leaves, theta, job, steps)
  else:
    found = _run_leaf_fn(leaves, job, steps)
    residuals, outside = [jnp.zeros(len(steps))] * len(leaves), [jnp.zeros(())] * len(leaves)
  if job.on_bad == 'ignore' or not leaves:
    return found, None
  health = [_health(*parts) for parts in zip(leaves, found, residuals, outside, strict=True)]
  for i, (leaf, of_leaf) in enumerate(zip(leaves, health, strict=True)):
    bad = health_.is_bad(of_leaf).reshape(-1, *[1] * leaf[-1].ndim)
    found[i] = jnp.where(bad, leaf[-1][None], found[i])
  return found, jnp.stack(health)


_run = jax.jit(_run_leaves, static_argnums=(2, 3))


def _health(leaf: Any, predicted: jax.Array, residual: jax.Array, outside: jax.Array) -> jax.Array:
  """The health of one leaf: `[steps, FIELDS]`."""
  leaf, predicted, residual, outside = jax.lax.stop_gradient((leaf, predicted, residual, outside))
  stages = _in_float32(leaf)
  largest = [jnp.abs(stage).max(initial=0.0) for stage in stages]
  moved = jnp.abs(predicted.astype(stages[-1].dtype) - stages[-1])
  movement = moved.max(axis=tuple(range(1, moved.ndim)), initial=0.0)
  numbers = [movement, residual, functools.reduce(jnp.maximum, largest), outside]
  return jnp.stack([jnp.broadcast_to(x.astype(jnp.float32), movement.shape) for x in numbers], -1)


def _run_leaf_fn(leaves: list[Any], job: Job, steps: tuple[int, ...]) -> list[jax.Array]:
  method, options = METHODS[job.predictor], dict(job.options)
  assert method.leaf_fn is not None
  found = []
  for leaf, info, sharding in zip(leaves, job.leaves, job.shardings, strict=True):
    predicted = []
    for n in steps:
      leaf_fn = functools.partial(method.leaf_fn, leaf=info, steps=n, rate=job.rate, **options)
      predicted.append(_let_xla_shard(leaf_fn, sharding)(_in_float32(leaf)))
    found.append(jnp.stack([p.astype(leaf[0].dtype) for p in predicted]))
  return found


def _let_xla_shard(fn: Callable[..., Any], sharding: NamedSharding | None) -> Callable[..., Any]:
  """`fn` for arrays of this sharding: JAX infers no explicit one for the reshape of tsv."""
  if sharding is None or not sharding.mesh.are_all_axes_explicit:
    return fn
  return jax.sharding.auto_axes(fn, out_sharding=sharding)


def _in_float32(leaf: Any) -> list[jax.Array]:
  """The stages of a leaf, in float32 at least."""
  dtype = trees.wide(leaf[0].dtype)
  return [leaf[i].astype(dtype) for i in range(_length(leaf))]


def _length(leaf: Any) -> int:
  return len(leaf) if isinstance(leaf, tuple) else leaf.shape[0]


# --- on the host ----------------------------------------------------------------------------------


def is_on_host(leaves: list[Any], theta: Any) -> bool:
  """Whether all arrays are at hand in the memory of this machine, and none is traced."""
  for array in jax.tree.leaves((leaves, theta)):
    if isinstance(array, jax.core.Tracer):
      return False
    if isinstance(array, jax.Array):
      device, *others = array.devices()
      if others or device.platform != 'cpu':
        return False
  return True


def _run_on_host(
  leaves: list[Any], theta: Any, job: Job, steps: tuple[int, ...]
) -> tuple[list[jax.Array], np.ndarray | None]:
  """What `_run` computes, in rows of fixed size: no shape of a leaf is ever compiled for.

  The leaves of a kind form one long row of weights, cut into equal rows of at most `ROW` weights,
  whatever the borders of leaves. Each processor works on a row of its own.
  """
  views = [
    [np.asarray(stage) for stage in (leaf if isinstance(leaf, tuple) else np.asarray(leaf))]
    for leaf in leaves
  ]
  found = [_empty((len(steps), *view[-1].shape), view[-1].dtype) for view in views]
  watched = job.on_bad != 'ignore'
  health = np.zeros((len(leaves), len(steps), health_.FIELDS), np.float32)
  groups: dict[tuple[str, Any], list[int]] = {}
  for i, (view, info) in enumerate(zip(views, job.leaves, strict=True)):
    dtype = trees.wide(view[-1].dtype)
    groups.setdefault((info.kind, dtype), []).append(i)
  for (kind, dtype), members in groups.items():
    params = theta[kind] if METHODS[job.predictor].leaf_fn is None else None
    group = ([views[i] for i in members], dtype, job, steps, [found[i] for i in members])
    if params is not None and known_leaf.is_conditioned(params):
      outside = _conditioned_on_host(params, *group)
      health[members, :, 3] = outside[:, None]
      continue
    health[members, :, 1] = _rows_on_host(params, kind, *group)
  if not watched or not leaves:
    return as_jax(found), None
  limits = dict(job.limits)

  def look(i: int) -> None:
    view, kind = views[i], job.leaves[i].kind
    health[i, :, 0], health[i, :, 2] = _movement_on_host(view, found[i])
    if kind in limits:
      health[i, :, 3] = outside_on_host(_window(view, theta[kind], job), limits[kind])
    if (bad := health_.is_bad(health[i])).any():
      found[i][bad] = view[-1]

  for _ in _in_threads(look, [(i,) for i in range(len(leaves))], _threads(*groups)):
    pass
  return as_jax(found), health


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """An array of NumPy's that XLA can take as it is, which wants it to begin at a 64th byte."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + size].view(dtype).reshape(shape)


def as_jax(arrays: Any) -> Any:
  """NumPy arrays that nobody changes any more as JAX's, without a copy or a compilation."""
  return jax.device_put(arrays, may_alias=True)


def _chunks(size: int) -> Iterator[slice]:
  return (slice(start, start + SMALL) for start in range(0, size, SMALL))


def _read_chunks(window: Sequence[np.ndarray], dtype: Any) -> Iterator[tuple[slice, np.ndarray]]:
  """The stages of a leaf, stretch by stretch `[S, N]`, in the dtype to compute in."""
  stages = [stage.reshape(-1) for stage in window]
  for part in _chunks(stages[0].size):
    yield part, np.stack([stage[part].astype(dtype) for stage in stages])


def residuals_on_host(newest: np.ndarray, predicted: np.ndarray) -> np.ndarray:
  """The largest residual up to each step, `[steps]`, of weights `[N]` and `[steps, N]`."""
  largest = []
  for before, stage in itertools.pairwise((newest, *predicted)):
    residuals = stage - before
    largest.append(np.abs(residuals, out=residuals).max(initial=0.0))
  return np.maximum.accumulate(largest)


def _movement_on_host(view: Sequence[np.ndarray], found: np.ndarray) -> tuple[np.ndarray, Any]:
  """Largest movement at each step `[steps]`, and the scale, of one leaf."""
  newest, flat = view[-1].reshape(-1), found.reshape(len(found), -1)
  dtype = trees.wide(newest.dtype)
  movement = np.zeros(len(flat), dtype)
  for part in _chunks(newest.size):
    base = newest[part].astype(dtype)
    for step, leaf in enumerate(flat):
      moved = np.abs(leaf[part].astype(dtype) - base).max()
      movement[step] = np.maximum(movement[step], moved)
  scale = _largest_on_host(view[-1])
  # Older stages are read only where they make a difference.
  if not (movement <= health_.MAX_MOVEMENT * max(scale, health_.FLOOR)).all():
    scale = max(_largest_on_host(stage) for stage in view)
  return movement, scale


def _largest_on_host(stage: np.ndarray) -> float:
  flat = stage.reshape(-1)
  dtype = trees.wide(flat.dtype)
  parts = (np.abs(flat[part].astype(dtype)).max() for part in _chunks(flat.size))
  return max(map(float, parts), default=0.0)


def outside_on_host(window: Sequence[np.ndarray], limits: tuple[float, float]) -> float:
  """`_outside` for NumPy arrays."""
  weight = difference = 0.0
  for _, stages in _read_chunks(window, trees.wide(window[0].dtype)):
    weight = max(weight, float(np.abs(stages).max()))
    difference = max(difference, float(np.abs(np.diff(stages, axis=0)).max()))
  return max(weight / limits[0], difference / limits[1])


def _conditioned_on_host(
  params: Any,
  views: Sequence[Sequence[np.ndarray]],
  dtype: Any,
  job: Job,
  steps: tuple[int, ...],
  out: Sequence[np.ndarray],
) -> np.ndarray:
  """KNOWN conditioned on the leaf, written into `out`: NumPy but for the coefficients.

  Returns:
    How far outside the meta-dataset each leaf is, `[leaves]`.
  """
  windows = [_window(view, params, job) for view in views]
  # Compiled for few numbers of leaves: powers of two.
  padded, length = 1 << (len(windows) - 1).bit_length(), len(windows[0])
  moments = np.zeros((padded, length, length), dtype)
  for leaf, window in enumerate(windows):
    moments[leaf] = _moments_on_host(window, dtype)
  found, outside = jax.device_get(leaf_coefficients(params, moments, job.rate, steps))
  for leaf, coefficients in enumerate(found[: len(windows)]):
    flat = out[leaf].reshape(len(steps), -1)
    for part, stages in _read_chunks(windows[leaf], dtype):
      with np.errstate(over='ignore'):
        flat[:, part] = combine_on_host(coefficients, stages).astype(flat.dtype)
  free = METHODS[job.predictor].history_free
  return np.zeros(len(windows)) if free else outside[: len(windows)]


def _moments_on_host(window: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
  """The second moments of one leaf, divided by its size: `[S, S]`."""
  total = np.zeros((len(window), len(window)))
  for _, history in _read_chunks(window, dtype):
    v = known_leaf.host_basis(history)
    total += v @ v.T
  return (total / max(window[0].size, 1)).astype(dtype)


def combine_on_host(coefficients: np.ndarray, stages: np.ndarray) -> np.ndarray:
  """`_combine` for a stretch of weights: `[steps, S]` and `[S, N]` -> `[steps, N]`."""
  newest = stages[-1]
  differences = stages[:-1] - newest
  return newest + (coefficients[:, :-1] @ differences + coefficients[:, -1:] * newest)


@functools.partial(jax.jit, static_argnums=3)
def leaf_coefficients(
  params: Any, moments: jax.Array, rate: jax.Array | float, steps: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
  """The stages' coefficients for many leaves, and how far outside the meta-dataset they are.

  Moments `[L, S, S]` -> `[L, len(steps), S]` and `[L]`.
  """
  found = jax.vmap(lambda g: known_leaf.rollout(params, g, rate, steps))(moments)
  outside = jax.vmap(lambda g: known_leaf.outside(params, g, rate))(moments)
  return known_leaf.stage_coefficients(found), outside


def _rows_on_host(
  params: Any,
  kind: str,
  views: Sequence[Sequence[np.ndarray]],
  dtype: Any,
  job: Job,
  steps: tuple[int, ...],
  out: Sequence[np.ndarray],
) -> np.ndarray:
  """Predicts leaves of one kind in rows, by several threads.

  Args:
    params: parameters of one KNOWN, None for predictors without.
    kind: the kind of the leaves.
    views: for each leaf its stages, oldest first.
    dtype: to compute in.
    job: the prediction.
    steps: the steps wanted, ascending.
    out: for each leaf `[len(steps), ...]`, to be filled.

  Returns:
    The largest residual of each leaf up to each step, `[leaves, len(steps)]`; 0 where `job` does
    not look at predictions.
  """
  watched = params is not None and job.on_bad != 'ignore'
  # Residuals are the changes from step to step.
  taken = tuple(range(1, max(steps) + 1)) if watched else steps
  wanted = [taken.index(n) for n in steps]
  # To KNOWN, with its parameters at hand, kinds are the same: one program does for all of them.
  row_kind = kind if params is None else kinds_.KINDS[0]
  row_job = dataclasses.replace(
    job, leaves=(Leaf('', row_kind),), shardings=(None,), limits=(), on_bad='ignore'
  )

  def run_row(row: np.ndarray, parts: _Parts) -> list[tuple[int, np.ndarray]]:
    count = 0
    for place, i, start, stop in parts:
      count = place + stop - start
      for t, stage in enumerate(views[i]):
        row[t, place:count] = stage.reshape(-1)[start:stop]
    predicted = jax.device_get(_row_program()(row, np.int32(count), params, row_job, taken))
    found = []
    for place, i, start, stop in parts:
      part = predicted[:, place : place + stop - start]
      with np.errstate(over='ignore'):
        out[i].reshape(len(steps), -1)[:, start:stop] = part[wanted]
      if watched:
        newest = row[-1, place : place + stop - start]
        found.append((i, residuals_on_host(newest, part)[wanted]))
    return found

  # Taken once and not by every row: threads keep most of the memory that they once had.
  threads = _threads((kind, dtype))
  rows = [(parts,) for parts in _rows([view[-1].size for view in views], threads)]
  length = len(views[0])
  if rows:
    _compile_row(length, dtype, params, row_job, taken)
  spare: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
  for _ in range(min(threads, len(rows))):
    spare.put(_new_row(length, dtype))

  def in_spare_row(parts: _Parts) -> list[tuple[int, np.ndarray]]:
    row = spare.get()
    try:
      return run_row(row, parts)
    finally:
      spare.put(row)

  residuals = np.zeros((len(views), len(steps)))
  for found in _in_threads(in_spare_row, rows, threads):
    for i, residual in found:
      residuals[i] = np.maximum(residuals[i], residual)
  return residuals


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
  program = (ROW, length, np.dtype(dtype), jax.tree.structure(params), job, steps)
  if program in _compiled:
    return
  row = _new_row(length, dtype)
  jax.block_until_ready(_row_program()(row, np.int32(0), params, job, steps))
  give_back_memory()
  _compiled.add(program)


@functools.cache
def _row_program() -> Callable[..., Any]:
  """`_predict_row`, compiled for the processors of this machine."""
  # LLVM takes vectors of 256 bits even where there are longer ones, which halve the time of exp.
  cpu = jax.default_backend() == 'cpu'
  options = {'xla_cpu_prefer_vector_width': 512} if cpu else None
  return jax.jit(_predict_row, static_argnums=(3, 4), compiler_options=options)


def _predict_row(row: Any, count: Any, params: Any, job: Job, steps: tuple[int, ...]) -> jax.Array:
  """Predictions `[len(steps), N]` of a row `[S, N]`, of which the first `count` weights matter.

  What comes after them may be any number that a weight can be.
  """
  if params is None:
    return _run_leaf_fn([row], job, steps)[0]
  return _known_leaf(params, _window(row, params, job), steps, ROW_BLOCK, count)[0]


def _threads(*groups: tuple[str, Any]) -> int:
  """How many threads may work on leaves of these kinds and dtypes."""
  # What JAX is told for one thread alone, as by `jax.enable_x64`, others do not know.
  return processors() if all(dtype == np.float32 for _, dtype in groups) else 1


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
  rows = max(1, min(-(-total // BLOCK), threads * -(-total // (threads * ROW))))
  width = min(ROW, -(-total // (rows * ROW_BLOCK)) * ROW_BLOCK)
  left = [(i, 0, size) for i, size in enumerate(sizes) if size]
  while left:
    place, parts = 0, []
    while left and place < width:
      i, start, size = left.pop(0)
      stop = min(size, start + width - place)
      parts.append((place, i, start, stop))
      place += stop - start
      if stop < size:
        left.insert(0, (i, stop, size))
    yield parts


# --- KNOWN over leaves ----------------------------------------------------------------------------


def _run_known(
  leaves: list[Any], theta: Any, job: Job, steps: tuple[int, ...]
) -> tuple[list[Any], list[Any], list[Any]]:
  """KNOWN on every leaf: sharded ones shard by shard, large ones in place, small ones together.

  Returns:
    For every leaf the predictions, the largest residual up to each step, and how far outside the
    meta-dataset it is.
  """
  windows = [
    _window(leaf, theta[info.kind], job) for leaf, info in zip(leaves, job.leaves, strict=True)
  ]
  found: list[Any] = [None] * len(leaves)
  residuals: list[Any] = [jnp.zeros(len(steps))] * len(leaves)
  limits = dict(job.limits)
  outside: list[Any] = [
    _outside(window, limits[info.kind]) if info.kind in limits else jnp.zeros(())
    for window, info in zip(windows, job.leaves, strict=True)
  ]
  run = functools.partial(_known_leaf, steps=steps, block_size=BLOCK)
  small: dict[str, list[int]] = {}
  whole: dict[str, list[int]] = {}
  for i, (window, info, sharding) in enumerate(
    zip(windows, job.leaves, job.shardings, strict=True)
  ):
    if known_leaf.is_conditioned(theta[info.kind]):
      whole.setdefault(info.kind, []).append(i)
    elif sharding is not None:
      found[i], residuals[i] = _known_sharded(run, theta[info.kind], window, sharding)
    elif math.prod(window[0].shape) < SMALL:
      small.setdefault(info.kind, []).append(i)
    else:
      found[i], residuals[i] = run(theta[info.kind], window)
  for kind, indices in whole.items():
    moments = [_moments(windows[i], job.shardings[i]) for i in indices]
    coefficients, far = leaf_coefficients(theta[kind], jnp.stack(moments), job.rate, steps)
    for place, i in enumerate(indices):
      found[i] = _combine(coefficients[place], windows[i], job.shardings[i])
      if not METHODS[job.predictor].history_free:
        outside[i] = far[place]
  for kind, indices in small.items():
    for batch in _batches(indices, [math.prod(windows[i][0].shape) for i in indices]):
      joined = _known_batch(run, theta[kind], [windows[i] for i in batch], steps)
      for i, parts in zip(batch, joined, strict=True):
        found[i], residuals[i] = parts
  return found, residuals, outside


def _outside(window: Any, limits: tuple[float, float]) -> jax.Array:
  """How many times the largest weight or difference of a window is what KNOWN was trained on."""
  stages = _in_float32(jax.lax.stop_gradient(window))
  weights = [jnp.abs(stage).max(initial=0.0) / limits[0] for stage in stages]
  moves = [jnp.abs(b - a).max(initial=0.0) / limits[1] for a, b in itertools.pairwise(stages)]
  return functools.reduce(jnp.maximum, weights + moves)


def _window(leaf: Any, params: Any, job: Job) -> Any:
  """What KNOWN reads of a leaf's history: its newest stages, or copies of the newest one."""
  length = known_history_length(params)
  free = METHODS[job.predictor].history_free
  return (leaf[-1],) * length if free else leaf[-length:]


def _known_sharded(
  run: Callable[..., Any], params: Any, window: Any, sharding: NamedSharding
) -> tuple[jax.Array, jax.Array]:
  """KNOWN on each shard where it lies: no weight leaves its device."""
  axes = _used_axes(sharding)

  def of_shard(params: Any, window: Any) -> tuple[jax.Array, jax.Array]:
    found, residual = run(params, window)
    return found, jax.lax.pmax(residual, axes) if axes else residual

  return jax.shard_map(
    of_shard,
    mesh=sharding.mesh,
    in_specs=(PartitionSpec(), _window_spec(window, sharding)),
    out_specs=(PartitionSpec(None, *sharding.spec), PartitionSpec()),
  )(params, window)


def _batches(indices: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
  batches: list[list[int]] = [[]]
  total = 0
  for i, size in zip(indices, sizes, strict=True):
    if total + size > BATCH and batches[-1]:
      batches.append([])
      total = 0
    batches[-1].append(i)
    total += size
  return batches


def _known_batch(
  run: Callable[..., Any], params: Any, windows: list[Any], steps: tuple[int, ...]
) -> list[tuple[jax.Array, jax.Array]]:
  """KNOWN on several small leaves joined into one row of weights."""
  flat = [jnp.stack([stage.ravel() for stage in _in_float32(window)]) for window in windows]
  every = tuple(range(1, max(steps) + 1))
  joined, _ = run(params, jnp.concatenate(flat, axis=1), steps=every)
  splits = np.cumsum([leaf.shape[1] for leaf in flat])[:-1]
  wanted = jnp.asarray(steps) - 1
  found = []
  for part, row, window in zip(jnp.split(joined, splits, axis=1), flat, windows, strict=True):
    predicted = part[wanted].reshape(len(steps), *window[0].shape).astype(window[0].dtype)
    found.append((predicted, _residuals(row[-1], part)[wanted]))
  return found


def _residuals(newest: jax.Array, rolled: jax.Array) -> jax.Array:
  """The largest residual up to each step, from the newest weights `[N]` and all steps `[n, N]`."""
  path = jax.lax.stop_gradient(jnp.concatenate([newest[None], rolled]))
  return jax.lax.cummax(jnp.abs(jnp.diff(path, axis=0)).max(1, initial=0.0))


def _used_axes(sharding: NamedSharding) -> tuple[Any, ...]:
  """The mesh axes over which an array is split."""
  axes = [axis for axis in sharding.spec if axis is not None]
  return tuple(name for axis in axes for name in (axis if isinstance(axis, tuple) else (axis,)))


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


def _combine(coefficients: jax.Array, window: Any, sharding: NamedSharding | None) -> jax.Array:
  """The stages of a leaf combined, `[len(steps), ...]` in its dtype; coefficients as `[steps, S]`.

  The last coefficient is that of the newest stage beside itself, the others are those of the older
  stages' differences to it, which keeps the digits of a small movement.
  """

  def combine(coefficients: jax.Array, window: Any) -> jax.Array:
    *older, newest = _in_float32(window)
    if newest.size < SMALL:  # Fewer operations to compile, for a copy of the stages.
      differences = jnp.stack([stage - newest for stage in older])
      moved = jnp.tensordot(
        coefficients[:, :-1], differences, 1, precision=jax.lax.Precision.HIGHEST
      )
      towards = coefficients[:, -1].reshape(-1, *[1] * newest.ndim)
      return (newest + moved + towards * newest).astype(window[0].dtype)
    predicted = []
    for row in coefficients:
      moved = sum(c * (stage - newest) for c, stage in zip(row[:-1], older, strict=True))
      predicted.append((newest + moved + row[-1] * newest).astype(window[0].dtype))
    return jnp.stack(predicted)

  if sharding is None:
    return combine(coefficients, window)
  return jax.shard_map(
    combine,
    mesh=sharding.mesh,
    in_specs=(PartitionSpec(), _window_spec(window, sharding)),
    out_specs=PartitionSpec(None, *sharding.spec),
  )(coefficients, window)


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


def _leaf_moments(window: Any) -> jax.Array:
  """The second moments of one leaf, summed over its weights, block by block: `[S, S]`."""
  size = math.prod(window[0].shape)
  stages = _flat(window)
  width = trees.wide(window[0].dtype)

  def sums(block: Any) -> jax.Array:
    if isinstance(block, tuple):
      block = jnp.stack(block)
    return known_leaf.second_moments(block.astype(width))

  whole = size - size % SMALL
  tail = jax.tree.map(lambda x: x[..., whole:], stages)
  # Made from the input, the sums have its mapped axes, which a loop in shard_map must carry.
  total = sums(tail)

  def body(index: jax.Array, total: jax.Array) -> jax.Array:
    return total + sums(_block(stages, index * SMALL, SMALL))

  return jax.lax.fori_loop(0, whole // SMALL, body, total) if whole else total


def _known_leaf(
  params: Any, window: Any, steps: tuple[int, ...], block_size: int, count: Any = None
) -> tuple[jax.Array, jax.Array]:
  """KNOWN on one leaf, block by block, so that the temporaries are those of one block.

  Args:
    params: Flax parameters of one KNOWN.
    window: S arrays `[...]` or one `[S, ...]`, oldest first.
    steps: the steps wanted, ascending.
    block_size: how many weights are taken at a time.
    count: how many weights, of those in the window the first, are wanted; None for all. It need not
      be known where this is compiled.

  Returns:
    The predictions `[len(steps), ...]`, in the leaf's dtype, and the largest residual up to each
    step, `[len(steps)]`.
  """
  shape, dtype = window[0].shape, window[0].dtype
  size = math.prod(shape)
  width = trees.wide(dtype)
  stages, wanted = _flat(window), jnp.asarray(steps) - 1
  fused = known.fuse(params)

  def run(block: Any) -> tuple[jax.Array, jax.Array]:
    if isinstance(block, tuple):
      block = jnp.stack(block)
    block = block.astype(width)
    rolled = known.rollout(fused, block, tuple(range(1, max(steps) + 1)))
    return rolled[wanted].astype(dtype), _residuals(block[-1], rolled)[wanted]

  if size <= block_size and count is None:
    out, residual = run(stages)
    return out.reshape(len(steps), *shape), residual

  def body(index: jax.Array, carry: Any) -> Any:
    out, residual = carry
    # The last block reaches back over the one before: it repeats some weights, and pads none.
    start = jnp.minimum(index * block_size, size - block_size)
    predicted, found = run(_block(stages, start, block_size))
    place = (jnp.zeros_like(start), start)
    return jax.lax.dynamic_update_slice(out, predicted, place), jnp.maximum(residual, found)

  # Zeros made from the input have its mapped axes, which a loop in shard_map must carry.
  zero = 0 * jax.tree.leaves(stages)[0].ravel()[0]
  blank = jnp.zeros((len(steps), size), dtype) + zero
  nothing = jnp.zeros(len(steps), width) + jax.lax.stop_gradient(zero)
  blocks = ((size if count is None else count) + block_size - 1) // block_size
  out, residual = jax.lax.fori_loop(0, blocks, body, (blank, nothing))
  return out.reshape(len(steps), *shape), residual
