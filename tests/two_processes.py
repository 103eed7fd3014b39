"""One of two processes of two devices each: what test_distributed.py has both of them do.

Run by `python two_processes.py FOLDER SCRIPT FLAGS`: first it is the script, which connects them.
"""

import json
import re
import runpy
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from runs import forget, sigterm_raises

import know_jax
from know_jax import trees
from know_jax.errors import UserError
from know_jax.io import checkpoints
from know_jax.nowcast import compiled
from know_jax.nowcast.plan import plan_of
from know_jax.system import processes
from know_jax.system.signals import Terminated
from know_jax.training import steps

FEW_STEPS = {
  'train_examples': 96,
  'stages': 2,
  'rate': 0.5,
  'epochs': 1,
  'optimizer': 'sgd',
  'lr': 0.05,
  'augmentation': {'rotation': 10.0, 'shift': 0.15, 'zoom': 0.3, 'flip': True},
}
"""Fields of `small_config`: six steps on all data, three on half of it."""

STOPPED_AFTER = 3
"""The step of the first stage in which process 1 gets SIGTERM."""

SPECS = {
  'conv': {'kernel': P(None, None, None, 'x'), 'bias': P('x')},
  'dense': {'kernel': P('x', None), 'bias': P()},
}


def make_history():
  """Five stages of a small network, NumPy arrays."""
  rng = np.random.default_rng(0)
  shapes = {
    'conv': {'kernel': (3, 3, 2, 8), 'bias': (8,)},
    'dense': {'kernel': (16, 6), 'bias': (6,)},
  }
  stages = [jax.tree.map(lambda s: rng.normal(0, 0.1, s), shapes, is_leaf=is_shape)]
  for _ in range(4):
    stages.append(jax.tree.map(lambda x: x * 1.02 + rng.normal(0, 0.002, x.shape), stages[-1]))
  return [jax.tree.map(np.float32, stage) for stage in stages]


def is_shape(node):
  return isinstance(node, tuple)


def spread(tree):
  """The tree over the devices of both processes."""
  mesh = jax.make_mesh((4,), ('x',), axis_types=(AxisType.Auto,))

  def put(leaf, spec):
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

  return jax.tree.map(put, tree, SPECS)


def agree_and_fail_together():
  me = jax.process_index()
  assert processes.from_first(lambda: {'process': me}) == {'process': 0}
  assert processes.in_all(lambda: me) == me

  def fail():
    if me:
      raise OSError('no such disk')

  with pytest.raises(OSError if me else UserError, match='no such disk') as caught:
    processes.in_all(fail)
  assert me or str(caught.value) == 'process 1: no such disk'
  processes.check_same({'lr': 0.5}, 'config')
  with pytest.raises(UserError, match=r'config: lr is 0\.1 in process 0 and 0\.2 in process 1'):
    processes.check_same({'lr': [0.1, 0.2][me]}, 'config')


def refuse_what_does_not_fit(folder):
  wrong = 'batch_size is 6; expected a positive multiple of the 4 devices of 2 processes'
  with pytest.raises(UserError, match=wrong):
    forget(folder / 'refused', batch_size=6)
  with pytest.raises(UserError, match=r'lr is 0\.1 in process 0 and 0\.2 in process 1'):
    forget(folder / 'refused', lr=[0.1, 0.2][jax.process_index()])
  # Each in a folder that only one of them has.
  with pytest.raises(UserError, match=r'expected a folder that all processes share'):
    forget(folder / f'apart{jax.process_index()}', **FEW_STEPS)


def predict_where_the_weights_are():
  history = make_history()
  arrays = [spread(stage) for stage in history]
  found = trees.named_leaves(know_jax.predict(arrays))
  expected = trees.named_leaves(know_jax.predict(history))
  newest = trees.named_leaves(arrays[-1])
  for path, leaf in found.items():
    assert leaf.sharding.is_equivalent_to(newest[path].sharding, leaf.ndim), path
    for shard in leaf.addressable_shards:
      part = np.asarray(expected[path])[shard.index]
      np.testing.assert_allclose(shard.data, part, rtol=1e-5, atol=1e-6, err_msg=path)
  plan = plan_of(arrays, 1, 'known_leaf', None, 0.5, None, 'keep', {})
  leaves = plan.history.leaves
  hlo = compiled.predict_leaves.lower(leaves, plan.theta, plan.job, (1,)).compile().as_text()
  assert 'num_partitions=4' in hlo
  assert re.search('all-reduce', hlo)  # Of moments; but of weights none leaves its device.
  assert not re.search('all-gather|all-to-all|collective-permute', hlo)
  # In a shard of process 1; both must know.
  history[2]['dense']['kernel'][15, 3] = np.nan
  with pytest.raises(UserError, match=r"'dense/kernel' has 1 of 96 values NaN .* at stage 2 of 5"):
    know_jax.predict([spread(stage) for stage in history])
  here = jax.local_devices()[1]
  mixed = [spread(stage) for stage in make_history()]
  for stage in mixed:
    stage['dense']['bias'] = jax.device_put(np.zeros(6, np.float32), here)
  with pytest.raises(UserError, match=r"'dense/bias' lies on .*, and 'conv/bias' on 4 devices"):
    know_jax.predict(mixed)


def save_and_restore(folder):
  """Leaves a checkpoint of weights that no process has all of."""
  newest, path = make_history()[-1], folder / 'spread'
  checkpoints.save(path, {**spread(newest), 'step': np.int64(7)}, metadata={'of': 'two'})
  with pytest.raises(UserError, match='exists; expected a new path, or overwrite=True'):
    checkpoints.save(path, newest)
  found = checkpoints.restore(path)
  for name, leaf in trees.named_leaves(newest).items():
    assert found[name.split('/')[0]][name.split('/')[1]].tobytes() == leaf.tobytes()
  with pytest.raises(UserError, match=r"of leaves: b is '.*' in process 0 and '.*' in"):
    checkpoints.save(folder / 'unlike', {'a': np.ones(2), 'b': np.full(2, jax.process_index())})


def stop_together(folder):
  """Process 1 gets SIGTERM in a step; both save after the same one, and leave the run."""
  real, count = steps.train_step, 0

  def train_step(task, recipe):
    def step_fn(*args):
      nonlocal count
      count += 1
      result = real(task, recipe)(*args)
      if count == STOPPED_AFTER and jax.process_index() == 1:
        signal.raise_signal(signal.SIGTERM)
      return result

    return step_fn

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(steps, 'train_step', train_step)
    with sigterm_raises(), pytest.raises(Terminated):
      forget(folder / 'stopped', **FEW_STEPS)
  (folder / f'steps{jax.process_index()}.json').write_text(json.dumps(count))


def main(folder):
  with pytest.raises(SystemExit) as ended:
    runpy.run_path(sys.argv[0], run_name='__main__')
  assert not ended.value.code
  assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)
  agree_and_fail_together()
  refuse_what_does_not_fit(folder)
  predict_where_the_weights_are()
  save_and_restore(folder)
  stop_together(folder)


if __name__ == '__main__':
  sys.argv = sys.argv[1:]
  main(Path(sys.argv.pop(0)))
