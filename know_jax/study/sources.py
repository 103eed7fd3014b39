"""The source side of a study: forgetting runs, and the start that each arm makes of one."""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from know_jax import forgetting, trees
from know_jax import kinds as kinds_
from know_jax.errors import UserError
from know_jax.fields import read_config
from know_jax.io import checkpoints
from know_jax.nowcast import api
from know_jax.runs.workdir import finished_record, restore_stage
from know_jax.seeds import named_key
from know_jax.study.arms import LARGER, Arm, can_predict, theta_of
from know_jax.study.parts import HISTORIES, PARTS, SCALED_BIASES, scaled_biases
from know_jax.tasks import load_task
from know_jax.tasks.base import Task
from know_jax.training import loop
from know_jax.training.batch_norm import settled
from know_jax.training.steps import Data, put_data

RECALIBRATION = (10, 128)
"""Batches and images in each for the BatchNorm policy `recalibrate`; fewer where there are not."""


@dataclasses.dataclass(frozen=True)
class Source:
  """One forgetting run: its share (`amount`) of the source's training examples, its seed, and r."""

  amount: float
  seed: int
  rate: float

  @property
  def name(self) -> str:
    """Of its folder."""
    return f'{self.amount:g}-{self.seed}-r{self.rate:g}'


def source_config(
  config: forgetting.SourceFields, source: Source, examples: int
) -> forgetting.Config:
  """The config of a source's forgetting run, with its share of `examples`, the largest amount."""
  full = forgetting.Config(**vars(config) | {'seed': source.seed, 'rate': source.rate})
  if source.amount == 1:
    return full
  return dataclasses.replace(full, train_examples=round(source.amount * examples))


def larger_task(settings: forgetting.Config, task: Task, step: int) -> Task:
  """The task of a forgetting run with r^-step times the training examples.

  Those of the run are among them, and images are prepared as in the run: only the data differ.

  Args:
    settings: of the run.
    task: what they name.
    step: n of r^-n.

  Raises:
    UserError: there are not as many examples.
  """
  examples = round(task.train.size * settings.rate**-step)
  about = f'{LARGER} x{settings.rate**-step:.3g} needs {examples} training examples'
  try:
    larger = load_task(dataclasses.replace(settings, train_examples=examples))
  except UserError as error:
    raise UserError(f'{about}: {error}') from error
  if larger.train.size != examples:
    raise UserError(f'{about}; {task.name} gives {larger.train.size}.')
  return dataclasses.replace(larger, prepare=task.prepare)


class Run:
  """A finished forgetting run in memory, its stages oldest first, and what arms make of it."""

  def __init__(self, workdir: Path):
    self.workdir = workdir
    self.record = finished_record(workdir)
    self.settings = read_config(forgetting.Config, self.record['config'], only=True)
    self._task = load_task(self.settings)
    count = self.settings.stages
    self.stages = [restore_stage(workdir, i) for i in range(count - 1, -1, -1)]

  @property
  def head(self) -> Callable[[str], bool]:
    """Which leaves are the head: see `Task`."""
    return self._task.head

  @functools.cached_property
  def _data(self) -> tuple[Data, Data]:
    return put_data(self._task)

  def start(self, arm: Arm) -> tuple[Any, float]:
    """The variables that an arm transfers, on the host, and the seconds it took to make them.

    Trained arms are kept as checkpoints beside the stages.

    Raises:
      DivergedError: a trained arm diverged.
    """
    if arm.predictor == 'incremental':
      return self._kept(f'incremental-{arm.history}', self._incremental, arm.history)
    if arm.predictor == 'extra':
      return self._kept(f'extra-{arm.history}', self._extra, arm.history)
    if arm.predictor == LARGER:
      return self._kept(f'{LARGER}-{arm.step}', self._larger, arm.step)
    began = time.monotonic()
    variables = jax.device_get(self._predict(arm, self.stages[-arm.history :]))
    seconds = time.monotonic() - began
    batches, size = RECALIBRATION
    size = min(size, self._task.train.size)
    batches = min(batches, self._task.train.size // size)
    variables = settled(arm.batch_norm, self._task, variables, num_batches=batches, batch_size=size)
    return jax.device_get(variables), seconds

  def _kept(self, name: str, train: Callable[[int], Any], number: int) -> tuple[Any, float]:
    path = self.workdir / name
    if not checkpoints.exists(path):
      began = time.monotonic()
      variables = train(number)
      metadata = {'seconds': time.monotonic() - began}
      checkpoints.save(path, variables, metadata=metadata, overwrite=True)
    return checkpoints.restore(path), checkpoints.read_metadata(path)['seconds']

  def _incremental(self, history: int) -> Any:
    """Trains on the smallest subset, then on each larger one in turn, last on all data.

    Each for as long as its forgetting stage took: what the stages cost, in the other order.
    """
    config, task = self.settings, self._task
    variables = task.init(named_key(config.seed, 'init'))
    subsets = forgetting.subsets_of(task, config)
    for stage in range(history - 1, -1, -1):
      plan = forgetting.stage_plan(config, stage, len(subsets[stage]))
      variables = self._fit(
        variables, subsets[stage], plan['epochs'], plan['lr'], 'incremental', stage
      )
    return variables

  def _extra(self, history: int) -> Any:
    """Trains Theta^0 on all data for as many steps as its forgetting stages took."""
    steps = extra_steps(self.settings, self.record['subset_sizes'], history)
    examples = self._task.train.size
    # One epoch of exactly so many steps: every example is in it equally often, or once more.
    indices = np.resize(np.arange(examples, dtype=np.int32), steps * self.settings.batch_size)
    lr = forgetting.stage_plan(self.settings, 1, examples)['lr']
    return self._fit(self.stages[-1], indices, 1, lr, 'extra')

  def _larger(self, step: int) -> Any:
    """Trains as Theta^0 was, from the same start, on r^-step times the data."""
    larger = larger_task(self.settings, self._task, step)
    variables = larger.init(named_key(self.settings.seed, 'init'))
    epochs, lr = self.settings.training_of(0)
    indices = np.arange(larger.train.size, dtype=np.int32)
    data = Data(larger.train, larger.prepare)
    return self._fit(variables, indices, epochs, lr, LARGER, step, data=data)

  def _fit(
    self, variables: Any, indices: Any, epochs: int, lr: float, *names: str | int,
    data: Data | None = None,
  ) -> Any:  # fmt: skip
    config = self.settings
    return loop.train(
      self._task, variables, data or self._data[0], indices, recipe=forgetting.recipe_of(config),
      epochs=epochs, batch_size=config.batch_size, lr=lr, schedule=config.schedule,
      key=named_key(config.seed, *names),
    )  # fmt: skip

  def _predict(self, arm: Arm, history: Sequence[Any]) -> Any:
    kinds = kinds_.leaf_kinds(self.stages[-1], self._task.kinds)

    def only(path: str, leaf: Any) -> str:
      del leaf
      return kinds[path] if kinds[path] in (arm.kinds or kinds_.KINDS) else kinds_.KEEP

    if arm.order:
      history = HISTORIES[arm.order](history)
    if arm.part == SCALED_BIASES:
      return scaled_biases(history, arm.step, theta_of(arm.theta))
    predicted = api.predict(
      history,
      arm.step,
      predictor=arm.predictor,
      theta=None if arm.theta is None else theta_of(arm.theta),
      rate=arm.rate,
      kinds=only,
      on_bad='ignore',  # Predictors are compared as they are.
      **dict(arm.options),
    )
    return PARTS[arm.part](history[-1], jax.device_get(predicted)) if arm.part else predicted

  def scores(self, arm: Arm, variables: Any) -> dict[str, Any]:
    """What is known of a start before it is transferred.

    `source_accuracy` and `source_loss` on the source's test set; `weight_norm`, that of the
    predicted kinds of leaf below the head over that of Theta^0; `retrodiction`: see there.
    """
    metrics = loop.evaluate(self._task, variables, self._data[1])
    newest = self.stages[-1]
    norm, newest_norm = (np.linalg.norm(self._flat(x, kinds_.KINDS)) for x in (variables, newest))
    return {
      'source_accuracy': metrics[self._task.score],
      'source_loss': metrics['loss'],
      'weight_norm': float(norm / newest_norm),
      'retrodiction': self.retrodiction(arm),
    }

  def retrodiction(self, arm: Arm) -> dict[str, float]:
    """How well an arm's predictor finds the newest weight from older ones.

    The n newest stages are hidden, Theta^0 is predicted from the S newest of the others (fewer,
    where there are fewer and the predictor can do with them), and the mean absolute error is
    divided by that of copying Theta^n. Below 1 it is better than doing nothing.

    Returns:
      'all' and every kind that the network has below the head -> the ratio; nothing where the run
      has too few stages, or the arm predicts nothing or some kinds only.
    """
    seen = self.stages[: -arm.step] if arm.step else []
    if arm.kinds or not can_predict(arm, arm.step, len(seen[-arm.history :])):
      return {}
    predicted = jax.device_get(self._predict(arm, seen[-arm.history :]))
    groups = {'all': kinds_.KINDS, **{kind: (kind,) for kind in kinds_.KINDS}}
    result = {}
    for name, kinds in groups.items():
      truth, copied, guess = (self._flat(x, kinds) for x in (self.stages[-1], seen[-1], predicted))
      if truth.size and (distance := np.abs(copied - truth).mean()) > 0:
        result[name] = float(np.abs(guess - truth).mean() / distance)
    return result

  def _flat(self, variables: Any, kinds: Sequence[str]) -> np.ndarray:
    """The leaves of some kinds below the head as one float64 vector."""
    chosen = lambda path, kind: kind in kinds and not self._task.head(path)  # noqa: E731
    return kinds_.flatten(variables, self._task.kinds, chosen)


def extra_steps(settings: forgetting.Config, sizes: Sequence[int], history: int) -> int:
  """The training steps of the forgetting stages 1 to history - 1: what equal compute may spend."""
  plans = [forgetting.stage_plan(settings, i, sizes[i]) for i in range(1, history)]
  return sum(plan['steps'] for plan in plans)


def weights_digest(variables: Any, head: Callable[[str], bool] | None = None) -> str:
  """Identifies what is transferred: the SHA-256 of all leaves but the head's, which is new."""
  hashed = hashlib.sha256()
  for path, leaf in sorted(trees.named_leaves(jax.device_get(variables)).items()):
    if head is None or not head(path):
      hashed.update(f'{path} {leaf.dtype} {leaf.shape}\n'.encode())
      hashed.update(np.ascontiguousarray(leaf).tobytes())
  return hashed.hexdigest()
