"""From a finished run to predicted weights on disk: what is written, and what it is said to be."""

import math
import re
import shutil
import warnings

import jax
import numpy as np
import pytest
from runs import assert_close, assert_same_bits, forget, model_inputs, small_config, snapshot

import know_jax
from know_jax import trees
from know_jax.errors import PredictionWarning, UserError
from know_jax.io import checkpoints
from know_jax.nowcast import from_run
from know_jax.predictors import known, parameters
from know_jax.runs import workdir as workdirs
from know_jax.runs.record import config_dict
from know_jax.tasks import load_task

NAMES = ('known', 'linear_fit', 'shrink')


@pytest.fixture(scope='module')
def predicted(finished, known_file, tmp_path_factory):
  """A workdir with predictions of three predictors two steps ahead, and what `run` returned."""
  workdir = tmp_path_factory.mktemp('predicted') / 'run'
  shutil.copytree(finished, workdir)
  found = from_run.run(workdir, predictors=NAMES, steps=2, known=str(known_file))
  return workdir, found


@pytest.fixture
def copy(finished, tmp_path):
  shutil.copytree(finished, tmp_path / 'run')
  return tmp_path / 'run'


def stages_of(workdir):
  """The weights of the five stages, oldest first."""
  return [workdirs.restore_stage(workdir, stage) for stage in (4, 3, 2, 1, 0)]


def orbax_restore(path):
  """As a user's own code does it, without know_jax."""
  import orbax.checkpoint as ocp

  with warnings.catch_warnings(), ocp.StandardCheckpointer() as checkpointer:
    warnings.simplefilter('ignore')  # About sharding: the arrays go to this machine's devices.
    return checkpointer.restore((path / 'weights').absolute())


@pytest.mark.parametrize('name', NAMES)
def test_checkpoints_hold_what_predict_gives(predicted, known_file, name):
  workdir, found = predicted
  theta = {'theta': know_jax.load_known(known_file)} if name == 'known' else {}
  for steps in (1, 2):
    path = workdir / 'predictions' / name / str(steps)
    expected = know_jax.predict(stages_of(workdir), steps, predictor=name, rate=0.4, **theta)
    restored = checkpoints.restore(path)
    assert_close(restored, jax.device_get(expected), rtol=1e-6, atol=1e-7)
    assert_same_bits(jax.device_get(orbax_restore(path)), restored)
    (mine,) = [p for p in found if (p.predictor, p.steps) == (name, steps)]
    assert mine.path == path
    assert_same_bits(mine.variables, restored)


def test_every_prediction_is_there_once_and_says_what_it_is(predicted, known_file):
  workdir, found = predicted
  assert [(p.predictor, p.steps, p.multiple) for p in found] == [
    ('persistence', 0, 1.0),
    *((name, steps, 0.4**-steps) for name in NAMES for steps in (1, 2)),
  ]
  for p in found[1:]:
    about = checkpoints.read_metadata(p.path)
    assert about == {
      'predictor': p.predictor,
      'steps': p.steps,
      'multiple': p.multiple,
      'test_accuracy': p.accuracy,
      'test_loss': p.loss,
      'batch_norm': 'keep',
      'warnings': [],
      'stages': [checkpoints.weights_digest(workdir / 'stages' / str(i)) for i in range(5)],
    } | ({'known': str(known_file)} if p.predictor == 'known' else {})
  assert sorted(path.name for path in (workdir / 'predictions').iterdir()) == [
    'known', 'linear_fit', 'nowcast.png', 'shrink',
  ]  # fmt: skip


def test_scores_are_those_of_the_weights(predicted):
  _, found = predicted
  task = load_task(config_dict(small_config()))
  images, labels = model_inputs(task.test.images, task.train.images), task.test.labels
  apply = jax.jit(lambda variables: task.model.module.apply(variables, images, train=False))
  for p in found:
    accuracy = np.mean(np.asarray(apply(p.variables)).argmax(-1) == labels)
    assert p.accuracy == pytest.approx(accuracy)
  assert len({p.accuracy for p in found}) > 3


def test_movement_equals_numpy(predicted):
  _, found = predicted
  before = trees.named_leaves(found[0].variables)
  kinds = {
    'conv': ['params/conv1/kernel', 'params/conv2/kernel', 'params/conv3/kernel'],
    'fc': ['params/dense/kernel', 'params/head/kernel'],
    'bias': ['params/dense/bias', 'params/head/bias'],
  }
  for p in found:
    after = trees.named_leaves(p.variables)
    assert list(p.movement) == ['conv', 'fc', 'bias', 'keep']
    for kind, paths in kinds.items():
      moves = [after[path].astype(float) - before[path] for path in paths]
      size = sum(move.size for move in moves)
      norms = [
        math.sqrt(sum((leaf.astype(float) ** 2).sum() for leaf in leaves))
        for leaves in (moves, [before[path] for path in paths])
      ]
      assert p.movement[kind]['weights'] == size
      assert p.movement[kind]['mean_absolute'] == pytest.approx(
        sum(np.abs(move).sum() for move in moves) / size
      )
      assert p.movement[kind]['relative'] == pytest.approx(norms[0] / norms[1])
    assert p.movement['keep']['mean_absolute'] == p.movement['keep']['relative'] == 0.0
    # All leaves are counted: the rest is BatchNorm, two parameters and two statistics a channel.
    assert p.movement['keep']['weights'] == 4 * (2 + 4 + 4)
  # shrink: c is 0.19 for conv, 0.06 for fc, 0 for bias.
  (twice,) = [p for p in found if (p.predictor, p.steps) == ('shrink', 2)]
  assert twice.movement['conv']['relative'] == pytest.approx(1 - 0.81**2, rel=1e-5)
  assert twice.movement['fc']['relative'] == pytest.approx(1 - 0.94**2, rel=1e-5)
  assert twice.movement['bias']['relative'] == 0.0


def test_reports_name_every_leaf_and_prediction(predicted):
  workdir, found = predicted
  trajectory, _ = workdirs.load_trajectory(workdir)
  lines = from_run.kinds_report(trajectory).splitlines()
  leaves = trees.named_leaves(workdirs.restore_stage(workdir, 0))
  assert len(lines) == 1 + len(leaves) == 1 + 5 + 2 + 6 + 6
  rows = [line.split(maxsplit=2) for line in lines[1:]]
  assert {row[0]: row[2] for row in rows} == {p: str(leaf.shape) for p, leaf in leaves.items()}
  kinds = {path: kind for path, kind, _ in rows}
  assert kinds['params/conv2/kernel'] == 'conv'
  assert kinds['params/head/kernel'] == 'fc'
  assert kinds['params/head/bias'] == 'bias'
  for kept in ('params/norm1/bias', 'params/norm1/scale', 'batch_stats/norm1/mean'):
    assert kinds[kept] == 'keep'

  header, *rows, note = from_run.report(found).splitlines()
  assert re.findall(r'\|move\| (\w+)', header) == ['conv', 'fc', 'bias', 'keep']
  assert '|move|' in note
  for row, p in zip(rows, found, strict=True):
    assert row.split()[:2] == [p.predictor, f'x{p.multiple:.3g}']
    assert f'{p.accuracy:.2%}' in row
    assert (
      f'{p.movement["conv"]["mean_absolute"]:.2e} ({p.movement["conv"]["relative"]:.1%})' in row
    )


def test_the_picture_is_drawn(predicted):
  from PIL import Image

  workdir, _ = predicted
  with Image.open(workdir / 'predictions' / 'nowcast.png') as picture:
    assert picture.size[0] > 1000
    assert len(picture.convert('RGB').getcolors(1 << 24)) > 50


def test_batch_norm_policies(predicted, copy):
  _, kept = predicted
  (expected,) = [p for p in kept if (p.predictor, p.steps) == ('shrink', 1)]
  newest = workdirs.restore_stage(copy, 0)
  assert_same_bits(expected.variables['batch_stats'], newest['batch_stats'])
  assert_same_bits(expected.variables['params']['norm1'], newest['params']['norm1'])

  def run(policy, **options):
    found = from_run.run(copy, predictors=['shrink'], steps=1, batch_norm=policy, **options)[1]
    assert checkpoints.read_metadata(found.path)['batch_norm'] == policy
    assert_same_bits(checkpoints.restore(found.path), found.variables)
    for layer in ('conv1', 'conv2', 'conv3', 'dense', 'head'):
      assert_same_bits(found.variables['params'][layer], expected.variables['params'][layer])
    return found.variables

  reset = run('reset')
  for layer in ('norm1', 'norm2', 'norm3'):
    assert (reset['params'][layer]['scale'] == 1).all()
    assert (reset['params'][layer]['bias'] == 0).all()
    assert (reset['batch_stats'][layer]['mean'] == 0).all()
    assert (reset['batch_stats'][layer]['var'] == 1).all()

  found = run('recalibrate', recalibration_batches=3)
  assert_same_bits(found['params'], expected.variables['params'])
  # The first convolution of the first 3 x 128 training images, in float64.
  task = load_task(config_dict(small_config()))
  images = model_inputs(task.train.images[:384], task.train.images).astype(np.float64)
  padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
  outputs = np.einsum('bhwcij,ijco->bhwo', windows, found['params']['conv1']['kernel'])
  batches = outputs.reshape(3, -1, 2)
  stats = found['batch_stats']['norm1']
  np.testing.assert_allclose(stats['mean'], batches.mean(1).mean(0), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(stats['var'], batches.var(1).mean(0), rtol=1e-4)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'predictors': ['shrink', 'shrik']}, "unknown predictor 'shrik'. Did you mean 'shrink'"),
    ({'batch_norm': 'resett'}, "unknown BatchNorm policy 'resett'. Did you mean 'reset'"),
    (
      {'predictors': ['shrink', 'average'], 'steps': 5},
      r"predictor 'average' can do at most steps=4 with the 5 stages of .*/run; found steps=5",
    ),
    ({'steps': 0}, 'steps is 0; expected at least 1'),
    ({'predictors': []}, 'no predictor is given; expected some of'),
    ({'known': '/nowhere', 'predictors': ['shrink', 'known']}, '/nowhere: no such file'),
    (
      {'batch_norm': 'recalibrate', 'recalibration_batches': 5},
      'recalibrate was given 625 examples; expected at least 640',
    ),
  ],
)
def test_what_cannot_be_done_is_told_before_anything_is_written(copy, options, message):
  before = snapshot(copy)
  with pytest.raises(UserError, match=message):
    from_run.run(copy, **{'predictors': ['shrink'], 'steps': 1, **options})
  assert snapshot(copy) == before


def test_a_history_that_one_predictor_finds_too_short_writes_nothing(tmp_path, known_file):
  forget(tmp_path, stages=2, epochs=1)
  before = snapshot(tmp_path)
  message = r"predictor 'known' needs a history of 5 stages for steps=1; found 2"
  with pytest.raises(UserError, match=message):
    from_run.run(tmp_path, predictors=['shrink', 'known'], steps=1, known=str(known_file))
  assert snapshot(tmp_path) == before


def test_what_a_predictor_has_in_a_workdir_is_of_one_call(copy):
  from_run.run(copy, predictors=['shrink', 'average'], steps=3)
  from_run.run(copy, predictors=['shrink'], steps=1)
  there = sorted(p.parent.name + p.name for p in (copy / 'predictions').glob('*/[0-9]'))
  assert there == ['average1', 'average2', 'average3', 'shrink1']


def test_a_damaged_or_missing_stage_is_named(copy):
  before = snapshot(copy)
  (copy / 'stages' / '3' / 'manifest.json').write_text('{}')
  with pytest.raises(UserError, match=r'stages/3/manifest.json is damaged or foreign'):
    from_run.run(copy, predictors=['shrink'], steps=1)
  shutil.rmtree(copy / 'stages' / '3')
  with pytest.raises(UserError, match=r'there is no checkpoint .*/stages/3'):
    from_run.run(copy, predictors=['shrink'], steps=1)
  assert snapshot(copy).keys() <= before.keys()


def test_bad_predictions_are_kept_away_and_noted(copy, tmp_path):
  theta = jax.tree.map(lambda leaf: leaf * 1000, known.init_theta(jax.random.key(0)))
  parameters.save_known(tmp_path / 'wild.safetensors', theta, {})
  options = {'steps': 1, 'known': str(tmp_path / 'wild.safetensors')}
  with pytest.warns(PredictionWarning, match='7 of 7 leaves have a bad prediction') as caught:
    newest, shrunk, kept = from_run.run(copy, predictors=['shrink', 'known'], **options)
  assert (kept.loss, kept.accuracy) == (newest.loss, newest.accuracy)
  assert checkpoints.read_metadata(shrunk.path)['warnings'] == []
  assert checkpoints.read_metadata(kept.path)['warnings'] == [str(w.message) for w in caught]
  with pytest.raises(UserError, match='7 of 7 leaves have a bad prediction'):
    from_run.run(copy, predictors=['known'], on_bad='raise', **options)


def test_predictions_that_are_no_numbers_are_reported_as_such(copy, tmp_path):
  theta = jax.tree.map(lambda leaf: leaf * 1000, known.init_theta(jax.random.key(0)))
  parameters.save_known(tmp_path / 'wild.safetensors', theta, {})
  found = from_run.run(
    copy,
    predictors=['shrink', 'known'],
    steps=1,
    known=str(tmp_path / 'wild.safetensors'),
    on_bad='ignore',
  )
  assert math.isnan(found[-1].loss)
  assert math.isnan(checkpoints.read_metadata(found[-1].path)['test_loss'])
  assert 'nan' in from_run.report(found)
  assert (copy / 'predictions' / 'nowcast.png').stat().st_size > 10_000
