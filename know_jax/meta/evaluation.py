"""The retrodiction benchmark: hide the newest weight of a run, predict it from the five before.

Three splits. `run`: the predictors were fitted on other runs of the same families and data sets.
`family`, `dataset`: their parameters were neither trained on nor chosen by any run of the test
run's family, or data set (the recipe, which is in the config, may have been). All three report the
same test runs, which nothing else reads.

Errors are those of all weights of a kind of leaf in a run, over both windows of its seven stages,
divided by the error of copying the newest weight: 1 is no better than doing nothing. Means and
bootstrap intervals are over runs.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from know_jax import kinds as kinds_
from know_jax.errors import UserError, unknown_name
from know_jax.fields import Given, check_least, config_dict, editable, read_config
from know_jax.io.files import write_atomic
from know_jax.io.journal import Journal
from know_jax.io.sealed import read_sealed
from know_jax.kinds import KINDS
from know_jax.meta import collect, mat, meta_training
from know_jax.meta.evaluation_report import (
  FIELDS,
  NETWORK_FIELDS,
  OVERALL,
  SPLITS,
  card_text,
  report,
)
from know_jax.meta.windows import SPAN
from know_jax.nowcast.api import predict
from know_jax.predictors.known import HISTORY_LENGTH
from know_jax.predictors.parameters import load_known, read_card, theta_digest
from know_jax.predictors.registry import resolve
from know_jax.recalibration import BATCH_NORM_POLICIES
from know_jax.runs.record import RunRecord
from know_jax.system.compiled import drop_programs
from know_jax.system.progress import progress
from know_jax.tasks import load_task
from know_jax.training import loop
from know_jax.training.batch_norm import has_batch_norm, settled
from know_jax.training.steps import Data

KIND = 'evaluate_known'
RECIPES = ('known_leaf', 'known', 'known_raw')
"""Fields of `Config` that say how to train what is shipped, and the paper's KNOWN beside it."""

TRAINED = (
  'known_leaf', 'known_leaf_history_free', 'known', 'known_history_free', 'known_raw',
  'least_squares',
)  # fmt: skip
"""Arms that are fitted on the meta-dataset, anew for every split."""

RECALIBRATION = {'num_batches': 10, 'batch_size': 128}
"""Training images that BatchNorm's statistics are computed on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Every config field of the benchmark."""

  # The recipes; their seed and shares must agree, as they decide the test runs.
  known_leaf: meta_training.Config = meta_training.Config()  # noqa: RUF009  (it is frozen)
  known: meta_training.Config = meta_training.Config(architecture='scaled')  # noqa: RUF009
  known_raw: meta_training.Config = meta_training.Config(architecture='paper')  # noqa: RUF009
  # Beside the trained ones; each with its default options.
  predictors: tuple[str, ...] = ('task_vector', 'linear_fit', 'log_fit', 'average', 'shrink')
  splits: tuple[str, ...] = tuple(SPLITS)
  # Arms whose predicted networks are also scored on their test sets, in the split `run`, ...
  networks: tuple[str, ...] = (
    'known_leaf', 'known', 'least_squares', 'task_vector', 'log_fit', 'average'
  )  # fmt: skip
  # ... under these policies for BatchNorm's running statistics.
  batch_norm: tuple[str, ...] = ('keep', 'recalibrate')
  resamples: int = 10000

  def __post_init__(self) -> None:
    recipes = self.recipes
    for name, recipe in recipes.items():
      if recipe.leave_out:
        raise UserError(
          f"{name}.leave_out is {recipe.leave_out!r}; expected '': the splits say what is left out."
        )
    for name, architectures in (('known', ('paper', 'scaled')), ('known_raw', ('paper',))):
      if (architecture := recipes[name].architecture) not in architectures:
        expected = ' or '.join(map(repr, architectures))
        raise UserError(f'{name}.architecture is {architecture!r}; expected {expected}.')
    for name in ('seed', 'validation_share', 'test_share'):
      values = {recipe: getattr(config, name) for recipe, config in recipes.items()}
      if len(set(values.values())) > 1:
        raise UserError(
          f'{name} of the recipes is {values}; expected the same, as it decides the test runs.'
        )
    for name in self.predictors:
      resolve(name)
    check_unique([*TRAINED, 'known_official', *self.predictors])
    arms = {*TRAINED, *self.predictors}
    for what, names, known in (
      ('arm', self.networks, arms),
      ('BatchNorm policy', self.batch_norm, BATCH_NORM_POLICIES),
      ('split', self.splits, SPLITS),
    ):
      for name in names:
        if name not in known:
          raise unknown_name(what, name, known)
    check_least(self, 1, 'resamples')

  @property
  def recipes(self) -> dict[str, meta_training.Config]:
    """The recipes by their names."""
    return {name: getattr(self, name) for name in RECIPES}


def default_config() -> ConfigDict:
  """Every field of the benchmark, with the defaults that configs start from: see `Config`."""
  return editable(Config())


@dataclasses.dataclass(frozen=True)
class Arm:
  """A predictor, a name in `PREDICTORS`, with arguments of `predict`, under the name of its row."""

  name: str
  predictor: str
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def check_unique(names: Sequence[str]) -> None:
  """Checks that no two arms share a name; raises UserError."""
  for name in names:
    if names.count(name) > 1:
      raise UserError(f'the arm {name!r} is there {names.count(name)} times; expected it once.')


def run(
  config: Config | Given, data: str | Path, workdir: str | Path, official: str | None = None
) -> str:
  """Trains what each split needs, evaluates it on the test runs, and writes the report.

  Writes `training/<recipe>/<what is left out, or all>/` as bin/meta_train.py does,
  `retrodiction.csv`, `networks.csv`, `report.md`, and `known.md`, the card of the weights in
  `training/<recipe>/all`. The same command resumes after a kill. Gives the report, Markdown.

  Args:
    config: the fields of `Config`.
    data: the output folder of bin/collect.py, or a folder of the authors' `.mat` files.
    workdir: where everything is written.
    official: a folder with the authors' three `.h5` files, to be evaluated too.

  Raises:
    UserError: before anything is trained, if a value does not fit, the meta-dataset is damaged or
      too small, or the workdir belongs to another config.
  """
  config = read_config(Config, config)
  for recipe in config.recipes.values():
    loop.check_batch_size(recipe.batch_size, recipe.batch_size, 'a batch')
  data, workdir = Path(data).expanduser(), Path(workdir).expanduser()
  official_theta = None if official is None else load_known(official)
  runs = {r.number: r for r in mat.read_any(data) if r.weights is not None}
  if config.networks and mat.is_mat_folder(data):
    raise UserError(f'{data}: .mat files hold no networks to test; expected networks=().')
  abouts = {number: run.about for number, run in runs.items()}
  groups = split_groups(config, abouts)
  identity = {
    'data': meta_training.digest_of(abouts),
    'official': None if official_theta is None else theta_digest(official_theta),
  }
  record = RunRecord.open(workdir, {**config_dict(config), **identity}, kind=KIND)

  journal = Journal(workdir / 'retrodiction.jsonl')
  rows: list[dict[str, Any]] = []
  networks: list[dict[str, Any]] = []
  for split, left_out in groups:
    arms = trained_arms(config, data, workdir / 'training', left_out)
    arms += [Arm(name, name) for name in config.predictors]
    if official_theta is not None:
      arms.append(Arm('known_official', 'known', {'theta': official_theta}))
    parts = meta_training.parts_of(_without(config.known_leaf, left_out), abouts)
    with progress(len(parts['test']), f'test on {left_out or "all"}', 'run') as bar:
      for number in parts['test']:
        about = _about(split, left_out, abouts[number])
        key = f'{split} {left_out} {number}'
        row = journal.get(key) or journal.add(key, errors=retrodict(runs[number], arms))
        rows += [{**about, 'arm': arm, **errors} for arm, errors in row['errors'].items()]
        bar.update(1)
    if split == 'run' and config.networks:
      chosen = [arm for arm in arms if arm.name in config.networks]
      tested = [runs[n] for n in parts['test']]
      networks = score_all(workdir, tested, chosen, config.batch_norm)
  for name, fields, result in (
    ('retrodiction', FIELDS, rows),
    ('networks', NETWORK_FIELDS, networks),
  ):
    lines = pd.DataFrame(result, columns=list(fields)).to_csv(index=False, lineterminator='\n')
    write_atomic(workdir / f'{name}.csv', lines.encode())
  text = report(rows, networks, config.resamples)
  write_atomic(workdir / 'report.md', text.encode())
  cards = {
    recipe: read_card(workdir / 'training' / recipe / 'all' / 'known.safetensors')
    for recipe in RECIPES
    if 'run' in config.splits
  }
  if cards:
    write_atomic(workdir / 'known.md', card_text(cards, text).encode())
  record.update(test_runs=len({row['run'] for row in rows}))
  return text


def _without(recipe: meta_training.Config, left_out: str) -> meta_training.Config:
  return dataclasses.replace(recipe, leave_out=left_out)


def split_groups(config: Config, abouts: Mapping[int, Mapping[str, Any]]) -> list[tuple[str, str]]:
  """(split, what is left out) of every training that the splits need; '' leaves out nothing."""
  families, datasets = (
    sorted({meta_training.group_names(about)[i] for about in abouts.values()}) for i in (0, 1)
  )
  result = {
    'run': [('run', '')],
    'family': [('family', name) for name in families],
    'dataset': [('dataset', name) for name in datasets],
  }
  groups = [group for split in SPLITS if split in config.splits for group in result[split]]
  for _, left_out in groups:
    meta_training.parts_of(_without(config.known_leaf, left_out), abouts)
  return groups


def trained_arms(config: Config, data: Path, folder: Path, left_out: str) -> list[Arm]:
  """The arms fitted without a family or data set; trains what is not trained yet."""
  thetas = {}
  for name, recipe in config.recipes.items():
    path = folder / name / (left_out or 'all')
    meta_training.run(_without(recipe, left_out), data, path)
    thetas[name] = load_known(path / 'known.safetensors')
  fitted = read_sealed(folder / 'known_leaf' / (left_out or 'all') / 'least_squares.json', 'fit')
  return [
    Arm('known_leaf', 'known_leaf', {'theta': thetas['known_leaf']}),
    Arm('known_leaf_history_free', 'known_leaf_history_free', {'theta': thetas['known_leaf']}),
    Arm('known', 'known', {'theta': thetas['known']}),
    Arm('known_history_free', 'known_history_free', {'theta': thetas['known']}),
    Arm('known_raw', 'known', {'theta': thetas['known_raw']}),
    Arm('least_squares', 'least_squares', {'coefficients': fitted['coefficients']}),
  ]


def _about(split: str, left_out: str, about: Mapping[str, Any]) -> dict[str, Any]:
  family, dataset = meta_training.group_names(about)
  return {
    'split': split,
    'left_out': left_out,
    'run': about['number'],
    'family': family,
    'dataset': dataset,
  }


def predict_stage(run: collect.Run, arm: Arm, start: int, steps: int = 1) -> dict[str, np.ndarray]:
  """What an arm predicts from five stages of a run, from `start`, the oldest: path -> leaf."""
  assert run.weights is not None
  stages = [
    {path: leaf[start + i] for path, leaf in run.weights.items()} for i in range(HISTORY_LENGTH)
  ]
  kinds = run.about['kinds']
  result = predict(
    stages,
    steps,
    predictor=arm.predictor,
    rate=run.about['config']['rate'],
    kinds=lambda path, leaf: kinds[path],
    on_bad='ignore',  # Predictors are compared as they are.
    **arm.options,
  )
  return {path: np.asarray(leaf) for path, leaf in result.items()}


def retrodict(run: collect.Run, arms: Sequence[Arm]) -> dict[str, dict[str, float]]:
  """The error of each arm in predicting the hidden weights of a run of at least six stages.

  Arm -> kind of leaf, and 'overall' -> the sum of absolute errors over that of copying.
  """
  assert run.weights is not None
  kinds = run.about['kinds']
  copying = dict.fromkeys(KINDS, 0.0)
  errors = {arm.name: dict.fromkeys(KINDS, 0.0) for arm in arms}
  for start in range(stages_of(run) - SPAN + 1):
    hidden = {path: leaf[start + HISTORY_LENGTH] for path, leaf in run.weights.items()}
    newest = {path: leaf[start + HISTORY_LENGTH - 1] for path, leaf in run.weights.items()}
    _add_errors(copying, newest, hidden, kinds)
    for arm in arms:
      _add_errors(errors[arm.name], predict_stage(run, arm, start), hidden, kinds)
  tiny = float(np.finfo(np.float32).tiny)
  return {
    name: {
      **{kind: result[kind] / max(copying[kind], tiny) for kind in KINDS},
      OVERALL: sum(result.values()) / max(sum(copying.values()), tiny),
    }
    for name, result in errors.items()
  }


def stages_of(run: collect.Run) -> int:
  """T, the number of stages of a run."""
  return run.about['config']['stages']


def _add_errors(
  sums: dict[str, float],
  predicted: Mapping[str, np.ndarray],
  hidden: Mapping[str, np.ndarray],
  kinds: Mapping[str, str],
) -> None:
  for path, kind in kinds.items():
    if kind != kinds_.KEEP:
      sums[kind] += float(np.abs(predicted[path].astype(np.float64) - hidden[path]).sum())


# --- predicted networks on their test sets --------------------------------------------------------


def score_all(
  workdir: Path, runs: Sequence[collect.Run], arms: Sequence[Arm], policies: Sequence[str]
) -> list[dict[str, Any]]:
  """What `score_networks` gives for several runs, each scored now or, by the journal, before."""
  journal = Journal(workdir / 'networks.jsonl')
  result: list[dict[str, Any]] = []
  with progress(len(runs), 'test predicted networks', 'run') as bar:
    for run in runs:
      key = str(run.number)
      done = journal.get(key) or journal.add(key, rows=score_networks(run, arms, policies))
      result += done['rows']
      drop_programs()  # As in `collect`: each run has another network.
      bar.update(1)
  return result


def score_networks(
  run: collect.Run, arms: Sequence[Arm], policies: Sequence[str]
) -> list[dict[str, Any]]:
  """Loss and accuracy of predicted networks on the run's own test set, rows with `NETWORK_FIELDS`.

  Two questions: how close does a predicted newest stage come to the true one (`what` is
  'retrodicted', the change is against copying the stage before), and what does predicting beyond
  all data cost before any fine-tuning ('beyond', x2 with r = 1/2; the change is against the newest
  stage). What is compared has its BatchNorm statistics by the same policy; networks without
  BatchNorm have the same rows under each.
  """
  task = load_task(run.about['config'])
  test = Data(task.test, task.prepare)
  assert run.weights is not None
  last = stages_of(run) - 1
  about = _about('run', '', run.about)
  del about['left_out']
  stages = {i: {path: leaf[i] for path, leaf in run.weights.items()} for i in (last - 1, last)}
  normalised = has_batch_norm(unflatten_dict(stages[last], sep='/'))

  def score(weights: Mapping[str, np.ndarray], policy: str) -> dict[str, float]:
    variables = settled(policy, task, unflatten_dict(dict(weights), sep='/'), **RECALIBRATION)
    return loop.evaluate(task, jax.device_get(variables), test)

  questions = []
  for what, newest, start in (
    ('retrodicted', last - 1, last - HISTORY_LENGTH),
    ('beyond', last, last - HISTORY_LENGTH + 1),
  ):
    result = {'copying': stages[newest]}
    if what == 'retrodicted':
      result['truth'] = stages[last]
    questions.append((what, result | {arm.name: predict_stage(run, arm, start) for arm in arms}))
  rows: list[dict[str, Any]] = []
  for policy in policies:
    if rows and not normalised:
      rows += [{**row, 'batch_norm': policy} for row in rows[: sum(len(f) for _, f in questions)]]
      continue
    for what, result in questions:
      before = score(result['copying'], policy)
      for name, weights in result.items():
        metrics = before if name == 'copying' else score(weights, policy)
        changes = {f'{key}_change': metrics[key] - before[key] for key in ('loss', 'accuracy')}
        rows.append(
          {**about, 'arm': name, 'what': what, 'batch_norm': policy, **metrics, **changes}
        )
  return rows
