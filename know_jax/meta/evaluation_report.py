"""The tables of the retrodiction benchmark, and the card of trained weights, in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from know_jax.kinds import KINDS
from know_jax.report.intervals import bootstrap_interval
from know_jax.report.markdown import table

OVERALL = 'overall'
COLUMNS = (*KINDS, OVERALL)
FIELDS = ('split', 'left_out', 'run', 'family', 'dataset', 'arm', *COLUMNS)
NETWORK_FIELDS = (
  'split', 'run', 'family', 'dataset', 'arm', 'what', 'batch_norm', 'loss', 'accuracy',
  'loss_change', 'accuracy_change',
)  # fmt: skip
SPLITS = {
  'run': 'Split by run: other runs of the same families and data sets were trained on',
  'family': 'Split by family: no run of the family was trained on',
  'dataset': 'Split by data set: no run on the data set was trained on',
}
"""Split -> the title of its table."""

_OURS = 'known_leaf'


def report(
  rows: Sequence[Mapping[str, Any]], networks: Sequence[Mapping[str, Any]], resamples: int
) -> str:
  """The benchmark in Markdown, from the rows of `retrodiction.csv` and of `networks.csv`."""
  errors = pd.DataFrame(rows, columns=list(FIELDS))
  parts = [
    'Error in predicting the hidden weights divided by that of copying the newest weights: mean '
    'over test runs [95 % bootstrap interval]; below 1 is better than doing nothing. Intervals are '
    'over runs; where a family or data set is left out, over these and the runs within.',
  ]
  for split, title in SPLITS.items():
    chosen = errors[errors['split'] == split]
    if len(chosen):
      parts += [f'### {title}', *_error_tables(chosen, resamples)]
  for field in ('family', 'dataset'):
    chosen = errors[errors['split'] == field]
    if len(chosen):
      parts += [f'### `{_OURS}` on each {field} it was not trained on', _group_table(chosen, field)]
  if networks:
    parts.append('### Predicted networks on their test sets')
    parts += _network_tables(pd.DataFrame(networks), resamples)
  return '\n\n'.join(parts) + '\n'


def _cell(values: pd.Series, left_out: pd.Series, resamples: int, digits: int = 3) -> str:
  """Mean and interval of a value for each run, in the order of the runs' numbers.

  `left_out` says, by run, what was left out: runs of one group share a training; '': nothing.
  """
  values = values.sort_index().astype(float)
  if lost := int((~np.isfinite(values)).sum()):
    return f'not finite in {lost} of {len(values)} runs'
  # Groups are resampled, then runs within; where nothing was left out each run is its own.
  names = [left_out[run] or str(run) for run in values.index]
  groups = [group.to_numpy() for _, group in values.groupby(names, sort=False)]
  low, high = bootstrap_interval(groups, resamples=resamples)
  return f'{values.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]'


def _error_tables(rows: pd.DataFrame, resamples: int) -> list[str]:
  """The error of every arm; and `known_leaf` minus each of its rivals, run by run."""
  left_out = rows.groupby('run')['left_out'].first()
  arms = rows['arm'].unique()
  by_run = {column: rows.pivot(index='run', columns='arm', values=column) for column in COLUMNS}

  def cells(arm: str, minus: bool) -> list[str]:
    result = (each[_OURS] - each[arm] if minus else each[arm] for each in by_run.values())
    return [f'`{arm}`', *(_cell(values, left_out, resamples) for values in result)]

  first = f'predictor ({len(left_out)} test runs)'
  second = f'`{_OURS}` minus ... (negative: `{_OURS}` is better)'
  return [
    table([first, *COLUMNS], [cells(arm, False) for arm in arms], pad=False),
    table([second, *COLUMNS], [cells(arm, True) for arm in arms if arm != _OURS], pad=False),
  ]


def _group_table(rows: pd.DataFrame, field: str) -> str:
  groups = rows[rows['arm'] == _OURS].groupby(field)
  body = [
    [
      str(name),
      str(result['run'].nunique()),
      *(f'{result[column].mean():.3f}' for column in COLUMNS),
    ]
    for name, result in groups
  ]
  return table([field, 'runs', *COLUMNS], body, pad=False)


def _network_tables(rows: pd.DataFrame, resamples: int) -> list[str]:
  parts = [
    'Retrodicted: the newest stage predicted from the five before, against copying the stage '
    'before it. Beyond: one step beyond all data, against the newest weights, before any '
    'fine-tuning. Changes in test accuracy (points) and in test loss, mean over test runs '
    '[95 % interval].'
  ]
  questions = ('retrodicted', 'beyond')
  header = [f'{what}: {value}' for what in questions for value in ('accuracy', 'loss')]
  left_out = pd.Series('', rows['run'].unique())
  for policy, of_policy in rows.groupby('batch_norm', sort=False):
    body = []
    for arm, of_arm in of_policy.groupby('arm', sort=False):
      cells = []
      for what in questions:
        result = of_arm[of_arm['what'] == what].set_index('run')
        accuracy, loss = 100 * result['accuracy_change'], result['loss_change']
        cells += (
          [_cell(accuracy, left_out, resamples, 2), _cell(loss, left_out, resamples)]
          if len(result)
          else ['', '']
        )
      body.append([f'`{arm}`', *cells])
    body = [row for row in body if row[0] != '`copying`']
    parts += [
      f'BatchNorm statistics: {policy}.',
      table(['predictor', *header], body, pad=False),
    ]
  return parts


def card_text(cards: Mapping[str, Mapping[str, Any]], benchmark: str) -> str:
  """The card of trained weights as Markdown; cards: recipe -> what its file says of itself."""
  meta = next(iter(cards.values()))['meta_dataset']
  lines = ['# Weights of KNOWN', '']
  for recipe, card in cards.items():
    runs = card['training']['runs']
    lines.append(
      f'- `{recipe}`: {card["what"]}; '
      + ', '.join(f'{n:,} parameters ({kind})' for kind, n in card['parameters'].items())
      + f'; {len(runs["train"])} runs to train on, {len(runs["validation"])} to choose parameters '
      f'by, {len(runs["test"])} for the benchmark alone ({stretch(runs["test"])}).'
    )
  lines += ['', '## Benchmark', '', benchmark.strip(), '', '## Meta-dataset', '']
  lines += [f'- {" ".join(line.split())}' for line in meta['summary']]
  commit = meta['environment'].get('commit', 'unknown')
  lines += ['', f'Made by bin/collect.py at commit {commit}; config:', '', *_block(meta['config'])]
  for recipe, card in cards.items():
    made = card['training']
    steps = ', '.join(f'{card["step"][kind]} ({kind})' for kind in KINDS)
    lines += ['', f'## Training of `{recipe}`', '']
    lines.append(
      f'Made by bin/meta_train.py at commit {made["environment"].get("commit", "unknown")}; '
      f'parameters kept from step {steps}; error on the validation runs: '
      + ', '.join(f'{card["validation_error"][kind]:.3f} ({kind})' for kind in KINDS)
      + '. Config:'
    )
    lines += ['', *_block(made['config'])]
  return '\n'.join(lines) + '\n'


def stretch(numbers: Sequence[int]) -> str:
  """Numbers without gaps as `3 to 7`, others as a list."""
  if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
    return f'{numbers[0]} to {numbers[-1]}'
  return ', '.join(str(number) for number in numbers)


def _block(config: Mapping[str, Any]) -> list[str]:
  return ['```', *(f'{key} = {value!r}' for key, value in config.items()), '```']
