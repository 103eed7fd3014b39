"""What happens to BatchNorm after weights are predicted.

Predictors leave normalisation layers as they are in the newest weights. Their running statistics
then describe the activations of a network that no longer exists, and the paper's released script
replaces them by those of a fresh network: a choice that moves accuracy as much as the prediction
does, and so is made by name and reported.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from know_jax.data.base import Batch
from know_jax.errors import UserError, unknown_name
from know_jax.models.adapters import Model, Variables
from know_jax.recalibration import BATCH_NORM_POLICIES, recalibrate
from know_jax.tasks.base import Task
from know_jax.trees import named_leaves, path_string

_STATS = 'batch_stats'


def has_batch_norm(variables: Variables) -> bool:
  """Whether a model's variables hold BatchNorm statistics."""
  return bool(jax.tree.leaves(variables.get(_STATS, {})))


def apply_policy(
  policy: str,
  model: Model,
  variables: Variables,
  batch: Batch | None = None,
  *,
  num_batches: int,
  batch_size: int,
) -> Variables:
  """Settles BatchNorm's parameters and running statistics after a prediction.

  - `keep`: as given, that is as in the newest weights.
  - `reset`: scale 1, shift 0, mean 0, variance 1, as in a fresh network: what the paper's released
    script leaves after a prediction.
  - `recalibrate`: scale and shift as given; running statistics as `know_jax.recalibrate` settles
    them, on `num_batches` batches.

  A model without BatchNorm comes back as it is, whatever the policy. So do the other normalisation
  layers, which have no running statistics.

  Args:
    policy: one of `BATCH_NORM_POLICIES`.
    model: the network.
    variables: `params` and, where there is BatchNorm, `batch_stats`; not replicated.
    batch: for `recalibrate`: examples as the network takes them, not augmented; the first
      `num_batches * batch_size` are used, in the order given.
    num_batches: for `recalibrate`: the number of batches.
    batch_size: for `recalibrate`: the number of examples in each.

  Returns:
    The variables, in new dicts where something changed; arrays are never written to.

  Raises:
    UserError: unknown policy; for `recalibrate`, too few examples or none, or sizes below 1.
  """
  if policy not in BATCH_NORM_POLICIES:
    raise unknown_name('BatchNorm policy', policy, BATCH_NORM_POLICIES)
  if policy == 'keep' or not has_batch_norm(variables):
    return variables
  if policy == 'reset':
    return _reset(variables)
  return _recalibrate(model, variables, batch or {}, num_batches, batch_size)


def _reset(variables: Variables) -> Variables:
  fresh = {'mean': 0.0, 'var': 1.0, 'scale': 1.0, 'bias': 0.0}
  # Only layers with running statistics: LayerNorm has a scale and a shift too.
  layers = {path.rpartition('/')[0] for path in named_leaves(variables[_STATS])}

  def reset_leaf(key_path: tuple, leaf: Any) -> Any:
    layer, _, name = path_string(key_path).rpartition('/')
    return jnp.full_like(leaf, fresh[name]) if layer in layers else leaf

  return {
    **variables,
    **{
      part: jax.tree_util.tree_map_with_path(reset_leaf, variables[part])
      for part in ('params', _STATS)
    },
  }


def settled(
  policy: str, task: Task, variables: Variables, *, num_batches: int, batch_size: int
) -> Variables:
  """`apply_policy` with the first training examples of a task."""
  batch = None
  if policy == 'recalibrate' and has_batch_norm(variables):
    examples = min(num_batches * batch_size, task.train.size)
    batch = task.prepared(np.arange(examples, dtype=np.int32))
  return apply_policy(
    policy, task.model, variables, batch, num_batches=num_batches, batch_size=batch_size
  )


def _recalibrate(
  model: Model, variables: Variables, batch: Batch, num_batches: int, batch_size: int
) -> Variables:
  if num_batches < 1 or batch_size < 1:
    raise UserError(
      f'recalibrate was given num_batches={num_batches}, batch_size={batch_size}; expected both to '
      'be at least 1.'
    )
  sizes = [len(leaf) for leaf in jax.tree.leaves(batch)]
  if (examples := min(sizes, default=0)) < (expected := num_batches * batch_size):
    raise UserError(
      f'recalibrate was given {examples} examples; expected at least {expected} '
      f'(num_batches {num_batches} x batch_size {batch_size}).'
    )
  parts = (
    jax.tree.map(lambda x, i=i: jnp.asarray(x[i * batch_size : (i + 1) * batch_size]), batch)
    for i in range(num_batches)
  )
  return recalibrate(_training_apply(model), variables, parts)


@functools.lru_cache(maxsize=64)
def _training_apply(model: Model) -> Callable[[Variables, Batch], Any]:
  return lambda variables, batch: model.apply(variables, batch, train=True, key=jax.random.key(0))
