"""Meta-training: windows, loss and bookkeeping against NumPy; the real loop, shrunk."""

import dataclasses
import hashlib
import itertools
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import runs
import safetensors.numpy
import test_mat
from ml_collections import ConfigDict

from know_jax.errors import UserError
from know_jax.io import checkpoints
from know_jax.io.sealed import read_sealed, write_sealed
from know_jax.kinds import KINDS
from know_jax.meta import collect, meta_training
from know_jax.meta.windows import SPAN, fit_least_squares, sample_windows, split_runs
from know_jax.predictors import known, known_leaf
from know_jax.predictors.parameters import load_known, read_card
from know_jax.runs.metrics import MetricsLog
from know_jax.runs.record import RunRecord
from know_jax.system.signals import Terminated

KINDS_OF = {'c/kernel': 'conv', 'f/kernel': 'fc', 'f/bias': 'bias', 'n/scale': 'keep'}


def synthetic_run(number: int, stages: int = 7) -> collect.Run:
  """Weights that all move by -10 % of themselves a stage: what KNOWN can learn exactly."""
  rng = np.random.default_rng(number)
  shapes = {'c/kernel': (3, 3, 4, 8), 'f/kernel': (40, 10), 'f/bias': (10,), 'n/scale': (8,)}
  oldest = {path: rng.normal(0, 0.2, shape) for path, shape in shapes.items()}
  factors = 0.9 ** np.arange(stages)
  weights = {
    path: np.stack([leaf * f for f in factors]).astype(np.float32) for path, leaf in oldest.items()
  }
  stage = {'test_accuracy': 0.5, 'test_loss': 1.0}
  about = {
    'format': collect.FORMAT,
    'number': number,
    'config': {
      'model': ('cnn', 'vit')[number % 2],
      'dataset': ('digits', 'mnist')[number // 2 % 2],
      'rate': 0.5,
      'stages': stages,
    },
    'kinds': KINDS_OF,
    'stages': [stage] * stages,
    'pretrain_loss': {'first': 2.0, 'before': 0.5, 'end': 0.5},
  }
  return collect.Run(number, about, weights)


def write_dataset(folder, numbers):
  RunRecord.open(folder, {'made': 'by the test', 'seed': 0}, kind=collect.KIND)
  (folder / 'runs').mkdir()
  for number in numbers:
    run = synthetic_run(number)
    data = safetensors.numpy.save(run.weights)
    path = folder / 'runs' / f'{number:05d}.json'
    path.with_suffix('.safetensors').write_bytes(data)
    write_sealed(path, {**run.about, 'weights_sha256': hashlib.sha256(data).hexdigest()})


def tiny_config(architecture: str = 'conditioned') -> ConfigDict:
  config = meta_training.default_config()
  config.architecture = architecture
  config.weights_per_run = 256
  config.batch_size = 256
  config.steps = 60
  config.validate_every = 20
  return config


@pytest.fixture(scope='module', params=['conditioned', 'scaled', 'paper'])
def trained(request, synthetic_runs, tmp_path_factory):
  workdir = tmp_path_factory.mktemp(request.param)
  config = tiny_config(request.param)
  return workdir, meta_training.run(config, synthetic_runs, workdir), config


# --- windows --------------------------------------------------------------------------------------


def test_windows_are_weights_of_the_run_in_order():
  run = synthetic_run(0)
  windows = sample_windows([run], 500, seed=3)
  for kind, path in (('conv', 'c/kernel'), ('fc', 'f/kernel'), ('bias', 'f/bias')):
    found = windows.weights[kind]
    assert found.shape == (1, 500, SPAN) and found.dtype == np.float32
    flat = run.weights[path].reshape(7, -1)
    allowed = {tuple(flat[s : s + SPAN, i]) for s in (0, 1) for i in range(flat.shape[1])}
    assert {tuple(row) for row in found[0]} <= allowed
    # Both windows of the paper's seven stages are drawn, about as often.
    first = {tuple(flat[:SPAN, i]) for i in range(flat.shape[1])}
    assert 0.4 < np.mean([tuple(row) in first for row in found[0]]) < 0.6


def test_every_leaf_of_a_kind_is_drawn_as_often_as_any_other():
  run = synthetic_run(0)
  run.weights['big/kernel'] = np.full((7, 100, 100), 5.0, np.float32)
  about = {**run.about, 'kinds': {**KINDS_OF, 'big/kernel': 'fc'}}
  windows = sample_windows([dataclasses.replace(run, about=about)], 2000, seed=0)
  assert 0.45 < (windows.weights['fc'] == 5.0).all(axis=-1).mean() < 0.55


def test_windows_depend_on_seed_and_run_alone():
  alone = sample_windows([synthetic_run(4)], 50, seed=1)
  among = sample_windows([synthetic_run(2), synthetic_run(4)], 50, seed=1)
  other = sample_windows([synthetic_run(4)], 50, seed=2)
  for kind in KINDS:
    np.testing.assert_array_equal(alone.weights[kind][0], among.weights[kind][1])
    assert (alone.weights[kind] != other.weights[kind]).any()


def test_windows_do_not_depend_on_the_order_of_leaves():
  run = synthetic_run(0)
  run.weights['g/kernel'] = -run.weights['f/kernel']
  about = {**run.about, 'kinds': {**KINDS_OF, 'g/kernel': 'fc'}}
  backwards = dict(reversed(run.weights.items()))
  a = sample_windows([dataclasses.replace(run, about=about)], 50, seed=0)
  b = sample_windows([dataclasses.replace(run, about=about, weights=backwards)], 50, seed=0)
  np.testing.assert_array_equal(a.weights['fc'], b.weights['fc'])


def test_windows_need_runs_kinds_and_stages():
  with pytest.raises(UserError, match='no finished run'):
    sample_windows([dataclasses.replace(synthetic_run(0), weights=None)], 5, seed=0)
  with pytest.raises(UserError, match='has 5 stages; expected at least 6'):
    sample_windows([synthetic_run(0, stages=5)], 5, seed=0)
  lacking = synthetic_run(0)
  del lacking.weights['f/bias']
  with pytest.raises(UserError, match="no leaf of kind 'bias'"):
    sample_windows([lacking], 5, seed=0)


def test_windows_know_the_moments_of_the_leaf_that_they_are_from():
  run = synthetic_run(0)
  run.weights['g/kernel'] = -2 * run.weights['f/kernel'][:, :7]
  about = {**run.about, 'kinds': {**KINDS_OF, 'g/kernel': 'fc'}}
  other = synthetic_run(5)
  windows = sample_windows([other, dataclasses.replace(run, about=about)], 200, seed=0)
  assert windows.moments['fc'].shape == (2 + 4, 5, 5)
  for i, source in enumerate((other, run)):
    for row, leaf in zip(windows.weights['fc'][i], windows.leaves['fc'][i], strict=True):
      # The leaf and start that the moments are of hold this very window.
      found = [
        (path, start)
        for path in ('f/kernel', 'g/kernel')
        if path in source.weights
        for start in (0, 1)
        if (row == source.weights[path].reshape(7, -1)[start : start + SPAN].T).all(1).any()
      ]
      ((path, start),) = found
      history = source.weights[path].reshape(7, -1)[start : start + 5].astype(np.float64)
      v = np.concatenate([np.diff(history, axis=0), history[-1:]])
      expected = v @ v.T / history.shape[1]
      np.testing.assert_allclose(windows.moments['fc'][leaf], expected, rtol=1e-5, atol=1e-9)
  np.testing.assert_array_equal(windows.rates, [0.5, 0.5])


def abouts(count):
  return {n: synthetic_run(n).about for n in range(count)}


def test_split_is_disjoint_complete_fixed_and_alike_in_every_group():
  parts = split_runs(abouts(40), 0, (0.2, 0.3))
  assert [len(part) for part in parts] == [20, 8, 12]
  assert sorted(itertools.chain(*parts)) == list(range(40))
  assert parts == split_runs(dict(reversed(abouts(40).items())), 0, (0.2, 0.3))
  assert parts != split_runs(abouts(40), 1, (0.2, 0.3))
  for part, expected in zip(parts, (5, 2, 3), strict=True):
    # Four groups of ten: two families on two data sets.
    assert all(abs(sum(n % 4 == group for n in part) - expected) <= 1 for group in range(4))
  with pytest.raises(UserError, match='collect more runs'):
    split_runs(abouts(2), 0, (0.2, 0.2))


def test_the_runs_collected_last_are_tested_whatever_the_seed():
  for seed in range(3):
    assert split_runs(abouts(40), seed, (0.2, 0.3))[2] == list(range(28, 40))


GROUPS = [('vit', lambda n: n % 2 == 1), ('mnist', lambda n: n // 2 % 2 == 1)]


@pytest.mark.parametrize(('left_out', 'of_group'), GROUPS, ids=['vit', 'mnist'])
def test_a_left_out_group_is_only_tested_and_on_the_same_runs(left_out, of_group):
  config = meta_training.Config()
  whole = meta_training.parts_of(config, abouts(40))
  parts = meta_training.parts_of(dataclasses.replace(config, leave_out=left_out), abouts(40))
  assert parts['test'] == [n for n in whole['test'] if of_group(n)]
  for name in ('train', 'validation'):
    assert parts[name] == [n for n in whole[name] if not of_group(n)]
  with pytest.raises(UserError, match=r"family or data set 'vjt'\. Did you mean 'vit'"):
    meta_training.parts_of(dataclasses.replace(config, leave_out='vjt'), abouts(40))


# --- loss and batches -----------------------------------------------------------------------------


def batch_of(windows, kind):
  """All windows of a kind as one batch, not split over devices."""
  count = windows.weights[kind].shape[1]
  return {
    'windows': jnp.asarray(windows.weights[kind].reshape(-1, SPAN)),
    'moments': jnp.asarray(windows.moments[kind][windows.leaves[kind].ravel()]),
    'rate': jnp.asarray(np.repeat(windows.rates, count)),
    'weight': jnp.asarray(np.repeat(1 / windows.copying(kind), count), jnp.float32),
  }


def test_the_paper_loss_is_the_mean_absolute_error_of_the_plain_module_and_its_penalty():
  params = known.init_theta(jax.random.key(0))['conv']
  windows = sample_windows([synthetic_run(0), synthetic_run(1)], 50, seed=0)
  rows = windows.weights['conv'].reshape(-1, SPAN)
  residual = jax.vmap(lambda w: known.KNOWN().apply({'params': params}, w))(rows[:, :-1])
  expected = np.abs(rows[:, -2] + np.asarray(residual, np.float64) - rows[:, -1]).mean()
  found = meta_training.batch_loss('paper', params, batch_of(windows, 'conv'))
  np.testing.assert_allclose(found, expected + known.penalty(params), rtol=1e-5)


def test_the_scaled_loss_is_the_error_of_the_formula_over_that_of_copying_and_the_penalty():
  params = references.random_theta()['conv'] | {'bound': np.float32(3.0)}
  windows = sample_windows([synthetic_run(n) for n in range(2)], 50, seed=0)
  double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  ratios = []
  for run in range(2):
    w = windows.weights['conv'][run].astype(np.float64)
    g = windows.moments['conv'][windows.leaves['conv'][run]].astype(np.float64)
    movement = np.sqrt(np.diagonal(g, axis1=1, axis2=2)[:, :-1].mean(1))[:, None]
    newest, older = w[:, -2:-1], w[:, :-1]
    x = np.clip((older - newest) / movement, -3, 3) + newest / np.sqrt(g[:, -1:, -1])
    step = 2 * movement[:, 0] * references.known_residual(double, x)
    ratios.append(np.abs(w[:, -2] + step - w[:, -1]).mean() / np.abs(w[:, -2] - w[:, -1]).mean())
  found = meta_training.batch_loss('scaled', params, batch_of(windows, 'conv'))
  np.testing.assert_allclose(found, np.mean(ratios) + known.penalty(params), rtol=1e-4)


def test_the_bound_of_a_scaled_network_is_a_constant(synthetic_runs, tmp_path):
  meta_training.run(tiny_config('scaled'), synthetic_runs, tmp_path)
  theta = load_known(tmp_path / 'known.safetensors')
  assert {params['bound'].item() for params in theta.values()} == {8.0}


def test_the_conditioned_loss_is_the_error_over_that_of_copying_averaged_over_runs():
  params = references.random_conditioned_theta()['fc']
  windows = sample_windows([synthetic_run(n) for n in range(3)], 50, seed=0)
  ratios = []
  for run in range(3):
    w = windows.weights['fc'][run].astype(np.float64)
    g = windows.moments['fc'][windows.leaves['fc'][run]]
    step = np.stack([known_leaf.step_coefficients(params, m, 0.5) for m in g]).astype(np.float64)
    v = np.concatenate([np.diff(w[:, :-1], axis=1), w[:, -2:-1]], axis=1)
    error = np.abs(w[:, -2] + (step * v).sum(1) - w[:, -1]).mean()
    ratios.append(error / np.abs(w[:, -2] - w[:, -1]).mean())
  found = meta_training.batch_loss('conditioned', params, batch_of(windows, 'fc'))
  np.testing.assert_allclose(found, np.mean(ratios), rtol=1e-4)
  theta = dict.fromkeys(KINDS, params)
  whole = meta_training.ratios_of('conditioned', theta, windows)
  np.testing.assert_allclose(whole['fc'], np.mean(ratios), rtol=1e-4)


def test_batches_are_functions_of_seed_and_step_and_weigh_runs_alike():
  windows = sample_windows([synthetic_run(n) for n in range(4)], 10, seed=0)
  for kind in KINDS:
    windows.weights[kind][..., 0] = np.arange(4)[:, None]
  a, b, c = (meta_training.draw_batch(windows, 4000, 0, step) for step in (5, 5, 6))
  for kind in KINDS:
    jax.tree.map(np.testing.assert_array_equal, a[kind], b[kind])
    assert (a[kind]['windows'] != c[kind]['windows']).any()
    assert a[kind]['windows'].shape == (8, 500, SPAN)
    run = a[kind]['windows'][..., 0].astype(int)
    np.testing.assert_allclose(np.bincount(run.ravel(), minlength=4) / 4000, 0.25, atol=0.03)
    expected = 1 / windows.copying(kind)[run]
    np.testing.assert_allclose(a[kind]['weight'], expected, rtol=1e-6)


def test_least_squares_against_numpy_and_what_it_must_find():
  windows = sample_windows([synthetic_run(n) for n in range(3)], 200, seed=0)
  found = fit_least_squares(windows)
  for kind in KINDS:
    rows, targets = [], []
    for w in windows.weights[kind].astype(np.float64):
      move = w[:, -1] - w[:, -2]
      scale = np.sqrt((move**2).sum())
      rows.append(np.concatenate([np.diff(w[:, :-1], axis=1), w[:, -2:-1]], axis=1) / scale)
      targets.append(move / scale)
    expected = np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets), rcond=1e-12)[0]
    design = np.concatenate(rows)
    np.testing.assert_allclose(design @ found[kind], design @ expected, rtol=1e-3, atol=1e-6)
    # Every weight moves by -10 % of itself.
    w = windows.weights[kind][0].astype(np.float64)
    v = np.concatenate([np.diff(w[:, :-1], axis=1), w[:, -2:-1]], axis=1)
    np.testing.assert_allclose(v @ found[kind], -0.1 * w[:, -2], rtol=1e-3, atol=1e-6)


# --- the real loop, shrunk ------------------------------------------------------------------------


@pytest.mark.parametrize('architecture', ['conditioned', 'scaled', 'paper'])
def test_training_learns_what_there_is_to_learn(synthetic_runs, tmp_path, architecture):
  config = tiny_config(architecture)
  config.steps, config.validate_every, config.lr = 300, 50, 5e-3
  record = meta_training.run(config, synthetic_runs, tmp_path)
  for kind in ('conv', 'fc'):
    assert record['validation_error'][kind] < 0.5, record['validation_error']


def test_the_files_written_load_and_say_where_they_come_from(trained, synthetic_runs):
  workdir, record, config = trained
  theta, card = load_known(workdir / 'known.safetensors'), read_card(workdir / 'known.safetensors')
  size = {'paper': 9425, 'scaled': 9425 + 1, 'conditioned': 1798}[config.architecture]
  assert card['parameters'] == dict.fromkeys(KINDS, size)
  assert sum(x.size for x in jax.tree.leaves(theta)) == 3 * size
  assert card['training']['config']['seed'] == 0
  assert card['meta_dataset']['runs'] == 12
  assert sorted(itertools.chain(*card['training']['runs'].values())) == list(range(12))
  assert f'conv {record["validation_error"]["conv"]:.3f}' in meta_training.report(record)
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  assert len(lines) == 3
  assert (workdir / 'learning_curves.png').read_bytes().startswith(b'\x89PNG')
  fitted = read_sealed(workdir / 'least_squares.json', 'fit')['coefficients']
  chosen = [
    run for run in collect.read_runs(synthetic_runs) if run.number in record['runs']['train']
  ]
  expected = fit_least_squares(sample_windows(chosen, config.weights_per_run, 0))
  assert fitted == expected


@pytest.mark.parametrize('trained', ['conditioned'], indirect=True)
def test_the_constants_of_the_context_are_those_of_the_training_runs(synthetic_runs, trained):
  workdir, record, _ = trained
  params = load_known(workdir / 'known.safetensors')['fc']
  found = []
  for run in collect.read_runs(synthetic_runs):
    if run.number in record['runs']['train']:
      flat = run.weights['f/kernel'].reshape(7, -1)
      found += [references.leaf_context(flat[s : s + 5].astype(np.float64), 0.5) for s in (0, 1)]
  np.testing.assert_allclose(params['mean'], np.mean(found, axis=0), rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(
    params['scale'], np.maximum(np.std(found, axis=0), 1e-2), rtol=1e-2, atol=1e-3
  )


def test_the_best_parameters_are_kept_not_the_last(trained):
  workdir, _, _ = trained
  card = read_card(workdir / 'known.safetensors')

  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  for kind in KINDS:
    ratios = [line[f'ratio_{kind}'] for line in lines]
    assert card['validation_error'][kind] == min(ratios)
    assert card['step'][kind] == 20 * (1 + int(np.argmin(ratios)))


def test_a_finished_training_is_not_trained_again(trained, synthetic_runs):
  workdir, record, config = trained
  before = (workdir / 'known.safetensors').stat().st_mtime_ns
  again = meta_training.run(config, synthetic_runs, workdir)
  assert again['validation_error'] == record['validation_error']
  assert (workdir / 'known.safetensors').stat().st_mtime_ns == before


@pytest.mark.parametrize('stop_after', [7, 20])
def test_an_interrupted_training_ends_with_the_same_bits(
  trained, synthetic_runs, tmp_path, monkeypatch, stop_after
):
  workdir, _, config = trained
  draw, calls = meta_training.draw_batch, []

  def draw_then_stop(*args):
    calls.append(args)
    if len(calls) == stop_after + 1:
      raise Terminated
    return draw(*args)

  monkeypatch.setattr(meta_training, 'draw_batch', draw_then_stop)
  with pytest.raises(Terminated):
    meta_training.run(config, synthetic_runs, tmp_path)
  assert checkpoints.exists(tmp_path / 'resume')
  monkeypatch.setattr(meta_training, 'draw_batch', draw)
  record = meta_training.run(config, synthetic_runs, tmp_path)
  for name in ('known.safetensors', 'metrics.jsonl'):
    expected, found = (workdir / name).read_bytes(), (tmp_path / name).read_bytes()
    if name.endswith('jsonl'):
      assert found == expected
    else:
      a, b = safetensors.numpy.load(expected), safetensors.numpy.load(found)
      for leaf in a:
        np.testing.assert_array_equal(a[leaf], b[leaf])
  assert list(record['validation_error']) == list(KINDS)
  assert not (tmp_path / 'resume').exists()


def test_bad_settings_are_named(synthetic_runs, tmp_path):
  config = tiny_config()
  config.steps = 10
  with pytest.raises(UserError, match='steps is 10; expected at least validate_every = 20'):
    meta_training.run(config, synthetic_runs, tmp_path / 'a')
  config = tiny_config()
  config.batch_size = 12
  with pytest.raises(UserError, match='batch_size is 12'):
    meta_training.run(config, synthetic_runs, tmp_path / 'b')
  config = tiny_config()
  config.weights_per_run = 0
  with pytest.raises(UserError, match='weights_per_run is 0'):
    meta_training.run(config, synthetic_runs, tmp_path / 'c')
  config = tiny_config('papier')
  with pytest.raises(UserError, match=r"architecture 'papier'\. Did you mean 'paper'"):
    meta_training.run(config, synthetic_runs, tmp_path / 'd')
  config = tiny_config()
  config.weight_decay = -1.0
  with pytest.raises(UserError, match=r'weight_decay is -1\.0'):
    meta_training.run(config, synthetic_runs, tmp_path / 'e')
  assert not list(tmp_path.iterdir())


def test_a_meta_dataset_that_grew_is_another(synthetic_runs, tmp_path):
  folder = tmp_path / 'growing'
  write_dataset(folder, range(9))
  config = tiny_config()
  config.steps = 20
  meta_training.run(config, folder, tmp_path / 'w')
  for path in (synthetic_runs / 'runs').glob('0000[9]*'):
    (folder / 'runs' / path.name).write_bytes(path.read_bytes())
  with pytest.raises(UserError, match='runs'):
    meta_training.run(config, folder, tmp_path / 'w')


def test_early_stopping_stops_wherever_a_training_was_interrupted(
  synthetic_runs, tmp_path, monkeypatch
):
  config = tiny_config()
  config.lr, config.steps, config.validate_every, config.patience = 1e-12, 60, 5, 2
  whole = meta_training.run(config, synthetic_runs, tmp_path / 'whole')
  assert whole['steps'] < 60
  draw, calls = meta_training.draw_batch, []

  def stop_at_the_last(*args):
    calls.append(args)
    if len(calls) == whole['steps'] + 1:
      raise AssertionError('a step after the last')
    if len(calls) == whole['steps']:
      # As a signal that arrives in the last step: it waits for the step's end.
      signal.raise_signal(signal.SIGTERM)
    return draw(*args)

  monkeypatch.setattr(meta_training, 'draw_batch', stop_at_the_last)
  with pytest.raises(Terminated), runs.sigterm_raises():
    meta_training.run(config, synthetic_runs, tmp_path / 'cut')
  monkeypatch.setattr(meta_training, 'draw_batch', draw)
  assert meta_training.run(config, synthetic_runs, tmp_path / 'cut')['steps'] == whole['steps']


def test_metrics_are_durable_before_the_save_that_counts_on_them(
  synthetic_runs, tmp_path, monkeypatch
):
  done, real_write, real_sync = [], MetricsLog.write, MetricsLog.sync

  def write(log, *args, **options):
    done.append('write')
    real_write(log, *args, **options)

  def sync(log):
    done.append('sync')
    real_sync(log)

  def save(path, tree, **options):
    done.append('save')

  monkeypatch.setattr(MetricsLog, 'write', write)
  monkeypatch.setattr(MetricsLog, 'sync', sync)
  monkeypatch.setattr(checkpoints, 'save', save)
  config = tiny_config()
  config.steps, config.save_every_seconds = 2 * config.validate_every, 0.0
  meta_training.run(config, synthetic_runs, tmp_path)
  first = done.index('write')
  assert done[first : first + 3] == ['write', 'sync', 'save']


def test_a_training_that_is_never_finite_is_an_error(synthetic_runs, tmp_path):
  config = tiny_config('paper')
  config.lr, config.steps, config.validate_every = 1e30, 20, 20
  with pytest.raises(UserError, match='never finite'):
    meta_training.run(config, synthetic_runs, tmp_path)
  assert not (tmp_path / 'known.safetensors').exists()


def test_a_workdir_of_another_config_is_refused(trained, synthetic_runs):
  workdir, _, config = trained
  config = ConfigDict(config)
  config.lr = 0.5
  with pytest.raises(UserError, match='lr'):
    meta_training.run(config, synthetic_runs, workdir)


def test_a_folder_of_mat_files_can_be_trained_on(tmp_path):
  folder = tmp_path / 'mats'
  folder.mkdir()
  for i, name in enumerate(('cnn_mnist', 'resnet18_cifar10') * 3):
    test_mat.write(folder / f'{name}_r0.{i + 3}.mat', test_mat.arrays(seed=i))
  record = meta_training.run(tiny_config(), folder, tmp_path / 'w')
  assert all(np.isfinite(error) for error in record['validation_error'].values())
  card = read_card(tmp_path / 'w' / 'known.safetensors')
  assert card['meta_dataset']['runs'] == 6
  assert '6 runs, from .mat files' in card['meta_dataset']['summary'][0]
