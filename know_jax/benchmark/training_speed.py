"""Images a second in training: know_jax beside Keras."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from know_jax.benchmark import keras_rivals
from know_jax.benchmark.histories import build
from know_jax.benchmark.predicting import check_equal
from know_jax.benchmark.settings import Images, Settings
from know_jax.benchmark.timing import goal, race, rates, speedups
from know_jax.data.base import Arrays
from know_jax.data.sources import mean_image, to_device_input
from know_jax.tasks import classification
from know_jax.tasks.base import AXIS, Task
from know_jax.training import loop
from know_jax.training.state import Checkpoint, Recipe, create_state
from know_jax.training.steps import put_data

OURS, KERAS, KERAS_XLA = 'know_jax', 'Keras', 'Keras with XLA'
CLASSES = 10

_LR = 1e-3
_RECIPE = Recipe('adam')
_CHECKED_STEPS = 3


def measure(settings: Settings, *, show: bool = True) -> dict[str, Any]:
  """An epoch of the small CNN, by `loop.fit` and by Keras' `fit`."""
  target, batch_size = settings.trained, settings.batch_size
  images, labels = random_images(settings.train_steps * batch_size, target.image)
  task = random_task(build(target, axis_name=AXIS), images, labels)
  data, _ = put_data(task)
  key = jax.random.key(0)
  begin = start(task, key)
  everything = np.arange(len(labels), dtype=np.int32)

  def fit() -> Any:
    return loop.fit(
      task, begin, data, everything, recipe=_RECIPE, epochs=1, batch_size=batch_size, lr=_LR,
      schedule='constant', key=key,
    )  # fmt: skip

  contestants: dict[str, Any] = {OURS: fit}
  differences = {}
  if not keras_rivals.absent():
    # Prepared beforehand, which ours does in every step.
    inputs = np.asarray(to_device_input(jnp.asarray(images), jnp.asarray(mean_image(images))))
    for name, jit in ((KERAS, False), (KERAS_XLA, True)):
      differences[name] = _differences(task, begin, inputs, labels, settings, jit)
      network = _keras(begin, settings, jit)
      contestants[name] = _keras_fit(network, inputs, labels, batch_size)
  times = race(contestants, target.repetitions, 'train', show=show)
  rate, faster = rates(times, len(labels)), speedups(times, OURS)
  return {
    'note': f'`{target.model}` on {" x ".join(map(str, target.image))} images in memory, batches '
    f'of {batch_size}, Adam, float32, {len(labels):,} images by one call of `fit`. know_jax runs '
    f'on {jax.local_device_count()} device(s), and turns bytes into centred numbers in every step; '
    f'Keras is given them ready, and runs with and without XLA. {keras_rivals.absent()}',
    'seconds': times,
    'difference': differences,
    'tables': {'': [
      {'': name, 'images a second': rate[name], 'know_jax is faster by': faster.get(name)}
      for name in times
    ]},
    'goals': [
      goal(
        f'training {target.model}, over the faster Keras',
        min((entry['median'] for entry in faster.values()), default=None), least=1,
      )
    ],
  }  # fmt: skip


def random_images(count: int, image: Images) -> tuple[np.ndarray, np.ndarray]:
  """Noise: uint8 `[count, H, W, C]` and int32 `[count]`."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, CLASSES, count, dtype=np.int32)
  return rng.integers(0, 256, (count, *image), dtype=np.uint8), labels


def random_task(
  model: Any, images: np.ndarray, labels: np.ndarray, mean: np.ndarray | None = None, **options: Any
) -> Task:
  """Classification of such images, which are also those that it is tested on."""
  source = Arrays({'image': images, 'label': labels}, labels)
  return classification.task(model, source, source, mean=mean, **options)


def start(task: Task, key: jax.Array) -> Checkpoint:
  """Where a training begins."""
  return Checkpoint(create_state(jax.device_get(task.init(key)), _RECIPE))


def _keras(begin: Checkpoint, settings: Settings, jit: bool) -> Any:
  return keras_rivals.cnn(begin.state.params, settings.trained.image, jit=jit, lr=_LR)


def _keras_fit(network: Any, inputs: np.ndarray, labels: np.ndarray, batch_size: int) -> Any:
  return lambda: (
    network.fit(inputs, labels, batch_size=batch_size, epochs=1, shuffle=True, verbose=0).history
  )


def _differences(
  task: Task,
  begin: Checkpoint,
  inputs: np.ndarray,
  labels: np.ndarray,
  settings: Settings,
  jit: bool,
) -> dict[str, float]:
  """Whether Keras trains the same network: logits, and the loss after a few steps on one batch."""
  size = settings.batch_size
  inputs, labels = inputs[:size], labels[:size]
  network = _keras(begin, settings, jit)
  logits, _ = task.model.apply(begin.state.variables, {'image': inputs}, train=False, key=None)
  result = network.predict(inputs, batch_size=size, verbose=0)
  apart = float(np.abs(result - logits).max())
  theirs = network.fit(
    inputs, labels, batch_size=size, epochs=_CHECKED_STEPS, shuffle=False, verbose=0
  ).history['loss']
  ours = _losses(task, begin, labels, settings)
  return {
    'logits': check_equal('logits of Keras', apart, 1e-4),
    'loss': check_equal('loss of Keras', float(np.abs(np.subtract(ours, theirs)).max()), 1e-3),
  }


def _losses(
  task: Task, begin: Checkpoint, labels: np.ndarray, settings: Settings
) -> Sequence[float]:
  images, _ = random_images(settings.train_steps * settings.batch_size, settings.trained.image)
  # The mean of all of them is subtracted, as for Keras.
  task = random_task(task.model, images[: len(labels)], labels, mean_image(images))
  losses: list[float] = []
  loop.fit(
    task, begin, put_data(task)[0], np.arange(len(labels), dtype=np.int32), recipe=_RECIPE,
    epochs=_CHECKED_STEPS, batch_size=len(labels), lr=_LR, schedule='constant',
    key=jax.random.key(0), on_epoch=lambda _, metrics: losses.append(metrics['loss']),
  )  # fmt: skip
  return losses
