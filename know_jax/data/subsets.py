"""Nested random subsets of a training set: what the network is made to forget, stage by stage."""

import heapq
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from know_jax.errors import UserError


def nested_subsets(
  key: jax.Array, labels: ArrayLike, *, rate: float, phases: int, stratified: bool = False
) -> list[np.ndarray]:
  """Draws D^0 ⊃ D^1 ⊃ ... ⊃ D^(phases-1); the paper, section 3: D^i has r |D^(i-1)| examples.

  The sizes are |D^i| = floor(rate |D^(i-1)| + 1/2). All subsets are beginnings of one random order
  of the examples, so each is a uniformly random subset of the one before, and more phases or
  another split into phases never reshuffles. The result is a function of the arguments only: the
  order comes from integer arithmetic on the key's bits, the same on every machine, number of
  devices and setting of JAX.

  With `stratified`, the order is such that every beginning of it, of n examples out of N, holds
  floor(n N_k / N) or ceil(n N_k / N) of the N_k examples of class k, so that the shares of the
  classes stay within one example of those of the whole set at every stage, without drift. See
  `_stratified_order`.

  Args:
    key: one typed key of JAX's default generator, `jax.random.key(seed)`; others give other numbers
      on other hardware.
    labels: [N] integers; the classes where `stratified`, else only their number counts.
    rate: the sampling rate r, between 0 and 1, both excluded.
    phases: how many sets, D^0 included; at least 1.
    stratified: keep the shares of the classes.

  Returns:
    `phases` sorted int32 arrays of indices into `labels`; the first is `arange(N)`. Small sets may
    shrink to nothing: `check_subsets` tells whether they can be trained on.

  Raises:
    UserError: an argument is not as described.
  """
  labels = _checked_labels(labels)
  if not (hasattr(key, 'dtype') and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
    raise UserError(
      f'key is {type(key).__name__} with dtype {getattr(key, "dtype", None)}; expected one typed '
      'key, as from jax.random.key(seed).'
    )
  if key.shape != ():
    raise UserError(f'key has shape {key.shape}; expected one key, of shape ().')
  if (generator := str(jax.random.key_impl(key))) != 'threefry2x32':
    raise UserError(
      f'key is of the generator {generator!r}; expected threefry2x32, whose numbers are the same '
      'on every machine: leave jax_default_prng_impl alone.'
    )
  if not 0 < rate < 1:
    raise UserError(f'rate is {rate}; expected a number between 0 and 1, both excluded.')
  if phases < 1:
    raise UserError(f'phases is {phases}; expected 1 or more.')
  # A flag of JAX's (JAX_THREEFRY_PARTITIONABLE) would give other subsets.
  with jax.threefry_partitionable(True):
    order = np.asarray(jax.random.permutation(key, labels.size))
  if stratified:
    order = _stratified_order(order, labels)
  sizes = [labels.size]
  for _ in range(phases - 1):
    sizes.append(math.floor(rate * sizes[-1] + 0.5))
  return [np.sort(order[:size]).astype(np.int32) for size in sizes]


def _stratified_order(order: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Rearranges a random order so that all its beginnings hold every class in proportion.

  The j-th example of class k (j = 1, 2, ...; in the random order) may stand at places from
  floor((j-1) N / N_k) up to, but not including, ceil(j N / N_k), counted from 0. Any order that
  keeps all these windows has floor(n N_k / N) or ceil(n N_k / N) examples of class k among its
  first n. Taking at each place, of the examples whose window is open, one whose window closes
  first, keeps them all (S. K. Baruah et al., "Proportionate progress: a notion of fairness in
  resource allocation", Algorithmica 15, 1996). Rounding the class sizes stage by stage would not
  do: they drift, or grow while the set shrinks (the Alabama paradox). Ties are broken by the random
  order, so that no class is favoured.
  """
  N = order.size
  _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
  seen = [0] * counts.size
  opens: list[list[tuple[int, int, int]]] = [[] for _ in range(N)]
  for rank, (example, k) in enumerate(zip(order.tolist(), classes[order].tolist(), strict=True)):
    count, j = int(counts[k]), seen[k]
    seen[k] += 1
    opens[j * N // count].append((-(-(j + 1) * N // count), rank, example))
  open_now: list[tuple[int, int, int]] = []
  result = np.empty_like(order)
  for place in range(N):
    for window in opens[place]:
      heapq.heappush(open_now, window)
    result[place] = heapq.heappop(open_now)[-1]
  return result


def check_subsets(
  subsets: Sequence[np.ndarray], labels: ArrayLike | None, *, batch_size: int
) -> None:
  """Checks that every stage can be trained on: a full batch, and an example of each class, if any.

  Raises:
    UserError: a subset (the whole set first) is too small or lacks a class; the stage is named.
  """
  labels = None if labels is None else _checked_labels(labels)
  classes = () if labels is None else np.unique(labels)
  for stage, subset in enumerate(subsets):
    if subset.size < batch_size:
      raise UserError(
        f'stage {stage} (0 is the whole set) has {subset.size} examples; expected at least one '
        f'batch of {batch_size}. Use a smaller batch, fewer stages, a higher rate or more data.'
      )
    if labels is None:
      continue
    if missing := np.setdiff1d(classes, labels[subset]).tolist():
      more = f' (and {len(missing) - 1} more such classes)' if len(missing) > 1 else ''
      raise UserError(
        f'stage {stage} (0 is the whole set) has {subset.size} examples but none of class '
        f'{missing[0]}{more}; expected all {len(classes)} classes. Use stratified subsets, fewer '
        'stages, a higher rate or more data.'
      )


def _checked_labels(labels: ArrayLike) -> np.ndarray:
  labels = np.asarray(labels)
  if labels.ndim != 1 or labels.size == 0 or not np.issubdtype(labels.dtype, np.integer):
    raise UserError(
      f'labels have shape {labels.shape} and dtype {labels.dtype}; expected [N] integers, N > 0.'
    )
  return labels
