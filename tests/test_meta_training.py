"""Meta-training: windows, loss and bookkeeping against NumPy; the real loop, shrunk."""

import dataclasses
import hashlib
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from know_jax import checkpoints, known
from know_jax.errors import UserError
from know_jax.files import write_sealed
from know_jax.meta import collect, meta_training
from know_jax.meta.windows import SPAN, Windows, sample_windows, split_runs
from know_jax.pretrained import load_known, read_card
from know_jax.run_record import RunRecord
from know_jax.signals import Terminated
from know_jax.trees import KINDS

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
    'config': {'model': 'cnn', 'dataset': 'synthetic'},
    'kinds': KINDS_OF,
    'stages': [stage] * stages,
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


def tiny_config() -> ConfigDict:
  config = meta_training.default_config()
  config.weights_per_run = 256
  config.batch_size = 256
  config.steps = 60
  config.validate_every = 20
  return config


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
  folder = tmp_path_factory.mktemp('synthetic')
  write_dataset(folder, range(6))
  return folder


@pytest.fixture(scope='module')
def trained(dataset, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('trained')
  return workdir, meta_training.run(tiny_config(), dataset, workdir)


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
  with pytest.raises(UserError, match='has 5 stages; wanted at least 6'):
    sample_windows([synthetic_run(0, stages=5)], 5, seed=0)
  lacking = synthetic_run(0)
  del lacking.weights['f/bias']
  with pytest.raises(UserError, match="no leaf of kind 'bias'"):
    sample_windows([lacking], 5, seed=0)


def test_split_is_disjoint_complete_and_fixed():
  parts = split_runs(range(20), 0, (0.2, 0.3))
  assert [len(part) for part in parts] == [10, 4, 6]
  assert sorted(itertools.chain(*parts)) == list(range(20))
  assert parts == split_runs(list(reversed(range(20))), 0, (0.2, 0.3))
  assert parts != split_runs(range(20), 1, (0.2, 0.3))
  with pytest.raises(UserError, match='collect more runs'):
    split_runs(range(2), 0, (0.2, 0.2))


# --- loss and batches -----------------------------------------------------------------------------


def test_window_loss_is_the_mean_absolute_error_of_the_plain_module():
  params = known.init_theta(jax.random.key(0))['conv']
  windows = np.random.default_rng(0).normal(0, 0.1, (50, SPAN)).astype(np.float32)
  residual = jax.vmap(lambda w: known.KNOWN().apply({'params': params}, w))(windows[:, :-1])
  wanted = np.abs(windows[:, -2] + np.asarray(residual, np.float64) - windows[:, -1]).mean()
  np.testing.assert_allclose(
    meta_training.window_loss(params, jnp.asarray(windows)), wanted, rtol=1e-5
  )


def test_batches_are_functions_of_seed_and_step_and_weigh_runs_alike():
  weights = {kind: np.zeros((4, 10, SPAN), np.float32) for kind in KINDS}
  for kind in KINDS:
    weights[kind] += np.arange(4)[:, None, None]
  windows = Windows((0, 1, 2, 3), weights)
  a, b, c = (meta_training.draw_batch(windows, 4000, 0, step) for step in (5, 5, 6))
  for kind in KINDS:
    np.testing.assert_array_equal(a[kind], b[kind])
    assert (a[kind] != c[kind]).any()
    assert a[kind].shape == (8, 500, SPAN)
    shares = np.bincount(a[kind][..., 0].astype(int).ravel(), minlength=4) / 4000
    np.testing.assert_allclose(shares, 0.25, atol=0.03)


def test_retrodiction_errors_against_numpy():
  windows = sample_windows([synthetic_run(n) for n in range(3)], 64, seed=0)
  theta = known.init_theta(jax.random.key(1))
  errors = meta_training.retrodiction_errors(windows, theta)
  for kind in KINDS:
    w = windows.weights[kind].astype(np.float64)
    copying = np.abs(w[..., -2] - w[..., -1]).mean(axis=1)
    vector = np.abs(2 * w[..., -2] - w[..., -3] - w[..., -1]).mean(axis=1) / copying
    np.testing.assert_allclose(errors[kind]['persistence'], 1.0, rtol=1e-6)
    np.testing.assert_allclose(errors[kind]['task_vector'], vector, rtol=1e-4)
    assert set(errors[kind]) == {'known', 'known_history_free', *meta_training.RIVALS}


# --- the real loop, shrunk ------------------------------------------------------------------------


def test_training_learns_what_there_is_to_learn(dataset, tmp_path):
  config = tiny_config()
  config.steps, config.validate_every, config.lr = 400, 50, 3e-3
  record = meta_training.run(config, dataset, tmp_path)
  for kind in ('conv', 'fc'):
    assert record['test_error'][kind]['known'] < 0.5, record['test_error']


def test_the_file_written_loads_and_says_where_it_comes_from(trained):
  workdir, record = trained
  theta, card = load_known(workdir / 'known.safetensors'), read_card(workdir / 'known.safetensors')
  assert sum(x.size for x in jax.tree.leaves(theta)) == 3 * 9425
  assert card['test_error'] == record['test_error']
  assert card['training']['config']['seed'] == 0
  assert card['meta_dataset']['runs'] == 6
  assert sorted(itertools.chain(*card['training']['runs'].values())) == list(range(6))
  report = meta_training.report(record)
  assert f'{record["test_error"]["fc"]["known"]:.3f}' in report
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  assert len(lines) == 3


def test_the_best_parameters_are_kept_not_the_last(trained):
  workdir, _ = trained
  card = read_card(workdir / 'known.safetensors')

  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  for kind in KINDS:
    ratios = [line[f'ratio_{kind}'] for line in lines]
    assert card['validation_error'][kind] == min(ratios)
    assert card['step'][kind] == 20 * (1 + int(np.argmin(ratios)))


def test_a_finished_training_is_not_trained_again(trained, dataset):
  workdir, record = trained
  before = (workdir / 'known.safetensors').stat().st_mtime_ns
  assert meta_training.run(tiny_config(), dataset, workdir)['test_error'] == record['test_error']
  assert (workdir / 'known.safetensors').stat().st_mtime_ns == before


@pytest.mark.parametrize('stop_after', [7, 20, 33])
def test_an_interrupted_training_ends_with_the_same_bits(
  trained, dataset, tmp_path, monkeypatch, stop_after
):
  workdir, _ = trained
  draw, calls = meta_training.draw_batch, []

  def draw_then_stop(*args):
    calls.append(args)
    if len(calls) == stop_after + 1:
      raise Terminated
    return draw(*args)

  monkeypatch.setattr(meta_training, 'draw_batch', draw_then_stop)
  with pytest.raises(Terminated):
    meta_training.run(tiny_config(), dataset, tmp_path)
  assert checkpoints.exists(tmp_path / 'resume')
  monkeypatch.setattr(meta_training, 'draw_batch', draw)
  meta_training.run(tiny_config(), dataset, tmp_path)
  for name in ('known.safetensors', 'metrics.jsonl'):
    wanted, found = (workdir / name).read_bytes(), (tmp_path / name).read_bytes()
    if name.endswith('jsonl'):
      assert found == wanted
    else:
      a, b = safetensors.numpy.load(wanted), safetensors.numpy.load(found)
      for leaf in a:
        np.testing.assert_array_equal(a[leaf], b[leaf])


def test_bad_settings_are_named(dataset, tmp_path):
  config = tiny_config()
  config.steps = 10
  with pytest.raises(UserError, match='steps is 10; wanted at least validate_every = 20'):
    meta_training.run(config, dataset, tmp_path / 'a')
  config = tiny_config()
  config.batch_size = 12
  with pytest.raises(UserError, match='batch_size is 12'):
    meta_training.run(config, dataset, tmp_path / 'b')
  config = tiny_config()
  config.weights_per_run = 0
  with pytest.raises(UserError, match='weights_per_run is 0'):
    meta_training.run(config, dataset, tmp_path / 'c')
  assert not list(tmp_path.iterdir())


def test_a_workdir_of_another_config_is_refused(trained, dataset):
  workdir, _ = trained
  config = tiny_config()
  config.lr = 0.5
  with pytest.raises(UserError, match='lr'):
    meta_training.run(config, dataset, workdir)
