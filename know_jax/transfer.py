"""Transfer: predicted weights -> new head -> warm-up -> fine-tune -> accuracy on another task.

The paper, section 4: a new classifier head; a warm-up in which only the head and the normalisation
layers move; then everything, with cosine decay. For one seed every arm sees the same head, the same
labelled examples and the same order, so that arms are compared in pairs.
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from know_jax import forgetting, trees
from know_jax import kinds as kinds_
from know_jax.data.sources import Dataset, mean_image
from know_jax.errors import UserError
from know_jax.io import checkpoints
from know_jax.io.journal import append_line, read_lines
from know_jax.jsonable import digest
from know_jax.models import HEAD
from know_jax.runs.record import RunRecord, config_dict
from know_jax.seeds import named_key
from know_jax.system.progress import progress
from know_jax.training import loop
from know_jax.training.loop import Checkpoint, Recipe

KIND = 'transfer'
FINE_TUNING = 1
"""The phase after the warm-up."""


def default_config() -> ConfigDict:
  """Every field of a transfer, with the defaults that configs start from."""
  return ConfigDict(
    {
      # Seeds 0 .. seeds - 1; each decides head, labelled examples, order and augmentation.
      'seeds': 5,
      **forgetting.data_fields(),
      # Labelled examples of each class; 0: all there are.
      'labels_per_class': 0,
      'batch_size': 32,
      # Only head and normalisation layers move, at a constant rate ...
      'warmup_epochs': 10,
      'warmup_lr': 1e-3,
      # ... then everything.
      'epochs': 100,
      'lr': 4e-4,
      **forgetting.recipe_fields(),
      # Also train a fresh network, by the same schedule, its frozen warm-up included.
      'from_scratch': True,
    }
  )


@dataclasses.dataclass(frozen=True)
class Arm:
  """One start for transfer.

  Attributes:
    name: the predictor; 'persistence' for the newest weight, 'scratch' for a fresh network.
    steps: n of Theta^-n.
    multiple: r^-n.
    source_accuracy: of the weights as they are, on the source task; None for 'scratch'.
    digest: identifies the weights.
    variables: the weights, head included; None for 'scratch'.
  """

  name: str
  steps: int
  multiple: float
  source_accuracy: float | None
  digest: str
  variables: Any


def run(config: ConfigDict, workdir: str | Path, only: Sequence[str] = ()) -> list[dict[str, Any]]:
  """Transfers the newest weight and every predicted one in a workdir; skips what is done.

  Results are kept in `transfer/<dataset>-<digest of the config>/results.jsonl`, a line a training.

  Args:
    config: the fields of `default_config`.
    workdir: of a finished forgetting run, with predictions by bin/nowcast.py.
    only: predictors to transfer; empty: all found.

  Returns:
    One row for each arm and seed: `predictor`, `steps`, `multiple`, `source_accuracy`, `seed`,
    `accuracy`, `loss`, `seconds`, `weights` (digest); NaN for a training that diverged.

  Raises:
    UserError: before any training, if a value does not fit, the workdir is unfinished or damaged,
      or the task's images have another shape than the network takes.
  """
  config = config_dict(config)
  workdir = Path(workdir).expanduser()
  source = forgetting.finished_record(workdir)['config']
  train, test = forgetting.load_splits(config)
  model = forgetting.model_of(source, train.num_classes)
  arms = find_arms(workdir, only, scratch=config['from_scratch'])
  check_fits(model, arms, train)
  subsets = [
    labelled_subset(train.labels, config['labels_per_class'], seed) for seed in _seeds(config)
  ]
  loop.check_batch_size(config['batch_size'], len(subsets[0]), 'the labelled subset')
  _phases(config)

  folder = workdir / 'transfer' / f'{config["dataset"]}-{digest(config)[:8]}'
  RunRecord.open(folder, config, kind=KIND)
  path = folder / 'results.jsonl'
  done = {_row_key(row): row for row in read_lines(path)}
  mean = mean_image(train.images)
  data = loop.put_data(train.images, train.labels, mean)
  test_data = loop.put_data(test.images, test.labels, mean)
  rows = []
  with progress(len(arms) * config['seeds'], 'transfer', 'training') as bar:
    for arm in arms:
      for seed, subset in zip(_seeds(config), subsets, strict=True):
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
            found = train_one(model, arm.variables, data, subset, test_data, config, seed)
          except loop.DivergedError:
            # One arm's failure is a result, and no reason to lose the others'.
            found = dict.fromkeys(('accuracy', 'loss', 'seconds'), math.nan)
          row = about | {name: found[name] for name in ('accuracy', 'loss', 'seconds')}
          append_line(path, row)
        rows.append(row)
        bar.set_postfix(arm=f'{arm.name} x{arm.multiple:.3g}', accuracy=f'{row["accuracy"]:.3f}')
        bar.update(1)
  return rows


def _row_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
  # The name too, because predictors can agree: task_vector, magmax and consensus_ta do at step 1.
  return tuple(row[field] for field in ('predictor', 'steps', 'weights', 'seed'))


def find_arms(workdir: Path, only: Sequence[str] = (), *, scratch: bool = True) -> list[Arm]:
  """The newest weight and every prediction in a workdir.

  Raises:
    UserError: a checkpoint is damaged, or a predictor in `only` has no predictions.
  """
  newest = forgetting.stage_path(workdir, 0)
  # Hidden folders with other names are what a kill left of a save.
  paths = [path for path in (workdir / 'predictions').glob('*/*/') if path.name.isdecimal()]
  paths.sort(key=lambda path: (path.parent.name, int(path.name)))
  found = {path.parent.name for path in paths}
  if missing := sorted(set(only) - found):
    raise UserError(
      f'{workdir}: no predictions of {missing[0]!r}; found {", ".join(sorted(found)) or "none"}. '
      f'Run bin/nowcast.py --predictor={missing[0]} first.'
    )
  metadata = checkpoints.read_metadata(newest)
  arms = [Arm('persistence', 0, 1.0, metadata['test_accuracy'], *_weights(newest))]
  if scratch:
    arms.insert(0, Arm('scratch', 0, 0.0, None, 'scratch', None))
  for path in paths:
    if only and path.parent.name not in only:
      continue
    about = checkpoints.read_metadata(path)
    arms.append(
      Arm(
        about['predictor'],
        about['steps'],
        about['multiple'],
        about['test_accuracy'],
        *_weights(path),
      )
    )
  return arms


def _weights(path: Path) -> tuple[str, Any]:
  variables = checkpoints.restore(path)
  return checkpoints.weights_digest(path), variables


def check_fits(model: Any, arms: Sequence[Arm], train: Dataset) -> None:
  """Checks that the network of the arms takes the images of the task.

  Raises:
    UserError: a leaf below the head has another shape; it is named.
  """
  shape = train.images.shape[1:]
  wanted = jax.eval_shape(lambda: loop.init_variables(model, jax.random.key(0), shape))
  for arm in arms:
    if arm.variables is not None:
      trees.check_same(
        _without_head(arm.variables),
        _without_head(wanted),
        names=('the source network', f'the network for {train.name} images {shape}'),
      )


def labelled_subset(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
  """The labelled examples of one seed, int32, ascending.

  Args:
    labels: int32 `[N]`.
    per_class: examples of each class; 0: all.
    seed: decides which.

  Raises:
    UserError: a class has fewer examples, or `per_class` is negative.
  """
  if per_class < 0:
    raise UserError(f'labels_per_class is {per_class}; wanted at least 0 (0: all).')
  if per_class == 0:
    return np.arange(len(labels), dtype=np.int32)
  order = np.asarray(jax.random.permutation(named_key(seed, 'labels'), len(labels)))
  chosen = []
  for label in np.unique(labels):
    members = order[labels[order] == label]
    if len(members) < per_class:
      raise UserError(
        f'labels_per_class is {per_class}, but class {label} has {len(members)} training examples.'
      )
    chosen.append(members[:per_class])
  return np.sort(np.concatenate(chosen)).astype(np.int32)


def train_one(
  model: Any,
  variables: Any,
  data: loop.DeviceData,
  subset: np.ndarray,
  test: loop.DeviceData,
  config: Mapping[str, Any],
  seed: int,
  curve_epochs: Sequence[int] = (),
) -> dict[str, Any]:
  """One transfer: new head, warm-up, fine-tuning, test.

  Args:
    model: the network with the task's head.
    variables: where to start; None: a fresh network.
    data: the task's training set.
    subset: the labelled examples in it.
    test: the task's test set.
    config: the fields of `default_config`.
    seed: decides head, order and augmentation.
    curve_epochs: fine-tuning epochs to test after as well; 0 is after the warm-up.

  Returns:
    `accuracy` and `loss` on the test set, `seconds`, and `curve`, a pair (epoch, accuracy) for each
    of `curve_epochs`, ascending.

  Raises:
    DivergedError: the training diverged.
  """
  began = time.monotonic()
  shape = data.images.shape[2:]
  fresh = loop.init_variables(model, named_key(seed, 'head'), shape)
  variables = jax.device_get(fresh) if variables is None else with_head(variables, fresh)
  curve: list[tuple[int, float]] = []
  metrics: dict[str, float] = {}

  def test_after(epoch: int, state: loop.TrainState) -> None:
    metrics.update(loop.evaluate(model, state.variables, test))
    curve.append((epoch, metrics['accuracy']))

  for phase, (recipe, epochs, lr, schedule) in enumerate(_phases(config, variables)):
    start = loop.create_state(variables, recipe)
    if phase == FINE_TUNING and 0 in curve_epochs:
      test_after(0, start)
    if epochs:
      state = loop.fit(
        model,
        Checkpoint(start),
        data,
        subset,
        recipe=recipe,
        epochs=epochs,
        batch_size=config['batch_size'],
        lr=lr,
        schedule=schedule,
        key=named_key(seed, 'train', phase),
        show_after=curve_epochs if phase == FINE_TUNING else (),
        show=test_after,
      )
      variables = state.variables
  if not curve or curve[-1][0] < config['epochs']:
    metrics.update(loop.evaluate(model, variables, test))
  return {**metrics, 'seconds': time.monotonic() - began, 'curve': curve}


def with_head(variables: Any, fresh: Any) -> Any:
  """The variables with the head of others."""
  return {
    **variables,
    'params': {**variables['params'], HEAD: jax.device_get(fresh['params'][HEAD])},
  }


def _without_head(variables: Any) -> Any:
  params = {name: layer for name, layer in variables['params'].items() if name != HEAD}
  return {**variables, 'params': params}


def _phases(
  config: Mapping[str, Any], variables: Any = None
) -> list[tuple[Recipe, int, float, str]]:
  """Recipe, epochs, learning rate and schedule of warm-up and fine-tuning."""
  whole = forgetting.recipe_of(config)
  frozen = frozenset() if variables is None else backbone(variables['params'])
  warm = dataclasses.replace(whole, frozen=frozen)
  for epochs, lr in (('warmup_epochs', 'warmup_lr'), ('epochs', 'lr')):
    if config[epochs] < 0:
      raise UserError(f'{epochs} is {config[epochs]}; wanted at least 0.')
    loop.learning_rates(config['schedule'], config[lr], 1)
  return [
    (warm, config['warmup_epochs'], config['warmup_lr'], 'constant'),
    (whole, config['epochs'], config['lr'], config['schedule']),
  ]


def backbone(params: Any) -> frozenset[str]:
  """Paths of the parameters that a warm-up freezes: all but the head and normalisation layers."""
  kinds = kinds_.leaf_kinds(params)
  return frozenset(
    path for path, kind in kinds.items() if kind != kinds_.KEEP and not path.startswith(f'{HEAD}/')
  )


def _seeds(config: Mapping[str, Any]) -> range:
  if config['seeds'] < 1:
    raise UserError(f'seeds is {config["seeds"]}; wanted at least 1.')
  return range(config['seeds'])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """The results as a Markdown table: a row for each predictor, in columns x1, x2, ...

  Accuracies are percentages; the spread is the standard deviation over seeds (n - 1).
  """
  multiples = sorted({row['multiple'] for row in rows if row['predictor'] != 'scratch'})
  predictors = sorted({row['predictor'] for row in rows} - {'persistence', 'scratch'})
  heads = [f'x{m:.3g}' for m in multiples]
  seeds = len({row['seed'] for row in rows})

  def cells(predictor: str) -> list[str]:
    as_is, after = [], []
    for multiple in multiples:
      # Every predictor starts from the newest weight.
      name = 'persistence' if multiple == 1 and predictor != 'scratch' else predictor
      group = [r for r in rows if r['predictor'] == name and r['multiple'] in (multiple, 0.0)]
      if (predictor == 'scratch' and multiple != 1) or not group:
        as_is.append('')
        after.append('')
        continue
      source = group[0]['source_accuracy']
      as_is.append('' if source is None else f'{100 * source:.1f}')
      scores = [100 * r['accuracy'] for r in group]
      spread = f' ± {np.std(scores, ddof=1):.1f}' if len(scores) > 1 else ''
      after.append(f'{np.mean(scores):.1f}{spread}')
    return [_LABELS.get(predictor, predictor), *as_is, *after]

  present = [p for p in ('scratch', 'persistence') if any(r['predictor'] == p for r in rows)]
  body = [cells(p) for p in (*present, *predictors)]
  header = ['predictor', *(f'as is {h}' for h in heads), *(f'transfer {h}' for h in heads)]
  widths = [max(len(line[i]) for line in (header, *body)) for i in range(len(header))]

  def line(parts: Sequence[str]) -> str:
    first, *rest = (
      p.ljust(w) if i == 0 else p.rjust(w)
      for i, (p, w) in enumerate(zip(parts, widths, strict=True))
    )
    return '| ' + ' | '.join((first, *rest)) + ' |'

  rule = (
    '|'
    + '|'.join('-' * (w + 2) if i == 0 else '-' * (w + 1) + ':' for i, w in enumerate(widths))
    + '|'
  )
  note = (
    'as is: accuracy (%) of the weights on the source task before any further training; transfer: '
    f'accuracy (%) on the other task, mean ± standard deviation over {seeds} seeds.'
  )
  return '\n'.join([line(header), rule, *(line(parts) for parts in body), '', note])


_LABELS = {'persistence': 'persistence (naive)', 'scratch': 'scratch (no pre-training)'}
