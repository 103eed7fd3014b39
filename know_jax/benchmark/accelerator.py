"""What is asked of a GPU: a whole ResNet18, a billion weights, an epoch of CIFAR."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp

from know_jax.benchmark.histories import History, build, num_predicted, of_network
from know_jax.benchmark.settings import STAGES, Settings
from know_jax.benchmark.timing import goal, race, rates, spread
from know_jax.benchmark.training_speed import epoch_of, random_images, random_task
from know_jax.data.augmentation import PAPER_AUGMENTATION
from know_jax.errors import PredictionWarning
from know_jax.nowcast import api
from know_jax.tasks.base import AXIS

PREDICTORS = ('known', 'known_leaf')
STEPS = 3


_GOALS = {
  'network': ('GPU: three steps of ResNet18, seconds', 0.05),
  'large': ('GPU: 1 billion weights, seconds', 2.0),
  'epoch': ('GPU: an epoch of ResNet18 in bfloat16, seconds', 4.0),
}


def measure(settings: Settings, *, show: bool = True) -> dict[str, Any]:
  """All of it where JAX runs on a GPU, or `gpu_anywhere`; elsewhere `{'unmeasured': why}`."""
  backend = jax.default_backend()
  if backend != 'gpu' and not settings.gpu_anywhere:
    goals = [goal(what, None, most=most) for what, most in _GOALS.values()]
    return {'unmeasured': f'JAX runs on {backend}, not on a GPU.', 'goals': goals}
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', PredictionWarning)
    network = jax.device_put(of_network(settings.gpu_predicted))
    repetitions = settings.gpu_predicted.repetitions
    large = _large_history(settings.gpu_weights, settings.gpu_leaf)
    parts = {
      'network': _predicted(network, STEPS, repetitions, 'float32', show),
      'large': _predicted(large, 1, settings.gpu_repetitions, 'bfloat16', show),
      'epoch': _epoch(settings, show),
    }
  return {
    'note': f'JAX ran on {backend}.',
    **parts,
    'tables': {
      part['title']: [
        {'': name, 'seconds': spread(seconds), f'{part["unit"]} a second': part['rates'][name]}
        for name, seconds in part['seconds'].items()
      ]
      for part in parts.values()
    },
    'goals': [
      goal(f'{what}, `{name}`', spread(seconds)['median'], most=most)
      for part, (what, most) in _GOALS.items()
      for name, seconds in parts[part]['seconds'].items()
    ],
  }  # fmt: skip


def _predicted(
  history: History, steps: int, repetitions: int, dtype: str, show: bool
) -> dict[str, Any]:
  weights, leaves = num_predicted(history)
  contestants = {
    predictor: lambda predictor=predictor: api.predict(history, steps, predictor=predictor)
    for predictor in PREDICTORS
  }
  title = f'{steps} step(s) of {weights:,} weights in {leaves} leaves, {dtype}'
  times = race(contestants, repetitions, title, show=show)
  return {
    'title': title, 'unit': 'weights', 'weights': weights, 'leaves': leaves, 'seconds': times,
    'rates': rates(times, weights),
  }  # fmt: skip


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
  _, fit = epoch_of(task, settings.batch_size, 'cosine')
  times = race({'fit': fit}, settings.gpu_repetitions, 'epoch on the GPU', show=show)
  dtype = target.options.get('dtype', 'float32')
  return {
    'title': f'An epoch of {target.model} in {dtype}, {len(labels):,} images in batches of '
    f'{settings.batch_size}, augmented',
    'unit': 'images', 'seconds': times, 'rates': rates(times, len(labels)),
  }  # fmt: skip
