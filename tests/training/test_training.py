"""Training: eight devices do what one does, steps follow their formulas, nothing is lost."""

import dataclasses
import functools
import itertools
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import (
  NumPyOptimizer,
  assert_close,
  assert_same_bits,
  compilations,
  gradients,
  log_softmax,
  model_inputs,
  sigterm_raises,
  task_of,
)

from know_jax import trees
from know_jax.data.augmentation import Augmentation
from know_jax.data.sources import load_dataset
from know_jax.errors import UserError
from know_jax.fields import read_config
from know_jax.forgetting import Config, default_config, recipe_of
from know_jax.models import build_model
from know_jax.models.adapters import linen
from know_jax.system.signals import Terminated
from know_jax.tasks import classification
from know_jax.tasks.base import AXIS
from know_jax.training import loop, steps
from know_jax.training.state import (
  Checkpoint,
  DivergedError,
  Recipe,
  continued,
  create_state,
  learning_rates,
  optimizer,
)
from know_jax.training.steps import put_data

MODEL = build_model('cnn_bn', num_classes=5, width=2, convs=1, axis_name=AXIS)
BATCH = 24
SOME = np.arange(5, 85, dtype=np.int32)  # Three batches and a part of one.
AUGMENTED = Augmentation(rotation=10.0, shift=0.15, zoom=0.3, flip=True)
RECIPE = Recipe('sgd', weight_decay=1e-3)


@pytest.fixture(scope='module')
def digits():
  train = load_dataset('digits', 'train', classes=(0, 1, 2, 3, 4))
  return train.images[:96], train.labels[:96]


@pytest.fixture(scope='module')
def task(digits):
  return task_of(MODEL, *digits, augmentation=AUGMENTED)


@pytest.fixture(scope='module')
def plain(digits):
  """The same without augmentation."""
  return task_of(MODEL, *digits)


@pytest.fixture(scope='module')
def variables(task):
  return jax.device_get(task.init(jax.random.key(0)))


@functools.cache
def data_of(task, devices=8):
  """The training set, where the package has so many devices."""
  assert jax.local_device_count() == devices
  return put_data(task)[0]


@pytest.fixture
def one_device(monkeypatch):
  """Leaves the package one of the eight devices."""
  monkeypatch.setattr(jax, 'pmap', functools.partial(jax.pmap, devices=jax.devices()[:1]))
  monkeypatch.setattr(jax, 'local_device_count', lambda: 1)
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  for name in ('_train_step', '_eval_step', '_sharding'):
    monkeypatch.setattr(steps, name, functools.cache(getattr(steps, name).__wrapped__))


def fit(variables, task, *, recipe=RECIPE, indices=SOME, seed=1, start=None, **options):
  """`loop.fit` for two epochs of three steps; returns the state and the metrics of epochs."""
  metrics = {}
  state = loop.fit(
    task,
    start or Checkpoint(create_state(variables, recipe)),
    data_of(task, jax.local_device_count()),
    indices,
    **{
      'recipe': recipe,
      'epochs': 2,
      'batch_size': BATCH,
      'lr': 0.05,
      'schedule': 'cosine',
      'key': jax.random.key(seed),
      'on_epoch': metrics.__setitem__,
      **options,
    },
  )
  return state, metrics


# -- what a step computes ------------------------------------------------------------------------


@pytest.fixture(scope='module')
def on_eight(variables, task):
  return fit(variables, task)


def test_eight_devices_train_and_evaluate_as_one(variables, on_eight, task, request):
  everything = np.zeros((8, 3), np.int32)
  assert data_of(task).at(everything)[0]['label'].shape == (8, 96)
  scores = loop.evaluate(task, on_eight[0].variables, data_of(task))
  request.getfixturevalue('one_device')
  alone = data_of(task, 1)
  assert alone.at(everything[:1])[0]['label'].shape == (1, 96)
  state, metrics = fit(variables, task)
  # Six steps in float32, whose sums are taken in another order: some units in the last place of
  # the largest weights. A BatchNorm that saw its own device's three examples would be off by 1e-1.
  assert_close(state, on_eight[0], rtol=1e-4, atol=1e-6)
  for epoch in (1, 2):
    assert metrics[epoch] == pytest.approx(on_eight[1][epoch], rel=1e-5)
  assert loop.evaluate(task, state.variables, alone) == pytest.approx(scores, rel=1e-4)


@pytest.mark.parametrize(
  ('batch_size', 'parts'),
  [
    (1, (1,)),
    (31, (31,)),
    (32, (16, 16)),
    (50, (16, 16, 16, 2)),
    (127, (16,) * 7 + (15,)),
    (128, (16,) * 4 + (8,) * 8),
    (130, (16,) * 4 + (8,) * 8 + (2,)),
    (500, (64,) * 4 + (32,) * 7 + (20,)),
  ],
)
def test_the_parts_of_a_batch(monkeypatch, batch_size, parts):
  whole = (batch_size,)
  assert steps.microbatches(batch_size) == whole  # Eight devices have the processors.
  monkeypatch.setattr(jax, 'local_device_count', lambda: 1)
  monkeypatch.setattr(steps, 'processors', lambda: 2)
  assert steps.microbatches(batch_size) == parts
  monkeypatch.setattr(steps, 'processors', lambda: 1)
  assert steps.microbatches(batch_size) == whole
  monkeypatch.setattr(steps, 'processors', lambda: 2)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert steps.microbatches(batch_size) == whole


def test_the_parts_of_any_batch_are_all_of_it_and_not_many(monkeypatch):
  monkeypatch.setattr(jax, 'local_device_count', lambda: 1)
  monkeypatch.setattr(steps, 'processors', lambda: 2)
  for batch_size in range(1, 2000):
    *parts, last = steps.microbatches(batch_size)
    assert sum(parts) + last == batch_size
    assert len(parts) < 20
    assert all(size % 4 == 0 for size in parts)
    assert last > 0


@pytest.mark.parametrize(('name', 'parts'), [('cnn', [40, 24]), ('cnn_bn', [64])])
def test_the_parts_of_a_batch_give_the_steps_of_the_whole(
  monkeypatch, digits, one_device, name, parts
):
  model = build_model(name, num_classes=5, width=2, convs=1, axis_name=AXIS)
  seen = []

  def loss(logits, batch):
    seen.append(len(batch['label']))
    return classification.loss(logits, batch)

  task = dataclasses.replace(task_of(model, *digits, augmentation=AUGMENTED), loss=loss)
  variables = jax.device_get(task.init(jax.random.key(0)))

  def trained():
    seen.clear()
    metrics = {}
    state = loop.fit(
      task, Checkpoint(create_state(variables, RECIPE)), data_of(task, 1), SOME, recipe=RECIPE,
      epochs=3, batch_size=64, lr=0.05, schedule='cosine', key=jax.random.key(1),
      on_epoch=metrics.__setitem__,
    )  # fmt: skip
    return state, metrics

  monkeypatch.setattr(steps, 'microbatches', lambda batch_size, at_once: (40, 24))
  state, metrics = trained()
  assert seen == parts
  monkeypatch.setattr(steps, 'microbatches', lambda batch_size, at_once: (batch_size,))
  steps._train_step.cache_clear()
  whole, expected = trained()
  assert seen == [64]
  # Sums in float32, taken in another order.
  assert_close(state, whole, rtol=1e-4, atol=1e-6)
  for epoch in (1, 2, 3):
    assert metrics[epoch] == pytest.approx(expected[epoch], rel=1e-5)


@pytest.mark.parametrize(
  ('processors', 'batch_size', 'at_once', 'parts'),
  [(2, 8, 3, (4, 4)), (2, 9, 3, (5, 4)), (2, 5, 3, (5,)), (2, 2, 1, (1, 1)), (1, 8, 3, (8,))],
)
def test_each_processor_has_a_part_of_what_is_taken_in_turn(
  monkeypatch, processors, batch_size, at_once, parts
):
  assert steps.microbatches(batch_size, at_once) == (batch_size,)
  monkeypatch.setattr(jax, 'local_device_count', lambda: 1)
  monkeypatch.setattr(steps, 'processors', lambda: processors)
  assert steps.microbatches(batch_size, at_once) == parts


def test_how_many_images_are_taken_at_once(monkeypatch):
  batch = {'image': np.zeros((8, 64, 32, 3))}
  pvt = linen(build_model('pvt_v2_b0', num_classes=5))
  assert pvt.module.pixels_at_once == 1 << 15
  assert steps.examples_at_once(pvt, batch) == 16
  assert steps.examples_at_once(pvt, {'image': np.zeros((8, 224, 224, 3))}) == 1
  assert steps.examples_at_once(linen(build_model('cnn', num_classes=5)), batch) is None
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert steps.examples_at_once(pvt, batch) is None


@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize('at_once', [1, 3, 5])
def test_images_taken_in_turn_give_the_steps_of_the_whole(
  monkeypatch, request, digits, devices, at_once
):
  if devices == 1:
    request.getfixturevalue('one_device')
    monkeypatch.setattr(steps, 'processors', lambda: 2)
  task = task_of(build_model('cnn', num_classes=5, width=2, convs=1, axis_name=AXIS), *digits)
  variables = jax.device_get(task.init(jax.random.key(0)))
  whole, metrics = fit(variables, task)
  steps._train_step.cache_clear()
  # At most so many of a device's images, 8 x 8 each.
  monkeypatch.setattr(type(task.model.module), 'pixels_at_once', at_once * 64)
  state, same = fit(variables, task)
  steps._train_step.cache_clear()
  assert_close(state, whole, rtol=1e-4, atol=1e-6)
  for epoch in (1, 2):
    assert same[epoch] == pytest.approx(metrics[epoch], rel=1e-5)


@pytest.mark.parametrize(
  ('name', 'epsilon'), [('adam', 1e-7), ('adam', 0.3), ('adamw', 1e-7), ('sgd', 0)]
)
def test_an_optimiser_that_goes_on_keeps_its_counter_and_moments(name, epsilon):
  """As one that saw some weights only at first: Keras' Adam, compiled twice, by its formulas."""
  rng = np.random.default_rng(0)
  params = {
    'body': {'kernel': rng.normal(size=(3, 2))},
    'head': {'kernel': rng.normal(size=(2, 4))},
  }
  reference = NumPyOptimizer(name, 0.05, epsilon)
  recipe = Recipe(name, weight_decay=0.05, epsilon=epsilon)
  warm = dataclasses.replace(recipe, frozen=frozenset({'body/kernel'}))
  expected = trees.named_leaves(params)
  state = create_state({'params': params}, warm)
  for recipe_now, steps_of in ((warm, 6), (recipe, 30)):
    if recipe_now is recipe:
      state = continued(create_state({'params': state.params}, recipe), warm, state)
      assert int(state.step) == 0
    for _ in range(steps_of):
      grads = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)
      updates, opt_state = optimizer(recipe_now).update(grads, state.opt_state, state.params)
      moved = jax.tree.map(lambda p, u: p - 0.01 * u, state.params, updates)
      state = dataclasses.replace(state, params=moved, opt_state=opt_state)
      moving = {p: x for p, x in expected.items() if recipe_now is recipe or p != 'body/kernel'}
      expected |= reference.update(moving, trees.named_leaves(grads), 0.01)
  for path, leaf in trees.named_leaves(state.params).items():
    np.testing.assert_allclose(leaf, expected[path], rtol=1e-4, atol=1e-5)


def test_a_config_sets_epsilon():
  assert recipe_of(read_config(Config, {})).epsilon == 1e-7
  assert recipe_of(read_config(Config, {'epsilon': 1e-8})).epsilon == 1e-8
  with pytest.raises(UserError, match=r'epsilon is -0\.1; expected at least 0'):
    read_config(Config, {'epsilon': -0.1})


@pytest.mark.parametrize('name', ['sgd', 'adam', 'adamw'])
def test_steps_follow_the_formulas_of_the_optimisers(digits, plain, variables, name):
  # One batch is the whole subset, so that the order of examples does not matter.
  indices, epochs, lr = SOME[:BATCH], 4, 0.02
  recipe = Recipe(name, weight_decay=0.05)
  state, metrics = fit(variables, plain, recipe=recipe, indices=indices, epochs=epochs, lr=lr)
  images, labels = model_inputs(digits[0][indices], digits[0]), digits[1][indices]
  reference = NumPyOptimizer(name, 0.05)
  params = jax.tree.map(lambda p: np.asarray(p, np.float64), variables['params'])
  batch_stats, treedef = variables['batch_stats'], jax.tree.structure(params)
  tiny = {path: np.zeros(p.shape, bool) for path, p in trees.named_leaves(params).items()}
  for step in range(epochs):
    (loss, (logits, batch_stats)), grads = gradients(
      MODEL.clone(axis_name=None),
      jax.tree.map(lambda p: p.astype(np.float32), params),
      batch_stats,
      images,
      labels,
    )
    assert metrics[step + 1]['loss'] == pytest.approx(float(loss), rel=1e-4)
    assert metrics[step + 1]['loss'] == pytest.approx(
      -log_softmax(logits)[np.arange(BATCH), labels].mean(), rel=1e-4
    )
    assert metrics[step + 1]['accuracy'] == pytest.approx(
      float((logits.argmax(-1) == labels).mean())
    )
    named = trees.named_leaves(jax.device_get(grads))
    for path, g in named.items():
      tiny[path] |= np.abs(g) < 1e-4
    rate = lr * (1 + np.cos(np.pi * step / epochs)) / 2
    updated = reference.update(trees.named_leaves(params), named, rate)
    params = jax.tree.unflatten(treedef, list(updated.values()))
  assert int(state.step) == epochs
  assert_close(state.collections['batch_stats'], batch_stats, rtol=1e-4, atol=1e-5)
  found = trees.named_leaves(state.params)
  for path, leaf in trees.named_leaves(params).items():
    # Adam divides a gradient by its own size: one that is itself rounding (about 1e-8) has no
    # known direction, and only its length is compared.
    clear = ~tiny[path] if name != 'sgd' else np.ones(leaf.shape, bool)
    np.testing.assert_allclose(found[path][clear], leaf[clear], rtol=1e-4, atol=lr * 1e-3)
    moved = np.abs(found[path] - trees.named_leaves(variables['params'])[path])
    assert moved.max() <= 1.1 * lr * epochs
  share = np.mean(np.concatenate([t.ravel() for t in tiny.values()]))
  assert share < 0.2, 'too few weights are compared'


def test_frozen_parameters_do_not_move(plain, variables):
  frozen = frozenset({'dense/kernel', 'conv1/kernel', 'norm1/bias'})
  recipe = Recipe('adamw', weight_decay=0.1, frozen=frozen)
  state, _ = fit(variables, plain, recipe=recipe)
  after = trees.named_leaves(state.params)
  assert frozen < set(after)
  for path, leaf in trees.named_leaves(variables['params']).items():
    assert (after[path] == leaf).all() == (path in frozen), path


def test_evaluation_equals_numpy_with_and_without_padding(digits, on_eight):
  found, mean = on_eight[0].variables, np.full((8, 8, 1), 0.25, np.float32)
  apply = jax.jit(functools.partial(MODEL.apply, train=False))
  logits = np.asarray(apply(found, (digits[0] / 255 - 0.25).astype(np.float32)))
  losses = -log_softmax(logits)[np.arange(96), digits[1]]
  correct = logits.argmax(-1) == digits[1]
  # Without padding; the last of two rounds is short; fewer examples than devices.
  for size, batch_size in ((96, 12), (37, 3), (5, 512)):
    part = task_of(MODEL, digits[0][:size], digits[1][:size], mean)
    scores = loop.evaluate(part, found, data_of(part), batch_size=batch_size)
    assert scores['loss'] == pytest.approx(losses[:size].mean(), rel=1e-5)
    assert scores['accuracy'] == pytest.approx(correct[:size].mean())


def test_training_sees_augmented_images(variables, task, plain):
  one_step = {'indices': SOME[:BATCH], 'epochs': 1}
  _, as_they_are = fit(variables, plain, **one_step)
  _, augmented = fit(variables, task, **one_step)
  _, otherwise = fit(variables, task, **one_step, seed=2)
  losses = [metrics[1]['loss'] for metrics in (as_they_are, augmented, otherwise)]
  assert min(abs(a - b) for a, b in itertools.combinations(losses, 2)) > 1e-3


def test_every_step_augments_anew(digits, variables):
  # With equal examples and weights that stay, nothing but the augmentation tells steps apart.
  images, labels = np.repeat(digits[0][:1], 96, axis=0), np.zeros(96, np.int32)
  alike = task_of(MODEL, images, labels, np.zeros((8, 8, 1)), augmentation=AUGMENTED)
  _, metrics = fit(variables, alike, indices=SOME[:BATCH], epochs=4, lr=0.0)
  losses = [epoch['loss'] for epoch in metrics.values()]
  assert min(abs(a - b) for a, b in itertools.combinations(losses, 2)) > 1e-4


# -- schedules and order -------------------------------------------------------------------------


def test_schedules_have_their_closed_forms():
  half = np.sqrt(0.5)
  expected = 0.2 * np.array([1, (1 + half) / 2, 0.5, (1 - half) / 2])
  np.testing.assert_allclose(learning_rates('cosine', 0.2, 4), expected, rtol=1e-6)
  np.testing.assert_allclose(learning_rates('cosine', 0.2, 4000).mean(), 0.1, rtol=1e-3)
  found = learning_rates('constant', 3e-3, 5)
  assert found.dtype == np.float32
  assert found.tolist() == [np.float32(3e-3)] * 5
  assert learning_rates('cosine', 0.2, 1).tolist() == [np.float32(0.2)]


def batches_of(monkeypatch, task, variables, **options):
  """The examples of every step of a fit, `[steps, batch]`, without training."""
  seen = []

  nothing = steps.replicate({'loss': 0.0, 'accuracy': 0.0, 'examples': 1.0})

  def step_fn(state, arrays, prepare, index, lr, key):
    seen.append(index.ravel())
    return state.replace(step=state.step + 1), nothing

  with monkeypatch.context() as patch:
    patch.setattr(steps, 'train_step', lambda task, recipe: step_fn)
    fit(variables, task, **options)
  return np.stack(seen)


def test_epochs_are_fresh_permutations_that_seeds_decide(monkeypatch, task, variables):
  shuffled = np.roll(SOME[::-1], 17)  # Neither sorted nor from 0.
  batches = functools.partial(batches_of, monkeypatch, task, variables, indices=shuffled, epochs=4)
  found = batches(seed=1)
  assert found.shape == (12, BATCH)
  epochs = [found[i : i + 3].ravel() for i in range(0, 12, 3)]
  for epoch in epochs:
    assert len(set(epoch.tolist())) == 72  # The incomplete batch is left out,
    assert set(epoch.tolist()) < set(SOME.tolist())
  left_out = [frozenset(SOME.tolist()) - set(epoch.tolist()) for epoch in epochs]
  assert len(set(left_out)) > 1  # and not always the same one.
  orders = {tuple(epoch) for epoch in epochs} | {tuple(e.ravel()) for e in batches(seed=2)}
  assert len(orders) == 4 + 12
  assert (batches(seed=1) == found).all()


def test_a_seed_decides_the_result_bit_for_bit(variables, task, on_eight):
  again, metrics = fit(variables, task)
  assert_same_bits(again, on_eight[0])
  assert metrics == on_eight[1]
  other, metrics = fit(variables, task, seed=2)
  assert metrics[1] != on_eight[1][1]
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), other.params, again.params)
  assert min(jax.tree.leaves(moved)) > 0


def test_nothing_is_compiled_again_for_other_rates_epochs_and_seeds(variables, task, on_eight):
  del on_eight  # Has compiled what there is to compile.
  with compilations() as found:
    fit(variables, task, lr=0.5, epochs=3, seed=3, schedule='constant')
    fit(variables, task, lr=1e-4, epochs=1, seed=2**31)
  assert found == []
  with compilations() as found:
    jax.jit(lambda x: x + 1)(1.0)
  assert len(found) == 1, 'the counter is broken'


# -- interruption --------------------------------------------------------------------------------


def test_from_every_step_the_result_has_the_same_bits(variables, task, on_eight):
  saved = []
  fit(variables, task, save=saved.append, save_every_seconds=-1.0)
  assert [int(checkpoint.state.step) for checkpoint in saved] == [1, 2, 3, 4, 5]
  for checkpoint in saved:
    step = int(checkpoint.state.step)
    state, metrics = fit(variables, task, start=checkpoint)
    assert_same_bits(state, on_eight[0])
    assert metrics == {epoch: m for epoch, m in on_eight[1].items() if epoch > step // 3}
  # Not while the time between saves has not passed.
  saved.clear()
  fit(variables, task, save=saved.append, save_every_seconds=1e6)
  assert saved == []


def test_from_the_end_nothing_is_done(variables, task, on_eight):
  state, metrics = fit(variables, task, start=Checkpoint(on_eight[0]))
  assert_same_bits(state, on_eight[0])
  assert metrics == {}


@pytest.mark.parametrize('step', [1, 3, 6])
def test_a_signal_within_a_step_is_answered_after_it(monkeypatch, variables, task, on_eight, step):
  saved, metrics, real, count = [], {}, steps.train_step, 0

  def train_step(task, recipe):
    def step_fn(*args):
      nonlocal count
      count += 1
      result = real(task, recipe)(*args)
      if count == step:
        # The buffers of the old state are gone, and nobody holds the new one yet.
        signal.raise_signal(signal.SIGTERM)
      return result

    return step_fn

  options = {'save': saved.append, 'save_every_seconds': 1e6, 'on_epoch': metrics.__setitem__}
  with monkeypatch.context() as patch:
    patch.setattr(steps, 'train_step', train_step)
    with sigterm_raises(), pytest.raises(Terminated):
      fit(variables, task, **options)
  assert [int(checkpoint.state.step) for checkpoint in saved] == [step]
  assert set(metrics) == set(range(1, step // 3 + 1))
  state, _ = fit(variables, task, start=saved[0], **options)
  assert_same_bits(state, on_eight[0])
  assert metrics == on_eight[1]


@pytest.mark.parametrize('stop', [Terminated, KeyboardInterrupt])
def test_a_signal_between_steps_is_answered_too(monkeypatch, variables, task, on_eight, stop):
  saved, metrics, real = [], {}, jax.random.permutation
  calls = iter(range(9))

  def permutation(*args):
    if next(calls) == 1:
      raise stop
    return real(*args)

  with monkeypatch.context() as patch:
    patch.setattr(jax.random, 'permutation', permutation)
    with pytest.raises(stop):
      fit(variables, task, save=saved.append, on_epoch=metrics.__setitem__)
  assert [int(checkpoint.state.step) for checkpoint in saved] == [3]
  state, _ = fit(variables, task, start=saved[0], on_epoch=metrics.__setitem__)
  assert_same_bits(state, on_eight[0])
  assert metrics == on_eight[1]


# -- what is refused -----------------------------------------------------------------------------


def test_divergence_is_an_error(variables, task):
  epochs = []
  with pytest.raises(DivergedError, match=r'the loss is (nan|inf) in epoch [12] at learning rate'):
    fit(variables, task, lr=1e30, on_epoch=lambda *args: epochs.append(args))
  assert epochs == []
  # The loss of the only step is finite, what its update makes is not.
  steep = jax.tree.map(lambda p: p * 1000, variables['params'])
  with pytest.raises(DivergedError, match=r'leaf .* holds NaN or infinity after the last step'):
    fit({**variables, 'params': steep}, task, indices=SOME[:BATCH], lr=3e38, epochs=1)


@pytest.mark.parametrize(
  ('batch_size', 'examples', 'message'),
  [
    (0, 96, 'batch_size is 0; expected a positive multiple of the 8 devices'),
    (-8, 96, 'batch_size is -8; '),
    (12, 96, 'batch_size is 12; '),
    (96, 95, 'the subset has 95 examples; expected at least batch_size = 96'),
  ],
)
def test_batches_must_fit_devices_and_data(batch_size, examples, message):
  with pytest.raises(UserError, match=message):
    loop.check_batch_size(batch_size, examples, 'the subset')
  loop.check_batch_size(96, 96, 'the subset')


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: Recipe('adm'), "unknown optimizer 'adm'. Did you mean 'adam'"),
    (lambda: Recipe(weight_decay=-1.0), 'weight_decay is -1.0; expected at least 0'),
    (lambda: learning_rates('cosin', 0.1, 3), "unknown schedule 'cosin'. Did you mean"),
    (lambda: learning_rates('cosine', -0.1, 3), 'the learning rate is -0.1; expected'),
    (lambda: learning_rates('cosine', float('nan'), 3), 'the learning rate is nan'),
  ],
)
def test_wrong_values_are_named(make, message):
  with pytest.raises(UserError, match=message):
    make()


# -- less memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize('remat', [False, True])
def test_parts_and_remat_take_the_step_of_the_whole_batch(one_device, digits, remat):
  # A network without BatchNorm, whose statistics are those of a part.
  task = task_of(build_model('cnn', num_classes=5, width=2, convs=1, axis_name=AXIS), *digits)
  variables = jax.device_get(task.init(jax.random.key(0)))
  whole, metrics = fit(variables, task)
  recipe = dataclasses.replace(RECIPE, accumulate=3, remat=remat)
  state, same = fit(variables, task, recipe=recipe)
  assert_close(state.params, whole.params, rtol=1e-5, atol=1e-6)
  assert same[2] == pytest.approx(metrics[2], rel=1e-5)
  assert int(state.step) == 6


def test_batch_norm_sees_a_part_at_a_time(one_device, plain, variables):
  still = dataclasses.replace(RECIPE, accumulate=2)
  state, _ = fit(
    variables, plain, recipe=still, epochs=1, batch_size=80, lr=0.0, indices=SOME, seed=1
  )
  whole, _ = fit(variables, plain, epochs=1, batch_size=80, lr=0.0, indices=SOME, seed=1)
  assert_same_bits(state.params, whole.params)
  # The mean over both halves is that of the whole; the variance within halves is smaller.
  assert_close(
    state.collections['batch_stats']['norm1']['mean'],
    whole.collections['batch_stats']['norm1']['mean'],
    rtol=1e-4, atol=1e-6,
  )  # fmt: skip
  halves, all_ = (x.collections['batch_stats']['norm1']['var'] for x in (state, whole))
  assert (halves <= all_ * 1.0001).all() and (halves < all_).any()


def test_a_batch_that_does_not_part_is_refused():
  config = default_config()
  config.update(batch_size=24, accumulate=5)
  with pytest.raises(UserError, match='batch_size is 24 and accumulate 5; expected a multiple'):
    recipe_of(read_config(Config, config))
  with pytest.raises(UserError, match='accumulate is 0; expected at least 1'):
    Recipe(accumulate=0)


# -- several devices of one machine --------------------------------------------------------------


def test_sums_over_devices_are_those_of_each_leaf():
  rng, n = np.random.default_rng(0), jax.local_device_count()
  tree = {
    'small': rng.normal(size=(n, 3, 2)).astype(np.float32),
    'scalar': rng.normal(size=n).astype(np.float32),
    'large': rng.normal(size=(n, 1 << 17)).astype(np.float32),
    'half': np.ones((n, 5), jnp.bfloat16),
    'count': np.arange(2 * n, dtype=np.int32).reshape(n, 2),
    'none': None,
    'empty': np.zeros((n, 0), np.float32),
  }
  found = jax.pmap(steps.sum_over_devices, axis_name=AXIS)(tree)
  assert n > 1 and found['none'] is None
  for name, leaf in tree.items():
    if leaf is not None:
      assert found[name].dtype == leaf.dtype and found[name].shape == leaf.shape
      for of_device in np.asarray(found[name]):
        np.testing.assert_allclose(of_device, leaf.sum(0, dtype=leaf.dtype), rtol=1e-5, atol=1e-5)


def test_a_step_waits_for_other_devices_once_for_all_that_is_small(plain, variables):
  """Beside the statistics of BatchNorm, of one layer, forward and backward."""
  data = put_data(plain)[0]
  arrays, index = data.at(np.zeros((jax.local_device_count(), 4), np.int32))
  state = steps.replicate(create_state(jax.device_get(variables), RECIPE))
  arguments = (state, arrays, data.prepare, index, np.float32(0.1), jax.random.key(0))
  text = steps.train_step(plain, RECIPE).lower(*arguments).as_text()
  leaves = len(jax.tree.leaves((state.params, state.collections)))
  assert 0 < text.count('stablehlo.all_reduce') <= 4 < leaves


_MANY_STEPS = """
import jax, numpy as np
from know_jax.data.base import Arrays
from know_jax.models import build_model
from know_jax.tasks import classification
from know_jax.tasks.base import AXIS
from know_jax.training import loop, steps
from know_jax.training.state import Recipe

rng = np.random.default_rng(0)
images = rng.integers(0, 256, (6400, 8, 8, 1)).astype(np.uint8)
labels = rng.integers(0, 5, 6400).astype(np.int32)
source = Arrays({'image': images, 'label': labels}, labels)
network = build_model('cnn', num_classes=5, width=8, convs=2, axis_name=AXIS)
task = classification.task(network, source, source)
data, variables = steps.put_data(task)[0], task.init(jax.random.key(0))
options = dict(recipe=Recipe('adam'), epochs=1, batch_size=32, lr=1e-3, schedule='constant')
trained = loop.train(
  task, jax.device_get(variables), data, np.arange(6400, dtype=np.int32), key=jax.random.key(1),
  **options,
)
print(jax.local_device_count(), loop.evaluate(task, trained, data, batch_size=16)['loss'])
"""


def test_hundreds_of_steps_on_two_devices_of_a_cpu_come_to_an_end():
  environment = {**os.environ, 'JAX_NUM_CPU_DEVICES': '2', 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(
    [sys.executable, '-c', _MANY_STEPS],
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  devices, loss = done.stdout.split()
  assert devices == '2' and np.isfinite(float(loss))


def test_no_step_begins_before_the_one_before_the_last_has_ended(
  monkeypatch, digits, variables, plain
):
  given, waited = [], []
  step_fn = steps.train_step(plain, RECIPE)

  def step(*arguments):
    assert len(waited) == len(given) + 1
    state, sums = step_fn(*arguments)
    given.append(sums)
    return state, sums

  monkeypatch.setattr(steps, 'train_step', lambda *_: step)
  monkeypatch.setattr(jax, 'block_until_ready', waited.append)
  fit(variables, plain, epochs=1)
  assert len(given) == 3
  assert [[id(x) for x in one] for one in waited] == [[], [], [id(given[0])]]
