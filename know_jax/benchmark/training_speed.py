"""Images a second in training: know_jax beside Keras."""

import functools
from collections.abc import Callable
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

LR = 1e-3
_RECIPE = Recipe('adam')
_CHECKED_STEPS = 3


def measure(settings: Settings, *, show: bool = True) -> dict[str, Any]:
  """An epoch of the small CNN, by `loop.fit` and by Keras' `fit`."""
  target, batch_size = settings.trained, settings.batch_size
  images, labels = random_images(settings.train_steps * batch_size, target.image)
  task = random_task(build(target, axis_name=AXIS), images, labels)
  begin, fit = epoch_of(task, batch_size)
  contestants: dict[str, Any] = {OURS: fit}
  differences = {}
  if not keras_rivals.absent():
    # Prepared beforehand, which ours does in every step.
    inputs = np.asarray(to_device_input(jnp.asarray(images), jnp.asarray(mean_image(images))))
    for name, jit in ((KERAS, False), (KERAS_XLA, True)):
      make = functools.partial(keras_rivals.cnn, begin.state.params, target.image, jit=jit, lr=LR)
      differences[name] = _differences(
        make(), task, begin, images, inputs[:batch_size], labels[:batch_size]
      )
      contestants[name] = functools.partial(
        make().fit, inputs, labels, batch_size=batch_size, epochs=1, shuffle=True, verbose=0
      )
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


def epoch_of(
  task: Task, batch_size: int, schedule: str = 'constant'
) -> tuple[Checkpoint, Callable[[], Any]]:
  """Where a training by Adam begins, and its first epoch, at each call from there anew."""
  key = jax.random.key(0)
  begin = Checkpoint(create_state(jax.device_get(task.init(key)), _RECIPE))
  everything = np.arange(task.train.size, dtype=np.int32)
  return begin, functools.partial(
    loop.fit, task, begin, put_data(task)[0], everything, recipe=_RECIPE, epochs=1,
    batch_size=batch_size, lr=LR, schedule=schedule, key=key,
  )  # fmt: skip


def _differences(
  network: Any,
  task: Task,
  begin: Checkpoint,
  images: np.ndarray,
  inputs: np.ndarray,
  labels: np.ndarray,
) -> dict[str, float]:
  """Whether Keras trains the same network: logits, and the loss after a few steps on one batch."""
  size = len(labels)
  logits, _ = task.model.apply(begin.state.variables, {'image': inputs}, train=False, key=None)
  result = network.predict(inputs, batch_size=size, verbose=0)
  apart = float(np.abs(result - logits).max())
  theirs = network.fit(
    inputs, labels, batch_size=size, epochs=_CHECKED_STEPS, shuffle=False, verbose=0
  ).history['loss']
  # The mean of all of them is subtracted, as for Keras.
  task = random_task(task.model, images[:size], labels, mean_image(images))
  ours: list[float] = []
  loop.fit(
    task, begin, put_data(task)[0], np.arange(size, dtype=np.int32), recipe=_RECIPE,
    epochs=_CHECKED_STEPS, batch_size=size, lr=LR, schedule='constant', key=jax.random.key(0),
    on_epoch=lambda _, metrics: ours.append(metrics['loss']),
  )  # fmt: skip
  return {
    'logits': check_equal('logits of Keras', apart, 1e-4),
    'loss': check_equal('loss of Keras', float(np.abs(np.subtract(ours, theirs)).max()), 1e-3),
  }
