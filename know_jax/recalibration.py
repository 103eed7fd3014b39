"""BatchNorm's running statistics, settled on data after a prediction."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from know_jax.errors import UserError
from know_jax.trees import named_leaves

BATCH_NORM_POLICIES = ('keep', 'reset', 'recalibrate')
"""What may become of BatchNorm after a prediction: `training.batch_norm.apply_policy` does it."""

_STATS = 'batch_stats'


def recalibrate(
  apply_fn: Callable[[dict[str, Any], Any], tuple[Any, Mapping[str, Any]]],
  variables: Mapping[str, Any],
  batches: Iterable[Any],
) -> dict[str, Any]:
  """Settles BatchNorm's running statistics on data, as predicted weights need it.

  Each running mean and variance becomes the plain average, over the batches, of the statistics that
  the model in training mode computes for a batch, whatever its momentum. The old running statistics
  have no part in it; all else comes back as it is.

      weights = know_jax.predict(history)
      variables = know_jax.recalibrate(
        lambda v, x: model.apply(v, x, train=True, mutable=['batch_stats']),
        {'params': weights, 'batch_stats': batch_stats}, batches)

  Args:
    apply_fn: `apply_fn(variables, batch) -> (outputs, {'batch_stats': ...})`, in training mode, as
      `module.apply` of Flax is with `mutable=['batch_stats']`. It is compiled.
    variables: collections, `batch_stats` among them.
    batches: examples as `apply_fn` takes them, not augmented: some ten batches of 128 will do.

  Returns:
    The variables, in a new dict.

  Raises:
    UserError: there is no batch, the variables have no `batch_stats`, or `apply_fn` does not give
      new ones.
  """
  if not jax.tree.leaves(variables.get(_STATS, {})):
    raise UserError(
      f'recalibrate: found the collections {", ".join(variables)}; expected batch_stats with the '
      'statistics of BatchNorm.'
    )
  total, count = None, 0
  for batch in batches:
    stats, still = _batch_statistics(apply_fn, variables, batch)
    if count == 0 and (path := next((p for p, x in named_leaves(still).items() if x), None)):
      raise UserError(
        f'recalibrate: apply_fn leaves {path!r} of batch_stats as it is; expected training mode.'
      )
    total = stats if total is None else jax.tree.map(jnp.add, total, stats)
    count += 1
  if total is None:
    raise UserError('recalibrate was given no batch; expected at least one.')
  return {**variables, _STATS: jax.tree.map(lambda leaf: leaf / count, total)}


@functools.partial(jax.jit, static_argnums=0)
def _batch_statistics(
  apply_fn: Callable[[Mapping[str, Any], Any], Any], variables: Mapping[str, Any], batch: Any
) -> tuple[Any, Any]:
  """The mean and variance of one batch at every BatchNorm layer, and whether it stood still.

  A training step gives `new = m old + (1 - m) batch`. At `old = 0` that is `(1 - m) batch`, and its
  derivative in the direction of ones is m.
  """

  def step(old: Any) -> Any:
    result = apply_fn({**variables, _STATS: old}, batch)
    updated = result[1] if isinstance(result, tuple) and len(result) == 2 else None
    if not isinstance(updated, Mapping) or _STATS not in updated:
      raise UserError(
        f'recalibrate: apply_fn returned {type(result).__name__}; expected (outputs, '
        "{'batch_stats': ...}), as apply(..., mutable=['batch_stats']) gives."
      )
    return updated[_STATS]

  zeros = jax.tree.map(jnp.zeros_like, variables[_STATS])
  ones = jax.tree.map(jnp.ones_like, variables[_STATS])
  new, momentum = jax.jvp(step, (zeros,), (ones,))
  still = jax.tree.map(lambda m: jnp.all(m == 1), momentum)
  return jax.tree.map(lambda leaf, m: leaf / (1 - m), new, momentum), still
