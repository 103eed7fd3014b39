"""The retrodiction benchmark: errors against NumPy on tiny runs; splits; the whole, shrunk."""

import csv
import itertools

import jax
import numpy as np
import pytest
import test_collect
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict
from test_meta_training import synthetic_run

from know_jax.errors import UserError
from know_jax.fields import read_config
from know_jax.meta import collect, evaluation, evaluation_report, meta_training
from know_jax.meta.evaluation import Arm
from know_jax.tasks import load_task
from know_jax.training.batch_norm import apply_policy

ARMS = [
  Arm('persistence', 'persistence'),
  Arm('task_vector', 'task_vector'),
  Arm('shrink', 'shrink', {'c': 0.1}),
]


def tiny_config() -> ConfigDict:
  config = evaluation.default_config()
  for name in evaluation.RECIPES:
    config[name].weights_per_run = 64
    config[name].batch_size = 64
    config[name].steps = 4
    config[name].validate_every = 2
    config[name].validation_share = config[name].test_share = 0.34
  config.predictors = ('task_vector', 'shrink')
  config.networks = ()
  config.resamples = 200
  return config


def test_errors_against_numpy():
  run = synthetic_run(3)
  found = evaluation.retrodict(run, ARMS)
  paths = {'conv': ['c/kernel'], 'fc': ['f/kernel'], 'bias': ['f/bias']}
  paths['overall'] = ['c/kernel', 'f/kernel', 'f/bias']
  predicted = {
    'persistence': lambda w, t: w[t + 4],
    'task_vector': lambda w, t: 2 * w[t + 4] - w[t + 3],
    'shrink': lambda w, t: 0.9 * w[t + 4],
  }
  for column, members in paths.items():
    for arm, function in predicted.items():
      error = copying = 0.0
      for path, t in itertools.product(members, (0, 1)):
        w = run.weights[path].astype(np.float64)
        error += np.abs(function(w, t) - w[t + 5]).sum()
        copying += np.abs(w[t + 4] - w[t + 5]).sum()
      np.testing.assert_allclose(found[arm][column], error / copying, rtol=1e-4, atol=1e-6)
  # All weights of these runs shrink by a tenth a stage.
  assert found['shrink']['overall'] < 1e-5 < found['task_vector']['overall'] < 1


def test_what_is_not_predicted_is_that_of_the_newest_stage():
  run = synthetic_run(0)
  run.weights['n/scale'][:] = np.arange(7, dtype=np.float32)[:, None]
  found = evaluation.predict_stage(run, ARMS[1], start=1)
  np.testing.assert_array_equal(found['n/scale'], run.weights['n/scale'][5])


def test_every_split_reports_the_same_runs_and_never_trained_on_them(
  synthetic_runs, tmp_path, known_file
):
  text = evaluation.run(tiny_config(), synthetic_runs, tmp_path, str(known_file))
  rows = list(csv.DictReader((tmp_path / 'retrodiction.csv').read_text().splitlines()))
  assert list(rows[0]) == list(evaluation_report.FIELDS)
  tested = {
    split: sorted({int(row['run']) for row in rows if row['split'] == split})
    for split in evaluation_report.SPLITS
  }
  assert tested['run'] == tested['family'] == tested['dataset'] and len(tested['run']) == 4
  for left_out in ('', 'cnn', 'vit', 'digits', 'mnist'):
    record = meta_training.RunRecord.read(
      tmp_path / 'training' / 'known_leaf' / (left_out or 'all'), meta_training.KIND
    )
    seen = {n for part in ('train', 'validation') for n in record['runs'][part]}
    assert not seen & set(tested['run'])
    for run in collect.read_runs(synthetic_runs):
      assert not (run.number in seen and left_out in meta_training.group_names(run.about))
  arms = {row['arm'] for row in rows}
  assert arms == {
    'known_leaf', 'known_leaf_history_free', 'known', 'known_history_free', 'known_raw',
    'least_squares', 'task_vector', 'shrink', 'known_official',
  }  # fmt: skip
  # The table is of the rows.
  values = [
    float(row['fc']) for row in rows if row['split'] == 'family' and row['arm'] == 'task_vector'
  ]
  assert '| `task_vector` | ' in text and f'{np.mean(values):.3f} [' in text
  assert 'not trained on' in text
  card = (tmp_path / 'known.md').read_text()
  assert text.strip() in card and '1,798 parameters (conv)' in card and '(8 to 11)' in card
  # Run on, nothing is trained or tested again, and the files are the same.
  before = {
    path: (path.read_bytes(), path.stat().st_mtime_ns)
    for path in [*tmp_path.glob('*.jsonl'), *tmp_path.rglob('known.safetensors')]
  }
  report = (tmp_path / 'retrodiction.csv').read_bytes()
  assert evaluation.run(tiny_config(), synthetic_runs, tmp_path, str(known_file)) == text
  assert (tmp_path / 'retrodiction.csv').read_bytes() == report
  assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before}
  # Of other networks, or none, it is another benchmark.
  with pytest.raises(UserError, match='official'):
    evaluation.run(tiny_config(), synthetic_runs, tmp_path)


def test_predicted_networks_are_scored_on_their_own_test_set(tmp_path, monkeypatch):
  config = test_collect.tiny_config()
  config.runs, config.families, config.widths = 1, ('cnn_bn',), {'cnn_bn': (2,)}
  collect.run(config, tmp_path)
  (run,) = collect.read_runs(tmp_path)
  found = evaluation.score_networks(run, ARMS, ['keep', 'recalibrate'])
  rows = {(r['what'], r['arm']): r for r in found if r['batch_norm'] == 'keep'}
  stages = run.about['stages']
  # What the run itself measured of its stages: stage 0 is the newest.
  for (what, arm), stage in {
    ('retrodicted', 'copying'): 1,
    ('retrodicted', 'truth'): 0,
    ('beyond', 'copying'): 0,
    ('beyond', 'persistence'): 0,
  }.items():
    np.testing.assert_allclose(rows[what, arm]['accuracy'], stages[stage]['test_accuracy'])
    np.testing.assert_allclose(rows[what, arm]['loss'], stages[stage]['test_loss'], rtol=1e-5)
  assert rows['beyond', 'persistence']['accuracy_change'] == 0
  # The journal has them: a second call scores nothing.
  policies = ['keep', 'recalibrate']
  assert evaluation.score_all(tmp_path, [run], ARMS, policies) == found
  monkeypatch.setattr(evaluation, 'score_networks', None)
  assert evaluation.score_all(tmp_path, [run], ARMS, policies) == found
  table = evaluation_report.report([], found, resamples=100)
  change = 100 * rows['beyond', 'shrink']['accuracy_change']
  assert f'{change:.2f} [{change:.2f}, {change:.2f}]' in table and table.count('`truth`') == 2
  # An independent way: the model itself on weights made by hand.
  task = load_task(run.about['config'])
  weights = {path: 2 * leaf[6] - leaf[5] for path, leaf in run.weights.items()}
  kept = {p: run.weights[p][6] for p, kind in run.about['kinds'].items() if kind == 'keep'}
  variables = unflatten_dict({**weights, **kept}, sep='/')
  images = task.test.images / np.float32(255) - task.prepare.mean
  logits = jax.jit(
    lambda x: task.model.module.clone(axis_name=None).apply(variables, x, train=False)
  )(images)
  accuracy = (np.asarray(logits).argmax(-1) == task.test.labels).mean()
  np.testing.assert_allclose(rows['beyond', 'task_vector']['accuracy'], accuracy, atol=0.003)
  # Recalibrated, both the prediction and what it is compared with have other statistics.
  again = {(r['what'], r['arm']): r for r in found if r['batch_norm'] == 'recalibrate'}
  assert again.keys() == rows.keys()
  assert again['beyond', 'copying']['loss'] != rows['beyond', 'copying']['loss']
  images = task.train.images[:1280] / np.float32(255) - task.prepare.mean
  fresh = apply_policy(
    'recalibrate', task.model, variables, {'image': images}, num_batches=10, batch_size=128
  )
  logits = task.model.module.clone(axis_name=None).apply(
    jax.device_get(fresh), task.test.images / np.float32(255) - task.prepare.mean, train=False
  )
  accuracy_again = (np.asarray(logits).argmax(-1) == task.test.labels).mean()
  np.testing.assert_allclose(again['beyond', 'task_vector']['accuracy'], accuracy_again, atol=0.003)
  change = rows['beyond', 'task_vector']['accuracy_change']
  np.testing.assert_allclose(change, accuracy - stages[0]['test_accuracy'], atol=0.003)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'predictors': ('task_vektor',)}, "Did you mean 'task_vector'"),
    ({'splits': ('families',)}, "Did you mean 'family'"),
    ({'known.leave_out': 'cnn'}, 'known.leave_out'),
    ({'known.architecture': 'conditioned'}, "known.architecture is 'conditioned'"),
    ({'known_raw.architecture': 'scaled'}, "known_raw.architecture is 'scaled'"),
    ({'known.seed': 3}, "seed of the recipes is {'known_leaf': 0, 'known': 3, 'known_raw': 0}"),
    ({'resamples': 0}, 'resamples is 0'),
    ({'predictors': ('known_leaf',)}, "the arm 'known_leaf' is there 2 times"),
    ({'known.test_share': 0.9}, 'validation_share and test_share are 0.34 and 0.9'),
    ({'networks': ('know',)}, "arm 'know'. Did you mean 'known' or 'known_raw' or 'known_leaf'"),
    ({'batch_norm': ('rest',)}, "Did you mean 'reset'"),
  ],
)
def test_bad_settings_are_named_before_anything_is_written(
  synthetic_runs, tmp_path, change, message
):
  config = tiny_config()
  config.update_from_flattened_dict(change)
  with pytest.raises(UserError, match=message):
    evaluation.run(config, synthetic_runs, tmp_path / 'new')
  assert not (tmp_path / 'new').exists()


def test_a_group_without_test_runs_is_named():
  abouts = {n: synthetic_run(n).about for n in range(12)}
  for n, about in abouts.items():
    about['config'] = {**about['config'], 'model': f'family {n}'}
  with pytest.raises(UserError, match="no run is left for test with leave_out='family"):
    evaluation.split_groups(read_config(evaluation.Config, tiny_config()), abouts)


def test_intervals_resample_what_was_left_out():
  """Two families with runs that agree within: the interval is that of the families."""
  rows = [
    {'run': n, 'arm': arm, 'left_out': 'ab'[n % 2], 'split': 'family', 'family': 'ab'[n % 2],
     **dict.fromkeys(evaluation_report.COLUMNS, value)}
    for n in range(20)
    for arm, value in (('known_leaf', 0.5 + n % 2), ('other', 1.0))
  ]  # fmt: skip
  text = evaluation_report.report(rows, [], resamples=500)
  assert '| `known_leaf` | 1.000 [0.500, 1.500] |' in text
  own = [{**row, 'left_out': '', 'split': 'run'} for row in rows]
  low = float(
    evaluation_report.report(own, [], resamples=500).split('| `known_leaf` | 1.000 [')[1][:5]
  )
  assert 0.75 <= low <= 0.9  # 20 runs with a standard deviation of 0.5.


def test_a_list_with_gaps_is_written_out():
  assert (
    evaluation_report.stretch([3, 4, 5]) == '3 to 5' and evaluation_report.stretch([3, 5]) == '3, 5'
  )
