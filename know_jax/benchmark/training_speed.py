"""Images a second in training: ours beside Keras, and several runs at once."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from know_jax.benchmark import keras_rivals
from know_jax.benchmark.histories import build
from know_jax.benchmark.rivals import check_equal
from know_jax.benchmark.settings import Images, Settings
from know_jax.benchmark.timing import race, rates, speedups
from know_jax.data.sources import mean_image, to_device_input
from know_jax.training import loop, together

OURS, KERAS, KERAS_XLA = 'know_jax', 'Keras', 'Keras with XLA'
CLASSES = 10

_LR = 1e-3
_RECIPE = loop.Recipe('adam')
_CHECKED_STEPS = 3


def measure(settings: Settings, *, show: bool = True) -> dict[str, Any]:
  """An epoch of the small CNN, by `training.fit` and by Keras' `fit`; and several runs at once."""
  target, batch_size = settings.trained, settings.batch_size
  images, labels = random_images(settings.train_steps * batch_size, target.image)
  data = loop.put_data(images, labels)
  model = build(target, axis_name=loop.AXIS)
  keys = [jax.random.key(seed) for seed in range(settings.runs)]
  starts = [start(model, key, target.image) for key in keys]
  everything = np.arange(len(labels), dtype=np.int32)

  def fit() -> Any:
    return loop.fit(
      model, starts[0], data, everything, recipe=_RECIPE, epochs=1, batch_size=batch_size, lr=_LR,
      schedule='constant', key=keys[0],
    )  # fmt: skip

  contestants: dict[str, Any] = {OURS: fit}
  differences = {}
  if not keras_rivals.absent():
    # Prepared beforehand, which ours does in every step.
    inputs = np.asarray(to_device_input(jnp.asarray(images), jnp.asarray(mean_image(images))))
    for name, jit in ((KERAS, False), (KERAS_XLA, True)):
      differences[name] = _differences(model, starts[0], inputs, labels, settings, jit)
      network = _keras(starts[0], settings, jit)
      contestants[name] = _keras_fit(network, inputs, labels, batch_size)
  times = race(contestants, target.repetitions, 'train', show=show)

  def several(how: str) -> Any:
    jobs = [
      together.Job(begin, data, everything, 1, _LR, 'constant', key)
      for begin, key in zip(starts, keys, strict=True)
    ]
    return lambda: together.fit_together(
      model, jobs, recipe=_RECIPE, batch_size=batch_size, how=how
    )

  ways = {way: several(way) for way in together.WAYS}
  group = race(ways, settings.runs_repetitions, f'train {settings.runs} at once', show=show)
  return {
    'keras_absent': keras_rivals.absent(),
    'model': target.model,
    'image': list(target.image),
    'batch_size': batch_size,
    'images': len(labels),
    'devices': jax.local_device_count(),
    'seconds': times,
    'images_a_second': rates(times, len(labels)),
    'speedup': speedups(times, OURS),
    'difference': differences,
    'together': {
      'runs': settings.runs,
      'seconds': group,
      'images_a_second': rates(group, settings.runs * len(labels)),
      'speedup_of_one_by_one': speedups(group, 'one_by_one'),
    },
  }


def random_images(count: int, image: Images) -> tuple[np.ndarray, np.ndarray]:
  """Noise: uint8 `[count, H, W, C]` and int32 `[count]`."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, CLASSES, count, dtype=np.int32)
  return rng.integers(0, 256, (count, *image), dtype=np.uint8), labels


def start(model: Any, key: jax.Array, image: Images) -> loop.Checkpoint:
  """Where a training begins."""
  variables = jax.device_get(loop.init_variables(model, key, image))
  return loop.Checkpoint(loop.create_state(variables, _RECIPE))


def _keras(begin: loop.Checkpoint, settings: Settings, jit: bool) -> Any:
  return keras_rivals.cnn(begin.state.params, settings.trained.image, jit=jit, lr=_LR)


def _keras_fit(network: Any, inputs: np.ndarray, labels: np.ndarray, batch_size: int) -> Any:
  return lambda: (
    network.fit(inputs, labels, batch_size=batch_size, epochs=1, shuffle=True, verbose=0).history
  )


def _differences(
  model: Any,
  begin: loop.Checkpoint,
  inputs: np.ndarray,
  labels: np.ndarray,
  settings: Settings,
  jit: bool,
) -> dict[str, float]:
  """Whether Keras trains the same network: logits, and the loss after a few steps on one batch."""
  size = settings.batch_size
  inputs, labels = inputs[:size], labels[:size]
  network = _keras(begin, settings, jit)
  logits = model.apply(begin.state.variables, inputs, train=False)
  found = network.predict(inputs, batch_size=size, verbose=0)
  apart = float(np.abs(found - logits).max())
  theirs = network.fit(
    inputs, labels, batch_size=size, epochs=_CHECKED_STEPS, shuffle=False, verbose=0
  ).history['loss']
  ours = _losses(model, begin, labels, settings)
  return {
    'logits': check_equal('logits of Keras', apart, 1e-4),
    'loss': check_equal('loss of Keras', float(np.abs(np.subtract(ours, theirs)).max()), 1e-3),
  }


def _losses(
  model: Any, begin: loop.Checkpoint, labels: np.ndarray, settings: Settings
) -> Sequence[float]:
  images, _ = random_images(settings.train_steps * settings.batch_size, settings.trained.image)
  # The mean of all of them is subtracted, as for Keras.
  data = loop.put_data(images[: len(labels)], labels, mean_image(images))
  losses: list[float] = []
  loop.fit(
    model, begin, data, np.arange(len(labels), dtype=np.int32), recipe=_RECIPE,
    epochs=_CHECKED_STEPS, batch_size=len(labels), lr=_LR, schedule='constant',
    key=jax.random.key(0), on_epoch=lambda _, metrics: losses.append(metrics['loss']),
  )  # fmt: skip
  return losses
