"""Following recommendations: the real loop, shrunk, and a page whose numbers are recomputed."""

import numpy as np
import pytest
import scipy.stats
from runs import small_config
from test_transfer import small_transfer

from know_jax.errors import UserError
from know_jax.io.journal import read_lines
from know_jax.recommendation import NAIVE, Start
from know_jax.study import advice, design


def test_the_loop_resumes_and_none_is_the_same_training_as_naive(tmp_path):
  config = design.default_config()
  config.source.update({k: v for k, v in small_config().items() if k in config.source})
  config.transfer.update({k: v for k, v in small_transfer().items() if k in config.transfer})
  config.source_seeds, config.transfer_seeds = 1, 2
  search = {'starts': [Start('shrink')], 'rates': (1.0,), 'repeats': 3}
  (row,) = advice.run(config, tmp_path, name='digits', **search)
  assert len(row['naive']) == len(row['recommended']) == 2
  # One rate only, so that tuned naive is naive at the usual rate: the same trainings.
  assert row['naive'] == row['usual'] and row['naive_rate'] == 1.0
  if row['start'] == str(NAIVE):
    assert row['recommended'] == row['naive']
  before = (tmp_path / 'rows.jsonl').read_bytes()
  assert advice.run(config, tmp_path, name='digits', **search) == read_lines(
    tmp_path / 'rows.jsonl'
  )
  assert (tmp_path / 'rows.jsonl').read_bytes() == before


def test_a_name_stays_within_the_workdir(tmp_path):
  for name in ('../x', str(tmp_path), 'a/b', '..'):
    with pytest.raises(UserError, match='expected the name of a folder of'):
      advice.run(design.default_config(), tmp_path / 'w', name=name)
  assert not list(tmp_path.iterdir())


def rows(study, gains, starts):
  return [
    {
      'study': study, 'source_seed': i, 'start': start, 'rate': 2.0, 'expected': 0.01,
      'naive_rate': 2.0, 'naive': [0.5, 0.6], 'usual': [0.4, 0.5],
      'recommended': [0.5 + gain, 0.6 + gain], 'trainings': [60, 25.5],
    }
    for i, (gain, start) in enumerate(zip(gains, starts, strict=True))
  ]  # fmt: skip


def test_the_page_has_the_means_and_intervals():
  gains = [0.0, 0.01, 0.02]
  shown = advice.page(
    rows('a', gains, ['naive', 'shrink (steps=1)', 'known (steps=1)'])
    + rows('b', [-0.01, -0.01], ['shrink (steps=1)'] * 2),
    'the command',
  )
  low, high = scipy.stats.t.interval(0.95, 2, 1.0, scipy.stats.sem(100 * np.array(gains)))
  assert f'+1.00 ({low:+.2f} to {high:+.2f})' in shown
  assert 'cost at most 1.00 points on average' in shown and 'beyond the 0.2 points' in shown
  line = next(line for line in shown.splitlines() if line.startswith('| a '))
  assert [cell.strip() for cell in line.split('|')[2:4]] == ['3', '1']
  shown = advice.page(rows('a', [0.0], ['naive']), 'x')
  assert 'at most 0.00 points' in shown and 'within the 0.2 points' in shown
  with pytest.raises(UserError, match='no rows'):
    advice.page([], 'x')
