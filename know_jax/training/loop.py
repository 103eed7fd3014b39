"""Training on all devices of all processes: state, pmapped steps, schedules, fit.

The only module that knows pmap. Of what has an axis of devices, each process holds the rows of its
own; those of process 0 come first. A step computes what one device would with the whole batch:
gradients are averaged over devices, BatchNorm statistics are those of the global batch, and every
random number belongs to an example's place in the batch, not to a device. What changes from step to
step (learning rate, keys, example indices) is an argument of the compiled step, so that runs that
differ in nothing else share one compilation.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from know_jax import trees
from know_jax.data.augmentation import Augmentation, augment
from know_jax.data.sources import mean_image, to_device_input
from know_jax.errors import UserError, unknown_name
from know_jax.system.signals import Terminated, uninterrupted

AXIS = 'batch'
"""The pmapped axis; models take it as `axis_name` to share BatchNorm statistics."""

OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
  # Without the learning rate, which the step multiplies in.
  'adam': lambda weight_decay: _decayed(optax.scale_by_adam(eps=1e-7), 0.0, weight_decay),
  'adamw': lambda weight_decay: _decayed(optax.scale_by_adam(eps=1e-7), weight_decay, 0.0),
  'sgd': lambda weight_decay: _decayed(optax.trace(decay=0.9), 0.0, weight_decay),
}
"""Name -> weight decay -> transformation; epsilon 1e-7 is Keras' default, the authors'."""

SCHEDULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
  'constant': np.ones_like,
  'cosine': lambda done: 0.5 * (1 + np.cos(np.pi * done)),
}
"""Name -> (share of the training done, [steps]) -> factor of the learning rate."""


class DivergedError(UserError):
  """The loss is no longer finite."""


@flax.struct.dataclass
class TrainState:
  """What training changes.

  Attributes:
    step: the number of steps done, int32 scalar.
    params: the model's parameters.
    batch_stats: BatchNorm running statistics; `{}` for a model without.
    opt_state: the optimiser's state.
  """

  step: Any
  params: Any
  batch_stats: Any
  opt_state: Any

  @property
  def variables(self) -> dict[str, Any]:
    """`{'params': ...}` and, if there are any, `'batch_stats'`: what `model.apply` takes."""
    return variables_dict(self.params, self.batch_stats)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What a compiled train step depends on beside the model and the shapes.

  Attributes:
    optimizer: a name in `OPTIMIZERS`.
    weight_decay: L2 penalty for adam and sgd, decoupled for adamw; on kernels only.
    augmentation: applied on the device, after the mean image is subtracted.
    frozen: paths of the parameters that do not move.
  """

  optimizer: str = 'adam'
  weight_decay: float = 0.0
  augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
  frozen: frozenset[str] = frozenset()

  def __post_init__(self) -> None:
    if self.optimizer not in OPTIMIZERS:
      raise unknown_name('optimizer', self.optimizer, OPTIMIZERS)
    if self.weight_decay < 0:
      raise UserError(f'weight_decay is {self.weight_decay}; wanted at least 0.')


@flax.struct.dataclass
class DeviceData:
  """Images, labels and the mean image, a copy on every device: leaves `[local devices, ...]`."""

  images: Any
  labels: Any
  mean: Any


def variables_dict(params: Any, batch_stats: Any) -> dict[str, Any]:
  """The variables of a model; no `batch_stats` entry where there are no statistics."""
  return {'params': params, 'batch_stats': batch_stats} if batch_stats else {'params': params}


def put_data(images: np.ndarray, labels: np.ndarray, mean: np.ndarray | None = None) -> DeviceData:
  """Copies a data set to every device of this process, images as uint8.

  Args:
    images: uint8 `[N, H, W, C]`.
    labels: int32 `[N]`.
    mean: the image to subtract, float32 `[H, W, C]`; None: the mean of these images / 255.
  """
  mean = mean_image(images) if mean is None else mean
  return replicate(DeviceData(images, labels.astype(np.int32), np.asarray(mean, np.float32)))


def init_variables(model: nn.Module, key: jax.Array, input_shape: tuple[int, ...]) -> Any:
  """Fresh variables of a model; `input_shape` is `(H, W, C)`."""
  return _init_fn(model)(key, jnp.zeros((1, *input_shape)))


@functools.lru_cache(maxsize=64)
def _init_fn(model: nn.Module) -> Callable[..., Any]:
  return jax.jit(functools.partial(model.init, train=False))


def create_state(variables: Any, recipe: Recipe) -> TrainState:
  """A state at step 0 with a fresh optimiser; not yet replicated."""
  params = variables['params']
  return TrainState(
    step=np.int32(0),
    params=params,
    batch_stats=variables.get('batch_stats', {}),
    opt_state=_optimizer(recipe).init(params),
  )


def learning_rates(schedule: str, lr: float, total_steps: int) -> np.ndarray:
  """The learning rate of every step, float32 `[total_steps]`.

  Cosine decay (Loshchilov and Hutter, 2017) goes from lr at step 0 to 0 at step `total_steps`.

  Raises:
    UserError: there is no such schedule, or lr is negative or not finite.
  """
  if schedule not in SCHEDULES:
    raise unknown_name('schedule', schedule, SCHEDULES)
  if not (np.isfinite(lr) and lr >= 0):
    raise UserError(f'the learning rate is {lr}; wanted a finite number of at least 0.')
  done = np.arange(total_steps, dtype=np.float64) / max(total_steps, 1)
  return (lr * SCHEDULES[schedule](done)).astype(np.float32)


def check_batch_size(batch_size: int, examples: int, what: str) -> None:
  """Checks that batches split over the devices and that the data fill at least one.

  Raises:
    UserError: they do not; `what` names the data.
  """
  devices, processes = jax.device_count(), jax.process_count()
  if batch_size < 1 or batch_size % devices:
    where = f' of {processes} processes' if processes > 1 else ''
    raise UserError(
      f'batch_size is {batch_size}; wanted a positive multiple of the {devices} devices{where}.'
    )
  if examples < batch_size:
    raise UserError(f'{what} has {examples} examples; wanted at least batch_size = {batch_size}.')


class Checkpoint(NamedTuple):
  """Where a training stands between two steps.

  Attributes:
    state: not replicated.
    sums: loss and accuracy summed over the steps of the unfinished epoch.
  """

  state: TrainState
  sums: tuple[float, float] = (0.0, 0.0)


def fit(
  model: nn.Module,
  start: Checkpoint,
  data: DeviceData,
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
    model: a Flax module with BatchNorm axis `AXIS`.
    start: `Checkpoint(create_state(...))`, or one that `save` was given.
    data: the whole data set.
    indices: the examples to train on, int32 `[n]`, n >= batch_size.
    recipe: what the state was created with.
    epochs: how many epochs make the whole training.
    batch_size: over all devices of all processes.
    lr: the first learning rate.
    schedule: a name in `SCHEDULES`.
    key: decides order and augmentation.
    on_epoch: called after each epoch with its number (1 is the first) and the mean training loss
      and accuracy.
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
    start, indices, epochs=epochs, batch_size=batch_size, lr=lr, schedule=schedule, key=key,
    on_epoch=on_epoch,
  )  # fmt: skip
  step_fn = train_step(model, recipe)
  state = replicate(start.state)
  saved = time.monotonic()
  wishes, all_stop = _Wishes(), False
  stop: BaseException | None = None

  def save_now() -> None:
    nonlocal saved
    if save:
      save(Checkpoint(unreplicate(state), course.sums()))
      saved = time.monotonic()

  while course.done < course.total and not all_stop:
    try:
      batch, rate = course.batch(), course.rate()
      # A signal in here waits until state, sums and what on_epoch wrote agree again.
      with uninterrupted():
        state, metrics = step_fn(state, data, batch, rate, course.augment_key)
        course.count(metrics)
        if (epoch := course.ended_epoch()) in show_after:
          show(epoch, unreplicate(state))
        due = time.monotonic() - saved > save_every_seconds
        all_stop, due = wishes.agreed(stop is not None, due)
        if all_stop or (due and course.done < course.total):
          save_now()
    except (KeyboardInterrupt, Terminated) as signal:
      if jax.process_count() == 1:
        save_now()
        raise
      # The others must hear of it before this process leaves.
      stop = stop or signal
  # What was wished during the last step, and since.
  if not all_stop and any(wishes.agreed(stop is not None, False)[0] for _ in range(2)):
    all_stop = True
    save_now()
  if all_stop:
    raise stop or Terminated
  trained = unreplicate(state)
  check_finite(trained, lr)
  return trained


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
    heard, self._told = self._told, _count_wishes()(rows)
    if heard is None:
      return (False,) * len(wishes)
    agreed = tuple(bool(count) for count in unreplicate(heard))
    if any(agreed):
      self._told = None  # Said before this was done, it may be settled by it.
    return agreed


@functools.cache
def _count_wishes() -> Callable[..., Any]:
  return jax.pmap(lambda x: jax.lax.psum(x, AXIS), AXIS)


def _here(rows: np.ndarray) -> np.ndarray:
  """The part of this process of `[steps, devices, ...]`: pmap counts devices process by process."""
  devices = jax.local_device_count()
  first = jax.process_index() * devices
  return rows[:, first : first + devices]


class Course:
  """The way of one run through its training: batch and rate of each step, metrics of each epoch.

  The arguments are those of `fit`.

  Attributes:
    done: steps done.
    total: steps of the whole training.
    augment_key: decides the augmentation.
  """

  def __init__(
    self,
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
    self._order_key, self.augment_key = jax.random.split(key)
    self._indices, self._batch_size, self._on_epoch = indices, batch_size, on_epoch
    self._sums, self._pending = start.sums, list[Any]()
    self._batches: Any = None

  def batch(self) -> np.ndarray:
    """This process's examples of the next step, `[local devices, batch_size / devices]`."""
    epoch, i = divmod(self.done, self._steps)
    if self._batches is None or i == 0:
      key = jax.random.fold_in(self._order_key, epoch)
      order = np.asarray(jax.random.permutation(key, self._indices))
      order = order[: self._steps * self._batch_size]
      self._batches = _here(order.reshape(self._steps, jax.device_count(), -1))
    return self._batches[i]

  def ended_epoch(self) -> int:
    """The number of the epoch that the last step ended, 1 for the first; -1 within an epoch."""
    epoch, i = divmod(self.done, self._steps)
    return -1 if i else epoch

  def rate(self) -> np.float32:
    """The learning rate of the next step."""
    return self._rates[self.done]

  def count(self, metrics: Any, place: tuple[int, ...] = (0,)) -> None:
    """Counts a step, and calls `on_epoch` after the last one of an epoch.

    Args:
      metrics: what the compiled step gave.
      place: where in its arrays this run's numbers are.

    Raises:
      DivergedError: the loss of the epoch is not finite.
    """
    self._pending.append((metrics, place))
    self.done += 1
    epoch, i = divmod(self.done, self._steps)
    if i:
      return
    loss, accuracy = (total / self._steps for total in self.sums())
    self._sums, self._pending = (0.0, 0.0), []
    if not np.isfinite(loss):
      raise DivergedError(
        f'the loss is {loss} in epoch {epoch} at learning rate {self._lr}; wanted a finite one.'
      )
    self._on_epoch(epoch, {'loss': loss, 'accuracy': accuracy})

  def sums(self) -> tuple[float, float]:
    """Loss and accuracy summed over the steps of the unfinished epoch."""
    loss, accuracy = self._sums
    steps = jax.device_get([metrics for metrics, _ in self._pending])
    # One after the other, so that a resumed sum has the same bits.
    for step, (_, place) in zip(steps, self._pending, strict=True):
      loss, accuracy = loss + float(step[0][place]), accuracy + float(step[1][place])
    return loss, accuracy


def check_finite(trained: TrainState, lr: float) -> None:
  """Checks the weights after the last step, whose loss is that before its update.

  Raises:
    DivergedError: a leaf of params or batch_stats holds NaN or infinity.
  """
  for path, leaf in trees.named_leaves(trained.variables).items():
    if not np.isfinite(leaf).all():
      raise DivergedError(
        f'leaf {path!r} holds NaN or infinity after the last step at learning rate {lr}; wanted '
        'finite weights.'
      )


def evaluate(
  model: nn.Module, variables: Any, data: DeviceData, *, batch_size: int = 512
) -> dict[str, float]:
  """Mean cross-entropy and accuracy over a data set, with running statistics.

  Args:
    model: a Flax module.
    variables: its variables, not replicated.
    data: the data set.
    batch_size: examples a device takes at a time.

  Returns:
    `{'loss': ..., 'accuracy': ...}`; accuracy in [0, 1].
  """
  size, devices = data.labels.shape[1], jax.device_count()
  per_device = min(batch_size, -(-size // devices))
  batch = per_device * devices
  padded = np.arange(-(-size // batch) * batch, dtype=np.int32)
  replicated = replicate(variables)
  batches = _here(padded.reshape(-1, devices, per_device))
  sums = [eval_step(model)(replicated, data, index) for index in batches]
  # Each is over all devices of all processes.
  totals = np.sum([[float(x[0]) for x in s] for s in jax.device_get(sums)], axis=0)
  return {'loss': totals[0] / size, 'accuracy': totals[1] / size}


@functools.lru_cache(maxsize=64)
def train_step(model: nn.Module, recipe: Recipe) -> Callable[..., Any]:
  """The pmapped train step: (state, data, indices [local devices, b], lr, key) -> state, metrics.

  Metrics are the mean loss and accuracy of the global batch, before the update.
  """
  step = _step(model, recipe)
  return jax.pmap(step, AXIS, in_axes=(0, 0, 0, None, None), donate_argnums=0)


@functools.lru_cache(maxsize=64)
def group_step(model: nn.Module, recipe: Recipe, how: str) -> Callable[..., Any]:
  """The pmapped step of several runs: as `train_step`, with an axis of runs.

  (states, data, indices [local devices, runs, b], lrs [runs], keys [runs]) -> states, metrics.
  Leaves of states, data and metrics are `[local devices, runs, ...]`.

  Args:
    model: as in `fit`.
    recipe: as in `fit`.
    how: 'vmap' or 'unroll'.
  """
  step = _step(model, recipe)

  def unrolled(*args: Any) -> Any:
    runs = args[-1].shape[0]
    found = [step(*jax.tree.map(lambda x, i=i: x[i], args)) for i in range(runs)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

  group = jax.vmap(step) if how == 'vmap' else unrolled
  return jax.pmap(group, AXIS, in_axes=(0, 0, 0, None, None), donate_argnums=0)


def _step(model: nn.Module, recipe: Recipe) -> Callable[..., Any]:
  """One step of one run on one device of `AXIS`."""

  def step(state: TrainState, data: DeviceData, index: Any, lr: Any, key: Any) -> Any:
    size = index.shape[0]
    images = to_device_input(data.images[index], data.mean)
    place = jax.lax.axis_index(AXIS) * size + jnp.arange(size)
    step_key = jax.random.fold_in(key, state.step)
    keys = jax.vmap(functools.partial(jax.random.fold_in, step_key))(place)
    images = augment(keys, images, recipe.augmentation)
    labels = data.labels[index]

    def loss_fn(params: Any, images: Any, labels: Any) -> Any:
      variables = variables_dict(params, state.batch_stats)
      logits, updated = model.apply(variables, images, train=True, mutable=['batch_stats'])
      loss, correct = _loss_and_correct(logits, labels)
      return loss.sum() / size, (correct.sum() / size, updated.get('batch_stats', {}))

    # BatchNorm needs its whole batch.
    sizes = (size,) if state.batch_stats else microbatches(size)
    cuts = np.cumsum(sizes)[:-1]
    found = [
      jax.value_and_grad(loss_fn, has_aux=True)(state.params, *part)
      for part in zip(jnp.split(images, cuts), jnp.split(labels, cuts), strict=True)
    ]
    (loss, (accuracy, batch_stats)), grads = jax.tree.map(lambda *x: sum(x), *found)
    grads, loss, accuracy, batch_stats = jax.lax.pmean((grads, loss, accuracy, batch_stats), AXIS)
    updates, opt_state = _optimizer(recipe).update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p - lr.astype(p.dtype) * u, state.params, updates)
    return TrainState(state.step + 1, params, batch_stats, opt_state), (loss, accuracy)

  return step


def microbatches(batch_size: int) -> tuple[int, ...]:
  """The sizes of the parts of one device's images whose gradients a step takes and adds.

  On a CPU most operations of a small network, convolutions above all, run on one core only, but
  XLA runs operations that do not wait for each other on different cores: parts of a batch are
  such. Parts of two sizes do not stand at the same operation at the same time, so that both cores
  find work more often. Smaller parts cost more than they save, as do more of them, which take
  longer to compile; a convolution takes up to 1.4 times as long if its images are no multiple of
  4, so that the rest is a part of its own. Where there are other devices, they have the cores.
  """
  if jax.default_backend() != 'cpu' or jax.local_device_count() > 1 or batch_size < 32:
    return (batch_size,)
  large = max(16, 8 * round(batch_size / 64))
  small = 16 if batch_size < 128 else large // 2
  count = 0 if small == large else 4
  smaller, rest = divmod(batch_size - count * large, small)
  return (large,) * count + (small,) * smaller + ((rest,) if rest else ())


@functools.lru_cache(maxsize=64)
def eval_step(model: nn.Module) -> Callable[..., Any]:
  """The pmapped eval step: (variables, data, indices [local devices, b]) -> sums of loss, correct.

  Indices beyond the end of the data are padding and count nothing.
  """

  def step(variables: Any, data: DeviceData, index: Any) -> Any:
    real = index < data.labels.shape[0]
    index = jnp.where(real, index, 0)
    images = to_device_input(data.images[index], data.mean)
    logits: Any = model.apply(variables, images, train=False)
    loss, correct = _loss_and_correct(logits, data.labels[index])
    return jax.lax.psum(((loss * real).sum(), (correct * real).sum()), AXIS)

  return jax.pmap(step, AXIS)


def _loss_and_correct(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
  logits = logits.astype(jnp.float32)
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return loss, (logits.argmax(-1) == labels).astype(jnp.float32)


def _decayed(
  direction: optax.GradientTransformation, decoupled: float, coupled: float
) -> optax.GradientTransformation:
  """Weight decay of kernels, before the direction (a penalty) or after it (decoupled)."""

  def kernels(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)

  parts = [direction]
  if coupled:
    parts.insert(0, optax.add_decayed_weights(coupled, kernels))
  if decoupled:
    parts.append(optax.add_decayed_weights(decoupled, kernels))
  return optax.chain(*parts)


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
  optimizer = OPTIMIZERS[recipe.optimizer](recipe.weight_decay)
  if not recipe.frozen:
    return optimizer

  def labels(params: Any) -> Any:
    paths, treedef = trees.leaf_paths(params), jax.tree.structure(params)
    moving = ['frozen' if path in recipe.frozen else 'moving' for path in paths]
    return jax.tree.unflatten(treedef, moving)

  return optax.multi_transform({'moving': optimizer, 'frozen': optax.set_to_zero()}, labels)


def replicate(tree: Any) -> Any:
  """A copy of every leaf on every device of this process, `[local devices, ...]`, for pmap."""
  devices = jax.local_device_count()
  stacked = jax.tree.map(
    lambda x: np.broadcast_to(x, (devices, *np.shape(x))), jax.device_get(tree)
  )
  return _identity()(stacked)


@functools.cache
def _identity() -> Callable[..., Any]:
  # Under the axis name of the steps: arrays laid out under another would make each compile twice.
  return jax.pmap(lambda x: x, AXIS)


def unreplicate(tree: Any) -> Any:
  """The copy of this process's first device, as NumPy arrays."""
  # The shard that lies there: indexing the whole would compile and run for every shape.
  first = jax.tree.map(lambda x: x.addressable_shards[0].data, tree)
  # Copied, as the next step may be given its memory.
  return jax.tree.map(lambda x: np.array(x[0]), jax.device_get(first))
