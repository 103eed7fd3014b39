"""A forgetting run small enough to be made in a test, and ways to look at what a run leaves."""

import contextlib
import functools
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from know_jax import forgetting, trees
from know_jax.data.base import Arrays
from know_jax.runs.record import RunRecord
from know_jax.system.signals import raise_terminated
from know_jax.tasks import classification
from know_jax.tasks.base import Task

SIZES = [625, 250, 100, 40, 16]
"""The subsets of `small_config`; the smallest is one batch, so that order plays no part in it."""

STEPS = [78, 30, 12, 4, 2]
"""The steps of its stages."""


def small_config(**fields: Any) -> ConfigDict:
  """Five stages on the digits 0-4, of a small network with BatchNorm."""
  small = {
    'classes': (0, 1, 2, 3, 4),
    'train_examples': 625,
    'rate': 0.4,
    'stratified': True,
    'model': 'cnn_bn',
    'width': 2,
    'epochs': 2,
    'batch_size': 16,
    'lr': 0.01,
  }
  config = forgetting.default_config()
  config.update(small | fields)
  return config


def forget(workdir: Path, **fields: Any) -> RunRecord:
  return forgetting.run(small_config(**fields), workdir, show_progress=False)


def snapshot(folder: Path) -> dict[str, bytes]:
  """The content of every file below a folder."""
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


def assert_same_bits(found: Any, expected: Any) -> None:
  found, expected = trees.named_leaves(found), trees.named_leaves(expected)
  assert list(found) == list(expected)
  for path, leaf in found.items():
    assert leaf.dtype == expected[path].dtype, path
    assert np.asarray(leaf).tobytes() == np.asarray(expected[path]).tobytes(), path


def assert_close(found: Any, expected: Any, **tolerance: float) -> None:
  found, expected = trees.named_leaves(found), trees.named_leaves(expected)
  assert list(found) == list(expected)
  for path, leaf in found.items():
    np.testing.assert_allclose(leaf, expected[path], err_msg=path, **tolerance)


def task_of(
  model: Any, images: np.ndarray, labels: np.ndarray, mean: Any = None, **options: Any
) -> Task:
  """Classification of such images, which are also those that it is tested on."""
  source = Arrays({'image': images, 'label': labels}, labels)
  return classification.task(model, source, source, mean=mean, **options)


# -- training in NumPy ---------------------------------------------------------------------------


def model_inputs(images: np.ndarray, mean_of: np.ndarray) -> np.ndarray:
  """Images / 255 minus the mean of others."""
  return (images / 255 - (mean_of / 255).mean(0)).astype(np.float32)


def log_softmax(logits: Any) -> np.ndarray:
  logits = np.asarray(logits, np.float64)
  logits = logits - logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@functools.partial(jax.jit, static_argnums=0)
def gradients(model: nn.Module, params: Any, batch_stats: Any, images: Any, labels: Any) -> Any:
  """((loss, (logits, new batch_stats)), gradients) on one device, without pmap."""

  def loss_fn(params: Any) -> Any:
    logits, new = model.apply(
      {'params': params, 'batch_stats': batch_stats}, images, train=True, mutable=['batch_stats']
    )
    chosen = nn.log_softmax(logits)[np.arange(len(labels)), labels]
    return -chosen.mean(), (logits, new['batch_stats'])

  return jax.value_and_grad(loss_fn, has_aux=True)(params)


class NumPyOptimizer:
  """Adam (Kingma and Ba, 2015), AdamW (Loshchilov and Hutter, 2019) and momentum, in float64."""

  def __init__(self, name: str, weight_decay: float, epsilon: float = 1e-7):
    self.name, self.weight_decay, self.epsilon, self.steps = name, weight_decay, epsilon, 0
    self.m: dict[str, Any] = {}
    self.v: dict[str, Any] = {}

  def update(self, params: dict[str, Any], grads: dict[str, Any], lr: float) -> dict[str, Any]:
    """Path -> leaf after a step."""
    self.steps += 1
    return {path: self._leaf(path, p, grads[path], lr) for path, p in params.items()}

  def _leaf(self, path: str, p: np.ndarray, g: np.ndarray, lr: float) -> np.ndarray:
    g, decay = np.asarray(g, np.float64), self.weight_decay * (p.ndim > 1)
    if self.name != 'adamw':
      g = g + decay * p
    m, v = self.m.get(path, 0.0), self.v.get(path, 0.0)
    if self.name == 'sgd':
      self.m[path] = 0.9 * m + g
      return p - lr * self.m[path]
    self.m[path], self.v[path] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    m_hat = self.m[path] / (1 - 0.9**self.steps)
    v_hat = self.v[path] / (1 - 0.999**self.steps)
    step = m_hat / (np.sqrt(v_hat) + self.epsilon)
    if self.name == 'adamw':
      step = step + decay * p
    return p - lr * step


# -- signals and compilations --------------------------------------------------------------------


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
  """SIGTERM as in scripts: it raises `Terminated`."""
  before = signal.signal(signal.SIGTERM, raise_terminated)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


_compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
  lambda name, seconds, **_: _compiled.append(name) if 'backend_compile' in name else None
)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
  """A list that, after the block, has an entry for each program that XLA compiled in it."""
  start, found = len(_compiled), list[str]()
  yield found
  found.extend(_compiled[start:])
