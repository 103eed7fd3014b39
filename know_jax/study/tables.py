"""The tables of a study's report, in Markdown."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from know_jax.report import intervals
from know_jax.report.markdown import table
from know_jax.study.analysis import (
  Comparison,
  Line,
  compare,
  cross_chosen,
  is_sweep,
  naive_line,
  shrink_curve,
)
from know_jax.study.arms import MAIN, UNPREDICTED

_PUBLISHED = Path(__file__).parent / 'published'
_PAPERS = {'source': 'cifar100', 'target': 'cifar10', 'model': 'resnet18', 'labels_per_class': 0}
"""What the paper's tables are of."""

_LABELS = {
  'scratch': 'scratch (no pre-training)',
  'persistence': 'persistence (naive)',
  'incremental': 'incremental pre-training',
  'extra': 'extra training of equal compute',
  'larger': 'trained on so much data',
}
_PREDICTORS = ('known', 'known_leaf')


def published(number: int) -> pd.DataFrame:
  """A table of the paper (Jang, Kim and Kim, CVPR 2026) as text: 1, 6 or 7."""
  return pd.read_csv(_PUBLISHED / f'table{number}.csv', dtype=str, keep_default_na=False)


def papers_own(naive: Line) -> list[str]:
  """The paper's tables, as they are; empty where a study is not of its data and network."""
  if any(naive.first[name] != value for name, value in _PAPERS.items()):
    return []
  tables = [published(number) for number in (1, 6, 7)]
  return [
    "## The paper's numbers",
    'Tables 1, 6 and 7 of Jang, Kim and Kim (CVPR 2026): of their runs, predictors and machines. '
    'p100 is accuracy with all of the source data, sd100 its standard deviation.',
    *(table([str(name) for name in t.columns], t.to_numpy().tolist()) for t in tables),
  ]


def _spread(line: Line) -> str:
  """Mean ± standard deviation of accuracy in per cent; how many diverged, if any did."""
  values = 100 * line.rows['accuracy'].astype(float)
  if lost := int((~np.isfinite(values)).sum()):
    return f'diverged {lost}/{len(values)}'
  return f'{values.mean():.2f}' + (f' ± {values.std():.2f}' if len(values) > 1 else '')


def _number(value: float, form: str) -> str:
  return format(value, form) if math.isfinite(value) else ''


def interval(found: Comparison | None) -> str:
  """A difference with its interval, as in `+0.25 (-0.18 to +0.67)`; empty for None."""
  return '' if found is None else f'{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})'


def beyond_text(gains: Sequence[tuple[str, Comparison, Comparison]]) -> list[str]:
  """Which predictions do more than shrink; gains: (name, gain over naive, gain over shrinking)."""
  if not gains:
    return []
  both = {
    'bootstrap intervals': [name for name, *result in gains if min(c.low for c in result) > 0],
    't-intervals over source seeds': [
      name for name, *result in gains if min(c.t_low for c in result) > 0
    ],
  }
  return [
    f'Of {len(gains)} predictions (`shrink` left out), these lie above naive transfer and above '
    'the shrink sweep at their weight norm: '
    + '; '.join(f'by 95 % {how}, {", ".join(names) or "none"}' for how, names in both.items())
    + ' (uncorrected for how many they are).'
  ]


def _label(arm: str) -> str:
  return _LABELS.get(arm, arm)


def _by_step(lines: Sequence[Line], columns: Sequence[str] = ()) -> str:
  """Accuracy by arm and multiple of the data, behind columns that all rows of an arm share."""
  steps = {line.step: line.first['multiple'] for line in lines if line.predictor != 'scratch'}
  cells: dict[str, dict[int, Line]] = {}
  for line in lines:
    cells.setdefault(line.arm, {})[line.step] = line
  body = [
    [
      _label(arm),
      *(str(next(iter(result.values())).first[name]) for name in columns),
      *(_spread(result[n]) if n in result else '' for n in sorted(steps)),
    ]
    for arm, result in cells.items()
  ]
  heads = ['S' if name == 'history' else name for name in columns]
  return table(['arm', *heads, *(f'x{steps[n]:.3g}' for n in sorted(steps))], body)


def accuracies(lines: Sequence[Line], amount: float) -> list[str]:
  """Accuracy after transfer of every main arm."""
  main = [line for line in lines if line.group == MAIN and line.amount == amount]
  parts = [
    f'## Accuracy after transfer, {100 * amount:g} % of the source data',
    _by_step(main),
    'Mean ± standard deviation over all trainings.',
  ]
  ends = {line.title: line.rows['training'].astype(float).mean() for line in main}
  if fitted := {title: score for title, score in ends.items() if math.isfinite(score)}:
    least = min(fitted, key=fitted.__getitem__)
    naive = fitted.get(naive_line(lines, amount).title, math.nan)
    parts.append(
      f'On the labelled images themselves naive transfer ends at {100 * naive:.1f} %, and the arm '
      f'that ends lowest there, {_label(least)}, at {100 * fitted[least]:.1f} %.'
    )
  return parts


def _tested_table(lines: Sequence[Line], naive: Line, sweep_in: Sequence[Line] | None) -> str:
  """Differences to naive and, if lines with a shrink sweep are given, to that sweep."""
  header = ['arm', 'pairs', 'to naive (95 % interval)', 'exact p', 'Holm', 't-test p', 'Holm']
  header += ['to shrink at equal norm'] if sweep_in else []
  pairs = [(line, result) for line in lines if (result := compare(line, naive))]
  exact = intervals.holm([result.p_exact for _, result in pairs])
  student = intervals.holm([result.p_t for _, result in pairs])
  body = []
  for (line, result), holm_exact, holm_t in zip(pairs, exact, student, strict=True):
    cells = [
      _label(line.title), str(result.pairs), interval(result), f'{result.p_exact:.3f}',
      f'{holm_exact:.3f}', _number(result.p_t, '.3f'), _number(holm_t, '.3f'),
    ]  # fmt: skip
    if sweep_in:
      curved = line.predictor not in UNPREDICTED
      cells.append(interval(compare(line, shrink_curve(line, sweep_in))) if curved else '')
    body.append(cells)
  return table(header, body)


def comparisons(lines: Sequence[Line], amount: float) -> list[str]:
  """Paired differences to naive transfer, tested, of the main arms; the shrink sweep apart."""
  naive = naive_line(lines, amount)
  main = [line for line in lines if line.group == MAIN and line.amount == amount]
  chosen = [line for line in main if line.arm != naive.arm and not is_sweep(line)]
  parts = [
    f'## Differences to naive transfer, {100 * amount:g} % of the source data',
    _tested_table(chosen, naive, lines),
    'To shrink at equal norm: to the accuracy that the shrink sweep has, in the same pair, at the '
    "arm's weight norm; empty where the norm lies beyond the sweep's.",
  ]
  if sweep := [line for line in main if is_sweep(line)]:
    parts += [
      f'## The shrink sweep, {100 * amount:g} % of the source data',
      _tested_table(sweep, naive, None),
      'One step, convolutions and dense kernels times 1 - c, biases as they are.',
    ]
  return parts


def rivals(main: Sequence[Line], naive: Line) -> list[str]:
  """Both networks against what their gain is held against, in the main lines of one amount."""

  def best(name: str, step: int | None = None) -> Line | None:
    of = [line for line in main if name in (line.arm, line.predictor)]
    return cross_chosen([line for line in of if step in (None, line.step)])

  naives = [line for line in main if line.predictor == 'persistence']
  reset = cross_chosen([line for line in naives if line.first['batch_norm'] == 'reset'])
  body: list[list[str]] = []
  for line in (line for line in main if line.predictor in _PREDICTORS):
    first = not any(row[0].startswith(f'{line.arm}, ') for row in body)
    for step in (None, line.step) if first else (line.step,):
      if (result := best(line.arm, step)) is None:
        continue
      history_free, average = best(f'{line.predictor}_history_free', step), best('average', step)
      others = [naive, reset, best('extra'), history_free, average, best('shrink')]
      name = line.title if step else f'{line.arm}, best step'
      body.append([name, *(interval(compare(result, other)) for other in others)])
  if not body:
    return []
  header = ['arm', 'naive', 'BatchNorm reset', 'extra', 'history-free', 'average', 'shrink']
  return [
    '## KNOWN against its rivals',
    table(header, body),
    'Paired differences with 95 % intervals, uncorrected. Best step, and of `shrink` always the '
    'best strength and step: for each source seed chosen by the others. History-free (the same '
    'network, told that nothing moved) and `average` are at the same step.',
  ]


def starts(main: Sequence[Line]) -> list[str]:
  """What is known of the weights before any further training."""
  body = [
    [
      _label(line.title),
      _number(100 * line.mean('source_accuracy'), '.2f'),
      _number(line.mean('weight_norm'), '.3f'),
      *(_number(line.mean(f'retrodiction{kind}'), '.3f') for kind in ('', '_conv', '_fc', '_bias')),
    ]
    for line in main
    if line.predictor != 'scratch'
  ]
  header = ['arm', 'accuracy', 'norm', 'error', 'conv', 'fc', 'bias']
  return [
    '## Before any further training',
    table(header, body),
    'Accuracy on the source task; norm of the weights below the head over that of Theta^0; error '
    'in retrodicting Theta^0 from older stages over that of copying the newest of them, for all '
    'weights below the head and by kind (below 1: better than copying). Means over source seeds.',
  ]


def ablations(lines: Sequence[Line], naive: Line) -> list[str]:
  """A table for each group of ablations; for the history, accuracy by its length too."""
  parts = []
  for group in dict.fromkeys(line.group for line in lines if line.group != MAIN):
    chosen = [line for line in lines if line.group == group]
    parts += [f'## Ablation: {group}', _tested_table(chosen, naive, None)]
    if group == 'history':
      parts.append(_by_step(chosen, ['history']))
  return parts


def times(timings: pd.DataFrame, history: int) -> list[str]:
  """What each part costs, against pre-training."""
  timings = timings[np.isfinite(timings['seconds'])]
  seconds = {task: rows['seconds'] for task, rows in timings.groupby('task')}
  if 'pretrain' not in seconds:
    return []
  unit = seconds['pretrain'].median()
  stages = timings[(timings['task'] == 'forget') & (timings['step'] < history)]
  forgetting = stages.groupby(['amount', 'rate', 'source_seed'])['seconds'].sum()
  # Medians: the first of each kind compiles.
  parts = {
    'pre-training': seconds['pretrain'],
    f'forgetting (stages 1 to {history - 1})': forgetting,
    'pre-training and forgetting': unit + forgetting,
    'incremental pre-training': seconds.get('incremental', []),
    'extra training': seconds.get('extra', []),
    'one prediction': seconds.get('predict', []),
    'one transfer': seconds.get('transfer', []),
  }
  medians = {name: np.median(result) for name, result in parts.items() if len(result)}
  body = [[name, f'{result:.2f}', f'{result / unit:.3f}'] for name, result in medians.items()]
  return [
    '## Time',
    table(['part', 'seconds', 'of pre-training'], body),
    'Medians over runs, by the clock: other work on the machine counts.',
  ]
