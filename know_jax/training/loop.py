"""The training loop: epochs of steps, resumable after each; and evaluation."""

import time
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np

from know_jax import trees
from know_jax.errors import UserError
from know_jax.system.signals import Terminated, uninterrupted
from know_jax.tasks.base import Task
from know_jax.training import steps
from know_jax.training.state import (
  Checkpoint,
  DivergedError,
  Recipe,
  TrainState,
  create_state,
  learning_rates,
)
from know_jax.training.steps import Data, here, replicate, unreplicate


def check_batch_size(batch_size: int, examples: int, what: str) -> None:
  """Checks that batches split over the devices and that the data fill at least one.

  Raises:
    UserError: they do not; `what` names the data.
  """
  devices, processes = jax.device_count(), jax.process_count()
  if batch_size < 1 or batch_size % devices:
    where = f' of {processes} processes' if processes > 1 else ''
    raise UserError(
      f'batch_size is {batch_size}; expected a positive multiple of the {devices} devices{where}.'
    )
  if examples < batch_size:
    raise UserError(f'{what} has {examples} examples; expected at least batch_size = {batch_size}.')


def fit(
  task: Task,
  start: Checkpoint,
  data: Data,
  indices: np.ndarray,
  *,
  recipe: Recipe,
  epochs: int,
  batch_size: int,
  lr: float,
  schedule: str,
  key: jax.Array,
  on_epoch: Callable[[int, dict[str, float]], None] = lambda epoch, metrics: None,
  show_after: Collection[int] = (),
  show: Callable[[int, TrainState], None] = lambda epoch, state: None,
  save: Callable[[Checkpoint], None] | None = None,
  save_every_seconds: float = 60.0,
) -> TrainState:
  """Trains on a subset of the data, from wherever `start` stands to the end.

  Each epoch visits a fresh permutation of `indices`, a function of `key` and the epoch; the last,
  incomplete batch is left out. From any checkpoint the result is, on the same machine, bit for bit
  that of an uninterrupted training. Of several processes each must be given the same arguments; a
  signal to one of them ends the training of all, after the same step.

  Args:
    task: what is trained; its data are those of `data`.
    start: `Checkpoint(create_state(...))`, or one that `save` was given.
    data: the whole training set: see `steps.put_data`.
    indices: the examples to train on, int32 `[n]`, n >= batch_size.
    recipe: what the state was created with.
    epochs: how many epochs make the whole training.
    batch_size: over all devices of all processes.
    lr: the first learning rate.
    schedule: a name in `SCHEDULES`.
    key: decides order and augmentation.
    on_epoch: called after each epoch with its number (1 is the first) and the task's metrics
      over its training examples, each before the step that it was in.
    show_after: epochs after which `show` is called with the number and the state, NumPy arrays.
    show: see `show_after`.
    save: called between steps at most every `save_every_seconds`, and before SIGINT or SIGTERM
      ends the training; by all processes after the same step.
    save_every_seconds: see `save`.

  Returns:
    The trained state, NumPy arrays, not replicated.

  Raises:
    DivergedError: the loss of an epoch is not finite, or a weight after the last one.
    Terminated: another process got a signal.
  """
  course = Course(
    task, start, indices, epochs=epochs, batch_size=batch_size, lr=lr, schedule=schedule, key=key,
    on_epoch=on_epoch,
  )  # fmt: skip
  step_fn = steps.train_step(task, recipe)
  state = replicate(start.state)

  def step() -> None:
    nonlocal state
    arrays, index = data.at(course.batch())
    steps.keep_near(course.pending)
    state, sums = step_fn(state, arrays, data.prepare, index, course.rate(), course.example_key)
    course.count(sums)
    if (epoch := course.ended_epoch()) in show_after:
      show(epoch, unreplicate(state))

  def save_now() -> None:
    if save:
      save(Checkpoint(unreplicate(state), course.sums()))

  drive(lambda: course.done < course.total, step, save_now, save_every_seconds)
  trained = unreplicate(state)
  check_finite(trained, lr)
  return trained


def train(
  task: Task, variables: Any, data: Data, indices: np.ndarray, *, recipe: Recipe, **options: Any
) -> Any:
  """The variables after `fit` from given ones with a fresh optimiser; options as of `fit`."""
  start = Checkpoint(create_state(variables, recipe))
  return fit(task, start, data, indices, recipe=recipe, **options).variables


def drive(
  more: Callable[[], bool],
  step: Callable[[], None],
  save: Callable[[], None],
  save_every_seconds: float,
) -> None:
  """Does steps while there are more, and saves between them: the loop of all that resumes.

  A signal waits until a step is done, so that what a step changes always agrees; then `save` is
  called, and the signal ends the loop. Of several processes, all save and end after the same step.

  Raises:
    Terminated: another process got a signal.
  """
  saved, wishes, all_stop = time.monotonic(), _Wishes(), False
  stop: BaseException | None = None
  while more() and not all_stop:
    try:
      with uninterrupted():
        step()
        due = time.monotonic() - saved > save_every_seconds
        all_stop, due = wishes.agreed(stop is not None, due)
        if all_stop or (due and more()):
          save()
          saved = time.monotonic()
    except (KeyboardInterrupt, Terminated) as signal:
      if jax.process_count() == 1:
        save()
        raise
      # The others must hear of it before this process leaves.
      stop = stop or signal
  # What was wished during the last step, and since.
  if not all_stop and any(wishes.agreed(stop is not None, False)[0] for _ in range(2)):
    all_stop = True
    save()
  if all_stop:
    raise stop or Terminated


class _Wishes:
  """What some process wants done, told to all at the same step.

  A process by itself learns it at once. Others learn it a step later, so that none has to wait for
  a step to end before it begins the next.
  """

  def __init__(self) -> None:
    self._told: Any = None

  def agreed(self, *wishes: bool) -> tuple[bool, ...]:
    """What is to be done now; to be called by every process after every step."""
    if jax.process_count() == 1:
      return wishes
    rows = np.tile(np.array(wishes, np.int32), (jax.local_device_count(), 1))
    heard, self._told = self._told, steps.count_wishes()(rows)
    if heard is None:
      return (False,) * len(wishes)
    agreed = tuple(bool(count) for count in unreplicate(heard))
    if any(agreed):
      self._told = None  # Said before this was done, it may be settled by it.
    return agreed


class Course:
  """The way of one run through its training: batch and rate of each step, metrics of each epoch.

  The arguments are those of `fit`.

  Attributes:
    done: steps done.
    total: steps of the whole training.
    pending: what steps of the unfinished epoch gave that is not added up yet.
    example_key: decides what happens to examples.
  """

  def __init__(
    self,
    task: Task,
    start: Checkpoint,
    indices: np.ndarray,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    schedule: str,
    key: jax.Array,
    on_epoch: Callable[[int, dict[str, float]], None],
  ):
    check_batch_size(batch_size, len(indices), 'the training subset')
    self._steps = len(indices) // batch_size
    self.total = epochs * self._steps
    self.done = int(start.state.step)
    self._lr, self._rates = lr, learning_rates(schedule, lr, self.total)
    self._order_key, self.example_key = jax.random.split(key)
    self._indices, self._batch_size, self._on_epoch = indices, batch_size, on_epoch
    self._metrics, self._sums, self.pending = task.metrics, start.sums, list[Any]()
    self._batches: Any = None

  def batch(self) -> np.ndarray:
    """This process's examples of the next step, `[local devices, batch_size / devices]`."""
    epoch, i = divmod(self.done, self._steps)
    if self._batches is None or i == 0:
      key = jax.random.fold_in(self._order_key, epoch)
      order = np.asarray(jax.random.permutation(key, self._indices))
      order = order[: self._steps * self._batch_size]
      self._batches = here(order.reshape(self._steps, jax.device_count(), -1))
    return self._batches[i]

  def ended_epoch(self) -> int:
    """The number of the epoch that the last step ended, 1 for the first; -1 within an epoch."""
    epoch, i = divmod(self.done, self._steps)
    return -1 if i else epoch

  def rate(self) -> np.float32:
    """The learning rate of the next step."""
    return self._rates[self.done]

  def count(self, sums: Any) -> None:
    """Counts a step, and calls `on_epoch` after the last one of an epoch.

    Args:
      sums: what the compiled step gave.

    Raises:
      DivergedError: the loss of the epoch is not finite.
    """
    self.pending.append(sums)
    self.done += 1
    if (epoch := self.ended_epoch()) < 0:
      return
    metrics = self._metrics(self.sums())
    self._sums, self.pending = {}, []
    if not np.isfinite(metrics['loss']):
      raise DivergedError(
        f'the loss is {metrics["loss"]} in epoch {epoch} at learning rate {self._lr}; expected a '
        'finite one.'
      )
    self._on_epoch(epoch, metrics)

  def sums(self) -> dict[str, Any]:
    """The task's sums over the examples of the unfinished epoch; `{}` if it has not begun."""
    # One step after the other, so that a resumed sum has the same bits.
    rows = jax.device_get([_first(sums) for sums in self.pending])
    self._sums, self.pending = _added(self._sums, rows), []
    return self._sums


def _first(sums: Any) -> Any:
  """What the first device of this process has, without a computation."""
  return jax.tree.map(
    lambda x: x.addressable_shards[0].data if hasattr(x, 'addressable_shards') else x, sums
  )


def _added(total: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
  """Sums with more of them, each as the first device has it, in float64."""
  for row in rows:
    here = jax.tree.map(lambda x: np.asarray(x[0], np.float64), row)
    total = jax.tree.map(np.add, total, here) if total else here
  return total


def check_finite(trained: TrainState, lr: float) -> None:
  """Checks the weights after the last step, whose loss is that before its update.

  Raises:
    DivergedError: a leaf of params or batch_stats holds NaN or infinity.
  """
  for path, leaf in trees.named_leaves(trained.variables).items():
    if not np.isfinite(leaf).all():
      raise DivergedError(
        f'leaf {path!r} holds NaN or infinity after the last step at learning rate {lr}; expected '
        'finite weights.'
      )


def evaluate(
  task: Task,
  variables: Any,
  data: Data,
  *,
  batch_size: int | None = None,
  indices: np.ndarray | None = None,
) -> dict[str, float]:
  """The task's metrics over a data set, of the network outside training.

  Args:
    task: what is evaluated.
    variables: the network's variables, not replicated.
    data: the data set.
    batch_size: examples that a device takes at a time; None: as the task has it.
    indices: of the examples, int32 `[n]`; None: all.

  Returns:
    What `task.metrics` gives, `loss` and the task's score among it.
  """
  devices = jax.device_count()
  indices = np.arange(data.size, dtype=np.int32) if indices is None else indices
  per_device = min(batch_size or task.at_a_time, -(-len(indices) // devices))
  batch = per_device * devices
  padded = np.arange(-(-len(indices) // batch) * batch, dtype=np.int32)
  replicated = replicate(variables)
  step_fn, rows = steps.eval_step(task), list[Any]()
  for index in here(padded.reshape(-1, devices, per_device)):
    mask = (index < len(indices)).astype(np.float32)
    arrays, places = data.at(indices[np.where(index < len(indices), index, 0)])
    steps.keep_near(rows)
    rows.append(_first(step_fn(replicated, arrays, data.prepare, places, mask)))
  return task.metrics(_added({}, jax.device_get(rows)))
