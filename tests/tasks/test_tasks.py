"""Tasks of one's own: networks of both Flax APIs, streamed data, weights, collections, sums."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runs import NumPyOptimizer, assert_close, assert_same_bits, compilations, small_config

from know_jax import forgetting, transfer, trees
from know_jax.data.base import Arrays, part_of
from know_jax.errors import UserError
from know_jax.io import checkpoints
from know_jax.models import adapters, build_model
from know_jax.runs import workdir as workdirs
from know_jax.runs.record import config_dict
from know_jax.tasks import TASKS, classification, load_task
from know_jax.tasks.base import AXIS, NetworkFields, Task, below
from know_jax.training import loop, steps
from know_jax.training.state import Checkpoint, Recipe, create_state, from_tree, to_tree
from know_jax.training.steps import Data

RNG = np.random.default_rng(0)
SIZE, BATCH = 48, 16
TOKENS = RNG.normal(size=(SIZE, 5, 3)).astype(np.float32)
TARGETS = RNG.normal(size=(SIZE, 5)).astype(np.float32)
# Between none and all of the tokens of an example count.
WEIGHTS = (np.arange(5) < RNG.integers(0, 6, SIZE)[:, None]).astype(np.float32)
ARRAYS = {'x': TOKENS, 'y': TARGETS, 'weight': WEIGHTS}
EVERYTHING = np.arange(SIZE, dtype=np.int32)
RECIPE = Recipe('sgd')


class Streamed:
  """A source that is in no memory: it counts what is read of it."""

  def __init__(self, arrays):
    self._arrays, self.reads = arrays, []
    self.size, self.strata = len(arrays['x']), None

  def batch(self, indices):
    self.reads.append(len(indices))
    return {name: array[indices] for name, array in self._arrays.items()}


class Linear(nn.Module):
  """A product, and what networks have beside: dropout, counts, and statistics in the head."""

  rate: float = 0.0

  @nn.compact
  def __call__(self, x, deterministic):
    counts = self.variable('counters', 'calls', lambda: jnp.zeros((), jnp.int32))
    if not deterministic:
      counts.value += 1
    x = nn.Dropout(self.rate, deterministic=deterministic)(x)
    mean = self.variable('head_stats', 'mean', lambda: jnp.zeros(1))
    y = nn.Dense(1, name='head')(x)
    if not deterministic:
      mean.value = 0.5 * mean.value + 0.5 * y.mean()
    return y[..., 0]


def squares(outputs, batch):
  return (outputs - batch['y']) ** 2, batch['weight']


def sums(outputs, batch, mask):
  values, weights = squares(outputs, batch)
  weights = weights * mask[:, None]
  worst = jnp.zeros(3).at[jnp.argmax(batch['y'][:, :3], 1)].add(mask)
  return {'loss': (values * weights).sum(), 'tokens': weights.sum(), 'table': worst}


def metrics(sums):
  return {
    'loss': float(sums['loss'] / sums['tokens']),
    'spread': float(sums['table'].max() / sums['table'].sum()),
  }


def task_of(module=None, source=None, **fields):
  source = Arrays(ARRAYS) if source is None else source
  model = adapters.linen(module or Linear(), inputs=('x',))
  functions = {'loss': squares, 'sums': sums, 'metrics': metrics, 'score': 'spread'}
  return Task(model, source, source, **{**functions, **fields})


def fit(task, start=None, *, variables=None, key=0, epochs=2, data=None, **options):
  variables = jax.device_get(task.init(jax.random.key(0))) if variables is None else variables
  return loop.fit(
    task, start or Checkpoint(create_state(variables, RECIPE)),
    Data(task.train, task.prepare) if data is None else data, EVERYTHING, recipe=RECIPE,
    epochs=epochs, batch_size=BATCH, lr=0.1, schedule='cosine', key=jax.random.key(key), **options,
  )  # fmt: skip


# -- losses with weights, sums that are no means ------------------------------------------------


def test_weights_make_the_loss_a_mean_over_tokens():
  """Two epochs in NumPy, in float64: the mean is over the tokens of the whole batch."""
  seen, task = [], task_of()
  variables = jax.device_get(task.init(jax.random.key(0)))
  real = steps.Data.at

  def at(data, index):
    seen.append(index.ravel())
    return real(data, index)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(steps.Data, 'at', at)
    epochs = {}
    state = fit(task, variables=variables, on_epoch=epochs.__setitem__)
  assert len(seen) == 6 and len(set(map(tuple, seen))) == 6
  params = {k: np.float64(v) for k, v in trees.named_leaves(variables['params']).items()}
  optimizer, rows = NumPyOptimizer('sgd', 0.0), []
  for step, index in enumerate(seen):
    x, y, w = (np.float64(ARRAYS[name][index]) for name in ('x', 'y', 'weight'))
    error = (x @ params['head/kernel'])[..., 0] + params['head/bias'] - y
    rows.append(((w * error**2).sum(), w.sum()))
    slope = 2 * w * error / w.sum()
    grads = {
      'head/kernel': np.einsum('bt,btc->c', slope, x)[:, None], 'head/bias': slope.sum()[None],
    }  # fmt: skip
    params = optimizer.update(params, grads, 0.1 * (1 + np.cos(np.pi * step / 6)) / 2)
  assert_close(state.params, {'head': {k[5:]: v for k, v in params.items()}}, rtol=1e-4, atol=1e-6)
  for epoch in (1, 2):
    loss, tokens = np.sum(rows[3 * epoch - 3 : 3 * epoch], axis=0)
    assert epochs[epoch]['loss'] == pytest.approx(loss / tokens, rel=1e-5)


@pytest.mark.parametrize(('size', 'batch_size'), [(48, 512), (37, 2), (5, 512)])
def test_evaluation_adds_up_whatever_a_task_sums(size, batch_size):
  task = task_of()
  variables = jax.device_get(task.init(jax.random.key(1)))
  part = part_of(task.test, EVERYTHING[:size])
  found = loop.evaluate(task, variables, Data(part, task.prepare), batch_size=batch_size)
  x, y, w = (np.float64(ARRAYS[name][:size]) for name in ('x', 'y', 'weight'))
  head = {k: np.float64(v) for k, v in variables['params']['head'].items()}
  error = (x @ head['kernel'])[..., 0] + head['bias'] - y
  counts = np.bincount(y[:, :3].argmax(1), minlength=3)
  assert found['loss'] == pytest.approx((w * error**2).sum() / w.sum(), rel=1e-5)
  assert found['spread'] == pytest.approx(counts.max() / size)


def test_a_batch_in_which_nothing_counts_moves_nothing():
  source = Arrays({**ARRAYS, 'weight': np.zeros_like(WEIGHTS)})
  task = task_of(source=source, metrics=lambda sums: {'loss': 0.0, 'spread': 0.0})
  variables = jax.device_get(task.init(jax.random.key(0)))
  assert_same_bits(fit(task, variables=variables).params, variables['params'])


# -- data that are not in memory -------------------------------------------------------------------


def test_streamed_data_give_the_bits_of_data_in_memory():
  source, whole = Streamed(ARRAYS), task_of()
  task = task_of(source=source)
  state = fit(task)
  assert set(source.reads[1:]) == {BATCH} and len(source.reads) == 1 + 6  # One for the shapes.
  assert_same_bits(state, fit(whole))
  for size, batch_size in ((48, 2), (37, 3)):
    part = part_of(source, EVERYTHING[:size])
    found = loop.evaluate(task, state.variables, Data(part, task.prepare), batch_size=batch_size)
    part = part_of(whole.test, EVERYTHING[:size])
    expected = loop.evaluate(
      whole, state.variables, Data(part, task.prepare), batch_size=batch_size
    )
    assert found == expected


def test_a_batch_that_is_none_is_named():
  source = Streamed(ARRAYS)
  source.batch = lambda indices: {'x': TOKENS[:3]}
  with pytest.raises(UserError, match=r"array 'x' of a batch has shape \(3, 5, 3\); expected \[1,"):
    task_of(source=source).init(jax.random.key(0))
  source.batch = lambda indices: TOKENS
  with pytest.raises(UserError, match='expected a dict of arrays'):
    task_of(source=source).init(jax.random.key(0))


# -- keys and collections --------------------------------------------------------------------------


def test_dropout_gets_a_new_key_in_every_step_and_none_in_evaluation():
  task = task_of(Linear(rate=0.5))
  losses = [{}, {}, {}]
  for found, key in zip(losses, (0, 0, 1), strict=True):
    fit(task, key=key, on_epoch=lambda epoch, m, found=found: found.update({epoch: m['loss']}))
  assert losses[0] == losses[1] != losses[2]
  # One example again and again, and weights that stay: what is left to differ is dropout.
  same = Arrays({name: np.repeat(array[:1], SIZE, 0) for name, array in ARRAYS.items()})
  task, steps_seen = task_of(Linear(rate=0.5), same), []
  variables = jax.device_get(task.init(jax.random.key(0)))
  data = Data(task.train, task.prepare)
  step = steps.train_step(task, RECIPE)
  state = steps.replicate(create_state(variables, RECIPE))
  index = np.arange(BATCH, dtype=np.int32).reshape(8, -1)
  for _ in range(3):
    arrays, places = data.at(index)
    state, counted = step(state, arrays, data.prepare, places, np.float32(0), jax.random.key(0))
    steps_seen.append(float(counted['loss'][0]))
  assert len(set(steps_seen)) == 3
  scores = [loop.evaluate(task, variables, data) for _ in range(2)]
  assert scores[0] == scores[1]


def test_collections_survive_steps_saves_and_transfers(tmp_path):
  task, saved = task_of(Linear(rate=0.5)), []
  whole = fit(task, save=saved.append, save_every_seconds=-1.0)
  assert set(whole.collections) == {'counters', 'head_stats'}
  assert whole.collections['counters']['calls'] == 6
  assert whole.collections['head_stats']['mean'] != 0
  # Through a file, in the midst of an epoch, its sums included.
  middle = saved[3]
  assert int(middle.state.step) == 4 and middle.sums['table'].shape == (3,)
  checkpoints.save(tmp_path / 'resume', to_tree(middle))
  again = from_tree(middle.state, checkpoints.restore(tmp_path / 'resume'))
  epochs = [{}, {}]
  assert_same_bits(fit(task, again, on_epoch=epochs[0].__setitem__), whole)
  fit(task, middle, on_epoch=epochs[1].__setitem__)
  assert epochs[0] == epochs[1] and set(epochs[0]) == {2}
  # A transfer renews the head in every collection, and nothing else.
  fresh = jax.device_get(task.init(jax.random.key(9)))

  def head(path):
    return below('head')(path) or below('head_stats')(path)

  started = transfer.with_head(whole.variables, fresh, head)
  assert started['counters']['calls'] == 6
  assert started['head_stats']['mean'] == 0
  assert_same_bits(started['params'], fresh['params'])


class NNXNet(nnx.Module):
  def __init__(self, rngs):
    self.layers = nnx.List([nnx.Linear(64, 12, rngs=rngs)])
    self.norm = nnx.BatchNorm(12, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.head = nnx.Linear(12, 5, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.layers[0](x.reshape(len(x), -1))))
    return self.head(self.dropout(x))


class LinenNet(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.Dense(12, name='layer')(x.reshape(len(x), -1))
    x = nn.relu(nn.BatchNorm(not train, momentum=0.99, name='norm')(x))
    return nn.Dense(5, name='head')(x)


def nnx_network(num_classes):
  assert num_classes == 5
  return adapters.nnx(lambda rngs: NNXNet(rngs=rngs))


def test_an_nnx_network_is_the_module():
  model = adapters.nnx(lambda rngs: NNXNet(rngs=rngs))
  batch = {'image': RNG.normal(size=(8, 8, 8, 1)).astype(np.float32)}
  variables = model.init(jax.random.key(0), batch)
  assert set(trees.named_leaves(variables)) == {
    *(f'params/{layer}/{name}' for layer in ('layers/0', 'head') for name in ('kernel', 'bias')),
    'params/norm/scale', 'params/norm/bias', 'batch_stats/norm/mean', 'batch_stats/norm/var',
  }  # fmt: skip
  # In evaluation: the linen network of the same weights.
  flax = {
    'params': {**variables['params'], 'layer': variables['params']['layers']['0']},
    'batch_stats': variables['batch_stats'],
  }
  flax['params'].pop('layers')
  out, changed = model.apply(variables, batch, train=False, key=None)
  assert changed == {}
  np.testing.assert_allclose(
    out, LinenNet().apply(flax, batch['image'], train=False), rtol=1e-5, atol=1e-6
  )
  # In training the key decides dropout, and statistics move by what NumPy says.
  outs = [model.apply(variables, batch, train=True, key=jax.random.key(key)) for key in (0, 0, 1)]
  assert (outs[0][0] == outs[1][0]).all() and (outs[0][0] != outs[2][0]).any()
  hidden = batch['image'].reshape(8, -1) @ flax['params']['layer']['kernel']
  mean = 0.01 * np.float64(hidden + flax['params']['layer']['bias']).mean(0)
  np.testing.assert_allclose(outs[0][1]['batch_stats']['norm']['mean'], mean, rtol=1e-3, atol=1e-6)


@pytest.fixture(scope='module')
def nnx_run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('nnx')
  config = small_config(model=f'{__name__}:nnx_network', width=None, stages=2, epochs=1)
  return config, forgetting.run(config, workdir, show_progress=False), workdir


def test_a_network_of_the_users_is_named_in_a_config(nnx_run):
  config, record, workdir = nnx_run
  assert record['parameters'] == 64 * 12 + 12 + 2 * 12 + 12 * 5 + 5
  assert record['stages'][0]['test_accuracy'] > 0.3
  small = transfer.default_config()
  small.update(classes=(5, 6, 7, 8, 9), seeds=1, labels_per_class=10, batch_size=24, epochs=1)
  small.update(warmup_epochs=1, from_scratch=False)
  (row,) = transfer.run(small, workdir)
  assert row['predictor'] == 'persistence' and 0 < row['accuracy'] < 1
  # Transfer renews the head, by its name.
  config = config_dict(small)
  task = load_task(config, {**config_dict(nnx_run[0])})
  newest = workdirs.restore_stage(workdir, 0)
  started = transfer.with_head(newest, jax.device_get(task.init(jax.random.key(0))), task.head)
  same = {
    path: (np.asarray(leaf) == trees.named_leaves(newest)[path]).all()
    for path, leaf in trees.named_leaves(started).items()
  }
  assert {path for path, equal in same.items() if not equal} == {
    'params/head/kernel', 'params/head/bias',
  }  # fmt: skip


# -- tasks by name, and what is refused ------------------------------------------------------------


def own_task(config, network):
  """A task of the user's: nothing but data and a network."""
  assert network['width'] == 3
  return task_of()


def test_a_task_of_the_users_is_forgotten(tmp_path):
  config = small_config(
    task=f'{__name__}:own_task', width=3, train_examples=0, stratified=False, stages=2, rate=0.5
  )
  record = forgetting.run(config, tmp_path, show_progress=False)
  assert record['subset_sizes'] == [48, 24]
  assert record['stages'][0].keys() >= {'test_loss', 'test_spread'}
  with pytest.raises(UserError, match='stratified is True, but the task has no classes'):
    forgetting.run(small_config(task=f'{__name__}:own_task', width=3), tmp_path / 'other')


def no_task(config, network):
  return {}


@pytest.mark.parametrize('name', TASKS)
def test_every_task_of_the_package_has_a_loader(name):
  with pytest.raises((UserError, KeyError)):
    load_task({'task': name})


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: load_task({'task': 'clasification'}), "unknown task 'clasification'. Did you mean"),
    (lambda: load_task({'task': f'{__name__}:no_task'}), "gave <class 'dict'>; expected"),
    (lambda: task_of(loss=3), 'loss of a task is 3; expected a function'),
    (lambda: Arrays({'x': np.zeros(3), 'y': np.zeros(2)}), 'expected one number above 0'),
    (lambda: Arrays({}), 'expected one number above 0'),
    (lambda: adapters.linen(Linear), 'expected an instance of flax.linen.Module'),
    (lambda: adapters.nnx(3), 'expected a function of nnx.Rngs'),
    (
      lambda: dataclasses.replace(task_of(), model=adapters.linen(Linear(), ('z',))).init(
        jax.random.key(0)
      ),
      "the network takes 'z', which a batch lacks; it has weight, x, y",
    ),
    (
      lambda: transfer.check_fits(task_of(head=below('haed')), []),
      'of the leaves of the network none are in its head; expected some .*there are head',
    ),
  ],
)
def test_what_does_not_fit_is_named(make, message):
  with pytest.raises(UserError, match=message):
    make()


def test_tasks_that_differ_in_arrays_share_compilations():
  def fresh(seed):
    images = np.random.default_rng(seed).integers(0, 256, (SIZE, 8, 8, 1), np.uint8)
    labels = np.arange(SIZE, dtype=np.int32) % 5
    source = Arrays({'image': images, 'label': labels}, labels)
    return classification.task(LinenNet(), source, source)

  fit(fresh(0))
  with compilations() as found:
    fit(fresh(1))
  assert found == []


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ('convs=1, depth=3', r"model 'cnn' has no option 'depth'; its options: convs \(default"),
    ('convs=0', "convs of model 'cnn' is 0; expected a positive integer"),
    ('convs', "model_options is 'convs'; expected keyword arguments, as 'depths="),
    ('convs=len', "model_options is 'convs=len'; expected keyword"),
    ("dtype='f'", 'model_options has dtype; expected options of the network alone'),
  ],
)
def test_options_of_networks_that_do_not_fit(options, message):
  config = small_config(model='cnn', model_options=options)
  with pytest.raises(UserError, match=message):
    load_task(config_dict(config))


@pytest.mark.parametrize(
  ('model', 'options'),
  [
    ('cnn', {'convs': 1}),
    ('resnet_small', {'blocks': 1}),
    ('pvt_v2', {'depths': (1, 2, 1, 1), 'stem_stride': 2, 'linear': True, 'drop_path': 0.1}),
    ('deeplabv3plus', {'output_stride': 8, 'rates': (1, 2, 3), 'separable': False, 'width': 0.25}),
  ],
)
def test_a_config_sets_options_of_networks(model, options):
  text = ', '.join(f'{key}={value!r}' for key, value in options.items())
  config = NetworkFields(model=model, model_options=text)
  expected = build_model(model, num_classes=3, axis_name=AXIS, **options)
  assert classification.network_of(config, 3) == expected


def test_a_config_sets_how_convolutions_start():
  """He et al., 2015, truncated at two standard deviations, as Keras' he_normal."""
  config = small_config(model='cnn', width=32, image_size=(8, 8))
  usual = load_task(config_dict(config)).init(jax.random.key(0))
  config.conv_init = 'he_normal'
  task = load_task(config_dict(config))
  found = trees.named_leaves(task.init(jax.random.key(0)))
  kernels = 0
  for path, before in trees.named_leaves(usual).items():
    leaf = np.asarray(found[path])
    if leaf.ndim == 4:
      kernels += 1
      deviation = np.sqrt(2 / np.prod(leaf.shape[:3]))
      if leaf.size > 1000:
        assert leaf.std() == pytest.approx(deviation, rel=0.1)
      assert np.abs(leaf).max() < 2 * deviation / 0.8796 + 1e-6
      assert (leaf != before).any()
    else:
      np.testing.assert_array_equal(leaf, before)
  assert kernels > 1
  shapes = jax.eval_shape(lambda: task.init(jax.random.key(0)))
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, usual)
  # A transfer has the network of its source, fresh ones included.
  target = load_task(config_dict(small_config(model='cnn', width=32)), config_dict(config))
  assert target.conv_init == 'he_normal'
  config.conv_init = 'he'
  with pytest.raises(UserError, match="unknown conv_init 'he'"):
    load_task(config_dict(config))


def test_networks_of_the_users_take_options_too():
  options = {'width': 4, 'model_options': "kind='wide'"}
  config = NetworkFields(model=f'{__name__}:own_network', **options)
  assert classification.network_of(config, 5) == {'num_classes': 5, 'kind': 'wide', 'width': 4}


def own_network(**options):
  return options
