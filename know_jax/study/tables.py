"""The tables of a study's report, in Markdown: ours, and the paper's numbers beside them."""

import csv
import math
import statistics as python_statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from know_jax.report import intervals
from know_jax.study.analysis import (
  Comparison,
  Line,
  compare,
  cross_chosen,
  differences,
  is_sweep,
  naive_line,
  to_line,
  to_shrink_curve,
)
from know_jax.study.arms import MAIN, UNPREDICTED

_PUBLISHED = Path(__file__).parent / 'published'
_PAPER_NAMES = {
  'persistence': 'naive_transfer',
  'incremental': 'incremental_pretraining',
  'known_official': 'known',
}
_LABELS = {
  'scratch': 'scratch (no pre-training)',
  'persistence': 'persistence (naive)',
  'incremental': 'incremental pre-training',
  'extra': 'extra training of equal compute',
}


def published(table: int) -> list[dict[str, str]]:
  """A table of the paper (Jang, Kim and Kim, CVPR 2026), a dict for each line: 1, 6 or 7."""
  with (_PUBLISHED / f'table{table}.csv').open(newline='') as file:
    return list(csv.DictReader(file))


def table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
  """A Markdown table of cells of text, all columns but the first to the right."""
  body = list(body)
  widths = [max(len(line[i]) for line in (header, *body)) for i in range(len(header))]

  def line(cells: Sequence[str]) -> str:
    first, *rest = (
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return '| ' + ' | '.join((first, *rest)) + ' |'

  rule = '|'.join('-' * (w + 1) + ':' if i else '-' * (w + 2) for i, w in enumerate(widths))
  return '\n'.join([line(header), f'|{rule}|', *map(line, body)])


def _spread(values: Sequence[float]) -> str:
  """Mean ± standard deviation in per cent; how many diverged, if any did."""
  if lost := sum(not math.isfinite(value) for value in values):
    return f'diverged {lost}/{len(values)}'
  mean, spread = intervals.mean_and_spread([100 * value for value in values])
  return f'{mean:.2f}' + (f' ± {spread:.2f}' if math.isfinite(spread) else '')


def _number(value: float, form: str) -> str:
  return format(value, form) if math.isfinite(value) else ''


def interval(found: Comparison | None) -> str:
  """A difference with its interval, as in `+0.25 (-0.18 to +0.67)`; empty for None."""
  return '' if found is None else f'{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})'


def _by_arm(lines: Iterable[Line]) -> dict[str, dict[int, Line]]:
  """Arm -> step -> line."""
  found: dict[str, dict[int, Line]] = {}
  for line in lines:
    found.setdefault(line.arm, {})[line.step] = line
  return found


def _headings(lines: Iterable[Line]) -> dict[int, str]:
  """Step -> heading, of the lines that share the naive line's rate."""
  steps = {line.step: line.first['multiple'] for line in lines if line.predictor != 'scratch'}
  return {step: f'x{multiple:.3g}' for step, multiple in sorted(steps.items())}


def _label(arm: str) -> str:
  return _LABELS.get(arm, arm)


def _paper_accuracy(arm: str, heading: str, amount: float) -> str:
  """Table 1 of the paper, where it has such a cell."""
  for line in published(1):
    same_times = f'x{line["times"]}' == heading
    if line['method'] == _PAPER_NAMES.get(arm, arm) and same_times:
      share = f'{100 * amount:g}'
      return f'{line[f"p{share}"]} ± {line[f"sd{share}"]}' if f'p{share}' in line else ''
  return ''


def accuracies(lines: Sequence[Line], amount: float) -> list[str]:
  """Table 1: accuracy after transfer of every main arm, and the paper's beside it."""
  main = [line for line in lines if line.group == MAIN and line.amount == amount]
  headings = _headings(main)
  body = []
  for arm, steps in _by_arm(main).items():
    ours = [_spread(steps[n].values()) if n in steps else '' for n in headings]
    paper = [_paper_accuracy(arm, h, amount) if n in steps else '' for n, h in headings.items()]
    body.append([_label(arm), *ours, *paper])
  header = ['arm', *headings.values(), *(f'paper {h}' for h in headings.values())]
  return [
    f'## Accuracy after transfer, {100 * amount:g} % of the source data',
    table(header, body),
    'Mean ± standard deviation over all trainings; the paper: its table 1.',
  ]


def _tested(lines: Sequence[Line], naive: Line) -> list[tuple[Line, Comparison, float, float]]:
  """Lines with their comparison to naive and both p, corrected for the number of lines."""
  compared = [(line, compare(differences(line, to_line(naive)))) for line in lines]
  pairs = [(line, found) for line, found in compared if found is not None]
  exact = intervals.holm([found.p_exact for _, found in pairs])
  student = intervals.holm([found.p_t for _, found in pairs])
  return [
    (line, found, float(p), float(q))
    for (line, found), p, q in zip(pairs, exact, student, strict=True)
  ]


def _tested_table(lines: Sequence[Line], naive: Line, sweep_in: Sequence[Line] | None) -> str:
  """Differences to naive and, if lines with a shrink sweep are given, to that sweep."""
  header = ['arm', 'pairs', 'to naive (95 % interval)', 'exact p', 'Holm', 't-test p', 'Holm']
  header += ['to shrink at equal norm'] if sweep_in else []
  body = []
  for line, found, holm_exact, holm_t in _tested(lines, naive):
    cells = [
      _label(line.title), str(found.pairs), interval(found), f'{found.p_exact:.3f}',
      f'{holm_exact:.3f}', _number(found.p_t, '.3f'), _number(holm_t, '.3f'),
    ]  # fmt: skip
    if sweep_in:
      curved = line.predictor not in UNPREDICTED
      groups = differences(line, to_shrink_curve(line, sweep_in)) if curved else []
      cells.append(interval(compare(groups)))
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
  """KNOWN against what its gain must be held against.

  Args:
    main: the main lines of one amount.
    naive: that of naive transfer among them.
  """

  def of(name: str) -> list[Line]:
    return [line for line in main if name in (line.arm, line.predictor)]

  def chosen(lines: Sequence[Line], step: int | None) -> Line | None:
    same = [line for line in lines if line.step == step]
    return cross_chosen(same if step is not None else lines)

  reset = [line for line in of('persistence') if line.first['batch_norm'] == 'reset']
  body = []
  for arm in dict.fromkeys(line.arm for line in of('known_leaf')):
    steps: list[int | None] = [None, *(line.step for line in of(arm))]
    for step in steps:
      known = chosen(of(arm), step)
      if known is None:
        continue
      others = [
        naive,
        cross_chosen(reset),
        cross_chosen(of('extra')),
        chosen(of('known_leaf_history_free'), step),
        chosen(of('average'), step),
        cross_chosen(of('shrink')),
      ]
      cells = [
        '' if other is None else interval(compare(differences(known, to_line(other))))
        for other in others
      ]
      body.append([f'{arm}, best step' if step is None else known.title, *cells])
  if not body:
    return []
  header = ['arm', 'naive', 'BatchNorm reset', 'extra', 'history-free', 'average', 'shrink']
  return [
    '## KNOWN against its rivals',
    table(header, body),
    'Paired differences with 95 % intervals, uncorrected. Best step, and of `shrink` always the '
    'best strength and step: for each source seed chosen by the others. '
    '`known_leaf_history_free` and `average` are at the same step.',
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
  """A table for each group of ablations; for the history, the paper's table 6 beside it."""
  parts = []
  for group in dict.fromkeys(line.group for line in lines if line.group != MAIN):
    chosen = [line for line in lines if line.group == group]
    parts += [f'## Ablation: {group}', _tested_table(chosen, naive, None)]
    if group == 'history':
      parts.append(_history_table(chosen))
  return parts


def _history_table(lines: Sequence[Line]) -> str:
  """Table 6: accuracy by length of the history, and the paper's beside it."""
  headings = _headings(lines)
  paper = {(row['method'], row['history_length']): row for row in published(6)}
  body = []
  for arm, steps in _by_arm(lines).items():
    first = next(iter(steps.values())).first
    row = paper.get((first['predictor'], str(first['history'])), {})
    ours = [_spread(steps[n].values()) if n in steps else '' for n in headings]
    theirs = [
      f'{row[h]} ± {row[f"sd{h[1:]}"]}' if n in steps and h in row else ''
      for n, h in headings.items()
    ]
    body.append([arm, str(first['history']), *ours, *theirs])
  header = ['arm', 'S', *headings.values(), *(f'paper {h}' for h in headings.values())]
  return table(header, body) + '\n\nThe paper: its table 6.'


def times(timings: Sequence[Mapping[str, Any]], history: int) -> list[str]:
  """Table 7: what each part costs, against pre-training."""
  timings = [row for row in timings if math.isfinite(row['seconds'])]

  def seconds(task: str) -> list[float]:
    return [row['seconds'] for row in timings if row['task'] == task]

  pretraining = seconds('pretrain')
  if not pretraining:
    return []
  forgetting: dict[tuple[Any, ...], float] = {}
  for row in timings:
    if row['task'] == 'forget' and row['step'] < history:
      run = (row['amount'], row['rate'], row['source_seed'])
      forgetting[run] = forgetting.get(run, 0.0) + row['seconds']
  unit = python_statistics.median(pretraining)
  half = {row['method']: row for row in published(7) if row['dataset_percent'] == '50'}
  trained, known = float(half['naive_transfer']['training_s']), half['known_x2']
  paper = {
    'pre-training': (trained, 1.0),
    'pre-training and forgetting': (float(known['training_s']), None),
    'one prediction': (float(known['prediction_s']), None),
  }
  # Medians: the first of each kind compiles.
  ours = {
    'pre-training': pretraining,
    f'forgetting (stages 1 to {history - 1})': list(forgetting.values()),
    'pre-training and forgetting': [unit + s for s in forgetting.values()],
    'incremental pre-training': seconds('incremental'),
    'extra training': seconds('extra'),
    'one prediction': seconds('predict'),
    'one transfer': seconds('transfer'),
  }
  body = []
  for task, values in ours.items():
    if values:
      median = python_statistics.median(values)
      theirs = paper.get(task, (math.nan, None))[0]
      body.append([
        task, f'{median:.2f}', f'{median / unit:.3f}',
        _number(theirs, '.0f'), _number(theirs / trained, '.4f'),
      ])  # fmt: skip
  header = ['part', 'seconds', 'of pre-training', 'paper, seconds', 'of pre-training']
  return [
    '## Time',
    table(header, body),
    'Medians over runs, by the clock: other work on the machine counts. The paper: its table 7, '
    'with half of CIFAR-100, where pre-training and forgetting together take as long as '
    'pre-training on all of it.',
  ]
