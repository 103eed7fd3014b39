"""The forgetting run: train on all data, then fine-tune on ever smaller nested subsets of it.

The paper, section 3: D^0 is the training set, D^i a random subset of D^(i-1) with r |D^(i-1)|
examples; Theta^0 is trained on D^0, Theta^i is Theta^(i-1) fine-tuned on D^i with a fresh optimiser
and schedule. Read backwards, the weights walk towards more data.

A workdir holds `record.json` (config, versions, subset sizes, accuracies), `metrics.jsonl`,
`tensorboard/`, and one checkpoint for each stage in `stages/0` (all data) to `stages/<S-1>`.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from know_jax import trees
from know_jax.data.subsets import check_subsets, nested_subsets
from know_jax.errors import UserError
from know_jax.fields import Given, check_least, config_dict, editable, read_config
from know_jax.io import checkpoints
from know_jax.io.files import alone, local_path, remove_tree
from know_jax.models.common import Classifier
from know_jax.models.convert import Start, start_from
from know_jax.runs.metrics import MetricsLog, OnMetrics, find_callback
from know_jax.runs.record import RunRecord
from know_jax.runs.workdir import KIND, restore_stage, stage_path
from know_jax.seeds import named_key
from know_jax.system.processes import check_same, from_first, in_all, is_first
from know_jax.system.progress import progress
from know_jax.tasks import load_task
from know_jax.tasks.base import DataFields, NetworkFields, Task
from know_jax.training import loop
from know_jax.training.state import (
  Checkpoint,
  Recipe,
  TrainState,
  create_state,
  from_tree,
  learning_rates,
  to_tree,
)
from know_jax.training.steps import Data, put_data


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeFields:
  """The config fields that say how weights are updated."""

  batch_size: int = 32
  lr: float = 1e-3
  schedule: str = 'cosine'
  optimizer: str = 'adam'
  epsilon: float = Recipe.epsilon  # Of Adam.
  weight_decay: float = 0.0
  # Where memory is short: a batch in so many parts, one after the other (BatchNorm then sees a
  # part at a time); and activations computed anew for the gradient in place of being kept.
  accumulate: int = 1
  remat: bool = False

  def __post_init__(self) -> None:
    self.recipe()
    learning_rates(self.schedule, self.lr, 1)

  def recipe(self) -> Recipe:
    """The recipe of these fields; see also `recipe_of`."""
    return Recipe(
      self.optimizer, self.weight_decay, epsilon=self.epsilon, accumulate=self.accumulate,
      remat=self.remat,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceFields(RecipeFields, NetworkFields, DataFields):
  """Every config field of a forgetting run but its seed."""

  dataset: str = 'digits'
  # D^0: this many training examples, drawn by seed and by class; 0: all.
  train_examples: int = 0
  # start: a file of weights that the pre-training starts from, such as timm's or Keras' of
  # ImageNet, or a checkpoint of this project.
  model: str = 'cnn'
  start: str | None = None
  # Forgetting: S stages (the pre-training is the first), sampling rate r.
  stages: int = 5
  rate: float = 0.5
  stratified: bool = False
  # Training of a stage; stage_* None: as in pre-training.
  epochs: int = 30
  stage_epochs: int | None = None
  stage_lr: float | None = None
  # A checkpoint to resume from within a stage is written at most this often.
  save_every_seconds: float = 60.0

  def __post_init__(self) -> None:
    super().__post_init__()
    check_least(self, 1, 'stages')
    for stage in range(min(self.stages, 2)):
      self.training_of(stage)

  def training_of(self, stage: int) -> tuple[int, float]:
    """Epochs and learning rate of a stage."""
    epochs, lr = self.epochs, self.lr
    if stage:
      epochs = epochs if self.stage_epochs is None else self.stage_epochs
      lr = lr if self.stage_lr is None else self.stage_lr
    if epochs < 1:
      raise UserError(f'stage {stage} has {epochs} epochs; expected at least 1.')
    learning_rates(self.schedule, lr, 1)
    return epochs, lr


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SourceFields):
  """Every config field of a forgetting run."""

  seed: int = 0


def default_config() -> ConfigDict:
  """Every field of a forgetting run, with the defaults that configs start from: see `Config`."""
  return editable(Config())


def run(
  config: Config | Given,
  workdir: str | Path,
  *,
  show_progress: bool = True,
  on_metrics: OnMetrics | str | None = None,
) -> RunRecord:
  """Runs all stages, or what is left of them, and returns the record.

  Several processes (`processes.start`) train one run together: all call this with the same
  arguments. It may resume with other numbers of devices and processes.

  Args:
    config: the fields of `Config`, in a ConfigDict or a mapping.
    workdir: where everything is written; a workdir of the same config resumes. All processes must
      see it; process 0 writes to it.
    show_progress: whether each stage shows its progress bar (in process 0).
    on_metrics: called with the metrics of every epoch, see `runs.metrics.OnMetrics`; or its name,
      'package.module:function'.

  Returns:
    The record, complete.

  Raises:
    UserError: a value does not fit, or the workdir belongs to another config.
    DivergedError: the loss, or a weight, is no longer finite.
  """
  # All is checked before anything is written.
  checked = in_all(lambda: read_config(Config, config))
  check_same(config_dict(checked), 'config')
  told = in_all(lambda: find_callback(on_metrics))
  run_ = in_all(lambda: _prepare(checked))(Path(workdir).expanduser())
  from_first(lambda: _check_stages(run_.workdir, run_.stages_done))
  if run_.start is not None and show_progress and is_first():
    print(account(run_.record['start']))
  with contextlib.ExitStack() as stack:
    if run_.unfinished:
      from_first(lambda: stack.enter_context(alone(run_.workdir)))
      # Another process may just have finished it.
      run_.record = in_all(lambda: RunRecord.read(run_.workdir, KIND))
    while run_.unfinished:
      _train_stage(run_, show_progress, told)
  return run_.record


@dataclasses.dataclass
class _Run:
  """A run under way: what its config settles, and where it stands."""

  config: Config
  workdir: Path
  task: Task
  subsets: list[np.ndarray]
  plans: list[dict[str, Any]]
  recipe: Recipe
  record: RunRecord
  start: Start | None

  @functools.cached_property
  def data(self) -> tuple[Data, Data]:
    """The training and the test set, on the devices."""
    return put_data(self.task)

  @property
  def stages_done(self) -> int:
    return len(self.record.get('stages', []))

  @property
  def unfinished(self) -> bool:
    return self.stages_done < len(self.subsets)


def _prepare(config: Config) -> Callable[[Path], _Run]:
  """Checks a run's config; what it gives opens the run's workdir, the first to be written."""
  task = load_task(config)
  subsets = subsets_of(task, config)
  plans = [stage_plan(config, stage, len(s)) for stage, s in enumerate(subsets)]
  recipe = recipe_of(config)
  start = _start(task, config)
  params = jax.eval_shape(lambda: task.init(jax.random.key(0)))['params']

  def open_run(workdir: Path) -> _Run:
    record = RunRecord.open(workdir, config, kind=KIND)
    record.update(
      subset_sizes=[len(s) for s in subsets],
      parameters=trees.num_weights(params),
      score=task.score,
      **task.about,
    )
    if start is not None:
      about = {'taken': len(start.taken), 'skipped': start.skipped, 'fresh': start.fresh}
      record.update(start={'file': config.start, **about})
    return _Run(config, workdir, task, subsets, plans, recipe, record, start)

  return open_run


def _check_stages(workdir: Path, done: int) -> None:
  """Raises a `UserError` where a stage that the record calls trained is gone or damaged."""
  for stage in range(done):
    try:
      checkpoints.verify(stage_path(workdir, stage))
    except UserError as error:
      raise UserError(
        f'{error} The record says that this stage was trained. Restore it, or take another '
        f'--workdir, or remove record.json, metrics.jsonl and stages from {workdir} to train all '
        'stages again.'
      ) from error


def _start(task: Task, config: Config) -> Start | None:
  """The weights that the pre-training starts from, where the config names some."""
  if config.start is None:
    return None
  module = getattr(task.model, 'module', None)
  if not isinstance(module, Classifier):
    raise UserError(
      f'start is {config.start!r}, but model {config.model!r} of task {config.task!r} is none of '
      'know_jax.models; expected None.'
    )
  path = local_path(config.start, 'start')
  path = stage_path(path, 0) if (path / 'stages').is_dir() else path
  return start_from(module, path, task.init(named_key(config.seed, 'init')))


def account(start: Mapping[str, Any]) -> str:
  """What was taken from the file that a run started from, as its record has it."""

  def listed(names: list[str]) -> str:
    return ', '.join(names[:8]) + (f' and {len(names) - 8} more' if len(names) > 8 else '') or '-'

  return (
    f'start: {start["taken"]} tensors taken from {start["file"]}\n'
    f'  skipped, of the file: {listed(start["skipped"])}\n'
    f'  made anew, of the network: {listed(start["fresh"])}'
  )


def subsets_of(task: Task, config: Config) -> list[np.ndarray]:
  """The examples of every stage, all of the training set first.

  Raises:
    UserError: a stage cannot be trained on them.
  """
  strata = task.train.strata
  if config.stratified and strata is None:
    raise UserError(f'stratified is True, but {task.name} has no classes; expected False.')
  subsets = nested_subsets(
    named_key(config.seed, 'subsets'),
    np.zeros(task.train.size, np.int32) if strata is None else strata,
    rate=config.rate,
    phases=config.stages,
    stratified=config.stratified,
  )
  check_subsets(subsets, strata, batch_size=config.batch_size)
  loop.check_batch_size(config.batch_size, len(subsets[-1]), 'the smallest subset')
  return subsets


def stage_plan(config: SourceFields, stage: int, examples: int) -> dict[str, Any]:
  """Epochs, steps and learning rate of one stage."""
  epochs, lr = config.training_of(stage)
  return {'epochs': epochs, 'lr': lr, 'steps': epochs * (examples // config.batch_size)}


def recipe_of(config: RecipeFields) -> Recipe:
  """The recipe of a config.

  Raises:
    UserError: a batch cannot be had in as many parts, on as many devices.
  """
  parts, batch_size = config.accumulate, config.batch_size
  if parts > 1 and batch_size % (parts * jax.device_count()):
    raise UserError(
      f'batch_size is {batch_size} and accumulate {parts}; expected a multiple of {parts} on each '
      f'of the {jax.device_count()} devices.'
    )
  return config.recipe()


def _resume_path(workdir: Path) -> Path:
  return workdir / 'resume'


def _train_stage(run: _Run, show_progress: bool, on_metrics: OnMetrics | None) -> None:
  """Trains the next stage of a run, from the checkpoint within it if there is one."""
  stage, config, workdir = run.stages_done, run.config, run.workdir
  plan, recipe = run.plans[stage], run.recipe
  epochs_before = sum(plan['epochs'] for plan in run.plans[:stage])

  def initial() -> Any:
    if stage:
      return restore_stage(workdir, stage - 1)
    if run.start is not None:
      return run.start.variables
    return run.task.init(named_key(config.seed, 'init'))

  variables = in_all(initial)
  start, seconds_before = Checkpoint(create_state(variables, recipe)), 0.0
  resume = _resume_path(workdir)
  metadata = from_first(
    lambda: checkpoints.read_metadata(resume) if checkpoints.exists(resume) else {}
  )
  if metadata.get('stage') == stage:
    start = from_tree(start.state, in_all(lambda: checkpoints.restore(resume)))
    seconds_before = metadata['seconds']
  else:
    # What a kill left of the stage before, maybe half removed, and so nothing that `save` replaces.
    from_first(lambda: remove_tree(resume))
  epoch_before = int(start.state.step) * plan['epochs'] // plan['steps']
  began = time.monotonic()

  def seconds() -> float:
    return seconds_before + time.monotonic() - began

  with contextlib.ExitStack() as stack:
    log: MetricsLog

    def open_log() -> None:
      nonlocal log
      resume_step = epochs_before + epoch_before
      log = stack.enter_context(MetricsLog(workdir, resume_step=resume_step, on_metrics=on_metrics))

    from_first(open_log)
    bar = stack.enter_context(
      progress(
        plan['epochs'],
        f'stage {stage}',
        'epoch',
        initial=epoch_before,
        show=show_progress and is_first(),
      )
    )

    def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
      step = epochs_before + epoch
      from_first(lambda: log.write(step, stage=stage, epoch=epoch, **metrics))
      bar.set_postfix({name: f'{value:.3f}' for name, value in metrics.items()})
      bar.update(1)

    def save(checkpoint: Checkpoint) -> None:
      from_first(lambda: log.sync())
      checkpoints.save(
        resume,
        to_tree(checkpoint),
        metadata={'stage': stage, 'seconds': seconds()},
        overwrite=True,
      )

    state = loop.fit(
      run.task,
      start,
      run.data[0],
      run.subsets[stage],
      recipe=recipe,
      epochs=plan['epochs'],
      batch_size=config.batch_size,
      lr=plan['lr'],
      schedule=config.schedule,
      key=named_key(config.seed, 'train', stage),
      on_epoch=on_epoch,
      save=save,
      save_every_seconds=config.save_every_seconds,
    )
    train_seconds = seconds()
    from_first(lambda: log.sync())
    _keep_stage(run, state, train_seconds)


def _keep_stage(run: _Run, state: TrainState, seconds: float) -> None:
  """Evaluates a trained stage, writes its checkpoint and adds it to the record."""
  stage = run.stages_done
  metrics = loop.evaluate(run.task, state.variables, run.data[1])
  summary = {
    'stage': stage,
    'examples': len(run.subsets[stage]),
    **{f'test_{name}': value for name, value in metrics.items()},
  }
  path = stage_path(run.workdir, stage)
  checkpoints.save(path, state.variables, metadata=summary, overwrite=True)
  stages = [*run.record.get('stages', []), {**summary, 'train_seconds': seconds}]
  run.record.update(stages=stages)
  from_first(lambda: remove_tree(_resume_path(run.workdir)))
