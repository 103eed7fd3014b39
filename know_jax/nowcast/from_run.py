"""From a finished forgetting run to predicted weights on disk.

Each predictor's weights are written to `predictions/<predictor>/<n>` in the run's workdir, a
checkpoint for every step n = 1..steps, whose metadata say what it is and how it scores as it is.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from know_jax import kinds as kinds_
from know_jax import trees
from know_jax.errors import PredictionWarning, UserError, unknown_name
from know_jax.io import checkpoints
from know_jax.io.files import remove_tree
from know_jax.nowcast import api
from know_jax.nowcast.plan import multiple_of
from know_jax.predictors.base import max_steps
from know_jax.predictors.registry import given_theta, resolve_all
from know_jax.recalibration import BATCH_NORM_POLICIES
from know_jax.report.plots import plot_nowcast
from know_jax.runs.workdir import load_trajectory, stage_digests
from know_jax.tasks import load_task
from know_jax.training import loop
from know_jax.training.batch_norm import settled
from know_jax.training.steps import Data
from know_jax.trajectory import Trajectory

RECALIBRATION_BATCH = 128


@dataclasses.dataclass(frozen=True)
class Prediction:
  """One predicted weight and how it scores before any further training."""

  predictor: str  # Its name.
  steps: int  # n; 0 is the newest weight itself.
  multiple: float  # r^-n, how many times the data it stands for.
  variables: Any  # The predicted variables.
  # The task's score, on the run's own test set; None where the run has no task.
  accuracy: float | None
  loss: float | None  # Likewise.
  score: str  # What the task's score is called.
  # Kind -> mean absolute and relative change from the newest weight.
  movement: dict[str, dict[str, float]]
  path: Path | None  # The checkpoint; None for the newest weight.


def run(
  workdir: str | Path,
  *,
  predictors: Sequence[Any],
  steps: int,
  batch_norm: str = 'keep',
  recalibration_batches: int = 10,
  known: str | None = None,
  on_bad: str = 'keep',
  kinds: kinds_.Rules | None = None,
) -> list[Prediction]:
  """Predicts, scores and writes; draws `predictions/nowcast.png`.

  Earlier predictions of the same predictors are replaced, those of farther steps removed: what a
  predictor has in a workdir is of one call.

  Args:
    workdir: of a finished forgetting run.
    predictors: names in `PREDICTORS`, 'package.module:object', or objects.
    steps: how far; the weights of every step from 1 on are written.
    batch_norm: what happens to BatchNorm, a name in `BATCH_NORM_POLICIES`.
    recalibration_batches: batches of 128 training images for `recalibrate`.
    known: file or folder with the parameters of KNOWN, as `load_known` takes; None: those shipped.
    on_bad: what becomes of leaves with a bad prediction, as in `nowcast.predict`. The metadata of
      the checkpoints hold its warnings too.
    kinds: the rule for the kinds of leaves; None: the task's.

  Returns:
    The newest weight as step 0 of 'persistence', then every prediction.

  Raises:
    UserError: before anything is written, if a name is unknown, the run is unfinished or damaged,
      or a predictor cannot do the steps with this history.
  """
  made = resolve_all(predictors)
  if batch_norm not in BATCH_NORM_POLICIES:
    raise unknown_name('BatchNorm policy', batch_norm, BATCH_NORM_POLICIES)
  workdir = Path(workdir).expanduser()
  trajectory, record = load_trajectory(workdir)
  config = record['config']
  multiple_of(config['rate'], steps)
  for name, predictor in made.items():
    reach = max_steps(predictor, len(trajectory))
    if reach is not None and steps > reach:
      raise UserError(
        f'predictor {name!r} can do at most steps={reach} with the {len(trajectory)} stages of '
        f'{workdir}; found steps={steps}.'
      )
  theta = given_theta(known, made)
  # The weights of a training loop of the user's own: there is nothing here to score them with.
  task = None if config['task'] is None else load_task(config)
  if task is None and batch_norm != 'keep':
    raise UserError(
      f'batch_norm is {batch_norm!r}, but {workdir} is of a training loop of its own, whose '
      "network and data are not known here; expected 'keep'."
    )
  test = None if task is None else Data(task.test, task.prepare)
  rule = kinds if kinds is not None or task is None else task.kinds
  newest = jax.device_get(trajectory).newest
  named_kinds = kinds_.leaf_kinds(newest, rule)
  stage, score = record['stages'][0], 'score' if task is None else task.score
  result = [
    Prediction(
      'persistence', 0, 1.0, newest, stage.get(f'test_{score}'), stage.get('test_loss'), score,
      _movement(newest, newest, named_kinds), None,
    )
  ]  # fmt: skip
  # All are predicted before one is written: a predictor may still find the history too short.
  forecasts, warned, sources = {}, {}, {}
  for name, predictor in made.items():
    # --known replaces the shipped parameters of the predictors whose network it has.
    shipped = predictor.theta_name if predictor.takes_theta else None
    sources[name] = known if name in theta else shipped
    with _noted() as warned[name]:
      forecasts[name] = api.forecast(
        trajectory,
        steps,
        predictor=predictor,
        theta=theta.get(name),
        rate=config['rate'],
        kinds=rule,
        on_bad=on_bad,
      )
  digests = stage_digests(workdir, len(trajectory))
  for name, forecast in forecasts.items():
    _remove_beyond(workdir, name, steps)
    for n, variables in enumerate(jax.device_get(forecast), start=1):
      metrics: dict[str, float] = {}
      if task is not None and test is not None:
        variables = settled(
          batch_norm, task, variables,
          num_batches=recalibration_batches, batch_size=RECALIBRATION_BATCH,
        )  # fmt: skip
        variables = jax.device_get(variables)
        metrics = loop.evaluate(task, variables, test)
      prediction = Prediction(
        predictor=name,
        steps=n,
        multiple=multiple_of(config['rate'], n),
        variables=variables,
        accuracy=metrics.get(score),
        loss=metrics.get('loss'),
        score=score,
        movement=_movement(newest, variables, named_kinds),
        path=prediction_path(workdir, name, n),
      )
      result.append(prediction)
      _save(prediction, batch_norm, sources[name], warned[name], digests)
  history = [s['test_loss'] for s in record['stages'] if 'test_loss' in s]
  plot_nowcast(
    workdir / 'predictions' / 'nowcast.png', trajectory,
    {name: [p for p in result[1:] if p.predictor == name] for name in made}, history,
    config['rate'], rule,
  )  # fmt: skip
  return result


@contextlib.contextmanager
def _noted() -> Iterator[list[str]]:
  """Gives the texts of the warnings about predictions, which are passed on."""
  texts: list[str] = []
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always', PredictionWarning)
    yield texts
  for warning in caught:
    if issubclass(warning.category, PredictionWarning):
      texts.append(str(warning.message))
    warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def prediction_path(workdir: str | Path, predictor: str, steps: int) -> Path:
  """The checkpoint of one predicted weight."""
  return Path(workdir) / 'predictions' / predictor / str(steps)


def _remove_beyond(workdir: Path, predictor: str, steps: int) -> None:
  for path in prediction_path(workdir, predictor, 1).parent.glob('[0-9]*'):
    if path.name.isdigit() and int(path.name) > steps:
      remove_tree(path)


def _save(
  prediction: Prediction,
  batch_norm: str,
  source: str | None,
  warned: Sequence[str],
  stages: Sequence[str],
) -> None:
  assert prediction.path is not None
  metadata = {
    'predictor': prediction.predictor,
    'steps': prediction.steps,
    'multiple': prediction.multiple,
    'batch_norm': batch_norm,
    'warnings': list(warned),
    'stages': list(stages),  # What it was predicted from.
  }
  if prediction.loss is not None:
    metadata |= {f'test_{prediction.score}': prediction.accuracy, 'test_loss': prediction.loss}
  if source is not None:
    metadata['known'] = source
  checkpoints.save(prediction.path, prediction.variables, metadata=metadata, overwrite=True)


def _movement(newest: Any, predicted: Any, kinds: dict[str, str]) -> dict[str, dict[str, float]]:
  """How far the leaves of each kind moved, in float64."""
  before, after = trees.named_leaves(newest), trees.named_leaves(predicted)
  result = {}
  for kind in (*kinds_.KINDS, kinds_.KEEP):
    paths = [p for p, k in kinds.items() if k == kind and np.size(before[p])]
    if not paths:
      continue
    old = np.concatenate([np.ravel(before[p]).astype(np.float64) for p in paths])
    move = np.concatenate([np.ravel(after[p]).astype(np.float64) for p in paths]) - old
    norm = float(np.linalg.norm(old))
    result[kind] = {
      'weights': float(old.size),
      'mean_absolute': float(np.abs(move).mean()),
      'relative': float(np.linalg.norm(move)) / norm if norm else 0.0,
    }
  return result


# --- what bin/nowcast.py prints -------------------------------------------------------------------


def kinds_report(trajectory: Trajectory, kinds: kinds_.Rules | None = None) -> str:
  """A line for every leaf: path, shape and the kind it is predicted as."""
  newest = jax.device_get(trajectory).newest
  return kinds_.kinds_table(trees.named_leaves(newest), kinds_.leaf_kinds(newest, kinds))


def report(found: Sequence[Prediction]) -> str:
  """A line for every prediction: accuracy as it is, and how far each kind of leaf moved."""
  kinds = list(found[0].movement)
  header = f'{"predictor":<20} {"data":>6} {found[0].score:>9} {"loss":>9}'
  lines = [header + ''.join(f'  {"|move| " + kind:>22}' for kind in kinds)]
  for p in found:
    accuracy = '-' if p.accuracy is None else f'{p.accuracy:.2%}'
    loss = '-' if p.loss is None else f'{p.loss:.4f}'
    line = f'{p.predictor:<20} {f"x{p.multiple:.3g}":>6} {accuracy:>9} {loss:>9}'
    for kind in kinds:
      move = p.movement[kind]
      cell = f'{move["mean_absolute"]:.2e} ({move["relative"]:.1%})'
      line += f'  {cell:>22}'
    lines.append(line)
  lines.append(
    '|move|: mean absolute change of a weight of that kind (and change / norm of Theta^0)'
  )
  return '\n'.join(lines)
