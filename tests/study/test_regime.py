"""Rate, reset or trajectory: parts of a prediction, the trainer, the run, and what it decides."""

from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

from know_jax.errors import UserError
from know_jax.io.journal import read_lines
from know_jax.predictors import known, parameters
from know_jax.study import parts, regime, regime_report

ROOT = Path(__file__).parents[2]


def tree(rng):
  leaves = {'kernel': rng.normal(size=(3, 3, 2, 4)), 'bias': rng.normal(size=4)}
  return {'conv': {name: leaf.astype(np.float32) for name, leaf in leaves.items()}}


def test_parts_of_a_prediction_are_its_projections():
  rng = np.random.default_rng(0)
  newest, predicted = tree(rng), tree(rng)
  radial, rest = parts.radial(newest, predicted), parts.tangential(newest, predicted)
  scaled = parts.at_norms_of(newest, predicted)
  for name in ('kernel', 'bias'):
    w, p, r, t, s = (
      np.float64(x['conv'][name]).ravel() for x in (newest, predicted, radial, rest, scaled)
    )
    expected = np.linalg.lstsq(w[:, None], p, rcond=None)[0][0] * w
    np.testing.assert_allclose(r, expected, rtol=1e-5)
    np.testing.assert_allclose(t - w, p - expected, atol=1e-5)
    np.testing.assert_allclose(s / np.linalg.norm(s), w / np.linalg.norm(w), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(s), np.linalg.norm(p), rtol=1e-5)
  shape = regime.geometry(newest, radial)
  kernels = [np.linalg.norm(x['conv']['kernel']) for x in (radial, newest)]
  np.testing.assert_allclose(shape['norm'], kernels[0] / kernels[1], rtol=1e-6)
  np.testing.assert_allclose(shape['radial'], 1, rtol=1e-6)


def test_biases_in_scaled_units_are_the_network_of_scaled_histories():
  rng = np.random.default_rng(1)
  history = [tree(rng) for _ in range(5)]
  theta = known.init_theta(jax.random.key(0))
  result = parts.scaled_biases(history, 1, theta)['conv']['bias']
  values = np.stack([stage['conv']['bias'] for stage in history], -1)
  unit = 2 * (values.max(-1) - values.min(-1) + 1e-5)
  seen = (values - values[:, :1]) / unit[:, None]
  moves = [known.KNOWN().apply({'params': theta['bias']}, w) for w in seen]
  np.testing.assert_allclose(result, values[:, -1] + np.asarray(moves) * unit, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  """Grey blocks whose brightness is the class: a few steps learn them."""
  folder = tmp_path_factory.mktemp('regime')
  rng = np.random.default_rng(0)
  arrays = {}
  for name, size, classes in (('source', 152, 4), ('target', 80, 3), ('test', 24, 3)):
    labels = np.arange(size) % classes
    bright = 70 * labels[:, None, None, None] + rng.integers(0, 30, (size, 8, 8, 1))
    arrays |= {f'{name}_images': bright.astype(np.uint8), f'{name}_labels': labels}
  np.savez(folder / 'data.npz', **arrays)
  parameters.save_known(folder / 'theta', known.init_theta(jax.random.key(0)), {})
  config = regime.default_config()
  config.update(
    arrays=str(folder / 'data.npz'), official=str(folder / 'theta'), model='cnn_bn', width=2,
    dtype='float32', batch_size=8, sources=1, extra_sources=1, source_examples=128,
    source_epochs=4, source_lr=1e-2, labels=48, validation=24, warmup_epochs=1, epochs=12, lr=2e-2,
  )  # fmt: skip
  return config


def test_a_run_learns_and_resumes(config, tmp_path, monkeypatch):
  few = (regime.Arm('naive', batch_norm='keep'), regime.Arm('official x8', core=False))
  monkeypatch.setattr(regime, 'ARMS', few[:1])
  first = regime.run(config, tmp_path)
  assert [row['arm'] for row in first] == [regime.SOURCE, few[0].name]
  assert len(first[0]['held_out']) == regime.STAGES
  assert first[0]['config']['conv_init'] == 'he_normal' and first[0]['config']['epochs'] == 12
  assert first[1]['accuracy'] > 0.6 and first[1]['training'] > 0.6  # Chance: 0.33.
  monkeypatch.setattr(regime, 'ARMS', few)
  # No training is begun that would end too late, by the time that the last one took.
  assert regime.run({**config, 'seconds': 1e-3}, tmp_path) == first
  rows = regime.run(config, tmp_path)
  assert rows[:2] == first and [row['arm'] for row in rows[2:]] == [few[1].name]
  assert regime.run(config, tmp_path) == rows == read_lines(tmp_path / 'rows.jsonl')


def test_what_is_missing_is_named(config, tmp_path):
  config = config.copy_and_resolve_references()
  config.labels = 1000
  with pytest.raises(UserError, match='found 80 target images; expected at least 1024'):
    regime.run(config, tmp_path)
  config.official = None
  with pytest.raises(UserError, match='official is not set'):
    regime.run(config, tmp_path)


def scores(**gains):
  """Five sources; gains in points over naive, with a spread of 0.05."""
  arms = {
    'reset': regime_report.RESET, 'official': regime_report.OFFICIAL,
    'radial': regime_report.RADIAL, 'tangential': regime_report.TANGENTIAL,
    'matched': regime_report.MATCHED,
  }  # fmt: skip
  base = {seed: 80.0 + seed for seed in range(5)}
  spread = np.random.default_rng(0).normal(0, 0.05, (len(arms), 5))
  found = {regime_report.NAIVE: base}
  for noise, (key, name) in zip(spread, arms.items(), strict=True):
    found[name] = {seed: base[seed] + gains.get(key, 0.0) + noise[seed] for seed in base}
  return pd.DataFrame(found)


@pytest.mark.parametrize(
  ('gains', 'expected'),
  [
    ({}, ('no gain', 'no', 'yes', 'no')),  # Nothing differs: the rate is as good as official.
    (
      {'reset': 1, 'official': 1, 'radial': 1, 'tangential': 1, 'matched': 1},
      ('it', 'yes', 'yes', 'no'),
    ),
    ({'official': 1, 'radial': 1, 'matched': 1.1}, ('it', 'no', 'yes', 'no')),
    ({'official': 1, 'tangential': 1}, ('it', 'no', 'no', 'yes')),
    (
      {'official': 0.6, 'radial': 1.4, 'matched': 1.5, 'tangential': -0.5},
      ('it', 'no', 'no', 'no'),
    ),
  ],
)
def test_bounds_decide(gains, expected):
  said = regime_report.verdicts(scores(**gains))
  assert [sentence.partition(':')[0] for sentence in said] == [
    'Gain', 'Reset', 'Rate', 'Trajectory'
  ]  # fmt: skip
  assert said[0].endswith(f'{expected[0]} matters.' if expected[0] == 'it' else 'no gain.')
  for sentence, answer in zip(said[1:], expected[1:], strict=True):
    assert sentence.split(': ')[1].startswith(answer)


def test_a_page_tells_of_the_config_of_its_rows():
  rows = read_lines(ROOT / 'docs' / 'results' / 'resnet18' / 'rows.jsonl')
  own = {'epochs': 7, 'conv_init': 'glorot_uniform', 'keep_optimizer': True, 'epsilon': 1e-7}
  told = [r | ({'config': own} if r['arm'] == regime.SOURCE else {}) for r in rows]
  found = regime_report.page(told)
  assert 'and 7 of everything' in found and 'glorot_uniform convolutions' in found
  assert (
    'adam with epsilon 1e-07, kept before all layers are fine-tuned' in found
    and 'lossy' not in found
  )


def test_the_committed_page_is_that_of_the_committed_rows():
  rows = read_lines(ROOT / 'docs' / 'results' / 'resnet18' / 'rows.jsonl')
  assert (ROOT / 'docs' / 'results' / 'resnet18.md').read_text() == regime_report.page(rows)


def test_there_is_no_page_without_rows(tmp_path):
  with pytest.raises(UserError, match='has no rows of transfers yet'):
    regime_report.write(tmp_path, tmp_path / 'page.md')
  assert not (tmp_path / 'page.md').exists()
