"""Branches from one network: directions with a known answer, and a run on the digits."""

import json
import math

import numpy as np
import pytest

from know_jax.errors import UserError
from know_jax.study import branches


def moves_of(rng, further, more, tau, noise, size=40_000):
  """Moves that are sums of orthogonal parts and noise of one branch each."""
  parts = np.linalg.qr(rng.normal(size=(size, 3)))[0].T
  kinds = {
    'half': further * parts[0] - tau * parts[1],
    'other half': further * parts[0] - tau * parts[1],
    'same': further * parts[0],
    'twice': further * parts[0] + more * parts[1],
  }
  scale = noise / math.sqrt(size)
  return {
    kind: [vector + scale * rng.normal(size=size) for _ in range(6)]
    for kind, vector in kinds.items()
  }


def test_cosines_are_those_of_the_parts():
  further, more, tau, noise = 2.0, 0.7, 0.5, 1.5
  found = branches.cosines(moves_of(np.random.default_rng(0), further, more, tau, noise))
  half, twice = further**2 + tau**2, further**2 + more**2
  product, one, mean = more * tau - further**2, noise**2, noise**2 / 6
  expected = {
    'tau, more: one branch': product / math.sqrt((half + one) * (twice + one)),
    'tau, more: means': product / math.sqrt((half + mean) * (twice + mean)),
    'tau, further: means': -(further**2) / math.sqrt((half + mean) * (further**2 + mean)),
    'contrast, more - further: means': more
    * tau
    / math.sqrt((tau**2 + mean + one / 3) * (more**2 + mean + one / 3)),
    'half, half': half / (half + one),
    'half, other half: means': half / (half + mean),
  }
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    assert found[name] == pytest.approx(value, abs=0.03), name


def test_without_a_direction_to_more_data_the_contrast_finds_none():
  # A branch on both sides would give a negative cosine here: -(1/6) / (1/6 + 1/6).
  found = branches.cosines(moves_of(np.random.default_rng(1), 1.0, 0.0, 0.0, 1.0))
  assert abs(found['contrast, more - further: means']) < 0.03


def test_a_run_resumes_and_is_reported(tmp_path):
  config = branches.default_config()
  config.update(
    models=('cnn',), widths=(2,), examples=64, branches=2, seeds=1, epochs=2, branch_epochs=1
  )  # fmt: skip
  rows = branches.run(config, tmp_path)
  assert len(rows) == 1 and branches.run(config, tmp_path) == rows
  assert all(-1 <= value <= 1 for value in rows[0]['cosines'].values())
  page = branches.write(tmp_path, tmp_path / 'page.md')
  text = page.read_text()
  for name, value in rows[0]['cosines'].items():
    line = next(line for line in text.splitlines() if branches._COSINES[name] in line)
    assert f'{value:+.2f}' in line
  size = (tmp_path / 'page.png').stat().st_size
  # Another data set, with more networks, has tables and pictures of its own.
  with (tmp_path / 'rows.jsonl').open('a') as journal:
    for model in ('vit', 'resnet_small'):
      row = {**rows[0], 'key': f'other {model}', 'dataset': 'other', 'model': model, 'start': 0.25}
      journal.write(json.dumps(row) + '\n')
  text = branches.write(tmp_path, tmp_path / 'page.md').read_text()
  heads = [line for line in text.splitlines() if line.startswith(('## ', '| cosine', 'Theta'))]
  assert [line.replace(' ', '') for line in heads] == [
    '##digits', f'Theta^0reaches:cnn{100 * rows[0]["start"]:.1f}%.', '|cosine|cnn|',
    '##other', 'Theta^0reaches:vit25.0%,resnet_small25.0%.', '|cosine|vit|resnet_small|',
  ]  # fmt: skip
  assert (tmp_path / 'page.png').stat().st_size > size > 1000
  config.branches = 3
  with pytest.raises(UserError, match='expected an even number'):
    branches.run(config, tmp_path)
