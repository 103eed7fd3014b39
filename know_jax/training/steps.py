"""Compiled steps on all devices of all processes, and what they are given: the only pmap.

Of what has an axis of devices, each process holds the rows of its own; those of process 0 come
first. A step computes what one device would with the whole batch: gradients are averaged over
devices, BatchNorm statistics are those of the global batch, and what happens to an example follows
from its place in the batch, not from a device. (A network's own randomness, dropout, belongs to the
part of a batch that a device computes at once.) What changes from step to step (learning rate,
keys, example indices) is an argument of the compiled step, so that runs that differ in nothing else
share one compilation.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from know_jax.data.base import Source, checked_batch
from know_jax.models.adapters import Model
from know_jax.system.machine import processors
from know_jax.tasks.base import AXIS, Task
from know_jax.training.state import Recipe, TrainState, optimizer

_MODEL_STREAM = np.uint32(2**32 - 1)
"""Tells the keys of a network from those of examples, which are numbered from 0."""


def mapped(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
  """`jax.pmap` over `AXIS`, the axis of all devices."""
  return jax.pmap(function, AXIS, **options)


class Data:
  """A source and its preparation, as steps take them.

  Args:
    source: in memory (it has `arrays`): copied to every device once. Any other is read batch by
      batch, on the host.
    prepare: as of a `Task`.
  """

  def __init__(self, source: Source, prepare: Callable[..., Any]):
    self.size = source.size
    if jax.tree_util.all_leaves([prepare]):
      prepare = jax.tree_util.Partial(prepare)
    self.prepare = replicate(prepare)
    arrays = getattr(source, 'arrays', None)
    self._arrays = None if arrays is None else replicate(dict(arrays))
    self._source = source

  def at(self, index: np.ndarray) -> tuple[Any, np.ndarray]:
    """Arrays with the examples at `index` `[local devices, b]`, and where they are in them."""
    if self._arrays is not None:
      return self._arrays, index
    batch = checked_batch(self._source, index.reshape(-1))
    here = jax.tree.map(lambda x: np.reshape(x, (*index.shape, *np.shape(x)[1:])), batch)
    return here, np.broadcast_to(np.arange(index.shape[1], dtype=np.int32), index.shape)


def put_data(task: Task) -> tuple[Data, Data]:
  """The training and the test set of a task."""
  return Data(task.train, task.prepare), Data(task.test, task.prepare)


def here(rows: np.ndarray) -> np.ndarray:
  """The part of this process of `[steps, devices, ...]`: pmap counts devices process by process."""
  devices = jax.local_device_count()
  first = jax.process_index() * devices
  return rows[:, first : first + devices]


def train_step(task: Task, recipe: Recipe) -> Callable[..., Any]:
  """The compiled train step of a task.

  (state, arrays, prepare, indices [local devices, b], lr, key) -> state, sums. `arrays` and
  `indices` are from `Data.at`; sums are those of the task over the global batch, before the update.
  """
  return _train_step(task.model, task.loss, task.sums, recipe)


@functools.lru_cache(maxsize=64)
def _train_step(model: Model, loss: Any, sums: Any, recipe: Recipe) -> Callable[..., Any]:
  """One step on one device of `AXIS`."""

  def step(state: TrainState, arrays: Any, prepare: Any, index: Any, lr: Any, key: Any) -> Any:
    size = index.shape[0]
    device = jax.lax.axis_index(AXIS)
    place = device * size + jnp.arange(size)
    step_key = jax.random.fold_in(key, state.step)
    keys = jax.vmap(functools.partial(jax.random.fold_in, step_key))(place)
    batch = prepare(jax.tree.map(lambda x: x[index], arrays), keys)
    model_key = jax.random.fold_in(jax.random.fold_in(step_key, _MODEL_STREAM), device)

    def apply(params: Any, batch: Any, key: Any) -> Any:
      return model.apply({'params': params, **state.collections}, batch, train=True, key=key)

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
      outputs, changed = (jax.checkpoint(apply) if recipe.remat else apply)(params, batch, key)
      values, weights = loss(outputs, batch)
      part = values.shape[0]
      counted = sums(outputs, batch, jnp.ones(part))
      collections = {**state.collections, **changed}
      if weights is None:
        return values.sum() / (size * (values.size // part)), (None, counted, collections)
      # The total weight, of all parts on all devices, is not known yet.
      return (values * weights).sum(), (weights.sum(), counted, collections)

    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    if recipe.accumulate > 1:
      # One after the other, so that only one part's activations are kept.
      result = _in_turn(gradient, state.params, batch, model_key, size // recipe.accumulate)
    else:
      # BatchNorm needs its whole batch.
      at_once = None if state.collections else examples_at_once(model, batch)
      sizes = (size,) if state.collections else microbatches(size, at_once)
      cuts = np.cumsum(sizes)[:-1]
      pieces = jax.tree.map(lambda x: jnp.split(x, cuts), batch)
      parts = jax.tree.transpose(
        jax.tree.structure(batch), jax.tree.structure([0] * len(sizes)), pieces
      )
      results = [
        _in_turn(gradient, state.params, part, jax.random.fold_in(model_key, i), at_once)
        for i, part in enumerate(parts)
      ]
      result = jax.tree.map(lambda *x: sum(x), *results)
    (_, (weight, counted, collections)), grads = result
    collections = jax.tree.map(
      lambda x: x / recipe.accumulate if jnp.issubdtype(x.dtype, jnp.inexact) else x, collections
    )
    # Counts and flags change alike everywhere.
    changing, treedef = jax.tree.flatten(collections)
    means = [i for i, x in enumerate(changing) if jnp.issubdtype(x.dtype, jnp.inexact)]
    told = grads, weight, [changing[i] for i in means], counted
    grads, weight, summed, counted = sum_over_devices(told)
    devices = jax.lax.axis_size(AXIS)
    for i, x in zip(means, summed, strict=True):
      changing[i] = x / devices
    collections = jax.tree.unflatten(treedef, changing)
    # A batch in which nothing counts moves nothing.
    share = devices if weight is None else jnp.where(weight == 0, 1, weight)
    grads = jax.tree.map(lambda g: (g / share).astype(g.dtype), grads)
    updates, opt_state = optimizer(recipe).update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p - lr.astype(p.dtype) * u, state.params, updates)
    return TrainState(state.step + 1, params, collections, opt_state), counted

  return mapped(step, in_axes=(0, 0, 0, 0, None, None), donate_argnums=0)


def _in_turn(
  gradient: Callable[..., Any], params: Any, batch: Any, key: jax.Array, at_once: int | None
) -> Any:
  """The sum of `gradient(params, part, key)` over parts of so many examples, one after another."""
  if at_once is None:
    return gradient(params, batch, key)
  (size,) = {len(x) for x in jax.tree.leaves(batch)}
  count, rest = divmod(size, at_once)
  if count + bool(rest) == 1:
    return gradient(params, batch, key)
  together = jax.tree.map(lambda x: x[: size - rest].reshape(count, at_once, *x.shape[1:]), batch)
  keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(count + bool(rest)))

  def add(total: Any, part: Any) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, total, gradient(params, *part)), None

  if rest:
    last = jax.tree.map(lambda x: x[size - rest :], batch)
    first = gradient(params, last, keys[-1])
  else:
    one = jax.tree.map(lambda x: x[0], (together, keys))
    first = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, params, *one))
  return jax.lax.scan(add, first, (together, keys[:count]))[0]


_TOGETHER = 1 << 16
"""Weights of a leaf, at most, that is copied to be added together with others."""


def sum_over_devices(tree: Any) -> Any:
  """The sum of every leaf over all devices.

  At each sum the devices wait for each other. Other backends join sums by themselves; on a CPU,
  where one takes as long as a small layer, small leaves are joined here.
  """
  leaves, treedef = jax.tree.flatten(tree)
  if jax.default_backend() != 'cpu' or jax.device_count() == 1:
    return jax.lax.psum(tree, AXIS)
  groups: dict[Any, list[int]] = {}
  for i, leaf in enumerate(leaves):
    groups.setdefault(leaf.dtype if leaf.size <= _TOGETHER else i, []).append(i)
  for members in groups.values():
    of_group = [leaves[i] for i in members]
    total = jax.lax.psum(jnp.concatenate([leaf.ravel() for leaf in of_group]), AXIS)
    parts = jnp.split(total, np.cumsum([leaf.size for leaf in of_group])[:-1])
    for i, part, leaf in zip(members, parts, of_group, strict=True):
      leaves[i] = part.reshape(leaf.shape)
  return jax.tree.unflatten(treedef, leaves)


def examples_at_once(model: Model, batch: Any) -> int | None:
  """How many examples of a batch a network does best to see at once on a CPU; None: all of them."""
  pixels = getattr(getattr(model, 'module', None), 'pixels_at_once', None)
  if pixels is None or jax.default_backend() != 'cpu':
    return None
  _, height, width, _ = batch['image'].shape
  return max(1, pixels // (height * width))


def microbatches(batch_size: int, at_once: int | None = None) -> tuple[int, ...]:
  """The sizes of the parts of one device's images whose gradients a step takes and adds.

  On a CPU most operations of a small network, convolutions above all, run on one core only, but
  XLA runs operations that do not wait for each other on different cores: parts of a batch are
  such. Parts of two sizes do not stand at the same operation at the same time, so that both cores
  find work more often. Smaller parts cost more than they save, as do more of them, which take
  longer to compile; a convolution takes up to 1.4 times as long if its images are no multiple of
  4, so that the rest is a part of its own. Where there are other devices, they have the cores; on
  one core parts are only more to compile. What is taken `at_once`, one after another, needs no more
  than a part for each core.
  """
  cpu = jax.default_backend() == 'cpu' and jax.local_device_count() == 1
  if at_once is not None and cpu:
    count = min(processors(), max(1, batch_size // at_once))
    return tuple(len(part) for part in np.array_split(np.arange(batch_size), count))
  if not cpu or processors() == 1 or batch_size < 32:
    return (batch_size,)
  large = max(16, 8 * round(batch_size / 64))
  small = 16 if batch_size < 128 else large // 2
  count = 0 if small == large else 4
  smaller, rest = divmod(batch_size - count * large, small)
  return (large,) * count + (small,) * smaller + ((rest,) if rest else ())


def eval_step(task: Task) -> Callable[..., Any]:
  """The compiled evaluation step of a task.

  (variables, arrays, prepare, indices [local devices, b], mask [local devices, b]) -> sums over the
  examples where the mask is 1.
  """
  return _eval_step(task.model, task.sums)


@functools.lru_cache(maxsize=64)
def _eval_step(model: Model, sums: Any) -> Callable[..., Any]:
  def step(variables: Any, arrays: Any, prepare: Any, index: Any, mask: Any) -> Any:
    batch = prepare(jax.tree.map(lambda x: x[index], arrays), None)
    outputs, _ = model.apply(variables, batch, train=False, key=None)
    return sum_over_devices(sums(outputs, batch, mask))

  return mapped(step)


def keep_near(given: Sequence[Any]) -> None:
  """Waits, on a CPU with several devices, for the step before the last of those that gave this.

  XLA has a thread for each core: with many steps under way, those of one device can take them all
  and wait for another device that then has none, until XLA ends the process.
  """
  if jax.default_backend() == 'cpu' and jax.local_device_count() > 1:
    jax.block_until_ready(given[-2:-1])


def replicate(tree: Any) -> Any:
  """A copy of every leaf on every device of this process, `[local devices, ...]`, for pmap."""
  devices = jax.local_device_count()

  def copies(x: Any) -> jax.Array:
    x = np.array(x)  # A copy, as devices of a CPU take its memory as it is.
    rows = np.broadcast_to(x, (devices, *x.shape))
    return jax.make_array_from_process_local_data(_sharding(), rows)

  return jax.tree.map(copies, jax.device_get(tree))


@functools.cache
def _sharding() -> jax.sharding.Sharding:
  """That of arrays which `mapped` gives: laid out otherwise they would make it compile twice."""
  return mapped(lambda x: x)(np.zeros(jax.local_device_count())).sharding


def unreplicate(tree: Any) -> Any:
  """The copy of this process's first device, as NumPy arrays."""
  # The shard that lies there: indexing the whole would compile and run for every shape.
  first = jax.tree.map(lambda x: x.addressable_shards[0].data, tree)
  # Copied, as the next step may be given its memory.
  return jax.tree.map(lambda x: np.array(x[0]), jax.device_get(first))


@functools.cache
def count_wishes() -> Callable[..., Any]:
  """Adds up int32 `[local devices, n]` over all devices."""
  return mapped(lambda x: jax.lax.psum(x, AXIS))
