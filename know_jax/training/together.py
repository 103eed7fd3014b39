"""Several runs of one network trained at once, for accelerators that one small net leaves idle."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from know_jax.errors import UserError, unknown_name
from know_jax.system.signals import Terminated, uninterrupted
from know_jax.training.loop import (
  Checkpoint,
  Course,
  DeviceData,
  DivergedError,
  Recipe,
  TrainState,
  check_finite,
  create_state,
  fit,
  group_step,
  init_variables,
  replicate,
  train_step,
  unreplicate,
)

WAYS = ('vmap', 'unroll', 'one_by_one')
"""How several runs can be trained; see `fit_together`."""


class Job(NamedTuple):
  """One of several trainings at once: the arguments of `fit` that are its own.

  Attributes:
    start: as in `fit`.
    data: as in `fit`; of the same image shape in all jobs, with as many examples as it likes.
    indices: as in `fit`.
    epochs: as in `fit`.
    lr: as in `fit`.
    schedule: as in `fit`.
    key: as in `fit`.
    on_epoch: as in `fit`.
    save: as in `fit`.
    on_trained: called with the trained state as soon as this training ends, be others unfinished.
  """

  start: Checkpoint
  data: DeviceData
  indices: np.ndarray
  epochs: int
  lr: float
  schedule: str
  key: jax.Array
  on_epoch: Callable[[int, dict[str, float]], None] = lambda epoch, metrics: None
  save: Callable[[Checkpoint], None] | None = None
  on_trained: Callable[[TrainState], None] = lambda state: None


def fit_together(
  model: nn.Module,
  jobs: Sequence[Job],
  *,
  recipe: Recipe,
  batch_size: int,
  how: str = 'auto',
  save_every_seconds: float = 60.0,
) -> list[TrainState | DivergedError]:
  """Trains several runs of one model and recipe at once; each as `fit` would, within rounding.

  Small networks leave an accelerator idle most of the time; several of them in one compiled step
  do not. Runs may stand at different steps and end at different times: one that has ended changes
  no more, when half of them have the rest goes on in a smaller step, and the last one alone.

  Args:
    model: as in `fit`.
    jobs: the trainings.
    recipe: what all states were created with.
    batch_size: over all devices.
    how: 'vmap': over the runs; 'unroll': one after the other within one compiled step;
      'one_by_one': by `fit`, a run after the other; 'auto': what would be fastest here, by the time
      that a few steps take (see `step_seconds`).
    save_every_seconds: as in `fit`.

  Returns:
    For each job the trained state, or the error if it diverged; the others do not notice.

  Raises:
    UserError: there is no such way, the jobs' images differ in shape, or there are several
      jobs and several processes.
  """
  if how not in ('auto', *WAYS):
    raise unknown_name('way to train together', how, ('auto', *WAYS))
  shapes = {job.data.images.shape[2:] for job in jobs}
  if len(shapes) > 1:
    raise UserError(f'images have the shapes {sorted(shapes)}; wanted one shape for all jobs.')
  fit_job = functools.partial(_fit_job, model, recipe, batch_size)
  if len(jobs) == 1:
    return [fit_job(jobs[0], save_every_seconds)]
  check_processes(len(jobs))
  courses = [
    Course(
      job.start, job.indices, epochs=job.epochs, batch_size=batch_size, lr=job.lr,
      schedule=job.schedule, key=job.key, on_epoch=job.on_epoch,
    )
    for job in jobs
  ]  # fmt: skip
  # A power of two, so that groups of data sets of many sizes share few compilations.
  examples = _power_of_two(max(job.data.labels.shape[1] for job in jobs))
  if how == 'auto':
    seconds = step_seconds(model, recipe, len(jobs), batch_size, examples, *shapes)
    how = fastest_way(seconds, [course.total - course.done for course in courses])
  jobs = [job._replace(data=_padded(job.data, examples)) for job in jobs]
  if how != 'one_by_one':
    return _Group(group_step(model, recipe, how), jobs, courses, fit_job).train(save_every_seconds)
  return [fit_job(job._replace(data=replicate(job.data)), save_every_seconds) for job in jobs]


def check_processes(runs: int) -> None:
  """Checks that several runs are not to be trained by several processes.

  Raises:
    UserError: they are.
  """
  if runs > 1 and (processes := jax.process_count()) > 1:
    raise UserError(f'{runs} runs and {processes} processes; wanted one of either.')


def _fit_job(
  model: nn.Module, recipe: Recipe, batch_size: int, job: Job, save_every_seconds: float
) -> TrainState | DivergedError:
  """Trains one run by `fit`."""
  options = {k: v for k, v in job._asdict().items() if k != 'on_trained'}
  try:
    state = fit(
      model, **options, recipe=recipe, batch_size=batch_size, save_every_seconds=save_every_seconds
    )
  except DivergedError as error:
    return error
  job.on_trained(state)
  return state


def _power_of_two(count: int) -> int:
  """The smallest power of two that is at least `count`."""
  return 1 << (count - 1).bit_length()


def _padded(data: DeviceData, examples: int) -> DeviceData:
  """The data set on the host, with black images that no index names added at its end."""
  host = unreplicate(data)
  missing = examples - len(host.labels)
  return dataclasses.replace(
    host,
    images=np.pad(host.images, ((0, missing), *[(0, 0)] * 3)),
    labels=np.pad(host.labels, (0, missing)),
  )


class _Group:
  """Runs in the slots of one compiled step.

  The step has no use for a slot whose run has ended: what becomes of it there is nobody's, as its
  state has been handed over before.
  """

  def __init__(
    self,
    step: Callable[..., Any],
    jobs: Sequence[Job],
    courses: Sequence[Course],
    fit_job: Callable[[Job, float], TrainState | DivergedError],
  ):
    self._step, self._fit = step, fit_job
    self._jobs, self._courses = jobs, courses
    self._results: list[Any] = [None] * len(jobs)
    # Of these nothing is left to save: they have diverged, or been handed over by on_trained.
    self._settled: set[int] = set()
    self._fill(list(range(len(jobs))), [job.start.state for job in jobs])

  def _fill(self, slots: list[int], states: Sequence[TrainState]) -> None:
    self._slots = slots
    self._states = replicate(_stack(states))
    self._data = replicate(_stack([self._jobs[run].data for run in slots]))
    self._keys = jnp.stack([self._courses[run].augment_key for run in slots])

  def _on_host(self) -> list[TrainState]:
    """The state of every slot."""
    states = unreplicate(self._states)
    return [
      jax.tree.map(lambda x, slot=slot: np.asarray(x[slot]), states)
      for slot in range(len(self._slots))
    ]

  def train(self, save_every_seconds: float) -> list[TrainState | DivergedError]:
    saved = time.monotonic()
    try:
      while len(running := self._settle()) > 1:
        self._shrink(running)
        batches = {run: self._courses[run].batch() for run in running}
        with uninterrupted():
          self._advance(batches)
          if time.monotonic() - saved > save_every_seconds:
            self._save()
            saved = time.monotonic()
    except (KeyboardInterrupt, Terminated):
      self._save()
      raise
    if running:
      # The last one goes on by itself, in a step that is smaller still.
      (run,) = running
      start = Checkpoint(self._on_host()[self._slots.index(run)], self._courses[run].sums())
      job = self._jobs[run]
      job = job._replace(start=start, data=replicate(job.data))
      self._results[run] = self._fit(job, save_every_seconds)
    return self._results

  def _shrink(self, running: list[int]) -> None:
    """Leaves runs that have ended behind when half of the slots are enough."""
    size = _power_of_two(len(running))
    if size > len(self._slots) // 2:
      return
    ended = [run for run in self._slots if run not in running]
    states = dict(zip(self._slots, self._on_host(), strict=True))
    slots = [*running, *ended][:size]
    with uninterrupted():
      self._fill(slots, [states[run] for run in slots])

  def _advance(self, batches: dict[int, np.ndarray]) -> None:
    """One step of the runs that have a batch."""
    blank = np.zeros_like(next(iter(batches.values())))
    index = np.stack([batches.get(run, blank) for run in self._slots], axis=1)
    rates = np.array(
      [self._courses[run].rate() if run in batches else 0.0 for run in self._slots], np.float32
    )
    self._states, metrics = self._step(
      self._states, self._data, index, rates, self._keys
    )  # fmt: skip
    for slot, run in enumerate(self._slots):
      if run in batches:
        try:
          self._courses[run].count(metrics, (0, slot))
        except DivergedError as error:
          self._results[run] = error
          self._settled.add(run)

  def _settle(self) -> list[int]:
    """Hands over the runs that have ended; returns those that have not."""
    ended = {
      run: slot
      for slot, run in enumerate(self._slots)
      if self._results[run] is None and self._courses[run].done == self._courses[run].total
    }
    states = self._on_host() if ended else []
    for run, slot in ended.items():
      try:
        check_finite(states[slot], self._jobs[run].lr)
      except DivergedError as error:
        self._results[run] = error
      else:
        self._results[run] = states[slot]
        self._jobs[run].on_trained(states[slot])
      self._settled.add(run)
    return [run for run in self._slots if self._results[run] is None]

  def _save(self) -> None:
    for run, state in zip(self._slots, self._on_host(), strict=True):
      save = self._jobs[run].save
      if save and run not in self._settled:
        save(Checkpoint(state, self._courses[run].sums()))


def _stack(trees_: Sequence[Any]) -> Any:
  """Trees of NumPy arrays, stacked on a new leading axis of every leaf."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *trees_)


def fastest_way(seconds: Mapping[str, float], steps: Sequence[int]) -> str:
  """The way in `WAYS` that ends first.

  Args:
    seconds: way -> seconds of one step of all runs, from `step_seconds`.
    steps: how many steps each run has left. Together, all take as long as the longest, since a
      run that has ended still costs time.
  """
  work = {
    way: time_ * (sum(steps) / len(steps) if way == 'one_by_one' else max(steps))
    for way, time_ in seconds.items()
  }
  return min(work, key=work.__getitem__)


@functools.lru_cache(maxsize=64)
def step_seconds(
  model: nn.Module,
  recipe: Recipe,
  runs: int,
  batch_size: int,
  examples: int,
  input_shape: tuple[int, ...],
  *,
  timed: int = 3,
) -> dict[str, float]:
  """Measures how long one step of several runs takes in each of `WAYS` on this machine's devices.

  Args:
    model: as in `fit`.
    recipe: as in `fit`.
    runs: how many train together.
    batch_size: over all devices.
    examples: size of each run's data set.
    input_shape: `(H, W, C)`.
    timed: steps to measure, after one that compiles.

  Returns:
    Way -> seconds of one step of all runs, of the fastest of the steps timed.
  """
  devices = jax.local_device_count()
  rng = np.random.default_rng(0)
  data = DeviceData(
    rng.integers(0, 256, (examples, *input_shape), np.uint8),
    np.zeros(examples, np.int32),
    np.full(input_shape, 0.5, np.float32),
  )
  variables = jax.device_get(init_variables(model, jax.random.key(0), input_shape))
  state = create_state(variables, recipe)
  index = rng.integers(0, examples, (devices, batch_size // devices), np.int32)
  key, rate = jax.random.key(0), np.float32(1e-3)
  alone = (replicate(state), replicate(data), index, rate, key)
  together = (
    _stack([state] * runs), _stack([data] * runs), np.stack([index] * runs, axis=1),
    np.full(runs, rate), jnp.stack([key] * runs),
  )  # fmt: skip
  found = {}
  step: Any
  arguments: Any
  for way in WAYS:
    if way == 'one_by_one':
      step, arguments, repeats = train_step(model, recipe), alone, runs
    else:
      step, repeats = group_step(model, recipe, way), 1
      arguments = (replicate(together[0]), replicate(together[1]), *together[2:])
    state, rest = arguments[0], arguments[1:]
    times = []
    for _ in range(timed + 1):
      began = time.perf_counter()
      for _ in range(repeats):
        state, _ = step(state, *rest)
      jax.block_until_ready(state)
      times.append(time.perf_counter() - began)
    found[way] = min(times[1:])
  return found
