"""`recommend` for a finished forgetting run and the task of a transfer; see bin/recommend.py."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from know_jax import transfer
from know_jax.data.base import part_of
from know_jax.data.subsets import nested_subsets
from know_jax.errors import UserError
from know_jax.fields import Given, config_dict, read_config
from know_jax.jsonable import digest, plain
from know_jax.recommendation import (
  RATES,
  STARTS,
  Recommendation,
  Start,
  recommend,
  trainings,
)
from know_jax.runs.record import RunRecord
from know_jax.runs.workdir import load_trajectory
from know_jax.seeds import named_key
from know_jax.system.progress import progress
from know_jax.tasks import load_task
from know_jax.tasks.base import Task
from know_jax.training import loop
from know_jax.training.state import DivergedError
from know_jax.training.steps import Data

KIND = 'recommend'


def run(
  config: transfer.Config | Given,
  workdir: str | Path,
  *,
  starts: Sequence[Start] = STARTS,
  rates: Sequence[float] = RATES,
  repeats: int = 5,
  validation: float = 0.2,
  labels_seed: int = 0,
) -> Recommendation:
  """`recommend` for a finished forgetting run and the task of a transfer.

  The labelled examples are those of one of the transfer's seeds. Each seed of the search holds out
  its own part of them for validation, and decides head and order; the test set is not used.
  Scores are kept in `recommend/<dataset>-<digest>/trials.jsonl`, the answer in a record beside it.

  Args:
    config: the fields of `transfer.Config`; `seeds` and `from_scratch` mean nothing here.
    workdir: of a finished forgetting run.
    starts: what to try.
    rates: multiples of the config's `lr` to try.
    repeats: how many seeds decide.
    validation: the part of the labelled examples that is held out.
    labels_seed: which of the transfer's seeds draws the labelled examples.

  Returns:
    The recommendation.

  Raises:
    UserError: before any training, if a value does not fit, the workdir is unfinished, or the
      network does not fit the task.
  """
  fields = read_config(transfer.Config, config)
  workdir = Path(workdir).expanduser()
  trajectory, record = load_trajectory(workdir)
  source = record['config']
  if source['task'] is None:
    raise UserError(
      f'{workdir} is of a training loop of its own, whose network is not known here; call '
      'know_jax.recommend with that loop.'
    )
  task = load_task(fields, source)
  transfer.check_fits(task, [jax.device_get(trajectory).newest])
  score = task_score(task, fields, validation, labels_seed)
  asked = config_dict(fields) | {
    'labels_seed': labels_seed,
    'rates': list(rates), 'repeats': repeats, 'validation': validation,
    'starts': [str(start) for start in starts],
  }  # fmt: skip
  dataset = re.sub(r'[^\w.@-]+', '-', fields.dataset).strip('-')
  folder = workdir / 'recommend' / f'{dataset}-{digest(asked)[:8]}'
  answers = RunRecord.open(folder, asked, kind=KIND)
  total = trainings(len(starts), len(rates), repeats)
  with progress(total, 'recommend', 'training') as bar:

    def show(start: Start, value: float) -> None:
      bar.set_postfix(start=str(start), **{task.score: f'{value:.3f}'})
      bar.update(1)

    result = recommend(
      trajectory, score, starts=starts, rates=rates, repeats=repeats, rate=source['rate'],
      kinds=task.kinds, workdir=folder, on_score=show,
    )  # fmt: skip
  answers.update(
    answer=plain(
      {
        'start': str(result.start), 'rate': result.rate, 'gain': result.gain,
        'interval': result.interval, 'best': str(result.best[0]), 'best_rate': result.best[1],
        'best_gain': result.best[2], 'best_interval': result.best[3],
        'naive_rate': result.naive_rate, 'naive_score': result.naive_score,
      },
      'answer',
    )
  )  # fmt: skip
  return result


def task_score(
  task: Task, config: transfer.TargetFields, validation: float = 0.2, labels_seed: int = 0
) -> Callable[[Any, float, float, int], float]:
  """The `score` of `recommend` for a task, on held-out parts of its labelled training examples.

  Args:
    task: the target; its test set is not used.
    config: the fields of the transfer.
    validation: the part of the labelled examples that is held out, anew by each seed.
    labels_seed: draws the labelled examples, as a transfer's seed does.

  Raises:
    UserError: too few labelled examples for a batch and a validation set.
  """
  if not 0 < validation < 1:
    raise UserError(f'validation is {validation}; expected a part between 0 and 1.')
  labelled = transfer.labelled_subset(task, config.labels_per_class, labels_seed)
  strata = None if task.train.strata is None else np.asarray(task.train.strata)[labelled]
  train = Data(task.train, task.prepare)
  size = math.floor((1 - validation) * len(labelled) + 0.5)
  loop.check_batch_size(config.batch_size, size, 'the labelled subset without validation')
  if size == len(labelled):
    raise UserError(
      f'validation is {validation} of {len(labelled)} labelled examples, which is none.'
    )

  def score(params: Any, rate: float, budget: float, seed: int) -> float:
    _, kept = nested_subsets(
      named_key(seed, 'validation'),
      np.zeros(len(labelled), np.int32) if strata is None else strata,
      rate=1 - validation, phases=2, stratified=strata is not None,
    )  # fmt: skip
    held_out = part_of(task.train, np.delete(labelled, kept))
    settings = dataclasses.replace(
      config,
      lr=config.lr * rate,
      epochs=max(1, round(config.epochs * budget)),
      warmup_epochs=round(config.warmup_epochs * budget),
    )
    judged = dataclasses.replace(task, test=held_out)
    data = (train, Data(held_out, task.prepare))
    try:
      return transfer.train_one(judged, params, data, labelled[kept], settings, seed)[task.score]
    except DivergedError:
      return math.nan

  return score
