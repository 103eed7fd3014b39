"""Transfer: predicted weights -> new head -> warm-up -> fine-tune -> accuracy on another task.

The paper, section 4: a new classifier head; a warm-up in which only the head and the normalisation
layers move; then everything, with cosine decay. For one seed every arm sees the same head, the same
labelled examples and the same order, so that arms are compared in pairs.
"""

import dataclasses
import functools
import itertools
import math
import operator
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from know_jax import forgetting, trees
from know_jax import kinds as kinds_
from know_jax.errors import UserError
from know_jax.fields import Given, check_least, config_dict, editable, read_config
from know_jax.io import checkpoints
from know_jax.io.files import alone
from know_jax.io.journal import append_line, read_lines
from know_jax.jsonable import digest
from know_jax.report import markdown
from know_jax.runs.record import RunRecord
from know_jax.runs.workdir import check_stages, finished_record, stage_path
from know_jax.seeds import named_key
from know_jax.system.progress import progress
from know_jax.tasks import domains, load_task
from know_jax.tasks.base import DataFields, Task
from know_jax.training import loop
from know_jax.training.state import (
  Checkpoint,
  DivergedError,
  Recipe,
  TrainState,
  continued,
  create_state,
  learning_rates,
)
from know_jax.training.steps import Data, put_data

KIND = 'transfer'
_FIELDS = frozenset(
  {
    *('predictor', 'steps', 'multiple', 'source_accuracy', 'seed', 'loss', 'seconds', 'weights'),
    *('validation', 'test_split'),
  }
)
"""What a row has beside the task's score."""
FINE_TUNING = 1
"""The phase after the warm-up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetFields(forgetting.RecipeFields, DataFields):
  """The config fields of one transfer."""

  dataset: str = 'digits'
  # Labelled examples of each class; 0: all there are.
  labels_per_class: int = 0
  # Training examples that are kept from training, to choose learning rates by their score.
  validation_examples: int = 0
  # Only head and normalisation layers move, at a constant rate ...
  warmup_epochs: int = 10
  warmup_lr: float = 1e-3
  # ... then everything.
  epochs: int = 100
  lr: float = 4e-4
  # Whether fine-tuning keeps the optimiser of the warm-up, its step counter and moments, as Keras
  # does where one Adam is compiled twice. What was frozen then begins without moments and without
  # bias correction: its first steps are up to 6.6 times as long.
  keep_optimizer: bool = False

  def __post_init__(self) -> None:
    super().__post_init__()
    check_least(self, 0, 'warmup_epochs', 'epochs')
    learning_rates('constant', self.warmup_lr, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TargetFields):
  """Every config field of a transfer."""

  # Seeds 0 .. seeds - 1; each decides head, labelled examples, order and augmentation.
  seeds: int = 5
  # Also train a fresh network, by the same schedule, its frozen warm-up included.
  from_scratch: bool = True

  def __post_init__(self) -> None:
    super().__post_init__()
    check_least(self, 1, 'seeds')


def default_config() -> ConfigDict:
  """Every field of a transfer, with the defaults that configs start from: see `Config`."""
  return editable(Config())


@dataclasses.dataclass(frozen=True)
class Arm:
  """One start for transfer."""

  name: str  # The predictor; 'persistence' for the newest weight, 'scratch' for a fresh network.
  steps: int  # n of Theta^-n.
  multiple: float  # r^-n.
  # The task's score of the weights as they are, on the source task; None for 'scratch', and where
  # the source has no such score.
  source_accuracy: float | None
  digest: str  # Identifies the weights.
  variables: Any  # The weights, head included; None for 'scratch'.


def run(
  config: Config | Given, workdir: str | Path, only: Sequence[str] = ()
) -> list[dict[str, Any]]:
  """Transfers the newest weight and every predicted one in a workdir; skips what is done.

  Results are kept in `transfer/<dataset>-<digest of the config>/results.jsonl`, a line a training.

  Args:
    config: the fields of `Config`, in a ConfigDict or a mapping.
    workdir: of a finished forgetting run, with predictions by bin/nowcast.py.
    only: predictors to transfer; empty: all found.

  Returns:
    One row for each arm and seed, and each domain that is left out in turn (`task` 'domains',
    `test_split` 'each': then a row has `test_split` too): `predictor`, `steps`, `multiple`,
    `source_accuracy`, `seed`, the task's score (`accuracy`), `loss`, `seconds`, `weights` (digest);
    NaN for a training that diverged. With `validation_examples` also `validation`, the score there.

  Raises:
    UserError: before any training, if a value does not fit, the workdir is unfinished or damaged,
      or the task's images have another shape than the network takes.
  """
  legs = domains.legs(read_config(Config, config))
  # All are checked before the first is trained.
  runs = {leg: _prepare(settings, Path(workdir), only) for leg, settings in legs.items()}
  return [
    row | ({'test_split': leg} if leg else {}) for leg, run_ in runs.items() for row in run_()
  ]


def _prepare(
  config: Config, workdir: Path, only: Sequence[str]
) -> Callable[[], list[dict[str, Any]]]:
  """Checks a transfer; what it gives trains and returns the rows."""
  workdir = workdir.expanduser()
  source = finished_record(workdir)['config']
  if source['task'] is None:
    raise UserError(
      f'{workdir} is of a training loop of its own, whose network is not known here; transfer with '
      'that loop.'
    )
  task = load_task(config, source)
  arms = find_arms(workdir, only, task.score, scratch=config.from_scratch)
  check_fits(task, [arm.variables for arm in arms if arm.variables is not None])
  per_class, kept = config.labels_per_class, config.validation_examples
  subsets = [labelled_subset(task, per_class, seed, kept) for seed in range(config.seeds)]
  loop.check_batch_size(config.batch_size, len(subsets[0]), 'the labelled subset')
  phases(task, config)
  return functools.partial(_run, task, arms, subsets, config, workdir)


def _run(
  task: Task,
  arms: Sequence[Arm],
  subsets: Sequence[np.ndarray],
  config: Config,
  workdir: Path,
) -> list[dict[str, Any]]:
  score = task.score
  dataset = re.sub(r'[^\w.@-]+', '-', config.dataset).strip('-')
  folder = workdir / 'transfer' / f'{dataset}-{digest(config_dict(config))[:8]}'
  RunRecord.open(folder, config, kind=KIND).update(**task.about)
  path = folder / 'results.jsonl'
  data = put_data(task)
  rows = []
  with alone(folder), progress(len(arms) * config.seeds, 'transfer', 'training') as bar:
    done = {_row_key(row): row for row in read_lines(path)}
    for arm in arms:
      for seed, subset in enumerate(subsets):
        about = {
          'predictor': arm.name,
          'steps': arm.steps,
          'multiple': arm.multiple,
          'source_accuracy': arm.source_accuracy,
          'seed': seed,
          'weights': arm.digest,
        }
        row = done.get(_row_key(about))
        if row is None:
          try:
            result = train_one(task, arm.variables, data, subset, config, seed)
          except DivergedError:
            # One arm's failure is a result, and no reason to lose the others'.
            result = dict.fromkeys((score, 'loss', 'seconds'), math.nan)
          row = about | {name: result[name] for name in (score, 'loss', 'seconds')}
          if 'validation' in result:
            row['validation'] = result['validation']
          append_line(path, row)
        rows.append(row)
        bar.set_postfix(arm=f'{arm.name} x{arm.multiple:.3g}', **{score: f'{row[score]:.3f}'})
        bar.update(1)
  return rows


def _row_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
  # The name too, because predictors can agree: task_vector, magmax and consensus_ta do at step 1.
  return tuple(row[field] for field in ('predictor', 'steps', 'weights', 'seed'))


def find_arms(
  workdir: Path, only: Sequence[str] = (), score: str = 'accuracy', *, scratch: bool = True
) -> list[Arm]:
  """The newest weight and every prediction in a workdir.

  Raises:
    UserError: a checkpoint is damaged or of other stages, or a predictor in `only` has none.
  """
  newest = stage_path(workdir, 0)
  # Hidden folders with other names are what a kill left of a save.
  paths = [path for path in (workdir / 'predictions').glob('*/*/') if path.name.isdecimal()]
  paths.sort(key=lambda path: (path.parent.name, int(path.name)))
  result = {path.parent.name for path in paths}
  if missing := sorted(set(only) - result):
    raise UserError(
      f'{workdir}: no predictions of {missing[0]!r}; found {", ".join(sorted(result)) or "none"}. '
      f'Run bin/nowcast.py --predictor={missing[0]} first.'
    )
  metadata = checkpoints.read_metadata(newest)
  arms = [Arm('persistence', 0, 1.0, metadata.get(f'test_{score}'), *_weights(newest))]
  if scratch:
    arms.insert(0, Arm('scratch', 0, 0.0, None, 'scratch', None))
  chosen = [path for path in paths if not only or path.parent.name in only]
  predictions = {path: checkpoints.read_metadata(path) for path in chosen}
  check_stages(workdir, predictions)
  for path, about in predictions.items():
    arms.append(
      Arm(
        about['predictor'],
        about['steps'],
        about['multiple'],
        about.get(f'test_{score}'),
        *_weights(path),
      )
    )
  return arms


def _weights(path: Path) -> tuple[str, Any]:
  variables = checkpoints.restore(path)
  return checkpoints.weights_digest(path), variables


def check_fits(task: Task, starts: Sequence[Any]) -> None:
  """Checks that a task's network can start from variables of another task.

  Args:
    task: the target.
    starts: variables, or their shapes.

  Raises:
    UserError: a leaf below the head has another shape, or there is no head; it is named.
  """
  expected = jax.eval_shape(lambda: task.init(jax.random.key(0)))
  rest = _below_head(expected, task.head)
  if len(rest) in (0, len(trees.named_leaves(expected))):
    heads = 'all' if not rest else 'none'
    raise UserError(
      f'of the leaves of the network {heads} are in its head; expected some (the config field head '
      f'names a layer; there are {", ".join(sorted(expected["params"]))}).'
    )
  for variables in starts:
    trees.check_same(
      _below_head(adopted(task, variables, expected), task.head),
      rest,
      names=('the source network', f'the network for {task.name}'),
    )


def labelled_subset(task: Task, per_class: int, seed: int, kept: int = 0) -> np.ndarray:
  """The labelled examples of one seed, int32, ascending.

  Args:
    task: whose training set is drawn from.
    per_class: examples of each class, or in all where the data have no classes; 0: all there are.
    seed: decides which.
    kept: how many examples are not drawn: those of `validation_subset`.

  Raises:
    UserError: a class has fewer examples, or a number is negative.
  """
  if per_class < 0:
    raise UserError(f'labels_per_class is {per_class}; expected at least 0 (0: all).')
  size, strata = task.train.size, task.train.strata
  if not 0 <= kept < size:
    raise UserError(
      f'validation_examples is {kept}; expected 0 to {size - 1}, fewer than there are for training.'
    )
  order = _order(task, seed)[: size - kept]
  if per_class == 0:
    return np.sort(order)
  labels = np.zeros(size, np.int32) if strata is None else np.asarray(strata)
  chosen = []
  for label in np.unique(labels):
    members = order[labels[order] == label]
    if len(members) < per_class:
      raise UserError(
        f'labels_per_class is {per_class}, but class {label} has {len(members)} training examples.'
      )
    chosen.append(members[:per_class])
  return np.sort(np.concatenate(chosen))


def validation_subset(task: Task, kept: int, seed: int) -> np.ndarray:
  """So many training examples that `labelled_subset` leaves out, int32, ascending."""
  return np.sort(_order(task, seed)[task.train.size - kept :])


def _order(task: Task, seed: int) -> np.ndarray:
  key = named_key(seed, 'labels')
  return np.asarray(jax.random.permutation(key, task.train.size)).astype(np.int32)


def train_one(
  task: Task,
  variables: Any,
  data: tuple[Data, Data],
  subset: np.ndarray,
  config: TargetFields,
  seed: int,
  curve_epochs: Sequence[int] = (),
  also: Mapping[str, Any] | None = None,
  on_trained: Callable[[Any], None] = lambda variables: None,
) -> dict[str, Any]:
  """One transfer: new head, warm-up, fine-tuning, test.

  Args:
    task: the target.
    variables: where to start; None: a fresh network.
    data: its training and its test set.
    subset: the labelled examples of the training set.
    config: its fields.
    seed: decides head, order and augmentation.
    curve_epochs: fine-tuning epochs to test after as well; 0 is after the warm-up.
    also: name -> data, or which training examples, on which its score is told too.
    on_trained: called with the trained variables.

  Returns:
    The task's metrics on the test set, `seconds`, `curve`, a pair (epoch, score) for each of
    `curve_epochs`, ascending, the score by each name in `also`, and with `validation_examples`
    `validation`, the score on those.

  Raises:
    DivergedError: the training diverged.
  """
  began = time.monotonic()
  fresh = jax.device_get(task.init(named_key(seed, 'head')))
  if variables is None:
    variables = fresh
  else:
    variables = with_head(adopted(task, variables, fresh), fresh, task.head)
  curve: list[tuple[int, float]] = []
  metrics: dict[str, float] = {}

  def test_after(epoch: int, state: TrainState) -> None:
    metrics.update(loop.evaluate(task, state.variables, data[1]))
    curve.append((epoch, metrics[task.score]))

  warm: tuple[Recipe, TrainState] | None = None
  for phase, (recipe, epochs, lr, schedule) in enumerate(phases(task, config, variables)):
    start = create_state(variables, recipe)
    if warm and config.keep_optimizer:
      start = continued(start, *warm)
    if phase == FINE_TUNING and 0 in curve_epochs:
      test_after(0, start)
    if epochs:
      state = loop.fit(
        task, Checkpoint(start), data[0], subset, recipe=recipe, epochs=epochs,
        batch_size=config.batch_size, lr=lr, schedule=schedule,
        key=named_key(seed, 'train', phase),
        show_after=curve_epochs if phase == FINE_TUNING else (), show=test_after,
      )  # fmt: skip
      variables, warm = state.variables, (recipe, state)
  if not curve or curve[-1][0] < config.epochs:
    metrics.update(loop.evaluate(task, variables, data[1]))
  on_trained(variables)
  others = dict(also or {})
  if kept := config.validation_examples:
    others['validation'] = validation_subset(task, kept, seed)
  for name, other in others.items():
    of, indices = (data[0], other) if isinstance(other, np.ndarray) else (other, None)
    others[name] = loop.evaluate(task, variables, of, indices=indices)[task.score]
  return {**metrics, **others, 'seconds': time.monotonic() - began, 'curve': curve}


def adopted(task: Task, variables: Any, like: Any) -> Any:
  """The variables of a classifier by the names that a task's network has for its encoder.

  What the classifier has above its feature map is left out. Those of other networks, and where the
  task has no encoder, stay as they are.

  Args:
    task: the target.
    variables: of the source.
    like: variables of the target's network, or their shapes.
  """
  encoder = task.encoder
  if not encoder or encoder in variables['params']:
    return variables
  return {
    collection: {encoder: {name: tree[name] for name in like[collection][encoder] if name in tree}}
    for collection, tree in variables.items()
  }


def with_head(variables: Any, fresh: Any, head: Callable[[str], bool]) -> Any:
  """The variables with the head of fresh ones, of all collections; `head` as of a `Task`."""
  named = trees.named_leaves(variables)
  leaves = [leaf if head(path) else named[path] for path, leaf in trees.named_leaves(fresh).items()]
  return jax.tree.unflatten(jax.tree.structure(fresh), leaves)


def _below_head(variables: Any, head: Callable[[str], bool]) -> dict[str, Any]:
  return {path: x for path, x in trees.named_leaves(variables).items() if not head(path)}


def phases(
  task: Task, config: TargetFields, variables: Any = None
) -> list[tuple[Recipe, int, float, str]]:
  """Recipe, epochs, learning rate and schedule of warm-up and fine-tuning."""
  whole = forgetting.recipe_of(config)
  frozen = frozenset() if variables is None else backbone(task, variables)
  warm = dataclasses.replace(whole, frozen=frozen)
  return [
    (warm, config.warmup_epochs, config.warmup_lr, 'constant'),
    (whole, config.epochs, config.lr, config.schedule),
  ]


def backbone(task: Task, variables: Any) -> frozenset[str]:
  """Paths of the parameters that a warm-up freezes: all but the head and normalisation layers."""
  kinds = kinds_.leaf_kinds(variables, task.kinds)
  return frozenset(
    path.removeprefix('params/')
    for path, kind in kinds.items()
    if path.startswith('params/') and kind != kinds_.KEEP and not task.head(path)
  )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """The results as a Markdown table: a row for each predictor, in columns x1, x2, ...

  Scores are percentages; the spread is the standard deviation over seeds (n - 1), of the mean over
  domains where each was left out in turn.
  """
  (score,) = rows[0].keys() - _FIELDS
  multiples = sorted({row['multiple'] for row in rows if row['predictor'] != 'scratch'})
  predictors = sorted({row['predictor'] for row in rows} - {'persistence', 'scratch'})
  heads = [f'x{m:.3g}' for m in multiples]
  seeds = len({row['seed'] for row in rows})

  def cells(predictor: str) -> list[str]:
    as_is, after = [''] * len(multiples), [''] * len(multiples)
    for i, multiple in enumerate(multiples):
      # Every predictor starts from the newest weight.
      name = 'persistence' if multiple == 1 and predictor != 'scratch' else predictor
      group = [r for r in rows if r['predictor'] == name and r['multiple'] in (multiple, 0.0)]
      if (predictor == 'scratch' and multiple != 1) or not group:
        continue
      if (source := group[0]['source_accuracy']) is not None:
        as_is[i] = f'{100 * source:.1f}'
      by_seed = itertools.groupby(sorted(group, key=_seed), key=_seed)
      scores = [100 * np.mean([r[score] for r in of_seed]) for _, of_seed in by_seed]
      spread = f' ± {np.std(scores, ddof=1):.1f}' if len(scores) > 1 else ''
      after[i] = f'{np.mean(scores):.1f}{spread}'
    return [_LABELS.get(predictor, predictor), *as_is, *after]

  present = [p for p in ('scratch', 'persistence') if any(r['predictor'] == p for r in rows)]
  body = [cells(p) for p in (*present, *predictors)]
  header = ['predictor', *(f'as is {h}' for h in heads), *(f'transfer {h}' for h in heads)]
  note = (
    f'as is: {score} (%) of the weights on the source task before any further training; transfer: '
    f'{score} (%) on the other task, mean ± standard deviation over {seeds} '
    f'{"seed" if seeds == 1 else "seeds"}.'
  )
  return f'{markdown.table(header, body)}\n\n{note}'


_seed = operator.itemgetter('seed')
_LABELS = {'persistence': 'persistence (naive)', 'scratch': 'scratch (no pre-training)'}
