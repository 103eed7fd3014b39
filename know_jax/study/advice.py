"""What following `recommend` costs or gains against tuned naive transfer, on the test set.

For each source seed a forgetting run, a recommendation on its labelled images, and then, with seeds
and images that the recommendation did not see, trainings from the recommended start and from the
newest weights, each at its best rate. Where "none" is recommended both are the same training.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from know_jax import forgetting, transfer, transfer_starts
from know_jax.errors import UserError
from know_jax.fields import Given, read_config
from know_jax.io.journal import Journal, read_lines
from know_jax.nowcast import api
from know_jax.recommendation import NAIVE, Start
from know_jax.report.intervals import t_interval
from know_jax.report.markdown import table
from know_jax.runs.workdir import load_trajectory
from know_jax.study.design import Config
from know_jax.tasks import load_task
from know_jax.training.steps import put_data

FIRST_TEST_SEED = 100
"""Test seeds are this and the next ones: none is a seed of a recommendation."""
_STAGES = 5


def run(
  config: Config | Given, workdir: str | Path, *, name: str, **search: Any
) -> list[dict[str, Any]]:
  """Adds a row for each source seed of a study to `rows.jsonl` in the workdir.

  Args:
    config: the fields of `study.design.Config`; of them `source`, `transfer`, `source_seeds` and
      `transfer_seeds` count.
    workdir: of the journal and the forgetting runs; several studies may share it.
    name: of the study, in rows.
    **search: `starts`, `rates`, `repeats` and `validation` of `transfer_starts.run`.

  Returns:
    All rows of the workdir: `study`, `source_seed`, `start`, `rate`, `expected` and its `interval`,
    `naive_rate`, and the test scores `recommended`, `naive` and `usual` (naive at the config's
    rate), a list each with an entry for each test seed.

  Raises:
    UserError: a value does not fit.
  """
  config = read_config(Config, config)
  if name != Path(name).name or name == '..':
    raise UserError(f'name is {name!r}; expected the name of a folder of {workdir}.')
  workdir = Path(workdir).expanduser()
  workdir.mkdir(parents=True, exist_ok=True)
  journal = Journal(workdir / 'rows.jsonl')
  for seed in range(config.source_seeds):
    if journal.get(f'{name} {seed}') is None:
      row = _follow(config, workdir / name / str(seed), seed, search)
      journal.add(f'{name} {seed}', study=name, source_seed=seed, **row)
  return read_lines(workdir / 'rows.jsonl')


def _follow(config: Config, folder: Path, seed: int, search: Mapping[str, Any]) -> dict[str, Any]:
  """One source seed: its forgetting run, its recommendation, and what that is worth."""
  settings = transfer.Config(**vars(config.transfer), seeds=1, from_scratch=False)
  source = forgetting.Config(**vars(config.source) | {'seed': seed, 'stages': _STAGES})
  forgetting.run(source, folder)
  answer = transfer_starts.run(settings, folder, labels_seed=seed, **search)
  trajectory, record = load_trajectory(folder)
  task = load_task(settings, record['config'])
  data = put_data(task)
  subset = transfer.labelled_subset(task, settings.labels_per_class, seed)

  def test(start: Start, rate: float) -> list[float]:
    weights = api.predict(
      trajectory, start.steps, predictor=start.predictor, rate=source.rate, kinds=task.kinds,
      **dict(start.options),
    )  # fmt: skip
    about = dataclasses.replace(settings, lr=settings.lr * rate)
    return [
      transfer.train_one(task, weights, data, subset, about, FIRST_TEST_SEED + i)[task.score]
      for i in range(config.transfer_seeds)
    ]

  naive = test(NAIVE, answer.naive_rate)
  return {
    'start': str(answer.start),
    'rate': answer.rate,
    'expected': answer.gain,
    'interval': list(answer.interval),
    'naive_rate': answer.naive_rate,
    'best': str(answer.best[0]),
    'best_rate': answer.best[1],
    'best_expected': answer.best[2],
    'trainings': list(answer.trainings),
    'naive': naive,
    'usual': test(NAIVE, 1.0),
    'recommended': naive if answer.start == NAIVE else test(answer.start, answer.rate),
  }


def page(rows: Sequence[Mapping[str, Any]], command: str) -> str:
  """The report in Markdown: a line for each study, and one for each source seed.

  Raises:
    UserError: there are no rows.
  """
  if not rows:
    raise UserError('there are no rows; run the command without --report first.')
  studies = list(dict.fromkeys(row['study'] for row in rows))

  def points(row: Mapping[str, Any], one: str, other: str) -> float:
    return 100 * (statistics.mean(row[one]) - statistics.mean(row[other]))

  summary, worst = [], {}
  for study in studies:
    group = [row for row in rows if row['study'] == study]
    costs = [points(row, 'recommended', 'naive') for row in group]
    tuned = [points(row, 'naive', 'usual') for row in group]
    worst[study] = statistics.mean(costs)
    summary.append(
      [
        study,
        str(len(group)),
        str(sum(row['start'] == str(NAIVE) for row in group)),
        _interval(costs),
        f'{min(costs):+.2f}',
        _interval(tuned),
      ]
    )
  each = [
    [
      f'{row["study"]}, {row["source_seed"]}',
      f'{row["start"]} at {row["rate"]:g}',
      f'{100 * row["expected"]:+.2f}',
      f'{points(row, "recommended", "naive"):+.2f}',
      f'{row["naive_rate"]:g}',
      f'{100 * statistics.mean(row["naive"]):.2f}',
      f'{row["trainings"][1]:.0f}',
    ]
    for row in rows
  ]
  most = max(0.0, -min(worst.values()))
  verdict = (
    f'Following the recommendation cost at most {most:.2f} points on average over the sources of '
    f'a study ({"within" if most <= 0.2 else "beyond"} the 0.2 points that it should never cost).'
  )
  return '\n'.join(
    [
      '# What following `recommend` gains or costs',
      '',
      'For each source seed: a forgetting run; a recommendation by successive halving on the '
      'labelled images of the target, a fifth of them held out; then trainings on all labelled '
      'images, with other seeds, from the recommended start and from the newest weights, each at '
      'the rate that the search chose for it, judged on the whole test set. Where the answer is '
      '"none" both are one training. Points of test accuracy; means over source seeds with 95 % '
      't-intervals.',
      '',
      verdict,
      '',
      table(
        [
          'study', 'sources', 'none', 'recommended minus tuned naive', 'worst source',
          'tuned naive minus naive at the usual rate',
        ],
        summary,
      ),
      '',
      table(
        [
          'study, source seed', 'recommended, times the rate', 'expected gain',
          'gain on the test set', "naive's best rate", 'tuned naive, %', 'cost in trainings',
        ],
        each,
      ),
      '',
      f'Made by `{command}` from `rows.jsonl` there.',
      '',
    ]
  )  # fmt: skip


def _interval(values: Sequence[float]) -> str:
  low, high = t_interval(values)
  return f'{statistics.mean(values):+.2f} ({low:+.2f} to {high:+.2f})'
