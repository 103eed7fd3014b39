"""The forgetting run: what it leaves, what a stage is, and that no interruption shows."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest
from runs import (
  SIZES,
  STEPS,
  NumPyOptimizer,
  assert_close,
  assert_same_bits,
  forget,
  gradients,
  log_softmax,
  model_inputs,
  sigterm_raises,
  small_config,
  snapshot,
)
from test_run_record import events_of

from know_jax import forgetting, seeds, trees
from know_jax.data.sources import load_dataset
from know_jax.data.subsets import nested_subsets
from know_jax.errors import UserError
from know_jax.io import checkpoints
from know_jax.io.files import alone
from know_jax.nowcast import from_run
from know_jax.runs import workdir as workdirs
from know_jax.runs.metrics import MetricsLog
from know_jax.runs.record import RunRecord, config_dict
from know_jax.system.signals import Terminated
from know_jax.tasks import load_task
from know_jax.training import loop, steps
from know_jax.training.state import DivergedError


def record_of(workdir):
  return RunRecord.read(workdir, workdirs.KIND)


def assert_same_run(workdir, finished):
  """All that a run leaves is as in the other one, bit for bit, but for times."""
  assert (workdir / 'metrics.jsonl').read_bytes() == (finished / 'metrics.jsonl').read_bytes()
  assert events_of(workdir / 'tensorboard') == events_of(finished / 'tensorboard')
  for stage in range(5):
    path = workdirs.stage_path(workdir, stage)
    assert_same_bits(checkpoints.restore(path), workdirs.restore_stage(finished, stage))
    about = record_of(workdir)['stages'][stage]
    assert checkpoints.read_metadata(path).items() <= about.items()
  untimed = [
    [{k: v for k, v in stage.items() if k != 'train_seconds'} for stage in record_of(run)['stages']]
    for run in (workdir, finished)
  ]
  assert untimed[0] == untimed[1]


# -- what a run leaves ---------------------------------------------------------------------------


def test_the_record_is_complete(finished):
  record = record_of(finished)
  assert record['config'] == config_dict(small_config())
  assert record['config']['seed'] == 0
  environment = record['environment']
  assert {'know_jax', 'python', 'jax', 'flax', 'optax', 'orbax-checkpoint'} <= environment.keys()
  assert environment['devices'] == 8
  assert environment['commit'] is None or len(environment['commit']) >= 40
  assert record['subset_sizes'] == SIZES
  assert record['class_names'] == ['0', '1', '2', '3', '4']
  assert record['parameters'] == trees.num_weights(workdirs.restore_stage(finished, 0)['params'])
  assert [stage['stage'] for stage in record['stages']] == [0, 1, 2, 3, 4]
  assert [stage['examples'] for stage in record['stages']] == SIZES
  assert all(stage['train_seconds'] > 0 for stage in record['stages'])
  assert sorted(path.name for path in finished.iterdir()) == [
    'metrics.jsonl', 'record.json', 'stages', 'tensorboard',
  ]  # fmt: skip
  assert sorted(path.name for path in (finished / 'stages').iterdir()) == list('01234')


def test_accuracies_in_the_record_are_those_of_the_checkpoints(finished):
  task = load_task(config_dict(small_config()))
  images = model_inputs(task.test.images, task.train.images)
  assert len(images) == 178
  apply = jax.jit(lambda variables: task.model.module.apply(variables, images, train=False))
  for stage in record_of(finished)['stages']:
    logits = np.asarray(apply(workdirs.restore_stage(finished, stage['stage'])))
    accuracy = np.mean(logits.argmax(-1) == task.test.labels)
    loss = -log_softmax(logits)[np.arange(178), task.test.labels].mean()
    assert stage['test_accuracy'] == pytest.approx(accuracy)
    assert stage['test_loss'] == pytest.approx(loss, rel=1e-5)


def test_every_epoch_has_one_line_and_its_events(finished):
  lines = [json.loads(line) for line in (finished / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == list(range(1, 11))
  assert [line['stage'] for line in lines] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
  assert [line['epoch'] for line in lines] == [1, 2] * 5
  assert all(0 < line['loss'] < 5 and 0 <= line['accuracy'] <= 1 for line in lines)
  events = events_of(finished / 'tensorboard')
  assert len(events) == 10 * 4
  for line in lines:
    assert (line['step'], 'loss', np.float32(line['loss'])) in events


def test_the_trajectory_is_oldest_first(finished):
  trajectory, record = workdirs.load_trajectory(finished)
  assert len(trajectory) == 5
  assert record['subset_sizes'] == SIZES
  for index, stage in enumerate((4, 3, 2, 1, 0)):
    assert_same_bits(jax.device_get(trajectory[index]), workdirs.restore_stage(finished, stage))
  assert_same_bits(jax.device_get(trajectory.newest), workdirs.restore_stage(finished, 0))


def test_a_stage_starts_from_the_one_before_with_a_fresh_optimiser_and_schedule(finished):
  """The last stage, two steps with its whole subset, against Adam in NumPy."""
  config = config_dict(small_config())
  task = load_task(config)
  subsets = nested_subsets(
    seeds.named_key(0, 'subsets'), task.train.labels, rate=0.4, phases=5, stratified=True
  )
  before, after = (workdirs.restore_stage(finished, stage) for stage in (3, 4))
  images = model_inputs(task.train.images[subsets[4]], task.train.images)
  labels = task.train.labels[subsets[4]]
  adam, params, batch_stats = NumPyOptimizer('adam', 0.0), before['params'], before['batch_stats']
  tiny = {path: np.zeros(np.shape(leaf), bool) for path, leaf in trees.named_leaves(params).items()}
  for lr in (0.01, 0.005):  # Cosine decay over two steps.
    (_, (_, batch_stats)), grads = gradients(
      task.model.module.clone(axis_name=None), params, batch_stats, images, labels
    )
    grads = trees.named_leaves(jax.device_get(grads))
    for path, g in grads.items():
      # Rounding (about 1e-8) may decide the direction of Adam's step for these.
      tiny[path] |= np.abs(g) < 1e-4
    stepped = adam.update(trees.named_leaves(params), grads, lr)
    params = jax.tree.unflatten(
      jax.tree.structure(params), [leaf.astype(np.float32) for leaf in stepped.values()]
    )
  assert_close(after['batch_stats'], batch_stats, rtol=1e-4, atol=1e-5)
  found, compared = trees.named_leaves(after['params']), 0
  for path, leaf in trees.named_leaves(params).items():
    np.testing.assert_allclose(found[path][~tiny[path]], leaf[~tiny[path]], rtol=0, atol=1e-5)
    compared += np.sum(~tiny[path])
  assert compared > 0.5 * trees.num_weights(params)


def test_train_examples_are_drawn_by_class_and_seed():
  whole = load_dataset('digits', 'train', classes=(0, 1, 2, 3, 4))
  config = config_dict(small_config())
  drawn = load_task(config).train
  assert drawn.images.shape == (625, 8, 8, 1)
  shares = np.bincount(whole.labels) * 625 / len(whole.labels)
  assert np.abs(np.bincount(drawn.labels) - shares).max() < 1
  pairs = [
    {(image.tobytes(), int(label)) for image, label in zip(data.images, data.labels, strict=True)}
    for data in (drawn, whole)
  ]
  assert len(pairs[0]) == 625
  assert pairs[0] < pairs[1]
  again = load_task(config).train
  other = load_task({**config, 'seed': 1}).train
  assert (again.images == drawn.images).all()
  assert (other.images != drawn.images).any()
  for all_of_them in (0, len(whole.labels)):
    task = load_task({**config, 'train_examples': all_of_them})
    assert (task.train.images == whole.images).all()
  # The mean image is that of the examples that are used.
  mean = drawn.images.astype(np.float64).mean(0) / 255
  np.testing.assert_allclose(load_task(config).prepare.mean, mean, rtol=1e-6)


# -- running on ----------------------------------------------------------------------------------


def test_the_same_command_again_does_nothing(finished, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  before = snapshot(workdir)
  record = forget(workdir)
  assert record['stages'] == record_of(finished)['stages']
  assert snapshot(workdir) == before


def test_seeds_and_stage_options_make_other_runs(finished, tmp_path):
  forget(tmp_path, seed=1, stages=2, stage_epochs=1, stage_lr=1e-4)
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [(line['stage'], line['epoch']) for line in lines] == [(0, 1), (0, 2), (1, 1)]
  first, second = (workdirs.restore_stage(tmp_path, stage)['params'] for stage in (0, 1))
  moves = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True)]
  assert 0 < max(moves) < 15 * 1e-4 * 1.5  # 15 steps of Adam, of at most about the rate each.
  other = workdirs.restore_stage(finished, 0)['params']
  assert np.abs(first['dense']['kernel'] - other['dense']['kernel']).min() > 0


def test_a_workdir_of_another_config_is_refused_with_the_fields(finished, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  before = snapshot(workdir)
  with pytest.raises(UserError) as caught:
    forget(workdir, lr=0.02, augmentation={'rotation': 5.0})
  message = str(caught.value)
  assert 'lr: found 0.01, expected 0.02' in message
  assert 'augmentation.rotation: found 0.0, expected 5.0' in message
  assert 'epochs' not in message
  assert snapshot(workdir) == before


class Crash(BaseException):
  """Ends a run where it stands, without any save."""


def run_and_crash(monkeypatch, workdir, patch):
  with monkeypatch.context() as context:
    patch(context)
    with pytest.raises(Crash):
      forget(workdir)


def raising(real, call):
  """`real`, but for a crash before it is called for the `call`th time."""
  count = 0

  def wrapped(*args, **kwargs):
    nonlocal count
    count += 1
    if count == call:
      raise Crash
    return real(*args, **kwargs)

  return wrapped


@pytest.mark.parametrize('call', [1, 2, 4])
def test_a_crash_between_checkpoint_and_record_does_not_show(monkeypatch, finished, tmp_path, call):
  patched = raising(RunRecord.update, call)
  run_and_crash(
    monkeypatch, tmp_path, lambda context: context.setattr(RunRecord, 'update', patched)
  )
  done = max(0, call - 2)
  assert len(record_of(tmp_path).get('stages', [])) == done
  assert len(list(tmp_path.glob('stages/?'))) == (0 if call == 1 else done + 1)
  forget(tmp_path)
  assert_same_run(tmp_path, finished)


def stop_at_steps(context, at):
  """SIGTERM within training steps, counted from the start of the process."""
  real, count = steps.train_step, 0

  def train_step(task, recipe):
    def step_fn(*args):
      nonlocal count
      count += 1
      if count in at:
        signal.raise_signal(signal.SIGTERM)
      return real(task, recipe)(*args)

    return step_fn

  context.setattr(steps, 'train_step', train_step)


def test_sigterm_again_and_again_does_not_show(monkeypatch, finished, tmp_path):
  stops = 0
  with monkeypatch.context() as context:
    # Within an epoch, at the end of a stage, and in its first step.
    stop_at_steps(context, (5, STEPS[0], STEPS[0] + 1, 112, 123))
    while True:
      try:
        with sigterm_raises():
          forget(tmp_path)
        break
      except Terminated:
        stops += 1
        assert checkpoints.exists(tmp_path / 'resume')
  assert stops == 5
  assert_same_run(tmp_path, finished)
  assert not (tmp_path / 'resume').exists()
  assert record_of(tmp_path)['resumed_in'] == []


def test_a_half_removed_resume_checkpoint_does_no_harm(monkeypatch, finished, tmp_path):
  with monkeypatch.context() as context, sigterm_raises():
    stop_at_steps(context, (20,))
    with pytest.raises(Terminated):
      forget(tmp_path)

  real = shutil.rmtree

  def remove_half(path, **options):
    if path.name == '.resume.removing' and path.exists():
      (path / 'manifest.json').unlink()
      raise Crash
    real(path, **options)

  run_and_crash(
    monkeypatch, tmp_path, lambda context: context.setattr(shutil, 'rmtree', remove_half)
  )
  assert (tmp_path / '.resume.removing' / 'weights').is_dir()
  with monkeypatch.context() as context, sigterm_raises():
    stop_at_steps(context, (3,))
    with pytest.raises(Terminated):
      forget(tmp_path)
  assert checkpoints.read_metadata(tmp_path / 'resume')['stage'] == 1
  forget(tmp_path)
  assert_same_run(tmp_path, finished)


def test_what_a_killed_save_left_is_gone_at_the_end(monkeypatch, finished, tmp_path):
  with monkeypatch.context() as context, sigterm_raises():
    stop_at_steps(context, (20,))
    with pytest.raises(Terminated):
      forget(tmp_path)
  # Between the two renames of a save, and within that of another.
  (tmp_path / 'resume').rename(tmp_path / '.resume.previous')
  (tmp_path / '.resume.saving-0123').mkdir()
  (tmp_path / '.resume.lock').touch()
  forget(tmp_path)
  assert_same_run(tmp_path, finished)
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    'metrics.jsonl', 'record.json', 'stages', 'tensorboard',
  ]  # fmt: skip


def test_a_resume_checkpoint_is_written_when_it_is_time(monkeypatch, tmp_path):
  saved, metrics_safe, told = [], [], []
  real_save, real_write, real_sync = checkpoints.save, MetricsLog.write, MetricsLog.sync

  def save(path, tree, **options):
    saved.append((path.name, options['metadata']['stage'], int(tree.get('step', -1))))
    # A save whose lines are lost with the power could not be resumed from.
    assert metrics_safe[-1:] != [False]
    return real_save(path, tree, **options)

  def write(log, *args, **options):
    metrics_safe.append(False)
    real_write(log, *args, **options)

  def sync(log):
    metrics_safe.append(True)
    real_sync(log)

  clock = iter(range(10**6))
  with monkeypatch.context() as context:
    context.setattr(checkpoints, 'save', save)
    context.setattr(MetricsLog, 'write', write)
    context.setattr(MetricsLog, 'sync', sync)
    # A clock that advances by a second each time it is read.
    context.setattr(loop.time, 'monotonic', lambda: float(next(clock)))
    forgetting.run(
      small_config(stages=1, save_every_seconds=20.0), tmp_path, show_progress=False,
      on_metrics=lambda step, metrics: told.append({'step': step, **metrics}),
    )  # fmt: skip
  # The watcher was told what the file has.
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert told == [json.loads(line) for line in lines] and len(told) == 2
  assert saved[-1] == ('0', 0, -1)
  steps = [step for name, _, step in saved[:-1] if name == 'resume']
  assert len(steps) == len(saved) - 1
  assert 2 < len(steps) < 6
  assert steps == sorted(set(steps))


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'model': 'cnn_nb'}, "unknown model 'cnn_nb'. Did you mean 'cnn_bn'"),
    ({'width': 0}, "width of model 'cnn_bn' is 0"),
    ({'dtype': 'flaot32'}, "dtype of model 'cnn_bn' is 'flaot32'"),
    ({'optimizer': 'adm'}, "unknown optimizer 'adm'. Did you mean 'adam'"),
    ({'schedule': 'linear'}, "unknown schedule 'linear'"),
    ({'train_split': 'trian'}, "unknown split of 'digits' 'trian'. Did you mean 'train'"),
    ({'classes': (0, 77)}, "classes hold 77; 'digits' has the labels 0 to 9"),
    ({'train_examples': 1000}, 'train_examples is 1000; expected 0 (all) to 723'),
    ({'train_examples': -1}, 'train_examples is -1; expected'),
    ({'image_size': (4, 4)}, 'images have shape (1, 4, 4, 1); expected'),
    (
      {'batch_size': 48},
      'stage 3 (0 is the whole set) has 40 examples; expected at least one batch',
    ),
    ({'batch_size': 0}, 'batch_size is 0; expected a positive multiple of the 8 devices'),
    ({'batch_size': 12}, 'batch_size is 12; expected a positive multiple of the 8 devices'),
    (
      {'classes': (), 'stratified': False, 'rate': 0.12, 'stages': 3, 'batch_size': 8},
      'stage 2 (0 is the whole set) has 9 examples but none of class',
    ),
    ({'rate': 1.0}, 'rate is 1.0; expected a number between 0 and 1'),
    ({'stages': 0}, 'stages is 0; expected at least 1'),
    ({'seed': 2**32}, 'seed is 4294967296; expected one of 32 bits'),
    ({'seed': -(2**64)}, 'expected one of 32 bits'),
    ({'epochs': 0}, 'stage 0 has 0 epochs; expected at least 1'),
    ({'stage_epochs': 0}, 'stage 1 has 0 epochs; expected at least 1'),
    ({'lr': -0.1}, 'the learning rate is -0.1; expected'),
    ({'stage_lr': float('inf')}, 'the learning rate is inf; expected'),
    ({'weight_decay': -1.0}, 'weight_decay is -1.0; expected'),
    ({'augmentation': {'rotation': 200.0}}, 'augmentation rotation is 200.0; expected'),
  ],
)
def test_what_does_not_fit_is_told_before_anything_is_written(tmp_path, fields, message):
  with pytest.raises(UserError) as caught:
    forget(tmp_path / 'run', **fields)
  assert message in str(caught.value)
  assert list(tmp_path.iterdir()) == []


def test_divergence_ends_the_run_without_a_checkpoint(tmp_path):
  with pytest.raises(DivergedError, match=r'NaN or infinity|the loss is nan'):
    forget(tmp_path, optimizer='sgd', lr=1e30)
  assert not (tmp_path / 'stages').exists()
  assert record_of(tmp_path).get('stages') is None


def test_an_unfinished_run_is_not_predicted_from(finished, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  record_of(workdir).update(stages=record_of(workdir)['stages'][:3])
  shutil.rmtree(workdir / 'stages' / '4')
  for use in (
    lambda: workdirs.load_trajectory(workdir),
    lambda: from_run.run(workdir, predictors=['shrink'], steps=1),
  ):
    with pytest.raises(UserError, match=r'run: 3 of 5 stages are done; run bin/forget.py'):
      use()
  with pytest.raises(
    UserError, match=r'nowhere: no forgetting run is here; make one with bin/forget.py'
  ):
    workdirs.load_trajectory(tmp_path / 'nowhere')
  assert not (workdir / 'predictions').exists()


def test_a_damaged_stage_is_named(finished, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  files = (workdir / 'stages' / '2' / 'weights').rglob('*')
  victim = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
  content = bytearray(victim.read_bytes())
  content[len(content) // 2] ^= 1
  victim.write_bytes(content)
  with pytest.raises(UserError, match=r'checkpoint .*stages/2 is damaged: file .* altered'):
    workdirs.load_trajectory(workdir)
  # The run itself must not say that all is well.
  with pytest.raises(UserError, match=r'stages/2 is damaged.* remove record.json, .* to train all'):
    forget(workdir)
  shutil.rmtree(workdir / 'stages' / '2')
  with pytest.raises(UserError, match=r'there is no checkpoint .*stages/2'):
    workdirs.load_trajectory(workdir)
  with pytest.raises(
    UserError, match=r'no checkpoint .*stages/2.* says that this stage was trained'
  ):
    forget(workdir)


def test_two_processes_do_not_train_one_run(finished, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  record_of(workdir).update(stages=record_of(workdir)['stages'][:3])
  with alone(workdir), pytest.raises(UserError, match=r'run: another process is working here'):
    forget(workdir)
  forget(workdir)
  assert len(record_of(workdir)['stages']) == 5
