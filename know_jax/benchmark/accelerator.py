"""What is asked of a GPU: a whole ResNet18, a billion weights, an epoch of CIFAR."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from know_jax.benchmark.histories import History, build, num_predicted, of_network
from know_jax.benchmark.settings import STAGES, Settings
from know_jax.benchmark.timing import race, rates, spread
from know_jax.benchmark.training_speed import random_images, random_task, start
from know_jax.data.augmentation import PAPER_AUGMENTATION
from know_jax.errors import PredictionWarning
from know_jax.nowcast import api
from know_jax.tasks.base import AXIS
from know_jax.training import loop
from know_jax.training.state import Recipe
from know_jax.training.steps import put_data

PREDICTORS = ('known', 'known_leaf')
STEPS = 3


def measure(settings: Settings, *, show: bool = True) -> dict[str, Any]:
  """All of it where JAX runs on a GPU, or `gpu_anywhere`; elsewhere `{'unmeasured': why}`."""
  backend = jax.default_backend()
  if backend != 'gpu' and not settings.gpu_anywhere:
    return {'unmeasured': f'JAX runs on {backend}, not on a GPU.'}
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', PredictionWarning)
    return {
      'backend': backend,
      'network': _network(settings, show),
      'large': _large(settings, show),
      'epoch': _epoch(settings, show),
    }


def _network(settings: Settings, show: bool) -> dict[str, Any]:
  history = jax.device_put(of_network(settings.gpu_predicted))
  repetitions = settings.gpu_predicted.repetitions
  times = race(_predictions(history, STEPS), repetitions, 'network on the GPU', show=show)
  return {'model': settings.gpu_predicted.model, 'steps': STEPS, **_summary(history, times)}


def _large(settings: Settings, show: bool) -> dict[str, Any]:
  history = _large_history(settings.gpu_weights, settings.gpu_leaf)
  times = race(_predictions(history, 1), settings.gpu_repetitions, 'large model', show=show)
  return {'dtype': 'bfloat16', 'steps': 1, **_summary(history, times)}


def _predictions(history: History, steps: int) -> dict[str, Any]:
  return {
    predictor: lambda predictor=predictor: api.predict(history, steps, predictor=predictor)
    for predictor in PREDICTORS
  }


def _summary(history: History, times: Any) -> dict[str, Any]:
  weights, leaves = num_predicted(history)
  return {
    'weights': weights,
    'leaves': leaves,
    'seconds': times,
    'seconds_spread': {name: spread(values) for name, values in times.items()},
    'weights_a_second': rates(times, weights),
  }


def _large_history(weights: int, leaf: int) -> History:
  """Convolutions of `leaf` weights each in bfloat16, made on the device."""

  @jax.jit
  def walk(key: jax.Array) -> list[jax.Array]:
    base, *moves = jax.random.split(key, STAGES)
    stages = [0.05 * jax.random.normal(base, (1, 1, 1, leaf), jnp.bfloat16)]
    for move in moves:
      step = 0.005 * jax.random.normal(move, stages[0].shape, jnp.bfloat16)
      stages.append(stages[-1] + step)
    return stages

  columns = [walk(key) for key in jax.random.split(jax.random.key(0), weights // leaf)]
  stages = [
    {f'conv{i}': {'kernel': column[s]} for i, column in enumerate(columns)} for s in range(STAGES)
  ]
  return jax.block_until_ready(stages)


def _epoch(settings: Settings, show: bool) -> dict[str, Any]:
  """One epoch through `training.fit`, images and augmentation on the device."""
  target = settings.gpu_trained
  images, labels = random_images(settings.gpu_images, target.image)
  model = build(target, axis_name=AXIS)
  task = random_task(model, images, labels, augmentation=PAPER_AUGMENTATION)
  data, _ = put_data(task)
  key = jax.random.key(0)
  begin = start(task, key)

  def fit() -> Any:
    return loop.fit(
      task, begin, data, np.arange(len(labels), dtype=np.int32), recipe=Recipe('adam'), epochs=1,
      batch_size=settings.batch_size, lr=1e-3, schedule='cosine', key=key,
    )  # fmt: skip

  times = race({'fit': fit}, settings.gpu_repetitions, 'epoch on the GPU', show=show)
  return {
    'model': target.model,
    'dtype': target.options.get('dtype', 'float32'),
    'images': len(labels),
    'batch_size': settings.batch_size,
    'seconds': times,
    'seconds_spread': {'fit': spread(times['fit'])},
    'images_a_second': rates(times, len(labels)),
  }
