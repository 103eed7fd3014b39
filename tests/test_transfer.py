"""Transfer: arms are compared in pairs, a row a training, and nothing is trained twice."""

import re
import shutil
import statistics

import jax
import numpy as np
import pytest
from runs import assert_same_bits, snapshot, task_of

from know_jax import transfer, trees
from know_jax.data.sources import load_dataset
from know_jax.errors import UserError
from know_jax.io import checkpoints
from know_jax.io.journal import read_lines
from know_jax.models import build_model
from know_jax.nowcast import from_run
from know_jax.runs import workdir as workdirs
from know_jax.runs.record import RunRecord, config_dict
from know_jax.training import loop
from know_jax.training.state import DivergedError

ARMS = [
  ('scratch', 0, 0.0),
  ('persistence', 0, 1.0),
  # At step 1 these two are the same weights.
  ('magmax', 1, 2.5),
  ('shrink', 1, 2.5),
  ('shrink', 2, 6.25),
  ('task_vector', 1, 2.5),
]


def small_transfer(**fields):
  config = transfer.default_config()
  small = {
    'seeds': 2,
    'classes': (5, 6, 7, 8, 9),
    'labels_per_class': 10,
    'batch_size': 24,
    'warmup_epochs': 1,
    'warmup_lr': 0.01,
    'epochs': 2,
    'lr': 0.02,
    'weight_decay': 0.01,
  }
  config.update(small | fields)
  return config


@pytest.fixture(scope='module')
def predicted(finished, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('predicted') / 'run'
  shutil.copytree(finished, workdir)
  from_run.run(workdir, predictors=['shrink'], steps=2)
  from_run.run(workdir, predictors=['task_vector', 'magmax'], steps=1)
  return workdir


@pytest.fixture(scope='module')
def transferred(predicted, tmp_path_factory):
  """A workdir after a transfer, and the rows."""
  workdir = tmp_path_factory.mktemp('transferred') / 'run'
  shutil.copytree(predicted, workdir)
  return workdir, transfer.run(small_transfer(), workdir)


@pytest.fixture
def copy(predicted, tmp_path):
  shutil.copytree(predicted, tmp_path / 'run')
  return tmp_path / 'run'


def results(workdir):
  (path,) = workdir.glob('transfer/*/results.jsonl')
  return path


def untimed(rows):
  return [{k: v for k, v in row.items() if k != 'seconds'} for row in rows]


# -- the rows ------------------------------------------------------------------------------------


def test_there_is_a_row_for_each_arm_and_seed(transferred):
  workdir, rows = transferred
  assert [(r['predictor'], r['steps'], round(r['multiple'], 9), r['seed']) for r in rows] == [
    (*arm, seed) for arm in ARMS for seed in (0, 1)
  ]
  assert read_lines(results(workdir)) == rows
  for row in rows:
    assert row.keys() == {
      'predictor', 'steps', 'multiple', 'source_accuracy', 'seed', 'accuracy', 'loss', 'seconds',
      'weights',
    }  # fmt: skip
    assert 0 < row['accuracy'] < 1
    assert 0 < row['loss'] < 5
    assert row['seconds'] > 0
    if row['predictor'] == 'scratch':
      assert row['source_accuracy'] is None
      continue
    path = workdir / 'predictions' / row['predictor'] / str(row['steps'])
    path = path if row['steps'] else workdirs.stage_path(workdir, 0)
    assert row['weights'] == checkpoints.weights_digest(path)
    assert row['source_accuracy'] == checkpoints.read_metadata(path)['test_accuracy']
  record = RunRecord.read(results(workdir).parent, transfer.KIND)
  assert record['config'] == config_dict(small_transfer())


def test_equal_weights_give_equal_results_and_others_do_not(transferred):
  _, rows = transferred
  scores = {(r['predictor'], r['steps'], r['seed']): (r['accuracy'], r['loss']) for r in rows}
  for seed in (0, 1):
    assert scores['magmax', 1, seed] == scores['task_vector', 1, seed]
  others = [score for key, score in scores.items() if key[0] != 'magmax']
  assert len(set(others)) == len(others)


def spy_on_fit(monkeypatch, *, train):
  """Lets transfers train, or only pretend to, and returns what they asked for."""
  calls, real = [], loop.fit

  def fit(model, start, data, indices, **options):
    call = {'start': start.state, 'indices': indices, **options}
    call['end'] = real(model, start, data, indices, **options) if train else start.state
    calls.append(call)
    return call['end']

  monkeypatch.setattr(loop, 'fit', fit)
  return calls


def test_arms_of_one_seed_share_head_labels_and_order(monkeypatch, copy):
  calls = spy_on_fit(monkeypatch, train=False)
  transfer.run(small_transfer(seeds=3), copy)
  assert len(calls) == len(ARMS) * 3 * 2
  described = [
    tuple(
      np.asarray(x).tobytes()
      for x in (
        call['start'].params['head']['kernel'],
        call['start'].params['head']['bias'],
        call['indices'],
        jax.random.key_data(call['key']),
      )
    )
    for call in calls
  ]
  for phase in (0, 1):
    for seed in range(3):
      of_this_seed = described[2 * seed + phase :: 6]
      assert len(of_this_seed) == len(ARMS)
      assert len(set(of_this_seed)) == 1
  # Seeds share nothing but the zero bias, and the phases of one seed all but the order.
  heads, _, labels, keys = (set(column) for column in zip(*described, strict=True))
  assert (len(heads), len(labels), len(keys)) == (3, 3, 6)


def test_the_head_is_new_and_the_rest_that_of_the_arm(monkeypatch, copy):
  calls = spy_on_fit(monkeypatch, train=False)
  transfer.run(small_transfer(seeds=1), copy, ['shrink'])
  newest = workdirs.restore_stage(copy, 0)
  starts = [call['start'] for call in calls[::2]]
  sources = [
    None,
    newest,
    *(checkpoints.restore(copy / 'predictions' / 'shrink' / steps) for steps in '12'),
  ]
  assert len(starts) == len(sources)
  for start, source in zip(starts, sources, strict=True):
    assert start.params['head']['kernel'].shape == (16, 5)
    if source is not None:
      assert_same_bits(start.collections['batch_stats'], source['batch_stats'])
      for layer in set(source['params']) - {'head'}:
        assert_same_bits(start.params[layer], source['params'][layer])
    assert (start.params['head']['kernel'] != newest['params']['head']['kernel']).all()
  scratch = starts[0]
  assert (scratch.params['dense']['kernel'] != newest['params']['dense']['kernel']).all()
  assert (scratch.collections['batch_stats']['norm1']['mean'] == 0).all()


def test_the_warm_up_moves_head_and_normalisation_only(monkeypatch, copy):
  calls = spy_on_fit(monkeypatch, train=True)
  transfer.run(small_transfer(seeds=1, from_scratch=False), copy, ['shrink'])
  assert len(calls) == 2 * 3
  for warm, fine in zip(calls[::2], calls[1::2], strict=True):
    options = ('epochs', 'lr', 'schedule', 'batch_size')
    assert [warm[option] for option in options] == [1, 0.01, 'constant', 24]
    assert [fine[option] for option in options] == [2, 0.02, 'cosine', 24]
    for call, moving in ((warm, {'head', 'norm1', 'norm2', 'norm3'}), (fine, None)):
      before, after = (trees.named_leaves(call[end].params) for end in ('start', 'end'))
      for path, leaf in before.items():
        # Weight decay does not move what is frozen either.
        moves = moving is None or path.split('/')[0] in moving
        assert (np.asarray(leaf) != after[path]).any() == moves, path
      for layer in ('norm1', 'norm2', 'norm3'):
        stats = [call[end].collections['batch_stats'][layer]['mean'] for end in ('start', 'end')]
        assert (stats[0] != stats[1]).any()
    assert_same_bits(fine['start'].variables, warm['end'].variables)
    assert int(fine['start'].step) == 0


@pytest.mark.parametrize('keep', [False, True])
def test_fine_tuning_begins_a_new_optimiser_or_goes_on_with_that_of_the_warm_up(
  monkeypatch, copy, keep
):
  calls = spy_on_fit(monkeypatch, train=True)
  config = small_transfer(seeds=1, from_scratch=False, keep_optimizer=keep)
  transfer.run(config, copy, ['shrink'])
  for warm, fine in zip(calls[::2], calls[1::2], strict=True):
    moments = trees.named_leaves(fine['start'].opt_state)
    (count,) = {int(x) for path, x in moments.items() if path.endswith('count')}
    assert count == (int(warm['end'].step) if keep else 0)
    for path, leaf in moments.items():
      if path.endswith('kernel'):
        assert leaf.any() == (keep and 'head' in path), path
    assert int(fine['start'].step) == 0


# -- running on ----------------------------------------------------------------------------------


def test_the_same_command_again_trains_nothing(monkeypatch, transferred, tmp_path):
  workdir, rows = transferred
  shutil.copytree(workdir, tmp_path / 'run')
  before = snapshot(tmp_path / 'run')
  calls = spy_on_fit(monkeypatch, train=False)
  assert transfer.run(small_transfer(), tmp_path / 'run') == rows
  assert calls == []
  assert snapshot(tmp_path / 'run') == before


class Crash(BaseException):
  """Ends a transfer where it stands."""


def test_a_killed_transfer_runs_on(monkeypatch, transferred, copy):
  _, rows = transferred
  for after in (2, 5, 1):  # Trainings of two phases: killed between two, and in the middle of one.
    real, count = loop.fit, 0

    def fit(*args, real=real, after=after, **options):
      nonlocal count
      count += 1
      if count > after:
        raise Crash
      return real(*args, **options)

    with monkeypatch.context() as patch:
      patch.setattr(loop, 'fit', fit)
      with pytest.raises(Crash):
        transfer.run(small_transfer(), copy)
  path = results(copy)
  assert untimed(read_lines(path)) == untimed(rows[: 1 + 2 + 0])
  # A kill within the writing of a line.
  path.write_bytes(path.read_bytes() + b'{"predictor": "sc')
  found = transfer.run(small_transfer(), copy)
  assert untimed(found) == untimed(rows)
  assert read_lines(path) == found


def test_only_what_is_new_is_trained(monkeypatch, transferred, tmp_path):
  workdir, rows = transferred
  shutil.copytree(workdir, tmp_path / 'run')
  workdir = tmp_path / 'run'
  # Other weights under an old name.
  from_run.run(workdir, predictors=['shrink'], steps=2, batch_norm='reset')
  # What a kill in the middle of a save leaves.
  shutil.copytree(workdir / 'predictions/shrink/1', workdir / 'predictions/shrink/.1.saving-abcd')
  calls = spy_on_fit(monkeypatch, train=True)
  found = transfer.run(small_transfer(), workdir)
  assert len(calls) == 4 * 2
  for new, old in zip(untimed(found), untimed(rows), strict=True):
    assert (new == old) == (old['predictor'] != 'shrink')
    assert new['predictor'] == old['predictor']
  # Another config has a file of its own.
  transfer.run(small_transfer(seeds=1, epochs=1), workdir, ['magmax'])
  assert len(list(workdir.glob('transfer/*/results.jsonl'))) == 2
  assert len(calls) == 4 * 2 + 3 * 2


# -- the labelled examples -----------------------------------------------------------------------


def test_an_arm_that_diverges_does_not_end_the_others(monkeypatch, copy):
  train_one = transfer.train_one

  def diverging(task, variables, *rest):
    if variables is None:
      raise DivergedError('the loss is nan')
    return train_one(task, variables, *rest)

  monkeypatch.setattr(transfer, 'train_one', diverging)
  config = small_transfer(seeds=1)
  rows = transfer.run(config, copy)
  scratch, *others = rows
  assert scratch['predictor'] == 'scratch' and np.isnan(scratch['accuracy'])
  assert all(np.isfinite(row['accuracy']) for row in others)
  # It is a result like any other: kept, and not tried again.
  again = transfer.run(config, copy)
  assert np.isnan(again[0]['accuracy']) and again[1:] == others
  _, body = cells_of(transfer.table(rows))
  assert 'nan' in body['scratch (no pre-training)']


def test_labelled_subsets_hold_so_many_of_each_class():
  source = load_dataset('digits', 'train', classes=(5, 6, 7, 8, 9))
  labels, task = (
    source.labels,
    task_of(build_model('cnn', num_classes=5), source.images, source.labels),
  )
  found = transfer.labelled_subset(task, 10, 0)
  assert found.dtype == np.int32
  assert len(set(found.tolist())) == 50
  assert found.tolist() == sorted(found.tolist())
  assert np.bincount(labels[found]).tolist() == [10] * 5
  assert (transfer.labelled_subset(task, 10, 0) == found).all()
  others = {tuple(transfer.labelled_subset(task, 10, seed)) for seed in range(20)}
  assert len(others) == 20
  # All examples have their chance: of 20 draws of 10 from about 144, none takes the first only.
  assert len(set().union(*others)) > 450
  # More labels of the same seed are more labels, not others.
  assert set(found) < set(transfer.labelled_subset(task, 20, 0))
  assert transfer.labelled_subset(task, 0, 3).tolist() == list(range(len(labels)))


@pytest.mark.parametrize(
  ('per_class', 'message'),
  [
    (4, 'labels_per_class is 4, but class 2 has 3 training examples'),
    (-1, 'labels_per_class is -1; expected at least 0'),
  ],
)
def test_labelled_subsets_that_cannot_be_drawn(per_class, message):
  with pytest.raises(UserError, match=message):
    labels = np.repeat([0, 1, 2], [9, 4, 3])
    task = task_of(build_model('cnn', num_classes=3), np.zeros((16, 8, 8, 1), np.uint8), labels)
    transfer.labelled_subset(task, per_class, 0)


def test_validation_examples_are_kept_from_training(monkeypatch, copy):
  calls, scored, real = spy_on_fit(monkeypatch, train=False), [], loop.evaluate

  def evaluate(task, variables, data, *, indices=None):
    scored.append(indices)
    return real(task, variables, data, indices=indices)

  monkeypatch.setattr(loop, 'evaluate', evaluate)
  config = small_transfer(seeds=1, labels_per_class=0, validation_examples=40, from_scratch=False)
  rows = transfer.run(config, copy, only=['shrink'])
  chosen = [indices for indices in scored if indices is not None]
  assert len(chosen) == len(rows) == 3
  assert all((indices == chosen[0]).all() and len(set(indices)) == 40 for indices in chosen)
  size = len(load_dataset('digits', 'train', classes=(5, 6, 7, 8, 9)).labels)
  for call in calls:
    assert len(call['indices']) == size - 40 and not set(call['indices']) & set(chosen[0])
  # Counted anew over those images alone.
  for row in rows:
    assert 0 <= row['validation'] <= 1
    assert (row['validation'] * 40) % 1 == pytest.approx(0, abs=1e-6)
  assert 'shrink' in transfer.table(rows)
  few = small_transfer(validation_examples=10**6)
  with pytest.raises(UserError, match='validation_examples is 1000000; expected 0 to'):
    transfer.run(few, copy)


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      {'image_size': (16, 16)},
      r"leaf 'params/dense/kernel' has shape \(16, 16\) in the network for digits images "
      r'\(16, 16, 1\); expected \(4, 16\), as in the source network',
    ),
    ({'labels_per_class': 500}, r'labels_per_class is 500, but class \d has \d+ training examples'),
    ({'labels_per_class': 3}, 'the labelled subset has 15 examples; expected at least batch_size'),
    ({'batch_size': 20}, 'batch_size is 20; expected a positive multiple of the 8 devices'),
    ({'seeds': 0}, 'seeds is 0; expected at least 1'),
    ({'epochs': -1}, 'epochs is -1; expected at least 0'),
    ({'warmup_lr': -1.0}, 'the learning rate is -1.0; expected'),
    ({'optimizer': 'sdg'}, "unknown optimizer 'sdg'. Did you mean 'sgd'"),
    ({'schedule': 'cosin'}, "unknown schedule 'cosin'. Did you mean 'cosine'"),
    ({'test_split': 'tset'}, "unknown split of 'digits' 'tset'. Did you mean 'test'"),
    ({'augmentation': {'zoom': 2.0}}, 'augmentation zoom is 2.0; expected'),
  ],
)
def test_what_does_not_fit_is_told_before_anything_is_written(copy, fields, message):
  with pytest.raises(UserError, match=message):
    transfer.run(small_transfer(**fields), copy)
  assert not (copy / 'transfer').exists()


def test_workdirs_and_predictors_that_are_not_there(copy, tmp_path):
  with pytest.raises(UserError, match=r"no predictions of 'known'; found magmax, shrink, task_v"):
    transfer.run(small_transfer(), copy, ['known'])
  with pytest.raises(UserError, match=r'nowhere: no forgetting run is here'):
    transfer.run(small_transfer(), tmp_path / 'nowhere')
  (copy / 'predictions' / 'shrink' / '1' / 'manifest.json').write_text('{}')
  with pytest.raises(UserError, match=r'shrink/1/manifest.json is damaged or foreign'):
    transfer.run(small_transfer(), copy)
  record = RunRecord.read(copy, workdirs.KIND)
  record.update(stages=record['stages'][:2])
  with pytest.raises(UserError, match=r'run: 2 of 5 stages are done'):
    transfer.run(small_transfer(), copy)
  assert not (copy / 'transfer').exists()


# -- the table -----------------------------------------------------------------------------------


def row(predictor, steps, seed, accuracy, source):
  multiple = 0.0 if predictor == 'scratch' else 2.0**steps
  return {
    'predictor': predictor, 'steps': steps, 'multiple': multiple, 'source_accuracy': source,
    'seed': seed, 'accuracy': accuracy, 'loss': 1.0, 'seconds': 1.0, 'weights': 'x',
  }  # fmt: skip


def cells_of(table):
  lines = [line for line in table.splitlines() if line.startswith('|')]
  assert len({len(line) for line in lines}) == 1  # Columns are aligned.
  header, rule, *body = ([cell.strip() for cell in line.split('|')[1:-1]] for line in lines)
  assert all(re.fullmatch('-+:?', cell) for cell in rule)
  return header, {cells[0]: cells[1:] for cells in body}


@pytest.mark.parametrize('stage', [0, 3])
def test_predictions_of_another_run_are_refused(copy, tmp_path, stage):
  path = workdirs.stage_path(copy, stage)
  weights = jax.tree.map(lambda x: x + 1, checkpoints.restore(path))
  metadata = checkpoints.read_metadata(path)
  checkpoints.save(path, weights, metadata=metadata, overwrite=True)
  with pytest.raises(UserError, match=r'magmax/1 was predicted from other stages than those of'):
    transfer.run(small_transfer(), copy)
  assert not (copy / 'transfer').exists()


def test_the_table_has_means_and_spreads():
  scores = {
    ('scratch', 0): [0.2, 0.4, 0.3],
    ('persistence', 0): [0.50, 0.52, 0.57],
    ('shrink', 1): [0.61, 0.60, 0.68],
    ('shrink', 2): [0.7, 0.7, 0.7],
    ('average', 2): [0.125, 0.5, 0.25],
  }
  rows = [
    row(name, steps, seed, accuracy, None if name == 'scratch' else 0.9 - steps / 10)
    for (name, steps), values in scores.items()
    for seed, accuracy in enumerate(values)
  ]
  table = transfer.table(rows)
  header, body = cells_of(table)
  assert header == ['predictor'] + [f'{part} x{m}' for part in ('as is', 'transfer') for m in '124']

  def shown(name, steps):
    percent = [100 * value for value in scores[name, steps]]
    return f'{statistics.mean(percent):.1f} ± {statistics.stdev(percent):.1f}'

  assert shown('persistence', 0) == '53.0 ± 3.6'
  naive = shown('persistence', 0)
  assert body == {
    'scratch (no pre-training)': ['', '', '', shown('scratch', 0), '', ''],
    'persistence (naive)': ['90.0', '', '', naive, '', ''],
    'average': ['90.0', '', '70.0', naive, '', shown('average', 2)],
    'shrink': ['90.0', '80.0', '70.0', naive, shown('shrink', 1), '70.0 ± 0.0'],
  }
  assert 'over 3 seeds.' in table


def test_the_table_of_one_seed_has_no_spread():
  table = transfer.table([row('persistence', 0, 0, 0.5, 0.9)])
  assert 'over 1 seed.' in table
  header, body = cells_of(table)
  assert header == ['predictor', 'as is x1', 'transfer x1']
  assert body == {'persistence (naive)': ['90.0', '50.0']}


def test_the_table_of_a_transfer(transferred):
  _, rows = transferred
  header, body = cells_of(transfer.table(rows))
  assert header[1:] == [
    f'{part} x{m}' for part in ('as is', 'transfer') for m in ('1', '2.5', '6.25')
  ]
  assert list(body) == [
    'scratch (no pre-training)', 'persistence (naive)', 'magmax', 'shrink', 'task_vector',
  ]  # fmt: skip
  assert body['magmax'] == body['task_vector']
  percent = [100 * r['accuracy'] for r in rows if (r['predictor'], r['steps']) == ('shrink', 2)]
  assert body['shrink'][-1] == f'{np.mean(percent):.1f} ± {np.std(percent, ddof=1):.1f}'
