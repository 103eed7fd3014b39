"""The report of a study: Markdown tables and plots, from results.csv and timings.csv alone."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from know_jax.errors import UserError, os_errors
from know_jax.io.files import local_path
from know_jax.report import intervals
from know_jax.study import pictures, tables
from know_jax.study.analysis import (
  Comparison,
  Line,
  beyond_shrinking,
  compare,
  cross_chosen,
  is_sweep,
  lines_of,
  mean_curve,
  naive_line,
  trainings,
)
from know_jax.study.arms import ANSWER, MAIN, UNPREDICTED
from know_jax.study.results import COLUMNS, RESULTS, TIMING_COLUMNS, TIMINGS, read_table


def write(workdir: str | Path, path: str | Path) -> str:
  """Writes a report of a study, finished or not, its plots beside it; gives its answer.

  Raises:
    UserError: there are no results, they lack naive transfer, or a file cannot be written.
  """
  workdir, path = local_path(workdir, 'workdir'), local_path(path, 'report')
  rows, lines, main, naive = read_lines(workdir)
  timings = read_table(workdir / TIMINGS, TIMING_COLUMNS)
  amounts = list(dict.fromkeys(line.amount for line in lines if line.group == MAIN))
  answer = answer_text(main, naive)
  with os_errors(f'cannot write {path}'):
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = _draw(main, naive, path)
    parts = [
      _title(rows, naive),
      '## The answer',
      answer,
      *tables.rivals(main, naive),
      *(part for amount in amounts for part in tables.accuracies(lines, amount)),
      *(part for amount in amounts for part in tables.comparisons(lines, amount)),
      *tables.starts(main),
      *tables.ablations(lines, naive),
      *_why(main, naive, lines),
      *tables.times(timings, naive.first['history']),
      *tables.papers_own(naive),
      '## Plots',
      *(f'![{title}]({file})' for title, file in drawn.items()),
    ]
    path.write_text('\n\n'.join(parts) + '\n', 'utf-8')
  return answer


def read_lines(workdir: Path) -> tuple[pd.DataFrame, list[Line], list[Line], Line]:
  """What a workdir has: rows, all lines, the main ones of the first amount, and naive transfer.

  Raises:
    UserError: there are no results, or they lack naive transfer.
  """
  rows = read_table(workdir / RESULTS, COLUMNS)
  if rows.empty:
    raise UserError(f'{workdir / RESULTS} has no rows yet; run the study first.')
  lines = lines_of(rows)
  amount = next(line.amount for line in lines if line.group == MAIN)
  main = [line for line in lines if line.group == MAIN and line.amount == amount]
  return rows, lines, main, naive_line(lines, amount)


def _title(rows: pd.DataFrame, naive: Line) -> str:
  row = naive.first
  sources, transfers = naive.rows['source_seed'].nunique(), naive.rows['transfer_seed'].nunique()
  labels = row['labels_per_class']
  return (
    f'# Transfer study: {row["source"]} to {row["target"]}, {row["model"]}\n\n'
    f'{f"{labels} labels a class" if labels else "All labels"}; S = {row["history"]}, '
    f'r = {row["rate"]:g}; {sources} source seeds x {transfers} transfer seeds; '
    f'{len(rows):,} rows, of {trainings(rows):,} trainings (arms of equal weights share theirs). '
    'Accuracies are in per cent, differences in points. Arms of one source seed and transfer seed '
    'share source run, head, labels and order, and are compared in pairs. Intervals are 95 % '
    'bootstrap intervals over source seeds and the transfers from each. The exact p is that of a '
    f'sign-flip test over the means of the source seeds: with {sources} it is never below '
    f'{intervals.smallest_p(sources):.3g}. Holm: the p before it, corrected for the number of '
    'lines of its table.'
  )


def against_rivals(main: Sequence[Line], naive: Line) -> dict[str, Comparison]:
  """KNOWN against 'naive transfer', 'shrink' and 'equal compute', in the main lines of one amount.

  Its step, as the strength and step of shrink, is the best by the other source seeds; what the
  study lacks is left out.
  """
  known = cross_chosen([line for line in main if line.arm == ANSWER])
  result = {
    'naive transfer': compare(known, naive),
    'shrink': compare(known, cross_chosen([line for line in main if line.predictor == 'shrink'])),
    'equal compute': compare(known, cross_chosen([line for line in main if line.arm == 'extra'])),
  }
  return {name: comparison for name, comparison in result.items() if comparison}


def answer_text(main: Sequence[Line], naive: Line) -> str:
  """What KNOWN gains against naive transfer, shrink and equal compute, in a sentence each."""
  result = against_rivals(main, naive)
  if not result:
    return f'The study has no `{ANSWER}` that never diverged among its main arms.'
  shrinks = sum(line.predictor == 'shrink' for line in main)
  names = {
    'naive transfer': 'naive transfer',
    'shrink': f'the best of {shrinks} ways to shrink, chosen likewise',
    'equal compute': 'extra training of equal compute',
  }
  corrected = intervals.holm([comparison.p_exact for comparison in result.values()])
  steps = ', '.join(line.title for line in main if line.arm == ANSWER)
  lines = [
    f'`{ANSWER}` below is the best of {steps}, for each source seed chosen by the other source '
    'seeds.'
  ]
  for (name, comparison), holm in zip(result.items(), corrected, strict=True):
    verdict = 'excludes' if comparison.excludes_zero else 'includes'
    lines.append(
      f'- Against {names[name]}, it changes accuracy by {comparison.mean:+.2f} points (95 % '
      f'interval {comparison.low:+.2f} to {comparison.high:+.2f}, which {verdict} zero; exact p '
      f'{comparison.p_exact:.3f} over {comparison.sources} source seeds, with Holm {holm:.3f}).'
    )
  return '\n'.join(lines)


def _points(main: Sequence[Line], naive: Line, column: str) -> pd.DataFrame:
  """`arm`, `x` (a column of the start) and `gain` of all predictions that have both."""
  result = [
    (line.arm, line.mean(column), gain.mean)
    for line in main
    if line.predictor not in UNPREDICTED and line.step and (gain := compare(line, naive))
  ]
  return pd.DataFrame(result, columns=['arm', 'x', 'gain']).dropna()


def _why(main: Sequence[Line], naive: Line, lines: Sequence[Line]) -> list[str]:
  sentences = []
  for column, what in (('retrodiction', 'retrodiction error'), ('weight_norm', 'weight norm')):
    points = _points(main, naive, column)
    rho = intervals.rank_correlation(points['x'], points['gain'])
    if math.isfinite(rho):
      sentences.append(
        f'Over {len(points)} predictions, the rank correlation of {what} with the gain over naive '
        f'transfer is {rho:+.2f}.'
      )
  beyond = beyond_shrinking(lines, naive.amount)
  sentences += tables.beyond_text([(line.title, naives, shrunk) for line, naives, shrunk in beyond])
  if any(line.first['batch_norm'] != 'keep' for line in lines):
    sentences.append(
      'Convolutions that BatchNorm follows compute the same at any scale; times 1 - c, they only '
      'move 1 / (1 - c) times as far, relative to themselves, in each step of Adam. What shrinking '
      'them gains has to be held against naive transfer at other learning rates.'
    )
  if faster := at_other_rates(lines, naive):
    sentences.append(
      'Naive transfer at other learning rates gains '
      + ', '.join(
        f'{tables.interval(result)} at {scale:g} times' for scale, result in faster.items()
      )
      + '.'
    )
  return ['## Why', ' '.join(sentences)] if sentences else []


def at_other_rates(lines: Sequence[Line], naive: Line) -> dict[float, Comparison]:
  """What naive transfer gains at other learning rates: how many times the rate -> the gain."""
  others = {
    line.first['lr_scale']: compare(line, naive)
    for line in lines
    if line.predictor == 'persistence' and line.first['lr_scale'] != 1
    if line.first['batch_norm'] == 'keep'
  }
  return {scale: result for scale, result in others.items() if result}


def _draw(main: Sequence[Line], naive: Line, path: Path) -> Mapping[str, str]:
  """Draws the plots; title -> file name."""
  result: dict[str, str] = {}

  def place(title: str, suffix: str) -> tuple[Path, str]:
    result[title] = f'{path.stem}_{suffix}.png'
    return path.parent / result[title], title

  predicted = [line for line in main if line.step and not is_sweep(line)]
  gains = [(line, gain) for line in predicted if (gain := compare(line, naive))]
  pictures.gains_by_step(*place('Gain over naive transfer by step', 'gain'), gains)
  pictures.accuracy_by_step(*place('Accuracy before fine-tuning', 'before'), predicted, naive)
  shown = [line for line in main if line.step <= 1 and not is_sweep(line)]
  curves = {line.title: curve for line in shown if len(curve := mean_curve(line))}
  if curves:
    pictures.learning_curves(*place('Learning curves of fine-tuning', 'curves'), curves)
  pictures.scatter(
    *place('Retrodiction error and gain', 'retrodiction'),
    _points(predicted, naive, 'retrodiction'),
    'error in retrodiction / error of copying',
  )
  sweep = _points([line for line in main if is_sweep(line)], naive, 'weight_norm')
  pictures.scatter(
    *place('Weight norm and gain, with the shrink curve', 'norm'),
    _points(predicted, naive, 'weight_norm'),
    'norm of the weights / norm of the newest',
    sorted([(1.0, 0.0), *zip(sweep['x'], sweep['gain'], strict=True)]),
  )
  return result
