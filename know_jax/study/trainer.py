"""Many trainings by one compiled program, on images that stay on the device."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from know_jax import trees
from know_jax.data.augmentation import PAPER_AUGMENTATION, Augmentation, augment
from know_jax.data.sources import to_device_input
from know_jax.kinds import KEEP, leaf_kinds
from know_jax.models import HEAD, build_model

_CHUNK = 1024  # Steps that one call of the compiled program may take.
_PART = 500  # Images that one call of the evaluation takes.


@dataclasses.dataclass(frozen=True)
class Task:
  """What a training reads of the images on the device.

  Attributes:
    train: indices of its training images.
    mean: of them, [H, W, C].
    classes: how many of the head's outputs count.
  """

  train: np.ndarray
  mean: np.ndarray
  classes: int


class Trainer:
  """Trains and tests on images that stay on the device; a head of `outputs` serves every task."""

  def __init__(
    self,
    config: Mapping[str, Any],
    images: np.ndarray,
    labels: np.ndarray,
    augmentation: Augmentation = PAPER_AUGMENTATION,
  ):
    self.config, self.augmentation = config, augmentation
    self.images, self.labels = jnp.asarray(images), jnp.asarray(labels, jnp.int32)
    self.outputs = int(labels.max()) + 1
    self.model = build_model(
      config['model'], num_classes=self.outputs, width=config['width'], dtype=config['dtype']
    )

  def fresh(self, key: jax.Array, classes: int) -> Any:
    """New variables: convolutions he-normal, as the authors', the head for `classes` outputs."""
    images = jnp.zeros((1, *self.images.shape[1:]))
    init = jax.jit(functools.partial(self.model.init, train=False))
    variables = jax.device_get(init(key, images))
    he_normal = jax.nn.initializers.he_normal()
    keys = iter(jax.random.split(key, len(jax.tree.leaves(variables['params']))))
    variables['params'] = jax.tree.map(
      lambda leaf: np.asarray(he_normal(next(keys), leaf.shape)) if leaf.ndim == 4 else leaf,
      variables['params'],
    )
    head = variables['params'][HEAD]['kernel']
    kernel = np.zeros_like(head)
    kernel[:, :classes] = jax.nn.initializers.glorot_uniform()(key, (len(head), classes))
    variables['params'][HEAD] = {'kernel': kernel, 'bias': np.zeros(self.outputs, np.float32)}
    return variables

  def train(
    self, variables: Any, task: Task, rates: np.ndarray, key: jax.Array, *, backbone: bool = True
  ) -> tuple[Any, float]:
    """Trains at these rates, one a step, in reshuffled epochs of whole batches.

    Args:
      variables: where to start.
      task: on what.
      rates: [steps], a whole number of epochs.
      key: decides order and augmentation.
      backbone: whether more than the head and BatchNorm moves.

    Returns:
      The variables, and the accuracy over the steps of the last epoch, on augmented images.
    """
    size = self.config['batch_size']
    per_epoch = len(task.train) // size
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    epochs = [rng.permutation(task.train) for _ in range(len(rates) // per_epoch)]
    order = np.concatenate([epoch[: per_epoch * size] for epoch in epochs]).reshape(-1, size)
    params, stats = variables['params'], variables.get('batch_stats', {})
    state = jax.device_put((params, stats, optax.scale_by_adam().init(params)))
    correct: list[np.ndarray] = []
    for first in range(0, len(rates), _CHUNK):
      part = slice(first, min(first + _CHUNK, len(rates)))
      count = part.stop - first
      batches, lrs = np.zeros((_CHUNK, size), np.int32), np.zeros(_CHUNK, np.float32)
      batches[:count], lrs[:count] = order[part], rates[part]
      state, hits = _advance(
        self.model, self.config['epsilon'], self.augmentation, state, self.images, self.labels,
        task.mean, task.classes, batches, lrs, float(backbone), jax.random.fold_in(key, first),
        count,
      )  # fmt: skip
      correct.append(np.asarray(hits)[:count])
    params, stats, _ = jax.device_get(state)
    accuracy = np.concatenate(correct)[-per_epoch:].mean() / size
    return {'params': params, **({'batch_stats': stats} if stats else {})}, float(accuracy)

  def score(self, variables: Any, indices: np.ndarray, task: Task) -> dict[str, float]:
    """Accuracy and mean cross-entropy on these images, as they are."""
    variables, total = jax.device_put(variables), np.zeros(2)
    for first in range(0, len(indices), _PART):
      part = indices[first : first + _PART]
      padded = np.zeros(_PART, np.int32)
      padded[: len(part)] = part
      total += np.asarray(
        _sums(
          self.model, variables, self.images, self.labels, task.mean, task.classes, padded,
          len(part),
        )
      )  # fmt: skip
    return {'accuracy': total[0] / len(indices), 'loss': total[1] / len(indices)}


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _advance(
  model,
  epsilon,
  augmentation,
  state,
  images,
  labels,
  mean,
  classes,
  batches,
  lrs,
  backbone,
  key,
  count,
):
  """The first `count` steps; also how many images of each were right."""
  kinds = leaf_kinds(state[0])
  frozen = {path for path, kind in kinds.items() if kind != KEEP and not path.startswith(HEAD)}

  def loss_fn(params, stats, x, y):
    variables = {'params': params, 'batch_stats': stats}
    logits, new = model.apply(variables, x, train=True, mutable=['batch_stats'])
    logits = _counted(logits, classes)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, (new.get('batch_stats', {}), (logits.argmax(-1) == y).sum())

  def body(i, carry):
    (params, stats, adam), hits = carry
    keys = jax.random.split(jax.random.fold_in(key, i), batches.shape[1])
    x = augment(keys, to_device_input(images[batches[i]], mean), augmentation)
    gradient = jax.grad(loss_fn, has_aux=True)
    grads, (stats, right) = gradient(params, stats, x, labels[batches[i]])
    updates, adam = optax.scale_by_adam(eps=epsilon).update(grads, adam)

    def move(path, leaf, update):
      free = backbone if trees.path_string(path) in frozen else 1.0
      return leaf - lrs[i] * free * update

    params = jax.tree_util.tree_map_with_path(move, params, updates)
    return (params, stats, adam), hits.at[i].set(right)

  return jax.lax.fori_loop(0, count, body, (state, jnp.zeros(len(lrs), jnp.int32)))


@functools.partial(jax.jit, static_argnums=0)
def _sums(model, variables, images, labels, mean, classes, indices, count):
  """Of the first `count` images: how many are right, and the summed cross-entropy."""
  x = to_device_input(images[indices], mean)
  logits = _counted(model.apply(variables, x, train=False), classes)
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels[indices])
  right = logits.argmax(-1) == labels[indices]
  valid = jnp.arange(len(indices)) < count
  return jnp.stack([(right * valid).sum(), (loss * valid).sum()])


def _counted(logits: jax.Array, classes: Any) -> jax.Array:
  """The logits, those of no class at minus infinity in effect: their softmax is 0."""
  return jnp.where(jnp.arange(logits.shape[-1]) < classes, logits, -1e9)
