"""Losses and scores of segmentation and captioning, as sums that add up over batches.

Sums are taken over a whole set, never averaged over images or batches.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

IGNORED = 255
"""The label of pixels that count nowhere."""

_BANNED = 1e8


def pixel_losses(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy of every pixel, and 1 where it counts.

  Args:
    logits: [..., C].
    labels: integers [...]; `IGNORED` or 0 to C - 1.

  Returns:
    Losses and weights, float32 [...]; the loss of a batch is their weighted mean.
  """
  counts = labels != IGNORED
  at = jnp.where(counts, labels, 0).astype(jnp.int32)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), at)
  return jnp.where(counts, losses, 0), counts.astype(jnp.float32)


def confusion_matrix(
  labels: jax.Array, predictions: jax.Array, classes: int, mask: jax.Array | None = None
) -> jax.Array:
  """How many pixels of each label were given each prediction; `IGNORED` ones are left out.

  Args:
    labels: integers [B, ...]; `IGNORED` or 0 to C - 1.
    predictions: integers [B, ...], 0 to C - 1.
    classes: how many there are, C.
    mask: [B], 0 for examples that do not count.

  Returns:
    Counts, int32 [C, C]: rows are labels, columns predictions.
  """
  counts = labels != IGNORED
  if mask is not None:
    counts &= mask.reshape(mask.shape[0], *[1] * (labels.ndim - 1)) > 0
  at = jnp.where(counts, labels, 0).astype(jnp.int32) * classes + predictions
  cells = jnp.zeros(classes * classes, jnp.int32).at[at.ravel()].add(counts.ravel())
  return cells.reshape(classes, classes)


def segmentation_scores(confusion: np.ndarray) -> dict[str, float]:
  """Scores of a whole set.

  Args:
    confusion: counts [C, C], rows labels.

  Returns:
    'miou': the mean over the classes that are in labels or predictions of M_cc / (row + column -
    M_cc), as in Cityscapes' own script; a class that is predicted but has no labels counts as 0.
    'mean_accuracy': the mean over the classes that have labels of M_cc / row. 'accuracy': of all
    pixels. NaN where nothing was labelled.
  """
  confusion = np.asarray(confusion, np.float64)
  right, rows, columns = np.diag(confusion), confusion.sum(1), confusion.sum(0)
  union = rows + columns - right

  def mean(values: np.ndarray, over: np.ndarray) -> float:
    return float((values[over > 0] / over[over > 0]).mean()) if (over > 0).any() else float('nan')

  return {
    'miou': mean(right, union),
    'mean_accuracy': mean(right, rows),
    'accuracy': mean(right.sum(keepdims=True), rows.sum(keepdims=True)),
  }


def token_losses(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy of every token, and 1 where it counts.

  Padding (0) does not count, nor does a label that the network is not allowed to give, such as an
  unknown word (its loss is above 1e8).

  Args:
    logits: [B, T, V].
    labels: integers [B, T].

  Returns:
    Losses and weights, float32 [B, T]; the loss of a batch is their weighted mean.
  """
  losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
  counts = (labels != 0) & (losses < _BANNED)
  return jnp.where(counts, losses, 0), counts.astype(jnp.float32)


def token_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
  """Sums over the tokens of a batch, for `token_scores`.

  Args:
    logits: [B, T, V].
    labels: integers [B, T].
    mask: [B], 0 for examples that do not count.
  """
  losses, counts = token_losses(logits, labels)
  mask = mask[:, None]
  words = (labels != 0) * mask
  return {
    'loss': (losses * mask).sum(),
    'losses': (counts * mask).sum(),
    'right': ((logits.argmax(-1) == labels) * words).sum(),
    'words': words.sum(),
  }


def token_scores(sums: Mapping[str, Any]) -> dict[str, float]:
  """Scores of a whole set.

  Returns:
    'loss', and 'masked_accuracy': the share of right tokens among those that are not padding.
    Unknown words count in the accuracy, as misses. Both over all tokens of the set: Keras, which
    averages the batches' values, gives others.
  """
  loss, losses, right, words = (float(sums[k]) for k in ('loss', 'losses', 'right', 'words'))
  return {
    'loss': loss / losses if losses else float('nan'),
    'masked_accuracy': right / words if words else float('nan'),
  }
