"""Other ways to predict a whole network by KNOWN, to be compared in speed and in result.

Each takes a history, a list of pytrees, and gives path -> the predicted leaf, one step ahead.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from know_jax.benchmark.histories import History, by_kind
from know_jax.predictors import known, known_leaf

Rival = Callable[[History], dict[str, Any]]

_NUMPY_CHUNK = 8192
"""Weights that NumPy takes at a time: its temporaries stay in the cache, as ours do."""

FUSED_FLOPS = 2 * (5 * (64 + 8) + 4 * (64 + 8) + 2 * (8 * 64 + 8 * 64 + 64 * 32 + 8 * 32) + 64)
"""Of `known.residuals`, a weight: two for each multiplication of its matrix products."""


# --- the Flax module ------------------------------------------------------------------------------


def plain_vmap(theta: Any, chunk: int | None) -> Rival:
  """The module by `vmap`, leaf by leaf.

  Args:
    theta: parameters of the paper's KNOWN.
    chunk: weights of a leaf that it takes at a time; None: all, whatever memory that costs.
  """

  def of_leaf(params: Any, stages: Sequence[Any]) -> jax.Array:
    windows = jnp.stack([jnp.ravel(stage) for stage in stages], axis=-1)
    size = chunk or max(len(windows), 1)
    parts = [_module(params, windows[i : i + size]) for i in range(0, len(windows), size)]
    return (windows[:, -1] + jnp.concatenate(parts)).reshape(stages[-1].shape)

  return lambda history: _over_leaves(history, theta, of_leaf)


@jax.jit
def _module(params: Any, windows: jax.Array) -> jax.Array:
  """Residuals `[N]` of windows `[N, S]`."""

  def residual(window: jax.Array) -> Any:
    return known.KNOWN().apply({'params': params}, window)

  return jax.vmap(residual)(windows)


def plain_conditioned(theta: Any, rate: float) -> Rival:
  """KNOWN conditioned on the leaf, by its formula over whole leaves."""

  @jax.jit
  def of_leaf(params: Any, stages: Sequence[Any]) -> jax.Array:
    history = jnp.stack([jnp.ravel(stage) for stage in stages])
    moments = known_leaf.second_moments(history) / history.shape[1]
    (step,) = known_leaf.rollout(params, moments, rate, (1,))
    moved = jnp.dot(step, known_leaf.basis(history), precision=jax.lax.Precision.HIGHEST)
    return (history[-1] + moved).reshape(stages[-1].shape)

  return lambda history: _over_leaves(history, theta, of_leaf)


# --- NumPy ----------------------------------------------------------------------------------------


def in_numpy(theta: Any) -> Rival:
  """KNOWN in NumPy, chunk by chunk."""
  theta = jax.device_get(theta)

  def of_leaf(params: Any, stages: Sequence[Any]) -> np.ndarray:
    flat = [np.asarray(stage).reshape(-1) for stage in stages]
    out = np.empty_like(flat[-1])
    for start in range(0, out.size, _NUMPY_CHUNK):
      part = slice(start, start + _NUMPY_CHUNK)
      windows = np.stack([stage[part] for stage in flat], axis=-1)
      out[part] = windows[:, -1] + numpy_residuals(params, windows)
    return out.reshape(stages[-1].shape)

  return lambda history: _over_leaves(history, theta, of_leaf)


def numpy_residuals(params: Any, windows: np.ndarray) -> np.ndarray:
  """KNOWN as its description says it: windows `[N, S]` -> residuals `[N]`."""
  streams = [
    _numpy_stream(params['weights'], windows),
    _numpy_stream(params['differences'], np.diff(windows, axis=1)),
  ]
  return np.tanh(_numpy_dense(params['residual'], np.concatenate(streams, axis=1))[:, 0])


def _numpy_stream(params: Any, x: np.ndarray) -> np.ndarray:
  h = _numpy_dense(params['embed'], x)
  z = np.maximum(_numpy_dense(params['squeeze'], h), 0)
  gate = np.exp(_numpy_dense(params['gate'], z) * h)
  h = _numpy_dense(params['offset'], z) + _numpy_dense(params['amplitude'], z) * gate
  h = _numpy_dense(params['project'], h)
  return np.maximum(h, np.float32(0.3) * h)


def _numpy_dense(params: Any, x: np.ndarray) -> np.ndarray:
  return x @ params['kernel'] + params['bias']


# --- all of them ----------------------------------------------------------------------------------


def _over_leaves(history: History, theta: Any, of_leaf: Callable[..., Any]) -> dict[str, Any]:
  found: dict[str, Any] = {}
  for kind, leaves in by_kind(history).items():
    found |= {path: of_leaf(theta[kind], stages) for path, stages in leaves.items()}
  return found


def over_kinds(history: History, of_kind: Callable[[str, np.ndarray], np.ndarray]) -> Any:
  """Predicts all leaves of a kind as one row: windows `[N, S]` -> residuals `[N]`, in NumPy."""
  found: dict[str, np.ndarray] = {}
  for kind, leaves in by_kind(history).items():
    rows = [np.concatenate([np.ravel(leaf) for leaf in stage]) for stage in _stages(leaves)]
    predicted = rows[-1] + of_kind(kind, np.stack(rows, axis=-1))
    splits = np.cumsum([stages[-1].size for stages in leaves.values()])[:-1]
    for (path, stages), part in zip(leaves.items(), np.split(predicted, splits), strict=True):
      found[path] = part.reshape(stages[-1].shape)
  return found


def _stages(leaves: dict[str, list[Any]]) -> Any:
  """The leaves of every stage, oldest first."""
  return zip(*leaves.values(), strict=True)


def largest_difference(found: dict[str, Any], wanted: dict[str, Any]) -> float:
  """Between two predictions, over all leaves of `wanted`."""
  return max(float(np.abs(np.asarray(found[path]) - leaf).max()) for path, leaf in wanted.items())


def check_equal(name: str, difference: float, tolerance: float) -> float:
  """The difference, if it is within the tolerance.

  Raises:
    ArithmeticError: it is not: what is compared in speed does not compute the same.
  """
  if not difference <= tolerance:
    raise ArithmeticError(f'{name} differs by {difference:.3g}; wanted at most {tolerance:.3g}.')
  return difference
