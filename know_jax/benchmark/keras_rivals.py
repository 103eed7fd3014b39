"""KNOWN and the small CNN in Keras, rebuilt from their descriptions, where TensorFlow is there."""

import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from know_jax.benchmark.histories import History, by_kind


def absent() -> str:
  """Why Keras is not compared with; '' where it is."""
  if jax.default_backend() != 'cpu':
    return f'Keras is compared with on CPUs only; JAX runs on {jax.default_backend()}.'
  for package in ('tensorflow', 'keras'):
    if importlib.util.find_spec(package) is None:
      return f'Keras is not compared with: the package {package} is not installed.'
  return ''


def _import_keras() -> Any:
  # Keras reads its backend where it is first imported, TensorFlow how much it has to say.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ['KERAS_BACKEND'] = 'tensorflow'
  import keras

  return keras


# --- KNOWN ----------------------------------------------------------------------------------------


class KerasKNOWN:
  """The authors' way to predict: a functional model for each kind of leaf, and its `predict`.

  To its advantage all leaves of a kind are predicted in one call, and the batch size is the fastest
  of several.
  """

  def __init__(self, theta: Any, windows: np.ndarray, batch_sizes: Sequence[int]):
    """Builds the models, and chooses the batch size on windows `[N, S]`."""
    self._models = {kind: known_model(params) for kind, params in theta.items()}
    self.batch_size = _fastest(
      lambda size: next(iter(self._models.values())).predict(windows, batch_size=size, verbose=0),
      batch_sizes,
    )

  def __call__(self, history: History) -> dict[str, np.ndarray]:
    """Predicts one step ahead: path -> leaf."""
    result: dict[str, np.ndarray] = {}
    for kind, leaves in by_kind(history).items():
      rows = [
        np.concatenate([np.ravel(leaf) for leaf in stage])
        for stage in zip(*leaves.values(), strict=True)
      ]
      windows = np.stack(rows, axis=-1)
      moved = self._models[kind].predict(windows, batch_size=self.batch_size, verbose=0)[:, 0]
      splits = np.cumsum([stages[-1].size for stages in leaves.values()])[:-1]
      parts = np.split(rows[-1] + moved, splits)
      for (path, stages), part in zip(leaves.items(), parts, strict=True):
        result[path] = part.reshape(stages[-1].shape)
    return result


def known_model(params: Any) -> Any:
  """The paper's KNOWN as a functional Keras model with these parameters: [N, S] -> [N, 1]."""
  keras = _import_keras()
  made: dict[str, Any] = {}

  def dense(name: str, x: Any, layer: Any, **options: Any) -> Any:
    made[name] = (keras.layers.Dense(layer['bias'].shape[0], **options), layer)
    return made[name][0](x)

  def stream(name: str, x: Any) -> Any:
    p = params[name]
    h = dense(f'{name}/embed', x, p['embed'])
    z = dense(f'{name}/squeeze', h, p['squeeze'], activation='relu')
    gate = keras.ops.exp(dense(f'{name}/gate', z, p['gate']) * h)
    h = dense(f'{name}/offset', z, p['offset'])
    h = h + dense(f'{name}/amplitude', z, p['amplitude']) * gate
    h = dense(f'{name}/project', h, p['project'])
    return keras.layers.LeakyReLU(negative_slope=0.3)(h)

  window = keras.Input((params['weights']['embed']['kernel'].shape[0],))
  streams = [stream('weights', window), stream('differences', window[:, 1:] - window[:, :-1])]
  joined = keras.layers.Concatenate()(streams)
  out = dense('residual', joined, params['residual'], activation='tanh')
  model = keras.Model(window, out)
  for layer, result in made.values():
    layer.set_weights([np.asarray(result['kernel']), np.asarray(result['bias'])])
  return model


def _fastest(call: Callable[[int], Any], choices: Sequence[int]) -> int:
  seconds = {}
  for choice in choices:
    call(choice)  # Traced for each size of batch.
    began = time.perf_counter()
    call(choice)
    seconds[choice] = time.perf_counter() - began
  return min(seconds, key=seconds.__getitem__)


# --- the small CNN --------------------------------------------------------------------------------


def cnn(params: Any, image: tuple[int, int, int], *, jit: bool, lr: float) -> Any:
  """`models.cnn.CNN` without BatchNorm, with our module's parameters, compiled to train with Adam.

  `jit`: whether Keras has XLA compile the step.
  """
  keras = _import_keras()
  layers, names = [], [name for name in params if name.startswith('conv')]
  size = min(image[:2])
  for name in sorted(names):
    channels = params[name]['bias'].shape[0]
    layers.append(keras.layers.Conv2D(channels, 3, padding='same', activation='relu', name=name))
    if size > 1:
      layers.append(keras.layers.MaxPooling2D(2))
      size //= 2
  layers += [
    keras.layers.Flatten(),
    keras.layers.Dense(params['dense']['bias'].shape[0], activation='relu', name='dense'),
    keras.layers.Dense(params['head']['bias'].shape[0], name='head'),
  ]
  model = keras.Sequential([keras.Input(image), *layers])
  for name, layer in params.items():
    model.get_layer(name).set_weights([np.asarray(layer['kernel']), np.asarray(layer['bias'])])
  model.compile(
    optimizer=keras.optimizers.Adam(lr, epsilon=1e-7),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=['accuracy'],
    jit_compile=jit,
  )
  return model
