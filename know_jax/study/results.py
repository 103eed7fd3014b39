"""The files of a study: its journal, results.csv and timings.csv, and how they are read."""

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from know_jax.errors import UserError, os_errors, reason
from know_jax.io.files import write_atomic

RESULTS = 'results.csv'
TIMINGS = 'timings.csv'

COLUMNS: dict[str, type] = {
  # What was trained.
  'group': str,  # 'main', or what an ablation varies.
  'arm': str,  # The name of the arm; with the step it identifies a line of the report.
  'predictor': str,
  'step': int,  # n of Theta^-n; 0: nothing is predicted.
  'multiple': float,  # r^-n; 0 from scratch.
  'option': str,  # As in 'c=0.2'.
  'kinds': str,  # The kinds of leaf predicted; empty: all.
  'history': int,  # S
  'rate': float,  # r
  'batch_norm': str,  # keep, reset or recalibrate.
  'lr_scale': float,  # Times this the learning rate of fine-tuning.
  # On what.
  'source': str,  # Data set of the forgetting run.
  'target': str,  # Data set of the transfer.
  'model': str,
  'labels_per_class': int,  # 0: all.
  'amount': float,  # The share of the source's training examples.
  'source_seed': int,
  'transfer_seed': int,
  # The start, before any further training; empty from scratch.
  'source_accuracy': float,  # In [0, 1].
  'source_loss': float,  # Mean cross-entropy.
  'weight_norm': float,  # Of conv, fc and bias leaves below the head, over that of Theta^0.
  'retrodiction': float,  # Error over that of copying; empty where it is not defined.
  'retrodiction_conv': float,
  'retrodiction_fc': float,
  'retrodiction_bias': float,
  'weights': str,  # The first 12 digits of the digest of what was transferred.
  # After the transfer, on the target's test set; NaN if the training diverged.
  'accuracy': float,  # The task's score: of segmentation the mIoU, of captions masked accuracy.
  'loss': float,
  'mean_accuracy': float,  # Of segmentation, over classes.
  'training': float,  # The score on the labelled examples: low where a training was too short.
  'validation': float,  # The score on the training examples that were kept for it.
  # 'epoch:accuracy' for some epochs of fine-tuning; epoch 0 is after the warm-up. Empty but for
  # transfer seed 0.
  'curve': str,
}
"""Column of results.csv -> type; a row is one training. Rows come in the order of the config."""

_LATER = ('mean_accuracy', 'training', 'validation')
"""Columns that files of earlier versions lack; they are read as empty."""

TIMING_COLUMNS: dict[str, type] = {
  'task': str,  # pretrain, forget, incremental, extra, predict or transfer.
  'arm': str,
  'step': int,  # Of the prediction; for forget the stage.
  'amount': float,
  'rate': float,
  'source_seed': int,
  'transfer_seed': int,
  'seconds': float,
}
"""Column of timings.csv -> type. Seconds are of the clock, and so of no two runs the same."""


def write_table(path: Path, columns: Mapping[str, type], rows: Iterable[Mapping[str, Any]]) -> None:
  """Writes rows as CSV, atomically, so that reading gives the same bits; None and NaN are empty.

  Raises:
    UserError: the file cannot be written.
  """
  # As objects: a column of integers with an empty cell stays one of integers.
  table = pd.DataFrame(list(rows), columns=list(columns), dtype=object)
  with os_errors(f'cannot write {path}'):
    write_atomic(path, table.to_csv(index=False, lineterminator='\n').encode())


def read_table(path: Path, columns: Mapping[str, type]) -> pd.DataFrame:
  """Reads what `write_table` wrote; empty cells of numbers are NaN.

  Pandas' own reader would fill a line that was cut off, and not say where a number is none.

  Raises:
    UserError: the file is missing, or is no such table; the first wrong thing is named.
  """
  if path.exists() and not path.is_file():
    raise UserError(f'{path} is a folder or a device; expected a file.')
  try:
    with path.open(newline='') as file:
      header, *lines = list(csv.reader(file)) or [[]]
  except OSError as error:
    raise UserError(f'cannot read {path}: {reason(error)}.') from error
  except (csv.Error, UnicodeError) as error:
    raise UserError(f'{path} is no table of comma-separated values ({error}).') from error
  known = {name: kind for name, kind in columns.items() if name in header or name not in _LATER}
  if header != list(known):
    result = ','.join(header) or 'nothing'
    raise UserError(f'{path} has the columns {result}; expected {",".join(columns)}.')
  rows = []
  for number, line in enumerate(lines, 2):
    if len(line) != len(known):
      raise UserError(f'{path}: line {number} has {len(line)} cells; expected {len(known)}.')
    row = {}
    for (name, kind), cell in zip(known.items(), line, strict=True):
      try:
        row[name] = math.nan if cell == '' and kind is not str else kind(cell)
        if name == 'curve':
          read_curve(cell)
      except ValueError as error:
        form = 'epoch:accuracy ...' if name == 'curve' else kind.__name__
        raise UserError(f'{path}: line {number} has {name} {cell!r}; expected {form}.') from error
    rows.append(row)
  numbers = [name for name, kind in columns.items() if kind is float]
  return pd.DataFrame(rows, columns=list(columns)).astype(dict.fromkeys(numbers, float))


def curve_text(curve: Iterable[tuple[int, float]]) -> str:
  """A learning curve in one cell."""
  return ' '.join(f'{epoch}:{accuracy!r}' for epoch, accuracy in curve)


def read_curve(text: str) -> list[tuple[int, float]]:
  """What `curve_text` wrote."""
  pairs = (part.split(':') for part in text.split())
  return [(int(epoch), float(accuracy)) for epoch, accuracy in pairs]
