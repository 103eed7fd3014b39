"""A history of weights in one form, checked."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from know_jax import trees
from know_jax.errors import UserError
from know_jax.trajectory import Trajectory, check_stages, stacked_length

_STRETCH = 1 << 20  # Weights whose finiteness is checked at a time: their mask stays small.


@dataclasses.dataclass(frozen=True)
class History:
  """A history, whatever form it was given in.

  Attributes:
    leaves: for every leaf either a tuple of T arrays or one array `[T, ...]`, oldest first.
    structs: for every leaf its shape and dtype without the time axis.
  """

  leaves: list[Any]
  structs: list[jax.ShapeDtypeStruct]
  paths: list[str]
  treedef: Any
  length: int

  def newest(self, leaf: int) -> Any:
    """The newest stage of a leaf."""
    return self.leaves[leaf][-1]

  def unflatten(self, leaves: Sequence[Any]) -> trees.PyTree:
    """A tree like one stage, of these leaves."""
    return jax.tree.unflatten(self.treedef, leaves)


def read_history(params_history: Any) -> History:
  """A history in any of the forms that `predict` takes.

  Raises:
    UserError: stages differ, there are no leaves, or JAX would narrow one in silence.
  """
  if type(params_history) in (list, tuple):
    stages = list(params_history)
    check_stages(stages)
    newest, length = stages[-1], len(stages)
    flat = [jax.tree.leaves(stage) for stage in stages]
    leaves: list[Any] = [
      tuple(leaf if hasattr(leaf, 'dtype') else np.asarray(leaf) for leaf in column)
      for column in zip(*flat, strict=True)
    ]
    structs = [jax.ShapeDtypeStruct(np.shape(leaf[0]), leaf[0].dtype) for leaf in leaves]
  else:
    newest = params_history
    if isinstance(params_history, Trajectory):
      newest = params_history.weights
    length = stacked_length(newest)
    leaves = jax.tree.leaves(newest)
    structs = [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in leaves]
  if not leaves:
    raise UserError('the history has no leaves; wanted pytrees of weights.')
  paths = trees.leaf_paths(newest)
  for path, struct in zip(paths, structs, strict=True):
    if struct.dtype == np.float64 and not jax.config.read('jax_enable_x64'):
      raise UserError(
        f'leaf {path!r} is float64, which JAX would narrow to float32 in silence; cast the history '
        'or set jax_enable_x64.'
      )
  return History(leaves, structs, paths, jax.tree.structure(newest), length)


def check_finite(history: History) -> None:
  """Raises where a leaf, kept ones included, has NaN or infinity; not for traced histories."""
  if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(history.leaves)):
    return
  floating = [i for i, s in enumerate(history.structs) if trees.is_floating(s)]
  for i in floating:
    # Evaluated now, also where the caller is traced and the history is a constant of the trace.
    with jax.ensure_compile_time_eval():
      leaf_is_finite = _is_finite(history.leaves[i])
    if not leaf_is_finite:
      counts = [_count_bad(stage) for stage in history.leaves[i]]
      stage = next(stage for stage, count in enumerate(counts) if count)
      size = math.prod(history.structs[i].shape)
      raise UserError(
        f'leaf {history.paths[i]!r} has {counts[stage]} of {size} values NaN or infinite at stage '
        f'{stage} of {history.length} (0 is the oldest); wanted finite weights at every stage.'
      )


def _is_finite(leaf: Any) -> bool:
  """Whether the stages of a leaf, a tuple of arrays or one array, hold no NaN or infinity."""
  for array in jax.tree.leaves(leaf):
    if not isinstance(array, jax.Array):
      parts = [array]
    elif not (array.is_fully_addressable or array.is_fully_replicated):
      # All processes get the answer for all of it.
      if not _all_finite(array):
        return False
      continue
    elif array.is_fully_replicated:
      parts = [array.addressable_data(0)]
    else:
      parts = [shard.data for shard in array.addressable_shards]
    for part in parts:
      if isinstance(part, jax.Array) and next(iter(part.devices())).platform != 'cpu':
        if not _all_finite(part):
          return False
      elif not _all_finite_on_host(np.asarray(part)):
        return False
  return True


# On the host NumPy looks at the arrays where they lie: a compilation for every shape would take far
# longer than the prediction.
def _all_finite_on_host(array: np.ndarray) -> bool:
  flat = array.reshape(-1)
  return all(np.isfinite(flat[i : i + _STRETCH]).all() for i in range(0, flat.size, _STRETCH))


def _count_bad(stage: Any) -> int:
  """How many values are NaN or infinite."""
  if isinstance(stage, jax.Array) and not stage.is_fully_addressable:
    return int((~jnp.isfinite(stage)).sum())
  return int((~np.isfinite(np.asarray(stage, np.float64))).sum())


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
  return jnp.isfinite(array).all()
