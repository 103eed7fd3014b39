"""The study: arms in pairs, rows that outlive kills, and a report of the rows alone."""

import contextlib
import dataclasses
import itertools
import math
import random
import re
import shutil
import socket
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
import references
import scipy.stats
from PIL import Image
from runs import SIZES, STEPS, assert_same_bits, small_config, snapshot

from know_jax import kinds as kinds_
from know_jax import seeds, transfer, trees
from know_jax.errors import UserError
from know_jax.fields import read_config
from know_jax.io import checkpoints
from know_jax.io import journal as journal_
from know_jax.io.files import locked
from know_jax.io.journal import append_line, read_lines
from know_jax.nowcast.api import PREDICTORS
from know_jax.predictors import parameters
from know_jax.runs import workdir as workdirs
from know_jax.study import analysis, arms, design, parts, report, results, runner, summary, tables
from know_jax.study import sources as study_sources
from know_jax.study.results import COLUMNS, TIMING_COLUMNS
from know_jax.tasks import load_task
from know_jax.training import loop
from know_jax.training.state import DivergedError
from know_jax.training.steps import put_data


@pytest.fixture(scope='module')
def theta(tmp_path_factory):
  """Random parameters of KNOWN conditioned on the leaf that read three stages."""
  params = references.random_conditioned_theta(3)
  path = tmp_path_factory.mktemp('theta') / 'known.safetensors'
  parameters.save_known(path, params, {})
  return str(path)


def small_study(theta, **fields):
  """From runs.small_config: two starts that are equal, and one of every kind of arm."""
  config = design.default_config()
  config.source.update({k: v for k, v in small_config().items() if k in config.source})
  config.transfer.update(
    classes=(5, 6, 7, 8, 9), labels_per_class=10, batch_size=24, warmup_epochs=1, warmup_lr=0.01,
    epochs=2, lr=0.02, weight_decay=0.01,
  )  # fmt: skip
  config.update(source_seeds=2, transfer_seeds=2, history=3, steps=2, curve_epochs=(0, 2))
  config.arms = (
    'scratch',
    'persistence',
    {'predictor': 'persistence', 'batch_norm': 'reset'},
    'incremental',
    'extra',
    {'predictor': 'task_vector', 'steps': (1,)},
    {'predictor': 'magmax', 'steps': (1,)},
    {'predictor': 'known_leaf', 'name': 'known_leaf', 'theta': theta},
    *arms.shrink_sweep((0.5,)),
  )
  config.ablations = (
    {'group': 'history', 'predictor': 'log_fit', 'history': 4, 'steps': (1,)},
    {'group': 'BatchNorm', 'predictor': 'shrink', 'batch_norm': 'recalibrate', 'steps': (1,)},
    {'group': 'learning rate', 'predictor': 'persistence', 'lr_scale': 2.0},
  )
  config.update(fields)
  return config


LINES = [
  ('main', 'scratch', 0), ('main', 'persistence', 0), ('main', 'persistence BatchNorm reset', 0),
  ('main', 'incremental', 0), ('main', 'extra', 0), ('main', 'task_vector', 1),
  ('main', 'magmax', 1), ('main', 'known_leaf', 1), ('main', 'known_leaf', 2),
  ('main', 'shrink c=0.5', 1),
  ('history', 'log_fit S=4', 1), ('BatchNorm', 'shrink BatchNorm recalibrate', 1),
  ('learning rate', 'persistence lr x2', 0),
]  # fmt: skip
PAIRS = list(itertools.product((0, 1), (0, 1)))
ROWS = 4 * len(LINES)
TRAININGS = ROWS - 4  # Those of magmax are those of task_vector.


@pytest.fixture(scope='module')
def studied(finished, theta, tmp_path_factory):
  """The workdir of a finished study; tests write to copies of it."""
  workdir = tmp_path_factory.mktemp('study') / 'run'
  # One of the two source runs is the run that many tests share.
  shutil.copytree(finished, workdir / 'sources' / '1-0-r0.4')
  text = runner.run(small_study(theta), workdir, show_progress=False)
  assert text == f'{ROWS} of {ROWS} trainings are in {workdir / "results.csv"}'
  return workdir


@pytest.fixture
def copy(studied, tmp_path):
  shutil.copytree(studied, tmp_path / 'run')
  return tmp_path / 'run'


def read(workdir):
  return results.read_table(workdir / 'results.csv', COLUMNS).to_dict('records')


def read_timings(workdir):
  return results.read_table(workdir / 'timings.csv', TIMING_COLUMNS).to_dict('records')


def arm_of(study, name, step=1):
  (found,) = [a for a in study.arms if (a.name, a.step) == (name, step)]
  return found


@pytest.fixture(scope='module')
def study(theta):
  return design.Study(small_study(theta))


@pytest.fixture(scope='module')
def source_run(studied):
  return study_sources.Run(studied / 'sources' / '1-0-r0.4')


# -- the rows ------------------------------------------------------------------------------------


def test_there_is_a_row_for_each_training(studied):
  rows = read(studied)
  assert [
    (r['group'], r['arm'], r['step'], r['source_seed'], r['transfer_seed']) for r in rows
  ] == [(*line, *pair) for line in LINES for pair in PAIRS]
  for row in rows:
    assert 0 < row['accuracy'] < 1 and 0 < row['loss'] < 10
    curve = results.read_curve(row['curve'])
    assert [epoch for epoch, _ in curve] == ([] if row['transfer_seed'] else [0, 2])
    assert all(accuracy == row['accuracy'] for _, accuracy in curve[1:])
    assert row['multiple'] == pytest.approx(
      0 if row['predictor'] == 'scratch' else 2.5 ** row['step']
    )
    assert (row['source'], row['target'], row['model']) == ('digits', 'digits', 'cnn_bn')
    if row['predictor'] == 'scratch':
      assert math.isnan(row['source_accuracy']) and math.isnan(row['weight_norm'])
    else:
      assert 0 <= row['source_accuracy'] <= 1
    if row['arm'] == 'persistence':
      assert row['weight_norm'] == 1


def test_seconds_are_kept_apart(studied):
  timings = read_timings(studied)
  tasks = [row['task'] for row in timings]
  # Two source runs of five stages; predictions of all lines but four.
  assert {task: tasks.count(task) for task in set(tasks)} == {
    'pretrain': 2, 'forget': 8, 'incremental': 2, 'extra': 2, 'predict': 2 * 7,
    'transfer': TRAININGS,
  }  # fmt: skip
  assert all(row['seconds'] > 0 for row in timings)
  assert 'seconds' not in COLUMNS


def test_equal_weights_are_trained_once_and_have_equal_rows(studied):
  rows = read(studied)
  named = {}
  for row in rows:
    key = (row['arm'], row['step'], row['source_seed'], row['transfer_seed'])
    named[key] = (row['weights'], row['accuracy'], row['loss'])
  for pair in PAIRS:
    assert named['magmax', 1, *pair] == named['task_vector', 1, *pair]
  others = [value for key, value in named.items() if key[0] != 'magmax']
  assert len(set(others)) == TRAININGS
  # Another learning rate makes another training of equal weights.
  for pair in PAIRS:
    found = [named[name, 0, *pair] for name in ('persistence', 'persistence lr x2')]
    assert found[0][0] == found[1][0] and found[0][1:] != found[1][1:]


def test_a_row_is_what_transfer_makes_of_the_weights(studied, study, source_run):
  """The same training by hand, from the checkpoint, with `transfer.train_one`."""
  config = study.config.transfer
  subset, data = transfer.labelled_subset(study.target, 10, 1), put_data(study.target)
  newest = workdirs.restore_stage(source_run.workdir, 0)
  older = workdirs.restore_stage(source_run.workdir, 1)
  predicted = jax.tree.map(lambda a, b: a + (a - b), newest['params'], older['params'])
  kept = kinds_.leaf_kinds(newest)
  moved = jax.tree_util.tree_map_with_path(
    lambda path, old, new: old if kept[f'params/{trees.path_string(path)}'] == 'keep' else new,
    newest['params'],
    predicted,
  )
  found = transfer.train_one(study.target, {**newest, 'params': moved}, data, subset, config, 1)
  (row,) = [
    r
    for r in read(studied)
    if (r['arm'], r['step'], r['source_seed'], r['transfer_seed']) == ('task_vector', 1, 0, 1)
  ]
  assert (row['accuracy'], row['loss']) == (found['accuracy'], found['loss'])
  assert 'training' not in found
  ends = []
  transfer.train_one(
    study.target, {**newest, 'params': moved}, data, subset, config, 1, on_trained=ends.append
  )
  on_labelled = loop.evaluate(study.target, ends[0], data[0], indices=subset)
  assert row['training'] == on_labelled['accuracy'] != row['accuracy']


def test_learning_curves_are_those_of_shorter_trainings(study, source_run):
  subset = study.subsets[0]
  # At a constant rate a training of one epoch is the first half of one of two.
  config = dataclasses.replace(study.config.transfer, schedule='constant')
  arguments = (study.target, source_run.stages[-1], put_data(study.target), subset)
  found = transfer.train_one(*arguments, config, 0, [2, 0, 1])
  whole = transfer.train_one(*arguments, config, 0)
  assert (found['accuracy'], found['loss']) == (whole['accuracy'], whole['loss'])
  expected = [
    transfer.train_one(*arguments, dataclasses.replace(config, epochs=epochs), 0)['accuracy']
    for epochs in (0, 1, 2)
  ]
  assert found['curve'] == list(zip((0, 1, 2), expected, strict=True))
  assert transfer.train_one(*arguments, config, 0, [])['curve'] == []


def test_arms_of_a_pair_share_head_labels_and_order(monkeypatch, copy, theta):
  (copy / 'journal.jsonl').unlink()
  calls = []

  def fit(model, start, data, indices, **options):
    calls.append((start.state, indices, options))
    return start.state

  monkeypatch.setattr(loop, 'fit', fit)
  monkeypatch.setattr(loop, 'evaluate', lambda *_, **__: {'accuracy': 0.5, 'loss': 1.0})
  runner.run(small_study(theta), copy, show_progress=False)
  assert len(calls) == TRAININGS * 2  # Warm-up and fine-tuning.
  described = {}
  for state, indices, options in calls:
    parts = (state.params['head']['kernel'], indices, jax.random.key_data(options['key']))
    key = tuple(np.asarray(part).tobytes() for part in parts)
    described[key] = described.get(key, 0) + 1
  # Four pairs with two phases each, all arms alike in them; heads, labels and orders all differ.
  assert sorted(described.values()) == [TRAININGS // 4] * 8
  heads, labels, orders = (set(column) for column in zip(*described, strict=True))
  assert (len(heads), len(labels), len(orders)) == (4, 4, 8)


def with_larger(theta, examples, *steps):
  config = small_study(theta, history=2, steps=1, ablations=(), transfer_seeds=1, curve_epochs=())
  config.source.update(train_examples=examples, stages=2)
  config.arms = ('persistence', {'predictor': 'larger', 'steps': steps} if steps else 'larger')
  config.update(amounts=(1.0, 0.5), source_seeds=1)
  return config


def test_the_arm_of_a_larger_set_is_trained_on_it_from_the_same_start(theta, tmp_path):
  config = with_larger(theta, 200)
  runner.run(config, tmp_path, show_progress=False)
  rows = [row for row in read(tmp_path) if row['arm'] == 'larger']
  assert [(row['amount'], row['step'], row['multiple']) for row in rows] == [
    (1, 1, 2.5),
    (0.5, 1, 2.5),
  ]
  assert all(0 < row['accuracy'] < 1 and math.isnan(row['retrodiction']) for row in rows)
  assert rows[0]['weights'] != rows[1]['weights']
  timings = [row['task'] for row in read_timings(tmp_path)]
  assert timings.count('larger') == 2
  # By hand: images, start, epochs and rate of the pre-training, its mean image.
  study = design.Study(config)
  source = next(s for s in study.sources() if s.amount == 0.5)
  settings = study.settings(source)
  few, many = (load_task(dataclasses.replace(settings, train_examples=n)) for n in (100, 250))
  images = [{x.tobytes() for x in task.train.arrays['image']} for task in (few, many)]
  assert images[0] < images[1]
  many = dataclasses.replace(many, prepare=few.prepare)
  recipe = study_sources.forgetting.recipe_of(settings)
  expected = loop.train(
    many, many.init(seeds.named_key(0, 'init')), put_data(many)[0], np.arange(250, dtype=np.int32),
    recipe=recipe, epochs=settings.epochs, batch_size=settings.batch_size, lr=settings.lr,
    schedule=settings.schedule, key=seeds.named_key(0, 'larger', 1),
  )  # fmt: skip
  found, _ = study_sources.Run(tmp_path / 'sources' / source.name).start(arm_of(study, 'larger'))
  assert_same_bits(found, jax.device_get(expected))


def test_larger_sets_are_where_there_are_as_many_examples(theta):
  study = design.Study(with_larger(theta, 400, 1))
  assert [(c.source.amount, c.arm.name) for c in study.cells()] == [
    (1.0, 'persistence'),
    (0.5, 'persistence'),
    (0.5, 'larger'),
  ]
  assert [s.amount for s in study.sources()] == [1.0, 0.5]
  with pytest.raises(
    UserError, match=r"arm 'larger' x6\.25 needs 1250 training examples; .* 7\d\d"
  ):
    design.Study(with_larger(theta, 400, 1, 2))
  with pytest.raises(UserError, match=r"arm 'larger' has steps \[0\]; expected whole numbers"):
    design.Study(with_larger(theta, 400, 0))
  with pytest.raises(UserError, match=r'larger x2\.5 needs 1800 training examples'):
    settings = read_config(study_sources.forgetting.Config, small_config(train_examples=720))
    study_sources.larger_task(settings, load_task(settings), 1)


def test_seeds_of_different_sources_differ():
  pairs = itertools.product(range(40), range(1000))
  assert len({design.combined_seed(*pair) for pair in pairs}) == 40_000


# -- running on ----------------------------------------------------------------------------------


class Crash(BaseException):
  """Ends a study where it stands."""


def test_killed_at_random_points_it_ends_with_the_same_bytes(monkeypatch, copy, theta):
  config = small_study(theta, transfer_seeds=1)
  config.arms = ('scratch', 'persistence', 'extra', *arms.shrink_sweep((0.5,)))
  runner.run(config, copy, show_progress=False)  # Trains nothing: all is there.
  expected = (copy / 'results.csv').read_bytes()
  for path in ('journal.jsonl', 'results.csv', 'timings.csv', 'sources/1-1-r0.4/extra-3'):
    _remove(copy / path)
  rng, kills, countdown = random.Random(0), 0, 0

  def mortal(real):
    def wrapped(*args, **options):
      nonlocal countdown
      countdown -= 1
      if countdown == 0:
        raise Crash
      return real(*args, **options)

    return wrapped

  places = [(loop, 'fit'), (loop, 'evaluate'), (checkpoints, 'save')]
  places += [(journal_, 'append_line'), (results, 'write_atomic')]
  with monkeypatch.context() as patch:
    for module, name in places:
      patch.setattr(module, name, mortal(getattr(module, name)))
    while kills < 10:
      countdown = rng.randrange(1, 12)
      with pytest.raises(Crash):
        runner.run(config, copy, show_progress=False)
      kills += 1
      if kills % 3 == 1 and (copy / 'journal.jsonl').exists():
        # What a kill within the writing of a line leaves.
        with (copy / 'journal.jsonl').open('ab') as file:
          file.write(b'{"key": "0')
    countdown = -1
    runner.run(config, copy, show_progress=False)
  assert (copy / 'results.csv').read_bytes() == expected


def _remove(path):
  shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_the_same_command_again_trains_nothing(monkeypatch, copy, theta):
  before = snapshot(copy)

  def never(*args, **options):
    raise AssertionError

  monkeypatch.setattr(loop, 'fit', never)
  monkeypatch.setattr(loop, 'evaluate', never)
  runner.run(small_study(theta), copy, show_progress=False)
  assert snapshot(copy) == before


def test_arms_and_seeds_may_be_added_and_taken_away(monkeypatch, copy, theta):
  calls, real = [], transfer.train_one
  monkeypatch.setattr(runner, 'train_one', lambda *args: calls.append(args) or real(*args))
  config = small_study(theta, transfer_seeds=1, ablations=())
  config.arms = ('persistence', 'extra', 'average')
  runner.run(config, copy, show_progress=False)
  assert len(calls) == 2 * 2  # Two source seeds, steps 1 and 2 of average.
  assert {(r['arm'], r['transfer_seed']) for r in read(copy)} == {
    ('persistence', 0), ('extra', 0), ('average', 0),
  }  # fmt: skip
  with pytest.raises(UserError, match=r'another config\. transfer\.epochs: found 2'):
    config.transfer.epochs = 3
    runner.run(config, copy, show_progress=False)


def test_a_source_that_another_process_is_at_is_left_to_it(copy, theta):
  (copy / 'journal.jsonl').unlink()
  turn = copy / 'sources' / '.1-0-r0.4.turn'
  config = small_study(theta, ablations=())
  config.arms = ('persistence',)
  with locked(turn):
    text = runner.run(config, copy, show_progress=False)
  assert '2 of 4 trainings' in text and 'at work in other processes: 1-0-r0.4' in text
  assert {row['source_seed'] for row in read(copy)} == {1}
  assert '4 of 4 trainings' in runner.run(config, copy, show_progress=False)


def test_two_workers_one_killed_give_the_same_rows(finished, studied, theta, tmp_path):
  """Two processes of Dask, one killed at its work: the rows of one process, byte for byte."""
  pytest.importorskip('distributed', reason='the extra `workers` is not installed')
  import psutil

  workdir, killed = tmp_path / 'run', []
  shutil.copytree(finished, workdir / 'sources' / '1-0-r0.4')

  def kill_one():
    while not (workdir / 'journal.jsonl').exists():
      time.sleep(0.05)
    workers = [c for c in psutil.Process().children() if 'spawn_main' in ' '.join(c.cmdline())]
    workers[0].kill()
    killed.append(len(workers))

  killer = threading.Thread(target=kill_one, daemon=True)
  killer.start()
  names = ('scratch', 'persistence')
  config = small_study(theta, arms=names, ablations=(), transfer_seeds=1)
  with socket.socket() as other:
    with contextlib.suppress(OSError):  # Dask's own port is taken where another study is at work.
      other.bind(('', 8787))
      other.listen()
    text = runner.run(config, workdir, show_progress=False, workers=2)
  killer.join(timeout=10)
  assert killed == [2]
  assert text == f'4 of 4 trainings are in {workdir / "results.csv"}'
  lines, expected = (
    (folder / 'results.csv').read_text().splitlines() for folder in (workdir, studied)
  )
  # The studied workdir has more arms and transfer seeds, and none of its rows twice.
  assert len(lines) == 5 and set(lines) < set(expected)


def test_an_arm_that_diverges_does_not_end_the_others(monkeypatch, copy, theta):
  (copy / 'journal.jsonl').unlink()
  real = transfer.train_one

  def train_one(task, variables, *rest):
    if variables is None:
      raise DivergedError('the loss is nan')
    return real(task, variables, *rest)

  monkeypatch.setattr(runner, 'train_one', train_one)
  monkeypatch.setattr(study_sources.Run, '_extra', _diverge)
  shutil.rmtree(copy / 'sources/1-0-r0.4/extra-3')
  config = small_study(theta, transfer_seeds=1, ablations=())
  config.arms = ('scratch', 'persistence', 'extra')
  runner.run(config, copy, show_progress=False)
  accuracies = {(r['arm'], r['source_seed']): r['accuracy'] for r in read(copy)}
  diverged = {('scratch', 0), ('scratch', 1), ('extra', 0)}
  assert {key for key, value in accuracies.items() if math.isnan(value)} == diverged
  text = (copy / 'report.md').read_text() if report.write(copy, copy / 'report.md') else ''
  assert re.search(r'scratch \(no pre-training\) +\| diverged 2/2', text)
  # They are results like any others, and not tried again.
  monkeypatch.setattr(runner, 'train_one', None)
  runner.run(config, copy, show_progress=False)


def _diverge(self, history):
  raise DivergedError('the loss is nan')


def test_the_plan_says_how_much_there_is_and_writes_nothing(studied, theta, tmp_path):
  text = runner.plan(small_study(theta), tmp_path / 'none')
  assert 'forgetting runs: 2 (0 done), 5 stages each' in text
  assert 'arms: 10 main, 1 history, 1 BatchNorm, 1 learning rate' in text
  assert f'trainings: {ROWS} (0 done)' in text and 'unmeasured' in text
  assert not (tmp_path / 'none').exists()
  before = snapshot(studied)
  text = runner.plan(small_study(theta, source_seeds=3, transfer_seeds=3), studied)
  assert 'forgetting runs: 3 (2 done)' in text
  assert f'trainings: {9 * len(LINES)} ({ROWS} done)' in text
  timings = read_timings(studied)
  spent = {'transfer': 0.0, 'rest': 0.0}
  for row in timings:
    spent['transfer' if row['task'] == 'transfer' else 'rest'] += row['seconds']
  left = spent['rest'] / 2 + 5 * len(LINES) * spent['transfer'] / TRAININGS
  assert f'time left: about {left / 60:.0f} minutes' in text
  assert f'{spent["transfer"] / TRAININGS:.2f} s a training' in text
  assert snapshot(studied) == before


# -- what arms start from ------------------------------------------------------------------------


def test_extra_training_takes_as_many_steps_as_forgetting(monkeypatch, source_run):
  calls = []

  def fit(model, start, data, indices, **options):
    calls.append((indices, options))
    return start.state

  monkeypatch.setattr(loop, 'fit', fit)
  for history in (2, 3, 5):
    assert_same_bits(source_run._extra(history), source_run.stages[-1])
    indices, options = calls.pop()
    assert options['epochs'] * (len(indices) // options['batch_size']) == sum(STEPS[1:history])
    counts = np.bincount(indices, minlength=SIZES[0])
    assert counts.max() - counts.min() <= 1 and len(counts) == SIZES[0]


def test_extra_training_moves_the_newest_weight(source_run, study):
  variables, seconds = source_run.start(arm_of(study, 'extra', 0))
  newest = trees.named_leaves(source_run.stages[-1])
  assert all((leaf != newest[path]).any() for path, leaf in trees.named_leaves(variables).items())
  assert seconds > 0


def test_incremental_training_goes_from_the_smallest_subset_to_all(monkeypatch, source_run):
  calls = []

  def fit(model, start, data, indices, **options):
    calls.append((start.state, indices, options['epochs'], options['lr']))
    return start.state.replace(step=start.state.step + 1)

  monkeypatch.setattr(loop, 'fit', fit)
  settings = dataclasses.replace(source_run.settings, stage_epochs=3, stage_lr=0.02)
  monkeypatch.setattr(source_run, 'settings', settings)
  source_run._incremental(3)
  assert [len(indices) for _, indices, _, _ in calls] == SIZES[2::-1]
  # As long as the same subsets took in forgetting, so that both cost the same.
  assert [(epochs, lr) for _, _, epochs, lr in calls] == [(3, 0.02), (3, 0.02), (2, 0.01)]
  for (_, small, *_), (_, large, *_) in itertools.pairwise(calls):
    assert set(small) < set(large)
  # From the same fresh network as the pre-training.
  fresh = load_task(source_run.settings).init(seeds.named_key(0, 'init'))
  assert_same_bits(calls[0][0].params, fresh['params'])


@pytest.mark.parametrize('name', ['task_vector', 'shrink', 'known_leaf'])
def test_kinds_alone_move_their_leaves_only(source_run, study, theta, name):
  newest = source_run.stages[-1]
  found = kinds_.leaf_kinds(newest)
  base = arms.Arm('main', name, name, 1, 3, 0.4, theta=theta if name == 'known_leaf' else None)
  whole = trees.named_leaves(source_run.start(base)[0])
  for chosen in (('conv',), ('fc',), ('bias',), ('conv', 'bias')):
    alone = dataclasses.replace(base, kinds=chosen)
    for path, leaf in trees.named_leaves(source_run.start(alone)[0]).items():
      expected = whole if found[path] in chosen else trees.named_leaves(newest)
      assert leaf.tobytes() == np.asarray(expected[path]).tobytes(), path


def test_histories_are_the_newest_stages(source_run):
  from know_jax import predict

  for length in (2, 3, 4):
    arm = arms.Arm('history', 'log_fit', 'log_fit', 1, length, 0.4)
    expected = predict(source_run.stages[-length:], predictor='log_fit', rate=0.4)
    assert_same_bits(source_run.start(arm)[0], jax.device_get(expected))


def test_batch_norm_policies_reach_the_weights(source_run):
  newest = source_run.stages[-1]
  arm = arms.Arm('main', '', 'persistence', 0, 3, 0.4, batch_norm='reset')
  reset, _ = source_run.start(arm)
  assert (reset['batch_stats']['norm1']['mean'] == 0).all()
  assert (newest['batch_stats']['norm1']['mean'] != 0).any()
  recalibrated, _ = source_run.start(dataclasses.replace(arm, batch_norm='recalibrate'))
  assert_same_bits(recalibrated['params'], newest['params'])
  assert (
    recalibrated['batch_stats']['norm1']['mean'] != newest['batch_stats']['norm1']['mean']
  ).all()


def below_the_head(variables, kinds=('conv', 'fc', 'bias')):
  found = kinds_.leaf_kinds(variables)
  return np.concatenate(
    [
      np.ravel(leaf).astype(np.float64)
      for path, leaf in trees.named_leaves(variables).items()
      if found[path] in kinds and '/head/' not in path
    ]
  )


def test_scores_equal_numpy(source_run, study):
  arm = arm_of(study, 'task_vector', 1)
  _, third, second, first, newest = (below_the_head(stage) for stage in source_run.stages)
  variables, _ = source_run.start(arm)
  scores = source_run.scores(arm, variables)
  np.testing.assert_allclose(below_the_head(variables), 2 * newest - first, atol=1e-6)
  norm = np.linalg.norm(2 * newest - first) / np.linalg.norm(newest)
  assert scores['weight_norm'] == pytest.approx(norm, rel=1e-5)
  # Theta^0 from Theta^1 and Theta^2.
  error = np.abs(2 * first - second - newest).mean() / np.abs(first - newest).mean()
  assert scores['retrodiction']['all'] == pytest.approx(error, rel=1e-5)
  for kind in ('conv', 'fc'):
    a, b, c = (below_the_head(stage, (kind,)) for stage in source_run.stages[2:])
    error = np.abs(2 * b - a - c).mean() / np.abs(b - c).mean()
    assert scores['retrodiction'][kind] == pytest.approx(error, rel=1e-4)
  # Two stages hidden: Theta^2 - Theta^4 is added to Theta^2; three hidden are too many.
  later = dataclasses.replace(arm, step=2, predictor='magmax')
  moves = np.stack([second - third, second - below_the_head(source_run.stages[0])])
  moved = np.where(abs(moves[1]) >= abs(moves[0]), moves[1], moves[0])
  error = np.abs(second + moved - newest).mean() / np.abs(second - newest).mean()
  assert source_run.retrodiction(later)['all'] == pytest.approx(error, rel=1e-5)
  assert source_run.retrodiction(dataclasses.replace(arm, step=3)) == {}
  assert source_run.retrodiction(arm_of(study, 'persistence', 0)) == {}
  # KNOWN reads three stages: with two hidden there are just enough.
  known_arm = arm_of(study, 'known_leaf', 2)
  assert source_run.retrodiction(known_arm).keys() >= {'all', 'conv', 'fc'}
  assert source_run.retrodiction(dataclasses.replace(known_arm, step=3)) == {}
  task = load_task(source_run.settings)
  metrics = loop.evaluate(task, variables, put_data(task)[1])
  assert (scores['source_accuracy'], scores['source_loss']) == tuple(
    metrics[name] for name in ('accuracy', 'loss')
  )


def test_digests_tell_weights_apart_but_not_heads(source_run):
  newest, older = source_run.stages[-1], source_run.stages[-2]

  def digest(variables):
    return study_sources.weights_digest(variables, lambda path: 'head' in path.split('/'))

  same = digest(newest)
  other_head = {**newest, 'params': {**newest['params'], 'head': older['params']['head']}}
  assert digest(other_head) == same
  assert study_sources.weights_digest(other_head) != study_sources.weights_digest(newest)
  assert digest(older) != same
  other_stats = {**newest, 'batch_stats': older['batch_stats']}
  assert digest(other_stats) != same


# -- arms and amounts ----------------------------------------------------------------------------


def test_all_predictors_are_main_arms():
  config = design.Config()
  found = arms.arms_of(config, batch_norm=True)
  assert {arm.predictor for arm in found} == {*PREDICTORS, 'scratch', 'incremental', 'extra'}
  for name in set(PREDICTORS) - {'persistence'}:
    steps = [arm.step for arm in found if arm.name == name]
    assert steps == [1, 2, 3], name
  sweep = [dict(arm.options)['c'] for arm in found if arm.name.startswith('shrink c=')]
  assert len(set(sweep)) >= 5
  without = arms.arms_of(config, batch_norm=False)
  assert {a.name for a in found} - {a.name for a in without} == {'persistence BatchNorm reset'}


def test_the_authors_weights_are_an_arm_where_they_are_given(known_file):
  config = design.default_config()
  config.arms = ('persistence', 'known_leaf')
  config.official = str(known_file)
  found = arms.arms_of(read_config(design.Config, config), batch_norm=True)
  # And so are the parts of their prediction, which tell where a gain comes from.
  official = [(a.name, a.part, a.step) for a in found if a.theta == str(known_file)]
  assert official == [
    (f'known_official {part}'.strip(), part, n)
    for part in ('', 'radial', 'tangential', 'norms', 'scaled biases')
    for n in (1, 2, 3)
  ]


def test_the_authors_biases_may_be_seen_in_scaled_units(study, source_run, known_file):
  whole = dataclasses.replace(
    arm_of(study, 'task_vector', 1), predictor='known', theta=str(known_file), history=5
  )
  plain, found = (
    trees.named_leaves(source_run.start(arm)[0])
    for arm in (whole, dataclasses.replace(whole, part=parts.SCALED_BIASES))
  )
  history = [jax.device_get(stage) for stage in source_run.stages[-5:]]
  assert_same_bits(
    found,
    trees.named_leaves(parts.scaled_biases(history, 1, parameters.load_known(known_file))),
  )
  different = {path for path, leaf in found.items() if (leaf != plain[path]).any()}
  kinds = kinds_.leaf_kinds(history[-1])
  assert different and all(kinds[path] == 'bias' for path in different)


def test_scaled_biases_are_of_known_with_parameters_for_weights_as_they_are(theta):
  config = small_study(theta)
  config.arms = ('persistence', {'predictor': 'task_vector', 'part': 'scaled biases'})
  with pytest.raises(UserError, match=r"'task_vector' has part 'scaled biases'; expected it of"):
    design.Study(config)


def test_an_arm_may_transfer_a_part_of_its_prediction_or_read_another_order(study, source_run):
  base = arm_of(study, 'task_vector', 1)
  newest, whole = (jax.device_get(x) for x in (source_run.stages[-1], source_run.start(base)[0]))
  for part, reference in parts.PARTS.items():
    start = source_run.start(dataclasses.replace(base, part=part))[0]
    assert_same_bits(start, reference(newest, whole))
  # task_vector adds what came after the stage that is read: in another order, another one.
  turned = source_run.start(dataclasses.replace(base, order='reversed'))[0]
  older = source_run.stages[-base.history]
  expected = jax.tree.map(lambda new, old: 2 * np.float64(new) - old, newest, older)
  for (path, leaf), value, new in zip(
    trees.named_leaves(turned).items(),
    jax.tree.leaves(expected),
    jax.tree.leaves(newest),
    strict=True,
  ):
    kept = kinds_.leaf_kinds(newest)[path] == kinds_.KEEP
    np.testing.assert_allclose(leaf, new if kept else value, rtol=1e-5, atol=1e-6)


OTHER_START = {
  'predictor': 'log_fit', 'step': 2, 'history': 4, 'options': (('lam', 0.5),), 'kinds': ('bias',),
  'batch_norm': 'reset', 'part': 'norms', 'order': 'reversed', 'theta': 'known_file',
}  # fmt: skip
"""A value for each field of an arm that changes the weights it starts from."""


@pytest.mark.parametrize('field', OTHER_START)
def test_arms_that_start_from_other_weights_share_no_start(study, field, known_file):
  base = arm_of(study, 'task_vector', 1)
  source = next(iter(study.sources()))
  value = str(known_file) if field == 'theta' else OTHER_START[field]
  other = dataclasses.replace(base, **{field: value})
  assert study.start_key(other, source) != study.start_key(base, source)


def test_every_field_of_an_arm_is_thought_of_in_its_start():
  # Group and name are words, lr_scale belongs to the training, the rate r to the source.
  others = {'group', 'name', 'lr_scale', 'rate'}
  assert {field.name for field in dataclasses.fields(arms.Arm)} == others | set(OTHER_START)


@pytest.mark.parametrize(('field', 'value'), [('part', 'radia'), ('order', 'forward')])
def test_parts_and_orders_are_known(field, value):
  config = design.default_config()
  config.arms = ('persistence', {'predictor': 'known', field: value})
  with pytest.raises(UserError, match=f"{field} of an arm '{value}'"):
    arms.arms_of(read_config(design.Config, config), batch_norm=True)


def test_standard_ablations_are_arms():
  for batch_norm in (True, False):
    config = design.default_config()
    config.ablations = arms.standard_ablations(batch_norm=batch_norm)
    found = arms.arms_of(read_config(design.Config, config), batch_norm=batch_norm)
    groups = {arm.group for arm in found}
    expected = {'main', 'history', 'rate', 'kinds', 'learning rate'}
    assert groups == expected | ({'BatchNorm'} if batch_norm else set())
    assert {arm.history for arm in found if arm.group == 'history'} == {2, 3, 4}


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'arms': ('persistence', 'knwon')}, "unknown predictor 'knwon'. Did you mean 'known'"),
    ({'arms': ('shrink',)}, "arms lack 'persistence'"),
    ({'arms': ('persistence', {'name': 'x'})}, 'the name of a predictor, or a dict'),
    ({'arms': ('persistence', {'predictor': 'shrink', 'step': 1})}, "arms 'step'. Did you mean"),
    ({'arms': ('persistence', 'average', 'average')}, "'main' are called 'average' at step 1"),
    ({'arms': ('persistence', {'predictor': 'task_vector', 'steps': (3,)})},
     "arm 'task_vector' cannot do step 3: predictor 'task_vector' needs a history of 4 stages"),
    ({'arms': ('persistence', 'known_leaf')},
     "'known_leaf' cannot do step 1: .*needs a history of 5 stages"),
    ({'arms': ('persistence', {'predictor': 'shrink', 'history': 6})},
     "arm 'shrink' has history 6; expected 2 to 5, source.stages"),
    ({'arms': ('persistence', {'predictor': 'shrink', 'options': {'d': 1}})}, "has no option 'd'"),
    ({'arms': ('persistence', {'predictor': 'shrink', 'kinds': ('cnv',)})}, "kind 'cnv'. Did you"),
    ({'arms': ('persistence', {'predictor': 'shrink', 'batch_norm': 'rest'})}, "'rest'. Did"),
    ({'arms': ('persistence', {'predictor': 'extra', 'steps': (1,)})}, "'extra' has steps"),
    ({'arms': ('persistence', {'predictor': 'shrink', 'group': 'x'})}, 'and none in arms'),
    ({'ablations': ('shrink',)}, 'expected a group in ablations'),
    ({'arms': ('persistence', {'predictor': 'shrink', 'lr_scale': 0})}, 'lr_scale 0.0; expected a'),
    ({'source_seeds': 0}, 'source_seeds is 0; expected 1'),
    ({'transfer_seeds': 1001}, 'transfer_seeds is 1001; expected 1 to 1000'),
    ({'amounts': (1.0, 2.0)}, r'amounts are \(1.0, 2.0\); expected different shares'),
    ({'amounts': (1.0, 0.05)}, 'stage 1 .* has 12 examples; expected at least one batch of 16'),
    ({'curve_epochs': (3,)}, 'curve_epochs hold 3; expected 0 to 2, transfer.epochs'),
    ({'source.optimizer': 'adm'}, "unknown optimizer 'adm'"),
    ({'transfer.batch_size': 20}, 'batch_size is 20; expected a positive multiple of the 8'),
    ({'transfer.image_size': (16, 16)}, "leaf 'params/dense/kernel' has shape"),
    ({'transfer.labels_per_class': 500}, 'labels_per_class is 500, but class'),
  ],
)  # fmt: skip
def test_what_does_not_fit_is_told_before_anything_is_written(theta, tmp_path, fields, message):
  config = small_study(theta)
  config.update_from_flattened_dict(fields)
  with pytest.raises(UserError, match=message):
    runner.run(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_amounts_are_nested_and_ablations_are_of_the_first(theta):
  config = small_study(theta, amounts=(1.0, 0.4), source_seeds=1, transfer_seeds=1)
  config.ablations = ({'group': 'rate', 'predictor': 'shrink', 'rate': 0.5, 'steps': (1,)},)
  config.source.stages = 4
  study = design.Study(config)
  assert [source.name for source in study.sources()] == ['1-0-r0.4', '0.4-0-r0.4', '1-0-r0.5']
  sizes = [study.settings(source).train_examples for source in study.sources()]
  assert sizes == [625, 250, 625]
  images = [
    {image.tobytes() for image in load_task(study.settings(source)).train.images}
    for source in study.sources()
  ]
  assert images[1] < images[0] == images[2]
  assert len(list(study.cells())) == 2 * 10 + 1
  (rate,) = [arm for arm in study.arms if arm.group == 'rate']
  assert rate.name == 'shrink r=0.5' and rate.multiple == 2.0


# -- files ---------------------------------------------------------------------------------------


def test_tables_are_read_as_they_were_written(tmp_path):
  columns = {'name': str, 'count': int, 'share': float}
  rows = [
    {'name': 'a,"b"\nc', 'count': 3, 'share': 0.1 + 0.2},
    {'name': '', 'count': -1, 'share': 1e-300},
    {'name': 'x', 'count': 0, 'share': np.float64(2 / 3)},
  ]
  path = tmp_path / 'table.csv'
  results.write_table(path, columns, rows)
  assert results.read_table(path, columns).to_dict('records') == rows
  results.write_table(path, columns, [{'name': 'x', 'count': 1, 'share': None}])
  assert math.isnan(results.read_table(path, columns)['share'][0])
  # A column of integers in which one is missing.
  results.write_table(path, columns, [{'name': 'x', 'count': 1}, {'name': 'y'}])
  assert path.read_text() == 'name,count,share\nx,1,\ny,,\n'
  curve = [(0, 0.1), (12, 1 / 3)]
  assert results.read_curve(results.curve_text(curve)) == curve
  for text, message in (
    ('a,b\n', 'has the columns a,b; expected name,count,share'),
    ('', 'has the columns nothing'),
    ('name,count,share\nx,1\n', 'line 2 has 2 cells; expected 3'),
    ('name,count,share\nx,one,1\n', "line 2 has count 'one'; expected int"),
  ):
    path.write_text(text)
    with pytest.raises(UserError, match=message):
      results.read_table(path, columns)
  with pytest.raises(UserError, match=r'cannot read .*: No such file'):
    results.read_table(tmp_path / 'none', columns)


def test_of_equal_keys_in_the_journal_the_first_counts(tmp_path):
  path = tmp_path / 'journal.jsonl'
  journal = journal_.Journal(path)
  assert journal.get('a') is None
  journal.add('a', x=1)
  append_line(path, {'key': 'a', 'x': 2})
  append_line(path, {'key': 'b', 'x': 3})
  assert journal.get('b') is None
  journal.reload()
  assert (journal.get('a')['x'], journal.get('b')['x']) == (1, 3)
  assert len(read_lines(path)) == 3


# -- analysis and report -------------------------------------------------------------------------


def line(arm, predictor, accuracies, norms=None, step=1, option='', group='main', **fields):
  """A line of made-up rows: accuracies by source seed and transfer seed."""
  rows = [
    {
      **{name: '' if kind is str else math.nan for name, kind in COLUMNS.items()},
      'group': group, 'arm': arm, 'predictor': predictor, 'step': step, 'option': option,
      'batch_norm': 'keep', 'lr_scale': 1.0, 'multiple': 2.0**step, 'amount': 1.0,
      'source_seed': i, 'transfer_seed': j, 'accuracy': accuracy,
      'weight_norm': 1.0 if norms is None else norms[i],
      'history': 5, 'rate': 0.5, 'labels_per_class': 10, **fields,
    }
    for i, group_values in enumerate(accuracies)
    for j, accuracy in enumerate(group_values)
  ]  # fmt: skip
  (found,) = analysis.lines_of(pd.DataFrame(rows))
  return found


NAIVE = line('persistence', 'persistence', [[0.5, 0.6], [0.7, 0.7], [0.4, 0.4]], step=0)


def test_differences_are_paired():
  other = line('known_leaf', 'known_leaf', [[0.6, 0.6], [math.nan, 0.75], [0.4, 0.5]])
  found = analysis.differences(other, NAIVE)
  np.testing.assert_allclose(found, [10, 0, 5, 0, 10], atol=1e-9)
  assert found.index.tolist() == [(0, 0), (0, 1), (1, 1), (2, 0), (2, 1)]
  comparison = analysis.compare(other, NAIVE)
  assert comparison.mean == pytest.approx(5)
  assert (comparison.sources, comparison.pairs, comparison.p_exact) == (3, 5, 0.25)
  assert comparison.p_t < 1e-12  # All three sources have 5 points: no spread at all.
  assert comparison.low <= 5 <= comparison.high
  assert (comparison.t_low, comparison.t_high) == pytest.approx((5, 5))
  lost = line('known_leaf', 'known_leaf', [[math.nan]])
  assert analysis.compare(lost, NAIVE) is analysis.compare(None, NAIVE) is None


def test_t_intervals_are_over_source_means():
  other = line('known_leaf', 'known_leaf', [[0.6, 0.6], [0.7, 0.75], [0.4, 0.5]])
  found = analysis.compare(other, NAIVE)
  expected = scipy.stats.ttest_1samp([5.0, 2.5, 5.0], 0.0).confidence_interval(0.95)
  np.testing.assert_allclose((found.t_low, found.t_high), expected)


def test_rows_that_share_weights_and_rate_are_one_training():
  rows = pd.concat([
    line('persistence', 'persistence', [[0.5, 0.5]], step=0, weights='a').rows,
    line('magmax', 'magmax', [[0.6, 0.6]], weights='b').rows,
    line('task_vector', 'task_vector', [[0.6, 0.6]], weights='b').rows,
    line('persistence lr x2', 'persistence', [[0.4, 0.4]], step=0, weights='a', lr_scale=2.0).rows,
    line('extra', 'extra', [[math.nan, math.nan]], step=0).rows,  # Its weights diverged.
  ])  # fmt: skip
  assert analysis.trainings(rows.reset_index(drop=True)) == 6


def test_what_does_more_than_shrinking_lies_above_it_and_above_naive():
  """Sources differ much in one arm and little in the other: bootstrap and t-interval part."""
  naive = line('persistence', 'persistence', [[0.5]] * 3, step=0)
  sweep = line('shrink c=0.5', 'shrink', [[0.6]] * 3, [0.5] * 3, option='c=0.5')
  arms_ = {
    'sure': [[0.70], [0.71], [0.72]],  # Above both, by every interval.
    'wide': [[0.56], [0.61], [0.99]],  # Above both, but not by the t-interval.
    'half': [[0.51], [0.52], [0.53]],  # Above naive, not above shrinking.
  }
  lines = [naive, sweep, *(line(n, 'log_fit', a, [0.75] * 3) for n, a in arms_.items())]
  # Beyond the sweep there is nothing to compare with.
  lines.append(line('beyond', 'log_fit', [[0.9]] * 3, [0.25] * 3))
  found = {each.arm: gains for each, *gains in analysis.beyond_shrinking(lines, 1.0)}
  assert list(found) == ['sure', 'wide', 'half']
  for arm, (to_naive, to_shrink) in found.items():
    means = 100 * np.concatenate(arms_[arm])
    np.testing.assert_allclose((to_naive.mean, to_shrink.mean), means.mean() - np.array([50, 55]))
    interval = scipy.stats.ttest_1samp(means - 55, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose((to_shrink.t_low, to_shrink.t_high), interval)
  (text,) = tables.beyond_text([(name, *gains) for name, gains in found.items()])
  assert 'Of 3 predictions' in text
  assert 'by 95 % bootstrap intervals, sure, wide;' in text
  assert 'by 95 % t-intervals over source seeds, sure (uncorrected' in text
  assert tables.beyond_text([]) == []


def test_the_shrink_curve_is_read_at_the_weight_norm():
  sweep = [
    line('shrink c=0.5', 'shrink', [[0.7, 0.8], [0.9, 0.9], [0.4, 0.2]], [0.5] * 3, option='c=0.5'),
    line('shrink c=-0.5', 'shrink', [[0.3, 0.2], [0.7, 0.7], [0.4, 0.4]], [1.5] * 3, option='c=-1'),
  ]
  other = line('known_leaf', 'known_leaf', [[0.7, 0.7], [0.7, 0.7], [0.9, 0.9]], [0.75, 1.25, 0.4])
  found = analysis.shrink_curve(other, [NAIVE, other, *sweep])
  # Half way to 0.5; half way to 1.5; beyond the sweep.
  assert found.index.tolist() == [*PAIRS, (2, 0), (2, 1)]
  np.testing.assert_allclose(found, [0.6, 0.7, 0.7, 0.7, math.nan, math.nan])


def test_choices_are_made_by_the_other_sources():
  one = line('a', 'known_leaf', [[0.9], [0.1], [0.1]], step=1)
  two = line('a', 'known_leaf', [[0.5], [0.5], [0.2]], step=2)
  lost = line('a', 'known_leaf', [[math.nan], [1.0], [1.0]], step=3)
  found = analysis.cross_chosen([one, two, lost])
  # For source 0 the others prefer two (0.35 to 0.1); for 1 and 2 one (0.5 to 0.35, 0.5 to 0.5).
  assert found.rows['step'].to_dict() == {
    (0, 0): 2,
    (1, 0): 1,
    (2, 0): 1,
  }
  assert analysis.cross_chosen([lost]) is None
  alone = analysis.cross_chosen(
    [line('a', 'known_leaf', [[0.1]]), line('b', 'known_leaf', [[0.9]])]
  )
  assert alone.first['arm'] == 'a'


def test_the_published_numbers_are_those_of_the_paper():
  rows = tables.published(1).set_index(['times', 'method'])['p100']
  assert rows['1', 'naive_transfer'] == '92.40'
  assert [rows[n, 'known'] for n in '248'] == ['93.00', '93.27', '93.55']
  source = Path(__file__).parents[2] / '..' / 'shared' / 'paper'
  if source.is_dir():
    for number, name in ((1, 'cifar100_to_cifar10'), (6, 'history_length'), (7, 'time_cost')):
      packed = source / f'table{number}_{name}.csv'
      ours = Path(tables.__file__).parent / 'published' / f'table{number}.csv'
      assert ours.read_bytes() == packed.read_bytes()


@pytest.fixture(scope='module')
def reported(studied, tmp_path_factory):
  path = tmp_path_factory.mktemp('report') / 'docs' / 'transfer.md'
  return path, report.write(studied, path)


def cells(text, heading):
  """First cell -> other cells, of the first table below a heading."""
  after = text.split(f'## {heading}', 1)[1]
  found = [row for row in after.splitlines() if row.startswith('|')]
  body = list(itertools.takewhile(lambda row: row.startswith('|'), after.splitlines()[2:]))
  assert body and found[: len(body)] == body
  parsed = [[cell.strip() for cell in row.split('|')[1:-1]] for row in body]
  assert all(re.fullmatch('-+:?', cell) for cell in parsed[1])
  assert len({len(row) for row in body}) == 1  # Columns are aligned.
  return parsed[0], {row[0]: row[1:] for row in parsed[2:]}


def test_the_report_says_what_the_rows_say(studied, reported):
  path, answer = reported
  text, rows = path.read_text(), read(studied)
  accuracy = {}
  for row in rows:
    pair = (row['source_seed'], row['transfer_seed'])
    accuracy.setdefault((row['arm'], row['step']), {})[pair] = 100 * row['accuracy']

  header, body = cells(text, 'Accuracy after transfer')
  assert header == ['arm', 'x1', 'x2.5', 'x6.25']
  assert f'{ROWS} rows, of {TRAININGS} trainings' in text
  for name, arm in (('task_vector', 'task_vector'), ('persistence (naive)', 'persistence')):
    for step, cell in enumerate(body[name]):
      values = list(accuracy.get((arm, step), {}).values())
      expected = f'{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}' if values else ''
      assert cell == expected
  fitted = {
    line: 100 * np.mean([r['training'] for r in rows if (r['group'], r['arm'], r['step']) == line])
    for line in LINES
    if line[0] == 'main'
  }
  ends = fitted['main', 'persistence', 0], min(fitted.values())
  said = re.search(r'naive transfer ends at (\S+) %, and the arm .*, at (\S+) %', text)
  assert said.groups() == tuple(f'{value:.1f}' for value in ends)
  # The paper's figures are of other networks.
  papers = [f'{row.p100} ± {row.sd100}' for row in tables.published(1).itertuples()]
  assert '92.40 ± 0.11' in papers and not [figure for figure in papers if figure in text]

  _, body = cells(text, 'Differences to naive')
  naive = accuracy['persistence', 0]
  for name, key in (('known_leaf x6.25', ('known_leaf', 2)), ('extra training', ('extra', 0))):
    (row,) = [value for title, value in body.items() if title.startswith(name)]
    differences = [accuracy[key][pair] - naive[pair] for pair in naive]
    assert row[0] == '4'
    assert row[1].startswith(f'{np.mean(differences):+.2f} (')
  assert set(body) & {'shrink c=0.5 x2.5', 'persistence (naive)'} == set()
  _, body = cells(text, 'The shrink sweep')
  assert list(body) == ['shrink c=0.5 x2.5']

  _, body = cells(text, 'Before any further')
  (mean,) = {
    np.mean([r['retrodiction'] for r in rows if (r['arm'], r['step']) == ('task_vector', 1)])
  }
  assert body['task_vector x2.5'][2] == f'{mean:.3f}'
  assert body['persistence (naive)'][1:] == ['1.000', '', '', '', '']
  for group in ('history', 'BatchNorm', 'learning rate'):
    assert len(cells(text, f'Ablation: {group}')[1]) == 1
  _, body = cells(text, 'KNOWN against its rivals')
  assert list(body) == ['known_leaf, best step', 'known_leaf x2.5', 'known_leaf x6.25']
  assert 'by 95 % t-intervals over source seeds' in text
  assert '## Why' in text and 'rank correlation of weight norm' in text
  # The answer: a sentence for each of naive, shrink and equal compute.
  assert answer in text
  for name in ('naive transfer', 'the best of 1 ways to shrink', 'extra training of equal compute'):
    assert len(re.findall(rf'- Against {name}.*points \(95 % interval', answer)) == 1


def test_the_report_shows_times(studied, reported):
  text = reported[0].read_text()
  timings = read_timings(studied)
  pretraining = [row['seconds'] for row in timings if row['task'] == 'pretrain']
  # Stage 3 is there for retrodiction only.
  forgetting_seconds = [
    sum(r['seconds'] for r in timings
        if (r['task'], r['source_seed']) == ('forget', seed) and r['step'] in (1, 2))
    for seed in (0, 1)
  ]  # fmt: skip
  _, body = cells(text, 'Time')
  unit = np.median(pretraining)
  assert body['pre-training'] == [f'{unit:.2f}', '1.000']
  assert body['forgetting (stages 1 to 2)'][0] == f'{np.median(forgetting_seconds):.2f}'
  both = unit + np.median(forgetting_seconds)
  assert body['pre-training and forgetting'] == [f'{both:.2f}', f'{both / unit:.3f}']


def test_the_pictures_are_there_and_show_something(reported):
  path, _ = reported
  names = re.findall(r'!\[.*\]\((.*)\)', path.read_text())
  assert len(names) == 5
  for name in names:
    image = np.asarray(Image.open(path.parent / name).convert('L'))
    assert image.shape[0] > 300 and (image < 128).sum() > 1000


def test_reports_of_the_same_results_are_the_same_files(studied, reported, tmp_path):
  path, _ = reported
  report.write(studied, tmp_path / 'transfer.md')
  assert snapshot(tmp_path) == snapshot(path.parent)


def test_a_report_of_nothing(studied, tmp_path):
  with pytest.raises(UserError, match=r'cannot read .*results.csv: No such file'):
    report.write(tmp_path, tmp_path / 'x.md')
  results.write_table(tmp_path / 'results.csv', COLUMNS, [])
  results.write_table(tmp_path / 'timings.csv', TIMING_COLUMNS, [])
  with pytest.raises(UserError, match='has no rows yet; run the study first'):
    report.write(tmp_path, tmp_path / 'x.md')
  rows = [row for row in read(studied) if row['arm'] != 'persistence']
  results.write_table(tmp_path / 'results.csv', COLUMNS, rows)
  with pytest.raises(UserError, match='have no naive transfer for amount 1'):
    report.write(tmp_path, tmp_path / 'x.md')
  assert not (tmp_path / 'x.md').exists()


def test_histories_have_a_table_by_their_length():
  lines = [
    line(f'task_vector S={s}', 'task_vector', [[0.5]], group='history', history=s) for s in (2, 3)
  ]
  text = tables.ablations([*lines, NAIVE], NAIVE)[-1]
  assert '| task_vector S=2 | 2 | 50.00 |' in text
  assert '| task_vector S=3 | 3 | 50.00 |' in text


@pytest.mark.parametrize(
  'other',
  [{}, {'model': 'cnn'}, {'source': 'mnist'}, {'target': 'mnist'}, {'labels_per_class': 10}],
)
def test_the_papers_numbers_stand_alone_and_only_in_studies_like_its_own(other):
  protocol = {'source': 'cifar100', 'target': 'cifar10', 'model': 'resnet18', 'labels_per_class': 0}
  naive = line('persistence', 'persistence', [[0.5]], step=0, **{**protocol, **other})
  text = '\n'.join(tables.papers_own(naive))
  if other:
    assert text == ''
  else:
    assert text.count('93.27') == 2 and '7372' in text and 'of their runs, predictors' in text
    assert '50.00' not in text


# --- several studies on one page ------------------------------------------------------------------


def write_study(folder, gains, faster=None):
  """A results.csv with made-up accuracies: arm -> points above naive, for two source seeds."""
  rows = []
  naive = {'arm': 'persistence', 'predictor': 'persistence', 'step': 0}
  made = [({**naive, 'group': 'main'}, 0.0)]
  for (arm, step), gain in gains.items():
    predictor = 'shrink' if arm.startswith('shrink') else arm
    option = 'c=0.5' if arm.startswith('shrink c') else ''
    made.append(
      ({'group': 'main', 'arm': arm, 'predictor': predictor, 'step': step, 'option': option}, gain)
    )
  for scale, gain in (faster or {}).items():
    made.append(({**naive, 'group': 'learning rate', 'arm': f'x{scale}', 'lr_scale': scale}, gain))
  for about, gain in made:
    for source, transfer_seed in itertools.product(range(2), range(3)):
      about = {'option': '', 'kinds': '', 'curve': '', 'lr_scale': 1.0} | about
      about |= {'weights': f'{about["predictor"]} {about["option"]} {about["step"]}'}
      accuracy = 0.5 + 0.1 * source + 0.01 * transfer_seed + gain / 100
      rows.append(
        dict.fromkeys(COLUMNS, 1)
        | {'history': 5, 'rate': 0.5, 'batch_norm': 'keep', 'amount': 1.0, 'weight_norm': 1.0}
        | {'source': 'a', 'target': 'b', 'model': folder.name, 'multiple': 2.0 ** about['step']}
        | {'source_seed': source, 'transfer_seed': transfer_seed, 'accuracy': accuracy, **about}
      )
  folder.mkdir(parents=True)
  results.write_table(folder / results.RESULTS, COLUMNS, rows)
  results.write_table(folder / results.TIMINGS, TIMING_COLUMNS, [])
  return folder


def test_several_studies_on_one_page(tmp_path):
  first = write_study(
    tmp_path / 'first',
    {
      ('known_leaf', 1): 1.0,
      ('known_leaf', 2): 2.0,
      ('extra', 0): 0.5,
      ('shrink', 1): 3.0,
      ('scratch', 0): -4.0,
    },
    faster={2.0: 1.5, 3.0: 4.0, 0.5: -1.0},
  )
  second = write_study(tmp_path / 'second', {('known_leaf', 1): -0.5, ('shrink c=0.5', 1): -2.0})
  answer = summary.write([first, second], tmp_path / 'all.md')
  text = (tmp_path / 'all.md').read_text()
  assert answer in text
  rows = [
    [cell.strip() for cell in row.split('|')[1:-1]] for row in text.splitlines() if '|' in row
  ]
  assert '72 rows, of 72 trainings' in text
  # Constant differences have intervals of no width; the best step is +2 and -0.5, by construction.
  assert rows[2:] == [
    ['[a to b, first](all_first.md)', '2 x 3', '56.00', '+2.00 (+2.00 to +2.00)',
     '-1.00 (-1.00 to -1.00)', '+1.50 (+1.50 to +1.50)', '+3.00 (+3.00 to +3.00)',
     '-4.00 (-4.00 to -4.00)', '+4.00 (+4.00 to +4.00) at 3 times'],
    ['[a to b, second](all_second.md)', '2 x 3', '56.00', '-0.50 (-0.50 to -0.50)',
     '+1.50 (+1.50 to +1.50)', '', '-2.00 (-2.00 to -2.00)', '', ''],
  ]  # fmt: skip
  assert (
    'the best step of `known_leaf` changes accuracy by -0.50 to +2.00 points over 2 studies: in 1 '
    'the 95 % interval lies above zero, in 1 below, and in 0 it includes zero. Against the best'
  ) in answer
  assert 'by -1.00 to +1.50 points over 2 studies: in 1 the' in answer
  assert answer.endswith('it changes accuracy by +1.50 (+1.50 to +1.50) points.')
  for name in ('first', 'second'):
    alone = report.write(tmp_path / name, tmp_path / 'alone.md')
    assert alone in (tmp_path / f'all_{name}.md').read_text()


def test_studies_of_one_name_are_refused(tmp_path):
  with pytest.raises(UserError, match="two studies are called 'a'"):
    summary.write([tmp_path / 'x' / 'a', tmp_path / 'y' / 'a'], tmp_path / 'all.md')
