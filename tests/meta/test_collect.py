"""The meta-dataset: what is drawn, what is kept, and that nothing is made twice."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from know_jax import forgetting, kinds, trees
from know_jax.data.subsets import nested_subsets
from know_jax.errors import UserError
from know_jax.fields import config_dict, read_config
from know_jax.io import checkpoints
from know_jax.io.files import locked
from know_jax.meta import collect, mat
from know_jax.runs import workdir as workdirs
from know_jax.runs import workers
from know_jax.system import compiled

ROOT = Path(__file__).parents[2]


def tiny_config() -> ConfigDict:
  config = collect.default_config()
  config.runs = 2
  config.datasets = ('digits',)
  config.widths = {'cnn': (2,)}
  config.train_examples = (1400, 1400)
  config.pretrain_steps = (86, 86)
  config.epochs = (1, 1)
  config.rate = (0.6, 0.6)
  config.augmented = 0.0
  return config


@pytest.fixture(scope='module')
def collected(tmp_path_factory):
  output = tmp_path_factory.mktemp('meta')
  summary = collect.run(tiny_config(), output)
  return output, summary


def test_every_run_is_a_function_of_seed_and_number():
  first, again, other = (
    [config_dict(collect.run_config(config, n)) for n in range(20)]
    for config in (collect.Config(), collect.Config(runs=1000), collect.Config(seed=1))
  )
  assert first == again
  assert all(a != b for a, b in zip(first, other, strict=True))
  assert len({run['seed'] for run in first}) == 20


def test_one_range_does_not_move_the_draws_of_another():
  config = collect.Config()
  narrow = dataclasses.replace(config, lr=(1e-3, 1e-3))
  for number in range(10):
    a, b = (config_dict(collect.run_config(c, number)) for c in (config, narrow))
    assert a.pop('stage_lr') != b.pop('stage_lr') == 1e-3
    assert a == b


def test_draws_are_in_their_ranges_and_the_grid_is_balanced():
  config = collect.Config(families=('cnn', 'cnn_bn'), datasets=('digits', 'mnist', 'fashion_mnist'))
  pairs = []
  for number in range(120):
    run = collect.run_config(config, number)
    pairs.append((run.model, run.dataset))
    assert 0.3 <= run.rate <= 0.9
    assert 1e-3 <= run.lr <= 3e-3
    assert 1e-5 <= run.stage_lr <= 4e-3
    assert run.batch_size in (32, 64, 128)
    assert run.train_examples <= 8000 and run.train_examples >= 1400
    first, *others = (int(run.train_examples * run.rate**i) // run.batch_size for i in range(7))
    assert 1000 - first <= run.epochs * first <= 2000 + first
    assert run.stage_epochs == 1 or run.stage_epochs * sum(others) <= 3000 + sum(others)
    assert run.augmentation.rotation in (0.0, 10.0)
  assert {pairs.count(pair) for pair in set(pairs)} == {20}


@pytest.mark.parametrize('number', range(30))
def test_the_smallest_subset_always_fills_a_batch(number):
  run = collect.run_config(collect.Config(), number)
  labels = np.arange(run.train_examples) % 10
  key = jax.random.key(run.seed)
  subsets = nested_subsets(key, labels, rate=run.rate, phases=7, stratified=True)
  assert len(subsets[-1]) >= run.batch_size


def test_the_workdir_of_a_finished_run_is_removed_after_a_kill(collected, tmp_path):
  shutil.copytree(collected[0], tmp_path / 'meta')
  # Killed after the run's file was written; another worker, at the other run, is alive.
  workdirs = [tmp_path / 'meta' / 'running' / f'0000{number}' for number in (0, 1)]
  for workdir in workdirs:
    workdir.mkdir(parents=True)
  with locked(tmp_path / 'meta' / 'runs' / '00001.claim'):
    collect.run(tiny_config(), tmp_path / 'meta')
  assert [workdir.exists() for workdir in workdirs] == [False, True]


def test_a_run_is_kept_as_the_forgetting_run_made_it(collected, tmp_path):
  output, _ = collected
  run = next(collect.read_runs(output))
  settings = collect.run_config(read_config(collect.Config, tiny_config()), 0)
  record = forgetting.run(settings, tmp_path / 'direct', show_progress=False)
  trajectory, _ = workdirs.load_trajectory(tmp_path / 'direct')
  expected = trees.named_leaves(trajectory.weights)
  assert set(run.weights) == set(expected)
  for path, leaf in expected.items():
    np.testing.assert_array_equal(run.weights[path], leaf, err_msg=path)
    assert leaf.shape[0] == 7
  assert run.about['kinds'] == kinds.leaf_kinds(trajectory.newest)
  accuracies = [stage['test_accuracy'] for stage in run.about['stages']]
  assert accuracies == [stage['test_accuracy'] for stage in record['stages']]
  assert run.about['config'] == json.loads(json.dumps(config_dict(settings)))
  metrics = (tmp_path / 'direct' / 'metrics.jsonl').read_text()
  losses = [json.loads(line) for line in metrics.splitlines()]
  losses = [line['loss'] for line in losses if line['stage'] == 0]
  assert run.about['pretrain_loss'] == {
    'first': losses[0],
    'before': losses[0],
    'end': losses[1],
  }


def test_what_accuracy_is_measured_on_moves_no_weight(collected, tmp_path):
  config = tiny_config()
  config.runs, config.test_split = 1, 'train'
  collect.run(config, tmp_path)
  (run,) = collect.read_runs(tmp_path)
  expected = next(collect.read_runs(collected[0]))
  assert (run.about['config']['test_split'], expected.about['config']['test_split']) == (
    'train',
    'test',
  )
  for path, leaf in expected.weights.items():
    np.testing.assert_array_equal(run.weights[path], leaf, err_msg=path)
  accuracies = [[stage['test_accuracy'] for stage in r.about['stages']] for r in (run, expected)]
  assert accuracies[0] != accuracies[1]


@pytest.mark.parametrize(
  ('losses', 'flat'), [((2.0, 0.6, 0.5), True), ((2.0, 0.7, 0.5), False), ((1.0, 0.4, 0.5), True)]
)
def test_a_loss_has_flattened_if_little_of_its_fall_came_at_the_end(losses, flat):
  about = {'pretrain_loss': dict(zip(('first', 'before', 'end'), losses, strict=True))}
  assert collect.flattened(about) is flat


def test_summary_counts_runs_and_falls(collected):
  output, summary = collected
  assert '2 runs, 0 diverged' in summary
  assert 'cnn' in summary and 'digits' in summary
  falls = [
    after['test_accuracy'] < before['test_accuracy']
    for run in collect.read_runs(output)
    for before, after in zip(run.about['stages'][:-1], run.about['stages'][1:], strict=True)
  ]
  assert f'fell in {np.mean(falls):.0%} of stages' in summary
  fell = [
    run.about['stages'][-1]['test_accuracy'] < run.about['stages'][0]['test_accuracy']
    for run in collect.read_runs(output)
  ]
  assert f'lower at the last stage than at the first in {np.mean(fell):.0%} of runs' in summary


def test_a_second_call_makes_nothing_again(collected):
  output, summary = collected
  before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (output / 'runs').iterdir()}
  assert collect.run(tiny_config(), output) == summary
  assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (output / 'runs').iterdir()} == before
  assert not list((output / 'running').iterdir())


def test_a_lost_run_is_made_again_with_the_same_bits(collected, monkeypatch, tmp_path):
  output, _ = collected
  (tmp_path / 'most').write_text('100')
  monkeypatch.setattr(compiled, '_MOST_MAPS', tmp_path / 'most')
  paths = [output / 'runs' / f'00001.{suffix}' for suffix in ('json', 'safetensors')]
  weights = paths[1].read_bytes()
  for path in paths:
    path.unlink()
  collect.run(tiny_config(), output)
  # Programs that stayed would add up over hundreds of runs, until the process dies.
  assert not jax.devices()[0].client.live_executables()
  assert safetensors.numpy.load(paths[1].read_bytes()).keys()
  assert paths[1].read_bytes() == weights


def test_another_config_is_refused_and_the_fields_are_named(collected):
  output, _ = collected
  config = tiny_config()
  config.runs = 3
  with pytest.raises(UserError, match='runs'):
    collect.run(config, output)


def test_a_flipped_bit_is_noticed(collected, tmp_path):
  output, _ = collected
  folder = tmp_path / 'copy' / 'runs'
  folder.mkdir(parents=True)
  for path in (output / 'runs').iterdir():
    (folder / path.name).write_bytes(path.read_bytes())
  target = folder / '00001.safetensors'
  data = bytearray(target.read_bytes())
  data[len(data) // 2] ^= 1
  target.write_bytes(bytes(data))
  with pytest.raises(UserError, match=r'00001\.safetensors: sha256'):
    list(collect.read_runs(tmp_path / 'copy'))
  target.unlink()
  with pytest.raises(UserError, match=r'00001\.safetensors: cannot be read'):
    list(collect.read_runs(tmp_path / 'copy'))


def test_a_run_that_diverges_is_recorded_and_the_others_go_on(tmp_path):
  config = tiny_config()
  config.runs = 1
  config.pretrain_lr = (1e30, 1e30)
  summary = collect.run(config, tmp_path)
  assert '0 runs, 1 diverged' in summary
  run = next(collect.read_runs(tmp_path))
  assert run.weights is None and 'loss is' in run.about['diverged']


def test_dry_run_lists_and_writes_nothing(tmp_path):
  listing = collect.run(tiny_config(), tmp_path / 'none', dry_run=True)
  assert len(listing.splitlines()) == 3
  assert 'digits' in listing
  assert not (tmp_path / 'none').exists()


@pytest.mark.parametrize('flag', ['--dry_run', '--dry-run'])
def test_the_flag_may_be_written_either_way(tmp_path, flag):
  command = [
    sys.executable,
    str(ROOT / 'bin' / 'collect.py'),
    f'--output={tmp_path / "none"}',
    flag,
  ]
  listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
  assert len(listing.splitlines()) == 307 and 'mobilenetv2' in listing
  assert not (tmp_path / 'none').exists()


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('families', ('cnm',), "unknown model 'cnm'. Did you mean 'cnn'"),
    ('families', (), 'families is empty'),
    ('optimizers', ('adm',), "Did you mean 'adam"),
    ('rate', (0.9, 0.3), 'rate is'),
    ('stages', 1, 'stages 1'),
  ],
)
def test_bad_settings_are_named_before_anything_is_written(tmp_path, field, value, message):
  config = tiny_config()
  config[field] = value
  with pytest.raises(UserError, match=message.replace('.', r'\.').replace('(', r'\(')):
    collect.run(config, tmp_path / 'new')
  assert not (tmp_path / 'new').exists()


# -- kills and other workers -----------------------------------------------------------------------


class Crash(BaseException):
  """Ends a collection where it stands, without any save."""


def test_a_killed_collection_trains_nothing_twice(collected, tmp_path, monkeypatch):
  """A crash in the middle of the first run; what it kept is as if nothing had happened."""
  alone, _ = collected
  kept, real = [], checkpoints.save

  def save(path, tree, *, metadata, **options):
    if len(kept) == 3:
      raise Crash
    saved = real(path, tree, metadata=metadata, **options)
    if path.parent.name == 'stages':
      kept.append((path.parents[1].name, metadata['stage']))
    return saved

  monkeypatch.setattr(checkpoints, 'save', save)
  with pytest.raises(Crash):
    collect.run(tiny_config(), tmp_path)
  assert not list((tmp_path / 'runs').glob('*.json'))
  first = kept.copy()
  kept.clear()
  kept += [None] * 4  # Of these none is the third.
  assert '2 runs, 0 diverged' in collect.run(tiny_config(), tmp_path)
  assert first == [('00000', stage) for stage in range(3)]
  stages = [('00000', stage) for stage in range(3, 7)] + [('00001', stage) for stage in range(7)]
  assert kept[4:] == stages
  assert not list((tmp_path / 'running').iterdir())
  assert sorted(path.name for path in (tmp_path / 'runs').iterdir()) == [
    f'0000{number}.{suffix}' for number in (0, 1) for suffix in ('json', 'safetensors')
  ]
  for run, expected in zip(collect.read_runs(tmp_path), collect.read_runs(alone), strict=True):
    assert run.about.keys() == expected.about.keys()
    assert run.about['weights_sha256'] == expected.about['weights_sha256']


def test_a_run_that_another_worker_is_at_comes_round_again(tmp_path, monkeypatch):
  config, made = tiny_config(), []
  config.runs = 5

  def make(config, output, number):
    made.append(number)
    (output / 'runs' / f'{number:05d}.json').write_text('')
    if number == 4:
      held.close()  # The other worker dies; its run is still to be made.

  monkeypatch.setattr(collect, '_make', make)
  monkeypatch.setattr(collect, 'summary', lambda output: '')
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs' / '00001.json').write_text('')
  held = contextlib.ExitStack()
  held.enter_context(locked(tmp_path / 'runs' / '00002.claim'))
  collect.run(config, tmp_path)
  assert made == [0, 3, 4, 2]
  assert not list((tmp_path / 'runs').glob('.*'))


# -- what is refused -------------------------------------------------------------------------------


def test_a_reader_of_either_sort_reads_and_describes_a_collection(collected):
  output, summary = collected
  assert [run.number for run in mat.read_any(output)] == [0, 1]
  found = mat.describe(output, list(collect.read_runs(output)))
  assert found['config'] == config_dict(tiny_config())
  assert found['summary'] == summary.splitlines()
  assert found['environment']['devices'] == 8


def test_no_runs_is_an_error(tmp_path):
  with pytest.raises(UserError, match='no finished runs'):
    list(collect.read_runs(tmp_path))


def killed_once(config, output, number):
  """Makes a run; the worker that begins run 0 dies, once, after it has claimed nothing yet."""
  if number == 0 and not (output / 'killed').exists():
    (output / 'killed').touch()
    os.kill(os.getpid(), signal.SIGKILL)
  return collect._collect(config, output, number)


def test_what_a_dead_worker_was_at_is_made_by_another(collected, tmp_path):
  """Two workers of Dask, one killed: the files of one process alone, byte for byte."""
  pytest.importorskip('distributed', reason='the extra `workers` is not installed')
  (tmp_path / 'runs').mkdir()
  make = functools.partial(killed_once, read_config(collect.Config, tiny_config()), tmp_path)
  assert sorted(workers.each(make, range(2), workers=2)) == [0, 1]
  assert (tmp_path / 'killed').exists()
  for number in (0, 1):
    name = f'0000{number}.safetensors'
    assert (tmp_path / 'runs' / name).read_bytes() == (collected[0] / 'runs' / name).read_bytes()


def test_a_scheduler_that_is_not_there(monkeypatch, tmp_path):
  pytest.importorskip('distributed', reason='the extra `workers` is not installed')
  monkeypatch.setattr(workers, '_CONNECT_SECONDS', 1)
  with pytest.raises(UserError, match=r'scheduler .* does not answer'):
    collect.run(tiny_config(), tmp_path, scheduler='tcp://127.0.0.1:1')
  assert not list((tmp_path / 'runs').iterdir())


def test_two_workers_share_a_folder(tmp_path):
  """Two processes at once: every run once, by one of them, and both end well."""
  command = [sys.executable, str(ROOT / 'bin' / 'collect.py'), f'--output={tmp_path}/shared']
  config = tmp_path / 'tiny.py'
  config.write_text(
    'import sys\n'
    f'sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}\n'
    'from test_collect import tiny_config\n'
    'def get_config():\n'
    '  config = tiny_config()\n'
    '  config.runs = 3\n'
    '  return config\n'
  )
  command.append(f'--config={config}')
  workers = [
    subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(2)
  ]
  outputs = [worker.communicate(timeout=300) for worker in workers]
  assert [worker.returncode for worker in workers] == [0, 0], outputs
  assert all('3 runs, 0 diverged' in out for out, _ in outputs)
  assert [run.number for run in collect.read_runs(tmp_path / 'shared')] == [0, 1, 2]
