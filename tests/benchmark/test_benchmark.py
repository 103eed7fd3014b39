"""The benchmark in its short form: that it measures what it says. How fast things are is not."""

import dataclasses
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from processes import xla_flags

from know_jax import kinds
from know_jax.benchmark import (
  accelerator,
  histories,
  keras_rivals,
  memory,
  merging,
  networks,
  predicting,
  report,
  runner,
  start,
  streamed,
  timing,
  training_speed,
)
from know_jax.benchmark.settings import FULL, QUICK, Target
from know_jax.errors import UserError
from know_jax.io import formats
from know_jax.io.sealed import read_sealed
from know_jax.nowcast import api
from know_jax.predictors import known
from know_jax.predictors.parameters import load_known
from know_jax.trees import named_leaves

ROOT = Path(__file__).parents[2]
SMALL = Target('cnn', (8, 8, 1), {'width': 3, 'convs': 1})


@pytest.fixture(scope='module')
def quick(tmp_path_factory):
  """What the script prints and writes: stdout, stderr, the Markdown file, what the JSON holds."""
  folder = tmp_path_factory.mktemp('benchmark')
  path = folder / 'results' / 'speed.md'
  done = subprocess.run(
    [sys.executable, str(ROOT / 'bin' / 'benchmark.py'), '--quick', f'--output={path}'],
    capture_output=True,
    text=True,
    env={
      **os.environ,
      'XLA_FLAGS': xla_flags(devices=1),
      'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
    },
  )
  assert done.returncode == 0, done.stderr
  return done.stdout, done.stderr, path, read_sealed(path.with_suffix('.json'), 'benchmark')


def test_the_report_is_that_of_the_numbers(quick):
  out, err, path, found = quick
  assert list(found['sections']) == list(runner.SECTIONS)
  assert path.read_text() == report.markdown(found, 'speed')
  for picture in ('speed.png', 'speed_growth.png'):
    assert (path.parent / picture).read_bytes().startswith(b'\x89PNG')
    assert f']({picture})' in path.read_text()
  assert out == f'{report.goals_table(found)}\n\nreport: {path}\n'
  assert re.search(r'predict cnn: 100%.*run/s', err)
  assert re.search(r'memory: 100%', err)
  text = path.read_text()
  assert 'these numbers say nothing' in text
  for section in found['sections'].values():
    assert section['goals']
    for goal in section['goals']:
      assert f'| {goal["what"]} | {goal["expected"]} |' in text
    for rows in section['tables'].values():
      assert rows and f'| {" | ".join(rows[0])} |' in text
  machine = found['machine']
  assert machine['memory_bytes'] > 2**28 and machine['cores'] >= 1 and machine['devices'] == 1
  for name in ('processor', 'instructions', 'jax', 'backend', 'device'):
    assert machine[name] and machine[name] in text
  assert f'XLA_FLAGS={machine["set"]["XLA_FLAGS"]} python bin/benchmark.py`, in' in text
  alone = report.markdown({**found, 'only': ['linear', 'networks']}, 'speed')
  assert ' python bin/benchmark.py --only=linear,networks`, in' in alone
  if keras_rivals.absent():
    assert text.count('the package tensorflow is not installed') == 2


def quartiles(values):
  low, median, high = np.percentile(values, [25, 50, 75])
  return {'median': pytest.approx(median), 'low': pytest.approx(low), 'high': pytest.approx(high)}


def test_rates_and_ratios_are_those_of_its_own_times(quick):
  *_, found = quick
  (network,) = found['sections']['predict']['networks']
  times = {name: np.array(seconds) for name, seconds in network['seconds'].items()}
  assert {'known', 'known_leaf', 'plain vmap', 'large product'} <= set(times)
  for name, seconds in times.items():
    assert len(seconds) == QUICK.predicted[0].repetitions and (seconds > 0).all()
    assert network['weights_a_second'][name] == quartiles(network['weights'] / seconds)
    if name != 'known':
      assert network['speedup'][name] == quartiles(seconds / times['known'])
  # The product takes as long as it would for the arithmetic of one weight, times their number.
  ratios = times['large product'] / times['known']
  assert network['speedup']['large product'] == quartiles(ratios)
  found_goals = {goal['what']: goal['found'] for goal in found['sections']['predict']['goals']}
  assert found_goals["`known` over a large product's rate, cnn"] == np.median(ratios)

  training = found['sections']['training']
  images = QUICK.train_steps * QUICK.batch_size
  ours = np.array(training['seconds']['know_jax'])
  (row,) = [row for row in training['tables'][''] if row[''] == 'know_jax']
  assert row['images a second'] == quartiles(images / ours)

  networks = found['sections']['networks']
  images = QUICK.networks[0].steps * QUICK.networks[0].batch
  rows = networks['tables']['']
  names = [row['network'] for row in rows if row[''] == 'know_jax']
  assert names == ['cnn', 'captions by cnn']
  for row in rows:
    own = networks['seconds'][row['network']]
    times, ours = np.array(own[row['']]), np.array(own['know_jax'])
    assert row['images a second'] == quartiles(images / times) and len(times) == 3
    if row[''] != 'know_jax':
      assert row['know_jax is faster by'] == quartiles(times / ours)
    # Compilation stands apart: it is in none of the times.
    assert own['compile'] >= 0

  linear = found['sections']['linear']
  rows = {row['']: row for row in linear['tables']['']}
  copied = np.array(linear['seconds']['copy'])
  assert set(rows) == {'copy', *predicting.LINEAR} and QUICK.linear == (2_000, len(copied))
  for name in predicting.LINEAR:
    seconds = np.array(linear['seconds'][name])
    # Five float32 stages are read and one is written.
    assert rows[name]['GB a second'] == quartiles(6 * 4 * 2_000 / 1e9 / seconds)
    assert rows[name]['share of the copy'] == quartiles(copied / seconds)

  leaves = found['sections']['leaves']
  for row in leaves['tables']['']:
    times = {which: np.array(s) for which, s in leaves['seconds'][row['']].items()}
    assert row['20 leaves, s'] == quartiles(times['many'])
    assert row['ratio'] == quartiles(times['many'] / times['one'])
  found_goals = {goal['what']: goal for goal in leaves['goals']}
  times = {which: np.array(s) for which, s in leaves['few_seconds']['task_vector'].items()}
  few = found_goals['time of `task_vector` for 3 leaves over that for one of the same weights']
  assert few['expected'] == 'at most 1.1'
  assert few['found'] == quartiles(times['many'] / times['one'])['median']
  (row,) = [row for row in leaves['tables']['From files'] if row[''] == 'known_leaf']
  assert row['seconds'] == quartiles(leaves['file_seconds']['known_leaf'])

  memory = found['sections']['memory']['entries']
  cases = [(e['predictor'], e['dtype'], e['steps'], e['weights']) for e in memory]
  sizes = [('float32', 2_000), ('float32', 20_000), ('bfloat16', 2_000), ('bfloat16', 4_000)]
  names = ('known', 'known_leaf', 'task_vector')
  assert cases == [(name, dtype, 1, size) for name in names for dtype, size in sizes]
  for entry in memory:
    item = {'float32': 4, 'bfloat16': 2}[entry['dtype']]
    assert entry['outputs'] == item * entry['weights'] == entry['inputs'] / 5
    assert entry['extra'] == quartiles(entry['later_extra'])
    # A program of another kind is there before.
    assert entry['start']['programs'] >= 1
    assert entry['seconds_a_weight'] == quartiles(
      np.array(entry['later_seconds']) / entry['weights']
    )


def test_what_is_compared_computes_the_same(quick):
  *_, found = quick
  (network,) = found['sections']['predict']['networks']
  keras = set() if keras_rivals.absent() else {'Keras'}
  assert set(network['difference']) == {'known'} | keras
  assert max(network['difference'].values()) < 1e-6


def test_a_network_of_other_shapes_compiles_nothing(quick):
  *_, found = quick
  for entry in found['sections']['compile']['entries']:
    assert entry['other']['programs'] == 0
    assert entry['first']['programs'] >= 1
    later = np.median(entry['later_seconds'])
    assert entry['compile_seconds'] == pytest.approx(entry['first']['seconds'] - later)


# --- the rivals -----------------------------------------------------------------------------------


def module(params, windows):
  return jax.vmap(lambda w: known.KNOWN().apply({'params': params}, w))(windows)


def windows_of(count=300):
  return np.random.default_rng(1).normal(0, 0.5, (count, 5)).astype(np.float32)


def test_all_rivals_predict_what_know_jax_does():
  history, theta = histories.of_network(SMALL), references.random_theta()
  expected = named_leaves(api.predict(history, predictor='known', theta=theta))
  newest = named_leaves(history[-1])
  assert min(np.abs(leaf - newest[path]).max() for path, leaf in expected.items()) > 0.01
  for chunk in (1000, 10**6):
    found = predicting.plain_vmap(theta, chunk)(history)
    assert {path: leaf.shape for path, leaf in found.items()} == {
      path: leaf.shape for path, leaf in expected.items()
    }
    assert 0 < predicting.largest_difference(found, expected) < 1e-5


def test_a_difference_is_seen():
  expected = {'a': np.zeros((2, 3)), 'b': np.ones(2)}
  found = {'a': np.zeros((2, 3)), 'b': np.array([1.0, 1.25])}
  assert predicting.largest_difference(found, expected) == 0.25
  assert predicting.check_equal('NumPy', 0.25, 0.5) == 0.25
  for difference in (0.75, np.nan):
    with pytest.raises(ArithmeticError, match='NumPy differs by'):
      predicting.check_equal('NumPy', difference, 0.5)


def test_the_operations_are_those_of_the_fused_form():
  params, columns = references.random_theta()['fc'], 7
  jaxpr = jax.make_jaxpr(known.residuals)(params, jnp.zeros((5, columns)))
  flops = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      ((contracted,), _), _ = equation.params['dimension_numbers']
      left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
      if out[-1] == columns:  # The other products are of kernels alone.
        flops += 2 * np.prod(out) * left[contracted]
  assert flops / columns == predicting.FLOPS


def test_keras_computes_what_the_module_does():
  pytest.importorskip('tensorflow')
  theta, windows = references.random_theta(), windows_of()
  model = keras_rivals.known_model(theta['conv'])
  assert model.count_params() == 9425
  found = model.predict(windows, batch_size=64, verbose=0)[:, 0]
  np.testing.assert_allclose(found, module(theta['conv'], windows), rtol=0, atol=1e-5)
  history = histories.of_network(SMALL)
  keras = keras_rivals.KerasKNOWN(theta, windows, (32, 128))
  assert keras.batch_size in (32, 128)
  found, expected = keras(history), predicting.plain_vmap(theta, 100)(history)
  assert predicting.largest_difference(found, expected) < 1e-5


SMALLER = {
  'cnn': Target('cnn', (12, 9, 1), {'width': 4, 'convs': 3}),
  'resnet_small': Target('resnet_small', (17, 12, 3), {'width': 4, 'blocks': 2}),
  # Block 4 and those from 14 on keep their strides or are dilated; rates reach beyond the map.
  'deeplabv3plus': Target(
    'deeplabv3plus', (33, 48, 3),
    {'width': 0.25, 'channels': 8, 'output_stride': 8, 'rates': (1, 2, 3), 'dropout': 0.0},
  ),
  'captions': Target('resnet_small', (16, 16, 3), {'width': 4}, captions=True),
  'pvt_v2': Target(
    'pvt_v2', (32, 32, 3), {'embed_dims': (8, 16, 40, 64), 'depths': (1, 2, 1, 1)}
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', SMALLER)
def test_pytorch_trains_the_same_networks(name):
  """Losses of a few steps on one batch: the function, its gradient, and what Adam makes of it."""
  pytest.importorskip('torch')
  if name == 'pvt_v2':
    pytest.importorskip('timm')
  # Units so near a kink of ReLU6 that rounding decides their gradient part DeepLab's later steps;
  # in float64 five steps agree within 1e-7.
  target, count, steps = SMALLER[name], 8, 2 if name == 'deeplabv3plus' else 4
  task = networks.make_task(target, count, **({'dropout': 0.0} if target.captions else {}))
  # With an epsilon so large, gradients that are but rounding move nothing, whatever their sign.
  variables, optimiser = task.init(jax.random.key(0)), optax.adam(1e-2, eps=1e-3)
  options = {'batch_size': count, 'lr': 1e-2, 'epsilon': 1e-3, 'shuffle': False}
  contestants = networks.rivals(task, variables, target.image, **options)
  assert list(contestants) == ['PyTorch', 'PyTorch, channels last']
  batch = task.prepared(np.arange(count, dtype=np.int32))

  def loss(params, rest):
    outputs, changed = task.model.apply(
      {**rest, 'params': params}, batch, train=True, key=jax.random.key(0)
    )
    values, weights = task.loss(outputs, batch)
    weights = jnp.ones(values.shape) if weights is None else weights
    return (values * weights).sum() / weights.sum(), {**rest, **changed}

  @jax.jit
  def step(params, rest, state):
    (value, rest), gradient = jax.value_and_grad(loss, has_aux=True)(params, rest)
    updates, state = optimiser.update(gradient, state)
    return optax.apply_updates(params, updates), rest, state, value

  rest = {name: value for name, value in variables.items() if name != 'params'}
  params, ours = variables['params'], []
  state = optimiser.init(params)
  for _ in range(steps):
    params, rest, state, value = step(params, rest, state)
    ours.append(float(value))
  assert ours[0] - ours[-1] > 1e-3
  for epoch in contestants.values():
    np.testing.assert_allclose([epoch() for _ in range(steps)], ours, rtol=1e-3)


def test_without_pytorch_only_know_jax_is_timed(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  task = networks.make_task(SMALL, 8)
  assert networks.absent() == 'PyTorch is not compared with: it is not installed.'
  assert networks.rivals(task, {}, SMALL.image) == {}


# --- histories, times, memory ---------------------------------------------------------------------


@pytest.mark.parametrize('weights', [100, 101, 12_345, 100_000])
def test_a_history_has_as_many_weights_as_asked_for(weights):
  history = histories.of_size(weights)
  assert histories.num_predicted(history) == (weights, 4)
  assert set(histories.by_kind(history)) == {'conv', 'fc', 'bias'}
  assert len(history) == 5
  kernels = [stage['dense']['kernel'] for stage in history]
  assert all((a != b).mean() > 0.9 for a, b in itertools.pairwise(kernels))


def test_what_is_profiled_is_the_network():
  params = load_known()['conv']
  block = 0.1 * np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
  module = jax.vmap(lambda window: known.KNOWN().apply({'params': params}, window))
  found = known.fused_residuals(known.fuse(params), block)
  np.testing.assert_allclose(found, module(block.T), rtol=1e-4, atol=1e-6)


def test_a_history_may_have_many_equal_leaves():
  history = histories.of_kernels(20, 100, 1)
  assert histories.num_predicted(history) == (2_000, 20)
  assert set(histories.by_kind(history)) == {'fc'}


def test_normalisation_is_not_counted():
  history = histories.of_network(Target('cnn_bn', (8, 8, 1), {'width': 2, 'convs': 1}))
  assert histories.num_predicted(history)[0] == 9 * 2 + (32 * 16 + 16) + (16 * 10 + 10)


def test_contestants_run_in_turn_and_are_called_once_before():
  calls = []
  times = timing.race({name: lambda n=name: calls.append(n) for name in 'abc'}, 3, '', show=False)
  assert ''.join(calls) == 'cab' + 'abc' + 'bca' + 'cab'
  assert {name: len(seconds) for name, seconds in times.items()} == {'a': 3, 'b': 3, 'c': 3}


def test_ratios_are_taken_within_rounds():
  times = {'ours': [1.0, 2.0, 4.0], 'theirs': [3.0, 4.0, 4.0]}
  assert timing.speedups(times, 'ours') == {'theirs': {'median': 2.0, 'low': 1.5, 'high': 2.5}}
  assert timing.rates({'ours': [1.0, 2.0, 4.0]}, 8)['ours'] == {
    'median': 4.0, 'low': 3.0, 'high': 6.0
  }  # fmt: skip


def test_memory_beyond_inputs_and_outputs_is_seen():
  def call(history):
    temporary = np.ones(2**24, np.float32)
    return [leaf + temporary[0] for leaf in history]

  found = memory.watched(call, [np.zeros(2**23, np.float32)])
  assert found['outputs'] == 2**25
  # The temporary array, and next to nothing of the outputs' 32 MiB.
  assert 60 * 2**20 < found['extra'] < 80 * 2**20


def test_files_are_predicted_by_the_script(quick):
  *_, path, found = quick
  section = found['sections']['streaming']
  assert (section['weights'], section['leaves']) == (25_000, 3)
  # Python with JAX takes more than nothing; all that it took is less than is allowed.
  peaks = {name: call['peak'] for name, call in section['calls'].items()}
  assert set(peaks) == set(streamed.PREDICTORS) and min(peaks.values()) > 2**26
  rows = {row['']: row for row in section['tables']['']}
  for name, call in section['calls'].items():
    over = (call['seconds'] - section['start_seconds']) / call['copy_seconds']
    assert rows[name]['over the copy, start-up apart'] == pytest.approx(over)
  goal = section['goals'][0]
  assert goal['found'] == max(peaks.values()) / 2**20 and goal['met']
  assert '25,000 weights in 3 leaves, bfloat16' in path.read_text()


def test_programs_are_started(quick):
  *_, found = quick
  section = found['sections']['start']
  rows = {row['']: row for row in section['tables']['']}
  assert set(rows) == set(start.CALLS)
  for name in start.LIMITS:
    ratios = np.divide(section['seconds'][name], section['seconds'][start.LIBRARIES])
    assert rows[name][f'over `{start.LIBRARIES}`'] == quartiles(ratios)
  for row in section['tables']['First prediction']:
    first, *later = section['cpu_seconds'][row['']]
    assert row['compiled before, CPU s'] == quartiles(later)
    assert row['compiled in it, CPU s'] == first and min(first, *later) > 0


RIVAL = """#!{python}
import json, pathlib, sys
if sys.argv[1] == '--help':
  sys.exit()
import jax.numpy as jnp
from safetensors.flax import load_file, save_file
config, target = json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2])
assert config['merge_method'] == 'task_arithmetic' and config['dtype'] == 'bfloat16'
(of_model,) = config['models']
base, other = pathlib.Path(config['base_model']), pathlib.Path(of_model['model'])
assert json.loads((base / 'config.json').read_text())['architectures'] == ['LlamaForCausalLM']
weight = {factor} * of_model['parameters']['weight']
target.mkdir()
for path in base.glob('*.safetensors'):
  old, new = load_file(path), load_file(other / path.name)
  merged = {{name: x + weight * (new[name] - x).astype(jnp.float32) for name, x in old.items()}}
  save_file({{name: x.astype('bfloat16') for name, x in merged.items()}}, target / path.name)
"""


@pytest.mark.parametrize('factor', [1, 1.5])
def test_a_rival_that_merges_the_same_is_timed_and_another_is_refused(
  tmp_path, monkeypatch, factor
):
  program = tmp_path / merging.PROGRAM
  program.write_text(RIVAL.format(python=sys.executable, factor=factor))
  program.chmod(0o700)
  monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
  if factor != 1:
    with pytest.raises(ArithmeticError, match='mergekit differs by'):
      merging.measure(QUICK, show=False)
    return
  section = merging.measure(QUICK, show=False)
  (merged,) = section['merged']
  assert merged['weights'] == QUICK.merged[0].weights == 2 * 50 * 16 + 13 * 16**2 + 3 * 16
  rows = {row['']: row for row in section['tables']['']}
  assert list(rows) == ['copy', 'know_jax', 'mergekit']
  ours, theirs = (np.array(merged['seconds'][name]) for name in ('know_jax', 'mergekit'))
  assert rows['mergekit']['know_jax is faster by'] == quartiles(theirs / ours)
  start = merged['start_seconds']
  apart = [np.median(merged['seconds'][name]) - start[name] for name in ('mergekit', 'know_jax')]
  assert rows['mergekit']['the same, start-up apart'] == pytest.approx(apart[0] / apart[1])
  assert 'mergekit is version unknown' in section['note']
  assert min(merged['peak'].values()) > 2**26
  over, memory, faster = section['goals']
  copied = np.median(merged['seconds']['copy'])
  expected = (np.median(ours) - merged['start_seconds']['know_jax']) / copied
  assert over['found'] == pytest.approx(expected)
  assert memory['found'] == merged['peak']['know_jax'] / 2**20
  assert faster['found'] == np.median(theirs / ours)


def test_without_the_rival_merging_is_timed_beside_a_copy(quick):
  *_, found = quick
  section = found['sections']['merging']
  if shutil.which(merging.PROGRAM) is None:
    assert 'there is no mergekit-yaml on the PATH' in section['note']
    assert [goal['met'] for goal in section['goals']][2:] == [None]


def test_a_copy_reads_all_stages_and_writes_one(tmp_path):
  streamed.write_history(tmp_path, 2_500, 1_000, show=False)
  stages = [tmp_path / str(stage) for stage in range(5)]
  assert streamed.copy_seconds(stages, tmp_path / 'copy') > 0
  copies = sorted((tmp_path / 'copy').iterdir())
  assert [path.name for path in copies] == [p.name for p in sorted(stages[4].glob('*.safetensors'))]
  assert all(path.read_bytes() == (stages[4] / path.name).read_bytes() for path in copies)


def test_what_is_streamed_is_a_random_walk_in_shards(tmp_path):
  assert streamed.write_history(tmp_path, 2_500, 1_000, show=False) == 3
  stages = [formats.open_weights(tmp_path / str(stage)) for stage in range(5)]
  for stage in stages:
    assert [leaf.size for leaf in stage.leaves.values()] == [1_000, 1_000, 500]
  assert set(kinds.find_kinds(stages[0].leaves).of.values()) == {'fc'}
  values = []
  for stage in stages:
    with stage.leaves['dense1/kernel'].open(tmp_path) as reader:
      values.append(reader.read(0, 1_000).astype(np.float64))
  assert np.std(values[0]) == pytest.approx(0.05, rel=0.1)
  assert np.std(np.diff(values, axis=0), axis=1) == pytest.approx(0.005, rel=0.1)


def test_a_call_is_watched(tmp_path):
  program = 'import time; data = b"1" * 2**27; time.sleep(0.3); print("done")'
  found = streamed.call([sys.executable, '-c', program], tmp_path / 'log')
  assert found['peak'] > 2**27 and 0.3 < found['seconds'] < 50
  assert (tmp_path / 'log').read_text() == 'done\n'
  with pytest.raises(RuntimeError, match=r'exit code 3:(.|\n)*no such weights'):
    streamed.call(
      [sys.executable, '-c', 'print("no such weights", flush=True); raise SystemExit(3)'],
      tmp_path / 'log',
    )


def test_without_room_files_are_unmeasured(monkeypatch):
  monkeypatch.setattr(streamed.shutil, 'disk_usage', lambda _: shutil._ntuple_diskusage(0, 0, 10))
  section = streamed.measure(QUICK, show=False)
  # Five stages, two predictions and a copy.
  assert re.fullmatch(r'.* has 10 bytes free; expected 400,000\.', section['unmeasured'])
  assert [goal['met'] for goal in section['goals']] == [None]
  section = merging.measure(QUICK, show=False)
  assert re.fullmatch(r'.* has 10 bytes free; expected 49,760, and .*', section['unmeasured'])
  assert [goal['met'] for goal in section['goals']] == [None]


def test_growth_is_the_power_of_the_size():
  def entry(weights, steps, seconds):
    spread = dict.fromkeys(('median', 'low', 'high'), seconds / weights)
    about = {'predictor': 'p', 'dtype': 'float32', 'steps': steps}
    return {**about, 'weights': weights, 'seconds_a_weight': spread}

  # The smallest costs what a call costs, and is left out.
  linear = [entry(10**i, 1, max(10.0**i, 5e5)) for i in range(5, 10)]
  square = [entry(10**i, 3, 1e-3 * 100.0**i) for i in range(5, 10)]
  small = [entry(10**i, 2, 100.0**i) for i in range(3, 7)]
  found = memory.growth([*linear, *square, *small])
  assert found == {
    'p, float32, 1 step': pytest.approx(1.0),
    'p, float32, 3 steps': pytest.approx(2.0),
    'p, float32, 2 steps': pytest.approx(2.0),
  }


def test_the_cost_of_every_predictor_is_measured_at_every_size(quick):
  *_, found = quick
  section = found['sections']['growth']
  sizes = {}
  for entry in section['entries']:
    sizes.setdefault(entry['predictor'], []).append((entry['about'], entry['weights']))
  assert set(sizes) == set(api.PREDICTORS)
  # Matrices that are decomposed have 16 x 16 weights.
  by_size = [(size, size) for size in QUICK.growth]
  of_tsv = [(2_000, 8 * 256), (20_000, 79 * 256)]
  assert sizes == {name: of_tsv if name == 'tsv' else by_size for name in sizes}
  for row in section['tables']['']:
    (small, large) = (e for e in section['entries'] if e['predictor'] == row[''])
    cost = [entry['seconds_a_weight']['median'] for entry in (small, large)]
    assert [row[f'{size:,} weights, ns a weight'] for size in QUICK.growth] == [
      pytest.approx(1e9 * seconds) for seconds in cost
    ]
    grown = np.log(cost[1] * large['weights'] / (cost[0] * small['weights']))
    expected = grown / np.log(large['weights'] / small['weights'])
    assert row['power'] == pytest.approx(expected, abs=1e-9)
    goal = f'power of the size that cost grows with, every predictor: `{row[""]}, bfloat16, 1 step`'
    assert [g['found'] for g in section['goals'] if g['what'] == goal] == [row['power']]


# --- goals, GPU, mistakes -------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('found', 'bound', 'expected', 'met'),
  [
    (0.9, {'least': 1}, 'at least 1', False),
    (1.0, {'least': 1}, 'at least 1', True),
    (None, {'least': 1}, 'at least 1', None),
    (0.0, {'most': 0}, 'at most 0', True),
    (2.1, {'most': 2}, 'at most 2', False),
  ],
)
def test_goals_say_what_is_expected_and_whether_it_is_met(found, bound, expected, met):
  goal = timing.goal('speed', found, **bound)
  assert goal == {'what': 'speed', 'expected': expected, 'found': found, 'met': met}


def test_without_a_gpu_its_part_is_unmeasured():
  section = accelerator.measure(dataclasses.replace(QUICK, gpu_anywhere=False), show=False)
  assert section['unmeasured'] == 'JAX runs on cpu, not on a GPU.'
  assert [goal['met'] for goal in section['goals']] == [None] * 3
  text = report.goals_table({'sections': {'gpu': section}})
  assert text.count('unmeasured') == 3
  assert not FULL.gpu_anywhere


def test_the_part_for_gpus_runs(quick):
  *_, path, found = quick
  section = found['sections']['gpu']
  assert section['note'] == 'JAX ran on cpu.'
  for part, weights, leaves in (('network', 718, 6), ('large', 20_000, 2)):
    assert (section[part]['weights'], section[part]['leaves']) == (weights, leaves)
    assert set(section[part]['seconds']) == {'known', 'known_leaf'}
    for name, seconds in section[part]['seconds'].items():
      (row,) = [row for row in section['tables'][section[part]['title']] if row[''] == name]
      assert row['seconds'] == quartiles(seconds)
      assert row['weights a second'] == quartiles(weights / np.array(seconds))
  seconds = np.array(section['epoch']['seconds']['fit'])
  assert len(seconds) == QUICK.gpu_repetitions
  (row,) = section['tables'][section['epoch']['title']]
  assert row['images a second'] == quartiles(QUICK.gpu_images / seconds)
  assert len(section['goals']) == 5
  text = path.read_text()
  assert '20,000 weights in 2 leaves, bfloat16' in text and 'in bfloat16, 64 images' in text


def test_noise_is_what_networks_are_trained_on():
  images, labels = training_speed.random_images(7, (4, 5, 3))
  assert images.shape == (7, 4, 5, 3) and images.dtype == np.uint8
  assert labels.shape == (7,) and set(labels) <= set(range(training_speed.CLASSES))


def test_mistakes_are_found_before_anything_is_measured(monkeypatch, tmp_path):
  with pytest.raises(UserError, match=r"unknown section 'memry'\. Did you mean 'memory'"):
    runner.run(tmp_path / 'a.md', only=['memry'])
  with pytest.raises(UserError, match=r"'.*a\.txt'; expected a Markdown file"):
    runner.run(tmp_path / 'a.txt')
  real = os.access
  monkeypatch.setattr(os, 'access', lambda path, mode: path[:5] != '/proc' and real(path, mode))
  others = 'predict,linear,leaves,growth,start,training,networks,gpu'
  with pytest.raises(UserError, match=rf"section 'compile' reads .* or --only={others}\."):
    runner.run(tmp_path / 'a.md')
  monkeypatch.undo()
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='cannot write in'):
    runner.run(tmp_path / 'file' / 'a.md')
  assert [path.name for path in tmp_path.iterdir()] == ['file']
