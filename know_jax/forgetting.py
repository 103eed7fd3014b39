"""The forgetting run: train on all data, then fine-tune on ever smaller nested subsets of it.

The paper, section 3: D^0 is the training set, D^i a random subset of D^(i-1) with r |D^(i-1)|
examples; Theta^0 is trained on D^0, Theta^i is Theta^(i-1) fine-tuned on D^i with a fresh optimiser
and schedule. Read backwards, the weights walk towards more data.

A workdir holds `record.json` (config, versions, subset sizes, accuracies), `metrics.jsonl`,
`tensorboard/`, and one checkpoint for each stage in `stages/0` (all data) to `stages/<S-1>`.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from know_jax.data.augmentation import Augmentation
from know_jax.data.sources import Dataset, load_dataset, mean_image
from know_jax.data.subsets import check_subsets, nested_subsets
from know_jax.errors import UserError
from know_jax.io import checkpoints
from know_jax.io.files import remove_tree
from know_jax.models import build_model
from know_jax.runs.metrics import MetricsLog
from know_jax.runs.record import RunRecord, config_dict
from know_jax.seeds import named_key
from know_jax.system.processes import check_same, from_first, in_all, is_first
from know_jax.system.progress import progress
from know_jax.training import loop
from know_jax.training.loop import AXIS, Checkpoint, DivergedError, Recipe, TrainState
from know_jax.training.together import Job, check_processes, fit_together
from know_jax.trajectory import Trajectory

KIND = 'forget'
"""What `record.json` of a forgetting run says it is."""


def data_fields() -> dict[str, Any]:
  """The config fields that name a task's data, with their defaults."""
  return {
    # A TFDS name or 'digits'; classes: () for all, else those kept, relabelled 0, 1, ...
    'dataset': 'digits',
    'data_dir': placeholder(str),
    'classes': (),
    'image_size': (),
    'train_split': 'train',
    'test_split': 'test',
  }


def recipe_fields() -> dict[str, Any]:
  """The config fields that say how weights are updated, with their defaults."""
  return {
    'schedule': 'cosine',
    'optimizer': 'adam',
    'weight_decay': 0.0,
    'augmentation': {'rotation': 0.0, 'shift': 0.0, 'zoom': 0.0, 'flip': False},
  }


def default_config() -> ConfigDict:
  """Every field of a forgetting run, with the defaults that configs start from."""
  return ConfigDict(
    {
      'seed': 0,
      **data_fields(),
      # D^0: this many training examples, drawn by seed and by class; 0: all.
      'train_examples': 0,
      # Network: a name in know_jax.models.MODELS; width: None for the family's own.
      'model': 'cnn',
      'width': placeholder(int),
      'dtype': 'float32',
      # Forgetting: S stages (the pre-training is the first), sampling rate r.
      'stages': 5,
      'rate': 0.5,
      'stratified': False,
      # Training of a stage; stage_* None: as in pre-training.
      'epochs': 30,
      'stage_epochs': placeholder(int),
      'batch_size': 32,
      'lr': 1e-3,
      'stage_lr': placeholder(float),
      **recipe_fields(),
      # A checkpoint to resume from within a stage is written at most this often.
      'save_every_seconds': 60.0,
    }
  )


@dataclasses.dataclass(frozen=True)
class Task:
  """A classification task ready to train on.

  Attributes:
    train: the training set.
    test: the test set.
    mean: the mean of the training images / 255, float32 `[H, W, C]`.
    model: the network.
  """

  train: Dataset
  test: Dataset
  mean: np.ndarray
  model: nn.Module

  @property
  def input_shape(self) -> tuple[int, ...]:
    """`(H, W, C)`."""
    return self.train.images.shape[1:]


def load_splits(config: Mapping[str, Any]) -> tuple[Dataset, Dataset]:
  """The training and test set that `data_fields` name."""
  options = {
    'data_dir': config['data_dir'],
    'classes': tuple(config['classes']),
    'image_size': tuple(config['image_size']) or None,
  }
  train, test = (
    load_dataset(config['dataset'], config[split], **options)
    for split in ('train_split', 'test_split')
  )
  return train, test


def model_of(config: Mapping[str, Any], num_classes: int) -> nn.Module:
  """The network that the config of a forgetting run names, with a head of so many classes."""
  return build_model(
    config['model'],
    num_classes=num_classes,
    width=config['width'],
    dtype=config['dtype'],
    axis_name=AXIS,
  )


def load_task(config: Mapping[str, Any]) -> Task:
  """Loads the data and builds the network that the config of a forgetting run names."""
  train, test = load_splits(config)
  train = _draw(train, config['train_examples'], config['seed'])
  model = model_of(config, train.num_classes)
  return Task(train, test, mean_image(train.images), model)


def _draw(train: Dataset, examples: int, seed: int) -> Dataset:
  """A random part of a training set, with the classes' shares kept."""
  if examples == 0 or examples == len(train.labels):
    return train
  if not 0 < examples < len(train.labels):
    raise UserError(
      f'train_examples is {examples}; wanted 0 (all) to {len(train.labels)}, the size of '
      f'{train.name}/{train.split}.'
    )
  share = examples / len(train.labels)
  key = named_key(seed, 'train_examples')
  chosen = nested_subsets(key, train.labels, rate=share, phases=2, stratified=True)[1]
  return dataclasses.replace(train, images=train.images[chosen], labels=train.labels[chosen])


def run(config: ConfigDict, workdir: str | Path, *, show_progress: bool = True) -> RunRecord:
  """Runs all stages, or what is left of them, and returns the record.

  Several processes (`processes.start`) train one run together: all call this with the same
  arguments. It may be run on with other numbers of devices and processes.

  Args:
    config: the fields of `default_config`.
    workdir: where everything is written; a workdir of the same config is run on. All processes must
      see it; process 0 writes to it.
    show_progress: whether each stage shows its progress bar (in process 0).

  Returns:
    The record, complete.

  Raises:
    UserError: a value does not fit, or the workdir belongs to another config.
    DivergedError: the loss, or a weight, is no longer finite.
  """
  (result,) = _run_all([config], [workdir], how='one_by_one', show_progress=show_progress)
  if isinstance(result, DivergedError):
    raise result
  return result


def run_together(
  configs: Sequence[ConfigDict], workdirs: Sequence[str | Path], *, how: str = 'auto'
) -> list[RunRecord | DivergedError]:
  """Runs several forgetting runs at once, stage by stage; each as `run` would, within rounding.

  Each has a workdir of its own, with all that `run` leaves there, and is run on from what it finds
  there: in company, in another one, or alone. The seconds of a stage are then those that passed
  while it was trained, with the others beside it.

  Args:
    configs: the fields of `default_config`; the same in all that `compiled_fields` names.
    workdirs: one for each config.
    how: see `together.fit_together`.

  Returns:
    For each the record, complete, or the error if it diverged.

  Raises:
    UserError: a value does not fit, the configs have no compiled step in common, a workdir belongs
      to another config, or there are several processes.
  """
  return _run_all(configs, workdirs, how=how, show_progress=False)


def compiled_fields(config: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a run's config that its compiled steps depend on, and those of its data."""
  names = (*data_fields(), 'model', 'width', 'dtype', 'batch_size', *recipe_fields())
  # The rate of each step is an argument.
  return {name: config[name] for name in names if name != 'schedule'}


@dataclasses.dataclass
class _Run:
  """A run under way: what its config settles, and where it stands."""

  config: dict[str, Any]
  workdir: Path
  task: Task
  subsets: list[np.ndarray]
  plans: list[dict[str, Any]]
  recipe: Recipe
  record: RunRecord
  data: dict[str, loop.DeviceData] = dataclasses.field(default_factory=dict)

  @property
  def stages_done(self) -> int:
    return len(self.record.get('stages', []))

  @property
  def unfinished(self) -> bool:
    return self.stages_done < len(self.subsets)


def _run_all(
  configs: Sequence[ConfigDict], workdirs: Sequence[str | Path], *, how: str, show_progress: bool
) -> list[RunRecord | DivergedError]:
  plain = [config_dict(config) for config in configs]
  first = compiled_fields(plain[0])
  for config in plain[1:]:
    for name, value in compiled_fields(config).items():
      if value != first[name]:
        raise UserError(
          f'{name} is {first[name]!r} in one run and {value!r} in another; wanted the same in all '
          'that train together.'
        )
  check_processes(len(plain))
  for config in plain:
    check_same(config, 'config')
  # All are checked before the first writes.
  opens = in_all(lambda: [_prepare(config) for config in plain])
  runs = [open_(Path(w).expanduser()) for open_, w in zip(opens, workdirs, strict=True)]
  results: list[RunRecord | DivergedError] = [run.record for run in runs]
  left = {i: run for i, run in enumerate(runs) if run.unfinished}
  _put_data(list(left.values()))
  while left:
    with contextlib.ExitStack() as stack:
      jobs = [stack.enter_context(_stage_job(run, show_progress)) for run in left.values()]
      trained = fit_together(
        runs[0].task.model,
        jobs,
        recipe=runs[0].recipe,
        batch_size=plain[0]['batch_size'],
        how=how,
        save_every_seconds=min(run.config['save_every_seconds'] for run in left.values()),
      )
    for i, state in zip(list(left), trained, strict=True):
      if isinstance(state, DivergedError):
        results[i] = state
      if isinstance(state, DivergedError) or not runs[i].unfinished:
        del left[i]
  return results


def _prepare(config: dict[str, Any]) -> Callable[[Path], _Run]:
  """Checks a run's config; what it gives opens the run's workdir, the first to be written."""
  task = load_task(config)
  subsets = nested_subsets(
    named_key(config['seed'], 'subsets'),
    task.train.labels,
    rate=config['rate'],
    phases=config['stages'],
    stratified=config['stratified'],
  )
  check_subsets(
    subsets,
    task.train.labels,
    batch_size=config['batch_size'],
    num_classes=task.train.num_classes,
  )
  loop.check_batch_size(config['batch_size'], len(subsets[-1]), 'the smallest subset')
  plans = [stage_plan(config, stage, len(s)) for stage, s in enumerate(subsets)]
  recipe = recipe_of(config)
  params = _init(task, config)['params']

  def open_run(workdir: Path) -> _Run:
    record = RunRecord.open(workdir, config, kind=KIND)
    record.update(
      subset_sizes=[len(s) for s in subsets],
      class_names=list(task.train.class_names),
      parameters=int(sum(np.size(x) for x in jax.tree.leaves(params))),
    )
    return _Run(config, workdir, task, subsets, plans, recipe, record)

  return open_run


def _put_data(runs: Sequence[_Run]) -> None:
  """Copies the runs' data to the devices; the test images, the same for all, once."""
  test: loop.DeviceData | None = None
  for run in runs:
    task = run.task
    if test is None:
      test = loop.put_data(task.test.images, task.test.labels, task.mean)
    else:
      test = dataclasses.replace(test, mean=loop.replicate(task.mean))
    train = loop.put_data(task.train.images, task.train.labels, task.mean)
    run.data = {'train': train, 'test': test}


def stage_plan(config: Mapping[str, Any], stage: int, examples: int) -> dict[str, Any]:
  """Epochs, steps and learning rate of one stage.

  Raises:
    UserError: the stage would train for no epoch.
  """
  epochs, lr = config['epochs'], config['lr']
  if stage:
    epochs = epochs if config['stage_epochs'] is None else config['stage_epochs']
    lr = lr if config['stage_lr'] is None else config['stage_lr']
  if epochs < 1:
    raise UserError(f'stage {stage} has {epochs} epochs; wanted at least 1.')
  loop.learning_rates(config['schedule'], lr, 1)
  return {'epochs': epochs, 'lr': lr, 'steps': epochs * (examples // config['batch_size'])}


def recipe_of(config: Mapping[str, Any]) -> Recipe:
  """The recipe that `recipe_fields` describe."""
  return Recipe(
    optimizer=config['optimizer'],
    weight_decay=config['weight_decay'],
    augmentation=Augmentation(**config['augmentation']),
  )


def stage_path(workdir: str | Path, stage: int) -> Path:
  """The checkpoint of Theta^stage: 0 is trained on all data."""
  return Path(workdir) / 'stages' / str(stage)


def restore_stage(workdir: str | Path, stage: int) -> Any:
  """The variables of Theta^stage, NumPy arrays.

  Raises:
    UserError: the checkpoint is missing, damaged or foreign.
  """
  return checkpoints.restore(stage_path(workdir, stage))


def load_trajectory(workdir: str | Path) -> tuple[Trajectory, RunRecord]:
  """The weights of all stages of a finished run, oldest (smallest subset) first, and its record.

  Raises:
    UserError: the workdir holds no finished forgetting run, or a checkpoint is damaged.
  """
  record = finished_record(workdir)
  stages = [restore_stage(workdir, i) for i in range(record['config']['stages'] - 1, -1, -1)]
  return Trajectory.from_sequence(stages), record


def finished_record(workdir: str | Path) -> RunRecord:
  """The record of a finished run.

  Raises:
    UserError: the workdir holds no finished forgetting run.
  """
  if not (Path(workdir).expanduser() / 'record.json').exists():
    raise UserError(f'{workdir}: no forgetting run is here; make one with bin/forget.py.')
  record = RunRecord.read(workdir, KIND)
  wanted, found = record['config']['stages'], len(record.get('stages', []))
  if found < wanted:
    raise UserError(
      f'{workdir}: {found} of {wanted} stages are done; run bin/forget.py with the same flags to '
      'finish it.'
    )
  return record


def _init(task: Task, config: Mapping[str, Any]) -> Any:
  return loop.init_variables(task.model, named_key(config['seed'], 'init'), task.input_shape)


def _resume_path(workdir: Path) -> Path:
  return workdir / 'resume'


@contextlib.contextmanager
def _stage_job(run: _Run, show_progress: bool) -> Iterator[Job]:
  """The next stage of a run, from the checkpoint within it if there is one.

  While the context lasts the stage may be trained; its log and progress bar are open.
  """
  stage, config, workdir = run.stages_done, run.config, run.workdir
  plan, recipe = run.plans[stage], run.recipe
  epochs_before = sum(plan['epochs'] for plan in run.plans[:stage])

  def initial() -> Any:
    return restore_stage(workdir, stage - 1) if stage else _init(run.task, config)

  variables = in_all(initial)
  start, seconds_before = Checkpoint(loop.create_state(variables, recipe)), 0.0
  resume = _resume_path(workdir)
  metadata = from_first(
    lambda: checkpoints.read_metadata(resume) if checkpoints.exists(resume) else {}
  )
  if metadata.get('stage') == stage:
    state = _from_tree(start.state, in_all(lambda: checkpoints.restore(resume)))
    start, seconds_before = Checkpoint(state, tuple(metadata['sums'])), metadata['seconds']
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
      log = stack.enter_context(MetricsLog(workdir, resume_step=epochs_before + epoch_before))

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
      bar.set_postfix(loss=f'{metrics["loss"]:.3f}', accuracy=f'{metrics["accuracy"]:.3f}')
      bar.update(1)

    def save(checkpoint: Checkpoint) -> None:
      from_first(lambda: log.sync())
      checkpoints.save(
        resume,
        _to_tree(checkpoint.state),
        metadata={'stage': stage, 'sums': list(checkpoint.sums), 'seconds': seconds()},
        overwrite=True,
      )

    def on_trained(state: TrainState) -> None:
      train_seconds = seconds()
      from_first(lambda: log.sync())
      _keep_stage(run, state, train_seconds)

    yield Job(
      start=start,
      data=run.data['train'],
      indices=run.subsets[stage],
      epochs=plan['epochs'],
      lr=plan['lr'],
      schedule=config['schedule'],
      key=named_key(config['seed'], 'train', stage),
      on_epoch=on_epoch,
      save=save,
      on_trained=on_trained,
    )


def _keep_stage(run: _Run, state: TrainState, seconds: float) -> None:
  """Evaluates a trained stage, writes its checkpoint and adds it to the record."""
  stage = run.stages_done
  metrics = loop.evaluate(run.task.model, state.variables, run.data['test'])
  summary = {
    'stage': stage,
    'examples': len(run.subsets[stage]),
    'test_loss': metrics['loss'],
    'test_accuracy': metrics['accuracy'],
  }
  path = stage_path(run.workdir, stage)
  checkpoints.save(path, state.variables, metadata=summary, overwrite=True)
  stages = [*run.record.get('stages', []), {**summary, 'train_seconds': seconds}]
  run.record.update(stages=stages)
  from_first(lambda: remove_tree(_resume_path(run.workdir)))


def _to_tree(state: TrainState) -> dict[str, Any]:
  """A state as nested dicts: the optimiser's named tuples become a dict of numbered leaves."""
  leaves = jax.tree.leaves(state.opt_state)
  return {
    'step': state.step,
    'params': state.params,
    'batch_stats': state.batch_stats,
    'opt_state': {str(i): leaf for i, leaf in enumerate(leaves)},
  }


def _from_tree(like: TrainState, tree: Mapping[str, Any]) -> TrainState:
  leaves = [tree['opt_state'][str(i)] for i in range(len(tree['opt_state']))]
  return TrainState(
    step=tree['step'],
    params=tree['params'],
    batch_stats=tree.get('batch_stats', {}),
    opt_state=jax.tree.unflatten(jax.tree.structure(like.opt_state), leaves),
  )
