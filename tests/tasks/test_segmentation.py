"""Segmentation: joint augmentation, scores in the real loop, and data that do not fit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from know_jax.data import augmentation as augmenting
from know_jax.data.augmentation import Augmentation
from know_jax.data.base import Arrays
from know_jax.errors import UserError
from know_jax.tasks import TASKS, segmentation
from know_jax.training.loop import evaluate, fit
from know_jax.training.state import Checkpoint, Recipe, create_state
from know_jax.training.steps import put_data


class Pixels(nn.Module):
  """A logit for each class from each pixel alone."""

  classes: int = 3

  @nn.compact
  def __call__(self, x):
    return nn.Conv(self.classes, (1, 1), name='head')(x)


def data(seed=0, count=16):
  """Images whose colour tells the class; a border of ignored pixels."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 3, (count, 4, 6)).astype(np.uint8)
  images = np.eye(3)[labels] * 200 + rng.integers(0, 50, (count, 4, 6, 3))
  labels[:, 0] = 255
  return Arrays({'image': images.astype(np.uint8), 'label': labels})


def test_it_is_a_task_by_its_name_and_learns_in_the_real_loop():
  assert 'segmentation' in TASKS and 'metrics' not in TASKS
  task = segmentation.task(Pixels(), data(), data(1), num_classes=3)
  train, test = put_data(task)
  recipe = Recipe()
  state = create_state(jax.device_get(task.init(jax.random.key(0))), recipe)
  before = evaluate(task, state.variables, test)
  trained = fit(
    task, Checkpoint(state), train, np.arange(16, dtype=np.int32), recipe=recipe, epochs=30,
    batch_size=8, lr=0.3, schedule='cosine', key=jax.random.key(1),
  )  # fmt: skip
  after = evaluate(task, trained.variables, test)
  assert set(after) == {'loss', 'miou', 'mean_accuracy', 'accuracy'}
  assert after['miou'] > 0.95 > before['miou'] and after['loss'] < before['loss']
  # The same, counted at once in NumPy.
  prepared = task.prepare(jax.tree.map(jnp.asarray, task.test.arrays), None)
  logits, _ = task.model.apply(trained.variables, prepared, train=False, key=None)
  logits, labels = np.asarray(logits, np.float64), task.test.arrays['label']
  counts = labels != 255
  chosen = np.take_along_axis(logits, np.where(counts, labels, 0)[..., None], -1)[..., 0]
  losses = np.log(np.exp(logits).sum(-1)) - chosen
  np.testing.assert_allclose(after['loss'], losses[counts].mean(), rtol=1e-4)
  right = logits.argmax(-1)[counts] == labels[counts]
  np.testing.assert_allclose(after['accuracy'], right.mean(), rtol=1e-6)


def test_label_maps_go_with_their_images():
  setting = Augmentation(rotation=20, shift=0.2, zoom=0.2, flip=True)
  rng = np.random.default_rng(0)
  labels = ndimage.zoom(rng.integers(0, 3, (4, 4, 4)), (1, 6, 7), order=0).astype(np.uint8)
  keys = jax.random.split(jax.random.key(3), 4)
  image = jnp.asarray(labels[..., None], jnp.float32)
  moved = np.asarray(augmenting.augment(keys, image, setting))[..., 0]
  result = np.asarray(augmenting.augment_labels(keys, jnp.asarray(labels), setting, 255))
  assert result.dtype == np.uint8 and set(np.unique(result)) <= {0, 1, 2, 255}
  inside = result != 255
  assert 0.4 < inside.mean() < 1 and (result != labels).mean() > 0.2
  # Where bilinear interpolation saw one class alone, it is the label.
  pure = inside & (np.abs(moved - moved.round()) < 1e-5)
  assert pure.sum() > 0.4 * inside.sum()
  assert (result[pure] == moved[pure].round()).mean() > 0.98
  # scipy's own, for one of the images; ties between two nearest places may fall either way.
  angle, shift, zoom, flip = (np.asarray(x)[0] for x in augmenting.draw(keys, setting, (24, 28)))
  rows = (zoom[0] * (np.arange(24) - 11.5) + shift[0])[:, None]
  columns = (zoom[1] * (np.arange(28) - 13.5) + shift[1])[None]
  places = [
    np.cos(angle) * rows - np.sin(angle) * columns + 11.5,
    np.sin(angle) * rows + np.cos(angle) * columns + 13.5,
  ]
  expected = ndimage.map_coordinates(labels[0], places, order=0, mode='grid-constant', cval=255)
  expected = expected[:, ::-1] if flip else expected
  assert (result[0] == expected).mean() > 0.99


def test_without_augmentation_labels_stay():
  task = segmentation.task(Pixels(), data(), data(), num_classes=3)
  keys = jax.random.split(jax.random.key(0), 16)
  batch = task.prepare(jax.tree.map(jnp.asarray, task.train.arrays), keys)
  np.testing.assert_array_equal(batch['label'], task.train.arrays['label'])


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      lambda a: a['label'][:, 1:],
      r'label maps of test of cars have shape \(16, 3, 6\).*\(16, 4, 6\)',
    ),
    (lambda a: a['label'].astype(np.int32), 'dtype int32; expected'),
    (
      lambda a: np.where(a['image'][..., 0] < 5, 7, a['label']).astype(np.uint8),
      'has class 7; expect',
    ),
    (lambda a: np.full_like(a['label'], 255), 'no pixel of test of cars has a class'),
  ],
)
def test_label_maps_that_do_not_fit_are_refused(change, message):
  wrong = data()
  wrong = Arrays({**wrong.arrays, 'label': change(wrong.arrays)})
  with pytest.raises(UserError, match=message):
    segmentation.task(Pixels(), data(), wrong, num_classes=3, name='cars')
